"""bench_worker.py: one rank of the benchmark: takes one command per line on stdin, answers with one
line of JSON.

The commands are those of bench.py; every rank gets the same ones in the same order. State, process
group and the contenders' own caches live as long as the process, as they do in a trainer. Standard
output belongs to the answers: everything else that is printed goes to standard error.
"""

import importlib
import json
import os
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from types import ModuleType

import torch
import torch.distributed as dist
from limits import Limits, drop_page_cache, release_free_memory, settle
from states import build, count_tensors, digests, local_bytes, poison
from torch.distributed.device_mesh import init_device_mesh


def _status_bytes(field: str) -> int:
    with open("/proc/self/status", encoding="ascii") as f:
        for line in f:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def _cpu_s() -> float:
    """User and system time of this process, its threads and its finished children."""
    total = 0.0
    for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN):
        usage = resource.getrusage(who)
        total += usage.ru_utime + usage.ru_stime
    return total


def _not_native(dcp: ModuleType) -> list[str]:
    """Says so if dcp_native handed its last call to torch: its figures would be torch's."""
    if dcp.__name__ != "dcp_native":
        return []
    report = dcp.last_report() or {}
    return [] if report.get("path") == "native" else [f"not native: {report.get('reason')}"]


class Worker:
    def __init__(self, rank: int, ranks: int, rendezvous: str) -> None:
        torch.set_num_threads(1)
        dist.init_process_group(
            "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=ranks
        )
        self._rank = rank
        self._mesh = init_device_mesh("cpu", (ranks,))
        self._state = None
        self._expected = {}
        self._limits = None

    def build(self, case: str, size: str) -> dict:
        self._state = self._limits = None
        release_free_memory()
        self._state = build(case, size, self._mesh)
        self._expected = digests(self._state)
        self._limits = Limits(local_bytes(self._state))
        return {
            "tensors": count_tensors(self._state),
            "own_bytes": local_bytes(self._state, replicas=self._rank == 0),
        }

    def save(self, contender: dict, path: str) -> dict:
        dcp, threads = importlib.import_module(contender["module"]), contender["threads"]

        def work() -> None:
            dcp.save(self._state, storage_writer=dcp.FileSystemWriter(path, thread_count=threads))

        return {**self._measure(path, work), "wrong": _not_native(dcp)}

    def load(self, contender: dict, path: str) -> dict:
        dcp = importlib.import_module(contender["module"])
        poison(self._state)
        if self._rank == 0:
            drop_page_cache(path)

        def work() -> None:
            dcp.load(self._state, storage_reader=dcp.FileSystemReader(path))

        result = self._measure(path, work)
        taken = _not_native(dcp)
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
        with open("/proc/self/clear_refs", "w", encoding="ascii") as f:
            f.write("5")  # the peak VmHWM starts again at VmRSS
        resident_before, anon_before = _status_bytes("VmRSS"), _status_bytes("RssAnon")
        cpu_before = _cpu_s()
        start = time.monotonic()
        seconds = work()
        end = time.monotonic()
        return {
            "start": start,
            "end": end,
            "wall_s": end - start if seconds is None else seconds,
            "cpu_s": _cpu_s() - cpu_before,
            "extra_bytes": _status_bytes("VmHWM") - resident_before,
            "kept_bytes": _status_bytes("RssAnon") - anon_before,
            "anon_before_bytes": anon_before,
        }


def main() -> None:
    rank, ranks, rendezvous = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    worker = Worker(rank, ranks, rendezvous)
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
    main()
