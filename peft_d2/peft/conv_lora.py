"""Conv-LoRA: LoRA whose low-rank map goes through a convolution that a gate chooses, each at a scale of its own.

Zhong et al., "Convolution Meets LoRA: Parameter Efficient Finetuning for Segment Anything Model", ICLR 2024, arXiv
2401.17868, section 3.2, as the authors run it: with h = A x, laid out as an image, ``out = W0 x + s B (h + E_i(h))``.
Expert i of M enlarges h by i (bicubic), applies a 3 x 3 convolution and GELU, and shrinks the result again. i is the
expert with the highest logit of the gate, ``mean(h) G``, per image (or window), in training with noise.

The choice has no gradient from the task. What trains the gate is the load's balance, lambda times the squared
coefficient of variation of the expected choices (Shazeer et al., "Outrageously Large Neural Networks", ICLR 2017,
appendix A, whose importance term is constant for one expert). Its gradient is added in the backward pass; the logged
losses do not show it, and a loss scale (fp16) leaves it behind. B is zero at the start: the start is the pretrained
layer. The function of x is not linear, so no weight can hold it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .adapted import AdapterLayer, base_class, first_input
from .lora.factors import match_dtype
from .method import Allowed, Factor, Method, Options, Positive, Probability, one_of
from .outputs import Grid, TokenGrid, never_called, with_others
from .targets import Target

_LETTERS = ("q", "k", "v")
_LEAST_NOISE = 1e-2


@dataclass(frozen=True)
class ConvLoraOptions(Options):
    """``PARTS`` are q, k, v of a fused nn.Linear, each with experts of its own; empty for a layer that is one weight.

    ``EXPERTS`` is M; ``BALANCE`` is lambda; ``ALPHA`` unset means s = 1; ``GRID`` says how tokens (N, L, C) lie in the
    image, see :class:`~peft_d2.peft.outputs.TokenGrid`.
    """

    rank: Positive = 3
    alpha: Factor | None = None
    dropout: Probability = 0.0
    experts: Positive = 8
    balance: Annotated[float, Allowed(lambda value: value >= 0, "0 or more")] = 0.01
    parts: Annotated[list[str], one_of(*_LETTERS)] = field(default_factory=list)
    grid: Grid = "auto"


class AddGradient(torch.autograd.Function):
    """``x`` as it is; the backward pass also goes through ``loss`` (), as if it were added to the model's loss."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.dtype = loss.dtype
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, torch.ones((), dtype=ctx.dtype, device=gradient.device)


class NoisyGate(nn.Module):
    """Chooses one of M experts per map by its mean (r,); both matrices (r, M) are zero at the start."""

    def __init__(self, rank: int, experts: int, made: Mapping[str, Any]) -> None:
        super().__init__()
        self.choice = nn.Parameter(torch.zeros(rank, experts, **made))
        self.noise = nn.Parameter(torch.zeros(rank, experts, **made))

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor | None]:
        """Maps (N, r, H, W) -> indices (N,), and in training the probability that each is chosen (N, M)."""
        mean = h.mean(dim=(2, 3)).to(self.choice.dtype)
        clean = mean @ self.choice
        if not self.training or clean.shape[1] == 1:
            return clean.argmax(1), None
        deviation = F.softplus(mean @ self.noise) + _LEAST_NOISE
        noisy = clean + torch.randn_like(clean) * deviation
        best, second = noisy.topk(2, dim=1).values.split(1, dim=1)
        rival = torch.where(noisy == best, second, best)  # what each must exceed with its noise drawn again
        chances = torch.special.ndtr((clean - rival) / deviation)
        return noisy.argmax(1), chances


def imbalance(chances: Tensor) -> Tensor:
    """Squared coefficient of variation of the expected number of maps per expert, for chances (N, M)."""
    load = chances.float().sum(0)
    return load.var() / (load.mean().square() + 1e-10)


