"""One base with many adapters: samples of a batch that name theirs, and one sample under several.

A sample ``{"image": ..., "adapter": "night"}`` runs with that adapter, one that names none with the base. Two ways:

- One run. What is frozen runs once for the whole batch; a module that holds tensors of an adapter runs sample by
  sample, each with its adapter's layers and values. A result thus depends on the sample, its adapter and the shape of
  the batch alone. Which axis of each input and output has the samples is found by running the model on two and on
  three of them (:func:`_find_split`).
- One run per adapter, on the whole batch, of which the results of that adapter's samples are taken. This is for models
  whose samples cannot be told apart (rows of several images in one, as behind region proposals), and for outputs of
  different class counts that would have to be one tensor. Frozen parts that get the same inputs again are not run
  again (:class:`_Recording`).
"""

from __future__ import annotations

import logging
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from .adapted import Adapted, adapt, replaced_forward, walk
from .errors import InjectionError
from .inject import add_adapter, inject
from .merge import set_adapter
from .state import BASE, Injection, get_injection, injected, injected_root

logger = logging.getLogger(__name__)
_METHODS = ("forward", "forward_features")  # the latter is how heads call their pixel decoders
_PLAIN = (type(None), bool, int, float, str, torch.dtype, torch.device, torch.Size)


class Routed(Adapted):
    """Base of the class that a whole model gets once it serves several adapters: see :func:`serve_adapters`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The model's own forward, or, of a batch that names adapters, the results of its samples with these.

        Threads take turns, as the active adapter is exchanged within modules that they share.
        """
        batch: Any = args[0] if args else None
        listed = isinstance(batch, list | tuple) and all(isinstance(item, Mapping) for item in batch)
        with nullcontext() if torch.compiler.is_compiling() else injected(self)[1].lock:
            if not listed or not any("adapter" in item for item in batch):
                return super().forward(*args, **kwargs)
            return _run_named(self, batch, [item.get("adapter") or BASE for item in batch])

    @torch.no_grad()
    def predict_with(self, image: Any, adapters: Sequence[str]) -> dict[str, Any]:
        """One sample's result with each of ``adapters``, by name; what is frozen runs once for all of them.

        Args:
            image: the sample, as the model takes it in a batch, or its image alone, (C, H, W).
            adapters: names of loaded adapters; "base" is none.

        Raises:
            InjectionError: an adapter is not loaded, or the model is in training mode or merged.
        """
        sample = image if isinstance(image, Mapping) else {"image": image}
        with injected(self)[1].lock:
            results = _run_each(self, _checked(self, adapters), [sample], adapters)
        return {name: result[0] for name, result in results.items()}


def serve_adapters(model: nn.Module) -> None:
    """Let samples of a batch name their adapters; those that name none run with the base.

    A model that was not injected becomes one whose only adapter is the base itself.

    Raises:
        InjectionError: somebody has replaced the model's forward.
    """
    root = injected_root(model)
    if problem := replaced_forward(model if root is None else root):
        raise InjectionError(f"samples cannot name their adapters: {problem}")
    if get_injection(model) is None:
        inject(model, (), (), BASE)
    root, injection = injected(model)
    if BASE not in injection.adapters:
        add_adapter(root, BASE, (), ())
    set_adapter(root, BASE)
    adapt(root, injection.running, "", Routed)


def _checked(root: nn.Module, names: Sequence[str]) -> Injection:
    """The model's injection; InjectionError where adapters of these names cannot run now."""
    injection = injected(root)[1]
    injection.require_plain()
    for name in names:
        injection.adapter(name)
    if root.training:
        raise InjectionError("samples name their adapters in inference alone: model.eval(); set_adapter for training")
    return injection


def _run_named(root: Routed, batch: Sequence[Any], names: Sequence[str]) -> list[Any]:
    """The result of each sample of ``batch``, run with the adapter at its place in ``names``."""
    injection = _checked(root, names)
    if len(batch) > 1:
        if injection.split is None or injection.split.adapters != tuple(injection.adapters):
            injection.split = _find_split(root, injection, batch[0])
        try:
            with _running(injection, BASE), _sample_by_sample(injection, names):
                return Adapted.forward(root, batch)
        except _CannotSplitError as error:
            if not injection.split.reason:
                injection.split.reason = str(error)
                logger.warning("One run per adapter of a mixed batch: %s.", error)
    results = _run_each(root, injection, batch, names)
    if not all(isinstance(result, list) and len(result) == len(batch) for result in results.values()):
        raise InjectionError("a batch that names adapters needs a model that gives a list, one result a sample")
    return [results[name][i] for i, name in enumerate(names)]


