from __future__ import annotations

import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest

from disttrain.comm.launch import horovod_elastic

PROGRAM = """
import importlib.util, os, signal, sys, threading
spec = importlib.util.spec_from_file_location("horovod_elastic", sys.argv[1])
horovod_elastic = importlib.util.module_from_spec(spec)
spec.loader.exec_module(horovod_elastic)
if "DISTTRAIN_REJOINS" in os.environ:
    print(os.getpid(), sys.argv[2], signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL, os.listdir("/proc/self/fd"))
    sys.exit(0)
print(os.getpid(), flush=True)
signal.signal(signal.SIGUSR1, signal.SIG_IGN if sys.argv[2] == "main" else lambda *_: None)
os.set_inheritable(os.open("/dev/null", os.O_RDONLY), True)  # like an engine's connection
if sys.argv[2] == "main":
    horovod_elastic.leave(13)
threading.Timer(0.1, horovod_elastic.leave, [13]).start()
threading.Event().wait()  # the main thread is stuck
"""


@pytest.mark.parametrize("thread", ["main", "guard"])
def test_a_worker_of_elastic_horovod_restarts_in_the_same_process(thread: str) -> None:
    command = [sys.executable, "-c", PROGRAM, str(Path(horovod_elastic.__file__)), thread]
    env = {**os.environ, "HOROVOD_ELASTIC": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=60)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.splitlines()
    assert second.startswith(f"{first} {thread} True "), "the same process, with default signal handlers"
    assert len(second.split("[")[1].split(",")) == 4, "the standard streams, and the descriptor of the listing"


def test_any_other_worker_exits() -> None:
    env = {name: value for name, value in os.environ.items() if name != "HOROVOD_ELASTIC"}
    command = [sys.executable, "-c", PROGRAM, str(Path(horovod_elastic.__file__)), "main"]
    assert subprocess.run(command, capture_output=True, env=env, timeout=60).returncode == 13


@pytest.mark.parametrize(("answer", "rank"), [("1,3,0,1,1,3", "1"), ("-1,-1,-1,-1,-1,-1", None)])
def test_the_driver_assigns_the_new_rank(monkeypatch: pytest.MonkeyPatch, answer: str, rank: str | None) -> None:
    requests = []

    class Driver(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            requests.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(answer.encode())

        def log_message(self, *_: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Driver)
    threading.Thread(target=server.handle_request, daemon=True).start()
    given = {"HOSTNAME": "node-b", "LOCAL_RANK": "0", "RANK": "3", "SIZE": "4"}
    given |= {"GLOO_RENDEZVOUS_ADDR": "127.0.0.1", "GLOO_RENDEZVOUS_PORT": str(server.server_port)}
    given |= dict.fromkeys(("LOCAL_SIZE", "CROSS_RANK", "CROSS_SIZE"), "1")
    for name, value in given.items():
        monkeypatch.setenv(f"HOROVOD_{name}", value)
    horovod_elastic.request_rank()
    assert requests == [], "it was not restarted"
    monkeypatch.setenv("DISTTRAIN_REJOINS", "1")
    if rank is None:
        with pytest.raises(SystemExit):
            horovod_elastic.request_rank()
    else:
        horovod_elastic.request_rank()
        assert (os.environ["HOROVOD_RANK"], os.environ["HOROVOD_SIZE"]) == (rank, "3")
    assert requests == ["/rank_and_size/node-b:0"]
    server.server_close()
