"""Writers that send a run's figures to wandb and mlflow, beside Detectron2's log, metrics.json and TensorBoard."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from detectron2.utils.events import EventWriter, get_event_storage

from peft_d2.engine.errors import ConfigError
from peft_d2.storage import disk

RUNS_FILE = "tracking.json"  # which run of which service belongs to the folder


class Tracker(EventWriter):
    """Sends a service the figures that are new since the last time, iteration by iteration.

    Args:
        cfg: ``TRACKING.PROJECT`` and ``RUN`` say under which names; the rest is set up as the services have it, e.g. by
            ``WANDB_MODE=offline`` or ``MLFLOW_TRACKING_URI``.
        resumed: whether the training is a resumed one, which goes on with its run; called when the training begins.
    """

    service: str
    package: str

    def __init__(self, cfg: Any, resumed: Callable[[], bool]) -> None:
        self._folder = Path(cfg.OUTPUT_DIR)
        self._project = cfg.TRACKING.PROJECT
        self._name = cfg.TRACKING.RUN or os.path.basename(os.path.abspath(cfg.OUTPUT_DIR))
        self._config = yaml.safe_load(cfg.dump())
        self._resumed = resumed
        self._last = -1

    def start(self) -> None:
        """Open a run of the service; a resumed training goes on with the one that it had.

        Raises:
            ConfigError: the service refuses.
        """
        path = self._folder / RUNS_FILE
        runs = json.loads(path.read_text()) if path.is_file() else {}
        try:
            runs[self.service] = self.open(runs.get(self.service) if self._resumed() else None)
        except Exception as error:  # whatever a service raises, the remedy is the same
            raise ConfigError(
                f"{self.service} cannot open a run: {error}. Set it up, or take it out of TRACKING.WITH."
            ) from error
        disk.write_bytes(path, json.dumps(runs).encode())

    def write(self) -> None:
        """Send all scalars that are newer than those of the last call."""
        rows: dict[int, dict[str, float]] = defaultdict(dict)
        for name, (value, iteration) in get_event_storage().latest_with_smoothing_hint(20).items():
            if iteration > self._last:
                rows[iteration][name] = value
        for self._last, row in sorted(rows.items()):
            self.log(row, self._last)

    def open(self, run: str | None) -> str:
        """Begin a run, or go on with ``run``; returns its id."""
        raise NotImplementedError

    def log(self, row: dict[str, float], iteration: int) -> None:
        """Send one iteration's figures."""
        raise NotImplementedError


class WandbWriter(Tracker):
    """Weights & Biases."""

    service = package = "wandb"

    def open(self, run: str | None) -> str:
        """Begin a run with the config, or go on with the one of the id ``run``; returns its id."""
        import wandb

        names = {"project": self._project, "name": self._name, "dir": str(self._folder)}
        self._run = wandb.init(**names, config=self._config, id=run, resume="allow" if run else None)
        return self._run.id

    def log(self, row: dict[str, float], iteration: int) -> None:
        """Send one iteration's figures as a step."""
        self._run.log(row, step=iteration)

    def close(self) -> None:
        """Send what is left."""
        if hasattr(self, "_run"):
            self._run.finish()


class MlflowWriter(Tracker):
    """MLflow."""

    service, package = "mlflow", "mlflow-skinny"

    def open(self, run: str | None) -> str:
        """Begin a run in the project's experiment, made if there is none, or go on with ``run``; returns its id."""
        from mlflow import MlflowClient

        self._client = MlflowClient()
        if run:
            self._client.update_run(run, status="RUNNING")
            self._run = run
            return run
        experiment = self._client.get_experiment_by_name(self._project)
        number = experiment.experiment_id if experiment else self._client.create_experiment(self._project)
        self._run = str(self._client.create_run(number, run_name=self._name).info.run_id)
        self._client.log_dict(self._run, self._config, "config.yaml")
        return self._run

    def log(self, row: dict[str, float], iteration: int) -> None:
        """Send one iteration's figures; characters that mlflow's names cannot have become "_"."""
        for name, value in row.items():
            self._client.log_metric(self._run, re.sub(r"[^\w\-. /]", "_", name), float(value), step=iteration)

    def close(self) -> None:
        """Mark the run as ended."""
        if hasattr(self, "_run"):
            self._client.set_terminated(self._run)


def build_trackers(cfg: Any, resumed: Callable[[], bool]) -> list[Tracker]:
    """Writers for the services that ``TRACKING.WITH`` names; arguments as of :class:`Tracker`.

    Raises:
        ConfigError: an unknown service, or a package that is not installed.
    """
    services = {kind.service: kind for kind in (MlflowWriter, WandbWriter)}
    for name in cfg.TRACKING.WITH:
        if name not in services:
            raise ConfigError(f"TRACKING.WITH names {name!r}; expected some of {sorted(services)}.")
        if importlib.util.find_spec(name) is None:
            raise ConfigError(
                f"TRACKING.WITH names {name!r}, whose package is not installed: pip install {services[name].package}, "
                f"or pip install 'peft_d2[{name}]'."
            )
    return [services[name](cfg, resumed) for name in cfg.TRACKING.WITH]
