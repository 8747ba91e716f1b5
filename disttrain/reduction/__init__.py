"""From gradients on N ranks to their mean: buckets, hooks, order, overlap, and the count of bytes."""

from disttrain.reduction.ledger import Ledger, Traffic
from disttrain.reduction.reducer import Reducer

__all__ = ["Ledger", "Reducer", "Traffic"]
