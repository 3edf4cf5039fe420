"""Mask DINO: equal to the published implementation; options, training and results of a small model; PEFT counts."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from torch import Tensor, nn

from peft_d2 import peft
from peft_d2.engine.config import load_config
from peft_d2.engine.targets import build_without_weights, describe, inspect_parser
from peft_d2.models import add_models_config, denoising, register
from peft_d2.models.targets import Target

from .conftest import GOLDENS, ROOT
from .test_golden import TOLERANCE, rows
from .test_training import sample, step

SMALL = {
    "MODEL.WEIGHTS": "",
    "MODEL.RESNETS.DEPTH": 18,
    "MODEL.RESNETS.RES2_OUT_CHANNELS": 64,
    "MODEL.RESNETS.NORM": "GN",
    "MODEL.SEM_SEG_HEAD.CONVS_DIM": 32,
    "MODEL.SEM_SEG_HEAD.MASK_DIM": 32,
    "MODEL.SEM_SEG_HEAD.DIM_FEEDFORWARD": 32,
    "MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS": 1,
    "MODEL.SEM_SEG_HEAD.NUM_CLASSES": 4,
    "MODEL.MaskDINO.HIDDEN_DIM": 32,
    "MODEL.MaskDINO.DIM_FEEDFORWARD": 32,
    "MODEL.MaskDINO.NHEADS": 4,
    "MODEL.MaskDINO.DEC_LAYERS": 2,
    "MODEL.MaskDINO.NUM_OBJECT_QUERIES": 8,
    "MODEL.MaskDINO.TRAIN_NUM_POINTS": 64,
    "MODEL.MaskDINO.DN_NUM": 7,
}
R50, SWIN_L = "mask_dino/coco/instance_r50.yaml", "mask_dino/coco/instance_swin_l.yaml"
WHOLE = {"r50": R50, "r50_3s": "mask_dino/coco/instance_r50_3s.yaml", "swin_l": SWIN_L}


@pytest.fixture
def small_dino(build: Any) -> Any:
    """``small_dino(overrides, config)``."""

    def run(overrides: dict[str, Any] | None = None, config: str = R50) -> nn.Module:
        torch.manual_seed(0)
        return build(config, {**SMALL, **(overrides or {})})

    return run


def on_meta(build: Any, config: str) -> nn.Module:
    with torch.device("meta"):
        return build(config, {"MODEL.DEVICE": "meta"})


@pytest.mark.parametrize("name", WHOLE)
def test_state_dict_of_the_whole_model(build: Any, golden: Any, name: str) -> None:
    expected = golden("maskdino_full_keys")[name]
    model = on_meta(build, WHOLE[name])
    assert rows(model) == expected["state_dict"]
    head = model.sem_seg_head
    parts = {"total": model, "backbone": model.backbone, "pixel_decoder": head.pixel_decoder}
    parts |= {"predictor": head.predictor}
    parts |= {part: getattr(head.predictor, part) for part in ("class_embed", "mask_embed", "bbox_embed", "label_enc")}
    assert {k: sum(p.numel() for p in m.parameters()) for k, m in parts.items()} == expected["parameters"]


@pytest.fixture
def outputs(build: Any, golden: Any, filler: Any, two_threads: None) -> dict[str, Any]:
    """What the reduced model gives, by the golden's names, and its instances."""
    recipe, arrays = golden("maskdino_r50_instance"), np.load(GOLDENS / "maskdino_r50_instance.npz")
    model = build(R50, recipe["config_overrides"]).eval()
    assert filler.fill(model, skip=("criterion",)) == recipe["state_dict"]
    state = model.state_dict()
    for name in arrays.files:
        if name.startswith("override/"):
            state[name.removeprefix("override/")].copy_(torch.from_numpy(arrays[name]))
    seen: dict[str, Any] = {}
    predictor = model.sem_seg_head.predictor
    select = predictor.queries

    def keep_queries(*arguments: Any) -> Any:
        content, box_logits, chosen = select(*arguments)
        seen.update({name.replace("pred", "interm"): value for name, value in chosen.items()})
        seen["refpoints_unsigmoid"] = box_logits
        return content, box_logits, chosen

    def keep_layers(_: nn.Module, arguments: tuple, result: tuple[list[Tensor], list[Tensor]]) -> None:
        seen["hidden_last_first32"] = result[0][-1][..., :32]
        seen.update({f"reference_{i}": reference for i, reference in enumerate(result[1])})

    predictor.queries = keep_queries
    predictor.decoder.register_forward_hook(keep_layers)
    predictor.register_forward_hook(lambda module, arguments, result: seen.update(result))
    names = {"height": "requested_height", "width": "requested_width"}
    inputs = [
        {"image": filler.image(item["seed"], item["image_height"], item["image_width"])}
        | {key: item[name] for key, name in names.items()}
        for item in recipe["inputs"]
    ]
    with torch.no_grad():
        seen["instances"] = [result["instances"] for result in model(inputs)]
    return seen


