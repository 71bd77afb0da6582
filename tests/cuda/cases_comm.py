"""Over what the ranks of a group agree: the choice is the same on all, and its failures too.

Every case makes groups of its own: a group chooses once.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from datetime import timedelta

import fake
import pytest
import torch
import torch.distributed as dist
from common import sizes
from device_values import assert_same, blank, on, raw
from torch.distributed.checkpoint.api import CheckpointException

import dcp_native as dcp
from dcp_native import _group_comm, _native
from dcp_native._groups import group_for
from dcp_native._report import last_report

BOTH = "cpu:gloo,cuda:nccl"
SHORT_TIMEOUT_S = 8
NO_CUDA = "no state dict holds CUDA tensors"
HOLDS_CUDA = "the state dict holds CUDA tensors"


def device() -> torch.device:
    index = dist.get_rank() % torch.cuda.device_count()
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def new_group(backend: str = BOTH, connected: bool = True, **how) -> dist.ProcessGroup:
    group = dist.new_group(backend=backend, **how)
    device()
    if connected and group != dist.GroupMember.NON_GROUP_MEMBER:
        reduce(group)
    return group


def reduce(group: dist.ProcessGroup) -> None:
    """A collective of the trainer's over NCCL."""
    tensor = on(device(), torch.tensor([dist.get_rank(group) + 3]))
    dist.all_reduce(tensor, dist.ReduceOp.MIN, group)
    assert tensor.cpu().item() == 3


def state_of(seed: int, where: str | torch.device | None = None) -> dict[str, torch.Tensor]:
    tensors = {f"w.{dist.get_rank()}": raw(torch.float32, 40, 5, seed=seed)}
    return {name: on(where or device(), tensor) for name, tensor in tensors.items()}


def save(group: dist.ProcessGroup, path, where=None, **how) -> tuple[str, str]:
    """Saves, loads what was saved, and says over what."""
    state = state_of(1, where)
    dcp.save(state, checkpoint_id=path, process_group=group, **how)
    report = last_report()
    target = blank("cpu", state)
    dcp.load(target, checkpoint_id=path, process_group=group)
    assert_same(target, {name: tensor.cpu() for name, tensor in state.items()})
    assert report["path"] == "native"
    return report["comm"], report["comm_reason"]


@contextlib.contextmanager
def setting(comm: str) -> Iterator[None]:
    before = dcp.configure(comm=comm)
    try:
        yield
    finally:
        dcp.configure(comm=before.comm)


def fails_everywhere(group: dist.ProcessGroup, path) -> BaseException:
    with pytest.raises((CheckpointException, RuntimeError, TimeoutError)) as caught:
        dcp.save(state_of(2), checkpoint_id=path, process_group=group)
    return caught.value


# ---- the choice ----


def case_a_connected_communicator_serves_a_state_dict_with_cuda_tensors(c):
    group = new_group()
    before = fake.nccl_operations()
    assert save(group, c.dir) == ("nccl", HOLDS_CUDA)
    assert fake.nccl_operations() > before
    assert last_report()["comm"] == "nccl"  # of the load


def case_the_default_group_of_a_job_does_so_too(c):
    reduce(dist.group.WORLD)
    assert save(None, c.dir)[0] == "nccl"


def case_a_steady_save_is_one_vote_and_two_ends(c):
    group = new_group()
    save(group, c.dir / "0")
    counts = []
    for step in (1, 2):
        before = fake.nccl_operations()
        dcp.save(state_of(step), checkpoint_id=c.dir / str(step), process_group=group)
        counts.append(fake.nccl_operations() - before)
    assert counts[0] == counts[1] <= 4


def case_tensors_of_one_rank_are_enough(c):
    where = "cpu" if c.rank != 1 else None
    assert save(new_group(), c.dir, where) == ("nccl", HOLDS_CUDA)


