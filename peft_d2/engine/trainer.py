"""The trainer: Detectron2's, with our data, evaluation, optimizer and checkpoints, and a step that fails aloud."""

from __future__ import annotations

import dataclasses
import inspect
import json
import logging
import math
import os
import weakref
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from detectron2.engine import DefaultTrainer, HookBase, create_ddp_model, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation.testing import flatten_results_dict
from detectron2.utils import comm
from torch import nn

from peft_d2 import data, evaluation, peft
from peft_d2.engine import optimizer as optimization
from peft_d2.engine.checkpointer import Checkpointer
from peft_d2.engine.checks import build_model, check_batch
from peft_d2.engine.config import resolve_device
from peft_d2.engine.hooks import FrozenWeights, ProveLive, SaveOnSignal, Writers
from peft_d2.engine.progress import Bar, TrainingBar, on_terminal
from peft_d2.engine.seeds import SeedEachStep, choose_seed, seed_everything
from peft_d2.engine.step import LazyLoader, TrainStep, amp_dtype, unwrapped
from peft_d2.engine.tracking import build_trackers
from peft_d2.models.sam import feature_cache
from peft_d2.storage import atomic

REPORT_FILE = "peft_report.json"
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
        cfg.SEED = choose_seed(cfg.SEED)
        self.cfg = cfg
        self.start_iter = 0
        self._step_failed = False
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
        logger.info("Model:\n%s", model)
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
        """See :func:`peft_d2.data.build_train_loader`; another may be any iterable, and leave ``start_iter`` out."""
        return data.build_train_loader(cfg, start_iter)

    @classmethod
    def build_test_loader(cls, cfg: Any, dataset_name: str) -> Any:
        """See :func:`peft_d2.data.build_test_loader`; on a terminal with a progress bar."""
        loader = data.build_test_loader(cfg, dataset_name)
        return Bar(loader, f"evaluating {dataset_name}") if on_terminal() else loader

    @classmethod
    def build_evaluator(cls, cfg: Any, dataset_name: str, output_folder: str | None = None) -> Any:
        """See :func:`peft_d2.evaluation.build_evaluator`; results go to ``OUTPUT_DIR/inference``."""
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference", dataset_name)
        return evaluation.build_evaluator(cfg, dataset_name, folder)

    @classmethod
    def test(cls, cfg: Any, model: nn.Module, evaluators: Any = None) -> OrderedDict[str, Any]:
        """Detectron2's evaluation of all test sets; by tiles where ``TEST.TILES`` says so."""
        return super().test(cfg, evaluation.inference_model(cfg, model), evaluators)

    @classmethod
    def test_augmented(cls, cfg: Any, model: nn.Module) -> dict[str, Any]:
        """The evaluation once more under ``TEST.AUG``; tasks are called ``segm_TTA`` and so on, as Detectron2 does.

        Predictions and reports go to ``OUTPUT_DIR/inference_TTA``.
        """
        logger.info("Evaluating with test-time augmentation: sizes %s.", tuple(cfg.TEST.AUG.MIN_SIZES))
        names = cfg.DATASETS.TEST
        evaluators = [cls.build_evaluator(cfg, n, os.path.join(cfg.OUTPUT_DIR, "inference_TTA", n)) for n in names]
        own_size = cfg.clone()
        own_size.defrost()
        own_size.INPUT.MIN_SIZE_TEST = 0
        found = super().test(own_size, evaluation.augmented_model(cfg, unwrapped(model)), evaluators)
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
        prefix = self.checkpointer.prefix
        saver = hooks.PeriodicCheckpointer(self.checkpointer, cfg.SOLVER.CHECKPOINT_PERIOD, file_prefix=prefix)
        return [
            hooks.IterationTimer(),
            SeedEachStep(cfg.SEED),
            hooks.LRScheduler(),
            ProveLive() if prefix == "adapter" and cfg.MODEL.PEFT.PROVE_LIVE else None,
            FrozenWeights() if prefix == "adapter" else None,
            saver if main else None,
            SaveOnSignal(),  # before an evaluation, which may take longer than a preempted job has
            hooks.EvalHook(cfg.TEST.EVAL_PERIOD, self._evaluate) if cfg.DATASETS.TEST else None,
            Writers(self.build_writers(), period=20) if main else None,
            TrainingBar() if on_terminal() else None,
        ]

    def build_writers(self) -> list[Any]:
        """Detectron2's console, ``metrics.json`` and TensorBoard, and what ``TRACKING.WITH`` names."""
        return [*super().build_writers(), *build_trackers(self.cfg, lambda: self.start_iter > 0)]

    def run_step(self) -> None:
        """One step of the inner trainer."""
        self._step_failed = True
        super().run_step()
        self._step_failed = False

    def _evaluate(self) -> Any:
        if self._step_failed:  # Detectron2 evaluates in after_train, also when the last step raised
            return {}
        last = self.iter + 1 >= self.max_iter
        self._last_eval_results = (self.test_all if last else self.test)(self.cfg, self.model)
        flat = flatten_results_dict(self._last_eval_results)
        self.checkpointer.metrics = {k: float(v) for k, v in flat.items() if math.isfinite(v)}
        if last and self.checkpointer.prefix == "adapter":
            self.checkpointer.save("adapter_final")  # once more, now that its figures are known
        return self._last_eval_results

    def train(self) -> OrderedDict[str, Any] | None:
        """Run the training; returns the last evaluation's results. However it ends, its data loaders' processes do."""
        if comm.is_main_process():
            atomic.write_bytes(Path(self.cfg.OUTPUT_DIR, REPORT_FILE), json.dumps(self.report, indent=1).encode())
        seed_everything(self.cfg.SEED, comm.get_rank(), self.max_iter)
        with data.workers_ended(), closing(self.loader):
            super().train()
        return getattr(self, "_last_eval_results", None)

    def state_dict(self) -> dict[str, Any]:
        """What a run needs to go on, beside the weights."""
        return {
            "iteration": min(self.iter, self.max_iter - 1),
            "seed": self.cfg.SEED,
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "grad_scaler": self._trainer.grad_scaler.state_dict(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what :meth:`state_dict` gave, the seed of the first start included."""
        self.iter = state_dict["iteration"]
        self.optimizer.load_state_dict(state_dict["optimizer"])
        self.scheduler.load_state_dict(state_dict["scheduler"])
        self._trainer.grad_scaler.load_state_dict(state_dict["grad_scaler"])
        self.cfg.SEED = state_dict["seed"]
        for hook in self._hooks:
            if isinstance(hook, SeedEachStep):
                hook.seed = self.cfg.SEED


def _distributed(model: nn.Module) -> nn.Module:
    on_cpu = next(model.parameters()).device.type == "cpu"
    options: dict[str, Any] = {"device_ids": None} if on_cpu else {}
    if getattr(model, "has_unused_parameters", False):
        options["find_unused_parameters"] = True
    return create_ddp_model(model, broadcast_buffers=False, **options)


def _report(model: nn.Module) -> dict[str, Any]:
    """Log what is trained, as a table, and give its figures."""
    if peft.get_injection(model) is None:
        total = sum(p.numel() for p in model.parameters())
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        logger.info("No PEFT: %s of %s parameters are trained.", f"{trainable:,}", f"{total:,}")
        return {"trainable": trainable, "total": total, "percent": 100 * trainable / total, "rows": []}
    report = peft.make_report(model)
    logger.info("What is trained:\n%s", report)
    figures = {"trainable": report.trainable, "total": report.total, "percent": report.percent}
    return {**figures, "rows": [dataclasses.asdict(row) for row in report.rows]}
