"""bench: the limits of the disk under a directory, and what a save of some size would take.

What dcp_native does is measured beside what the device can do in the same minute: one file written
and read with direct I/O, one through the page cache, and a real save and load.
"""

from __future__ import annotations

import argparse
import errno
import mmap
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from .output import Column, CommandError, Output
from .units import byte_count, bytes_text, positive, seconds_text

_BLOCK_BYTES = 8 << 20
_ALIGNMENT = 4096
_SYNCS = 20
_LEAST_BYTES = 2 * _BLOCK_BYTES
_TENSORS = 16
_SAVE = "save by dcp_native"
_WRITES = ("write", "save")
_READS = ("read", "load")


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="this disk's limits, and what a save would take",
        description="Writes and reads files in DIR (removed afterwards) to find out how fast the "
        "disk below it is, saves and loads a checkpoint of that size from this process, and says "
        "what a save of --save bytes would take.",
    )
    parser.add_argument("dir", type=Path, nargs="?", default=Path("."), help="where (here)")
    parser.add_argument(
        "--size", type=byte_count, default=10**9, metavar="BYTES", help="of the files (1GB)"
    )
    parser.add_argument(
        "--save", type=byte_count, default=10**11, metavar="BYTES", help="to estimate (100GB)"
    )
    parser.add_argument(
        "--threads", type=positive, default=2, metavar="N", help="that write and read (2)"
    )
    parser.add_argument("--repeat", type=positive, default=3, metavar="N", help="take the best (3)")
    parser.add_argument(
        "--no-checkpoint", action="store_true", help="the disk alone, without torch"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: Output) -> int:
    _check_space(args.dir, args.size)
    with tempfile.TemporaryDirectory(prefix=".dcp_native-bench-", dir=args.dir) as directory:
        path = Path(directory)
        ways = _ways(path, args.size, args.threads)
        if not args.no_checkpoint:
            ways |= _checkpoint_ways(path / "checkpoint", args.size)
        rates = _rates(ways, args.repeat, args.size, out)
        syncs = _sync_seconds(path)
    kind = _file_system(args.dir)
    if out.as_json:
        out.json({
            "path": str(args.dir), "file_system": kind, "size_bytes": args.size,
            "threads": args.threads, "bytes_per_s": rates,
            "sync_ns": round(syncs * 1e9), "save_bytes": args.save,
            "save_estimate_ns": round(_estimate(args.save, rates, syncs) * 1e9),
        })  # fmt: skip
        return 0
    writes, reads = (_best(rates, words) for words in (_WRITES, _READS))
    out.line(f"{args.dir.resolve()} ({kind}), files of {bytes_text(args.size)}", style="bold")
    out.table(
        (Column("what"), Column("rate", True), Column("of the best", True)),
        [
            (
                name,
                f"{bytes_text(rate)}/s",
                f"{100 * rate / (writes if name.startswith(_WRITES) else reads):.0f}%",
            )
            for name, rate in rates.items()
        ],
    )
    out.line(f"a small file made durable: {seconds_text(syncs)}")
    out.line()
    out.line(
        f"a save of {bytes_text(args.save)} to this disk: about "
        f"{seconds_text(_estimate(args.save, rates, syncs))}; not below "
        f"{seconds_text(args.save / writes)} by what the disk did here"
    )
    return 0


def _best(rates: dict[str, float], words: tuple[str, ...]) -> float:
    return max(rate for name, rate in rates.items() if name.startswith(words))


def _estimate(save_bytes: int, rates: dict[str, float], sync_s: float) -> float:
    """By the rate of a real save where there is one; data, metadata and directory are synced."""
    return save_bytes / (rates.get(_SAVE) or _best(rates, _WRITES)) + 3 * sync_s


def _check_space(path: Path, size: int) -> None:
    if size < _LEAST_BYTES:
        raise CommandError(f"--size: at least {bytes_text(_LEAST_BYTES)}, or it says nothing")
    try:
        free = shutil.disk_usage(path).free
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror or error}") from None
    if free < 2 * size:
        raise CommandError(
            f"{path}: {bytes_text(free)} are free, and files of {bytes_text(size)} need twice that"
        )


def _file_system(path: Path) -> str:
    """By the longest mount point above a path."""
    where, best, kind = str(path.resolve()), "", "unknown file system"
    try:
        lines = Path("/proc/mounts").read_text(errors="replace").splitlines()
    except OSError:
        return kind
    for line in lines:
        _, point, name, *_ = (part.encode().decode("unicode_escape") for part in line.split())
        inside = where == point or where.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best):
            best, kind = point, name
    return kind


# ---- the disk ----


_Way = Callable[[], float]
"""Does it once; the bytes per second, or 0 where the file system has no such way."""


