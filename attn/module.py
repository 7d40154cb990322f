"""`MultiheadAttention`: PyTorch's module with attention by `attn.functional`.

Parameters, projections and the contract of `nn.MultiheadAttention` live here; no kernel does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, overload

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from attn import masks
from attn import module_checks as checks
from attn.functional import attend
from attn.masks import CAUSAL, Mask
from attn.module_masks import Window, both, check_dtypes, merged, windowed
from attn.rotary import Rotary


def _keep_forward(module: nn.Module, args: Any, output: Any) -> None:
    """A forward hook that does nothing: where one is, `nn.TransformerEncoderLayer` calls its attention's forward in
    eval mode too, instead of a fused path that knows PyTorch's module only."""


def _per_head(x: Tensor, heads: int, D: int, length_first: bool) -> Tensor:
    """A projection (L, N, heads * D) if `length_first`, else (N, L, heads * D), as a view (N, heads, L, D)."""
    a, b, _ = x.shape
    return x.view(a, b, heads, D).permute((1, 2, 0, 3) if length_first else (0, 2, 1, 3))


class _WeightsLog(Protocol):
    """Where `attn.capture_weights` lets a module write its weights."""

    def kind(self, wanted: str) -> str: ...

    def take(self, weights: Tensor, wanted: str) -> Tensor | None: ...


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` by the kernels of this package: a drop-in, and a subclass.

    Arguments, parameters, state_dict, random numbers at initialisation, results and errors are PyTorch's; what differs
    stands in `docs/differences.md`. Above all: a query with nothing to attend to gives attention output 0, so that its
    row is `out_proj.bias` instead of NaN.

    Args:
        embed_dim: E, features of query and output.
        num_heads: heads, each with E / num_heads features.
        dropout: probability with which attention weights are dropped in training.
        bias: biases in the projections.
        add_bias_kv: one learned key and value more, seen by every query.
        add_zero_attn: one key and value of zeros more, seen by every query.
        kdim: features of key (E if None).
        vdim: features of value (E if None).
        batch_first: tensors are (N, L, E) instead of (L, N, E).
        device: of the parameters.
        dtype: of the parameters.
        num_kv_heads: key and value heads, a divisor of num_heads (Ainslie et al., "GQA", 2023). The projection of keys
            and values then has num_kv_heads * head_dim rows each, in the order query, key, value.
        window: (left, right): query i sees keys i - left .. i + right only, and what the masks leave; None in a place
            for no limit.
        rotary: `attn.Rotary(dim)`, applied to queries and keys after the projection.
        backend: the backend that runs this module; `use_backend` goes before it. None lets the planner choose.
        masked_rows: "zero", or "nan" for PyTorch's NaN in rows with nothing to attend to, where `need_weights=True`.

    Raises:
        ValueError: embed_dim or num_heads <= 0, num_kv_heads that does not divide num_heads, an unknown backend, ...
        AssertionError: embed_dim not divisible by num_heads.
        TypeError: a window, rotary or num_kv_heads of the wrong kind.
    """

    # Defaults of the class, so that a module whose class was changed where it stood has them too.
    num_kv_heads: int | None = None
    window: Window | None = None
    rotary: Rotary | None = None
    backend: str | None = None
    masked_rows: str = "zero"
    _log: _WeightsLog | None = None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        num_kv_heads: int | None = None,
        window: Window | None = None,
        rotary: Rotary | None = None,
        backend: str | None = None,
        masked_rows: str = "zero",
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            dropout,
            bias,
            add_bias_kv,
            add_zero_attn,
            kdim,
            vdim,
            batch_first,
            device,
            dtype,
        )
        checks.check_extras(num_heads, self.head_dim, num_kv_heads, window, rotary)
        checks.check_settings(backend, masked_rows)
        self.window, self.rotary, self.backend, self.masked_rows = window, rotary, backend, masked_rows
        if num_kv_heads is not None and num_kv_heads != num_heads:
            self.num_kv_heads = num_kv_heads
            self._shrink_keys_and_values(num_kv_heads * self.head_dim)
        self.register_forward_hook(_keep_forward)

    def _shrink_keys_and_values(self, width: int) -> None:
        """Give the projections of key and value `width` rows, and draw all input projections anew."""
        E = self.embed_dim

        def rows(t: Tensor, *shape: int) -> nn.Parameter:
            return nn.Parameter(t.new_empty(shape))

        if self.in_proj_weight is not None:
            self.in_proj_weight = rows(self.in_proj_weight, E + 2 * width, E)
        else:
            self.k_proj_weight = rows(self.k_proj_weight, width, self.kdim)
            self.v_proj_weight = rows(self.v_proj_weight, width, self.vdim)
        if self.in_proj_bias is not None:
            self.in_proj_bias = rows(self.in_proj_bias, E + 2 * width)
        if self.bias_k is not None and self.bias_v is not None:
            self.bias_k, self.bias_v = rows(self.bias_k, 1, 1, width), rows(self.bias_v, 1, 1, width)
        self._reset_parameters()

    def extra_repr(self) -> str:
        """The arguments that PyTorch's module does not have, where they are set."""
        given = [(n, getattr(self, n)) for n in ("num_kv_heads", "window", "rotary", "backend")]
        words = [f"{name}={value!r}" for name, value in given if value is not None]
        return ", ".join(words if self.masked_rows == "zero" else [*words, f"masked_rows={self.masked_rows!r}"])

    @overload
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = ...,
        need_weights: Literal[True] = ...,
        attn_mask: Tensor | None = ...,
        average_attn_weights: bool = ...,
        is_causal: bool = ...,
    ) -> tuple[Tensor, Tensor]: ...

    @overload
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = ...,
        *,
        need_weights: Literal[False],
        attn_mask: Tensor | None = ...,
        average_attn_weights: bool = ...,
        is_causal: bool = ...,
    ) -> tuple[Tensor, None]: ...

    @overload
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = ...,
        need_weights: bool = ...,
        attn_mask: Tensor | None = ...,
        average_attn_weights: bool = ...,
        is_causal: bool = ...,
    ) -> tuple[Tensor, Tensor | None]: ...

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attention of the queries to the keys.

        Args:
            query: (L, E), (L, N, E), or (N, L, E) with batch_first; strided nested tensors for self-attention.
            key: (S, kdim), (S, N, kdim) or (N, S, kdim).
            value: (S, vdim), (S, N, vdim) or (N, S, vdim).
            key_padding_mask: (N, S), or (S) for unbatched input: bool, True hides, or float, added.
            need_weights: return the attention weights too.
            attn_mask: (L, S) or (N * num_heads, L, S): bool, True hides, or float, added.
            average_attn_weights: weights averaged over the heads.
            is_causal: a hint that attn_mask is causal; without weights and padding mask it is taken at its word.

        Returns:
            The output, of the query's shape, and the weights after dropout: (N, L, S), (N, num_heads, L, S) without
            averaging, without N for unbatched input, one or two keys more with add_bias_kv and add_zero_attn; or None.

        Raises:
            AssertionError, RuntimeError: where PyTorch's module does on its training path: shapes, dtypes, is_causal
                without attn_mask.
            TypeError: an input that is no tensor. ValueError: dropout outside [0, 1] in training.
        """
        if not (isinstance(query, Tensor) and isinstance(key, Tensor) and isinstance(value, Tensor)):
            if any(isinstance(t, torch.fx.Proxy) for t in (query, key, value)):
                return self._leaf_call(
                    (query, key, value),
                    key_padding_mask=key_padding_mask,
                    need_weights=need_weights,
                    attn_mask=attn_mask,
                    average_attn_weights=average_attn_weights,
                    is_causal=is_causal,
                )
            checks.check_tensors(query, key, value)
        if is_causal and attn_mask is None:
            raise RuntimeError(
                "Need attn_mask if specifying the is_causal hint; give the causal mask too, "
                "for example nn.Transformer.generate_square_subsequent_mask(L)"
            )
        wanted = ("mean" if average_attn_weights else "heads") if need_weights else ""
        if query.is_nested or key.is_nested or value.is_nested:
            masked = attn_mask is not None or key_padding_mask is not None
            checks.check_nested(self, query, key, value, masked)
            return self._nested(query, wanted)
        checks.check_shapes(self, query, key, value)
        if attn_mask is not None or key_padding_mask is not None:
            checks.check_mask_kinds(query, key, key_padding_mask, attn_mask, self.num_heads)
        if query.dim() == 3:
            hints = (attn_mask, key_padding_mask, is_causal)
            return self._batched(query, key, value, hints, wanted, not self.batch_first)
        lone = query[None]
        key, value = (lone if t is query else t[None] for t in (key, value))
        hints = (attn_mask, None if key_padding_mask is None else key_padding_mask[None], is_causal)
        out, weights = self._batched(lone, key, value, hints, wanted, False)
        return out[0], None if weights is None else weights[0]

    if TYPE_CHECKING:
        __call__ = forward

    def _batched(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        hints: tuple[Tensor | None, Tensor | None, bool],
        wanted: str,
        length_first: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """The call on checked tensors of 3 dims, (L, N, E) if `length_first`, else (N, L, E)."""
        attn_mask, key_padding_mask, is_causal = hints
        q, k, v = self._heads(query, key, value, length_first)
        S, extra = k.shape[2], 0
        if self.bias_k is not None or self.add_zero_attn:
            k, v = self._longer(k, v)
            extra = k.shape[2] - S
        mask: Mask | None = None
        bias: Tensor | None = None
        if is_causal and not wanted and not extra and key_padding_mask is None:
            mask = CAUSAL  # the hint, taken at its word exactly where PyTorch takes it so
        elif attn_mask is not None or key_padding_mask is not None:
            check_dtypes(attn_mask, key_padding_mask, query, bool(wanted))
            sizes = (q.shape[0], q.shape[1], q.shape[2], S)
            checks.check_mask_sizes(key_padding_mask, attn_mask, sizes)
            mask, bias = merged(attn_mask, key_padding_mask, sizes, extra)
        if self.window is not None:
            mask = both(mask, windowed(self.window, q.shape[2], S, extra, q.device))
        out, weights = self._attend(q, k, v, mask, bias, wanted)
        out = out.permute(2, 0, 1, 3) if length_first else out.transpose(1, 2)
        projection = self.out_proj
        return F.linear(out.flatten(2), projection.weight, projection.bias), weights

    def _heads(
        self, query: Tensor, key: Tensor, value: Tensor, length_first: bool, positions: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries (B, H, L, D), keys and values (B, Hkv, S, D): views of the projections, turned by `rotary`.

        `positions` is where they stand in their sequence; None means from 0 on.
        """
        H, Hkv = self.num_heads, self.num_kv_heads or self.num_heads
        D = self.embed_dim // H
        if not self._qkv_same_embed_dim:
            weights: Sequence[Tensor] = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            q, k, v = self._separately((query, key, value), weights, (H, Hkv, Hkv), D, length_first)
        elif query is key and key is value:
            weight = self.in_proj_weight
            checks.check_weight("query", query, weight)
            x = _per_head(F.linear(query, weight, self.in_proj_bias), H + 2 * Hkv, D, length_first)
            q, k, v = x.chunk(3, 1) if Hkv == H else x.split_with_sizes([H, Hkv, Hkv], 1)
        elif key is value:
            weights = self.in_proj_weight.split_with_sizes([H * D, 2 * Hkv * D])
            q, x = self._separately((query, key), weights, (H, 2 * Hkv), D, length_first)
            k, v = x.chunk(2, 1)
        else:
            weights = self.in_proj_weight.split_with_sizes([H * D, Hkv * D, Hkv * D])
            q, k, v = self._separately((query, key, value), weights, (H, Hkv, Hkv), D, length_first)
        if self.rotary is not None:
            q, k = self.rotary(q, positions), self.rotary(k, positions)
        return q, k, v

    def _separately(
        self,
        inputs: tuple[Tensor, ...],
        weights: Sequence[Tensor],
        heads: tuple[int, ...],
        D: int,
        length_first: bool,
    ) -> list[Tensor]:
        """One projection per input, each (B, its heads, its length, D)."""
        bias = self.in_proj_bias
        biases = [None] * len(heads) if bias is None else bias.split_with_sizes([n * D for n in heads])
        projected = []
        names = ("query", "key", "value")[: len(heads)]
        for name, x, weight, b, n in zip(names, inputs, weights, biases, heads, strict=True):
            checks.check_weight(name, x, weight, self._qkv_same_embed_dim)
            projected.append(_per_head(F.linear(x, weight, b), n, D, length_first))
        return projected

    def _longer(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values with `bias_k`, `bias_v` and zeros appended, as the module is set."""
        B, H, _, D = k.shape
        ks, vs = [k], [v]
        if self.bias_k is not None and self.bias_v is not None:
            ks.append(self.bias_k.view(1, H, 1, D).expand(B, H, 1, D))
            vs.append(self.bias_v.view(1, H, 1, D).expand(B, H, 1, D))
        if self.add_zero_attn:
            ks.append(k.new_zeros(B, H, 1, D))
            vs.append(v.new_zeros(B, H, 1, D))
        return torch.cat(ks, 2), torch.cat(vs, 2)

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask | None, bias: Tensor | None, wanted: str
    ) -> tuple[Tensor, Tensor | None]:
        """Attention itself, with what capture_weights and masked_rows ask for."""
        p = self.dropout if self.training else 0.0
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"dropout is {p}; in training it must be in [0, 1]")
        log = self._log
        kind = wanted if log is None else log.kind(wanted)
        mark = False
        if wanted and self.masked_rows != "zero":
            checks.check_settings(None, self.masked_rows)
            mark = k.shape[2] > 0
        options: dict[str, Any] = {"mask": mask, "bias": bias, "dropout_p": p, "return_lse": mark, "weights": kind}
        out, lse, weights = attend(q, k, v, **options, default_backend=self.backend)
        if log is not None and weights is not None:
            weights = log.take(weights, wanted)
        if mark and lse is not None and weights is not None:
            dead = lse == -torch.inf
            out = out.masked_fill(dead[..., None], torch.nan)
            dead = dead if weights.dim() == 4 else dead.any(1)
            weights = weights.masked_fill(dead[..., None], torch.nan)
        return out, weights

    def _nested(self, x: Tensor, wanted: str) -> tuple[Tensor, Tensor | None]:
        """Self-attention of a strided nested tensor, padded on the way; weights are padded with 0."""
        lengths = x._nested_tensor_size()[:, 0].to(x.device)
        padded = x.to_padded_tensor(0.0)
        q, k, v = self._heads(padded, padded, padded, False)
        mask = masks.padding(lengths, lengths)
        if self.window is not None:
            mask = mask & masks.window(*self.window)
        out, weights = self._attend(q, k, v, mask, None, wanted)
        out = F.linear(out.transpose(1, 2).flatten(2), self.out_proj.weight, self.out_proj.bias)
        real = torch.arange(out.shape[1], device=x.device) < lengths[:, None]
        return torch._nested_tensor_from_mask(out, real, mask_check=False), weights

    def __prepare_scriptable__(self) -> nn.Module:
        raise RuntimeError(
            "torch.jit.script cannot compile attn.MultiheadAttention; call attn.restore(model) first, "
            "or use torch.compile or torch.export"
        )

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles leave out where `attn.capture_weights` writes."""
        return {name: value for name, value in self.__dict__.items() if name != "_log"}

    def _leaf_call(self, tensors: tuple[Any, Any, Any], **options: Any) -> Any:
        """One call_module node: symbolic tracing keeps this module whole, as it keeps PyTorch's."""
        tracer: Any = next(t.tracer for t in tensors if isinstance(t, torch.fx.Proxy))
        return tracer.create_proxy("call_module", tracer.path_of_module(self), tensors, options)
