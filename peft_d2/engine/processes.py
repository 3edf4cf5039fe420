"""A run's processes: one per GPU (NCCL) or several on CPUs (gloo), started here or by torchrun."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing import connection
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from peft_d2.compat import create_local_process_group, forget_process_groups
from peft_d2.engine.errors import ConfigError, message_of

_TORCHRUN = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_TIMEOUT = timedelta(minutes=30)
_GRACE = 20.0  # seconds that the others have to end by themselves, once a process has failed
_START = "spawn"


@dataclass(frozen=True)
class Layout:
    """Who takes part in a run.

    Attributes:
        processes: on each machine.
        machines, machine_rank: how many machines, and which this one is.
        url: where the processes meet, ``tcp://HOST:PORT``; ``auto`` on one machine, ``env://`` under torchrun.
        on_cpu: gloo instead of NCCL.
    """

    processes: int = 1
    machines: int = 1
    machine_rank: int = 0
    url: str = "auto"
    on_cpu: bool = False

    @property
    def world(self) -> int:
        """Processes on all machines."""
        return self.processes * self.machines


def under_torchrun() -> bool:
    """Whether the environment is that of a process which torchrun started."""
    return all(name in os.environ for name in _TORCHRUN)


def torchrun_layout(on_cpu: bool) -> Layout:
    """The layout that torchrun's environment describes."""
    local = int(os.environ["LOCAL_WORLD_SIZE"])
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    return Layout(local, world // local, rank // local, "env://", on_cpu)


def launch(
    function: Callable[..., Any], args: tuple[Any, ...], layout: Layout, expected: tuple[type[Exception], ...] = ()
) -> Any:
    """Call ``function(*args)`` in each process of ``layout``; under torchrun this process is one of them.

    Args:
        function: of a module's top level, where processes are to be started.
        args: picklable.
        layout: the processes.
        expected: exceptions whose message alone is shown, once for all processes.

    Returns:
        What the function returns where it runs in this process, None where it ran in others.

    Raises:
        ConfigError: the processes cannot meet.
        SystemExit: a process ended with one of ``expected``; its message has been printed.
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
    _spawn(function, args, layout, (*expected, ConfigError))
    return None


def _spawn(
    function: Callable[..., Any], args: tuple[Any, ...], layout: Layout, expected: tuple[type[Exception], ...]
) -> None:
    messages = mp.get_context(_START).SimpleQueue()
    context = mp.start_processes(
        _worker,
        args=(function, args, layout, expected, messages),
        nprocs=layout.processes,
        join=False,
        start_method=_START,
    )
    with _sigterm_passed_on(context.processes):
        killed = _wait(context.processes)
    if all(process.exitcode == 0 for process in context.processes):
        return
    seen = set()
    while not messages.empty():
        seen.add(messages.get())
    if killed and not seen:
        seen = {
            f"process {rank} of this run was ended by {signal.Signals(number).name}, and the others with it. Where "
            "nobody did that, the machine may be out of memory. The last checkpoint is good: run again with --resume."
            for rank, number in killed.items()
        }
    for message in sorted(seen):
        print(f"error: {message}", file=sys.stderr)
    if not seen:
        context.join()  # raises, with the traceback of the process
    raise SystemExit(1)


def _wait(processes: list[Any]) -> dict[int, int]:
    """Wait for all to end. When one fails, the others, which may wait for it, get a short time before they are killed.

    Returns:
        Which processes were ended by a signal from elsewhere: their number and the signal's.
    """
    running = {process.sentinel: process for process in processes}
    deadline, killed = None, {}
    while running:
        ready = connection.wait(list(running), None if deadline is None else max(0.0, deadline - time.monotonic()))
        for sentinel in ready:
            process = running.pop(sentinel)
            process.join()
            if process.exitcode and deadline is None:
                deadline = time.monotonic() + _GRACE
            if process.exitcode < 0:
                killed[processes.index(process)] = -process.exitcode
        if not ready:
            for process in running.values():
                process.kill()
                process.join()
            break
    return killed


def _worker(
    local_rank: int,
    function: Callable[..., Any],
    args: tuple[Any, ...],
    layout: Layout,
    expected: tuple[type[Exception], ...],
    messages: Any,
) -> None:
    try:
        with _group(layout, local_rank):
            function(*args)
    except expected as error:
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


@contextlib.contextmanager
def _sigterm_passed_on(processes: list[Any]) -> Iterator[None]:
    """A SIGTERM for this process is one for those that it started: they save and leave in order."""

    def pass_on(number: int, frame: Any) -> None:
        for process in processes:
            if process.is_alive():
                os.kill(process.pid, number)

    try:
        previous = signal.signal(signal.SIGTERM, pass_on)
    except ValueError:  # signals belong to the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
