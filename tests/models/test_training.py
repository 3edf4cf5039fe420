"""Training steps and results of small models, from every kind of input."""

from __future__ import annotations

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.structures import BitMasks, Instances, PolygonMasks

SIZE = (64, 80)
BOXES = [(4, 6, 30, 40), (20, 10, 70, 50), (0, 0, 12, 12)]  # x0, y0, x1, y1


def sample(kind: str, count: int = 3, size: tuple[int, int] = SIZE) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(count)
    item: dict[str, Any] = {"image": torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8)}
    masks = torch.zeros(count, *size, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, BOXES, strict=False):
        mask[y0:y1, x0:x1] = True
    if kind == "sem_seg":
        item["sem_seg"] = torch.full(size, 255)
        for label, mask in enumerate(masks):
            item["sem_seg"][mask] = label
        return item
    item["instances"] = instances = Instances(size)
    instances.gt_classes = torch.arange(count)
    polygons = [[np.array([x0, y0, x1, y0, x1, y1, x0, y1], dtype=float)] for x0, y0, x1, y1 in BOXES[:count]]
    instances.gt_masks = {"tensor": masks, "bitmasks": BitMasks(masks), "polygons": PolygonMasks(polygons)}[kind]
    return item


def step(model: torch.nn.Module, inputs: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model.train().zero_grad()
    losses = model(copy.deepcopy(inputs))
    sum(losses.values()).backward()
    return losses


@pytest.mark.parametrize("kind", ["tensor", "bitmasks", "polygons", "sem_seg"])
def test_every_kind_of_ground_truth(classifier: Any, kind: str) -> None:
    model = classifier()
    losses = step(model, [sample(kind), sample(kind, 1, (48, 60))])
    assert set(losses) == set(model.criterion.weight_dict)
    assert all(loss.isfinite() for loss in losses.values())
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_polygons_and_bitmaps_agree(classifier: Any) -> None:
    model = classifier()
    expected = step(model, [sample("bitmasks")])
    for kind in ("tensor", "polygons"):
        found = step(model, [sample(kind)])
        assert {k: v.item() for k, v in found.items()} == pytest.approx(
            {k: v.item() for k, v in expected.items()}, rel=1e-4
        )


def test_losses_are_weighted(classifier: Any) -> None:
    model = classifier()
    first = step(model, [sample("tensor")])
    model.criterion.weight_dict["loss_dice_0"] *= 3  # the matcher has weights of its own
    second = step(model, [sample("tensor")])
    assert second["loss_dice_0"].item() == pytest.approx(3 * first["loss_dice_0"].item())
    assert second["loss_dice"].item() == pytest.approx(first["loss_dice"].item())


@pytest.mark.parametrize("counts", [(0, 2), (0, 0)])
def test_images_without_instances(classifier: Any, counts: tuple[int, ...]) -> None:
    model = classifier()
    inputs = [sample("tensor", count) for count in counts]
    del inputs[0]["instances"]._fields["gt_masks"]  # as some mappers leave it
    losses = step(model, inputs)
    assert all(loss.isfinite() for loss in losses.values())
    if not any(counts):
        assert losses["loss_mask"].item() == 0
    assert all(p.grad is not None for p in model.parameters())  # so that no worker waits for another


def test_an_instance_without_polygons_is_an_empty_mask(classifier: Any) -> None:
    item = sample("polygons")
    item["instances"].gt_masks.polygons[1] = []
    assert all(loss.isfinite() for loss in step(classifier(), [item]).values())


def test_missing_ground_truth_is_named(classifier: Any) -> None:
    with pytest.raises(KeyError, match="a.png.*neither 'instances' nor 'sem_seg'"):
        classifier().train()([{"image": torch.zeros(3, 64, 64), "file_name": "a.png"}])


def test_unknown_masks_are_named(classifier: Any) -> None:
    item = sample("tensor")
    item["instances"]._fields["gt_masks"] = [1, 2, 3]
    with pytest.raises(TypeError, match="gt_masks is list"):
        classifier().train()([item])


def test_training_learns_one_image(classifier: Any) -> None:
    model = classifier().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    inputs = [sample("bitmasks")]
    first = None
    for _ in range(12):
        losses = sum(model(inputs).values())
        first = first or losses.item()
        optimizer.zero_grad()
        losses.backward()
        optimizer.step()
    assert losses.item() < 0.8 * first


@pytest.mark.parametrize("pixel_decoder", [False, True])
def test_bf16_autocast(classifier: Any, pixel_decoder: bool) -> None:
    model = classifier({"MODEL.SEM_SEG_HEAD.PIXEL_DECODER_AUTOCAST": pixel_decoder})
    if not hasattr(model.sem_seg_head, "pixel_decoder"):
        pytest.skip("it has no pixel decoder")
    seen: list[torch.dtype] = []
    layer = model.sem_seg_head.pixel_decoder.transformer.encoder.layers[0].linear1
    layer.register_forward_hook(lambda module, arguments, output: seen.append(output.dtype))
    inputs = [sample("bitmasks"), sample("bitmasks", 2)]
    exact = {name: loss.item() for name, loss in step(model, inputs).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        losses = step(model, inputs)
        model.eval()
        with torch.no_grad():
            results = model(inputs)
    assert seen == [torch.float32, *[torch.bfloat16 if pixel_decoder else torch.float32] * 2]
    assert all(loss.dtype == torch.float32 for loss in losses.values())
    total = sum(loss.item() for loss in losses.values())
    assert total == pytest.approx(sum(exact.values()), rel=0.1)
    assert all(p.grad.isfinite().all() for p in model.parameters())
    assert results[0]["instances"].scores.dtype == torch.float32


def test_results_of_all_three_tasks(classifier: Any) -> None:
    on = {f"TEST.{task}_ON": True for task in ("SEMANTIC", "INSTANCE", "PANOPTIC")}
    model = classifier(on).eval()
    inputs = [{**sample("tensor"), "height": 100, "width": 120}, {"image": sample("tensor", 1, (48, 60))["image"]}]
    with pytest.raises(ValueError, match="thing_dataset_id_to_contiguous_id"):
        model.metadata = SimpleNamespace(name="mine")
        model(inputs)
    model.metadata = SimpleNamespace(thing_dataset_id_to_contiguous_id={1: 0, 7: 2})
    with torch.no_grad():
        results = model(inputs)
    for result, size in zip(results, [(100, 120), (48, 60)], strict=True):
        assert result["sem_seg"].shape == (4, *size)
        assert result["panoptic_seg"][0].shape == size
        assert result["instances"].image_size == size
        assert set(result["instances"].pred_classes.tolist()) <= {0, 2}
        assert (result["instances"].scores.diff() <= 0).all()


def test_fewer_queries_than_instances(classifier: Any) -> None:
    model = classifier({"NUM_OBJECT_QUERIES": 2})
    assert all(loss.isfinite() for loss in step(model, [sample("tensor")]).values())
    with torch.no_grad():
        assert len(model.eval()([sample("tensor")])[0]["instances"]) == 8  # 2 queries x 4 classes, 100 asked for


def test_padding_follows_the_backbone_where_asked(classifier: Any) -> None:
    assert classifier({"SIZE_DIVISIBILITY": -1}).size_divisibility == classifier().backbone.size_divisibility
