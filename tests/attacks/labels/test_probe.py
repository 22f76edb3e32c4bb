import torch
from torch import nn

from fedleak.attacks.labels.last_layer import find_last_layer
from fedleak.attacks.labels.probe import auxiliary_images, dummy_images, probe


def test_probing_many_networks_is_running_each(observe, lenet, knowing):
    models = [lenet(seed, uniform=True) for seed in (0, 1, 0, 2)]
    images = torch.rand(3, 1, 12, 12)
    observations = [observe(model, images, torch.tensor([1, 2, 3])) for model in models]
    found = probe(observations, find_last_layer(knowing(models[0])), knowing(models[0]), images)
    assert found.which.tolist() == [0, 1, 0, 2]
    for model, unit in zip(models, found.which.tolist(), strict=True):
        torch.testing.assert_close(found.features[unit], model.body(images))
        torch.testing.assert_close(found.probabilities[unit], model(images).softmax(dim=1))


def test_several_local_steps_are_probed_halfway(observe, lenet, knowing):
    model = lenet(0)
    images, labels = torch.rand(6, 1, 12, 12), torch.tensor([0, 1, 2, 3, 4, 5])
    layer = find_last_layer(knowing(model))
    ends = [observe(model, images, labels, payload=payload, steps=3, lr=0.5) for payload in ("weights", "gradient")]
    half = lenet(0)
    with torch.no_grad():
        for name, value in half.named_parameters():
            value.copy_((ends[0].parameters[name] + ends[0].update[name]) / 2)
    for observation in ends:
        found = probe([observation], layer, knowing(model), images)
        torch.testing.assert_close(found.probabilities[0], half(images).softmax(dim=1))


def test_batch_norm_runs_on_the_servers_buffers_and_leaves_them_alone(observe, knowing):
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm2d(1), nn.Flatten(), nn.Dropout(0.5), nn.Linear(144, 10))
    buffers = {"0.running_mean": torch.tensor([0.7]), "0.running_var": torch.tensor([2.0]),
               "0.num_batches_tracked": torch.tensor(3)}  # fmt: skip
    images = torch.rand(4, 1, 12, 12)
    knowledge = knowing(model)
    labels = torch.tensor([0, 1, 2, 3])
    observation = observe(model, images, labels, start_buffers=dict(buffers), training_mode=False)
    found = probe([observation], find_last_layer(knowledge), knowledge, images)
    expected = (images - 0.7) / (2.0 + 1e-5) ** 0.5
    torch.testing.assert_close(found.features[0], expected.flatten(1))
    observation = observe(model, images, labels, start_buffers=dict(buffers))
    found = probe([observation], find_last_layer(knowledge), knowledge, images)
    expected = (images - images.mean()) / (images.var(unbiased=False) + 1e-5) ** 0.5
    torch.testing.assert_close(found.features[0], expected.flatten(1))
    assert observation.start_buffers["0.running_mean"].item() == torch.tensor(0.7).item()


def test_dummy_and_auxiliary_images_depend_on_the_seed_alone(lenet, knowing):
    images, labels = torch.rand(30, 1, 12, 12), torch.arange(30) % 10
    knowledge = knowing(lenet(0), auxiliary=(images, labels))
    assert torch.equal(dummy_images(knowledge, 5, 3), dummy_images(knowledge, 5, 3))
    assert dummy_images(knowledge, 5, 3).shape == (5, 1, 12, 12)
    chosen, names = auxiliary_images(knowledge, 2, 3, "llg_plus")
    assert torch.bincount(names).tolist() == [2] * 10
    for image, name in zip(chosen, names, strict=True):
        assert (images[labels == name] == image).flatten(1).all(dim=1).any()
