"""soak_worker.py: one rank of async_soak.py: saves what only this save can have saved, spoils it
the moment the call returns, kills its own writer process when told to, and says what came back.

Commands and answers are those of bench_worker.py.
"""

import contextlib
import os
import signal
import threading
import time
from concurrent.futures import TimeoutError

import torch
import torch.distributed as dist
from bench_worker import Worker, serve
from processes import WRITER, children
from states import build, local_bytes, local_tensors
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

import dcp_native as dcp

SPOILT = -1


class SoakWorker(Worker):
    def build(self, tensors: int) -> int:
        """Returns the bytes of this rank's own."""
        self._state = build("mixed", "small", self._mesh, tensors)
        return local_bytes(self._state, replicas=self._rank == 0)

    def _values(self, turn: int) -> list[int]:
        """What the local tensors hold in the save `turn`: replicas the same on every rank."""
        sharded = {t.data_ptr() for t in local_tensors(self._state, replicas=False)}
        return [
            turn * 10_000 + i * 10 + (1 + self._rank if t.data_ptr() in sharded else 0)
            for i, t in enumerate(local_tensors(self._state))
        ]

    def _fill(self, values: list[int]) -> None:
        for t, value in zip(local_tensors(self._state), values, strict=True):
            t.view(torch.int32).fill_(value)

    def save(
        self,
        turn: int,
        path: str,
        mode: str,
        kills_after_s: list[float | None],  # by rank; None: no kill
        deadline_s: float,
    ) -> dict:
        kill_after_s = kills_after_s[self._rank]
        self._fill(self._values(turn))
        killed: list[int] = []

        def kill() -> None:
            for pid in children(WRITER):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                    killed.append(pid)

        timer = threading.Timer(kill_after_s or 0, kill)
        dist.barrier()
        start = time.monotonic()
        if kill_after_s is not None:
            timer.start()
        error = None
        try:
            upload = dcp.async_save(
                self._state, checkpoint_id=path, async_checkpointer_type=AsyncCheckpointerType[mode]
            )
            self._fill([SPOILT] * len(local_tensors(self._state)))
            upload.result(deadline_s)
        except dcp.CheckpointException as e:
            error = str(e)[:500]
        except TimeoutError:
            error = "HUNG"
        seconds = time.monotonic() - start
        if kill_after_s is not None:
            timer.join()
        return {
            "committed": error is None,
            "error": error,
            "killed": len(killed),
            "seconds": seconds,
            "writers": children(WRITER),
        }

    def check(self, path: str, turn: int | None) -> list[str]:
        """What is wrong with the checkpoint, which is of the save `turn`, or not there."""
        self._fill([SPOILT] * len(local_tensors(self._state)))
        try:
            dcp.load(self._state, checkpoint_id=path)
        except dcp.CheckpointException as e:
            return [] if turn is None else [f"does not load: {e}"[:500]]
        if turn is None:
            return ["loads, though nothing was ever committed there"]
        found = zip(local_tensors(self._state), self._values(turn), strict=True)
        return [
            f"tensor {i} is not of save {turn}"
            for i, (t, value) in enumerate(found)
            if not bool((t.view(torch.int32) == value).all())
        ]


if __name__ == "__main__":
    serve(SoakWorker)
