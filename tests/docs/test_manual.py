"""Every command and every piece of Python that the manual shows is run, page by page, with small settings."""

import importlib.util
import json
import re
import shlex
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from fedleak.cli import COMMANDS, main

DOCS = Path(__file__).parents[2] / "docs"
PAGES = [path.stem for path in sorted(DOCS.glob("*.md"))]
NOTEBOOKS = [path.stem for path in sorted((DOCS / "notebooks").glob("*.ipynb"))]
LONG = {"scale", "tutorial", "condensation", "defense", "your_own_defense"}
FRAGMENTS = {"audit"}
"""Pages whose Python belongs into a user's own app: it is read, the apps of ``tests/apps`` hold it and are run."""
FENCE = re.compile(
    r"^```(?P<kind>\{code-block\} \w+|\w+)\n(?P<body>.*?)^```$|^ {4}(?P<line>fedleak [^\n]*)$", re.M | re.S
)

SHORT = ["attack.max_evaluations=3", "attack.restarts=1"]
SMALL = {
    "run": [*SHORT, "federation.rounds=2", "federation.clients=2", "federation.batch_size=1", "limit=off"],
    "attack": SHORT,
    "labels": ["labels.runs=1", "labels.batch_sizes=[2]"],
    "audit": ["--seconds", "5"],
    "frontier": [
        *("~frontier.defenses.gaussian", "~frontier.defenses.dpsgd"),
        *("~frontier.defenses.pruning", "~frontier.defenses.clipping", "~frontier.defenses.sign"),
        *("~frontier.attackers.map", "~frontier.attackers.adaptive", "frontier.moments=[1]", "frontier.processes=1"),
        *("federation.rounds=2", "federation.clients=2", "federation.capture_every=1", "federation.evaluate_every=1"),
    ],
    "condense": ["condense.networks=1", "condense.matches=1", "condense.epochs=1", "condense.evaluations=1"],
}
"""Command -> what makes it short; it stands behind what the manual says, and the last one counts."""


@dataclass
class Block:
    """A fenced block of a page: ``sh``, ``python``, or a file with its name."""

    kind: str
    text: str
    file: str | None


def blocks(page):
    for found in FENCE.finditer((DOCS / f"{page}.md").read_text()):
        kind, body = ("sh", found["line"]) if found["line"] else (found["kind"], found["body"])
        caption = re.match(r":caption: (\S+)\n\n", body)
        if kind.startswith("{code-block}"):
            yield Block("file", body[caption.end() :], caption[1])
        else:
            yield Block(kind, body, None)


def commands(page):
    return [line for block in blocks(page) if block.kind == "sh" for line in block.text.splitlines() if line]


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty working directory, where own files are found, with a tiny MNIST in DIR."""
    from fedleak.data import digits

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    raw, data = tmp_path / "DIR" / "MNIST" / "raw", digits()
    raw.mkdir(parents=True)
    for split, images, labels in (
        ("train", data.train_images[:200], data.train_labels[:200]),
        ("t10k", data.test_images[:50], data.test_labels[:50]),
    ):
        shape = b"".join(size.to_bytes(4, "big") for size in (len(images), 28, 28))
        (raw / f"{split}-images-idx3-ubyte").write_bytes(b"\0\0\x08\x03" + shape + images.numpy().tobytes())
        header = b"\0\0\x08\x01" + len(labels).to_bytes(4, "big")
        (raw / f"{split}-labels-idx1-ubyte").write_bytes(header + labels.byte().numpy().tobytes())
    modules = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - modules:
        if name.startswith("my_"):
            del sys.modules[name]


def timed(names):
    """Parameters, the long ones marked slow: CI runs those of this folder too."""
    return [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in names]


@pytest.fixture
def an_app(elsewhere, monkeypatch):
    """The app of the manual: Flower's quickstart under the name that stands there; its capture comes of auditing it."""
    folder = elsewhere / "path" / "to" / "app"
    shutil.copytree(DOCS.parent / "tests" / "apps" / "quickstart", folder)
    (folder / "quickapp").rename(folder / "myapp")
    for path in folder.rglob("*.*"):
        path.write_text(path.read_text().replace("quickapp", "myapp"))
    monkeypatch.syspath_prepend(folder)
    (elsewhere / "captures").symlink_to(elsewhere / "audit" / "captures")


def perform(line):
    """Run a line of the manual, shortened; returns the exit code, an audit's verdict counting as none."""
    first, command, *words = shlex.split(line)
    assert first == "fedleak"
    code = main([command, *words, *SMALL.get(command, [])])
    return 0 if command == "audit" and code in (3, 4, 5) else code


@pytest.mark.parametrize("page", timed(PAGES))
def test_what_a_page_shows_can_be_done_in_its_order(page, elsewhere, an_app):
    names: dict = {}
    for block in blocks(page):
        if block.kind == "file":
            path = elsewhere / block.file
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text)
        elif block.kind == "python":
            code = compile(block.text, f"{page}.md", "exec")
            if page not in FRAGMENTS:
                exec(code, names)
        elif block.kind == "sh":
            for line in filter(None, block.text.splitlines()):
                assert perform(line) == 0, line


def test_the_manual_shows_every_command():
    shown = {shlex.split(line)[1] for page in PAGES for line in commands(page)}
    assert shown == COMMANDS.keys()


@pytest.mark.parametrize("name", timed(NOTEBOOKS))
def test_a_notebook_runs_from_top_to_bottom(name, elsewhere, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    names: dict = {"__name__": "notebook"}
    for cell in json.loads((DOCS / "notebooks" / f"{name}.ipynb").read_text())["cells"]:
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), name, "exec"), names)
    # What it claims, on the numbers that it has just made.
    if name == "what_an_update_tells":
        assert names["error"] < 1e-3
        assert names["guess"].best.tolist() == sorted(names["labels"].tolist())
    else:
        table = names["table"].set_index(["defense", "attack"])["median MSE"]
        assert table["none", "most likely images"] < 1e-3 < table["noise", "most likely images"]


def test_the_site_shows_what_the_notebooks_gave():
    for name in NOTEBOOKS:
        cells = json.loads((DOCS / "notebooks" / f"{name}.ipynb").read_text())["cells"]
        assert any(cell.get("outputs") for cell in cells), f"{name}: execute it before it is committed"


def generate():
    spec = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["generate"] = module  # dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


def test_every_key_has_a_meaning_and_the_page_of_keys_is_up_to_date():
    text, nowhere = generate().page()
    assert nowhere == []
    assert text == (DOCS / "configuration.md").read_text(), "run python docs/generate.py"


def test_keys_are_read_with_their_values_comments_and_owners(tmp_path):
    (tmp_path / "one.yaml").write_text(
        "# what it is\n_target_: my.Outer\nsize: 3  # how large\npart:\n  _target_: my.Inner\n  name: a#b\n"
        "quick:\n  size: 1\nlast: {x: 1}\n"
    )
    module = generate()
    found = [(key.name, key.value, key.meaning, key.target) for key in module.read(tmp_path / "one.yaml")]
    assert ("size", "3", "how large", "my.Outer") in found
    assert ("part.name", "a#b", "", "my.Inner") in found
    assert ("last", "{x: 1}", "", "my.Outer") in found
    assert not any(name.startswith("quick") for name, *_ in found)
    text = "Does.\n\nArgs:\n    a, b: one\n        and more.\n    c: two\n\nReturns:\n    d: no\n"
    said = {name: meaning for names, meaning in module.sections(text) for name in names}
    assert said == {"a": "one and more.", "b": "one and more.", "c": "two"}
