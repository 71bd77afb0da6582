"""Stateful values are told from the rest as torch's protocol tells them, and torch's sinks hear of
each."""

from __future__ import annotations

import collections
import logging
import types

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint import state_dict_saver as torchs
from torch.distributed.checkpoint.logger import _dcp_logger
from torch.distributed.checkpoint.stateful import Stateful

import dcp_native as dcp
from dcp_native import _stateful, _stock


class Both:
    def __init__(self, state=None):
        self.state = {} if state is None else state

    def state_dict(self):
        return self.state

    def load_state_dict(self, state):
        self.state = state


class OnlyOne:
    def state_dict(self):
        return {}


class Dynamic:
    def __getattr__(self, name):
        return lambda *args: {}


class DictWithBoth(dict, Both):
    pass


class TensorWithBoth(torch.Tensor):
    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def with_attributes(value, *names):
    for name in names:
        setattr(value, name, lambda *args: {})
    return value


VALUES = [
    torch.ones(2), torch.nn.Parameter(torch.ones(2)), torch.nn.Buffer(torch.ones(2)),
    torch.ones(2).as_subclass(TensorWithBoth), {}, DictWithBoth(), collections.OrderedDict(), [],
    (), 1, 1.5, True, "text", b"bytes", None, Both(), Both, OnlyOne(), Dynamic(),
    torch.nn.Linear(1, 1), torch.optim.SGD([torch.nn.Parameter(torch.ones(1))]),
    with_attributes(torch.ones(1), "state_dict", "load_state_dict"),
    with_attributes(torch.nn.Parameter(torch.ones(1)), "state_dict", "load_state_dict"),
    with_attributes(torch.ones(1), "state_dict"),
    types.SimpleNamespace(state_dict=1, load_state_dict=2), torch.Size([1]), torch.float32,
]  # fmt: skip


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_stateful_is_what_torchs_protocol_says(value):
    assert _stateful.is_stateful(value) == isinstance(value, Stateful)


STATE = {"app": Both({"w": torch.ones(3)}), "tensor": torch.ones(2), "plain": {"a": 1}}


def test_the_copy_is_torchs():
    mine, theirs = (f(STATE) for f in (_stateful._stateful_to_state_dict, both_of_torch))
    assert list(mine) == list(theirs) and mine is not STATE
    assert all(mine[key] is theirs[key] for key in mine)


def both_of_torch(state):
    return torchs._stateful_to_state_dict(state)


def test_without_a_listener_torchs_events_are_not_made(monkeypatch):
    monkeypatch.setattr(_dcp_logger, "handlers", [logging.NullHandler()])  # not pytest's
    monkeypatch.setattr(
        _stock.state_dict_saver, "_stateful_to_state_dict", lambda state: pytest.fail("called")
    )
    _stateful._stateful_to_state_dict(STATE)


@pytest.fixture(params=["handler", "parent's handler", "filter"])
def heard(request):
    names: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record):
            self.filter(record)

        def filter(self, record):
            if record.name == _dcp_logger.name:
                names.append(record.msg["func_name"])
            return True

    listener, root = Listener(), logging.getLogger()
    propagate = _dcp_logger.propagate
    if request.param == "handler":
        _dcp_logger.addHandler(listener)
    elif request.param == "filter":
        _dcp_logger.addFilter(listener)
    else:
        root.addHandler(listener)
        _dcp_logger.propagate = True
    yield names
    _dcp_logger.propagate = propagate
    _dcp_logger.removeFilter(listener)
    for logger in (_dcp_logger, root):
        logger.removeHandler(listener)


def test_a_listener_hears_of_every_key_as_from_torch(heard, tmp_path):
    def of(module, name):
        del heard[:]
        module.save(STATE, checkpoint_id=tmp_path / name, no_dist=True)
        module.async_save(STATE, checkpoint_id=tmp_path / f"{name}-a", no_dist=True).result(60)
        return {event for event in heard if "stateful" in event}

    theirs = of(torch_dcp, "theirs")
    assert "_stateful_to_state_dict.tensor" in theirs
    assert of(dcp, "ours") == theirs


def test_what_a_state_dict_raises_reaches_the_caller(tmp_path):
    class Fails(Both):
        def state_dict(self):
            raise LookupError("of the program")

    with pytest.raises(LookupError, match="of the program"):
        dcp.save({"a": Fails()}, checkpoint_id=tmp_path / "c", no_dist=True)
