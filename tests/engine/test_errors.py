"""What the tools say of a data-loading process that was killed."""

from __future__ import annotations

import pytest
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _SingleProcessDataLoaderIter

from peft_d2.engine.errors import WorkerDied, named


@pytest.mark.parametrize("error", [ConnectionResetError(104, "reset by peer"), BrokenPipeError(), EOFError()], ids=repr)
def test_a_connection_that_fails_while_a_batch_is_fetched(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(self: object) -> None:
        raise error

    monkeypatch.setattr(_SingleProcessDataLoaderIter, "_next_data", fails)
    with pytest.raises(type(error)) as raised:
        next(iter(DataLoader([1, 2])))
    told = named(raised.value)
    assert isinstance(told, WorkerDied) and type(error).__name__ in str(told) and "--resume" in str(told)


@pytest.mark.parametrize(
    "error", [ConnectionResetError(104, "reset by peer"), EOFError(), RuntimeError("shape")], ids=repr
)
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as raised:
        raise error
    assert named(raised.value) is error


def test_torchs_own_message() -> None:
    said = "DataLoader worker (pid 7) is killed by signal: Killed. "
    assert str(named(RuntimeError(said))).startswith(
        "a process that loads data was killed (DataLoader worker (pid 7) is"
    )
