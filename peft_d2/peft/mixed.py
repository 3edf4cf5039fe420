"""One base with many adapters: samples of a batch that name theirs, and one sample under several.

A sample ``{"image": ..., "adapter": "night"}`` runs with that adapter, one without a name with the base. What is frozen
runs once for the whole batch. A module whose tensors belong to an adapter runs sample by sample, each with its own
adapter's layers and values, whatever the others name: a result depends on the sample, its adapter and the shape of the
batch alone. Which axis of which input has the samples is found by running the model on two and on three of them.

Where that cannot be found (rows of several images in one, as behind region proposals), or where outputs of different
class counts would have to be one tensor, the model runs once per adapter on the whole batch, and of each run its own
samples' results are taken; parts that get the same inputs again give what they gave before.
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
    """What the whole model is besides its own class once it serves several adapters: see :func:`serve_adapters`."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Threads take turns: what runs is exchanged within modules that they share. A compiler sees no thread."""
        with nullcontext() if torch.compiler.is_compiling() else injected(self)[1].lock:
            return self._routed(*args, **kwargs)

    def _routed(self, *args: Any, **kwargs: Any) -> Any:
        batch = args[0] if args else None
        listed = isinstance(batch, list | tuple) and all(isinstance(item, Mapping) for item in batch)
        if not listed or not any("adapter" in item for item in batch):  # type: ignore[union-attr]
            return super().forward(*args, **kwargs)
        return _run_named(self, batch, [item.get("adapter") or BASE for item in batch])  # type: ignore[arg-type, union-attr]

    @torch.no_grad()
    def predict_with(self, image: Any, adapters: Sequence[str]) -> dict[str, Any]:
        """One sample's result under each of ``adapters``; what they have in common runs once.

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
    """Let samples name their adapters (see this module); the base is in effect for those that name none.

    A model without adapters is injected with none: it is the base until some are added.
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
    """The injection, if these adapters can run now."""
    injection = injected(root)[1]
    injection.require_plain()
    for name in names:
        injection.adapter(name)
    if root.training:
        raise InjectionError("samples name their adapters in inference alone: model.eval(); set_adapter for training")
    return injection


def _run_named(root: Routed, batch: Sequence[Any], names: Sequence[str]) -> list[Any]:
    """The results of samples that run with the adapters ``names``, one for each."""
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
    """What the model gives for the whole batch, by adapter."""
    results, gradients = {}, torch.is_grad_enabled()
    # Tensors of inference mode do not tell whether they were changed in place.
    with torch.inference_mode(False), torch.set_grad_enabled(gradients), _Recording(root, injection) as recording:
        for name in dict.fromkeys(names):
            recording.rewind()
            with _running(injection, name):
                results[name] = Adapted.forward(root, batch)
    return results


@contextmanager
def _running(injection: Injection, name: str) -> Iterator[None]:
    """Run one adapter within the block; nothing is trained there."""
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
    """Within the block ``call(module, its own method, ...)`` stands for each module's method."""
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
    inputs: Any
    output: Any
    versions: list[int]


