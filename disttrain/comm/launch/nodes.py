"""Which ranks form a node: the ranks of a host, unless ``DISTTRAIN_NODE_SIZE`` is set."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from disttrain.collectives import Group
from disttrain.errors import UserError

NODE_SIZE = "DISTTRAIN_NODE_SIZE"
"""Number of consecutive ranks that count as one node. For networks whose fast part spans less than a host (the GPUs of
one switch) or more than a host (a rack), and for trying a setup of several nodes on one machine."""


def describe(local_rank: int, environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """Return what other ranks need to know about this rank to find its node, as JSON values.

    Raises:
        UserError: ``DISTTRAIN_NODE_SIZE`` is not a positive integer.
    """
    text = environ.get(NODE_SIZE, "").strip()
    if text and (not text.isdecimal() or int(text) == 0):
        raise UserError(f"{NODE_SIZE}={text!r} must be an integer, 1 or more")
    return {"host": socket.gethostname(), "local_rank": local_rank, "node_size": int(text or 0)}


def find_nodes(ranks: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Return the ranks of every node, in ascending order.

    Two ranks with the same host name and the same local rank are on different nodes: containers may share a name.

    Args:
        ranks: what ``describe`` returned on each rank.
    """
    seen: Counter[tuple[str, int]] = Counter()
    nodes: dict[tuple[str, int], list[int]] = {}
    for rank, description in enumerate(ranks):
        if description["node_size"]:
            key = ("", rank // description["node_size"])
        else:
            place = (description["host"], description["local_rank"])
            key = (description["host"], seen[place])
            seen[place] += 1
        nodes.setdefault(key, []).append(rank)
    return list(nodes.values())


def partitions(ranks: Sequence[Mapping[str, Any]]) -> dict[Group, list[list[int]]]:
    """Split the world into groups, for each kind of group. The i-th group of ``across`` has the i-th rank of each node.

    Args:
        ranks: what ``describe`` returned on each rank.

    Raises:
        UserError: nodes differ in their number of ranks, or ranks differ in ``DISTTRAIN_NODE_SIZE``.
    """
    if len({description["node_size"] for description in ranks}) > 1:
        raise UserError(f"{NODE_SIZE} differs between ranks: set it to the same value on all ranks, or unset it")
    nodes = find_nodes(ranks)
    sizes = sorted({len(node) for node in nodes})
    if len(sizes) > 1:
        raise UserError(
            f"groups by node need the same number of ranks on every node; some nodes have {sizes[0]}, others "
            f"{sizes[-1]}: start the same number on each, or set {NODE_SIZE} to a divisor of {len(ranks)}"
        )
    return {"node": nodes, "across": [sorted(ranks) for ranks in zip(*nodes, strict=True)]}
