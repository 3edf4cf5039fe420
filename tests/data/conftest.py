"""Small data sets and configs."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import toy

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))  # the converters are programs


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    """The memory of checked data sets is not the user's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="session", params=["polygon", "rle"])
def toy_set(request, tmp_path_factory):
    """Eight small pictures, with polygons and with run lengths."""
    folder = tmp_path_factory.mktemp(f"toy-{request.param}")
    return toy.generate(folder, "night", 8, seed=1, size=64, masks=request.param)


@pytest.fixture
def make_cfg():
    """A config whose training and test set is one COCO-format set."""
    config = pytest.importorskip("detectron2.config", reason="needs Detectron2")

    def make(made, name=None):
        from peft_d2.data.config import add_data_config

        cfg = config.get_cfg()
        add_data_config(cfg)
        name = name or f"set-{made.json}".replace("/", "_")
        cfg.DATASETS.REGISTER = [{"NAME": name, "JSON": str(made.json), "IMAGES": str(made.images)}]
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
        cfg.MODEL.META_ARCHITECTURE = "SomeoneElses"
        cfg.MODEL.DEVICE = "cpu"
        cfg.INPUT.DATASET_MAPPER_NAME = "mask_former_instance"
        cfg.INPUT.MIN_SIZE_TRAIN = (48, 64, 80)
        cfg.INPUT.MIN_SIZE_TEST = 64
        cfg.INPUT.FORMAT = "RGB"
        cfg.SOLVER.IMS_PER_BATCH = 4
        cfg.DATALOADER.NUM_WORKERS = 0
        cfg.SEED = 7
        return cfg

    return make
