import json
import sys

import pandas as pd
import pytest

from fedleak.cli import main
from fedleak.config import choices, compose_config, plain
from fedleak.errors import UsageError
from fedleak.setup import compose, read
from fedleak.studies import Job, Results, Study, build_study
from fedleak.studies.federations import cell_setup, check_cells, run_cells

EXPERIMENTS = [name for name, _ in choices()["experiment"]]
STUDIES = [name for name in EXPERIMENTS if name != "quick"]
FEDERATION = ["attack=labels_only", "limit=off", "federation.rounds=1", "federation.clients=2"]


class Counting(Study):
    """A study that notes what it was given."""

    def __init__(self, networks: int, names: list[str]) -> None:
        self.networks = networks
        self.names = names

    def run(self, job: Job) -> pd.DataFrame:
        results = job.results()
        results.add({"network": i, "name": self.names[0]} for i in range(self.networks))
        return results.frame


def counting(*, quick: bool) -> dict:
    node = {"_target_": "counting_study.Counting", "networks": 100, "names": ["a"], "quick": {"networks": 2}}
    return plain(compose_config([])) | {"study": node, "quick": quick}


def built(config: dict, overrides=()) -> Study | None:
    return build_study(read(config, overrides))


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.setitem(sys.modules, "counting_study", sys.modules[__name__])


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.parametrize("quick", [False, True])
def test_every_experiment_is_a_study_with_small_settings(name, quick):
    overrides = [f"experiment={name}", f"quick={str(quick).lower()}"]
    assert isinstance(build_study(compose(overrides)), Study)
    assert plain(compose_config(overrides))["study"]["quick"]


def test_quick_shortens_what_was_not_given():
    assert built(counting(quick=False)).networks == 100
    assert built(counting(quick=True)).networks == 2
    assert built(counting(quick=True), ["study.names=[b]"]).networks == 2
    assert built(counting(quick=True), ["study.networks=100"]).networks == 100


def test_a_study_that_cannot_be_is_refused():
    config = counting(quick=False)
    config["study"]["quick"] = {"network": 3}
    with pytest.raises(UsageError, match=r"study\.quick\.network: unknown key; did you mean study\.quick\.networks"):
        built(config)
    with pytest.raises(UsageError, match=r"study=5: must be a _target_"):
        built(config | {"study": 5})
    with pytest.raises(UsageError, match=r"gives no Study; name a subclass of fedleak\.studies"):
        built(config | {"study": {"_target_": "fedleak.models.LeNet"}})
    with pytest.raises(UsageError, match=r"study: .*did you mean study\.networks"):
        built(config | {"study": {"_target_": "counting_study.Counting", "network": 1, "names": []}})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["quick=true"], "quick=true: shortens a study, and there is none here"),
        (["quick=3"], "quick=3: must be true or false"),
        (["experiment=label_inference", "study.run=3"], "study.run=3: unknown key; did you mean study.runs?"),
        (["experiment=label_inference", "study.runs=0"], "study.runs=0: must be a whole number from 1"),
        (["experiment=label_inference", "study.methods=[foo]"], "study.methods=foo: no such choice of attack/labels"),
        (["experiment=label_inference", "data=mnist", "data.root=/no/such"], "data.root=/no/such does not exist"),
    ],
)
def test_bad_input_is_one_clear_line_and_leaves_no_folder(capsys, tmp_path, arguments, message):
    assert main(["run", *arguments, f"output_dir={tmp_path / 'run'}"]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_study_leaves_its_tables_and_how_to_repeat_it(tmp_path, capsys):
    small = ["study.runs=2", "study.batch_sizes=[1]", "study.methods=[random,version1]"]
    command = ["run", "experiment=label_inference", "quick=true", *small, f"output_dir={tmp_path}"]
    assert main(command) == 0
    assert len(pd.read_csv(tmp_path / "labels.csv")) == 2 * 2 * 2
    facts = json.loads((tmp_path / "study.json").read_text())
    assert facts["command"].startswith("fedleak run experiment=label_inference quick=true")
    assert facts["settings"]["runs"] == 2
    assert facts["settings"]["batch_sizes"] == [1]
    assert "version1" in capsys.readouterr().out
    assert main(command) == 2
    assert "holds the results of an earlier run" in capsys.readouterr().err


def test_rows_are_in_the_file_as_soon_as_they_are_known(tmp_path):
    results = Results(tmp_path / "new" / "results.csv")
    results.add([{"cell": 1, "share": 0.5}])
    results.add([{"cell": 2, "share": None}])
    table = pd.read_csv(tmp_path / "new" / "results.csv")
    assert table["cell"].tolist() == [1, 2]
    assert table["share"].isna().tolist() == [False, True]


def test_the_federations_of_a_study_are_the_users_with_a_few_changes(tmp_path):
    job = Job(compose(FEDERATION), [*FEDERATION, "defense=gaussian"], tmp_path)
    cells = {"plain": ["defense=none"], "weights": ["federation.payload=weights", "federation.rounds=2"]}
    assert cell_setup(job, cells["weights"]).federation.clients == 2
    outcomes = dict(run_cells(job, cells))
    assert list(outcomes) == ["plain", "weights"]
    defenses = {name: pd.read_csv(tmp_path / name / "attacks.csv")["defense"].unique().tolist() for name in cells}
    assert defenses["plain"] == ["none"]
    assert defenses["weights"][0].startswith("gaussian")
    assert len(pd.read_csv(tmp_path / "weights" / "rounds.csv")) == 2
    assert main(["attack", f"run_dir={tmp_path / 'weights'}", "attack/labels=llg"]) == 0


def test_a_federation_that_is_refused_stops_the_study_before_any_work(tmp_path):
    job = Job(compose(FEDERATION), FEDERATION, tmp_path / "out")
    with pytest.raises(UsageError, match=r"federation\.clients=100000"):
        list(check_cells(job, {"good": [], "bad": ["federation.clients=100000"]}))
    assert not (tmp_path / "out").exists()
