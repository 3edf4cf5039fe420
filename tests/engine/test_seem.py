"""SEEM through the same trainer, processes, evaluation, adapter files and merging as every other model."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import demo
import pytest
import torch
import torch.nn.functional as F
from detectron2.data import MetadataCatalog
from detectron2.modeling import build_model
from merge_adapter import merge_adapter, merge_parser

from peft_d2 import adapters
from peft_d2.engine.errors import is_expected
from peft_d2.models.seem.vocabulary import ClassVectors, ClassVectorsError

from .test_mask_dino import methods_of
from .test_processes import BATCH, assert_two_equal_one, steps_of
from .test_training import StopAfter, assert_equal, train, trained

CONFIG = Path(__file__).with_name("tiny_seem.yaml")


@pytest.fixture
def seem_cfg(make_cfg: Callable[..., Any], tmp_path: Path) -> Callable[..., Any]:
    """``seem_cfg(*opts, templates=..., output=...)``: with a base's weights, and vectors of the toy set's classes."""

    def make(*opts: Any, templates: int = 3, **options: Any) -> Any:
        cfg = make_cfg(*opts, config=CONFIG, **options)
        names = tuple(MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).thing_classes)
        drawn = torch.randn(templates, len(names) + 1, 16, generator=torch.Generator().manual_seed(2))
        sentences = tuple(f"{{}}, {i}" for i in range(templates))
        ClassVectors(names, F.normalize(drawn, dim=-1), sentences).write(tmp_path / "vectors.safetensors")
        cfg.MODEL.SEEM.CLASS_VECTORS = str(tmp_path / "vectors.safetensors")
        cfg.MODEL.WEIGHTS = str(tmp_path / "base.pth")
        if not Path(cfg.MODEL.WEIGHTS).exists():
            plain = make_cfg(config=CONFIG)
            torch.manual_seed(3)
            torch.save({"model": build_model(plain).state_dict()}, cfg.MODEL.WEIGHTS)
        return cfg

    return make


@pytest.mark.parametrize("file", ["seem/adapters3.yaml", "seem/lora.yaml"])
def test_train_evaluate_store_load_and_merge(seem_cfg: Callable[..., Any], tmp_path: Path, file: str) -> None:
    trainer = train(seem_cfg(*methods_of(file), "TEST.EVAL_PERIOD", 6))  # proves first that every part is live
    rows = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert {"segm/AP", "bbox/AP", "loss_mask_0", "total_loss"} <= set().union(*rows)
    model = trainer.model.eval()
    image = {"image": torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)}
    with torch.no_grad():
        expected = model([image])[0]["instances"]
    fresh = build_model(seem_cfg()).eval()
    base = torch.load(tmp_path / "base.pth", weights_only=True)["model"]
    fresh.load_state_dict(base)
    adapters.load_adapter(fresh, tmp_path / "adapter_final")
    assert_equal(trained(trainer), {name: p for name, p in fresh.named_parameters() if p.requires_grad})
    with torch.no_grad():
        torch.testing.assert_close(fresh([image])[0]["instances"].scores, expected.scores, rtol=0, atol=1e-6)
    if "lora" not in file:
        return
    # What is merged is a published checkpoint again: every name in its order, what is parked bit by bit.
    (tmp_path / "config.yaml").write_text(seem_cfg().dump())
    arguments = ["--config-file", tmp_path / "config.yaml", "--adapter", tmp_path / "adapter_final"]
    merge_adapter(merge_parser().parse_args([str(a) for a in (*arguments, "--output", tmp_path / "merged.pth")]))
    merged = torch.load(tmp_path / "merged.pth", weights_only=True)
    merged = merged.get("model", merged)
    assert list(merged) == list(base)
    words = ("lang_encoder", "spatial", "sptial", "pn_indicator", "dilation_kernel")
    parked = [name for name in base if any(word in name for word in words)]
    assert len(parked) == 18 + 6 + 1 and all(torch.equal(merged[name], base[name]) for name in parked)
    plain = build_model(seem_cfg()).eval()
    plain.load_state_dict(merged)
    with torch.no_grad():
        torch.testing.assert_close(plain([image])[0]["instances"].scores, expected.scores, rtol=1e-4, atol=1e-5)


def test_a_stopped_run_continues_with_the_same_templates(seem_cfg: Callable[..., Any], tmp_path: Path) -> None:
    options = (*methods_of("seem/lora.yaml"), "SEED", 5)
    whole = trained(train(seem_cfg(*options, output=tmp_path / "whole")))
    stopped = seem_cfg(*options, output=tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        train(stopped, StopAfter(4))
    assert_equal(whole, trained(train(stopped, resume=True)))


def test_two_processes_equal_one(seem_cfg: Callable[..., Any], tmp_path: Path) -> None:
    """With one template: processes draw theirs by themselves, as published. The second step is made NaN."""
    options = (*BATCH, *methods_of("seem/adapters1.yaml"))
    one = steps_of(seem_cfg(*options, "SOLVER.MAX_ITER", 1, templates=1, output=tmp_path / "one"))
    cfg = seem_cfg(*options, templates=1, output=tmp_path / "two")
    assert_two_equal_one(one, cfg, tmp_path)


def test_other_classes_in_the_demo(seem_cfg: Callable[..., Any], toy_set: Any) -> None:
    """Two names, in another order than the data set's: predictions are of them, and drawn under them."""
    plain = seem_cfg()
    names = [str(name) for name in MetadataCatalog.get(plain.DATASETS.TRAIN[0]).thing_classes]
    picture = sorted(Path(toy_set.images).iterdir())[0]
    first, second = demo.Predictor(plain), demo.Predictor(seem_cfg("MODEL.SEEM.CLASS_NAMES", [names[1], names[0]]))
    assert first.metadata.thing_classes == names and second.metadata.thing_classes == [names[1], names[0]]
    assert set(second(picture)[1]["instances"].pred_classes.tolist()) == {0, 1}
    cfg = seem_cfg("MODEL.SEEM.CLASS_NAMES", ["unheard of"])
    with pytest.raises(ClassVectorsError, match="no vectors of the classes 'unheard of', only of"):
        demo.Predictor(cfg)
    assert is_expected(ClassVectorsError("of another kind"))
