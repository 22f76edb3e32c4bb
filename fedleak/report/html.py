"""The report: one HTML file, opened from disk, that says and shows what leaked, when, and to whom."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fedleak import __version__, files
from fedleak.errors import UsageError
from fedleak.evaluation.matching import Match
from fedleak.evaluation.metrics import RECOVERED_MSE
from fedleak.evaluation.tables import round_table, summarise
from fedleak.report.bundle import vega
from fedleak.report.charts import Chart, effort_charts, federation_charts, leak_charts
from fedleak.report.common import evenly, many, percent, psnr, small
from fedleak.report.pictures import pixels
from fedleak.report.run_data import RunData, distinct_names, read_run
from fedleak.report.sprites import pack

MOST_GALLERY = 10_000
MOST_TABLE_ROWS = 300
MOST_FILMS = 1000
SPRITE_BYTES = 11_000_000  # a third more in base64; with the charts and tables the file stays below 20 MB
FILM_BYTES = 2_500_000  # of these, for how the images came about

THREAT_WORDS = {
    "batch_size": "how many samples a client trains on in a step",
    "hyperparameters": "the clients' learning rate and number of local steps",
    "buffers": "the BatchNorm buffers that clients return",
    "auxiliary_data": "labelled images of the same kind that are not the clients' own",
    "labels": "the labels of each private batch",
    "per_sample_gradients": "the gradient of every single sample",
}


def write_report(run_dirs: Sequence[Path], output: Path) -> Path:
    """Write the report of one run, or of several side by side.

    The file needs no network and no other file. What a run directory lacks, or what is damaged in it, is said in the
    report; the rest is shown.

    Args:
        run_dirs: run directories, or folders of attacks on them.
        output: the HTML file.

    Returns:
        `output`.

    Raises:
        UsageError: no run directory, or one that is not there or holds nothing of a run.
    """
    if not run_dirs:
        raise UsageError("fedleak report: names no run directory; name one or more")
    output = Path(output)
    if output.is_dir():
        raise UsageError(f"--output {output}: is a folder; name a file, such as {output / 'report.html'}")
    folders = [Path(folder) for folder in run_dirs]
    runs = [read_run(folder, name) for folder, name in zip(folders, distinct_names(folders), strict=True)]
    files.write_atomically(output, render(runs).encode())
    return output


def render(runs: Sequence[RunData]) -> str:
    """The whole page."""
    sections = {
        "federation": federation_charts(runs),
        "leak": leak_charts(runs),
        "effort": effort_charts(runs),
    }
    if len(runs) == 1:
        sections = {name: [chart.without_run() for chart in charts] for name, charts in sections.items()}
    pictures, sheets = gallery(runs)
    charts = {chart.key: chart.spec for charts in sections.values() for chart in charts}
    here = Path(__file__).parent
    environment = Environment(
        loader=FileSystemLoader(here), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.jinja").render(
        title="What leaked: " + (runs[0].name if len(runs) == 1 else f"{len(runs)} runs side by side"),
        version=__version__,
        threshold=RECOVERED_MSE,
        runs=[_card(run) for run in runs],
        comparison=compare(runs) if len(runs) > 1 else None,
        sections={name: [_panel(chart) for chart in charts] for name, charts in sections.items()},
        missing=_missing(sections),
        gallery=pictures,
        sheets=[base64.b64encode(sheet).decode() for sheet in sheets],
        charts_json=embed(charts),
        gallery_json=embed(pictures["data"]),
        style=Markup((here / "report.css").read_text(encoding="utf-8")),
        script=Markup((here / "report.js").read_text(encoding="utf-8")),
        vega=vega() if charts else Markup(""),
    )


def embed(value: Any) -> Markup:
    """JSON that is safe inside a script element, whatever strings it holds; NaN and inf become null."""
    text = json.dumps(_finite(value), separators=(",", ":"), allow_nan=False, ensure_ascii=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)


def compare(runs: Sequence[RunData]) -> dict[str, Any]:
    """Several runs in one table: the settings that differ first, then what came out; and what they share."""
    settings = [run.settings() for run in runs]
    keys = list(dict.fromkeys(key for setting in settings for key in setting))
    differing = [key for key in keys if len({setting.get(key) for setting in settings}) > 1]
    # What lies deep inside a part that is another one altogether would bury the differences that count.
    inside = [key for key in differing if key.count(".") > 1 and any(key.startswith(f"{part}.") for part in differing)]
    limits = any(len(run.limits) for run in runs)
    outcomes = [_outcomes(run, limits=limits) for run in runs]

    def rows(chosen: Sequence[str]) -> list[tuple[str, list[str]]]:
        return [(key, [setting.get(key, "–") or "–" for setting in settings]) for key in chosen]

    return {
        "names": [run.name for run in runs],
        "differing": rows([key for key in differing if key not in inside]),
        "inside": rows(inside),
        "outcomes": [(key, [outcome[key] for outcome in outcomes]) for key in outcomes[0]],
        "shared": [(key, settings[0][key]) for key in keys if key not in differing],
    }


def gallery(runs: Sequence[RunData]) -> tuple[dict[str, Any], list[bytes]]:
    """The pictures: what the page's script needs, and the sheets of thumbnails."""
    every: list[tuple[int, Match]] = [
        (i, m) for i, run in enumerate(runs) for m in run.matches if m.true is not None or m.rebuilt is not None
    ]
    shown = [every[i] for i in evenly(len(every), MOST_GALLERY)]
    images = [image for _, m in shown for image in (m.true, m.rebuilt) if image is not None]
    limits = any(m.limit_mse is not None or m.expected_mse is not None for _, m in shown)
    kept = [i for i, (_, m) in enumerate(shown) if m.frames]
    filmed = {kept[i] for i in evenly(len(kept), MOST_FILMS)}
    steps = [frame.image for i in sorted(filmed) for frame in shown[i][1].frames[:-1]]
    films = pack([pixels(image) for image in steps], most_bytes=FILM_BYTES)
    sprites = pack([pixels(image) for image in images], most_bytes=SPRITE_BYTES - (FILM_BYTES if steps else 0))
    place, step = iter(range(len(images))), iter(range(len(images), len(images) + len(steps)))
    items = []
    for i, (run, m) in enumerate(shown):
        true = next(place) if m.true is not None else -1
        rebuilt = next(place) if m.rebuilt is not None else -1
        recovered = None if m.recovered is None else int(m.recovered)
        labels = (m.label_true, m.label_inferred)
        # The last frame is the rebuilt image itself.
        frames = m.frames if i in filmed else ()
        at = [*(next(step) for _ in frames[1:]), rebuilt]
        film = [(f.evaluations, _significant(f.mse), where) for f, where in zip(frames, at, strict=False)]
        about = (_significant(m.limit_mse), _significant(m.expected_mse)) if limits else ()
        items.append(
            (run, m.round, m.client, m.image, *labels, _significant(m.mse), recovered, true, rebuilt, film, *about)
        )
    sheets = [*sprites.sheets, *films.sheets]
    data = {
        "runs": [run.name for run in runs],
        "items": items,
        "places": sprites.places + [(s + len(sprites.sheets), *where) for s, *where in films.places],
        "sheets": sprites.sizes + films.sizes,
        "threshold": RECOVERED_MSE,
        "rebuilt": any(m.rebuilt is not None for _, m in shown),
    }
    largest = max((max(image.shape[-2:]) for image in images), default=0)
    notes = []
    if len(shown) < len(every):
        notes.append(f"{len(shown):,} of {len(every):,} images, evenly chosen.")
    if largest > sprites.side:
        notes.append(f"Thumbnails are scaled down from {largest} to {sprites.side} pixels.")
    if len(filmed) < len(kept):
        notes.append(f"How they came about is shown of {len(filmed):,} of {len(kept):,} images, evenly chosen.")
    if images and not sprites.lossless:
        notes.append("Thumbnails are compressed with loss to keep the file small; the scores are of the originals.")
    return {
        "data": data,
        "count": len(shown),
        "judged": any(m.recovered is not None for _, m in shown),
        "filmed": len(filmed),
        "rebuilt": data["rebuilt"],
        "limits": limits,
        "notes": notes,
        "rounds": sorted({m.round for _, m in shown}),
        "clients": sorted({m.client for _, m in shown}),
    }, sheets


