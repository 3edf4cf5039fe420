"""LoRA on nn.Linear, on some of q, k, v of a fused nn.Linear or of an nn.MultiheadAttention, and on nn.Embedding.

Hu et al. 2022, arXiv 2106.09685, equation 3: ``h = W0 x + s B A x``. Two forms compute it: a thin branch beside the
layer, and, for many rows on a CPU, :func:`low_rank_linear`, which uses the changed weight but has the branch's thin
gradients. torch's attention reads its weights instead of calling modules, so the whole attention is adapted: it
computes with ``W0 + s B A``, one weight matrix at a time, and never writes to ``W0``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from ..adapted import AdapterLayer, first_input
from .factors import LowRank

_WEIGHTS = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")  # of an nn.MultiheadAttention


def saves_passes(x: Tensor, weight: Tensor, a: Tensor) -> bool:
    """Whether :func:`low_rank_linear` may be used on ``x`` (..., in) and is faster than the branch.

    It passes over the weight (out, in) where the branch passes over ``x`` and the output: on CPUs it wins from four
    times out in / (out + in) rows on. Weights below float32, autocast's included, would swallow small changes.
    Compilers fuse the branch's passes, and would tie a graph to the number of rows; a traced graph cannot hold it.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return False
    if getattr(forward_ad, "_current_level", -1) >= 0:  # derivatives in forward mode, which it does not have
        return False
    exact = x.dtype == weight.dtype == a.dtype and x.dtype in (torch.float32, torch.float64)
    out, inputs = weight.shape
    many = x.numel() * (out + inputs) > 4 * inputs * weight.numel()
    return exact and many and not torch.is_autocast_enabled("cpu")


