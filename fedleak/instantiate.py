"""`_target_` nodes to objects, with one clear error where that fails."""

from __future__ import annotations

import copy
import difflib
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fedleak.errors import FedleakError, UsageError


@dataclass(frozen=True)
class Part:
    """A part of the configuration before it is built: to be compared, hashed, and sent to other processes.

    Attributes:
        key: where it stands in the configuration, for error messages.
        node: plain containers, ``_target_`` and its settings; never changed.

    Raises:
        UsageError: `node` is no mapping.
    """

    key: str
    node: Mapping[str, Any]

    def __post_init__(self) -> None:
        if not isinstance(self.node, Mapping):
            raise UsageError(f"{self.key}={self.node}: must be a _target_ with its settings; see fedleak list")

    def __hash__(self) -> int:
        return hash((self.key, self.target))

    @property
    def target(self) -> str:
        """The import path of a class or function."""
        return str(self.node.get("_target_"))

    @property
    def name(self) -> str:
        """The class or function without its module."""
        return self.target.rsplit(".", 1)[-1]

    @property
    def settings(self) -> dict[str, Any]:
        """What the class or function is called with, nested nodes as they stand; a copy."""
        return {name: copy.deepcopy(value) for name, value in self.node.items() if name != "_target_"}

    def build(self, kind: Any = object) -> Any:
        """Import and call what the node names; raises `UsageError` if that fails or gives no `kind`."""
        made = instantiate(self.node, self.key)
        if not isinstance(made, kind):
            mend = f"name a subclass of {kind.__module__}.{kind.__name__}"
            raise UsageError(f"{self.key}._target_={self.target}: gives no {kind.__name__}; {mend}")
        return made


def locate(path: Any, key: str) -> Callable[..., Any]:
    """Import the class or function that ``key._target_=path`` names; raises `UsageError` if it cannot be."""
    where = f"{key}._target_={path}"
    mend = "give an import path such as my_file.MyClass"
    if not isinstance(path, str) or "." not in path:
        raise UsageError(f"{where} is no import path; {mend}")
    parts = path.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:cut])
        try:
            found: Any = importlib.import_module(module_name)
        except (Exception, SystemExit) as error:
            missing = error.name if isinstance(error, ModuleNotFoundError) else None
            if missing and (module_name == missing or module_name.startswith(missing + ".")):
                continue  # no such module: the last part may be a class in it
            # The user's own file raises, or imports what is not installed: theirs to see.
            text = " ".join(str(error).split())
            raise UsageError(f"{where}: {module_name} fails: {type(error).__name__}: {text}; mend that") from error
        for part in parts[cut:]:
            if not hasattr(found, part):
                raise UsageError(f"{where}: no {part} in {module_name}; check the name")
            found = getattr(found, part)
        if not callable(found):
            raise UsageError(f"{where} is a {type(found).__name__}, not a class or function; name one")
        return found
    raise UsageError(f"{where}: no module named {parts[0]}; {mend}")


def instantiate(node: Any, key: str) -> Any:
    """Build the object that a config node describes; nested ``_target_`` nodes and lists first.

    Args:
        node: a plain container; a mapping with ``_target_`` becomes a call of it with the other keys.
        key: where the node stands in the config, for error messages.

    Raises:
        UsageError: the target cannot be imported, or refuses its arguments.
    """
    if isinstance(node, list):
        return [instantiate(item, f"{key}[{i}]") for i, item in enumerate(node)]
    if not isinstance(node, Mapping):
        return node
    values = {name: instantiate(value, f"{key}.{name}") for name, value in node.items() if name != "_target_"}
    if "_target_" not in node:
        return values
    target = locate(node["_target_"], key)
    try:
        signature = inspect.signature(target)
    except (TypeError, ValueError):
        signature = None
    if signature is not None:
        try:
            signature.bind(**values)
        except TypeError as error:
            takes = [name for name, p in signature.parameters.items() if p.kind != p.VAR_KEYWORD]
            wrong = next((name for name in values if name not in takes), None)
            close = difflib.get_close_matches(wrong, takes, 1) if wrong else []
            mend = f"did you mean {key}.{close[0]}?" if close else f"it takes {', '.join(takes) or 'nothing'}"
            raise UsageError(f"{key}: {node['_target_']} {error}; {mend}") from error
    try:
        return target(**values)
    except FedleakError:
        raise
    except (Exception, SystemExit) as error:  # a class of anyone's, given anything
        why = f"{error}" if isinstance(error, TypeError | ValueError) else f"{type(error).__name__}: {error}"
        raise UsageError(f"{key}: {node['_target_']} refused {values}: {why}") from error
