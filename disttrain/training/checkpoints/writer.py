"""Writing checkpoints in a background thread, so that training waits for the copies only.

Every rank writes its files into one folder, followed by a receipt: a small file with their sizes and hashes. Once rank
0 sees the receipts of all ranks, it writes the manifest and gives the folder its final name. So writing needs no
collective. The ranks next meet in ``Writer.wait_for_oldest``, which reports a failure of any rank on all of them. If
the run ends before, files that have been written still become a checkpoint.
"""

from __future__ import annotations

import copy
import json
import logging
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file

from disttrain.comm import Communicator
from disttrain.comm.collective_errors import collective_errors
from disttrain.errors import UserError
from disttrain.training.checkpoints import folder as checkpoint_folder
from disttrain.training.checkpoints.contents import Contents
from disttrain.training.checkpoints.folder import partial_path
from disttrain.training.checkpoints.manifest import FileEntry, Manifest, entry_of, identity, parse_json
from disttrain.training.checkpoints.staging import Files, StagingBuffers

logger = logging.getLogger(__name__)

_VISIBLE_WITHIN = 60.0
"""Seconds in which files that another host has written should become visible; network file systems take a while."""
_END_WITHIN = 8.0
"""Seconds that rank 0 waits for the files of other ranks after an exception has ended its run."""
_LONGEST_PAUSE = 0.2
_MAX_RECEIPT_BYTES = 2**20

Entries = dict[str, FileEntry]


@dataclass
class PendingWrite:
    """One rank's part of a checkpoint that is being written.

    Attributes:
        partial, final: the folder, and its name once the checkpoint is complete.
        files: tensors that this rank writes.
        metadata: header metadata of each file.
        staging: memory that ``files`` is in.
        make_manifest: makes the manifest from the entries of all ranks; called on rank 0.
        on_complete: called on rank 0 once the checkpoint is complete.
        problem: exception that the thread has caught.
        written: set when this rank's files are written, or could not be.
        finished: set when the thread is done with it; on rank 0, once the checkpoint is complete or has failed.
        abandoned: set when another rank has failed.
        deadline: on rank 0, when the files of all ranks should be visible, by ``time.monotonic``; None: not yet known.
    """

    partial: Path
    final: Path
    files: Files
    metadata: dict[str, dict[str, str]]
    staging: StagingBuffers
    make_manifest: Callable[[Entries], Manifest]
    on_complete: Callable[[], object]
    problem: Exception | None = None
    written: threading.Event = field(default_factory=threading.Event)
    finished: threading.Event = field(default_factory=threading.Event)
    abandoned: threading.Event = field(default_factory=threading.Event)
    deadline: float | None = None


