"""Parts of a page that stands alone: its frame and style, cards, tables, bars. Nothing is fetched, and nothing needs a script.

The door to a page: what is no `Markup` is text, and is escaped by whatever takes it. Only here is text made Markup, and from words
that stand in the source (`filled`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

from shardembed.config.shown import printable

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; background: #fff; max-width: 1080px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h1, p, code { overflow-wrap: anywhere; } td code { overflow-wrap: normal; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .4rem; }
p { max-width: 50rem; margin: .4rem 0; } .dim { color: #666; }
.cards { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0; }
.card { border: 1px solid #ddd; border-radius: 6px; padding: .6rem .9rem; min-width: 9rem; }
.card b { display: block; font-size: 1.4rem; } .card span { color: #666; font-size: .85rem; }
table { border-collapse: collapse; font-size: .88rem; margin: .6rem 0; }
th, td { text-align: left; vertical-align: top; padding: .2rem .8rem .2rem 0; border-bottom: 1px solid #eee; }
th { color: #666; font-weight: normal; border-bottom-color: #bbb; vertical-align: bottom; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
th.n { white-space: normal; }
.o { white-space: nowrap; } .p { min-width: 12rem; }
.bar { background: #332288; print-color-adjust: exact; height: .75rem; border-radius: 2px; min-width: 1px; }
.wide { width: 22rem; min-width: 3rem; }
@media (max-width: 45rem) {
  body { margin-top: 1rem; } .wide { width: 8rem; } .card { flex: 1 1 40%; min-width: 0; }
  .wrap td:first-child { position: sticky; left: 0; background: #fff; max-width: 45vw; overflow-wrap: break-word; }
}
.note { border: 1px solid #117733; border-left-width: 6px; border-radius: 4px; padding: .5rem .8rem; margin: .8rem 0; }
.note.bad { border-color: #aa3344; } .note.dim { border-color: #bbb; }
svg { width: 100%; height: auto; } svg text { font-family: system-ui, sans-serif !important; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr)); gap: 1rem; max-width: 66rem; }
figure { margin: 0; max-width: 31rem; } figcaption { color: #666; font-size: .88rem; } pre { font-size: .82rem; overflow-x: auto; }
summary { cursor: pointer; color: #332288; } code { font-size: .9em; }
.wrap { overflow-x: auto; background: linear-gradient(90deg, transparent, #fff 8px) 100% 0 / 30px 100% no-repeat local,
  linear-gradient(90deg, transparent, #0003) 100% 0 / 12px 100% no-repeat scroll; }
.picture { min-width: 42rem; }
"""


class Markup(str):
    """HTML already. Joined to a str it is a str again, which would be escaped."""

    __slots__ = ()


NOTHING = Markup("")


def text(value: str) -> Markup:
    """As HTML that shows `value`."""
    return value if isinstance(value, Markup) else Markup(escape(printable(value)))


def filled(form: str, *values: str) -> Markup:
    """`form`, which stands in the source, with its `{}` filled."""
    return Markup(form.format(*map(text, values)))


def joined(parts: Iterable[str], by: str = "") -> Markup:
    """Parts behind each other; what is between them stands in the source."""
    return Markup(by.join(map(text, parts)))


def code(name: str) -> Markup:
    return filled("<code>{}</code>", name)


def section(title: str, *parts: str) -> Markup:
    """A heading, and below it paragraphs of text, and Markup as it is."""
    return joined(
        [filled("<h2>{}</h2>", title), *(part if isinstance(part, Markup) else filled("<p>{}</p>", part) for part in parts)]
    )


def document(title: str, parts: Sequence[Markup]) -> str:
    """The page.

    Raises:
        TypeError: a part is text, not Markup.
    """
    for part in parts:
        if not isinstance(part, Markup):
            raise TypeError(f"a part of a page must be Markup, not {part[:40]!r}")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{text(title)}</title>'
    return (
        f'<!doctype html>\n<html lang="en"><head>{head}<style>{STYLE}</style></head>\n<body>\n'
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def cards(shown: Sequence[tuple[str, str, str]]) -> Markup:
    """What to see first: (name, value, more about it) of each."""
    card = '<div class="card"><span>{}</span><b>{}</b><span>{}</span></div>'
    return filled('<div class="cards">{}</div>', joined(filled(card, *each) for each in shown))


def note(kind: str, title: str, said: str) -> Markup:
    """A sentence that must not be overlooked, which begins with its title; kind: good, bad or dim."""
    return filled('<p class="note {}"><b>{}</b> {}</p>', kind, title, said)


def bar(share: float) -> Markup:
    """A bar of that share of its cell's width."""
    return Markup(f'<div class="bar" style="width:{100 * share:.1f}%"></div>')


def table(names: Sequence[str], rows: Sequence[Sequence[str]], kinds: str) -> Markup:
    """kinds: a letter a column: l(eft), o(ne line), p(rose), n(umber) or w(ide)."""
    styles = {"l": "", "o": ' class="o"', "p": ' class="p"', "n": ' class="n"', "w": ' class="wide"'}
    head = "".join(f"<th{styles[kind]}>{text(name)}</th>" for name, kind in zip(names, kinds, strict=True))
    body = "".join(
        f"<tr>{''.join(f'<td{styles[kind]}>{text(cell)}</td>' for cell, kind in zip(row, kinds, strict=True))}</tr>" for row in rows
    )
    return Markup(f'<div class="wrap"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>')


def folded(summary: str, inside: Markup) -> Markup:
    """What unfolds below its summary."""
    return filled("<details><summary>{}</summary>{}</details>", summary, inside)
