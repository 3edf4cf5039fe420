"""Folders of Hugging Face `peft`, read into ours. The package itself is not needed.

Every field of its `LoraConfig` (0.21) that changes what the tensors mean is honoured, or refused by its name.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_d2.peft.adapted import walk
from peft_d2.peft.state import SUFFIXES
from peft_d2.storage import adapter_file
from peft_d2.storage.adapter_file import CONFIG, EMBEDDING_A, LORA, MAGNITUDE, TENSORS, A, AdapterFile, B, expression
from peft_d2.storage.disk import Defect, load_json, load_tensors

logger = logging.getLogger(__name__)

_PICKLE = "adapter_model.bin"
_SAVE_AGAIN = "save it again with peft's save_pretrained"
_OUT_PROJ, _TOKENS = ".base_layer.out_proj", ".token_adapter.trainable_tokens_delta"
_BIAS_OF_B, _PARTS = ".lora_B.bias", ("q", "k", "v", "out")
_ANY = (object,)  # looked at where it is used
# Field -> the types in which it is honoured; or why it is refused unless it is off; or None: it says nothing about the
# tensors, or is read by starts alone that are refused or harmless.
FIELDS: dict[str, tuple[type, ...] | str | None] = {
    "peft_type": (str,), "r": _ANY, "lora_alpha": _ANY, "rank_pattern": _ANY, "alpha_pattern": _ANY, "bias": (str,),
    "use_rslora": (bool,), "use_dora": (bool,), "lora_bias": (bool,), "lora_dropout": (int, float),
    "init_lora_weights": (bool, str), "modules_to_save": (list,), "target_modules": (list, str),
    "exclude_modules": (list, str), "layers_to_transform": (list, int), "layers_pattern": (list, str),
    "trainable_token_indices": (list, dict),
    "fan_in_fan_out": "it says that weights are stored transposed, as in transformers' Conv1D, which is no layer here",
    "use_qalora": "QA-LoRA pools the inputs of quantised layers, which are not known here",
    "layer_replication": "the adapter was trained on a base with repeated layers, which is another model",
    "target_parameters": "its factors belong to single parameters instead of modules",
    "megatron_config": "its factors belong to Megatron's parallel layers",
    "velora_config": "VeLoRA has a backward pass of its own",
    "alora_invocation_tokens": "activated LoRA works on the tokens after an invocation only",
    "monteclora_config": "MonteCLoRA samples its factors",
    "use_bdlora": "BD-LoRA has block-diagonal factors",
    "arrow_config": "Arrow routes each token through several adapters",
    "kasa_config": "KaSA cuts singular values out of the base's weights",
    **dict.fromkeys(("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision")),
    **dict.fromkeys(("inference_mode", "runtime_config", "megatron_core", "qalora_group_size", "ensure_weight_tying")),
    **dict.fromkeys(("loftq_config", "eva_config", "corda_config", "lora_ga_config")),
}  # fmt: skip
_NAMES = ("modules_to_save", "target_modules", "exclude_modules", "layers_pattern")
_KNOWN_STARTS = (True, False, "gaussian", "eva", "orthogonal", "mica", "pissa")  # but for the last, W0 stays as it is
_OTHER_BASE = re.compile(r"pissa_niter_\d+|olora|corda|loftq|lora_ga", re.IGNORECASE)


def is_huggingface(folder: str | os.PathLike[str]) -> bool:
    """Whether a folder without our record was written by Hugging Face peft: it has its files, and not our mark."""
    root = Path(folder)
    if not os.path.isfile(root / CONFIG):
        return False
    if not os.path.isfile(root / TENSORS):
        return os.path.isfile(root / _PICKLE)
    try:
        return adapter_file.MARK not in load_tensors((root / TENSORS).read_bytes())[1]
    except (Defect, OSError):
        return False


def read(folder: str | os.PathLike[str], model: nn.Module | None = None) -> AdapterFile:
    """Read a LoRA or DoRA that Hugging Face `peft` saved.

    Its files carry neither checksums nor the base's fingerprint, so damage that leaves the format valid cannot be
    found, and `base` is None.

    Args:
        folder: with `adapter_config.json` and `adapter_model.safetensors`.
        model: the base model, with its own weights. Needed for what is stored relative to these: PiSSA, trainable
            tokens, biases of the factors.

    Raises:
        AdapterFileError: a file is missing or damaged, or the adapter is of a kind that is not known here.
    """
    root = Path(folder)
    path, remedy = root / CONFIG, _SAVE_AGAIN
    try:
        config = load_json(path.read_bytes())
        path, remedy = root / TENSORS, f"{_SAVE_AGAIN} (safe_serialization=True): {_PICKLE} is a pickle and is not read"
        stored, _ = load_tensors(path.read_bytes())
    except Defect as error:
        raise adapter_file.AdapterFileError(path, str(error), _SAVE_AGAIN) from None
    except OSError as error:
        raise adapter_file.AdapterFileError(path, error.strerror or str(error), remedy) from error
    if wrapper := _wrapper(stored, model):
        logger.info("%s is of a model inside another, which it calls %r: that name is taken off.", path, wrapper)
    try:
        known = {key: value for key, value in config.items() if value is not None}
        return _Reader(known, stored, model, wrapper).content()
    except ValueError as error:
        remedy = "train a plain LoRA or DoRA in peft, or merge this one there into the base (merge_and_unload)"
        raise adapter_file.AdapterFileError(root, str(error), remedy) from None


class _Reader:
    """Turns what one of their folders holds into an adapter of ours; its methods raise ValueError where they cannot.

    While it works, names are those of the file, in which the model may lie below ``wrapper``, so that the patterns of
    the config mean what they meant to `peft`.
    """

    def __init__(
        self, config: Mapping[str, Any], stored: Mapping[str, Tensor], model: nn.Module | None, wrapper: str = ""
    ) -> None:
        _check_fields(config)
        self.config, self.wrapper = config, wrapper
        self.dora = bool(config.get("use_dora"))
        modules = [] if model is None else walk(model)
        self.by_name = {".".join(filter(None, (wrapper, name))): module for name, module, _ in modules}
        self.tensors = _named_as_in_model(stored)
        self._drop_unused_output_projections()
        tensors = {name: value for name, value in self.tensors.items() if _OUT_PROJ not in name}
        adapter_file.check_config(tensors, config)
        self.ranks = adapter_file.lora_ranks(tensors)
        self.scales = adapter_file.lora_scales(tensors, config)

    def content(self) -> AdapterFile:
        """The adapter in the form of ours, without a fingerprint of its base."""
        entries: dict[tuple[Any, ...], dict[str, Any]] = {}
        for path, rank in self.ranks.items():
            self._check_targeted(path)
            entry = self._entry(path, rank)
            alike = entries.setdefault(tuple(map(str, entry.values())), {**entry, "TARGETS": []})
            alike["TARGETS"].append(self._outright(path))
        self._add_biases_of_factors()
        self._set_tokens()
        self._leave_base_layers()
        for path in self.ranks:
            if path + _OUT_PROJ + A in self.tensors:
                self._split_attention(path)
            elif self._is_pissa(path):
                self._set_start(path)
        full = [name for name in self.tensors if not _is_injected(name)]
        self._refuse_shared(full)
        tensors = {self._own(name): value for name, value in self.tensors.items()}
        scales = {self._own(path): value for path, value in self.scales.items()}
        return AdapterFile(tensors, list(entries.values()), self._train(full), None, {}, "", scales)

    def _own(self, name: str) -> str:
        """The name in the model of what is called ``name`` in the file."""
        return name.removeprefix(f"{self.wrapper}.") if self.wrapper else name

    def _outright(self, name: str) -> str:
        """A pattern that chooses this one module or tensor and no other."""
        return f"re:{re.escape(self._own(name))}"

    def _module(self, path: str, what: str) -> nn.Module:
        if not self.by_name:
            raise ValueError(f"{what} is stored relative to the base's weights: load it into the model, load_adapter")
        if path not in self.by_name:
            raise ValueError(f"the model has no module {path}")
        return self.by_name[path]

    def _drop_unused_output_projections(self) -> None:
        """Forget factors of `out_proj` in nn.MultiheadAttention: torch never calls it, so `peft` does not run them."""
        for path in {name.rpartition(".lora_")[0] for name in self.tensors if _is_injected(name)}:
            parent, _, leaf = path.rpartition(".")
            if leaf == "out_proj" and isinstance(self.by_name.get(parent), nn.MultiheadAttention):
                logger.warning("The factors of %s are left out: peft itself does not run them.", path)
                self.tensors = {k: v for k, v in self.tensors.items() if not k.startswith(f"{path}.lora_")}
        if not any(map(_is_injected, self.tensors)):
            raise ValueError("it holds no factors that peft runs")

    def _check_targeted(self, path: str) -> None:
        """Refuse factors that the config does not put anywhere: `peft` would drop them without a word."""
        saved, excluded, targets = (
            self.config.get(key) for key in ("modules_to_save", "exclude_modules", "target_modules")
        )
        if any(expression(rf"(^|.*\.){m}($|\..*)", "modules_to_save").match(path) for m in saved or ()):
            raise ValueError(f"there are factors of {path}, which modules_to_save keeps peft from adapting")
        if excluded and _chosen(excluded, path, "exclude_modules"):
            raise ValueError(f"there are factors of {path}, which exclude_modules takes out")
        if isinstance(targets, str) and targets.lower() == "all-linear":
            return
        if not _chosen(targets, path, "target_modules") or not self._in_layers(path):
            raise ValueError(f"there are factors of {path}, which target_modules and layers_to_transform do not choose")

    def _in_layers(self, path: str) -> bool:
        """Whether `layers_to_transform` has the number of the layer that holds a module."""
        wanted, patterns = self.config.get("layers_to_transform"), self.config.get("layers_pattern") or []
        if wanted is None or wanted == [] or path in self.config["target_modules"]:
            return True
        patterns = [patterns] if isinstance(patterns, str) else patterns
        heads = [rf"(?:^|.*?\.){pattern}\.(?P<number>\d+)\." for pattern in patterns]
        for head in heads or [r".*?\.[^.]*\.(?P<number>\d+)\."]:
            if found := expression(head, "layers_pattern").match(path):
                return int(found["number"]) in (wanted if isinstance(wanted, list) else [wanted])
        return False

    def _is_pissa(self, path: str) -> bool:
        return self.config.get("init_lora_weights") == "pissa" and path + EMBEDDING_A not in self.tensors

    def _entry(self, path: str, rank: int) -> dict[str, Any]:
        """The entry of METHODS for one module; what `peft` does not compute as ours does is refused."""
        attention, embedding = path + _OUT_PROJ + A in self.tensors, path + EMBEDDING_A in self.tensors
        different = path in self.by_name and not attention and adapter_file.difference_to_peft(path, self.by_name)
        if different:
            raise ValueError(f"{path}: {different}")
        if (path + MAGNITUDE in self.tensors) != self.dora:
            raise ValueError(f"adapter_config.json: use_dora is {self.dora}, and the tensors of {path} say otherwise")
        if self._is_pissa(path) and (attention or self.tensors[path + A].ndim != 2):
            raise ValueError(f"init_lora_weights is 'pissa', which peft itself does not have for {path}")
        return {
            "NAME": "lora",
            "RANK": rank,
            "ALPHA": self.scales[path] * rank,
            "DROPOUT": 0.0 if attention or embedding else float(self.config.get("lora_dropout", 0.0)),
            "DORA": self.dora,
            "INIT": "pissa" if self._is_pissa(path) else "default",
            "PARTS": list(_PARTS) if attention else [],
        }

    def _add_biases_of_factors(self) -> None:
        """`lora_bias`: s times the bias of B adds to the layer's own bias, which is trained then."""
        for name in [name for name in self.tensors if name.endswith(_BIAS_OF_B)]:
            path, added = name.removesuffix(_BIAS_OF_B), self.tensors.pop(name)
            bias = getattr(self._module(path, "lora_bias"), "bias", None)
            if path not in self.scales or not isinstance(bias, Tensor) or bias.shape != added.shape:
                raise ValueError(f"lora_bias: {path} has no bias that the one of its factors could be added to")
            trained = self.tensors.get(f"{path}.base_layer.bias", bias.detach().cpu())
            self.tensors[f"{path}.base_layer.bias"] = trained + self.scales[path] * added.to(trained)

    def _set_tokens(self) -> None:
        """Trainable tokens are rows of an embedding, which becomes one that is trained in full."""
        for name in [name for name in self.tensors if name.endswith(_TOKENS)]:
            path, rows = name.removesuffix(_TOKENS), self.tensors.pop(name)
            indices = self.config.get("trainable_token_indices")
            if isinstance(indices, dict):
                indices = next((value for key, value in indices.items() if path.endswith(key)), None)
            weight = self._module(path, "trainable_token_indices").get_parameter("weight").detach().cpu()
            fits = isinstance(indices, list) and all(type(i) is int and 0 <= i < len(weight) for i in indices)
            if not fits or rows.shape != (len(indices or ()), *weight.shape[1:]):
                raise ValueError(f"trainable_token_indices do not fit the rows that are stored for {path}")
            self.tensors[f"{path}.weight"] = weight.index_copy(0, torch.tensor(indices), rows.to(weight))

    def _leave_base_layers(self) -> None:
        """Tensors of an adapted module itself, its bias say, are stored below `peft`'s name for that module."""
        for path in sorted([*self.ranks, *(p + _OUT_PROJ for p in self.ranks)], key=len, reverse=True):
            own = [name for name in self.tensors if name.startswith(f"{path}.base_layer.") and not _is_injected(name)]
            for name in own:
                self.tensors[f"{path}.{name.removeprefix(f'{path}.base_layer.')}"] = self.tensors.pop(name)

    def _split_attention(self, path: str) -> None:
        """One pair of factors for q, k and v together becomes three with the same A: the same change of weights."""
        version = re.match(r"(\d+)\.(\d+)", str(self.config.get("peft_version", "0.0")))
        if version is None or tuple(map(int, version.groups())) > (0, 21):
            reason = "whether it adds the update of an attention's out_proj once, or twice as up to 0.21, is not known"
            raise ValueError(f"adapter_config.json: peft_version is {self.config['peft_version']!r}: {reason}")
        a, b = self.tensors.pop(path + A), self.tensors.pop(path + B)
        if len(b) != 3 * a.shape[1]:
            raise ValueError(f"the factors of {path} are not those of a fused q, k, v")
        pairs = [(a.clone(), block.clone()) for block in b.chunk(3)]
        # peft up to 0.21 adds the update of out_proj twice, in training and after it (its pull request 3774).
        pairs.append((self.tensors.pop(path + _OUT_PROJ + A), 2 * self.tensors.pop(path + _OUT_PROJ + B)))
        scale = self.scales.pop(path)
        for part, (down, up) in zip(_PARTS, pairs, strict=True):
            self.tensors |= {f"{path}.{part}{A}": down, f"{path}.{part}{B}": up}
            self.scales[f"{path}.{part}"] = scale

    def _set_start(self, path: str) -> None:
        """PiSSA subtracts its start from the base, and the start is found anew from the base's weight."""
        from peft_d2.peft.lora.factors import principal_factors

        weight = self._module(path, "PiSSA").get_parameter("weight").detach().cpu()
        a, b = principal_factors(weight.float(), self.ranks[path], self.scales[path])
        self.tensors |= {f"{path}{A}_start": a, f"{path}{B}_start": b}

    def _refuse_shared(self, full: Collection[str]) -> None:
        """`peft` copies a module of `modules_to_save`, and so separates it from others that share its tensors."""
        shared = adapter_file.shared_ids(list(self.by_name.items()))
        for name in full:
            owner, _, leaf = name.rpartition(".")
            module = self.by_name.get(owner)
            if shared & {id(module), id(getattr(module, leaf, self))}:
                raise ValueError(f"{name} is shared under several names, and peft trains it under one of them alone")

    def _train(self, names: Collection[str]) -> tuple[str, ...]:
        """Modules trained in full: what `modules_to_save` names of each remaining tensor, or the tensor itself."""
        wanted = tuple(self.config.get("modules_to_save", ()))
        chosen = []
        for name in sorted(names):
            owners = [name[: dot.start()] for dot in re.finditer(r"\.", name)]
            chosen.append(next((owner for owner in owners if wanted and owner.endswith(wanted)), name))
        return tuple(dict.fromkeys(map(self._outright, chosen)))


