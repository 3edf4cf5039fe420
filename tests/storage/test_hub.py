"""Sharing through the hub, against a cache as its library lays it out; no network."""

from __future__ import annotations

import importlib
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import peft_d2
from peft_d2 import peft
from peft_d2.storage import adapter_file, hub
from peft_d2.storage.adapter_file import AdapterFileError

huggingface_hub = pytest.importorskip("huggingface_hub")
COMMIT = "0123456789abcdef0123456789abcdef01234567"


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The library's cache, offline, into which the API's uploads go."""
    folder = tmp_path / "cache"
    constants = importlib.import_module("huggingface_hub.constants")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    class Api:
        def create_repo(self, repo: str, private: bool, exist_ok: bool) -> None:
            (folder / f"models--{repo.replace('/', '--')}" / "refs").mkdir(parents=True, exist_ok=exist_ok)

        def upload_folder(self, repo_id: str, folder_path: str, commit_message: str) -> Any:
            place = folder / f"models--{repo_id.replace('/', '--')}"
            (place / "refs" / "main").write_text(COMMIT)
            (place / "snapshots" / COMMIT).mkdir(parents=True)
            for file in Path(folder_path).iterdir():
                (place / "snapshots" / COMMIT / file.name).write_bytes(file.read_bytes())
            return types.SimpleNamespace(oid=COMMIT)

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return folder


@pytest.fixture
def run(tmp_path: Path) -> tuple[Path, nn.Module]:
    trained = model()
    peft_d2.inject(trained, [{"NAME": "lora", "TARGETS": ["0"], "RANK": 2}], train=["2"])
    with torch.no_grad():
        for item in peft.trained_parameters(trained):
            item.param.add_(0.5)
    peft_d2.save_adapter(trained, tmp_path / "run" / "adapter_final", metrics={"segm/AP": 36.54321})
    (tmp_path / "run" / "log.txt").write_text("old Command: a\n[11/27] Command: tools/train_net.py --resume\n")
    config = {"MODEL": {"WEIGHTS": "/home/me/base.pth", "PEFT": {"WEIGHTS": f"user/day@{COMMIT}"}}}
    config |= {"DATASETS": {"TRAIN": ["night_train"], "TEST": ["night_val"]}}
    (tmp_path / "run" / "config.yaml").write_text(yaml.safe_dump(config))
    return tmp_path / "run" / "adapter_final", trained


@torch.no_grad()
@pytest.mark.parametrize("revision", [COMMIT, "main"])
def test_what_is_pushed_is_loaded(revision: str, cache: Path, run: tuple[Path, nn.Module], caplog: Any) -> None:
    picture = run[0].parent / "seen.png"
    picture.write_bytes(b"picture")
    assert peft_d2.push_to_hub(run[0], "user/night", picture) == f"user/night@{COMMIT}"
    fresh = model()
    with caplog.at_level("INFO", "peft_d2"):
        peft_d2.load_adapter(fresh, f"user/night@{revision}")
    assert COMMIT in caplog.text  # what a run used is in its log, whatever a branch is later
    x = torch.randn(3, 4)
    assert torch.equal(fresh(x), run[1](x))
    assert hub.pinned(f"user/night@{revision}") == f"user/night@{COMMIT}" and hub.pinned("here") == "here"
    several = model()
    peft_d2.load_adapters(several, {"night": f"user/night@{revision}"})
    peft_d2.set_adapter(several, "night")
    assert torch.equal(several(x), run[1](x))


def test_the_card_tells_the_run(run: tuple[Path, nn.Module]) -> None:
    text = hub.model_card(run[0], "user/night", "picture.png", "tools/train_net.py --config-file x.yaml")
    header = yaml.safe_load(text.split("---")[1])
    assert header["library_name"] == "peft_d2" and "detectron2" in header["tags"]
    told = ["`base.pth`, 4 tensors", "night_train", "night_val", "lora on `0`", "RANK 2", "| trained in full | `2` |"]
    assert "DROPOUT" not in text and "/home/me" not in text  # what is as always, and where it lies on this machine
    told += ["| segm/AP | 36.54 |", "![Evaluation](picture.png)", "--config-file x.yaml", '"user/night@main"']
    told += [f"| started from | `user/day@{COMMIT}` |", "Hugging Face's `peft` opens it as it is."]
    for part in told:
        assert part in text, part
    assert "Trained by `tools/train_net.py --resume`." in hub.model_card(run[0], "user/night")


def test_the_card_shows_the_last_evaluation_of_the_run(cache: Path, run: tuple[Path, nn.Module]) -> None:
    (evaluated := run[0].parent / "inference" / "night_val").mkdir(parents=True)
    (evaluated / "precision.png").write_bytes(b"curve")
    earlier = run[0].rename(run[0].with_name("adapter_0000009"))
    for repo, shown in (("user/earlier", False), ("user/last", True)):
        folder = earlier.rename(run[0]) if shown else earlier
        peft_d2.push_to_hub(folder, repo)
        pushed = cache / f"models--{repo.replace('/', '--')}" / "snapshots" / COMMIT
        assert (pushed / "picture.png").exists() == shown
        assert ("![Evaluation](picture.png)" in (pushed / "README.md").read_text()) == shown


def test_an_adapter_says_which_commit_its_training_started_from(
    cache: Path, run: tuple[Path, nn.Module], tmp_path: Path
) -> None:
    """Also after it was loaded again, under another name; of a plain folder there is nothing to say."""
    peft_d2.push_to_hub(run[0], "user/night")
    trained = model()
    peft_d2.load_adapter(trained, "user/night@main")
    with torch.no_grad():
        next(peft.trained_parameters(trained)).param.add_(1.0)
    peft_d2.save_adapter(trained, tmp_path / "later" / "adapter_final")
    again = model()
    peft_d2.load_adapters(again, {"other": tmp_path / "later" / "adapter_final", "plain": run[0]})
    for name, start in (("other", f"user/night@{COMMIT}"), ("plain", "")):
        peft_d2.save_adapter(again, tmp_path / name, name=name)
        assert adapter_file.read(tmp_path / name).started_from == start
    assert f"| started from | `user/night@{COMMIT}` |" in hub.model_card(tmp_path / "other", "user/later")
    assert "started from" not in hub.model_card(tmp_path / "plain", "user/plain")


def test_refusals(cache: Path, run: tuple[Path, nn.Module], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fresh = model()
    with pytest.raises(AdapterFileError, match="user/nobody@main.*cannot be fetched from the hub"):
        peft_d2.load_adapter(fresh, "user/nobody@main")
    with pytest.raises(AdapterFileError) as without_revision:  # a folder that does not exist, not a download
        peft_d2.load_adapter(fresh, "user/night")
    assert "hub" not in str(without_revision.value)
    assert type(fresh) is nn.Sequential
    (run[0] / "adapter_model.safetensors").write_bytes(b"damaged")
    with pytest.raises(AdapterFileError):
        peft_d2.push_to_hub(run[0], "user/night")
    assert not cache.exists()
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(AdapterFileError, match=r"needs the package huggingface_hub.*pip install 'peft_d2\[hub\]'"):
        peft_d2.load_adapter(fresh, "user/night@main")
