"""The training program: command line, set-up, one process or several."""

from __future__ import annotations

import argparse
import contextlib
import logging
import logging.handlers
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from peft_d2.compat import Detectron2Missing, require_detectron2
from peft_d2.engine import processes
from peft_d2.engine.checks import check_run
from peft_d2.engine.config import PEFT_ARCHITECTURE, LoadedConfig, load_config
from peft_d2.engine.errors import ConfigError, LossNotFinite, WorkerDied, message_of, named

logger = logging.getLogger(__name__)


def training_parser() -> argparse.ArgumentParser:
    """Detectron2's arguments, a PEFT file beside the config file, and own data in one command."""
    require_detectron2()
    from detectron2.engine import default_argument_parser

    parser = default_argument_parser()
    parser.set_defaults(dist_url="auto")  # Detectron2's is one port per user: two runs would meet there
    parser.add_argument("--num-processes", type=int, default=0, metavar="N", help="processes per machine on the CPU")
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
    logging.raiseExceptions = False  # on a full disk each line of the log would become a traceback on the console
    return one_line_errors(lambda: processes.launch(run, (args,), layout(args), expected_errors()))


def layout(args: argparse.Namespace) -> processes.Layout:
    """The processes that a command line, or torchrun's environment, asks for.

    Raises:
        ConfigError: GPUs that are not there, or CPU processes for a run on the GPU.
    """
    for name in ("num_gpus", "num_processes", "num_machines", "machine_rank"):
        if getattr(args, name) < 0:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected 0 or more.")
    several = args.num_gpus > 1 or args.num_processes > 1 or args.num_machines > 1
    if not several and not processes.under_torchrun():
        return processes.Layout()
    with _silent():  # each process will say it again
        on_cpu = load_config(args.config_file, args.peft_config, args.opts).cfg.MODEL.DEVICE.startswith("cpu")
    if processes.under_torchrun():
        if several:
            raise ConfigError("torchrun started this process: leave --num-gpus, --num-processes, --num-machines out.")
        return processes.torchrun_layout(on_cpu)
    if args.num_processes and not on_cpu:
        raise ConfigError("--num-processes is for the CPU; on GPUs give --num-gpus, or append MODEL.DEVICE cpu.")
    found = torch.cuda.device_count()
    if on_cpu and args.num_gpus > 1:
        raise ConfigError(
            f"--num-gpus {args.num_gpus}, but torch sees {found} CUDA devices here and MODEL.DEVICE is cpu. "
            f"Several processes on the CPU: --num-processes {args.num_gpus}."
        )
    if not on_cpu and args.num_gpus > found:
        raise ConfigError(f"--num-gpus {args.num_gpus}, but torch sees {found} CUDA devices here.")
    count = max(args.num_processes, 1) if on_cpu else args.num_gpus
    return processes.Layout(count, args.num_machines, args.machine_rank, args.dist_url, on_cpu)


def run(args: argparse.Namespace) -> Any:
    """Train or evaluate in this process."""
    from detectron2.utils import comm

    from peft_d2.engine.trainer import Trainer
    from peft_d2.storage import atomic

    cfg = setup(args)
    with atomic.explained(Path(cfg.OUTPUT_DIR)), _failures_named():
        if args.eval_only:
            return evaluate(cfg, args.resume)
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        if args.resume and comm.is_main_process():
            atomic.write_bytes(Path(cfg.OUTPUT_DIR, "config.yaml"), cfg.dump().encode())
        return trainer.train()


def evaluate(cfg: Any, resume: bool = False) -> Any:
    """Evaluate the config's model on its test sets; ``resume`` takes the newest checkpoint of ``OUTPUT_DIR``."""
    from peft_d2.engine.checkpointer import Checkpointer
    from peft_d2.engine.trainer import Trainer

    model = Trainer.build_model(cfg)
    checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, allow_other_base=cfg.MODEL.PEFT.ALLOW_OTHER_BASE)
    resumed = resume and checkpointer.has_checkpoint()
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    if not resumed:
        warn_of_untrained(cfg)
    return Trainer.test_all(cfg, model)


