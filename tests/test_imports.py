"""The rooms of the house: no circle of imports, and attacks that know nothing of federations and need torch alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted((ROOT / "fedleak").rglob("*.py"))
}
ENGINE = [m for m in MODULES if f"{m}.".startswith("fedleak.attacks.") or m in ("fedleak.capture", "fedleak.training")]
FOREIGN = {"flwr", "hydra", "omegaconf", "ray"}
"""What a bare GPU machine lacks."""
UPPER = ("federation", "config", "pipeline", "cli", "studies", "report", "evaluation", "truth", "data", "api")
"""Rooms of fedleak that stand on the attacks."""


def type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def statements(node: ast.AST, *, everywhere: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Imports of a module: those that importing it runs, or also those in functions and for type checkers."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif everywhere or not (isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef) or type_checking(child)):
            yield from statements(child, everywhere=everywhere)


def imported(module: str, *, everywhere: bool = False) -> set[str]:
    """Full names of what a module imports; of fedleak's own, the modules."""
    found = set()
    for statement in statements(ast.parse(MODULES[module].read_text()), everywhere=everywhere):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
            continue
        assert statement.level == 0, f"{module}: a relative import"
        home = str(statement.module)
        for alias in statement.names:
            inner = f"{home}.{alias.name}"
            found.add(inner if inner in MODULES else home)
    return found


def reached(start: list[str]) -> Iterator[tuple[str, str]]:
    """(module, what it imports, even lazily), of some modules, of what they import, and of what that imports."""
    seen, todo = set(start), list(start)
    while todo:
        module = todo.pop()
        for name in sorted(imported(module, everywhere=True)):
            yield module, name
            if name in MODULES and name not in seen:
                seen.add(name)
                todo.append(name)


def test_nothing_imports_in_a_circle():
    try:
        TopologicalSorter({module: imported(module) & MODULES.keys() for module in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(" imports ".join(reversed(error.args[1])))


def test_attacks_know_nothing_of_federations_or_configuration():
    for module, name in reached(ENGINE):
        room = name.split(".")[1] if name.startswith("fedleak.") else ""
        assert name.split(".")[0] not in FOREIGN, f"{module} imports {name}"
        assert room != "federation", f"{module} imports {name}"
        if module.startswith("fedleak.attacks"):
            assert room not in UPPER, f"{module} imports {name}"


def test_the_ground_floor_stands_on_nothing_above_it():
    for module, allowed in {
        "fedleak.errors": set(),
        "fedleak.threat": {"errors"},
        "fedleak.training": {"errors", "threat"},
        "fedleak.local_update": {"training"},
        "fedleak.seeding": set(),
        "fedleak.files": {"errors"},
        "fedleak.observation": {"training"},
        "fedleak.capture": {
            *("capture_index", "errors", "files", "observation", "shards"),
            *("tensorfile", "threat", "training"),
        },
        "fedleak.defenses.base": {"errors", "training"},
    }.items():
        own = {n.split(".")[1] for n in imported(module, everywhere=True) if n.startswith("fedleak.")}
        assert own <= allowed, module


# Run in a process of its own. Whatever `pip install torch numpy` does not bring cannot be imported in it.
BARE = """
import re, runpy, sys
from importlib.metadata import PackageNotFoundError, packages_distributions, requires

def plain(requirement):
    return re.match(r"[\\w.-]+", requirement)[0].lower().replace("_", "-").replace(".", "-")

there, todo = set(), ["torch", "numpy"]
while todo:
    name = todo.pop()
    if name not in there:
        there.add(name)
        try:
            todo += [plain(r) for r in requires(name) or () if "extra ==" not in r]
        except PackageNotFoundError:
            pass
homes = packages_distributions()

class Bare:
    def find_spec(self, name, path=None, target=None):
        home = {plain(d) for d in homes.get(name.partition(".")[0], ())} - {"fedleak"}
        if home and not home & there:
            raise ModuleNotFoundError(f"No module named {name!r} on a bare machine", name=name)

sys.meta_path.insert(0, Bare())
for forbidden in ("flwr", "hydra", "pandas", "sklearn"):
    try:
        __import__(forbidden)
    except ModuleNotFoundError:
        continue
    raise AssertionError(forbidden + " was not withheld")
"""


def bare(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", BARE + code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


def test_the_engine_imports_beside_torch_and_numpy_alone():
    bare("\n".join(f"import {name}" for name in [*ENGINE, "fedleak.models.lenet", "fedleak.threat", "fedleak.seeding"]))


@pytest.mark.parametrize("script", sorted((ROOT / "benchmarks").glob("*.py")), ids=lambda path: path.stem)
def test_a_benchmark_starts_beside_torch_and_numpy_alone(script):
    bare(f"sys.argv = [{script.name!r}, '--help']\nrunpy.run_path({str(script)!r}, run_name='__main__')")
