"""Resuming under another config: a changed value takes effect or is refused in one line; nothing starts over."""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from detectron2.data import MetadataCatalog
from detectron2.engine import HookBase

from peft_d2.engine.errors import ConfigError, is_expected
from peft_d2.engine.processes import run_lock
from peft_d2.engine.trainer import Trainer
from peft_d2.peft import LivenessError, NotLive
from peft_d2.storage import AdapterFileError, CheckpointError
from peft_d2.storage.adapter_file import classes_of

from .test_training import StopAfter, assert_equal, train, trained

SCHEDULE = ("SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.STEPS", (3,), "SOLVER.GAMMA", 0.5)


class Groups(HookBase):
    """Keeps the settings of the optimizer's groups in the last step."""

    def before_step(self) -> None:
        self.rows = [{k: v for k, v in g.items() if k != "params"} for g in self.trainer.optimizer.param_groups]

    def values(self, key: str) -> set[float]:
        return {round(row[key], 9) for row in self.rows}


@pytest.fixture
def stopped(make_cfg: Callable[..., Any], base_weights: Path) -> Callable[..., Any]:
    """``stopped(*opts)``: the config of a run that took three of six steps, changed by ``opts``."""
    with pytest.raises(KeyboardInterrupt):
        train(make_cfg("MODEL.WEIGHTS", base_weights, peft=True), StopAfter(3))
    return lambda *opts, peft=True: make_cfg("MODEL.WEIGHTS", base_weights, *opts, peft=peft)


