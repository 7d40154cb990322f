"""The build backend of pyproject.toml: setuptools', and with ATTN_CUDA=pip the pinned CUDA toolkit beside it."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from attn.cuda_toolchain import REQUIREMENT

sys.path.pop(0)


def _toolkit() -> list[str]:
    return [REQUIREMENT] if os.environ.get("ATTN_CUDA") == "pip" else []


def get_requires_for_build_wheel(config_settings: dict[str, str] | None = None) -> list[str]:
    """What pip installs before it builds a wheel."""
    return [*build_meta.get_requires_for_build_wheel(config_settings), *_toolkit()]


def get_requires_for_build_editable(config_settings: dict[str, str] | None = None) -> list[str]:
    """What pip installs before it builds an editable install."""
    return [*build_meta.get_requires_for_build_editable(config_settings), *_toolkit()]
