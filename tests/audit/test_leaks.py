"""Which tensors of an update leak, and how much."""

import json

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from fedleak.attacks.base import Knowledge
from fedleak.audit.findings import as_json, examine
from fedleak.audit.leaks import leaks
from fedleak.audit.preflight import preflight
from fedleak.audit.report import Audit, render
from fedleak.audit.statement import Statement
from fedleak.audit.wire import Exchange


def one_image(samples: int = 1, noise: float = 0.0):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.Sigmoid(), nn.Linear(32, 10))
    images, labels = torch.rand(samples, 1, 8, 8), torch.arange(samples)
    cross_entropy(model(images), labels).backward()
    sent = {n: v.clone() for n, v in model.state_dict().items()}
    reply = {n: p.grad + noise * torch.randn(p.shape) for n, p in model.named_parameters()}
    exchange = Exchange(1, "7", 0, sent, reply, {}, {"m": {"num-examples": samples}})
    knowledge = Knowledge(model, (1, 8, 8), 10)
    stated = Statement(payload="gradient", batch_size=samples, epochs=1, steps=1, source="stated")
    [found] = preflight([exchange], knowledge, [stated])
    return found, knowledge, images, labels.bincount(minlength=10).tolist()


def test_an_update_tells_of_its_image_and_the_first_layer_most():
    found, knowledge, images, counts = one_image()
    told = leaks(found, knowledge, counts, 0.0, images, seed=0)
    rows = {row.name: row for row in told.tensors}
    assert told.where == "at the attacker's own images"
    assert told.coordinates == 64
    assert sum(row.share for row in rows.values()) == pytest.approx(1)
    assert told.expected_mse[0] < 1e-8 < told.prior_mse
    assert rows["1.weight"].expected_mse < 1e-8, "weights over bias are the image itself"
    assert rows["3.bias"].expected_mse > 1e-3, "ten numbers are no image"
    assert all(0 < row.image_bits <= told.image_bits + 1e-6 for row in rows.values())
    assert all(row.image_bits <= row.bits_at_most * 1.5 for row in rows.values())
    assert "exactly" in rows["1.weight"].tells
    assert "labels" in rows["3.weight"].tells


def test_noise_takes_bits_and_so_does_mixing():
    clean, knowledge, _, counts = one_image(4)
    noisy, _, _, _ = one_image(4, noise=0.01)
    assert noisy.noise is not None
    told, less = (leaks(p, knowledge, counts, 0.0, None, seed=0) for p in (clean, noisy))
    assert "at made-up images" in told.where
    assert less.image_bits < 0.5 * told.image_bits
    assert sum(less.expected_mse) > 10 * sum(told.expected_mse)
    rows = {row.name: row for row in told.tensors}
    assert "4 independent mixtures of 4" in rows["1.weight"].tells


def test_it_is_in_the_json_and_on_the_page_and_never_costs_the_verdict(monkeypatch):
    found, knowledge, _, _ = one_image()
    [finding] = examine([found], knowledge, seconds=0)
    data = json.loads(json.dumps(as_json(finding)))
    assert [row["name"] for row in data["tensors"]] == ["1.weight", "1.bias", "3.weight", "3.bias"]
    assert data["limit"]["image_bits"] is None
    assert data["limit"]["where"].startswith("not computed")
    assert "Which tensors leak" in render(Audit("one", [finding], "fedleak audit", {}))
    monkeypatch.setattr("fedleak.audit.findings.leaks", lambda *_, **__: 1 / 0)
    [broken] = examine([found], knowledge, seconds=0)
    assert broken.verdict == finding.verdict
    assert "no listing of tensors" in broken.notes[0]
    assert as_json(broken)["tensors"] == []
