"""Class counts come from the json; one that the user wrote himself must agree."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import toy

import peft_d2
from peft_d2.engine.checks import apply_class_count
from peft_d2.engine.config import load_config
from peft_d2.engine.errors import ConfigError


@pytest.mark.parametrize(
    ("architecture", "key"),
    [
        ("PD2MaskFormer", "MODEL.SEM_SEG_HEAD.NUM_CLASSES"),
        ("GeneralizedRCNN", "MODEL.ROI_HEADS.NUM_CLASSES"),
        ("RetinaNet", "MODEL.RETINANET.NUM_CLASSES"),
    ],
)
@pytest.mark.parametrize("wrapped", [False, True])
def test_count(
    toy_set: toy.ToySet, caplog: pytest.LogCaptureFixture, architecture: str, key: str, wrapped: bool
) -> None:
    peft_d2.register()
    names = ("PEFTModel", architecture) if wrapped else (architecture, "")
    opts = ["MODEL.DEVICE", "cpu", "MODEL.META_ARCHITECTURE", names[0], "MODEL.PEFT.META_ARCHITECTURE", names[1]]
    sets = [{"NAME": f"toy_{toy_set.json.parent.name}", "JSON": str(toy_set.json), "IMAGES": str(toy_set.images)}]
    opts += ["DATASETS.REGISTER", str(sets), "DATASETS.TRAIN", str((sets[0]["NAME"],)), "DATASETS.TEST", "()"]

    inherited = load_config("", opts=opts)
    with caplog.at_level(logging.INFO, "peft_d2"):
        apply_class_count(inherited.cfg, inherited.explicit)
    value = inherited.cfg
    for part in key.split("."):
        value = value[part]
    assert value == 3
    assert [r.getMessage().partition(":")[0] for r in caplog.records] == [key]

    right = load_config("", opts=[*opts, key, "3"])
    apply_class_count(right.cfg, right.explicit)

    wrong = load_config("", opts=[*opts, key, "4"])
    with pytest.raises(ConfigError, match=f"{key} is 4 but the json of data set .* lists 3 categories"):
        apply_class_count(wrong.cfg, wrong.explicit)


def test_explicit_in_the_top_file_only(toy_set: toy.ToySet, tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(
        "MODEL: {META_ARCHITECTURE: RetinaNet, RETINANET: {NUM_CLASSES: 9}}\n"
        f"DATASETS: {{TRAIN: [t1], TEST: [], REGISTER: [{{NAME: t1, JSON: {toy_set.json}, IMAGES: {toy_set.images}}}]}}"
    )
    (tmp_path / "inherits.yaml").write_text("_BASE_: base.yaml")
    loaded = load_config(str(tmp_path / "inherits.yaml"))
    apply_class_count(loaded.cfg, loaded.explicit)
    assert loaded.cfg.MODEL.RETINANET.NUM_CLASSES == 3
    loaded = load_config(str(tmp_path / "base.yaml"))
    with pytest.raises(ConfigError, match="NUM_CLASSES is 9"):
        apply_class_count(loaded.cfg, loaded.explicit)


def test_data_named_later_than_the_count(toy_set: toy.ToySet, tmp_path: Path) -> None:
    """A published config counts the classes of its own data; naming other data on the command line replaces both."""
    (tmp_path / "published.yaml").write_text(
        "MODEL: {META_ARCHITECTURE: RetinaNet, RETINANET: {NUM_CLASSES: 80}}\nDATASETS: {TRAIN: [coco_2017_train]}"
    )
    sets = [{"NAME": "t2", "JSON": str(toy_set.json), "IMAGES": str(toy_set.images)}]
    opts = ["DATASETS.REGISTER", str(sets), "DATASETS.TRAIN", "('t2',)"]
    loaded = load_config(str(tmp_path / "published.yaml"), opts=opts)
    apply_class_count(loaded.cfg, loaded.explicit)
    assert loaded.cfg.MODEL.RETINANET.NUM_CLASSES == 3
    loaded = load_config(str(tmp_path / "published.yaml"), opts=[*opts, "MODEL.RETINANET.NUM_CLASSES", "80"])
    with pytest.raises(ConfigError, match="NUM_CLASSES is 80"):
        apply_class_count(loaded.cfg, loaded.explicit)
