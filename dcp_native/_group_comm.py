"""Over what the ranks of a group agree: NCCL or the CPU backend, the same on all of them.

Ranks that talk over different things wait for each other for ever, so nothing that only one rank
knows may decide, and no rank may leave alone.  Each says what it can do, in one reduction, whatever
its settings are and whatever went wrong on it; all conclude the same from the least of the answers.
A group with both backends asks over the CPU backend, and one with NCCL alone by a collective of
torch's.  Before NCCL is taken for good it has to work: one reduction over our own communicator,
after which the ranks ask each other once more.

What a rank has to fail with, and nobody else, is not raised here: it is left with the group that is
returned, and becomes this rank's word in the first agreement of the call.

Only calls that all ranks make come here, on the thread that makes them.  The background of a save
runs no collective.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed._shard.sharded_tensor import ShardedTensor

from . import _native
from ._config import config
from ._report import logger
from ._stateful import is_stateful

__all__ = ["GroupComm", "has_cpu", "has_nccl", "take_error"]

_NCCL_BACKENDS = ("ProcessGroupNCCL", "ProcessGroupNCCL2", "ProcessGroupNCCLLazy")
"""Classes of torch that give their communicator (csrc/bridge/nccl_group.cpp)."""


class _Answer(enum.IntEnum):
    """What a rank can do.  The least one of all ranks counts, and its text is the reason."""

    INTERRUPTED = 0
    SETTING = 1
    UNSUPPORTED = 2
    FAILED = 3
    UNTRUE = 4
    LATE = 5
    UNUSED = 6
    UNCONNECTED = 7
    READY = 8


_NO_NCCL = "the group has no NCCL backend that gives its communicator"
_HINT = "; a group made with 'cpu:gloo,cuda:nccl' has both"
_CAN_CONNECT = (_Answer.UNUSED, _Answer.UNCONNECTED)
_TEXTS = {
    _Answer.INTERRUPTED: "the call was interrupted",
    _Answer.SETTING: "config.comm is 'cpu'",
    _Answer.UNSUPPORTED: "the group's backend for CUDA gives no NCCL communicator that can be used",
    _Answer.FAILED: "the group's NCCL communicator can not be used",
    _Answer.UNTRUE: "the first reduction over NCCL failed",
    _Answer.LATE: "the first reduction over NCCL did not end in time",
    _Answer.UNUSED: "the process does not use CUDA",
    _Answer.UNCONNECTED: "the group's NCCL communicator is not connected yet",
}
_ANSWERS = {"MISSING": _Answer.UNCONNECTED, "UNSUPPORTED": _Answer.UNSUPPORTED}
"""By the code of the error that a communicator could not be had for."""


@dataclasses.dataclass
class _Found:
    """What this rank can do: the answer, and its group over NCCL while that is possible."""

    answer: _Answer
    nccl: _native.Group | None = None


@dataclasses.dataclass
class _Verdict:
    """What all ranks conclude."""

    answer: _Answer
    rank: int  # the first that gave it
    is_wanted: bool  # some rank has a use for NCCL
    is_asked: bool  # by the settings of some rank

    def text(self) -> str:
        return f"{_TEXTS[self.answer]} (rank {self.rank})"


def has_cpu(process_group: dist.ProcessGroup) -> bool:
    """Whether the group has a backend for CPU tensors."""
    return torch.device("cpu") in process_group._device_types


def has_nccl(process_group: dist.ProcessGroup) -> bool:
    """Whether the group's backend for CUDA is NCCL in a form that gives its communicator."""
    return type(_cuda_backend(process_group)).__name__ in _NCCL_BACKENDS


def take_error(group: _native.Group) -> BaseException | None:
    """What this rank alone has to fail with; it is the caller's to tell the other ranks now."""
    error, group.error = group.error, None
    return error


def _cuda_backend(process_group: dist.ProcessGroup) -> Any:
    """The backend below what checks its calls (TORCH_DISTRIBUTED_DEBUG=DETAIL), or None."""
    device = torch.device("cuda")
    if device not in process_group._device_types:
        return None
    backend = process_group._get_backend(device)
    while hasattr(backend, "wrapped_pg"):
        backend = backend.wrapped_pg
    return backend


def _device(process_group: dist.ProcessGroup) -> torch.device:
    """Where torch connects the group, or will: bound by init_process_group, or the current one."""
    return process_group.bound_device_id or torch.device("cuda", torch.cuda.current_device())


