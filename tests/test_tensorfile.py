import pytest
import torch

from fedleak import tensorfile
from fedleak.errors import UsageError


def test_tensors_come_back_in_order_with_their_header(tmp_path):
    tensors = {"z": torch.rand(2, 3), "a": torch.arange(4), "m": torch.empty(0)}
    digest = tensorfile.save(tmp_path / "x", tensors, {"note": "é", "nan": float("nan")})
    back, header = tensorfile.load(tmp_path / "x", sha256=digest)
    assert list(back) == ["z", "a", "m"]
    assert all(torch.equal(back[n], tensors[n]) and back[n].dtype == tensors[n].dtype for n in tensors)
    assert header["note"] == "é"
    assert [p.name for p in tmp_path.iterdir()] == ["x"], "no partial file is left"


def test_a_file_that_is_not_ours_is_one_clear_error(tmp_path):
    (tmp_path / "x").write_bytes(b"not safetensors at all")
    with pytest.raises(UsageError, match="x: damaged"):
        tensorfile.load(tmp_path / "x")
    with pytest.raises(UsageError, match="cannot be read"):
        tensorfile.load(tmp_path / "y")
