"""Every command of docs/audit.md and of the README's section, run on a small app."""

import json
import re
import shlex
import sys
from pathlib import Path

import pytest

from fedleak.audit.app import read_app, run_app
from fedleak.audit.report import EXIT_CODES
from fedleak.cli import main

ROOT = Path(__file__).parents[2]
APP = ROOT / "tests" / "apps" / "quickstart"

pytestmark = pytest.mark.skipif(not (ROOT / "docs").is_dir(), reason="docs/ is not in this distribution")


def commands() -> list[list[str]]:
    """The indented lines of both pages that start with ``fedleak audit``, each once."""
    text = (ROOT / "docs" / "audit.md").read_text() + (ROOT / "README.md").read_text()
    found = re.findall(r"^    fedleak (audit [^#\n]*)", text, re.MULTILINE)
    return [shlex.split(line) for line in dict.fromkeys(line.strip() for line in found)]


def test_the_pages_have_commands():
    assert len(commands()) >= 3


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_of_the_pages_works(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(APP))
    run_app(read_app(APP), tmp_path / "captures", nodes=2, rounds=1)
    if not words[1].startswith("path/"):
        assert words[1] == "captures"
    named = {"path/to/app": str(APP), "path/to/flower/app": str(APP)}
    given = [named.get(w, w).replace("myapp.task", "quickapp.task") for w in words]
    # The page's momentum is not this app's, which the preflight would tell.
    given = [w.replace("momentum=0.9,", "") for w in given]
    try:
        assert main(given) == EXIT_CODES["exposed"]
        assert json.loads((tmp_path / "audit" / "audit.json").read_text())["verdict"] == "exposed"
        assert str(tmp_path / "audit" / "audit.html") in capsys.readouterr().out
    finally:
        for name in [name for name in sys.modules if name.startswith("quickapp")]:
            del sys.modules[name]


def test_the_pages_verdicts_and_exit_codes_are_those_of_the_code():
    page = (ROOT / "docs" / "audit.md").read_text()
    assert [verdict for verdict in EXIT_CODES if f"| {verdict} |" not in page] == []
    for verdict, code in EXIT_CODES.items():
        if code:
            assert f"**{code}** {verdict}" in page
