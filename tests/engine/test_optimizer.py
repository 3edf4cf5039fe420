"""Learning rates and weight decay of each parameter, clipping, schedules, scaling with the batch."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from torch import nn

from peft_d2 import peft
from peft_d2.engine.config import load_config
from peft_d2.engine.errors import ConfigError
from peft_d2.engine.optimizer import build_lr_scheduler, build_optimizer, scale_learning_rate

from ..models.conftest import ROOT, SMALL_EOMT


def rates(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[float, float]]:
    """Parameter name -> (learning rate / BASE_LR, weight decay)."""
    found = {
        id(p): (group["lr"] / 0.001, group["weight_decay"]) for group in optimizer.param_groups for p in group["params"]
    }
    return {name: found[id(p)] for name, p in model.named_parameters() if id(p) in found}


def test_mask2former_rules(make_cfg: Callable[..., Any]) -> None:
    cfg = make_cfg("SOLVER.WEIGHT_DECAY_NORM", 0.01)
    model = build_model(cfg)
    found = rates(model, build_optimizer(cfg, model))
    assert len(found) == len(list(model.parameters()))
    norms = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, (nn.LayerNorm, nn.GroupNorm))}
    assert norms and norms <= found.keys()
    for name, (rate, decay) in found.items():
        assert rate == pytest.approx(0.1 if name.startswith("backbone.") else 1.0), name
        if name in norms:
            assert decay == 0.01, name
    assert found["sem_seg_head.predictor.query_feat.weight"][1] == 0.0
    assert found["sem_seg_head.predictor.class_embed.weight"][1] == 0.05
    tables = [decay for name, (_, decay) in found.items() if name.endswith("relative_position_bias_table")]
    assert tables and set(tables) == {0.0}


@pytest.mark.parametrize("decay", [None, 0.0001, 0.0])
def test_biases_decay_as_it_is_set(make_cfg: Callable[..., Any], decay: float | None) -> None:
    """0.0001 is what Detectron2 0.5 has by default, None what later ones have: Mask2Former's rule holds."""
    cfg = make_cfg("SOLVER.WEIGHT_DECAY_NORM", 0.01)
    cfg.SOLVER.WEIGHT_DECAY_BIAS = decay
    if decay == 0.0001 and get_cfg().SOLVER.WEIGHT_DECAY_BIAS is None:
        pytest.skip("there it is a value of one's own")
    model = build_model(cfg)
    found = rates(model, build_optimizer(cfg, model))
    assert found["sem_seg_head.predictor.class_embed.bias"][1] == (0.0 if decay == 0 else 0.05)
    assert found["backbone.norm3.bias"][1] == (0.0 if decay == 0 else 0.01)
    assert found["sem_seg_head.predictor.class_embed.weight"][1] == 0.05


def test_rates_of_injected_and_fully_trained_parts(make_cfg: Callable[..., Any]) -> None:
    """The factor for everything named backbone does not reach what is injected there."""
    cfg = make_cfg("MODEL.PEFT.LR_FACTOR", 3.0, "MODEL.PEFT.TRAIN_LR_FACTOR", 0.5, peft=True)
    cfg.MODEL.PEFT.TRAIN = [*cfg.MODEL.PEFT.TRAIN, "backbone.norm3"]
    model = build_model(cfg)
    found = rates(model, build_optimizer(cfg, model))
    kinds = {t.name: t.kind for t in peft.trained_parameters(model)}
    by_id = {id(t.param): t.kind for t in peft.trained_parameters(model)}
    named = {name: by_id[id(p)] for name, p in model.named_parameters() if p.requires_grad}
    assert set(named) == set(found) and set(kinds.values()) == {"injected", "full"}
    for name, kind in named.items():
        expected = 3.0 if kind == "injected" else 0.05 if name.startswith("backbone.norm3") else 0.5
        assert found[name][0] == pytest.approx(expected), name
    assert any(name.startswith("backbone.") and kind == "injected" for name, kind in named.items())


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("kind", ["full_model", "norm", "value"])
def test_clipping(make_cfg: Callable[..., Any], kind: str, scaled: bool) -> None:
    """A scaler of float16's gradients leaves it to fused kernels to take its scale off, after the clipping."""
    cfg = make_cfg("SOLVER.OPTIMIZER", "SGD", "SOLVER.MOMENTUM", 0.0, "SOLVER.WEIGHT_DECAY", 0.0, "SOLVER.BASE_LR", 1.0)
    cfg.SOLVER.CLIP_GRADIENTS.CLIP_TYPE, cfg.SOLVER.CLIP_GRADIENTS.CLIP_VALUE = kind, 0.5
    model = nn.Sequential(nn.Linear(3, 1, bias=False), nn.Linear(4, 1, bias=False))
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = build_optimizer(cfg, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, enabled=scaled)
    scaler.scale(torch.ones(()))
    for p in model.parameters():
        p.grad = torch.full_like(p, 2.0 * scaler.get_scale())
    scaler.step(optimizer)
    steps = [(b - p).detach().flatten() for b, p in zip(before, model.parameters(), strict=True)]
    measured = {
        "full_model": torch.cat(steps).norm(),
        "norm": torch.stack([s.norm() for s in steps]),
        "value": torch.cat(steps).abs(),
    }[kind]
    torch.testing.assert_close(measured, torch.full_like(measured, 0.5))


