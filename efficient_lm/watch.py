"""A watch over the processes of a run: one that ends or falls silent ends all, with one line.

Process 0 serves, and every process, also process 0, is connected to it by TCP. JAX has a watch of
its own, which notices the death of a peer only by its silence and ends a process by a stack trace.
Messages are JSON objects, one a line. They also carry the agreement on the step to stop after.
"""

import os
import platform
import selectors
import socket
import sys
import threading
import time
from collections.abc import Sequence

from efficient_lm.errors import ProcessError
from efficient_lm.watch_server import BEATS, Connection, Server

SETTLE_SECONDS = 1.0  # the other end of a broken connection is found out within it
_current: "Member | None" = None


def current() -> "Member | None":
    """This process's part in the watch; None for a single process."""
    return _current


def start(
    index: int,
    count: int,
    address: str,
    *,
    join_timeout: float,
    peer_timeout: float,
    stall_timeout: float,
) -> list[str]:
    """Wait for all processes, then watch them; the hosts of the processes in their order.

    Args:
      index, count: of this process, of how many.
      address: host:port at which process 0 listens.
      join_timeout: seconds to wait for process 0, and for process 0 to wait for all.
      peer_timeout: seconds of silence after which a process counts as dead.
      stall_timeout: seconds that a process may be a step behind another one.

    Raises ProcessError when they do not come together.
    """
    global _current
    host, port = split_address(address)
    if index == 0:
        Server(
            count,
            port,
            join_timeout=join_timeout,
            peer_timeout=peer_timeout,
            stall_timeout=stall_timeout,
        ).start()
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


def begins(step: int) -> None:
    """Called before every step, once this process has its batch: the others may be behind."""
    if _current is not None:
        _current.position = 2 * step - 1


def split_address(address: str) -> tuple[str, int]:
    """(host, port) of "host:port"."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


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
        self._refused, self._failed = "", False
        self._joined, self._told, self._all_left = (threading.Event() for _ in range(3))
        self._boundary = threading.Lock()  # held while the step to stop after is being settled
        self._done, self._asked, self._stop_after, self._signal = -1, False, -1, 0
        self.position = 0
        threading.Thread(target=self._listen, name="watch", daemon=True).start()
        self._joined.wait()  # the server's time limit counts
        if self._refused:
            raise ProcessError(f"process 0 at {self._address} refuses: {self._refused}")

    def stops(self, done: int, received: Sequence[int]) -> int:
        """See `stops` of the module."""
        with self._boundary:
            self._done, self.position = done, 2 * done
            if received and not self._asked:
                self._asked = True
                self._connection.send(stop=received[0])
            return self._signal if done == self._stop_after else 0

    def fail(self, line: str, code: int) -> None:
        """Tell the others that this process ends with `code`, and why; they end with it too.

        If it ends for the loss of another one, the server knows it by then, and ends it here.
        """
        time.sleep(SETTLE_SECONDS)
        self._failed = True
        self._connection.send(failed=line, code=code)
        self._told.wait(SETTLE_SECONDS)

    def leave(self) -> None:
        """Return when all processes have come here; the watch is over."""
        global _current
        self._connection.send(leave=True)
        self._all_left.wait()
        _current = None

    def _listen(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._connection.socket, selectors.EVENT_READ)
            beat = 0.0
            while not self._all_left.is_set() and not self._refused:
                ready = selector.select(timeout=min(1.0, self._peer_timeout / BEATS / 2))
                messages = self._connection.receive() if ready else []
                if messages is None and self._failed:
                    return
                if messages is None:
                    self._end(f"process 0 at {self._address} ended (its connection closed)")
                for message in messages:
                    self._handle(message)
                now = time.monotonic()
                if now - beat > self._peer_timeout / BEATS:
                    if now - beat > self._peer_timeout / 2:  # it was this process that stood still
                        self._connection.heard = now
                    beat = now
                    self._connection.send(position=self.position)
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
            self._end(message["end"], message["code"])

    def _end(self, why: str, code: int = ProcessError.exit_code) -> None:
        """End this process: the main thread may be waiting for the lost one for ever."""
        advice = "; this process ends too"
        if self._joined.is_set() and code == ProcessError.exit_code:
            advice += (
                ": start the same command again everywhere, and the run goes on from its last "
                "checkpoint"
            )
        cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # a live display hid it
        os.write(2, f"{cursor}error: {why}{advice}\n".encode())
        os._exit(code)


def _connect(index: int, host: str, port: int, join_timeout: float) -> Connection:
    """Try until process 0 listens; ProcessError after `join_timeout` seconds."""
    end = time.monotonic() + join_timeout
    while True:
        try:
            return Connection(socket.create_connection((host, port), timeout=5.0))
        except OSError as error:
            reason = error.strerror or str(error) or type(error).__name__
        if time.monotonic() > end:
            raise ProcessError(
                f"process {index} cannot reach process 0 at {host}:{port} ({reason}), tried for "
                f"{join_timeout:g} s; start process 0 there, or check --coordinator and firewalls"
            )
        time.sleep(0.5)
