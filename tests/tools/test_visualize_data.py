"""The pictures of what a training's mapper feeds the model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("detectron2")

import toy  # noqa: E402

ROOT = Path(__file__).parents[2]


def visualize(folder: Path, images: Path, annotations: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools" / "visualize_data.py", "--config-file", ROOT / "tests/engine/tiny.yaml"]
    own = ["--train-json", annotations, "--train-images", images, "--output", folder / "fed.png", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*map(str, command), *map(str, own)], capture_output=True, text=True, env=environment, timeout=120
    )


def test_pictures_of_two_batches_and_a_defective_image(tmp_path: Path) -> None:
    made = toy.generate(tmp_path / "set", sorted(toy.DOMAINS)[0], images=4, seed=0, size=64)
    options = ("--batches", 2, "DATALOADER.NUM_WORKERS", 2)
    done = visualize(tmp_path, made.images, made.json, *options)
    assert done.returncode == 0, done.stderr
    with Image.open(tmp_path / "fed.png") as sheet:
        assert sheet.width * sheet.height >= 4 * 64 * 64 and len(sheet.convert("RGB").getcolors(1 << 20)) > 100
    for path in made.images.iterdir():
        path.write_bytes(path.read_bytes()[:200])
    done = visualize(tmp_path, made.images, made.json, *options)
    assert done.returncode == 1 and done.stderr.splitlines()[-1].startswith(f"error: {made.images}"), done.stderr
    assert "Traceback" not in done.stderr