@pytest.mark.parametrize(("key", "value"), [("SOLVER.OPTIMIZER", "ADAM"), ("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", "all")])
def test_unknown_names(make_cfg: Callable[..., Any], key: str, value: str) -> None:
    with pytest.raises(ConfigError, match=f"{key} is '{value}'; expected"):
        build_optimizer(make_cfg(key, value), nn.Linear(2, 2))


def test_nothing_to_train(make_cfg: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="no parameter is trained"):
        build_optimizer(make_cfg(), nn.Linear(2, 2).requires_grad_(False))


def test_the_rate_scales_with_the_batch(make_cfg: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    cfg = make_cfg("SOLVER.REFERENCE_IMS", 16, "SOLVER.IMS_PER_BATCH", 4)
    cfg.freeze()
    caplog.clear()
    with caplog.at_level(logging.INFO, "peft_d2"):
        scale_learning_rate(cfg)
        scale_learning_rate(cfg)
    assert cfg.SOLVER.BASE_LR == pytest.approx(0.00025) and cfg.is_frozen()
    assert [r.getMessage() for r in caplog.records] == [
        "Learning rate 0.001, chosen for batches of 16 images, becomes 0.00025 for 4."
    ]


@pytest.mark.parametrize(
    ("opts", "rate"),
    [
        ([], 0.002),
        (["SOLVER.IMS_PER_BATCH", "4"], 0.0005),
        (["SOLVER.IMS_PER_BATCH", "4", "SOLVER.BASE_LR", "0.002"], 0.002),
        (["SOLVER.IMS_PER_BATCH", "4", "SOLVER.REFERENCE_IMS", "8"], 0.001),
    ],
)
def test_a_batch_on_the_command_line_scales_the_files_rate(tmp_path: Path, opts: list[str], rate: float) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("SOLVER: {IMS_PER_BATCH: 16, BASE_LR: 0.002}\n")
    cfg = load_config(str(path), opts=opts).cfg
    scale_learning_rate(cfg)
    assert cfg.SOLVER.BASE_LR == pytest.approx(rate)


def test_rates_by_name(make_cfg: Callable[..., Any]) -> None:
    cfg = make_cfg("MODEL.PEFT.LR_FACTOR", 3.0, "MODEL.PEFT.TRAIN_LR_FACTOR", 0.5, peft=True)
    model = build_model(cfg)
    before = rates(model, build_optimizer(cfg, model))
    cfg.MODEL.PEFT.LR_FACTORS = [
        {"PARAMETERS": "*.lora_b", "FACTOR": 16.0},
        {"PARAMETERS": "*lora*", "FACTOR": 0.25},
        {"PARAMETERS": "*.class_embed.bias", "FACTOR": 2},
    ]
    after = rates(model, build_optimizer(cfg, model))
    assert after.keys() == before.keys()
    for name, (rate, decay) in after.items():
        factor = 16 if name.endswith("lora_b") else 0.25 if "lora" in name else 2 if "class_embed.bias" in name else 1
        assert (rate, decay) == (pytest.approx(factor * before[name][0]), before[name][1]), name


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"PARAMETERS": "*cobot*", "FACTOR": 2.0}, "no trained parameter is called '\\*cobot\\*'"),
        (
            {"PARAMETERS": "backbone.patch_embed.*", "FACTOR": 2.0},
            "no trained parameter is called 'backbone.patch_embed",
        ),
        ({"PARAMETERS": "*", "FACTOR": -1}, "FACTOR of '\\*' is -1; expected 0 or more"),
        ({"PARAMETER": "*", "FACTOR": 1.0}, "is not of the form"),
        ("*", "'\\*' is not of the form"),
    ],
)
def test_rates_by_name_that_make_no_sense(make_cfg: Callable[..., Any], entry: Any, said: str) -> None:
    cfg = make_cfg(peft=True)
    model = build_model(cfg)
    cfg.MODEL.PEFT.LR_FACTORS = [entry]
    with pytest.raises(ConfigError, match=said):
        build_optimizer(cfg, model)


