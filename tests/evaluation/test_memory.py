"""An image's evaluation needs little more memory than its forward pass, however many masks it has."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2", reason="needs Detectron2")

from detectron2.modeling import build_model  # noqa: E402

import peft_d2  # noqa: E402
from peft_d2.engine.config import load_config  # noqa: E402
from peft_d2.evaluation.results import instances_to_results  # noqa: E402
from peft_d2.models.layers import postprocess  # noqa: E402

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
        monkeypatch.setattr(
            postprocess, "CHUNK_VALUES", 2**19
        )  # the share of such an image that 2**24 is of 2048 x 1024
        assert peak(evaluate) < 1.5 * forward
        monkeypatch.setattr(postprocess, "CHUNK_VALUES", 2**40)  # all masks at once
        assert peak(evaluate) > 1.5 * forward
