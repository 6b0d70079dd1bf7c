"""Who may import whom, as data; every import statement of the project is parsed and held against it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("flows", "workers", "schemas")

# A ring may import the rings named after it; the parts of one ring may not import each other.
NUMERICS = ("workers.tiling", "workers.cam", "workers.stitching", "workers.metrics")
IO = ("workers.readers", "workers.models", "workers.store")
LEAVES = ("workers.synthetic", "workers.training")
EXECUTION = (
    "workers.allocator",
    "workers.decoding",
    "workers.explainer",
    "workers.reducer",
    "workers.embedder",
    "workers.imported",
    "workers.attributor",
    "workers.inside",
    "workers.ranker",
    "workers.stitcher",
    "workers.publisher",
    "workers.bag_plan",
    "workers.planner",
    "workers.costs",
    "workers.evaluator",
    "workers.trust",
    "workers.trainer",
    "workers.provenance",
    "workers.pool",
    "workers.dispatch",
    "workers.ray_pool",
)
APPS = ("workers.viewer", "workers.export", "workers.report")

RINGS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("schemas",), ()),
    (NUMERICS, ("schemas",)),
    (IO, ("schemas", *NUMERICS)),
    (LEAVES, ("schemas", *NUMERICS, "workers.readers", "workers.models")),
    (EXECUTION, ("schemas", *NUMERICS, *IO, *LEAVES)),
    (APPS, ("schemas", "workers.store", "workers.stitching", "workers.readers", "workers.metrics")),
    (("flows",), ("schemas", *NUMERICS, *IO, *LEAVES, *EXECUTION, *APPS)),
)
MAY_IMPORT = {part: frozenset(below) for parts, below in RINGS for part in parts}

SIDEWAYS = {
    ("workers.explainer", "workers.allocator"): "keeps the memory of one batch for the next",
    ("workers.explainer", "workers.decoding"): "is fed by the threads that read ahead",
    ("workers.explainer", "workers.pool"): "names the task type it is handed",
    ("workers.reducer", "workers.pool"): "names the task type it is handed",
    ("workers.reducer", "workers.explainer"): "sums the tiles it reads, from the same store",
    ("workers.embedder", "workers.pool"): "names the task type it is handed",
    ("workers.embedder", "workers.explainer"): "embeds the tiles it reads, for the same store",
    ("workers.imported", "workers.explainer"): "embeds a few tiles again, as it does",
    ("workers.attributor", "workers.pool"): "names the task type it is handed",
    ("workers.attributor", "workers.explainer"): "opens the store that was planned, as it does",
    ("workers.inside", "workers.pool"): "names the task type it is handed",
    ("workers.inside", "workers.explainer"): "explains the tiles it reads, for the same store",
    ("workers.inside", "workers.imported"): "compares embeddings as it does",
    ("workers.ranker", "workers.pool"): "names the task type it is handed",
    ("workers.ranker", "workers.explainer"): "reads the best tiles again, from the same store",
    ("workers.stitcher", "workers.pool"): "names the task type it is handed",
    ("workers.planner", "workers.explainer"): "names the device it runs on",
    ("workers.planner", "workers.provenance"): "writes down what the plan was made with",
    ("workers.planner", "workers.bag_plan"): "plans what only a bag has",
    ("workers.planner", "workers.imported"): "lays the tiles of features made elsewhere",
    ("workers.costs", "workers.planner"): "counts what was planned",
    ("workers.costs", "workers.bag_plan"): "counts what only a bag has",
    ("workers.costs", "workers.explainer"): "times one batch, and names the device it runs on",
    ("workers.costs", "workers.provenance"): "estimates from rates that were measured",
    ("workers.trust", "workers.evaluator"): "reads truth as it does",
    ("workers.dispatch", "workers.pool"): "plans the stages and tasks of the protocol",
    ("workers.ray_pool", "workers.pool"): "is one of its pools",
    ("workers.ray_pool", "workers.dispatch"): "is driven by it",
    ("workers.ray_pool", "workers.allocator"): "has the environment its actors need for it",
    ("workers.pool", "workers.ray_pool"): "opens the pool asked for, imported on demand",
    ("workers.report", "workers.export"): "draws and words what the pictures beside a heatmap do",
    ("workers.viewer", "workers.export"): "its pictures and volumes look and lie as the files do",
    ("workers.viewer", "workers.report"): "leaves out of messages what reports leave out",
    ("workers.synthetic", "workers.training"): "its networks are fitted by the trainer users have",
}
"""The edges inside a ring, each with its reason."""

LIBRARIES: dict[str, frozenset[str]] = {
    "schemas": frozenset({"pydantic"}),
    "workers.tiling": frozenset({"numpy", "scipy", "skimage"}),
    "workers.stitching": frozenset({"numpy", "scipy", "skimage"}),
    "workers.metrics": frozenset({"numpy", "scipy", "skimage"}),
    "workers.cam": frozenset({"numpy", "pydantic", "scipy", "skimage", "torch"}),
    "flows": frozenset({"packaging", "prefect", "pydantic", "rich", "typer", "uvicorn"}),
}
"""Where only these third-party packages belong: definitions, numerics, and the layer that computes nothing."""

ONLY_IN = {
    "prefect": ("flows",),
    "typer": (
        "flows.cli",
        "flows.options",
        "flows.embedding",
        "flows.export",
        "flows.report",
        "flows.desktop",
        "flows.view",
        "flows.training",
    ),
    "ray": ("workers.ray_pool",),
    "openslide": ("workers.readers.slide",),
    "monai": ("workers.models", "workers.readers"),
    "h5py": ("workers.readers", "workers.export"),
    "torch": (
        "workers.cam",
        "workers.models",
        "workers.training",
        "workers.synthetic.models",
        "workers.explainer",
        "workers.attributor",
        "workers.inside",
        "workers.ranker",
        "workers.reducer",
        "workers.trust",
    ),
    "zarr": ("workers.store", "workers.readers", "workers.export", "workers.viewer"),
    "dask": ("workers.store", "workers.readers", "workers.export"),
    "pydicom": ("workers.readers", "workers.export"),
    "starlette": ("workers.viewer",),
}
"""Where a heavy library may be imported at all."""

ONE_FILE_A_PART = ("ray", "openslide", "monai", "dask", "pydicom")
"""Of these, one file of a part imports each: its role there."""


def module_name(path: Path, root: Path = ROOT) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(source: str) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of all that `source` imports, inside functions and by `import_module` too."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            for alias in node.names:
                yield node.lineno, f"{prefix}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args:
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            first = node.args[0]
            if name in ("import_module", "__import__") and isinstance(first, ast.Constant):
                yield node.lineno, str(first.value)


def inside(name: str, place: str) -> bool:
    return name == place or name.startswith(place + ".")


def part_of(name: str, parts: Mapping[str, object] = MAY_IMPORT) -> str | None:
    """The row of the table a module belongs to."""
    return next((part for part in sorted(parts, key=len, reverse=True) if inside(name, part)), None)


def faults(module: str, source: str) -> list[str]:
    """What `module` imports against the tables, as readable lines."""
    found: list[str] = []
    part = part_of(module)
    if part is None:
        return [] if module == "workers" and not source.strip() else [f"{module}: not in the table of rings"]
    for line, name in imports(source):
        top = name.split(".")[0]
        where = f"{module}:{line} imports {name}"
        if not top:
            found.append(f"{where}: imports are absolute")
        elif top == "tests":
            found.append(f"{where}: the tests are not part of the application")
        elif top in PACKAGES:
            target = part_of(name)
            if target is None:
                found.append(f"{where}: not in the table of rings")
            elif target != part and target not in MAY_IMPORT[part] and (part, target) not in SIDEWAYS:
                found.append(f"{where}: {part} may not import {target}")
        elif top not in sys.stdlib_module_names and top != "__future__":
            if part in LIBRARIES and top not in LIBRARIES[part]:
                found.append(f"{where}: {part} may use only {', '.join(sorted(LIBRARIES[part]))}")
            elif top in ONLY_IN and not any(inside(module, place) for place in ONLY_IN[top]):
                found.append(f"{where}: {top} belongs in {', '.join(ONLY_IN[top])} only")
    return found


def project_files() -> list[Path]:
    return sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def tracked_files() -> list[Path]:
    """Every file the repository holds."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    return [path for name in listed.split("\0") if name and (path := ROOT / name).is_file()]


