"""Types of the C extension (csrc/py)."""

import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from ._receive import Receiver

built_for_torch: str

class NativeError(RuntimeError):
    dcp_code: str

def crc32(data: Any, crc: int = 0, /) -> int: ...
def trim() -> None: ...
def live_bytes() -> int: ...
def copy_storages(pairs: Iterable[tuple[torch.Tensor, torch.Tensor]], /) -> None: ...
def export_sweep(path: str | os.PathLike, /) -> dict[str, int]: ...
def export_create(
    path: str | os.PathLike, files: Iterable[tuple[str, int, bytes]], /
) -> dict[str, int]: ...
def export_write(
    path: str | os.PathLike,
    files: Iterable[tuple[str, int]],
    pieces: Iterable[tuple[int, int, torch.Tensor, tuple[int, ...]]],
    /,
    *,
    sync: bool = True,
    direct: int = 0,
    nice: int = 0,
    io_priority: int = 0,
    limit_bytes_s: int = 0,
) -> dict[str, int]: ...
def export_join(
    source_path: str | os.PathLike,
    sources: Iterable[str],
    path: str | os.PathLike,
    files: Iterable[tuple[str, int]],
    tensors: Iterable[tuple[str, int, int, int, tuple[int, ...], tuple]],
    /,
    *,
    sync: bool = True,
    direct: int = 0,
) -> dict[str, int]: ...
def export_publish(
    path: str | os.PathLike,
    names: Iterable[str],
    new_names: Iterable[str],
    pattern: str,
    /,
    *,
    index_name: str | None = None,
    index_tmp_name: str | None = None,
    index: bytes = b"",
    sync: bool = True,
) -> dict[str, int]: ...
def export_discard(path: str | os.PathLike, names: Iterable[str], /) -> None: ...
def peek_save_id(image: bytes, /) -> str | None: ...
def verify_checkpoint(
    path: str | os.PathLike,
    *,
    level: int = 2,
    direct: int = 0,
    problems_most: int = 100,
    part: int = 0,
    parts: int = 0,
    translations: tuple[tuple[bytes, bytes], ...] = (),
    progress: Any = None,
) -> dict[str, Any]: ...
def read_safetensors_header(
    source: str | os.PathLike | bytes | bytearray | memoryview, file_bytes: int = 0, /
) -> tuple[list[tuple[str, str, tuple[int, ...], int, int]], dict[str, str] | None, int, int]: ...
def write_archive(
    source: str | os.PathLike,
    image: bytes,
    target: str | os.PathLike,
    name: bytes,
    folder: bytes,
    entries: tuple[tuple[bytes, int, Any, str | None], ...],
    fetch: Callable[[int], Any],
    *,
    align: int = 64,
    verify: bool = True,
    direct: int = 0,
    io_uring: int = 0,
) -> dict[str, Any]: ...
def check_metadata(image: bytes, /, *, pickle: bool = False) -> str | None: ...
def metadata_table(image: Any, /) -> dict[str, Any]: ...
def save_ids(image: bytes, /) -> bytes: ...
def tensor_memory(tensor: torch.Tensor, dtype: torch.dtype, /) -> tuple[int, int, bool] | None: ...
def read_records(
    path: str | os.PathLike,
    files: tuple[str, ...],
    items: tuple[tuple[Any, ...], ...],
    take: Callable[[int, bytes], object],
    /,
    *,
    saves: bytes = b"",
    verify: int = 1,
    direct: int = 0,
    raw: bool = False,
) -> dict[str, int]: ...
def _debug_plan(state_dict: Any, *args: Any, **kwargs: Any) -> dict[str, Any]: ...
def _debug_peak_bytes() -> int: ...
def _debug_targets(*args: Any, **kwargs: Any) -> dict[str, Any]: ...

_Failures = list[tuple[int, bytes | BaseException]] | None

class Group:
    def __new__(
        cls, process_group: dist.ProcessGroup | None = None, coordinator_rank: int = 0
    ) -> Group: ...
    @property
    def rank(self) -> int: ...
    @property
    def size(self) -> int: ...
    @property
    def kind(self) -> str: ...
    @property
    def coordinator_rank(self) -> int: ...
    def forget_plan(self) -> None: ...

class Store:
    def __new__(cls, process_group: dist.ProcessGroup) -> Store: ...

class WriterProcess:
    def __new__(cls, executable: str) -> WriterProcess: ...
    @property
    def pid(self) -> int: ...
    def usable(self) -> bool: ...
    def stop(self) -> None: ...

class Watch:
    def notify(self) -> None: ...
    def wait(self, seen: int, timeout_s: float, /) -> int: ...

