"""Whole images by tiles: a model that finds exactly what it sees must give exactly the whole masks."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("detectron2", reason="needs Detectron2")

import toy  # noqa: E402
from detectron2.config import get_cfg  # noqa: E402
from detectron2.structures import BitMasks, Instances  # noqa: E402
from torch import nn  # noqa: E402

from peft_d2.data.config import add_data_config  # noqa: E402
from peft_d2.evaluation import tiling  # noqa: E402
from peft_d2.evaluation.coco import instances_to_results  # noqa: E402
from peft_d2.evaluation.tiling import TiledModel, inference_model  # noqa: E402


class FindsColours(nn.Module):
    """Every colour but black is an object; what is less than ``least`` px is overlooked."""

    def __init__(self, least=1, duplicates=1):
        super().__init__()
        self.least, self.duplicates, self.sizes = least, duplicates, set()

    def forward(self, batched_inputs):
        assert not self.training
        return [{"instances": self.one(record)} for record in batched_inputs]

    def one(self, record):
        height, width = record["height"], record["width"]
        self.sizes.add(tuple(record["image"].shape[1:]))
        ys = (torch.arange(height) + 0.5) * record["image"].shape[1] / height
        xs = (torch.arange(width) + 0.5) * record["image"].shape[2] / width
        labels = record["image"][0][ys.long()[:, None], xs.long()]
        found = [v for v in labels.unique().tolist() if v and (labels == v).sum() >= self.least] * self.duplicates
        instances = Instances((height, width))
        instances.pred_masks = torch.stack([labels == v for v in found]) if found else torch.zeros(0, height, width)
        instances.pred_classes = torch.tensor([v % 3 for v in found], dtype=torch.int64)
        instances.scores = torch.rand(len(found))
        return instances


def _image(labels):
    return torch.from_numpy(np.repeat(labels[None], 3, axis=0))


def _labels(seed, size=150):
    _, visible, _ = toy.draw("day", seed, 0, size=size, objects=(8, 12))
    labels = np.zeros((size, size), dtype=np.uint8)
    for number, mask in enumerate(visible):
        labels[mask] = number + 1
    return labels


def _predict(model, labels):
    record = {"image": _image(labels), "height": labels.shape[0], "width": labels.shape[1]}
    return model.eval()([record])[0]["instances"]


@pytest.mark.parametrize(("size", "overlap"), [(64, 24), (48, 16), (200, 20)])
@pytest.mark.parametrize("seed", range(5))
def test_objects_over_many_tiles_become_whole(size, overlap, seed):
    labels = _labels(seed)
    found = _predict(TiledModel(FindsColours(), size=size, scale=1, overlap=overlap), labels)
    masks = {m.numpy().tobytes() for m in found.pred_masks}
    assert len(found) == labels.max()
    assert masks == {(labels == v).tobytes() for v in range(1, labels.max() + 1)}
    for mask, box, label in zip(found.pred_masks, found.pred_boxes.tensor, found.pred_classes, strict=True):
        ys, xs = np.nonzero(mask.numpy())
        assert box.tolist() == [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1]
        assert int(label) == int(labels[mask.numpy()][0]) % 3
    assert found.scores.tolist() == sorted(found.scores.tolist(), reverse=True)


def test_an_object_larger_than_a_tile_is_one():
    labels = np.zeros((150, 150), dtype=np.uint8)
    labels[10:140, 20:130] = 4
    found = _predict(TiledModel(FindsColours(), size=48, scale=1, overlap=16), labels)
    assert len(found) == 1
    assert np.array_equal(found.pred_masks[0].numpy(), labels > 0)


def test_neighbours_stay_apart():
    labels = np.zeros((90, 90), dtype=np.uint8)
    labels[30:60, 20:45] = 3
    labels[30:60, 45:70] = 6  # the same class, touching, over a border of tiles
    found = _predict(TiledModel(FindsColours(), size=64, scale=1, overlap=30), labels)
    assert sorted(int(m.sum()) for m in found.pred_masks) == [750, 750]


def test_repeated_queries_of_one_tile_are_not_joined():
    labels = np.zeros((60, 60), dtype=np.uint8)
    labels[5:20, 5:20] = 3
    found = _predict(TiledModel(FindsColours(duplicates=2), size=64, scale=1, overlap=20), labels)
    assert len(found) == 2  # that is the model's own business, as without tiles


def test_slivers_of_a_cut_object_vanish():
    """A tile that sees only a strip, where the other tile sees the whole object, adds nothing."""
    labels = np.zeros((40, 100), dtype=np.uint8)
    labels[10:30, 30:52] = 3
    found = _predict(TiledModel(FindsColours(), size=60, scale=1, overlap=20), labels)
    assert [int(m.sum()) for m in found.pred_masks] == [20 * 22]


def test_tiles_are_enlarged_as_for_training():
    cfg = get_cfg()
    add_data_config(cfg)
    cfg.TEST.TILES.ENABLED, cfg.TEST.TILES.SIZE, cfg.TEST.TILES.SCALE, cfg.TEST.TILES.OVERLAP = True, 50, 2.0, 10
    cfg.INPUT.MIN_SIZE_TEST = 80
    cfg.TEST.DETECTIONS_PER_IMAGE = 2
    model = FindsColours()
    tiled = inference_model(cfg, model)
    assert inference_model(cfg, tiled) is tiled
    assert len(_predict(tiled, _labels(0))) == 2
    assert model.sizes == {(80, 80)}
    cfg.INPUT.MIN_SIZE_TEST = 0
    model.sizes.clear()
    _predict(inference_model(cfg, model), _labels(0))
    assert model.sizes == {(100, 100)}
    cfg.TEST.TILES.ENABLED = False
    assert inference_model(cfg, model) is model


def test_nothing_found_and_wrong_inputs():
    model = TiledModel(FindsColours(), size=50, scale=1, overlap=10).eval()
    assert len(_predict(model, np.zeros((70, 80), dtype=np.uint8))) == 0
    with pytest.raises(ValueError, match="resized to 80 x 70"):
        model([{"image": torch.zeros(3, 70, 80, dtype=torch.uint8), "height": 140, "width": 160}])
    with pytest.raises(ValueError, match="overlap 50"):
        TiledModel(FindsColours(), size=50, scale=1, overlap=50)


def test_masks_of_a_large_image_are_kept_cropped(monkeypatch):
    """The same masks, boxes and results as those of a small one, which are whole."""
    objects = []
    for number in range(5):
        mask = np.zeros((9, 7), dtype=bool)
        mask[1:8, 2 : 4 + number % 3] = True
        objects.append(tiling._Object(mask, (10 * number, 4, 10 * number + 7, 13), number % 2, 0.9 - number / 10))
    whole = tiling._instances(objects, 40, 60)
    monkeypatch.setattr(tiling, "_LARGE", 40 * 60 * 2)
    cropped = tiling._instances(objects, 40, 60)
    assert isinstance(whole.pred_masks, torch.Tensor) and isinstance(cropped.pred_masks, tiling.CroppedMasks)
    assert torch.equal(whole.pred_boxes.tensor, BitMasks(whole.pred_masks).get_bounding_boxes().tensor)
    assert [len(part) for part in cropped.pred_masks.split(16)] == [2, 2, 1]
    assert instances_to_results(cropped, 1) == instances_to_results(whole, 1)
    chosen = whole.scores > 0.65
    assert np.array_equal(np.asarray(cropped[chosen].to("cpu").pred_masks), whole[chosen].pred_masks.numpy())
