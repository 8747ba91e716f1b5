"""What one rank of a launch does: run the cases listed in ``cases.json`` in order, and note what became of each.

``python -m tests.scripts.worker FOLDER``, under a launcher. Files: ``<case>.started.<rank>`` when a case begins, and
``<case>.done.<rank>`` with an ``Outcome`` or the text of an error. A case that takes too long ends the process, with
its stack in the log; the launch continues with the next one (``launches``).
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import disttrain
from disttrain.comm import Communicator
from tests.scripts.forms import Form, form_of, run_rank, settings
from tests.scripts.registry import load

CASE_LIMIT = 60.0  # seconds a case may take; collectives wait half of that


def main(folder: Path) -> None:
    engine = os.environ["ENGINE"]
    names = json.loads((folder / "cases.json").read_text())
    loops = load()
    groups: Groups | OneCommunicator = Groups() if engine == "torch" else OneCommunicator(engine)
    with settings():
        for name in names:
            loop_name, form_name = name.split("@")
            form = form_of(loops[loop_name], form_name)
            assert form is not None
            (folder / f"{name}.started.{groups.rank}").touch()
            faulthandler.dump_traceback_later(CASE_LIMIT, exit=True)
            try:
                with groups.joined(name, form) as comm:
                    record: object = run_rank(loops[loop_name], form, comm)
            except Exception as error:
                record = f"{type(error).__name__}: {error}\n{traceback.format_exc()}"
            faulthandler.cancel_dump_traceback_later()
            partial = folder / f"{name}.partial.{groups.rank}"
            torch.save(record, partial)
            partial.rename(folder / f"{name}.done.{groups.rank}")
            if isinstance(record, str) and engine != "torch":
                os._exit(1)  # what is on the wire cannot be taken back there
    groups.close()


class Groups:
    """A process group of its own for each case: one that failed leaves nothing behind for the next."""

    def __init__(self) -> None:
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        port = int(os.environ["MASTER_PORT"])
        is_agents = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        self.store = dist.TCPStore(os.environ["MASTER_ADDR"], port, self.size, self.rank == 0 and not is_agents)

    @contextmanager
    def joined(self, name: str, form: Form) -> Iterator[Communicator | None]:
        store = dist.PrefixStore(name, self.store)
        limit = timedelta(seconds=CASE_LIMIT / 2)
        dist.init_process_group("gloo", store=store, rank=self.rank, world_size=self.size, timeout=limit)
        try:
            yield None if form.compressor is None else disttrain.init("torch", guard=False)
        finally:
            dist.destroy_process_group()

    def close(self) -> None: ...


class OneCommunicator:
    """The engine's, for all cases."""

    def __init__(self, engine: str) -> None:
        self.comm = disttrain.init(engine, guard=False)
        self.rank = self.comm.rank

    @contextmanager
    def joined(self, name: str, form: Form) -> Iterator[Communicator | None]:
        yield self.comm

    def close(self) -> None:
        self.comm.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
