"""How many mutants of the CUDA kernels the emulated tests notice.

`python tests/cuda_host/mutate.py mask.cuh softmax.cuh --limit 40` changes these files in one place at a time, compiles
a few kernels of each, and runs cases on them until one does not pass. What passes all is compiled once more with the
sanitizers, which see overruns of local arrays. Prints the counts and every survivor.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from cuda_host import build, mutants, subjects
from cuda_host.changed import Edit, library, sanitizer_libraries
from cuda_host.judge import Judge


def judged(edit: Edit, subject: subjects.Subject, judges: dict[str, Judge]) -> dict[str, str]:
    """What notices the mutant; "SURVIVED" where nothing does."""
    answer = {"verdict": "SURVIVED", "case": ""}
    for flavour, judge in judges.items():
        with tempfile.TemporaryDirectory() as folder:
            try:
                made = library(Path(folder), [edit], subject.units, flavour)
            except build.BuildError:
                return {"verdict": "does not compile", "case": ""}
            answer = judge(made, subject.cases)
        if answer["verdict"] != "passes":
            return answer
    return answer | {"verdict": "SURVIVED"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=sorted(subjects.SUBJECTS), help="headers of csrc/cuda")
    parser.add_argument("--limit", type=int, default=40, help="mutants a file")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write every verdict here too")
    args = parser.parse_args()
    judges = {"plain": Judge(), "sanitized": Judge(sanitizer_libraries())}
    rows = []
    for file in args.files:
        started, counts = time.monotonic(), collections.Counter[str]()
        for edit in mutants.mutants_of(file, args.limit, args.seed):
            answer = judged(edit, subjects.SUBJECTS[file], judges)
            counts[answer["verdict"]] += 1
            rows.append({"mutant": mutants.shown(edit), "verdict": answer["verdict"], "case": answer["case"]})
            if answer["verdict"] == "SURVIVED":
                print(f"  SURVIVED {mutants.shown(edit)}", flush=True)
        alive, dead = counts["SURVIVED"], counts.total() - counts["SURVIVED"] - counts["does not compile"]
        seconds = time.monotonic() - started
        print(f"{file}: {dead} of {dead + alive} noticed in {seconds:.0f} s; {dict(counts.most_common())}", flush=True)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")
    for judge in judges.values():
        judge.close()


if __name__ == "__main__":
    main()
