"""StateDictStager: a state dict copied into host memory that is kept and used again.

Mirrors torch/distributed/checkpoint/_state_dict_stager.py.

The walk collects what has to be copied; the bytes then move in one call of C without the GIL.
Only before code of others runs, which may look at tensors (``__reduce__`` of an object,
``__setstate__``), is everything collected so far copied.  All that a walk has to remember is in
its memo, so one stager may serve several threads.

A storage's copies are kept as long as the storage lives (torch keeps the Python object of one, by
which they are found, as long); _staging_memory.py says when one is used again.
"""

from __future__ import annotations

import copy
import types
import warnings
import weakref
from collections import OrderedDict
from typing import Any

import torch
import torch.cuda._pin_memory_utils as pin_memory_utils
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.storage import UntypedStorage
from torch.utils.weak import WeakIdKeyDictionary

from . import _native
from ._mirror import rest_of_torchs
from ._staging_memory import allocate_shared, take
from ._stock import _state_dict_stager as _torch

__all__ = ["StateDictStager"]

_CPU = torch.device("cpu")
_PENDING = "dcp_native pending copies"
"""Key of a memo: pairs (copy, original) of tensors whose storages are yet to be copied."""
_ABSENT = object()
_ATOMIC = frozenset(
    (
        type(None), int, float, bool, complex, bytes, str, types.CodeType, type, range,
        types.BuiltinFunctionType, types.FunctionType, weakref.ref, property,
    )
)  # fmt: skip
"""Types whose values stay themselves, as in torch."""


