"""`replace` and `restore`: modules change their class where they stand.

The object, its Parameters, its hooks and every reference to it stay, so nothing has to be copied or found again.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.utils import parametrize

from attn.module import MultiheadAttention, _keep_forward
from attn.module_checks import check_settings

SETTINGS = ("backend", "masked_rows")
EXTRAS = ("num_kv_heads", "window", "rotary")
"""Arguments of our module that PyTorch's has no form for."""

_OWN_STATE = (*SETTINGS, *EXTRAS, "_log")


class ReplaceWarning(UserWarning):
    """What `attn.replace` or `attn.restore` left as it was, and why."""


def replace(
    model: nn.Module,
    *,
    backend: str | None = None,
    masked_rows: str = "zero",
    exclude: Iterable[str | type[nn.Module]] = (),
) -> nn.Module:
    """Turn every `nn.MultiheadAttention` in a model into `attn.MultiheadAttention`, in place.

    Parameters, hooks, training mode, dtype, device and sharing stay as they are; `restore` is the way back. Modules
    that are ours already stay, and take over a `backend` or `masked_rows` given here that is not the default.

    Args:
        model: any module, an `nn.MultiheadAttention` itself included.
        backend: the backend of the replaced modules; None lets the planner choose.
        masked_rows: "zero" or "nan", see `attn.MultiheadAttention`.
        exclude: names of modules, as in `model.named_modules()`, or classes, to be left alone with all they hold.

    Returns:
        The model.

    Raises:
        TypeError: model is no module, or exclude holds neither names nor classes.
        ValueError: an unknown backend, masked_rows or name in exclude.

    Warns:
        ReplaceWarning: once, naming what could not be replaced and why, or that there was nothing to replace.
    """
    _check_model("replace", model)
    check_settings(backend, masked_rows)
    skipped = _excluded(model, exclude)
    found, left = 0, []
    for name, module in model.named_modules():
        if module in skipped:
            continue
        if isinstance(module, MultiheadAttention):
            found += 1
            _set(module, backend, masked_rows)
            continue
        if not _is_attention(module):
            continue
        reason = _why_not(module)
        if reason is not None:
            left.append(f"{name or 'the model itself'}: {reason}")
            continue
        found += 1
        _change_class(module, nn.MultiheadAttention, MultiheadAttention)
        _set(module, backend, masked_rows)
        if _keep_forward not in module._forward_hooks.values():
            module.register_forward_hook(_keep_forward)
    if left:
        _warn("attn.replace left as they were:\n  " + "\n  ".join(left))
    elif not found:
        beyond = " outside of what exclude names" if skipped else ""
        _warn(
            f"attn.replace: {type(model).__name__} holds no nn.MultiheadAttention{beyond}; nothing was replaced. "
            "Models that call F.scaled_dot_product_attention: attn.integrations.sdpa_override()"
        )
    return model


def restore(model: nn.Module) -> nn.Module:
    """Turn every `attn.MultiheadAttention` in a model back into `nn.MultiheadAttention`, in place.

    Returns:
        The model, with PyTorch's own outputs, bit for bit.

    Raises:
        TypeError: model is no module.

    Warns:
        ReplaceWarning: once, naming modules that PyTorch has no form for: with num_kv_heads, window or rotary, or of
            a class derived from ours.
    """
    _check_model("restore", model)
    left = []
    for name, module in model.named_modules():
        if not isinstance(module, MultiheadAttention):
            continue
        reason = _why_not_back(module)
        if reason is not None:
            left.append(f"{name or 'the model itself'}: {reason}")
            continue
        _change_class(module, MultiheadAttention, nn.MultiheadAttention)
        for state in _OWN_STATE:
            module.__dict__.pop(state, None)
        for key, hook in list(module._forward_hooks.items()):
            if hook is _keep_forward:
                del module._forward_hooks[key]
    if left:
        _warn("attn.restore left as they were:\n  " + "\n  ".join(left))
    return model


def _check_model(where: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{where}: model is {type(model).__name__}; give a torch.nn.Module")


def _excluded(model: nn.Module, exclude: Iterable[str | type[nn.Module]]) -> set[nn.Module]:
    """The modules that `exclude` names, with all that they hold."""
    if isinstance(exclude, (str, type)):
        raise TypeError(f"replace: exclude is {exclude!r}; give a list of module names or classes")
    by_name = dict(model.named_modules(remove_duplicate=False))
    skipped: set[nn.Module] = set()
    for entry in exclude:
        if isinstance(entry, str):
            if entry not in by_name:
                raise ValueError(
                    f"replace: exclude names {entry!r}, which the model does not hold; see model.named_modules()"
                )
            roots = [by_name[entry]]
        elif isinstance(entry, type) and issubclass(entry, nn.Module):
            roots = [m for m in model.modules() if isinstance(m, entry)]
        else:
            raise TypeError(f"replace: exclude holds {entry!r}; give module names or classes of modules")
        for root in roots:
            skipped.update(root.modules())
    return skipped


def _is_attention(module: nn.Module) -> bool:
    if isinstance(module, torch.jit.ScriptModule):
        return getattr(module, "original_name", "") == "MultiheadAttention"
    return isinstance(module, nn.MultiheadAttention)


def _why_not(module: nn.Module) -> str | None:
    """Why a module with PyTorch's attention cannot become ours; None if it can."""
    if isinstance(module, torch.jit.ScriptModule):
        return "it is a compiled TorchScript module; replace before torch.jit.script"
    if "forward" in module.__dict__:
        return "its forward was replaced on the object itself, which would go before ours"
    if _base_class(module) is nn.MultiheadAttention:
        return None
    kind = type(module)
    if kind.forward is nn.MultiheadAttention.forward:
        return (
            f"{kind.__module__}.{kind.__qualname__} is a subclass of nn.MultiheadAttention that may rely on more of it"
        )
    return f"{kind.__module__}.{kind.__qualname__} is a subclass of nn.MultiheadAttention with a forward of its own"


def _why_not_back(module: MultiheadAttention) -> str | None:
    if _base_class(module) is not MultiheadAttention:
        return f"{type(module).__module__}.{type(module).__qualname__} is a subclass of attn.MultiheadAttention"
    given = [f"{n}={getattr(module, n)!r}" for n in EXTRAS if getattr(module, n) is not None]
    return f"PyTorch's module has no {', '.join(given)}" if given else None


def _base_class(module: nn.Module) -> type:
    """The module's class; for a parametrized module the class that it had before."""
    kind = type(module)
    return kind.__bases__[0] if parametrize.is_parametrized(module) and len(kind.__bases__) == 1 else kind


def _change_class(module: nn.Module, old: type, new: type) -> None:
    """Give a module of class `old` the class `new`; the class that torch derived to parametrize it is derived anew."""
    kind = type(module)
    if kind is old:
        module.__class__ = new
        return
    own = {k: v for k, v in vars(kind).items() if k not in ("__dict__", "__weakref__")}
    module.__class__ = type(kind.__name__, (new,), own)


def _set(module: nn.Module, backend: str | None, masked_rows: str) -> None:
    if backend is not None:
        module.backend = backend  # type: ignore[assignment]
    if masked_rows != "zero":
        module.masked_rows = masked_rows  # type: ignore[assignment]


def _warn(message: str) -> None:
    warnings.warn(message, ReplaceWarning, stacklevel=3)
