"""Every closed form against its paper's procedure, done slowly: one update at a time, plain loops, real batches."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import nn

from fedleak.attacks.base import Run
from fedleak.attacks.labels import (
    ILRG,
    LLG,
    RLG,
    ZLG,
    Absolute,
    Bias,
    DummyBatches,
    GradInversion,
    IdentityAux,
    LLGPlus,
    LLGStar,
    Version1,
)
from fedleak.attacks.labels.probe import auxiliary_images, dummy_images
from fedleak.errors import UsageError
from fedleak.threat import ThreatModel

CLASSES = 5


def head_gradient(model, images, labels):
    """∂L/∂W and ∂L/∂b of a batch, as numpy."""
    loss = nn.functional.cross_entropy(model(images), labels)
    weight, bias = torch.autograd.grad(loss, [model.fc.weight, model.fc.bias])
    return weight.numpy(), bias.numpy()


def greedy(start, values, impact, size):
    """Take the smallest, subtract the impact, until the batch is full."""
    labels, values = list(start), np.array(values, dtype=float)
    while len(labels) < size:
        smallest = int(values.argmin())
        labels.append(smallest)
        values[smallest] -= impact
    return sorted(labels)


def llg_rule(g, impact, offset, size):
    g = np.array(g, dtype=float)
    present = [c for c in range(len(g)) if g[c] < 0]
    for c in present:
        g[c] -= impact
    return greedy(present, g - offset, impact, size)


def largest_remainders(expected, size):
    """One label at a time to the class that is furthest below what is expected of it."""
    counts = np.zeros(len(expected), dtype=int)
    for _ in range(size):
        counts[np.argmax(expected - counts)] += 1
    return sorted(np.repeat(np.arange(len(expected)), counts).tolist())


def gradinversion(model, knowledge, weight, bias, size):
    order = weight.min(axis=1).argsort(kind="stable").tolist()
    return sorted(order[k % len(order)] for k in range(size))


def version1(model, knowledge, weight, bias, size):
    g = weight.sum(axis=1)
    return greedy(np.flatnonzero(g < 0), g, g[g < 0].sum() / size, size)


def absolute(model, knowledge, weight, bias, size):
    g = np.sign(weight.sum(axis=1)) * np.abs(weight).sum(axis=1)
    return greedy(np.flatnonzero(g < 0), g, g[g < 0].sum() / size, size)


def llg(model, knowledge, weight, bias, size):
    g = weight.sum(axis=1)
    return llg_rule(g, g[g < 0].sum() / size * (1 + 1 / len(g)), 0.0, size)


def single_class_measures(model, batches):
    """Impact and offsets from real batches, one for each label: mean of g_i given i; of g_j given others."""
    rows = {label: head_gradient(model, images, labels)[0].sum(axis=1) for label, (images, labels) in batches.items()}
    impact = np.mean([rows[i][i] for i in rows])
    offset = [np.mean([rows[i][j] for i in rows if i != j]) for j in range(CLASSES)]
    return impact, np.array(offset)


def llg_star(model, knowledge, weight, bias, size):
    images = dummy_images(knowledge, 16, 0).double()
    batches = {label: (images, torch.full((16,), label)) for label in range(CLASSES)}
    impact, offset = single_class_measures(model, batches)
    return llg_rule(weight.sum(axis=1), impact / size, offset, size)


def llg_plus(model, knowledge, weight, bias, size):
    images, labels = auxiliary_images(knowledge, 5, 0, "llg_plus")
    batches = {label: (images[labels == label], labels[labels == label]) for label in range(CLASSES)}
    impact, offset = single_class_measures(model, batches)
    return llg_rule(weight.sum(axis=1), impact / size, offset, size)


def bias_form(model, knowledge, weight, bias, size):
    return llg_rule(bias, -(1 - 1 / CLASSES) / size, 0.0, size)


def zlg(model, knowledge, weight, bias, size):
    mean = model(dummy_images(knowledge, 16, 0).double()).softmax(dim=1).mean(dim=0).detach().numpy()
    return largest_remainders(size * (mean - bias), size)


def identity_aux(model, knowledge, weight, bias, size):
    mean = model(auxiliary_images(knowledge, 5, 0, "")[0]).softmax(dim=1).mean(dim=0).detach().numpy()
    return largest_remainders(size * (mean - bias), size)


def ilrg(model, knowledge, weight, bias, size):
    rows = [[1.0] * CLASSES]
    confidences = []
    for c in range(CLASSES):
        logits = model.fc.weight.detach().numpy() @ (weight[c] / bias[c]) + model.fc.bias.detach().numpy()
        confidences.append(np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum())
    for j in range(CLASSES):
        rows.append([confidences[i][j] - float(i == j) for i in range(CLASSES)])
    counts = np.linalg.lstsq(np.array(rows), np.array([size, *(size * bias)]), rcond=None)[0]
    return largest_remainders(counts, size)


def rlg(model, knowledge, weight, bias, size):
    left, singular, _ = np.linalg.svd(weight, full_matrices=False)
    rank = min(size, int((singular > 1e-6 * singular[0]).sum()))
    g = weight.sum(axis=1)
    present = []
    for j in range(CLASSES):
        signs = np.where(np.arange(CLASSES) == j, 1.0, -1.0)  # signs · Q z ≤ -1 for every row
        rows = left[:, :rank] * signs[:, None]
        found = linprog(np.zeros(rank), A_ub=rows, b_ub=-np.ones(CLASSES), bounds=[(None, None)] * rank)
        if found.status == 0:
            present.append(j)
    if len(present) in (0, CLASSES):
        present = np.flatnonzero(g < 0).tolist()
    if len(present) > size:
        present = sorted(present, key=lambda c: g[c])[:size]
    return greedy(present, g, g[g < 0].sum() / size, size)


def dummy_batches(model, knowledge, weight, bias, size):
    images = dummy_images(knowledge, 16, 0).double()
    generator = torch.Generator().manual_seed(0)
    batches = torch.randint(16, (16, 16), generator=generator)
    labels = torch.randint(CLASSES, (16, 16), generator=generator)
    shares, sums = [], []
    for batch, names in zip(batches, labels, strict=True):
        sums.append(head_gradient(model, images[batch], names)[0].sum(axis=1))
        shares.append(np.bincount(names.numpy(), minlength=CLASSES) / 16)
    shares, sums = np.array(shares), np.array(sums)
    shares, sums = shares - shares.mean(axis=0), sums - sums.mean(axis=0)
    slope = float(np.polyfit(shares.ravel(), sums.ravel(), 1)[0])
    g = weight.sum(axis=1)
    return greedy(np.flatnonzero(g < 0), g, slope / size, size)


REFERENCES = {
    GradInversion: gradinversion,
    Version1: version1,
    Absolute: absolute,
    LLG: llg,
    LLGStar: llg_star,
    LLGPlus: llg_plus,
    Bias: bias_form,
    ZLG: zlg,
    IdentityAux: identity_aux,
    ILRG: ilrg,
    RLG: rlg,
    DummyBatches: dummy_batches,
}
EVERY = pytest.mark.parametrize("method", REFERENCES, ids=lambda method: method.__name__)


def auxiliary():
    generator = torch.Generator().manual_seed(9)
    images = torch.rand(40, 1, 12, 12, generator=generator, dtype=torch.float64)
    return images, torch.arange(40) % CLASSES


@pytest.fixture
def attacker(knowing):
    return lambda model: knowing(model, CLASSES, auxiliary=auxiliary(), threat=ThreatModel(auxiliary_data=True))


def batch(labels, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(len(labels), 1, 12, 12, generator=generator, dtype=torch.float64), torch.tensor(labels)


@pytest.fixture(scope="module")
def drawn_batches():
    """Labels as hypothesis draws them: duplicates, absent classes, one-class batches, more samples than classes."""
    examples = [[0], [3] * 6, list(range(5)), [1, 1, 4], [0, 0, 0, 0, 2, 2, 4, 1] * 3]

    @settings(max_examples=25, deadline=None, derandomize=True, database=None)
    @given(st.lists(st.integers(0, CLASSES - 1), min_size=1, max_size=30))
    def draw(labels):
        examples.append(labels)

    draw()
    return examples


@EVERY
def test_agrees_with_the_slow_reference(method, drawn_batches, observe, lenet, attacker):
    observations, expected = [], []
    for seed, labels in enumerate(drawn_batches):
        model = lenet(seed, CLASSES, uniform=seed % 2 == 0).double()
        data = batch(labels, seed)
        observations.append(observe(model, *data, round=seed + 1))
        weight, bias = head_gradient(model, *data)
        expected.append(REFERENCES[method](model, attacker(model), weight, bias, len(labels)))
    guesses = method().infer(observations, attacker(lenet(0, CLASSES).double()), Run())
    found = [guess.best.tolist() for guess in guesses]
    wrong = [k for k in range(len(found)) if found[k] != expected[k]]
    assert not wrong, [(drawn_batches[k], found[k], expected[k]) for k in wrong]


@EVERY
@pytest.mark.parametrize("bias", [True, False])
def test_one_step_of_fedavg_gives_the_labels_of_fedsgd(method, bias, observe, lenet, attacker):
    for seed in range(4):
        model = lenet(seed, CLASSES, uniform=True, bias=bias).double()
        data = batch([0, 0, 1, 1, 1, 4, 2][: 3 + seed], seed)
        observations = [observe(model, *data, payload=payload) for payload in ("gradient", "weights")]
        guesses = method().infer(observations, attacker(model), Run(), candidates=3)
        assert torch.equal(guesses[0].labels, guesses[1].labels)
        assert guesses[0].labels.shape[1] == len(data[1])


@EVERY
def test_all_labels_of_several_local_steps(method, observe, lenet, attacker):
    model = lenet(5, CLASSES).double()
    data = batch([0, 0, 1, 4, 4, 4, 2, 3, 0], 5)
    observations = [observe(model, *data, payload=payload, steps=3) for payload in ("gradient", "weights")]
    guesses = method().infer(observations, attacker(model), Run())
    assert [guess.best.shape for guess in guesses] == [(9,), (9,)]
    assert torch.equal(guesses[0].best, guesses[1].best)


@EVERY
def test_an_error_is_passed_over_and_a_withheld_batch_size_refused(method, observe, lenet, attacker):
    model = lenet(5, CLASSES).double()
    good = observe(model, *batch([0, 1, 1], 0))
    broken = observe(model, *batch([0, 1, 1], 0), error="NaN in the update")
    assert [guess is None for guess in method().infer([broken, good, broken], attacker(model), Run())] == [
        True,
        False,
        True,
    ]
    assert "batch_size" in method.needs
    with pytest.raises(UsageError, match=r"threat\.batch_size=true"):
        method().infer([observe(model, *batch([0, 1], 0), batch_size=None)], attacker(model), Run())


@pytest.mark.parametrize("method", [LLGStar, LLGPlus, Bias, ZLG, IdentityAux, ILRG, DummyBatches])
def test_methods_that_need_the_scale_say_so(method, observe, lenet, attacker):
    model = lenet(5, CLASSES).double()
    observation = observe(model, *batch([0, 1, 1], 0), payload="weights", grant_lr=False)
    with pytest.raises(UsageError, match=r"threat\.hyperparameters=true"):
        method().infer([observation], attacker(model), Run())


@pytest.mark.parametrize("method", [LLGPlus, IdentityAux])
def test_methods_that_need_auxiliary_data_say_so(method, observe, lenet, knowing):
    model = lenet(5, CLASSES).double()
    assert "auxiliary_data" in method.needs
    with pytest.raises(UsageError, match=r"threat\.auxiliary_data=true"):
        method().infer([observe(model, *batch([0, 1, 1], 0))], knowing(model, CLASSES), Run())


def test_the_identity_is_exact_when_the_mean_probability_is(observe, lenet, knowing):
    """With the private batch itself as auxiliary data p̄ is exact, and so are the counts."""
    model = lenet(3, CLASSES, uniform=True).double()
    images, labels = batch([0, 0, 0, 1, 3, 3, 4], 3)
    knowledge = knowing(model, CLASSES, auxiliary=(images, labels), threat=ThreatModel(auxiliary_data=True))
    guess = IdentityAux(per_class=9).infer([observe(model, images, labels)], knowledge, Run())[0]
    assert guess.best.tolist() == labels.tolist()
