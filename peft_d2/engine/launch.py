"""The training program: command line, config, logs."""

from __future__ import annotations

import argparse
import contextlib
import logging
import logging.handlers
import os
import shlex
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import default_argument_parser
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.collect_env import collect_env_info
from detectron2.utils.logger import setup_logger

from peft_d2.compat import find_file
from peft_d2.data.classes import check_order
from peft_d2.data.config import PEFT_ARCHITECTURE
from peft_d2.data.formats import map_classes, read_class_map, read_folder, store
from peft_d2.data.images import lies_inside
from peft_d2.data.registration import read_json, register_from_config
from peft_d2.engine.checkpointer import Checkpointer, trained_classes
from peft_d2.engine.checks import apply_class_count, check_run
from peft_d2.engine.config import AUTO, LoadedConfig, load_config
from peft_d2.engine.errors import (
    ConfigError,
    LimitReached,
    bounded,
    is_expected,
    message_of,
    named,
    one_line_errors,
    printable,
)
from peft_d2.engine.factory import register
from peft_d2.engine.processes import launch, layout, run_lock
from peft_d2.engine.recommend import settled
from peft_d2.engine.trainer import CONFIG_FILE, Trainer
from peft_d2.peft import is_untrained
from peft_d2.storage import disk, hub
from peft_d2.storage.foreign import newest_in_run

FILE_ONLY = {"file_only": True}  # logger.info(..., extra=FILE_ONLY): into the log's file, not to the terminal
_HELP = {
    "config_file": "the model's config; of a run: OUTPUT_DIR/config.yaml",
    "resume": "go on from the newest checkpoint in OUTPUT_DIR",
    "eval_only": "evaluate, do not train",
    "num_gpus": "processes per machine, each on a GPU",
    "num_machines": "on each of them this command is run",
    "machine_rank": "which of the machines this is, from 0 on",
    "dist_url": "where several machines meet: tcp://HOST:PORT of machine 0",
    "opts": "config keys and their values, last on the line",
}
_EXAMPLE = """an example, on your own data:
  %(prog)s --config-file configs/coco/instance/mask2former_r50.yaml \\
    --peft-config configs/peft/mask2former/lora.yaml --train-json a.json --train-images a/ \\
    --val-json b.json --val-images b/ MODEL.WEIGHTS model_final.pkl OUTPUT_DIR output/mine
and to evaluate it:
  %(prog)s --config-file output/mine/config.yaml --eval-only MODEL.PEFT.WEIGHTS output/mine/adapter_final"""
_EVAL = """an example, of a run on your own data:
  %(prog)s --config-file output/mine/config.yaml MODEL.PEFT.WEIGHTS output/mine/adapter_final
and of a base as it is:
  %(prog)s --config-file configs/coco/instance/mask2former_r50.yaml \\
    --val-json b.json --val-images b/ MODEL.WEIGHTS model_final.pkl OUTPUT_DIR output/base"""
logger = logging.getLogger(__name__)


def training_parser() -> argparse.ArgumentParser:
    """Detectron2's arguments, a PEFT file beside the config file, and own data in one command."""
    parser = default_argument_parser(epilog=_EXAMPLE)
    if parser.prog.endswith(" eval"):  # of the command line, which adds --eval-only
        parser.epilog = _EVAL
    parser.usage = "%(prog)s [arguments] [KEY VALUE ...]"
    for action in parser._actions:  # shorter words than Detectron2's, and true here
        action.help = _HELP.get(action.dest, action.help)
    parser.set_defaults(dist_url="auto")  # Detectron2's is one port per user: two runs would meet there
    parser.add_argument(
        "--num-processes", type=bounded(int, 0), default=0, metavar="N", help="processes per machine on the CPU"
    )
    parser.add_argument("--peft-config", default="", metavar="FILE", help="one of configs/peft, on top")
    parser.add_argument("--opts", action="store_true", dest="pairs_follow", help=argparse.SUPPRESS)
    own = parser.add_argument_group(
        "own data: COCO format, or folders of YOLO, VOC, labelme, CVAT, Label Studio, masks"
    )
    own.add_argument("--train-json", default="", metavar="FILE", help="annotations to train on")
    own.add_argument("--train-images", default="", metavar="DIR", help="folder of the training images")
    own.add_argument("--val-json", default="", metavar="FILE", help="annotations to evaluate on")
    own.add_argument("--val-images", default="", metavar="DIR", help="folder of the evaluation images")
    own.add_argument("--train-data", default="", metavar="DIR", help="instead: a folder; its format is recognised")
    own.add_argument(
        "--val-data", default="", metavar="DIR", help="the same, to evaluate on (or the folder's val part)"
    )
    own.add_argument("--class-map", default="", metavar="MAP", help="old=new,other=new,unwanted= or a yaml of these")
    own.add_argument("--name", default="own", help="what the data sets are called: NAME_train and NAME_val")
    return parser


