"""Which kernels and which cases show a change of a file of csrc/cuda.

Sizes stand at the boundaries of the kernels' predicates and beside them: tiles of 64 and 128 queries, of 32, 48 and 64
keys, chunks of 8 elements, bands whose edge meets the edge of a tile. See lines.py for how a case is written.
"""

from __future__ import annotations

from typing import NamedTuple

from cuda_host.changed import Unit


class Subject(NamedTuple):
    """What is compiled, and what is run until something does not pass."""

    units: tuple[Unit, ...]
    cases: tuple[str, ...]


# Without gradients: forward and weights alone.
ONE = " B=1 Hq=1 Hkv=1 grouped=False grad=False"
PAIR = " B=2 Hq=2 Hkv=1 grad=False"

LIGHT = Unit("forward_bf16_light.cu", "<bf16, 64,")
LIGHT_SMALL = Unit("forward_bf16_light.cu", "<bf16, 32,")
HEAVY = Unit("forward_fp16_heavy.cu", "<fp16, 64,")
HEAVY_SMALL = Unit("forward_bf16_heavy.cu", "<bf16, 32,")
FLOAT = Unit("forward_fp32_light.cu", "<float, 32,")
FLOAT_HEAVY = Unit("forward_fp32_heavy.cu", "<float, 32,")
WEIGHTS = Unit("weights_fp16.cu", "<fp16, 32>")
WEIGHTS_WIDE = Unit("weights_fp16.cu", "<fp16, 256>")  # one stage, as BACKWARD_WIDE
DECODE = Unit("decode_bf16.cu", "<bf16, 32,")
BACKWARD = Unit("backward_bf16_light.cu", "<bf16, 64,")
BACKWARD_HEAVY = Unit("backward_bf16_heavy.cu", "<bf16, 32,")
BACKWARD_WIDE = Unit("backward_bf16_heavy.cu", "<bf16, 256,")  # shared memory for one stage
BACKWARD_FLOAT = Unit("backward_fp32_heavy.cu", "<float, 32,")
BACKWARD_OTHERS = Unit("backward_others_bf16.cu")
BACKWARD_PASSES = Unit("backward.cu")  # with the sums of a bias gradient over batch and heads

