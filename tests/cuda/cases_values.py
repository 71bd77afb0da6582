"""What is saved of a device is what the same state on the CPU gives, byte for byte, and what is
loaded to one is what was saved: all layouts and dtypes, many tensors, several devices."""

from __future__ import annotations

import fake
import torch
import torch.distributed.checkpoint as torch_dcp
from device_values import (
    DTYPES,
    SECOND,
    assert_same,
    blank,
    everywhere,
    layouts,
    memory_of,
    on,
    overwrite,
    payload,
    raw,
    same,
)

import dcp_native as dcp

THREAD, PROCESS = dcp.AsyncCheckpointerType.THREAD, dcp.AsyncCheckpointerType.PROCESS


def saved_like_the_cpu(c, name, tensors, device="cuda:0", more=None):
    """Saves the tensors from a device; the data files are the CPU's."""
    dcp.save({**tensors, **(more or {})}, checkpoint_id=c.dir / f"{name}-cpu")
    dcp.save(
        {**everywhere(device, tensors), **(more or {})}, checkpoint_id=c.dir / f"{name}-device"
    )
    assert payload(c.dir / f"{name}-device") == payload(c.dir / f"{name}-cpu")
    return c.dir / f"{name}-device"


def case_files_are_those_of_the_cpu_for_every_layout_and_dtype(c):
    for dtype in DTYPES:
        saved_like_the_cpu(c, str(dtype), layouts(dtype))


def case_every_layout_and_dtype_comes_back_to_the_device(c):
    for dtype in DTYPES:
        tensors = layouts(dtype)
        path = c.dir / str(dtype)
        dcp.save(everywhere("cuda:0", tensors), checkpoint_id=path)
        target = blank(SECOND, tensors)
        dcp.load(target, checkpoint_id=path)
        assert_same(target, tensors)


def case_a_load_touches_nothing_between_the_elements_of_a_strided_target(c):
    tensors = layouts(torch.float32)
    dcp.save(tensors, checkpoint_id=c.dir / "x")
    on_cpu, on_device = blank("cpu", tensors), blank("cuda:0", tensors)
    dcp.load(on_cpu, checkpoint_id=c.dir / "x")
    dcp.load(on_device, checkpoint_id=c.dir / "x")
    for name in tensors:
        assert torch.equal(memory_of(on_device[name]), memory_of(on_cpu[name])), name


def case_stock_torch_loads_what_was_saved_from_a_device(c):
    tensors = layouts(torch.bfloat16)
    dcp.save(everywhere("cuda:0", tensors), checkpoint_id=c.dir / "x")
    target = blank("cpu", tensors)
    torch_dcp.load(target, checkpoint_id=c.dir / "x")
    assert_same(target, tensors)
    plain = {"plain": blank("cuda:0", tensors)["plain"]}
    torch_dcp.load(plain, checkpoint_id=c.dir / "x")
    assert same(plain["plain"], tensors["plain"])


def case_what_stock_torch_saved_comes_to_the_device(c):
    tensors = layouts(torch.float32)
    torch_dcp.save(tensors, checkpoint_id=c.dir / "x")
    target = blank("cuda:0", tensors)
    dcp.load(target, checkpoint_id=c.dir / "x")
    assert_same(target, tensors)


def case_another_dtype_is_cast_on_the_way_to_the_device(c):
    want = torch.arange(-500.0, 500.0)
    dcp.save({"x": on("cuda:0", want)}, checkpoint_id=c.dir / "x")
    for dtype in (torch.bfloat16, torch.float64, torch.int32):
        target = {"x": on("cuda:0", torch.zeros(1000, dtype=dtype))}
        dcp.load(target, checkpoint_id=c.dir / "x")
        assert same(target["x"], want.to(dtype)), dtype


def case_many_small_tensors_of_all_layouts(c):
    tensors = {}
    for i in range(3000):
        tensor = raw(torch.float32, 3 + i % 7, 5, seed=i % 50)
        tensors[f"layer{i:04}.w"] = tensor.t() if i % 3 == 0 else tensor
    path = saved_like_the_cpu(c, "many", tensors)
    target = blank("cuda:0", tensors)
    dcp.load(target, checkpoint_id=path)
    assert_same(target, tensors)