def _card(run: RunData) -> dict[str, Any]:
    """What the page says about one run."""
    summary = summarise(run.attacks, run.leakage, run.rounds)
    table = round_table(run.rounds, run.attacks, run.leakage) if len(run.rounds) else None
    return {
        "name": run.name,
        "verdict": verdict(run, summary),
        "tiles": list(_outcomes(run, limits=len(run.limits) > 0).items()),
        "facts": _facts(run),
        "always": ["the model and the parameters it sends out each round", "every client's update"],
        "granted": _threat(run, "granted"),
        "withheld": _threat(run, "withheld"),
        "kind": str(_mapping(run.summary.get("threat")).get("kind") or ""),
        "command": str(run.summary.get("command") or ""),
        "settings": list(run.settings().items()),
        "problems": run.problems,
        "rounds": None
        if table is None
        else [
            [int(number), percent(accuracy), percent(labels), *(word or "–" for word in words)]
            for number, accuracy, labels, *words in table.itertuples(index=False)
        ],
        "limits": len(run.limits) > 0,
        "attackers": _attackers(run),
    }


def _attackers(run: RunData) -> list[list[str]]:
    """Rows of the naive and the adaptive attacker, where a run has both."""
    rows = run.summary.get("attackers")
    known = [_mapping(row) for row in rows] if isinstance(rows, list) else []
    return [
        [
            str(row.get("attacker")),
            f"{row.get('recovered')} of {row.get('images')}",
            percent(row.get("label_accuracy")),
            percent(row.get("whole_batch_rate")),
            "–" if row.get("median_mse") is None else small(float(row["median_mse"])),
            "–" if row.get("median_psnr") is None else f"{float(row['median_psnr']):.1f} dB",
        ]
        for row in known
    ]


