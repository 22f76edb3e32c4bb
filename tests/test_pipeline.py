"""What `design.md`'s promises come down to, on real runs."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest
import torch

from fedleak.attacks.store import load_reconstructions
from fedleak.capture import CaptureStore
from fedleak.cli import main
from fedleak.rounds import choose_victims
from fedleak.truth import TruthStore


def tables_without_seconds(folder: Path) -> list[str]:
    """A run's three tables as text, without the columns of seconds, which differ from run to run."""
    tables = (pd.read_csv(folder / f"{name}.csv", dtype=str) for name in ("rounds", "attacks", "leakage"))
    return [table.drop(columns="seconds", errors="ignore").to_csv() for table in tables]


def test_a_run_directory_holds_what_the_contract_says(small_run):
    assert {p.name for p in small_run.iterdir()} == {
        ".hydra",
        "captures",
        "truth",
        "rounds.csv",
        "attacks.csv",
        "leakage.csv",
        "summary.json",
        "reconstructions.png",
        "evolution.png",
        "report.html",
    }
    columns = {
        "rounds": "round,clients,train_loss,test_accuracy,seconds",
        "attacks": "round,client,attack,defense,batch_size,label_accuracy,labels_exact,objective,evaluations,seconds,"
        "stop_reason,update_residual,limit_bits,method,why",
        "leakage": "round,client,image,label_true,label_inferred,mse,psnr,ssim,recovered,limit_mse,expected_mse",
    }
    for name, header in columns.items():
        assert (small_run / f"{name}.csv").read_text().splitlines()[0] == header
    rounds, attacks, leakage = (pd.read_csv(small_run / f"{name}.csv") for name in columns)
    assert list(rounds["round"]) == [1, 2]
    assert len(attacks) == len(leakage) == 4
    assert attacks.label_accuracy.eq(1.0).all()
    assert leakage.recovered.sum() >= 3
    assert attacks.update_residual.max() < 1e-5
    summary = json.loads((small_run / "summary.json").read_text())
    assert summary["command"].startswith("fedleak run attack=idlg federation.clients=2")
    assert summary["threat"]["withheld"] == ["auxiliary_data", "labels", "per_sample_gradients", "defense"]
    assert len(load_reconstructions(small_run)) == 4


def test_one_seed_one_result(small_run, tmp_path):
    overrides = json.loads((small_run / "summary.json").read_text())["command"].split()[2:-1]
    assert main(["run", *overrides, f"output_dir={tmp_path / 'again'}"]) == 0
    assert tables_without_seconds(tmp_path / "again") == tables_without_seconds(small_run)
    assert main(["run", *overrides, "seed=1", f"output_dir={tmp_path / 'other'}"]) == 0
    assert tables_without_seconds(tmp_path / "other") != tables_without_seconds(small_run)


@pytest.fixture
def copied(small_run, tmp_path) -> Path:
    """A copy of the small run without its finished reconstructions, so that attacks compute anew."""
    folder = tmp_path / "run"
    shutil.copytree(small_run, folder)
    shutil.rmtree(folder / "captures" / "reconstructions")
    return folder


def images(folder: Path) -> list[torch.Tensor]:
    return [r.images for r in load_reconstructions(folder)]


def test_poisoned_or_deleted_truth_changes_no_reconstruction(small_run, copied):
    truth = TruthStore(copied / "truth")
    known = [truth.load(*where) for where in truth.known()]
    shutil.rmtree(copied / "truth")
    for one in known:
        truth.write(replace(one, images=torch.rand_like(one.images), labels=(one.labels + 1) % 10))
    assert main(["attack", f"run_dir={copied}", "limit=off"]) == 0
    assert all(torch.equal(a, b) for a, b in zip(images(small_run), images(copied / "attacks/idlg"), strict=True))
    scores = pd.read_csv(copied / "attacks/idlg/attacks.csv")
    assert scores.label_accuracy.eq(0).all(), "the judgement does open the truth"
    assert scores.update_residual.min() > 0.1

    shutil.rmtree(copied / "truth")
    shutil.rmtree(copied / "captures" / "reconstructions")
    assert main(["attack", f"run_dir={copied}", f"output_dir={copied / 'blind'}"]) == 0
    assert all(torch.equal(a, b) for a, b in zip(images(small_run), images(copied / "blind"), strict=True))
    blind = pd.read_csv(copied / "blind/leakage.csv")
    assert len(blind) == 4
    assert blind[["label_true", "mse", "psnr", "ssim", "recovered"]].isna().all(axis=None)
    assert blind.label_inferred.notna().all()
    assert (copied / "blind/reconstructions.png").exists()


