"""The GPU check never rots: its dry run passes, on a machine that lacks Detectron2 and all that comes with it."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from peft_d2 import ops

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "check_gpu.py"
pytestmark = [
    pytest.mark.skipif(not TOOL.is_file(), reason="needs a source tree"),
    pytest.mark.skipif(bool(ops.backends()["cpu"]), reason=f"compiled operator: {ops.backends()['cpu']}"),
]
KIT = {
    "detectron2": "detectron2",
    "fvcore": "fvcore",
    "iopath": "iopath",
    "yacs": "yacs",
    "termcolor": "termcolor",
    "omegaconf": "omegaconf",
    "hydra-core": "hydra",
    "antlr4-python3-runtime": "antlr4",
    "pycocotools": "pycocotools",
    "faster-coco-eval": "faster_coco_eval",
}
# Stands in the interpreter's way to what the environment has; only the unpacked kit is searched.
HIDE = f"""
import sys
from importlib.machinery import PathFinder

class Hidden:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in {sorted(KIT.values())!r}:
            return None
        spec = PathFinder.find_spec(name, [entry for entry in sys.path if "check_gpu_" in entry])
        if spec is None:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
        return spec

sys.meta_path.insert(0, Hidden)
"""


def make_kit(folder: Path) -> Path:
    """A kit of this environment's own packages, as wheels."""
    (folder / "wheels").mkdir(parents=True)
    for name in KIT:
        with zipfile.ZipFile(folder / "wheels" / f"{name.replace('-', '_')}-1-py3-none-any.whl", "w") as wheel:
            for file in importlib.metadata.files(name) or ():
                if ".." not in file.parts and file.suffix != ".pyc":
                    wheel.write(file.locate(), file.as_posix())
    sys.path.insert(0, str(ROOT / "tools"))
    from make_gpu_kit import sources_digest

    sys.path.pop(0)
    (folder / "kit.json").write_text(json.dumps({"sources": sources_digest()}))
    return folder


def check_gpu(
    output: Path, *options: object, **environment: str
) -> tuple[subprocess.CompletedProcess[str], list[dict]]:
    command = ["bash", str(TOOL.with_suffix(".sh")), "--dry-run", "--output", str(output), *map(str, options)]
    environment = {**os.environ, "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", **environment}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    return result, [json.loads(line) for line in (output / "results.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_dry_run_on_a_machine_without_detectron2(tmp_path) -> None:
    pytest.importorskip("detectron2")
    (tmp_path / "hide").mkdir()
    (tmp_path / "hide" / "sitecustomize.py").write_text(HIDE)
    kit, hidden = make_kit(tmp_path / "kit"), str(tmp_path / "hide")
    probe = subprocess.run([sys.executable, "-c", "import detectron2"], env={**os.environ, "PYTHONPATH": hidden})
    assert probe.returncode != 0
    result, rows = check_gpu(tmp_path / "results", "--kit", kit, PYTHONPATH=hidden)
    assert result.returncode == 0, result.stdout + (tmp_path / "results" / "log.txt").read_text()[-3000:]
    unpacked = {row["name"].replace("_", "-") for row in rows if row["value"] == "from the kit"}
    assert unpacked == set(KIT)
    assert [row for row in rows if row["ok"] is False] == []
    told = {row["step"] for row in rows if row["ok"]}
    assert told == {"kit", "load", "correct", "sanitize", "speed", "train", "memory", "runs"}  # ncu needs a GPU
    assert sum(row["step"] == "train" and "step_ms" in row["value"] for row in rows) == 6
    assert sum(row["step"] == "runs" for row in rows) == 4
    assert len((tmp_path / "results" / "results.md").read_text().splitlines()) == 2 + len(rows)


def test_without_a_kit_and_without_time_it_says_so(tmp_path) -> None:
    result, rows = check_gpu(tmp_path, "--kit", tmp_path / "none", "--minutes", 0, "--steps", "load", "speed")
    assert result.returncode == 0
    assert [(row["step"], row["ok"]) for row in rows] == [("kit", None), ("load", None), ("speed", None)]
    assert "make gpu-kit" in rows[0]["value"] and rows[1]["value"] == "left out: no time left"


def test_a_wrong_step_ends_with_status_1(tmp_path) -> None:
    result, rows = check_gpu(tmp_path, "--kit", tmp_path / "none", "--steps", "load", PEFT_D2_BACKEND="nonsense")
    assert result.returncode == 1
    assert any(row["ok"] is False and row["step"] == "load" for row in rows)
