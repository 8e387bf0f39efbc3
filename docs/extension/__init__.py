"""What the site needs beyond Sphinx: pages made from the code, tutorials that have been run, links to files of the repository.

Tables that stand in the repository are not made by the build: `tables` writes them.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from docs.extension import api, command_line, links, percent

MADE = re.compile(r"^<!-- made by the build: (\w+)(?: ([^>]*?))? -->$", re.MULTILINE)
MAKERS = {"api": api.made, "command_line": command_line.made}


def fill(text: str) -> str:
    """The page with what its markers ask for: `<!-- made by the build: api tables -->` on a line of its own."""
    return MADE.sub(lambda found: MAKERS[found[1]](found[2] or ""), text)


def read_source(app: Any, name: str, source: list[str]) -> None:
    path = Path(app.env.doc2path(name))
    if path.suffix == ".py":
        source[0] = percent.built(path, Path(app.srcdir))
    else:
        source[0] = links.to_files(fill(source[0]), path, Path(app.srcdir))


def setup(app: Any) -> dict[str, Any]:
    app.connect("source-read", read_source)
    app.connect("autodoc-process-docstring", api.as_pages)
    app.connect("missing-reference", api.known_elsewhere)
    return {"version": "1", "parallel_read_safe": False, "parallel_write_safe": True}
