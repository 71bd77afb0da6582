"""cat: the values of one key, printed or as a file for numpy."""

from __future__ import annotations

import argparse
import os
import re
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from . import objects
from .checkpoint import Checkpoint, Entry, add_rank
from .output import CommandError, Output
from .units import box_text, bytes_text, shape_text

if TYPE_CHECKING:
    from .values import Box

_MOST_PRINTED_BYTES = 256 << 20
_WINDOW_BYTES = 16 << 20
_NUMPY_DTYPES = frozenset((
    "bool", "uint8", "uint16", "uint32", "uint64", "int8", "int16", "int32", "int64", "float16",
    "float32", "float64", "complex64", "complex128",
))  # fmt: skip

_REPR_END = re.compile(r"(, size=\([0-9, ]*\))?(, dtype=torch\.\w+)?\)$")


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "cat",
        help="the values of one key",
        description="Prints a tensor, or a part of it, or an object; or writes the tensor as a "
        ".npy file. Only the part that is wanted is read, and checked on the way.",
    )
    parser.add_argument("dir", type=Path, help="the checkpoint's directory")
    parser.add_argument("key", help="a key, as inspect shows it")
    parser.add_argument(
        "--slice", default="", metavar="S", help="a part, as in Python: '0:10, :5', '3', '..., -1'"
    )
    parser.add_argument("-o", "--output", type=Path, metavar="FILE", help="write FILE (.npy)")
    add_rank(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: Output) -> int:
    checkpoint = Checkpoint(args.dir, args.rank)
    entry = checkpoint.entry(args.key)
    if entry.shape is None:
        return _object(checkpoint, entry, args, out)
    spans = parse_slice(args.slice, entry.shape)
    from .values import Box

    box = Box(entry, tuple(a for a, _, _ in spans), tuple(n for _, n, _ in spans))
    kept = tuple(n for _, n, keep in spans if keep)
    if args.output is not None:
        dtype = _save(checkpoint, box, kept, args.output)
        if dtype != entry.dtype:
            out.remark(f"{entry.dtype} values are saved as {dtype}: numpy has no {entry.dtype}")
        out.line(f"{args.output}: {dtype} {shape_text(kept)}")
        out.json({"file": str(args.output), "dtype": dtype, "shape": kept})
        return 0
    _print(checkpoint, box, kept, out)
    return 0


def parse_slice(text: str, shape: tuple[int, ...]) -> list[tuple[int, int, bool]]:
    """First index, length, and whether the dimension stays, for each dimension.

    Raises:
        CommandError: it is none, or of something else than this shape.
    """
    parts = [part.strip() for part in text.strip().strip("[]").split(",")] if text.strip() else []
    if parts.count("...") > 1:
        raise CommandError(f"--slice {text!r}: more than one '...'")
    if "..." in parts:
        at = parts.index("...")
        parts[at : at + 1] = [":"] * (len(shape) - len(parts) + 1)
    if len(parts) > len(shape):
        raise CommandError(f"--slice {text!r} has {len(parts)} parts for shape {shape_text(shape)}")
    parts += [":"] * (len(shape) - len(parts))
    return [_span(part, length, text) for part, length in zip(parts, shape, strict=True)]


def _span(part: str, length: int, text: str) -> tuple[int, int, bool]:
    if re.fullmatch(r"-?[0-9]+", part):
        at = int(part) + (length if part.startswith("-") else 0)
        if not 0 <= at < length:
            raise CommandError(f"--slice {text!r}: {part} is outside of a dimension of {length}")
        return at, 1, False
    found = re.fullmatch(r"(-?[0-9]+)?\s*:\s*(-?[0-9]+)?", part)
    if found is None:
        raise CommandError(f"--slice {text!r}: {part!r} is neither an index nor first:last")
    ends = (int(found[1]) if found[1] else None, int(found[2]) if found[2] else None)
    first, last, _ = slice(*ends).indices(length)
    return first, max(0, last - first), True


def _object(checkpoint: Checkpoint, entry: Entry, args: argparse.Namespace, out: Output) -> int:
    if args.slice or args.output is not None:
        raise CommandError(f"{entry.key} is an object: there is nothing to slice, no .npy to make")
    try:
        value = objects.load_object(objects.record_of(checkpoint, entry))
    except objects.Refused as error:
        raise CommandError(f"{entry.key}: the safe loader refuses it ({error})", 1) from None
    out.line(repr(value))
    out.json({"key": entry.key, "kind": "object", "value": repr(value)})
    return 0


def _print(checkpoint: Checkpoint, box: Box, kept: tuple[int, ...], out: Output) -> None:
    from .values import Reader

    entry = box.entry
    if box.bytes_count > _MOST_PRINTED_BYTES:
        raise CommandError(
            f"{entry.key}: {bytes_text(box.bytes_count)} are too many to print; give a --slice, or "
            "a file with -o"
        )
    import torch

    (tensor,) = Reader(checkpoint).read([box])
    tensor = tensor.reshape(kept)
    if out.as_json:
        values = tensor if entry.dtype in _NUMPY_DTYPES else tensor.to(_wider(tensor.dtype))
        if values.is_complex():
            values = torch.view_as_real(values)
        out.json({
            "key": entry.key, "kind": "tensor", "dtype": entry.dtype, "shape": kept,
            "box": box_text(box.offsets, box.sizes), "values": values.tolist(),
        })  # fmt: skip
        return
    torch.set_printoptions(linewidth=max(40, shutil.get_terminal_size().columns))
    out.line(f"{entry.key}: {entry.dtype} {shape_text(kept)}", style="bold")
    text = _REPR_END.sub("", repr(tensor).removeprefix("tensor("))
    for line in text.splitlines() or [""]:
        out.line(line.removeprefix("       "))


def _wider(dtype: Any) -> Any:
    """Of a type that NumPy has not, one that it has and that holds its values."""
    import torch

    return torch.complex64 if dtype.is_complex else torch.float32


def _save(checkpoint: Checkpoint, box: Box, kept: tuple[int, ...], path: Path) -> str:
    """Write a .npy file window by window; the dtype it has."""
    try:
        import numpy
    except ImportError:
        raise CommandError("a .npy file needs numpy: pip install numpy") from None
    import torch

    from .values import Box, Reader, windows

    dtype = box.entry.dtype
    if dtype not in _NUMPY_DTYPES:
        dtype = str(_wider(getattr(torch, dtype))).removeprefix("torch.")
    reader = Reader(checkpoint)
    made = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        array = numpy.lib.format.open_memmap(made, mode="w+", dtype=numpy.dtype(dtype), shape=kept)
        target = torch.from_numpy(array).reshape(box.sizes)
        for part in windows(box, _WINDOW_BYTES):
            starts = zip(part.offsets, box.offsets, part.sizes, strict=True)
            into = target[tuple(slice(a - b, a - b + n) for a, b, n in starts)]
            if dtype == box.entry.dtype:
                reader.read_into([Box(*part)], [into])
            else:
                into.copy_(reader.read([Box(*part)])[0])
        array.flush()
        os.replace(made, path)
    except ValueError as error:  # numpy's, of shapes that it cannot map
        raise CommandError(f"{path}: {error}") from None
    finally:
        made.unlink(missing_ok=True)
    return dtype
