"""What a trainer may rely on around a save of device tensors: which stream is waited for, who is
told what, and that nothing is held longer than it is read."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import Future

import fake
import pytest
import torch
from device_values import assert_same, blank, everywhere, layouts, on, overwrite, raw
from torch.distributed.checkpoint import DefaultSavePlanner
from torch.distributed.checkpoint.staging import AsyncStager, DefaultStager, StagingOptions

import dcp_native as dcp

THREAD, PROCESS = dcp.AsyncCheckpointerType.THREAD, dcp.AsyncCheckpointerType.PROCESS
WAIT_S = 60


def stager() -> DefaultStager:
    return DefaultStager(StagingOptions(True, True, True, True))


def started(state, path, mode=THREAD, **more):
    return dcp.async_save(
        state,
        checkpoint_id=path,
        async_checkpointer_type=mode,
        async_stager=more.pop("stager", None) or stager(),
        **more,
    )


def assert_loads(path, tensors):
    target = blank("cpu", tensors)
    dcp.load(target, checkpoint_id=path)
    assert_same(target, tensors)


# ---- streams ----


def late_on_a_stream_of_its_own(tensors):
    """Tensors whose values a stream that is current here still has to bring."""
    state = blank("cuda:0", tensors)
    values = {name: tensor.pin_memory() for name, tensor in tensors.items()}
    torch.cuda.synchronize()
    return state, values


def case_a_save_waits_for_what_the_callers_stream_still_does(c):
    """[device-streams]"""
    tensors = {f"t{i}": raw(torch.float32, 300, 100, seed=i) for i in range(4)}
    for how in ("save", "async", "staged"):
        state, values = late_on_a_stream_of_its_own(tensors)
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            with fake.held():
                for name, tensor in state.items():
                    tensor.copy_(values[name], non_blocking=True)
                if how == "staged":
                    response = started(state, c.dir / how)
            if how == "save":
                dcp.save(state, checkpoint_id=c.dir / how)
            elif how == "async":
                dcp.async_save(state, checkpoint_id=c.dir / how).result(timeout=WAIT_S)
            else:
                response.upload_completion.result(timeout=WAIT_S)
        assert_loads(c.dir / how, tensors)


def case_a_load_waits_for_what_the_callers_stream_still_does_to_its_targets(c):
    tensors = {f"t{i}": raw(torch.float32, 300, 100, seed=i) for i in range(4)}
    dcp.save(tensors, checkpoint_id=c.dir / "x")
    for _ in range(5):
        state, _ = late_on_a_stream_of_its_own(tensors)
        old = {name: torch.zeros_like(tensor).pin_memory() for name, tensor in tensors.items()}
        with torch.cuda.stream(torch.cuda.Stream()):
            for name, tensor in state.items():
                for _ in range(20):
                    tensor.copy_(old[name], non_blocking=True)
            dcp.load(state, checkpoint_id=c.dir / "x")
        torch.cuda.synchronize()
        assert_same(state, tensors)


# ---- what is held, and how long ----


def case_tensors_live_until_they_were_copied_and_no_longer(c):
    tensors = {f"t{i}": raw(torch.float32, 100, 100, seed=i) for i in range(4)}
    state = everywhere("cuda:0", tensors)
    torch.cuda.synchronize()
    held = weakref.ref(state["t0"])
    with fake.held():
        response = started(state, c.dir / "x")
        state.clear()
        gc.collect()
        assert held() is not None
    response.staging_completion.result(timeout=WAIT_S)
    assert held() is None
    response.upload_completion.result(timeout=WAIT_S)
    assert_loads(c.dir / "x", tensors)


def case_a_state_of_the_cpu_is_staged_when_the_call_returns(c):
    tensors = layouts(torch.float32)
    response = started(dict(tensors), c.dir / "x")
    assert response.staging_completion.done()
    response.upload_completion.result(timeout=WAIT_S)
    assert_loads(c.dir / "x", tensors)


def case_a_stager_that_does_not_stage_asynchronously_blocks(c):
    tensors = layouts(torch.float32)
    state = everywhere("cuda:0", tensors)
    for i, options in enumerate([(True, True, False, True), (False, False, False, False)]):
        future = started(state, c.dir / str(i), stager=DefaultStager(StagingOptions(*options)))
        assert isinstance(future, Future)
        overwrite(state)
        future.result(timeout=WAIT_S)
        assert_loads(c.dir / str(i), tensors)
        state = everywhere("cuda:0", tensors)


def case_synchronize_staging_waits_for_the_copies(c):
    tensors = layouts(torch.float32)
    state = everywhere("cuda:0", tensors)
    torch.cuda.synchronize()
    ours, done = stager(), threading.Event()
    with fake.held():
        response = started(state, c.dir / "x", stager=ours)
        waiting = threading.Thread(target=lambda: (ours.synchronize_staging(), done.set()))
        waiting.start()
        assert not done.wait(0.2)
    assert done.wait(WAIT_S)
    assert response.staging_completion.done()
    waiting.join()
    response.upload_completion.result(timeout=WAIT_S)


def case_a_save_that_is_still_staging_is_in_flight(c):
    state = everywhere("cuda:0", layouts(torch.float32))
    torch.cuda.synchronize()
    dcp.configure(async_overlap="skip")
    with fake.held():
        first = started(state, c.dir / "first")
        second = started(state, c.dir / "second")
        assert second.upload_completion.result(timeout=WAIT_S) is None
    first.upload_completion.result(timeout=WAIT_S)
    dcp.configure(async_overlap="wait")
    assert not (c.dir / "second" / ".metadata").exists()


def case_two_saves_stage_at_a_time_with_two_arenas(c):
    dcp.configure(arenas=2)
    both = [
        {f"t{i}": raw(torch.float32, 100, 99, seed=10 * n + i) for i in range(3)} for n in (1, 2)
    ]
    states = [everywhere("cuda:0", tensors) for tensors in both]
    torch.cuda.synchronize()
    with fake.held():
        responses = [started(state, c.dir / str(i)) for i, state in enumerate(states)]
        assert not any(response.staging_completion.done() for response in responses)
    for i, response in enumerate(responses):
        response.upload_completion.result(timeout=WAIT_S)
        assert_loads(c.dir / str(i), both[i])
    dcp.configure(arenas=1)


# ---- failures ----


def case_a_device_that_dies_while_it_is_staged_fails_both_futures(c):
    before = layouts(torch.float32, seed=1)
    dcp.save(before, checkpoint_id=c.dir / "x")
    for mode in (THREAD, PROCESS):
        state = everywhere("cuda:1", layouts(torch.float32, seed=2))
        torch.cuda.synchronize(1)
        with fake.dying(1, 0):
            with fake.held():
                response = started(state, c.dir / "x", mode)
            with pytest.raises(RuntimeError, match="illegal memory"):
                response.staging_completion.result(timeout=WAIT_S)
            with pytest.raises(dcp.CheckpointException, match="illegal memory"):
                response.upload_completion.result(timeout=WAIT_S)
        assert_loads(c.dir / "x", before)


def case_a_save_that_is_cancelled_while_it_is_staged_lets_go_of_the_tensors(c):
    """[staging-completion]"""
    before = layouts(torch.float32, seed=1)
    dcp.save(before, checkpoint_id=c.dir / "x")
    state = everywhere("cuda:0", layouts(torch.float32, seed=2))
    torch.cuda.synchronize()
    with fake.held():
        response = started(state, c.dir / "x")
        assert response.upload_completion.cancel()
    assert response.staging_completion.result(timeout=WAIT_S) is None
    with pytest.raises(dcp.CheckpointException, match="cancel"):
        response.upload_completion.result(timeout=WAIT_S)
    assert_loads(c.dir / "x", before)
    started(state, c.dir / "y").upload_completion.result(timeout=WAIT_S)


def case_an_interrupt_while_the_device_is_waited_for_stops_the_save(c):
    before = layouts(torch.float32, seed=1)
    dcp.save(before, checkpoint_id=c.dir / "x")
    tensors = layouts(torch.float32, seed=2)
    state = everywhere("cuda:0", tensors)
    torch.cuda.synchronize()
    for call in (
        lambda: dcp.save(state, checkpoint_id=c.dir / "x"),
        lambda: dcp.async_save(state, checkpoint_id=c.dir / "x"),
    ):
        threads = [
            threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)),
            threading.Timer(1.0, fake._gpu.dcp_fake_hold, (0,)),
        ]
        with fake.held(), pytest.raises((KeyboardInterrupt, dcp.CheckpointException)) as caught:
            for thread in threads:
                thread.start()
            call()
            time.sleep(5)  # the interrupt may come to the collective behind it
        for thread in threads:
            thread.join()
        assert "KeyboardInterrupt" in repr(caught.value) or isinstance(
            caught.value, KeyboardInterrupt
        )
        assert_loads(c.dir / "x", before)
    dcp.save(state, checkpoint_id=c.dir / "x")
    assert_loads(c.dir / "x", tensors)


def case_a_forked_child_leaves_the_copies_to_its_parent(c):
    tensors = layouts(torch.float32)
    state = everywhere("cuda:0", tensors)
    torch.cuda.synchronize()
    with fake.held():
        response = started(state, c.dir / "x")
        child = os.fork()
        if child == 0:
            code = 1
            try:
                del response, state
                gc.collect()
                dcp.save({"a": torch.ones(3)}, checkpoint_id=c.dir / "child", no_dist=True)
                code = 0
            finally:
                os._exit(code)
        assert os.waitpid(child, 0)[1] == 0
    response.upload_completion.result(timeout=WAIT_S)
    assert_loads(c.dir / "x", tensors)


ENDS_LIKE_ANY_PROCESS = """
import atexit, os, sys, fake

