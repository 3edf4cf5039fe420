"""The converter on a small set in the published layout."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image
from prepare_dsb2018 import convert, read_splits

from peft_d2.data.segmentation import segmentation_to_mask
from peft_d2.data.validation import check_coco

SPLITS = {"fluorescence_train": ["a" * 12, "b" * 12], "histology_val": ["c" * 12]}


@pytest.fixture
def published(tmp_path):
    """Folder per image with long ids; returns it and the masks by id."""
    rng = np.random.default_rng(0)
    masks = {}
    for letter, size in (("a", (32, 32)), ("b", (32, 32)), ("c", (32, 40)), ("d", (16, 16))):
        folder = tmp_path / "stage1_train" / (letter * 64)
        (folder / "images").mkdir(parents=True)
        (folder / "masks").mkdir()
        grey = rng.integers(0, 90, (*size, 1), dtype=np.uint8)
        pixels = np.concatenate([grey * (2 if letter == "c" else 1), grey, grey], axis=2)
        Image.fromarray(pixels).convert("RGBA").save(folder / "images" / f"{letter * 64}.png")
        masks[letter * 12] = []
        for number in range(3):
            mask = np.zeros(size, dtype=bool)
            mask[10 * number : 10 * number + 6, 3:9] = True
            Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "masks" / f"{number}.png")
            masks[letter * 12].append(mask)
    return tmp_path / "stage1_train", masks


@pytest.mark.parametrize("polygons", [True, False])
def test_splits_masks_and_names(published, tmp_path, polygons):
    source, masks = published
    counts = convert(source, tmp_path / "out", splits=SPLITS, polygons=polygons)
    assert counts == {"fluorescence_train": 6, "histology_val": 3}
    for split, ids in SPLITS.items():
        path = tmp_path / "out" / f"{split}.json"
        assert check_coco(path, tmp_path / "out" / split) == []
        data = json.loads(path.read_text())
        assert [i["file_name"] for i in data["images"]] == [f"{i}.png" for i in ids]
        for image, name in zip(data["images"], ids, strict=True):
            stored = [a["segmentation"] for a in data["annotations"] if a["image_id"] == image["id"]]
            assert {isinstance(s, list) for s in stored} == {polygons}
            for segmentation, mask in zip(stored, masks[name], strict=True):
                assert np.array_equal(segmentation_to_mask(segmentation, *mask.shape), mask)


@pytest.mark.parametrize(
    ("splits", "error", "message"),
    [
        ({"fluorescence_train": ["e" * 12]}, FileNotFoundError, "1 of the 1 images of fluorescence_train"),
        ({"fluorescence_train": ["c" * 12]}, ValueError, "coloured"),
        ({"histology_train": ["a" * 12]}, ValueError, "colourless"),
    ],
)
def test_other_data_is_refused(published, tmp_path, splits, error, message):
    with pytest.raises(error, match=message):
        convert(published[0], tmp_path / "out", splits=splits)


def test_mask_of_another_size_is_refused(published, tmp_path):
    Image.new("L", (8, 8), 255).save(published[0] / ("a" * 64) / "masks" / "9.png")
    with pytest.raises(ValueError, match="8 x 8 px, the image 32 x 32"):
        convert(published[0], tmp_path / "out", splits=SPLITS)


def test_the_package_lists_disjoint_splits():
    splits = read_splits()
    assert {k: len(v) for k, v in splits.items()} == {
        "fluorescence_train": 200, "fluorescence_val": 50, "histology_train": 48, "histology_val": 24,
    }  # fmt: skip
    ids = [i for v in splits.values() for i in v]
    assert len(set(ids)) == len(ids)
    assert all(len(i) == 12 for i in ids)
