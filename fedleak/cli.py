"""The command line: ``fedleak run``, ``attack``, ``labels``, ``condense``, ``audit``, ``report``, ``collect`` …"""

from __future__ import annotations

import itertools
import logging
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

# Before torch starts its threads: a worker that spins for long while another program holds the core costs tenfold.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from fedleak import __version__
from fedleak.errors import FedleakError, UsageError, printable

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from fedleak.console import Console
    from fedleak.outcome import Outcome
    from fedleak.setup import Setup

HELP = f"""fedleak {__version__}: simulate a federation with an attacker inside, and see what its updates leak

  fedleak run [overrides]                   run a federation, attack every captured update, judge the result
  fedleak run resume=DIR                    go on with a run, study or sweep that was interrupted
  fedleak attack run_dir=DIR [overrides]    attack an earlier run's captures again; --trust where its files name
                                            code of their own
  fedleak labels [overrides]                compare the label inference methods, fresh networks each run
  fedleak condense [overrides]              condense a data set into a few images a class, by gradient matching
  fedleak audit APP_DIR | CAPTURES [options] what a Flower app's updates give away; fedleak audit --help
  fedleak frontier [overrides]              what defenses cost, and what leaks through them all the same
  fedleak report DIR [DIR …] [--output F]   one HTML page on a run, or on several side by side
  fedleak collect DIR [--output F]          one table, collected.csv, over all runs in a folder, of a sweep say
  fedleak list                              the choices of every group
  fedleak --help | --version

Overrides are Hydra's: group=choice picks a part, key=value sets one value.

  fedleak run                                               handwritten digits, no download, about a minute
  fedleak run attack=dlg defense=gaussian defense.std=0.01  another attack against a noisy update
  fedleak run federation=fedavg federation.local_steps=5    clients send weights after five steps
  fedleak run data=mnist data.root=DIR data.download=true   MNIST
  fedleak run experiment=idlg_table1 quick=true             a published table, in small; fedleak list names all studies
  fedleak run --multirun defense.ratio=0.1,0.5,0.9 defense=pruning
  fedleak attack run_dir=outputs/… attack=dlg attack.restarts=4

Options of run, labels and condense: --multirun (-m) sweeps over comma-separated values; --cfg job prints the composed
configuration and stops. --config-dir DIR adds YAML files of your own, for attack and list too.
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code: 0 done, 2 a usage error, 1 anything else, 130 interrupted."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    # A user's own classes are found beside where they stand, as with `python -m`.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        return _dispatch(arguments)
    except UsageError as error:
        print(f"fedleak: {_one_line(error)}", file=sys.stderr)
        return 2
    except FedleakError as error:
        print(f"fedleak: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            "fedleak: interrupted; what was finished is kept, and fedleak run resume=DIR goes on from there",
            file=sys.stderr,
        )
        return 130


def _dispatch(arguments: list[str]) -> int:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("--help", [])
    asked = command in COMMANDS and command != "audit" and {"--help", "-h"} & set(rest)
    if command in ("--help", "-h", "help") or asked:
        print(HELP, end="")
        return 0
    if command in ("--version", "-V"):
        print(f"fedleak {__version__}")
        return 0
    if command not in COMMANDS:
        raise UsageError(f"{command}: unknown command; known: {', '.join(COMMANDS)}, --help, --version")
    return COMMANDS[command](rest)


def run(arguments: list[str]) -> int:
    """``fedleak run``: check everything, then let Hydra run the job or the sweep."""
    from fedleak.setup import read

    if any(word.startswith("resume=") for word in arguments):
        return _resume(arguments)
    return _through_hydra("run", "config", read, arguments)


def labels(arguments: list[str]) -> int:
    """``fedleak labels``: the study of label inference methods, by settings of its own."""
    from fedleak.setup import read_labels

    return _through_hydra("labels", "labels", read_labels, arguments)


def condense(arguments: list[str]) -> int:
    """``fedleak condense``: a data set in a few made images a class, by settings of its own."""
    from fedleak.setup import read_condense

    return _through_hydra("condense", "condense", read_condense, arguments)


def frontier(arguments: list[str]) -> int:
    """``fedleak frontier``: what defenses cost and what leaks through them, by settings of its own."""
    from fedleak.setup import read_frontier

    open_ended = ("frontier.defenses", "frontier.attackers", "frontier.federations")  # any name may be added to these
    for word in arguments:
        if word.lstrip("+~").startswith(("defense", "attack")):
            raise UsageError(f"{word}: a frontier has many; name them by frontier.defenses and frontier.attackers")
    arguments = [f"++{word}" if word.startswith(open_ended) else word for word in arguments]
    return _through_hydra("frontier", "frontier", read_frontier, arguments)


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


def _resume(arguments: list[str]) -> int:
    """``fedleak run resume=DIR``: what was begun there, gone on with; its configuration is in its files."""
    trusted = "--trust" in arguments
    flags, overrides = _split([word for word in arguments if word != "--trust"])
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
        return _through_hydra("run", "config", read, [*given, f"output_dir={there}"])
    failures: list[FedleakError] = []
    jobs = list(begun(folder, given, trusted=trusted))
    for job in jobs:
        (job.folder / "error.txt").unlink(missing_ok=True)
        try:
            _run_job(job.command, job.setup, job.overrides, job.folder, resume=True)
        except FedleakError as error:
            if len(jobs) == 1:
                raise
            print(f"fedleak: {_one_line(error)}", file=sys.stderr)
            failures.append(error)
    return _exit_code(failures)


def _run_job(command: str, setup: Setup, overrides: Sequence[str], folder: Path, *, resume: bool = False) -> None:
    from fedleak import pipeline
    from fedleak.console import Console

    console, words = Console(), ["fedleak", command, *overrides]
    if setup.study is None:
        if resume and (folder / "summary.json").exists():
            console.say(f"{folder}: was finished; its tables are written anew")
        _show(console, pipeline.run(setup, folder, console, words, resume=resume))
    else:
        from fedleak.studies.base import Job, build_study, run_study

        job = Job(setup, overrides, folder, console, resume=resume)
        console.table(run_study(build_study(setup), job, words))
        console.say(f"results in {folder}: {', '.join(sorted(path.name for path in folder.glob('[!.]*.*')))}")


def attack(arguments: list[str]) -> int:
    """``fedleak attack``: an earlier run's config, with attack, threat and device as given now."""
    trusted = "--trust" in arguments
    flags, overrides = _split([word for word in arguments if word != "--trust"])
    if flags:
        raise UsageError(f"{flags[0]}: not an option of fedleak attack; give key=value overrides")
    from fedleak.config import SEARCH, parse
    from fedleak.earlier import CHANGEABLE, earlier_overrides, merge
    from fedleak.setup import compose
    from fedleak.trust import refuse_strangers

    given = {o.key_or_group: o for o in parse(overrides)}
    if "run_dir" not in given:
        raise UsageError("run_dir: missing; name an earlier run's folder, run_dir=DIR")
    run_dir = Path(str(given["run_dir"].value()))
    if not run_dir.is_dir():
        raise UsageError(f"run_dir={run_dir}: no such folder; name an earlier run's")
    captured = (run_dir / "captures" / "index.jsonl").is_file()
    earlier, now = (
        earlier_overrides(run_dir) if captured else [],
        [o for o in overrides if not o.startswith("run_dir=")],
    )
    free = (*CHANGEABLE, "device", "seed", "output_dir")
    for key, override in given.items():
        fixed = key.split("/")[0].split(".")[0] not in ("run_dir", *free) and key != SEARCH
        if fixed and override.input_line not in earlier:
            raise UsageError(f"{key}: fixed by the run in {run_dir}; only {', '.join(free)} can change")
    if not captured:
        raise UsageError(f"run_dir={run_dir}: no captures there; name the folder of a fedleak run")
    merged = merge(earlier, now)
    if not trusted:
        refuse_strangers(earlier, now, merged)
    setup = compose(merged)
    if "output_dir" in given:
        folder = Path(str(given["output_dir"].value()))
        _refuse_overwriting(folder)
    else:
        folder = run_dir / "attacks" / setup.attack.name
    from fedleak import pipeline
    from fedleak.console import Console

    console = Console()
    _show(console, pipeline.attack_again(setup, run_dir, folder, console, ["fedleak", "attack", *overrides]))
    return 0


