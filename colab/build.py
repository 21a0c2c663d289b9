"""Write notebooks from their readable twins: `python -m colab.build`.

In a twin, `# %%` starts a cell of code and `# %% [markdown]` one of text, whose lines are comments.
"""

import re
import sys
from pathlib import Path

import nbformat
from nbformat import v4

FOLDER = Path(__file__).parent


def cells(script: str) -> list[nbformat.NotebookNode]:
    """The cells of a twin; what stands before the first marker is left out."""
    parts = re.split(r"^# %%(.*)\n", script, flags=re.MULTILINE)[1:]
    made = []
    for place, (kind, body) in enumerate(zip(parts[::2], parts[1::2], strict=True)):
        body = body.strip("\n")
        if kind.strip() == "[markdown]":
            body = "\n".join(re.sub(r"^# ?", "", line) for line in body.splitlines())
            made.append(v4.new_markdown_cell(body, id=f"cell-{place}"))
        elif kind.strip() == "":
            made.append(v4.new_code_cell(body, id=f"cell-{place}"))
        else:
            raise ValueError(f"unknown kind of cell {kind.strip()!r}; allowed: none or [markdown]")
    return made


def notebook(script: str) -> str:
    """The notebook of a twin, without outputs, as JSON."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    made = v4.new_notebook(cells=cells(script), metadata={"kernelspec": kernel})
    nbformat.validate(made)
    return nbformat.writes(made) + "\n"


def twins() -> list[Path]:
    """The scripts that are notebooks."""
    return [path for path in sorted(FOLDER.glob("*.py")) if path.name != Path(__file__).name]


def main() -> int:
    """Write every notebook."""
    for path in twins():
        path.with_suffix(".ipynb").write_text(notebook(path.read_text()))
        print(f"wrote {path.with_suffix('.ipynb').name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
