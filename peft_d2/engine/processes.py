"""The processes of a run: how many, how they start, meet and end, their signals, and the lock of a run's folder."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import inspect
import logging
import os
import platform
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from peft_d2.compat import create_local_process_group, forget_process_groups
from peft_d2.engine.config import load_config
from peft_d2.engine.errors import ConfigError, is_expected, message_of

# What a handler writes to stderr.
INTERRUPTED = b"\nCtrl-C: the step is finished and saved first; a second one leaves at once.\n"
_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_TIMEOUT = timedelta(minutes=30)
_GRACE = 20.0  # seconds that the others have to end by themselves, once a process has failed
_START = "spawn"
logger = logging.getLogger(__name__)


class Layout(NamedTuple):
    """The processes of a run: how many on each machine, which machine this is, where they meet, CPU or GPU."""

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
    messages = mp.get_context(_START).SimpleQueue()
    parts = (function, args, layout, messages)
    with handled({signal.SIGINT: signal.SIG_IGN}):  # the terminal sends Ctrl-C to all of them; this one passes it on
        context: Any = mp.start_processes(_process, parts, layout.processes, join=False, start_method=_START)
    _wait(context, messages)
    return None


def _wait(context: Any, messages: Any) -> None:
    """Wait until the started processes have ended, and pass on to them the signals that this one gets.

    Raises:
        KeyboardInterrupt: this process was interrupted.
        SystemExit: one of the processes failed.
    """
    # torch 2.4 knows no grace period: it ends the others at once.
    grace = {"grace_period": _GRACE} if "grace_period" in inspect.signature(context.join).parameters else {}
    interrupted = False

    def pass_on(number: int, frame: Any) -> None:
        """Send the processes SIGTERM, at which they save and leave; or, at a second Ctrl-C, end them at once."""
        nonlocal interrupted
        twice, interrupted = interrupted and number == signal.SIGINT, interrupted or number == signal.SIGINT
        for process in context.processes:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL if twice else signal.SIGTERM)
        if number == signal.SIGINT and not twice:
            os.write(2, INTERRUPTED)

    with handled({signal.SIGTERM: pass_on, signal.SIGINT: pass_on}):
        try:
            joined = False
            while not joined:
                for sentinel in wait(context.sentinels):
                    context.processes[context.sentinels[sentinel]].join()  # it is ending; now it has an exit code
                codes = [process.exitcode or 0 for process in context.processes]  # join ends others after a failure
                joined = context.join(**grace)
        except (mp.ProcessExitedException, mp.ProcessRaisedException) as error:
            if not interrupted:
                _report(error, messages, codes)
                raise SystemExit(1) from error
    if interrupted:
        raise KeyboardInterrupt


def _report(error: Exception, messages: Any, codes: list[int]) -> None:
    """Print why processes failed, each reason once; raise ``error`` with its traceback where it was none expected.

    Args:
        codes: exit codes before the others were made to end, minus the number of a signal that ended a process.
    """
    reasons = set()
    while not messages.empty():
        reasons.add(messages.get())
    rank, number = next(((rank, -code) for rank, code in enumerate(codes) if code < 0), (0, 0))
    if not reasons and not number:
        raise error
    reasons = reasons or {
        f"process {rank} of this run was ended by {signal.Signals(number).name}, and the others with it. Where "
        "nobody did that, the machine may be out of memory. The last checkpoint is good: run again with --resume."
    }
    for reason in sorted(reasons):
        print(f"error: {reason}", file=sys.stderr)


def _process(rank: int, function: Callable[..., Any], args: tuple[Any, ...], layout: Layout, messages: Any) -> None:
    """Run in each started process: join the group, call the function, send the parent what the user can put right."""
    mp._prctl_pr_set_pdeathsig(signal.SIGTERM)  # type: ignore[attr-defined]  # torch's is SIGINT, which is ignored here
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
    """Be one process of the group within the block. After an error it is not left: the others may wait elsewhere."""
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


@contextlib.contextmanager
def handled(handlers: dict[int, Any]) -> Iterator[None]:
    """Within the block handle these signals so. Ignored ones (SIGINT in the background) and other threads' stay."""
    previous: dict[int, Any] = {}
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            if signal.getsignal(number) != signal.SIG_IGN:
                previous[number] = signal.signal(number, handler)
    else:
        logger.debug("not in the main thread: signals keep their meaning")
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def run_lock(folder: str) -> Iterator[None]:
    """Keep other trainings out of ``OUTPUT_DIR`` until the block is left or this process ends, however it does.

    A POSIX lock belongs to the process: taking it again in the same one is free, and workers do not inherit it.

    Raises:
        ConfigError: another process trains there.
    """
    path = os.path.join(folder, ".lock")
    try:
        os.makedirs(folder, exist_ok=True)
        stream = open(path, "a+")  # noqa: SIM115  closed below
    except OSError as error:
        raise ConfigError(f"OUTPUT_DIR {folder!r} cannot be written to: {error.strerror}.") from error
    with stream:
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            stream.seek(0)
            raise ConfigError(
                f"OUTPUT_DIR {folder!r} is in use by another training ({stream.read() or 'of unknown number'}). Wait "
                "for its end, or choose another OUTPUT_DIR."
            ) from error
        except OSError as error:
            logger.info("%s: this file system knows no locks (%s). Start no second run there.", folder, error.strerror)
        stream.truncate(0)
        stream.write(f"process {os.getpid()} on {platform.node()}")
        stream.flush()
        yield
