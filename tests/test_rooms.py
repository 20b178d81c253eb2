"""Who may import whom, that no imports form a circle, and what `import batchnorm` loads."""

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
    "moments": {"_core", "errors", "native"},
    "scattered": {"_core", "native", "moments"},
    "functional": {"_core", "errors", "native", "moments"},
    "reference": set(),
    "folding": {"errors", "native"},
    "layer": {"_core", "errors", "native", "moments", "functional"},
    "atomic": {"errors"},
    "workers": {"errors"},
    "extras": {"errors"},
}
FRAMEWORKS = {
    "torch",
    "jax",
    "flax",
    "tensorflow",
    "keras",
    "onnx",
    "onnxruntime",
    "haiku",
    "equinox",
    "dask",
    "distributed",
    "pyarrow",
    "sklearn",
}
OTHERS = {"ml_dtypes", "scipy", "h5py", "zarr", "fsspec", "PIL", "msgpack", "safetensors"}
PRESENTATION = {"typer", "rich", "altair", "vl_convert", "pandas", "mlxtend"}
PRESENTS = {
    "cli",
    "demo",
    "bench",
    "report",
    "study",
    "progress",
    "digits",
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
    modules = [m for path in MODULES if _room(path) == name for m, _ in _imports(path)]
    inside = {m.split(".")[1] for m in modules if m.startswith("batchnorm.")}
    assert inside <= CORE[name] | {name}


@pytest.mark.parametrize("name", CORE)
def test_rooms_core_module_imports_numpy_and_the_standard_library_alone(name):
    modules = [m for path in MODULES if _room(path) == name for m, _ in _imports(path)]
    outside = {m.split(".")[0] for m in modules} - {"batchnorm"}
    assert outside <= {"numpy"} | set(sys.stdlib_module_names)


@pytest.mark.parametrize("path", [p for p in MODULES if _room(p) == "dataset"], ids=str)
def test_rooms_dataset_imports_the_core_alone(path):
    inside = {m.split(".")[1] for m, _ in _imports(path) if m.startswith("batchnorm.")}
    # Statistics write a page of themselves, as recordings do.
    page = {"report"} if path.name == "statistics.py" else set()
    assert inside <= {*CORE, "dataset"} | page


def test_rooms_the_scaler_of_scikit_learn_imports_the_core_alone():
    modules = {m for m, _ in _imports(Path("sklearn.py"))}
    assert {m.split(".")[1] for m in modules if m.startswith("batchnorm.")} <= set(CORE)
    outside = {m.split(".")[0] for m in modules} - {"batchnorm"}
    assert outside <= {"numpy", "scipy", "sklearn"} | set(sys.stdlib_module_names)


@pytest.mark.parametrize(
    "path", [p for p in MODULES if p.parts[:2] == ("dataset", "sources")], ids=str
)
def test_rooms_kinds_of_data_know_nothing_of_what_is_done_with_them(path):
    inside = {m.split(".")[2] for m, _ in _imports(path) if m.startswith("batchnorm.dataset.")}
    assert inside <= {"sources", "addresses", "files", "extras"}


@pytest.mark.parametrize(
    "path", [p for p in MODULES if _room(p) in ("diagnose", "report")], ids=str
)
def test_rooms_findings_know_no_framework(path):
    modules = {m for m, _ in _imports(path)}
    assert not {m.split(".")[0] for m in modules} & (FRAMEWORKS - {"pyarrow"})
    inside = {m.split(".")[1] for m in modules if m.startswith("batchnorm.")}
    assert inside <= {
        "diagnose",
        "report",
        "moments",
        "errors",
        "atomic",
        "extras",
        "inputs",
        "_version",
    }


# ---- circles ------------------------------------------------------------------------------------


def _dotted(path):
    parts = ["batchnorm", *path.with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _statements(node):
    """All statements below `node`, but not those that only a type checker sees."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield other
                yield from _statements(other)
        else:
            yield child
            yield from _statements(child)


def _imported_modules(source, package, modules):
    """The `modules` that a source text imports, also inside functions.

    `from package import name` imports the module `name` if there is one, and else the package.
    """
    for node in _statements(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from {alias.name for alias in node.names} & modules
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield from {full if full in modules else base} & modules


def _import_graph():
    """Module → the modules of this package that it imports."""
    paths = {_dotted(path): path for path in MODULES}
    compiled = {_dotted(p.relative_to(SOURCE)) for p in SOURCE.rglob("*.pyi")}
    graph = {name: set() for name in compiled}
    for name, path in paths.items():
        package = ["batchnorm", *path.parts[:-1]]
        found = _imported_modules((SOURCE / path).read_text(), package, {*paths, *compiled})
        graph[name] = set(found) - {name}
    return graph


def _circles(graph):
    """A shortest circle through each module that lies on one, each circle once."""
    found = {}
    for start in graph:
        before, queue = {start: None}, [start]
        for module in queue:  # breadth first
            if start in graph[module]:
                circle = [module]
                while (previous := before[circle[-1]]) is not None:
                    circle.append(previous)
                found.setdefault(frozenset(circle), [*reversed(circle), start])
                break
            for following in sorted(graph[module] - before.keys()):
                before[following] = module
                queue.append(following)
    return list(found.values())


def _room_of_module(name):
    first = [*name.split("."), "core"][1]
    return "core" if first in CORE or first == "_core" else first


@pytest.fixture(scope="module")
def circles():
    return _circles(_import_graph())


@pytest.mark.parametrize("room", sorted({_room_of_module(_dotted(path)) for path in MODULES}))
def test_rooms_imports_form_no_circle(room, circles):
    """Wherever the import stands: one inside a function only hides that two modules are one."""
    own = [circle for circle in circles if room in map(_room_of_module, circle)]
    assert not own, "\n" + "\n".join(" → ".join(circle) for circle in own)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("from . import b", {"p.a.b"}),
        ("from . import f", {"p.a"}),
        ("from .b import f", {"p.a.b"}),
        ("from ..c import f", {"p.c"}),
        ("from .. import c", {"p.c"}),
        ("import p.c", {"p.c"}),
        ("import numpy", set()),
        ("def f():\n    if x:\n        from p import c", {"p.c"}),
        ("if TYPE_CHECKING:\n    from p import c", set()),
        ("if typing.TYPE_CHECKING:\n    import p\nelse:\n    import p.c", {"p.c"}),
    ],
)
def test_imported_modules_are_found_wherever_they_are_imported(source, expected):
    assert set(_imported_modules(source, ["p", "a"], {"p", "p.a", "p.a.b", "p.c"})) == expected


def test_circles_are_shortest_and_listed_once():
    graph = {"a": {"b", "c"}, "b": {"a"}, "c": {"d"}, "d": {"e"}, "e": {"c", "b"}, "f": {"a"}}
    assert sorted(_circles(graph)) == [["a", "b", "a"], ["c", "d", "e", "c"]]


# ---- frameworks and presentation ----------------------------------------------------------------


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_rooms_presentation_packages_are_imported_where_things_are_presented(path):
    outside = {m.split(".")[0] for m, _ in _imports(path)}
    if _room(path) not in PRESENTS:
        assert not outside & PRESENTATION


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_rooms_frameworks_are_imported_in_their_own_room(path):
    # A benchmark or a command may load one, but inside the function that needs it.
    frameworks = {m.split(".")[0] for m, top in _imports(path) if top} & FRAMEWORKS
    # An experiment trains networks of PyTorch; nothing else loads its module.
    allowed = {"torch"} if _room(path) == "study" else {_room(path)}
    assert frameworks <= allowed


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_rooms_nothing_but_the_command_line_imports_the_command_line(path):
    if _room(path) not in {"cli", "__main__"}:
        assert not [m for m, _ in _imports(path) if m.startswith("batchnorm.cli")]


@pytest.mark.parametrize("path", [p for p in MODULES if _room(p) == "cli"], ids=str)
def test_rooms_commands_import_what_they_need_when_they_run(path):
    top = {m for m, at_top in _imports(path) if at_top and m.split(".")[0] == "batchnorm"}
    assert all(m == "batchnorm.errors" or m.startswith("batchnorm.cli") for m in top)


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


@pytest.mark.parametrize("name", sorted(FRAMEWORKS | PRESENTATION | OTHERS))
def test_rooms_importing_batchnorm_loads_no_other_package(loaded, name):
    assert name not in loaded


@pytest.mark.parametrize(
    "name", ["cli", "demo", "bench", "reference", "folding", "dataset", "scattered", "sklearn"]
)
def test_rooms_importing_batchnorm_loads_no_room_that_it_does_not_need(loaded, name):
    assert f"batchnorm.{name}" not in loaded


def test_rooms_every_public_name_exists():
    assert all(hasattr(batchnorm, name) for name in batchnorm.__all__)


# torch._dynamo is named where it is asked whether it has been imported.
@pytest.mark.parametrize(
    "path", [p for p in MODULES if p.parts[0] == "torch" and p.name != "internals.py"], ids=str
)
def test_rooms_use_torchs_private_modules_in_one_file_only(path):
    tree = ast.parse((SOURCE / path).read_text())
    used = {
        ast.unparse(node)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr.startswith("_")
    }
    private = {name for name in used if name.startswith(("torch._", "nn.modules.module._"))}
    imported = {m for m, _ in _imports(path) if m.startswith("torch.") and "._" in m}
    assert not private | imported


@pytest.mark.parametrize("path", [p for p in MODULES if _room(p) == "passage"], ids=str)
def test_rooms_passage_knows_frameworks_by_the_names_of_their_arrays(path):
    modules = {m for m, _ in _imports(path)}
    assert not {m.split(".")[0] for m in modules} & (FRAMEWORKS | OTHERS)
    inside = {m.split(".")[1] for m in modules if m.startswith("batchnorm.")}
    readers = {"torch", "onnx"} if path.name == "files.py" else set()  # of state dicts and graphs
    assert inside <= {"passage", "native", "errors", "atomic", "extras", "inputs"} | readers
