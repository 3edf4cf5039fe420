"""Two processes on the CPU and a batch in pieces: both give what one process gives on the joined batch."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch.multiprocessing import ProcessRaisedException

import peft_d2
from peft_d2.engine import launch, processes
from peft_d2.engine.errors import ConfigError
from peft_d2.engine.step import TrainStep
from peft_d2.engine.trainer import Trainer
from peft_d2.models.layers import criterion

from .conftest import DINO, TINY

ROOT = Path(__file__).parents[2]
# Denoising queries are disturbed by chance, and padded to the most objects of a process's own images, as published.
WITHOUT_CHANCE = ("MODEL.MASK_FORMER.DROPOUT", 0.0, "MODEL.SWIN.DROP_PATH_RATE", 0.0)
WITHOUT_CHANCE += ("MODEL.MaskDINO.DROPOUT", 0.0, "MODEL.MaskDINO.DN", "no")
BATCH = ("SOLVER.IMS_PER_BATCH", 4, "SOLVER.MAX_ITER", 2, "SOLVER.CLIP_GRADIENTS.ENABLED", False, "SEED", 5)
# Of 64 px, the data set's size, Mask DINO's coarsest map has one pixel, and its group norm two numbers a group: their
# float32 rounding becomes a hundred times larger.
BATCH += ("INPUT.MIN_SIZE_TRAIN", (128,), "INPUT.MAX_SIZE_TRAIN", 128)


class SamePoints:
    """torch, but the points that losses are sampled at are the same for each mask and each image."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def rand(*shape: int, device: torch.device) -> torch.Tensor:
        values = torch.rand(shape[-2:], generator=torch.Generator().manual_seed(7))
        return values.to(device).expand(shape)


class Keep(HookBase):
    """Keeps each step's losses and gradients; from step 1 on rank 1's loss is NaN if ``poison``."""

    def __init__(self, poison: bool) -> None:
        self.poison = poison
        self.steps: list[dict[str, torch.Tensor]] = []

    def before_step(self) -> None:
        if self.poison and self.trainer.iter == 1 and comm.get_rank() == 1:
            trained = next(p for p in self.trainer.model.parameters() if p.requires_grad)
            with torch.no_grad():
                trained.fill_(float("nan"))

    def after_step(self) -> None:
        found = {n: p.grad.clone() for n, p in self.trainer.model.named_parameters() if p.grad is not None}
        losses = {
            n: torch.tensor(self.trainer.storage.latest()[n][0]) for n in self.trainer.storage.latest() if "loss" in n
        }
        self.steps.append({**{n.removeprefix("module."): g for n, g in found.items()}, **losses})


def steps_of(cfg: Any, poison: bool = False, keep: Keep | None = None) -> list[dict[str, torch.Tensor]]:
    """Losses and gradients of each step of a run without chance."""
    criterion.torch = SamePoints()  # type: ignore[attr-defined]
    try:
        trainer, keep = Trainer(cfg), keep or Keep(poison)
        trainer.register_hooks([keep])
        trainer.resume_or_load(resume=False)
        trainer.train()
        return keep.steps
    finally:
        criterion.torch = torch  # type: ignore[attr-defined]


def one_of_two(cfg: Any, folder: str) -> None:
    """What each of two processes runs: a good step, whose figures it stores, and one that is NaN on rank 1."""
    peft_d2.register()
    keep = Keep(poison=True)
    try:
        steps_of(cfg, keep=keep)
    except Exception as error:
        Path(folder, f"{comm.get_rank()}.txt").write_text(f"{type(error).__name__}: {error}")
        torch.save(keep.steps, Path(folder, f"{comm.get_rank()}.pth"))
        raise


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys() and len(one) > 5
    for name, value in one.items():
        scale = max(float(value.abs().max()), 0.1)  # before a norm a bias has none but rounding errors
        assert float((value - other[name]).abs().max()) <= 1e-5 * scale, name


def assert_two_equal_one(one: list[dict[str, torch.Tensor]], cfg: Any, folder: Path) -> None:
    """A step of two processes of ``cfg`` is the one of one process, and both stop at the next, NaN on rank 1."""
    with pytest.raises(SystemExit) as left:
        processes.launch(one_of_two, (cfg, str(folder)), processes.Layout(2, on_cpu=True))
    assert left.value.code == 1
    for rank in (0, 1):
        assert "LossNotFinite: iteration 1: rank 1: loss is not finite" in (folder / f"{rank}.txt").read_text()
        found = torch.load(folder / f"{rank}.pth")
        assert len(found) == 1
        figures = {n: v for n, v in one[0].items() if rank == 0 or "loss" not in n}  # rank 0 alone records losses
        assert_same(figures, found[0])


