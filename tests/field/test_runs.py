"""Other people's configs, command lines and folders of runs: a situation a row."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import uuid
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

pytest.importorskip("detectron2")

from detectron2.modeling import build_model  # noqa: E402
from detectron2.structures import ImageList, Instances  # noqa: E402

import peft_d2  # noqa: E402
from peft_d2 import peft  # noqa: E402
from peft_d2.data.augmentation import detectron2_recipe, resize_recipe  # noqa: E402
from peft_d2.data.images import DatasetError  # noqa: E402
from peft_d2.data.validation import check_coco
from peft_d2.engine import launch  # noqa: E402
from peft_d2.engine.checks import check_run  # noqa: E402
from peft_d2.engine.config import load_config  # noqa: E402
from peft_d2.engine.errors import ConfigError  # noqa: E402
from peft_d2.models.checks import ModelConfigError  # noqa: E402
from peft_d2.models.layers.mask_classifier import prepare_targets  # noqa: E402
from peft_d2.storage import CheckpointError  # noqa: E402

from .conftest import ROOT, TINY, Own  # noqa: E402

BASE = f'_BASE_: "{TINY}"\n'

FILES: dict[str, tuple[str | bytes, str]] = {  # a config file, and what is said of it
    "UTF-16": (TINY.read_text().encode("utf-16"), "is no text in UTF-8"),
    "lines of Windows": (TINY.read_text().replace("\n", "\r\n"), ""),
    "a byte order mark": (b"\xef\xbb\xbf" + TINY.read_bytes(), ""),
    "json": (f'{{"_BASE_": "{TINY}", "SOLVER": {{"MAX_ITER": 9}}}}', ""),
    "merged keys": (f"{BASE}SOLVER:\n  <<: {{MAX_ITER: 9}}\n", ""),
    "a whole rate": (f"{BASE}SOLVER:\n  BASE_LR: 1\n  CLIP_GRADIENTS:\n    CLIP_VALUE: 1\n", ""),
    "a rate as YAML does not read it": (f"{BASE}SOLVER:\n  BASE_LR: 1e-4\n", ""),
    "a rate that may be none": (f"{BASE}SOLVER:\n  BIAS_LR_FACTOR: null\n", ""),
    "no rate": (f"{BASE}SOLVER:\n  BASE_LR:\n", r"SOLVER.BASE_LR: is empty \(None\); expected a number"),
    "no number": (f"{BASE}SOLVER:\n  MAX_ITER: null\n", "SOLVER.MAX_ITER: is empty .*expected a whole number"),
    "no list": (f"{BASE}MODEL:\n  PEFT:\n    METHODS:\n", "METHODS: is empty .*expected a list"),
    "an empty group": (f"{BASE}SOLVER:\n", "expected a group of keys for SOLVER"),
    "a text for a list": (f"{BASE}MODEL:\n  PEFT:\n    METHODS: lora\n", "expected a list, .* for MODEL.PEFT.METHODS"),
    "a number for a text": (f"{BASE}OUTPUT_DIR: 3\n", "expected a text for OUTPUT_DIR"),
    "a version of other names": (f"{BASE}VERSION: 1\n", "has another name in the VERSION .* Leave that out"),
    "a web page": (
        "<!DOCTYPE html>\n<html><body>404</body></html>\n",
        "is a web page in place of the file, not a config",
    ),
    "a server's answer": ("404: Not Found", "is a server's error message"),
    "a pointer": ("version https://git-lfs.github.com/spec/v1\noid sha256:a\nsize 1\n", "is a pointer of Git LFS"),
    "numbers as keys": ("3: a\nb: c\n", "KEY: VALUE pairs, this one keys that are no texts"),
    "a group of another program": (
        f"{BASE}MODEL:\n  FC_CLIP:\n    DIM: 1\n",
        "'MODEL.FC_CLIP' does not exist, nor one like it. If another program has it .*docs/codebases.md",
    ),
    "a key of another program": (f"{BASE}INPUT:\n  CROP:\n    CROP_INSTANCE: True\n", "CROP_INSTANCE' .*nor one like"),
    "a value that is said twice": (f"{BASE}SOLVER:\n  MAX_ITER: 9\n  MAX_ITER: 9\n", ""),
    "the end of a key": (f"{BASE}SOLVER:\n  LR: 1\n", "nearest one is 'SOLVER.BASE_LR'"),
}


@pytest.mark.parametrize("name", FILES)
def test_config_files_are_read_or_refused_in_one_line(tmp_path: Path, name: str) -> None:
    content, said = FILES[name]
    path = tmp_path / "config.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    if not said:
        assert load_config(str(path)).cfg.MODEL.MASK_FORMER.HIDDEN_DIM == 32
        return
    with pytest.raises(ConfigError, match=said) as error:
        load_config(str(path))
    assert "\n" not in str(error.value) and str(path) in str(error.value)


@pytest.mark.parametrize(
    ("name", "said"), [("lazy.py", "LazyConfigs are"), ("folder", "is a folder"), ("x", "not exist")]
)
def test_what_is_no_yaml_file_is_called_what_it_is(tmp_path: Path, name: str, said: str) -> None:
    (tmp_path / "lazy.py").write_text("from detectron2.config import LazyCall\n")
    (tmp_path / "folder").mkdir()
    with pytest.raises(ConfigError, match=said):
        load_config(str(tmp_path / name))


PAIRS = {
    ("SOLVER.AMP.ENABLED", "true"): "SOLVER.AMP.ENABLED true: expected True or False",
    ("SOLVER.MAX_ITER", "1e3"): "SOLVER.MAX_ITER 1e3: expected a whole number",
    ("SOLVER.BASE_LR", "0,001"): "SOLVER.BASE_LR 0,001: expected a number",
    ("SOLVER.BASE_LR", "None"): "SOLVER.BASE_LR: is empty",
    ("DATASETS.TRAIN", "my_set"): "expected a tuple, .* with a comma behind a single one",
    ("MODEL.PEFT.TRAIN", "head"): "expected a list",
    ("solver.base_lr", "0.1"): "nearest one is 'SOLVER.BASE_LR'",
    ("MODEL.DEVICE", "gpu"): "MODEL.DEVICE is 'gpu'; expected 'cpu', 'cuda' or 'cuda:0'",
    ("MODEL.DEVICE", "xla"): "MODEL.DEVICE is 'xla'; expected",
    ("MODEL.DEVICE", "hpu"): "MODEL.DEVICE is 'hpu'; expected",
}


@pytest.mark.parametrize(
    ("pairs", "said"),
    [
        (["SOLVER.BASE_LR=0.1"], "two words, 'SOLVER.BASE_LR 0.1'"),
        (["SOLVER.BASE_LR=0.1", "SOLVER.MAX_ITER=3"], "two words, 'SOLVER.BASE_LR 0.1'"),
        (["MODEL.PEFT", "lora"], "MODEL.PEFT is a group of keys. Give one of them, such as MODEL.PEFT."),
    ],
)
def test_pairs_of_another_form(pairs: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_config(str(TINY), opts=pairs)


@pytest.mark.parametrize("pair", PAIRS)
def test_values_of_the_command_line_say_what_they_should_be(pair: tuple[str, str]) -> None:
    with pytest.raises(ConfigError, match=PAIRS[pair]) as error:
        load_config(str(TINY), opts=pair)
    assert "\n" not in str(error.value) and "<class" not in str(error.value)


SIZES = {
    ("INPUT.CROP.TYPE", "rel"): "CROP.TYPE is 'rel'; expected one of",
    ("INPUT.CROP.SIZE", "[300, 300]"): "CROP.SIZE is .*two shares above 0, up to 1",
    ("INPUT.CROP.SIZE", "[0.5]"): "CROP.SIZE is .*two shares",
    ("INPUT.CROP.TYPE", "absolute"): "CROP.SIZE is .*whole numbers of px for 'absolute'",
    ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "list"): "MIN_SIZE_TRAIN_SAMPLING is 'list'; expected 'choice' or 'range'",
    ("INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"): "MIN_SIZE_TRAIN is .*two sizes",
    ("INPUT.MIN_SIZE_TRAIN", "()"): "MIN_SIZE_TRAIN is .*at least one",
    ("INPUT.MIN_SIZE_TRAIN", "(-1,)"): "sizes above 0",
    ("INPUT.MAX_SIZE_TRAIN", "0"): "sizes above 0",
}


@pytest.mark.parametrize("pair", SIZES)
@pytest.mark.parametrize("recipe", [lambda cfg: resize_recipe(cfg, False), detectron2_recipe], ids=["ours", "theirs"])
def test_sizes_that_no_image_can_have(recipe: Any, pair: tuple[str, str]) -> None:
    cfg = load_config(str(TINY), opts=["INPUT.CROP.ENABLED", "True", *pair]).cfg
    with pytest.raises(DatasetError, match=SIZES[pair]):
        recipe(cfg)


def _options(own: Any, folder: Path, *opts: Any) -> list[Any]:
    train, val = own("train"), own("val", seed=1)
    sets = ["--train-json", train.json, "--train-images", train.images, "--name", uuid.uuid4().hex]
    sets += ["--val-json", val.json, "--val-images", val.images, "OUTPUT_DIR", folder]
    return ["--config-file", TINY, *sets, "SOLVER.MAX_ITER", 1, "DATALOADER.NUM_WORKERS", 0, *opts]


def test_what_a_folder_holds_is_said_before_it_is_written_over(own: Any, tool: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = _options(own, run)
    for before, said, silent in (
        (["--resume"], "holds no checkpoint yet; the run begins at iteration 0", "earlier run"),
        (
            [],
            r"holds 1 checkpoint\(s\) of an earlier run, up to model_final.pth: .*--resume would go on",
            "no checkpoint",
        ),
        (["--resume"], "Resuming from .*model_final.pth", "earlier run|no checkpoint yet"),
    ):
        code, text = tool("train_net", *before, *arguments)
        assert code == 0 and re.search(said, text) and not re.search(silent, text), text
    evaluated = ["--config-file", run / "config.yaml", "--eval-only"]
    for opts, said in (
        ([], "MODEL.WEIGHTS is empty: the model has random weights"),
        (["MODEL.WEIGHTS", tmp_path / "base.pth"], f"not what was trained.*append MODEL.WEIGHTS {run}/model_final.pth"),
        (["MODEL.WEIGHTS", run / "model_final.pth"], ""),
        (["--resume"], ""),
    ):
        (tmp_path / "base.pth").write_bytes((run / "model_final.pth").read_bytes())
        flags = opts if opts == ["--resume"] else []
        code, text = tool("train_net", *evaluated, *flags, *([] if flags else opts))
        warned = [line for line in text.splitlines() if "MODEL.WEIGHTS" in line and "WARNING" in line]
        assert code == 0 and len(warned) == bool(said) and re.search(said, "".join(warned)), text


def test_a_runs_config_on_a_machine_without_its_data(
    own: Any, tool: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """An adapter goes to somebody with its config.yaml and base: nothing but training reads the training set."""
    test, base, adapter = own("elsewhere", seed=2), tmp_path / "base.pth", tmp_path / "run" / "adapter"
    code, text = tool("train_net", *_options(own, tmp_path / "run"), "MODEL.WEIGHTS", "")
    assert code == 0, text
    model = build_model(load_config(str(tmp_path / "run" / "config.yaml")).cfg)
    torch.save({"model": model.state_dict()}, base)
    peft_d2.inject(model, [{"NAME": "lora", "RANK": 2, "TARGETS": ["qkv"]}], train=["class_embed"])
    peft_d2.save_adapter(model, adapter, classes=["circle", "square", "triangle"])
    for name in ("train", "val"):
        shutil.rmtree(tmp_path / name, ignore_errors=True)
    config, weights = ["--config-file", tmp_path / "run" / "config.yaml"], ["MODEL.WEIGHTS", base]
    opts = ["MODEL.META_ARCHITECTURE", "PEFTModel", "MODEL.PEFT.META_ARCHITECTURE", "PD2MaskFormer",
            "MODEL.PEFT.WEIGHTS", adapter, *weights]  # fmt: skip
    found = tmp_path / "found.json"
    code, text = tool("demo", *config, "--input", test.images, "--output", tmp_path / "drawn", "--json", found,
                      "--opts", *opts)  # fmt: skip
    assert code == 0 and "Not on this machine, and left out: data set" in caplog.text, text
    assert [row["name"] for row in json.loads(found.read_text())["categories"]] == ["circle", "square", "triangle"]
    code, text = tool("merge_adapter", *config, "--adapter", adapter, "--output", tmp_path / "merged.pth", *weights)
    assert code == 0, text
    code, text = tool("train_net", *config, "--eval-only", "--val-json", test.json, "--val-images", test.images, *opts)
    assert code == 0 and "inference/own_val/report.html" in text, text
    code, text = tool("train_net", *config)
    assert code == 1 and "annotations.json' is no file" in text, text


def test_another_set_under_the_name_of_the_configs_own(own: Any, tmp_path: Path) -> None:
    """As where a run's config is evaluated on another json: both are called own_val."""
    before, after, name = own("before"), own("after", seed=1), f"field_{uuid.uuid4().hex}"
    entry = {"NAME": f"{name}_val", "JSON": str(before.json), "IMAGES": str(before.images)}
    (tmp_path / "config.yaml").write_text(f"{BASE}DATASETS: {{REGISTER: [{json.dumps(entry)}], TEST: [{name}_val]}}")
    sets = ["--val-json", str(after.json), "--val-images", str(after.images), "--name", name, "--eval-only"]
    args = launch.training_parser().parse_args(["--config-file", str(tmp_path / "config.yaml"), *sets])
    cfg = launch.prepare_config(args, reads=("TEST",))
    assert cfg.DATASETS.REGISTER == [{**entry, "JSON": str(after.json), "IMAGES": str(after.images)}]


