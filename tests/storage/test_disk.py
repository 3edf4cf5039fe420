"""Files and folders that survive kills and full disks."""

from __future__ import annotations

import multiprocessing
import random
import re
import resource
import subprocess
import sys
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from peft_d2.storage import StorageError, disk

ANY = ("*",)


def hidden(folder: Path) -> list[str]:
    return [entry.name for entry in folder.iterdir() if entry.name.startswith(".")]


def test_a_file_is_created_and_replaced(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "a.bin"
    for data in (b"one", b"two, longer", b""):
        disk.write_bytes(target, data)
        assert target.read_bytes() == data
    assert not hidden(target.parent)


def test_a_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "run" / "adapter"
    for names in (("a", "b"), ("b", "c/d")):
        with disk.folder(target, ANY) as temporary:
            for name in names:
                (temporary / name).parent.mkdir(exist_ok=True)
                (temporary / name).write_text(name)
            assert temporary.parent == target.parent and temporary != target
        assert sorted(str(p.relative_to(target)) for p in target.rglob("*") if p.is_file()) == sorted(names)
    assert not hidden(target.parent)


@pytest.mark.parametrize(
    "foreign", ["notes.txt", "a.bin.bak", ".hidden", "folder/a.bin", "a.bin/deep", "link"], ids=lambda name: name
)
def test_a_folder_that_holds_anything_else_is_refused_and_untouched(tmp_path: Path, foreign: str) -> None:
    target = tmp_path / "mine"
    (target / foreign).parent.mkdir(parents=True)
    if foreign == "link":
        (target / foreign).symlink_to(tmp_path)
    else:
        (target / foreign).write_text("mine")
    if not (target / "a.bin").exists():
        (target / "a.bin").write_text("old")
    before = {path: path.read_bytes() for path in target.rglob("*") if path.is_file()}
    name = foreign.partition("/")[0]
    with pytest.raises(StorageError, match=re.escape(repr(name))), disk.folder(target, ["a.bin"]) as temporary:
        (temporary / "a.bin").write_text("new")
    assert {path: path.read_bytes() for path in target.rglob("*") if path.is_file()} == before
    assert not hidden(tmp_path)


def test_a_file_that_appears_while_a_folder_is_written_is_kept(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    with pytest.raises(StorageError, match="notes"), disk.folder(tmp_path / "mine", ["a.bin"]) as temporary:
        (temporary / "a.bin").write_text("new")
        (tmp_path / "mine" / "notes").write_text("mine")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes"]


def test_an_empty_path_is_not_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(StorageError, match="empty"), disk.folder("", ANY):
        pass
    with pytest.raises(StorageError, match="empty"):
        disk.write_bytes("", b"x")
    assert not list(tmp_path.iterdir())


def test_an_error_inside_leaves_the_old_one(tmp_path: Path) -> None:
    disk.write_bytes(tmp_path / "file", b"old")
    with disk.folder(tmp_path / "folder", ANY) as temporary:
        (temporary / "x").write_text("old")
    with pytest.raises(KeyError), disk.file(tmp_path / "file") as path:
        path.write_bytes(b"half")
        raise KeyError
    with pytest.raises(KeyError), disk.folder(tmp_path / "folder", ANY) as temporary:
        (temporary / "x").write_text("half")
        raise KeyError
    assert (tmp_path / "file").read_bytes() == b"old" and (tmp_path / "folder" / "x").read_text() == "old"
    assert not hidden(tmp_path)


def test_a_file_in_the_folders_place_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    with pytest.raises(NotADirectoryError, match="is a file"), disk.folder(tmp_path / "x", ANY):
        pass
    assert (tmp_path / "x").read_text() == "mine"


def test_a_link_keeps_pointing_where_it_did(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to("disk")
    with disk.folder(tmp_path / "link", ANY) as temporary:
        (temporary / "x").write_text("x")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "disk" / "x").exists()


LOCK = """
import fcntl, os, sys
descriptor = os.open(sys.argv[1], os.O_RDONLY)
fcntl.flock(descriptor, fcntl.LOCK_EX)
print("locked", flush=True)
sys.stdin.read()
"""


def test_temporaries_of_dead_writers_are_removed_and_of_live_ones_kept(tmp_path: Path) -> None:
    """A live writer holds a lock, whatever its number and host; a reader removes nothing at all."""
    target = tmp_path / "adapter"
    dead, alive = tmp_path / ".adapter.0123abcd.tmp", tmp_path / ".adapter.1123abcd.tmp"
    others = [tmp_path / ".adapter_2.0123abcd.tmp", tmp_path / ".adapter.notes.tmp"]
    for path in (dead, alive, *others):
        path.mkdir()
    command = [sys.executable, "-c", LOCK, str(alive)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None and writer.stdout.readline() == b"locked\n"
        disk.recover(target, only_put_back=True)
        assert len(hidden(tmp_path)) == 4
        with disk.folder(target, ANY) as temporary:
            (temporary / "x").write_text("x")
        assert sorted(hidden(tmp_path)) == sorted(path.name for path in (alive, *others))
        writer.kill()
    disk.recover(target)
    assert sorted(hidden(tmp_path)) == sorted(path.name for path in others)


def test_what_this_process_is_writing_is_not_cleaned_away(tmp_path: Path) -> None:
    """By another writer of the same name, of this process or another."""
    with disk.folder(tmp_path / "adapter", ANY) as first:
        with disk.folder(tmp_path / "adapter", ANY) as second:
            (second / "x").write_text("second")
        (first / "x").write_text("first")
    assert (tmp_path / "adapter" / "x").read_text() == "first" and not hidden(tmp_path)


def test_the_old_folder_comes_back_after_a_kill_between_two_renames(tmp_path: Path) -> None:
    target = tmp_path / "adapter"
    for only_put_back in (False, True):
        with disk.folder(target, ANY) as temporary:
            (temporary / "x").write_text("old")
        target.rename(tmp_path / ".adapter.0123abcd.old")
        disk.recover(target, only_put_back)
        assert (target / "x").read_text() == "old" and not hidden(tmp_path)


@pytest.mark.parametrize("length", [200, 240, 255])
def test_long_names_are_stored(tmp_path: Path, length: int) -> None:
    name = "n" * length
    for _ in range(2):
        disk.write_bytes(tmp_path / name, b"x")
        with disk.folder(tmp_path / "f" / name, ANY) as temporary:
            (temporary / "x").write_text("x")
    assert (tmp_path / name).read_bytes() == b"x" and (tmp_path / "f" / name / "x").exists()
    assert not hidden(tmp_path) and not hidden(tmp_path / "f")


@pytest.mark.parametrize(
    ("name", "message"),
    [("n" * 300, "File name too long"), ("file/x", "Not a directory|File exists"), ("folder", "it is a folder")],
    ids=["long", "below a file", "a folder"],
)
def test_places_that_cannot_hold_a_file_are_named(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StorageError, match=rf"cannot store .*({message})") as caught:
        disk.write_bytes(tmp_path / name, b"x")
    assert "space" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "folder"]


def test_a_full_place_elsewhere_is_not_called_the_targets(tmp_path: Path) -> None:
    error = OSError(28, "No space left on device", "/dev/shm/torch_1")
    with pytest.raises(StorageError, match=r"at /dev/shm/torch_1.*/dev/shm is full"), disk.explained(tmp_path / "x"):
        raise error
    with pytest.raises(RuntimeError), disk.explained(tmp_path / "x"):
        raise RuntimeError("PytorchStreamReader failed reading zip archive: [enforce fail at inline_container.cc:1]")


def test_folders_are_replaced_where_they_cannot_be_exchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disk, "_exchange", lambda first, second: False)
    for text in ("one", "two"):
        with disk.folder(tmp_path / "adapter", ANY) as temporary:
            (temporary / "x").write_text(text)
    assert (tmp_path / "adapter" / "x").read_text() == "two" and not hidden(tmp_path)


def save_for_ever(folder: Path, saving: Event) -> None:
    for number in range(10**6):
        with disk.folder(folder / "adapter", ANY) as temporary:
            for name in ("a", "b", "c"):
                (temporary / name).write_bytes(number.to_bytes(4, "little") * 50_000)
        disk.write_bytes(folder / "last", number.to_bytes(4, "little") * 10_000)
        saving.set()


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
@pytest.mark.parametrize("exchange", [True, False])
def test_a_kill_at_any_moment_leaves_a_whole_one(
    tmp_path: Path, exchange: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writers are forks of this process: a start of torch for every kill would take the time of the test."""
    if not exchange:
        monkeypatch.setattr(disk, "_exchange", lambda first, second: False)
    generator, forks = random.Random(0), multiprocessing.get_context("fork")
    seen = set()
    for _ in range(12):
        saving = forks.Event()
        process = forks.Process(target=save_for_ever, args=(tmp_path, saving))
        process.start()
        assert saving.wait(60)
        time.sleep(generator.uniform(0, 0.2))
        process.kill()
        process.join()
        disk.recover(tmp_path / "adapter")
        disk.recover(tmp_path / "last")
        contents = [(tmp_path / "adapter" / name).read_bytes() for name in ("a", "b", "c")]
        assert len(set(contents)) == 1 and contents[0] == contents[0][:4] * 50_000
        last = (tmp_path / "last").read_bytes()
        assert last == last[:4] * 10_000
        # The file is written after the folder: it names this folder or the one before.
        assert int.from_bytes(contents[0][:4], "little") - int.from_bytes(last[:4], "little") in (0, 1)
        seen.add(contents[0][:4])
    assert len(seen) > 1, "the kills all came at the same place"
    assert not hidden(tmp_path)


@pytest.fixture
def file_size_limit():
    """Files of this process may have 64 KiB: the system refuses to write more, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (65536, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_no_space_keeps_the_old_file_and_says_so_once(tmp_path: Path, file_size_limit: None) -> None:
    disk.write_bytes(tmp_path / "file", b"old")
    with pytest.raises(StorageError, match=r"cannot store .*file.*is kept\. Free some space"):
        disk.write_bytes(tmp_path / "file", b"x" * 100_000)
    assert (tmp_path / "file").read_bytes() == b"old" and not hidden(tmp_path)


@pytest.mark.parametrize("by", ["bytes", "torch"])
def test_no_space_keeps_the_old_folder_and_says_so_once(tmp_path: Path, file_size_limit: None, by: str) -> None:
    import torch

    with disk.folder(tmp_path / "adapter", ANY) as folder:
        (folder / "x").write_text("old")
    with pytest.raises(StorageError, match="adapter.*is kept"), disk.folder(tmp_path / "adapter", ANY) as folder:
        if by == "bytes":
            (folder / "x").write_bytes(b"x" * 100_000)
        else:
            torch.save(torch.zeros(100_000), folder / "x")
    assert (tmp_path / "adapter" / "x").read_text() == "old" and not hidden(tmp_path)


def test_a_full_device_is_named(tmp_path: Path) -> None:
    device = open("/dev/full", "wb", buffering=0)  # noqa: SIM115  closed below
    with device, pytest.raises(StorageError, match="No space left on device"), disk.file(tmp_path / "file"):
        device.write(b"x")
    assert not (tmp_path / "file").exists()
