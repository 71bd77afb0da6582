"""The hooks of the fake devices (tests/fake/fake_gpu.h) and of the fake NCCL, for cases.

On a real GPU (tests/gpu) only `last_error` works, and only cases that need no more are run.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import torch

ILLEGAL_ADDRESS, OUT_OF_MEMORY, NOT_SUPPORTED = 700, 2, 801


def _library(name: str) -> ctypes.CDLL:
    here = os.environ.get("DCP_FAKE_LIBRARIES")
    return ctypes.CDLL(str(Path(here) / name) if here else name)


_runtime = _library("libcudart.so.13")
if "DCP_FAKE_LIBRARIES" in os.environ:
    _gpu, _nccl = _library("libcuda.so.1"), _library("libnccl.so.2")
    _gpu.dcp_fake_count.restype = ctypes.c_uint64
    _gpu.dcp_fake_count.argtypes = [ctypes.c_char_p]
    _gpu.dcp_fake_fail.argtypes = [ctypes.c_char_p, ctypes.c_uint64, ctypes.c_int]
    _gpu.dcp_fake_largest.argtypes = [ctypes.c_uint64]
    _gpu.dcp_fake_hold.argtypes = [ctypes.c_int]
    _gpu.dcp_fake_break.argtypes = [ctypes.c_int, ctypes.c_uint64, ctypes.c_int]
    _nccl.fake_nccl_set_faults.argtypes = [ctypes.c_char_p]
    _nccl.fake_nccl_operations.restype = ctypes.c_ulonglong

# What waits for a whole device, whether it says so or not.
DEVICE_WIDE = ("cudaDeviceSynchronize", "cudaFree", "cudaHostAlloc", "cuCtxSynchronize")


def count(name: str) -> int:
    """Calls of a function of CUDA in this process, or another count of fake_gpu.h."""
    return _gpu.dcp_fake_count(name.encode())


def last_error() -> int:
    """The error that the runtime remembers of this thread."""
    return _runtime.cudaPeekAtLastError()


@contextlib.contextmanager
def counted(*names: str) -> Iterator[dict[str, int]]:
    """By how much the counts grow; filled in at the end."""
    grown = {name: count(name) for name in names}
    yield grown
    for name in names:
        grown[name] = count(name) - grown[name]


@contextlib.contextmanager
def failing(name: str, code: int, nth: int = 1) -> Iterator[None]:
    """The nth call of a function answers `code`; the case fails if it was never called."""
    before = count(name)
    _gpu.dcp_fake_fail(name.encode(), nth, code)
    try:
        yield
        assert count(name) >= before + nth, f"{name} was not called {nth} times"
    finally:
        _gpu.dcp_fake_fail(name.encode(), 0, 0)


@contextlib.contextmanager
def largest_allocation(limit_bytes: int) -> Iterator[None]:
    """Device memory above this size is not to be had."""
    _gpu.dcp_fake_largest(limit_bytes)
    try:
        yield
    finally:
        _gpu.dcp_fake_largest(0)


@contextlib.contextmanager
def held() -> Iterator[None]:
    """Nothing that is put on a stream runs."""
    _gpu.dcp_fake_hold(1)
    try:
        yield
    finally:
        _gpu.dcp_fake_hold(0)


@contextlib.contextmanager
def dying(device: int, works: int, code: int = ILLEGAL_ADDRESS) -> Iterator[None]:
    """The device fails after so many more pieces of work, and does nothing any more."""
    _gpu.dcp_fake_break(device, works, code)
    try:
        yield
    finally:
        _gpu.dcp_fake_break(device, 0, 0)


@contextlib.contextmanager
def capturing(stream: torch.cuda.Stream) -> Iterator[None]:
    handle = ctypes.c_void_p(stream.cuda_stream)
    _gpu.dcp_fake_capture(handle, 1)
    try:
        yield
    finally:
        _gpu.dcp_fake_capture(handle, 0)


def set_nccl_faults(text: str) -> None:
    """See fake_nccl.c; operations are counted from here on."""
    _nccl.fake_nccl_set_faults(text.encode())


def nccl_operations() -> int:
    return _nccl.fake_nccl_operations()