class GroupComm:
    """One ProcessGroup: a native group for each coordinator, over what its ranks have chosen."""

    def __init__(self, process_group: dist.ProcessGroup) -> None:
        self._has_cpu = has_cpu(process_group)
        self._is_settled = not has_nccl(process_group)
        self._reason = _NO_NCCL if self._is_settled else None
        self._waits_for_connection = True  # once
        self._cpu: dict[int, _native.Group] = {}  # by the coordinator's rank
        self._nccl: dict[int, _native.Group] = {}  # empty until it is chosen

    def group(
        self,
        process_group: dist.ProcessGroup,
        coordinator_rank: int,
        state_dict: Any = None,
        *,
        is_save: bool = False,
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
        if not self._has_cpu:
            if not self._nccl:
                self._only_nccl(process_group, coordinator_rank)
            return self._over_nccl(coordinator_rank)
        cpu = self._cpu.get(coordinator_rank)
        if cpu is None:
            cpu = self._cpu[coordinator_rank] = _native.Group(process_group, coordinator_rank)
        if not self._is_settled and state_dict is not None:
            self._settle(cpu, process_group, state_dict, is_save)
        if self._nccl:
            nccl = self._over_nccl(coordinator_rank)
            nccl.error = nccl.error or take_error(cpu)
            return nccl
        cpu.reason = self._reason
        if self._is_settled and config().comm == "nccl":
            cpu.error = cpu.error or RuntimeError(f"config.comm is 'nccl', but {self._reason}")
        return cpu

    def _over_nccl(self, coordinator_rank: int) -> _native.Group:
        """The group of a coordinator; all share one communicator, behind the current stream."""
        group = self._nccl.get(coordinator_rank)
        if group is None:
            any_of_them = next(iter(self._nccl.values()))
            group = any_of_them.with_coordinator(coordinator_rank)
            self._nccl[coordinator_rank] = group
        _follow_current_stream(group)
        return group

    def _only_nccl(self, process_group: dist.ProcessGroup, coordinator_rank: int) -> None:
        """Collective.  The first question connects the group, if nothing else has."""
        talk = _Talk(process_group, coordinator_rank, None)
        verdict = talk.choose(lambda: True)
        if verdict.answer is not _Answer.READY:
            if talk.error is not None:
                raise talk.error
            hint = "" if verdict.answer is _Answer.INTERRUPTED else _HINT
            raise RuntimeError(f"the process group has no CPU backend, and {verdict.text()}{hint}")
        assert talk.found.nccl is not None  # this rank's own answer was no less
        talk.found.nccl.reason = "the group has no CPU backend"
        talk.found.nccl.error = talk.error
        self._nccl[coordinator_rank] = talk.found.nccl

    def _settle(
        self,
        cpu: _native.Group,
        process_group: dist.ProcessGroup,
        state_dict: Any,
        is_save: bool,
    ) -> None:
        """Collective: whether it is NCCL."""
        talk = _Talk(process_group, cpu.coordinator_rank, cpu)
        try:
            verdict = talk.choose(lambda: _holds_cuda(state_dict))
        except Exception as error:  # of the group itself, which is of no use any more
            interrupt = take_error(cpu)
            if interrupt is not None:
                raise interrupt from error
            raise
        cpu.error = cpu.error or talk.error
        if verdict.answer is _Answer.READY and verdict.is_wanted:
            assert talk.found.nccl is not None  # this rank's own answer was no less
            talk.found.nccl.reason = (
                "config.comm is 'nccl'" if verdict.is_asked else "the state dict holds CUDA tensors"
            )
            self._nccl[cpu.coordinator_rank] = talk.found.nccl
            self._is_settled = True
            return
        self._reason = "no state dict holds CUDA tensors"
        if verdict.answer is not _Answer.READY:
            self._reason = verdict.text()
        if verdict.answer is _Answer.INTERRUPTED:
            return  # this call fails; the next one asks again
        if verdict.is_asked:
            refusal = RuntimeError(f"config.comm is 'nccl', but {self._reason}")
            interrupt = take_error(cpu)
            raise refusal if interrupt is None else interrupt
        if verdict.answer is _Answer.UNCONNECTED and verdict.is_wanted and is_save:
            # A save before the first step; the next one may find what that connects.
            self._is_settled = not self._waits_for_connection
            self._waits_for_connection = False
            return
        self._is_settled = is_save


class _Talk:
    """One choice, of one rank among the others: it answers, whatever goes wrong on it."""

    def __init__(
        self, process_group: dist.ProcessGroup, coordinator_rank: int, cpu: _native.Group | None
    ) -> None:
        self.found = _Found(_Answer.INTERRUPTED)
        self.error: BaseException | None = None  # an interrupt
        self._process_group = process_group
        self._coordinator_rank = coordinator_rank
        self._cpu = cpu

    def choose(self, has_use: Callable[[], bool]) -> _Verdict:
        """Collective: READY only if all ranks can use NCCL, and have done so where it is wanted."""
        uses = False

        def look() -> _Found:
            nonlocal uses
            uses = has_use()
            return self._look()

        self._attempt(look)
        verdict = self._ask(uses)
        if (self._cpu is None or verdict.is_asked) and verdict.answer in _CAN_CONNECT:
            self._attempt(self._connect)
            verdict = self._ask(uses)
        if verdict.answer is _Answer.READY and verdict.is_wanted:
            self._attempt(self._try_out)
            verdict = self._ask(uses)
        return verdict

    def _ask(self, uses: bool) -> _Verdict:
        rank, size = dist.get_rank(self._process_group), dist.get_world_size(self._process_group)
        asks = config().comm == "nccl"
        numbers = [self.found.answer * size + rank, -(uses or asks), -asks]
        if self._cpu is None:
            numbers, interrupt = _reduce_by_torch(self._process_group, numbers)
            self.error = self.error or interrupt
        else:
            numbers = self._cpu.reduce_min(numbers)
        least, is_wanted, is_asked = numbers
        return _Verdict(_Answer(least // size), least % size, bool(is_wanted), bool(is_asked))

    def _attempt(self, step: Callable[[], _Found]) -> None:
        """A step of this rank alone."""
        try:
            self.found = step()
        except Exception as error:
            logger.debug("NCCL can not be used: %s", error)
            self.found = _Found(_ANSWERS.get(getattr(error, "dcp_code", ""), _Answer.FAILED))
        except BaseException as error:
            self.error = self.error or error
            self.found = _Found(_Answer.INTERRUPTED)

    def _look(self) -> _Found:
        if config().comm == "cpu":
            return _Found(_Answer.SETTING)
        if not torch.cuda.is_initialized():
            return _Found(_Answer.UNUSED)
        return _Found(_Answer.READY, _nccl_group(self._process_group, self._coordinator_rank))

    def _connect(self) -> _Found:
        """Every rank's, at once.  Without a CPU backend the question before has connected it."""
        if self._cpu is not None:
            device = _device(self._process_group)
            _cuda_backend(self._process_group).eager_connect_single_device(device)
        return self._look()

    def _try_out(self) -> _Found:
        """Every rank's, at once: the first reduction connects our own communicator."""
        nccl = self.found.nccl
        assert nccl is not None
        try:
            _follow_current_stream(nccl)
            if nccl.reduce_min([nccl.rank + 1]) != [1]:
                return _Found(_Answer.UNTRUE)
        except Exception as error:
            logger.warning("a reduction over NCCL failed, the first of its group: %s", error)
            late = isinstance(error, TimeoutError) or getattr(error, "dcp_code", "") == "TIMEOUT"
            return _Found(_Answer.LATE if late else _Answer.UNTRUE)
        finally:
            self.error = self.error or take_error(nccl)
        return self.found


def _nccl_group(process_group: dist.ProcessGroup, coordinator_rank: int) -> _native.Group:
    with torch.cuda.device(_device(process_group)):  # torch looks up the current one's
        return _native.Group(process_group, coordinator_rank, over_nccl=True)


def _follow_current_stream(nccl: _native.Group) -> None:
    nccl.follow(torch._C._cuda_getCurrentRawStream(nccl.device_index))


def _reduce_by_torch(
    process_group: dist.ProcessGroup, numbers: Sequence[int]
) -> tuple[list[int], BaseException | None]:
    """As Group.reduce_min, over the group's own communicator, which it connects.  What interrupts
    the wait for the others is returned: they go on with this rank."""
    device = _device(process_group)
    with torch.cuda.device(device):
        tensor = torch.tensor(numbers, dtype=torch.int64).to(device)
        dist.all_reduce(tensor, dist.ReduceOp.MIN, process_group)
        interrupt = None
        while True:
            try:
                return tensor.cpu().tolist(), interrupt
            except (KeyboardInterrupt, SystemExit) as error:
                interrupt = interrupt or error


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
    return is_stateful(value)
