#!/usr/bin/env python3
"""Build an installable Detectron2 0.5 wheel from its source archive on the Python package index.

Detectron2 is not on the index under its own name; its Python sources are, as the archive `detectron2-cdo` 0.5, which
lacks the C++ sources and predates NumPy 2, Pillow 10 and setuptools 82. This script downloads that archive through pip,
verifies its sha256, applies `TABLE` and writes a pure-Python wheel. Deformable convolution is torchvision's; what
else is compiled code, rotated boxes, is absent and says so when it is used; everything else works.

    python tools/build_detectron2.py              # prints the path of the wheel, which is built once and kept
    python tools/build_detectron2.py --install    # the same, then pip installs it unless a Detectron2 is there already

Run it with the interpreter of the environment that is to have Detectron2; torch and setuptools must be in it.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

PROJECT = "detectron2-cdo"
RELEASE = "0.5"
SHA256 = "53c9e79e9cc943e80419c588ea44b5479507a8628ed14a4e06bd093e29311b18"

REQUIREMENTS = (
    "torch",
    "torchvision",
    "numpy",
    "pillow>=7.1",
    "matplotlib",
    "pycocotools>=2.0.2",
    "opencv-python-headless",
    "termcolor>=1.1",
    "yacs>=0.1.6",
    "tabulate",
    "cloudpickle",
    "tqdm>4.29.0",
    "tensorboard",
    "fvcore>=0.1.5,<0.1.6",
    "iopath>=0.1.7",
    "omegaconf>=2.1",
    "hydra-core>=1.1",
)

# Small packages that the original setup.py installs below `detectron2.projects`.
PROJECTS = {
    "projects/PointRend/point_rend/": "detectron2/projects/point_rend/",
    "projects/DeepLab/deeplab/": "detectron2/projects/deeplab/",
    "projects/Panoptic-DeepLab/panoptic_deeplab/": "detectron2/projects/panoptic_deeplab/",
}


@dataclass(frozen=True)
class Row:
    """One modernisation: in files whose path matches `files`, `pattern` becomes `replacement`, `hits` times."""

    why: str
    files: str
    pattern: str
    replacement: str
    hits: int


# Of its compiled operators torchvision has this one, with the same order of offsets, masks and groups, and gradients.
DEFORM_CONV = """\
def deform_conv(
    input, offset, weight, stride=1, padding=0, dilation=1, groups=1, deformable_groups=1, im2col_step=64
):
    return deform_conv2d(input, offset, weight, None, stride, padding, dilation)


def modulated_deform_conv(
    input, offset, mask, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, deformable_groups=1
):
    return deform_conv2d(input, offset, weight, bias, stride, padding, dilation, mask)
"""

TABLE = (
    Row("NumPy 1.24 removed the alias", r"\.py$", r"\bnp\.bool\b", "bool", 8),
    Row("NumPy 1.24 removed the alias", r"\.py$", r"\bnp\.int\b", "int", 4),
    Row("NumPy 1.24 removed the alias", r"\.py$", r"\bnp\.float\b", "float", 5),
    Row("NumPy 1.24 removed the alias", r"\.py$", r"\bnp\.str\b", "str", 1),
    Row("Pillow 10 removed the alias", r"\.py$", r"\bImage\.LINEAR\b", "Image.BILINEAR", 1),
    Row(
        "setuptools 82 removed pkg_resources",
        r"/model_zoo/model_zoo\.py$",
        r"^import pkg_resources$",
        "from importlib import resources",
        1,
    ),
    Row(
        "setuptools 82 removed pkg_resources",
        r"/model_zoo/model_zoo\.py$",
        r'pkg_resources\.resource_filename\(\s*"detectron2\.model_zoo", os\.path\.join\("configs", config_path\)\s*\)',
        'str(resources.files("detectron2.model_zoo").joinpath("configs", config_path))',
        1,
    ),
    Row(
        "the accelerated COCO evaluation is compiled code; pycocotools computes the same",
        r"/evaluation/coco_evaluation\.py$",
        r"^from detectron2\.evaluation\.fast_eval_api import COCOeval_opt$",
        "COCOeval_opt = COCOeval",
        1,
    ),
    Row(
        "torch 2 has no caffe2; tracing and scripting, and the count of operations that uses them, stay",
        r"/export/__init__\.py$",
        r"^from \.api import \*\n",
        "",
        1,
    ),
    Row(
        "torch wants the order of the axes spelled out",
        r"/modeling/anchor_generator\.py$",
        r"torch\.meshgrid\(shifts_y, shifts_x\)",
        'torch.meshgrid(shifts_y, shifts_x, indexing="ij")',
        1,
    ),
    Row(
        "torch wants the order of the axes spelled out",
        r"/panoptic_deeplab/post_processing\.py$",
        r"(torch\.meshgrid\(\n.*\n.*device=offsets\.device\),\n)",
        r'\1        indexing="ij",' + "\n",
        1,
    ),
    Row(
        "deformable convolution is compiled code; torchvision has it",
        r"/layers/deform_conv\.py$",
        r"^deform_conv = _DeformConv\.apply\nmodulated_deform_conv = _ModulatedDeformConv\.apply\n",
        DEFORM_CONV,
        1,
    ),
    Row(
        "the suppression of rotated boxes is compiled code, too: looked up there, it says so",
        r"/layers/nms\.py$",
        r"^    return torch\.ops\.detectron2\.nms_rotated\(",
        "    from detectron2 import _C\n\n    return _C.nms_rotated(",
        1,
    ),
)

# Takes the place of the compiled module. Dunder names are missing in the usual way, for what probes any module.
COMPILED_MODULE = '''\
"""Stands for Detectron2's compiled operators, which this pure-Python wheel does not have."""


