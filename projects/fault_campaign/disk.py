"""A disk that is full: a small file system of its own where that is permitted, else a limit on the size of files."""

from __future__ import annotations

import contextlib
import random
import re
import resource
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from peft_d2.engine import launch
from peft_d2.engine.trainer import Trainer

from .world import CONFIG, LORA, TRAIN, Child, Result, World


def full_disks(world: World, count: int = 6, seed: int = 0) -> list[Result]:
    """Trainings that fill the disk with their checkpoints, at ``count`` sizes of disk.

    Each must stop with one line and exit code 1; what was saved before must be whole, and the run must go on from it
    when there is space again.
    """
    result, chance = Result("disk full while saving"), random.Random(seed)
    for number in range(count):
        peft = number % 2 == 0
        # An adapter's checkpoint has about 0.1 MB, a full one 4.6.
        size = chance.randrange(400, 1_500) if peft else chance.randrange(6_000, 16_000)
        folder = world.root / f"disk_{number}"
        folder.mkdir()
        with _small_disk(folder, size) as kind:
            result.add(_fill(world, folder / "run", peft, limited=kind != "tmpfs"), kind)
    return [result]


def _fill(world: World, output: Path, peft: bool, limited: bool) -> str:
    console = world.root / f"{output.parent.name}.txt"
    child = Child(lambda tell: _train(world, output, peft), console)
    if limited:
        _wait_for(output / "last_checkpoint")
        resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (10_000, 10_000))
    status = child.wait()
    child.close()
    text = console.read_text(errors="replace")
    errors = re.findall(r"^error: (.*)", text, flags=re.MULTILINE)
    if status != 1 or len(errors) != 1 or "cannot store" not in errors[0] or "Traceback" in text:
        return f"exit code {status} and {errors or text[-300:]}"
    prefix = "adapter" if peft else "model"
    saved = [int(found) for found in re.findall(rf"Saved checkpoint .*/{prefix}_(\d+)", text)]
    left = [int(path.name[len(prefix) + 1 :][:7]) for path in output.glob(f"{prefix}_*")]
    if not saved or max(left) < saved[-1]:  # the last line of the log may be lost as well
        return f"{saved[-1:]} was saved, but there are {left[-3:]}"
    trainer = Trainer(world.cfg(output, "SOLVER.MAX_ITER", 1000, peft=peft))
    trainer.resume_or_load(resume=True)
    return "" if trainer.start_iter == max(left) + 1 else f"{left} is there, the run goes on at {trainer.start_iter}"


def _wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.is_file() and time.monotonic() < end:
        time.sleep(0.01)


def _train(world: World, output: Path, peft: bool) -> None:
    data = ["--train-json", world.data.json, "--train-images", world.data.images]
    opts = ["OUTPUT_DIR", output, "MODEL.WEIGHTS", world.base, "SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.MAX_ITER", 100]
    if peft:
        opts += ["MODEL.PEFT.METHODS", LORA % 2, "MODEL.PEFT.TRAIN", TRAIN, "MODEL.PEFT.PROVE_LIVE", False]
    launch.main([str(item) for item in ["--config-file", CONFIG, *data, *opts]])


@contextlib.contextmanager
def _small_disk(folder: Path, kilobytes: int) -> Iterator[str]:
    """Make ``folder`` a file system of its own of that size; says which kind of limit there is."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    try:
        mounted = subprocess.run(mount, capture_output=True).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield "tmpfs" if mounted else "file size limit"
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(folder)], check=True)
