import pytest
import torch
from torch import nn

from fedleak.attacks.labels import IDLG, Joint, Known, PerSample, Random, Version1
from fedleak.errors import UsageError
from fedleak.evaluation.label_study import COLUMNS, client_update, draw_batch, label_study
from fedleak.training import SGD, LocalTraining


def network(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.Sigmoid(), nn.Linear(6, 4))


@pytest.fixture
def data():
    generator = torch.Generator().manual_seed(0)
    return torch.rand(200, 1, 4, 4, generator=generator), torch.arange(200) % 4


def test_a_row_for_each_method_stage_size_partition_and_run(data):
    methods = {"version1": Version1(), "random": Random(), "known": Known()}
    frame = label_study(
        *data, model=network, methods=methods, batch_sizes=(1, 8), stages=(0, 5), runs=3, data="noise", seed=1
    )
    assert list(frame.columns) == COLUMNS
    assert len(frame) == 3 * 2 * 2 * 2 * 3
    assert set(frame["stage"]) == {0, 5}
    assert set(frame["data"]) == {"noise"}
    known = frame[frame.method == "known"]
    assert (known.label_accuracy == 1).all()
    assert known.labels_exact.all()
    assert (known.counts_exact == 1).all()
    single = frame[(frame.method == "version1") & (frame.batch_size == 1)]
    assert (single.label_accuracy == 1).all()
    control = frame[(frame.method == "random") & (frame.batch_size == 8)]
    assert 0.2 < control.label_accuracy.mean() < 0.9
    assert (control.labels_exact == (control.label_accuracy == 1)).all()


def test_batches_without_duplicates():
    labels = torch.arange(60) % 6
    for seed in range(5):
        batch = draw_batch(labels, 5, "different", torch.Generator().manual_seed(seed))
        assert len(labels[batch].unique()) == len(batch) == 5
    with pytest.raises(UsageError, match="partition=different needs 7 classes and the data have 6"):
        draw_batch(labels, 7, "different", torch.Generator())


def test_the_seed_decides_everything_and_runs_differ(data):
    def run(seed):
        frame = label_study(*data, model=network, methods={"v": Version1()}, batch_sizes=(16,), runs=4, seed=seed)
        return frame.drop(columns="seconds")

    assert run(1).equals(run(1))
    assert not run(1).equals(run(2))
    assert run(1).label_accuracy.nunique() > 1


def test_methods_that_cannot_take_a_batch_are_left_out_of_it(data):
    methods = {"idlg": IDLG(), "per_sample": PerSample(), "joint": Joint()}
    frame = label_study(*data, model=network, methods=methods, batch_sizes=(1, 4), runs=2)
    assert set(frame.method) == {"idlg"}
    assert set(frame.batch_size) == {1}


def test_networks_go_through_the_stages(data):
    steps = []

    def train(model, images, labels, count, generator):
        steps.append(count)

    frame = label_study(
        *data, model=network, methods={"v": Version1()}, batch_sizes=(2,), stages=(7, 0, 3), runs=1, train=train
    )
    assert steps == [0, 3, 4]
    assert set(frame.attrs["accuracy"]) == {0, 3, 7}


def test_a_biased_batch_is_half_one_class_and_a_quarter_another():
    labels = torch.arange(400) % 4
    for size in (1, 2, 4, 8, 32):
        counts = torch.bincount(
            labels[draw_batch(labels, size, "biased", torch.Generator().manual_seed(3))], minlength=4
        )
        ordered = counts.sort(descending=True).values
        assert int(counts.sum()) == size
        assert int(ordered[0]) >= -(-size // 2)
        assert int(ordered[1]) >= size // 4
    batch = draw_batch(labels, 400, "iid", torch.Generator().manual_seed(3))
    assert batch.unique().numel() == 400
    with pytest.raises(UsageError, match="three classes"):
        draw_batch(labels % 2, 8, "biased", torch.Generator())
    with pytest.raises(UsageError, match="choose iid, biased or different"):
        draw_batch(labels, 8, "shards", torch.Generator())


@pytest.mark.parametrize("payload", ["gradient", "weights"])
def test_the_client_trains_plain_sgd(data, payload):
    model = network(0).double()
    images, labels = data[0][:6].double(), data[1][:6]
    training = LocalTraining(payload, local_steps=3, optimizer=SGD(0.2))
    observation = client_update(model, images, labels, training, run=0)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.2)
    start = [value.detach().clone() for value in model.parameters()]
    for step in range(3):
        optimizer.zero_grad()
        part = slice(2 * step, 2 * step + 2)
        nn.functional.cross_entropy(model(images[part]), labels[part]).backward()
        optimizer.step()
    for (name, value), before in zip(model.named_parameters(), start, strict=True):
        expected = value.detach() if payload == "weights" else (before - value.detach()) / 0.2
        torch.testing.assert_close(observation.update[name], expected)
        assert torch.equal(observation.parameters[name], before)
