"""Files of box proposals: what Detectron2 reads is read, and nothing in them is run."""

from __future__ import annotations

import os
import pickle

import numpy as np
import pytest

pytest.importorskip("detectron2", reason="needs Detectron2")

from detectron2.data import DatasetCatalog  # noqa: E402
from detectron2.structures import BoxMode  # noqa: E402

from peft_d2.data.images import DatasetError  # noqa: E402
from peft_d2.data.loader import build_test_loader, build_train_loader  # noqa: E402
from peft_d2.data.registration import register_from_config  # noqa: E402
from peft_d2.engine.checks import check_run  # noqa: E402
from peft_d2.engine.config import add_config  # noqa: E402
from peft_d2.engine.errors import ConfigError  # noqa: E402


class Touches:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


@pytest.fixture
def cfg(make_cfg, toy_set, tmp_path):
    made = make_cfg(toy_set)
    add_config(made)
    register_from_config(made)
    made.MODEL.META_ARCHITECTURE, made.MODEL.WEIGHTS = "GeneralizedRCNN", ""
    made.MODEL.ROI_HEADS.NUM_CLASSES = 3
    made.INPUT.DATASET_MAPPER_NAME, made.OUTPUT_DIR = "", str(tmp_path / "run")
    made.MODEL.LOAD_PROPOSALS, made.MODEL.PROPOSAL_GENERATOR.NAME = True, "PrecomputedProposals"
    made.DATASETS.PROPOSAL_FILES_TRAIN = made.DATASETS.PROPOSAL_FILES_TEST = (str(tmp_path / "proposals.pkl"),)
    return made


@pytest.fixture
def content(cfg):
    ids = [record["image_id"] for record in DatasetCatalog.get(cfg.DATASETS.TRAIN[0])]
    boxes = [np.array([[1.0, 2, 30, 40], [0, 0, 9, 9]], dtype=np.float32)] * len(ids)
    scores = [np.array([0.5, 2.0], dtype=np.float32)] * len(ids)
    return {"ids": ids, "boxes": boxes, "objectness_logits": scores, "bbox_mode": BoxMode.XYXY_ABS}


def write(cfg, content, protocol=None):
    with open(cfg.DATASETS.PROPOSAL_FILES_TRAIN[0], "wb") as file:
        pickle.dump(content, file, protocol)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("old", [False, True])
def test_proposals_are_read(cfg, content, protocol, old):
    if old:
        content["indexes"], content["scores"] = content.pop("ids"), content.pop("objectness_logits")
    write(cfg, content, protocol)
    check_run(cfg, evaluate=False)
    for sample in (next(iter(build_train_loader(cfg)))[0], next(iter(build_test_loader(cfg, cfg.DATASETS.TEST[0])))[0]):
        assert sample["proposals"].objectness_logits.tolist() == [2.0, 0.5]


DAMAGE = {
    "code": (lambda c, canary: {**c, "more": Touches(canary)}, "asks for posix.system, which no proposals need"),
    "other images": (lambda c, _: {**c, "ids": [number + 10**6 for number in c["ids"]]}, "for 8 of the 8 im"),
    "some images": (lambda c, _: {k: v if k == "bbox_mode" else v[1:] for k, v in c.items()}, "for 1 of the 8 im"),
    "no list of boxes": (lambda c, _: {"ids": c["ids"]}, r"it holds \['ids'\]"),
    "other shapes": (lambda c, _: {**c, "boxes": [box[:, :3] for box in c["boxes"]]}, r"of shape \(2, 3\) for 2"),
    "weights": (lambda c, _: [1, 2], "no dict"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_cannot_be_used_is_one_line_before_the_training(cfg, content, damage, tmp_path):
    change, said = DAMAGE[damage]
    write(cfg, change(content, tmp_path / "canary"))
    for call in (lambda: check_run(cfg, evaluate=True), lambda: build_test_loader(cfg, cfg.DATASETS.TEST[0])):
        with pytest.raises((ConfigError, DatasetError), match=said):
            call()
    with pytest.raises(DatasetError, match=said):
        build_train_loader(cfg)
    assert not (tmp_path / "canary").exists()


def test_a_file_is_named_for_each_set(cfg):
    with pytest.raises(ConfigError, match=r"PROPOSAL_FILES_TRAIN: .*proposals\.pkl cannot be used: .*No such file"):
        check_run(cfg, evaluate=False)
    cfg.DATASETS.PROPOSAL_FILES_TEST = ()
    with pytest.raises(ConfigError, match=r"PROPOSAL_FILES_TEST names 0 file\(s\) for the 1 set"):
        check_run(cfg, evaluate=True)
    cfg.MODEL.LOAD_PROPOSALS = False
    with pytest.raises(ConfigError, match="PrecomputedProposals needs MODEL.LOAD_PROPOSALS True"):
        check_run(cfg, evaluate=False)
