"""Training Segment Anything with boxes: losses, gradients, batches; its encoder as a backbone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from torch import Tensor

from peft_d2 import peft
from peft_d2.models.checks import ModelConfigError
from peft_d2.storage import checkpoint

from ...tiny_sam import SAM_TINY
from ..conftest import SMALL

COBOT_LORA = {"NAME": "lora", "TARGETS": ["image_encoder.*.qkv"], "PARTS": ["q", "v"], "RANK": 4, "COBOT": True}
COBOT_ADAPTFORMER = {"NAME": "adaptformer", "TARGETS": ["image_encoder.*.mlp"], "BOTTLENECK": 8, "COBOT": True}


def sample(*boxes: tuple[int, int, int, int], size: tuple[int, int] = (100, 128)) -> dict[str, Any]:
    """An image of noise with bright rectangles, each an object."""
    masks = torch.zeros(len(boxes), *size, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(masks, boxes, strict=True):
        mask[y0:y1, x0:x1] = True
    instances = Instances(size)
    instances.gt_masks = masks
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    instances.gt_classes = torch.zeros(len(boxes), dtype=torch.int64)
    generator = torch.Generator().manual_seed(len(boxes))
    image = torch.randint(0, 60, (3, *size), generator=generator) + 180 * masks.any(0)
    return {"image": image, "instances": instances, "file_name": "a.png"}


@pytest.fixture
def model(sam: Any) -> Any:
    return sam({"MODEL.SAM.IOU_WEIGHT": 1.0}).train()


BATCH = [sample((10, 10, 60, 50), (70, 20, 120, 90)), sample((5, 40, 50, 95), size=(128, 77))]


def test_losses_are_the_papers(model: Any) -> None:
    found = model(BATCH)
    rows = []
    for item in BATCH:
        embedding = model.image_encoder(model.preprocess(item["image"])[None])
        tokens, dense = model.prompt_encoder(None, item["instances"].gt_boxes.tensor, None)
        logits, quality = model.mask_decoder(
            embedding, model.prompt_encoder.dense_positions(), tokens, dense, multimask=False
        )
        height, width = item["image"].shape[1:]
        whole = F.interpolate(logits, (128, 128), mode="bilinear", align_corners=False)[:, 0, :height, :width]
        for pixels, expected, mask in zip(whole, quality[:, 0], item["instances"].gt_masks, strict=True):
            labels, chance = mask.float(), pixels.sigmoid()
            entropy = -(labels * chance.log() + (1 - labels) * (1 - chance).log()).mean()
            dice = 1 - (2 * (chance * labels).sum() + 1) / (chance.sum() + labels.sum() + 1)
            iou = ((pixels > 0) & mask).sum() / ((pixels > 0) | mask).sum()
            rows.append(torch.stack([entropy, dice, (expected - iou) ** 2]))
    expected = torch.stack(rows).mean(0)
    assert list(found) == ["loss_mask", "loss_dice", "loss_iou"]
    torch.testing.assert_close(torch.stack(list(found.values())), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["loss_mask", "loss_dice", "loss_iou"])
def test_each_loss_has_a_gradient(model: Any, name: str) -> None:
    model(BATCH)[name].backward()
    changed = [n for n, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0]
    head = "mask_decoder.iou_prediction_head" if name == "loss_iou" else "mask_decoder.output_hypernetworks_mlps.0"
    for part in ("image_encoder.blocks.0.attn.qkv", "mask_decoder.transformer", head, "prompt_encoder.point_embed"):
        assert any(n.startswith(part) for n in changed), part


def test_a_loss_of_weight_zero_is_left_out(sam: Any) -> None:
    found = sam({"MODEL.SAM.DICE_WEIGHT": 0.0, "MODEL.SAM.MASK_WEIGHT": 2.0}).train()(BATCH)
    assert list(found) == ["loss_mask"]
    torch.testing.assert_close(found["loss_mask"], 2 * sam().train()(BATCH)["loss_mask"])


def test_the_given_boxes_are_the_prompts(model: Any) -> None:
    item = sample((10, 10, 60, 50))
    plain = model([item])
    same = model([{**item, "boxes": item["instances"].gt_boxes.tensor}])
    moved = model([{**item, "boxes": torch.tensor([[0.0, 0.0, 100.0, 99.0]])}])
    torch.testing.assert_close(plain, same)
    assert abs(moved["loss_mask"].item() - plain["loss_mask"].item()) > 1e-4


def test_bit_masks_are_masks(model: Any) -> None:
    item = sample((10, 10, 60, 50))
    plain = model([item])
    item["instances"].gt_masks = BitMasks(item["instances"].gt_masks)
    torch.testing.assert_close(model([item]), plain)
    item["boxes"] = item["instances"].gt_boxes
    torch.testing.assert_close(model([item]), plain)


def test_what_detectron2s_own_mapper_gives(model: Any) -> None:
    """Polygons by default, and no masks where there are no objects, or where MODEL.MASK_ON is False."""
    item, empty = sample((10, 10, 60, 50)), sample()
    plain = model([item])
    item["instances"].gt_masks = PolygonMasks([[[10.0, 10, 60, 10, 60, 50, 10, 50]]])
    empty["instances"].remove("gt_masks")
    torch.testing.assert_close(model([item, empty]), plain, rtol=1e-4, atol=1e-6)
    item["instances"].remove("gt_masks")
    with pytest.raises(ModelConfigError, match="'a.png' has objects without masks"):
        model([item])


def test_an_image_without_objects_costs_nothing(model: Any) -> None:
    alone = model(BATCH[:1])
    torch.testing.assert_close(model([BATCH[0], sample()]), alone, rtol=1e-4, atol=1e-6)
    losses = model([sample()])
    assert all(value.item() == 0 for value in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is None or not p.grad.any() for p in model.parameters())


def test_prompts_that_do_not_belong_to_the_masks(model: Any) -> None:
    with pytest.raises(ValueError, match="a.png: 1 prompts .* do not belong to masks"):
        model([{**BATCH[0], "boxes": torch.tensor([[0.0, 0.0, 100.0, 99.0]])}])


def test_pieces_of_a_batch_add_up_to_the_whole(model: Any) -> None:
    whole = model(BATCH)
    objects = [model.count_objects([item]) for item in BATCH]
    pieces = [model([{**item, "batch_objects": objects}]) for item in BATCH]
    for name, value in whole.items():
        torch.testing.assert_close(sum(piece[name] for piece in pieces) / len(pieces), value, rtol=1e-4, atol=1e-6)


def test_all_boxes_of_an_image_in_one_call(model: Any) -> None:
    calls: list[int] = []
    model.mask_decoder.register_forward_hook(lambda _, given, __: calls.append(len(given[2])))
    model(BATCH)
    assert calls == [2, 1]


@pytest.mark.parametrize("method", [COBOT_LORA, COBOT_ADAPTFORMER], ids=["lora", "adaptformer"])
def test_it_learns_with_a_frozen_encoder(sam: Any, method: dict[str, Any]) -> None:
    model = sam().train()
    peft.inject(model, [method], train=["mask_decoder"])
    peft.prove_live(model, lambda m: m([dict(BATCH[0], boxes=BATCH[0]["instances"].gt_boxes.tensor)]))
    frozen = peft.frozen_hash(model)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-3)
    history = []
    for _ in range(25):
        losses = model(BATCH)
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        history.append({name: float(value.detach()) for name, value in losses.items()})
    assert history[-1]["loss_mask"] < 0.7 * history[0]["loss_mask"]
    assert history[-1]["loss_dice"] < 0.8 * history[0]["loss_dice"]
    assert peft.frozen_hash(model) == frozen


def backbone_model(build: Any) -> Any:
    sizes = {key: value for key, value in SAM_TINY.items() if "DECODER" not in key and "IOU" not in key}
    small = {key: value for key, value in SMALL.items() if "RESNETS" not in key}
    return build("sam/vit_b_mask2former.yaml", {**small, **sizes, "MODEL.SAM.PYRAMID_CHANNELS": 24})


def test_the_encoder_feeds_mask2former(build: Any, sam: Any, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = backbone_model(build)
    shapes = model.backbone(torch.rand(1, 3, 100, 136))
    assert {name: tuple(value.shape) for name, value in shapes.items()} == {
        "res2": (1, 24, 32, 40),
        "res3": (1, 24, 16, 20),
        "res4": (1, 24, 8, 10),
        "res5": (1, 24, 4, 5),
    }
    assert {n: (s.channels, s.stride) for n, s in model.backbone.output_shape().items()} == {
        f"res{i}": (24, 2**i) for i in range(2, 6)
    }
    whole = sam()
    torch.save(whole.state_dict(), tmp_path / "sam.pth")
    report = checkpoint.load_base(model, tmp_path / "sam.pth")
    assert report.backbone and not [name for name in report.initial if name.startswith("backbone.net.")]
    grid = torch.rand(1, 3, 128, 128)
    seen: list[Tensor] = []
    whole.image_encoder.neck.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        whole.image_encoder(grid)
        torch.testing.assert_close(model.backbone.net(grid), seen[0])
    losses = model.train()([sample((10, 10, 60, 50), (70, 20, 120, 90))])
    sum(losses.values()).backward()
    assert model.backbone.net.pos_embed.grad.abs().sum() > 0
    with torch.no_grad():
        found = model.eval()([{"image": torch.zeros(3, 70, 90), "height": 70, "width": 90}])
    assert found[0]["instances"].pred_masks.shape[1:] == (70, 90)