class ConvExperts(nn.Module):
    """s B (h + E_i(h)) with h = A x, for one weight (out, in): (N, H, W, in) -> (N, H, W, out), zero at the start."""

    def __init__(self, weight: Tensor, options: ConvLoraOptions, made: Mapping[str, Any]) -> None:
        super().__init__()
        out, inputs = weight.shape
        rank = options.rank
        self.conv_lora_down = nn.Parameter(torch.empty(rank, inputs, **made))
        self.conv_lora_up = nn.Parameter(torch.zeros(out, rank, **made))
        nn.init.kaiming_uniform_(self.conv_lora_down, a=math.sqrt(5))
        self.gate = NoisyGate(rank, options.experts, made)
        self.experts = nn.ModuleList(nn.Conv2d(rank, rank, 3, padding=1, **made) for _ in range(options.experts))
        for expert in self.experts:
            nn.init.zeros_(expert.get_parameter("bias"))
        self.scale = (options.alpha or rank) / rank
        self.dropout = options.dropout
        self.balance = options.balance

    def forward(self, x: Tensor) -> Tensor:
        """(N, H, W, in) -> (N, H, W, out); each of the N maps goes through the expert that the gate chooses for it."""
        x = F.dropout(match_dtype(x, self.conv_lora_down), self.dropout, self.training)
        h = F.linear(x, self.conv_lora_down).permute(0, 3, 1, 2)
        chosen, chances = self.gate(h)
        mixed = h.clone()
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero()[:, 0]
            if len(rows):
                mixed = mixed.index_add(0, rows, self._at_scale(expert, h[rows], number + 1).to(h.dtype))
        out = F.linear(mixed.permute(0, 2, 3, 1), self.conv_lora_up) * self.scale
        if self.training:  # experts without a map get gradients of zero: processes of a parallel run need the same ones
            out = out + 0.0 * sum(p.sum() for p in self.parameters()).to(out.dtype)  # type: ignore[union-attr]
        if chances is not None and self.balance and torch.is_grad_enabled():
            out = AddGradient.apply(out, self.balance * imbalance(chances))
        return out

    @staticmethod
    def _at_scale(expert: nn.Module, h: Tensor, scale: int) -> Tensor:
        if scale == 1:
            return F.gelu(expert(h))
        large = F.interpolate(h, scale_factor=scale, mode="bicubic", align_corners=False)
        return F.interpolate(F.gelu(expert(large)), size=h.shape[2:], mode="bicubic", align_corners=False)


class ConvLoraLayer(AdapterLayer, nn.ModuleDict):
    """The experts of a layer, ``whole``, or of some of q, k, v, under their letters."""

    def __init__(self, target: Target, options: ConvLoraOptions) -> None:
        weight, made = target.module.get_parameter("weight").flatten(1), target.factory_kwargs()
        rows = dict(zip(_LETTERS, weight.chunk(3), strict=True)) if options.parts else {"whole": weight}
        wanted = options.parts or ["whole"]
        super().__init__({part: ConvExperts(rows[part], options, made) for part in rows if part in wanted})
        self.parts = tuple(rows)
        self.grid = TokenGrid(target, options.grid)
        self.channels_first = isinstance(target.module, nn.Conv2d)

    def adapted_forward(self, module: Any, forward: Any, *args: Any, **kwargs: Any) -> Tensor:
        x, out = first_input(args, kwargs), forward(*args, **kwargs)
        return self(x.movedim(1, -1), out.movedim(1, -1)).movedim(-1, 1) if self.channels_first else self(x, out)

    def forward(self, x: Tensor, out: Tensor) -> Tensor:
        """The adapted output for the layer's input (N, L, in) or (N, H, W, in) and output."""
        others, image = self.grid.split(x)
        blocks = dict(zip(self.parts, out.chunk(len(self.parts), dim=-1), strict=True))
        for part, experts in self.items():
            shape = blocks[part].shape
            zero = None if others is None else out.new_zeros(*others.shape[:2], shape[-1])
            blocks[part] = blocks[part] + with_others(zero, experts(image).to(out.dtype), shape)
        return torch.cat(list(blocks.values()), dim=-1)


class ConvLora(Method):
    """``{NAME: conv_lora, TARGETS: [attn.qkv], PARTS: [q, k, v], RANK: 3, EXPERTS: 8, BALANCE: 0.01, GRID: auto}``."""

    name = "conv_lora"
    options_class = ConvLoraOptions
    layer_class = ConvLoraLayer

    def refusal(self, target: Target) -> str:
        base, module = base_class(target.module), target.module
        is_pointwise = (
            base is nn.Conv2d
            and isinstance(module, nn.Conv2d)
            and (module.kernel_size, module.stride, module.groups) == ((1, 1), (1, 1), 1)
            and module.padding in ((0, 0), "valid", "same")
        )
        if base is not nn.Linear and not is_pointwise:
            return f"{base.__qualname__} is no nn.Linear or 1 x 1 nn.Conv2d (exact type)"
        out, inputs = module.get_parameter("weight").flatten(1).shape
        if self.options.parts and out != 3 * inputs:
            return f"PARTS needs a fused qkv, d -> 3 d; this is {inputs} -> {out}"
        return never_called(target)
