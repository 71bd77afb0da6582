"""When an async_save has copied what is on a device, and what happens around the copies.

`fake.held()` stops all streams, so that what is waited for, and what is not, is shown without a
clock.
"""

from __future__ import annotations

import fake
import torch
from device_values import assert_same, blank, everywhere, layouts, on, overwrite, payload, raw
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

import dcp_native as dcp

THREAD, PROCESS = dcp.AsyncCheckpointerType.THREAD, dcp.AsyncCheckpointerType.PROCESS
ALL = {
    "use_pinned_memory": True,
    "use_shared_memory": True,
    "use_async_staging": True,
    "use_non_blocking_copy": True,
}


def started(state, path, mode=THREAD):
    return dcp.async_save(
        state,
        checkpoint_id=path,
        async_checkpointer_type=mode,
        async_stager=DefaultStager(StagingOptions(**ALL)),
    )


def case_async_staging_returns_before_the_device_has_copied_anything(c):
    for mode in (THREAD, PROCESS):
        tensors = layouts(torch.float32, seed=1)
        state = everywhere("cuda:0", tensors)
        started(state, c.dir / "first", mode).upload_completion.result(timeout=60)
        torch.cuda.synchronize()
        with fake.held():
            response = started(state, c.dir / mode.value, mode)
            assert not response.staging_completion.done()
            assert not response.upload_completion.done()
        response.staging_completion.result(timeout=60)
        overwrite(state)
        response.upload_completion.result(timeout=60)
        target = blank("cpu", tensors)
        dcp.load(target, checkpoint_id=c.dir / mode.value)
        assert_same(target, tensors)


def case_a_full_stream_does_not_hold_up_the_trainer(c):
    row_bytes = 256 << 10  # from here on a copy each
    tensors = {"rows": raw(torch.uint8, 1200, row_bytes)}
    wide = torch.empty(1200, row_bytes + 64, dtype=torch.uint8, device="cuda")
    state = {"rows": wide[:, :row_bytes]}
    for i in range(1200):
        state["rows"][i].copy_(tensors["rows"][i])
    torch.cuda.synchronize()
    with fake.held(), fake.counted("held_up") as counts:
        response = started(state, c.dir / "x")
    assert counts["held_up"] == 0, counts
    response.staging_completion.result(timeout=60)
    response.upload_completion.result(timeout=60)
    dcp.save(tensors, checkpoint_id=c.dir / "cpu")
    assert payload(c.dir / "x") == payload(c.dir / "cpu")


def case_the_caller_may_put_work_that_only_reads_behind_the_copies(c):
    tensors = layouts(torch.float32, seed=2)
    state = everywhere("cuda:0", tensors)
    torch.cuda.synchronize()
    with fake.held():
        response = started(state, c.dir / "x")
        copy = torch.empty(700, 300, device="cuda")
        copy.copy_(state["large"], non_blocking=True)
    response.staging_completion.result(timeout=60)
    response.upload_completion.result(timeout=60)
    assert_same({"large": copy}, {"large": tensors["large"]})


def case_a_second_save_waits_for_no_more_than_it_must(c):
    tensors = layouts(torch.float32, seed=3)
    state = everywhere("cuda:0", tensors)
    for i in range(3):
        response = started(state, c.dir / str(i))
        response.staging_completion.result(timeout=60)
        overwrite(state)
        response.upload_completion.result(timeout=60)
        target = blank("cpu", tensors)
        dcp.load(target, checkpoint_id=c.dir / str(i))
        assert_same(target, tensors)
        tensors = layouts(torch.float32, seed=4 + i)
        for name, tensor in everywhere("cuda:0", tensors).items():
            state[name] = tensor


def case_nothing_waits_for_a_whole_device(c):
    tensors = layouts(torch.float32, seed=5)
    state, target = everywhere("cuda:0", tensors), blank("cuda:0", tensors)
    with fake.counted(*fake.DEVICE_WIDE) as waits:
        dcp.save(state, checkpoint_id=c.dir / "save")
        dcp.async_save(state, checkpoint_id=c.dir / "async").result(timeout=60)
        response = started(state, c.dir / "staged")
        response.upload_completion.result(timeout=60)
        dcp.load(target, checkpoint_id=c.dir / "save")
    assert waits == dict.fromkeys(fake.DEVICE_WIDE, 0)


