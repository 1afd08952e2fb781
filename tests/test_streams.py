"""Random streams: named, and no two of them equal."""

import numpy as np
import torch

from common.streams import stream, stream_seed, torch_stream


def test_numpy_pads_seeds_with_zeros_which_is_why_streams_are_hashes():
    a, b = (np.random.default_rng(seed).random(4) for seed in ([42, 1], [42, 1, 0, 0]))
    assert (a == b).all()
    assert (stream(42, "order", 1).random(4) != stream(42, "order", 1, 0).random(4)).all()


def test_no_two_streams_of_a_run_or_of_neighbouring_seeds_are_equal():
    names = ("pool", "order", "noise", "refill", "fresh", "eval")
    indices = [(), (0,), (1,), (2,), (0, 0), (0, 1), (1, 0), (1, 1), (0, 0, 0), (11,), (1, 1, 1)]
    keys = [(seed, name, i) for seed in (0, 1, 2, 41, 42, 43) for name in names for i in indices]
    numpy_draws = {tuple(stream(seed, name, *i).integers(0, 2**63, 2)) for seed, name, i in keys}
    torch_draws = {tuple(torch.rand(3, generator=torch_stream(seed, name, *i)).tolist()) for seed, name, i in keys}
    assert len(numpy_draws) == len(torch_draws) == len(keys)


def test_names_and_indices_cannot_run_into_each_other():
    assert len({stream_seed(4, "a1"), stream_seed(4, "a", 1), stream_seed(41, "a"), stream_seed(1, "a", 4)}) == 4


def test_a_stream_is_the_same_whatever_kind_of_integer_names_it():
    assert stream_seed(42, "order", 3) == stream_seed(np.int64(42), "order", np.int64(3))
    assert (stream(42, "order", 3).random(3) == stream(42, "order", 3).random(3)).all()
