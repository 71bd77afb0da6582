"""The comm table of `_bridge` on real ranks over gloo.  Loaded by tests/py/test_bridge.py.

    python bridge_ranks.py OUT_DIR [PATH_OF_BRIDGE [LONGEST_BYTES]]

One process imports torch and forks the ranks, which share its import time; each then runs every
``case_*`` in order, with a group of its own for each, and writes one JSON line a case.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import json
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import ModuleType

import torch
import torch.distributed as dist
from bridge_table import BridgeTable, Code, Comm, CommError, filler, pattern, table_of
from torch._subclasses.fake_tensor import FakeTensorMode

SIZE = 3
WORLD_TIMEOUT_S = 30
LENGTHS = (0, 1, 8, 1000, 4097, (1 << 20) + 3, (9 << 20) + 5)
LONGEST_BYTES = int(sys.argv[3]) if len(sys.argv) > 3 else LENGTHS[-1]


class Context:
    """What a case knows.  `passed` is for a rank that will not return."""

    def __init__(self, rank: int, table: BridgeTable, passed: Callable[[], None]) -> None:
        self.rank, self.table, self.passed = rank, table, passed

    def comm(self, ranks: list[int] | None = None, timeout_s: float = 10) -> Comm:
        """Collective in WORLD; raises CommError where this rank is no member."""
        return Comm(self.table, dist.new_group(ranks, timeout=timedelta(seconds=timeout_s)))


def exchange(comm: Comm, length: int) -> None:
    """Every collective once, from and to every rank."""
    me, size = comm.rank, comm.size
    for root in range(size):
        gathered = comm.gather(root, pattern(me, length, 1))
        if me == root:
            assert torch.equal(gathered, torch.cat([pattern(i, length, 1) for i in range(size)]))
        parts = torch.cat([pattern(i, length, 2) for i in range(size)]) if me == root else None
        assert torch.equal(comm.scatter(root, parts, length), pattern(me, length, 2))
        data = pattern(root, length, 3) if me == root else filler(length)
        assert torch.equal(comm.broadcast(root, data), pattern(root, length, 3))
    gathered = comm.all_gather(pattern(me, length, 4))
    assert torch.equal(gathered, torch.cat([pattern(i, length, 4) for i in range(size)]))
    check_minimum(comm)


def check_minimum(comm: Comm) -> None:
    lowest, highest = -(1 << 63), (1 << 63) - 1
    lanes = [comm.rank, -comm.rank, highest if comm.rank else lowest, highest, 7] + [0] * 11
    assert comm.all_reduce_min(lanes) == [0, 1 - comm.size, lowest, highest, 7] + [0] * 11


def case_every_collective_moves_every_length(ctx):
    comm = ctx.comm()
    assert (comm.rank, comm.size, comm.kind) == (ctx.rank, SIZE, "gloo")
    for length in LENGTHS:
        if length <= LONGEST_BYTES:
            exchange(comm, length)
    many = list(range(ctx.rank, ctx.rank + 100_000))
    assert comm.all_reduce_min(many) == list(range(100_000))
    comm.close()


def case_ranks_of_a_subgroup_are_its_own(ctx):
    if ctx.rank == 0:
        try:
            ctx.comm([1, 2])
        except CommError as error:
            assert error.code is Code.INVALID and "only members of a group" in str(error)
            return
        raise AssertionError("a rank outside the group got its table")
    comm = ctx.comm([1, 2])
    assert (comm.rank, comm.size) == (ctx.rank - 1, 2)
    for length in (0, 5, 70_000):
        exchange(comm, length)
    comm.close()


def case_two_groups_do_not_mix(ctx):
    first, second = ctx.comm(), ctx.comm()
    for comm, other in ((first, second), (second, first)):
        exchange(comm, 10)
        exchange(other, 2000)
    first.close()
    exchange(second, 10)
    second.close()


def case_debug_level_detail_wraps_the_backend(ctx):
    before = dist.get_debug_level()
    dist.set_debug_level(dist.DebugLevel.DETAIL)
    try:
        comm = ctx.comm()
        for length in (0, 9, 5000):
            exchange(comm, length)
        comm.close()
    finally:
        dist.set_debug_level(before)


def case_threads_and_modes_of_torch_do_not_matter(ctx):
    comm = ctx.comm()
    failures = []

    def body():
        try:
            exchange(comm, 3000)
        except BaseException:
            failures.append(traceback.format_exc())

    thread = threading.Thread(target=body)
    thread.start()
    while thread.is_alive():
        time.sleep(0.001)  # and takes the GIL back
    thread.join()
    assert not failures, failures[0]
    lanes = [5 - ctx.rank]
    with FakeTensorMode(), torch.inference_mode():
        assert comm.all_reduce_min(lanes) == [6 - SIZE]
    comm.close()


def case_the_table_outlives_the_group_in_torch(ctx):
    group = dist.new_group()
    comm = Comm(ctx.table, group)
    dist.destroy_process_group(group)
    del group
    exchange(comm, 100)
    comm.close()


def case_a_group_without_a_cpu_backend_is_refused(ctx):
    try:
        Comm(ctx.table, dist.new_group(backend="cuda:gloo"))
    except CommError as error:
        assert error.code is Code.COMM and "cpu:gloo" in str(error), str(error)
        assert error.rank == ctx.rank
    else:
        raise AssertionError("a group for CUDA alone was accepted")


def fails(what: Callable[[], object]) -> tuple[CommError, float]:
    """The error that `what` raises, and after how many seconds."""
    start = time.monotonic()
    try:
        what()
    except CommError as error:
        return error, time.monotonic() - start
    raise AssertionError("the call succeeded")


def refused(comm: Comm) -> None:
    """Every call on a poisoned group fails at once, names the first failure and what to do."""
    for call in (
        lambda: comm.all_reduce_min([1]),
        lambda: comm.gather(0, filler(4)),
        lambda: comm.all_gather(filler(4)),
        lambda: comm.scatter(0, filler(4 * SIZE), 4),
        lambda: comm.broadcast(0, filler(4)),
    ):
        error, seconds = fails(call)
        assert error.code is Code.COMM and seconds < 0.5, (str(error), seconds)
        assert "an earlier call" in str(error) and "make a new process group" in str(error)


def case_an_absent_rank_is_a_timeout_and_poisons_the_group(ctx):
    comm = ctx.comm(timeout_s=1)
    check_minimum(comm)
    codes = [None] * SIZE
    if ctx.rank != SIZE - 1:
        error, seconds = fails(lambda: comm.all_reduce_min([1] * 16))
        assert error.rank == ctx.rank and "all_reduce of 128 bytes" in str(error), str(error)
        assert seconds < 5, seconds
        refused(comm)
        dist.all_gather_object(codes, error.code)
    else:
        dist.all_gather_object(codes, None)
        error, seconds = fails(lambda: comm.all_reduce_min([1]))  # the others have gone
        assert seconds < 5, seconds
        refused(comm)
    assert Code.TIMEOUT in codes[:-1] and set(codes[:-1]) <= {Code.TIMEOUT, Code.COMM}, codes
    comm.close()
    other = ctx.comm()
    exchange(other, 10)
    other.close()


def case_a_killed_peer_is_an_error_on_every_survivor(ctx):
    """The last one: torch's own WORLD does not survive it either."""
    comm = ctx.comm()
    check_minimum(comm)
    if ctx.rank == SIZE - 1:
        ctx.passed()
        os.kill(os.getpid(), signal.SIGKILL)
    error, seconds = fails(lambda: comm.all_reduce_min([1] * 16))
    assert error.code is Code.COMM and seconds < 5, (str(error), seconds)
    assert "see that all ranks are alive" in str(error), str(error)
    refused(comm)
    comm.close()


