"""MixUp against its formula, and error feedback over rounds."""

import pytest
import torch

from fedleak.defenses import Chain, MixUp, NoDefense, Pruning
from fedleak.errors import UsageError
from fedleak.federation.client import WITHHELD, train_once
from fedleak.federation.records import ARRAYS, to_tensors
from fedleak.federation.scenario import build_scenario
from fedleak.interrupted import where_it_stopped
from fedleak.setup import compose
from fedleak.truth import TruthStore


def test_blends_of_images_and_labels_are_alike():
    images, labels = torch.rand(6, 1, 4, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    mixed, shares = MixUp(1.0).data(images, labels, classes=3, generator=torch.Generator().manual_seed(0))
    assert shares.shape == (6, 3)
    torch.testing.assert_close(shares.sum(1), torch.ones(6))
    torch.testing.assert_close(shares.sum(0), torch.full((3,), 2.0))  # everyone is blended in once
    torch.testing.assert_close(mixed.sum(0), images.sum(0))
    hot = torch.nn.functional.one_hot(labels, 3).float()
    generator = torch.Generator().manual_seed(0)
    share = MixUp(1.0)._share(generator)
    other = torch.randperm(6, generator=generator)
    torch.testing.assert_close(mixed, share * images + (1 - share) * images[other])
    torch.testing.assert_close(shares, share * hot + (1 - share) * hot[other])
    again, _ = Chain([NoDefense(), MixUp(1.0)]).data(
        images, labels, classes=3, generator=torch.Generator().manual_seed(0)
    )
    assert torch.equal(again, mixed)


def test_impossible_blends_and_feedback_are_refused():
    for alpha in (0, -1, float("inf")):
        with pytest.raises(UsageError, match=r"defense\.alpha"):
            MixUp(alpha)
    with pytest.raises(UsageError, match=r"defense\.feedback"):
        Pruning(0.5, feedback="yes")


def scenario(*overrides):
    return build_scenario(compose(["federation.clients=1", "data.image_size=12", "attack=none", *overrides]))


def replies(made, rounds, folder, memory):
    parameters, buffers = made.start()
    received = {**parameters, **buffers}
    return [
        to_tensors(train_once(made, 0, n, received, TruthStore(folder), memory=memory).array_records[ARRAYS])
        for n in range(1, rounds + 1)
    ]


def test_what_was_zeroed_is_sent_later(tmp_path):
    from flwr.app import RecordDict

    plain = replies(scenario(), 3, tmp_path, RecordDict())
    memory = RecordDict()
    sent = replies(scenario("defense=pruning", "defense.ratio=0.8", "defense.feedback=true"), 3, tmp_path, memory)
    rest = to_tensors(memory.array_records[WITHHELD])
    for name in plain[0]:
        total = sum(reply[name] for reply in plain)
        torch.testing.assert_close(sum(reply[name] for reply in sent) + rest[name], total, rtol=1e-4, atol=1e-6)
        assert (sent[2][name] == 0).float().mean() == pytest.approx(0.8, abs=0.1)
    once = replies(scenario("defense=pruning", "defense.ratio=0.8"), 1, tmp_path, RecordDict())
    assert all(torch.equal(once[0][name], sent[0][name]) for name in once[0])
    assert Chain([NoDefense(), Pruning(0.5, feedback=True)]).feedback


def test_clients_train_on_blends(tmp_path):
    plain, mixed = (replies(scenario(*d), 1, tmp_path, None)[0] for d in ([], ["defense=mixup"]))
    assert any(not torch.equal(plain[name], mixed[name]) for name in plain)


def test_a_memory_that_died_with_a_run_is_said(tmp_path, monkeypatch):
    from fedleak import interrupted

    monkeypatch.setattr(interrupted.Checkpoint, "read", lambda folder: object())
    with pytest.raises(UsageError, match="remember what they withheld"):
        where_it_stopped(compose(["defense=pruning", "defense.feedback=true"]), tmp_path)
