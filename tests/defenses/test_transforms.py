"""Every transform against a literal reference, element by element, and every imitation against what was sent."""

import math
import struct

import numpy as np
import pytest
import torch

from fedleak.defenses import (
    Clipping,
    HalfPrecision,
    Masking,
    Pruning,
    Sign,
    Stochastic,
    TruncatedSVD,
    Uniform,
)
from fedleak.errors import UsageError
from fedleak.training import LocalTraining

TRAINING = LocalTraining(local_steps=1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def update(seed=0):
    random = generator(seed)
    return {
        "conv.weight": torch.randn(6, 3, 2, 2, generator=random),
        "conv.bias": 0.1 * torch.randn(6, generator=random),
        "fc.weight": 5 * torch.randn(7, 9, generator=random),
        "steps": torch.tensor(3),
    }


def sent(defense, seed=0):
    given = update(seed)
    after = defense.apply(given, generator=generator())
    assert all(torch.equal(value, update(seed)[name]) for name, value in given.items()), "the given ones stay"
    assert list(after) == list(given)
    assert int(after["steps"]) == 3, "integers are left alone"
    assert all(after[n].dtype == v.dtype and after[n].shape == v.shape for n, v in given.items())
    return given, after


def imitation(defense, observed):
    return defense.imitate(observed, TRAINING)


def numbers(tensors):
    return [float(x) for name, value in tensors.items() if name != "steps" for x in value.flatten()]


@pytest.mark.parametrize("norm", [0.5, 3.0, 1e6])
def test_clipping(norm):
    given, after = sent(Clipping(norm))
    size = math.sqrt(sum(x * x for x in numbers(given)))
    assert numbers(after) == pytest.approx([x * min(1, norm / size) for x in numbers(given)], rel=1e-6)
    found = imitation(Clipping(norm), after)
    for factor in (1.0, 0.01, 7.0):  # whatever the size before, as long as it was clipped
        other = {n: v * factor if n != "steps" else v for n, v in given.items()}
        if norm < size * factor and norm < size:
            assert numbers(found.function(other)) == pytest.approx(numbers(after), rel=1e-5)
    if norm > size:
        assert found.function is dict


@pytest.mark.parametrize(("format", "code", "bits"), [("float16", "e", 10), ("bfloat16", None, 7)])
def test_half_precision(format, code, bits):
    given, after = sent(HalfPrecision(format))

    def rounded(x):
        if code:
            return struct.unpack(code, struct.pack(code, x))[0]
        (word,) = struct.unpack("I", struct.pack("f", x))
        word += 0x7FFF + (word >> 16 & 1)  # to the nearest, ties to even
        return struct.unpack("f", struct.pack("I", word & 0xFFFF0000))[0]

    assert numbers(after) == [rounded(x) for x in numbers(given)]
    noise = imitation(HalfPrecision(format), after).noise
    for name in ("conv.weight", "fc.weight"):
        last = torch.exp2(torch.floor(torch.log2(after[name].abs())) - bits)
        torch.testing.assert_close(noise[name], last / math.sqrt(12))
        assert ((after[name] - given[name]).abs() <= last / 2 + 1e-12).all()


def test_too_large_for_half_precision_is_its_largest_number():
    assert HalfPrecision("float16").apply({"w": torch.tensor([1e6])}, generator=generator())["w"] == 65504


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_uniform_quantisation(bits):
    given, after = sent(Uniform(bits))
    most = 2 ** (bits - 1) - 1
    for name in ("conv.weight", "conv.bias", "fc.weight"):
        step = max(abs(x) for x in given[name].flatten().tolist()) / most
        expected = [round(x / step) * step for x in given[name].flatten().tolist()]
        assert after[name].flatten().tolist() == pytest.approx(expected, rel=1e-5, abs=1e-7)
        assert len(set(after[name].flatten().tolist())) <= 2 * most + 1
        assert imitation(Uniform(bits), after).noise[name] == pytest.approx(step / math.sqrt(12), rel=1e-5)


def test_zeros_survive_every_quantiser():
    zeros = {"w": torch.zeros(3, 3)}
    for defense in (Uniform(8), Stochastic(4), Sign(), TruncatedSVD(1), HalfPrecision(), Clipping(1.0)):
        assert not defense.apply(zeros, generator=generator())["w"].any()
        assert defense.imitate(zeros, TRAINING) is not None


def test_stochastic_quantisation_takes_one_of_the_two_next_levels_without_bias():
    defense, levels = Stochastic(8), 8
    given, after = sent(defense)
    for name in ("conv.weight", "fc.weight"):
        norm = math.sqrt(sum(x * x for x in given[name].flatten().tolist()))
        for x, y in zip(given[name].flatten().tolist(), after[name].flatten().tolist(), strict=True):
            low = math.floor(abs(x) * levels / norm)
            assert abs(y) * levels / norm == pytest.approx(low, abs=1e-4) or abs(y) * levels / norm == pytest.approx(
                low + 1, abs=1e-4
            )
            assert y == 0 or math.copysign(1, y) == math.copysign(1, x)
    many = torch.stack([defense.apply(given, generator=generator(seed))["fc.weight"] for seed in range(2000)])
    step = float(given["fc.weight"].norm()) / levels
    assert (many.mean(0) - given["fc.weight"]).abs().max() < 5 * 0.5 * step / math.sqrt(2000)
    error = float((many - given["fc.weight"]).square().mean().sqrt())
    told = imitation(defense, {"fc.weight": many[0]}).noise["fc.weight"]
    assert told == pytest.approx(error, rel=0.4)


def test_sign():
    given, after = sent(Sign())
    mean = {n: sum(abs(x) for x in v.flatten().tolist()) / v.numel() for n, v in given.items()}
    for name in ("conv.weight", "fc.weight"):
        expected = [math.copysign(mean[name], x) for x in given[name].flatten().tolist()]
        assert after[name].flatten().tolist() == pytest.approx(expected, rel=1e-5)
    assert set(Sign(scaled=False).apply(given, generator=generator())["fc.weight"].unique().tolist()) == {-1.0, 1.0}


def test_signs_are_imitated_by_what_agrees_with_them():
    given, after = sent(Sign())
    found = imitation(Sign(), after)
    same = found.function(given)
    for name in ("conv.weight", "fc.weight"):
        torch.testing.assert_close(same[name], after[name])
    # One wrong sign is off by its size over the root mean square, in units of what was sent.
    wrong = {**given, "fc.weight": given["fc.weight"].clone()}
    wrong["fc.weight"][2, 3] *= -1
    gap = (found.function(wrong)["fc.weight"] - after["fc.weight"]).abs()
    unit = float(wrong["fc.weight"][2, 3].abs() / wrong["fc.weight"].square().mean().sqrt())
    assert gap.count_nonzero() == 1
    assert float(gap[2, 3]) == pytest.approx(unit * float(after["fc.weight"].abs().max()), rel=1e-5)


@pytest.mark.parametrize("rescale", [False, True])
def test_masking(rescale):
    defense = Masking(0.75, rescale)
    given, after = sent(defense)
    kept = after["fc.weight"] != 0
    factor = 4.0 if rescale else 1.0
    torch.testing.assert_close(after["fc.weight"][kept], factor * given["fc.weight"][kept])
    many = defense.apply({"w": torch.ones(40_000)}, generator=generator())["w"]
    assert float((many != 0).float().mean()) == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / 40_000))
    again = imitation(defense, after).function(given)
    torch.testing.assert_close(again["fc.weight"], after["fc.weight"])


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_truncated_svd(rank):
    given, after = sent(TruncatedSVD(rank))
    assert torch.equal(after["conv.bias"], given["conv.bias"])
    for name in ("conv.weight", "fc.weight"):
        matrix = given[name].reshape(len(given[name]), -1).double().numpy()
        values, vectors = np.linalg.eigh(matrix @ matrix.T)  # another way to the same subspace
        top = vectors[:, np.argsort(values)[::-1][:rank]]
        np.testing.assert_allclose(after[name].reshape(matrix.shape), top @ top.T @ matrix, atol=1e-5)