def test_poly_schedule_equals_detectron2_deeplab(make_cfg: Callable[..., Any]) -> None:
    deeplab = pytest.importorskip("detectron2.projects.deeplab.lr_scheduler")
    cfg = make_cfg("SOLVER.MAX_ITER", 20, "SOLVER.WARMUP_ITERS", 4, "SOLVER.POLY_LR_CONSTANT_ENDING", 0.2)
    ours, theirs = (torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0) for _ in range(2))
    schedule = build_lr_scheduler(cfg, ours)
    reference = deeplab.WarmupPolyLR(theirs, 20, warmup_factor=0.001, warmup_iters=4, power=0.9, constant_ending=0.2)
    for _ in range(20):
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-6)
        for optimizer, scheduler in ((ours, schedule), (theirs, reference)):
            optimizer.step()
            scheduler.step()


EOMT = ROOT / "configs" / "eomt" / "coco" / "instance_dinov2_small_640.yaml"


def eomt(make_cfg: Callable[..., Any], *opts: Any) -> tuple[Any, nn.Module]:
    """A config and a model of four blocks, of which two see the queries."""
    pytest.importorskip("timm", reason="needs timm, of the test extra")
    pairs = [part for item in SMALL_EOMT.items() if "NUM_CLASSES" not in item[0] for part in item]
    cfg = make_cfg(*pairs, "SOLVER.BASE_LR", 0.001, *opts, config=EOMT)
    return cfg, build_model(cfg)


@pytest.mark.parametrize(("spared", "blocks"), [(0, [0.512, 0.64, 0.8, 1.0]), (2, [0.512, 0.64, 1.0, 1.0])])
def test_layer_decay_as_eomt_is_trained(make_cfg: Callable[..., Any], spared: int, blocks: list[float]) -> None:
    cfg, model = eomt(make_cfg, "SOLVER.LAYER_DECAY_SPARED", spared)
    found = rates(model, build_optimizer(cfg, model))
    assert found.keys() == {name for name, _ in model.named_parameters()}
    for name, (rate, decay) in found.items():
        block = re.match(r"backbone\.net\.blocks\.(\d)", name)
        before = re.match(r"backbone\.net\.(cls|reg|pos|patch)", name)
        expected = blocks[int(block[1])] if block else 0.512 if before else 1.0
        assert (rate, decay) == (pytest.approx(expected), 0.05), name


