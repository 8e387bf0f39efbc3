"""The counts message: a row of int64 numbers from each rank to each, its header first, then the counts of each slab.

The header says which call a rank makes, so that ranks which make different ones find out before they take each other's bytes for
something else. All that is known of a field of it stands in one line of `Header`; where that line stands decides which advice is
given, since what differs further up explains what differs below. The number itself comes from whoever makes a `Header`
(`journey.messages`).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import Annotated, Any, NamedTuple, get_type_hints

import numpy as np

from shardembed.errors import SAME_CALLS, SAME_OUTPUTS, DisagreementError
from shardembed.wire.fingerprint import described
from shardembed.wire.message import Numbers

NUMBER_BYTES = 8  # int64
COUNTS_OF_SLAB = 2  # segments, keys


class Mode(IntEnum):
    """What a call is about, and how it is called where ranks differ."""

    text: str

    def __new__(cls, number: int, text: str) -> "Mode":
        mode = int.__new__(cls, number)
        mode._value_, mode.text = number, text
        return mode

    EVALUATION = 0, "a forward in evaluation mode (no_grad)"
    TRAINING = 1, "a forward in training mode"
    ROWS = 2, "rows()"
    TOPK = 3, "topk()"
    IDS = 4, "ids()"
    LOAD = 5, "load_rows()"
    TALLY = 6, "tally()"


@dataclass(frozen=True)
class Agreed:
    """A field that must be the same on all ranks.

    Attributes:
        meaning: what the number is.
        says: what it adds to the description of a rank's call where ranks differ in it.
        advice: what the user is told to do when this is the first field in which ranks differ.
        refused: whether it is compared where some rank sends an error, too. One that refuses the arguments of its call has none.
        unless: where ranks differ in that field too, this one is not described: there it means nothing.
    """

    meaning: str
    says: Callable[["Header"], str]
    advice: str
    refused: bool = True
    unless: str = ""


@dataclass(frozen=True)
class Told:
    """A field that each rank has for itself.

    Attributes:
        meaning: what it says.
    """

    meaning: str


def opening(header: "Header") -> str:
    """Nothing more: the description of a call opens with it."""
    return ""


def untold(header: "Header") -> str:
    """Nothing: a reader could not tell anything from the number."""
    return ""


def _steps(header: "Header") -> str:
    waiting = "with" if header.waiting else "without"
    return f", after {header.steps} optimizer step(s), {waiting} gradients waiting for the next"


def _asked(header: "Header") -> str:
    wanted = f"{header.k} id(s) for" if header.mode == Mode.LOAD else f"k={header.k} and"
    return f", with {wanted} table number {header.table} of these"


def _frozen(header: "Header") -> str:
    return f", with {described(header.frozen)} frozen since{' they were made' if header.frozen else ''}"


NOT_ALONE = f"{SAME_CALLS}; rank 0 cannot evaluate or read rows alone"
FREEZE_ALIKE = "Freeze and thaw tables (requires_grad_, requires_grad) on all ranks, at the same place of the program"
STEP_ALIKE = "Every rank must take every step: Optimizer.step(), backward() and zero_grad() are for all ranks or for none"
OTHER_CALLS = f"They did not make the same calls before, of backward for example. {SAME_OUTPUTS}. {SAME_CALLS}"


# Annotations are evaluated here, unlike elsewhere in the package, so that an error in one shows its line.
class Header(NamedTuple):
    """What stands at the head of a row, in the order on the wire, which is also that in which differences are explained."""

    collection: Annotated[int, Agreed("number of the collection on its process group", opening, SAME_CALLS)]
    mode: Annotated[int, Agreed("what the call is about, a `Mode`", opening, NOT_ALONE)]
    number: Annotated[int, Agreed("of the call on its process group", lambda it: f", its call {it.number}", SAME_CALLS)]
    frozen: Annotated[int, Agreed("fingerprint of tables frozen since", _frozen, FREEZE_ALIKE, refused=False, unless="collection")]
    steps: Annotated[int, Agreed("optimizer steps of the collection", _steps, STEP_ALIKE)]
    waiting: Annotated[int, Agreed("whether gradients wait for the next step", _steps, STEP_ALIKE)]
    table: Annotated[
        int, Agreed("number of the table, where a call is about one", _asked, SAME_CALLS, refused=False, unless="mode")
    ]
    k: Annotated[int, Agreed("rows wanted, of topk; ids given, of load_rows", _asked, SAME_CALLS, refused=False, unless="mode")]
    history: Annotated[int, Agreed("checksum of all calls so far", untold, OTHER_CALLS)]
    error_bytes: Annotated[int, Told("bytes of the error text that this rank sends next; 0 where it has none")]


def _field(name: str, hint: Any) -> Agreed | Told:
    for said in getattr(hint, "__metadata__", ()):
        if isinstance(said, Agreed | Told):
            return said
    raise TypeError(f"Header.{name} does not say whether ranks must agree on it: write Annotated[int, Agreed(...)], or Told(...)")


FIELDS: dict[str, Agreed | Told] = {name: _field(name, hint) for name, hint in get_type_hints(Header, include_extras=True).items()}
AGREED: dict[str, Agreed] = {name: field for name, field in FIELDS.items() if isinstance(field, Agreed)}
WIDTH = len(Header._fields)
HEADER_BYTES = NUMBER_BYTES * WIDTH
SLAB_COUNTS_BYTES = NUMBER_BYTES * COUNTS_OF_SLAB

_AGREED = np.array([*map(Header._fields.index, AGREED)])
_ERROR_BYTES = Header._fields.index("error_bytes")


def numbers(slabs: int) -> int:
    """How many numbers a row has."""
    return WIDTH + COUNTS_OF_SLAB * slabs


def fill(header: Header, counts: Numbers, slots: int) -> Numbers:
    """A row to each rank, `[R, numbers]`.

    Args:
        counts: two a slab and rank, `[slabs, 2, R]`. slots: slabs that a row has room for.
    """
    slabs, each, ranks = counts.shape
    rows = np.zeros((ranks, numbers(slots)), dtype=np.int64)
    rows[:, :WIDTH] = header
    rows[:, WIDTH : WIDTH + slabs * each] = counts.transpose(2, 0, 1).reshape(ranks, -1)
    return rows


def counts_of(rows: Numbers, slabs: int) -> Numbers:
    """What the rows say of so many slabs, `[slabs, 2, R]`."""
    told = rows[:, WIDTH : numbers(slabs)]
    return np.ascontiguousarray(told.reshape(len(rows), slabs, COUNTS_OF_SLAB).transpose(1, 2, 0))


def refused(rows: Numbers) -> bool:
    """Whether some rank sends an error."""
    return bool(rows[:, _ERROR_BYTES].any())


def compare(rows: Numbers, names: Sequence[str]) -> None:
    """See to it that all ranks make the same call.

    Args:
        rows: of all ranks, in rank order, `[R, numbers]`.
        names: of the collections on the group, in the order of their numbers.

    Raises:
        DisagreementError: they do not. It describes the call of each rank by what differs.
    """
    agreed = rows[:, _AGREED]
    if (agreed == agreed[0]).all():  # as good as always, in every forward: nothing else is worked out before
        return
    headers = [Header(*row) for row in rows[:, :WIDTH].tolist()]
    differing = {name: field for name, field in _compared(rows).items() if len({getattr(each, name) for each in headers}) > 1}
    if not differing:
        return
    told = [field for field in differing.values() if field.unless not in differing]
    said = "; ".join(f"rank {rank} makes {_describe(each, told, names)}" for rank, each in enumerate(headers))
    advice = next(iter(differing.values())).advice
    raise DisagreementError(f"ranks are not making the same call: {said}. {advice}")


def _compared(rows: Numbers) -> dict[str, Agreed]:
    return {name: field for name, field in AGREED.items() if field.refused} if refused(rows) else AGREED


def _describe(header: Header, told: Sequence[Agreed], names: Sequence[str]) -> str:
    # A phrase may speak of two fields.
    phrases = dict.fromkeys(field.says(header) for field in told)
    return f"{Mode(header.mode).text} of collection {header.collection} ({names[header.collection - 1]}){''.join(phrases)}"
