"""A watch over the processes of a run: one that ends or falls silent ends all, with one line.

Process 0 serves, and every process, also process 0, is connected to it by TCP. JAX has a watch of
its own, which notices the death of a peer only by its silence and ends a process by a stack trace.
Messages are JSON objects, one a line. They also carry the agreement on the step to stop after.
"""

import json
import os
import platform
import selectors
import socket
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

from efficient_lm.errors import ProcessError

BEATS = 4  # signs of life within the time after which silence is death
SETTLE_SECONDS = 1.0  # the other end of a broken connection is found out within it
_current: "Member | None" = None


def current() -> "Member | None":
    """This process's part in the watch; None for a single process."""
    return _current


def start(index: int, count: int, address: str, *, join_timeout: float, peer_timeout: float):
    """Wait for all processes, then watch them; the hosts of the processes in their order.

    Args:
      index, count: of this process, of how many.
      address: host:port at which process 0 listens.
      join_timeout: seconds to wait for process 0, and for process 0 to wait for all.
      peer_timeout: seconds of silence after which a process counts as dead.

    Raises ProcessError when they do not come together.
    """
    global _current
    host, port = split_address(address)
    if index == 0:
        _Server(count, port, join_timeout=join_timeout, peer_timeout=peer_timeout).start()
        host = "localhost"
    _current = Member(index, count, host, port, join_timeout, peer_timeout)
    return _current.hosts


def stops(done: int, received: Sequence[int]) -> int:
    """The signal that all processes obey after step `done`, or 0; called after every step.

    Args:
      received: the signals that this process received. The others are told, and all stop after
        the same step, the next that no process has gone beyond.
    """
    if _current is None:
        return received[0] if received else 0
    return _current.stops(done, received)


