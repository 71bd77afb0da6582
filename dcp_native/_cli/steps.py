"""Checkpoints below a directory, as trainers name them, and which of them is newer.

A child counts when metadata is committed in it (torchtitan, Lightning), or in all directories
directly inside it that have data files (accelerate: one for the model, one for the optimizer).
Order and names are find_latest's: numbers in names that are otherwise alike, else the time of the
metadata.
"""

from __future__ import annotations

import fnmatch
import os
import re
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

from .._find_latest import _METADATA, _numbers, _shape
from .._verify import VerifyResult, verify
from .checkpoint import CLAIM_PREFIX, metadata_names, rank_of
from .output import CommandError

_STEP = re.compile(r"(?:step|iter|checkpoint|ckpt|global_step)[^0-9]{0,2}([0-9]+)", re.I)
_NUMBER = re.compile(r"[0-9]+")


class Step(NamedTuple):
    """A checkpoint of a run."""

    path: Path
    parts: tuple[Path, ...]
    """Directories with metadata: the path itself, or some inside it."""
    written_ns: int
    """When the newest metadata was committed."""

    @property
    def number(self) -> int | None:
        """The step by its name: what follows ``step``, ``iter`` or the like, else the last one."""
        named = _STEP.findall(self.path.name) or _NUMBER.findall(self.path.name)
        return int(named[-1]) if named else None

    def check(self, level: str) -> VerifyResult:
        """The first part that has a problem, or the last one."""
        for part in self.parts:
            result = verify(part, level=level, max_problems=1)  # type: ignore[arg-type]
            if not result:
                break
        return result


def steps_in(parent: Path, pattern: str | None = None) -> list[Step]:
    """Checkpoints directly below a directory, the newest first.

    Of a directory and links to it the directory itself.

    Raises:
        CommandError: there is no such directory.
    """
    found: dict[tuple[int, int], Step] = {}
    for child in _children(parent, pattern):
        try:
            if not child.is_dir():
                continue
            inode = os.stat(child.path)
            parts = _parts(Path(child.path))
            time_ns = written_ns(parts)
        except OSError:  # it vanishes, or is not ours to look into
            continue
        if parts:
            found.setdefault((inode.st_dev, inode.st_ino), Step(Path(child.path), parts, time_ns))
    return newest_first(list(found.values()))


def _children(parent: Path, pattern: str | None) -> list[os.DirEntry[str]]:
    """Entries whose names match, links last."""
    try:
        with os.scandir(parent) as entries:
            found = sorted(entries, key=lambda entry: (entry.is_symlink(), entry.name))
    except OSError as error:
        raise CommandError(f"{parent}: {error.strerror or error}") from None
    return [e for e in found if pattern is None or fnmatch.fnmatchcase(e.name, pattern)]


def lacking_part(step: Step, older: list[Step]) -> str:
    """The part (accelerate's model, optimizer) that an older checkpoint has besides; "": none."""
    mine = {part.relative_to(step.path) for part in step.parts}
    for other in older:
        theirs = {part.relative_to(other.path) for part in other.parts}
        if mine < theirs:
            return str(min(theirs - mine))
    return ""


def none_in(parent: Path) -> str:
    """What to say of a directory without checkpoints."""
    if _is_committed(parent):
        return f"{parent} is a checkpoint itself; name the directory that it is in"
    return f"there is no complete checkpoint in {parent}"


def unfinished_in(parent: Path, pattern: str | None = None) -> list[Step]:
    """Directories, without parts, into which a save has begun and of which no metadata tells."""
    found = []
    for child in _children(parent, pattern):
        path = Path(child.path)
        try:
            if not child.is_dir(follow_symlinks=False) or _parts(path):
                continue
            inside = [path, *map(path.joinpath, _dirs(path))]
            if any(has_data(each) or is_claimed(each) for each in inside):
                found.append(Step(path, (), os.stat(path).st_mtime_ns))
        except OSError:  # it vanishes, or is not ours to look into
            continue
    return found


def newest_first(steps: list[Step]) -> list[Step]:
    shapes = {_shape(step.path.name) for step in steps}
    if len(shapes) == 1 and "#" in next(iter(shapes)):
        return sorted(steps, key=_by_numbers, reverse=True)
    return sorted(steps, key=lambda step: (step.written_ns, step.path.name), reverse=True)


def _by_numbers(step: Step) -> tuple[tuple[Decimal, ...], int, str]:
    return _numbers(step.path.name), step.written_ns, step.path.name


def in_flight(step: Step) -> bool:
    """Whether a save has claimed a directory of it, and has not ended."""
    try:
        inside = _dirs(step.path)
    except OSError:  # it vanishes, or is not ours to look into
        inside = []
    return any(map(is_claimed, (step.path, *step.parts, *map(step.path.joinpath, inside))))


def is_claimed(path: Path) -> bool:
    return any(name.startswith(CLAIM_PREFIX) for name in _names(path))


def _names(path: Path) -> list[str]:
    try:
        return os.listdir(path)
    except OSError:
        return []


def _dirs(path: Path) -> list[str]:
    with os.scandir(path) as entries:
        return sorted(entry.name for entry in entries if entry.is_dir(follow_symlinks=False))


def _parts(path: Path) -> tuple[Path, ...]:
    """Directories with metadata; none when one of them has data files, but no metadata yet."""
    if _is_committed(path):
        return (path,)
    inside = _dirs(path)
    begun = (name for name in inside if not _is_committed(path / name))
    if any(has_data(path / name) or is_claimed(path / name) for name in begun):
        return ()
    return tuple(path / name for name in inside if _is_committed(path / name))


def has_data(path: Path) -> bool:
    """Whether saves have put data files directly into a directory."""
    return any(rank_of(name) is not None for name in _names(path))


def _is_committed(path: Path) -> bool:
    return any((path / name).exists() for name in _METADATA)


def written_ns(parts: tuple[Path, ...]) -> int:
    """When the newest metadata of them was committed; 0 without any."""
    return max(
        (os.stat(part / name).st_mtime_ns for part in parts for name in metadata_names(part)),
        default=0,
    )
