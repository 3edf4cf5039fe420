"""Values that no model can be built with end a run in one line: the key, its value, what it should be."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import META_ARCH_REGISTRY
from torch import nn

import peft_d2
from peft_d2.data.images import DatasetError
from peft_d2.data.loader import build_train_loader
from peft_d2.engine import launch
from peft_d2.engine.checks import check_run
from peft_d2.engine.config import load_config
from peft_d2.engine.errors import ConfigError
from peft_d2.engine.factory import build_model
from peft_d2.engine.optimizer import build_lr_scheduler
from peft_d2.models.checks import ModelConfigError
from peft_d2.peft import PeftError

from .conftest import DINO, TINY

CONFIGS = Path(__file__).parents[2] / "configs"
SAM, R50 = CONFIGS / "sam" / "vit_b.yaml", CONFIGS / "coco" / "instance" / "mask2former_r50.yaml"
SEEM = CONFIGS / "seem" / "instance_focal_t.yaml"
HEAD, FORMER, MASK_DINO = "MODEL.SEM_SEG_HEAD", "MODEL.MASK_FORMER", "MODEL.MaskDINO"
ENCODED = f"{HEAD}.DEFORMABLE_TRANSFORMER_ENCODER_IN_FEATURES"
EXPECTED = (ConfigError, ModelConfigError, DatasetError, PeftError)  # what is said in one line
AT_LEAST_1 = "is 0; it should be a number of at least 1"
MAPS = "['res2', 'res3', 'res4', 'res5']"

BAD: list[tuple[Path, str, Any, str]] = [
    (TINY, f"{HEAD}.NUM_CLASSES", 0, AT_LEAST_1),
    (TINY, f"{HEAD}.MASK_DIM", 0, AT_LEAST_1),
    (TINY, f"{HEAD}.CONVS_DIM", 48, "is 48; it should be a multiple of 32"),
    (TINY, f"{HEAD}.IN_FEATURES", ["res2", "p9"], f"it should be some of {MAPS}, the backbone's maps; ['p9'] is not"),
    (TINY, ENCODED, ["res5", "p9"], "['p9'] is not among them"),
    (TINY, ENCODED, [], f"is []; it should be some of {MAPS}, which IN_FEATURES names"),
    (TINY, f"{HEAD}.NORM", "XN", "is 'XN'; it should be a norm that Detectron2 knows"),
    (TINY, f"{HEAD}.TRANSFORMER_ENC_LAYERS", -1, "is -1; it should be a number of at least 0"),
    (TINY, f"{HEAD}.NAME", "Nope", ": 'Nope' is not registered as SEM_SEG_HEADS; import the package that defines it"),
    (TINY, f"{HEAD}.PIXEL_DECODER_NAME", "MSDeform", "; the nearest names are ['MSDeformAttnPixelDecoder'"),
    (
        TINY,
        f"{FORMER}.TRANSFORMER_DECODER_NAME",
        "PD2MultiScale",
        "as TRANSFORMER_DECODER; the nearest names are [",
    ),
    (TINY, f"{FORMER}.TRANSFORMER_IN_FEATURE", "res5", "is 'res5'; it should be 'multi_scale_pixel_decoder'"),
    (TINY, f"{FORMER}.HIDDEN_DIM", 30, "is 30; it should be a multiple of 4"),
    (TINY, f"{FORMER}.NHEADS", 3, f"{HEAD}.CONVS_DIM is 32; it should be a multiple of {FORMER}.NHEADS, 3"),
    (TINY, f"{FORMER}.NHEADS", 0, AT_LEAST_1),
    (TINY, f"{FORMER}.NUM_OBJECT_QUERIES", 0, AT_LEAST_1),
    (TINY, "TEST.DETECTIONS_PER_IMAGE", -1, "is -1; it should be a number of at least 0"),
    (TINY, f"{FORMER}.DEC_LAYERS", 0, AT_LEAST_1),
    (TINY, f"{FORMER}.TRAIN_NUM_POINTS", 0, AT_LEAST_1),
    (TINY, f"{FORMER}.DROPOUT", 2.0, "is 2.0; it should be between 0 and 1"),
    (TINY, f"{FORMER}.IMPORTANCE_SAMPLE_RATIO", 1.5, "is 1.5; it should be between 0 and 1"),
    (TINY, "MODEL.BACKBONE.NAME", "PD2Swin", "the nearest names are ['PD2SwinTransformer']"),
    (TINY, "MODEL.META_ARCHITECTURE", "PD2Mask", "is not registered as META_ARCH; the nearest names are"),
    (TINY, "MODEL.PIXEL_MEAN", [1.0], "is [1.0]; it should be a list as long as PIXEL_STD"),
    (TINY, "MODEL.PIXEL_STD", [1.0, 0.0, 1.0], "it should be above 0 in each channel"),
    (TINY, "MODEL.SWIN.NUM_HEADS", [1, 2], "is [1, 2]; it should be a list of 4 entries, as DEPTHS"),
    (
        TINY,
        "MODEL.SWIN.NUM_HEADS",
        [1, 3, 4, 4],
        "EMBED_DIM * 2 is 32; it should be a multiple of MODEL.SWIN.NUM_HEADS",
    ),
    (
        TINY,
        "MODEL.SWIN.OUT_FEATURES",
        ["res2", "res7"],
        f"it should be some of {MAPS}, the backbone's maps; ['res7']",
    ),
    (TINY, "MODEL.SWIN.WINDOW_SIZE", 0, AT_LEAST_1),
    (DINO, f"{HEAD}.FEATURE_ORDER", "up", "is 'up'; it should be one of ['low2high', 'high2low']"),
    (DINO, f"{HEAD}.CONVS_DIM", 48, "is 48; it should be a multiple of 32"),
    (DINO, f"{MASK_DINO}.NHEADS", 3, f"{HEAD}.CONVS_DIM is 64; it should be a multiple of {MASK_DINO}.NHEADS, 3"),
    (DINO, f"{MASK_DINO}.HIDDEN_DIM", 30, "is 30; it should be a multiple of 4"),
    (DINO, f"{MASK_DINO}.DN", "some", "is 'some'; it should be one of ['no', 'standard', 'seg']"),
    (DINO, f"{MASK_DINO}.TRANSFORMER_DECODER_NAME", "Dino", "not registered as TRANSFORMER_DECODER"),
    (SAM, "MODEL.SAM.PATCH_SIZE", 0, AT_LEAST_1),
    (SAM, "MODEL.SAM.IMAGE_SIZE", 100, "is 100; it should be a multiple of PATCH_SIZE, 16"),
    (SAM, "MODEL.SAM.NUM_HEADS", 5, "MODEL.SAM.EMBED_DIM is 768; it should be a multiple of MODEL.SAM.NUM_HEADS, 5"),
    (SAM, "MODEL.SAM.DECODER_HEADS", 3, "MODEL.SAM.OUT_CHANNELS is 256; it should be a multiple of 24"),
    (SAM, "MODEL.SAM.GLOBAL_BLOCKS", [99], "is [99]; it should be numbers of the 12 blocks, from 0"),
    (SEEM, "MODEL.BACKBONE.FOCAL.FOCAL_LEVELS", [3], "is [3]; it should be a list of 4 entries, as DEPTHS"),
    (R50, "MODEL.RESNETS.DEPTH", 17, "is 17; it should be one of [18, 34, 50, 101, 152]"),
    (R50, "MODEL.RESNETS.DEPTH", 18, "RES2_OUT_CHANNELS is 256; it should be 64 for DEPTH 18"),
    (R50, "MODEL.RESNETS.NORM", "XN", "is 'XN'; it should be a norm that Detectron2 knows"),
    (R50, "MODEL.RESNETS.OUT_FEATURES", ["res9"], "is ['res9']; it should be some of ['stem', 'res2'"),
]


@pytest.mark.parametrize(("config", "key", "value", "said"), BAD)
def test_a_value_that_cannot_be_is_named(config: Path, key: str, value: Any, said: str) -> None:
    peft_d2.register(upstream_names=True)
    cfg = load_config(str(config), opts=["MODEL.DEVICE", "meta", key, str(value)]).cfg
    with pytest.raises(EXPECTED) as error, torch.device("meta"):
        build_model(cfg)
    message = str(error.value)
    assert said in message and key.rpartition(".")[2] in message and "\n" not in message


DATA = [
    ("INPUT.DATASET_MAPPER_NAME", "mask_former", "is not known. Expected one of ['mask_former_instance'"),
    ("INPUT.DATASET_MAPPER_NAME", "mask_former_panoptic", "needs 'pan_seg_file_name'"),
    ("INPUT.RANDOM_FLIP", "sideways", "is 'sideways'; expected one of ['horizontal', 'vertical', 'none']"),
    ("INPUT.FORMAT", "L", "INPUT.COLOR_AUG_SSD works on INPUT.FORMAT BGR or RGB, not 'L'"),
    ("DATALOADER.SAMPLER_TRAIN", "Sampler", "is not known. Expected TrainingSampler or RepeatFactorTrainingSampler"),
]


@pytest.mark.parametrize(("key", "value", "said"), DATA)
def test_data_that_cannot_be_fed(make_cfg: Callable[..., Any], key: str, value: str, said: str) -> None:
    with pytest.raises(EXPECTED, match=re.escape(said)) as error:
        build_train_loader(make_cfg(key, value))
    assert key in str(error.value)


SCHEDULES = [
    (("SOLVER.LR_SCHEDULER_NAME", "Polynomial"), "'Polynomial' .*: Unknown LR scheduler.* Expected WarmupPolyLR"),
    (("SOLVER.WARMUP_METHOD", "slow"), "SOLVER.WARMUP_METHOD is 'slow'; expected 'linear' or 'constant'"),
    (("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.STEPS", "(5, 3)"), r"STEPS \(5, 3\): .*that grow"),
]


@pytest.mark.parametrize(("opts", "said"), SCHEDULES)
def test_a_schedule_that_cannot_be(opts: tuple[str, ...], said: str) -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with pytest.raises(ConfigError, match=said):
        build_lr_scheduler(load_config(str(TINY), opts=opts).cfg, optimizer)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("SOLVER.BASE_LR", float("nan")), ("SOLVER.BASE_LR", float("inf")), ("SOLVER.WEIGHT_DECAY", -0.1),
        ("SOLVER.MOMENTUM", -1.0), ("MODEL.PEFT.LR_FACTOR", -2.0), ("SOLVER.MAX_ITER", 2**40), ("SOLVER.ACCUMULATE", 0),
        ("DATALOADER.NUM_WORKERS", -1), ("DATALOADER.NUM_WORKERS", 10**6), ("SEED", 2**70),
        ("SOLVER.CHECKPOINTS_TO_KEEP", -3), ("SOLVER.WARMUP_ITERS", -1), ("SOLVER.BACKBONE_MULTIPLIER", float("nan")),
        ("INPUT.MIN_SIZE_TEST", -1), ("INPUT.MAX_SIZE_TEST", 0),
    ],
)  # fmt: skip
def test_numbers_out_of_range(make_cfg: Callable[..., Any], key: str, value: float) -> None:
    cfg = make_cfg()
    cfg.merge_from_list([key, value])
    with pytest.raises(ConfigError, match=rf"{key} is .*expected"):
        check_run(cfg, evaluate=False)


def test_an_output_folder_whose_name_cannot_be_decoded(make_cfg: Callable[..., Any], tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"tr\xe4ining")
    with pytest.raises(ConfigError, match="Set PYTHONUTF8=1"):
        check_run(make_cfg("OUTPUT_DIR", str(folder)), evaluate=False)
    assert not folder.exists()


def test_a_bug_keeps_its_traceback() -> None:
    """A ValueError, or a registry's KeyError for something else, that nobody expects."""

    class WithBug(nn.Module):
        def __init__(self, cfg: Any) -> None:
            raise {"value": ValueError("a bug"), "key": KeyError("a bug")}[cfg.VERSION_OF_BUG]

    if "WithBug" in META_ARCH_REGISTRY:
        META_ARCH_REGISTRY._obj_map.pop("WithBug")
    META_ARCH_REGISTRY.register(WithBug)
    peft_d2.register()
    for kind, expected in (("value", ValueError), ("key", KeyError)):
        cfg = load_config(str(TINY), opts=["MODEL.META_ARCHITECTURE", "WithBug"]).cfg
        cfg.VERSION_OF_BUG = kind
        with pytest.raises(expected, match="a bug") as error:
            launch.one_line_errors(lambda cfg=cfg: build_model(cfg))
        assert error.type is expected


