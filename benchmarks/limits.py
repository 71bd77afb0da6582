"""limits.py: what the machine itself can do with the bytes of a checkpoint, measured without any
checkpoint code.

Every figure is the cheapest possible way to do the same work: one process per rank moves its share
from (or to) memory that is already touched, in huge pages, in requests of 8 MiB (two reads at a
time, one write), with direct I/O on a disk and with plain write() on tmpfs. A save or load of the
same bytes can come close to these figures but not beat them, apart from noise. The buffer is larger
than the caches that matter and smaller than the checkpoint, so it is cycled.

Not thread-safe: one object per process.
"""

import contextlib
import ctypes
import errno
import mmap
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy

REQUEST_BYTES = 8 << 20
READS_AT_ONCE = 2
BUFFER_BYTES = 256 << 20
HUGE_PAGE_BYTES = 2 << 20
TMPFS_MAGIC = 0x01021994

_libc = ctypes.CDLL(None, use_errno=True)


def is_tmpfs(path: str) -> bool:
    """True if `path` lies on tmpfs, where direct I/O means nothing and write() is the limit."""
    buf = (ctypes.c_long * 32)()  # struct statfs is shorter; f_type is its first word
    if _libc.statfs(os.fsencode(path), ctypes.byref(buf)) != 0:
        raise OSError(ctypes.get_errno(), "statfs", path)
    return buf[0] & 0xFFFFFFFF == TMPFS_MAGIC


def release_free_memory() -> None:
    """Returns what malloc keeps, so that one contender's leftovers do not hide another's need."""
    _libc.malloc_trim(0)


def status_bytes(field: str) -> int:
    """A size that /proc/self/status gives: VmRSS, VmHWM, RssAnon."""
    with open("/proc/self/status", encoding="ascii") as f:
        for line in f:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise RuntimeError(f"no {field} in /proc/self/status")


def restart_peak() -> None:
    """The peak VmHWM of this process starts again at VmRSS."""
    with open("/proc/self/clear_refs", "w", encoding="ascii") as f:
        f.write("5")


class Buffer:
    """Touched anonymous memory, aligned to a huge page, in huge pages where the kernel has any."""

    def __init__(self, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self._map = mmap.mmap(
            -1, size_bytes + HUGE_PAGE_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        )
        try:
            self._map.madvise(mmap.MADV_HUGEPAGE)
        except OSError as e:  # a kernel without transparent huge pages
            if e.errno != errno.EINVAL:
                raise
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._map))
        skip = -start % HUGE_PAGE_BYTES
        self.address = start + skip
        self.view = memoryview(self._map)[skip : skip + size_bytes]
        ctypes.memset(self.address, 0x5A, size_bytes)


def copy_tensors(sources: list[tuple[int, int]], address: int) -> float:
    """Copies memory (address, bytes) one after another to `address`; returns the seconds."""
    start = time.monotonic()
    for source, length in sources:
        ctypes.memmove(address, source, length)
        address += length
    return time.monotonic() - start


