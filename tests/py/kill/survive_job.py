"""Ranks of jobs that lose their trainers while writer processes write: for test_survive.py.

Forked like job.py's (without arguments), or started by torchrun:

    survive_job.py SCENARIO ARGS    # JSON

A scenario says what the test may believe, as job.py's do; under torchrun in `out`-ATTEMPT-RANK.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import job
import torch
import torch.distributed as dist
from job import blank, mine, outcome, say, version_of

import dcp_native as dcp
from dcp_native import _save as native_save
from dcp_native import _uploads

PROCESS = dcp.AsyncCheckpointerType.PROCESS
DEADLINE_S = 60


def ends(pid: int) -> bool:
    """Whether a process is gone, or waits to be buried."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except OSError:
        return True


def save(version: int, rank: int, size: int, args: dict[str, Any], path: str = "") -> Any:
    return dcp.async_save(
        mine(version, rank, size, args["numel"]),
        checkpoint_id=path or args["dir"],
        async_checkpointer_type=PROCESS,
    )


def fly(version: int, rank: int, size: int, args: dict[str, Any], path: str = "") -> Any:
    """A save that takes `seconds`, being written on every rank when this returns."""
    directory, mine_of = Path(path or args["dir"]), f"__{rank}_*"
    dcp.configure(write_limit_bytes_s=int(4 * args["numel"] / args.get("seconds", 3)))
    before = set(directory.glob(mine_of))
    future = save(version, rank, size, args, path)
    while not set(directory.glob(mine_of)) - before:
        time.sleep(0.001)
    (upload,) = _uploads.in_flight()
    say(writer=upload.process.pid)
    dist.barrier()
    return future


def in_flight(rank: int, size: int, args: dict[str, Any]) -> None:
    """Version 1 is saved, version 2 is being written; then this rank waits for what becomes of it,
    unless it is killed."""
    dcp.configure(survive_trainer=args.get("survive", True))
    dcp.configure(async_timeout_s=args.get("timeout_s", 0))
    save(1, rank, size, args).result()
    future = fly(2, rank, size, args)
    say(flying=True)
    say(second=outcome(future.result))
    os._exit(0)  # gloo's own farewell would wait for the dead


def exits(rank: int, size: int, args: dict[str, Any]) -> None:
    """The script ends, well or with an exception, while version 2 is being written."""
    dcp.configure(survive_trainer=True)
    save(1, rank, size, args).result()
    fly(2, rank, size, args)
    if args["raises"]:
        raise RuntimeError("the script has a bug")


def save_again(rank: int, size: int, args: dict[str, Any]) -> None:
    """A new job saves version 3; says which version it replaces."""
    native_save.ORPHAN_WAIT_S = args.get("orphan_wait_s", native_save.ORPHAN_WAIT_S)
    dcp.configure(survive_trainer=args.get("survive", True))
    add = native_save.NativeSave._add

    def add_behind_claim(self: Any, *rest: Any) -> None:
        state = blank(size, args["numel"])
        dcp.load(state, checkpoint_id=args["dir"], no_dist=True)
        say(replaces=version_of(state, size, args["numel"]))
        add(self, *rest)

    if rank == 0:
        native_save.NativeSave._add = add_behind_claim
    say(orphans=[pid for pid in args["writers"] if not ends(pid)])
    save(3, rank, size, args).result()


def restarted_job(rank: int, size: int, args: dict[str, Any]) -> None:
    """Attempt 0: saves step 1; a rank dies while step 2 is written.  The next one: goes on from the
    latest checkpoint, or saves step 2 anew."""
    dcp.configure(survive_trainer=True)
    steps = Path(args["dir"])
    if os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
        save(1, rank, size, args, str(steps / "step-1")).result()
        fly(2, rank, size, args, str(steps / "step-2"))
        if rank == args["victim"]:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(DEADLINE_S)
    elif args["then"] == "load":
        end = time.monotonic() + DEADLINE_S
        latest = None
        while latest != steps / "step-2" and time.monotonic() < end:
            latest = dcp.find_latest(steps)
        state = blank(size, args["numel"])
        dcp.load(state, checkpoint_id=latest)
        say(loaded=version_of(state, size, args["numel"]))
    else:
        save_again(rank, size, {**args, "dir": str(steps / "step-2"), "writers": writers(args)})


def writers(args: dict[str, Any]) -> list[int]:
    """Of attempt 0."""
    lines = [
        json.loads(line)
        for rank in range(2)
        for line in Path(f"{args['out']}-0-{rank}").read_text().splitlines()
    ]
    return [line["writer"] for line in lines if "writer" in line]


def under_torchrun(scenario: str, args: dict[str, Any]) -> None:
    attempt = os.environ["TORCHELASTIC_RESTART_COUNT"]
    out = os.open(f"{args['out']}-{attempt}-{os.environ['RANK']}", os.O_WRONLY | os.O_CREAT)
    os.dup2(out, 1)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    # The agent's store outlives an attempt, and gloo would find the dead ranks' addresses there.
    agent = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    dist.init_process_group(
        "gloo",
        store=dist.PrefixStore(f"attempt-{attempt}", agent),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=30),
    )
    say(pid=os.getpid())
    globals()[scenario](dist.get_rank(), dist.get_world_size(), args)
    dist.destroy_process_group()


if __name__ == "__main__":
    if len(sys.argv) > 1:
        under_torchrun(sys.argv[1], json.loads(sys.argv[2]))
    else:
        job.main(globals())
