"""`load_plain`: a checkpoint into a plain model, in one process without a group. Serving and analysis need no training job."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shardembed.checkpoint import folders
from shardembed.checkpoint.filling import Wanted, check_files, check_met, fill, ids_of
from shardembed.checkpoint.format.manifest import Source, read_manifest, resolve
from shardembed.checkpoint.format.pieces import Files
from shardembed.checkpoint.retention import warn_of
from shardembed.checkpoint.selection import IdMap, Placed, Selection, checked_ids
from shardembed.config.hints import nearest
from shardembed.errors import CheckpointError

SHOWN = 10


def load_plain(
    folder: str | Path,
    model: nn.Module,
    rows: Mapping[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    step: int | None = None,
) -> dict[str, IdMap]:
    """Fill a plain model from a checkpoint, in place: tables into `nn.Embedding` and `nn.EmbeddingBag`, dense weights and buffers.

    Needs no process group and no other rank, whatever the checkpoint was saved on. All parameters and persistent buffers of
    `model` are filled by their keys; what else the checkpoint has is left alone, so the model may be a part of the one that was
    trained. Parameters on the meta device become real ones on the CPU, so that no table is made twice:
    `with torch.device("meta"): model = TwoTower()`.

    Args:
        folder: the folder of checkpoints (the newest counts), or that of one checkpoint.
        rows: by module path, ids of the rows to load, in order; such a module then has as many rows. It may be built with that
            many, or with the whole table's (best on the meta device). Of a dynamic table all ids that have a row, ascending, where
            none are named; its module may be built with any number.
        dtype: of the tables in the model; None leaves each as it is. Values are converted as in `Tensor.to`.
        step: the checkpoint of this step, rather than the newest.

    Returns:
        An `IdMap` for each module in `rows`, and each of a dynamic table: it turns ids of the table into rows of the module.

    Raises:
        CheckpointError: there is no checkpoint, it is damaged (file, tensor and rows are named; the model is partly filled then),
            or it lacks what the model needs.
    """
    path = folders.chosen(folder, step)
    manifest = read_manifest(path)
    if step is not None and manifest.step != step:
        raise CheckpointError(f"{path} is the checkpoint of step {manifest.step}, and not of step {step}")
    manifests, sources = resolve(manifest, path)
    warn_of(path, manifest.nonfinite)
    with ExitStack() as stack:
        files = {folder: stack.enter_context(Files(folder, found)) for folder, found in manifests.items()}
        wanted, maps = _targets(path, model, sources, dict(rows or {}), dtype, lambda source: ids_of(source, files))
        check_files([target.source for target in wanted], files)
        targets = [target.made() for target in wanted]
        _read(files, targets)
    _put(model, targets)
    return maps


@dataclass(frozen=True)
class _Target:
    """A tensor of the model: `old` is what it has, `new` what is filled: the same, or one of `shape` and `dtype` that is made when
    the files have been seen.
    """

    key: str
    source: Source
    old: torch.Tensor
    new: torch.Tensor
    shape: tuple[int, ...]
    dtype: torch.dtype
    selection: Selection | Placed
    rows: int
    padding_idx: int | None

    def made(self) -> _Target:
        old = self.old
        if not old.is_meta and (old.shape, old.dtype) == (self.shape, self.dtype):
            return self
        device = "cpu" if old.is_meta else old.device
        return replace(self, new=torch.empty(self.shape, dtype=self.dtype, device=device))


def _targets(
    path: Path,
    model: nn.Module,
    sources: Mapping[str, Source],
    rows: dict[str, Any],
    dtype: torch.dtype | None,
    ids_of: Callable[[Source], torch.Tensor],
) -> tuple[list[_Target], dict[str, IdMap]]:
    """What to fill from which entry, with everything compared before anything is made."""
    if dtype is not None and not dtype.is_floating_point:
        raise CheckpointError(f"dtype={dtype}: tables are of floating-point numbers")
    sources = {key: source for key, source in sources.items() if source.entry.kind in ("table", "dense")}
    own = {key: value for key, value in model.state_dict(keep_vars=True).items() if isinstance(value, torch.Tensor)}
    modules = dict(model.named_modules())
    _check_names(rows, {key.rpartition(".")[0] for key in own if _table_module(modules, key) is not None})
    targets: dict[int, _Target] = {}  # by tensor: shared ones are filled once
    maps: dict[str, IdMap] = {}
    differences = []
    for key, tensor in own.items():
        source, module = sources.get(key), _table_module(modules, key)
        name = key.rpartition(".")[0]
        if source is None:
            continue
        by_id = source.entry.by_id is not None
        chosen = (name in rows or by_id) and module is not None
        if chosen:
            maps[name] = IdMap(name, _chosen(name, source, rows, ids_of))
        wanted = maps[name] if chosen else None
        is_table = module is not None or source.entry.kind == "table"
        try:
            made = _target(key, source, tensor, module, wanted, dtype if is_table else None)
            if id(tensor) in targets and (chosen or targets[id(tensor)].rows != made.rows):
                raise ValueError(f"shares its weight with {targets[id(tensor)].key!r}: rows= cannot choose for one of them")
            targets.setdefault(id(tensor), made)
        except ValueError as error:
            differences.append(f"{key!r} {error}")
    lacking = [key for key, tensor in own.items() if key not in sources and id(tensor) not in targets]
    differences += [f"{key!r} is in the model only{nearest(key, sources)}" for key in lacking[:SHOWN]]  # a hint takes time
    differences += lacking[SHOWN:]
    if differences:
        more = [f"and {len(differences) - SHOWN} more"] if len(differences) > SHOWN else []
        raise CheckpointError("\n  ".join([f"{path} does not fit the model:", *differences[:SHOWN], *more]))
    return list(targets.values()), maps


def _chosen(name: str, source: Source, rows: Mapping[str, Any], ids_of: Callable[[Source], torch.Tensor]) -> torch.Tensor:
    """The ids that a module gets: those that are named, else all that have a row in a dynamic table."""
    if source.entry.by_id is None:
        return checked_ids(name, rows[name], source.entry.rows)
    there = ids_of(source)
    return checked_ids(name, rows[name], there) if name in rows else there


def _check_names(rows: Iterable[str], tables: set[str]) -> None:
    for name in rows:
        if name not in tables:
            raise CheckpointError(
                f"rows: {name!r} is no nn.Embedding or nn.EmbeddingBag of the model{nearest(name, tables) or ''}; there are "
                f"{', '.join(map(repr, sorted(tables)[:SHOWN])) or 'none'}"
            )


def _table_module(modules: Mapping[str, nn.Module], key: str) -> nn.Embedding | nn.EmbeddingBag | None:
    path, _, name = key.rpartition(".")
    module = modules.get(path)
    return module if name == "weight" and isinstance(module, nn.Embedding | nn.EmbeddingBag) else None


def _target(
    key: str,
    source: Source,
    tensor: torch.Tensor,
    module: nn.Embedding | nn.EmbeddingBag | None,
    wanted: IdMap | None,
    dtype: torch.dtype | None,
) -> _Target:
    """Raises ValueError where the entry does not fit."""
    entry, shape = source.entry, tuple(tensor.shape)
    count = entry.rows if wanted is None else len(wanted)
    allowed = {entry.shape, (count, *entry.shape[1:])}
    by_id = entry.by_id is not None
    if by_id and wanted is None:
        raise ValueError("is a dynamic table in the checkpoint, and needs an nn.Embedding or nn.EmbeddingBag")
    if shape not in allowed and not (by_id and shape[1:] == entry.shape[1:]):
        asked = f", of which {count} rows are wanted" if wanted is not None else ""
        raise ValueError(f"is {shape} in the model and {entry.shape} in the checkpoint{asked}")
    dtype = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
    if entry.dtype != dtype and not (entry.dtype.is_floating_point and dtype.is_floating_point):
        raise ValueError(f"is of {dtype} in the model and of {entry.dtype} in the checkpoint")
    padding = None if module is None else module.padding_idx
    if by_id and padding is not None:
        raise ValueError(f"has padding_idx={padding}, and in a dynamic table the id that stands for nothing has no row")
    if wanted is not None and padding is not None and shape[0] == entry.rows:  # an id of the whole table, until now
        place, found = wanted.find(torch.tensor([padding]))
        if not bool(found):
            raise ValueError(f"has padding_idx={padding}, which is not among its rows=: add it")
        padding = int(place)
    rows = Placed(*wanted.ascending) if by_id and wanted is not None else Selection(entry.rows, wanted)
    wanted_shape = (count, *entry.shape[1:]) if entry.shape else ()
    return _Target(key, source, tensor, tensor, wanted_shape, dtype, rows, count, padding)


def _read(files: Mapping[Path, Files], targets: Iterable[_Target]) -> None:
    for target in targets:  # a table after the other: what chooses its rows is let go
        flat = target.new.detach()
        home = flat
        if not flat.is_contiguous():
            flat = torch.empty(flat.shape, dtype=flat.dtype, device=flat.device)
        into = flat.view(target.rows, -1) if flat.numel() else flat.reshape(target.rows, target.source.entry.columns)
        wanted = Wanted(target.key, target.source, target.selection, range(target.source.entry.columns), into)
        fill([wanted], files)
        check_met(wanted)
        if home is not flat:
            home.copy_(flat)


def _put(model: nn.Module, targets: Iterable[_Target]) -> None:
    """Give the model the tensors that were made for it, wherever the old ones are used."""
    for target in targets:
        if target.new is not target.old:
            new = target.new
            if isinstance(target.old, nn.Parameter):
                new = nn.Parameter(new, requires_grad=target.old.requires_grad and new.is_floating_point())
            for module in model.modules():
                held: dict[str, Any] = module._parameters if isinstance(new, nn.Parameter) else module._buffers
                held.update({name: new for name, value in held.items() if value is target.old})
                if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.weight is new:
                    module.num_embeddings, module.padding_idx = target.rows, target.padding_idx
