"""Runs cases on emulated libraries, each in a process of its own: what changed kernels do with them.

Reads lines of JSON {"library": path, "cases": [...], "seconds": limit} and answers each with a line {"verdict": ...,
"case": ..., "said": ...}. A verdict is "passes", the name of the emulator's report, "numbers", "bank conflicts",
"refused", "error", "crash" or "timeout". A case is a line that lines.py reads.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cuda_host.control import Emulator

HERE = Path(__file__).resolve().parent
REPORT = re.compile(r"attn_cuda: (\w+)(?: at |: )")


class Judge:
    """A process of this file, waiting for libraries. With `preload` it runs under sanitizers."""

    def __init__(self, preload: Sequence[str] = ()) -> None:
        env = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "ATTN_CUDA_EMULATED": "chosen by line"}
        if preload:
            env |= {"LD_PRELOAD": ":".join(preload), "ASAN_OPTIONS": "detect_leaks=0"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
        )

    def __call__(self, library: Path, cases: Sequence[str], seconds: float = 600) -> dict[str, str]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        line = json.dumps({"library": str(library), "cases": list(cases), "seconds": seconds})
        self._process.stdin.write(line + "\n")
        self._process.stdin.flush()
        answer: dict[str, str] = json.loads(self._process.stdout.readline())
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _try(library: str, cases: Sequence[str], pipe: int) -> None:
    """In the child: all cases, up to the first that does not pass."""
    from cuda_host.lines import made

    from attn import native_cuda
    from attn.backends import load
    from attn.testing import assert_case

    native_cuda.EMULATED = library
    native_cuda.load.cache_clear()
    load("cuda").missing = load("cuda").available()
    emulator = Emulator(library)
    said = {"verdict": "passes", "case": "", "said": ""}
    for turn, text in enumerate(cases):
        said["case"] = text
        os.write(pipe, (text + "\n").encode())
        emulator.vary(turn)
        try:
            assert_case(made(text), "cuda")
            if emulator.bank_conflicts:
                said["verdict"] = "bank conflicts"
                break
        except AssertionError as error:
            said |= {"verdict": "numbers", "said": str(error)[:2000]}
            break
        except RuntimeError as error:
            found = REPORT.match(str(error))
            said |= {"verdict": found[1] if found else "refused", "said": str(error)[:2000]}
            break
        except Exception as error:
            said |= {"verdict": "error", "said": repr(error)[:2000]}
            break
    os.write(pipe, (json.dumps(said) + "\n").encode())


def _lines(pipe: int, seconds: float) -> Iterator[str]:
    """What the child wrote before it ended; raises TimeoutError where it takes too long."""
    end, text = time.monotonic() + seconds, ""
    while True:
        if not select.select([pipe], [], [], max(0.0, end - time.monotonic()))[0]:
            raise TimeoutError
        part = os.read(pipe, 65536).decode()
        if not part:
            return
        *whole, text = (text + part).split("\n")
        yield from whole


def _judged(library: str, cases: Sequence[str], seconds: float) -> dict[str, str]:
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with contextlib.suppress(BaseException):
            _try(library, cases, writing)
        os._exit(0)
    os.close(writing)
    last = ""
    try:
        for line in _lines(reading, seconds):
            if line.startswith("{"):
                answer: dict[str, str] = json.loads(line)
                return answer
            last = line
        return {"verdict": "crash", "case": last, "said": ""}
    except TimeoutError:
        os.kill(child, signal.SIGKILL)
        return {"verdict": "timeout", "case": last, "said": ""}
    finally:
        os.close(reading)
        os.waitpid(child, 0)


def main() -> None:
    import torch
    from cuda_host import lines  # noqa: F401 - so that children start with all of attn

    torch.set_num_threads(1)
    for line in sys.stdin:
        print(json.dumps(_judged(**json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
