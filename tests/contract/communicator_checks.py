"""What every communicator must do. Run as a script in each worker of a launch: rank 0 prints one JSON line a check."""

from __future__ import annotations

import json
import os
import traceback
from collections.abc import Callable

import pytest
import torch

from disttrain.collectives import AllGather, AllReduce, AllToAll, Broadcast, Collective, Group, Result
from disttrain.comm import Communicator, Work, init, simulate
from disttrain.comm.launch.nodes import NODE_SIZE

CHECKS: dict[str, Callable[[Communicator], None]] = {}
FLOATS = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
INTEGERS = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32]
ONLY_MOVED = [torch.bool, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64, torch.complex128]
SHAPES = [(0,), (1,), (), (3, 5), (1001,)]


def check(function: Callable[[Communicator], None]) -> Callable[[Communicator], None]:
    CHECKS[function.__name__] = function
    return function


def values(rank: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Numbers that differ by rank and position, small enough for sums of four ranks to be exact in any dtype."""
    generator = torch.Generator().manual_seed(100 + rank)
    return torch.randint(0, 16, shape, generator=generator).to(dtype)


def everyone(comm: Communicator, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.stack([values(rank, shape, dtype) for rank in range(comm.world_size)])


def assert_same_on_all_ranks(comm: Communicator, tensor: torch.Tensor) -> None:
    raw = tensor.contiguous().view(-1).view(torch.uint8) if tensor.numel() else torch.zeros(0, dtype=torch.uint8)
    for other in comm.all_gather(raw):
        assert torch.equal(other, raw)


@check
def reduces_every_dtype_and_shape(comm: Communicator) -> None:
    for dtype in FLOATS + INTEGERS:
        for shape in SHAPES:
            mine, all_values = values(comm.rank, shape, dtype), everyone(comm, shape, dtype).double()
            before = mine.clone()
            expected = {"sum": all_values.sum(0), "min": all_values.amin(0), "max": all_values.amax(0)}
            if dtype.is_floating_point:
                expected["mean"] = all_values.mean(0)
            for op, wanted in expected.items():
                result = comm.all_reduce(mine, op)  # type: ignore[arg-type]
                assert result.dtype == dtype, (dtype, op)
                assert result.shape == shape
                tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(dtype, 1e-6) if op == "mean" else 0
                torch.testing.assert_close(result.double(), wanted, rtol=tolerance, atol=0)
                assert torch.equal(mine, before), "the blocking spelling leaves its argument alone"


@check
def reduces_random_floats_alike_on_all_ranks(comm: Communicator) -> None:
    for dtype in FLOATS:
        generator = torch.Generator().manual_seed(comm.rank)
        for numel in (1, 7, 4099, 300_000):
            mine = torch.randn(numel, generator=generator).to(dtype)
            for op in ("sum", "mean", "min", "max"):
                assert_same_on_all_ranks(comm, comm.all_reduce(mine, op))  # type: ignore[arg-type]


@check
def half_precision_mean_does_not_overflow(comm: Communicator) -> None:
    for dtype, large in ((torch.float16, 60000.0), (torch.bfloat16, 3e38)):
        mean = comm.all_reduce(torch.full((10,), large, dtype=dtype), "mean")
        torch.testing.assert_close(mean, torch.full((10,), large, dtype=dtype), rtol=1e-2, atol=0)


@check
def refuses_what_has_no_meaning(comm: Communicator) -> None:
    with pytest.raises(ValueError, match="mean"):
        comm.all_reduce(torch.tensor([1, 2]), "mean")
    with pytest.raises(ValueError, match="bool"):
        comm.all_reduce(torch.tensor([True]))
    with pytest.raises(ValueError, match="complex"):
        comm.all_reduce(torch.ones(2, dtype=torch.complex64))
    with pytest.raises(ValueError, match="uint64"):
        comm.all_reduce(torch.ones(2, dtype=torch.uint64), "max")
    with pytest.raises(ValueError, match="root"):
        comm.broadcast(torch.ones(1), root=comm.world_size)
    with pytest.raises(ValueError, match="chunk"):
        comm.all_to_all([torch.ones(1)] * (comm.world_size + 1))


@check
def propagates_infinity_and_nan(comm: Communicator) -> None:
    mine = torch.zeros(4)
    if comm.rank == comm.world_size - 1:
        mine[1], mine[2] = float("inf"), float("nan")
    total = comm.all_reduce(mine)
    assert total[0] == 0
    assert total[1] == float("inf")
    assert total[2].isnan()


@check
def takes_non_contiguous_tensors(comm: Communicator) -> None:
    mine = values(comm.rank, (6, 8), torch.float32).t()[::2]
    wanted = everyone(comm, (6, 8), torch.float32)
    assert torch.equal(comm.all_reduce(mine), wanted.sum(0).t()[::2])
    for rank, part in enumerate(comm.all_gather(mine)):
        assert torch.equal(part, wanted[rank].t()[::2])
    assert torch.equal(comm.broadcast(mine, comm.world_size - 1), wanted[-1].t()[::2])
    image = values(comm.rank, (2, 3, 4, 5), torch.float32).to(memory_format=torch.channels_last)
    assert torch.equal(comm.all_reduce(image), everyone(comm, (2, 3, 4, 5), torch.float32).sum(0))


@check
def gathers_equal_sizes(comm: Communicator) -> None:
    for dtype in [*FLOATS, *INTEGERS, torch.bool]:
        for shape in SHAPES:
            work = comm.start(AllGather(values(comm.rank, shape, dtype), same_size=True))
            for rank, part in enumerate(work.wait()):
                assert part.dtype == dtype
                assert torch.equal(part, values(rank, shape, dtype))


@check
def gathers_unequal_sizes(comm: Communicator) -> None:
    for dtype in [*FLOATS, *INTEGERS, torch.bool]:
        for tail in ((), (3,)):
            for rank, part in enumerate(comm.all_gather(values(comm.rank, (5 * comm.rank, *tail), dtype))):
                assert part.dtype == dtype
                assert torch.equal(part, values(rank, (5 * rank, *tail), dtype))


@check
def exchanges_all_to_all(comm: Communicator) -> None:
    for dtype in [*FLOATS, *INTEGERS]:
        for size in (lambda source, target: 4, lambda source, target: source + 2 * target, lambda source, target: 0):
            chunks = [
                torch.full((size(comm.rank, target), 2), 10 * comm.rank + target).to(dtype)
                for target in range(comm.world_size)
            ]
            for source, part in enumerate(comm.all_to_all(chunks)):
                assert torch.equal(part, torch.full((size(source, comm.rank), 2), 10 * source + comm.rank).to(dtype))
    even = [torch.full((3,), 10.0 * comm.rank + target) for target in range(comm.world_size)]
    for source, part in enumerate(comm.start(AllToAll(even, same_size=True)).wait()):
        assert torch.equal(part, torch.full((3,), 10.0 * source + comm.rank))


@check
def broadcasts_from_every_root(comm: Communicator) -> None:
    for root in range(comm.world_size):
        for dtype in [*FLOATS, *INTEGERS, torch.bool]:
            for shape in SHAPES:
                result = comm.broadcast(values(comm.rank, shape, dtype), root)
                assert torch.equal(result, values(root, shape, dtype))


@check
def moves_every_dtype(comm: Communicator) -> None:
    """Also those that engines know nothing of."""

    def bits(tensor: torch.Tensor) -> list[int]:
        result: list[int] = tensor.contiguous().view(-1).view(torch.uint8).tolist()
        return result

    for dtype in ONLY_MOVED:
        for shape in SHAPES:
            for root in range(comm.world_size):
                copied = comm.broadcast(values(comm.rank, shape, dtype), root)
                assert (copied.dtype, copied.shape) == (dtype, shape)
                assert bits(copied) == bits(values(root, shape, dtype))
            for rank, part in enumerate(comm.all_gather(values(comm.rank, shape, dtype))):
                assert (part.dtype, part.shape) == (dtype, shape)
                assert bits(part) == bits(values(rank, shape, dtype))
        chunks = [values(10 * comm.rank + rank, (comm.rank + 1, 3), dtype) for rank in range(comm.world_size)]
        for rank, part in enumerate(comm.all_to_all(chunks)):
            assert (part.dtype, part.shape) == (dtype, (rank + 1, 3))
            assert bits(part) == bits(values(10 * rank + comm.rank, (rank + 1, 3), dtype))
    mine = torch.complex(torch.ones(3), torch.full((3,), 1.0 + comm.rank))
    for rank, part in enumerate(comm.all_gather(mine.conj())):  # conjugated by a flag alone
        assert part.tolist() == [complex(1, -1 - rank)] * 3


@check
def carries_many_at_once_and_waits_in_any_order(comm: Communicator) -> None:
    works = []
    for index in range(40):
        mine = values(comm.rank, (50 + index,), torch.float32)
        works.append(
            (
                index,
                comm.start(AllReduce(mine.clone(), "sum")),
                comm.start(AllGather(mine, same_size=index % 2 == 0)),
                comm.start(Broadcast(mine.clone(), root=index % comm.world_size)),
            )
        )
    for index, reduced, gathered, broadcast in reversed(works):
        wanted = everyone(comm, (50 + index,), torch.float32)
        assert torch.equal(broadcast.wait(), wanted[index % comm.world_size])
        assert torch.equal(torch.stack(gathered.wait()), wanted)
        assert torch.equal(reduced.wait(), wanted.sum(0))
        assert torch.equal(reduced.wait(), wanted.sum(0)), "a result can be asked for twice"


@check
def reduces_in_place(comm: Communicator) -> None:
    mine = values(comm.rank, (100,), torch.float32)
    result = comm.start(AllReduce(mine, "mean")).wait()
    assert result.data_ptr() == mine.data_ptr(), "a contiguous buffer is not copied"


@check
def carries_objects(comm: Communicator) -> None:
    wanted = [{"rank": rank, "text": "ä" * rank, "list": [1.5, None]} for rank in range(comm.world_size)]
    assert comm.all_gather_object(wanted[comm.rank]) == wanted
    assert comm.broadcast_object(wanted[comm.rank], root=comm.world_size - 1) == wanted[-1]


@check
def tells_where_it_is(comm: Communicator) -> None:
    assert comm.all_gather_object(comm.rank) == list(range(comm.world_size))
    assert comm.all_gather_object(comm.local_rank) == list(range(comm.world_size)), "all workers are on this host"
    assert comm.local_size == comm.world_size
    assert comm.device.type == "cpu"
    comm.barrier()


GROUPS: tuple[Group, ...] = ("node", "across")


def members(comm: Communicator, group: Group) -> list[int]:
    """The ranks of this rank's group, where consecutive ranks fill the nodes."""
    size = int(os.environ.get(NODE_SIZE, comm.local_size))
    first = comm.rank // size * size if group == "node" else comm.rank % size
    return list(range(first, first + size) if group == "node" else range(first, comm.world_size, size))


@check
def groups_have_their_own_ranks(comm: Communicator) -> None:
    assert comm.group("world") is comm
    for group in GROUPS:
        part = comm.group(group)
        assert part is comm.group(group)
        assert (part.rank, part.world_size) == (members(comm, group).index(comm.rank), len(members(comm, group)))
        assert part.all_gather_object(comm.rank) == members(comm, group)
        part.barrier()


@check
def groups_do_not_hear_each_other(comm: Communicator) -> None:
    """Data differ between groups, and collectives of all groups are on the wire together."""
    works: list[tuple[torch.Tensor, Work[Result]]] = []
    for index in range(10):
        shape = (40 + index,)
        mine = values(comm.rank, shape, torch.float32)
        for group in ("world", *GROUPS):
            ranks = list(range(comm.world_size)) if group == "world" else members(comm, group)
            theirs = torch.stack([values(rank, shape, torch.float32) for rank in ranks])
            place, root = ranks.index(comm.rank), index % len(ranks)
            chunks = [values(100 * comm.rank + to, (3,), torch.int32) for to in ranks]
            sent_here = torch.stack([values(100 * rank + comm.rank, (3,), torch.int32) for rank in ranks])
            started: list[tuple[torch.Tensor, Collective]] = [
                (theirs.sum(0), AllReduce(mine.clone(), "sum", group)),
                (theirs.mean(0), AllReduce(mine.clone(), "mean", group)),
                (theirs, AllGather(mine, same_size=index % 2 == 0, group=group)),
                (sent_here, AllToAll(chunks, same_size=True, group=group)),
                (theirs[root], Broadcast(mine.clone(), root, group)),
            ]
            assert torch.equal(theirs[place], mine)
            works += [(wanted, comm.start(collective)) for wanted, collective in started]
    for wanted, work in reversed(works):
        result = work.wait()
        torch.testing.assert_close(torch.stack(result) if isinstance(result, list) else result, wanted)


@check
def groups_keep_the_contract(comm: Communicator) -> None:
    parts = [part for group in GROUPS if (part := comm.group(group)) is not comm]
    for name, function in CHECKS.items():
        if not name.startswith("groups") and function is not tells_where_it_is:
            for part in parts:
                function(part)


def means_of_compressed_gradients(comm: Communicator) -> torch.Tensor:
    """Six steps of a small model's gradients: dense inside nodes, top-k with its residual between them."""
    from disttrain.compression import Policy  # here, since compiled kernels come with it
    from disttrain.reduction import Reducer

    parameters = [
        (f"layer{index}", torch.nn.Parameter(torch.zeros(shape))) for index, shape in enumerate([(9, 7), (30,)])
    ]
    policy = Policy.build({"name": "topk", "ratio": 0.1, "min_numel": 1, "hierarchical": True})
    reducer = Reducer(parameters, comm, policy, bucket_mb=1e-9)
    generator = torch.Generator().manual_seed(comm.rank)
    means = []
    for _ in range(6):
        for _, parameter in parameters:
            parameter.grad = None
            (parameter * torch.randn(parameter.shape, generator=generator)).sum().backward()
        assert reducer.synchronize()
        means += [parameter.grad.reshape(-1).clone() for _, parameter in parameters if parameter.grad is not None]
    return torch.cat(means)


@check
def groups_exchange_compressed_gradients_as_virtual_ranks_do(comm: Communicator) -> None:
    node = comm.group("node").world_size
    if max(node, comm.group("across").world_size) > 2:
        return  # sums of more than two numbers depend on their order, which is the engine's
    expected = simulate(comm.world_size, means_of_compressed_gradients, local_size=node)
    assert torch.equal(means_of_compressed_gradients(comm), expected[comm.rank])


@check
def known_sizes_need_no_round(comm: Communicator) -> None:
    for size in (lambda rank: 3 * rank, lambda rank: 5 * (rank == 0), lambda rank: 0):
        sizes = [size(rank) for rank in range(comm.world_size)]
        mine = values(comm.rank, (sizes[comm.rank], 2), torch.float32)
        for rank, part in enumerate(comm.start(AllGather(mine, sizes=sizes)).wait()):
            assert torch.equal(part, values(rank, (sizes[rank], 2), torch.float32))
        chunks = [torch.full((count,), 10 * comm.rank + rank) for rank, count in enumerate(sizes)]
        for rank, part in enumerate(comm.start(AllToAll(chunks, sizes=[len(mine)] * comm.world_size)).wait()):
            assert torch.equal(part, torch.full((len(mine),), 10 * rank + comm.rank))
    with pytest.raises(ValueError, match="sizes"):
        comm.start(AllGather(torch.ones(2), sizes=[1] * comm.world_size))


def main() -> None:
    torch.set_num_threads(1)
    with init(os.environ["ENGINE"], device="cpu", timeout=60) as comm:
        assert comm.engine == os.environ["ENGINE"]
        for name, function in CHECKS.items():
            problem = ""
            try:
                function(comm)
            except Exception:
                problem = traceback.format_exc()
            problems = comm.all_gather_object(problem)
            if comm.rank == 0:
                first = next((f"rank {rank}: {text}" for rank, text in enumerate(problems) if text), "")
                print("CHECK " + json.dumps([name, first]), flush=True)


if __name__ == "__main__":
    main()