def third_party_imports() -> Iterator[tuple[str, str]]:
    """Module and top-level name of each third-party import."""
    for path in project_files():
        for _, name in imports(path.read_text(encoding="utf-8")):
            top = name.split(".")[0]
            if top and top not in PACKAGES and top not in sys.stdlib_module_names:
                yield module_name(path), top


def test_every_import_points_inward() -> None:
    found = [
        fault
        for path in project_files()
        for fault in faults(module_name(path), path.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("schemas.grid", "import numpy as np"),
        ("schemas.grid", "from workers.tiling.plan import tiles"),
        ("workers.tiling.plan", "from workers.stitching import blend"),
        ("workers.tiling.plan", "def f():\n    import torch"),
        ("workers.stitching.blend", "from workers.store.tiles import TilesStore"),
        ("workers.readers.volume", "from workers.store.tiles import TilesStore"),
        ("workers.readers.volume", "import openslide"),
        ("workers.export.geojson", "from workers.explainer import Explainer"),
        ("workers.explainer", "if True:\n    from flows.steps import plan"),
        ("workers.explainer", "import importlib\nimportlib.import_module('ray')"),
        ("workers.store.tiles", "from prefect import task"),
        ("workers.store.tiles", "from . import heatmap"),
        ("workers.helpers", "import os"),
        ("flows.steps", "import numpy as np"),
    ],
)
def test_the_checker_sees_a_wrong_edge(module: str, source: str) -> None:
    assert len(faults(module, source)) == 1


