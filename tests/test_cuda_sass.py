"""What nvcc made of the CUDA kernels: the committed table, and in the slow tests that of the library built here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from attn import cuda_toolchain, native
from attn.benchmarks import compile_table, cuda_sass, row_tables
from attn.benchmarks.cuda_sass import Row

COMMITTED = row_tables.load(Row, cuda_sass.RESULTS)
ARCHS = ("sm_80", "sm_90a", "sm_120")
ELEMENTS = ("bf16", "fp16", "float")
ROW = Row("Forward<bf16, 128, false>", "sm_80", 128, 168, 0, 65536, 2, 2, 3000, 256, 48, 68, 0, 0)


def of(name: str) -> list[Row]:
    return [row for row in COMMITTED.values() if row.name == name]


def test_every_forward_is_in_the_table() -> None:
    rows = of("Forward")
    wanted = {
        (e, d, f, a) for e in ELEMENTS for d in ("32", "64", "128", "256") for f in ("true", "false") for a in ARCHS
    }
    assert {(*row.arguments, row.arch) for row in rows} == wanted


@pytest.mark.parametrize("name", ["Forward", "BackwardPass", "WeightsKernel", "DecodeKernel"])
def test_every_kernel_multiplies_on_tensor_cores_and_loads_by_16_bytes(name: str) -> None:
    rows = of(name)
    assert {row.arguments[0] for row in rows} == set(ELEMENTS)
    assert {row.arch for row in rows} == set(ARCHS)
    for row in rows:
        assert row.products > 0, row.key
        assert row.wide_loads > 0, row.key


@pytest.mark.parametrize("table", [cuda_sass, compile_table], ids=["cuda", "triton"])
def test_a_table_that_is_saved_again_is_the_same_file(table: ModuleType, tmp_path: Path) -> None:
    (made_by, version), _ = json.loads(table.RESULTS.read_text()).items()
    row_tables.save(row_tables.load(table.Row, table.RESULTS), tmp_path / "again.json", **{made_by: version})
    assert (tmp_path / "again.json").read_text() == table.RESULTS.read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["again.json"]


def test_no_row_of_the_table_has_a_fault() -> None:
    assert [fault for row in COMMITTED.values() for fault in cuda_sass.faults(row)] == []


def test_one_exponential_for_each_score_and_no_more() -> None:
    """By hand, for calls with a band at most: a thread of a tile has n scores, and 2 rows in each block of 16, which
    may be rescaled. q k and p v each take n * head_dim / 64 products of 16 x 8 x 16; float32 three for one, and twice
    as many of its 16 x 8 x 8, in q k for 32 features at a time."""
    rows = [row for row in of("Forward") if row.arguments[2] == "false"]
    assert len(rows) == 3 * 4 * 3
    for row in rows:
        element, head_dim = row.arguments[0], int(row.arguments[1])
        per_score = 6 * (head_dim + 32) if element == "float" else 2 * head_dim
        scores = row.products * 64 // per_score
        assert row.exponentials - scores in (2, 4), row.key


def test_nothing_spills_where_it_is_promised() -> None:
    promised = [row for row in COMMITTED.values() if cuda_sass.promised(row)]
    assert len(promised) == 3 * 3 * 2 * 3 - 3 * 2  # all but float32 on sm_120
    assert all(row.stack == row.spill_loads == row.spill_stores == 0 for row in promised)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"stack": 8}, "spills"),
        ({"spill_stores": 2}, "spills"),
        ({"shared": 100 * 1024 + 1}, "do not fit sm_86"),
        ({"blocks": 0}, "0 blocks fit a multiprocessor, 1 are aimed at"),
    ],
)
def test_faults_are_noticed(changes: dict[str, int], words: str) -> None:
    assert cuda_sass.faults(ROW) == []
    (said,) = cuda_sass.faults(ROW._replace(**changes))
    assert words in said
    assert said.startswith("sm_80 Forward<bf16, 128, false>: ")


def test_fewer_blocks_than_aimed_at_are_a_fault_where_shared_memory_is_largest() -> None:
    assert cuda_sass.faults(ROW._replace(blocks=1)) == []
    (said,) = cuda_sass.faults(ROW._replace(arch="sm_90a", blocks=1))
    assert "1 blocks fit a multiprocessor, 2 are aimed at" in said


def test_what_is_worse_than_the_table_is_noticed() -> None:
    high = ROW._replace(kernel="Forward<bf16, 256, false>", spill_loads=3)
    assert cuda_sass.risen(high, {high.key: high}) == []
    assert cuda_sass.risen(high._replace(spill_stores=1), {high.key: high}) != []
    assert cuda_sass.risen(high._replace(blocks=1), {high.key: high}) != []
    assert cuda_sass.risen(high, {}) != []


@pytest.mark.parametrize(
    ("arch", "threads", "registers", "shared", "blocks"),
    [
        ("sm_80", 128, 128, 0, 4),
        ("sm_80", 128, 255, 81 * 1024, 2),
        ("sm_80", 128, 168, 82 * 1024, 1),
        ("sm_80", 32, 16, 0, 32),
        ("sm_90a", 128, 255, 81 * 1024, 2),
        ("sm_120", 256, 32, 0, 6),
        ("sm_120", 128, 64, 99 * 1024, 1),
        ("sm_120", 128, 64, 100 * 1024, 0),
    ],
)
def test_blocks_on_a_multiprocessor(arch: str, threads: int, registers: int, shared: int, blocks: int) -> None:
    assert cuda_sass.blocks(arch, threads, registers, shared) == blocks


def test_remarks_are_found_in_the_logs(tmp_path: Path) -> None:
    folder = tmp_path / "linux"
    folder.mkdir()
    log = folder / "csrc_cuda_inst_x.cu.o.log"
    log.write_text("ptxas info    : Used 168 registers, used 1 barriers\n")
    assert cuda_sass.remarks(folder.parent) == []
    log.write_text("ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized\n")
    assert len(cuda_sass.remarks(folder.parent)) == 1


def test_the_documents_show_the_table() -> None:
    document = Path(__file__).parent.parent / "docs" / "cuda.md"
    if not document.is_file():
        pytest.skip("the source tree is not here")
    assert cuda_sass.markdown(COMMITTED) in document.read_text()


@pytest.mark.slow
def test_the_library_built_here_is_no_worse_than_the_table() -> None:
    library = native.path("cuda")
    if not library.is_file() or cuda_sass.tool("cuobjdump") is None or shutil.which("c++filt") is None:
        pytest.skip("no CUDA library, or no cuobjdump or c++filt")
    found = cuda_toolchain.find_toolkit()
    if not isinstance(found, cuda_toolchain.Toolkit) or found.version != cuda_toolchain.PIN:
        pytest.skip("another nvcc than that of the table")
    rows = cuda_sass.table(library)
    assert set(rows) == set(COMMITTED)
    assert [fault for row in rows.values() for fault in cuda_sass.faults(row)] == []
    assert [worse for row in rows.values() for worse in cuda_sass.risen(row, COMMITTED)] == []
    assert cuda_sass.remarks() == []
