"""The house: no circle of imports, few types from above, each file on a floor, a small root."""

import ast
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import grimp

import fedmed_flower

PACKAGE = Path(fedmed_flower.__file__).parent
ROOT = PACKAGE.parent
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
LAYERS = CONTRACTS["contracts"][0]["layers"]


def floor_of(module):
    """Return how many floors lie above a file."""
    for number, layer in enumerate(LAYERS):
        if any(module == name or module.startswith(f"{name}.") for name in layer.split(" : ")):
            return number
    raise LookupError(f"{module} stands in no layer of [tool.importlinter] in pyproject.toml")


def files():
    for path in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
        # What a room exports, it loads when it is asked for it. Templates are copied, not imported.
        if not module.endswith("__init__") and not module.startswith("templates."):
            yield module, path


def test_each_file_stands_on_a_floor():
    for module, _ in files():
        assert 0 <= floor_of(module) < 5


def test_no_circle_of_imports():
    graph = grimp.build_graph("fedmed_flower", exclude_type_checking_imports=False)
    rooms = {module for module in graph.modules if graph.find_children(module)}
    order = {
        module: graph.find_modules_directly_imported_by(module) - rooms
        for module in graph.modules - rooms
    }
    # Raises CycleError, which names the circle.
    assert len([*TopologicalSorter(order).static_order()]) == len(graph.modules - rooms)


def test_at_most_three_types_come_from_above():
    upward = []
    for module, path in files():
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                names = [each.module for each in node.body if isinstance(each, ast.ImportFrom)]
                own = [n.removeprefix("fedmed_flower.") for n in names if "fedmed_flower" in n]
                upward += [(module, name) for name in own if floor_of(name) < floor_of(module)]
    assert len(upward) <= 3, upward


def test_few_files_stand_at_the_root():
    assert len([*PACKAGE.glob("*.py")]) <= 5
