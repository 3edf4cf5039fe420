"""Adapters on the Hugging Face hub: ``user/name@revision``, to load and to upload."""

from __future__ import annotations

import logging
import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

from peft_d2.storage import adapter_file, card
from peft_d2.storage.adapter_file import FILES, AdapterFileError

_ADDRESS = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)@(?P<revision>[\w./-]+)")
_INSTALL = "pip install 'peft_d2[hub]'"
logger = logging.getLogger(__name__)


def resolved(folder: str | os.PathLike[str]) -> tuple[str | os.PathLike[str], str]:
    """For ``user/name@revision`` the folder in the hub's cache, fetched where that is needed, and ``user/name@commit``.

    Other folders, and those that exist, are as they are, and "". The revision is required, so that a run names what it
    used. Offline (HF_HUB_OFFLINE) the cache alone is asked.

    Raises:
        AdapterFileError: it cannot be fetched, or ``huggingface_hub`` is missing.
    """
    address = _ADDRESS.fullmatch(os.fspath(folder))
    if address is None or os.path.exists(folder):
        return folder, ""
    hub = _hub(folder)
    try:
        local = hub.snapshot_download(address["repo"], revision=address["revision"], allow_patterns=list(FILES))
    except (OSError, ValueError) as error:  # the library's own errors are of these
        said = str(error).strip().partition("\n")[0]
        remedy = "check the name, the revision and your access (hf auth login); offline it has to be in the cache"
        raise AdapterFileError(folder, f"cannot be fetched from the hub: {said}", remedy) from error
    logger.info("Adapter %s is commit %s of %s, in %s", folder, Path(local).name, address["repo"], local)
    return local, f"{address['repo']}@{Path(local).name}"


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
        picture: shown on the card: an image file; or the ``report.html`` of an evaluation, of which the best and the
            worst image are shown with the truth and with what was found, so that these images are published. When
            None, the precision over recall of the run's last evaluation, if ``folder`` is its ``adapter_final``; ""
            for none.
        private: of a repository that is made.
        command: how it was trained, for the card; else what the run's ``log.txt`` says.

    Returns:
        ``user/name@commit``, as :func:`peft_d2.load_adapter` takes it.

    Raises:
        AdapterFileError: the folder is damaged, or ``huggingface_hub`` is missing.
    """
    adapter_file.read(folder)  # whole, and with the checksums that it names
    api = _hub(folder).HfApi()
    api.create_repo(repo, private=private, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        for name in FILES:
            shutil.copyfile(Path(folder, name), Path(temporary, name))
        shown, caption = card.add_picture(folder, picture, temporary)
        text = card.model_card(folder, repo, shown, command, caption)
        Path(temporary, "README.md").write_text(text, encoding="utf-8")
        commit = api.upload_folder(repo_id=repo, folder_path=temporary, commit_message="Adapter of peft_d2")
    return f"{repo}@{commit.oid}"


def _hub(folder: str | os.PathLike[str]) -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise AdapterFileError(folder, "the hub needs the package huggingface_hub", _INSTALL) from error
    return huggingface_hub
