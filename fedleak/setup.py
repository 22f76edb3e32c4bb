"""The one room that turns the composed configuration into typed objects; nothing behind it reads a dictionary.

It imports neither torch nor Flower: what can be refused without them is refused at once.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from fedleak.config import (
    POSITIVE,
    YES_NO,
    check_rules,
    choice_files,
    compose_config,
    flat,
    parse,
    plain,
    search_path,
    suggest,
)
from fedleak.errors import UsageError
from fedleak.instantiate import Part
from fedleak.rounds import NOTHING, Keep, is_due
from fedleak.rules import FIXED, ROOT, RULES
from fedleak.threat import ThreatModel

if TYPE_CHECKING:
    import torch

    from fedleak.attacks import Attack
    from fedleak.training import ClientOptimizer, LocalTraining, Payload


@dataclass(frozen=True)
class Federation:
    """The `federation` group of the config; its files say what each key is."""

    clients: int
    rounds: int
    fraction: float
    batch_size: int
    local_steps: int
    lr: float
    payload: Payload
    training_mode: bool = True
    evaluate_every: int = 1
    capture_every: int = 1
    epochs: int = 1
    batches: Literal["fresh", "fixed"] = "fresh"
    dropout: float = 0.0
    optimizer: str = "sgd"
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0
    lr_decay: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))  # a list, where it comes from a file

    def lr_in(self, server_round: int) -> float:
        """The learning rate of a round, from 1."""
        return self.lr * self.lr_decay ** (server_round - 1)

    def optimizer_in(self, server_round: int) -> ClientOptimizer:
        """The clients' optimiser in a round, from 1."""
        from fedleak.training import SGD, Adam, AdamW

        lr, decay = self.lr_in(server_round), self.weight_decay
        if self.optimizer in ("adam", "adamw"):
            kind = Adam if self.optimizer == "adam" else AdamW
            return kind(lr, self.betas, self.eps, decay)
        momentum = 0.0 if self.optimizer == "sgd" else self.momentum
        return SGD(lr, momentum, self.optimizer == "nesterov", decay)

    def evaluates(self, server_round: int) -> bool:
        """Whether the test accuracy is measured after this round."""
        return is_due(server_round, self.evaluate_every) or server_round == self.rounds


@dataclass(frozen=True)
class AttackPlan:
    """The `attack` group: how updates are attacked, and which of those that were captured.

    Attributes:
        name: for tables.
        labels, inversion: the attack's parts; without either there is no attack.
        view: what of the captures the attacker sees, None for every update.
        candidates: label multisets to try.
        every, clients: which updates, see `fedleak.rounds.choose_victims`.
        adaptive: whether the attacker's guesses go through the clients' defense.
        seconds: for the images of all updates together, about; None for as long as they need.
        executor: where: ``local``, this process, or ``ray``, in pieces on a cluster's devices.
    """

    name: str
    labels: Part | None
    inversion: Part | None
    view: Part | None
    candidates: int
    every: int | Literal["auto"]
    clients: int | Literal["all"]
    adaptive: bool = False
    seconds: float | None = None
    executor: str = "local"

    def build(self) -> Attack | None:
        """The attack, None for ``attack=none``; raises `UsageError` for parts that cannot be built."""
        if self.labels is None or self.inversion is None:
            return None
        from fedleak.attacks import Attack, Inversion, LabelInference, View
        from fedleak.executor import require

        require(self.executor)
        labels, inversion = self.labels.build(LabelInference), self.inversion.build(Inversion)
        view = None if self.view is None else self.view.build(View)
        return Attack(labels, inversion, name=self.name, candidates=self.candidates, view=view, adaptive=self.adaptive)


