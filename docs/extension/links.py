"""Links of pages to files of the repository, which a forge follows and a site has to be told about."""

from __future__ import annotations

import os
import re
from pathlib import Path

LINK = re.compile(r"(?<!!)\[([^\]\n]+)\]\((?!https?:|#|/)([^)#\s]+)(#[^)\s]*)?\)")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)


def to_files(text: str, page: Path, site: Path) -> str:
    """The page, with links to files beyond the site turned into the files' names: the site has no copy of the repository.

    Raises:
        FileNotFoundError: there is no such file.
    """
    fenced = [range(*found.span()) for found in FENCE.finditer(text)]

    def replaced(found: re.Match[str]) -> str:
        if any(found.start() in span for span in fenced):
            return found[0]
        target = Path(os.path.normpath(page.parent / found[2]))
        if not target.exists():
            raise FileNotFoundError(f"{page}: the link to {found[2]} leads nowhere")
        if target.is_relative_to(site) and target.is_file():
            return found[0]
        name = target.relative_to(site.parent).as_posix()
        return found[1] if found[1].strip("`").rstrip("/") == name.rstrip("/") else f"{found[1]} (`{name}`)"

    return LINK.sub(replaced, text)