def case_without_cuda_tensors_it_is_the_cpu_backend_for_good(c):
    group = new_group()
    before = fake.nccl_operations()
    assert save(group, c.dir / "cpu", "cpu") == ("gloo", NO_CUDA)
    assert save(group, c.dir / "cuda") == ("gloo", NO_CUDA)
    assert fake.nccl_operations() == before


def case_a_load_leaves_the_choice_to_the_first_save(c):
    state = state_of(3, "cpu")
    dcp.save(state, checkpoint_id=c.dir / "old", process_group=new_group())
    group = new_group()
    dcp.load(blank("cpu", state), checkpoint_id=c.dir / "old", process_group=group)
    assert (last_report()["comm"], last_report()["comm_reason"]) == ("gloo", NO_CUDA)
    assert save(group, c.dir / "new")[0] == "nccl"


def case_one_that_is_not_connected_is_left_alone_until_training_has_connected_it(c):
    group = new_group(connected=False)
    comm, reason = save(group, c.dir / "0")
    assert comm == "gloo"
    assert reason == "the group's NCCL communicator is not connected yet (rank 0)"
    reduce(group)
    assert save(group, c.dir / "1") == ("nccl", HOLDS_CUDA)


def case_one_that_is_not_connected_by_then_is_left_alone_for_good(c):
    group = new_group(connected=False)
    for step in range(2):
        assert save(group, c.dir / str(step))[0] == "gloo"
    reduce(group)
    assert save(group, c.dir / "2")[0] == "gloo"


def case_one_that_is_asked_for_is_connected(c):
    group = new_group(connected=False)
    with setting("nccl" if c.rank == 1 else "auto"):  # one rank is enough
        assert save(group, c.dir, "cpu") == ("nccl", "config.comm is 'nccl'")


def case_one_rank_that_wants_the_cpu_backend_decides_for_all(c):
    group = new_group()
    with setting("cpu" if c.rank == 1 else "auto"):
        assert save(group, c.dir) == ("gloo", "config.comm is 'cpu' (rank 1)")


def case_what_can_not_be_had_is_refused_on_every_rank(c):
    with setting("cpu" if c.rank == 1 else "nccl"):
        error = fails_everywhere(new_group(), c.dir)
    assert str(error) == "config.comm is 'nccl', but config.comm is 'cpu' (rank 1)"
    with setting("nccl"):
        error = fails_everywhere(new_group("gloo", connected=False), c.dir)
    assert "no NCCL backend" in str(error)


def case_a_rank_whose_device_is_full_keeps_all_ranks_from_it(c):
    group = new_group()
    with fake.largest_allocation(4096 if c.rank == 1 else 0):
        comm, reason = save(group, c.dir)
    assert comm == "gloo"
    assert reason == "the group's NCCL communicator can not be used (rank 1)"


@sizes(3)
def case_a_group_of_some_ranks_has_ranks_of_its_own(c):
    group = new_group(ranks=[0, 2])
    if c.rank != 1:
        assert save(group, c.dir) == ("nccl", HOLDS_CUDA)
    c.barrier()


def case_the_new_nccl_backend_is_used_and_so_is_its_lazy_form(c):
    for backend in ("nccl2", "nccl-lazy"):
        group = new_group(f"cpu:gloo,cuda:{backend}")
        assert save(group, c.dir / backend) == ("nccl", HOLDS_CUDA)
        reduce(group)
    group = new_group("cpu:gloo,cuda:nccl-lazy", connected=False)
    assert save(group, c.dir / "unconnected")[0] == "gloo"
    with setting("nccl"):
        assert save(new_group("nccl-lazy", connected=False), c.dir / "alone")[0] == "nccl"


def case_a_group_that_is_bound_to_a_device_is_used_from_another(c):
    here = device()
    group = new_group(device_id=here)
    torch.cuda.set_device((here.index + 1) % 2)
    comm, reason = save(group, c.dir, here)
    assert torch.cuda.current_device() != here.index
    device()
    assert (comm, reason) == ("nccl", HOLDS_CUDA)


