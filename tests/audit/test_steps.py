"""What is said of a client's steps, put together."""

import pytest

from fedleak.audit.steps import Steps, reconcile


def put(examples=None, batch_size=None, steps=None, epochs=None, counted=None) -> Steps:
    return reconcile(examples=examples, batch_size=batch_size, steps=steps, epochs=epochs, counted=counted)


@pytest.mark.parametrize(
    ("known", "batch_size", "local_steps", "epochs"),
    [
        ({"examples": 800, "batch_size": 1}, 1, 800, 1),
        ({"examples": 160, "batch_size": 32, "epochs": 2}, 32, 5, 2),
        ({"examples": 160, "batch_size": 32, "steps": 10}, 32, 5, 2),
        ({"examples": 20, "batch_size": 32}, 20, 1, 1),
        ({"examples": 100, "batch_size": 32, "steps": 3}, 32, 3, 1),
        ({"examples": 100, "batch_size": 32, "steps": 4}, 32, 4, 1),
        ({"examples": 160, "batch_size": 32, "counted": 5}, 32, 5, 1),
        ({"examples": 160, "counted": 5}, 32, 5, 1),
        ({"examples": 32}, 32, 1, 1),
        ({"batch_size": 8, "steps": 6, "epochs": 2}, 8, 3, 2),
        ({}, None, 1, 1),
    ],
)
def test_what_fits_together(known, batch_size, local_steps, epochs):
    found = put(**known)
    assert (found.batch_size, found.local_steps, found.epochs) == (batch_size, local_steps, epochs)
    assert found.contradiction is None


@pytest.mark.parametrize(
    ("known", "words"),
    [
        ({"examples": 800, "batch_size": 1, "steps": 1}, "800 examples are no 1 steps of 1"),
        ({"examples": 160, "batch_size": 16, "steps": 5}, "160 examples are no 5 steps of 16"),
        ({"examples": 160, "batch_size": 32, "steps": 5, "epochs": 2}, "no 5 steps of 32 in 2 epochs"),
        ({"steps": 5, "counted": 6}, "5 steps were stated, and BatchNorm counted 6"),
        ({"steps": 5, "epochs": 2}, "5 steps are no 2 epochs"),
    ],
)
def test_what_cannot_be_true(known, words):
    assert words in put(**known).contradiction


def test_what_is_taken_for_granted_is_said():
    assert put(examples=32).assumed == "one step an epoch"
    assert put(examples=64, batch_size=32).assumed == "one epoch"
    assert put(examples=64, batch_size=32, epochs=1).assumed is None
    assert "one of 4" in put(examples=100, batch_size=32, epochs=1).assumed
