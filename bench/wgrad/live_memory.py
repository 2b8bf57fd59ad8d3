"""Bytes of the tensors that are alive, whoever keeps them: Python or autograd's graph."""

from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveMemory(TorchDispatchMode):
    """Counts, while entered, the storages that operators made and that still exist.

    Works on every device, to the byte, without an allocator's rounding; what a kernel needs for
    itself is not seen. Tensors made before do not count. Slow: time nothing under it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak = 0
        """Most bytes alive after any operator."""
        self._made: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operator and note what it made."""
        known = {s.data_ptr() for s in map(_storage, tree_leaves((args, kwargs))) if s is not None}
        result = func(*args, **(kwargs or {}))
        made = False
        for storage in map(_storage, tree_leaves(result)):
            if storage is None or storage.data_ptr() in known or not storage.nbytes():
                continue
            reference = StorageWeakRef(storage)
            self._made[reference.cdata] = reference, storage.nbytes()
            made = True
        if made:
            self.peak = max(self.peak, self.alive())
        return result

    def alive(self) -> int:
        """Bytes that exist now."""
        self._made = {c: (r, n) for c, (r, n) in self._made.items() if not r.expired()}
        return sum(nbytes for _, nbytes in self._made.values())


def _storage(value: Any) -> torch.UntypedStorage | None:
    return value.untyped_storage() if isinstance(value, Tensor) else None
