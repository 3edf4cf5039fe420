"""The training program: command line, logs, one process or several."""

from __future__ import annotations

import argparse
import contextlib
import inspect
import logging
import logging.handlers
import os
import re
import shlex
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from peft_d2.compat import (
    create_local_process_group,
    find_file,
    forget_process_groups,
    require_detectron2,
)
from peft_d2.data.config import PEFT_ARCHITECTURE
from peft_d2.data.images import lies_inside
from peft_d2.engine.checks import apply_class_count, check_run, run_lock
from peft_d2.engine.config import AUTO, LoadedConfig, load_config
from peft_d2.engine.errors import (
    ConfigError,
    LimitReached,
    is_expected,
    message_of,
    named,
)
from peft_d2.engine.signals import INTERRUPTED, handled

FILE_ONLY = {"file_only": True}  # logger.info(..., extra=FILE_ONLY): into the log's file, not to the terminal
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_TIMEOUT = timedelta(minutes=30)
_GRACE = 20.0  # seconds that the others have to end by themselves, once a process has failed
_START = "spawn"
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
_CONTROL = re.compile(r"\x1b\[[0-9;?]*[ -/]*[@-~]|[\x00-\x08\x0b-\x1f\x7f\x80-\x9f]")
logger = logging.getLogger(__name__)


def training_parser() -> argparse.ArgumentParser:
    """Detectron2's arguments, a PEFT file beside the config file, and own data in one command."""
    require_detectron2()
    from detectron2.engine import default_argument_parser

    parser = default_argument_parser(epilog=_EXAMPLE)
    if parser.prog.endswith(" eval"):  # of the command line, which adds --eval-only
        parser.epilog = _EVAL
    parser.usage = "%(prog)s [arguments] [KEY VALUE ...]"
    for action in parser._actions:  # shorter words than Detectron2's, and true here
        action.help = _HELP.get(action.dest, action.help)
    parser.set_defaults(dist_url="auto")  # Detectron2's is one port per user: two runs would meet there
    parser.add_argument("--num-processes", type=int, default=0, metavar="N", help="processes per machine on the CPU")
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


def take_pairs(parser: argparse.ArgumentParser, help: str = "config KEY VALUE pairs") -> None:
    """Let a command line end with KEY VALUE pairs, ``args.opts``, with the word ``--opts`` before them or without."""
    parser.add_argument(
        "--opts", action="store_true", dest="pairs_follow", help="KEY VALUE pairs follow; can be left out"
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, help=help)


def main(arguments: list[str] | None = None) -> Any:
    """Run ``tools/train_net.py``: parse, launch the processes, train or evaluate."""
    args = training_parser().parse_args(arguments)
    logging.raiseExceptions = False  # on a full disk each line of the log would become a traceback on the console
    threading.excepthook = _thread_failed
    return one_line_errors(lambda: launch(run, (args,), layout(args)))


def run(args: argparse.Namespace) -> Any:
    """Train or evaluate in this process."""
    from detectron2.utils import comm

    from peft_d2.engine.trainer import Trainer
    from peft_d2.storage import atomic

    with contextlib.ExitStack() as stack:
        with _lines_held_back():
            cfg = prepare_config(args)
            check_run(cfg, args.eval_only)
            if comm.is_main_process() and not args.eval_only:
                stack.enter_context(run_lock(cfg.OUTPUT_DIR))
            start_logs(cfg, args)
        stack.enter_context(atomic.explained(Path(cfg.OUTPUT_DIR)))
        stack.enter_context(_failures_named())
        if AUTO in cfg.MODEL.PEFT.METHODS:
            from peft_d2.engine.recommend import settled

            cfg = settled(cfg, args.resume, args.eval_only)
        if args.eval_only:
            return evaluate(cfg, args.resume)
        torch.backends.cudnn.benchmark = cfg.CUDNN_BENCHMARK
        trainer = Trainer(cfg)
        trainer.resume_or_load(resume=args.resume)
        return trainer.train()


def evaluate(cfg: Any, resume: bool = False) -> Any:
    """Evaluate the config's model on its test sets; ``resume`` takes the newest checkpoint of ``OUTPUT_DIR``."""
    from detectron2.utils import comm

    from peft_d2.engine.checkpointer import Checkpointer
    from peft_d2.engine.hooks import seed_everything
    from peft_d2.engine.trainer import Trainer
    from peft_d2.storage import atomic

    config = Path(cfg.OUTPUT_DIR, "config.yaml")
    if config.exists():
        logger.info("%s is kept: it belongs to the training.", config)
    elif comm.is_main_process():
        atomic.write_bytes(config, cfg.dump().encode())
    if cfg.SEED >= 0:  # a base without weights is the training's
        seed_everything(cfg.SEED, 0, 0)
    model = Trainer.build_model(cfg)
    checkpointer = Checkpointer(model, cfg.OUTPUT_DIR, allow_other_base=cfg.MODEL.PEFT.ALLOW_OTHER_BASE)
    resumed = resume and checkpointer.has_checkpoint()
    checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=resume)
    if not resumed:
        warn_of_untrained(cfg, model, checkpointer.names())
    return Trainer.test_all(cfg, model)


