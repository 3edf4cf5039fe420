"""One stage of a codebase's row, in a process of its own: see matrix.py, which starts it with a JSON of what to do."""

from __future__ import annotations

import importlib
import importlib.util
import json
import runpy
import statistics
import sys
import time
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn


def main() -> None:
    """Run ``probe.py STAGE JSON``; a stage that fails raises."""
    stage, job = sys.argv[1], json.loads(sys.argv[2])
    torch.set_num_threads(1)
    sys.path.append(str(Path(__file__).resolve().parents[2] / "tools"))
    for name in job["empty"]:
        sys.modules[name] = types.ModuleType(name)
    print("RESULT", STAGES[stage](job) or "")


def step0(job: dict[str, Any]) -> None:
    """The injected model computes what their model computes, bit for bit; writes ``base.pth``."""
    _import(job)
    print("RESULT imported", flush=True)
    if job["not_run"]:
        sys.exit(f"not run: {job['not_run']}")
    plain = _build(job, job["config"])
    torch.save({"model": plain.state_dict()}, job["folder"] + "/base.pth")
    expected, found = _outputs(plain, job), _outputs(_build(job, job["peft_config"]), job)
    wrong = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert not wrong, f"{len(wrong)} of {len(expected)} outputs differ at step 0, from {wrong[0]} on"


