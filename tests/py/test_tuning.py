"""How hard a save may press on the machine: io_uring, priorities, the rate limit."""

from __future__ import annotations

import dataclasses
import os
import time

import pytest
import torch
from torch.distributed.checkpoint import FileSystemWriter

import dcp_native
from dcp_native._config import ENVIRONMENT, Config, config, configure, io_priority

STATE = {f"layer.{i}": torch.arange(1 << 20, dtype=torch.int32) + i for i in range(6)}


@pytest.fixture
def settings():
    before = config()
    yield configure
    configure(**dataclasses.asdict(before))


def save_and_load(path) -> dict:
    dcp_native.save(STATE, checkpoint_id=path, no_dist=True)
    report = dcp_native.last_report()
    target = {name: torch.zeros_like(tensor) for name, tensor in STATE.items()}
    dcp_native.load(target, checkpoint_id=path, no_dist=True)
    assert all(torch.equal(target[name], tensor) for name, tensor in STATE.items())
    return report


@pytest.mark.parametrize("way", ["auto", "off"])
def test_every_way_of_writing_makes_the_same_checkpoint(tmp_path, settings, way):
    settings(io_uring=way)
    report = save_and_load(tmp_path / way)
    assert way != "off" or report["queue_writes_count"] == 0


def test_priorities_leave_the_trainers_threads_alone(tmp_path, settings):
    settings(writer_nice=9, writer_io_class="idle", io_uring="off")
    before = os.getpriority(os.PRIO_PROCESS, 0)
    dcp_native.async_save(
        STATE, storage_writer=FileSystemWriter(tmp_path / "a"), no_dist=True
    ).result()
    report = dcp_native.last_report()
    assert report["priority_failures"] == 0
    assert os.getpriority(os.PRIO_PROCESS, 0) == before
    save_and_load(tmp_path / "b")
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_a_limited_save_takes_the_time_its_bytes_are_worth(tmp_path, settings):
    settings(write_limit_bytes_s=32 << 20)
    start = time.monotonic()
    report = save_and_load(tmp_path)
    # 24 MiB at 32 MiB/s; the first buffer starts at once, and one may have been saved up.
    assert time.monotonic() - start >= (report["file_bytes"] - (16 << 20)) / (32 << 20)
    assert report["limited_ns"] > 0


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("io_uring", "yes"),
        ("writer_nice", 20),
        ("writer_nice", -1),
        ("writer_io_class", "best-effort"),
        ("writer_io_class", "best-effort:8"),
        ("writer_io_class", "realtime:0"),
        ("write_limit_bytes_s", -1),
    ],
)
def test_values_that_do_not_exist_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        dataclasses.replace(Config(), **{name: value})


def test_io_classes_are_what_the_kernel_takes():
    assert io_priority("none") == 0
    assert io_priority("best-effort:0") == 2 << 13
    assert io_priority("best-effort:7") == 2 << 13 | 7
    assert io_priority("idle") == 3 << 13


def test_every_setting_has_an_environment_variable():
    fields = {field.name for field in dataclasses.fields(Config)}
    assert {field for field, _ in ENVIRONMENT.values()} == fields
