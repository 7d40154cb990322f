"""What nvcc made of the CUDA kernels, read from the built library: no GPU is needed.

Registers, stack, shared memory and the instructions that matter, for every kernel and architecture, and what may not be
(`faults`): spills where none are promised, a kernel that fits no multiprocessor, fewer blocks on one than it is written
for, products without tensor cores, remarks of ptxas.

    python -m attn.benchmarks.cuda_sass           # the table of the library that is built here, and its faults
    python -m attn.benchmarks.cuda_sass --save    # the same, into benchmarks/results/cuda-sass.json
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from attn import cuda_toolchain, native, toolchain
from attn.benchmarks import row_tables

ROOT = Path(__file__).resolve().parent.parent
CUDA, OBJECTS = ROOT / "csrc" / "cuda", ROOT / "build" / "objects"
RESULTS = Path(__file__).parent / "results" / "cuda-sass.json"

KIB = 1024
RESERVED = 1 * KIB  # of shared memory, for each block; cuobjdump counts it in from sm_90 on
REGISTERS = 64 * KIB


class Multiprocessor(NamedTuple):
    """What one multiprocessor of an architecture has."""

    shared: int
    threads: int
    blocks: int


MULTIPROCESSORS = {
    "sm_80": Multiprocessor(164 * KIB, 2048, 32),
    "sm_90a": Multiprocessor(228 * KIB, 2048, 32),
    "sm_120": Multiprocessor(100 * KIB, 1536, 24),
}
LEAST_SHARED = 99 * KIB
"""What a block may have on every GPU from sm_80 on: sm_86, sm_89 and sm_120 have no more."""


class Row(NamedTuple):
    """One kernel on one architecture. `shared` is a block's, in bytes, `blocks` how many of it fit one multiprocessor
    and `aimed` how many it is written for; the rest are instructions in the machine code: matrix products, 16-byte
    loads from global memory (those that go to shared memory by themselves among them), exponentials, and loads and
    stores of spilled registers."""

    kernel: str
    arch: str
    threads: int
    registers: int
    stack: int
    shared: int
    aimed: int
    blocks: int
    instructions: int
    products: int
    wide_loads: int
    exponentials: int
    spill_loads: int
    spill_stores: int

    @property
    def key(self) -> str:
        """What identifies the row in the committed table."""
        return f"{self.arch} {self.kernel}"

    @property
    def name(self) -> str:
        """The kernel's template."""
        return self.kernel.partition("<")[0]

    @property
    def arguments(self) -> list[str]:
        """Its template arguments: element type, largest head_dim, and others."""
        return re.split(r",\s*", self.kernel.partition("<")[2].rstrip("> "))


def tool(name: str) -> str | None:
    """cuobjdump or nvdisasm: on the path, or the one that Triton carries."""
    found = shutil.which(name)
    if found is not None:
        return found
    try:
        import triton
    except ImportError:
        return None
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return str(path) if path.is_file() else None


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{(done.stderr or done.stdout)[-4000:]}\nstatus {done.returncode} from: {' '.join(command)}")
    return done.stdout


def _demangled(names: list[str]) -> dict[str, str]:
    """Mangled names of kernels -> `Forward<attn::cuda::prim::bf16, 64, false>`."""
    lines = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True).stdout
    found = {}
    for mangled, readable in zip(names, lines.splitlines(), strict=True):
        if match := re.search(r"entry<attn::cuda::(.+?) ?>\(", readable):
            found[mangled] = match[1].replace("attn::cuda::", "")
    return found


SPENT = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def _resources(library: Path, cuobjdump: str) -> Iterator[tuple[str, str, list[int]]]:
    """(arch, mangled name, [registers, stack, static shared memory, local memory])."""
    arch, name = "", ""
    for line in _run(cuobjdump, "--dump-resource-usage", str(library)).splitlines():
        if match := re.match(r"arch = (sm_\w+)", line):
            arch = match[1]
        elif match := re.match(r"\s*Function (\S+):", line):
            name = match[1]
        elif match := SPENT.search(line):
            yield arch, name, [int(number) for number in match.groups()]


