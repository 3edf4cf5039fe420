"""``MODEL.PEFT.METHODS: auto``: which methods, modules, ranks and rate suit a config's model and data.

Gradients on some training batches rank the places (:mod:`peft_d2.peft.ranking`). A few steps at each of four rates,
every time from the start and with a rate that falls to zero as in a training, choose the rate by the loss on batches
that were left out.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import nn
from torch.optim.lr_scheduler import LinearLR

from peft_d2 import adapters, peft
from peft_d2.data.config import PEFT_ARCHITECTURE
from peft_d2.data.loader import build_train_loader, sample_seed
from peft_d2.engine.config import leaves, with_values
from peft_d2.engine.errors import ConfigError
from peft_d2.engine.factory import build_model
from peft_d2.engine.hooks import seed_everything
from peft_d2.engine.optimizer import build_optimizer, scale_learning_rate
from peft_d2.peft.probe import call
from peft_d2.peft.ranking import BudgetError, Recommendation, recommend, summed
from peft_d2.storage import disk

FILE = "recommended.yaml"
_HEAD = "# What to train, as recommended by gradients on the training set:"
BATCHES, MORE, HELD_OUT = 16, 12, 4  # to rank places; besides, to try rates; to compare them
TEST_STEPS = 36  # at each rate
RATES = (0.5, 1.0, 2.0, 4.0)  # times SOLVER.BASE_LR
BYTES = 16  # of a trained parameter: itself, its gradient and two moments, in float32
LR_FACTOR = 4.0  # of what is injected, as in this project's configs
logger = logging.getLogger(__name__)


def settled(cfg: Any, resume: bool = False, evaluate: bool = False) -> Any:
    """``cfg`` with ``METHODS: auto`` replaced by what is recommended, which is written to ``OUTPUT_DIR``.

    Args:
        cfg: its data sets registered.
        resume: take what an earlier call has written there, if it is there.
        evaluate: nothing is trained: what an earlier call has written has to be there.

    Raises:
        ConfigError: several processes, an evaluation of what was never trained, or somebody's file in that place.
    """
    if comm.get_world_size() > 1:
        raise ConfigError(
            "MODEL.PEFT.METHODS auto takes one process: run tools/recommend.py, and give its file as --peft-config."
        )
    path = Path(cfg.OUTPUT_DIR, FILE)
    if evaluate and not path.is_file():
        raise ConfigError(f"MODEL.PEFT.METHODS auto: there is no {path} of a training. Give that run's config.yaml.")
    if not ((resume or evaluate) and path.is_file()):
        require_own(path)
        text = explained(*advise(cfg))
        path.parent.mkdir(parents=True, exist_ok=True)
        disk.write_bytes(path, text.encode())
    logger.info("MODEL.PEFT.METHODS auto: %s\n%s", path, path.read_text())
    changed = cfg.clone()
    changed.defrost()
    for key, value in leaves(yaml.safe_load(path.read_text())):
        changed.merge_from_list([key, value])
    changed.freeze()
    return changed


def require_own(path: str | Path) -> None:
    """Refuse to write a recommendation over a file that is none, a config or a checkpoint.

    Raises:
        ConfigError: naming it.
    """
    if os.path.isfile(path) and not Path(path).read_bytes().startswith(_HEAD.encode()):
        raise ConfigError(f"{path} is no earlier recommendation, and would be written over. Choose another place.")


def advise(cfg: Any, budget: int = 0) -> tuple[Any, Recommendation, dict[float, float]]:
    """Choose what to train of the config's model on its training set: (cfg, its rate scaled; choice; losses by rate).

    Args:
        cfg: a model's, or a PEFT config whose ``TRAIN`` is kept and whose ``METHODS`` are not.
        budget: parameters that may be trained; 0 takes ``MODEL.PEFT.BUDGET`` percent of the model's.

    Raises:
        ConfigError: a budget that TRAIN alone exceeds, or no gradients.
    """
    cfg = cfg.clone()
    scale_learning_rate(cfg)  # as a training does: the rates tried are those that it would have
    loader = build_train_loader(cfg)
    batches = list(islice(iter(loader), BATCHES + MORE + HELD_OUT))
    loader.close()
    if cfg.SEED >= 0:
        seed_everything(cfg.SEED, 0, 0)  # new heads start as in the training
    model, heads = _base(cfg)
    count = sum(parameter.numel() for parameter in model.parameters())
    budget = budget or int(count * cfg.MODEL.PEFT.BUDGET / 100)
    try:
        found = recommend(model, batches[:BATCHES], budget, [*cfg.MODEL.PEFT.TRAIN, *heads])
        peft.inject(model, found.methods, train=found.train)
    except BudgetError as error:
        percent, memory = 100 * error.least / count, error.least * BYTES / 2**20
        raise ConfigError(
            f"MODEL.PEFT.METHODS auto: {error} above {error.least:,} parameters, {percent:.3g} percent "
            f"(MODEL.PEFT.BUDGET; --percent of tools/recommend.py) or {memory:.3g} MiB (--memory)."
        ) from error
    except peft.PeftError as error:
        raise ConfigError(f"MODEL.PEFT.METHODS auto: {error}") from error
    tried = batches[BATCHES:-HELD_OUT] + batches[:BATCHES]
    return cfg, found, range_test(cfg, model, tried, batches[-HELD_OUT:])


def range_test(cfg: Any, model: nn.Module, batches: Sequence[Any], held_out: Sequence[Any]) -> dict[float, float]:
    """Rate -> mean loss on ``held_out`` after ``TEST_STEPS`` on ``batches``, over and over; the model stays as it was.

    The rate falls linearly to zero: at a constant one, noise that a training loses at its end makes small ones look
    best. Rate 0 stands for the untrained model. Infinity stands for losses that are not finite, and for Detectron2's
    region proposals, which raise an error then.

    Raises:
        ConfigError: no rate has a finite loss, or the untrained model has none.
    """
    start = [(item.param, item.param.detach().clone()) for item in peft.trained_parameters(model)]
    found = {0.0: _mean_loss(model, held_out)}
    if not math.isfinite(found[0.0]):
        raise ConfigError(
            "MODEL.PEFT.METHODS auto: the loss is not finite before any step. "
            "Look whether the base's weights are those of its config."
        )
    for rate in (cfg.SOLVER.BASE_LR * factor for factor in RATES):
        trial = with_values(cfg, {"SOLVER.BASE_LR": rate, "MODEL.PEFT.LR_FACTOR": LR_FACTOR})
        optimizer = build_optimizer(trial, model)
        schedule = LinearLR(optimizer, 1.0, 0.0, TEST_STEPS)
        found[rate] = math.inf
        with contextlib.suppress(FloatingPointError):
            for loss in _losses(model, islice(cycle(batches), TEST_STEPS), cfg.SEED):
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
            found[rate] = _mean_loss(model, held_out)
        with torch.no_grad():
            for parameter, value in start:
                parameter.copy_(value)
        model.zero_grad(set_to_none=True)
    if not any(math.isfinite(loss) for rate, loss in found.items() if rate):
        raise ConfigError(
            f"MODEL.PEFT.METHODS auto: no loss is finite after {TEST_STEPS} steps, at rates from "
            f"{cfg.SOLVER.BASE_LR * RATES[0]:g} to {max(found):g}: lower SOLVER.BASE_LR."
        )
    return found


def best_rate(losses: Mapping[float, float]) -> float:
    """Where the parabola through the losses over the rate's logarithm is least, within the rates that were tried.

    All losses have a say so, where single ones are noisy. A rate that does worse than no training counts as none.

    Args:
        losses: as :func:`range_test` gives them, by rate; that of rate 0 is the untrained model's.
    """
    rates = sorted(rate for rate in losses if rate)
    values = np.array([min(losses[rate], losses[0.0]) for rate in rates])
    curvature, slope, _ = np.polyfit(np.log2(rates), values - values.min(), 2)
    if curvature <= 0:
        return rates[int(np.argmin(values))]
    return float(f"{np.clip(2 ** (-slope / (2 * curvature)), rates[0], rates[-1]):.2g}")


def explained(cfg: Any, found: Recommendation, losses: dict[float, float]) -> str:
    """The recommendation as a file for ``--peft-config``, with the reasons as comments."""
    parts: dict[str, int] = {}
    for candidate, rank in found.chosen:
        part = ".".join(candidate.names[0].split(".")[:2])
        parts[part] = parts.get(part, 0) + candidate.cost * (rank or 1)
    tried = [rate for rate in losses if rate]
    useless = min(losses[rate] for rate in tried) >= losses[0.0]
    lines = [
        _HEAD,
        f"# {found.parameters:,} parameters, which hold {found.share:.0%} of the gradients' energy that two halves of",
        f"# {BATCHES} batches agree on. Where they are:",
        *(f"#   {part}: {count:,}" for part, count in sorted(parts.items(), key=lambda item: -item[1])),
        f"# Loss on batches left out, after {TEST_STEPS} steps at each rate (0: before):",
        *(f"#   {key:g}: {loss:.3f}" for key, loss in losses.items()),
        *([f"# NONE IS BETTER than no training: lower SOLVER.BASE_LR, {tried[1]:g} now, or more data."] * useless),
    ]
    node = cfg.MODEL.PEFT
    tree = {
        "MODEL": {
            "META_ARCHITECTURE": PEFT_ARCHITECTURE,
            "PEFT": {
                "META_ARCHITECTURE": node.META_ARCHITECTURE or cfg.MODEL.META_ARCHITECTURE,
                "LR_FACTOR": LR_FACTOR,
                "METHODS": found.methods,
                "TRAIN": found.train,
            },
        },
        "SOLVER": {"BASE_LR": best_rate(losses), "REFERENCE_IMS": cfg.SOLVER.IMS_PER_BATCH},
    }
    return "\n".join([*lines, yaml.safe_dump(tree, sort_keys=False, width=120)])


def _base(cfg: Any) -> tuple[nn.Module, list[str]]:
    """The config's model without PEFT, with its weights, and which heads of another class count start anew."""
    name = cfg.MODEL.PEFT.META_ARCHITECTURE or cfg.MODEL.META_ARCHITECTURE
    model = build_model(with_values(cfg, {"MODEL.META_ARCHITECTURE": name}))
    if not cfg.MODEL.WEIGHTS:
        return model, []
    anew = [name for name, *_ in adapters.load_base(model, cfg.MODEL.WEIGHTS).reinitialised]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return model, list(dict.fromkeys(name.rpartition(".")[0] for name in anew if name in parameters))


@torch.no_grad()
def _mean_loss(model: nn.Module, batches: Sequence[Any]) -> float:
    """Infinity where it is not finite, which Detectron2's region proposals raise an error for."""
    try:
        mean = sum(float(loss) for loss in _losses(model, batches, 0)) / len(batches)
    except FloatingPointError:
        return math.inf
    return mean if math.isfinite(mean) else math.inf


def _losses(model: nn.Module, batches: Iterable[Any], seed: int) -> Iterator[Any]:
    """Yield the summed losses of training on each batch, with the same random numbers for the same seed."""
    model.train()
    for number, batch in enumerate(batches):
        with sample_seed(max(seed, 0), number), EventStorage():
            yield summed(call(model, batch))
