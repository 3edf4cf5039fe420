# ruff: noqa: F401
"""Parameter-efficient fine-tuning of any nn.Module, in place. Knows torch alone."""

from __future__ import annotations

from .adapted import Adapted, AdapterLayer, base_class
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
from .liveness import NotLive, describe, frozen_hash, not_live, prove_live
from .merge import combine_adapters, delete_adapter, disabled, merge, merge_whole, remove, set_adapter, unmerge
from .methods import METHODS
from .mixed import serve_adapters
from .state import (
    BASE,
    Injection,
    TrainedParameter,
    adapter_state_dict,
    base_state_dict,
    base_values,
    check_name,
    counters,
    get_injection,
    injected_keys,
    injected_root,
    is_sharded,
    is_untrained,
    load_adapter_state_dict,
    no_injection,
    refuse_meta,
    refuse_sharded,
    refuse_wrapper,
    require_intact,
    trained_parameters,
    warn_of_strays,
    without_values,
)
