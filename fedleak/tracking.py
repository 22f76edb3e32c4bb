"""Trackers: where a run's numbers and pictures go besides its own folder."""

from __future__ import annotations

import importlib.util
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fedleak.errors import UsageError
from fedleak.setup import Setup


class Tracker:
    """Is told what happens in a run. Subclass it in a file of your own and name it by ``_target_``.

    It is made before any work, which is when to refuse what cannot work (`UsageError`), and writes nothing before
    `start`. Every method does nothing unless it is overridden.
    """

    def start(self, folder: Path, settings: Mapping[str, str]) -> None:
        """A run, or an attack on an earlier run, begins.

        Args:
            folder: where its tables and pictures will be, absolute.
            settings: its configuration, dotted key -> value.
        """

    def log(self, round: int, metrics: Mapping[str, float]) -> None:
        """Finite numbers about one round of training, called as they become known.

        Args:
            round: from 1.
            metrics: ``federation/test_accuracy`` and ``federation/train_loss`` while the federation runs;
                ``leakage/label_accuracy``, ``leakage/recovered`` (both shares) and ``leakage/median_psnr`` (dB) at the
                end, for the rounds that were attacked.
        """

    def keep(self, path: Path) -> None:
        """A finished picture (PNG), table (CSV), page (HTML) or the summary (JSON) of the run."""

    def finish(self, summary: Mapping[str, float] | None) -> None:
        """The run is over.

        Args:
            summary: its finite numbers, as ``summary.json`` names them; None if it failed.
        """


class NoTracker(Tracker):
    """The run directory is enough."""


class TensorBoard(Tracker):
    """Event files in the run directory's folder ``tensorboard``: scalars by round, pictures, and the run as hparams.

    Raises:
        UsageError: TensorBoard is not installed.
    """

    def __init__(self) -> None:
        _require("tensorboard", "tensorboard")

    def start(self, folder: Path, settings: Mapping[str, str]) -> None:
        """Open the event file."""
        from torch.utils.tensorboard import SummaryWriter

        self.settings = dict(settings)
        self.writer: Any = SummaryWriter(str(folder / "tensorboard"))

    def log(self, round: int, metrics: Mapping[str, float]) -> None:
        """A scalar each."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, round)

    def keep(self, path: Path) -> None:
        """Pictures are shown; of the rest, TensorBoard says where it is."""
        if path.suffix == ".png":
            import numpy as np
            from PIL import Image

            self.writer.add_image(path.stem, np.asarray(Image.open(path).convert("RGB")), dataformats="HWC")
        else:
            self.writer.add_text("files", str(path))

    def finish(self, summary: Mapping[str, float] | None) -> None:
        """Settings beside results, where there are any, and close the file."""
        if summary is not None:
            results = {f"summary/{name}": value for name, value in summary.items()}
            self.writer.add_hparams(self.settings, results, run_name=".")
        self.writer.close()


class MLflow(Tracker):
    """A run in a local MLflow database, with the pictures, the tables and the report as its artifacts.

    Args:
        uri: ``sqlite:///FILE``; nothing else, because pictures of private images go along.
        artifacts: the folder for artifacts, where the experiment is new.
        experiment: what MLflow groups the runs by.

    Raises:
        UsageError: MLflow is not installed, or `uri` is not a local database.
    """

    def __init__(
        self, uri: str = "sqlite:///mlflow.db", artifacts: str = "mlruns", experiment: str = "fedleak"
    ) -> None:
        if not str(uri).startswith("sqlite:///"):
            raise UsageError(
                f"tracking.uri={uri}: pictures of private images would leave this machine, or MLflow keeps no such "
                "store any more; name a local database, such as sqlite:///mlflow.db"
            )
        _require("mlflow", "mlflow")
        self.uri, self.artifacts, self.experiment = uri, Path(artifacts).absolute(), experiment

    def start(self, folder: Path, settings: Mapping[str, str]) -> None:
        """Open the database, make the experiment if it is new, and begin a run named like the folder."""
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # nothing goes over the network
        from mlflow.entities import Param
        from mlflow.tracking import MlflowClient

        Path(self.uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        self.client = MlflowClient(tracking_uri=self.uri)
        known = self.client.get_experiment_by_name(self.experiment)
        number = (
            known.experiment_id
            if known is not None
            else self.client.create_experiment(self.experiment, artifact_location=self.artifacts.as_uri())
        )
        self.run: str = self.client.create_run(number, run_name=folder.name).info.run_id
        parameters = [Param(key, value[:6000]) for key, value in settings.items()]  # MLflow refuses longer ones
        for first in range(0, len(parameters), 100):  # and more at a time
            self.client.log_batch(self.run, params=parameters[first : first + 100])

    def log(self, round: int, metrics: Mapping[str, float]) -> None:
        """A metric each, the round being its step."""
        for name, value in metrics.items():
            self.client.log_metric(self.run, name, value, step=round)

    def keep(self, path: Path) -> None:
        """An artifact."""
        self.client.log_artifact(self.run, str(path))

    def finish(self, summary: Mapping[str, float] | None) -> None:
        """The summary as metrics without a step, and the run's end."""
        for name, value in (summary or {}).items():
            self.client.log_metric(self.run, f"summary/{name}", value)
        self.client.set_terminated(self.run, "FAILED" if summary is None else "FINISHED")


@contextmanager
def tracked(setup: Setup, folder: Path) -> Iterator[Tracker]:
    """The setup's tracker, started; it is told if the work fails, and must be told by the work how it ended."""
    tracker = setup.tracking.build(Tracker)
    tracker.start(folder.absolute(), setup.settings)
    try:
        yield tracker
    except BaseException:
        tracker.finish(None)
        raise


def finite(metrics: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Those values that are finite numbers, under their names behind `prefix`."""
    return {
        prefix + str(name): float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    }


def _require(choice: str, package: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise UsageError(
            f"tracking={choice}: the package {package} is not installed; pip install {package}, or choose tracking=none"
        )
