"""A step of DINO and DINOv2 beside lightly's building blocks, in the plain loop of its examples; and memory.

    python tests/bench/bench_methods.py            # dino, dinov2, memory
    python tests/bench/bench_methods.py methods    # memory of every method with ResNet-50 and ViT-S, counted
    python tests/bench/bench_methods.py memory     # DINOv2 ViT-S/14, batch 128: counted, on a GPU measured

Same batch, crops, backbone, heads and prototypes on both sides; the two are timed in turn. (MoCo v2: bench_train.py.)
"""

import sys
import time
from collections.abc import Callable, Iterable
from statistics import median
from typing import Any

import torch
from lightly.loss import DINOLoss, IBOTPatchLoss, KoLeoLoss
from lightly.models.modules import DINOProjectionHead, MaskedVisionTransformerTIMM
from lightly.models.utils import deactivate_requires_grad, random_block_mask, update_momentum
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from histossl.backbones.loading import create_backbone
from histossl.methods import REGISTRY, classes_of
from histossl.methods.method import Method, Views
from histossl.training.loop import Precision, clip_gradients
from histossl.training.setup.optim import recompute_cheap
from histossl.views.recipe import recipe_named

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BACKBONE, BATCH, SIDE, LOCAL, NUM_LOCAL, PROTOTYPES = "vit_tiny_patch16_224", 16, 96, 48, 6, 4096
ROUNDS, STEPS = 5, 2
HEAD = {"hidden_dim": 2048, "bottleneck_dim": 256}


def made(name: str, backbone_name: str, side: int, **knobs: Any) -> Method:
    backbone, info = create_backbone(backbone_name, "random")
    cls, config = classes_of(name)
    method: Method = cls(backbone, info.feature_dim, recipe_named("dino", side), config(drop_path=0.0, **knobs))
    return method.to(DEVICE).train()


def ours(name: str) -> Callable[[list[Tensor]], None]:
    knobs: dict[str, Any] = {**HEAD, "prototypes": PROTOTYPES, "num_local": NUM_LOCAL, "local_px": LOCAL}
    if name == "dinov2":  # as lightly's example: centred, KoLeo, blocks, separate heads
        knobs |= {"assign": "centre", "koleo_weight": 0.1, "kde_weight": 0.0, "mask_kind": "block", "mask_high": 0.5}
    method = made(name, BACKBONE, SIDE, **knobs)
    learning = [each for each in method.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-4, fused=True)  # as the stage's own (training/setup/optim.py)
    numbers = torch.arange(BATCH)

    def step(images: list[Tensor]) -> None:
        optimizer.zero_grad()
        tiles = numbers.to(DEVICE)
        outcome = method(Views(images, tiles, tiles, 0, progress=0.5, positions_B=numbers))
        outcome.loss.backward()
        clip_gradients([learning], 3.0)
        optimizer.step()
        method.after_step([outcome.carry], 0.5)

    return step


def theirs_dino() -> Callable[[list[Tensor]], None]:
    student, teacher = (create_backbone(BACKBONE, "random")[0] for _ in range(2))
    heads = [DINOProjectionHead(192, 2048, 256, PROTOTYPES, freeze_last_layer=1) for _ in range(2)]
    modules = nn.ModuleList([student, teacher, *heads]).to(DEVICE)
    deactivate_requires_grad(teacher)
    deactivate_requires_grad(heads[1])
    criterion = DINOLoss(output_dim=PROTOTYPES).to(DEVICE)
    learning = [each for each in modules.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-4)

    def step(images: list[Tensor]) -> None:
        update_momentum(student, teacher, m=0.99)
        update_momentum(heads[0], heads[1], m=0.99)
        with torch.no_grad():
            teacher_out = [heads[1](teacher(view).flatten(start_dim=1)) for view in images[:2]]
        student_out = [heads[0](student(view).flatten(start_dim=1)) for view in images]
        loss = criterion(teacher_out, student_out, epoch=0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 3.0)
        optimizer.step()

    return step


