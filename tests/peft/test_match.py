"""Patterns, as a table: what each chooses, and what it says when it chooses nothing."""

from __future__ import annotations

import pytest

from peft_d2.peft.targets import PatternError, match, nearest, resolve

NAMES = [
    *[
        f"sem_seg_head.pixel_decoder.transformer.encoder.layers.{i}{tail}"
        for i in range(2)
        for tail in ("", ".self_attn", ".self_attn.value_proj", ".self_attn.sampling_offsets", ".linear1")
    ],
    *[
        f"sem_seg_head.predictor.transformer_{kind}_layers.{i}{tail}"
        for kind in ("self_attention", "cross_attention", "ffn")
        for i in range(2)
        for tail in ("", ".norm")
    ],
    "sem_seg_head.predictor.class_embed",
    "backbone.stem.conv1",
    "backbone.blocks.0",
    "backbone.blocks.0.attn.qkv",
    "backbone.blocks.0.norm1",
    "backbone.blocks.11.attn.qkv",
]


@pytest.mark.parametrize(
    ("pattern", "count", "first"),
    [
        ("value_proj", 2, "sem_seg_head.pixel_decoder.transformer.encoder.layers.0.self_attn.value_proj"),
        ("attn.qkv", 2, "backbone.blocks.0.attn.qkv"),
        ("sem_seg_head.predictor.class_embed", 1, "sem_seg_head.predictor.class_embed"),
        (
            "sem_seg_head.pixel_decoder.*.self_attn.{value_proj,sampling_offsets}",
            4,
            "sem_seg_head.pixel_decoder.transformer.encoder.layers.0.self_attn.value_proj",
        ),
        (
            "sem_seg_head.predictor.transformer_*_layers.*",
            6,
            "sem_seg_head.predictor.transformer_self_attention_layers.0",
        ),
        (
            "transformer_{self,cross}_attention_layers.0",
            2,
            "sem_seg_head.predictor.transformer_self_attention_layers.0",
        ),
        ("backbone.blocks.*", 1, "backbone.blocks.0"),
        ("backbone.blocks.**", 4, "backbone.blocks.0"),
        ("blocks.?.attn.qkv", 1, "backbone.blocks.0.attn.qkv"),
        ("blocks.[!0]*.attn.qkv", 1, "backbone.blocks.11.attn.qkv"),
        ("*norm*", 7, "sem_seg_head.predictor.transformer_self_attention_layers.0.norm"),
        (r"re:backbone\..*qkv", 2, "backbone.blocks.0.attn.qkv"),
        ("*", len(NAMES), NAMES[0]),
    ],
)
def test_what_a_pattern_chooses(pattern: str, count: int, first: str) -> None:
    found = match(pattern, NAMES)
    assert (len(found), found[0]) == (count, first)


@pytest.mark.parametrize(
    ("pattern", "said"),
    [
        ("vlaue_proj", "value_proj"),
        ("sem_seg_head.predictor.clas_embed", "sem_seg_head.predictor.class_embed"),
        ("self_attn.{value_proj,sampling_offsetz}", "'sampling_offsetz' matches no module. Nearest names: .*offsets"),
        ("encoder.*.value_porj", "value_proj"),
        ("qk", "matches no"),  # a suffix begins after a dot: not the end of any word
        ("re:backbone.[", "not a regular expression"),
        ("a.{b", "brace"),
        ("a.[b", "bracket"),
        ("", "non-empty"),
        ("zzzzzzzz", "No name resembles it"),
    ],
)
def test_a_pattern_that_fails_says_why(pattern: str, said: str) -> None:
    with pytest.raises(PatternError, match=said):
        match(pattern, NAMES)


def test_each_of_several_patterns_must_match() -> None:
    with pytest.raises(PatternError, match="vlaue_proj.*value_proj"):
        resolve(["class_embed", "vlaue_proj"], NAMES)


def test_a_string_is_not_a_list_of_patterns() -> None:
    with pytest.raises(PatternError, match=r"\['value_proj'\]"):
        resolve("value_proj", NAMES)


def test_nearest_knows_blocks_by_their_structure() -> None:
    assert nearest("blocks.7.attn.qvk", NAMES)[0] == "backbone.blocks.0.attn.qkv"