def main(arguments: list[str] | None = None) -> Any:
    """Run ``tools/train_net.py``: parse, launch the processes, train or evaluate."""
    args = training_parser().parse_args(arguments)
    logging.raiseExceptions = False  # on a full disk each line of the log would become a traceback on the console
    threading.excepthook = _thread_failed
    return one_line_errors(lambda: launch(run, (args,), layout(args)))


def run(args: argparse.Namespace) -> Any:
    """Train or evaluate in this process."""
    with contextlib.ExitStack() as stack:
        with _lines_held_back():
            cfg = prepare_config(args, reads=("TEST",) if args.eval_only else ("TRAIN", "TEST"))
            if args.resume:
                _refuse_another_folder(cfg.OUTPUT_DIR, args.config_file)
            check_run(cfg, args.eval_only)
            if comm.is_main_process() and not args.eval_only:
                stack.enter_context(run_lock(cfg.OUTPUT_DIR))
            start_logs(cfg, args)
        stack.enter_context(disk.explained(Path(cfg.OUTPUT_DIR)))
        stack.enter_context(_failures_named())
        if AUTO in cfg.MODEL.PEFT.METHODS:
            cfg = settled(cfg, args.resume, args.eval_only)
        if args.eval_only:
            return evaluate(cfg, args.resume)
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        return trainer.train()


def evaluate(cfg: Any, resume: bool = False) -> Any:
    """Evaluate the config's model on its test sets; ``resume`` takes the newest checkpoint of ``OUTPUT_DIR``."""
    config = Path(cfg.OUTPUT_DIR, "config.yaml")
    if config.exists():
        logger.info("%s is kept: it belongs to the training.", config)
    elif comm.is_main_process():
        disk.write_bytes(config, cfg.dump().encode())
    model = Trainer.build_model(cfg)
    checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, allow_other_base=cfg.MODEL.PEFT.ALLOW_OTHER_BASE)
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    if not checkpointer.resumed:
        warn_of_untrained(cfg, model, checkpointer.names())
    results = Trainer.test_all(cfg, model)
    if comm.is_main_process():
        verify_results(cfg, results)  # TEST.EXPECTED_RESULTS
    return results


def warn_of_untrained(cfg: Any, model: torch.nn.Module, trained: Sequence[str]) -> None:
    """Say that a PEFT config without an adapter predicts as its base does, and that weights are not the run's.

    Args:
        trained: names of the checkpoints in ``OUTPUT_DIR``.

    Raises:
        CheckpointError: the weights were trained on the config's classes in another order.
    """
    node, given = cfg.MODEL.PEFT, cfg.MODEL.WEIGHTS
    if given and cfg.MODEL.META_ARCHITECTURE != PEFT_ARCHITECTURE:
        check_order(trained_classes(given), cfg)
    if not given:
        of_timm = " but for those of MODEL.TIMM.WEIGHTS" if cfg.MODEL.get("TIMM", {}).get("WEIGHTS") else ""
        logger.warning("MODEL.WEIGHTS is empty: the model has random weights%s.", of_timm)
    elif cfg.MODEL.META_ARCHITECTURE != PEFT_ARCHITECTURE and trained and not lies_inside(cfg.OUTPUT_DIR, given):
        logger.warning(
            "%s is what is evaluated, not what was trained in OUTPUT_DIR. For that, append MODEL.WEIGHTS %s.",
            *(given, os.path.join(cfg.OUTPUT_DIR, trained[-1])),
        )
    if cfg.MODEL.META_ARCHITECTURE == PEFT_ARCHITECTURE and not node.WEIGHTS and is_untrained(model):
        logger.warning(
            "MODEL.PEFT.WEIGHTS is empty: this is the base without a trained adapter. To use one, append "
            "MODEL.PEFT.WEIGHTS and its folder, e.g. %s.",
            os.path.join(cfg.OUTPUT_DIR, "adapter_final"),
        )


