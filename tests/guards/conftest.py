"""The files the guards look at, read and parsed once."""

import ast
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("configs", "parallel", "trainer", "launch", "tools")


@dataclass(frozen=True)
class Import:
    """One imported module, absolute, with where it stands."""

    module: str
    line: int
    in_function: bool
    for_types_only: bool


@dataclass(frozen=True)
class CodeFile:
    """One Python file of the project."""

    path: Path

    @cached_property
    def text(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @property
    def name(self) -> str:
        return self.path.relative_to(ROOT).as_posix()

    @property
    def module(self) -> str:
        return self.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")

    @property
    def package(self) -> str:
        return self.name.split("/", 1)[0]

    @cached_property
    def imports(self) -> list[Import]:
        return list(_imports(self.tree, self.module, in_function=False, for_types_only=False))


def _imports(node: ast.AST, module: str, in_function: bool, for_types_only: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(alias.name, child.lineno, in_function, for_types_only)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{module}:{child.lineno}: imports are absolute here"
            for alias in child.names:  # `from trainer import run` imports trainer.run: the name is a part of the path
                yield Import(f"{child.module}.{alias.name}", child.lineno, in_function, for_types_only)
        else:
            inside = in_function or isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            types = for_types_only or (isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test))
            yield from _imports(child, module, inside, types)


@pytest.fixture(scope="session")
def root() -> Path:
    return ROOT


@pytest.fixture(scope="session")
def product_files() -> list[CodeFile]:
    """Every Python file of the five packages."""
    files = [CodeFile(path) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    assert {file.package for file in files} == set(PACKAGES)
    assert len([file for file in files if file.path.name != "__init__.py"]) > 30
    return files


@pytest.fixture(scope="session")
def test_files() -> list[CodeFile]:
    """Every Python file under tests/."""
    files = [CodeFile(path) for path in sorted((ROOT / "tests").rglob("*.py"))]
    assert len(files) > 10
    return files


@pytest.fixture(scope="session")
def project_files() -> list[Path]:
    """Every file git knows or would add, as long as it exists; without git, every file outside caches."""
    listing = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listing.returncode == 0:
        files = [ROOT / name for name in listing.stdout.splitlines()]
    else:
        skipped = {".git", ".venv", ".venv-bootstrap", "data", "runs", "build", "__pycache__"}
        files = [path for path in ROOT.rglob("*") if not skipped & set(path.relative_to(ROOT).parts)]
    files = [path for path in files if path.is_file()]
    assert len(files) > 50
    return files
