"""The adaptive attacker: what it sees in an update, and what it gains from it."""

from dataclasses import replace

import pytest
import torch

from fedleak.attacks import Attack, Knowledge, LabelsOnly
from fedleak.attacks.adaptive import Estimated, NoiseOnly, require_imitation, seen_through
from fedleak.attacks.image_prior import natural_prior
from fedleak.attacks.inversion import GradientMatching, Peeling
from fedleak.attacks.jacobian.imitated import ImitatedModel
from fedleak.attacks.jacobian.models import update_model
from fedleak.attacks.labels import Known
from fedleak.attacks.problem import imitating, pose
from fedleak.capture import Observation
from fedleak.cli import main
from fedleak.data import digits
from fedleak.defenses import (
    Clipping,
    Defense,
    Gaussian,
    HalfPrecision,
    Masking,
    NoDefense,
    Pruning,
    Sign,
    Soteria,
    Stochastic,
    TruncatedSVD,
    Uniform,
)
from fedleak.defenses.base import ClientView
from fedleak.errors import UsageError
from fedleak.evaluation.label_study import client_update
from fedleak.evaluation.metrics import RECOVERED_MSE
from fedleak.local_update import local_update
from fedleak.models import LeNet
from fedleak.setup import compose
from fedleak.threat import ThreatModel
from fedleak.training import LocalTraining

SEEN = [
    Pruning(0.3),
    Pruning(0.9),
    Pruning(0.9, scope="update"),
    Masking(0.5),
    Clipping(0.1),
    HalfPrecision("float16"),
    HalfPrecision("bfloat16"),
    Uniform(8),
    Uniform(4),
    Stochastic(64),
    Sign(),
    Sign(scaled=False),
    TruncatedSVD(2),
]


@pytest.fixture
def defended(observe):
    """An observation under a defense, the true mean gradient, and the images."""

    def make(defense, **settings):
        observation, images, labels = observe(**settings)
        generator = torch.Generator().manual_seed(0)
        update = defense.apply(dict(observation.update), generator=generator)
        return replace(observation, update=update, labels=labels.sort().values), observation.update, images

    return make


@pytest.mark.parametrize("told", [True, False], ids=["told", "seen"])
@pytest.mark.parametrize("defense", SEEN, ids=lambda d: f"{type(d).__name__}-{list(vars(d).values())}")
def test_the_true_update_imitated_is_the_observed_one_up_to_the_noise(defense, told, defended):
    observation, truth, _ = defended(defense)
    found = (defense if told else Estimated()).imitate(observation.update, observation.training)
    made = found.function(dict(truth))
    for name, value in observation.update.items():
        gap = (made[name] - value).square().mean().sqrt()
        noise = (torch.zeros_like(value) + (found.noise or {}).get(name, 0.0)).square().mean().sqrt()
        assert float(gap) <= 2.5 * float(noise) + 2e-5 * float(value.square().mean().sqrt()), name
        if isinstance(defense, HalfPrecision | Uniform | Stochastic) and value.dim() > 1:
            assert float(noise) <= 3 * float((truth[name] - value).square().mean().sqrt()) + 1e-3 * float(value.norm())


def test_who_is_told_of_a_rescaled_mask_takes_the_scale_out(defended):
    defense = Masking(0.5, rescale=True)
    observation, truth, _ = defended(defense)
    (problem,) = pose([observation], [None], Knowledge(LeNet((1, 28, 28), 10), (1, 28, 28), 10))
    target = imitating(problem.targets[0], defense)
    made = target.imitate(dict(truth))
    for name, value in target.update.items():
        torch.testing.assert_close(made[name], value)
        kept = value != 0
        torch.testing.assert_close(value[kept], truth[name][kept])


def test_an_update_of_noise_is_left_alone_but_for_its_size(defended):
    observation, *_ = defended(Gaussian(0.01))
    found = Estimated().imitate(observation.update, observation.training)
    made = found.function({name: 3 * value for name, value in observation.update.items()})
    assert all(torch.allclose(made[name], value, rtol=1e-4) for name, value in observation.update.items())
    assert found.noise is None


@pytest.mark.parametrize("defense", [Clipping(0.1), TruncatedSVD(2), Sign()])
def test_derivatives_through_a_defense(defense, defended):
    observation, _, images = defended(defense, batch_size=2)
    model = LeNet((1, 28, 28), 10)
    (problem,) = pose([observation], [None], Knowledge(model, (1, 28, 28), 10))
    target = imitating(problem.targets[0], defense)
    through = update_model(model, [target], (1, 28, 28))
    assert isinstance(through, ImitatedModel)
    hot = torch.nn.functional.one_hot(observation.labels, 10).double()[None]
    images, step = images.double()[None], 1e-6
    generator = torch.Generator().manual_seed(0)
    direction = torch.randn(images.shape, generator=generator, dtype=torch.float64)

    def at(x):
        through.at(x, hot)
        return {name: value.clone() for name, value in through.gradients().items()}

    ahead, behind = at(images + step * direction), at(images - step * direction)
    through.at(images, hot)
    pushed = through.push(direction)
    for name, value in pushed.items():
        torch.testing.assert_close(value, (ahead[name] - behind[name]) / (2 * step), atol=1e-6, rtol=1e-3)
    values = {n: torch.randn(v.shape, generator=generator, dtype=torch.float64) for n, v in pushed.items()}
    pulled = through.pull(values)
    inner = sum(float((values[name] * value).sum()) for name, value in pushed.items())
    assert float((pulled * direction).sum()) == pytest.approx(inner, rel=1e-6)
    basis = natural_prior((1, 28, 28)).basis(0, 5)
    jacobian = through.jacobian(basis)
    through.at(images, hot)
    weights = torch.randn(1, 2, 5, generator=generator, dtype=torch.float64)
    moved = through.push(torch.einsum("pbk,kchw->pbchw", weights, basis))
    for name, value in jacobian.push(weights.flatten(1)).items():
        torch.testing.assert_close(value, moved[name])


