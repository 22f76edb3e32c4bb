"""Cheap defenses ranked, and DP-SGD by epsilon: python experiments/defenses/loop.py ranking|privacy [FOLDER].

The cells are those of ``fedleak frontier``: the same data, parts, batches, model, attack and limit. Only the federation
is a loop in one process, all clients of a round at once, instead of Flower's messages: a seventh of the computing. What
is there already in the folder is not done again.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.func import functional_call, grad, vmap
from torch.nn.functional import cross_entropy

from fedleak.attacks import Knowledge
from fedleak.attacks.inversion.map.attack import image_prior
from fedleak.capture import Observation
from fedleak.data import to_float
from fedleak.defenses import Defense, NoDefense
from fedleak.defenses.base import ClientView, leaving
from fedleak.evaluation.label_study import client_update
from fedleak.evaluation.limits import limit_of
from fedleak.evaluation.matching import match
from fedleak.evaluation.metrics import label_accuracy
from fedleak.federation.scenario import Scenario, build_scenario
from fedleak.seeding import generator
from fedleak.setup import Setup, compose
from fedleak.studies.frontier.cells import CLEAN, COLUMNS, CONTROL, _leak, _like, _possible, promises
from fedleak.studies.frontier.pictures import draw_privacy
from fedleak.studies.frontier.ranking import draw_ranking, rank
from fedleak.studies.frontier.recogniser import Recogniser, train_recogniser
from fedleak.studies.frontier.summary import summarise
from fedleak.truth import Truth

ROUNDS, CLIENTS, RATE = 300, 8, 0.1
DELTA, COST = 1e-5, 0.02
Setting = tuple[str, float, list[str]]
RANKED: list[Setting] = [
    (CLEAN, 0.0, []),
    ("int8", 1.0, []),
    ("gaussian", 0.1, ["defense.std=0.1"]),
    ("fp16", 1.0, []),
    ("bf16", 1.0, []),
    ("laplacian", 0.05, ["defense.scale=0.05"]),
    ("stochastic", 64.0, ["defense.levels=64"]),
    ("masking", 0.5, ["defense.ratio=0.5", "defense.rescale=true"]),
    ("clipping", 20.0, ["defense.norm=20"]),
    ("svd", 8.0, ["defense.rank=8"]),
    ("localdp", 2000.0, ["defense.epsilon=2000", "defense.norm=20"]),
    ("dpsgd", 0.005, ["defense.noise=0.005", "defense.norm=20"]),
    ("pruning", 0.2, ["defense.ratio=0.2"]),
    ("pruning_global", 0.3, ["defense.ratio=0.3"]),
    ("outpost", 0.05, ["defense.noise=0.05", "defense.ratio=0.2"]),
    ("gaussian", 0.03, ["defense.std=0.03"]),
]
PRIVATE: list[Setting] = [
    (CLEAN, 0.0, []),
    *(("dpsgd", z, [f"defense.noise={z}"]) for z in (0.005, 0.02, 0.05, 0.1, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 1.0)),
]
STUDIES = {"ranking": (RANKED, (10, 11, 12), (201,)), "privacy": (PRIVATE, (20,), (1, 201))}
"""Name -> settings, seeds, and the rounds whose updates are attacked."""
ATTACK = ["attack=map", "attack.restarts=1", "attack.adaptive=true", "threat.defense=true"]
ATTACK += ["threat.auxiliary_data=true"]


def setup_of(name: str, settings: list[str], seed: int) -> Setup:
    """The frontier's federation under a defense, and the attacker who knows it."""
    federation = ["federation=fedsgd", f"federation.clients={CLIENTS}", "federation.batch_size=1"]
    rounds = [f"federation.rounds={ROUNDS}", f"federation.lr={RATE}"]
    return compose(["data=digits16", *federation, *rounds, *ATTACK, f"defense={name}", *settings, f"seed={seed}"])


def federate(scenario: Scenario, defense: Defense, moments: tuple[int, ...]) -> tuple[float, list[dict[str, Tensor]]]:
    """Test accuracy at the end, and the weights that the rounds to attack begin with."""
    model, weights = scenario.model, {n: v.clone() for n, v in scenario.start()[0].items()}

    def loss(weights: dict[str, Tensor], image: Tensor, label: Tensor) -> Tensor:
        return cross_entropy(functional_call(model, weights, (image[None],)), label[None])

    each, kept = vmap(grad(loss), in_dims=(None, 0, 0)), []
    for number in range(1, ROUNDS + 1):
        if number in moments:
            kept.append(weights)
        batches = [scenario.private_batch(client, number) for client in range(CLIENTS)]
        made = each(weights, *(torch.cat(parts) for parts in zip(*batches, strict=True)))
        sent = []
        for client, (images, labels) in enumerate(batches):
            random = generator(scenario.seed, "defense", client, number)
            gradients = {name: value[client] for name, value in made.items()}
            sent.append(defended(gradients, defense, ClientView(weights, {}, model, images, labels), random))
        weights = {n: v - RATE * torch.stack([one[n] for one in sent]).mean(0) for n, v in weights.items()}
    images = to_float(scenario.data.test_images[scenario.utility])
    right = functional_call(model, weights, (images,)).argmax(1) == scenario.data.test_labels[scenario.utility]
    return float(right.float().mean()), kept


