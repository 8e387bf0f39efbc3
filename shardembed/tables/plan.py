"""The plan of a collection: which layout and packing each table has. Plain data, the same on every rank, saved as JSON."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from shardembed.config import plain_json
from shardembed.config.paths import local
from shardembed.errors import PlanError
from shardembed.tables.layout import MAX_RANKS, Layout, Shard, whole
from shardembed.tables.placement import PACKINGS, Cluster, Packing, Placement, replicated, row_wise
from shardembed.tables.table_config import TableConfig

FORMAT = 1
MAX_ELEMENTS = 1 << 50  # of a plan's file: their bytes are added up in 64 bits
FILE_BYTES, VALUES = 256 << 20, 16 << 20  # of a plan's file: 100,000 tables in a dozen shards each
REPLICATE_TABLE_BYTES = 256 * 1024  # a copied table costs an all-reduce of its size a step: small ones only
REPLICATE_TOTAL_BYTES = 4 * 1024 * 1024


@dataclass(frozen=True)
class TablePlan:
    """How one table is cut and read.

    Attributes:
        name: of the table.
        layout: its shards.
        packing: how its ids travel, "unique" or "bag".
    """

    name: str
    layout: Layout
    packing: Packing = "unique"

    @property
    def num_embeddings(self) -> int:
        """What the layout cuts: rows, or buckets of a dynamic table (`TableConfig.cut_rows`)."""
        return self.layout.num_embeddings

    @property
    def embedding_dim(self) -> int:
        return self.layout.embedding_dim

    @property
    def kind(self) -> str:
        """What people call this layout; for display only. "row_wise" deals rows out, "row_wise, blocks" cuts contiguous ones."""
        strips, shards = self.layout.strips, self.layout.shards
        if self.layout.copied:
            return "replicated"
        if len(shards) == 1:
            return "table_wise"
        if len(strips) == 1:
            return "row_wise" if strips[0].stride > 1 else "row_wise, blocks"
        return "column_wise" if len(strips) == len(shards) else "grid"


@dataclass(frozen=True)
class Plan:
    """The plan of a collection.

    Attributes:
        tables: the plan of each, in the collection's order.
        world_size: of the job that it is for.

    Raises:
        PlanError: a shard lies on a rank that does not exist, or is copied to some ranks only.
    """

    tables: tuple[TablePlan, ...]
    world_size: int

    def __post_init__(self) -> None:
        if not 1 <= self.world_size <= MAX_RANKS:
            raise PlanError(f"a plan is for 1 to {MAX_RANKS:,} ranks, not for {self.world_size:,}")
        for table in self.tables:
            if table.packing not in PACKINGS:
                raise PlanError(f"table {table.name!r}: packing must be 'unique' or 'bag', not {table.packing!r:.80}")
            if max(table.layout.ranks) >= self.world_size:
                raise PlanError(
                    f"table {table.name!r} has a shard on rank {max(table.layout.ranks)}, but the job has {self.world_size} "
                    "rank(s): make a plan for this world size"
                )
            for shard in table.layout.shards:
                if len(shard.ranks) > 1 and (len(shard.ranks) != self.world_size or len(table.layout.shards) > 1):
                    raise PlanError(
                        f"table {table.name!r}: a shard on ranks {shard.ranks!s:.80} is neither on one rank nor a whole table on "
                        f"all {self.world_size}; use replicated() or a single owner"
                    )

    def to_json(self) -> dict[str, Any]:
        tables = {
            table.name: {
                "num_embeddings": table.num_embeddings,
                "embedding_dim": table.embedding_dim,
                "packing": table.packing,
                "shards": [shard.to_json() for shard in table.layout.shards],
            }
            for table in self.tables
        }
        return {"format": FORMAT, "world_size": self.world_size, "tables": tables}

    @staticmethod
    def from_json(data: dict[str, Any]) -> Plan:
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise PlanError(f"not a plan of format {FORMAT}: {data!s:.80}")
        try:
            tables = tuple(
                TablePlan(
                    name,
                    Layout(
                        whole(table["num_embeddings"]),
                        whole(table["embedding_dim"]),
                        tuple(Shard.from_json(shard) for shard in table["shards"]),
                    ),
                    table["packing"],
                )
                for name, table in data["tables"].items()
            )
            elements = sum(table.num_embeddings * table.embedding_dim for table in tables)
            if elements > MAX_ELEMENTS:
                raise PlanError(f"its tables have {elements:,} elements together, and at most {MAX_ELEMENTS:,} are believed")
            return Plan(tables, whole(data["world_size"]))
        except PlanError:
            raise
        except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
            raise PlanError(f"the plan is incomplete or malformed: {type(error).__name__} {error!s:.200}") from error

    def save(self, path: str | Path) -> None:
        """Write the plan as JSON, a table a line."""
        local(path, PlanError).write_text(self.to_text())

    def to_text(self) -> str:
        """What `save` writes."""
        data = self.to_json()
        tables = ",\n".join(f"  {json.dumps(name)}: {json.dumps(table)}" for name, table in data.pop("tables").items())
        head = json.dumps(data)[:-1]
        return f'{head}, "tables": {{\n{tables}\n}}}}\n'

    @staticmethod
    def load(path: str | Path) -> Plan:
        """Read a plan that `save` wrote.

        Raises:
            PlanError: the file is not a valid plan; the message names the file.
        """
        file = local(path, PlanError)
        try:
            return Plan.from_json(plain_json.read(file, named=True, most=FILE_BYTES, values=VALUES))
        except PlanError as error:
            raise PlanError(f"{path}: {error}") from error
        except ValueError as error:
            raise PlanError(f"{path}: not valid JSON: {error}") from error

    @cached_property
    def hash(self) -> str:
        """16 hexadecimal digits that two equal plans share."""
        lines = [f"format {FORMAT}, world size {self.world_size}"]
        for table in self.tables:
            lines.append(f"{table.name!r} {table.num_embeddings} {table.embedding_dim} {table.packing}")
            lines += [f"{shard.rows} {shard.columns} {shard.ranks}" for shard in table.layout.shards]
        return hashlib.blake2b("\n".join(lines).encode(), digest_size=8).hexdigest()


PlanLike = str | Plan | Placement | Mapping[str, Placement]


def resolve(tables: Sequence[TableConfig], wanted: PlanLike, cluster: Cluster) -> Plan:
    """The plan for `tables` from what a user passed as `plan=`.

    "auto" gives the default plan; a `Placement` goes to every table; a mapping by table name goes to those it names, the rest
    get the default.

    Raises:
        PlanError: an unknown table, a layout that does not fit its table, or a plan made for other tables or ranks.
    """
    if isinstance(wanted, Plan):
        return _checked(tables, wanted, cluster)
    if not isinstance(wanted, Placement | Mapping) and wanted != "auto":
        raise PlanError(f"plan={wanted!r}: pass 'auto', a Plan (Plan.load reads a file), or placements by table name")
    chosen: dict[str, Placement] = {}
    if isinstance(wanted, Placement):
        chosen = {table.name: wanted for table in tables}
    elif isinstance(wanted, Mapping):
        chosen = dict(wanted)
        unknown = sorted(set(chosen) - {table.name for table in tables})
        if unknown:
            raise PlanError(f"the plan names {unknown}, which are not tables here; the tables are {[t.name for t in tables]}")
    # Only of what is left to us: tables that the user has placed take nothing of the room for copies.
    default = default_placements([table for table in tables if table.name not in chosen])
    plans = []
    for table in tables:
        placement = chosen.get(table.name) or default[table.name]
        if not isinstance(placement, Placement):
            raise PlanError(f"table {table.name!r}: expected row_wise() or one of its siblings, not {placement!r}")
        try:
            layout = placement.layout(table.cut_rows, table.embedding_dim, cluster)
        except PlanError as error:
            cut = f" is dynamic and cut by its {table.cut_rows:,} bucket(s) of ids" if table.dynamic else ""
            raise PlanError(f"table {table.name!r}{cut}: {error}") from error
        plans.append(TablePlan(table.name, layout, packing_of(placement, table, layout)))
    return Plan(tuple(plans), cluster.world_size)


def packing_of(placement: Placement, table: TableConfig, layout: Layout) -> Packing:
    """The placement's own; else whole sums where one owner has all rows of a strip (a copied table sends nothing)."""
    if placement.packing is not None:
        return placement.packing
    whole = not layout.copied and all(len(strip.blocks) == 1 for strip in layout.strips)
    narrow = table.dtype in (torch.bfloat16, torch.float16)  # whose sums the wire would round
    return "bag" if table.sums and whole and not narrow else "unique"


