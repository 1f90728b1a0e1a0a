"""The architecture of CONTRIBUTING.md: imports point down, few modules know Accelerate, none is long."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import trajdist

PACKAGE = Path(trajdist.__file__).parent
LAYERS = (
    "allocator errors launcher files plugins argument_types config config_parsing config_files sharding artifacts"
    " pictures folding linear cpu_kernels eigen doctor",
    "data.__init__ data.decode data.drawing data.base data.storage data.sources data.samples data.hub"
    " data.shard_index data.shard_cache data.shards data.cache data.loader data.labelled"
    " data.defects backbones",
    "projection trajectory models.__init__ models.reconstruction models.autoencoder models.vae models.transformer"
    " models.registry losses schedules",
    "lora checkpoint keeper bundle rundir selection pack histogram metrics calibration residuals objectives card"
    " report score_files",
    "runtime watchdog preflight progress journal clock profiling feed job loop session scorer trackers optimizer",
    "statistics validation training summary adaptation phases scoring evaluation reporting export merge audit footprint"
    " budget probe plan",
    "cli __main__ inspection __init__",
)
LAYER_OF = {module: number for number, layer in enumerate(LAYERS) for module in layer.split()}
MODULES = {
    ".".join(file.relative_to(PACKAGE).with_suffix("").parts): file
    for file in sorted(PACKAGE.rglob("*.py"))
    if "configs" not in file.parts
}
LAZY = (ast.FunctionDef, ast.AsyncFunctionDef)


def imports(tree: ast.AST, lazy: bool = True) -> Iterator[str]:
    """Dotted names that are imported; ``lazy=False`` leaves out those inside functions and for type checkers."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            # ``from trajdist import bundle`` names a module, ``from trajdist.bundle import read`` something in one.
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


def test_every_module_has_a_layer():
    unknown = set(MODULES) - set(LAYER_OF)
    assert not unknown, f"give {sorted(unknown)} a layer in LAYERS of {__file__} and in CONTRIBUTING.md"


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module):
    above = [name for name in own_imports(module) if LAYER_OF.get(name, 99) > LAYER_OF.get(module, 0)]
    assert not above, f"{module} (layer {LAYER_OF[module]}) imports {above} of a higher layer"


def test_no_circles():
    try:
        TopologicalSorter({module: own_imports(module) for module in MODULES}).prepare()
    except CycleError as error:
        pytest.fail(f"these modules import each other: {error.args[1]}")


def test_few_modules_know_accelerate():
    knowing = {name for name, file in MODULES.items() if "accelerate" in roots(ast.parse(file.read_text()))}
    assert knowing <= {"job", "loop", "runtime", "session", "trackers"}


def roots(tree: ast.AST, lazy: bool = True) -> set[str]:
    return {name.split(".")[0] for name in imports(tree, lazy)}


@pytest.mark.parametrize("module", ["__init__", "__main__", "cli", "config", "errors"])
def test_no_torch_before_it_is_needed(module):
    reached, waiting = set(), [module]
    while waiting:
        name = waiting.pop()
        if name not in reached:
            reached.add(name)
            waiting += own_imports(name, lazy=False)
    heavy = {name for name in reached if "torch" in roots(ast.parse(MODULES[name].read_text()), lazy=False)}
    assert not heavy, f"{module} imports torch by way of {heavy}"


@pytest.mark.parametrize("module", MODULES)
def test_modules_are_short(module):
    lines = len(MODULES[module].read_text().splitlines())
    assert lines <= 400, f"{module} has {lines} lines: split it"
