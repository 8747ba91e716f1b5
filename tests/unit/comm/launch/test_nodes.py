"""Which ranks form a node, and the groups that result."""

from __future__ import annotations

import pytest

from disttrain.comm import Communicator, simulate
from disttrain.comm.launch.nodes import NODE_SIZE, describe, find_nodes, partitions
from disttrain.errors import UserError


def ranks(*places: tuple[str, int], node_size: int = 0) -> list[dict[str, object]]:
    return [{"host": host, "local_rank": local_rank, "node_size": node_size} for host, local_rank in places]


def test_hosts_are_nodes_for_any_placement_of_ranks() -> None:
    filled = ranks(("a", 0), ("a", 1), ("b", 0), ("b", 1))
    assert partitions(filled) == {"node": [[0, 1], [2, 3]], "across": [[0, 2], [1, 3]]}
    round_robin = ranks(("a", 0), ("b", 0), ("a", 1), ("b", 1))
    assert partitions(round_robin) == {"node": [[0, 2], [1, 3]], "across": [[0, 1], [2, 3]]}
    mirrored = ranks(("a", 0), ("b", 0), ("b", 1), ("a", 1))
    assert partitions(mirrored) == {"node": [[0, 3], [1, 2]], "across": [[0, 1], [2, 3]]}


def test_local_ranks_distinguish_hosts_with_the_same_name() -> None:
    assert find_nodes(ranks(("node", 0), ("node", 1), ("node", 0), ("node", 1))) == [[0, 1], [2, 3]]


def test_node_size_takes_precedence_over_hosts() -> None:
    four = [("a", 0), ("a", 1), ("a", 2), ("a", 3)]
    assert find_nodes(ranks(*four, node_size=2)) == [[0, 1], [2, 3]]
    assert describe(3, {NODE_SIZE: " 2 "})["node_size"] == 2
    for invalid in ("0", "-1", "two"):
        with pytest.raises(UserError, match=NODE_SIZE):
            describe(0, {NODE_SIZE: invalid})
    with pytest.raises(UserError, match="differs"):
        partitions(ranks(("a", 0)) + ranks(("a", 1), node_size=2))


def test_uneven_nodes_are_an_error_when_a_group_is_requested() -> None:
    with pytest.raises(UserError, match=r"some nodes have 1, others 2: .* a divisor of 3"):
        partitions(ranks(("a", 0), ("a", 1), ("b", 0)))

    def run(comm: Communicator) -> None:
        comm.barrier()
        with pytest.raises(UserError, match="the same number of ranks on every node"):
            comm.group("across")

    simulate(5, run, local_size=2)
