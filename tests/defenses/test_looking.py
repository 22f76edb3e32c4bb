"""Defenses that look at the client: Soteria at its model and images, OUTPOST at its weights; against literal loops."""

import math

import pytest
import torch
from torch.func import functional_call

from fedleak.cli import main
from fedleak.defenses import Chain, ClientView, NoDefense, Outpost, Pruning, Soteria
from fedleak.errors import UsageError
from fedleak.models import LeNet
from fedleak.training import LocalTraining


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def client():
    torch.manual_seed(0)
    model = LeNet((1, 8, 8), 4)
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    return ClientView(parameters, {}, model, torch.rand(2, 1, 8, 8), torch.tensor([1, 3]))


def gradient(client):
    leaves = {name: value.clone().requires_grad_() for name, value in client.parameters.items()}
    loss = torch.nn.functional.cross_entropy(functional_call(client.model, leaves, (client.images,)), client.labels)
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def test_soteria_hides_the_features_whose_sensitivity_is_least(client):
    score = []
    for feature in range(client.model.fc.in_features):
        total = 0.0
        for image in client.images:
            x = image[None].clone().requires_grad_()
            value = client.model.body(x)[0, feature]
            (slope,) = torch.autograd.grad(value, x)
            total += math.sqrt(sum(s * s for s in slope.flatten().tolist())) / abs(float(value))
        score.append(total)
    hidden = sorted(range(len(score)), key=score.__getitem__)[: int(0.3 * len(score))]
    before = gradient(client)
    after = Soteria(0.3).seeing(client).apply(before, generator=generator())
    assert after["fc.weight"].abs().sum(0).eq(0).nonzero().flatten().tolist() == sorted(hidden)
    rest = [i for i in range(len(score)) if i not in hidden]
    assert torch.equal(after["fc.weight"][:, rest], before["fc.weight"][:, rest])
    assert all(torch.equal(after[name], before[name]) for name in before if name != "fc.weight")
    again = Soteria(0.3).imitate(after, LocalTraining()).function(before)
    assert all(torch.equal(again[name], after[name]) for name in before)


def test_soteria_needs_the_client(client):
    with pytest.raises(UsageError, match="looks at the client's model and images"):
        Soteria().apply(gradient(client), generator=generator())
    attacker = ClientView(client.parameters, {})
    assert Soteria().seeing(attacker).hidden is None
    convolutional = ClientView({}, {}, torch.nn.Conv2d(1, 1, 1), client.images)
    with pytest.raises(UsageError, match="no fully connected layer"):
        Soteria().seeing(convolutional)


def test_outpost_prunes_and_adds_noise_where_the_information_is_largest(client):
    each = {name: torch.randn(3, *value.shape, generator=generator(1)) for name, value in client.parameters.items()}
    defense = Outpost(noise=0.0, fisher=0.0, ratio=0.5).seeing(client)
    pruned = {name: value.mean(0) for name, value in defense.examples(each, generator=generator()).items()}
    expected = Pruning(0.5).apply({name: value.mean(0) for name, value in each.items()}, generator=generator())
    for name, value in pruned.items():
        torch.testing.assert_close(value, expected[name], atol=1e-6, rtol=1e-5)
    noisy = Outpost(noise=1000.0, fisher=0.25, ratio=0.0).seeing(client)
    moved = {n: v.mean(0) - each[n].mean(0) for n, v in noisy.examples(each, generator=generator()).items()}
    information = {name: value.square().mean(0) for name, value in each.items()}
    everything = sorted((float(x) for value in information.values() for x in value.flatten()), reverse=True)
    least = everything[int(0.25 * len(everything)) - 1]
    for name, value in moved.items():
        assert torch.equal(value.abs() > 1e-5, information[name] >= least)
        drawn = value[information[name] >= least]
        if len(drawn) > 50:
            risk = min(1.0, float(client.parameters[name].var()))
            assert float(drawn.std()) == pytest.approx(1000 * risk, rel=5 / math.sqrt(2 * len(drawn)))


def test_outposts_imitation_knows_the_zeros_and_the_noise(client):
    observed = {name: torch.randn(value.shape, generator=generator(2)) for name, value in client.parameters.items()}
    observed["fc.bias"][:2] = 0
    defense = Outpost(noise=0.5, fisher=0.1, ratio=0.5)
    with pytest.raises(UsageError, match="looks at the client's weights"):
        defense.imitate(observed, LocalTraining())
    found = defense.seeing(ClientView(client.parameters, {})).imitate(observed, LocalTraining(local_steps=1))
    assert found.function(observed)["fc.bias"].eq(0).tolist()[:2] == [True, True]
    share = sum(int((std > 0).sum()) for std in found.noise.values()) / sum(v.numel() for v in observed.values())
    assert share == pytest.approx(0.1, abs=0.01)


def test_in_a_chain_each_part_sees_the_client(client):
    chain = Chain([Soteria(0.3), Outpost(), NoDefense()]).seeing(client)
    assert chain.parts[0].hidden is not None
    assert chain.parts[1].risk is not None
    assert chain.per_example


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Soteria(1.0), r"defense\.ratio=1\.0 is no fraction of features"),
        (lambda: Outpost(noise=-1), r"defense\.noise=-1 .*at least 0"),
        (lambda: Outpost(fisher=1.5), r"defense\.fisher=1\.5 is no fraction"),
        (lambda: Outpost(ratio=1.0), r"defense\.ratio=1\.0 is no fraction"),
    ],
)
def test_impossible_strengths(make, message):
    with pytest.raises(UsageError, match=message):
        make()


@pytest.mark.parametrize("defense", ["soteria", "outpost"])
def test_in_a_federation(defense, tmp_path):
    small = ["federation.clients=2", "federation.rounds=1", "federation.batch_size=1", "data.image_size=8"]
    told = ["attack=idlg", "attack.restarts=1", "attack.max_evaluations=3", "attack.adaptive=true", "limit=off"]
    out = f"output_dir={tmp_path / 'run'}"
    assert main(["run", f"defense={defense}", *small, *told, "threat.defense=true", out]) == 0
