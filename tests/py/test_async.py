"""async_save of one process: what is staged is ours, and what becomes of it is on the future."""

from __future__ import annotations

import gc
import os
import resource
import signal
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint.staging import AsyncStager, DefaultStager, StagingOptions

import dcp_native as dcp
from dcp_native import _save, _uploads

THREAD, PROCESS = dcp.AsyncCheckpointerType.THREAD, dcp.AsyncCheckpointerType.PROCESS
MODES = pytest.mark.parametrize("mode", [THREAD, PROCESS], ids=["thread", "process"])
DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128,
    torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool, torch.uint16,
    torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


@pytest.fixture(autouse=True)
def settings():
    before = dcp.config()
    yield
    dcp.configure(**vars(before))
    assert _uploads.wait_until_ended(30)


def raw(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Random bytes of a dtype (bool: 0 and 1)."""
    count = torch.Size(shape).numel()
    if dtype == torch.bool:
        return torch.randint(0, 2, shape).bool()
    size = torch.empty((), dtype=dtype).element_size()
    return torch.randint(1, 100, (count * size,), dtype=torch.uint8).view(dtype).reshape(shape)


def layouts(dtype: torch.dtype) -> dict[str, torch.Tensor]:
    base = raw(dtype, 40, 30)
    large = raw(dtype, 700, 900)  # several blocks and pieces
    named = {
        "plain": raw(dtype, 17, 5), "scalar": raw(dtype, 1).reshape(()), "empty": raw(dtype, 0, 3),
        "transposed": base.t(), "rows": base[3:9], "columns": base[:, 4:11],
        "steps": base[::3, ::2], "alias": base, "flat": base.view(-1)[5:77],
        "large": large, "large_transposed": large.t(), "large_steps": large[:, ::3],
        "one": raw(dtype, 1, 1, 1), "permuted": raw(dtype, 3, 4, 5).permute(2, 0, 1),
        "expanded": base[:1].expand(6, 30),
    }  # fmt: skip
    if dtype.is_complex:
        named["conj"] = base.conj()
        named["neg"] = base.conj().imag
    return named


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format).resolve_conj().resolve_neg()


def same(got: torch.Tensor, want: torch.Tensor) -> bool:
    got, want = got.contiguous(), want.contiguous()
    return got.shape == want.shape and torch.equal(
        got.view(-1).view(torch.uint8), want.view(-1).view(torch.uint8)
    )


def overwrite(state: dict[str, torch.Tensor]) -> None:
    for tensor in state.values():
        if tensor.untyped_storage().nbytes():
            torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).fill_(0xA5)


@MODES
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
def test_the_caller_may_overwrite_everything_when_the_call_is_back(tmp_path, mode, dtype):
    state = layouts(dtype)
    want = {name: whole(tensor) for name, tensor in state.items()}
    future = dcp.async_save(state, checkpoint_id=tmp_path, async_checkpointer_type=mode)
    overwrite(state)
    future.result(timeout=60)
    for module in (dcp, torch_dcp):
        target = {name: torch.zeros_like(tensor) for name, tensor in want.items()}
        module.load(target, checkpoint_id=tmp_path)
        for name in want:
            assert same(target[name], want[name]), (module.__name__, name)


@MODES
def test_objects_are_those_of_the_call(tmp_path, mode):
    """[async-process]"""
    numbers = [1, 2]
    state = {"o": {"list": numbers, "text": "a"}, "p": torch.nn.Parameter(torch.ones(3))}
    future = dcp.async_save(state, checkpoint_id=tmp_path, async_checkpointer_type=mode)
    numbers.append(3)
    state["o"]["text"] = "b"
    with torch.no_grad():
        state["p"].zero_()
    metadata = future.result(timeout=60)
    assert isinstance(metadata, torch_dcp.Metadata)
    target = {"o": {"list": None, "text": None}, "p": torch.zeros(3)}
    torch_dcp.load(target, checkpoint_id=tmp_path)
    assert target["o"] == {"list": [1, 2], "text": "a"} and target["p"].sum() == 3


@MODES
def test_the_future_tells_what_happened(tmp_path, mode):
    """[async-future]"""
    state = {"w": torch.randn(1 << 20), "step": 3}
    future = dcp.async_save(state, checkpoint_id=tmp_path, async_checkpointer_type=mode)
    assert isinstance(future, Future)
    assert future.report["staging"] == "arena" and future.report["staged_bytes"] > 4 << 20
    future.result(timeout=60)
    done, total = future.progress()
    assert done == total >= 4 << 20
    report = future.report
    assert report["outcome"] == "committed" and report["kind"] == "async_save"
    assert report["stage_ns"] > 0 and report["settle_ns"] > 0 and report["write_ns"] > 0
    assert dcp.last_report()["save_id"] == report["save_id"]
    assert not future.cancel()
    dcp.configure(native=True)


class Interrupt(KeyboardInterrupt):
    """As Ctrl-C, at a moment of our choice."""


@pytest.mark.parametrize("error", [MemoryError("no room"), Interrupt()], ids=repr)
def test_a_save_that_could_not_be_begun_resolves_what_others_wait_for(tmp_path, monkeypatch, error):
    """With tensors on a device, whose staging would have gone on in the background."""
    stager = DefaultStager(StagingOptions(False, False, True, False))
    heard = []

    def upload(self, *unused, **unused_too):
        heard.append(self)
        raise error

    monkeypatch.setattr(_save.NativeSave, "is_staging", lambda self: True)
    monkeypatch.setattr(_save.NativeSave, "upload", upload)
    if isinstance(error, Interrupt):
        with pytest.raises(Interrupt):
            dcp.async_save({"w": torch.ones(9)}, checkpoint_id=tmp_path, async_stager=stager)
    else:
        response = dcp.async_save({"w": torch.ones(9)}, checkpoint_id=tmp_path, async_stager=stager)
        with pytest.raises(dcp.CheckpointException, match="no room"):
            response.upload_completion.result(timeout=0)
        assert response.staging_completion.exception(timeout=0) is error
    with pytest.raises(type(error)):
        stager.synchronize_staging()
    assert len(heard) == 1 and _uploads.in_flight() == []
    monkeypatch.undo()
    future = dcp.async_save({"w": torch.ones(9)}, checkpoint_id=tmp_path)
    assert future.result(timeout=60)


def test_an_interrupt_that_comes_with_the_start_leaves_a_save_that_ends(tmp_path, monkeypatch):
    upload = _save.NativeSave.upload
    begun = []

    def interrupted(self, *args, **kwargs):
        upload(self, *args, **kwargs)
        begun.extend(_uploads._uploads)
        raise Interrupt

    monkeypatch.setattr(_save.NativeSave, "upload", interrupted)
    with pytest.raises(Interrupt):
        dcp.async_save({"w": torch.ones(9)}, checkpoint_id=tmp_path)
    assert begun[0].future.result(timeout=60)
    assert dcp.verify(tmp_path)


@MODES
def test_a_cancelled_save_leaves_the_checkpoint_before(tmp_path, mode):
    """[async-future]"""
    old = {"w": torch.ones(1 << 21)}
    dcp.save(old, checkpoint_id=tmp_path)
    dcp.configure(write_limit_bytes_s=8 << 20)
    future = dcp.async_save(
        {"w": torch.zeros(1 << 24)}, checkpoint_id=tmp_path, async_checkpointer_type=mode
    )
    assert future.cancel()
    with pytest.raises(dcp.CheckpointException, match="cancelled"):
        future.result(timeout=60)
    assert not future.cancelled()
    target = {"w": torch.zeros(1 << 21)}
    dcp.load(target, checkpoint_id=tmp_path)
    assert torch.equal(target["w"], old["w"])
    assert not [name for name in os.listdir(tmp_path) if "claim" in name]


def test_without_memory_the_call_writes_before_it_returns(tmp_path, caplog):
    dcp.trim()  # what is there already is used
    dcp.configure(arena_cap_bytes=1 << 20)
    state = {"w": torch.randn(1 << 20)}
    want = state["w"].clone()
    future = dcp.async_save(state, checkpoint_id=tmp_path)
    assert future.report["staging"] == "streamed"
    state["w"].zero_()
    future.result(timeout=60)
    target = {"w": torch.zeros(1 << 20)}
    dcp.load(target, checkpoint_id=tmp_path)
    assert torch.equal(target["w"], want)


@MODES
def test_warm_up_makes_no_file_and_leaves_memory_for_the_first_save(tmp_path, monkeypatch, mode):
    monkeypatch.chdir(tmp_path)
    state = {"w": torch.randn(1 << 20)}
    dcp.trim()
    dcp.warm_up(state, async_checkpointer_type=mode)
    assert os.listdir(tmp_path) == []
    kept = dcp._native.live_bytes()
    future = dcp.async_save(state, checkpoint_id=tmp_path / "c", async_checkpointer_type=mode)
    assert future.report["arena_bytes"] >= 4 << 20
    future.result(timeout=60)
    assert _uploads.wait_until_ended(30)
    assert dcp._native.live_bytes() - kept < 36 << 20  # the arena was there: the ring is new


def mapped_bytes(pid: int) -> int:
    """Shared memory in the page tables of a process."""
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.partition("RssShmem:")[2].split()[0]) << 10


def test_warm_up_has_the_writer_process_map_the_memory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dcp.configure(arenas=2)
    state = {"w": torch.randn(1 << 20)}
    dcp.trim()
    dcp.warm_up(state, async_checkpointer_type=PROCESS)
    pid = _uploads._processes[-1].pid
    mapped = mapped_bytes(pid)
    assert mapped >= 2 * 4 << 20
    dcp.async_save(state, checkpoint_id=tmp_path / "c", async_checkpointer_type=PROCESS).result(60)
    assert mapped_bytes(pid) == mapped


def test_warm_up_without_its_writer_process_warns_and_the_next_save_works(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.chdir(tmp_path)
    borrow = _uploads.Upload.borrow_process

    def borrow_and_kill(upload: _uploads.Upload) -> None:
        borrow(upload)
        os.kill(upload.process.pid, signal.SIGKILL)

    state = {"w": torch.randn(1 << 10)}
    with monkeypatch.context() as patch, caplog.at_level("WARNING", "dcp_native"):
        patch.setattr(_uploads.Upload, "borrow_process", borrow_and_kill)
        dcp.warm_up(state, async_checkpointer_type=PROCESS)
    assert "killed by signal 9" in caplog.text
    dcp.async_save(state, checkpoint_id=tmp_path / "c", async_checkpointer_type=PROCESS).result(60)


class Own(AsyncStager):
    """Copies, says what was called, and gives what it is told to give."""

    def __init__(self, as_future: bool) -> None:
        self.calls: list[str] = []
        self.as_future = as_future

    def stage(self, state_dict):
        self.calls.append("stage")
        copy = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state_dict.items()}
        if not self.as_future:
            return copy
        future: Future = Future()
        threading.Timer(0.05, future.set_result, (copy,)).start()
        return future

    def synchronize_staging(self):
        self.calls.append("synchronize")

    def close(self):
        self.calls.append("close")


@MODES
@pytest.mark.parametrize("as_future", [False, True])
def test_a_stager_of_the_users_own_is_asked(tmp_path, mode, as_future):
    """[async-stager-future]"""
    stager = Own(as_future)
    state = {"w": torch.randn(1 << 16)}
    want = state["w"].clone()
    got = dcp.async_save(
        state, checkpoint_id=tmp_path, async_checkpointer_type=mode, async_stager=stager
    )
    state["w"].zero_()
    if as_future:
        assert isinstance(got, dcp.AsyncSaveResponse) and got.staging_completion.done()
        got = got.upload_completion
    assert got.report["staging"] == "borrowed"
    got.result(timeout=60)
    assert stager.calls == (["stage"] if as_future else ["stage", "synchronize"])
    target = {"w": torch.zeros(1 << 16)}
    torch_dcp.load(target, checkpoint_id=tmp_path)
    assert torch.equal(target["w"], want)


@MODES
def test_stagers_of_torch_take_the_native_stage(tmp_path, mode):
    plain = DefaultStager(StagingOptions(False, False, False, False))
    ahead = DefaultStager(StagingOptions(False, False, True, False))
    writer = torch_dcp.FileSystemWriter(tmp_path / "w")
    for i, (stager, both) in enumerate(((plain, False), (ahead, True), (writer, False))):
        got = dcp.async_save(
            {"w": torch.full((4,), float(i))},
            checkpoint_id=None if stager is writer else tmp_path / str(i),
            storage_writer=writer if stager is writer else None,
            async_checkpointer_type=mode,
            async_stager=None if stager is writer else stager,
        )
        assert isinstance(got, dcp.AsyncSaveResponse) == both
        upload = got.upload_completion if both else got
        upload.result(timeout=60)
        assert upload.report["staging"] == "arena"


def slow_saves(tmp_path: Path, count: int, **same: object) -> list[Future]:
    dcp.configure(write_limit_bytes_s=16 << 20)
    return [
        dcp.async_save({"w": torch.full((1 << 21,), float(i))}, checkpoint_id=tmp_path / str(i))
        for i in range(count)
    ]


def test_with_two_arenas_two_saves_are_in_flight(tmp_path):
    dcp.configure(arenas=2)
    futures = slow_saves(tmp_path, 3)
    assert futures[0].done() and not futures[2].done()
    for i, future in enumerate(futures):
        future.result(timeout=60)
        target = {"w": torch.zeros(1 << 21)}
        dcp.load(target, checkpoint_id=tmp_path / str(i))
        assert (target["w"] == i).all()


def test_saves_of_one_directory_never_overlap(tmp_path):
    dcp.configure(arenas=2, write_limit_bytes_s=16 << 20)
    first = dcp.async_save({"w": torch.zeros(1 << 21)}, checkpoint_id=tmp_path)
    second = dcp.async_save({"w": torch.ones(1 << 21)}, checkpoint_id=str(tmp_path) + "/.")
    assert first.done()
    first.result(), second.result(timeout=60)


def test_a_writer_that_is_used_again_has_room_for_its_next_directory(tmp_path):
    dcp.configure(arenas=2, write_limit_bytes_s=16 << 20)
    writer = torch_dcp.FileSystemWriter(tmp_path / "0")
    futures = [
        dcp.async_save(
            {"w": torch.full((1 << 21,), float(i))},
            checkpoint_id=tmp_path / str(i),
            storage_writer=writer,
        )
        for i in range(2)
    ]
    assert not futures[0].done()  # nobody waited for it
    for i, future in enumerate(futures):
        future.result(timeout=60)
        target = {"w": torch.zeros(1 << 21)}
        dcp.load(target, checkpoint_id=tmp_path / str(i))
        assert (target["w"] == i).all()


class Reuses(AsyncStager):
    """Stages into the same memory every time, as torch's stagers do."""

    def __init__(self) -> None:
        self.memory = torch.empty(1 << 21)

    def stage(self, state_dict):
        self.memory.copy_(state_dict["w"])
        return {"w": self.memory}


def test_memory_of_a_users_stager_is_not_staged_over_while_it_is_written(tmp_path):
    dcp.configure(arenas=2, write_limit_bytes_s=16 << 20)
    stager = Reuses()
    stager._synchronize_after_execute = False
    futures = [
        dcp.async_save(
            {"w": torch.full((1 << 21,), float(i))},
            checkpoint_id=tmp_path / str(i),
            async_stager=stager,
        )
        for i in range(2)
    ]
    for i, future in enumerate(futures):
        future.result(timeout=60)
        target = {"w": torch.zeros(1 << 21)}
        dcp.load(target, checkpoint_id=tmp_path / str(i))
        assert (target["w"] == i).all()


def test_a_stager_that_fails_fails_the_save_and_not_the_call(tmp_path):
    class Fails(Own):
        def stage(self, state_dict):
            raise ValueError("no copy today")

    future = dcp.async_save({"w": torch.ones(3)}, checkpoint_id=tmp_path, async_stager=Fails(False))
    with pytest.raises(dcp.CheckpointException, match="no copy today") as caught:
        future.result(timeout=60)
    assert caught.value.args[0] == "plan"


def test_a_staging_that_fails_in_a_future_is_on_both_futures(tmp_path):
    class FailsLater(Own):
        def stage(self, state_dict):
            future: Future = Future()
            threading.Timer(0.05, future.set_exception, (ValueError("no copy today"),)).start()
            return future

    response = dcp.async_save(
        {"w": torch.ones(3)}, checkpoint_id=tmp_path, async_stager=FailsLater(True)
    )
    with pytest.raises(ValueError, match="no copy today"):
        response.staging_completion.result(timeout=60)
    with pytest.raises(dcp.CheckpointException, match="no copy today"):
        response.upload_completion.result(timeout=60)


def test_a_callback_may_save_while_another_save_is_in_flight(tmp_path):
    dcp.configure(arenas=2, write_limit_bytes_s=16 << 20)
    later: Future = Future()

    def save_again(_: Future) -> None:
        try:
            later.set_result(dcp.save({"x": torch.ones(3)}, checkpoint_id=tmp_path / "latest"))
        except BaseException as error:
            later.set_exception(error)

    first = dcp.async_save({"w": torch.zeros(1 << 20)}, checkpoint_id=tmp_path / "a")
    second = dcp.async_save({"w": torch.zeros(1 << 22)}, checkpoint_id=tmp_path / "b")
    first.add_done_callback(save_again)
    later.result(timeout=60)
    second.result(timeout=60)
    dcp.load({"x": torch.zeros(3)}, checkpoint_id=tmp_path / "latest")


@pytest.mark.parametrize("policy", ["skip", "fail"])
def test_a_save_too_many_is_left_out_when_that_was_asked_for(tmp_path, policy):
    dcp.configure(async_overlap=policy)
    first, second = slow_saves(tmp_path, 2)
    assert second.done() and not first.done()
    if policy == "skip":
        assert second.result() is None
    else:
        with pytest.raises(dcp.CheckpointException, match="in flight"):
            second.result()
    assert first.result(timeout=60) is not None
    assert not (tmp_path / "1").exists()
    dcp.configure(write_limit_bytes_s=0)
    assert dcp.async_save({"w": torch.ones(1)}, checkpoint_id=tmp_path / "2").result(60) is not None


@MODES
def test_nothing_grows_over_many_saves(tmp_path, mode):
    state = {"w": torch.randn(1 << 18), "step": 1}

    def run(count: int) -> tuple[int, int]:
        for _ in range(count):
            dcp.async_save(
                state, checkpoint_id=tmp_path / "c", async_checkpointer_type=mode
            ).result(timeout=60)
        assert _uploads.wait_until_ended(30)
        gc.collect()
        return dcp._native.live_bytes(), len(os.listdir("/proc/self/fd"))

    run(3)
    before, threads_count = run(1), threading.active_count()
    after = run(60)
    assert after[0] <= before[0] + 4096 and after[1] <= before[1]
    assert threading.active_count() <= threads_count


def test_a_write_error_is_on_the_future_and_the_next_save_works(tmp_path):
    dcp.save({"w": torch.ones(4)}, checkpoint_id=tmp_path)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        future = dcp.async_save({"w": torch.zeros(1 << 20)}, checkpoint_id=tmp_path)
        with pytest.raises(dcp.CheckpointException, match="File too large") as caught:
            future.result(timeout=60)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.args[0] == "write" and future.report["outcome"] == "aborted"
    target = {"w": torch.zeros(4)}
    dcp.load(target, checkpoint_id=tmp_path)
    assert target["w"].sum() == 4
    dcp.async_save({"w": torch.zeros(4)}, checkpoint_id=tmp_path).result(timeout=60)


def test_a_forked_child_saves_for_itself_and_leaves_the_parents_save_alone(tmp_path):
    dcp.configure(write_limit_bytes_s=16 << 20)
    future = dcp.async_save({"w": torch.zeros(1 << 22)}, checkpoint_id=tmp_path / "parent")
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            dcp.configure(write_limit_bytes_s=0)
            dcp.async_save({"w": torch.ones(4)}, checkpoint_id=tmp_path / "child").result(30)
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert not future.done()
    future.result(timeout=60)
    for name, size in (("parent", 1 << 22), ("child", 4)):
        dcp.load({"w": torch.zeros(size)}, checkpoint_id=tmp_path / name)


def test_callbacks_run_once_when_the_save_is_there(tmp_path):
    seen: list[bool] = []
    future = dcp.async_save({"w": torch.ones(4)}, checkpoint_id=tmp_path)
    future.add_done_callback(lambda f: seen.append((tmp_path / ".metadata").exists()))
    future.result(timeout=60)
    end = time.monotonic() + 10
    while not seen and time.monotonic() < end:
        time.sleep(0.01)
    assert seen == [True]
