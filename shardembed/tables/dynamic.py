"""What a user says of a dynamic table, whose ids are any int64 and come and go: who enters, who leaves, what strangers read.

Its ids fall into buckets by a fixed mix of their bits, and layouts cut buckets as they cut the rows of other tables. Which ids have
a row depends on the data alone, since all of it is decided bucket by bucket.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from shardembed.config.scalars import real, within
from shardembed.errors import ConfigError

BUCKET_ROWS = 128  # ids a bucket at least: fewer would evict by chance, more would be sorted for every newcomer
NOMINAL = 1 << 20  # rows that are reckoned with where a table has no limit
LONGEST = 1 << 62  # steps and counts, whose sums stay within 64 bits

Unknown = Literal["start", "zeros"]
UNKNOWN: tuple[Unknown, ...] = ("start", "zeros")


if TYPE_CHECKING:

    class Rows:
        """The type of `TableConfig.num_embeddings`: given as an int or None, kept as an int."""

        def __get__(self, table: object, kind: type | None = None) -> int: ...
        def __set__(self, table: object, value: int | None) -> None: ...

else:
    Rows = int


def buckets_of_table(num_embeddings: int) -> int:
    """Into how many buckets the ids of a dynamic table fall."""
    return max(1, num_embeddings // BUCKET_ROWS)


@dataclass(frozen=True)
class LRU:
    """A full bucket gives up the id whose last gradient is the longest ago; of several, the one with the lowest mixed id. Ids of
    the step at hand never leave.
    """


@dataclass(frozen=True)
class LFU:
    """A full bucket gives up the id that has occurred least; of several, the one whose last gradient is the longest ago.

    Attributes:
        halve_every: steps, at whose multiples all counts are halved, so that fame fades; None: never.

    Raises:
        ConfigError: halve_every is no positive integer.
    """

    halve_every: int | None = None

    def __post_init__(self) -> None:
        if self.halve_every is not None:
            _keep(self, "halve_every", "a number of steps, 1 or more, or None to never halve counts")


@dataclass(frozen=True)
class TTL:
    """A row is dropped when no gradient has come for it in so many steps; nobody leaves for want of room.

    Attributes:
        steps: of the optimizer, that a row outlives its last gradient.

    Raises:
        ConfigError: steps is no positive integer.
    """

    steps: int

    def __post_init__(self) -> None:
        _keep(self, "steps", "a number of steps, 1 or more")


@dataclass(frozen=True)
class MinCount:
    """An id gets a row when it has occurred so often in batches that learn, all ranks together; gradients before that are dropped.

    Attributes:
        count: of occurrences.

    Raises:
        ConfigError: count is no positive integer.
    """

    count: int

    def __post_init__(self) -> None:
        _keep(self, "count", "a number of occurrences, 1 or more")


@dataclass(frozen=True)
class Probability:
    """An id gets a row with this probability in each step that brings it a gradient, drawn from seed, table, id and step.

    Attributes:
        p: above 0 and at most 1.

    Raises:
        ConfigError: p is no such number.
    """

    p: float

    def __post_init__(self) -> None:
        number = real(self.p)
        if number is None or not 0 < number <= 1:
            raise ConfigError(f"Probability: p must be a number above 0 and at most 1, not {self.p!r}")
        object.__setattr__(self, "p", float(number))


def _keep(setting: Any, name: str, wanted: str) -> None:
    """Put Python's int in place of what was given."""
    given = getattr(setting, name)
    number = within(given, 1, LONGEST)
    if number is None:
        raise ConfigError(f"{type(setting).__name__}: {name} must be {wanted}, not {given!r}")
    object.__setattr__(setting, name, number)


Eviction = LRU | LFU | TTL
Admission = MinCount | Probability


@dataclass(frozen=True)
class Dynamic:
    """A table whose ids are any int64: `TableConfig(..., dynamic=Dynamic(...))`.

    Attributes:
        eviction: who leaves: `LRU()` or `LFU()` where a bucket is full, `TTL(steps)` with age, None: nobody. Where a bucket is full
            and nobody leaves, newcomers are refused, and counted.
        admission: who gets a row: `MinCount(count)`, `Probability(p)`, None: every id that a gradient comes for.
        unknown: what evaluation (gradients disabled) reads for an id without a row: "start", the row that the id would begin with,
            or "zeros". Forwards that learn read the start always.

    Raises:
        ConfigError: a setting is none of these.
    """

    eviction: Eviction | None = None
    admission: Admission | None = None
    unknown: Unknown = "start"

    def __post_init__(self) -> None:
        _one_of("eviction", self.eviction, (LRU, LFU, TTL), "LRU(), LFU(), TTL(steps) or None")
        _one_of("admission", self.admission, (MinCount, Probability), "MinCount(count), Probability(p) or None")
        if self.unknown not in UNKNOWN:
            raise ConfigError(f"Dynamic: unknown must be 'start' or 'zeros', not {self.unknown!r}")

    @property
    def needs_capacity(self) -> bool:
        """Whether its eviction makes room, for which there has to be a limit."""
        return isinstance(self.eviction, LRU | LFU)

    @property
    def counts_ids(self) -> bool:
        """Whether it has to be known how often ids occur."""
        return isinstance(self.eviction, LFU) or isinstance(self.admission, MinCount)


def _one_of(name: str, given: Any, kinds: tuple[type, ...], wanted: str) -> None:
    # Exactly these: whoever makes room asks for the class, so one made from it would act as its parent.
    if given is not None and type(given) not in kinds:
        made = " (the class; call it)" if given in kinds else ""
        raise ConfigError(f"Dynamic: {name} must be {wanted}, not {given!r}{made}")
