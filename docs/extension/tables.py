"""Tables that stand in the pages of the repository, since they are read on a forge too, and are made from the code.

    python -m docs.extension.tables            write them again (`make docs-tables`)
    python -m docs.extension.tables --check    exit with 1 and name the pages whose tables are not those of the code

A table stands between `<!-- settings two_tower, by make docs-tables -->` and `<!-- end -->`; a test holds that all are current.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from docs.extension import optimizers, settings

PAGES = Path(__file__).parents[1]
MAKERS = {"settings": settings.made, "optimizers": optimizers.made}
TABLE = re.compile(r"^<!-- (\w+)(?: (\w+))?, by make docs-tables -->\n(?:.*?\n)??<!-- end -->$", re.MULTILINE | re.DOTALL)


def renewed(text: str) -> str:
    """The page with its tables as the code has them.

    Raises:
        KeyError: a page names a table that nobody makes.
    """

    def made(found: re.Match[str]) -> str:
        head = found[0].partition("\n")[0]
        return f"{head}\n\n{MAKERS[found[1]](found[2] or '').strip()}\n\n<!-- end -->"

    return TABLE.sub(made, text)


def stale() -> list[Path]:
    """The pages whose tables are not those of the code."""
    pages = sorted(path for path in PAGES.rglob("*.md") if "_build" not in path.parts)
    return [page for page in pages if renewed(text := page.read_text(encoding="utf-8")) != text]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description="write the tables of the documentation's pages that are made from the code")
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 where something is to be written")
    check = parser.parse_args(arguments).check
    found = stale()
    for page in found:
        if not check:
            page.write_text(renewed(page.read_text(encoding="utf-8")), encoding="utf-8")
        print(f"{page.relative_to(PAGES.parent)}: {'not current: run make docs-tables' if check else 'written'}")
    return int(check and bool(found))


if __name__ == "__main__":
    sys.exit(main())
