"""Arrays of messages are read fast, and as Flower reads them."""

import io
import tokenize

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord

from fedleak.federation.records import to_arrays, to_tensors

PLAIN = [np.float32(3), np.zeros((0, 2)), np.arange(6, dtype=np.int64).reshape(2, 3), np.ones((2, 1), np.float16) > 0]


@pytest.mark.parametrize("value", PLAIN, ids=["number", "empty", "int64", "bool"])
def test_an_array_is_read_as_flower_reads_it(value):
    (found,) = to_tensors(ArrayRecord({"a": Array(np.asarray(value))})).values()
    assert torch.equal(found, torch.from_numpy(np.asarray(value)))
    found.fill_(1)  # a copy of one's own


def test_arrays_in_the_order_of_fortran_keep_their_meaning():
    value = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    assert torch.equal(to_tensors(ArrayRecord({"a": Array(value)}))["a"], torch.arange(6.0).reshape(2, 3).double())


def test_tensors_come_back_as_they_were():
    sent = {"w": torch.rand(2, 3), "n": torch.tensor(4)}
    assert all(torch.equal(sent[name], value) for name, value in to_tensors(to_arrays(sent)).items())


@pytest.mark.parametrize("damage", ["short", "head", "objects"])
def test_damaged_arrays_raise(damage):
    out = io.BytesIO()
    np.save(out, np.array([{}], dtype=object) if damage == "objects" else np.arange(4.0), allow_pickle=True)
    data = out.getvalue()
    data = {"short": data[:-3], "head": data[:10] + b"?" * 20 + data[30:], "objects": data}[damage]
    with pytest.raises((ValueError, tokenize.TokenError)):  # as NumPy raises them
        to_tensors(ArrayRecord({"a": Array(dtype="float64", shape=(4,), stype="numpy.ndarray", data=data)}))
