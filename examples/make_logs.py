"""Make up the logs of a shop, as raw as logs are: who viewed what on two days, and what is known of the items.

    python -m examples.make_logs logs    writes logs/views-1.csv, logs/views-2.csv and logs/items.csv

Users are UUIDs and items texts; times are ISO 8601; a row in a thousand is malformed. On day two a tenth of users and items are
new. A user has two tastes, and views items of these by popularity, so there is something to learn. Prints how many rows are
malformed.
"""

import csv
import sys
import uuid
from datetime import datetime, timedelta, timezone
from pathlib import Path

import numpy as np

USERS, ITEMS, TASTES, VIEWS = 5_000, 2_000, 40, 60_000
NEW = 0.1  # of users and items, on the second day
BAD = 0.001
COLOURS = ("red", "green", "blue", "black")


def make(folder: Path, seed: int = 0) -> int:
    """The files; returns how many malformed rows there are."""
    rng = np.random.default_rng(seed)
    users = [str(uuid.UUID(bytes=rng.bytes(16), version=4)) for _ in range(int(USERS * (1 + NEW)))]
    items = [f"SKU-{number:05d}-{COLOURS[number % len(COLOURS)].upper()}" for number in range(int(ITEMS * (1 + NEW)))]
    tastes = rng.integers(TASTES, size=(len(users), 2))
    kind = rng.integers(TASTES, size=len(items))
    popularity = rng.permutation(np.arange(1, len(items) + 1) ** -0.8)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "items.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["sku", "tags", "price"])
        for number, name in enumerate(items):
            rows.writerow([name, f"kind-{kind[number]}|{COLOURS[number % len(COLOURS)]}", f"{rng.lognormal(3, 1):.2f}"])
    bad = 0
    for day, (known, offered) in enumerate(((USERS, ITEMS), (len(users), len(items))), 1):
        began = datetime(2026, 3, day, tzinfo=timezone.utc)
        who = rng.integers(known, size=VIEWS)
        moments = np.sort(rng.random(VIEWS)) * 86_400
        of_taste = [np.flatnonzero(kind[:offered] == taste) for taste in range(TASTES)]
        shares = [np.cumsum(popularity[mine]) / popularity[mine].sum() for mine in of_taste]
        with (folder / f"views-{day}.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["viewed_at", "visitor", "sku", "country"])
            for user, seconds in zip(who.tolist(), moments.tolist(), strict=True):
                taste = tastes[user, int(rng.random() < 0.2)]
                item = of_taste[taste][np.searchsorted(shares[taste], rng.random())]
                when = (began + timedelta(seconds=seconds)).isoformat(timespec="milliseconds")
                row = [when, users[user], items[item], ("de", "fr", "pl")[user % 3]]
                if rng.random() < BAD:
                    bad += 1
                    row = [row[:2], [when, "", items[item], "de"], ["yesterday", *row[1:]]][bad % 3]
                rows.writerow(row)
    return bad


if __name__ == "__main__":
    print(f"{make(Path(sys.argv[1]))} rows are malformed")
