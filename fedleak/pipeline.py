"""The two things fedleak does, as numbered steps: run a federation with an attacker in it, attack captures again."""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from fedleak import __version__, tensorfile
from fedleak.attacks import Attack, Knowledge, Reconstruction
from fedleak.attacks.store import ReconstructionStore
from fedleak.capture import CaptureStore, Observation
from fedleak.console import Console
from fedleak.errors import UsageError
from fedleak.evaluation.scores import (
    ATTACK_COLUMNS,
    LEAKAGE_COLUMNS,
    Match,
    leakage_by_round,
    match,
    round_table,
    score,
    summarise,
)
from fedleak.federation.adversary import Adversary
from fedleak.federation.client import make_client_app
from fedleak.federation.rounds import is_due
from fedleak.federation.scenario import (
    Federation,
    Scenario,
    build_adversary,
    build_scenario,
    resolve_device,
    shared_model,
)
from fedleak.federation.server import RoundRow, make_server_app
from fedleak.instantiate import instantiate
from fedleak.local_update import local_update
from fedleak.threads import one_thread
from fedleak.threat import ThreatModel
from fedleak.tracking import NoTracker, Tracker, build_tracker, finite, tracked
from fedleak.training import LocalTraining
from fedleak.truth import Truth, TruthStore


@dataclass(frozen=True)
class Outcome:
    """What a run or an attack left behind.

    Attributes:
        folder: where tables and pictures are.
        table: per round, test accuracy, label accuracy and images recovered.
        summary: what `summary.json` holds.
        report: the page, where a tracker has asked for it already.
    """

    folder: Path
    table: pd.DataFrame
    summary: dict[str, Any]
    report: Path | None = None


def prepare(config: Mapping[str, Any]) -> tuple[Scenario, Attack | None, Any]:
    """Build everything that can be wrong, before any work.

    Raises:
        UsageError: names the key, the value and the mend.
    """
    device = resolve_device(config["device"])
    attack = build_attack(config)
    if attack is not None:
        check_attack(attack, config)
    scenario = build_scenario(config)
    build_tracker(config)
    assert scenario.device == device
    return scenario, attack, instantiate(config["engine"], "engine")


def run(config: Mapping[str, Any], folder: Path, console: Console, command: Sequence[str] = ()) -> Outcome:
    """Simulate a federation with an eavesdropping server, attack what it captured, and judge the result.

    Args:
        config: plain containers, see `fedleak.config`.
        folder: where everything goes; `.hydra/` may be there already.
        console: for progress.
        command: the overrides that repeat the run, for the summary.
    """
    started = time.perf_counter()
    # 1. Everything that both sides agree on, from the config and the seed.
    scenario, attack, engine = prepare(config)
    console.headline(describe(config, scenario.device))

    with tracked(config, folder) as tracker:
        # 2. The federation: clients train, the eavesdropper keeps every update.
        with console.federation(scenario.federation.rounds) as show:

            def on_row(row: RoundRow) -> None:
                show(row)
                learned = {"test_accuracy": row.test_accuracy, "train_loss": row.train_loss}
                tracker.log(row.round, finite(learned, "federation/"))

            server_app = make_server_app(scenario, folder, on_row=on_row)
            client_app = make_client_app(config, folder.absolute() / "truth")
            engine.run(server_app, client_app, scenario.federation.clients)

        # 3. The attack, on all captured rounds in one call; it sees the captures and nothing else.
        attacked = None if attack is None else attack_captures(config, folder, attack, console)

        # 4. The judgement, which alone opens the ground truth.
        return judge(config, folder, folder, attacked, time.perf_counter() - started, command, tracker)


def attack_again(
    config: Mapping[str, Any], run_dir: Path, folder: Path, console: Console, command: Sequence[str] = ()
) -> Outcome:
    """Attack the captures of an earlier run; its federation is not repeated and its files are not touched.

    Args:
        config: the earlier run's, with attack, threat and device as wanted now.
        run_dir: the earlier run.
        folder: where tables and pictures go.
    """
    started = time.perf_counter()
    attack = build_attack(config)
    if attack is None:
        raise UsageError("attack=none: there is nothing to do; choose an attack, see fedleak list")
    check_attack(attack, config)
    with tracked(config, folder) as tracker:
        attacked = attack_captures(config, run_dir, attack, console)
        folder.mkdir(parents=True, exist_ok=True)
        return judge(config, run_dir, folder, attacked, time.perf_counter() - started, command, tracker)


