"""The architecture of CONTRIBUTING.md: imports point down, few modules know Accelerate, none is long."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import trajdist

PACKAGE = Path(trajdist.__file__).parent
MODULES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): file
    for file in sorted(PACKAGE.rglob("*.py"))
    if "configs" not in file.parts
}
CONTRIBUTING = PACKAGE.parent / "CONTRIBUTING.md"
# A row of its table: the package, a sentence, its modules. The lowest comes first, the command line last.
ROW = re.compile(r"^\| `(\S+?)/?` \| (.+?) \| (.+?) \|$", re.MULTILINE)
ROOMS = {
    room: (sentence, re.findall(r"`(\w+)`", names)) for room, sentence, names in ROW.findall(CONTRIBUTING.read_text())
}
LEVEL_OF = {
    name if room.startswith("trajdist") else f"{room}.{name}": level
    for level, (room, (_, names)) in enumerate(ROOMS.items())
    for name in names
}
PACKAGES = [room for room in ROOMS if not room.startswith("trajdist")]
COMMAND_LINE, FOUNDATION = (ROOMS[room][1] for room in ("trajdist.cli", "trajdist"))
WITHOUT_TORCH = [name for name in ("__init__", *COMMAND_LINE, *FOUNDATION, "data.sources") if name != "artifacts"]
# These import torch themselves.
HEAVY = {"torch", "torchvision", "accelerate", "peft"}
LAZY = (ast.FunctionDef, ast.AsyncFunctionDef)


def imports(tree: ast.AST, lazy: bool = True) -> Iterator[str]:
    """Dotted names that are imported; ``lazy=False`` leaves out those inside functions and for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            # ``from trajdist.saved import bundle`` names a module, ``from ...bundle import read`` something in one.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif lazy or not (isinstance(node, LAZY) or (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node))):
            yield from imports(node, lazy)


def own_imports(module: str, lazy: bool = True) -> set[str]:
    """Modules of the package that ``module`` imports."""
    found = set()
    for name in imports(ast.parse(MODULES[module].read_text()), lazy):
        head, *parts = name.split(".")
        if head == "trajdist":
            candidates = (".".join(parts), ".".join(parts[:-1]), "__init__")
            found.add(next(candidate for candidate in candidates if candidate in MODULES))
    return found - {"__init__"}


def test_every_module_has_its_room():
    assert set(MODULES) - {"__init__", *PACKAGES} == set(LEVEL_OF), "CONTRIBUTING.md lists every module there is"


@pytest.mark.parametrize("package", PACKAGES)
def test_a_room_is_what_its_docstring_says(package):
    sentence = ast.get_docstring(ast.parse(MODULES[package].read_text()))
    assert ROOMS[package][0] == sentence.replace("``", "`")


@pytest.mark.parametrize("module", LEVEL_OF)
def test_imports_point_down(module):
    above = [name for name in own_imports(module) if LEVEL_OF.get(name, -1) > LEVEL_OF[module]]
    assert not above, f"{module} imports {above} of a higher room"


def test_no_circles():
    try:
        TopologicalSorter({module: own_imports(module) for module in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(f"these modules import each other: {error.args[1]}")


def test_few_modules_know_accelerate():
    knowing = {name for name, file in MODULES.items() if "accelerate" in roots(ast.parse(file.read_text()))}
    assert knowing == {"runtime.processes", "runtime.trackers", "training.session"}


def roots(tree: ast.AST, lazy: bool = True) -> set[str]:
    return {name.split(".")[0] for name in imports(tree, lazy)}


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_no_torch_before_it_is_needed(module):
    reached, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            # A module's package is imported first.
            waiting += {*own_imports(name, lazy=False), name.rpartition(".")[0] or "__init__"}
    heavy = {name for name in reached if HEAVY & roots(ast.parse(MODULES[name].read_text()), lazy=False)}
    assert not heavy, f"{module} imports torch by way of {heavy}"


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_short(module):
    lines = len(MODULES[module].read_text().splitlines())
    assert lines <= 400, f"{module} has {lines} lines: split it"
