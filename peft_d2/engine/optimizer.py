"""Optimizer, learning rates of the parts, schedules, and the rate's scaling with the batch."""

from __future__ import annotations

import itertools
import logging
import math
import os
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from peft_d2.engine.errors import ConfigError
from peft_d2.peft.adapted import own_parameters
from peft_d2.peft.errors import PatternError
from peft_d2.peft.targets import match
from peft_d2.storage import CheckpointError

logger = logging.getLogger(__name__)

# As in Detectron2's get_default_optimizer_params; the first is torch's base of all batch and instance norms.
_NORMS = (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm, nn.LocalResponseNorm)
_TWO_STAGES = "TwoStagePolyLR"
_POSITION_TABLES = ("relative_position_bias_table", "absolute_pos_embed")


def scale_learning_rate(cfg: Any) -> None:
    """Scale ``SOLVER.BASE_LR`` linearly from ``REFERENCE_IMS`` to ``IMS_PER_BATCH`` images, with one line.

    Source: Goyal et al., Accurate, Large Minibatch SGD, 2017, section 2.1. ``REFERENCE_IMS`` then becomes 0: a
    second call changes nothing, and a config that is written now says what runs.
    """
    reference, batch = cfg.SOLVER.REFERENCE_IMS, cfg.SOLVER.IMS_PER_BATCH
    if reference in (0, batch):
        return
    frozen = cfg.is_frozen()
    cfg.defrost()
    old = cfg.SOLVER.BASE_LR
    cfg.SOLVER.BASE_LR = old * batch / reference
    cfg.SOLVER.REFERENCE_IMS = 0
    if frozen:
        cfg.freeze()
    logger.info(
        "Learning rate %g, chosen for batches of %d images, becomes %g for %d.",
        *(old, reference, cfg.SOLVER.BASE_LR, batch),
    )


