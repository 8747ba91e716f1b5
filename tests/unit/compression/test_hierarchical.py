"""Dense inside nodes, compressed between them: virtual ranks on virtual hosts."""

from __future__ import annotations

import copy
import gc
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from disttrain import DistributedOptimizer, compression
from disttrain.collectives import AllReduce, Collective, sent_bytes
from disttrain.comm import Communicator, simulate
from disttrain.compression import Bucket, Codec, Compressor, Dense, Program, State, hierarchical
from disttrain.compression.base import Hierarchy
from disttrain.errors import UserError
from disttrain.reduction.exchange import Exchange, Executor, finish
from disttrain.training.checkpoints import contents as checkpoint
from disttrain.training.checkpoints import folder as checkpoint_folder
from tests.support import checkpoints

pytestmark = pytest.mark.usefixtures("one_thread")

SHAPES = ((16, 40), (40,), (8, 3, 3, 3), (64, 1), (5, 7), (24, 24))
NAMES = tuple(f"layer{index}.weight" for index in range(len(SHAPES)))
NUMEL = sum(math.prod(shape) for shape in SHAPES)
CASES: list[dict[str, Any]] = [
    {"name": "dense"},
    {"name": "topk", "ratio": 0.1},
    {"name": "topk", "ratio": 0.1, "exchange": "two_stage"},
    {"name": "qsgd", "bits": 4},
    {"name": "qsgd", "bits": 4, "error_feedback": True},
    {"name": "efsign"},
    {"name": "efsign", "exchange": "two_stage", "mean_bits": 2},
    {"name": "powersgd", "rank": 2},
]
LAYOUTS = [(4, 2), (6, 3), (6, 2), (8, 2), (8, 4)]  # ranks, ranks a node

every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
every_layout = pytest.mark.parametrize(("world_size", "local_size"), LAYOUTS)


