"""What a backbone said of the observations of one rollout, for the epochs that learn from them."""

import hashlib

import torch
from torch import Tensor

from common.robot.interface_n17 import patches
from common.robot.transforms import to_device


def prompted(c, prompt: Tensor, images: Tensor | None, count: int) -> dict[str, Tensor]:
    """What the backbone of a model with the sizes `c` takes: the prompt (1, S) with images (count, 3, h, w) uint8, or
    none, on the prompt's device."""
    ids = prompt.expand(count, -1)
    batch = {f"{c.prefix}input_ids": ids, f"{c.prefix}attention_mask": torch.ones_like(ids)}
    if images is not None and c.version == "n15":
        batch["images"] = images
    elif images is not None:
        batch["patches"] = patches(images, c.patch_size, c.merge_size)
        batch["image_grid_thw"] = torch.tensor([[1, *(side // c.patch_size for side in images.shape[2:])]] * count)
    return to_device(batch, prompt.device)


class FeatureCache:
    """What the backbone saw and said in one rollout, each distinct observation once.

    A frozen backbone says the same in every epoch, so its features are kept; of one that trains only the images are,
    and it runs again in every minibatch. Without a camera there is one observation: the instruction.

    agent: see `Agent` of ppo_gr00t.py; its `backbone`, `look` and `prompt` are used.
    """

    def __init__(self, agent):
        self.agent, self.index = agent, {}
        self.frozen = not any(p.requires_grad for p in agent.model.backbone.parameters())
        self.images: list[torch.Tensor] = []  # U of (3, size, size) uint8, empty without a camera or with features
        self.features: list[torch.Tensor] = []  # U of (S, W)

    @torch.no_grad()
    def add(self, images: torch.Tensor | None, count: int) -> torch.Tensor:
        """(count,) the numbers of these observations; the backbone runs on those that are new."""
        keys = [b""] * count
        if images is not None:
            keys = [hashlib.blake2b(image.numpy().tobytes(), digest_size=16).digest() for image in images]
        new = [i for i, key in enumerate(keys) if key not in self.index and key not in keys[:i]]
        if new:
            chosen = None if images is None else images[new]
            self.index |= {keys[i]: len(self.index) + n for n, i in enumerate(new)}
            self.features += self.agent.backbone(chosen, len(new)).unbind()
            if images is not None and not self.frozen:
                self.images += chosen.unbind()
        return torch.tensor([self.index[key] for key in keys], device=self.agent.prompt.device)

    def look(self, index: torch.Tensor, state: torch.Tensor, fresh: bool = False) -> dict[str, torch.Tensor]:
        """The agent's look at observations (B,) of this cache; `fresh`: of a backbone that trains, with gradient."""
        distinct, inverse = index.unique(return_inverse=True)
        if fresh and not self.frozen:
            images = torch.stack([self.images[i] for i in distinct.tolist()]) if self.images else None
            features = self.agent.backbone(images, len(distinct))
        else:
            features = torch.stack([self.features[i] for i in distinct.tolist()])
        return self.agent.look(features, inverse, state)
