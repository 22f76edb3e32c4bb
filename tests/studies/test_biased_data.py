import pandas as pd
import pytest

from fedleak.errors import UsageError
from fedleak.setup import compose
from fedleak.studies import BiasedData, Job

FEDERATION = ["federation.clients=3", "federation.rounds=1", "federation.batch_size=8"]
SETTINGS = {
    "federations": {"fedsgd": FEDERATION, "fedavg": ["federation=fedavg", *FEDERATION]},
    "partitions": {"iid": ["partition=iid"], "biased": ["partition=biased"]},
    "moments": {"fedsgd": [1]},
    "victims": 1,
    "methods": ["random", "version1"],
    "seeds": 1,
}


def job(folder) -> Job:
    overrides = ["attack=version1", "attack.max_evaluations=5", "attack.restarts=1"]
    return Job(compose(overrides), overrides, folder)


def test_a_federation_for_each_partition_and_what_it_leaks(tmp_path):
    study = BiasedData(**SETTINGS)
    study.check(job(tmp_path))
    study.run(job(tmp_path))
    classes = pd.read_csv(tmp_path / "utility_summary.csv").set_index(["federation", "partition"]).classes_per_update
    assert len(classes) == 4
    assert classes["fedavg", "biased"] < classes["fedavg", "iid"], "skewed clients hold fewer classes"
    labels = pd.read_csv(tmp_path / "label_summary.csv")
    assert set(labels.updates) == {3}
    assert len(labels) == 2 * 2 * 2
    images = pd.read_csv(tmp_path / "image_summary.csv")
    assert list(images.federation) == ["fedsgd"] * 2, "no moment of fedavg was named"
    assert list(images.images) == [8, 8]
    for picture in ("biased_data", "fedsgd_iid", "fedsgd_biased"):
        assert (tmp_path / f"{picture}.png").stat().st_size > 5_000


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"moments": {"fed": [1]}}, r"study\.moments\.fed: no such federation here; known: fedsgd, fedavg"),
        ({"partitions": {}}, r"study\.partitions={}: must be names with a list of overrides each"),
        ({"partitions": {"odd": ["partition=od"]}}, r"partition=od: no such choice"),
        ({"partitions": {"odd": ["partition=dirichlet", "partition.alpha=-1"]}}, r"partition\.alpha=-1"),
        ({"seeds": 0}, r"study\.seeds=0: must be a whole number from 1"),
    ],
)
def test_what_cannot_work_is_refused_before_any_work(tmp_path, setting, message):
    with pytest.raises(UsageError, match=message):
        BiasedData(**{**SETTINGS, **setting}).check(job(tmp_path / "run"))
    assert not (tmp_path / "run").exists()
