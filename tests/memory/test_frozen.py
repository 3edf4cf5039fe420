"""Frozen convolutions keep no input under a memory plan, and give the gradients that they give without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from peft_d2.memory import SavedTensors
from peft_d2.memory.kept import FrozenConvolutions

CONVOLUTIONS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "1d": (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "2d, stride and dilation": (nn.Conv2d(4, 6, 3, 2, 2, 2), (2, 4, 9, 12)),
    "2d in groups": (nn.Conv2d(4, 6, 3, groups=2, bias=False), (1, 4, 7, 7)),
    "2d around the edge": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (1, 4, 7, 7)),
    "2d same": (nn.Conv2d(4, 6, 3, padding="same"), (1, 4, 7, 7)),
    "3d": (nn.Conv3d(4, 6, 2), (1, 4, 3, 4, 5)),
}


@pytest.mark.parametrize("trained", [(), ("weight",), ("bias",)], ids=["frozen", "weight", "bias"])
@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_the_same_gradients(name: str, trained: tuple[str, ...]) -> None:
    layer, shape = CONVOLUTIONS[name]
    for key, parameter in layer.double().named_parameters():
        parameter.requires_grad_(key in trained)
    leaf = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    runs: list[Any] = []
    for within in (False, True):
        layer.zero_grad()
        with SavedTensors(layer) as saved:
            x = leaf * 2
            if within:
                with FrozenConvolutions():
                    out = layer(x)
            else:
                out = layer(x)
        wanted = [leaf, *(p for p in layer.parameters() if p.requires_grad)]
        runs.append([out, *torch.autograd.grad(out.pow(3).sum(), wanted)])
        if within and not trained and name not in ("2d around the edge", "2d same"):
            assert saved.bytes == 0
    torch.testing.assert_close(*runs, rtol=1e-10, atol=1e-12)


def test_under_autocast() -> None:
    layer = nn.Conv2d(4, 6, 3).requires_grad_(False)
    x = torch.randn(1, 4, 8, 8, requires_grad=True)
    runs = []
    for mode in (torch.enable_grad(), FrozenConvolutions()):
        with torch.autocast("cpu", torch.bfloat16), mode:
            out = layer(x)
        runs.append([out, *torch.autograd.grad(out.float().square().sum(), [x])])
    assert runs[0][0].dtype == torch.bfloat16
    torch.testing.assert_close(*runs, rtol=0, atol=0)
