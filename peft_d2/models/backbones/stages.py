"""Shared by hierarchical backbones: maps named by stage, config, patch embedding, windows, stochastic depth."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import Backbone
from torch import Tensor, nn

from peft_d2.models.checks import expect_some_of
from peft_d2.models.layers.transformer import run_block

_logger = logging.getLogger(__name__)


def drop_path_rates(depths: Sequence[int], last: float) -> list[list[float]]:
    """Stochastic depth of every block by stage, from 0 linearly to ``last`` (Huang et al., ECCV 2016, section 3)."""
    total = sum(depths)
    rates = iter(last * i / max(1, total - 1) for i in range(total))
    return [[next(rates) for _ in range(depth)] for depth in depths]


def init_linear(module: nn.Module) -> None:
    """The usual start of a transformer's linear layers, for ``nn.Module.apply``."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def note_freeze_at(cfg: CfgNode, backbone: str) -> None:
    """Warn that ``backbone`` ignores ``MODEL.BACKBONE.FREEZE_AT``, if this is set."""
    if cfg.MODEL.BACKBONE.FREEZE_AT > 0:
        _logger.info(
            "MODEL.BACKBONE.FREEZE_AT is %d, which %s does not follow (Detectron2's ResNets do): none of its stages is "
            "frozen by it. MODEL.PEFT.TRAIN says what learns.",
            cfg.MODEL.BACKBONE.FREEZE_AT,
            backbone,
        )


def pad_bottom_right(x: Tensor, multiple: int) -> Tensor:
    """Zero-pad maps (N, H, W, C) to multiples of ``multiple``."""
    height, width = x.shape[1:3]
    return F.pad(x, (0, 0, 0, -width % multiple, 0, -height % multiple))


def to_windows(x: Tensor, window: int) -> Tensor:
    """(N, H, W, C) -> (N * windows, window * window, C); an image's windows follow each other row by row."""
    n, height, width, channels = x.shape
    x = x.view(n, height // window, window, width // window, window, channels)
    return x.transpose(2, 3).reshape(-1, window * window, channels)


def from_windows(x: Tensor, window: int, height: int, width: int) -> Tensor:
    """The inverse of :func:`to_windows`."""
    x = x.view(-1, height // window, width // window, window, window, x.shape[-1])
    return x.transpose(2, 3).reshape(-1, height, width, x.shape[-1])


class PatchEmbed(nn.Module):
    """A strided convolution and, if wanted, a LayerNorm over the channels: (N, H, W, in_channels) -> (N, H', W', dim).

    Args:
        kernel, padding: of the convolution; by default it cuts patches side by side.
        norm: "before" or "after" the convolution, or "".
        whole: pad maps to multiples of the stride, at the bottom and on the right.
    """

    def __init__(
        self,
        in_channels: int,
        dim: int,
        stride: int,
        kernel: int | None = None,
        padding: int = 0,
        norm: str = "after",
        whole: bool = True,
    ) -> None:
        super().__init__()
        self.stride, self.norm_first, self.whole = stride, norm == "before", whole
        self.proj = nn.Conv2d(in_channels, dim, kernel or stride, stride, padding)
        self.norm = nn.LayerNorm(in_channels if norm == "before" else dim) if norm else None

    def forward(self, x: Tensor) -> Tensor:
        if self.norm is not None and self.norm_first:
            x = self.norm(x)
        x = pad_bottom_right(x, self.stride) if self.whole else x
        x = self.proj(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x if self.norm is None or self.norm_first else self.norm(x)


class Stage(nn.Module):
    """Blocks at one resolution, (N, H, W, C) -> the same; it holds ``downsample``, but leaves the call to its owner."""

    def __init__(self, blocks: Sequence[nn.Module], downsample: nn.Module | None, use_checkpoint: bool) -> None:
        super().__init__()
        self.use_checkpoint = use_checkpoint
        self.blocks = nn.ModuleList(blocks)
        self.downsample = downsample

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = run_block(block, x, use_checkpoint=self.use_checkpoint)
        return x


class MapBackbone(Backbone):
    """A backbone that gives maps by name, of images whose sides are multiples of the largest stride."""

    def give_out(self, names: Sequence[str], channels: Mapping[str, int], strides: Mapping[str, int]) -> None:
        """Set which maps come out, and their channels and strides."""
        self._out_features = list(names)
        self._out_feature_channels, self._out_feature_strides = dict(channels), dict(strides)

    @property
    def size_divisibility(self) -> int:
        return max(self._out_feature_strides.values())

    def padded(self, x: Tensor) -> Tensor:
        """Images (N, C, H, W) padded with zeros at the bottom and on the right to multiples of the largest stride."""
        height, width = x.shape[-2:]
        return F.pad(x, (0, -width % self.size_divisibility, 0, -height % self.size_divisibility))


class StagedBackbone(MapBackbone):
    """A backbone whose stages give the maps ``res2``, ``res3`` and so on; its keys are in ``config_node``."""

    config_node: str
    _stage_names: list[str]

    def __init__(self, cfg: CfgNode, input_shape: ShapeSpec | None = None) -> None:
        super().__init__()
        note_freeze_at(cfg, type(self).__name__)
        node = functools.reduce(lambda parent, key: parent[key], self.config_node.split("."), cfg)
        self.build(node, len(cfg.MODEL.PIXEL_MEAN))
        self.apply(init_linear)

    def build(self, node: CfgNode, in_channels: int) -> None:
        """Make the layers that the config node describes, for images of ``in_channels``."""
        raise NotImplementedError

    def _add_stages(
        self,
        node: CfgNode,
        dims: Sequence[int],
        block: Callable[[int, int, float], nn.Module],
        downsample: Callable[[int], nn.Module],
    ) -> None:
        """Add ``layers`` of ``block(stage, number, drop path)``, with ``downsample(channels)`` between them."""
        self.layers = nn.ModuleList()
        for i, rates in enumerate(drop_path_rates(node.DEPTHS, node.DROP_PATH_RATE)):
            step = downsample(dims[i]) if i + 1 < len(dims) else None
            self.layers.append(Stage([block(i, *at) for at in enumerate(rates)], step, node.USE_CHECKPOINT))
        self._name_stages(dims, [node.PATCH_SIZE * 2**i for i in range(len(dims))], node.OUT_FEATURES)

    def _name_stages(self, channels: Sequence[int], strides: Sequence[int], out_features: Sequence[str]) -> None:
        """Set what comes out: the maps ``out_features`` of stages with these channels and strides."""
        self._stage_names = [f"res{i + 2}" for i in range(len(channels))]
        expect_some_of(f"{self.config_node}.OUT_FEATURES", out_features, self._stage_names, "the backbone's maps")
        of_stages = (dict(zip(self._stage_names, values, strict=True)) for values in (channels, strides))
        self.give_out(out_features, *of_stages)

    def _run_stages(self, x: Tensor) -> dict[str, Tensor]:
        """The maps, each after its norm, from the input (N, H, W, C) of the first stage."""
        outputs = {}
        stages: Any = self.layers
        for i, (name, stage) in enumerate(zip(self._stage_names, stages, strict=True)):
            x = stage(x)
            if name in self._out_features:
                outputs[name] = self.get_submodule(f"norm{i}")(x).permute(0, 3, 1, 2).contiguous()
            if stage.downsample is not None:
                x = stage.downsample(x)
        return outputs
