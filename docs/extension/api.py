"""The API reference: which names are on which page, and what docstrings need to become pages."""

from __future__ import annotations

import importlib
import re
from typing import Any

from shardembed import optim

# Page -> what is on it, each with the members that are shown. A test holds that all public names are on one page.
PAGES: dict[str, dict[str, str]] = {
    "tables": {
        "Embedding": "forward from_pretrained rows load_rows topk reset_parameters",
        "EmbeddingBag": "forward from_pretrained mode",
        "EmbeddingCollection": "forward rows load_rows ids living tally topk prefetch plan reset_parameters",
        "IdEmbedding": "forward rows fill",
        "TableConfig": "cut_rows bucket_rows capacity",
        "Dynamic": "",
        "LRU": "",
        "LFU": "",
        "TTL": "",
        "MinCount": "",
        "Probability": "",
        "Normal": "",
        "Uniform": "",
        "Constant": "",
        "shard": "",
        "unshard": "",
        "IdBatch": "of to pin_memory",
        "Collate": "__call__",
        "Collated": "lengths to pin_memory",
        "Hashing": "__call__",
        "hash64": "",
        "Names": "texts flush",
        "Vocabulary": "build from_files save load __call__",
    },
    "plans": {
        "row_wise": "",
        "column_wise": "",
        "table_wise": "",
        "table_row_wise": "",
        "grid": "",
        "replicated": "",
        "Placement": "",
        "Plan": "save load hash",
        "TablePlan": "",
    },
    "optimizers": {
        **{f"optim.{name}": "" for name in optim.NAMES},
        "Optimizer": "step zero_grad state_dict load_state_dict",
        "clip_grad_norm_": "",
        "ignored": "",
    },
    "training": {"train": "", "TrainedRun": "open tables page losses history"},
    "using": {
        "open_run": "",
        "OpenedRun": "recommend score vectors queries index export",
        "recipes.use.vectors.NamedVectors": "",
        "recipes.use.index.VectorIndex": "search",
    },
    "loops": {"init": "", "rank": "", "world_size": "", "Comm": "close", "synced": "", "prefetched": ""},
    "checkpoints": {
        "save_checkpoint": "",
        "async_save_checkpoint": "",
        "PendingSave": "done wait",
        "load_checkpoint": "",
        "Restored": "",
        "newest_checkpoint": "",
        "checkpoints": "",
        "load_plain": "",
        "IdMap": "",
        "convert_checkpoint": "",
        "export_tables": "",
        "neighbors": "",
        "table_map": "",
    },
    "observing": {
        "profile": "",
        "observe.timing.Profile": "table as_dict",
        "memory": "",
        "observe.footprint.Memory": "table as_dict",
        "testing.compare": "",
        "testing.Report": "",
        "ShardEmbedError": "",
    },
    "planner": {
        "planner.plan": "",
        "planner.estimate": "",
        "planner.result.Planned": "gap",
        "planner.result.Estimate": "",
        "planner.Constraints": "parse",
        "planner.topology.load": "",
        "planner.topology.Topology": "scaled",
        "planner.workload.load": "",
        "planner.workload.workload_of": "",
        "planner.workload.Workload": "",
        "planner.workload.TableLoad": "",
        "planner.workload.Zipf": "",
        "planner.workload.Counts": "",
    },
}
ERRORS = "shardembed.errors"


def made(page: str) -> str:
    """The directives of one page, or of all errors."""
    if page == "errors":
        found = vars(importlib.import_module(ERRORS))
        names = [name for name, value in found.items() if isinstance(value, type) and name not in ("ShardEmbedError", "EndOfData")]
        return _fenced([f".. autoexception:: {ERRORS}.{name}" for name in names])
    return _fenced([_directive(name, members) for name, members in PAGES[page].items()])


def _fenced(directives: list[str]) -> str:
    return "\n\n".join(["```{eval-rst}", *directives, "```"])


def value_of(name: str) -> Any:
    """What `shardembed.NAME` is."""
    module, _, last = f"shardembed.{name}".rpartition(".")
    return getattr(importlib.import_module(module), last)


def _directive(name: str, members: str) -> str:
    value = value_of(name)
    kind = "autoexception" if isinstance(value, type) and issubclass(value, Exception) else "autoclass"
    kind = kind if isinstance(value, type) else "autofunction"
    # The module is imported by name, since a package may have a function of the same name as its module.
    lines = [f".. {kind}:: shardembed.{name}"]
    if members:
        lines.append(f"   :members: {', '.join(members.split())}")
    return "\n".join(lines)


def as_pages(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Our docstrings are to be read as they are; reStructuredText wants a little more of them."""
    made: list[str] = []
    for line in lines:
        before = made[-1] if made else ""
        text = next((each for each in reversed(made) if each.strip()), "")
        if line.startswith("- ") and before.strip() and not before.startswith(("- ", "  ")):
            made.append("")  # a list
        elif re.match(r"\s{4,}\S", line) and not before.strip() and re.match(r"[^\s:.]", text):
            made += ["::", ""]  # a formula, or code
        made.append(re.sub(r"(?<!`)(`[^`]+`)(?=\w)", r"\1\\ ", line))  # `TableConfig`s
    lines[:] = made


def known_elsewhere(app: Any, env: Any, node: Any, contnode: Any) -> Any:
    """A reference that no page answers: to the page of the public name, or plain text where the thing really exists."""
    if node.get("refdomain") != "py":
        return None
    target = node["reftarget"]
    if not re.fullmatch(r"[\w.]+", target):
        return contnode  # what stands in parentheses after an argument, and no name
    last = target.rpartition(".")[2]
    domain = env.get_domain("py")
    public = [known for known in domain.objects if known.rpartition(".")[2] == last and "." in known]
    for known in sorted(public, key=len)[:1] if target.startswith("shardembed.") or "." not in target else ():
        return domain.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], known, node, contnode)
    return contnode if _exists(target) else None


def _exists(target: str) -> bool:
    parts = target.split(".")
    for length in range(len(parts), 0, -1):
        try:
            value = importlib.import_module(".".join(parts[:length]))
        except ImportError:
            continue
        for part in parts[length:]:
            value = getattr(value, part, None)
        return value is not None
    return False