def case_tensors_that_share_memory(c):
    base = raw(torch.float32, 64, 64)
    there = on("cuda:0", base)
    on_cpu = {"all": base, "rows": base[8:16], "columns": base[:, 5:9], "again": base}
    on_device = {"all": there, "rows": there[8:16], "columns": there[:, 5:9], "again": there}
    dcp.save(on_cpu, checkpoint_id=c.dir / "cpu")
    dcp.save(on_device, checkpoint_id=c.dir / "device")
    assert payload(c.dir / "device") == payload(c.dir / "cpu")


def case_a_parameter_and_a_tensor_with_grad(c):
    plain = raw(torch.float32, 7, 9)
    parameter = torch.nn.Parameter(on("cuda:0", plain))
    dcp.save({"p": parameter}, checkpoint_id=c.dir / "x")
    target = {"p": torch.nn.Parameter(blank("cuda:0", {"p": plain})["p"])}
    dcp.load(target, checkpoint_id=c.dir / "x")
    assert same(target["p"].detach(), plain)


def case_mixed_with_the_cpu_and_with_objects(c):
    tensors, more = layouts(torch.float16), {"step": 7, "names": ["a", "b"], "on_cpu": raw(
        torch.float32, 100, 3)}  # fmt: skip
    path = saved_like_the_cpu(c, "mixed", tensors, more=more)
    target = {**blank("cuda:0", tensors), "step": 0, "names": [], "on_cpu": torch.zeros(100, 3)}
    dcp.load(target, checkpoint_id=path)
    assert target["step"] == 7 and target["names"] == ["a", "b"]
    assert same(target["on_cpu"], more["on_cpu"])
    assert_same({name: target[name] for name in tensors}, tensors)


def case_what_was_saved_of_a_device_loads_on_the_cpu_and_the_other_way_round(c):
    tensors = layouts(torch.float32)
    dcp.save(everywhere("cuda:0", tensors), checkpoint_id=c.dir / "device")
    target = blank("cpu", tensors)
    dcp.load(target, checkpoint_id=c.dir / "device")
    assert_same(target, tensors)


def case_two_devices_in_one_state(c):
    first, second = layouts(torch.float32, seed=3), layouts(torch.int16, seed=4)
    state = {"first": everywhere("cuda:0", first), "second": everywhere(SECOND, second)}
    for current in range(torch.cuda.device_count()):
        with torch.cuda.device(current):
            dcp.save(state, checkpoint_id=c.dir / str(current))
            target = {"first": blank(SECOND, first), "second": blank("cuda:0", second)}
            dcp.load(target, checkpoint_id=c.dir / str(current))
        assert_same(target["first"], first)
        assert_same(target["second"], second)


def case_meta_tensors_and_the_hosts_beside_those_of_devices(c):
    """As a model whose optimizer is offloaded: each comes to where it is wanted."""
    tensors = {**layouts(torch.float32, seed=5), "made": raw(torch.float32, 20, 30, seed=6)}
    on_host = {f"host.{name}": tensor for name, tensor in layouts(torch.int32, seed=7).items()}
    state = {**everywhere("cuda:0", tensors), **on_host}
    state["large"] = on(SECOND, tensors["large"])
    future = dcp.async_save(state, checkpoint_id=c.dir / "x")
    future.result(timeout=60)
    assert future.report["devices"] == sorted({"cuda:0", SECOND})
    target = {**blank("cuda:0", tensors), **blank("cpu", on_host)}
    target["large"] = blank(SECOND, {"large": tensors["large"]})["large"]
    target["made"] = torch.empty(20, 30, device="meta")
    with torch.cuda.device(torch.cuda.device_count() - 1):
        dcp.load(target, checkpoint_id=c.dir / "x")
    assert target["made"].device.type == "cpu"  # without a group there is no other device to go by
    assert target["plain"].device == torch.device("cuda:0")
    assert target["large"].device == torch.device(SECOND)
    assert_same(target, {**tensors, **on_host})
    report = dcp.last_report()
    del tensors["made"]
    size_bytes = sum(tensor.nbytes for tensor in tensors.values())
    assert report["devices"] == sorted({"cuda:0", SECOND})
    assert report["device_targets_count"] == len(tensors) - 1  # one has no elements
    assert report["device_by_torch_count"] == 0
    assert report["device_copied_bytes"] >= size_bytes


