"""Who plans and who writes a save is decided role by role; one process, torch beside us."""

from __future__ import annotations

import contextlib
import io
import logging
import pickle
import threading

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from common import assert_equal, like, value
from recorders import (
    DEFAULT_HOOKS,
    NATIVE_PLANNERS,
    NATIVE_WRITERS,
    PLANNERS,
    WRITERS,
    Bare,
    Calls,
    Casting,
    Deflate,
    Extra,
    NoDedup,
    Recording,
    all_pairs,
    recording_writer,
    with_calls,
)
from torch.distributed.checkpoint._extension import ExtensionRegistry
from torch.distributed.checkpoint.filesystem import SerializationFormat
from torch.distributed.checkpoint.planner import LoadItemType, SavePlan, SavePlanner

import dcp_native as dcp
from dcp_native import AsyncCheckpointerType

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

CACHES = [name for name in vars(SavePlanner) if name.startswith("_cached_")]


@pytest.fixture(autouse=True)
def empty_caches(monkeypatch):
    for name in CACHES:
        monkeypatch.setattr(SavePlanner, name, {})


def state():
    return {
        "w": value("w", (6, 4)),
        "tied": (w := value("tied", (40, 50))),
        "same": w,
        "view": value("view", (6, 9)).t()[2:7],
        "int": value("int", (5,), torch.int64),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
        "none": None,
        "opt": {"m": [value("m", (3,)), "text"], "step": 7},
    }


def run(module, how, sd, path, planner, writer, **options):
    writer = WRITERS[writer](path) if isinstance(writer, str) else writer
    if how == "sync":
        metadata = module.save(sd, storage_writer=writer, planner=planner, **options)
    else:
        kind = AsyncCheckpointerType.THREAD if how == "thread" else AsyncCheckpointerType.PROCESS
        future = module.async_save(
            sd, storage_writer=writer, planner=planner, async_checkpointer_type=kind, **options
        )
        for tensor in [t for t in sd.values() if isinstance(t, torch.Tensor)]:
            tensor.fill_(0)  # what is saved is what was there at the call
        metadata = future.result(60)
    return metadata, writer


class Registry(ExtensionRegistry):
    def __init__(self):
        self.extensions = {Deflate.registry_name(): Deflate}


def load(module, path, sd, **options):
    target = like(sd)
    reader = module.FileSystemReader(path, _extension_registry=Registry())
    module.load(target, storage_reader=reader, **options)
    return target


class RawObjects(dcp.DefaultLoadPlanner):
    """Takes objects as bytes."""

    def load_bytes(self, read_item, value):
        assert read_item.type == LoadItemType.BYTE_IO
        self.original_state_dict[read_item.dest_index.fqn] = value.getvalue()


def loaded(module, planner, path, sd):
    """What a program would get back of it."""
    if planner == "bare":
        target = {f"bare/{k}": v for k, v in like(sd).items() if not isinstance(v, dict)}
        reader = module.FileSystemReader(path, _extension_registry=Registry())
        module.load(target, storage_reader=reader, planner=RawObjects(flatten_state_dict=False))
        return target
    if planner == "unflattened":
        sd = {k: v for k, v in sd.items() if not isinstance(v, dict)}
        return load(module, path, sd, planner=module.DefaultLoadPlanner(False))
    return load(module, path, sd, planner=module.DefaultLoadPlanner(allow_partial_load=True))


def description(metadata):
    return {
        "state_dict_metadata": metadata.state_dict_metadata,
        "planner_data": metadata.planner_data,
        "indices": {(i.fqn, i.offset, i.index) for i in metadata.storage_data},
        "version": metadata.version,
        "extra": getattr(metadata, "extra", None),
        "attributes": sorted(vars(metadata)),
    }


def calls_of(role):
    return getattr(role, "calls", Calls())


def collectives(name):
    """Options of a save and the name of its metadata file."""
    return {
        "together": ({}, ".metadata"),
        "no_dist": ({"no_dist": True}, ".metadata"),
        "independent": ({"use_collectives": False}, "__0.metadata"),
    }[name]


