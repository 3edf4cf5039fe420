"""The training program: command line, set-up, one process or several."""

from __future__ import annotations

import argparse
import contextlib
import logging
import logging.handlers
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch

from peft_d2.compat import Detectron2Missing, require_detectron2
from peft_d2.engine.config import LoadedConfig, load_config
from peft_d2.engine.errors import ConfigError, LossNotFinite

logger = logging.getLogger(__name__)


def training_parser() -> argparse.ArgumentParser:
    """Detectron2's arguments, a PEFT file beside the config file, and own data in one command."""
    require_detectron2()
    from detectron2.engine import default_argument_parser

    parser = default_argument_parser()
    parser.add_argument("--peft-config", default="", metavar="FILE", help="one of configs/peft, on top")
    own = parser.add_argument_group("own data, COCO format")
    own.add_argument("--train-json", default="", metavar="FILE", help="annotations to train on")
    own.add_argument("--train-images", default="", metavar="DIR", help="folder of the training images")
    own.add_argument("--val-json", default="", metavar="FILE", help="annotations to evaluate on")
    own.add_argument("--val-images", default="", metavar="DIR", help="folder of the evaluation images")
    own.add_argument("--name", default="own", help="what the data sets are called: NAME_train and NAME_val")
    return parser


def main(arguments: list[str] | None = None) -> Any:
    """Run ``tools/train_net.py``: parse, launch the processes, train or evaluate."""
    args = training_parser().parse_args(arguments)
    from detectron2.engine import launch

    found = torch.cuda.device_count()
    if args.num_gpus * args.num_machines > 1 and args.num_gpus > found:
        print(f"error: --num-gpus {args.num_gpus}, but torch sees {found} CUDA devices here.", file=sys.stderr)
        raise SystemExit(1)
    return one_line_errors(
        lambda: launch(
            run,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    )


def run(args: argparse.Namespace) -> Any:
    """Train or evaluate in this process."""
    from peft_d2.engine.checkpointer import Checkpointer
    from peft_d2.engine.trainer import Trainer

    cfg = setup(args)
    if not args.eval_only:
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        return trainer.train()
    model = Trainer.build_model(cfg)
    checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, allow_other_base=cfg.MODEL.PEFT.ALLOW_OTHER_BASE)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
    return Trainer.test(cfg, model)


def setup(args: argparse.Namespace) -> Any:
    """Config, data sets, class counts and loggers, in this order; returns the frozen config.

    Raises:
        ConfigError: anything that the user can put right.
    """
    from detectron2.engine import default_setup
    from detectron2.utils import comm
    from detectron2.utils.logger import setup_logger

    with _lines_held_back() as release:
        cfg = prepare_config(args)
        _check_data(cfg)
        default_setup(cfg, args)
        setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="peft_d2")
        release()
    return cfg


def prepare_config(args: argparse.Namespace) -> Any:
    """The frozen config of a command line, data sets registered and class counts settled."""
    from peft_d2.data import register_from_config
    from peft_d2.engine.classes import apply_class_count
    from peft_d2.engine.factory import register

    try:
        register(upstream_names=True)
        loaded = load_config(args.config_file, args.peft_config, args.opts)
        _take_own_data(loaded, args)
        register_from_config(loaded.cfg)
        apply_class_count(loaded.cfg, loaded.explicit)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(str(error)) from error
    loaded.cfg.freeze()
    return loaded.cfg


def _check_data(cfg: Any) -> None:
    """Refuse annotations that would crash a run, before it starts.

    Raises:
        ConfigError: naming the data set, the defect and the remedy.
    """
    from peft_d2.data.checks import DatasetError, check_datasets

    try:
        check_datasets(cfg)
    except DatasetError as error:
        raise ConfigError(str(error)) from error


def _take_own_data(loaded: LoadedConfig, args: argparse.Namespace) -> None:
    """Put ``--train-json`` and its companions into the config, where they replace the file's data sets."""
    node = loaded.cfg.DATASETS
    for split, target in (("train", "TRAIN"), ("val", "TEST")):
        json_path, images = (getattr(args, f"{split}_{part}", "") for part in ("json", "images"))
        if bool(json_path) != bool(images):
            raise ConfigError(f"--{split}-json and --{split}-images belong together: give both or none.")
        if json_path:
            name = f"{args.name}_{split}"
            node.REGISTER = [*node.REGISTER, {"NAME": name, "JSON": json_path, "IMAGES": images}]
            node[target] = (name,)
            loaded.explicit[f"DATASETS.{target}"] = 3
        elif target == "TEST" and getattr(args, "train_json", None):
            node.TEST = ()


@contextlib.contextmanager
def _lines_held_back() -> Iterator[Callable[[], None]]:
    """Keep this package's log lines until the logger that knows ``OUTPUT_DIR`` is there, or something fails."""
    package = logging.getLogger("peft_d2")
    memory = logging.handlers.MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1)
    level = package.level
    package.addHandler(memory)
    package.setLevel(logging.DEBUG)

    def release() -> None:
        package.removeHandler(memory)
        for record in memory.buffer:
            package.handle(record)
        memory.buffer.clear()

    try:
        yield release
    finally:
        package.removeHandler(memory)
        package.setLevel(level if memory.buffer else logging.DEBUG)
        for record in memory.buffer:
            print(record.getMessage(), file=sys.stderr)


def one_line_errors(function: Callable[[], Any]) -> Any:
    """Call ``function``; what the user can put right ends the program with one line instead of a traceback."""
    from peft_d2 import io, peft

    known = (
        *(ConfigError, LossNotFinite, Detectron2Missing, peft.PeftError),
        *(io.CheckpointError, io.AdapterFileError, io.StorageError),
    )
    try:
        return function()
    except known as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from error
