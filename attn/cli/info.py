"""`python -m attn info`: what is installed, what works here, and the cure for what does not.

This command is for the day on which something is broken: each fact is found on its own, whatever the others did.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import attn
from attn.cli.table import table

OLDEST_TORCH = (2, 10)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The format."""
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(args: argparse.Namespace) -> int:
    """Prints the facts; always 0, for a machine where nothing works is an answer too."""
    found = facts()
    print(json.dumps(found, indent=2) if args.json else text(found))
    return 0


def facts() -> dict[str, Any]:
    """All that is printed, as plain values."""
    torch, about_torch = _imported("torch", "pip install 'torch>=2.10'")
    if torch is not None:
        about_torch |= _about_torch(torch)
    devices = _devices(torch)
    linux = sys.platform.startswith("linux")
    _, about_triton = _imported("triton", "pip install 'triton>=3.6,<4'" if linux else "none needed: Linux only")
    return {
        "attn": {"version": attn.__version__, "path": str(Path(attn.__file__).parent)},
        "python": {"version": platform.python_version(), "implementation": platform.python_implementation()},
        "platform": {"system": platform.platform(), "machine": platform.machine(), "cores": os.cpu_count()},
        "torch": about_torch,
        "triton": about_triton,
        "numpy": _imported("numpy", "pip install 'numpy>=1.26'")[1],
        "devices": devices,
        "toolchain": _toolchain(),
        "cpu_library": _cpu_library(torch),
        "cuda_library": _cuda_library(torch),
        **_backends(torch, about_torch, devices["gpus"]),
    }


def _imported(name: str, cure: str) -> tuple[ModuleType | None, dict[str, Any]]:
    """The module, or None, and its version or what is wrong with it."""
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == name:
            return None, {"version": None, "problem": "not installed", "cure": cure}
        return None, {"version": None, "problem": f"import fails: {_one_line(error)}", "cure": _again(cure)}
    except Exception as error:  # a broken binary package raises whatever it likes
        return None, {"version": None, "problem": f"import fails: {_one_line(error)}", "cure": _again(cure)}
    version = getattr(module, "__version__", None)
    if version is None:
        problem = "imports, but has no version: is a folder of that name on the path?"
        return None, {"version": None, "problem": problem, "cure": _again(cure)}
    return module, {"version": str(version), "problem": None, "cure": None}


def _again(cure: str) -> str:
    return cure.replace("pip install", "pip install --force-reinstall")


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def _about_torch(torch: ModuleType) -> dict[str, Any]:
    found: dict[str, Any] = {
        "cuda": getattr(torch.version, "cuda", None),
        "hip": getattr(torch.version, "hip", None),
        "threads": torch.get_num_threads(),
    }
    number = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if number and (int(number[1]), int(number[2])) < OLDEST_TORCH:
        found["problem"] = f"older than {'.'.join(map(str, OLDEST_TORCH))}"
        found["cure"] = "pip install -U 'torch>=2.10'"
    return found


