"""The trainer: Detectron2's, with our data, evaluation, optimizer and checkpoints, and a step that fails aloud."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import logging
import math
import os
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import yaml
from detectron2.engine import DefaultTrainer, HookBase, create_ddp_model, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from detectron2.utils.events import TensorboardXWriter
from torch import nn

from peft_d2 import peft
from peft_d2.data.classes import check_order, class_order
from peft_d2.data.loader import build_test_loader, build_train_loader
from peft_d2.engine import optimizer as optimization
from peft_d2.engine.checkpointer import Checkpointer
from peft_d2.engine.checks import check_batch
from peft_d2.engine.config import leaves, read_top, resolve_device, with_values
from peft_d2.engine.errors import ConfigError, EvaluationFailed, message_of
from peft_d2.engine.factory import build_model
from peft_d2.engine.hooks import (
    Bar,
    FitMemory,
    FrozenWeights,
    ProveLive,
    SaveOnSignal,
    SeedEachStep,
    TrainingBar,
    Writers,
    on_terminal,
    seed_everything,
)
from peft_d2.engine.processes import run_lock
from peft_d2.engine.step import LazyLoader, TrainStep, amp_dtype, unwrapped
from peft_d2.evaluation.augmented import augmented_model
from peft_d2.evaluation.build import build_evaluator
from peft_d2.evaluation.tiling import inference_model
from peft_d2.models import feature_cache
from peft_d2.storage import CheckpointError, disk

CONFIG_FILE, REPORT_FILE = "config.yaml", "peft_report.json"
logger = logging.getLogger(__name__)


class Trainer(DefaultTrainer):
    """Trains a config's model on its data sets, with PEFT where the config says so.

    Used like Detectron2's: ``trainer = Trainer(cfg); trainer.resume_or_load(resume=...); trainer.train()``.
    A run that is stopped and resumed takes the same steps as one that was not: each step's random numbers derive from
    (``SEED``, rank, iteration), and the data's order from ``SEED`` alone.
    """

    def __init__(self, cfg: Any) -> None:
        TrainerBase.__init__(self)
        cfg = DefaultTrainer.auto_scale_workers(cfg, comm.get_world_size()).clone()
        cfg.defrost()
        resolve_device(cfg)
        check_batch(cfg)
        optimization.scale_learning_rate(cfg)
        world, batch = comm.get_world_size(), cfg.SOLVER.IMS_PER_BATCH
        logger.info(
            "Batches of %d images: %d process(es) with %d each, in %d piece(s) of %d.",
            *(batch, world, batch // world, cfg.SOLVER.ACCUMULATE, batch // world // cfg.SOLVER.ACCUMULATE),
        )
        self._seed_is_drawn = cfg.SEED < 0
        cfg.SEED = int(comm.shared_random_seed()) if self._seed_is_drawn else cfg.SEED
        self.cfg = cfg
        self.start_iter = 0
        self._failed = self._trained = False
        self.max_iter = cfg.SOLVER.MAX_ITER
        dtype = amp_dtype(cfg)
        if comm.is_main_process():
            os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
        seed_everything(cfg.SEED, 0, 0)  # the same initial weights on all ranks
        model = self.build_model(cfg)
        self.report = _report(model)
        optimizer = self.build_optimizer(cfg, model)
        self.loader = LazyLoader(self._build_loader)
        self._trainer = TrainStep(_distributed(model), self.loader, optimizer, dtype, cfg.SOLVER.ACCUMULATE)
        self.scheduler = self.build_lr_scheduler(cfg, optimizer)
        self.checkpointer = Checkpointer(
            model,
            cfg.OUTPUT_DIR,
            keep=cfg.SOLVER.CHECKPOINTS_TO_KEEP,
            allow_other_base=cfg.MODEL.PEFT.ALLOW_OTHER_BASE,
            trainer=weakref.proxy(self),
        )
        self.register_hooks(self.build_hooks())

    def _build_loader(self) -> Iterable[Any]:
        if "start_iter" in inspect.signature(self.build_train_loader).parameters:
            return self.build_train_loader(self.cfg, start_iter=self.start_iter)
        if self.start_iter:
            logger.warning(
                "%s.build_train_loader takes no start_iter: the order of the data begins anew.", type(self).__name__
            )
        return self.build_train_loader(self.cfg)

    @classmethod
    def build_model(cls, cfg: Any) -> nn.Module:
        """The config's model, on its device; its structure goes to the log, as Detectron2 does it."""
        model = build_model(cfg)
        feature_cache.attach(cfg, model)
        logger.info("Model:\n%s", model, extra={"file_only": True})
        return model

    @classmethod
    def build_optimizer(cls, cfg: Any, model: nn.Module) -> torch.optim.Optimizer:
        """See :func:`peft_d2.engine.optimizer.build_optimizer`."""
        return optimization.build_optimizer(cfg, model)

    @classmethod
    def build_lr_scheduler(cls, cfg: Any, optimizer: torch.optim.Optimizer) -> Any:
        """See :func:`peft_d2.engine.optimizer.build_lr_scheduler`."""
        return optimization.build_lr_scheduler(cfg, optimizer)

    @classmethod
    def build_train_loader(cls, cfg: Any, start_iter: int = 0) -> Iterable[Any]:
        """See :mod:`peft_d2.data.loader`; another may be any iterable, and leave ``start_iter`` out."""
        return build_train_loader(cfg, start_iter, closed=True)

    @classmethod
    def build_test_loader(cls, cfg: Any, dataset_name: str) -> Any:
        """See :func:`peft_d2.data.loader.build_test_loader`; on a terminal with a progress bar."""
        loader = build_test_loader(cfg, dataset_name)
        return Bar(loader, f"evaluating {dataset_name}") if on_terminal() else loader

    @classmethod
    def build_evaluator(cls, cfg: Any, dataset_name: str, output_folder: str | None = None) -> Any:
        """See :func:`peft_d2.evaluation.build.build_evaluator`; results go to ``OUTPUT_DIR/inference``."""
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
        return build_evaluator(cfg, dataset_name, folder)

    @classmethod
    def test(cls, cfg: Any, model: nn.Module, evaluators: Any = None) -> OrderedDict[str, Any]:
        """Detectron2's evaluation of all test sets; by tiles where ``TEST.TILES`` says so."""
        return super().test(cfg, inference_model(cfg, model), evaluators)

    @classmethod
    def test_augmented(cls, cfg: Any, model: nn.Module) -> dict[str, Any]:
        """The evaluation once more under ``TEST.AUG``; tasks are called ``segm_TTA`` and so on, as Detectron2 does.

        Predictions and reports go to ``OUTPUT_DIR/inference_TTA``.
        """
        logger.info("Evaluating with test-time augmentation: sizes %s.", tuple(cfg.TEST.AUG.MIN_SIZES))
        names = cfg.DATASETS.TEST
        evaluators = [cls.build_evaluator(cfg, n, os.path.join(cfg.OUTPUT_DIR, "inference_TTA", n)) for n in names]
        own_size = with_values(cfg, {"INPUT.MIN_SIZE_TEST": 0})
        found = super().test(own_size, augmented_model(cfg, unwrapped(model)), evaluators)
        if len(names) > 1:
            return {name: {f"{task}_TTA": row for task, row in tasks.items()} for name, tasks in found.items()}
        return {f"{task}_TTA": row for task, row in found.items()}

    @classmethod
    def test_all(cls, cfg: Any, model: nn.Module) -> OrderedDict[str, Any]:
        """:meth:`test`, and where ``TEST.AUG.ENABLED`` says so, :meth:`test_augmented` besides."""
        results = cls.test(cfg, model)
        for name, found in (cls.test_augmented(cfg, model) if cfg.TEST.AUG.ENABLED else {}).items():
            results[name] = {**results.get(name, {}), **found}
        return results

    def build_hooks(self) -> list[HookBase | None]:
        """Detectron2's hooks in their order, the checkpointer writing our files, and ours around them."""
        cfg, main = self.cfg, comm.is_main_process()
        self._trackers: list[Any] = []
        if cfg.TRACKING.WITH and main:
            from peft_d2.engine.tracking import build_trackers

            self._trackers = build_trackers(cfg, lambda: self.start_iter > 0)
        prefix = self.checkpointer.prefix
        saver = hooks.PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD, file_prefix=prefix)
        return [
            hooks.IterationTimer(),
            SeedEachStep(),
            hooks.LRScheduler(),
            None if cfg.MODEL.PEFT.MEMORY_BUDGET is None else FitMemory(),
            ProveLive() if prefix == "adapter" and cfg.MODEL.PEFT.PROVE_LIVE else None,
            FrozenWeights() if prefix == "adapter" else None,
            saver if main else None,
            SaveOnSignal(),  # before an evaluation, which may take longer than a preempted job has
            hooks.EvalHook(cfg.TEST.EVAL_PERIOD, self._evaluate) if cfg.DATASETS.TEST else None,
            Writers() if main else None,
            TrainingBar() if on_terminal() else None,
        ]

    def build_writers(self) -> list[Any]:
        """Detectron2's console, ``metrics.json`` and TensorBoard, and what ``TRACKING.WITH`` names.

        Raises:
            ConfigError: tensorboard is not installed.
        """
        try:
            writers = [*super().build_writers(), *self._trackers]
            if any(isinstance(writer, TensorboardXWriter) for writer in writers):
                importlib.import_module("torch.utils.tensorboard")  # in Detectron2 main not before the first figures
            return writers
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"the package {error.name}, with which Detectron2 writes figures, is missing: pip install tensorboard"
            ) from error

    def before_train(self) -> None:
        """Detectron2's hooks begin; where one refuses, nothing is evaluated."""
        self._failed = True
        super().before_train()
        self._failed = False

    def run_step(self) -> None:
        """One step of the inner trainer."""
        self._failed = True
        super().run_step()
        self._failed = False

    def _evaluate(self) -> Any:
        """Evaluate; the training is saved before, as an evaluation may fail, or be killed, in ways of its own.

        Raises:
            EvaluationFailed: whatever went wrong, ``exit()`` in an evaluator's code included.
        """
        if self._failed:  # Detectron2 evaluates in after_train, also when the last step raised
            return {}
        last = self.iter + 1 >= self.max_iter
        name = f"{self.checkpointer.prefix}_{self.iter:07d}"
        extra = not last and (self.iter + 1) % self.cfg.SOLVER.CHECKPOINT_PERIOD != 0  # else it has just been saved
        if extra:
            self.checkpointer.save(name, iteration=self.iter)
        try:
            self._last_eval_results = (self.test_all if last else self.test)(self.cfg, self.model)
        except (Exception, SystemExit) as error:
            when = f"{min(self.iter + 1, self.max_iter)} of {self.max_iter} iterations"
            raise EvaluationFailed(
                f"the evaluation after {when} failed: {_reason(error)}. What was trained is saved in "
                f"{self.cfg.OUTPUT_DIR}: put this right and run again with --resume."
            ) from error
        if extra:
            self.checkpointer.remove(name)
        flat = flatten_results_dict(self._last_eval_results)
        self.checkpointer.metrics = {k: float(v) for k, v in flat.items() if math.isfinite(v)}
        if last and self.checkpointer.prefix == "adapter":
            self.checkpointer.save("adapter_final")  # once more, now that its figures are known
        return self._last_eval_results

    def resume_or_load(self, resume: bool = True) -> None:
        """Load the base's weights, and where ``resume`` says so, go on from the newest checkpoint.

        One rule: weights, the optimizer's moments, the iteration and a seed that was drawn come from the checkpoint;
        every setting is the config's of today. What cannot follow a changed setting is refused.

        Raises:
            CheckpointError: the folder's checkpoints, or their optimizers, are of another kind of run.
        """
        config = Path(self.cfg.OUTPUT_DIR, CONFIG_FILE)
        before = dict(leaves(read_top(str(config)))) if resume and config.is_file() else {}
        self.checkpointer.resume_or_load(self.cfg.MODEL.WEIGHTS, resume=resume)
        if self.start_iter == 0:
            self.checkpointer.warn_of_beginning(resume)
            return
        logger.info(
            "Resuming after %d iterations: weights, the optimizer's moments and the place in the data are the "
            "checkpoint's, all settings are those of the config now.",
            self.start_iter,
        )
        for key, value in leaves(yaml.safe_load(self.cfg.dump())):
            if (old := before.get(key, value)) != value and key not in ("OUTPUT_DIR", "SOLVER.REFERENCE_IMS"):
                logger.info("Changed, and in effect from now on: %s %s -> %s", key, old, value)

    def train(self) -> OrderedDict[str, Any] | None:
        """Run the training, once; returns the last evaluation's results. However it ends, its loaders' processes do.

        Raises:
            RuntimeError: this trainer has trained before: schedule, hooks and files are where that left them.
        """
        if self._trained:
            raise RuntimeError(
                "this trainer has trained already, and its schedule and hooks are used up. Make another, Trainer(cfg): "
                "with resume_or_load(resume=True) and a higher SOLVER.MAX_ITER it goes on from there."
            )
        seed_everything(self.cfg.SEED, comm.get_rank(), self.max_iter)
        with ExitStack() as stack:
            if comm.is_main_process():
                folder = self.cfg.OUTPUT_DIR
                stack.enter_context(run_lock(folder))
                self.checkpointer.require_own(self.start_iter)
                disk.write_bytes(Path(folder, CONFIG_FILE), self.cfg.dump().encode())
                disk.write_bytes(Path(folder, REPORT_FILE), json.dumps(self.report, indent=1).encode())
            stack.enter_context(self.loader.closed())
            self._trained = True
            super().train()
        return getattr(self, "_last_eval_results", None)

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on, beside the weights."""
        return {
            "iteration": min(self.iter, self.max_iter - 1),
            "seed": self.cfg.SEED,
            "classes": class_order(self.cfg),
            "optimizer": self.optimizer.state_dict(),
            "parameters": optimization.parameter_names(self.optimizer, unwrapped(self.model)),
            "scheduler": self.scheduler.state_dict(),
            "grad_scaler": self._trainer.grad_scaler.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave; see :meth:`resume_or_load` for what is taken from it.

        Raises:
            CheckpointError: it is none, or of a run with other trained parameters, another optimizer, more iterations,
                or the same classes in another order.
        """
        try:
            iteration, seed = state_dict["iteration"], state_dict["seed"]
            if type(iteration) is not int or type(seed) is not int or iteration < 0 or not 0 <= seed < 2**63:
                raise ValueError(f"iteration {iteration!r} and seed {seed!r}")
            if iteration >= self.max_iter:
                raise CheckpointError(
                    f"the checkpoint has taken {iteration + 1} iterations and SOLVER.MAX_ITER is {self.max_iter}: "
                    "nothing is left to train. Raise it, or run without --resume in another OUTPUT_DIR."
                )
            classes = check_order(state_dict.get("classes"), self.cfg)
            if injection := peft.get_injection(unwrapped(self.model)):
                injection.current.classes = classes
            names = optimization.parameter_names(self.optimizer, unwrapped(self.model))
            optimization.restore_optimizer(self.optimizer, state_dict["optimizer"], names, state_dict.get("parameters"))
            optimization.restore_scheduler(self.scheduler, state_dict["scheduler"], self.optimizer)
            if state_dict["grad_scaler"]:  # empty where it was not in use
                self._trainer.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"the checkpoint's training state cannot be used ({type(error).__name__}: {error}). Delete this "
                "checkpoint to resume from the one before it, or start without --resume."
            ) from error
        self.iter, self.start_iter = iteration, iteration + 1
        if self._seed_is_drawn:
            self.cfg.SEED = seed


