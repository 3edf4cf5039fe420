"""A few of each fault, and that the campaign sees a promise that does not hold."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("detectron2")

from fault_campaign import damage, mutations  # noqa: E402
from fault_campaign.kills import Seen, _compare, _partial  # noqa: E402
from fault_campaign.world import World  # noqa: E402

from peft_d2.engine import checkpointer  # noqa: E402
from peft_d2.storage import disk  # noqa: E402

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(sys.platform != "linux", reason="forks, signals and /proc as on Linux")
def test_a_few_of_each(tmp_path: Path) -> None:
    """In a process of its own: one that has trained already must not be forked."""
    command = [
        sys.executable,
        ROOT / "projects" / "fault_campaign" / "run.py",
        "--quick",
        "--json",
        tmp_path / "counts.json",
    ]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    counts = {row["fault"]: (row["caused"], row["held"]) for row in json.loads((tmp_path / "counts.json").read_text())}
    assert len(counts) == 14
    assert all(caused == held > 0 for caused, held in counts.values())


def test_silent_mutations_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reader whose checksums always agree."""
    monkeypatch.setattr(disk, "sha256", lambda data: "0" * 64)
    (result,) = mutations.mutations(World(tmp_path), 18)
    assert result.held < result.caused and any("silent" in failure for failure in result.failures)


def test_silent_states_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpointer that believes every record, and torch's own reader."""
    monkeypatch.setattr(checkpointer, "_check_record", lambda folder: {})
    monkeypatch.setattr(checkpointer, "read_file", lambda path, values=True: torch.load(path, weights_only=True))
    results = damage.damaged_states(World(tmp_path), 100)
    assert any(result.held < result.caused for result in results)


def test_wrong_checkpoints_are_seen(tmp_path: Path) -> None:
    seen = Seen(saved=4, begun=5, digests={3: "c", 4: "d", 5: "e"})
    assert not _compare(4, "d", seen) and not _compare(5, "e", seen)
    assert "4 was saved" in _compare(3, "c", seen)
    assert "does not hold" in _compare(5, "d", seen)
    (tmp_path / "model_0000005.pth").write_bytes(b"PK")
    assert "is there and not whole" in _partial(tmp_path, seen)