ROWS = list(
    all_pairs(
        PLANNERS, WRITERS, ("sync", "thread", "process"), ("together", "no_dist", "independent")
    )
)


@pytest.mark.parametrize(("planner", "writer", "how", "group"), ROWS, ids=map("-".join, ROWS))
def test_a_pair_of_roles_saves_what_torch_saves(tmp_path, planner, writer, how, group):
    if writer not in NATIVE_WRITERS and how == "process":
        how = "thread"  # torch's daemon needs a process group
    options, file = collectives(group)
    if writer == "without_kwargs" and group == "independent":
        options, file = {}, ".metadata"  # such a writer never hears of it
    sd = state()
    theirs_planner, ours_planner = PLANNERS[planner](), PLANNERS[planner]()
    theirs, theirs_writer = run(
        torch_dcp, "sync", sd, tmp_path / "t", theirs_planner, writer, **options
    )
    for cache in CACHES:
        getattr(SavePlanner, cache).clear()
    kept = pickle.loads(pickle.dumps(sd))
    ours, ours_writer = run(dcp, how, sd, tmp_path / "o", ours_planner, writer, **options)
    report = dcp.last_report()

    assert description(ours) == description(theirs)
    on_disk = pickle.loads((tmp_path / "o" / file).read_bytes())
    assert description(on_disk) == description(theirs)
    want = loaded(torch_dcp, planner, tmp_path / "t", kept)
    for module in (torch_dcp, dcp):
        assert_equal(loaded(module, planner, tmp_path / "o", kept), want)
    if writer in NATIVE_WRITERS:
        assert dcp.verify(tmp_path / "o")

    mine, torchs = calls_of(ours_planner), calls_of(theirs_planner)
    if writer == "threads":
        assert mine.sorted() == torchs.sorted()
    else:
        assert mine.made == torchs.made
    assert [c[0] for c in calls_of(ours_writer).made] == [
        c[0] for c in calls_of(theirs_writer).made
    ]

    native = writer in NATIVE_WRITERS
    assert report["path"] == ("native" if native else "torch")
    assert report["writer"].startswith("native" if native else "torch: ")
    if planner in NATIVE_PLANNERS:
        assert report["planner"].startswith("native" if native else "torch: ")
    else:
        assert report["planner"].startswith("python: ")
        if native and mine.made:
            assert mine.threads == {threading.get_ident()}


def test_hooks_are_through_when_the_call_returns(tmp_path):
    """[planner-hooks]"""
    planner = with_calls(Recording())
    future = dcp.async_save(state(), checkpoint_id=tmp_path, planner=planner)
    called = len(planner.calls.made)
    future.result(60)
    assert called == len(planner.calls.made) > 0
    assert planner.calls.threads == {threading.get_ident()}


def test_every_pair_of_roles_is_tried():
    assert {(p, w) for p, w, *_ in ROWS} == {(p, w) for p in PLANNERS for w in WRITERS}


@pytest.mark.parametrize("hook", DEFAULT_HOOKS)
def test_a_hook_of_an_instance_is_called(tmp_path, hook):
    planner = dcp.DefaultSavePlanner()
    called = []
    stock = getattr(planner, hook)

    if hook == "set_up_planner":

        def patched(state_dict, storage_meta=None, is_coordinator=False):
            called.append(hook)
            return stock(state_dict, storage_meta, is_coordinator)
    else:

        def patched(*args, **kwargs):
            called.append(hook)
            return stock(*args, **kwargs)

    setattr(planner, hook, patched)
    dcp.save(state(), checkpoint_id=tmp_path, planner=planner)
    assert set(called) == {hook}
    assert hook in dcp.last_report()["planner"] and dcp.last_report()["writer"] == "native"


def test_a_hook_of_torchs_class_that_was_replaced_is_called(tmp_path, monkeypatch):
    called = []
    stock = dcp.DefaultSavePlanner.lookup_object
    monkeypatch.setattr(
        dcp.DefaultSavePlanner, "lookup_object", lambda s, i: called.append(i.fqn) or stock(s, i)
    )
    dcp.save({"w": value("w", (3,))}, checkpoint_id=tmp_path)
    dcp.save({"w": value("w", (3,))}, checkpoint_id=tmp_path, planner=dcp.DefaultSavePlanner())
    assert called == ["w"]


