"""The command line as a whole: every command on every kind of checkpoint, and on what is none."""

from __future__ import annotations

import importlib.util
import os
import pickle
import pty
import re
import select
import shutil
import subprocess
import sys
import time

import cli
import pytest
import torch
import torch.distributed.checkpoint as torch_dcp
from conftest import ROOT
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

import dcp_native as dcp
from dcp_native._cli.checkpoint import Checkpoint
from dcp_native._cli.main import COMMANDS
from dcp_native._cli.units import bytes_text

LOOKS = (
    ("inspect",), ("inspect", "--all"), ("verify",), ("verify", "--quick"), ("du",),
    ("du", "--files", "--depth", "1"),
)  # fmt: skip
"""Commands that take a checkpoint and nothing else."""


@pytest.fixture(scope="module")
def ours(tmp_path_factory):
    return cli.save(tmp_path_factory.mktemp("cli") / "step-100")


@pytest.fixture(scope="module")
def checkpoints(ours):
    return {"ours": ours, **{str(p.relative_to(p.parents[1])): p for p in cli.STOCK}}


NAMES = ["ours", *(str(path.relative_to(path.parents[1])) for path in cli.STOCK)]


@pytest.mark.parametrize("command", LOOKS, ids=" ".join)
@pytest.mark.parametrize("name", NAMES)
def test_every_kind_of_checkpoint_can_be_looked_at(checkpoints, name, command):
    path = checkpoints[name]
    plain = cli.run(*command, path)
    assert plain.status == 0 and plain.err == "", plain
    assert plain.out.strip() and "\x1b" not in plain.out
    document = cli.run(*command, path, "--json")
    assert document.status == 0 and document.json["path"] == str(path)


@pytest.mark.parametrize("name", NAMES)
def test_inspect_says_what_torchs_own_reader_says(checkpoints, name):
    path = checkpoints[name]
    theirs = torch_dcp.FileSystemReader(path).read_metadata()
    mine = cli.run("inspect", path, "--json").json["entries"]
    assert [entry["key"] for entry in mine] == list(theirs.state_dict_metadata)
    detailed = {e["key"]: e for e in cli.run("inspect", path, "*", "--json").json["entries"]}
    for key, what in theirs.state_dict_metadata.items():
        entry = detailed[key]
        if not isinstance(what, TensorStorageMetadata):
            assert entry["kind"] == "object" and entry["shape"] is None
            continue
        assert entry["shape"] == list(what.size)
        assert entry["dtype"] == str(what.properties.dtype).removeprefix("torch.")
        assert entry["bytes"] == what.size.numel() * what.properties.dtype.itemsize
        boxes = [(r["offsets"], r["sizes"]) for r in entry["records"]]
        assert boxes == [(list(c.offsets), list(c.sizes)) for c in what.chunks]
    places = {(r["file"], r["offset_bytes"]) for e in detailed.values() for r in e["records"]}
    assert places == {(i.relative_path, i.offset) for i in theirs.storage_data.values()}


def test_layers_that_are_alike_are_shown_once(ours):
    short, every = cli.run("inspect", ours).out, cli.run("inspect", ours, "--all").out
    assert "layers.0-3" in short and "4 alike" in short
    assert "layers.0-3" not in every and len(every.splitlines()) > len(short.splitlines())


def test_one_tensor_shows_which_rank_holds_which_box():
    path = next(p for p in cli.STOCK if p.name == "sharded")
    out = cli.run("inspect", path, "cols").out.splitlines()
    assert out[1].split() == ["float32", "[4,", "9],", "144", "B"]
    assert [line.split()[0] for line in out[3:5]] == ["0", "1"]
    assert "[0:4, 0:5]" in out[3] and "__0_1.distcp" in out[3]
    assert "[0:4, 5:9]" in out[4] and "__1_1.distcp" in out[4]


