"""Works for the tests of benchmarks: a call of every kind, and modules."""

from __future__ import annotations

CAUSAL = "attention both cpu float32 causal B=1 H=2 L=40 D=16"
CALLS = [
    "attention forward cpu float32 full B=1 H=2 L=33 D=16",
    "attention both cpu float32 causal B=2 H=4 Hkv=2 L=40 D=16",
    "attention backward cpu bfloat16 causal B=1 H=2 L=70 D=16",
    "attention forward cpu float32 window B=1 H=1 L=300 D=8",
    "attention both cpu float32 padding B=3 H=2 L=40 D=16",
    "attention both cpu float32 documents B=2 H=2 L=40 D=16",
    "attention both cpu float32 random B=2 H=2 L=40 D=16",
    "attention both cpu float32 bias B=2 H=2 L=40 D=16",
    "attention forward cpu float32 alibi B=2 H=2 L=40 D=16",
    "varlen both cpu float32 causal B=3 H=4 Hkv=2 L=40 D=16",
    "decode forward cpu float32 full B=3 H=4 Hkv=2 L=1 S=70 D=16",
    "decode forward cpu float32 full B=2 H=2 L=3 S=70 D=16",
    "forward attention cpu float32 head_dim=8 value_dim=6 band=end causal alibi | "  # the line of a case
    "B=1 Hq=2 Hkv=2 L=9 S=33 right=0 seed=3",
]
MODULES = [
    "module forward cpu float32 full weights=mean B=2 H=2 L=20 D=8",
    "module both cpu float32 causal B=2 H=2 L=20 D=8",
    "module both cpu float32 padding weights=mean B=2 H=2 L=20 D=8",
    "layer both cpu float32 padding B=2 H=2 L=20 D=8 layers=2",
    "layer forward cpu float32 causal B=2 H=2 L=20 D=8",
]