def touch_fresh(sources: list[tuple[int, int]], shared: bool) -> dict[str, float]:
    """Seconds of touching as much fresh memory as `sources` have, page by page, and of copying them
    to such memory: private in huge pages, or a memfd, which another process could map. Touched once
    before, unmeasured: under a hypervisor the pages may have to come from the host first.
    """
    size_bytes = sum(length for _, length in sources)
    out = {}
    for what in ("touch_s", "touch_s", "copy_s"):
        if shared:
            fd = os.memfd_create("fresh")
            os.ftruncate(fd, size_bytes)
            fresh = mmap.mmap(fd, size_bytes)
            os.close(fd)
        else:
            fresh = mmap.mmap(-1, size_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with contextlib.suppress(OSError):  # a kernel without transparent huge pages
                fresh.madvise(mmap.MADV_HUGEPAGE)
        if what == "touch_s":
            pages = numpy.frombuffer(fresh, dtype=numpy.uint8)[:: mmap.PAGESIZE]
            start = time.monotonic()
            pages[:] = 1
            out[what] = time.monotonic() - start
            del pages
        else:
            first = ctypes.c_char.from_buffer(fresh)
            out[what] = copy_tensors(sources, ctypes.addressof(first))
            del first
        fresh.close()
    return out


def _open(path: str, flags: int) -> tuple[int, bool]:
    """Returns (descriptor, direct): direct I/O on a disk, except where its file system has none."""
    if not is_tmpfs(os.path.dirname(path)):
        try:
            return os.open(path, flags | os.O_DIRECT, 0o644), True
        except OSError as e:
            if e.errno != errno.EINVAL:
                raise
    return os.open(path, flags & ~os.O_EXCL, 0o644), False


class Limits:
    """The measurements, in seconds; opening and closing files is not part of them."""

    def __init__(self, largest_bytes: int = BUFFER_BYTES) -> None:
        size = min(
            BUFFER_BYTES, max(REQUEST_BYTES, -(-largest_bytes // REQUEST_BYTES) * REQUEST_BYTES)
        )
        self._buffer = Buffer(size)
        self._other = Buffer(size)

    def _requests(self, total_bytes: int) -> Iterator[tuple[int, int]]:
        """Yields (offset in the buffer, length), in all `total_bytes` rounded up to 4096."""
        done, total_bytes = 0, -(-total_bytes // 4096) * 4096
        while done < total_bytes:
            at = done % self._buffer.size_bytes
            yield at, min(REQUEST_BYTES, total_bytes - done)
            done += REQUEST_BYTES

    def write(self, path: str, total_bytes: int) -> float:
        """Writes a new file and syncs it once; on tmpfs that is write() into new pages."""
        fd, _direct = _open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        try:
            start = time.monotonic()
            for at, length in self._requests(total_bytes):
                view = self._buffer.view[at : at + length]
                while view:
                    view = view[os.write(fd, view) :]
            os.fdatasync(fd)
            return time.monotonic() - start
        finally:
            os.close(fd)

    def read(self, path: str, total_bytes: int) -> float:
        """Reads a file of `write` into touched memory, two requests at a time; it was never in the
        page cache unless it is on tmpfs.
        """
        fd, direct = _open(path, os.O_RDONLY)
        if not direct:
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        try:
            requests = list(self._requests(total_bytes))
            offsets = range(0, len(requests) * REQUEST_BYTES, REQUEST_BYTES)

            def read_one(request: tuple[int, int], offset: int) -> None:
                at, length = request
                view = self._buffer.view[at : at + length]
                while view:
                    got = os.preadv(fd, [view], offset)
                    if got == 0:
                        raise OSError(errno.EIO, "file of the read limit is too short", path)
                    view, offset = view[got:], offset + got

            with ThreadPoolExecutor(READS_AT_ONCE) as pool:
                start = time.monotonic()
                list(pool.map(read_one, requests, offsets))
            return time.monotonic() - start
        finally:
            os.close(fd)

    def memcpy(self, total_bytes: int) -> float:
        """Copies between two touched buffers."""
        start = time.monotonic()
        for at, length in self._requests(total_bytes):
            ctypes.memmove(self._other.address + at, self._buffer.address + at, length)
        return time.monotonic() - start


def settle(path: str) -> None:
    """Waits until the file system of `path` has nothing left to write, so that no one pays for
    the contender before it.
    """
    fd = os.open(path, os.O_RDONLY)
    try:
        if _libc.syncfs(fd) != 0:
            raise OSError(ctypes.get_errno(), "syncfs", path)
    finally:
        os.close(fd)


def files_below(directory: str) -> Iterator[str]:
    """The files of `directory` and of what is in it; links to others are not followed."""
    for where, _, names in os.walk(directory):
        paths = (os.path.join(where, name) for name in names)
        yield from (path for path in paths if not os.path.islink(path))


def drop_page_cache(directory: str) -> None:
    """Writes back the files below `directory` and drops them from the page cache, so that the next
    load is a cold one.
    """
    for path in files_below(directory):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def warm_page_cache(directory: str) -> None:
    """Reads the files below `directory` through the page cache, so that the next load is hot."""
    for path in files_below(directory):
        with open(path, "rb", buffering=0) as f:
            while f.read(REQUEST_BYTES):
                pass


def directory_bytes(directory: str) -> int:
    """The bytes of all files below `directory`."""
    return sum(os.stat(path).st_size for path in files_below(directory))
