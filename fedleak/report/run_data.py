"""Read a run directory for the report; whatever is missing or damaged is said, and the rest is shown."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import pandas as pd
import yaml

from fedleak.attacks.results import StopReason
from fedleak.attacks.store import ReconstructionStore
from fedleak.config import flat
from fedleak.errors import UsageError
from fedleak.evaluation.matching import LEAKAGE_COLUMNS, Match, match
from fedleak.evaluation.tables import ATTACK_COLUMNS
from fedleak.files import digest
from fedleak.truth import TruthStore

ROUND_COLUMNS = ("round", "clients", "train_loss", "test_accuracy", "seconds")
LATER_COLUMNS = (
    "limit_mse",
    "expected_mse",
    "limit_bits",
    "method",
    "why",
)  # runs from before they were there lack nothing
MOST_PROBLEMS = 8

T = TypeVar("T")


@dataclass
class RunData:
    """Everything the report shows of one run.

    Attributes:
        name: what the report calls it.
        folder: a run directory, or the folder of one attack on it.
        summary: ``summary.json``.
        config: ``.hydra/config.yaml``.
        rounds, attacks, leakage: the tables, with all their columns, possibly without rows.
        matches: private images beside rebuilt ones.
        traces: (round, client, [(evaluations, objective), …]) of the attacks that kept one.
        data: (client, label) -> how many images, of what the clients trained on in all rounds.
        problems: what is missing or damaged, a sentence each.
    """

    name: str
    folder: Path
    summary: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    rounds: pd.DataFrame = field(default_factory=pd.DataFrame)
    attacks: pd.DataFrame = field(default_factory=pd.DataFrame)
    leakage: pd.DataFrame = field(default_factory=pd.DataFrame)
    matches: list[Match] = field(default_factory=list)
    traces: list[tuple[int, int, list[tuple[int, float]]]] = field(default_factory=list)
    data: Counter[tuple[int, int]] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)

    @property
    def labels_only(self) -> bool:
        """Whether the attack went for labels and tried no image."""
        return len(self.attacks) > 0 and bool((self.attacks["stop_reason"] == StopReason.LABELS_ONLY).all())

    @property
    def limits(self) -> pd.DataFrame:
        """The rows of `leakage` whose limit is known."""
        return self.leakage.dropna(subset=["limit_mse"])

    def settings(self) -> dict[str, str]:
        """The configuration as dotted key -> value, less what repeats another key; of a class, its name alone."""
        return {
            key: value
            for key, value in flat(self.config).items()
            if not key.startswith(("hydra.", "output_dir", "tracking")) and not value.startswith("${")
        }


def read_run(folder: Path, name: str | None = None) -> RunData:
    """Read one run.

    Args:
        folder: a run directory, or the folder of an attack on one.
        name: what to call it, the folder's name if None.

    Raises:
        UsageError: if it is no folder, or holds nothing that a run leaves behind.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UsageError(f"run_dir={folder}: no such folder; name one that fedleak run has written")
    if not any((folder / f).exists() for f in ("summary.json", "rounds.csv", "attacks.csv", "leakage.csv", "captures")):
        raise UsageError(f"run_dir={folder}: holds no results of a run; name a folder that fedleak run has written")
    run = RunData(name or folder.resolve().name, folder)
    run.summary = _attempt(run, "summary.json", {}, lambda: _mapping(json.loads(_text(folder / "summary.json"))))
    home = folder / str(run.summary.get("run_dir") or ".")
    if not home.is_dir():
        run.problems.append(f"The run that was attacked, {run.summary['run_dir']}, is not there any more.")
        home = folder
    config = (home if home != folder else folder) / ".hydra" / "config.yaml"
    run.config = _attempt(run, ".hydra/config.yaml", {}, lambda: _mapping(yaml.safe_load(_text(config))))
    if home != folder:
        run.config |= _attack_settings(run.summary)
    run.rounds = _table(run, home / "rounds.csv", ROUND_COLUMNS)
    sealed = run.summary.get("rounds_sha256")
    if sealed and len(run.rounds) and digest(home / "rounds.csv") != sealed:
        run.problems.append("rounds.csv was altered since the run ended.")
    attacked = run.summary.get("attack") != "none"
    run.attacks = _table(run, folder / "attacks.csv", ATTACK_COLUMNS)
    run.leakage = _table(run, folder / "leakage.csv", LEAKAGE_COLUMNS)
    truth = home / "truth"
    if not truth.is_dir():
        run.problems.append("truth/ is not there: rebuilt images are shown without the private ones beside them.")
    where = run.summary.get("reconstructions") if run.summary else _only_attack(folder)
    if where and (folder / str(where)).is_dir():
        _read_images(run, folder / str(where), TruthStore(truth))
    elif where or (attacked and len(run.leakage)):
        run.problems.append("The stored reconstructions are not there: the gallery is empty.")
    run.data = _data(run, truth)
    _compare_counts(run)
    if len(run.problems) > MOST_PROBLEMS:
        more = len(run.problems) - MOST_PROBLEMS
        run.problems[MOST_PROBLEMS:] = [f"… and {more} more of the kind."]
    return run


