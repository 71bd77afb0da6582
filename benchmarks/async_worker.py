"""async_worker.py: one rank of async_saving.py: saves in the background beside a trainer.

Commands and answers are those of bench_worker.py. A save is timed on every rank from a barrier. The
moment it returns some tensors are changed, and what is loaded afterwards must be the values from
before: of a few tensors after each save, of every byte by checksum where the command says so.

What dcp_native tells of a save is its future's `report`; where a future has none, the report of the
last save.
"""

import importlib
import os
import time
from concurrent.futures import Future
from typing import Any

import torch
import torch.distributed as dist
from bench_worker import Worker, not_native, serve
from limits import Buffer, Limits, copy_tensors, release_free_memory, settle, touch_fresh
from processes import WRITER, Peak, children, cpu_s, resident
from states import build, count_tensors, local_bytes, local_tensors
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType
from torch.distributed.tensor import DTensor
from trainers import TRAINERS, free_rate, rate, share, train

CHECKED_TENSORS = 6  # of each save


def _report_of(dcp: Any, upload: Future) -> dict[str, Any]:
    """The numbers of a finished save, and the few texts that say how it went."""
    if dcp.__name__ != "dcp_native":
        return {}
    return {
        name: value
        for name, value in upload.report.items()
        if isinstance(value, int) or name in ("staging", "save_id", "outcome")
    }


def _local(value: torch.Tensor) -> torch.Tensor:
    return value.to_local() if isinstance(value, DTensor) else value


