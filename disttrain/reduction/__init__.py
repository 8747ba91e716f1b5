"""From the gradients of N ranks to their mean: buckets, hooks, order, overlap, and the bytes on the wire.

``Reducer`` is the interface. It depends on neither optimizers nor training loops.
"""

from disttrain.reduction.measurements.ledger import Entry, Ledger, Traffic
from disttrain.reduction.measurements.norms import SquaredNorms
from disttrain.reduction.reducer import Reducer

__all__ = ["Entry", "Ledger", "Reducer", "SquaredNorms", "Traffic"]
