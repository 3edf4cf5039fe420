"""`adapter_config.json` and the names of tensors, as Hugging Face `peft` has them.

A folder says `peft_type` LORA only where `PeftModel.from_pretrained(model, folder)` computes what our model computes.
Everything else is stored under the same scheme of names with `peft_type` PEFT_D2, which `peft` refuses by that name.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from peft_d2.peft.state import NAME, SUFFIXES

PREFIX = "base_model.model."
LORA, OWN = "LORA", "PEFT_D2"
A, B, MAGNITUDE, EMBEDDING_A, EMBEDDING_B = SUFFIXES
_CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)
# What `peft` adds below a module that it adapts; its `modules_to_save` are compared with these names, too.
_LAYER_NAMES = [".base_layer", ".lora_embedding_A", ".lora_embedding_B"]
_LAYER_NAMES += [f".{name}{end}" for name in ("lora_dropout", "lora_A", "lora_B") for end in ("", ".default")]
_LAYER_NAMES += [".lora_magnitude_vector", ".lora_magnitude_vector.default"]

Modules = Sequence[tuple[str, nn.Module]]


def to_file(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of the model under their names in the file: "fc.lora_a" is "base_model.model.fc.lora_A.weight" there.

    `peft` keeps DoRA's magnitude of a convolution as (1, out, 1, 1).
    """
    stored = {}
    for name, value in tensors.items():
        own = next((suffix for suffix in SUFFIXES if name.endswith(suffix)), "")
        a = tensors.get(name.removesuffix(own) + A)
        if own == MAGNITUDE and a is not None and a.ndim > 2:
            value = value.reshape(1, -1, *[1] * (a.ndim - 2))
        stored[PREFIX + name.removesuffix(own) + SUFFIXES.get(own, "")] = value
    return stored


