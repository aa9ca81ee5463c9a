"""A queue of past keys: negatives for as long as the ring is, whatever the batch (He et al. 2020, section 3.2).

The ring takes batches of any size, knows each key's tile and slide, and lies in the checkpoint under its own names.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from histossl.methods.method import Method, Views
from histossl.runtime import collectives

# G tiles of all processes, K keys in the ring, D embedding dimensions.


class Keys(NamedTuple):
    """Keys with the tiles and slides they come from, all processes' in rank order."""

    key_GD: Tensor
    tiles_G: Tensor
    slides_G: Tensor

    @classmethod
    def of(cls, keys_of_views: Sequence[Tensor], views: Views) -> Keys:
        """One set of gathered keys (G, D) for each of some views of the same tiles."""
        tiles_G, slides_G = collectives.gather(views.tiles_B), collectives.gather(views.slides_B)
        times = len(keys_of_views)
        return cls(torch.cat(list(keys_of_views)), tiles_G.repeat(times), slides_G.repeat(times))


class Ring(Method):
    """A method with a ring of past keys. Whoever inherits calls `make_ring`, and says in `ring_keys` what a key is."""

    queue_KD: Tensor
    queue_tiles_K: Tensor
    queue_slides_K: Tensor
    pointer: Tensor

    def make_ring(self, size: int, dim: int) -> None:
        self.register_buffer("queue_KD", F.normalize(torch.randn(size, dim), dim=1))
        self.register_buffer("queue_tiles_K", torch.full((size,), -1))
        self.register_buffer("queue_slides_K", torch.full((size,), -1))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))

    def ring_keys(self, views: Views) -> Keys:
        """Keys of a batch, as they fill the ring before step 0. Without gradient."""
        raise NotImplementedError

    @torch.no_grad()
    def enqueue(self, carries: Sequence[Keys]) -> None:
        """Write batches of any size into the ring; one larger than the ring leaves its last keys."""
        size = len(self.queue_KD)
        for keys in carries:
            count = len(keys.key_GD)
            places = (self.pointer + torch.arange(count, device=self.pointer.device)) % size
            last = slice(max(0, count - size), None)
            self.queue_KD[places[last]] = keys.key_GD[last].to(self.queue_KD.dtype)
            self.queue_tiles_K[places[last]] = keys.tiles_G[last]
            self.queue_slides_K[places[last]] = keys.slides_G[last]
            self.pointer.copy_((self.pointer + count) % size)

    def num_prefill_tiles(self) -> int:
        return len(self.queue_KD)

    @torch.no_grad()
    def prefill(self, views: Views) -> None:
        """Real keys of the pretrained encoder instead of noise, which an already trained query finds too easy."""
        self.enqueue([self.ring_keys(views)])

    @torch.no_grad()
    def diagnostics(self) -> dict[str, float]:
        """Effective number of slides in the queue: 1 / sum of squared shares. Near 1, negatives betray their slide."""
        counts = torch.unique(self.queue_slides_K, return_counts=True)[1].double()
        return {"queue_slides": float(counts.sum() ** 2 / counts.square().sum())}
