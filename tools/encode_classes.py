#!/usr/bin/env python
"""Encode class names once, for SEEM: a file of their text vectors, by the text encoder in a checkpoint.

tools/encode_classes.py --weights seem.pt --annotations train.json --output classes.safetensors
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

from command_line import require_output
from torch import Tensor

from peft_d2.engine.errors import ConfigError, one_line_errors
from peft_d2.models.seem.text_encoder import CLIP_TOKENIZER, TextEncoder, load_tokenizer
from peft_d2.models.seem.vocabulary import encode_classes
from peft_d2.storage.checkpoint import read_checkpoint

_PROJECTION = "lang_proj"
_HEAD_CHANNELS = 64  # in the published models


def encode_parser() -> argparse.ArgumentParser:
    """The arguments of ``tools/encode_classes.py``."""
    parser = argparse.ArgumentParser(description="Encode class names once, for SEEM: a file of their text vectors.")
    parser.add_argument("--weights", required=True, metavar="FILE", help="a checkpoint with SEEM's text encoder")
    classes = parser.add_mutually_exclusive_group(required=True)
    classes.add_argument("--names", nargs="+", metavar="NAME", help="the classes, in the order of their ids")
    classes.add_argument("--annotations", metavar="JSON", help="a COCO-format file: its categories, by id")
    parser.add_argument("--output", required=True, metavar="FILE", help="the file to write (.safetensors)")
    parser.add_argument(
        "--tokenizer", default=CLIP_TOKENIZER, help="a folder with vocab.json and merges.txt, or a name on the hub"
    )
    parser.add_argument("--heads", type=int, help="attention heads of the encoder; one per 64 channels by default")
    return parser


def encode(args: argparse.Namespace) -> str:
    """Read the encoder, encode, write; returns the line to print.

    Raises:
        CheckpointError, TokenizerError, ClassVectorsError, ConfigError, StorageError: what is wrong.
    """
    require_output("--output", args.output, args.weights, args.annotations or "")
    names = args.names or _category_names(args.annotations)
    encoder = read_text_encoder(args.weights, args.heads)
    classes = encode_classes(encoder, load_tokenizer(args.tokenizer, encoder.context), names)
    classes.write(args.output)
    templates, rows, channels = classes.vectors.shape
    return f"{args.output}: {rows - 1} classes and the background in {templates} templates, {channels} channels"


def read_text_encoder(path: str, n_heads: int | None = None) -> TextEncoder:
    """The text encoder in a checkpoint of SEEM.

    Raises:
        CheckpointError: the file cannot be read.
        ConfigError: it has no text encoder, or several.
    """
    state = read_checkpoint(path).state
    prefixes = [name.removesuffix(_PROJECTION) for name in state if name.split(".")[-1] == _PROJECTION]
    if len(prefixes) != 1:
        raise ConfigError(
            f"{path} has {len(prefixes)} text encoders (tensors named ...{_PROJECTION}); give a checkpoint of SEEM, "
            "as published or as merged"
        )
    inside = {name.removeprefix(prefixes[0]): value for name, value in state.items() if name.startswith(prefixes[0])}
    try:
        return encoder_of(inside, n_heads)
    except ValueError as error:
        raise ConfigError(f"{path}: {error}") from error


def encoder_of(state: Mapping[str, Tensor], n_heads: int | None = None) -> TextEncoder:
    """The encoder whose state dict this is, with sizes read off the shapes; by default a head per 64 channels."""
    try:
        vocabulary, width = state["lang_encoder.token_embedding.weight"].shape
        context, projection = len(state["lang_encoder.positional_embedding"]), state["lang_proj"].shape[1]
        blocks = {name.split(".")[2] for name in state if name.startswith("lang_encoder.resblocks.")}
        heads = n_heads or max(1, width // _HEAD_CHANNELS)
        encoder = TextEncoder(vocabulary, context, width, heads, len(blocks), projection)
        encoder.load_state_dict(state)
    except (KeyError, ValueError, IndexError, RuntimeError, AssertionError) as error:
        raise ValueError(f"these are not a text encoder's tensors: {error}") from None
    return encoder.eval()


def _category_names(path: str) -> list[str]:
    try:
        categories = json.loads(Path(path).read_text(encoding="utf-8"))["categories"]
        return [category["name"] for category in sorted(categories, key=lambda category: category["id"])]
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path} is no COCO-format file with named categories ({error!r})") from error


if __name__ == "__main__":
    print(one_line_errors(lambda: encode(encode_parser().parse_args())))
