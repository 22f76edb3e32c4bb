"""The script that draws the page's charts: Vega-Lite, Vega and Vega-Embed, from the installed package, no network."""

from __future__ import annotations

import hashlib
import os
import re
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path

from markupsafe import Markup

from fedleak.errors import FedleakError
from fedleak.files import write_atomically

EMBED = "window.vegaEmbed = vegaEmbed;"


@lru_cache
def vega() -> Markup:
    """The script. Bundling it takes a second, so it is kept in the user's cache folder, if there is one to write to."""
    kept = _cache() / f"vega-{version('vl-convert-python')}.js"
    script = _read(kept)
    if script is None:
        import vl_convert

        script = vl_convert.javascript_bundle(EMBED)
        with suppress(FedleakError):
            write_atomically(kept, f"{_digest(script)}\n{script}".encode())
    # What would end the script element, or change how it is read, can only stand in a string here.
    return Markup(re.sub(r"<(?=/script|script|!--)", r"\\x3c", script, flags=re.IGNORECASE))


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "fedleak"


def _read(path: Path) -> str | None:
    """What is kept, None where it is not there or not as it was written."""
    try:
        digest, _, script = path.read_bytes().decode().partition("\n")
    except (OSError, ValueError):
        return None
    return script if digest == _digest(script) else None


def _digest(script: str) -> str:
    return hashlib.sha256(script.encode()).hexdigest()
