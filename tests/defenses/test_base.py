import pytest
import torch

from fedleak.defenses import Chain, Defense, Gaussian, Laplacian, NoDefense, Pruning
from fedleak.errors import UsageError

ALL = [NoDefense(), Gaussian(0.1), Laplacian(0.1), Pruning(0.5), Chain([Pruning(0.5), Gaussian(0.1)])]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def update() -> dict[str, torch.Tensor]:
    g = generator(7)
    return {"conv.weight": torch.randn(4, 2, 3, 3, generator=g), "fc.bias": torch.randn(10, generator=g)}


class Double(Defense):
    def apply(self, update, *, generator):
        return {name: 2 * value for name, value in update.items()}


class AddOne(Defense):
    def apply(self, update, *, generator):
        return {name: value + 1 for name, value in update.items()}


@pytest.mark.parametrize("defense", ALL, ids=lambda d: type(d).__name__)
def test_defenses_are_pure_and_keep_names_shapes_and_dtypes(defense):
    before, given = update(), update()
    after = defense.apply(given, generator=generator())
    assert after is not given
    assert list(after) == list(before)
    for name, value in before.items():
        assert torch.equal(given[name], value)
        assert after[name].shape == value.shape
        assert after[name].dtype == value.dtype


@pytest.mark.parametrize("defense", ALL, ids=lambda d: type(d).__name__)
def test_the_generator_decides_everything(defense):
    torch.manual_seed(1)
    first = defense.apply(update(), generator=generator(3))
    torch.manual_seed(2)
    second = defense.apply(update(), generator=generator(3))
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("defense", [Defense(), NoDefense(), Gaussian(0), Laplacian(0), Pruning(0)])
def test_no_strength_changes_nothing(defense):
    after = defense.apply(update(), generator=generator())
    assert all(torch.equal(after[name], value) for name, value in update().items())


def test_a_chain_applies_its_parts_in_order():
    after = Chain([Double(), AddOne()]).apply(update(), generator=generator())
    assert all(torch.equal(after[name], 2 * value + 1) for name, value in update().items())


def test_a_chain_is_its_parts_with_one_generator():
    g = generator()
    by_hand = Gaussian(0.1).apply(Pruning(0.5).apply(update(), generator=g), generator=g)
    after = Chain([Pruning(0.5), Gaussian(0.1)]).apply(update(), generator=generator())
    assert all(torch.equal(after[name], by_hand[name]) for name in after)


@pytest.mark.parametrize("parts", [[], [{"std": 0.1}], [Gaussian(0.1), "gaussian"]])
def test_a_chain_of_something_else_is_refused(parts):
    with pytest.raises(UsageError, match=r"defense\.parts"):
        Chain(parts)
