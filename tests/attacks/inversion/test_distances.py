"""Distances between updates: the fast path gives what differentiation gives, alone and together."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedleak.attacks.chain.convolution import Convolution
from fedleak.attacks.chain.fully_connected import FullyConnected, factors
from fedleak.attacks.inversion import L2, Cosine, Objective, RelativeL2
from fedleak.attacks.inversion.distances import ChainDistance, Comparison, Distance, GeneralDistance
from fedleak.attacks.problem import Problem, Target
from fedleak.local_update import local_update
from fedleak.training import SGD, Adam, ClientOptimizer, LocalTraining

ACTIVATIONS: list[Callable[[], nn.Module]] = [nn.Sigmoid, nn.Tanh, nn.ReLU, nn.LeakyReLU, nn.ELU, nn.Softplus]
OBJECTIVES = [L2(), L2(relative=True), Cosine(), RelativeL2()]


def build(layers: list[nn.Module], shape: tuple[int, int, int], classes: int) -> nn.Sequential:
    """These layers, flattened into a linear one; weights U(-0.5, 0.5)."""
    features = nn.Sequential(*layers, nn.Flatten())(torch.zeros(1, *shape)).shape[1]
    model = nn.Sequential(*layers, nn.Flatten(), nn.Linear(features, classes)).double()
    for parameter in model.parameters():
        nn.init.uniform_(parameter, -0.5, 0.5)
    return model


@st.composite
def chains(draw: st.DrawFn) -> tuple[nn.Sequential, tuple[int, int, int], int]:
    """A random feed-forward chain with the shape of its images and its number of classes."""
    torch.manual_seed(draw(st.integers(0, 10**6)))
    shape = (draw(st.integers(1, 3)), draw(st.integers(6, 9)), draw(st.integers(6, 9)))
    layers: list[nn.Module] = []
    channels = shape[0]
    for _ in range(draw(st.integers(0, 2))):
        out = draw(st.integers(1, 4))
        kernel, padding = draw(st.sampled_from([(1, 0), (3, 1), ((3, 2), (1, 1)), (5, 2)]))
        bias, stride = draw(st.booleans()), draw(st.integers(1, 2))
        layers.append(nn.Conv2d(channels, out, kernel, stride=stride, padding=padding, bias=bias))
        layers.append(draw(st.sampled_from(ACTIVATIONS))())
        channels = out
    if layers and draw(st.booleans()):
        layers.append(draw(st.sampled_from([nn.AvgPool2d(2), nn.MaxPool2d(2), nn.AvgPool2d(3, 2, 1)])))
    if draw(st.booleans()):
        width = draw(st.integers(3, 20))
        features = nn.Sequential(*layers, nn.Flatten())(torch.zeros(1, *shape)).shape[1]
        layers += [nn.Flatten(), nn.Linear(features, width), nn.Tanh(), nn.Unflatten(1, (width, 1, 1))][:3]
        model = nn.Sequential(*layers, nn.Linear(width, draw(st.integers(2, 12)))).double()
        return model, shape, model[-1].out_features
    classes = draw(st.integers(2, 12))
    return build(layers, shape, classes), shape, classes


def problem_of(
    parameters: dict[str, Tensor], update: dict[str, Tensor], batch: int, *, buffers=None, training_mode: bool = True
) -> Problem:
    """One batch behind one gradient."""
    training = LocalTraining(batch_size=batch, local_steps=1, training_mode=training_mode)
    return Problem(0, (1, 0, 0), (Target(parameters, buffers or {}, update, training),), batch)


def problems_of(model: nn.Module, count: int, batch: int, shape: tuple[int, int, int], classes: int, own: bool):
    """Gradients of random batches, for one set of weights or one each."""
    problems = []
    for _ in range(count):
        if own:
            for parameter in model.parameters():
                nn.init.uniform_(parameter, -0.5, 0.5)
        images, labels = torch.rand(batch, *shape, dtype=torch.float64), torch.randint(classes, (batch,))
        gradients = torch.autograd.grad(nn.functional.cross_entropy(model(images), labels), list(model.parameters()))
        names = [name for name, _ in model.named_parameters()]
        parameters = {name: value.detach().clone() for name, value in model.named_parameters()}
        problems.append(problem_of(parameters, dict(zip(names, gradients, strict=True)), batch))
    return problems


def reference(model: nn.Module, problem: Problem, images: Tensor, labels: Tensor, objective: Objective):
    """One problem by plain automatic differentiation, the textbook way."""
    images, labels = images.clone().requires_grad_(), labels.clone().requires_grad_()
    parameters = {name: value.clone().requires_grad_() for name, value in problem.targets[0].parameters.items()}
    logits = torch.func.functional_call(model, parameters, (images,))
    loss = -(labels * logits.log_softmax(1)).sum(1).mean()
    gradients = torch.autograd.grad(loss, list(parameters.values()), create_graph=True)
    pairs = list(zip(gradients, problem.targets[0].update.values(), strict=True))
    dd = torch.stack([(g - t).square().sum() for g, t in pairs])
    dt = torch.stack([((g - t) * t).sum() for g, t in pairs])
    tt = torch.stack([t.square().sum() for _, t in pairs])
    value = objective(dd[None], dt[None], tt[None])[0]
    return value.detach(), *torch.autograd.grad(value, (images, labels))


@settings(max_examples=30, deadline=None, derandomize=True)  # an unlucky draw cancels digits
@given(chain=chains(), count=st.integers(1, 3), batch=st.integers(1, 3), own=st.booleans(), data=st.data())
def test_both_paths_give_what_plain_differentiation_gives(chain, count: int, batch: int, own: bool, data) -> None:
    model, shape, classes = chain
    objective = data.draw(st.sampled_from(OBJECTIVES))
    torch.manual_seed(count + 10 * batch)
    problems = problems_of(model, count, batch, shape, classes, own)
    images = torch.rand(count, batch, *shape, dtype=torch.float64)
    labels = torch.randn(count, batch, classes, dtype=torch.float64).softmax(2)
    comparison = Comparison(model, objective, shape, dtype=torch.float64)
    fast, general = ChainDistance.fit(comparison, problems), GeneralDistance.fit(comparison, problems)
    assert fast is not None
    assert general is not None
    wanted = [reference(model, *each, objective) for each in zip(problems, images, labels, strict=True)]
    for distance in (fast, general):
        found = distance.evaluate(distance.load(problems), images, labels, with_labels=True)
        for ours, theirs in zip(found, zip(*wanted, strict=True), strict=True):
            assert ours is not None
            theirs = torch.stack(theirs)
            torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9 * max(1.0, float(theirs.abs().max())))


def lenet_like(classes: int = 40) -> nn.Sequential:
    torch.manual_seed(0)
    return build(
        [nn.Conv2d(1, 12, 5, 2, 2), nn.Sigmoid(), nn.Conv2d(12, 12, 5, 1, 2), nn.Sigmoid()], (1, 8, 8), classes
    )


@pytest.mark.parametrize("batch", [1, 4])
def test_factored_layer_keeps_its_precision_where_updates_agree(batch: int) -> None:
    """In float32, at the true images moved by 1e-6, the objective is right although it is 1e-12 of its terms."""
    model, shape, classes = lenet_like(), (1, 8, 8), 40
    images, labels = torch.rand(1, batch, *shape), torch.randint(classes, (1, batch))
    one_hot = nn.functional.one_hot(labels, classes).double()
    parameters = {name: value.detach().clone() for name, value in model.named_parameters()}
    loss = nn.functional.cross_entropy(model(images[0].double()), labels[0])
    gradient = dict(zip(parameters, torch.autograd.grad(loss, list(model.parameters())), strict=True))
    problem = problem_of(parameters, gradient, batch)
    moved = images + 1e-3 * torch.randn(images.shape)
    exact = reference(model, problem, moved[0].double(), one_hot[0], L2())
    fast = ChainDistance.fit(Comparison(model, L2(), shape), [problem])
    assert fast is not None
    assert [layer.rank for layer in fast.layers if isinstance(layer, FullyConnected)] == [batch]
    value, by_images, _ = fast.evaluate(fast.load([problem]), moved, one_hot.float())
    squares = sum(float(g.square().sum()) for g in gradient.values())
    assert float(exact[0]) < 1e-4 * squares  # the naive form would lose four digits of seven here
    torch.testing.assert_close(value[0].double(), exact[0], rtol=2e-3, atol=0)
    torch.testing.assert_close(by_images[0].double(), exact[1], rtol=2e-2, atol=2e-3 * float(exact[1].abs().max()))
    # And exactly at the truth the objective falls to the square of float32's rounding, not to the rounding itself.
    at_truth, _, _ = fast.evaluate(fast.load([problem]), images, one_hot.float())
    assert float(at_truth[0]) < 1e-11 * squares


def test_noisy_gradients_are_not_factored() -> None:
    model, shape = lenet_like(), (1, 8, 8)
    problems = problems_of(model, 2, 1, shape, 40, own=False)
    noisy = {name: value + 1e-3 * torch.randn_like(value) for name, value in problems[1].targets[0].update.items()}
    problems[1] = problem_of(problems[1].targets[0].parameters, noisy, 1)
    fast = ChainDistance.fit(Comparison(model, L2(), shape, dtype=torch.float64), problems)
    assert fast is not None
    assert [layer.rank for layer in fast.layers if isinstance(layer, FullyConnected)] == [None]


def test_factors_are_exact_for_low_rank() -> None:
    torch.manual_seed(0)
    target = torch.randn(5, 30, 3, dtype=torch.float64) @ torch.randn(5, 3, 50, dtype=torch.float64)
    q, m = factors(target, 3)
    torch.testing.assert_close(m @ q.mT, target)
    torch.testing.assert_close(q.mT @ q, torch.eye(3, dtype=torch.float64).expand(5, 3, 3))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("classes", [10, 40])
def test_fast_path_gives_the_same_bits_whatever_stands_beside(own: bool, classes: int) -> None:
    """In float32, where L-BFGS would make of any difference in rounding another path."""
    model, shape = lenet_like(classes), (1, 8, 8)
    problems = problems_of(model, 7, 2, shape, classes, own=own)
    images, labels = torch.rand(7, 2, *shape), torch.randn(7, 2, classes).softmax(2)
    fast = ChainDistance.fit(Comparison(model, L2(), shape), problems)
    assert fast is not None
    together = fast.evaluate(fast.load(problems), images, labels)
    for part in (slice(0, 1), slice(2, 5), slice(6, 7)):
        alone = fast.evaluate(fast.load(problems[part]), images[part].clone(), labels[part].clone())
        assert torch.equal(alone[0], together[0][part])
        assert torch.equal(alone[1], together[1][part])


class Branch(nn.Module):
    """Not a chain: a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = images.flatten(1)
        return self.b(x + torch.tanh(self.a(x)))


