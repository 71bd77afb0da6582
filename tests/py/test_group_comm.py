"""How a group chooses what to talk over, where no collective is needed to show it: the rest is in
tests/cuda."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from dcp_native import _group_comm


def test_an_interrupt_of_a_choice_that_fails_is_heard_at_once_and_only_once(monkeypatch):
    cpu = SimpleNamespace(error=None, coordinator_rank=0)

    class Talk:
        def __init__(self, *unused):
            pass

        def choose(self, has_use):
            cpu.error = KeyboardInterrupt()
            raise RuntimeError("a rank is gone")

    monkeypatch.setattr(_group_comm, "_Talk", Talk)
    comm = object.__new__(_group_comm.GroupComm)
    with pytest.raises(KeyboardInterrupt) as raised:
        comm._settle(cpu, None, {}, True)
    assert str(raised.value.__cause__) == "a rank is gone"
    assert cpu.error is None