PLAIN_CASES = (
    "full bf16 head_dim=64 value_dim=64 L=129 S=64 kind=large" + ONE,
    "full bf16 head_dim=64 value_dim=64 L=128 S=129" + PAIR,
    "full bf16 head_dim=64 value_dim=64 L=33 S=96" + ONE,
    "full bf16 head_dim=64 value_dim=64 L=33 S=47" + ONE,
    "full bf16 head_dim=57 value_dim=33 L=17 S=97 layout=sliced" + ONE,
    "full bf16 head_dim=18 value_dim=30 L=65 S=63 layout=strided" + PAIR,
    "causal bf16 head_dim=64 value_dim=64 L=200 S=200 kind=shifted" + ONE,
    "full fp32 head_dim=32 value_dim=20 L=65 S=130" + PAIR,
    # Maxima that grow from tile to tile.
    "full bf16 head_dim=64 value_dim=64 L=65 S=257 kind=large" + PAIR,
    "full fp32 head_dim=32 value_dim=32 L=33 S=257 kind=large" + ONE,
    "keep fp16 head_dim=64 value_dim=64 L=33 S=257 kind=large" + ONE,
)
BAND_CASES = (
    "causal bf16 head_dim=64 value_dim=64 L=129 S=129" + ONE,
    "causal_end bf16 head_dim=64 value_dim=64 L=2 S=64" + ONE,
    "causal_end bf16 head_dim=64 value_dim=64 L=2 S=48" + ONE,
    "causal_end bf16 head_dim=64 value_dim=64 L=2 S=97" + ONE,
    "causal_end bf16 head_dim=64 value_dim=64 L=2 S=128" + ONE,
    "causal_end bf16 head_dim=64 value_dim=64 L=130 S=67" + ONE,
    "causal_end bf16 head_dim=64 value_dim=64 L=66 S=257" + PAIR,
    "dead_rows bf16 head_dim=64 value_dim=64 L=200 S=66" + ONE,
    "window bf16 head_dim=64 value_dim=64 L=260 S=259 left=63 right=0" + ONE,
    "window bf16 head_dim=64 value_dim=64 L=260 S=259 left=65 right=64" + ONE,
    "window bf16 head_dim=64 value_dim=64 L=250 S=241 left=47 right=48" + ONE,
    "window bf16 head_dim=64 value_dim=64 L=250 S=240 left=95 right=16" + ONE,
    "window bf16 head_dim=64 value_dim=64 L=300 S=300 left=191 right=63" + ONE,
    "left_window_end bf16 head_dim=64 value_dim=64 L=129 S=320 left=127" + ONE,
    "lengths bf16 L=129 S=130 B=4 Hq=1 Hkv=1 grouped=False grad=False seed=5",
    "lengths_end bf16 L=129 S=130 B=4 Hq=2 Hkv=1 grad=False seed=6",
    "varlen_causal bf16 B=5 L=150 S=140 Hq=2 Hkv=1 grad=False seed=3",
    "varlen bf16 B=6 L=70 S=70 head_dim=64 value_dim=64 Hq=2 Hkv=2 grouped=False grad=False seed=4",
    "varlen bf16 B=1 L=70 S=130 head_dim=64 value_dim=64 Hq=1 Hkv=1 grouped=False grad=False seed=5",
    "causal bf16 head_dim=16 value_dim=16 L=200 S=65 B=2 Hq=6 Hkv=2 grad=False",
    # More heads than stay in the cache together.
    "left_window_end bf16 head_dim=64 value_dim=64 L=130 S=30000 B=1 Hq=3 Hkv=3 grouped=False left=9 grad=False"
    " layout=broadcast",
)
EXTRA_CASES = (
    "prefix bf16 L=70 S=200 B=4 Hq=1 Hkv=1 grouped=False grad=False seed=9",
    "prefix_window bf16 L=130 S=200 seed=102" + ONE,  # a prefix of one key
    "prefix_window fp16 L=130 S=200 B=4 Hq=1 Hkv=1 grouped=False grad=False head_dim=64",
    "documents bf16 L=130 S=150 B=2" + " Hq=2 Hkv=1 grad=False",
    "documents_causal fp16 L=200 S=200 head_dim=64 B=2 Hq=1 Hkv=1 grouped=False grad=False",
    "documents_prefix bf16 L=130 S=130" + ONE,
    "keep_causal fp16 L=65 S=129 head_dim=64" + PAIR,
    "bias_keep bf16 L=66 S=130" + PAIR,
    "bias fp32 L=65 S=65 layout=transposed kind=large" + PAIR,
    "bias_finfo_min bf16 L=40 S=67" + PAIR,
    # A bias of each dtype whose planes lie apart.
    "bias bf16 L=17 S=33 seed=15 bias_dtype=bf16" + PAIR,
    "bias bf16 L=17 S=33 seed=15 bias_dtype=fp16" + PAIR,
    "bias bf16 L=17 S=33 seed=15 bias_dtype=fp64" + PAIR,
    "alibi_lengths fp16 L=65 S=130 head_dim=64" + PAIR,
    "softcap fp32 L=33 S=70" + ONE,
    "negative_scale bf16" + PAIR,
    "zero_scale bf16" + PAIR,
    "dropout bf16 L=65 S=130" + PAIR,
    "dropout_causal fp32 L=70 S=66" + PAIR,
    "dropout_all bf16" + ONE,
    "varlen_all bf16 B=4 L=90 S=90 Hq=2 Hkv=1 grad=False",
    "everything bf16 L=70 S=140 Hq=2 Hkv=1 grad=False",
)
NAN_CASES = (
    "lengths bf16 L=66 S=66 B=3 Hq=1 Hkv=1 grouped=False kind=past_nan grad=False",
    "causal bf16 L=40 S=80 kind=hidden_nan grad=False",
    "full bf16 L=40 S=80 kind=visible_nan grad=False",
    "keep bf16 kind=dead grad=False",
)
WEIGHTS_CASES = (
    "weights fp16 L=65 S=129 head_dim=32 value_dim=32" + PAIR,
    "weights_per_head fp16 L=66 S=130" + PAIR,
    "weights_bias fp16 L=65 S=67" + PAIR,
    "weights fp16 L=64 S=64 kind=visible_nan" + PAIR,
    "weights fp16 L=65 S=40 head_dim=256 value_dim=256" + PAIR,
)
DECODE_CASES = (
    "decode bf16 L=1 S=150 B=3 Hq=2 Hkv=1",
    "decode bf16 L=1 S=700 B=1 Hq=1 Hkv=1 grouped=False head_dim=32 value_dim=32",
    "decode_grouped bf16 Hq=6 Hkv=1 L=4 S=300",
    "decode_grouped bf16 Hq=16 Hkv=1 L=2 S=64 B=2 kind=normal",
    "decode_grouped bf16 Hq=17 Hkv=1 L=1 S=65 B=2",
    "decode_window bf16 L=2 S=200 left=63",
    "decode_window bf16 L=5 S=200 left=0",
    "decode_paged bf16 Hq=4 Hkv=2 L=3 S=200 value_dim=20 seed=3",
    "decode_paged bf16 Hq=4 Hkv=2 L=3 S=200 value_dim=20 seed=4",
    "decode_paged bf16 Hq=4 Hkv=2 L=3 S=40 value_dim=20 seed=4 wild_pages=True",
    "decode_paged bf16 Hq=2 Hkv=2 grouped=False L=1 S=100 value_dim=32 head_dim=32 seed=5",
)
# With gradients.
LIGHT_GRADIENT_CASES = (
    "causal bf16 head_dim=64 value_dim=64 L=129 S=129 B=1 Hq=1 Hkv=1 grouped=False lse=False",
    "causal_end bf16 head_dim=57 value_dim=33 L=66 S=130 B=2 Hq=4 Hkv=2",
    "window bf16 head_dim=64 value_dim=64 L=200 S=190 B=1 Hq=1 Hkv=1 grouped=False left=63 right=1",
    "window bf16 head_dim=64 value_dim=64 L=260 S=130 B=1 Hq=2 Hkv=1 left=128 right=64",
    "dead_rows bf16 head_dim=64 value_dim=64 L=130 S=65 B=1 Hq=2 Hkv=1",
    "lengths bf16 head_dim=64 value_dim=64 L=129 S=130 B=4 Hq=2 Hkv=1 seed=5",
    "varlen_causal bf16 head_dim=64 value_dim=64 B=5 L=150 S=140 Hq=2 Hkv=1 seed=3",
    "varlen_causal bf16 head_dim=64 value_dim=64 B=1 L=70 S=80 Hq=1 Hkv=1 grouped=False seed=3",
    "full bf16 head_dim=64 value_dim=40 L=64 S=64 kind=large layout=strided",
)
GRADIENT_CASES = (
    "bias bf16 L=65 S=66",
    "bias bf16 L=70 S=67 seed=12",
    "bias_keep bf16 L=40 S=130 seed=13",
    "bias bf16 L=66 S=65 seed=14",
    "bias bf16 L=33 S=40 Hq=4 Hkv=2 bias_dtype=bf16",
    "bias bf16 L=17 S=33 bias_dtype=fp16",
    "bias bf16 L=17 S=33 bias_dtype=fp64",
    "weights bf16 L=65 S=67",
    "weights_per_head bf16 L=65 S=67",
    "weights_bias bf16 L=66 S=66 seed=15",
    "documents_causal bf16 L=130 S=130 B=1 Hq=2 Hkv=1",
    "prefix_window bf16 L=66 S=130",
    "prefix_window bf16 L=150 S=40 B=1 Hq=2 seed=55",
    "alibi bf16 L=65 S=40",
    "softcap bf16 L=40 S=65",
    "dropout_causal bf16 L=70 S=66",
    "dropout_all bf16",
    "varlen_all bf16 B=3 L=70 S=70 Hq=2 Hkv=1",
    "everything bf16 L=70 S=70",
    "everything fp32 L=40 S=70",
    "dropout fp32 L=40 S=33 Hq=4 Hkv=2",
    "softcap bf16 head_dim=256 value_dim=256 L=33 S=49 B=1 Hq=2",
)

