import pytest
import torch
from torch import nn

from fedleak.attacks.row_space import fit, imagined_atoms, mismatch, project_features, row_space, search

CLASSES, FEATURES = 8, 20


def head_problem(labels, seed=0, bias=True, sharpness=1.0):
    """A last layer, features as a sigmoid gives them, and the layer's gradient for the labels, in float64."""
    generator = torch.Generator().manual_seed(seed)
    head = torch.randn(CLASSES, FEATURES, generator=generator, dtype=torch.float64) * sharpness
    shift = torch.randn(CLASSES, generator=generator, dtype=torch.float64) if bias else None
    features = torch.rand(len(labels), FEATURES, generator=generator, dtype=torch.float64)
    live = [head.clone().requires_grad_()] + ([shift.clone().requires_grad_()] if bias else [])
    loss = nn.functional.cross_entropy(nn.functional.linear(features, *live), torch.tensor(labels))
    gradients = torch.autograd.grad(loss, live)
    return head, shift, features, gradients


def problem_of(head, shift, gradients, rank):
    bias = None if shift is None else gradients[1][None]
    return row_space(gradients[0][None], bias, head[None], None if shift is None else shift[None], rank)


def truth_of(labels):
    return nn.functional.one_hot(torch.tensor(labels), CLASSES).double()[None]


def extended(features, bias):
    return torch.cat([features, torch.ones(len(features), 1)], dim=1).double() if bias else features


@pytest.mark.parametrize("bias", [True, False])
def test_the_true_features_lie_in_the_row_space_and_solve_it(bias):
    labels = [0, 0, 3, 7, 7]
    head, shift, features, gradients = head_problem(labels, bias=bias)
    space = problem_of(head, shift, gradients, 5)
    given = extended(features, bias)
    x = given @ space.basis[0]
    torch.testing.assert_close(x @ space.basis[0].T, given)
    logits = nn.functional.linear(features, head, shift)
    torch.testing.assert_close(project_features(space, given[None], logits[None])[0], x)
    whole = mismatch(space, x[None], truth_of(labels), space.whitening(torch.zeros(1)))
    assert float(whole.total) < 1e-16
    wrong = mismatch(space, x[None], truth_of([0, 0, 3, 7, 6]), space.whitening(torch.zeros(1)))
    assert float(wrong.total) > 1e-3


def test_fit_takes_the_gauss_newton_step_of_a_literal_jacobian():
    labels = [1, 2, 2]
    head, shift, features, gradients = head_problem(labels, seed=1)
    space = problem_of(head, shift, gradients, 3)
    truth, floor = truth_of(labels), torch.tensor([0.1])
    start = (extended(features, True) @ space.basis[0])[None] + 0.01

    def residual(flat):
        at = mismatch(space, flat.view(1, 3, 3), truth, space.whitening(floor))
        return torch.cat([at.gradient.flatten(), at.affine.flatten()])

    jacobian = torch.autograd.functional.jacobian(residual, start.flatten())
    normal = jacobian.T @ jacobian
    lift = 1e-2 * (normal.diagonal() + 1e-10 * normal.diagonal().max())
    step = torch.linalg.solve(normal + torch.diag(lift), jacobian.T @ residual(start.flatten()))
    moved, total = fit(space, start, truth, floor=floor, steps=1)
    torch.testing.assert_close(moved.flatten(), start.flatten() - step)
    torch.testing.assert_close(total[0], residual(moved.flatten()).square().sum())


