"""Imports in the package point one way: no cycle, and no lower layer knows a higher one.

Every import counts, also those inside functions and under TYPE_CHECKING, and modules imported by name.
"""

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import realtime

LAYERS = (
    # From low to high: a module may import from its own layer and from lower ones. What is not named
    # here is held to the absence of cycles only. A package's name stands for what is inside it and not named.
    ("protocol", "errors", "settings", "control", "log", "idle", "doorbell", "pace"),
    ("client", "store", "observe", "background", "offload", "http"),
    ("session", "conversation", "view", "viewers", "decoding", "opening"),
    ("access",),
    ("live", "hub", "cursor", "responders", "usage", "lease"),
    ("journal", "tasks.registry", "tasks.queue", "tasks.desk", "tasks.record", "tasks.tools"),
    ("turn", "snapshot", "call"),
    ("commands",),
    ("engine",),
    ("asides", "inbox", "feed", "upkeep"),
    ("connection", "sse"),
    ("connections",),
    ("websocket", "oneshot", "sessions"),
    ("tasks",),
    ("drain", "parts"),
    ("page", "app", "tasks.process"),
    ("server", "chat", "chat_commands", "absence", "screen", "printing", "keyboard"),
    ("workers",),
    ("cli",),
)

Graph = dict[str, set[str]]


def import_graph(package: Path) -> Graph:
    """Return which modules of the package each of its modules imports, by their full names."""
    files = {module_name(package, file): file for file in sorted(package.rglob("*.py"))}
    graph = {}
    for module, file in files.items():
        here = module if file.name == "__init__.py" else module.rpartition(".")[0]
        imported = set(imports_of(ast.parse(file.read_text(), str(file)), here))
        graph[module] = {resolved for name in imported if (resolved := known(name, files))} - {module}
    return graph


def module_name(package: Path, file: Path) -> str:
    """Return the full name of the module that the file holds."""
    parts = file.relative_to(package.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(tree: ast.Module, here: str) -> Iterator[str]:
    """Yield what the module imports, wherever in it; `here` is the package that it is in.

    `from a import b` yields `a.b`: whether that is a module or something inside `a` the caller knows.
    """
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (name.name for name in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                base = here.rsplit(".", level - 1)[0] if level else ""
                source = ".".join(part for part in (base, module) if part)
                yield from (f"{source}.{name.name}" for name in names)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__") | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield name


def known(name: str, modules: dict[str, Path]) -> str | None:
    """Return the module of the package that the import is of, or None where it is of something else."""
    while name and name not in modules:
        name = name.rpartition(".")[0]
    return name or None


def find_cycle(graph: Graph) -> list[str] | None:
    """Return the modules of one cycle, each imported by the next and the last being the first, or None."""
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        cycle: list[str] = error.args[1]
        return cycle
    return None


def wrong_way(graph: Graph, package: str) -> list[str]:
    """Return the imports that point from a lower layer to a higher one."""
    found = []
    for module, imported in sorted(graph.items()):
        own = layer_of(module, package)
        for other in sorted(imported):
            theirs = layer_of(other, package)
            if own is not None and theirs is not None and theirs > own:
                found.append(f"{module} imports {other}")
    return found


def layer_of(module: str, package: str) -> int | None:
    """Return the number of the module's layer, or None if it has none."""
    inside = module.removeprefix(f"{package}.")
    whole = inside.split(".")[0]
    layers = {name: number for number, names in enumerate(LAYERS) for name in names}
    return layers.get(inside, layers.get(whole))


GRAPH = import_graph(Path(realtime.__file__).parent)


def test_there_is_no_import_cycle() -> None:
    """No module imports itself through others."""
    cycle = find_cycle(GRAPH)
    assert cycle is None, "a cycle (each is imported by the next): " + ", ".join(cycle or [])


def test_imports_point_down() -> None:
    """No module imports from a layer above its own."""
    assert wrong_way(GRAPH, "realtime") == []


def test_the_graph_is_of_this_package() -> None:
    """The package was found and read: it has modules, and some import others."""
    assert "realtime" in GRAPH
    assert len(GRAPH) > 5
    assert any(GRAPH.values())


def write_package(folder: Path, sources: dict[str, str]) -> Path:
    """Write a package called `made` of these files; return its folder."""
    package = folder / "made"
    for name, source in {"__init__.py": "", **sources}.items():
        file = package / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(source)
    return package


@pytest.mark.parametrize(
    "back",
    [
        "import made.first",
        "from made import first",
        "from made.first import anything",
        "from . import first",
        "from .first import anything as other",
        "def late():\n    from made import first",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from made.first import Anything",
        "import importlib\ndef late():\n    importlib.import_module('made.first')",
    ],
)
def test_a_cycle_is_found_however_it_is_written(tmp_path: Path, back: str) -> None:
    """Two modules that import each other are a cycle, in each way to import."""
    package = write_package(tmp_path, {"first.py": "from made import second", "second.py": back})
    assert set(find_cycle(import_graph(package)) or []) == {"made.first", "made.second"}


def test_a_long_cycle_through_packages_is_found(tmp_path: Path) -> None:
    """A package's own module counts, and so do relative imports out of it."""
    package = write_package(
        tmp_path,
        {
            "inner/__init__.py": "from made.inner.leaf import thing",
            "inner/leaf.py": "from ..top import thing",
            "top.py": "from made.inner import thing",
        },
    )
    assert set(find_cycle(import_graph(package)) or []) == {"made.inner", "made.inner.leaf", "made.top"}


def test_a_graph_without_a_cycle_passes(tmp_path: Path) -> None:
    """A diamond is not a cycle, and what is outside the package is not in the graph."""
    package = write_package(
        tmp_path,
        {
            "top.py": "from made import left, right\nimport os",
            "left.py": "import made.base",
            "right.py": "from . import base",
            "base.py": "",
        },
    )
    graph = import_graph(package)
    assert find_cycle(graph) is None
    assert graph["made.top"] == {"made.left", "made.right"}


def test_an_import_that_points_up_is_found() -> None:
    """A layer may not import a higher one, nor what is inside it; its own, lower and unknown ones it may."""
    graph = {
        "made.log": {"made.store.base", "made.errors", "made.other"},
        "made.store.base": {"made.log"},
        "made.store.redis": {"made.hub", "made.store.base"},
    }
    assert wrong_way(graph, "made") == [
        "made.log imports made.store.base",
        "made.store.redis imports made.hub",
    ]
