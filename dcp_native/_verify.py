"""verify: is a checkpoint whole?  Checked in C without loading it (csrc/include/dcp_verify.h).

torch is imported where it is needed: for process groups, and for metadata that only it can read.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import re
from array import array
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import _native
from ._config import DIRECT_IO, config
from ._progress import Counted

if TYPE_CHECKING:
    import torch.distributed as dist

__all__ = ["VerifyProblem", "VerifyResult", "bytes_to_read", "local_path", "verify", "verify_alone"]

Level = Literal["complete", "structure", "full"]
LEVELS: dict[str, int] = {"complete": 0, "structure": 1, "full": 2}
"""Values of enum dcp_verify_level (csrc/include/dcp_verify.h)."""
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_TRIES = 10
"""How many checkpoints in a row may be replaced between two looks of ours."""


@dataclasses.dataclass(frozen=True)
class VerifyProblem:
    """One thing that is wrong.

    Attributes:
        tensor: key of the flattened state dict, or "" when no single one is concerned.
        file: name in the checkpoint's directory, or "".
        offset_bytes: where in ``file``; None when that has no meaning.
        what: what is wrong.
        code: the kind, as ``dcp_code`` of this package's exceptions: ``"CHECKSUM"``, ``"CORRUPT"``,
            ``"HOLE"``, ``"IO"``, ``"MISSING"``, ``"NOENT"``, ``"STALE"``, ...
    """

    tensor: str
    file: str
    offset_bytes: int | None
    what: str
    code: str

    def __str__(self) -> str:
        at = "" if self.offset_bytes is None else f" at byte {self.offset_bytes}"
        place = f"{self.file}{at}" if self.file else ""
        return ": ".join(part for part in (self.tensor, place, self.what) if part)


@dataclasses.dataclass(frozen=True)
class VerifyResult:
    """What a check found.  True in a condition when the checkpoint is whole.

    Attributes:
        path: the checkpoint.
        level: how much was checked.
        problems: the first ``max_problems`` of them; none when the checkpoint is whole.
        problems_found: how many there are in all.
        native: written by dcp_native.
        save_id: of the save, in hex; None for stock torch's checkpoints and rank-local ones.
        ranks: group ranks that have metadata of their own (``use_collectives=False``); which others
            there should be can not be known.  Empty: one ``.metadata`` for all.
        tensors, objects, records: what the metadata lists.
        partial_tensors: tensors that are there only in part, and rightly so, because single ranks
            saved alone.  From level ``"structure"`` on.
        files, file_bytes: data files that the metadata names.
        read_bytes: of data files.
        checked_bytes: of records whose checksums were compared.
        unverified_bytes, unverified_records: level ``"full"``: what has no checksum.
        claims: saves into the directory that are in flight, or were stopped.
        unreferenced_files: data files that no metadata names: leftovers, which the next save
            removes.
        replaced: how often the check began anew, because a newer save replaced the checkpoint.
        wall_ns: of the slowest rank.
    """

    path: Path
    level: Level
    problems: tuple[VerifyProblem, ...]
    problems_found: int
    native: bool
    save_id: str | None
    ranks: tuple[int, ...]
    tensors: int
    objects: int
    records: int
    partial_tensors: int
    files: int
    file_bytes: int
    direct_files: int
    read_bytes: int
    checked_bytes: int
    unverified_bytes: int
    unverified_records: int
    claims: int
    unreferenced_files: int
    replaced: int
    wall_ns: int

    @property
    def ok(self) -> bool:
        return self.problems_found == 0

    def __bool__(self) -> bool:
        return self.ok

    def __str__(self) -> str:
        if self.ok:
            return f"{self.path}: no problems ({self.level}, {self.checked_bytes} bytes checked)"
        more = self.problems_found - 1
        return f"{self.path}: {self.problems[0]}" + (f" (and {more} more)" if more else "")


_SUMS = (
    "files",
    "file_bytes",
    "direct_files",
    "read_bytes",
    "checked_bytes",
    "unverified_bytes",
    "unverified_records",
)
"""Counters of which each rank of a divided check has its part."""


def local_path(path: str | os.PathLike) -> Path:
    """``path`` as a Path.

    Raises:
        ValueError: for a URL: only directories of a mounted file system can be checked.
    """
    text = os.fspath(path)
    if _URL.match(text if isinstance(text, str) else os.fsdecode(text)):
        raise ValueError(
            f"{text} is a URL; only local directories can be checked: load it with "
            "FsspecReader, or copy it to a mounted file system first"
        )
    return Path(os.fsdecode(text))


def verify(
    checkpoint_id: str | os.PathLike,
    *,
    level: Level = "full",
    max_problems: int = 100,
    process_group: dist.ProcessGroup | None = None,
) -> VerifyResult:
    """Check a checkpoint without loading it.

    Needs no GPU, no process group and at most 32 MiB beside the metadata; modifies nothing.
    Problems are listed in the result, not raised.  A checkpoint that a newer save replaces
    meanwhile is checked anew.

    Args:
        checkpoint_id: its directory, written by dcp_native or by stock torch.
        level: ``"complete"``: the metadata parses, and every data file is there, of this save and
            long enough.  ``"structure"``: also, chunks fill their tensors, and the tables of the
            files hold.  ``"full"``: also every byte of every record, by checksum.
        max_problems: how many are listed; all are counted.
        process_group: its ranks divide the files.  A collective call; the result is the same on
            every rank, which must see the same directory.

    Raises:
        FileNotFoundError: there is no such directory.
        ValueError: ``checkpoint_id`` is a URL, or an argument is none of the above.
        NativeError: it was replaced again and again while it was checked.
    """
    path = local_path(checkpoint_id)
    if level not in LEVELS:
        raise ValueError(f"level must be one of {list(LEVELS)}, not {level!r}")
    if max_problems < 1:
        raise ValueError(f"max_problems must be positive, not {max_problems!r}")
    if process_group is None:
        with _progress(path, level, 0, 1) as progress:
            found = _run(path, level, max_problems, 0, 1, progress.counter)
        return _as_result(path, level, found)
    return _verify_together(path, level, max_problems, process_group)


def _progress(path: Path, level: Level, rank: int, size: int) -> Counted:
    total = partial(bytes_to_read, path, rank, size) if level == "full" else 0
    return Counted("verify", total, rank=rank, ranks_count=size)


def bytes_to_read(path: Path, rank: int = 0, size: int = 1) -> int:
    """Of the files that are this rank's, or 0: the check says what is wrong with the metadata."""
    from ._cli.checkpoint import Checkpoint
    from ._cli.output import CommandError

    try:
        checkpoint = Checkpoint(path)
    except (CommandError, OSError, _native.NativeError):
        return 0
    chunks = zip(checkpoint.file, checkpoint.length, strict=True)
    return sum(length for file, length in chunks if file % size == rank)