def warn_of_untrained(cfg: Any, model: torch.nn.Module, trained: Sequence[str]) -> None:
    """Say that a PEFT config without an adapter predicts as its base does, and that weights are not the run's.

    Args:
        trained: names of the checkpoints in ``OUTPUT_DIR``.
    """
    from peft_d2.peft import is_untrained

    node, given = cfg.MODEL.PEFT, cfg.MODEL.WEIGHTS
    if not given:
        logger.warning("MODEL.WEIGHTS is empty: the model has random weights.")
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


def prepare_config(args: argparse.Namespace) -> Any:
    """The frozen config of a command line, data sets registered and class counts settled.

    Raises:
        ConfigError: anything that the user can put right.
    """
    from peft_d2.data.registration import register_from_config
    from peft_d2.engine.factory import register
    from peft_d2.storage import hub

    try:
        register(upstream_names=True)
        loaded = load_config(args.config_file, args.peft_config, args.opts)
        _take_own_data(loaded, args)
        _make_paths_absolute(loaded.cfg)
        loaded.cfg.MODEL.PEFT.WEIGHTS = hub.pinned(loaded.cfg.MODEL.PEFT.WEIGHTS)
        register_from_config(loaded.cfg)
        apply_class_count(loaded.cfg, loaded.explicit)
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError(str(error)) from error
    loaded.cfg.freeze()
    return loaded.cfg


def _take_own_data(loaded: LoadedConfig, args: argparse.Namespace) -> None:
    """Put ``--train-json`` and its companions into the config, where they replace the file's data sets."""
    from peft_d2.data.formats import store

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
            node.REGISTER = [*node.REGISTER, {"NAME": name, "JSON": json_path, "IMAGES": images}]
            node[target] = (name,)
            loaded.explicit[f"DATASETS.{target}"] = 3
        elif target == "TEST" and others_data and loaded.explicit.get("DATASETS.TEST") != 2:
            node.TEST = ()  # the config's own are of other data


def _own_sets(args: argparse.Namespace) -> dict[str, tuple[dict[str, Any], Path]]:
    """Of each split that has another format than COCO's, or gets other classes: the set, and its images' folder."""
    from peft_d2.data.formats import map_classes, read_class_map, read_folder
    from peft_d2.data.records import read_json

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


def _make_paths_absolute(cfg: Any) -> None:
    """Files and folders that exist, so that ``OUTPUT_DIR/config.yaml`` holds from any folder."""
    cfg.DATASETS.REGISTER = [
        {key: _absolute(value) if key in ("JSON", "IMAGES") else value for key, value in entry.items()}
        if isinstance(entry, Mapping)
        else entry
        for entry in cfg.DATASETS.REGISTER
    ]
    cfg.OUTPUT_DIR = os.path.expanduser(cfg.OUTPUT_DIR)
    for node, key in (
        *((cfg.MODEL, "WEIGHTS"), (cfg.MODEL.PEFT, "WEIGHTS"), (cfg.MODEL.SEEM, "CLASS_VECTORS")),
        *((cfg.MODEL.TEXT, "PRETRAINED_TOKENIZER"), (cfg.MODEL.SAM, "FEATURE_CACHE"), (cfg.MODEL, "FEATURE_CACHE")),
        (cfg.INPUT.PROMPTS, "DETECTIONS"),
    ):
        node[key] = _absolute(node[key])


def _absolute(path: Any) -> Any:
    if not isinstance(path, str) or not path:
        return path
    found = os.path.abspath(os.path.expanduser(find_file(path)))
    return found if os.path.exists(found) else path


