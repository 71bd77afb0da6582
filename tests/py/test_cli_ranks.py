"""Values of checkpoints whose ranks saved apart: each box from who holds it, or an error."""

from __future__ import annotations

import dataclasses
import pickle
import random
import warnings

import cli
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as torch_dcp
from torch.distributed.checkpoint.metadata import MetadataIndex, TensorStorageMetadata

from dcp_native._cli.checkpoint import Checkpoint
from dcp_native._cli.values import Reader, whole


def apart(path, *ranks):
    """What each rank saves alone: values by key; of a shard (shape of all, offsets, values)."""
    path.mkdir()
    for rank, values in enumerate(ranks):
        flat = {key: v[2] if isinstance(v, tuple) else v for key, v in values.items()}
        part = path / f"rank-{rank}"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch_dcp.save(flat, checkpoint_id=part, use_collectives=False)
        (part / "__0_0.distcp").rename(path / f"__{rank}_0.distcp")
        metadata = pickle.loads((part / "__0.metadata").read_bytes())
        _place(metadata, f"__{rank}_0.distcp", values)
        (path / f"__{rank}.metadata").write_bytes(pickle.dumps(metadata))
        (part / "__0.metadata").unlink()
        part.rmdir()
    return path


def _place(metadata, file, values):
    for index, info in list(metadata.storage_data.items()):
        moved = dataclasses.replace(info, relative_path=file)
        del metadata.storage_data[index]
        value = values[index.fqn]
        if isinstance(value, tuple):
            size, offsets, _ = value
            kept = metadata.state_dict_metadata[index.fqn]
            chunk = dataclasses.replace(kept.chunks[0], offsets=torch.Size(offsets))
            metadata.state_dict_metadata[index.fqn] = TensorStorageMetadata(
                kept.properties, torch.Size(size), [chunk]
            )
            index = MetadataIndex(index.fqn, torch.Size(offsets), 0)
        metadata.storage_data[index] = moved


def shard(tensor, *slices):
    """A part of a tensor, as ``apart`` takes it."""
    return tuple(tensor.shape), tuple(s.start for s in slices), tensor[slices].clone()


def read(path, key="w"):
    checkpoint = Checkpoint(path)
    (tensor,) = Reader(checkpoint).read([whole(checkpoint.entry(key))])
    return tensor


W = torch.arange(48.0).reshape(6, 8)


def test_a_box_that_several_hold_does_not_count_for_one_that_nobody_holds(tmp_path):
    top = shard(W, slice(0, 3), slice(0, 8))
    path = apart(tmp_path / "c", {"w": top}, {"w": top})
    for argv in (
        ("cat", path, "w"),
        ("diff", path, path),
        ("convert", path, tmp_path / "hf", "--to=hf"),
    ):
        done = cli.run(*argv)
        assert done.status == 1 and done.out == "", done
        assert "no chunk holds [3:6, 0:8]" in done.err
    done = cli.run("cat", path, "w", "--slice", "0:3", "--json")
    assert done.json["values"] == W[:3].tolist()
    assert cli.run("cat", path, "w", "--slice", "2:4").status == 1


@pytest.mark.parametrize("seed", range(30))
def test_boxes_that_overlap_give_the_tensor_or_name_a_true_hole(tmp_path, seed):
    dice = random.Random(seed)
    parts, held = [], torch.zeros(W.shape, dtype=torch.bool)
    for _ in range(dice.choice((2, 3, 6, 9))):
        spans = [sorted(dice.sample(range(n + 1), 2)) for n in W.shape]
        box = tuple(slice(*span) for span in spans)
        parts.append({"w": shard(W, *box)})
        held[box] = True
    path = apart(tmp_path / "c", *parts)
    for rows in (slice(0, 6), slice(1, 3), slice(4, 6)):
        done = cli.run("cat", path, "w", "--json", "--slice", f"{rows.start}:{rows.stop}")
        if bool(held[rows].all()):
            assert done.status == 0 and done.json["values"] == W[rows].tolist(), done
            continue
        assert done.status == 1
        hole = done.err.partition("no chunk holds ")[2].partition("]")[0].strip("[")
        named = tuple(slice(*map(int, span.split(":"))) for span in hole.split(", "))
        assert held[named].numel() and not held[named].any(), done.err


def test_copies_of_all_ranks_are_one_if_they_are_equal(tmp_path):
    values = {"w": W, "s": torch.tensor(3), "none": torch.zeros(0, 2), "o": [0.1, "a"]}
    values["nan"] = torch.tensor([torch.nan, 1.0])
    path = apart(tmp_path / "c", values, values, values)
    assert torch.equal(read(path), W) and read(path, "s") == 3
    assert cli.run("cat", path, "o").out == "[0.1, 'a']\n"
    assert cli.run("diff", path, path).status == 0
    done = cli.run("convert", path, tmp_path / "hf", "--to", "hf", "--skip-objects")
    assert done.status == 0, done
    (file,) = (tmp_path / "hf").glob("*.safetensors")
    assert torch.equal(safetensors.torch.load_file(file)["w"], W)


def test_copies_that_differ_are_never_chosen_from_in_silence(tmp_path):
    other = W.clone()
    other[5, 7] = -1.0
    path = apart(tmp_path / "c", {"w": W, "o": 1, "x": W[0]}, {"w": other, "o": 2, "x": W[:2]})
    for argv in (
        ("cat", path, "w"), ("cat", path, "o"), ("diff", path, path),
        ("convert", path, tmp_path / "hf", "--to", "hf", "--skip-objects"),
    ):  # fmt: skip
        done = cli.run(*argv)
        assert done.status == 1 and done.out == "" and "--rank N" in done.err, done
    assert cli.run("cat", path, "w", "--slice", "0:5").status == 0  # there they agree
    for rank, (w, o, x) in enumerate(((W, 1, W[0]), (other, 2, W[:2]))):
        assert cli.run("cat", path, "w", "--rank", rank, "--json").json["values"] == w.tolist()
        assert cli.run("cat", path, "o", "--rank", rank).out == f"{o}\n"
        assert cli.run("cat", path, "x", "--rank", rank, "--json").json["values"] == x.tolist()
        assert cli.run("diff", path, path, "--rank", rank).status == 0
        hf = tmp_path / f"hf-{rank}"
        argv = ("convert", path, hf, "--to", "hf", "--skip-objects", "--rank", rank)
        assert cli.run(*argv).status == 0
        (file,) = hf.glob("*.safetensors")
        assert torch.equal(safetensors.torch.load_file(file)["w"], w)
    keys = {entry["key"] for entry in cli.run("inspect", path, "--json").json["entries"]}
    assert keys == {"w", "o", "x", "x (rank 1)"}
    assert cli.run("inspect", path).status == 0
    assert cli.run("cat", path, "x (rank 1)", "--json").json["values"] == W[:2].tolist()


def test_a_rank_that_there_is_not_is_said_in_one_line(tmp_path):
    path = apart(tmp_path / "c", {"w": W}, {"w": W})
    done = cli.run("cat", path, "w", "--rank", 2)
    assert done.status == 1 and "rank 2 saved nothing" in done.err
    together = cli.save(tmp_path / "d", {"w": W})
    done = cli.run("inspect", together, "--rank", 0)
    assert done.status == 2 and "all ranks together" in done.err
    assert cli.run("convert", path, tmp_path / "x.pt", "--rank", 0).status == 2