@pytest.mark.parametrize(
    ("opts", "key", "expected"),
    [
        (("SOLVER.BASE_LR", 0.01), "initial_lr", {0.01}),
        (("MODEL.PEFT.LR_FACTOR", 3.0), "initial_lr", {0.001, 0.003}),
        (("SOLVER.WEIGHT_DECAY", 0.2), "weight_decay", {0.2}),
        (SCHEDULE, "lr", {0.0005}),
        (("SOLVER.IMS_PER_BATCH", 4), "initial_lr", {0.002}),
        (("SOLVER.AMP.ENABLED", True), "initial_lr", {0.001}),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_a_changed_setting_takes_effect_and_is_said(
    stopped: Callable[..., Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    opts: tuple[Any, ...],
    key: str,
    expected: set[float],
) -> None:
    groups = Groups()
    with caplog.at_level(logging.INFO, "peft_d2"):
        trainer = train(stopped(*opts), groups, resume=True)
    assert trainer.start_iter == 3 and groups.values(key) == expected
    said = [r.getMessage() for r in caplog.records if r.getMessage().startswith("Changed, and in effect from now on")]
    assert any(f": {opts[0]} " in line and f"-> {opts[1]}" in line for line in said), said
    written: Any = yaml.safe_load((tmp_path / "config.yaml").read_text())
    for part in opts[0].split("."):
        written = written[part]
    assert written == opts[1]


def test_nothing_is_said_where_nothing_changed(stopped: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "peft_d2"):
        train(stopped(), resume=True)
    assert not [r for r in caplog.records if "Changed" in r.getMessage()]


def test_moments_follow_their_parameters(stopped: Callable[..., Any]) -> None:
    """Another factor sorts the parameters into other groups."""
    before, after = Trainer(stopped()), Trainer(stopped("MODEL.PEFT.LR_FACTOR", 3.0))
    moments = []
    for trainer in (before, after):
        trainer.resume_or_load(resume=True)
        names = {id(parameter): name for name, parameter in trainer.model.named_parameters()}
        moments.append({names[id(p)]: state["exp_avg"] for p, state in trainer.optimizer.state.items()})
    assert len(after.optimizer.param_groups) > len(before.optimizer.param_groups)
    assert_equal(*moments)


OTHER_RANK = "[{'NAME': 'lora', 'RANK': 3, 'ALPHA': 2, 'TARGETS': ['qkv', 'self_attn.value_proj']}]"


@pytest.mark.parametrize(
    ("opts", "error", "message"),
    [
        (("SOLVER.OPTIMIZER", "SGD"), CheckpointError, "SOLVER.OPTIMIZER names another kind"),
        (("SOLVER.MAX_ITER", 2), CheckpointError, "has taken 3 iterations and SOLVER.MAX_ITER is 2"),
        (("MODEL.PEFT.METHODS", OTHER_RANK), AdapterFileError, "scaled by 0.666667"),
        (("MODEL.PEFT.TRAIN", "['class_embed']"), AdapterFileError, "mask_embed"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) and isinstance(value[0], str) else "",
)
def test_what_cannot_follow_is_refused(
    stopped: Callable[..., Any], tmp_path: Path, opts: tuple[Any, ...], error: Any, message: str
) -> None:
    before = (tmp_path / "config.yaml").read_bytes()
    trainer = Trainer(stopped(*opts))
    with pytest.raises(error, match=message) as raised:
        trainer.resume_or_load(resume=True)
    assert is_expected(raised.value) and (tmp_path / "config.yaml").read_bytes() == before


@pytest.mark.parametrize(
    "damage",
    [
        {"iteration": 10**9}, {"iteration": -5}, {"iteration": "x"}, {"iteration": True}, {"seed": None}, {"seed": -1},
        {"optimizer": {}}, {"optimizer": {"state": {}, "param_groups": []}}, {"scheduler": {}}, {"scheduler": None},
        {"parameters": ["a"]},
    ],
    ids=str,
)  # fmt: skip
def test_a_state_with_odd_contents_is_one_line(
    stopped: Callable[..., Any], tmp_path: Path, damage: dict[str, Any]
) -> None:
    path = tmp_path / "adapter_0000002" / "training_state.pth"
    state = torch.load(path, weights_only=True)["trainer"]
    trainer = Trainer(stopped())
    with pytest.raises(CheckpointError) as raised:
        trainer.load_state_dict({**state, **damage})
    assert "\n" not in str(raised.value)


def test_an_optimizer_of_another_size(stopped: Callable[..., Any], tmp_path: Path) -> None:
    state = torch.load(tmp_path / "adapter_0000002" / "training_state.pth", weights_only=True)["trainer"]
    state["optimizer"]["state"][0]["exp_avg"] = torch.zeros(2, 2)
    with pytest.raises(CheckpointError, match="of another model"):
        Trainer(stopped()).load_state_dict(state)


def test_classes_that_have_changed_places(
    stopped: Callable[..., Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As in another export of the same annotations: the run went on, and the head's rows meant other classes."""
    state = torch.load(tmp_path / "adapter_0000002" / "training_state.pth", weights_only=True)["trainer"]
    assert state["classes"] == ["circle", "square", "triangle"]
    with pytest.raises(CheckpointError, match=r"trained on the classes \['square', 'circle'.*in another order, "):
        Trainer(stopped()).load_state_dict({**state, "classes": ["square", "circle", "triangle"]})
    Trainer(stopped()).load_state_dict({**state, "classes": ["disc", "square", "triangle"]})
    assert "The classes were ['disc', " in caplog.text
    adapter = tmp_path / "adapter_0000002"
    for file in adapter.glob("training_state*"):
        file.unlink()  # as an adapter goes from person to person
    cfg = stopped("MODEL.PEFT.WEIGHTS", adapter)
    Trainer.build_model(cfg)
    known = MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).__dict__
    monkeypatch.setitem(known, "thing_classes", ["triangle", "square", "circle"])
    with pytest.raises(CheckpointError, match="has them in another order"):
        Trainer.build_model(cfg)


def test_an_adapter_has_the_classes_of_its_runs_config(
    stopped: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = stopped()
    names = ["disc", "square", "triangle"]
    monkeypatch.setitem(MetadataCatalog.get(cfg.DATASETS.TRAIN[0]).__dict__, "thing_classes", names)
    train(cfg, resume=True)
    assert classes_of(tmp_path / "adapter_0000002") == ["circle", "square", "triangle"]
    assert classes_of(tmp_path / "adapter_final") == names


def test_a_state_of_an_earlier_release_resumes(stopped: Callable[..., Any], tmp_path: Path) -> None:
    """It does not name its parameters: they are those of the same groups, or it is refused."""
    state = torch.load(tmp_path / "adapter_0000002" / "training_state.pth", weights_only=True)["trainer"]
    del state["parameters"]
    same, other = Trainer(stopped()), Trainer(stopped("MODEL.PEFT.LR_FACTOR", 3.0))
    same.load_state_dict(state)
    assert same.start_iter == 3 and len(same.optimizer.state) == len(state["optimizer"]["state"])
    with pytest.raises(CheckpointError, match="earlier release"):
        other.load_state_dict(state)


@pytest.mark.parametrize("first", [True, False])
def test_a_folder_of_another_kind_of_run_is_refused(
    make_cfg: Callable[..., Any], base_weights: Path, tmp_path: Path, first: bool
) -> None:
    """``--resume`` without the PEFT config of an adapter's run, or with one in a folder of full checkpoints."""
    opts = ("MODEL.WEIGHTS", base_weights, "SOLVER.MAX_ITER", 1, "DATASETS.TEST", "()")
    cfg = make_cfg(*opts, peft=first)
    cfg.DATASETS.TEST = ()
    train(cfg)
    files = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(CheckpointError, match=rf"{'adapter' if first else 'model'}_final.*config of that run"):
        train(make_cfg(*opts, peft=not first), resume=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == files


def test_a_resumed_run_is_not_stopped_by_the_proof(
    stopped: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The proof depends on the image; a run that passed it once must stay resumable."""
    found = [NotLive("some.part: lora", "train", "passed by", is_fault=True)]
    monkeypatch.setattr("peft_d2.peft.not_live", lambda model, *batches: found)
    fresh = Trainer(stopped())
    fresh.resume_or_load(resume=False)
    with pytest.raises(LivenessError, match="some.part"):
        fresh.train()
    trainer = train(stopped("MODEL.PEFT.PROVE_LIVE", True), resume=True)
    assert (trainer.start_iter, trainer.iter) == (3, 6)
    assert "On the first images of the resumed run, these injected parts cannot change" in caplog.text


HOLD = """
import sys, time
from peft_d2.engine.processes import run_lock
with run_lock(sys.argv[1]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_two_runs_in_one_folder(make_cfg: Callable[..., Any], base_weights: Path, tmp_path: Path) -> None:
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        cfg = make_cfg("MODEL.WEIGHTS", base_weights, "SOLVER.MAX_ITER", 1)
        with pytest.raises(ConfigError, match=f"in use by another training .process {other.pid} on "):
            train(cfg)
        assert not {"config.yaml", "model_final.pth"} & {path.name for path in tmp_path.iterdir()}
    finally:
        other.kill()  # as death does, this frees the lock
        other.wait()
    with run_lock(str(tmp_path)), run_lock(str(tmp_path)):  # the same process may hold it twice
        pass


def test_the_rule_keeps_resuming_exact(make_cfg: Callable[..., Any], base_weights: Path, tmp_path: Path) -> None:
    """A longer schedule, decided on after the run was stopped, gives what it would have given from that step on."""
    opts = ("MODEL.WEIGHTS", base_weights, "MODEL.PEFT.LR_FACTOR", 3.0, "SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR")
    opts += ("SOLVER.STEPS", "(5,)")
    whole = trained(train(make_cfg(*opts, "SOLVER.MAX_ITER", 7, peft=True, output=tmp_path / "whole")))
    train(make_cfg(*opts, "SOLVER.MAX_ITER", 6, peft=True, output=tmp_path / "two"))
    resumed = train(make_cfg(*opts, "SOLVER.MAX_ITER", 7, peft=True, output=tmp_path / "two"), resume=True)
    assert resumed.start_iter == 6
    assert_equal(whole, trained(resumed))
