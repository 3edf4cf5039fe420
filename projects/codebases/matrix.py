#!/usr/bin/env python3
"""Try this package in other people's Detectron2 code, and write the table of docs/codebases.md.

    projects/codebases/matrix.py --checkouts ~/code --output docs/codebases.md [--detectron2 DIR] [--only Mask2Former]

``--checkouts`` is a folder with clones under their repositories' names (``~/code/Mask2Former``, ...): what is not there
is left out. ``--detectron2`` is a folder to import another Detectron2 from than the installed one. Nothing is written
into a checkout.

Each codebase gets the lines of its diff (codebases.yaml) in a copy of its ``train_net.py``, a small data set of drawn
shapes in COCO's place, a base of random weights, and one process for each step: see probe.py.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
OFFICIAL = "MultiScaleDeformableAttention"
COLUMNS = ("imports", "step 0 exact", "trains", "save, load", "merged, strict load by their code")
SPEED = "a step of theirs: their function / our operator"
HEADER = f"| codebase, commit | Detectron2 | date | {' | '.join((*COLUMNS, SPEED))} |"
SERVE = ["from peft_d2.ops.official import serve_official", "", "serve_official()"]
ADD = ["peft_d2.register()", "peft_d2.add_config(cfg, models=False)"]
SOLVER = ["SOLVER.IMS_PER_BATCH", 2, "SOLVER.MAX_ITER", 8, "SOLVER.BASE_LR", 0.001, "SOLVER.WARMUP_ITERS", 0]
SOLVER += ["SOLVER.STEPS", "(6,)", "TEST.EVAL_PERIOD", 0, "DATALOADER.NUM_WORKERS", 0, "MODEL.DEVICE", "cpu", "SEED", 1]
SOLVER += ["SOLVER.CHECKPOINT_PERIOD", 100000, "SOLVER.AMP.ENABLED", False]


def main(arguments: list[str] | None = None) -> None:
    """Run the matrix."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkouts", required=True, type=Path, help="the folder of the clones")
    parser.add_argument("--detectron2", type=Path, help="a folder that holds another `detectron2` package")
    parser.add_argument("--build", default="installed", help="what the table calls that Detectron2")
    parser.add_argument("--only", nargs="+", default=[], help="codebases to run, by their names in codebases.yaml")
    parser.add_argument("--output", type=Path, help="the page whose tables are renewed: rows of others stay")
    parser.add_argument("--keep", type=Path, help="work there and keep it, to look at")
    args = parser.parse_args(arguments)
    for name, entry in codebases().items():
        if (args.only and name not in args.only) or not (args.checkouts / entry["folder"]).is_dir():
            continue
        with tempfile.TemporaryDirectory() as folder:
            place = Path(args.keep or folder, entry["folder"])
            place.mkdir(parents=True, exist_ok=True)
            row = Row(entry, args.checkouts.resolve(), place.resolve(), args.detectron2)
            cells = dict(row.cells())
        print(name, cells, flush=True)
        if args.output:
            told = [f"[{name}]({entry['url']}) `{row.commit()}`", args.build, datetime.date.today().isoformat()]
            write_row(args.output, [*told, *(cells.get(column, "-") for column in (*COLUMNS, SPEED))])


def write_row(page: Path, cells: list[str]) -> None:
    """Put a row into the page's table, in the place of the one of that codebase and build."""
    lines = page.read_text().splitlines()
    first = lines.index(HEADER) + 2
    last = next((i for i in range(first, len(lines)) if not lines[i].startswith("|")), len(lines))
    name, build = cells[0].partition("]")[0], cells[1]
    kept = [x for x in lines[first:last] if not (x.startswith(f"| {name}]") and x.split(" | ")[1] == build)]
    lines[first:last] = sorted([*kept, f"| {' | '.join(cells)} |"], key=str.lower)
    page.write_text("\n".join(lines) + "\n")


def codebases() -> dict[str, dict[str, Any]]:
    """The entries of codebases.yaml, with their defaults."""
    defaults = {
        "needs": [],
        "script": "",
        "config": "",
        "not_run": "",
        "adders": [],
        "empty": [],
        "shorten": {},
        "unseen": [],
        "names_of": "",
        "serve": False,
        "opts": [],
    }
    entries = yaml.safe_load((HERE / "codebases.yaml").read_text())
    return {name: {"folder": name, **defaults, **entry} for name, entry in entries.items()}


def diff(name: str) -> str:
    """What a codebase's users write, as the page has it: the lines for their ``train_net.py``, and their yaml."""
    entry = codebases()[name]
    above = ["import peft_d2", *(SERVE if entry["serve"] else ())]
    lines = [f"```diff\n{entry['script']}, above their imports:", *(f"+{line}".rstrip() for line in above)]
    lines += ["in setup(args), above cfg.merge_from_file(args.config_file):", *(f"+    {line}" for line in ADD), "```"]
    method = {"NAME": "lora", "TARGETS": entry["peft"]["TARGETS"], "RANK": 8, "ALPHA": 8.0}
    peft = {"META_ARCHITECTURE": entry["architecture"], "METHODS": [method], "TRAIN": entry["peft"]["TRAIN"]}
    tree = {"_BASE_": Path(entry["config"]).name, "MODEL": {"META_ARCHITECTURE": "PEFTModel", "PEFT": peft}}
    lines += ["", "```yaml", yaml.safe_dump(tree, sort_keys=False, width=110).rstrip(), "```", ""]
    adders = " ".join(f"--import {adder}" for adder in entry["adders"])
    return "\n".join([f"## {name}", "", *lines, f"`take_adapter.py` takes `{adders}`.", ""])