def test_a_whole_model_of_classes_in_another_order(own: Any, tmp_path: Path) -> None:
    """The checkpoint of a run without an adapter, and a merged one, say what their heads' rows stand for, too."""
    model, sets = build_model(load_config(str(TINY), opts=["MODEL.SEM_SEG_HEAD.NUM_CLASSES", "3"]).cfg), own("train")
    classes = ["square", "circle", "triangle"]
    torch.save({"model": model.state_dict(), "trainer": {"classes": classes}}, tmp_path / "model_final.pth")
    peft_d2.inject(model, train=["class_embed"])
    peft_d2.save_adapter(model, tmp_path / "adapter", classes=classes)
    peft_d2.load_adapter(model, tmp_path / "adapter")
    peft_d2.save_merged(model, tmp_path / "merged.pth")
    arguments = ["--config-file", str(TINY), "--val-json", str(sets.json), "--val-images", str(sets.images)]
    arguments += ["--train-json", str(sets.json), "--train-images", str(sets.images), "--name", uuid.uuid4().hex]
    for name in ("model_final.pth", "merged.pth"):
        opts = ["--eval-only", "MODEL.WEIGHTS", str(tmp_path / name), "OUTPUT_DIR", str(tmp_path / "out")]
        args = launch.training_parser().parse_args([*arguments, *opts])
        with pytest.raises(CheckpointError, match="trained on the classes .*in another order"):
            launch.evaluate(launch.prepare_config(args))


