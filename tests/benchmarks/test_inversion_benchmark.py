import csv
import dataclasses
import gzip
import importlib.util
import itertools
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("inversion_benchmark", ROOT / "benchmarks" / "inversion.py")
bench = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = bench
spec.loader.exec_module(bench)


@pytest.fixture
def data(tmp_path):
    generator = np.random.default_rng(0)
    digits = generator.integers(0, 255, (6, 28, 28), dtype=np.uint8)
    raw = tmp_path / "mnist" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    sizes = b"".join(size.to_bytes(4, "big") for size in digits.shape)
    packed = gzip.compress(b"\x00\x00\x08\x03" + sizes + digits.tobytes())
    (raw / "t10k-images-idx3-ubyte.gz").write_bytes(packed)
    labels = bytes([3, 1, 4, 1, 5, 9])
    (raw / "t10k-labels-idx1-ubyte").write_bytes(b"\x00\x00\x08\x01" + (6).to_bytes(4, "big") + labels)
    image = pytest.importorskip("PIL.Image")
    for label, name in enumerate(["apple", "bee"]):
        (tmp_path / "cifar100" / name).mkdir(parents=True)
        for number in range(4):
            pixels = np.full((32, 32, 3), [10 * label, number, 255], np.uint8)
            image.fromarray(pixels).save(tmp_path / "cifar100" / name / f"{number}.png")
    return tmp_path


def test_the_images_are_those_on_disk(data):
    digits = bench.Images(data / "mnist", "mnist")
    assert len(digits) == 6
    assert digits[2][0].shape == (1, 28, 28)
    assert [digits[i][1] for i in range(6)] == [3, 1, 4, 1, 5, 9]
    colour = bench.Images(data / "cifar100", "cifar100")
    image, label = colour[5]
    assert label == 1
    assert image.shape == (3, 32, 32)
    torch.testing.assert_close(image[:, 0, 0], torch.tensor([10, 1, 255]) / 255)


def test_a_missing_folder_is_said(tmp_path):
    with pytest.raises(SystemExit, match="mnist"):
        bench.Images(tmp_path / "mnist", "mnist")
    with pytest.raises(SystemExit, match="cifar100"):
        bench.Images(tmp_path / "cifar100", "cifar100")


def test_victims_depend_on_the_seed_alone_and_labels_are_known_in_batches_only(data):
    images = bench.Images(data / "cifar100", "cifar100")
    one, four = (bench.make_victims(bench.SETTINGS[name], images, 2, 5, "cpu") for name in ("cifar100", "cifar100-b4"))
    more = bench.make_victims(bench.SETTINGS["cifar100"], images, 3, 5, "cpu")
    assert torch.equal(one[1].images, more[1].images)
    assert torch.equal(one[1].observation.update["fc.bias"], more[1].observation.update["fc.bias"])
    assert not torch.equal(one[0].observation.parameters["fc.bias"], one[1].observation.parameters["fc.bias"])
    assert one[0].observation.labels is None
    assert bench.guess(one[0].observation).best.tolist() == one[0].labels.tolist()
    assert bench.guess(four[0].observation).best.tolist() == sorted(four[0].labels.tolist())


def test_recovered_counts_after_the_best_assignment():
    truth = torch.stack([torch.full((1, 2, 2), value) for value in (0.1, 0.5, 0.9)])
    assert bench.recovered(truth[[2, 0, 1]], truth) == 3
    assert bench.recovered(truth[[2, 0, 0]], truth) == 2
    broken = truth.clone()
    broken[1] = torch.nan
    assert bench.recovered(broken, truth) == 2
    assert bench.recovered(truth + 0.04, truth) == 0


def test_a_run_writes_a_row_for_each_method(data, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(bench, "STEPS", 1)
    output = tmp_path / "out.csv"
    arguments = ["--data", str(data), "--victims", "2", "--plain-victims", "1", "--setting", "mnist"]
    bench.main([*arguments, "--output", str(output), "--device", "cpu"])
    rows = list(csv.DictReader(output.open()))
    assert [(r["setting"], r["method"], r["victims"]) for r in rows] == [
        ("mnist", "plain", "1"),
        ("mnist", "engine", "2"),
    ]
    columns = (
        "setting,method,victims,success_rate,evaluations,seconds,successes_per_second,ratio,rate,rate_ratio,median_mse"
    )
    assert ",".join(rows[0]) == columns
    assert float(rows[1]["success_rate"]) == 1
    printed = capsys.readouterr().out
    assert "first 1 of 2" in printed
    assert "engine" in printed


def test_a_batch_of_any_size_is_assigned_as_is_best_in_total():
    generator = np.random.default_rng(3)
    for _ in range(20):
        cost = generator.random((5, 5))
        orders = np.array(list(itertools.permutations(range(5))))
        best = cost[np.arange(5), orders].sum(1).min()
        assert cost[np.arange(5), bench.assigned(cost)].sum() == pytest.approx(best)
    images = torch.rand(16, 1, 4, 4)
    assert bench.recovered(images[torch.randperm(16)], images) == 16


def test_what_the_engine_is_granted_is_none_of_the_victims(data):
    setting = dataclasses.replace(bench.SETTINGS["mnist-b8"], batch_size=2, auxiliary=4)
    images = bench.Images(data / "mnist", "mnist")
    victims = bench.make_victims(setting, images, 1, 0, "cpu")
    granted = bench.auxiliary(setting, images, victims, 0)[0]
    assert len(granted) == 4
    assert not any(bool((image == victims[0].images).flatten(1).all(1).any()) for image in granted)
    assert bench.auxiliary(bench.SETTINGS["mnist"], images, victims, 0) is None


def test_noise_stands_between_the_update_and_the_attacker(data):
    images = bench.Images(data / "cifar100", "cifar100")
    plain, noisy = (
        bench.make_victims(bench.SETTINGS[n], images, 1, 5, "cpu")[0] for n in ("cifar100", "cifar100-noise")
    )
    gap = noisy.observation.update["fc.weight"] - plain.observation.update["fc.weight"]
    assert float(gap.std()) == pytest.approx(1e-3, rel=0.05)


def test_inverting_gradients_settings_are_timed_as_a_loop_and_at_once(data, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "Chooser", lambda: bench.Peeling(bench.engine(bench.SETTINGS["cnn"])))
    monkeypatch.setitem(bench.SETTINGS, "cnn", dataclasses.replace(bench.SETTINGS["cnn"], steps=4))
    output = tmp_path / "out.csv"
    arguments = ["--data", str(data), "--victims", "2", "--setting", "cnn", "--steps", "4", "--device", "cpu"]
    bench.main([*arguments, "--output", str(output)])
    rows = list(csv.DictReader(output.open()))
    assert [(r["method"], r["victims"]) for r in rows] == [("plain", "2"), ("engine", "2"), ("fedleak", "2")]
    assert all(float(r["rate"]) > 0 and float(r["median_mse"]) > 0 for r in rows)
    assert float(rows[1]["rate_ratio"]) == pytest.approx(float(rows[1]["rate"]) / float(rows[0]["rate"]))
    with pytest.raises(SystemExit):
        bench.main([*arguments[:-3], "0"])
    assert bench.SETTINGS["resnet18"].network()(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    assert bench.SETTINGS["convnet"].network()(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
