"""The rules that keep the house livable, checked by machine."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(p for folder in ("lcsc", "scripts", "benchmarks", "tests") for p in (ROOT / folder).rglob("*.py"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT)))
def test_rooms_are_small(path):
    text = path.read_text()
    assert len(text.splitlines()) < 400 or "tests" in path.parts
    if "tests" in path.parts:
        return
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, f"{node.name} has {node.end_lineno - node.lineno + 1} lines"
        if isinstance(node, ast.ClassDef):
            public = [f.name for f in node.body if isinstance(f, ast.FunctionDef) and not f.name.startswith("_")]
            methods = [
                f.name
                for f in node.body
                if isinstance(f, ast.FunctionDef) and not f.name.startswith("_") and not f.decorator_list
            ]
            assert len(methods) <= 8, f"{node.name} has {len(methods)} public methods: {public}"


def imported_by(statement):
    heavy = ("torch", "nevergrad", "hydra", "pandas", "matplotlib")
    code = f"import sys\n{statement}\nprint(*sorted(m for m in {heavy} if m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split() if done.stdout.strip() else []


def test_importing_and_asking_for_help_cost_nothing():
    assert imported_by("import lcsc") == []
    assert imported_by("from lcsc.cli.main import main; main(['--help'])") == []


def test_opening_a_bank_does_not_import_the_search_stack():
    assert imported_by("import lcsc; lcsc.CheckpointBank") == []


def test_public_names_exist_and_are_documented():
    import lcsc

    assert set(lcsc.__all__) == {"__version__", *lcsc._HOMES}
    for name in lcsc.__all__:
        value = getattr(lcsc, name)
        assert name == "__version__" or value.__doc__, name
    assert set(lcsc.__all__) <= set(dir(lcsc))
    with pytest.raises(AttributeError, match="has no attribute `nothing`"):
        _ = lcsc.nothing


def test_version_is_said_once():
    import tomllib

    import lcsc

    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"] == lcsc.__version__
