"""Compile the Triton kernels for GPUs that need not be there, and read what the compiler made of them.

The passes themselves run, on CPU tensors, with a driver that compiles for the wanted architecture and launches nothing:
so every kernel comes with the flags, tile and strides of a real call. Registers, stack and instructions are read from
the machine code with the `cuobjdump` that Triton ships.

    python -m attn.benchmarks.compile_table           # the rows that benchmarks/results/triton-compile.json lacks
    python -m attn.benchmarks.compile_table --redo float32  # these rows again, after a change to their tiles
    python -m attn.benchmarks.compile_table --quick   # what every push compiles, checked against that table
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch

from attn.benchmarks import row_tables
from attn.spec import DecodeOperands, Operands

ARCHS = ("sm_80", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
HEAD_DIMS = (32, 64, 100, 128, 192, 256)
DTYPES = ("bfloat16", "float16", "float32", "tf32")
RESULTS = Path(__file__).parent / "results" / "triton-compile.json"


class Row(NamedTuple):
    """What one compiled kernel needs. `spills` are bytes of stack (NVIDIA) or spilled registers (AMD); `dots` are the
    matrix products of the source and what became of them, `products` matrix instructions in the machine code."""

    arch: str
    kernel: str
    dtype: str
    head_dim: int
    features: str
    tile: str
    registers: int
    spills: int
    shared: int
    fits: bool
    dots: dict[str, int]
    products: dict[str, int]
    exponentials: int

    @property
    def key(self) -> str:
        """What identifies the row in the committed table."""
        return f"{self.arch} {self.kernel} {self.dtype} {self.head_dim} {self.features}"


FEATURES = ("none", "causal", "lengths", "causal lengths", "documents", "keep", "bias", "alibi", "softcap", "dropout")
COMMON = FEATURES[:4]
"""The feature sets that must not spill at head_dim <= 128 on sm_80, sm_90 and sm_100."""
HEAVIEST = "causal lengths documents keep bias alibi softcap dropout weights"
HEAVY_SETS = (*FEATURES[4:], "bias dropout", "weights", "packed causal", HEAVIEST)


def operands(dtype: torch.dtype, head_dim: int, features: str) -> Operands:
    """A small call with these features."""
    words = features.split()
    B, H, L = 2, 2, 256
    shape = (1 if "packed" in words else B, L, H, head_dim)
    q, k, v = (torch.zeros(shape, dtype=dtype).transpose(1, 2) for _ in range(3))
    i32 = {"dtype": torch.int32}
    x = Operands(q, k, v, scale=head_dim**-0.5)
    if "packed" in words:
        cu = torch.tensor([0, 100, L], **i32)
        x = x._replace(cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=L, max_seqlen_k=L)
    if "causal" in words:
        x = x._replace(right=0)
    if "lengths" in words:
        x = x._replace(key_lengths=torch.full((B,), L, **i32), query_lengths=torch.full((B,), L, **i32))
    if "documents" in words:
        ids = torch.zeros(B, L, dtype=torch.int64)
        x = x._replace(ids_q=ids, ids_k=ids)
    if "keep" in words:
        x = x._replace(keep=torch.ones(B, 1, L, L, dtype=torch.bool))
    if "bias" in words:
        x = x._replace(bias=torch.zeros(1, H, L, L, dtype=dtype))
    if "alibi" in words:
        x = x._replace(alibi_slopes=torch.zeros(B, H))
    if "softcap" in words:
        x = x._replace(softcap=20.0)
    if "dropout" in words:
        x = x._replace(rng=torch.zeros(2, dtype=torch.int64), dropout_p=0.1)
    return x


class _Driver:
    """A Triton driver for a GPU that is not there: compiles, loads nothing, launches nothing."""

    binary_ext = "cubin"
    _numbers: dict[str, int] = {}  # noqa: RUF012 - Triton keeps compiled kernels by device number

    def __init__(self, arch: str) -> None:
        from triton.backends.compiler import GPUTarget

        amd = arch.startswith("gfx")
        self.target = GPUTarget("hip", arch, 64) if amd else GPUTarget("cuda", int(arch.removeprefix("sm_")), 32)
        self.device = self._numbers.setdefault(arch, len(self._numbers))
        self.utils = self
        self.launches = 0

    def launcher_cls(self, src: Any, metadata: Any) -> Any:
        return self._launch

    def _launch(self, *args: Any) -> None:
        self.launches += 1

    def load_binary(self, name: str, kernel: Any, shared: int, device: int) -> tuple[int, int, int, int, int]:
        return 1, 1, 0, 0, 1024

    def unload_module(self, module: Any) -> None:
        pass

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": 1 << 30, "multiprocessor_count": 132, "warpSize": 32, "max_num_regs": 65536}

    def get_current_device(self) -> int:
        return self.device

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_current_target(self) -> Any:
        return self.target


@contextlib.contextmanager
def offline(arch: str) -> Iterator[_Driver]:
    """Inside the block the passes take CPU tensors, compile for `arch` and launch nothing.

    Raises RuntimeError under TRITON_INTERPRET=1, where nothing is compiled.
    """
    from triton.runtime import driver

    from attn.triton_kernels import arguments, launch

    if launch.INTERPRETED:
        raise RuntimeError(
            "TRITON_INTERPRET is set: the kernels run in the interpreter and compile for nothing; unset it"
        )
    fake = _Driver(arch)
    before = arguments.arch_of
    active = driver._active  # None before any real driver was asked for; `reset_active` would ask for one
    driver.set_active(fake)
    arguments.arch_of = lambda kind, index: arch
    arguments.plans.clear()
    try:
        yield fake
    finally:
        arguments.arch_of = before
        arguments.plans.clear()
        driver._active = active


def compiled(arch: str, dtype: str, head_dim: int, features: str, passes: tuple[str, ...]) -> list[Row]:
    """Compile the kernels of these passes ("forward", "backward", "weights", "decode") and read them."""
    from attn.triton_kernels import arguments, launch
    from attn.triton_kernels import passes as run

    held = getattr(torch, "float32" if dtype == "tf32" else dtype)
    x = operands(held, head_dim, features)
    tf32 = mock.patch.object(arguments, "tf32", return_value=dtype == "tf32")
    with offline(arch), tf32, launch.observed() as entries:
        out, m, l = torch.zeros_like(x.q), *torch.zeros(2, *x.q.shape[:3])
        if "forward" in passes:
            run.forward(x)
        if "backward" in passes:
            d_weights = torch.zeros(2, 256, 256, dtype=held) if "weights" in features.split() else None
            run.backward(x, (out, m, l), torch.zeros_like(x.q), None, d_weights, x.bias is not None)
        if "weights" in passes:
            run.weights(x, m, l, True)
        if "decode" in passes:
            cache = torch.zeros(2, 2, 4096, head_dim, dtype=held)
            lengths = torch.full((2,), 4096, dtype=torch.int32)
            q = torch.zeros(2, 16, 1, head_dim, dtype=held)
            run.decode(DecodeOperands(q, cache, cache, lengths, scale=head_dim**-0.5))
        arguments.plans.clear()
    return [_read(entry, arch, dtype, head_dim, features) for entry in entries]


def _read(entry: Any, arch: str, dtype: str, head_dim: int, features: str) -> Row:
    from attn.triton_kernels import config

    kernel, constants = entry.kernel, entry.constants
    name = kernel.name.removeprefix("attn_").removeprefix("backward_")
    part = constants.get("PART")
    if part:
        name = part
    if constants.get("DELTA"):
        name = "weights_delta"
    tile = constants.get("T")
    words = f"{tile.rows}x{tile.keys} w{tile.warps} s{tile.stages}" if tile else f"w{kernel.metadata.num_warps}"
    if tile and tile.registers:
        words += f" r{tile.registers}"
    shared = kernel.metadata.shared
    numbers = _read_amd(kernel) if arch.startswith("gfx") else _read_nvidia(kernel)
    fits = shared <= config.SHARED[arch]
    return Row(arch, name, dtype, head_dim, features, words, *numbers[:2], shared, fits, _dots(kernel), *numbers[2:])


def _dots(kernel: Any) -> dict[str, int]:
    """How many matrix products the source has, and how many became which operation; "fma" are without tensor cores."""
    found = {"source": len(re.findall(r"\btt\.dot ", kernel.asm["ttir"]))}
    for dot in re.finditer(r"\btt\.dot .*#(\w+)> loc|\bttng\.(warp_group_dot|tc_gen5_mma) ", kernel.asm["ttgir"]):
        name = dot[2] or ("fma" if dot[1].startswith("blocked") else "mma")
        found[name] = found.get(name, 0) + 1
    return found


def _read_nvidia(kernel: Any) -> tuple[int, int, dict[str, int], int]:
    """(registers, bytes of stack, matrix instructions, exponentials)."""
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = [
            subprocess.run([tool, flag, file.name], capture_output=True, text=True, check=True).stdout
            for flag in ("-res-usage", "-sass")
        ]
    found = re.search(r"REG:(\d+) STACK:(\d+)", text[0])
    if found is None:
        raise RuntimeError(f"cuobjdump printed no resources for {kernel.name}: {text[0][:200]}")
    products = {n: len(re.findall(rf"\b{n}\b", text[1])) for n in ("HMMA", "HGMMA", "UTCHMMA")}
    return (
        *(int(found[1]), int(found[2])),
        {n: count for n, count in products.items() if count},
        len(re.findall(r"\bMUFU\.EX2\b", text[1])),
    )


def _read_amd(kernel: Any) -> tuple[int, int, dict[str, int], int]:
    text = kernel.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:?\s+(\d+)", text)
        return int(found[1]) if found else -1

    products = len(re.findall(r"v_mfma_", text))
    return (
        number("vgpr_count"),
        number("vgpr_spill_count"),
        {"MFMA": products} if products else {},
        text.count("v_exp_f32"),
    )


ALL = ("forward", "backward", "weights", "decode")
TRAIN = ALL[:2]

Job = tuple[str, str, int, str, tuple[str, ...]]


def jobs(quick: bool = False) -> list[Job]:
    """(arch, dtype, head_dim, features, passes) of the table; the quick ones are what every push compiles."""
    bf16 = "bfloat16"
    if quick:
        wanted: list[Job] = [("sm_90", bf16, 128, f, TRAIN) for f in COMMON[1:3]]
        wanted += [(arch, bf16, 64, "causal", TRAIN) for arch in ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")]
        wanted += [("sm_90", "float16", 64, "causal lengths", ("forward",)), ("sm_90", bf16, 64, "none", ALL[2:])]
        return [*wanted, *(("sm_80", dtype, 64, "causal", ("forward",)) for dtype in ("float32", "tf32"))]
    three = ("sm_90", "sm_80", "sm_100")
    dims = (64, 128, 100, 256, 32, 192)
    wanted = [(a, bf16, d, f, TRAIN) for d in (64, 128, 100, 32) for a in three for f in COMMON if f != "causal"]
    wanted += [(arch, bf16, d, "causal", ALL) for d in dims for arch in ARCHS]
    wanted += [(arch, "tf32", d, "causal", TRAIN) for d in (64, 128) for arch in ARCHS]
    wanted += [("sm_90", bf16, d, f, TRAIN) for d in (128, 64) for f in HEAVY_SETS]
    wanted += [(arch, dtype, d, "causal", ALL) for d in (64, 128, 256) for dtype in DTYPES[1:3] for arch in ARCHS]
    wanted += [("sm_80", bf16, d, f, TRAIN) for d in (128, 64) for f in HEAVY_SETS]
    wanted += [(arch, dtype, d, "causal", ALL) for d in (100, 32, 192) for dtype in DTYPES[1:3] for arch in ARCHS]
    wanted += [(a, "float32", d, f, TRAIN) for d in (64, 128, 100, 32) for a in three for f in COMMON if f != "causal"]
    return wanted


def gated(row: Row) -> bool:
    """Whether the row is one of those that must not spill at all."""
    return (
        row.arch in ("sm_80", "sm_90", "sm_100")
        and row.head_dim <= 128
        and row.dtype in ("bfloat16", "float16", "float32")
        and row.features in COMMON
        and row.kernel in ("forward", "delta", "queries", "keys")
    )


def faults(row: Row) -> list[str]:
    """What no row may have, in words."""
    found = []
    if not row.fits:
        found.append(f"{row.shared} bytes of shared memory do not fit")
    if row.spills and gated(row):
        found.append(f"{row.spills} bytes of spills")
    if row.dtype != "float32" and ("fma" in row.dots or (row.dots["source"] and not row.products)):
        found.append("a product without tensor cores")
    wgmma = row.arch == "sm_90" and row.dtype in ("bfloat16", "float16") and row.kernel != "decode"
    if wgmma and row.dots.get("warp_group_dot", 0) < row.dots["source"]:
        found.append(f"a product without wgmma: {row.dots}")
    return [f"{row.key} ({row.tile}): {what}" for what in found]


def risen(row: Row, committed: dict[str, Row]) -> list[str]:
    """Where a row spills more than its committed ceiling."""
    ceiling = committed.get(row.key)
    if ceiling is None or row.spills <= ceiling.spills:
        return []
    return [f"{row.key} ({row.tile}): {row.spills} bytes of spills, {ceiling.spills} are committed"]


def markdown(rows: dict[str, Row]) -> str:
    """The short form of the table: registers, "/" and spilled bytes, of bfloat16 causal training."""
    lines = ["| arch | kernel | " + " | ".join(map(str, HEAD_DIMS)) + " |", "| --- " * (2 + len(HEAD_DIMS)) + "|"]
    for arch in ARCHS:
        for kernels in (("forward",), ("queries",), ("keys", "dk", "dv")):
            cells = []
            for head_dim in HEAD_DIMS:
                found = [rows.get(f"{arch} {kernel} bfloat16 {head_dim} causal") for kernel in kernels]
                cells.append(row_tables.cell([(r.registers, r.spills) for r in found if r]))
            lines.append(f"| {arch} | {kernels[0]} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Compile what the table lacks and write it. Exit status 1 if a row has what none may have."""
    parser = argparse.ArgumentParser(prog="python -m attn.benchmarks.compile_table", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the compiles of every push, checked against the table")
    parser.add_argument("--check", default="", metavar="WORDS", help="jobs whose line holds these words, likewise")
    parser.add_argument("--redo", default="", metavar="WORDS", help="write jobs whose line holds these words anew")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the rows there: for another Triton")
    parser.add_argument("--markdown", action="store_true", help="compile nothing; print the short form of the table")
    args = parser.parse_args(argv)
    if args.markdown:
        print(markdown(row_tables.load(Row, RESULTS)))
        return 0
    import triton

    path = args.json or RESULTS
    writing = bool(args.json) or not (args.quick or args.check)
    committed = row_tables.load(Row, path)
    rows = committed if writing else {}
    done = {" ".join(key.split()[:1] + key.split()[2:]) for key in committed} if writing else set()
    wrong: list[str] = []
    for arch, dtype, head_dim, features, passes in jobs(args.quick):
        line = f"{arch} {dtype} {head_dim} {features}"
        words = set(line.split())
        again = bool(args.redo) and set(args.redo.split()) <= words
        if (line in done and not again) or not set(args.check.split()) <= words:
            continue
        for row in compiled(arch, dtype, head_dim, features, passes):
            rows[row.key] = row
            wrong += [] if writing else risen(row, committed)
            print(json.dumps(row._asdict()), flush=True)
        if writing:
            row_tables.save(rows, path, triton=triton.__version__)
    wrong += [what for row in rows.values() for what in faults(row)]
    print("\n".join(wrong) if wrong else f"{len(rows)} kernels, nothing wrong", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
