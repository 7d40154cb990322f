"""Where ours differs from `nn.MultiheadAttention`: each row of docs/differences.md names its test."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

import attn
from attn.testing import assert_module_close

E, H, N, L = 16, 4, 3, 5
TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / "docs" / "differences.md"


def pair(**ctor: object) -> tuple[nn.MultiheadAttention, attn.MultiheadAttention]:
    stock = nn.MultiheadAttention(E, H, batch_first=True, **ctor)
    ours = attn.MultiheadAttention(E, H, batch_first=True, **ctor)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


@pytest.mark.skipif(not PAGE.is_file(), reason="the source tree is not here")
def test_every_row_names_a_test_that_exists() -> None:
    rows = [
        row for row in PAGE.read_text().splitlines() if row.startswith("| ") and not row.startswith(("| ---", "| nn."))
    ]
    assert len(rows) >= 15
    for row in rows:
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row)
        assert named, row
        for file, name in named:
            tree = ast.parse((TESTS / file).read_text())
            assert name in {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}, row


def test_output_is_contiguous() -> None:
    stock, ours = pair()
    x = torch.randn(N, L, E)
    assert ours(x, x, x)[0].is_contiguous()
    assert not stock(x, x, x)[0].is_contiguous()


def test_empty_sizes_with_masks() -> None:
    """PyTorch's reshape of a mask without elements fails."""
    stock, ours = pair()
    x, none = torch.randn(N, L, E), torch.randn(N, 0, E)
    padding = torch.zeros(N, 0, dtype=torch.bool)
    with pytest.raises(RuntimeError):
        stock(x, none, none, key_padding_mask=padding, need_weights=False)
    out, _ = ours(x, none, none, key_padding_mask=padding, need_weights=False)
    assert torch.equal(out, ours.out_proj.bias.expand_as(out))


def test_gradients_of_rows_that_are_finfo_min_throughout() -> None:
    """PyTorch's fused CPU kernel loses the row's length there; its path with weights is right."""
    stock, ours = pair()
    mask = torch.zeros(L, L)
    mask[1] = torch.finfo(torch.float32).min
    g = torch.randn(N, L, E)

    def gradient(m: nn.MultiheadAttention, need_weights: bool, dtype: torch.dtype = torch.float32) -> Tensor:
        x = torch.randn(N, L, E, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
        out = m.to(dtype)(x, x, x, attn_mask=mask.to(dtype), need_weights=need_weights)[0]
        out.backward(g.to(dtype))
        m.to(torch.float32)
        return x.grad

    right, rounded = gradient(stock, True, torch.float64), gradient(stock, True)
    assert_module_close(gradient(ours, False), right, rounded)
    with pytest.raises(AssertionError):
        assert_module_close(gradient(stock, False), right, rounded)


def test_autocast_leaves_float_masks_alone() -> None:
    """PyTorch casts a float32 mask too, and finfo.min becomes -inf in bfloat16."""
    stock, ours = pair()
    x, mask = torch.randn(N, L, E), torch.zeros(L, L)
    mask[1] = torch.finfo(torch.float32).min
    with torch.autocast("cpu", torch.bfloat16):
        assert ours(x, x, x, attn_mask=mask)[1][:, 1].isfinite().all()
        assert stock(x, x, x, attn_mask=mask)[1][:, 1].isnan().all()


def test_a_loss_on_the_weights_alone_leaves_values_without_gradient() -> None:
    stock, ours = pair()
    grads = []
    for m in (ours, stock):
        q, k, v = (torch.randn(N, L, E, requires_grad=True) for _ in range(3))
        m(q, k, v)[1].square().sum().backward()
        grads.append(v.grad)
    assert grads == [None, None]


def test_parameters_are_read_once_per_call() -> None:
    """PyTorch looks at them several times, and each look evaluates a parametrization anew."""
    counts = []

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.looks = 0

        def forward(self, x: Tensor) -> Tensor:
            self.looks += 1
            return x

    for m in pair():
        look = Counted()
        parametrize.register_parametrization(m, "in_proj_weight", look)
        look.looks = 0
        x = torch.randn(N, L, E)
        m.eval()(x, x, x)
        counts.append(look.looks)
    assert counts[0] > 1
    assert counts[1] == 1


def test_a_hook_keeps_the_forward_alive() -> None:
    stock, ours = pair()
    assert len(ours._forward_hooks) == 1
    assert not stock._forward_hooks


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_static_quantization_needs_restore() -> None:
    _, ours = pair()
    ours.qconfig = torch.ao.quantization.default_qconfig
    twin = torch.ao.nn.quantizable.MultiheadAttention
    with pytest.raises(AssertionError):
        twin.from_float(ours)
    assert isinstance(twin.from_float(attn.restore(ours)), twin)


def test_16_bits_are_nearer_to_the_truth() -> None:
    """Scores and their softmax are float32, where PyTorch's path with weights rounds each step."""
    errors = []
    x = torch.randn(N, 64, E).bfloat16()
    stock, ours = (m.bfloat16() for m in pair())
    exact = nn.MultiheadAttention(E, H, batch_first=True).double()
    exact.load_state_dict(stock.state_dict())
    right = exact(*[x.double()] * 3)[1]
    for m in (ours, stock):
        errors.append(float((m(x, x, x)[1].double() - right).detach().square().mean()))
    assert errors[0] < errors[1]


def test_seeds_are_drawn_once_per_call() -> None:
    """PyTorch draws a number per weight, ours one seed per call: the generator moves on by another step."""
    after = []
    for m in pair(dropout=0.5):
        torch.manual_seed(0)
        x = torch.ones(N, L, E)
        m(x, x, x)
        after.append(torch.get_rng_state())
    assert not torch.equal(*after)


def test_mixed_dtypes_say_which_argument() -> None:
    _, ours = pair()
    x = torch.randn(N, L, E)
    with pytest.raises(RuntimeError, match=r"key is torch\.float64"):
        ours(x, x.double(), x.double())
