"""Ranks of small jobs for tests/py/test_kill.py: gloo over a file store, no agent, survivors live.

A scenario is a function of this module, or of the one that the order names, run by each rank in a
process of its own.  It prints one
JSON object per line: what the test may believe, as soon as it is true.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import json
import os
import resource
import select
import shutil
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import dcp_native as dcp
from dcp_native import _save as native_save


def say(**facts: Any) -> None:
    print(json.dumps(facts), flush=True)


def state_of(version: int, size: int, numel: int) -> dict[str, Any]:
    """Every value is a function of `version`: tensors of every rank, an object, an odd view."""
    state: dict[str, Any] = {"version": version, "name": f"v{version}" * (1 + version % 3)}
    for rank in range(size):
        state[f"t{rank}"] = torch.full((numel,), version % 32749, dtype=torch.int32)
        state[f"odd{rank}"] = torch.full((37, 11), float(version)).t()
    return state


def mine(version: int, rank: int, size: int, numel: int) -> dict[str, Any]:
    """What one rank has of it: its own tensors, and the objects that all have."""
    state = state_of(version, size, numel)
    return {k: v for k, v in state.items() if k[-1:] == str(rank) or k in ("version", "name")}


def blank(size: int, numel: int) -> dict[str, Any]:
    state = state_of(0, size, numel)
    return {
        k: torch.full_like(v, -1) if isinstance(v, torch.Tensor) else None for k, v in state.items()
    }


def version_of(state: dict[str, Any], size: int, numel: int) -> int:
    """The one version that all of `state` is, bit for bit."""
    version = state["version"]
    want = state_of(version, size, numel)
    assert set(state) == set(want)
    for key, value in want.items():
        same = (
            torch.equal(state[key], value)
            if isinstance(value, torch.Tensor)
            else state[key] == value
        )
        assert same, f"{key} is not of version {version}"
    return version


def failures_of(error: BaseException) -> dict[str, Any]:
    causes = {
        r: [type(e).__name__, str(e), getattr(e, "dcp_code", None)]
        for r, (e, _) in error.failures.items()
    }
    return {"step": error.args[0], "failures": causes}


def outcome(call: Any) -> dict[str, Any]:
    """What became of a call, how long it took."""
    start = time.monotonic()
    try:
        call()
        result: dict[str, Any] = {"raised": None}
    except dcp.CheckpointException as error:
        result = {"raised": "CheckpointException", **failures_of(error)}
    except BaseException as error:
        result = {"raised": type(error).__name__, "text": str(error)}
    return {**result, "seconds": time.monotonic() - start}


def overwrite_for_ever(rank: int, size: int, args: dict[str, Any]) -> None:
    """Saves version after version until it is killed; says which saves have returned."""
    version, numel = args["version"], args["numel"]
    while True:
        writer = dcp.FileSystemWriter(
            args["dir"],
            sync_files=version % 3 == 0,
            thread_count=2 if version % 8 >= 6 else 1,
            single_file_per_rank=version % 10 < 8,
        )
        state = mine(version, rank, size, numel)
        if version % 2 == 0:
            dcp.save(state, storage_writer=writer)
        else:
            future = dcp.async_save(state, storage_writer=writer)
            for value in state.values():  # what was handed over may change now
                if isinstance(value, torch.Tensor):
                    value.fill_(-7)
            future.result()
        say(saved=version)
        version += 1


def overwrite(rank: int, size: int, args: dict[str, Any]) -> None:
    """A job on top of what there is: `count` saves."""
    for version in range(args["version"], args["version"] + args.get("count", 1)):
        dcp.save(mine(version, rank, size, args["numel"]), checkpoint_id=args["dir"])
        say(saved=version)


class Kills:
    """A Stateful in whose state_dict() the process dies."""

    def state_dict(self) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("survived SIGKILL")

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        raise AssertionError("never loaded")


@contextlib.contextmanager
def dies(phase: str) -> Any:
    """This process is killed when a save enters `phase`."""
    original = getattr(native_save.NativeSave, phase)

    def killed(self: Any, *args: Any) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def killed_behind(self: Any, *args: Any, **how: Any) -> None:
        original(self, *args, **how)
        while self.progress_bytes() == 0:
            time.sleep(0.0005)
        os.kill(os.getpid(), signal.SIGKILL)

    def killed_inside(self: Any, *args: Any) -> None:
        threading.Thread(target=kill_when_bytes_move, args=(self,), daemon=True).start()
        original(self, *args)
        os.kill(os.getpid(), signal.SIGKILL)  # faster than the other thread looked

    ways = {"write": killed_inside, "upload": killed_behind}
    setattr(native_save.NativeSave, phase, ways.get(phase, killed))
    yield


def kill_when_bytes_move(save: Any) -> None:
    while save.info()["progress_bytes"] == 0:
        time.sleep(0.0005)
    os.kill(os.getpid(), signal.SIGKILL)


def one_dies(rank: int, size: int, args: dict[str, Any]) -> None:
    """A good save, then one in which rank `victim` dies; then the survivors try once more."""
    from dcp_native.state_dict_saver import _save_state_dict

    numel, phase, coordinator = args["numel"], args["phase"], args["coordinator"]
    writer = dcp.FileSystemWriter(args["dir"])
    _save_state_dict(mine(1, rank, size, numel), writer, coordinator_rank=coordinator)
    dist.barrier()

    def attempt() -> None:
        state = mine(2, rank, size, numel)
        if phase == "state_dict" and rank == args["victim"]:
            state["app"] = Kills()
        if args["background"]:
            dcp.async_save(state, checkpoint_id=args["dir"]).result()
        elif phase == "state_dict":
            dcp.save(state, checkpoint_id=args["dir"])
        else:
            _save_state_dict(state, writer, coordinator_rank=coordinator)

    if phase != "state_dict" and rank == args["victim"]:
        if args["background"]:
            dcp.configure(write_limit_bytes_s=16 << 20)  # not done before it is killed
        with dies("upload" if args["background"] else phase):
            attempt()
    say(first=outcome(attempt))
    if not args["background"]:
        say(second=outcome(attempt))
    os._exit(0)  # gloo's own farewell would wait for the dead


def read_for_ever(rank: int, size: int, args: dict[str, Any]) -> None:
    """Loads until a file appears; says which versions it saw."""
    seen, loads = set(), 0
    while not os.path.exists(args["stop"]):
        state = blank(args["ranks"], args["numel"])
        dcp.load(state, checkpoint_id=args["dir"], no_dist=True)
        seen.add(version_of(state, args["ranks"], args["numel"]))
        loads += 1
    say(loads=loads, seen=sorted(seen))


def interrupted(rank: int, size: int, args: dict[str, Any]) -> None:
    """Rank 1 gets a SIGINT: while it writes, or while it waits for rank 0 in a collective."""
    numel = args["numel"]
    dcp.save(mine(1, rank, size, numel), checkpoint_id=args["dir"])
    dist.barrier()
    state = mine(2, rank, size, numel)
    if args["where"] == "write" and rank == 1:
        original = native_save.NativeSave.write

        def write(self: Any) -> None:
            threading.Thread(target=interrupt_when_bytes_move, args=(self,), daemon=True).start()
            original(self)

        native_save.NativeSave.write = write
    if args["where"] == "collective":
        if rank == 1:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
        else:
            time.sleep(args["late_s"])
    say(first=outcome(lambda: dcp.save(state, checkpoint_id=args["dir"])))
    if args["late_s"] == 0:  # the ranks are still in step
        say(second=outcome(lambda: dcp.save(state, checkpoint_id=args["dir"])))
    os._exit(0)


def interrupt_when_bytes_move(save: Any) -> None:
    while save.info()["progress_bytes"] == 0:
        time.sleep(0.0005)
    os.kill(os.getpid(), signal.SIGINT)


def exit_in_flight(rank: int, size: int, args: dict[str, Any]) -> None:
    """The script ends with a background save in flight."""
    dcp.async_save(mine(args["version"], rank, size, args["numel"]), checkpoint_id=args["dir"])
    if args["destroy"]:
        dist.destroy_process_group()


def fork_in_flight(rank: int, size: int, args: dict[str, Any]) -> None:
    """A child is forked while a save is in flight: it exits, or saves by itself and then exits."""
    numel = args["numel"]
    future = dcp.async_save(mine(args["version"], rank, size, numel), checkpoint_id=args["dir"])
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        if args["child_saves"]:
            path = f"{args['dir']}-child{rank}"
            dcp.async_save(state_of(9, 1, numel), checkpoint_id=path, no_dist=True).result()
            dcp.save(state_of(9, 1, numel), checkpoint_id=path, no_dist=True)
            refused = outcome(lambda: dcp.save(state_of(9, 1, numel), checkpoint_id=path))
            assert refused["raised"] is not None, "saved with the parent's connections"
        if args["child_saves"]:
            sys.exit(0)  # the interpreter takes everything down that it inherited
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    future.result()
    say(child=status)


def fill_disk(path: str) -> None:
    """As another program would."""
    with contextlib.suppress(OSError), open(path, "wb", buffering=0) as file:
        while file.write(bytes(1 << 16)):
            pass


def remove_all(path: str) -> None:
    """Until it is gone: the other rank may be making files."""
    while os.path.exists(path):
        shutil.rmtree(path, ignore_errors=True)


def mount_alone(path: str, options: str) -> None:
    """A small file system over ``path`` that only this process sees: the disk of its own node."""
    libc = ctypes.CDLL(None, use_errno=True)
    private, new_mounts = 0x44000, 0x20000
    for failed in (
        libc.unshare(new_mounts),
        libc.mount(b"none", b"/", None, private, None),
        libc.mount(b"tmpfs", path.encode(), b"tmpfs", 0, options.encode()),
    ):
        if failed:
            raise OSError(ctypes.get_errno(), "no mount of its own")


@contextlib.contextmanager
def hurt(kind: str, path: str) -> Iterator[None]:
    """Something that makes the next save of this process fail."""
    plan, write = native_save.NativeSave.plan, native_save.NativeSave.write
    limits = {k: resource.getrlimit(k) for k in (resource.RLIMIT_FSIZE, resource.RLIMIT_NOFILE)}

    def disturbed(disturb: Callable[[], None]) -> Callable[[Any], None]:
        def disturbed_write(self: Any) -> None:
            disturb()
            write(self)

        return disturbed_write

    def as_other_user(step: Callable[..., None]) -> Callable[..., None]:
        """The step alone: another user may not even read the interpreter's modules."""

        def other_users_step(self: Any, *args: Any) -> None:
            os.seteuid(65534)
            try:
                step(self, *args)
            finally:
                os.seteuid(os.getuid())

        return other_users_step

    if kind == "user":
        native_save.NativeSave.plan = as_other_user(plan)
        native_save.NativeSave.write = as_other_user(write)
    elif kind == "small files":
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[resource.RLIMIT_FSIZE][1]))
    elif kind == "few files":
        lowest_free = os.open("/dev/null", os.O_RDONLY)
        os.close(lowest_free)
        resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, limits[resource.RLIMIT_NOFILE][1]))
    elif kind == "disk filled":
        native_save.NativeSave.write = disturbed(lambda: fill_disk(f"{path}-balloon"))
    elif kind == "directory removed":
        native_save.NativeSave.write = disturbed(lambda: remove_all(path))
    elif kind == "own disk":
        mount_alone(path, "size=256k")
    try:
        yield
    finally:
        for limit, value in limits.items():
            resource.setrlimit(limit, value)
        native_save.NativeSave.plan, native_save.NativeSave.write = plan, write
        if kind == "disk filled":
            os.remove(f"{path}-balloon")


