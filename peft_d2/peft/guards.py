"""What keeps a partly frozen model honest: frozen statistics stay, and torch's shortcuts do not pass adapters by."""

from __future__ import annotations

from torch import Tensor, nn

from .specialise import Specialised, Switch, specialise


class FrozenStatisticsMixin(Specialised):
    """A norm with running statistics stays in eval mode under ``train()`` unless the active adapter trains it."""

    layer = 9
    peft_trained_by: frozenset[str]

    def train(self, mode: bool = True) -> FrozenStatisticsMixin:
        return super().train(mode and self.peft_switch.active in self.peft_trained_by)


def has_statistics(module: nn.Module) -> bool:
    """Whether training a batch would move this module's running statistics (BatchNorm of any make)."""
    return isinstance(getattr(module, "running_mean", None), Tensor) and hasattr(module, "momentum")


def freeze_statistics(model: nn.Module, switch: Switch) -> list[nn.Module]:
    """Specialise every module with running statistics; returns them."""
    frozen: list[nn.Module] = []
    for name, module in model.named_modules():
        if has_statistics(module):
            specialise(module, FrozenStatisticsMixin, switch, name)
            module.__dict__.setdefault("peft_trained_by", frozenset())
            frozen.append(module)
    return frozen


def _parts_run_inside(module: nn.Module) -> bool:
    """Whether a part that is not merged runs in ``module`` or below it."""
    return any(isinstance(child, Specialised) and child.peft_runs() for child in module.modules())


class NoFastPathMixin(Specialised):
    """nn.TransformerEncoderLayer reads raw weights in eval without gradients; not while adapters run inside it."""

    layer = 8

    @property
    def activation_relu_or_gelu(self) -> int:
        return 0 if _parts_run_inside(self) else self.__dict__["activation_relu_or_gelu"]

    @activation_relu_or_gelu.setter
    def activation_relu_or_gelu(self, value: int) -> None:
        self.__dict__["activation_relu_or_gelu"] = value


class NoNestedTensorMixin(Specialised):
    """nn.TransformerEncoder packs padded batches for that fast path; not while adapters run inside it."""

    layer = 8

    @property
    def use_nested_tensor(self) -> bool:
        return not _parts_run_inside(self) and self.__dict__["use_nested_tensor"]

    @use_nested_tensor.setter
    def use_nested_tensor(self, value: bool) -> None:
        self.__dict__["use_nested_tensor"] = value


def close_fast_paths(model: nn.Module, switch: Switch) -> None:
    """Guard every torch encoder that holds a specialised module."""
    for name, module in model.named_modules():
        encoder = isinstance(module, nn.TransformerEncoder) and "use_nested_tensor" in module.__dict__
        layer = isinstance(module, nn.TransformerEncoderLayer) and "activation_relu_or_gelu" in module.__dict__
        if not (encoder or layer) or not any(isinstance(child, Specialised) for child in module.modules()):
            continue
        specialise(module, NoNestedTensorMixin if encoder else NoFastPathMixin, switch, name)