@dataclass(frozen=True)
class Attacked:
    """What an attack saw and what it made of it, side by side, and the folder its reconstructions are kept in."""

    observations: list[Observation]
    reconstructions: list[Reconstruction]
    model: torch.nn.Module
    where: Path


def attack_captures(config: Mapping[str, Any], run_dir: Path, attack: Attack, console: Console) -> Attacked:
    """Hand the victims among a run's captures to the attack, all in one call.

    Reconstructions are kept beside the captures as they finish, under a key made from everything that decides them:
    an attack that was killed goes on where it stopped, whichever command repeats it.
    """
    threat = ThreatModel(**config["threat"])
    store = CaptureStore.open(run_dir / "captures")
    victims = choose_victims(store.rows(), config["attack"]["every"], config["attack"]["clients"])
    if not victims:
        raise UsageError(f"{store.folder}: no captured update is left to attack; check attack.every, or repeat the run")
    observations = store.load(victims, threat=threat)
    knowledge = attacker_knowledge(config, store, threat)
    device = resolve_device(config["device"])
    where = run_dir / "captures" / "reconstructions" / _key(config, device)
    console.headline(f"attack {attack.name} on {len(observations)} updates of {run_dir}, on {device}")
    with console.attack(attack.name, len(observations)) as on_progress:
        reconstructions = attack(
            observations,
            knowledge,
            device=device,
            seed=config["seed"],
            store=ReconstructionStore(where),
            on_progress=on_progress,
        )
    return Attacked(attack.view(observations), reconstructions, knowledge.model, where)


def attacker_knowledge(config: Mapping[str, Any], store: CaptureStore, threat: ThreatModel) -> Knowledge:
    """What the attacker holds: the architecture, and auxiliary data if granted. Never the ground truth."""
    shape, classes = store.info.image_shape, store.info.classes
    if shape is None or classes is None:
        raise UsageError(f"{store.folder / 'info.json'}: image_shape and classes are missing; add them")
    model = shared_model(config, shape, classes, 0)
    auxiliary = build_scenario(config).auxiliary_data() if threat.auxiliary_data else None
    return Knowledge(model, shape, classes, threat, auxiliary)


def build_attack(config: Mapping[str, Any]) -> Attack | None:
    """The attack of a config, None for ``attack=none``."""
    node = config["attack"]
    if node["labels"] is None or node["inversion"] is None:
        return None
    return Attack(
        instantiate(node["labels"], "attack.labels"),
        instantiate(node["inversion"], "attack.inversion"),
        name=node["name"],
        candidates=node["candidates"],
        view=None if node.get("view") is None else instantiate(node["view"], "attack.view"),
    )


def check_attack(attack: Attack, config: Mapping[str, Any]) -> None:
    """Refuse, before any work, an attack that this federation or threat model cannot feed."""
    attack.check(ThreatModel(**config["threat"]), Federation(**config["federation"]).training)


def choose_victims(rows: Sequence[Mapping[str, Any]], every: int | str, clients: int | str) -> list[Mapping[str, Any]]:
    """Rounds 1, 1 + every, …, and of each the first `clients` by number (all of them for ``all``).

    ``auto`` attacks every captured round of a short federation, and about ten of a long one.
    """
    captured = sorted({row["round"] for row in rows})
    if every == "auto":
        chosen = set(captured[:: max(1, math.ceil(len(captured) / 10))])
    else:
        chosen = {number for number in captured if is_due(number, int(every))}
    victims: list[Mapping[str, Any]] = []
    taken: dict[int, int] = {}
    for row in rows:
        number = row["round"]
        if number in chosen and (clients == "all" or taken.get(number, 0) < int(clients)):
            taken[number] = taken.get(number, 0) + 1
            victims.append(row)
    return victims


