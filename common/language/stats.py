"""Statistics of completions: pass@k, and running sums over micro-batches and processes."""

import math
from collections import Counter

import torch

from common.parallel import World


def pass_at_k(n: int, correct: int, k: int) -> float:
    """Chance that k of n samples, drawn without replacement, hold a right one (unbiased, arXiv 2107.03374)."""
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)  # eq: 1 - C(n - c, k) / C(n, k)


def with_means(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(P, G) rewards, some perhaps missing (NaN, infinite) -> (P, G) with the others' mean in their place, which
    changes neither mean nor sum of squares; (P, 1) how many there are; (P, G) bool: missing, or equal in the group.

    Equal is by lowest and highest: rounding must not make a tiny spread, which dividing by the std would blow up.
    """
    scored = groups.isfinite()
    n = scored.sum(1, keepdim=True).to(groups.dtype)
    low = groups.masked_fill(~scored, torch.inf).amin(1, keepdim=True)
    high = groups.masked_fill(~scored, -torch.inf).amax(1, keepdim=True)
    means = groups.masked_fill(~scored, 0.0).sum(1, keepdim=True) / n
    return torch.where(scored, groups, means), n, ~scored | (low >= high)


class Sums:
    """Sums, minima and maxima over micro-batches, without asking the device for a number before the end."""

    def __init__(self) -> None:
        self.sums: Counter = Counter()
        self.least: dict[str, torch.Tensor] = {}
        self.most: dict[str, torch.Tensor] = {}

    def add(self, values: dict, passes: int = 1) -> None:
        """values: numbers or detached tensors (), parts of a sum or mean over the step, which has so many passes; or,
        where their names end in min or max, extremes of a part."""
        for name, value in values.items():
            if name.endswith("min"):
                self.least[name] = torch.minimum(self.least.get(name, value), value)
            elif name.endswith("max"):
                self.most[name] = torch.maximum(self.most.get(name, value), value)
            else:
                self.sums[name] += value / passes

    def totals(self, world: World) -> dict[str, float]:
        """All of them over all processes, as Python floats."""
        totals = torch.stack([torch.as_tensor(v, device=world.device, dtype=torch.float32) for v in self.sums.values()])
        found = dict(zip(self.sums, world.total(totals).tolist()))
        for values, extreme in ((self.least, min), (self.most, max)):
            rows = world.gather([{name: float(value) for name, value in values.items()}])
            found |= {name: extreme(row[name] for row in rows) for name in values}
        return found
