"""Teams of workers that the bench commands: all workers of one contender, on the hosts of a shaped network or on this
one, started as a user starts them, and told over a Unix socket when to step."""

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
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from benchmarks.network import ShapedNetwork, rank_environment

WORKER = Path(__file__).with_name("contenders.py")
START_SECONDS = 120.0
ORDER_SECONDS = 300.0


class TeamError(RuntimeError):
    """A worker ended or went silent: the message has the end of its output."""


@dataclass
class Team:
    """The workers of one contender.

    Args:
        contender: its name in ``benchmarks.contenders``.
        launcher: ``env`` (ranks by environment variables, for torch.distributed), ``horovodrun`` or ``mpirun``.
        num_workers: one on each host, or all on this one without a network.
        options: further options of the worker.
        network: where the workers run; None is this host's loopback.
        port: of the rendezvous, for ``env``.
        freeze: stop the workers' processes whenever they have nothing to do. Horovod's background threads talk to each
            other all the time, which would disturb the other team.
        environment: further variables, for trying an engine's settings.
    """

    contender: str
    launcher: str
    num_workers: int
    options: Sequence[str]
    network: ShapedNetwork | None
    num_threads: int
    port: int = 29400
    freeze: bool = False
    environment: Mapping[str, str] = field(default_factory=dict)
    _processes: list[subprocess.Popen[Any]] = field(default_factory=list)
    _streams: dict[int, Any] = field(default_factory=dict)
    _pids: list[int] = field(default_factory=list)

    def __enter__(self) -> Team:
        self._directory = tempfile.TemporaryDirectory(prefix="disttrain-bench-")
        self._log = Path(self._directory.name, "log")
        try:
            self._start()
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def ask(self, **order: Any) -> list[dict[str, Any]]:
        """Give all workers an order; their answers, in rank order."""
        with self._awake():
            for stream in self._streams.values():
                stream.write(json.dumps(order) + "\n")
                stream.flush()
            return [self._answer(self._streams[rank]) for rank in range(self.num_workers)]

    @contextlib.contextmanager
    def _awake(self) -> Iterator[None]:
        if not self.freeze:
            yield
            return
        self._signal(signal.SIGCONT)
        try:
            yield
        finally:
            self._signal(signal.SIGSTOP)

    def _signal(self, number: signal.Signals) -> None:
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
                self._launch([sys.executable, str(WORKER), "--socket", path, *self.options], log)
            deadline = time.monotonic() + START_SECONDS
            while len(self._streams) < self.num_workers:
                if time.monotonic() > deadline or any(process.poll() is not None for process in self._processes):
                    raise TeamError(self._explain("did not start"))
                with contextlib.suppress(TimeoutError):
                    connection, _ = listener.accept()
                    connection.settimeout(ORDER_SECONDS)
                    stream = connection.makefile("rw")
                    hello = self._answer(stream)
                    self._streams[hello["rank"]] = stream
                    self._pids.append(hello["pid"])
        if self.freeze:
            self._signal(signal.SIGSTOP)

    def _launch(self, worker: Sequence[str], log: Any) -> None:
        python = Path(sys.executable)
        environment = {
            "OMP_NUM_THREADS": str(self.num_threads),
            "HOROVOD_GLOO_TIMEOUT_SECONDS": str(int(ORDER_SECONDS)),  # a frozen team's clocks go on
            "PATH": f"{python.parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}",
            **self.environment,
        }
        command = [*worker, "--contender", self.contender, "--num-threads", str(self.num_threads)]
        hosts = self.network.hosts if self.network is not None else ["localhost"]
        slots = 1 if self.network is not None else self.num_workers
        with_hosts = ["-np", str(self.num_workers), "-H", ",".join(f"{host}:{slots}" for host in hosts)]
        if self.launcher == "horovodrun":
            self._run(
                hosts[0], [str(python.with_name("horovodrun")), "--gloo", *with_hosts, *command], environment, log
            )
        elif self.launcher == "mpirun":
            as_root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
            self._run(hosts[0], ["mpirun", *with_hosts, *command], {**environment, **as_root}, log)
        else:
            for rank in range(self.num_workers):
                interface = self.network.interface if self.network is not None else "lo"
                ranks = rank_environment(
                    rank, self.num_workers, master=hosts[0], port=self.port, interface=interface, slots=slots
                )
                self._run(hosts[rank // slots], command, {**environment, **ranks}, log)

    def _run(self, host: str, command: Sequence[str], environment: dict[str, str], log: Any) -> None:
        if self.network is not None:
            process = self.network.run(host, command, environment, stdout=log, stderr=log)
        else:
            process = subprocess.Popen(
                command, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._processes.append(process)

    def _answer(self, stream: Any) -> dict[str, Any]:
        try:
            line = stream.readline()
        except TimeoutError:
            line = ""
        if not line:
            raise TeamError(self._explain("ended, or took too long"))
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _explain(self, what: str) -> str:
        time.sleep(1.0)  # let the workers' last words arrive
        return f"a worker of {self.contender} ({self.launcher}) {what}:\n{self._log.read_text()[-4000:]}"

    def _end(self) -> None:
        self._signal(signal.SIGCONT)
        for stream in self._streams.values():
            with contextlib.suppress(OSError):
                stream.write('{"do": "end"}\n')
                stream.flush()
                stream.close()
        deadline = time.monotonic() + 15.0
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(0.1, deadline - time.monotonic()))
        self._signal(signal.SIGKILL)  # those that are left, by the ids that they gave
        for process in self._processes:
            process.kill()
            process.wait()
        self._directory.cleanup()
