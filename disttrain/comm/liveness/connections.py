"""A star of small TCP connections between rank 0 and every other rank, beside whatever engine carries the tensors.

Messages are JSON objects, one a line and short. Rank 0 listens on one address, only while the star is set up, and takes
only those who know the token that went over the communicator.
"""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
import json
import os
import secrets
import selectors
import socket
import time
from typing import Any, Protocol

import psutil

from disttrain.comm.launch.environment import detect

MAX_LINE = 4096
_CONNECT_SECONDS = 10.0
_ADMIT_SECONDS = 15.0
_MAX_STRANGERS = 64

Message = dict[str, Any]


class Group(Protocol):
    """What a star needs of a communicator."""

    rank: int
    world_size: int
    local_size: int

    def all_gather_object(self, value: Any) -> list[Any]: ...
    def broadcast_object(self, value: Any, root: int = 0) -> Any: ...


class BrokenConnectionError(Exception):
    """The other end closed, broke, or does not speak the protocol."""


class Connection:
    """One end of a connection. Sending never blocks: a peer that reads nothing is noticed by its silence."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setblocking(False)
        self._socket = sock
        self._received = b""

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Send, or do nothing if the peer is gone or its buffer is full: receiving tells of both."""
        # Not in ASCII, where one character may take twelve bytes; what UTF-8 cannot hold becomes an escape of JSON's.
        line = json.dumps(message, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
        assert len(line) <= MAX_LINE, "messages are short"
        with contextlib.suppress(OSError):
            self._socket.send(line)

    def receive(self) -> list[Message]:
        """The messages that have arrived (call it when the socket is readable).

        Raises:
            BrokenConnectionError: the peer is gone, or sent what is no message.
        """
        try:
            chunk = self._socket.recv(MAX_LINE)
        except BlockingIOError:
            return []
        except OSError as error:
            raise BrokenConnectionError(str(error)) from None
        if not chunk:
            raise BrokenConnectionError("closed")
        *lines, self._received = (self._received + chunk).split(b"\n")
        if len(self._received) > MAX_LINE:
            raise BrokenConnectionError("a line too long")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            raise BrokenConnectionError("not JSON") from None
        if not all(isinstance(message, dict) for message in messages):
            raise BrokenConnectionError("not an object")
        return messages

    def finish(self) -> None:
        """Send no more; what was sent still arrives."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._socket.close()


def connect(group: Group) -> tuple[dict[int, Connection], str | None]:
    """Set the star up; all ranks call it together.

    Returns the connections by rank (rank 0: to all others; the others: to rank 0), and None; or, alike on all ranks, no
    connection and the reason: a network that lets the engine through may still stop this.
    """
    listener: socket.socket | None = None
    offer: list[Any] | None = None
    error = None
    if group.rank == 0:
        try:
            listener = _listen(group)
            offer = [*listener.getsockname()[:2], secrets.token_hex(16)]
        except OSError as failure:
            error = f"rank 0 on {socket.gethostname()} can listen on none of its addresses ({failure})"
    offer = group.broadcast_object(offer)
    connections: dict[int, Connection] = {}
    if offer is not None:
        address, port, token = offer
        if listener is not None:
            connections, error = _admit(listener, token, group.world_size), None
        else:
            try:
                connections = {0: _join(address, port, token, group.rank)}
            except OSError as failure:
                reason = failure.strerror or failure
                error = f"rank {group.rank} on {socket.gethostname()} cannot reach {address} port {port} ({reason})"
    if listener is not None:
        listener.close()
    expected = group.world_size - 1 if group.rank == 0 else 1
    if error is None and len(connections) < expected:
        missing = sorted(set(range(1, group.world_size)) - set(connections))
        error = f"rank 0 on {socket.gethostname()} was not called by ranks {missing}"
    errors = [text for text in group.all_gather_object(error) if text is not None]
    if not errors:
        return connections, None
    for connection in connections.values():
        connection.close()
    return {}, str(errors[-1])  # a rank that cannot reach rank 0 knows more than rank 0, which comes first


def addresses(group: Group) -> list[str]:
    """Rank 0's addresses at which the others may reach it, the likeliest first."""
    if group.local_size == group.world_size:
        return ["127.0.0.1"]
    interfaces = {
        name: [entry.address for entry in entries if entry.family in (socket.AF_INET, socket.AF_INET6)]
        for name, entries in psutil.net_if_addrs().items()
    }
    chosen: list[str] = []
    for variable in ("GLOO_SOCKET_IFNAME", "HOROVOD_GLOO_IFACE"):
        chosen += interfaces.get(os.environ.get(variable, "").split(",")[0], [])
    found: list[str] = []
    for name in (detect().master_addr, socket.gethostname()):
        with contextlib.suppress(OSError):
            found += [str(entry[4][0]) for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM) if name]
    for entries in interfaces.values():
        found += entries
    # A host's own name often means its loopback there, where no other host can call; so do link-local ones.
    usable = [address for address in found if not _is_local(address)]
    return list(dict.fromkeys([*chosen, *usable, "127.0.0.1"]))


def _is_local(address: str) -> bool:
    parsed = ipaddress.ip_address(address.split("%")[0])
    return parsed.is_loopback or parsed.is_link_local


def _listen(group: Group) -> socket.socket:
    failure: OSError | None = None
    for address in addresses(group):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            return socket.create_server(
                (address, 0), family=family, backlog=min(group.world_size + _MAX_STRANGERS, 4096)
            )
        except OSError as error:  # MASTER_ADDR may be a forwarder's address, that this host does not have
            failure = error
    assert failure is not None
    raise failure


def _join(address: str, port: int, token: str, rank: int) -> Connection:
    connection = Connection(socket.create_connection((address, port), timeout=_CONNECT_SECONDS))
    connection.send({"rank": rank, "token": token})
    return connection


def _admit(listener: socket.socket, token: str, world_size: int) -> dict[int, Connection]:
    """Take calls until every rank has introduced itself; whoever does not know the token is dropped."""
    admitted: dict[int, Connection] = {}
    deadline = time.monotonic() + _ADMIT_SECONDS
    listener.setblocking(False)
    strangers: set[Connection] = set()
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while len(admitted) < world_size - 1 and (left := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                if key.fileobj is listener:
                    with contextlib.suppress(OSError):
                        stranger = Connection(listener.accept()[0])
                        strangers.add(stranger)
                        selector.register(stranger, selectors.EVENT_READ)
                    if len(strangers) > _MAX_STRANGERS + world_size:
                        return admitted
                    continue
                caller = key.fileobj
                assert isinstance(caller, Connection)
                try:
                    rank = _introduction(caller, token, world_size)
                    if rank in admitted:
                        raise BrokenConnectionError("introduced twice")
                except BrokenConnectionError:
                    selector.unregister(caller)
                    strangers.discard(caller)
                    caller.close()
                    continue
                if rank is not None:
                    selector.unregister(caller)
                    strangers.discard(caller)
                    admitted[rank] = caller
    for stranger in strangers:
        stranger.close()
    return admitted


def _introduction(caller: Connection, token: str, world_size: int) -> int | None:
    """The caller's rank, or None if its line is not complete yet.

    Raises:
        BrokenConnectionError: it is none of ours.
    """
    messages = caller.receive()
    if not messages:
        return None
    rank, offered = messages[0].get("rank"), messages[0].get("token")
    if not isinstance(offered, str) or not hmac.compare_digest(offered.encode(), token.encode()):
        raise BrokenConnectionError("wrong token")
    if not isinstance(rank, int) or not 0 < rank < world_size:
        raise BrokenConnectionError("no such rank")
    return rank