def warn_of_untrained(cfg: Any) -> None:
    """Say that a PEFT config without an adapter predicts as its base does."""
    node = cfg.MODEL.PEFT
    if cfg.MODEL.META_ARCHITECTURE == PEFT_ARCHITECTURE and not node.WEIGHTS:
        logger.warning(
            "MODEL.PEFT.WEIGHTS is empty: this is the base without a trained adapter. To use one, append "
            "MODEL.PEFT.WEIGHTS and its folder, e.g. %s.",
            os.path.join(cfg.OUTPUT_DIR, "adapter_final"),
        )


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
        check_run(cfg, args.eval_only)
        with _config_kept(cfg.OUTPUT_DIR) if args.eval_only or args.resume else contextlib.nullcontext():
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
        _make_paths_absolute(loaded.cfg)
        register_from_config(loaded.cfg)
        apply_class_count(loaded.cfg, loaded.explicit)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(str(error)) from error
    loaded.cfg.freeze()
    return loaded.cfg


@contextlib.contextmanager
def _config_kept(folder: str) -> Iterator[None]:
    """Leave the config of a run in ``folder`` as it is: Detectron2 writes that of an evaluation over it, too."""
    from detectron2.utils import comm

    from peft_d2.storage import atomic

    path = Path(folder, "config.yaml")
    before = path.read_bytes() if path.is_file() else None
    yield
    if before is not None and comm.is_main_process():
        atomic.write_bytes(path, before)
        logger.info("%s is kept: it belongs to the training.", path)


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
        elif target == "TEST" and getattr(args, "train_json", None) and loaded.explicit.get("DATASETS.TEST") != 2:
            node.TEST = ()  # the config's own are of other data


def _make_paths_absolute(cfg: Any) -> None:
    """Files and folders that exist, so that ``OUTPUT_DIR/config.yaml`` holds from any folder."""
    cfg.DATASETS.REGISTER = [
        {key: _absolute(value) if key in ("JSON", "IMAGES") else value for key, value in entry.items()}
        if isinstance(entry, Mapping)
        else entry
        for entry in cfg.DATASETS.REGISTER
    ]
    for node in (cfg.MODEL, cfg.MODEL.PEFT):
        node.WEIGHTS = _absolute(node.WEIGHTS)
    for node, key in (
        (cfg.MODEL.SEEM, "CLASS_VECTORS"),
        (cfg.MODEL.TEXT, "PRETRAINED_TOKENIZER"),
        (cfg.MODEL.SAM, "FEATURE_CACHE"),
        (cfg.INPUT.PROMPTS, "DETECTIONS"),
    ):
        node[key] = _absolute(node[key])


def _absolute(path: Any) -> Any:
    if not isinstance(path, str) or not path:
        return path
    found = os.path.abspath(os.path.expanduser(path))
    return found if os.path.exists(found) else path


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


@contextlib.contextmanager
def _failures_named() -> Iterator[None]:
    """Where a message says all there is to say, let Detectron2's loop log it without a traceback."""
    loop, expected = logging.getLogger("detectron2.engine.train_loop"), expected_errors()

    def shorten(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        if isinstance(error, Exception) and isinstance(error := named(error), expected):
            record.msg, record.args, record.exc_info = "Training stops: %s", (message_of(error),), None
        return True

    loop.addFilter(shorten)
    try:
        yield
    except Exception as error:
        if (told := named(error)) is error:
            raise
        raise told from error
    finally:
        loop.removeFilter(shorten)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without log lines below errors."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def expected_errors() -> tuple[type[Exception], ...]:
    """What the user can put right: its message says all there is to say."""
    from peft_d2 import peft, storage
    from peft_d2.data.validation import DatasetError

    return (
        *(ConfigError, DatasetError, LossNotFinite, WorkerDied, Detectron2Missing, peft.PeftError),
        *(storage.CheckpointError, storage.AdapterFileError, storage.StorageError),
        *_errors_of_models(),
    )


def _errors_of_models() -> tuple[type[Exception], ...]:
    try:
        from peft_d2.models.checks import ModelConfigError
        from peft_d2.models.seem.class_prompts import TokenizerError
        from peft_d2.models.seem.class_vectors import ClassVectorsError
    except Detectron2Missing:  # is what there is to say
        return ()
    return ClassVectorsError, ModelConfigError, TokenizerError


def one_line_errors(function: Callable[[], Any]) -> Any:
    """Call ``function``; what the user can put right ends the program with one line instead of a traceback."""
    try:
        return function()
    except expected_errors() as error:
        print(f"error: {message_of(error)}", file=sys.stderr)
        raise SystemExit(1) from error
