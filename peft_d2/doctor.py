"""``python -m peft_d2.doctor``: what this environment has, what is missing, and the remedy.

Works whatever is missing, torch included. Exit status 0: everything that is required is there and can be imported.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass

PAIR = "pip install torch torchvision (both at once, from the same index: their builds must match)"
EDITABLE = "pip install --no-build-isolation -e . (in the checkout of peft_d2)"

# module, distribution, oldest version that will do, remedy
REQUIRED = (
    ("torch", "torch", "2.4", PAIR),
    ("numpy", "numpy", "", EDITABLE),
    ("scipy.optimize", "scipy", "", EDITABLE),
    ("safetensors", "safetensors", "0.4", EDITABLE),
    ("tqdm", "tqdm", "", EDITABLE),
    ("PIL.Image", "pillow", "9.4", EDITABLE),
    ("pycocotools.mask", "pycocotools", "2.0.6", EDITABLE),
    ("faster_coco_eval", "faster-coco-eval", "1.6", EDITABLE),
    ("torchvision", "torchvision", "", PAIR),
)


@dataclass(frozen=True)
class Finding:
    """One line of the report; ``state`` is "ok", "note" (nothing to worry about) or "missing"."""

    state: str
    name: str
    value: str
    remedy: str = ""

    def __str__(self) -> str:
        line = f"{self.state:8}{self.name:18}{self.value}"
        return f"{line}\n{'':26}-> {self.remedy}" if self.remedy else line


def diagnose() -> Iterator[Finding]:
    """All findings, in the order in which they are printed."""
    yield from _itself()
    for module, distribution, oldest, remedy in REQUIRED:
        yield _package(module, distribution, oldest, remedy)
    yield from _detectron2()
    yield from _operator()
    yield _compiler()
    yield _nvcc()
    yield _gpu()


def main() -> int:
    """Print the report; return the exit status."""
    missing = 0
    for finding in diagnose():
        print(finding, flush=True)
        missing += finding.state == "missing"
    print(f"\n{missing} missing; the remedies stand above" if missing else "\nEverything that is required is there")
    return 1 if missing else 0


def _itself() -> Iterator[Finding]:
    import peft_d2

    yield Finding("ok", "peft_d2", f"{peft_d2.__version__} ({os.path.dirname(peft_d2.__file__)})")
    yield Finding("ok", "python", f"{platform.python_version()} ({sys.executable}, {platform.platform()})")


def _package(module: str, distribution: str, oldest: str, remedy: str) -> Finding:
    fault = _import_fault(module)
    if fault:
        return Finding("missing", distribution, fault, remedy)
    version = _version(distribution, module)
    if oldest and _numbers(version) < _numbers(oldest):
        return Finding("missing", distribution, f"{version}, but {oldest} or newer is needed", remedy)
    return Finding("ok", distribution, version)


def _detectron2() -> Iterator[Finding]:
    from peft_d2.compat import HOW_TO_GET_DETECTRON2, detectron2_version

    version = detectron2_version()
    if version is None:
        yield Finding("missing", "detectron2", "not installed", HOW_TO_GET_DETECTRON2)
        return
    for distribution, module in (("fvcore", "fvcore.nn"), ("iopath", "iopath.common.file_io"), ("opencv", "cv2")):
        fault = _import_fault(module)
        if not fault:
            yield Finding("ok", distribution, _version(distribution, module))
        elif distribution != "opencv":
            yield Finding("missing", distribution, fault, f"pip install {distribution}")
        else:
            yield Finding("note", distribution, f"{fault}; pictures need it", "pip install opencv-python-headless")
    fault = next(filter(None, map(_import_fault, ("detectron2", "detectron2.modeling", "detectron2.engine"))), "")
    if fault:
        yield Finding("missing", "detectron2", f"{version}, {fault}", HOW_TO_GET_DETECTRON2)
        return
    where = os.path.dirname(sys.modules["detectron2"].__file__ or "")
    yield Finding("ok", "detectron2", f"{version} ({where})")


def _operator() -> Iterator[Finding]:
    fault = _import_fault("peft_d2.ops")
    if fault:
        yield Finding("missing", "peft_d2.ops", fault, "install what is missing above")
        return
    from peft_d2.ops import backends

    for name, reason in backends().items():
        if reason:
            yield Finding("note", f"operator: {name}", f"not available: {reason}")
        else:
            yield Finding("ok", f"operator: {name}", "available")


def _compiler() -> Finding:
    candidates = [os.environ["CXX"]] if os.environ.get("CXX") else ["c++", "g++", "clang++"]
    found = next(filter(None, map(shutil.which, candidates)), None)
    if found is None:
        remedy = f"install a C++ compiler (Debian, Ubuntu: apt install g++), then {EDITABLE}"
        return Finding("note", "C++ compiler", f"none ({', '.join(candidates)}); only the operator needs it", remedy)
    return Finding("ok", "C++ compiler", _first_line([found, "--version"]))


def _nvcc() -> Finding:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH") or "/usr/local/cuda"
    found = shutil.which("nvcc") or shutil.which("nvcc", path=os.path.join(home, "bin"))
    if found is None:
        return Finding("note", "nvcc", "none; only the operator's CUDA code needs it")
    release = [line for line in _output([found, "--version"]).splitlines() if "release" in line]
    return Finding("ok", "nvcc", f"{release[0].strip() if release else 'unknown version'} ({found})")


def _gpu() -> Finding:
    if _import_fault("torch"):
        return Finding("note", "GPU", "cannot tell without torch")
    import torch

    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        return Finding("ok", "GPU", f"{names} (torch built for CUDA {torch.version.cuda})")
    if shutil.which("nvidia-smi") and "GPU " in _output(["nvidia-smi", "-L"]):
        remedy = f"install a torch for this driver (this one is built for CUDA {torch.version.cuda}), or a newer driver"
        return Finding("note", "GPU", "there is one, but torch cannot use it", remedy)
    return Finding("note", "GPU", "none; everything runs on the CPU, slower")


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
    numbers: list[int] = []
    for part in version.partition("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def _output(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _first_line(command: list[str]) -> str:
    return (_output(command).splitlines() or [f"{command[0]} (does not run)"])[0]


if __name__ == "__main__":
    sys.exit(main())
