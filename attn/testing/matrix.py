"""The feature matrix: every feature and every pair that has gone wrong somewhere, by name, as small odd cases."""

from __future__ import annotations

from typing import Any

import torch

from attn.spec import AttentionSpec
from attn.testing.cases import Case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAIN = {"B": 2, "Hq": 2, "Hkv": 1, "L": 40, "S": 67, "grouped": True, "head_dim": 20, "value_dim": 12, "lse": True}


def _decoding(**more: Any) -> dict[str, Any]:
    spec = {"op": "decode", "band": "end", "causal": True, "key_lengths": True, "grad": False}
    return spec | {"B": 3, "L": 1, "S": 150} | more


SITUATIONS: dict[str, dict[str, Any]] = {
    "full": {},
    "causal": {"band": "start", "causal": True, "right": 0},
    "causal_end": {"band": "end", "causal": True, "right": 0},
    "dead_rows": {"band": "end", "causal": True, "right": 0, "L": 67, "S": 35},
    "window": {"band": "start", "left": 9, "right": 4, "L": 100, "S": 97},
    "left_window_end": {"band": "end", "left": 5, "L": 65},
    "prefix": {"band": "start", "prefix": True, "right": 0},
    "prefix_window": {"band": "end", "prefix": True, "left": 3, "right": 0, "L": 40, "S": 130},
    "lengths": {"key_lengths": True, "query_lengths": True, "kind": "past_nan"},
    "lengths_end": {"key_lengths": True, "query_lengths": True, "band": "end", "right": 2, "left": 20},
    "documents": {"documents": True, "L": 67},
    "documents_causal": {"documents": True, "band": "start", "right": 0, "causal": True, "L": 70, "S": 70},
    "documents_prefix": {"documents": True, "band": "start", "right": 0, "prefix": True, "L": 66, "S": 66},
    "keep": {"keep": True},
    "keep_causal": {"keep": True, "band": "start", "right": 0, "causal": True},
    "bias": {"bias": True, "bias_grad": True},
    "bias_finfo_min": {"bias": True, "bias_grad": True, "kind": "finfo_min"},
    "bias_keep": {"bias": True, "bias_grad": True, "keep": True},
    "alibi": {"alibi": True},
    "alibi_lengths": {"alibi": True, "key_lengths": True, "band": "end", "causal": True, "right": 0},
    "softcap": {"softcap": True},
    "negative_scale": {"scale_positive": False, "scale": -0.25},
    "zero_scale": {"scale_positive": False},
    "dropout": {"dropout": True},
    "dropout_causal": {"dropout": True, "dropout_p": 0.5, "band": "start", "causal": True, "right": 0},
    "dropout_all": {"dropout": True, "dropout_p": 1.0},
    "weights": {"weights": "mean"},
    "weights_per_head": {"weights": "heads", "dropout": True, "band": "start", "causal": True, "right": 0},
    "weights_bias": {"weights": "mean", "bias": True, "bias_grad": True, "key_lengths": True, "softcap": True},
    "one_row": {"L": 1, "band": "end", "causal": True, "right": 0},
    "one_key": {"S": 1},
    "one_each": {"L": 1, "S": 1, "B": 1},
    "head_dim_1": {"head_dim": 1, "value_dim": 1},
    "head_dim_64": {"head_dim": 64, "value_dim": 64, "band": "start", "causal": True, "right": 0},
    "head_dim_100": {"head_dim": 100, "value_dim": 100, "Hq": 1, "grouped": False},
    "head_dim_256": {"head_dim": 256, "value_dim": 256, "B": 1, "Hq": 1, "grouped": False},
    "split_keys_pass": {"head_dim": 160, "value_dim": 30, "B": 1, "dropout": True, "alibi": True, "softcap": True},
    "group_of_7": {"Hq": 7, "B": 1, "L": 33},
    "varlen": {"op": "varlen", "B": 3, "L": 40, "S": 50},
    "varlen_causal": {"op": "varlen", "B": 3, "L": 40, "S": 50, "band": "end", "causal": True, "right": 0},
    "varlen_all": {
        **{"op": "varlen", "B": 3, "L": 40, "S": 40, "band": "start", "left": 9, "right": 0, "prefix": True},
        **{"alibi": True, "softcap": True, "dropout": True},
    },
    "decode": _decoding(),
    "decode_grouped": _decoding(Hq=6, L=4, alibi=True, softcap=True, kind="past_nan"),
    "decode_window": _decoding(L=2, causal=False, left=20),
    "decode_paged": _decoding(Hq=4, L=3, paged=True, value_dim=40),
    "everything": {
        **{"band": "end", "right": 3, "prefix": True, "key_lengths": True, "query_lengths": True, "documents": True},
        **{"keep": True, "bias": True, "bias_grad": True, "alibi": True, "softcap": True, "dropout": True, "B": 1},
    },
}


def situation(name: str, dtype: torch.dtype, **more: Any) -> Case:
    """The case of that name; `more` changes fields of the spec or of the case. Raises KeyError for another name."""
    fields: dict[str, Any] = PLAIN | {"grad": True, "seed": 11} | SITUATIONS[name] | more
    of_spec = {n: v for n, v in fields.items() if n in AttentionSpec._fields}
    case = Case(AttentionSpec(dtype=dtype, **of_spec), **{n: v for n, v in fields.items() if n not in of_spec})
    case.check()
    return case