def _instructions(library: Path, cuobjdump: str, arch: str) -> dict[str, Counter[str]]:
    """Mangled name -> how often each instruction is in its code."""
    counts: dict[str, Counter[str]] = {}
    now: Counter[str] = Counter()
    for line in _run(cuobjdump, "--dump-sass", "--gpu-architecture", arch, str(library)).splitlines():
        if match := re.match(r"\s*Function : (\S+)", line):
            now = counts[match[1]] = Counter()
        elif match := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", line):
            now[match[1]] += 1
    return counts


PROBE = """
#include <cstdio>
template <class K> void tell(const char* name) {{
  std::printf("%s|%d|%d|%d\\n", name, int(K::kThreads), int(K::kSmem), int(K::kMinBlocks));
}}
using namespace attn::cuda;
int main() {{
{lines}
}}
"""


def _written_for(kernels: list[str]) -> dict[str, tuple[int, int, int]]:
    """Kernel -> (threads, bytes of shared memory, blocks) that its source asks for."""
    toolkit, compiler = cuda_toolchain.find_toolkit(), toolchain.find_compiler()
    if not isinstance(toolkit, cuda_toolchain.Toolkit) or compiler is None:
        raise SystemExit("no nvcc or no C++ compiler here")
    headers = [path for path in sorted(CUDA.glob("*.cuh")) if not path.name.startswith("prim_")]
    lines = "\n".join(f'  tell<{name}>("{name}");' for name in kernels)
    with tempfile.TemporaryDirectory() as folder:
        source, program = Path(folder) / "probe.cu", Path(folder) / "probe"
        source.write_text("".join(f'#include "{path}"\n' for path in headers) + PROBE.format(lines=lines))
        host = ["-ccbin", compiler.command[-1], "-L", str(cuda_toolchain.runtime(toolkit).parent)]  # type: ignore[union-attr]
        _run(toolkit.nvcc, "-std=c++17", "-arch=sm_80", *host, str(source), "-o", str(program))
        said = _run(str(program))
    found = {}
    for line in said.splitlines():
        name, *numbers = line.split("|")
        threads, shared, blocks = map(int, numbers)
        found[name] = threads, shared, blocks
    return found