def defended(gradients: dict[str, Tensor], defense: Defense, view: ClientView, random: torch.Generator) -> dict:
    """What a client with a single sample sends."""
    used = defense.seeing(view)
    if used.per_example:
        one = used.examples({n: v[None] for n, v in gradients.items()}, generator=random)
        gradients = {n: v[0] for n, v in one.items()}
    return leaving(used, gradients, generator=random)


def cell(setting: Setting, seed: int, moments: tuple[int, ...], recogniser: Recogniser) -> list[dict]:
    """Rows of one defense and seed; of the control too, where there is none."""
    name, strength, settings = setting
    setup = setup_of(name, settings, seed)
    scenario, defense = build_scenario(setup), setup.defense.build(Defense)
    accuracy, kept = federate(scenario, defense, moments)
    observations, truths = [], []
    for number, weights in zip(moments, kept, strict=True):
        model = copy.deepcopy(scenario.model)
        model.load_state_dict(weights, strict=False)
        images, labels = scenario.private_batch(0, number)
        plain = client_update(model, images, labels, run=number - 1)
        random = generator(seed, "defense", 0, number)
        view = ClientView(plain.parameters, {}, model, images, labels)
        observations.append(replace(plain, update=defended(dict(plain.update), defense, view, random)))
        truths.append(Truth(number, 0, images, labels))
    knowledge = Knowledge(
        scenario.model, scenario.image_shape, scenario.data.classes, setup.threat, scenario.auxiliary_data(), defense
    )
    who = {"strength": strength, "attacker": "map", "seed": seed}
    cost = {"test_accuracy": accuracy, "epsilon": promises(setup, defense, DELTA)[0]}
    rows = attacked(setup, observations, truths, knowledge, recogniser, defense)
    rows = [{"defense": name, **who, **cost, **row} for row in rows]
    if name == CLEAN:
        noise = [replace(o, update=_like(o, seed)) for o in observations]
        held = replace(knowledge, defense=NoDefense())
        control = attacked(setup, noise, truths, held, recogniser, None)
        rows += [{"defense": CONTROL, **who, "strength": 1.0, **row} for row in control]
    return rows


def attacked(
    setup: Setup,
    observations: list[Observation],
    truths: list[Truth],
    knowledge: Knowledge,
    recogniser: Recogniser,
    defense: Defense | None,
) -> list[dict]:
    """What leaked of each update, and what could."""
    attack, prior = setup.attack.build(), image_prior(knowledge)
    rows = []
    for observation, truth in zip(observations, truths, strict=True):
        found = attack([observation], knowledge, device=torch.device("cpu"), seed=setup.seed)[0]
        row = {"round": truth.round, "label_accuracy": label_accuracy(truth.labels, found.labels)}
        row |= _leak(match(found, truth), recogniser)
        if defense is not None:
            row |= _possible([limit_of(observation, truth, knowledge, observation.training, defense, prior)])
        rows.append(row)
    return rows


def main(study: str, folder: Path) -> None:
    """Every cell that is not there yet, then the tables and the picture."""
    torch.set_num_threads(1)
    settings, seeds, moments = STUDIES[study]
    path = folder / "frontier.csv"
    rows = pd.read_csv(path, keep_default_na=False, na_values=[""]).to_dict("records") if path.exists() else []
    done = {(row["defense"], row["strength"], row["seed"]) for row in rows}
    recognisers: dict[int, Recogniser] = {}
    for seed in seeds:
        for setting in settings:
            if (*setting[:2], seed) in done:
                continue
            if seed not in recognisers:
                recognisers[seed] = train_recogniser(build_scenario(setup_of(CLEAN, [], seed)).data, seed)
            rows += cell(setting, seed, moments, recognisers[seed])
            pd.DataFrame(rows, columns=list(COLUMNS)).to_csv(path, index=False)
            print(*setting[:2], seed, {k: rows[-1].get(k) for k in ("test_accuracy", "mse", "limit_mse")}, flush=True)
    summary = summarise(pd.DataFrame(rows, columns=list(COLUMNS)))
    if study == "ranking":
        ranking = rank(summary, COST)
        ranking.to_csv(folder / "ranking.csv", index=False)
        draw_ranking(ranking, COST, folder / "ranking.png")
    else:
        setups = {setting[:2]: setup_of(setting[0], setting[2], seeds[0]) for setting in settings}
        bounds = {key: promises(setup, setup.defense.build(Defense), DELTA)[1] for key, setup in setups.items()}
        keys = zip(summary["defense"], summary["strength"], strict=True)
        summary = summary.assign(reconstruction_bound=pd.Series([bounds.get(key) for key in keys], dtype=float))
        draw_privacy(summary, folder / "privacy.png")
    summary.to_csv(folder / "summary.csv", index=False)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]) if len(sys.argv) > 2 else Path(__file__).parent / sys.argv[1])
