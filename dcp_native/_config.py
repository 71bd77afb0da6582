"""Settings: one frozen dataclass, with an environment variable for each."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from typing import Any, Literal

__all__ = ["Config", "config", "configure"]


@dataclasses.dataclass(frozen=True)
class Config:
    """Settings of this process.  Ranks of one job should agree on them.

    Attributes:
        verify: check the CRC32 of what is loaded (payloads and blocks, ours and stock torch's).  Of
            a block (1 MiB) of which less than 9/16 is wanted only the wanted rows are read, and
            counted in the report's ``unverified_bytes``; ``"strict"`` reads such blocks whole and
            checks them too.
        strict_coverage: a target that the saved chunks do not cover is an error; torch leaves that
            memory untouched.
        allow_unsafe_objects: objects (and ``.metadata`` with unknown classes) that the safe loader
            refuses are unpickled as torch does.  Off: refused by name.
        direct_io: ``"auto"`` uses O_DIRECT where the file system gains from it, ``"off"`` never,
            ``"on"`` fails where it is not possible.
        gpu_direct: ``"auto"``: a load has large tensors on CUDA devices read from storage straight
            into their memory, by cuFile (GPUDirect Storage), where they are one run there, are
            wanted whole, and can be verified on the device if they are verified at all; what cuFile
            refuses is read as with ``"off"``, and the report's ``device_reason`` says why; its
            ``device_direct_bytes`` says how much it was.  ``"on"``: the same, but a load to a
            device for which cuFile cannot be had raises.  Starting cuFile takes time and memory.
        read_once: data that several ranks of a load want is read by one of them.  ``"host"``: for
            the ranks of one host, which hand it over through shared memory; ``"group"``: what all
            ranks want whole also across hosts, through the process group, if every rank asks for
            it; ``"off"``: every rank reads what it wants.
        comm: over what the ranks agree on a plan and on the outcome.  ``"auto"``: over NCCL where
            the state dict of any rank holds CUDA tensors and the process group has an NCCL
            communicator, connected and well on all ranks; else over its CPU backend.  ``"nccl"``:
            the communicator is connected if need be, and where it can not be used every rank
            raises; one rank that asks for it is enough.  ``"cpu"``: the CPU backend, for all ranks
            when one has this set.  A group's first save decides for its life, or the second where
            the first found the communicator not connected yet; NCCL is taken only if a reduction
            over it has worked on all ranks.  A group without a CPU backend uses NCCL, and ``"cpu"``
            raises.  Background saves talk over the store.
        incremental_links: how a save with ``base=`` takes over unchanged data files.
            ``"reflink"`` shares their blocks (btrfs, XFS, bcachefs and the like; where the file
            system cannot, everything is written and the report says so).  ``"hard"`` makes hard
            links, on any file system, and makes the files read-only, for whoever truncates one of
            them in place (as stock torch's overwrite does, run as root) damages every checkpoint
            that links it.
        content_hash: store content hashes with every save, so that the next one can name it as
            its ``base``.  A save that is given a base stores them anyway.
        io_uring: ``"auto"`` writes through io_uring where the kernel allows it and a save has more
            than one request, ``"off"`` by a thread, ``"on"`` fails where it is not possible.
        writer_nice: nice value, 1 to 19, of the threads that write; with async_save of the one that
            fills their buffers too.  0 leaves it.  The trainer's threads are never touched, so a
            foreground save through io_uring, which has no writing thread, has nothing to slow down.
        writer_io_class: I/O class of those threads and of requests through io_uring: ``"none"``
            leaves it, ``"best-effort:0"`` to ``"best-effort:7"`` (the lowest), ``"idle"``.  Of use
            where the device has an I/O scheduler that looks at it (bfq, mq-deadline).
        write_limit_bytes_s: most bytes per second that each rank writes; 0 is no limit.
        split_replicated: tensors that several ranks hold whole and that are divided by rows over
            them when saved.  ``"auto"``: those of 64 MiB and more that would leave one rank with
            more than a tenth above its share; ``"off"``: none; a number: all of as many bytes and
            more.  The coordinator's setting holds; not with ``dedup_save_to_lowest_rank`` or
            ``use_collectives=False``.
        broadcast_metadata: ``save`` gives every rank the metadata itself; else all but the
            coordinator read it from the checkpoint when they first look at it.  Only where all
            ranks of a save have this set, and not for ``async_save``, whose background runs no
            collective.
        arenas: background saves that may be in flight at once, each with staging memory of its own.
        arena_cap_bytes: most staging memory of this process; 0: what the machine and its cgroups
            can spare.  A save that does not fit is written before ``async_save`` returns.
        async_overlap: what an ``async_save`` does that finds ``arenas`` saves (or one of the same
            directory) in flight.  ``"wait"``: for the oldest; ``"skip"``: all ranks leave it out if
            any of them is busy, its future gives None; ``"fail"``: the same with an exception.
        async_timeout_s: seconds from the end of staging after which a background save is given up;
            0: the process group's timeout, a day for a single process.
        host_timeout_s: seconds without a sign of life of another host until a background save
            fails; a process that dies on this host is noticed at once.
        survive_trainer: a staged save with ``AsyncCheckpointerType.PROCESS`` is finished and
            committed by the writer processes when the trainers die.  All ranks must agree on it.
            While trainers live they decide: where one dies alone the others wait for it until the
            deadline and give the save up, unless the coordinator's process has committed it.
        progress: how far an operation has come.  ``"auto"``: a bar for those over 2 s, on rank 0
            where standard error is a terminal; ``"off"``: nothing; ``"on"``: also where it is no
            terminal, as a line every 10 s.  A callable, instead of a bar and on every rank, gets
            (operation, bytes done, bytes in all or 0, bytes per second) of this rank four times a
            second and at the end, on a thread of its own; operation is ``"save"`` (Hugging Face
            files too), ``"load"``, ``"async_save"``, ``"verify"``, ``"dcp_to_torch_save"`` or
            ``"consolidate"``.  What it raises ends its calls for this operation and nothing else;
            one that does not return delays the operation's end by a second at most; what it saves
            or loads itself is not watched.  See also ``future.progress()``.
        trace: a directory for what saves and loads do when, in files for https://ui.perfetto.dev,
            one for each process (``python -m dcp_native trace merge`` makes one of them), which
            grows twice a second; None: nothing is recorded.
        native: False, on all ranks alike, sends every call through torch's own implementation.
    """

    verify: bool | Literal["strict"] = True
    strict_coverage: bool = True
    allow_unsafe_objects: bool = True
    direct_io: Literal["auto", "off", "on"] = "auto"
    gpu_direct: Literal["off", "auto", "on"] = "off"
    read_once: Literal["host", "group", "off"] = "host"
    comm: Literal["auto", "nccl", "cpu"] = "auto"
    incremental_links: Literal["reflink", "hard"] = "reflink"
    content_hash: bool = False
    io_uring: Literal["auto", "off", "on"] = "auto"
    writer_nice: int = 0
    writer_io_class: str = "none"
    write_limit_bytes_s: int = 0
    split_replicated: Literal["auto", "off"] | int = "auto"
    broadcast_metadata: bool = False
    arenas: int = 1
    arena_cap_bytes: int = 0
    async_overlap: Literal["wait", "skip", "fail"] = "wait"
    async_timeout_s: float = 0.0
    host_timeout_s: float = 10.0
    survive_trainer: bool = False
    progress: Literal["auto", "off", "on"] | Callable[[str, int, int, float], object] = "auto"
    trace: str | os.PathLike | None = None
    native: bool = True

    def __post_init__(self) -> None:
        if self.verify not in VERIFY:
            raise ValueError(f"verify must be one of {list(VERIFY)}, not {self.verify!r}")
        if self.read_once not in READ_ONCE:
            raise ValueError(
                f"read_once must be one of {sorted(READ_ONCE)}, not {self.read_once!r}"
            )
        if self.comm not in COMM:
            raise ValueError(f"comm must be one of {list(COMM)}, not {self.comm!r}")
        if self.direct_io not in DIRECT_IO:
            raise ValueError(
                f"direct_io must be one of {sorted(DIRECT_IO)}, not {self.direct_io!r}"
            )
        if self.gpu_direct not in GPU_DIRECT:
            raise ValueError(
                f"gpu_direct must be one of {sorted(GPU_DIRECT)}, not {self.gpu_direct!r}"
            )
        if self.incremental_links not in LINK_MODE:
            raise ValueError(
                f"incremental_links must be one of {sorted(LINK_MODE)}, "
                f"not {self.incremental_links!r}"
            )
        if self.io_uring not in IO_URING:
            raise ValueError(f"io_uring must be one of {sorted(IO_URING)}, not {self.io_uring!r}")
        if not 0 <= self.writer_nice <= 19:
            raise ValueError(f"writer_nice must be 0 to 19, not {self.writer_nice!r}")
        if not 0 <= self.write_limit_bytes_s < 1 << 60:
            raise ValueError(
                f"write_limit_bytes_s must be 0 to 2**60, not {self.write_limit_bytes_s!r}"
            )
        if not 1 <= self.arenas <= MOST_ARENAS:
            raise ValueError(f"arenas must be 1 to {MOST_ARENAS}, not {self.arenas!r}")
        if self.async_overlap not in ASYNC_OVERLAP:
            raise ValueError(
                f"async_overlap must be one of {list(ASYNC_OVERLAP)}, not {self.async_overlap!r}"
            )
        for name in ("arena_cap_bytes", "async_timeout_s"):
            most = 1e9 if name.endswith("_s") else 1 << 60
            if not 0 <= getattr(self, name) < most:
                raise ValueError(f"{name} must be 0 to {most:g}, not {getattr(self, name)!r}")
        if not 0 < self.host_timeout_s < 1e9:
            raise ValueError(f"host_timeout_s must be above 0, not {self.host_timeout_s!r}")
        if not callable(self.progress) and self.progress not in PROGRESS:
            raise ValueError(
                f"progress must be a callable or one of {list(PROGRESS)}, not {self.progress!r}"
            )
        if not isinstance(self.trace, (str, os.PathLike, type(None))):
            raise ValueError(f"trace must be a directory or None, not {self.trace!r}")
        if self.trace is not None:  # wherever the program works later
            object.__setattr__(self, "trace", os.path.abspath(self.trace))
        io_priority(self.writer_io_class)
        split, off = self.split_replicated, SPLIT_REPLICATED["off"]
        if not (
            split in SPLIT_REPLICATED
            if isinstance(split, str)
            else type(split) is int and 0 < split < off
        ):
            raise ValueError(
                f"split_replicated must be 'auto', 'off' or a number of bytes, not {split!r}"
            )


VERIFY = {False: 0, True: 1, "strict": 2}
"""``verify`` of _native.Load."""
READ_ONCE = {"host": 0, "group": 1, "off": 2}
"""Values of enum dcp_read_once (csrc/include/dcp_transfer.h)."""
COMM = ("auto", "nccl", "cpu")
DIRECT_IO = {"auto": 0, "off": 1, "on": 2}
"""Values of enum dcp_direct (csrc/include/dcp_engine.h)."""
GPU_DIRECT = {"off": 0, "auto": 1, "on": 2}
"""Values of enum gpu_direct (csrc/py/load_object.h)."""
PROGRESS = ("auto", "off", "on")
ASYNC_OVERLAP = ("wait", "skip", "fail")
MOST_ARENAS = 4
"""DCP_MAX_ARENAS (csrc/include/dcp_limits.h)."""
IO_URING = {"auto": 0, "off": 1, "on": 2}
"""Values of enum dcp_queue_use (csrc/include/dcp_engine.h)."""

_IO_CLASS_SHIFT = 13
_BEST_EFFORT, _IDLE = 2, 3


def io_priority(io_class: str) -> int:
    """``Config.writer_io_class`` as ioprio_set(2) takes it; 0 leaves it.

    Raises:
        ValueError: for a class or level that does not exist.
    """
    if io_class == "none":
        return 0
    if io_class == "idle":
        return _IDLE << _IO_CLASS_SHIFT
    name, _, level = io_class.partition(":")
    if name == "best-effort" and level in tuple("01234567"):
        return _BEST_EFFORT << _IO_CLASS_SHIFT | int(level)
    raise ValueError(
        'writer_io_class must be "none", "best-effort:0" to "best-effort:7" or "idle", '
        f"not {io_class!r}"
    )


LINK_MODE = {"reflink": 0, "hard": 1}
"""Values of enum dcp_link_mode (csrc/include/dcp_transfer.h)."""

SPLIT_REPLICATED = {"auto": 0, "off": 2**64 - 1}
"""DCP_SPLIT_AUTO and DCP_SPLIT_OFF (csrc/include/dcp_plan.h)."""


def _as_bool(text: str) -> bool:
    if text.lower() in ("1", "true", "yes", "on"):
        return True
    if text.lower() in ("0", "false", "no", "off"):
        return False
    raise ValueError(f"expected 0 or 1, got {text!r}")


def _as_verify(text: str) -> bool | str:
    return text if text == "strict" else _as_bool(text)


def _as_split(text: str) -> str | int:
    return int(text) if text.isdecimal() else text


ENVIRONMENT: dict[str, tuple[str, Callable[[str], Any]]] = {
    "DCP_NATIVE_VERIFY": ("verify", _as_verify),
    "DCP_NATIVE_STRICT_COVERAGE": ("strict_coverage", _as_bool),
    "DCP_NATIVE_ALLOW_UNSAFE_OBJECTS": ("allow_unsafe_objects", _as_bool),
    "DCP_NATIVE_DIRECT_IO": ("direct_io", str),
    "DCP_NATIVE_GPU_DIRECT": ("gpu_direct", str),
    "DCP_NATIVE_READ_ONCE": ("read_once", str),
    "DCP_NATIVE_COMM": ("comm", str),
    "DCP_NATIVE_INCREMENTAL_LINKS": ("incremental_links", str),
    "DCP_NATIVE_CONTENT_HASH": ("content_hash", _as_bool),
    "DCP_NATIVE_IO_URING": ("io_uring", str),
    "DCP_NATIVE_WRITER_NICE": ("writer_nice", int),
    "DCP_NATIVE_WRITER_IO_CLASS": ("writer_io_class", str),
    "DCP_NATIVE_WRITE_LIMIT_BYTES_S": ("write_limit_bytes_s", int),
    "DCP_NATIVE_SPLIT_REPLICATED": ("split_replicated", _as_split),
    "DCP_NATIVE_BROADCAST_METADATA": ("broadcast_metadata", _as_bool),
    "DCP_NATIVE_ARENAS": ("arenas", int),
    "DCP_NATIVE_ARENA_CAP_BYTES": ("arena_cap_bytes", int),
    "DCP_NATIVE_ASYNC_OVERLAP": ("async_overlap", str),
    "DCP_NATIVE_ASYNC_TIMEOUT_S": ("async_timeout_s", float),
    "DCP_NATIVE_HOST_TIMEOUT_S": ("host_timeout_s", float),
    "DCP_NATIVE_SURVIVE_TRAINER": ("survive_trainer", _as_bool),
    "DCP_NATIVE_PROGRESS": ("progress", str),
    "DCP_NATIVE_TRACE": ("trace", lambda text: text or None),
    "DCP_NATIVE": ("native", _as_bool),
}
"""Environment variable -> (field, parser).  Read once, at import."""


def _from_environment() -> Config:
    values = {}
    for variable, (field, parse) in ENVIRONMENT.items():
        if (text := os.environ.get(variable)) is not None:
            try:
                values[field] = parse(text)
            except ValueError as error:
                raise ValueError(f"environment variable {variable}: {error}") from None
    return Config(**values)


_current = _from_environment()


def config() -> Config:
    """The settings in force."""
    return _current


def configure(**changes: Any) -> Config:
    """Change settings for all later calls; returns the settings before, to restore them.

    Example: ``before = configure(verify=False)`` ... ``configure(**vars(before))``.

    Raises:
        TypeError: for a name that is no setting.
        ValueError: for a value that is not allowed.
    """
    global _current
    before = _current
    _current = dataclasses.replace(_current, **changes)
    return before
