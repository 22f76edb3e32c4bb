"""What an interrupted run left in its folder, and from where it can be gone on with."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from fedleak import __version__, files
from fedleak.capture import CaptureStore
from fedleak.errors import UsageError
from fedleak.federation.checkpoint import FILE, Checkpoint
from fedleak.rounds import NOTHING
from fedleak.setup import Setup


@dataclass(frozen=True)
class Left:
    """What is there.

    Attributes:
        since: the last finished round, None if there is none or none is needed.
        federated: whether the federation is finished, so that the attack is next.
    """

    since: Checkpoint | None = None
    federated: bool = False

    @property
    def seconds(self) -> float:
        """That the run has taken already, as far as that is known."""
        return 0.0 if self.since is None else self.since.seconds


NEW = Left()


def identity(setup: Setup) -> str:
    """A short name for everything that decides a run's tables; where it runs and who is told are not part of it."""
    decides = {k: v for k, v in setup.settings.items() if k.split(".")[0] not in ("output_dir", "tracking", "engine")}
    return hashlib.sha256(json.dumps([decides, __version__], sort_keys=True).encode()).hexdigest()[:16]


def where_it_stopped(setup: Setup, folder: Path) -> Left:
    """Sweep an interrupted run's folder, take what is of no finished round out of it, and say how far it is.

    Raises:
        UsageError: what is there is damaged, of another configuration, or of a fedleak that wrote no checkpoints.
    """
    files.sweep(folder)
    since = Checkpoint.read(folder)
    if since is None:
        if (folder / "summary.json").exists():
            return Left(federated=True)
        _clear(folder)
        return NEW
    if setup.defense.settings.get("feedback"):
        raise UsageError(
            f"resume={folder}: under defense.feedback=true clients remember what they withheld, and that died with the "
            "run; repeat it"
        )
    if since.of != identity(setup):
        raise UsageError(
            f"resume={folder}: its {FILE} is of another configuration, or of another version of fedleak; repeat the run"
        )
    whole = setup.capture == NOTHING or CaptureStore.open(folder / "captures").complete
    since.rewind(folder)
    return Left(since, federated=whole and since.round == setup.federation.rounds)


def _clear(folder: Path) -> None:
    """Remove what a first round that was not finished left; raises `UsageError` where more than that is there."""
    for path in (folder / "captures").glob("round-*"):
        if not path.name.startswith(("round-00000", "round-00001")):
            raise UsageError(
                f"resume={folder}: {path.name} is there and no {FILE}, which says how far the run was; attack what it "
                f"captured by fedleak attack run_dir={folder}, or repeat it"
            )
    for part in ("captures", "truth"):
        shutil.rmtree(folder / part, ignore_errors=True)
    (folder / "rounds.csv").unlink(missing_ok=True)
