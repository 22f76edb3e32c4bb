"""The Dockerfile against the project it installs; nothing is built here."""

import shlex
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"

pytestmark = pytest.mark.skipif(not DOCKER.is_dir(), reason="docker/ is not in this distribution")


def instructions():
    text = (DOCKER / "Dockerfile").read_text().replace("\\\n", " ")
    return [line.split(maxsplit=1) for line in text.splitlines() if line and not line.startswith("#")]


def copied():
    return [source for word, rest in instructions() if word == "COPY" for source in rest.split()[:-1]]


def test_what_is_copied_exists_and_is_in_the_build_context():
    allowed = (DOCKER / "Dockerfile.dockerignore").read_text().split()
    assert {f"!{source}" for source in copied()} <= set(allowed)
    needed = {"fedleak", "conf", "pyproject.toml", "LICENSE"}
    assert needed <= set(copied())
    assert all((ROOT / source).exists() for source in needed)


def test_pytorch_is_what_the_project_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    install = next(rest for word, rest in instructions() if word == "RUN" and "torchvision" in rest)
    for package in ("torch>", "torchvision>"):
        (asked,) = [line for line in project["dependencies"] if line.startswith(package)]
        assert asked in shlex.split(install.split("pip install")[1])


def test_it_runs_the_main_command():
    words = {word: rest for word, rest in instructions() if word in ("ENTRYPOINT", "CMD")}
    assert words == {"ENTRYPOINT": '["fedleak"]', "CMD": '["run"]'}
