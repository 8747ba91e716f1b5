"""Writing checkpoints in a thread of its own, so that training waits for nothing but the copies.

Every rank writes its files into one folder, and beside them a small file with their sizes and hashes. Once rank 0 sees
those of all ranks it writes the manifest and gives the folder its name. So no collective is needed until the ranks next
meet, in ``Writer.settle``, where one that failed is heard of by all; and if the run ends before, what had been written
by then still becomes a checkpoint.
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
from disttrain.training.checkpoints.copies import Copies, Files
from disttrain.training.checkpoints.folder import partial_of
from disttrain.training.checkpoints.manifest import FileEntry, Manifest, entry_of, identity, parse_json

logger = logging.getLogger(__name__)

_VISIBLE_WITHIN = 60.0
"""Seconds within which what another host has written should be seen on this one; network file systems take a while."""
_END_WITHIN = 8.0
"""Seconds that rank 0 waits for the others' files when its own run ends by an exception."""
_LONGEST_PAUSE = 0.2
_MAX_PART_BYTES = 2**20

Entries = dict[str, FileEntry]


@dataclass
class Job:
    """One rank's part of a checkpoint on its way to the disk.

    Args:
        partial, final: where it is written, and its name once it is whole.
        files: what this rank writes.
        metadata: what goes into the header of each of them.
        manifest: makes the manifest out of all ranks' entries; called on rank 0.
        keep: called on rank 0 when it is whole.
    """

    partial: Path
    final: Path
    files: Files
    metadata: dict[str, dict[str, str]]
    copies: Copies
    manifest: Callable[[Entries], Manifest]
    keep: Callable[[], object]
    problem: Exception | None = None
    written: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)
    abandoned: threading.Event = field(default_factory=threading.Event)
    seen_by: float | None = None  # when the files of all ranks should be seen


