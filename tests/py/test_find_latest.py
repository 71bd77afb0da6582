"""find_latest: which child is the newest, and which ones are skipped, and why."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from conftest import ROOT

import dcp_native as dcp

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A checkpoint to copy."""
    path = tmp_path_factory.mktemp("model") / "checkpoint"
    dcp.save({"w": torch.arange(1000.0), "step": 3}, checkpoint_id=path)
    return path


@pytest.fixture
def make(model, tmp_path):
    """Makes children of a parent, each written a second after the one before."""
    now = [1_700_000_000]

    def make(*names):
        for name in names:
            shutil.copytree(model, tmp_path / name)
            now[0] += 1
            os.utime(tmp_path / name / ".metadata", (now[0], now[0]))
        return tmp_path

    return make


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, logger="dcp_native")
    return caplog


def damage(path: Path, where: float = 0.5) -> None:
    file = max(path.glob("*.distcp"), key=lambda p: p.stat().st_size)
    data = bytearray(file.read_bytes())
    data[int(len(data) * where)] ^= 1
    file.write_bytes(data)


# ---- which one ----


@pytest.mark.parametrize(
    ("names", "newest"),
    [
        (("step-100", "step-20", "step-3"), "step-100"),
        (("step_1000", "step_999"), "step_1000"),
        (("checkpoint-9", "checkpoint-10"), "checkpoint-10"),
        (("iter_0001000", "iter_0000990"), "iter_0001000"),
        (("global_step7", "global_step12", "global_step11"), "global_step12"),
        (("epoch=3-step=300", "epoch=2-step=900"), "epoch=3-step=300"),
        (("12", "5"), "12"),
        (("epoch-1.5", "epoch-1.25"), "epoch-1.5"),
        (("epoch-1.25", "epoch-1.5", "epoch-1"), "epoch-1.5"),
        (("epoch-2", "epoch-1.75", "epoch-0.125"), "epoch-2"),
        (("epoch=1.25-loss=0.5", "epoch=1.250-loss=0.31"), "epoch=1.25-loss=0.5"),
        (("run-1.2.10", "run-1.2.9"), "run-1.2.10"),  # a version, no fraction
        (("run-1.2.10", "run-3"), "run-3"),  # of different shapes
        (("step-10.pt", "step-9.pt"), "step-10.pt"),
        (("step-1", "step-01"), "step-01"),  # the same number: the one written last
        (("step-500", "best"), "best"),  # names of different shapes: the one written last
        (("best", "step-500", "step-400"), "step-400"),
        (("a", "b"), "b"),
        (("only",), "only"),
    ],
)
def test_the_newest_by_number_where_names_are_alike_else_by_time(make, names, newest):
    parent = make(*names)
    assert dcp.find_latest(parent) == parent / newest


def test_a_pattern_and_a_key_decide_otherwise(make):
    parent = make("step-500", "step-1000", "best", "step-700.tmp")
    assert dcp.find_latest(parent, pattern="step-*[0-9]") == parent / "step-1000"
    assert dcp.find_latest(parent, pattern="step-*") == parent / "step-700.tmp"
    assert dcp.find_latest(parent, pattern="epoch-*") is None
    assert dcp.find_latest(parent, key=lambda path: path.name == "best").name == "best"


def test_the_answer_loads(make):
    target = {"w": torch.zeros(1000), "step": None}
    dcp.load(target, checkpoint_id=dcp.find_latest(str(make("step-1", "step-2"))))
    assert target["step"] == 3 and torch.equal(target["w"], torch.arange(1000.0))


def test_links_are_followed_and_are_no_second_name(make):
    parent = make("step-100", "step-200")
    (parent / "latest").symlink_to("step-100")
    assert dcp.find_latest(parent) == parent / "step-200"
    elsewhere = parent.parent / f"{parent.name}-elsewhere"
    shutil.move(parent / "step-200", elsewhere)
    (parent / "step-200").symlink_to(elsewhere)
    assert dcp.find_latest(parent) == parent / "step-200"
    (parent / "step-300").symlink_to("nowhere")
    assert dcp.find_latest(parent) == parent / "step-200"


def test_checkpoints_of_torch_and_of_single_ranks_count(tmp_path):
    torch_dcp.save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "step-1")
    assert dcp.find_latest(tmp_path, verify=True).name == "step-1"
    dcp.save({"w": torch.ones(3)}, checkpoint_id=tmp_path / "step-2", use_collectives=False)
    assert dcp.find_latest(tmp_path, verify=True).name == "step-2"
    (tmp_path / "step-2" / "__0.metadata").rename(tmp_path / "step-2" / "__1.metadata")
    assert dcp.find_latest(tmp_path).name == "step-1"


def test_the_parent_itself_files_and_foreign_directories_never_count(make, model):
    parent = make("step-1")
    shutil.copytree(model, parent, dirs_exist_ok=True)
    (parent / "step-9").write_text("a file")
    (parent / "tensorboard-7").mkdir()
    assert dcp.find_latest(parent) == parent / "step-1"


