"""Text that anybody may have written, on its way to a reader: a terminal, a page, a picture.

Names of tables, columns and files, and what stands in a file of somebody else's, may hold what a terminal obeys, what a browser
takes for a tag, or what matplotlib takes for a formula. Three doors lead out, and all of it goes through one of them: `printable`
(in `console`, and where an error is told), `planner.html`, and `drawable`.
"""

from __future__ import annotations

REPLACED = "?"


def printable(text: str) -> str:
    """`text` without what a terminal would obey or a reader would not see: control characters, escapes, bidirectional overrides,
    lone surrogates. Each becomes a `?`; ends of lines stay, a tab is a space.
    """
    if text.isascii() and text.isprintable():  # nearly always
        return text
    return "".join(each if each.isprintable() or each == "\n" else " " if each == "\t" else REPLACED for each in text)


def one_line(text: str) -> str:
    """As `printable`, on one line: a name with an end of a line in it would else forge lines of a table or of a message."""
    return printable(text).replace("\n", REPLACED)


def ending(text: str, most: int, cut: str = "...") -> str:
    """A line of at most `most` characters, the last ones: names of tables are paths, which differ at their end."""
    text = one_line(text)
    return text if len(text) <= most else f"{cut}{text[len(text) - most + len(cut) :]}"


def beginning(text: str, most: int) -> str:
    """A line of at most `most` characters, the first ones, which say most where it is no key."""
    text = one_line(text)
    return text if len(text) <= most else f"{text[: most - 3].rstrip()}..."


def drawable(text: str) -> str:
    """A line for matplotlib, which takes what stands between dollars for a formula, and leaves out of a legend what begins with a
    line below.
    """
    text = one_line(text).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text
