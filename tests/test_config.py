import pickle
import subprocess
import sys

import pytest

from fedleak.attacks import Attack
from fedleak.config import choices, compose_config, conf_dir, expand_sweep, plain
from fedleak.errors import UsageError
from fedleak.instantiate import locate
from fedleak.prepare import prepare
from fedleak.setup import compose, read

EVERY_CHOICE = [(group, name) for group, options in choices().items() for name, _ in options]


@pytest.mark.parametrize(("group", "name"), EVERY_CHOICE)
def test_every_choice_composes_passes_the_checks_and_names_real_classes(group, name):
    config = plain(compose_config([f"{group}={name}"]))
    setup = read(config)
    found = 0
    nodes = [config]
    while nodes:
        node = nodes.pop()
        if isinstance(node, dict):
            nodes += node.values()
            if "_target_" in node:
                locate(node["_target_"], group)
                found += 1
        elif isinstance(node, list):
            nodes += node
    assert found >= 5
    if group.startswith("attack") and name != "none":
        assert isinstance(setup.attack.build(), Attack)


@pytest.mark.parametrize(("group", "name"), EVERY_CHOICE)
def test_every_choice_is_described(group, name):
    description = dict(choices()[group])[name]
    assert len(description) > 10


def test_all_groups_of_the_contract_exist():
    names = {group: {name for name, _ in options} for group, options in choices().items()}
    assert {"none", "dlg", "idlg", "version1"} <= names["attack"]
    assert {"digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "svhn", "lfw", "image_folder"} <= names["data"]
    assert {"iid", "biased", "dirichlet", "shards"} <= names["partition"]
    assert {"none", "gaussian", "laplacian", "pruning"} <= names["defense"]
    assert {"local", "ray"} <= names["engine"]
    assert {"lenet", "mlp"} <= names["model"]
    assert {"none", "tensorboard", "mlflow"} <= names["tracking"]


def test_a_chosen_group_changes_everything_it_names():
    config = plain(compose_config(["federation=fedavg"]))
    assert config["federation"]["payload"] == "weights"
    assert config["federation"]["local_steps"] > 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("attack=foo", r"attack=foo: no such choice; .*idlg"),
        ("atack=dlg", r"atack=dlg: unknown key; did you mean attack\?"),
        ("attack/label=idlg", r"attack/label: cannot be chosen here; did you mean attack/labels\?"),
        ("federation.client=3", r"federation\.client=3: unknown key; did you mean federation\.clients\?"),
        ("defense.std=0.1", r"defense\.std=0\.1: unknown key; it belongs to defense=gaussian"),
        ("defense=null", "defense=null: no choice; name one, see fedleak list"),
        ("federation.lr=[1", "cannot be read as key=value"),
    ],
)
def test_what_cannot_be_composed_is_one_clear_line(override, message):
    with pytest.raises(UsageError, match=message) as caught:
        compose_config([override])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "override",
    [
        "federation.clients=0",
        "federation.rounds=-1",
        "federation.fraction=0",
        "federation.fraction=1.5",
        "federation.batch_size=1.5",
        "federation.local_steps=0",
        "federation.lr=0",
        "federation.lr=abc",
        "federation.payload=both",
        "federation.epochs=0",
        "federation.batches=stale",
        "federation.optimizer=rmsprop",
        "federation.momentum=1",
        "federation.betas=0.9",
        "federation.eps=0",
        "federation.weight_decay=-1",
        "federation.lr_decay=0",
        "federation.dropout=1",
        "seed=-1",
        "device=tpu",
        "attack.restarts=0",
        "attack.max_evaluations=0",
        "attack.every=0",
        "attack.clients=none",
        "threat.labels=maybe",
        "limit=3",
    ],
)
def test_impossible_values_are_refused_by_name_value_and_mend(override):
    key, value = override.split("=")
    with pytest.raises(UsageError, match=rf"{key}={value}: must be .+"):
        compose([override])


def test_a_key_added_with_a_plus_is_still_unknown():
    with pytest.raises(UsageError, match=r"federation\.client: unknown key"):
        compose(["+federation.client=3"])


def test_per_sample_gradients_need_gradients_of_one_step():
    with pytest.raises(UsageError, match=r"threat\.per_sample_gradients=true: needs"):
        compose(["attack=idlg_per_sample", "federation.payload=weights"])


def test_a_sweep_is_expanded_without_running_it():
    jobs = expand_sweep(["defense=gaussian", "defense.std=0.1,0.2", "seed=1,2"])
    assert len(jobs) == 4
    assert ["defense.std=0.2", "defense=gaussian", "seed=1"] in [sorted(job) for job in jobs]


def test_conf_stands_at_the_top_level_or_in_the_package():
    assert (conf_dir() / "config.yaml").is_file()


def test_a_setup_is_the_same_in_every_process_and_says_nothing_of_where_its_results_go():
    one, other = compose(["output_dir=a"]), compose(["output_dir=b"])
    assert one == other == pickle.loads(pickle.dumps(one))
    assert hash(one) == hash(other)
    assert one != compose(["defense=gaussian"])
    assert one.settings["federation.clients"] == str(one.federation.clients)


def test_what_each_update_can_leak_is_said_unless_it_is_switched_off():
    config = plain(compose_config([]))
    assert [read(config | {"limit": value}).limit for value in ("auto", "off", False)] == ["auto", "off", "off"]


@pytest.mark.parametrize(
    ("override", "kind"),
    [
        ("attack.labels._target_=fedleak.defenses.NoDefense", "LabelInference"),
        ("defense._target_=fedleak.data.IID", "Defense"),
        ("adversary._target_=fedleak.defenses.NoDefense", "Adversary"),
        ("+attack.view._target_=fedleak.data.IID", "View"),
    ],
)
def test_a_part_of_the_wrong_kind_is_refused(override, kind):
    with pytest.raises(UsageError, match=f"{override.lstrip('+')}: gives no {kind}; name a subclass of fedleak"):
        prepare(compose(["attack/labels=version1", override]))


def test_a_refused_typo_needs_neither_torch_nor_flower():
    block = (
        "import sys\n"
        "for name in ('torch', 'flwr', 'ray', 'pandas', 'scipy', 'matplotlib', 'rich'):\n    sys.modules[name] = None\n"
        "from fedleak.cli import main\n"
        "assert main(['run', 'federation.client=2']) == main(['run', 'federation.clients=0']) == 2\n"
        "assert main(['labels', 'labels.run=3']) == 2 and main(['list']) == 0\n"
    )
    done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "did you mean federation.clients?" in done.stderr
