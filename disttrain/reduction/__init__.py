"""From gradients on N ranks to their mean: buckets, hooks, order, overlap, and the bytes on the wire."""

from disttrain.reduction.measurements.ledger import Entry, Ledger, Traffic
from disttrain.reduction.measurements.norms import SquaredNorms
from disttrain.reduction.reducer import Reducer

__all__ = ["Entry", "Ledger", "Reducer", "SquaredNorms", "Traffic"]
