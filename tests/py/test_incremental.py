"""Incremental saves in one process: what is written, what is linked, what loads afterwards."""

from __future__ import annotations

import fcntl
import logging
import os
import pickle
import random
import shutil
import stat
import subprocess
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from common import assert_equal, files_can_not_grow, like, value

import dcp_native as dcp

FICLONE = 0x40049409
MODULES = (dcp, torch_dcp)


def can_reflink(directory: Path) -> bool:
    one, two = directory / "probe1", directory / "probe2"
    one.write_bytes(b"x" * 4096)
    try:
        with open(one, "rb") as source, open(two, "wb") as target:
            fcntl.ioctl(target, FICLONE, source.fileno())
    except OSError:
        return False
    finally:
        one.unlink()
        two.unlink()
    return True


@pytest.fixture(scope="session")
def reflink_root(tmp_path_factory):
    """A directory in which files can be reflinked: what DCP_NATIVE_TEST_REFLINK_DIR names, else
    pytest's own, else an XFS of our own in a file, where that may be mounted."""
    named = os.environ.get("DCP_NATIVE_TEST_REFLINK_DIR")
    root = Path(named) if named else tmp_path_factory.mktemp("reflink")
    if can_reflink(root):
        yield root
        return
    image, place = tmp_path_factory.mktemp("xfs") / "image", root / "xfs"
    try:
        place.mkdir()
        with open(image, "wb") as file:
            file.truncate(512 << 20)  # sparse; XFS takes no less than 300 MiB
        for command in (
            ["mkfs.xfs", "-q", "-m", "reflink=1", str(image)],
            ["mount", "-o", "loop", str(image), str(place)],
        ):
            subprocess.run(command, check=True, capture_output=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        pytest.skip(f"no reflinks in {root}, and no XFS of our own: {error}")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True, timeout=30)


@pytest.fixture(params=["hard", "reflink"])
def home(request, tmp_path):
    """A directory to save in, and incremental_links set to what it is tried with."""
    dcp.configure(incremental_links=request.param, content_hash=True)
    if request.param == "hard":
        yield tmp_path
        return
    place = request.getfixturevalue("reflink_root") / tmp_path.name
    place.mkdir(parents=True, exist_ok=True)
    yield place
    shutil.rmtree(place)


def many(count: int = 40, step: str = "") -> dict:
    state = {f"layer{i:02}": value(f"w{i}{step}", (500, 100)) for i in range(count)}
    state["strided"] = value("strided" + step, (300, 200)).t()
    state["config"] = {"lr": 0.1, "names": ["a", "b"]}
    return state


def check_loads(path: Path, want: dict) -> None:
    for module in MODULES:
        target = like(want)
        module.load(target, checkpoint_id=path)
        assert_equal(target, want, module.__name__)


def data_files(path: Path) -> list[Path]:
    return sorted(path.glob("*.distcp"))


def test_only_what_has_changed_is_written(home):
    """[base-keyword]"""
    state = many()
    dcp.save(state, checkpoint_id=home / "a")
    full = dcp.last_report()["file_bytes"]
    inodes = {p.stat().st_ino for p in data_files(home / "a")}
    state["layer03"], state["layer30"] = value("x", (500, 100)), value("y", (500, 100))
    dcp.save(state, checkpoint_id=home / "b", base=home / "a")
    report = dcp.last_report()
    assert report["incremental"] and report["base_reason"] is None
    assert report["reused_items"] == len(many()) - 2 + 1  # config is two objects
    assert report["linked_files"] == 1
    assert report["file_bytes"] < 0.06 * full and report["hash_ns"] > 0
    written, linked = data_files(home / "b")
    assert written.stat().st_size == report["file_bytes"]
    hard = dcp.config().incremental_links == "hard"
    assert (linked.stat().st_ino in inodes) == hard
    assert (
        not linked.stat().st_mode & stat.S_IWUSR if hard else linked.stat().st_mode & stat.S_IWUSR
    )
    check_loads(home / "b", state)
    check_loads(home / "a", many())


def test_a_hard_link_gives_nobody_more_rights(home):
    dcp.save(many(), checkpoint_id=home / "a")
    (data,) = data_files(home / "a")
    data.chmod(0o600)
    dcp.save(many(), checkpoint_id=home / "b", base=home / "a")
    assert dcp.last_report()["linked_files"] == 1
    hard = dcp.config().incremental_links == "hard"
    assert stat.S_IMODE(data.stat().st_mode) == (0o400 if hard else 0o600)


def test_the_base_may_be_deleted(home):
    state = many()
    dcp.save(state, checkpoint_id=home / "a")
    state["layer07"] += 1
    dcp.save(state, checkpoint_id=home / "b", base=home / "a")
    shutil.rmtree(home / "a")
    check_loads(home / "b", state)


