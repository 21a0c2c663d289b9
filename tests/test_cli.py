"""The door runner: errors are one line with an exit code; bugs keep their traceback."""

import json
import subprocess
import sys
import textwrap

import pytest

CONFIG = """
from efficient_lm.config import Config

def get_config(argument=""):
    values = Config().to_config_dict()
    values.training.steps = 7
    return values
"""
DOOR = """
from absl import flags
from efficient_lm import cli
from efficient_lm.errors import DataError

def main():
    config = read()
    if flags.FLAGS.action == "interrupt":
        raise KeyboardInterrupt
    if flags.FLAGS.action == "implementation":
        from pallas_kernels._core import dispatch
        dispatch.choose("attention", (), None, "flesh")
    if flags.FLAGS.action == "disk":
        raise OSError(28, "No space left on device", "runs/x/summary.json")
    if flags.FLAGS.action == "user":
        raise DataError("the file\\nis empty")
    if flags.FLAGS.action == "bug":
        {}["key"]
    print(config.training.steps, config.model.logits_soft_cap)

read = cli.define_config_flag()
flags.DEFINE_string("action", "", "What to do.")
cli.run_door(main)
"""


@pytest.fixture(scope="module")
def door(tmp_path_factory):
    """run(*flags, shell="done before") -> (exit code, stdout, stderr) of a small door."""
    folder = tmp_path_factory.mktemp("door")
    (folder / "config.py").write_text(CONFIG)
    (folder / "empty.py").write_text("")
    (folder / "plain.py").write_text("def get_config():\n  return {}")
    (folder / "door.py").write_text(textwrap.dedent(DOOR))

    def run(*arguments, shell=":"):
        arguments = [argument.replace("DIR", str(folder)) for argument in arguments]
        done = subprocess.run(
            [
                "sh",
                "-c",
                f'{shell}; exec "$@"',
                "sh",
                sys.executable,
                str(folder / "door.py"),
                *arguments,
            ],
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout, done.stderr

    return run


FILE = "--config=DIR/config.py"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ([], 2, ["no config", "--config="]),
        (["--config=DIR/none.py", "--config.training.steps=1"], 2, ["none.py", "config.py"]),
        (["--config=DIR/empty.py"], 2, ["has no function get_config()"]),
        (["--config=DIR/plain.py"], 2, ["returned {}", "to_config_dict()"]),
        (["--config=DIR/plain.py:x"], 2, ["plain.py:x: get_config() takes 0 positional"]),
        ([FILE, "--config.training.step=1"], 2, ["config.training.step;", "'steps'"]),
        ([FILE, "--config.trainin.steps=1"], 2, ["config.trainin;", "'training'"]),
        ([FILE, "--config.training.steps=0"], 2, ["config.training.steps=0", "at least 1"]),
        ([FILE, "--config.model.norm=layer"], 2, ["config.model.norm", "rms_norm"]),
        (["--config.training.steps=1"], 2, ["--config.training.steps", "add --config="]),
        ([FILE, "--actoin=x"], 2, ["actoin", "did you mean action?"]),
        ([FILE, "extra"], 2, ["extra"]),
        ([FILE, "--action=user"], 3, ["the file is empty"]),
        ([FILE, "--action=implementation"], 2, ["attention: unknown implementation 'flesh'"]),
        ([FILE, "--action=disk"], 4, ["runs/x/summary.json: No space left"]),
        ([FILE, "--action=interrupt"], 130, ["interrupted"]),
    ],
)
def test_errors_are_one_line(door, arguments, code, words):
    returned, out, error = door(*arguments)
    assert (returned, out) == (code, "")
    assert error.startswith("error: ") and error.count("\n") == 1
    assert all(word in error for word in words), error


@pytest.mark.parametrize(
    ("field", "code", "words"),
    [
        ("kda.rank=3", 0, "kda rank 3"),
        ("kda.rnk=3", 2, "unknown field config.model.mixers.kda.rnk; did you mean 'rank'?"),
        ("mamba2.expand=3", 2, "config.model.mixers.mamba2.expand: the mixers of the run are kda"),
    ],
)
def test_options_of_every_mixer_of_a_run_can_be_changed(field, code, words):
    program = """if True:
        from efficient_lm import cli
        from efficient_lm.config import Config
        change = cli.define_override_flag()
        run = Config.from_dict({"model": {"layers": ("kda",)}})
        cli.run_door(lambda: print("kda rank", change(run).model.mixers["kda"]["rank"]))
    """
    command = [sys.executable, "-c", program, f"--config.model.mixers.{field}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert (done.stderr or done.stdout) == ("error: " if code else "") + words + "\n"


@pytest.mark.parametrize(
    ("shell", "code", "words"),
    [("exec <&- >&-", 0, ""), ("exec >/dev/full", 4, "the output: No space left on device")],
)
def test_streams_that_are_closed_or_full_are_no_bug(door, shell, code, words):
    returned, _, error = door(FILE, shell=shell)
    assert returned == code and words in error and error.count("\n") == bool(words)


def test_a_bug_keeps_its_traceback(door):
    code, _, error = door(FILE, "--action=bug")
    assert code == 1 and "Traceback" in error and "KeyError: 'key'" in error


def test_overrides_reach_the_config_and_print_config_shows_them(door):
    override = ["--config.training.steps=3", "--config.model.logits_soft_cap=30.0"]
    assert door(FILE, *override) == (0, "3 30.0\n", "")
    code, out, _ = door(FILE, *override, "--print_config")
    assert code == 0 and json.loads(out)["training"]["steps"] == 3
