"""Over what the ranks of a group agree: the choice is the same on all, and its failures too.

Every case makes groups of its own: a group chooses once.
"""

from __future__ import annotations

import contextlib
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
from dcp_native._report import last_report

BOTH = "cpu:gloo,cuda:nccl"
SHORT_TIMEOUT_S = 4
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


def case_one_that_is_not_connected_is_left_alone(c):
    group = new_group(connected=False)
    comm, reason = save(group, c.dir)
    assert comm == "gloo"
    assert reason == "the group's NCCL communicator is not connected yet (rank 0)"


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


def case_the_new_nccl_backend_is_used_and_its_lazy_form_is_not(c):
    assert save(new_group("cpu:gloo,cuda:nccl2"), c.dir / "nccl2")[0] == "nccl"
    comm, reason = save(new_group("cpu:gloo,cuda:nccl-lazy"), c.dir / "lazy")
    assert (comm, "gives its communicator" in reason) == ("gloo", True)


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


def case_a_split_that_fails_fails_the_save_on_every_rank(c):
    group = new_group()
    fake.set_nccl_faults("split=5")
    error = fails_everywhere(group, c.dir)
    fake.set_nccl_faults("")
    assert "splitting the group's NCCL communicator" in str(error)
    reduce(group)
