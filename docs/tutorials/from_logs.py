# %% [markdown]
# # From logs to recommendations
#
# A shop has log files: who viewed what, line by line, with all that goes wrong in log files. At the end of this page it has
# recommendations, vectors for an index, a server to ask, and a way to do it all again tomorrow. Commands stand here as they are
# typed into a terminal, behind a `$`; the page runs them.

# %%
import subprocess
import sys
from pathlib import Path


def run(command, last=12):
    """Show a command, and the last lines of what it prints."""
    print("$", command)
    words = command.replace("shardembed", "python -m shardembed", 1) if command.startswith("shardembed") else command
    words = words.replace("python", sys.executable, 1)
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
    print("\n".join(Path(f"logs/{name}.csv").read_text().splitlines()[:3]))

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
train: {epochs: 4}
eval: {k: 10}
name: shop
""")
run("shardembed train shop.yaml", last=16)

# %% [markdown]
# The broken rows were left out and counted, with their places. Beside its recall stands what a list of the most popular items would
# reach, by the same rule. `run.html` in the run's folder shows the curves, and how the tables lie.
#
# ## Recommendations
#
# Users and items have names again:

# %%
run_folder = max(Path("runs").glob("shop-*"))
run(f"shardembed recommend {run_folder} --users all --k 5 --exclude-seen --out recs.csv", last=3)
print("\n".join(Path("recs.csv").read_text().splitlines()[:6]))

# %% [markdown]
# ## Vectors for an index
#
# `export` writes the vectors that the score is made of, with towers and features applied, and says by which metric they are
# compared. Any library can take them from there, and `se.open_run(run).index("item", kind="faiss")` builds an index of faiss, or of
# hnswlib.

# %%
run(f"shardembed export {run_folder} --out vectors --format npy", last=6)

# %% [markdown]
# ## A server
#
# `shardembed serve RUN --out FOLDER` makes a folder that answers requests over HTTP, without the data and without the training job:
#
#     shardembed serve runs/shop-... --out served
#     python served/serve.py --port 8000
#     curl -X POST localhost:8000/recommend -d '{"user": "047dbc3f-c45e-496c-a242-ff0ce530574d", "k": 3}'
#
# ## Tomorrow
#
# The next day has new visitors and new items. `--from` begins where the last run ended: who has a row keeps it, who is new gets
# one. Yesterday's model is evaluated on today's data first, so that there is something to compare with; [Every
# day](../every-day.md) has more of it.

# %%
run(f"shardembed train shop.yaml --from {run_folder} --set data.path=logs/views-2.csv", last=16)

# %% [markdown]
# ## Clicks
#
# A log with a column that says whether somebody clicked is trained in the same way: `label: clicked` in the place of users and
# items, the columns as features, and `model: {kind: dlrm}`. `shardembed score RUN --data FILE --out FILE` then gives a probability
# a row. [Models and data](../training.md) has both.