def to_model(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Reverse of `to_file`.

    Raises:
        ValueError: a name that `to_file` cannot have given.
    """
    tensors = {}
    for name, value in stored.items():
        suffix, theirs = next((pair for pair in SUFFIXES.items() if name.endswith(pair[1])), ("", ""))
        own = name.removeprefix(PREFIX).removesuffix(theirs) + suffix
        if not name.startswith(PREFIX) or name.endswith(tuple(SUFFIXES)) or not NAME.fullmatch(own):
            raise ValueError(
                f"the tensor name {name[:80]!r} is not one of an adapter, where peft writes "
                "'base_model.model.<module>.lora_A.weight'; kohya's scripts, diffusers and loralib write others"
            )
        tensors[own] = value.flatten() if suffix == MAGNITUDE else value
    return tensors


def lora_ranks(tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Path of each module with a LoRA -> rank.

    Raises:
        ValueError: a factor is missing, or the two disagree.
    """
    ranks = {}
    for path in sorted({name.removesuffix(s) for s in SUFFIXES for name in tensors if name.endswith(s)}):
        a = tensors.get(path + A, tensors.get(path + EMBEDDING_A))
        b = tensors.get(path + B, tensors.get(path + EMBEDDING_B))
        if a is None or b is None:
            raise ValueError(f"the LoRA of {path} has only one of its two factors")
        if a.ndim < 2 or b.ndim < 2 or a.shape[0] != b.shape[1]:
            raise ValueError(f"the LoRA factors of {path} have no common rank: {tuple(a.shape)}, {tuple(b.shape)}")
        ranks[path] = int(a.shape[0])
    return ranks


def describe(
    tensors: Mapping[str, Tensor], base: Collection[str], scales: Mapping[str, float], modules: Modules = ()
) -> tuple[dict[str, Any], str]:
    """The content of `adapter_config.json`, and why `peft` cannot open the folder, "" where it can.

    Args:
        tensors: injected tensors and those trained in full, by name in the model.
        base: names of the base model's tensors.
        scales: path of a LoRA -> factor on B A x (alpha / r, or alpha / sqrt(r) with rsLoRA).
        modules: (name, module) of the whole base model, shared modules under each of their names. Empty: whether
            `peft` finds the same modules and computes the same in them is not checked.
    """
    injected, full = set(tensors) - set(base), set(tensors) & set(base)
    ranks = lora_ranks(tensors)
    dora = [path for path in ranks if path + MAGNITUDE in tensors]
    saved = _saved_modules(full, base, list(ranks), modules)
    targets = _targets(list(ranks), saved or [], modules)
    unknown = sorted(injected - {path + suffix for path in ranks for suffix in SUFFIXES})
    if reason := _not_for_peft(ranks, unknown, dora, saved, targets, scales, modules):
        places = sorted({name.rpartition(".")[0] for name in injected})
        owners = sorted({name.rpartition(".")[0] or name for name in full})
        own = {"peft_type": OWN, "target_modules": places, "modules_to_save": owners or None, "inference_mode": True}
        return {**own, "lora_scales": {path: float(value) for path, value in scales.items()}}, reason
    alphas = {path: scales[path] * rank for path, rank in ranks.items()}
    alphas = {path: round(v) if math.isclose(v, round(v), rel_tol=1e-9) else v for path, v in alphas.items()}
    rank, alpha = (Counter(values.values()).most_common(1)[0][0] for values in (ranks, alphas))
    return {
        "peft_type": LORA,
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "target_modules": targets,
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
        "modules_to_save": saved or None,
    }, ""


def _not_for_peft(
    ranks: Mapping[str, int], unknown: Sequence[str], dora: Sequence[str], saved: list[str] | None,
    targets: list[str] | str | None, scales: Mapping[str, float], modules: Modules,
) -> str:  # fmt: skip
    """Why `peft` would not open the folder, or would compute something else with it; empty where it does."""
    by_name = dict(modules)
    if unknown:
        return f"{unknown[0]} belongs to a method that peft does not have ({len(unknown)} such tensors)"
    if not ranks:
        return "it has no LoRA, and peft needs one"
    if saved is None:
        return (
            "what is trained in full is shared, no whole module, or of a name that modules_to_save finds elsewhere too"
        )
    if not targets:
        return "an adapted module lies in one that is trained in full, where peft leaves it out"
    if not ranks.keys() <= scales.keys():
        return "the factor of a LoRA is not known"
    if len(dora) not in (0, len(ranks)):
        return "some modules have DoRA and some have not, and peft has one use_dora for all"
    for path in ranks if modules else ():
        if reason := "it is not in the base" if path not in by_name else difference_to_peft(path, by_name):
            return f"{path}: {reason}"
        if _in_encoder_layer(path, by_name):
            return f"{path}: torch's fast path of nn.TransformerEncoderLayer passes peft's layer by in eval mode"
    return ""


def _saved_modules(
    full: Collection[str], base: Collection[str], targets: Sequence[str], modules: Modules
) -> list[str] | None:
    """The modules that hold exactly the tensors in ``full``; None where `modules_to_save` would hit others, too.

    `peft` copies each module whose name ends with an entry, with all that is in it, which unties what is shared.
    """
    owners = sorted({name.rpartition(".")[0] for name in full})
    if any(not owner or any(n.startswith(f"{owner}.") and n not in full for n in base) for owner in owners):
        return None
    outer = [owner for owner in owners if not any(owner.startswith(f"{other}.") for other in owners)]
    if not modules or not outer:
        return outer
    by_name = dict(modules)
    names = [*by_name, *(f"{path}{end}" for path in targets for end in _LAYER_NAMES)]
    hit = {name for name in names if name.endswith(tuple(outer))}
    inside = [by_name[name] for name in by_name if f"{name}.".startswith(tuple(f"{owner}." for owner in outer))]
    shared = shared_ids(modules)
    tied = any(id(module) in shared or any(id(t) in shared for t in _own(module)) for module in inside)
    return None if tied or hit != set(outer) or any(isinstance(by_name[n], _CONTAINERS) for n in outer) else outer


def shared_ids(modules: Modules) -> set[int]:
    """`id` of every module and tensor that has several owners or names; `peft` separates them as it copies one."""
    count = Counter(id(module) for _, module in modules)
    for module in {id(module): module for _, module in modules}.values():
        count.update(id(tensor) for tensor in _own(module))
    return {key for key, number in count.items() if number > 1}


def _own(module: nn.Module) -> list[Tensor]:
    return [value for value in (*module._parameters.values(), *module._buffers.values()) if value is not None]


def _targets(paths: Sequence[str], saved: Sequence[str], modules: Modules) -> list[str] | str | None:
    """`target_modules` that choose exactly ``paths``: the list, or where its suffixes hit more a regular expression.

    None where `peft` would leave one out, because it is in one of `modules_to_save`.
    """
    if any(re.match(rf"(^|.*\.){module}($|\..*)", path) for module in saved for path in paths):
        return None
    wanted = sorted(paths)
    ends = tuple(f".{path}" for path in wanted)
    only = all(name in wanted for name, _ in modules if f".{name}".endswith(ends))
    return wanted if only else "|".join(map(re.escape, wanted))


def difference_to_peft(path: str, modules: Mapping[str, nn.Module]) -> str:
    """Why `peft`'s layer for the module computes something else than ours; empty when it does not."""
    module = modules[path]
    if sum(other is module for other in modules.values()) > 1:
        return "it is shared under several names, and peft adapts it under the first alone"
    if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        if getattr(module, "norm", None) is not None or getattr(module, "activation", None) is not None:
            return "peft adds its branch after the norm and the activation of this layer, ours before them"
        if module.groups > 1:
            return "peft's branch of a grouped convolution mixes all groups, ours changes the grouped weight"
        dilated = any(d > 1 < k for d, k in zip(module.dilation, module.kernel_size, strict=True))
        if dilated or module.padding_mode != "zeros":
            return "peft's branch of a convolution knows neither dilation nor padding modes"
        return ""
    return "" if isinstance(module, nn.Linear | nn.Embedding) else f"peft has no such layer for {type(module).__name__}"


def _in_encoder_layer(path: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether torch's fast path of nn.TransformerEncoderLayer passes `peft`'s layer by in eval mode."""
    parents = (modules[path[:end]] for end, letter in enumerate(path) if letter == ".")
    return any(isinstance(parent, nn.TransformerEncoderLayer) for parent in parents)


def check(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> None:
    """Verify that a description fits its tensors.

    Raises:
        ValueError: a type that is not known, factors that disagree, or a rank other than the described one.
    """
    ranks, kind = lora_ranks(tensors), config.get("peft_type")
    if kind not in (LORA, OWN):
        raise ValueError(f"adapter_config.json has peft_type {kind!r}; known are {LORA} and {OWN}")
    for path, rank in ranks.items() if kind == LORA else ():
        described = by_pattern(config, "rank_pattern", path, config.get("r"))
        if type(described) is not int or described != rank:
            says = f"adapter_config.json says {described!r} (r, rank_pattern)"
            raise ValueError(f"the LoRA of {path} has rank {rank}, and {says}")


def scales(tensors: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, float]:
    """Path of each LoRA -> factor on B A x.

    Raises:
        ValueError: an alpha is missing or no positive number.
    """
    result: dict[str, float] = {}
    if config.get("peft_type") != LORA:
        stored = config.get("lora_scales") or {}  # not there in folders written before 0.2
        if not isinstance(stored, Mapping) or not all(isinstance(value, float) for value in stored.values()):
            raise ValueError("adapter_config.json: lora_scales are not numbers")
        return dict(stored)
    for path, rank in lora_ranks(tensors).items():
        alpha = by_pattern(config, "alpha_pattern", path, config.get("lora_alpha"))
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
            says = f"lora_alpha of {path} is {alpha!r}, not a positive number (lora_alpha, alpha_pattern)"
            raise ValueError(f"adapter_config.json: {says}")
        result[path] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return result


def by_pattern(config: Mapping[str, Any], key: str, path: str, default: Any) -> Any:
    """The value of the first expression in `rank_pattern` or `alpha_pattern` that matches the end of a module's path.

    Raises:
        ValueError: the patterns have another form.
    """
    patterns = config.get(key) or {}
    if not isinstance(patterns, Mapping) or len(patterns) > 100_000:
        raise ValueError(f"adapter_config.json: {key} is not an object of patterns")
    if _exactly(path) in patterns:
        return patterns[_exactly(path)]
    for pattern, value in patterns.items():
        if expression(rf"(.*\.)?({pattern})$", key).match(path):
            return value
    return default


def expression(pattern: str, key: str) -> re.Pattern[str]:
    """A regular expression of the field ``key``, compiled.

    Raises:
        ValueError: it is none.
    """
    try:
        return re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"adapter_config.json: {pattern[:80]!r} in {key} is no regular expression ({error})") from None


def _exactly(path: str) -> str:
    return "^" + re.escape(path)
