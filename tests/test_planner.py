"""Which backend runs: order, precedence, refusals, the rule for unproven kernels, and what `explain` says of it."""

import warnings

import pytest
import torch

import attn
from attn import backends, planner
from attn.backends import load, proven, sdpa
from attn.backends.base import Backend, Capability
from attn.spec import AttentionSpec
from attn.testing import spy

PLAIN = AttentionSpec(head_dim=8, value_dim=8)


class Fake(Backend):
    """A backend for one device, whose results never matter here."""

    name = "fake"
    needs_proof = True
    capability = Capability(
        frozenset({"cpu", "cuda"}), frozenset({torch.float32}), features=frozenset({"grad"}), oldest_sm=80
    )


@pytest.fixture
def fake(monkeypatch):
    """A backend in front of all others, gone afterwards."""
    monkeypatch.setattr(backends, "BACKENDS", {"fake": f"{__name__}:Fake", **backends.BACKENDS})
    monkeypatch.setattr(planner, "BACKENDS", backends.BACKENDS)
    made = Fake()
    monkeypatch.setitem(backends._loaded, "fake", made)
    planner.forget()
    yield made
    planner.forget()


def qkv(**options):
    return [torch.randn(1, 2, 3, 8, **options) for _ in range(3)]


@pytest.fixture
def no_library(monkeypatch):
    """As if nothing had been compiled."""
    monkeypatch.setattr(load("cpu"), "missing", "its library is not here")
    planner.forget()
    yield
    planner.forget()


def test_names_are_in_the_order_asked():
    assert planner.names()[-3:] == ("cpu", "sdpa", "reference")
    assert set(attn.available_backends()) <= set(planner.names())
    assert {"sdpa", "reference"} <= set(attn.available_backends())


@pytest.mark.usefixtures("no_library")
def test_without_a_library_plain_calls_go_to_sdpa_and_the_rest_to_the_reference():
    q, k, v = qkv()
    with spy() as calls:
        attn.attention(q, k, v)
        attn.attention(q, k, v, softcap=2.0)
    assert calls == [("sdpa", "call"), ("reference", "forward")]


@pytest.mark.usefixtures("no_library")
def test_precedence_call_then_context_then_module_then_planner():
    q, k, v = qkv()
    module = attn.MultiheadAttention(16, 2, backend="reference").eval()
    x = torch.randn(3, 1, 16)
    with spy() as calls:
        module(x, x, x, need_weights=False)
        with attn.use_backend("sdpa"):
            module(x, x, x, need_weights=False)
            attn.attention(q, k, v, backend="reference")
            with attn.use_backend("reference"):
                attn.attention(q, k, v)
            attn.attention(q, k, v)
        attn.attention(q, k, v)
    assert [name for name, _ in calls] == ["reference", "sdpa", "reference", "reference", "sdpa", "sdpa"]


def test_the_outer_backend_is_back_after_an_error():
    with pytest.raises(KeyError), attn.use_backend("reference"):
        raise KeyError
    assert planner.state.forced is None


@pytest.mark.parametrize("use", [lambda n: attn.use_backend(n), lambda n: attn.attention(*qkv(), backend=n)])
def test_unknown_names_are_refused_at_once(use):
    with pytest.raises(ValueError, match=r"'cudnn'.*known backends.*reference"):
        use("cudnn")


def test_a_forced_backend_never_falls_back():
    with pytest.raises(RuntimeError, match=r"'sdpa' was asked for and cannot run this call: does not do softcap"):
        attn.attention(*qkv(), softcap=1.0, backend="sdpa")
    with attn.use_backend("sdpa"), pytest.raises(RuntimeError, match="does not do dropout"):
        attn.attention(*qkv(), dropout_p=0.5)


def test_a_known_plain_call_is_not_served_by_an_outdated_plan():
    q, k, v = qkv()
    attn.attention(q, k, v)
    with spy() as calls, attn.use_backend("reference"):
        attn.attention(q, k, v)
    assert calls == [("reference", "forward")]
    with pytest.raises(TypeError, match="one dtype"):
        attn.attention(q, k.double(), v)