def build_optimizer(cfg: Any, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW or SGD over what is trained, with Mask2Former's weight-decay rules and gradient clipping.

    Injected parameters learn at ``BASE_LR * MODEL.PEFT.LR_FACTOR`` wherever they sit; modules trained in full at
    ``BASE_LR * TRAIN_LR_FACTOR``, in the backbone times ``BACKBONE_MULTIPLIER`` and :func:`layer_factors` besides;
    either times the factor of the first entry of ``LR_FACTORS`` whose pattern the parameter's name matches.

    Raises:
        ConfigError: nothing to train, an unknown optimizer or clipping, or a pattern that matches nothing.
    """
    groups = _parameter_groups(cfg, model)
    if not groups:
        raise ConfigError("no parameter is trained: MODEL.PEFT.METHODS and TRAIN select nothing that needs gradients.")
    solver = cfg.SOLVER
    # On the CPU the fused kernels take a quarter of the loop's time. On GPUs torch's default is good, and fused kernels
    # would be given gradients that fp16's scaler has not unscaled yet, which the clipping must not see.
    fused = True if all(p.device.type == "cpu" for group in groups for p in group["params"]) else None
    optimizer: torch.optim.Optimizer
    if solver.OPTIMIZER == "ADAMW":
        optimizer = torch.optim.AdamW(groups, lr=solver.BASE_LR, weight_decay=solver.WEIGHT_DECAY, fused=fused)
    elif solver.OPTIMIZER == "SGD":
        optimizer = torch.optim.SGD(
            groups,
            lr=solver.BASE_LR,
            momentum=solver.MOMENTUM,
            nesterov=solver.NESTEROV,
            weight_decay=solver.WEIGHT_DECAY,
            fused=fused,
        )
    else:
        raise ConfigError(f"SOLVER.OPTIMIZER is {solver.OPTIMIZER!r}; expected 'ADAMW' or 'SGD'.")
    parts = [
        f"{sum(p.numel() for p in g['params']):,} parameters at lr {g['lr']:g}, weight decay {g['weight_decay']:g}"
        for g in groups
    ]
    logger.info("Optimizer %s: %s", solver.OPTIMIZER, "; ".join(parts))
    return _add_clipping(cfg, optimizer)


def _parameter_groups(cfg: Any, model: nn.Module) -> list[dict[str, Any]]:
    """The parameter groups, one for all parameters of equal rate, decay and ``late``: fused kernels want few groups.

    ``late`` is True for what is trained in full in a backbone, where the schedule is one in two stages.
    """
    from peft_d2 import peft

    solver, node = cfg.SOLVER, cfg.MODEL.PEFT
    is_peft = peft.get_injection(model) is not None
    injected = {id(t.param) for t in peft.trained_parameters(model) if t.kind == "injected"} if is_peft else set()
    groups: dict[tuple[float, float, bool], dict[str, Any]] = {}
    trained = [(name, parameter) for name, parameter in own_parameters(model) if parameter.requires_grad]
    factors = _named_factors(cfg, [name for name, _ in trained])
    layers, staged = layer_factors(cfg, model), solver.LR_SCHEDULER_NAME == _TWO_STAGES
    bias_decay = _bias_decay(cfg)
    for name, parameter in trained:
        path, _, leaf = name.rpartition(".")
        full, in_backbone = id(parameter) not in injected, "backbone" in path
        rate = solver.BASE_LR * factors.get(name, 1.0)
        if full:
            rate *= (node.TRAIN_LR_FACTOR if is_peft else 1.0) * layers.get(name, 1.0)
            rate *= solver.BACKBONE_MULTIPLIER if in_backbone else 1.0
        else:
            rate *= node.LR_FACTOR
        decay = _weight_decay(cfg, leaf, model.get_submodule(path))
        if leaf.endswith("bias"):
            rate *= solver.BIAS_LR_FACTOR or 1.0
            decay = decay if bias_decay is None else bias_decay
        late = staged and full and in_backbone
        group: dict[str, Any] = {"params": [], "lr": rate, "weight_decay": decay, "late": late}
        groups.setdefault((rate, decay, late), group)["params"].append(parameter)
    return list(groups.values())


def layer_factors(cfg: Any, model: nn.Module) -> dict[str, float]:
    """Factors on the rates of an encoder's parameters, by their names, as ``SOLVER.LAYER_DECAY`` says.

    The last of the ``LAYER_DECAY_BLOCKS`` has 1, each other one ``LAYER_DECAY`` of the next; what is before a block has
    its factor, what is after all of them 1. So have the last ``LAYER_DECAY_SPARED`` blocks. Source: EoMT's published
    training (Kerssies et al., CVPR 2025).

    Raises:
        ConfigError: the pattern matches no module, or too few.
    """
    decay, pattern, spared = (cfg.SOLVER[f"LAYER_DECAY{end}"] for end in ("", "_BLOCKS", "_SPARED"))
    if decay == 1.0:
        return {}
    try:
        blocks = match(pattern, [name for name, _ in model.named_modules() if name])
    except PatternError as error:
        raise ConfigError(f"SOLVER.LAYER_DECAY_BLOCKS: {error} A LAYER_DECAY of 1.0 needs none.") from error
    if spared > len(blocks):
        raise ConfigError(f"SOLVER.LAYER_DECAY_SPARED is {spared}, but {pattern!r} are {len(blocks)} blocks.")
    path = os.path.commonprefix([block.split(".")[:-1] for block in blocks])
    if isinstance(model.get_submodule(".".join(path)), nn.ModuleList | nn.Sequential):
        path = path[:-1]  # the encoder holds the list of blocks
    factors, before = {}, 1.0
    for name in reversed([name for name, _ in own_parameters(model) if name.split(".")[: len(path)] == path]):
        inside = [number for number, block in enumerate(blocks) if name.startswith(f"{block}.")]
        before = decay ** (len(blocks) - 1 - inside[0]) if inside else before
        factors[name] = 1.0 if inside and inside[0] >= len(blocks) - spared else before
    return factors


def _named_factors(cfg: Any, names: list[str]) -> dict[str, float]:
    """The factor of each name that ``MODEL.PEFT.LR_FACTORS`` knows.

    Raises:
        ConfigError: an entry that is none, or one that matches no name.
    """
    found: dict[str, float] = {}
    for entry in cfg.MODEL.PEFT.LR_FACTORS:
        if not isinstance(entry, dict) or entry.keys() != {"PARAMETERS", "FACTOR"}:
            raise ConfigError(f"MODEL.PEFT.LR_FACTORS: {entry!r} is not of the form {{PARAMETERS: '*', FACTOR: 1.0}}.")
        pattern, factor = entry["PARAMETERS"], entry["FACTOR"]
        if not isinstance(factor, int | float) or not 0 <= factor < math.inf:
            raise ConfigError(f"MODEL.PEFT.LR_FACTORS: FACTOR of {pattern!r} is {factor!r}; expected 0 or more.")
        matched = [name for name in names if fnmatchcase(name, str(pattern))]
        if not matched:
            raise ConfigError(
                f"MODEL.PEFT.LR_FACTORS: no trained parameter is called {pattern!r}, e.g. {names[0]!r} is."
            )
        found = {**dict.fromkeys(matched, float(factor)), **found}
    return found


def _weight_decay(cfg: Any, leaf: str, module: nn.Module) -> float:
    """The weight decay of the parameter ``leaf`` of ``module``, by the rules of Mask2Former's training."""
    solver = cfg.SOLVER
    if isinstance(module, nn.Embedding):
        return solver.WEIGHT_DECAY_EMBED
    if isinstance(module, _NORMS):
        return solver.WEIGHT_DECAY_NORM
    if leaf in _POSITION_TABLES:
        return 0.0
    return solver.WEIGHT_DECAY


def _bias_decay(cfg: Any) -> float | None:
    """``WEIGHT_DECAY_BIAS`` if somebody has set it, else None: Detectron2 0.5 has a default that no config means."""
    from detectron2.config import get_cfg

    own = cfg.SOLVER.WEIGHT_DECAY_BIAS
    return None if own == get_cfg().SOLVER.WEIGHT_DECAY_BIAS else own


def _add_clipping(cfg: Any, optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Let the optimizer clip gradients before each step, as CLIP_GRADIENTS says; ``full_model`` by their joint norm."""
    clip = cfg.SOLVER.CLIP_GRADIENTS
    if not clip.ENABLED or clip.CLIP_VALUE <= 0:
        return optimizer

    def clip_gradients(opt: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        """Called by torch with the optimizer and the arguments of its ``step``."""
        parameters = list(itertools.chain.from_iterable(group["params"] for group in opt.param_groups))
        scale = getattr(opt, "grad_scale", None)  # that a GradScaler leaves to the fused kernels to undo
        limit = clip.CLIP_VALUE * (1.0 if scale is None else float(scale))
        if clip.CLIP_TYPE == "full_model":
            nn.utils.clip_grad_norm_(parameters, limit, norm_type=clip.NORM_TYPE)
        elif clip.CLIP_TYPE == "norm":
            for parameter in parameters:
                nn.utils.clip_grad_norm_(parameter, limit, norm_type=clip.NORM_TYPE)
        else:
            nn.utils.clip_grad_value_(parameters, limit)

    if clip.CLIP_TYPE not in ("full_model", "norm", "value"):
        raise ConfigError(
            f"SOLVER.CLIP_GRADIENTS.CLIP_TYPE is {clip.CLIP_TYPE!r}; expected 'full_model', 'norm' or 'value'."
        )
    optimizer.register_step_pre_hook(clip_gradients)
    return optimizer


def build_lr_scheduler(cfg: Any, optimizer: torch.optim.Optimizer) -> Any:
    """Detectron2's schedules, ``WarmupPolyLR`` of DeepLab and Mask2Former, and EoMT's ``TwoStagePolyLR``.

    Raises:
        ConfigError: an unknown schedule or way to warm up, or steps that cannot be.
    """
    from detectron2.solver import build_lr_scheduler as build_detectron2_scheduler

    solver = cfg.SOLVER
    name = solver.LR_SCHEDULER_NAME
    if solver.WARMUP_METHOD not in ("linear", "constant"):
        raise ConfigError(f"SOLVER.WARMUP_METHOD is {solver.WARMUP_METHOD!r}; expected 'linear' or 'constant'.")
    if name == "WarmupPolyLR":
        return LambdaLR(optimizer, partial(_warmup_poly, solver))
    if name == _TWO_STAGES:
        late = [group.get("late", False) for group in optimizer.param_groups]
        if any(late) and solver.MAX_ITER <= solver.WARMUP_ITERS:
            raise ConfigError(
                f"SOLVER.MAX_ITER {solver.MAX_ITER} ends before what is trained in the backbone starts to learn, which "
                f"{_TWO_STAGES} does after WARMUP_ITERS {solver.WARMUP_ITERS}: lower WARMUP_ITERS."
            )
        return LambdaLR(optimizer, [partial(_two_stage_poly, solver, late=is_late) for is_late in late])
    try:
        return build_detectron2_scheduler(cfg, optimizer)
    except ValueError as error:
        raise ConfigError(
            f"SOLVER.LR_SCHEDULER_NAME {name!r} with STEPS {solver.STEPS}: {error}. Expected WarmupPolyLR, "
            f"TwoStagePolyLR, WarmupCosineLR, or WarmupMultiStepLR with steps that grow and stay below MAX_ITER "
            f"{solver.MAX_ITER}."
        ) from error


def _warmup_poly(solver: Any, step: int) -> float:
    """``(1 - t) ** power`` over the run, times a warm-up factor (Chen et al., DeepLab, 2018, section 4.1)."""
    warm = 1.0
    if step < solver.WARMUP_ITERS:
        share = step / solver.WARMUP_ITERS if solver.WARMUP_METHOD == "linear" else 0.0
        warm = solver.WARMUP_FACTOR * (1 - share) + share
    decay = max(0.0, 1.0 - step / solver.MAX_ITER) ** solver.POLY_LR_POWER
    return warm * (max(decay, solver.POLY_LR_CONSTANT_ENDING) if warm == 1.0 else decay)


def _two_stage_poly(solver: Any, step: int, late: bool) -> float:
    """From 0 up in a line, then down as ``(1 - t) ** power``; late groups begin where the others have warmed up.

    Source: EoMT's published training (Kerssies et al., CVPR 2025).
    """
    begin, warm = (solver.WARMUP_ITERS, solver.BACKBONE_WARMUP_ITERS) if late else (0, solver.WARMUP_ITERS)
    if step < begin + warm:
        return max(0.0, (step - begin) / max(1, warm))
    done = (step - begin - warm) / max(1, solver.MAX_ITER - begin - warm)
    return max(0.0, 1.0 - done) ** solver.POLY_LR_POWER


def parameter_names(optimizer: torch.optim.Optimizer, model: nn.Module) -> list[str]:
    """Names of an optimizer's parameters, in the order in which its ``state_dict`` numbers them."""
    names = {id(parameter): name for name, parameter in own_parameters(model)}
    return [names.get(id(parameter), "?") for group in optimizer.param_groups for parameter in group["params"]]


def restore_optimizer(
    optimizer: torch.optim.Optimizer, saved: dict[str, Any], names: list[str], saved_names: list[str] | None
) -> None:
    """Load the moments of a saved optimizer by the parameters' names; rates, decay and momentum stay as they are now.

    Args:
        optimizer: as the config of today builds it.
        saved: another one's ``state_dict``.
        names, saved_names: of both one's parameters, see :func:`parameter_names`. Checkpoints of earlier releases have
            none: their parameters are those of ``optimizer`` where the groups are as large.

    Raises:
        CheckpointError: other parameters are trained, or by another kind of optimizer.
    """
    current = optimizer.state_dict()
    sizes = [[len(group["params"]) for group in state["param_groups"]] for state in (saved, current)]
    kinds = [{"betas", "momentum"} & state["param_groups"][0].keys() for state in (saved, current)]
    if kinds[0] != kinds[1]:
        raise CheckpointError(
            f"the run was started with an optimizer that has {' and '.join(kinds[0]) or 'no moments'}, and "
            "SOLVER.OPTIMIZER names another kind now: it cannot go on from the other's state. Leave it as it was, or "
            "start a new run from the weights."
        )
    if saved_names is None:
        if sizes[0] != sizes[1]:
            raise CheckpointError(
                "the checkpoint is of an earlier release, whose state follows the grouping of the learning rates: it "
                "resumes with the rates' factors and weight decays that it was started with"
            )
        saved_names = names
    if len(saved_names) != sum(sizes[0]) or sorted(saved_names) != sorted(names):
        odd = sorted(set(saved_names) ^ set(names))
        raise CheckpointError(
            f"the run trained {len(saved_names)} parameters and this config trains {len(names)} ({odd[:3]}...). Resume "
            "with what it trained, or start a new run from its weights."
        )
    by_name = {name: saved["state"].get(number) for number, name in enumerate(saved_names)}
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for name, parameter in zip(names, parameters, strict=True):
        for value in (by_name[name] or {}).values():
            if isinstance(value, torch.Tensor) and value.dim() and value.shape != parameter.shape:
                shapes = f"{tuple(value.shape)} for {name}, which is {tuple(parameter.shape)}"
                raise CheckpointError(f"the checkpoint's optimizer holds tensors {shapes}: it is of another model")
    state = {number: by_name[name] for number, name in enumerate(names) if by_name[name] is not None}
    optimizer.load_state_dict({**current, "state": state})


def restore_scheduler(scheduler: Any, saved: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    """Go on with the schedule at the saved step; one that the config makes follows the rates of the config now."""
    from detectron2.solver import LRMultiplier

    if isinstance(scheduler, LambdaLR | LRMultiplier):
        scheduler.last_epoch = step = int(saved["last_epoch"])
        if isinstance(scheduler, LambdaLR):
            rates = [rate * scale(step) for rate, scale in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        else:
            rates = scheduler.get_lr()
        scheduler._last_lr = rates
    else:
        scheduler.load_state_dict(saved)
        rates = saved.get("_last_lr", [])
    for group, rate in zip(optimizer.param_groups, rates, strict=False):
        group["lr"] = rate