class AsyncWorker(Worker):
    def __init__(self, rank: int, ranks: int, rendezvous: str) -> None:
        os.environ.setdefault("MASTER_ADDR", "127.0.0.1")  # torch's daemons meet there
        super().__init__(rank, ranks, rendezvous)
        self._ranks = ranks
        self._saves = 0
        importlib.import_module("dcp_native")

    def build(self, case: str, size: str, count: int | None = None) -> dict:
        """The state is not digested as a whole: each save looks at some of its tensors."""
        self._state = build(case, size, self._mesh, count)
        return {
            "tensors": count_tensors(self._state),
            "staged_bytes": sum(length for _, length in self._sources()),
            "local_bytes": local_bytes(self._state),
        }

    def _sources(self) -> list[tuple[int, int]]:
        """Memory of this rank's share: its shards, and every so many-th replicated tensor."""
        sharded = local_tensors(self._state, replicas=False)
        ours = {t.data_ptr() for t in sharded}
        plain = [t for t in local_tensors(self._state) if t.data_ptr() not in ours]
        kept = sharded + plain[self._rank :: self._ranks]
        return [(t.data_ptr(), t.nbytes) for t in kept]

    def fresh_memory(self, shared: bool) -> dict[str, float]:
        """What fresh memory for the staged bytes costs, both ranks at the same time."""
        dist.barrier()
        return touch_fresh(self._sources(), shared)

    def memcpy(self, repeats: int) -> list[float]:
        """Copies of the staged bytes into touched memory, one thread on each rank."""
        sources = self._sources()
        buffer = Buffer(sum(length for _, length in sources))
        samples = []
        for _ in range(1 + repeats):
            dist.barrier()
            samples.append(copy_tensors(sources, buffer.address))
        return samples[1:]

    def stage_torch(self, repeats: int) -> list[float]:
        """Of torch's stager with everything off, kept and warm."""
        stager = DefaultStager(StagingOptions(False, False, False, False))
        samples = []
        for _ in range(1 + repeats):
            dist.barrier()
            start = time.monotonic()
            stager.stage(self._state)
            samples.append(time.monotonic() - start)
        stager.close()
        return samples[1:]

    def limit_write(self, path: str, total_bytes: int) -> dict:
        self._limits = Limits()
        try:
            return super().limit_write(path, total_bytes)
        finally:
            self._limits = None
            release_free_memory()

    def warm_up(self, mode: str) -> dict:
        dcp = importlib.import_module("dcp_native")
        dist.barrier()
        start = time.monotonic()
        dcp.warm_up(self._state, async_checkpointer_type=AsyncCheckpointerType[mode])
        return {"wall_s": time.monotonic() - start}

    def _checked(self) -> dict[str, torch.Tensor]:
        """Some tensors by name, others at every save; the same names on all ranks."""
        names = list(self._state["model"])
        start = self._saves * CHECKED_TENSORS
        picked = {names[(start + i * 7) % len(names)] for i in range(CHECKED_TENSORS)}
        return {name: self._state["model"][name] for name in sorted(picked)}

    def _compare(self, module: str, path: str, expected: dict[str, torch.Tensor]) -> list[str]:
        """Loads the tensors of `expected` from `path` over what the trainer made of them."""
        dcp = importlib.import_module(module)
        targets = {name: self._state["model"][name] for name in expected}
        dcp.load({"model": targets}, checkpoint_id=path)
        return [
            f"{path}: {name} is not what it was when the save was called"
            for name, value in expected.items()
            if not torch.equal(_local(targets[name]).view(torch.int32), value)
        ]

    def save(
        self,
        module: str,
        mode: str,
        path: str,
        trainer: str | None = None,
        free_s: float = 0.5,
        deadline_s: float = 120,
    ) -> dict:
        """One save in the background, beside a trainer or an idle process; then a check."""
        dcp = importlib.import_module(module)
        work = None if trainer is None else TRAINERS[trainer]()
        checked = self._checked()
        expected = {name: _local(t).view(torch.int32).clone() for name, t in checked.items()}
        if self._rank == 0:
            settle(os.path.dirname(path))
        dist.barrier()
        free = [] if work is None else [free_rate(work, free_s)]
        dist.barrier()
        ended: list[float] = []
        background = children()
        peak = Peak(background)
        called = time.monotonic()
        upload = dcp.async_save(
            self._state,
            checkpoint_id=path,
            async_checkpointer_type=AsyncCheckpointerType[mode],
        )
        returned, cpu_before = time.monotonic(), cpu_s(background)
        upload.add_done_callback(lambda _: ended.append(time.monotonic()))
        for t in checked.values():
            _local(t).view(torch.int32).bitwise_xor_(1)
        stamps = [] if work is None else train(work, upload, deadline_s)
        upload.result(max(1.0, returned + deadline_s - time.monotonic()))
        cpu = cpu_s(background) - cpu_before
        extra_bytes = peak.extra_bytes()
        report = _report_of(dcp, upload)
        dist.barrier()
        if work is not None:
            free.append(free_rate(work, free_s))
        result = {
            "call_s": returned - called,
            "vote_s": report.get("vote_ns", 0) / 1e9,
            "upload_s": ended[0] - returned,
            "cpu_s": cpu,
            "extra_bytes": extra_bytes,
            "writers": len(children(WRITER)),
            "report": report,
            "wrong": not_native(dcp) + self._compare(module, path, expected),
        }
        self._saves += 1
        if work is not None:  # where the report says when this rank's own upload ended, until then
            write_s = report.get("write_ns", 0) / 1e9 or result["upload_s"]
            until = returned + min(write_s, result["upload_s"])
            result["share"] = share(rate(stamps, until), *free)
        return result

    def verify(self, path: str) -> list[str]:
        """Every byte of a checkpoint of dcp_native, by its checksums."""
        found = importlib.import_module("dcp_native").verify(
            path, process_group=dist.distributed_c10d._get_default_group()
        )
        return [] if found else [f"{path}: {p}" for p in found.problems]

    def growth(self, mode: str, path: str, looks: list[int]) -> dict:
        """Saves over and over to one directory; memory after as many saves as `looks` says."""
        dcp = importlib.import_module("dcp_native")
        dcp.trim()
        release_free_memory()
        memory, report = {}, {}
        for turn in range(1, looks[-1] + 1):
            upload = dcp.async_save(
                self._state,
                checkpoint_id=path,
                async_checkpointer_type=AsyncCheckpointerType[mode],
            )
            upload.result(60)
            report = _report_of(dcp, upload)
            del upload
            if turn in looks:
                dist.barrier()
                memory[turn] = resident()
        return {"memory": memory, "report": report, "writers": len(children(WRITER))}


if __name__ == "__main__":
    serve(AsyncWorker)
