"""ranks.py: starts the benchmark's worker processes, hands them commands and watches their memory.

One thread samples the anonymous memory of all ranks from outside, so that a rank that holds its
interpreter lock for long is watched all the same; everything else runs on the caller's thread.
"""

import json
import os
import pathlib
import select
import subprocess
import sys
import threading
import time

from program import BenchError

HERE = pathlib.Path(__file__).resolve().parent
SAMPLE_S = 0.01
START_TIMEOUT_S = 120
COMMAND_TIMEOUT_S = 900
STOP_TIMEOUT_S = 20


class Ranks:
    """The worker processes. A command goes to all; its answer is the list of their results.

    Without `watched` no thread samples their memory, and costs them processor time.
    """

    def __init__(
        self,
        count: int,
        scratch: pathlib.Path,
        worker: str = "bench_worker.py",
        watched: bool = True,
        timeout_s: float = COMMAND_TIMEOUT_S,
    ) -> None:
        path = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        self._timeout_s = timeout_s
        self._processes: list[subprocess.Popen] = []
        self._logs: list[pathlib.Path] = []
        self._samples: list[list[tuple[float, int]]] = []
        for rank in range(count):
            argv = [sys.executable, str(HERE / worker), str(rank), str(count)]
            argv.append(str(scratch / "rendezvous"))
            self._logs.append(scratch / f"rank{rank}.log")
            with open(self._logs[-1], "wb") as log:
                self._processes.append(
                    subprocess.Popen(
                        argv,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        env=env,
                        cwd=scratch,
                    )
                )
            self._samples.append([])
        self._stop = threading.Event()
        self._sampler = threading.Thread(target=self._sample, daemon=True)
        if watched:
            self._sampler.start()

    def wait_ready(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        for rank in range(len(self._processes)):
            self._answer(rank, deadline)

    def do(self, what: str, **arguments) -> list[dict]:
        """Runs the command `what` on every rank; returns the results by rank."""
        for samples in self._samples:
            samples.clear()
        request = json.dumps({"do": what, "with": arguments}).encode() + b"\n"
        for rank, process in enumerate(self._processes):
            try:
                process.stdin.write(request)
                process.stdin.flush()
            except BrokenPipeError:
                raise BenchError(f"rank {rank} died\n{self._tail(rank)}") from None
        deadline = time.monotonic() + self._timeout_s
        results = []
        for rank in range(len(self._processes)):
            answer = self._answer(rank, deadline)
            if not answer["ok"]:
                error = f"{what} failed on rank {rank}: {answer['error']}"
                raise BenchError(f"{error}\n{self._tail(rank)}")
            results.append(answer["result"])
        return results

    def measure(self, what: str, **arguments) -> dict:
        """As `do`, for a measured command: the slowest rank's time, the CPU time and the
        reads from disk of all, the memory of the rank that needed most, and what each reports."""
        results = self.do(what, **arguments)
        sampled = [
            max((b for t, b in samples if r["start"] <= t <= r["end"]), default=0)
            - r["anon_before_bytes"]
            for r, samples in zip(results, self._samples, strict=True)
        ]
        return {
            "wall_s": max(r["wall_s"] for r in results),
            "cpu_s": sum(r["cpu_s"] for r in results),
            "extra_bytes": max(r["extra_bytes"] for r in results),
            "extra_sampled_bytes": max(0, *sampled),
            "kept_bytes": max(r["kept_bytes"] for r in results),
            "disk_bytes": sum(r["disk_bytes"] for r in results),
            "reports": [r.get("report", {}) for r in results],
            "wrong": [f"rank {i}: {w}" for i, r in enumerate(results) for w in r.get("wrong", [])],
        }

    def close(self) -> None:
        """Ends the ranks: kindly, then, where a rank hangs, by SIGKILL."""
        self._stop.set()
        if self._sampler.is_alive():
            self._sampler.join()
        for process in self._processes:
            try:
                process.stdin.close()
            except BrokenPipeError:  # it is dead already
                continue
        deadline = time.monotonic() + STOP_TIMEOUT_S
        for process in self._processes:
            try:
                process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            process.stdout.close()

    def _sample(self) -> None:
        paths = [f"/proc/{p.pid}/status" for p in self._processes]
        while not self._stop.wait(SAMPLE_S):
            for path, samples in zip(paths, self._samples, strict=True):
                try:
                    with open(path, encoding="ascii") as f:
                        for line in f:
                            if line.startswith("RssAnon:"):
                                samples.append((time.monotonic(), int(line.split()[1]) * 1024))
                                break
                except OSError:  # the rank is gone: the next command says so
                    return

    def _answer(self, rank: int, deadline: float) -> dict:
        stream = self._processes[rank].stdout
        if not select.select([stream], [], [], max(0.0, deadline - time.monotonic()))[0]:
            raise BenchError(f"rank {rank} did not answer in time\n{self._tail(rank)}")
        line = stream.readline()
        if not line:
            raise BenchError(f"rank {rank} died\n{self._tail(rank)}")
        return json.loads(line)

    def _tail(self, rank: int) -> str:
        return self._logs[rank].read_text(encoding="utf-8", errors="replace")[-3000:]
