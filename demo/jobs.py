"""jobs.py: starting, watching and killing torchrun jobs, and reading what they leave. Standard
library only.
"""

import contextlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable

HERE = pathlib.Path(__file__).resolve().parent
TIMEOUT_S = 150


class DemoError(RuntimeError):
    """A job failed, or the demonstration could not be carried out."""


class Job:
    """A torchrun job with its output in a file. Leaving the context ends every process of it."""

    def __init__(
        self, scratch: pathlib.Path, name: str, ranks: int, script: str, *arguments: object
    ) -> None:
        self.name, self.output = name, scratch / f"{name}.out"
        path = os.pathsep.join(filter(None, (str(HERE.parent), os.environ.get("PYTHONPATH"))))
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
        argv = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={ranks}",
        ]
        argv += [str(HERE / script), *map(str, arguments)]
        with open(self.output, "wb") as out:
            self.process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=env, cwd=scratch
            )

    def __enter__(self) -> "Job":
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.terminate()  # torchrun ends its workers on SIGTERM
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def finish(self) -> None:
        """Waits for the job; raises DemoError with its last output unless it ends well."""
        try:
            code = self.process.wait(TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise DemoError(
                f"job {self.name} did not end within {TIMEOUT_S} s\n{self._tail()}"
            ) from None
        if code != 0:
            raise DemoError(f"job {self.name} ended with {code}\n{self._tail()}")

    def wait_until(self, condition: Callable[[], bool]) -> None:
        """Polls `condition` closely: what is waited for may last for a few milliseconds only."""
        deadline = time.monotonic() + TIMEOUT_S
        while not condition():
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise DemoError(
                    f"job {self.name} never came to where it was to be killed\n{self._tail()}"
                )
            time.sleep(0.0005)

    def kill(self, worker_pids: list[int]) -> None:
        """SIGKILL for the workers and torchrun; returns when none of them can touch a file any
        more.
        """
        for pid in (*worker_pids, self.process.pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.process.wait()
        deadline = time.monotonic() + 30
        while any(_is_running(pid) for pid in worker_pids):
            if time.monotonic() > deadline:
                raise DemoError("a killed worker does not end")
            time.sleep(0.005)

    def _tail(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")[-4000:]


def _is_running(pid: int) -> bool:
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def in_flight(directory: pathlib.Path) -> bool:
    """True if a save has put bytes into a data file of `directory` and has not published it yet."""
    started = False
    with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in entries:
            if entry.name == ".metadata":
                return False
            if entry.name.endswith(".distcp"):
                with contextlib.suppress(FileNotFoundError):
                    started = started or entry.stat().st_size > 0
    return started


def newest_complete(checkpoints: pathlib.Path) -> int | None:
    """The highest step under `checkpoints` that has a `.metadata`, or None."""
    steps = (int(p.parent.name.removeprefix("step-")) for p in checkpoints.glob("step-*/.metadata"))
    return max(steps, default=None)


def read_log(path: pathlib.Path) -> tuple[list, list[tuple[int, list[str]]], list[str]]:
    """Returns (steps resumed from, [(step, losses)], paths of the saves and loads) of a log.

    Its jobs may have been killed in the middle of a line.
    """
    resumed, losses, paths = [], [], []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            entry = json.loads(line)
            if "step" in entry:
                losses.append((entry["step"], entry["losses"]))
            elif "path" in entry:
                paths.append(entry["path"])
            else:
                resumed.append(entry["resumed_from"])
    return resumed, losses, paths


def read_json(path: pathlib.Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))