def start_logs(cfg: Any, args: argparse.Namespace) -> None:
    """Log to the terminal and to ``OUTPUT_DIR/log.txt``; environment, arguments and config go to the file alone."""
    from detectron2.utils import comm
    from detectron2.utils.collect_env import collect_env_info
    from detectron2.utils.logger import setup_logger

    for name in ("fvcore", "detectron2", "peft_d2"):
        for handler in setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name=name).handlers:
            handler.addFilter(_without_control_codes)
            if type(handler.formatter) is not logging.Formatter:  # Detectron2's coloured one is the terminal's
                handler.addFilter(_for_the_terminal)
    logger.info("Environment info:\n%s", collect_env_info(), extra=FILE_ONLY)
    program = sys.argv[0] if sys.argv[0].startswith("peft-d2 ") else shlex.quote(sys.argv[0])
    logger.info("Command: %s %s", program, shlex.join(sys.argv[1:]), extra=FILE_ONLY)
    logger.info("Process %d of %d; arguments: %s", comm.get_rank(), comm.get_world_size(), args, extra=FILE_ONLY)
    logger.info("Running with full config:\n%s", cfg.dump(), extra=FILE_ONLY)


def _thread_failed(args: Any) -> None:
    """A thread, TensorBoard's say, meets the limits of the machine as the training does, which says so in one line."""
    if not isinstance(args.exc_value, Exception) or not isinstance(named(args.exc_value), LimitReached):
        threading.__excepthook__(args)


def _for_the_terminal(record: logging.LogRecord) -> bool:
    return not getattr(record, "file_only", False)


def _without_control_codes(record: logging.LogRecord) -> bool:
    """Class and file names may hold codes that colour or clear a terminal, and tables of Detectron2 do."""
    if _CONTROL.search(text := record.getMessage()):
        record.msg, record.args = _CONTROL.sub("", text), ()
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


def one_line_errors(function: Callable[[], Any]) -> Any:
    """Call ``function``; what the user can put right, and Ctrl-C, end the program with one line, not a traceback."""
    try:
        return function()
    except KeyboardInterrupt:
        print("error: interrupted. A training goes on from its newest checkpoint with --resume.", file=sys.stderr)
        raise SystemExit(130) from None  # 128 and the signal's number, as shells have it
    except Exception as error:
        told = named(error)
        if not is_expected(told):
            raise
        print(f"error: {_CONTROL.sub('', message_of(told))}", file=sys.stderr)
        raise SystemExit(1) from error


class Layout(NamedTuple):
    """Who takes part: processes on each of the machines, which machine this is, where they meet, gloo or NCCL."""

    processes: int = 1
    machines: int = 1
    machine_rank: int = 0
    url: str = "auto"  # tcp://HOST:PORT; "auto" on one machine, "env://" under torchrun
    on_cpu: bool = False

    @property
    def world(self) -> int:
        """Processes on all machines."""
        return self.processes * self.machines


