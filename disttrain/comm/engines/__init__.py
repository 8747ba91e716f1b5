"""The engines: one file for each library that can carry collectives, and one for N virtual ranks in one process.

Each engine is a subclass of ``Communicator`` with four primitives, and a row of ``ENGINES``. Nothing else imports its
library.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from disttrain.comm.base import Communicator


@dataclass(frozen=True)
class Engine:
    """Where an engine is, and what it needs.

    Attributes:
        communicator: import path of its class, ``module:Class``.
        package: the library that has to be installed, if torch is not enough.
        install: the command that installs it.
    """

    communicator: str
    package: str | None = None
    install: str = ""

    @property
    def is_installed(self) -> bool:
        return self.package is None or importlib.util.find_spec(self.package) is not None

    def load(self) -> type[Communicator]:
        """Import the class, and with it the engine's library."""
        module, _, name = self.communicator.partition(":")
        communicator: type[Communicator] = getattr(importlib.import_module(module), name)
        return communicator


ENGINES = {
    "single": Engine("disttrain.comm.engines.single:SingleProcess"),
    "torch": Engine("disttrain.comm.engines.torch_distributed:TorchCommunicator"),
    "horovod": Engine("disttrain.comm.engines.horovod:HorovodCommunicator", "horovod", "launch/install-horovod.sh"),
    "mpi": Engine("disttrain.comm.engines.mpi:MPICommunicator", "mpi4py", "pip install 'disttrain[mpi]'"),
}
