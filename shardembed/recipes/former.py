"""The run that a job begins from (`--from RUN`): which of its checkpoints, and how the job's data and tables come to fit it.

find       the checkpoint, and whether ids mean the same rows there and here           before the data are read
Task.following   tables of numbered rows at least as large, vocabularies that go on    when they have been
carry      what of the checkpoint goes into the model, and what begins fresh            (`carrying`)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from shardembed.checkpoint import folders
from shardembed.embeddings.of_run import checkpoint_of
from shardembed.embeddings.stored import StoredTables
from shardembed.errors import CheckpointError, ConfigError, DataError
from shardembed.inputs.vocab import Vocabulary
from shardembed.recipes import config as settings
from shardembed.recipes.common import JobConfig
from shardembed.recipes.ctr_config import CtrConfig
from shardembed.recipes.data.clicks.encode import vocabulary_file
from shardembed.recipes.data.naming import had_texts, id_columns
from shardembed.recipes.data.wanted import MISSING
from shardembed.recipes.features_config import FeatureConfig
from shardembed.recipes.report import MODEL_NAMES
from shardembed.recipes.run_folder import CONFIG, NAMES, VOCABULARIES, is_finished, run_of
from shardembed.recipes.runs import last_finished
from shardembed.recipes.sequence_config import SEQUENCE_TABLES, SequenceConfig
from shardembed.tables.table_config import TableConfig

LAST = "last"  # in the place of a folder
SIDES, NUMBERED = ("user", "item"), "numbers of rows"
TABLES, WEIGHT = "tables.", ".weight"  # around the name of a table in the keys of a checkpoint


@dataclass(frozen=True)
class Former:
    """A run that another begins from.

    Attributes:
        run: its folder.
        checkpoint: the folder of the one that is taken.
        step: of that.
        checksum: of that one's manifest, by which it is known.
        config: its settings.
        rows: of each of its tables whose rows are numbered.
    """

    run: Path
    checkpoint: Path
    step: int
    checksum: str
    config: JobConfig
    rows: dict[str, int]

    @property
    def vocabularies(self) -> Path:
        return self.run / VOCABULARIES

    def vocabulary(self, table: str) -> Vocabulary:
        """The values of the rows of a table.

        Raises:
            DataError: the folder of the run does not have it, or it is of another size than the table.
        """
        path = vocabulary_file(self.vocabularies, table)
        found = Vocabulary.load(path)
        if found.num_embeddings != self.rows[table]:
            raise DataError(
                f"{path}: has values for {found.num_embeddings:,} rows, and its table {self.rows[table]:,}; was the file altered?"
            )
        return found

    def __str__(self) -> str:
        """What it is known by, on every rank and whenever the job is given again."""
        return f"{self.run.name}/{self.checkpoint.name} {self.checksum[:16]}"

    def differs(self, config: JobConfig) -> bool:
        """The tables or the dense part are trained otherwise, so that what their optimizers kept is of no use."""
        then, now = self.config.optimizer, config.optimizer
        return (then.tables.name, then.dense.name) != (now.tables.name, now.dense.name)


def find(given: str | Path, config: JobConfig) -> Former:
    """The run in a folder, or that of the one of its checkpoints that is given, or the last one of this job's name. Not collective.

    Raises:
        ConfigError: it is no run, is not finished, has another model, or ids of a table mean other rows there.
        CheckpointError: it has no checkpoint, or that cannot be read.
    """
    if given == LAST:
        given = _last(config)
    folder = Path(given)
    run = run_of(folder)
    if run is None:
        raise ConfigError(f"--from: {given} is no run of `shardembed train`; give its folder, such as runs/NAME-20261129-081500")
    whole = run.resolve() == folder.resolve()
    if whole and not is_finished(run):
        raise ConfigError(
            f"--from: {given} is unfinished: give its own command again first, or one of its checkpoints, to begin from that"
        )
    try:
        checkpoint = checkpoint_of(run) if whole else folders.chosen(folder, None)
    except CheckpointError as error:
        raise CheckpointError(f"--from: {error}; a run with checkpoint.every_steps: null saves none") from error
    then = settings.load(run / CONFIG, named=False)
    if then.model.kind != config.model.kind:
        raise ConfigError(
            f"--from: {given} is a {MODEL_NAMES[then.model.kind]}, and this job trains a {MODEL_NAMES[config.model.kind]}: set "
            "model.kind as it was, or leave --from out"
        )
    check_features(given, then, config)
    _check_rules(given, then, config)
    with StoredTables(checkpoint) as stored:
        manifest = stored.manifest
        _check_texts(given, run / NAMES, stored, config)
    rows = {table_of(key): entry.rows for key, entry in manifest.entries.items() if entry.kind == "table" and entry.by_id is None}
    return Former(run, checkpoint, manifest.step, manifest.checksum, then, rows)


def _last(config: JobConfig) -> Path:
    found = last_finished(config)
    if found is None:
        name = config.name or "run"
        raise ConfigError(f"--from {LAST}: {config.run_dir} has no finished run named {name!r}; leave --from out the first time")
    return found


def table_of(key: str) -> str:
    return key.removeprefix(TABLES).removesuffix(WEIGHT)


def check_features(given: str | Path, then: JobConfig, now: JobConfig) -> None:
    """What a model has learned of a column is of what that was.

    Raises:
        ConfigError: a feature is taken for something else now.
    """
    before = {one.name: _meaning(one) for one in _features(then)}
    for feature in _features(now):
        was, is_ = before.get(feature.name), _meaning(feature)
        if was not in (None, is_):
            raise ConfigError(
                f"--from: the feature {feature.name!r} was {was} in {given} and is {is_} here: set it as it was, or leave --from "
                "out"
            )


def _features(config: JobConfig) -> Sequence[FeatureConfig]:
    return config.data.columns if isinstance(config, CtrConfig) else getattr(config.data, "features", ())


def _meaning(feature: FeatureConfig) -> str:
    """What a model takes a column as, in words; the edges of buckets aside."""
    if feature.kind == "number":
        return f"a number by scale {feature.scale}" if feature.buckets is None else "a number by buckets"
    return "an id" if feature.kind == "id" else f"ids with pooling {feature.pooling}"


def _check_rules(given: str | Path, then: JobConfig, now: JobConfig) -> None:
    before, rules = row_rules(then), row_rules(now)
    for table, rule in rules.items():
        if before.get(table, rule) != rule:
            raise ConfigError(
                f"--from: the ids of {table!r} were {before[table]} in {given} and are {rule} here, so its rows would stand for "
                "others: set data.ids and the feature as they were, or leave --from out"
            )


def _check_texts(given: str | Path, names: Path, stored: StoredTables, now: JobConfig) -> None:
    """Files say what a column holds, and today's may hold digits alone where yesterday's held texts."""
    if not names.is_dir():
        return  # nobody knows
    known = _with_ids(stored)
    for table, (column, texts) in id_columns(now.data).items():
        if table not in known or texts == had_texts(names, table):
            continue
        there, here = ("whole numbers", "texts") if texts else ("texts", "whole numbers")
        help_ = "convert the file, or leave --from out" if texts else f"say data.texts: [{column}]"
        raise ConfigError(
            f"--from: column {column!r} had {there} in {given} and has {here} here, so that none would be known by the id that it "
            f"had: {help_}"
        )


def _with_ids(stored: StoredTables) -> set[str]:
    """The tables that know an id: of others nobody can say what it was."""
    found = {table_of(f"{name}{WEIGHT}"): stored.find(name) for name in stored.names}
    return {name for name, one in found.items() if (one.rows > 1 if one.ids is None else bool((one.ids != MISSING).any()))}


def row_rules(config: JobConfig) -> dict[str, str]:
    """By table, how its values become rows, in words."""
    clicks = isinstance(config, CtrConfig)
    features = {one.name: one for one in _features(config) if one.has_table}
    found = {}
    sides = () if clicks else SEQUENCE_TABLES if isinstance(config, SequenceConfig) else SIDES
    for name in [*sides, *features]:
        edges = features[name].buckets if name in features else None
        rule = _of_clicks if clicks else _of_interactions
        found[name] = rule(config, name) if edges is None else f"numbers between the edges {', '.join(map(str, edges))}"
    return found


def check_rows(former: Former, config: JobConfig, tables: Sequence[TableConfig]) -> None:
    """Before the tables of a job are made.

    Raises:
        ConfigError: ids of a feature are numbers of rows, and there are more or fewer of them than there were.
    """
    rules = row_rules(config)
    for table in tables:
        then, now = former.rows.get(table.name), table.num_embeddings
        if then not in (None, now) and table.name not in SIDES and rules.get(table.name) == NUMBERED:
            raise ConfigError(
                f"--from: the feature {table.name!r} had {then:,} rows in {former.run} and has {now:,} here; where ids are numbers "
                "of rows the last one is that of missing ids, and cannot move: leave out data.ids: numbered, and any id has a row"
            )


def _of_clicks(config: JobConfig, name: str) -> str:
    ids = config.data.ids
    if ids.kind == "hash":
        return f"hashed into {ids.tables.get(name, ids.num_embeddings):,} rows with seed {ids.seed}"
    return "those of a vocabulary" if ids.kind == "vocabulary" else "any ids"


def _of_interactions(config: JobConfig, name: str) -> str:
    if config.data.any_ids is None:
        return NUMBERED
    column = getattr(config.data, name) if name in SIDES else name
    return "any ids, read as texts" if column in getattr(config.data, "texts", ()) else "any ids"
