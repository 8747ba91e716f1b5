"""The guard in real processes: every way in which a worker can end, and how the others react.

The workers exchange objects through a directory instead of an engine, so that only the guard can detect a loss.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from disttrain.comm.liveness import connections
from disttrain.comm.liveness.guard import Guard
from tests.lab.directory_group import DirectoryGroup

pytestmark = pytest.mark.distributed

ROOT = Path(__file__).parents[2]
ENDED = "was lost: its process ended or its connection broke"
SILENT = "was lost: no heartbeat for 1.5 s"


WORKER = """
import os, pathlib, signal, sys, time, types
sys.path.insert(0, {root!r})
for name in ("disttrain", "disttrain.comm"):  # skip the __init__ of these packages: importing torch takes seconds
    sys.modules[name] = types.ModuleType(name)
    sys.modules[name].__path__ = [os.path.join({root!r}, *name.split("."))]
from disttrain.comm.liveness.activity import Activity
from disttrain.comm.liveness.guard import Guard
from tests.lab.directory_group import DirectoryGroup

rank = {rank}
activity = Activity()
comm = DirectoryGroup(pathlib.Path({path!r}), rank, {world_size})

def stuck():
    "Block as in the C code of an engine: nothing in Python can interrupt the main thread."
    (comm.path / f"stuck-{{rank}}").touch()
    signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    while True:
        time.sleep(60)

{body}
"""
GUARDED = "with Guard(comm, silence=1.5, grace=0.5) as guard:\n    "


LOADING = "activity.begin_step(4, 'data loading')\n    stuck()"
WAITING = """activity.begin_step(4, 'optimizer step')
    activity.start_call('AllReduce', 'bucket 0: dense')
    activity.begin_wait(activity.start_call('AllGather', 'bucket 1: topk'))
    stuck()"""
CALL = "all_gather 2 (bucket 1: topk) of step 4's optimizer step"


def start(stack: ExitStack, tmp_path: Path, *bodies: str) -> list[subprocess.Popen[str]]:
    workers = []
    for rank, body in enumerate(bodies):
        values = {"root": str(ROOT), "rank": rank, "path": str(tmp_path), "world_size": len(bodies)}
        command = [sys.executable, "-c", WORKER.format(body=body, **values)]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        workers.append(stack.enter_context(subprocess.Popen(command, **pipes)))
        stack.callback(workers[-1].kill)
    return workers


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, "the workers did not start"
        time.sleep(0.01)


def ends(worker: subprocess.Popen[str]) -> tuple[int, str]:
    _, errors = worker.communicate(timeout=30)
    return worker.returncode, errors


@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize(("number", "what"), [(signal.SIGKILL, ENDED), (signal.SIGSTOP, SILENT)])
def test_survivors_name_a_killed_or_stopped_rank_and_exit(tmp_path, victim, number, what):
    with ExitStack() as stack:
        workers = start(stack, tmp_path, *[GUARDED + "stuck()"] * 3)
        wait_for(*(tmp_path / f"stuck-{rank}" for rank in range(3)))
        workers[victim].send_signal(number)
        expected = f"error: rank {victim} (host {socket.gethostname()}, pid {workers[victim].pid}) {what}\n"
        survivors = [worker for worker in workers if worker is not workers[victim]]
        assert [ends(worker) for worker in survivors] == [(13, expected)] * 2


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (GUARDED + "raise KeyError('no such thing')", "failed: KeyError: 'no such thing'"),
        ("guard = Guard(comm, silence=1.5)\nraise OSError('disk\\nfull')", "failed: OSError: disk full"),
        (GUARDED + "sys.exit(3)", "failed: it exited with status 3 before the other ranks had finished"),
        (GUARDED + "raise KeyboardInterrupt", "failed: KeyboardInterrupt"),
        (GUARDED + "raise ValueError('\\U0001f4a5' * 100_000)", "failed: ValueError: " + "\U0001f4a5" * 488),
        (GUARDED + "raise ValueError('caf\\udce9')", "failed: ValueError: caf\\udce9"),
    ],
)
@pytest.mark.parametrize("victim", [0, 1])
def test_survivors_report_why_a_rank_failed(tmp_path, victim, body, reason):
    bodies = [GUARDED + "stuck()"] * 3
    bodies[victim] = body
    with ExitStack() as stack:
        workers = start(stack, tmp_path, *bodies)
        results = [ends(worker) for worker in workers]
    own_code, own_errors = results.pop(victim)
    assert own_code not in (0, 13)
    assert "rank" not in own_errors
    expected = f"error: rank {victim} (host {socket.gethostname()}, pid {workers[victim].pid}) {reason}\n"
    assert results == [(13, expected)] * 2


def test_clean_exits_at_different_times_are_not_a_loss(tmp_path):
    with ExitStack() as stack:
        bodies = [
            GUARDED + "time.sleep(1.0)",
            GUARDED + "pass",
            "guard = Guard(comm, silence=1.5)\ntime.sleep(0.5)",  # no close: the program just ends
            GUARDED + "time.sleep(4.0)",  # longer than `silence`, and longer than rank 0
        ]
        assert [ends(worker) for worker in start(stack, tmp_path, *bodies)] == [(0, "")] * 4


def test_check_raises_in_time_for_an_orderly_exit(tmp_path):
    body = GUARDED + "\n    ".join(
        ["try:", "    while True: guard.check(); time.sleep(0.05)", "finally: time.sleep(2); print('saved')"]
    )
    with ExitStack() as stack:
        survivor, victim = start(stack, tmp_path, body, GUARDED + "stuck()")
        wait_for(tmp_path / "stuck-1")
        victim.kill()
        output, errors = survivor.communicate(timeout=30)
        # Once the main thread reacts, the grace period no longer applies: its two seconds of work complete.
        assert (survivor.returncode, output) == (13, "saved\n")
        assert errors == f"error: rank 1 (host {socket.gethostname()}, pid {victim.pid}) {ENDED}\n"


def test_error_caused_by_a_loss_is_reported_as_the_loss(tmp_path):
    echo = """guard = Guard(comm)
