"""bench_worker.py: one rank of the benchmark: takes one command per line on stdin, answers with one
line of JSON.

The commands are those of bench.py; every rank gets the same ones in the same order. State, process
group and the contenders' own caches live as long as the process, as they do in a trainer. Standard
output belongs to the answers: everything else that is printed goes to standard error.
"""

import functools
import importlib
import inspect
import json
import os
import resource
import statistics
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import rivals
import torch
import torch.distributed as dist
from limits import (
    Limits,
    drop_page_cache,
    release_free_memory,
    restart_peak,
    settle,
    status_bytes,
    warm_page_cache,
)
from states import (
    build,
    change,
    converted,
    count_tensors,
    digests,
    local_bytes,
    poison,
    resharded,
)
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.device_mesh import init_device_mesh

REPORTED = ["fast", "kept_items", "vote_ns", "metadata_ns"]
REPORTED += ["hash_ns", "reused_bytes", "base_reason"]  # with a base
REPORTED += ["read_bytes", "hot_bytes", "shared_bytes", "wanted_bytes", "unverified_bytes"]  # loads


def _disk_read_bytes() -> int:
    """What this process had fetched from block devices, into the page cache or around it."""
    with open("/proc/self/io", encoding="ascii") as f:
        return next(int(line.split()[1]) for line in f if line.startswith("read_bytes:"))


def _cpu_s() -> float:
    """User and system time of this process, its threads and its finished children."""
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        total += usage.ru_utime + usage.ru_stime
    return total


def _reported(dcp: ModuleType) -> dict[str, Any]:
    """What dcp_native says of its last call, as far as the figures need it."""
    report = (dcp.last_report() or {}) if dcp.__name__ == "dcp_native" else {}
    return {name: report[name] for name in REPORTED if name in report}


def not_native(dcp: ModuleType) -> list[str]:
    """Says so if dcp_native handed its last call to torch: its figures would be torch's."""
    if dcp.__name__ != "dcp_native":
        return []
    report = dcp.last_report() or {}
    return [] if report.get("path") == "native" else [f"not native: {report.get('reason')}"]


def _forget_plans(dcp: ModuleType) -> None:
    """The next save gathers plans, as the first save of a process group does."""
    if dcp.__name__ == "dcp_native":
        from dcp_native._groups import group_for

        group_for(None, False).forget_plan()
        return
    for name, value in vars(SavePlanner).items():
        if name.startswith("_cached_"):
            value.clear()


class _Steps:
    """Stands in for the native Save of dcp_native: says when each of its steps began and ended."""

    def __init__(self, save: Any, steps: dict[str, tuple[int, int]]) -> None:
        self._save, self._steps = save, steps

    def __getattr__(self, name: str) -> Any:
        step = getattr(self._save, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start_ns = time.monotonic_ns()
            try:
                return step(*args, **kwargs)
            finally:
                self._steps[name] = (start_ns, time.monotonic_ns())

        return timed


@contextmanager
def _timed_steps() -> Iterator[dict[str, tuple[int, int]]]:
    """Times the steps of the saves of dcp_native within; the last save's are what is yielded."""
    from dcp_native import _native

    stock, steps = _native.Save, {}
    _native.Save = lambda *args, **kwargs: _Steps(stock(*args, **kwargs), steps)
    try:
        yield steps
    finally:
        _native.Save = stock


def _join_group(rank: int, ranks: int, rendezvous: str) -> None:
    """Makes the gloo group over a TCP store on the first rank, as torchrun's ranks have it; its
    port is found out through the file `rendezvous`.
    """
    file = dist.FileStore(rendezvous, ranks)
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        file.set("port", str(store.port))
    else:
        store = dist.TCPStore("127.0.0.1", int(file.get("port")))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks)


