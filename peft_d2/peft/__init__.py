"""Parameter-efficient fine-tuning of any nn.Module, in place. Knows torch alone."""

from __future__ import annotations

from .adapted import Adapted, AdapterLayer, base_class
from .checks import NotLive, dead_parts, describe, not_live, prove_live
from .errors import (
    AdapterStateError,
    DeadPartError,
    InjectionError,
    LivenessError,
    MethodError,
    PatternError,
    PeftError,
)
from .inject import Report, add_adapter, inject, make_report, match_targets
from .merge import combine_adapters, delete_adapter, disabled, merge, merge_whole, remove, set_adapter, unmerge
from .methods import METHODS
from .state import (
    Injection,
    TrainedParameter,
    adapter_state_dict,
    base_state_dict,
    base_values,
    counters,
    frozen_hash,
    get_injection,
    hash_memo,
    injected_keys,
    injected_root,
    load_adapter_state_dict,
    refuse_wrapper,
    require_intact,
    trained_parameters,
)

__all__ = [
    "METHODS",
    "Adapted",
    "AdapterLayer",
    "AdapterStateError",
    "DeadPartError",
    "Injection",
    "InjectionError",
    "LivenessError",
    "MethodError",
    "NotLive",
    "PatternError",
    "PeftError",
    "Report",
    "TrainedParameter",
    "adapter_state_dict",
    "add_adapter",
    "base_class",
    "base_state_dict",
    "base_values",
    "combine_adapters",
    "counters",
    "dead_parts",
    "delete_adapter",
    "describe",
    "disabled",
    "frozen_hash",
    "get_injection",
    "hash_memo",
    "inject",
    "injected_keys",
    "injected_root",
    "load_adapter_state_dict",
    "make_report",
    "match_targets",
    "merge",
    "merge_whole",
    "not_live",
    "prove_live",
    "refuse_wrapper",
    "remove",
    "require_intact",
    "set_adapter",
    "trained_parameters",
    "unmerge",
]
