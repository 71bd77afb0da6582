"""DefaultStager and BlockingAsyncStager, which also work without an accelerator.

Mirrors torch/distributed/checkpoint/staging.py.  A stager that is handed to ``async_save`` as it
is never gets to stage: the save copies into its own memory then.  What is here serves callers of
``stage()`` and saves by custom planners and writers.
"""

from __future__ import annotations

import copy
import io
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import torch
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.metadata import STATE_DICT_TYPE
from torch.distributed.checkpoint.staging import AsyncStager, StagingOptions
from torch.distributed.tensor import DTensor
from torch.storage import UntypedStorage

from ._mirror import rest_of_torchs, stands_for
from ._staging_memory import take
from ._state_dict_stager import StateDictStager
from ._stock import staging as _torch

__all__ = ["AsyncStager", "BlockingAsyncStager", "DefaultStager", "StagingOptions"]


@stands_for(_torch.DefaultStager)
class DefaultStager(_torch.DefaultStager):
    """Stages on the calling thread or in one of its own; torch's options, on any host.

    Without an accelerator there is nothing to pin memory for and no copy that could run ahead, so
    those two options are ignored; the others mean what they say.

    Stages one state dict at a time, in order, any number of them.  A staged dict is the caller's:
    no later stage changes it, and its memory is used again when the caller has dropped it.

    Args:
        config: see torch's :class:`StagingOptions`; all on by default.
    """

    def __init__(self, config: StagingOptions = StagingOptions()) -> None:  # noqa: B008
        accelerated = torch.accelerator.is_available()
        self._config = config
        self._state_dict_stager = StateDictStager(
            pin_memory=config.use_pinned_memory and torch.cuda.is_available(),
            share_memory=config.use_shared_memory,
        )
        self._staging_executor: ThreadPoolExecutor | None = None
        self._staging_stream: torch.Stream | None = None
        if config.use_async_staging:
            self._staging_executor = ThreadPoolExecutor(1, "dcp_native-stager")
            if accelerated:
                # Here, not on its thread, which could be given the stream that computes.
                self._staging_stream = torch.Stream()
        self._non_blocking = config.use_non_blocking_copy and accelerated
        self._staging_future: Future[STATE_DICT_TYPE] | None = None
        self._closed = False

    def stage(
        self, state_dict: STATE_DICT_TYPE, **kwargs: Any
    ) -> STATE_DICT_TYPE | Future[STATE_DICT_TYPE]:
        """A copy of ``state_dict`` in host memory, or a future of it with ``use_async_staging``.

        Tensors may be changed once the copy is there.

        Raises:
            RuntimeError: the stager is closed.
            What :meth:`StateDictStager.stage` raises, on the future if there is one.
        """
        if self._closed:
            raise RuntimeError("this stager is closed: make a new one to stage again")
        if self._staging_executor is None:
            return self._stage(state_dict, **kwargs)
        if self._staging_stream is not None:  # what computes the tensors may yet be under way
            self._staging_stream.wait_stream(torch.accelerator.current_stream())
        self._staging_future = self._staging_executor.submit(self._stage, state_dict, **kwargs)
        return self._staging_future

    def _stage(self, state_dict: STATE_DICT_TYPE, **kwargs: Any) -> STATE_DICT_TYPE:
        stager, stream = self._state_dict_stager, self._staging_stream
        with stream or nullcontext():
            staged = stager.stage(state_dict, non_blocking=self._non_blocking)
        while stager.devices_in_use:
            device = stager.devices_in_use.pop()
            if stream is not None and stream.device == device:
                stream.synchronize()
            else:  # copied on its current stream, which `stream` says nothing about
                torch.accelerator.synchronize(device)
        return staged

    def synchronize_staging(self) -> None:
        """Wait until the last ``stage()`` is done; raises what it raised."""
        if self._staging_future is not None:
            self._staging_future.result()

    def close(self) -> None:
        """Finish what was begun, then let go of thread and memory; staged dicts stay valid."""
        self._closed = True
        if self._staging_executor is not None:
            self._staging_executor.shutdown(wait=True)
        self._state_dict_stager.close()


