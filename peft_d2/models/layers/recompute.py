"""Activation checkpointing: less memory for a second forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def run_block(block: nn.Module, *inputs: Any, use_checkpoint: bool) -> Tensor:
    """``block(*inputs)``; with ``use_checkpoint``, its activations are computed again in the backward pass.

    Source: Chen et al., Training Deep Nets with Sublinear Memory Cost, arXiv 1604.06174, section 4.
    """
    if use_checkpoint and block.training and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)
