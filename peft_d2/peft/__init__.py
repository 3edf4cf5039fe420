"""Parameter-efficient fine-tuning of any nn.Module, by in-place specialisation. Knows torch alone."""

from __future__ import annotations

from .errors import PeftError
from .inject import add_adapter, inject, match_targets
from .lifecycle import delete_adapter, disabled, merge, remove, set_adapter, unmerge
from .match import PatternError
from .method import MethodError
from .methods import METHODS
from .report import Report, make_report
from .runtime import Injection, InjectionError, get_injection
from .specialise import Specialised, base_class
from .state import (
    AdapterStateError,
    TrainedParameter,
    adapter_state_dict,
    base_state_dict,
    frozen_hash,
    injected_keys,
    load_adapter_state_dict,
    trained_parameters,
)

__all__ = [
    "METHODS",
    "AdapterStateError",
    "Injection",
    "InjectionError",
    "MethodError",
    "PatternError",
    "PeftError",
    "Report",
    "Specialised",
    "TrainedParameter",
    "adapter_state_dict",
    "add_adapter",
    "base_class",
    "base_state_dict",
    "delete_adapter",
    "disabled",
    "frozen_hash",
    "get_injection",
    "inject",
    "injected_keys",
    "load_adapter_state_dict",
    "make_report",
    "match_targets",
    "merge",
    "remove",
    "set_adapter",
    "trained_parameters",
    "unmerge",
]
