"""The configuration: where it lives, how it is composed, and every check that needs no data."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
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
from fedleak.threat import ThreatModel


def conf_dir() -> Path:
    """The folder of the Hydra groups: in the installed package, or at the top level of a checkout."""
    here = Path(__file__).parent
    return here / "conf" if (here / "conf").is_dir() else here.parent / "conf"


def compose_config(overrides: Sequence[str], root: str = "config") -> DictConfig:
    """Compose the config of one run (``conf/config.yaml``) or of another command's root file.

    Raises:
        UsageError: an override cannot be read, or names a key or a choice that does not exist.
    """
    parse(overrides)
    try:
        return _compose(overrides, root)
    except (HydraException, OmegaConfBaseException) as error:
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


def choices() -> dict[str, list[tuple[str, str]]]:
    """Group -> [(choice, description)], the description being a file's first comment."""
    root = conf_dir()
    groups: dict[str, list[tuple[str, str]]] = {}
    for path in sorted(root.rglob("*.yaml")):
        if path.parent == root:
            continue
        group = path.parent.relative_to(root).as_posix()
        comments = (line[1:].strip() for line in path.read_text().splitlines() if line.startswith("#"))
        groups.setdefault(group, []).append(
            (path.stem, next((c for c in comments if not c.startswith("@package")), ""))
        )
    return groups


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


def _one_of(*values: str) -> Rule:
    return Rule(lambda v: v in values, f"one of {', '.join(values)}")


YES_NO = Rule(lambda v: isinstance(v, bool), "true or false")
RULES: Mapping[str, Rule] = {
    "seed": whole(0),
    "quick": YES_NO,
    "device": _one_of("auto", "cpu", "cuda"),
    "output_dir": Rule(lambda v: isinstance(v, str) and v != "", "a folder"),
    "federation.clients": whole(1),
    "federation.rounds": whole(1),
    "federation.fraction": Rule(lambda v: is_number(v) and 0 < v <= 1, "a number above 0, up to 1"),
    "federation.batch_size": whole(1),
    "federation.local_steps": whole(1),
    "federation.lr": Rule(lambda v: is_number(v) and v > 0, "a number above 0"),
    "federation.payload": _one_of("gradient", "weights"),
    "federation.training_mode": YES_NO,
    "federation.evaluate_every": whole(1),
    "federation.capture_every": whole(1),
    "attack.name": Rule(lambda v: isinstance(v, str) and re.fullmatch(r"[\w.+-]+", v) is not None, "a plain name"),
    "attack.restarts": whole(1),
    "attack.max_evaluations": whole(1),
    "attack.every": Rule(
        lambda v: v == "auto" or (isinstance(v, int) and not isinstance(v, bool) and v >= 1),
        "a whole number from 1, or auto",
    ),
    "attack.candidates": whole(1),
    "attack.clients": Rule(
        lambda v: v == "all" or (isinstance(v, int) and not isinstance(v, bool) and v >= 1),
        "a whole number from 1, or all",
    ),
    **{f"threat.{field.name}": YES_NO for field in fields(ThreatModel)},
}
"""Keys checked by value; the parts behind a `_target_` check their own."""

FIXED = ("federation", "threat")
"""Groups whose keys are all known; a key added to them with ``+`` would do nothing."""


def check(config: Mapping[str, Any]) -> None:
    """Check every value that can be checked without data; raises `UsageError` naming key, value and mend."""
    check_rules(config, RULES)
    for group in FIXED:
        known = [key.split(".")[1] for key in RULES if key.startswith(group + ".")]
        for key in config[group]:
            if key not in known:
                raise UsageError(f"{group}.{key}: unknown key; {_suggest(key, known)}")
    federation, threat = config["federation"], config["threat"]
    if threat["per_sample_gradients"] and (federation["payload"] != "gradient" or federation["local_steps"] != 1):
        raise UsageError(
            "threat.per_sample_gradients=true: needs federation.payload=gradient and federation.local_steps=1"
        )
    model = config["model"]
    if isinstance(model, Mapping) and model.get("init") not in (None, "uniform", "default"):
        raise UsageError(f"model.init={model['init']}: must be one of uniform, default")


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


def _suggest(word: str, known: Sequence[str]) -> str:
    close = difflib.get_close_matches(word, known, 1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"known: {', '.join(known)}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _explain(error: BaseException, overrides: Sequence[str], root: str) -> str:
    """One line from Hydra's several."""
    text = str(error)
    if found := re.search(r"Could not find '([^']+)/([^'/]+)'", text):
        group, name = found.groups()
        available = re.findall(r"^\t(\S+)$", text, re.M) or [name for name, _ in choices().get(group, [])]
        if not available:
            return f"{group}={name}: no such group; {_suggest(group, list(choices()))}"
        return f"{group}={name}: no such choice; {_suggest_choice(name, available)}"
    if found := re.search(r"Could not override '([^'@]+)", text):
        key = found.group(1)
        if "/" in key:
            return f"{key}: cannot be chosen here; {_suggest(key, list(choices()))}"
        given = next((o.lstrip("+") for o in overrides if o.lstrip("+").startswith(key + "=")), key)
        return f"{given}: unknown key; {_suggest_key(key, overrides, root)}"
    return f"{_first_line(error)}; see fedleak run --help"


def _suggest_choice(name: str, available: Sequence[str]) -> str:
    close = difflib.get_close_matches(name, available, 1, cutoff=0.6)
    return (f"did you mean {close[0]}? " if close else "") + f"Choices: {', '.join(available)}"


def _suggest_key(key: str, overrides: Sequence[str], root: str) -> str:
    """What the user may have meant: a key of the config as composed without the unknown ones."""
    groups = [o for o in overrides if "." not in o.split("=")[0] and o.split("=")[0].lstrip("+~") in choices()]
    try:
        config = _compose(groups, root)
    except (HydraException, OmegaConfBaseException):
        return "see fedleak run --help"
    known = _keys(OmegaConf.to_container(config, resolve=False))
    parent, _, last = key.rpartition(".")
    having = [name for name, _ in choices().get(parent, []) if last in _keys_of_choice(parent, name)]
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


def _keys_of_choice(group: str, name: str) -> list[str]:
    return [str(key) for key in OmegaConf.load(conf_dir() / group / f"{name}.yaml")]


def _keys(node: Any, prefix: str = "") -> list[str]:
    if not isinstance(node, dict):
        return []
    keys = []
    for name, value in node.items():
        keys.append(prefix + str(name))
        keys += _keys(value, prefix + str(name) + ".")
    return keys