class Twice(nn.Module):
    """A chain that uses a layer twice."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.b(torch.tanh(self.a(torch.tanh(self.a(images.flatten(1))))))


class Normalised(nn.Module):
    """Normalisation by buffers, functional calls, a skipped dropout: still a chain in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.full((1, 1, 1), 0.3))
        self.register_buffer("std", torch.full((1, 1, 1), 0.2))
        self.conv, self.drop, self.fc = nn.Conv2d(1, 3, 3), nn.Dropout(0.5), nn.Linear(12, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.conv((images - self.mean) / self.std))
        return self.fc(self.drop(torch.flatten(x, 1)))


class Reshaped(nn.Module):
    """Sizes asked of the tensor, rows and columns split and joined."""

    def __init__(self) -> None:
        super().__init__()
        self.split, self.conv, self.fc = nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 3, 3), nn.Linear(12, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = torch.tanh(self.conv(self.split(images.reshape(images.size(0), 16))))
        return self.fc(x.contiguous().view(x.shape[0], -1))


def on_rows() -> nn.Module:
    """A linear layer on the last of several dimensions."""
    return nn.Sequential(nn.Linear(4, 4), nn.Flatten(), nn.Linear(16, 4))


@pytest.mark.parametrize(
    ("model", "training", "fast"),
    [
        (Branch(), True, False),
        (Twice(), True, False),
        (Normalised(), True, False),
        (Normalised(), False, True),
        (Reshaped(), True, True),
        (on_rows(), True, False),
    ],
)
def test_only_chains_take_the_fast_path(model: nn.Module, training: bool, fast: bool) -> None:
    torch.manual_seed(0)
    model = model.double().train(training)
    shape, count, batch = (1, 4, 4), 2, 3
    problems = problems_of(model, count, batch, shape, 4, own=True)
    buffers = dict(model.named_buffers())
    targets = [problem.targets[0] for problem in problems]
    problems = [problem_of(t.parameters, t.update, batch, buffers=buffers, training_mode=training) for t in targets]
    comparison = Comparison(model, L2(), shape, dtype=torch.float64)
    distance: Distance | None = ChainDistance.fit(comparison, problems)
    assert isinstance(distance, ChainDistance) == fast
    if fast:
        images = torch.rand(count, batch, *shape, dtype=torch.float64)
        labels = torch.randn(count, batch, 4, dtype=torch.float64).softmax(2)
        general = GeneralDistance(comparison, problems)
        for ours, theirs in zip(
            distance.evaluate(distance.load(problems), images, labels)[:2],
            general.evaluate(general.load(problems), images, labels)[:2],
            strict=True,
        ):
            torch.testing.assert_close(ours, theirs)


def test_batch_statistics_in_train_mode_and_running_ones_in_eval_mode() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Sigmoid(), nn.Flatten(), nn.Linear(12, 4)).double()
    images, labels = torch.rand(5, 1, 4, 4, dtype=torch.float64), torch.randint(4, (5,))
    model.train()(torch.rand(9, 1, 4, 4, dtype=torch.float64))  # running statistics that are not the initial ones
    for training in (True, False):
        buffers = {name: value.clone() for name, value in model.named_buffers()}
        parameters = {name: value.detach().clone() for name, value in model.named_parameters()}
        loss = nn.functional.cross_entropy(model.train(training)(images), labels)
        gradient = dict(zip(parameters, torch.autograd.grad(loss, list(model.parameters())), strict=True))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        problem = problem_of(parameters, gradient, 5, buffers=buffers, training_mode=training)
        shifted = {name: value + 1 for name, value in parameters.items()}
        other = problem_of(shifted, gradient, 5, buffers=buffers, training_mode=training)
        blank = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Sigmoid(), nn.Flatten(), nn.Linear(12, 4))
        for problems in ([problem], [problem, other]):  # shared weights, and weights of each problem's own
            distance = GeneralDistance(Comparison(blank, L2(), (1, 4, 4), dtype=torch.float64), problems)
            assert distance.shared == (len(problems) == 1)
            one_hot = nn.functional.one_hot(labels, 4).double()
            value, _, _ = distance.evaluate(distance.load([problem]), images[None], one_hot[None])
            assert float(value) < 1e-20
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_convolution_patches_have_their_adjoint() -> None:
    torch.manual_seed(0)
    layer = Convolution("0", nn.Conv2d(2, 3, (3, 5), stride=(2, 1), padding=(1, 2), dilation=(1, 2)))
    a = torch.randn(2, 1, 2, 9, 11, dtype=torch.float64)
    layer.batch, layer.input_size = a.shape[:2], a.shape[3:]
    patches = layer._patches(a.flatten(0, 1))
    torch.testing.assert_close(
        patches, nn.functional.unfold(a.flatten(0, 1), (3, 5), dilation=(1, 2), padding=(1, 2), stride=(2, 1))
    )
    other = torch.randn_like(patches)
    torch.testing.assert_close((patches * other).sum(), (layer._unpatch(other) * a.flatten(0, 1)).sum())