def _run_each(root: Routed, injection: Injection, batch: Sequence[Any], names: Sequence[str]) -> dict[str, Any]:
    """The model's results for the whole batch with each of the adapters ``names``."""
    results, gradients = {}, torch.is_grad_enabled()
    # Tensors of inference mode do not tell whether they were changed in place.
    recording = _Recording(root, injection)
    with torch.inference_mode(False), torch.set_grad_enabled(gradients), recording.of_parts():
        for name in dict.fromkeys(names):
            recording.number.clear()
            with _running(injection, name):
                results[name] = Adapted.forward(root, batch)
    return results


@contextmanager
def _running(injection: Injection, name: str) -> Iterator[None]:
    """Let one adapter be the active one within the block, for inference: no parameter's requires_grad changes."""
    before = injection.active
    injection.install(name)
    injection.running.name = name
    try:
        yield
    finally:
        injection.install(before)
        injection.running.name = before


@contextmanager
def _replaced(modules: Sequence[nn.Module], call: Callable[..., Any], method: str = "forward") -> Iterator[None]:
    """Within the block each module's ``method`` is ``call(module, its own method, ...)``."""
    before = [(module, module.__dict__.get(method)) for module in modules]
    for module, _ in before:
        module.__dict__[method] = partial(call, module, getattr(module, method))
    try:
        yield
    finally:
        for module, own in before:
            del module.__dict__[method]
            if own is not None:
                module.__dict__[method] = own


# ---- one run per adapter: frozen parts that get the same inputs again


@dataclass
class _Call:
    """One call of a part: what it got, what it gave, and how often the tensors of that were changed in place before."""

    inputs: Any
    output: Any
    versions: list[int]


class _Recording:
    """Outputs of the parts that hold nothing of any adapter, given again where the same inputs come, bit for bit.

    The n-th call of a part in a run is compared with its n-th call in the first run.
    """

    def __init__(self, root: nn.Module, injection: Injection) -> None:
        specific = {id(module) for module in _specific_modules(root, injection)}
        self.parts = [m for m in root.modules() if not any(id(child) in specific for child in m.modules())]
        self.calls: defaultdict[Any, list[_Call]] = defaultdict(list)
        self.number: Counter[Any] = Counter()  # of calls in this run
        self.inside = False

    @contextmanager
    def of_parts(self) -> Iterator[None]:
        """Within the block the parts record, and give again what is recorded."""
        with ExitStack() as stack:
            for method in _METHODS:
                own = [part for part in self.parts if hasattr(part, method)]
                stack.enter_context(_replaced(own, partial(self.call, method), method))
            yield

    def call(self, method: str, part: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stand for ``method`` of ``part``, which is ``forward``: record its output, or give what is recorded.

        Parts that run inside another one are not looked at: the outer one's output is all that is needed.
        """
        if self.inside:
            return forward(*args, **kwargs)
        key = id(part), method
        calls, number = self.calls[key], self.number[key]
        self.number[key] += 1
        if number < len(calls):
            known = calls[number]
            is_known = known.versions == _versions(known.output) and _same((args, kwargs), known.inputs)
            return known.output if is_known else forward(*args, **kwargs)
        self.inside = True
        try:
            output = forward(*args, **kwargs)
        finally:
            self.inside = False
        calls.append(_Call((args, kwargs), output, _versions(output)))
        return output


def _same(one: Any, other: Any) -> bool:
    """Whether two inputs are equal, tensors bit for bit; objects by identity or by what they hold."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and one.dtype == other.dtype and (one is other or torch.equal(one, other))
    if type(one) is not type(other):
        return False
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, nn.Module) or not hasattr(one, "__dict__"):
        return one is other or (isinstance(one, _PLAIN) and one == other)
    return one is other or _same(vars(one), vars(other))


def _versions(value: Any) -> list[int]:
    """How often each tensor in ``value``, any nesting of them, was changed in place."""
    if isinstance(value, Tensor):
        return [value._version]
    if isinstance(value, Mapping):
        value = list(value.values())
    elif not isinstance(value, list | tuple | nn.Module | type):
        value = list(getattr(value, "__dict__", {}).values())
    return [version for item in value for version in _versions(item)] if isinstance(value, list | tuple) else []


# ---- one run: modules that hold something of an adapter, sample by sample


class _CannotSplitError(Exception):
    """A module cannot run sample by sample; the message says why."""


Leaf = tuple[str, int, int, int]  # "in" or "out" of a call, which value of how many, and a tensor's dimensions
Axes = dict[Leaf, int | None]  # the axis that has the samples; None where a value is the same for all of them


