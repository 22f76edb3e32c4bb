"""Several data sets in one study, each by the name of its choice in ``conf/data``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from fedleak.data import ImageData
from fedleak.data.folders import SUFFIXES
from fedleak.errors import UsageError
from fedleak.federation.scenario import load_data
from fedleak.instantiate import Part
from fedleak.setup import named

FOLDER_SIZE = 32
"""Height and width of images that come as a folder of images a class."""


def load_named(
    names: Sequence[str],
    roots: Mapping[str, str | None],
    overrides: Sequence[str] = (),
    size: int | None = None,
) -> dict[str, ImageData]:
    """Name -> images.

    Args:
        names: choices of ``data``.
        roots: name -> the folder that its files are in, None for ./data. A folder that holds a folder of images a
            class will do for any of them; its images are taken at 32×32.
        overrides: as typed, which may say where more choices are.
        size: height and width that images are scaled to, None for their own.

    Raises:
        UsageError: an unknown name, or files that are not there: one error names all that is missing.
    """
    named("data", list(roots), overrides, "study.roots")
    loaded, missing = {}, []
    for name, part in named("data", names, overrides, "study.datasets").items():
        try:
            loaded[name] = replace(_load(part, roots.get(name), size), name=name)
        except UsageError as error:
            missing.append(f"{name}: {error}".replace("data.root", f"study.roots.{name}"))
    if missing:
        rest = ", ".join(name for name in names if name in loaded) or "digits"
        raise UsageError(f"{'; '.join(missing)}; or leave out what is missing with study.datasets=[{rest}]")
    return loaded


def _load(part: Part, root: str | None, size: int | None) -> ImageData:
    node = part.node if size is None else {**part.node, "image_size": size}
    if root is not None and any(path.suffix.lower() in SUFFIXES for path in Path(root).expanduser().glob("*/*")):
        node = {"_target_": "fedleak.data.image_folder", "image_size": size or FOLDER_SIZE}
    return load_data(Part("data", {**node, "root": root}))
