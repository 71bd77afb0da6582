"""Scenarios of loading for tests/py/test_load_faults.py, run by the forker of job.py."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import job
import torch
import torch.distributed as dist
from job import blank, mine, outcome, say, version_of

import dcp_native as dcp

DELAYS_S = [0.002, 0.01, 0.03, 0.08, 0.15, 0.3]
"""When a signal comes: some load is under way then."""


def interrupt_a_load(rank: int, size: int, args: dict[str, Any]) -> None:
    """The victim gets a SIGINT at several times; then all load once more."""
    numel = args["numel"]
    if args["save"]:
        dcp.save(mine(1, rank, size, numel), checkpoint_id=args["dir"])
    hits = 0
    for round_, delay in enumerate(DELAYS_S):
        state = blank(size, numel)
        timer = threading.Timer(delay, os.kill, (os.getpid(), signal.SIGINT))
        try:
            if rank == args["victim"]:
                timer.start()
            result = outcome(lambda s=state: dcp.load(s, checkpoint_id=args["dir"]))
            timer.join() if rank == args["victim"] else None
        except KeyboardInterrupt:  # after the load
            pass
        say(**{f"round{round_}": result})
        hits += result["raised"] is not None
        if size > 1:
            dist.barrier()
    state = blank(size, numel)
    dcp.load(state, checkpoint_id=args["dir"])
    say(hits=hits, version=version_of(state, size, numel))


def die_in_a_load(rank: int, size: int, args: dict[str, Any]) -> None:
    numel = args["numel"]
    dcp.save(mine(1, rank, size, numel), checkpoint_id=args["dir"])
    dist.barrier()
    while rank == args["victim"]:
        threading.Timer(args["delay_s"], os.kill, (os.getpid(), signal.SIGKILL)).start()
        while True:
            dcp.load(blank(size, numel), checkpoint_id=args["dir"])
    result: dict[str, Any] = {"raised": None}
    while result["raised"] is None:
        result = outcome(lambda: dcp.load(blank(size, numel), checkpoint_id=args["dir"]))
    say(first=result, second=outcome(lambda: dcp.load({}, checkpoint_id=args["dir"])))
    os._exit(0)


def load_in_children(rank: int, size: int, args: dict[str, Any]) -> None:
    """As workers of a DataLoader do, after their parent has loaded, and two at a time."""
    numel = args["numel"]
    dcp.save(job.state_of(3, 1, numel), checkpoint_id=args["dir"], no_dist=True)

    def load() -> None:
        state = blank(1, numel)
        dcp.load(state, checkpoint_id=args["dir"], no_dist=True)
        assert version_of(state, 1, numel) == 3

    load()
    children = []
    for _ in range(2):
        if (pid := os.fork()) == 0:
            signal.alarm(30)
            try:
                load()
                load()
            except BaseException as error:
                Path(f"{args['dir']}-child").write_text(repr(error))
                os._exit(1)
            os._exit(0)
        children.append(pid)
    load()  # beside them
    say(children=[os.waitpid(pid, 0)[1] for pid in children])
    load()


for scenario in (interrupt_a_load, die_in_a_load, load_in_children):
    setattr(job, scenario.__name__, scenario)

if __name__ == "__main__":
    torch.set_num_threads(1)
    job.main(vars(job))