LORA = "[{'NAME': 'lora', 'RANK': 2, 'TARGETS': ['qkv']}]"


def test_what_detectron2s_trainer_saves_of_a_model_with_adapters(tmp_path: Path) -> None:
    """Its model_final.pth is the state dict of the injected model, and is given as MODEL.WEIGHTS afterwards."""
    peft_d2.register()
    base, final, methods = tmp_path / "base.pth", tmp_path / "model_final.pth", ["MODEL.PEFT.METHODS", LORA]

    def built(weights: Path, *opts: Any) -> Any:
        head = ["MODEL.PEFT.TRAIN", "['class_embed']"] if opts else []
        return build_model(load_config(str(TINY), opts=["MODEL.WEIGHTS", str(weights), *opts, *head]).cfg)

    torch.save({"model": build_model(load_config(str(TINY)).cfg).state_dict()}, base)
    model = built(base, *methods)
    for item in peft.trained_parameters(model):
        item.param.data.normal_()
    torch.save({"model": model.state_dict()}, final)
    again = built(final, *methods)
    expected, found = model.state_dict(), again.state_dict()
    assert expected.keys() == found.keys() and all(torch.equal(value, found[key]) for key, value in expected.items())
    peft_d2.save_adapter(again, tmp_path / "adapter")
    with peft_d2.disabled(again), peft_d2.disabled(model):
        assert all(torch.equal(value, peft.base_values(model)[key]) for key, value in peft.base_values(again).items())
    peft_d2.load_base(plain := built(base), base)
    peft_d2.load_adapter(plain, tmp_path / "adapter")
    for refused, said in (
        (lambda: peft_d2.load_base(built(base), final), "state dict of a model with adapters, not a base"),
        (lambda: peft_d2.load_base(built(base, *methods), final), "not a base"),
        (lambda: built(final, "MODEL.PEFT.METHODS", "[{'NAME': 'bitfit'}]"), "a model with other adapters"),
    ):
        with pytest.raises(CheckpointError, match=said):
            refused()