def case_every_byte_crosses_the_bus_once(c):
    tensors = {f"t{i}": raw(torch.float32, 1000, 100, seed=i) for i in range(8)}
    size_bytes = sum(tensor.nbytes for tensor in tensors.values())
    state = everywhere("cuda:0", tensors)
    with fake.counted("copied_to_host_bytes", "copied_to_device_bytes") as copied:
        dcp.save(state, checkpoint_id=c.dir / "x")
    assert copied["copied_to_host_bytes"] == size_bytes
    with fake.counted("copied_to_host_bytes", "copied_to_device_bytes") as copied:
        dcp.load(state, checkpoint_id=c.dir / "x")
    assert copied == {"copied_to_host_bytes": 0, "copied_to_device_bytes": size_bytes}


def case_many_small_tensors_take_few_copies(c):
    tensors = {f"t{i}": raw(torch.float32, 5, 5, seed=i) for i in range(2000)}
    state = everywhere("cuda:0", tensors)
    with fake.counted("copies_to_host") as copies:
        dcp.save(state, checkpoint_id=c.dir / "x")
    assert copies["copies_to_host"] < 100, copies
    with fake.counted("copies_to_device") as copies:
        dcp.load(state, checkpoint_id=c.dir / "x")
    assert copies["copies_to_device"] < 100, copies
    assert_same(state, tensors)


def case_a_state_that_does_not_fit_the_cap_is_written_before_the_call_returns(c):
    tensors = {f"t{i}": raw(torch.float32, 1000, 1000, seed=i) for i in range(8)}
    state = everywhere("cuda:0", tensors)
    dcp.configure(arena_cap_bytes=4 << 20)
    future = dcp.async_save(state, checkpoint_id=c.dir / "x")
    overwrite(state)
    future.result(timeout=60)
    dcp.configure(arena_cap_bytes=0)
    dcp.save(tensors, checkpoint_id=c.dir / "cpu")
    assert payload(c.dir / "x") == payload(c.dir / "cpu")


def case_warm_up_of_a_device_state(c):
    state = everywhere("cuda:0", layouts(torch.float32))
    dcp.warm_up(state)
    dcp.async_save(state, checkpoint_id=c.dir / "x").result(timeout=60)


def case_saves_pin_what_they_stage_into_once(c):
    """Private memory, and what the writer process maps too: pinned here, and by nobody else."""
    tensors = {f"t{i}": raw(torch.float32, 1000, 400, seed=i) for i in range(4)}
    state = everywhere("cuda:0", tensors)
    for mode in (THREAD, PROCESS):
        dcp.trim()
        with fake.counted("cudaHostRegister", "cudaHostUnregister") as pins:
            started(state, c.dir / f"{mode.value}0", mode).upload_completion.result(timeout=60)
        assert pins["cudaHostRegister"] > 0 and pins["cudaHostUnregister"] == 0, mode
        with fake.counted("cudaHostRegister", "cudaHostUnregister") as later:
            for i in (1, 2):
                response = started(state, c.dir / f"{mode.value}{i}", mode)
                response.upload_completion.result(timeout=60)
        assert later == {"cudaHostRegister": 0, "cudaHostUnregister": 0}, mode
        with fake.counted("cudaHostUnregister") as unpins:
            dcp.trim()
        assert unpins["cudaHostUnregister"] == pins["cudaHostRegister"], mode
        for i in range(3):
            target = blank("cpu", tensors)
            dcp.load(target, checkpoint_id=c.dir / f"{mode.value}{i}")
            assert_same(target, tensors)


def case_an_arena_that_grows_stays_pinned(c):
    small = {"a": raw(torch.float32, 1000, 300, seed=1)}
    large = {f"t{i}": raw(torch.float32, 1000, 300, seed=i) for i in range(5)}
    dcp.trim()
    for mode in (THREAD, PROCESS):
        with fake.counted("cudaHostRegister", "cudaHostUnregister") as pins:
            for name, tensors in (("small", small), ("large", large)):
                path = c.dir / mode.value / name
                started(everywhere("cuda:0", tensors), path, mode).upload_completion.result(60)
                target = blank("cpu", tensors)
                dcp.load(target, checkpoint_id=path)
                assert_same(target, tensors)
        assert pins["cudaHostUnregister"] <= 1, mode  # the piece that it ended in
        dcp.trim()
    assert fake.count("cudaHostUnregister") == fake.count("cudaHostRegister")


def case_pinned_memory_is_given_back_by_trim(c):
    state = {"x": on("cuda:0", raw(torch.float32, 100000))}
    dcp.async_save(state, checkpoint_id=c.dir / "x").result(timeout=60)
    dcp.trim()
    assert fake.count("cudaHostUnregister") == fake.count("cudaHostRegister")
