"""Named random streams: every stream of a run is a function of (seed, name, indices), and no two of them are equal.

NumPy pads seeds with zeros, so [42, 1], [42, 1, 0] and [42, 1, 0, 0] are one stream, and a seed plus an epoch is the
next seed's: a hash has neither trap.
"""

import hashlib

import numpy as np
import torch


def stream_seed(seed: int, name: str, *indices: int) -> int:
    """A 128-bit number that belongs to this stream alone. indices: step, level, process, …"""
    text = repr((int(seed), name, tuple(map(int, indices))))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "little")


def stream(seed: int, name: str, *indices: int) -> np.random.Generator:
    return np.random.default_rng(stream_seed(seed, name, *indices))


def torch_stream(seed: int, name: str, *indices: int) -> torch.Generator:
    """The same on the CPU for torch, whose seeds have 63 bits."""
    return torch.Generator().manual_seed(stream_seed(seed, name, *indices) % 2**63)
