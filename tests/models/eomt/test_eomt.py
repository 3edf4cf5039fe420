"""EoMT: encoders, masks and their annealing, every method on it, both published forms, messages."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from detectron2.utils.events import EventStorage

import peft_d2
from peft_d2 import adapters, peft
from peft_d2.engine.config import load_config
from peft_d2.engine.factory import build_without_weights
from peft_d2.models.checks import ModelConfigError
from peft_d2.models.eomt.model import window_starts
from peft_d2.models.eomt.names import with_own_names

from ..conftest import ROOT
from ..test_training import sample, step
from .conftest import CLASSES, QUERIES, SIDE

KINDS = pytest.mark.parametrize("kind", ["dinov2", "dinov3"])
RECIPES = sorted(path.stem for path in (ROOT / "configs" / "peft" / "eomt").glob("*.yaml"))


def recipe(name: str) -> tuple[list[Any], list[str]]:
    node = load_config(
        str(ROOT / "configs/eomt/coco/instance_dinov2_small_640.yaml"), str(ROOT / f"configs/peft/eomt/{name}.yaml")
    )
    return [dict(method) for method in node.cfg.MODEL.PEFT.METHODS], list(node.cfg.MODEL.PEFT.TRAIN)


@KINDS
@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_starts_at_the_model_and_is_live(eomt: Any, kind: str, name: str) -> None:
    methods, train = recipe(name)
    if name == "conv_lora":
        methods[0]["EXPERTS"] = 2
    if name == "last_blocks":
        methods[0]["NUM"] = 2
    model = eomt(kind).eval()
    batch = [sample("tensor", 3, (SIDE, SIDE)), sample("tensor", 1, (48, SIDE))]
    with torch.no_grad():
        before = model(batch)
        peft_d2.inject(model, methods, train=train)
        after = model(batch)
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one["sem_seg"], other["sem_seg"], rtol=1e-5, atol=1e-5)
    peft.prove_live(model, batch)
    encoder = {name for name, p in model.backbone.named_parameters() if p.requires_grad}
    assert bool(encoder) == (name != "head")
    losses = step(model, batch)
    assert set(losses) == set(model.criterion.weight_dict) and len(losses) == 9


@KINDS
def test_split_and_fused_attention_take_the_same_lora(eomt: Any, kind: str, tmp_path: Any) -> None:
    """LoRA on a fused qkv is called, not read; the same checkpoint fits both forms."""
    fused = eomt(kind).eval()
    batch = [sample("tensor", 2, (SIDE, SIDE))]
    if kind == "dinov3":
        torch.nn.init.normal_(fused.backbone.net.blocks[1].attn.q_bias)
        published = {f"network.encoder.backbone.{n}": v for n, v in fused.backbone.net.state_dict().items()}
        names = {"q.weight": "query_feat.weight", "attn_mask_probs": "query_feat.attn_mask_probs"}
        names |= {f"class_head.{leaf}": f"class_embed.{leaf}" for leaf in ("weight", "bias")}
        names |= {f"mask_head.{i}.{leaf}": f"mask_embed.{i}.{leaf}" for i in (0, 2, 4) for leaf in ("weight", "bias")}
        head = fused.sem_seg_head.state_dict()
        names |= {name: name for name in head if name.startswith("upscale")}
        published |= {f"network.{theirs}": head[own] for theirs, own in names.items()}
        torch.save({"state_dict": published}, tmp_path / "lightning.ckpt")
        split = eomt(kind, more=", qkv_fused: false").eval()
        report = adapters.load_base(split, tmp_path / "lightning.ckpt")
        assert report.initial == ["criterion.empty_weight"] and not report.reinitialised, report
        with torch.no_grad():
            torch.testing.assert_close(split(batch)[0]["sem_seg"], fused(batch)[0]["sem_seg"], rtol=1e-4, atol=1e-5)
        assert peft_d2.inject(split, [{**recipe("lora")[0][0], "RANK": 2}]).trainable == 4 * 2 * 4 * (48 + 48)
        peft.prove_live(split, batch)
    report = peft_d2.inject(fused, [{**recipe("lora")[0][0], "RANK": 2}])
    assert report.trainable == 4 * 2 * ((48 + 3 * 48) + (48 + 48))
    peft.prove_live(fused, batch)


def test_published_names_of_the_authors_dinov3(eomt: Any, tmp_path: Any) -> None:
    """Their encoder there is transformers' ViT within timm's words; the published file is a difference to DINOv3."""
    model = eomt("dinov3")
    own = model.state_dict()
    state = {}
    for name, value in own.items():
        name = name.replace("sem_seg_head.query_feat.attn_mask_probs", "attn_mask_probs")
        for new, old in (
            ("sem_seg_head.query_feat", "q"), ("sem_seg_head.class_embed", "class_head"),
            ("sem_seg_head.mask_embed", "mask_head"), ("sem_seg_head.upscale", "upscale"),
            ("backbone.net.cls_token", "encoder.backbone.patch_embed.cls_token"),
            ("backbone.net.reg_token", "encoder.backbone.patch_embed.register_tokens"),
            ("backbone.net.patch_embed.proj", "encoder.backbone.patch_embed.patch_embeddings"),
            ("backbone.net", "encoder.backbone"), (".attn.proj", ".attention.o_proj"),
            (".gamma_1", ".layer_scale1.lambda1"),
            (".gamma_2", ".layer_scale2.lambda1"), (".fc1", ".up_proj"), (".fc2", ".down_proj"),
            (".attn.q_bias", ".attention.q_proj.bias"), (".attn.v_bias", ".attention.v_proj.bias"),
        ):  # fmt: skip
            name = name.replace(new, old)
        if name.endswith("attn.qkv.weight"):
            parts = zip("qkv", value.chunk(3), strict=True)
            state |= {name.replace("attn.qkv", f"attention.{part}_proj"): piece for part, piece in parts}
        elif "criterion" not in name:
            state[name] = value
    found = with_own_names(state, own.keys())
    assert found.keys() == {name for name in own if "criterion" not in name}
    assert all(torch.equal(found[name], own[name]) for name in found)

    base = {name: torch.randn_like(value) for name, value in model.backbone.net.state_dict().items()}
    torch.save(base, tmp_path / "dinov3.pth")
    torch.save({f"network.{name}": value for name, value in state.items()}, tmp_path / "delta.pth")
    with_delta = eomt("dinov3", {"MODEL.TIMM.WEIGHTS": str(tmp_path / "dinov3.pth"), "MODEL.EOMT.DELTA": True})
    for _ in range(2):  # a checkpointer loads it a second time
        adapters.load_base(with_delta, tmp_path / "delta.pth")
        for name, value in with_delta.state_dict().items():
            other = base.get(name.removeprefix("backbone.net."), 0)
            torch.testing.assert_close(value, own[name] + other)


@KINDS
def test_masks_confine_queries_alone(eomt: Any, kind: str) -> None:
    head = eomt(kind).sem_seg_head.eval()
    masks = torch.randn(2, QUERIES, 16, 16)
    allowed = head.attention_mask(masks, (4, 4), QUERIES + 5 + 16, torch.tensor(1.0))
    assert allowed.shape == (2, 1, QUERIES + 21, QUERIES + 21)
    assert allowed[:, 0, QUERIES:].all() and allowed[:, 0, :, : QUERIES + 5].all()
    inside = torch.nn.functional.interpolate(masks, size=(4, 4), mode="bilinear").flatten(2) > 0
    assert torch.equal(allowed[:, 0, :QUERIES, -16:], inside)
    head.train()
    torch.manual_seed(0)
    free = head.attention_mask(-masks.abs().repeat(250, 1, 1, 1), (4, 4), QUERIES + 21, torch.tensor(0.3))
    share = free[:, 0, :QUERIES, -16:].all(-1).float().mean().item()
    assert share == pytest.approx(0.7, abs=0.03)


@KINDS
def test_half_precision(eomt: Any, kind: str) -> None:
    model = eomt(kind)
    peft_d2.inject(model, *recipe("lora"))
    batch = [sample("tensor", 3, (SIDE, SIDE))]
    exact = sum(loss.item() for loss in step(model, batch).values())
    with torch.autocast("cpu", torch.bfloat16):
        losses = step(model, batch)
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    assert sum(loss.item() for loss in losses.values()) == pytest.approx(exact, rel=0.1)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)


def test_annealing_follows_the_training_and_stays_with_the_queries(eomt: Any, tmp_path: Any) -> None:
    keys = {"MODEL.EOMT.ANNEALING_START": [0.25, 0.5], "MODEL.EOMT.ANNEALING_END": [0.5, 1.0], "SOLVER.MAX_ITER": 100}
    model = eomt("dinov2", {**keys, "SOLVER.POLY_LR_POWER": 0.9})
    queries, batch = model.sem_seg_head.query_feat, [sample("tensor", 2, (SIDE, SIDE))]
    found = []
    for iteration in (0, 30, 60, 99):
        with EventStorage(iteration):
            model.train()(copy.deepcopy(batch))
        found.append(queries.attn_mask_probs.tolist())
    expected = [[1, 1], [0.8**0.9, 1], [0, 0.8**0.9], [0, 0.02**0.9]]
    assert found == [pytest.approx(row, abs=1e-5) for row in expected]
    model(copy.deepcopy(batch))  # without a storage they stay
    assert queries.attn_mask_probs.tolist() == pytest.approx(expected[-1], abs=1e-5)

    frozen = eomt("dinov2", keys)
    peft_d2.inject(frozen, [], train=["sem_seg_head.class_embed"])
    with EventStorage(60):
        frozen.train()(copy.deepcopy(batch))
    assert frozen.sem_seg_head.query_feat.attn_mask_probs.tolist() == [1, 1]

    base = eomt("dinov2", keys)
    torch.save(base.state_dict(), tmp_path / "base.pth")
    peft_d2.inject(base, [], train=["sem_seg_head"])
    with EventStorage(60):
        base.train()(copy.deepcopy(batch))
    peft_d2.save_adapter(base, tmp_path / "adapter")
    again = eomt("dinov2", keys)
    again.load_state_dict(torch.load(tmp_path / "base.pth", weights_only=True))
    adapters.load_adapter(again, tmp_path / "adapter")
    assert again.sem_seg_head.query_feat.attn_mask_probs.tolist() == pytest.approx(expected[2], abs=1e-5)


def test_windows_cover_an_image_evenly() -> None:
    assert [window_starts(length, 512) for length in (300, 512, 513, 1024, 1300)] == [
        [0],
        [0],
        [0, 1],
        [0, 512],
        [0, 394, 788],
    ]


@pytest.mark.parametrize("size", [(SIDE, 150), (150, SIDE), (40, 50)])
def test_windows_of_one_image(eomt: Any, size: tuple[int, int]) -> None:
    """Each pixel has the mean of the maps of the windows that see it."""
    whole = eomt("dinov2").eval()
    model = eomt("dinov2", {"MODEL.EOMT.WINDOW": SIDE}).eval()
    item = sample("sem_seg", 2, size)
    with torch.no_grad():
        [found] = model([item])
        starts = [window_starts(side, SIDE) for side in size]
        total, count = torch.zeros(CLASSES, *size), torch.zeros(size)
        for y in starts[0]:
            for x in starts[1]:
                part = {"image": item["image"][:, y : y + SIDE, x : x + SIDE]}
                total[:, y : y + SIDE, x : x + SIDE] += whole([part])[0]["sem_seg"]
                count[y : y + SIDE, x : x + SIDE] += 1
    torch.testing.assert_close(found["sem_seg"], total / count, rtol=1e-5, atol=1e-6)
    [small] = model([{**item, "height": 20, "width": 30}])
    assert small["sem_seg"].shape == (CLASSES, 20, 30)


@KINDS
def test_images_of_any_size_and_bgr(eomt: Any, kind: str) -> None:
    rgb = eomt(kind, {"MODEL.MASK_FORMER.SIZE_DIVISIBILITY": -1}).eval()
    keys = {
        "INPUT.FORMAT": "BGR",
        "MODEL.PIXEL_MEAN": [103.53, 116.28, 123.675],
        "MODEL.PIXEL_STD": [57.375, 57.12, 58.395],
    }
    bgr = eomt(kind, {"MODEL.MASK_FORMER.SIZE_DIVISIBILITY": -1, **keys}).eval()
    bgr.load_state_dict(rgb.state_dict())
    image = sample("tensor", 1, (50, 90))["image"]
    with torch.no_grad():
        [one], [other] = rgb([{"image": image}]), bgr([{"image": image.flip(0)}])
    assert one["sem_seg"].shape == (CLASSES, 50, 90)
    torch.testing.assert_close(one["sem_seg"], other["sem_seg"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"MODEL.TIMM.NAME": "resnet18", "MODEL.TIMM.KWARGS": ""}, "MODEL.TIMM.NAME is 'resnet18'.*a plain ViT"),
        ({"MODEL.MASK_FORMER.DEC_LAYERS": 9}, "MODEL.MASK_FORMER.DEC_LAYERS is 9.*2 to 5"),
        ({"MODEL.MASK_FORMER.DEC_LAYERS": 1}, "MODEL.MASK_FORMER.DEC_LAYERS is 1"),
        ({"MODEL.EOMT.ANNEALING_START": [0.1]}, "MODEL.EOMT.ANNEALING_START is .*2 shares"),
        ({"MODEL.EOMT.ANNEALING_END": [0.1, 0.2]}, "MODEL.EOMT.ANNEALING_END is .*2 shares"),
        ({"MODEL.EOMT.WINDOW": 64, "MODEL.MASK_FORMER.TEST.INSTANCE_ON": True}, "MODEL.EOMT.WINDOW is 64.*instances"),
        ({"MODEL.EOMT.DELTA": True}, "MODEL.TIMM.WEIGHTS is ''.*DELTA"),
    ],
)
def test_bad_values_are_named(eomt: Any, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelConfigError, match=message):
        eomt("dinov2", keys)


@pytest.mark.parametrize(
    "file", sorted(str(p.relative_to(ROOT)) for p in (ROOT / "configs/eomt").glob("*/*_large_*.yaml"))
)
def test_configs_build(file: str) -> None:
    peft_d2.register()
    cfg = load_config(str(ROOT / file)).cfg
    model = build_without_weights(cfg)
    assert type(model).__name__ == "EoMT" and model.size_divisibility == int(file[:-5].rpartition("_")[2])
    assert len(model.backbone.joint_blocks) == len(cfg.MODEL.EOMT.ANNEALING_START) == 4
    assert (model.window > 0) == ("semantic" in file)
