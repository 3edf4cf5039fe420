"""A cache on disk of the features that the frozen first blocks of an encoder compute, once per image.

Where the first blocks of an encoder are frozen, they give the same features for the same pixels in every epoch: the
first block that is trained reads them from a file. The file's name is a hash of the pixels after all transforms, the
tensors of these blocks, the model's settings and the precision, so nothing stale is ever read. Files are written
atomically, so several processes and runs can share a folder.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peft_d2.engine.errors import ConfigError
from peft_d2.peft.adapted import STORE, Adapted
from peft_d2.storage import disk
from peft_d2.storage.disk import dump_tensors, load_tensors

logger = logging.getLogger(__name__)
_NO_FEATURES = ("PEFT", "WEIGHTS", "DEVICE", "FEATURE_CACHE", "META_ARCHITECTURE", "MASK_FORMER", "SEM_SEG_HEAD")
KEYS = """
MODEL:
  # A folder that keeps the features of an encoder up to the first block that learns, so that each image and view is
  # encoded once; "" keeps none. Random crops and scales are views of their own, flips two.
  FEATURE_CACHE: ""
"""


def attach(cfg: Any, model: nn.Module) -> None:
    """Make the encoder of ``model`` keep its features in the folder ``MODEL.FEATURE_CACHE``; if that is "", do nothing.

    Raises:
        ConfigError: the model has no encoder, or it learns from its beginning on.
    """
    key = "MODEL.FEATURE_CACHE" if cfg.MODEL.FEATURE_CACHE else "MODEL.SAM.FEATURE_CACHE"
    folder = cfg.MODEL.FEATURE_CACHE or cfg.MODEL.SAM.FEATURE_CACHE
    if not folder:
        return
    name, encoder = _encoder(model)
    if encoder is None:
        raise ConfigError(f"{key} needs a model with a backbone or an image_encoder; leave it empty.")
    steps = list(getattr(encoder, "steps", ()))
    trained = [n for n, parameter in encoder.named_parameters() if parameter.requires_grad]
    count = min([_step(n, steps) for n in trained], default=len(steps))
    if trained and count <= 0:
        raise ConfigError(
            f"{key} keeps what a frozen encoder gives, but {len(trained)} of its parameters are trained "
            f"({name}.{trained[0]}, ...). Leave it empty, or train what comes later: a head, or the last blocks "
            "(configs/peft/sam/decoder.yaml, configs/peft/eomt/head.yaml, configs/peft/eomt/last_blocks.yaml)."
        )
    settings = {k: v for k, v in cfg.MODEL.items() if k not in _NO_FEATURES}
    cache = FeatureCache(folder, encoder, f"{type(encoder).__name__} {cfg.INPUT.FORMAT} {settings}", count)
    encoder.forward = cache  # the one call of Detectron2's models, ours and others', that can be taken over
    kept = f"before {name}.{steps[count]}" if count < len(steps) else f"of {name}"
    logger.info("Features %s are kept in %s.", kept.rstrip("."), folder)


def _encoder(model: Any) -> tuple[str, Any]:
    """The part that makes features of images, by its name: the innermost one that knows its steps."""
    name = next((n for n in ("image_encoder", "backbone") if hasattr(model, n)), "")
    encoder = getattr(model, name, None) if name else None
    for inner in ("bottom_up", "net"):
        child = getattr(encoder, inner, None)
        if child is not None and (inner == "bottom_up" or hasattr(child, "steps")):
            name, encoder = f"{name}.{inner}", child
    return name, encoder


def _step(name: str, steps: Sequence[str]) -> int:
    """The index of the step that the tensor ``name`` belongs to; -1 if it comes before all steps."""
    return next((i for i, step in enumerate(steps) if name.startswith(step)), -1)


class FeatureCache:
    """Replaces an encoder's forward pass; runs its first ``count`` steps only for images that ``folder`` lacks.

    An encoder that can be split has ``steps``, the prefixes of its parts' names in the order in which they run,
    ``first(images, count)``, which runs the first ``count`` of them, and ``rest(features, images, count)``. Other
    encoders are cached as a whole. ``settings`` is whatever decides the result besides the encoder's tensors.
    """

    def __init__(self, folder: str | Path, encoder: nn.Module, settings: str, count: int = 0) -> None:
        self.folder, self.encoder, self.settings, self.count = Path(folder), encoder, settings, count
        self._steps: list[str] = list(getattr(encoder, "steps", ()))
        self._run: Any = getattr(encoder, "first", None) or type(encoder).forward.__get__(encoder)
        self._hashed: tuple[Any, str] = (None, "")

    @torch.compiler.disable
    def __call__(self, images: Tensor) -> Any:
        if not self._is_fixed():
            return type(self.encoder).forward(self.encoder, images)
        features = self._first(images)
        if not self._steps:
            return features
        return self.encoder.rest(features, images, self.count)  # type: ignore[operator]

    @torch.no_grad()
    def _first(self, images: Tensor) -> Any:
        paths = [self.folder / key[:2] / f"{key}.safetensors" for key in self._keys(images)]
        kept = [_read(path) for path in paths]
        missing = [i for i, features in enumerate(kept) if features is None]
        if missing:
            with _evaluating(self.encoder):
                found = self._run(images[missing], self.count) if self._steps else self._run(images[missing])
            named = found if isinstance(found, Mapping) else {"embedding": found}
            for row, i in enumerate(missing):
                kept[i] = features = {name: value[row].cpu().contiguous() for name, value in named.items()}
                disk.write_bytes(paths[i], dump_tensors(features))
        rows: list[dict[str, Tensor]] = [features for features in kept if features is not None]
        stacked = {name: torch.stack([row[name] for row in rows]).to(images.device) for name in rows[0]}
        return stacked["embedding"] if stacked.keys() == {"embedding"} else stacked

    def _keys(self, images: Tensor) -> list[str]:
        device = images.device.type
        precision = str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else "as is"
        start = f"{self._weights()} {precision} {images.dtype} {tuple(images.shape[1:])}".encode()
        return [hashlib.sha256(start + _bytes(image)).hexdigest() for image in images]

    def _is_kept(self, name: str) -> bool:
        return not self._steps or _step(name, self._steps) < self.count

    def _is_fixed(self) -> bool:
        """Whether the cached steps cannot change: they have no trainable parameters and no adapters (to switch)."""
        return not any(p.requires_grad and self._is_kept(n) for n, p in self.encoder.named_parameters()) and not any(
            isinstance(m, Adapted) and STORE in m._modules and self._is_kept(f"{n}.")
            for n, m in self.encoder.named_modules()
        )

    def _weights(self) -> str:
        """Hash of the settings and of the cached steps' tensors, computed again when one of these was written."""
        state = {n: t for n, t in self.encoder.state_dict(keep_vars=True).items() if self._is_kept(n)}
        # A change through .data has no version: numbers here and there of each tensor show it.
        some = [t.detach().reshape(-1)[:: max(1, t.numel() // 16)].double() for t in state.values()]
        changes = [(t.data_ptr(), t._version) for t in state.values()], torch.cat(some).tolist() if some else []
        if self._hashed[0] != changes:
            digest = hashlib.sha256(f"{self.settings} {self.count}".encode())
            for name, tensor in state.items():
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
                digest.update(_bytes(tensor))
            self._hashed = (changes, digest.hexdigest())
        return self._hashed[1]


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Within the context ``module`` is in eval mode; afterwards each part has the mode that it had before."""
    training = [part for part in module.modules() if part.training]
    for part in training:
        part.training = False
    try:
        yield
    finally:
        for part in training:
            part.training = True


def _read(path: Path) -> dict[str, Tensor] | None:
    """The features in a file; None if it does not exist or is damaged, so that it is written again."""
    if not path.is_file():
        return None
    try:
        return load_tensors(Path(path).read_bytes())[0] or None
    except (ValueError, KeyError) as error:
        logger.warning("%s cannot be read (%s): it is computed again.", path, error)
        return None
