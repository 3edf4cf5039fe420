"""The published recipes move image and masks together, whatever form the masks have.

The image itself is the oracle: its objects are white on black, so that the augmented image shows where they are.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageDraw

pytest.importorskip("detectron2", reason="needs Detectron2")

from detectron2.data import transforms as T  # noqa: E402
from detectron2.structures import BoxMode  # noqa: E402
from mask_shapes import mask_to_polygons, mask_to_rle  # noqa: E402

from peft_d2.data.augmentation import large_scale_jitter_recipe, longest_side_recipe, resize_recipe  # noqa: E402
from peft_d2.data.mappers import InstanceMapper, PanopticMapper, SemanticMapper  # noqa: E402
from peft_d2.data.segmentation import mask_to_compressed_rle  # noqa: E402

FORMS = {
    "polygons": mask_to_polygons,
    "run lengths": mask_to_rle,
    "compressed": mask_to_compressed_rle,
    "array": lambda mask: mask.astype(np.uint8),
}
RECIPES = {
    "jitter": large_scale_jitter_recipe,
    "resize": lambda cfg: resize_recipe(cfg, semantic=False),
    "longest side": lambda cfg: longest_side_recipe(cfg, train=True),
}


@pytest.fixture(scope="module")
def cfg():
    import peft_d2
    from peft_d2.engine.config import load_config

    peft_d2.register()
    cfg = load_config("").cfg
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.IMAGE_SIZE, cfg.INPUT.MIN_SCALE, cfg.INPUT.MAX_SCALE = 96, 0.1, 2.0
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (40, 64, 90), 150
    cfg.INPUT.CROP.ENABLED, cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = True, "absolute", (48, 48)
    cfg.MODEL.SAM.IMAGE_SIZE = 80
    return cfg


def _world(folder, seed):
    """An image with one ellipse or rectangle, its mask, and the files and record of it."""
    rng = np.random.default_rng(seed)
    width, height = (int(v) for v in rng.integers(40, 90, 2))
    canvas = Image.new("1", (width, height))
    x, y = rng.uniform(0, width * 0.6), rng.uniform(0, height * 0.6)
    box = [x, y, x + rng.uniform(12, width), y + rng.uniform(12, height)]
    (ImageDraw.Draw(canvas).ellipse if seed % 2 else ImageDraw.Draw(canvas).rectangle)(box, fill=1)
    mask = np.asarray(canvas)
    Image.fromarray(np.repeat(mask[..., None], 3, 2).astype(np.uint8) * 255).save(folder / "a.png")
    labels = np.where(mask, 1, 0).astype(np.uint8)
    Image.fromarray(np.stack([labels * 7, 0 * labels, 0 * labels], -1)).save(folder / "pan.png")
    Image.fromarray(labels).save(folder / "sem.png")
    return mask, {"file_name": str(folder / "a.png"), "image_id": 1, "height": height, "width": width}


def _sample(mapper, record, seed):
    np.random.seed(seed)
    return mapper(record)


def _grown(mask, times=1):
    for _ in range(times):
        padded = np.pad(mask, 1)
        mask = np.any([padded[1 + y : padded.shape[0] - 1 + y, 1 + x : padded.shape[1] - 1 + x]
                       for y in (-1, 0, 1) for x in (-1, 0, 1)], axis=0)  # fmt: skip
    return mask


def assert_alike(one, other, border=1):
    """Equal but for ``border`` px at the rims, which may lie outside the picture."""
    assert one.shape == other.shape
    far = (one & ~_grown(other, border)) | (other & ~_grown(one, border))
    far |= (one & ~other & ~_grown(~one, border)) | (other & ~one & ~_grown(~other, border))
    different = int(far[border:-border, border:-border].sum())
    assert different == 0


@pytest.mark.parametrize("recipe", RECIPES)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**31))
def test_masks_of_all_forms_lie_where_the_object_is(cfg, tmp_path, recipe, seed):
    mask, record = _world(tmp_path, seed)
    found = {}
    for name, form in FORMS.items():
        mapper = InstanceMapper(RECIPES[recipe](cfg), "RGB")
        objects = [{"segmentation": form(mask), "category_id": 0, "bbox": [0, 0, 1, 1], "bbox_mode": BoxMode.XYWH_ABS}]
        sample = _sample(mapper, {**record, "annotations": objects}, seed)
        image = sample["image"].numpy()
        masks = sample["instances"].gt_masks.numpy()
        found[name] = masks[0] if len(masks) else np.zeros(image.shape[1:], dtype=bool)
    assert np.array_equal(found["run lengths"], found["compressed"])
    assert np.array_equal(found["run lengths"], found["array"])
    assert_alike(found["run lengths"], found["polygons"])
    assert_alike(found["run lengths"], image[0] > 200, border=2)  # bilinear rims are grey, and padding is 128
    if recipe == "jitter":
        assert image.shape == (3, 96, 96)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**31))
def test_label_images_move_as_masks_do(cfg, tmp_path, seed):
    mask, record = _world(tmp_path, seed)
    objects = [{"segmentation": mask_to_rle(mask), "category_id": 1, "bbox": [0, 0, 1, 1],
                "bbox_mode": BoxMode.XYWH_ABS}]  # fmt: skip
    recipe = large_scale_jitter_recipe(cfg)
    instances = _sample(InstanceMapper(recipe, "RGB"), {**record, "annotations": objects}, seed)["instances"]
    labels = {"pan_seg_file_name": str(tmp_path / "pan.png"), "sem_seg_file_name": str(tmp_path / "sem.png")}
    segments = [{"id": 7, "category_id": 1, "iscrowd": 0}]
    panoptic = _sample(PanopticMapper(recipe, "RGB", 0, 255), {**record, **labels, "segments_info": segments}, seed)
    assert np.array_equal(instances.gt_masks.numpy(), panoptic["instances"].gt_masks.numpy())
    semantic = panoptic["sem_seg"].numpy()
    expected = instances.gt_masks[0].numpy() if len(instances) else np.zeros((96, 96), dtype=bool)
    assert np.array_equal(semantic == 1, expected)
    padding = (panoptic["image"].numpy() == 128).all(axis=0)
    assert set(np.unique(semantic)) <= {0, 1, 255}
    assert (semantic[padding & _inner(padding)] == 255).all()
    sample = _sample(SemanticMapper(resize_recipe(cfg, semantic=True), "RGB", 0, 255), {**record, **labels}, seed)
    one = (sample["sem_seg"] == 1).numpy()
    assert_alike(one, sample["image"].numpy()[0] > 127, border=2)


def _inner(mask):
    return ~_grown(~mask)


def test_what_the_jitter_draws(cfg):
    """Scales of a tenth to twice the size, flips in half of the cases, and padding on the right and below alone."""
    image = np.zeros((60, 60, 3), dtype=np.uint8)
    image[:, :30] = 250
    sizes, flipped = [], []
    for _ in range(200):
        picture = T.AugInput(image.copy())
        T.AugmentationList(large_scale_jitter_recipe(cfg))(picture)
        assert picture.image.shape == (96, 96, 3)
        inside = (picture.image != 128).all(axis=2)
        height, width = inside.any(axis=1).sum(), inside.any(axis=0).sum()
        assert inside[:height, :width].mean() > 0.95
        if width < 90:
            flipped.append(bool(picture.image[0, 0, 0] < 100))
        sizes.append(max(height, width))
    assert min(sizes) < 25 and max(sizes) == 96 and np.mean(np.array(sizes) == 96) > 0.4  # half are of 1 to 2
    assert 0.3 < np.mean(flipped) < 0.7
