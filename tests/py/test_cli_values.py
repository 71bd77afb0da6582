"""diff, cat, convert: values that come out of checkpoints are those that went in."""

from __future__ import annotations

import math
import os
import random

import cli
import numpy
import pytest
import safetensors.torch
import torch
import torch.distributed.checkpoint as torch_dcp
from conftest import GOLDEN

import dcp_native as dcp
from dcp_native._cli import compare, diff
from dcp_native._cli.checkpoint import Checkpoint
from dcp_native._cli.values import Reader, whole, windows


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return cli.save(tmp_path_factory.mktemp("values") / "a")


def differences(a, b, *options):
    found = cli.run("diff", a, b, "--json", *options)
    assert found.status == (0 if found.json["equal"] else 1)
    return {(c["key"], c["kind"]): c for c in found.json["changes"]}


# ---- diff ----


def test_a_checkpoint_equals_itself_and_stock_torchs_copy_of_it(ours, tmp_path):
    stock = cli.save(tmp_path / "stock", cli.state(), torch_dcp)
    assert differences(ours, ours) == {}
    assert differences(ours, stock) == {} == differences(stock, ours)


def test_releases_of_torch_wrote_the_same_values():
    paths = sorted(GOLDEN.glob("*/sharded"))
    for path in paths[1:]:
        assert differences(paths[0], path) == {}, path


def test_every_kind_of_change_is_found(ours, tmp_path):
    values = cli.state()
    model = values["model"]
    del model["layers.3.norm"]
    model["new"] = torch.ones(2)
    model["layers.0.norm"] = torch.zeros(9)
    model["layers.1.norm"] = model["layers.1.norm"].double()
    model["layers.2.norm"] = model["layers.2.norm"] + 0.25
    values["step"], values["name"] = 101, torch.ones(1)
    found = differences(ours, cli.save(tmp_path / "b", values))
    assert set(found) == {
        ("model.layers.3.norm", "removed"), ("model.new", "added"),
        ("model.layers.0.norm", "shape"), ("model.layers.1.norm", "dtype"),
        ("model.layers.2.norm", "values"), ("step", "values"), ("name", "type"),
    }  # fmt: skip
    changed = found["model.layers.2.norm", "values"]
    assert changed["differing"] == changed["elements"] == 8
    assert changed["max_abs"] == pytest.approx(0.25, rel=1e-5)
    no_values = differences(ours, tmp_path / "b", "--no-values")
    assert ("step", "values") not in no_values and ("model.new", "added") in no_values
    assert differences(ours, tmp_path / "b", "--keys", "model.embed") == {}


def test_thresholds_decide_what_counts(tmp_path):
    a = cli.save(tmp_path / "a", {"w": torch.tensor([1.0, 100.0, -5.0])})
    b = cli.save(tmp_path / "b", {"w": torch.tensor([1.5, 101.0, -5.0])})
    assert differences(a, b)["w", "values"]["differing"] == 2
    assert differences(a, b)["w", "values"]["max_rel"] == 0.5
    assert differences(a, b, "--threshold", 0.5)["w", "values"]["differing"] == 1
    assert differences(a, b, "--threshold", 1) == {} == differences(a, b, "--relative", 0.5)


def test_nans_and_infinities(tmp_path):
    inf, nan = math.inf, math.nan
    a = cli.save(tmp_path / "a", {"w": torch.tensor([nan, nan, inf, inf, 0.0, 1.0])})
    b = cli.save(tmp_path / "b", {"w": torch.tensor([nan, 1.0, inf, -inf, -0.0, 1.0])})
    found = differences(a, b, "--threshold", 1e30)["w", "values"]
    assert (found["differing"], found["nans_a"], found["nans_b"]) == (2, 2, 1)
    assert found["max_abs"] == "inf"
    assert differences(a, a) == {}


def test_an_infinity_is_near_nothing_else(tmp_path):
    a = cli.save(tmp_path / "a", {"w": torch.tensor([math.inf, 1.0])})
    b = cli.save(tmp_path / "b", {"w": torch.tensor([5.0, 1.0])})
    assert cli.run("diff", a, b, "--relative", "0.5").status == 1
    assert cli.run("diff", b, a, "--relative", "0.5").status == 1
    assert cli.run("diff", a, a, "--relative", "0.5").status == 0


def test_tensors_without_elements_may_change_their_dtype(tmp_path):
    a = cli.save(tmp_path / "a", {"w": torch.ones(2), "none": torch.ones(0, 3)})
    b = cli.save(tmp_path / "b", {"w": torch.ones(2), "none": torch.ones(0, 3).bfloat16()})
    found = cli.run("diff", a, b)
    assert found.status == 1 and "none" in found.out


