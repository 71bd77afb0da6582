"""The documents: what they show runs, what they link to is there, what is generated is fresh."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT

import dcp_native as dcp
from dcp_native import _config
from dcp_native._install import VARIABLE

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = {p.name: p.read_text(encoding="utf-8") for p in DOCUMENTS}
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
TIMEOUT_S = 240


@dataclasses.dataclass(frozen=True)
class Block:
    language: str
    text: str
    line: int


def blocks_of(text: str, *languages: str) -> list[Block]:
    return [
        Block(m[1], m[2], text.count("\n", 0, m.start()) + 2)
        for m in FENCE.finditer(text)
        if m[1] in languages
    ]


# ---- what is shown runs ----

PRELUDE = """
import logging, warnings
warnings.filterwarnings("ignore")
logging.disable()
import torch
import dcp_native as dcp
from dcp_native.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful

torch.manual_seed(1)
model = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.Linear(5, 2))
optimizer = torch.optim.AdamW(model.parameters())
model(torch.ones(3, 6)).sum().backward()
optimizer.step()

class App(Stateful):
    def state_dict(self):
        found = get_state_dict(model, optimizer)
        return dict(zip(("model", "optim"), found))
    def load_state_dict(self, loaded):
        set_state_dict(
            model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optim"]
        )

app_state = App()
state = {"w": torch.arange(12.0), "frozen": torch.ones(9), "step": 4}
for step in (100, 300):
    dcp.save({"app": app_state}, checkpoint_id=f"run/step-{step}")
with open("train.py", "w") as file:
    file.write(
        "import torch, torch.distributed as dist, torch.distributed.checkpoint as dcp\\n"
        "dist.init_process_group('gloo')\\n"
        "dcp.save({'w': torch.ones(3)}, checkpoint_id='trained')\\n"
        "assert dcp.save.__module__.startswith('dcp_native'), dcp.save.__module__\\n"
    )
