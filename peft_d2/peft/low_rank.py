"""The low-rank factors that every LoRA place holds, whatever its module is.

- LoRA: Hu et al., ICLR 2022, arXiv 2106.09685, equation 3: ``W = W0 + s B A`` with ``s = alpha / r``.
- rsLoRA: Kalajdzievski 2023, arXiv 2312.03732: ``s = alpha / sqrt(r)``.
- DoRA: Liu et al., ICML 2024, arXiv 2402.09353, equation 5 and section 4.3:
  ``W = m (W0 + s B A) / ||W0 + s B A||``, one norm per output, constant in the gradient; m starts as ``||W0||``.
- PiSSA: Meng et al., NeurIPS 2024, arXiv 2404.02948, equations 2 to 4: A and B start as the r principal singular
  directions of W0, and the residual is frozen. Here W0 itself stays and the start is subtracted:
  ``W = W0 + s (B A - B0 A0)``, the same function.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cobot import CobotOptions, CobotPlace
from .low_rank_linear import low_rank_linear, saves_passes
from .match import first_match
from .method import MethodError, expect
from .specialise import Part

INITS = ("default", "gaussian", "xavier", "pissa")
PARTS = ("q", "k", "v", "out")


@dataclass(frozen=True)
class LoraOptions(CobotOptions):
    """Keys of LoRA.

    ``ALPHA``: unset means alpha = rank (scale 1).
    ``INIT``: default (A Kaiming-uniform, B zero), gaussian (A normal / r, B zero), pissa, or xavier (both
    Xavier-normal, as SAM-COBOT's authors do: the only one that does not start as the pretrained model).
    ``PARTS``: which of q, k, v, out of an nn.MultiheadAttention (default q and v), or of q, k, v of a fused nn.Linear.
    ``RANK_PATTERN`` and ``ALPHA_PATTERN``: module-name pattern -> value; the first match counts.
    """

    rank: int = 8
    alpha: float | None = None
    dropout: float = 0.0
    init: str = "default"
    rslora: bool = False
    dora: bool = False
    parts: list[str] = field(default_factory=list)
    rank_pattern: dict[str, int] = field(default_factory=dict)
    alpha_pattern: dict[str, float] = field(default_factory=dict)

    def check(self) -> None:
        super().check()
        for rank in (self.rank, *self.rank_pattern.values()):
            expect(type(rank) is int and rank > 0, "RANK", rank, "a positive integer")
            self.check_width("RANK", rank)
        for alpha in (self.alpha, *self.alpha_pattern.values()):
            expect(alpha is None or alpha > 0, "ALPHA", alpha, "a positive number")
        expect(0 <= self.dropout < 1, "DROPOUT", self.dropout, "a probability below 1")
        expect(self.init in INITS, "INIT", self.init, f"one of {', '.join(INITS)}")
        expect(set(self.parts) <= set(PARTS), "PARTS", self.parts, f"a list out of {', '.join(PARTS)}")
        expect(not (self.dora and self.cobot), "DORA", self.dora, "false together with COBOT")
        expect(not (self.cobot and self.init == "pissa"), "INIT", self.init, "another start together with COBOT")

    def rank_and_scale(self, name: str) -> tuple[int, float]:
        """Rank and the factor s of the place called ``name``."""
        rank = first_match(self.rank_pattern, name) or self.rank
        alpha = first_match(self.alpha_pattern, name) or self.alpha or rank
        return rank, alpha / (math.sqrt(rank) if self.rslora else rank)


class LowRank(Part):
    """Factors ``lora_a`` (r, in, ...) and ``lora_b`` (out, r, 1...) of one weight (out, in, ...).

    DoRA adds ``lora_magnitude`` (out,); PiSSA the constant ``lora_a_start`` and ``lora_b_start``; COBOT a step
    between A and B.
    """

    lora_magnitude: nn.Parameter | None
    lora_a_start: Tensor | None
    lora_b_start: Tensor | None

    def __init__(
        self,
        weight: Tensor,
        options: LoraOptions,
        name: str,
        tensor_options: Mapping[str, Any],
        cobot: CobotPlace | None = None,
    ) -> None:
        super().__init__()
        rank, self.scale = options.rank_and_scale(name)
        self.dropout = options.dropout
        self.init = options.init
        out, inputs, *kernel = weight.shape
        if self.init == "pissa" and rank > min(out, math.prod(weight.shape[1:])):
            raise MethodError(
                f"{name}: RANK {rank} exceeds the weight's {tuple(weight.shape)}; INIT pissa needs a smaller one"
            )
        self.lora_a = nn.Parameter(torch.empty(rank, inputs, *kernel, **tensor_options))
        self.lora_b = nn.Parameter(torch.empty(out, rank, *[1] * len(kernel), **tensor_options))
        self.cobot = cobot
        pissa = self.init == "pissa"
        self.register_buffer("lora_a_start", torch.empty_like(self.lora_a) if pissa else None)
        self.register_buffer("lora_b_start", torch.empty_like(self.lora_b) if pissa else None)
        magnitude = nn.Parameter(torch.empty(out, **tensor_options)) if options.dora else None
        self.register_parameter("lora_magnitude", magnitude)
        self.reset(weight)

    @torch.no_grad()
    def reset(self, weight: Tensor) -> None:
        """Start values; ``weight`` is the base weight, which PiSSA and DoRA start from."""
        if self.init == "pissa":
            self._reset_pissa(weight)
        elif self.init == "xavier":
            nn.init.xavier_normal_(self.lora_a)
            nn.init.xavier_normal_(self.lora_b)
        else:
            if self.init == "gaussian":
                nn.init.normal_(self.lora_a, std=1 / self.lora_a.shape[0])
            else:
                nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
            nn.init.zeros_(self.lora_b)
        if self.lora_magnitude is not None:
            self.lora_magnitude.copy_(_row_norm(weight.to(self.lora_a.dtype)))

    def _reset_pissa(self, weight: Tensor) -> None:
        assert self.lora_a_start is not None and self.lora_b_start is not None
        rank = self.lora_a.shape[0]
        u, s, v = torch.linalg.svd(weight.detach().flatten(1).double(), full_matrices=False)
        root = (s[:rank] / self.scale).sqrt()
        self.lora_a.copy_((root[:, None] * v[:rank]).view_as(self.lora_a))
        self.lora_b.copy_((u[:, :rank] * root).view_as(self.lora_b))
        self.lora_a_start.copy_(self.lora_a)
        self.lora_b_start.copy_(self.lora_b)

    def depends_on_base(self) -> bool:
        """Whether the start values come from the base weight."""
        return self.init == "pissa" or self.lora_magnitude is not None

    def untrained(self) -> bool:
        """Whether the factors still are what :meth:`reset` makes them."""
        if self.lora_a_start is None or self.lora_b_start is None:
            return not bool(self.lora_b.detach().any())
        return torch.equal(self.lora_a, self.lora_a_start) and torch.equal(self.lora_b, self.lora_b_start)

    def follow(self, weight: Tensor) -> None:
        """Start anew from ``weight`` if nothing was trained and the start depends on it."""
        if self.depends_on_base() and self.untrained():
            self.reset(weight)

    def base_changed(self, module: nn.Module) -> None:
        self.follow(module.get_parameter("weight"))

    def delta(self) -> Tensor:
        """s B A as a tensor like the weight, in the factors' dtype."""
        b, a = self.lora_b.flatten(1), self.lora_a.flatten(1)
        product = b @ (self.cobot.matrix() @ a if self.cobot is not None else a)
        if self.lora_a_start is not None and self.lora_b_start is not None:
            product = product - self.lora_b_start.flatten(1) @ self.lora_a_start.flatten(1)
        return self.scale * product.view(self.lora_b.shape[0], *self.lora_a.shape[1:])

    def effective(self, weight: Tensor) -> Tensor:
        """The weight (out, in, ...) that gives the adapted output, in the dtype of ``weight``."""
        wide = weight.to(torch.promote_types(weight.dtype, self.lora_a.dtype))
        changed = wide + self.delta().to(wide.dtype)
        if self.lora_magnitude is not None:
            gain = self.lora_magnitude / _row_norm(changed).detach()
            changed = changed * gain.view(-1, *[1] * (changed.dim() - 1))
        return changed.to(weight.dtype)

    def effective_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"weight": self.effective(weights["weight"])}

    def gain(self, weight: Tensor) -> Tensor:
        """DoRA's m / ||W0 + s B A|| (out,); exactly one at the start."""
        assert self.lora_magnitude is not None
        return self.lora_magnitude / _row_norm((weight.to(self.lora_a.dtype) + self.delta()).detach())

    def branch(self, x: Tensor) -> Tensor:
        """s B A x for x (..., in) -> (..., out), channels last."""
        x = self._input(x)
        y = self._low(x, self.lora_a) @ _rows(self.lora_b)
        if self.lora_a_start is not None and self.lora_b_start is not None:
            y = y - self._low(x, self.lora_a_start) @ _rows(self.lora_b_start)  # exactly zero at the start
        return y * self.scale

    def added(self, x: Tensor, out: Tensor) -> Tensor:
        """``out + s B A x``: one product that adds, without passes over further tensors as wide as the output."""
        if self.lora_a_start is not None or out.dtype != (low := self._low(self._input(x), self.lora_a)).dtype:
            return out + self.branch(x).to(out.dtype)
        rows, thin = out.reshape(-1, out.shape[-1]), low.reshape(-1, low.shape[-1])
        return torch.addmm(rows, thin, _rows(self.lora_b), alpha=self.scale).view(out.shape)

    def _input(self, x: Tensor) -> Tensor:
        return F.dropout(match_dtype(x, self.lora_a), self.dropout, self.training)

    def _low(self, x: Tensor, a: Tensor) -> Tensor:
        low = F.linear(x, a)
        return low if self.cobot is None else self.cobot(low)

    def adapted(self, x: Tensor, out: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The adapted output (..., out) of a linear layer, given its input (..., in) and its own output (..., out)."""
        if self.lora_magnitude is None:
            return self.added(x, out)
        gain = self.gain(weight)
        plain = out if bias is None else out - bias
        return out + ((gain - 1) * plain + gain * self.branch(x)).to(out.dtype)

    def linear_factors(self) -> tuple[Tensor, Tensor] | None:
        """A (r, in) and s B (out, r) where these two say it all for a linear layer; else None.

        They do not with dropout on the branch's input, with DoRA's norm, and with PiSSA, whose start cancels exactly
        only as a difference of branches.
        """
        if (self.dropout and self.training) or self.lora_magnitude is not None or self.lora_a_start is not None:
            return None
        a = self.lora_a if self.cobot is None else self.cobot.matrix() @ self.lora_a
        return a, self.lora_b * self.scale

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The adapted linear layer: (..., in) -> (..., out)."""
        if saves_passes(x, weight, self.lora_a) and (factors := self.linear_factors()) is not None:
            return low_rank_linear(x, weight, bias, *factors)
        return self.adapted(x, F.linear(x, weight, bias), weight, bias)


def match_dtype(x: Tensor, parameter: Tensor) -> Tensor:
    """``x`` in the parameter's dtype; under autocast the operators convert by themselves."""
    return x if torch.is_autocast_enabled(x.device.type) else x.to(parameter.dtype)


def _rows(b: Tensor) -> Tensor:
    """B (out, r) as (r, out) laid out by rows.

    Otherwise the gradient of B is a product for which CPUs need, with r below 16, the time of the whole weight's.
    """
    return b.t().contiguous()


def _row_norm(weight: Tensor) -> Tensor:
    return torch.linalg.vector_norm(weight.flatten(1), dim=1)