def test_a_killed_attack_goes_on_from_what_was_finished(small_run, copied, monkeypatch):
    from fedleak.attacks import store

    finished = []
    write = store.ReconstructionStore.write

    def write_then_die(self, reconstruction):
        write(self, reconstruction)
        finished.append((reconstruction.round, reconstruction.client))
        if len(finished) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(store.ReconstructionStore, "write", write_then_die)
    assert main(["attack", f"run_dir={copied}", "limit=off"]) == 130
    assert main(["attack", f"run_dir={copied}", "limit=off"]) == 0
    assert len(finished) == len(set(finished)) == 4, "nothing was computed twice"
    # The two left over were solved beside fewer others, which rounds differently, but leads to the same images.
    for one, other in zip(images(small_run), images(copied / "attacks/idlg"), strict=True):
        assert (one - other).square().mean() < 1e-3


def test_another_attack_on_the_same_captures_leaves_the_run_alone(small_run, tmp_path):
    before = {p: p.read_bytes() for p in small_run.glob("*.csv")}
    out = tmp_path / "labels"
    assert (
        main(
            [
                "attack",
                f"run_dir={small_run}",
                "attack=labels_only",
                "attack.clients=1",
                "limit=off",
                f"output_dir={out}",
            ]
        )
        == 0
    )
    assert {p: p.read_bytes() for p in small_run.glob("*.csv")} == before
    attacks = pd.read_csv(out / "attacks.csv")
    assert list(attacks.client) == [0, 0]
    assert set(attacks.stop_reason) == {"labels_only"}


def test_fedavg_of_one_step_and_fedsgd_leak_the_same_labels(tmp_path):
    federation = ["federation.clients=2", "federation.rounds=1", "federation.batch_size=3"]
    common = [*federation, "attack=labels_only", "limit=off"]
    leaked = []
    for payload in ("gradient", "weights"):
        folder = tmp_path / payload
        assert main(["run", *common, f"federation.payload={payload}", f"output_dir={folder}"]) == 0
        leaked.append(list(pd.read_csv(folder / "leakage.csv").label_inferred))
        assert pd.read_csv(folder / "attacks.csv").update_residual.max() < 1e-3
    assert leaked[0] == leaked[1]


@pytest.mark.parametrize(
    "defense",
    [["defense=gaussian", "defense.std=0.1"], ["defense=pruning", "defense.ratio=0.9"]],
    ids=["gaussian", "pruning"],
)
def test_a_strong_defense_stops_the_images(tmp_path, defense):
    folder = tmp_path / "run"
    common = ["federation.clients=2", "federation.rounds=1", "federation.batch_size=1", "attack.max_evaluations=300"]
    assert (
        main(["run", *common, "attack=idlg", "attack.restarts=1", "limit=off", *defense, f"output_dir={folder}"]) == 0
    )
    assert pd.read_csv(folder / "leakage.csv").recovered.sum() == 0
    attacks = pd.read_csv(folder / "attacks.csv")
    assert attacks.defense.str.contains(defense[0].split("=")[1]).all()
    assert attacks.update_residual.min() > 0.05


def test_per_sample_gradients_give_every_label_of_a_batch(tmp_path):
    folder = tmp_path / "run"
    run = ["run", "attack=idlg_per_sample", "attack/inversion=none", "federation.clients=2", "federation.rounds=1"]
    assert main([*run, "federation.batch_size=6", f"output_dir={folder}"]) == 0
    assert pd.read_csv(folder / "attacks.csv").labels_exact.all()


def test_labels_travel_only_when_they_are_granted(tmp_path):
    run = ["run", "attack=none", "federation.clients=1", "federation.rounds=1"]
    for granted in ("true", "false"):
        folder = tmp_path / granted
        assert main([*run, f"threat.labels={granted}", f"output_dir={folder}"]) == 0
        [captured] = CaptureStore.open(folder / "captures").load()
        assert (captured.labels is not None) == (granted == "true")
        assert (b'"labels"' in (folder / "captures" / "round-00001.shard").read_bytes()) == (granted == "true")
        assert len(pd.read_csv(folder / "attacks.csv")) == 0