@pytest.mark.parametrize("single_file", [True, False])
def test_a_chain_of_saves_loads_at_every_step(home, single_file):
    rng = random.Random(5)
    state = {f"t{i:02}": value(f"t{i}", (rng.randrange(20, 400), 30)) for i in range(30)}
    before = None
    for step in range(13):
        here = home / str(step)
        dcp.save(
            state,
            storage_writer=dcp.FileSystemWriter(here, single_file_per_rank=single_file),
            base=before,
        )
        report = dcp.last_report()
        assert report["linked_files"] <= 8
        assert step == 0 or report["reused_items"] > 0, report
        if step % 4 == 0:
            check_loads(here, state)
        if before is not None:
            shutil.rmtree(before)
        before = here
        for name in rng.sample(sorted(state), rng.randrange(1, 7)):
            state[name] = state[name] + 1


def test_a_directory_may_be_its_own_base(home):
    state = many()
    dcp.save(state, checkpoint_id=home / "a")
    for step in range(3):
        state[f"layer{step:02}"] = value(f"new{step}", (500, 100))
        dcp.save(state, checkpoint_id=home / "a", base=home / "a")
        report = dcp.last_report()
        assert report["reused_items"] >= 40
        assert len(data_files(home / "a")) == report["linked_files"] + 1  # the rest was swept
        check_loads(home / "a", state)
    numbers = {int(p.stem.split("_")[-1]) for p in data_files(home / "a")}
    dcp.save(state, checkpoint_id=home / "a")
    assert min(int(p.stem.split("_")[-1]) for p in data_files(home / "a")) > max(numbers)
    check_loads(home / "a", state)


def test_a_base_of_stock_torch_is_no_use_and_no_harm(home):
    state = many()
    torch_dcp.save(state, checkpoint_id=home / "a")
    dcp.save(state, checkpoint_id=home / "b", base=home / "a")
    report = dcp.last_report()
    assert report["reused_items"] == 0 and "not saved by dcp_native" in report["base_reason"]
    check_loads(home / "b", state)


def test_a_base_without_hashes_is_no_use_and_no_harm(home):
    dcp.configure(content_hash=False)
    state = many()
    dcp.save(state, checkpoint_id=home / "a")
    dcp.save(state, checkpoint_id=home / "b", base=home / "a")
    assert "without content hashes" in dcp.last_report()["base_reason"]
    dcp.save(state, checkpoint_id=home / "c", base=home / "b")  # hashes came with the base
    assert dcp.last_report()["base_reason"] is None
    assert dcp.last_report()["reused_items"] == dcp.last_report()["kept_items"]
    check_loads(home / "c", state)


@pytest.mark.parametrize("damage", ["absent", "no metadata", "metadata", "cut", "header", "gone"])
def test_a_damaged_base_means_a_full_save(home, damage):
    state = many()
    base = home / "a"
    dcp.save(state, checkpoint_id=base)
    (file,) = data_files(base)
    if damage == "absent":
        shutil.rmtree(base)
    elif damage == "no metadata":
        (base / ".metadata").unlink()
    elif damage == "metadata":
        (base / ".metadata").write_bytes(b"not a pickle")
    elif damage == "cut":
        os.truncate(file, file.stat().st_size - 100)
    elif damage == "header":
        dcp.save(state, checkpoint_id=home / "other")
        shutil.copy(data_files(home / "other")[0], file)
    else:
        file.unlink()
    dcp.save(state, checkpoint_id=home / "b", base=base)
    report = dcp.last_report()
    assert report["reused_items"] == 0 and report["linked_files"] == 0 and report["base_reason"]
    assert len(data_files(home / "b")) == 1
    check_loads(home / "b", state)


def test_other_dtypes_shapes_and_objects_are_changes(home):
    state = {
        "dtype": value("d", (64, 64)),
        "shape": value("s", (64, 64)),
        "same": value("same", (256, 256)),
        "scalar": torch.tensor(3.0),
        "step": 7,
        "name": "a",
        "nested": {"list": [1, 2, 3], "new": None},
    }
    dcp.save(state, checkpoint_id=home / "a")
    state["dtype"] = state["dtype"].to(torch.int32)
    state["shape"] = state["shape"].reshape(32, 128)
    state["step"] = 8
    state["added"] = value("added", (5,))
    dcp.save(state, checkpoint_id=home / "b", base=home / "a")
    report = dcp.last_report()
    assert report["kept_items"] - report["reused_items"] == 4, report
    check_loads(home / "b", state)


def test_a_background_save_stages_and_writes_the_changes_alone(home):
    state = many()
    dcp.save(state, checkpoint_id=home / "a")
    full = dcp.last_report()["file_bytes"]
    state["layer11"] = value("x", (500, 100))
    want = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in state.items()}
    future = dcp.async_save(state, checkpoint_id=home / "b", base=home / "a")
    for tensor in state.values():
        if isinstance(tensor, torch.Tensor):
            tensor.fill_(-1)
    future.result(timeout=60)
    report = dcp.last_report()
    assert report["kind"] == "async_save" and report["file_bytes"] < 0.05 * full
    check_loads(home / "b", want)


