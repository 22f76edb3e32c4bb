"""`audit.json` and `audit.html`: what was found, for programs and for people who are no researchers."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from fedleak import __version__, files
from fedleak.audit.findings import (
    EXPOSED,
    INCONCLUSIVE,
    MEANING,
    NOT_ATTACKABLE,
    NOT_SHOWN,
    PARTLY,
    Finding,
    as_json,
    overall,
)
from fedleak.audit.lattice import reach_of
from fedleak.report.common import many, percent, small
from fedleak.report.pictures import pixels

FORMAT = "audit-1"
EXIT_CODES: Mapping[str, int] = {NOT_SHOWN: 0, NOT_ATTACKABLE: 0, EXPOSED: 3, PARTLY: 4, INCONCLUSIVE: 5}
"""What ``fedleak audit`` returns for each overall verdict, so that CI can tell; 1 and 2 are errors, as everywhere."""


@dataclass(frozen=True)
class Audit:
    """All that a report tells.

    Attributes:
        name: what was audited.
        findings: an update each, by round and node.
        command: as typed.
        facts: about the run, in order.
    """

    name: str
    findings: Sequence[Finding]
    command: str
    facts: Mapping[str, str]

    @property
    def verdict(self) -> str:
        """The worst update's."""
        return overall(self.findings)


def write(audit: Audit, folder: Path) -> None:
    """Write `audit.json` and `audit.html` into a folder."""
    data = {
        "format": FORMAT,
        "fedleak": __version__,
        "audited": audit.name,
        "command": audit.command,
        "verdict": audit.verdict,
        "meaning": MEANING[audit.verdict],
        "facts": dict(audit.facts),
        "updates": [as_json(finding) for finding in audit.findings],
        "in_the_clear": in_the_clear(audit.findings),
        "advice": advice(audit.findings),
    }
    text = json.dumps(_finite(data), indent=2, allow_nan=False)
    files.write_atomically(folder / "audit.json", text.encode())
    files.write_atomically(folder / "audit.html", render(audit).encode())


def render(audit: Audit) -> str:
    """The page."""
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    verdicts = [finding.verdict for finding in audit.findings]
    return environment.get_template("page.html.jinja").render(
        name=audit.name,
        version=__version__,
        verdict=audit.verdict,
        meaning=MEANING[audit.verdict],
        headline=_headline(audit),
        tally=[(verdict, verdicts.count(verdict)) for verdict in MEANING if verdict in verdicts],
        meanings=MEANING,
        facts=audit.facts,
        command=audit.command,
        updates=[_card(finding) for finding in audit.findings],
        clear=in_the_clear(audit.findings),
        advice=advice(audit.findings),
    )


def _headline(audit: Audit) -> str:
    """The finding in one sentence."""
    worst = next(finding for finding in audit.findings if finding.verdict == audit.verdict)
    where = f"In round {worst.preflight.exchange.round}, of node {worst.preflight.exchange.node}"
    return f"{where}: {worst.words}."


