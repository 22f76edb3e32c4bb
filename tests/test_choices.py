"""Every choice of the groups data, partition, model, defense and tracking says what it is and can be instantiated."""

from pathlib import Path

import pytest
import torch
from hydra.utils import get_method, instantiate
from omegaconf import OmegaConf

import fedleak.data
from fedleak.data import ImageData, Partitioner
from fedleak.defenses import Defense
from fedleak.instantiate import Part
from fedleak.models import build_model

CONF = Path(__file__).parents[1] / "conf"


def choices(*groups):
    return [
        pytest.param(path, id=f"{path.parent.name}={path.stem}")
        for g in groups
        for path in sorted((CONF / g).iterdir())
    ]


def test_the_choices_are_those_of_the_contract():
    names = {group: {path.stem for path in (CONF / group).iterdir()} for group in ("data", "partition", "defense")}
    assert names["data"] >= {
        "digits", "mnist", "fashion_mnist", "cifar10", "cifar100", "svhn", "lfw", "image_folder"
    }  # fmt: skip
    assert names["partition"] >= {"iid", "biased", "dirichlet", "shards"}
    assert names["defense"] >= {"none", "gaussian", "laplacian", "pruning", "chain"}


@pytest.mark.parametrize("path", choices("data", "partition", "model", "defense", "strategy", "tracking"))
def test_the_first_line_says_what_it_is(path):
    first = path.read_text().splitlines()[0]
    assert first.startswith("# ")
    assert len(first) <= 100


@pytest.mark.parametrize("path", choices("data"))
def test_data(path, tmp_path):
    node = OmegaConf.load(path)
    assert get_method(node._target_) is getattr(fedleak.data, path.stem.removesuffix("16"))
    assert {"root", "download", "image_size", "limit"} <= set(node)
    assert node.download is False
    if path.stem.removesuffix("16") == "digits":
        assert isinstance(instantiate(node), ImageData)
    else:  # the arguments fit: what is refused is the empty folder
        with pytest.raises(Exception, match=r"data\.root="):
            instantiate(node, root=str(tmp_path))


@pytest.mark.parametrize("path", choices("partition"))
def test_partition(path):
    partitioner = instantiate(OmegaConf.load(path))
    assert isinstance(partitioner, Partitioner)
    assert len(partitioner(torch.arange(100) % 10, 5, torch.Generator().manual_seed(0))) == 5


@pytest.mark.parametrize("path", choices("model"))
def test_model(path):
    size = {"vgg11": 32, "densenet121": 32, "inception_v3": 75}.get(path.stem, 28)
    node = OmegaConf.to_container(OmegaConf.load(path)) | ({"hidden": [16]} if path.stem == "vgg11" else {})
    model = build_model(Part("model", node), (1, size, size), 10, seed=0)
    assert model.eval()(torch.rand(2, 1, size, size)).shape == (2, 10)


@pytest.mark.parametrize("path", choices("defense"))
def test_defense(path):
    defense = instantiate(OmegaConf.load(path))
    assert isinstance(defense, Defense)
    if path.stem == "soteria":
        return  # looks at the client, see tests/defenses/test_looking.py
    update = {"weight": torch.randn(10, 10, generator=torch.Generator().manual_seed(0))}
    after = defense.apply(update, generator=torch.Generator().manual_seed(0))
    assert torch.equal(after["weight"], update["weight"]) == (path.stem in ("none", "mixup") or defense.per_example)
