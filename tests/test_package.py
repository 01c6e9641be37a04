"""The package as it is built and installed: what is in it, what imports what, and that its parts agree on a version."""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from importlib import import_module
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import pnem

ROOT = Path(__file__).parents[1]
FOLDERS = {"models": "pnem/models", "inference": "pnem/inference", "pnem": "pnem"}
MODULES = {
    str(path.relative_to(ROOT)): f"{installed}/{path.relative_to(ROOT / folder)}"
    for folder, installed in FOLDERS.items()
    for path in sorted((ROOT / folder).rglob("*.py"))
}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """The wheel built from a copy of the sources, so that nothing is left in the repository."""
    copy = tmp_path_factory.mktemp("sources")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    subprocess.run(
        [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", copy / "dist"],
        cwd=copy,
        check=True,
    )
    (path,) = (copy / "dist").iterdir()
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.mark.slow
class TestWheel:
    def test_holds_one_package_and_its_description(self, wheel: zipfile.ZipFile) -> None:
        assert {name.split("/")[0] for name in wheel.namelist()} == {"pnem", f"pnem-{pnem.__version__}.dist-info"}

    def test_holds_every_module_and_no_other(self, wheel: zipfile.ZipFile) -> None:
        assert sorted(name for name in wheel.namelist() if name.endswith(".py")) == sorted(MODULES.values())

    def test_holds_the_mark_of_a_typed_package_and_the_licence(self, wheel: zipfile.ZipFile) -> None:
        names = wheel.namelist()
        assert "pnem/py.typed" in names
        assert f"pnem-{pnem.__version__}.dist-info/licenses/LICENSE" in names

    def test_has_the_command(self, wheel: zipfile.ZipFile) -> None:
        entry_points = wheel.read(f"pnem-{pnem.__version__}.dist-info/entry_points.txt").decode()
        assert "[console_scripts]\npnem = pnem.cli:main" in entry_points


@pytest.mark.skipif(Path(pnem.__file__).parent == ROOT / "pnem", reason="the sources are what is installed: editable")
def test_these_sources_are_what_is_installed() -> None:
    site = Path(pnem.__file__).parents[1]
    installed = {str(path.relative_to(site)): path.read_bytes() for path in (site / "pnem").rglob("*.py")}
    here = {path: (ROOT / source).read_bytes() for source, path in MODULES.items()}
    differing = {path for path in installed.keys() | here.keys() if installed.get(path) != here.get(path)}
    assert not differing, "remove build/ and install again"


def imported(source: Path) -> set[str]:
    """The modules that a file imports, anywhere in it, by their full names."""
    names = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{source} imports relatively"
            # A name may itself be a module: `from pnem import run`.
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize(
    ("folder", "allowed"), [("models", ("pnem.models.",)), ("inference", ("pnem.models.", "pnem.inference."))]
)
def test_imports_run_downwards(folder: str, allowed: tuple[str, ...]) -> None:
    for path in (ROOT / folder).rglob("*.py"):
        ours = {name for name in imported(path) if f"{name}.".startswith("pnem.")}
        assert not {name for name in ours if not f"{name}.".startswith(allowed)}, path


def test_no_source_folder_is_imported_by_its_own_name() -> None:
    for path in map(ROOT.joinpath, MODULES):
        assert not {name.split(".")[0] for name in imported(path)} & {"models", "inference"}, path


def test_importing_it_stays_light() -> None:
    heavy = {"arviz", "lightning", "matplotlib", "pandas", "sklearn"}
    code = f"import sys, pnem, pnem.models, pnem.inference; print(sorted({heavy} & sys.modules.keys()))"
    result = subprocess.run([sys.executable, "-P", "-c", code], check=True, capture_output=True, text=True)
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize("path", MODULES.values())
def test_public_names_exist_and_are_listed_once(path: str) -> None:
    module = import_module(path.removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    assert len(set(module.__all__)) == len(module.__all__)
    for name in module.__all__:
        assert hasattr(module, name)


def test_the_changelog_ends_in_this_version() -> None:
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    newest = re.search(r"^## (\d\S*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert pnem.__version__ == declared == newest[1]


def test_every_requirement_has_its_tested_version() -> None:
    pins = re.findall(r"^([^#=\s]+)==", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    pinned = set(map(canonicalize_name, pins))
    missing, seen, waiting = set(), set(), [("pnem", "test")]
    while waiting:
        name, extra = waiting.pop()
        seen.add((name, extra))
        try:
            needed = [Requirement(line) for line in requires(name) or []]
        except PackageNotFoundError:
            continue
        for requirement in needed:
            if requirement.marker is None or requirement.marker.evaluate({"extra": extra}):
                found = canonicalize_name(requirement.name)
                # What a package asks for in one exact version, as torch its CUDA libraries, needs no second pin.
                if found not in pinned and found != "pnem" and "==" not in str(requirement.specifier):
                    missing.add(found)
                waiting += {(found, extra) for extra in ("", *requirement.extras)} - seen
    assert not missing