def test_an_interrupted_program_ends_with_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as left:
        launch.one_line_errors(interrupted)
    assert left.value.code == 130 and "--resume" in capsys.readouterr().err


def test_more_classes_than_the_model_has(tmp_path: Path) -> None:
    """A set that Detectron2 knows; those of the config's own set the number themselves."""
    name = "five_classes"
    if name not in DatasetCatalog:
        DatasetCatalog.register(name, lambda: [])
    MetadataCatalog.get(name).thing_classes = list("abcde")
    opts = ["DATASETS.TRAIN", f"('{name}',)", f"{HEAD}.NUM_CLASSES", "4", "OUTPUT_DIR", str(tmp_path)]
    cfg = load_config(str(TINY), opts=opts).cfg
    with pytest.raises(ConfigError, match=re.escape(f"{HEAD}.NUM_CLASSES is 4, but data set '{name}' has 5 (a, b, c,")):
        check_run(cfg, evaluate=False)


def test_a_test_set_that_nothing_evaluates(make_cfg: Callable[..., Any], tmp_path: Path) -> None:
    """Said before the training, not after it."""
    if "of_no_kind" not in DatasetCatalog:
        DatasetCatalog.register("of_no_kind", lambda: [])
    cfg = make_cfg()
    cfg.DATASETS.TEST = ("of_no_kind",)
    with pytest.raises(ConfigError, match="'of_no_kind': no evaluator for its evaluator_type ''"):
        check_run(cfg, evaluate=False)


