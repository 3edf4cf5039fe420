"""SEEM's text encoder: CLIP's text transformer (Radford et al., ICML 2021, section 2.4), with the published names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping

import torch
from torch import Tensor, nn

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
