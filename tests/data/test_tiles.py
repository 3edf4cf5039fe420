"""Cutting into tiles."""

from __future__ import annotations

import json

import numpy as np
import pytest
import toy
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tile_dataset import tile_coco

from peft_d2.data.pictures import tile_starts
from peft_d2.data.segmentation import segmentation_to_mask
from peft_d2.data.validation import check_coco


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 600), st.integers(2, 200), st.integers(0, 199))
def test_tiles_cover_and_overlap(length, tile, overlap):
    if overlap >= tile:
        with pytest.raises(ValueError, match="overlap"):
            tile_starts(length, tile, overlap)
        return
    starts = tile_starts(length, tile, overlap)
    assert starts[0] == 0
    assert starts[-1] == max(0, length - tile)
    assert all(b - a <= tile - overlap and b > a for a, b in zip(starts, starts[1:], strict=False))


@pytest.mark.parametrize("masks", ["polygon", "rle"])
def test_tiles_put_together_are_the_enlarged_masks(tmp_path, masks):
    made = toy.generate(tmp_path / "whole", "night", 3, seed=2, size=100, masks=masks)
    path = tile_coco(made.json, made.images, tmp_path / "tiles", tile=48, scale=2, min_area=0)
    assert check_coco(path, path.parent / "images") == []
    source, tiles = json.loads(made.json.read_text()), json.loads(path.read_text())
    assert len(tiles["images"]) == 3 * 9
    for image in source["images"]:
        canvas = np.zeros((200, 200), dtype=int)
        for tile in (t for t in tiles["images"] if t["tile"]["image_id"] == image["id"]):
            x, y = 2 * tile["tile"]["x"], 2 * tile["tile"]["y"]
            for annotation in (a for a in tiles["annotations"] if a["image_id"] == tile["id"]):
                mask = segmentation_to_mask(annotation["segmentation"], 96, 96)
                assert annotation["area"] == mask.sum()
                canvas[y : y + 96, x : x + 96][mask] = annotation["category_id"]
        expected = np.zeros((200, 200), dtype=int)
        for annotation in (a for a in source["annotations"] if a["image_id"] == image["id"]):
            mask = segmentation_to_mask(annotation["segmentation"], 100, 100)
            expected[mask.repeat(2, axis=0).repeat(2, axis=1)] = annotation["category_id"]
        assert np.array_equal(canvas, expected)


def test_slivers_go_whole_objects_stay(tmp_path):
    def square(number, x, y, side):
        corners = [x, y, x + side, y, x + side, y + side, x, y + side]
        return {"id": number, "image_id": 1, "category_id": 1, "bbox": [x, y, side, side], "segmentation": [corners]}

    Image.new("RGB", (40, 20)).save(tmp_path / "a.png")
    data = {
        "images": [{"id": 1, "file_name": "a.png", "height": 20, "width": 40}],
        "categories": [{"id": 1, "name": "square"}],
        # One of 3 px stays whole on the left; one of 8 px reaches 1 px (8 px area) into the right-hand tile.
        "annotations": [square(1, 2, 2, 3), square(2, 13, 5, 8)],
    }
    (tmp_path / "a.json").write_text(json.dumps(data))
    path = tile_coco(tmp_path / "a.json", tmp_path, tmp_path / "tiles", tile=20, scale=1, min_area=12)
    kept = [(a["image_id"], a["area"]) for a in json.loads(path.read_text())["annotations"]]
    assert kept == [(1, 9), (1, 56)]


def test_a_set_is_not_written_over_by_its_tiles(tmp_path):
    made = toy.generate(tmp_path / "set", sorted(toy.DOMAINS)[0], images=2, seed=0, size=64)
    before = made.json.read_bytes()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "annotations.json").write_text("{}")
    for output in (tmp_path / "set", tmp_path / "other"):
        with pytest.raises(ValueError, match="annotations.json holds no tiles .* would be written over"):
            tile_coco(made.json, made.images, output)
    moved = made.json.rename(tmp_path / "set.json")
    with pytest.raises(ValueError, match="would come among the images"):
        tile_coco(moved, made.images, tmp_path / "set")
    assert moved.read_bytes() == before and len(list(made.images.iterdir())) == 2
    for _ in range(2):  # tiles may be made anew
        path = tile_coco(moved, made.images, tmp_path / "tiles")
    with pytest.raises(ValueError, match="would be written over"):
        tile_coco(path, path.parent / "images", tmp_path / "tiles")


def test_a_small_image_is_one_small_tile(tmp_path):
    made = toy.generate(tmp_path / "whole", "day", 1, seed=0, size=40)
    tiles = json.loads(tile_coco(made.json, made.images, tmp_path / "tiles", tile=96, scale=1.5).read_text())
    assert [(t["height"], t["width"]) for t in tiles["images"]] == [(60, 60)]