class _LowRankLinear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, low: Tensor | None) -> Tensor:
        out = F.linear(x, torch.addmm(weight, b, a), bias)
        # Of more than two dimensions it is a view, which nothing may change in place once it has left here.
        return torch.ops.aten._unsafe_view(out, out.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        x, weight, _, a, b, low = inputs
        wanted = ctx.needs_input_grad
        ctx.save_for_backward(x if wanted[1] or wanted[3] or low is None else None, weight, a, b, low)

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b, low = ctx.saved_tensors
        for_x, for_weight, for_bias, for_a, for_b, _ = ctx.needs_input_grad
        rows = low if x is None else x.reshape(-1, x.shape[-1])
        low = F.linear(rows, a) if low is None and for_b else low
        grad = grad_output.reshape(-1, grad_output.shape[-1])
        # CPUs take the time of a whole weight for thin products in other memory orders than these.
        return (
            (grad @ torch.addmm(weight, b, a)).view(*grad_output.shape[:-1], weight.shape[1]) if for_x else None,
            grad.t() @ rows if for_weight else None,
            grad.sum(0) if for_bias else None,
            F.linear(grad, b.t().contiguous()).t() @ rows if for_a else None,
            (low.reshape(-1, len(a)).t() @ grad).t() if for_b else None,
            None,
        )


def low_rank_linear(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """``x (W + B A)^T + bias``: (..., in) -> (..., out), with the scale within B (out, r) or A (r, in).

    One product with the changed weight, which is formed anew for the backward pass instead of being kept; for A and B
    the branch's own gradients, so that the gradient of the whole weight is never formed. With A frozen, ``x`` is not
    kept: its products with A are all that the gradient of B needs.
    """
    low = F.linear(x, a) if torch.is_grad_enabled() and not a.requires_grad else None
    return _LowRankLinear.apply(x, weight, bias, a, b, low)


class _OnLinear(AdapterLayer):
    """What the factors of a whole nn.Linear and those of some of its rows share: the choice between the two forms."""

    def adapted_forward(self, module: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        return self(first_input(args, kwargs), module.weight, module.bias)

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The adapted layer: (..., in) -> (..., out)."""
        x = _rows_at_once(x)
        if saves_passes(x, weight, next(self.parameters())) and (pair := self.pair()) is not None:
            return low_rank_linear(x, weight, bias, *pair)
        return self.adapted(x, F.linear(x, weight, bias), weight, bias)

    def pair(self) -> tuple[Tensor, Tensor] | None:
        """A (r, in) and s B (out, r) where these two say it all; else None."""
        raise NotImplementedError

    def adapted(self, x: Tensor, out: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The adapted output (..., out), given the layer's input (..., in) and its own output."""
        raise NotImplementedError


class LinearLora(_OnLinear, LowRank):
    """Factors of an nn.Linear."""

    def pair(self) -> tuple[Tensor, Tensor] | None:
        """Not with dropout on the branch's input, DoRA's norm, or PiSSA, whose start cancels only between branches."""
        if (self.dropout and self.training) or self.lora_magnitude is not None or self.lora_a_start is not None:
            return None
        return (self.lora_a if self.cobot is None else self.cobot.matrix() @ self.lora_a), self.lora_b * self.scale

    def adapted(self, x: Tensor, out: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Where nothing else is to be done, one product adds, without passes over more tensors as wide as the output.

        See :meth:`_OnLinear.adapted`.
        """
        if self.lora_magnitude is None and self.lora_a_start is None:
            low = self._low(self.input(x), self.lora_a)
            if out.dtype == low.dtype:
                rows, thin = out.reshape(-1, out.shape[-1]), low.reshape(-1, low.shape[-1])
                return torch.addmm(rows, thin, _rows(self.lora_b)).view(out.shape)
        return self.rescaled(out, self.branch(x), weight, bias)

    def product(self, x: Tensor, a: Tensor, b: Tensor, *context: Any) -> Tensor:
        return self._low(x, a) @ _rows(b)

    def _low(self, x: Tensor, a: Tensor) -> Tensor:
        """s A x for x (..., in) -> (..., r), through COBOT where it is."""
        low = F.linear(x, a)
        return (low if self.cobot is None else self.cobot(low)) * self.scale


def _rows_at_once(x: Tensor) -> Tensor:
    """``x`` (..., in), copied where it is more matrices than a matrix has rows, as a transposed map (pixels, N, in) is:
    torch takes these one by one where nothing requires a gradient, and copies the weight for each. A graph is not tied
    to that number.
    """
    if x.dim() < 3 or torch.compiler.is_compiling() or torch.jit.is_tracing():
        return x
    return x.contiguous() if x.numel() > x.shape[-2] ** 2 * x.shape[-1] else x


def _rows(b: Tensor) -> Tensor:
    """B (out, r) as (r, out) laid out by rows: else its gradient takes CPUs, for r < 16, the whole weight's time."""
    return b.t().contiguous()


class PackedLora(_OnLinear, nn.ModuleDict):
    """Factors of some of q, k, v, each under its letter, for one fused weight (3 d, in) with rows q, then k, then v."""

    changes_weights = True

    def fuse(self, weight: Tensor) -> Tensor:
        """The effective fused weight (3 d, in)."""
        rows = zip("qkv", weight.chunk(3), strict=True)
        return torch.cat([self[p].effective(block) if p in self else block for p, block in rows])  # type: ignore[operator]

    def effective_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"weight": self.fuse(weights["weight"])}

    def pair(self) -> tuple[Tensor, Tensor] | None:
        """A (n r, in) and s B (3 d, n r) of the n adapted letters as one update of the fused weight."""
        down, up = [], []
        for letter, factors in self.items():
            if (pair := factors.pair()) is None:  # type: ignore[operator]
                return None
            i = "qkv".index(letter)
            down.append(pair[0])
            up.append(F.pad(pair[1], (0, 0, i * len(pair[1]), (2 - i) * len(pair[1]))))
        return torch.cat(down), torch.cat(up, dim=1)

    def adapted(self, x: Tensor, out: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        biases = (None, None, None) if bias is None else bias.chunk(3)
        blocks = dict(zip("qkv", out.chunk(3, dim=-1), strict=True))
        for letter, rows, shift in zip("qkv", weight.chunk(3), biases, strict=True):
            if letter in self:
                blocks[letter] = self[letter].adapted(x, blocks[letter], rows, shift)  # type: ignore[operator]
        return torch.cat(list(blocks.values()), dim=-1)


def attention_weight(module: nn.MultiheadAttention, part: str) -> Tensor:
    """The weight (out, in) of one of q, k, v, out, with or without kdim / vdim."""
    if part == "out":
        return module.out_proj.weight
    if module.in_proj_weight is None:
        return getattr(module, f"{part}_proj_weight")
    return module.in_proj_weight.chunk(3)["qkv".index(part)]


class AttentionLora(PackedLora):
    """Factors of some of q, k, v, out of one nn.MultiheadAttention."""

    def effective_weights(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        changed = {}
        if "in_proj_weight" in weights and any(letter in self for letter in "qkv"):
            changed["in_proj_weight"] = self.fuse(weights["in_proj_weight"])
        for letter, factors in self.items():
            name = "out_proj.weight" if letter == "out" else f"{letter}_proj_weight"
            if name in weights:
                changed[name] = factors.effective(weights[name])  # type: ignore[operator]
        return changed

    def adapted_forward(  # type: ignore[override]
        self,
        module: nn.MultiheadAttention,
        forward: Callable[..., Any],
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Inputs and outputs as torch's."""
        own = {name: getattr(module, name) for name in _WEIGHTS} | {"out_proj.weight": module.out_proj.weight}
        weights = own | self.effective_weights({name: value for name, value in own.items() if value is not None})
        in_proj, out_proj = weights.pop("in_proj_weight"), weights.pop("out_proj.weight")
        swaps = module.batch_first and query.dim() == 3
        if swaps:  # the same tensor given twice stays one: torch then projects it in one product
            swapped = {id(x): x.transpose(0, 1) for x in (query, key, value)}
            query, key, value = (swapped[id(x)] for x in (query, key, value))
        sizes = (module.embed_dim, module.num_heads)
        biases = (module.in_proj_bias, module.bias_k, module.bias_v, module.add_zero_attn, module.dropout)
        out, attention = F.multi_head_attention_forward(
            *(query, key, value, *sizes, in_proj, *biases, out_proj, module.out_proj.bias),
            training=module.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights,
            attn_mask=attn_mask,
            use_separate_proj_weight=in_proj is None,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
            **weights,
        )
        return (out.transpose(0, 1) if swaps else out), attention


class EmbeddingLora(LowRank):
    """Factors ``lora_embedding_a`` (r, words) and ``lora_embedding_b`` (width, r) of a weight (words, width).

    As in loralib, A starts at zero and B as the embedding's own weight does.
    """

    names = ("lora_embedding_a", "lora_embedding_b")
    lora_a = property(lambda self: self.lora_embedding_a)
    lora_b = property(lambda self: self.lora_embedding_b)

    def __init__(self, module: nn.Embedding, *args: Any) -> None:
        super().__init__(module.weight, *args)
        self.padding_idx = module.padding_idx

    def ordered(self, weight: Tensor) -> Tensor:
        return weight.t()

    as_stored = ordered

    def _start_at_zero(self, a: Tensor, b: Tensor) -> None:
        nn.init.zeros_(a)
        nn.init.normal_(b)

    def input(self, x: Tensor) -> Tensor:
        return x

    def product(self, x: Tensor, a: Tensor, b: Tensor, *context: Any) -> Tensor:
        """s B A of indices (...): (..., width); the column of A for ``padding_idx`` gets no gradient."""
        return F.embedding(x, a.t(), self.padding_idx) * self.scale @ b.t()

    def adapted_forward(self, module: Any, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Tensor:
        return self(first_input(args, kwargs), forward(*args, **kwargs), module.weight)

    def forward(self, x: Tensor, out: Tensor, weight: Tensor) -> Tensor:
        """The adapted vectors (..., width) for indices (...), given the base's own."""
        return self.rescaled(out, self.branch(x), weight, None)
