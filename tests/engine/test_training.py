"""Runs from end to end: files, evaluation, stopping and resuming, bad losses, signals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from detectron2.engine import HookBase
from detectron2.utils.events import TensorboardXWriter
from fault_campaign.poison import Poison

from peft_d2.engine.checkpointer import Checkpointer
from peft_d2.engine.errors import ConfigError, LossNotFinite
from peft_d2.engine.trainer import Trainer
from peft_d2.peft import LivenessError

KINDS = pytest.mark.parametrize("peft", [False, True], ids=["full", "peft"])


def train(cfg: Any, *hooks: HookBase, resume: bool = False) -> Trainer:
    trainer = Trainer(cfg)
    trainer.register_hooks(list(hooks))
    trainer.resume_or_load(resume=resume)
    trainer.train()
    return trainer


def trained(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


class StopAfter(HookBase):
    """Ends the process's training the hard way, after a step."""

    def __init__(self, iteration: int) -> None:
        self.iteration = iteration

    def after_step(self) -> None:
        if self.trainer.iter == self.iteration:
            raise KeyboardInterrupt


@KINDS
def test_files_and_figures_of_a_run(
    make_cfg: Callable[..., Any], base_weights: Path, tmp_path: Path, peft: bool
) -> None:
    trainer = train(make_cfg("MODEL.WEIGHTS", base_weights, "TEST.EVAL_PERIOD", 3, peft=peft))
    names = {path.name for path in tmp_path.iterdir()}
    suffix, prefix = ("", "adapter") if peft else (".pth", "model")
    expected = {f"{prefix}_{part}{suffix}" for part in ("0000002", "0000005", "final")}
    assert expected | {"metrics.json", "last_checkpoint", "peft_report.json", "inference"} <= names
    assert (tmp_path / "last_checkpoint").read_text() == f"{prefix}_final{suffix}"
    rows = [json.loads(line) for line in (tmp_path / "metrics.json").read_text().splitlines()]
    assert {row["iteration"] for row in rows if "segm/AP" in row} == {2, 6}  # Detectron2 counts the last one so
    report = json.loads((tmp_path / "peft_report.json").read_text())
    parameters = list(trainer.model.parameters())
    assert report["trainable"] == sum(p.numel() for p in parameters if p.requires_grad)
    assert (report["trainable"] < report["total"]) == peft
    if peft:
        record = json.loads((tmp_path / "adapter_final" / "peft_d2.json").read_text())
        assert "segm/AP" in record["metrics"]


@KINDS
def test_stopped_and_resumed_ends_with_the_same_weights(
    make_cfg: Callable[..., Any], base_weights: Path, tmp_path: Path, peft: bool
) -> None:
    opts = ("MODEL.WEIGHTS", base_weights, "TEST.EVAL_PERIOD", 2)
    whole = trained(train(make_cfg(*opts, peft=peft, output=tmp_path / "whole")))
    cfg = make_cfg(*opts, peft=peft, output=tmp_path / "stopped")
    with pytest.raises(KeyboardInterrupt):
        train(cfg, StopAfter(3))
    torch.rand(5)  # the state of the random numbers outside is of no importance
    resumed = train(cfg, resume=True)
    assert resumed.start_iter == 3
    assert_equal(whole, trained(resumed))


def test_a_seed_drawn_at_random_is_resumed(make_cfg: Callable[..., Any], base_weights: Path, tmp_path: Path) -> None:
    cfg = make_cfg("MODEL.WEIGHTS", base_weights, "SEED", -1)
    with pytest.raises(KeyboardInterrupt):
        train(cfg, StopAfter(3))
    first = torch.load(tmp_path / "model_0000002.pth", weights_only=True)["trainer"]["seed"]
    assert train(cfg, resume=True).cfg.SEED == first


def test_resume_without_a_checkpoint_starts(make_cfg: Callable[..., Any], base_weights: Path) -> None:
    assert train(make_cfg("MODEL.WEIGHTS", base_weights), resume=True).start_iter == 0


