"""Checkpoints that are damaged, exchanged or made to harm: the right bytes, or an error by name.

Never a crash, a hang, bytes of anything but the checkpoint, or a read outside of its directory.
"""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
import random
import re
import resource
import shutil
import signal
import stat
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from common import value
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

import dcp_native as dcp

pytestmark = pytest.mark.filterwarnings("ignore")

SLOW = bool(os.environ.get("DCP_NATIVE_SLOW_TESTS"))
MODULES = (torch_dcp, dcp)
DEADLINE_S = 20
"""When a load that should fail at once counts as hanging."""


def small_state() -> dict[str, Any]:
    return {
        "weight": value("weight", (6, 5)),
        "half": value("half", (3, 4), torch.bfloat16),
        "deep": {"step": 1234, "bias": value("bias", (7,), torch.int64)},
        "title": "a string",
    }


def blank(state: Any) -> Any:
    if isinstance(state, dict):
        return {k: blank(v) for k, v in state.items()}
    return torch.full_like(state, 9) if isinstance(state, torch.Tensor) else None


def same(got: Any, want: Any) -> bool:
    if isinstance(want, dict):
        return set(got) == set(want) and all(same(got[k], want[k]) for k in want)
    return torch.equal(got, want) if isinstance(want, torch.Tensor) else got == want


FQNS = ("weight", "half", "deep.step", "deep.bias", "title")


def names(error: BaseException, file: Path) -> bool:
    """The file, or what was to be loaded from it."""
    return file.name in str(error) or str(error).startswith(FQNS)


def failure(state: dict, path: Path) -> BaseException | None:
    """What a load into `state` fails with, on this one rank."""
    try:
        dcp.load(state, checkpoint_id=path)
    except dcp.CheckpointException as error:
        assert set(error.failures) == {0}
        return error.failures[0][0]
    return None


def data_files(path: Path) -> list[Path]:
    return sorted(path.glob("*.distcp"))


def saved(path: Path, module: Any = dcp, state: dict | None = None, **options: Any) -> Metadata:
    state = small_state() if state is None else state
    module.save(state, storage_writer=module.FileSystemWriter(path, **options))
    return torch_dcp.FileSystemReader(path).read_metadata()