def _check_fields(config: Mapping[str, Any]) -> None:
    """Every field is known and of its type, or is off."""
    if config.get("peft_type") != LORA:
        raise ValueError(f"adapter_config.json has peft_type {config.get('peft_type')!r}; known is {LORA}")
    said = {"bias": "none", "lora_dropout": 0, "init_lora_weights": True, **config}
    for key, value in said.items():
        known = FIELDS.get(key, "this field is not known here, and may change what the tensors mean")
        fits = value in (False, "", [], {})
        if isinstance(known, tuple):
            is_flag = isinstance(value, bool) and known != _ANY  # which Python counts as an int
            texts = value if isinstance(value, list) and key in _NAMES else ()
            fits = isinstance(value, known) and not (is_flag and bool not in known)
            fits = fits and all(isinstance(item, str) and item for item in texts)
            known = "that is of another type than peft's"
        if known is not None and not fits:
            raise ValueError(f"adapter_config.json: {key} is {str(value)[:80]!r}: {known}")
    if not config.get("target_modules"):
        raise ValueError("adapter_config.json has no target_modules")
    if isinstance(config["target_modules"], str) and config.get("layers_to_transform") is not None:
        raise ValueError("adapter_config.json: layers_to_transform needs a list of target_modules")
    if said["bias"] not in ("none", "all", "lora_only"):
        raise ValueError(f"adapter_config.json: bias is {said['bias']!r}; known are none, all, lora_only")
    if not 0 <= said["lora_dropout"] < 1:
        raise ValueError(f"adapter_config.json: lora_dropout is {said['lora_dropout']!r}, not a probability below 1")
    if (start := said["init_lora_weights"]) not in _KNOWN_STARTS:
        other = "it changed the base's weights in a way that the files do not tell"
        reason = other if _OTHER_BASE.fullmatch(start) else "it is not known here"
        raise ValueError(f"adapter_config.json: init_lora_weights is {start[:80]!r}: {reason}")


