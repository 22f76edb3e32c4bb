"""What the value of each configuration key must be, as far as the value alone can say."""

from __future__ import annotations

import re
from collections.abc import Mapping

from fedleak.config import POSITIVE, YES_NO, Rule, is_number, list_of, one_of, whole
from fedleak.threat import GRANTS, VIEWS


def _whole_or(word: str) -> Rule:
    one = whole(1)
    return Rule(lambda v: v == word or one.test(v), f"{one.mend}, or {word}")


BELOW_ONE = Rule(lambda v: is_number(v) and 0 <= v < 1, "a number from 0, below 1")


def _chosen(least: int) -> Rule:
    one, several = whole(0), list_of(least)
    return Rule(lambda v: v == "all" or one.test(v) or several.test(v), f"all, {one.mend}, or {several.mend}")


RULES: Mapping[str, Rule] = {
    "seed": Rule(lambda v: whole(0).test(v) and v < 2**63, "a whole number from 0, below 2**63"),
    "quick": YES_NO,
    "device": one_of("auto", "cpu", "cuda"),
    "limit": Rule(lambda v: v in ("auto", "off") or v is False, "one of auto, off"),  # YAML reads off as false
    "auxiliary": Rule(lambda v: v is None or (isinstance(v, str) and v != ""), "null or a folder"),
    "output_dir": Rule(lambda v: isinstance(v, str) and v != "", "a folder"),
    "federation.clients": whole(1),
    "federation.rounds": whole(1),
    "federation.fraction": Rule(lambda v: is_number(v) and 0 < v <= 1, "a number above 0, up to 1"),
    "federation.batch_size": whole(1),
    "federation.local_steps": whole(1),
    "federation.lr": POSITIVE,
    "federation.payload": one_of("gradient", "weights"),
    "federation.training_mode": YES_NO,
    "federation.evaluate_every": whole(1),
    "federation.capture_every": whole(1),
    "federation.epochs": whole(1),
    "federation.batches": one_of("fresh", "fixed"),
    "federation.dropout": BELOW_ONE,
    "federation.optimizer": one_of("sgd", "momentum", "nesterov", "adam", "adamw"),
    "federation.momentum": BELOW_ONE,
    "federation.betas": Rule(
        lambda v: isinstance(v, list | tuple) and len(v) == 2 and all(map(BELOW_ONE.test, v)),
        "two numbers from 0, below 1",
    ),
    "federation.eps": POSITIVE,
    "federation.weight_decay": Rule(lambda v: is_number(v) and 0 <= v < float("inf"), "a number from 0"),
    "federation.lr_decay": Rule(lambda v: is_number(v) and 0 < v <= 1, "a number above 0, up to 1"),
    "attack.name": Rule(
        lambda v: isinstance(v, str) and re.fullmatch(r"[\w+-][\w.+-]*", v) is not None, "a plain name"
    ),
    "attack.restarts": whole(1),
    "attack.max_evaluations": whole(1),
    "attack.every": _whole_or("auto"),
    "attack.adaptive": YES_NO,
    "attack.candidates": whole(1),
    "attack.executor": one_of("local", "ray"),
    "attack.clients": _whole_or("all"),
    **{f"threat.{name}": YES_NO for name in GRANTS},
    "threat.view": one_of(*VIEWS),
    "capture.clients": _chosen(0),
    "capture.rounds": _chosen(1),
    "capture.dtype": Rule(
        lambda v: v in (None, "float16", "bfloat16", "float32"), "float16, bfloat16, float32 or null"
    ),
}
"""Keys checked by value; the parts behind a `_target_` check their own."""

GROUPS = ("data", "partition", "model", "defense", "adversary", "engine", "tracking", "strategy")
ROOT = (
    *(*GROUPS, "federation", "threat", "capture", "attack", "study"),
    *("seed", "quick", "device", "limit", "output_dir", "auxiliary", "experiment"),
)
"""All that may stand at the root of the configuration."""
FIXED = ("federation", "threat", "capture")
"""Groups whose keys are all known; a key added to them with ``+`` would do nothing."""