class _Recording:
    """Outputs of the parts that hold nothing of any adapter; given again where the same inputs come, bit for bit."""

    def __init__(self, root: nn.Module, injection: Injection) -> None:
        specific = {id(module) for module in _specific_modules(root, injection)}
        self.parts = [m for m in root.modules() if not any(id(child) in specific for child in m.modules())]
        self.calls: defaultdict[Any, list[_Call]] = defaultdict(list)
        self.number: Counter[Any] = Counter()
        self.inside = False
        self.block = ExitStack()

    def __enter__(self) -> _Recording:
        for method in _METHODS:
            own = [part for part in self.parts if hasattr(part, method)]
            self.block.enter_context(_replaced(own, partial(self.call, method), method))
        return self

    def __exit__(self, *error: Any) -> None:
        self.block.__exit__(*error)

    def rewind(self) -> None:
        """Another run begins."""
        self.number.clear()

    def call(self, method: str, part: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.inside:
            return forward(*args, **kwargs)
        calls, number = self.calls[id(part), method], self.number[id(part), method]
        self.number[id(part), method] += 1
        if number < len(calls):
            known = calls[number]
            if [t._version for t in _tensors_in(known.output)] == known.versions and _same(
                (args, kwargs), known.inputs
            ):
                return known.output
            return forward(*args, **kwargs)
        self.inside = True
        try:
            output = forward(*args, **kwargs)
        finally:
            self.inside = False
        versions = [t._version for t in _tensors_in(output)]
        calls.append(_Call((args, kwargs), output, versions))
        return output


def _same(one: Any, other: Any) -> bool:
    """Whether two inputs are equal, tensors bit for bit."""
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


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _tensors_in(item)
    elif isinstance(value, Mapping):
        yield from _tensors_in(list(value.values()))
    elif hasattr(value, "__dict__") and not isinstance(value, nn.Module | type):
        yield from _tensors_in(list(vars(value).values()))


# ---- one run: modules that hold something of an adapter, sample by sample


class _CannotSplitError(Exception):
    pass


Axes = dict[tuple[str, int, int], int | None]  # ("in" or "out", which tensor, its dimensions) -> axis of the samples


@dataclass
class Split:
    """The modules that run sample by sample, with the axes of their inputs and outputs, or why there are none."""

    adapters: tuple[str, ...]
    modules: list[tuple[nn.Module, Axes, list[str], bool]] = field(default_factory=list)  # tensors in it; may be ragged
    reason: str = ""


def _specific_modules(root: nn.Module, injection: Injection) -> list[nn.Module]:
    """Modules that hold a tensor of an adapter themselves: its layers, or what it trains in full."""
    tables = {id(table) for tensor in injection.full.values() for table, _ in tensor.places}
    own = [m for m in root.modules() if id(m._parameters) in tables or id(m._buffers) in tables]
    return [*own, *(module for record in injection.adapters.values() for module in record.modules)]


def _find_split(root: Routed, injection: Injection, sample: Mapping[str, Any]) -> Split:
    """From each module with an adapter's tensors upwards, the first one whose samples are told apart."""
    specific = list(dict.fromkeys(_specific_modules(root, injection)))
    inside = {id(module) for module in specific}
    above = [m for m in root.modules() if m is not root and any(id(child) in inside for child in m.modules())]
    parents: dict[int, list[nn.Module]] = {}
    names: dict[int, str] = {}
    for name, module, parent in walk(root):
        names.setdefault(id(module), name)
        if parent is not None:
            parents.setdefault(id(module), []).append(parent)
    image = sample["image"]
    others = [{**sample, "image": image.flip(-1)}, {**sample, "image": image.flip(-2)}]
    two, three = (_calls(root, injection, above, [sample, *others[:n]]) for n in (1, 2))
    ragged = {
        id(table) for key, tensor in injection.full.items() if _is_ragged(injection, key) for table, _ in tensor.places
    }
    allowed = getattr(root, "per_image_outputs", ())
    split, chosen = Split(tuple(injection.adapters)), dict[int, tuple[nn.Module, Axes, list[str], bool]]()

    def climb(module: nn.Module) -> None:
        if id(module) in chosen:
            return
        if module is root:
            raise _CannotSplitError("the samples are not told apart below the whole model")
        tables = {id(table) for child in module.modules() for table in (child._parameters, child._buffers)}
        uneven = bool(ragged & tables)
        axes = _axes(two[id(module)], three[id(module)]) if not uneven or names[id(module)] in allowed else None
        if axes is None:
            for parent in parents[id(module)]:
                climb(parent)
            return
        keys = [key for key, tensor in injection.full.items() if any(id(table) in tables for table, _ in tensor.places)]
        chosen[id(module)] = (module, axes, keys, uneven)

    try:
        for module in specific:
            climb(module)
        split.modules = list(chosen.values())
    except _CannotSplitError as error:
        split.reason = str(error)
        logger.info("One run per adapter of a mixed batch: %s.", error)
    return split


def _is_ragged(injection: Injection, key: str) -> bool:
    """Whether adapters hold tensors of different shapes there: heads of other class counts."""
    shapes = {record.values[key].shape for record in injection.adapters.values() if key in record.values}
    return len({*shapes, injection.base[key].shape}) > 1


@torch.no_grad()
def _calls(root: Routed, injection: Injection, modules: list[nn.Module], batch: list[Any]) -> dict[int, list[Any]]:
    """Of each call of each module in one run of the base: means of every tensor along each of its axes."""
    calls: dict[int, list[Any]] = {id(module): [] for module in modules}

    def record(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        inputs = [_means(leaf) for leaf in tree_flatten((args, kwargs))[0]]
        output = forward(*args, **kwargs)
        calls[id(module)].append((inputs, [_means(leaf) for leaf in tree_flatten(output)[0]]))
        return output

    with _running(injection, BASE), _replaced(modules, record):
        Adapted.forward(root, batch)
    return calls


def _means(leaf: Any) -> Any:
    """Means along each axis of a tensor; None for a plain value; False for what may hide samples."""
    if not isinstance(leaf, Tensor):
        return None if isinstance(leaf, _PLAIN) else False
    value = leaf.float().nan_to_num()
    axes = range(value.dim())
    return [value.mean(dim=[a for a in axes if a != axis]) if value.dim() > 1 else value for axis in axes]


def _axes(two: list[Any], three: list[Any]) -> Axes | None:
    """Where the samples are, from the calls with two and with three of them; None where that is not plain."""
    axes: Axes = {}
    if not two or len(two) != len(three):
        return None
    for call, other in zip(two, three, strict=True):
        for kind, leaves, more in zip(("in", "out"), call, other, strict=True):
            if len(leaves) != len(more):
                return None
            for index, (a, b) in enumerate(zip(leaves, more, strict=True)):
                if a is False or b is False or (a is None) != (b is None):
                    return None
                if a is None:
                    continue
                axis = _sample_axis(a, b)
                if axis is False or axes.setdefault((kind, index, len(a)), axis) != axis:
                    return None
    where = {kind: [axis for (of, *_), axis in axes.items() if of == kind] for kind in ("in", "out")}
    told_apart = any(axis is not None for axis in where["in"]) and where["out"] and None not in where["out"]
    return axes if told_apart else None


def _sample_axis(two: list[Tensor], three: list[Tensor]) -> Any:
    """The axis that grew with the samples, one after the other; None for a tensor without, False for anything else."""
    grown = [axis for axis, (a, b) in enumerate(zip(two, three, strict=False)) if len(a) != len(b)]
    if len(two) != len(three) or len(grown) > 1:
        return False
    if not grown:
        return None
    a, b = two[grown[0]], three[grown[0]]
    in_order = 3 * len(a) == 2 * len(b) and torch.allclose(a, b[: len(a)], rtol=1e-2, atol=1e-3 * float(a.abs().max()))
    return grown[0] if in_order else False


@contextmanager
def _sample_by_sample(injection: Injection, names: Sequence[str]) -> Iterator[None]:
    """Within the block the modules of the split run one sample after the other, each with its adapter."""
    split, inside = injection.split, [False]
    if split.reason:
        raise _CannotSplitError(split.reason)
    plans = {id(module): plan for module, *plan in split.modules}

    def call(module: nn.Module, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if inside[0]:
            return forward(*args, **kwargs)
        axes, keys, uneven = plans[id(module)]
        leaves, spec = tree_flatten((args, kwargs))
        outputs, inside[0] = [], True
        try:
            for i, name in enumerate(names):
                own_args, own_kwargs = tree_unflatten(_sample_of(leaves, axes, i, len(names)), spec)
                _put(injection, keys, name)
                outputs.append(forward(*own_args, **own_kwargs))
        finally:
            _put(injection, keys, BASE)
            inside[0] = False
        return _joined(outputs, axes, uneven)

    with _replaced([module for module, *_ in split.modules], call):
        yield


def _put(injection: Injection, keys: Sequence[str], name: str) -> None:
    """Let one adapter's layers run, and put its values (the base's where it has none) of ``keys`` into the model."""
    injection.running.name = name
    own = injection.adapters[name].values
    for key in keys:
        injection.full[key].put(own[key] if key in own else injection.base[key])


def _sample_of(leaves: Sequence[Any], axes: Axes, i: int, count: int) -> list[Any]:
    """The i-th of ``count`` samples of a call's inputs."""
    own = []
    for index, leaf in enumerate(leaves):
        if isinstance(leaf, Tensor):
            axis = _axis(axes, "in", index, leaf)
            if axis is not None:
                if leaf.shape[axis] % count:
                    raise _CannotSplitError(f"{leaf.shape[axis]} rows do not belong to {count} samples")
                rows = leaf.shape[axis] // count
                leaf = leaf.narrow(axis, i * rows, rows).contiguous()
        own.append(leaf)
    return own


def _axis(axes: Axes, kind: str, index: int, tensor: Tensor) -> int | None:
    key = (kind, index, tensor.dim())
    if key not in axes:
        raise _CannotSplitError("a module is called in another way than when the samples were told apart")
    return axes[key]


def _joined(outputs: Sequence[Any], axes: Axes, uneven: bool) -> Any:
    """The outputs of one sample each as one; with ``uneven``, tensors that do not fit together as a list by sample."""
    flat = [tree_flatten(output) for output in outputs]
    joined: list[Any] = []
    for index, parts in enumerate(zip(*(leaves for leaves, _ in flat), strict=True)):
        if not isinstance(parts[0], Tensor):
            joined.append(parts[0])
            continue
        axis = _axis(axes, "out", index, parts[0])
        if len({part.shape for part in parts}) == 1:
            joined.append(torch.cat(parts, dim=axis))
        elif uneven and axis == 0 and all(len(part) == 1 for part in parts):
            joined.append([part[0] for part in parts])
        else:
            raise _CannotSplitError("the samples' outputs have different shapes")
    return tree_unflatten(joined, flat[0][1])
