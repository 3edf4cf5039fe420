"""The loaders: what is seen does not depend on workers, ranks, or where a run began."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
from itertools import islice

import pytest
import torch

pytest.importorskip("detectron2", reason="needs Detectron2")

import toy  # noqa: E402
from detectron2.utils import comm  # noqa: E402

from peft_d2.data.loader import build_test_loader, build_train_loader  # noqa: E402


def _flat(batches):
    return [
        (s["file_name"], s["image"], s["instances"].gt_classes, s["instances"].gt_masks) for b in batches for s in b
    ]


def _assert_same(a, b):
    assert len(a) == len(b) > 0
    for left, right in zip(a, b, strict=True):
        assert left[0] == right[0]
        assert all(torch.equal(x, y) for x, y in zip(left[1:], right[1:], strict=True))


def _take(cfg, count, start=0):
    return list(islice(build_train_loader(cfg, start), count))


@pytest.mark.parametrize(("workers", "start"), [(2, 0), (0, 3), (1, 4)])
def test_the_same_data_at_any_worker_count_and_start(make_cfg, toy_set, workers, start):
    cfg = make_cfg(toy_set)
    cfg.INPUT.CROP.ENABLED = True
    whole = _take(cfg, 6)
    cfg.DATALOADER.NUM_WORKERS = workers
    _assert_same(_flat(_take(cfg, 6 - start, start)), _flat(whole[start:]))


def test_ranks_share_out_the_single_process_batch(make_cfg, toy_set, monkeypatch):
    cfg = make_cfg(toy_set)
    whole = _take(cfg, 3)
    monkeypatch.setattr(comm, "get_world_size", lambda: 2)
    halves = []
    for rank in range(2):
        monkeypatch.setattr(comm, "get_rank", lambda rank=rank: rank)
        halves.append(_take(cfg, 3))
    joined = [a + b for a, b in zip(*halves, strict=True)]
    _assert_same(_flat(joined), _flat(whole))


def test_seeds_differ_and_training_random_numbers_are_left_alone(make_cfg, toy_set):
    cfg = make_cfg(toy_set)
    state = torch.get_rng_state()
    first = _take(cfg, 4)
    assert torch.equal(torch.get_rng_state(), state)
    cfg.SEED = 8
    assert [s["file_name"] for b in first for s in b] != [s["file_name"] for b in _take(cfg, 4) for s in b]


@pytest.fixture
def half_empty(tmp_path):
    made = toy.generate(tmp_path / "set", "day", 4, 0, size=48)
    data = json.loads(made.json.read_text())
    data["annotations"] = [a for a in data["annotations"] if a["image_id"] <= 2]
    made.json.write_text(json.dumps(data))
    return made


@pytest.mark.parametrize(("filtered", "images"), [(True, 2), (False, 4)])
def test_images_without_objects(make_cfg, half_empty, filtered, images):
    cfg = make_cfg(half_empty)
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = filtered
    samples = [s for b in _take(cfg, 2) for s in b]
    assert len({s["file_name"] for s in samples}) == images
    sizes = {len(s["instances"]) == 0 for s in samples}
    assert sizes == ({False} if filtered else {False, True})
    for sample in samples:
        assert sample["instances"].gt_masks.shape[1:] == sample["image"].shape[1:]


def test_nothing_to_train_on_is_an_error(make_cfg, half_empty):
    data = json.loads(half_empty.json.read_text())
    half_empty.json.write_text(json.dumps({**data, "annotations": []}))
    with pytest.raises(ValueError, match="FILTER_EMPTY_ANNOTATIONS"):
        build_train_loader(make_cfg(half_empty))


def test_repeat_factor_sampling_shows_rare_classes_more(make_cfg, tmp_path):
    made = toy.generate(tmp_path / "set", "day", 10, 0, size=48, objects=(1, 1))
    data = json.loads(made.json.read_text())
    for annotation in data["annotations"]:
        annotation["category_id"] = 2 if annotation["image_id"] == 1 else 1
    made.json.write_text(json.dumps(data))
    cfg = make_cfg(made)
    cfg.DATALOADER.SAMPLER_TRAIN = "RepeatFactorTrainingSampler"
    cfg.DATALOADER.REPEAT_THRESHOLD = 0.9  # the class of one image in ten: sqrt(0.9 / 0.1) = 3 times an epoch
    names = [s["image_id"] for b in _take(cfg, 6) for s in b]  # two epochs of 9 + 3
    assert names.count(1) == 6
    cfg.DATALOADER.SAMPLER_TRAIN = "Sampler"
    with pytest.raises(ValueError, match="TrainingSampler"):
        build_train_loader(cfg)


def test_test_loader_is_in_order_and_resizes(make_cfg, toy_set):
    cfg = make_cfg(toy_set)
    cfg.INPUT.MIN_SIZE_TEST = 96
    batches = list(build_test_loader(cfg, cfg.DATASETS.TEST[0]))
    assert [b[0]["image_id"] for b in batches] == list(range(1, 9))
    assert batches[0][0]["image"].shape == (3, 96, 96)
    cfg.TEST.TILES.ENABLED = True
    assert next(iter(build_test_loader(cfg, cfg.DATASETS.TEST[0])))[0]["image"].shape == (3, 64, 64)


@pytest.mark.parametrize("ended", [True, False])
def test_a_worker_outlives_sigterm_only_where_it_is_sure_to_be_ended(make_cfg, toy_set, ended):
    """Elsewhere a loader that is let go of in a cycle leaves it to SIGTERM to end its workers."""
    cfg = make_cfg(toy_set)
    cfg.DATALOADER.NUM_WORKERS = 1
    before = set(multiprocessing.active_children())
    with contextlib.closing(build_train_loader(cfg, closed=ended)) as loader:
        batches = iter(loader)
        next(batches)
        (worker,) = set(multiprocessing.active_children()) - before
        worker.terminate()
        worker.join(1 if ended else 20)
        assert worker.is_alive() == ended
        if ended:
            assert len(next(batches)) == cfg.SOLVER.IMS_PER_BATCH
    assert not worker.is_alive()
