"""Over what the ranks of a group agree: NCCL or the CPU backend, the same on all of them.

Ranks that talk over different things wait for each other for ever, so nothing that only one rank
knows may decide.  A group with both backends asks over the CPU backend, in one reduction, whatever
the settings of a rank are: each says what it could do, and all conclude the same from the least of
the answers.  A group with NCCL alone has no choice and asks nothing.

Only calls that all ranks make come here, on the thread that makes them.  The background of a save
runs no collective.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor
from torch.distributed.checkpoint.stateful import Stateful

from . import _native
from ._config import config

__all__ = ["GroupComm", "has_cpu", "has_nccl"]

_NCCL_BACKENDS = ("ProcessGroupNCCL", "ProcessGroupNCCL2")
"""Classes of torch that give their communicator (csrc/bridge/nccl_group.cpp)."""


class _Answer(enum.IntEnum):
    """What a rank can do.  The least one of all ranks counts, and its text is the reason."""

    SETTING = 0
    UNSUPPORTED = 1
    FAILED = 2
    UNUSED = 3
    UNCONNECTED = 4
    READY = 5


_NO_NCCL = "the group has no NCCL backend that gives its communicator"
_CAN_CONNECT = (_Answer.UNUSED, _Answer.UNCONNECTED)
_TEXTS = {
    _Answer.SETTING: "config.comm is 'cpu'",
    _Answer.UNSUPPORTED: "the group's backend for CUDA gives no NCCL communicator that can be used",
    _Answer.FAILED: "the group's NCCL communicator can not be used",
    _Answer.UNUSED: "the process does not use CUDA",
    _Answer.UNCONNECTED: "the group's NCCL communicator is not connected yet",
}
_ANSWERS = {"MISSING": _Answer.UNCONNECTED, "UNSUPPORTED": _Answer.UNSUPPORTED}
"""By the code of the error that a communicator could not be had for."""


def has_cpu(process_group: dist.ProcessGroup) -> bool:
    """Whether the group has a backend for CPU tensors."""
    return torch.device("cpu") in process_group._device_types


def has_nccl(process_group: dist.ProcessGroup) -> bool:
    """Whether the group's backend for CUDA is NCCL in a form that gives its communicator."""
    return type(_cuda_backend(process_group)).__name__ in _NCCL_BACKENDS


def _cuda_backend(process_group: dist.ProcessGroup) -> Any:
    """The backend below what checks its calls (TORCH_DISTRIBUTED_DEBUG=DETAIL), or None."""
    device = torch.device("cuda")
    if device not in process_group._device_types:
        return None
    backend = process_group._get_backend(device)
    while hasattr(backend, "wrapped_pg"):
        backend = backend.wrapped_pg
    return backend


