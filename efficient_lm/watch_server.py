"""The server of the watch over the processes of a run, a thread of process 0."""

import json
import selectors
import socket
import threading
import time
from typing import Any

from efficient_lm.errors import ProcessError

BEATS = 4  # signs of life within the time after which silence is death


class Connection:
    """Messages over a socket; any thread may send."""

    def __init__(self, sock: socket.socket):
        sock.settimeout(5.0)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket, self._rest, self._lock = sock, b"", threading.Lock()
        self.heard = time.monotonic()
        self.process, self.host = -1, "?"
        self.position = 0  # 2 n: step n is done; 2 n - 1: it has begun
        self.behind_since = self.heard

    def send(self, **message: Any) -> None:
        """Nothing is said of a broken connection, which reading finds out."""
        try:
            with self._lock:
                self.socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError:
            return

    def receive(self) -> list[dict] | None:
        """The messages that came; None when the other end is gone. Waits if there are none."""
        try:
            data = self.socket.recv(65536)
        except TimeoutError:
            return []
        except OSError:
            data = b""
        if not data:
            return None
        self.heard = time.monotonic()
        *lines, self._rest = (self._rest + data).split(b"\n")
        try:
            return [dict(json.loads(line)) for line in lines]
        except (ValueError, TypeError):
            return None  # a stranger


class Server(threading.Thread):
    """The thread of process 0 that all processes are connected to."""

    def __init__(
        self,
        count: int,
        port: int,
        *,
        join_timeout: float,
        peer_timeout: float,
        stall_timeout: float,
    ):
        super().__init__(name="watch server", daemon=True)
        self._count, self._peer_timeout = count, peer_timeout
        self._stall_timeout = stall_timeout
        self._deadline, self._join_timeout = time.monotonic() + join_timeout, join_timeout
        self._members: dict[int, Connection] = {}
        self._selector = selectors.DefaultSelector()
        self._signal = 0
        self._done: dict[int, int] = {}
        self._left: set[int] = set()
        try:
            family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
            self._listener = socket.create_server(
                ("", port), family=family, dualstack_ipv6=family == socket.AF_INET6, backlog=1024
            )
        except OSError as error:
            raise ProcessError(
                f"cannot listen at port {port} ({error.strerror}); a process of an earlier run may "
                "still be there: end it, or give --coordinator another port"
            ) from None

    def run(self) -> None:
        self._selector.register(self._listener, selectors.EVENT_READ)
        beat = 0.0
        while len(self._left) < self._count:
            for key, _ in self._selector.select(timeout=min(1.0, self._peer_timeout / BEATS / 2)):
                if key.fileobj is self._listener:
                    connection = Connection(self._listener.accept()[0])
                    self._selector.register(connection.socket, selectors.EVENT_READ, connection)
                else:
                    self._read(key.data)
            now = time.monotonic()
            if now - beat > self._peer_timeout / BEATS:
                if now - beat > self._peer_timeout / 2:  # it was this process that stood still
                    for member in self._members.values():
                        member.heard = now
                beat = now
                self._tell(beat=True)
            if self._deadline is not None and now > self._deadline:
                missing = sorted(set(range(self._count)) - set(self._members))
                self._end(
                    f"process {', '.join(map(str, missing))} of {self._count} did not come within "
                    f"{self._join_timeout:g} s; start the same command everywhere, each process "
                    "with its own --process_id"
                )
            for member in list(self._members.values()):
                if self._deadline is None and now - member.heard > self._peer_timeout:
                    self._lose(member, f"gave no sign of life for {self._peer_timeout:g} s")
        self._listener.close()
        self._tell(all_left=True)

    def _read(self, connection: Connection) -> None:
        messages = connection.receive()
        if messages is None:
            self._selector.unregister(connection.socket)
            if self._members.get(connection.process) is connection:
                self._lose(connection, "ended (its connection closed)")
            return
        for message in messages:
            self._handle(connection, message)

    def _handle(self, connection: Connection, message: dict) -> None:
        if "hello" in message:
            self._welcome(connection, message)
        elif connection.process < 0:
            return
        elif "failed" in message:
            self._members.pop(connection.process)
            line = f"process {connection.process} on {connection.host} stopped: {message['failed']}"
            connection.send(told=True)
            self._end(line, message["code"])
        elif "position" in message:
            self._move(connection, message["position"])
        elif "stop" in message and not self._signal:
            self._signal = message["stop"]
            self._tell(query=True)
        elif "done" in message:
            self._done[connection.process] = message["done"]
            if len(self._done) == self._count:
                self._tell(stop_after=max(self._done.values()) + 1, signal=self._signal)
        elif "leave" in message:
            self._left.add(connection.process)

    def _welcome(self, connection: Connection, message: dict) -> None:
        process, count = message["hello"], message["count"]
        if count != self._count or not 0 <= process < count:
            connection.send(refused=f"this run has {self._count} processes, not {count}")
        elif process in self._members:
            connection.send(
                refused=f"process {process} is there already, on {self._members[process].host}; "
                "each needs a --process_id of its own"
            )
        else:
            connection.process, connection.host = process, message["host"]
            self._members[process] = connection
            if len(self._members) == self._count:
                self._deadline = None
                self._tell(welcome=[self._members[p].host for p in range(self._count)])

    def _lose(self, member: Connection, why: str) -> None:
        self._members.pop(member.process)
        if member.process not in self._left:
            self._end(f"process {member.process} on {member.host} {why}")

    def _move(self, member: Connection, position: int) -> None:
        """Note how far a process is, and since when it is behind another one."""
        now = time.monotonic()
        if position > member.position:
            member.position, member.behind_since = position, now
        front = max(other.position for other in self._members.values())
        for other in self._members.values():
            behind = now - other.behind_since
            if other.position == front or other.process in self._left:
                other.behind_since = now
            elif behind > self._stall_timeout:
                self._end(
                    f"process {other.process} on {other.host} has not gone on from step "
                    f"{other.position // 2} for {behind:.0f} s, while others have"
                )

    def _end(self, line: str, code: int = ProcessError.exit_code) -> None:
        """End all processes that are left."""
        self._tell(end=line, code=code)
        self._deadline = None

    def _tell(self, **message: Any) -> None:
        for process in sorted(self._members, reverse=True):  # process 0, which may end by it, last
            self._members[process].send(**message)