def test_outputs(outputs: dict[str, Any]) -> None:
    expected = np.load(GOLDENS / "maskdino_r50_instance.npz")
    arrays = [name for name in expected.files if "/" not in name and not name.startswith("inst")]
    assert len(arrays) == 12
    for name in arrays:
        if name == "interm_masks_positive":
            np.testing.assert_array_equal(np.packbits((outputs["interm_masks"] > 0).numpy(), axis=-1), expected[name])
            continue
        np.testing.assert_allclose(outputs[name].numpy(), expected[name], rtol=0, atol=TOLERANCE, err_msg=name)
    for i, instances in enumerate(outputs["instances"]):
        found = {key.removeprefix(f"inst{i}_"): expected[key] for key in expected.files if key.startswith(f"inst{i}")}
        np.testing.assert_allclose(instances.scores.numpy(), found["scores"], rtol=0, atol=TOLERANCE)
        np.testing.assert_array_equal(instances.pred_classes.numpy(), found["classes"])
        boxes = instances.pred_boxes.tensor.numpy()  # pixels: the tolerance of 1e-4 is that of the relative boxes
        np.testing.assert_allclose(boxes, found["boxes"], rtol=0, atol=TOLERANCE * max(instances.image_size))
        masks = np.unpackbits(found["top10_masks"], axis=-1)[..., : instances.image_size[1]]
        # A pixel whose logit is within the tolerance of 0 may fall on either side.
        assert (instances.pred_masks[:10].numpy() != masks).sum() <= 3


OPTIONS: dict[str, dict[str, Any]] = {
    "published": {},
    "three maps": {"MODEL.SEM_SEG_HEAD.TOTAL_NUM_FEATURE_LEVELS": 3, "MODEL.SEM_SEG_HEAD.FEATURE_ORDER": "high2low"},
    "two coarser maps": {"MODEL.SEM_SEG_HEAD.TOTAL_NUM_FEATURE_LEVELS": 5, "MODEL.MaskDINO.INITIALIZE_BOX_TYPE": "no"},
    "four maps and one": {
        "MODEL.SEM_SEG_HEAD.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES": ["res2", "res3", "res4", "res5"],
        "MODEL.SEM_SEG_HEAD.TOTAL_NUM_FEATURE_LEVELS": 5,
        "MODEL.MaskDINO.INITIALIZE_BOX_TYPE": "bitmask",
    },
    "learned content": {"MODEL.MaskDINO.LEARN_TGT": True},
    "one stage": {"MODEL.MaskDINO.TWO_STAGE": False, "MODEL.MaskDINO.INITIALIZE_BOX_TYPE": "no"},
    "no first prediction": {"MODEL.MaskDINO.INITIAL_PRED": False, "MODEL.MaskDINO.INITIALIZE_BOX_TYPE": "no"},
    "boxes and classes denoised": {"MODEL.MaskDINO.DN": "standard"},
    "semantic, classes compete": {
        "MODEL.MaskDINO.SEMANTIC_CE_LOSS": True,
        "MODEL.MaskDINO.TEST.SEMANTIC_ON": True,
        "MODEL.MaskDINO.TEST.INSTANCE_ON": False,
    },
}


@pytest.mark.parametrize("option", OPTIONS)
def test_options_train_and_predict(small_dino: Any, option: str) -> None:
    model = small_dino(OPTIONS[option])
    inputs = [sample("bitmasks"), sample("bitmasks", 1, (48, 60))]
    losses = step(model, inputs)
    assert set(losses) == set(model.criterion.weight_dict)
    assert all(loss.isfinite() for loss in losses.values())
    assert any("_dn_0" in name for name in losses) == (option != "one stage")
    idle = {name for name, p in model.named_parameters() if p.grad is None}
    # Places are chosen and boxes start from masks: with these, the encoder's own boxes are supervised all the same.
    assert not idle and all(p.grad.isfinite().all() for p in model.parameters())
    with torch.no_grad():
        result = model.eval()(inputs)[1]
    if option.startswith("semantic"):
        assert result["sem_seg"].shape == (4, 48, 60)
    else:
        assert len(result["instances"]) == 32 and result["instances"].pred_boxes.tensor.isfinite().all()


