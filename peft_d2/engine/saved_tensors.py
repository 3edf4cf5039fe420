"""How much autograd keeps for the backward pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SavedTensors:
    """Counts what autograd saves for the backward pass inside a ``with`` block.

    Attributes:
        count: tensors that are no weight or buffer of the model, each saving counted.
        bytes: of the storages behind them, each once.
    """

    def __init__(self, model: nn.Module) -> None:
        self._weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
        self._storages: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self.count = 0

    @property
    def bytes(self) -> int:
        return sum(self._storages.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._weights:
            self.count += 1
            self._storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    def __enter__(self) -> SavedTensors:
        self._hooks.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)