def _devices(torch: ModuleType | None) -> dict[str, Any]:
    """The GPUs that torch finds, and why there is none."""
    if torch is None:
        return {"gpus": [], "why_none": "torch does not load, and torch is what looks for GPUs"}
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            gpus = [_gpu(torch, i) for i in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
            other = torch.accelerator.current_accelerator(check_available=True) if not gpus else None
        except Exception as error:  # drivers fail in many ways, and this command is there to say so
            return {"gpus": [], "why_none": f"torch finds a GPU that does not work: {_one_line(error)}"}
    if other is not None:
        gpus = [{"name": str(other.type), "device": str(other.type), "arch": "", "memory_gib": None}]
    if gpus:
        return {"gpus": gpus, "why_none": None}
    if said:
        why = " ".join(str(said[0].message).split())[:300]
    elif torch.version.cuda is None and torch.version.hip is None:
        why = "this build of torch has no CUDA or ROCm; with a GPU, install the build that pytorch.org names for it"
    else:
        why = "torch finds no GPU; with one, look at what nvidia-smi or rocminfo says"
    return {"gpus": [], "why_none": why}


def _gpu(torch: ModuleType, index: int) -> dict[str, Any]:
    from attn.spec import arch_of

    properties = torch.cuda.get_device_properties(index)
    memory = round(properties.total_memory / 2**30, 1)
    return {"name": properties.name, "device": "cuda", "arch": arch_of("cuda", index), "memory_gib": memory}


def _toolchain() -> dict[str, str | None]:
    """Compilers on the path with the line in which they name themselves."""
    return {
        "nvcc": _says(["nvcc", "--version"], r"release .*"),
        "g++": _says(["g++", "--version"], r".+"),
        "clang++": _says(["clang++", "--version"], r".+"),
        "cl": _says(["cl"], r".*Version .*"),
    }


def _build_info() -> dict[str, Any]:
    """What the build of the libraries wrote down."""
    try:
        return dict(importlib.import_module("attn._build_info").INFO)
    except Exception as error:  # a source tree where nothing was built has no such file
        why = f"nothing was built ({_one_line(error)})"
        return {"why_no_cpu": why, "why_no_cuda": why}


def _cpu_library(torch: ModuleType | None) -> dict[str, Any]:
    """The library of the CPU kernels: how it was built, the instruction set it runs here, or why it is not here."""
    info = _build_info()
    found = {"compiler": info.get("compiler"), "sets": info.get("sets"), "isa": None, "problem": None}
    if torch is None:
        return found | {"problem": info.get("why_no_cpu") or "torch does not load"}
    try:
        from attn import native

        problem = native.load()
        return found | {"isa": native.isa or None, "problem": problem}
    except Exception as error:
        return found | {"problem": _one_line(error)}


def _cuda_library(torch: ModuleType | None) -> dict[str, Any]:
    """The library of the CUDA kernels: how it was built and for which GPUs, and why it does not run here."""
    info = _build_info()
    images = info.get("cuda_images") or {}
    found = {"nvcc": info.get("nvcc") or None, "archs": images.get("archs"), "ptx": images.get("ptx"), "problem": None}
    if not info.get("cuda"):
        return found | {"problem": info.get("why_no_cuda") or "by an older build"}
    if torch is None:
        return found | {"problem": "torch does not load"}
    try:
        from attn import native_cuda

        return found | {"problem": native_cuda.load()}
    except Exception as error:
        return found | {"problem": _one_line(error)}


def _says(command: list[str], pattern: str) -> str | None:
    """The first match in what a command prints; None where it is not there, its failure where it fails."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, stdin=subprocess.DEVNULL)
    except (OSError, subprocess.SubprocessError) as error:
        return f"there, but does not run: {_one_line(error)}"
    match = re.search(pattern, done.stdout + done.stderr)
    return match[0].strip() if match else "there, but does not tell its version"


def _backends(torch: ModuleType | None, about_torch: dict[str, Any], gpus: list[dict[str, Any]]) -> dict[str, Any]:
    """Every backend with the reason why it does not work here, and the backends that serve common calls."""
    if torch is None:
        why = f"every backend needs torch, which is not to be had here: {about_torch['problem']}"
        return {"backends": [], "no_backends": f"{why}. Cure: {about_torch['cure']}", "calls": []}
    try:
        from attn import planner
        from attn.backends import load
        from attn.spec import AttentionSpec

        gpu_specs = _gpu_specs(torch, gpus)
        listed = []
        for name in planner.names():
            backend = load(name)
            doubts = {spec.arch: doubt for spec in gpu_specs if (doubt := backend.unproven(spec))}
            forced_only = backend.only_forced(AttentionSpec()) if backend.missing is None else None
            listed.append(
                {
                    "name": name,
                    "works": backend.missing is None,
                    "why_not": backend.missing,
                    "unproven": doubts if backend.missing is None else {},
                    "only_forced": forced_only,
                }
            )
        return {"backends": listed, "no_backends": None, "calls": _calls(gpu_specs)}
    except Exception as error:  # whatever keeps attn itself from loading is what the reader came to see
        cure = about_torch["cure"] or "pip install --force-reinstall attn-kernels"
        return {"backends": [], "no_backends": f"attn does not load: {_one_line(error)}. Cure: {cure}", "calls": []}


def _gpu_specs(torch: ModuleType, gpus: list[dict[str, Any]]) -> list[Any]:
    """One plain bfloat16 call for each kind of GPU here."""
    from attn.spec import AttentionSpec

    archs = sorted({gpu["arch"] for gpu in gpus if gpu["device"] == "cuda"})
    return [AttentionSpec(device="cuda", dtype=torch.bfloat16, arch=a, head_dim=64, value_dim=64) for a in archs]


def _calls(gpu_specs: list[Any]) -> list[dict[str, str | None]]:
    """Which backend the planner takes for calls that people make."""
    from attn import planner
    from attn.spec import AttentionSpec

    plain = AttentionSpec(head_dim=64, value_dim=64, grad=True)
    rows = []
    for spec in (plain, *(s._replace(grad=True) for s in gpu_specs)):
        where = f"{spec.arch or spec.device} {str(spec.dtype).removeprefix('torch.')}"
        for words, changes in (
            ("training", {}),
            ("training, causal", {"band": "start", "causal": True}),
            ("training with dropout", {"dropout": True}),
            ("attention weights returned (nn.MultiheadAttention's default)", {"weights": "mean"}),
        ):
            explained = planner.explain_spec(spec._replace(**changes))
            rows.append({"where": where, "call": words, "backend": explained.chosen})
    return rows


def text(found: dict[str, Any]) -> str:
    """The facts for a reader."""
    machine, gpus = found["platform"], found["devices"]["gpus"]
    rows = [
        ("attn", f"{found['attn']['version']} in {found['attn']['path']}"),
        ("python", f"{found['python']['version']} ({found['python']['implementation']})"),
        ("platform", f"{machine['system']}, {machine['cores']} cores"),
        *((name, _package(found[name])) for name in ("torch", "triton", "numpy")),
        *(("GPU", _gpu_text(gpu)) for gpu in gpus),
    ]
    if not gpus:
        rows.append(("GPU", f"none: {found['devices']['why_none']}"))
    tools = found["toolchain"]
    rows.append(("nvcc", tools["nvcc"] or "not found (only a build of the CUDA kernels needs it)"))
    compilers = [f"{name}: {line}" for name, line in tools.items() if name != "nvcc" and line]
    rows.append(("C++", "; ".join(compilers) or "no compiler found (only a build of the C++ kernels needs one)"))
    rows.append(("C++ kernels", _library_text(found["cpu_library"])))
    rows.append(("CUDA kernels", _cuda_text(found["cuda_library"])))
    width = max(len(name) for name, _ in rows)
    lines = [f"{name:{width}}  {value}" for name, value in rows]
    lines += ["", "Backends, in the order in which they are asked", _backends_text(found)]
    if found["calls"]:
        answers = [(c["where"], c["call"], c["backend"] or "none") for c in found["calls"]]
        lines += ["", "What runs a call here", table(("where", "call", "backend"), answers, left=3)]
    return "\n".join(lines)


def _package(about: dict[str, Any]) -> str:
    version = about["version"]
    if about["problem"]:
        return f"{f'{version}, ' if version else ''}{about['problem']}. Cure: {about['cure']}"
    return str(version)


def _library_text(about: dict[str, Any]) -> str:
    if about["problem"]:
        return str(about["problem"])
    sets = ", ".join([*(about["sets"] or ()), "portable"])
    return f"run on {about['isa']}; built by {about['compiler'] or 'an unknown compiler'} for {sets}"


def _cuda_text(about: dict[str, Any]) -> str:
    if not about["nvcc"]:
        return f"not built: {about['problem']}. Cure: ATTN_CUDA=pip pip install . in the source tree"
    images = ", ".join(f"sm_{arch}" for arch in about["archs"])
    built = f"built by {about['nvcc']} for {images}" + (f" and PTX of compute_{about['ptx']}" if about["ptx"] else "")
    return f"{built}; not run here: {about['problem']}" if about["problem"] else built


def _gpu_text(gpu: dict[str, Any]) -> str:
    memory = gpu["memory_gib"] and f"{gpu['memory_gib']} GiB"
    return ", ".join(word for word in (gpu["name"], gpu["arch"], memory) if word)


def _backends_text(found: dict[str, Any]) -> str:
    if found["no_backends"]:
        return f"  none: {found['no_backends']}"
    rows = []
    for backend in found["backends"]:
        first = "works" if backend["works"] else f"not here: {backend['why_not']}"
        doubts = list(backend["unproven"].values())
        if doubts:
            first = f"only when asked for: {doubts[0]}"
        elif backend["only_forced"]:
            first = f"only when asked for: {backend['only_forced']}"
        rows.append(f"  {backend['name']:10}{first}")
    return "\n".join(rows)
