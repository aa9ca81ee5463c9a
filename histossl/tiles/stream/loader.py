"""From the tile store to batches in memory: read and decode ahead of the training loop, in its order, and nothing else.

    order = TileOrder(index, seed=0)
    with tile_batches(index, order, global_batch=256, start_step=0, num_steps=1000, num_workers=8) as batches:
        for tiles, numbers, positions in batches: ...

Workers are threads. Decoding releases Python's lock, so they use every core; they start at once, need no shared memory
(which containers keep small), outlive no parent, and cannot differ in their random state, for they have none.

Shapes: B tiles, H W pixels.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Protocol, Self

import numpy as np
import simplejpeg
import torch
from numpy.typing import NDArray
from torch import Tensor

from histossl.core.errors import StoreError, UsageError
from histossl.tiles.stream.sampler import Ints

CHUNK = 16  # tiles that one worker reads and decodes in one go
DAMAGED_SHARE = 0.01  # more damaged tiles than this stop the run ...
DAMAGED_FIRST = 1000  # ... counted over at least so many reads, so that two bad tiles at the start do not
MAX_STAND_INS = 100


class Store(Protocol):
    """What loading needs of a TileIndex."""

    @property
    def tile_px(self) -> int: ...

    def read(self, number: int) -> bytes: ...
    def read_many(self, numbers: Ints) -> list[bytes]: ...


class Order(Protocol):
    """What loading needs of a TileOrder."""

    @property
    def num_tiles(self) -> int: ...

    def tiles_at(self, positions: Ints) -> Ints: ...


Batch = tuple[Tensor, Tensor, Tensor]


def decode_tiles(jpegs: Sequence[bytes], tile_px: int, device: torch.device | None = None) -> Tensor:
    """(B, 3, tile_px, tile_px) uint8 RGB, in channels-last memory: the bytes lie as the decoder wrote them.

    On a CUDA device nvJPEG decodes, through torchvision, the whole batch at once. Where colours are thinned out (4:2:0)
    it enlarges them without smoothing, so pixels beside a coloured edge differ by some levels, few by more than ten.
    """
    if device is not None and device.type == "cuda":
        return _decoded_on_gpu(jpegs, tile_px, device)
    pixels = np.empty((len(jpegs), tile_px, tile_px, 3), dtype=np.uint8)
    for place, jpeg in enumerate(jpegs):
        decode_into(pixels[place], jpeg, f"tile {place} of {len(jpegs)}")
    return torch.from_numpy(pixels).permute(0, 3, 1, 2)


def decode_good_tiles(index: Store, numbers: Sequence[int] | Ints) -> tuple[Tensor, Ints]:
    """(pixels (B, 3, H, H) uint8, their numbers (B,)) of those tiles that are whole: for looking, not for training."""
    pixels = np.empty((len(numbers), index.tile_px, index.tile_px, 3), dtype=np.uint8)
    good: list[int] = []
    for number in numbers:
        try:
            decode_into(pixels[len(good)], index.read(int(number)), f"tile {number}")
            good.append(int(number))
        except StoreError:
            continue  # training meets it too, and names it
    return torch.from_numpy(pixels[: len(good)]).permute(0, 3, 1, 2), np.array(good, dtype=np.int64)


def decode_into(pixels: NDArray[np.uint8], jpeg: bytes, name: str) -> None:
    """Decode one tile into pixels (H, W, 3). Damaged, or of another size: a StoreError that names it."""
    _refuse_other_size(jpeg, pixels.shape[0], name)
    try:
        simplejpeg.decode_jpeg(jpeg, "RGB", buffer=pixels)
    except ValueError as error:
        raise _not_whole(name, error) from error


def _decoded_on_gpu(jpegs: Sequence[bytes], tile_px: int, device: torch.device) -> Tensor:
    from torchvision.io import ImageReadMode, decode_jpeg

    for place, jpeg in enumerate(jpegs):
        _refuse_other_size(jpeg, tile_px, f"tile {place} of {len(jpegs)}")
    files = [torch.from_numpy(np.frombuffer(jpeg, np.uint8).copy()) for jpeg in jpegs]
    # nvJPEG writes from a stream of its own, which does not wait for this one: into memory that a backward pass, still
    # in line here, may not have done with (pytorch/vision issue 9606).
    torch.cuda.current_stream(device).synchronize()
    try:
        return torch.stack(decode_jpeg(files, mode=ImageReadMode.RGB, device=device))
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        if "out of memory" in str(error):
            raise
        decode_tiles(jpegs, tile_px)  # a StoreError that names the tile, if it is one's fault
        raise CannotDecodeError(
            f"--decode-on-gpu: does not work on this machine ({' '.join(str(error).split())[:160]}), and the tiles are "
            "whole; leave it out"
        ) from error


class CannotDecodeError(UsageError):
    """The GPU could not decode tiles that are whole."""


def _refuse_other_size(jpeg: bytes, tile_px: int, name: str) -> None:
    try:
        height, width, *_ = simplejpeg.decode_jpeg_header(jpeg)
    except ValueError as error:
        raise _not_whole(name, error) from error
    if (height, width) != (tile_px, tile_px):
        raise StoreError(f"{name}: is {width} x {height} px, not {tile_px} x {tile_px} px; tile this slide again")


def _not_whole(name: str, error: Exception) -> StoreError:
    return StoreError(f"{name}: is not a whole JPEG ({error}); tile its slide again")


def tile_batches(
    index: Store,
    order: Order,
    global_batch: int,
    start_step: int,
    num_steps: int,
    rank: int = 0,
    world_size: int = 1,
    num_workers: int = 2,
    pin_memory: bool = False,
    decode_on: torch.device | None = None,
) -> TileBatches:
    """The batches of steps start_step .. start_step + num_steps - 1, in order, each read before it is asked for.

    Step s takes positions s * global_batch .. (s + 1) * global_batch - 1 of the order, whatever the number of
    processes; each rank gets its contiguous slice. Yields (tiles uint8 (b, 3, H, W), numbers (b,), positions (b,)), the
    latter two int64 on the CPU. `num_workers=0` reads in the calling thread. With `decode_on` (a CUDA device) workers
    only read; tiles are decoded there when they are asked for, and stay there: for too few cores beside a fast GPU,
    which `histossl bench views` finds out.
    """
    if global_batch < 1 or global_batch % world_size:
        raise UsageError(f"--batch-size {global_batch}: must be a positive multiple of the {world_size} processes")
    return TileBatches(
        index, order, global_batch, start_step, num_steps, rank, world_size, num_workers, pin_memory, decode_on
    )


class TileBatches(Iterator[Batch]):
    """An iterator of batches that can be closed, and that remembers what was wrong and how long was waited.

    A damaged tile is left out, counted, and replaced by the tile half an epoch further on in the order: the same
    one on every run, and none of its neighbours in the stream, so no batch holds a tile twice for it.
    """

    def __init__(
        self,
        index: Store,
        order: Order,
        global_batch: int,
        start_step: int,
        num_steps: int,
        rank: int,
        world_size: int,
        num_workers: int,
        pin_memory: bool,
        decode_on: torch.device | None,
    ) -> None:
        self._index, self._order, self._pin_memory, self._decode_on = index, order, pin_memory, decode_on
        self._decoded_there = False
        self._global_batch, self._batch, self._rank = global_batch, global_batch // world_size, rank
        self._steps = iter(range(start_step, start_step + num_steps))
        self._pool = ThreadPoolExecutor(num_workers, "tiles") if num_workers else None
        self._ahead: deque[_Pending] = deque()
        # Two batches ahead keep the workers busy over a step; small batches need more of them for the same.
        self._depth = max(2, -(-2 * num_workers * CHUNK // self._batch))
        self._lock = threading.Lock()
        self.damaged: dict[int, str] = {}  # tile number -> what is wrong with it
        self.num_read = 0
        self.wait_s = 0.0  # how long the caller stood waiting for tiles

    def __next__(self) -> Batch:
        began_s = time.perf_counter()
        try:
            if self._pool is None:
                pending = self._begin()
            else:
                while len(self._ahead) < self._depth and (begun := self._begin()) is not None:
                    self._ahead.append(begun)
                pending = self._ahead.popleft() if self._ahead else None
            if pending is None:
                raise StopIteration
            for part in pending.parts:
                part.result()
            tiles = self._decoded(pending) if self._decode_on is not None else pending.tiles()
        except BaseException:
            self.close()
            raise
        self.wait_s += time.perf_counter() - began_s
        return tiles, torch.from_numpy(pending.numbers), torch.from_numpy(pending.positions)

    def _begin(self) -> _Pending | None:
        """Start reading the next batch; None after the last."""
        step = next(self._steps, None)
        if step is None:
            return None
        start = step * self._global_batch + self._rank * self._batch
        positions = np.arange(start, start + self._batch, dtype=np.int64)
        pending = _Pending(self._order.tiles_at(positions), positions)
        if self._decode_on is None:
            pending.make_room(self._index.tile_px, self._pin_memory)
        for first in range(0, self._batch, CHUNK):
            here = slice(first, min(first + CHUNK, self._batch))
            if self._pool is None:
                self._fill(pending, here)
            else:
                pending.parts.append(self._pool.submit(self._fill, pending, here))
        return pending

    def _fill(self, batch: _Pending, here: slice) -> None:
        try:
            jpegs = self._index.read_many(batch.numbers[here])
        except StoreError:
            jpegs = []  # one of them is damaged: each is read by itself, to see which
        for place in range(here.start, here.stop):
            self._fill_one(batch, place, jpegs[place - here.start] if jpegs else None)

    def _fill_one(self, batch: _Pending, place: int, jpeg: bytes | None) -> None:
        """Decode the tile of one place, or the first good one of its stand-ins, and note which one it was."""
        number = int(batch.numbers[place])
        stand_in = int(batch.positions[place]) + max(1, self._order.num_tiles // 2)
        for attempt in range(MAX_STAND_INS):
            try:
                if number not in self.damaged:
                    jpeg = jpeg or self._index.read(number)
                    if batch.pixels is None:
                        _refuse_other_size(jpeg, self._index.tile_px, f"tile {number}")
                        batch.jpegs[place] = jpeg
                    else:
                        decode_into(batch.pixels[place], jpeg, f"tile {number}")
                    batch.numbers[place] = number
                    with self._lock:
                        self.num_read += 1
                    return
            except StoreError as error:
                self._note_damage(number, error)
            number, jpeg = int(self._order.tiles_at(np.array([stand_in + attempt]))[0]), None
        raise TooManyDamaged(f"no good tile found in {MAX_STAND_INS} tries: {next(reversed(self.damaged.values()))}")

    def _decoded(self, batch: _Pending) -> Tensor:
        """All at once where `decode_on` says; one by one here if that failed, to find which tile it was."""
        try:
            tiles = decode_tiles(batch.jpegs, self._index.tile_px, self._decode_on)
            self._decoded_there = True
            return tiles
        except (StoreError, CannotDecodeError) as error:
            if isinstance(error, CannotDecodeError) and not self._decoded_there:
                raise  # at the first batch: not a tile of a kind that nvJPEG does not know, but the machine
            batch.make_room(self._index.tile_px, self._pin_memory)
            for place, jpeg in enumerate(batch.jpegs):
                self._fill_one(batch, place, jpeg)
            return batch.tiles().to(self._decode_on)

    def _note_damage(self, number: int, error: StoreError) -> None:
        with self._lock:
            self.damaged[number] = str(error)
            self.num_read += 1
            looked_at = min(self._order.num_tiles, max(self.num_read, DAMAGED_FIRST))
            if len(self.damaged) > max(1, DAMAGED_SHARE * looked_at):
                raise TooManyDamaged(
                    f"{len(self.damaged)} of the {self.num_read} tiles read so far are damaged (more than "
                    f"{DAMAGED_SHARE:.0%}), the last one: {error}"
                ) from error

    def close(self) -> None:
        """Stop reading ahead. Called at the end, on an error, and on leaving a `with`."""
        self._ahead.clear()
        self._steps = iter(range(0))
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class TooManyDamaged(StoreError):
    """Not one tile but the store: ends the run."""


class _Pending:
    """A batch on its way: as JPEGs if it is to be decoded later, else as pixels (B, H, W, 3)."""

    def __init__(self, numbers: Ints, positions: Ints) -> None:
        self.numbers, self.positions = numbers, positions
        self.jpegs = [b""] * len(numbers)
        self.pixels: NDArray[np.uint8] | None = None
        self.parts: list[Future[None]] = []
        self._memory: Tensor | None = None

    def make_room(self, side: int, pin_memory: bool) -> None:
        shape = (len(self.numbers), side, side, 3)
        if pin_memory:
            self._memory = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        else:
            # NumPy's large arrays come in huge pages: a fresh batch costs far fewer page faults than torch.empty's.
            self._memory = torch.from_numpy(np.empty(shape, dtype=np.uint8))
        self.pixels = self._memory.numpy()

    def tiles(self) -> Tensor:
        assert self._memory is not None
        return self._memory.permute(0, 3, 1, 2)
