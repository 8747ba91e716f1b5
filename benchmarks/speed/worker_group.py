"""The workers of one framework, started by its launcher and commanded over a Unix socket.

The socket works across network namespaces and puts no traffic on the measured network. Commands and replies are lines
of JSON: ``WorkerGroup`` sends a command to all workers, ``serve`` answers it in each.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.common.machine import ROOT
from benchmarks.network import ShapedNetwork, rank_environment

STEP_TIME_WORKER = "benchmarks.speed.worker"
START_TIMEOUT = 120.0  # seconds


class WorkerError(RuntimeError):
    """A worker failed or did not reply in time; the message ends with its output."""


@dataclass
class WorkerGroup:
    """All workers of one framework. Use it as a context manager: it starts and stops them.

    Args:
        framework: its name in ``benchmarks.speed.frameworks``.
        launcher: ``env`` (environment variables for torch.distributed), ``horovodrun`` or ``mpirun``.
        num_workers: one on each host, or all on this machine without a network.
        options: further options of the worker.
        network: where the workers run; None is this machine's loopback interface.
        num_threads: torch threads in each worker.
        port: of the rendezvous, for ``env``.
        pause_when_idle: stop the workers' processes between commands. Horovod's background threads communicate all
            the time, which would disturb the other group.
        environment: further environment variables.
        module: the worker's program, which calls ``serve``.
        reply_timeout: seconds that a command may take.
    """

    framework: str
    launcher: str
    num_workers: int
    options: Sequence[str]
    network: ShapedNetwork | None
    num_threads: int
    port: int = 29400
    pause_when_idle: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    module: str = STEP_TIME_WORKER
    reply_timeout: float = 300.0
    _processes: list[subprocess.Popen[Any]] = field(default_factory=list)
    _streams: dict[int, Any] = field(default_factory=dict)
    _pids: list[int] = field(default_factory=list)

    def __enter__(self) -> WorkerGroup:
        self._directory = tempfile.TemporaryDirectory(prefix="disttrain-bench-")
        self._log = Path(self._directory.name, "log")
        try:
            self._start()
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def request(self, **command: Any) -> list[dict[str, Any]]:
        """Send a command to all workers and return their replies in rank order."""
        with self._resumed():
            for stream in self._streams.values():
                stream.write(json.dumps(command) + "\n")
                stream.flush()
            return [self._read_reply(self._streams[rank]) for rank in range(self.num_workers)]

    @contextlib.contextmanager
    def _resumed(self) -> Iterator[None]:
        if not self.pause_when_idle:
            yield
            return
        self._send_signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._send_signal(signal.SIGSTOP)

    def _send_signal(self, number: signal.Signals) -> None:
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)

    def _start(self) -> None:
        path = f"{self._directory.name}/socket"
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(path)
            listener.listen(self.num_workers)
            listener.settimeout(1.0)
            with self._log.open("w") as log:
                self._launch([sys.executable, "-m", self.module, "--socket", path, *self.options], log)
            deadline = time.monotonic() + START_TIMEOUT
            while len(self._streams) < self.num_workers:
                if time.monotonic() > deadline or any(process.poll() is not None for process in self._processes):
                    raise WorkerError(self._failure_message("did not start"))
                with contextlib.suppress(TimeoutError):
                    connection, _ = listener.accept()
                    connection.settimeout(self.reply_timeout)
                    stream = connection.makefile("rw")
                    hello = self._read_reply(stream)
                    self._streams[hello["rank"]] = stream
                    self._pids.append(hello["pid"])
        if self.pause_when_idle:
            self._send_signal(signal.SIGSTOP)

    def _launch(self, worker: Sequence[str], log: Any) -> None:
        python = Path(sys.executable)
        environment = {
            "OMP_NUM_THREADS": str(self.num_threads),
            # This timeout also runs while a group is paused.
            "HOROVOD_GLOO_TIMEOUT_SECONDS": str(int(self.reply_timeout)),
            "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            **self.environment,
        }
        command = [*worker, "--framework", self.framework, "--num-threads", str(self.num_threads)]
        hosts = self.network.hosts if self.network is not None else ["localhost"]
        slots = 1 if self.network is not None else self.num_workers
        with_hosts = ["-np", str(self.num_workers), "-H", ",".join(f"{host}:{slots}" for host in hosts)]
        if self.launcher == "horovodrun":
            self._spawn(
                hosts[0], [str(python.with_name("horovodrun")), "--gloo", *with_hosts, *command], environment, log
            )
        elif self.launcher == "mpirun":
            as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
            self._spawn(hosts[0], ["mpirun", *with_hosts, *command], {**environment, **as_root}, log)
        else:
            for rank in range(self.num_workers):
                interface = self.network.interface if self.network is not None else "lo"
                ranks = rank_environment(
                    rank, self.num_workers, master=hosts[0], port=self.port, interface=interface, slots=slots
                )
                self._spawn(hosts[rank // slots], command, {**environment, **ranks}, log)

    def _spawn(self, host: str, command: Sequence[str], environment: dict[str, str], log: Any) -> None:
        if self.network is not None:
            process = self.network.run(host, command, environment, stdout=log, stderr=log)
        else:
            process = subprocess.Popen(
                command, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._processes.append(process)

    def _read_reply(self, stream: Any) -> dict[str, Any]:
        try:
            line = stream.readline()
        except TimeoutError:
            line = ""
        if not line:
            raise WorkerError(self._failure_message(f"exited, or did not reply within {self.reply_timeout:.0f} s"))
        reply: dict[str, Any] = json.loads(line)
        return reply

    def _failure_message(self, what: str) -> str:
        time.sleep(1.0)  # the workers' last output may still be on its way
        return f"a worker of {self.framework} ({self.launcher}) {what}:\n{self._log.read_text()[-4000:]}"

    def _stop(self) -> None:
        self._send_signal(signal.SIGCONT)
        for stream in self._streams.values():
            with contextlib.suppress(OSError):
                stream.write('{"do": "end"}\n')
                stream.flush()
                stream.close()
        deadline = time.monotonic() + 15.0
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
        # Workers under horovodrun or mpirun are not our children: end those that remain by the process ids they sent.
        self._send_signal(signal.SIGKILL)
        for process in self._processes:
            process.kill()
            process.wait()
        self._directory.cleanup()


def serve(path: str, rank: int, commands: Mapping[str, Callable[..., Any]]) -> None:
    """Answer the commands of a ``WorkerGroup`` until it ends.

    Args:
        path: of the group's socket.
        rank: of this worker.
        commands: what to call for each value of ``do``, with the command's other fields. The result, a JSON value, is
            the reply.
    """
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        stream = connection.makefile("rw")

        def reply(value: Any) -> None:
            stream.write(json.dumps(value) + "\n")
            stream.flush()

        reply({"rank": rank, "pid": os.getpid()})
        while line := stream.readline():
            command = json.loads(line)
            if (do := command.pop("do")) == "end":
                break
            reply(commands[do](**command))
