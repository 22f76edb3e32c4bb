"""The command line: ``fedleak run``, ``attack``, ``labels``, ``condense``, ``audit``, ``report``, ``collect`` …"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

# Before torch starts its threads: a worker that spins for long while another program holds the core costs tenfold.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

from fedleak import __version__
from fedleak.errors import FedleakError, UsageError
from fedleak.jobs import go_on, one_line, refuse_overwriting, show, split, through_hydra

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
        print(f"fedleak: {one_line(error)}", file=sys.stderr)
        return 2
    except FedleakError as error:
        print(f"fedleak: {one_line(error)}", file=sys.stderr)
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
        return go_on(arguments)
    return through_hydra("run", "config", read, arguments)


def labels(arguments: list[str]) -> int:
    """``fedleak labels``: the study of label inference methods, by settings of its own."""
    from fedleak.setup import read_labels

    return through_hydra("labels", "labels", read_labels, arguments)


def condense(arguments: list[str]) -> int:
    """``fedleak condense``: a data set in a few made images a class, by settings of its own."""
    from fedleak.setup import read_condense

    return through_hydra("condense", "condense", read_condense, arguments)


def frontier(arguments: list[str]) -> int:
    """``fedleak frontier``: what defenses cost and what leaks through them, by settings of its own."""
    from fedleak.setup import read_frontier

    open_ended = ("frontier.defenses", "frontier.attackers", "frontier.federations")  # any name may be added to these
    for word in arguments:
        if word.lstrip("+~").startswith(("defense", "attack")):
            raise UsageError(f"{word}: a frontier has many; name them by frontier.defenses and frontier.attackers")
    arguments = [f"++{word}" if word.startswith(open_ended) else word for word in arguments]
    return through_hydra("frontier", "frontier", read_frontier, arguments)


def attack(arguments: list[str]) -> int:
    """``fedleak attack``: an earlier run's config, with attack, threat, limit and device as given now."""
    trusted = "--trust" in arguments
    flags, overrides = split([word for word in arguments if word != "--trust"])
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
    free = (*CHANGEABLE, "device", "seed", "limit", "output_dir")
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
        refuse_overwriting(folder)
    else:
        folder = run_dir / "attacks" / setup.attack.name
    from fedleak import pipeline
    from fedleak.console import Console

    console = Console()
    show(console, pipeline.attack_again(setup, run_dir, folder, console, ["fedleak", "attack", *overrides]))
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
    _, overrides = split(arguments)
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


if __name__ == "__main__":
    sys.exit(main())
