import argparse
import csv
import importlib.util
import math
import os
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

ROOT = Path(__file__).resolve().parents[2]
spec = importlib.util.spec_from_file_location("scaling_benchmark", ROOT / "benchmarks" / "scaling.py")
bench = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = bench
spec.loader.exec_module(bench)
MNIST = bench.SETTINGS["mnist"]


def row(victims, seconds, restarts=1, **others):
    cost = seconds / victims
    return bench.Row(
        "mnist", "gradient_matching", "own", victims, restarts, seconds=seconds, seconds_per_victim=cost, **others
    )


def test_victims_have_their_own_network_or_share_one():
    own, guesses = bench.make_victims(MNIST, 2, False, 0)
    shared, _ = bench.make_victims(MNIST, 2, True, 0)
    assert not torch.equal(own[0].parameters["fc.weight"], own[1].parameters["fc.weight"])
    assert shared[0].parameters["fc.weight"].data_ptr() == shared[1].parameters["fc.weight"].data_ptr()
    assert not torch.equal(shared[0].update["fc.weight"], shared[1].update["fc.weight"])
    for observation, guess in zip(own, guesses, strict=True):
        assert observation.update["fc.weight"].sum(1).argmin() == guess.best[0]
        assert observation.parameters["fc.weight"].abs().max() <= 0.5


@pytest.mark.parametrize("name", ["mnist", "cifar100"])
def test_flops_are_those_of_double_differentiation(name):
    setting = bench.SETTINGS[name]
    model = bench.LeNet(setting.shape, setting.classes)
    image = torch.rand(1, *setting.shape, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        loss = F.cross_entropy(model(image * 1), torch.tensor([0]))  # the counter takes no leaf
        gradients = torch.autograd.grad(loss, list(model.parameters()), create_graph=True)
        torch.autograd.grad(torch.stack([g.square().sum() for g in gradients]).sum(), image)
    # Automatic differentiation pads strided convolutions and computes some outputs that it then cuts off.
    counted = counter.get_total_flops()
    assert 0.8 * counted <= bench.evaluation_flops(setting) <= counted


def test_every_start_runs_for_exactly_its_evaluations_and_the_chunk_is_noted():
    observations, guesses = bench.make_victims(MNIST, 5, False, 0)
    inversion = bench.matching(2, 3, chunk_size=4)
    knowledge = bench.Knowledge(bench.LeNet(MNIST.shape, MNIST.classes), MNIST.shape, MNIST.classes)
    results = inversion.invert(observations, guesses, knowledge, bench.Run())
    assert [result.evaluations for result in results] == [6] * 5
    assert {result.stop_reason for result in results} == {"budget"}
    assert inversion.chunk == 4


def test_ratios_are_to_the_smallest_call_of_the_kind():
    rows = bench.compared([row(4, 4.0, evaluations=8), row(1, 2.0), row(4, 6.0, restarts=3)], 1e9)
    assert [r.ratio_to_one for r in rows] == [0.5, 1.0, 0.25]
    assert math.isnan(rows[1].share_of_peak)
    measured = bench.compared([row(1, 2.0, evaluations=8, gflops_achieved=3.0)], 1e10)[0]
    assert measured.gflops_peak == 10
    assert measured.share_of_peak == pytest.approx(0.3)


def test_saturation_is_the_fewest_victims_within_a_tenth_of_the_best():
    costs = {1: 4.0, 4: 2.0, 16: 1.05, 64: 1.0}
    (line,) = bench.saturation([row(n, n * cost) for n, cost in costs.items()] + [row(64, 1.0, restarts=2)])
    assert "saturated at 16 victims" in line
    assert "may go on" not in line
    (line,) = bench.saturation([row(1, 4.0), row(4, 4.0)])
    assert "at 4 victims" in line
    assert "may go on" in line


def test_numbers_are_sorted_and_positive():
    assert bench.numbers("16,1,4,4") == [1, 4, 16]
    for text in ("0,1", "1,x", ""):
        with pytest.raises((ValueError, argparse.ArgumentTypeError)):
            bench.numbers(text)


def test_a_run_without_the_federation_packages_writes_a_row_of_each_kind(tmp_path):
    blocked = ["flwr", "hydra", "ray", "scipy", "pandas", "omegaconf", "sklearn", "skimage"]
    output = tmp_path / "out.csv"
    arguments = ["scaling.py", "--victims", "1,3", "--restarts", "1,2", "--restart-victims", "3", "--evaluations", "2"]
    arguments += ["--setting", "mnist", "--threads", "1", "--device", "cpu", "--output", str(output)]
    arguments += ["--closed-form-victims", "1"]
    code = f"""
import runpy, sys
sys.modules.update(dict.fromkeys({blocked}))
sys.argv = {arguments}
runpy.run_path("benchmarks/scaling.py", run_name="__main__")
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    rows = list(csv.DictReader(output.open()))
    assert list(rows[0]) == [field.name for field in fields(bench.Row)]
    kinds = [(r["method"], r["victims"], r["restarts"], r["evaluations"]) for r in rows]
    assert kinds == [
        ("gradient_matching", "1", "1", "2"),
        ("gradient_matching", "3", "1", "6"),
        ("gradient_matching", "3", "2", "12"),
        ("closed_form", "1", "1", "0"),
    ]
    for r in rows:
        assert float(r["seconds"]) > 0
        assert 0 < float(r["peak_mebibytes"]) < 2000
    assert [r["chunk"] for r in rows] == ["1", "3", "3", "0"]
    assert 0 < float(rows[1]["share_of_peak"]) < 1
    assert rows[0]["ratio_to_one"] == "1"
    assert "saturated at" in done.stdout