@pytest.mark.parametrize("peft", [False, True], ids=["full", "peft"])
@pytest.mark.parametrize(("config", "pieces"), [(TINY, 2), (TINY, 4), (DINO, 4)], ids=["2", "4", "mask_dino-4"])
def test_pieces_equal_the_joined_batch(
    make_cfg: Callable[..., Any],
    weights_of: Callable[[Path], Path],
    tmp_path: Path,
    config: Path,
    pieces: int,
    peft: bool,
) -> None:
    """The images hold different numbers of objects, so that dividing by each piece's own counts would be off."""
    common = (*BATCH, "MODEL.WEIGHTS", weights_of(config), "SOLVER.MAX_ITER", 1, *WITHOUT_CHANCE)
    whole = steps_of(make_cfg(*common, peft=peft, config=config, output=tmp_path / "whole"))
    pairs = (*common, "SOLVER.ACCUMULATE", pieces)
    parts = steps_of(make_cfg(*pairs, peft=peft, config=config, output=tmp_path / "parts"))
    assert_same(whole[0], parts[0])


def test_a_batch_that_cannot_be_dealt_out(make_cfg: Callable[..., Any]) -> None:
    with pytest.raises(ConfigError, match="IMS_PER_BATCH 2 .* SOLVER.ACCUMULATE 3: choose a multiple of 3"):
        Trainer(make_cfg("SOLVER.ACCUMULATE", 3))


