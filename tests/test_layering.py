"""The house's floors: a module imports only from its own or a lower one, and some names stay in one file."""

import ast
import graphlib
import pathlib
import re
import subprocess
import sys

import pytest

PACKAGE = pathlib.Path(__file__).resolve().parent.parent / "jaxcifar"

# Floor of every module; a package's modules share its floor unless they are named themselves.
FLOORS = {
    "errors": 0, "command": 0,
    "config": 1, "optim": 1, "schedules": 1, "plateau": 1, "metrics": 1, "streams": 1,
    "selection": 1, "augment": 1, "models": 1, "partition": 1, "overrides": 1,
    "task": 2, "state": 2, "steps": 2, "epoch": 2,
    "data": 3, "splits": 3, "parallel": 3, "checkpoint": 3, "torch_weights": 3, "logs": 3,
    "run_folder": 3, "environment": 3, "event_files": 3, "host": 3, "programs": 3, "run": 3,
    "weight_files": 3, "init_from": 3, "features": 3,
    "saved": 3, "convert": 4, "seeds": 4, "together": 4,
    "train": 4, "main": 4, "report": 4, "benchmark": 4,
    "inference": 4, "predict": 4, "evaluate": 4,
    "search_space": 1, "study": 4, "tune": 4,
    "muon": 1, "speedrun": 4,
    "trace": 3, "profiling": 4, "gpu_program": 4,
}
MODULES = sorted(PACKAGE.rglob("*.py"))


def imports(path, *, at_once=False):
    """Return the dotted names that a module imports; at_once: when it is imported itself."""
    names, tree = set(), ast.parse(path.read_text(encoding="utf-8"))
    for node in tree.body if at_once else ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports are not looked at here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def room(path):
    """Return the top-level name under jaxcifar of a module file."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_a_module_imports_only_from_its_floor_or_below(path):
    if path == PACKAGE / "__init__.py":
        assert not imports(path), "the package's __init__ imports nothing"
        return
    assert room(path) in FLOORS, f"{room(path)}: give it a floor"
    floor = FLOORS[room(path)]
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "jaxcifar" and len(parts) > 1:
            assert FLOORS[parts[1]] <= floor, f"{path.name} (floor {floor}) imports {name}"


def module_name(path):
    """Return the dotted name of a module file; a package's is that of its folder."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_module_imports_itself_through_others():
    names = {module_name(path) for path in MODULES}

    def module(name):  # of "jaxcifar.errors.UserError"
        parts = name.split(".")
        return next((part for n in range(len(parts), 0, -1)
                     if (part := ".".join(parts[:n])) in names), None)

    graph = {module_name(path): {module(name) for name in imports(path, at_once=True)} - {None}
             for path in MODULES}
    order = list(graphlib.TopologicalSorter(graph).static_order())  # CycleError names the circle
    assert len(order) == len(names) > 100


def test_only_parallel_knows_devices():
    users = {path.name for path in MODULES
             if re.search(r"jax\.(pmap|shard_map)\b|\bMesh\(|NamedSharding",
                          path.read_text(encoding="utf-8"))}
    assert users == {"parallel.py"}


@pytest.mark.parametrize(("package", "owners"), [
    ("orbax", {"checkpoint"}),
    ("time", {"logs", "data"}),  # data: waits between the attempts of a download
    ("tensorflow", set()),  # what reads tfrecord folders goes through tensorflow_datasets
    ("torch", {"weight_files", "benchmark", "speedrun"}),
    ("tensorflow_datasets", {"data"}),
])
def test_some_packages_have_one_owner(package, owners):
    users = {room(path) for path in MODULES
             if any(name.split(".")[0] == package for name in imports(path))}
    assert users == owners


IMPORT_ALL = """
import importlib, sys
for name in ("torch", "optuna", "tensorboard"):
    sys.modules[name] = None  # to import it is an ImportError
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def test_every_module_is_imported_without_the_optional_packages():
    names = [".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts) for path in MODULES
             if path.name not in ("__main__.py", "__init__.py")]
    # One by one: each of these defines flags of its own.
    programs = [n for n in names if n.split(".")[-1] in ("evaluate", "predict", "tune", "gpu_program")]
    rest = [name for name in names if name not in programs]
    assert len(rest) > 100 and len(programs) == 4
    for group in (rest, *([name] for name in programs)):
        done = subprocess.run([sys.executable, "-c", IMPORT_ALL, *group], cwd=PACKAGE.parent,
                              capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-1000:]


def test_files_stay_readable():
    for path in MODULES:
        limit = 200 if "models" in path.parts and path.name not in ("layers.py", "conv.py") else 400
        lines = path.read_text(encoding="utf-8").splitlines()
        assert len(lines) <= limit, f"{path.name} has {len(lines)} lines"
        assert path.name != "utils.py"


def test_public_functions_have_docstrings():
    missing = []
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        missing += [f"{path.name}: {node.name}" for node in tree.body
                    if isinstance(node, (ast.FunctionDef, ast.ClassDef))
                    and not node.name.startswith("_") and not ast.get_docstring(node)]
    assert not missing
