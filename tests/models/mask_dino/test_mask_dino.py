"""Mask DINO equals the published implementation; its configs and the published ones build; bad values are named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from peft_d2.engine.config import load_config
from peft_d2.engine.factory import build_without_weights
from peft_d2.models import register

from ..conftest import GOLDENS, R50_DINO, ROOT, SWIN_L_DINO, build_published
from ..mask2former.test_golden import TOLERANCE, rows

WHOLE = {"r50": R50_DINO, "r50_3s": "mask_dino/coco/instance_r50_3s.yaml", "swin_l": SWIN_L_DINO}


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
    model = build(R50_DINO, recipe["config_overrides"]).eval()
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


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"MODEL.SEM_SEG_HEAD.FEATURE_ORDER": "up"}, "FEATURE_ORDER is 'up'"),
        ({"MODEL.SEM_SEG_HEAD.TOTAL_NUM_FEATURE_LEVELS": 2}, "TOTAL_NUM_FEATURE_LEVELS is 2"),
        ({"MODEL.MaskDINO.DN": "all"}, "DN is 'all'"),
        ({"MODEL.MaskDINO.TWO_STAGE": False}, "needs TWO_STAGE"),
        ({"MODEL.MaskDINO.DEC_LAYERS": 0}, "DEC_LAYERS is 0"),
        ({"MODEL.MaskDINO.NUM_OBJECT_QUERIES": 0}, "NUM_OBJECT_QUERIES is 0"),
        ({"MODEL.MaskDINO.TRAIN_NUM_POINTS": 0}, "TRAIN_NUM_POINTS is 0"),
        ({"MODEL.MaskDINO.DN_NUM": -1}, "DN_NUM is -1"),
        ({"MODEL.MaskDINO.HIDDEN_DIM": 30}, "multiple of 4"),
        ({"MODEL.MaskDINO.PANO_BOX_LOSS": True, "DATASETS.TRAIN": ()}, "needs the thing classes"),
    ],
)
def test_bad_values_are_named(small_dino: Any, overrides: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        small_dino(overrides)


def test_published_yaml_runs_as_it_is(tmp_path: Path) -> None:
    """Names and keys as in the published files."""
    model = build_published(UPSTREAM_STYLE, tmp_path)
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