def case_the_current_device_stays_what_it_was(c):
    state = {"a": on("cuda:0", raw(torch.float32, 9)), "b": on(SECOND, raw(torch.float32, 9))}
    for current in range(torch.cuda.device_count()):
        torch.cuda.set_device(current)
        dcp.save(state, checkpoint_id=c.dir / f"s{current}")
        assert torch.cuda.current_device() == current
        dcp.async_save(state, checkpoint_id=c.dir / f"a{current}").result(timeout=60)
        assert torch.cuda.current_device() == current
        dcp.load(state, checkpoint_id=c.dir / f"s{current}")
        assert torch.cuda.current_device() == current
    torch.cuda.set_device(0)


def case_no_error_is_left_behind_for_torch_to_find(c):
    state = everywhere("cuda:0", layouts(torch.float32))
    dcp.save(state, checkpoint_id=c.dir / "x")
    assert fake.last_error() == 0
    dcp.async_save(state, checkpoint_id=c.dir / "y").result(timeout=60)
    dcp.load(state, checkpoint_id=c.dir / "x")
    assert fake.last_error() == 0


def case_async_saves_hold_the_values_of_the_call(c):
    for mode in (THREAD, PROCESS):
        tensors = layouts(torch.float32, seed=7)
        state = everywhere("cuda:0", tensors)
        future = dcp.async_save(
            state, checkpoint_id=c.dir / mode.value, async_checkpointer_type=mode
        )
        overwrite(state)
        future.result(timeout=60)
        target = blank("cpu", tensors)
        dcp.load(target, checkpoint_id=c.dir / mode.value)
        assert_same(target, tensors)


def case_saves_of_the_same_state_one_after_the_other(c):
    for i in range(4):
        tensors = layouts(torch.float32, seed=20 + i)
        dcp.save(everywhere("cuda:0", tensors), checkpoint_id=c.dir / "same")
        target = blank("cuda:0", tensors)
        dcp.load(target, checkpoint_id=c.dir / "same")
        assert_same(target, tensors)


def case_what_the_current_stream_still_has_to_do_is_saved(c):
    """Nothing is waited for by the caller: the bytes are on their way to the device."""
    side = torch.cuda.Stream()
    for stream in (torch.cuda.current_stream(), side):
        want = raw(torch.float32, 1000, 100, seed=5)
        pinned = want.pin_memory()
        there = torch.empty(1000, 100, device="cuda")
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            there.copy_(pinned, non_blocking=True)
            dcp.save({"x": there}, checkpoint_id=c.dir / "x")
        target = {"x": torch.zeros(1000, 100)}
        dcp.load(target, checkpoint_id=c.dir / "x")
        assert same(target["x"], want)


def case_what_was_loaded_is_there_for_the_current_stream(c):
    """Work that the caller puts on its stream after a load finds what was loaded."""
    want = raw(torch.float32, 1000, 100, seed=6)
    dcp.save({"x": want}, checkpoint_id=c.dir / "x")
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream()):
        there = torch.empty(1000, 100, device="cuda")
        copied = torch.empty(1000, 100, device="cuda:0")
        with torch.cuda.stream(stream):
            dcp.load({"x": there}, checkpoint_id=c.dir / "x")
            copied.copy_(there, non_blocking=True)
        torch.cuda.synchronize()
        assert same(copied, want)


def case_an_incremental_save_takes_over_what_has_not_changed(c):
    tensors = {f"t{i}": raw(torch.float32, 300, 1000, seed=i) for i in range(4)}
    state = everywhere("cuda:0", tensors)
    dcp.configure(content_hash=True, incremental_links="hard")
    dcp.save(state, checkpoint_id=c.dir / "first")
    changed = raw(torch.float32, 300, 1000, seed=99)
    state["t2"].copy_(changed)
    dcp.save(state, checkpoint_id=c.dir / "second", base=c.dir / "first")
    dcp.configure(content_hash=False, incremental_links="reflink")
    target = blank("cuda:0", tensors)
    dcp.load(target, checkpoint_id=c.dir / "second")
    assert_same(target, {**tensors, "t2": changed})