def failing(hook, error):
    planner = with_calls(Recording())

    def fail(*args, **kwargs):
        raise error

    if hook == "set_up_planner":
        planner.set_up_planner = lambda state_dict, storage_meta=None, is_coordinator=False: fail()
    else:
        setattr(planner, hook, fail)
    return planner


@pytest.mark.parametrize("how", ["sync", "thread", "process"])
@pytest.mark.parametrize("hook", DEFAULT_HOOKS)
def test_a_hook_that_fails_fails_the_save_as_in_torch(tmp_path, hook, how):
    dcp.save(state(), checkpoint_id=tmp_path / "o")
    seen = []
    for module, place in ((torch_dcp, "t"), (dcp, "o")):
        with pytest.raises(dcp.CheckpointException) as caught:
            run(
                module, "sync" if module is torch_dcp else how, state(), tmp_path / place,
                failing(hook, ValueError(f"no {hook}")), "stock",
            )  # fmt: skip
        (error, stack) = caught.value.failures[0]
        assert isinstance(error, ValueError) and str(error) == f"no {hook}"
        assert any(frame.name == "fail" for frame in stack)
        seen.append((caught.value.args[0], set(caught.value.failures)))
    assert seen[0] == seen[1]
    assert_equal(load(dcp, tmp_path / "o", state()), state())
    assert not list((tmp_path / "o").glob(".dcp_native-claim*"))
    assert len(list((tmp_path / "o").glob("*.distcp"))) == 1