def prepare_config(args: argparse.Namespace, reads: Sequence[str] = ("TRAIN", "TEST")) -> Any:
    """The frozen config of a command line, data sets registered and class counts settled.

    Args:
        reads: whose sets the program is going to read. One's own sets of the other lists may be on another machine.

    Raises:
        ConfigError: anything that the user can put right.
    """
    try:
        register(upstream_names=True)
        loaded = load_config(args.config_file, args.peft_config, args.opts)
        _take_own_data(loaded, args)
        _make_paths_absolute(loaded.cfg)
        loaded.cfg.MODEL.PEFT.WEIGHTS = hub.pinned(loaded.cfg.MODEL.PEFT.WEIGHTS)
        trained_elsewhere = "TRAIN" in _leave_out_missing(loaded.cfg, reads)
        register_from_config(loaded.cfg)
        if not trained_elsewhere:  # else the count is the one that the training wrote into its config
            apply_class_count(loaded.cfg, loaded.explicit)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(str(error)) from error
    loaded.cfg.freeze()
    return loaded.cfg


def _refuse_another_folder(output: str, config_file: str) -> None:
    """Refuse to begin a run anew beside the one that the config is of, which was moved or started from elsewhere."""
    folder = Path(config_file or ".").parent
    if Path(config_file or "").name == CONFIG_FILE and newest_in_run(folder) and not newest_in_run(Path(output)):
        raise ConfigError(
            f"--resume: OUTPUT_DIR {output!r} holds no checkpoint, and the config's own folder does: append OUTPUT_DIR "
            f"{str(folder.absolute())!r} to go on there."
        )


def _take_own_data(loaded: LoadedConfig, args: argparse.Namespace) -> None:
    """Put ``--train-json`` and its companions into the config, where they replace the file's data sets."""
    node = loaded.cfg.DATASETS
    others_data = getattr(args, "train_json", "") or getattr(args, "train_data", "")
    sets = _own_sets(args)
    for split, target in (("train", "TRAIN"), ("val", "TEST")):
        json_path, images = (getattr(args, f"{split}_{part}", "") for part in ("json", "images"))
        if split in sets:
            data, folder = sets[split]
            json_path = str(store(data, Path(loaded.cfg.OUTPUT_DIR, "data"), f"{args.name}_{split}"))
            images = str(folder)
        if bool(json_path) != bool(images):
            raise ConfigError(f"--{split}-json and --{split}-images belong together: give both or none.")
        if json_path:
            name = f"{args.name}_{split}"
            others = [entry for entry in node.REGISTER if not isinstance(entry, dict) or entry.get("NAME") != name]
            node.REGISTER = [*others, {"NAME": name, "JSON": json_path, "IMAGES": images}]
            node[target] = (name,)
            loaded.explicit[f"DATASETS.{target}"] = 3
        elif target == "TEST" and others_data and loaded.explicit.get("DATASETS.TEST") != 2:
            node.TEST = ()  # the config's own are of other data


def _own_sets(args: argparse.Namespace) -> dict[str, tuple[dict[str, Any], Path]]:
    """Of each split that has another format than COCO's, or gets other classes: the set, and its images' folder."""
    sets, class_map = {}, getattr(args, "class_map", "")
    for split in ("train", "val"):
        json_path, images, folder = (str(getattr(args, f"{split}_{part}", "")) for part in ("json", "images", "data"))
        if folder and (json_path or images):
            raise ConfigError(f"--{split}-data stands for --{split}-json and --{split}-images: leave these out.")
        if folder:
            understood, data, root = read_folder(folder, split)
            logger.info("--%s-data %s is %s. To see it: peft-d2 check-data --data %s --split %s --sheet sheet.jpg",
                        split, folder, understood, folder, split)  # fmt: skip
            sets[split] = data, root
        elif class_map and json_path and images:
            sets[split] = read_json(json_path), Path(images)
    if class_map:
        mapped = map_classes(read_class_map(class_map), *(data for data, _ in sets.values()))
        sets = {split: (data, root) for data, (split, (_, root)) in zip(mapped, sets.items(), strict=True)}
    return sets


def _leave_out_missing(cfg: Any, reads: Sequence[str]) -> set[str]:
    """Take one's own sets out of the config that nothing reads and that are not on this machine.

    Returns:
        the lists that were left with fewer sets, of TRAIN and TEST.
    """
    node, splits = cfg.DATASETS, ("TRAIN", "TEST")
    needed = {name for split in reads for name in node[split]}
    missing = {
        str(entry["NAME"]): str(entry["JSON"])
        for entry in node.REGISTER
        if isinstance(entry, dict) and {"NAME", "JSON", "IMAGES"} <= entry.keys() and entry["NAME"] not in needed
        if not (os.path.isfile(str(entry["JSON"])) and os.path.isdir(str(entry["IMAGES"])))
    }
    if not missing:
        return set()
    logger.warning(
        "Not on this machine, and left out: %s. Names of classes are those that the adapter holds, if it holds any.",
        ", ".join(f"data set {name!r} ({path})" for name, path in missing.items()),
    )
    node.REGISTER = [entry for entry in node.REGISTER if entry.get("NAME") not in missing]
    shorter = {split for split in splits if not missing.keys().isdisjoint(node[split])}
    for split in shorter:
        node[split] = tuple(name for name in node[split] if name not in missing)
    return shorter