def layout(args: argparse.Namespace) -> Layout:
    """The processes that a command line, or torchrun's environment, asks for.

    Raises:
        ConfigError: GPUs that are not there, or CPU processes for a run on the GPU.
    """
    for name in ("num_gpus", "num_processes", "num_machines", "machine_rank"):
        if getattr(args, name) < 0:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(args, name)}: expected 0 or more.")
    several = args.num_gpus > 1 or args.num_processes > 1 or args.num_machines > 1
    if not several and not under_torchrun():
        return Layout()
    if under_torchrun() and several:
        raise ConfigError("torchrun started this process: leave --num-gpus, --num-processes, --num-machines out.")
    logging.disable(logging.WARNING)  # each process will say it again
    try:
        on_cpu = load_config(args.config_file, args.peft_config, args.opts).cfg.MODEL.DEVICE.startswith("cpu")
    finally:
        logging.disable(logging.NOTSET)
    if under_torchrun():
        world, rank, local = (int(os.environ[name]) for name in ("WORLD_SIZE", "RANK", "LOCAL_WORLD_SIZE"))
        return Layout(local, world // local, rank // local, "env://", on_cpu)
    if args.num_processes and not on_cpu:
        raise ConfigError("--num-processes is for the CPU; on GPUs give --num-gpus, or append MODEL.DEVICE cpu.")
    if args.num_gpus > max(0 if on_cpu else torch.cuda.device_count(), 1):
        raise ConfigError(
            f"--num-gpus {args.num_gpus}, but torch sees {torch.cuda.device_count()} CUDA devices here and "
            f"MODEL.DEVICE is {'cpu' if on_cpu else 'cuda'}. On the CPU, give --num-processes {args.num_gpus}."
        )
    count = max(args.num_processes, 1) if on_cpu else args.num_gpus
    return Layout(count, args.num_machines, args.machine_rank, args.dist_url, on_cpu)


def under_torchrun() -> bool:
    """Whether the environment is that of a process which torchrun started."""
    return all(name in os.environ for name in _TORCHRUN)


def launch(function: Callable[..., Any], args: tuple[Any, ...], layout: Layout) -> Any:
    """Call ``function(*args)`` in each process of ``layout``; under torchrun this process is one of them.

    Detectron2's own ``launch`` knows NCCL alone and waits without end for processes that hang after another's failure.

    Args:
        function: of a module's top level, where processes are to be started.
        args: picklable.
        layout: the processes.

    Returns:
        What the function returns where it runs in this process, None where it ran in others.

    Raises:
        ConfigError: the processes cannot meet.
        SystemExit: a process failed; what the user can put right has been printed, once for all processes.
    """
    if layout.world == 1:
        return function(*args)
    if under_torchrun():
        with _group(layout, int(os.environ["LOCAL_RANK"])):
            return function(*args)
    if layout.url == "auto":
        if layout.machines > 1:
            raise ConfigError(
                "--num-machines > 1 needs --dist-url tcp://HOST:PORT, an address of machine 0 that all can reach."
            )
        layout = Layout(layout.processes, url=f"tcp://127.0.0.1:{_free_port()}", on_cpu=layout.on_cpu)
    messages, interrupted = mp.get_context(_START).SimpleQueue(), False
    parts = (function, args, layout, messages)
    with handled({signal.SIGINT: signal.SIG_IGN}):  # the terminal sends Ctrl-C to all of them; this one passes it on
        context: Any = mp.start_processes(_process, parts, layout.processes, join=False, start_method=_START)
    # torch 2.4 knows no grace period: it ends the others at once.
    grace = {"grace_period": _GRACE} if "grace_period" in inspect.signature(context.join).parameters else {}

    def pass_on(number: int, frame: Any) -> None:
        """What is for this process is for those that it started: they save and leave in order; told twice, at once."""
        nonlocal interrupted
        twice, interrupted = interrupted and number == signal.SIGINT, interrupted or number == signal.SIGINT
        for process in context.processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL if twice else signal.SIGTERM)
        if number == signal.SIGINT and not twice:
            os.write(2, INTERRUPTED)

    with handled({signal.SIGTERM: pass_on, signal.SIGINT: pass_on}):
        try:
            while not context.join(**grace):
                pass
        except (mp.ProcessExitedException, mp.ProcessRaisedException) as error:
            if not interrupted:
                _report(error, messages, context.processes)
                raise SystemExit(1) from error
    if interrupted:
        raise KeyboardInterrupt
    return None


def _report(error: Exception, messages: Any, processes: list[Any]) -> None:
    """Print why processes failed, each reason once; of what nobody expected, the traceback."""
    reasons = set()
    while not messages.empty():
        reasons.add(messages.get())
    rank, number = next(((i, -p.exitcode) for i, p in enumerate(processes) if (p.exitcode or 0) < 0), (0, 0))
    if not reasons and not number:
        raise error
    reasons = reasons or {
        f"process {rank} of this run was ended by {signal.Signals(number).name}, and the others with it. Where "
        "nobody did that, the machine may be out of memory. The last checkpoint is good: run again with --resume."
    }
    for reason in sorted(reasons):
        print(f"error: {_CONTROL.sub('', reason)}", file=sys.stderr)


def _process(rank: int, function: Callable[..., Any], args: tuple[Any, ...], layout: Layout, messages: Any) -> None:
    try:
        with _group(layout, rank):
            function(*args)
    except Exception as error:
        if not is_expected(error):
            raise
        messages.put(message_of(error))
        raise SystemExit(1) from error


@contextlib.contextmanager
def _group(layout: Layout, local_rank: int) -> Iterator[None]:
    """Be one process of the group; after an error it is left as it is, as the others may not come to take leave."""
    if layout.on_cpu:
        if "OMP_NUM_THREADS" not in os.environ:  # or each process would take all cores
            torch.set_num_threads(max(1, (os.cpu_count() or 1) // layout.processes))
    elif layout.processes > torch.cuda.device_count():
        raise ConfigError(
            f"{layout.processes} processes, but torch sees {torch.cuda.device_count()} CUDA devices here."
        )
    else:
        torch.cuda.set_device(local_rank)
    rank = layout.machine_rank * layout.processes + local_rank
    backend = "gloo" if layout.on_cpu else "nccl"
    try:
        dist.init_process_group(backend, init_method=layout.url, world_size=layout.world, rank=rank, timeout=_TIMEOUT)
    except (dist.DistNetworkError, dist.DistStoreError, ValueError) as error:
        raise ConfigError(f"the {layout.world} processes cannot meet at {layout.url}: {error}") from error
    create_local_process_group(layout.processes)
    yield
    forget_process_groups()
    dist.destroy_process_group()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
