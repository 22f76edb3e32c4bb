"""Jobs: overrides checked, and run under Hydra, one or a sweep of them, or gone on with."""

from __future__ import annotations

import itertools
import logging
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fedleak.errors import FedleakError, UsageError, printable

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from fedleak.console import Console
    from fedleak.outcome import Outcome
    from fedleak.setup import Setup


def through_hydra(
    command: str, root: str, read: Callable[[dict[str, Any], Sequence[str]], Setup], arguments: Sequence[str]
) -> int:
    """Check every job, then run them under Hydra, which makes the folders, writes ``.hydra/`` and sweeps.

    Args:
        command: as typed behind ``fedleak``.
        root: the root file of the configuration.
        read: makes the setup of a composed config; called, with all its parts built, for all jobs before any runs.
        arguments: Hydra flags and overrides.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig

    from fedleak.config import check_rules, compose_config, conf_dir, expand_sweep, plain, search_path
    from fedleak.rules import RULES

    flags, overrides = split(arguments)
    sweeps = bool({"--multirun", "-m"} & set(flags))
    for one in expand_sweep(overrides) if sweeps else [overrides]:
        config = plain(compose_config(one, root))
        check_rules(config, {"output_dir": RULES["output_dir"]})
        if any(override.startswith("output_dir=") for override in overrides):
            refuse_overwriting(Path(config["output_dir"]))
        if not _shows(flags):
            _refuse(read(config, one), one, Path(config["output_dir"]))

    failures: list[FedleakError] = []

    def guarded(config: DictConfig) -> None:
        # Hydra would print a traceback of its own; one failed job of a sweep must not stop the others either.
        job = HydraConfig.get()
        _speak_again()
        # Hydra keeps its own overrides apart; the federations of a study need the folders of --config-dir too.
        typed = [*job.overrides.task, *search_path(job.overrides.hydra)]
        try:
            _run_job(command, read(plain(config), typed), typed, Path(job.runtime.output_dir))
        except FedleakError as error:
            print(f"fedleak: {one_line(error)}", file=sys.stderr)
            failures.append(error)
            if sweeps:
                (Path(job.runtime.output_dir) / "error.txt").write_text(f"{one_line(error)}\n")

    before = sys.argv
    named = any(override.startswith(("output_dir=", "hydra.run", "hydra.sweep")) for override in overrides)
    own = [] if named or _shows(flags) else _own_folder(Path(config["output_dir"]))
    sys.argv = ["fedleak", *flags, *overrides, *own]
    try:
        hydra.main(config_path=str(conf_dir()), config_name=root, version_base="1.3")(guarded)()
    finally:
        sys.argv = before
    # A launcher may run jobs in other processes, which leave no more behind than what they write.
    swept = Path(own[1].partition("=")[2]) if own else Path(config["output_dir"])
    if not failures and sweeps and any(swept.glob("*/error.txt")):
        return 1
    return _exit_code(failures)


def _run_job(command: str, setup: Setup, overrides: Sequence[str], folder: Path, *, resume: bool = False) -> None:
    from fedleak import pipeline
    from fedleak.console import Console

    console, words = Console(), ["fedleak", command, *overrides]
    if setup.study is None:
        if resume and (folder / "summary.json").exists():
            console.say(f"{folder}: was finished; its tables are written anew")
        show(console, pipeline.run(setup, folder, console, words, resume=resume))
    else:
        from fedleak.studies.base import Job, build_study, run_study

        job = Job(setup, overrides, folder, console, resume=resume)
        console.table(run_study(build_study(setup), job, words))
        console.say(f"results in {folder}: {', '.join(sorted(path.name for path in folder.glob('[!.]*.*')))}")


def go_on(arguments: list[str]) -> int:
    """``fedleak run resume=DIR``: what was begun there, gone on with; its configuration is in its files."""
    trusted = "--trust" in arguments
    flags, overrides = split([word for word in arguments if word != "--trust"])
    if flags:
        raise UsageError(f"{flags[0]}: a run that is gone on with takes no options but --trust; leave it out")
    from fedleak.config import parse
    from fedleak.resume import begun, has_begun
    from fedleak.setup import read

    named = {o.key_or_group: o for o in parse(overrides)}
    folder = Path(str(named["resume"].value()))
    given = [o for o in overrides if not o.startswith(("resume=", "output_dir="))]
    if "output_dir" in named and Path(str(named["output_dir"].value())).absolute() != folder.absolute():
        raise UsageError(f"resume={folder}: output_dir names another folder; leave it out")
    if not has_begun(folder):
        if not given:
            raise UsageError(f"resume={folder}: no run was begun there; give its overrides too, to begin it there")
        there = overrides[[o.startswith("resume=") for o in overrides].index(True)].removeprefix("resume=")
        return through_hydra("run", "config", read, [*given, f"output_dir={there}"])
    failures: list[FedleakError] = []
    jobs = list(begun(folder, given, trusted=trusted))
    for job in jobs:
        (job.folder / "error.txt").unlink(missing_ok=True)
        try:
            _run_job(job.command, job.setup, job.overrides, job.folder, resume=True)
        except FedleakError as error:
            if len(jobs) == 1:
                raise
            print(f"fedleak: {one_line(error)}", file=sys.stderr)
            failures.append(error)
    return _exit_code(failures)


def _refuse(setup: Setup, overrides: Sequence[str], folder: Path) -> None:
    """Raise `UsageError` for what cannot work: every part is built, and the data and the disk are looked at."""
    try:
        _check(setup, overrides, folder)
    except (FedleakError, MemoryError):
        raise
    except Exception as error:  # of a combination that nobody thought of: refused all the same, before any work
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise UsageError(
            f"this configuration cannot be used: {type(error).__name__}: {error} ({Path(where.filename).name}, line "
            f"{where.lineno}); change the last of what you gave, or report it"
        ) from error


def _check(setup: Setup, overrides: Sequence[str], folder: Path) -> None:
    from fedleak.footprint import footprint, refuse_folder
    from fedleak.prepare import prepare

    refuse_folder(folder)
    if setup.study is None:
        refuse_folder(folder, footprint(prepare(setup)[0]).bytes)
        return
    from fedleak.studies.base import Job, build_study

    build_study(setup).check(Job(setup, overrides))


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """(Hydra flags, overrides); ``--config-dir DIR`` becomes the override that means the same everywhere."""
    flags: list[str] = []
    overrides: list[str] = []
    folders: list[str] = []
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        name, _, value = word.partition("=")
        if name in ("--config-dir", "-cd"):
            value = value or (rest.pop(0) if rest else "")
            if not Path(value).is_dir():
                raise UsageError(f"--config-dir={value}: no such folder; name one that holds group folders")
            folders.append(f"file://{Path(value).absolute()}")
        elif name in ("--multirun", "-m", "--resolve", "-r"):
            flags.append(word)
        elif name in ("--cfg", "-c", "--info", "--package", "-p"):
            flags += [word] if value or not rest else [word, rest.pop(0)]
        elif word.startswith("-"):
            raise UsageError(f"{word}: unknown option; see fedleak --help")
        elif "=" not in word and not word.startswith("~"):
            raise UsageError(f"{word}: not an override; write key=value")
        else:
            overrides.append(word)
    if folders:
        from fedleak.config import search_override

        overrides.append(search_override(folders))
    return flags, overrides


def _shows(flags: Sequence[str]) -> bool:
    """Whether the configuration is shown and nothing runs."""
    return any(flag.startswith(("--cfg", "-c", "--info")) for flag in flags)


def _own_folder(first: Path) -> list[str]:
    """Make a folder that no other run has, whoever starts in the same second; the overrides that have Hydra take it."""
    first.parent.mkdir(parents=True, exist_ok=True)
    for number in itertools.count(1):
        folder = first if number == 1 else first.with_name(f"{first.name}-{number}")
        try:
            folder.mkdir()
        except FileExistsError:
            continue
        return [f"hydra.run.dir={folder}", f"hydra.sweep.dir={folder}"]
    raise AssertionError


def refuse_overwriting(folder: Path) -> None:
    for name in ("rounds.csv", "attacks.csv", "labels.csv", "results.csv", "captures", "multirun.yaml"):
        if (folder / name).exists():
            raise UsageError(f"output_dir={folder}: holds the results of an earlier run; name another, or remove it")


def _speak_again() -> None:
    """Hydra's switched-off logging silences every logger that was there before; ours says which clients fail."""
    for name, logger in logging.root.manager.loggerDict.items():
        if isinstance(logger, logging.Logger) and name.split(".")[0] == "fedleak":
            logger.disabled = False
    if not logging.root.handlers:
        logging.basicConfig(format="%(message)s", level=logging.WARNING)


def _exit_code(failures: Sequence[FedleakError]) -> int:
    return 0 if not failures else 2 if all(isinstance(f, UsageError) for f in failures) else 1


def show(console: Console, outcome: Outcome) -> None:
    """The table, where the results are, and the page to open."""
    from fedleak.report.html import write_report

    page = outcome.report or write_report([outcome.folder], outcome.folder / "report.html")
    console.table(outcome.table)
    for row in outcome.summary.get("attackers", []):
        labels = "–" if row["label_accuracy"] is None else f"{row['label_accuracy']:.0%}"
        console.say(
            f"{row['attacker']}: {row['recovered']} of {row['images']} images recovered, {labels} of the labels"
        )
    console.say(f"results in {outcome.folder}")
    picture = outcome.folder / "reconstructions.png"
    if picture.exists():
        console.say(f"private images beside rebuilt ones: {picture}")
    console.say(f"the whole story on one page: {page}")


def one_line(error: BaseException) -> str:
    """What to print of an error."""
    return printable(error, 2000)
