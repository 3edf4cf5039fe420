"""EoMT is equal to the EomtForUniversalSegmentation of Hugging Face's transformers, on DINOv2 and on DINOv3."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from peft_d2.adapters import load_base
from peft_d2.storage import CheckpointError

from ..test_training import sample
from .conftest import CLASSES, QUERIES, SIDE, SIZES

transformers = pytest.importorskip("transformers", minversion="5.0", reason="its EoMT and DINOv3 are of release 5")

KINDS = ["dinov2", "dinov3"]


@pytest.fixture
def theirs(filler: Any) -> Callable[[str], nn.Module]:
    def make(kind: str) -> nn.Module:
        shared = {
            **{"hidden_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4, "image_size": SIDE},
            **{"patch_size": 16, "num_blocks": 2, "num_queries": QUERIES, "num_labels": CLASSES},
            **{"train_num_points": 256, "num_register_tokens": 4},
        }
        if kind == "dinov2":
            model = transformers.EomtForUniversalSegmentation(transformers.EomtConfig(**shared))
        else:
            config = transformers.EomtDinov3Config(
                **shared, intermediate_size=192, layer_norm_eps=1e-5, pos_embed_rescale=None
            )
            model = transformers.EomtDinov3ForUniversalSegmentation(config)
        filler.fill(model)
        with torch.no_grad():  # layer scales of the order of 1, so that the blocks have an effect
            for name, value in model.named_parameters():
                value.add_(0.7 * name.endswith("lambda1"))
        model.attn_mask_probs.fill_(1.0)
        model.criterion.empty_weight.fill_(1.0)[-1] = 0.1
        return model.eval()

    return make


@pytest.fixture
def images(filler: Any) -> list[dict[str, Any]]:
    return [{"image": filler.image(seed, SIDE, SIDE)} for seed in (3, 4)]


def outputs(model: Any, batch: list[dict[str, Any]]) -> dict[str, Any]:
    return model.predict(model.backbone(model.to_batch(batch).tensor))


@pytest.mark.parametrize("probability", [1.0, 0.0])
@pytest.mark.parametrize(("kind", "split"), [("dinov2", False), ("dinov3", False), ("dinov3", True)])
def test_same_outputs_from_their_checkpoint(
    eomt: Any, theirs: Any, images: Any, tmp_path: Any, kind: str, split: bool, probability: float
) -> None:
    their = theirs(kind)
    their.attn_mask_probs.fill_(probability)
    torch.save(their.state_dict(), tmp_path / "theirs.pth")
    ours = eomt(kind, more=", qkv_fused: false" if split else "").eval()
    report = load_base(ours, tmp_path / "theirs.pth")
    assert not report.initial and not report.unexpected, report
    with torch.no_grad():
        found = outputs(ours, images)
        expected = their(pixel_values=ours.to_batch(images).tensor)
    for mine, other in (
        (found["pred_logits"], expected.class_queries_logits),
        (found["pred_masks"], expected.masks_queries_logits),
    ):
        assert other.std() > 0.1  # the comparison is not of constants
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-4)
    assert len(found["aux_outputs"]) == (2 if probability else 0)


def test_positions_for_another_size(eomt: Any, theirs: Any, filler: Any, tmp_path: Any) -> None:
    """Bicubic and smoothed, as timm does it in the forward pass; a grid that is no square is refused by its shape."""
    their = theirs("dinov2")
    torch.save(their.state_dict(), tmp_path / "theirs.pth")
    sides = f"{{{SIZES.replace('img_size: 64', 'img_size: 96')}, init_values: 0.7}}"
    large = eomt("dinov2", {"MODEL.TIMM.KWARGS": sides, "MODEL.MASK_FORMER.SIZE_DIVISIBILITY": 96}).eval()
    report = load_base(large, tmp_path / "theirs.pth")
    assert not report.initial and not report.unexpected, report
    found = large.backbone.net.pos_embed[0]
    square = their.embeddings.position_embeddings.weight.T.reshape(1, 48, 4, 4)
    expected = nn.functional.interpolate(square, size=(6, 6), mode="bicubic", antialias=True)
    torch.testing.assert_close(found, expected.flatten(2)[0].T, rtol=0, atol=1e-5)
    small = eomt(
        "dinov2", {"MODEL.MASK_FORMER.SIZE_DIVISIBILITY": -1}
    ).eval()  # fits 4 x 4, and interpolates by itself for a larger image
    load_base(small, tmp_path / "theirs.pth")
    image = [{"image": filler.image(3, 96, 96)}]
    with torch.no_grad():
        torch.testing.assert_close(
            outputs(large, image)["pred_masks"], outputs(small, image)["pred_masks"], rtol=0, atol=1e-4
        )
    state = their.state_dict()
    state["embeddings.position_embeddings.weight"] = torch.zeros(18, 48)
    torch.save(state, tmp_path / "odd.pth")
    with pytest.raises(CheckpointError, match="pos_embed .*18, 48.* -> .*36, 48"):
        load_base(large, tmp_path / "odd.pth")


@pytest.mark.parametrize("probability", [1.0, 0.4])
@pytest.mark.parametrize("kind", KINDS)
def test_same_losses_in_expectation(eomt: Any, theirs: Any, kind: str, probability: float) -> None:
    """Points and the choice of masked queries are random: means over seeds are compared by their spread."""
    ours, their = eomt(kind).train(), theirs(kind).train()
    ours.load_state_dict(ours.upgrade_state_dict(their.state_dict()))
    for probabilities in (ours.sem_seg_head.query_feat.attn_mask_probs, their.attn_mask_probs):
        probabilities.fill_(probability)
    batch = [sample("tensor", 3, (SIDE, SIDE)), sample("tensor", 1, (SIDE, SIDE))]
    found, expected = [], []
    with torch.no_grad():
        pixels = ours.to_batch(batch).tensor
        labels = [item["instances"].gt_classes for item in batch]
        masks = [item["instances"].gt_masks.float() for item in batch]
        for seed in range(12):
            torch.manual_seed(seed)
            found.append(sum(loss.item() for loss in ours(batch).values()))
            torch.manual_seed(1000 + seed)
            expected.append(their(pixel_values=pixels, mask_labels=masks, class_labels=labels).loss.item())
    mine, other = torch.tensor(found), torch.tensor(expected)
    error = float((mine.var() + other.var()).sqrt()) / len(mine) ** 0.5
    assert 0 < error < 0.015 * float(other.mean())
    assert abs(float(mine.mean() - other.mean())) < 4 * error


PICTURES = [(48, SIDE), (SIDE, 40)]


@pytest.fixture
def processor() -> Any:
    def make(split: bool = False) -> Any:
        sides = {"shortest_edge": SIDE, "longest_edge": None if split else SIDE}
        return transformers.EomtImageProcessor(size=sides, do_pad=not split, do_split_image=split)

    return make


def sharpen(model: Any) -> None:
    """Queries are sure of a class, and have masks of their own."""
    with torch.no_grad():
        model.class_predictor.weight.mul_(6)
        model.class_predictor.bias[-1] -= 50
        model.mask_head.fc3.weight.mul_(4)


@pytest.mark.parametrize("kind", KINDS)
def test_same_results_on_whole_images(eomt: Any, theirs: Any, filler: Any, processor: Any, kind: str) -> None:
    """Padding is black; instances one by one, panoptic maps segment by segment."""
    keys = {f"MODEL.MASK_FORMER.TEST.{task}_ON": True for task in ("INSTANCE", "PANOPTIC")}
    limits = {f"MODEL.MASK_FORMER.TEST.{name}_THRESHOLD": 0.05 for name in ("OBJECT_MASK", "OVERLAP")}
    ours, their = eomt(kind, {**keys, **limits}).eval(), theirs(kind)
    sharpen(their)
    ours.load_state_dict(ours.upgrade_state_dict(their.state_dict()))
    stuff = [3, 4]
    ours.metadata = SimpleNamespace(thing_dataset_id_to_contiguous_id={i: i for i in range(CLASSES) if i not in stuff})
    pictures = [filler.image(seed, *size).round().to(torch.uint8) for seed, size in enumerate(PICTURES)]
    process = processor()
    with torch.no_grad():
        inputs = process(images=pictures, return_tensors="pt")
        outputs = their(pixel_values=inputs["pixel_values"])
        found = ours([{"image": picture} for picture in pictures])
        panoptic = process.post_process_panoptic_segmentation(
            outputs, PICTURES, threshold=0.05, overlap_mask_area_threshold=0.05, stuff_classes=stuff
        )
        instances = process.post_process_instance_segmentation(outputs, PICTURES, threshold=0.0)
    for mine, whole, each in zip(found, panoptic, instances, strict=True):
        ids, segments = mine["panoptic_seg"]
        assert [s["category_id"] for s in segments] == [s["label_id"] for s in whole["segments_info"]] and segments
        assert (ids.long() - 1 == whole["segmentation"].long()).float().mean() > 0.999
        scores = [s["score"] for s in each["segments_info"] if s["label_id"] not in stuff]
        assert scores and all((mine["instances"].scores - score).abs().min() < 1e-4 for score in scores)


@pytest.mark.parametrize("size", [(SIDE, 150), (150, SIDE)])
def test_same_semantic_map_by_windows(
    eomt: Any, theirs: Any, filler: Any, processor: Any, size: tuple[int, int]
) -> None:
    ours, their = eomt("dinov2", {"MODEL.EOMT.WINDOW": SIDE}).eval(), theirs("dinov2")
    sharpen(their)
    ours.load_state_dict(ours.upgrade_state_dict(their.state_dict()))
    picture, process = filler.image(5, *size).round().to(torch.uint8), processor(split=True)
    with torch.no_grad():
        inputs = process(images=[picture], return_tensors="pt")
        assert len(inputs["pixel_values"]) == 3
        outputs = their(pixel_values=inputs["pixel_values"], patch_offsets=inputs["patch_offsets"])
        [expected] = process.post_process_semantic_segmentation(outputs, [size], return_segmentation_scores=True)
        [found] = ours([{"image": picture}])
    assert expected.segmentation_scores.std() > 0.05
    torch.testing.assert_close(found["sem_seg"], expected.segmentation_scores, rtol=0, atol=1e-4)
