"""No module of the package imports another in a circle, types included: they say who knows whom."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "qlora_lightning"


def name_of(file):
    return ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")


def test_no_module_imports_another_in_a_circle():
    files = {name_of(file): file for file in PACKAGE.rglob("*.py")}
    imports = {name: set() for name in files}
    for name, file in files.items():
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module in files:
                imported = {f"{node.module}.{each.name}" for each in node.names}
                imports[name] |= (imported & files.keys()) or {node.module}
            elif isinstance(node, ast.Import):
                imports[name] |= {each.name for each in node.names} & files.keys()
    order = [*TopologicalSorter(imports).static_order()]  # raises CycleError, which names the circle
    assert order.index("qlora_lightning.support.errors") < order.index("qlora_lightning.model.module")
