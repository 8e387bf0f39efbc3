# %% [markdown]
# # From logs to recommendations
#
# A shop has log files: who viewed what, line by line, with all that goes wrong in log files. At the end of this page it has
# recommendations, vectors for an index, a server to ask, and a way to do it all again tomorrow. Commands stand here as they are typed
# into a terminal, behind a `$`; the page runs them.

# %%
import subprocess
import sys
from pathlib import Path

import numpy as np


def run(command, last=12):
    """Show a command, and the last lines of what it prints."""
    print("$", command)
    words = command.replace("shardembed", f"{sys.executable} -m shardembed", 1).replace("python ", f"{sys.executable} ", 1)
    done = subprocess.run(words, shell=True, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0, done.stdout
    print("\n".join(done.stdout.rstrip().splitlines()[-last:]))


# %% [markdown]
# ## The logs
#
# Two days of a shop, made up by `examples/make_logs.py`: visitors are UUIDs and items texts, times are ISO 8601, and a row in a
# thousand is broken. There is a file of items too, with tags and prices.

# %%
run("python -m examples.make_logs logs")
for name in ("views-1", "items"):
    print(f"logs/{name}.csv")
    print("".join(Path(f"logs/{name}.csv").open().readlines()[:3]))

# %% [markdown]
# ## A first configuration
#
# `--guess` looks at the columns of a file and writes what they seem to be. Nobody has to number anything: ids are texts, or any
# integers.

# %%
run("shardembed train --guess logs/views-1.csv --out job.yaml", last=30)
print(Path("job.yaml").read_text())

# %% [markdown]
# Here is the configuration that this page goes on with. It says which columns are users, items and times, and what is known of the
# items.

# %%
Path("shop.yaml").write_text("""\
data:
  path: logs/views-1.csv
  user: visitor
  item: sku
  time: viewed_at
  on_bad_row: skip
  items: logs/items.csv
  features:
    - {name: tags, kind: ids, separator: "|", of: item}
    - {name: price, kind: number, of: item}
model: {kind: two_tower, embedding_dim: 32}
train: {epochs: 8}
eval: {k: 10}
name: shop
""")
run("shardembed train shop.yaml", last=16)