def test_victims_are_chosen_by_round_and_client():
    rows = [{"round": r, "client": c} for r in range(1, 5) for c in (0, 2, 5)]
    chosen = choose_victims(rows, 2, 2)
    assert [(v["round"], v["client"]) for v in chosen] == [(1, 0), (1, 2), (3, 0), (3, 2)]
    assert choose_victims(rows, "auto", "all") == rows
    long = [{"round": r, "client": 0} for r in range(1, 101)]
    assert [v["round"] for v in choose_victims(long, "auto", "all")] == list(range(1, 101, 10))
    thinned = [{"round": r, "client": 0} for r in range(1, 2001, 100)]
    assert [v["round"] for v in choose_victims(thinned, "auto", "all")] == list(range(1, 2001, 200))
    assert [v["round"] for v in choose_victims(thinned, 500, "all")] == [1, 501, 1001, 1501]


def test_a_long_federation_can_be_thinned_without_changing_what_is_kept(tmp_path):
    cheap = ["attack=labels_only", "attack/labels=llg", "limit=off"]
    run = ["run", *cheap, "federation.clients=2", "federation.rounds=4", "federation.batch_size=2"]
    thin = ["federation.capture_every=2", "federation.evaluate_every=2"]
    assert main([*run, f"output_dir={tmp_path / 'whole'}"]) == 0
    assert main([*run, *thin, f"output_dir={tmp_path / 'thin'}"]) == 0
    whole, thinned = (pd.read_csv(tmp_path / name / "rounds.csv") for name in ("whole", "thin"))
    assert list(thinned["round"][thinned.test_accuracy.notna()]) == [1, 3, 4], "each second round, and the last"
    assert thinned.test_accuracy[3] == whole.test_accuracy[3]
    assert list(thinned.train_loss) == list(whole.train_loss)
    for folder in ("captures", "truth"):
        kept = {path.name for path in (tmp_path / "thin" / folder).glob("round-*")}
        assert {name[:11] for name in kept} == {"round-00001", "round-00003"}
        for name in kept:
            assert (tmp_path / "thin" / folder / name).read_bytes() == (tmp_path / "whole" / folder / name).read_bytes()
    assert sorted(set(pd.read_csv(tmp_path / "thin" / "attacks.csv")["round"])) == [1, 3]


@pytest.mark.slow
def test_both_engines_give_the_same_tables_and_captures(tmp_path):
    run = [
        "run",
        "federation.clients=3",
        "federation.rounds=2",
        "federation.fraction=0.7",
        "federation.batch_size=1",
        "attack.max_evaluations=200",
    ]
    for engine in ("local", "ray"):
        assert main([*run, f"engine={engine}", f"output_dir={tmp_path / engine}"]) == 0
    assert tables_without_seconds(tmp_path / "local") == tables_without_seconds(tmp_path / "ray")
    for path in (tmp_path / "local" / "captures").glob("*.shard"):
        assert path.read_bytes() == (tmp_path / "ray" / "captures" / path.name).read_bytes()


@pytest.mark.parametrize("federation", ["fedsgd", "fedavg"])
def test_a_secure_sum_is_judged_by_all_whose_updates_it_holds(tmp_path, federation):
    run = ["run", "attack=labels_only", "attack/labels=known", "threat.labels=true", "federation.clients=5"]
    size = ["federation.rounds=1", "federation.batch_size=2", f"federation={federation}", "federation.local_steps=1"]
    assert main([*run, *size, "attack/view=secure_sum", f"output_dir={tmp_path / 'run'}"]) == 0
    attacks = pd.read_csv(tmp_path / "run" / "attacks.csv")
    leakage = pd.read_csv(tmp_path / "run" / "leakage.csv")
    assert attacks[["round", "client", "batch_size"]].to_numpy().tolist() == [[1, 0, 4], [1, 2, 4]]
    assert (attacks.label_accuracy == 1).all()
    assert (attacks.update_residual < 1e-4).all()
    assert leakage.groupby("client").image.count().tolist() == [4, 4]


def test_a_view_may_be_named_by_its_target(tmp_path, small_run, capsys):
    view = "attack.view={_target_: fedleak.attacks.SecureSum, clients: 9}"
    again = ["attack", f"run_dir={small_run}", "attack=labels_only", f"output_dir={tmp_path}"]
    assert main([*again, view]) == 2
    assert "attack.view.clients=9: no round has so many usable updates" in capsys.readouterr().err