def blocks(arch: str, threads: int, registers: int, shared: int) -> int:
    """How many blocks one multiprocessor holds at once."""
    has, warps = MULTIPROCESSORS[arch], -(-threads // 32)
    of_registers = REGISTERS // (warps * 32 * (-(-registers // 8) * 8))
    return min(of_registers, has.shared // (shared + RESERVED), has.threads // threads, has.blocks)


def table(library: Path) -> dict[str, Row]:
    """All kernels of a library."""
    cuobjdump = tool("cuobjdump")
    if cuobjdump is None:
        raise SystemExit("no cuobjdump: it comes with the CUDA toolkit and with Triton's wheel")
    spent = list(_resources(library, cuobjdump))
    names = _demangled(sorted({name for _, name, _ in spent}))
    written = _written_for(sorted(names.values()))
    code = {arch: _instructions(library, cuobjdump, arch) for arch in sorted({arch for arch, _, _ in spent})}
    rows = {}
    for arch, mangled, (registers, stack, static, _) in spent:
        if mangled not in names:
            continue
        threads, dynamic, aimed = written[names[mangled]]
        counts, shared = code[arch][mangled], max(static - (RESERVED if arch != "sm_80" else 0), 0) + dynamic
        row = Row(
            kernel=names[mangled].replace("prim::", ""),
            arch=arch,
            threads=threads,
            registers=registers,
            stack=stack,
            shared=shared,
            aimed=aimed,
            blocks=blocks(arch, threads, registers, shared),
            instructions=sum(counts.values()),
            products=_sum(counts, r"HMMA\.|HGMMA\."),
            wide_loads=_sum(counts, r"LDG\.(\w+\.)*128|LDGSTS\.(\w+\.)*128"),
            exponentials=_sum(counts, r"MUFU\.EX2"),
            spill_loads=_sum(counts, r"LDL\b"),
            spill_stores=_sum(counts, r"STL\b"),
        )
        rows[row.key] = row
    return rows


def _sum(counts: Counter[str], pattern: str) -> int:
    return sum(n for name, n in counts.items() if re.match(pattern, name))


def remarks(objects: Path = OBJECTS) -> list[str]:
    """What ptxas complained of when the library was built: (C75xx) is a product that it had to serialise."""
    found = []
    for log in sorted(objects.glob("*/csrc_cuda_*.log")):
        complaint = re.compile(r"\(C75\d\d\)|warning", re.IGNORECASE)
        found += [f"{log.name}: {line.strip()}" for line in log.read_text().splitlines() if complaint.search(line)]
    return found


def promised(row: Row) -> bool:
    """Whether the kernel may spill nothing: forward up to head_dim 128, but for float32 on sm_120."""
    exempt = row.arch == "sm_120" and row.arguments[0] == "float"
    return row.name == "Forward" and int(row.arguments[1]) <= 128 and not exempt


def faults(row: Row) -> list[str]:
    """What no row may have, in words."""
    found = []
    if row.shared > LEAST_SHARED:
        found.append(f"{row.shared} bytes of shared memory do not fit sm_86, sm_89 and sm_120")
    least = row.aimed if row.arch == "sm_90a" else 1  # others have less shared memory
    if row.blocks < least:
        found.append(f"{row.blocks} blocks fit a multiprocessor, {least} are aimed at")
    if promised(row) and (row.stack or row.spill_loads or row.spill_stores):
        found.append(f"spills: {row.stack} bytes of stack, {row.spill_loads} loads, {row.spill_stores} stores")
    return [f"{row.key}: {what}" for what in found]


def risen(row: Row, committed: dict[str, Row]) -> list[str]:
    """Where a row is worse than the committed one: more spills, or fewer blocks on a multiprocessor."""
    before = committed.get(row.key)
    if before is None:
        return [f"{row.key}: not in the committed table"]
    now, then = row.spill_loads + row.spill_stores, before.spill_loads + before.spill_stores
    found = [f"{row.key}: {now} spills, {then} are committed"] if now > then else []
    if row.blocks < before.blocks:
        found.append(f"{row.key}: {row.blocks} blocks fit a multiprocessor, {before.blocks} are committed")
    return found


KERNELS = (  # words of the short table -> the templates of bfloat16 kernels, head_dim left open
    ("forward, a band at most", ("Forward<bf16, {}, false>",)),
    ("forward, every feature", ("Forward<bf16, {}, true>",)),
    ("dQ, a band at most", ("BackwardPass<bf16, {}, false, (Part)0>",)),
    ("dK and dV, a band at most", tuple(f"BackwardPass<bf16, {{}}, false, (Part){part}>" for part in (1, 2, 3))),
)


def markdown(rows: dict[str, Row]) -> str:
    """The short form of the table: registers and, after a slash, instructions that load or store spilled ones."""
    lines = ["| arch | kernel | 32 | 64 | 128 | 256 |", "| --- " * 6 + "|"]
    for arch in MULTIPROCESSORS:
        for words, templates in KERNELS:
            cells = []
            for head_dim in (32, 64, 128, 256):
                found = [rows.get(f"{arch} {template.format(head_dim)}") for template in templates]
                spills = [(r.registers, r.spill_loads + r.spill_stores) for r in found if r]
                cells.append(row_tables.cell(spills))
            lines.append(f"| {arch} | {words} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--library", type=Path, default=native.path("cuda"), help="default: the one built here")
    parser.add_argument("--save", action="store_true", help=f"write {RESULTS.name}")
    args = parser.parse_args()
    rows = table(args.library)
    for row in rows.values():
        print(" ".join(f"{name}={value}" for name, value in row._asdict().items()))
    found = [fault for row in rows.values() for fault in faults(row)] + remarks()
    print("\n".join(found) or f"{len(rows)} rows, no fault", file=sys.stderr)
    if args.save:
        row_tables.save(rows, RESULTS, nvcc=native.build_info().get("nvcc", ""))
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
