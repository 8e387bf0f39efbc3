"""What a user says about a table: its size, its features, how their ids are pooled and how its rows start."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import partial
from typing import Any, Literal, cast

import torch

from shardembed.config.scalars import integer, is_bool, real, within
from shardembed.errors import ConfigError
from shardembed.tables.dynamic import NOMINAL, Dynamic, Rows, buckets_of_table
from shardembed.tables.pooling import POOLINGS, FrozenPooling, Pooling, kind_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclass(frozen=True)
class Normal:
    """Rows start from a normal distribution (nn.Embedding's default: mean 0, std 1).

    Attributes:
        mean: of the distribution.
        std: its standard deviation.
    """

    mean: float = 0.0
    std: float = 1.0

    def __post_init__(self) -> None:
        _as_numbers(self)


@dataclass(frozen=True)
class Uniform:
    """Rows start from a uniform distribution over [low, high).

    Attributes:
        low: the lowest value.
        high: the value that all stay below.
    """

    low: float
    high: float

    def __post_init__(self) -> None:
        _as_numbers(self)


@dataclass(frozen=True)
class Constant:
    """Every element starts alike.

    Attributes:
        value: of every element.
    """

    value: float = 0.0

    def __post_init__(self) -> None:
        _as_numbers(self)


def _as_numbers(start: Normal | Uniform | Constant) -> None:
    for one in fields(start):
        given = getattr(start, one.name)
        number = real(given)
        if number is None:
            raise ConfigError(f"{type(start).__name__}: {one.name} must be a number, not {given!r}")
        object.__setattr__(start, one.name, number)


@dataclass(frozen=True)
class Loaded:
    """Rows are loaded as soon as the table is there, so none are drawn before that.

    Attributes:
        start: gives what a reset draws.
    """

    start: Callable[[], Init] = field(repr=False)  # the repr of a function differs between ranks


RowFunction = Callable[[torch.Tensor], torch.Tensor]
Init = Normal | Uniform | Constant | RowFunction


Rounding = Literal["nearest", "stochastic"]


@dataclass(frozen=True)
class RowPolicy:
    """What happens to rows beside lookup and update; tables that share a slab share it.

    Attributes:
        max_norm: longer rows are scaled to it before a lookup; None: none are.
        norm_type: of the norm that `max_norm` limits.
        scale_grad_by_freq: gradients are divided by how often their ids occur in a call.
        frozen: made so: rows are never updated, and no gradient travels.
        rounding: of updated values to a narrow dtype, "nearest" or "stochastic".
    """

    max_norm: float | None = None
    norm_type: float = 2.0
    scale_grad_by_freq: bool = False
    frozen: bool = False
    rounding: Rounding = "nearest"


@dataclass(frozen=True)
class TableConfig:
    """One embedding table.

    Args:
        name: unique in its collection; also its only feature's name when `feature_names` is not given.
        num_embeddings: rows; ids run from 0 to num_embeddings - 1. Of a dynamic table: how many ids have a row at once, all ranks
            together; None: no limit, the table grows (`NOMINAL` stands here then, for the default start and the planner).
        embedding_dim: columns.
        feature_names: the features whose ids are looked up here. Features of one table share its rows. A feature may be named by
            several tables: its output from each is called "feature@table" then.
        pooling: "sum", "mean", "sqrtn" (the sum over the root of the number of ids) or "max" (one vector a bag), None (one vector
            an id), or a dict by feature name.
        dtype: of the rows: float32, bfloat16, float16 or float64.
        init: `Normal`, `Uniform`, `Constant`, or a function of row numbers (int64 `[n]` -> `[n, embedding_dim]`). By default
            TorchRec's uniform over +-1/sqrt(num_embeddings). Drawn so that every plan and world size starts with the same rows.
        padding_idx: an id that stands for nothing: its row starts at zero and gets no gradient, and bags leave it out. Negative
            numbers count from the last row; stored as a row number. Of a dynamic table: any id, which is no other then.
        max_norm: rows of a batch whose norm exceeds it are scaled to it, in place, before they are looked up: each distinct row
            of the batch of all ranks once, as `nn.Embedding` does.
        norm_type: of that norm: 2 is the Euclidean.
        scale_grad_by_freq: divide a row's gradient by how often its id occurs in the call, on all ranks and in all features of
            the table together.
        frozen: rows are looked up and never updated.
        sparse: with `optimizer=None`, gradients are sparse COO tensors instead of dense ones; else without effect.
        rounding: of updated float32 values to a bfloat16 or float16 table: "stochastic" (unbiased; seeded by table, row and
            step, so the same for every plan) or "nearest". The default is "stochastic" for these dtypes.
        dynamic: ids are any int64, and come and go; None: they are row numbers.
        grows: without a limit; what num_embeddings=None turns on.

    Raises:
        ConfigError: a value is out of its range, `pooling` names a feature the table does not have, or ids would leave a table
            without a limit to make room.
    """

    name: str
    num_embeddings: Rows
    embedding_dim: int
    feature_names: tuple[str, ...] | list[str] | None = None
    pooling: Pooling | Mapping[str, Pooling] = "sum"
    dtype: torch.dtype = torch.float32
    init: Init | Loaded | None = None
    padding_idx: int | None = None
    max_norm: float | None = None
    norm_type: float = 2.0
    scale_grad_by_freq: bool = False
    frozen: bool = False
    sparse: bool = False
    rounding: Rounding | None = None
    dynamic: Dynamic | None = None
    grows: bool = False  # a field, so that `dataclasses.replace` keeps it

    def __post_init__(self) -> None:
        if not self.name or not isinstance(self.name, str):
            raise ConfigError(f"a table's name must be a non-empty string, not {self.name!r}")
        self._check_dynamic()
        for name in ("num_embeddings", "embedding_dim"):
            value = integer(getattr(self, name))
            if value is None or value < 1:
                raise ConfigError(f"table {self.name!r}: {name} must be a positive integer, not {getattr(self, name)!r}")
            object.__setattr__(self, name, value)
        if self.dtype not in DTYPES:
            raise ConfigError(f"table {self.name!r}: dtype {self.dtype} is not one of {', '.join(map(str, DTYPES))}")
        if isinstance(self.feature_names, str):
            raise ConfigError(f"table {self.name!r}: feature_names must be a list, not the string {self.feature_names!r}")
        names = tuple(self.feature_names) if self.feature_names is not None else (self.name,)
        if not names or len(set(names)) != len(names):
            raise ConfigError(f"table {self.name!r}: feature_names must name at least one feature, each once: {names}")
        object.__setattr__(self, "feature_names", names)
        self._check_pooling(names)
        self._check_policy()

    def _check_dynamic(self) -> None:
        if self.dynamic is not None and not isinstance(self.dynamic, Dynamic):
            raise ConfigError(f"table {self.name!r}: dynamic must be se.Dynamic(...) or None, not {self.dynamic!r}")
        if self.dynamic is None:
            if self.num_embeddings is None or self.grows:
                raise ConfigError(f"table {self.name!r}: without a limit (num_embeddings=None) it needs dynamic=se.Dynamic(...)")
            return
        if self.num_embeddings is None:
            object.__setattr__(self, "num_embeddings", NOMINAL)
            object.__setattr__(self, "grows", True)
        if self.grows and self.dynamic.needs_capacity:
            raise ConfigError(
                f"table {self.name!r}: {self.dynamic.eviction!r} makes room, and a table without a limit needs none; say with "
                "num_embeddings how many ids may have a row, or let ids leave with age, eviction=se.TTL(steps)"
            )

    def _check_padding(self) -> None:
        if self.padding_idx is None:
            return
        rows = self.num_embeddings
        low, high = (-rows, rows - 1) if self.dynamic is None else (-(1 << 63), (1 << 63) - 1)
        padding = within(self.padding_idx, low, high)
        if padding is None:
            what = "a row" if self.dynamic is None else "an id"
            raise ConfigError(f"table {self.name!r}: padding_idx must be {what} from {low} to {high}, not {self.padding_idx!r}")
        object.__setattr__(self, "padding_idx", padding % rows if self.dynamic is None else padding)

    def _check_policy(self) -> None:
        self._check_padding()
        if self.max_norm is not None:
            longest = _norm(self.max_norm)
            if longest is None or not longest >= 0:
                raise ConfigError(f"table {self.name!r}: max_norm must be a number that is not negative, not {self.max_norm!r}")
            object.__setattr__(self, "max_norm", longest)
        kind = _norm(self.norm_type)
        if kind is None or not kind > 0:
            raise ConfigError(f"table {self.name!r}: norm_type must be above 0 (2 is the Euclidean norm), not {self.norm_type!r}")
        object.__setattr__(self, "norm_type", kind)
        if self.rounding not in (None, "nearest", "stochastic"):
            raise ConfigError(f"table {self.name!r}: rounding must be 'nearest' or 'stochastic', not {self.rounding!r}")
        for pooling in self.poolings if self.scale_grad_by_freq else ():
            if not POOLINGS[pooling].takes_frequencies:
                raise ConfigError(
                    f"table {self.name!r}: scale_grad_by_freq cannot be combined with pooling {pooling!r}, as in nn.EmbeddingBag"
                )

    @property
    def cut_rows(self) -> int:
        """What layouts cut: the rows, or the buckets of a dynamic table."""
        return self.num_embeddings if self.dynamic is None else buckets_of_table(self.num_embeddings)

    @property
    def bucket_rows(self) -> int:
        """Ids that one of `cut_rows` has room for; 1 where they are rows. Of a table that grows: those that it is reckoned with."""
        return -(-self.num_embeddings // self.cut_rows)

    @property
    def capacity(self) -> int | None:
        """The most ids that can have a row at once, all ranks together: whole buckets. None where there is no limit."""
        return None if self.grows else self.cut_rows * self.bucket_rows

    @property
    def can_be_copied(self) -> bool:
        """Whether each rank may hold and look up a copy: not where a lookup needs all ranks' ids, nor where ids come and go."""
        return self.max_norm is None and not self.policy.scale_grad_by_freq and self.dynamic is None

    @property
    def policy(self) -> RowPolicy:
        """What its slab has to know beside its size and optimizer; settings without effect are left out."""
        narrow = self.dtype in (torch.bfloat16, torch.float16) and not self.frozen
        return RowPolicy(
            None if self.max_norm is None else float(self.max_norm),
            2.0 if self.max_norm is None else float(self.norm_type),
            self.scale_grad_by_freq and not self.frozen,
            self.frozen,
            (self.rounding or "stochastic") if narrow else "nearest",
        )

    def _check_pooling(self, names: tuple[str, ...]) -> None:
        if isinstance(self.pooling, Mapping):
            if set(self.pooling) != set(names):
                raise ConfigError(
                    f"table {self.name!r}: pooling is given for {sorted(self.pooling)}, its features are {sorted(names)}; "
                    "name each feature once"
                )
            object.__setattr__(self, "pooling", FrozenPooling(self.pooling))
        given = self.pooling.values() if isinstance(self.pooling, Mapping) else [self.pooling]
        for pooling in given:
            try:
                kind_of(pooling)
            except ConfigError as error:
                raise ConfigError(f"table {self.name!r}: {error}") from None

    def pooling_of(self, feature: str) -> Pooling:
        return self.pooling[feature] if isinstance(self.pooling, Mapping) else self.pooling

    @property
    def poolings(self) -> tuple[Pooling, ...]:
        """Of each of its features."""
        return tuple(self.pooling_of(name) for name in self.feature_names or ())

    def why_by_id(self, pooling: Pooling, weighted: bool = False) -> str | None:
        """Why ids that are pooled so are read one by one even where the table is packed as bags; None where owners may sum them.

        Routing, plans and the planner all go by this.
        """
        if self.max_norm is not None:
            return "max_norm looks at each row of a batch once"
        if self.scale_grad_by_freq and not self.frozen:
            return "scale_grad_by_freq counts each id of a batch"
        if weighted:
            return "weights belong to the ids of one rank"
        return None if POOLINGS[pooling].partial_sums else f"pooling {pooling} needs every vector, not sums"

    @property
    def sums(self) -> bool:
        """Whether owners may sum the bags of some feature, as packing "bag" would have them do."""
        return any(self.why_by_id(pooling) is None for pooling in self.poolings)

    @property
    def start(self) -> Init:
        """The distribution the rows start from."""
        if isinstance(self.init, Loaded):
            return self.init.start()
        if self.init is not None:
            return self.init
        # TorchRec's default (torchrec/modules/embedding_configs.py, get_weight_init_min and _max).
        bound = self.num_embeddings**-0.5
        return Uniform(-bound, bound)

    @staticmethod
    def of(config: Any) -> TableConfig:
        """`config` itself, or the same table from a TorchRec `EmbeddingBagConfig` or `EmbeddingConfig`."""
        if isinstance(config, TableConfig):
            return config
        if not all(hasattr(config, name) for name in ("name", "num_embeddings", "embedding_dim", "feature_names")):
            raise ConfigError(f"a table must be a TableConfig or a TorchRec config, not {type(config).__name__}: {config!r}")
        pooled = hasattr(config, "pooling")  # an EmbeddingConfig has none: one vector an id
        data_type = getattr(config, "data_type", None)
        init = getattr(config, "init_fn", None)
        start = None
        if isinstance(init, partial) and init.func is torch.nn.init.uniform_ and set(init.keywords) == {"a", "b"} and not init.args:
            start = Uniform(init.keywords["a"], init.keywords["b"])  # what TorchRec fills in when no init_fn is given
        elif init is not None:
            raise ConfigError(
                f"table {config.name!r}: TorchRec's init_fn fills a whole tensor, which no rank holds; pass "
                "TableConfig(init=...) with Normal, Uniform, Constant or a function of row numbers"
            )
        return TableConfig(
            config.name,
            config.num_embeddings,
            config.embedding_dim,
            feature_names=list(config.feature_names) or None,
            pooling=cast(Pooling, config.pooling.value.lower()) if pooled else None,
            dtype=_TORCHREC_DTYPES.get(getattr(data_type, "value", "FP32"), torch.float32),
            init=start,
        )


def _norm(value: Any) -> int | float | None:
    """A norm; as in torch True is 1, and a tensor of one number is that number."""
    value = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
    return float(value) if is_bool(value) else real(value)


_TORCHREC_DTYPES = {"FP32": torch.float32, "FP16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class Feature:
    """A named stream of ids that is looked up.

    Attributes:
        name: of its output, "feature@table" where several tables look it up.
        table: which table that is, by its index in the collection.
        pooling: of its vectors, None for one vector an id.
        key: what a batch calls it; `name` where it is made without.
    """

    name: str
    table: int
    pooling: Pooling
    key: str = ""

    def __post_init__(self) -> None:
        if not self.key:
            object.__setattr__(self, "key", self.name)


def features_of(tables: tuple[TableConfig, ...]) -> tuple[Feature, ...]:
    """All features in table order. One that several tables look up is a feature a table, named "feature@table" as in TorchRec.

    Raises:
        ConfigError: two tables share a name, or two features do.
    """
    names = [table.name for table in tables]
    for name in names:
        if names.count(name) > 1:
            raise ConfigError(f"two tables are named {name!r}; names must be unique in a collection")
    owners = Counter(key for table in tables for key in table.feature_names or ())
    features: dict[str, Feature] = {}
    for index, table in enumerate(tables):
        for key in table.feature_names or ():
            name = key if owners[key] == 1 else f"{key}@{table.name}"
            if name in features:
                raise ConfigError(f"table {table.name!r}: two features are named {name!r}; rename one")
            features[name] = Feature(name, index, table.pooling_of(key), key)
    if not features:
        raise ConfigError("a collection needs at least one table")
    return tuple(features.values())