@pytest.mark.usefixtures("no_library")
def test_explain_names_every_backend_with_a_sentence():
    found = attn.explain(*qkv(), softcap=3.0)
    assert found.chosen == "reference"
    assert tuple(found.reasons) == planner.names()
    assert found.reasons["reference"] is None
    assert "softcap" in found.reasons["sdpa"]
    table = str(found)
    assert str(found.spec) in table
    assert all(name in table for name in planner.names())
    with spy() as calls:
        attn.explain(*qkv(), dropout_p=0.3)
    assert calls == []


def test_explain_under_force_and_when_the_forced_one_cannot():
    found = attn.explain(*qkv(), backend="reference")
    assert (found.chosen, found.reasons["sdpa"]) == ("reference", "could, but reference was asked for")
    refused = attn.explain(*qkv(), softcap=1.0, backend="sdpa")
    assert refused.chosen is None
    assert "softcap" in refused.reasons["sdpa"]


def test_unproven_kernels_are_passed_by_and_warn_once_when_forced(fake, monkeypatch):
    on_gpu = PLAIN._replace(device="cuda", arch="sm_90")
    found = planner.explain_spec(on_gpu)
    assert found.chosen == "sdpa"
    assert "no committed results" in found.reasons["fake"]
    assert "backend='fake'" in found.reasons["fake"]
    with pytest.warns(UserWarning, match="no committed results"):
        assert planner.choose(on_gpu, "fake") is fake
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert planner.choose(on_gpu._replace(head_dim=16, value_dim=16), "fake") is fake


def test_proven_passes_make_a_kernel_the_automatic_choice(fake, monkeypatch):
    on_gpu = PLAIN._replace(device="cuda", arch="sm_90")
    entry = ("fake", "sm_90", torch.float32)
    monkeypatch.setattr(proven, "PROVEN", frozenset({(*entry, "forward")}))
    assert planner.choose(on_gpu).name == "fake"
    assert planner.choose(on_gpu._replace(grad=True)).name == "sdpa"
    assert "backward" in planner.explain_spec(on_gpu._replace(grad=True)).reasons["fake"]
    assert planner.choose(on_gpu._replace(arch="sm_80")).name == "sdpa"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"device": "mps"}, "runs on cpu or cuda, not on mps"),
        ({"dtype": torch.bfloat16}, "takes float32, not bfloat16"),
        ({"head_dim": 300, "value_dim": 300}, "takes head_dim up to 256, not 300"),
        ({"dropout": True}, "does not do dropout"),
        ({"alibi": True}, "does not do ALiBi"),
        ({"device": "cuda", "arch": "sm_75"}, "needs compute capability 8.0 or newer, not sm_75"),
    ],
)
def test_refusals_come_from_the_capability_as_data(change, sentence):
    assert Fake().why_not(PLAIN._replace(**change)) == sentence
    assert Fake().why_not(PLAIN) is None


def test_gpus_that_are_new_enough_are_not_refused():
    for arch in ("sm_80", "sm_100", "gfx942"):
        assert Fake().why_not(PLAIN._replace(device="cuda", arch=arch)) is None
    assert load("cuda").capability.oldest_sm == load("triton").capability.oldest_sm == 80


def test_a_missing_backend_says_what_is_missing():
    absent = Fake()
    absent.missing = "needs a GPU that torch can use"
    assert absent.why_not(PLAIN) == "needs a GPU that torch can use"


@pytest.mark.parametrize("feature", sorted(sdpa.REFUSED - {"weights"}))
def test_what_sdpa_lacks_stands_in_its_table(feature):
    assert sdpa.SdpaBackend().why_not(PLAIN._replace(**{feature: True})) is not None
    assert sdpa.SdpaBackend().why_not(PLAIN._replace(weights="mean")) == "does not do returning attention weights"
