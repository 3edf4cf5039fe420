"""SEEM's text encoder: class names as sentences, as token ids, and as vectors.

It is CLIP's text transformer (Radford et al., ICML 2021, section 2.4), with the published names.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peft_d2.storage import CheckpointError

BACKGROUND = "background"  # stands for everything that is none of the classes
CLIP_TOKENIZER = "openai/clip-vit-base-patch32"  # where transformers finds the tokenizer of the published models
_SUFFIXES = ("-other", "-merged", "-stuff")  # of COCO's panoptic categories
_EPS = 1e-12  # of the layer norms

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

Tokenizer = Callable[[Sequence[str]], Tensor]
"""Texts to ids (N, L), with the start token first and filled up after the end token."""


class TokenizerError(CheckpointError):
    """There is no tokenizer, or it does not suit the encoder; the message says what to do."""


def prompts(name: str, templates: Sequence[str] = TEMPLATES) -> list[str]:
    """The sentences of one class, without the suffixes of COCO's panoptic categories."""
    for suffix in _SUFFIXES:
        name = name.replace(suffix, "")
    return [template.format(name) for template in templates]


def load_tokenizer(source: str | os.PathLike[str] = CLIP_TOKENIZER, context: int = 77) -> Tokenizer:
    """CLIP's tokenizer, by the package ``transformers``; texts are cut to ``context`` tokens.

    ``source`` is a folder with ``vocab.json`` and ``merges.txt``, or ``tokenizer.json``, or a name on the hub.

    Raises:
        TokenizerError: ``transformers`` is not installed, the files cannot be had, or the end token is not the last of
            the vocabulary, where the encoder looks for it.
    """
    try:
        from transformers import CLIPTokenizer
    except ImportError:
        raise TokenizerError("CLIP's tokenizer needs transformers: pip install 'peft_d2[text]'") from None
    source = os.fspath(source)
    remedy = (
        "give a folder that holds vocab.json and merges.txt of openai/clip-vit-base-patch32, or read class vectors "
        "from a file that somebody has written with tools/encode_classes.py: they need no tokenizer"
    )
    files = set(os.listdir(source)) if os.path.isdir(source) else {"tokenizer.json"}
    if "tokenizer.json" not in files and not {"vocab.json", "merges.txt"} <= files:
        raise TokenizerError(f"the folder {source!r} holds no tokenizer: {remedy}")
    try:
        tokenizer: Any = CLIPTokenizer.from_pretrained(source, local_files_only=os.path.isdir(source))
    except Exception as error:  # the library behind it raises that very type for a damaged file
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TokenizerError(f"the tokenizer {source!r} cannot be loaded ({reason}): {remedy}") from None
    end = tokenizer.eos_token_id
    if end != len(tokenizer) - 1:
        raise TokenizerError(
            f"the tokenizer {source!r} has {len(tokenizer)} tokens and the end token {end}; the text encoder needs it "
            "to be the last one"
        )

    def encode(texts: Sequence[str]) -> Tensor:
        rows = tokenizer(list(texts), truncation=True, max_length=context)["input_ids"]
        rows = [torch.tensor(row) for row in rows]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=end)

    return encode


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(1.702 * x)


class ResidualAttentionBlock(nn.Module):
    """Self-attention and MLP, each pre-normed with a residual: x (L, N, C); mask (L, L), True where forbidden."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, n_heads)
        self.ln_1 = nn.LayerNorm(width, eps=_EPS)
        parts = [("c_fc", nn.Linear(width, 4 * width)), ("gelu", QuickGELU()), ("c_proj", nn.Linear(4 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(parts))
        self.ln_2 = nn.LayerNorm(width, eps=_EPS)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        source = self.ln_1(x)
        x = x + self.attn(source, source, source, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class TextTransformer(nn.Module):
    """Tokens (N, L), L up to the context, to features (N, L, width), each of its own token and of those before it."""

    def __init__(self, vocabulary: int, context: int, width: int, n_heads: int, n_layers: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.empty(context, width))
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(width, n_heads) for _ in range(n_layers))
        self.ln_final = nn.LayerNorm(width, eps=_EPS)
        for matrix in (self.positional_embedding, self.token_embedding.weight):
            nn.init.trunc_normal_(matrix, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        length = ids.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=ids.device).triu(1)
        x = (self.token_embedding(ids) + self.positional_embedding[:length]).transpose(0, 1)
        for block in self.resblocks:
            x = block(x, mask)
        return self.ln_final(x.transpose(0, 1))


class TextEncoder(nn.Module):
    """Token ids to unit vectors of ``projection`` channels, in the space in which queries and classes are compared.

    It also holds ``logit_scale``, the logarithm of the factor of their cosine, as the published checkpoints do. Of the
    ``vocabulary`` of the tokenizer the end token is the last; ``context`` are the most tokens of a text.
    """

    def __init__(self, vocabulary: int, context: int, width: int, n_heads: int, n_layers: int, projection: int) -> None:
        super().__init__()
        self.vocabulary, self.context = vocabulary, context
        self.lang_proj = nn.Parameter(torch.empty(width, projection))
        nn.init.trunc_normal_(self.lang_proj, std=0.02)
        self.logit_scale = nn.Parameter(torch.ones([]))
        self.lang_encoder = TextTransformer(vocabulary, context, width, n_heads, n_layers)
        self.initial_version = self.version

    @property
    def version(self) -> int:
        """A number that grows whenever weights are changed, by loading or training."""
        return sum(parameter._version for name, parameter in self.named_parameters() if name != "logit_scale")

    def forward(self, ids: Tensor) -> Tensor:
        """(N, L) token ids, L up to the context -> (N, projection) unit vectors.

        A text's feature is that of its end token, the first of its largest ids; what comes after it has no effect.
        """
        features = self.lang_encoder(ids)
        ends = ids.argmax(dim=-1)  # torch gives the first of equal ones
        vectors = features[torch.arange(len(ids), device=ids.device), ends] @ self.lang_proj
        return vectors / (vectors.norm(dim=-1, keepdim=True) + 1e-7)
