"""Damage to checkpoints: never a wrong load, always one clear line, and the older good one is still found."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from disttrain.comm import Communicator, SingleProcess, simulate
from disttrain.errors import UserError
from disttrain.optim.distributed import DistributedOptimizer
from disttrain.training.checkpoints import contents as checkpoint
from disttrain.training.checkpoints import folder as checkpoint_folder
from disttrain.training.checkpoints.manifest import NAME
from tests.support import checkpoints
from tests.support.runs import make_config, train
from tests.support.workers import ROOT, worker_environment

pytestmark = pytest.mark.usefixtures("one_thread")

OPTIONS = {"name": "topk", "ratio": 0.2, "min_numel": 1}
FILES = [NAME, *(f"{name}.safetensors" for name in ("model", "optimizer", "compression", "rank-00000", "rank-00001"))]


def make(comm: Communicator, num_steps: int = 0) -> tuple[torch.nn.Module, DistributedOptimizer]:
    model = torch.nn.Linear(4, 3)
    inner = torch.optim.AdamW(model.parameters(), lr=0.1)
    optimizer = DistributedOptimizer(inner, model, comm=comm, compressor=OPTIONS)
    for step in range(num_steps):
        optimizer.zero_grad()
        model(torch.full((2, 4), 1.0 + step + comm.rank)).square().sum().backward()
        optimizer.step()
    return model, optimizer


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two good checkpoints of two ranks."""
    folder = tmp_path_factory.mktemp("saved")
    for step in (1, 2):
        simulate(2, lambda comm, step=step: checkpoints.save(comm, folder, *make(comm, step), step))
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of them, to damage."""
    return shutil.copytree(saved, tmp_path / "checkpoints")


def check(folder: Path, *, message: str = "checkpoint") -> None:
    """All ranks refuse the newer one in one line that names it, and the run resumes from the older one."""
    bad = folder / "step-00000002"
    with pytest.raises(UserError, match=message) as caught:
        checkpoint_folder.find(bad)
    assert "\n" not in str(caught.value)
    assert "step-00000002" in str(caught.value)
    found = checkpoint_folder.newest(folder)
    assert found is not None
    assert found.manifest.step == 1


def rewritten(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """A manifest with other contents and the checksum that they should have: damage on purpose."""
    body = json.loads(path.read_bytes())
    body.pop("checksum")
    change(body)
    canonical = json.dumps(body, sort_keys=True, separators=(",", ":")).encode()
    path.write_text(json.dumps({"checksum": hashlib.sha256(canonical).hexdigest(), **body}))


def entry_of(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def forged(step: Path, name: str, content: bytes) -> None:
    """Put other contents into a file, and their size and hash into the manifest."""
    (step / name).write_bytes(content)
    rewritten(step / NAME, lambda body: body["files"].update({name: entry_of(step / name)}))


@pytest.mark.parametrize("name", FILES)
def test_truncated_missing_or_replaced_files_are_noticed(folder: Path, name: str) -> None:
    step = folder / "step-00000002"
    content = (step / name).read_bytes()
    for length in (0, 1, len(content) // 2, len(content) - 1):
        (step / name).write_bytes(content[:length])
        check(folder, message="damaged|incomplete")
    (step / name).unlink()
    check(folder, message=f"{name} is missing")
    outside = folder / "outside"
    outside.write_bytes(content)
    (step / name).symlink_to(outside)
    check(folder, message="not a regular file")
    (step / name).unlink()
    (step / name).mkdir()
    check(folder, message="not a regular file")


@pytest.mark.parametrize("name", FILES)
def test_every_flipped_bit_is_noticed(folder: Path, name: str) -> None:
    """All bits of the first and last bytes, and some in between."""
    path = folder / "step-00000002" / name
    content = path.read_bytes()
    places = {*range(24), *range(24, len(content), max(1, len(content) // 40)), len(content) - 1}
    for place in sorted(place for place in places if place < len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        if name == NAME and json_or_none(bytes(damaged)) == json.loads(content):
            continue  # white space
        path.write_bytes(damaged)
        check(folder)


def json_or_none(content: bytes) -> Any:
    try:
        return json.loads(content)
    except ValueError:
        return None


@settings(max_examples=120, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_drawn_mutations_never_load_wrongly(saved: Path, tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    """Bytes replaced, cut out, put in or swapped between files, in any file: refused in one line, or unchanged."""
    folder = shutil.copytree(saved, tmp_path_factory.mktemp("drawn") / "checkpoints")
    step = folder / "step-00000002"
    before = {name: (step / name).read_bytes() for name in FILES}
    for _ in range(data.draw(st.integers(1, 3), label="mutations")):
        path = step / data.draw(st.sampled_from(FILES), label="file")
        content = path.read_bytes()
        start = data.draw(st.integers(0, len(content)), label="start")
        end = min(len(content), start + data.draw(st.sampled_from([0, 1, 8, 100, 10**6]), label="length"))
        kind = data.draw(st.sampled_from(["bytes", "number", "other file"]), label="kind")
        if kind == "bytes":
            new = data.draw(st.binary(max_size=20), label="new")
        elif kind == "number":  # what a careless length or offset would believe
            number = data.draw(st.sampled_from([0, 1, 2**31, 2**53, 2**63, 2**64 - 1]), label="number")
            new = data.draw(st.sampled_from([struct.pack("<Q", number), str(number).encode()]), label="as")
        else:
            new = before[data.draw(st.sampled_from(FILES), label="from")]
        path.write_bytes(content[:start] + new + content[end:])
    after = {name: (step / name).read_bytes() for name in FILES}
    same_files = all(after[name] == before[name] for name in FILES if name != NAME)
    if same_files and json_or_none(after[NAME]) == json.loads(before[NAME]):
        assert checkpoint_folder.verified(step)
    else:
        check(folder)
    shutil.rmtree(folder)


def test_manifests_and_files_of_others_are_noticed(folder: Path, tmp_path: Path) -> None:
    good, bad = folder / "step-00000001", folder / "step-00000002"
    shutil.copy(good / NAME, bad / NAME)
    check(folder, message="manifest.json belongs to step 1")

    shutil.rmtree(bad)
    other = tmp_path / "other"
    simulate(2, lambda comm: checkpoints.save(comm, other, *make(comm, 2), 2, run="f" * 32))
    shutil.copytree(other / bad.name, bad)
    theirs = (good / "rank-00001.safetensors").read_bytes()
    forged(bad, "rank-00001.safetensors", theirs)  # with the size and the hash that it should have
    check(folder, message=f"rank-00001.safetensors belongs to run {checkpoints.RUN}, step 1")


HEADERS: dict[str, Any] = {
    "longer than the file": struct.pack("<Q", 2**40) + b"{}",
    "huge": struct.pack("<Q", 2**63) + b"{}",
    "no JSON": struct.pack("<Q", 4) + b"\x00\x01[[",
    "deep": struct.pack("<Q", 200_000) + b'{"a":' + b"[" * 199_995,
    "overlapping": {"a": ["F32", [2], [0, 8]], "b": ["F32", [2], [4, 12]]},
    "out of range": {"a": ["F32", [1000], [0, 4000]]},
    "backwards": {"a": ["F32", [2], [8, 0]]},
    "shape": {"a": ["F32", [2**40, 2**40], [0, 12]]},
    "overflow": {"a": ["F32", [2**62, 4], [0, 12]]},
    "negative": {"a": ["F32", [-3], [0, 12]]},
    "dtype": {"a": ["X9", [3], [0, 12]]},
    "hole": {"a": ["F32", [1], [8, 12]]},
}


def header_of(spec: Any) -> bytes:
    if isinstance(spec, bytes):
        return spec
    entries = {name: dict(zip(("dtype", "shape", "data_offsets"), entry, strict=True)) for name, entry in spec.items()}
    text = json.dumps({"__metadata__": {"run": checkpoints.RUN, "step": "2"}, **entries}).encode()
    return struct.pack("<Q", len(text)) + text + bytes(12)


@pytest.mark.parametrize("kind", HEADERS)
def test_headers_are_not_believed(folder: Path, kind: str) -> None:
    """Even where the manifest agrees with the file."""
    forged(folder / "step-00000002", "model.safetensors", header_of(HEADERS[kind]))
    check(folder, message="model.safetensors cannot be read")


def test_a_header_that_is_right_is_read(folder: Path) -> None:
    """So that the test before this one shows what it says."""
    forged(folder / "step-00000002", "model.safetensors", header_of({"a": ["F32", [3], [0, 12]]}))
    assert checkpoint_folder.verified(folder / "step-00000002")


def model_of(body: dict[str, Any]) -> Any:
    return body["files"]["model.safetensors"]


CRAFTED: dict[str, Callable[[dict[str, Any]], object]] = {
    "above": lambda body: body["files"].update({"../step-00000001/model.safetensors": model_of(body)}),
    "absolute": lambda body: body["files"].update({"/etc/passwd": {"bytes": 1, "sha256": "0" * 64}}),
    "unknown": lambda body: body["files"].update({"extra.safetensors": {"bytes": 1, "sha256": "0" * 64}}),
    "newline": lambda body: body["files"].update({"model.safetensors\n": model_of(body)}),
    "too few ranks": lambda body: body["files"].pop("rank-00001.safetensors"),
    "too many ranks": lambda body: body.update(world_size=1),
    "world size": lambda body: body.update(world_size=10**9),
    "no world": lambda body: body.update(world_size=0),
    "text": lambda body: body.update(world_size="2"),
    "negative": lambda body: body["files"]["model.safetensors"].update(bytes=-1),
    "no hash": lambda body: body["files"]["model.safetensors"].update(sha256="0"),
    "more of an entry": lambda body: body["files"]["model.safetensors"].update(link="x"),
    "run": lambda body: body.update(run="../x"),
    "step": lambda body: body.update(step=2**60),
    "format": lambda body: body.update(format=99),
    "older format": lambda body: body.update(format=1),
    "no progress": lambda body: body.pop("progress"),
    "deep": lambda body: body["progress"].update(deep=nested(40)),
}


def nested(depth: int) -> Any:
    return [nested(depth - 1)] if depth else 0


@pytest.mark.parametrize("kind", CRAFTED)
def test_manifests_are_not_believed(folder: Path, kind: str) -> None:
    """Even where their checksum is right."""
    rewritten(folder / "step-00000002" / NAME, CRAFTED[kind])
    check(folder)


def test_manifests_are_bounded(folder: Path) -> None:
    path = folder / "step-00000002" / NAME
    for content in (b"[" * 10**6, b'{"format":' + b"9" * 10**5 + b"}", b"[]", b"null", b"\xff\xfe"):
        path.write_bytes(content)
        check(folder, message="manifest.json")
    with path.open("wb") as file:
        file.truncate(2**40)  # no block of it is on the disk
    check(folder, message=r"manifest.json has 1099511627776 bytes, more than any")


def test_keys_of_a_later_version_are_passed_over(folder: Path) -> None:
    rewritten(folder / "step-00000002" / NAME, lambda body: body.update(comment={"of": ["a", "later", "version"]}))
    assert checkpoint_folder.verified(folder / "step-00000002")


LIES: dict[str, Callable[[dict[str, Any]], object]] = {
    "no step": lambda body: body["progress"].pop("step"),
    "another step": lambda body: body["progress"].update(step=7),
    "negative": lambda body: body["progress"].update(offset=-5),
    "text": lambda body: body["progress"].update(epoch="many"),
    "no rates": lambda body: body["progress"].update(learning_rate=[]),
    "no batch": lambda body: body["progress"].update(batch={"initial": 24}),
    "no config": lambda body: body.update(config={}),
    "odd config": lambda body: body["config"].update(optimizer=3),
    "odd optimizer": lambda body: body.update(optimizer={"0.weight/step": {"a": []}, "nowhere/x": 1}),
    "odd best": lambda body: body["progress"]["parts"].update(best={"no": "state"}),
}


@pytest.mark.parametrize("kind", LIES)
def test_what_a_trainer_finds_in_a_manifest_is_not_believed(tmp_path: Path, kind: str) -> None:
    """Whole as files go, and nonsense: one line on all ranks, and no traceback."""
    config = make_config(tmp_path, max_steps=2, early_stopping={"metric": "error", "mode": "min"})
    simulate(2, lambda comm: train(config, comm))
    rewritten(config.directory / "checkpoints/step-00000002" / NAME, LIES[kind])
    with pytest.raises(UserError, match="step-00000002") as caught:
        simulate(2, lambda comm: train(config.model_copy(update={"resume": "auto"}), comm))
    assert "\n" not in str(caught.value)


def test_tensors_of_other_shapes_are_refused(tmp_path: Path) -> None:
    """A checkpoint that is whole, of a model of other shapes."""
    made = make(SingleProcess(), 1)
    path = checkpoints.save(SingleProcess(), tmp_path, *made, 1)
    model = torch.nn.Linear(3, 4)
    optimizer = DistributedOptimizer(torch.optim.AdamW(model.parameters()), model, comm=SingleProcess())
    with pytest.raises(UserError, match="was saved with another model: it has other shapes for bias, weight"):
        checkpoint.load(*checkpoint_folder.find(path), SingleProcess(), model, optimizer)


def test_a_run_names_what_it_passes_over_and_resumes_from_the_older_one(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "disttrain")
    changes: dict[str, Any] = {"checkpoint": {"every_steps": 2, "keep": 9}, "max_steps": 6}
    config = make_config(tmp_path, **changes)
    _, expected = train(config, SingleProcess())
    folder = config.directory / "checkpoints"
    (folder / "step-00000006/optimizer.safetensors").write_bytes(b"")
    (folder / "step-00000004" / NAME).unlink()
    _, model = train(config.model_copy(update={"resume": "auto"}), SingleProcess())
    assert "step-00000006' is damaged: optimizer.safetensors has 0 bytes" in caplog.text
    assert "step-00000004' is incomplete: manifest.json is missing" in caplog.text
    assert "resuming from" in caplog.text
    assert all(torch.equal(model[name], expected[name]) for name in expected)


# A disk that cannot be written to


Mount = Callable[..., None]


@pytest.fixture
def mount() -> Iterator[Mount]:
    """Mounts something on a folder, until the test ends."""
    folders: list[Path] = []

    def mounted(folder: Path, *arguments: str) -> None:
        if subprocess.run(["mount", *arguments, str(folder)], capture_output=True).returncode:
            pytest.skip("mounting needs root")
        folders.append(folder)

    yield mounted
    for folder in folders:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def fill_disk(path: Path) -> None:
    with path.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while True:
            file.write(bytes(4096))


@pytest.mark.parametrize("on_error", ["stop", "continue"])
def test_a_full_disk_costs_no_older_checkpoint(
    tmp_path: Path, mount: Mount, caplog: pytest.LogCaptureFixture, on_error: str
) -> None:
    changes = {"every_steps": 2, "every_epochs": None, "keep": 9, "on_error": on_error}
    config = make_config(tmp_path, checkpoint=changes, max_steps=8)
    folder = config.directory / "checkpoints"

    def fill(trainer: Any) -> None:
        if trainer.progress.step == 1:
            folder.mkdir()
            mount(folder, "-t", "tmpfs", "-o", "size=256k", "disttrain-test")
        elif trainer.progress.step == 2:
            trainer.checkpointer.wait()
            fill_disk(folder / "filled")
        elif trainer.progress.step == 7 and on_error == "continue":
            trainer.checkpointer.wait()
            (folder / "filled").unlink()

    if on_error == "stop":
        with pytest.raises(UserError, match="No space left on device"):
            train(config, SingleProcess(), fill)
    else:
        assert train(config, SingleProcess(), fill)[0]["steps"] == 8
        assert caplog.text.count("the run continues without a checkpoint: ") == 2
        assert caplog.text.count("No space left on device") == 2
    found = checkpoint_folder.newest(folder)
    assert found is not None
    assert found.manifest.step == (2 if on_error == "stop" else 8)
    assert list(folder.glob(".*")) == []


def test_a_folder_that_cannot_be_written_to_is_one_line(tmp_path: Path, mount: Mount) -> None:
    config = make_config(tmp_path, checkpoint={"every_steps": 1, "keep": 9}, max_steps=4)
    folder = config.directory / "checkpoints"

    def protect(trainer: Any) -> None:
        if trainer.progress.step == 2:
            trainer.checkpointer.wait()
            mount(folder, "--bind", str(folder))
            subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)

    with pytest.raises(UserError, match="Read-only file system"):
        train(config, SingleProcess(), protect)
    found = checkpoint_folder.newest(folder)
    assert found is not None
    assert found.manifest.step == 2


# A process that is killed while it writes

KILLED = """
import sys, torch
from pathlib import Path
from disttrain.comm import SingleProcess
from disttrain.optim.distributed import DistributedOptimizer
from tests.support import checkpoints
model = torch.nn.Linear(64, 500)
optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=SingleProcess())
for step in range(1, 10**6):
    with torch.no_grad():
        model.weight.fill_(step)
    checkpoints.save(SingleProcess(), Path(sys.argv[1]), model, optimizer, step, keep=1)
    print(step, flush=True)
"""


@pytest.mark.distributed
def test_a_kill_at_any_moment_of_the_write_leaves_one_that_is_whole(tmp_path: Path) -> None:
    """While it does nothing but write, and with keep=1 the older one goes as the newer one comes.

    DISTTRAIN_WRITE_KILLS=100 kills more often.
    """
    script = tmp_path / "writing.py"
    script.write_text(KILLED)
    for attempt in range(int(os.environ.get("DISTTRAIN_WRITE_KILLS", "3"))):
        folder = tmp_path / str(attempt)
        command = [sys.executable, str(script), str(folder)]
        process = subprocess.Popen(command, env=worker_environment(), cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        try:
            assert process.stdout.readline() == "1\n"
            time.sleep(0.001 * (37 * attempt % 101))
        finally:
            process.kill()
        said = [1, *map(int, process.communicate()[0].split())]
        found = checkpoint_folder.newest(folder)
        assert found is not None
        assert found.manifest.step >= said[-1]
        model = torch.nn.Linear(64, 500)
        optimizer = DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model, comm=SingleProcess())
        checkpoint.load(*found, SingleProcess(), model, optimizer)
        assert (model.weight == found.manifest.step).all()