@pytest.mark.parametrize("defense", [Pruning(0.7), Clipping(0.1), TruncatedSVD(2), Uniform(8)])
def test_the_adaptive_attacker_rebuilds_more_than_the_naive_one(defense):
    shape = (1, 12, 12)
    torch.manual_seed(0)
    model = LeNet(shape, 10)
    for parameter in model.parameters():
        torch.nn.init.uniform_(parameter, -0.5, 0.5)
    images = torch.sigmoid(torch.nn.functional.interpolate(3 * torch.randn(1, 1, 4, 4), shape[1:], mode="bicubic"))
    labels, parameters = torch.tensor([3]), {n: p.detach() for n, p in model.named_parameters()}
    training = LocalTraining("gradient", 1, 1)
    update = local_update(model, parameters, {}, images, labels, training).update
    update = defense.apply(update, generator=torch.Generator().manual_seed(0))
    observation = Observation(1, 0, parameters, update, training, labels=labels)
    knowledge = Knowledge(model, shape, 10, ThreatModel(labels=True))
    errors = {}
    for adaptive in (False, True):
        inversion = Peeling(GradientMatching(smoothness=1.0, restarts=1, max_evaluations=100))
        (found,) = Attack(Known(), inversion, adaptive=adaptive)([observation], knowledge)
        errors[adaptive] = float((found.images - images).square().mean())
    assert errors[True] < 1e-3
    assert errors[True] < errors[False]


EXACT = [Pruning(0.3), Pruning(0.7), Pruning(0.9), Clipping(1.0), TruncatedSVD(1), Soteria(0.6)]
"""What these let through is exact, and so are the images that follow from it."""


@pytest.mark.slow  # a minute
@pytest.mark.parametrize(
    "defense", [*EXACT, Uniform(8), Uniform(4), Sign()], ids=lambda d: f"{type(d).__name__}{vars(d)}"
)
def test_who_sees_the_defense_gets_more_of_every_digit_than_who_does_not(defense):
    data, knowledge = digits(image_size=12), Knowledge(LeNet((1, 12, 12), 10), (1, 12, 12), 10)
    attacks = {
        adaptive: compose(["attack=fedleak", "attack.restarts=1", f"attack.adaptive={adaptive}".lower()]).attack.build()
        for adaptive in (False, True)
    }
    errors = {False: [], True: []}
    for seed in (0, 1):
        model = LeNet((1, 12, 12), 10)
        torch.manual_seed(seed)
        for parameter in model.parameters():
            torch.nn.init.uniform_(parameter, -0.5, 0.5)
        images, labels = data.train_images[seed : seed + 1] / 255, data.train_labels[seed : seed + 1]
        observation = client_update(model, images, labels, run=0)
        used = defense.seeing(ClientView(observation.parameters, {}, model, images, labels))
        update = used.apply(dict(observation.update), generator=torch.Generator().manual_seed(seed))
        for adaptive, attack in attacks.items():
            (found,) = attack([replace(observation, update=update)], knowledge)
            errors[adaptive].append(float((found.images - images).square().mean()))
    assert all(seen < unseen for seen, unseen in zip(errors[True], errors[False], strict=True)), errors
    if defense in EXACT:
        assert max(errors[True]) < RECOVERED_MSE < max(errors[False]), errors


def test_what_is_known_of_the_defense():
    knowledge = Knowledge(LeNet(), (1, 28, 28), 10)
    assert seen_through(knowledge, False).defense is None
    assert isinstance(seen_through(knowledge, True).defense, Estimated)
    told = replace(knowledge, defense=Pruning(0.5))
    assert seen_through(told, True).defense is told.defense
    assert isinstance(seen_through(told, False).defense, NoiseOnly)
    update = {"w": torch.tensor([0.0, 2.0])}
    found = seen_through(told, False).defense.imitate(update, None)
    assert found.function is dict
    assert float(found.noise["w"][0]) == pytest.approx(2 / 3**0.5)


class Secret(Defense):
    def imitate(self, observed, training):
        return None


def test_what_cannot_work_is_refused(capsys, tmp_path):
    with pytest.raises(UsageError, match="rebuilds no images"):
        Attack(Known(), LabelsOnly(), adaptive=True)
    with pytest.raises(UsageError, match=r"attack\.adaptive=true: Secret says nothing"):
        require_imitation(Secret(), {"w": torch.zeros(2)}, None)
    require_imitation(NoDefense(), {"w": torch.zeros(2)}, None)
    assert main(["run", "attack=labels_only", "attack.adaptive=true", f"output_dir={tmp_path / 'x'}"]) == 2
    assert main(["run", "attack.adaptive=maybe", f"output_dir={tmp_path / 'x'}"]) == 2
    told = capsys.readouterr().err
    assert "attack.adaptive=true" in told
    assert "attack.adaptive=maybe: must be true or false" in told
    assert isinstance(GradientMatching().adapted(), GradientMatching)
