"""Tables and optimizers refuse settings that mean nothing, and say which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from shardembed.errors import ConfigError, PlanError
from shardembed.inputs.hashing import Hashing
from shardembed.optim import FTRL, SGD, Adagrad, Adam, AdamW, RowwiseAdagrad
from shardembed.tables import placement
from shardembed.tables.settings import Settings
from shardembed.tables.table_config import Feature, Normal, TableConfig, Uniform, features_of


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"name": ""}, "non-empty string"),
        ({"name": 3}, "non-empty string"),
        ({"num_embeddings": 0}, "num_embeddings must be a positive integer, not 0"),
        ({"num_embeddings": 1.5}, "num_embeddings"),
        ({"num_embeddings": True}, "num_embeddings"),
        ({"embedding_dim": -1}, "embedding_dim must be a positive integer, not -1"),
        ({"dtype": torch.int8}, "torch.int8 is not one of torch.float32"),
        ({"feature_names": "item"}, "must be a list, not the string 'item'"),
        ({"feature_names": []}, "at least one feature"),
        ({"feature_names": ["a", "a"]}, "each once"),
        ({"pooling": "average"}, "'average' is not one of 'sum', 'mean', "),
        ({"feature_names": ["a", "b"], "pooling": {"a": "sum"}}, "name each feature once"),
        ({"feature_names": ["a"], "pooling": {"a": "sum", "c": None}}, "name each feature once"),
        ({"feature_names": ["a"], "pooling": {"a": "median"}}, "'median' is not one of"),
    ],
)
def test_a_table_refuses(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        TableConfig(**{"name": "item", "num_embeddings": 10, "embedding_dim": 4, **settings})
    assert "name" in settings or "table 'item'" in str(caught.value)


def test_numbers_of_numpy_become_pythons() -> None:
    """Texts of settings are compared between ranks, and written as JSON."""
    eight, half = np.int32(8), np.float32(0.5)
    made: list[tuple[Any, Any]] = [
        (
            TableConfig("t", eight, eight, padding_idx=np.int8(-1), max_norm=half),
            TableConfig("t", 8, 8, padding_idx=7, max_norm=0.5),
        ),
        (Normal(half, eight), Normal(0.5, 8)),
        (Uniform(np.int64(0), half), Uniform(0, 0.5)),
        (Adam(half, (half, np.float64(0.25)), half), Adam(0.5, (0.5, 0.25), 0.5)),
        (Settings(seed=eight), Settings(seed=8)),
        (Hashing(eight, np.uint64(3), np.int8(2)), Hashing(8, 3, 2)),
        (placement.table_wise(np.int64(1)), placement.table_wise(1)),
        (placement.row_wise(np.arange(2), bounds=np.array([3])), placement.row_wise([0, 1], bounds=[3])),
        (placement.grid(np.int64(2), torch.arange(4)), placement.grid(2, range(4))),
        (placement.table_row_wise(np.int64(0)), placement.table_row_wise(0)),
    ]
    for given, expected in made:
        assert given == expected
        assert repr(given) == repr(expected)


def test_what_is_no_number_is_refused() -> None:
    wrong: list[tuple[Callable[[], Any], type[Exception], str]] = [
        (lambda: Normal("0"), ConfigError, "Normal: mean must be a number, not '0'"),  # type: ignore[arg-type]
        (lambda: SGD(lr=True), ConfigError, "SGD: lr must be finite and not negative, not True"),
        (lambda: Settings(seed=1.5), ConfigError, "seed must be an integer, not 1.5"),  # type: ignore[arg-type]
        (lambda: placement.row_wise([0, 1.5]), PlanError, r"ranks must be integers, not \(0, 1.5\)"),  # type: ignore[list-item]
        (lambda: placement.table_wise("0"), PlanError, r"ranks must be integers, not \('0',\)"),  # type: ignore[arg-type]
        (lambda: placement.grid(2.0), PlanError, "strips must be an integer, not 2.0"),  # type: ignore[arg-type]
    ]
    for make, error, says in wrong:
        with pytest.raises(error, match=says):
            make()


def test_a_tables_defaults() -> None:
    table = TableConfig("item", 100, 4)
    assert table.feature_names == ("item",)
    assert table.pooling_of("item") == "sum"
    assert table.start == Uniform(-0.1, 0.1)
    assert TableConfig("item", 100, 4, init=Normal()).start == Normal(0.0, 1.0)


def test_features_keep_their_tables_order_and_pooling() -> None:
    tables = (TableConfig("a", 1, 1, ["x", "y"], {"y": None, "x": "mean"}), TableConfig("b", 1, 1, pooling="max"))
    assert [(f.name, f.table, f.pooling) for f in features_of(tables)] == [("x", 0, "mean"), ("y", 0, None), ("b", 1, "max")]
    assert hash(tables) == hash((TableConfig("a", 1, 1, ("x", "y"), {"x": "mean", "y": None}), tables[1]))


@pytest.mark.parametrize(
    ("tables", "says"),
    [
        ([], "at least one table"),
        ([TableConfig("a", 1, 1), TableConfig("a", 2, 1, ["b"])], "two tables are named 'a'"),
        ([TableConfig("a", 1, 1), TableConfig("b", 2, 1, ["a", "a@b"])], "table 'b': two features are named 'a@b'"),
    ],
)
def test_names_are_unique(tables: list[TableConfig], says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        features_of(tuple(tables))


def test_a_feature_of_two_tables_is_named_after_both() -> None:
    tables = (TableConfig("t", 1, 1, ["a", "b"]), TableConfig("u", 2, 1, ["a"], None))
    assert features_of(tables) == (Feature("a@t", 0, "sum", "a"), Feature("b", 0, "sum"), Feature("a@u", 1, None, "a"))


def test_torchrecs_configs_are_tables() -> None:
    torchrec = pytest.importorskip("torchrec")
    bag = torchrec.EmbeddingBagConfig(
        name="t", num_embeddings=9, embedding_dim=4, feature_names=["a"], pooling=torchrec.PoolingType.MEAN
    )
    start = TableConfig("t", 9, 4).start  # both libraries' default is the same
    assert TableConfig.of(bag) == TableConfig("t", 9, 4, ["a"], "mean", init=start)
    single = torchrec.EmbeddingConfig(name="t", num_embeddings=9, embedding_dim=4, feature_names=["a"])
    assert TableConfig.of(single) == TableConfig("t", 9, 4, ["a"], None, init=start)
    filled = torchrec.EmbeddingConfig(name="t", num_embeddings=9, embedding_dim=4, init_fn=lambda tensor: tensor)
    with pytest.raises(ConfigError, match="table 't': TorchRec's init_fn"):
        TableConfig.of(filled)
    with pytest.raises(ConfigError, match="not dict"):
        TableConfig.of({"name": "t"})


@pytest.mark.parametrize("kind", [SGD, Adagrad, RowwiseAdagrad, Adam, AdamW, FTRL])
@pytest.mark.parametrize("lr", [-1.0, float("nan"), float("inf"), True, "0.1", None])
def test_an_optimizer_refuses_its_rate(kind: type, lr: Any) -> None:
    with pytest.raises(ConfigError, match=f"{kind.__name__}: lr must be finite and not negative"):
        kind(lr=lr)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Adagrad(eps=-1e-9), "Adagrad: eps"),
        (lambda: Adam(betas=(0.9, 1.0)), r"Adam: betas must be a tuple of two numbers in \[0, 1\)"),
        (lambda: Adam(betas=(-0.1, 0.9)), "Adam: betas"),
        (lambda: Adam(betas=(0.9,)), "Adam: betas"),
        (lambda: Adam(betas=0.9), "Adam: betas"),  # type: ignore[arg-type]
        (lambda: AdamW(weight_decay=-1.0), "AdamW: weight_decay"),
        (lambda: FTRL(lr=0.0), "FTRL: lr divides"),
        (lambda: FTRL(l1=-1.0), "FTRL: l1"),
    ],
)
def test_an_optimizer_refuses(make: Any, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        make()


def test_optimizers_are_values_that_describe_themselves() -> None:
    assert Adam() == Adam(1e-3)
    assert hash(Adam()) == hash(Adam(1e-3))
    assert Adam() != AdamW()
    assert SGD().describe() == "SGD(lr=0.001)"
    assert "betas=(0.9, 0.999)" in AdamW().describe()
    assert "weight_decay=0.01" in AdamW().describe()
