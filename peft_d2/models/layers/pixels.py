"""Images as the models take them: as many channels as ``MODEL.PIXEL_MEAN``, normalised."""

from __future__ import annotations

from torch import Tensor

from peft_d2.data.images import DatasetError


def normalised(image: Tensor, mean: Tensor, std: Tensor, name: str) -> Tensor:
    """``image`` (C, H, W) minus ``mean`` (C, 1, 1), divided by ``std``, on their device.

    Raises:
        DatasetError: the image ``name`` has other channels than these, which broadcasting would pass over in silence.
    """
    if image.dim() != 3 or len(image) != len(mean):
        raise DatasetError(
            f"{name}: the image is {tuple(image.shape)}, but the model takes {len(mean)} "
            "channels (C, H, W): as many as MODEL.PIXEL_MEAN and PIXEL_STD have. Set these and INPUT.FORMAT to fit"
        )
    return (image.to(mean.device) - mean) / std
