"""SEEM's text encoder: class names as sentences, as token ids, and as vectors.

It is CLIP's text transformer (Radford et al., ICML 2021, section 2.4), with the published names.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

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


_EPS = 1e-12  # of the layer norms
_HEAD_CHANNELS = 64
_NORM_EPS = 1e-7


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x)."""

    def forward(self, x: Tensor) -> Tensor:
        """Same shape."""
        return x * torch.sigmoid(1.702 * x)


class ResidualAttentionBlock(nn.Module):
    """Causal self-attention and MLP, each pre-normed with a residual."""

    def __init__(self, width: int, n_heads: int) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(width, n_heads)
        self.ln_1 = nn.LayerNorm(width, eps=_EPS)
        parts = [("c_fc", nn.Linear(width, 4 * width)), ("gelu", QuickGELU()), ("c_proj", nn.Linear(4 * width, width))]
        self.mlp = nn.Sequential(OrderedDict(parts))
        self.ln_2 = nn.LayerNorm(width, eps=_EPS)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """x (L, N, C); mask (L, L), True where attending is forbidden."""
        source = self.ln_1(x)
        x = x + self.attn(source, source, source, attn_mask=mask, need_weights=False)[0]
        return x + self.mlp(self.ln_2(x))


class TextTransformer(nn.Module):
    """Tokens to features, each of its own token and of those before it."""

    def __init__(self, vocabulary: int, context: int, width: int, n_heads: int, n_layers: int) -> None:
        super().__init__()
        self.positional_embedding = nn.Parameter(torch.empty(context, width))
        self.token_embedding = nn.Embedding(vocabulary, width)
        self.resblocks = nn.ModuleList(ResidualAttentionBlock(width, n_heads) for _ in range(n_layers))
        self.ln_final = nn.LayerNorm(width, eps=_EPS)
        for matrix in (self.positional_embedding, self.token_embedding.weight):
            nn.init.trunc_normal_(matrix, std=0.02)

    def forward(self, ids: Tensor) -> Tensor:
        """(N, L) token ids, L up to the context -> (N, L, width)."""
        length = ids.shape[1]
        mask = torch.ones(length, length, dtype=torch.bool, device=ids.device).triu(1)
        x = (self.token_embedding(ids) + self.positional_embedding[:length]).transpose(0, 1)
        for block in self.resblocks:
            x = block(x, mask)
        return self.ln_final(x.transpose(0, 1))


class TextEncoder(nn.Module):
    """Token ids to unit vectors in the space in which queries and classes are compared.

    It also holds ``logit_scale``, the logarithm of the factor of their cosine, as the published checkpoints do.

    Args:
        vocabulary: tokens that the tokenizer knows; the end token is the last.
        context: most tokens of a text, the start and the end among them.
        width, n_heads, n_layers: of the transformer.
        projection: channels of the vectors.
    """

    def __init__(self, vocabulary: int, context: int, width: int, n_heads: int, n_layers: int, projection: int) -> None:
        super().__init__()
        self.lang_proj = nn.Parameter(torch.empty(width, projection))
        nn.init.trunc_normal_(self.lang_proj, std=0.02)
        self.logit_scale = nn.Parameter(torch.ones([]))
        self.lang_encoder = TextTransformer(vocabulary, context, width, n_heads, n_layers)
        self._initial_version = self.version

    @classmethod
    def from_state(cls, state: Mapping[str, Tensor], n_heads: int | None = None) -> TextEncoder:
        """The encoder whose state dict this is, with its sizes read off the shapes.

        Args:
            state: names without a prefix, as ``state_dict()`` gives them.
            n_heads: one per 64 channels by default, as in CLIP.

        Raises:
            ValueError: tensors are missing, left over or of other shapes than those of a text encoder.
        """
        try:
            vocabulary, width = state["lang_encoder.token_embedding.weight"].shape
            context, projection = len(state["lang_encoder.positional_embedding"]), state["lang_proj"].shape[1]
            blocks = {name.split(".")[2] for name in state if name.startswith("lang_encoder.resblocks.")}
            n_heads = n_heads or max(1, width // _HEAD_CHANNELS)
            encoder = cls(vocabulary, context, width, n_heads, len(blocks), projection)
            encoder.load_state_dict(state)
        except (KeyError, ValueError, IndexError, RuntimeError, AssertionError) as error:
            raise ValueError(f"these are not a text encoder's tensors: {error}") from None
        return encoder.eval()

    @property
    def version(self) -> int:
        """Grows whenever weights are written, by loading or training."""
        return sum(parameter._version for name, parameter in self.named_parameters() if name != "logit_scale")

    @property
    def is_initial(self) -> bool:
        """Whether the weights are still the random ones."""
        return self.version == self._initial_version

    @property
    def vocabulary(self) -> int:
        """Token ids are below this."""
        return self.lang_encoder.token_embedding.num_embeddings

    @property
    def context(self) -> int:
        """Most tokens of a text."""
        return len(self.lang_encoder.positional_embedding)

    def forward(self, ids: Tensor) -> Tensor:
        """(N, L) token ids, L up to the context -> (N, projection) unit vectors.

        A text's feature is that of its end token, the first of its largest ids; what comes after it has no effect.
        """
        features = self.lang_encoder(ids)
        ends = ids.argmax(dim=-1)  # torch gives the first of equal ones
        vectors = features[torch.arange(len(ids), device=ids.device), ends] @ self.lang_proj
        return vectors / (vectors.norm(dim=-1, keepdim=True) + _NORM_EPS)
