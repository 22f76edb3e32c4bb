"""The pictures of a run: private images beside what the attacker rebuilt of them, and how that came about."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

from fedleak.evaluation.matching import Match
from fedleak.evaluation.metrics import RECOVERED_MSE
from fedleak.report.common import evenly, many, small

MOST_ROUNDS = 8
MOST_IMAGES = 8
MOST_FILMS = 8
MOST_BYTES = 1_000_000

INK, FAINT, FRAME, LEAK = "#1b1f27", "#566070", "#c9ced6", "#c03a06"
# Everything is placed in inches, on one axes as large as the figure.
SIDE, INNER, GAP, LEFT, MARGIN, LINE = 0.78, 0.05, 0.24, 1.38, 0.22, 0.17


def reconstructions_png(
    path: Path, matches: Sequence[Match], *, title: str = "What the server rebuilt", most_bytes: int = MOST_BYTES
) -> None:
    """Draw true images beside rebuilt ones, with labels and PSNR, round by round.

    Of many rounds, at most `MOST_ROUNDS` evenly chosen ones are shown; of many images in a round, the first
    `MOST_IMAGES` by client and place in the batch, never the best. What was left out is said in the picture.

    Args:
        path: the PNG file to write.
        matches: from `fedleak.evaluation.matching.match`, of any number of observations, grey or colour, with or
            without truth; none gives a picture that says so.
        title: the heading.
        most_bytes: the resolution is lowered until the file is no larger than this.
    """
    _save(path, _figure(sorted(matches, key=lambda m: (m.round, m.client, m.image)), title), most_bytes)


def evolution_png(
    path: Path, matches: Sequence[Match], *, title: str = "How the images came about", most_bytes: int = MOST_BYTES
) -> None:
    """Draw some images from the attack's start to what it returned, with the private image beside them.

    Of many images with frames, `MOST_FILMS` evenly chosen ones are shown, in the order of rounds and clients.

    Args:
        path: the PNG file to write.
        matches: as for `reconstructions_png`; those without frames are left out.
        title: the heading.
        most_bytes: the resolution is lowered until the file is no larger than this.
    """
    filmed = sorted((m for m in matches if m.frames), key=lambda m: (m.round, m.client, m.image))
    _save(path, _strips(filmed, title), most_bytes)


def _save(path: Path, figure: Figure, most_bytes: int) -> None:
    for dpi in (160, 120, 90, 60, 40):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": "fedleak"})
        if buffer.tell() <= most_bytes:
            break
    Path(path).write_bytes(buffer.getvalue())


def _figure(matches: Sequence[Match], title: str) -> Figure:
    rounds = sorted({m.round for m in matches})
    shown = [rounds[i] for i in evenly(len(rounds), MOST_ROUNDS)]
    rows = [[m for m in matches if m.round == number] for number in shown]
    pairs = any(m.true is not None for m in matches)
    columns = max((min(len(row), MOST_IMAGES) for row in rows), default=0)
    cell = 2 * SIDE + INNER if pairs else SIDE
    lines = 2 if any(m.mse is not None for m in matches) else 1
    row_height = SIDE + lines * LINE + 0.16
    notes = _notes(matches, rounds, shown, max(map(len, rows), default=0))

    width = max(LEFT + columns * (cell + GAP) - GAP + MARGIN, 5.6)
    top = 0.92 if pairs else 0.80 if rows else 0.60
    height = top + len(rows) * row_height + 0.2 * len(notes) + 0.14
    figure, axes = _sheet(width, height, title, _headline(matches))
    y = top
    for number, row in zip(shown, rows, strict=True):
        axes.text(MARGIN, y + SIDE / 2 - 0.09, f"round {number}", size=9.5, weight="bold", color=INK, va="center")
        axes.text(MARGIN, y + SIDE / 2 + 0.10, _tally(row), size=8, color=FAINT, va="center")
        for column, m in enumerate(row[:MOST_IMAGES]):
            x = LEFT + column * (cell + GAP)
            if pairs:
                _image(axes, m.true, x, y, FRAME, "no truth")
                if number == shown[0]:
                    axes.text(x + SIDE / 2, y - 0.05, "true", size=7, color=FAINT, ha="center", va="bottom")
                    axes.text(
                        x + 1.5 * SIDE + INNER, y - 0.05, "rebuilt", size=7, color=FAINT, ha="center", va="bottom"
                    )
            _image(axes, m.rebuilt, x + cell - SIDE, y, LEAK if m.recovered else FRAME, "not rebuilt")
            _words(axes, m, x + cell / 2, y + SIDE)
        y += row_height
    for note in notes:
        axes.text(MARGIN, y + 0.06, note, size=8, color=FAINT, va="center")
        y += 0.2
    return figure


def _strips(filmed: Sequence[Match], title: str) -> Figure:
    """A row an image: the private one where it is known, then frame after frame."""
    shown = [filmed[i] for i in evenly(len(filmed), MOST_FILMS)]
    pairs = any(m.true is not None for m in shown)
    first = LEFT + (SIDE + GAP if pairs else 0)
    columns = max((len(m.frames) for m in shown), default=0)
    step, row_height, top = SIDE + 2 * INNER, SIDE + 2 * LINE + 0.16, 0.92
    width = max(first + columns * step + MARGIN, 5.6)
    said = "Frame by frame the best images so far, the returned one last; framed, ✓: recovered."
    if len(shown) < len(filmed):
        said += f" {len(shown)} of {len(filmed)} images, evenly chosen."
    figure, axes = _sheet(width, top + len(shown) * row_height + 0.1, title, said)
    faint: dict[str, Any] = {"size": 7, "color": FAINT, "ha": "center"}
    for row, m in enumerate(shown):
        y = top + row * row_height
        axes.text(MARGIN, y + SIDE / 2 - 0.09, f"round {m.round}", size=9.5, weight="bold", color=INK, va="center")
        axes.text(MARGIN, y + SIDE / 2 + 0.10, f"client {m.client}, image {m.image}", size=8, color=FAINT, va="center")
        if pairs:
            _image(axes, m.true, LEFT, y, FRAME, "no truth")
            axes.text(LEFT + SIDE / 2, y + SIDE + 0.11, "true", va="center", **faint)
        for column, frame in enumerate(m.frames):
            x = first + column * step
            found = frame.mse is not None and frame.mse < RECOVERED_MSE
            _image(axes, frame.image, x, y, LEAK if found else FRAME, "")
            spent = "start" if column == 0 else f"{frame.evaluations} evaluations"
            axes.text(x + SIDE / 2, y + SIDE + 0.11, spent, va="center", **faint)
            if frame.mse is not None:
                error = f"{'✓ ' if found else ''}MSE {small(frame.mse)}"
                words = faint | ({"color": LEAK, "weight": "bold"} if found else {})
                axes.text(x + SIDE / 2, y + SIDE + 0.08 + LINE, error, va="center", **words)
    return figure


def _sheet(width: float, height: float, title: str, said: str) -> tuple[Figure, Axes]:
    """An empty figure of so many inches with its heading, and the axes on which everything is placed."""
    figure = Figure(figsize=(width, height), facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set_axis_off()
    axes.set(xlim=(0, width), ylim=(height, 0), aspect="auto")
    axes.autoscale(False)
    axes.text(MARGIN, 0.30, title, size=13, weight="bold", color=INK, va="center")
    axes.text(MARGIN, 0.54, said, size=8.5, color=FAINT, va="center")
    return figure, axes


def _image(axes: Axes, image: Tensor | None, x: float, y: float, frame: str, missing: str) -> None:
    if image is None:
        axes.text(x + SIDE / 2, y + SIDE / 2, missing, size=6.5, color=FAINT, ha="center", va="center", style="italic")
    else:
        values = pixels(image)
        height, width = (SIDE * n / max(values.shape[:2]) for n in values.shape[:2])
        left, top = x + (SIDE - width) / 2, y + (SIDE - height) / 2
        extent = (left, left + width, top + height, top)
        axes.imshow(values, extent=extent, interpolation="nearest", aspect="auto")
    linewidth = 2.2 if frame == LEAK else 0.6
    axes.add_patch(Rectangle((x, y), SIDE, SIDE, fill=False, edgecolor=frame, linewidth=linewidth, clip_on=False))


def _words(axes: Axes, m: Match, x: float, y: float) -> None:
    """Under a pair: true → inferred label, then how close the image came."""
    if m.label_true is not None:
        label = f"{m.label_true} → {'?' if m.label_inferred is None else m.label_inferred}"
        label += "" if m.label_true == m.label_inferred else " ✗"
        color = INK if m.label_true == m.label_inferred else FAINT
    else:
        label, color = "" if m.label_inferred is None else f"label {m.label_inferred}", INK
    axes.text(x, y + 0.12, label, size=9, color=color, ha="center", va="center")
    if m.mse is not None and m.psnr is not None:
        closeness = f"{m.psnr:.0f} dB · MSE {small(m.mse)}" if math.isfinite(m.psnr) else f"MSE {small(m.mse)}"
        if m.recovered:
            closeness = f"✓ {closeness}"
        axes.text(
            x,
            y + 0.12 + LINE,
            closeness,
            size=7.2,
            color=LEAK if m.recovered else FAINT,
            weight="bold" if m.recovered else "normal",
            ha="center",
            va="center",
        )


def _headline(matches: Sequence[Match]) -> str:
    judged = [m for m in matches if m.recovered is not None]
    if not matches:
        return "Nothing was rebuilt: there were no updates to attack, or every attack failed."
    if not judged:
        return f"{many(len(matches), 'image')}, not judged: the private ones are not at hand to compare with."
    recovered = sum(bool(m.recovered) for m in judged)
    legend = f"(framed, ✓: mean squared error below {RECOVERED_MSE:g})"
    return f"{recovered:,} of {many(len(judged), 'private image')} recovered {legend}"


def _tally(row: Sequence[Match]) -> str:
    judged = [m for m in row if m.recovered is not None]
    if not judged:
        return many(len(row), "image")
    return f"{sum(bool(m.recovered) for m in judged)} / {len(judged)} recovered"


def _notes(matches: Sequence[Match], rounds: list[int], shown: list[int], largest: int) -> list[str]:
    notes = []
    if any(m.label_true is not None for m in matches):
        notes.append("Under each pair: true → inferred label, peak signal-to-noise ratio, mean squared error.")
    if len(rounds) > len(shown):
        notes.append(f"{len(shown)} of the {len(rounds)} attacked rounds, evenly chosen.")
    if largest > MOST_IMAGES:
        notes.append(f"Of each round the first {MOST_IMAGES} images by client and place in the batch, not the best.")
    return notes


def pixels(image: Tensor) -> np.ndarray:
    """An image ``[C, H, W]`` in [0, 1] as ``[H, W, 3]`` bytes: grey (C = 1) or colour; what is not finite is black.

    Of images with neither 1 nor 3 channels, the mean over the channels is shown.
    """
    values = np.nan_to_num(image.detach().cpu().float().numpy(), nan=0.0, posinf=0.0, neginf=0.0)
    if values.shape[0] != 3:
        values = np.repeat(values.mean(axis=0, keepdims=True), 3, axis=0)
    return (values.clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)
