"""The build: what it does when a part cannot be built."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not (ROOT / "setup.py").is_file(), reason="needs a source tree")


@pytest.fixture(scope="module")
def build():
    spec = importlib.util.spec_from_file_location("peft_d2_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_setup(folder: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder)]
    return subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)


def test_a_failed_build_is_one_line_and_a_working_installation(tmp_path) -> None:
    result = run_setup(tmp_path, CXX="no-such-compiler", PEFT_D2_CUDA="0")
    assert result.returncode == 0, result.stderr
    said = [line for line in result.stderr.splitlines() if line.startswith("peft_d2:")]
    assert said == [
        "peft_d2: the cpu operator is not built: no-such-compiler does not run: No such file or directory",
        "peft_d2: the cuda operator is not built: PEFT_D2_CUDA=0",
    ]


def test_a_forced_build_that_fails_is_an_error(tmp_path) -> None:
    result = run_setup(tmp_path, CXX="no-such-compiler", PEFT_D2_CUDA="1")
    assert result.returncode != 0
    assert "PEFT_D2_CUDA=1, but the CUDA operator cannot be built" in result.stderr


def test_compiler_errors_are_named(build, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("CXX", "false")
    with pytest.raises(build.CannotBuild, match="false failed"):
        build.build_cpu(tmp_path / "library.so")


def test_no_nvcc_is_named(build, monkeypatch) -> None:
    monkeypatch.setattr(build.Path, "is_file", lambda path: False)
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    with pytest.raises(build.CannotBuild, match="no nvcc found; set CUDA_HOME|has no CUDA"):
        build.nvcc()


@pytest.mark.parametrize(
    "names, codes",
    [
        (None, ["sm_80", "sm_90", "compute_90"]),
        ("8.0 8.6+PTX", ["sm_80", "sm_86", "compute_86"]),
        ("9.0a;10.0", ["sm_90a", "sm_100", "compute_100"]),
    ],
)
def test_architectures(build, monkeypatch, names, codes) -> None:
    monkeypatch.delenv("TORCH_CUDA_ARCH_LIST", raising=False)
    if names:
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", names)
    assert [flag.rpartition("code=")[2] for flag in build.architectures()] == codes
