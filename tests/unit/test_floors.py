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

# A room is a folder of the package, or a public module beside them; a folder in a folder may have a floor of its own.
FLOORS = {
    7: [FACADE, "__main__", "cli", "planner/calibrate", "recipes"],
    6: ["checkpoint", "convert", "doctor", "embeddings", "modules", "observe", "testing"],
    5: ["journey", "optimizer"],
    4: ["store"],
    3: ["inputs"],
    2: ["comm", "kernels", "planner"],
    1: ["optim", "tables", "wire"],
    0: ["_version", "config", "errors"],
}
FLOOR_OF = {name: floor for floor, names in FLOORS.items() for name in names}
ENTRIES = 26  # at most, at the top of the package: more is a pile

GROUP = "torch.distributed"
IMPORTERS = ("importlib.import_module", "import_module")
# Beyond the floors: the planner serves thousands of ranks without a job, kernels never see a process group,
# and communication never sees a table.
FORBIDDEN = {name: {GROUP} for floor in (0, 1) for name in FLOORS[floor]}
FORBIDDEN["inputs"] = {GROUP}
FORBIDDEN["planner"] = {GROUP, f"{PACKAGE}.comm"}
FORBIDDEN["kernels"] = {GROUP, f"{PACKAGE}.comm"}
FORBIDDEN["comm"] = {f"{PACKAGE}.{name}" for name in ("tables", "wire", "planner")}


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
    """The name that has a floor: what follows `shardembed.`, as deep as floors are given, or the facade."""
    parts = module.split(".")[1:]
    names = ("/".join(parts[:depth]) for depth in range(len(parts), 1, -1))
    return next((name for name in names if name in FLOOR_OF), parts[0] if parts else FACADE)


def is_there(path: str) -> bool:
    """From the top of the repository, or of the package."""
    return any((top / path).exists() for top in (REPOSITORY, REPOSITORY / PACKAGE))


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def complaints(root: Path) -> list[str]:
    """Everything the floors object to in the package under `root`, one line each."""
    found = []
    modules = modules_of(root)
    graph: dict[str, set[str]] = {name: set() for name in modules}
    homeless = sorted({room_of(name) for name in modules} - set(FLOOR_OF))
    found += [f"{PACKAGE}/{room}: unknown room, give it a floor in {Path(__file__).name}" for room in homeless]
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


def test_the_architecture_page_has_every_room_on_its_floor() -> None:
    page = (REPOSITORY / "docs" / "architecture.md").read_text()
    rows = re.findall(r"^\| (\d) \| (.*) \|$", page, flags=re.MULTILINE)
    listed = {int(floor): set(re.findall(r"`([\w/]+)`", rooms)) for floor, rooms in rows}
    unlisted = {FACADE, "__main__", "_version"}
    assert listed == {floor: set(names) - unlisted for floor, names in FLOORS.items()}


@pytest.mark.parametrize("page", ["docs/architecture.md", "CONTRIBUTING.md", "SECURITY.md", "README.md"])
def test_a_page_names_files_that_are_there(page: str) -> None:
    """By their paths, or by the ends of these where it is clear which room is spoken of."""
    text = re.sub(r"^```.*?^```$", "", (REPOSITORY / page).read_text(), flags=re.MULTILINE | re.DOTALL)
    files = [f"/{path.relative_to(REPOSITORY)}" for path in (REPOSITORY / PACKAGE).rglob("*.py")]
    named = set(re.findall(r"`([\w/]+\.py)`", text))
    gone = sorted(name for name in named if not is_there(name) and not any(file.endswith(f"/{name}") for file in files))
    assert not gone, f"{page} names {gone}, which is not there"


def test_the_package_has_few_entries() -> None:
    entries = sorted(path.name for path in (REPOSITORY / PACKAGE).iterdir() if path.name != "__pycache__")
    assert len(entries) <= ENTRIES, f"{len(entries)} entries at the top of the package: {entries}"


def test_every_room_says_what_it_is_for() -> None:
    """A README in each folder: what lives here, what may be imported, where to add a thing."""
    folders = {path.parent for path in modules_of(REPOSITORY).values()}
    silent = [str(folder.relative_to(REPOSITORY)) for folder in sorted(folders) if not (folder / "README.md").is_file()]
    assert not silent, f"folders without a README.md: {silent}"