def distinct_names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart, numbered where a folder is given twice."""
    parts = [Path(folder).resolve().parts for folder in folders]
    # An attack's folder and a sweep's numbered one mean little without the run above them.
    least = [3 if p[-2:-1] == ("attacks",) else 2 if p and p[-1].isdigit() else 1 for p in parts]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(p[-max(depth, d) :]).lstrip("/") or "/" for p, d in zip(parts, least, strict=True)]
        if len(set(names)) == len(set(parts)):
            break
    seen: Counter[str] = Counter()
    for i, name in enumerate(names):
        seen[name] += 1
        names[i] = name if seen[name] == 1 else f"{name} ({seen[name]})"
    return names


def _only_attack(folder: Path) -> Path | None:
    """Where the reconstructions must be of a run whose summary is lost; None if that cannot be told."""
    attacks = list((folder / "captures" / "reconstructions").glob("*"))
    return attacks[0].relative_to(folder) if len(attacks) == 1 else None


def _attack_settings(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What a later attack on a run changed in its configuration, as far as its summary tells."""
    threat = _mapping(summary.get("threat") or {})
    changed: dict[str, Any] = {
        "attack": {"name": summary.get("attack")},
        "threat": {
            name: granted == "granted" for granted in ("granted", "withheld") for name in threat.get(granted, [])
        },
    }
    for word in str(summary.get("command") or "").split():
        key, equals, value = word.partition("=")
        if equals and key.startswith(("attack.", "attack/")):
            changed["attack"][key[len("attack.") :]] = value
        elif equals and key in ("seed", "device"):
            changed[key] = value
    return changed


def _updates(folder: Path) -> Iterator[tuple[str, tuple[int, int]]]:
    """The name of each update's file, and its round and client."""
    for path in sorted(folder.glob("round-*.safetensors")):
        if numbers := re.fullmatch(r"round-(\d+)-client-(\d+)\.safetensors", path.name):
            yield path.name, (int(numbers[1]), int(numbers[2]))


def _read_images(run: RunData, folder: Path, truths: TruthStore) -> None:
    store = ReconstructionStore(folder)
    columns = ["round", "client", "image", "limit_mse"]
    limits = {(*where, image): limit for *where, image, limit in run.limits[columns].itertuples(index=False)}
    alone = 0
    for name, where in _updates(folder):
        reconstruction = _attempt(run, f"reconstructions/{name}", None, partial(store.load, *where))
        if reconstruction is None:
            continue
        truth = _attempt(run, f"truth of round {where[0]}, client {where[1]}", None, partial(truths.load, *where))
        alone += truth is None and truths.folder.is_dir()
        if reconstruction.trace:
            run.traces.append((*where, reconstruction.trace))
        join = partial(match, reconstruction, similarity=False)
        pairs = _attempt(run, f"reconstructions/{name}", None, partial(join, truth))
        for pair in join(None) if pairs is None else pairs:
            limit = limits.get((*where, pair.image)) if pair.true is not None else None
            run.matches.append(replace(pair, limit_mse=limit))
    if alone:
        run.problems.append(f"The private images of {alone} attacked updates are not in truth/, or damaged.")


