"""What a user demands of the plan: a table's kind, cuts, ranks or packing, or kinds that are not to be used.

    pin     TABLE=WISH      a kind (row_wise), a kind cut into n parts (row_wise:4) or on given ranks (column_wise@0,1; also
                            table_wise:3, the table on rank 3), cuts:4, ranks:0,1, packing:bag
    forbid  KIND            for all tables
            TABLE=KIND      for one

Wishes for one table add up; what contradicts itself, or cannot be had of the tables and ranks, is refused before any search.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from typing import ParamSpec, TypeVar

from shardembed.config.hints import nearest
from shardembed.errors import PlanError
from shardembed.planner.topology import Topology
from shardembed.planner.workload import TableLoad, Workload
from shardembed.tables.placement import KINDS, PACKINGS, Packing
from shardembed.tables.plan import TablePlan

CUT_KINDS = ("row_wise", "column_wise", "table_row_wise", "grid")
WISHES = "a kind (row_wise), row_wise:4, row_wise@0,1, table_wise:3, cuts:4, ranks:0,1 or packing:bag"
P = ParamSpec("P")
T = TypeVar("T")
Forbidden = tuple[str | None, str]  # a table, or None for all; a kind


@dataclass(frozen=True)
class Pin:
    """What is fixed of a table; None leaves it open.

    Attributes:
        kind: of sharding.
        cuts: parts that the table is cut into (strips of columns times blocks of rows).
        ranks: where the parts lie, strip after strip.
        packing: how its ids travel.
    """

    kind: str | None = None
    cuts: int | None = None
    ranks: tuple[int, ...] | None = None
    packing: Packing | None = None

    @staticmethod
    def of(wish: str) -> Pin:
        """Read what stands behind the equals sign.

        Raises:
            PlanError: it is nothing that can be wished.
        """
        head, mark, tail = wish.partition("@") if "@" in wish else wish.partition(":")
        if head == "packing" and mark == ":":
            if tail not in PACKINGS:
                raise PlanError(
                    f"cannot be pinned to {wish!r}: {tail!r} is not one of {', '.join(PACKINGS)}{nearest(tail, PACKINGS)}"
                )
            return Pin(packing=tail)  # pyright: ignore[reportArgumentType] -- one of PACKINGS
        if head in ("cuts", "ranks") and mark == ":":
            numbers = _numbers(wish, tail)
            return Pin(ranks=numbers) if head == "ranks" else Pin(cuts=_single(wish, numbers))
        if head not in KINDS:
            raise PlanError(f"cannot be pinned to {wish!r}{nearest(head, (*KINDS, 'packing', 'cuts', 'ranks'))}; write {WISHES}")
        if not mark:
            return Pin(head)
        numbers = _numbers(wish, tail)
        if mark == "@" or head == "table_wise":
            return Pin(head, ranks=numbers)
        return Pin(head, cuts=_single(wish, numbers))

    def and_also(self, other: Pin) -> Pin:
        """Both wishes.

        Raises:
            PlanError: they contradict each other.
        """
        for part in fields(self):
            mine, theirs = getattr(self, part.name), getattr(other, part.name)
            if mine is not None and theirs is not None and mine != theirs:
                raise PlanError(f"is pinned to {part.name} {_shown(mine)} and to {part.name} {_shown(theirs)}; keep one")
        return replace(self, **{part.name: value for part in fields(other) if (value := getattr(other, part.name)) is not None})

    def check(self) -> None:
        """What no table and no cluster could mend.

        Raises:
            PlanError: its parts contradict each other.
        """
        if self.kind is not None and self.kind not in KINDS:
            raise PlanError(
                f"is pinned to {self.kind!r}, which is no kind{nearest(self.kind, KINDS)}; kinds are {', '.join(KINDS)}"
            )
        if self.packing is not None and self.packing not in PACKINGS:
            raise PlanError(f"is pinned to packing {self.packing!r}; it must be 'unique' or 'bag'")
        if self.ranks is not None and (not self.ranks or len(set(self.ranks)) != len(self.ranks) or min(self.ranks) < 0):
            raise PlanError(f"is pinned to ranks {_shown(self.ranks)}; name at least one rank, each once")
        parts = len(self.ranks) if self.ranks is not None else self.cuts
        if parts is None:
            parts = 2 if self.kind in CUT_KINDS else 1
        elif self.cuts is not None and self.cuts != parts:
            raise PlanError(f"is pinned to {self.cuts} cuts and to {parts} rank(s) ({_shown(self.ranks)}); name a rank a cut")
        if parts < 1 or (self.kind in CUT_KINDS and parts < 2):
            raise PlanError(f"is pinned to {self.kind or 'cuts'} in {parts} part(s); cut it into two or more, or pin it table_wise")
        if self.kind == "table_wise" and parts > 1:
            raise PlanError(f"is pinned table_wise, which is one part on one rank, and to {parts}; pin row_wise or column_wise")
        if self.kind == "replicated" and (self.cuts or self.ranks):
            raise PlanError("is pinned replicated, which is whole on every rank, and to cuts or ranks; leave those out")
        if self.kind == "replicated" and self.packing == "bag":
            raise PlanError("is pinned replicated, which sends no ids, and to packing 'bag'; leave one out")


@dataclass(frozen=True)
class Constraints:
    """All of a user's wishes.

    Attributes:
        pins: by table: a `Pin`, a text as on the command line, or a `TablePlan`, the very layout.
        forbid: kinds that are not to be used: "KIND" or "TABLE=KIND".

    Raises:
        PlanError: a wish cannot be read, or contradicts another.
    """

    pins: Mapping[str, Pin | str | TablePlan] = field(default_factory=dict)
    forbid: Iterable[str] = ()

    def __post_init__(self) -> None:
        pins: dict[str, Pin | TablePlan] = {}
        for table, wish in self.pins.items():
            pins[table] = _about(table, Pin.of, wish) if isinstance(wish, str) else wish
        object.__setattr__(self, "pins", pins)
        object.__setattr__(self, "forbid", tuple(dict.fromkeys(self.forbid)))
        for table, pin in pins.items():
            if isinstance(pin, Pin):
                _about(table, pin.check)
            self._check_allowed(table, pin.kind.partition(",")[0] if pin.kind else None)  # a layout may be "row_wise, blocks"
        for text in self.forbid:
            _forbidden_of(text)

    @staticmethod
    def parse(pins: Sequence[str] = (), forbid: Sequence[str] = ()) -> Constraints:
        """From the texts of `--pin` and `--forbid`; several for one table add up."""
        found: dict[str, Pin] = {}
        for text in pins:
            table, equals, wish = text.rpartition("=")
            if not equals or not table.strip():
                raise PlanError(f"--pin {text}: write it as TABLE=WISH, the wish being {WISHES}")
            table = table.strip()
            pin = _about(table, Pin.of, wish.strip())
            found[table] = _about(table, found.get(table, Pin()).and_also, pin)
        return Constraints(found, forbid)

    def _check_allowed(self, table: str, kind: str | None) -> None:
        for owner in (table, None):
            if (owner, kind) in self._forbidden:
                whose = "for all tables" if owner is None else "for it"
                raise PlanError(f"table {table!r} is pinned to {kind}, which is forbidden {whose}; take back one of the two")
        if all(self._is_forbidden(table, other) for other in KINDS):
            raise PlanError(f"table {table!r}: every kind is forbidden; allow at least one of {', '.join(KINDS)}")

    @cached_property
    def _forbidden(self) -> frozenset[Forbidden]:
        return frozenset(_forbidden_of(text) for text in self.forbid)

    def _is_forbidden(self, table: str, kind: str) -> bool:
        return (None, kind) in self._forbidden or (table, kind) in self._forbidden

    # What the planner asks.

    @property
    def tables(self) -> frozenset[str]:
        """Those that some wish names."""
        return frozenset(self.pins) | {table for table, _ in self._forbidden if table is not None}

    def allowed(self, table: str, kind: str, packing: str | None = None) -> bool:
        """Whether the table may have this kind and packing (None: some packing)."""
        pin = self._pin(table)
        if self._is_forbidden(table, kind) or pin.kind not in (None, kind):
            return False
        if kind == "replicated":  # in no parts, and without ids that travel
            return pin.cuts is None and pin.ranks is None and pin.packing != "bag"
        return pin.packing is None or packing in (None, pin.packing)

    def ranks(self, table: str) -> tuple[int, ...] | None:
        """Where its parts must lie, in their order; None where the planner chooses."""
        return self._pin(table).ranks

    def cuts(self, table: str) -> int | None:
        """How many parts it must be cut into."""
        return self._pin(table).cuts

    def fixed(self, table: str) -> TablePlan | None:
        """The very layout it must have."""
        found = self.pins.get(table)
        return found if isinstance(found, TablePlan) else None

    def _pin(self, table: str) -> Pin:
        found = self.pins.get(table)
        return found if isinstance(found, Pin) else Pin()

    def check(self, workload: Workload, topology: Topology) -> None:
        """Hold the wishes to the tables and ranks that there are.

        Raises:
            PlanError: a table or a rank is not there, or a table cannot be laid out as wished.
        """
        loads = {load.table.name: load for load in workload.tables}
        for table in sorted(self.tables):
            if table not in loads:
                known = f"the workload has {len(loads)} tables, such as {', '.join(map(repr, list(loads)[:3]))}"
                raise PlanError(f"table {table!r} is constrained, but not there{nearest(table, loads)} ({known})")
        for table, load in loads.items():
            self._check_allowed(table, None)
            fixed = self.fixed(table)
            if fixed is not None:
                _about(table, _check_fixed, fixed, load, topology.ranks)
            _about(table, _check_table, self._pin(table), load, topology.ranks)


def _about(table: str, ask: Callable[P, T], *values: P.args, **named: P.kwargs) -> T:
    """Name the table in what goes wrong."""
    try:
        return ask(*values, **named)
    except PlanError as error:
        raise PlanError(f"table {table!r} {error}") from error


def _check_table(pin: Pin, load: TableLoad, ranks: int) -> None:
    config = load.table
    beyond = [rank for rank in pin.ranks or () if rank >= ranks]
    if beyond:
        raise PlanError(f"is pinned to rank {beyond[0]}, but there are {ranks} ranks, 0 to {ranks - 1}; name one of them")
    parts = len(pin.ranks) if pin.ranks else pin.cuts or (2 if pin.kind in CUT_KINDS else 1)
    if parts > ranks:
        raise PlanError(f"is pinned to {pin.kind or 'cuts'} in {parts} parts, but there are {ranks} ranks; a rank holds one part")
    room = {"column_wise": config.embedding_dim, "row_wise": config.cut_rows, "table_row_wise": config.cut_rows}
    if parts > room.get(pin.kind or "", config.embedding_dim * config.cut_rows):
        size = f"{config.cut_rows} {'rows' if config.dynamic is None else 'buckets'} and {config.embedding_dim} columns"
        raise PlanError(f"is pinned to {pin.kind or 'cuts'} in {parts} parts, but has {size}; cut it into fewer")
    by_id = _why_by_id(load)
    if pin.packing == "bag" and by_id:
        raise PlanError(f"is pinned to packing 'bag', but is read by id: {by_id}; pin packing 'unique', or leave it out")
    if pin.kind == "replicated" and not config.can_be_copied:
        why = "max_norm and scale_grad_by_freq need the ids of all ranks" if config.dynamic is None else "its ids come and go"
        raise PlanError(f"is pinned replicated, but {why}; pin another kind")


def _why_by_id(load: TableLoad) -> str | None:
    """Why no feature of a table can be read by bag, if so."""
    reasons = [load.table.why_by_id(pooling) for pooling in load.table.poolings]
    found = [reason for reason in reasons if reason is not None]
    return " and ".join(dict.fromkeys(found)) if len(found) == len(reasons) else None


def _check_fixed(plan: TablePlan, load: TableLoad, ranks: int) -> None:
    given, wanted = (plan.num_embeddings, plan.embedding_dim), (load.table.cut_rows, load.table.embedding_dim)
    if given != wanted:
        raise PlanError(f"is pinned to a layout of {given[0]} x {given[1]}, but is {wanted[0]} x {wanted[1]}; make one of its size")
    if max(plan.layout.ranks) >= ranks:
        raise PlanError(f"is pinned to a layout with rank {max(plan.layout.ranks)}, but there are {ranks} ranks")


def _forbidden_of(text: str) -> Forbidden:
    table, equals, kind = text.rpartition("=")
    if kind.strip() not in KINDS:
        raise PlanError(f"--forbid {text}: {kind.strip()!r} is not one of {', '.join(KINDS)}{nearest(kind.strip(), KINDS)}")
    return (table.strip() if equals else None), kind.strip()


def _numbers(wish: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in text.split(","))
    except ValueError:
        raise PlanError(f"cannot be pinned to {wish!r}: {text!r} is not a number, nor several like 0,1; write {WISHES}") from None


def _single(wish: str, numbers: tuple[int, ...]) -> int:
    if len(numbers) != 1:
        raise PlanError(f"cannot be pinned to {wish!r}: a number of cuts is one number; ranks are named like row_wise@0,1")
    return numbers[0]


def _shown(value: object) -> str:
    return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)
