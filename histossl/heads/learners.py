"""What learns from labelled items of one start: a head on ready embeddings, or backbone and head together."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from histossl.core.config import FinetuneConfig
from histossl.features.extraction import COLOUR, Bags, slide_tiles
from histossl.features.initialisations import Start
from histossl.heads.end_to_end import TileSource, tune
from histossl.heads.feature_heads import Floats, Ints, OnFeatures
from histossl.heads.model_folder import ModelInfo, save_model, slide_means
from histossl.labels.label_table import LabelTable
from histossl.labels.splits import Splits, groups_of
from histossl.tiles.store.index import TileIndex

POOLED = ("mean", "knn", "simpleshot")  # heads that the colour floor may have too


class Learner(Protocol):
    """One start, made to learn from some items and to be asked about others."""

    def fit(self, items: Ints, pool: Ints, seed: int) -> None: ...

    def predict(self, items: Ints) -> Floats:
        """(items, classes) by the last fit."""
        ...

    def save(self, folder: Path, items: Ints, info: ModelInfo) -> None:
        """The model folder of the last fit, which was on `items`."""
        ...


class Frozen(OnFeatures):
    """A head on features that stay as they are."""

    def __init__(self, start: Start, bags: Bags, table: LabelTable, splits: Splits, config: FinetuneConfig) -> None:
        # The floor is colour alone, told as simply as can be: never attention over tiles, nothing end to end.
        head = head_of(start.name, config) if start.name == COLOUR else config.head
        super().__init__(head, bags, table.label_numbers(), groups_of(table, splits.group), len(table.classes))
        self.start, self.seed, self.table = start, config.seed, table

    def save(self, folder: Path, items: Ints, info: ModelInfo) -> None:
        known = _of_slides(self.bags.pooled[items], self.table, items)
        save_model(folder, *self.start.load(self.seed), self.fitted, *known, info)


def _of_slides(features: Floats, table: LabelTable, items: Ints) -> tuple[Floats, Ints]:
    own = [table.items[item] for item in items]
    return slide_means(features, [item.slide for item in own], [item.patient for item in own])


class EndToEnd:
    """The backbone itself learns, with an attention head."""

    def __init__(
        self,
        start: Start,
        index: TileIndex,
        table: LabelTable,
        splits: Splits,
        config: FinetuneConfig,
        input_px: int,
        device: torch.device,
    ) -> None:
        self.backbone, self.info = start.load(config.seed)
        self.table = table
        self.config, self.input_px, self.device, self.num_classes = config, input_px, device, len(table.classes)
        self.labels, self.groups = table.label_numbers(), groups_of(table, splits.group)
        of_slide = {slide: slide_tiles(index, slide) for slide in table.slides}
        numbers = [
            of_slide[item.slide] if item.tiles is None else of_slide[item.slide][item.tiles] for item in table.items
        ]
        self.source = TileSource(index, numbers)

    def fit(self, items: Ints, pool: Ints, seed: int) -> None:
        del pool
        self.fitted = tune(
            self.backbone,
            self.info,
            self.source,
            items,
            self.labels[items],
            self.groups[items],
            num_classes=self.num_classes,
            part=self.config.train,
            input_px=self.input_px,
            config=self.config.tune,
            device=self.device,
            seed=seed,
        )

    def predict(self, items: Ints) -> Floats:
        return self.fitted.predict_proba(self.source, items)

    def save(self, folder: Path, items: Ints, info: ModelInfo) -> None:
        mean = np.stack([self.fitted.features(self.source, int(item)).mean(0) for item in items])
        save_model(
            folder, self.fitted.backbone, self.info, self.fitted.head, *_of_slides(mean, self.table, items), info
        )


def head_label(config: FinetuneConfig) -> str:
    """The head of every start that has a network."""
    return config.head if config.train == "head" else f"end-to-end ({config.train})"


def head_of(start: str, config: FinetuneConfig) -> str:
    """What stands in the tables' column `head`: the colour floor's is a pooled one, whatever the others have."""
    label = head_label(config)
    return "mean" if start == COLOUR and label not in POOLED else label