def hurt_save(rank: int, size: int, args: dict[str, Any]) -> None:
    """A save during which some ranks (all without `ranks`) are hurt, told to all.

    With `good`, a good save of version 1 comes before.
    """
    if args.get("good"):
        dcp.save(mine(1, rank, size, args["good"]), checkpoint_id=args["dir"])
        dist.barrier()
    state = mine(args["version"], rank, size, args["numel"])
    kind = args["kind"] if rank in args.get("ranks", range(size)) else ""
    with hurt(kind, args["dir"]):
        say(first=outcome(lambda: dcp.save(state, checkpoint_id=args["dir"])))
        dist.barrier()
    say(ignores_sigxfsz=signal.getsignal(signal.SIGXFSZ) == signal.SIG_IGN)


def compete(rank: int, size: int, args: dict[str, Any]) -> None:
    """Many saves by a process of its own into a directory that others save to."""
    committed, superseded = [], 0
    for i in range(args["rounds"]):
        version = args["base"] + i
        state = state_of(version, 1, args["numel"])
        result = outcome(lambda s=state: dcp.save(s, checkpoint_id=args["dir"], no_dist=True))
        if result["raised"] is None:
            committed.append(version)
        else:
            ((_, _, code),) = result["failures"].values()
            assert code == "SUPERSEDED", result
            superseded += 1
    say(committed=committed, superseded=superseded)