@dataclass
class SplitModule:
    """A module that runs sample by sample.

    Attributes:
        axes: of its inputs and outputs.
        full: names of the tensors in it that adapters train in full.
        ragged: adapters have tensors of different shapes in it, heads of other class counts, so that its outputs are
            given as a list by sample where they do not fit together.
    """

    module: nn.Module
    axes: Axes
    full: list[str]
    ragged: bool


@dataclass
class Split:
    """The modules that run sample by sample while there are these adapters; or ``reason``, why none can."""

    adapters: tuple[str, ...]
    modules: list[SplitModule] = field(default_factory=list)
    reason: str = ""


def _specific_modules(root: nn.Module, injection: Injection) -> list[nn.Module]:
    """Modules that hold something of an adapter themselves: its layers, or a tensor that it trains in full."""
    tables = {id(table) for tensor in injection.full.values() for table, _ in tensor.places}
    own = [m for m in root.modules() if id(m._parameters) in tables or id(m._buffers) in tables]
    return [*own, *(module for record in injection.adapters.values() for module in record.modules)]


def _find_split(root: Routed, injection: Injection, sample: Mapping[str, Any]) -> Split:
    """Find the modules to run sample by sample: from each one with something of an adapter upwards, the first one whose
    inputs and outputs show where the samples are.
    """
    specific = list(dict.fromkeys(_specific_modules(root, injection)))
    inside = {id(module) for module in specific}
    above = [m for m in root.modules() if m is not root and any(id(child) in inside for child in m.modules())]
    parents: defaultdict[int, list[nn.Module]] = defaultdict(list)
    names: dict[int, str] = {}
    for name, module, parent in walk(root):
        names.setdefault(id(module), name)
        if parent is not None:
            parents[id(module)].append(parent)
    image = sample["image"]
    others = [{**sample, "image": image.flip(-1)}, {**sample, "image": image.flip(-2)}]
    two, three = (_calls(root, injection, above, [sample, *others[:n]]) for n in (1, 2))
    ragged = {
        id(table) for key, tensor in injection.full.items() if _is_ragged(injection, key) for table, _ in tensor.places
    }
    allowed = getattr(root, "per_image_outputs", ())
    split, judged = Split(tuple(injection.adapters)), set[int]()
    while specific:
        module = specific.pop(0)
        if id(module) in judged:
            continue
        judged.add(id(module))
        if module is root:
            reason = "the samples are not told apart below the whole model"
            logger.info("One run per adapter of a mixed batch: %s.", reason)
            return Split(split.adapters, reason=reason)
        tables = {id(table) for child in module.modules() for table in (child._parameters, child._buffers)}
        is_ragged = bool(ragged & tables)
        axes = _axes(two[id(module)], three[id(module)]) if not is_ragged or names[id(module)] in allowed else None
        if axes is None:
            specific += parents[id(module)]
        else:
            places = ((key, table) for key, tensor in injection.full.items() for table, _ in tensor.places)
            full = list(dict.fromkeys(key for key, table in places if id(table) in tables))
            split.modules.append(SplitModule(module, axes, full, is_ragged))
    return split


def _is_ragged(injection: Injection, key: str) -> bool:
    """Whether adapters hold tensors of different shapes under the name ``key``: heads of other class counts."""
    shapes = {record.values[key].shape for record in injection.adapters.values() if key in record.values}
    return len({*shapes, injection.base[key].shape}) > 1