@dataclass(frozen=True)
class Setup:
    """A run as configured: small, frozen, and the same in every process; `Part`s are built where they are needed.

    Attributes:
        capture: which updates are kept.
        study: a published table or figure instead of one federation, with its short settings where `quick` says so.
        device: ``auto``, ``cpu`` or ``cuda``.
        limit: whether to say how much each update can leak at most.
        auxiliary: the folder of condensed images that are granted as auxiliary data, None for held-out test images.
        settings: the configuration as dotted key -> value, for trackers.
    """

    seed: int
    quick: bool
    device: str
    limit: Literal["auto", "off"]
    federation: Federation
    threat: ThreatModel
    data: Part
    partition: Part
    model: Part
    defense: Part
    adversary: Part
    strategy: Part
    engine: Part
    tracking: Part
    attack: AttackPlan
    study: Part | None
    capture: Keep
    auxiliary: str | None
    settings: Mapping[str, str] = field(compare=False)

    @property
    def torch_device(self) -> torch.device:
        """Where to compute; raises `UsageError` for ``cuda`` without a GPU."""
        from fedleak.devices import resolve_device

        return resolve_device(self.device)

    @property
    def training(self) -> LocalTraining:
        """How each client trains in the first round, nothing withheld."""
        return self.training_in(1)

    def training_in(self, server_round: int) -> LocalTraining:
        """How each client trains in a round, nothing withheld."""
        from fedleak.training import LocalTraining

        return LocalTraining(
            payload=self.federation.payload,
            batch_size=self.federation.batch_size,
            local_steps=self.federation.local_steps,
            epochs=self.federation.epochs,
            optimizer=self.federation.optimizer_in(server_round),
            training_mode=self.federation.training_mode,
            per_sample=self.threat.per_sample_gradients,
            proximal=_proximal(self.strategy.node),
        )

    def seen_in(self, server_round: int) -> LocalTraining:
        """How whoever is behind an update that the attacker sees trains in a round: a client, or all of a round."""
        training = self.training_in(server_round)
        if self.threat.view == "updates":
            return training
        from fedleak.attacks.views import as_one

        members = max(1, round(self.federation.fraction * self.federation.clients))
        members -= min(members - 1, round(self.federation.dropout * members))
        return as_one([training] * members, models=self.threat.view == "models")

    def check_attack(self, attack: Attack) -> None:
        """Raise `UsageError` for an attack that this federation or threat model cannot feed."""
        attack.check(self.threat, self.seen_in(1))
        if attack.inversion.fixed_batches and self.federation.batches != "fixed" and self.federation.rounds > 1:
            raise UsageError(
                f"attack={attack.name}: takes a client's rounds for rounds on the same batch; choose "
                "federation.batches=fixed"
            )


def _proximal(node: Any) -> float:
    """What a strategy, or one that it wraps, asks of clients as FedProx does."""
    if not isinstance(node, Mapping):
        return 0.0
    return float(node.get("proximal_mu") or _proximal(node.get("strategy")))


def compose(overrides: Sequence[str]) -> Setup:
    """The setup of some overrides; raises `UsageError` as `compose_config` and `read` do."""
    return read(plain(compose_config(overrides)), overrides)


def read(config: Mapping[str, Any], overrides: Sequence[str] = ()) -> Setup:
    """Check every value that can be checked without data, and turn the config into objects.

    Args:
        config: plain containers of ``conf/config.yaml``, composed.
        overrides: as typed; a study's setting given there is kept whatever ``quick=true`` says.

    Raises:
        UsageError: names the key, its value and the mend.
    """
    check_rules(config, RULES)
    if strange := [key for key in config if key not in ROOT]:
        raise UsageError(f"{strange[0]}: unknown key; {suggest(strange[0], ROOT)}")
    for group in FIXED:
        known = [key.split(".")[1] for key in RULES if key.startswith(group + ".")]
        for key in config[group]:
            if key not in known:
                raise UsageError(f"{group}.{key}: unknown key; {suggest(key, known)}")
    data = config["data"]
    if isinstance(data, Mapping) and not YES_NO.test(data.get("download", False)):
        raise UsageError(f"data.download={data['download']}: must be {YES_NO.mend}")
    federation, threat = Federation(**config["federation"]), ThreatModel(**config["threat"])
    _check_together(config, federation, threat)
    groups = ("data", "partition", "model", "defense", "adversary", "strategy", "engine", "tracking")
    parts: dict[str, Any] = {key: Part(key, config.get(key)) for key in groups}  # type: ignore[arg-type]
    return Setup(
        seed=config["seed"],
        quick=config["quick"],
        device=config["device"],
        limit="auto" if config["limit"] == "auto" else "off",
        federation=federation,
        threat=threat,
        attack=_plan(config["attack"], overrides),
        study=_study(config, overrides),
        capture=_keep(config),
        auxiliary=config["auxiliary"],
        settings=flat(config),
        **parts,
    )