def patched(script: str, serve: bool) -> str:
    """Their ``train_net.py`` with our lines: ``import peft_d2`` before their imports, two before the config is read."""
    lines = script.splitlines()
    first = next(i for i, line in enumerate(lines) if re.match(r"(import|from|try)\b", line))
    read = next(i for i, line in enumerate(lines) if "cfg.merge_from_file(args.config_file)" in line)
    indent = re.match(r"\s*", lines[read])[0]
    lines[read:read] = [indent + line for line in ADD]
    lines[first:first] = ["import peft_d2", *(SERVE if serve else ())]
    return "\n".join(lines) + "\n"


class Row:
    """A codebase's row: writes what the stages need into ``place``, runs them in order, stops at the first failure."""

    def __init__(self, entry: dict[str, Any], checkouts: Path, place: Path, detectron2: Path | None) -> None:
        self.entry, self.place = entry, place
        self.checkout = checkouts / entry["folder"]
        paths = [detectron2, self.checkout, *(checkouts / other for other in entry["needs"]), ROOT]
        self.environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(Path(path).resolve()) for path in paths if path),
            "DETECTRON2_DATASETS": str(place / "datasets"),
            **{
                "PYTHONDONTWRITEBYTECODE": "1",
                "OMP_NUM_THREADS": "1",
                "CUDA_VISIBLE_DEVICES": "",
                "WANDB_MODE": "disabled",
            },
        }
        script = self.checkout / entry["script"]
        opts = [*SOLVER, *entry["opts"], "MODEL.WEIGHTS", place / "base.pth", "OUTPUT_DIR", place / "run"]
        self.job = {
            **{
                "not_run": entry["not_run"],
                "import": entry["import"],
                "serve": entry["serve"],
                "empty": entry["empty"],
                "shorten": entry["shorten"],
                "unseen": entry["unseen"],
                "names_of": entry["names_of"],
                "folder": str(place),
            },
            **{"config": str(self.checkout / entry["config"]), "peft_config": str(place / "peft.yaml")},
            **{"script": str(place / "patched_train_net.py"), "plain_script": str(script)},
            **{"take": str(ROOT / "tools" / "take_adapter.py"), "adders": entry["adders"]},
            **{"opts": list(map(str, opts)), "fallback": [OFFICIAL] if entry["serve"] else []},
        }

    def cells(self) -> Iterator[tuple[str, str]]:
        """(column, what it says), up to the first that fails."""
        said = ""
        for columns, step in self.STEPS:
            try:
                said = step(self)
            except Failure as error:
                imported = "RESULT imported" in error.stdout or len(columns) == 1
                yield from [(columns[0], "yes")] if imported and len(columns) > 1 else []
                yield columns[-1 if imported else 0], str(error) if str(error).startswith("not run") else f"no: {error}"
                return
            for column in columns:
                yield column, f"yes{said}" if column == columns[-1] else "yes"
        if self.entry["serve"]:
            try:
                yield SPEED, self._probe("speed")
            except Failure as error:
                yield SPEED, f"no: {error}"

    def commit(self) -> str:
        """The checkout's commit, ten digits of it."""
        told = subprocess.run(["git", "-C", self.checkout, "rev-parse", "HEAD"], capture_output=True, text=True)
        return told.stdout.strip()[:10] or "commit not known"

    def _step0(self) -> str:
        if self.entry["not_run"]:
            return self._probe("step0")
        script = Path(self.job["plain_script"]).read_text()
        Path(self.job["script"]).write_text(patched(script, self.entry["serve"]))
        method = {"NAME": "lora", "TARGETS": self.entry["peft"]["TARGETS"], "RANK": 4, "ALPHA": 8.0}
        peft = {
            "META_ARCHITECTURE": self.entry["architecture"],
            "METHODS": [method],
            "TRAIN": self.entry["peft"]["TRAIN"],
        }
        config = {"_BASE_": self.job["config"], "MODEL": {"META_ARCHITECTURE": "PEFTModel", "PEFT": peft}}
        Path(self.job["peft_config"]).write_text(yaml.safe_dump(config))
        return self._probe("step0")

    def _train(self) -> str:
        return f", {self._probe('train')} of the parameters"

    def _save(self) -> str:
        return self._probe("saved")

    def _strict(self) -> str:
        return f", outputs within {self._probe('strict')}"

    STEPS = ((COLUMNS[:2], _step0), (COLUMNS[2:3], _train), (COLUMNS[3:4], _save), (COLUMNS[4:], _strict))

    def _probe(self, stage: str) -> str:
        return self._run(sys.executable, HERE / "probe.py", stage, json.dumps(self.job))

    def _run(self, *command: object) -> str:
        done = subprocess.run(
            list(map(str, command)),
            cwd=self.checkout,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=1800,
        )
        (self.place / "log.txt").open("a").write(f"$ {command}\n{done.stdout}{done.stderr}\n")
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["no output"])[-1][:300].replace("|", "/")
            failure = Failure(re.sub(r" \(/[^)]*\)", "", said))  # where a module lies on this machine
            failure.stdout = done.stdout
            raise failure
        return (done.stdout.strip().splitlines() or [""])[-1].partition("RESULT ")[2]


class Failure(Exception):
    """A step that did not work, with the last line that it said."""

    stdout = ""


if __name__ == "__main__":
    main()