class GroupComm:
    """One ProcessGroup and one coordinator: the native group, and why it is that one."""

    def __init__(self, process_group: dist.ProcessGroup, coordinator_rank: int) -> None:
        self._coordinator_rank = coordinator_rank
        self._cpu: _native.Group | None = None
        self._nccl: _native.Group | None = None
        self._is_settled = not has_nccl(process_group)
        if has_cpu(process_group):
            self._cpu = _native.Group(process_group, coordinator_rank)
            self._cpu.reason = _NO_NCCL if self._is_settled else None

    def group(
        self, process_group: dist.ProcessGroup, state_dict: Any = None, *, is_save: bool = False
    ) -> _native.Group:
        """What the ranks agree over in this call.

        Args:
            process_group: the one this was made for, which must live no longer because of this.
            state_dict: of a call that all ranks make; None: of one that needs no agreement.
            is_save: what the first save finds holds for the group's life.

        Raises:
            RuntimeError: on every rank, when NCCL is asked for or there is nothing else, and it
                can not be used.
        """
        if self._cpu is None:
            if self._nccl is None:
                self._nccl = self._only_nccl(process_group)
        elif not self._is_settled and state_dict is not None:
            self._settle(self._cpu, process_group, state_dict, is_save)
        elif self._nccl is None and self._is_settled and config().comm == "nccl":
            raise RuntimeError(f"config.comm is 'nccl', but {self._cpu.reason}")
        return self._nccl or self._cpu  # type: ignore[return-value]

    def _only_nccl(self, process_group: dist.ProcessGroup) -> _native.Group:
        if config().comm == "cpu":
            raise RuntimeError(
                "config.comm is 'cpu', and the process group has no CPU backend: initialize it "
                "with 'cpu:gloo,cuda:nccl'"
            )
        answer, nccl, text = self._try_nccl(process_group)
        if answer in _CAN_CONNECT:
            _connect(process_group)
            answer, nccl, text = self._try_nccl(process_group)
        if nccl is None:
            raise RuntimeError(f"the process group has no CPU backend, and no other: {text}")
        nccl.reason = "the group has no CPU backend"
        return nccl

    def _settle(
        self,
        cpu: _native.Group,
        process_group: dist.ProcessGroup,
        state_dict: Any,
        is_save: bool,
    ) -> None:
        """Collective: whether it is NCCL.  Everything after the reduction is the same on all."""
        holds = _holds_cuda(state_dict)
        answer, rank, wanted, asked, nccl = self._ask(cpu, process_group, holds)
        if asked and answer in _CAN_CONNECT:
            _connect(process_group)
            answer, rank, wanted, asked, nccl = self._ask(cpu, process_group, holds)
        if answer is _Answer.READY and wanted:
            assert nccl is not None  # this rank's own answer was no less
            nccl.reason = "config.comm is 'nccl'" if asked else "the state dict holds CUDA tensors"
            self._nccl = nccl
            self._is_settled = True
            return
        reason = "no state dict holds CUDA tensors"
        if answer is not _Answer.READY:
            reason = f"{_TEXTS[answer]} (rank {rank})"
        if asked:
            raise RuntimeError(f"config.comm is 'nccl', but {reason}")
        cpu.reason = reason
        self._is_settled = is_save

    def _ask(
        self, cpu: _native.Group, process_group: dist.ProcessGroup, holds_cuda: bool
    ) -> tuple[_Answer, int, bool, bool, _native.Group | None]:
        """The least answer, the first rank that gave it, whether any rank has a use for NCCL,
        whether any asks for it, and this rank's own group over it."""
        answer, nccl, _ = self._try_nccl(process_group)
        asks = config().comm == "nccl"
        least, uses, asked = cpu.reduce_min(
            [answer * cpu.size + cpu.rank, -(holds_cuda or asks), -asks]
        )
        return _Answer(least // cpu.size), least % cpu.size, bool(uses), bool(asked), nccl

    def _try_nccl(
        self, process_group: dist.ProcessGroup
    ) -> tuple[_Answer, _native.Group | None, str]:
        """Local: what this rank can do, with its group or why not."""
        answer, text = _Answer.READY, ""
        if config().comm == "cpu":
            answer = _Answer.SETTING
        elif not torch.cuda.is_initialized():
            answer = _Answer.UNUSED
        else:
            try:
                device = torch.cuda.current_device()
                stream = torch._C._cuda_getCurrentRawStream(device)
                group = _native.Group(process_group, self._coordinator_rank, device, stream)
                return answer, group, text
            except Exception as error:
                answer = _ANSWERS.get(getattr(error, "dcp_code", ""), _Answer.FAILED)
                text = str(error)
        return answer, None, text or _TEXTS[answer]


def _connect(process_group: dist.ProcessGroup) -> None:
    """Collective: NCCL's communicator of the current device."""
    device = torch.device("cuda", torch.cuda.current_device())
    _cuda_backend(process_group).eager_connect_single_device(device)


def _holds_cuda(value: Any) -> bool:
    """Whether there is a CUDA tensor in it; what a Stateful will give is taken for one where CUDA
    is in use, for it is asked later."""
    if not torch.cuda.is_initialized():
        return False
    if isinstance(value, torch.Tensor):
        return value.is_cuda
    if isinstance(value, Mapping):
        return any(map(_holds_cuda, value.values()))
    if isinstance(value, (list, tuple)):
        return any(map(_holds_cuda, value))
    if isinstance(value, ShardedTensor):
        return any(shard.tensor.is_cuda for shard in value.local_shards())
    return isinstance(value, Stateful)
