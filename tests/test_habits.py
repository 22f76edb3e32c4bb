"""What the project promises to those who work on it: one version, one set of checks, nothing that skips unseen."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import fedleak

ROOT = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(not (ROOT / ".ci").is_dir(), reason=".ci/ is not in this distribution")


def test_one_version():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["version"] == fedleak.__version__
    assert yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"] == fedleak.__version__
    assert re.search(rf"^## \[{re.escape(fedleak.__version__)}\] - ", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_the_hooks_run_what_ci_runs():
    (local,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    commands = (ROOT / ".ci" / "run").read_text().splitlines()
    for hook in local["hooks"]:
        assert any(hook["entry"] in command for command in commands), hook["entry"]
    assert {"ruff check", "ruff format", "mypy", "pytest"} == {hook["name"] for hook in local["hooks"]}


def test_what_skips_for_want_of_a_package_fails_in_ci(tmp_path):
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path)
    (tmp_path / "test_one.py").write_text("import pytest\npytest.importorskip('no_such_package')\n")
    (tmp_path / "test_two.py").write_text(
        "import pytest\n"
        "@pytest.fixture\ndef lacking():\n    pytest.importorskip('no_such_package')\n"
        "def test_fixture(lacking): pass\n"
        "@pytest.mark.skip(reason='needs ../shared/data')\ndef test_data(): pass\n"
        "@pytest.mark.xfail\ndef test_fault(): raise ValueError\n"
    )
    command = [sys.executable, "-m", "pytest", "-q", "--continue-on-collection-errors", "-c", os.devnull, "--rootdir=."]
    told = {k: v for k, v in os.environ.items() if not k.startswith(("SLIPCOVER", "PYTEST"))} | {"FEDLEAK_NO_SKIP": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=told, capture_output=True, text=True, timeout=120)
    assert "1 skipped, 1 xfailed, 2 errors" in done.stdout