def in_the_clear(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """What replies told beside their arrays, and whether it told the nodes apart; secure aggregation hides none."""
    seen: dict[str, list[Any]] = {}
    for finding in findings:
        for record, values in finding.preflight.exchange.clear.items():
            for key, value in values.items():
                if not isinstance(value, dict):
                    seen.setdefault(f"{record}.{key}", []).append(value)
    return [
        {"name": name, "updates": len(values), "example": values[0], "differs": len({str(v) for v in values}) > 1}
        for name, values in sorted(seen.items())
    ]


def advice(findings: Sequence[Finding]) -> list[str]:
    """What would help, and what it costs."""
    open_ = [f for f in findings if f.verdict in (EXPOSED, PARTLY)]
    said = []
    if open_:
        said.append(
            "Secure aggregation (SecAgg+ in Flower's legacy workflows) shows the server only sums of several clients: "
            "it costs three more messages a client and round, and the strategy must do with sums."
        )
        noise = _noise(open_)
        if noise is not None:
            said.append(noise)
        said.append(
            "More samples an update mix more people's data, and several local steps blur the order; neither protects "
            "by itself: what leaks then is the share of each class."
        )
        said.append("Differentially private training (opacus) bounds what any attack can learn; it costs accuracy.")
    if any(f.verdict == INCONCLUSIVE for f in findings):
        said.append(
            "Where assumptions were violated: state how clients really train, --client "
            "optimizer=…,lr=…,momentum=…,batch_size=…,epochs=…, or name their function, --client package.module:train."
        )
    if any(f.preflight.exchange.clear for f in findings):
        said.append(
            "Whatever a client reports beside its model travels in the clear: send only what the strategy needs."
        )
    return said


def _noise(findings: Sequence[Finding]) -> str | None:
    """How much Gaussian noise would blur the class counts by one sample, beside the update's own size."""
    for finding in findings:
        observation = finding.preflight.observation
        if observation is None or not finding.counts:
            continue
        reach = reach_of(observation.training)
        if reach is None or observation.training.payload == "gradient":
            continue
        std = reach / sum(finding.counts)
        change = [(observation.update[n] - v).double() for n, v in observation.parameters.items()]
        size = math.sqrt(sum(float(c.square().sum()) for c in change))
        elements = sum(c.numel() for c in change)
        times = std * math.sqrt(elements) / size if size else math.inf
        return (
            f"Gaussian noise of standard deviation {std:.2g} on every element would blur each class count by about one "
            f"sample; all in all it is {times:.2g} times as large as such an update, which training has to average out."
        )
    return None


def _card(finding: Finding) -> dict[str, Any]:
    """An update for the page."""
    exchange, preflight = finding.preflight.exchange, finding.preflight
    total = sum(finding.counts)
    most = max([high for _, high in finding.interval], default=1) or 1
    return {
        "round": exchange.round,
        "node": exchange.node,
        "verdict": finding.verdict,
        "words": finding.words,
        "preflight": preflight.verdict,
        "checks": preflight.checks,
        "assumed": preflight.assumed,
        "even": 100 * total / max(1, len(finding.counts)) / most,
        "bars": [
            {"label": c, "count": n, "low": low, "high": high, "width": 100 * n / most}
            for c, (n, (low, high)) in enumerate(zip(finding.counts, finding.interval, strict=True))
        ],
        "expected": percent(finding.accuracy),
        "guess": percent(finding.guess),
        "true": None if finding.label_accuracy is None else percent(finding.label_accuracy),
        "images": [
            {
                "data": _png(image),
                "expected": small(finding.image_error[i]) if i < len(finding.image_error) else "–",
                "true": small(finding.image_mse[i]) if i < len(finding.image_mse) else None,
            }
            for i, image in enumerate([] if finding.images is None else finding.images)
        ],
        "samples": many(total, "sample"),
        "leaks": _leaks(finding),
        "notes": finding.notes,
    }


def _leaks(finding: Finding) -> dict[str, Any] | None:
    """What each tensor gives away, for the page."""
    found = finding.leaks
    if found is None:
        return None
    limited = found.image_bits is not None
    return {
        "rows": [
            {
                "name": row.name,
                "elements": f"{row.elements:,}",
                "share": percent(row.share),
                "bits": f"{row.bits_at_most:,.0f}",
                "tells": row.tells,
                "image_bits": "–" if row.image_bits is None else f"{row.image_bits:,.0f}",
                "error": "–" if row.expected_mse is None else small(row.expected_mse),
            }
            for row in found.tensors
        ],
        "limited": limited,
        "where": found.where,
        "bits": f"{found.image_bits:,.0f}" if found.image_bits is not None else "–",
        "error": small(sum(found.expected_mse) / len(found.expected_mse)) if found.expected_mse else "–",
        "guess": small(found.prior_mse) if found.prior_mse is not None else "–",
        "coordinates": found.coordinates,
    }


def _png(image: Tensor) -> Markup:
    """An image as a data URI."""
    file = io.BytesIO()
    Image.fromarray((pixels(image) * 255).round().astype("uint8")).save(file, "PNG")
    return Markup("data:image/png;base64," + base64.b64encode(file.getvalue()).decode())


def _finite(value: Any) -> Any:
    """JSON without NaN and inf, which it has no words for."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    return [_finite(each) for each in value] if isinstance(value, list | tuple) else value