def test_samples_of_detectron2s_mapper_without_masks() -> None:
    things = Instances((8, 8), gt_classes=torch.tensor([1]))
    with pytest.raises(ModelConfigError, match="'a.png' has objects without masks .* MODEL.MASK_ON True"):
        prepare_targets(
            [{"file_name": "a.png", "instances": things}], ImageList(torch.zeros(1, 3, 8, 8), [(8, 8)]), 255
        )


def test_pixel_statistics_of_another_scale_are_named(own: Any, tool: Any, tmp_path: Path) -> None:
    statistics = ["MODEL.PIXEL_MEAN", "[0.485, 0.456, 0.406]", "MODEL.PIXEL_STD", "[0.229, 0.224, 0.225]"]
    code, text = tool("train_net", *_options(own, tmp_path / "run", *statistics, "DATASETS.TEST", "()"))
    assert code == 0 and "are from 0 to 255: multiply both by 255" in text


@pytest.mark.parametrize(("kind", "mean", "said"), [("BGR", 1, True), ("RGB", -1, True), ("RGB", 1, False)])
def test_pixel_statistics_in_the_other_order_are_named(
    kind: str, mean: int, said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    pairs = ["INPUT.FORMAT", kind, "MODEL.PIXEL_MEAN", str([123.675, 116.28, 103.53][::mean])]
    with contextlib.suppress(ConfigError):
        check_run(load_config(str(TINY), opts=pairs).cfg, evaluate=False)
    assert ("is ImageNet's in the order" in caplog.text) == said


def test_folders_of_runs(own: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    made: Own = own("train")
    arguments = ["--config-file", TINY, "--train-json", made.json, "--train-images", made.images]
    arguments += ["--name", uuid.uuid4().hex, "OUTPUT_DIR", "~/run"]
    cfg = launch.prepare_config(launch.training_parser().parse_args(list(map(str, arguments))))
    assert str(tmp_path / "run") == cfg.OUTPUT_DIR
    os.symlink(tmp_path / "nowhere", tmp_path / "run")
    with pytest.raises(ConfigError, match="it is a link to nothing"):
        check_run(cfg, evaluate=False)


def test_a_head_of_another_kind_and_a_device_without_values(own: Any, tool: Any, tmp_path: Path) -> None:
    for pair, said in (
        (
            ["MODEL.SEM_SEG_HEAD.NAME", "SemSegFPNHead"],
            "MODEL.SEM_SEG_HEAD.NAME is 'SemSegFPNHead'; it should be a head",
        ),
        (["MODEL.DEVICE", "meta"], "MODEL.DEVICE is 'meta', whose tensors hold no values"),
    ):
        code, text = tool("train_net", *_options(own, tmp_path / "run", *pair))
        assert code == 1 and f"error: {said}" in text and "Traceback" not in text, text


def test_a_class_count_beside_ones_own_data_is_not_passed_over(own: Any, tool: Any, tmp_path: Path) -> None:
    code, text = tool("train_net", *_options(own, tmp_path / "run", "MODEL.SEM_SEG_HEAD.NUM_CLASSES", 9))
    assert code == 1 and "NUM_CLASSES is 9 but the json" in text and "lists 3 categories" in text


def test_a_run_that_is_resumed_from_elsewhere(
    own: Any, tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, text = tool("train_net", *_options(own, "run", "DATASETS.TEST", "()"))
    assert code == 0, text
    (tmp_path / "run").rename(tmp_path / "moved")
    resumed = ["--resume", "--config-file", "moved/config.yaml", "SOLVER.MAX_ITER", 2]
    code, text = tool("train_net", *resumed)
    assert code == 1 and f"append OUTPUT_DIR '{tmp_path}/moved' to go on there" in text and not Path("run").exists()
    code, text = tool("train_net", *resumed, "OUTPUT_DIR", "moved")
    assert code == 0 and "Resuming after 1 iterations" in text


def test_arguments_of_the_tools_that_no_value_can_have(own: Any, tool: Any, tmp_path: Path) -> None:
    made: Own = own("train")
    cut = ["--json", made.json, "--images", made.images, "--output", tmp_path / "tiles"]
    config, bad = Path(shutil.copy(TINY, tmp_path)), tmp_path / "bad.yaml"
    bad.write_text("a: [1")
    out = ["--output", tmp_path / "tiles"]
    run = ["--config-file", config, "--train-json", made.json, "--train-images", made.images]
    for name, arguments, said in (
        ("tile_dataset", [*cut, "--scale", 0], "scale 0: expected .* a factor above 0"),
        ("tile_dataset", [*cut, "--tile", 0], "argument --tile: 0 is not at least 1"),
        ("tile_dataset", [*cut, "--scale", 1e9], "and 32768 px at most"),
        ("tile_dataset", [*cut, "--min-area", "nan"], "argument --min-area: nan is not at least 0"),
        ("tile_dataset", [*cut[:-1], made.images], "the tiles would come among the images"),
        ("tile_dataset", [*cut[:-1], ""], "the folder to write to has no name"),
        ("tile_dataset", ["--json", made.json, "--images", tmp_path, *cut[4:]], "00000.png"),
        ("check_dataset", [*cut[:4], "--class-map", bad], "bad.yaml: cannot be read .while parsing"),
        ("export", ["--config-file", config, "--output", config], "tiny.yaml is read, and would be written over"),
        ("export", ["--config-file", config, "--output", made.json], "annotations.json is no earlier export"),
        ("export", ["--config-file", config, "--output", ""], "--output '' is a folder. Choose another file"),
        ("recommend", [*run, "--memory", "nan"], "argument --memory: nan is not at least 0"),
        ("recommend", [*run, "--memory", 1e-9], "the budget is 1 parameters, and no place takes as few"),
        ("recommend", [*run[:3], bad, *run[4:], "--name", "bad"], "bad.yaml is not json"),
        ("compare", ["--configs", config, "no.yaml", *out], "config file no.yaml does not exist"),
        ("compare", ["--configs", config, config, *out], "two of them would be called .*_tiny"),
        ("compare", ["--configs", config, "--seeds", 1, 1, *out], "--seeds: 1 is there twice"),
        ("compare", ["--configs", config, "--seeds", -1, *out], "argument --seeds: -1 is not at least 0"),
        ("recommend", [*run, "--output", made.json], "annotations.json is read, and would be written over"),
        ("recommend", [*run, "--output", made.json / "a.yaml"], "a.yaml cannot be written"),
        ("analyze_peft", ["--config-file", config, "--json", tmp_path], "is a folder. Choose another file"),
        (
            "analyze_peft",
            ["--config-file", config, "--plot", tmp_path / "a.abc"],
            "a name that ends in .png",
        ),
        (
            "encode_classes",
            ["--weights", config, "--names", "a", "--output", config],
            "is read, and would be written over",
        ),
        ("visualize_data", ["--config-file", config, "--output", made.json / "a.png"], "cannot be written"),
        ("plot_metrics", [tmp_path, "--output", tmp_path], "is a folder. Choose another file"),
        ("ui", ["--config-file", config, "--host", "256.1.1.1.9"], "--host 256.1.1.1.9, --port None"),
        ("visualize_data", ["--config-file", TINY], "DATASETS.TRAIN is empty"),
        (
            "demo",
            ["--config-file", TINY, "--input", made.images, "--output", tmp_path, "--confidence-threshold", "nan"],
            "--confidence-threshold is nan; expected a number up to 1",
        ),
    ):
        code, text = tool(name, *arguments)
        assert code in (1, 2) and re.search(f"error: .*{said}", text) and not (tmp_path / "tiles").exists(), text
    assert config.read_bytes() == TINY.read_bytes() and json.loads(made.json.read_text()) == made.data
    assert tool("check_dataset", *cut[:4], "--save-json", tmp_path / "kept")[0] == 0
    (kept,) = (tmp_path / "kept").glob("train_*.json")
    assert json.loads(kept.read_text())["images"] == made.data["images"]


def test_predictions_that_could_not_be_written_are_refused_before_they_are_made(
    own: Any, tool: Any, tmp_path: Path
) -> None:
    photos = own("set", images=1).images
    for option in ("--json", "--results"):
        code, text = tool(
            "demo", "--config-file", TINY, "--input", photos, "--output", tmp_path / "out", option, tmp_path
        )
        assert code == 1 and f"{tmp_path} is a folder" in text and not list(tmp_path.glob("out/*.png"))


def test_a_current_folder_that_is_gone(tool: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    code, text = tool("train_net", "--config-file", TINY)
    assert code == 1 and text.strip() == (
        "error: the current folder does not exist any more. Change to another one (cd), and run again."
    )


def test_a_user_without_a_home(own: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    made = own("set", images=1)
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", lambda uid: {}[uid])  # as in a container that is run as any user
    monkeypatch.chdir(made.images.parent)
    assert check_coco(made.json, made.images, remember=True) == []
    assert not Path("~").exists()


def test_an_image_that_fails_costs_nothing_of_the_others(own: Any, tool: Any, tmp_path: Path) -> None:
    photos = own("set", images=2).images
    whole = sorted(photos.iterdir())[1].read_bytes()
    arguments = ["--config-file", TINY, "--input", photos, "--output", tmp_path / "out", "--json", tmp_path / "a.json"]
    (photos / "z.png").write_bytes(b"")
    code, text = tool("demo", *arguments)
    assert code == 1 and "z.png: is no image" in text and not list(tmp_path.glob("out/*.png"))
    (photos / "z.png").write_bytes(whole[: len(whole) // 2])  # its header is as it should be
    code, text = tool("demo", *arguments)
    assert code == 1 and "z.png" in text and "Traceback" not in text
    assert len(json.loads((tmp_path / "a.json").read_text())["images"]) == 2


def test_a_picture_that_resizing_would_round_to_nothing(tool: Any, tmp_path: Path) -> None:
    Image.new("RGB", (3000, 1)).save(tmp_path / "line.png")
    code, text = tool("demo", "--config-file", TINY, "--input", tmp_path / "line.png", "--output", tmp_path / "out")
    assert code == 0 and Image.open(tmp_path / "out" / "line.png").width >= 3000, text


@pytest.mark.parametrize(("key", "value"), [("SIZE", 0), ("OVERLAP", 96), ("OVERLAP", -1), ("SCALE", 0.0)])
def test_tiles_that_there_cannot_be_are_refused_before_training(key: str, value: float) -> None:
    cfg = load_config(str(TINY), opts=["TEST.TILES.ENABLED", "True", f"TEST.TILES.{key}", str(value)]).cfg
    with pytest.raises(ValueError, match=rf"TEST.TILES.{key}"):
        check_run(cfg, evaluate=False)


@pytest.mark.parametrize("case", ["ascii", "no reader", "closed", "full"])
def test_what_a_terminal_cannot_show(own: Any, tmp_path: Path, case: str) -> None:
    made: Own = own("s\u00e9t")
    (made.images / made.data["images"][0]["file_name"]).rename(made.images / "x.png")
    command = [sys.executable, "-m", "peft_d2", "check-data", "--json", made.json, "--images", made.images]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii" if case == "ascii" else "utf-8"}
    ends = {"closed": ">&-", "full": ">/dev/full", "no reader": "| true; exit ${PIPESTATUS[0]}"}
    made.data["images"][0]["file_name"] = "b\u00efld.png"
    made.write()
    line = ["bash", "-c", f'"$@" {ends.get(case, "")}', "bash", *map(str, command)]
    done = subprocess.run(line, capture_output=True, text=True, env=environment)
    assert done.returncode == (141 if case == "no reader" else 1) and "Traceback" not in done.stderr, done.stderr
    assert case != "ascii" or r"b\xefld.png" in done.stdout


PLAIN = ["MODEL.PEFT.METHODS", LORA, "DATASETS.TEST", "()"]


def test_what_somebody_put_into_a_checkpoints_folder(own: Any, tool: Any, tmp_path: Path) -> None:
    """It is found before the training, which could not be saved at its end; file managers' own files are none."""
    arguments = _options(own, run := tmp_path / "run", *PLAIN)
    assert tool("train_net", *arguments)[0] == 0
    resumed = ["--resume", *arguments, "SOLVER.MAX_ITER"]
    (run / "adapter_final" / "notes.md").write_text("the best one so far")
    code, text = tool("train_net", *resumed, 2)
    assert code == 1 and "adapter_final: that folder would be replaced as a whole, and it holds 'notes.md'" in text
    assert "lr: " not in text and (run / "adapter_final" / "notes.md").exists()
    (run / "adapter_final" / "notes.md").rename(run / "adapter_final" / ".DS_Store")
    code, text = tool("train_net", *resumed, 2)
    assert code == 0 and not (run / "adapter_final" / ".DS_Store").exists(), text


def test_keys_and_files_of_detectron2s_own_trainer(own: Any, tool: Any, tmp_path: Path) -> None:
    run = tmp_path / "run"
    arguments = _options(own, run, *PLAIN[:2], "TEST.PRECISE_BN.ENABLED", True)
    code, text = tool("train_net", *arguments)
    assert code == 0 and "TEST.PRECISE_BN is not done here" in text, text
    evaluated = ["--config-file", run / "config.yaml", "--eval-only"]
    code, text = tool("train_net", *evaluated, "TEST.EXPECTED_RESULTS", "[['segm', 'AP', 101.0, 0.1]]")
    assert code == 1 and "Result verification failed" in text, text
    code, text = tool("train_net", *evaluated, "MODEL.WEIGHTS", run / "model_final.pth")
    assert code == 1 and f"do not exist. There is {run}/adapter_final. MODEL.WEIGHTS takes the weights of a" in text
    assert "an adapter's folder goes into MODEL.PEFT.WEIGHTS" in text and "Traceback" not in text, text
    photos = ["--input", own("photos").images, "--output", tmp_path / "drawn"]
    code, text = tool("demo", *evaluated[:2], *photos, "--opts", "MODEL.PEFT.WEIGHTS", run / "adapter_final")
    assert code == 0, text  # the random base is that of the training, as in its evaluation
    for methods, said in (("['lora']", "expected a method like {NAME: lora, TARGETS: [...]}, got 'lora'"),):
        code, text = tool("train_net", *arguments, "MODEL.PEFT.METHODS", methods)
        assert code == 1 and said in text and "Traceback" not in text, text


def test_an_output_folder_that_is_an_address(own: Any, tool: Any, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    code, text = tool("train_net", *_options(own, "s3://bucket/run"))
    assert code == 1 and "OUTPUT_DIR 's3://bucket/run' is an address" in text and not Path("s3:").exists()
