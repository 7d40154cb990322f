"""`attn.replace` and `attn.restore`: in place, nothing lost, nothing skipped in silence."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

import attn
from attn.testing import assert_close

E, H = 8, 2


class Own(nn.MultiheadAttention):
    """A subclass with a forward of its own."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


class Empty(nn.MultiheadAttention):
    """A subclass that adds nothing."""


class Model(nn.Module):
    """Two attentions, one of them reached by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.MultiheadAttention(E, H, batch_first=True)
        self.block = nn.ModuleDict({"second": nn.MultiheadAttention(E, H, batch_first=True), "norm": nn.LayerNorm(E)})
        self.again = self.first

    def forward(self, x: Tensor) -> Tensor:
        for m in (self.first, self.block["second"], self.again):
            x = x + m(x, x, x)[0]
        return x


def kinds(model: nn.Module) -> list[type]:
    return [type(m) for m in model.modules() if isinstance(m, nn.MultiheadAttention)]


def quietly(call: Callable[[], Any]) -> Any:
    """The result of a call that must not warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", attn.ReplaceWarning)
        return call()


def test_objects_stay_and_results_too() -> None:
    model = Model()
    x = torch.randn(2, 3, E)
    expected = model(x)
    before = dict(model.named_modules(remove_duplicate=False))
    parameters = dict(model.named_parameters())
    state, text = copy.deepcopy(model.state_dict()), repr(model)
    assert quietly(lambda: attn.replace(model)) is model
    assert kinds(model) == [attn.MultiheadAttention] * 2
    assert dict(model.named_modules(remove_duplicate=False)) == before
    assert all(p is parameters[n] for n, p in model.named_parameters())
    assert model.again is model.first
    assert repr(model) == text
    assert all(torch.equal(t, state[n]) for n, t in model.state_dict().items())
    assert_close(model(x), expected)


def test_restore_is_bitwise_stock() -> None:
    model = Model()
    x = torch.randn(2, 3, E)
    expected, before = model(x), copy.deepcopy(model.first.__dict__)
    attn.replace(model, backend="reference", masked_rows="nan")
    assert quietly(lambda: attn.restore(model)) is model
    assert kinds(model) == [nn.MultiheadAttention] * 2
    assert model.first.__dict__.keys() == before.keys()
    assert not model.first._forward_hooks
    assert torch.equal(model(x), expected)
    assert quietly(lambda: attn.restore(model)) is model


def test_is_idempotent_and_takes_over_settings() -> None:
    model = attn.replace(Model(), backend="reference")
    quietly(lambda: attn.replace(model))
    assert len(model.first._forward_hooks) == 1
    assert model.first.backend == "reference"
    quietly(lambda: attn.replace(model, backend="sdpa", masked_rows="nan"))
    assert (model.first.backend, model.first.masked_rows) == ("sdpa", "nan")


def test_state_of_the_modules_is_kept() -> None:
    model = Model().to(torch.float64)
    model.first.eval()
    model.first.in_proj_weight.requires_grad_(False)
    seen: list[str] = []
    model.first.register_forward_pre_hook(lambda m, a: seen.append("pre"))
    model.first.register_forward_hook(lambda m, a, out: seen.append("forward"))
    shared = model.block["second"]
    shared.in_proj_weight = model.first.in_proj_weight
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    attn.replace(model)
    assert (model.first.training, model.training) == (False, True)
    assert not model.first.in_proj_weight.requires_grad
    assert model.first.in_proj_weight is shared.in_proj_weight
    assert model.first.in_proj_weight.dtype == torch.float64
    x = torch.randn(2, 3, E, dtype=torch.float64)
    before = shared.in_proj_bias.clone()
    model(x).sum().backward()
    optimizer.step()
    assert seen == ["pre", "forward"] * 2
    assert not torch.equal(shared.in_proj_bias, before)


def test_a_model_that_is_the_attention_itself() -> None:
    m = nn.MultiheadAttention(E, H)
    assert quietly(lambda: attn.replace(m)) is m
    assert type(m) is attn.MultiheadAttention
    assert type(attn.restore(m)) is nn.MultiheadAttention


def test_meta_device() -> None:
    with torch.device("meta"):
        model = Model()
    attn.replace(model)
    assert model(torch.empty(2, 3, E, device="meta")).is_meta


def test_saved_models() -> None:
    model = attn.replace(Model())
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    x = torch.randn(2, 3, E)
    assert torch.equal(other(x), model(x))
    assert kinds(attn.restore(other)) == [nn.MultiheadAttention] * 2
    assert kinds(model) == [attn.MultiheadAttention] * 2


# --- exclude ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("exclude", "expected"),
    [
        (["first"], ["second"]),
        (["again"], ["second"]),  # another name of the same module
        (["block"], ["first"]),  # and all inside
        ([nn.ModuleDict], ["first"]),
        (("block.second",), ["first"]),
        (["block.norm"], ["first", "second"]),
    ],
)
def test_exclude(exclude: list[Any], expected: list[str]) -> None:
    model = quietly(lambda: attn.replace(Model(), exclude=exclude))
    ours = {"first": model.first, "second": model.block["second"]}
    assert [n for n, m in ours.items() if isinstance(m, attn.MultiheadAttention)] == expected


