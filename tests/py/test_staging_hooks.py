"""DefaultStager, BlockingAsyncStager, custom stagers in a save, and _Checkpointer."""

from __future__ import annotations

import inspect
import io
import itertools
import threading
from concurrent.futures import Future

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, _checkpointer
from torch.distributed.checkpoint import _state_dict_stager as torch_state_dict_stager
from torch.distributed.checkpoint import staging as torch_staging
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor, init_device_mesh

import dcp_native
from dcp_native import _checkpointer as ours_checkpointer
from dcp_native import _roles, _state_dict_stager, staging
from dcp_native._staging import choose_stager, completion_of, run_stager
from dcp_native.staging import AsyncStager, BlockingAsyncStager, DefaultStager, StagingOptions

ALL_OFF = StagingOptions(False, False, False, False)


def state() -> dict:
    weight = torch.arange(24.0).reshape(4, 6)
    return {"w": weight, "t": weight.t(), "n": [1, (torch.tensor(2.0), "x")], "step": 3}


def result_of(staged):
    return staged.result(timeout=60) if isinstance(staged, Future) else staged


def check(staged: dict) -> None:
    want = state()
    assert list(staged) == list(want) and staged["step"] == 3
    assert staged["w"].equal(want["w"]) and staged["t"].equal(want["t"])
    assert staged["n"][0] == 1 and staged["n"][1][0].item() == 2.0 and staged["n"][1][1] == "x"


# ---- names ----


@pytest.mark.parametrize(
    "ours, torchs",
    [
        (staging, torch_staging),
        (_state_dict_stager, torch_state_dict_stager),
        (ours_checkpointer, _checkpointer),
    ],
    ids=lambda module: module.__name__,
)
def test_every_name_and_signature_of_torchs_module_is_here(ours, torchs):
    assert set(torchs.__all__ if hasattr(torchs, "__all__") else []) <= set(ours.__all__)
    for name, value in vars(torchs).items():
        if name.startswith("__"):
            continue
        mine = getattr(ours, name)
        if not inspect.isclass(value) or mine is value or value.__module__ != torchs.__name__:
            continue
        assert issubclass(mine, value)
        for method, function in inspect.getmembers(value, inspect.isfunction):
            theirs = inspect.signature(function).parameters.values()
            here = inspect.signature(getattr(mine, method)).parameters.values()
            assert [(p.name, p.kind) for p in here] == [(p.name, p.kind) for p in theirs], method
        for method in ("stage", "close", "save", "load", "async_save"):
            assert not hasattr(value, method) or getattr(mine, method).__doc__, method
    for name in ("AsyncStager", "StagingOptions", "_ReplicationStager"):
        assert getattr(staging, name) is getattr(torch_staging, name)


# ---- DefaultStager ----


@pytest.mark.parametrize("flags", list(itertools.product([False, True], repeat=4)))
def test_default_stager_takes_every_option_on_any_host(flags):
    """[stager-cpu]"""
    stager = DefaultStager(StagingOptions(*flags))
    assert isinstance(stager, torch_staging.DefaultStager) and isinstance(stager, AsyncStager)
    for _ in range(3):
        original = state()
        staged = stager.stage(original)
        assert isinstance(staged, Future) == flags[2]
        staged = result_of(staged)
        original["w"].fill_(-1)
        check(staged)
        assert staged["t"].data_ptr() == staged["w"].data_ptr() != original["w"].data_ptr()
        assert staged["w"].is_shared() == flags[1]
    stager.synchronize_staging()
    stager.close()
    check(staged)
    if flags[3] and not torch.accelerator.is_available():
        with pytest.raises(AssertionError, match="Non-blocking copy"):
            torch_staging.DefaultStager(StagingOptions(*flags))


def test_default_stager_stages_in_order_and_never_over_a_held_dict():
    stager, tensor = DefaultStager(), torch.zeros(1 << 16)
    futures = []
    for step in range(6):
        tensor.fill_(step)
        futures.append(stager.stage({"x": tensor}))
        futures[-1].result(timeout=60)
    assert [float(f.result()["x"][-1]) for f in futures] == [0, 1, 2, 3, 4, 5]
    stager.close()


def test_errors_of_async_staging_are_on_the_future_and_of_synchronize():
    stager = DefaultStager()
    future = stager.stage({"bad": threading.Lock()})
    with pytest.raises(TypeError, match="pickle"):
        future.result(timeout=60)
    with pytest.raises(TypeError, match="pickle"):
        stager.synchronize_staging()
    check(result_of(stager.stage(state())))
    stager.close()


@pytest.mark.parametrize("options", [ALL_OFF, StagingOptions()])
def test_a_closed_stager_says_so(options):
    """[stager-closed]"""
    stager = DefaultStager(options)
    held = result_of(stager.stage(state()))
    stager.close()
    stager.close()
    with pytest.raises(RuntimeError, match="stager is closed"):
        stager.stage(state())
    check(held)
    inner = stager._state_dict_stager
    with pytest.raises(RuntimeError, match="stager is closed"):
        inner.stage(state())


