"""sdist -> wheel -> empty environment -> run from `/`."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def run(*words, cwd, env=None):
    done = subprocess.run([str(w) for w in words], cwd=cwd, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel built from the sdist."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (built,) = out.glob("*.whl")
    return built


@pytest.mark.slow
def test_wheel_holds_the_package_its_configuration_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert tops == {"lcsc", f"lcsc-{wheel.name.split('-')[1]}.dist-info"}
    yamls = {str(p.relative_to(ROOT / "conf")) for p in (ROOT / "conf").rglob("*.yaml")}
    assert {name.removeprefix("lcsc/conf/") for name in names if name.startswith("lcsc/conf/")} == {
        *yamls,
        "__init__.py",
    }
    assert "lcsc/metrics/weights/digits.safetensors" in names


@pytest.mark.faults
def test_installed_wheel_searches_from_the_root_folder(wheel, tmp_path):
    """The environment holds lcsc from the wheel alone; its dependencies are lent by the tests' own environment."""
    venv = tmp_path / "venv"
    run(sys.executable, "-m", "venv", "--without-pip", venv, cwd=tmp_path)
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        venv,
        "install",
        "--quiet",
        "--no-deps",
        "--no-index",
        wheel,
        cwd=tmp_path,
    )
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    where = run(venv / "bin" / "python", "-c", "import lcsc; print(lcsc.__file__)", cwd="/", env=env)
    assert where.startswith(str(site))
    words = [
        "searcher=lcsc_evolution",  # which loads fastest
        "search.num_trials=10",
        "search.num_images=64",
        "search.num_images_select=64",
        "search.num_images_report=64",
    ]
    places = [f"runs_dir={tmp_path / 'runs'}", f"bank.path={tmp_path / 'bank'}"]
    before = set(os.listdir("/"))
    out = run(venv / "bin" / "lcsc", "search", "experiment=toy_gaussian", *words, *places, cwd="/", env=env)
    assert "ratio" in out
    assert set(os.listdir("/")) == before
    (summary,) = (tmp_path / "runs").glob("*/summary.json")
    assert json.loads(summary.read_text())["num_trials"] == 10


def test_every_import_is_declared():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {word for extra in project["optional-dependencies"].values() for word in extra} | set(
        project["dependencies"]
    )
    names = {
        line.split(">")[0].split("=")[0].split("<")[0].split("[")[0].lower().replace("_", "-") for line in declared
    }
    modules = {"yaml": "pyyaml", "sklearn": "scikit-learn", "PIL": "pillow", "hydra": "hydra-core"}
    found = set()
    for file in (ROOT / "lcsc").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                found.add(node.module.split(".")[0])
    foreign = {modules.get(name, name.replace("_", "-")) for name in found - set(sys.stdlib_module_names) - {"lcsc"}}
    assert foreign <= names, foreign - names


def test_tested_versions_satisfy_the_declared_ranges():
    from packaging.requirements import Requirement

    lines = (ROOT / "constraints.txt").read_text().split()
    pins = {line.split("==")[0].lower().replace("_", "-"): line.split("==")[1] for line in lines}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for text in project["dependencies"]:
        need = Requirement(text)
        assert need.specifier.contains(pins[need.name.lower()]), text