def default_placements(tables: Sequence[TableConfig]) -> dict[str, Placement]:
    """Small tables copied, smallest first while their sum stays small; all others dealt out by rows, which balances bytes and ids.

    Tables whose policy needs the ids of all ranks (max_norm, scale_grad_by_freq) are never copied, nor are dynamic ones.
    """
    left = REPLICATE_TOTAL_BYTES
    placements: dict[str, Placement] = {}
    for table in sorted(tables, key=_bytes):
        if _bytes(table) <= min(left, REPLICATE_TABLE_BYTES) and table.can_be_copied:
            placements[table.name] = replicated()
            left -= _bytes(table)
        else:
            placements[table.name] = row_wise()
    return placements


def _bytes(table: TableConfig) -> int:
    return table.num_embeddings * table.embedding_dim * table.dtype.itemsize


def _checked(tables: Sequence[TableConfig], plan: Plan, cluster: Cluster) -> Plan:
    if plan.world_size != cluster.world_size:
        raise PlanError(f"the plan is for {plan.world_size} rank(s), the job has {cluster.world_size}; make a plan for this job")
    wanted = {table.name: (table.cut_rows, table.embedding_dim) for table in tables}
    dynamic = {table.name for table in tables if table.dynamic is not None}
    given = {table.name: (table.num_embeddings, table.embedding_dim) for table in plan.tables}
    for name in [*wanted, *given]:
        if wanted.get(name) != given.get(name):
            raise PlanError(
                f"table {name!r} is {wanted.get(name, 'not there')} in the model and {given.get(name, 'not there')} in the plan"
                + (" (buckets of its ids, columns)" if name in dynamic else "")
            )
    by_name = {table.name: table for table in plan.tables}
    return Plan(tuple(by_name[table.name] for table in tables), plan.world_size)
