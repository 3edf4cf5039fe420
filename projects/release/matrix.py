#!/usr/bin/env python3
"""Install one wheel into fresh environments of several torch and Python versions, and see whether it works there.

    projects/release/matrix.py --wheel dist/peft_d2-*.whl --torch 2.11.0 2.14.1 --python python3.11 python3.13

Each environment is made in a temporary folder, gets torch, the wheel (from there, not from this checkout), a Detectron2
through `peft-d2 setup-detectron2` and pytest; it runs the operator's tests and a training of ten steps, and is deleted.
A row is added to the table of --output for each.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HEADER = (
    "| torch | Python | operator on the CPU | tests of the operator | ten training steps |\n|---|---|---|---|---|\n"
)
# These compile the operator, or tools of a checkout, and say nothing about the wheel.
LEFT_OUT = ("test_build.py", "test_sanitizers.py", "test_cuda_on_host.py", "test_check_gpu.py", "test_benchmark.py")
MAKE_DATA = """
import sys
sys.path.append(sys.argv[2])
import toy
made = toy.generate(sys.argv[1], "night", 8, seed=1)
print(made.json, made.images)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheel", required=True, type=Path, help="the wheel of `make wheels`")
    parser.add_argument("--torch", required=True, nargs="+", help="versions, as the package index has them")
    parser.add_argument("--python", required=True, nargs="+", help="interpreters")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "matrix.md", help="the table")
    args = parser.parse_args()
    args.output.parent.mkdir(parents=True, exist_ok=True)
    if not args.output.exists():
        args.output.write_text(HEADER)
    for torch in args.torch:
        for python in args.python:
            with tempfile.TemporaryDirectory(prefix="peft_d2_") as folder:
                row = check(Path(folder), args.wheel.resolve(), torch, python)
            print(row, flush=True)
            with args.output.open("a") as table:
                table.write(row + "\n")


def check(folder: Path, wheel: Path, torch: str, python: str) -> str:
    """A row of the table; what fails is said in its place."""
    environment = {**os.environ, "PATH": f"{folder / 'env' / 'bin'}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    for name in ("PYTHONPATH", "PIP_CONSTRAINT", "PIP_REQUIRE_VIRTUALENV"):
        environment.pop(name, None)

    def run(*command: object) -> subprocess.CompletedProcess[str]:
        told = subprocess.run(list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True)
        (folder / "log.txt").open("a").write(f"$ {command}\n{told.stdout}{told.stderr}\n")
        return told

    version = run(python, "-c", "import platform; print(platform.python_version())").stdout.strip()
    steps = (
        (python, "-m", "venv", "env"),
        ("pip", "install", "-q", "--no-cache-dir", f"torch=={torch}", "torchvision"),
        ("pip", "install", "-q", wheel, "pytest", "hypothesis"),
        ("peft-d2", "setup-detectron2"),
        ("peft-d2", "doctor"),
    )
    for step in steps:
        if (done := run(*step)).returncode:
            return f"| {torch} | {version} | `{' '.join(map(str, step[:3]))}` failed: {_last(done)} | - | - |"
    operator = re.search(r"operator: cpu *(.*)", done.stdout)
    return f"| {torch} | {version} | {operator and operator[1]} | {_tests(folder, run)} | {_training(folder, run)} |"


def _tests(folder: Path, run) -> str:
    for name in ("tests/conftest.py", "tests/ops", "tests/goldens", "pyproject.toml"):
        target = folder / name
        target.parent.mkdir(exist_ok=True)
        (shutil.copytree if (ROOT / name).is_dir() else shutil.copyfile)(ROOT / name, target)
    ignored = [f"--ignore=tests/ops/{name}" for name in LEFT_OUT]
    return _last(run("python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *ignored, "tests/ops")).strip("= ")


def _training(folder: Path, run) -> str:
    json, images = run("python", "-c", MAKE_DATA, folder / "toy", ROOT / "tools").stdout.split()
    assets = Path(run("python", "-c", "import peft_d2; print(peft_d2.__file__)").stdout.strip()).parent / "assets"
    assert folder in assets.parents, f"{assets}: not the installed package"
    command = ["--config-file", "configs/demo/lora.yaml", "--train-json", json, "--train-images", images]
    command += ["SEED", 1, "SOLVER.MAX_ITER", 10, "OUTPUT_DIR", "run"]
    done = run("peft-d2", "train", *command)
    whole = not done.returncode and (folder / "run" / "adapter_final" / "adapter_model.safetensors").is_file()
    return "done" if whole else f"failed: {_last(done)}"


def _last(done: subprocess.CompletedProcess[str]) -> str:
    return ((done.stdout + done.stderr).strip().splitlines() or ["no output"])[-1].replace("|", "/")


if __name__ == "__main__":
    main()