class StateDictStager(_torch.StateDictStager):
    """Copies a state dict into CPU memory; torch's signatures.

    Containers and objects are deep copies, tensors are plain ones without a gradient, DTensors and
    other subclasses keep their type; tensors that shared a storage share one again.  Storages that
    were staged before are staged into the same memory, unless someone still uses it.

    Thread rule: safe to share; memory is shared between calls, never between results.

    Args:
        pin_memory: lock the memory for copies from a GPU; ignored, with a warning, without CUDA.
        share_memory: use memory that can be handed to other processes.  Each storage then needs a
            file descriptor; past half of what this process may open, memory is private.
        pin_memory_min_bytes: smaller storages are not pinned.
    """

    def __init__(
        self,
        pin_memory: bool = False,
        share_memory: bool = False,
        pin_memory_min_bytes: int = 5,
    ) -> None:
        # Not torch's: it would make functions that hold this object, a cycle around the memory.
        if pin_memory and not torch.cuda.is_available():
            warnings.warn(
                "pin_memory is ignored for staging: pinning memory needs CUDA, which is not "
                "available",
                stacklevel=2,
            )
            pin_memory = False
        self.pin_memory = pin_memory
        self.share_memory = share_memory
        self.pin_memory_min_bytes = pin_memory_min_bytes
        self._deepcopy_dispatch: dict[type, Any] = {}  # torch's code looks here; _walk is first
        self._cached_storage_mapping: WeakIdKeyDictionary = WeakIdKeyDictionary()
        self._closed = False
        self.devices_in_use: set[torch.device] = set()
        """Devices from which a call with ``non_blocking`` has put copies on their way."""

    def stage(self, state_dict: Any, non_blocking: bool = False) -> Any:
        """Copy ``state_dict``; afterwards every byte of the result is its own.

        Args:
            state_dict: containers, tensors and objects, nested in any way.
            non_blocking: only enqueue copies from an accelerator; the caller synchronises.

        Raises:
            RuntimeError: the stager is closed.
            ValueError: a tensor's memory was freed (its storage is smaller than the tensor).
            What an object raises that can not be copied.
        """
        return self.deepcopy_with_tensor_offload(state_dict, non_blocking=non_blocking)

    def close(self) -> None:
        """Forget the memory kept for later calls; what was staged stays valid."""
        self._closed = True
        self._cached_storage_mapping.clear()

    @torch.no_grad()
    def deepcopy_with_tensor_offload(
        self,
        x: Any,
        memo: dict[Any, Any] | None = None,
        _nil: Any = [],  # noqa: B006 - torch's signature
        non_blocking: bool = False,
    ) -> Any:
        """As ``copy.deepcopy``, with the tensors' memory staged; torch's code for objects calls it
        for their parts.  When it returns, all of the copy is there."""
        if self._closed:
            raise RuntimeError("this stager is closed: make a new one to stage again")
        memo = {} if memo is None else memo
        memo.setdefault(_PENDING, [])
        y = self._walk(x, memo, non_blocking)
        _copy_pending(memo)
        return y

    def _walk(self, x: Any, memo: dict[Any, Any], non_blocking: bool) -> Any:
        cls = type(x)
        if cls in _ATOMIC:
            return x
        y = memo.get(id(x), _ABSENT)
        if y is not _ABSENT:
            return y
        if issubclass(cls, torch.Tensor):
            y = self._offload_tensor(x, memo, non_blocking)
        elif cls is dict or cls is OrderedDict:
            y = memo[id(x)] = cls()
            for key, value in x.items():
                y[self._walk(key, memo, non_blocking)] = self._walk(value, memo, non_blocking)
            if cls is OrderedDict and x.__dict__:
                y.__dict__.update(self._walk(x.__dict__, memo, non_blocking))
        elif cls is list:
            y = memo[id(x)] = []
            for value in x:
                y.append(self._walk(value, memo, non_blocking))
        elif cls is tuple:
            y = tuple([self._walk(value, memo, non_blocking) for value in x])
            y = memo.get(id(x), y)  # it may hold a container that holds it
            if all(map(_is, x, y)):
                return x
        elif issubclass(cls, type):
            return x
        elif cls is types.MethodType:
            y = cls(x.__func__, self._walk(x.__self__, memo, non_blocking))
        else:
            _copy_pending(memo)  # what the object's own code sees has its values
            return super().deepcopy_with_tensor_offload(x, memo, non_blocking=non_blocking)
        memo[id(x)] = y
        self._keep_alive(x, memo)  # the memo knows it by its id
        return y

    def _offload_tensor(
        self, x: torch.Tensor, memo: dict[Any, Any], non_blocking: bool = False
    ) -> torch.Tensor:
        cls = type(x)
        if cls is torch.Tensor or cls is Parameter:
            if x.layout is not torch.strided or x.is_quantized or x.is_nested:
                y = memo[id(x)] = x.detach().to(_CPU, copy=True)
            else:
                y = self._stage_strided(x, memo, non_blocking)
        elif cls is DTensor:
            y = self._stage_dtensor(x, memo, non_blocking)
        elif isinstance(x, AsyncCollectiveTensor):
            return self._walk(x.wait(), memo, non_blocking)
        else:
            _copy_pending(memo)
            return super()._offload_tensor(x, memo, non_blocking)
        for name, value in x.__dict__.items():
            setattr(y, name, self._walk(value, memo, non_blocking))
        return y

    def _stage_dtensor(self, x: DTensor, memo: dict[Any, Any], non_blocking: bool) -> torch.Tensor:
        """The mesh stays the same object: a copy of it would be another set of process groups."""
        local = self._walk(x._local_tensor, memo, non_blocking)
        y = memo[id(x)] = DTensor(local, copy.copy(x._spec), requires_grad=False)
        return y

    def _stage_strided(
        self, x: torch.Tensor, memo: dict[Any, Any], non_blocking: bool
    ) -> torch.Tensor:
        y = memo[id(x)] = torch.empty(0, dtype=x.dtype, device=_CPU)
        storage = x.untyped_storage()
        staged = memo.get(id(storage))
        fresh = staged is None
        if staged is None:
            if storage.nbytes() == 0 and x.numel() > 0:
                raise ValueError(
                    f"a tensor of shape {tuple(x.shape)} can not be staged: its memory was freed"
                )
            staged = memo[id(storage)] = self._take(storage)
            self._keep_alive(storage, memo)
        y.set_(staged, x.storage_offset(), x.size(), x.stride())
        if fresh and x.is_cpu:
            memo[_PENDING].append((y, x))
        elif fresh:
            self._copy_from_device(staged, storage, non_blocking)
        if x.is_conj():
            y = torch._conj(y)
        if x.is_neg():
            y = torch._neg_view(y)
        return y

    def _stage_untyped_storage(
        self, storage: UntypedStorage, non_blocking: bool = False
    ) -> UntypedStorage:
        """A copy of one storage; torch's code calls it for tensors of unknown subclasses."""
        staged = self._take(storage)
        if storage.device == _CPU:
            _native.copy_storages([(_bytes_of(staged), _bytes_of(storage))])
        else:
            self._copy_from_device(staged, storage, non_blocking)
        return staged

    def _copy_from_device(
        self, staged: UntypedStorage, storage: UntypedStorage, non_blocking: bool
    ) -> None:
        staged.copy_(storage, non_blocking=non_blocking)
        if non_blocking:
            self.devices_in_use.add(storage.device)

    def _take(self, storage: UntypedStorage) -> UntypedStorage:
        """Memory for a copy of ``storage``."""
        copies = self._cached_storage_mapping.get(storage)
        if copies is None:
            copies = self._cached_storage_mapping[storage] = []
        return take(copies, storage.nbytes(), self._allocate)

    def _allocate(self, bytes_count: int) -> UntypedStorage:
        staged = None
        if self.share_memory and bytes_count > 0:
            staged = allocate_shared(bytes_count)
        if staged is None:
            staged = UntypedStorage(bytes_count, device=_CPU)
        if self.pin_memory and bytes_count >= self.pin_memory_min_bytes:
            pin_memory_utils.pin_memory(staged.data_ptr(), bytes_count)
            unpin = weakref.finalize(staged, pin_memory_utils.unpin_memory, staged.data_ptr())
            unpin.atexit = False  # the CUDA context may be gone by then
        return staged


def _is(a: object, b: object) -> bool:
    return a is b


def _bytes_of(storage: UntypedStorage) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=_CPU).set_(storage)


def _copy_pending(memo: dict[Any, Any]) -> None:
    if pending := memo[_PENDING]:
        memo[_PENDING] = []
        _native.copy_storages(pending)


__getattr__, __dir__ = rest_of_torchs(__name__)
