"""What is measured of PEFT configs, and that nothing is kept for the backward pass before it is needed."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import analyze_peft as analysis
import pytest
import torch
from torch import nn

import peft_d2
from peft_d2 import ops
from peft_d2.engine.config import load_config
from peft_d2.engine.factory import build_model
from peft_d2.memory import SavedTensors

ROOT = Path(__file__).parents[2]
TINY = Path(__file__).parents[1] / "engine" / "tiny.yaml"
LAST_STAGE = "[{'NAME': 'lora', 'RANK': 2, 'TARGETS': ['backbone.layers.3.blocks.*.attn.qkv']}]"
DECODER = "[{'NAME': 'lora', 'RANK': 2, 'TARGETS': ['predictor.*.multihead_attn']}]"
ENCODER = "[{'NAME': 'adapter', 'NUM': 2, 'TARGETS': ['sem_seg_head.pixel_decoder.*.self_attn']}]"
FULL = ["MODEL.PEFT.TRAIN", "['*']"]


def saved_on_the_way(opts: list[str], modules: tuple[str, ...]) -> tuple[dict[str, int], SavedTensors]:
    """Tensors that autograd has saved by the end of each module's forward, and the counter after the whole one."""
    peft_d2.register()
    model = build_model(load_config(str(TINY), opts=opts).cfg).train()
    saved = SavedTensors(model)
    counts: dict[str, int] = {}
    for name in modules:
        hook = lambda *_, name=name: counts.__setitem__(name, saved.count)  # noqa: E731
        model.get_submodule(name).register_forward_hook(hook)
    with saved:
        model([analysis.random_sample(64, 7)])
    return counts, saved


@pytest.mark.parametrize(
    ("opts", "free"),
    [
        (["MODEL.PEFT.METHODS", LAST_STAGE], ("backbone.layers.2",)),
        (["MODEL.PEFT.METHODS", ENCODER], ("backbone",)),
        (["MODEL.PEFT.METHODS", DECODER], ("backbone", "sem_seg_head.pixel_decoder.mask_features")),
        (["MODEL.PEFT.TRAIN", "['predictor.mask_embed']"], ("backbone", "sem_seg_head.pixel_decoder.mask_features")),
    ],
    ids=["last stage", "encoder", "decoder", "head"],
)
def test_nothing_is_saved_in_front_of_the_first_trained_part(opts: list[str], free: tuple[str, ...]) -> None:
    counts, saved = saved_on_the_way(opts, free)
    assert counts == dict.fromkeys(free, 0)
    full_counts, full = saved_on_the_way(FULL, free)
    assert all(count > 0 for count in full_counts.values())
    assert 0 < saved.count < full.count and 0 < saved.bytes < full.bytes


def test_a_storage_counts_once_and_weights_do_not() -> None:
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.ReLU())
    with SavedTensors(model) as saved:
        model(torch.ones(2, 4))
    assert saved.bytes == 2 * (2 * 4 * 4)  # the input of the product, the output of the rectifier
    with SavedTensors(model) as saved, torch.no_grad():
        model(torch.ones(2, 4))
    assert (saved.count, saved.bytes) == (0, 0)


def test_the_tool(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lora = ROOT / "configs" / "peft" / "mask2former" / "lora.yaml"
    numbers = ["--size", "64", "--rounds", "1", "--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
    start = time.perf_counter()
    analysis.main(["--config-file", str(TINY), "--peft-config", str(lora), "--budget", "4", *numbers])
    took = time.perf_counter() - start
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines] == ["", "---", "full fine-tuning", "lora", "lora, 4 GiB"]
    content = json.loads((tmp_path / "a.json").read_text())
    full, adapted, fitted = content["cases"]
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert adapted["planned_memory"] is None and 0 < fitted["planned_memory"] < 4 * 2**30
    assert fitted["trainable"] == adapted["trainable"]
    assert content["run"]["size"] == 64 and content["run"]["operator"] == ops.default_backend("cpu")
    assert full["percent"] == 100.0 and adapted["percent"] < 10
    assert adapted["file_size"] < 0.2 * full["file_size"]
    assert adapted["saved_bytes"] < full["saved_bytes"]
    times = [case[key] for case in (full, adapted) for key in ("step_time", "inference_time")]
    assert all(0 < seconds < took for seconds in [*times, adapted["merged_time"]]) and adapted["twin_time"] is None
    assert all(case["saved_bytes"] < case["peak_memory"] < 64 * 2**30 for case in (full, adapted))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--rounds", "0"], "argument --rounds: 0 is not at least 1"),
        (["--peft-config", "nowhere.yaml"], "nowhere.yaml' does not exist"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        analysis.main(["--config-file", str(TINY), "--size", "64", *arguments])
    assert f"error: {message}" in capsys.readouterr().err.replace("config file '", "")


@pytest.mark.parametrize("name", ["coco", "rcnn"])
def test_random_samples_train_both_kinds_of_models(name: str) -> None:
    from detectron2 import model_zoo
    from detectron2.utils.events import EventStorage

    zoo = model_zoo.get_config_file("COCO-InstanceSegmentation/mask_rcnn_R_50_FPN_1x.yaml")
    small = ["MODEL.RESNETS.DEPTH", "18", "MODEL.RESNETS.RES2_OUT_CHANNELS", "64", "MODEL.DEVICE", "cpu"]
    small += ["MODEL.ROI_BOX_HEAD.FC_DIM", "32"]
    cfg = load_config(str(TINY)).cfg if name == "coco" else load_config(zoo, opts=small).cfg
    model = build_model(cfg).train()
    with EventStorage(0):
        losses = model([analysis.random_sample(64, 3)])
    assert all(torch.isfinite(loss) for loss in losses.values()) and any("mask" in key for key in losses)


def test_each_case_beside_the_operators_twin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PEFT_D2_BACKEND", "torch")
    numbers = ["--size", "64", "--rounds", "1", "--twin", "--json", str(tmp_path / "a.json")]
    start = time.perf_counter()
    analysis.main(["--config-file", str(TINY), *numbers])
    took = time.perf_counter() - start
    header, _, full = capsys.readouterr().out.splitlines()
    assert header.split("|")[-2].strip().startswith("step with the twin") and full.split("|")[-2].strip().endswith("x)")
    (case,) = json.loads((tmp_path / "a.json").read_text())["cases"]
    assert 0 < case["twin_time"] < took and os.environ["PEFT_D2_BACKEND"] == "torch"


def test_the_twins_process_runs_the_twin() -> None:
    args = analysis.analysis_parser().parse_args(["--config-file", str(TINY), "--size", "64", "--twin"])
    with analysis.Peer("full", "", args) as peer:
        assert peer.twin is not None
        assert (peer.ask("operator"), peer.twin.ask("operator")) == (ops.default_backend("cpu"), "torch")
