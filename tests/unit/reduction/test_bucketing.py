"""Which parameters share a bucket."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from disttrain import DistributedOptimizer
from disttrain.comm import Communicator, SingleProcess, simulate
from tests.unit.reduction.test_reducer import MLP, build, inputs, mean_gradient


def test_mixed_dtypes_have_buckets_of_their_own() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(
                nn.Linear(8, 8, dtype=dtype) for dtype in (torch.float32, torch.float64, torch.bfloat16, torch.float16)
            )

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack(
                [layer(x.to(layer.weight.dtype)).square().mean().double() for layer in self.layers]
            ).sum()

    template = Mixed()
    for spec in ("dense", {"name": "topk", "ratio": 1.0, "min_numel": 0}):

        def run(comm: Communicator, spec: Any = spec) -> tuple[nn.Module, DistributedOptimizer]:
            model, optimizer = build(template, comm, compressor=spec)
            model(inputs(comm.rank)).backward()
            assert optimizer.synchronize()
            return model, optimizer

        wanted = mean_gradient(template, 2, lambda model, rank: model(inputs(rank)))
        for model, optimizer in simulate(2, run):
            for bucket in optimizer.reducer.buckets:
                assert {slot.parameter.dtype for slot in bucket.slots} == {bucket.flat.dtype}
                if bucket.compressor.name == "topk":
                    assert bucket.state.residual.dtype in (torch.float32, torch.float64)
            for parameter, expected in zip(model.parameters(), wanted, strict=True):
                assert parameter.grad is not None
                torch.testing.assert_close(parameter.grad.double(), expected.double(), rtol=2e-2, atol=2e-3)


def test_small_and_one_dimensional_parameters_are_sent_dense_in_one_buffer() -> None:
    model, optimizer = build(MLP, SingleProcess(), compressor={"name": "topk", "min_numel": 200}, bucket_mb=None)
    dense = [bucket for bucket in optimizer.reducer.buckets if bucket.compressor.name == "dense"]
    assert len(dense) == 1
    assert {slot.name for slot in dense[0].slots} == {"0.bias", "2.bias", "4.bias", "0.weight", "4.weight"}
    assert optimizer.reducer.buckets[-1] is dense[0], "its last gradient is due last"
    del model