@pytest.mark.parametrize("name", ["my set", "a/b", "..", "-x", ""])
def test_names_of_data_sets_that_could_not_name_a_folder(toy_set: Any, tmp_path: Path, name: str) -> None:
    opts = ["DATASETS.REGISTER", str([{"NAME": name, "JSON": str(toy_set.json), "IMAGES": str(toy_set.images)}])]
    args = launch.training_parser().parse_args(["--config-file", str(TINY), "OUTPUT_DIR", str(tmp_path), *opts])
    with pytest.raises(ConfigError, match="DATASETS.REGISTER: .*NAME"):
        launch.prepare_config(args)


def test_places_that_no_file_could_name() -> None:
    """Found when the model is built, not when the first checkpoint is to be written."""

    class Odd(nn.Module):
        def __init__(self, cfg: Any) -> None:
            super().__init__()
            self.add_module("my\nlayer", nn.Linear(4, 4))

    if "Odd" in META_ARCH_REGISTRY:
        META_ARCH_REGISTRY._obj_map.pop("Odd")
    META_ARCH_REGISTRY.register(Odd)
    peft_d2.register()
    methods = r"[{'NAME': 'lora', 'TARGETS': ['re:my\\slayer']}]"
    cfg = load_config(str(TINY), opts=["MODEL.META_ARCHITECTURE", "Odd", "MODEL.PEFT.METHODS", methods]).cfg
    with pytest.raises(EXPECTED, match="'my.*layer.lora_a' cannot be stored .* choose another place"):
        build_model(cfg)
