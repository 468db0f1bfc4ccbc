"""The layers of the design: imports point down only, and what needs no tensors imports no torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "longrope"

# From the ground up; a module imports from its own layer's line or from lines above it in this list.
LAYERS = [
    ["errors", "hardware"],
    ["lengths", "seals", "room", "ray_cluster", "launched", "hub"],
    ["files"],
    ["factors", "folders"],
    ["runs"],
    ["baselines"],
    ["configs", "convert", "rotating"],
    ["guard"],
    ["doctor"],
    ["modes", "rope"],
    ["patch"],
    ["checkpoint"],
    ["vocabulary"],
    ["model", "doctor.loaded", "doctor.run"],
    ["conversations"],
    ["documents"],
    ["windows"],
    ["describe"],
    ["workers", "memory"],
    ["runtime"],
    ["evaluate"],
    ["search"],
    ["export"],
    ["training"],
    ["report"],
    ["extension"],
    ["planning"],
    ["api", "compare", "demo"],
    ["console", "console_tables", "watch"],
    ["cli_options"],
    [
        "cli_search",
        "cli_evaluate",
        "cli_compare",
        "cli_finetune",
        "cli_extend",
        "cli_generate",
        "cli_doctor",
        "cli_export",
        "cli_plan",
    ],
    ["cli"],
    ["__main__"],
]
WITHOUT_TORCH = (
    "watch errors lengths seals files room factors runs baselines configs convert rotating search.tasks search.space "
    "search.critical "
    "search.archive search.loop search.racing search.descent ray_cluster launched hub report console console_tables "
    "cli cli_options cli_search cli_evaluate cli_compare cli_finetune cli_extend "
    "cli_generate cli_doctor cli_export cli_plan doctor.examine doctor.run "
    "planning.shape planning.flops planning.activations planning.memory planning.precision planning.machines "
    "planning.speed planning.stages"
).split()


def layer(module: str) -> int:
    """The line that names the module itself, else the one that names its package."""
    for name in (module, module.split(".")[0]):
        for index, names in enumerate(LAYERS):
            if name in names:
                return index
    raise AssertionError(f"longrope.{module} has no layer: put it into LAYERS")


def imports(path: Path) -> list[str]:
    """Modules of ours that a file imports when it runs, below longrope; not those for type checking only."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("longrope."):
            found.append((node.module or "").removeprefix("longrope."))
        assert not (isinstance(node, ast.ImportFrom) and node.level), f"{path}: relative import"
    return found


FILES = sorted(path for path in SOURCE.rglob("*.py") if path.parent != SOURCE or path.name != "__init__.py")


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    own = layer(".".join(path.relative_to(SOURCE).with_suffix("").parts))
    for imported in imports(path):
        assert layer(imported) <= own, f"{path.name} imports longrope.{imported}, which lies above it"


def test_the_import_test_sees_an_import_that_points_up() -> None:
    assert layer("cli") > layer("model")
    assert "longrope.model" in {f"longrope.{name}" for name in imports(SOURCE / "demo.py")}


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_a_module_without_tensors_imports_no_torch(module: str) -> None:
    code = f"import sys, longrope.{module}; print(sorted({{'torch', 'transformers', 'datasets'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['longrope', '--help']\n"
        "from longrope.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: print(end.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "0 False"