def test_the_checker_lets_a_right_edge_pass() -> None:
    source = (
        "import os\nfrom schemas.grid import Lattice\nfrom workers.cam.explain import explain\nimport torch"
    )
    assert faults("workers.explainer", source) == []


def test_one_file_a_part_imports_each_heavy_library() -> None:
    users: dict[tuple[str, str], set[str]] = {}
    for module, top in third_party_imports():
        if top in ONE_FILE_A_PART:
            users.setdefault((part_of(module) or module, top), set()).add(module)
    crowded = {key: sorted(modules) for key, modules in users.items() if len(modules) > 1}
    assert not crowded


def test_every_library_used_is_a_declared_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = {name: lines for name, lines in project["optional-dependencies"].items() if name != "test"}
    lines = [*project["dependencies"], *(line for wanted in extras.values() for line in wanted)]
    declared = {re.split(r"[\[<>=!~; ]", line)[0].lower() for line in lines}
    owners = packages_distributions()
    missing = {
        f"{module}: {top}"
        for module, top in third_party_imports()
        if not {re.sub(r"[-_.]+", "-", name).lower() for name in owners.get(top, [top])} & declared
    }
    assert not missing


def test_the_three_names_are_ours() -> None:
    owners = packages_distributions()
    for package in PACKAGES:
        assert set(owners.get(package, [])) <= {"gigacam"}, f"{package} is also owned by {owners[package]}"
        module = __import__(package)
        assert module.__file__ is not None
        assert Path(module.__file__).parent == ROOT / package


def test_no_file_of_flows_bears_the_name_of_a_dependency() -> None:
    taken = (set(packages_distributions()) | set(sys.stdlib_module_names)) - {"__init__"}
    assert not {path.stem for path in (ROOT / "flows").glob("*.py")} & taken


def test_no_package_of_tests_shadows_ours() -> None:
    folders = {path.parent.name for path in (ROOT / "tests").rglob("__init__.py")}
    assert not folders & set(PACKAGES)


def test_deployments_name_modules_never_files() -> None:
    deployments = yaml.safe_load((ROOT / "deploy/prefect.yaml").read_text(encoding="utf-8"))["deployments"]
    entrypoints = [deployment["entrypoint"] for deployment in deployments]
    assert entrypoints
    for entrypoint in entrypoints:
        assert re.fullmatch(r"flows(\.[a-z_]+)+:[a-z_]+", entrypoint), entrypoint


def test_no_module_is_called_by_what_it_is_not() -> None:
    banned = {"utils", "util", "common", "base", "helpers", "misc"}
    assert not [
        path for path in project_files() if banned & set(path.relative_to(ROOT).with_suffix("").parts)
    ]


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys\n"
        "from flows.cli import main\n"
        "sys.argv = ['gigacam', '--help']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code, end.code\n"
        "print('loaded:', *sorted({name.split('.')[0] for name in sys.modules}))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    *help_text, loaded = done.stdout.splitlines()
    assert "explain" in "\n".join(help_text)
    assert loaded.startswith("loaded: ")
    heavy = {"torch", "ray", "monai", "prefect", "zarr", "dask", "numpy", "scipy"}
    assert not set(loaded.split()) & heavy


def test_tracked_files_name_no_machine_and_no_registry() -> None:
    folders = "|".join(("home", "root", "work", "opt", "Users"))
    hosts = "|".join(
        (r"pypi" + r"\.org", "python" + "hosted", r"registry\.npm" + "js", r"deb\.debian" + r"\.org")
    )
    pattern = re.compile(rf"(?:^|[^A-Za-z0-9_.])/(?:{folders})/[A-Za-z]|(?:{hosts})", re.MULTILINE)
    assert pattern.search("cd /" + "home/somebody")
    found: list[str] = []
    for path in tracked_files():
        if "vendor" in path.parts:
            continue  # others' files, as they were released
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        found += [f"{path.relative_to(ROOT)}: {hit.group()}" for hit in pattern.finditer(text)]
    assert not found