@stands_for(_torch.BlockingAsyncStager)
class BlockingAsyncStager(_torch.BlockingAsyncStager):
    """Stages on the calling thread; every tensor gets memory of its own, aliases or not.

    Args:
        cache_staged_state_dict: keep the memory (pinned, if there is an accelerator) for the next
            state dict, as far as nobody holds a tensor of the last one then.
        type_check: refuse values that torch's own list of types does not have; with a cache they
            always are.
    """

    def __init__(self, cache_staged_state_dict: bool = False, type_check: bool = False) -> None:
        # By name: classes call this as BlockingAsyncStager.__init__ that derive from torch's.
        _torch.BlockingAsyncStager.__init__(self, cache_staged_state_dict, type_check)
        self.state_dict_cache: dict[tuple[Any, ...], list[UntypedStorage]] | None = None

    @torch.no_grad()
    def stage(self, state_dict: STATE_DICT_TYPE) -> STATE_DICT_TYPE:
        """A copy of ``state_dict`` in host memory; tensors may be changed when it returns.

        Dicts, lists and tuples of any kind become plain ones, as with torch.

        Raises:
            ValueError: a value of another type, where those are refused.
        """
        kept = self.state_dict_cache or {}
        self.state_dict_cache = {} if self.cache_staged_state_dict else None
        return self._copy(state_dict, (), kept)

    def _copy(
        self, x: Any, path: tuple[Any, ...], kept: dict[tuple[Any, ...], list[UntypedStorage]]
    ) -> Any:
        if isinstance(x, ShardedTensor):
            on_host = all(shard.tensor.is_cpu for shard in x.local_shards())
            return copy.deepcopy(x) if on_host else x.cpu()
        if isinstance(x, DTensor):
            local = self._copy(x._local_tensor, path, kept)
            return DTensor(local, copy.copy(x._spec), requires_grad=x.requires_grad)
        if isinstance(x, torch.Tensor):
            return self._copy_tensor(x, path, kept)
        if isinstance(x, dict):
            return {key: self._copy(value, (*path, key), kept) for key, value in x.items()}
        if isinstance(x, (list, tuple)):
            made = [self._copy(value, (*path, i), kept) for i, value in enumerate(x)]
            return tuple(made) if isinstance(x, tuple) else made
        if x is None or isinstance(x, (int, float, str, bytes)):
            return x
        checks = self.type_check or self.cache_staged_state_dict
        if checks and not isinstance(x, io.BytesIO):
            raise ValueError(f"Unexpected value type {type(x)}")
        return copy.deepcopy(x)

    def _copy_tensor(
        self,
        x: torch.Tensor,
        path: tuple[Any, ...],
        kept: dict[tuple[Any, ...], list[UntypedStorage]],
    ) -> torch.Tensor:
        if x.layout is not torch.strided or x.is_quantized or x.is_nested:
            return x.detach().to("cpu", copy=True)
        if self.state_dict_cache is None:
            return torch.empty(x.size(), dtype=x.dtype, device="cpu").copy_(x)
        copies = self.state_dict_cache[path] = kept.pop(path, [])
        storage = take(copies, x.numel() * x.element_size(), _allocate_pinned)
        staged = torch.empty(0, dtype=x.dtype, device="cpu")
        return staged.set_(storage, 0, x.size()).copy_(x)

    def synchronize_staging(self) -> None:
        """Nothing to wait for: staging blocks."""

    def close(self) -> None:
        """Let go of the memory that was kept; staged dicts stay valid."""
        self.state_dict_cache = None


def _allocate_pinned(bytes_count: int) -> UntypedStorage:
    pin_memory = torch.accelerator.is_available() and bytes_count > 0
    memory = torch.empty(bytes_count, dtype=torch.uint8, device="cpu", pin_memory=pin_memory)
    return memory.untyped_storage()


__getattr__, __dir__ = rest_of_torchs(__name__)
