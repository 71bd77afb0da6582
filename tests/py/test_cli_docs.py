"""docs/cli.md: every command in it runs, and ends as the document says."""

from __future__ import annotations

import importlib.util
import json
import re
import shlex

import cli
import pytest
from conftest import ROOT

import dcp_native as dcp
from dcp_native import _trace
from dcp_native._cli.main import COMMANDS

TEXT = (ROOT / "docs" / "cli.md").read_text()


def commands() -> list[tuple[list[str], int]]:
    """Each command of the fenced blocks, and the exit status that its remark names."""
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```", TEXT, re.M | re.S):
        for line in block.splitlines():
            status = re.search(r"# exit status ([0-9])", line)
            found.append((shlex.split(line, comments=True), int(status[1]) if status else 0))
    return found


def test_every_command_of_the_document_runs(tmp_path, monkeypatch):
    (tmp_path / "reports").mkdir()
    dcp.configure(trace=tmp_path / "traces")
    for number in (100, 200, 300):
        cli.save(tmp_path / "run" / f"step-{number}", cli.state(seed=number, step=number))
        report = json.dumps(dict(dcp.last_report()))
        (tmp_path / "reports" / f"step-{number}-rank-0.json").write_text(report)
    dcp.configure(trace=None)
    _trace.stop()
    monkeypatch.chdir(tmp_path)
    for argv, status in commands():
        if argv[1] == "plot" and importlib.util.find_spec("matplotlib") is None:
            continue
        assert argv[0] == "dcp-native"
        done = cli.run(*argv[1:])
        assert done.status == status, (argv, done)
        assert "\x1b" not in done.out


def test_every_command_is_in_the_document():
    shown = {argv[1] for argv, _ in commands()}
    assert shown == set(COMMANDS)


@pytest.mark.parametrize("option", sorted(set(re.findall(r"`(--[a-z-]+)", TEXT))))
def test_every_option_that_it_names_is_there(option):
    known = "".join(cli.run(command, "--help").out for command in COMMANDS)
    assert option in known