torch.save({"w": torch.ones(2)}, "model.pt")
"""
OTHERS = """
from torch_checkpointing import CheckpointManager
from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig
made = CheckpointManager.Config.with_sync_save()
made.storage_config = LocalFileSystemStorageConfig(use_direct_io=False)
made.build().save("theirs/step-100", {"model": model.state_dict(), "step": 3})
"""
"""Before a block about torch_checkpointing, where that is installed."""
RUN_ELSEWHERE = {"cli.md": "test_cli_docs.py"}
"""Pages whose commands another test runs, with what it knows of them."""
NEW_PROCESS = {"install.md"}
"""Pages whose blocks are ways to begin a program: each is run by itself."""


def environment(home: Path) -> dict[str, str]:
    """`python` and `torchrun` are this interpreter's; the package is this tree's."""
    bin_ = home / "bin"
    bin_.mkdir(exist_ok=True)
    programs = {"python": "", "torchrun": "-m torch.distributed.run", "dcp-native": "-m dcp_native"}
    for name, arguments in programs.items():
        script = bin_ / name
        script.write_text(f'#!/bin/sh\nexec {sys.executable} {arguments} "$@"\n')
        script.chmod(0o755)
    # What installing the package does for DCP_NATIVE_INSTALL: its .pth line runs at every start.
    (bin_ / "sitecustomize.py").write_text(f"import site; site.addsitedir({str(ROOT)!r})\n")
    path = os.pathsep.join(filter(None, (str(bin_), str(ROOT), os.environ.get("PYTHONPATH"))))
    return {
        **{k: v for k, v in os.environ.items() if not k.startswith("DCP_NATIVE")},
        "PATH": f"{bin_}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": path,
    }


def run(argv: list[str], home: Path, env: dict[str, str], what: str) -> None:
    work = home / "work"
    work.mkdir(exist_ok=True)
    done = subprocess.run(
        argv, cwd=work, env=env, capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, f"{what}:\n{done.stdout[-2000:]}{done.stderr[-4000:]}"


def program_of(page: str, blocks: list[Block]) -> str:
    parts = [PRELUDE]
    for block in blocks:
        if "torch_checkpointing" in block.text:
            if importlib.util.find_spec("torch_checkpointing") is None:
                continue
            parts.append(OTHERS)
        # Compiled by themselves, so that a traceback shows the document's own line.
        text = "\n" * (block.line - 1) + block.text
        parts.append(f"exec(compile({text!r}, {page!r}, 'exec'), globals())")
    return "\n".join(parts)


@pytest.mark.parametrize(
    "page",
    [p for p, t in PAGES.items() if blocks_of(t, "python", "sh") and p not in RUN_ELSEWHERE],
)
def test_every_block_shown_runs(tmp_path, page):
    env = environment(tmp_path)
    python = blocks_of(PAGES[page], "python")
    groups = [[block] for block in python] if page in NEW_PROCESS else [python]
    for blocks in groups:
        run([sys.executable, "-c", program_of(page, blocks)], tmp_path, env, page)
    for block in blocks_of(PAGES[page], "sh"):
        for command in block.text.splitlines():
            if not command.startswith("make "):
                run(["sh", "-c", command], tmp_path, env, f"{page}:{block.line}: {command}")


def commands_of(text: str) -> set[str]:
    """Commands of the build that a page shows: in blocks of a shell or indented, and in a line."""
    shown = re.findall(r"^(?:    )?(make [\w-]+)", text, re.M)
    return {*shown, *re.findall(r"`(make [\w-]+)", text)}


def test_pages_that_are_run_elsewhere_are_run_there():
    for page, test in RUN_ELSEWHERE.items():
        assert page in (ROOT / "tests/py" / test).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", [p for p, t in PAGES.items() if commands_of(t)])
def test_every_make_command_shown_is_one(page):
    for command in sorted(commands_of(PAGES[page])):
        done = subprocess.run(
            [*command.split(), "-n"], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"


@pytest.mark.parametrize("page", [p for p, t in PAGES.items() if "python benchmarks/" in t])
def test_every_program_shown_is_there(page):
    for program in re.findall(r"python ((?:benchmarks|tools)/\w+\.py)", PAGES[page]):
        assert (ROOT / program).is_file(), program


def test_all_blocks_say_what_they_are():
    unknown = {
        (page, language)
        for page, text in PAGES.items()
        for language in re.findall(r"^```(\w*)\n(?:.*?)^```$", text, re.M | re.S)
        if language not in ("python", "sh", "text")
    }
    assert unknown == set()


# ---- links ----


def anchors_of(text: str) -> set[str]:
    """As GitHub makes them of headings."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.M)
    plain = (re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", h).replace("`", "").lower() for h in headings)
    return {re.sub(r"[^\w\- ]", "", h).strip().replace(" ", "-") for h in plain}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_every_link_resolves(path):
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", PAGES[path.name])):
        if re.match(r"https?:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), f"{path.name}: {link}"
        if anchor:
            assert anchor in anchors_of(target.read_text(encoding="utf-8")), f"{path.name}: {link}"


def test_every_page_can_be_reached_from_the_readme():
    linked = set(re.findall(r"\]\(docs/(\w+\.md)", PAGES["README.md"]))
    assert {p.name for p in DOCUMENTS} - {"README.md"} == linked


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_no_page_names_a_machine_or_a_person(path):
    text = PAGES[path.name]
    assert re.findall(r"(?<![\w.])/(?:home|root|work|tmp|Users|mnt)/\S*", text) == []
    assert re.findall(r"\S+@\S+\.\w+|TODO|FIXME", text) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_files_that_are_named_exist(path):
    """Files of this tree, in code marks and with their directory."""
    names = re.findall(
        r"`((?:csrc|dcp_native|tests|benchmarks|tools|docs|demo)/[\w./-]+\.\w+)`", PAGES[path.name]
    )
    assert [n for n in names if not (ROOT / n).exists()] == []


# ---- what is generated, and tables that must be complete ----


def check(program: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / program), "--check"],
        env={**os.environ, "PYTHONPATH": str(ROOT), VARIABLE: "0"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_figures_are_those_of_the_recorded_runs():
    check("benchmarks/document.py")


@pytest.fixture
def document(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("document")


def bench_result(repeats):
    """As bench.py writes it: ours, torch at three settings, a rival, the limit."""

    def side(wall_s, **more):
        done = {"wall_s": wall_s, "cpu_s": wall_s / 4, "extra_bytes": 3 << 20}
        return {"save": done, "load": {**done, "wall_s": wall_s / 2}, **more}

    summary = {
        "dcp_native": side(2.0),
        "torch1": side(9.0),
        "torch4": side(6.0),
        "torchsnapshot": side(5.0),
        "torch1 reads dcp_native": {"load": {"wall_s": 0.1}},
        "limit": side(1.8),
    }
    cases = {"llama on disk": {"bytes": 2e9, "repeats": repeats, "summary": summary}}
    machine = {"torch": "2.13.0+cpu", "time_utc": "2026-11-22T100000"}
    return {"machine": machine, "args": {"size": "full"}, "cases": cases}


def test_a_result_of_make_bench_becomes_rows(document):
    rows = document.rows_of_bench(bench_result(3)["cases"])
    save, cpu, memory, load = rows[:4]
    assert save["what"] == "save, llama on disk, 2.00 GB (medians of 3)"
    assert (save["ours"], save["torch"], save["limit"]) == (
        "2 s (90% of the limit)", "6 s (3x)", "1.8 s",
    )  # fmt: skip
    assert save["rivals"] == {"torchsnapshot": "5 s (2.5x)"}
    assert document.times_of(load) == (1.0, 3.0, 0.9, 3.0)
    assert (cpu["ours"], memory["ours"]) == ("0.25 s/GB", "3 MiB")
    assert [label for label, *_ in document.plotted({"rows": rows})] == [
        save["what"], load["what"],
    ]  # fmt: skip
    head, _, line, *_ = document.table_of(rows)
    assert head == "| what | ours | torch | torchsnapshot | limit |"
    assert line.split(" | ")[1:] == [
        "2 s (90% of the limit)", "6 s (3x)", "5 s (2.5x)", "1.8 s |",
    ]  # fmt: skip


def test_only_results_that_are_figures_are_recorded(document, monkeypatch, tmp_path):
    monkeypatch.setattr(document, "RECORDED", tmp_path)
    path = tmp_path / "2026-11-22T100000-full.json"
    path.write_text(json.dumps(bench_result(5)))
    kept = json.loads(document.record(path, None, None).read_text())
    assert kept["machine"]["torch"] == "2.13.0+cpu"
    assert kept["rows"][0]["what"] == "save, llama on disk, 2.00 GB"

    path.write_text(json.dumps({**bench_result(1), "args": {"size": "small"}}))
    with pytest.raises(SystemExit, match="no figure"):
        document.record(path, None, None)
    quick = tmp_path / "2026-11-22T100000-state_dict-quick.json"
    quick.write_text(json.dumps({"machine": {"torch": "2.13.0"}, "rows": []}))
    with pytest.raises(SystemExit, match="no figure"):
        document.record(quick, None, None)


def test_every_program_of_the_page_writes_what_can_be_recorded(document):
    for name in document.PROGRAMS.keys() - {"bench"}:
        text = (ROOT / f"benchmarks/{name}.py").read_text(encoding="utf-8")
        assert f'publish("{name}"' in text or f'main_of_parts(\n        "{name}"' in text, name


def test_every_row_of_the_first_picture_was_recorded(document):
    for label, ours, torch_s, _limit, factor in document.shown(document.recorded()):
        assert ours > 0 and torch_s > 0, label
        assert factor == pytest.approx(torch_s / ours, rel=0.02), label


def test_the_reference_is_that_of_the_docstrings():
    if not torch.__version__.startswith("2.13."):
        pytest.skip("inherited signatures in it are those of torch 2.13")
    check("tools/api_reference.py")


def test_every_environment_variable_is_in_the_table():
    rows = {
        variable: (setting, default)
        for variable, setting, default in re.findall(
            r"^\| `(DCP_NATIVE\w*)` \| `?([\w-]+)`? \| ([\w.]+) \|", PAGES["operate.md"], re.M
        )
    }
    defaults = {field.name: field.default for field in dataclasses.fields(_config.Config)}
    wanted = {
        variable: (setting, str(defaults[setting]))
        for variable, (setting, _) in _config.ENVIRONMENT.items()
    }
    shown = {"True": "1", "False": "0", "0.0": "0", "10.0": "10"}
    wanted = {v: (s, shown.get(d, d)) for v, (s, d) in wanted.items()}
    assert rows == {**wanted, VARIABLE: ("-", "0")}


def test_every_setting_has_a_variable():
    assert {field for field, _ in _config.ENVIRONMENT.values()} == {
        field.name for field in dataclasses.fields(_config.Config)
    }


def test_variables_that_are_read_elsewhere_are_named():
    sources = [ROOT / "setup.py", *(ROOT / "tests").rglob("*.py"), *(ROOT / "csrc").rglob("*.c")]
    used = {
        name
        for path in sources
        if path != Path(__file__)
        for name in re.findall(r"\bDCP_NATIVE_[A-Z_]+[A-Z]\b", path.read_text(encoding="utf-8"))
    }
    named = set(re.findall(r"\bDCP_NATIVE_[A-Z_]+\b", PAGES["operate.md"]))
    assert used - named == set()


def without_metadata(path: Path) -> None:
    (path / ".metadata").unlink()


def without_data(path: Path) -> None:
    next(path.glob("*.distcp")).unlink()


def damaged(path: Path) -> None:
    data = bytearray(next(path.glob("*.distcp")).read_bytes())
    data[300] ^= 1
    next(path.glob("*.distcp")).write_bytes(data)


@pytest.mark.parametrize(
    ("what", "target", "code", "text"),
    [
        (without_metadata, {"w": torch.zeros(99)}, "ASSERTION", "metadata is None"),
        (without_data, {"w": torch.zeros(99)}, "NOENT", ""),
        (damaged, {"w": torch.zeros(99)}, "CHECKSUM", ""),
        (None, {"x": torch.zeros(99)}, None, "Missing key in checkpoint state_dict: "),
        (None, {"w": torch.zeros(98)}, None, "Size mismatch between saved "),
    ],
)
def test_a_failure_has_the_code_or_text_that_operators_read_of(tmp_path, what, target, code, text):
    dcp.save({"w": torch.ones(99)}, checkpoint_id=tmp_path)
    if what is not None:
        what(tmp_path)
    with pytest.raises(dcp.CheckpointException) as caught:
        dcp.load(target, checkpoint_id=tmp_path)
    reason = caught.value.failures[0][0]
    assert getattr(reason, "dcp_code", None) == code
    assert str(reason).startswith(text)
    shown = f"`{code}`" if code else f'{type(reason).__name__}, "{text.strip()}'
    (row,) = [line for line in PAGES["operate.md"].splitlines() if line.startswith(f"| {shown}")]
    assert text.strip() in row


def test_every_error_code_is_explained():
    header = (ROOT / "csrc/include/dcp_error.h").read_text()
    codes = set(re.findall(r"\bX\((\w+), -\d+,", header))
    explained = {
        code
        for cell in re.findall(r"^\| (`[A-Z`, ]+`) \|", PAGES["operate.md"], re.M)
        for code in re.findall(r"\w+", cell)
    }
    assert explained == codes
