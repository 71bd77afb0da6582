"""One program under torch and under dcp_native: same results, same exceptions (type and text).

A case may differ only by an id of docs/differences.md, and every id must be met by some test.
"""

from __future__ import annotations

import re
import warnings

import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from common import like, value
from conftest import ROOT

import dcp_native as dcp

DIFFERENCES = {
    m[1]
    for m in re.finditer(r"^\| `([\w-]+)` \|", (ROOT / "docs/differences.md").read_text(), re.M)
}


def describe(error: BaseException) -> object:
    if isinstance(error, torch_dcp.CheckpointException):
        return (
            "CheckpointException",
            error.args[0],
            {rank: (type(e), str(e)) for rank, (e, _) in error.failures.items()},
        )
    return type(error), str(error)


def outcome(program, module, path):
    """What the program returns or raises, and the warnings it gives."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = ("value", program(module, path))
        except BaseException as error:
            result = ("error", describe(error))
    texts = sorted(str(w.message).replace(str(path), "PATH") for w in caught)
    return result, texts


def base(module, path):
    sd = {"w": value("w", (4, 3)), "n": {"step": 1}}
    module.save(sd, checkpoint_id=path)
    return sd


def save_simple(module, path):
    return list(base(module, path))


def save_twice_warns(module, path):
    base(module, path)
    base(module, path)


def overwrite_false(module, path):
    base(module, path)
    module.save({"w": torch.ones(1)}, storage_writer=module.FileSystemWriter(path, overwrite=False))


def no_target(module, path):
    module.save({"w": torch.ones(1)})


def duplicate_key(module, path):
    module.save({"a": {"b": 1}, "a.b": 2}, checkpoint_id=path)


def unpicklable(module, path):
    module.save({"f": lambda: 0}, checkpoint_id=path)


def missing_key(module, path):
    base(module, path)
    module.load({"absent": torch.zeros(1)}, checkpoint_id=path)


def wrong_size(module, path):
    base(module, path)
    module.load({"w": torch.zeros(3, 4)}, checkpoint_id=path)


def object_for_tensor(module, path):
    base(module, path)
    module.load({"w": 5}, checkpoint_id=path)


def tensor_for_object(module, path):
    base(module, path)
    target = {"n": {"step": torch.zeros(2)}}
    module.load(target, checkpoint_id=path)
    return target


def load_absent(module, path):
    module.load({"w": torch.zeros(4, 3)}, checkpoint_id=path / "nothing")


def positional_arguments(module, path):
    module.save({"w": torch.ones(2)}, module.FileSystemWriter(path))
    target = {"w": torch.zeros(2)}
    module.load(target, module.FileSystemReader(path))
    return target["w"].tolist()


def deprecated_functions(module, path):
    module.save_state_dict({"w": torch.ones(2)}, module.FileSystemWriter(path), no_dist=True)
    target = {"w": torch.zeros(2)}
    module.load_state_dict(target, module.FileSystemReader(path), no_dist=True)
    return target["w"].tolist()


def save_to_a_file(module, path):
    (path / "file").write_text("x")
    try:
        module.save({"w": torch.ones(2)}, checkpoint_id=path / "file")
    except torch_dcp.CheckpointException as error:
        return error.args[0], sorted(error.failures), type(error.failures[0][0]).__mro__[1]


def stateful_raises(module, path):
    class App:
        def state_dict(self):
            raise KeyError("raw")

        def load_state_dict(self, state_dict):
            pass

    module.save({"app": App()}, checkpoint_id=path)


def use_collectives_false(module, path):
    module.save({"w": torch.ones(2)}, checkpoint_id=path, use_collectives=False)
    target = {"w": torch.zeros(2)}
    module.load(target, checkpoint_id=path)
    return target["w"].tolist(), sorted(p.name for p in path.glob("*.metadata"))


def empty_state_dict(module, path):
    module.save({}, checkpoint_id=path)
    module.load({}, checkpoint_id=path)


def nested_containers(module, path):
    sd = {
        "d": {"x": [1, [torch.ones(2)], {"y": (torch.ones(1), 2)}], 3: {4: "z"}, "e": {}, "l": []},
        "deep": {"a": {"b": {"c": torch.arange(3)}}},
    }
    metadata = module.save(sd, checkpoint_id=path)
    target = like(sd)
    module.load(target, checkpoint_id=path)
    return repr(target), sorted(metadata.state_dict_metadata), metadata.planner_data


PROGRAMS = [
    save_simple, save_twice_warns, overwrite_false, no_target, duplicate_key, missing_key,
    wrong_size, object_for_tensor, tensor_for_object, load_absent, positional_arguments,
    deprecated_functions, save_to_a_file, stateful_raises, use_collectives_false, empty_state_dict,
    nested_containers, unpicklable,
]  # fmt: skip


DIFFERS = {
    # [objects-early]
    unpicklable: lambda text: text.replace(
        "'CheckpointException', 'plan'", "'CheckpointException', 'write'"
    ),
}
"""Programs whose outcome differs by an id of docs/differences.md, and how to get torch's."""


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda p: p.__name__)
def test_same_result_same_exception_same_warnings(program, tmp_path):
    outcomes = []
    for module, name in ((torch_dcp, "t"), (dcp, "o")):
        path = tmp_path / name
        path.mkdir()
        result, texts = outcome(program, module, path)
        outcomes.append((repr(result).replace(str(path), "PATH"), texts))
    if program in DIFFERS:
        assert outcomes[1] != outcomes[0], "no longer different: strike it from the list"
        outcomes[1] = (DIFFERS[program](outcomes[1][0]), outcomes[1][1])
    assert outcomes[1] == outcomes[0]


def test_every_difference_is_met_by_a_test():
    folders = (ROOT / "tests/py", ROOT / "tests/cuda")
    tests = "".join(path.read_text() for folder in folders for path in folder.rglob("*.py"))
    assert [d for d in sorted(DIFFERENCES) if f"[{d}]" not in tests] == []
