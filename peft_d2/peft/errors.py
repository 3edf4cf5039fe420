"""Errors: what the caller asked for does not fit. The message says what was expected and what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class PeftError(Exception):
    """The root of them all."""


class PatternError(PeftError, ValueError):
    """A pattern of module names is malformed or matches nothing."""


class MethodError(PeftError, ValueError):
    """A method's entry in the config is wrong, or the method cannot go where it was sent."""


class InjectionError(PeftError, RuntimeError):
    """An operation does not fit the state of the model's adapters."""


class AdapterStateError(PeftError, ValueError):
    """Tensors do not fit the adapter they were given for."""


class LivenessError(PeftError, RuntimeError):
    """Something that should be trained is not reached by a gradient, or has no part in the prediction."""


DeadPartError = LivenessError  # its name until 0.1


def no_longer_there(names: Sequence[str]) -> InjectionError:
    """The error of a model in which something that was there at the injection has been replaced since."""
    return InjectionError(
        f"what was injected is no longer in the model: {shortened(names, 8)}. Modules were changed after inject (a new "
        "head, SyncBatchNorm, weight_norm, fused, quantised, pruned or tied layers): change the model first, then "
        "inject it; compile a part in place, part.compile()"
    )


def shortened(items: Sequence[str], most: int = 20, between: str = ", ") -> str:
    """The first ``most`` items of a list for a message, and how many more there are."""
    more = f"{between if between != ', ' else ' '}and {len(items) - most} more" if len(items) > most else ""
    return between.join(items[:most]) + more


def alike(name: str, known: Iterable[str]) -> list[str]:
    """For a message: up to three of the ``known`` names that begin with ``name``, or else resemble it."""
    known = sorted(known)
    begin_so = [other for other in known if other.startswith(name)][:3]
    return begin_so or difflib.get_close_matches(name, known, n=3, cutoff=0.4)
