"""Bugs planted into the CUDA kernels, one at a time: each must be noticed, and by what is said here.

A bug is a change of the text: the sources hold none. cuda_host/mutate.py measures what these are samples of.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from cuda_host import build
from cuda_host.changed import edit, library, sanitizer_libraries
from cuda_host.judge import Judge
from cuda_host.subjects import (
    BACKWARD,
    BACKWARD_HEAVY,
    BACKWARD_OTHERS,
    BAND_CASES,
    DECODE,
    DECODE_CASES,
    EXTRA_CASES,
    FLOAT,
    GRADIENT_CASES,
    HEAVY,
    HEAVY_SMALL,
    LIGHT,
    LIGHT_GRADIENT_CASES,
    PLAIN_CASES,
    SUBJECTS,
    Subject,
)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))]


PLAIN, BAND = Subject((LIGHT,), PLAIN_CASES), Subject((LIGHT,), BAND_CASES)
WIDE = Subject((FLOAT,), PLAIN_CASES)
EXTRAS, DECODING = Subject((HEAVY, HEAVY_SMALL), EXTRA_CASES), Subject((DECODE,), DECODE_CASES)
BACK = Subject((BACKWARD,), LIGHT_GRADIENT_CASES)
BACK_EXTRAS, OTHERS = Subject((BACKWARD_HEAVY,), GRADIENT_CASES), Subject((BACKWARD_OTHERS,), GRADIENT_CASES)

NUMBERS = "numbers"


class Bug(NamedTuple):
    """The first `old` behind the first `after` in `file` becomes `new`."""

    subject: Subject
    file: str
    old: str
    new: str
    noticed: str
    after: str = ""


BUGS = {
    # Order: barriers, waits, stages.
    "no barrier before the scores": Bug(PLAIN, "attend.cuh", "sync_threads();", "", "SharedRace", "// K\n"),
    "no barrier before the values": Bug(PLAIN, "attend.cuh", "sync_threads();", "", "SharedRace", "// V\n"),
    "no wait for keys": Bug(PLAIN, "attend.cuh", "cp_async_wait<1>();  // K", "", "SharedInFlight"),
    "a lax wait for values": Bug(PLAIN, "attend.cuh", "wait<1>();  // V", "wait<2>();", "SharedInFlight"),
    "a copy into a stage that is read": Bug(PLAIN, "attend.cuh", "at == 0 ? 2 : at - 1", "at", "SharedInFlight"),
    "out takes Q's place too early": Bug(BAND, "forward.cuh", "sync_threads();", "", "SharedRace"),
    "out is stored too early": Bug(PLAIN, "forward.cuh", "sync_warp();", "", "SharedRace"),
    "a bias is staged too early": Bug(BACK_EXTRAS, "scores.cuh", "sync_warp();", "", "SharedRace", "dense.any()"),
    "a bias is read too early": Bug(EXTRAS, "scores.cuh", "sync_warp();", "", "SharedUninit", "(piece, q0,"),
    # Fragments, and places in shared memory.
    "fragments of keys exchanged": Bug(PLAIN, "tile.cuh", "[n], b0, b1", "[n], b1, b0", NUMBERS),
    "fragments of values exchanged": Bug(PLAIN, "tile.cuh", "raw[0], raw[1]", "raw[1], raw[0]", NUMBERS, "_trans"),
    "a low part forgotten": Bug(WIDE, "tile.cuh", "mma_m16n8k8_tf32(acc, low, b0.high, b1.high);", "", NUMBERS),
    "copies swizzled by themselves": Bug(PLAIN, "tile.cuh", "row + i, chunk),", "row + i, chunk ^ 1),", NUMBERS),
    "a swizzle with bank conflicts": Bug(PLAIN, "tile.cuh", "(row & 7)", "(row & 3)", "bank conflicts"),
    "rows of another warp": Bug(PLAIN, "attend.cuh", "kSharers * kM * 16", "kSharers * kM * 8", "SharedRace"),
    # Bounds.
    "a row is read past the end": Bug(PLAIN, "tile.cuh", "row + i < end ?", "row + i <= end ?", "GlobalBounds"),
    "a row is stored past the end": Bug(PLAIN, "tile.cuh", "first + r >= end", "first + r > end", "GlobalBounds"),
    "a row is not stored": Bug(PLAIN, "tile.cuh", "first + r >= end", "first + r + 1 >= end", "GlobalGap"),
    "ids are read past the end": Bug(EXTRAS, "mask.cuh", "if (first + x >= end) break;", "", "GlobalBounds"),
    "a bias is read past the end": Bug(EXTRAS, "dense.cuh", "i < q_end && j", "j", "GlobalBounds"),
    # What is visible.
    "a causal edge one key too far": Bug(BAND, "scores.cuh", "i + mask.high,", "i + mask.high + 1,", NUMBERS),
    "a window one key too short": Bug(BAND, "scores.cuh", "i + mask.low -", "i + mask.low + 1 -", NUMBERS),
    "a tile too early for full": Bug(BAND, "mask.cuh", "k1 <= q0 + high", "k1 <= q0 + high + 1", NUMBERS),
    "a tile with one key too many": Bug(PLAIN, "mask.cuh", "k1 < keys &&", "k1 <= keys &&", NUMBERS),
    "documents are not compared": Bug(EXTRAS, "scores.cuh", "seen = seen && ldg", "seen = seen || ldg", NUMBERS),
    # Arithmetic.
    "a sum is not rescaled": Bug(PLAIN, "softmax.cuh", "l[i][half] *= shrink;", "", NUMBERS),
    "keys of another head": Bug(BAND, "forward.cuh", "kv_head = t.head /", "kv_head = t.head %", "GlobalBounds"),
    "words of dropout exchanged": Bug(EXTRAS, "dropout.cuh", "e, d.keeps(w.y)", "e, d.keeps(w.z)", NUMBERS),
    # Decoding.
    "a row of another slot": Bug(DECODING, "decode.cuh", "j % slots * stride", "0 * stride", NUMBERS),
    "warps are added up too early": Bug(DECODING, "decode.cuh", "sync_threads();", "", "SharedUninit", "sts(a.smem +"),
    "a key head too far": Bug(DECODING, "decode.cuh", "kv_head * r.head", "(kv_head + 1) * r.head", "GlobalBounds"),
    # Backward.
    "no wait for a tile": Bug(BACK, "backward.cuh", "cp_async_wait<0>();", "", "SharedInFlight", "next ="),
    "no barrier before a tile": Bug(BACK, "backward.cuh", "sync_threads();", "", "SharedRace", "next ="),
    "a stage too few": Bug(BACK, "backward.cuh", "stage(i ^ 1)", "stage(i)", "SharedInFlight"),
    "gradients are stored too early": Bug(BACK, "backward.cuh", "sync_warp();", "", "SharedRace"),
    "delta is forgotten": Bug(BACK, "gradient.cuh", "[e] - delta);", "[e]);", NUMBERS),
    "a group without its last head": Bug(BACK, "backward.cuh", "? x.group : 1", "? x.group - 1 : 1", NUMBERS),
    "the first queries are left out": Bug(BACK, "mask.cuh", "k0 - m.high,", "k0 - m.high + 64,", NUMBERS),
    "a derivative is forgotten": Bug(BACK_EXTRAS, "gradient.cuh", "dp[m][n][e] *= d_cap;", "(void)d_cap;", NUMBERS),
    "a share is forgotten": Bug(BACK_EXTRAS, "gradient.cuh", "(two.x) * share_", "(two.x)", NUMBERS),
    "dP is not dropped": Bug(BACK_EXTRAS, "gradient.cuh", "kept ? dp[m][n][e] *", "true ? dp[m][n][e] *", NUMBERS),
    "chunks are copied too early": Bug(OTHERS, "backward_chunks.cuh", "sync_threads();", "", "SharedRace"),
    "sums are read too early": Bug(
        OTHERS, "backward_chunks.cuh", "sync_threads();", "", "SharedRace", "total[0][n][e]);"
    ),
    "d_lse is added": Bug(OTHERS, "backward_rows.cuh", "delta -= ldg(x.d_lse", "delta += ldg(x.d_lse", NUMBERS),
}


@pytest.fixture(scope="module")
def judge() -> Iterator[Judge]:
    made = Judge()
    yield made
    made.close()


@pytest.mark.parametrize("name", BUGS)
def test_planted_bug_is_noticed(name: str, judge: Judge, tmp_path: Path) -> None:
    bug = BUGS[name]
    changed = library(tmp_path, [edit(bug.file, bug.old, bug.new, bug.after)], bug.subject.units)
    answer = judge(changed, bug.subject.cases)
    assert answer["verdict"] == bug.noticed, answer


@pytest.mark.parametrize("flavour", ["plain", "sanitized"])
def test_without_a_bug_nothing_is_noticed(flavour: str, tmp_path: Path) -> None:
    """On the cases by which all of the above, and the mutants of cuda_host/mutate.py, are judged."""
    on = Judge(sanitizer_libraries() if flavour == "sanitized" else [])
    units = tuple({unit for subject in SUBJECTS.values() for unit in subject.units})
    cases = sorted({case for subject in SUBJECTS.values() for case in subject.cases})
    answer = on(library(tmp_path, [], units, flavour), cases, seconds=900)
    on.close()
    assert answer["verdict"] == "passes", answer
