import numpy as np
import torch

from fedleak.seeding import derive_seed, generator, global_draws, mixed_generator, numpy_generator, plain_generator


def test_streams_depend_on_every_part_and_on_nothing_else():
    seeds = {derive_seed(0, "batch", 1, 2), derive_seed(0, "batch", 2, 1), derive_seed(1, "batch", 1, 2)}
    assert len(seeds) == 3
    torch.manual_seed(1)
    a = torch.rand(3, generator=generator(0, "x"))
    torch.manual_seed(2)
    assert torch.equal(a, torch.rand(3, generator=generator(0, "x")))


def test_seeds_are_the_same_on_every_machine():
    assert derive_seed(0, "batch", 1, 2) == 389980600524227703


def test_the_streams_of_published_tables_stay_what_they_are():
    assert plain_generator(5).initial_seed() == 5
    entropy = np.random.SeedSequence([7, 1, 2, 0, 3]).generate_state(1, np.uint64)[0]
    assert mixed_generator(7, 1, 2, 0, 3).initial_seed() == int(entropy) >> 1
    assert numpy_generator(5).random() == np.random.default_rng(5).random()


def test_global_draws_are_seeded_and_put_back():
    torch.manual_seed(1)
    wanted = torch.rand(2)
    torch.manual_seed(1)
    with global_draws(7):
        a = torch.rand(2)
    assert torch.equal(torch.rand(2), wanted)
    with global_draws(7):
        assert torch.equal(torch.rand(2), a)
