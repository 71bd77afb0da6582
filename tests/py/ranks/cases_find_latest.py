"""find_latest and verify as collective calls: one answer, the same on every rank."""

from __future__ import annotations

import logging

import torch.distributed as dist
from common import gather_all, mesh_of, shard, sizes, value
from torch.distributed.tensor import Shard

import dcp_native as dcp
from dcp_native import _verify


def save(ctx, name, **settings):
    state = {
        "w": shard(value("w", (64, 100)), mesh_of(ctx.size), Shard(0)),
        "replicated": value("r", (40,)),
        "step": 4,
    }
    dcp.save(state, checkpoint_id=ctx.dir / name, **settings)


def damage(ctx, name, rank):
    """One byte in the middle of a file that `rank` wrote."""
    ctx.barrier()
    if ctx.rank == 0:
        file = max((ctx.dir / name).glob(f"__{rank}_*.distcp"))
        data = bytearray(file.read_bytes())
        data[len(data) // 3] ^= 1
        file.write_bytes(data)
    ctx.barrier()


def case_every_rank_gets_the_same_answer(ctx):
    group = dist.group.WORLD
    assert dcp.find_latest(ctx.dir, process_group=group) is None
    for step in (9, 10):
        save(ctx, f"step-{step}")
    for verify in (False, "structure", True):
        found = dcp.find_latest(ctx.dir, verify=verify, process_group=group)
        assert found == ctx.dir / "step-10", found
    damage(ctx, "step-10", ctx.size - 1)
    assert dcp.find_latest(ctx.dir, process_group=group).name == "step-10"
    assert dcp.find_latest(ctx.dir, verify=True, process_group=group).name == "step-9"
    damage(ctx, "step-9", 0)
    assert dcp.find_latest(ctx.dir, verify=True, process_group=group) is None


def case_only_the_first_rank_looks_and_the_key_is_its_own(ctx):
    for name in ("a", "b"):
        save(ctx, name)
    key = {True: lambda path: path.name == "a", False: None}[ctx.rank == 0]
    found = dcp.find_latest(ctx.dir, key=key, process_group=dist.group.WORLD)
    assert gather_all(found.name) == ["a"] * ctx.size


def case_an_error_of_the_first_rank_is_everybodys(ctx):
    try:
        dcp.find_latest(ctx.dir / "nowhere", process_group=dist.group.WORLD)
    except FileNotFoundError as error:
        assert error.filename is not None
    else:
        raise AssertionError("no FileNotFoundError")

    def fails(path):
        raise KeyboardInterrupt

    save(ctx, "step-1")
    want = KeyboardInterrupt if ctx.rank == 0 else RuntimeError
    try:
        dcp.find_latest(ctx.dir, key=fails, process_group=dist.group.WORLD)
    except want:
        pass
    else:
        raise AssertionError("no interrupt")
    assert dcp.find_latest(ctx.dir, process_group=dist.group.WORLD).name == "step-1"


@sizes(2)
def case_a_group_without_the_first_rank(ctx):
    save(ctx, "step-1")
    group = dist.new_group([1])
    if ctx.rank == 1:
        assert dcp.find_latest(ctx.dir, verify=True, process_group=group).name == "step-1"
    ctx.barrier()


def case_ranks_divide_the_files_of_a_check(ctx):
    save(ctx, "one")
    alone = dcp.verify(ctx.dir / "one")
    together = dcp.verify(ctx.dir / "one", process_group=dist.group.WORLD)
    assert alone and together and alone.files == ctx.size
    for name in ("files", "file_bytes", "checked_bytes", "records", "tensors", "objects"):
        assert getattr(alone, name) == getattr(together, name), name
    assert gather_all(together) == [together] * ctx.size
    for rank in range(ctx.size):
        damage(ctx, "one", rank)
    together = dcp.verify(ctx.dir / "one", process_group=dist.group.WORLD)
    assert together.problems_found == ctx.size
    assert {problem.code for problem in together.problems} == {"CHECKSUM"}
    assert gather_all(together) == [together] * ctx.size


def case_one_warning_of_a_skipped_checkpoint(ctx):
    save(ctx, "step-1")
    save(ctx, "step-2")
    damage(ctx, "step-2", 0)
    told = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())
    logger = logging.getLogger("dcp_native")
    logger.addHandler(handler)
    try:
        dcp.find_latest(ctx.dir, verify=True, process_group=dist.group.WORLD)
    finally:
        logger.removeHandler(handler)
    told = [text for text in told if "find_latest" in text]
    assert len(told) == (ctx.rank == 0), told