@pytest.mark.parametrize(
    ("arguments", "kind", "words"),
    [
        ({"exclude": ["third"]}, ValueError, "exclude names 'third'"),
        ({"exclude": "first"}, TypeError, "give a list"),
        ({"exclude": [3]}, TypeError, "exclude holds 3"),
        ({"exclude": [int]}, TypeError, "exclude holds"),
        ({"backend": "magic"}, ValueError, "magic"),
        ({"masked_rows": "one"}, ValueError, "masked_rows is 'one'"),
    ],
)
def test_bad_arguments_change_nothing(arguments: dict[str, Any], kind: type[Exception], words: str) -> None:
    model = Model()
    with pytest.raises(kind, match=words):
        attn.replace(model, **arguments)
    assert kinds(model) == [nn.MultiheadAttention] * 2


@pytest.mark.parametrize("call", [attn.replace, attn.restore])
def test_what_is_no_module(call: Callable[[Any], Any]) -> None:
    with pytest.raises(TypeError, match="model is int"):
        call(3)


# --- what cannot be replaced ------------------------------------------------------------------------------


def test_subclasses_of_others_are_reported_in_one_warning() -> None:
    model = nn.ModuleDict({"own": Own(E, H), "empty": Empty(E, H), "plain": nn.MultiheadAttention(E, H)})
    with pytest.warns(attn.ReplaceWarning) as caught:
        attn.replace(model)
    assert len(caught) == 1
    said = str(caught[0].message)
    assert "own: " in said
    assert "forward of its own" in said
    assert "empty: " in said
    assert "plain" not in said
    assert [type(m) for m in model.values()] == [Own, Empty, attn.MultiheadAttention]
    assert caught[0].filename == __file__


def test_a_forward_on_the_object_is_reported() -> None:
    m = nn.MultiheadAttention(E, H)
    m.forward = m.forward  # type: ignore[method-assign]
    with pytest.warns(attn.ReplaceWarning, match="the model itself: its forward was replaced on the object"):
        attn.replace(m)
    assert type(m) is nn.MultiheadAttention


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_torchscript_is_reported() -> None:
    model = nn.Sequential(torch.jit.script(nn.MultiheadAttention(E, H)))
    with pytest.warns(attn.ReplaceWarning, match="TorchScript"):
        attn.replace(model)


def test_nothing_found_is_reported() -> None:
    with pytest.warns(attn.ReplaceWarning, match=r"(?s)Linear holds no nn\.MultiheadAttention.*sdpa_override\(\)"):
        attn.replace(nn.Linear(2, 2))
    with pytest.warns(attn.ReplaceWarning, match="outside of what exclude names"):
        attn.replace(Model(), exclude=[""])


def test_restore_names_what_has_no_stock_form() -> None:
    class Derived(attn.MultiheadAttention):
        pass

    model = nn.ModuleDict(
        {
            "grouped": attn.MultiheadAttention(E, H, num_kv_heads=1),
            "windowed": attn.MultiheadAttention(E, H, window=(1, 0)),
            "turned": attn.MultiheadAttention(E, H, rotary=attn.Rotary(2)),
            "derived": Derived(E, H),
            "plain": attn.MultiheadAttention(E, H, backend="reference"),
        }
    )
    with pytest.warns(attn.ReplaceWarning) as caught:
        attn.restore(model)
    said = str(caught[0].message)
    assert len(caught) == 1
    assert "grouped: PyTorch's module has no num_kv_heads=1" in said
    assert "windowed: PyTorch's module has no window=(1, 0)" in said
    assert "turned: PyTorch's module has no rotary=Rotary" in said
    assert "derived: " in said
    assert "plain" not in said
    assert type(model["plain"]) is nn.MultiheadAttention
    assert type(model["grouped"]) is attn.MultiheadAttention


# --- parametrized modules ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["in_proj_weight", "in_proj_bias"])
def test_parametrized_modules_are_replaced_and_restored(name: str) -> None:
    m = nn.MultiheadAttention(E, H, batch_first=True)
    parametrize.register_parametrization(m, name, nn.Tanh())
    x = torch.randn(2, 3, E)
    expected = m(x, x, x)[0]
    quietly(lambda: attn.replace(m))
    assert isinstance(m, attn.MultiheadAttention)
    assert type(m).__name__ == "ParametrizedMultiheadAttention"
    assert_close(m(x, x, x)[0], expected)
    assert_close(copy.deepcopy(m)(x, x, x)[0], expected)
    quietly(lambda: attn.restore(m))
    assert not isinstance(m, attn.MultiheadAttention)
    assert torch.equal(m(x, x, x)[0], expected)
    parametrize.remove_parametrizations(m, name)
    assert type(m) is nn.MultiheadAttention


def test_parametrizations_go_and_ours_stays() -> None:
    m = attn.replace(parametrizations.weight_norm(nn.MultiheadAttention(E, H), "in_proj_weight"))
    parametrize.remove_parametrizations(m, "in_proj_weight")
    assert type(m) is attn.MultiheadAttention
    other = nn.MultiheadAttention(E, H)
    twin = nn.MultiheadAttention(E, H)
    for module in (other, twin):
        parametrize.register_parametrization(module, "in_proj_bias", nn.Tanh())
    attn.replace(other)
    assert not isinstance(twin, attn.MultiheadAttention)
