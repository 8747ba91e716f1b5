"""The lab network: hosts reach each other at the rate asked for, and nothing is left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.network import HOSTS_FILES, NAMESPACE_FILES, PREFIX, ShapedNetwork, remove_leftovers

reason = ShapedNetwork.unavailable()
pytestmark = [pytest.mark.netns, pytest.mark.skipif(reason is not None, reason=reason or "")]
ROOT = Path(__file__).parents[2]

SERVER = """
import socket, time
server = socket.create_server(("", 5000))
print("ready", flush=True)
connection, _ = server.accept()
start, received = time.monotonic(), 0
while chunk := connection.recv(1 << 20):
    received += len(chunk)
print(received * 8e-6 / (time.monotonic() - start))
"""
CLIENT = """
import socket, sys
with socket.create_connection(("w0", 5000)) as connection:
    connection.sendall(bytes(int(sys.argv[1])))
"""
HOLDER = """
import signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background is started with it ignored
from benchmarks.network import ShapedNetwork
with ShapedNetwork(2) as network:
    network.run("w1", ["sleep", "300"])
    print(network.namespace("w1"), flush=True)
    time.sleep(300)
"""


def measure(network: ShapedNetwork, num_bytes: int) -> float:
    """Mbit/s of one TCP stream from w1 to w0."""
    server = network.run("w0", [sys.executable, "-c", SERVER], stdout=subprocess.PIPE)
    assert server.stdout is not None
    assert server.stdout.readline() == "ready\n"
    assert network.run("w1", [sys.executable, "-c", CLIENT, str(num_bytes)]).wait(timeout=60) == 0
    output, _ = server.communicate(timeout=60)
    return float(output)


def traces(name: str = f"{PREFIX}-{os.getpid()}") -> list[Path]:
    return [*NAMESPACE_FILES.glob(f"{name}-*"), *HOSTS_FILES.glob(f"{name}-*")]


@pytest.mark.parametrize("rate_mbit", [50, 400])
def test_a_link_has_the_rate_asked_for(rate_mbit: int) -> None:
    with ShapedNetwork(2, rate_mbit) as network:
        measured = measure(network, num_bytes=rate_mbit * 125_000)  # one second's worth
    assert 0.4 * rate_mbit < measured < 1.2 * rate_mbit


def test_an_unshaped_link_is_faster_than_a_shaped_one() -> None:
    with ShapedNetwork(2, rate_mbit=None) as free, ShapedNetwork(2, rate_mbit=20) as shaped:
        assert measure(free, 20_000_000) > 2 * measure(shaped, 2_500_000)


def test_hosts_have_names_and_addresses_of_their_own_and_reach_each_other_by_ssh() -> None:
    with ShapedNetwork(3, rate_mbit=None) as network:
        remote = "ssh -o BatchMode=yes root@w2 -p 22 -q 'hostname; echo \"a  b\"'"
        script = f"hostname; getent hosts w2; {remote}; echo $GREETING"
        worker = network.run("w1", ["sh", "-c", script], {"GREETING": "hello"}, stdout=subprocess.PIPE)
        output, _ = worker.communicate(timeout=30)
        addresses = network.addresses
    assert worker.returncode == 0
    lines = output.splitlines()
    assert [lines[0], lines[1].split()[0], *lines[2:]] == ["w1", addresses["w2"], "w2", "a  b", "hello"]


def test_an_exception_leaves_no_namespace_and_no_process() -> None:
    workers = []

    def fail() -> None:
        with ShapedNetwork(2) as network:
            workers.append(network.run("w0", ["sh", "-c", "sleep 300 & sleep 300"]))
            assert traces()
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert workers[0].wait(timeout=10) != 0
    assert not traces()


def test_a_command_ends_at_its_time_limit() -> None:
    with ShapedNetwork(1, time_limit=1) as network:
        assert network.run("w0", ["sleep", "300"]).wait(timeout=20) == 124


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_process_that_is_killed_leaves_no_network(number: signal.Signals) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER], env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert holder.stdout is not None
    namespace = holder.stdout.readline().strip()
    name = f"{PREFIX}-{holder.pid}"
    assert traces(name)
    assert namespace.startswith(name)
    pids = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True, check=True).stdout.split()
    holder.send_signal(number)
    holder.wait(timeout=30)
    if number == signal.SIGKILL:  # nobody can clean up after that but the next one
        remove_leftovers()
    holder.stdout.close()
    assert not traces(name)
    deadline = time.monotonic() + 10
    while any(Path("/proc", pid).exists() for pid in pids):
        assert time.monotonic() < deadline, "a process of the network is still there"
        time.sleep(0.05)
