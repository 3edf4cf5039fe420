"""Processes of a run that die or are asked to leave: data-loading workers, ranks, launchers, preempted jobs."""

from __future__ import annotations

import os
import random
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from peft_d2.engine import launch, processes
from peft_d2.engine.trainer import Trainer

from .world import CONFIG, LORA, TRAIN, Child, Result, World

LIMIT = 60.0  # seconds in which all processes must have ended


def dead_workers(world: World, count: int, seed: int = 0) -> list[Result]:
    """SIGKILL for one of two workers that load data: one line, exit code 1, resumable."""
    result, chance = Result("a data-loader worker is killed"), random.Random(seed)
    for number in range(count):
        output = world.root / f"worker_{number}"
        child = _started(world, output, ["DATALOADER.NUM_WORKERS", 2])
        time.sleep(chance.uniform(0, 0.5))
        os.kill(chance.choice(_children(child.pid)), signal.SIGKILL)
        failure, seconds = _ended(child, 1)
        failure = failure or _one_line(child, "a process that loads data was killed")
        result.add(failure or _resumable(world, output), f"within {seconds:.0f} s")
    return [result]


def dead_ranks(world: World, count: int, seed: int = 0) -> list[Result]:
    """SIGKILL for one of two processes, for one under torchrun, or for the launcher: all end, resumable."""
    result, chance = Result("a DDP rank is killed"), random.Random(seed)
    for number in range(count):
        output = world.root / f"rank_{number}"
        children = [_started(world, output, [], ["--num-processes", 2])]
        ranks = _children(children[0].pid)
        time.sleep(chance.uniform(0, 0.5))
        victim = (ranks[1], ranks[0], children[0].pid)[number % 3]
        os.kill(victim, signal.SIGKILL)
        start = time.monotonic()
        failure, seconds = _ended(children[0], -9 if victim == children[0].pid else 1)
        while not failure and any(map(_alive, ranks)):
            time.sleep(0.05)
            seconds = time.monotonic() - start
            failure = f"a rank is alive after {seconds:.0f} s" if seconds > LIMIT else ""
        if victim in ranks:
            failure = failure or _one_line(children[0], rf"process {ranks.index(victim)} of this run was ended by SIGK")
        result.add(failure or _resumable(world, output), f"within {seconds:.0f} s")
    return [result]


def preemptions(world: World, count: int, seed: int = 0) -> list[Result]:
    """SIGTERM for a process, for it and the workers that load its data, for a launcher: saves, exits 0, resumes."""
    result, chance = Result("SIGTERM"), random.Random(seed)
    for number in range(count):
        output = world.root / f"preempted_{number}"
        kind = ("the process", "the whole group", "the launcher of two")[number % 3]
        workers = ["DATALOADER.NUM_WORKERS", 2 if kind == "the whole group" else 0]
        child = _started(
            world, output, [*workers, "SOLVER.CHECKPOINT_PERIOD", 1000], ["--num-processes", 1 + number % 3 // 2]
        )
        time.sleep(chance.uniform(0, 0.5))
        (os.killpg if kind == "the whole group" else os.kill)(child.pid, signal.SIGTERM)
        failure, _ = _ended(child, 0)
        told = re.search(r"SIGTERM: saved after iteration (\d+)", child.console.read_text(errors="replace"))
        if not failure and not told:
            failure = "it left without saving"
        result.add(failure or _resumable(world, output, int(told[1]) + 1 if told else 0), f"to {kind}")
    return [result]


def _started(world: World, output: Path, opts: Sequence[object], arguments: Sequence[object] = ()) -> Child:
    """A training in its own process group that has taken two steps; ``train_net.py`` but for the imports."""

    def train(tell: object) -> None:
        os.setpgid(0, 0)
        processes._START = "fork"  # type: ignore[attr-defined]
        data = ["--train-json", world.data.json, "--train-images", world.data.images]
        keys = ["OUTPUT_DIR", output, "MODEL.WEIGHTS", world.base, "SOLVER.CHECKPOINT_PERIOD", 1]
        keys += ["MODEL.PEFT.METHODS", LORA % 2, "MODEL.PEFT.TRAIN", TRAIN, "MODEL.PEFT.PROVE_LIVE", False]
        keys += ["SOLVER.MAX_ITER", 100_000, "SOLVER.CHECKPOINTS_TO_KEEP", 3, *opts]
        launch.main([str(item) for item in ["--config-file", CONFIG, *arguments, *data, *keys]])

    child = Child(train, world.root / f"{output.name}.txt")
    sign = "Starting training" if "SOLVER.CHECKPOINT_PERIOD" in opts else "Saved checkpoint"
    end = time.monotonic() + 120
    while sign not in (child.console.read_text(errors="replace") if child.console.is_file() else ""):
        if time.monotonic() > end:
            raise TimeoutError(f"the training did not start; see {child.console}")
        time.sleep(0.02)
    time.sleep(0.2)
    return child


def _ended(child: Child, expected: int) -> tuple[str, float]:
    """What is wrong with how and when a process ended, and after how many seconds it did."""
    start = time.monotonic()
    while _alive(child.pid):
        if time.monotonic() - start > LIMIT:
            child.close()
            return f"it is alive after {LIMIT:.0f} s", LIMIT
        time.sleep(0.02)
    seconds = time.monotonic() - start
    status = child.wait()
    child.close()
    return "" if status == expected else f"exit code {status}: {child.console.read_text()[-300:]}", seconds


def _one_line(child: Child, message: str) -> str:
    text = child.console.read_text(errors="replace")
    errors = re.findall(r"^error: (.*)", text, flags=re.MULTILINE)
    good = len(errors) == 1 and re.search(message, errors[0])
    return "" if good else f"instead of one line: {errors or text[-800:]}"


def _resumable(world: World, output: Path, expected: int = 0) -> str:
    """What is wrong with going on: from the newest checkpoint that is there, or from ``expected``."""
    expected = expected or 1 + max(int(path.name[8:]) for path in output.glob("adapter_*"))
    trainer = Trainer(world.cfg(output, "SOLVER.MAX_ITER", 100_000))
    trainer.resume_or_load(resume=True)
    return "" if trainer.start_iter == expected else f"it goes on at {trainer.start_iter} instead of {expected}"


def _children(pid: int) -> list[int]:
    return [int(found) for found in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def _alive(pid: int) -> bool:
    """Whether a process runs; one that only waits to be asked for its exit code does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