def _rates(ways: dict[str, _Way], repeat: int, size: int, out: Output) -> dict[str, float]:
    """The best of each; in turn, so that what else the disk does meets all alike."""
    found: dict[str, list[float]] = {name: [] for name in ways}
    with out.progress("measuring", repeat * len(ways) * size) as update:
        for turn in range(repeat):
            for number, (name, way) in enumerate(ways.items()):
                found[name].append(way())
                update((turn * len(ways) + number + 1) * size)
    return {name: max(rates) for name, rates in found.items() if max(rates) > 0}


def _ways(path: Path, size: int, threads: int) -> dict[str, _Way]:
    size -= size % _BLOCK_BYTES

    def way(one: Callable[[Path, int, int, int], float], name: str, flag: int) -> _Way:
        def run() -> float:
            try:
                return size / one(path / name, size, threads, flag)
            except OSError as error:
                if flag and error.errno == errno.EINVAL:
                    return 0.0
                raise

        return run

    direct = getattr(os, "O_DIRECT", 0)
    return {
        "write, direct": way(_write, "direct", direct),
        "write, through the page cache": way(_write, "cached", 0),
        "read, direct": way(_read, "cached", direct),
        "read, through the page cache": way(_read, "cached", 0),
    }


def _write(file: Path, size: int, threads: int, flag: int) -> float:
    """Seconds until a new file is durable."""
    file.unlink(missing_ok=True)
    block = _block()
    began = time.perf_counter()
    descriptor = os.open(file, os.O_CREAT | os.O_WRONLY | flag, 0o600)
    try:
        _in_parts(size, threads, lambda at: _all(os.pwrite(descriptor, block, at)))
        os.fdatasync(descriptor)
    finally:
        os.close(descriptor)
    return time.perf_counter() - began


def _read(file: Path, size: int, threads: int, flag: int) -> float:
    _forget(file)
    descriptor = os.open(file, os.O_RDONLY | flag)
    try:
        buffers = [_block() for _ in range(threads)]
        began = time.perf_counter()
        free = list(buffers)

        def one(at: int) -> None:
            buffer = free.pop()
            _all(os.preadv(descriptor, [buffer], at))
            free.append(buffer)

        _in_parts(size, threads, one)
        return time.perf_counter() - began
    finally:
        os.close(descriptor)


def _block() -> mmap.mmap:
    """Page-aligned memory of noise, which no device compresses away."""
    block = mmap.mmap(-1, _BLOCK_BYTES)
    noise = os.urandom(1 << 20)
    for at in range(0, _BLOCK_BYTES, len(noise)):
        block[at : at + len(noise)] = noise
    return block


def _all(count: int) -> None:
    if count != _BLOCK_BYTES:
        raise CommandError(f"a read or write of {_BLOCK_BYTES} bytes ended after {count}")


def _in_parts(size: int, threads: int, one: Callable[[int], None]) -> None:
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(one, range(0, size, _BLOCK_BYTES)))


def _forget(file: Path) -> None:
    """Take a file out of the page cache, so that a read meets the disk."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fdatasync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _sync_seconds(path: Path) -> float:
    """Median of writing a small file, renaming it and syncing its directory."""
    seconds = []
    directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for _ in range(_SYNCS):
            began = time.perf_counter()
            descriptor = os.open(path / "small", os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600)
            try:
                os.write(descriptor, b"x" * _ALIGNMENT)
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
            os.rename(path / "small", path / "renamed")
            os.fsync(directory)
            seconds.append(time.perf_counter() - began)
    finally:
        os.close(directory)
    return statistics.median(seconds)


# ---- a checkpoint ----


def _checkpoint_ways(path: Path, size: int) -> dict[str, _Way]:
    """A state dict of 16 tensors, saved and loaded without a process group."""
    import torch

    from .. import load, save

    warnings.filterwarnings("ignore", message="torch.distributed is disabled")
    each = size // _TENSORS // 4
    state = {f"tensor.{i}": torch.rand(each) for i in range(_TENSORS)}
    total = each * 4 * _TENSORS

    def one_save() -> float:
        shutil.rmtree(path, ignore_errors=True)
        for tensor in state.values():
            tensor.add_(1.0)
        began = time.perf_counter()
        save(state, checkpoint_id=path, no_dist=True)
        return total / (time.perf_counter() - began)

    def one_load() -> float:
        for file in path.iterdir():
            _forget(file)
        began = time.perf_counter()
        load(state, checkpoint_id=path, no_dist=True)
        return total / (time.perf_counter() - began)

    one_save()  # fills buffers that later ones have
    return {_SAVE: one_save, "load by dcp_native, verified": one_load}