def verify_alone(
    path: Path, level: Level, max_problems: int, counters: list[array]
) -> VerifyResult:
    """``verify`` by as many threads as there are counters, which divide the files.

    Args:
        counters: each an ``array("Q", [0])``, to which its thread adds the bytes that it has gone
            through; others may look at them meanwhile.

    An interrupt, which only the calling thread sees, stops all of them.
    """
    size, cancel = len(counters), array("i", [0])

    def one(part: int) -> dict[str, Any]:
        return _run(path, level, max_problems, part, size, counters[part], cancel)

    with ThreadPoolExecutor(size) as pool:
        try:
            for tries_left in reversed(range(_TRIES)):
                parts = list(pool.map(one, range(size)))
                if len({found["metadata_id"] for found in parts}) == 1 or tries_left == 0:
                    break
        except BaseException:
            cancel[0] = 1
            raise
    return _as_result(path, level, _merge(parts, max_problems))


def _verify_together(
    path: Path, level: Level, max_problems: int, process_group: dist.ProcessGroup
) -> VerifyResult:
    import torch.distributed as dist

    rank, size = dist.get_rank(process_group), dist.get_world_size(process_group)
    for tries_left in reversed(range(_TRIES)):
        mine: tuple[dict[str, Any] | None, _Failure | None]
        error = None
        try:
            with _progress(path, level, rank, size) as progress:
                mine = (_run(path, level, max_problems, rank, size, progress.counter), None)
        except BaseException as raised:
            error = raised
            mine = (None, _failure(raised))
        every: list[Any] = [None] * size
        dist.all_gather_object(every, mine, group=process_group)
        failures = {peer: failure for peer, (_, failure) in enumerate(every) if failure}
        if failures:
            raise _agreed(failures, rank, error)
        parts = [found for found, _ in every]
        if len({found["metadata_id"] for found in parts}) == 1 or tries_left == 0:
            break
    return _as_result(path, level, _merge(parts, max_problems))


_Failure = tuple[bytes, bool]
"""The record of an exception, and whether what it makes elsewhere is an OSError."""


def _failure(error: BaseException) -> _Failure:
    from ._failures import as_record, from_record

    record = as_record(error)
    assert record is not None
    return record, isinstance(from_record(record), OSError)


