"""Builds the operator's two libraries, and wheels that hold configs/ and tools/; else see pyproject.toml.

    PEFT_D2_CUDA=0|1        never, or by all means, build the CUDA library (default: when a matching nvcc is found)
    CUDA_HOME               the CUDA toolkit
    TORCH_CUDA_ARCH_LIST    its architectures, "8.0;9.0" by default; PTX of the last one serves newer GPUs
    CXX                     the C++17 compiler

The libraries hold no Python and use torch's stable ABI: one build serves every Python and every torch >= 2.10. No GPU
needs to be visible. A library that cannot be built is one line of output and a working installation, which uses the
pure-torch twin.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

ROOT = Path(__file__).resolve().parent
MINIMUM_TORCH = (2, 10)
STABLE_ABI = "-DTORCH_TARGET_VERSION=0x020a000000000000"
COMMON = ["-std=c++17", "-O3", "-DNDEBUG", STABLE_ABI]
HOST = ["-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math", "-fopenmp-simd"]
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
SUFFIX = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")


class CannotBuild(Exception):
    """Why a library is not built, in one line."""


def torch_folder() -> Path:
    try:
        import torch
    except ImportError as error:
        raise CannotBuild("torch is not importable here; install with --no-build-isolation") from error
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < MINIMUM_TORCH:
        raise CannotBuild(f"torch is {torch.__version__}; the operator needs torch >= 2.10")
    return Path(torch.__file__).parent


def compiler() -> str:
    chosen = os.environ.get("CXX") or next(filter(shutil.which, ("c++", "g++", "clang++")), None)
    if chosen is None:
        raise CannotBuild("no C++ compiler found; install g++ or clang++, or set CXX")
    return chosen


def nvcc() -> tuple[str, Path]:
    """The CUDA compiler that matches torch, and its toolkit."""
    import torch

    if torch.version.cuda is None:
        raise CannotBuild(f"torch {torch.__version__} has no CUDA")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    on_path = shutil.which("nvcc")
    candidates = [Path(home, "bin", "nvcc") for home in homes if home] + ([Path(on_path)] if on_path else [])
    found = next((str(candidate) for candidate in candidates if candidate.is_file()), None)
    if found is None:
        raise CannotBuild("no nvcc found; set CUDA_HOME to a CUDA toolkit")
    # A wrapper on the PATH is not the toolkit: nvcc itself knows where that is.
    dry_run = subprocess.run([found, "--dryrun", "-x", "cu", "-E", os.devnull], capture_output=True, text=True)
    top = re.search(r"^#\$ TOP=(.*)$", dry_run.stderr, re.MULTILINE)
    version = re.search(r"release (\d+)", subprocess.run([found, "--version"], capture_output=True, text=True).stdout)
    if version is None or top is None:
        raise CannotBuild(f"{found} does not run")
    if version.group(1) != torch.version.cuda.split(".")[0]:
        raise CannotBuild(
            f"{found} is CUDA {version.group(1)}, torch was built with {torch.version.cuda}; set CUDA_HOME"
        )
    return found, (Path(found).resolve().parent / top.group(1)).resolve()


def architectures() -> list[str]:
    names = os.environ.get("TORCH_CUDA_ARCH_LIST", "8.0;9.0").replace(";", " ").replace("+PTX", "").split()
    numbers = [name.replace(".", "") for name in names]
    codes = [f"-gencode=arch=compute_{number},code=sm_{number}" for number in numbers]
    newest = max(numbers, key=lambda number: int(re.sub(r"\D", "", number)))
    return [*codes, f"-gencode=arch=compute_{newest},code=compute_{newest}"]


def headers_changed() -> float:
    """When a header last changed."""
    return max(file.stat().st_mtime for file in (ROOT / "csrc").rglob("*h") if file.is_file())


def compile_object(command: list[str], source: str) -> Path:
    """Compile unless an object of the same command is newer than the source and all headers."""
    name = hashlib.sha256(" ".join([*command, source]).encode()).hexdigest()[:16]
    target = ROOT / "build" / "objects" / f"{Path(source).stem}-{name}.o"
    if not target.exists() or target.stat().st_mtime < max((ROOT / source).stat().st_mtime, headers_changed()):
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}.part")
        execute([*command, "-c", source, "-o", str(partial)])
        partial.replace(target)
    return target


def execute(command: list[str]) -> None:
    try:
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError as error:
        raise CannotBuild(f"{command[0]} does not run: {error.strerror}") from error
    if result.returncode:
        sys.stderr.write(result.stderr)
        errors = [line for line in result.stderr.splitlines() if "error" in line.lower()] or [f"{command[0]} failed"]
        raise CannotBuild(errors[0].strip())


def compile_all(jobs: list[tuple[list[str], str]]) -> list[str]:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [str(path) for path in pool.map(lambda job: compile_object(*job), jobs)]


def build_cpu(target: Path) -> None:
    torch, cxx = torch_folder(), compiler()
    flags = [cxx, *COMMON, *HOST, "-isystem", str(torch / "include")]
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    if x86:
        flags.append("-DPEFT_D2_X86")
    kernels = "csrc/cpu/kernels.cpp"
    sets = {"plain": [], "avx2": AVX2, "avx512": AVX512} if x86 else {"plain": []}
    jobs = [([*flags, *extra, f"-DPEFT_D2_KERNELS=kernels_{name}"], kernels) for name, extra in sets.items()]
    jobs += [(flags, "csrc/registration.cpp"), (flags, "csrc/cpu/ms_deform_attn.cpp")]
    libraries = [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    shared = ["-dynamiclib", "-undefined", "dynamic_lookup"] if sys.platform == "darwin" else ["-shared"]
    execute([cxx, *shared, *compile_all(jobs), "-o", str(target), *libraries])


def build_cuda(target: Path) -> None:
    torch = torch_folder()
    executable, home = nvcc()
    flags = [executable, *COMMON, "-DUSE_CUDA", "--expt-relaxed-constexpr", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
    flags += ["--threads", "2", "-ccbin", compiler(), *architectures(), "-isystem", str(torch / "include")]
    objects = compile_all([(flags, "csrc/cuda/ms_deform_attn.cu")])
    # The shared runtime, which torch has loaded already; torch's toolkit packages have it where the toolkit does not.
    folders = [*home.glob("lib*"), *home.glob("targets/*/lib"), Path(sysconfig.get_path("purelib"), "nvidia/cu13/lib")]
    runtimes = sorted(file for folder in folders for file in folder.glob("libcudart.so.[0-9]*"))
    if not runtimes:
        raise CannotBuild(f"no libcudart.so below {home} or in the nvidia packages")
    libraries = [f"-L{torch / 'lib'}", "-ltorch", "-ltorch_cpu", "-ltorch_cuda", "-lc10", str(runtimes[0])]
    execute([compiler(), "-shared", *objects, "-o", str(target), *libraries])


class BuildPackage(build_py):
    """Puts configs/ and tools/ beside the modules, where peft_d2.compat.bundled looks for them."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for folder, kept in (("configs", "*"), ("tools", "*.py")):
            target = Path(self.build_lib, "peft_d2", folder)
            shutil.rmtree(target, ignore_errors=True)
            for file in (ROOT / folder).rglob(kept):
                if file.is_file() and file.suffix != ".pyc":
                    copy = target / file.relative_to(ROOT / folder)
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(file, copy)


