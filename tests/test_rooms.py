"""Who may import whom, and that `import batchnorm` loads no framework."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import batchnorm

SOURCE = Path(batchnorm.__file__).parent
MODULES = sorted(p.relative_to(SOURCE) for p in SOURCE.rglob("*.py"))

# What each module of the core may import from the package.
CORE = {
    "errors": set(),
    "_version": set(),
    "native": {"_core", "errors", "_version"},
    "moments": {"_core", "errors", "native", "dataset"},  # the last for Dask arrays, when they come
    "functional": {"_core", "errors", "native", "moments"},
    "reference": {"errors", "moments"},
    "folding": {"errors", "moments"},
    "layer": {"errors", "native", "moments", "functional"},
    "atomic": {"errors"},
}
FRAMEWORKS = {
    "torch",
    "jax",
    "flax",
    "tensorflow",
    "keras",
    "onnx",
    "dask",
    "distributed",
    "pyarrow",
}
PRESENTATION = {"typer", "rich", "altair", "vl_convert", "pandas", "mlxtend"}
PRESENTS = {
    "cli",
    "demo",
    "bench",
    "report",
    "study",
    "progress",
    "__main__",
}  # rooms that may load those


def _room(path):
    return path.with_suffix("").parts[0]


def _imports(path):
    """(module, top level of the file?) of each import, relative ones made absolute."""
    tree = ast.parse((SOURCE / path).read_text())
    package = ["batchnorm", *path.parts[:-1]]
    top = set(map(id, tree.body))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.name, id(node) in top
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            if module == "batchnorm" and path.parts[-1] != "__init__.py":
                for alias in node.names:
                    yield f"batchnorm.{alias.name}", id(node) in top
            else:
                yield module, id(node) in top


@pytest.mark.parametrize("name", CORE)
def test_rooms_core_module_imports_only_what_stands_below_it(name):
    inside = {
        m.split(".")[1] for m, _ in _imports(Path(f"{name}.py")) if m.startswith("batchnorm.")
    }
    assert inside <= CORE[name]


@pytest.mark.parametrize("name", CORE)
def test_rooms_core_module_imports_numpy_and_the_standard_library_alone(name):
    outside = {m.split(".")[0] for m, _ in _imports(Path(f"{name}.py"))} - {"batchnorm"}
    assert outside <= {"numpy"} | set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", [p for p in MODULES if _room(p) == "dataset"], ids=str)
def test_rooms_dataset_imports_the_core_alone(path):
    inside = {m.split(".")[1] for m, _ in _imports(path) if m.startswith("batchnorm.")}
    assert inside <= {*CORE, "dataset"}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_rooms_presentation_packages_are_imported_where_things_are_presented(path):
    outside = {m.split(".")[0] for m, _ in _imports(path)}
    if _room(path) not in PRESENTS:
        assert not outside & PRESENTATION


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_rooms_frameworks_are_imported_in_their_own_room(path):
    # A benchmark or a command may load one, but inside the function that needs it.
    frameworks = {m.split(".")[0] for m, top in _imports(path) if top} & FRAMEWORKS
    assert frameworks <= {_room(path)}


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_rooms_nothing_but_the_command_line_imports_the_command_line(path):
    if _room(path) not in {"cli", "__main__"}:
        assert "batchnorm.cli" not in {m for m, _ in _imports(path)}


@pytest.fixture(scope="module")
def loaded():
    """What a fresh interpreter has loaded after `import batchnorm`."""
    done = subprocess.run(
        [sys.executable, "-c", "import sys, batchnorm; print(*sys.modules)"],
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return set(done.stdout.split())


@pytest.mark.parametrize("name", sorted(FRAMEWORKS | PRESENTATION | {"ml_dtypes", "scipy"}))
def test_rooms_importing_batchnorm_loads_no_other_package(loaded, name):
    assert name not in loaded


@pytest.mark.parametrize("name", ["cli", "demo", "bench", "reference", "folding", "dataset"])
def test_rooms_importing_batchnorm_loads_no_room_that_it_does_not_need(loaded, name):
    assert f"batchnorm.{name}" not in loaded


def test_rooms_every_public_name_exists():
    assert all(hasattr(batchnorm, name) for name in batchnorm.__all__)