class Worker:
    def __init__(self, rank: int, ranks: int, rendezvous: str) -> None:
        torch.set_num_threads(1)
        _join_group(rank, ranks, rendezvous)
        self._rank = rank
        self._mesh = init_device_mesh("cpu", (ranks,))
        self._state = None
        self._expected = {}
        self._limits = None

    def build(self, case: str, size: str, count: int | None = None) -> dict:
        self._state = self._limits = None
        _forget_plans(importlib.import_module("torch.distributed.checkpoint"))
        release_free_memory()
        self._state = build(case, size, self._mesh, count)
        self._expected = digests(self._state)
        self._limits = Limits(local_bytes(self._state))
        return {
            "tensors": count_tensors(self._state),
            "own_bytes": local_bytes(self._state, replicas=self._rank == 0),
        }

    def save(self, contender: dict, path: str, base: str | None = None) -> dict:
        """Saves the state once. `contender["plan"]`: "new": plans are gathered; "kept": must reuse
        what the save before it agreed on; "cached": by torch's enable_plan_caching.
        `contender["rival"]`: not DCP at all but one of rivals.py.
        """
        if name := contender.get("rival"):
            work = functools.partial(rivals.rival(name).save, self._state, path)
            return {**self._measure(path, work), "wrong": []}
        dcp, threads = importlib.import_module(contender["module"]), contender["threads"]
        keywords = {} if base is None else {"base": base}
        plan = contender.get("plan")
        if plan == "new":
            _forget_plans(dcp)
        elif plan == "cached":
            keywords["planner"] = DefaultSavePlanner(enable_plan_caching=True)

        def work() -> None:
            writer = dcp.FileSystemWriter(path, thread_count=threads)
            dcp.save(self._state, storage_writer=writer, **keywords)

        result = {**self._measure(path, work), "wrong": not_native(dcp)}
        if dcp.__name__ == "dcp_native" and not result["wrong"]:
            report = dcp.last_report()
            if plan in ("new", "kept") and report["fast"] != (plan == "kept"):
                result["wrong"] = [f"with a {plan} plan the vote was fast: {report['fast']}"]
            result["report"] = _reported(dcp)
        return result

    def save_steps(self, path: str) -> dict:
        """A save of dcp_native that reuses its plan: nanoseconds from its call to each step's
        beginning and end, and what the parts cost alone.
        """
        from dcp_native import _native

        alone_s = []
        for _ in range(3):
            start = time.monotonic()
            _native._debug_plan(self._state, rank=self._rank, show=False)
            alone_s.append(time.monotonic() - start)
        all_reduce_s = self._all_reduce_s()
        with _timed_steps() as steps:
            result = self.save({"module": "dcp_native", "threads": 1, "plan": "kept"}, path)
        start_ns = round(result["start"] * 1e9)
        result["steps"] = {name: [t - start_ns for t in times] for name, times in steps.items()}
        return {**result, "flatten_s": statistics.median(alone_s), "all_reduce_s": all_reduce_s}

    def _all_reduce_s(self) -> float:
        """A bare all-reduce of 16 x int64 on the group, median."""
        lanes, samples = torch.zeros(16, dtype=torch.int64), []
        dist.barrier()
        for _ in range(50):
            start = time.monotonic()
            dist.all_reduce(lanes, dist.ReduceOp.MIN)
            samples.append(time.monotonic() - start)
        return statistics.median(samples)

    def trim(self) -> int:
        """dcp_native gives back what it keeps between saves, so that the next one takes it anew.
        Returns the bytes of the serialised objects that the next one will hold.
        """
        from dcp_native import _native, trim

        trim()
        items = _native._debug_plan(self._state, rank=self._rank)["items"]
        return sum(slot_bytes for *_, slot_bytes in items)

    def change(self, share: float) -> int:
        """Changes `share` of this rank's sharded bytes; returns how many bytes it were."""
        changed = change(self._state, share)
        self._expected = digests(self._state)
        return changed

    def configure(self, **settings: Any) -> None:
        importlib.import_module("dcp_native").configure(**settings)

    def has_base(self) -> bool:
        """Whether this dcp_native can save incrementally."""
        dcp = importlib.import_module("dcp_native")
        return "base" in inspect.signature(dcp.save).parameters

    def reshard(self) -> None:
        """From now on loads go into DTensors that are sharded by columns."""
        self._replace(resharded(self._state))

    def convert(self) -> None:
        """From now on loads go into float32 where bfloat16 was saved."""
        self._replace(converted(self._state, torch.bfloat16, torch.float32))

    def _replace(self, state: dict) -> None:
        self._state = state
        self._expected = digests(state)
        release_free_memory()

    def load(self, contender: dict, path: str, hot: bool = False) -> dict:
        poison(self._state)
        if self._rank == 0:
            (warm_page_cache if hot else drop_page_cache)(path)
        if name := contender.get("rival"):
            work = functools.partial(rivals.rival(name).load, self._state, path)
            result, taken = self._measure(path, work), []
        else:
            dcp = importlib.import_module(contender["module"])

            def work() -> None:
                dcp.load(self._state, storage_reader=dcp.FileSystemReader(path))

            result = self._measure(path, work)
            taken, result["report"] = not_native(dcp), _reported(dcp)
        got, expected = digests(self._state), self._expected
        result["wrong"] = taken + sorted(
            name for name in got.keys() | expected.keys() if got.get(name) != expected.get(name)
        )
        return result

    def limit_write(self, path: str, total_bytes: int) -> dict:
        file = f"{path}/limit-{self._rank}"
        return self._measure(path, lambda: self._limits.write(file, total_bytes))

    def limit_read(self, path: str, total_bytes: int) -> dict:
        file = f"{path}/limit-{self._rank}"
        return self._measure(path, lambda: self._limits.read(file, total_bytes))

    def limit_memcpy(self, path: str, total_bytes: int) -> dict:
        return self._measure(path, lambda: self._limits.memcpy(total_bytes))

    def _measure(self, path: str, work: Callable[[], float | None]) -> dict:
        """Runs `work` on all ranks at once. The seconds are its own if it returns any."""
        release_free_memory()
        if self._rank == 0:
            settle(os.path.dirname(path))
        dist.barrier()
        restart_peak()
        resident_before, anon_before = status_bytes("VmRSS"), status_bytes("RssAnon")
        cpu_before, disk_before = _cpu_s(), _disk_read_bytes()
        start = time.monotonic()
        seconds = work()
        end = time.monotonic()
        return {
            "start": start,
            "end": end,
            "wall_s": end - start if seconds is None else seconds,
            "cpu_s": _cpu_s() - cpu_before,
            "disk_bytes": _disk_read_bytes() - disk_before,
            "extra_bytes": status_bytes("VmHWM") - resident_before,
            "kept_bytes": status_bytes("RssAnon") - anon_before,
            "anon_before_bytes": anon_before,
        }


def serve(make: Callable[[int, int, str], Any]) -> None:
    """Runs the commands of standard input, methods of what `make` gives, until it ends."""
    rank, ranks, rendezvous = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    worker = make(rank, ranks, rendezvous)
    print(json.dumps({"ok": True, "pid": os.getpid()}), file=answers, flush=True)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = {"ok": True, "result": getattr(worker, command["do"])(**command["with"])}
        except (
            BaseException
        ) as e:  # CheckpointException is not an Exception; the driver decides what to do
            traceback.print_exc()
            answer = {"ok": False, "error": f"{type(e).__name__}: {e}"[:2000]}
        print(json.dumps(answer), file=answers, flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    serve(Worker)