def _agreed(failures: dict[int, _Failure], rank: int, error: BaseException | None) -> BaseException:
    """What this rank raises: an OSError on all ranks, or on none, so that all do the same next.

    Errors that are none, of whichever rank, go before those that are.  A rank whose own error
    counts raises that; the others raise the first that does.
    """
    from ._failures import from_record

    is_fatal = not all(is_os_error for _, is_os_error in failures.values())
    counts = [peer for peer, (_, is_os_error) in failures.items() if is_os_error != is_fatal]
    if rank in counts and isinstance(error, OSError) != is_fatal:
        assert error is not None
        return error
    shown = from_record(failures[rank if rank in counts else min(counts)][0])
    if isinstance(shown, OSError) != is_fatal:
        return shown
    # Its record comes back here as something else than there.
    return RuntimeError(str(shown)) if is_fatal else OSError(str(shown))


def _run(
    path: Path,
    level: str,
    max_problems: int,
    part: int,
    parts: int,
    counter: array | None = None,
    cancel: array | None = None,
) -> dict[str, Any]:
    options: dict[str, Any] = {
        "level": LEVELS[level],
        "direct": DIRECT_IO[config().direct_io],
        "problems_most": max_problems,
        "part": part,
        "parts": parts,
        "progress": counter,
        "cancel": cancel,
    }
    translations: dict[bytes, bytes] = {}
    for tries_left in reversed(range(_TRIES)):
        try:
            pairs = tuple(translations.items())
            return _native.verify_checkpoint(path, translations=pairs, **options)
        except _native.NativeError as error:
            if error.dcp_code != "UNSUPPORTED":
                raise
            if not config().allow_unsafe_objects:
                return _unreadable(f"{error}; allow_unsafe_objects is off")
            found, failed = _translations(path)
            known = bool(found) and found.keys() == translations.keys()
            if failed or known or not tries_left:
                why = f"; unpickling it failed: {failed!r}" if failed else ""
                return _unreadable(f"{error}{why}")
            translations = found
    raise AssertionError("the last try returns or raises")


def _translations(path: Path) -> tuple[dict[bytes, bytes], Exception | None]:
    """The metadata there is, as bytes, each with the same of torch's own classes; the first error.

    A file that is gone is no error: the checkpoint is being replaced, and looked at again.
    """
    found, failed = {}, None
    whole = path / ".metadata"
    for file in (whole,) if whole.exists() else sorted(path.glob("__*.metadata")):
        try:
            original = file.read_bytes()
            found[original] = _translation(original)
        except FileNotFoundError:
            continue
        except Exception as why:
            failed = failed or why
    return found, failed


def _translation(original: bytes) -> bytes:
    from torch.distributed.checkpoint.filesystem import _StorageInfo
    from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

    metadata = pickle.loads(original)
    plain = Metadata(
        state_dict_metadata=metadata.state_dict_metadata,
        storage_data={
            MetadataIndex(at.fqn, at.offset, at.index): _StorageInfo(
                record.relative_path,
                record.offset,
                record.length,
                getattr(record, "transform_descriptors", None),
            )
            for at, record in metadata.storage_data.items()
        },
    )
    return pickle.dumps(plain)


def _unreadable(why: str) -> dict[str, Any]:
    """What is found of a checkpoint whose metadata no reader understands."""
    found = {field.name: 0 for field in dataclasses.fields(VerifyResult) if field.type == "int"}
    problem = ("", ".metadata", None, why, "UNSUPPORTED")
    return found | {
        "problems": [problem],
        "problems_found": 1,
        "native": False,
        "save_id": None,
        "metadata_id": None,
        "ranks": (),
    }


def _merge(parts: list[dict[str, Any]], max_problems: int) -> dict[str, Any]:
    merged = dict(parts[0])
    merged |= {name: sum(found[name] for found in parts) for name in _SUMS}
    problems = list(dict.fromkeys(p for found in parts for p in found["problems"]))
    hidden = sum(found["problems_found"] - len(found["problems"]) for found in parts)
    if len({found["metadata_id"] for found in parts}) > 1:
        what = (
            "the ranks read different metadata: the checkpoint was replaced again and again while "
            "they checked it, or they see different directories"
        )
        problems.insert(0, ("", ".metadata", None, what, "STALE"))
    merged["problems_found"] = len(problems) + hidden
    merged["problems"] = problems[:max_problems]
    merged["wall_ns"] = max(found["wall_ns"] for found in parts)
    return merged


def _as_result(path: Path, level: Level, found: dict[str, Any]) -> VerifyResult:
    problems = tuple(VerifyProblem(*problem) for problem in found.pop("problems"))
    del found["metadata_id"]
    return VerifyResult(path=path, level=level, problems=problems, **found)
