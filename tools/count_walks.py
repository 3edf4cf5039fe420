#!/usr/bin/env python
"""Count the files of the package that a reader passes on the walks of the design, and the package's lines.

    tools/count_walks.py

Each walk is run for real on a tiny model (tests/engine/tiny.yaml). Counted is each file of the package of which a
function is called on it, once, in this process and its threads; what importing a file runs is not. Left out is
what has a walk of its own:

- train step: tools/train_net.py until the first ``optimizer.step``, without models, data, evaluation, peft, storage,
  adapters.py and ops.
- inject, save, load: ``peft_d2.inject``, ``save_adapter`` and ``load_adapter`` with LoRA on two target modules, whole.
- picture to loss: ``build_train_loader(cfg)``, the first batch of a COCO set that is not registered yet, and
  Mask2Former's losses of it, without the backbone and ops. It includes registration and the mapper's augmentation.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "peft_d2"
TINY = ROOT / "tests" / "engine" / "tiny.yaml"
METHODS = "[{'NAME': 'lora', 'RANK': 2, 'TARGETS': ['qkv', 'self_attn.value_proj']}]"
AIMS = {"train step": 12, "inject": 5, "save": 4, "load": 4, "picture to loss": 12}


class Walk:
    """Notes the package's files whose functions are called inside a ``with`` block.

    Args:
        without: folders or files below the package that are not counted.
        until: the walk ends where this function is called first.
    """

    def __init__(self, *without: str, until: Callable[..., Any] | None = None) -> None:
        self.files: dict[str, None] = {}
        self._without = tuple(str(PACKAGE / part) for part in without)
        self._until = getattr(until, "__code__", None)
        self._ended = False

    def _note(self, frame: FrameType, event: str, argument: Any) -> None:
        if event != "call" or self._ended:
            return
        self._ended = frame.f_code is self._until
        path = frame.f_code.co_filename
        inside = path.startswith(str(PACKAGE)) and not path.startswith(self._without or ("-",))
        if inside and frame.f_code.co_name != "<module>":
            self.files[str(Path(path).relative_to(ROOT))] = None

    def __enter__(self) -> Walk:
        sys.setprofile(self._note)
        threading.setprofile(self._note)
        return self

    def __exit__(self, *error: object) -> None:
        sys.setprofile(None)
        threading.setprofile(None)


def walks(folder: Path) -> dict[str, Walk]:
    """Take each walk once."""
    import runpy

    import toy
    from detectron2.modeling import build_model

    import peft_d2
    import peft_d2.engine.trainer  # before the walk: what importing runs is no part of it
    from peft_d2.engine.config import load_config
    from peft_d2.engine.factory import register

    register()
    torch.manual_seed(0)
    data = toy.generate(folder / "toy", sorted(toy.DOMAINS)[0], images=4, seed=0, size=64)
    found = {}

    base = build_model(load_config(str(TINY), opts=["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3"]).cfg)
    torch.save({"model": base.state_dict()}, folder / "base.pth")
    command = ["--config-file", TINY, "--train-json", data.json, "--train-images", data.images]
    command += ["OUTPUT_DIR", folder / "run", "SOLVER.MAX_ITER", 1, "MODEL.WEIGHTS", folder / "base.pth"]
    command += ["MODEL.PEFT.METHODS", METHODS, "MODEL.PEFT.PROVE_LIVE", False]
    sys.argv = [str(ROOT / "tools" / "train_net.py"), *map(str, command)]
    without = ("models", "data", "evaluation", "peft", "storage", "adapters.py", "ops")
    with Walk(*without, until=torch.optim.AdamW.step) as found["train step"]:
        runpy.run_path(sys.argv[0], run_name="__main__")

    methods = [{"NAME": "lora", "RANK": 2, "TARGETS": ["qkv", "self_attn.value_proj"]}]
    model, other = (build_model(load_config(str(TINY)).cfg) for _ in range(2))
    other.load_state_dict(model.state_dict())
    with Walk() as found["inject"]:
        peft_d2.inject(model, methods)
    with Walk() as found["save"]:
        peft_d2.save_adapter(model, folder / "adapter")
    peft_d2.inject(other, methods)
    with Walk() as found["load"]:
        peft_d2.load_adapter(other, folder / "adapter")

    from peft_d2.data.loader import build_train_loader

    cfg = load_config(str(TINY)).cfg
    cfg.DATASETS.REGISTER = [{"NAME": "walked", "JSON": str(data.json), "IMAGES": str(data.images)}]
    cfg.DATASETS.TRAIN = ("walked",)
    plain = build_model(cfg).train()
    with Walk("models/backbones", "ops") as found["picture to loss"]:
        plain(next(iter(build_train_loader(cfg))))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", action="store_true", help="list the files of each walk")
    args = parser.parse_args()
    logging.disable(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        found = walks(Path(folder))
    print("| walk | files | at most |\n|---|---:|---:|")
    for name, walk in found.items():
        print(f"| {name} | {len(walk.files)} | {AIMS[name]} |")
    sources = sorted(PACKAGE.rglob("*.py"))
    print(f"\n{sum(len(p.read_text().splitlines()) for p in sources):,} lines of Python in {len(sources)} files.")
    for name, walk in found.items() if args.files else ():
        print(f"\n{name}:\n" + "\n".join(f"  {file}" for file in walk.files))


if __name__ == "__main__":
    main()
