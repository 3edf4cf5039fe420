"""The operator under the names that other people's code imports.

The official Mask2Former, Mask DINO, OneFormer, fc-clip and their kin import ``MultiScaleDeformableAttention``, which
each compiles from its own copy of the CUDA source, and fail without it; detrex imports ``detrex._C``.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import logging
import sys
import sysconfig
import types
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peft_d2 import ops
from peft_d2.ops import library

logger = logging.getLogger(__name__)

OFFICIAL = "MultiScaleDeformableAttention"
_FILE = f'''"""{OFFICIAL}, served by peft_d2. `python -m peft_d2.ops remove` takes this file away."""

from peft_d2.ops.official import ms_deform_attn_backward, ms_deform_attn_forward

__all__ = ["ms_deform_attn_backward", "ms_deform_attn_forward"]
'''


def ms_deform_attn_forward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int = 64,
) -> Tensor:
    """The official extension's forward pass; shapes as in :func:`peft_d2.ops.ms_deform_attn`.

    ``im2col_step`` is taken and not needed: the batch may have any size.
    """
    return ops.ms_deform_attn(value, spatial_shapes, level_start_index, sampling_locations, attention_weights)


def ms_deform_attn_backward(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    im2col_step: int = 64,
) -> tuple[Tensor, Tensor, Tensor]:
    """The official extension's backward pass: gradients of value, sampling locations and attention weights."""
    inputs = value, sampling_locations, attention_weights
    if ops.default_backend(value.device.type) == "torch":
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in inputs]
            output = ops.ms_deform_attn(leaves[0], spatial_shapes, level_start_index, leaves[1], leaves[2])
            grads = torch.autograd.grad(output, leaves, grad_output)
        return grads[0], grads[1], grads[2]
    dtype = library.accumulation_dtype(value.dtype)
    levels = (x.to(value.device, torch.int64) for x in (spatial_shapes, level_start_index))
    found = torch.ops.peft_d2.ms_deform_attn_backward(
        grad_output.to(value.dtype), value, *levels, None, sampling_locations.to(dtype), attention_weights.to(dtype),
        False, torch.are_deterministic_algorithms_enabled(),
    )  # fmt: skip
    return found[0], found[1].to(sampling_locations.dtype), found[2].to(attention_weights.dtype)


def serve_official() -> list[str]:
    """Serve the official extension's names in this process; call it before the code that imports them.

    A real ``MultiScaleDeformableAttention`` or ``detrex._C`` that is installed stays. On the CPU detrex runs a
    pure-torch function of its own: that is replaced by ours, with one line in the log.

    Returns:
        what is served, as names that can be imported.
    """
    served = []
    if OFFICIAL not in sys.modules and not _installed(OFFICIAL):
        # The official code knows the operator by this top-level name alone.
        sys.modules[OFFICIAL] = _module(OFFICIAL)
        served.append(OFFICIAL)
    if _installed("detrex"):
        if "detrex._C" not in sys.modules and not _has_extension("detrex"):
            if "detrex.layers.multi_scale_deform_attn" in sys.modules:
                raise RuntimeError("detrex was imported already, without its operator: call serve_official() before it")
            sys.modules["detrex._C"] = _module("detrex._C")
            served.append("detrex._C")
        layer: Any = importlib.import_module("detrex.layers.multi_scale_deform_attn")
        layer.multi_scale_deformable_attn_pytorch = _without_level_starts
        served.append("detrex.layers.multi_scale_deform_attn.multi_scale_deformable_attn_pytorch")
    for name in served:
        logger.info("peft_d2 serves %s", name)
    return served


def install(folder: str | Path | None = None) -> Path:
    """Serve ``MultiScaleDeformableAttention`` in this environment for good: one small file in ``site-packages``.

    Raises:
        FileExistsError: another one is installed, which stays.
    """
    target = Path(folder or sysconfig.get_path("purelib"), f"{OFFICIAL}.py")
    if not _is_ours(target) and (target.exists() or _installed(OFFICIAL)):
        raise FileExistsError(f"another {OFFICIAL} is installed in this environment, and stays; uninstall it first")
    target.write_text(_FILE)
    return target


def remove(folder: str | Path | None = None) -> Path:
    """Take away what :func:`install` wrote.

    Raises:
        FileNotFoundError: there is no such file of ours.
    """
    target = Path(folder or sysconfig.get_path("purelib"), f"{OFFICIAL}.py")
    if not _is_ours(target):
        raise FileNotFoundError(f"{target} is not there, or is not of peft_d2: nothing was removed")
    target.unlink()
    return target


def _without_level_starts(
    value: Tensor, spatial_shapes: Tensor, sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """detrex's pure-torch function, whose levels follow each other."""
    shapes = torch.as_tensor(spatial_shapes, device=value.device)
    sizes = shapes.prod(1)
    return ops.ms_deform_attn(value, shapes, sizes.cumsum(0) - sizes, sampling_locations, attention_weights)


def _module(name: str) -> types.ModuleType:
    module = types.ModuleType(name, "Multi-scale deformable attention, served by peft_d2.")
    module.__spec__ = importlib.util.spec_from_loader(name, loader=None)
    vars(module).update(ms_deform_attn_forward=ms_deform_attn_forward, ms_deform_attn_backward=ms_deform_attn_backward)
    return module


def _installed(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ValueError, ImportError):  # without a spec, or below a package that cannot be imported
        return name in sys.modules


def _has_extension(package: str) -> bool:
    """Whether a package has a compiled ``_C``; looked up beside its files, since importing it would need one."""
    spec = importlib.util.find_spec(package)
    places = spec.submodule_search_locations if spec is not None else None
    return importlib.machinery.PathFinder.find_spec(f"{package}._C", places) is not None


def _is_ours(path: Path) -> bool:
    return path.is_file() and "served by peft_d2" in path.read_text(encoding="utf-8", errors="replace")
