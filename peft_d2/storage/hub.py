"""Adapters on the Hugging Face hub: ``user/name@revision``, and a model card made of what the run wrote."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from peft_d2.peft import METHODS
from peft_d2.storage import adapter_file
from peft_d2.storage.adapter_file import CONFIG, FILES, LORA, RECORD, STARTED_FROM, WHY_NOT_PEFT, import_hub, resolved


def pinned(folder: str) -> str:
    """``user/name@<commit>`` for ``user/name@main``, for a run's record; any other path as it is."""
    return resolved(folder)[1] or folder


def push_to_hub(
    folder: str | os.PathLike[str],
    repo: str,
    picture: str | os.PathLike[str] | None = None,
    private: bool = False,
    command: str = "",
) -> str:
    """Upload an adapter's folder with a model card, made of it and of what the run wrote if that is beside it.

    Args:
        folder: written by :func:`peft_d2.save_adapter`, such as ``output/adapter_final``.
        repo: ``user/name``; made where it does not exist.
        picture: shown on the card. When None and ``folder`` is a run's ``adapter_final``, the precision over recall of
            its last evaluation, which shows nobody's images; "" for none.
        private: of a repository that is made.
        command: how it was trained, for the card; else what the run's ``log.txt`` says.

    Returns:
        ``user/name@commit``, as :func:`peft_d2.load_adapter` takes it.

    Raises:
        AdapterFileError: the folder is damaged, or ``huggingface_hub`` is missing.
    """
    adapter_file.read(folder)  # whole, and with the checksums that it names
    api = import_hub(folder).HfApi()
    api.create_repo(repo, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        for name in FILES:
            shutil.copyfile(Path(folder, name), Path(temporary, name))
        picture, shown = _curves(Path(folder)) if picture is None else picture, ""
        if picture:
            shown = f"picture{Path(picture).suffix}"
            shutil.copyfile(picture, Path(temporary, shown))
        Path(temporary, "README.md").write_text(model_card(folder, repo, shown, command), encoding="utf-8")
        commit = api.upload_folder(repo_id=repo, folder_path=temporary, commit_message="Adapter of peft_d2")
    return f"{repo}@{commit.oid}"


def _curves(folder: Path) -> Path | None:
    """The picture of a run's last evaluation, where the folder is what that has evaluated."""
    last = folder.resolve()
    drawn = sorted(last.parent.glob("inference/*/precision.png")) if last.name == "adapter_final" else []
    return drawn[0] if drawn else None


def model_card(folder: str | os.PathLike[str], repo: str, picture: str = "", command: str = "") -> str:
    """The card of an adapter: its base and fingerprint, data, methods, metrics, command, and how to load it."""
    record = json.loads(Path(folder, RECORD).read_bytes())
    is_theirs = json.loads(Path(folder, CONFIG).read_bytes()).get("peft_type") == LORA
    beside = Path(folder).parent / "config.yaml"
    run: dict[str, Any] = (yaml.safe_load(beside.read_bytes()) or {}) if beside.is_file() else {}
    weights, base = _shown(run.get("MODEL", {}).get("WEIGHTS") or "not named by the run"), record["base"]
    start = record.get(STARTED_FROM) or _shown(run.get("MODEL", {}).get("PEFT", {}).get("WEIGHTS") or "")
    rows = [("started from", f"`{start}`")] if start else []
    rows.append(("base", f"`{weights}`, {base['count']} tensors, fingerprint `{base['weights'][:16]}`"))
    for split in ("TRAIN", "TEST"):
        names = run.get("DATASETS", {}).get(split) or ["not named"]
        rows.append((f"data, {split.lower()}", ", ".join(map(str, names))))
    rows += [("method", _method(entry)) for entry in record["methods"]]
    rows.append(("trained in full", ", ".join(f"`{name}`" for name in record["train"]) or "nothing"))
    rows += [(key, f"{v:.4g}" if isinstance(v, float) else v) for key, v in sorted(record["metrics"].items())]
    rows.append(("written by", f"peft_d2 {record['peft_d2_version']}"))
    table = "\n".join(f"| {key} | {value} |".replace("\n", " ") for key, value in rows)
    tags = ["detectron2", "peft", "image-segmentation", *(["lora"] if is_theirs else [])]
    header = yaml.safe_dump({"library_name": "peft_d2", "tags": tags}, sort_keys=False)
    parts = [f"---\n{header}---\n# {repo}", f"| | |\n|---|---|\n{table}"]
    if picture:
        parts.insert(1, f"![Evaluation]({picture})")
    parts.append(f'```python\npeft_d2.load_adapter(model, "{repo}@main")  # or a commit, which stays\n```')
    if command := command or _command(beside.with_name("log.txt")):
        parts.append(f"Trained by `{command}`.")
    reason = record.get(WHY_NOT_PEFT) or "see peft_type in adapter_config.json"
    parts.append(f"Hugging Face's `peft` {'opens it as it is' if is_theirs else f'cannot open it: {reason}'}.")
    return "\n\n".join(parts) + "\n"


def _command(log: Path) -> str:
    """The command line that a run wrote into its log, the newest where it was resumed."""
    text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else ""
    return (re.findall(r"Command: (.+)", text) or [""])[-1].replace("`", "'")


def _shown(path: str) -> str:
    """A path as strangers can use it: of a file on this machine its name."""
    return os.path.basename(path.rstrip("/")) if os.path.isabs(path) else path


def _method(entry: dict[str, Any]) -> str:
    """A method, where, and what is not as it is by default."""
    kind = METHODS.get(entry["NAME"])
    defaults = {} if kind is None else {key.upper(): value for key, value in asdict(kind.options_class()).items()}
    shown = ", ".join(
        f"{key} {value}"
        for key, value in entry.items()
        if key in ("RANK", "ALPHA") or (key not in ("NAME", "TARGETS") and value != defaults.get(key))
    )
    targets = ", ".join(f"`{name}`" for name in entry["TARGETS"])
    return f"{entry['NAME']} on {targets}" + (f" ({shown})" if shown else "")