@KINDS
def test_a_damaged_checkpoint_is_passed_over(
    make_cfg: Callable[..., Any], base_weights: Path, tmp_path: Path, peft: bool, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = make_cfg("MODEL.WEIGHTS", base_weights, "SOLVER.CHECKPOINT_PERIOD", 2, peft=peft)
    with pytest.raises(KeyboardInterrupt):
        train(cfg, StopAfter(4))
    newest = tmp_path / ("adapter_0000003/adapter_model.safetensors" if peft else "model_0000003.pth")
    newest.write_bytes(newest.read_bytes()[:-100])
    resumed = train(cfg, resume=True)
    assert resumed.start_iter == 2
    assert any("0000003 is passed over" in r.getMessage().replace(".pth", "") for r in caplog.records)


def test_a_checkpoint_newer_than_its_tag_is_taken(
    make_cfg: Callable[..., Any], base_weights: Path, tmp_path: Path
) -> None:
    """The process may be killed after a checkpoint is complete and before ``last_checkpoint`` names it."""
    cfg = make_cfg("MODEL.WEIGHTS", base_weights, "SOLVER.CHECKPOINT_PERIOD", 2, peft=True)
    with pytest.raises(KeyboardInterrupt):
        train(cfg, StopAfter(4))
    tag, newest = tmp_path / "last_checkpoint", tmp_path / "adapter_0000003" / "training_state.pth"
    tag.write_text("adapter_0000001")
    time = newest.stat().st_mtime_ns
    os.utime(tag, ns=(time - 10, time - 10))
    assert Path(Checkpointer(Trainer(cfg).model, str(tmp_path)).get_checkpoint_file()).name == "adapter_0000003"
    os.utime(tag, ns=(time + 10, time + 10))
    assert Path(Checkpointer(Trainer(cfg).model, str(tmp_path)).get_checkpoint_file()).name == "adapter_0000001"


def test_periodic_checkpoints_are_thinned_out(make_cfg: Callable[..., Any], base_weights: Path, tmp_path: Path) -> None:
    opts = ("SOLVER.CHECKPOINT_PERIOD", 1, "SOLVER.CHECKPOINTS_TO_KEEP", 2)
    train(make_cfg("MODEL.WEIGHTS", base_weights, *opts, peft=True))
    assert sorted(p.name for p in tmp_path.glob("adapter_*")) == ["adapter_0000004", "adapter_0000005", "adapter_final"]


@pytest.mark.parametrize("iteration", [4, 5])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_bad_loss_stops_before_the_step(
    make_cfg: Callable[..., Any], base_weights: Path, tmp_path: Path, what: str, iteration: int
) -> None:
    cfg = make_cfg("MODEL.WEIGHTS", base_weights, "SOLVER.CHECKPOINT_PERIOD", 1, peft=True)
    trainer = Trainer(cfg)
    trainer.register_hooks([Poison(iteration, what)])
    trainer.resume_or_load(resume=False)
    with pytest.raises(LossNotFinite, match=rf"iteration {iteration}.*loss_mask.*\.png \(id \d+\)"):
        trainer.train()
    assert all(torch.isfinite(p).all() for p in trainer.model.parameters())
    assert (tmp_path / "last_checkpoint").read_text() == f"adapter_000000{iteration - 1}"
    stored = Checkpointer(Trainer(cfg).model, str(tmp_path))
    stored.resume_or_load(str(base_weights), resume=True)
    after = dict(stored.model.named_parameters())
    assert_equal(trained(trainer), {n: p.detach() for n, p in after.items() if p.requires_grad})


def test_sigterm_saves_and_leaves(make_cfg: Callable[..., Any], base_weights: Path, tmp_path: Path) -> None:
    class Preempt(HookBase):
        def before_step(self) -> None:
            if self.trainer.iter == 1:
                os.kill(os.getpid(), signal.SIGTERM)

    whole = trained(train(make_cfg("MODEL.WEIGHTS", base_weights, peft=True, output=tmp_path / "whole")))
    cfg = make_cfg("MODEL.WEIGHTS", base_weights, peft=True, output=tmp_path / "preempted")
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as left:
        train(cfg, Preempt())
    assert left.value.code == 0
    assert signal.getsignal(signal.SIGTERM) == before
    resumed = train(cfg, resume=True)
    assert resumed.start_iter == 2
    assert_equal(whole, trained(resumed))


def test_a_fork_of_a_training_still_ends_on_sigterm() -> None:
    """As the workers of a pool, which an evaluator starts and ends while the training listens for the signal."""
    program = """
import multiprocessing, time
from peft_d2.engine.hooks import SaveOnSignal
SaveOnSignal().before_train()
child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,), daemon=True)
child.start()
time.sleep(1)
child.terminate()
child.join(timeout=20)
print("exit code", child.exitcode)
child.kill()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert f"exit code {-signal.SIGTERM}" in done.stdout, done


def test_amp_on_the_cpu(make_cfg: Callable[..., Any], base_weights: Path) -> None:
    trainer = train(make_cfg("MODEL.WEIGHTS", base_weights, "SOLVER.AMP.ENABLED", True, peft=True))
    assert trainer._trainer.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="fp16 needs a GPU"):
        Trainer(make_cfg("SOLVER.AMP.ENABLED", True, "SOLVER.AMP.DTYPE", "fp16"))


def test_what_is_frozen_is_watched(make_cfg: Callable[..., Any], base_weights: Path) -> None:
    class Meddle(HookBase):
        def after_step(self) -> None:
            frozen = next(p for p in self.trainer.model.parameters() if not p.requires_grad)
            with torch.no_grad():
                frozen.add_(1.0)

    with pytest.raises(RuntimeError, match="a frozen weight or buffer changed"):
        train(make_cfg("MODEL.WEIGHTS", base_weights, peft=True), Meddle())


def test_a_part_without_effect_stops_the_run(
    make_cfg: Callable[..., Any], base_weights: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A module that the model never calls is given a LoRA."""
    from detectron2.modeling import META_ARCH_REGISTRY

    from peft_d2.models.mask2former.model import MaskFormer

    if "WithUnused" not in META_ARCH_REGISTRY:

        @META_ARCH_REGISTRY.register()
        class WithUnused(MaskFormer):
            @classmethod
            def from_config(cls, cfg: Any) -> dict[str, Any]:
                return MaskFormer.from_config(cfg)

            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                self.unused = torch.nn.Linear(4, 4)

    methods = "[{'NAME': 'lora', 'TARGETS': ['unused', 'qkv']}]"
    opts = ("MODEL.META_ARCHITECTURE", "WithUnused", "MODEL.PEFT.METHODS", methods)
    with pytest.raises(LivenessError, match="unused: lora .train., unused: lora .eval.. The model has no use"):
        train(make_cfg(*opts))
    train(make_cfg(*opts, "MODEL.PEFT.PROVE_LIVE", False))


def test_the_proof_changes_nothing(make_cfg: Callable[..., Any], base_weights: Path, tmp_path: Path) -> None:
    with_proof, without = (
        trained(train(make_cfg("MODEL.WEIGHTS", base_weights, "MODEL.PEFT.PROVE_LIVE", on, peft=True)))
        for on in (True, False)
    )
    assert_equal(with_proof, without)


class PutsIntoEval(HookBase):
    """As an evaluation of one's own that forgets to put the model back."""

    def after_step(self) -> None:
        self.trainer.model.eval()


def test_a_model_that_is_left_in_eval_mode_is_called_that(make_cfg: Callable[..., Any], base_weights: Path) -> None:
    with pytest.raises(RuntimeError, match=r"iteration 1: the model is in eval mode.*model\.train\(\)"):
        train(make_cfg("MODEL.WEIGHTS", base_weights), PutsIntoEval())


def test_a_trainer_trains_once(make_cfg: Callable[..., Any], base_weights: Path, tmp_path: Path) -> None:
    """Schedule and hooks were used up: it went on with a rate of nothing, and failed at the evaluation."""
    trainer = train(make_cfg("MODEL.WEIGHTS", base_weights, "SOLVER.MAX_ITER", 2))
    files = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(RuntimeError, match=r"has trained already.*Make another, Trainer\(cfg\)"):
        trainer.train()
    assert sorted(path.name for path in tmp_path.iterdir()) == files


@pytest.mark.parametrize("late", [False, True])
def test_no_tensorboard_is_one_line(
    make_cfg: Callable[..., Any], base_weights: Path, monkeypatch: pytest.MonkeyPatch, late: bool
) -> None:
    """Detectron2 0.5 imports it for its writer, Detectron2 main when the first figures are written."""
    if late:
        monkeypatch.setattr(TensorboardXWriter, "__init__", lambda self, *args, **kwargs: None)
    for name in ("tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match="tensorboard, with which Detectron2 writes figures, is missing: pip install"):
        train(make_cfg("MODEL.WEIGHTS", base_weights))


class LooksAtItsOwnValues(HookBase):
    """Makes the model refuse them, as Detectron2's region proposals do."""

    def before_step(self) -> None:
        def forward(data: Any) -> Any:
            raise FloatingPointError("Predicted boxes or scores contain Inf/NaN. Training has diverged.")

        if self.trainer.iter == 1:
            self.trainer.model.forward = forward


def test_a_model_that_finds_nan_itself(make_cfg: Callable[..., Any], base_weights: Path) -> None:
    with pytest.raises(LossNotFinite, match=r"iteration 1: Predicted.*diverged; images: .*\.png \(id \d.*BASE_LR"):
        train(make_cfg("MODEL.WEIGHTS", base_weights), LooksAtItsOwnValues())
