"""A single process. Every collective is the identity, so callers need not ask whether training is distributed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from disttrain.comm.base import Communicator, EngineOp
from disttrain.comm.launch.environment import Environment
from disttrain.comm.work import Work


class SingleProcess(Communicator):
    """The communicator of a world of one rank."""

    engine = "single"

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self.rank, self.world_size, self.local_rank, self.local_size = 0, 1, 0, 1
        self.device = torch.device(device)

    @classmethod
    def join(cls, environment: Environment, device: torch.device, *, timeout: float, patience: float) -> SingleProcess:
        return cls(device)

    def _all_reduce(self, flat: torch.Tensor, op: EngineOp) -> Work[torch.Tensor]:
        return Work.completed(flat)

    def _all_gather(self, flat: torch.Tensor, sizes: Sequence[int]) -> Work[torch.Tensor]:
        return Work.completed(flat)

    def _all_to_all(
        self, flat: torch.Tensor, send_sizes: Sequence[int], receive_sizes: Sequence[int]
    ) -> Work[torch.Tensor]:
        return Work.completed(flat)

    def _broadcast(self, flat: torch.Tensor, root: int) -> Work[torch.Tensor]:
        return Work.completed(flat)