def test_fit_solves_problems_of_a_batch_as_it_solves_each_alone():
    labels = [1, 4, 4, 6]
    problems, starts = [], []
    for seed in range(3):
        head, shift, features, gradients = head_problem(labels, seed=seed)
        problems.append((head, shift, gradients))
        starts.append(extended(features, True))
    space = row_space(
        torch.stack([gradients[0] for *_, gradients in problems]),
        torch.stack([gradients[1] for *_, gradients in problems]),
        torch.stack([head for head, *_ in problems]),
        torch.stack([shift for _, shift, _ in problems]),
        4,
    )
    x = torch.stack(starts) @ space.basis + 0.02
    truth, floor = truth_of(labels).expand(3, -1, -1), torch.tensor([1.0, 0.1, 0.01])
    together, totals = fit(space, x, truth, floor=floor, steps=30)
    assert (totals < 1e-12).all()
    for n in range(3):
        index = torch.tensor([n])
        alone, _ = fit(space[index], x[index], truth[index], floor=floor[index], steps=30)
        torch.testing.assert_close(together[n], alone[0], rtol=1e-6, atol=1e-8)


def test_starts_that_blow_up_do_not_touch_the_others():
    labels = [1, 4, 4]
    head, shift, features, gradients = head_problem(labels)
    space = problem_of(head, shift, gradients, 3)[torch.zeros(2, dtype=torch.long)]
    x = (extended(features, True) @ space.basis[0]).expand(2, -1, -1) + 0.01
    x[0] = torch.nan
    moved, total = fit(space, x, truth_of(labels).expand(2, -1, -1), floor=torch.tensor([0.1, 0.1]), steps=20)
    assert float(total[1]) < 1e-12
    assert not bool(total[0] < 1)
    assert moved[1].isfinite().all()


@pytest.mark.parametrize(
    ("labels", "bias"),
    [
        ([5], True),
        ([2, 2], False),
        ([0, 3, 3, 6], True),
        ([0, 3, 3, 6], False),
        ([1, 1, 1], True),
        ([0, 1, 2, 4, 7], True),
    ],
)
def test_search_finds_labels_and_features(labels, bias):
    head, shift, features, gradients = head_problem(labels, seed=len(labels), bias=bias, sharpness=2.0)
    space = problem_of(head, shift, gradients, len(labels))
    middle = extended(torch.full((1, FEATURES), 0.5).double(), bias)
    centre = project_features(space, middle[None], nn.functional.linear(middle[:, :FEATURES], head, shift)[None])
    atoms, atom_labels = imagined_atoms(space, centre[:, 0], 500, 0)
    found = search(space, atoms, atom_labels, seed=0, starts=64)[0]
    assert found.labels[0].tolist() == labels
    assert float(found.residual[0]) < 1e-8
    assert (found.residual.diff() >= 0).all()
    given = extended(features, bias)
    for row in found.features[0]:  # each is the features of one sample
        assert float((given - row).norm(dim=1).min()) < 1e-3


def test_search_of_several_problems_is_search_of_each():
    problems = [head_problem([0, 3, 3], seed=seed, sharpness=2.0) for seed in range(2)]
    space = row_space(
        torch.stack([gradients[0] for *_, gradients in problems]),
        torch.stack([gradients[1] for *_, gradients in problems]),
        torch.stack([head for head, *_ in problems]),
        torch.stack([shift for _, shift, *_ in problems]),
        3,
    )
    atoms, labels = imagined_atoms(space, torch.zeros(2, 3, dtype=torch.float64), 200, 0)
    together = search(space, atoms, labels, seed=3, starts=32)
    for n in range(2):
        index = torch.tensor([n])
        alone = search(space[index], atoms[index], labels, seed=3, starts=32)[0]
        assert torch.equal(together[n].labels[0], alone.labels[0])


def test_imagined_atoms_have_the_constant_and_cover_every_class():
    head, shift, _, gradients = head_problem([0, 3, 3])
    space = problem_of(head, shift, gradients, 3)
    atoms, labels = imagined_atoms(space, torch.zeros(1, 3, dtype=torch.float64), 400, 0)
    assert atoms.shape == (1, 400, 3)
    assert (labels.diff() >= 0).all()
    assert set(labels.tolist()) == set(range(CLASSES))
    assert float((atoms @ space.one[0] - 1).abs().median()) < 0.1
