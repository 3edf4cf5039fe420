# ruff: noqa: F401
"""Training within a memory budget: what autograd keeps, which blocks are computed again, and what that costs."""

from __future__ import annotations

from .meter import SavedTensors, StepPeak, saved_by_module
from .plan import MemoryBudgetError, MemoryPlan, fit_memory, release_memory
