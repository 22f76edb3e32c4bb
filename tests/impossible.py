"""A generator of command lines that nothing can come of."""

from __future__ import annotations

from functools import cache

from hypothesis import strategies as st
from omegaconf import OmegaConf

from fedleak.config import choice_files, parse
from fedleak.rules import RULES

JUNK = ["-1", "0", "1.5", "-0.5", "abc", "null", "[]", "[1,2]", "{a:1}", "nan", "inf", "-inf", "true", "''", "2"]
JUNK += ["99999999999999999999", "[a,null]", "1e400", "../x", "'é'", "[[1]]"]
TARGETS = ["''", "os", "os.nothing", "builtins.int", "builtins.dict", "1", "null", "fedleak.nowhere.X", "[a]", "a.b.c"]
TARGETS += ["sys.exit", "builtins.exit", "os.path.join", "builtins.print", "fedleak.errors.UsageError", "..", ".x"]
PARTS = ("data", "partition", "model", "defense", "adversary", "strategy", "engine", "tracking")
FOLDERS = ["a_file", "a_file/inside", "/proc/inside", "''", "null", "[a]"]
TOGETHER = [
    "threat.per_sample_gradients=true federation.local_steps=2",
    "threat.per_sample_gradients=true federation=fedavg",
    "threat.per_sample_gradients=true threat.view=sum",
    "threat.view=models federation.capture_every=2",
    "threat.view=models strategy=krum",
    "attack=joint federation.rounds=2",
    "attack=idlg federation.batch_size=2",
    "attack=fedavg attack/labels=known",
    "attack/labels=known",
    "capture=none",
    "capture.clients=0",
    "federation=fedavg threat.hyperparameters=false",
    "auxiliary=/nowhere",
    "auxiliary=/nowhere threat.auxiliary_data=true",
    "federation.clients=5000",
    "partition=shards partition.shards_per_client=5000",
    "quick=true",
    "study.networks=3",
    "data=mnist",
    "data=mnist data.root=/nowhere",
    "data=image_folder data.root=/nowhere",
    "model=vgg11 data.image_size=8",
    "model=inception_v3",
    "attack=map attack/labels=joint",
    "attack=learned federation.batch_size=2",
    "attack=labels_only attack/inversion=features model=resnet20",
    "attack=labels_only attack/inversion=peeling attack.inversion.fallback=null model=resnet20",
    "strategy=dp_client",
    "strategy=dp_server strategy.num_sampled_clients=99",
    "device=cuda",
    "engine=ray engine.num_cpus=4096",
    "engine=ray engine.num_gpus=64",
    "engine=ray engine.num_cpus=nan",
    "tracking=mlflow tracking.uri=nonsense://x",
    "attack.adaptive=true attack=labels_only",
    "defense=chain defense.defenses=[3]",
    "defense=chain defense.defenses=[]",
    "experiment=rounds study.moments=[3]",
    "experiment=batch_size study.batch_sizes=[0]",
    "experiment=idlg_table1 study.attacks.x=[attack=nothing]",
    "experiment=mlp_dlg study.budgets=[]",
    "experiment=limit study.noise=[a]",
    "experiment=first_defenses attack=none",
    "federation.batch_size=100000000 model=resnet18",
    "model.init=nothing",
    "model.init=0",
    "model.init=[]",
    "model.init=''",
    "attack.inversion.objective._target_=os.getcwd attack=dlg",
]


@cache
def settings() -> tuple[tuple[str, ...], ...]:
    """(choice, key) of every setting in the files of every group of parts."""
    found = []
    for group in PARTS:
        for name, path in choice_files()[group].items():
            for key in OmegaConf.load(path):
                if str(key) not in ("_target_", "defaults", "download"):  # which would
                    found.append((f"{group}={name}", f"{group}.{key}"))
    return tuple(found)


def _wrong(key: str) -> list[str]:
    """The junk that a key's rule refuses."""
    values = [(text, parse([f"{key}={text}"])[0].value()) for text in JUNK]
    if key == "output_dir":
        return FOLDERS
    return [text for text, value in values if not RULES[key].test(value)]


@st.composite
def command_lines(draw: st.DrawFn) -> list[str]:
    """Overrides of ``fedleak run``, at least one of them impossible."""
    kind = draw(st.sampled_from(["rule", "choice", "target", "unknown", "gone", "together", "syntax"]))
    valid = draw(
        st.lists(st.sampled_from(["federation.clients=2", "seed=3", "defense=gaussian", "model=mlp"]), max_size=2)
    )
    if kind == "rule":
        key = draw(st.sampled_from(sorted(k for k in RULES if not k.startswith("attack.m") and k != "attack.restarts")))
        return [*valid, f"{key}={draw(st.sampled_from(_wrong(key)))}"]
    groups = sorted(
        {*PARTS, "federation", "threat", "capture", "attack", "attack/labels", "attack/inversion", "experiment"}
    )
    if kind == "choice":
        names = ["nothing", "3", "../config", "[a,b]", "{a:1}", "''", "NONE", "fedavg/x"]
        return [*valid, f"{draw(st.sampled_from(groups))}={draw(st.sampled_from(names))}"]
    if kind == "target":
        part = draw(st.sampled_from([*PARTS, "attack.labels", "attack.inversion"]))
        return [*valid, f"{part}._target_={draw(st.sampled_from(TARGETS))}"]
    word = draw(st.text("abcdefgh_", min_size=3, max_size=8))
    if kind == "unknown":
        where = draw(
            st.sampled_from(
                ["", "+", "++", "federation.", "+federation.", "model.", "+threat.", "+data.", "++capture."]
            )
        )
        return [*valid, f"{where}{word}={draw(st.sampled_from(JUNK))}"]
    if kind == "gone":
        return [
            *valid,
            "~" + draw(st.sampled_from([*PARTS[:-1], "federation", "threat.labels", "seed", "federation.lr", word])),
        ]
    if kind == "syntax":
        return [
            *valid,
            draw(
                st.sampled_from(
                    [
                        "=",
                        "a==",
                        "x=[",
                        "x={",
                        "--x",
                        "-z",
                        word,
                        f"{word}=$(",
                        "seed=${",
                        "seed=${nope:1}",
                        "seed=${seed}",
                        "a b=c",
                        "~",
                        "+",
                        "=3",
                        "seed=",
                        "'",
                    ]
                )
            ),
        ]
    return [*valid, *draw(st.sampled_from(TOGETHER)).split(" ")]


@st.composite
def doubtful_lines(draw: st.DrawFn) -> list[str]:
    """Overrides of which some are impossible, and nobody knows which before the parts are built."""
    choice, key = draw(st.sampled_from(settings()))
    return [choice, f"{key}={draw(st.sampled_from(JUNK))}"]
