"""The primitives of csrc/cuda/prim.cuh: what the emulator makes of given bits.

Against arithmetic done here, and against what a GPU made of them where that was recorded: see cuda_device/calibrate.cu.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cuda_host import build

SOURCE = build.ROOT / "tests" / "cuda_device" / "calibrate.cu"
RECORDED = Path(__file__).parent / "data" / "cuda-primitives.json"

pytestmark = pytest.mark.skipif(build.why_not() is not None, reason=str(build.why_not()))


@pytest.fixture(scope="module")
def emulated() -> dict[str, Any]:
    done = subprocess.run([build.program(SOURCE)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cases: dict[str, Any] = json.loads(done.stdout)["cases"]
    return {name: case | {key: np.array(case[key], np.uint32) for key in ("in", "out")} for name, case in cases.items()}


def floats(words: np.ndarray) -> np.ndarray:
    return words.view(np.float32)


def doubles(words: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):  # signalling NaNs
        return floats(words).astype(np.float64)


def halves(words: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    """Both 16-bit elements of each word, in double."""
    bits = torch.from_numpy(words.view(np.int16).copy())
    return bits.view(dtype).double().numpy().reshape(*words.shape, 2)


def rounded(values: np.ndarray, dtype: torch.dtype) -> np.ndarray:
    bits = torch.from_numpy(values.copy()).to(dtype).view(torch.int16).numpy()
    return np.where(np.isnan(values), 0x7FFF, bits.view(np.uint16))


DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_shared_memory(size: int, emulated: dict[str, Any]) -> None:
    case = emulated[f"shared_{size}"]
    rows = case["in"].view(np.uint8).reshape(32, 16 // size, size)
    assert np.array_equal(case["out"][:128].view(np.uint8).reshape(rows.shape), rows[::-1, ::-1])
    assert np.array_equal(case["out"][128:].reshape(32, 4), case["in"].reshape(32, 4)[np.arange(32) ^ 5])


@pytest.mark.parametrize("size", [4, 8, 16])
def test_copies_fill_with_zeros(size: int, emulated: dict[str, Any]) -> None:
    case = emulated[f"copy_{size}"]
    want = np.tile(np.array([1, 2, 3, 4], np.uint32).view(np.uint8), (32, 1))
    for lane, row in enumerate(case["in"].view(np.uint8).reshape(32, 16)):
        valid = lane % (size + 1)
        want[lane, :size] = 0
        want[lane, :valid] = row[:valid]
    assert np.array_equal(case["out"].view(np.uint8).reshape(32, 16), want)


@pytest.mark.parametrize("trans", [False, True])
def test_ldmatrix(trans: bool, emulated: dict[str, Any]) -> None:
    case = emulated["ldmatrix_trans" if trans else "ldmatrix"]
    rows = case["in"].view(np.uint16).reshape(32, 8)[(np.arange(32) * 7 + 3) % 32].reshape(4, 8, 8)
    if trans:
        rows = rows.transpose(0, 2, 1)
    got = case["out"].view(np.uint16).reshape(32, 4, 2)  # lane l: elements 2 (l % 4) and the next of row l / 4
    assert np.array_equal(got.transpose(1, 0, 2).reshape(4, 8, 8), rows)


def product(case: dict[str, Any], name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """What mma gave, the exact result, and the sum of magnitudes; each (16, 8)."""
    words = case["in"].reshape(8, 4, 10)  # lanes by group and member
    if name == "tf32":  # register i of a: row group + 8 (i % 2), column member + 4 (i / 2)
        values = doubles(words[..., :6] & np.uint32(0xFFFFE000))
        a = values[..., :4].reshape(8, 4, 2, 2).transpose(3, 0, 2, 1).reshape(16, 8)
        b = values[..., 4:].transpose(2, 1, 0).reshape(8, 8)
    else:  # the same with pairs of columns 2 member + 8 (i / 2)
        values = halves(np.ascontiguousarray(words[..., :6]), DTYPES[name])
        a = values[..., :4, :].reshape(8, 4, 2, 2, 2).transpose(3, 0, 2, 1, 4).reshape(16, 16)
        b = values[..., 4:, :].transpose(2, 1, 3, 0).reshape(16, 8)
    c, d = (doubles(np.ascontiguousarray(w)) for w in (words[..., 6:], case["out"].reshape(8, 4, 4)))
    c, d = (x.reshape(8, 4, 2, 2).transpose(2, 0, 1, 3).reshape(16, 8) for x in (c, d))
    return d, c + a @ b, np.abs(c) + np.abs(a) @ np.abs(b)


@pytest.mark.parametrize("name", ["bf16", "fp16", "tf32"])
def test_mma(name: str, emulated: dict[str, Any]) -> None:
    got, want, magnitude = product(emulated[f"mma_{name}"], name)
    assert magnitude.max() < 2**24  # whole numbers, so that every order of the sum is exact
    assert np.array_equal(got, want)


def test_mma_rounds_within_its_bound(emulated: dict[str, Any]) -> None:
    case = emulated["mma_bf16_rounded"]
    got, want, magnitude = product(case, "bf16")
    assert not np.array_equal(got, want)
    assert (np.abs(got - want) <= case["bound"] * magnitude).all()


def test_shuffles(emulated: dict[str, Any]) -> None:
    case, lanes = emulated["shuffle"], np.arange(32)
    given, got = case["in"], case["out"].reshape(8, 32)
    for row, source in enumerate([lanes ^ 1, lanes ^ 2, lanes ^ 16, lanes * 0 + 3, 31 - lanes, lanes ^ 4]):
        assert np.array_equal(got[row], given[source])
    assert got[6].all()
    assert not got[7].any()


FUNCTIONS = {"ex2": np.exp2, "lg2": np.log2, "rcp": np.reciprocal, "tanh": np.tanh}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_functions(name: str, emulated: dict[str, Any]) -> None:
    case, tiny = emulated[name], float(np.finfo(np.float32).tiny)
    x, got = doubles(case["in"]), doubles(case["out"])
    if name != "tanh":
        x = np.where(np.abs(x) < tiny, np.copysign(0.0, x), x)
    with np.errstate(all="ignore"):
        want = FUNCTIONS[name](x)
        want = want.astype(np.float32).astype(np.float64)  # too large is infinity
        if name in ("ex2", "rcp"):
            want = np.where(np.abs(want) < tiny, np.copysign(0.0, want), want)
        scale = np.maximum(np.abs(want), 1.0) if name == "lg2" else np.abs(want)
        near = np.abs(got - want) <= case["bound"] * scale
    assert (near | (got == want) | (np.isnan(got) & np.isnan(want))).all()


def test_conversions(emulated: dict[str, Any]) -> None:
    for name, dtype in DTYPES.items():
        case = emulated[f"round_{name}"]
        assert np.array_equal(case["out"], rounded(floats(case["in"]), dtype))
        case = emulated[f"pack_{name}"]
        low, high = rounded(floats(case["in"]), dtype).astype(np.uint32).reshape(-1, 2).T
        assert np.array_equal(case["out"], low | high << 16)
        case = emulated[f"unpack_{name}"]
        which, packed = case["in"].reshape(-1, 2).T
        want = np.take_along_axis(halves(packed.copy(), dtype), (which & 1)[:, None].astype(int), 1)[:, 0]
        assert np.array_equal(floats(case["out"]), want, equal_nan=True)


def test_tf32_rounds_to_nearest_and_ties_away(emulated: dict[str, Any]) -> None:
    case = emulated["to_tf32"]
    x, got = doubles(case["in"]), doubles(case["out"])
    assert not (case["out"] & 0x1FFF)[~np.isnan(x)].any()
    finite = np.isfinite(x) & np.isfinite(got)
    step = 2.0 ** np.maximum(np.floor(np.log2(np.maximum(np.abs(x), 1e-300))) - 10, -136)
    want = np.copysign(np.floor(np.abs(x[finite]) / step[finite] + 0.5) * step[finite], x[finite])
    assert np.array_equal(got[finite], want)
    assert finite.sum() > 200


def test_products_of_words(emulated: dict[str, Any]) -> None:
    case = emulated["mul_hi"]
    x, y = case["in"].reshape(-1, 2).astype(np.uint64).T
    assert np.array_equal(case["out"], (x * y >> np.uint64(32)).astype(np.uint32))


def test_the_emulator_does_as_the_gpu_did(emulated: dict[str, Any]) -> None:
    if not RECORDED.is_file():
        pytest.skip("no GPU has run calibrate.cu yet")
    recorded = json.loads(RECORDED.read_text())["cases"]
    assert recorded.keys() == emulated.keys()
    for name, case in emulated.items():
        gpu = {key: np.array(recorded[name][key], np.uint32) for key in ("in", "out")}
        assert np.array_equal(gpu["in"], case["in"]), name
        if not case["bound"]:
            assert np.array_equal(gpu["out"], case["out"]), name
            continue
        got, want = doubles(case["out"]), doubles(gpu["out"])
        scale = np.abs(want) if not name.startswith("mma") else product(case, "bf16")[2].max()
        with np.errstate(invalid="ignore"):
            near = np.abs(got - want) <= 2 * case["bound"] * np.maximum(scale, name == "lg2")
        assert (near | (got == want) | (np.isnan(got) & np.isnan(want))).all(), name


@pytest.mark.slow
def test_the_program_for_the_gpu_compiles(tmp_path: Path) -> None:
    if (nvcc := shutil.which("nvcc")) is None:
        pytest.skip("nvcc is not here")
    command = [
        nvcc,
        "-std=c++17",
        "-gencode",
        "arch=compute_80,code=sm_80",
        "-c",
        SOURCE,
        "-o",
        tmp_path / "calibrate.o",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
