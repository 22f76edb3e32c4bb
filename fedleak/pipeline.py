"""The two things fedleak does, as numbered steps: run a federation with an attacker in it, attack captures again."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from fedleak import __version__
from fedleak.attacks import Attack, Knowledge
from fedleak.attacks.store import ReconstructionStore
from fedleak.attacks.views import ConsecutiveModels, shown
from fedleak.capture import CaptureStore, Observation
from fedleak.console import Console
from fedleak.defenses import Defense
from fedleak.errors import UsageError
from fedleak.evaluation.judge import Attacked, Judgement, judge
from fedleak.executor import attack_on_ray
from fedleak.facts import describe, facts
from fedleak.federation.checkpoint import FILE, Checkpoint
from fedleak.federation.client import make_client_app
from fedleak.federation.engine import LocalEngine
from fedleak.federation.scenario import Scenario, build_scenario, shared_model
from fedleak.federation.server import RoundRow, make_server_app, read_rows
from fedleak.files import alone
from fedleak.footprint import footprint
from fedleak.interrupted import NEW, identity, where_it_stopped
from fedleak.outcome import Outcome, rounds_of, write_outcome
from fedleak.prepare import prepare
from fedleak.rounds import NOTHING, choose_victims
from fedleak.setup import Setup
from fedleak.shards import Background
from fedleak.tracking import Tracker, finite, tracked
from fedleak.truth import TruthStore


def run(
    setup: Setup,
    folder: Path,
    console: Console,
    command: Sequence[str] = (),
    *,
    engine: Any = None,
    resume: bool = False,
) -> Outcome:
    """Simulate a federation with an eavesdropping server, attack what it captured, and judge the result.

    Args:
        setup: see `fedleak.setup`.
        folder: where everything goes; `.hydra/` may be there already.
        console: for progress.
        command: the overrides that repeat the run, for the summary.
        engine: what to run it on in place of the setup's, such as a `GivenGrid`.
        resume: go on from what an interrupted run of the same setup left there.
    """
    started = time.perf_counter()
    # 1. Everything that both sides agree on, from the setup alone.
    scenario, attack, usual = prepare(setup)
    folder.mkdir(parents=True, exist_ok=True)
    with alone(folder):
        left = where_it_stopped(setup, folder) if resume else NEW
        if left.federated:
            rounds_of(folder)  # altered ones are better noticed now
        console.headline(describe(setup) if not left.federated else f"{folder}: the federation is finished")
        with tracked(setup, folder) as tracker:
            # 2. The federation: clients train, the eavesdropper keeps every update.
            if not left.federated:
                (folder / "summary.json").unlink(missing_ok=True)  # it would be of another federation
                _say_beforehand(scenario, console)
                _federate(setup, scenario, engine or usual, folder, left.since, (console, tracker))

            # 3. The attack, on all captured rounds in one call; it sees the captures and nothing else.
            attacked = None if attack is None else attack_captures(setup, folder, attack, console)

            # 4. The judgement, which alone opens the ground truth.
            truths = TruthStore(folder / "truth")
            judgement = Judgement() if attacked is None else judge(attacked, truths, setup)
            naive = _naive(setup, folder, truths, console)
            said = facts(setup, time.perf_counter() - started + left.seconds, command)
            outcome = write_outcome(judgement, folder, folder, said, tracker, naive=naive)
        (folder / FILE).unlink(missing_ok=True)  # nothing is left to go on with
    return outcome


def _federate(
    setup: Setup,
    scenario: Scenario,
    engine: Any,
    folder: Path,
    since: Checkpoint | None,
    audience: tuple[Console, Tracker],
) -> None:
    """Run the federation to its end, from where it stopped."""
    console, tracker = audience
    missing = 0
    with console.federation(scenario.federation.rounds) as show:
        expected = max(1, round(scenario.federation.fraction * scenario.federation.clients))

        def on_row(row: RoundRow) -> None:
            nonlocal missing
            missing += expected - row.clients
            show(row)
            learned = {"test_accuracy": row.test_accuracy, "train_loss": row.train_loss}
            tracker.log(row.round, finite(learned, "federation/"))

        for row in [] if since is None else read_rows(folder / "rounds.csv"):
            on_row(row)
        # Clients in this process leave writing to the thread that the captures have; others must not lose what waits.
        writer = Background() if isinstance(engine, LocalEngine) else None
        server_app = make_server_app(scenario, folder, on_row=on_row, since=since, of=identity(setup), writer=writer)
        client_app = make_client_app(setup, TruthStore(folder.absolute() / "truth", writer))
        engine.run(server_app, client_app, scenario.federation.clients)
    if missing:
        console.headline(f"{missing} answers of clients were not averaged, for the reasons said above")


def _say_beforehand(scenario: Scenario, console: Console) -> None:
    """What a run will take, and what of the configuration will not be as it reads."""
    if scenario.keep != NOTHING:
        console.headline(str(footprint(scenario)))
    size, held = scenario.federation.batch_size, [len(part) for part in scenario.parts]
    few = sum(count < size for count in held)
    if few:
        console.headline(
            f"federation.batch_size={size}: {few} of {len(held)} clients hold fewer images (the least {min(held)}) "
            "and train on all that they have"
        )


def attack_again(setup: Setup, run_dir: Path, folder: Path, console: Console, command: Sequence[str] = ()) -> Outcome:
    """Attack the captures of an earlier run; its federation is not repeated and its files are not touched.

    Args:
        setup: the earlier run's, with attack, threat and device as wanted now.
        run_dir: the earlier run.
        folder: where tables and pictures go.
    """
    started = time.perf_counter()
    attack = setup.attack.build()
    if attack is None:
        raise UsageError("attack=none: there is nothing to do; choose an attack, see fedleak list")
    setup.check_attack(attack)
    rounds_of(run_dir)  # as above
    with tracked(setup, folder) as tracker:
        attacked = attack_captures(setup, run_dir, attack, console)
        folder.mkdir(parents=True, exist_ok=True)
        truths = TruthStore(run_dir / "truth")
        judgement = judge(attacked, truths, setup)
        naive = _naive(setup, run_dir, truths, console)
        said = facts(setup, time.perf_counter() - started, command)
        return write_outcome(judgement, run_dir, folder, said, tracker, naive=naive)


def _naive(setup: Setup, run_dir: Path, truths: TruthStore, console: Console) -> Judgement | None:
    """The same attack by one who does not adapt, to stand beside an adaptive one; None beside any other."""
    if not setup.attack.adaptive:
        return None
    setup = replace(setup, attack=replace(setup.attack, adaptive=False), limit="off")
    attack = setup.attack.build()
    return None if attack is None else judge(attack_captures(setup, run_dir, attack, console), truths, setup)


def attack_captures(setup: Setup, run_dir: Path, attack: Attack, console: Console) -> Attacked:
    """Hand the victims among a run's captures to the attack, all in one call.

    Reconstructions are kept beside the captures as they finish, under a key made from everything that decides them:
    an attack that was killed goes on where it stopped, whichever command repeats it.
    """
    store = CaptureStore.open(run_dir / "captures")
    observations = _seen(store, setup)
    knowledge = attacker_knowledge(setup, store)
    where = run_dir / "captures" / "reconstructions" / _key(setup)
    name = f"adaptive {attack.name}" if attack.adaptive else attack.name
    console.headline(f"attack {name} on {len(observations)} updates of {run_dir}, on {setup.torch_device}")
    with console.attack(name, len(observations)) as on_progress:
        solve = attack if setup.attack.executor == "local" else partial(attack_on_ray, attack)
        reconstructions = solve(
            observations,
            knowledge,
            device=setup.torch_device,
            seed=setup.seed,
            seconds=setup.attack.seconds,
            store=ReconstructionStore(where),
            on_progress=on_progress,
        )
    return Attacked(attack.view(observations), reconstructions, knowledge, where)


def _seen(store: CaptureStore, setup: Setup) -> list[Observation]:
    """What the attacker sees of the victims among a run's captures."""
    view, rows = setup.threat.view, store.rows()
    victims = choose_victims(rows, setup.attack.every, setup.attack.clients if view == "updates" else "all")
    if not victims:
        raise UsageError(f"{store.folder}: no captured update is left to attack; check attack.every, or repeat the run")
    if view == "updates":
        return store.load(victims, threat=setup.threat)
    if view == "sum":
        return shown(view, store.load(victims, threat=setup.threat))
    wanted = {row["round"] for row in victims}
    seen = store.load([r for r in rows if wanted & {r["round"], r["round"] - 1}], threat=setup.threat)
    pairs = ConsecutiveModels()
    last = pairs.check(row["round"] for row in rows)
    some = [pairs([o for o in seen if o.round in (number, number + 1)]) for number in sorted(wanted - {last})]
    return [observation for pair in some for observation in pair]


def attacker_knowledge(setup: Setup, store: CaptureStore) -> Knowledge:
    """What the attacker holds: the architecture, and auxiliary data if granted. Never the ground truth."""
    shape, classes = store.info.image_shape, store.info.classes
    if shape is None or classes is None:
        raise UsageError(f"{store.folder / 'info.json'}: image_shape and classes are missing; add them")
    model = shared_model(setup, shape, classes, 0)
    auxiliary = build_scenario(setup).auxiliary_data() if setup.threat.auxiliary_data else None
    defense = setup.defense.build(Defense) if setup.threat.defense else None
    return Knowledge(model, shape, classes, setup.threat, auxiliary, defense)


def _key(setup: Setup) -> str:
    """A short name for everything that decides the reconstructions; which victims are attacked is not part of it."""
    attack = replace(setup.attack, name="", every="auto", clients="all", executor="local")
    decides = [attack, setup.threat, setup.model, setup.adversary, setup.seed, setup.torch_device.type, __version__]
    return f"{setup.attack.name}-{hashlib.sha256(repr(decides).encode()).hexdigest()[:10]}"