class Writer:
    """Writes this rank's part of checkpoints in a thread. All ranks make the same calls.

    Args:
        comm: the ranks.
        max_in_flight: how many checkpoints may be written at a time.
    """

    def __init__(self, comm: Communicator, max_in_flight: int) -> None:
        self._comm = comm
        self._free = [StagingBuffers() for _ in range(max_in_flight)]
        self._pending: list[PendingWrite] = []
        self._queue: queue.SimpleQueue[PendingWrite | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()

    @property
    def num_in_flight(self) -> int:
        """How many checkpoints are being written. ``start`` needs fewer than the maximum."""
        return len(self._pending)

    def start(
        self,
        folder: Path,
        attempt: str,
        contents: Contents,
        facts: Mapping[str, Any],
        on_complete: Callable[[], object],
    ) -> Path:
        """Copy the contents, start to write them as ``folder/step-<step>``, and return that path.

        Args:
            folder: of the run's checkpoints.
            attempt: part of the folder's name until the checkpoint is complete; keeps attempts at the run apart.
            contents: of this rank.
            facts: other keys of the manifest: run, step, progress, config, metrics.
            on_complete: called on rank 0 once the checkpoint is complete, to delete others.
        """
        facts = copy.deepcopy({**contents.facts, **facts})  # the manifest is made later, when the state has changed
        final = folder / f"step-{facts['step']:08d}"
        staging = self._free.pop()
        write = PendingWrite(
            partial=partial_path(final, attempt),
            final=final,
            files=staging.stage(contents.files),
            metadata=contents.metadata(identity(facts["run"], facts["step"])),
            staging=staging,
            make_manifest=lambda files: Manifest(**facts, files=files),
            on_complete=on_complete,
        )
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=f"checkpoints-{self._comm.rank}", daemon=True)
            self._thread.start()
        self._pending.append(write)
        self._queue.put(write)
        return final

    def wait_for_oldest(self) -> None:
        """Wait until the oldest pending checkpoint is on disk. A collective.

        Raises:
            CollectiveError: a rank could not write, on all ranks. That checkpoint is deleted; older ones are untouched.
        """
        write = self._pending.pop(0)
        write.written.wait()
        self._free.append(write.staging)
        try:
            with collective_errors(self._comm):
                _raise(write.problem)
        except UserError:
            write.abandoned.set()
            write.finished.wait()
            raise
        write.deadline = time.monotonic() + _VISIBLE_WITHIN
        write.finished.wait()
        with collective_errors(self._comm):
            _raise(write.problem)

    def close(self) -> None:
        """Finish what is pending and end the thread, without a collective: other ranks may be gone."""
        if self._thread is not None:
            self._closing.set()
            self._queue.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (write := self._queue.get()) is not None:
            entries: Entries = {}
            try:
                entries = self._write_files(write)
            except Exception as error:  # raised in the main thread, by ``wait_for_oldest``
                write.problem = _explain(error, write)
            write.written.set()
            try:
                if self._comm.rank == 0:
                    self._finalize(write, entries)
            except Exception as error:
                write.problem = error
            write.finished.set()

    def _write_files(self, write: PendingWrite) -> Entries:
        """Write this rank's files, force them to disk, and then write the receipt."""
        write.partial.mkdir(parents=True, exist_ok=True)
        write.staging.wait()
        entries = {}
        for name, tensors in write.files.items():
            save_file(tensors, write.partial / name, write.metadata[name])
            checkpoint_folder.sync(write.partial / name)
            entries[name] = entry_of(write.partial / name)
        if self._comm.rank > 0:
            receipt = _receipt(write.partial, self._comm.rank)
            aside = receipt.with_suffix(".aside")
            aside.write_text(json.dumps({name: entry.model_dump() for name, entry in entries.items()}))
            aside.rename(receipt)
        return entries

    def _finalize(self, write: PendingWrite, own: Entries) -> None:
        """Wait for the receipts of the other ranks, then complete the checkpoint, or delete it if a rank has failed."""
        entries = self._all_entries(write, own)
        if entries is None:
            shutil.rmtree(write.partial, ignore_errors=True)
            return
        for rank in range(1, self._comm.world_size):
            _receipt(write.partial, rank).unlink()
        checkpoint_folder.finalize(write.partial, write.final, write.make_manifest(entries))
        try:
            write.on_complete()
        except OSError as error:
            logger.warning("an old checkpoint could not be deleted: %s", error)

    def _all_entries(self, write: PendingWrite, own: Entries) -> Entries | None:
        """Return the entries of all ranks; None if a rank has failed."""
        entries, missing, pause = dict(own), set(range(1, self._comm.world_size)), 0.002
        while missing or write.problem is not None:
            names = _names_in(write.partial)
            for rank in sorted(missing):
                found = _read_receipt(write.partial, rank) if _receipt(write.partial, rank).name in names else None
                if found is None:
                    break
                entries.update(found)
                missing.remove(rank)
            if not missing and write.problem is None:
                break
            # Rank 0 waits even if it has failed itself: the others may still be writing into the folder.
            if write.abandoned.wait(pause) or (self._closing.is_set() and write.problem is not None):
                return None
            pause = min(2 * pause, _LONGEST_PAUSE)
            if self._closing.is_set():
                write.deadline = write.deadline or time.monotonic() + _END_WITHIN
            if write.deadline is not None and time.monotonic() > write.deadline:
                raise UserError(
                    f"what rank {min(missing)} wrote to {str(write.partial.parent)!r} is not visible on rank 0's host: "
                    "set output to a folder that all hosts share"
                )
        return entries


def _names_in(folder: Path) -> set[str]:
    """Return the names in a folder. Network file systems may cache for a minute that a single file is missing."""
    try:
        return set(os.listdir(folder))
    except OSError:
        return set()


def _receipt(partial: Path, rank: int) -> Path:
    return partial / f"rank-{rank:05d}.written"


def _read_receipt(partial: Path, rank: int) -> Entries | None:
    """Return the entries of a rank's files, if all of them are visible."""
    try:
        with _receipt(partial, rank).open("rb") as file:
            found = parse_json(file.read(_MAX_RECEIPT_BYTES))
        entries = {name: FileEntry.model_validate(entry) for name, entry in found.items()}
        are_visible = all((partial / name).stat().st_size == entry.bytes for name, entry in entries.items())
    except (FileNotFoundError, UserError, ValidationError):
        return None
    return entries if are_visible else None


def _explain(error: Exception, write: PendingWrite) -> Exception:
    return UserError(f"cannot write {str(write.partial)!r}: {error}") if isinstance(error, SafetensorError) else error


def _raise(problem: Exception | None) -> None:
    if problem is not None:
        raise problem
