"""How clients train: optimisers against torch's own, and the loop over local steps under every way of using it."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.func import functional_call, grad, jvp, vmap
from torch.nn.functional import cross_entropy

from fedleak.errors import UsageError
from fedleak.models import LeNet
from fedleak.threat import ThreatModel
from fedleak.training import SGD, Adam, AdamW, ClientOptimizer, LocalTraining, unroll

LR = st.floats(1e-3, 0.5)
SHARE = st.floats(0.0, 0.95)
DECAY = st.sampled_from([0.0, 0.01, 0.3])


@st.composite
def optimizers(draw: st.DrawFn) -> tuple[ClientOptimizer, type[torch.optim.Optimizer], dict]:
    """One of ours, torch's, and torch's arguments."""
    lr, decay = draw(LR), draw(DECAY)
    if draw(st.booleans()):
        momentum = draw(SHARE)
        nesterov = momentum > 0 and draw(st.booleans())
        theirs = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": decay}
        return SGD(lr, momentum, nesterov, decay), torch.optim.SGD, theirs
    betas, eps = (draw(SHARE), draw(st.floats(0.5, 0.9999))), draw(st.sampled_from([1e-8, 1e-3]))
    theirs = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": decay}
    if draw(st.booleans()):
        return Adam(lr, betas, eps, decay), torch.optim.Adam, theirs
    return AdamW(lr, betas, eps, decay), torch.optim.AdamW, theirs


@settings(max_examples=40, deadline=None, derandomize=True)
@given(optimizers(), st.integers(0, 1000))
def test_every_step_is_that_of_torch(pair, seed):
    ours, kind, arguments = pair
    random = torch.Generator().manual_seed(seed)
    weights = {name: torch.randn(shape, generator=random, dtype=torch.float64) for name, shape in SHAPES.items()}
    theirs = [value.clone().requires_grad_() for value in weights.values()]
    optimizer, state = kind(theirs, **arguments), ours.init(weights)
    for _ in range(4):
        gradient = {n: torch.randn(v.shape, generator=random, dtype=torch.float64) for n, v in weights.items()}
        before = {name: value.clone() for name, value in weights.items()}
        state, after = ours.step(state, weights, gradient)
        assert all(torch.equal(weights[name], before[name]) for name in weights), "out of place"
        for value, given_ in zip(theirs, gradient.values(), strict=True):
            value.grad = given_.clone()
        optimizer.step()
        weights = after
        for value, reference in zip(weights.values(), theirs, strict=True):
            torch.testing.assert_close(value, reference.detach(), rtol=1e-12, atol=1e-12)


SHAPES = {"w": (3, 2), "b": (2,)}


@pytest.mark.parametrize("lr", [0, -1.0, float("nan"), float("inf"), True, "0.1"])
def test_an_impossible_learning_rate_is_refused(lr):
    with pytest.raises(UsageError, match=rf"^lr={lr} .*give"):
        SGD(lr)


def test_adam_can_be_differentiated_where_a_gradient_is_zero():
    start = {"w": torch.zeros(2, dtype=torch.float64)}

    def moved(gradient):
        adam = Adam(0.1)
        return adam.step(adam.init(start), start, {"w": gradient})[1]["w"].sum()

    assert grad(moved)(torch.tensor([0.0, 1.0], dtype=torch.float64)).isfinite().all()


def problem(steps, batch=2):
    torch.manual_seed(0)
    model = LeNet((1, 8, 8), 3).double()
    images, labels = torch.rand(steps * batch, 1, 8, 8).double(), torch.randint(0, 3, (steps * batch,))
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    return model, start, images, labels


def gradients_of(model, images, labels, training):
    def loss(weights, images, labels):
        return cross_entropy(functional_call(model, weights, (images,)), labels)

    return lambda step, weights: grad(loss)(weights, training.batch(images, step), training.batch(labels, step))


@pytest.mark.parametrize("optimizer", [SGD(0.2), SGD(0.2, 0.9, True), Adam(0.01), AdamW(0.01)], ids=str)
@pytest.mark.parametrize("payload", ["gradient", "weights"])
def test_the_loop_goes_over_the_batches_of_an_epoch_again(optimizer, payload):
    training = LocalTraining(payload, 2, 3, epochs=2, optimizer=optimizer)
    model, start, images, labels = problem(3)
    found = unroll(gradients_of(model, images, labels, training), start, training)
    weights, state, total = start, optimizer.init(start), dict.fromkeys(start, 0.0)
    for step in (0, 1, 2, 0, 1, 2):  # by hand
        leaves = {name: value.clone().requires_grad_() for name, value in weights.items()}
        part = slice(2 * step, 2 * step + 2)
        loss = cross_entropy(functional_call(model, leaves, (images[part],)), labels[part])
        gradient = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        total = {name: total[name] + value for name, value in gradient.items()}
        state, weights = optimizer.step(state, weights, gradient)
    for name, value in (total if payload == "gradient" else weights).items():
        torch.testing.assert_close(found[name], value)
    if payload == "gradient" or optimizer == SGD(0.2):
        mean = training.mean_gradient(start, found)
        for name, value in total.items():
            torch.testing.assert_close(mean[name], value / 6)


@pytest.mark.parametrize("optimizer", [SGD(0.2, 0.9), Adam(0.01)], ids=str)
def test_the_loop_can_be_differentiated_vectorised_and_pushed_forward(optimizer):
    training = LocalTraining("weights", 2, 2, epochs=2, optimizer=optimizer)
    model, start, images, labels = problem(2)

    def sent(images):
        return unroll(gradients_of(model, images, labels, training), start, training)["fc.bias"]

    direction = torch.randn_like(images)
    _, forward = jvp(sent, (images,), (direction,))
    along = (sent(images + 1e-6 * direction) - sent(images - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close(forward, along, rtol=1e-4, atol=1e-8)
    several = vmap(sent)(torch.stack([images, images.flip(3)]))
    torch.testing.assert_close(several, torch.stack([sent(images), sent(images.flip(3))]))
    leaf = images.clone().requires_grad_()
    (back,) = torch.autograd.grad(sent(leaf).sum(), leaf)
    torch.testing.assert_close((back * direction).sum(), forward.sum())


def test_what_is_needed_and_withheld_is_asked_for():
    model, start, images, labels = problem(2)
    known = LocalTraining("gradient", 2, 2, optimizer=SGD(0.1))
    for training, missing in (
        (replace(known, local_steps=None), "number of local steps"),
        (replace(known, epochs=None), "number of local steps"),
        (replace(known, optimizer=None), "optimiser"),
        (replace(known, local_steps=1, payload="weights", optimizer=None), "optimiser"),
        (replace(known, local_steps=0), "0 local steps"),
    ):
        with pytest.raises(UsageError, match=missing):
            unroll(gradients_of(model, images, labels, known), start, training)
    one = LocalTraining(local_steps=1)  # one gradient needs no optimiser
    assert list(unroll(gradients_of(model, images, labels, one), start, one)) == list(start)
    with pytest.raises(ValueError, match="7 samples are no 2 equal batches"):
        known.batch(torch.zeros(7), 0)


def test_what_is_not_known_stays_unknown():
    whole = LocalTraining("weights", 4, 5, 3, SGD(0.1))
    assert (whole.steps, whole.samples, whole.single, whole.sign, whole.scale) == (15, 20, False, -1, 1.5)
    assert replace(whole, payload="gradient").scale == 15
    assert replace(whole, optimizer=SGD(0.1, momentum=0.9, weight_decay=0.1)).scale is None
    assert replace(whole, optimizer=Adam(0.1)).scale is None
    assert replace(whole, optimizer=SGD(0.1, momentum=0.9), payload="gradient").scale == 15
    nothing = LocalTraining()
    assert (nothing.steps, nothing.samples, nothing.single, nothing.scale, nothing.lr) == (
        None,
        None,
        False,
        None,
        None,
    )
    seen = whole.seen_by(ThreatModel(batch_size=False, hyperparameters=False))
    assert seen == LocalTraining("weights", epochs=None)
    assert whole.seen_by(ThreatModel()) == whole


def test_a_proximal_term_pulls_each_step_back_to_the_start():
    training = LocalTraining("weights", 2, 3, optimizer=SGD(0.2, 0.9), proximal=0.7)
    model, start, images, labels = problem(3)
    found = unroll(gradients_of(model, images, labels, training), start, training)
    optimizer = torch.optim.SGD(model.parameters(), 0.2, momentum=0.9)
    for step in range(3):
        optimizer.zero_grad()
        loss = cross_entropy(model(training.batch(images, step)), training.batch(labels, step))
        far = sum((p - start[name]).square().sum() for name, p in model.named_parameters())
        (loss + 0.35 * far).backward()
        optimizer.step()
    for name, value in model.named_parameters():
        torch.testing.assert_close(found[name], value.detach())
    assert replace(training, optimizer=SGD(0.2)).scale is None
    assert replace(training, optimizer=SGD(0.2), local_steps=1).scale == 0.2


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (SGD(0.1), lambda p: torch.optim.SGD(p, 0.1)),
        (SGD(0.1, 0.9), lambda p: torch.optim.SGD(p, 0.1, momentum=0.9)),
        (SGD(0.1, 0.9, True, 0.01), lambda p: torch.optim.SGD(p, 0.1, 0.9, weight_decay=0.01, nesterov=True)),
        (Adam(0.01), lambda p: torch.optim.Adam(p, 0.01)),
        (AdamW(0.01), lambda p: torch.optim.AdamW(p, 0.01)),
    ],
    ids=["sgd", "momentum", "nesterov", "adam", "adamw"],
)
def test_a_client_trains_as_torch_would_have_it_train(ours, theirs):
    training = LocalTraining("weights", 2, 3, epochs=2, optimizer=ours)
    model, start, images, labels = problem(3)
    found = unroll(gradients_of(model, images, labels, training), start, training)
    optimizer = theirs(list(model.parameters()))
    for step in range(6):
        optimizer.zero_grad()
        cross_entropy(model(training.batch(images, step)), training.batch(labels, step)).backward()
        optimizer.step()
    for name, value in model.named_parameters():
        torch.testing.assert_close(found[name], value.detach(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
def test_new_weights_under_momentum_are_a_weighted_sum_of_gradients(nesterov):
    training = LocalTraining("weights", 2, 2, epochs=2, optimizer=SGD(0.2, 0.9, nesterov))
    gradients = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    start = {"w": torch.zeros(3, dtype=torch.float64)}
    sent = unroll(lambda step, weights: {"w": gradients[step]}, start, training)
    shares = torch.tensor(training.shares, dtype=torch.float64)
    assert shares[0] > shares[-1] == (1.9 if nesterov else 1)
    assert training.scale == pytest.approx(0.2 * float(shares.sum()))
    torch.testing.assert_close(training.mean_gradient(start, sent)["w"], shares @ gradients / shares.sum())
