#!/usr/bin/env python
"""``peft-d2 doctor``, or ``python -m peft_d2.doctor``: what this environment has, what is missing, and the remedy.

Works whatever is missing, torch included. Exit status 0: everything that is required is there and can be imported.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

PAIR = "pip install torch torchvision (both at once, from the same index: their builds must match)"
EDITABLE = "pip install --no-build-isolation -e . (in the checkout of peft_d2)"
REQUIRED = (  # module, distribution, oldest version that will do, remedy where it is not "pip install" of it
    ("torch", "torch", "2.4", PAIR),
    ("numpy", "numpy", "", ""),
    ("scipy.optimize", "scipy", "", ""),
    ("safetensors", "safetensors", "0.4", ""),
    ("tqdm", "tqdm", "", ""),
    ("PIL.Image", "pillow", "9.4", ""),
    ("pycocotools.mask", "pycocotools", "2.0.6", ""),
    ("faster_coco_eval", "faster-coco-eval", "1.6", ""),
    ("torchvision", "torchvision", "", PAIR),
)
# "ok", "note" (nothing to worry about) or "missing"; the name, the value, the remedy if any
Finding = tuple[str, str, str] | tuple[str, str, str, str]


def diagnose() -> Iterator[Finding]:
    """All findings, in the order in which they are printed."""
    import peft_d2

    yield "ok", "peft_d2", f"{peft_d2.__version__} ({os.path.dirname(peft_d2.__file__)})"
    yield "ok", "python", f"{platform.python_version()} ({sys.executable}, {platform.platform()})"
    for row in REQUIRED:
        yield _package(*row)
    yield from _detectron2()
    yield from _operator()
    yield _compiler()
    yield _nvcc()
    yield _gpu()


def main() -> int:
    """Print the report; return the exit status."""
    argparse.ArgumentParser(
        description="Say what this environment has, what is missing, and what to do about it. Exit code 1: some is.",
        epilog="an example:\n  %(prog)s",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    ).parse_args()
    missing = 0
    for state, name, value, *remedy in diagnose():
        print(f"{state:8}{name:18}{value}", *(f"{'':26}-> {text}" for text in remedy), sep="\n", flush=True)
        missing += state == "missing"
    print(f"\n{missing} missing; the remedies stand above" if missing else "\nEverything that is required is there")
    return 1 if missing else 0


def _package(module: str, distribution: str, oldest: str, remedy: str) -> Finding:
    remedy = remedy or f"pip install '{distribution}{oldest and '>='}{oldest}'"
    if fault := _import_fault(module):
        return "missing", distribution, fault, remedy
    version = _version(distribution, module)
    if oldest and _numbers(version) < _numbers(oldest):
        return "missing", distribution, f"{version}, but {oldest} or newer is needed", remedy
    return "ok", distribution, version


def _detectron2() -> Iterator[Finding]:
    from peft_d2.compat import HOW_TO_GET_DETECTRON2

    version = detectron2_version()
    if version is None:
        yield "missing", "detectron2", "not installed", HOW_TO_GET_DETECTRON2
        return
    yield _package("fvcore.nn", "fvcore", "", "")
    yield _package("iopath.common.file_io", "iopath", "", "")
    for module, name, what, package in (
        ("cv2", "opencv", "pictures and polygons need it", "opencv-python-headless"),
        ("timm", "timm", "the demo and PD2Timm need it", "timm"),
    ):
        if fault := _import_fault(module):
            yield "note", name, f"{fault}; {what}", f"pip install {package}"
        else:
            yield "ok", name, _version(name, module)
    if fault := next(filter(None, map(_import_fault, ("detectron2", "detectron2.modeling", "detectron2.engine"))), ""):
        yield "missing", "detectron2", f"{version}, {fault}", HOW_TO_GET_DETECTRON2
    else:
        folder = os.path.dirname(sys.modules["detectron2"].__file__ or "")
        yield "ok", "detectron2", f"{version}, {_which_detectron2()} ({folder})"


def detectron2_version() -> str | None:
    """The ``__version__`` of the Detectron2 that an import would find, None if there is none. Imports nothing."""
    try:
        spec = importlib.util.find_spec("detectron2")
    except ValueError:  # something that is not a module stands in sys.modules
        return None
    if spec is None or spec.origin is None:
        return None
    found = re.search(r'^__version__ = "(.+)"', Path(spec.origin).read_text(encoding="utf-8"), re.MULTILINE)
    return found.group(1) if found else "unknown"


def _which_detectron2() -> str:
    compiled = importlib.import_module("detectron2._C") if not _import_fault("detectron2._C") else None
    if compiled is None:
        return "without its compiled operators, which cannot be imported here"
    if (getattr(compiled, "__file__", None) or "").endswith(".py"):
        return "pure Python, as setup-detectron2 makes it: all but rotated boxes"
    return "with its compiled operators"


def _operator() -> Iterator[Finding]:
    if fault := _import_fault("peft_d2.ops"):
        yield "missing", "peft_d2.ops", fault, "install what is missing above"
        return
    from peft_d2.ops import backends

    for name, reason in backends().items():
        yield "note" if reason else "ok", f"operator: {name}", f"not available: {reason}" if reason else "available"


def _compiler() -> Finding:
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    found = next(filter(None, map(shutil.which, candidates)), None)
    if found is None:
        remedy = f"install a C++ compiler (Debian, Ubuntu: apt install g++), then {EDITABLE}"
        return "note", "C++ compiler", f"none ({', '.join(candidates)}); only the operator needs it", remedy
    return "ok", "C++ compiler", (_output([found, "--version"]).splitlines() or [f"{found} (does not run)"])[0]


def _nvcc() -> Finding:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    found = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))
    if found is None:
        return "note", "nvcc", "none; only the operator's CUDA code needs it"
    release = [line for line in _output([found, "--version"]).splitlines() if "release" in line]
    return "ok", "nvcc", f"{release[0].strip() if release else 'unknown version'} ({found})"


def _gpu() -> Finding:
    if _import_fault("torch"):
        return "note", "GPU", "cannot tell without torch"
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return "ok", "GPU", f"{names} (torch built for CUDA {torch.version.cuda})"
    if shutil.which("nvidia-smi") and "GPU " in _output(["nvidia-smi", "-L"]):
        remedy = f"install a torch for this driver (this one is built for CUDA {torch.version.cuda}), or a newer driver"
        return "note", "GPU", "there is one, but torch cannot use it", remedy
    return "note", "GPU", "none; everything runs on the CPU, slower"


def _import_fault(module: str) -> str:
    """Why `module` cannot be imported, "" if it can."""
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return "not installed" if module.startswith(str(error.name)) else f"cannot be imported: {error}"
    except Exception as error:  # a broken installation can raise anything, and saying so is this module's purpose
        return f"cannot be imported: {type(error).__name__}: {error}"
    return ""


def _version(distribution: str, module: str) -> str:
    """What the imported package says of itself, or else what its installation says."""
    version = getattr(sys.modules[module.partition(".")[0]], "__version__", None)
    try:
        return str(version or importlib.metadata.version(distribution))
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"


def _numbers(version: str) -> tuple[int, ...]:
    """The leading numbers: "2.11.0+cu130" -> (2, 11, 0)."""
    return tuple(map(int, re.findall(r"\d+", re.match(r"[\d.]*", version)[0])))  # type: ignore[index]


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


if __name__ == "__main__":
    sys.exit(main())
