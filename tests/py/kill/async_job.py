"""Ranks of small jobs with background saves: tests/py/test_async_faults.py, test_async_order.py.

Started by job.py, whose notes hold here too.
"""

from __future__ import annotations

import gc
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from job import mine, outcome, say, state_of

import dcp_native as dcp
from dcp_native import _native, _uploads
from dcp_native import _save as native_save

SLOW_BYTES_S = 4 << 20
KINDS = {"thread": dcp.AsyncCheckpointerType.THREAD, "process": dcp.AsyncCheckpointerType.PROCESS}


def save_behind(
    state: dict[str, Any], path: str | Path, mode: str = "thread", **how: Any
) -> Future:
    return dcp.async_save(state, checkpoint_id=path, async_checkpointer_type=KINDS[mode], **how)


def good_save(rank: int, size: int, args: dict[str, Any]) -> None:
    """Version 1, which whatever follows must not damage."""
    save_behind(mine(1, rank, size, args["numel"]), args["dir"], args["mode"]).result()
    dist.barrier()


def serve(rank: int, size: int, args: dict[str, Any]) -> None:
    """The store of other processes, as an agent serves it."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    say(port=store.port)
    while not os.path.exists(args["stop"]):
        time.sleep(0.05)


def disturbed(rank: int, size: int, args: dict[str, Any]) -> None:
    """A good save, then one of which the test disturbs some process; says what became of it."""
    good_save(rank, size, args)
    is_slow = rank in args["slow"]
    dcp.configure(
        write_limit_bytes_s=SLOW_BYTES_S if is_slow else 0,
        async_timeout_s=args.get("timeout_s", 0),
    )
    save_future = save_behind(mine(2, rank, size, args["numel"]), args["dir"], args["mode"])
    save = save_future._save
    while not is_slow and save.upload_stats()["writing"]:
        time.sleep(0.001)
    say(in_flight=True)
    first = outcome(save_future.result)
    say(first=first, at=time.monotonic())
    if args.get("again") is not None:  # once nothing of that save is left
        say(ended=_uploads.wait_until_ended(40))
        dcp.configure(write_limit_bytes_s=0)
        path = f"{args['again']}{rank}"
        state = state_of(1, 1, 8)
        say(again=outcome(lambda: dcp.async_save(state, checkpoint_id=path, no_dist=True).result()))
    else:
        _uploads.wait_until_ended(40)
    os._exit(0)  # gloo's own farewell would wait for the dead


class SlowToPickle:
    """An object that takes a while to be planned."""

    def __reduce__(self) -> tuple[Any, ...]:
        say(planning=True)
        for _ in range(100):
            time.sleep(0.1)
        return (dict, ())


def interrupt(times: int, after_s: float) -> None:
    """Ctrl-C, from another thread."""

    def press() -> None:
        for _ in range(times):
            time.sleep(after_s)
            say(pressed=time.monotonic())
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()


def interrupted_when(phase: str, args: dict[str, Any]) -> Callable[[], None]:
    """Rank 1: arranges for Ctrl-C within `phase`; returns what undoes that."""
    original = native_save.NativeSave.stage
    if phase == "stage":

        def stage(self: Any, **how: Any) -> str:
            interrupt(args["times"], 0.01)
            return original(self, **how)

        native_save.NativeSave.stage = stage
    else:
        interrupt(args["times"], 0.5)

    def undo() -> None:
        native_save.NativeSave.stage = original

    return undo


def interrupted(rank: int, size: int, args: dict[str, Any]) -> None:
    """Rank 1 gets one or several Ctrl-C in a phase of async_save, or of a save() that waits."""
    numel, phase, path = args["numel"], args["phase"], args["dir"]
    good_save(rank, size, args)
    state = mine(2, rank, size, numel)
    older = None
    if phase in ("room", "save", "load"):
        dcp.configure(write_limit_bytes_s=SLOW_BYTES_S)
        older = save_behind(state, f"{path}-older", args["mode"])
        dcp.configure(write_limit_bytes_s=0)
    elif phase == "vote" and rank == 0:
        time.sleep(args["late_s"])
    if rank == 1:
        if phase == "plan":
            state["slow"] = SlowToPickle()
        undo = interrupted_when(phase, args)

    def call() -> None:
        if phase == "save":
            dcp.save(state, checkpoint_id=path)
        elif phase == "load":
            dcp.load(state, checkpoint_id=path)
        else:
            save_behind(state, path, args["mode"]).result()

    first = outcome(call)
    say(first=first, at=time.monotonic())
    if rank == 1:
        undo()
        state.pop("slow", None)
    if older is not None:
        say(older=outcome(older.result))
    say(ended=_uploads.wait_until_ended(40))
    if args["in_step"]:
        dist.barrier()
        say(second=outcome(lambda: save_behind(state, path, args["mode"]).result()))
        say(ended=_uploads.wait_until_ended(40))
    os._exit(0)


def exit_in_flight(rank: int, size: int, args: dict[str, Any]) -> None:
    """The script ends, in one of many ways, with a background save in flight."""
    good_save(rank, size, args)
    dcp.configure(write_limit_bytes_s=args["limit_bytes_s"])
    future = save_behind(mine(2, rank, size, args["numel"]), args["dir"], args["mode"])
    future.add_done_callback(lambda f: say(resolved=type(f.exception()).__name__))
    how = args["how"]
    if how == "destroy":
        dist.destroy_process_group()
    say(leaving=True)
    if how == "sys.exit":
        sys.exit(0)
    if how == "exception":
        raise RuntimeError("not of ours")
    if how == "os._exit":
        os._exit(0)


def fork_meanwhile(rank: int, size: int, args: dict[str, Any]) -> None:
    """A child is forked while a slow save is in flight, and takes its interpreter down."""
    good_save(rank, size, args)
    dcp.configure(write_limit_bytes_s=SLOW_BYTES_S)
    future = save_behind(mine(2, rank, size, args["numel"]), args["dir"], args["mode"])
    start = time.monotonic()
    if (pid := os.fork()) == 0:
        del future
        gc.collect()
        sys.exit(0)
    _, status = os.waitpid(pid, 0)
    say(child=os.waitstatus_to_exitcode(status), child_s=time.monotonic() - start)
    say(still_in_flight=not future.done())
    future.result()
    dist.barrier()


def one_is_busy(rank: int, size: int, args: dict[str, Any]) -> None:
    """Rank 1 alone has a save in flight when all ranks save."""
    path, numel = Path(args["dir"]), args["numel"]
    good_save(rank, size, args)
    dcp.configure(async_overlap=args["policy"])
    own = None
    if rank == 1:
        dcp.configure(write_limit_bytes_s=SLOW_BYTES_S)
        own = save_behind(state_of(7, 1, 4 * numel), f"{path}-own", no_dist=True)
        dcp.configure(write_limit_bytes_s=0)
    dist.barrier()
    future = save_behind(mine(2, rank, size, numel), path, args["mode"])
    say(own_was_done=own is None or own.done())
    say(first=outcome(future.result), result=None if future.exception() else str(future.result()))
    say(own=outcome(own.result) if own is not None else None)
    say(third=outcome(lambda: save_behind(mine(3, rank, size, numel), path, args["mode"]).result()))


def in_row(rank: int, size: int, args: dict[str, Any]) -> None:
    """Several saves at once; notes in which order futures are resolved."""
    dcp.configure(arenas=args["arenas"], write_limit_bytes_s=4 * SLOW_BYTES_S)
    order: list[int] = []
    futures = []
    most = 0
    for i in range(3):
        path = args["dir"] if args["same"] else f"{args['dir']}-{i}"
        future = save_behind(mine(i, rank, size, args["numel"]), path, args["mode"])
        future.add_done_callback(lambda f, i=i: order.append(i))
        futures.append(future)
        most = max(most, sum(not f.done() for f in futures))
    for future in futures:
        future.result()
    say(ended=_uploads.wait_until_ended(40), order=order, most=most)
    dist.barrier()


def then_foreground(rank: int, size: int, args: dict[str, Any]) -> None:
    """save() and load() behind an async_save wait for it."""
    path, numel = args["dir"], args["numel"]
    dcp.configure(write_limit_bytes_s=2 * SLOW_BYTES_S)
    first = save_behind(mine(1, rank, size, numel), path, args["mode"])
    state = mine(0, rank, size, numel)
    dcp.load(state, checkpoint_id=path)
    say(load_waited=first.done(), loaded=state["version"])
    second = save_behind(mine(2, rank, size, numel), path, args["mode"])
    dcp.configure(write_limit_bytes_s=0)
    dcp.save(mine(3, rank, size, numel), checkpoint_id=path)
    say(save_waited=second.done())


def in_control_group(rank: int, size: int, args: dict[str, Any]) -> None:
    """Rank 1 lives in a memory control group that its save would not fit into."""
    state = mine(2, rank, size, args["numel"])
    dcp.trim()
    if rank == 1:
        Path(args["group"], "cgroup.procs").write_text(str(os.getpid()))
    dist.barrier()
    future = save_behind(state, args["dir"], args["mode"])
    say(staging=future.report["staging"])
    for value in state.values():
        if isinstance(value, torch.Tensor):
            value.fill_(-7)
    future.result()
    say(ended=_uploads.wait_until_ended(40))
    dist.barrier()
    os._exit(0)  # the interpreter's end would touch more of its parent's pages than the group has


def usage() -> dict[str, int]:
    """What must not grow."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    children = 0
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
            except OSError:
                continue
            children += int(fields[1]) == os.getpid()
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "mappings": len(Path("/proc/self/maps").read_text().splitlines()),
        "memory_of_ours": _native.live_bytes(),
        "children": children,
        "rss": pages * resource.getpagesize(),
    }


def many(rank: int, size: int, args: dict[str, Any]) -> None:
    """So many saves, in turn by either mode; what they leave behind."""

    def save(count: int) -> None:
        for i in range(count):
            mode = ("thread", "process")[i % 2]
            save_behind(mine(i, rank, size, args["numel"]), args["dir"], mode).result()
        assert _uploads.wait_until_ended(40)
        dist.barrier()

    save(20)
    before = usage()
    save(args["count"])
    say(before=before, after=usage())
