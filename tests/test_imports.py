"""The rooms of the house: no circle of imports, and an attacker that knows nothing of federations or configuration."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1] / "fedleak"
MODULES = {
    ".".join(["fedleak", *path.relative_to(ROOT).with_suffix("").parts]).removesuffix(".__init__"): path
    for path in ROOT.rglob("*.py")
}
FOREIGN = ("flwr", "hydra", "omegaconf", "ray")
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


def test_nothing_imports_in_a_circle():
    edges = {module: imported(module) & set(MODULES) for module in MODULES}
    done: set[str] = set()

    def walk(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            for other in sorted(edges[module]):
                walk(other, (*path, module))
            done.add(module)

    for module in sorted(edges):
        walk(module, ())


def test_attacks_know_nothing_of_federations_or_configuration():
    below = {"fedleak.attacks"}
    while more := {o for m in below for o in imported(m, everywhere=True) if o in MODULES} - below:
        below |= more  # what they import, and what that imports
    below |= {module for module in MODULES if module.startswith("fedleak.attacks.")}
    for module in sorted(below):
        for name in sorted(imported(module, everywhere=True)):
            parts = name.split(".")
            assert parts[0] not in FOREIGN, f"{module} imports {name}"
            if parts[0] == "fedleak" and module.startswith("fedleak.attacks"):
                assert len(parts) == 1 or parts[1] not in UPPER, f"{module} imports {name}"


def test_the_ground_floor_stands_on_nothing_above_it():
    for module, allowed in {
        "fedleak.errors": set(),
        "fedleak.threat": {"errors"},
        "fedleak.training": {"errors", "threat"},
        "fedleak.local_update": {"training"},
        "fedleak.seeding": set(),
        "fedleak.capture": {"errors", "instantiate", "tensorfile", "threat", "training"},
        "fedleak.defenses.base": {"errors", "training"},
    }.items():
        own = {n.split(".")[1] for n in imported(module, everywhere=True) if n.startswith("fedleak.")}
        assert own <= allowed, module
