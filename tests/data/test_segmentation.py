"""Masks to polygons and run lengths and back; pycocotools draws and decodes."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from mask_shapes import mask_to_polygons, mask_to_rle
from pycocotools import mask as coco_mask

from peft_d2.data.segmentation import (
    decode_counts,
    mask_box,
    mask_to_compressed_rle,
    segmentation_to_mask,
)

MASKS = st.tuples(st.integers(1, 14), st.integers(1, 14)).flatmap(lambda shape: arrays(bool, shape))


@settings(max_examples=150, deadline=None)
@given(MASKS)
@pytest.mark.parametrize("form", [mask_to_polygons, mask_to_rle, mask_to_compressed_rle])
def test_forms_are_exact(form, mask):
    assert np.array_equal(segmentation_to_mask(form(mask), *mask.shape), mask)


@settings(max_examples=100, deadline=None)
@given(MASKS)
def test_counts_are_what_pycocotools_compresses(mask):
    runs = [(value, len(list(run))) for value, run in itertools.groupby(mask.ravel(order="F").tolist())]
    expected = [0] * runs[0][0] + [length for _, length in runs]
    compressed = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    assert decode_counts(compressed["counts"]) == expected == mask_to_rle(mask)["counts"]


@settings(max_examples=100, deadline=None)
@given(MASKS)
def test_box_holds_the_pixels(mask):
    ys, xs = np.nonzero(mask)
    size = [xs.max() - xs.min() + 1, ys.max() - ys.min() + 1] if len(xs) else [0, 0]
    assert mask_box(mask) == ([xs.min(), ys.min(), *size] if len(xs) else [0, 0, 0, 0])


def test_a_hole_is_cut_open():
    mask = np.ones((5, 5), dtype=bool)
    mask[2, 2] = False
    polygons = mask_to_polygons(mask)
    assert len(polygons) == 2
    assert all(len(polygon) >= 6 and len(polygon) % 2 == 0 for polygon in polygons)