@pytest.mark.parametrize("counts", [(0, 2), (0, 0), (8, 1)])
def test_without_denoising_queries_all_losses_stay(small_dino: Any, counts: tuple[int, int]) -> None:
    """Nothing to restore, or too much: every worker has the same losses and gradients all the same."""
    model = small_dino()
    inputs = [sample("tensor", min(count, 3)) for count in counts]
    if counts[0] == 8:
        instances = inputs[0]["instances"]
        inputs[0]["instances"] = type(instances).cat([instances] * 3)
    losses = step(model, inputs)
    assert set(losses) == set(model.criterion.weight_dict)
    denoised = sum(loss.item() for name, loss in losses.items() if "_dn" in name)
    assert (denoised == 0) == (counts != (0, 2))
    assert all(p.grad is not None for p in model.parameters())


def test_training_learns_one_image(small_dino: Any) -> None:
    model = small_dino().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inputs = [sample("bitmasks")]
    first = None
    for _ in range(12):
        losses = sum(model(copy.deepcopy(inputs)).values())
        first = first or losses.item()
        optimizer.zero_grad()
        losses.backward()
        optimizer.step()
    assert losses.item() < 0.8 * first


def test_bf16_autocast(small_dino: Any) -> None:
    model, inputs = small_dino(), [sample("bitmasks")]
    exact = sum(loss.item() for loss in step(model, inputs).values())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = step(model, inputs)
        with torch.no_grad():
            result = model.eval()(inputs)[0]["instances"]
    assert sum(loss.item() for loss in losses.values()) == pytest.approx(exact, rel=0.1)
    assert result.scores.dtype == result.pred_boxes.tensor.dtype == torch.float32


def test_results_of_all_three_tasks(small_dino: Any) -> None:
    model = small_dino({f"MODEL.MaskDINO.TEST.{task}_ON": True for task in ("SEMANTIC", "INSTANCE", "PANOPTIC")}).eval()
    model.metadata = SimpleNamespace(thing_dataset_id_to_contiguous_id={1: 0, 7: 2})
    with torch.no_grad():
        (result,) = model([{**sample("tensor"), "height": 100, "width": 120}])
    assert result["sem_seg"].shape == (4, 100, 120)
    assert result["panoptic_seg"][0].shape == (100, 120)
    assert set(result["instances"].pred_classes.tolist()) <= {0, 2}
    assert (result["instances"].scores.diff() <= 0).all()


def test_padded_boxes(small_dino: Any) -> None:
    """Published: target boxes relative to the image alone; ours on request: to the padded image, as results are."""
    from detectron2.structures import ImageList

    inputs = [sample("tensor", 1, (48, 60))]
    batch = ImageList.from_tensors([item["image"] for item in inputs], 32)
    for padded, size in ((False, (60, 48)), (True, (64, 64))):
        model = small_dino({"MODEL.SEM_SEG_HEAD.PADDED_BOXES": padded})
        (target,) = model.targets(inputs, batch)
        x0, y0, x1, y1 = 4, 6, 30, 40
        expected = torch.tensor([(x0 + x1) / 2, (y0 + y1) / 2, x1 - x0, y1 - y0]) / torch.tensor([*size, *size])
        torch.testing.assert_close(target.boxes[0], expected)


