"""The toy world: deterministic, well formed, and two domains apart in look and classes."""

from __future__ import annotations

import json

import numpy as np
import pytest
import toy
from PIL import Image

from peft_d2.data.segmentation import segmentation_to_mask
from peft_d2.data.validation import check_coco


@pytest.mark.parametrize("domain", ["day", "night"])
@pytest.mark.parametrize("masks", ["polygon", "rle"])
def test_json_holds_the_visible_masks(tmp_path, domain, masks):
    made = toy.generate(tmp_path, domain, 6, seed=3, masks=masks)
    assert check_coco(made.json, made.images) == []
    data = json.loads(made.json.read_text())
    for index in range(6):
        picture, visible, classes = toy.draw(domain, 3, index)
        stored = [a for a in data["annotations"] if a["image_id"] == index + 1]
        assert np.array_equal(np.asarray(Image.open(made.images / f"{index:05d}.png")), picture)
        assert [a["category_id"] - 1 for a in stored] == classes
        for annotation, mask in zip(stored, visible, strict=True):
            assert np.array_equal(segmentation_to_mask(annotation["segmentation"], 128, 128), mask)
            assert annotation["area"] == mask.sum()
        assert visible.sum(axis=0).max() <= 1  # nothing is seen twice


def test_same_seed_same_files(tmp_path):
    files = []
    for run in ("a", "b"):
        made = toy.generate(tmp_path / run, "night", 3, seed=5)
        files.append([made.json.read_bytes(), *(p.read_bytes() for p in sorted(made.images.iterdir()))])
    assert files[0] == files[1]
    assert not np.array_equal(toy.draw("night", 5, 0)[0], toy.draw("night", 6, 0)[0])


def test_domains_differ_in_look_and_classes_but_not_in_sizes():
    assert not set(toy.DOMAINS["day"].classes) & set(toy.DOMAINS["night"].classes)
    brightness, spans = {}, {}
    for domain in ("day", "night"):
        drawn = [toy.draw(domain, 0, i) for i in range(60)]
        brightness[domain] = np.mean([picture.mean() for picture, _, _ in drawn])
        # The width of what is seen: its law is the outline's radius, the same in both.
        spans[domain] = np.mean([m.any(axis=0).sum() for _, visible, _ in drawn for m in visible])
    assert brightness["day"] > 3 * brightness["night"]
    assert spans["day"] == pytest.approx(spans["night"], rel=0.25)


@pytest.mark.parametrize(("domain", "masks", "named"), [("noon", "polygon", "day"), ("day", "png", "rle")])
def test_unknown_choices_are_named(tmp_path, domain, masks, named):
    with pytest.raises(ValueError, match=named):
        toy.generate(tmp_path, domain, 1, 0, masks=masks)