def judge(
    config: Mapping[str, Any],
    run_dir: Path,
    folder: Path,
    attacked: Attacked | None,
    seconds: float,
    command: Sequence[str],
    tracker: Tracker,
) -> Outcome:
    """Join reconstructions with the ground truth; write tables, pictures and summary, and tell the tracker."""
    truths = TruthStore(run_dir / "truth")
    attack_rows, leakage_rows = [], []
    matches: list[Match] = []
    pairs = zip(attacked.observations, attacked.reconstructions, strict=True) if attacked else ()
    for observation, reconstruction in pairs:
        truth = load_truth(truths, observation)
        residual = None
        if attacked and truth is not None and observation.error is None:
            with one_thread():  # as the clients ran, so that rounding does not look like a disagreement
                residual = update_residual(attacked.model, observation, truth, local_training(config))
        pairs_of_images = match(reconstruction, truth)
        row, images = score(
            reconstruction,
            truth,
            matches=pairs_of_images,
            attack=config["attack"]["name"],
            defense=defense_name(config),
            batch_size=observation.training.batch_size,
            update_residual=residual,
        )
        attack_rows.append(row)
        leakage_rows += images
        matches += pairs_of_images
    attacks = pd.DataFrame(attack_rows, columns=list(ATTACK_COLUMNS))
    leakage = pd.DataFrame(leakage_rows, columns=list(LEAKAGE_COLUMNS))
    rounds = pd.read_csv(run_dir / "rounds.csv") if (run_dir / "rounds.csv").exists() else pd.DataFrame()
    write_csv(attacks, folder / "attacks.csv")
    write_csv(leakage, folder / "leakage.csv")
    if attacked:
        from fedleak.report.pictures import evolution_png, reconstructions_png

        reconstructions_png(folder / "reconstructions.png", matches)
        if any(pair.frames for pair in matches):
            evolution_png(folder / "evolution.png", matches)
    summary = {
        **summarise(attacks, leakage, rounds),
        **facts(config, seconds, command),
        "run_dir": os.path.relpath(run_dir, folder),
        "reconstructions": os.path.relpath(attacked.where, folder) if attacked else None,
    }
    tensorfile.write_atomically(folder / "summary.json", (json.dumps(summary, indent=2) + "\n").encode())
    report = None
    if not isinstance(tracker, NoTracker):
        report = tell(tracker, folder, attacks, leakage, summary)
    return Outcome(folder, round_table(rounds, attacks, leakage), summary, report)


def tell(
    tracker: Tracker, folder: Path, attacks: pd.DataFrame, leakage: pd.DataFrame, summary: Mapping[str, Any]
) -> Path:
    """Hand a finished run's leakage, pictures, tables and report to its tracker; returns the report."""
    from fedleak.report.html import write_report

    report = write_report([folder], folder / "report.html")
    for number, leaked in leakage_by_round(attacks, leakage).items():
        tracker.log(number, finite(leaked, "leakage/"))
    for pattern in ("*.png", "*.csv", "summary.json", report.name):
        for path in sorted(folder.glob(pattern)):
            tracker.keep(path.absolute())
    tracker.finish(finite(summary))
    return report


def local_training(config: Mapping[str, Any]) -> LocalTraining:
    """How this federation's clients train, nothing withheld."""
    training = Federation(**config["federation"]).training
    return replace(training, per_sample=config["threat"]["per_sample_gradients"])


def load_truth(truths: TruthStore, observation: Observation) -> Truth | None:
    """What is behind an observation: its client's private batches, or those of all whose updates it sums up."""
    found = [truths.load(observation.round, client) for client in observation.clients or (observation.client,)]
    known = [truth for truth in found if truth is not None]
    if len(known) < len(found):
        return None
    steps = known[0].local_steps
    if len(known) == 1:
        return known[0]
    images, labels = (
        torch.cat([part for parts in zip(*(values.chunk(steps) for values in each), strict=True) for part in parts])
        for each in ([truth.images for truth in known], [truth.labels for truth in known])
    )
    return Truth(observation.round, observation.client, images, labels, steps)