def _make_paths_absolute(cfg: Any) -> None:
    """Files and folders that exist, so that ``OUTPUT_DIR/config.yaml`` holds from any folder."""
    for entry in cfg.DATASETS.REGISTER:
        for key in {"JSON", "IMAGES"} & entry.keys() if isinstance(entry, dict) else ():
            entry[key] = _absolute(entry[key])
    cfg.OUTPUT_DIR = os.path.expanduser(cfg.OUTPUT_DIR)
    for node, key in (
        *((cfg.MODEL, "WEIGHTS"), (cfg.MODEL.PEFT, "WEIGHTS"), (cfg.MODEL.SEEM, "CLASS_VECTORS")),
        *((cfg.MODEL.TEXT, "PRETRAINED_TOKENIZER"), (cfg.MODEL.SAM, "FEATURE_CACHE"), (cfg.MODEL, "FEATURE_CACHE")),
        *((cfg.INPUT.PROMPTS, "DETECTIONS"), (cfg.MODEL.TIMM, "WEIGHTS")),
    ):
        node[key] = _absolute(node[key])


def _absolute(path: Any) -> Any:
    if not isinstance(path, str) or path in ("", "timm"):  # TIMM.WEIGHTS's word for a download, whatever folder is here
        return path
    found = os.path.abspath(os.path.expanduser(find_file(path)))
    return found if os.path.exists(found) else path


def start_logs(cfg: Any, args: argparse.Namespace) -> None:
    """Log to the terminal and to ``OUTPUT_DIR/log.txt``; environment, arguments and config go to the file alone."""
    for name in ("fvcore", "detectron2", "peft_d2"):
        for handler in setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name=name).handlers:
            handler.addFilter(_without_control_codes)
            if type(handler.formatter) is not logging.Formatter:  # Detectron2's coloured one is the terminal's
                handler.addFilter(lambda record: not getattr(record, "file_only", False))
    logger.info("Environment info:\n%s", collect_env_info(), extra=FILE_ONLY)
    program = sys.argv[0] if sys.argv[0].startswith("peft-d2 ") else shlex.quote(sys.argv[0])
    logger.info("Command: %s %s", program, shlex.join(sys.argv[1:]), extra=FILE_ONLY)
    logger.info("Process %d of %d; arguments: %s", comm.get_rank(), comm.get_world_size(), args, extra=FILE_ONLY)
    logger.info("Running with full config:\n%s", cfg.dump(), extra=FILE_ONLY)


def _thread_failed(args: Any) -> None:
    """A thread, TensorBoard's say, meets the limits of the machine as the training does, which says so in one line."""
    if not isinstance(args.exc_value, Exception) or not isinstance(named(args.exc_value), LimitReached):
        threading.__excepthook__(args)


def _without_control_codes(record: logging.LogRecord) -> bool:
    if (text := printable(said := record.getMessage())) != said:
        record.msg, record.args = text, ()
    return True


@contextlib.contextmanager
def _lines_held_back() -> Iterator[None]:
    """Keep this package's log lines until the block, which sets up the log of ``OUTPUT_DIR``, is left."""
    package = logging.getLogger("peft_d2")
    memory = logging.handlers.MemoryHandler(capacity=10_000, flushLevel=logging.CRITICAL + 1)
    memory.addFilter(_without_control_codes)
    package.addHandler(memory)
    package.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        package.removeHandler(memory)
        for record in memory.buffer:
            package.handle(record)  # after a refusal, without a log: Python prints warnings to stderr


@contextlib.contextmanager
def _failures_named() -> Iterator[None]:
    """Where a message says all there is to say, the log's file gets that line instead of a traceback."""
    loop = logging.getLogger("detectron2.engine.train_loop")

    def shorten(record: logging.LogRecord) -> bool:
        error = record.exc_info[1] if record.exc_info else None
        return not (isinstance(error, Exception) and is_expected(named(error)))

    loop.addFilter(shorten)
    try:
        yield
    except Exception as error:
        told = named(error)
        if is_expected(told):
            logger.error("%s", message_of(told), extra=FILE_ONLY)
        if told is error:
            raise
        raise told from error
    finally:
        loop.removeFilter(shorten)
