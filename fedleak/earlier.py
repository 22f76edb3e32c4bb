"""What an earlier run was typed as, which ``fedleak attack`` composes again under what is typed now."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from omegaconf import OmegaConf

from fedleak.config import SEARCH, parse, search_folders, search_override
from fedleak.errors import UsageError

CHANGEABLE = ("attack", "threat", "tracking")
"""Groups that an attack on an earlier run may choose anew."""


def earlier_overrides(run_dir: Path) -> list[str]:
    """The overrides of an earlier run, and where it looked for YAML files."""
    path = run_dir / ".hydra" / "overrides.yaml"
    try:
        found = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
        if not isinstance(found, list) or not all(isinstance(override, str) for override in found):
            raise ValueError("not a list of overrides")
        overrides = [str(override) for override in found]
    except Exception as error:
        raise UsageError(f"{path}: missing or damaged; restore it, or repeat the run") from error
    hydra = run_dir / ".hydra" / "hydra.yaml"  # a study's federations have none: theirs stand among the overrides
    try:
        searched = OmegaConf.select(OmegaConf.load(hydra), "hydra.searchpath") if hydra.exists() else None
        return [search_override([str(folder) for folder in searched]), *overrides] if searched else overrides
    except Exception as error:
        raise UsageError(f"{hydra}: damaged; restore it, or repeat the run") from error


def merge(earlier: Sequence[str], now: Sequence[str]) -> list[str]:
    """The earlier run's overrides under today's: a newly chosen group drops what was set inside it before."""
    new = {o.key_or_group for o in parse(now)}
    kept = []
    for override, parsed in zip(earlier, parse(earlier), strict=True):
        key = parsed.key_or_group
        inside = any(key == n or (n in CHANGEABLE and key.startswith((f"{n}.", f"{n}/"))) for n in new)
        if not inside and key not in ("output_dir", "device", SEARCH):
            kept.append(override)
    folders = [*search_folders(earlier), *search_folders(now)]
    return [search_override(folders), *kept, *(o for o in now if not o.startswith(f"{SEARCH}="))]