def case_coordinators_of_a_group_share_one_communicator(c):
    group = new_group()
    assert save(group, c.dir / "0")[0] == "nccl"
    with fake.counted("cudaStreamCreateWithFlags") as streams:
        other = group_for(group, False, 1, state_dict={}, is_save=True)
        assert (other.kind, other.coordinator_rank, other.reason) == ("nccl", 1, HOLDS_CUDA)
        assert other.reduce_min([c.rank + 2]) == [2]
        assert save(group, c.dir / "1")[0] == "nccl"
    assert streams["cudaStreamCreateWithFlags"] == 0


def case_a_backend_that_checks_collectives_is_looked_through(c):
    before = dist.get_debug_level()
    dist.set_debug_level(dist.DebugLevel.DETAIL)
    try:
        group = new_group()
        backend = group._get_backend(torch.device("cuda"))
        assert type(backend).__name__ == "_ProcessGroupWrapper"
        assert save(group, c.dir)[0] == "nccl"
    finally:
        dist.set_debug_level(before)


def case_a_group_without_a_cpu_backend_has_no_choice(c):
    group = new_group("nccl", connected=False)
    with setting("cpu"):
        assert "has no CPU backend" in str(fails_everywhere(group, c.dir))
    assert save(group, c.dir) == ("nccl", "the group has no CPU backend")


def case_a_save_without_collectives_chooses_nothing(c):
    group = new_group(connected=False)
    state = state_of(4)
    dcp.save(state, checkpoint_id=c.dir / "0", process_group=group, use_collectives=False)
    assert (last_report()["comm"], last_report()["comm_reason"]) == ("gloo", None)
    reduce(group)
    assert save(group, c.dir / "1")[0] == "nccl"


def case_a_background_save_agrees_on_the_calling_thread(c):
    group = new_group()
    state = state_of(5)
    future = dcp.async_save(state, checkpoint_id=c.dir, process_group=group)
    after = fake.nccl_operations()
    future.result(timeout=60)
    assert fake.nccl_operations() == after
    assert (future.report["comm"], future.report["comm_reason"]) == ("nccl", HOLDS_CUDA)


# ---- failures ----


def broken(c, faults: str, timeout_s: int = 30) -> str:
    """A first save that is well, one with faults, one after it; the text of the second."""
    group = new_group(timeout=timedelta(seconds=timeout_s))
    assert save(group, c.dir / "0")[0] == "nccl"
    fake.set_nccl_faults(faults)
    started = time.monotonic()
    error = fails_everywhere(group, c.dir / "1")
    assert time.monotonic() - started < 60
    fake.set_nccl_faults("")
    refused = str(fails_everywhere(group, c.dir / "2"))
    assert "earlier" in refused
    reduce(group)  # the trainer's own communicator is as good as before
    return str(error)


def case_an_asynchronous_error_fails_the_save_on_every_rank(c):
    assert "remote process exited" in broken(c, "async=6@1")


def case_a_refused_operation_fails_the_save_on_every_rank(c):
    assert "internal error" in broken(c, "fail=3@1")


def case_a_hang_ends_at_the_groups_timeout(c):
    assert "timed out" in broken(c, "hang@1", SHORT_TIMEOUT_S)


def case_a_communicator_that_can_not_be_split_leaves_all_ranks_on_the_cpu_backend(c):
    group = new_group()
    fake.set_nccl_faults("split=5")
    comm, reason = save(group, c.dir / "0")
    fake.set_nccl_faults("")
    assert (comm, reason) == ("gloo", "the first reduction over NCCL failed (rank 0)")
    assert save(group, c.dir / "1")[0] == "gloo"  # for good
    reduce(group)


def case_a_first_reduction_that_fails_on_one_rank_leaves_all_on_the_cpu_backend(c):
    for fault in ("fail=3@1", "async=6@1"):
        group = new_group(timeout=timedelta(seconds=SHORT_TIMEOUT_S))
        fake.set_nccl_faults(fault if c.rank == 1 else "")
        comm, reason = save(group, c.dir / fault)
        fake.set_nccl_faults("")
        assert (comm, reason) == ("gloo", "the first reduction over NCCL failed (rank 1)")
        reduce(group)


