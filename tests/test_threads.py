"""Threads: what is set before torch is loaded, how many compute, and who is warned."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from equipoise.pipeline import threads

VARIABLES = ("OMP_WAIT_POLICY", "OMP_NUM_THREADS")
COMMAND = """
from equipoise.cli.main import main
try: main(['recipes'])
except SystemExit: pass
"""


def python(program: str, *options: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in VARIABLES}
    return subprocess.run(
        [sys.executable, *options, "-c", program],
        capture_output=True, text=True, timeout=120, env=kept | variables,
    )  # fmt: skip


@pytest.mark.parametrize("program", ["import equipoise", "import equipoise.types", COMMAND])
@pytest.mark.parametrize("given", ["", "ACTIVE"])
def test_the_policy_is_set_before_torch_unless_the_operator_has(program: str, given: str) -> None:
    shown = "import os, sys\nprint('SET', os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules)"
    variables = {"OMP_WAIT_POLICY": given} if given else {}
    done = python(f"{program}\n{shown}", "-W", "error", **variables)
    wanted = f"SET {given or 'PASSIVE'} False"
    assert done.stdout.rstrip().endswith(wanted), done.stdout + done.stderr


@pytest.mark.parametrize(
    ("given", "warned"),
    [({}, 1), ({"OMP_WAIT_POLICY": "PASSIVE"}, 0), ({"OMP_NUM_THREADS": "1"}, 0)],
)
def test_who_imports_torch_first_is_told_once(given: dict[str, str], warned: int) -> None:
    # An empty module stands in for torch: whether it is there is all that is asked.
    program = (
        "import sys, types\n"
        "sys.modules['torch'] = types.ModuleType('torch')\n"
        "import equipoise, equipoise.types\n"
        "import equipoise"
    )
    done = python(program, **given)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("import equipoise first") == warned
    assert ("<string>:3" in done.stderr) == bool(warned)


@pytest.mark.parametrize(
    ("one", "two", "four", "expected"),
    [
        ([100, 100, 100, 100], [180, 180, 180, 180], [300, 300, 300, 300], 4),
        ([10, 100, 100, 100], [60, 60, 60, 60], [50, 50, 50, 50], 1),  # a burst of other work
        ([100, 100, 100, 100], [105, 105, 105, 105], [107, 107, 107, 107], 1),  # hardly a gain
        ([100, 100, 100, 100], [20, 20, 20, 20], [150, 150, 150, 150], 4),
    ],
)
def test_the_number_of_threads_is_not_that_of_one_moment(
    one: list[int],
    two: list[int],
    four: list[int],
    expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    speeds = {1: iter(one), 2: iter(two), 4: iter(four)}
    monkeypatch.setattr(threads, "_speed", lambda _width, n: float(next(speeds[n])))
    assert threads.fastest(64, most=4) == expected
