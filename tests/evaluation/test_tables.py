import io
import json
import math

import pandas as pd
import pytest
import torch

from fedleak.attacks.results import Reconstruction
from fedleak.evaluation.matching import LEAKAGE_COLUMNS, match
from fedleak.evaluation.tables import ATTACK_COLUMNS, leakage_by_round, round_table, score, summarise
from fedleak.truth import Truth

NAMES = {"attack": "idlg", "defense": "none", "batch_size": 4, "update_residual": 1e-7}


def batch(labels: list[int], *, channels: int = 1, round: int = 3, client: int = 5) -> Truth:
    generator = torch.Generator().manual_seed(len(labels))
    images = torch.rand(len(labels), channels, 12, 12, generator=generator)
    return Truth(round, client, images, torch.tensor(labels))


def rebuilt(images: torch.Tensor, labels: list[int], **changes) -> Reconstruction:
    given = {"round": 3, "client": 5, "objective": 1e-9, "evaluations": 70, "seconds": 0.5, "stop_reason": "converged"}
    return Reconstruction(images=images, labels=torch.tensor(labels, dtype=torch.int64), **(given | changes))


def test_a_shuffled_but_perfect_reconstruction_scores_perfectly():
    truth = batch([2, 2, 7, 9])
    order = [2, 0, 3, 1]
    row, leaks = score(rebuilt(truth.images[order], [7, 2, 9, 2]), truth, **NAMES)
    assert tuple(row) == ATTACK_COLUMNS
    assert all(tuple(leak) == LEAKAGE_COLUMNS for leak in leaks)
    assert row["label_accuracy"] == 1
    assert row["labels_exact"] is True
    assert (row["round"], row["client"], row["update_residual"]) == (3, 5, 1e-7)
    assert [leak["image"] for leak in leaks] == [0, 1, 2, 3]
    assert [leak["label_true"] for leak in leaks] == [leak["label_inferred"] for leak in leaks] == [2, 2, 7, 9]
    assert all(leak["recovered"] is True and leak["mse"] == 0 and leak["psnr"] == math.inf for leak in leaks)


def test_an_image_is_recovered_below_the_threshold_only():
    truth = Truth(1, 0, torch.zeros(2, 1, 12, 12), torch.tensor([0, 1]))
    off = torch.stack([torch.full((1, 12, 12), 0.0316), torch.full((1, 12, 12), 0.0317)])
    _, leaks = score(rebuilt(off, [0, 1]), truth, **NAMES)
    assert sorted(leak["mse"] for leak in leaks) == pytest.approx([0.0316**2, 0.0317**2], rel=1e-4)
    assert {leak["mse"] < 1e-3: leak["recovered"] for leak in leaks} == {True: True, False: False}


def test_a_wrong_label_costs_accuracy_and_stays_with_its_image():
    truth = batch([2, 2, 7, 9])
    row, leaks = score(rebuilt(truth.images.flip(0), [9, 7, 2, 7]), truth, **NAMES)
    assert row["label_accuracy"] == 0.75
    assert row["labels_exact"] is False
    assert [leak["label_inferred"] for leak in leaks] == [7, 2, 7, 9]


def test_without_truth_the_rows_are_there_and_their_scores_empty():
    images = batch([2, 7]).images
    row, leaks = score(rebuilt(images, [2, 7]), None, **NAMES)
    assert row["label_accuracy"] is None
    assert row["labels_exact"] is None
    assert row["evaluations"] == 70
    assert [leak["label_inferred"] for leak in leaks] == [2, 7]
    for leak in leaks:
        assert [leak[c] for c in ("label_true", "mse", "psnr", "ssim", "recovered")] == [None] * 5


def test_leakage_by_round():
    attacks = pd.DataFrame({"round": [1, 1, 3, 5], "label_accuracy": [1.0, 0.5, 0.25, None]})
    leakage = pd.DataFrame(
        {"round": [1, 1, 3, 5], "recovered": [True, False, True, None], "psnr": [40.0, 10.0, math.inf, None]}
    )
    found = leakage_by_round(attacks, leakage)
    assert found[1] == {"label_accuracy": 0.75, "recovered": 0.5, "median_psnr": 25}
    assert found[3] == {"label_accuracy": 0.25, "recovered": 1, "median_psnr": math.inf}
    assert list(found) == [1, 3, 5]
    assert all(math.isnan(value) for value in found[5].values())


