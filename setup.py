"""Where the packages come from; everything else about the distribution is in pyproject.toml.

Two folders of the repository are installed under another name:

    triton_kernels/  ->  attn.triton_kernels      (a top-level `triton_kernels` belongs to another project)
    benchmarks/      ->  attn.benchmarks          (so that benchmarks also run from a wheel)
"""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
MOVED = {"attn.triton_kernels": "triton_kernels", "attn.benchmarks": "benchmarks"}


def packages() -> list[str]:
    """Every package to install, by its installed name."""
    names = find_packages(str(ROOT), include=["attn", "attn.*"])
    for name, folder in MOVED.items():
        names += [name, *(f"{name}.{sub}" for sub in find_packages(str(ROOT / folder)))]
    return names


class Wheel(bdist_wheel):
    """Builds from an empty `build/lib`: pip builds in the source tree, so files of an earlier build would be packed."""

    def run(self) -> None:
        """Empties the folder that will be packed, then packs."""
        shutil.rmtree(self.get_finalized_command("build").build_lib, ignore_errors=True)
        super().run()


setup(packages=packages(), package_dir=dict(MOVED), cmdclass={"bdist_wheel": Wheel})