@pytest.mark.parametrize("config", [TINY, DINO], ids=["mask2former", "mask_dino"])
def test_two_processes_equal_one_and_stop_together(
    make_cfg: Callable[..., Any],
    weights_of: Callable[[Path], Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    config: Path,
) -> None:
    common = (*BATCH, "MODEL.WEIGHTS", weights_of(config), *WITHOUT_CHANCE)
    one = steps_of(make_cfg(*common, "SOLVER.MAX_ITER", 1, peft=True, config=config, output=tmp_path / "one"))
    cfg = make_cfg(*common, peft=True, config=config, output=tmp_path / "two")
    assert_two_equal_one(one, cfg, tmp_path)
    error = capfd.readouterr().err
    assert error.count("error: iteration 1: rank 1: loss is not finite") == 1, error


def raise_or_wait() -> None:
    if comm.get_rank() == 1:
        raise ArithmeticError("a bug")
    time.sleep(600)


def test_a_bug_in_one_process_is_what_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not the signal that ends the others, which wait for it in vain."""
    monkeypatch.setattr(processes, "_GRACE", 0.5)
    with pytest.raises(ProcessRaisedException, match=r"Process 1 terminated(?s:.*)ArithmeticError: a bug"):
        processes.launch(raise_or_wait, (), processes.Layout(2, on_cpu=True))


def arguments(**given: Any) -> argparse.Namespace:
    args = launch.training_parser().parse_args(["--config-file", str(TINY)])
    vars(args).update(given)
    return args


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_gpus": 2}, "--num-gpus 2, but torch sees .* --num-processes 2"),
        ({"num_gpus": -1}, "--num-gpus -1: expected 0 or more"),
    ],
)
def test_layouts_that_cannot_be(given: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        processes.layout(arguments(**given))


def test_layouts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert processes.layout(arguments()).world == processes.layout(arguments(num_gpus=0)).world == 1
    assert processes.layout(arguments(num_processes=3)) == processes.Layout(3, on_cpu=True)
    with pytest.raises(ConfigError, match="--dist-url"):
        processes.launch(print, (), processes.layout(arguments(num_machines=2)))
    found = {"RANK": 3, "WORLD_SIZE": 4, "LOCAL_RANK": 1, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 1, "MASTER_ADDR": "a"}
    for name, value in found.items():
        monkeypatch.setenv(name, str(value))
    assert processes.layout(arguments()) == processes.Layout(2, 2, 1, "env://", on_cpu=True)
    with pytest.raises(ConfigError, match="torchrun started this process"):
        processes.layout(arguments(num_processes=2))


def test_torchrun(toy_set: Any, base_weights: Path, tmp_path: Path) -> None:
    """A whole run with evaluation."""
    own = [f"--{split}-{key}" for split in ("train", "val") for key in ("json", "images")]
    paths = [toy_set.json, toy_set.images] * 2
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2]
    command += [ROOT / "tools" / "train_net.py", "--config-file", TINY]
    command += [item for pair in zip(own, paths, strict=True) for item in pair]
    command += ["OUTPUT_DIR", tmp_path, "SOLVER.MAX_ITER", 1, "MODEL.WEIGHTS", base_weights]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "copypaste: Task: segm" in done.stdout + done.stderr
    assert (tmp_path / "model_final.pth").is_file() and (tmp_path / "log.txt.rank1").is_file()


MACHINE = """
import sys
from peft_d2.engine import launch, processes
processes._START = "fork"
launch.main(sys.argv[1:])
"""


def test_two_machines(toy_set: Any, base_weights: Path, tmp_path: Path) -> None:
    """Detectron2's arguments, on one machine that plays both; each prints how batch and learning rate are split."""
    url = f"tcp://127.0.0.1:{processes._free_port()}"
    own = ["--train-json", toy_set.json, "--train-images", toy_set.images, "--config-file", TINY]
    opts = ["OUTPUT_DIR", tmp_path, "MODEL.WEIGHTS", base_weights, "SOLVER.MAX_ITER", 1, "SOLVER.IMS_PER_BATCH", 8]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    machines = []
    for rank in (1, 0):
        place = ["--num-machines", 2, "--machine-rank", rank, "--dist-url", url]
        command = [sys.executable, "-c", MACHINE, *place, *own, *opts, "SOLVER.ACCUMULATE", 2]
        with (tmp_path / f"console{rank}.txt").open("w") as console:
            machine = subprocess.Popen([str(c) for c in command], stdout=console, stderr=console, env=environment)
        machines.append((machine, tmp_path / f"console{rank}.txt"))
    for machine, console_path in machines:
        assert machine.wait(timeout=600) == 0, console_path.read_text()[-3000:]
    for name in ("log.txt", "log.txt.rank1"):
        output = (tmp_path / name).read_text()
        assert "Learning rate 0.001, chosen for batches of 2 images, becomes 0.004 for 8." in output
        assert "Batches of 8 images: 2 process(es) with 4 each, in 2 piece(s) of 2." in output
    assert (tmp_path / "model_final.pth").is_file()


class Counted(torch.nn.Linear):
    """Its loss is the mean over the objects of the whole batch, wherever they are computed."""

    def __init__(self) -> None:
        super().__init__(2, 1, bias=False)
        torch.nn.init.ones_(self.weight)

    def count_objects(self, batch: list[dict[str, Any]]) -> list[int]:
        return [item["count"] for item in batch]

    def forward(self, batch: Any) -> Any:
        counts = batch[0].get("batch_objects") or [self.count_objects(batch)]
        losses = [item["count"] * super(Counted, self).forward(item["x"]).square().sum() for item in batch]
        return {"loss": sum(losses) / criterion.average_count(counts)}


def gradient(pieces: int, parts: list[slice]) -> torch.Tensor:
    """Of a step on five images, of which this process's loader gives its part."""
    batch = [{"count": count, "x": torch.tensor([1.0, 0.1 * count])} for count in (3, 0, 1, 7, 2)]
    model: Any = Counted()
    run = torch.nn.parallel.DistributedDataParallel(model) if comm.get_world_size() > 1 else model
    step = TrainStep(run, [batch[parts[comm.get_rank()]]], torch.optim.SGD(model.parameters(), 0.0), pieces=pieces)
    with EventStorage():
        step.iter = 0
        step.run_step()
    return model.weight.grad


def one_of_two_unequal(folder: str) -> None:
    torch.save(gradient(2, [slice(2), slice(2, 5)]), Path(folder, f"{comm.get_rank()}.pth"))


def test_batches_that_cannot_be_dealt_out_evenly(tmp_path: Path) -> None:
    """As other people's loaders give them at the end of an epoch."""
    expected = gradient(1, [slice(5)])
    torch.testing.assert_close(gradient(2, [slice(5)]), expected)
    processes.launch(one_of_two_unequal, (str(tmp_path),), processes.Layout(2, on_cpu=True))
    for rank in (0, 1):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pth"), expected)
    with pytest.raises(ConfigError, match="a batch of 2 images, which is computed in 3 pieces: let it drop"):
        gradient(3, [slice(2)])
