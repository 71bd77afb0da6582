"""What the commands print: text, tables, progress or JSON.

With ``rich`` (the extra ``dcp_native[cli]``) tables and bars on a terminal are its; without it, in
pipes and with NO_COLOR set there are aligned columns and no escape codes.  Results go to stdout,
progress and remarks to stderr, so that ``--json`` gives one document and nothing else.  Progress is
``config.progress``'s, as that of saves and loads: a bar on a terminal for what takes over 2 s.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

from .._config import config
from .units import bytes_text, seconds_text

_REDRAW_S = 0.1
_SILENT_S = 2.0
"""Before progress is shown."""
_LINE_EVERY_S = 10.0
"""Between lines of progress where there is no terminal."""
_FOLDED_COLUMNS = 30
"""Least width of text that is folded."""


class Column(NamedTuple):
    """Of a table; ``right`` for numbers."""

    title: str
    right: bool = False


class CommandError(Exception):
    """What a command says in one line before it ends.

    Attributes:
        status: 2: it could not do what was asked; 1: what it looked at is damaged or not there.
    """

    def __init__(self, text: str, status: int = 2) -> None:
        super().__init__(text)
        self.status = status


def printable(text: str) -> str:
    """Names may hold anything; what is printed holds no control characters and no lone bytes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


_DAMAGE = frozenset(("CHECKSUM", "CORRUPT", "HOLE", "MISSING", "NOENT", "STALE"))
"""What NativeErrors name that is wrong with a checkpoint, and not with the attempt."""


def status_of(error: BaseException) -> int:
    """The exit status for an error: 1 of damage, 2 of what could not be done."""
    return 1 if getattr(_cause(error), "dcp_code", None) in _DAMAGE else 2


def _cause(error: BaseException) -> BaseException:
    """Of a save or load what failed on the only rank there is."""
    failures = getattr(error, "failures", None)
    return next(iter(failures.values()))[0] if isinstance(failures, dict) and failures else error


