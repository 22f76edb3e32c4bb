"""Reconstructions on disk come back as they were."""

import torch

from fedleak import tensorfile
from fedleak.attacks.results import Reconstruction
from fedleak.attacks.store import ReconstructionStore


def reconstruction(**changes) -> Reconstruction:
    images = torch.rand(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    given = {"objective": 1e-3, "evaluations": 40, "seconds": 0.5, "stop_reason": "budget"}
    return Reconstruction(3, 1, images, torch.tensor([4, 7]), **(given | changes))


def test_snapshots_come_back_with_their_evaluations(tmp_path):
    store = ReconstructionStore(tmp_path)
    snapshots = [(count, torch.full((2, 1, 4, 4), count / 64).half()) for count in (1, 2, 40)]
    store.write(reconstruction(trace=[(10, 0.5), (20, 0.25)], snapshots=snapshots))
    back = store.load(3, 1)
    assert back is not None
    assert back.trace == [(10, 0.5), (20, 0.25)]
    assert [count for count, _ in back.snapshots] == [1, 2, 40]
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(back.snapshots, snapshots, strict=True))
    assert torch.equal(back.images, reconstruction().images)


def test_without_snapshots_and_from_before_there_were_any(tmp_path):
    store = ReconstructionStore(tmp_path)
    store.write(reconstruction())
    assert [r.snapshots for r in store] == [[]]
    (path,) = tmp_path.iterdir()
    tensors, header = tensorfile.load(path)
    del header["snapshots"]
    tensorfile.save(path, tensors, header)
    back = store.load(3, 1)
    assert back is not None
    assert back.snapshots == []
