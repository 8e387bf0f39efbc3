"""Paths with a scheme are refused by name wherever paths are taken, and nothing is made that is called after them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import shardembed as se
from shardembed import checkpoint
from shardembed.cli import failures, main
from shardembed.config.paths import local
from shardembed.embeddings.stored import StoredTables
from shardembed.errors import ShardEmbedError
from shardembed.recipes import config

REMOTE = "s3://bucket/some/x"


@pytest.fixture(autouse=True)
def _nothing_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    for name in ("RANK", "WORLD_SIZE", failures.ERROR_FILE, failures.QUIET):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text("model: {embedding_dim: 4}\n")
    yield
    assert [path.name for path in tmp_path.iterdir()] == ["job.yaml"]


def model() -> torch.nn.Module:
    return se.shard(torch.nn.Sequential(torch.nn.Embedding(4, 2)), optimizer=se.optim.SGD(lr=0.1))


CALLS: dict[str, Callable[[Any], Any]] = {
    "save_checkpoint": lambda path: se.save_checkpoint(path, model()),
    "async_save_checkpoint": lambda path: se.async_save_checkpoint(path, model()),
    "load_checkpoint": lambda path: se.load_checkpoint(path, model()),
    "load_plain": lambda path: se.load_plain(path, torch.nn.Embedding(4, 2)),
    "newest_checkpoint": checkpoint.newest_checkpoint,
    "checkpoints": checkpoint.checkpoints,
    "stored tables": StoredTables,
    "convert": lambda path: se.convert_checkpoint(path, "here", trusted=True),
    "Plan.load": se.Plan.load,
    "Vocabulary.load": se.Vocabulary.load,
    "Vocabulary.save": lambda path: se.Vocabulary.build([["a"]]).save(path),
    "Vocabulary.from_files": lambda path: se.Vocabulary.from_files(path, "a"),
}


@pytest.mark.parametrize("made", [str, Path])  # pathlib makes one slash of two
@pytest.mark.parametrize("call", CALLS)
def test_calls_name_the_remote_path_that_they_were_given(call: str, made: Callable[[str], Any]) -> None:
    with pytest.raises(
        ShardEmbedError, match=r"s3://bucket/some/x: remote paths are neither read nor written, but for files of data"
    ):
        CALLS[call](made(REMOTE))


@pytest.mark.parametrize(
    "words",
    [
        ["train", "job.yaml", "--set", f"run_dir={REMOTE}"],
        ["train", "job.yaml", "--evaluate", REMOTE],
        ["train", "job.yaml", "--evaluate", ".", "--predict", REMOTE],
        ["train", REMOTE],
        ["inspect", REMOTE],
        ["export", REMOTE, "--out", "here"],
        ["export", "here", "--out", REMOTE],
        ["map", "here", "--table", "item", "--out", f"{REMOTE}.png"],
        ["plan", REMOTE],
    ],
)
def test_commands_refuse_remote_paths(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    said = capsys.readouterr().err
    assert said.count("shardembed: error: ") == 1
    assert "s3://bucket/some/x" in said
    assert "remote paths are neither read nor written" in said


def test_settings_tell_the_place_of_a_remote_path(tmp_path: Path) -> None:
    with pytest.raises(ShardEmbedError, match=r"--set run_dir=gs://a/b.*run_dir.* gs://a/b: remote paths are neither"):
        config.load(tmp_path / "job.yaml", ["run_dir=gs://a/b"])


@pytest.mark.parametrize("path", ["a/b", "/a//b", "C:/a", "c:", "day_*:x", "a b://c", "runs:2", "./s3://a"])
def test_what_is_a_path_of_this_machine_is_taken(path: str) -> None:
    assert local(path) == Path(path)


def test_files_are_named_without_a_scheme() -> None:
    with pytest.raises(ShardEmbedError, match="file://a/b: name files and folders by their paths alone, without file://"):
        local("file:///a/b")