class Writer:
    """This rank's thread, and what is on its way. Methods are to be called on all ranks alike."""

    def __init__(self, comm: Communicator, in_flight: int) -> None:
        self._comm = comm
        self._free = [Copies() for _ in range(in_flight)]
        self._jobs: list[Job] = []
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._closing = threading.Event()

    @property
    def num_in_flight(self) -> int:
        """How many are on their way. They must be fewer than the bound before the next is copied."""
        return len(self._jobs)

    def take(
        self, folder: Path, attempt: str, contents: Contents, facts: Mapping[str, Any], keep: Callable[[], object]
    ) -> Path:
        """Copy the contents, and begin to write them as ``folder/step-<step>``, which is returned.

        Args:
            attempt: part of the name until it is whole, so that what another attempt at the run has left is not met.
            facts: what the manifest says besides: run, step, progress, config, metrics.
            keep: called on rank 0 when it is whole, to delete others.
        """
        facts = copy.deepcopy({**contents.facts, **facts})  # of this moment: the manifest is made of them later
        final = folder / f"step-{facts['step']:08d}"
        copies = self._free.pop()
        job = Job(
            partial=partial_of(final, attempt),
            final=final,
            files=copies.take(contents.files),
            metadata=contents.metadata(identity(facts["run"], facts["step"])),
            copies=copies,
            manifest=lambda files: Manifest(**facts, files=files),
            keep=keep,
        )
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name=f"checkpoints-{self._comm.rank}", daemon=True)
            self._thread.start()
        self._jobs.append(job)
        self._queue.put(job)
        return final

    def settle(self) -> None:
        """Wait until the oldest on its way is on the disk. A collective.

        Raises:
            AgreedError: some rank could not write; on every rank. That checkpoint is gone, older ones are as before.
        """
        job = self._jobs.pop(0)
        job.written.wait()
        self._free.append(job.copies)
        try:
            with collective_errors(self._comm):
                _raise(job.problem)
        except UserError:
            job.abandoned.set()
            job.ended.wait()
            raise
        job.seen_by = time.monotonic() + _VISIBLE_WITHIN
        job.ended.wait()
        with collective_errors(self._comm):
            _raise(job.problem)

    def close(self) -> None:
        """End the thread, without the other ranks. After an exception it is given time for what is on its way."""
        if self._thread is not None:
            self._closing.set()
            self._queue.put(None)
            self._thread.join()

    def _work(self) -> None:
        while (job := self._queue.get()) is not None:
            entries: Entries = {}
            try:
                entries = self._write(job)
            except Exception as error:  # for the main thread, in which ``settle`` raises it
                job.problem = _explained(error, job)
            job.written.set()
            try:
                if self._comm.rank == 0:
                    self._join(job, entries)
            except Exception as error:
                job.problem = error
            job.ended.set()

    def _write(self, job: Job) -> Entries:
        """This rank's files, forced to the disk, and then its note of them."""
        job.partial.mkdir(parents=True, exist_ok=True)
        job.copies.wait()
        entries = {}
        for name, tensors in job.files.items():
            save_file(tensors, job.partial / name, job.metadata[name])
            checkpoint_folder.sync(job.partial / name)
            entries[name] = entry_of(job.partial / name)
        if self._comm.rank > 0:
            note = _note(job.partial, self._comm.rank)
            aside = note.with_suffix(".aside")
            aside.write_text(json.dumps({name: entry.model_dump() for name, entry in entries.items()}))
            aside.rename(note)
        return entries

    def _join(self, job: Job, own: Entries) -> None:
        """Wait for the other ranks' notes, then publish. If some rank failed, take everything away."""
        entries = self._all_entries(job, own)
        if entries is None:
            shutil.rmtree(job.partial, ignore_errors=True)
            return
        for rank in range(1, self._comm.world_size):
            _note(job.partial, rank).unlink()
        checkpoint_folder.publish(job.partial, job.final, job.manifest(entries))
        try:
            job.keep()
        except OSError as error:
            logger.warning("an old checkpoint could not be deleted: %s", error)

    def _all_entries(self, job: Job, own: Entries) -> Entries | None:
        """All ranks' entries; None if some rank has failed."""
        entries, missing, pause = dict(own), set(range(1, self._comm.world_size)), 0.002
        while missing or job.problem is not None:
            names = _names_in(job.partial)
            for rank in sorted(missing):
                found = _read_note(job.partial, rank) if _note(job.partial, rank).name in names else None
                if found is None:
                    break
                entries.update(found)
                missing.remove(rank)
            if not missing and job.problem is None:
                break
            # Having failed itself, rank 0 waits all the same: the others may be writing into the folder.
            if job.abandoned.wait(pause) or (self._closing.is_set() and job.problem is not None):
                return None
            pause = min(2 * pause, _LONGEST_PAUSE)
            if self._closing.is_set():
                job.seen_by = job.seen_by or time.monotonic() + _END_WITHIN
            if job.seen_by is not None and time.monotonic() > job.seen_by:
                raise UserError(
                    f"what rank {min(missing)} wrote to {str(job.partial.parent)!r} is not visible on rank 0's host: "
                    "set output to a folder that all hosts share"
                )
        return entries


def _names_in(folder: Path) -> set[str]:
    """Listed anew each time, where a network file system may remember for a minute that a name is not there."""
    try:
        return set(os.listdir(folder))
    except OSError:
        return set()


def _note(partial: Path, rank: int) -> Path:
    return partial / f"rank-{rank:05d}.written"


def _read_note(partial: Path, rank: int) -> Entries | None:
    """What a rank has written, if all of it is there to be seen."""
    try:
        with _note(partial, rank).open("rb") as file:
            found = parse_json(file.read(_MAX_PART_BYTES))
        entries = {name: FileEntry.model_validate(entry) for name, entry in found.items()}
        is_seen = all((partial / name).stat().st_size == entry.bytes for name, entry in entries.items())
    except (FileNotFoundError, UserError, ValidationError):
        return None
    return entries if is_seen else None


def _explained(error: Exception, job: Job) -> Exception:
    return UserError(f"cannot write {str(job.partial)!r}: {error}") if isinstance(error, SafetensorError) else error


def _raise(problem: Exception | None) -> None:
    if problem is not None:
        raise problem