def theirs_dinov2() -> Callable[[list[Tensor]], None]:
    vits = [create_backbone(BACKBONE, "random")[0] for _ in range(2)]
    student, teacher = (MaskedVisionTransformerTIMM(vit=vit, weight_initialization="skip",
                                                    pos_embed_initialization="skip") for vit in vits)  # fmt: skip
    crop_heads, patch_heads = (
        [DINOProjectionHead(192, 2048, 256, PROTOTYPES, norm_last_layer=False) for _ in range(2)] for _ in range(2)
    )
    modules = nn.ModuleList([student, teacher, *crop_heads, *patch_heads]).to(DEVICE)
    for frozen in (teacher, crop_heads[1], patch_heads[1]):
        deactivate_requires_grad(frozen)
    crop_loss = DINOLoss(output_dim=PROTOTYPES).to(DEVICE)
    patch_loss, koleo = IBOTPatchLoss(output_dim=PROTOTYPES).to(DEVICE), KoLeoLoss()
    learning = [each for each in modules.parameters() if each.requires_grad]
    optimizer = torch.optim.AdamW(learning, lr=1e-4)
    grid = SIDE // 16

    def step(images: list[Tensor]) -> None:
        globals_X, locals_X = torch.cat(images[:2]), torch.cat(images[2:])
        block = random_block_mask(size=(len(globals_X), grid, grid), min_num_masks_per_block=1, device=DEVICE)
        mask = globals_X.new_zeros(len(globals_X), grid * grid + 1, dtype=torch.bool)
        mask[:, 1:] = block.flatten(start_dim=1)
        with torch.no_grad():
            tokens = teacher.encode(globals_X)
            teacher_out = crop_heads[1](tokens[:, 0])
            teacher_masked = patch_heads[1](tokens[mask])
        seen = student.encode(globals_X, mask=mask)
        student_out, student_masked = crop_heads[0](seen[:, 0]), patch_heads[0](seen[mask])
        local_out = crop_heads[0](student.encode(locals_X)[:, 0])
        student_out = torch.cat([student_out, local_out])
        loss = crop_loss(teacher_out.chunk(2), student_out.chunk(2 + NUM_LOCAL), teacher_temp=0.04)
        loss = loss + patch_loss(teacher_masked, student_masked, block, teacher_temp=0.04)
        loss = loss + 0.1 * sum(koleo(each) for each in seen[:, 0].chunk(2))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learning, 3.0)
        optimizer.step()
        update_momentum(student, teacher, m=0.99)
        update_momentum(crop_heads[0], crop_heads[1], m=0.99)
        update_momentum(patch_heads[0], patch_heads[1], m=0.99)

    return step


def timed(step: Callable[[list[Tensor]], None], images: list[Tensor]) -> tuple[float, float]:
    began_s, began_cpu_s = time.perf_counter(), time.process_time()
    for _ in range(STEPS):
        step(images)
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began_s) / STEPS, (time.process_time() - began_cpu_s) / STEPS


def beside_lightly(name: str, theirs: Callable[[], Callable[[list[Tensor]], None]]) -> None:
    torch.manual_seed(0)
    sides = [SIDE, SIDE, *[LOCAL] * NUM_LOCAL]
    images = [torch.randn(BATCH, 3, side, side, device=DEVICE) for side in sides]
    one, other = ours(name), theirs()
    timed(one, images), timed(other, images)
    rounds = [(timed(one, images), timed(other, images)) for _ in range(ROUNDS)]
    kind = 0 if DEVICE.type == "cuda" else 1  # CPU time on a CPU: others may be at work on it
    ratios = sorted(b[kind] / a[kind] for a, b in rounds)
    our_s, their_s = (median(each[side][kind] for each in rounds) for side in (0, 1))
    print(
        f"{name} step, {BACKBONE}, {BATCH} tiles, 2 x {SIDE} + {NUM_LOCAL} x {LOCAL} px, {PROTOTYPES} prototypes: "
        f"ours {our_s:.2f} s, lightly's blocks {their_s:.2f} s, ratio "
        f"{median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f} over {ROUNDS} rounds)",
        flush=True,
    )