def verdict(run: RunData, summary: Mapping[str, Any]) -> str:
    """The run in two or three sentences for someone who knows nothing of it."""
    known = run.leakage.dropna(subset=["recovered"])
    hit = known[known["recovered"] == 1]
    said = []
    if run.labels_only:
        said.append(f"The attack went for the labels behind {len(run.attacks):,} updates, and tried no image.")
    elif len(known) == 0:
        rebuilt = sum(m.rebuilt is not None for m in run.matches)
        said.append(
            f"The server rebuilt {rebuilt} images; without the private ones beside them nobody can say how close "
            "they came."
            if rebuilt
            else "No attack was made."
            if run.summary.get("attack") == "none"
            else "No attack was made, or its results are missing."
        )
    elif len(hit) == 0:
        said.append(f"The server recovered none of the {len(known):,} private images it went for.")
    else:
        clients = hit["client"].nunique()
        when = f"first in round {hit['round'].min()}"
        if hit["round"].nunique() > 1:
            when += f", last in round {hit['round'].max()}"
        said.append(
            f"The server recovered {len(hit):,} of the {len(known):,} private images it went for "
            f"({percent(len(hit) / len(known))}), {when}; they belong to {clients} of "
            f"{many(known['client'].nunique(), 'attacked client')}."
        )
    if len(run.limits):
        enough, of = int((run.limits["limit_mse"] < RECOVERED_MSE).sum()), many(len(run.limits), "image")
        said.append(f"By an estimate made for {of}, the updates tell enough to recover {enough:,} of them.")
    said += _coverage(run)
    if summary["label_accuracy"] is not None:
        said.append(f"It inferred {percent(summary['label_accuracy'])} of the labels.")
    if summary["final_test_accuracy"] is not None:
        said.append(
            f"The shared model ended at {percent(summary['final_test_accuracy'])} test accuracy after "
            f"{many(summary['rounds'], 'round')}."
        )
    return " ".join(said)


def _coverage(run: RunData) -> list[str]:
    """A sentence on what was attacked, where that is not everything."""
    sent = run.rounds["clients"].sum()
    if not 0 < len(run.attacks) < sent:
        return []
    clients, rounds = run.attacks["client"].nunique(), run.attacks["round"].nunique()
    members = run.settings().get("federation.clients", "")
    of = f" of {members}" if members.isdigit() and int(members) >= clients else ""
    return [
        f"It attacked {len(run.attacks):,} of the {sent:,.0f} updates that clients sent, from {clients}{of} "
        f"client{'s' * (of != '' or clients != 1)} in {rounds} of {len(run.rounds)} rounds."
    ]


