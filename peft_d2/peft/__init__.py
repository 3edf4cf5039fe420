"""Parameter-efficient fine-tuning of any nn.Module, by in-place specialisation. Knows torch alone."""

from __future__ import annotations

from .combine import combine_adapters
from .errors import PeftError
from .inject import add_adapter, inject, match_targets
from .lifecycle import delete_adapter, disabled, merge, remove, set_adapter, unmerge
from .liveness import DeadPartError, dead_parts, prove_live
from .match import PatternError
from .method import MethodError
from .methods import METHODS
from .report import Report, make_report
from .runtime import Injection, InjectionError, get_injection, injected_root, refuse_wrapper
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
    "DeadPartError",
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
    "combine_adapters",
    "dead_parts",
    "delete_adapter",
    "disabled",
    "frozen_hash",
    "get_injection",
    "inject",
    "injected_keys",
    "injected_root",
    "load_adapter_state_dict",
    "make_report",
    "match_targets",
    "merge",
    "prove_live",
    "refuse_wrapper",
    "remove",
    "set_adapter",
    "trained_parameters",
    "unmerge",
]
