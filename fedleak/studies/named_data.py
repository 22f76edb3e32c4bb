"""Several data sets in one study, each by the name of its choice in ``conf/data``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fedleak.config import conf_dir
from fedleak.data import ImageData
from fedleak.data.folders import SUFFIXES
from fedleak.errors import UsageError
from fedleak.federation.scenario import load_data

FOLDER_SIZE = 32
"""Height and width of images that come as a folder of images a class."""


def load_named(names: Sequence[str], roots: Mapping[str, str | None]) -> dict[str, ImageData]:
    """Name -> images.

    Args:
        names: choices of ``conf/data``.
        roots: name -> the folder that its files are in, None for ./data. A folder that holds a folder of images a
            class will do for any of them; its images are taken at 32×32.

    Raises:
        UsageError: an unknown name, or files that are not there: one error names all that is missing.
    """
    known = sorted(path.stem for path in (conf_dir() / "data").glob("*.yaml"))
    for key, name in [("datasets", name) for name in names] + [("roots", name) for name in roots]:
        if name not in known:
            raise UsageError(f"study.{key}: there is no data set {name}; choices: {', '.join(known)}")
    loaded, missing = {}, []
    for name in names:
        try:
            loaded[name] = replace(_load(name, roots.get(name)), name=name)
        except UsageError as error:
            missing.append(f"{name}: {error}".replace("data.root", f"study.roots.{name}"))
    if missing:
        rest = ", ".join(name for name in names if name in loaded) or "digits"
        raise UsageError(f"{'; '.join(missing)}; or leave out what is missing with study.datasets=[{rest}]")
    return loaded


def _load(name: str, root: str | None) -> ImageData:
    node: Any = OmegaConf.to_container(OmegaConf.load(conf_dir() / "data" / f"{name}.yaml"))
    if root is not None and any(path.suffix.lower() in SUFFIXES for path in Path(root).expanduser().glob("*/*")):
        node = {"_target_": "fedleak.data.image_folder", "image_size": FOLDER_SIZE}
    return load_data({**node, "root": root})
