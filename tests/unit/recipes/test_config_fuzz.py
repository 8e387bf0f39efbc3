"""Thousands of altered configuration files: each gives a configuration or one ConfigError of readable size, and none hangs."""

from __future__ import annotations

import random
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from shardembed.config import located
from shardembed.errors import ConfigError
from shardembed.recipes import config
from shardembed.recipes.resolved import resolved_yaml
from tests.amount import exhaustive

QUICKSTART = Path(__file__).parents[3] / "configs" / "train" / "quickstart.yaml"
HANGS = 60  # seconds that no file may take, on any machine
READABLE = 20_000  # characters of a message, however large the file
NUMBERS = ("-1", "0", "1e400", "-1e400", ".nan", ".inf", "1_0", "0o7", "'3'")
LONG_NUMBERS = ("9" * 25, "9" * 5000, "0x" + "f" * 9000, "1:" * 400 + "1")
PIECES = (
    *("&a", "*a", "<<: *a", "!!int", "!!python/object/apply:os.system [id]", "!!bool x", "!", "%YAML 9", "---", "..."),
    *("? ", "- ", "|", ">", "[" * 30, "{" * 30, "{a: " * 20, "]", "}", ":", ": ", "#", "'", '"', "\t", "\r", "\0", "\x07"),
    *("\u2028", "\ufeff", "=", "~", "null", '"\\ud800"', '"\\UFFFFFFFF"', "2024-13-45", "x" * 3000, "\n" * 50),
    *("plan: {user: grid}", "name: ..", "data: []"),
)
EXTREMES = {
    "a number of base 60 without end": "train: {epochs: 1" + ":1" * 300_000 + "}",
    "a fraction of base 60": "model: {temperature: 1" + ":1" * 300_000 + ".5}",
    "half a million digits": "train: {epochs: -0b" + "1" * 500_000 + "}",
    "a list without end": "model: {towers: [" + "a," * 150_000 + "]}",
    "mistakes without end": "model: {towers: [" + "a," * 20_000 + "]}",
    "unknown keys without end": "\n".join(f"k{number}: 1" for number in range(3_000)),
    "deep nesting": "[" * 500_000,
    "a long version": "%YAML " + "9" * 100_000 + ".1\n--- {}",
    "a long text": "wire_dtype: '" + "x" * 1_000_000 + "'",
    "a long key": "? " + "k" * 1_000_000 + "\n: 1",
    "an open quote": "'" * 1_000_001,
    "a long anchor": "a: &" + "b" * 1_000_000 + " 1",
    "a long tag": "a: !" + "b" * 1_000_000 + " 1",
}

SOME = (
    "a number of base 60 without end",
    "half a million digits",
    "mistakes without end",
    "deep nesting",
    "a long version",
    "a long text",
)


@pytest.fixture(autouse=True)
def _ended_when_it_hangs() -> Iterator[None]:
    def stop(*_: object) -> None:
        raise AssertionError(f"a configuration took more than {HANGS} s")

    before = signal.signal(signal.SIGALRM, stop)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


def try_one(path: Path, data: bytes) -> config.Config | None:
    """What the file gives; None when it is refused as it should be. Anything else fails the test."""
    path.write_bytes(data)
    signal.alarm(HANGS)
    try:
        return config.load(path)
    except ConfigError as error:
        message = str(error)
        assert message.startswith(str(path))
        assert len(message) < READABLE
        message.encode("utf-8", "backslashreplace")
        return None


def altered(text: bytes, draw: random.Random) -> bytes:
    """`text` with one to four mistakes, of bytes, of lines or of values."""
    for _ in range(draw.randint(1, 4)):
        lines = text.split(b"\n")
        at, line = draw.randrange(len(text) + 1), draw.randrange(len(lines))
        kind = draw.randrange(8)
        if kind == 0:
            text = text[:at] + bytes([draw.randrange(256)]) + text[at + 1 :]
        elif kind == 1:
            text = text[:at] + draw.choice(PIECES).encode() + text[at:]
        elif kind == 2:
            text = text[:at] + text[at + draw.randint(1, 40) :]
        elif kind == 3:
            del lines[line]
            text = b"\n".join(lines)
        elif kind == 4:
            lines.insert(draw.randrange(len(lines)), lines[line])
            text = b"\n".join(lines)
        elif kind == 5:
            lines[line] = b" " * draw.randint(0, 8) + lines[line].lstrip()
            text = b"\n".join(lines)
        else:  # a value in place of another
            head, colon, _ = lines[line].partition(b": ")
            lines[line] = head + colon + draw.choice((*NUMBERS, *LONG_NUMBERS, *PIECES)).encode()
            text = b"\n".join(lines)
    return text


def test_altered_files_give_a_configuration_or_one_clear_error(tmp_path: Path) -> None:
    first = config.load(QUICKSTART, ["model.towers=[64, 32]", "plan.item={kind: grid, strips: 2}", "data.path=x.csv"])
    # A line for every value, so that lines can be taken out and put elsewhere.
    base = resolved_yaml(first).replace(", ", ",\n  ").encode()
    draw = random.Random(5)
    refused = 0
    for _ in range(1000):
        found = try_one(tmp_path / "job.yaml", altered(base, draw))
        if found is None:
            refused += 1
        else:  # what is accepted can be written down and read again
            path = tmp_path / "again.yaml"
            path.write_text(resolved_yaml(found))
            assert config.load(path) == found
    assert 800 < refused < 1950


@pytest.mark.parametrize("name", [name if name in SOME else exhaustive(name) for name in EXTREMES])
def test_files_made_to_take_time_or_memory_are_refused(tmp_path: Path, name: str) -> None:
    data = EXTREMES[name].encode()
    assert len(data) <= located.MAX_BYTES
    assert try_one(tmp_path / "job.yaml", data) is None


def test_many_mistakes_are_not_all_shown(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text("model: {towers: [" + "a," * 50 + "]}")
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 21
    assert lines[-1] == "and 30 more"
