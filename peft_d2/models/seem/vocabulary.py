"""The classes that queries are compared with: their names, and the names' text vectors."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from torch import Tensor, nn

from peft_d2.models.seem.text_encoder import (
    BACKGROUND,
    CLIP_TOKENIZER,
    TEMPLATES,
    TextEncoder,
    Tokenizer,
    load_tokenizer,
    prompts,
)
from peft_d2.peft.errors import shortened
from peft_d2.storage import CheckpointError, disk
from peft_d2.storage.disk import dump_json, dump_tensors, fingerprint, load_json, load_tensors

_TENSOR, _RECORD, _FORMAT = "vectors", "class_vectors", 1
_TEXTS_PER_CALL = 512
_REMEDY = "name a file of class vectors in MODEL.SEEM.CLASS_VECTORS"
_logger = logging.getLogger(__name__)


class ClassVectorsError(CheckpointError):
    """A file of class vectors cannot be used, or lacks a class; the message names both and says what to do."""


@dataclasses.dataclass(frozen=True)
class ClassVectors:
    """Unit vectors (T, K + 1, C) of K classes and, last, of the word "background", in T templates, in float32.

    ``encoder`` is the sha256 of the text encoder's weights; "" where it is not known.
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
        """(K + 1, C): every class in a template of its own, drawn anew by each call with a generator of the CPU."""
        templates, classes = self.vectors.shape[:2]
        drawn = torch.randint(templates, (classes,), generator=generator)
        return self.vectors[drawn.to(self.vectors.device), torch.arange(classes, device=self.vectors.device)]

    def select(self, names: Sequence[str]) -> ClassVectors:
        """The vectors of ``names``, in this order, and of the background."""
        if missing := [name for name in names if name not in self.names]:
            raise ClassVectorsError(
                f"there are no vectors of the classes {', '.join(map(repr, missing))}, only of "
                f"{shortened(self.names, 10)}: write a file with tools/encode_classes.py that has them"
            )
        rows = [self.names.index(name) for name in names] + [len(self.names)]
        return dataclasses.replace(self, names=tuple(names), vectors=self.vectors[:, rows])

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file that :meth:`read` reads, in one step; an old file stays where that fails."""
        vectors = self.vectors.detach().float().cpu().contiguous()
        record = {
            "format": _FORMAT,
            "names": list(self.names),
            "templates": list(self.templates),
            "encoder": self.encoder,
            "sha256": disk.sha256(vectors.numpy().tobytes()),
        }
        data = dump_tensors({_TENSOR: vectors}, {_RECORD: dump_json(record).decode("ascii")})
        disk.write_bytes(path, data)

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> ClassVectors:
        """The vectors in a file of :meth:`write`."""
        try:
            return _checked(*load_tensors(Path(path).read_bytes()))
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
        raise ClassVectorsError(f"{os.fspath(path)}: {reason}; write it (again) with tools/encode_classes.py") from None


def _checked(tensors: dict[str, Tensor], metadata: dict[str, str]) -> ClassVectors:
    if _RECORD not in metadata or set(tensors) != {_TENSOR}:
        raise ValueError("it holds no class vectors")
    record: dict[str, Any] = load_json(metadata[_RECORD].encode())
    if record.get("format") != _FORMAT:
        raise ValueError(f"it has format {record.get('format')!r}, and this version reads {_FORMAT}")
    vectors = tensors[_TENSOR]
    sound = vectors.dtype == torch.float32 and bool(vectors.isfinite().all())
    if not sound or disk.sha256(vectors.numpy().tobytes()) != record.get("sha256"):
        raise ValueError("its vectors are not those that were written")
    lists = [record.get("names"), record.get("templates")]
    if not all(isinstance(words, list) and all(isinstance(word, str) for word in words) for words in lists):
        raise ValueError("its names or templates are not lists of words")
    return ClassVectors(tuple(record["names"]), vectors, tuple(record["templates"]), str(record.get("encoder", "")))


@torch.no_grad()
def encode_classes(encoder: TextEncoder, tokenizer: Tokenizer, names: Sequence[str]) -> ClassVectors:
    """Run the text encoder once for every class, the background and template."""
    if not names or not all(name.strip() for name in names):
        raise ClassVectorsError("there is no class to encode, or one without a name")
    texts = [text for name in (*names, BACKGROUND) for text in prompts(name)]
    chunks = []
    for start in range(0, len(texts), _TEXTS_PER_CALL):
        ids = tokenizer(texts[start : start + _TEXTS_PER_CALL])
        if ids.max() >= encoder.vocabulary or ids.shape[1] > encoder.context:
            raise ClassVectorsError(
                f"the tokenizer gives up to {ids.shape[1]} tokens with ids up to {int(ids.max())}; the text encoder "
                f"takes {encoder.context} tokens with ids below {encoder.vocabulary}: they do not belong together"
            )
        chunks.append(encoder(ids.to(encoder.lang_proj.device)).float().cpu())
    vectors = torch.cat(chunks).unflatten(0, (len(names) + 1, len(TEMPLATES))).transpose(0, 1).contiguous()
    weights = {name: value for name, value in encoder.state_dict().items() if name != "logit_scale"}
    return ClassVectors(tuple(names), vectors, TEMPLATES, fingerprint(weights).weights)


class Vocabulary:
    """Class names and their vectors: ``given``, or what the text encoder makes of the names when they are first needed.

    Methods that need vectors raise ClassVectorsError if the classes have no names, or the text encoder is missing or
    has only its random initial weights, and TokenizerError without a tokenizer. ``source`` says in messages where the
    names come from; ``labels`` is the number of classes in the training data, 0 if unknown.
    """

    def __init__(
        self,
        names: Sequence[str],
        source: str,
        tokenizer: str = CLIP_TOKENIZER,
        labels: int = 0,
        given: ClassVectors | None = None,
    ) -> None:
        self.source, self.tokenizer, self.labels = source, tokenizer, labels
        self.given = given and given.select(names or given.names)
        self.names = self.given.names if self.given else tuple(names)
        self._encoded: tuple[int, ClassVectors] | None = None  # by the weights of that version
        self._rows: tuple[ClassVectors, Tensor] | None = None  # what :meth:`rows` made of which vectors
        self._ids: Tensor | None = None  # of all classes and templates, where the encoder is trained

    def vectors(self, encoder: nn.Module) -> ClassVectors:
        """The classes' vectors; computed ones are computed again once the encoder's weights have changed."""
        if self.given is not None:
            return self.given
        text_encoder = _loaded(encoder)
        if self._encoded is None or self._encoded[0] != text_encoder.version:
            encode = self._load_tokenizer(text_encoder)
            _logger.info("Encoding the names of %d classes (%s), once.", len(self.names), self.source)
            with torch.autocast(text_encoder.lang_proj.device.type, enabled=False):
                self._encoded = text_encoder.version, encode_classes(text_encoder, encode, self.names)
        return self._encoded[1]

    def rows(self, encoder: nn.Module) -> Tensor:
        """(K + 1, C): each class's mean over the templates."""
        vectors = self.vectors(encoder)
        if self._rows is None or self._rows[0] is not vectors:
            self._rows = vectors, vectors.evaluation()
        return self._rows[1]

    def training_rows(self, encoder: nn.Module) -> Tensor:
        """(K + 1, C): each class in a random template; with gradients where the text encoder itself is trained."""
        if not any(p.requires_grad for name, p in encoder.named_parameters() if name != "logit_scale"):
            rows = self.vectors(encoder).sample()
        elif self.given is not None:
            raise ClassVectorsError(
                "parts of the text encoder are trained, but the class vectors come from a file, which they do not "
                "change: leave sem_seg_head.predictor.lang_encoder out of what is trained, or MODEL.SEEM.CLASS_VECTORS "
                "empty"
            )
        else:
            text_encoder = _loaded(encoder)
            if self._ids is None:
                encode = self._load_tokenizer(text_encoder)
                self._ids = encode([text for name in (*self.names, BACKGROUND) for text in prompts(name)])
            choices = self._ids.unflatten(0, (len(self.names) + 1, -1))
            drawn = torch.randint(choices.shape[1], (len(choices),))
            rows = encoder(choices[torch.arange(len(choices)), drawn].to(text_encoder.lang_proj.device))
        if self.labels and len(rows) != self.labels + 1:
            raise ClassVectorsError(
                f"{self.source} names {len(self.names)} classes and the training data are labelled with {self.labels} "
                "(those of DATASETS.TRAIN, or MODEL.SEM_SEG_HEAD.NUM_CLASSES): name each label once, in its order"
            )
        return rows

    def _load_tokenizer(self, encoder: TextEncoder) -> Tokenizer:
        if not self.names:
            raise ClassVectorsError(
                "the classes have no names: list them in MODEL.SEEM.CLASS_NAMES, or name data sets in DATASETS.TRAIN "
                "and DATASETS.TEST whose metadata has thing_classes"
            )
        return load_tokenizer(self.tokenizer, encoder.context)


