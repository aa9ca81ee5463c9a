"""The whole loss of iBOT and DINOv2, and its gradient, written out a second time from the papers.

Nothing of the step is borrowed but the draw of the masks: tokens, Sinkhorn, both cross-entropies and what spreads the
features are here in plain float64, with all logits at once.
"""

from typing import Any

import pytest
import torch
from methods.test_self_distillation import method, views
from torch import Tensor
from torch.nn import functional as F

# V global crops of B tiles are X = V x B; Q crops in all; N patches; R masked patches; K prototypes; D features.
KNOBS = {"crop_weight": 0.7, "patch_weight": 0.3, "koleo_weight": 0.1, "kde_weight": 0.2, "kde_kappa": 5.0}
TEMPERATURES = {"teacher_temperature": 0.07, "patch_teacher_temperature": 0.06, "teacher_temperature_warmup": 0.3}
PROGRESS = 0.15  # temperatures half risen from 0.04, KDE an eighth: (0.15 - 0.1) / 0.4


def sinkhorn(logits_RK: Tensor, temperature: float) -> Tensor:
    """As in DINOv2's code: prototypes (K, R), rows then columns, three times."""
    mass_KR = torch.exp(logits_RK / temperature).T
    for _ in range(3):
        mass_KR = mass_KR / mass_KR.sum(1, keepdim=True) / len(mass_KR)
        mass_KR = mass_KR / mass_KR.sum(0, keepdim=True) / mass_KR.shape[1]
    return (mass_KR * mass_KR.shape[1]).T


def tokens(network: Any, x: Tensor, mask_XN: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Class token (X, D) and patch tokens (X, N, D) of a ViT with one class token."""
    vit = network.vit
    embedded = vit.patch_embed(x).flatten(1, -2)
    if mask_XN is not None:
        embedded = embedded.clone()
        embedded[mask_XN] = network.mask_token
    side, (first, grid) = int(embedded.shape[1] ** 0.5), vit.pos_embed.split([1, 16], 1)
    grid = grid.unflatten(1, (4, 4)).permute(0, 3, 1, 2)
    if side != 4:
        grid = F.interpolate(grid, (side, side), mode="bicubic", antialias=True)
    position = torch.cat([first, grid.flatten(2).mT], 1)
    seen = torch.cat([vit.cls_token.expand(len(x), -1, -1), embedded], 1) + position
    seen = vit.norm(vit.blocks(seen))
    return seen[:, 0], seen[:, 1:]


def cosines(head: Any, x: Tensor) -> Tensor:
    return F.normalize(head.mlp(x), dim=-1).double() @ F.normalize(head.last_layer.weight.double(), dim=1).T


def koleo(x_BD: Tensor) -> Tensor:
    x_BD = F.normalize(x_BD.double(), dim=1)
    distance_BB = torch.cdist(x_BD, x_BD) + 1e9 * torch.eye(len(x_BD))
    return -distance_BB.amin(1).log().mean()


def kde(x_BD: Tensor, kappa: float) -> Tensor:
    x_BD = F.normalize(x_BD.double(), dim=1)
    others_BB = (kappa * x_BD @ x_BD.T).exp() * (1 - torch.eye(len(x_BD)))
    return (others_BB.sum(1) / (len(x_BD) - 1)).log().mean()


def expected(made: Any, images: list[Tensor], mask_XN: Tensor) -> Tensor:
    large, small = torch.cat(images[:2]), torch.cat(images[2:])
    with torch.no_grad():
        told_XD, told_XND = tokens(made.teacher, large)  # whole: the teacher sees no mask
        target_VBK = sinkhorn(cosines(made.teacher_head, told_XD), 0.055).unflatten(0, (2, -1))
        patch_head = made.teacher_patch_head or made.teacher_head
        patch_target_RK = sinkhorn(cosines(patch_head, told_XND[mask_XN]), 0.05)
    pooled_XD, patches_XND = tokens(made.student, large, mask_XN)
    said_XK = cosines(made.head, torch.cat([pooled_XD, tokens(made.student, small)[0]]))
    said_QBK = F.log_softmax(said_XK / 0.1, -1).unflatten(0, (4, -1))
    pairs = [(v, q) for v in range(2) for q in range(4) if v != q]
    crops = sum(-(target_VBK[v] * said_QBK[q]).sum(-1).mean() for v, q in pairs) / len(pairs)
    patch_said_RK = F.log_softmax(cosines(made.patch_head or made.head, patches_XND[mask_XN]) / 0.1, -1)
    crop_R = mask_XN.nonzero()[:, 0]
    loss_R = -(patch_target_RK * patch_said_RK).sum(-1)
    patches = sum(loss_R[crop_R == x].mean() for x in crop_R.unique()) / len(large)
    spread = sum(0.1 * koleo(crop_BD) + 0.2 / 8 * kde(crop_BD, 5.0) for crop_BD in pooled_XD.chunk(2))
    return 0.7 * crops + 0.3 * patches + spread


@pytest.mark.parametrize("name", ["ibot", "dinov2"])
def test_loss_and_gradient_are_those_of_the_formulas_written_out(name: str) -> None:
    made = method(name, **KNOBS, **TEMPERATURES)
    torch.manual_seed(1)
    for parameter in made.student.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)  # else the student would say what the teacher says
    made.student.mask_token.data.normal_()
    batch = views()._replace(progress=PROGRESS)
    mask_XN = made._masked(batch, torch.cat(batch.images[:2])).mask_XN
    assert len(set(mask_XN.sum(1).tolist())) > 2  # crops weigh the same however many of their patches are masked
    ours, theirs = made(batch).loss, expected(made, batch.images, mask_XN)
    torch.testing.assert_close(ours.double(), theirs, rtol=1e-5, atol=0)
    learning = {key: value for key, value in made.named_parameters() if value.requires_grad}
    grads = zip(*(torch.autograd.grad(loss, list(learning.values())) for loss in (ours, theirs)), strict=True)
    for key, (mine, written_out) in zip(learning, grads, strict=True):
        assert float((mine - written_out).norm()) < 1e-3 * float(written_out.norm()) + 1e-6, key