def case_a_first_reduction_that_hangs_ends_in_time_and_is_refused_where_it_is_asked_for(c):
    group = new_group(timeout=timedelta(seconds=SHORT_TIMEOUT_S))
    fake.set_nccl_faults("hang@1" if c.rank == 1 else "")
    with setting("nccl" if c.rank == 0 else "auto"):
        error = fails_everywhere(group, c.dir / "0")
    fake.set_nccl_faults("")
    assert str(error).startswith("config.comm is 'nccl', but the first reduction over NCCL")
    assert save(group, c.dir / "1")[0] == "nccl"  # nothing was chosen
    reduce(group)


# ---- ranks with errors of their own ----


def case_nccl_that_one_rank_asks_for_too_late_fails_the_call_on_all(c):
    group = new_group()
    assert save(group, c.dir / "0", "cpu")[0] == "gloo"
    with setting("nccl" if c.rank == 1 else "auto"):
        error = fails_everywhere(group, c.dir / "1")
        assert isinstance(error, CheckpointException) and set(error.failures) == {1}
        with pytest.raises(CheckpointException) as caught:
            dcp.load(blank("cpu", state_of(1)), checkpoint_id=c.dir / "0", process_group=group)
        assert set(caught.value.failures) == {1}
    assert save(group, c.dir / "2")[0] == "gloo"


@contextlib.contextmanager
def interrupted(is_here: bool, name: str) -> Iterator[None]:
    """A function of _group_comm is interrupted."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = getattr(_group_comm, name)
    if is_here:
        setattr(_group_comm, name, interrupt)
    try:
        yield
    finally:
        setattr(_group_comm, name, before)


def breaks_off(c, group: dist.ProcessGroup) -> None:
    """A save in which rank 1 alone is interrupted."""
    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt if c.rank == 1 else BaseException) as caught:
        dcp.save(state_of(2), checkpoint_id=c.dir / "x", process_group=group)
    assert time.monotonic() - started < 20  # long before the group's timeout
    if c.rank != 1:
        assert isinstance(caught.value, (CheckpointException, RuntimeError))
        assert "interrupt" in str(caught.value).lower()


def case_an_interrupt_of_one_rank_while_they_choose_fails_the_call_and_chooses_nothing(c):
    for name in ("_holds_cuda", "_nccl_group"):
        group = new_group()
        with interrupted(c.rank == 1, name):
            breaks_off(c, group)
        assert save(group, c.dir / name) == ("nccl", HOLDS_CUDA)


def case_it_does_so_without_a_cpu_backend(c):
    group = new_group("nccl")
    with interrupted(c.rank == 1, "_nccl_group"):
        breaks_off(c, group)
    assert save(group, c.dir / "1")[0] == "nccl"


def case_a_full_device_of_one_rank_is_refused_on_all_without_a_cpu_backend(c):
    group = new_group("nccl")
    started = time.monotonic()
    with fake.largest_allocation(4096 if c.rank == 1 else 0):
        error = fails_everywhere(group, c.dir)
    assert time.monotonic() - started < 20
    assert "has no CPU backend, and the group's NCCL communicator can not be used (rank 1)" in str(
        error
    )
    assert save(group, c.dir / "1")[0] == "nccl"


def case_an_interrupt_in_a_reduction_is_kept_for_the_next_agreement(c):
    group = _native.Group(dist.group.WORLD)
    flag = c.dir / "sent"
    if c.rank == 1:

        def send():
            time.sleep(0.5)  # until the reduction waits
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.3)
            flag.touch()

        threading.Thread(target=send, daemon=True).start()
    while c.rank != 1 and not flag.exists():
        time.sleep(0.01)
    assert group.reduce_min([c.rank + 4]) == [4]
    error = _group_comm.take_error(group)
    assert isinstance(error, KeyboardInterrupt) if c.rank == 1 else error is None
    assert group.error is None
