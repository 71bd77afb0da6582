"""What goes wrong on a device: said by name, and the previous checkpoint is what it was."""

from __future__ import annotations

import fake
import pytest
import torch
from device_values import assert_same, blank, everywhere, layouts, memory_of, on, payload, raw

import dcp_native as dcp


def small(count=500):
    return {f"t{i}": raw(torch.float32, 6, 5, seed=i).t() for i in range(count)}


def assert_loads(path, tensors):
    target = blank("cpu", tensors)
    dcp.load(target, checkpoint_id=path)
    assert_same(target, tensors)


def case_without_memory_for_a_slab_the_save_does_without(c):
    tensors = small()
    state = everywhere("cuda:0", tensors)
    torch.cuda.synchronize()
    with fake.largest_allocation(1):
        dcp.save(state, checkpoint_id=c.dir / "save")
        future = dcp.async_save(state, checkpoint_id=c.dir / "async")
        future.result(timeout=60)
        dcp.load(state, checkpoint_id=c.dir / "save")
    assert_loads(c.dir / "save", tensors)
    assert_loads(c.dir / "async", tensors)
    assert_same(state, tensors)
    assert fake.last_error() == 0


def case_memory_that_cannot_be_pinned_is_copied_to_all_the_same(c):
    tensors = layouts(torch.float32)
    state = everywhere("cuda:0", tensors)
    dcp.trim()
    with fake.failing("cudaHostRegister", fake.NOT_SUPPORTED):
        dcp.async_save(state, checkpoint_id=c.dir / "0").result(timeout=60)
    with fake.counted("cudaHostRegister") as asked:  # once is enough, and every report says it
        for i in (1, 2):
            future = dcp.async_save(state, checkpoint_id=c.dir / str(i))
            future.result(timeout=60)
            assert "pinning failed" in future.report["device_reason"]
    assert asked["cudaHostRegister"] == 0
    for i in range(3):
        assert_loads(c.dir / str(i), tensors)
    assert fake.last_error() == 0
    dcp.trim()
    dcp.async_save(state, checkpoint_id=c.dir / "x").result(timeout=60)
    assert "pinning" not in (dcp.last_report()["device_reason"] or "")


def case_a_load_without_memory_for_a_slab_takes_few_copies(c):
    tensors = {
        "turned": raw(torch.float32, 300, 200, seed=1).t(),
        "columns": raw(torch.float32, 400, 100, seed=2)[:, 3:20],
        "steps": raw(torch.float32, 300, 64, seed=3)[:, ::2],
        "cube": raw(torch.float32, 20, 30, 40, seed=4).permute(2, 0, 1),
    }
    dcp.save(tensors, checkpoint_id=c.dir / "x")
    target, on_cpu = blank("cuda:0", tensors), blank("cpu", tensors)
    torch.cuda.synchronize()
    with fake.largest_allocation(1), fake.counted("cudaMemcpyAsync", "cudaMemcpy2DAsync") as calls:
        dcp.load(target, checkpoint_id=c.dir / "x")
    assert sum(calls.values()) < 400, calls  # of 100,400 elements
    assert "slab" in dcp.last_report()["device_reason"]
    assert_same(target, tensors)
    dcp.load(on_cpu, checkpoint_id=c.dir / "x")
    for name in tensors:  # nothing between the elements
        assert torch.equal(memory_of(target[name]), memory_of(on_cpu[name])), name


def case_kernels_that_cannot_be_loaded_are_done_without(c):
    """The first save of a process would load them: this case has to come before others do."""
    tensors = small()
    with fake.largest_allocation(1):
        dcp.save(everywhere("cuda:0", tensors), checkpoint_id=c.dir / "x")
    assert_loads(c.dir / "x", tensors)


def case_an_error_of_the_device_fails_the_save_by_name(c):
    before = layouts(torch.float32, seed=1)
    dcp.save(everywhere("cuda:0", before), checkpoint_id=c.dir / "x")
    for works in (0, 1):  # the copies and the kernels of a save: more than one
        state = everywhere("cuda:1", layouts(torch.float32, seed=2))
        torch.cuda.synchronize(1)
        with fake.dying(1, works), pytest.raises(dcp.CheckpointException, match="illegal memory"):
            dcp.save(state, checkpoint_id=c.dir / "x")
        assert_loads(c.dir / "x", before)


def case_an_error_of_the_device_fails_the_background_save_by_name(c):
    before = layouts(torch.float32, seed=1)
    dcp.save(everywhere("cuda:0", before), checkpoint_id=c.dir / "x")
    for mode in (dcp.AsyncCheckpointerType.THREAD, dcp.AsyncCheckpointerType.PROCESS):
        state = everywhere("cuda:1", layouts(torch.float32, seed=2))
        torch.cuda.synchronize(1)
        with fake.dying(1, 2):
            future = dcp.async_save(state, checkpoint_id=c.dir / "x", async_checkpointer_type=mode)
            with pytest.raises(dcp.CheckpointException, match="illegal memory"):
                future.result(timeout=60)
        assert_loads(c.dir / "x", before)


def case_an_error_of_the_device_fails_the_load_by_name(c):
    tensors = layouts(torch.float32)
    dcp.save(tensors, checkpoint_id=c.dir / "x")
    target = blank("cuda:1", tensors)
    torch.cuda.synchronize(1)
    with fake.dying(1, 2), pytest.raises(dcp.CheckpointException, match="illegal memory"):
        dcp.load(target, checkpoint_id=c.dir / "x")


def case_saves_go_on_after_a_device_has_failed_and_come_back(c):
    tensors = layouts(torch.float32)
    dcp.save(everywhere("cuda:1", tensors), checkpoint_id=c.dir / "x")
    assert_loads(c.dir / "x", tensors)


def case_a_copy_that_is_refused_fails_the_save_by_name(c):
    tensors = layouts(torch.float32)
    state = everywhere("cuda:0", tensors)
    dcp.save(state, checkpoint_id=c.dir / "x")
    with (
        fake.failing("cudaMemcpyAsync", fake.ILLEGAL_ADDRESS, 2),
        pytest.raises(dcp.CheckpointException, match="illegal memory"),
    ):
        dcp.save(state, checkpoint_id=c.dir / "x")
    assert_loads(c.dir / "x", tensors)


def case_the_capture_of_a_graph_is_refused_by_name(c):
    """[graph-capture]"""
    state = {"x": on("cuda:0", raw(torch.float32, 1000))}
    dcp.save(state, checkpoint_id=c.dir / "x")
    want = payload(c.dir / "x")
    side = torch.cuda.Stream()
    with torch.cuda.stream(side), fake.capturing(side):
        with pytest.raises(dcp.CheckpointException, match="captur"):
            dcp.save(state, checkpoint_id=c.dir / "x")
        with pytest.raises(dcp.CheckpointException, match="captur"):
            dcp.async_save(state, checkpoint_id=c.dir / "x").result(timeout=60)
        with pytest.raises(dcp.CheckpointException, match="captur"):
            dcp.load(state, checkpoint_id=c.dir / "x")
    assert payload(c.dir / "x") == want
    dcp.save(state, checkpoint_id=c.dir / "x")
