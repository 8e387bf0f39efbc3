"""The floors of the house: each module imports from its own floor or from below, never from above.

The imports are read from the source, those inside functions too; only `if TYPE_CHECKING:` is left out, since
it does not run. `docs/architecture.md` says what lives on which floor, and why.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
PACKAGE = "shardembed"
FACADE = "(facade)"
LONGEST = 400  # lines a file; a longer one is two files

FLOORS = {
    5: [FACADE, "__main__", "cli", "calibrate", "recipes"],
    4: ["modules", "convert", "checkpoint", "doctor", "embeddings", "observe", "testing", "vocab"],
    3: ["clipping", "journey", "prefetch", "loaders", "optimizer"],
    2: [
        *("ahead", "autograd", "exchange", "exposed", "fixed", "freezing", "guarded"),
        *("renorm", "route", "slab", "step", "ticket", "tracing", "twins", "wrappers"),
    ],
    1: ["beside", "comm", "heartbeat", "kernels", "lifeline", "meeting", "stages", "trouble"],
    0: [
        *(
            "_version",
            "arrow_types",
            "collate",
            "console",
            "errors",
            "explain",
            "hashing",
            "ids",
            "initial",
            "jagged",
            "layout",
            "located",
            "narrow",
            "optim",
            "optional",
            "paths",
            "placement",
            "plain_json",
        ),
        *("plan", "planner", "scalars", "sections", "settings", "shown", "slabs", "tables", "wire"),
    ],
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}

GROUP = "torch.distributed"
IMPORTERS = ("importlib.import_module", "import_module")
# Beyond the floors: the planner serves thousands of ranks without a job, kernels never see a process group,
# and communication never sees a table.
FORBIDDEN = {name: {GROUP} for name in FLOORS[0]}
FORBIDDEN["kernels"] = {GROUP, f"{PACKAGE}.comm"}
for room in ("comm", "heartbeat", "meeting", "stages", "trouble"):
    FORBIDDEN[room] = {f"{PACKAGE}.{name}" for name in ("tables", "plan", "layout", "slabs", "ids")}


def modules_of(root: Path) -> dict[str, Path]:
    """Every module of the package under `root`, by its dotted name."""
    modules = {}
    for path in sorted((root / PACKAGE).rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def running_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes of the tree but those under `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
            for other in node.orelse:
                yield other
                yield from running_nodes(other)
        else:
            yield node
            yield from running_nodes(node)


def imports_of(name: str, path: Path, known: set[str]) -> Iterator[tuple[int, str]]:
    """(line, imported name); `from a import b` is `a.b` where that is a module, else `a`."""
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node in running_nodes(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node.lineno, full if full in known or full == GROUP else base
        elif isinstance(node, ast.Attribute) and ast.unparse(node) == GROUP:
            yield node.lineno, GROUP  # `import torch` alone makes it reachable
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in IMPORTERS:
            yield from ((node.lineno, str(arg.value)) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def room_of(module: str) -> str:
    """The name that has a floor: what follows `shardembed.`, or the facade."""
    return module.split(".")[1] if "." in module else FACADE


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def complaints(root: Path) -> list[str]:
    """Everything the floors object to in the package under `root`, one line each."""
    found = []
    modules = modules_of(root)
    graph: dict[str, set[str]] = {name: set() for name in modules}
    homeless = sorted({room_of(name) for name in modules} - set(FLOOR_OF))
    found += [f"{PACKAGE}/{room}: unknown module, give it a floor in {Path(__file__).name}" for room in homeless]
    for name, path in modules.items():
        room = room_of(name)
        for line, target in imports_of(name, path, set(modules)):
            where = f"{path.relative_to(root)}:{line}: {name}"
            if any(within(target, banned) for banned in FORBIDDEN.get(room, ())):
                found.append(f"{where} must not import {target}")
            if not within(target, PACKAGE):
                continue
            if target in modules and target != name:
                graph[name].add(target)
            other = room_of(target)
            if FLOOR_OF.get(other, 0) > FLOOR_OF.get(room, max(FLOORS)):
                found.append(f"{where} (floor {FLOOR_OF[room]}) imports {target} (floor {FLOOR_OF[other]})")
    return found + [f"import cycle: {' -> '.join(cycle)}" for cycle in cycles(graph)]


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """The cycles that a depth-first walk meets: none exactly when the graph has none."""
    found: list[list[str]] = []
    done: set[str] = set()

    def walk(node: str, path: list[str]) -> None:
        if node in path:
            found.append([*path[path.index(node) :], node])
        elif node not in done:
            for target in sorted(graph[node]):
                walk(target, [*path, node])
            done.add(node)

    for node in sorted(graph):
        walk(node, [])
    return found


def test_every_module_imports_downward() -> None:
    found = complaints(REPOSITORY)
    assert not found, "\n" + "\n".join(found)


def test_the_architecture_page_has_every_module_on_its_floor() -> None:
    page = (REPOSITORY / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d) \| (.*) \|$", page, flags=re.MULTILINE)
    listed = {int(floor): set(re.findall(r"`(\w+)`", modules)) for floor, modules in rows}
    unlisted = {FACADE, "__main__", "_version"}
    assert listed == {floor: set(names) - unlisted for floor, names in FLOORS.items()}


def test_no_file_is_too_long() -> None:
    files = [path for folder in (PACKAGE, "launch") for path in sorted((REPOSITORY / folder).rglob("*.py"))]
    lengths = {str(path.relative_to(REPOSITORY)): len(path.read_text().splitlines()) for path in files}
    too_long = [f"{path}: {lines} lines" for path, lines in lengths.items() if lines > LONGEST]
    assert not too_long, f"files over {LONGEST} lines, each is two files:\n" + "\n".join(too_long)


def write_package(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / PACKAGE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.mark.parametrize(
    ("file", "text", "complaint"),
    [
        (
            "slab.py",
            "from .journey import x",
            "slab.py:1: shardembed.slab (floor 2) imports shardembed.journey (floor 3)",
        ),
        (
            "slab.py",
            "def f():\n    from shardembed import journey",
            "slab.py:2: shardembed.slab (floor 2) imports",
        ),
        (
            "route/own.py",
            "from ..journey import x",
            "shardembed.route.own (floor 2) imports shardembed.journey",
        ),
        (
            "route/__init__.py",
            "from .. import journey",
            "shardembed.route (floor 2) imports shardembed.journey",
        ),
        ("slab.py", "import importlib\nimportlib.import_module('shardembed.journey')", "slab.py:2:"),
        (
            "journey.py",
            "import shardembed as se",
            "shardembed.journey (floor 3) imports shardembed (floor 5)",
        ),
        ("journey.py", "from shardembed import Embedding", "(floor 3) imports shardembed (floor 5)"),
        ("plan.py", "import torch.distributed as dist", "must not import torch.distributed"),
        ("plan.py", "from torch import distributed", "must not import torch.distributed"),
        (
            "planner/cost.py",
            "from torch.distributed.device_mesh import x",
            "must not import torch.distributed",
        ),
        (
            "planner/cost.py",
            "import torch\nn = torch.distributed.get_rank()",
            "cost.py:2: shardembed.planner.cost must",
        ),
        ("kernels/fast.py", "from ..comm import Comm", "must not import shardembed.comm"),
        ("comm.py", "from .plan import Plan", "must not import shardembed.plan"),
        ("helpers.py", "", "shardembed/helpers: unknown module, give it a floor"),
        (
            "comm.py",
            "from . import kernels",
            "import cycle: shardembed.comm -> shardembed.kernels -> shardembed.comm",
        ),
    ],
)
def test_a_violation_is_found(tmp_path: Path, file: str, text: str, complaint: str) -> None:
    house = {
        "__init__.py": "from .journey import x",
        "journey.py": "",
        "comm.py": "",
        "plan.py": "",
        "kernels/__init__.py": "",
    }
    if "cycle" in complaint:
        house["kernels/__init__.py"] = "from ..comm import x"
    write_package(tmp_path, {**house, file: text})
    assert complaint in "\n".join(complaints(tmp_path))


def test_what_is_allowed_is_not_found(tmp_path: Path) -> None:
    write_package(
        tmp_path,
        {
            "__init__.py": "from .journey import x",
            "journey.py": "from . import slab\nfrom .comm import Comm\nfrom .optimizer import y",
            "optimizer.py": "import torch.distributed",
            "slab.py": "import typing\nif typing.TYPE_CHECKING:\n    from .journey import Journey",
            "comm.py": "from .errors import Error\nfrom torch import distributed",
            "errors.py": "import torch",
            "cli/__init__.py": "import shardembed as se\nfrom ..recipes import train",
            "recipes/__init__.py": "",
            "recipes/train.py": "from shardembed import x",
        },
    )
    assert complaints(tmp_path) == []