def one_line(error: BaseException) -> str:
    """What went wrong."""
    error = _cause(error)
    if isinstance(error, OSError) and isinstance(error.filename, (str, bytes)) and error.strerror:
        name = os.fsdecode(error.filename)
        return error.strerror if name in error.strerror else f"{name}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def _plain(value: Any) -> Any:
    """What JSON has no number for becomes ``"nan"``, ``"inf"`` or ``"-inf"``."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _plain(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value


class Output:
    """Where a command's results go."""

    def __init__(self, *, as_json: bool) -> None:
        self.as_json = as_json
        self._results = _console(sys.stdout) if not as_json else None
        self._remarks = _console(sys.stderr)

    def json(self, value: Any) -> None:
        """The command's one document, if it was asked for."""
        if self.as_json:
            json.dump(_plain(value), sys.stdout, indent=2, allow_nan=False)
            sys.stdout.write("\n")

    def line(self, text: str = "", *, style: str = "") -> None:
        """A line of the result; ``style`` is rich's, such as ``bold`` or ``red``."""
        if self.as_json:
            return
        if self._results is None:
            print(printable(text))
        else:
            self._results.print(printable(text), style=style or None, markup=False, soft_wrap=True)

    def remark(self, text: str) -> None:
        """A line beside the result, also with ``--json``."""
        print(printable(text), file=sys.stderr)

    def table(self, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
        """Rows under titles; a column that is empty everywhere is left out."""
        if self.as_json or not rows:
            return
        used = [i for i in range(len(columns)) if any(row[i] for row in rows)]
        columns = [columns[i] for i in used]
        cells = [[printable(row[i]) for i in used] for row in rows]
        if self._results is None:
            _print_plain(columns, cells)
        else:
            _print_rich(self._results, columns, cells)

    def fits(self, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> bool:
        """Whether no line of the table is broken: by a terminal, for in pipes nothing is."""
        if not sys.stdout.isatty():
            return True
        widths = _widths(columns, [[printable(cell) for cell in row] for row in rows])
        return sum(widths) + 2 * (len(widths) - 1) <= shutil.get_terminal_size().columns

    @contextlib.contextmanager
    def progress(self, what: str, total: int) -> Iterator[Callable[[int], None]]:
        """Shown while bytes are gone through; gives ``update(bytes so far)``."""
        wanted = config().progress
        terminal = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        if wanted == "off" or not (terminal or wanted == "on"):
            yield lambda done: None
            return
        began, show = time.monotonic(), None
        with contextlib.ExitStack() as bars:

            def update(done: int) -> None:
                nonlocal show
                if show is None:
                    if time.monotonic() - began < _SILENT_S:
                        return
                    if not terminal:
                        bar = _progress_lines(what, total, began)
                    elif self._remarks is not None:
                        bar = _rich_progress(self._remarks, what, total)
                    else:
                        bar = _plain_progress(what, total, began)
                    show = bars.enter_context(bar)
                show(done)

            yield update


def _console(stream: Any) -> Any:
    """rich's, for a terminal; None where plain text is due."""
    if not stream.isatty() or os.environ.get("NO_COLOR") or os.environ.get("TERM") == "dumb":
        return None
    try:
        from rich.console import Console
    except ImportError:
        return None
    return Console(file=stream, highlight=False)


def _widths(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> list[int]:
    return [max(len(c.title), *(len(r[i]) for r in rows)) for i, c in enumerate(columns)]


def _print_plain(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    widths = _widths(columns, rows)
    for row in ([c.title for c in columns], *rows):
        cells = (
            text.rjust(width) if column.right else text.ljust(width)
            for text, width, column in zip(row, widths, columns, strict=True)
        )
        print("  ".join(cells).rstrip())


def _print_rich(console: Any, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    """Only text in the last column is folded; where the rest does not fit lines are long."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    widths = _widths(columns, rows)
    for i, column in enumerate(columns):
        folds = i == len(columns) - 1 and not column.right
        table.add_column(
            Text(column.title), justify="right" if column.right else "left", overflow="fold",
            no_wrap=not folds, min_width=min(widths[i], _FOLDED_COLUMNS) if folds else widths[i],
            style="cyan" if i == 0 else "",
        )  # fmt: skip
        widths[i] = min(widths[i], _FOLDED_COLUMNS) if folds else widths[i]
    for row in rows:
        table.add_row(*map(Text, row))
    width = console.width
    console.width = max(width, sum(widths) + 2 * (len(widths) - 1))
    try:
        console.print(table, crop=False)
    finally:
        console.width = width


@contextlib.contextmanager
def _rich_progress(console: Any, what: str, total: int) -> Iterator[Callable[[int], None]]:
    from rich import progress

    bar = progress.Progress(
        progress.TextColumn("{task.description}"), progress.BarColumn(),
        progress.TaskProgressColumn(), progress.TextColumn("{task.fields[done]}"),
        progress.TransferSpeedColumn(), progress.TimeRemainingColumn(),
        console=console, transient=True,
    )  # fmt: skip
    with bar:
        task = bar.add_task(printable(what), total=max(total, 1), done="")
        yield lambda done: bar.update(
            task, completed=done, done=f"{bytes_text(done)} of {bytes_text(total)}"
        )


@contextlib.contextmanager
def _plain_progress(what: str, total: int, began: float) -> Iterator[Callable[[int], None]]:
    """One line that is written over; a carriage return and blanks are all it needs."""
    drawn = 0.0
    width = shutil.get_terminal_size().columns - 1

    def update(done: int) -> None:
        nonlocal drawn
        now = time.monotonic()
        if now - drawn >= _REDRAW_S:
            drawn = now
            sys.stderr.write("\r" + _told(what, done, total, now - began)[:width].ljust(width))
            sys.stderr.flush()

    try:
        yield update
    finally:
        sys.stderr.write("\r" + " " * width + "\r")
        sys.stderr.flush()


@contextlib.contextmanager
def _progress_lines(what: str, total: int, began: float) -> Iterator[Callable[[int], None]]:
    """Whole lines, seldom: for logs."""
    due = 0.0

    def update(done: int) -> None:
        nonlocal due
        now = time.monotonic()
        if now >= due:
            due = now + _LINE_EVERY_S
            print(_told(what, done, total, now - began), file=sys.stderr, flush=True)

    yield update


def _told(what: str, done: int, total: int, took_s: float) -> str:
    """``step-100: 25% of 12.4 GB, 1.24 GB/s, 7.5 s left``."""
    rate = done / max(took_s, 1e-9)
    left = f", {seconds_text((total - done) / rate)} left" if 0 < done < total else ""
    share = f"{min(100, 100 * done // max(total, 1))}% of {bytes_text(total)}"
    return f"{printable(what)}: {share}, {bytes_text(rate)}/s{left}"