class Save:
    def __new__(
        cls,
        group: Group,
        path: str,
        *,
        checkpoint_id: str | None = None,
        checkpoint_id_is_path: bool = False,
        save_id: str | None = None,
        version: str | None = None,
        identity: str | None = None,
        call_hash: int = 0,
        plan_salt: int = 0,
        use_collectives: bool = True,
        dedup_save_to_lowest_rank: bool = False,
        planned_outside: bool = False,
        split_bytes: int = 0,
        sync_files: bool = True,
        broadcast_metadata: bool = False,
        direct: int = 0,
        base: str | None = None,
        link_mode: int = 0,
        content_hash: bool = False,
        io_uring: int = 0,
        writer_nice: int = 0,
        writer_io_priority: int = 0,
        write_limit_bytes_s: int = 0,
        mapped_from: int = 0,
        mapped_to: int = 0,
        elsewhere: bool = False,
    ) -> Save: ...
    def open(self) -> bool: ...
    def claim(self) -> None: ...
    def add(
        self,
        state_dict: Any,
        *,
        rank: int = 0,
        thread_count: int = 1,
        single_file_per_rank: bool = True,
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
    ) -> None: ...
    def agree(self, failure: bytes | None, /) -> _Failures: ...
    def gather(self, message: bytes, /) -> list[bytes] | None: ...
    def scatter(self, parts: tuple[bytes, ...] | None, /) -> bytes: ...
    def add_items(
        self,
        write_items: Sequence[Any],
        resolve: Callable[[Any], Any],
        *,
        rank: int = 0,
        thread_count: int = 1,
        single_file_per_rank: bool = True,
    ) -> None: ...
    def places(self) -> list[tuple[int, str, int, int]]: ...
    def set_metadata(self, pickle: bytes, /) -> None: ...
    def settle(self, failure: bytes | None, /) -> _Failures: ...
    def compare(self, failure: bytes | None, /) -> _Failures: ...
    def write(self) -> None: ...
    def finish(self, failure: bytes | None, /) -> _Failures: ...
    def leave(self, failure: bytes | None, /) -> _Failures: ...
    def interrupt(self) -> BaseException | None: ...
    def agreed(self) -> bool: ...
    def planned(self) -> bool: ...
    def wait_for_orphan(self, timeout_s: float, /) -> bool: ...
    def meet(self) -> None: ...
    def stage(self, *, shared: bool = False, cap_bytes: int = 0) -> str | None: ...
    def warm_up(
        self,
        *,
        shared: bool = False,
        cap_bytes: int = 0,
        arenas: int = 1,
        process: WriterProcess | None = None,
    ) -> str | None: ...
    def upload(
        self,
        watch: Watch,
        *,
        timeout_s: float,
        host_timeout_s: float,
        store: Store | None = None,
        process: WriterProcess | None = None,
        prefix: str = "",
        failure: bytes | None = None,
        written: bool = False,
        survive: bool = False,
    ) -> None: ...
    def upload_state(self) -> str: ...
    def upload_result(self) -> _Failures: ...
    def upload_stats(self) -> dict[str, Any]: ...
    def upload_left_s(self) -> float: ...
    def upload_progress(self) -> int: ...
    def expire(self) -> None: ...
    def cancel(self) -> bool: ...
    def metadata(self) -> bytes | None: ...
    def info(self) -> dict[str, Any]: ...

class Load:
    def __new__(
        cls,
        group: Group,
        path: str,
        *,
        rank: int = 0,
        call_hash: int = 0,
        verify: int = 1,
        strict_coverage: bool = True,
        direct: int = 0,
        read_once: int = 0,
        elsewhere: bool = False,
    ) -> Load: ...
    def open(self, failure: bytes | None, /) -> _Failures: ...
    def has_meta(self, state_dict: Any, /) -> bool: ...
    def targets(
        self,
        state_dict: Any,
        *,
        flatten_state_dict: bool = True,
        flatten_sharded_tensors: bool = True,
        allow_partial_load: bool = False,
        names: tuple[str, ...] | None = None,
        predicate: Callable[[str], bool] | None = None,
    ) -> tuple[list[str], list[str]] | None: ...
    def status(self, failure: bytes | None, /) -> _Failures: ...
    def leave(self, failure: bytes | None, /) -> _Failures: ...
    def interrupt(self) -> BaseException | None: ...
    def read(self, receiver: Receiver, /) -> None: ...
    def results(self) -> tuple[list[tuple[int, str, Any]], list[torch.Tensor | None]]: ...
    def metadata(self) -> bytes: ...
    def info(self) -> dict[str, Any]: ...
    def report(self) -> dict[str, Any]: ...
    def outcome(self, objects: int, /) -> dict[str, Any]: ...
