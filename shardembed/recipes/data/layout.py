"""How the rows of a text file are written."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Layout:
    """What stands between the values of a row, and where the names of columns are.

    Attributes:
        delimiter: between two values.
        names: of the columns, where files have no header line, and no quotes either.
        described: such a row, for messages: "6: the label, ...".
        texts: ids are texts, though all of them be digits.
    """

    delimiter: str
    names: tuple[str, ...] = ()
    described: str = ""
    texts: bool = False


LAYOUTS = {".csv": Layout(","), ".tsv": Layout("\t")}
