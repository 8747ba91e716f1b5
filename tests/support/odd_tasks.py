"""Tasks whose model cannot be trained, or whose data cannot be evaluated."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.data import Dataset

from tests.support.tiny_task import Tiny


class NothingHeldOut(Tiny):
    def eval_data(self) -> Dataset[Any]:
        return self._data(3, 0)


class Lazy(Tiny):
    def build_model(self) -> nn.Module:
        return nn.Sequential(nn.LazyLinear(2))
