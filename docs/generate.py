"""Write ``docs/configuration.md``: every configuration key with its meaning, from the YAML files and the docstrings.

A key's meaning is the comment behind it in its YAML file, else what the docstring of the class that it goes to says of
it, else the comment that another choice of its group has behind it. Run it after changing either::

    python docs/generate.py
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

DOCS = Path(__file__).parent
PAGE = DOCS / "configuration.md"
COMMANDS = {
    "config": ("fedleak run", "and `fedleak attack`, which goes on from an earlier run's configuration."),
    "labels": ("fedleak labels", "which compares label inference methods."),
    "condense": ("fedleak condense", "which condenses a data set."),
}
"""Root file -> its command, and what else there is to say of it. Others are listed by their file's name."""
TYPED = {
    "federation": "fedleak.setup.Federation",
    "threat": "fedleak.threat.ThreatModel",
    "attack": "fedleak.setup.AttackPlan",
    "labels": "fedleak.studies.LabelInferenceStudy",
    "condense": "fedleak.studies.Condensation",
}
"""First part of a key without a `_target_` -> the class whose docstring explains the rest."""
LINE = re.compile(r"^(?P<indent> *)(?P<key>[\w/@ -]+):(?:\s+(?P<value>(?!#).*?))?(?:\s+#\s*(?P<comment>.*))?$")

HEAD = """# Every key

```{note}
Written by `docs/generate.py` from `conf/` and the docstrings: change those, and run it again.
```

`group=choice` picks a part, `group.key=value` sets one of its values, and `key=value` one that belongs to no group.
`fedleak list` prints the choices, `fedleak run --cfg job` a whole configuration as it is composed.
"""


@dataclass
class Key:
    """A line of a YAML file: where it stands, its value as written, its comment, and the class that it goes to."""

    name: str
    value: str
    meaning: str
    target: str


def read(path: Path) -> Iterator[Key]:
    """The keys of a YAML file that hold values, those of nested nodes by their dotted names."""
    parents: list[tuple[int, str]] = []
    targets: dict[str, str] = {}
    skipped: int | None = None
    for line in path.read_text().splitlines():
        found = LINE.match(line)
        if found is None or line.lstrip().startswith(("#", "- ")):
            continue
        indent, key, value = len(found["indent"]), found["key"].strip(), (found["value"] or "").strip()
        if skipped is not None and indent > skipped:
            continue
        skipped = None
        while parents and parents[-1][0] >= indent:
            parents.pop()
        above = ".".join(name for _, name in parents)
        if key == "_target_":
            targets[above] = value
        elif key in ("defaults", "hydra", "quick") and value == "":
            skipped = indent
        else:
            name = f"{above}.{key}" if above else key
            parents.append((indent, key))
            owner = next((targets[a] for a in _above(name) if a in targets), "")
            yield Key(name, value, (found["comment"] or "").strip(), owner)


def _above(name: str) -> Iterator[str]:
    """The dotted names of the nodes that a key stands in, the nearest first, the file's own last."""
    while "." in name:
        name = name.rpartition(".")[0]
        yield name
    yield ""


@cache
def arguments(target: str) -> dict[str, str]:
    """Argument -> what the docstrings of a class or function, its bases and its module say of it."""
    module, _, name = target.rpartition(".")
    __import__(module)
    found: Any = getattr(sys.modules[module], name)
    sources = list(inspect.getmro(found)) if inspect.isclass(found) else [found]
    texts = [inspect.getdoc(source) or "" for source in sources if source is not object]
    texts.append(inspect.getdoc(sys.modules[found.__module__]) or "")
    said: dict[str, str] = {}
    for text in texts:
        for names, meaning in sections(text):
            for each in names:
                said.setdefault(each, meaning)
    return said


def sections(text: str) -> Iterator[tuple[list[str], str]]:
    """What a docstring says of arguments, names and meaning: ``Args:``, ``Attributes:``, or numpy's ``Parameters``."""
    inside, entry = False, ""
    for line in [*text.splitlines(), ""]:
        if re.match(r"^(Args|Attributes)\b.*:$", line):
            inside = True
        elif inside and re.match(r"^    \S", line):
            yield from _entry(entry)
            entry = line.strip()
        elif inside and line.startswith("     "):
            entry += " " + line.strip()
        elif inside and line.strip() == "":
            yield from _entry(entry)
            entry = ""
        elif inside:
            inside = False
    yield from _entry(entry)
    _, _, numpys = text.partition("Parameters\n----------\n")
    for found in re.finditer(r"^(\w+) ?: .*\n((?:    .*\n?)+)", numpys, re.M):
        yield [found[1]], " ".join(found[2].split())


def _entry(entry: str) -> Iterator[tuple[list[str], str]]:
    names, colon, meaning = entry.partition(": ")
    if colon and all(re.fullmatch(r"\w+", name.strip()) for name in names.split(",")):
        yield [name.strip() for name in names.split(",")], meaning.replace("``", "`")


