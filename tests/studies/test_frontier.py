"""``fedleak frontier``: its table, its controls, a user's own defense, and going on where it was stopped."""

import pandas as pd
import pytest
import torch

from fedleak.attacks import Reconstruction
from fedleak.cli import main
from fedleak.evaluation.matching import match
from fedleak.studies.frontier.cells import COLUMNS, _perceived
from fedleak.studies.frontier.page import sentence
from fedleak.studies.frontier.pictures import draw_privacy
from fedleak.studies.frontier.ranking import draw_ranking, rank
from fedleak.studies.frontier.summary import summarise
from fedleak.truth import Truth

SMALL = [
    "data.image_size=16", "federation.clients=2", "federation.rounds=2",
    "federation.evaluate_every=2", "federation.capture_every=1",
    "frontier.moments=[2]", "frontier.processes=1",
    "frontier.attackers={quick: ['attack=idlg', 'attack.restarts=1', 'attack.max_evaluations=5']}",
]  # fmt: skip


@pytest.fixture(scope="module")
def conf(tmp_path_factory):
    folder = tmp_path_factory.mktemp("conf")
    (folder / "defense").mkdir()
    (folder / "defense" / "quiet.yaml").write_text(
        "# hardly any noise\n_target_: fedleak.defenses.Gaussian\nstd: 0.5\n"
    )
    return folder


@pytest.fixture(scope="module")
def frontier(conf, tmp_path_factory):
    out = tmp_path_factory.mktemp("frontier") / "out"
    defenses = "frontier.defenses={quiet: [1.0e-9], dpsgd: [2.0]}"
    arguments = ["frontier", f"--config-dir={conf}", *SMALL, defenses, f"output_dir={out}"]
    assert main(arguments) == 0
    return out, arguments


def test_the_table(frontier):
    out, _ = frontier
    frame = pd.read_csv(out / "frontier.csv")
    assert tuple(frame.columns) == COLUMNS
    assert set(frame.defense) == {"none", "control", "quiet", "dpsgd"}
    assert len(frame) == 4
    by = frame.set_index("defense")
    assert by.strength.groupby("defense").first().to_dict() == {
        "none": 0, "control": 1, "quiet": 1e-9, "dpsgd": 2
    }  # fmt: skip
    assert by.test_accuracy.drop("control").between(0, 1).all()
    assert by.loc["control", ["test_accuracy", "limit_mse"]].isna().all()
    assert by.epsilon.drop("dpsgd").isna().all()
    assert by.loc["dpsgd", "epsilon"] > 0
    assert by.limit_mse.drop("control").gt(0).all()
    assert by.loc["none", "limit_mse"] < by.loc["dpsgd", "limit_mse"]
    assert by.loc["none", "limit_bits"] > by.loc["dpsgd", "limit_bits"]
    assert frame[["mse", "psnr", "ssim", "recovered", "recognised", "label_accuracy"]].notna().to_numpy().all()
    # Noise of 1e-9 changes nothing that an update of float32 could show.
    assert by.loc["quiet", "mse"] == pytest.approx(by.loc["none", "mse"], rel=0.5)


def test_pictures_page_and_summary(frontier):
    out, _ = frontier
    summary = pd.read_csv(out / "summary.csv")
    assert set(summary.defense) == {"none", "control", "quiet", "dpsgd"}
    bounds = summary.set_index("defense").reconstruction_bound
    assert bounds.drop("dpsgd").isna().all()
    assert 0.1 < bounds["dpsgd"] < 1
    for name in ("frontier.png", "images.png"):
        assert (out / name).read_bytes()[:4] == b"\x89PNG"
    page = (out / "frontier.html").read_text()
    ranking = pd.read_csv(out / "ranking.csv")
    assert {"quiet"} <= set(ranking.defense) <= {"quiet", "dpsgd"}
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page.replace("https://github.com", "")
    assert "dpsgd" in page


