"""The tiny task in a process that kills itself, at a moment that the environment chooses."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from typing import Any

import torch
from torch import nn

from disttrain.comm import detect
from tests.support.tiny_task import Tiny

BOMB = "TEST_BOMB"
"""JSON: the rank, where ("step", "evaluation", "checkpoint"), at which passage (from 1), and seconds after it."""


class _Bomb:
    """Counts passages at a place; after the last one it kills the process."""

    def __init__(self) -> None:
        chosen = json.loads(os.environ.get(BOMB, "{}"))
        self.where = chosen["where"] if chosen and chosen["rank"] == detect().rank else None
        if self.where is not None:
            self._left, self._delay = chosen["count"], chosen["delay"]
            sys.addaudithook(self._on_event)

    def pass_by(self, where: str) -> None:
        if where == self.where:
            self._left -= 1
            if self._left == 0:
                threading.Thread(target=self._explode, daemon=True).start()

    def _on_event(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Files and folders of checkpoints that are made, opened (also to be fsynced), renamed, deleted."""
        if event in ("open", "os.mkdir", "os.rename", "os.remove") and "/checkpoints" in str(arguments[0]):
            self.pass_by("checkpoint")

    def _explode(self) -> None:
        time.sleep(self._delay)
        os.kill(os.getpid(), signal.SIGKILL)


_bomb = _Bomb()


class Bombed(Tiny):
    def loss(self, model: nn.Module, batch: Any) -> torch.Tensor:
        _bomb.pass_by("step")
        return super().loss(model, batch)

    def evaluate(self, model: nn.Module, batch: Any) -> dict[str, tuple[torch.Tensor | float, int]]:
        _bomb.pass_by("evaluation")
        return super().evaluate(model, batch)
