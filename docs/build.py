"""Write what is generated in documents, and pictures: `python -m docs.build`.

Tables come from the JSON that experiments keep, pictures from the same and from the code itself.
"""

import os
import re
import sys
from pathlib import Path

import jax

from docs import experiments, headlines, mixers, pictures, tables

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    ROOT / "README.md", ROOT / "docs/numbers.md", *sorted(ROOT.glob("experiments/*/README.md"))
]  # fmt: skip
BLOCKS = tables.BLOCKS | mixers.BLOCKS | headlines.BLOCKS | experiments.BLOCKS
MARKER = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end of \2 -->)", re.DOTALL)
LINK = re.compile(r"\]\(((?!https?:)[^)]+)\)")


def document(text: str, folder: str = ".") -> str:
    """`text` with what stands between the markers of each block written anew.

    folder: of the document in the repository; links of blocks start from there.
    """

    def write(match: re.Match) -> str:
        block = LINK.sub(lambda link: f"]({os.path.relpath(link[1], folder)})", BLOCKS[match[2]]())
        return f"{match[1]}{block}\n{match[3]}"

    names = [match[2] for match in MARKER.finditer(text)]
    unknown = sorted(set(names) - set(BLOCKS))
    if unknown:
        raise ValueError(f"no block is called {unknown[0]}; known: {', '.join(BLOCKS)}")
    return MARKER.sub(write, text)


def main() -> int:
    """Write the documents and the pictures that are out of date."""
    jax.config.update("jax_platforms", "cpu")  # so that what it says does not depend on the device
    for path in DOCUMENTS:
        text = path.read_text()
        new = document(text, path.parent.relative_to(ROOT).as_posix())
        if new != text:
            path.write_text(new)
            print(f"wrote {path.relative_to(ROOT)}")
    for path in pictures.outdated():
        pictures.write(path)
        print(f"wrote {path.relative_to(ROOT)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