def audit(arguments: list[str]) -> int:
    """``fedleak audit``: a Flower app, or what was captured of one."""
    from fedleak.audit.command import audit as run_audit

    return run_audit(arguments)


def report(arguments: list[str]) -> int:
    """``fedleak report``: one HTML page on one run, or on several side by side."""
    folders, output = _folders("report", arguments)
    from fedleak.report.html import write_report

    if output is None:
        output = folders[0] / "report.html" if len(folders) == 1 else Path("report.html")
    print(f"report: {write_report(folders, output)}")
    return 0


def collect(arguments: list[str]) -> int:
    """``fedleak collect``: one table over all the runs in a folder."""
    folders, output = _folders("collect", arguments)
    if len(folders) != 1:
        raise UsageError("fedleak collect takes one folder, such as that of a sweep; name it")
    from fedleak.collect import collect as collected
    from fedleak.collect import write
    from fedleak.console import Console

    found, console = collected(folders[0]), Console()
    path = output or folders[0] / "collected.csv"
    write(found, path)
    console.table(found.shown)
    console.say(f"{len(found.table)} runs in {path}")
    for name in found.unfinished:
        console.headline(f"not finished: {name} (fedleak run resume={folders[0] / name})")
    for problem in found.unreadable:
        console.headline(f"left out, damaged: {problem}")
    return 0


