"""Which tests stay together when several processes run them (`pytest -n 2`): one group at a time
goes to each process.  conftest.py of the folders that are run so imports the hook.

A group is a file, whose fixtures are made once.  But a job of ranks runs all cases of a module at
once, so that each (module, ranks, backend) is a group; and what builds in this tree is one group.
"""

from __future__ import annotations

import re
from pathlib import PurePath

import pytest

BUILDS_IN_THE_TREE = {"test_bench", "test_cuda_build", "test_layers", "test_writer_build"}
CASE = re.compile(r"::test_case_holds_on_every_rank\[(.*)-case_\w+\]$")


def group_of(nodeid: str) -> str:
    file = PurePath(nodeid.partition("::")[0]).stem
    if job := CASE.search(nodeid):
        return job[1]
    return "builds" if file in BUILDS_IN_THE_TREE else file


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    from xdist.scheduler import LoadScopeScheduling

    class Scheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

        def remove_node(self, node):
            """A test that ended its process has failed; another runs what is left of its group."""
            groups = self.assigned_work[node]
            left = [name for tests in groups.values() for name, done in tests.items() if not done]
            for name in left[:1]:
                groups[group_of(name)][name] = True
            self.assigned_work[node] = {g: t for g, t in groups.items() if not all(t.values())}
            super().remove_node(node)
            return left[0] if left else None

    return Scheduling(config, log)