def in_a_child(act: Callable[[], None], limit_bytes: int | None = None) -> None:
    """Runs `act` in a fork, which is killed when it hangs; fails with what it raised."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)  # the pool of threads did not come along
        try:
            if limit_bytes is not None:
                used = int(Path("/proc/self/statm").read_text().split()[0]) * 4096
                resource.setrlimit(resource.RLIMIT_AS, (used + limit_bytes, -1))
            act()
        except BaseException:
            os.write(writer, traceback.format_exc()[-4000:].encode())
        os._exit(0)
    os.close(writer)
    deadline = time.monotonic() + DEADLINE_S
    while (done := os.waitpid(pid, os.WNOHANG)) == (0, 0):
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(reader)
            raise AssertionError("it hangs")
        time.sleep(0.005)
    with os.fdopen(reader, "rb") as said:
        text = said.read().decode()
    assert done[1] == 0 and not text, (done[1], text)


# ---- .metadata ----


def test_ours_cut_anywhere_is_the_checkpoint_or_an_error_that_names_it(tmp_path):
    saved(tmp_path)
    file = tmp_path / ".metadata"
    image, errors = file.read_bytes(), 0
    for length in range(0, len(image), 1 if SLOW else 3):
        file.write_bytes(image[:length])
        state = blank(small_state())
        error = failure(state, tmp_path)
        assert error is not None or same(state, small_state()), length
        assert error is None or ".metadata" in str(error), (length, error)
        errors += error is not None
    assert errors > len(image) // 20


@pytest.mark.parametrize("change", ["one bit", "all bits"])
def test_ours_with_any_byte_changed_is_the_checkpoint_or_an_error_that_names_it(change, tmp_path):
    saved(tmp_path)
    file = tmp_path / ".metadata"
    image, errors = file.read_bytes(), 0
    dcp.configure(allow_unsafe_objects=False)
    for at in range(0 if change == "one bit" else 1, len(image), 1 if SLOW else 2):
        damaged = bytearray(image)
        damaged[at] ^= 1 << at % 8 if change == "one bit" else 255
        file.write_bytes(damaged)
        state = blank(small_state())
        error = failure(state, tmp_path)
        assert error is not None or same(state, small_state()), at
        assert error is None or ".metadata" in str(error), (at, error)
        errors += error is not None
    assert errors > 0


def test_torchs_damaged_anywhere_never_gives_wrong_bytes(tmp_path):
    """It has no checksum: a name may have become another, but what is loaded is what was saved."""
    saved(tmp_path, torch_dcp)
    file = tmp_path / ".metadata"
    image = file.read_bytes()
    dcp.configure(allow_unsafe_objects=False)
    for at in range(0, len(image), 1 if SLOW else 3):
        for damaged in (
            image[:at],
            image[:at] + bytes([image[at] ^ 1 << at % 8]) + image[at + 1 :],
        ):
            file.write_bytes(damaged)
            state = blank(small_state())
            error = failure(state, tmp_path)
            assert error is not None or same(state, small_state()), at


# ---- data files ----


def test_a_data_file_with_any_byte_changed_is_noticed_where_it_matters(tmp_path):
    saved(tmp_path)
    (file,) = data_files(tmp_path)
    image, errors = file.read_bytes(), 0
    for at in range(0, len(image), 1 if SLOW else 3):
        damaged = bytearray(image)
        damaged[at] ^= 1 << at % 8
        file.write_bytes(damaged)
        state = blank(small_state())
        error = failure(state, tmp_path)
        assert error is not None or same(state, small_state()), at
        assert error is None or names(error, file), (at, error)
        errors += error is not None
    assert errors > len(image) // 20


def test_a_data_file_cut_anywhere_is_an_error_that_names_it(tmp_path):
    metadata = saved(tmp_path)
    (file,) = data_files(tmp_path)
    image = file.read_bytes()
    needed = max(info.offset + info.length for info in metadata.storage_data.values())
    for length in range(0, len(image), 7):
        file.write_bytes(image[:length])
        state = blank(small_state())
        error = failure(state, tmp_path)
        assert error is not None or (length >= needed and same(state, small_state())), length
        assert error is None or file.name in str(error), (length, error)


@pytest.mark.parametrize("verify", [True, "strict"])
def test_a_changed_byte_of_a_large_file_is_named_with_tensor_file_and_offset(verify, tmp_path):
    """Rows of a part: blocks that are wanted by half and more are checked."""
    dcp.configure(verify=verify)
    rows, columns = 3000, 300  # 3.6 MB
    state = {"large": torch.arange(rows * columns, dtype=torch.int32).reshape(rows, columns)}
    metadata = saved(tmp_path, state=state)
    (file,) = data_files(tmp_path)
    image = bytearray(file.read_bytes())
    (info,) = metadata.storage_data.values()
    start = image.index(state["large"].numpy().tobytes(), info.offset)
    choose = random.Random(3)
    for _ in range(40 if SLOW else 10):
        at = start + choose.randrange(rows * columns * 4)
        image[at] ^= 64
        file.write_bytes(image)
        error = failure({"large": torch.zeros_like(state["large"])}, tmp_path)
        assert isinstance(error, dcp.NativeError) and error.dcp_code == "CHECKSUM", error
        assert "large" in str(error) and file.name in str(error), error
        numbers = [
            int(n) for n in re.findall(r"byte (\d+)|offset (\d+)", str(error)) for n in n if n
        ]
        assert any(n <= at <= n + (1 << 20) for n in numbers), (error, at)
        image[at] ^= 64
    file.write_bytes(image)
    assert failure(target := {"large": torch.zeros_like(state["large"])}, tmp_path) is None
    assert same(target, state)


@pytest.mark.parametrize("options", [{"thread_count": 2}, {"single_file_per_rank": False}])
def test_exchanged_files_of_one_save_are_noticed(options, tmp_path):
    state = {f"t{i}": torch.full((50, 4), float(i)) for i in range(4)}
    saved(tmp_path, state=state, **options)
    a, b = data_files(tmp_path)[:2]
    a.rename(tmp_path / "a")
    b.rename(a)
    (tmp_path / "a").rename(b)
    error = failure(target := blank(state), tmp_path)
    assert error is not None, target
    assert a.name in str(error) or b.name in str(error), error


def test_a_file_of_another_save_is_noticed(tmp_path):
    state = {"t": torch.ones(50, 4)}
    for path, fill in (("a", 1.0), ("b", 2.0)):
        saved(tmp_path / path, state={"t": torch.full((50, 4), fill)})
    (file,) = data_files(tmp_path / "a")
    shutil.copy(tmp_path / "b" / file.name, file)
    error = failure(blank(state), tmp_path / "a")
    assert error.dcp_code == "STALE" and file.name in str(error), error


def test_a_directory_that_is_exchanged_again_and_again_is_one_checkpoint_at_a_time(tmp_path):
    """A link to the newest of many directories, the old ones removed at once."""
    link = tmp_path / "latest"

    def state_of(version: int) -> dict[str, Any]:
        extent = 100 + 997 * (version % 3)
        return {"a": torch.full((1 << 16,), version), "version": version} | {
            f"b{i}": torch.full((extent,), float(version)) for i in range(5)
        }

    def publish(version: int) -> None:
        directory = tmp_path / f"v{version}"
        writer = dcp.FileSystemWriter(directory, thread_count=1 + version % 2, sync_files=False)
        dcp.save(state_of(version), storage_writer=writer)
        (tmp_path / "next").symlink_to(directory)
        os.replace(tmp_path / "next", link)
        shutil.rmtree(tmp_path / f"v{version - 1}", ignore_errors=True)

    publish(0)
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads(1)  # the pool of threads did not come along
        version = 1
        while True:
            publish(version)
            version += 1
    seen, until = set(), time.monotonic() + (10 if SLOW else 1.5)
    try:
        while time.monotonic() < until:
            state = {"a": torch.zeros(1 << 16, dtype=torch.int64), "version": None}
            error = failure(state, link)
            assert error is None, error
            assert state["a"].eq(state["version"]).all(), state
            seen.add(state["version"])
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    assert len(seen) > 2


# ---- what is no file ----


@pytest.mark.parametrize("name", [".metadata", "data"])
@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("kind", ["fifo", "directory", "loop", "dangling", "socket", "zeros"])
def test_what_is_no_file_is_named_and_never_waited_for(kind, module, name, tmp_path):
    saved(tmp_path, module)
    file = data_files(tmp_path)[0] if name == "data" else tmp_path / name
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    elif kind == "directory":
        file.mkdir()
    elif kind == "loop":
        file.symlink_to(file.name)
    elif kind == "dangling":
        file.symlink_to("nowhere")
    elif kind == "socket":
        os.mknod(file, stat.S_IFSOCK | 0o600)
    else:
        file.symlink_to("/dev/zero")

    def act() -> None:
        error = failure(blank(small_state()), tmp_path)
        assert error is not None
        assert file.name in str(error), error

    in_a_child(act, limit_bytes=3 << 30)


@pytest.mark.parametrize("name", [".metadata", "data", "directory"])
def test_what_may_not_be_read_is_named(name):
    if os.getuid() != 0:
        pytest.skip("only root can become another user")
    path = Path(tempfile.mkdtemp())
    try:
        path.chmod(0o755)
        saved(path / "checkpoint")
        directory = path / "checkpoint"
        directory.chmod(0o755)
        for file in directory.iterdir():
            file.chmod(0o644)
        file = {"data": data_files(directory)[0], ".metadata": directory / ".metadata"}
        file.get(name, directory).chmod(0)

        def act() -> None:
            state = blank(small_state())
            assert failure(state, directory) is None  # as root; and all modules are there
            os.seteuid(65534)
            error = failure(state, directory)
            assert isinstance(error, PermissionError), error
            assert file.get(name, directory).name in str(error), error

        in_a_child(act)
    finally:
        shutil.rmtree(path)


# ---- metadata made by hand ----

FAR = [-1, 1 << 31, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, 1 << 100]


def put_metadata(path: Path, metadata: Metadata) -> None:
    (path / ".metadata").write_bytes(pickle.dumps(metadata))


def one_index(metadata: Metadata, fqn: str) -> MetadataIndex:
    return next(i for i in metadata.storage_data if i.fqn == fqn)


def changed_info(metadata: Metadata, fqn: str, **changes: Any) -> Metadata:
    """Where the record of `fqn` is said to lie."""
    metadata = copy.deepcopy(metadata)
    index = one_index(metadata, fqn)
    metadata.storage_data[index] = dataclasses.replace(metadata.storage_data[index], **changes)
    return metadata


@pytest.fixture
def secret(tmp_path) -> Iterator[Path]:
    """A checkpoint whose neighbour holds a readable record that nobody may get."""
    path = tmp_path / "checkpoint"
    saved(path, torch_dcp)
    saved(tmp_path / "neighbour", torch_dcp, {"weight": torch.full((6, 5), 666.0)})
    yield path


@pytest.mark.parametrize(
    "name",
    [
        "../neighbour/__0_0.distcp", "sub/../../neighbour/__0_0.distcp", "ABSOLUTE", "..", ".", "",
        "/", "x\0y", "x" * 300, "x/" * 3000, "\udc80", ".metadata",
    ],
)  # fmt: skip
def test_names_never_lead_out_of_the_directory(name, secret):
    (secret / "sub").mkdir()
    metadata = torch_dcp.FileSystemReader(secret).read_metadata()
    neighbour = torch_dcp.FileSystemReader(secret.parent / "neighbour").read_metadata()
    elsewhere = neighbour.storage_data[one_index(neighbour, "weight")]
    name = str(secret.parent / "neighbour" / "__0_0.distcp") if name == "ABSOLUTE" else name
    where = {"offset": elsewhere.offset, "length": elsewhere.length}
    put_metadata(secret, changed_info(metadata, "weight", relative_path=name, **where))
    state = {"weight": torch.zeros(6, 5)}
    error = failure(state, secret)
    assert error is not None and not state["weight"].eq(666).any()
    assert not isinstance(error, (MemoryError, SystemError)), error


@pytest.mark.parametrize("field", ["offset", "length"])
@pytest.mark.parametrize("number", [*FAR, 0, 1, 63, 0.5, "7", None])
def test_absurd_places_of_records_are_errors(field, number, tmp_path):
    for module in MODULES:
        if (module, field, number) == (torch_dcp, "offset", 0):
            continue  # there is a record
        path = tmp_path / module.__name__
        metadata = saved(path, module)
        for fqn in ("weight", "title"):
            put_metadata(path, changed_info(metadata, fqn, **{field: number}))
            state = {"weight": torch.zeros(6, 5), "title": None}
            error = failure(state, path)
            assert error is not None, (module, fqn, state)
            assert not isinstance(error, SystemError), error


def test_absurd_boxes_are_errors_or_change_nothing(tmp_path):
    """Sizes whose product overflows, negative ones, far ones, other numbers of dims."""
    dcp.configure(allow_unsafe_objects=False)  # what is too odd for ours is not for torch either
    state = {"t": value("t", (6, 5))}
    metadata = saved(tmp_path, torch_dcp, state)
    numbers = [*FAR, 0, 1, 4, 5, 6, 7, 1 << 32]
    boxes = [(a, b) for a in numbers for b in (5, numbers[len(str(a)) % len(numbers)], 1 << 33)]
    boxes += [(), (6,), (6, 5, 1), (30,), (6, 5) * 40]
    for part in ("offsets", "sizes", "size"):
        for box in boxes:
            bad = copy.deepcopy(metadata)
            entry = bad.state_dict_metadata["t"]
            try:
                wrong = torch.Size(box)
            except (OverflowError, TypeError, RuntimeError):
                wrong = tuple(box)
            if part == "size":
                entry.size = wrong
            else:
                (chunk,) = entry.chunks
                entry.chunks[0] = dataclasses.replace(chunk, **{part: wrong})
            put_metadata(tmp_path, bad)
            target = {"t": torch.full((6, 5), 9.0)}
            error = failure(target, tmp_path)
            assert error is not None or same(target, state), (part, box, target)
            assert not isinstance(error, (SystemError, MemoryError)), (part, box, error)


# ---- whatever is loaded, torch would have loaded it ----


def mutated(choose: random.Random, metadata: Metadata) -> Metadata:
    """Valid objects with something about them changed, such as no writer of ours would make."""
    metadata = copy.deepcopy(metadata)
    entries = metadata.state_dict_metadata
    tensors = [k for k, v in entries.items() if isinstance(v, TensorStorageMetadata)]
    name, other = choose.choice(tensors), choose.choice(tensors)
    indices, places = list(metadata.storage_data), metadata.storage_data
    what = choose.randrange(11)
    if what == 0:  # several chunks at the same bytes
        places[one_index(metadata, name)] = places[one_index(metadata, other)]
    elif what == 1:
        entries[name].chunks.append(choose.choice(entries[name].chunks))
    elif what == 2:
        del places[choose.choice(indices)]
    elif what == 3:
        entries[name].chunks.pop(choose.randrange(len(entries[name].chunks)))
    elif what == 4:
        entries[name].properties = dataclasses.replace(
            entries[name].properties, dtype=choose.choice([torch.float64, torch.int8, torch.bool])
        )
    elif what == 5:
        a, b = choose.choice(indices), choose.choice(indices)
        places[a], places[b] = places[b], places[a]
    elif what == 6:
        index = choose.choice(indices)
        delta = choose.choice([-1, 1, 8, -8, 64, 4096])
        places[index] = dataclasses.replace(places[index], length=places[index].length + delta)
    elif what == 7:  # an order that no writer makes
        entries[name].chunks.reverse()
        metadata.storage_data = dict(reversed(places.items()))
    elif what == 8:
        at = choose.randrange(len(entries[name].chunks))
        chunk = entries[name].chunks[at]
        dims = [choose.choice([0, 1, n]) for n in chunk.sizes]
        entries[name].chunks[at] = ChunkStorageMetadata(chunk.offsets, torch.Size(dims))
    elif what == 9:
        at = choose.randrange(len(entries[name].chunks))
        chunk = entries[name].chunks[at]
        dims = [choose.choice([0, 1, n]) for n in chunk.offsets]
        entries[name].chunks[at] = ChunkStorageMetadata(torch.Size(dims), chunk.sizes)
    else:
        index = choose.choice(indices)
        files = {info.relative_path for info in places.values()}
        file = choose.choice(sorted(files))
        places[index] = _StorageInfo(file, places[index].offset, places[index].length)
    return metadata


def test_what_is_loaded_of_metadata_made_by_hand_is_what_torch_loads(tmp_path):
    """Ours may refuse more; it never makes anything else of it."""
    from test_load_differential import Grid, grid_boxes

    full = {"w": value("w", (8, 6)), "v": value("v", (8, 6)), "u": value("u", (5,))}
    agreed = refused = 0
    for module in MODULES:
        path = tmp_path / module.__name__
        state = {
            "w": Grid.of(full["w"].clone(), grid_boxes([[0, 3, 8], [0, 6]])),
            "v": Grid.of(full["v"].clone(), grid_boxes([[0, 4, 8], [0, 2, 6]])),
            "u": full["u"],
            "n": 5,
        }
        metadata = saved(path, module, state, thread_count=2)
        for seed in range(2000 if SLOW else 150):
            choose = random.Random(seed)
            bad = mutated(choose, metadata)
            if choose.random() < 0.3:
                bad = mutated(choose, bad)
            put_metadata(path, bad)
            targets = [blank(full) | {"n": None} for _ in MODULES]
            error = failure(targets[1], path)
            if error is not None:
                refused += 1
                assert not isinstance(error, (SystemError, MemoryError)), (seed, error)
                continue
            try:
                torch_dcp.load(targets[0], checkpoint_id=path)
            except torch_dcp.CheckpointException as torchs:
                raise AssertionError(
                    f"{module.__name__} {seed}: torch refuses it: {torchs}"
                ) from None
            agreed += 1
            assert same(targets[1], targets[0]), (module, seed)
    assert agreed > 50 and refused > 50, (agreed, refused)


def leave_a_mark(path: str) -> str:
    Path(path).touch()
    return "code ran"


class Runs:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return leave_a_mark, (str(self.path),)


def test_no_path_of_a_load_runs_code_when_unsafe_objects_are_off(tmp_path):
    class Planner(dcp.DefaultLoadPlanner):
        pass

    mark = tmp_path / "mark"
    dcp.save({"a": Runs(mark)}, checkpoint_id=tmp_path / "objects")
    torch_dcp.save({"a": torch.ones(2)}, checkpoint_id=tmp_path / "metadata")
    file = tmp_path / "metadata" / ".metadata"
    metadata = pickle.loads(file.read_bytes())
    metadata.extra = Runs(mark)
    file.write_bytes(pickle.dumps(metadata))
    dcp.configure(allow_unsafe_objects=False)
    for directory in ("objects", "metadata"):
        for options in ({}, {"planner": Planner()}, {"storage_reader": Reader}):
            reader = options.get("storage_reader")
            with pytest.raises(dcp.CheckpointException, match="allow_unsafe_objects is off"):
                dcp.load(
                    {"a": torch.zeros(2) if directory == "metadata" else None},
                    **options | ({"storage_reader": reader(tmp_path / directory)} if reader else
                                 {"checkpoint_id": tmp_path / directory}),
                )  # fmt: skip
            assert not mark.exists(), (directory, options)


class Reader(torch_dcp.FileSystemReader):
    """Not stock."""
