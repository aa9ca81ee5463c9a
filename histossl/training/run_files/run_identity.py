"""Whether a run's directory belongs to what is asked now: its settings, the weights it starts from, its tiles."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from histossl.backbones.loading import file_digest, from_anywhere
from histossl.core.config import PretrainConfig, read_run, refuse_other_config
from histossl.core.errors import MismatchError
from histossl.core.workspace import PretrainDir
from histossl.runtime.locks import held
from histossl.tiles.store.index import TileIndex
from histossl.tiles.store.subset import open_subset


def refuse_other_run(index: TileIndex, run: PretrainDir, config: PretrainConfig) -> None:
    """MismatchError if `run` was begun with other settings, from other weights, or on other tiles."""
    if not run.run_json.exists():
        return
    before = read_run(run.run_json)
    try:
        refuse_other_config(run.run_json, config, ("weights",) if _same_weights(run, before, config) else ())
    except MismatchError as error:
        if run.checkpoint.exists() or run.backbone.exists() or held(run):
            raise
        raise MismatchError(f"{error}. Nothing was saved in it yet: it may as well be deleted") from error
    tiles = before.get("tiles", {})
    digest = tiles.get("digest")
    if digest != index.digest:
        raise MismatchError(
            f"{run.root} was begun on other tiles (set {digest}, now {index.digest}); "
            "use another --name, or another --workspace for other tiles"
        )
    now = open_subset(index, config.subset).facts() if config.subset else None
    if tiles.get("subset") != now:
        raise MismatchError(
            f"{run.root}: subset {config.subset!r} was made anew after this run had begun; use another --name"
        )


def findable(config: PretrainConfig) -> PretrainConfig:
    """As run.json keeps it: a weights file is found again from any directory."""
    path = _file(config)
    return config if path is None else replace(config, weights=str(path))


def digest_of_weights(config: PretrainConfig) -> str:
    """Of the file that the run starts from; '' where that is no file."""
    path = _file(config)
    return "" if path is None else file_digest(path)


def _file(config: PretrainConfig) -> Path | None:
    path = from_anywhere(Path(config.weights))
    return path if config.weights not in ("imagenet", "random") and path.is_file() else None


def _same_weights(run: PretrainDir, before: Mapping[str, Any], config: PretrainConfig) -> bool:
    """Whether both are the same file, wherever it lies and however its path is written."""
    was, digest = Path(str(before["config"].get("weights", ""))), before.get("weights_digest", "")
    now, given = from_anywhere(Path(config.weights)), digest_of_weights(config)
    if not given:  # of a run that is finished the file is not needed any more, and may have been elsewhere
        return digest != "" and (was == now or (run.backbone.exists() and was.name == now.name))
    if not digest:  # of a version that kept the path alone, as it was typed
        return now.parts[-len(was.parts) :] == was.parts
    if digest != given and was == now:
        raise MismatchError(
            f"{run.root} was begun from {was} when that had other content (digest {digest}, now {given}); "
            "put that file back to go on, or use another --name"
        )
    return bool(digest == given)
