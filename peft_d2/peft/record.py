"""What an injected model remembers: which adapters it has, where they are, and the base's values of what they train."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .adapted import ActiveAdapter, Adapted
from .errors import InjectionError
from .targets import BaseTensor

_ATTRIBUTE = "_peft_adapted_model"
_WRAPPERS = ("DataParallel", "DistributedDataParallel", "FullyShardedDataParallel", "OptimizedModule")


@dataclass
class LayerRecord:
    """Where one adapter layer sits: the module's first name, its own class, and how many numbers the layer adds."""

    name: str
    method: str
    kind: str
    parameters: int


@dataclass
class AdapterRecord:
    """One named adapter: ``methods`` with every key filled in, ``train`` as given, where its layers are (``places``),
    and the first names of all tensors trained in full.
    """

    methods: list[dict[str, Any]]
    train: list[str]
    places: list[LayerRecord] = field(default_factory=list)
    full: list[str] = field(default_factory=list)


@dataclass
class Injection:
    """A plain record of what was injected, and which adapter runs.

    ``base_file`` is where the base's weights came from, if they were loaded by name before the injection.
    """

    adapters: dict[str, AdapterRecord]
    running: ActiveAdapter
    merged: bool = False
    base_file: str = ""

    @property
    def active(self) -> str:
        """Name of the adapter that runs and is trained."""
        return self.running.name

    @property
    def enabled(self) -> bool:
        """False within ``disabled``."""
        return self.running.enabled

    @property
    def methods(self) -> list[dict[str, Any]]:
        """Methods of the active adapter."""
        return self.adapters[self.active].methods

    @property
    def train(self) -> list[str]:
        """TRAIN patterns of the active adapter."""
        return self.adapters[self.active].train

    @property
    def places(self) -> list[LayerRecord]:
        """Layers of the active adapter."""
        return self.adapters[self.active].places


@dataclass
class AdaptedModel:
    """The live side of an :class:`Injection`. Tensors trained in full exist per adapter, and as the base's."""

    record: Injection
    modules: dict[str, list[Adapted]] = field(default_factory=dict)  # per adapter: those that hold its layers
    injected: dict[str, list[nn.Parameter]] = field(default_factory=dict)  # per adapter
    full: dict[str, BaseTensor] = field(default_factory=dict)  # what some adapter trains in full, by first name
    base: dict[str, Tensor] = field(default_factory=dict)  # their frozen values; none where everything is trained
    original: dict[str, Tensor] = field(default_factory=dict)  # the objects that were there before the injection
    values: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # per adapter, its own tensors of these
    start: dict[str, dict[str, str]] = field(default_factory=dict)  # per adapter: hashes of its tensors untrained
    was_trainable: dict[str, bool] = field(default_factory=dict)  # requires_grad before the injection, by first name
    statistics: list[tuple[Adapted, bool]] = field(default_factory=list)  # norms, and whether they were in train mode
    hashes: dict[str, Any] = field(default_factory=dict)  # of the base's tensors, kept from one fingerprint to the next
    installed: str | None = None  # whose values the model holds; None: the base's, within ``disabled``

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy that is made within ``disabled`` has its adapters on, see :class:`ActiveAdapter`."""
        self.__dict__.update(state)
        self.install(self.record.active)

    def install(self, adapter: str | None) -> None:
        """Put one adapter's (or the base's) tensors that are trained in full into the model."""
        if adapter == self.installed:
            return
        if self.installed is not None:
            own = self.values[self.installed]
            own.update({name: self.full[name].get() for name in own})
        chosen = self.values[adapter] if adapter is not None else {}
        for name, tensor in self.full.items():
            tensor.put(chosen[name] if name in chosen else self.base[name])
        self.installed = adapter

    def own_value(self, adapter: str, name: str) -> Tensor:
        """The tensor of one adapter that is trained in full, installed or not."""
        return self.full[name].get() if self.installed == adapter else self.values[adapter][name]

    def require_plain(self) -> None:
        """Raise while adapters are merged or disabled."""
        if self.record.merged:
            raise InjectionError("the adapter is merged into the weights: call unmerge(model) first")
        if not self.record.enabled:
            raise InjectionError("adapters are disabled: leave the disabled(model) block first")

    def adapter(self, name: str) -> AdapterRecord:
        """The record of one adapter.

        Raises:
            InjectionError: there is none of this name.
        """
        if name not in self.record.adapters:
            known = ", ".join(map(repr, self.record.adapters))
            raise InjectionError(f"there is no adapter {name!r}; this model has {known}")
        return self.record.adapters[name]


def attach(model: nn.Module, adapted: AdaptedModel) -> None:
    """Remember it on the model itself, so that copies and pickles carry their own."""
    model.__dict__[_ATTRIBUTE] = adapted


def detach(model: nn.Module) -> None:
    """Forget it."""
    model.__dict__.pop(_ATTRIBUTE, None)


def injected_root(model: nn.Module) -> nn.Module | None:
    """The module that was given to ``inject``: ``model``, or what DataParallel, DDP or ``torch.compile`` wrap."""
    seen: nn.Module | None = model
    while isinstance(seen, nn.Module):
        if _ATTRIBUTE in seen.__dict__:
            return seen
        seen = seen._modules.get("module") or seen._modules.get("_orig_mod")
    return None


def refuse_wrapper(model: nn.Module) -> None:
    """Raise where ``model`` is not the model itself: a wrapper knows the parameters that were there when it was made.

    Raises:
        InjectionError: naming the wrapper.
    """
    wrapper = type(model).__name__
    if wrapper in _WRAPPERS:
        raise InjectionError(f"this is a {wrapper} around a model: inject the model itself, then wrap it")


def get_root(model: nn.Module) -> nn.Module:
    """The injected module itself.

    Raises:
        InjectionError: nothing was injected.
    """
    root = injected_root(model)
    if root is None:
        raise InjectionError(
            f"{type(model).__name__} has no injection: call inject(model, methods, train) on the whole model first"
        )
    return root


def get_adapted(model: nn.Module) -> AdaptedModel:
    """What an injected model remembers.

    Raises:
        InjectionError: nothing was injected.
    """
    return get_root(model).__dict__[_ATTRIBUTE]


def get_injection(model: nn.Module) -> Injection | None:
    """The record of what was injected into ``model``; None when nothing was."""
    return get_adapted(model).record if injected_root(model) is not None else None


def hash_memo(model: nn.Module) -> dict[str, Any]:
    """Where hashes of the base's tensors are kept, so that not every checkpoint hashes all of them again."""
    return get_adapted(model).hashes
