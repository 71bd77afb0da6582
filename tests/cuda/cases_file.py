"""What a device reads from files by itself (gpu_direct, cuFile) is what was saved, and verified;
what cuFile refuses is read as always."""

from __future__ import annotations

import contextlib
from pathlib import Path

import fake
import pytest
import torch
from device_values import assert_same, blank, everywhere, on, raw

import dcp_native as dcp


@contextlib.contextmanager
def gpu_direct(value, **more):
    before = dcp.configure(gpu_direct=value, **more)
    try:
        yield
    finally:
        dcp.configure(**vars(before))


def tensors_of_all_sizes():
    """Some are large enough; the last is more than is read in one go."""
    return {
        "small": raw(torch.float32, 30, 10),
        "just": raw(torch.bfloat16, 1 << 19, seed=1),
        "large": raw(torch.float32, 1200, 700, seed=2),
        "larger": raw(torch.float32, 18000, 1000, seed=3),
    }


LARGE_BYTES = 4 * (1200 * 700 + 18000 * 1000)


def loaded(c, tensors, target=None):
    """Saves them, loads them to a device; what the load's report says."""
    dcp.save(tensors, checkpoint_id=c.dir / "x", no_dist=True)
    return loaded_again(c, tensors, target)


def loaded_again(c, tensors, target=None):
    target = blank("cuda:0", tensors) if target is None else target
    dcp.load(target, checkpoint_id=c.dir / "x", no_dist=True)
    assert_same(target, tensors)
    return dcp.last_report()


def case_a_cufile_that_does_not_start_is_an_error_only_where_it_is_demanded(c):
    """The first case: what has started stays so."""
    tensors = tensors_of_all_sizes()
    with gpu_direct("auto"), fake.failing("cuFileDriverOpen", fake.NOT_SUPPORTED):
        report = loaded(c, tensors)
    assert report["device_direct_bytes"] == 0 and "cuFile cannot start" in report["device_reason"]
    with (
        gpu_direct("on"),
        fake.failing("cuFileDriverOpen", fake.NOT_SUPPORTED),
        pytest.raises(dcp.CheckpointException, match="cuFile cannot start"),
    ):
        loaded_again(c, tensors)


def case_large_tensors_come_straight_to_the_device_and_are_verified(c):
    tensors = tensors_of_all_sizes()
    for value in ("auto", "on"):
        with gpu_direct(value), fake.counted("cuFileRead") as calls:
            report = loaded(c, tensors)
        assert calls["cuFileRead"] > 0
        direct = (report["device_direct_bytes"], report["straight_bytes"])
        assert direct == (LARGE_BYTES, LARGE_BYTES), report
        assert report["verified_bytes"] == report["wanted_bytes"]
        assert report["device_copied_bytes"] < 4 << 20
        assert report["device_reason"] is None


def case_nothing_is_read_so_by_who_did_not_ask(c):
    with fake.counted("cuFileRead", "cuFileHandleRegister") as calls:
        report = loaded(c, tensors_of_all_sizes())
    assert calls == {"cuFileRead": 0, "cuFileHandleRegister": 0}
    assert report["device_direct_bytes"] == 0


def case_strided_and_cast_targets_come_as_always(c):
    tensors = {"t": raw(torch.float32, 1200, 700)}
    with gpu_direct("auto"):
        target = {"t": on("cuda:0", torch.empty(700, 1200)).t()}
        assert loaded(c, tensors, target)["device_direct_bytes"] == 0
        tensors = {"t": torch.arange(1 << 20, dtype=torch.float32) % 256}
        dcp.save(tensors, checkpoint_id=c.dir / "y", no_dist=True)
        cast = {"t": on("cuda:0", torch.empty(1 << 20, dtype=torch.bfloat16))}
        dcp.load(cast, checkpoint_id=c.dir / "y", no_dist=True)
    assert dcp.last_report()["device_direct_bytes"] == 0
    assert torch.equal(cast["t"].cpu().float(), tensors["t"])


def case_what_cufile_refuses_is_read_through_the_host(c):
    tensors = tensors_of_all_sizes()
    for name in ("cuFileHandleRegister", "cuFileRead"):
        with gpu_direct("on"), fake.failing(name, fake.NOT_SUPPORTED):
            report = loaded(c, tensors)
        assert report["device_direct_bytes"] == 0
        assert "cuFile cannot" in report["device_reason"]
        assert report["verified_bytes"] == report["wanted_bytes"]


def case_damage_is_found_unless_nobody_asks(c):
    tensors = {"t": raw(torch.float32, 1200, 700)}
    dcp.save(tensors, checkpoint_id=c.dir / "x", no_dist=True)
    (path,) = Path(c.dir / "x").glob("*.distcp")
    content = bytearray(path.read_bytes())
    content[2_000_000] ^= 1
    path.write_bytes(content)
    target = everywhere("cuda:0", blank("cpu", tensors))
    with gpu_direct("on"), pytest.raises(dcp.CheckpointException, match="checksum of a block"):
        dcp.load(target, checkpoint_id=c.dir / "x", no_dist=True)
    with gpu_direct("on", verify=False):
        dcp.load(target, checkpoint_id=c.dir / "x", no_dist=True)
    report = dcp.last_report()
    assert report["device_direct_bytes"] == report["unverified_bytes"] == 4 * 1200 * 700
    assert (target["t"].cpu().view(torch.int32) != tensors["t"].view(torch.int32)).sum() == 1
