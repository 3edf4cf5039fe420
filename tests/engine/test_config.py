"""The config: defaults, idempotence, unknown keys, the device."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
from detectron2.config import get_cfg

import peft_d2
from peft_d2.data.config import base_architecture
from peft_d2.engine.config import load_config
from peft_d2.engine.errors import ConfigError

TINY = Path(__file__).with_name("tiny.yaml")


def test_twice_is_once() -> None:
    once, twice = get_cfg(), get_cfg()
    peft_d2.add_config(once)
    peft_d2.add_config(twice)
    twice.MODEL.PEFT.LR_FACTOR = 3.0
    twice.SOLVER.OPTIMIZER = "ADAMW"
    peft_d2.add_config(twice)
    assert (twice.MODEL.PEFT.LR_FACTOR, twice.SOLVER.OPTIMIZER) == (3.0, "ADAMW")
    twice.MODEL.PEFT.LR_FACTOR, twice.SOLVER.OPTIMIZER = 1.0, "SGD"
    assert once == twice


def test_after_an_upstream_package() -> None:
    cfg = get_cfg()
    cfg.SOLVER.OPTIMIZER, cfg.SOLVER.BACKBONE_MULTIPLIER = "ADAMW", 0.1
    cfg.INPUT.DATASET_MAPPER_NAME = "mask_former_semantic"
    peft_d2.add_config(cfg)
    assert (cfg.SOLVER.OPTIMIZER, cfg.SOLVER.BACKBONE_MULTIPLIER) == ("ADAMW", 0.1)
    assert cfg.INPUT.DATASET_MAPPER_NAME == "mask_former_semantic"


def test_plain_detectron2_keeps_its_optimizer() -> None:
    cfg = get_cfg()
    peft_d2.add_config(cfg)
    assert (cfg.SOLVER.OPTIMIZER, cfg.SOLVER.BACKBONE_MULTIPLIER) == ("SGD", 1.0)


@pytest.mark.parametrize(
    ("text", "wrong", "nearest"),
    [
        ("MODEL: {PEFT: {METHOD: []}}", "MODEL.PEFT.METHOD", "MODEL.PEFT.METHODS"),
        ("SOLVER: {BASE_RL: 0.1}", "SOLVER.BASE_RL", "SOLVER.BASE_LR"),
        ("MODEL: {MASK_FORMR: {NHEADS: 2}}", "MODEL.MASK_FORMR", "MODEL.MASK_FORMER"),
    ],
)
def test_unknown_key(tmp_path: Path, text: str, wrong: str, nearest: str) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"a.yaml: config key '{wrong}' does not exist.*'{nearest}'"):
        load_config(str(path))


def test_unknown_key_on_the_command_line() -> None:
    with pytest.raises(ConfigError, match="command line: config key 'SOLVER.MAX_ITR' .*'SOLVER.MAX_ITER'"):
        load_config("", opts=["SOLVER.MAX_ITR", "3"])
    with pytest.raises(ConfigError, match="stands alone"):
        load_config("", opts=["SOLVER.MAX_ITER"])
    with pytest.raises(ConfigError, match="SOLVER.MAX_ITER many"):
        load_config("", opts=["SOLVER.MAX_ITER", "many"])


def test_missing_file() -> None:
    with pytest.raises(ConfigError, match="'nowhere.yaml' does not exist"):
        load_config("nowhere.yaml")


def test_a_config_that_wants_to_run_code(tmp_path: Path) -> None:
    path, trace = tmp_path / "a.yaml", tmp_path / "trace"
    path.write_text(f"OUTPUT_DIR: !!python/object/apply:os.system ['touch {trace}']")
    with pytest.raises(ValueError, match="a.yaml"):
        load_config(str(path))
    assert not trace.exists()


def test_a_peft_file_on_top_of_a_model(tmp_path: Path) -> None:
    path = tmp_path / "lora.yaml"
    path.write_text("MODEL: {META_ARCHITECTURE: PEFTModel, PEFT: {METHODS: [{NAME: lora, TARGETS: [qkv]}]}}")
    loaded = load_config(str(TINY), str(path), ["SOLVER.MAX_ITER", "4"])
    assert loaded.cfg.MODEL.PEFT.META_ARCHITECTURE == base_architecture(loaded.cfg) == "PD2MaskFormer"
    keys = ("MODEL.SEM_SEG_HEAD.NUM_CLASSES", "MODEL.PEFT.METHODS", "SOLVER.MAX_ITER")
    assert [loaded.explicit[key] for key in keys] == [0, 1, 2]


def test_methods_alone_switch_peft_on() -> None:
    cfg = load_config(str(TINY), opts=["MODEL.PEFT.TRAIN", "['class_embed']"]).cfg
    assert (cfg.MODEL.META_ARCHITECTURE, cfg.MODEL.PEFT.META_ARCHITECTURE) == ("PEFTModel", "PD2MaskFormer")


def test_what_a_base_file_says_is_not_explicit(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("MODEL: {SEM_SEG_HEAD: {NUM_CLASSES: 7}}")
    (tmp_path / "top.yaml").write_text("_BASE_: base.yaml\nSOLVER: {MAX_ITER: 3}")
    loaded = load_config(str(tmp_path / "top.yaml"))
    assert loaded.cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES == 7
    assert loaded.explicit == {"SOLVER.MAX_ITER": 0}


def test_no_cuda_is_one_line(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with caplog.at_level(logging.WARNING, "peft_d2"):
        cfg = load_config("", opts=["MODEL.DEVICE", "cuda"]).cfg
    assert cfg.MODEL.DEVICE == "cpu"
    assert [r.getMessage() for r in caplog.records] == [
        "MODEL.DEVICE is 'cuda' but torch sees no CUDA device here: running on the CPU."
    ]


def test_the_arithmetic_of_published_files(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    code = "[int(x * 0.1 * 640) for x in range(5, 21)]"
    path.write_text(f'INPUT: {{MIN_SIZE_TRAIN: !!python/object/apply:eval ["{code}"]}}')
    found = load_config(str(path)).cfg.INPUT.MIN_SIZE_TRAIN
    assert found == tuple(int(x * 0.1 * 640) for x in range(5, 21))


@pytest.mark.parametrize(
    "code",
    [
        "__import__('os').system('touch TRACE')",
        "[__import__('os').system('touch TRACE') for x in range(1)]",
        "[open('TRACE', 'w') for x in range(1)]",
        "[x ** 9 ** 9 for x in range(9)]",
        "[x for x in range(10 * 10 * 10 * 10 * 10 * 10)]",
        "[x for x in ().__class__.__base__.__subclasses__()]",
        "[y for x in range(3)]",
    ],
)
def test_other_code_in_that_tag_is_refused(tmp_path: Path, code: str) -> None:
    trace = tmp_path / "trace"
    path = tmp_path / "a.yaml"
    path.write_text(f'INPUT: {{MIN_SIZE_TRAIN: !!python/object/apply:eval ["{code.replace("TRACE", str(trace))}"]}}')
    with pytest.raises(ConfigError, match="a.yaml.*code in config files is not run"):
        load_config(str(path))
    assert not trace.exists()


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("MODEL.PEFT.METHODS", "[{'NAME': 'lora', 'RANK': 2, 'RANK': 3}]", "'RANK' is given twice"),
        ("SOLVER.STEPS", "(" * 2000 + ")" * 2000, "nested too deeply|expected a tuple"),
        ("SOLVER.MAX_ITER", "[[1]]", "MAX_ITER"),
        ("OUTPUT_DIR", "{'a': 1, 'a': 2}", "'a' is given twice"),
    ],
)
def test_values_that_are_none(tmp_path: Path, key: str, value: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        load_config("", opts=[key, value])
    assert len(str(error.value)) < 500
    if "twice" in said:  # the same text in a file
        node, _, leaf = key.rpartition(".")
        text = f'{leaf}: "{value}"'
        for part in reversed(node.split(".") if node else []):
            text = f"{part}: {{{text}}}"
        (tmp_path / "a.yaml").write_text(text)
        with pytest.raises(ConfigError, match=f"a.yaml.*{said}"):
            load_config(str(tmp_path / "a.yaml"))


@pytest.mark.parametrize("text", ["- 1", "MODEL: [", "_BASE_: a.yaml", "MODEL: 3"])
def test_files_that_are_no_config(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match="a.yaml"):
        load_config(str(tmp_path / "a.yaml"))