def test_an_interrupt_in_a_hook_is_raised_as_it_is(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        dcp.save(
            state(), checkpoint_id=tmp_path, planner=failing("resolve_data", KeyboardInterrupt())
        )
    assert not list(tmp_path.iterdir())
    dcp.save(state(), checkpoint_id=tmp_path)
    assert_equal(load(dcp, tmp_path, state()), state())


def test_the_coordinator_gets_the_planners_own_metadata(tmp_path):
    planner = Extra()
    metadata = dcp.save(state(), checkpoint_id=tmp_path, planner=planner)
    assert metadata is planner.metadata and metadata.extra == {"ranks": 1}
    assert metadata.storage_meta.checkpoint_id == tmp_path
    with torch_dcp.FileSystemReader(tmp_path).fs.create_stream(tmp_path / ".metadata", "rb") as f:
        assert pickle.load(f).extra == {"ranks": 1}


def test_a_metadata_that_can_not_be_pickled_fails_the_save(tmp_path):
    class Unpicklable(dcp.DefaultSavePlanner):
        def create_global_plan(self, all_plans):
            plans, metadata = super().create_global_plan(all_plans)
            metadata.extra = lambda: None
            return plans, metadata

    with pytest.raises(dcp.CheckpointException, match="lambda"):
        dcp.save(state(), checkpoint_id=tmp_path, planner=Unpicklable())
    assert not list(tmp_path.iterdir())


def test_plans_of_one_process_need_not_be_picklable(tmp_path):
    class WithLock(dcp.DefaultSavePlanner):
        def create_local_plan(self):
            return SavePlan(super().create_local_plan().items, planner_data={"w": threading.Lock()})

        def create_global_plan(self, all_plans):
            return all_plans, super().create_global_plan(
                [SavePlan(all_plans[0].items, planner_data={})]
            )[1]

    dcp.save({"w": value("w", (3,))}, checkpoint_id=tmp_path, planner=WithLock())
    assert_equal(load(dcp, tmp_path, {"w": value("w", (3,))}), {"w": value("w", (3,))})


@pytest.mark.parametrize("module", [torch_dcp, dcp])
def test_plan_caches_are_filled_as_torchs_planner_fills_them(tmp_path, module):
    planner = with_calls(Recording(enable_plan_caching=True))
    key = planner._cached_plans_key
    for _ in range(2):
        module.save(state(), checkpoint_id=tmp_path, planner=planner)
    for name in ("_cached_save_plan", "_cached_final_save_plan"):
        assert len(getattr(SavePlanner, name)[key].items) == 11
    assert SavePlanner._cached_metadata[key].state_dict_metadata.keys() >= {"w", "opt.step"}
    assert [c[0] for c in planner.calls.made].count("_create_global_plan") == 1
    assert_equal(load(dcp, tmp_path, state()), state())


CASTS = {
    "half": (torch.float32, torch.float16),
    "wider": (torch.float32, torch.float64),
    "same width": (torch.bfloat16, torch.float16),
    "sign": (torch.int8, torch.uint8),
    "bool": (torch.bool, torch.uint8),
}


@pytest.mark.parametrize("count", [12, 70_000, 1_500_000])
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_what_a_planner_casts_loads_as_torch_would_load_it(tmp_path, cast, count):
    declared, saved = cast

    class To(dcp.DefaultSavePlanner):
        def transform_object(self, write_item, object):
            return super().transform_object(write_item, object).to(saved)

    sd = {"w": value("w", (count,), declared)}
    for module, place in ((torch_dcp, "t"), (dcp, "o")):
        module.save(sd, checkpoint_id=tmp_path / place, planner=To())
    assert dcp.verify(tmp_path / "o")
    want = load(torch_dcp, tmp_path / "t", sd)
    for module in (torch_dcp, dcp):
        for place in "to":
            assert_equal(load(module, tmp_path / place, sd), want)


def test_a_native_save_between_python_ones_goes_by_its_own_plan(tmp_path):
    sd = state()
    for i, planner in enumerate((None, Casting(), None, NoDedup(), None)):
        sd["opt"]["step"] = i
        dcp.save(sd, checkpoint_id=tmp_path, planner=planner)
        assert dcp.last_report()["planned_outside"] == (planner is not None)
        assert load(dcp, tmp_path, sd)["opt"]["step"] == i
    assert len(list(tmp_path.glob("*.distcp"))) == 1


def test_a_base_is_not_used_where_python_plans_and_a_warning_says_so(tmp_path, caplog):
    dcp.save(state(), checkpoint_id=tmp_path / "a")
    with caplog.at_level(logging.WARNING, logger="dcp_native"):
        dcp.save(state(), checkpoint_id=tmp_path / "b", base=tmp_path / "a", planner=Casting())
    assert "is not used" in caplog.text and "Casting" in caplog.text
    assert not dcp.last_report()["incremental"]


def test_why_a_role_is_not_native_is_in_the_log_and_in_the_report(tmp_path, caplog):
    with caplog.at_level(logging.DEBUG, logger="dcp_native"):
        dcp.save(state(), checkpoint_id=tmp_path, planner=Casting())
        assert "Casting" in caplog.text and "native path" in caplog.text
        assert "Casting" in dcp.last_report()["planner"]
        caplog.clear()
        writer = recording_writer(tmp_path)
        dcp.save(state(), storage_writer=writer, planner=Casting())
    assert "torch's path" in caplog.text and "RecordingFileSystemWriter" in caplog.text
    report = dcp.last_report()
    assert "RecordingFileSystemWriter" in report["writer"] and "Casting" in report["planner"]


def test_metadata_that_only_python_reads_has_no_index_and_loads_all_the_same(tmp_path):
    dcp.save(state(), checkpoint_id=tmp_path / "plain", planner=Casting())
    dcp.save(state(), checkpoint_id=tmp_path / "extra", planner=Extra())
    for name in ("plain", "extra"):
        assert_equal(load(dcp, tmp_path / name, state())["opt"], state()["opt"])
        assert dcp.last_report()["path"] == "native"
    assert dcp.last_report()["foreign"] is not None
    assert dcp.find_latest(tmp_path).name in ("plain", "extra")


def test_the_writer_of_fsspec_never_writes_natively(tmp_path):
    fsspec = pytest.importorskip("fsspec")
    from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter

    for url in ("memory://save-roles", f"file://{tmp_path}/local"):
        for planner in (None, Casting()):
            dcp.save(state(), storage_writer=FsspecWriter(url), planner=planner)
            assert dcp.last_report()["path"] == "torch"
            assert "FsspecWriter" in dcp.last_report()["writer"]
            target = like(state())
            dcp.load(target, storage_reader=FsspecReader(url))
            assert target["opt"]["step"] == 7
    fsspec.filesystem("memory").rm("/save-roles", recursive=True)


def test_safetensors_are_written_by_torch(tmp_path):
    writer = dcp.FileSystemWriter(tmp_path, serialization_format=SerializationFormat.SAFETENSORS)
    with contextlib.suppress(ImportError, dcp.CheckpointException):
        dcp.save({"w": value("w", (3,))}, storage_writer=writer)
    assert dcp.last_report()["path"] == "torch"
    assert "SAFETENSORS" in dcp.last_report()["writer"]


# ---- objects that describe themselves, and tensors that are no plain memory ----


class Halves(torch.Tensor):
    """Saves itself as two shards."""

    def __create_write_items__(self, fqn, object):
        from torch.distributed.checkpoint.metadata import (
            ChunkStorageMetadata,
            MetadataIndex,
            TensorProperties,
        )
        from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

        rows = self.shape[0] // 2
        return [
            WriteItem(
                index=MetadataIndex(fqn, torch.Size((at, 0))),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(
                    chunk=ChunkStorageMetadata(torch.Size((at, 0)), torch.Size((rows, 4))),
                    properties=TensorProperties(dtype=self.dtype),
                    size=self.size(),
                ),
            )
            for at in (0, rows)
        ]

    def __create_chunk_list__(self):
        return [i.tensor_data.chunk for i in self.__create_write_items__("", self)]

    def __get_tensor_shard__(self, index):
        rows = self.shape[0] // 2
        return self.as_subclass(torch.Tensor)[index.offset[0] : index.offset[0] + rows]


@pytest.mark.parametrize("planner", [None, Casting()], ids=["native", "python"])
def test_an_object_that_makes_its_own_items_is_asked(tmp_path, planner):
    sd = {"h": value("h", (8, 4)).as_subclass(Halves)}
    seen = []
    for module, place in ((torch_dcp, "t"), (dcp, "o")):
        metadata = module.save(sd, checkpoint_id=tmp_path / place, planner=planner)
        seen.append(metadata.state_dict_metadata)
    assert seen[0] == seen[1] and len(seen[0]["h"].chunks) == 2
    for module in (torch_dcp, dcp):
        target = {"h": torch.zeros(8, 4)}
        module.load(target, checkpoint_id=tmp_path / "o")
        assert_equal(target, {"h": value("h", (8, 4))})


def odd_tensors():
    quantized = torch.quantize_per_tensor(value("q", (6, 4)), 0.5, 3, torch.qint8)
    channels = torch.quantize_per_channel(
        value("c", (3, 4)), torch.tensor([0.5, 1.0, 2.0]), torch.tensor([0, 1, 2]), 0, torch.qint8
    )
    nested = torch.nested.nested_tensor([value("a", (2,)), value("b", (3,))])
    jagged = torch.nested.nested_tensor([value("a", (2,)), value("b", (3,))], layout=torch.jagged)
    return {
        "quantized": quantized, "channels": channels, "nested": nested, "jagged": jagged,
        "sparse": torch.eye(4).to_sparse(), "csr": torch.eye(4).to_sparse_csr(),
        "conj": torch.tensor([1 + 2j, 3 - 1j]).conj(), "neg": torch.tensor([1 + 2j]).conj().imag,
        "wrapper": Int8Wrapper(value("i", (6, 4), torch.int8), 0.5),
    }  # fmt: skip


class Int8Wrapper(torch.Tensor):
    """A weight as torchao has them: outside float, inside int8 and a scale."""

    @staticmethod
    def __new__(cls, data, scale):
        return torch.Tensor._make_wrapper_subclass(cls, data.shape, dtype=torch.float32)

    def __init__(self, data, scale):
        self.data_, self.scale = data, scale

    def __tensor_flatten__(self):
        return ["data_"], self.scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(func(args[0].data_), args[0].scale)
        if func is torch.ops.aten._to_copy.default:
            return cls(args[0].data_, args[0].scale)
        raise NotImplementedError(f"{func} of an Int8Wrapper")


def values_of(tensor):
    if isinstance(tensor, Int8Wrapper):
        return tensor.data_.tolist(), tensor.scale
    if tensor.is_quantized:
        tensor = tensor.dequantize()
    elif tensor.is_nested:
        return [t.tolist() for t in tensor.unbind()]
    return tensor.resolve_conj().resolve_neg().to_dense().tolist()


def try_save(module, sd, path, planner):
    """The records as torch.load reads them, or the class of what refused."""
    try:
        metadata = module.save(sd, checkpoint_id=path, planner=planner)
    except dcp.CheckpointException as error:
        return type(error.failures[0][0])
    (info,) = metadata.storage_data.values()
    data = (path / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
    return values_of(torch.load(io.BytesIO(data), weights_only=False))


@pytest.mark.parametrize("kind", ["native", "python"])
@pytest.mark.parametrize("name", odd_tensors())
def test_a_tensor_that_is_no_plain_memory_is_saved_by_torch_or_refused(tmp_path, name, kind):
    """Never the bytes that happen to lie behind it."""
    planner = None if kind == "native" else Recording()
    if planner is not None:
        planner.calls = Calls()
    sd = {"t": odd_tensors()[name]}
    theirs = try_save(torch_dcp, sd, tmp_path / "t", planner)
    ours = try_save(dcp, sd, tmp_path / "o", planner)
    if isinstance(ours, type):
        # What torch refuses, or a layout that the metadata of ours can not describe.
        assert isinstance(theirs, type) or (
            kind == "native" and issubclass(ours, NotImplementedError | TypeError)
        )
    else:
        assert ours == values_of(sd["t"])
        assert ours == theirs or isinstance(theirs, type)


@pytest.mark.parametrize("planner", [None, Recording], ids=["native", "python"])
def test_a_checkpointable_tensor_makes_one_item_per_entry(tmp_path, planner):
    """Of torch 2.14."""
    pytest.importorskip("torch.distributed.checkpoint.protocol")
    tensor = value("t", (8, 4))
    tensor.global_shape = (8, 4)
    tensor.global_offsets = ((4, 0), (0, 0))
    tensor.local_offsets = ((0, 0), (4, 0))
    tensor.local_sizes = ((4, 4), (4, 4))
    seen = []
    for module, place in ((torch_dcp, "t"), (dcp, "o")):
        role = None if planner is None else with_calls(planner())
        metadata = module.save({"t": tensor}, checkpoint_id=tmp_path / place, planner=role)
        target = {"t": torch.zeros(8, 4)}
        torch_dcp.load(target, checkpoint_id=tmp_path / place)
        assert torch.equal(target["t"], tensor.roll(4, 0))
        seen.append(metadata.state_dict_metadata)
    assert seen[0] == seen[1] and len(seen[0]["t"].chunks) == 2


def bare_target():
    return {"bare/a": None, "bare/b": None}


@pytest.mark.parametrize("how", ["sync", "thread", "process"])
def test_a_bare_planner_gets_its_bytes_back(tmp_path, how):
    run(dcp, how, {"a": [1, 2], "b": None}, tmp_path, Bare(), "stock")
    for module in (torch_dcp, dcp):
        target = bare_target()
        module.load(target, checkpoint_id=tmp_path, planner=RawObjects(flatten_state_dict=False))
        assert pickle.loads(target["bare/a"]) == [1, 2] and target["bare/b"] == b""


def test_bytes_of_a_planners_own_are_verified(tmp_path):
    path = tmp_path / "step"
    sd = {"a": list(range(300)), "b": None, "w": value("w", (6, 4))}
    metadata = dcp.save(sd, checkpoint_id=path, planner=Bare())
    result = dcp.verify(path)
    assert result and result.unverified_records == 0
    assert dcp.find_latest(tmp_path, verify="full") == path
    (info,) = [i for m, i in metadata.storage_data.items() if m.fqn == "bare/a"]
    file = path / info.relative_path
    data = bytearray(file.read_bytes())
    data[info.offset + info.length // 2] ^= 1
    file.write_bytes(data)
    assert [p.tensor for p in dcp.verify(path).problems] == ["bare/a"]
    planner = RawObjects(flatten_state_dict=False)
    with pytest.raises(dcp.CheckpointException, match="checksum"):
        dcp.load(bare_target(), checkpoint_id=path, planner=planner)
    target = bare_target()
    dcp.load(target, checkpoint_id=path, planner=planner, verify=False)
    assert len(target["bare/a"]) == info.length


@pytest.mark.parametrize("count", [12, 70_000, 1_500_000])
@pytest.mark.parametrize("target", [torch.float32, torch.bool])
@pytest.mark.parametrize("planner", [None, RawObjects])
def test_a_record_as_long_as_the_declared_one_is_told_from_it(tmp_path, planner, target, count):
    """Those of uint8, int8 and bool are."""
    saved = (torch.arange(count) % 251).to(torch.uint8)

    class Other(dcp.DefaultSavePlanner):
        def transform_object(self, write_item, object):
            return saved

    for declared in (torch.int8, torch.bool):
        path = tmp_path / str(declared)
        dcp.save({"w": torch.zeros(count, dtype=declared)}, checkpoint_id=path, planner=Other())
        assert dcp.verify(path)
        for module in (torch_dcp, dcp):
            sd = {"w": torch.zeros(count, dtype=target)}
            module.load(sd, checkpoint_id=path, planner=None if planner is None else planner())
            assert torch.equal(sd["w"], saved.to(target))


class Weight(torch.nn.Parameter):
    """A parameter of a library's own."""


class BufferOfParameters(dcp.DefaultSavePlanner):
    """Gives all its tensors in one buffer, as parameters."""

    def set_up_planner(self, *args, **kwargs):
        super().set_up_planner(*args, **kwargs)
        self.buffer = torch.empty(64)

    def resolve_data(self, write_item):
        data = super().resolve_data(write_item)
        scratch = self.buffer[: data.numel()].view(data.shape).copy_(data)
        return Weight(scratch, requires_grad=False)


class BufferInTheState(dcp.DefaultSavePlanner):
    """Its buffer is a leaf of the state dict, and saved before it is used."""

    def resolve_data(self, write_item):
        data = super().resolve_data(write_item)
        if write_item.index.fqn.startswith("nested"):
            return self.state_dict["aa_buffer"][: data.numel()].view(data.shape).copy_(data)
        return data


@pytest.mark.parametrize("planner", [BufferOfParameters, BufferInTheState])
def test_a_buffer_that_is_used_again_is_copied_whatever_it_is(tmp_path, planner):
    sd = {"aa_buffer": torch.zeros(64), "nested": {"a": value("a", (5, 4)), "b": value("b", (7,))}}
    dcp.save(sd, checkpoint_id=tmp_path, planner=planner())
    target = {"nested": like(sd["nested"])}
    dcp.load(target, checkpoint_id=tmp_path)
    assert_equal(target["nested"], sd["nested"])


def test_memory_of_the_leaf_itself_is_not_copied():
    from dcp_native._python_planner import _private, _storages

    sd = {"m": {"w": (w := torch.ones(4)), "l": [torch.ones(3)]}, "p": torch.nn.Parameter(w[:2])}
    own = _storages(sd, None)
    assert set(own) == {"m.w", "m.l.0", "p"}
    for name, tensor in {"m.w": w, "m.l.0": sd["m"]["l"][0], "p": sd["p"]}.items():
        assert _private(tensor, own[name]).data_ptr() == tensor.data_ptr()
    assert _private(w, own["m.l.0"]).data_ptr() != w.data_ptr()
