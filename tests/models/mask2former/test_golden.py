"""Equal to the published implementation: names, shapes and outputs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from ..conftest import GOLDENS

TOLERANCE = 1e-4


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("m2f_r50_full_keys", "coco/instance/mask2former_r50.yaml"),
        ("m2f_swin_l_full_keys", "coco/instance/mask2former_swin_l_in21k.yaml"),
    ],
)
def test_state_dict_of_the_whole_model(build: Any, golden: Any, name: str, config: str) -> None:
    expected = golden(name)
    with torch.device("meta"):
        model = build(config, {"MODEL.DEVICE": "meta"})
    assert rows(model) == expected["state_dict"]
    assert model.criterion.weight_dict == expected["criterion_weight_dict"]
    parts = {"total": model, "backbone": model.backbone, "sem_seg_head.predictor": model.sem_seg_head.predictor}
    counts = {part: sum(p.numel() for p in module.parameters()) for part, module in parts.items()}
    assert counts == {part: expected["counts"][part]["params"] for part in parts}
    persistent = {key for key, _ in model.named_buffers()} & set(model.state_dict())
    assert {key for key, _ in model.named_buffers()} - persistent == set(expected["nonpersistent_buffers"])


def rows(model: nn.Module) -> list[list[Any]]:
    state = model.state_dict().items()
    return [[name, list(value.shape), str(value.dtype).removeprefix("torch.")] for name, value in state]


@pytest.fixture
def outputs(build: Any, golden: Any, filler: Any, two_threads: None) -> dict[str, Any]:
    """What the reduced model gives, by the golden's names, and its instances."""
    recipe = golden("m2f_r50_instance")
    model = build("coco/instance/mask2former_r50.yaml", recipe["cfg_overrides"]).eval()
    assert filler.fill(model) == recipe["state_dict"]
    state = model.state_dict()
    for key, factor in recipe["post_fill_scale"].items():
        state[key].mul_(factor)
    return recorded(model, recipe, filler)


def recorded(model: nn.Module, recipe: dict[str, Any], filler: Any) -> dict[str, Any]:
    """What a model of mask classification computes for a golden's inputs, by the golden's names, and its instances."""
    inputs = [{**item, "image": filler.image(**item["image"])} for item in recipe["inputs"]]
    seen: dict[str, Any] = {}

    def keep(_: nn.Module, arguments: tuple, result: dict) -> None:
        seen.update({f"backbone.{name}": feature for name, feature in arguments[0].items()})
        for prefix, prediction in [("", result)] + [
            (f"aux_outputs.{i}.", p) for i, p in enumerate(result["aux_outputs"])
        ]:
            seen.update({f"{prefix}{name}": prediction[name] for name in ("pred_logits", "pred_masks")})

    def keep_scales(_: nn.Module, arguments: tuple) -> None:
        seen.update({f"pixel_decoder.multi_scale_features.{i}": feature for i, feature in enumerate(arguments[0])})

    model.sem_seg_head.register_forward_hook(keep)
    model.sem_seg_head.predictor.register_forward_pre_hook(keep_scales)
    with torch.no_grad():
        seen["instances"] = [result["instances"] for result in model(inputs)]
    return seen


def test_outputs(outputs: dict[str, Any]) -> None:
    expected = np.load(GOLDENS / "m2f_r50_instance.npz")
    arrays = [name for name in expected.files if not name.startswith("image")]
    assert len(arrays) == 14
    for name in arrays:
        np.testing.assert_allclose(outputs[name].numpy(), expected[name], rtol=0, atol=TOLERANCE, err_msg=name)
    for i, instances in enumerate(outputs["instances"]):
        found = {
            key.removeprefix(f"image{i}.instances."): expected[key] for key in expected.files if f"image{i}" in key
        }
        assert_instances(instances, found["scores"], found["pred_classes"], found["pred_masks_packbits"])


def assert_instances(instances: Any, scores: np.ndarray, classes: np.ndarray, mask_bits: np.ndarray) -> None:
    """The instances are the published ones, which are not sorted; masks are packed along all their pixels."""
    order = np.argsort(-scores, kind="stable")
    np.testing.assert_allclose(instances.scores.numpy(), scores[order], rtol=0, atol=TOLERANCE)
    np.testing.assert_array_equal(instances.pred_classes.numpy(), classes[order])
    masks = instances.pred_masks.flatten(1).numpy()
    # A pixel whose logit is within the tolerance of 0 may fall on either side.
    assert (masks != np.unpackbits(mask_bits[order], axis=1)[:, : masks.shape[1]]).sum() <= 3
    assert instances.image_size == tuple(instances.pred_masks.shape[-2:])
