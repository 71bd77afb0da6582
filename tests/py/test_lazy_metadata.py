"""The Metadata that save returns behaves as torch's, is read when touched, and never too late.

Every test runs with the image in memory and with the file alone, as on the ranks that did not make
it.
"""

from __future__ import annotations

import copy
import dataclasses
import io
import os
import pickle
import shutil
import threading
import time
from collections.abc import Hashable

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from common import value
from torch.distributed.checkpoint.metadata import Metadata

import dcp_native as dcp
from dcp_native import _lazy_metadata
from dcp_native._lazy_metadata import LazyMetadata, lazy_metadata

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

STATE = {"w": value("w", (4, 3)), "n": {"step": 7, "m": [value("m", (2,)), "text"]}}


@pytest.fixture(params=["image", "file"])
def saved(request, tmp_path):
    """(makes a new untouched Metadata of one save, torch's own of the same checkpoint)"""
    path = tmp_path / "x"
    returned = dcp.save(STATE, checkpoint_id=path)
    assert type(returned) is LazyMetadata
    image = (path / ".metadata").read_bytes()
    save_id = dcp.last_report()["save_id"]
    held = image if request.param == "image" else None

    def lazy():
        fresh = lazy_metadata(held, str(path / ".metadata"), save_id)
        assert type(fresh) is LazyMetadata
        return fresh

    plain = pickle.loads(image)
    assert type(plain) is Metadata and returned == plain
    return lazy, plain


LOOKS = {
    "attribute": lambda m: m.version,
    "method of an attribute": lambda m: sorted(m.state_dict_metadata),
    "getattr of nothing": lambda m: getattr(m, "absent", "default"),
    "vars": lambda m: list(vars(m).items()),
    "dir": dir,
    "repr": repr,
    "str": str,
    "format": lambda m: f"{m}",
    "asdict fails on keys that become dicts": lambda m: raised(dataclasses.asdict, m),
    "asdict": lambda m: dataclasses.asdict(dataclasses.replace(m, storage_data=None)),
    "astuple": lambda m: dataclasses.astuple(dataclasses.replace(m, storage_data=None)),
    "replace": lambda m: dataclasses.replace(m, version="other"),
    "fields": lambda m: [f.name for f in dataclasses.fields(m)],
    "is_dataclass": dataclasses.is_dataclass,
    "match_args": lambda m: m.__match_args__,
    "isinstance": lambda m: isinstance(m, Metadata),
    "class": lambda m: m.__class__,
    "hash": lambda m: (raised(hash, m)[0], isinstance(m, Hashable)),
    "bool": bool,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickles": lambda m: [pickle.dumps(m, protocol) for protocol in range(6)],
    "reduce": lambda m: m.__reduce_ex__(2),
    "state": lambda m: m.__getstate__(),
    "type call": lambda m: type(m)({}, version="1"),
    "torch.save": lambda m: torch_saved(m),
}


def raised(function, *args):
    try:
        return None, function(*args)
    except Exception as error:
        return type(error), str(error)


