"""Buffers of every kind, kept identical on all ranks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from disttrain.comm import Communicator, simulate
from disttrain.optim.replicas.synchronization import average_buffers, broadcast_model

WITHOUT_MEAN = [torch.bool, torch.int16, torch.uint16, torch.uint32, torch.uint64]


def model_of(rank: int) -> nn.Module:
    model = nn.Linear(2, 2)
    model.register_buffer("real", torch.full((3,), 1.0 + rank))
    model.register_buffer("complex", torch.full((2, 2), complex(1 + rank, -rank), dtype=torch.complex64))
    model.register_buffer("conjugated", torch.full((2,), complex(1 + rank, -rank)).conj())
    model.register_buffer("float8", torch.full((2,), 2.0 * (1 + rank)).to(torch.float8_e4m3fn))
    for dtype in WITHOUT_MEAN:
        model.register_buffer(str(dtype).rpartition(".")[2], torch.full((3,), 1 - rank).to(dtype))
    return model


def test_complex_buffers_are_averaged_by_parts_and_what_has_no_mean_is_copied() -> None:
    def run(comm: Communicator) -> dict[str, torch.Tensor]:
        model = model_of(comm.rank)
        average_buffers(model, comm)
        return dict(model.named_buffers())

    for buffers in simulate(2, run):
        assert buffers["real"].tolist() == [1.5] * 3
        assert buffers["complex"].tolist() == [[1.5 - 0.5j] * 2] * 2
        assert buffers["conjugated"].tolist() == [1.5 + 0.5j] * 2
        assert buffers["float8"].float().tolist() == [3.0] * 2
        for dtype in WITHOUT_MEAN:
            assert buffers[str(dtype).rpartition(".")[2]].tolist() == [1] * 3


@pytest.mark.parametrize("world_size", [1, 2])
def test_every_buffer_starts_as_rank_0s(world_size: int) -> None:
    def run(comm: Communicator) -> list[list[int]]:
        model = model_of(comm.rank)
        broadcast_model(model, comm)
        return [buffer.resolve_conj().view(-1).view(torch.uint8).tolist() for buffer in model.buffers()]

    for buffers in simulate(world_size, run):
        assert buffers == [
            buffer.resolve_conj().view(-1).view(torch.uint8).tolist() for buffer in model_of(0).buffers()
        ]