def test_what_was_cut_off_is_all_that_the_imitation_of_svd_loses():
    given, after = sent(TruncatedSVD(2))
    function = imitation(TruncatedSVD(2), after).function
    for name in ("conv.weight", "fc.weight"):
        torch.testing.assert_close(function(given)[name], after[name], atol=1e-5, rtol=1e-5)
        moved = {**given, name: given[name] + torch.randn(given[name].shape, generator=generator(1))}
        assert (function(moved)[name] - after[name]).abs().max() > 0.1
    torch.testing.assert_close(function(function(moved))["fc.weight"], function(moved)["fc.weight"])


def test_pruning_of_the_whole_update():
    given, after = sent(Pruning(0.8, scope="update"))
    sizes = sorted((abs(x) for x in numbers(given)), reverse=True)
    left = len(sizes) - int(0.8 * len(sizes))
    assert numbers(after) == [x if abs(x) >= sizes[left - 1] else 0.0 for x in numbers(given)]
    found = imitation(Pruning(0.8, scope="update"), after)
    assert numbers(found.function(given)) == numbers(after)
    assert float(found.noise["conv.bias"][after["conv.bias"] == 0][0]) == pytest.approx(sizes[left - 1] / math.sqrt(3))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Clipping(0.0), r"defense\.norm=0\.0 .*above 0"),
        (lambda: Clipping(math.inf), r"defense\.norm=inf .*finite"),
        (lambda: HalfPrecision("float8"), r"defense\.format=float8: choose one of float16, bfloat16"),
        (lambda: Uniform(1), r"defense\.bits=1: must be a whole number from 2 to 16"),
        (lambda: Stochastic(0), r"defense\.levels=0: must be a whole number of at least 1"),
        (lambda: Sign("yes"), r"defense\.scaled=yes: must be true or false"),
        (lambda: Masking(1.0), r"defense\.ratio=1\.0 is no fraction"),
        (lambda: Masking(0.5, "no"), r"defense\.rescale=no: must be true or false"),
        (lambda: TruncatedSVD(0), r"defense\.rank=0: must be a whole number of at least 1"),
        (lambda: Pruning(0.5, scope="layer"), r"defense\.scope=layer: choose one of tensor, update"),
    ],
)
def test_impossible_strengths(make, message):
    with pytest.raises(UsageError, match=message):
        make()
