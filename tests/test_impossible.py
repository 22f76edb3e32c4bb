"""Generated impossible configurations: each is refused with exit code 2, in one line, quickly, and leaves nothing."""

from __future__ import annotations

import importlib.util
import os
import shutil
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings

import fedleak.models.vision
import fedleak.prepare  # noqa: F401
from fedleak.cli import main

_spec = importlib.util.spec_from_file_location("impossible", Path(__file__).with_name("impossible.py"))
impossible = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(impossible)


class Accepted(Exception):
    """It was found possible, and would have run."""


@pytest.fixture
def refuse(tmp_path, monkeypatch, capfd):
    """What is wrong with how a command line is refused, None for nothing; raises `Accepted`."""
    (tmp_path / "a_file").write_text("")
    monkeypatch.chdir(tmp_path)

    def accept(*arguments, **named):
        raise Accepted

    def run(words: list[str]) -> str | None:
        capfd.readouterr()
        began = time.process_time()
        monkeypatch.setattr("hydra.main", accept)
        try:
            code = main(["run", *words])
        except Accepted:
            shutil.rmtree(tmp_path / "outputs")  # was made for it
            raise
        except BaseException as error:
            return f"{type(error).__name__}: {error}"
        took, err = time.process_time() - began, capfd.readouterr().err
        left = sorted(path.name for path in tmp_path.iterdir())
        for name in {*left} - {"a_file"}:
            shutil.rmtree(tmp_path / name)
        if code != 2:
            return f"exit code {code}: {err[-200:]}"
        if err.count("\n") != 1 or "Traceback" in err or not err.startswith("fedleak: "):
            return f"not one line: {err[-300:]}"
        if took > 2:  # of CPU, imports not counted
            return f"took {took:.1f} s"
        return None if left == ["a_file"] else f"left {left}"

    return run


def judged(refuse, count: int, strategy) -> tuple[int, int, list[str]]:
    """(tried, accepted, what is wrong)."""
    tried, accepted, wrong, seen = 0, [], [], set()

    @settings(
        max_examples=count, derandomize=True, database=None, deadline=None, suppress_health_check=list(HealthCheck)
    )
    @given(strategy)
    def each(words):
        nonlocal tried
        if tuple(words) in seen:
            return
        seen.add(tuple(words))
        tried += 1
        try:
            if (problem := refuse(words)) is not None:
                wrong.append(f"{' '.join(words)}: {problem}")
        except Accepted:
            accepted.append(" ".join(words))

    each()
    return tried, accepted, wrong


def test_some_impossible_configurations(refuse):
    tried, accepted, wrong = judged(refuse, 25, impossible.command_lines())
    assert not wrong + accepted, "\n".join(wrong + accepted)
    assert tried > 15


def test_some_doubtful_ones(refuse):
    _, _, wrong = judged(refuse, 8, impossible.doubtful_lines())
    assert not wrong, "\n".join(wrong)


@pytest.mark.slow
def test_five_hundred_impossible_configurations(refuse, capfd):
    tried, accepted, wrong = judged(refuse, int(os.environ.get("FEDLEAK_CASES", "900")), impossible.command_lines())
    tried_too, accepted_too, wrong_too = judged(
        refuse, int(os.environ.get("FEDLEAK_CASES", "900")) // 3, impossible.doubtful_lines()
    )
    with capfd.disabled():
        print(f"\n{tried - len(accepted) - len(wrong)} of {tried} impossible ones were refused as they should be")
        print(f"of {tried_too} doubtful ones {len(accepted_too)} were accepted, and {len(wrong_too)} refused amiss")
        for name, ones in (("wrong", wrong + wrong_too), ("accepted", accepted), ("perhaps possible", accepted_too)):
            for one in ones:
                print(f"  {name}: {one}")
    assert tried >= 500
    assert not wrong + accepted + wrong_too