def full(group: str, path: Path) -> list[Key]:
    """The keys of a choice by their full names, those that only open a nested node left out."""
    at = "" if "# @package _global_" in path.read_text() else group.replace("/", ".") + "."
    found = list(read(path))
    opened = {key.name.rpartition(".")[0] for key in found}
    kept = [replace(key, name=at + key.name) for key in found if key.value or key.name not in opened]
    # An experiment's other keys are set, not explained, by it.
    return [key for key in kept if group != "experiment" or key.name.startswith("study.")]


def documented(key: Key) -> str:
    """What the class says that the key goes to."""
    first, _, rest = key.name.partition(".")
    target = key.target or TYPED.get(first, "")
    said = arguments(target) if target else {}
    return next((said[name] for name in (key.name.rpartition(".")[2], *rest.split(".")) if name in said), "")


def collect() -> tuple[dict[str, list[Key]], dict[tuple[str, str], list[Key]], dict[str, str]]:
    """Keys of the root files, keys of the choices by (group, choice), and full name -> a meaning written somewhere."""
    from fedleak.config import choice_files, conf_dir

    roots = {path.stem: list(read(path)) for path in sorted(conf_dir().glob("*.yaml"))}
    choices = {(g, name): full(g, path) for g, files in choice_files().items() for name, path in files.items()}
    meanings: dict[str, str] = {}
    every = [key for keys in (*roots.values(), *choices.values()) for key in keys]
    for source in (lambda key: key.meaning, documented):
        for key in every:
            if said := source(key):
                meanings.setdefault(key.name, said)
    return roots, choices, meanings


def meaning(key: Key, meanings: dict[str, str]) -> str:
    """Its own comment, its class's word, what is written elsewhere, or what is said of the node that it stands in."""
    nodes = [node for node in _above(key.name) if "." in node]
    own = key.meaning or (documented(key) if key.target else "")
    return own or next((meanings[name] for name in (key.name, *nodes) if name in meanings), "")


def page() -> tuple[str, list[str]]:
    """The whole page, and the keys whose meaning is nowhere written."""
    from fedleak.config import choices as described

    roots, choices, meanings = collect()
    lines, nowhere = [HEAD], []
    for root, keys in sorted(roots.items(), key=lambda item: (item[0] != "config", item[0])):
        command, said = COMMANDS.get(root, (f"fedleak {root}", ""))
        lines += [f"## Keys of {command}", "", f"`{command}`, {said}" if said else f"`{command}`.", ""]
        lines += ["| key | default | meaning |", "|---|---|---|"]
        for key in keys:
            if key.value:
                lines.append(f"| `{key.name}` | `{_cell(key.value)}` | {_cell(meaning(key, meanings))} |")
                nowhere += [] if meaning(key, meanings) else [f"{root}.yaml: {key.name}"]
        lines.append("")
    for group, options in described().items():
        lines += [f"## {group}", "", "| choice | is |", "|---|---|"]
        lines += [f"| `{name}` | {_cell(description)} |" for name, description in options]
        rows: dict[tuple[str, str], list[tuple[str, str]]] = {}
        for choice, _ in options:
            for key in choices[group, choice]:
                said = meaning(key, meanings)
                nowhere += [] if said else [f"{group}={choice}: {key.name}"]
                rows.setdefault((key.name, said), []).append((choice, key.value))
        if rows:
            lines += ["", "| key | value in the choices | meaning |", "|---|---|---|"]
        order = list(dict.fromkeys(name for name, _ in rows))
        for (name, said), values in sorted(rows.items(), key=lambda item: order.index(item[0][0])):
            lines.append(f"| `{name}` | {_values(values, len(options))} | {_cell(said)} |")
        lines.append("")
    return "\n".join(lines).rstrip() + "\n", nowhere


def _values(values: list[tuple[str, str]], choices: int) -> str:
    """The value, with the choices that have it where they differ or not all do."""
    by_value: dict[str, list[str]] = {}
    for choice, value in values:
        by_value.setdefault(value or "see the file", []).append(choice)
    if len(by_value) == 1 and len(values) == choices:
        return f"`{_cell(next(iter(by_value)))}`"
    return "; ".join(f"{', '.join(names)}: `{_cell(value)}`" for value, names in by_value.items())


def _cell(text: str) -> str:
    """Text that does not break a table, without a full stop; what is long is cut."""
    text = " ".join(text.split()).rstrip(".") if len(text) <= 300 else text[:299] + "…"
    return text.replace("|", "\\|")


if __name__ == "__main__":
    text, nowhere = page()
    PAGE.write_text(text)
    print(f"{PAGE}: {len(text.splitlines())} lines")
    for name in nowhere:
        print(f"no meaning: {name}: write a comment behind it, or name it in its class's docstring", file=sys.stderr)
    sys.exit(1 if nowhere else 0)
