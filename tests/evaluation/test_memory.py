"""An image's evaluation needs little more memory than its forward pass, however many masks it has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2", reason="needs Detectron2")

from detectron2.modeling import build_model  # noqa: E402
from detectron2.structures import Boxes, Instances  # noqa: E402

import peft_d2  # noqa: E402
from peft_d2.engine.config import load_config  # noqa: E402
from peft_d2.evaluation.augmented import AugmentedModel  # noqa: E402
from peft_d2.evaluation.coco import instances_to_results  # noqa: E402
from peft_d2.memory import SavedTensors  # noqa: E402
from peft_d2.models.layers import boxes, postprocess  # noqa: E402

from ..tiny_sam import SAM_TINY  # noqa: E402

SIZE = (256, 512)


def peak(function: Callable[[], object]) -> int:
    """Bytes of all tensors alive at once at most, beyond those that were there before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    total = highest = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += event.nbytes()
        highest = max(highest, total)
    return highest


def test_evaluation_stays_near_the_forward_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    peft_d2.register()
    tiny = Path(__file__).parents[1] / "engine" / "tiny.yaml"
    former, head = "MODEL.MASK_FORMER", "MODEL.SEM_SEG_HEAD"  # as wide as real ones: masks must not outweigh features
    opts = [f"{former}.NUM_OBJECT_QUERIES", "100", "TEST.DETECTIONS_PER_IMAGE", "100", "MODEL.SWIN.EMBED_DIM", "96"]
    opts += [f"{head}.CONVS_DIM", "128", f"{head}.MASK_DIM", "128", f"{former}.HIDDEN_DIM", "128"]
    model = build_model(load_config(str(tiny), opts=opts).cfg).eval()
    image = torch.randint(0, 256, (3, *SIZE), dtype=torch.uint8)

    def evaluate() -> None:
        found = model([{"image": image, "height": SIZE[0], "width": SIZE[1]}])[0]["instances"]
        assert len(instances_to_results(found, 1)) == 100

    with torch.no_grad():
        forward = peak(lambda: model.predict(model.backbone(((image - model.pixel_mean) / model.pixel_std)[None])))
        monkeypatch.setattr(postprocess, "CACHE_VALUES", 2**40)
        # The share of such an image that 2**24 is of 2048 x 1024.
        monkeypatch.setattr(postprocess, "CHUNK_VALUES", 2**19)
        assert peak(evaluate) < 1.5 * forward
        monkeypatch.setattr(postprocess, "CHUNK_VALUES", 2**40)  # all masks at once
        assert peak(evaluate) > 1.5 * forward


PIXELS = 192 * 256
CANVAS = postprocess.Canvas((192, 256), (192, 256), (192, 256))