def get_compiler_version():
    return "none (pure-Python wheel)"


def get_cuda_version():
    return "none (pure-Python wheel)"


def has_cuda():
    return False


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    raise RuntimeError(
        f"detectron2._C.{name} is compiled code (rotated boxes), which this pure-Python build of Detectron2 lacks."
        " Models that use it need Detectron2 installed from its own sources: "
        "see the installation page of the Detectron2 project."
    )
'''

# The recipe is part of the version: a changed recipe makes another wheel, which replaces one that is installed.
RECIPE = hashlib.sha256(repr((SHA256, REQUIREMENTS, PROJECTS, TABLE, COMPILED_MODULE)).encode()).hexdigest()[:8]
VERSION = f"{RELEASE}+peftd2.r{RECIPE}"


class BuildError(RuntimeError):
    """A step that failed; the message names the step, what was expected, and the remedy."""


def download_sdist(folder: Path) -> Path:
    """Fetch the source archive into `folder` through this interpreter's pip, and return its path."""
    for module in ("torch", "setuptools", "wheel"):
        if importlib.util.find_spec(module) is None:
            raise BuildError(
                f"{module} is not installed for {sys.executable}, but pip needs it to read the archive's metadata. "
                f"Install it first: {sys.executable} -m pip install {module}"
            )
    requirement = f"{PROJECT}=={RELEASE}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--no-build-isolation", "--no-binary", ":all:", "--dest", str(folder), requirement]
    # pip's own output belongs to the log, not to the path that this script prints.
    if subprocess.run(command, stdout=sys.stderr).returncode:
        raise BuildError(
            f"pip could not download {requirement} (its message is above). Check the network or pip's index settings, "
            "or fetch the archive elsewhere and pass it with --sdist."
        )
    archives = sorted(folder.glob("*.tar.gz"))
    if len(archives) != 1:
        raise BuildError(f"pip download left {len(archives)} archives in {folder}, expected one")
    return archives[0]


def verify(archive: Path) -> None:
    """Raise `BuildError` unless the archive is the one that `TABLE` was written for."""
    if not archive.is_file():
        raise BuildError(f"no source archive at {archive}: leave --sdist out to download it")
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    if digest != SHA256:
        raise BuildError(f"{archive} has sha256 {digest}, expected {SHA256}: damaged, or another file; delete it")


def read_package(archive: Path) -> dict[str, bytes]:
    """The archive's files that belong into the wheel, by their path there. Nothing is unpacked to disk."""
    files: dict[str, bytes] = {}
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            if not member.isfile():
                continue
            path = member.name.partition("/")[2]  # below the archive's top folder
            for source, target in PROJECTS.items():
                if path.startswith(source):
                    path = target + path.removeprefix(source)
            if not (path.startswith("detectron2/") or path == "LICENSE"):
                continue
            content = tar.extractfile(member)
            assert content is not None  # a regular file always has content
            files[path] = content.read()
    return files


def modernise(files: dict[str, bytes], table: tuple[Row, ...] = TABLE) -> dict[str, bytes]:
    """Apply `table`. A row that does not hit exactly as often as it says raises `BuildError`."""
    result = dict(files)
    for row in table:
        hits = 0
        for path in [path for path in result if re.search(row.files, path)]:
            text, count = re.subn(row.pattern, row.replacement, result[path].decode(), flags=re.MULTILINE)
            if count:
                result[path] = text.encode()
            hits += count
        if hits != row.hits:
            raise BuildError(
                f"modernisation {row.pattern!r} ({row.why}) matched {hits} times in files {row.files!r}, "
                f"expected {row.hits}: the sources are not the ones that the table was written for"
            )
    return result


def metadata() -> dict[str, bytes]:
    """The wheel's own description, without RECORD."""
    info = f"detectron2-{VERSION}.dist-info"
    lines = ["Metadata-Version: 2.1", "Name: detectron2", f"Version: {VERSION}"]
    lines += ["Summary: Detectron2 0.5, pure Python, with current NumPy, Pillow and setuptools", "License: Apache-2.0"]
    lines += ["Home-page: https://github.com/facebookresearch/detectron2", "Requires-Python: >=3.9"]
    lines += [f"Requires-Dist: {requirement}" for requirement in REQUIREMENTS]
    wheel = "Wheel-Version: 1.0\nGenerator: build_detectron2\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    return {
        f"{info}/METADATA": ("\n".join(lines) + "\n").encode(),
        f"{info}/WHEEL": wheel.encode(),
        f"{info}/top_level.txt": b"detectron2\n",
    }


def write_wheel(files: dict[str, bytes], path: Path) -> None:
    """Write `files` and their RECORD as a wheel, byte for byte reproducibly; `path` appears only when complete."""
    record = f"detectron2-{VERSION}.dist-info/RECORD"
    rows = []
    for name in sorted(files):
        digest = base64.urlsafe_b64encode(hashlib.sha256(files[name]).digest()).rstrip(b"=").decode()
        rows.append(f"{name},sha256={digest},{len(files[name])}")
    rows.append(f"{record},,")
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".partial{os.getpid()}")
    with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as wheel:
        for name in [*sorted(files), record]:
            entry = zipfile.ZipInfo(name, date_time=(2021, 7, 23, 0, 0, 0))
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o644 << 16
            wheel.writestr(entry, files[name] if name in files else "\n".join(rows) + "\n")
    partial.replace(path)


def build(cache: Path, sdist: Path | None = None) -> Path:
    """The wheel's path below `cache`; built only if it is not there yet."""
    wheel = cache / f"detectron2-{VERSION}-py3-none-any.whl"
    if wheel.is_file():
        return wheel
    with tempfile.TemporaryDirectory() as scratch:
        archive = sdist or download_sdist(Path(scratch))
        verify(archive)
        files = modernise(read_package(archive))
    licence = files.pop("LICENSE")
    files["detectron2/_C.py"] = COMPILED_MODULE.encode()
    files |= metadata()
    files[f"detectron2-{VERSION}.dist-info/LICENSE"] = licence
    write_wheel(files, wheel)
    return wheel


def installed() -> str | None:
    """The version of the Detectron2 of this interpreter, or None."""
    if importlib.util.find_spec("detectron2") is None:
        return None
    try:
        return importlib.metadata.version("detectron2")
    except importlib.metadata.PackageNotFoundError:
        return "unknown (on the path, not installed)"


def install_build_tools() -> None:
    """pip install what old archives are built with, where it is missing: an environment of venv has no `wheel`."""
    tools = {"setuptools": "setuptools<82", "wheel": "wheel"}
    missing = [requirement for module, requirement in tools.items() if importlib.util.find_spec(module) is None]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if missing and subprocess.run([*pip, *missing], stdout=sys.stderr).returncode:
        raise BuildError(f"pip could not install {' and '.join(missing)} (its message is above)")
    importlib.invalidate_caches()


def install(wheel: Path) -> None:
    """pip install `wheel` and what it requires; requirements that are old archives build with this setuptools."""
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check"]
    if subprocess.run([*pip, "--no-build-isolation", str(wheel)]).returncode:
        raise BuildError(f"pip could not install {wheel} (its message is above)")


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Build an installable Detectron2 0.5, pure Python, from its source archive on the package index.",
        epilog="an example:\n  %(prog)s --install",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "peft_d2", "detectron2")
    if (checkout := Path(__file__).resolve().parent.parent).joinpath("pyproject.toml").is_file():
        default = checkout / ".cache" / "detectron2"
    parser.add_argument("--cache", type=Path, default=default, help="where the wheel is kept (default: %(default)s)")
    parser.add_argument("--sdist", type=Path, help="a source archive fetched before (default: download it)")
    parser.add_argument("--install", action="store_true", help="install the wheel unless a Detectron2 is there already")
    arguments = parser.parse_args()
    present = installed() if arguments.install else None
    if present == VERSION or (present is not None and "+peftd2." not in present):
        print(f"Detectron2 {present} is installed; left alone")
        return 0
    try:
        if arguments.install:
            install_build_tools()
        wheel = build(arguments.cache, arguments.sdist)
        print(wheel)
        if arguments.install:
            install(wheel)
    except BuildError as error:
        print(f"build_detectron2: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