def test_denoising_queries() -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(3, 8)
    boxes = torch.tensor([[0.5, 0.5, 0.2, 0.4], [0.3, 0.6, 0.1, 0.1]])
    targets = [
        Target(torch.tensor([0, 2]), torch.zeros(2, 4, 4), boxes),
        Target(torch.tensor([1]), torch.zeros(1, 4, 4)),
    ]
    targets[1].boxes = boxes[:1]
    queries = denoising.denoising_queries(targets, embedding, 7, 0.4)
    assert queries is not None and (queries.groups, queries.group_size, len(queries)) == (3, 2, 6)
    (first, _), (second, indices) = queries.matches(targets)
    assert first.tolist() == list(range(6)) and second.tolist() == [0, 2, 4] and indices.tolist() == [0, 0, 0]
    assert not queries.content[1, [1, 3, 5]].any() and not queries.box_logits[1, [1, 3, 5]].any()
    moved = queries.box_logits[0].sigmoid() - boxes.repeat(3, 1)
    reach = torch.cat([boxes[:, 2:] / 2, boxes[:, 2:]], dim=1).repeat(3, 1) * 0.4
    assert (moved.abs() <= reach + 1e-5).all() and (moved.abs() > 0.05 * reach).float().mean() > 0.8
    blocked = queries.blocked(2)
    for i in range(8):
        for j in range(8):
            sees = i // 2 == j // 2 if j < 6 else True  # its own group, and what is matched; that sees itself alone
            assert bool(blocked[i, j]) == (not sees)
    assert denoising.denoising_queries(targets, embedding, 1, 0.4) is None
    quiet = denoising.denoising_queries(targets, embedding, 7, 0.0)
    torch.testing.assert_close(quiet.box_logits[0].sigmoid(), boxes.repeat(3, 1))
    assert torch.equal(quiet.content[0], embedding(torch.tensor([0, 2] * 3)))


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"MODEL.SEM_SEG_HEAD.FEATURE_ORDER": "up"}, "FEATURE_ORDER is 'up'"),
        ({"MODEL.SEM_SEG_HEAD.TOTAL_NUM_FEATURE_LEVELS": 2}, "TOTAL_NUM_FEATURE_LEVELS is 2"),
        ({"MODEL.MaskDINO.DN": "all"}, "DN is 'all'"),
        ({"MODEL.MaskDINO.TWO_STAGE": False}, "needs TWO_STAGE"),
        ({"MODEL.MaskDINO.DEC_LAYERS": 0}, "DEC_LAYERS is 0"),
        ({"MODEL.MaskDINO.HIDDEN_DIM": 30}, "multiple of 4"),
        ({"MODEL.MaskDINO.PANO_BOX_LOSS": True, "DATASETS.TRAIN": ()}, "needs the thing classes"),
    ],
)
def test_bad_values_are_named(small_dino: Any, overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small_dino(overrides)


HEADS = ["sem_seg_head.predictor.{class_embed,mask_embed,bbox_embed}"]
PLACES = [
    "sem_seg_head.pixel_decoder.transformer.encoder.layers.*.self_attn",
    "sem_seg_head.predictor.decoder.layers.*.{self_attn,cross_attn}",
]


def adapters(number: int, reduction: int) -> list[dict[str, Any]]:
    return [{"NAME": "adapter", "NUM": number, "REDUCTION": reduction, "TARGETS": PLACES}]


# Abou Baker et al., MAKE 6(4), 2024, table of trainable parameters: file, reduction, count, % of R50, % of Swin-L.
TABLE = [
    ("adapters1", 4, 1_144_660, 2.17, 0.51),
    ("adapters2", 4, 1_938_772, 3.61, 0.86),
    ("adapters3", 4, 2_732_884, 5.02, 1.21),
    ("adapters1", 16, 553_684, 1.06, 0.25),
    ("adapters2", 16, 756_820, 1.44, 0.34),
    ("adapters3", 16, 959_956, 1.82, 0.43),
    ("heads", None, 350_548, 0.67, 0.16),
    ("conventional", None, 28_603_092, 54.9, 12.4),
]


@pytest.mark.parametrize(("file", "reduction", "count", "r50", "swin_l"), TABLE)
def test_the_papers_parameters(file: str, reduction: int | None, count: int, r50: float, swin_l: float) -> None:
    """What tools/inspect_targets.py prints for the config files as they are, and with the other reduction."""
    method = ROOT / "configs" / "peft" / f"{file}_mask_dino.yaml"
    for config, percent in ((R50, r50), (SWIN_L, swin_l)):
        arguments = ["--config-file", str(ROOT / "configs" / config), "--peft-config", str(method)]
        if reduction == 16:
            arguments += ["MODEL.PEFT.METHODS", str(adapters(int(file[-1]), 16))]
        text = describe(inspect_parser().parse_args(arguments))
        trained, _, total, *_, printed, _ = text.splitlines()[-1].split()
        if config == R50 or file != "conventional":
            assert trained == f"{count:,}"
        assert float(printed) == pytest.approx(percent, abs=0.051 if percent > 10 else 0.00501)
        exact = 100 * int(trained.replace(",", "")) / int(total.replace(",", ""))
        assert float(printed) == pytest.approx(exact, abs=0.00501)


def test_published_yaml_runs_as_it_is(tmp_path: Path) -> None:
    """Names and keys as in the published files."""
    register(upstream_names=True)
    cfg = get_cfg()
    add_models_config(cfg)
    (tmp_path / "published.yaml").write_text(UPSTREAM_STYLE, encoding="utf-8")
    cfg.merge_from_file(str(tmp_path / "published.yaml"))
    with torch.device("meta"):
        model = build_model(cfg)
    parts = (model, model.sem_seg_head, model.sem_seg_head.pixel_decoder, model.sem_seg_head.predictor)
    assert [type(p).__name__ for p in parts] == ["MaskDINO", "MaskDINOHead", "MaskDINOEncoder", "MaskDINODecoder"]
    assert all(type(part).__module__.startswith("peft_d2.") for part in parts)
    assert not model.padded_boxes and model.sem_seg_head.predictor.query_feat is not None


UPSTREAM_STYLE = """
MODEL:
  META_ARCHITECTURE: "MaskDINO"
  DEVICE: "meta"
  BACKBONE: {NAME: "build_resnet_backbone", FREEZE_AT: 0}
  RESNETS: {STEM_TYPE: "basic", RES5_MULTI_GRID: [1, 1, 1], OUT_FEATURES: ["res2", "res3", "res4", "res5"]}
  SEM_SEG_HEAD:
    NAME: "MaskDINOHead"
    NUM_CLASSES: 19
    LOSS_WEIGHT: 1.0
    CONVS_DIM: 256
    MASK_DIM: 256
    NORM: "GN"
    PIXEL_DECODER_NAME: "MaskDINOEncoder"
    DIM_FEEDFORWARD: 1024
    NUM_FEATURE_LEVELS: 3
    TOTAL_NUM_FEATURE_LEVELS: 3
    IN_FEATURES: ["res2", "res3", "res4", "res5"]
    TRANSFORMER_ENC_LAYERS: 6
  MaskDINO:
    TRANSFORMER_DECODER_NAME: "MaskDINODecoder"
    NUM_OBJECT_QUERIES: 100
    DROPOUT: 0.0
    ENC_LAYERS: 0
    DEC_LAYERS: 9
    EVAL_FLAG: 1
    TWO_STAGE: False
    INITIALIZE_BOX_TYPE: "no"
    SEMANTIC_CE_LOSS: True
    TEST: {SEMANTIC_ON: True, OVERLAP_THRESHOLD: 0.8}
Default_loading: False
VERSION: 2
"""

FILES = sorted(str(path.relative_to(ROOT / "configs")) for path in (ROOT / "configs/mask_dino").rglob("*.yaml"))


@pytest.mark.parametrize("file", [file for file in FILES if not file.endswith("_.yaml")])
def test_every_config_builds(file: str) -> None:
    register()
    model = build_without_weights(load_config(str(ROOT / "configs" / file)).cfg)
    assert type(model).__name__ == "MaskDINO"
    levels = 5 if "swin_l" in file else 4
    if "3s" not in file:
        assert len(model.sem_seg_head.pixel_decoder.input_proj) == levels
    assert (sum(p.numel() for p in model.backbone.parameters()) > 1e8) == ("swin_l" in file)


LORA = [
    {"NAME": "lora", "RANK": 8, "ALPHA": 8, "TARGETS": [f"{place}.{{{parts}}}"]}
    for place in ("encoder.layers.*.self_attn", "decoder.layers.*.cross_attn")
    for parts in ("sampling_offsets,attention_weights,value_proj,output_proj",)
]
LORA.append({"NAME": "lora", "PARTS": ["q", "k", "v", "out"], "TARGETS": ["decoder.layers.*.self_attn"]})


@pytest.mark.parametrize("methods", [adapters(1, 4), adapters(2, 4), adapters(3, 4), LORA], ids=["1", "2", "3", "lora"])
@pytest.mark.parametrize("backbone", ["r50", "swin"])
def test_step_0_is_the_base(small_dino: Any, methods: list[dict[str, Any]], backbone: str) -> None:
    swin = {"MODEL.SWIN.EMBED_DIM": 24, "MODEL.SWIN.DEPTHS": [1, 1, 1, 1], "MODEL.SWIN.NUM_HEADS": [1, 1, 2, 2]}
    base = small_dino(swin, SWIN_L) if backbone == "swin" else small_dino()
    model = copy.deepcopy(base)
    places = len(peft.inject(model, copy.deepcopy(methods), HEADS).places)
    inputs = [sample("tensor", 2)]
    before, after = step(base.train(), inputs), step(model.train(), inputs)
    assert {name: value.item() for name, value in after.items()} == {
        name: value.item() for name, value in before.items()
    }
    assert places == (3 * 4 + 2 if methods is LORA else 5)
    trained = list(peft.trained_parameters(model))
    assert all(t.param.grad is not None for t in trained)
    with torch.no_grad():
        expected, found = (m.eval()(inputs)[0]["instances"] for m in (base, model))
    assert torch.equal(found.scores, expected.scores) and torch.equal(found.pred_masks, expected.pred_masks)
    # The perceptron that predicts boxes has many names and is trained once.
    assert len({id(t.param) for t in trained}) == len(trained)
