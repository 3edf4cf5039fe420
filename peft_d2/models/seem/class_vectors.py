"""Text vectors of class names: computed once, kept in a small file, and drawn from in training and evaluation."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from peft_d2.models.seem.class_prompts import BACKGROUND, TEMPLATES, Tokenizer, prompts
from peft_d2.models.seem.text_encoder import TextEncoder
from peft_d2.storage import CheckpointError, atomic, strict_json, tensor_file
from peft_d2.storage.base_fingerprint import fingerprint

_TENSOR = "vectors"
_RECORD = "class_vectors"
_FORMAT = 1
_TEXTS_PER_CALL = 512


class ClassVectorsError(CheckpointError):
    """A file of class vectors that cannot be used, or a class that it lacks; names both and says what to do."""


@dataclasses.dataclass(frozen=True)
class ClassVectors:
    """Unit vectors of K classes and of the background, per template.

    Attributes:
        names: the K classes, in the order of their ids.
        vectors: (T, K + 1, C) float32 unit rows; the last class is the word "background".
        templates: the T sentences, with ``{}`` for the name.
        encoder: fingerprint of the text encoder's weights (:func:`encoder_fingerprint`); "" where it is not known.
    """

    names: tuple[str, ...]
    vectors: Tensor
    templates: tuple[str, ...] = TEMPLATES
    encoder: str = ""

    def __post_init__(self) -> None:
        expected = (len(self.templates), len(self.names) + 1)
        if self.vectors.dim() != 3 or tuple(self.vectors.shape[:2]) != expected:
            raise ClassVectorsError(
                f"class vectors are {tuple(self.vectors.shape)}; {len(self.names)} classes and the background in "
                f"{len(self.templates)} templates need {expected} and the channels"
            )
        if twice := sorted({name for name in self.names if self.names.count(name) > 1}):
            raise ClassVectorsError(f"classes are named twice: {', '.join(twice)}; give each a name of its own")

    def evaluation(self) -> Tensor:
        """(K + 1, C): the mean over the templates, renormalised."""
        return F.normalize(self.vectors.mean(dim=0), dim=-1)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """(K + 1, C): every class in a template of its own, drawn anew by each call.

        ``generator`` is one of the CPU, whatever device the vectors are on.
        """
        templates, classes = self.vectors.shape[:2]
        drawn = torch.randint(templates, (classes,), generator=generator)
        return self.vectors[drawn.to(self.vectors.device), torch.arange(classes, device=self.vectors.device)]

    def select(self, names: Sequence[str]) -> ClassVectors:
        """The vectors of these classes alone, in this order, and of the background.

        Raises:
            ClassVectorsError: some of the classes are not there.
        """
        if missing := [name for name in names if name not in self.names]:
            there = ", ".join(self.names[:10]) + (", ..." if len(self.names) > 10 else "")
            raise ClassVectorsError(
                f"there are no vectors of the classes {', '.join(map(repr, missing))}, only of {there}: "
                "write a file with tools/encode_classes.py that has them"
            )
        rows = [self.names.index(name) for name in names] + [len(self.names)]
        return dataclasses.replace(self, names=tuple(names), vectors=self.vectors[:, rows])

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file that :meth:`read` reads, in one step.

        Raises:
            StorageError: the disk is full; an old file stays.
        """
        vectors = self.vectors.detach().float().cpu().contiguous()
        record = {
            "format": _FORMAT,
            "names": list(self.names),
            "templates": list(self.templates),
            "encoder": self.encoder,
            "sha256": _sha256(vectors),
        }
        data = tensor_file.dumps({_TENSOR: vectors}, {_RECORD: strict_json.dumps(record).decode("ascii")})
        atomic.write_bytes(path, data)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> ClassVectors:
        """The vectors in a file of :meth:`write`.

        Raises:
            ClassVectorsError: there is no such file, or it is damaged or something else.
        """
        try:
            return _checked(*tensor_file.read(path))
        except OSError as error:
            reason = error.strerror or str(error)
        except ValueError as error:
            reason = str(error)
        raise ClassVectorsError(f"{os.fspath(path)}: {reason}; write it (again) with tools/encode_classes.py") from None


@torch.no_grad()
def encode_classes(
    encoder: TextEncoder, tokenizer: Tokenizer, names: Sequence[str], templates: Sequence[str] = TEMPLATES
) -> ClassVectors:
    """Run the text encoder once for every class, the background and template.

    Raises:
        ClassVectorsError: no class, one named twice, or a tokenizer of another vocabulary than the encoder's.
    """
    if not names or not all(name.strip() for name in names):
        raise ClassVectorsError("there is no class to encode, or one without a name")
    texts = [text for name in (*names, BACKGROUND) for text in prompts(name, templates)]
    chunks = []
    for start in range(0, len(texts), _TEXTS_PER_CALL):
        ids = tokenizer(texts[start : start + _TEXTS_PER_CALL])
        if ids.max() >= encoder.vocabulary or ids.shape[1] > encoder.context:
            raise ClassVectorsError(
                f"the tokenizer gives up to {ids.shape[1]} tokens with ids up to {int(ids.max())}; the text encoder "
                f"takes {encoder.context} tokens with ids below {encoder.vocabulary}: they do not belong together"
            )
        chunks.append(encoder(ids.to(encoder.lang_proj.device)).float().cpu())
    vectors = torch.cat(chunks).unflatten(0, (len(names) + 1, len(templates))).transpose(0, 1).contiguous()
    return ClassVectors(tuple(names), vectors, tuple(templates), encoder_fingerprint(encoder))


def encoder_fingerprint(encoder: TextEncoder) -> str:
    """sha256 over the weights that the vectors depend on."""
    return fingerprint({name: value for name, value in encoder.state_dict().items() if name != "logit_scale"}).weights


def _checked(tensors: dict[str, Tensor], metadata: dict[str, str]) -> ClassVectors:
    if _RECORD not in metadata or set(tensors) != {_TENSOR}:
        raise ValueError("it holds no class vectors")
    record: dict[str, Any] = strict_json.loads(metadata[_RECORD].encode())
    if record.get("format") != _FORMAT:
        raise ValueError(f"it has format {record.get('format')!r}, and this version reads {_FORMAT}")
    vectors = tensors[_TENSOR]
    if vectors.dtype != torch.float32 or not vectors.isfinite().all() or _sha256(vectors) != record.get("sha256"):
        raise ValueError("its vectors are not those that were written")
    lists = [record.get("names"), record.get("templates")]
    if not all(isinstance(words, list) and all(isinstance(word, str) for word in words) for words in lists):
        raise ValueError("its names or templates are not lists of words")
    return ClassVectors(tuple(record["names"]), vectors, tuple(record["templates"]), str(record.get("encoder", "")))


def _sha256(vectors: Tensor) -> str:
    return hashlib.sha256(vectors.contiguous().numpy().tobytes()).hexdigest()
