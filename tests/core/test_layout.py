"""The layering: which file may import which, read from the source by ast; and what an import does."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "gradconsist"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

#: Runtime dependencies, beside the standard library.
ALLOWED = {"torch", "typing_extensions", "gradconsist"}
#: Folders and files in the order in which they may import each other: everything before, and the own folder.
ORDER = [
    "errors.py",
    "types.py",
    "_inputs/",
    "_refusals/",
    "_forward/",
    "engines/",
    "_consistency/",
    "loss.py",
    "wrapper.py",
]
#: What stands beside that line: the parts of it that each may import, and no other of these.
BESIDE = {
    # MixMatch keeps running statistics as SAM does.
    "methods/": ["errors", "types", "_inputs", "_refusals", "optim"],
    "optim/": ["errors", "types", "_inputs"],
    "regularizers/": ["errors", "types", "_inputs", "_refusals", "_forward", "_consistency", "loss"],
    "diagnostics/": ["errors", "types", "_inputs", "_refusals", "_forward", "engines", "_consistency", "loss"],
    # An adapter builds on the wrapper, and on the gradient that is formed in the forward.
    "adapters/": ["errors", "types", "_inputs", "_refusals", "_consistency.gradient_buffer", "loss", "wrapper"],
}
#: Files that know less than their folder.
FORBIDDEN = {
    "types.py": ["gradconsist"],
    "_inputs/precision.py": ["gradconsist"],
    "_consistency/similarity.py": [
        "gradconsist._inputs",
        "gradconsist._refusals",
        "gradconsist._forward",
        "gradconsist.engines",
    ],
    "_consistency/gradient_buffer.py": ["gradconsist.engines"],
    "engines/projection.py": ["gradconsist.engines", "gradconsist._forward"],
}


def _allowed(file: str) -> list[str]:
    """Prefixes of our own modules that a file may import."""
    for folder, parts in BESIDE.items():
        if file.startswith(folder):
            return [f"gradconsist.{folder[:-1]}", *(f"gradconsist.{part}" for part in parts)]
    place = next(place for place in ORDER if file == place or file.startswith(place))
    names = [each.removesuffix(".py").removesuffix("/") for each in ORDER[: ORDER.index(place) + 1]]
    return [f"gradconsist.{name}" for name in names]


def imports(path: Path) -> set[str]:
    """Every module that a file imports, inside functions and type checks too, relative imports resolved."""
    package = ["gradconsist", *path.relative_to(PACKAGE).parent.parts]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found.add(module)
            found.update(f"{module}.{alias.name}" for alias in node.names)
    return found


def below(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix + ".")


def test_there_is_something_to_check() -> None:
    assert {"__init__.py", "errors.py", "_consistency/similarity.py", "loss.py", "engines/loop.py"} <= set(FILES)


def test_the_first_level() -> None:
    """Few enough to hold in mind; what is internal says so."""
    entries = {path.name for path in PACKAGE.iterdir() if not path.name.startswith("__") and path.name != "py.typed"}
    assert entries == {place.strip("/") for place in (*ORDER, *BESIDE)}
    assert len(entries) <= 14


@pytest.mark.parametrize("file", [file for file in FILES if file != "__init__.py"])
def test_layers(file: str) -> None:
    own = {name for name in imports(PACKAGE / file) if below(name, "gradconsist") and name != "gradconsist"}
    upward = {name for name in own if not any(below(name, prefix) for prefix in _allowed(file))}
    assert not upward, f"{file} may not import {sorted(upward)}"
    less = {name for name in own for prefix in FORBIDDEN.get(file, ()) if below(name, prefix)}
    assert not less, f"{file} may not import {sorted(less)}"


@pytest.mark.parametrize("file", FILES)
def test_only_torch_and_typing_extensions(file: str) -> None:
    roots = {name.split(".")[0] for name in imports(PACKAGE / file)}
    foreign = roots - ALLOWED - set(sys.stdlib_module_names)
    assert not foreign, f"{file} imports {sorted(foreign)}"


def test_no_cycles() -> None:
    """The modules of the package form layers: repeatedly taking away those that import nothing left empties it."""
    modules = {
        ("gradconsist." + file.removesuffix(".py").replace("/", ".")).removesuffix(".__init__"): file for file in FILES
    }
    graph = {}
    for module, file in modules.items():
        if module == "gradconsist":
            continue
        names = imports(PACKAGE / file)
        graph[module] = {other for other in modules if other in names and other not in (module, "gradconsist")}
    while graph:
        free = {module for module, needs in graph.items() if not needs & graph.keys()}
        assert free, f"a cycle among {sorted(graph)}"
        for module in free:
            del graph[module]


def test_the_top_level_names() -> None:
    import gradconsist

    expected = {
        "GradientConsistencyLoss",
        "GGCRWrapper",
        "ViewPair",
        "StepOutput",
        "SSLBatch",
        "RandomProjection",
        "__version__",
    }
    for name in expected:
        assert hasattr(gradconsist, name), name
    assert expected <= set(gradconsist.__all__)
    for name in gradconsist.__all__:
        assert hasattr(gradconsist, name), name


def test_files_are_short() -> None:
    for file in FILES:
        assert len((PACKAGE / file).read_text().splitlines()) <= 350, file


_PROBE = """
import sys, torch
before = (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype(), torch.random.get_rng_state(),
          torch.backends.cuda.flash_sdp_enabled(), torch.backends.mha.get_fastpath_enabled(), set(sys.modules))
import gradconsist, gradconsist.adapters.lightning
after = (torch.get_num_threads(), torch.is_grad_enabled(), torch.get_default_dtype(), torch.random.get_rng_state(),
         torch.backends.cuda.flash_sdp_enabled(), torch.backends.mha.get_fastpath_enabled(), set(sys.modules))
assert before[:3] == after[:3] and before[4:6] == after[4:6] and torch.equal(before[3], after[3]), "global state"
roots = {name.split(".")[0] for name in after[6] - before[6]}
late = {"mpmath", "sympy"}  # torch 2.6 loads these requirements of its own later than others do
print(sorted(roots - set(sys.stdlib_module_names) - {"gradconsist", "torch", "typing_extensions"} - late))
"""


def test_an_import_changes_nothing_and_loads_nothing_else() -> None:
    env = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", _PROBE],
        capture_output=True,
        text=True,
        env=env,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
