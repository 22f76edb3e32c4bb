"""How much disk a run will take, before it runs, and whether its folder can be written to."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fedleak.errors import UsageError

if TYPE_CHECKING:
    from fedleak.federation.scenario import Scenario

LINE = 900
"""Bytes of an index line and the heads of its blobs, about."""


@dataclass(frozen=True)
class Footprint:
    """What captures and truth will take: bytes and files."""

    bytes: int
    files: int

    def __str__(self) -> str:
        size = f"{self.bytes / 2**30:,.1f} GiB" if self.bytes >= 2**30 else f"{self.bytes / 2**20:,.1f} MiB"
        return f"captures and truth: about {size} in {self.files:,} files"


def footprint(scenario: Scenario) -> Footprint:
    """An estimate, from the model's size and what `capture` keeps."""
    federation, keep = scenario.federation, scenario.keep
    parameters, buffers = (sum(v.nbytes for v in part.values()) for part in scenario.start())
    rounds = sum(keep.of_round(number) for number in range(1, federation.rounds + 1))
    taking_part = max(1, round(federation.fraction * federation.clients))
    kept = sum(keep(1, client) for client in range(federation.clients)) if keep.of_round(1) else federation.clients
    clients = min(taking_part, kept)
    samples = federation.batch_size * federation.local_steps
    factor = federation.batch_size if scenario.threat.per_sample_gradients else 1
    update = parameters * factor // (2 if keep.dtype in ("float16", "bfloat16") else 1) + buffers + LINE
    channels, height, width = scenario.image_shape
    truth = samples * (channels * height * width * 4 + 8) + LINE
    return Footprint(rounds * (parameters + buffers + clients * (update + truth)), 2 * rounds + 2 if rounds else 0)


def refuse_folder(folder: Path, needed: int = 0) -> None:
    """Raise `UsageError` where a run could not write `needed` bytes into `folder`, which need not be there yet."""
    ancestor = folder.absolute()
    while not ancestor.exists() and ancestor != ancestor.parent:
        ancestor = ancestor.parent
    if not ancestor.is_dir():
        raise UsageError(f"output_dir={folder}: {ancestor} is a file; name a folder")
    trial = ancestor / f".fedleak-{os.getpid()}"
    try:
        trial.mkdir()
    except OSError as error:
        raise UsageError(f"output_dir={folder}: cannot be written ({error.strerror}); name another folder") from error
    finally:
        with suppress(OSError):
            trial.rmdir()
    free = shutil.disk_usage(ancestor).free
    if needed > free:
        raise UsageError(
            f"output_dir={folder}: the captures will take about {needed / 2**30:,.1f} GiB, and {free / 2**30:,.1f} are "
            "free there; keep less (capture.rounds, capture.clients, federation.capture_every), or name another disk"
        )
