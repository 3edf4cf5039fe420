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
from .errors import MethodError
from .method import Options, closest, expect
from .outputs import OutputMethod
from .targets import Target

_ADAPTER, _TARGET = "default", "target"  # the only adapter and the only module that the tuner sees


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
        for value in layer.parameters():  # as peft's get_peft_model does: small steps vanish in half precision
            value.data = value.data.float() if value.dtype in (torch.float16, torch.bfloat16) else value.data

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


class HuggingFaceTuner(OutputMethod):
    """``{NAME: hf, TUNER: ia3, TARGETS: [...], CONFIG: {...}}``."""

    name = "hf"
    options_class = TunerOptions
    options: TunerOptions

    def make_layers(self, targets: Sequence[Target]) -> list[tuple[Target, AdapterLayer]]:
        """The tuner's layer of each target module.

        Raises:
            MethodError: the package or the tuner is not there, its config does not fit, or it cannot go on a module.
        """
        try:
            from peft import PeftType, inject_adapter_in_model
            from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS
        except ImportError as error:
            raise MethodError(f"method 'hf' needs the package peft ({error}): pip install peft") from error
        known = {str(kind.value): CONFIGS[kind] for kind in PeftType if kind in CONFIGS}
        tuner = self.options.tuner.upper()
        if tuner not in known:
            raise MethodError(f"peft has no tuner {self.options.tuner!r}.{closest(tuner, list(known))}")
        fields = {"target_modules": [_TARGET], **self.options.config}
        if "feedforward_modules" in known[tuner].__dataclass_fields__:
            fields.setdefault("feedforward_modules", [])
        try:
            configs = [known[tuner](**fields) for _ in targets]
        except (TypeError, ValueError, ImportError) as error:
            raise MethodError(f"method 'hf': CONFIG does not fit {known[tuner].__name__}: {error}") from error
        pairs = zip(targets, configs, strict=True)
        return [(target, TunerLayer(_tuner_layer(target, config, inject_adapter_in_model))) for target, config in pairs]


def _tuner_layer(target: Target, config: Any, inject: Any) -> nn.Module:
    """PEFT's layer around a view of the module: an object of its class that shares its parameters and buffers."""
    module, base = target.module, base_class(target.module)
    view = base.__new__(base)
    view.__dict__.update({key: value for key, value in module.__dict__.items() if not key.startswith("peft_")})
    view.__dict__["_modules"] = {name: child for name, child in module._modules.items() if name != STORE}
    holder = nn.ModuleDict({_TARGET: view})
    before = [(value, value.requires_grad, value.detach().clone()) for value in view.parameters()]
    try:
        inject(config, holder, adapter_name=_ADAPTER)
        layer = holder[_TARGET]
        changed = [(value, start) for value, _, start in before if not value.is_meta and not torch.equal(value, start)]
        for value, start in changed:
            value.data = start
        if changed:
            raise ValueError("its start changes the base's weights; choose another one in CONFIG")
        if layer is view or "base_layer" not in layer._modules:
            raise ValueError("it made no layer of its own there")
    except (ValueError, TypeError, AttributeError, NotImplementedError, ImportError) as error:
        kind = config.peft_type.value
        raise MethodError(f"peft's {kind} cannot go on {target.name} ({base.__name__}): {error}") from error
    finally:
        for value, flag, _ in before:
            value.requires_grad_(flag)
    return layer