class Peak(TorchDispatchMode):
    """Most bytes that live tensors take at once, by what each operation makes and what has gone since."""

    def __init__(self, held: Iterable[Tensor]) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        for x in held:
            self._add(x)
        self.most = self._now()

    def _add(self, x: Tensor) -> None:
        ref = StorageWeakRef(x.untyped_storage())
        if ref.cdata not in self.alive or self.alive[ref.cdata][0].expired():
            self.alive[ref.cdata] = (ref, x.untyped_storage().nbytes())

    def _now(self) -> int:
        self.alive = {key: each for key, each in self.alive.items() if not each[0].expired()}
        return sum(size for _, size in self.alive.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._add(x)
        self.most = max(self.most, self._now())
        return out


def faked(mode: FakeTensorMode, network: nn.Module) -> None:
    """Its parameters and buffers as shapes without values."""
    for module in network.modules():
        for name, value in [*module._parameters.items()]:
            if value is not None:
                fake = mode.from_tensor(value.detach())
                module._parameters[name] = nn.Parameter(fake, requires_grad=value.requires_grad)
        for name, value in [*module._buffers.items()]:
            if value is not None:
                module._buffers[name] = mode.from_tensor(value)


def memory(batch: int = 128) -> None:
    """Peak of two DINOv2 steps of ViT-S/14 with registers, 2 x 224 + 8 x 98 px, 131,072 prototypes, bf16.

    On a GPU as the allocator has it. Without one, of shapes without values: every tensor that any operation makes is
    counted for as long as it lives; the CUDA context (about half a GB) and the allocator's gaps are not in it.
    """
    for recompute in (False, True):
        method = made("dinov2", "vit_small_patch14_reg4_dinov2", 224, num_local=8, prototypes=131072)
        if recompute:
            recompute_cheap(method.learner())
        numbers = torch.arange(batch)
        sides = [view.size_px for view in method.views().views]
        if DEVICE.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            images = [torch.randn(batch, 3, side, side, device=DEVICE) for side in sides]
            two_steps(method, Views(images, numbers.to(DEVICE), numbers.to(DEVICE), 0, positions_B=numbers))
            peak, how = torch.cuda.max_memory_allocated(), "measured"
        else:
            peak, how = counted(method, sides, numbers), "counted (no GPU at hand)"
        print(
            f"DINOv2 ViT-S/14, batch {batch}, 2 x 224 + 8 x 98 px, 131,072 prototypes, bf16, "
            f"{'with' if recompute else 'without'} recomputation: {peak / 2**30:.1f} GB at most, {how}",
            flush=True,
        )


def counted(method: Any, sides: list[int], numbers: Tensor) -> int:
    batch, globals_X = len(numbers), torch.empty(2 * len(numbers), 3, sides[0], sides[0])
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    if getattr(method, "masks", None):
        masked = method._masked(Views([], numbers, numbers, 0, positions_B=numbers), globals_X)  # on real numbers
        masked = type(masked)(*[mode.from_tensor(each) for each in masked])
        method._masked = lambda *given: masked
    if hasattr(method, "encode_keys"):  # the exchange before BatchNorm draws real numbers, and its memory is small
        method.encode_keys = lambda view, *given: method._key(view)
    faked(mode, method)
    with mode:
        images = [torch.empty(batch, 3, side, side) for side in sides]
        with Peak([*method.parameters(), *method.buffers(), *images]) as peak:
            two_steps(method, Views(images, numbers, numbers, 0, positions_B=numbers))
    return peak.most


def of_every_method(batch: int = 128) -> None:
    """What `histossl methods` says: peak of two steps at 224 px in bf16, with each method's own knobs."""
    for name, entry in REGISTRY.items():
        if name == "colorization":  # how many pixels it is asked about depends on their colours
            continue
        for backbone_name in ("vit_small_patch16_224", "resnet50"):
            if entry.backbones == "ViT" and backbone_name == "resnet50":
                continue
            cls, config = classes_of(name)
            backbone, info = create_backbone(backbone_name, "random")
            method = cls(backbone, info.feature_dim, recipe_named(entry.default_recipe, 224), config()).train()
            peak = counted(method, [view.size_px for view in method.views().views], torch.arange(batch))
            print(f"{name}, {backbone_name}, {batch} tiles: {peak / 2**30:.1f} GB at most, counted", flush=True)


def two_steps(method: Method, views: Views) -> None:
    optimizer = torch.optim.AdamW([each for each in method.parameters() if each.requires_grad])
    for _ in range(2):
        with Precision("bf16").autocast(DEVICE):
            outcome = method(views)
        outcome.loss.backward()
        optimizer.step()
        optimizer.zero_grad()


PARTS = {
    "dino": lambda: beside_lightly("dino", theirs_dino),
    "dinov2": lambda: beside_lightly("dinov2", theirs_dinov2),
    "memory": memory,
    "methods": of_every_method,
}

if __name__ == "__main__":
    for part in sys.argv[1:] or ["dino", "dinov2", "memory"]:
        PARTS[part]()