def train(job: dict[str, Any]) -> str:
    """Their ``train_net.py`` with the lines of the diff, as a program: loader, optimizer, hooks, evaluation are theirs.

    Everything that is trained has moved then, and the base has not; returns what share of the parameters that is.
    """
    _draw(Path(job["folder"], "datasets", "coco"))
    _import(job)
    sys.argv = [job["script"], "--config-file", job["peft_config"], "--num-gpus", "1", *job["opts"]]
    try:
        runpy.run_path(job["script"], run_name="__main__")
    except SystemExit as left:
        assert not left.code, f"exit status {left.code}"
    state = torch.load(job["folder"] + "/run/model_final.pth", weights_only=False)["model"]
    model = _build(job, job["peft_config"])
    start, own = model.state_dict(), {name for name, value in model.named_parameters() if value.requires_grad}
    moved = {name for name in start if not torch.equal(start[name], state[name])}
    counters = {name for name in start if name.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert own <= moved, f"did not move: {sorted(own - moved)[:3]}"
    assert moved <= own | counters, f"moved, and is not trained: {sorted(moved - own - counters)[:3]}"
    return f"{sum(start[n].numel() for n in own) / sum(x.numel() for x in model.parameters()):.1%}"


def saved(job: dict[str, Any]) -> None:
    """The adapter that ``tools/take_adapter.py`` takes out of their checkpoint computes what the trained model does.

    Writes ``trained.pt``.
    """
    import peft_d2

    folder = job["folder"]
    sys.argv = [
        job["take"],
        "--config-file",
        f"{folder}/run/config.yaml",
        "--checkpoint",
        f"{folder}/run/model_final.pth",
    ]
    sys.argv += [x for name in job["adders"] for x in ("--import", name)]
    sys.argv += ["--adapter", f"{folder}/adapter", "--merged", f"{folder}/merged.pth"]
    runpy.run_path(job["take"], run_name="__main__")
    model = _build(job, job["peft_config"])
    peft_d2.load_trained(model, job["folder"] + "/run/model_final.pth")
    expected = _outputs(model, job)
    found = _outputs(_build(job, job["peft_config"], "MODEL.PEFT.WEIGHTS", job["folder"] + "/adapter"), job)
    wrong = [name for name in expected if not torch.equal(expected[name], found[name])]
    assert not wrong, f"{len(wrong)} of {len(expected)} outputs differ after loading, from {wrong[0]} on"
    torch.save(expected, job["folder"] + "/trained.pt")


def speed(job: dict[str, Any]) -> str:
    """Training steps at 256 px, with our operator and with the pure-torch function that their code has, in turns."""
    opts = ["INPUT.IMAGE_SIZE", "256", "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS", "6"]
    program, cfg = _setup(job, job["config"], *opts)
    model = _build(job, job["config"], *opts).train()
    batch = next(iter(program.Trainer.build_train_loader(cfg)))
    served: Any = importlib.import_module("MultiScaleDeformableAttention")
    ours, seconds, losses = served.ms_deform_attn_forward, ([], []), [0.0, 0.0]
    for _ in range(4):
        for which in (0, 1):
            vars(served).pop("ms_deform_attn_forward", None)
            if which:
                served.ms_deform_attn_forward = ours
            torch.manual_seed(4)
            model.zero_grad()
            start = time.process_time()
            loss = sum(model(batch).values())
            loss.backward()
            seconds[which].append(time.process_time() - start)
            losses[which] = losses[which] or loss.item()
    theirs, own = (statistics.median(x[1:]) for x in seconds)
    return f"{theirs:.2f} s / {own:.2f} s = {theirs / own:.1f}, loss within {abs(losses[1] / losses[0] - 1):.0e}"


def strict(job: dict[str, Any]) -> str:
    """Their own code, without this package, takes the merged checkpoint and config; returns the largest deviation."""
    for name in job["fallback"]:
        sys.modules[name] = types.ModuleType(name)  # their own pure-torch function runs
    model = _build(job, job["folder"] + "/merged.yaml", pairs=False)
    model.load_state_dict(torch.load(job["folder"] + "/merged.pth", weights_only=True)["model"], strict=True)
    assert "peft_d2" not in sys.modules
    expected, found, worst = torch.load(job["folder"] + "/trained.pt"), _outputs(model, job), 0.0
    for name in found:
        if expected[name].shape == found[name].shape and expected[name].numel():
            scale = expected[name].double().abs().max().clamp_min(1e-6)
            worst = max(worst, float((expected[name].double() - found[name].double()).abs().max() / scale))
    return f"{worst:.0e}"


STAGES = {stage.__name__: stage for stage in (step0, train, saved, speed, strict)}


def _import(job: dict[str, Any]) -> None:
    """Import their package as the diff does, and shorten what would take hours on a CPU."""
    if job["serve"]:
        from peft_d2.ops.official import serve_official

        serve_official()
    importlib.import_module(job["import"])
    _shorten(job)


def _shorten(job: dict[str, Any]) -> None:
    for where, count in job["shorten"].items():
        module, _, name = where.partition(":")
        items = getattr(importlib.import_module(module), name)
        for values in items.values() if isinstance(items, dict) else [items]:
            del values[count:]


def _draw(root: Path) -> None:
    """Four pictures of shapes each for training and validation, where and how Detectron2 expects COCO's."""
    import toy
    from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

    (root / "annotations").mkdir(parents=True, exist_ok=True)
    for seed, split in enumerate(("train2017", "val2017")):
        made = toy.generate(root / split, "night", 4, seed=seed)
        data = json.loads(made.json.read_text())
        data["categories"] = [{"id": x["id"], "name": x["name"]} for x in COCO_CATEGORIES if x["isthing"]]
        for name in ("instances", "panoptic2instances"):
            (root / "annotations" / f"{name}_{split}.json").write_text(json.dumps(data))
        for image in made.images.iterdir():
            Image.open(image).save(root / split / f"{image.stem}.jpg", quality=95)  # of panoptic and semantic sets
            image.rename(root / split / image.name)
        _draw_regions(root, split, data)


def _draw_regions(root: Path, split: str, data: dict[str, Any]) -> None:
    """The same objects as a panoptic and as two semantic sets: a label image each, where their registrations look."""
    from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES

    from peft_d2.data.segmentation import segmentation_to_mask

    number = {row["id"]: i for i, row in enumerate(COCO_CATEGORIES)}
    folders = [
        root / f"panoptic_{split}",
        root / f"panoptic_semseg_{split}",
        root / "stuffthingmaps_detectron2" / split,
    ]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    records = []
    for image in data["images"]:
        rows = [row for row in data["annotations"] if row["image_id"] == image["id"]]
        ids = np.zeros((image["height"], image["width"], 3), dtype=np.uint8)
        classes = np.full(ids.shape[:2], 255, dtype=np.uint8)
        for i, row in enumerate(rows, 1):
            mask = segmentation_to_mask(row["segmentation"], image["height"], image["width"])
            ids[mask], classes[mask] = (i, 0, 0), number[row["category_id"]]
        segments = [{**row, "id": i} for i, row in enumerate(rows, 1)]
        records.append({"image_id": image["id"], "file_name": image["file_name"], "segments_info": segments})
        for folder, labels in zip(folders, (ids, classes, classes), strict=True):
            Image.fromarray(labels).save(folder / image["file_name"])
    panoptic = {"images": data["images"], "annotations": records, "categories": COCO_CATEGORIES}
    (root / "annotations" / f"panoptic_{split}.json").write_text(json.dumps(panoptic))


def _build(job: dict[str, Any], config: str, *opts: str, pairs: bool = True) -> nn.Module:
    """The model as their own program builds it: its ``setup`` reads the config."""
    from detectron2.modeling import build_model

    cfg = _setup(job, config, *opts, pairs=pairs)[1]
    torch.manual_seed(1)
    return build_model(cfg)


def _setup(job: dict[str, Any], config: str, *opts: str, pairs: bool = True) -> tuple[Any, Any]:
    """Their program as a module (with our lines where ``pairs``), and the config that it reads."""
    program = sys.modules.get("their_program")
    if program is None:
        spec = importlib.util.spec_from_file_location("their_program", job["script" if pairs else "plain_script"])
        assert spec is not None and spec.loader is not None
        program = sys.modules["their_program"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(program)
        _shorten(job)
    from detectron2.engine import default_argument_parser

    given = [*(job["opts"] if pairs else ()), *opts, "OUTPUT_DIR", job["folder"] + "/probe"]
    return program, program.setup(default_argument_parser().parse_args(["--config-file", config, *given]))


@torch.no_grad()
def _outputs(model: nn.Module, job: dict[str, Any]) -> dict[str, Tensor]:
    """What each module of a model gives for one picture, in evaluation mode, by its name and the number of its call.

    The modules below those that the job calls ``unseen`` (text encoders) are left out, for their size.
    """
    taken: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if name.startswith(tuple(job["unseen"])):
            continue

        def take(_: nn.Module, __: Any, output: Any, name: str = name) -> None:
            for value in _tensors(output):
                count = sum(key.startswith(f"{name}#") for key in taken)
                taken[f"{name}#{count}"] = value.detach().clone()

        module.register_forward_hook(take)
    picture = torch.randint(0, 256, (3, 128, 160), generator=torch.Generator().manual_seed(2)).float()
    torch.manual_seed(3)
    sample = {"image": picture, "height": 128, "width": 160}
    model.eval()([{**sample, "task": "The task is instance", "meta": {"dataset_name": job["names_of"]}}])
    return taken


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [x for item in value.values() for x in _tensors(item)]
    if isinstance(value, (list, tuple)):
        return [x for item in value for x in _tensors(item)]
    if hasattr(value, "get_fields"):
        return _tensors(value.get_fields())
    return _tensors(value.tensor) if hasattr(value, "tensor") and isinstance(value.tensor, Tensor) else []


if __name__ == "__main__":
    main()
