"""The import arrows of docs/design.md, read from the source itself."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = {"store", "engine", "server", "learner", "ui", "plaudit", "benchmarks", "tests"}
MAY_IMPORT = {
    "store": set(),
    "engine": set(),
    "ui": set(),
    "server": {"engine", "store"},
    "learner": {"engine", "store"},
}


def imported_packages(source: str) -> set[str]:
    """Top-level names that `source` imports, at any depth of the file; relative imports stay inside their package."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", sorted(MAY_IMPORT))
def test_a_package_imports_only_what_the_arrows_allow(package: str) -> None:
    files = sorted((ROOT / package).rglob("*.py"))
    assert files, f"{package}/ is empty"
    for file in files:
        foreign = (imported_packages(file.read_text()) & OURS) - {package} - MAY_IMPORT[package]
        assert not foreign, f"{file.relative_to(ROOT)} imports {sorted(foreign)}"


def test_the_checker_sees_a_forbidden_import() -> None:
    assert imported_packages("def f():\n    from server.app import create_app\n    import store.records\n") == {"server", "store"}


@pytest.mark.parametrize("package", ["store", "ui"])
def test_store_and_ui_never_load_torch(package: str) -> None:
    for file in (ROOT / package).rglob("*.py"):
        assert not imported_packages(file.read_text()) & {"torch", "transformers", "peft"}, file


def test_every_module_says_what_it_owns() -> None:
    for package in [*MAY_IMPORT, "benchmarks"]:
        for file in (ROOT / package).rglob("*.py"):
            source = file.read_text()
            if source.strip():
                assert ast.get_docstring(ast.parse(source)), f"{file.relative_to(ROOT)} has no module docstring"
