import torch

from fedleak.seeding import derive_seed, generator


def test_streams_depend_on_every_part_and_on_nothing_else():
    seeds = {derive_seed(0, "batch", 1, 2), derive_seed(0, "batch", 2, 1), derive_seed(1, "batch", 1, 2)}
    assert len(seeds) == 3
    torch.manual_seed(1)
    a = torch.rand(3, generator=generator(0, "x"))
    torch.manual_seed(2)
    assert torch.equal(a, torch.rand(3, generator=generator(0, "x")))


def test_seeds_are_the_same_on_every_machine():
    assert derive_seed(0, "batch", 1, 2) == 389980600524227703
