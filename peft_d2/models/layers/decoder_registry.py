"""Transformer decoders, found by ``MODEL.MASK_FORMER.TRANSFORMER_DECODER_NAME``."""

from __future__ import annotations

from fvcore.common.registry import Registry

TRANSFORMER_DECODER_REGISTRY = Registry("TRANSFORMER_DECODER")
TRANSFORMER_DECODER_REGISTRY.__doc__ = """
Transformer decoders. A registered one is called with ``(cfg, in_channels, mask_classification=True)``, and its result
with the multi-scale features, coarsest first, and the mask features.
"""
