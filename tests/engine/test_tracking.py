"""Figures to wandb and mlflow: their real packages, without a server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from peft_d2.engine import tracking
from peft_d2.engine.errors import ConfigError
from peft_d2.engine.trainer import Trainer

from .test_training import StopAfter, train


def test_mlflow_gets_one_run_for_a_stopped_and_resumed_training(
    make_cfg: Callable[..., Any], base_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow", reason="the package mlflow-skinny is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    opts = ("TRACKING.WITH", "['mlflow']", "TRACKING.PROJECT", "shapes", "TRACKING.RUN", "first")
    cfg = make_cfg("MODEL.WEIGHTS", base_weights, *opts, output=tmp_path / "run")
    with pytest.raises(KeyboardInterrupt):
        train(cfg, StopAfter(3))
    train(cfg, resume=True)
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("shapes").experiment_id])
    assert run.info.run_name == "first" and run.info.status == "FINISHED"
    assert {m.step for m in client.get_metric_history(run.info.run_id, "total_loss")} == {3, 5}
    assert "segm/AP" in run.data.metrics
    train(cfg)  # not resumed: another one
    assert len(client.search_runs([run.info.experiment_id])) == 2


def test_wandb_offline(
    make_cfg: Callable[..., Any], base_weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb", reason="the package wandb is not installed")
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_CONSOLE": "off"}.items():
        monkeypatch.setenv(name, value)
    train(make_cfg("MODEL.WEIGHTS", base_weights, "TRACKING.WITH", "['wandb']", "SOLVER.MAX_ITER", 2))
    wandb.teardown()  # its service writes the file when it ends
    (stored,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    content = stored.read_bytes()
    assert b"total_loss" in content and b"segm/AP" in content and b"BASE_LR" in content
    assert set(json.loads((tmp_path / tracking.RUNS_FILE).read_text())) == {"wandb"}


def test_what_is_missing_or_fails_is_named(
    make_cfg: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="'comet'; expected some of .'mlflow', 'wandb'"):
        Trainer(make_cfg("TRACKING.WITH", "['comet']"))
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="not installed: pip install mlflow-skinny"):
        Trainer(make_cfg("TRACKING.WITH", "['mlflow']"))
    monkeypatch.undo()

    def refuse(self: Any, run: Any) -> str:
        raise OSError("no server")

    monkeypatch.setattr(tracking.WandbWriter, "open", refuse)
    monkeypatch.setattr(tracking.importlib.util, "find_spec", lambda name: True)
    with pytest.raises(ConfigError, match="wandb cannot open a run: no server.*TRACKING.WITH"):
        train(make_cfg("TRACKING.WITH", "['wandb']"))