def how_to_meet(order: dict[str, Any]) -> dict[str, Any]:
    """Over a file; or over a port, which rank 0 serves unless somebody does already."""
    if "port" not in order:
        return {"init_method": f"file://{order['store']}"}
    serves = order["rank"] == 0 and not order["served"]
    timeout = timedelta(seconds=order["timeout_s"])
    store = dist.TCPStore(
        "127.0.0.1", order["port"], is_master=serves, wait_for_workers=False, timeout=timeout
    )
    return {"store": store}


def run_rank(order: dict[str, Any], scenarios: dict[str, Any]) -> None:
    """A rank of a job, in a process of its own."""
    rank, size = order["rank"], order["size"]
    out = os.open(order["out"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    if size > 0:
        dist.init_process_group(
            "gloo",
            **how_to_meet(order),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=order["timeout_s"]),
        )
        dist.barrier()
    say(ready=True)
    if "module" in order:
        scenarios = vars(importlib.import_module(order["module"]))
    scenarios[order["scenario"]](rank, size, order["args"])
    say(done=True)
    if dist.is_initialized() and not order["scenario"].startswith("exit_in_flight"):
        dist.destroy_process_group()


def bury(orders: dict[int, dict[str, Any]]) -> None:
    """Collects dead children and notes how each died."""
    while orders:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        note = f"{orders.pop(pid)['out']}.status"
        Path(note + "-").write_text(str(os.waitstatus_to_exitcode(status)))
        os.rename(note + "-", note)


def main(scenarios: dict[str, Any]) -> None:
    """Forks a rank for every order on stdin and answers with its pid: torch is imported once."""
    # A job in the background of a shell inherits that Ctrl-C is ignored; these tests send it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    orders: dict[int, dict[str, Any]] = {}
    pending = b""
    while True:
        if select.select([0], [], [], 0.02)[0]:
            data = os.read(0, 65536)
            if not data:
                break
            pending += data
        while b"\n" in pending:
            line, pending = pending.split(b"\n", 1)
            order = json.loads(line)
            if (pid := os.fork()) == 0:
                os.close(0)
                run_rank(order, scenarios)
                return
            orders[pid] = order
            say(pid=pid)
        bury(orders)
    for pid in orders:
        os.kill(pid, signal.SIGKILL)


if __name__ == "__main__":
    main(globals())
