"""Configuration files: what is wrong is told with file, line, column and the nearest name."""

from __future__ import annotations

from pathlib import Path

import pytest

from shardembed.config import located
from shardembed.errors import ConfigError
from shardembed.recipes import config
from shardembed.recipes.common import RankingConfig
from shardembed.recipes.resolved import WIDTH, resolved_yaml

QUICKSTART = Path(__file__).parents[3] / "configs" / "train" / "quickstart.yaml"


def write(folder: Path, text: str) -> Path:
    path = folder / "job.yaml"
    path.write_text(text)
    return path


def complaint(folder: Path, text: str, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        config.load(write(folder, text), overrides)
    return str(caught.value)


def test_the_quickstart_file_says_the_defaults() -> None:
    assert config.load(QUICKSTART) == config.Config(name="quickstart", eval=RankingConfig(users=10_000))


@pytest.mark.parametrize(
    "options",
    [
        ["model.towers=[64, 32]", "plan.item={kind: grid, strips: 2}", "wire_dtype=bfloat16"],
        ["data.path=/data/" + "long/" * 30 + "with blank.tsv", "data.user='yes'", "data.item='a: b, {c} # d'"],
        ['data.path="two\\nlines\\t\\u00e9\\u20ac"', "data.user='12'", "data.item=''", "run_dir='- x'"],
        [f"plan.user={{kind: row_wise, bounds: {list(range(0, 4000, 40))}}}", "optimizer.tables={name: Adam, lr: 1e-9}"],
    ],
)
def test_what_is_shown_can_be_loaded_again_and_keeps_to_its_width(tmp_path: Path, options: list[str]) -> None:
    first = config.load(QUICKSTART, options)
    text = resolved_yaml(first)
    assert config.load(write(tmp_path, text)) == first
    # Nothing is broken inside a value, so a line that is too long holds no more than one.
    assert all(len(line) <= WIDTH or "long/" in line for line in text.split("\n"))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("train:\n  epoch: 3\n", ":2:3: unknown key 'epoch' in train; did you mean 'epochs'?"),
        ("trian:\n  epochs: 3\n", ":1:1: unknown key 'trian'; did you mean 'train'?"),
        ("optimizer:\n  tables: {name: Rowwise_Adagrad}\n", ":2:12: optimizer.tables.name: 'Rowwise_Adagrad' is not one of"),
        ("train:\n  epochs: yes\n", ":2:3: train.epochs should be a valid integer, not True"),
        ("model:\n  towers: [64, 0]\n", ":2:16: model.towers.1 should be greater than or equal to 1, not 0"),
        ("eval: 3\n", ":1:1: eval must be a mapping with keys every_steps, keep, patience, min_gain, k, users, repeats, not 3"),
        ("plan: {item: {kind: row_wise, rank: 1}}\n", ":1:31: plan.item.rank: row_wise takes no 'rank'"),
        ("plan: {user: table_wise}\n", ":1:8: plan.user: table_wise needs 'rank'"),
        ("plan: row_wise\n", ":1:1: plan: 'row_wise' is not a plan"),
        ("optimizer: {tables: {name: SGD, betas: [0.9, 0.99]}}\n", ":1:33: optimizer.tables.betas: SGD takes no 'betas'"),
        ("eval: {k: 1}\neval: {k: 2}\n", ":2:1: key 'eval' occurs twice; it already stood in line 1"),
        ("eval: &a {k: 1}\n", ":1:7: &a: anchors and aliases are not read"),
        ("eval: {k: *a}\n", ":1:11: *a: anchors and aliases are not read"),
        ("eval: {k: 1\n", ":2:1: not valid YAML"),
        ("eval: {1: 2}\n", ":1:8: a key must be a plain name, not '1'"),
        ("name: 2024-01-01\n", ":1:7: '2024-01-01' reads as"),
        ("eval: {k: !!int a}\n", ":1:11: "),
        ("- 1\n", ":1:1: the top level must be a mapping"),
        ("eval: " + "[" * 20 + "]" * 20, ":1:23: nested deeper than 16 levels"),
    ],
)
def test_mistakes_are_placed(tmp_path: Path, text: str, expected: str) -> None:
    assert f"{tmp_path / 'job.yaml'}{expected}" in complaint(tmp_path, text)


def test_all_mistakes_are_listed(tmp_path: Path) -> None:
    text = complaint(tmp_path, "train: {epochs: 0}\nmodel: {negative: 3}\n")
    assert len(text.splitlines()) == 2
    assert "did you mean 'negatives'?" in text


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        ("train.epoch=3", "--set train.epoch=3: unknown key 'epoch' in train; did you mean 'epochs'?"),
        ("train.epochs=none", "--set train.epochs=none: train.epochs should be a valid integer, not 'none'"),
        ("train.epochs", "--set train.epochs: write it as section.key=value"),
        ("=3", "--set =3: write it as section.key=value"),
        ("name.x=3", "--set name.x=3: name is the single value 'here', it has no keys"),
        ("train.seed=[1", "--set train.seed=[1: not valid YAML"),
        ("new.deep.key=1", "--set new.deep.key=1: unknown key 'new'"),
    ],
)
def test_a_wrong_override_is_named(tmp_path: Path, option: str, expected: str) -> None:
    assert complaint(tmp_path, "name: here\n", option).startswith(expected)


def test_overrides_are_applied_in_order_and_typed(tmp_path: Path) -> None:
    options = ["optimizer.tables.lr=1e-3", "train.epochs=2", "train.epochs=5", "data.path=x.csv", "plan.item=row_wise"]
    job = config.load(write(tmp_path, "train: {seed: 7}\n"), options)
    assert (job.optimizer.tables.lr, job.train.epochs, job.train.seed) == (1e-3, 5, 7)
    assert (job.data.path, job.plan.item.kind, job.name) == (("x.csv",), "row_wise", "job")


def test_unreadable_files(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the configuration: No such file"):
        config.load(tmp_path / "absent.yaml")
    path = tmp_path / "job.yaml"
    path.write_bytes(b"name: a\n# \xff\n")
    with pytest.raises(ConfigError, match=r"job.yaml:2: the file is not UTF-8"):
        config.load(path)
    path.write_bytes(b"#" * (located.MAX_BYTES + 1))
    with pytest.raises(ConfigError, match="is this the right file"):
        config.load(path)
