"""Bad prompts and images: each works or is one clear error that names the image."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from peft_d2.storage import checkpoint

IMAGE = torch.full((3, 100, 128), 90, dtype=torch.uint8)


def item(**prompts: Any) -> dict[str, Any]:
    return {"image": IMAGE, "file_name": "a.png", **prompts}


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ({"boxes": [[130.0, 5, 140, 20]]}, r"a.png: box 0 \[130.0, .*outside of the image of 128 x 100 px"),
        ({"boxes": [[1.0, 5, 9, 9], [5, 110, 9, 120]]}, r"box 1 .*outside"),
        ({"boxes": [[-9.0, -9, -1, -1]] * 3}, r"box 0 .*outside .*\(3 such\)"),
        ({"boxes": [[20.0, 5, 10, 20]]}, "box 0 .*wrong way round"),
        ({"boxes": [[float("nan"), 5, 10, 20]]}, "boxes holds values that are not finite"),
        ({"boxes": [1.0, 2, 3, 4]}, r"boxes are \(4,\), expected \(N, 4\)"),
        ({"point_coords": [[[5.0, 101.0]]], "point_labels": [[1]]}, r"point 0 \[5.0, 101.0\] lies outside"),
        ({"point_coords": [[[5.0, 9.0]]], "point_labels": [[2]]}, "point_labels must be"),
        ({"point_coords": [[[5.0, 9.0]]]}, "go together"),
        ({"point_coords": [[5.0, 9.0]], "point_labels": [[1]]}, r"expected \(N, P, 2\)"),
        ({"boxes": [[1.0, 5, 9, 9]] * 2, "mask_inputs": torch.zeros(1, 1, 32, 32)}, "equally often"),
        ({"mask_inputs": torch.zeros(1, 1, 64, 64)}, r"expected \(N, 1, 32, 32\)"),
    ],
)
def test_a_bad_prompt_is_named(sam: Any, prompts: dict[str, Any], message: str) -> None:
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        sam()([item(**prompts)])


def test_an_image_without_boxes(sam: Any) -> None:
    with torch.no_grad():
        none, unprompted = sam()([item(boxes=torch.zeros(0, 4), height=50, width=64), item()])
    assert len(none["instances"]) == 0 and none["instances"].pred_masks.shape == (0, 50, 64)
    assert len(unprompted["instances"]) == 1


def test_a_box_of_zero_size_and_one_over_the_border(sam: Any) -> None:
    boxes = torch.tensor([[30.0, 40, 30, 40], [100, 50, 200, 300], [100, 50, 128, 100], [128, 100, 128, 100]])
    with torch.no_grad():
        found = sam()([item(boxes=boxes)])[0]["instances"]
    assert len(found) == 4 and torch.isfinite(found.scores).all()
    torch.testing.assert_close(found.scores[1], found.scores[2])  # clipped


def test_many_boxes(sam: Any) -> None:
    corners = torch.rand(600, 2) * torch.tensor([100.0, 80.0])
    boxes = torch.cat([corners, corners + 15], dim=1)
    model = sam()
    calls: list[int] = []
    model.mask_decoder.register_forward_hook(lambda _, given, __: calls.append(len(given[2])))
    with torch.no_grad():
        found = model([item(boxes=boxes)])[0]["instances"]
        assert sum(calls) == len(found) == 600 and max(calls) == 64
        alone = model([item(boxes=boxes[500:501])])[0]["instances"]
    torch.testing.assert_close(alone.scores[0], found.scores[500])


@pytest.mark.parametrize("size", [(1, 1), (1, 128), (128, 1), (5, 9)])
def test_an_image_smaller_than_a_patch_or_of_extreme_aspect(sam: Any, size: tuple[int, int]) -> None:
    given = {"image": torch.zeros(3, *size), "boxes": [[0.0, 0, size[1], size[0]]], "height": 37, "width": 3}
    with torch.no_grad():
        found = sam()([given])[0]["instances"]
    assert found.pred_masks.shape == (1, 37, 3) and torch.isfinite(found.scores).all()


def test_an_image_that_is_too_large(sam: Any) -> None:
    with pytest.raises(ValueError, match="a.png: the image is 129 x 20 px, but the model takes 1 to 128 px"):
        sam()([{"image": torch.zeros(3, 20, 129), "file_name": "a.png"}])


def test_a_published_checkpoint_and_one_of_another_size(sam: Any, tmp_path: Path) -> None:
    torch.manual_seed(1)
    source, target = sam(), sam()
    for parameter in source.parameters():
        torch.nn.init.normal_(parameter)
    path = tmp_path / "sam.pth"
    torch.save(source.state_dict(), path)  # as published: the bare state dict
    checkpoint.load_base(target, path)
    for name, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[name]), name
    with pytest.raises(checkpoint.CheckpointError, match="does not fit the model.*(?s:.*)another shape"):
        checkpoint.load_base(sam({"MODEL.SAM.EMBED_DIM": 64}), path)
    with pytest.raises(checkpoint.CheckpointError, match="not in the file: image_encoder.blocks.4"):
        checkpoint.load_base(sam({"MODEL.SAM.DEPTH": 5}), path)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"MODEL.SAM.IMAGE_SIZE": 100}, "IMAGE_SIZE is 100; it should be a multiple of PATCH_SIZE, 16"),
        ({"MODEL.SAM.GLOBAL_BLOCKS": [1, 4]}, r"GLOBAL_BLOCKS is \[1, 4\]; it should be numbers of the 4 blocks"),
        ({"MODEL.SAM.NUM_HEADS": 5}, "EMBED_DIM is 48; it should be a multiple of MODEL.SAM.NUM_HEADS, 5"),
    ],
)
def test_a_config_that_cannot_be(sam: Any, overrides: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sam(overrides)
