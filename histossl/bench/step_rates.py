"""What this machine does per second on the way from disk to a training step, which part is the limit, what to change.

Every part is measured by itself, and then the whole: a step as it runs, and the same with views that are at hand. What
lies between these two is what tiles and views cost where they matter.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from histossl.bench.view_rates import Figure, SyntheticStore, ViewRates, view_rates
from histossl.core.config import PretrainConfig, RuntimeConfig, TileConfig
from histossl.core.workspace import Workspace
from histossl.methods import entry_of
from histossl.runtime.distributed import joined
from histossl.tiles.store.index import TileIndex
from histossl.tiles.store.zip_store import new_store, scale_name
from histossl.training.setup.dry_run import fit_memory, timed_step_s
from histossl.training.setup.run import Prepared
from histossl.views.recipe import recipe_named

ROUNDS = 2  # both kinds of step in turn, the faster of each counts: other work on the machine only ever slows
HIDDEN = 0.95  # of the rate with views at hand: what tiles and views cost is then hidden behind the network


@dataclass(frozen=True)
class Rates:
    """Of one machine, one method and one backbone."""

    views: ViewRates
    at_hand: Figure  # a step's tile with views that never leave the device: the network alone
    as_it_runs: Figure
    on_gpu: bool

    @property
    def parts(self) -> dict[str, Figure]:
        """What may limit. On a GPU the first runs beside the others; on a CPU nothing does."""
        made = self.views.on_gpu or self.views.views
        loaded = self.views.loaded
        if self.views.decode_on_gpu is not None and self.views.decode_on_gpu.ms < loaded.ms:
            loaded = self.views.decode_on_gpu
        return {"tiles": loaded, "views": made, "network": self.at_hand}

    @property
    def limit(self) -> str:
        """The slowest part: `tiles`, `views` or `network`."""
        return max(self.parts, key=lambda name: self.parts[name].ms)

    @property
    def figures(self) -> list[Figure]:
        """The rows of the table, from disk to step."""
        seen = self.views
        between = [each for each in (seen.decode_on_gpu, seen.on_gpu) if each is not None]
        return [seen.read, seen.decode, seen.loaded, seen.views, *between, self.at_hand, self.as_it_runs]


def measure(index: TileIndex, config: PretrainConfig, operation: RuntimeConfig, num_steps: int) -> Rates:
    """Needs `config.batch_size` and no GPU; about a minute for a small backbone on two cores."""
    recipe = recipe_named(config.recipe or entry_of(config.method).default_recipe, config.view_px)
    seen = view_rates(index, recipe, max(1, operation.num_workers), num_tiles=128, repeats=2)
    with tempfile.TemporaryDirectory() as nowhere, joined() as processes:
        run = Workspace(Path(nowhere)).pretrain("bench")
        tried = Prepared(index, run, config, operation, processes)
        fit_memory(tried)
        rounds = [
            (timed_step_s(tried, num_steps), timed_step_s(tried, num_steps, resident=True)) for _ in range(ROUNDS)
        ]
        as_it_runs, at_hand = (min(each) for each in zip(*rounds, strict=True))
        kind = processes.device.type
    where = f"{config.backbone}, {config.batch_size} tiles of {config.view_px} px"

    def figure(name: str, step_s: float, note: str) -> Figure:
        return Figure(name, (step_s * 1000 / config.batch_size,), note)

    return Rates(
        seen,
        figure("step, views at hand", at_hand, f"the network alone: {where}"),
        figure("step, as it runs", as_it_runs, "tiles, views, network, optimizer: the loop of `pretrain`"),
        kind == "cuda",
    )


def advice(rates: Rates) -> list[str]:
    """Which part is the limit, and what to change, a line each."""
    share = rates.at_hand.ms / rates.as_it_runs.ms
    parts = rates.parts
    lines = [f"limit: {_LIMITS[rates.limit]} ({parts[rates.limit].rate} tiles/s); {_changes(rates)[rates.limit]}"]
    if share >= HIDDEN:
        lines.append("tiles and views cost nothing: a step as it runs is as fast as one with views at hand")
    elif rates.as_it_runs.ms - rates.at_hand.ms > 2 * (parts["tiles"].ms + parts["views"].ms):
        lines.append(
            f"a step as it runs takes {1 / share - 1:.0%} longer than with views at hand, more than tiles and views "
            "explain: this machine does other work; measure again when it is quiet"
        )
    else:
        dearer = max(("tiles", "views"), key=lambda name: parts[name].ms)
        remedy = "" if rates.limit == dearer else f"; {_changes(rates)[dearer]}"
        lines.append(f"tiles and views cost {1 - share:.0%} of a step as it runs, {_LIMITS[dearer]} most of it{remedy}")
    if rates.views.decode_on_gpu is not None:
        faster = rates.views.loaded.ms / rates.views.decode_on_gpu.ms
        lines.append(
            f"decoding on the GPU is {faster:.1f}x as fast as on the workers: pass --decode-on-gpu to pretrain"
            if faster > 1.2
            else "decoding on the GPU is no faster than on the workers: leave --decode-on-gpu out"
        )
    return lines


_LIMITS = {"tiles": "reading and decoding tiles", "views": "making views", "network": "the network itself"}


def _changes(rates: Rates) -> dict[str, str]:
    """What would make each part faster here."""
    disk = rates.views.read.ms > rates.views.decode.ms
    return {
        "tiles": "put the workspace on a faster disk" if disk else "give --workers more cores",
        "views": "a smaller --view-px" + ("" if rates.on_gpu else ", or a GPU, where they are made beside the model"),
        "network": "--compile, a smaller --backbone or --view-px, or more GPUs"
        if rates.on_gpu
        else "a GPU; without one a smaller --backbone or --view-px",
    }


@contextmanager
def synthetic_tiles(tile_px: int) -> Iterator[TileIndex]:
    """A store of tiles that are as hard to decode as tissue, for as long as it is wanted."""
    made, mpp = SyntheticStore(tile_px), 0.5
    with tempfile.TemporaryDirectory(prefix="histossl-bench-") as directory:
        at = Workspace(Path(directory))
        for slide in ("A", "B"):
            with new_store(at.zip_of(slide), [mpp]) as store:
                for number in made.tiles_of("synthetic"):
                    store.add(number % 16 * tile_px, number // 16 * tile_px, made.read(number), 1.0)
                store.finish(
                    {
                        "tile_px": tile_px,
                        "scales": [{"name": scale_name(mpp), "mpp": mpp, "side_l0": tile_px}],
                        "regions": [],
                        "slide": {"file": f"{slide}.svs", "fingerprint": slide * 32, "mpp_l0": mpp},
                        "config": asdict(TileConfig(tile_px=tile_px, mpp=mpp)),
                    }
                )
        yield TileIndex.open(at)
