"""Which ranks share a node: those of one host, unless ``DISTTRAIN_NODE_SIZE`` says otherwise."""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from disttrain.collectives import Group
from disttrain.errors import UserError

NODE_SIZE = "DISTTRAIN_NODE_SIZE"
"""So many consecutive ranks count as one node: where the fast network spans less than a host (the GPUs of one switch)
or more (a rack), and to try on one machine what is meant for many."""


def describe(local_rank: int, environ: Mapping[str, str] = os.environ) -> dict[str, Any]:
    """What the other ranks must know of this one, as JSON values.

    Raises:
        UserError: ``DISTTRAIN_NODE_SIZE`` is no whole number above 0.
    """
    text = environ.get(NODE_SIZE, "").strip()
    if text and (not text.isdecimal() or int(text) == 0):
        raise UserError(f"{NODE_SIZE}={text!r} must be a whole number, 1 or more")
    return {"host": socket.gethostname(), "local_rank": local_rank, "node_size": int(text or 0)}


def find_nodes(ranks: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """The ranks of every node, in ascending order, from what each rank has said of itself.

    Two ranks with one host name and one local rank are not on one node: containers may share a name.
    """
    seen: Counter[tuple[str, int]] = Counter()
    nodes: dict[tuple[str, int], list[int]] = {}
    for rank, said in enumerate(ranks):
        if said["node_size"]:
            key = ("", rank // said["node_size"])
        else:
            place = (said["host"], said["local_rank"])
            key = (said["host"], seen[place])
            seen[place] += 1
        nodes.setdefault(key, []).append(rank)
    return list(nodes.values())


def partitions(ranks: Sequence[Mapping[str, Any]]) -> dict[Group, list[list[int]]]:
    """How each kind of group splits the world, in ascending order: the i-th of ``across`` has every node's i-th rank.

    Raises:
        UserError: nodes differ in their number of ranks, or in ``DISTTRAIN_NODE_SIZE``.
    """
    if len({said["node_size"] for said in ranks}) > 1:
        raise UserError(f"{NODE_SIZE} differs between ranks: set it alike for all of them, or not at all")
    nodes = find_nodes(ranks)
    sizes = sorted({len(node) for node in nodes})
    if len(sizes) > 1:
        raise UserError(
            f"groups by node need as many ranks on every node; here some have {sizes[0]} and some {sizes[-1]}: "
            f"start as many on each, or set {NODE_SIZE} to a number that divides {len(ranks)}"
        )
    return {"node": nodes, "across": [sorted(ranks) for ranks in zip(*nodes, strict=True)]}
