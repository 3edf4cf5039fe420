"""LoRA's options, and the low-rank factors of one weight, whatever its module is.

- LoRA: Hu et al., ICLR 2022, arXiv 2106.09685, equation 3: ``W = W0 + s B A`` with ``s = alpha / r``.
- rsLoRA: Kalajdzievski 2023, arXiv 2312.03732: ``s = alpha / sqrt(r)``.
- DoRA: Liu et al., ICML 2024, arXiv 2402.09353, equation 5 and section 4.3:
  ``W = m (W0 + s B A) / ||W0 + s B A||``, one norm per output, constant in the gradient; m starts as ``||W0||``.
- PiSSA: Meng et al., NeurIPS 2024, arXiv 2404.02948, equations 2 to 4: A and B start as the r principal singular
  directions of W0, and the residual is frozen. Here W0 itself stays and the start is subtracted:
  ``W = W0 + s (B A - B0 A0)``, the same function.
- LoRA-FA: Zhang et al. 2023, arXiv 2308.03303, section 3.1: A stays as it starts, so of a linear layer's input no more
  than its r products with A is kept for the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..adapted import AdapterLayer
from ..cobot import CobotOptions, CobotStep
from ..errors import MethodError
from ..method import Factor, Positive, Probability, expect, one_of
from ..targets import first_match

PARTS = ("q", "k", "v", "out")


@dataclass(frozen=True)
class LoraOptions(CobotOptions):
    """Keys of LoRA.

    ``ALPHA``: unset means alpha = rank (scale 1).
    ``INIT``: default (A Kaiming-uniform, B zero), gaussian (A normal / r, B zero), pissa, or xavier (both
    Xavier-normal, as SAM-COBOT's authors do: the only one that does not start as the pretrained model).
    ``PARTS``: which of q, k, v, out of an nn.MultiheadAttention (default q and v), or of q, k, v of a fused nn.Linear.
    ``FREEZE_A``: A stays as it starts (LoRA-FA), and no linear layer's input is kept for its gradient.
    ``RANK_PATTERN`` and ``ALPHA_PATTERN``: module-name pattern -> value; the first match counts.
    """

    rank: Positive = 8
    alpha: Factor | None = None
    dropout: Probability = 0.0
    init: Annotated[str, one_of("default", "gaussian", "xavier", "pissa")] = "default"
    rslora: bool = False
    dora: bool = False
    freeze_a: bool = False
    parts: Annotated[list[str], one_of(*PARTS)] = field(default_factory=list)
    rank_pattern: dict[str, Positive] = field(default_factory=dict)
    alpha_pattern: dict[str, Factor] = field(default_factory=dict)

    def check(self) -> None:
        super().check()
        if self.cobot:
            self.check_cobot("RANK", self.rank, *self.rank_pattern.values())
            expect(not self.dora, "DORA", self.dora, "false together with COBOT")
            expect(self.init != "pissa", "INIT", self.init, "another start together with COBOT")

    def rank_and_scale(self, name: str) -> tuple[int, float]:
        """Rank and the factor s of the module called ``name``."""
        rank = first_match(self.rank_pattern, name) or self.rank
        alpha = first_match(self.alpha_pattern, name) or self.alpha or rank
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)


class LowRank(AdapterLayer):
    """Factors ``lora_a`` (r, in, ...) and ``lora_b`` (out, r, 1...) of one weight (out, in, ...).

    DoRA adds ``lora_magnitude`` (out,); PiSSA the constant ``lora_a_start`` and ``lora_b_start``; COBOT a step between
    A and B. A subclass says how its module applies two factors (:meth:`product`), and in which order it stores its
    weight (:meth:`ordered`).
    """

    changes_weights = True
    names: ClassVar[tuple[str, str]] = ("lora_a", "lora_b")
    lora_a: Tensor  # a buffer where it is frozen
    lora_b: nn.Parameter
    lora_magnitude: nn.Parameter | None
    lora_a_start: Tensor | None
    lora_b_start: Tensor | None

    def __init__(
        self, weight: Tensor, options: LoraOptions, name: str, made: Mapping[str, Any], cobot: CobotStep | None = None
    ) -> None:
        super().__init__()
        rank, self.scale = options.rank_and_scale(name)
        self.dropout = options.dropout
        self.init = options.init
        out, inputs, *kernel = self.ordered(weight).shape
        if self.init == "pissa" and rank > min(out, math.prod((inputs, *kernel))):
            raise MethodError(
                f"{name}: RANK {rank} exceeds the weight's {tuple(weight.shape)}; INIT pissa needs a smaller one"
            )
        shapes = (rank, inputs, *kernel), (out, rank, *[1] * len(kernel))
        for local, shape in zip(self.names, shapes, strict=True):
            if options.freeze_a and local == self.names[0]:
                self.register_buffer(local, torch.empty(shape, **made))
            else:
                self.register_parameter(local, nn.Parameter(torch.empty(shape, **made)))
            start = torch.empty(shape, **made) if self.init == "pissa" else None
            self.register_buffer(f"lora_{local[-1]}_start", start)
        self.cobot = cobot
        magnitude = nn.Parameter(torch.empty(out, **made)) if options.dora else None
        self.register_parameter("lora_magnitude", magnitude)
        self.reset(weight)

    def ordered(self, weight: Tensor) -> Tensor:
        """The module's weight as (out, in, ...)."""
        return weight

    def as_stored(self, weight: Tensor) -> Tensor:
        """Reverse of :meth:`ordered`."""
        return weight

    def product(self, x: Tensor, a: Tensor, b: Tensor, *context: Any) -> Tensor:
        """s B A x for factors like ``lora_a`` and ``lora_b``."""
        raise NotImplementedError

    @torch.no_grad()
    def reset(self, weight: Tensor) -> None:
        """Start values; ``weight`` is the base weight, which PiSSA and DoRA start from."""
        a, b = self.lora_a, self.lora_b
        if self.lora_a_start is not None and self.lora_b_start is not None:
            first = principal_factors(self.ordered(weight).double(), len(a), self.scale)
            for value, start, factor in zip((a, b), (self.lora_a_start, self.lora_b_start), first, strict=True):
                value.copy_(factor)
                start.copy_(value)
        elif self.init == "xavier":
            nn.init.xavier_normal_(a)
            nn.init.xavier_normal_(b)
        else:
            self._start_at_zero(a, b)
        if self.lora_magnitude is not None:
            self.lora_magnitude.copy_(_row_norm(self.ordered(weight).to(a.dtype)))

    def _start_at_zero(self, a: Tensor, b: Tensor) -> None:
        if self.init == "gaussian":
            nn.init.normal_(a, std=1 / len(a))
        else:
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        nn.init.zeros_(b)

    def delta(self) -> Tensor:
        """s B A as a tensor (out, in, ...), in the factors' dtype."""
        a, b = self.lora_a, self.lora_b
        flat = a.flatten(1) if self.cobot is None else self.cobot.matrix() @ a.flatten(1)
        product = b.flatten(1) @ flat
        if self.lora_a_start is not None and self.lora_b_start is not None:
            product = product - self.lora_b_start.flatten(1) @ self.lora_a_start.flatten(1)
        return self.scale * product.view(b.shape[0], *a.shape[1:])

    def effective(self, weight: Tensor) -> Tensor:
        """The weight that gives the adapted output, in the order and dtype of ``weight``."""
        delta = self.delta()
        changed = self.ordered(weight).to(torch.promote_types(weight.dtype, delta.dtype)) + delta
        if self.lora_magnitude is not None:
            gain = self.lora_magnitude / _row_norm(changed).detach()
            changed = changed * gain.view(-1, *[1] * (changed.dim() - 1))
        return self.as_stored(changed).to(weight.dtype)

    def effective_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"weight": self.effective(weights["weight"])}

    def input(self, x: Tensor) -> Tensor:
        """What A is applied to: the module's input in the factors' dtype, with DROPOUT."""
        return F.dropout(match_dtype(x, self.lora_a), self.dropout, self.training)

    def branch(self, x: Tensor, *context: Any) -> Tensor:
        """s B A x, in PiSSA s (B A - B0 A0) x, which is exactly zero at the start."""
        x = self.input(x)
        y = self.product(x, self.lora_a, self.lora_b, *context)
        if self.lora_a_start is not None and self.lora_b_start is not None:
            y = y - self.product(x, self.lora_a_start, self.lora_b_start, *context)
        return y

    def rescaled(self, out: Tensor, branch: Tensor, weight: Tensor, bias: Tensor | None, channel: int = -1) -> Tensor:
        """The base's output plus s B A x, in DoRA times m / ||W0 + s B A||; axis ``channel`` has the outputs."""
        if self.lora_magnitude is None:
            return out + branch.to(out.dtype)
        shape = [1] * (-channel - 1)
        changed = self.ordered(weight).to(self.lora_magnitude.dtype) + self.delta()
        gain = (self.lora_magnitude / _row_norm(changed.detach())).view(-1, *shape)  # exactly one at the start
        plain = out if bias is None else out - bias.view(-1, *shape)
        return out + ((gain - 1) * plain + gain * branch).to(out.dtype)


def principal_factors(weight: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """PiSSA's start (Meng et al. 2024, equations 2 and 3): A (r, in, ...) and B (out, r, 1...) of W (out, in, ...).

    ``s B A`` is the part of W in its r first singular directions.
    """
    u, s, v = torch.linalg.svd(weight.detach().flatten(1), full_matrices=False)
    root = (s[:rank] / scale).sqrt()
    kernel = [1] * (weight.dim() - 2)
    return (root[:, None] * v[:rank]).view(-1, *weight.shape[1:]), (u[:, :rank] * root).view(len(weight), -1, *kernel)


def match_dtype(x: Tensor, parameter: Tensor) -> Tensor:
    """``x`` in the parameter's dtype; under autocast the operators convert by themselves."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(parameter.dtype)


def _row_norm(weight: Tensor) -> Tensor:
    """(out,), above 0: pretrained weights have outputs that died, whose rows are 0 and would make DoRA's gain 0 / 0."""
    return torch.linalg.vector_norm(weight.flatten(1), dim=1).clamp_min(torch.finfo(weight.dtype).tiny)
