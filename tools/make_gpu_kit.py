#!/usr/bin/env python3
"""Fill a folder with what tools/check_gpu.sh needs on a machine that has a GPU and torch, but no network.

    make gpu-kit                                     into gpu_kit/, which git ignores; carry it along with the sources
    python tools/make_gpu_kit.py --official DIR      with the official operator (Deformable-DETR: models/ops)

It holds the operator's libraries, built here (torch's stable ABI: they run on every Python with torch >= 2.10),
wheels of Detectron2 and of what it needs beyond torch and the usual scientific packages, and the sources of other
operators, which the GPU machine builds to compare with. kit.json says what the libraries were made from.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PURE = ["fvcore", "iopath", "yacs", "termcolor", "omegaconf", "antlr4-python3-runtime", "hydra-core"]
COMPILED = ["pycocotools", "faster-coco-eval"]
PEERS = ["torch-ms-deform-attn==0.1.1"]
PLATFORMS = ["manylinux_2_28_x86_64", "manylinux_2_27_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64"]
MOST_MEGABYTES = 60


def sources_digest() -> str:
    """A checksum of what the libraries are made from."""
    digest = hashlib.sha256()
    for file in sorted([ROOT / "setup.py", *(ROOT / "csrc").rglob("*")]):
        if file.is_file():
            digest.update(file.relative_to(ROOT).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()


def pinned(names: list[str]) -> list[str]:
    """`names` with the versions of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return [next((line.partition(";")[0].strip() for line in lines if line.startswith(f"{n}==")), n) for n in names]


def run(*command: object, **environment: str) -> str:
    result = subprocess.run(
        [str(part) for part in command], cwd=ROOT, env={**os.environ, **environment}, stdout=subprocess.PIPE, text=True
    )
    if result.returncode:
        raise SystemExit(f"make_gpu_kit: this failed, its message is above: {' '.join(map(str, command))}")
    return result.stdout.strip()


def make_kit(kit: Path, python_version: str, official: Path | None) -> None:
    shutil.rmtree(kit / "wheels", ignore_errors=True)
    (kit / "wheels").mkdir(parents=True)
    print("== libraries", flush=True)
    run(sys.executable, "setup.py", "-q", "build_ext", "--inplace", PEFT_D2_CUDA="1")
    for device in ("cpu", "cuda"):
        shutil.copy2(ROOT / "peft_d2" / "ops" / f"libpeft_d2_{device}.so", kit)
    print("== wheels", flush=True)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", kit / "wheels", *pinned(PURE))
    wanted = ["--only-binary=:all:", "--python-version", python_version, "--implementation", "cp"]
    wanted += [part for platform in PLATFORMS for part in ("--platform", platform)]
    run(*pip, "download", "--no-deps", *wanted, "--dest", kit / "wheels", *pinned(COMPILED))
    shutil.copy2(run(sys.executable, ROOT / "tools" / "build_detectron2.py").splitlines()[-1], kit / "wheels")
    print("== other operators' sources", flush=True)
    run(*pip, "download", "--no-deps", "--no-build-isolation", "--no-binary=:all:", "--dest", kit / "peers", *PEERS)
    if official:
        shutil.copytree(official / "src", kit / "official" / "src", dirs_exist_ok=True)
    about = {"sources": sources_digest(), "python": python_version}
    (kit / "kit.json").write_text(json.dumps(about, indent=1) + "\n")
    size = sum(file.stat().st_size for file in kit.rglob("*") if file.is_file()) / 1e6
    print(f"{kit}: {size:.1f} MB, for Python {python_version}")
    if size > MOST_MEGABYTES:
        raise SystemExit(f"make_gpu_kit: {kit} has {size:.0f} MB; at most {MOST_MEGABYTES} should travel")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=ROOT / "gpu_kit")
    parser.add_argument("--python-version", default="3.12", help="of the GPU machine")
    parser.add_argument("--official", type=Path, metavar="DIR", help="the official operator's folder, which holds src/")
    arguments = parser.parse_args()
    make_kit(arguments.output.resolve(), arguments.python_version, arguments.official)


if __name__ == "__main__":
    main()