def load_bridge(path: str) -> ModuleType:
    """Another build of `_bridge`, beside the installed one."""
    loader = importlib.machinery.ExtensionFileLoader("dcp_native._bridge", path)
    spec = importlib.util.spec_from_file_location("dcp_native._bridge", path, loader=loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def run_rank(rank: int, out: Path, table: BridgeTable) -> None:
    dist.init_process_group(
        "gloo",
        init_method=f"file://{out}/store",
        rank=rank,
        world_size=SIZE,
        timeout=timedelta(seconds=WORLD_TIMEOUT_S),
    )
    with open(out / f"rank{rank}.jsonl", "w", buffering=1) as log:
        for name, case in list(globals().items()):
            if not name.startswith("case_"):
                continue

            def report(failure: str | None = None, name: str = name) -> None:
                print(json.dumps({"case": name, "failure": failure}), file=log)

            failure = None
            try:
                case(Context(rank, table, report))
            except BaseException:
                failure = traceback.format_exc()
            report(failure)


def main() -> None:
    out = Path(sys.argv[1])
    if len(sys.argv) > 2:
        bridge = load_bridge(sys.argv[2])
    else:
        from dcp_native import _bridge as bridge
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    with FakeTensorMode():
        pass  # the first one imports a lot
    table = table_of(bridge)
    children = []
    for rank in range(SIZE):
        child = os.fork()
        if child == 0:
            try:
                run_rank(rank, out, table)
            finally:
                sys.stderr.flush()
                os._exit(0)  # the parent's exit handlers are not ours
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
