"""The progress line: everything in 80 columns on a terminal, few lines elsewhere."""

import io

from rich.console import Console

from efficient_lm.training.progress import Progress

ROW = {"loss": 2.34567, "bits_per_byte": 1.2345, "tokens_per_second": 45_213.0, "step_seconds": 0.5}


def show(width=80, **options):
    console = Console(file=io.StringIO(), width=width, highlight=False, **options)
    with Progress(1000, console=console) as progress:
        progress.message("resuming [from] step 0")
        for step in range(100, 1001, 100):
            progress.update(step, ROW)
    return console.file.getvalue()


def test_plain_output_is_a_line_now_and_then():
    lines = show().splitlines()
    assert lines[0] == "resuming [from] step 0"
    assert lines[1] == ("step 100/1,000  loss 2.3457  1.234 bits/byte  45.2k tokens/s  7:30 left")
    assert lines[-1].startswith("step 1,000/1,000")
    assert len(lines) == 3  # the first, the last, and none of those in the ten seconds between


def test_the_live_line_fits_and_messages_stay_above_it():
    for width in (80, 120):
        text = show(width, force_terminal=True)
        assert "45.2k tokens/s  0:00 left" in text
        assert "resuming [from] step 0" in text
        last = text.splitlines()[-2]
        assert ("━" in last) == (width == 120)
