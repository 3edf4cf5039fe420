"""LoRA on nn.Linear, on some of q, k, v of a fused nn.Linear, and on nn.Embedding.

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models", ICLR 2022, arXiv 2106.09685, equation 3:
``h = W0 x + s B A x``. Two forms compute it: a thin branch beside the layer, and, for many rows on a CPU,
:func:`low_rank_linear`, which uses the changed weight but has the branch's thin gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..adapted import AdapterLayer, first_input
from .factors import LowRank


def saves_passes(x: Tensor, weight: Tensor, a: Tensor) -> bool:
    """Whether :func:`low_rank_linear` may be used on ``x`` (..., in) and is faster than the branch.

    It passes over the weight (out, in) where the branch passes over ``x`` and the output: on CPUs it wins from four
    times out in / (out + in) rows on. Weights below float32, autocast's included, would swallow small changes.
    Compilers fuse the branch's passes, and would tie a graph to the number of rows; a traced graph cannot hold it.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if torch.is_autocast_enabled(x.device.type):
        return False
    if not x.dtype == weight.dtype == a.dtype or x.dtype not in (torch.float32, torch.float64):
        return False
    out, inputs = weight.shape
    return x.numel() * (out + inputs) > 4 * inputs * weight.numel()


class _LowRankLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
        return F.linear(x, torch.addmm(weight, b, a), bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x, weight, _, a, b = inputs
        ctx.save_for_backward(x, weight, a, b)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        for_x, for_weight, for_bias, for_a, for_b = ctx.needs_input_grad
        rows, grad = x.reshape(-1, x.shape[-1]), grad_output.reshape(-1, grad_output.shape[-1])
        # CPUs take the time of a whole weight for thin products in other memory orders than these.
        low_grad = F.linear(grad, b.t().contiguous()) if for_a else None
        return (
            (grad @ torch.addmm(weight, b, a)).view_as(x) if for_x else None,
            grad.t() @ rows if for_weight else None,
            grad.sum(0) if for_bias else None,
            low_grad.t() @ rows if low_grad is not None else None,
            (F.linear(rows, a).t() @ grad).t() if for_b else None,
        )


def low_rank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """``x (W + B A)^T + bias``: (..., in) -> (..., out), with the scale within B or A.

    One product with the changed weight, which is formed anew for the backward pass instead of being kept; for A and B
    the branch's own gradients, so that the gradient of the whole weight is never formed.

    Args:
        x: (..., in).
        weight, bias: (out, in) and (out,) or None; frozen or not.
        a, b: (r, in) and (out, r), all of one floating-point type.
    """
    return _LowRankLinear.apply(x, weight, bias, a, b)


class LinearLora(LowRank):
    """Factors of an nn.Linear."""

    def low(self, x: Tensor, a: Tensor) -> Tensor:
        """A x for x (..., in) -> (..., r), through COBOT where it is."""
        low = F.linear(x, a)
        return low if self.cobot is None else self.cobot(low)

    def branch(self, x: Tensor) -> Tensor:
        """s B A x for x (..., in) -> (..., out)."""
        x = self.input(x)
        y = self.low(x, self.lora_a) @ _rows(self.lora_b)
        if self.lora_a_start is not None and self.lora_b_start is not None:
            y = y - self.low(x, self.lora_a_start) @ _rows(self.lora_b_start)  # exactly zero at the start
        return y * self.scale

    def adapted(self, x: Tensor, out: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The adapted output (..., out), given the layer's input (..., in) and its own output.

        Where nothing else is to be done, one product adds, without passes over further tensors as wide as the output.
        """
        if self.lora_magnitude is None and self.lora_a_start is None:
            low = self.low(self.input(x), self.lora_a)
            if out.dtype == low.dtype:
                rows, thin = out.reshape(-1, out.shape[-1]), low.reshape(-1, low.shape[-1])
                return torch.addmm(rows, thin, _rows(self.lora_b), alpha=self.scale).view(out.shape)
        return self.rescaled(out, self.branch(x), weight, bias)

    def pair(self) -> tuple[Tensor, Tensor] | None:
        """A (r, in) and s B (out, r) where these two say it all; else None.

        They do not with dropout on the branch's input, with DoRA's norm, and with PiSSA, whose start cancels exactly
        only as a difference of branches.
        """
        if (self.dropout and self.training) or self.lora_magnitude is not None or self.lora_a_start is not None:
            return None
        return (self.lora_a if self.cobot is None else self.cobot.matrix() @ self.lora_a), self.lora_b * self.scale

    def adapted_forward(self, module: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        return self(first_input(args, kwargs), module.weight, module.bias)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The adapted layer: (..., in) -> (..., out)."""
        if saves_passes(x, weight, self.lora_a) and (pair := self.pair()) is not None:
            return low_rank_linear(x, weight, bias, *pair)
        return self.adapted(x, F.linear(x, weight, bias), weight, bias)


def _rows(b: Tensor) -> Tensor:
    """B (out, r) as (r, out) laid out by rows.

    Otherwise the gradient of B is a product for which CPUs need, with r below 16, the time of the whole weight's.
    """
    return b.t().contiguous()


class PackedLora(AdapterLayer):
    """Factors of some of q, k, v, each under its letter, for one fused weight (3 d, in) with rows q, then k, then v."""

    changes_weights = True

    def __init__(self, factors: Mapping[str, LinearLora]) -> None:
        super().__init__()
        self.letters = tuple(factors)
        for letter, value in factors.items():
            self.add_module(letter, value)

    def factors(self, letter: str) -> LinearLora | None:
        """The factors of one letter; None when it is not adapted."""
        return getattr(self, letter) if letter in self.letters else None

    def fuse(self, weight: Tensor) -> Tensor:
        """The effective fused weight (3 d, in)."""
        rows = zip((self.factors(letter) for letter in "qkv"), weight.chunk(3), strict=True)
        return torch.cat([block if factors is None else factors.effective(block) for factors, block in rows])

    def effective_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"weight": self.fuse(weights["weight"])}

    def pair(self) -> tuple[Tensor, Tensor] | None:
        """A (n r, in) and B (3 d, n r) of the n adapted letters as one update of the fused weight, as LinearLora's."""
        down, up = [], []
        for i, letter in enumerate("qkv"):
            if (factors := self.factors(letter)) is None:
                continue
            if (pair := factors.pair()) is None:
                return None
            down.append(pair[0])
            up.append(F.pad(pair[1], (0, 0, i * len(pair[1]), (2 - i) * len(pair[1]))))
        return torch.cat(down), torch.cat(up, dim=1)

    def adapted_forward(self, module: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        return self(first_input(args, kwargs), module.weight, module.bias)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The adapted linear layer: (..., in) -> (..., 3 d)."""
        first = getattr(self, self.letters[0])
        if saves_passes(x, weight, first.lora_a) and (pair := self.pair()) is not None:
            return low_rank_linear(x, weight, bias, *pair)
        biases = bias.chunk(3) if bias is not None else (None, None, None)
        blocks = list(F.linear(x, weight, bias).chunk(3, dim=-1))
        for i, letter in enumerate("qkv"):
            if (factors := self.factors(letter)) is not None:
                blocks[i] = factors.adapted(x, blocks[i], weight.chunk(3)[i], biases[i])
        return torch.cat(blocks, dim=-1)


class EmbeddingLora(LowRank):
    """Factors ``lora_embedding_a`` (r, words) and ``lora_embedding_b`` (width, r) of a weight (words, width).

    As in loralib, A starts at zero and B as the embedding's own weight does.
    """

    names = ("lora_embedding_a", "lora_embedding_b")
    lora_embedding_a: nn.Parameter
    lora_embedding_b: nn.Parameter

    def __init__(self, module: nn.Embedding, *args: Any) -> None:
        self.padding_idx = module.padding_idx
        super().__init__(module.weight, *args)

    def ordered(self, weight: Tensor) -> Tensor:
        return weight.t()

    def as_stored(self, weight: Tensor) -> Tensor:
        return weight.t()

    def _reset_factors(self, a: Tensor, b: Tensor) -> None:
        if self.init == "xavier":
            super()._reset_factors(a, b)
        else:
            nn.init.zeros_(a)
            nn.init.normal_(b)

    @property
    def lora_a(self) -> nn.Parameter:  # type: ignore[override]
        """A, under the name that all factors have."""
        return self.lora_embedding_a

    @property
    def lora_b(self) -> nn.Parameter:  # type: ignore[override]
        """B, likewise."""
        return self.lora_embedding_b

    def branch(self, x: Tensor) -> Tensor:
        """s B A of indices (...): (..., width); the column of A for ``padding_idx`` gets no gradient."""
        y = F.embedding(x, self.lora_a.t(), self.padding_idx) @ self.lora_b.t()
        if self.lora_a_start is not None and self.lora_b_start is not None:
            y = y - F.embedding(x, self.lora_a_start.t()) @ self.lora_b_start.t()
        return y * self.scale

    def adapted_forward(self, module: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        return self(first_input(args, kwargs), forward(*args, **kwargs), module.weight)

    def forward(self, x: Tensor, out: Tensor, weight: Tensor) -> Tensor:
        """The adapted vectors (..., width) for indices (...), given the base's own."""
        return self.rescaled(out, self.branch(x), weight, None)
