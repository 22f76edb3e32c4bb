"""The configuration: where it lives, how it is composed, and the rules its values are checked by."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fedleak.errors import UsageError


def conf_dir() -> Path:
    """The folder of the Hydra groups: in the installed package, or at the top level of a checkout."""
    here = Path(__file__).parent
    return here / "conf" if (here / "conf").is_dir() else here.parent / "conf"


def compose_config(overrides: Sequence[str], root: str = "config") -> DictConfig:
    """Compose the config of one run (``conf/config.yaml``) or of another command's root file.

    Raises:
        UsageError: an override cannot be read, or names a key or a choice that does not exist.
    """
    for override in parse(overrides):
        if override.value() is None and override.key_or_group in choice_files(overrides):
            raise UsageError(f"{override.input_line}: no choice; name one, see fedleak list")
    try:
        return _compose(overrides, root)
    except Exception as error:  # Hydra and OmegaConf have their own, and let others through
        problem = error
    # Outside the handler: explaining composes again, which Hydra allows one at a time.
    raise UsageError(_explain(problem, overrides, root)) from problem


def _compose(overrides: Sequence[str], root: str) -> DictConfig:
    if GlobalHydra.instance().is_initialized():  # inside a job, with its search path
        return compose(root, overrides=list(overrides))
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return compose(root, overrides=list(overrides))


def plain(config: DictConfig) -> dict[str, Any]:
    """The config as plain containers, interpolations resolved."""
    try:
        resolved = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UsageError(f"config: {_first_line(error)}; give the key a value") from error
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def flat(node: Any, prefix: str = "") -> dict[str, str]:
    """A plain config as dotted key -> value; of a class, its name alone."""
    if not isinstance(node, Mapping):
        return {prefix.rstrip("."): "" if node is None else str(node)}
    values: dict[str, str] = {}
    for key, value in node.items():
        if key == "_target_":
            values[prefix.rstrip(".") or "_target_"] = str(value).rsplit(".", 1)[-1]
        else:
            values |= flat(value, f"{prefix}{key}.")
    return values


def expand_sweep(overrides: Sequence[str]) -> list[list[str]]:
    """The overrides of every job of a ``--multirun``, without running any."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

    return [job for batch in BasicSweeper.split_arguments(parse(overrides), None) for job in batch]


def parse(overrides: Sequence[str]) -> list[Override]:
    """Parse overrides one by one; raises `UsageError` naming the one that cannot be read."""
    parsed = []
    for override in overrides:
        try:
            parsed += OverridesParser.create().parse_overrides([override])
        except HydraException as error:
            raise UsageError(
                f"{override}: cannot be read as key=value; quote values with special characters"
            ) from error
    return parsed


SEARCH = "hydra.searchpath"
"""The override that ``--config-dir`` stands for."""


def search_path(overrides: Sequence[str]) -> list[str]:
    """Those of `overrides` that say where a user's own YAML files are."""
    return [override for override in overrides if override.startswith(f"{SEARCH}=")]


def search_folders(overrides: Sequence[str]) -> list[str]:
    """The folders that they name, as Hydra writes them: ``file:///home/me/conf``."""
    return [str(folder) for override in parse(search_path(overrides)) for folder in override.value()]  # type: ignore[union-attr]


def search_override(folders: Sequence[str]) -> str:
    """The override that has Hydra look into `folders` too."""
    quoted = [folder.replace("\\", "\\\\").replace("'", "\\'") for folder in folders]
    return f"{SEARCH}=[" + ",".join(f"'{folder}'" for folder in quoted) + "]"


def choice_files(overrides: Sequence[str] = ()) -> dict[str, dict[str, Path]]:
    """Group -> choice -> its file, built in or in a folder that `overrides` search."""
    groups: dict[str, dict[str, Path]] = {}
    for root in (conf_dir(), *(Path(folder.removeprefix("file://")) for folder in search_folders(overrides))):
        for path in sorted(root.rglob("*.yaml")):
            if path.parent != root:
                groups.setdefault(path.parent.relative_to(root).as_posix(), {}).setdefault(path.stem, path)
    return dict(sorted(groups.items()))


def choices(overrides: Sequence[str] = ()) -> dict[str, list[tuple[str, str]]]:
    """Group -> [(choice, description)], the description being a file's first comment."""
    return {
        group: [(name, _first_comment(path)) for name, path in files.items()]
        for group, files in choice_files(overrides).items()
    }


