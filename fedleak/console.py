"""What a person sees in the terminal: a headline, progress bars on stderr, tables on stdout."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import rich.console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column, Table

if TYPE_CHECKING:
    import pandas as pd

    from fedleak.attacks.results import Progress as AttackProgress
    from fedleak.federation.server import RoundRow


class Console:
    """Progress to stderr, results to stdout; plain text when neither is a terminal.

    Args:
        quiet: show nothing but results.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        self.out = rich.console.Console(highlight=False, soft_wrap=True)
        self.err = rich.console.Console(stderr=True, highlight=False, soft_wrap=True, quiet=quiet)

    def headline(self, text: str) -> None:
        """One line that says what starts now."""
        self.err.print(text, style="bold", markup=False)

    @contextmanager
    def federation(self, rounds: int) -> Iterator[Callable[[RoundRow], None]]:
        """A bar over the rounds; yields the callback for each round's row."""
        with self.steps("federation", rounds) as advance:
            accuracy = ""

            def on_row(row: RoundRow) -> None:
                nonlocal accuracy
                if row.test_accuracy is not None:
                    accuracy = f"test accuracy {row.test_accuracy:.3f} · "
                advance(1, f"{accuracy}loss {row.train_loss:.3f} · {row.clients} clients")

            yield on_row

    @contextmanager
    def attack(self, name: str, observations: int) -> Iterator[Callable[[AttackProgress], None]]:
        """A bar over an attack's problems; yields the callback for its state."""
        with self._bar() as bar:
            task = bar.add_task(f"attack {name}", total=observations, note="inferring labels")

            def on_progress(state: AttackProgress) -> None:
                objective = "" if math.isnan(state.median_objective) else f" · median {state.median_objective:.1e}"
                note = (
                    f"{state.converged} converged · {state.diverged} diverged{objective}"
                    f" · {state.evaluations_per_second:,.0f}/s"
                )
                bar.update(task, total=state.problems, completed=state.done, note=note)

            yield on_progress
            bar.update(task, completed=bar.tasks[task].total)

    @contextmanager
    def cells(self, name: str, total: int) -> Iterator[Callable[[str, str, int, int, float], None]]:
        """A bar over a study's cells; yields the callback for each."""
        with self.steps(name, total) as advance:
            yield lambda method, partition, stage, batch_size, accuracy: advance(
                1, f"{method}, {partition}, batch size {batch_size}, {stage} steps: {accuracy:.1%}"
            )

    @contextmanager
    def steps(self, name: str, total: int) -> Iterator[Callable[[int, str], None]]:
        """A bar over equal steps, of which there may be fewer; yields the callback for how many more are done."""
        with self._bar() as bar:
            task = bar.add_task(name, total=total, note="")
            yield lambda done, note: bar.update(task, advance=done, note=note)
            bar.update(task, total=bar.tasks[task].completed)

    def table(self, table: pd.DataFrame) -> None:
        """Print a data frame; shares as percentages, missing values as a dash."""
        shown = Table(box=None, pad_edge=False, header_style="bold")
        for column in table.columns:
            shown.add_column(str(column).replace("_", " "), justify="right")
        for _, row in table.iterrows():
            shown.add_row(*(_cell(column, row[column]) for column in table.columns))
        self.out.print(shown)

    def say(self, text: str) -> None:
        """A line of result."""
        self.out.print(text, markup=False)

    def _bar(self) -> Progress:
        return Progress(
            TextColumn("{task.description}", table_column=Column(no_wrap=True, min_width=10)),
            BarColumn(bar_width=12, table_column=Column(min_width=12)),
            MofNCompleteColumn(table_column=Column(no_wrap=True, min_width=7)),
            TimeRemainingColumn(elapsed_when_finished=True, table_column=Column(no_wrap=True, min_width=7)),
            # Where the terminal is narrow, the note is what gives way.
            TextColumn(
                "{task.fields[note]}", style="dim", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1)
            ),
            console=self.err,
            expand=True,
            disable=self.err.quiet,
        )


def _cell(column: str, value: object) -> str:
    if value is None or value == "" or (isinstance(value, float) and math.isnan(value)):
        return "–"
    if "accuracy" in str(column) and isinstance(value, float):
        return f"{value:.1%}"
    return str(value)
