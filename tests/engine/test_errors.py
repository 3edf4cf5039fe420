"""What the tools say of a data-loading process that was killed, and of numbers out of range."""

from __future__ import annotations

import argparse
import errno
import os

import pytest
from torch.utils.data import DataLoader
from torch.utils.data.dataloader import _SingleProcessDataLoaderIter

from peft_d2.engine.errors import LimitReached, Unusable, WorkerDied, bounded, named


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


BUS = "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
SHARED = "unable to allocate shared memory(shm) for file </torch_1_2_3>: No space left on device (28)"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError(BUS + "shared memory. Please try to raise your shared memory limit."), "shared memory"),
        (RuntimeError(SHARED), "shared memory"),
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/dev/shm/torch_1"), "shared memory"),
        (RuntimeError("unable to open shared memory object </torch_1>: Too many open files (24)"), "file handles"),
        (RuntimeError("unable to mmap 8 bytes from file </torch_1>: Cannot allocate memory (12)"), "memory"),
    ],
)
def test_containers_with_little_shared_memory(error: Exception, said: str) -> None:
    """64 MiB is what docker gives."""
    told = named(error)
    assert isinstance(told, LimitReached) and str(told).startswith(f"no more {said} (")
    assert ("--shm-size" in str(told)) == (said == "shared memory")


@pytest.mark.parametrize(
    ("text", "said"),
    [("0", "argument --port: 0 is not from 1 to 65535"), ("99999999", "from 1 to 65535"), ("x", "invalid int value")],
)
def test_numbers_out_of_range_end_the_command(text: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--port", type=bounded(int, 1, 65535))
    assert parser.parse_args(["--port", "65535"]).port == 65535
    with pytest.raises(SystemExit):
        parser.parse_args(["--port", text])
    assert said in capsys.readouterr().err


def test_a_number_that_is_none_is_no_number_from_0_on() -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="nan is not at least 0"):
        bounded(float, 0)("nan")


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS, errno.ENOSPC, errno.EFBIG, errno.ENAMETOOLONG])
def test_a_file_that_the_system_refuses_is_named(number: int) -> None:
    told = named(OSError(number, os.strerror(number), "/data/a.json"))
    assert isinstance(told, Unusable) and str(told).startswith(f"/data/a.json: {os.strerror(number)}. ")
