"""Numbers as people read and write them.  Units of bytes are decimal: 1 MB is a million bytes."""

from __future__ import annotations

import argparse
import re

_UNITS = ("B", "kB", "MB", "GB", "TB", "PB", "EB")
_FACTORS = {unit.lower(): 1000**power for power, unit in enumerate(_UNITS)} | {
    "": 1, "k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12,
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40,
}  # fmt: skip


def bytes_text(count: float) -> str:
    """``1.24 GB``: three digits, as many as tell anything."""
    value, unit = float(count), 0
    while value >= 999.5 and unit < len(_UNITS) - 1:
        value /= 1000
        unit += 1
    digits = 0 if unit == 0 or value >= 99.95 else 1 if value >= 9.995 else 2
    return f"{value:.{digits}f} {_UNITS[unit]}"


def count_text(count: int, what: str = "", plural: str = "") -> str:
    """``1,234 keys``, ``1 key``."""
    noun = what if count == 1 else plural or f"{what}s"
    return f"{count:,} {noun}" if what else f"{count:,}"


def seconds_text(seconds: float) -> str:
    """``4 ms``, ``1.2 s``, ``3 min 20 s``, ``2 h 5 min``."""
    if seconds < 0.9995:
        ms = seconds * 1e3
        return f"{ms:.0f} ms" if ms >= 9.95 else f"{ms:.1f} ms"
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def shape_text(shape: tuple[int, ...]) -> str:
    """``[4096, 128]``; ``[]`` for tensors without dimensions."""
    return f"[{', '.join(map(str, shape))}]"


def box_text(offsets: tuple[int, ...], sizes: tuple[int, ...]) -> str:
    """A box as Python slices it: ``[0:1024, 0:4096]``."""
    spans = (f"{at}:{at + size}" for at, size in zip(offsets, sizes, strict=True))
    return f"[{', '.join(spans)}]"


def byte_count(text: str) -> int:
    """``10GB``, ``1.5 GiB``, ``4096``; a type for argparse."""
    found = re.fullmatch(r"\s*([0-9]*\.?[0-9]+)\s*([a-zA-Z]*)\s*", text)
    factor = _FACTORS.get(found[2].lower()) if found else None
    if found is None or factor is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of bytes (10GB, 1.5GiB, 4096)")
    return int(float(found[1]) * factor)


def positive(text: str) -> int:
    """A whole number above 0; a type for argparse."""
    if not re.fullmatch(r"[0-9]{1,18}", text) or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def natural(text: str) -> int:
    """A whole number; a type for argparse."""
    if not re.fullmatch(r"[0-9]{1,18}", text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number")
    return int(text)


def natural_order(name: str) -> list[str | int]:
    """A key to sort names by: ``__2_0`` before ``__10_0``."""
    parts = re.split(r"([0-9]+)", name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]