class AnyPython(bdist_wheel):
    """The libraries hold no Python: one wheel of a platform for every version of it."""

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


class BuildOperator(build_ext):
    """Builds each library beside peft_d2/ops/library.py, or says in one line why it does not."""

    def get_ext_filename(self, fullname: str) -> str:
        return fullname.replace(".", os.sep) + SUFFIX

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def copy_extensions_to_source(self) -> None:
        # In place, copying over a file that a running process has loaded would end that process.
        for ext in self.extensions:
            (ROOT / self.get_ext_filename(ext.name)).unlink(missing_ok=True)
        super().copy_extensions_to_source()

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        device = ext.name.rpartition("_")[2]
        forced = device == "cuda" and os.environ.get("PEFT_D2_CUDA") == "1"
        try:
            if device == "cuda" and os.environ.get("PEFT_D2_CUDA") == "0":
                raise CannotBuild("PEFT_D2_CUDA=0")
            (build_cpu if device == "cpu" else build_cuda)(target)
        except CannotBuild as reason:
            if forced:
                raise SystemExit(f"peft_d2: PEFT_D2_CUDA=1, but the CUDA operator cannot be built: {reason}") from None
            target.unlink(missing_ok=True)
            print(f"peft_d2: the {device} operator is not built: {reason}", file=sys.stderr)
        else:
            print(f"peft_d2: the {device} operator is built", file=sys.stderr)


if __name__ == "__main__":
    setup(
        ext_modules=[
            Extension(f"peft_d2.ops.libpeft_d2_{device}", sources=[], optional=True) for device in ("cpu", "cuda")
        ],
        cmdclass={"build_ext": BuildOperator, "build_py": BuildPackage, "bdist_wheel": AnyPython},
    )