# ---- BlockingAsyncStager ----


@pytest.mark.parametrize("cache", [False, True])
def test_blocking_stager_gives_every_tensor_memory_of_its_own(cache):
    """[stager-cpu]"""
    stager = BlockingAsyncStager(cache_staged_state_dict=cache)
    assert isinstance(stager, torch_staging.BlockingAsyncStager) and isinstance(stager, AsyncStager)
    original = state()
    staged, want = stager.stage(original), torch_staging.BlockingAsyncStager().stage(original)
    original["w"].fill_(-1)
    for mine, theirs in zip((staged["w"], staged["t"]), (want["w"], want["t"]), strict=True):
        assert mine.stride() == theirs.stride() and mine.equal(theirs)
        assert mine.untyped_storage().nbytes() == theirs.untyped_storage().nbytes()
    check(staged)
    assert type(staged["n"]) is list and type(staged["n"][1]) is tuple
    assert len({t.data_ptr() for t in (staged["w"], staged["t"])}) == 2
    if cache and not torch.accelerator.is_available():
        with pytest.raises(RuntimeError):
            torch_staging.BlockingAsyncStager(cache_staged_state_dict=True).stage(original)


def test_blocking_stagers_cache_is_used_again_and_follows_a_changed_state():
    """[stager-memory]"""
    stager = BlockingAsyncStager(cache_staged_state_dict=True)
    tensor = torch.zeros(100)
    assert len({stager.stage({"x": [tensor]})["x"][0].data_ptr() for _ in range(10)}) == 1
    for changed in (torch.ones(1), torch.ones(100, dtype=torch.float64), torch.ones(10, 10)):
        staged = stager.stage({"x": [changed], "new": changed})
        assert staged["x"][0].equal(changed) and staged["x"][0].dtype == changed.dtype
    stager.stage({"other": tensor})
    assert list(stager.state_dict_cache) == [("other",)]
    stager.close()
    assert stager.state_dict_cache is None
    assert stager.stage({"other": tensor})["other"].equal(tensor)


@pytest.mark.parametrize("cache, check_types", [(False, False), (False, True), (True, False)])
def test_blocking_stager_checks_types_when_torch_does(cache, check_types):
    stager = BlockingAsyncStager(cache, check_types)
    odd = {"set": {1, 2}}
    if cache or check_types:
        with pytest.raises(ValueError, match="Unexpected value type"):
            stager.stage(odd)
    else:
        staged = stager.stage(odd)
        assert staged == odd and staged["set"] is not odd["set"]


def test_blocking_stager_copies_all_that_can_change():
    """[stager-alias]"""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        scalar = distribute_tensor(torch.tensor(1.0), mesh, [Replicate()])
        matrix = distribute_tensor(torch.ones(4, 3), mesh, [Replicate()])
        for cache in (False, True):
            sources = {"s": scalar, "m": matrix, "io": io.BytesIO(b"abc")}
            for _ in range(2):
                staged = BlockingAsyncStager(cache).stage(sources)
                for key in ("s", "m"):
                    assert type(staged[key]) is DTensor and staged[key]._spec == sources[key]._spec
                    assert staged[key].to_local().equal(sources[key].to_local())
                    assert staged[key].to_local().data_ptr() != sources[key].to_local().data_ptr()
                assert staged["io"] is not sources["io"] and staged["io"].getvalue() == b"abc"
            theirs = torch_staging.BlockingAsyncStager().stage(sources)
            assert theirs["s"] is scalar and theirs["io"] is sources["io"], "torch has changed"
    finally:
        dist.destroy_process_group()


# ---- which stager, and its hooks ----


class Custom:
    """A stager by its methods alone."""

    _synchronize_after_execute = True

    def __init__(self, synchronize=True, future=False):
        self.calls: list[str] = []
        self.synchronize, self.future = synchronize, future

    @property
    def should_synchronize_after_execute(self):
        self.calls.append("should_synchronize")
        return self.synchronize

    def stage(self, state_dict):
        self.calls.append("stage")
        if not self.future:
            return state_dict
        made = Future()
        made.set_result(state_dict)
        return made

    def synchronize_staging(self):
        self.calls.append("synchronize")

    def close(self):
        self.calls.append("close")


def test_hooks_of_a_custom_stager_run_in_order():
    """[stager-order]"""
    original = state()
    for synchronize, future, calls in (
        (True, False, ["stage", "should_synchronize", "synchronize"]),
        (False, False, ["stage", "should_synchronize"]),
        (True, True, ["stage"]),
    ):
        stager = Custom(synchronize, future)
        assert isinstance(stager, AsyncStager)
        stager.calls.clear()  # looking at it as a protocol touches the property
        staged, staging_future = run_stager(stager, original)
        assert stager.calls == calls  # the caller closes it
        assert (staged is None) == future and (staging_future is not None) == future
        assert (staging_future.result() if future else staged) is original