def test_totals_are_those_of_an_independent_count(ours):
    out = cli.run("inspect", ours).out
    found = cli.run("inspect", ours, "--json").json
    counts = {"type": {}, "prefix": {}}
    for entry in found["entries"]:
        for kind, name in (
            ("type", entry["dtype"] or "object"), ("prefix", entry["key"].split(".")[0])
        ):  # fmt: skip
            keys, size = counts[kind].get(name, (0, 0))
            counts[kind][name] = keys + 1, size + entry["bytes"]
    for kind, groups in counts.items():
        table = out.partition(f"by {kind} ")[2].partition("\n\n")[0].splitlines()[1:]
        assert len(table) == len(groups)
        for line in table:
            name, keys = line.split()[:2]
            keys_wanted, size = groups[name]
            assert int(keys) == keys_wanted and bytes_text(size) in line, line


def test_only_the_first_lines_of_a_long_tree_are_shown_and_the_rest_counted(tmp_path):
    model = {f"name{i}.{part}": torch.ones(1) for i in range(300) for part in ("w", "b")}
    path = cli.save(tmp_path / "c", {**model, "one.two.three": torch.ones(2)})
    every, short = (
        [line.split() for line in out.partition("by type")[0].strip().splitlines()[4:]]
        for out in (cli.run("inspect", path, "--all").out, cli.run("inspect", path).out)
    )
    assert len(every) == 1 + 901 and len(short) == 1 + 400 + 1 and short[:-1] == every[: 1 + 400]
    assert short[-1][:5] == ["...", "and", "501", "more", "lines:"]
    assert "285 more" in cli.run("inspect", path).out.partition("by prefix")[2]  # of prefixes


def test_sizes_are_those_of_the_values(ours):
    found = cli.run("du", ours, "--json").json
    sizes = {row["prefix"]: row["bytes"] for row in found["prefixes"]}
    assert sizes["model.embed"] == 40 * 8 * 4 and sizes["model.layers"] == 4 * (16 * 8 * 2 + 32)
    on_disk = sum(file.stat().st_size for file in ours.iterdir())
    assert found["disk_bytes"] == on_disk


def test_du_finds_files_that_are_missing_or_cut_short(tmp_path):
    path = cli.save(tmp_path / "c")
    data = path / "__0_0.distcp"
    assert cli.run("du", path).status == 0
    for argv in ((), ("--json",)):
        os.truncate(data, 100)
        done = cli.run("du", path, *argv)
        assert done.status == 1 and (argv or "cut short: 1 data file (__0_0.distcp)" in done.out)
    data.unlink()
    done = cli.run("du", path)
    assert done.status == 1 and "missing: 1 data file (__0_0.distcp)" in done.out


@pytest.mark.parametrize("command", ["inspect", "verify", "du"])
def test_a_file_in_place_of_a_checkpoint_is_told(tmp_path, command):
    (tmp_path / "x").write_text("x")
    done = cli.run(command, tmp_path / "x")
    assert done.status == 2 and "is no directory; a checkpoint is one" in done.err


