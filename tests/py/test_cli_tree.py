"""The tree that inspect shows: compared with a plain definition of it, over random keys."""

from __future__ import annotations

import pickle
import random
from typing import Any

import cli
import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from dcp_native import _native
from dcp_native._cli import tree
from dcp_native._cli.checkpoint import Entry


class OneFile:
    """As much of a checkpoint as rows ask for."""

    @staticmethod
    def files_count(entry: Entry) -> int:
        return 1


def entry_of(key: str, dtype: str = "float32", shape: Any = (2,), size: int = 8) -> Entry:
    return Entry(key, dtype, shape, 4, size, size, 0, 1)


# ---- the definition ----

Nested = dict[str, "Nested"]


def nested(keys: dict[str, Entry], prefix: str = "") -> Nested:
    """Parts of keys below a prefix, in the order in which they come up."""
    names = dict.fromkeys(
        key[len(prefix) :].split(".")[0] for key in keys if key.startswith(prefix) or not prefix
    )
    return {name: nested(keys, f"{prefix}{name}.") for name in names}


def look(keys: dict[str, Entry], path: str, below: Nested) -> Any:
    own = keys.get(path)
    kind = None if own is None else (own.dtype, own.shape)
    return kind, tuple((n, look(keys, f"{path}.{n}", inner)) for n, inner in below.items())


def size_of(keys: dict[str, Entry], path: str) -> int:
    return sum(e.size_bytes for k, e in keys.items() if k == path or k.startswith(f"{path}."))


def expected(
    keys: dict[str, Entry], merge: bool, below: Nested, prefix: str = ""
) -> list[tuple[list[tuple[str, ...]], Entry | None, int, list]]:
    """(names of each part, entry, bytes, what is below) of each row."""
    groups: dict[Any, list[str]] = {}
    for name, inner in below.items():
        is_number = name.isascii() and name.isdecimal()
        alike = look(keys, prefix + name, inner) if merge and is_number else name
        groups.setdefault(alike, []).append(name)
    rows = []
    for names in groups.values():
        path = prefix + names[0]
        inner = expected(keys, merge, below[names[0]], f"{path}.")
        size = sum(size_of(keys, prefix + name) for name in names)
        own = keys.get(path)
        if own is None and len(inner) == 1:
            parts, own, _, inner = inner[0]
            rows.append(([tuple(names), *parts], own, size, inner))
        else:
            rows.append(([tuple(names)], own, size, inner))
    return rows


def plain(row: tuple) -> tuple:
    """A row of ours as the definition has it, its count of rows checked."""
    parts, entry, size, below, children = row
    assert below == sum(1 + child[3] for child in children)
    names = [part if isinstance(part, tuple) else (part,) for part in parts]
    return names, entry, size, list(map(plain, children))


NAMES = ["a", "b", "0", "1", "2", "3", "10", "007", "w", "", "n\u00e9", "\udcff"]


@pytest.mark.parametrize("merge", [False, True])
@pytest.mark.parametrize("seed", range(300))
def test_the_tree_is_what_its_definition_says(seed, merge):
    rng = random.Random(seed)
    names = rng.sample(NAMES, rng.randint(2, len(NAMES)))
    keys = {}
    for _ in range(rng.randint(1, 40)):
        key = ".".join(rng.choice(names) for _ in range(rng.randint(1, 5)))
        shape = rng.choice([(1,), (2, 2), None])
        keys[key] = entry_of(key, rng.choice(["float32", "int8"]), shape, rng.randint(0, 99))
    found = _native.key_tree(list(keys.values()), merge)
    assert list(map(plain, found)) == expected(keys, merge, nested(keys))


def test_alike_layers_are_one_row_with_their_ranges():
    keys = [entry_of(f"m.layers.{i}.{w}") for i in (0, 1, 2, 5, 7, 8) for w in ("q", "k")]
    keys += [entry_of("m.layers.6.q", shape=(3,)), entry_of("m.norm")]
    rows = list(tree.rows(OneFile(), tree.build(keys)))
    assert [row[0] for row in rows] == [
        "m", "├─ layers", "│  ├─ 0-2,5,7-8", "│  │  ├─ q", "│  │  └─ k", "│  └─ 6.q", "└─ norm",
    ]  # fmt: skip
    assert rows[2][2:4] == ("6 alike", "96 B")
    whole = tree.build(keys, every=True)
    assert whole.below_count == len(list(tree.rows(OneFile(), whole))) == 2 + 6 * 3 + 2


def test_a_row_named_like_a_range_is_no_other_row():
    keys = [entry_of(f"x.{i}") for i in ("0", "1", "0-1", "2")]
    rows = [row[0] for row in tree.rows(OneFile(), tree.build(keys))]
    assert rows == ["x", "├─ 0-2", "└─ 0-1"]


def test_what_is_no_entry_is_refused():
    for wrong in ([1], [("k", None)], [(1, None, (), 1, 1)], [("k", None, [], 1, 1)], 5):
        with pytest.raises(TypeError):
            _native.key_tree(wrong, True)
    over = entry_of("a", size=1 << 70)
    assert _native.key_tree([over, entry_of("b")], True)[0][2] == (1 << 64) - 1


def test_branches_of_any_depth_end_in_one_line(tmp_path):
    """Of keys that nobody has: each dot of the longest is a branch."""
    keys = ["a" + ".a" * depth + tail for depth in range(3000) for tail in (".x", ".y")]
    chunk = [ChunkStorageMetadata(torch.Size([0]), torch.Size([1]))]
    tensor = TensorStorageMetadata(TensorProperties(dtype=torch.float32), torch.Size([1]), chunk)
    records = {
        MetadataIndex(key, torch.Size([0]), 0): _StorageInfo("__0_0.distcp", 8 * i, 8)
        for i, key in enumerate(keys)
    }
    metadata = Metadata(dict.fromkeys(keys, tensor), None, records)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(metadata))
    done = cli.run("inspect", tmp_path)
    assert done.status == 2 and "branch too often" in done.err and "Traceback" not in done.err
    assert cli.run("inspect", tmp_path, "--json").status == 0
