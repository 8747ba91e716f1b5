"""Distributed data-parallel training for PyTorch with pluggable gradient compression."""

from disttrain import compression
from disttrain.comm import init
from disttrain.errors import PeerLostError, UserError
from disttrain.optim.distributed import DistributedOptimizer

__version__ = "0.1.0"

__all__ = ["DistributedOptimizer", "PeerLostError", "UserError", "__version__", "compression", "init"]