def test_half_complex_values_keep_both_parts(tmp_path):
    numpy = pytest.importorskip("numpy")
    values = torch.tensor([1 + 2j, -3 - 4j], dtype=torch.complex64)
    path = cli.save(tmp_path / "c", {"z": values.to(torch.complex32)})
    assert cli.run("cat", path, "z", "--json").json["values"] == [[1.0, 2.0], [-3.0, -4.0]]
    assert cli.run("cat", path, "z", "-o", tmp_path / "z.npy").status == 0
    assert numpy.load(tmp_path / "z.npy").tolist() == values.tolist()


def test_what_each_rank_saved_for_itself_is_not_converted_as_rank_0s(tmp_path):
    path = cli.save(tmp_path / "c", {"w": torch.ones(2)})
    (path / ".metadata").rename(path / "__0.metadata")
    (path / "__1.metadata").write_bytes((path / "__0.metadata").read_bytes())
    for target in ("out.pt", "c"):
        argv = ("--files", 2, "--overwrite") if target == "c" else ()
        done = cli.run("convert", path, tmp_path / target, *argv)
        assert done.status == 1 and "each rank for itself" in done.err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["c"]


def test_long_integers_are_compared_exactly(tmp_path):
    a = cli.save(tmp_path / "a", {"w": torch.tensor([2**60, 7]), "n": 2**60})
    b = cli.save(tmp_path / "b", {"w": torch.tensor([2**60 + 1, 7]), "n": 2**60 + 1})
    found = differences(a, b)
    assert found["w", "values"]["differing"] == 1 and found["w", "values"]["max_abs"] == 1
    assert ("n", "values") in found


def test_placement_is_told_and_counts_when_asked(tmp_path):
    path = next(p for p in cli.STOCK if p.name == "sharded")
    tensors = {
        key: torch.empty(what.size, dtype=what.properties.dtype) if hasattr(what, "size") else None
        for key, what in torch_dcp.FileSystemReader(path)
        .read_metadata()
        .state_dict_metadata.items()
    }
    dcp.load(tensors, checkpoint_id=path, no_dist=True)
    whole_ones = cli.save(tmp_path / "whole", tensors)
    found = cli.run("diff", path, whole_ones, "--json")
    assert found.status == 0 and {c["kind"] for c in found.json["changes"]} == {"placement"}
    assert cli.run("diff", path, whole_ones, "--placement").status == 1


@pytest.mark.parametrize("seed", range(6))
def test_what_diff_finds_is_what_torch_finds(tmp_path, monkeypatch, seed):
    """Small windows, so that tensors and batches are cut at many places."""
    monkeypatch.setattr(diff, "_WINDOW_BYTES", 300)
    monkeypatch.setattr(compare, "_PART_ELEMENTS", 7)
    generator, dice = torch.Generator().manual_seed(seed), random.Random(seed)
    dtypes = [torch.float32, torch.bfloat16, torch.float64, torch.int32, torch.complex64]
    a, b = {}, {}
    for i in range(12):
        shape = tuple(dice.choice((1, 3, 8, 17)) for _ in range(dice.randrange(4)))
        value = torch.randn(shape, generator=generator) * 100
        a[f"t{i}"] = value.to(dice.choice(dtypes))
        b[f"t{i}"] = a[f"t{i}"].clone()
        if dice.random() < 0.7 and value.numel():
            flat = b[f"t{i}"].reshape(-1)
            flat[dice.randrange(flat.numel())] += 1
            b[f"t{i}"] = flat.reshape(shape)
    found = differences(cli.save(tmp_path / "a", a), cli.save(tmp_path / "b", b))
    for key, x in a.items():
        wide = torch.complex128 if x.is_complex() else torch.float64
        off = (x.to(wide) - b[key].to(wide)).abs()
        mine = found.get((key, "values"), {"differing": 0, "max_abs": 0.0})
        assert mine["differing"] == int((off > 0).sum()), key
        assert mine["max_abs"] == pytest.approx(float(off.max()) if off.numel() else 0.0), key


# ---- boxes ----


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("key", ["even", "uneven", "cols"])
def test_any_box_of_any_sharding_reads_as_the_slice_of_the_whole(key, seed):
    checkpoint = Checkpoint(next(p for p in cli.STOCK if p.name == "sharded"))
    entry = checkpoint.entry(key)
    reader, dice = Reader(checkpoint), random.Random(seed)
    (everything,) = reader.read([whole(entry)])
    for _ in range(20):
        ends = [sorted(dice.choices(range(n + 1), k=2)) for n in entry.shape]
        box = whole(entry)._replace(
            offsets=tuple(a for a, _ in ends), sizes=tuple(b - a for a, b in ends)
        )
        expected = everything[tuple(slice(*end) for end in ends)]
        (got,) = reader.read([box])
        assert torch.equal(got, expected)
        pieces = list(windows(box, dice.choice((1, 8, 40))))
        assert torch.equal(
            torch.cat([piece.reshape(-1) for piece in reader.read(pieces)]), expected.reshape(-1)
        )