while not (comm.path / 'dead').exists(): time.sleep(0.01)
raise RuntimeError('connection closed')"""
    with ExitStack() as stack:
        workers = start(stack, tmp_path, GUARDED + "stuck()", GUARDED + "stuck()", echo)
        wait_for(tmp_path / "stuck-0", tmp_path / "stuck-1")
        (tmp_path / "dead").touch()
        workers[1].kill()
        expected = f"error: rank 1 (host {socket.gethostname()}, pid {workers[1].pid}) {ENDED}\n"
        assert [ends(workers[0]), ends(workers[2])] == [(13, expected)] * 2


def test_death_is_detected_while_a_forked_child_lives(tmp_path):
    forks = (
        GUARDED
        + "child = os.fork()\n    if child == 0: time.sleep(20); os._exit(0)\n    print(child, flush=True); stuck()"
    )
    with ExitStack() as stack:
        survivor, victim = start(stack, tmp_path, GUARDED.replace("1.5", "60") + "stuck()", forks)
        wait_for(tmp_path / "stuck-0", tmp_path / "stuck-1")
        child = int(victim.stdout.readline())
        stack.callback(os.kill, child, signal.SIGKILL)
        victim.kill()
        assert ends(survivor)[0] == 13


def test_stopping_and_continuing_all_ranks_is_not_a_loss(tmp_path):
    with ExitStack() as stack:
        body = GUARDED + "(comm.path / f'ready-{rank}').touch(); time.sleep(4)"
        workers = start(stack, tmp_path, body, body)
        wait_for(tmp_path / "ready-0", tmp_path / "ready-1")
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for worker in workers:
                worker.send_signal(number)
            if number == signal.SIGSTOP:
                time.sleep(2.5)
        assert [ends(worker) for worker in workers] == [(0, "")] * 2


def watched(options: str, body: str) -> str:
    return f"with Guard(comm, grace=0.5, activity=activity, {options}) as guard:\n    {body}"


def name(workers: list[subprocess.Popen[str]], rank: int) -> str:
    return f"rank {rank} (host {socket.gethostname()}, pid {workers[rank].pid})"


def test_stall_names_the_late_rank_and_its_activity_and_ends_all_ranks(tmp_path):
    with ExitStack() as stack:
        workers = start(stack, tmp_path, *(watched("stall=1.0", body) for body in (WAITING, WAITING, LOADING)))
        results = [ends(worker) for worker in workers]
        _, errors = results[0]
        assert results == [(13, errors)] * 3, "including the late rank"
        assert errors.startswith(f"error: {name(workers, 2)} has been in step 4's data loading for ")
        assert f" s; other ranks are waiting in {CALL}: if this is expected, raise watch.stall_seconds" in errors


def test_stall_only_warns_if_configured(tmp_path):
    options = "stall=1.0, end_on_stall=False"
    body = "while not (comm.path / 'enough').exists(): time.sleep(0.01)"
    waits = WAITING.replace("stuck()", body)
    with ExitStack() as stack:
        workers = start(stack, tmp_path, watched(options, waits), watched(options, LOADING.replace("stuck()", body)))
        first = workers[0].stderr.readline()
        (tmp_path / "enough").touch()
        assert first.startswith(f"warning: {name(workers, 1)} has been in step 4's data loading for ")
        assert f" s; rank 0 is waiting in {CALL}: if this is expected, raise watch.stall_seconds" in first
        assert [ends(worker) for worker in workers] == [(0, "")] * 2


@pytest.mark.parametrize(
    ("body", "how"),
    [
        ("activity.begin_step(4, 'data loading'); raise OSError('no such image')", "failed: OSError: no such image"),
        (WAITING.replace("stuck()", "raise MemoryError"), "failed: MemoryError"),
        (WAITING, ENDED),
    ],
)
def test_loss_is_reported_with_the_activity_of_the_rank(tmp_path, body, how):
    with ExitStack() as stack:
        workers = start(stack, tmp_path, watched("silence=1.5", WAITING), watched("silence=1.5", body))
        wait_for(tmp_path / "stuck-0")
        if how == ENDED:
            wait_for(tmp_path / "stuck-1")
            time.sleep(0.5)  # until its activity has been reported
            workers[1].kill()
        code, errors = ends(workers[0])
        doing = f"step 4's optimizer step, waiting in {CALL.partition(' of ')[0]}"
        doing = "step 4's data loading" if "loading" in body else doing
        assert (code, errors) == (
            13,
            f"error: {name(workers, 1)} {how}; it was in {doing}; rank 0 is waiting in {CALL}\n",
        )


ENDS = "activity.begin_step(4, 'data loading')\n    activity.start_call('AllReduce', 'bucket 0: dense')"


@pytest.mark.parametrize("victim", [0, 1, 2])
@pytest.mark.parametrize("end", ["", "\n    sys.exit(0)", "\n    sys.exit()"])
def test_waiting_ranks_name_a_rank_that_has_finished(tmp_path, victim, end):
    """Stuck ranks report it within a few beats; ranks whose engine raises an error, at once."""
    fails = WAITING.replace("stuck()", "time.sleep(1)\n    raise RuntimeError('connection closed by peer')")
    bodies = [watched("silence=3", body) for body in (WAITING, WAITING, fails)]
    if victim == 2:
        bodies[0] = watched("silence=3", fails)
    bodies[victim] = watched("silence=3", ENDS + end)
    with ExitStack() as stack:
        workers = start(stack, tmp_path, *bodies)
        results = [ends(worker) for worker in workers]
    assert results.pop(victim) == (0, "")
    for code, errors in results:
        assert code != 0
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1, errors
        assert lines[0].startswith(f"error: {name(workers, victim)} has finished; ")
        assert lines[0].endswith(
            f"in {CALL}: give all ranks the same number of steps, or use optimizer.join() for uneven data"
        )


def run_ranks(tmp_path, target, world_size=2, local_size=None):
    results = [None] * world_size

    def run(rank):
        results[rank] = target(DirectoryGroup(tmp_path, rank, world_size, local_size))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return results


def test_unauthenticated_connections_are_dropped_and_ranks_accepted(tmp_path, monkeypatch):
    """Clients that know the port but not the token are rejected, and do not keep ranks from connecting."""
    strangers = []
    listen = connections._listen

    def listen_and_connect_strangers(group):
        listener = listen(group)
        for words in (b'{"rank": 1, "token": "guess"}\n', b"GET / HTTP/1.1\r\n\r\n", b"\xff" * 9000, b"[1]\n", b""):
            stranger = socket.create_connection(listener.getsockname(), timeout=20)
            stranger.sendall(words)
            strangers.append(stranger)
        return listener

    monkeypatch.setattr(connections, "_listen", listen_and_connect_strangers)
    (to_others, no_error), (to_first, _) = run_ranks(tmp_path, connections.connect_star)
    assert (list(to_others), list(to_first), no_error) == ([1], [0], None)
    to_first[0].send({"kind": "alive"})
    deadline = time.monotonic() + 20
    while not (messages := to_others[1].receive()) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert messages == [{"kind": "alive"}]
    for stranger in strangers:
        with stranger, suppress(ConnectionResetError):
            assert stranger.recv(1) == b""
    for connection in (*to_others.values(), *to_first.values()):
        connection.close()


def test_failure_to_connect_sets_a_warning_on_all_ranks(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(connections, "_ACCEPT_SECONDS", 0.5)

    def refuse(*_):
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(connections, "_connect_to_rank_0", refuse)
    guards = run_ranks(tmp_path, Guard)
    assert guards[0].warning == guards[1].warning
    assert "rank 1" in guards[0].warning
    assert "Connection refused" in guards[0].warning
    assert capfd.readouterr().err.count("GLOO_SOCKET_IFNAME") == 1
    guards[0].check()
    guards[0].close()


def test_address_of_the_configured_interface_comes_first(monkeypatch):
    several_hosts = DirectoryGroup(Path(), 0, 4, local_size=2)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert connections.candidate_addresses(several_hosts)[0] == "127.0.0.1"
    monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    assert connections.candidate_addresses(several_hosts)[-1] == "127.0.0.1"  # other hosts cannot reach it
    assert connections.candidate_addresses(DirectoryGroup(Path(), 0, 4)) == ["127.0.0.1"]
