"""A bridge to the tuners of the optional ``peft`` package (IA3, LoHa, LoKr, OFT, BOFT, ...) that work on plain modules.

The formulas are the tuner's own (https://huggingface.co/docs/peft). Its layer is built around a view of the module
that shares the module's parameters, and is the adapter layer of that module, which keeps its name and its keys;
freezing, report, files, switching and merging are those of every other method. PEFT 0.13 or newer.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .adapted import STORE, AdapterLayer, base_class
from .adapter import never_called
from .errors import MethodError
from .method import Method, Options, closest, expect
from .targets import Target

_ADAPTER = "default"  # the only adapter inside one tuner layer; ours are named one level higher


@dataclass(frozen=True)
class TunerOptions(Options):
    """``TUNER`` is a PEFT type such as ia3; ``CONFIG`` holds further fields of its config, as PEFT spells them."""

    tuner: str = ""
    config: dict[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        super().check()
        expect(bool(self.tuner), "TUNER", self.tuner, "the name of a tuner of the peft package, such as ia3")


class TunerLayer(AdapterLayer):
    """One tuner layer of ``peft``, whose base layer is a view of the adapted module."""

    changes_weights = True

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        # The view is kept out of the registry: its parameters are the base's, not injected ones.
        layer.__dict__["base_layer"] = layer._modules.pop("base_layer")
        self.hf = layer

    def adapted_forward(self, module: Any, forward: Any, *args: Any, **kwargs: Any) -> Any:
        return self(*args, **kwargs)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.hf(*args, **kwargs)

    def effective_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the tuner's own merge makes of the weights, in a copy; nothing where it cannot merge."""
        layer: Any = copy.deepcopy(self.hf)
        with torch.no_grad():
            for name, value in layer.base_layer.named_parameters():
                value.data = weights[name].detach().clone()
            try:
                layer.merge(adapter_names=[_ADAPTER])
            except NotImplementedError:
                return {}
        return {name: value.data for name, value in layer.base_layer.named_parameters()}


class HuggingFaceTuner(Method):
    """``{NAME: hf, TUNER: ia3, TARGETS: [...], CONFIG: {...}}``."""

    name = "hf"
    options_class = TunerOptions
    options: TunerOptions

    def refusal(self, target: Target) -> str:
        return never_called(target)

    def make_layers(self, targets: Sequence[Target]) -> list[tuple[Target, AdapterLayer]]:
        config_class, inject = _peft(self.options.tuner)
        layers: list[tuple[Target, AdapterLayer]] = []
        for target in targets:
            config = _config(config_class, self.options)
            layers.append((target, TunerLayer(_tuner_layer(target, config, inject))))
        return layers


def _peft(tuner: str) -> tuple[Any, Any]:
    """The config class of a tuner, and PEFT's function that injects it."""
    try:
        from peft import PeftType, inject_adapter_in_model
        from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    except ImportError as error:
        raise MethodError(f"method 'hf' needs the package peft ({error}): pip install peft") from error
    known = {
        str(kind.value): PEFT_TYPE_TO_CONFIG_MAPPING[kind] for kind in PeftType if kind in PEFT_TYPE_TO_CONFIG_MAPPING
    }
    if tuner.upper() not in known:
        raise MethodError(f"peft has no tuner {tuner!r}.{closest(tuner.upper(), list(known))}")
    return known[tuner.upper()], inject_adapter_in_model


def _config(config_class: Any, options: TunerOptions) -> Any:
    fields = {"target_modules": ["target"], **options.config}
    if "feedforward_modules" in config_class.__dataclass_fields__:
        fields.setdefault("feedforward_modules", [])
    try:
        return config_class(**fields)
    except (TypeError, ValueError, ImportError) as error:
        raise MethodError(f"method 'hf': CONFIG does not fit {config_class.__name__}: {error}") from error


def _tuner_layer(target: Target, config: Any, inject: Any) -> nn.Module:
    """PEFT's layer around a view of the module: an object of its base class that shares parameters and buffers with
    it.
    """
    module = target.module
    base = base_class(module)
    view = base.__new__(base)
    view.__dict__.update({key: value for key, value in module.__dict__.items() if not key.startswith("peft_")})
    view.__dict__["_modules"] = {name: child for name, child in module._modules.items() if name != STORE}
    holder = nn.Module()
    holder.add_module("target", view)
    before = {name: (value, value.requires_grad, value.detach().clone()) for name, value in view.named_parameters()}
    try:
        inject(config, holder, adapter_name=_ADAPTER)
        changed = [item for item in before.values() if not item[0].is_meta and not torch.equal(item[0], item[2])]
        for value, _, start in changed:
            value.data = start
        if changed:
            raise ValueError("its start changes the base's weights; choose another one in CONFIG")
    except (ValueError, TypeError, AttributeError, NotImplementedError, ImportError) as error:
        raise MethodError(
            f"peft's {config.peft_type.value} cannot go on {target.name} ({base.__name__}): {error}"
        ) from error
    finally:
        for value, flag, _ in before.values():
            value.requires_grad_(flag)
    layer = holder.target
    if layer is view or not isinstance(layer, nn.Module) or "base_layer" not in layer._modules:
        raise MethodError(f"peft's {config.peft_type.value} cannot go on {target.name} ({base.__name__})")
    return layer