# ---- cat ----


@pytest.mark.parametrize(
    "text", ["", ":", "0", "-1", "3:5", "..., 2", "1:3, 2:7", "[4:, -1]", "5:5", ":-2,...", "0,0"]
)
def test_slices_are_pythons(ours, text):
    tensor = cli.state()["model"]["embed.weight"].numpy()
    expected = tensor[eval(f"numpy.s_[{text.strip('[]') or '...'}]")]
    done = cli.run("cat", ours, "model.embed.weight", f"--slice={text}", "--json")
    assert done.json["shape"] == list(expected.shape)
    assert numpy.array_equal(
        numpy.array(done.json["values"], "f4").reshape(expected.shape), expected
    )


@pytest.mark.parametrize("text", ["40", "0,0,0", "::2", "x", "1,...,...", "-41"])
def test_slices_that_are_none_are_named(ours, text):
    done = cli.run("cat", ours, "model.embed.weight", f"--slice={text}")
    assert done.status == 2 and "--slice" in done.err


def test_cat_makes_files_for_numpy(ours, tmp_path):
    model = cli.state()["model"]
    done = cli.run("cat", ours, "model.embed.weight", "--slice", "2:9", "-o", tmp_path / "x.npy")
    assert done.status == 0
    assert numpy.array_equal(numpy.load(tmp_path / "x.npy"), model["embed.weight"][2:9].numpy())
    done = cli.run("cat", ours, "model.layers.0.w", "-o", tmp_path / "y.npy")
    assert "saved as float32" in done.err
    assert numpy.array_equal(numpy.load(tmp_path / "y.npy"), model["layers.0.w"].float().numpy())
    done = cli.run("cat", ours, "optim.count", "-o", tmp_path / "z.npy")
    assert done.status == 0 and numpy.load(tmp_path / "z.npy") == 100
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.npy", "y.npy", "z.npy"]


def test_cat_prints_objects_and_scalars(ours):
    assert cli.run("cat", ours, "name").out == "'a run'\n"
    assert cli.run("cat", ours, "optim.count").out.splitlines() == ["optim.count: int64 []", "100"]


def test_cat_of_damaged_values_is_an_error(tmp_path):
    values = torch.arange(4000.0)
    path = cli.save(tmp_path / "c", {"w": values})
    data = path / "__0_0.distcp"
    cli.flip(data, data.read_bytes().index(values.numpy().tobytes()) + 100)
    for damage in ("a flipped byte", "an end cut off", "no file"):
        for argv in (("cat", path, "w"), ("diff", path, path)):
            done = cli.run(*argv)
            assert done.status == 1 and done.out == "", damage
            assert len(done.err.splitlines()) == 1
        if damage == "a flipped byte":
            os.truncate(data, 100)
        elif data.exists():
            data.unlink()


# ---- convert ----


def tensors_of(ours):
    checkpoint = Checkpoint(ours)
    entries = [entry for entry in checkpoint.entries if entry.is_tensor]
    return dict(
        zip(
            [e.key for e in entries],
            Reader(checkpoint).read(list(map(whole, entries))),
            strict=True,
        )
    )


def test_to_torch_and_back(ours, tmp_path):
    assert cli.run("convert", ours, tmp_path / "x.pt").status == 0
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)
    assert torch.equal(loaded["model"]["embed.weight"], cli.state()["model"]["embed.weight"])
    assert loaded["optim"]["lr"] == [0.1, 0.2]
    assert cli.run("convert", tmp_path / "x.pt", tmp_path / "back").status == 0
    assert differences(ours, tmp_path / "back") == {}


@pytest.mark.parametrize("files", [1, 3])
def test_to_other_numbers_of_files(ours, tmp_path, files):
    done = cli.run("convert", ours, tmp_path / "n", "--files", files)
    assert done.status == 0, done
    assert len(list((tmp_path / "n").glob("*.distcp"))) == files
    assert differences(ours, tmp_path / "n") == {}
    assert [p.name for p in tmp_path.iterdir()] == ["n"]