@pytest.mark.parametrize(
    "command",
    [
        ("inspect", "P"), ("verify", "P"), ("du", "P"), ("cat", "P", "k"),
        ("plot", "P", "-o", "x.png"), ("diff", "P", "P"), ("latest", "P"),
        ("convert", "P", "new", "--to", "torch"),
        ("prune", "P", "--keep-last", "1"), ("bench", "P"),
    ],
    ids=lambda command: command[0],
)  # fmt: skip
def test_what_is_not_there_is_said_in_one_line(tmp_path, monkeypatch, command):
    monkeypatch.chdir(tmp_path)
    missing = cli.run(*(str(tmp_path / "no") if arg == "P" else arg for arg in command))
    assert missing.status == 2 and missing.out == ""
    assert missing.err.startswith("dcp-native: ") and "no: No such file" in missing.err
    assert len(missing.err.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("text")
    status = cli.run(*(str(tmp_path / "file") if arg == "P" else arg for arg in command)).status
    assert status in (1, 2)


@pytest.mark.parametrize("command", ["inspect", "du", "verify", "latest"])
def test_an_empty_directory_holds_no_checkpoint(tmp_path, command):
    done = cli.run(command, tmp_path)
    assert done.status == 1
    assert len((done.out + done.err).splitlines()) <= 3 and "Traceback" not in done.err


@pytest.mark.parametrize("damage", ["empty", "random", "cut", "pickle", "flipped"])
@pytest.mark.parametrize("command", ["inspect", "du", "verify", "latest"])
def test_damaged_metadata_is_a_finding(ours, tmp_path, command, damage):
    image = (ours / ".metadata").read_bytes()
    bad = {
        "empty": b"",
        "random": bytes(range(256)) * 20,
        "cut": image[: len(image) // 3],
        "pickle": pickle.dumps({"not": "metadata"}),
        "flipped": bytes(b ^ (0x55 if 40 < i < 900 else 0) for i, b in enumerate(image)),
    }[damage]
    (tmp_path / "step-1").mkdir()
    (tmp_path / "step-1" / ".metadata").write_bytes(bad)
    done = cli.run(command, tmp_path if command == "latest" else tmp_path / "step-1")
    assert done.status == 1, done
    assert "Traceback" not in done.err


class Bomb:
    """What arbitrary unpickling would execute."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_objects_are_never_executed(tmp_path):
    trace = tmp_path / "executed"
    path = cli.save(tmp_path / "c", {"bomb": Bomb(trace), "x": torch.ones(2)}, torch_dcp)
    shown = cli.run("inspect", path, "bomb")
    assert shown.status == 0 and "safe loader refuses" in shown.out
    assert cli.run("cat", path, "bomb").status == 1
    other = cli.save(
        tmp_path / "d", {"bomb": Bomb(tmp_path / "other"), "x": torch.ones(2)}, torch_dcp
    )
    assert cli.run("diff", path, other).status == 1
    assert cli.run("convert", path, tmp_path / "x.pt").status == 1
    assert not trace.exists() and not (tmp_path / "other").exists()


def test_what_is_no_torch_file_is_named_and_nothing_is_left(tmp_path):
    for name, content in (("empty.pt", b""), ("text.pt", b"hello world text\n")):
        (tmp_path / name).write_bytes(content)
        for more in ((), ("--to", "hf")):
            done = cli.run("convert", tmp_path / name, tmp_path / "made", *more)
            assert done.status == 1 and f"{name} is no file of torch.save" in done.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.pt", "text.pt"]


def test_a_target_that_can_not_be_written_is_no_damage(ours, tmp_path):
    (tmp_path / "file").touch()
    for target in (tmp_path / "file" / "x.pt", tmp_path / "none" / "x.pt", "/proc/x.pt"):
        assert cli.run("convert", ours, target).status == 2
    damaged = tmp_path / "damaged"
    shutil.copytree(ours, damaged)
    next(damaged.glob("*.distcp")).unlink()
    assert cli.run("convert", damaged, tmp_path / "x.pt").status == 1


def test_metadata_that_can_not_be_read_is_named(ours, tmp_path):
    path = tmp_path / "c"
    shutil.copytree(ours, path)
    (path / ".metadata").unlink()
    (path / ".metadata").mkdir()
    done = cli.run("inspect", path)
    assert done.status == 2 and "/.metadata: Is a directory" in done.err


def test_records_are_looked_for_in_the_checkpoint_alone(tmp_path):
    secret = tmp_path / "secret"
    torch.save("secret", secret)
    for name in ("../secret", str(secret)):
        index, record = MetadataIndex("key"), _StorageInfo(name, 0, secret.stat().st_size)
        image = pickle.dumps(Metadata({"key": BytesStorageMetadata()}, None, {index: record}))
        (tmp_path / "c").mkdir(exist_ok=True)
        (tmp_path / "c" / ".metadata").write_bytes(image)
        for command in (("inspect", tmp_path / "c", "key"), ("cat", tmp_path / "c", "key")):
            done = cli.run(*command)
            assert "'secret'" not in done.out, done


def test_the_installed_command_is_this_one():
    text = (ROOT / "pyproject.toml").read_text()
    assert 'dcp-native = "dcp_native._cli.main:main"' in text


def test_names_can_not_speak_to_the_terminal(tmp_path):
    path = cli.save(tmp_path / "c", {"a\x1b[31m\nb": torch.ones(2), "ok": "\x1b[0m"})
    for command in (("inspect",), ("inspect", "ok"), ("du",), ("verify",)):
        out = cli.run(command[0], path, *command[1:]).out
        assert "\x1b" not in out
    assert len(cli.run("inspect", path).out.splitlines()) < 16


def test_usage_errors_end_with_2():
    assert cli.run().status == 2
    assert cli.run("inspect").status == 2
    assert cli.run("no-such-command").status == 2
    assert cli.run("prune", ".").status == 2
    assert cli.run("bench", ".", "--size", "much").status == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command):
    done = cli.run(command, "--help")
    assert done.status == 0 and "--json" in done.out and done.err == ""


def test_near_keys_are_suggested(ours):
    done = cli.run("cat", ours, "model.embed.weigth")
    assert done.status == 1 and "did you mean model.embed.weight?" in done.err


# ---- without torch ----

WITHOUT_TORCH = """
import sys
from dcp_native._cli.main import main
status = main(sys.argv[1:])
assert "torch" not in sys.modules and "numpy" not in sys.modules and "rich" not in sys.modules
sys.exit(status)
"""


@pytest.mark.parametrize(
    "command",
    [
        ("inspect", "C"), ("inspect", "C", "step", "model"), ("verify", "C"), ("du", "C"),
        ("verify", "P"), ("latest", "P"), ("prune", "P", "--keep-last", "1"),
        ("diff", "C", "C", "--no-values"), ("cat", "C", "name"), ("inspect", "C", "--json"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_looking_does_not_import_torch(ours, command):
    paths = {"C": str(ours), "P": str(ours.parent)}
    done = cli.run_alone(
        *(paths.get(arg, arg) for arg in command), program=("-c", WITHOUT_TORCH),
        DCP_NATIVE_INSTALL="",
    )  # fmt: skip
    assert done.status == 0 and done.err == "", done.err


def test_the_module_is_the_command_line(ours):
    done = cli.run_alone("inspect", ours, DCP_NATIVE_INSTALL="")
    assert done.status == 0 and "model" in done.out and "\x1b" not in done.out


def test_a_reader_that_has_seen_enough_is_no_error(ours):
    command = f"{sys.executable} -m dcp_native inspect {ours} --all | head -n 1"
    done = subprocess.run(
        ["bash", "-c", f"{command}; echo ${{PIPESTATUS[0]}}"],
        capture_output=True, text=True, timeout=60,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.stderr == "" and done.stdout.splitlines()[1:] in (["141"], ["0"])
    assert run_with_closed_output("inspect", ours) == 141


def run_with_closed_output(*argv) -> int:
    read, write = os.pipe()
    os.close(read)
    try:
        return subprocess.run(
            [sys.executable, "-m", "dcp_native", *map(str, argv)],
            stdout=write, timeout=60, env={**os.environ, "PYTHONPATH": str(ROOT)},
        ).returncode  # fmt: skip
    finally:
        os.close(write)


# ---- terminals ----


def on_terminal(*argv, block_rich=False, **env):
    """What a command writes to a terminal of 100 columns."""
    program = "import sys\nfrom dcp_native._cli import output\noutput._SILENT_S = 0\n"
    program += "sys.modules['rich'] = None\n" if block_rich else ""
    program += "from dcp_native._cli.main import main\nsys.exit(main(sys.argv[1:]))\n"
    leader, follower = pty.openpty()
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "TERM": "xterm", "COLUMNS": "100", **env}
    process = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, argv)],
        stdin=subprocess.DEVNULL, stdout=follower, stderr=follower, env=environment,
    )  # fmt: skip
    os.close(follower)
    seen, deadline = b"", time.monotonic() + 60
    while time.monotonic() < deadline:
        if select.select([leader], [], [], 0.1)[0]:
            try:
                part = os.read(leader, 65536)
            except OSError:  # the other end is closed
                break
            seen += part
    os.close(leader)
    assert process.wait(timeout=60) in (0, 1)
    return seen.decode()


def test_terminals_get_colours_from_rich_alone(ours):
    pytest.importorskip("rich")
    assert "\x1b[" in on_terminal("inspect", ours)
    for plain in ({"block_rich": True}, {"NO_COLOR": "1"}, {"TERM": "dumb"}):
        seen = on_terminal("inspect", ours, **plain)
        assert "\x1b" not in seen and "model" in seen


def test_progress_is_shown_on_a_terminal_with_rich_and_without(tmp_path):
    path = cli.save(tmp_path / "c", {f"t{i}": torch.zeros(1 << 20) for i in range(60)})
    seen = on_terminal("diff", path, path, block_rich=True)
    assert "% of 252 MB" in seen and "/s" in seen and "left" in seen and "\x1b" not in seen
    assert "equal" in seen.rsplit("\r", 2)[-2]
    if importlib.util.find_spec("rich") is not None:
        assert "of 252 MB" in on_terminal("diff", path, path)


def test_progress_can_be_switched_off_and_forced_on(tmp_path):
    path = cli.save(tmp_path / "c", {f"t{i}": torch.zeros(1 << 20) for i in range(60)})
    assert "252 MB" not in on_terminal("diff", path, path, "--progress", "off")
    assert "252 MB" not in on_terminal("diff", path, path, DCP_NATIVE_PROGRESS="off")
    program = (
        "-c",
        "import sys\nfrom dcp_native._cli import output\noutput._SILENT_S = 0\n"
        "from dcp_native._cli.main import main\nsys.exit(main(sys.argv[1:]))",
    )
    quiet = cli.run_alone("diff", path, path, program=program)
    told = cli.run_alone("diff", path, path, "--progress", "on", program=program)
    assert quiet.err == "" and quiet.out == told.out
    assert len(told.err.splitlines()) == 1 and "% of 252 MB" in told.err and "\r" not in told.err


def test_long_keys_are_not_broken_on_narrow_terminals(ours):
    pytest.importorskip("rich")
    for text in (on_terminal("inspect", ours, COLUMNS="30"), on_terminal("du", ours, COLUMNS="30")):
        plain = re.sub(r"\x1b\[[0-9;]*m", "", text)
        assert "embed.weight" in plain or "model.embed" in plain


def test_a_problem_is_two_lines_where_a_table_would_be_broken(ours, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(ours, damaged)
    file = next(damaged.glob("*.distcp"))
    data = bytearray(file.read_bytes())
    for at in range(4096, len(data) - 4096, 7):
        data[at] ^= 1
    file.write_bytes(data)
    wide = cli.run("verify", damaged)
    row = wide.out.splitlines()[2].split()
    assert wide.status == 1 and wide.out.splitlines()[1].startswith("tensor")
    narrow = re.sub(r"\x1b\[[0-9;]*m|\r", "", on_terminal("verify", damaged, COLUMNS="60"))
    lines = narrow.splitlines()
    assert f"  {row[0]}" in lines and f"    {row[3]}: {row[1]} at byte {row[2]}: " in narrow


# ---- many chunks ----


def test_256k_chunks_can_be_inspected(tmp_path):
    """Also by hand, timed: below a second in all."""
    tensors, records = {}, {}
    for k in range(1000):
        key = f"model.layers.{k // 10}.part{k % 10}.weight"
        chunks = [
            ChunkStorageMetadata(torch.Size([4 * rank, 0]), torch.Size([4, 64]))
            for rank in range(256)
        ]
        tensors[key] = TensorStorageMetadata(
            TensorProperties(dtype=torch.float32), torch.Size([1024, 64]), chunks
        )
        for rank, chunk in enumerate(chunks):
            at = MetadataIndex(key, chunk.offsets, rank)
            records[at] = _StorageInfo(f"__{rank}_0.distcp", k * 1624, 1624)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata(tensors, None, records)))
    plain = cli.run("inspect", tmp_path)
    assert plain.status == 0 and "256,000 records" in plain.out
    assert len(plain.out.splitlines()) < 60
    found = cli.run("inspect", tmp_path, "--json").json
    assert found["records"] == 256_000 and len(found["files"]) == 256
    assert {row["stored_bytes"] for row in found["totals"]["ranks"]} == {1000 * 1624}


def test_metadata_of_single_ranks_is_read_together(tmp_path):
    parts = []
    for rank in (0, 1):
        path = cli.save(tmp_path / f"rank{rank}", {"w": torch.ones(4), f"own{rank}": rank})
        parts.append((path / ".metadata").read_bytes())
    target = tmp_path / "both"
    target.mkdir()
    for rank, image in enumerate(parts):
        (target / f"__{rank}.metadata").write_bytes(image)
    checkpoint = Checkpoint(target)
    assert not checkpoint.is_whole
    assert [entry.key for entry in checkpoint.entries] == ["w", "own0", "own1"]
    assert checkpoint.entry("w").chunks_count == 2
    assert dcp.config().allow_unsafe_objects  # commands' settings do not stay