def test_none_and_errors(tmp_path):
    assert dcp.find_latest(tmp_path) is None
    (tmp_path / "logs").mkdir()
    assert dcp.find_latest(tmp_path, verify=True) is None
    with pytest.raises(FileNotFoundError):
        dcp.find_latest(tmp_path / "nowhere")
    (tmp_path / "file").write_text("")
    with pytest.raises(NotADirectoryError):
        dcp.find_latest(tmp_path / "file")
    for url in ("s3://bucket/run", "gs://b", "file:///tmp", "memory://x"):
        with pytest.raises(ValueError, match="URL"):
            dcp.find_latest(url)
    with pytest.raises(ValueError, match="verify"):
        dcp.find_latest(tmp_path, verify="some")


# ---- what is skipped ----


def test_incomplete_ones_are_skipped_with_a_reason(make, log):
    parent = make("step-1", "step-2", "step-3", "step-4", "step-5", "step-6")
    (parent / "step-6" / ".metadata").unlink()
    next((parent / "step-5").glob("*.distcp")).unlink()
    (parent / "step-4" / ".metadata").write_bytes(b"\x80\4garbage")
    file = next((parent / "step-3").glob("*.distcp"))
    os.truncate(file, file.stat().st_size - 1)
    assert dcp.find_latest(parent) == parent / "step-2"
    warnings = [r.message for r in log.records if r.levelno == logging.WARNING]
    assert len(warnings) == 3
    assert "step-5" in warnings[0] and "missing" in warnings[0]
    assert "step-4" in warnings[1] and ".metadata" in warnings[1]
    assert "step-3" in warnings[2] and "cut short" in warnings[2]
    assert any("step-6" in r.message for r in log.records if r.levelno == logging.INFO)


def test_only_verification_sees_a_flipped_bit(make, log):
    parent = make("step-1", "step-2")
    damage(parent / "step-2")
    assert dcp.find_latest(parent).name == "step-2"
    assert dcp.find_latest(parent, verify="structure").name == "step-2"
    for verify in (True, "full"):
        assert dcp.find_latest(parent, verify=verify).name == "step-1"
    assert "checksum" in log.records[-1].message and "step-2" in log.records[-1].message
    damage(parent / "step-1")
    assert dcp.find_latest(parent, verify=True) is None


def test_nothing_is_changed(make):
    parent = make("step-1", "step-2")
    (parent / "step-2" / ".metadata").write_bytes(b"")
    before = {p: (p.lstat().st_mtime_ns, p.lstat().st_size) for p in parent.rglob("*")}
    dcp.find_latest(parent, verify=True)
    assert {p: (p.lstat().st_mtime_ns, p.lstat().st_size) for p in parent.rglob("*")} == before


def test_a_save_in_flight_does_not_count(make):
    parent = make("step-1")
    future = dcp.async_save({"w": torch.zeros(1 << 22)}, checkpoint_id=parent / "step-2")
    seen = dcp.find_latest(parent).name
    assert seen in ("step-1", "step-2")
    future.result()
    assert dcp.find_latest(parent, verify=True).name == "step-2"
    (parent / "step-3").mkdir()
    (parent / "step-3" / ".dcp_native-claim-0-0123456789abcdef").write_text("")
    shutil.copy(next((parent / "step-1").glob("*.distcp")), parent / "step-3")
    assert dcp.find_latest(parent).name == "step-2"


KILLED = """
import sys, torch, warnings
warnings.filterwarnings("ignore")
import dcp_native as dcp
data = {f"t{i}": torch.full((1 << 20,), float(i)) for i in range(24)}
step = int(sys.argv[2])
while True:
    step += 1
    dcp.save(data, checkpoint_id=f"{sys.argv[1]}/step-{step}")
    print(step, flush=True)
"""


def test_what_a_killed_trainer_leaves_is_told_from_what_it_finished(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    for round_ in range(2):
        job = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(tmp_path), str(10 * round_)],
            stdout=subprocess.PIPE, env=env,
        )  # fmt: skip
        finished = int(job.stdout.readline())
        time.sleep(0.01 + 0.03 * round_)
        job.send_signal(signal.SIGKILL)
        finished = max([finished, *(int(line) for line in job.stdout.read().split())])
        job.wait()
        job.stdout.close()
        found = int(dcp.find_latest(tmp_path, verify=True).name.removeprefix("step-"))
        assert found in (finished, finished + 1)


def test_children_that_come_and_go_meanwhile(model, tmp_path):
    """A trainer that keeps its last two checkpoints."""
    for step in range(2):
        shutil.copytree(model, tmp_path / f"step-{step}")
    stop = threading.Event()

    def churn():
        step = 2
        while not stop.is_set():
            shutil.copytree(model, tmp_path / f"step-{step}.part")
            os.rename(tmp_path / f"step-{step}.part", tmp_path / f"step-{step}")
            shutil.rmtree(tmp_path / f"step-{step - 2}")
            step += 1

    thread = threading.Thread(target=churn)
    thread.start()
    deadline = time.monotonic() + 120
    try:
        found = []
        while len(found) <= 100 and time.monotonic() < deadline:
            path = dcp.find_latest(tmp_path, pattern="step-*[0-9]", verify=True)
            found += [] if path is None else [path]
    finally:
        stop.set()
        thread.join()
    steps = [int(path.name.removeprefix("step-")) for path in found]
    assert steps == sorted(steps) and len(set(steps)) > 1
    assert len(steps) > 100