@pytest.mark.parametrize("view", ["sum", "models"])
def test_what_a_view_withholds_is_not_captured(tmp_path, view, capsys):
    small = ["run", "federation.rounds=3", "federation.batch_size=1", "federation.clients=3", "attack=labels_only"]
    folder = tmp_path / view
    assert main([*small, "limit=off", f"threat.view={view}", f"output_dir={folder}"]) == 0
    seen = CaptureStore.open(folder / "captures").load()
    assert [(o.round, o.clients) for o in seen] == [(r, (0, 1, 2)) for r in (1, 2, 3)]
    assert all(bool(o.update) == (view == "sum") for o in seen)
    assert len(list((folder / "captures").glob("round-*.shard"))) == 3
    attacks = pd.read_csv(folder / "attacks.csv")
    assert attacks["round"].tolist() == ([1, 2, 3] if view == "sum" else [1, 2])
    assert (attacks.update_residual < 1e-5).all()
    again = ["attack", f"run_dir={folder}", "attack=labels_only", f"output_dir={tmp_path / 'again'}"]
    assert main([*again, "threat.view=updates"]) == 2
    assert "threat.view=updates:" in capsys.readouterr().err


def test_an_attack_may_see_less_than_was_captured_but_no_gap(tmp_path, small_run, capsys):
    again = ["attack", f"run_dir={small_run}", "attack=labels_only", f"output_dir={tmp_path / 'again'}"]
    assert main([*again, "threat.view=models"]) == 0
    gap = ["run", "federation.rounds=5", "federation.capture_every=2", "threat.view=models"]
    assert main([*gap, f"output_dir={tmp_path / 'gap'}"]) == 2
    assert "choose federation.capture_every=1" in capsys.readouterr().err


def test_joint_attacks_need_the_same_batch_in_every_round(tmp_path, capsys):
    joint = ["run", "attack=joint", "attack.max_evaluations=20", "federation.rounds=2", "federation.batch_size=1"]
    assert main([*joint, f"output_dir={tmp_path / 'fresh'}"]) == 2
    assert "choose federation.batches=fixed" in capsys.readouterr().err
    folder = tmp_path / "fixed"
    assert main([*joint, "federation.batches=fixed", "limit=off", f"output_dir={folder}"]) == 0
    assert pd.read_csv(folder / "attacks.csv")["round"].tolist() == [1, 2]


@pytest.mark.parametrize("attack", ["fedavg", "surrogate"])
def test_clients_of_several_epochs_are_attacked_from_the_command_line(tmp_path, attack):
    command = ["run", "federation=fedavg", "federation.epochs=2", "federation.optimizer=momentum", f"attack={attack}"]
    few = ["federation.rounds=1", "federation.local_steps=2", "federation.batch_size=1", "attack.max_evaluations=6"]
    assert (
        main(
            [*command, *few, "threat.labels=true", "attack/labels=known", "limit=off", f"output_dir={tmp_path / 'run'}"]
        )
        == 0
    )
    assert pd.read_csv(tmp_path / "run" / "attacks.csv").update_residual.max() < 1e-5


def test_an_adaptive_attack_stands_beside_the_naive_one(tmp_path, capsys):
    folder = tmp_path / "run"
    overrides = ["federation.clients=2", "federation.rounds=1", "federation.batch_size=1", "data.image_size=12"]
    adaptive = [
        "attack.adaptive=true",
        "attack.restarts=1",
        "attack.max_evaluations=60",
        "defense=pruning",
        "defense.ratio=0.7",
    ]
    assert main(["run", *overrides, *adaptive, f"output_dir={folder}"]) == 0
    table = pd.read_csv(folder / "attackers.csv").set_index("attacker")
    assert list(table.index) == ["naive", "adaptive"]
    assert table.loc["adaptive", "recovered"] == 1 > table.loc["naive", "recovered"]
    summary = json.loads((folder / "summary.json").read_text())
    assert [row["recovered"] for row in summary["attackers"]] == [0, 1]
    assert summary["recovered"] == 1
    assert "naive: 0 of 1 images recovered" in capsys.readouterr().out
    assert "one who knows nothing of a defense" in (folder / "report.html").read_text()