def _outcomes(run: RunData, *, limits: bool) -> dict[str, str]:
    s = summarise(run.attacks, run.leakage, run.rounds)
    errors = run.leakage["mse"].dropna()
    median = float(errors.median()) if len(errors) else None
    return {
        "images recovered": f"{s['recovered']:,} of {s['images']:,}" if s["images"] else "–",
        "labels inferred rightly": percent(s["label_accuracy"]),
        "batches with every label right": percent(s["whole_batch_rate"]),
        "median PSNR": "–" if median is None else "exact" if median == 0 else f"{psnr(median):.1f} dB",
        **({"median error, reached / possible": _beside(run)} if limits else {}),
        "final test accuracy": percent(s["final_test_accuracy"]),
        "attack time": _seconds(s["attack_seconds"]) if s["observations"] else "–",
    }


def _beside(run: RunData) -> str:
    both = run.limits.dropna(subset=["mse"])
    return f"{small(both['mse'].median())} / {small(both['limit_mse'].median())}" if len(both) else "–"


def _facts(run: RunData) -> list[tuple[str, str]]:
    s, settings = run.summary, run.settings()
    federation = _mapping(s.get("federation")) or {
        key.removeprefix("federation."): value for key, value in settings.items() if key.startswith("federation.")
    }
    words = {
        "clients": "clients",
        "rounds": "rounds",
        "fraction": "fraction of clients sampled each round",
        "batch_size": "batch size",
        "local_steps": "local steps",
        "lr": "learning rate",
        "payload": "payload",
    }
    facts = [
        (name, str(s.get(name) or settings.get(name) or "–"))
        for name in ("data", "partition", "model", "attack", "defense")
    ]
    facts += [(word, str(federation[key])) for key, word in words.items() if key in federation]
    facts += [(name, str(s.get(name, settings.get(name, "–")))) for name in ("seed", "device")]
    facts += [(f"images of {count} updates by", how) for how, count in _mapping(s.get("methods")).items()]
    if isinstance(s.get("seconds"), int | float):
        facts.append(("time, all together", _seconds(s["seconds"])))
    versions = _mapping(s.get("versions"))
    if versions:
        facts.append(("versions", ", ".join(f"{name} {version}" for name, version in versions.items())))
    facts.append(("folder", str(run.folder)))
    return facts


def _threat(run: RunData, which: str) -> list[str]:
    names = _mapping(run.summary.get("threat")).get(which)
    if not isinstance(names, list):
        values = _mapping(run.config.get("threat"))
        names = [name for name, value in values.items() if value is (which == "granted")]
    return [THREAT_WORDS.get(str(name), str(name)) for name in names]


def _missing(sections: Mapping[str, list[Chart]]) -> dict[str, str]:
    """Of sections without charts, why."""
    words = {
        "federation": "No table of rounds and no ground truth were found, so there is nothing to plot.",
        "leak": "No attack was judged: there was none, its tables are missing, or the ground truth was.",
        "effort": "No attack was recorded.",
    }
    return {name: words[name] for name, charts in sections.items() if not charts}


def _panel(chart: Chart) -> dict[str, Any]:
    return {
        "key": chart.key,
        "title": chart.title,
        "sentence": chart.sentence,
        "columns": chart.columns,
        "rows": [[_cell(value) for value in row] for row in chart.rows[:MOST_TABLE_ROWS]],
        "more": max(0, len(chart.rows) - MOST_TABLE_ROWS),
    }


def _mapping(value: Any) -> dict[str, Any]:
    return dict(value) if isinstance(value, Mapping) else {}


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return value.item() if hasattr(value, "item") else value


def _significant(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.3g}")


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "–" if value is None else str(value)


def _seconds(value: float) -> str:
    if 0 < value < 0.05:
        return "< 0.1 s"
    if value < 60:
        return f"{value:.1f} s"
    return f"{value / 60:.1f} min" if value < 3600 else f"{value / 3600:.1f} h"
