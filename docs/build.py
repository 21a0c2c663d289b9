"""Write what is generated in READMEs, and pictures: `python -m docs.build`.

Tables come from the JSON that experiments keep, pictures from the same and from the code itself.
"""

import re
import sys
from pathlib import Path

import jax

from docs import experiments, pictures, tables

ROOT = Path(__file__).parents[1]
READMES = [ROOT / "README.md", *sorted(ROOT.glob("experiments/*/README.md"))]
BLOCKS = tables.BLOCKS | experiments.BLOCKS
MARKER = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end of \2 -->)", re.DOTALL)


def readme(text: str) -> str:
    """`text` with what stands between the markers of each block written anew."""
    names = [match[2] for match in MARKER.finditer(text)]
    unknown = sorted(set(names) - set(BLOCKS))
    if unknown:
        raise ValueError(f"no block is called {unknown[0]}; known: {', '.join(BLOCKS)}")
    return MARKER.sub(lambda match: f"{match[1]}{BLOCKS[match[2]]()}\n{match[3]}", text)


def main() -> int:
    """Write the READMEs and the pictures that are out of date."""
    jax.config.update("jax_platforms", "cpu")  # so that what it says does not depend on the device
    for path in READMES:
        text = path.read_text()
        new = readme(text)
        if new != text:
            path.write_text(new)
            print(f"wrote {path.relative_to(ROOT)}")
    for path in pictures.outdated():
        pictures.write(path)
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