def _reason(error: BaseException) -> str:
    """One line on an error that somebody else's code raised."""
    if isinstance(error, SystemExit):
        return f"the evaluator ended the program ({error.code}); its own message stands above"
    text = " ".join(message_of(error).split())
    return text.rstrip(".") if type(error).__module__.startswith("peft_d2") else f"{type(error).__name__}: {text}"


def _distributed(model: nn.Module) -> nn.Module:
    on_cpu: dict[str, Any] = {"device_ids": None} if next(model.parameters()).device.type == "cpu" else {}
    unused = getattr(model, "has_unused_parameters", False)
    return create_ddp_model(model, broadcast_buffers=False, find_unused_parameters=unused, **on_cpu)


def _report(model: nn.Module) -> dict[str, Any]:
    """Log what is trained, as a table, and give its figures."""
    injection = peft.get_injection(model)
    if injection is None:
        total = sum(p.numel() for p in model.parameters())
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        logger.info("No PEFT: %s of %s parameters are trained.", f"{trainable:,}", f"{total:,}")
        return {"trainable": trainable, "total": total, "percent": 100 * trainable / total, "rows": []}
    report = peft.make_report(model)
    logger.info("What is trained:\n%s", report)
    figures: dict[str, Any] = {"trainable": report.trainable, "total": report.total, "percent": report.percent}
    if start := injection.current.started_from:
        figures["started_from"] = start
    return {**figures, "rows": [dataclasses.asdict(row) for row in report.rows]}
