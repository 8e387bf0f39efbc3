"""A folder that answers requests on one CPU box: what a run's model compares or adds up, and the server of `box/` beside it."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import shardembed as se
from shardembed.checkpoint.folders import sync_folder
from shardembed.embeddings.publish import new_folder, sync_file
from shardembed.errors import UnsupportedError
from shardembed.kernels import quantiles
from shardembed.kernels.mixing import mixed
from shardembed.kernels.starting import STARTING
from shardembed.recipes.data.clicks.encode import TableColumn
from shardembed.recipes.data.feature_values import edges_of
from shardembed.recipes.data.naming import had_texts
from shardembed.recipes.models.ctr import ClickModel
from shardembed.recipes.models.sasrec import Sasrec
from shardembed.recipes.models.two_tower import TwoTower
from shardembed.recipes.run_folder import NAMES
from shardembed.recipes.use.box.files import SETTINGS
from shardembed.recipes.use.box.retrieval import MOST_ROWS
from shardembed.recipes.use.catalog import Catalog
from shardembed.recipes.use.opened import Opened
from shardembed.recipes.use.vectors import BLOCK_BYTES, Maker, maker
from shardembed.tables.initial import table_hash
from shardembed.tables.table_config import Constant, Normal, TableConfig, Uniform

BOX, ENTRY = "box", "serve.py"
STARTS = '''"""Serve what lies in this folder: python serve.py --port 8000. It needs torch, starlette and uvicorn."""

from pathlib import Path

from box.http import main

if __name__ == "__main__":
    main(Path(__file__).parent)
'''


def build(opened: Opened, out: Path) -> Path:
    """Make the folder `out`, which is whole or not there. In one process.

    Raises:
        ExportError: `out` exists, or cannot be written. UnsupportedError: rows of the model cannot be made outside of it.
    """
    if opened.comm.world_size > 1:
        raise UnsupportedError("a folder to be served is made in one process: leave out the launcher")
    with new_folder(out, 0) as folder:
        settings = _clicks(opened, folder) if isinstance(opened.model, ClickModel) else _retrieval(opened, folder)
        about = {"model": opened.config.model.kind, "run": opened.path.name, "step": opened.step}
        (folder / SETTINGS).write_text(json.dumps({**about, **settings}), encoding="utf-8")
        copy_server(folder)
        for path in folder.rglob("*"):
            sync_folder(path) if path.is_dir() else sync_file(path)
    return out


def copy_server(folder: Path) -> None:
    """Put the server beside what lies in a folder."""
    (folder / ENTRY).write_text(STARTS, encoding="utf-8")
    (folder / BOX).mkdir()
    for file in resources.files("shardembed.recipes.use.box").iterdir():
        if file.name.endswith(".py"):
            (folder / BOX / file.name).write_bytes(file.read_bytes())


def _retrieval(opened: Opened, folder: Path) -> dict[str, Any]:
    data, model = opened.config.data, opened.model
    texts = {f"{side.what}_texts": side.names is not None for side in (opened.users, opened.items)}
    _names(folder, opened.items)
    settings = {"metric": "dot", "user": data.user, "item": data.item, **texts}
    _vectors(folder, opened, maker(opened, "item"), "item")
    if isinstance(model, TwoTower):
        _vectors(folder, opened, maker(opened, "user"), "user")
        return {"kind": "two_tower", **settings}
    assert isinstance(model, Sasrec)
    length, dim = opened.config.model.max_length, opened.config.model.embedding_dim
    example = (torch.zeros(2, min(2, length), dim), torch.tensor([1, min(2, length)]))
    requests = torch.export.Dim("requests", min=1, max=1 << 16)
    positions = torch.export.Dim("positions", min=1, max=length) if length > 1 else None
    _program(folder / "layers.pt2", Layers(model), example, ({0: requests, **({1: positions} if positions else {})}, {0: requests}))
    start = _start(opened, model.tables.tables[0]) if data.any_ids is not None else None
    return {"kind": "sasrec", **settings, "max_length": length, "start": start}


def _vectors(folder: Path, opened: Opened, made: Maker, stem: str) -> None:
    places = np.arange(len(made.catalog))
    _save(folder / f"{stem}.npy", (values.numpy() for _, values in made.blocks(places)), (len(places), made.columns))
    if opened.config.data.any_ids is not None:
        np.save(folder / f"{stem}.ids.npy", made.catalog.ids)


def _names(folder: Path, items: Catalog) -> None:
    if items.names is None:
        return
    texts = [text.encode() for text in items.named(np.arange(len(items))).to_pylist()]
    np.save(folder / "item.ends.npy", np.cumsum([len(text) for text in texts], dtype=np.int64))
    (folder / "item.texts").write_bytes(b"".join(texts))


def _clicks(opened: Opened, folder: Path) -> dict[str, Any]:
    scorer, model = opened.scorer, opened.model
    assert scorer is not None
    tables = {table.name: table for table in model.tables.tables}
    columns = [
        _column(opened, folder, f"table-{place:04d}", column, tables[column.feature.name])
        for place, column in enumerate(scorer.encoder.tables)
    ]
    numbers = scorer.encoder.numbers
    names = [one.name for one in opened.config.data.columns if one.kind == "number"]
    taken = [{"name": names[place], "log": log} for place, log in zip(numbers.columns, numbers.logs, strict=True)]
    example = torch.zeros(2, len(taken)), torch.zeros(2, len(columns), opened.config.model.width)
    rows = torch.export.Dim("rows", min=1, max=MOST_ROWS)
    _program(folder / "dense.pt2", Dense(model), example, ({0: rows}, {0: rows}))
    return {"kind": "clicks", "columns": columns, "numbers": taken, "least": numbers.least if np.isfinite(numbers.least) else None}


def _column(opened: Opened, folder: Path, stem: str, column: TableColumn, table: TableConfig) -> dict[str, Any]:
    feature, ids = column.feature, opened.config.data.ids
    dynamic = table.dynamic is not None
    living = opened.model.tables.ids(table.name) if dynamic else torch.arange(table.num_embeddings or 0)
    rows = max(1, BLOCK_BYTES // (4 * table.embedding_dim))
    blocks = (opened.model.tables.rows(table.name, some).detach().float().cpu().numpy() for some in living.split(rows))
    _save(folder / f"{stem}.npy", blocks, (len(living), table.embedding_dim))
    if dynamic:
        np.save(folder / f"{stem}.ids.npy", living.cpu().numpy())
    kind = "bucket" if feature.buckets is not None else ids.kind
    if kind == "vocabulary":
        vocabulary: se.Vocabulary = column.lookup  # type: ignore[assignment]
        values = np.array(vocabulary.values, np.int64)
        order = np.argsort(values, kind="stable")
        np.save(folder / f"{stem}.values.npy", values[order])
        np.save(folder / f"{stem}.value_rows.npy", order + 1)
    return {
        "name": feature.name,
        "kind": feature.kind,
        "stem": stem,
        "rows": kind,
        "seed": ids.seed,
        "separator": feature.separator,
        "pooling": feature.pooling,
        "buckets": None if feature.buckets is None else edges_of(feature.buckets).tolist(),
        "texts": feature.name in opened.config.data.texts or had_texts(opened.path / NAMES, feature.name),
        "hexadecimal": not opened.config.data.features and ids.kind != "dynamic",
        "start": _start(opened, table) if dynamic else None,
    }


def _start(opened: Opened, table: TableConfig) -> dict[str, Any] | None:
    """What a row begins with that has none; None: zeros.

    Raises:
        UnsupportedError: a function of the user's decides.
    """
    assert table.dynamic is not None
    if table.dynamic.unknown == "zeros":
        return None
    start, dtype = table.start, str(table.dtype).removeprefix("torch.")
    if isinstance(start, Constant):
        return {"kind": "constant", "value": start.value, "dtype": dtype}
    if not isinstance(start, Normal | Uniform):
        raise UnsupportedError(f"table {table.name!r} begins with a function, which cannot be served")
    base = int(mixed(torch.tensor(table_hash(opened.config.train.seed, table.name) ^ STARTING)))
    normal = isinstance(start, Normal)
    scale, offset = (start.std, start.mean) if isinstance(start, Normal) else (start.high - start.low, start.low)
    found = {"kind": "normal" if normal else "uniform", "dtype": dtype, "base": base}
    found |= {"scale": float(np.float32(scale)), "offset": float(np.float32(offset))}
    if normal:
        found |= {"cubics": quantiles.quantile_table().tolist(), "first": quantiles.FIRST, "inside": quantiles.IN_SEGMENT}
    return found


class Layers(nn.Module):
    """What `Sasrec.queries` says after the last item of each history, of rows `[b, L, D]`, zero behind their `[b]` lengths."""

    def __init__(self, model: Sasrec) -> None:
        super().__init__()
        self.positions, self.blocks, self.norm = model.positions, model.blocks, model.norm
        self._scale = model._scale

    def forward(self, rows_bLD: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        most = len(self.positions)
        from_end = most - lengths[:, None] + torch.arange(rows_bLD.shape[1])
        x_bLD = rows_bLD * self._scale + self.positions[from_end.clamp(max=most - 1)]
        for layer, block in enumerate(self.blocks):
            x_bLD = block(x_bLD, _keep_all, layer)
        last = (lengths - 1)[:, None, None].expand(-1, 1, rows_bLD.shape[2])
        return self.norm(x_bLD).gather(1, last).squeeze(1)


def _keep_all(layer: int, x: torch.Tensor) -> torch.Tensor:
    return x


class Dense(nn.Module):
    """What `ClickModel.logits` makes of numbers `[b, I]` and vectors of tables `[b, F, D]`: log-odds `[b]`."""

    def __init__(self, model: ClickModel) -> None:
        super().__init__()
        self.linear, self.bottom, self.interaction, self.top = model.linear, model.bottom, model.interaction, model.top
        self.standardize = model.standardize
        if self.standardize:
            self.register_buffer("mean", model.get_buffer("mean"))
            self.register_buffer("deviation", model.get_buffer("deviation"))

    def forward(self, numbers_bI: torch.Tensor, vectors_bFD: torch.Tensor) -> torch.Tensor:
        if self.standardize:
            numbers_bI = (numbers_bI - self.get_buffer("mean")) / self.get_buffer("deviation")
        if self.linear is not None:
            return (self.linear(numbers_bI) + vectors_bFD.flatten(1).sum(1, keepdim=True)).squeeze(1)
        assert self.interaction is not None
        assert self.top is not None
        if self.bottom is not None:
            vectors_bFD = torch.cat([self.bottom(numbers_bI).unsqueeze(1), vectors_bFD], 1)
        return self.top(self.interaction(vectors_bFD)).squeeze(1)


def _program(path: Path, module: nn.Module, example: tuple[torch.Tensor, ...], shapes: Any) -> None:
    here = copy.deepcopy(module).eval().cpu()  # the box has no GPU, wherever the model is
    with torch.no_grad():
        program = torch.export.export(here, example, dynamic_shapes=shapes)
    torch.export.save(program, path)


def _save(path: Path, blocks: Iterator[np.ndarray], shape: tuple[int, int]) -> None:
    """A .npy file of float32, block by block."""
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for block in blocks:
            file.write(np.ascontiguousarray(block, np.float32).data)
