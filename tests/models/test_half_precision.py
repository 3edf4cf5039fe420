"""LoRA in every model in half precision on a CPU, beside float32: under autocast, and on a base that is half itself."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peft_d2 import peft

from .test_on_gpu import KINDS, adapted, pictures, scores_and_masks  # noqa: F401  a fixture
from .test_on_gpu import step as step_of

both = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])


def step(model: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[float, Tensor]:
    """The sum of the losses, and all gradients in a row."""
    losses, gradients = step_of(model, dtype, nullcontext)
    return sum(losses.values()).item(), torch.cat([gradient.flatten().float() for gradient in gradients.values()])


@both
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_under_autocast(adapted: Any, kind: str, dtype: torch.dtype) -> None:  # noqa: F811
    """Random weights decide by a hair, and bfloat16 otherwise here and there: its gradients may turn further."""
    model = adapted(kind)
    (loss, expected), (found, gradients) = step(model), step(model, dtype)
    assert found == pytest.approx(loss, rel=0.01)
    assert torch.cosine_similarity(gradients, expected, dim=0) > (0.98 if dtype == torch.float16 else 0.8)


@both
@pytest.mark.parametrize("kind", ["eomt", "sam", "sam2"])
def test_a_base_in_half_precision(adapted: Any, kind: str, dtype: torch.dtype) -> None:  # noqa: F811
    """Its adapters are float32; merged, it gives what they gave, and unmerged it is as before, bit for bit."""
    model = adapted(kind)
    half = copy.deepcopy(model).to(dtype)
    for own, parameter in zip(peft.trained_parameters(half), peft.trained_parameters(model), strict=True):
        own.param.data = parameter.param.detach().clone()
    (loss, expected), (found, gradients) = step(model), step(half)
    assert found == pytest.approx(loss, rel=0.01)
    assert torch.cosine_similarity(gradients, expected, dim=0) > 0.98
    peft.prove_live(half, pictures())
    before = {name: value.clone() for name, value in half.state_dict().items()}
    results = scores_and_masks(half)
    peft.merge(half)
    for (scores, _), (other_scores, _) in zip(scores_and_masks(half), results, strict=True):
        torch.testing.assert_close(scores, other_scores, rtol=0, atol=0.02)
    peft.unmerge(half)
    assert all(torch.equal(half.state_dict()[name], value) for name, value in before.items())
