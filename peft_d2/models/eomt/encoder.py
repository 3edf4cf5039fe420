"""A plain ViT of timm whose last blocks are left to the mask head: DINOv2 with registers, DINOv3, and the like."""

from __future__ import annotations

import inspect
import math
from typing import Any

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from torch import Tensor, nn

from peft_d2.models.backbones.stages import note_freeze_at
from peft_d2.models.backbones.timm import pixel_change, timm_of_config
from peft_d2.models.checks import expect
from peft_d2.models.registration import entry


@entry(BACKBONE_REGISTRY, "PD2EoMTEncoder")
class EoMTEncoder(Backbone):
    """The ViT that ``MODEL.TIMM`` names, below ``net.``; it runs its blocks but for the last ``DEC_LAYERS - 1``.

    These are the ``joint_blocks``, in which queries stand before the tokens. What is injected can read off the blocks
    and their parts how tokens lie: ``num_prefix_tokens``, then a grid of H x W.
    """

    def __init__(self, cfg: CfgNode, input_shape: ShapeSpec | None = None) -> None:
        super().__init__()
        node = cfg.MODEL.MASK_FORMER
        self.net = timm_of_config(cfg)
        note_freeze_at(cfg, "PD2EoMTEncoder")
        blocks: Any = getattr(self.net, "blocks", ())
        plain = len(blocks) > 0 and hasattr(self.net, "_pos_embed") and not getattr(self.net, "rope_mixed", False)
        plain = plain and not isinstance(self.net.norm, nn.Identity)
        expect(
            plain, "MODEL.TIMM.NAME", cfg.MODEL.TIMM.NAME, "a plain ViT that ends in a norm, such as DINOv2 or DINOv3"
        )
        masked = "attn_mask" in inspect.signature(type(blocks[0]).forward).parameters
        expect(
            masked, "MODEL.TIMM.NAME", cfg.MODEL.TIMM.NAME, "a ViT with masked attention, as timm 1.0.20 or newer has"
        )
        depth, joint = len(blocks), node.DEC_LAYERS - 1
        expect(
            0 < joint <= depth, "MODEL.MASK_FORMER.DEC_LAYERS", node.DEC_LAYERS, f"2 to {depth + 1}: joint blocks + 1"
        )
        self.first_joint = depth - joint
        for number, block in enumerate(blocks):
            before = node.NUM_OBJECT_QUERIES if number >= self.first_joint else 0
            for module in (block, block.attn, block.mlp):  # timm's rotated attention reads it, and what is injected
                module.num_prefix_tokens = self.net.num_prefix_tokens + before
        scale, shift = pixel_change(self.net, cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD, cfg.INPUT.FORMAT == "BGR")
        self.register_buffer("pixel_scale", scale, persistent=False)
        self.register_buffer("pixel_shift", shift, persistent=False)
        self._flip = cfg.INPUT.FORMAT == "BGR" and len(cfg.MODEL.PIXEL_MEAN) == 3
        self._out_features = ["tokens"]
        self._out_feature_channels = {"tokens": self.net.embed_dim}
        self._out_feature_strides = {"tokens": max(self.net.patch_embed.patch_size)}

    @property
    def size_divisibility(self) -> int:
        return self._out_feature_strides["tokens"]

    def forward(self, x: Tensor) -> dict[str, Any]:
        """Images (N, C, H, W), normalised by the config, sides multiples of the patch -> what the joint blocks take.

        ``tokens`` (N, P + H' W', dim), those before the patches being the class and the registers; ``grid`` (H', W').
        """
        tokens, rope = self.embed(x)
        return self._before_joint(tokens, x, rope, 0)

    @property
    def steps(self) -> list[str]:
        """Prefixes of the names of what runs one after the other, the joint blocks included."""
        return [f"net.blocks.{i}." for i in range(len(self.net.blocks))] + ["net.norm."]

    def first(self, x: Tensor, count: int) -> Tensor:
        """Tokens of images after the first ``count`` of the ``steps``, but after none of the joint blocks."""
        tokens, rope = self.embed(x)
        for block in self.net.blocks[: min(count, self.first_joint)]:
            tokens = self.run(block, tokens, rope)
        return tokens

    def rest(self, tokens: Tensor, x: Tensor, count: int) -> dict[str, Any]:
        """As :meth:`forward` for the images ``x``, of what :meth:`first` makes of them."""
        rope = getattr(self.net, "rope", None)
        placed = None if rope is None else rope.get_embed(shape=list(self._lay_out(x)))
        return self._before_joint(tokens, x, placed, count)

    def _before_joint(self, tokens: Tensor, x: Tensor, rope: Tensor | None, start: int) -> dict[str, Any]:
        for block in self.net.blocks[start : self.first_joint]:
            tokens = self.run(block, tokens, rope)
        return {"tokens": tokens, "grid": self._lay_out(x), "rope": rope}

    def _lay_out(self, x: Tensor) -> tuple[int, int]:
        """The patches' grid, which blocks and their parts are told."""
        patch = self.net.patch_embed.patch_size
        grid = (x.shape[-2] // patch[0], x.shape[-1] // patch[1])
        for block in self.net.blocks:
            for module in (block, block.attn, block.mlp):
                module.H, module.W = grid
        return grid

    def embed(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Tokens as the first block takes them, and what rotates queries and keys, if anything."""
        self._lay_out(x)
        x = (x.flip(1) if self._flip else x) * self.pixel_scale + self.pixel_shift
        placed = self.net._pos_embed(self.net.patch_embed(x))
        tokens, rope = placed if isinstance(placed, tuple) else (placed, None)
        return self.net.norm_pre(tokens), rope

    def fit_positions(self, state: dict[str, Tensor], name: str = "backbone.net.pos_embed") -> None:
        """Interpolate positions of another square grid in a model's ``state`` to this one's, in place."""
        net, found = self.net, state.get(name)
        wanted = getattr(net, "pos_embed", None)
        if found is None or wanted is None or found.shape[1] == wanted.shape[1]:
            return
        from timm.layers import resample_abs_pos_embed

        before = 0 if net.no_embed_class else net.num_prefix_tokens
        if math.isqrt(found.shape[1] - before) ** 2 == found.shape[1] - before:  # else the shapes will be refused
            state[name] = resample_abs_pos_embed(found, list(net.patch_embed.grid_size), num_prefix_tokens=before)

    @staticmethod
    def run(block: nn.Module, tokens: Tensor, rope: Tensor | None, mask: Tensor | None = None) -> Tensor:
        """One block; ``mask`` (N, 1, T, T) is True where a token attends."""
        return block(tokens, attn_mask=mask) if rope is None else block(tokens, rope=rope, attn_mask=mask)

    @property
    def joint_blocks(self) -> Any:
        """The last blocks, which queries and patches pass together."""
        return self.net.blocks[self.first_joint :]

    def normed(self, tokens: Tensor) -> Tensor:
        """Tokens (N, T, dim) after the encoder's last norm."""
        return self.net.norm(tokens)