def _data(run: RunData, truth: Path) -> Counter[tuple[int, int]]:
    """How many images of each class each client trained on, from the truth of every round, attacked or not."""
    counts: Counter[tuple[int, int]] = Counter()
    store = TruthStore(truth)
    nothing: list[tuple[int, int]] = []
    for where in _attempt(run, "truth", nothing, store.known):
        kept = _attempt(run, f"truth of round {where[0]}, client {where[1]}", None, partial(store.load, *where))
        if kept is not None:
            counts.update((where[1], int(label)) for label in kept.labels)
    return counts


def _compare_counts(run: RunData) -> None:
    """A table that was cut short between two rows looks whole: the summary knows better."""
    stored = len({(m.round, m.client) for m in run.matches})
    judged = sum(m.recovered is not None for m in run.matches)
    updates, failed = (run.summary.get(name) for name in ("observations", "failed"))
    tried, not_tried = run.summary.get("images", judged), run.summary.get("images_not_tried", 0)
    for what, count, expected in (
        ("rounds.csv holds {} rounds", len(run.rounds), run.summary.get("rounds")),
        ("attacks.csv holds {} updates", len(run.attacks), updates),
        (
            "leakage.csv holds {} scored images",
            int(run.leakage["recovered"].count()),
            tried + not_tried if isinstance(tried, int) and isinstance(not_tried, int) else None,
        ),
        (
            "Reconstructions of {} updates are there",
            stored,
            updates - failed if isinstance(updates, int) and isinstance(failed, int) else None,
        ),
    ):
        if isinstance(expected, int) and count < expected:
            run.problems.append(f"{what.format(count)}, where the run counted {expected}.")


def _attempt(run: RunData, what: str, otherwise: T, read: Callable[[], T | None]) -> T:
    """`read()`, or `otherwise` and a problem noted once."""
    try:
        value = read()
        return otherwise if value is None else value
    except FileNotFoundError:
        problem = f"{what} is missing."
    except Exception as error:  # any damage at all: a report that says so is better than none
        reason = str(error).splitlines()[0][:200] if str(error) else type(error).__name__
        problem = f"{what} is damaged or unreadable ({reason})."
    if problem not in run.problems:
        run.problems.append(problem)
    return otherwise


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def _mapping(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError("not a mapping")
    return value


def _table(run: RunData, path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """A CSV file with at least `columns`; columns of numbers hold numbers, whatever the file holds."""
    empty = pd.DataFrame({column: pd.Series(dtype=float) for column in columns})
    table = _attempt(run, path.name, empty, lambda: pd.read_csv(path))
    missing = [column for column in columns if column not in table and column not in LATER_COLUMNS]
    if missing:
        run.problems.append(f"{path.name} lacks the column{'s' * (len(missing) > 1)} {', '.join(missing)}.")
    table = table.reindex(columns=list(columns))
    for column in columns:
        if column in ("labels_exact", "recovered"):
            table[column] = [{"True": 1.0, "False": 0.0}.get(str(value), float("nan")) for value in table[column]]
        elif column not in ("attack", "defense", "stop_reason"):
            table[column] = pd.to_numeric(table[column], errors="coerce").astype(float)
    readable = table["round"].notna() & (table["client"].notna() if "client" in table else True)
    if not readable.all():
        run.problems.append(f"{path.name}: {(~readable).sum()} of {len(table)} rows cannot be read.")
    table = table[readable].reset_index(drop=True)
    for column in ("round", "client"):
        if column in table:
            table[column] = table[column].astype(int)
    return table