def _check_together(config: Mapping[str, Any], federation: Federation, threat: ThreatModel) -> None:
    """Raise `UsageError` where settings that are fine alone contradict one another."""
    once = federation.local_steps == federation.epochs == 1
    if threat.per_sample_gradients and (federation.payload != "gradient" or not once):
        raise UsageError(
            "threat.per_sample_gradients=true: needs federation.payload=gradient, federation.local_steps=1 and "
            "federation.epochs=1"
        )
    if config["auxiliary"] is not None and not threat.auxiliary_data:
        raise UsageError(
            f"auxiliary={config['auxiliary']}: the threat model grants no auxiliary data; give "
            "threat.auxiliary_data=true, or leave it out"
        )
    if threat.per_sample_gradients and threat.view != "updates":
        raise UsageError(
            f"threat.view={threat.view}: shows no sample's own gradient; leave threat.per_sample_gradients"
        )
    if threat.view == "models" and federation.capture_every != 1:
        raise UsageError(
            f"federation.capture_every={federation.capture_every}: threat.view=models compares models of "
            "consecutive rounds; choose federation.capture_every=1"
        )
    if threat.view == "models" and Part("strategy", config["strategy"]).name not in ("FedAvg", "FedProx"):
        raise UsageError(
            "threat.view=models: the next model tells the mean update where the server takes it as it is; "
            "choose strategy=fedavg or fedprox"
        )


def _plan(attack: Mapping[str, Any], overrides: Sequence[str]) -> AttackPlan:
    """The `attack` group."""
    seconds = attack.get("seconds")
    if seconds is not None and not POSITIVE.test(seconds):
        raise UsageError(f"attack.seconds={seconds}: must be {POSITIVE.mend}, or null for as long as it takes")
    known = [key.split(".")[1] for key in RULES if key.startswith("attack.")]
    for override in parse(overrides):
        first, _, inner = override.key_or_group.partition(".")
        word = inner.split(".")[0]
        if (
            first == "attack"
            and override.is_add()
            and word
            and word not in (*known, "seconds", "labels", "inversion", "view")
        ):
            raise UsageError(f"attack.{word}: unknown key; {suggest(word, known)}")
    plan: dict[str, Any] = {
        key: attack[key] for key in ("name", "candidates", "every", "clients", "adaptive", "executor")
    }
    plan["seconds"] = seconds
    for key in ("labels", "inversion", "view"):
        plan[key] = None if attack.get(key) is None else Part(f"attack.{key}", attack[key])
    return AttackPlan(**plan)


def _keep(config: Mapping[str, Any]) -> Keep:
    """The `capture` group."""
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config["capture"].items()}
    keep = Keep(**values, every=config["federation"]["capture_every"])
    return NOTHING if 0 in (keep.clients, keep.rounds) else keep


def read_labels(config: Mapping[str, Any], overrides: Sequence[str] = ()) -> Setup:
    """As `read`, of ``conf/labels.yaml``: its study, in a setup that leaves the rest as it is by default."""
    drawn = config.get("partition")
    partitions = ["iid", "biased"] if drawn is None else [Part("partition", drawn).name.lower()]
    if not {"iid", "biased"}.issuperset(partitions):
        raise UsageError(
            f"partition={partitions[0]}: fedleak labels draws batches iid or biased; leave it out for both"
        )
    rest = plain(compose_config([]))
    study = {"_target_": "fedleak.studies.LabelInferenceStudy", **config["labels"], "partitions": partitions}
    own = {key: config[key] for key in ("data", "model", "seed", "output_dir")}
    federation = rest["federation"] | config["federation"]
    return read(rest | own | {"federation": federation, "study": study | {"key": "labels"}}, overrides)