def update_residual(
    model: torch.nn.Module, observation: Observation, truth: Truth, training: LocalTraining
) -> float | None:
    """The self-check: relative ℓ2 distance between the captured update and the one recomputed from the truth.

    About 1e-7 if client and attacker agree on preprocessing, mode, learning rate and steps; more with a defense.
    None if it cannot be recomputed (a truth of other shapes).
    """
    try:
        again = local_update(
            model,
            observation.parameters,
            observation.start_buffers,
            truth.images,
            truth.labels,
            replace(training, local_steps=truth.local_steps),
        ).update
    except (RuntimeError, ValueError, IndexError):
        return None
    origin = observation.parameters if training.payload == "weights" else None

    def change(values: Mapping[str, Tensor], name: str) -> Tensor:
        return (values[name] - origin[name] if origin is not None else values[name]).double()

    try:
        distance = sum(float((change(observation.update, n) - change(again, n)).square().sum()) for n in again)
    except RuntimeError:  # a truth file with another number of samples
        return None
    size = sum(float(change(again, n).square().sum()) for n in again)
    return float(f"{(distance / size) ** 0.5:.4g}") if size > 0 else None


def write_csv(table: pd.DataFrame, path: Path) -> None:
    """Write a table whole or not at all; missing values are empty cells."""
    tensorfile.write_atomically(path, table.to_csv(index=False).encode())


def defense_name(config: Mapping[str, Any]) -> str:
    """The defense and its strength in a word: ``gaussian(std=0.1)``."""
    node = config["defense"]
    if not isinstance(node, Mapping):
        return str(node)
    name = str(node["_target_"]).rsplit(".", 1)[-1].lower()
    if name == "nodefense":
        return "none"
    strengths = ", ".join(f"{k}={v}" for k, v in node.items() if isinstance(v, int | float | str) and k != "_target_")
    return f"{name}({strengths})" if strengths else name


def describe(config: Mapping[str, Any], device: torch.device) -> str:
    """One line: who attacks what, where."""
    f, target = config["federation"], lambda node: str(node["_target_"]).rsplit(".", 1)[-1]
    return (
        f"{f['clients']} clients × {f['rounds']} rounds on {target(config['data'])}, {target(config['model'])}, "
        f"batch size {f['batch_size']}, {f['payload']} payload, attack {config['attack']['name']}, "
        f"defense {defense_name(config)}, seed {config['seed']}, on {device}"
    )


def facts(config: Mapping[str, Any], seconds: float, command: Sequence[str]) -> dict[str, Any]:
    """What was run, for `summary.json` and the report."""
    threat = ThreatModel(**config["threat"])
    device = resolve_device(config["device"])
    honest = type(build_adversary(config)) is Adversary
    return {
        "command": shlex.join(command),
        "seconds": round(seconds, 3),
        "seed": config["seed"],
        "device": device_name(device),
        "attack": config["attack"]["name"],
        "defense": defense_name(config),
        "data": str(config["data"].get("_target_", "")).rsplit(".", 1)[-1],
        "partition": str(config["partition"].get("_target_", "")).rsplit(".", 1)[-1].lower(),
        "model": str(config["model"].get("_target_", "")).rsplit(".", 1)[-1],
        "federation": dict(config["federation"]),
        "threat": {
            "kind": "honest-but-curious" if honest else "malicious",
            "granted": threat.granted,
            "withheld": threat.withheld,
        },
        "versions": versions(),
    }


def device_name(device: torch.device) -> str:
    """The GPU's name, or ``cpu``."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def versions() -> dict[str, str]:
    """What was used, name -> version."""
    return {"fedleak": __version__, "python": platform.python_version()} | {
        name: _version(name) for name in ("torch", "torchvision", "flwr", "numpy")
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _key(config: Mapping[str, Any], device: torch.device) -> str:
    """A short name for everything that decides the reconstructions; which victims are attacked is not part of it."""
    attack = {k: v for k, v in config["attack"].items() if k not in ("every", "clients", "name")}
    decides = [attack, config["threat"], config["model"], config["seed"], device.type, __version__]
    digest = hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest()[:10]
    return f"{config['attack']['name']}-{digest}"
