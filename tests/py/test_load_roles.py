"""Each role of a load on its own: planners and readers of the user's, against torch with the same.

The planner's hooks see what torch shows them, in torch's order, on the calling thread; where the
reader is stock the bytes are read natively all the same.
"""

from __future__ import annotations

import codecs
import dataclasses
import importlib.util
import io
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from common import assert_equal, like, value
from conftest import GOLDEN
from torch.distributed.checkpoint import filesystem as torch_filesystem
from torch.distributed.checkpoint._extension import ExtensionRegistry, StreamTransformExtension
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

import dcp_native as dcp
from dcp_native import _native, _plan_reads, state_dict_loader

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

LARGE = 640 * 1024
"""Elements of a tensor whose record is over 1 MiB, and read in blocks."""


def saved() -> dict[str, Any]:
    return {
        "large": value("large", (LARGE // 512, 512)),
        "small": value("small", (6, 5), torch.float64),
        "columns": value("columns", (8, 6)).t(),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "flags": value("flags", (7,), torch.bool),
        "nested": {"m": [value("m", (4,), torch.bfloat16), {"lr": 0.5}], "step": 7},
        "object": {"a", "b"},
    }


def blank() -> dict[str, Any]:
    target = like(saved())
    target["object"] = None
    target["small"] = target["small"].float()  # is cast
    target["columns"] = torch.zeros(8, 6).t()  # not row major
    return target


# ---- writers ----


class Rot13(StreamTransformExtension):
    """Text rotation of latin-1 bytes: letters of everything are swapped."""

    TABLE = bytes(codecs.encode(chr(i), "rot13").encode("latin-1")[0] for i in range(256))

    @staticmethod
    def from_descriptor(version: str) -> Rot13:
        return Rot13()

    @staticmethod
    def registry_name() -> str:
        return "stream.rot13"

    def get_descriptor(self) -> str:
        return f"{self.registry_name()}/1"

    def transform_to(self, output):
        class Out(io.RawIOBase):
            def writable(self):
                return True

            def write(self, data):
                return output.write(bytes(data).translate(Rot13.TABLE))

            def flush(self):
                output.flush()

        return Out()

    def transform_from(self, input):
        return io.BytesIO(input.read().translate(Rot13.TABLE))


def registry() -> ExtensionRegistry:
    registry = ExtensionRegistry()
    registry.extensions[Rot13.registry_name()] = Rot13
    return registry


def write_rot13(path) -> None:
    torch_dcp.save(saved(), storage_writer=torch_dcp.FileSystemWriter(path, _extensions=[Rot13()]))


WRITERS: dict[str, Callable] = {
    "ours": lambda path: dcp.save(saved(), checkpoint_id=path),
    "torch": lambda path: torch_dcp.save(saved(), checkpoint_id=path),
    "rot13": write_rot13,
}
if importlib.util.find_spec("zstandard") or importlib.util.find_spec("pyzstd"):
    from torch.distributed.checkpoint._extension import ZStandard

    def write_zstd(path) -> None:
        writer = torch_dcp.FileSystemWriter(path, _extensions=[ZStandard()])
        torch_dcp.save(saved(), storage_writer=writer)

    WRITERS["zstd"] = write_zstd


@pytest.fixture(scope="module", params=WRITERS)
def path(request, tmp_path_factory):
    made = tmp_path_factory.mktemp(request.param) / "checkpoint"
    WRITERS[request.param](made)
    return made


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    made = tmp_path_factory.mktemp("ours") / "checkpoint"
    WRITERS["ours"](made)
    return made


# ---- planners ----


class Plain(torch_dcp.DefaultLoadPlanner):
    """No hook of its own."""


class Allocates(torch_dcp.DefaultLoadPlanner):
    """Gives out fresh memory and copies from it when it is filled."""

    live = peak = 0

    def resolve_tensor(self, read_item):
        into = super().resolve_tensor(read_item)
        self.live += into.numel() * into.element_size()
        self.peak = max(self.peak, self.live)
        return torch.empty(into.shape, dtype=into.dtype)

    def commit_tensor(self, read_item, tensor):
        self.live -= tensor.numel() * tensor.element_size()
        super().resolve_tensor(read_item).copy_(tensor)


class Scratch(torch_dcp.DefaultLoadPlanner):
    """Gives out the same memory again and again."""

    memory = torch.empty(LARGE, dtype=torch.float64)

    def resolve_tensor(self, read_item):
        shape = read_item.lengths
        return self.memory[: shape.numel()].view(shape)

    def commit_tensor(self, read_item, tensor):
        super().resolve_tensor(read_item).copy_(tensor)


class Halves(torch_dcp.DefaultLoadPlanner):
    """Cuts every read of two rows and more in two, last one first."""

    def create_local_plan(self):
        items = []
        for item in super().create_local_plan().items:
            if item.type is LoadItemType.TENSOR and item.lengths and item.lengths[0] > 1:
                half = item.lengths[0] // 2
                items += [cut(item, half, item.lengths[0] - half), cut(item, 0, half)]
            else:
                items.append(item)
        return LoadPlan(items)


def cut(item: ReadItem, start: int, count: int) -> ReadItem:
    """Rows [start, start + count) of an item."""

    def moved(offsets):
        return torch.Size((offsets[0] + start, *offsets[1:]))

    return dataclasses.replace(
        item,
        storage_offsets=moved(item.storage_offsets),
        dest_offsets=moved(item.dest_offsets),
        lengths=torch.Size((count, *item.lengths[1:])),
    )


class Wrapped(torch.Tensor):
    """A subclass without anything of its own: its memory must not be written behind its back."""


class Subclass(torch_dcp.DefaultLoadPlanner):
    """Gives out what only copy_ may fill, by a view of the right memory."""

    def transform_tensor(self, read_item, tensor):
        return super().transform_tensor(read_item, tensor).as_subclass(Wrapped)


class LooksUp(torch_dcp.DefaultLoadPlanner):
    """Finds tensors by itself."""

    def lookup_tensor(self, index):
        return self.state_dict[index.fqn]


class LoadsBytes(torch_dcp.DefaultLoadPlanner):
    def load_bytes(self, read_item, value):
        assert type(value) is io.BytesIO and value.tell() == 0
        super().load_bytes(read_item, value)


def patched() -> torch_dcp.DefaultLoadPlanner:
    planner = torch_dcp.DefaultLoadPlanner()
    lookup = planner.lookup_tensor
    planner.lookup_tensor = lambda index: lookup(index)
    return planner


PLANNERS: dict[str, Callable] = {
    "none": lambda: None,
    "stock": torch_dcp.DefaultLoadPlanner,
    "plain": Plain,
    "allocates": Allocates,
    "scratch": Scratch,
    "halves": Halves,
    "subclass": Subclass,
    "looks up": LooksUp,
    "loads bytes": LoadsBytes,
    "patched": patched,
}

# ---- readers ----


class Derived(torch_dcp.FileSystemReader):
    """With **kwargs, which it inherits."""


class Delegates(torch_dcp.StorageReader):
    """All by itself; no method takes more than it must."""

    def __init__(self, path) -> None:
        self.inner = torch_dcp.FileSystemReader(path, registry())

    def reset(self, checkpoint_id=None):
        self.inner.reset(checkpoint_id)

    def read_metadata(self) -> Metadata:
        return self.inner.read_metadata()

    def set_up_storage_reader(self, metadata, is_coordinator):
        self.inner.set_up_storage_reader(metadata, is_coordinator)

    def prepare_local_plan(self, plan):
        return plan

    def prepare_global_plan(self, plans):
        return plans

    def read_data(self, plan, planner):
        return self.inner.read_data(plan, planner)

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id) -> bool:
        return True


class OwnFileSystem(torch_filesystem.FileSystem):
    """Not torch's."""


def own_file_system(path):
    reader = torch_dcp.FileSystemReader(path, registry())
    reader.fs = OwnFileSystem()
    return reader


def patched_reader(path):
    reader = torch_dcp.FileSystemReader(path, registry())
    reader.prepare_local_plan = lambda plan: plan
    return reader


def sliced_reader(path):
    reader = dcp.FileSystemReader(path, registry())
    slice_file = reader._slice_file
    reader._slice_file = lambda file, info: slice_file(file, info)
    return reader


STOCK_READERS: dict[str, Callable] = {
    "torchs": lambda path: torch_dcp.FileSystemReader(path, registry()),
    "ours": lambda path: dcp.FileSystemReader(path, registry()),
}
READERS: dict[str, Callable] = STOCK_READERS | {
    "derived": lambda path: Derived(path, registry()),
    "delegates": Delegates,
    "own file system": own_file_system,
    "patched": patched_reader,
    "sliced": sliced_reader,
}


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("reader", READERS)
def test_every_planner_with_every_reader_loads_what_was_saved(planner, reader, path):
    target = blank()
    dcp.load(target, storage_reader=READERS[reader](path), planner=PLANNERS[planner]())
    theirs = blank()
    torch_dcp.load(theirs, storage_reader=READERS[reader](path), planner=PLANNERS[planner]())
    assert_equal(target, theirs)
    assert_equal(target, {**saved(), "small": saved()["small"].float()})
    assert target["columns"].stride() == theirs["columns"].stride()
    report = dcp.last_report()
    assert not report["failed"]
    stock = reader in STOCK_READERS
    assert report["path"] == ("native" if stock else "torch")
    assert (report["reader"] == "native") == stock
    assert (report["planner"] == "native") == (stock and planner in ("none", "stock"))
    if planner not in ("none", "stock"):
        assert report["planner"].startswith("python: ")
    if stock:
        assert report["wanted_bytes"] > 4 * LARGE / 2 and report["wall_ns"] > 0


@pytest.mark.parametrize("planner", [n for n in PLANNERS if n not in ("none", "stock")])
def test_our_reader_reads_natively_under_torchs_load(planner, path, monkeypatch):
    calls = []
    read = _native.read_records
    monkeypatch.setattr(_native, "read_records", lambda *a, **k: calls.append(1) or read(*a, **k))
    target = blank()
    reader = dcp.FileSystemReader(path, registry())
    torch_dcp.load(target, storage_reader=reader, planner=PLANNERS[planner]())
    assert calls
    assert_equal(target, {**saved(), "small": saved()["small"].float()})


@pytest.mark.parametrize("version", ["2.1.2", "2.3.1", "2.6.0", "2.13.0", "2.14.1"])
def test_golden_checkpoints_load_by_hooks_as_by_torch(version):
    checked = 0
    for file in sorted((GOLDEN / version).rglob(".metadata")):
        keys = torch_dcp.FileSystemReader(file.parent).read_metadata().planner_data
        if keys is None:
            continue
        got, want = {}, {}
        dcp.load(got, checkpoint_id=file.parent, planner=_EmptyStateDictLoadPlanner())
        assert dcp.last_report()["reader"] == "native"
        torch_dcp.load(want, checkpoint_id=file.parent, planner=_EmptyStateDictLoadPlanner())
        assert_equal(got, want, str(file))
        checked += 1
    assert checked


# ---- what the hooks see ----


class Records(torch_dcp.DefaultLoadPlanner):
    """Notes every hook: its name, what it was about, and in which thread and modes it ran."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def note(self, hook: str, *what: Any) -> None:
        modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.empty(0).device
        self.calls.append((hook, threading.get_ident(), modes, *what))

    def set_up_planner(self, state_dict, metadata=None, is_coordinator=False):
        self.note("set_up_planner", tuple(state_dict), metadata.__class__, is_coordinator)
        assert isinstance(metadata, Metadata)
        super().set_up_planner(state_dict, metadata, is_coordinator)

    def create_local_plan(self):
        plan = super().create_local_plan()
        self.note("create_local_plan", plan)
        return plan

    def create_global_plan(self, global_plan):
        self.note("create_global_plan", len(global_plan))
        return super().create_global_plan(global_plan)

    def finish_plan(self, new_plan):
        self.note("finish_plan", new_plan)
        return super().finish_plan(new_plan)

    def load_bytes(self, read_item, value):
        self.note("load_bytes", read_item, torch.load(value, weights_only=False))
        value.seek(0)
        super().load_bytes(read_item, value)

    def resolve_tensor(self, read_item):
        self.note("resolve_tensor", read_item)
        return super().resolve_tensor(read_item)

    def commit_tensor(self, read_item, tensor):
        self.note("commit_tensor", read_item, tensor.dtype, tensor.tolist(), tensor.requires_grad)
        super().commit_tensor(read_item, tensor)

    def lookup_tensor(self, index):
        self.note("lookup_tensor", index, index.index)
        return super().lookup_tensor(index)

    def transform_tensor(self, read_item, tensor):
        self.note("transform_tensor", read_item, tuple(tensor.shape))
        return super().transform_tensor(read_item, tensor)


def test_hooks_see_what_torch_shows_them_in_its_order(path):
    calls = {}
    for module in (dcp, torch_dcp):
        target = blank()
        target["large"].requires_grad_()
        planner = Records()
        reader = torch_dcp.FileSystemReader(path, registry())
        module.load(target, storage_reader=reader, planner=planner)
        calls[module] = planner.calls
    mine, theirs = calls[dcp], calls[torch_dcp]
    assert len(mine) == len(theirs)
    asks = ("resolve_tensor", "lookup_tensor", "transform_tensor")
    for wanted in (asks, ("load_bytes", "commit_tensor")):
        assert [c for c in mine if c[0] in wanted] == [c for c in theirs if c[0] in wanted]
    order = [c[0] for c in mine]
    assert mine[: order.index("resolve_tensor")] == theirs[: order.index("resolve_tensor")]
    assert order[:4] == ["set_up_planner", "create_local_plan", "create_global_plan", "finish_plan"]
    items = {
        hook: [c[3] for c in mine if c[0] == hook] for hook in ("resolve_tensor", "commit_tensor")
    }
    assert items["resolve_tensor"] == items["commit_tensor"]
    for item in items["commit_tensor"]:  # none before it is resolved
        first, last = (
            next(i for i, c in enumerate(mine) if c[0] == hook and c[3] == item) for hook in items
        )
        assert first < last
    assert {c[1] for c in mine} == {threading.get_ident()}


def test_hooks_run_in_the_callers_modes(ours):
    for mode in (torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            planner, target = Records(), blank()
            dcp.load(target, checkpoint_id=ours, planner=planner)
            modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        assert {c[2][:2] for c in planner.calls} == {modes}


def test_a_planner_that_allocates_has_a_bounded_part_of_it_alive(tmp_path, monkeypatch):
    """[load-window]"""
    state = {f"w{i:02}": value(f"w{i}", (1000,)) for i in range(40)}
    dcp.save(state, checkpoint_id=tmp_path)
    monkeypatch.setattr(_plan_reads, "WINDOW_BYTES", 10_000)
    planner, target = Allocates(), like(state)
    dcp.load(target, checkpoint_id=tmp_path, planner=planner)
    assert_equal(target, state)
    assert 4000 < planner.peak <= 10_000 and planner.live == 0
    monkeypatch.setattr(_plan_reads, "WINDOW_BYTES", 1)  # larger items go alone
    planner, target = Allocates(), like(state)
    dcp.load(target, checkpoint_id=tmp_path, planner=planner)
    assert_equal(target, state)
    assert planner.peak == 4000


def test_columns_of_one_tensor_are_filled_side_by_side(tmp_path):
    """Their memory overlaps as ranges and not as elements: no reason to read them one by one."""

    class Columns(torch_dcp.DefaultLoadPlanner):
        def create_local_plan(self):
            (item,) = super().create_local_plan().items
            return LoadPlan(
                [
                    dataclasses.replace(
                        item,
                        storage_offsets=torch.Size((0, i)),
                        dest_offsets=torch.Size((0, i)),
                        lengths=torch.Size((50, 1)),
                    )
                    for i in range(8)
                ]
            )

    state = {"w": value("w", (50, 8))}
    dcp.save(state, checkpoint_id=tmp_path)
    target = like(state)
    dcp.load(target, checkpoint_id=tmp_path, planner=Columns())
    assert_equal(target, state)
    assert dcp.last_report()["files_count"] == 1  # opened once: one window


def test_memory_is_free_only_where_nothing_of_the_window_lies():
    base = torch.zeros(100, 10)

    def add(memory, tensor):
        return memory.add(*_native.tensor_memory(tensor, torch.float32), tensor)

    for free, tensors in {
        True: [
            (base[:5], base[5:]),
            (base[5:], base[:5]),
            (base[:, :3], base[:, 3:], base[0:0, 0:0].new_zeros(4)),
            (base[:, 5], base[:, 4], base[:, 6]),
            (base[:2], base[4:6], base[2:4]),
        ],
        False: [
            (base[:5], base[4:]),
            (base[4:], base[:5]),
            (base, base[50]),
            (base[50], base),
            (base[:, :3], base[:, :3]),
            (base[:, 3:], base[10]),
            (base[:2], base[4:6], base[1:5]),
            (base.view(-1)[:7], base.view(-1)[:3]),
        ],
    }.items():
        for case in tensors:
            memory = _plan_reads._Memory()
            added = [add(memory, tensor) for tensor in case]
            assert added == [*[True] * (len(case) - 1), free], [t.shape for t in case]


# ---- odd plans ----


class Plans(torch_dcp.DefaultLoadPlanner):
    """Changes the one item of its plan."""

    def __init__(self, **changes: Any) -> None:
        super().__init__()
        self.changes = changes

    def finish_plan(self, new_plan):
        return LoadPlan([dataclasses.replace(item, **self.changes) for item in new_plan.items])


def size(*numbers: int) -> torch.Size:
    return torch.Size(numbers)


ODD = {
    "an unknown name": {"storage_index": MetadataIndex("nobody", size(0, 0))},
    "an unknown chunk": {"storage_index": MetadataIndex("w", size(3, 3))},
    "behind the end": {"storage_offsets": size(3, 0), "lengths": size(3, 4)},
    "far behind the end": {"storage_offsets": size(1 << 62, 0), "lengths": size(1 << 62, 4)},
    "lengths of too many rows": {"lengths": size(99, 4)},
    "lengths of too few rows": {"lengths": size(2, 4)},
    "negative lengths": {"lengths": size(-1, 4)},
    "from the end": {"storage_offsets": size(-2, 0), "lengths": size(2, 4)},
    "before the start": {"storage_offsets": size(-9, 0), "lengths": size(2, 4)},
    "fewer dims": {"storage_offsets": size(1), "lengths": size(2)},
    "more dims": {"storage_offsets": size(0, 0, 0), "lengths": size(5, 4, 1)},
    "an offset that torch ignores": {"storage_offsets": size(2, 0)},
    "a target elsewhere": {"dest_offsets": size(4, 0), "lengths": size(3, 4)},
    "an unknown target": {"dest_index": MetadataIndex("nobody", size(0, 0))},
    "an object": {"type": LoadItemType.BYTE_IO},
}


@pytest.mark.parametrize("odd", ODD)
@pytest.mark.parametrize("by", ["dcp.load", "our reader"])
def test_an_odd_plan_ends_as_it_does_under_torch(odd, by, path, tmp_path):
    state = {"w": value("w", (5, 4))}
    (dcp if "ours" in str(path) else torch_dcp).save(state, checkpoint_id=tmp_path)
    outcomes = []
    for module in (dcp, torch_dcp):
        target = {"w": torch.zeros(5, 4)}
        reader = None
        if module is dcp and by == "our reader":
            module, reader = torch_dcp, dcp.FileSystemReader(tmp_path)
        try:
            module.load(
                target, checkpoint_id=tmp_path, storage_reader=reader, planner=Plans(**ODD[odd])
            )
            outcomes.append((None, "", target))
        except torch_dcp.CheckpointException as error:
            cause = error.failures[0][0]
            outcomes.append((type(cause), str(cause), target))
    (mine, text, target), (theirs, torchs_text, torchs_target) = outcomes
    assert mine is theirs, outcomes
    assert_equal(target, torchs_target)
    if mine is KeyError and "nobody" not in str(torchs_text):
        assert "w" in text
    elif mine is not KeyError:
        assert torchs_text in text, (torchs_text, text)


def test_a_record_that_is_not_what_the_metadata_says_counts(tmp_path):
    """A planner that saves other bytes than it plans: under torch the record is what is loaded."""

    class Halves16(torch_dcp.DefaultSavePlanner):
        def transform_object(self, write_item, object):
            return object.to(torch.float16) if isinstance(object, torch.Tensor) else object

    state = {"small": value("small", (5, 4)), "large": value("large", (LARGE // 512, 512))}
    torch_dcp.save(state, checkpoint_id=tmp_path, planner=Halves16())
    for planner in (Plain, Halves, Allocates):
        target = like(state)
        dcp.load(target, checkpoint_id=tmp_path, planner=planner())
        assert dcp.last_report()["reader"] == "native"
        assert_equal(target, state)


@pytest.mark.parametrize("name", ["small", "large"])
@pytest.mark.parametrize("writer", ["ours", "torch"])
def test_a_damaged_record_is_an_error_that_names_the_tensor(writer, name, tmp_path):
    WRITERS[writer](tmp_path)
    metadata = torch_dcp.FileSystemReader(tmp_path).read_metadata()
    (info,) = [i for k, i in metadata.storage_data.items() if k.fqn == name]
    file = tmp_path / info.relative_path
    data = bytearray(file.read_bytes())
    payload = saved()[name].numpy().tobytes()[:64]
    data[data.index(payload, info.offset) + 5] ^= 1
    file.write_bytes(bytes(data))
    for verify in (None, True, "strict"):
        with pytest.raises(dcp.CheckpointException, match=f"{name} in .*checksum"):
            dcp.load(blank(), checkpoint_id=tmp_path, planner=Plain(), verify=verify)
        assert dcp.last_report()["failed"] and dcp.last_report()["reader"] == "native"
    dcp.load(blank(), checkpoint_id=tmp_path, planner=Plain(), verify=False)
    assert dcp.last_report()["verified_bytes"] == 0
    with pytest.raises(dcp.CheckpointException, match=f"{name} in .*checksum"):
        reader = dcp.FileSystemReader(tmp_path)
        torch_dcp.load(blank(), storage_reader=reader, planner=Plain())


def test_files_of_another_save_are_refused(tmp_path):
    dcp.save({"w": value("w", (9,))}, checkpoint_id=tmp_path / "a")
    dcp.save({"w": value("v", (9,))}, checkpoint_id=tmp_path / "b")
    (tmp_path / "a" / "__0_0.distcp").write_bytes((tmp_path / "b" / "__0_0.distcp").read_bytes())
    with pytest.raises(dcp.CheckpointException, match="another save than the metadata"):
        dcp.load({"w": torch.zeros(9)}, checkpoint_id=tmp_path / "a", planner=Plain())


@pytest.mark.parametrize("info", [(-1, 10), (0, -1), (1 << 62, 1 << 62), (0, 3)])
def test_places_that_are_no_places_are_named(info, ours):
    class Moves(torch_dcp.DefaultLoadPlanner):
        def set_up_planner(self, state_dict, metadata=None, is_coordinator=False):
            super().set_up_planner(state_dict, metadata, is_coordinator)
            for index, place in metadata.storage_data.items():
                if index.fqn == "small":
                    place.offset, place.length = info

    with pytest.raises(dcp.CheckpointException, match="small"):
        dcp.load({"small": torch.zeros(6, 5)}, checkpoint_id=ours, planner=Moves())


# ---- failures ----


@pytest.mark.parametrize(
    "hook", ["set_up_planner", "create_local_plan", "create_global_plan", "finish_plan",
             "lookup_tensor", "transform_tensor", "resolve_tensor", "commit_tensor", "load_bytes"],
)  # fmt: skip
def test_a_hook_that_raises_fails_the_load_as_in_torch(hook, ours):
    class Fault(Exception):
        pass

    def raises(*unused, **unused_too):
        raise Fault(hook)

    for module in (dcp, torch_dcp):
        planner = torch_dcp.DefaultLoadPlanner()
        setattr(planner, hook, raises)
        with pytest.raises(dcp.CheckpointException) as caught:
            module.load(blank(), checkpoint_id=ours, planner=planner)
        step = (
            "plan"
            if hook in ("set_up_planner", "create_local_plan", "create_global_plan")
            else "read"
        )
        assert caught.value.args[0] == step
        assert isinstance(caught.value.failures[0][0], Fault)
    assert dcp.last_report()["failed"] and "Fault" in dcp.last_report()["error"]


def test_a_failure_while_reading_names_what_became_of_the_memory(tmp_path, monkeypatch):
    monkeypatch.setattr(_plan_reads, "WINDOW_BYTES", 40)

    class Fails(torch_dcp.DefaultLoadPlanner):
        def resolve_tensor(self, read_item):  # one of its own may allocate: windows are kept
            return super().resolve_tensor(read_item)

        def commit_tensor(self, read_item, tensor):
            if read_item.dest_index.fqn == "b":
                raise ZeroDivisionError("of the planner")

    state = {name: value(name, (10,)) for name in "abc"}
    dcp.save(state, checkpoint_id=tmp_path)
    with pytest.raises(dcp.LoadException, match="of the planner") as caught:
        dcp.load(like(state), checkpoint_id=tmp_path, planner=Fails())
    error, report = caught.value, dcp.last_report()
    assert (error.filled, error.partly, error.untouched) == (("a",), ("b",), ("c",))
    assert (report["filled"], report["partly"], report["untouched"]) == (["a"], ["b"], ["c"])


def test_damaged_metadata_is_no_reason_to_look_for_the_ranks_own(tmp_path):
    state = {"w": value("w", (4,))}
    dcp.save(state, checkpoint_id=tmp_path, use_collectives=False)
    target = like(state)
    dcp.load(target, checkpoint_id=tmp_path, planner=Plain())
    assert_equal(target, state)
    assert dcp.last_report()["rank_local"]
    (tmp_path / ".metadata").write_bytes((tmp_path / "__0.metadata").read_bytes()[:90])
    with pytest.raises(dcp.CheckpointException, match=r"global metadata read failed.*metadata"):
        dcp.load(like(state), checkpoint_id=tmp_path, planner=Plain())


def test_interrupts_are_raised_as_themselves(ours):
    class Interrupts(torch_dcp.DefaultLoadPlanner):
        def commit_tensor(self, read_item, tensor):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dcp.load(blank(), checkpoint_id=ours, planner=Interrupts())


def test_unsafe_objects_are_not_handed_to_a_planner_when_they_are_off(tmp_path):
    dcp.save({"o": {1, 2}, "p": pytest.approx}, checkpoint_id=tmp_path)
    dcp.configure(allow_unsafe_objects=False)
    target = {"o": None}
    dcp.load(target, checkpoint_id=tmp_path, planner=Plain())
    assert target["o"] == {1, 2}
    with pytest.raises(dcp.CheckpointException, match="allow_unsafe_objects is off"):
        dcp.load({"p": None}, checkpoint_id=tmp_path, planner=Plain())


# ---- torch's own special planners ----


@pytest.mark.parametrize("keys", [None, "nested", {"large", "nested.m"}, {"object"}])
def test_keys_alone_make_a_state_dict(keys, path):
    mine, theirs = (
        module._load_state_dict_from_keys(
            keys, storage_reader=torch_dcp.FileSystemReader(path, registry())
        )
        for module in (state_dict_loader, torch_dcp.state_dict_loader)
    )
    assert_equal(mine, theirs)
    assert list(mine) == list(theirs)
    assert dcp.last_report()["reader"] == "native"


def test_fsspec_goes_through_torch(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecWriter

    for where in ("memory://roles/checkpoint", f"file://{tmp_path}/checkpoint"):
        torch_dcp.save(saved(), storage_writer=FsspecWriter(where))
        for planner in (None, Plain()):
            for target in ({"checkpoint_id": where}, {"storage_reader": FsspecReader(where)}):
                loaded = blank()
                dcp.load(loaded, planner=planner, **target)
                assert_equal(loaded, {**saved(), "small": saved()["small"].float()})
                assert dcp.last_report()["path"] == "torch"
                assert "FsspecReader" in dcp.last_report()["reader"]
    fsspec.filesystem("memory").rm("roles", recursive=True)


# ---- what one planner does to items that are read together ----


class Narrows(Scratch):
    """One float32 buffer for all: what is saved in another dtype is copied there by torch."""

    memory = torch.empty(64)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.uint16, torch.complex64])
@pytest.mark.parametrize("writer", [dcp, torch_dcp], ids=["ours", "torch"])
def test_scratch_memory_holds_one_item_at_a_time(tmp_path, dtype, writer):
    """Of these dtypes torch fills the target, behind the reads of the window; [load-window]"""
    first = torch.arange(1, 5).to(torch.float32).to(dtype)
    state = {"a": first, "b": torch.arange(4.0) + 10, "c": first.clone(), "d": torch.ones(4)}
    writer.save(state, checkpoint_id=tmp_path)
    for module in (torch_dcp, dcp):
        target = like(state)
        module.load(target, checkpoint_id=tmp_path, planner=Narrows())
        assert_equal(target, state, module.__name__)


def test_scratch_memory_holds_one_item_at_a_time_where_metadata_says_little(tmp_path):
    """Items of which the records are wanted, before and behind those that are filled."""

    class Forgets(Narrows):
        def create_local_plan(self):
            plan = super().create_local_plan()
            entry = self.metadata.state_dict_metadata["a"]
            entry.chunks.clear()
            return plan

    state = {"a": torch.arange(4.0), "b": torch.arange(4.0) + 10, "c": torch.arange(4.0) + 20}
    dcp.save(state, checkpoint_id=tmp_path)
    target = like(state)
    dcp.load(target, checkpoint_id=tmp_path, planner=Forgets())
    assert_equal(target, state)


def test_a_record_of_another_shape_is_compared_with_the_target(tmp_path):
    """A planner that packs what it saves and unpacks what it loads."""

    class Packs(torch_dcp.DefaultSavePlanner):
        def transform_object(self, write_item, object):
            object = super().transform_object(write_item, object)
            return object.view(torch.uint8).view(-1) if isinstance(object, torch.Tensor) else object

    class Unpacks(torch_dcp.DefaultLoadPlanner):
        def create_local_plan(self):
            items = [
                dataclasses.replace(
                    item, lengths=torch.Size((item.lengths.numel() * 4,)),
                    storage_offsets=torch.Size((0,)),
                )
                for item in super().create_local_plan().items
            ]  # fmt: skip
            return LoadPlan(items)

        def resolve_tensor(self, read_item):
            return torch.empty(read_item.lengths, dtype=torch.uint8)

        def commit_tensor(self, read_item, tensor):
            target = self.state_dict[read_item.dest_index.fqn]
            target.copy_(tensor.view(torch.float32).view(target.shape))

    class Whole(Unpacks):
        """The plan is the metadata's, the target is not."""

        def create_local_plan(self):
            return torch_dcp.DefaultLoadPlanner.create_local_plan(self)

        def resolve_tensor(self, read_item):
            return torch.empty(read_item.lengths.numel() * 4, dtype=torch.uint8)

    state = {"w": value("w", (5, 4)), "v": value("v", (9,))}
    packed = {"v": value("v", (9,))}
    for saved_, planner in ((packed, Whole), (packed, Unpacks), (state, Unpacks)):
        for module in (dcp, torch_dcp):
            path = tmp_path / f"{planner.__name__}{module.__name__}{len(saved_)}"
            module.save(saved_, checkpoint_id=path, planner=Packs())
            outcomes = []
            for loader in (torch_dcp, dcp):
                target = like(saved_)
                try:
                    loader.load(target, checkpoint_id=path, planner=planner())
                except dcp.CheckpointException as error:
                    outcomes.append(type(error.failures[0][0]))
                else:
                    outcomes.append(None)
                    assert_equal(target, saved_, f"{planner} {loader}")
            assert outcomes[0] == outcomes[1], (planner, module)