def torch_saved(metadata):
    file = io.BytesIO()
    torch.save(metadata, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("look", LOOKS.values(), ids=LOOKS)
def test_every_look_at_it_shows_what_torchs_class_shows(saved, look):
    lazy, plain = saved
    untouched = look(lazy())
    touched = lazy()
    assert touched.version == plain.version
    assert untouched == look(plain) == look(touched)
    assert type(untouched) is type(look(plain))


def test_a_copy_is_shallow_or_deep_as_torchs(saved):
    lazy, plain = saved
    first = lazy()
    shallow, deep = copy.copy(first), copy.deepcopy(first)
    assert type(shallow) is type(deep) is Metadata
    assert shallow.state_dict_metadata is first.state_dict_metadata
    assert deep.state_dict_metadata is not first.state_dict_metadata
    del shallow.state_dict_metadata["w"]
    assert "w" not in first.state_dict_metadata and deep == plain


def test_it_matches_patterns(saved):
    lazy, plain = saved
    match lazy():
        case Metadata(state_dict_metadata, planner_data, version=version):
            assert (state_dict_metadata, planner_data, version) == (
                plain.state_dict_metadata,
                plain.planner_data,
                plain.version,
            )
        case _:
            raise AssertionError("no match")


def test_equality_holds_both_ways(saved):
    lazy, plain = saved
    assert lazy() == plain and plain == lazy() and lazy() == lazy()
    other = dataclasses.replace(plain, version="other")
    assert lazy() != other and other != lazy()
    assert (lazy() == other) is (other == lazy()) is False
    assert lazy() != 5 and lazy() != object() and (lazy() == "x") is False

    class Derived(Metadata):
        pass

    derived = Derived(**vars(plain))
    assert (lazy() == derived) == (plain == derived) and (derived == lazy()) == (derived == plain)


@pytest.mark.parametrize("touch_first", [False, True])
def test_it_can_be_changed_before_and_after_a_touch(saved, touch_first):
    lazy, plain = saved
    for change in (
        lambda m: setattr(m, "version", "mine"),
        lambda m: setattr(m, "state_dict_metadata", {}),
        lambda m: setattr(m, "extra", 3),
        lambda m: delattr(m, "planner_data"),
        lambda m: delattr(m, "state_dict_metadata"),
        lambda m: m.state_dict_metadata.pop("w"),
        lambda m: vars(m).update(version="through vars"),
    ):
        ours, torchs = lazy(), copy.deepcopy(plain)
        if touch_first:
            repr(ours)
        change(ours)
        change(torchs)
        assert vars(ours) == vars(torchs)
        for name in ("version", "planner_data", "state_dict_metadata", "extra"):
            assert raised(getattr, ours, name) == raised(getattr, torchs, name)
    ours, torchs = lazy(), copy.deepcopy(plain)
    assert raised(delattr, ours, "absent") == raised(delattr, torchs, "absent")


def test_once_touched_it_is_torchs_class_and_the_same_object(saved):
    lazy, plain = saved
    ours = lazy()
    alias = ours
    ours.storage_meta = None
    assert type(ours) is Metadata and alias is ours and alias.storage_meta is None
    assert set(vars(ours)) == set(vars(plain))


def test_nothing_is_unpickled_until_it_is_touched(tmp_path, monkeypatch):
    """[metadata-lazy]"""
    reads = []
    loads = pickle.loads
    monkeypatch.setattr(_lazy_metadata.pickle, "loads", lambda b: reads.append(1) or loads(b))
    metadata = dcp.save(STATE, checkpoint_id=tmp_path)
    future = dcp.async_save(STATE, checkpoint_id=tmp_path / "y")
    in_background = future.result()
    assert isinstance(metadata, Metadata) and not isinstance(metadata, dict)
    assert dataclasses.is_dataclass(metadata) and metadata.__class__ is Metadata
    assert reads == []
    assert metadata.state_dict_metadata == in_background.state_dict_metadata
    assert len(reads) == 2
    assert metadata.version and repr(metadata) and len(reads) == 2


def test_threads_that_touch_it_at_once_get_one_metadata(saved, monkeypatch):
    lazy, plain = saved
    loads, reads = pickle.loads, []

    def slow_loads(image):
        reads.append(1)
        time.sleep(0.05)
        return loads(image)

    monkeypatch.setattr(_lazy_metadata.pickle, "loads", slow_loads)
    ours, seen, start = lazy(), [], threading.Barrier(8)

    def touch(index):
        start.wait()
        if index % 2:
            seen.append(ours.state_dict_metadata)
        else:
            seen.append(vars(ours)["state_dict_metadata"])

    threads = [threading.Thread(target=touch, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(reads) == 1 and len(seen) == 8 and all(s is seen[0] for s in seen)
    assert ours == plain


LATE_LOOKS = {
    "attribute": lambda m: m.version,
    "repr": repr,
    "eq": lambda m: m == 1,
    "reflected eq": lambda m: Metadata({}) == m,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": pickle.dumps,
    "vars": vars,
    "replace": lambda m: dataclasses.replace(m, version=None),
    "setattr": lambda m: setattr(m, "version", None),
}


@pytest.mark.parametrize("look", LATE_LOOKS.values(), ids=LATE_LOOKS)
def test_a_checkpoint_that_is_gone_or_replaced_says_so(tmp_path, look):
    path = tmp_path / "x"
    dcp.save(STATE, checkpoint_id=path)
    lazy = lazy_metadata(None, str(path / ".metadata"), dcp.last_report()["save_id"])
    before = (path / ".metadata").read_bytes()
    dcp.save(STATE, checkpoint_id=path)
    with pytest.raises(RuntimeError, match=r"\.metadata now belongs to another save"):
        look(lazy)
    torch_dcp.save(STATE, checkpoint_id=path)
    with pytest.raises(RuntimeError, match=r"\.metadata now belongs to another save"):
        look(lazy)
    shutil.rmtree(path)
    with pytest.raises(RuntimeError, match=r"\.metadata was removed"):
        look(lazy)
    path.write_text("a file where the directory was")
    with pytest.raises(RuntimeError, match=r"can not be read: .*Not a directory"):
        look(lazy)
    path.unlink()
    path.mkdir()
    (path / ".metadata").write_bytes(before)
    assert lazy == pickle.loads(before)  # a refusal is not for ever


@pytest.mark.parametrize("use_collectives", [True, False])
def test_who_holds_the_image_needs_no_file(tmp_path, use_collectives):
    """With use_collectives=False every rank made its own."""
    path = tmp_path / "x"
    metadata = dcp.save(STATE, checkpoint_id=path, use_collectives=use_collectives)
    name = ".metadata" if use_collectives else "__0.metadata"
    plain = pickle.loads((path / name).read_bytes())
    dcp.save({"other": 1}, checkpoint_id=path, use_collectives=use_collectives)
    shutil.rmtree(path)
    assert metadata == plain


def test_a_relative_path_survives_a_change_of_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []
    monkeypatch.setattr(
        "dcp_native._save.lazy_metadata", lambda image, path, save_id: seen.append(path)
    )
    dcp.save(STATE, checkpoint_id="x")
    assert seen == [os.path.join(os.getcwd(), "x", ".metadata")]