def split_address(address: str) -> tuple[str, int]:
    """(host, port) of "host:port"."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


class _Connection:
    """Messages over a socket; any thread may send."""

    def __init__(self, sock: socket.socket):
        sock.settimeout(5.0)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket, self._rest, self._lock = sock, b"", threading.Lock()
        self.heard = time.monotonic()
        self.process, self.host = -1, "?"

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


class _Server(threading.Thread):
    """The thread of process 0 that all processes are connected to."""

    def __init__(self, count: int, port: int, *, join_timeout: float, peer_timeout: float):
        super().__init__(name="watch server", daemon=True)
        self._count, self._peer_timeout = count, peer_timeout
        self._deadline, self._join_timeout = time.monotonic() + join_timeout, join_timeout
        self._members: dict[int, _Connection] = {}
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
                    connection = _Connection(self._listener.accept()[0])
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
        self._tell(all_left=True)

    def _read(self, connection: _Connection) -> None:
        messages = connection.receive()
        if messages is None:
            self._selector.unregister(connection.socket)
            if self._members.get(connection.process) is connection:
                self._lose(connection, "ended (its connection closed)")
            return
        for message in messages:
            self._handle(connection, message)

    def _handle(self, connection: _Connection, message: dict) -> None:
        if "hello" in message:
            self._welcome(connection, message)
        elif connection.process < 0:
            return
        elif "failed" in message:
            self._members.pop(connection.process)
            self._end(f"process {connection.process} on {connection.host} stopped: "
                      f"{message['failed']}")  # fmt: skip
            connection.send(told=True)
        elif "stop" in message and not self._signal:
            self._signal = message["stop"]
            self._tell(query=True)
        elif "done" in message:
            self._done[connection.process] = message["done"]
            if len(self._done) == self._count:
                self._tell(stop_after=max(self._done.values()) + 1, signal=self._signal)
        elif "leave" in message:
            self._left.add(connection.process)

    def _welcome(self, connection: _Connection, message: dict) -> None:
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

    def _lose(self, member: _Connection, why: str) -> None:
        self._members.pop(member.process)
        if member.process not in self._left:
            self._end(f"process {member.process} on {member.host} {why}")

    def _end(self, line: str) -> None:
        """End all processes that are left."""
        self._tell(end=line)
        self._deadline = None

    def _tell(self, **message: Any) -> None:
        for member in list(self._members.values()):
            member.send(**message)


class Member:
    """A process's connection to the server, and the thread that listens to it."""

    def __init__(
        self, index: int, count: int, host: str, port: int, join_timeout: float, peer_timeout: float
    ):
        self._address, self._peer_timeout = f"{host}:{port}", peer_timeout
        self._connection = _connect(index, host, port, join_timeout)
        self._hello = {"hello": index, "count": count, "host": platform.node()}
        self._connection.send(**self._hello)
        self.hosts: list[str] = []
        self._refused = ""
        self._joined, self._told, self._all_left = (threading.Event() for _ in range(3))
        self._boundary = threading.Lock()  # held while the step to stop after is being settled
        self._done, self._asked, self._stop_after, self._signal = -1, False, -1, 0
        threading.Thread(target=self._listen, name="watch", daemon=True).start()
        self._joined.wait()  # the server's time limit counts
        if self._refused:
            raise ProcessError(f"process 0 at {self._address} refuses: {self._refused}")

    def stops(self, done: int, received: Sequence[int]) -> int:
        """See `stops` of the module."""
        with self._boundary:
            self._done = done
            if received and not self._asked:
                self._asked = True
                self._connection.send(stop=received[0])
            return self._signal if done == self._stop_after else 0

    def fail(self, line: str) -> None:
        """Tell the others that this process ends, and why; they end too."""
        self._connection.send(failed=line)
        self._told.wait(SETTLE_SECONDS)

    def leave(self) -> None:
        """Return when all processes have come here."""
        self._connection.send(leave=True)
        self._all_left.wait()

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._connection.socket, selectors.EVENT_READ)
            beat = 0.0
            while not self._all_left.is_set() and not self._refused:
                ready = selector.select(timeout=min(1.0, self._peer_timeout / BEATS / 2))
                messages = self._connection.receive() if ready else []
                if messages is None:
                    self._end(f"process 0 at {self._address} ended (its connection closed)")
                for message in messages:
                    self._handle(message)
                now = time.monotonic()
                if now - beat > self._peer_timeout / BEATS:
                    if now - beat > self._peer_timeout / 2:  # it was this process that stood still
                        self._connection.heard = now
                    beat = now
                    self._connection.send(beat=True)
                if now - self._connection.heard > self._peer_timeout:
                    self._end(
                        f"process 0 at {self._address} gave no sign of life for "
                        f"{self._peer_timeout:g} s"
                    )

    def _handle(self, message: dict) -> None:
        if "welcome" in message:
            self.hosts = message["welcome"]
            self._joined.set()
        elif "refused" in message:
            self._refused = message["refused"]
            self._joined.set()
        elif "query" in message:
            self._boundary.acquire()
            self._connection.send(done=self._done)
        elif "stop_after" in message:
            self._stop_after, self._signal = message["stop_after"], message["signal"]
            self._boundary.release()
        elif "told" in message:
            self._told.set()
        elif "all_left" in message:
            self._all_left.set()
        elif "end" in message:
            self._end(message["end"])

    def _end(self, why: str) -> None:
        """End this process: the main thread may be waiting for the lost one for ever."""
        advice = ""
        if self._joined.is_set():
            advice = (
                "; this process ends too: start the same command again everywhere, and the run "
                "goes on from its last checkpoint"
            )
        cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # a live display hid it
        os.write(2, f"{cursor}error: {why}{advice}\n".encode())
        os._exit(ProcessError.exit_code)


def _connect(index: int, host: str, port: int, join_timeout: float) -> _Connection:
    """Try until process 0 listens; ProcessError after `join_timeout` seconds."""
    end = time.monotonic() + join_timeout
    while True:
        try:
            return _Connection(socket.create_connection((host, port), timeout=5.0))
        except OSError as error:
            reason = error.strerror or str(error) or type(error).__name__
        if time.monotonic() > end:
            raise ProcessError(
                f"process {index} cannot reach process 0 at {host}:{port} ({reason}), tried for "
                f"{join_timeout:g} s; start process 0 there, or check --coordinator and firewalls"
            )
        time.sleep(0.5)
