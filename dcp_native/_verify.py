"""verify: is a checkpoint whole?  Checked in C without loading it (csrc/include/dcp_verify.h)."""

from __future__ import annotations

import dataclasses
import os
import pickle
import re
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from . import _native
from ._config import DIRECT_IO, config
from ._failures import as_record, from_record

__all__ = ["VerifyProblem", "VerifyResult", "local_path", "verify"]

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
        return _as_result(path, level, _run(path, level, max_problems, 0, 1))
    rank, size = dist.get_rank(process_group), dist.get_world_size(process_group)
    for tries_left in reversed(range(_TRIES)):
        mine: tuple[dict[str, Any] | None, bytes | None]
        error = None
        try:
            mine = (_run(path, level, max_problems, rank, size), None)
        except BaseException as raised:
            error = raised
            mine = (None, as_record(raised))
        every: list[Any] = [None] * size
        dist.all_gather_object(every, mine, group=process_group)
        if error is not None:
            raise error
        records = [record for _, record in every if record is not None]
        if records:
            raise from_record(records[0])
        parts = [found for found, _ in every]
        if len({found["save_id"] for found in parts}) == 1 or tries_left == 0:
            break
    return _as_result(path, level, _merge(parts, max_problems))


def _run(path: Path, level: str, max_problems: int, part: int, parts: int) -> dict[str, Any]:
    options: dict[str, Any] = {
        "level": LEVELS[level],
        "direct": DIRECT_IO[config().direct_io],
        "problems_most": max_problems,
        "part": part,
        "parts": parts,
    }
    for tries_left in reversed(range(_TRIES)):
        try:
            return _native.verify_checkpoint(path, **options)
        except _native.NativeError as error:
            if error.dcp_code == "STALE" and tries_left and "original" in options:
                del options["original"], options["translated"]  # it was replaced: look again
            elif error.dcp_code == "UNSUPPORTED":
                if "original" in options or not config().allow_unsafe_objects:
                    off = "" if config().allow_unsafe_objects else "; allow_unsafe_objects is off"
                    return _unreadable(f"{error}{off}")
                try:
                    options |= _translation(path)
                except Exception as why:
                    return _unreadable(f"{error}; unpickling it failed: {why!r}")
            else:
                raise
    raise AssertionError("the last try returns or raises")


def _translation(path: Path) -> dict[str, bytes]:
    """A ``.metadata`` of classes that only Python can rebuild, and the same in torch's own."""
    original = (path / ".metadata").read_bytes()
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
    return {"original": original, "translated": pickle.dumps(plain)}


def _unreadable(why: str) -> dict[str, Any]:
    """What is found of a checkpoint whose metadata no reader understands."""
    found = {field.name: 0 for field in dataclasses.fields(VerifyResult) if field.type == "int"}
    problem = ("", ".metadata", None, why, "UNSUPPORTED")
    return found | {
        "problems": [problem],
        "problems_found": 1,
        "native": False,
        "save_id": None,
        "ranks": (),
    }


def _merge(parts: list[dict[str, Any]], max_problems: int) -> dict[str, Any]:
    merged = dict(parts[0])
    merged |= {name: sum(found[name] for found in parts) for name in _SUMS}
    problems = list(dict.fromkeys(p for found in parts for p in found["problems"]))
    hidden = sum(found["problems_found"] - len(found["problems"]) for found in parts)
    merged["problems_found"] = len(problems) + hidden
    merged["problems"] = problems[:max_problems]
    merged["wall_ns"] = max(found["wall_ns"] for found in parts)
    save_ids = {found["save_id"] for found in parts}
    if len(save_ids) > 1:
        what = "the checkpoint was replaced again and again while its ranks checked it"
        merged["problems"].insert(0, ("", ".metadata", None, what, "STALE"))
        merged["problems_found"] += 1
    return merged


def _as_result(path: Path, level: Level, found: dict[str, Any]) -> VerifyResult:
    problems = tuple(VerifyProblem(*problem) for problem in found.pop("problems"))
    return VerifyResult(path=path, level=level, problems=problems, **found)
