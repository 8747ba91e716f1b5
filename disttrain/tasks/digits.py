"""Handwritten digits, 1,797 gray images of 8x8 pixels that come with scikit-learn, and a small CNN."""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import nn
from torch.utils.data import Dataset

from disttrain.tasks.base import Task, TensorData

_SPLIT_SEED = 2024  # fixed, so that the held-out images do not depend on the run's seed


class Digits(Task):
    """Classification of digits. A stratified fifth of the images is held out."""

    width: int = Field(default=32, ge=1, description="channels of the first convolution; the others have twice as many")
    batch_norm: bool = Field(default=False, description="use BatchNorm, over each rank's part of the batch")
    dropout: float = Field(
        default=0.0, ge=0, lt=1, description="fraction of the features dropped before the last two layers"
    )
    label_smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="fraction of each label spread over all classes, in the training loss only"
    )

    def build_model(self) -> nn.Module:
        width, wide = self.width, 2 * self.width

        def convolution(channels: int, out: int) -> list[nn.Module]:
            normal = [nn.BatchNorm2d(out)] if self.batch_norm else []
            return [nn.Conv2d(channels, out, 3, padding=1, bias=not self.batch_norm), *normal, nn.ReLU()]

        return nn.Sequential(
            *convolution(1, width),
            *convolution(width, wide),
            nn.MaxPool2d(2),
            *convolution(wide, wide),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Dropout(self.dropout),
            nn.Linear(4 * wide, wide),
            nn.ReLU(),
            nn.Linear(wide, 10),
        )

    @cached_property
    def _split(self) -> tuple[TensorData, TensorData]:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        images, labels = load_digits(return_X_y=True)
        train_x, eval_x, train_y, eval_y = train_test_split(
            images, labels, test_size=0.2, random_state=_SPLIT_SEED, stratify=labels
        )
        mean, deviation = train_x.mean(), train_x.std()

        def data(x: Any, y: Any) -> TensorData:
            pixels = torch.from_numpy((x - mean) / deviation).float().view(-1, 1, 8, 8)
            return TensorData(pixels, torch.from_numpy(y).long())

        return data(train_x, train_y), data(eval_x, eval_y)

    def train_data(self) -> Dataset[Any]:
        return self._split[0]

    def eval_data(self) -> Dataset[Any]:
        return self._split[1]

    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        images, labels = batch
        return F.cross_entropy(model(images), labels, label_smoothing=self.label_smoothing)

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, tuple[torch.Tensor | float, int]]:
        images, labels = batch
        scores = model(images)
        return {
            "accuracy": ((scores.argmax(1) == labels).sum(), len(labels)),
            "loss": (F.cross_entropy(scores, labels, reduction="sum"), len(labels)),
        }