def test_images_that_were_never_tried_do_not_count_as_safe():
    attacks = pd.DataFrame(
        {"round": [1, 1, 2], "client": [0, 1, 0], "stop_reason": ["labels_only", "budget", "labels_only"]}
    )
    leakage = pd.DataFrame(
        {"round": [1, 1, 2], "client": [0, 1, 0], "recovered": [False] * 3, "psnr": [None, 9.0, None]}
    )
    found = leakage_by_round(attacks.assign(label_accuracy=1.0), leakage)
    assert found[1] == {"label_accuracy": 1, "recovered": 0, "median_psnr": 9}
    assert math.isnan(found[2]["recovered"])
    table = round_table(pd.DataFrame({"round": [1, 2]}), attacks, leakage)
    assert list(table["recovered"]) == ["0 / 1", ""]
    summary = summarise(attacks, leakage, pd.DataFrame())
    assert (summary["images"], summary["recovered"], summary["images_not_tried"]) == (1, 0, 2)
    none = summarise(attacks.assign(stop_reason="labels_only"), leakage, pd.DataFrame())
    assert (none["images"], none["recovered"], none["images_not_tried"]) == (0, 0, 3)
    assert none["recovered_rate"] is None


def test_a_failed_attack_has_a_row_and_no_leakage():
    nothing = rebuilt(torch.zeros(0, 1, 12, 12), [], stop_reason="client 5 returned NaN", objective=math.nan)
    assert nothing.failed
    row, leaks = score(nothing, batch([1, 2]), **NAMES)
    assert leaks == []
    assert row["stop_reason"] == "client 5 returned NaN"
    assert row["label_accuracy"] is row["labels_exact"] is row["objective"] is None


@pytest.mark.parametrize("placeholders", [0, 4])
def test_labels_alone_pair_equal_labels_first(placeholders):
    truth = batch([4, 4, 1, 0])
    row, leaks = score(
        rebuilt(torch.zeros(placeholders, 1, 12, 12), [0, 4, 8, 9], stop_reason="labels_only"), truth, **NAMES
    )
    assert row["label_accuracy"] == 0.5
    assert [leak["label_inferred"] for leak in leaks] == [4, 8, 9, 0]
    assert [leak["mse"] for leak in leaks] == [None] * 4
    assert [leak["recovered"] for leak in leaks] == [False] * 4
    blank = rebuilt(torch.zeros(placeholders, 1, 12, 12), [0, 4, 8, 9], stop_reason="labels_only")
    assert [(m.label_inferred, m.rebuilt) for m in match(blank, None)] == [(0, None), (4, None), (8, None), (9, None)]


def test_fewer_rebuilt_images_than_private_ones():
    truth = batch([1, 2, 3])
    row, leaks = score(rebuilt(truth.images[2:], [3]), truth, **NAMES)
    assert row["label_accuracy"] == pytest.approx(1 / 3)
    assert [leak["recovered"] for leak in leaks] == [False, False, True]
    assert [leak["mse"] for leak in leaks] == [None, None, 0]


def test_more_rebuilt_images_than_private_ones():
    truth = batch([1, 2, 3])
    row, leaks = score(rebuilt(truth.images, [1, 2, 3]), Truth(3, 5, truth.images[:2], truth.labels[:2]), **NAMES)
    assert len(leaks) == 2
    assert row["label_accuracy"] == 1
    assert row["labels_exact"] is False


def test_matches_at_hand_are_not_made_again():
    truth = batch([1, 2])
    result = rebuilt(truth.images, [1, 2])
    assert score(result, truth, **NAMES, matches=match(result, truth)) == score(result, truth, **NAMES)
    assert score(result, truth, **NAMES, matches=[])[1] == []


def tables() -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame]:
    attacks, leakage = [], []
    for number, labels in ((1, [0, 1]), (3, [0, 9])):
        truth = batch([0, 1], round=number)
        noise = torch.tensor([0.0, 0.2 if number == 3 else 0.0]).reshape(2, 1, 1, 1)
        row, leaks = score(rebuilt((truth.images + noise).clamp(0, 1), labels, round=number), truth, **NAMES)
        attacks.append(row)
        leakage += leaks
    dead = rebuilt(torch.zeros(0, 1, 12, 12), [], round=3, client=6, stop_reason="error: NaN", objective=math.nan)
    attacks.append(score(dead, None, **NAMES)[0])
    rounds = pd.DataFrame({"round": [1, 2, 3], "test_accuracy": [0.1, 0.5, 0.75]})
    return pd.DataFrame(attacks), pd.DataFrame(leakage), rounds