def test_what_is_done_is_not_done_again(frontier, capsys):
    out, arguments = frontier
    done = sorted((out / "cells").glob("*/frontier.csv"))
    before = {path: path.stat().st_mtime_ns for path in done}
    done[0].unlink()
    first = pd.read_csv(out / "frontier.csv")
    assert main(arguments) == 0
    after = {path: path.stat().st_mtime_ns for path in done}
    assert [path for path in done if after[path] != before[path]] == [done[0]]
    pd.testing.assert_frame_equal(pd.read_csv(out / "frontier.csv"), first)
    assert main([*arguments, "federation.lr=0.2"]) == 2
    assert "holds a frontier of other settings" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("frontier.defenses={gaussan: [1.0]}", "frontier.defenses=gaussan: no such choice of defense"),
        ("frontier.defenses={gaussian: [-1.0]}", "defense.std=-1.0 is no strength"),
        ("frontier.defenses={sign: [1.0]}", "frontier.defenses.sign=[1.0]: its class names no knob"),
        ("frontier.defenses={control: []}", "frontier.defenses.control: always there"),
        ("frontier.moments=[1,9]", "frontier.moments=[1, 9]: the federation has 2 rounds"),
        ("frontier.seeds=0", "frontier.seeds=0: must be"),
        (
            "frontier.federations={sign: ['model=lenet_precode','model.precode=8']}",
            "frontier.federations.sign: a defense has that name",
        ),
        ("frontier.federations={big: 3}", "frontier.federations.big=3: must be a list of overrides"),
        ("frontier.federations={big: ['federation.batch_size=0']}", "federation.batch_size=0"),
        ("frontier.cost=2", "frontier.cost=2: must be a number between 0 and 1, such as 0.02"),
        ("frontier.lpips=/no/such", "frontier.lpips=/no/such: holds no alexnet"),
        ("frontier.delta=1", "frontier.delta=1: must be a number between 0 and 1"),
        ("frontier.attackers={none: ['attack=none']}", "frontier.attackers.none: attacks nothing"),
        ("defense=gaussian", "defense=gaussian: a frontier has many"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_runs(override, message, tmp_path, capsys):
    assert main(["frontier", *SMALL, override, f"output_dir={tmp_path / 'out'}"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out" / "cells").exists()


def test_the_summary_says_what_is_lost_and_which_defense_leaks_least():
    rows = [
        {"defense": d, "strength": s, "attacker": a, "seed": seed, "round": 1, "test_accuracy": acc - 0.001 * seed}
        | {"epsilon": None, "label_accuracy": 1.0, "mse": mse, "psnr": 10.0, "ssim": 0.5, "recovered": 0.0}
        | {"recognised": 0.5, "limit_mse": mse / 2, "limit_bits": 10.0}
        for seed in range(3)
        for d, s, acc in (("none", 0.0, 0.9), ("mild", 1.0, 0.89), ("hard", 1.0, 0.5))
        for a, mse in (("one", {"none": 1e-6, "mild": 1e-3, "hard": 1e-1}[d]), ("two", 0.3))
    ]
    summary = summarise(pd.DataFrame(rows)).set_index(["defense", "attacker"])
    assert summary.loc[("mild", "one"), "accuracy_lost"] == pytest.approx(0.01)
    assert summary.loc[("hard", "one"), "lost_low"] == pytest.approx(0.4)
    assert summary.loc[("mild", "one"), "mse"] == pytest.approx(1e-3)
    text = sentence(summary.reset_index(), 0.02)
    assert "mild 1 leaks least: the best attack (one)" in text


def test_lpips_is_of_what_was_rebuilt():
    truth = Truth(1, 0, torch.zeros(2, 1, 4, 4), torch.tensor([0, 1]))
    found = Reconstruction(1, 0, torch.full((2, 1, 4, 4), 0.5), torch.tensor([0, 1]), 0.0, 1, 0.0, "budget")
    eyes = lambda true, rebuilt: (true - rebuilt).abs().flatten(1).amax(1)  # noqa: E731
    assert _perceived(match(found, truth), eyes) == 0.5
    assert _perceived(match(found, truth), None) is None
    assert _perceived([], eyes) is None


def test_two_values_have_no_interval_and_three_a_possible_one():
    row = {"defense": "none", "strength": 0.0, "attacker": "one", "round": 1, "epsilon": None, "label_accuracy": 1.0}
    row |= {"psnr": 10.0, "ssim": 0.5, "recovered": 0.5, "recognised": 0.5, "limit_bits": 1.0, "limit_mse": 1e-9}
    errors, accuracies = (1e-13, 0.2, 1e-6), (0.1, 0.9, 0.5)
    rows = [
        row | {"seed": s, "mse": e, "test_accuracy": a} for s, (e, a) in enumerate(zip(errors, accuracies, strict=True))
    ]
    two, three = summarise(pd.DataFrame(rows[:2])).iloc[0], summarise(pd.DataFrame(rows)).iloc[0]
    for name in ("mse", "limit_mse"):
        assert two[[f"{name}_low", f"{name}_high"]].isna().all()
    assert two[["accuracy_low", "lost_high"]].isna().all()
    assert two["recovered_low"] < 0.5 < two["recovered_high"]  # a share has one
    assert three["mse_high"] == 1
    assert 0 < three["mse_low"] < 1e-13
    assert three["limit_mse_low"] == three["limit_mse_high"] == pytest.approx(1e-9)
    assert tuple(three[["accuracy_low", "accuracy_high"]]) == (0, 1)


def test_the_ranking_holds_what_is_affordable_the_least_leaking_first(tmp_path):
    shares = {f"{n}{end}": 0.5 for n in ("recovered", "recognised") for end in ("", "_low", "_high")}
    rows = [
        {"defense": name, "strength": 1.0, "attacker": who, "updates": 6, "accuracy_lost": lost}
        | {"lost_low": lost - 0.01, "lost_high": lost + 0.01}
        | {"limit_mse": limit, "limit_mse_low": limit / 2, "limit_mse_high": limit * 2}
        | {"mse": mse, "mse_low": mse / 2, "mse_high": mse * 2, **shares}
        for name, lost, limit, mse in (
            ("none", 0.0, 1e-14, 1e-14), ("exact", -0.01, 1e-9, 1e-3), ("noise", 0.02, 1e-3, 1e-2),
            ("signs", 0.01, 1e-4, 2e-2), ("dear", 0.03, 0.1, 0.1),
        )
        for who, mse in (("naive", 0.3), ("adaptive", mse))
    ]  # fmt: skip
    ranking = rank(pd.DataFrame(rows), 0.02)
    assert list(ranking.defense) == ["noise", "signs", "exact"]
    assert list(ranking.rank_limit) == [1, 2, 3]
    assert list(ranking.rank_attack) == [2, 1, 3]
    assert set(ranking.attacker) == {"adaptive"}
    draw_ranking(ranking, 0.02, tmp_path / "some.png")
    assert (tmp_path / "some.png").read_bytes()[:4] == b"\x89PNG"
    draw_ranking(rank(pd.DataFrame(rows), -1.0), 0.02, tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_privacy_is_drawn_where_there_are_several_epsilons(tmp_path):
    rows = [
        {"defense": "dpsgd", "strength": s, "attacker": "one", "mse": 0.1 / s, "limit_mse": 0.05 / s, "epsilon": 10 / s}
        | {"reconstruction_bound": 0.5, "recovered": 0.0, "recognised": 0.2, "test_accuracy": 0.5}
        for s in (0.5, 1.0)
    ]
    draw_privacy(pd.DataFrame(rows[:1]), tmp_path / "one.png")
    assert not (tmp_path / "one.png").exists()
    draw_privacy(pd.DataFrame(rows), tmp_path / "two.png")
    assert (tmp_path / "two.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.slow  # fifteen seconds
def test_a_federation_of_another_make_has_its_line(tmp_path):
    narrow = "['model=lenet_precode', 'model.precode=8']"
    made = f"{{precode: {narrow}, flower: ['strategy=dp_client', 'federation.payload=weights']}}"
    others = f"frontier.federations={made}"
    defenses = "frontier.defenses={none: []}"
    assert main(["frontier", *SMALL, "federation.rounds=2", defenses, others, f"output_dir={tmp_path / 'out'}"]) == 0
    frame = pd.read_csv(tmp_path / "out" / "frontier.csv").set_index("defense")
    assert set(frame.index) == {"none", "control", "precode", "flower"}
    assert frame.mse.notna().all()