def _first_comment(path: Path) -> str:
    comments = (line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#"))
    return next((c for c in comments if not c.startswith("@package")), "")


@dataclass(frozen=True)
class Rule:
    """What a key's value must be: a kind, a test, and the mend in words."""

    test: Callable[[Any], bool]
    mend: str


def whole(least: int) -> Rule:
    """A whole number from `least`."""
    return Rule(lambda v: isinstance(v, int) and not isinstance(v, bool) and v >= least, f"a whole number from {least}")


def is_number(value: Any) -> bool:
    """Whether `value` is a finite number, and not true or false."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def one_of(*values: str) -> Rule:
    """One of several words."""
    return Rule(lambda v: v in values, f"one of {', '.join(values)}")


def list_of(least: int) -> Rule:
    """A list of whole numbers from `least`, at least one."""
    one = whole(least)
    return Rule(
        lambda v: isinstance(v, list | tuple) and len(v) > 0 and all(map(one.test, v)),
        f"a list of whole numbers from {least}",
    )


YES_NO = Rule(lambda v: isinstance(v, bool), "true or false")
POSITIVE = Rule(lambda v: is_number(v) and v > 0, "a number above 0")
NAMES = Rule(
    lambda v: isinstance(v, list) and len(v) > 0 and all(isinstance(x, str) for x in v), "a list of names, not empty"
)


def check_rules(config: Mapping[str, Any], rules: Mapping[str, Rule]) -> None:
    """Check the values that have a rule; raises `UsageError` naming key, value and mend."""
    for key, rule in rules.items():
        value: Any = config
        for part in key.split("."):
            if not isinstance(value, Mapping) or part not in value:
                raise UsageError(f"{key}: missing; give {rule.mend}")
            value = value[part]
        if not rule.test(value):
            raise UsageError(f"{key}={value}: must be {rule.mend}")


def suggest(word: str, known: Sequence[str]) -> str:
    """The mend for a word that is not among the `known` ones."""
    close = difflib.get_close_matches(word, known, 1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _explain(error: BaseException, overrides: Sequence[str], root: str) -> str:
    """One line from Hydra's several."""
    text = str(error)
    files = choice_files(overrides)
    if found := re.search(r"Could not find '([^']+)/([^'/]+)'", text):
        group, name = found.groups()
        available = re.findall(r"^\t(\S+)$", text, re.M) or list(files.get(group, {}))
        if not available:
            return f"{group}={name}: no such group; {suggest(group, list(files))}"
        return f"{group}={name}: no such choice; {_suggest_choice(name, available)}"
    if found := re.search(r"Could not override '([^'@]+)", text):
        key = found.group(1)
        if "/" in key:
            return f"{key}: cannot be chosen here; {suggest(key, list(files))}"
        given = next((o.lstrip("+") for o in overrides if o.lstrip("+").startswith(key + "=")), key)
        return f"{given}: unknown key; {_suggest_key(key, overrides, root)}"
    return f"{_first_line(error)}; see fedleak run --help"


def _suggest_choice(name: str, available: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, available, 1, cutoff=0.6)
    return (f"did you mean {close[0]}? " if close else "") + f"Choices: {', '.join(available)}"


def _suggest_key(key: str, overrides: Sequence[str], root: str) -> str:
    """What the user may have meant: a key of the config as composed without the unknown ones."""
    files = choice_files(overrides)
    groups = [o for o in overrides if "." not in o.split("=")[0] and o.split("=")[0].lstrip("+~") in files]
    try:
        config = _compose([*search_path(overrides), *groups], root)
    except (HydraException, OmegaConfBaseException):
        return "see fedleak run --help"
    known = _keys(OmegaConf.to_container(config, resolve=False))
    parent, _, last = key.rpartition(".")
    having = [name for name, path in files.get(parent, {}).items() if last in OmegaConf.load(path)]
    if having:
        return f"it belongs to {' or '.join(f'{parent}={name}' for name in having)}"
    close = difflib.get_close_matches(key, known, 1, cutoff=0.75)
    if close:
        return f"did you mean {close[0]}?"
    siblings = [k for k in known if k.startswith(parent + ".") and not k.endswith("_target_")] if parent else []
    if siblings:
        return f"known: {', '.join(siblings)}"
    if parent and parent in config and "_target_" in (config[parent] or {}):
        return f"this choice of {parent} takes no such key; see fedleak list"
    return f"known: {', '.join(k for k in known if '.' not in k)}"


def _keys(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, dict):
        return []
    keys = []
    for name, value in node.items():
        keys.append(prefix + str(name))
        keys += _keys(value, prefix + str(name) + ".")
    return keys