def gradient(step: int, rank: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randn(NUMEL, generator=generator, dtype=torch.float64)


def make_bucket(comm: Communicator, shapes: tuple[tuple[int, ...], ...] = SHAPES) -> Bucket:
    node, across = comm.group("node"), comm.group("across")
    hierarchy = Hierarchy(node.rank, node.world_size, across.rank, across.world_size)
    return Bucket(
        NAMES[: len(shapes)], shapes, torch.float64, torch.device("cpu"), comm.rank, comm.world_size, hierarchy
    )


class Recorder(Executor):
    """An executor that remembers what it started."""

    def __init__(self, comm: Communicator) -> None:
        super().__init__(comm)
        self.started: list[Collective] = []

    def start(self, collective: Collective, *arguments: Any, **options: Any) -> Any:
        self.started.append(collective)
        return super().start(collective, *arguments, **options)


Run = tuple[list[torch.Tensor], State, list[Collective]]


def run_steps(case: dict[str, Any], world_size: int, local_size: int, num_steps: int = 5) -> list[Run]:
    """Per rank: the means of all steps, the state at the end, and the last step's collectives."""

    def run(comm: Communicator) -> Run:
        compressor = compression.build(case)
        bucket = make_bucket(comm)
        state = hierarchical.init_state(compressor, bucket)
        means = []
        for step in range(num_steps):
            recorder = Recorder(comm)
            program = hierarchical.reduce(compressor, gradient(step, comm.rank), bucket, state)
            ((_, (mean, new_state)),) = finish([Exchange(program, recorder)])
            means.append(mean.clone())
            state.commit(new_state)
        return means, state, recorder.started

    return simulate(world_size, run, local_size=local_size)


def total_gradient(world_size: int, num_steps: int) -> torch.Tensor:
    return torch.stack([gradient(step, rank) for step in range(num_steps) for rank in range(world_size)]).sum(0)


def padded(num_bytes: int) -> int:
    return -(-num_bytes // 16) * 16


def by_parameter(state: State, name: str) -> list[torch.Tensor]:
    return [view for _, tensor, view, _ in state.slices(NAMES) if tensor == name]


@every_case
@every_layout
def test_replicas_are_bit_identical_and_nothing_is_lost(case: dict[str, Any], world_size: int, local_size: int) -> None:
    results = run_steps(case, world_size, local_size)
    for means, _, _ in results:
        assert all(torch.equal(mean, first) for mean, first in zip(means, results[0][0], strict=True))
    states = [state for _, state, _ in results]
    assert len({tuple(state.tensors) for state in states}) == 1, "all ranks save the same names"
    if "residual" not in states[0].tensors:
        assert case["name"] in ("dense", "qsgd")
        return
    num_nodes = world_size // local_size
    pending = []
    for index, shape in enumerate(SHAPES):
        held = [views[index] for state in states if (views := by_parameter(state, "residual"))[index].numel()]
        assert len(held) == num_nodes, "one rank of each node owns the parameter"
        residual = torch.stack(held).mean(0)
        if "server_residual" in states[0].tensors:
            residual = residual + torch.cat([by_parameter(state, "server_residual")[index] for state in states])
        assert residual.numel() == math.prod(shape)
        pending.append(residual)
    sent = torch.stack(results[0][0]).sum(0)
    torch.testing.assert_close(
        sent + torch.cat(pending), total_gradient(world_size, 5) / world_size, rtol=0, atol=1e-12
    )


@every_layout
def test_dense_is_the_mean(world_size: int, local_size: int) -> None:
    means, _, _ = run_steps({"name": "dense"}, world_size, local_size, num_steps=1)[0]
    torch.testing.assert_close(means[0], total_gradient(world_size, 1) / world_size, rtol=0, atol=1e-12)


@every_case
@every_layout
def test_bytes_between_nodes_are_those_of_the_compressor_on_a_nodes_mean(
    case: dict[str, Any], world_size: int, local_size: int
) -> None:
    results = run_steps(case, world_size, local_size, num_steps=1)
    num_nodes = world_size // local_size
    compressor = compression.build(case)
    for rank, (_, state, started) in enumerate(results):
        across = [collective for collective in started if collective.group == "across"]
        assert [collective.group for collective in started] == ["node", *["across"] * len(across), "node"]
        sent = sum(sent_bytes(collective, num_nodes, rank // local_size) for collective in across)
        hierarchy = Hierarchy(rank % local_size, local_size, rank // local_size, num_nodes)
        parts = hierarchical._split(
            Bucket(NAMES, SHAPES, torch.float64, torch.device("cpu"), rank, world_size, hierarchy)
        )
        own = parts[rank % local_size]
        assert own is not None
        match case:
            case {"name": "dense"}:
                assert sent == own.bucket.numel * 8
            case {"name": "topk", "ratio": ratio, **rest} if not rest:
                wanted = max(1, round(ratio * own.bucket.numel))
                assert wanted * 12 <= sent <= wanted * 12 + 32
            case {"name": "powersgd", "rank": width}:
                sizes = [min(width, *shape) * sum(shape) for shape in own.bucket.matrix_shapes]
                assert sent == sum(sizes) * 8
            case {"name": "efsign", "mean_bits": 2}:
                length = math.ceil(own.bucket.numel / num_nodes)
                blocks = math.ceil(length / 256)
                assert length <= 4096
                assert sent == (num_nodes - 1) * (512 + 16) + padded(2 * 8 * blocks) + 64 * blocks
            case {"name": "efsign" | "qsgd"}:
                assert isinstance(compressor, Codec)
                assert sent == compressor.payload_bytes(own.bucket)
        first, *_, last = started
        places = sum(parts[i].bucket.numel for i in range(local_size) if i != rank % local_size)  # type: ignore[union-attr]
        assert sent_bytes(first, local_size, rank % local_size) == 8 * places
        assert sent_bytes(last, local_size, rank % local_size) == 8 * own.bucket.numel
        assert all(
            view.numel() in (0, math.prod(s)) for view, s in zip(by_parameter(state, "residual"), SHAPES, strict=False)
        )


@pytest.mark.parametrize("case", [{"name": "topk", "ratio": 0.1}, {"name": "powersgd", "rank": 2}], ids=str)
@pytest.mark.parametrize(("world_size", "local_size"), [(1, 1), (3, 1), (3, 3)])
def test_one_rank_a_node_is_the_plain_compressor_and_one_node_is_dense(
    case: dict[str, Any], world_size: int, local_size: int
) -> None:
    def plain(comm: Communicator) -> torch.Tensor:
        compressor = compression.build(case)
        bucket = Bucket(NAMES, SHAPES, torch.float64, torch.device("cpu"), comm.rank, comm.world_size)
        program = compressor.reduce(gradient(0, comm.rank), bucket, compressor.init_state(bucket))
        ((_, (mean, _)),) = finish([Exchange(program, Executor(comm))])
        return mean

    means, _, _ = run_steps(case, world_size, local_size, num_steps=1)[0]
    if local_size == 1:
        assert torch.equal(means[0], simulate(world_size, plain)[0])
    else:
        torch.testing.assert_close(means[0], total_gradient(world_size, 1) / world_size, rtol=0, atol=1e-14)


class Undeclared(Dense):
    """Two rounds for parameters of an even size, one for others, and no ``num_rounds``."""

    num_rounds = Compressor.num_rounds

    def reduce(self, grad: torch.Tensor, bucket: Bucket, state: State) -> Program:
        if bucket.numel % 2 == 0:
            yield AllReduce(grad.new_zeros(1))
        mean = yield AllReduce(grad, op="mean")
        return mean, {}


class Wrong(Undeclared):
    def num_rounds(self, bucket: Bucket) -> int:
        return 1


def run_one_step(compressor: Compressor) -> list[torch.Tensor]:
    def run(comm: Communicator) -> torch.Tensor:
        bucket = make_bucket(comm, ((3, 5), (4, 6)))
        state = hierarchical.init_state(compressor, bucket)
        grad = torch.full((bucket.numel,), float(comm.rank), dtype=torch.float64)
        ((_, (mean, _)),) = finish([Exchange(hierarchical.reduce(compressor, grad, bucket, state), Executor(comm))])
        return mean.clone()

    return simulate(4, run, local_size=2)


def test_a_compressor_that_does_not_declare_its_rounds_is_run_to_find_them() -> None:
    for mean in run_one_step(Undeclared()):
        assert torch.equal(mean, torch.full_like(mean, 1.5))


def test_declaring_too_few_rounds_is_an_error() -> None:
    with pytest.raises(AssertionError, match="took 2 rounds; its num_rounds\\(\\) says 1"):
        run_one_step(Wrong())


def test_no_cache_keeps_buckets_alive() -> None:
    bucket = Bucket(NAMES, SHAPES, torch.float32, torch.device("cpu"), 0, 4, Hierarchy(0, 2, 0, 2))
    reference = weakref.ref(bucket)
    state = hierarchical.init_state(compression.TopK(), bucket)
    assert state.residuals
    del bucket, state
    gc.collect()
    assert reference() is None


def test_ownership_is_balanced_and_spread() -> None:
    owned = hierarchical._owned(NAMES, [math.prod(shape) for shape in SHAPES], 3)
    assert sorted(index for indices in owned for index in indices) == list(range(len(SHAPES)))
    totals = [sum(math.prod(SHAPES[index]) for index in indices) for indices in owned]
    assert max(totals) <= max(640, NUMEL)
    owners = {hierarchical._owned((f"block{i}",), [10], 4).index([0]) for i in range(40)}
    assert owners == {0, 1, 2, 3}, "buckets of one parameter do not all fall to one rank"


# The whole way: hooks, buckets, optimizer, state.

with torch.random.fork_rng():
    torch.manual_seed(0)
    MODEL = nn.Sequential(nn.Linear(8, 32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 4)).double()


def train(
    comm: Communicator, spec: dict[str, Any], steps: range, saved: dict[str, Any] | None = None, spoil: int = -1
) -> tuple[torch.Tensor, dict[str, Any], DistributedOptimizer]:
    model = copy.deepcopy(MODEL)
    if saved is not None:
        model.load_state_dict(saved["model"])
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = DistributedOptimizer(sgd, model, comm=comm, compressor={"min_numel": 0, **spec}, bucket_mb=0.004)
    if saved is not None:
        optimizer.load_state_dict(saved["optimizer"])
    for step in steps:
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(100 * step + comm.rank)
        loss = model(torch.randn(6, 8, generator=generator, dtype=torch.float64)).square().mean()
        (loss * (math.nan if step == spoil and comm.rank == 1 else 1.0)).backward()
        optimizer.step()
    weights = torch.cat([parameter.detach().view(-1) for parameter in model.parameters()])
    state = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    return weights, state, optimizer


@pytest.mark.parametrize("local_size", [2, 3])
def test_dense_trains_like_plain_dense(local_size: int) -> None:
    plain = simulate(6, lambda comm: train(comm, {"name": "dense"}, range(8))[0])
    spec = {"name": "dense", "hierarchical": True}
    for weights in simulate(6, lambda comm: train(comm, spec, range(8))[0], local_size=local_size):
        torch.testing.assert_close(weights, plain[0], rtol=0, atol=1e-12)


@every_case
def test_replicas_are_identical_and_a_saved_run_resumes(case: dict[str, Any]) -> None:
    spec = {**case, "hierarchical": True}

    def run(comm: Communicator) -> tuple[torch.Tensor, torch.Tensor]:
        whole, _, _ = train(comm, spec, range(6))
        _, saved, _ = train(comm, spec, range(3))
        return whole, train(comm, spec, range(3, 6), saved)[0]

    results = simulate(6, run, local_size=2)
    for whole, resumed in results:
        assert torch.equal(whole, results[0][0])
        assert torch.equal(resumed, whole)
    start = torch.cat([parameter.detach().view(-1) for parameter in MODEL.parameters()])
    assert not torch.equal(results[0][0], start)


@every_case
def test_a_skipped_step_leaves_no_trace(case: dict[str, Any]) -> None:
    spec = {**case, "hierarchical": True}

    def run(comm: Communicator) -> None:
        *_, before = train(comm, spec, range(3))
        *_, after = train(comm, spec, range(4), spoil=3)
        assert after.skipped_steps == 1
        old, new = before.state_dict()["compression"], after.state_dict()["compression"]
        assert new["step"] == old["step"] == 3
        assert not new["replicated"]
        for name, tensor in old["per_rank"].items():
            assert torch.equal(new["per_rank"][name], tensor)

    simulate(4, run, local_size=2)


def test_uneven_nodes_are_an_error() -> None:
    def run(comm: Communicator) -> None:
        with pytest.raises(UserError, match="the same number of ranks on every node"):
            train(comm, {"name": "topk", "hierarchical": True}, range(1))

    simulate(3, run, local_size=2)


def test_fewer_parameters_than_ranks_and_half_precision() -> None:
    def run(comm: Communicator) -> tuple[torch.Tensor, torch.Tensor]:
        model = nn.Linear(40, 30, bias=False).to(torch.bfloat16)
        with torch.no_grad():
            model.weight.fill_(1.0)
        means = []
        for name in ("dense", "topk"):
            sgd = torch.optim.SGD(model.parameters(), lr=0.0)
            spec = {"name": name, "hierarchical": True}
            optimizer = DistributedOptimizer(sgd, model, comm=comm, compressor=spec)
            (model.weight * (comm.rank + 1)).sum().backward()
            optimizer.synchronize()
            assert model.weight.grad is not None
            means.append(model.weight.grad.clone())
            optimizer.reducer.close()
            optimizer.zero_grad()
        return means[0], means[1]

    results = simulate(8, run, local_size=4)
    for dense, sparse in results:
        torch.testing.assert_close(dense, torch.full_like(dense, 4.5))
        assert torch.equal(sparse, results[0][1])
        assert int((sparse != 0).sum()) == 12


@pytest.mark.parametrize("old", [(4, 2), (6, 3)])
@pytest.mark.parametrize("new", [(4, 2), (4, 1), (8, 4), (6, 2)])
def test_another_layout_of_nodes_keeps_what_is_pending(
    tmp_path: Path, old: tuple[int, int], new: tuple[int, int]
) -> None:
    """A whole checkpoint, loaded where other ranks own the parameters: the mean over the owners stays."""
    spec = {"name": "powersgd", "rank": 1, "hierarchical": True}

    def save(comm: Communicator) -> dict[str, torch.Tensor]:
        _, _, optimizer = train(comm, spec, range(3))
        checkpoints.save(comm, tmp_path, optimizer.model, optimizer, 3)
        return optimizer.state_dict()["compression"]["per_rank"]

    def load(comm: Communicator) -> dict[str, torch.Tensor]:
        _, _, optimizer = train(comm, spec, range(0))
        path = tmp_path / "step-00000003"
        checkpoint.load(*checkpoint_folder.find(path), comm, optimizer.model, optimizer)
        return optimizer.state_dict()["compression"]["per_rank"]

    def pending(states: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
        names = [name for name in states[0] if name.endswith("residual")]
        return {name: torch.stack([state[name] for state in states if state[name].numel()]).mean(0) for name in names}

    saved = simulate(old[0], save, local_size=old[1])
    loaded = simulate(new[0], load, local_size=new[1])
    torch.testing.assert_close(pending(loaded), pending(saved))
