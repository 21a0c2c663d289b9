"""Run by test_checkpoint: processes that are killed at chosen moments of a save.

`python killed_saves.py DIRECTORY`: one work directory per moment, checkpoints 1 and 2 complete,
checkpoint 3 (or 2 again) cut off by SIGKILL.
"""

import importlib
import os
import signal
import sys
import threading
from pathlib import Path

import jax

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_platforms", "cpu")

from test_checkpoint import make_state  # noqa: E402

from efficient_lm.config import CheckpointingConfig  # noqa: E402
from efficient_lm.training import checkpoint, manifest  # noqa: E402


def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)
    threading.Event().wait()  # nothing more happens in this thread


def after(seconds):
    """While the arrays are being written."""
    threading.Timer(seconds, kill).start()


def before_the_manifest():
    manifest.write = kill


def inside_the_manifest():
    def write(directory, content):
        (directory / manifest.FILE_NAME).write_text('{"format_version": 1, "crc')
        kill()

    manifest.write = write


def before_the_rename():
    checkpoint.Checkpointer._rename = kill


def between_the_renames():
    replace = os.replace

    def once(*arguments):
        replace(*arguments)
        kill()

    checkpoint.os.replace = once


def while_deleting():
    checkpoint.storage.remove = kill


# moment -> (how to be killed, step being saved, step that must be restored)
MOMENTS = {
    "after_2_ms": (lambda: after(0.002), 3, (2, 3)),
    "after_20_ms": (lambda: after(0.02), 3, (2, 3)),
    "after_60_ms": (lambda: after(0.06), 3, (2, 3)),
    "before_the_manifest": (before_the_manifest, 3, (2,)),
    "inside_the_manifest": (inside_the_manifest, 3, (2,)),
    "before_the_rename": (before_the_rename, 3, (2, 3)),
    "between_the_renames": (between_the_renames, 2, (2,)),
    "while_deleting": (while_deleting, 3, (3,)),
}


def main(root: Path) -> None:
    importlib.import_module("orbax.checkpoint.experimental.v1")  # once for all children
    for moment, (arrange, step, _) in MOMENTS.items():
        child = os.fork()  # before JAX starts its threads: the imports are paid for once
        if child == 0:
            checkpointer = checkpoint.Checkpointer(
                root / moment, CheckpointingConfig(keep_last=2, keep_best=0)
            )
            for good in (1, 2):
                checkpointer.save(good, make_state(good), iterator={}, config={}, wait=True)
            arrange()
            checkpointer.save(step, make_state(step), iterator={}, config={})
            checkpointer.wait()
            threading.Event().wait(10)
            os._exit(1)
        _, status = os.waitpid(child, 0)
        if os.WTERMSIG(status) != signal.SIGKILL:
            sys.exit(f"{moment}: not killed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