@torch.no_grad()
def _calls(root: Routed, injection: Injection, modules: list[nn.Module], batch: list[Any]) -> dict[int, list[Any]]:
    """Run the base on ``batch`` and return, by module's id, of each call the :func:`_means` of inputs and outputs."""
    calls: dict[int, list[Any]] = {id(module): [] for module in modules}

    def record(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        inputs = _means("in", (args, kwargs))
        output = forward(*args, **kwargs)
        calls[id(module)].append(inputs | _means("out", output))
        return output

    with _running(injection, BASE), _replaced(modules, record):
        Adapted.forward(root, batch)
    return calls


def _means(kind: str, values: Any) -> dict[Leaf, list[Tensor] | None]:
    """The means along each axis of every tensor in ``values``, which show what lies along the axis.

    Plain values are left out. Any other object may hold samples, which nobody sees: None.
    """
    means: dict[Leaf, list[Tensor] | None] = {}
    leaves = tree_flatten(values)[0]
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            value, axes = leaf.float().nan_to_num(), range(leaf.dim())
            along = [value.mean(dim=[a for a in axes if a != axis]) if len(axes) > 1 else value for axis in axes]
            means[kind, index, len(leaves), len(axes)] = along
        elif not isinstance(leaf, _PLAIN):
            means[kind, index, len(leaves), 0] = None
    return means


def _axes(two: list[Any], three: list[Any]) -> Axes | None:
    """The axes that have the samples, from a module's calls with two and with three of them.

    None where its calls do not agree, or where not all of its outputs have an axis that grew with the samples.
    """
    axes: Axes = {}
    if not two or len(two) != len(three):
        return None
    for call, other in zip(two, three, strict=True):
        if call.keys() != other.keys() or None in call.values() or None in other.values():
            return None
        for leaf in call:
            grown = [axis for axis, (a, b) in enumerate(zip(call[leaf], other[leaf], strict=True)) if len(a) != len(b)]
            ordered = len(grown) < 2 and all(_in_order(call[leaf][axis], other[leaf][axis]) for axis in grown)
            axis = grown[0] if grown else None
            if not ordered or axes.setdefault(leaf, axis) != axis:
                return None
    where = {kind: [axis for (of, *_), axis in axes.items() if of == kind] for kind in ("in", "out")}
    told_apart = any(axis is not None for axis in where["in"]) and where["out"] and None not in where["out"]
    return axes if told_apart else None


def _in_order(two: Tensor, three: Tensor) -> bool:
    """Whether an axis of three samples begins with what the axis of two holds, and is half as long again."""
    same = 3 * len(two) == 2 * len(three)
    return same and torch.allclose(two, three[: len(two)], rtol=1e-2, atol=1e-3 * float(two.abs().max()))


@contextmanager
def _sample_by_sample(injection: Injection, names: Sequence[str]) -> Iterator[None]:
    """Within the block the modules of the split run one sample after the other, each with its adapter.

    Raises:
        _CannotSplitError: there is no split, or a call does not fit it.
    """
    split, inside = injection.split, [False]
    if split.reason:
        raise _CannotSplitError(split.reason)
    parts = {id(part.module): part for part in split.modules}

    def call(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Stand for the module's ``forward``: run it for each sample, unless it is inside a module that does."""
        if inside[0]:
            return forward(*args, **kwargs)
        part = parts[id(module)]
        leaves, spec = tree_flatten((args, kwargs))
        outputs, inside[0] = [], True
        try:
            for i, name in enumerate(names):
                own_args, own_kwargs = tree_unflatten(_sample_of(leaves, part.axes, i, len(names)), spec)
                _put(injection, part.full, name)
                outputs.append(forward(*own_args, **own_kwargs))
        finally:
            _put(injection, part.full, BASE)
            inside[0] = False
        return _joined(outputs, part)

    with _replaced([part.module for part in split.modules], call):
        yield


def _put(injection: Injection, keys: Sequence[str], name: str) -> None:
    """Let one adapter's layers run, and put its values of the tensors ``keys`` (or the base's) into the model."""
    injection.running.name = name
    own = injection.adapters[name].values
    for key in keys:
        injection.full[key].put(own[key] if key in own else injection.base[key])


def _sample_of(leaves: Sequence[Any], axes: Axes, i: int, count: int) -> list[Any]:
    """The i-th of ``count`` samples of a call's inputs."""
    own = []
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor) and (axis := _axis(axes, "in", index, leaves)) is not None:
            if leaf.shape[axis] % count:
                raise _CannotSplitError(f"{leaf.shape[axis]} rows do not belong to {count} samples")
            rows = leaf.shape[axis] // count
            leaf = leaf.narrow(axis, i * rows, rows).contiguous()
        own.append(leaf)
    return own


def _axis(axes: Axes, kind: str, index: int, leaves: Sequence[Any]) -> int | None:
    """The axis of the samples in a tensor among the inputs or outputs of a call."""
    key = (kind, index, len(leaves), leaves[index].dim())
    if key not in axes:
        raise _CannotSplitError("a module is called in another way than when the samples were told apart")
    return axes[key]


def _joined(outputs: Sequence[Any], module: SplitModule) -> Any:
    """The outputs of one sample each as those of a batch; of a ragged module, what does not fit is a list by sample."""
    flat = [tree_flatten(output) for output in outputs]
    joined: list[Any] = []
    for index, parts in enumerate(zip(*(leaves for leaves, _ in flat), strict=True)):
        if not isinstance(parts[0], Tensor):
            joined.append(parts[0])
            continue
        axis = _axis(module.axes, "out", index, flat[0][0])
        if len({part.shape for part in parts}) == 1:
            joined.append(torch.cat(parts, dim=axis))
        elif module.ragged and axis == 0 and all(len(part) == 1 for part in parts):
            joined.append([part[0] for part in parts])
        else:
            raise _CannotSplitError("the samples' outputs have different shapes")
    return tree_unflatten(joined, flat[0][1])
