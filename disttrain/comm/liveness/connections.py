"""A star of TCP connections between rank 0 and every other rank, independent of the engine that carries the tensors.

Messages are short JSON objects, one per line. Rank 0 listens on one address, only while the star is set up, and accepts
only connections that present the token it has sent over the communicator.
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

MAX_LINE_BYTES = 4096
_CONNECT_SECONDS = 10.0
_ACCEPT_SECONDS = 15.0
_MAX_UNKNOWN_PEERS = 64

Message = dict[str, Any]


class ObjectCommunicator(Protocol):
    """The part of a communicator that is needed to set up the star."""

    rank: int
    world_size: int
    local_size: int

    def all_gather_object(self, value: Any) -> list[Any]: ...
    def broadcast_object(self, value: Any, root: int = 0) -> Any: ...


class BrokenConnectionError(Exception):
    """The peer closed the connection, the connection broke, or the peer sent an invalid message."""


class Connection:
    """One end of a connection. Sending never blocks: a peer that does not read is detected by its silence."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        sock.setblocking(False)
        self._socket = sock
        self._received = b""

    def fileno(self) -> int:
        return self._socket.fileno()

    def send(self, message: Message) -> None:
        """Send a message. Drop it if the peer is gone or its buffer is full; ``receive`` and silence reveal both."""
        # UTF-8: in ASCII, JSON takes up to twelve bytes per character. backslashreplace turns lone surrogates into JSON
        # escapes.
        line = json.dumps(message, ensure_ascii=False).encode(errors="backslashreplace") + b"\n"
        assert len(line) <= MAX_LINE_BYTES, "message too long"
        with contextlib.suppress(OSError):
            self._socket.send(line)

    def receive(self) -> list[Message]:
        """Return the messages that have arrived. Call this when the socket is readable.

        Raises:
            BrokenConnectionError: the peer is gone, or sent an invalid message.
        """
        try:
            chunk = self._socket.recv(MAX_LINE_BYTES)
        except BlockingIOError:
            return []
        except OSError as error:
            raise BrokenConnectionError(str(error)) from None
        if not chunk:
            raise BrokenConnectionError("closed")
        *lines, self._received = (self._received + chunk).split(b"\n")
        if len(self._received) > MAX_LINE_BYTES:
            raise BrokenConnectionError("line too long")
        try:
            messages = [json.loads(line) for line in lines]
        except ValueError:
            raise BrokenConnectionError("not JSON") from None
        if not all(isinstance(message, dict) for message in messages):
            raise BrokenConnectionError("not a JSON object")
        return messages

    def finish_sending(self) -> None:
        """Stop sending. Messages already sent still arrive."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._socket.close()


def connect_star(comm: ObjectCommunicator) -> tuple[dict[int, Connection], str | None]:
    """Set up the star. All ranks call this together.

    Returns the connections by rank (on rank 0 to all other ranks, elsewhere to rank 0) and None. If any rank fails to
    connect, returns no connections and the reason, the same on all ranks: a firewall may block these connections while
    it lets the engine's pass.
    """
    listener: socket.socket | None = None
    endpoint: list[Any] | None = None
    error = None
    if comm.rank == 0:
        try:
            listener = _listen(comm)
            endpoint = [*listener.getsockname()[:2], secrets.token_hex(16)]
        except OSError as failure:
            error = f"rank 0 on {socket.gethostname()} cannot listen on any of its addresses ({failure})"
    endpoint = comm.broadcast_object(endpoint)
    connections: dict[int, Connection] = {}
    if endpoint is not None:
        address, port, token = endpoint
        if listener is not None:
            connections, error = _accept_ranks(listener, token, comm.world_size), None
        else:
            try:
                connections = {0: _connect_to_rank_0(address, port, token, comm.rank)}
            except OSError as failure:
                reason = failure.strerror or failure
                error = f"rank {comm.rank} on {socket.gethostname()} cannot reach {address} port {port} ({reason})"
    if listener is not None:
        listener.close()
    expected = comm.world_size - 1 if comm.rank == 0 else 1
    if error is None and len(connections) < expected:
        missing = sorted(set(range(1, comm.world_size)) - set(connections))
        error = f"rank 0 on {socket.gethostname()} received no connection from ranks {missing}"
    errors = [text for text in comm.all_gather_object(error) if text is not None]
    if not errors:
        return connections, None
    for connection in connections.values():
        connection.close()
    return {}, str(errors[-1])  # rank 0's error comes first and is the least specific


def candidate_addresses(comm: ObjectCommunicator) -> list[str]:
    """Return the addresses at which other ranks may reach this host, the most likely first."""
    if comm.local_size == comm.world_size:
        return ["127.0.0.1"]
    interfaces = {
        name: [entry.address for entry in entries if entry.family in (socket.AF_INET, socket.AF_INET6)]
        for name, entries in psutil.net_if_addrs().items()
    }
    preferred: list[str] = []
    for variable in ("GLOO_SOCKET_IFNAME", "HOROVOD_GLOO_IFACE"):
        preferred += interfaces.get(os.environ.get(variable, "").split(",")[0], [])
    found: list[str] = []
    for name in (detect().master_addr, socket.gethostname()):
        with contextlib.suppress(OSError):
            found += [str(entry[4][0]) for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM) if name]
    for entries in interfaces.values():
        found += entries
    # A host's name often resolves to its own loopback. Other hosts can reach neither that nor link-local addresses.
    usable = [address for address in found if not _is_local(address)]
    return list(dict.fromkeys([*preferred, *usable, "127.0.0.1"]))


def _is_local(address: str) -> bool:
    parsed = ipaddress.ip_address(address.split("%")[0])
    return parsed.is_loopback or parsed.is_link_local


def _listen(comm: ObjectCommunicator) -> socket.socket:
    failure: OSError | None = None
    for address in candidate_addresses(comm):
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            return socket.create_server(
                (address, 0), family=family, backlog=min(comm.world_size + _MAX_UNKNOWN_PEERS, 4096)
            )
        except OSError as error:  # MASTER_ADDR may be that of a forwarder, not of this host
            failure = error
    assert failure is not None
    raise failure


def _connect_to_rank_0(address: str, port: int, token: str, rank: int) -> Connection:
    connection = Connection(socket.create_connection((address, port), timeout=_CONNECT_SECONDS))
    connection.send({"rank": rank, "token": token})
    return connection


def _accept_ranks(listener: socket.socket, token: str, world_size: int) -> dict[int, Connection]:
    """Accept connections until every other rank has authenticated or time is up. Close all that fail to."""
    accepted: dict[int, Connection] = {}
    deadline = time.monotonic() + _ACCEPT_SECONDS
    listener.setblocking(False)
    pending: set[Connection] = set()  # not authenticated yet
    with selectors.DefaultSelector() as selector:
        selector.register(listener, selectors.EVENT_READ)
        while len(accepted) < world_size - 1 and (remaining := deadline - time.monotonic()) > 0:
            for key, _ in selector.select(remaining):
                if key.fileobj is listener:
                    with contextlib.suppress(OSError):
                        connection = Connection(listener.accept()[0])
                        pending.add(connection)
                        selector.register(connection, selectors.EVENT_READ)
                    if len(pending) > _MAX_UNKNOWN_PEERS + world_size:
                        return accepted
                    continue
                peer = key.fileobj
                assert isinstance(peer, Connection)
                try:
                    rank = _authenticate(peer, token, world_size)
                    if rank in accepted:
                        raise BrokenConnectionError("rank already connected")
                except BrokenConnectionError:
                    selector.unregister(peer)
                    pending.discard(peer)
                    peer.close()
                    continue
                if rank is not None:
                    selector.unregister(peer)
                    pending.discard(peer)
                    accepted[rank] = peer
    for connection in pending:
        connection.close()
    return accepted


def _authenticate(peer: Connection, token: str, world_size: int) -> int | None:
    """Return the peer's rank, or None if its first message is not complete yet.

    Raises:
        BrokenConnectionError: the peer is not a rank of this run.
    """
    messages = peer.receive()
    if not messages:
        return None
    rank, presented = messages[0].get("rank"), messages[0].get("token")
    if not isinstance(presented, str) or not hmac.compare_digest(presented.encode(), token.encode()):
        raise BrokenConnectionError("wrong token")
    if not isinstance(rank, int) or not 0 < rank < world_size:
        raise BrokenConnectionError("no such rank")
    return rank
