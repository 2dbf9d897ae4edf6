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
#: Prefixes of our own modules that a file may not import, by the file or folder that must not know of them.
FORBIDDEN = {
    "errors.py": ["gradconsist"],
    "types.py": ["gradconsist"],
    "precision.py": ["gradconsist"],
    "projection.py": ["gradconsist.engines", "gradconsist.loss", "gradconsist.wrapper", "gradconsist.forward"],
    "similarity.py": ["gradconsist.engines", "gradconsist.loss", "gradconsist.wrapper", "gradconsist.forward",
                      "gradconsist.normalization", "gradconsist.selection", "gradconsist.methods"],
    "selection.py": ["gradconsist.engines", "gradconsist.loss", "gradconsist.wrapper", "gradconsist.methods"],
    "normalization.py": ["gradconsist.engines", "gradconsist.loss", "gradconsist.wrapper", "gradconsist.methods"],
    "sparse.py": ["gradconsist"],
    "fused.py": ["gradconsist.engines", "gradconsist.loss", "gradconsist.wrapper", "gradconsist.methods"],
    "schedules.py": ["gradconsist.engines", "gradconsist.loss", "gradconsist.wrapper", "gradconsist.methods"],
    "engines/": ["gradconsist.loss", "gradconsist.wrapper", "gradconsist.fused", "gradconsist.methods",
                 "gradconsist.schedules", "gradconsist.diagnostics", "gradconsist.comparison"],
    "loss.py": ["gradconsist.wrapper", "gradconsist.methods", "gradconsist.diagnostics", "gradconsist.schedules",
                "gradconsist.adapters"],
    "wrapper.py": ["gradconsist.methods", "gradconsist.diagnostics", "gradconsist.engines", "gradconsist.adapters"],
    "regularizers/": ["gradconsist.wrapper", "gradconsist.methods", "gradconsist.diagnostics", "gradconsist.schedules"],
    "optim/": ["gradconsist.engines", "gradconsist.loss", "gradconsist.wrapper", "gradconsist.fused",
               "gradconsist.forward", "gradconsist.comparison", "gradconsist.methods", "gradconsist.diagnostics"],
    "methods/": ["gradconsist.engines", "gradconsist.loss", "gradconsist.wrapper", "gradconsist.fused",
                 "gradconsist.forward", "gradconsist.normalization", "gradconsist.comparison",
                 "gradconsist.diagnostics"],
    # An adapter builds on the wrapper, and on the gradient that is formed in the forward.
    "adapters/": ["gradconsist.engines", "gradconsist.forward", "gradconsist.normalization", "gradconsist.comparison",
                  "gradconsist.similarity", "gradconsist.diagnostics", "gradconsist.methods"],
    "adapters/lightning.py": ["gradconsist.fused"],
    "adapters/usb_pairs.py": ["gradconsist.loss", "gradconsist.wrapper", "gradconsist.fused"],
    "adapters/usb_checks.py": ["gradconsist.loss", "gradconsist.wrapper", "gradconsist.fused"],
}  # fmt: skip


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
    assert {"__init__.py", "errors.py", "similarity.py", "loss.py", "wrapper.py", "engines/loop.py"} <= set(FILES)


@pytest.mark.parametrize("file", FILES)
def test_layers(file: str) -> None:
    found = imports(PACKAGE / file)
    for place, prefixes in FORBIDDEN.items():
        if file == place or (place.endswith("/") and file.startswith(place)):
            for prefix in prefixes:
                own = {name for name in found if below(name, prefix)}
                assert not own, f"{file} may not import {sorted(own)}"


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
