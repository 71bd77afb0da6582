"""The memory that stagers keep: used again, never while anyone holds it, never growing."""

from __future__ import annotations

import gc
import resource
import signal
import threading
import weakref

import pytest
import torch
from torch.distributed.checkpoint import _state_dict_stager as torch_state_dict_stager

from dcp_native import _native, _state_dict_stager
from dcp_native._state_dict_stager import StateDictStager
from dcp_native.staging import BlockingAsyncStager


def base() -> torch.Tensor:
    return torch.arange(24.0).reshape(4, 6)


def state_of(count: int = 20) -> dict[str, torch.Tensor]:
    return {str(i): torch.full((1 << 14,), float(i)) for i in range(count)}


def places(staged: dict[str, torch.Tensor]) -> list[int]:
    return [t.data_ptr() for t in staged.values()]


@pytest.mark.parametrize("share", [False, True])
def test_memory_is_used_again_over_10_stages(share):
    state, stager = state_of(), StateDictStager(share_memory=share)
    first = places(stager.stage(state))
    for step in range(10):
        for tensor in state.values():
            tensor.fill_(step)
        staged = stager.stage(state)
        assert places(staged) == first
        assert all(bool((t == step).all()) for t in staged.values())
        del staged


def holders(staged):
    tensor = staged["x"]
    yield "tensor", tensor
    yield "view", tensor[3:]
    yield "alias", tensor.detach()
    yield "storage", tensor.untyped_storage()
    yield "typed storage", tensor.storage()
    yield "array", tensor.numpy()
    yield "memory view", memoryview(tensor.numpy())


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize(
    "make", [StateDictStager, lambda: BlockingAsyncStager(cache_staged_state_dict=True)]
)
def test_what_anyone_still_holds_is_never_overwritten(make):
    """[stager-memory]"""
    state, stager = {"x": base()}, make()
    names = [name for name, _ in holders(stager.stage(state))]
    for name in names:
        staged = stager.stage(state)
        place = staged["x"].data_ptr()
        held = dict(holders(staged))[name]
        del staged
        for _ in range(3):
            assert stager.stage(state)["x"].data_ptr() != place, name
        del held
    assert len({stager.stage(state)["x"].data_ptr() for _ in range(5)}) == 1
    torchs = torch_state_dict_stager.StateDictStager()
    kept = torchs.stage(state)["x"]
    assert torchs.stage(state)["x"].data_ptr() == kept.data_ptr(), "torch has changed"


def kept_bytes(stager: StateDictStager) -> int:
    return sum(s.nbytes() for kept in stager._cached_storage_mapping.values() for s in kept)


def test_nothing_grows_over_200_stages():
    state, stager = state_of(4), StateDictStager()
    total = sum(t.nbytes for t in state.values())
    held: list[object] = []
    for step in range(200):
        fresh = {"fresh": torch.ones(1000)}  # a source that is new at every step
        held = [*held[-(step % 4) :], stager.stage({**state, **fresh})]
        assert kept_bytes(stager) <= 2 * (total + 4000)
    held.clear()
    del fresh
    stager.stage(state)
    assert kept_bytes(stager) == total  # what was taken for overlaps is gone


def test_the_memory_of_a_dead_source_goes_with_it():
    state, stager = state_of(), StateDictStager()
    stager.stage(state)
    gc.disable()
    try:
        del state["0"]
        assert len(stager._cached_storage_mapping) == len(state)
        state.clear()
        assert kept_bytes(stager) == 0
    finally:
        gc.enable()


def test_a_source_that_changed_its_size_gets_memory_of_that_size():
    tensor, stager = torch.ones(10), StateDictStager()
    stager.stage([tensor])
    tensor.resize_(1000).fill_(2)
    got = stager.stage([tensor])[0]
    assert got.equal(tensor) and kept_bytes(stager) == 4000


def test_shared_memory_leaves_half_of_the_descriptors(monkeypatch):
    """[stager-descriptors]"""
    gc.collect()
    taken = len(_state_dict_stager.allocate_shared.__globals__["_shared"])
    limit = (2 * (taken + 5), 1 << 20)
    monkeypatch.setattr(resource, "getrlimit", lambda which: limit)
    state = state_of(8)
    staged = StateDictStager(share_memory=True).stage(state)
    assert [t.is_shared() for t in staged.values()] == [True] * 5 + [False] * 3
    assert all(staged[key].equal(state[key]) for key in state)


def test_a_stager_dies_without_the_garbage_collector():
    gc.disable()
    try:
        stager = StateDictStager()
        ended = threading.Event()
        weakref.finalize(stager, ended.set)
        stager.stage({"a": [base()]})
        del stager
        assert ended.is_set()
    finally:
        gc.enable()


@pytest.mark.parametrize("shared_stager", [False, True])
def test_stagers_in_parallel_do_not_mix(shared_stager):
    states = [{"x": torch.full((1 << 18,), float(i)), "n": i} for i in range(2)]
    one = StateDictStager()
    failures: list[object] = []

    def work(i: int) -> None:
        stager = one if shared_stager else StateDictStager()
        try:
            for _ in range(20):
                mine, both_staged = stager.stage(states[i]), stager.stage(states)
                assert bool((mine["x"] == i).all()) and mine["n"] == i
                assert [float(s["x"][-1]) for s in both_staged] == [0.0, 1.0]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures and not any(t.is_alive() for t in threads)


def test_copy_storages_checks_all_before_it_copies():
    a, b = torch.zeros(4), torch.ones(4)
    wrong = {
        "resized": (torch.zeros(5), torch.ones(4)),
        "no plain memory": (torch.empty(4, device="meta"), torch.ones(4)),
        "of tensors": (1, torch.ones(4)),
        "pairs": [a, b],
    }
    for text, pair in wrong.items():
        with pytest.raises((ValueError, TypeError), match=text):
            _native.copy_storages([(a, b), pair])
        assert a.equal(torch.zeros(4))
    _native.copy_storages(iter([(a[2:], b[:0])]))
    assert a.equal(b)
    lazy = torch._lazy_clone(b)
    _native.copy_storages([(a, lazy)])
    assert torch._C._is_cow_tensor(lazy)


def test_copy_storages_serves_signals_and_lets_other_threads_run():
    class Rung(Exception):
        pass

    def ring(*unused):
        raise Rung

    before = signal.signal(signal.SIGALRM, ring)
    a, b, last = torch.zeros(1 << 18), torch.ones(1 << 18), torch.zeros(4)
    hours = [(a, b)] * 1_000_000 + [(last, torch.ones(4))]
    bell = threading.Timer(0.05, signal.raise_signal, (signal.SIGALRM,))  # a thread of Python
    try:
        with pytest.raises(Rung):
            bell.start()
            _native.copy_storages(hours)
    finally:
        bell.join()
        signal.signal(signal.SIGALRM, before)
    assert last.equal(torch.zeros(4)), "it was not interrupted"