def read_condense(config: Mapping[str, Any], overrides: Sequence[str] = ()) -> Setup:
    """As `read`, of ``conf/condense.yaml``."""
    study = {"_target_": "fedleak.studies.Condensation", **config["condense"], "key": "condense"}
    own = {key: config[key] for key in ("data", "model", "seed", "device", "output_dir")}
    return read(plain(compose_config([])) | own | {"study": study})


def read_frontier(config: Mapping[str, Any], overrides: Sequence[str] = ()) -> Setup:
    """As `read`, of ``conf/frontier.yaml``: its study; defense and attack are the cells' own."""
    settings = dict(config["frontier"])
    for name in ("defenses", "attackers"):  # Hydra reads the key none as nothing
        settings[name] = {"none" if k is None else str(k): v for k, v in (settings[name] or {}).items()}
    merged = dict(settings)
    for override in parse(overrides):
        name = override.key_or_group.removeprefix("frontier.")
        if name in ("defenses", "attackers") and isinstance(override.value(), dict):
            # A dictionary that is typed says it all; Hydra would add it to the one there.
            typed = ["none" if key is None else str(key) for key in override.value()]  # type: ignore[union-attr]
            settings[name] = {key: merged[name][key] for key in typed}
    rest = plain(compose_config(search_path(overrides)))
    own = {key: value for key, value in config.items() if key != "frontier"}
    study = {"_target_": "fedleak.studies.Frontier", **settings}
    return read(rest | own | {"study": study}, overrides)


def _study(config: Mapping[str, Any], overrides: Sequence[str]) -> Part | None:
    """The config's study with the settings that `quick` asks for, None for a plain run."""
    node = config["study"]
    if node is None:
        if config["quick"]:
            raise UsageError(
                "quick=true: shortens a study, and there is none here; choose one, such as "
                "experiment=label_inference, or leave quick=false"
            )
        return None
    if not isinstance(node, Mapping) or "_target_" not in node:
        raise UsageError(f"study={node}: must be a _target_ with its settings; choose one by experiment=NAME")
    settings = {key: value for key, value in node.items() if key != "quick"}
    small = node.get("quick") or {}
    for key in small:
        if key not in settings:
            close = difflib.get_close_matches(key, list(settings), 1)
            mend = f"did you mean study.quick.{close[0]}?" if close else "name a setting of the study"
            raise UsageError(f"study.quick.{key}: unknown key; {mend}")
    if config["quick"]:
        given = [override.key_or_group for override in parse(overrides)]
        for key, value in small.items():
            if not any(name == f"study.{key}" or name.startswith(f"study.{key}.") for name in given):
                settings[key] = value
    return Part("study", settings)


def named(group: str, names: Sequence[str], overrides: Sequence[str], key: str) -> dict[str, Part]:
    """Choices of a group by name, the user's own from ``--config-dir`` too.

    Args:
        group: such as ``attack/labels``.
        names: of its choices.
        overrides: as typed; where to look is taken from them, and nothing else.
        key: where the names stand in the configuration, for error messages.

    Raises:
        UsageError: there is no such choice.
    """
    known = list(choice_files(overrides)[group])
    for name in names:
        if name not in known:
            raise UsageError(f"{key}={name}: no such choice of {group}; choices: {', '.join(known)}")
    # One composition for all, each choice in a place of its own.
    places = [f"+{group}@named.choice{number}={name}" for number, name in enumerate(names)]
    found = plain(compose_config([*search_path(overrides), *places])).get("named", {})
    return {name: Part(f"{key}.{name}", found[f"choice{number}"]) for number, name in enumerate(names)}