@pytest.fixture
def few_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four masks, as 2**24 values are of 2048 x 2048."""
    monkeypatch.setattr(postprocess, "CHUNK_VALUES", 4 * PIXELS)


@pytest.mark.usefixtures("few_at_once")
def test_300_detections_are_never_all_there_in_float() -> None:
    """LVIS: the masks that are returned take a byte a pixel, twice while they are sorted; floats only of four."""
    probability, logits = torch.rand(300, 20), torch.randn(300, 12, 16)
    taken = peak(lambda: postprocess.instance_inference(probability, logits, CANVAS, 300))
    assert 300 * PIXELS < taken < 2 * 300 * PIXELS + 8 * 4 * 4 * PIXELS < 0.7 * 4 * 300 * PIXELS


@pytest.mark.usefixtures("few_at_once")
def test_panoptic_and_semantic_results_hold_a_few_masks() -> None:
    scores, logits, probability = torch.rand(300), torch.randn(300, 12, 16), torch.rand(300, 5)
    classes = torch.arange(300) % 7
    taken = peak(lambda: postprocess.panoptic_inference(scores, classes, logits, CANVAS, range(3), 0.8))
    assert taken < 60 * 4 * PIXELS
    for last in (False, True):
        assert peak(lambda last=last: postprocess.semantic_inference(probability, logits, CANVAS, last)) < (
            40 * 4 * PIXELS
        )


class Finds(torch.nn.Module):
    """A detector that finds a hundred things in any view."""

    def forward(self, batch: list[dict]) -> list[dict]:
        outputs = []
        for record in batch:
            size = (record["height"], record["width"])
            found = Instances(size)
            found.pred_masks = torch.zeros(100, *size, dtype=torch.bool)
            for number, mask in enumerate(found.pred_masks):
                mask[number : number + 20, number : number + 20] = True
            found.pred_boxes = Boxes(boxes.mask_boxes(found.pred_masks))
            found.scores, found.pred_classes = torch.linspace(0.1, 1, 100), torch.zeros(100, dtype=torch.int64)
            outputs.append({"instances": found})
        return outputs


def test_views_of_an_image_do_not_pile_up() -> None:
    image = torch.randint(0, 256, (3, 192, 256), dtype=torch.uint8)
    record = {"image": image, "height": 192, "width": 256}
    one, four = (AugmentedModel(Finds(), [96] * count, 256) for count in (1, 4))
    assert len(four([record])[0]["instances"]) == 100
    assert peak(lambda: four([record])) < 1.1 * peak(lambda: one([record]))


@pytest.fixture
def sam(monkeypatch: pytest.MonkeyPatch) -> torch.nn.Module:
    peft_d2.register()
    monkeypatch.setattr(postprocess, "CHUNK_VALUES", 4 * 128 * 128)
    opts = [str(item) for pair in SAM_TINY.items() for item in pair]
    return build_model(load_config("", opts=["MODEL.META_ARCHITECTURE", "PD2SegmentAnything", *opts]).cfg)


def prompted(count: int) -> dict:
    corners = torch.rand(count, 2, generator=torch.Generator().manual_seed(0)) * 60
    instances = Instances((128, 128))
    instances.gt_boxes = Boxes(torch.cat([corners, corners + 40], 1))
    instances.gt_masks = torch.zeros(count, 128, 128, dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(instances.gt_masks, instances.gt_boxes.tensor.int().tolist(), strict=True):
        mask[y0:y1, x0:x1] = True
    instances.gt_classes = torch.zeros(count, dtype=torch.int64)
    return {"image": torch.full((3, 128, 128), 90.0), "instances": instances, "boxes": instances.gt_boxes.tensor}


def test_500_boxes_are_masks_of_a_byte_a_pixel(sam: torch.nn.Module) -> None:
    sam.eval().prompts_per_call = 8  # type: ignore[assignment]
    item = prompted(500)
    with torch.no_grad():
        few, many = (peak(lambda n=n: sam([{**item, "boxes": item["boxes"][:n]}])) for n in (16, 500))
    assert many - few < 1.3 * (500 - 16) * 128 * 128


def test_training_with_many_boxes_keeps_the_prompts_alone(
    sam: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses and gradients of all at once, and what is kept does not grow with the boxes."""
    item, runs = prompted(24), []
    for at_once in (24, 4):
        monkeypatch.setattr(postprocess, "CHUNK_VALUES", at_once * 128 * 128)
        with SavedTensors(sam.train()) as saved:
            losses = sam([item])
        sam.zero_grad()
        sum(losses.values()).backward()
        gradients = {name: p.grad.clone() for name, p in sam.named_parameters() if p.grad is not None}
        runs.append((losses, gradients, saved.by_module))
    (losses, gradients, kept), (again, regradients, less) = runs
    torch.testing.assert_close(again, losses, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(regradients, gradients, rtol=1e-3, atol=1e-5)
    decoder, small = (sum(v for k, v in run.items() if k.startswith("mask_decoder")) for run in (kept, less))
    assert decoder > 4 * 2**20 and small < 0.05 * decoder
