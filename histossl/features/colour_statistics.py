"""The stain-colour floor: 27 colour statistics per tile and no network, as a start of its own on every curve.

Laboratories stain differently and cases come in batches, so colour alone often tells classes apart. A curve that does
not clear this one has learnt staining.

    red, green, blue          mean, standard deviation, 10th, 50th and 90th percentile      15
    hue, saturation, value    mean, standard deviation                                       6
    optical density (R, G, B) mean, standard deviation                                       6

Shapes: B tiles, C channels, P pixels.
"""

from __future__ import annotations

import torch
from torch import Tensor

NUM_STATISTICS = 27
EVERY = 2  # pixels are taken on a grid of this step: a quarter of them says the same in a quarter of the time


def colour_statistics(tiles: Tensor) -> Tensor:
    """(B, 27) float32 from uint8 (B, 3, H, W) RGB."""
    rgb_BCP = tiles[:, :, ::EVERY, ::EVERY].flatten(2).float() / 255
    density_BCP = -torch.log(rgb_BCP.clamp_min(1 / 255))
    percentiles = torch.quantile(rgb_BCP, torch.tensor([0.1, 0.5, 0.9], device=tiles.device), dim=2)
    pieces = [*_moments(rgb_BCP), *percentiles, *_moments(_hsv(rgb_BCP)), *_moments(density_BCP)]
    return torch.cat(pieces, dim=1)


def _moments(values_BCP: Tensor) -> tuple[Tensor, Tensor]:
    return values_BCP.mean(2), values_BCP.std(2)


def _hsv(rgb_BCP: Tensor) -> Tensor:
    """Hue, saturation, value in [0, 1]. Hue counts from cyan, so that its seam lies where no H&E stain is."""
    value_BP, top_BP = rgb_BCP.max(1)
    chroma_BP = value_BP - rgb_BCP.amin(1)
    red_BP, green_BP, blue_BP = rgb_BCP.unbind(1)
    safe_BP = chroma_BP.clamp_min(1e-6)
    sixths = torch.stack(
        [(green_BP - blue_BP) / safe_BP, (blue_BP - red_BP) / safe_BP + 2, (red_BP - green_BP) / safe_BP + 4]
    )
    hue_BP = sixths.gather(0, top_BP[None])[0] / 6
    hue_BP = torch.where(chroma_BP > 1e-6, (hue_BP + 0.5) % 1, torch.full_like(hue_BP, 0.5))
    saturation_BP = chroma_BP / value_BP.clamp_min(1e-6)
    return torch.stack([hue_BP, saturation_BP, value_BP], dim=1)