def test_convolving_in_groups_gives_the_same_bits_whatever_stands_beside() -> None:
    torch.manual_seed(0)
    layer = Convolution("0", nn.Conv2d(12, 12, 5, 2, 2))
    a, weight, back = torch.randn(9, 12, 14, 14), torch.randn(9, 12, 300), torch.randn(9, 12, 49)
    layer.input_size = (14, 14)

    def all_three(some: slice) -> list[Tensor]:
        layer.input, layer._of_input = a[some], None
        z = layer._convolve(weight[some], layer.input)
        return [z, layer._back(weight[some], back[some]), layer._correlate(back[some], layer.input)]

    together = all_three(slice(None))
    for some in (slice(2, 3), slice(2, 4), slice(1, 8)):
        for alone, beside in zip(all_three(some), together, strict=True):
            assert torch.equal(alone, beside[some])


@pytest.mark.parametrize(("stride", "dilation"), [(1, 1), (2, 1), ((2, 1), (1, 2))])
def test_convolving_in_groups_gives_what_patches_give(stride, dilation, monkeypatch) -> None:
    torch.manual_seed(0)
    module = nn.Conv2d(12, 5, (3, 5), stride=stride, padding=(1, 2), dilation=dilation)
    a, weight, back = torch.randn(2, 3, 12, 9, 11), torch.randn(2, 5, 12 * 15), None
    found = []
    for available in (True, False):
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda available=available: available)
        layer = Convolution("0", module)
        layer.first = False
        z = layer.forward({layer.weight: weight, layer.bias: torch.zeros(2, 5)}, a)
        back = torch.randn_like(z) if back is None else back
        layer.pulled, layer.bias_pulled = -2 * weight, torch.ones(2, 5)
        outputs = [z, layer.backward({}, back), layer._weight_gradient(), layer.forward_again({}, 3 * a)]
        found.append([*outputs, layer.backward_again({}, 2 * back)])
        assert layer._groups(a) == available
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("payload", ["gradient", "weights"])
@pytest.mark.parametrize("optimizer", [SGD(0.1, momentum=0.9), Adam(0.01)])
def test_a_clients_own_steps_are_matched_where_asked_for(payload: str, optimizer: ClientOptimizer) -> None:
    model, shape = lenet_like(), (1, 8, 8)
    training = LocalTraining(payload, 2, 2, epochs=2, optimizer=optimizer)  # type: ignore[arg-type]
    images, labels = torch.rand(4, *shape, dtype=torch.float64), torch.randint(40, (4,))
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    sent = local_update(model, parameters, {}, images, labels, training).update
    target = Target(parameters, {}, training.mean_gradient(parameters, sent), training)
    problem = Problem(0, (1, 0, 0), (target,), 4)
    one_hot = nn.functional.one_hot(labels, 40).double()[None]
    values = []
    for unrolled in (True, False):
        comparison = Comparison(model, L2(relative=True), shape, unrolled, dtype=torch.float64)
        assert (ChainDistance.fit(comparison, [problem]) is None) == unrolled
        distance = GeneralDistance(comparison, [problem])
        values.append(float(distance.evaluate(distance.load([problem]), images[None], one_hot)[0]))
    assert values[0] < 1e-16
    assert values[1] > 1e-4


