"""How many mutants of the CUDA kernels the emulated tests notice.

`python tests/cuda_host/mutate.py mask.cuh softmax.cuh --limit 40` changes these files in one place at a time, compiles
a few kernels of each, and runs cases on them until one does not pass. What passes all is compiled once more with the
sanitizers, which see overruns of local arrays. Prints the counts and every survivor; two mutants are at work at a time.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cuda_host import build, mutants, subjects
from cuda_host.changed import Edit, library, sanitizer_libraries
from cuda_host.judge import Judge

FLAVOURS = ("plain", "sanitized")
DOES_NOT_COMPILE, SURVIVED = "does not compile", "SURVIVED"


class Worker(threading.local):
    """The judges of one thread, each started when it is first needed."""

    def __init__(self) -> None:
        self.judges: dict[str, Judge] = {}

    def judge(self, flavour: str) -> Judge:
        if flavour not in self.judges:
            self.judges[flavour] = Judge(sanitizer_libraries() if flavour == "sanitized" else [])
        return self.judges[flavour]

    def verdict(self, edit: Edit) -> dict[str, str]:
        """What notices the mutant."""
        subject = subjects.SUBJECTS[edit.file]
        row = {"mutant": mutants.shown(edit), "verdict": SURVIVED, "case": ""}
        for flavour in FLAVOURS:
            with tempfile.TemporaryDirectory() as folder:
                try:
                    made = library(Path(folder), [edit], subject.units, flavour)
                except build.BuildError:
                    return row | {"verdict": DOES_NOT_COMPILE}
                answer = self.judge(flavour)(made, subject.cases)
            if answer["verdict"] != "passes":
                return row | {"verdict": answer["verdict"], "case": answer["case"]}
        return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=sorted(subjects.SUBJECTS), help="headers of csrc/cuda")
    parser.add_argument("--limit", type=int, default=40, help="mutants a file")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--log", type=Path, help="append every verdict to this file, as lines of JSON")
    args = parser.parse_args()
    worker = Worker()
    for flavour in FLAVOURS:
        build.emulator_objects(flavour)
    build.kernel_objects("plain")
    with ThreadPoolExecutor(build.JOBS) as pool:
        for file in args.files:
            started, counts = time.monotonic(), collections.Counter[str]()
            for row in pool.map(worker.verdict, mutants.mutants_of(file, args.limit, args.seed)):
                counts[row["verdict"]] += 1
                if row["verdict"] == SURVIVED:
                    print(f"  {SURVIVED} {row['mutant']}", flush=True)
                if args.log:
                    with open(args.log, "a") as log:
                        log.write(json.dumps(row) + "\n")
            alive = counts[SURVIVED]
            judged = counts.total() - counts[DOES_NOT_COMPILE]
            seconds = time.monotonic() - started
            said = ", ".join(f"{n} {verdict}" for verdict, n in counts.most_common())
            print(f"{file}: {judged - alive} of {judged} noticed in {seconds:.0f} s ({said})", flush=True)


if __name__ == "__main__":
    main()
