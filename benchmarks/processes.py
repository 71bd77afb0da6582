"""processes.py: what /proc tells of this process and of its children, for the figures of saves that
write in another process.

A child that ends between two looks is not an error: it counts as nothing.
"""

import contextlib
import gc
import os
import time

from limits import release_free_memory

CPU_CLOCK_SCHED = 2  # with the complement of a pid above it, clock_getcpuclockid(3)
WRITER = "dcp_writer"


def _read(pid: int | str, name: str) -> str:
    try:
        with open(f"/proc/{pid}/{name}", encoding="utf-8", errors="replace") as f:
            return f.read()
    except (FileNotFoundError, ProcessLookupError):
        return ""


def _stat(pid: int | str) -> list[str]:
    """The fields of /proc/<pid>/stat from the state on: the third of proc(5) is the first here."""
    return _read(pid, "stat").rpartition(")")[2].split()


def runs(pid: int | str, command: str) -> bool:
    """Whether there is a process of this name that has not ended."""
    fields = _stat(pid)
    return bool(fields) and fields[0] not in "ZX" and _read(pid, "comm").strip() == command


def children(command: str | None = None) -> list[int]:
    """The running children of this process: all, or those of this name."""
    me, found = str(os.getpid()), []
    for entry in os.listdir("/proc"):
        if not entry.isdecimal():
            continue
        fields = _stat(entry)
        mine = len(fields) > 1 and fields[1] == me and fields[0] not in "ZX"
        if mine and (command is None or runs(entry, command)):
            found.append(int(entry))
    return found


def cpu_s(pids: list[int]) -> float:
    """User and system time of this process and of the processes `pids`."""
    total = time.process_time()
    for pid in pids:
        with contextlib.suppress(OSError):
            total += time.clock_gettime(~pid << 3 | CPU_CLOCK_SCHED)
    return total


def _kib(pid: int, name: str, field: str) -> int:
    for line in _read(pid, name).splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    return 0


def resident() -> dict[str, int]:
    """Bytes of this process and of its children after what is free was given back: resident, and
    with every shared page counted once.
    """
    gc.collect()
    release_free_memory()
    pids = (os.getpid(), *children())
    return {
        "rss": _kib(pids[0], "smaps_rollup", "Rss") << 10,
        "pss": sum(_kib(pid, "smaps_rollup", "Pss") for pid in pids) << 10,
    }


class Peak:
    """The most that this process and `pids` needed at a time beyond what they had before."""

    def __init__(self, pids: list[int]) -> None:
        self._before = {}
        for pid in (os.getpid(), *pids):
            try:
                with open(f"/proc/{pid}/clear_refs", "w", encoding="ascii") as f:
                    f.write("5")  # VmHWM starts again at VmRSS
            except (FileNotFoundError, ProcessLookupError):
                continue
            self._before[pid] = _kib(pid, "status", "VmRSS")

    def extra_bytes(self) -> int:
        grown = (_kib(pid, "status", "VmHWM") - had for pid, had in self._before.items())
        return sum(max(0, kib) for kib in grown) << 10
