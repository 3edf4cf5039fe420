"""Images as the models take them: as many channels as ``MODEL.PIXEL_MEAN`` has, normalised."""

from __future__ import annotations

from typing import Any

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from peft_d2.data.images import DatasetError
from peft_d2.models.checks import expect


class PixelModel(nn.Module):
    """A model that normalises its images by ``MODEL.PIXEL_MEAN`` and ``PIXEL_STD``.

    Raises:
        ModelConfigError: these are not of as many channels, or something is to be divided by nothing.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, cfg: CfgNode) -> None:
        super().__init__()
        mean, std = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
        one_each = f"a list as long as PIXEL_STD {std}, one for each channel"
        expect(len(mean) == len(std), "MODEL.PIXEL_MEAN", mean, one_each)
        expect(all(value > 0 for value in std), "MODEL.PIXEL_STD", std, "above 0 in each channel")
        self.register_buffer("pixel_mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the model is and inputs are taken to."""
        return self.pixel_mean.device

    def normalised(self, image: Tensor, name: Any = "an image") -> Tensor:
        """``image`` (C, H, W), called ``name`` in messages, on the model's device.

        Raises:
            DatasetError: it has other channels than the model takes, which broadcasting would pass over in silence.
        """
        if image.dim() != 3 or len(image) != len(self.pixel_mean):
            raise DatasetError(
                f"{name}: the image is {tuple(image.shape)}, but the model takes {len(self.pixel_mean)} channels "
                "(C, H, W): as many as MODEL.PIXEL_MEAN and PIXEL_STD have. Set these and INPUT.FORMAT to fit"
            )
        return (image.to(self.device) - self.pixel_mean) / self.pixel_std