def _wrapper(stored: Mapping[str, Tensor], model: nn.Module | None) -> str:
    """The name, such as "module" or "_orig_mod.module", that all tensors lie below and the model does not have."""
    names = [name.removeprefix(adapter_file.PREFIX).split(".") for name in stored]
    children = {name for name, _ in model.named_children()} if model is not None else set()
    for depth in range(1, 4):
        above, below = {tuple(name[:depth]) for name in names}, {name[depth] for name in names if len(name) > depth}
        if len(above) != 1 or {name[depth - 1] for name in names} & children:
            return ""
        if below and below <= children:
            return ".".join(above.pop())
    return ""


def _named_as_in_model(stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
    tensors = adapter_file.to_model(stored)
    for name, value in tensors.items():
        if not _is_injected(name) and not name.endswith(_BIAS_OF_B):
            if any(part.startswith("lora_") for part in name.split(".")):
                raise ValueError(f"the tensor {name[:120]!r} is of a kind that is not known")
            continue
        if value.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            raise ValueError(f"the tensor {name[:120]!r} is stored as {value.dtype}, which no factor is")
        if not bool(torch.isfinite(value).all()):
            raise ValueError(f"the tensor {name[:120]!r} holds values that are not finite")
    for path in {name.removesuffix(A) for name in tensors if name.endswith(A)}:
        a, b = tensors[path + A], tensors.get(path + B)
        if b is not None and a.ndim > 2 and b.ndim > 2 and len(a) != b.shape[1] and len(a) % max(b.shape[1], 1) == 0:
            raise ValueError(f"{path}: peft's branch of a grouped convolution mixes all groups, which no weight holds")
    return tensors


def _is_injected(name: str) -> bool:
    return name.endswith((*SUFFIXES, f"{A}_start", f"{B}_start"))


def _chosen(names: Any, path: str, key: str) -> bool:
    """Whether a list of suffixes or a regular expression of `peft`'s chooses a module."""
    if isinstance(names, str):
        return expression(names, key).fullmatch(path) is not None
    return any(f".{path}".endswith(f".{name}") for name in names)