def test_every_readme_names_the_files_that_lie_beside_it() -> None:
    for readme in sorted((REPOSITORY / PACKAGE).rglob("README.md")):
        named = set(re.findall(r"`([\w/]+(?:\.py|/))`", readme.read_text()))
        here = {path.name for path in readme.parent.glob("*.py") if path.stem not in ("__init__", "__main__", "_version")}
        here |= {f"{path.parent.name}/" for path in readme.parent.glob("*/__init__.py")}
        where = readme.relative_to(REPOSITORY)
        assert here <= named, f"{where} does not say what {sorted(here - named)} is for"
        beside = {name for name in named if "/" not in name.rstrip("/")}
        gone = sorted(beside - here) + sorted(name for name in named - beside if not is_there(name))
        assert not gone, f"{where} names {gone}, which is not there"


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


HOUSE = {
    "__init__.py": "from .journey.journey import x",
    "journey/__init__.py": "",
    "journey/journey.py": "",
    "store/__init__.py": "",
    "store/slab.py": "",
    "comm/__init__.py": "",
    "comm/comm.py": "",
    "kernels/__init__.py": "",
    "tables/__init__.py": "",
    "tables/plan.py": "",
    "planner/__init__.py": "",
}
VIOLATIONS = [
    (
        "store/slab.py",
        "from ..journey.journey import x",
        "store/slab.py:1: shardembed.store.slab (floor 4) imports shardembed.journey.journey (floor 5)",
    ),
    ("store/slab.py", "def f():\n    from shardembed import journey", "store/slab.py:2: shardembed.store.slab (floor 4) imports"),
    ("store/in/own.py", "from ...journey import x", "shardembed.store.in.own (floor 4) imports shardembed.journey"),
    ("store/__init__.py", "from .. import journey", "shardembed.store (floor 4) imports shardembed.journey"),
    ("store/slab.py", "import importlib\nimportlib.import_module('shardembed.journey')", "store/slab.py:2:"),
    ("journey/journey.py", "import shardembed as se", "shardembed.journey.journey (floor 5) imports shardembed (floor 7)"),
    ("journey/journey.py", "from shardembed import Embedding", "(floor 5) imports shardembed (floor 7)"),
    ("tables/plan.py", "import torch.distributed as dist", "must not import torch.distributed"),
    ("tables/plan.py", "from torch import distributed", "must not import torch.distributed"),
    ("planner/cost.py", "from torch.distributed.device_mesh import x", "must not import torch.distributed"),
    ("planner/cost.py", "import torch\nn = torch.distributed.get_rank()", "cost.py:2: shardembed.planner.cost must"),
    ("planner/cost.py", "from .calibrate import fit", "shardembed.planner.cost (floor 2) imports shardembed.planner.calibrate"),
    ("kernels/fast.py", "from ..comm.comm import Comm", "must not import shardembed.comm"),
    ("comm/comm.py", "from ..tables.plan import Plan", "must not import shardembed.tables"),
    ("helpers.py", "", "shardembed/helpers: unknown room, give it a floor"),
    (
        "store/slab.py",
        "from . import twins",
        "import cycle: shardembed.store.slab -> shardembed.store.twins -> shardembed.store.slab",
    ),
]


@pytest.mark.parametrize(("file", "text", "complaint"), VIOLATIONS)
def test_a_violation_is_found(tmp_path: Path, file: str, text: str, complaint: str) -> None:
    house = {**HOUSE, "planner/calibrate/__init__.py": "", "planner/calibrate/fit.py": ""}
    if "cycle" in complaint:
        house["store/twins.py"] = "from .slab import x"
    write_package(tmp_path, {**house, file: text})
    assert complaint in "\n".join(complaints(tmp_path))


def test_what_is_allowed_is_not_found(tmp_path: Path) -> None:
    allowed = {
        "journey/journey.py": "from ..store import slab\nfrom ..comm.comm import Comm\nfrom .ticket import y",
        "journey/ticket.py": "import torch.distributed",
        "store/slab.py": "import typing\nif typing.TYPE_CHECKING:\n    from ..journey.journey import Journey",
        "comm/comm.py": "from ..errors import Error\nfrom torch import distributed",
        "errors.py": "import torch",
        "planner/calibrate/__init__.py": "import torch.distributed\nfrom ...journey.journey import Journey",
        "cli/__init__.py": "import shardembed as se\nfrom ..recipes import train",
        "recipes/__init__.py": "",
        "recipes/train.py": "from shardembed import x",
    }
    write_package(tmp_path, {**HOUSE, **allowed})
    assert complaints(tmp_path) == []