_ALL = (LIGHT, LIGHT_SMALL, HEAVY, HEAVY_SMALL, FLOAT)
_FORWARD = PLAIN_CASES + BAND_CASES
_GRADIENTS = LIGHT_GRADIENT_CASES + GRADIENT_CASES
SUBJECTS = {
    "attend.cuh": Subject((LIGHT, HEAVY_SMALL, DECODE), PLAIN_CASES + BAND_CASES + EXTRA_CASES + DECODE_CASES),
    "forward.cuh": Subject(_ALL, _FORWARD + NAN_CASES + EXTRA_CASES),
    "schedule.cuh": Subject((LIGHT, LIGHT_SMALL, BACKWARD), BAND_CASES + PLAIN_CASES + LIGHT_GRADIENT_CASES),
    "mask.cuh": Subject(
        (*_ALL, DECODE, BACKWARD, BACKWARD_HEAVY), BAND_CASES + NAN_CASES + EXTRA_CASES + DECODE_CASES + _GRADIENTS
    ),
    "softmax.cuh": Subject((*_ALL, FLOAT_HEAVY, WEIGHTS), _FORWARD + NAN_CASES + WEIGHTS_CASES + EXTRA_CASES),
    "tile.cuh": Subject((*_ALL, DECODE), _FORWARD + NAN_CASES + EXTRA_CASES + DECODE_CASES),
    "scores.cuh": Subject(
        (LIGHT, HEAVY, HEAVY_SMALL, FLOAT_HEAVY, BACKWARD_HEAVY), EXTRA_CASES + BAND_CASES + NAN_CASES + GRADIENT_CASES
    ),
    "dense.cuh": Subject((HEAVY, HEAVY_SMALL, FLOAT_HEAVY, BACKWARD_HEAVY), EXTRA_CASES + NAN_CASES + GRADIENT_CASES),
    "dropout.cuh": Subject((HEAVY_SMALL, FLOAT_HEAVY, BACKWARD_HEAVY), EXTRA_CASES + GRADIENT_CASES),
    "weights.cuh": Subject((WEIGHTS, WEIGHTS_WIDE), WEIGHTS_CASES),
    "decode.cuh": Subject((DECODE,), DECODE_CASES),
    "backward.cuh": Subject((BACKWARD, BACKWARD_HEAVY, BACKWARD_WIDE), _GRADIENTS),
    "backward_rows.cuh": Subject((BACKWARD_OTHERS, BACKWARD), _GRADIENTS),
    "backward_chunks.cuh": Subject((BACKWARD_OTHERS, BACKWARD_PASSES), GRADIENT_CASES),
    "gradient.cuh": Subject((BACKWARD, BACKWARD_HEAVY, BACKWARD_FLOAT, BACKWARD_OTHERS), _GRADIENTS),
}
