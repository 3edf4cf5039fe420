# ruff: noqa: F401
"""What is stored: base checkpoints and adapter files, written so that no kill can damage them. Needs torch alone."""

from peft_d2.storage.adapter_file import AdapterFile, AdapterFileError
from peft_d2.storage.checkpoint import Checkpoint, CheckpointError, LoadReport, load_base, read_checkpoint
from peft_d2.storage.disk import Fingerprint, StorageError, fingerprint
