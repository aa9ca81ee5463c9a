"""A ViT seen as tokens: the pooled feature and the patch tokens, with masked patches replaced before position is added.

What goes out is what timm's own `vit(x)` gives: the pooled feature of an unmasked view is the backbone's feature.
So is the position grid: bicubic with antialias, as DINOv2's models with registers have it; its models without were
trained with an offset of 0.1 and none, which timm does not imitate.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from histossl.core.errors import UsageError

# B views, N patches, D features, h w sides of the patch grid.


class Features(NamedTuple):
    pooled_BD: Tensor
    patches_BND: Tensor


def patch_px(backbone: nn.Module) -> int:
    """Side of a ViT's patches; 1 for backbones without patches."""
    size = getattr(getattr(backbone, "patch_embed", None), "patch_size", 1)
    return int(size[0] if isinstance(size, tuple) else size)


class Tokens(nn.Module):
    """timm ViT (class token, registers or neither) -> `Features`. Adds the mask token, which timm's models lack.

    It starts as the weights file's, where that brought one, else at zero as iBOT's and DINOv2's. (Distilled DINOv2
    models never trained theirs, dinov2#349.)
    """

    def __init__(self, vit: nn.Module, method: str) -> None:
        super().__init__()
        if not isinstance(vit, VisionTransformer):
            raise UsageError(
                f"--method {method}: learns from masked patch tokens, and {type(vit).__name__} has none; take a ViT "
                "(--backbone vit_small_patch16_224, vit_small_patch14_reg4_dinov2, deit_tiny_patch16_224, ...) or "
                "--method dino"
            )
        self.vit: Any = vit
        given = getattr(vit, "given_mask_token", None)
        # (1, D), not (D,): weight decay spares what has one dimension, and iBOT's and DINOv2's is decayed.
        self.mask_token = nn.Parameter(torch.zeros(1, vit.embed_dim) if given is None else given.float()[None].clone())

    def forward(self, x: Tensor, mask_BN: Tensor | None = None) -> Features:
        """x (B, 3, H, W); mask_BN True where the student must not see the patch."""
        embedded = self.vit.patch_embed(x)  # (B, h, w, D), or (B, N, D) where the size is fixed
        if mask_BN is not None:
            hidden = mask_BN.view(embedded.shape[:-1])[..., None]
            embedded = torch.where(hidden, self.mask_token.to(embedded.dtype), embedded)
        tokens = self.vit.norm_pre(self.vit._pos_embed(embedded))
        tokens = self.vit.norm(self.vit.blocks(tokens))
        return Features(self.vit.forward_head(tokens), tokens[:, self.vit.num_prefix_tokens :])
