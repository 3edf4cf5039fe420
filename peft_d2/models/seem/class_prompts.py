"""Class names as sentences, and sentences as token ids."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from peft_d2.storage import CheckpointError

# Prompts of CLIP for ImageNet (Radford et al., ICML 2021, section 3.1.4), put together from their parts: 80 sentences.
_PHOTOS = (
    *("bad", "low resolution", "cropped", "bright", "dark", "close-up", "black and white", "pixelated"),
    *("jpeg corrupted", "blurry", "good"),
)
_OBJECTS = ("hard to see", "clean", "dirty", "cool", "large", "nice", "weird", "small")
_WORKS = (
    *("a sculpture", "a rendering", "a tattoo", "a drawing", "a painting", "a doodle", "a sketch", "a rendition"),
    *("graffiti", "art", "itap"),  # "I took a picture"
)
_KINDS = ("embroidered", "plastic", "origami", "toy", "cartoon", "plushie")


def _templates() -> tuple[str, ...]:
    templates = ["{}", "a photo of many {}", "a photo of my {}", "a photo of one {}", "itap of my {}"]
    for article in ("a", "the"):
        templates.append(f"a photo of {article} {{}}")
        templates.extend(f"a {photo} photo of {article} {{}}" for photo in _PHOTOS)
        templates.extend(f"a photo of {article} {thing} {{}}" for thing in _OBJECTS)
        templates.extend(f"{work} of {article} {{}}" for work in _WORKS)
        templates.extend(f"{article} {kind} {{}}" for kind in _KINDS)
        templates.append(f"{article} {{}} in a video game")
    return tuple(f"{template}." for template in templates)


TEMPLATES = _templates()
"""The bare name and 80 sentences around it, each with ``{}`` for the name."""

BACKGROUND = "background"
"""The word that stands for everything that is none of the classes."""

_SUFFIXES = ("-other", "-merged", "-stuff")  # of COCO's panoptic categories

CLIP_TOKENIZER = "openai/clip-vit-base-patch32"
"""Where transformers finds the tokenizer of the published models."""

Tokenizer = Callable[[Sequence[str]], Tensor]
"""Texts to ids (N, L), with the start token first and filled up after the end token."""


class TokenizerError(CheckpointError):
    """There is no tokenizer, or not one for this encoder; says what to do."""


def prompts(name: str, templates: Sequence[str] = TEMPLATES) -> list[str]:
    """The sentences of one class, without the suffixes of COCO's panoptic categories."""
    for suffix in _SUFFIXES:
        name = name.replace(suffix, "")
    return [template.format(name) for template in templates]


def load_tokenizer(source: str | os.PathLike[str] = CLIP_TOKENIZER, context: int = 77) -> Tokenizer:
    """CLIP's tokenizer, by the package ``transformers``.

    Args:
        source: a folder with the tokenizer's files (``vocab.json`` and ``merges.txt``, or ``tokenizer.json``), or a
            name on the Hugging Face hub.
        context: texts are cut to so many tokens.

    Raises:
        TokenizerError: ``transformers`` is not installed, the files cannot be had, or the end token is not the last of
            the vocabulary, where the encoder looks for it.
    """
    try:
        from transformers import CLIPTokenizer
    except ImportError:
        raise TokenizerError("CLIP's tokenizer needs transformers: pip install 'peft_d2[text]'") from None
    remedy = (
        "give a folder that holds vocab.json and merges.txt of openai/clip-vit-base-patch32, or read class vectors "
        "from a file that somebody has written with tools/encode_classes.py: they need no tokenizer"
    )
    if os.path.isdir(source) and not _holds_tokenizer(source):
        raise TokenizerError(f"the folder {os.fspath(source)!r} holds no tokenizer: {remedy}")
    try:
        tokenizer: Any = CLIPTokenizer.from_pretrained(os.fspath(source), local_files_only=os.path.isdir(source))
    except Exception as error:  # the library behind it raises that very type for a damaged file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise TokenizerError(f"the tokenizer {os.fspath(source)!r} cannot be loaded ({reason}): {remedy}") from None
    if tokenizer.eos_token_id != len(tokenizer) - 1:
        raise TokenizerError(
            f"the tokenizer {os.fspath(source)!r} has {len(tokenizer)} tokens and the end token "
            f"{tokenizer.eos_token_id}; the text encoder needs it to be the last one"
        )

    def encode(texts: Sequence[str]) -> Tensor:
        rows = tokenizer(list(texts), truncation=True, max_length=context)["input_ids"]
        ids = torch.full((len(rows), max(map(len, rows))), tokenizer.eos_token_id)
        for target, row in zip(ids, rows, strict=True):
            target[: len(row)] = torch.tensor(row)
        return ids

    return encode


def _holds_tokenizer(folder: str | os.PathLike[str]) -> bool:
    files = set(os.listdir(folder))
    return "tokenizer.json" in files or {"vocab.json", "merges.txt"} <= files
