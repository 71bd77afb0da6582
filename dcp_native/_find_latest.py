"""find_latest: the newest complete checkpoint under a directory."""

from __future__ import annotations

import fnmatch
import os
import re
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ._report import logger
from ._verify import Level, local_path
from ._verify import verify as check

if TYPE_CHECKING:
    import torch.distributed as dist

__all__ = ["find_latest"]

_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)*")
_METADATA = (".metadata", "__0.metadata")
"""What makes a directory a checkpoint: of all ranks, or of single ones."""
_LEVELS: dict[Any, Level] = {
    False: "complete",
    "structure": "structure",
    True: "full",
    "full": "full",
}


def find_latest(
    parent: str | os.PathLike,
    *,
    verify: bool | Literal["structure", "full"] = False,
    pattern: str | None = None,
    key: Callable[[Path], Any] | None = None,
    process_group: dist.ProcessGroup | None = None,
) -> Path | None:
    """The newest complete checkpoint among the direct children of ``parent``.

    A child counts when it is a directory (or a link to one) with a ``.metadata``, or, of saves with
    ``use_collectives=False``, a ``__0.metadata``.  The newest one is then checked, as ``verify``
    asks; one that fails is skipped, with a warning in the ``dcp_native`` log that says why, and the
    next older one is tried.  ``parent`` itself never counts.

    What is newest: when all candidates are named alike but for their numbers (``step-1000``,
    ``iter_0001000``, ``epoch=3-step=300``), the one with the highest numbers, compared from left to
    right.  ``1.25`` is a fraction, less than ``1.5``; with more dots, as in ``1.2.10``, every part
    is a number of its own.  Else the one whose metadata was written last; copies that do not keep
    times mislead that, so name a ``pattern`` or a ``key`` where names differ.

    Args:
        parent: a directory of checkpoints.
        verify: False: metadata parses, and all data files are there, of its save and long enough.
            ``"structure"``: also chunks and tables.  True or ``"full"``: every byte, by checksum.
        pattern: only children whose names match it, as ``"step-*"`` (shell rules).
        key: what is newest instead: of two children, the one with the greater ``key(path)``.
        process_group: a collective call with the same answer on every rank.  Rank 0 of the group
            looks; all bytes that ``verify`` wants read are divided over the ranks.  Without it the
            answer may differ between ranks while checkpoints come and go: call it on one rank and
            broadcast the name.

    Returns:
        ``parent / name``, for use as ``checkpoint_id``; None when there is no complete checkpoint.

    Raises:
        FileNotFoundError: ``parent`` does not exist.  This and all others on every rank alike.
        NotADirectoryError: ``parent`` is something else.
        ValueError: ``parent`` is a URL, or ``verify`` is none of the above.
    """
    if verify not in _LEVELS:
        raise ValueError(f'verify must be False, True, "structure" or "full", not {verify!r}')
    path, level = local_path(parent), _LEVELS[verify]
    if process_group is None:
        return next(_whole(path, level, pattern, key), None)
    return _find_together(path, level, pattern, key, process_group)


def _find_together(
    parent: Path,
    level: Level,
    pattern: str | None,
    key: Callable[[Path], Any] | None,
    group: dist.ProcessGroup,
) -> Path | None:
    """Rank 0 proposes; with level full all ranks check what it proposes, and ask for the next."""
    import torch.distributed as dist

    from ._failures import as_record, from_record

    looks = dist.get_rank(group) == 0
    alone: Level = "structure" if level == "full" else level
    proposals = _whole(parent, alone, pattern, key) if looks else iter(())
    while True:
        message: list[Any] = [None, None]
        error = None
        if looks:
            try:
                found = next(proposals, None)
                message[0] = None if found is None else found.name
            except BaseException as raised:
                error = raised
                message[1] = as_record(raised)
        dist.broadcast_object_list(message, src=dist.get_global_rank(group, 0), group=group)
        name, record = message
        if error is not None:
            raise error
        if record is not None:
            raise from_record(record)
        if name is None or level != "full" or _is_whole(parent / name, level, group, looks):
            return None if name is None else parent / name


def _whole(
    parent: Path, level: Level, pattern: str | None, key: Callable[[Path], Any] | None
) -> Iterator[Path]:
    """Checkpoints that pass, the newest first."""
    for path in _newest_first(parent, pattern, key):
        if _is_whole(path, level, None, True):
            yield path


def _is_whole(path: Path, level: Level, group: dist.ProcessGroup | None, tells: bool) -> bool:
    try:
        result = check(path, level=level, max_problems=1, process_group=group)
    except FileNotFoundError:
        logger.info("find_latest: %s was removed meanwhile", path)
        return False
    except OSError as error:
        logger.warning("find_latest: skipping %s: %s", path, error)
        return False
    if not result and tells:
        logger.warning("find_latest: skipping %s", result)
    return bool(result)


def _newest_first(
    parent: Path, pattern: str | None, key: Callable[[Path], Any] | None
) -> list[Path]:
    times = _candidates(parent, pattern)
    paths = [parent / name for name in times]
    if key is not None:
        return sorted(paths, key=key, reverse=True)
    shapes = {_shape(name) for name in times}
    if len(shapes) == 1 and "#" in shapes.pop():
        return sorted(paths, key=lambda p: (_numbers(p.name), times[p.name], p.name), reverse=True)
    return sorted(paths, key=lambda p: (times[p.name], p.name), reverse=True)


def _is_fraction(number: str) -> bool:
    return number.count(".") <= 1


def _shape(name: str) -> str:
    """The name without its numbers.  Whole and decimal ones look alike; versions do not."""
    return _NUMBER.sub(lambda m: "#" if _is_fraction(m[0]) else "#" + "." * m[0].count("."), name)


def _numbers(name: str) -> tuple[Decimal, ...]:
    found = _NUMBER.findall(name)
    split = ([number] if _is_fraction(number) else number.split(".") for number in found)
    return tuple(Decimal(digits) for numbers in split for digits in numbers)


def _candidates(parent: Path, pattern: str | None) -> dict[str, int]:
    """Children with metadata, and when it was written, in ns.

    Of a directory and links to it, the directory itself: ``latest -> step-100`` is no second one.
    """
    seen: dict[tuple[int, int], tuple[bool, str, int]] = {}
    with os.scandir(parent) as entries:
        for entry in entries:
            if pattern is not None and not fnmatch.fnmatchcase(entry.name, pattern):
                continue
            try:
                if not entry.is_dir():
                    continue
                written_ns = _written_ns(entry.path)
                there = os.stat(entry.path)
            except OSError as error:  # it vanishes, or is not ours to look into
                logger.info("find_latest: skipping %s: %s", entry.path, error)
                continue
            if written_ns is None:
                logger.info("find_latest: %s has no metadata: no save of it ended", entry.path)
                continue
            found = (entry.is_symlink(), entry.name, written_ns)
            inode = (there.st_dev, there.st_ino)
            seen[inode] = min(seen.get(inode, found), found)
    return {name: written_ns for _, name, written_ns in seen.values()}


def _written_ns(directory: str) -> int | None:
    for name in _METADATA:
        try:
            return os.stat(os.path.join(directory, name)).st_mtime_ns
        except FileNotFoundError:
            continue
    return None