def through_csv(table: pd.DataFrame) -> pd.DataFrame:
    return pd.read_csv(io.StringIO(table.to_csv(index=False)))


@pytest.mark.parametrize("stored", [False, True])
def test_summary(stored):
    attacks, leakage, rounds = map(through_csv, tables()) if stored else tables()
    summary = summarise(attacks, leakage, rounds)
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    median = summary.pop("median_mse"), summary.pop("median_psnr")
    assert median == (0, None)
    assert summary == {
        "rounds": 3,
        "methods": {},
        "final_test_accuracy": 0.75,
        "observations": 3,
        "failed": 1,
        "label_accuracy": 0.75,
        "whole_batch_rate": 0.5,
        "images": 4,
        "recovered": 3,
        "recovered_rate": 0.75,
        "images_not_tried": 0,
        "median_limit_mse": None,
        "median_expected_mse": None,
        "limit_bits": None,
        "evaluations": 210,
        "attack_seconds": 1.5,
        "stop_reasons": {"converged": 2, "error: NaN": 1},
    }


def test_summary_of_a_run_without_attack():
    empty = pd.DataFrame(columns=list(ATTACK_COLUMNS)), pd.DataFrame(columns=list(LEAKAGE_COLUMNS))
    summary = summarise(*empty, pd.DataFrame({"round": [], "test_accuracy": []}))
    assert json.loads(json.dumps(summary, allow_nan=False)) == summary
    assert summary["images"] == summary["recovered"] == summary["observations"] == 0
    assert summary["label_accuracy"] is summary["recovered_rate"] is summary["final_test_accuracy"] is None


@pytest.mark.parametrize("stored", [False, True])
def test_round_table(stored):
    attacks, leakage, rounds = map(through_csv, tables()) if stored else tables()
    table = round_table(rounds, attacks, leakage)
    assert table["round"].tolist() == [1, 2, 3]
    assert table["test_accuracy"].tolist() == [0.1, 0.5, 0.75]
    assert table["recovered"].tolist() == ["2 / 2", "", "1 / 2"]
    assert table["label_accuracy"].fillna(-1).tolist() == [1, -1, 0.5]


def test_round_table_leaves_out_rounds_that_were_not_attacked_when_there_are_many():
    attacks, leakage, _ = tables()
    rounds = pd.DataFrame({"round": range(1, 101), "test_accuracy": 0.5})
    assert round_table(rounds, attacks, leakage)["round"].tolist() == [1, 3, 100]


@pytest.mark.parametrize("stored", [False, True])
def test_what_was_reached_stands_beside_what_was_possible(stored):
    attacks, leakage, rounds = map(through_csv, tables()) if stored else tables()
    assert "possible_mse" not in round_table(rounds, attacks, leakage)
    truth = batch([0, 1], round=2)
    near = rebuilt((truth.images + 1e-3).clamp(0, 1), [0, 1], round=2, details={"expected_mse": "2e-6 nan"})
    limits = torch.tensor([4e-7, math.inf])
    row, leaks = score(near, truth, **NAMES, limit_mse=limits, limit_bits=512.5)
    assert row["limit_bits"] == 512.5
    assert [leak["limit_mse"] for leak in leaks] == [pytest.approx(4e-7), None]
    assert [leak["expected_mse"] for leak in leaks] == [pytest.approx(2e-6), None]
    attacks, leakage = (pd.DataFrame([*a.to_dict("records"), *b]) for a, b in ((attacks, [row]), (leakage, leaks)))
    table = round_table(rounds, attacks, leakage)
    assert table["possible_mse"].tolist() == ["", "4.0e-07", ""]
    assert table["reached_mse"].tolist() == ["", f"{leaks[0]['mse']:.1e}", ""]
    summary = summarise(attacks, leakage, rounds)
    assert summary["median_limit_mse"] == pytest.approx(4e-7)
    assert summary["median_expected_mse"] == pytest.approx(2e-6)
    assert summary["limit_bits"] == 512.5


def test_tables_from_before_there_were_limits_are_read():
    attacks, leakage, rounds = tables()
    old = attacks.drop(columns="limit_bits"), leakage.drop(columns=["limit_mse", "expected_mse"])
    assert summarise(*old, rounds) == summarise(attacks, leakage, rounds)
    assert round_table(rounds, *old).equals(round_table(rounds, attacks, leakage))