def end(future: Future, failure: BaseException | None) -> None:
    if failure is None:
        future.set_result({})
    else:
        future.set_exception(failure)


def test_completion_of_a_staging_follows_it_even_if_it_failed_at_once():
    """[stager-order]"""
    for failure in (None, ValueError("x"), KeyboardInterrupt()):
        for at_once in (True, False):
            upstream: Future = Future()
            if at_once:
                end(upstream, failure)
            completion = completion_of(upstream)
            if not at_once:
                assert not completion.done()
                end(upstream, failure)
            assert completion.done() and completion.exception() is failure
            assert failure is not None or completion.result() is None


def test_who_stages_is_chosen_as_in_torch(tmp_path):
    given, writer = Custom(), FileSystemWriter(tmp_path)
    assert choose_stager(given, writer) is given
    assert choose_stager(None, writer) is writer
    for no_stager in (None, object()):  # nobody of the user's: the native stage
        assert _roles.stage_reason(None, no_stager) is None


STOCK = {
    "torch's default": lambda: torch_staging.DefaultStager(ALL_OFF),
    "ours": DefaultStager,
    "ours, all off": lambda: DefaultStager(ALL_OFF),
    "torch's blocking": torch_staging.BlockingAsyncStager,
    "blocking": BlockingAsyncStager,
    "blocking, cached": lambda: BlockingAsyncStager(True),
    "writer": lambda: FileSystemWriter("/nowhere"),
    "writer, cached": lambda: FileSystemWriter("/nowhere", cache_staged_state_dict=True),
}


@pytest.mark.parametrize("kind", STOCK)
def test_stock_stagers_take_the_native_path_until_a_hook_is_patched(kind, monkeypatch):
    stager = STOCK[kind]()
    writer = FileSystemWriter("/elsewhere")
    assert _roles.stage_reason(stager, writer) is None
    if isinstance(stager, FileSystemWriter):
        assert _roles.stage_reason(None, stager) is None
    for hook in ("stage", "synchronize_staging", "close"):
        with monkeypatch.context() as patch:
            patch.setattr(stager, hook, lambda *args: None)
            assert hook in _roles.stage_reason(stager, writer)
        with monkeypatch.context() as patch:
            patch.setattr(type(stager), hook, lambda *args: None)
            assert hook in _roles.stage_reason(stager, writer)
    with monkeypatch.context() as patch:
        patch.setattr(type(stager), "should_synchronize_after_execute", False)
        assert "should_synchronize" in _roles.stage_reason(stager, writer)
    if isinstance(stager, torch_staging.DefaultStager):
        with monkeypatch.context() as patch:
            patch.setattr(stager._state_dict_stager, "_offload_tensor", None)
            assert "_offload_tensor" in _roles.stage_reason(stager, writer)
        stager.close()
        assert "closed" in _roles.stage_reason(stager, writer)
    else:
        stager.type_check = True
        assert "types" in _roles.stage_reason(stager, writer)


def test_other_stagers_do_not():
    class Derived(DefaultStager):
        pass

    for stager in (Custom(), Derived()):
        assert type(stager).__qualname__ in _roles.stage_reason(stager, None)
    assert _roles.stage_reason(None, None) is None
    assert _roles.stage_reason(None, object()) is None


@pytest.mark.parametrize("kind", [*STOCK, "none"])
def test_async_save_with_every_stock_stager(kind, tmp_path):
    stager = STOCK[kind]() if kind != "none" else None
    original = state()
    response = dcp_native.async_save(original, checkpoint_id=tmp_path / "c", async_stager=stager)
    if not isinstance(response, Future):
        response.staging_completion.result(timeout=60)
        response = response.upload_completion
    original["w"].fill_(-1)
    response.result(timeout=60)
    assert dcp_native.last_report()["path"] == "native"
    target = {"w": torch.zeros(4, 6), "t": torch.zeros(6, 4), "step": 0}
    dcp_native.load(target, checkpoint_id=tmp_path / "c")
    assert target["w"].equal(state()["w"]) and target["t"].equal(state()["t"])


# ---- _Checkpointer ----


def test_checkpointer_saves_and_loads(tmp_path):
    """[checkpointer]"""
    made = ours_checkpointer._Checkpointer(
        FileSystemWriter(tmp_path), FileSystemReader(tmp_path), no_dist=True
    )
    assert isinstance(made, _checkpointer._Checkpointer)
    metadata = made.save(state())
    assert set(metadata.state_dict_metadata) >= {"w", "t", "step"}
    for step in (4, 5):
        changed = {**state(), "step": step}
        assert isinstance(made.async_save(changed), Future)
        made.async_save(changed).result(timeout=60)
        target = {"w": torch.zeros(4, 6), "t": torch.zeros(6, 4), "step": 0}
        made.load(target)
        assert target["step"] == step and target["w"].equal(state()["w"])
    theirs = _checkpointer._Checkpointer(FileSystemWriter(tmp_path), FileSystemReader(tmp_path))
    with pytest.raises(TypeError):
        theirs.save(state())
