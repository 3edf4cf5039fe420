"""State dicts of earlier Mask2Former releases, brought to today's names.

Each key is judged by itself, not by version metadata: files that lost theirs, or that mix both forms, load as well.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

T = TypeVar("T")

_HEAD_PARTS = ("pixel_decoder.", "predictor.")
_OLD_QUERIES, _QUERIES = "predictor.static_query.", "predictor.query_feat."


def upgrade_head_key(key: str, prefix: str) -> str:
    """Today's name of ``key`` if it belongs to the head at ``prefix`` (such as ``"sem_seg_head."``), else ``key``.

    Early files hold the pixel decoder's weights directly in the head, and call the query features ``static_query``.
    """
    if not key.startswith(prefix):
        return key
    name = key[len(prefix) :]
    if not name.startswith(_HEAD_PARTS):
        name = "pixel_decoder." + name
    elif name.startswith(_OLD_QUERIES):
        name = _QUERIES + name[len(_OLD_QUERIES) :]
    return prefix + name


def upgrade_head(state: Mapping[str, T], prefix: str) -> dict[str, T]:
    """``state`` in its order with today's names; where a new name is taken, the old key stays, and is unexpected."""
    upgraded: dict[str, T] = {}
    for key, value in state.items():
        name = upgrade_head_key(key, prefix)
        upgraded[key if name != key and name in state else name] = value
    return upgraded