NAMES = ("cudaHostRegister", "cudaHostUnregister", "cudaMemcpyAsync", "cudaStreamDestroy",
         "cudaEventDestroy")
before = None

def last():  # registered first, so it runs behind all that the package and torch have registered
    if before is not None and {name: fake.count(name) for name in NAMES} != before:
        os._exit(9)

atexit.register(last)
import torch, dcp_native as dcp
from device_values import blank, assert_same, everywhere, layouts

mode = dcp.AsyncCheckpointerType(sys.argv[2])
tensors = layouts(torch.float32)
state = everywhere("cuda:0", tensors)
dcp.async_save(state, checkpoint_id=sys.argv[1] + "/0", async_checkpointer_type=mode).result(60)
futures = [dcp.async_save(state, checkpoint_id=sys.argv[1] + "/1", async_checkpointer_type=mode)]
child = os.fork()
if child == 0:
    before = {name: fake.count(name) for name in NAMES}
    futures.clear()
    dcp.trim()
    dcp.save({"a": torch.ones(3)}, checkpoint_id=sys.argv[1] + "/child", no_dist=True)
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
futures[0].result(60)
for i in range(2):
    target = blank("cpu", tensors)
    dcp.load(target, checkpoint_id=f"{sys.argv[1]}/{i}")
    assert_same(target, tensors)
