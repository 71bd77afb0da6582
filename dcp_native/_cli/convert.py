"""convert: checkpoints to and from torch.save files and Hugging Face files, or to other data files.

Everything streams: tensors are read as boxes or mapped from the files that they lie in, and are
written as they come.  A target is replaced only when it is asked for, and whole.
"""

from __future__ import annotations

import argparse
import contextlib
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .._config import configure
from .checkpoint import Checkpoint, add_rank, metadata_names
from .output import CommandError, Output, one_line, status_of
from .units import bytes_text, count_text, positive, seconds_text

KINDS = ("dcp", "torch", "hf")
_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")


def add(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        help="to and from torch.save, safetensors; to other numbers of files",
        description="Converts between checkpoint directories (dcp), torch.save files (torch) and "
        "Hugging Face directories of safetensors files (hf); or a checkpoint to one with another "
        "number of data files (dcp to dcp, --files). What TARGET is follows from its name (.pt, "
        ".pth, .bin, .ckpt: torch) or from --to.",
    )
    parser.add_argument("source", type=Path, help="a checkpoint, file or directory")
    parser.add_argument("target", type=Path, help="what to make")
    parser.add_argument("--to", choices=KINDS, help="what TARGET is to be")
    parser.add_argument(
        "--files", type=positive, metavar="N", help="data files (dcp, hf) that are made"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what TARGET has")
    parser.add_argument(
        "--skip-objects", action="store_true", help="hf: leave out what is no tensor"
    )
    parser.add_argument(
        "--unsafe",
        action="store_true",
        help="unpickle objects that only arbitrary code can load; for files that you trust",
    )
    add_rank(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace, out: Output) -> int:
    configure(allow_unsafe_objects=args.unsafe)
    source = kind_of(args.source)
    target = args.to or _kind_to_make(args.target, source, args.files)
    step = _STEPS.get((source, target))
    if step is None:
        raise CommandError(f"{args.source} is {_A[source]} already")
    if target == "torch" and args.files not in (None, 1):
        raise CommandError("a torch.save file is one file: no --files")
    if source == target == "dcp" and args.files is None:
        raise CommandError(f"{args.source} is a checkpoint already; --files N makes one of N files")
    if args.rank is not None and (source, target) != ("dcp", "hf"):
        raise CommandError("--rank is for checkpoints that become Hugging Face files")
    _check_target(args.target, target, args.overwrite)
    began, was_there = time.monotonic(), args.target.exists()
    try:
        step(args, out)
    except BaseException as error:  # torch's CheckpointException is no Exception
        if not was_there:
            with contextlib.suppress(OSError):  # it is no directory, or something is in it
                args.target.rmdir()
        if isinstance(error, (KeyboardInterrupt, SystemExit)):
            raise
        raise _explained(error) from None
    seconds = time.monotonic() - began
    size, files = _made(args.target)
    out.line(
        f"{args.source} ({_NAMES[source]}) -> {args.target} ({_NAMES[target]}): {bytes_text(size)} "
        f"in {count_text(files, 'file')}, {seconds_text(seconds)}"
    )
    out.json({
        "source": str(args.source), "source_kind": source, "target": str(args.target),
        "target_kind": target, "bytes": size, "files": files, "wall_ns": round(seconds * 1e9),
    })  # fmt: skip
    return 0


_A = {"dcp": "a checkpoint", "torch": "a torch.save file", "hf": "Hugging Face files"}
_NAMES = {"dcp": "checkpoint", "torch": "torch.save file", "hf": "Hugging Face files"}


def kind_of(path: Path) -> str:
    """What a path holds.

    Raises:
        CommandError: none of what can be converted.
    """
    if path.is_file():
        return "hf" if path.suffix == ".safetensors" else "torch"
    try:
        if metadata_names(path):
            return "dcp"
    except OSError as error:
        raise CommandError(f"{path}: {error.strerror or error}") from None
    if any(path.glob("*.safetensors")):
        return "hf"
    raise CommandError(f"{path} holds neither a checkpoint nor safetensors files", 1)


def _kind_to_make(target: Path, source: str, files: int | None) -> str:
    if target.suffix in _TORCH_SUFFIXES:
        return "torch"
    if target.suffix == ".safetensors":
        raise CommandError(f"{target}: Hugging Face files are made in a directory: name one")
    if source != "dcp" or files is not None:
        return "dcp"
    raise CommandError(f"what is {target} to be? Say --to torch, --to hf, or --to dcp --files N")


def _check_target(path: Path, kind: str, overwrite: bool) -> None:
    if kind == "torch":
        if path.is_dir():
            raise CommandError(f"{path} is a directory; a torch.save file is to be made")
        taken = path.exists()
    else:
        if path.exists() and not path.is_dir():
            raise CommandError(f"{path} is no directory")
        taken = path.is_dir() and any(path.iterdir())
    if taken and not overwrite:
        raise CommandError(f"{path} is there already; --overwrite replaces it")


def _made(path: Path) -> tuple[int, int]:
    files = [path] if path.is_file() else [p for p in path.iterdir() if p.is_file()]
    return sum(p.stat().st_size for p in files), len(files)


def _explained(error: BaseException) -> CommandError:
    """One line."""
    if isinstance(error, CommandError):
        return error
    text = one_line(error)
    if "allow_unsafe_objects" in text:
        return CommandError(f"{text} (--unsafe allows it, for files that you trust)", 1)
    return CommandError(text, status_of(error))


# ---- the ways ----


def _opened(path: Path) -> Checkpoint:
    """A checkpoint of which one metadata file says everything.

    Raises:
        CommandError: it was saved rank by rank (``use_collectives=False``): only ``--to hf`` joins
            what its ranks hold.
    """
    checkpoint = Checkpoint(path)
    if not checkpoint.is_whole and len(checkpoint.images) > 1:
        raise CommandError(
            f"{path} was saved by each rank for itself (use_collectives=False): load it on as many "
            "ranks and save it with collectives, or convert its tensors with --to hf",
            1,
        )
    return checkpoint


def _dcp_to_torch(args: argparse.Namespace, out: Output) -> None:
    from ..format_utils import dcp_to_torch_save

    _opened(args.source)
    dcp_to_torch_save(args.source, args.target)


def _torch_to_dcp(args: argparse.Namespace, out: Output) -> None:
    _save_torch_file(args.source, args.target, args.files)


def _dcp_to_dcp(args: argparse.Namespace, out: Output) -> None:
    """By way of a torch.save file beside the target: memory stays bounded, the disk pays."""
    from ..format_utils import dcp_to_torch_save

    wanted = {entry.key for entry in _opened(args.source).entries}  # the target may be the source
    with _between(args.target, ".pt") as between:
        dcp_to_torch_save(args.source, between)
        _save_torch_file(between, args.target, args.files)
    got = {entry.key for entry in Checkpoint(args.target).entries}
    if wanted != got:
        odd = sorted(wanted ^ got)[0]
        raise CommandError(f"{args.target} has not the keys of {args.source} ({odd}, say)", 1)


def _hf_to_dcp(args: argparse.Namespace, out: Output) -> None:
    from .hugging_face import mapped_tensors

    _save(mapped_tensors(args.source), args.target, args.files, (0, 0))


def _hf_to_torch(args: argparse.Namespace, out: Output) -> None:
    """By way of a checkpoint beside it: torch.save refuses tensors of two types in one mapping."""
    from ..format_utils import dcp_to_torch_save
    from .hugging_face import mapped_tensors

    with _between(args.target, "") as between:
        _save(mapped_tensors(args.source), between, None, (0, 0))
        dcp_to_torch_save(between, args.target)


@contextlib.contextmanager
def _between(target: Path, suffix: str) -> Iterator[Path]:
    """A name beside the target for what is needed on the way, and is removed after."""
    name = f".dcp_native-convert-{secrets.token_hex(8)}{suffix}"
    path = target.resolve().parent / name
    try:
        yield path
    finally:
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        path.unlink(missing_ok=True)


def _dcp_to_hf(args: argparse.Namespace, out: Output) -> None:
    from .hugging_face import CheckpointTensors, export

    export(
        CheckpointTensors(Checkpoint(args.source, args.rank)),
        args.target,
        args.files,
        args.skip_objects,
        out,
    )


def _torch_to_hf(args: argparse.Namespace, out: Output) -> None:
    from .hugging_face import MappedTensors, export

    state_dict, _ = _load_torch_file(args.source)
    export(MappedTensors(state_dict), args.target, args.files, args.skip_objects, out)


def _load_torch_file(path: Path) -> tuple[Any, tuple[int, int]]:
    """What it holds, mapped, and the addresses of the mapping."""
    from .. import _native
    from .._torch_file import load_mapped

    try:
        return load_mapped(path)
    except (OSError, MemoryError, _native.NativeError):
        raise
    except Exception as error:
        text = " ".join(str(error).split())
        if "allow_unsafe_objects" in text:
            raise
        raise CommandError(
            f"{path} is no file of torch.save that can be read ({type(error).__name__}: {text})", 1
        ) from None


def _save_torch_file(path: Path, target: Path, files: int | None) -> None:
    state_dict, mapped = _load_torch_file(path)
    if not isinstance(state_dict, dict):
        raise CommandError(f"{path} holds a {type(state_dict).__name__}, and no dict to save", 1)
    _save(state_dict, target, files, mapped)


def _save(state_dict: dict[str, Any], target: Path, files: int | None, mapped: Any) -> None:
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    from ..state_dict_saver import _save as save

    save(
        state_dict,
        FileSystemWriter(target, thread_count=files or 1),
        None,
        0,
        no_dist=True,
        planner=None,
        use_collectives=True,
        call_stateful=False,
        mapped=mapped,
    )


_STEPS: dict[tuple[str, str], Callable[[argparse.Namespace, Output], None]] = {
    ("dcp", "torch"): _dcp_to_torch,
    ("torch", "dcp"): _torch_to_dcp,
    ("dcp", "dcp"): _dcp_to_dcp,
    ("dcp", "hf"): _dcp_to_hf,
    ("hf", "dcp"): _hf_to_dcp,
    ("torch", "hf"): _torch_to_hf,
    ("hf", "torch"): _hf_to_torch,
}