def _loaded(encoder: nn.Module) -> TextEncoder:
    """``encoder``, after a check that it is a text encoder and that weights were loaded into it."""
    if not isinstance(encoder, TextEncoder):
        raise ClassVectorsError(f"this model has no text encoder that could make vectors of class names: {_REMEDY}")
    if encoder.version == encoder.initial_version:
        raise ClassVectorsError(
            "the text encoder has its random initial weights: load a checkpoint that has one (MODEL.WEIGHTS), or "
            + _REMEDY
        )
    return encoder


def vocabularies(cfg: CfgNode) -> tuple[Vocabulary, Vocabulary]:
    """The classes in training and in inference: those of ``MODEL.SEEM.CLASS_NAMES``, else of the data sets."""
    node, tokenizer, stored = cfg.MODEL.SEEM, cfg.MODEL.TEXT.PRETRAINED_TOKENIZER, None
    train, test = (_named_by(cfg, list(cfg.DATASETS[split])) for split in ("TRAIN", "TEST"))
    labels = len(train[0]) if node.CLASS_NAMES and train[0] else cfg.MODEL.SEM_SEG_HEAD.NUM_CLASSES
    if node.CLASS_NAMES:
        train = test = (tuple(node.CLASS_NAMES), "MODEL.SEEM.CLASS_NAMES")
    if node.CLASS_VECTORS:
        stored = ClassVectors.read(node.CLASS_VECTORS)
        if stored.vectors.shape[-1] != cfg.MODEL.DIM_PROJ:
            raise ClassVectorsError(
                f"the vectors in {node.CLASS_VECTORS} have {stored.vectors.shape[-1]} channels and MODEL.DIM_PROJ is "
                f"{cfg.MODEL.DIM_PROJ}: they belong to another model"
            )
    training = Vocabulary(*train, tokenizer, labels, stored)
    if test[0] and test[0] != train[0]:
        return training, Vocabulary(*test, tokenizer, given=stored)
    return training, training


def _named_by(cfg: CfgNode, sets: Sequence[str]) -> tuple[tuple[str, ...], str]:
    """Class names of data sets, and which set they are from; none where no metadata has any."""
    test = cfg.MODEL.MASK_FORMER.TEST
    key = "stuff_classes" if test.PANOPTIC_ON or test.SEMANTIC_ON else "thing_classes"
    first_set: dict[tuple[str, ...], str] = {}
    for name in sets:
        metadata = MetadataCatalog.get(name)
        first_set.setdefault(tuple(metadata.get(key) or metadata.get("thing_classes") or ()), name)
    if len(first_set) > 1:
        one, other, *_ = first_set.values()
        raise ClassVectorsError(
            f"data sets {one!r} and {other!r} have different classes; a model scores one list of them: use one set at "
            "a time, or list in MODEL.SEEM.CLASS_NAMES the classes of both"
        )
    names, name = next(iter(first_set.items()), ((), ""))
    return names, f"data set {name!r}"
