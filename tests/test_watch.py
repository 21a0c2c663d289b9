"""The watch over processes: who dies, stands still, lags or fails ends all, in a line."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time

import pytest

from efficient_lm.errors import ProcessError

LIMITS = "join_timeout=10, peer_timeout=1.0, stall_timeout=1.0"
SECONDS = 20.0


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("", 0))
        return found.getsockname()[1]


@pytest.fixture
def start():
    """start(body, count=2): processes that join a watch and run the lines of `body`."""
    started = []

    def run(body: str, count: int = 2, indices=None, limits: str = LIMITS):
        program = (
            "import sys, time, threading\n"
            "from efficient_lm import watch\n"
            "index = int(sys.argv[1])\n"
            f"watch.start(index, {count}, 'localhost:{free_port()}', {limits})\n"
            "print('joined', flush=True)\n" + textwrap.dedent(body)
        )
        now = [
            subprocess.Popen(
                [sys.executable, "-c", program, str(index)],
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for index in (range(count) if indices is None else indices)
        ]  # fmt: skip
        started.extend(now)
        return now

    yield run
    for process in started:
        process.kill()
        process.communicate()


def ends_with(process: subprocess.Popen, code: int) -> str:
    """The last line on stderr of a process that exits with `code`."""
    _, error = process.communicate(timeout=SECONDS)
    assert process.returncode == code, error
    return error.splitlines()[-1] if error else ""


def joined(*processes: subprocess.Popen) -> None:
    for process in processes:
        assert process.stdout.readline() == "joined\n", process.communicate()[1]


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_a_killed_process_ends_the_others_at_once(start, lost):
    processes = start("time.sleep(60)", count=3)
    joined(*processes)
    processes[lost].kill()
    began = time.monotonic()
    for index, process in enumerate(processes):
        if index != lost:
            line = ends_with(process, ProcessError.exit_code)
            assert f"process {lost} " in line and "ended (its connection closed)" in line
            assert "start the same command again everywhere" in line
    assert time.monotonic() - began < 1.0


@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_stands_still_ends_the_others_in_time(start, lost):
    processes = start("time.sleep(60)")
    joined(*processes)
    time.sleep(0.3)
    os.kill(processes[lost].pid, signal.SIGSTOP)
    began = time.monotonic()
    line = ends_with(processes[1 - lost], ProcessError.exit_code)
    assert f"process {lost} " in line and "no sign of life for 1 s" in line
    assert 0.7 < time.monotonic() - began < 3.0


def test_a_process_that_lags_behind_ends_all(start):
    body = """
        for step in range(1, 1000):
            watch.begins(step)
            while step == 3 and index == 1:
                time.sleep(1)  # its batch never comes: signs of life go on
            if step == 3:
                time.sleep(60)
            assert not watch.stops(step, [])
    """
    for process in start(body.replace("watch.begins(step)\n", "index or watch.begins(step)\n")):
        line = ends_with(process, ProcessError.exit_code)
        assert "process 1 on" in line and "has not gone on from step 2 for" in line


def test_silent_but_equal_processes_are_left_alone(start):
    for process in start("watch.begins(1); time.sleep(2.5); watch.current().leave()"):
        assert ends_with(process, 0) == ""


def test_a_failure_is_told_to_all_with_its_code(start):
    body = """
        if index == 1:
            watch.current().fail("ConfigError: x=3; allowed: 4", 2)
            sys.exit(2)
        time.sleep(60)
    """
    first, second = start(body)
    line = ends_with(first, 2)
    assert "stopped: ConfigError: x=3; allowed: 4; this process ends too" in line
    assert "same command" not in line
    ends_with(second, 2)


def test_all_stop_after_the_same_step(start):
    body = """
        for step in range(1, 1000):
            time.sleep(0.001 * (1 + index))
            number = watch.stops(step, [15] if index == 1 and step >= 20 else [])
            if number:
                break
        print(step, number, flush=True)
        watch.current().leave()
    """
    processes = start(body, count=3)
    joined(*processes)
    ends = {process.stdout.readline() for process in processes}
    assert len(ends) == 1
    step, number = map(int, ends.pop().split())
    assert number == 15 and 20 < step < 1000
    for process in processes:
        ends_with(process, 0)


def test_leaving_waits_for_all_and_a_new_watch_can_start(start):
    body = """
        time.sleep(index)
        watch.current().leave()
        assert watch.current() is None
    """
    again = f"watch.start(index, 2, 'localhost:{free_port()}', {LIMITS}); watch.current().leave()"
    for process in start(textwrap.dedent(body) + again):
        ends_with(process, 0)


def test_processes_that_do_not_come_are_named(start):
    (process,) = start("", count=3, indices=[0], limits=LIMITS.replace("=10", "=1.5"))
    line = ends_with(process, ProcessError.exit_code)
    assert "process 1, 2 of 3 did not come within 1.5 s" in line


def test_two_processes_with_one_number_are_refused(start):
    limits = LIMITS.replace("=10", "=2")
    processes = start("time.sleep(2)", count=3, indices=[0, 1, 1], limits=limits)
    lines = [process.communicate(timeout=SECONDS)[1] for process in processes[1:]]
    (refused,) = [line for line in lines if "refuses" in line]
    assert "process 1 is there already" in refused


def test_strangers_do_not_disturb():
    port = free_port()
    program = (
        "import sys; from efficient_lm import watch\n"
        f"watch.start(int(sys.argv[1]), 2, 'localhost:{port}', {LIMITS}); watch.current().leave()"
    )
    first = subprocess.Popen([sys.executable, "-c", program, "0"])
    for data in (b"GET / HTTP/1.1\r\n\r\n", b'{"leave": true}\n[1]\n', b"\xff\n"):
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            try:
                with socket.create_connection(("localhost", port)) as stranger:
                    stranger.sendall(data)
                    break
            except ConnectionRefusedError:
                time.sleep(0.05)
    second = subprocess.Popen([sys.executable, "-c", program, "1"])
    assert first.wait(SECONDS) == second.wait(SECONDS) == 0