@pytest.mark.parametrize("files", [None, 1, 2, 5, 100])
def test_to_hugging_face_and_back(ours, tmp_path, files):
    options = () if files is None else ("--files", files)
    assert cli.run("convert", ours, tmp_path / "hf", "--to", "hf").status == 2  # has objects
    assert not (tmp_path / "hf").exists()
    done = cli.run("convert", ours, tmp_path / "hf", "--to", "hf", "--skip-objects", *options)
    assert done.status == 0, done
    paths = sorted((tmp_path / "hf").glob("*.safetensors"))
    wanted = tensors_of(ours)
    assert len(paths) == min(files or 1, len(wanted))
    got = {k: v for path in paths for k, v in safetensors.torch.load_file(path).items()}
    assert got.keys() == wanted.keys()
    for key, value in wanted.items():
        assert got[key].dtype == value.dtype and torch.equal(got[key], value), key
    assert cli.run("convert", tmp_path / "hf", tmp_path / "back").status == 0
    changes = differences(ours, tmp_path / "back")
    assert {kind for _, kind in changes} == {"removed"}  # the objects
    assert cli.run("convert", tmp_path / "hf", tmp_path / "x.pt").status == 0
    loaded = torch.load(tmp_path / "x.pt", weights_only=True)
    assert all(torch.equal(loaded[key], value) for key, value in wanted.items())


def test_from_torch_to_hugging_face(tmp_path):
    torch.save(cli.state()["model"], tmp_path / "x.pt")
    assert cli.run("convert", tmp_path / "x.pt", tmp_path / "hf", "--to", "hf").status == 0
    (path,) = (tmp_path / "hf").glob("*.safetensors")
    got = safetensors.torch.load_file(path)
    assert all(torch.equal(got[k], v) for k, v in cli.state()["model"].items())


def test_what_is_there_is_replaced_only_when_asked_for(ours, tmp_path):
    (tmp_path / "x.pt").write_text("mine")
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "file").write_text("mine")
    assert cli.run("convert", ours, tmp_path / "x.pt").status == 2
    assert cli.run("convert", ours, tmp_path / "dir", "--files", 2).status == 2
    assert (tmp_path / "x.pt").read_text() == (tmp_path / "dir" / "file").read_text() == "mine"
    assert cli.run("convert", ours, tmp_path / "x.pt", "--overwrite").status == 0
    assert torch.load(tmp_path / "x.pt", weights_only=True)["step"] == 100


@pytest.mark.parametrize(
    "argv", [("new",), ("new.safetensors",), ("new.pt", "--files", "2"), (".", "--to", "torch")]
)
def test_conversions_that_make_no_sense_are_refused(ours, tmp_path, monkeypatch, argv):
    monkeypatch.chdir(tmp_path)
    done = cli.run("convert", ours, *argv)
    assert done.status == 2 and len(done.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_damage_stops_a_conversion_and_leaves_nothing(tmp_path):
    values = torch.arange(4000.0)
    path = cli.save(tmp_path / "c", {"w": values})
    data = path / "__0_0.distcp"
    cli.flip(data, data.read_bytes().index(values.numpy().tobytes()) + 100)
    for target in (("x.pt",), ("n", "--files", "2"), ("hf", "--to", "hf")):
        done = cli.run("convert", path, tmp_path / target[0], *target[1:])
        assert done.status == 1 and len(done.err.splitlines()) == 1, done
        assert not (tmp_path / target[0] / ".metadata").exists()
        assert not list(tmp_path.glob("**/*.safetensors")) and not list(tmp_path.glob("*.pt"))


# ---- plot and bench ----


@pytest.mark.parametrize("argv", [(), ("model.embed.weight",)], ids=["files", "tensor"])
def test_pictures_are_drawn(ours, tmp_path, argv):
    pytest.importorskip("matplotlib")
    done = cli.run("plot", ours, *argv, "-o", tmp_path / "x.png")
    assert done.status == 0, done
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
    assert cli.run("plot", ours, *argv, "-o", tmp_path / "x.what").status == 2
    for path in cli.STOCK[-2:]:
        assert cli.run("plot", path, "-o", tmp_path / "y.svg").status == 0


def test_without_matplotlib_plot_says_what_it_needs(ours, tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    done = cli.run("plot", ours, "-o", tmp_path / "x.png")
    assert done.status == 2 and "dcp_native[plot]" in done.err


def test_bench_measures_and_cleans_up(tmp_path):
    done = cli.run("bench", tmp_path, "--size", "20MB", "--repeat", 1, "--save", "1GB", "--json")
    assert done.status == 0, done
    assert {"save by dcp_native", "load by dcp_native, verified"} <= done.json["bytes_per_s"].keys()
    assert all(rate > 0 for rate in done.json["bytes_per_s"].values())
    assert done.json["save_estimate_ns"] > 0 and list(tmp_path.iterdir()) == []
    plain = cli.run("bench", tmp_path, "--size", "20MB", "--repeat", 1, "--no-checkpoint")
    assert plain.status == 0 and "a save of 100 GB to this disk" in plain.out
    assert cli.run("bench", tmp_path, "--size", "1kB").status == 2
