"""Embeddings of a frozen image encoder, computed once per image and kept on disk.

Where only the mask decoder learns, the encoder gives the same embedding for the same pixels in every epoch. The key is
made of the pixels after all transforms, the encoder's weights, its settings and the precision, so nothing stale is ever
read. Files are written atomically, so several processes and runs can share a folder.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_d2.engine.errors import ConfigError
from peft_d2.models.sam.model import SegmentAnything
from peft_d2.storage import atomic
from peft_d2.storage.adapter_file import dump_tensors, load_tensors

logger = logging.getLogger(__name__)


def attach(cfg: Any, model: nn.Module) -> None:
    """Let ``model`` keep its embeddings in ``MODEL.SAM.FEATURE_CACHE``; nothing where that is empty."""
    folder = cfg.MODEL.SAM.FEATURE_CACHE
    if not folder:
        return
    if not isinstance(model, SegmentAnything):
        raise ConfigError("MODEL.SAM.FEATURE_CACHE needs MODEL.META_ARCHITECTURE PD2SegmentAnything; leave it empty.")
    trained = [name for name, parameter in model.image_encoder.named_parameters() if parameter.requires_grad]
    if trained:
        raise ConfigError(
            f"MODEL.SAM.FEATURE_CACHE keeps what a frozen image encoder gives, but {len(trained)} of its parameters "
            f"are trained (image_encoder.{trained[0]}, ...). Leave it empty, or train the mask decoder alone "
            "(configs/peft/sam/decoder.yaml)."
        )
    model.embed = FeatureCache(folder, model.image_encoder, cfg.MODEL.SAM.dump())
    logger.info("Embeddings of images are kept in %s.", folder)


class FeatureCache:
    """Calls an encoder, (N, 3, H, W) -> (N, C, G, G), only for images that are not in ``folder`` yet.

    ``settings`` are whatever decides the result besides the encoder's tensors.
    """

    def __init__(self, folder: str | Path, encoder: nn.Module, settings: str) -> None:
        self.folder, self.encoder, self.settings = Path(folder), encoder, settings
        self._hashed: tuple[int, str] = (-1, "")

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        paths = [self.folder / key[:2] / f"{key}.safetensors" for key in self._keys(images)]
        embeddings = [_read(path) for path in paths]
        missing = [i for i, embedding in enumerate(embeddings) if embedding is None]
        if missing:
            for i, embedding in zip(missing, self.encoder(images[missing]), strict=True):
                embeddings[i] = embedding.cpu()
                atomic.write_bytes(paths[i], dump_tensors({"embedding": embedding.cpu().contiguous()}))
        return torch.stack([embedding.to(images.device) for embedding in embeddings if embedding is not None])

    def _keys(self, images: Tensor) -> list[str]:
        device = images.device.type
        precision = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "as is"
        start = f"{self._weights()} {precision} {images.dtype} {tuple(images.shape[1:])}".encode()
        return [hashlib.sha256(start + image.cpu().contiguous().numpy().tobytes()).hexdigest() for image in images]

    def _weights(self) -> str:
        """Hash of settings and weights, anew after each change of a weight."""
        state = self.encoder.state_dict(keep_vars=True)
        changes = sum(tensor._version for tensor in state.values())
        if self._hashed[0] != changes:
            digest = hashlib.sha256(self.settings.encode())
            for name, tensor in state.items():
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
            self._hashed = (changes, digest.hexdigest())
        return self._hashed[1]


def _read(path: Path) -> Tensor | None:
    """The embedding of a file; None where there is none, or a damaged one, which is then written anew."""
    if not path.is_file():
        return None
    try:
        return load_tensors(Path(path).read_bytes())[0]["embedding"]
    except (ValueError, KeyError) as error:
        logger.warning("%s cannot be read (%s): it is computed again.", path, error)
        return None