def test_independent_saves_take_their_own_metadata_as_base(home):
    state = many()
    dcp.save(state, checkpoint_id=home / "a", use_collectives=False)
    state["layer11"] = value("x", (500, 100))
    dcp.save(state, checkpoint_id=home / "b", use_collectives=False, base=home / "a")
    assert dcp.last_report()["reused_items"] == dcp.last_report()["kept_items"] - 1
    check_loads(home / "b", state)


def test_a_save_that_fails_leaves_no_link(home):
    state = many()
    dcp.save(state, checkpoint_id=home / "a")
    names = sorted(os.listdir(home / "a"))
    state["layer11"] = value("x", (500, 100))
    with files_can_not_grow(True), pytest.raises(dcp.CheckpointException):
        dcp.save(state, checkpoint_id=home / "a", base=home / "a")
    assert sorted(os.listdir(home / "a")) == names
    check_loads(home / "a", many())
    dcp.save(state, checkpoint_id=home / "a", base=home / "a")
    check_loads(home / "a", state)


def test_without_reflinks_everything_is_written_and_the_report_says_why(tmp_path):
    if can_reflink(tmp_path):
        pytest.skip(f"reflinks in {tmp_path}")
    dcp.configure(content_hash=True)
    dcp.save(many(), checkpoint_id=tmp_path / "a")
    dcp.save(many(), checkpoint_id=tmp_path / "b", base=tmp_path / "a")
    report = dcp.last_report()
    assert report["reused_items"] == 0 and 'incremental_links="hard"' in report["base_reason"]
    check_loads(tmp_path / "b", many())


def test_a_full_save_pays_nothing_for_a_base_it_was_not_given(tmp_path):
    dcp.save(many(), checkpoint_id=tmp_path)
    report = dcp.last_report()
    assert not report["incremental"] and report["hash_ns"] == report["compare_ns"] == 0
    assert report["base_reason"] is None
    (file,) = data_files(tmp_path)
    without = file.stat().st_size
    dcp.configure(content_hash=True)
    dcp.save(many(), checkpoint_id=tmp_path)
    (file,) = data_files(tmp_path)
    assert without < file.stat().st_size < without + 4096


def test_torchs_path_writes_everything_and_says_so(tmp_path, caplog):
    class Planner(dcp.DefaultSavePlanner):
        pass

    with caplog.at_level(logging.WARNING, "dcp_native"):
        dcp.save(many(), checkpoint_id=tmp_path / "b", planner=Planner(), base=tmp_path / "a")
    assert "is not used" in caplog.text and "Planner" in caplog.text
    check_loads(tmp_path / "b", many())


def test_a_warning_when_nothing_was_trained(tmp_path, caplog):
    """[nothing-trained]"""
    state = {"w": value("w", (8, 8)), "b": value("b", (8,)), "step": 1, "seen": torch.tensor([1])}
    with caplog.at_level(logging.WARNING, "dcp_native"):
        dcp.save(state, checkpoint_id=tmp_path / "0")
        state["step"], state["seen"] = 2, torch.tensor([2])
        dcp.save({**state, "w": state["w"] + 1}, checkpoint_id=tmp_path / "1")
        assert not caplog.records
        dcp.save({**state, "w": state["w"] + 1}, checkpoint_id=tmp_path / "2")
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert "not one of the 2 trainable tensors" in caplog.text
    report = dcp.last_report()
    assert report["trainable_items"] == report["trainable_unchanged"] == 2
    assert report["unchanged_items"] == 4 and report["compared_items"] == 4


def test_tensors_that_require_gradients_are_the_trainable_ones(tmp_path, caplog):
    frozen = value("f", (8, 8))
    state = {"w": value("w", (8, 8)).requires_grad_(), "frozen": frozen}
    with caplog.at_level(logging.WARNING, "dcp_native"):
        dcp.save(state, checkpoint_id=tmp_path)
        with torch.no_grad():
            state["w"] += 1
        dcp.save(state, checkpoint_id=tmp_path)
        assert dcp.last_report()["trainable_items"] == 1 and not caplog.records
        frozen += 1
        dcp.save(state, checkpoint_id=tmp_path)
    assert len(caplog.records) == 1


def test_the_metadata_of_a_linked_checkpoint_is_torchs(home):
    """Every record lies where stock torch looks for it, linked ones too."""
    state = many(5)
    dcp.save(state, checkpoint_id=home / "a")
    state["layer01"] = value("x", (500, 100))
    returned = dcp.save(state, checkpoint_id=home / "b", base=home / "a")
    metadata = pickle.loads((home / "b" / ".metadata").read_bytes())
    assert returned == metadata
    names = {info.relative_path for info in metadata.storage_data.values()}
    assert names == {p.name for p in data_files(home / "b")}
    full = dcp.save(state, checkpoint_id=home / "c")
    assert full.state_dict_metadata == metadata.state_dict_metadata
    assert full.planner_data == metadata.planner_data
    assert full.storage_data.keys() == metadata.storage_data.keys()


def test_settings_of_incremental_saves_are_checked():
    with pytest.raises(ValueError, match="incremental_links"):
        dcp.configure(incremental_links="soft")