def case_checkpoints_of_single_ranks(ctx):
    save(ctx, "step-1", use_collectives=False)
    ctx.barrier()
    result = dcp.verify(ctx.dir / "step-1", process_group=dist.group.WORLD)
    assert result and result.ranks == tuple(range(ctx.size))
    assert result.partial_tensors == ctx.size  # each rank's metadata has its rows
    found = dcp.find_latest(ctx.dir, verify=True, process_group=dist.group.WORLD)
    assert found.name == "step-1"


def case_ranks_that_see_different_checkpoints_say_so(ctx):
    """Without a save_id too: metadata of single ranks has none."""
    for name in ("one", "two"):
        save(ctx, name, use_collectives=False)
    ctx.barrier()
    path = ctx.dir / ("one" if ctx.rank == 0 else "two")
    result = dcp.verify(path, max_problems=1, process_group=dist.group.WORLD)
    assert [problem.code for problem in result.problems] == ["STALE"], result.problems


def case_damaged_metadata_counts_once(ctx):
    save(ctx, "one", use_collectives=False)
    ctx.barrier()
    if ctx.rank == 0:
        for rank in range(ctx.size):
            (ctx.dir / "one" / f"__{rank}.metadata").write_bytes(b"junk")
    ctx.barrier()
    result = dcp.verify(ctx.dir / "one", max_problems=1, process_group=dist.group.WORLD)
    assert (len(result.problems), result.problems_found) == (1, ctx.size)
    (ctx.dir / "none").mkdir(exist_ok=True)
    ctx.barrier()
    result = dcp.verify(ctx.dir / "none", max_problems=1, process_group=dist.group.WORLD)
    assert result.problems_found == 1


class LocalError(OSError):
    """Does not pickle: other ranks get its text, as a RuntimeError."""

    def __reduce__(self):
        raise TypeError("not outside this process")


def outcome_of(ctx, errors):
    """What find_latest does on this rank when the ranks' parts of a check of step-2 fail."""
    run = _verify._run

    def fails(path, level, max_problems, part, parts, *others):
        if parts > 1 and path.name == "step-2" and ctx.rank in errors:
            raise errors[ctx.rank]
        return run(path, level, max_problems, part, parts, *others)

    _verify._run = fails
    try:
        return dcp.find_latest(ctx.dir, verify=True, process_group=dist.group.WORLD).name
    except BaseException as error:
        return type(error).__name__
    finally:
        _verify._run = run


def case_ranks_whose_checks_fail_differently_do_the_same_next(ctx):
    for step in (1, 2):
        save(ctx, f"step-{step}")
    last = ctx.size - 1
    skipped = ["step-1"] * ctx.size
    for rank in (0, last):
        assert gather_all(outcome_of(ctx, {rank: OSError(5, "one")})) == skipped
        assert gather_all(outcome_of(ctx, {rank: FileNotFoundError(2, "one")})) == skipped
        assert gather_all(outcome_of(ctx, {rank: ValueError("one")})) == ["ValueError"] * ctx.size
        mixed = dict.fromkeys(range(ctx.size), OSError(5, "all but one")) | {rank: ValueError("x")}
        assert gather_all(outcome_of(ctx, mixed)) == ["ValueError"] * ctx.size
        alone = outcome_of(ctx, {rank: LocalError(5, "not to be pickled")})
        assert gather_all(alone) == ["RuntimeError"] * ctx.size
        stopped = gather_all(outcome_of(ctx, {rank: KeyboardInterrupt()}))
        want = ["RuntimeError"] * ctx.size
        want[rank] = "KeyboardInterrupt"
        assert stopped == want