def test_layer_decay_of_stages_and_of_what_is_injected(make_cfg: Callable[..., Any]) -> None:
    """The tiny Swin's stages are a block each; what is between two of them goes with the second, injected parts learn
    at one rate."""
    keys = ("SOLVER.LAYER_DECAY", 0.5, "SOLVER.LAYER_DECAY_BLOCKS", "backbone.layers.*.blocks.*")
    cfg = make_cfg(*keys, "SOLVER.BACKBONE_MULTIPLIER", 1.0)
    model = build_model(cfg)
    count = sum(cfg.MODEL.SWIN.DEPTHS)
    found = rates(model, build_optimizer(cfg, model))
    assert found["backbone.patch_embed.proj.weight"][0] == found["backbone.layers.0.blocks.0.mlp.fc1.weight"][0]
    assert found["backbone.layers.0.blocks.0.mlp.fc1.weight"][0] == pytest.approx(0.5 ** (count - 1))
    last = cfg.MODEL.SWIN.DEPTHS[-1]
    assert found["backbone.layers.2.downsample.reduction.weight"][0] == pytest.approx(0.5 ** (last - 1))
    assert found["backbone.layers.3.blocks.0.attn.qkv.weight"][0] == pytest.approx(0.5 ** (last - 1))
    assert found["backbone.norm3.weight"][0] == found["sem_seg_head.predictor.class_embed.weight"][0] == 1.0
    cfg = make_cfg(*keys, peft=True)
    cfg.MODEL.PEFT.TRAIN = [*cfg.MODEL.PEFT.TRAIN, "backbone.patch_embed"]
    model = build_model(cfg)
    found = rates(model, build_optimizer(cfg, model))
    injected = {found[name][0] for name in found if "lora" in name and name.startswith("backbone.")}
    assert injected == {1.0} and found["backbone.patch_embed.proj.weight"][0] == pytest.approx(0.1 * 0.5 ** (count - 1))


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        (("SOLVER.LAYER_DECAY_BLOCKS", "backbone.stages.*"), "LAYER_DECAY_BLOCKS: pattern 'backbone.stages.*' matches"),
        (("SOLVER.LAYER_DECAY_SPARED", 5), "LAYER_DECAY_SPARED is 5, but .* are 4 blocks"),
    ],
)
def test_layer_decay_that_makes_no_sense(make_cfg: Callable[..., Any], keys: tuple[Any, ...], said: str) -> None:
    cfg, model = eomt(make_cfg, *keys)
    with pytest.raises(ConfigError, match=said):
        build_optimizer(cfg, model)


def test_a_backbone_starts_after_the_rest(make_cfg: Callable[..., Any]) -> None:
    """Rates at steps, computed by hand: 0.25 ** 0.9 is 0.287175."""
    stages = ("SOLVER.WARMUP_ITERS", 4, "SOLVER.BACKBONE_WARMUP_ITERS", 2, "SOLVER.MAX_ITER", 20)
    cfg, model = eomt(make_cfg, *stages, "SOLVER.LAYER_DECAY", 1.0)
    optimizer = build_optimizer(cfg, model)
    schedule = build_lr_scheduler(cfg, optimizer)
    head, encoder = "sem_seg_head.class_embed.weight", "backbone.net.norm.weight"
    seen: list[list[float]] = []
    for _ in range(21):
        found = rates(model, optimizer)
        seen.append([found[head][0], found[encoder][0]])
        optimizer.step()
        schedule.step()
    expected = {0: [0, 0], 1: [0.25, 0], 4: [1, 0], 5: [(15 / 16) ** 0.9, 0.5], 6: [(14 / 16) ** 0.9, 1]}
    expected |= {16: [0.287175, (4 / 14) ** 0.9], 20: [0, 0]}
    for step, pair in expected.items():
        assert seen[step] == pytest.approx(pair, abs=1e-6), step
    cfg.SOLVER.MAX_ITER = 4
    with pytest.raises(ConfigError, match="MAX_ITER 4 ends before .* backbone starts .* WARMUP_ITERS 4"):
        build_lr_scheduler(cfg, optimizer)
    build_lr_scheduler(cfg, build_optimizer(cfg, model.sem_seg_head))


@pytest.mark.parametrize("name", ["WarmupMultiStepLR", "WarmupCosineLR"])
def test_detectron2_schedules(make_cfg: Callable[..., Any], name: str) -> None:
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1.0)
    schedule = build_lr_scheduler(make_cfg("SOLVER.LR_SCHEDULER_NAME", name, "SOLVER.STEPS", "(3,)"), optimizer)
    seen = []
    for _ in range(6):
        seen.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert seen[0] < seen[2] and seen[5] < seen[2]


@pytest.mark.parametrize("name", ["ADAMW", "SGD"])
def test_fused_kernels_of_the_cpu_take_the_same_steps(make_cfg: Callable[..., Any], name: str) -> None:
    cfg = make_cfg("SOLVER.OPTIMIZER", name, "SOLVER.MOMENTUM", 0.9)
    models = [build_model(cfg) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    fused, plain = (build_optimizer(cfg, model) for model in models)
    assert all(group["fused"] for group in fused.param_groups)
    for group in plain.param_groups:
        group["fused"] = None
    for _ in range(3):
        for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        fused.step()
        plain.step()
    for one, other in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
