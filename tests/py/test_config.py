"""Settings that are not one of a few words."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from conftest import ROOT

import dcp_native as dcp


@pytest.mark.parametrize("setting", ["auto", "off", 1, 1 << 40])
def test_replicas_are_split_from_a_number_of_bytes_on(setting):
    dcp.configure(split_replicated=setting)
    assert dcp.config().split_replicated == setting


@pytest.mark.parametrize("setting", ["on", "1", "", 0, -1, True, 2**64 - 1, 1.5, None, [1]])
def test_other_settings_of_the_split_are_refused(setting):
    before = dcp.config()
    with pytest.raises(ValueError, match="split_replicated must be"):
        dcp.configure(split_replicated=setting)
    assert dcp.config() == before


@pytest.mark.parametrize(("text", "setting"), [("off", "'off'"), ("4096", "4096"), ("-1", None)])
def test_the_split_is_set_by_the_environment(text, setting):
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    program = "import dcp_native; print(repr(dcp_native.config().split_replicated))"
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": path, "DCP_NATIVE_SPLIT_REPLICATED": text},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip() == (setting or "")
    assert (done.returncode == 0) == (setting is not None)
    assert setting is not None or "split_replicated must be" in done.stderr