dcp.trim()
assert fake.count("cudaHostUnregister") == fake.count("cudaHostRegister") > 0
"""


def case_a_forked_child_ends_like_any_process_and_uses_no_device(c):
    for mode in (THREAD, PROCESS):
        (c.dir / mode.value).mkdir()
        done = subprocess.run(
            [sys.executable, "-c", ENDS_LIKE_ANY_PROCESS, str(c.dir / mode.value), mode.value],
            capture_output=True, text=True, timeout=120,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr


class Numbers(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return torch.full((3,), float(index))


def case_workers_of_data_loaders_run_beside_saves(c):
    tensors = layouts(torch.float32)
    state = everywhere("cuda:0", tensors)
    for i, mode in enumerate((THREAD, PROCESS)):
        started(state, c.dir / f"{i}first", mode).upload_completion.result(timeout=WAIT_S)
        with fake.held():
            response = started(state, c.dir / str(i), mode)
            loader = torch.utils.data.DataLoader(
                Numbers(), batch_size=2, num_workers=2, multiprocessing_context="fork"
            )
            seen = torch.cat(list(loader))
        assert torch.equal(seen, torch.arange(8.0)[:, None].expand(8, 3))
        response.upload_completion.result(timeout=WAIT_S)
        assert_loads(c.dir / str(i), tensors)


# ---- roles of the program's own ----


class Halves(DefaultSavePlanner):
    """Gives every tensor in a buffer of its own that the next one overwrites, or as it is."""

    def __init__(self, buffer):
        super().__init__()
        self.buffer = buffer

    def resolve_data(self, write_item):
        data = super().resolve_data(write_item)
        if isinstance(data, torch.Tensor) and write_item.index.fqn.startswith("buffered"):
            self.buffer.copy_(data)
            return self.buffer
        return data


def case_a_planner_of_the_programs_own_gives_device_tensors(c):
    tensors = {name: raw(torch.float32, 50, 20, seed=i) for i, name in enumerate(
        ("buffered.a", "buffered.b", "own.a", "own.b"))}  # fmt: skip
    tensors["own.t"] = raw(torch.float32, 50, 20, seed=9).t()
    state = everywhere("cuda:0", tensors)
    for how in (dcp.save, dcp.async_save):
        planner = Halves(torch.empty(50, 20, device="cuda:0"))
        result = how(dict(state), checkpoint_id=c.dir / how.__name__, planner=planner)
        if isinstance(result, Future):
            result.result(timeout=WAIT_S)
        report = dcp.last_report()
        assert report["devices"] == ["cuda:0"] and report["device_by_torch_count"] == 0
        assert_loads(c.dir / how.__name__, tensors)


class OnTheDevice(AsyncStager):
    """Its copy stays on the device."""

    should_synchronize_after_execute = False

    def stage(self, state_dict):
        return {name: on("cuda:0", tensor.cpu()) for name, tensor in state_dict.items()}

    def synchronize_staging(self):
        pass

    def close(self):
        pass


def case_what_a_stager_of_the_users_own_leaves_on_the_device_is_written_from_there(c):
    tensors = {f"t{i}": raw(torch.float32, 500, 300, seed=i) for i in range(4)}
    state = everywhere("cuda:0", tensors)
    future = started(state, c.dir / "x", stager=OnTheDevice())
    overwrite(state)
    future.result(timeout=WAIT_S)
    assert future.report["staging"] == "borrowed" and future.report["devices"] == ["cuda:0"]
    assert_loads(c.dir / "x", tensors)


# ---- what is told ----


def case_reports_say_what_crossed_the_bus(c):
    tensors = {f"t{i}": raw(torch.float32, 100, 30, seed=i) for i in range(10)}
    tensors["large"] = raw(torch.float32, 1000, 300, seed=99)
    size_bytes = sum(tensor.nbytes for tensor in tensors.values())
    state = everywhere("cuda:0", tensors)
    response = started(state, c.dir / "x")
    response.upload_completion.result(timeout=WAIT_S)
    report = response.upload_completion.report
    assert report["staging"] == "arena" and report["devices"] == ["cuda:0"]
    assert report["device_copied_bytes"] >= size_bytes and report["device_by_torch_count"] == 0
    assert 0 < report["device_copies_count"] <= 11
    assert 0 < report["stage_begin_ns"] <= report["stage_ns"]
    dcp.load(state, checkpoint_id=c.dir / "x")
    report = dcp.last_report()
    assert report["device_targets_count"] == 11 and report["copies_count"] == 0
    assert report["device_copied_bytes"] >= size_bytes and report["devices"] == ["cuda:0"]
    assert_same(state, tensors)


def case_what_the_core_cannot_copy_is_left_to_torch_and_the_report_says_so(c):
    lazy = torch._neg_view(on("cuda:0", raw(torch.float32, 10)))
    with pytest.raises(dcp.CheckpointException, match="cannot do"):
        dcp.save({"lazy": lazy}, checkpoint_id=c.dir / "x")  # torch's kernel, which the fakes lack


# ---- stagers by hand ----


def case_stagers_by_hand_copy_from_every_device_and_wait_for_it(c):
    first, second = layouts(torch.float32, seed=1), layouts(torch.float32, seed=2)
    for options in (
        (True,) * 4,
        (False,) * 4,
        (True, False, True, False),
        (True, True, False, True),
    ):
        state = {"first": everywhere("cuda:0", first), "second": everywhere("cuda:1", second)}
        ours = dcp.staging.DefaultStager(StagingOptions(*options))
        staged = ours.stage(state)
        staged = staged.result(timeout=WAIT_S) if isinstance(staged, Future) else staged
        overwrite(state["first"])
        overwrite(state["second"])
        assert_same(staged["first"], first)
        assert_same(staged["second"], second)
        ours.close()


def case_a_staged_dict_holds_what_the_callers_stream_brought_last(c):
    tensors = {f"t{i}": raw(torch.float32, 300, 100, seed=i) for i in range(4)}
    for options in ((True,) * 4, (True, False, True, False)):
        state, values = late_on_a_stream_of_its_own(tensors)
        ours = dcp.staging.DefaultStager(StagingOptions(*options))
        with torch.cuda.stream(torch.cuda.Stream()):
            for name, tensor in state.items():
                for _ in range(20):
                    tensor.copy_(values[name], non_blocking=True)
            staged = ours.stage(state)
        assert_same(staged.result(timeout=WAIT_S), tensors)
        ours.close()
