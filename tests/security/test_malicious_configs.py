"""Config files made to run code: Detectron2's own reader would execute some of them, ours refuses each by name."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("detectron2")

from peft_d2.engine.config import read_tree  # noqa: E402
from peft_d2.engine.errors import ConfigError  # noqa: E402

YAML = {
    "apply": "X: !!python/object/apply:os.system ['touch {canary}']",
    "apply as a mapping": "X: !!python/object/apply:os.system {{args: ['touch {canary}']}}",
    "eval": "X: !!python/object/apply:eval [\"open('{canary}', 'w')\"]",
    "eval inside a comprehension": "X: !!python/object/apply:eval [\"[open('{canary}', 'w') for x in range(1)]\"]",
    "eval of an attribute": 'X: !!python/object/apply:eval ["[x.__class__.__mro__ for x in range(1)]"]',
    "eval that never ends": 'X: !!python/object/apply:eval ["[x for x in range(10**9 * 10**9)]"]',
    "exec": "X: !!python/object/apply:exec [\"open('{canary}', 'w')\"]",
    "new": "X: !!python/object/new:subprocess.Popen [['touch', '{canary}']]",
    "name": "X: !!python/name:os.system",
    "module": "X: !!python/module:os",
    "object": "X: !!python/object:collections.OrderedDict {{}}",
    "long form of the tag": "X: !<tag:yaml.org,2002:python/object/apply:os.system> ['touch {canary}']",
    "tag shorthand": "%TAG !p! tag:yaml.org,2002:python/object/apply:\n---\nX: !p!os.system ['touch {canary}']",
    "key": "? !!python/object/apply:os.system ['touch {canary}']\n: 1",
    "unbounded nesting": "X: " + "[" * 3_000,
    "nesting that is closed": "X: " + "[" * 200 + "]" * 200,
    "aliases that grow": "A: &a [1,1,1,1,1,1,1,1,1]\n"
    + "".join(f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n" for old, new in zip("abcdefg", "bcdefgh", strict=True)),
    "merged aliases that grow": "A: &a {{x: 1}}\n"
    + "".join(f"{n}: &{n}\n  <<: [{', '.join(['*' + o] * 9)}]\n" for o, n in zip("abcdefg", "bcdefgh", strict=True)),
    "an alias of its own": "X: &x [*x]",
    "a key given twice": "SOLVER: {{MAX_ITER: 3, MAX_ITER: 4}}",
    "a group given twice": "SOLVER: {{MAX_ITER: 3}}\nSOLVER: {{BASE_LR: 1.0}}",
    "a list given twice": "DATASETS: {{TRAIN: [a, b], TRAIN: [b, a]}}",
    "a date that is none": "X: 2001-99-99",
    "a number that is none": "X: !!int many",
    "a number of 5000 digits": "X: " + "9" * 5_000,
}


@pytest.mark.parametrize("attack", YAML)
@pytest.mark.parametrize("in_base", [False, True])
def test_yaml_with_code_is_refused(attack: str, in_base: bool, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (tmp_path / "evil.yaml").write_text(YAML[attack].format(canary=canary) + "\n")
    (tmp_path / "top.yaml").write_text("_BASE_: evil.yaml\n")
    with pytest.raises(ConfigError, match=r"evil\.yaml"):
        read_tree(str(tmp_path / ("top.yaml" if in_base else "evil.yaml")))
    assert not canary.exists()


def test_a_value_that_is_said_twice_is_read(tmp_path: Path) -> None:
    """As the official Mask2Former's panoptic config does."""
    (tmp_path / "a.yaml").write_text("HEAD:\n  IN: [res2, {x: 1}]\n  OTHER: 1\n  IN: ['res2', {'x': 1}]\n")
    assert read_tree(str(tmp_path / "a.yaml")) == {"HEAD": {"IN": ["res2", {"x": 1}], "OTHER": 1}}


def test_a_loop_of_bases_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("_BASE_: b.yaml\n")
    (tmp_path / "b.yaml").write_text("_BASE_: a.yaml\n")
    with pytest.raises(ConfigError, match="its own _BASE_"):
        read_tree(str(tmp_path / "a.yaml"))


def test_detectron2s_own_reader_would_run_it(tmp_path: Path) -> None:
    """What the tests above are worth: without our reader the canary appears."""
    from detectron2.config import CfgNode

    canary = tmp_path / "canary"
    (tmp_path / "evil.yaml").write_text(YAML["apply"].format(canary=canary) + "\n")
    CfgNode.load_yaml_with_base(str(tmp_path / "evil.yaml"), allow_unsafe=True)
    assert canary.exists()