def _folders(command: str, arguments: list[str]) -> tuple[list[Path], Path | None]:
    """(directories, what --output names)."""
    folders: list[Path] = []
    output = None
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        name, _, value = word.partition("=")
        if name in ("--output", "-o"):
            value = value or (rest.pop(0) if rest else "")
            if not value:
                raise UsageError("--output: names no file; give one")
            output = Path(value)
        elif word.startswith("-"):
            raise UsageError(f"{word}: unknown option; fedleak {command} takes run directories and --output FILE")
        else:
            folders.append(Path(word))
    return folders, output


def list_choices(arguments: list[str]) -> int:
    """``fedleak list``: every group's choices with a line on each."""
    from fedleak.config import choices

    if arguments and not arguments[0].startswith(("--config-dir", "-cd")):
        raise UsageError(f"{arguments[0]}: fedleak list takes no arguments but --config-dir DIR; leave it out")
    _, overrides = _split(arguments)
    for group, options in choices(overrides).items():
        print(group)
        width = max(len(name) for name, _ in options)
        for name, description in options:
            print(f"  {name:<{width}}  {description}")
    return 0


COMMANDS: dict[str, Callable[[list[str]], int]] = {
    "run": run,
    "attack": attack,
    "labels": labels,
    "frontier": frontier,
    "condense": condense,
    "audit": audit,
    "report": report,
    "collect": collect,
    "list": list_choices,
}


def _split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
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


def _through_hydra(
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

    from fedleak.config import compose_config, conf_dir, expand_sweep, plain, search_path

    flags, overrides = _split(arguments)
    sweeps = bool({"--multirun", "-m"} & set(flags))
    for one in expand_sweep(overrides) if sweeps else [overrides]:
        config = plain(compose_config(one, root))
        if any(override.startswith("output_dir=") for override in overrides):
            _refuse_overwriting(Path(config["output_dir"]))
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
            print(f"fedleak: {_one_line(error)}", file=sys.stderr)
            failures.append(error)
            if sweeps:
                (Path(job.runtime.output_dir) / "error.txt").write_text(f"{_one_line(error)}\n")

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


def _exit_code(failures: Sequence[FedleakError]) -> int:
    return 0 if not failures else 2 if all(isinstance(f, UsageError) for f in failures) else 1


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


def _speak_again() -> None:
    """Hydra's switched-off logging silences every logger that was there before; ours says which clients fail."""
    for name, logger in logging.root.manager.loggerDict.items():
        if isinstance(logger, logging.Logger) and name.split(".")[0] == "fedleak":
            logger.disabled = False
    if not logging.root.handlers:
        logging.basicConfig(format="%(message)s", level=logging.WARNING)


def _refuse_overwriting(folder: Path) -> None:
    for name in ("rounds.csv", "attacks.csv", "labels.csv", "results.csv", "captures", "multirun.yaml"):
        if (folder / name).exists():
            raise UsageError(f"output_dir={folder}: holds the results of an earlier run; name another, or remove it")


def _show(console: Console, outcome: Outcome) -> None:
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


def _one_line(error: BaseException) -> str:
    return printable(error, 2000)


if __name__ == "__main__":
    sys.exit(main())
