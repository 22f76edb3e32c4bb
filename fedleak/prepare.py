"""Everything of a run that can be wrong, built before any work, and nothing imported that only the work needs."""

from __future__ import annotations

import logging
from typing import Any

from fedleak.attacks import Attack, Knowledge
from fedleak.attacks.adaptive import require_imitation
from fedleak.errors import UsageError
from fedleak.federation.scenario import Scenario, build_scenario, build_strategy
from fedleak.models.check import check_training, hidden_draws
from fedleak.rounds import NOTHING
from fedleak.setup import Setup
from fedleak.tracking import Tracker

log = logging.getLogger("fedleak")


def prepare(setup: Setup) -> tuple[Scenario, Attack | None, Any]:
    """Build everything that can be wrong, before any work: the scenario, the attack and the engine.

    Raises:
        UsageError: names the key, the value and the mend.
    """
    attack = setup.attack.build()
    if attack is not None:
        if setup.capture == NOTHING:
            raise UsageError("capture: nothing is kept that could be attacked; choose attack=none too, or keep some")
        setup.check_attack(attack)
    scenario = build_scenario(setup)
    smallest = min(setup.federation.batch_size, *(len(part) for part in scenario.parts))
    each = 1 if setup.threat.per_sample_gradients else smallest
    check_training(scenario.model, scenario.image_shape, each, setup.federation.training_mode)
    hidden = hidden_draws(scenario.model, setup.federation.training_mode)
    if attack is not None:
        if hidden is not None:
            log.warning(hidden)
        known = Knowledge(scenario.model, scenario.image_shape, scenario.data.classes, setup.threat)
        attack.check_model(known, setup.seen_in(1))
    if attack is not None and attack.adaptive and setup.threat.defense:
        require_imitation(scenario.defense, dict(scenario.model.named_parameters()), scenario.training)
    build_strategy(scenario)
    setup.tracking.build(Tracker)
    engine = setup.engine.build()
    if not callable(getattr(engine, "run", None)):
        raise UsageError(f"engine._target_={setup.engine.target}: gives no engine; see fedleak list")
    return scenario, attack, engine
