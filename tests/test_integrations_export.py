"""Replaced models leave Python: torch.export, ONNX, pickles in another process; and train in mixed precision."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import attn
from attn import transformer as tf
from attn.integrations import standard_ops
from attn.testing import assert_close, assert_module_close

E, N, L = 16, 3, 7
ROOT = str(Path(attn.__file__).parent.parent)

pytestmark = pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:enable_nested_tensor")


class Padded(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(E, 4, 24, dropout=0.0, batch_first=True)
        self.net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.net(x, src_key_padding_mask=padding)


def given(N: int, L: int) -> tuple[Tensor, Tensor]:
    return torch.randn(N, L, E), torch.arange(L) >= torch.randint(1, L + 1, (N, 1))


def program_of(model: nn.Module) -> torch.export.ExportedProgram:
    sizes = {0: torch.export.Dim("batch", min=2, max=64), 1: torch.export.Dim("length", min=2, max=64)}
    with torch.no_grad():
        return torch.export.export(model, given(N, L), dynamic_shapes=(sizes, sizes))


def ops_of(program: torch.export.ExportedProgram) -> set[str]:
    return {str(n.target).partition(".")[0] for n in program.graph.nodes if n.op == "call_function"}


def test_an_exported_model_of_standard_ops() -> None:
    model = attn.replace(Padded()).eval()
    program = program_of(model)
    assert "attn" in ops_of(program)
    plain = standard_ops(program)
    assert "attn" not in ops_of(plain)
    for sizes in ((N, L), (5, 9)):
        tensors = given(*sizes)
        assert_close(plain.module()(*tensors), model(*tensors))
    with pytest.raises(TypeError, match="program is Padded"):
        standard_ops(model)


def test_weights_and_decoding_of_standard_ops() -> None:
    class Both(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
            out, weights = attn.functional.attend(q, k, v, weights="heads", mask=attn.masks.causal())[::2]
            last = attn.decode_attention(q[:, :, -1:], k, v, lengths=lengths)
            assert isinstance(weights, Tensor)
            assert isinstance(last, Tensor)
            return out @ weights[..., :4, :4], last

    q, k, v = torch.randn(3, 2, 4, 5, 4)
    tensors = (q, k, v, torch.tensor([5, 3]))
    program = standard_ops(torch.export.export(Both(), tensors))
    assert "attn" not in ops_of(program)
    for mine, other in zip(program.module()(*tensors), Both()(*tensors), strict=True):
        assert_close(mine, other)


@pytest.mark.slow
def test_onnx(tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="pip install onnx onnxscript onnxruntime runs this test")
    pytest.importorskip("onnxscript", reason="pip install onnx onnxscript onnxruntime runs this test")
    model = attn.replace(Padded()).eval()
    file = tmp_path / "model.onnx"
    torch.onnx.export(standard_ops(program_of(model)), given(N, L), dynamo=True).save(file)
    session = runtime.InferenceSession(file)
    names = [i.name for i in session.get_inputs()]
    for sizes in ((N, L), (5, 9)):
        tensors = given(*sizes)
        (out,) = session.run(None, {n: t.numpy() for n, t in zip(names, tensors, strict=True)})
        with torch.no_grad():
            exact = copy.deepcopy(model).double()(tensors[0].double(), tensors[1])
            assert_module_close(torch.tensor(out), exact, model(*tensors))


@pytest.mark.parametrize("kind", ["replaced", "ours"])
def test_a_pickle_loads_in_another_process(tmp_path: Path, kind: str) -> None:
    model = attn.replace(Padded()) if kind == "replaced" else tf.from_torch(Padded().net)
    model.eval()
    tensors = given(N, L) if kind == "replaced" else given(N, L)[:1]
    with torch.no_grad():
        torch.save((model, tensors, model(*tensors)), tmp_path / "model.pt")
    code = (
        f"import sys; sys.path.append({ROOT!r}); import torch; torch.set_num_threads(1)\n"
        f"model, tensors, expected = torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)\n"
        "with torch.no_grad(): found = model(*tensors)\n"
        "kinds = {type(m).__module__ for m in model.modules() if isinstance(m, torch.nn.MultiheadAttention)}\n"
        "assert not model.training and all(k.startswith('attn.') for k in kinds) and kinds, kinds\n"
        "print('largest difference', float((found - expected).abs().max()))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "largest difference 0.0\n"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_under_autocast_and_a_scaler(dtype: torch.dtype) -> None:
    stock = Padded().net
    ours = attn.replace(copy.deepcopy(stock))
    exact = copy.deepcopy(stock).double()
    x, g = torch.randn(N, L, E), torch.randn(N, L, E)
    found = []
    for model in (ours, stock):
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        with torch.autocast("cpu", dtype):
            out = model(x)
        scaler.scale((out.float() * g).sum()).backward()
        scaler.unscale_(optimizer)
        found.append({n: p.grad.clone() for n, p in model.named_parameters()})
        before = [p.detach().clone() for p in model.parameters()]
        scaler.step(optimizer)
        scaler.update()
        assert any(not torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
    (exact(x.double()) * g.double()).sum().backward()
    scale = max(p.grad.abs().max() for p in exact.parameters())
    for name, p in exact.named_parameters():
        mine, theirs = (torch.cat([f[name].flatten(), scale.float()[None]]) for f in found)
        # In 16 bits' units, of the size of the largest gradient: those of key biases cancel to nothing.
        truth = torch.cat([p.grad.flatten(), scale[None]])
        assert_module_close(mine.to(dtype), truth, theirs.to(dtype), name)


def test_a_scaler_skips_a_step_that_overflows() -> None:
    model = attn.replace(Padded().net)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    before = [p.detach().clone() for p in model.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(N, L, E)).square().sum()
    scaler.scale(loss.float()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 2.0**126
    assert all(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
