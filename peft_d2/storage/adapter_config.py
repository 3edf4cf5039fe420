"""`adapter_config.json` and the names of tensors, as Hugging Face `peft` has them.

A LoRA is described as `peft` describes it, so `PeftModel.from_pretrained(model, folder)` reads a folder of ours as it
is. What `peft` does not have is stored under the same scheme of names with `peft_type` PEFT_D2, which `peft` refuses by
that name.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from torch import Tensor

PREFIX = "base_model.model."
LORA, OWN = "LORA", "PEFT_D2"
A, B, MAGNITUDE = ".lora_a", ".lora_b", ".lora_magnitude"
NAME = re.compile(r"[\w\-]+(\.[\w\-]+)*")
_SUFFIXES = {A: ".lora_A.weight", B: ".lora_B.weight", MAGNITUDE: ".lora_magnitude_vector"}


def file_name(name: str) -> str:
    """Name in the file of a tensor of the model: "fc.lora_a" -> "base_model.model.fc.lora_A.weight"."""
    for own, theirs in _SUFFIXES.items():
        if name.endswith(own):
            return PREFIX + name.removesuffix(own) + theirs
    return PREFIX + name


def model_name(name: str) -> str | None:
    """Reverse of `file_name`; None for a name that `file_name` cannot have given."""
    if not name.startswith(PREFIX):
        return None
    name = name.removeprefix(PREFIX)
    for own, theirs in _SUFFIXES.items():
        if name.endswith(theirs):
            return name.removesuffix(theirs) + own
        if name.endswith(own):
            return None
    return name


def to_file(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the model as they are stored: `peft` keeps DoRA's magnitude of a convolution as (1, out, 1, 1)."""
    stored = {}
    for name, value in tensors.items():
        if name.endswith(MAGNITUDE) and (spatial := tensors[name.removesuffix(MAGNITUDE) + A].ndim - 2):
            value = value.reshape(1, -1, *[1] * spatial)
        stored[file_name(name)] = value
    return stored


def to_model(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Reverse of `to_file`.

    Raises:
        ValueError: a name that `to_file` cannot have given.
    """
    tensors = {}
    for name, value in stored.items():
        own = model_name(name)
        if own is None or not NAME.fullmatch(own):
            raise ValueError(f"the tensor name {name[:80]!r} is not one of an adapter")
        tensors[own] = value.flatten() if own.endswith(MAGNITUDE) else value
    return tensors


def lora_ranks(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Path of each module with a LoRA -> rank.

    Raises:
        ValueError: a factor is missing, or the two disagree.
    """
    paths = sorted({name.removesuffix(s) for s in _SUFFIXES for name in tensors if name.endswith(s)})
    ranks = {}
    for path in paths:
        a, b = tensors.get(path + A), tensors.get(path + B)
        if a is None or b is None:
            raise ValueError(f"the LoRA of {path} has only one of its two factors")
        if a.ndim < 2 or b.ndim < 2 or a.shape[0] != b.shape[1]:
            raise ValueError(
                f"the LoRA factors of {path} have shapes {tuple(a.shape)} and {tuple(b.shape)}: no common rank"
            )
        ranks[path] = int(a.shape[0])
    return ranks


def describe(tensors: Mapping[str, Tensor], base: Collection[str], scales: Mapping[str, float]) -> dict[str, Any]:
    """The content of `adapter_config.json`.

    Args:
        tensors: injected tensors and those trained in full, by name in the model.
        base: names of the base model's tensors.
        scales: path of a LoRA -> factor on B A x (alpha / r, or alpha / sqrt(r) with rsLoRA).
    """
    injected = {name for name in tensors if name not in base}
    full = sorted({name.rpartition(".")[0] or name for name in tensors if name in base})
    ranks = lora_ranks(tensors)
    expressible = injected == {path + s for path in ranks for s in _SUFFIXES if path + s in tensors}
    dora = [path for path in ranks if path + MAGNITUDE in tensors]
    if not ranks or not expressible or set(ranks) - set(scales) or len(dora) not in (0, len(ranks)):
        places = sorted({name.rpartition(".")[0] for name in injected})
        return {"peft_type": OWN, "target_modules": places, "modules_to_save": full or None, "inference_mode": True}
    alphas = {path: _number(scales[path] * rank) for path, rank in ranks.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": LORA,
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "target_modules": sorted(ranks),
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {_exactly(path): value for path, value in ranks.items() if value != rank},
        "alpha_pattern": {_exactly(path): value for path, value in alphas.items() if value != alpha},
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": bool(dora),
        "modules_to_save": full or None,
    }


def check(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Verify that a description fits its tensors.

    Raises:
        ValueError: a type that is not known, factors that disagree, or a rank other than the described one.
    """
    ranks = lora_ranks(tensors)
    if config.get("peft_type") == OWN:
        return
    if config.get("peft_type") != LORA:
        raise ValueError(f"adapter_config.json has peft_type {config.get('peft_type')!r}; known are {LORA} and {OWN}")
    for path, rank in ranks.items():
        described = by_pattern(config, "rank_pattern", path, config.get("r"))
        if described != rank:
            raise ValueError(f"the LoRA of {path} has rank {rank}, and adapter_config.json says {described!r}")


def scales(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, float]:
    """Path of each LoRA that a description of `peft`'s form covers -> factor on B A x.

    Raises:
        ValueError: an alpha is missing or no positive number.
    """
    if config.get("peft_type") != LORA:
        return {}
    result = {}
    for path, rank in lora_ranks(tensors).items():
        alpha = by_pattern(config, "alpha_pattern", path, config.get("lora_alpha"))
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not alpha > 0:
            raise ValueError(f"adapter_config.json: lora_alpha of {path} is {alpha!r}, not a positive number")
        result[path] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return result


def by_pattern(config: Mapping[str, Any], key: str, path: str, default: Any) -> Any:
    """The value for a module in `rank_pattern` or `alpha_pattern`: the first expression that matches the end of its
    path.

    Raises:
        ValueError: the patterns have another form.
    """
    patterns = config.get(key) or {}
    if not isinstance(patterns, Mapping) or len(patterns) > 100_000:
        raise ValueError(f"adapter_config.json: {key} is not an object of patterns")
    if _exactly(path) in patterns:
        return patterns[_exactly(path)]
    for pattern, value in patterns.items():
        try:
            found = re.match(rf"(.*\.)?({pattern})$", path)
        except re.error as error:
            raise ValueError(f"adapter_config.json: {pattern!r} in {key} is no regular expression ({error})") from None
        if found:
            return value
    return default


def _exactly(path: str) -> str:
    return "^" + re.escape(path)


def _number(value: float) -> float | int:
    nearest = round(value)
    return nearest if abs(value - nearest) < 1e-9 * max(1.0, abs(value)) else value