def test_each_problems_defense_is_imitated() -> None:
    model, shape = lenet_like(), (1, 8, 8)
    problems = problems_of(model, 2, 1, shape, 40, own=False)

    def scaled(problem: Problem, factor: float) -> Problem:
        (target,) = problem.targets
        update = {name: factor * value for name, value in target.update.items()}
        imitate = None if factor == 1 else lambda gradient: {n: factor * v for n, v in gradient.items()}
        return replace(problem, targets=(replace(target, update=update, imitate=imitate),))

    comparison = Comparison(model, L2(), shape, dtype=torch.float64)
    images = torch.rand(2, 1, *shape, dtype=torch.float64)
    labels = torch.randn(2, 1, 40, dtype=torch.float64).softmax(2)
    plain = GeneralDistance(comparison, problems)
    wanted = plain.evaluate(plain.load(problems), images, labels)[0]
    imitated = [scaled(problem, factor) for problem, factor in zip(problems, (3.0, 1.0), strict=True)]
    assert ChainDistance.fit(comparison, imitated) is None
    distance = GeneralDistance(comparison, imitated)
    rows = distance.load(imitated)
    found = distance.evaluate(rows, images, labels)[0]
    torch.testing.assert_close(found, wanted * torch.tensor([9.0, 1.0]))
    swapped = {name: value.flip(0) for name, value in rows.items()}  # rows keep their own defense wherever they go
    torch.testing.assert_close(distance.evaluate(swapped, images.flip(0), labels.flip(0))[0], found.flip(0))
