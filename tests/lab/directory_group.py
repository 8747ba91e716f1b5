"""A minimal communicator without an engine. It exchanges JSON values through files in a directory."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any


class DirectoryGroup:
    def __init__(self, path: Path, rank: int, world_size: int, local_size: int | None = None) -> None:
        self.path, self.rank, self.world_size, self.local_size = path, rank, world_size, local_size or world_size
        self._round = 0

    def all_gather_object(self, value: Any) -> list[Any]:
        self._round += 1
        files = [self.path / f"{self._round}-{rank}" for rank in range(self.world_size)]
        partial = files[self.rank].with_suffix(".partial")
        partial.write_text(json.dumps(value))
        partial.rename(files[self.rank])
        deadline = time.monotonic() + 60
        while not all(file.exists() for file in files):
            assert time.monotonic() < deadline, "the other ranks did not come"
            time.sleep(0.01)
        return [json.loads(file.read_text()) for file in files]

    def broadcast_object(self, value: Any, root: int = 0) -> Any:
        return self.all_gather_object(value if self.rank == root else None)[root]
