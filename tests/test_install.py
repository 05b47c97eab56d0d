"""What is installed: the lists of setup.py and pyproject.toml; (slow) a real sdist and wheel."""

from __future__ import annotations

import ast
import email
import importlib.util
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "rmr1"
# What a run leaves in the package's folder; it is never shipped.
LEFTOVERS = {".so", ".pyc"}
# What no sdist and no build needs.
NOT_COPIED = (".git", ".venv", "build", "dist", "runs", "results", "__pycache__", ".*_cache")


def project() -> dict[str, object]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def listed_packages() -> list[str]:
    """The value of `packages=` in setup.py, read without running it."""
    tree = ast.parse((ROOT / "setup.py").read_text(encoding="utf-8"))
    (found,) = (
        word.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "setup"
        for word in node.keywords
        if word.arg == "packages"
    )
    packages = ast.literal_eval(found)
    assert isinstance(packages, list)
    return packages


def package_files() -> set[str]:
    """Every file of the package as "rmr1/...": what an installation must hold."""
    return {
        path.relative_to(ROOT).as_posix()
        for path in PACKAGE.rglob("*")
        if path.is_file() and path.suffix not in LEFTOVERS and "__pycache__" not in path.parts
    }


def test_setup_lists_every_folder_that_holds_code() -> None:
    folders = {Path(name).parent for name in package_files() if name.endswith(".py")}
    assert set(listed_packages()) == {".".join(folder.parts) for folder in folders}
    assert len(listed_packages()) == len(folders)


def test_package_data_lists_every_other_file() -> None:
    """Each pattern finds something, and together they find all that is no module."""
    data = project()["tool"]["setuptools"]["package-data"]  # type: ignore[index]
    found: set[str] = set()
    for package, patterns in data.items():
        folder = ROOT.joinpath(*package.split("."))
        for pattern in patterns:
            files = {path.relative_to(ROOT).as_posix() for path in folder.glob(pattern)}
            assert files, f"nothing matches {pattern} in {package}"
            found |= files
    assert found == {name for name in package_files() if not name.endswith(".py")}
    assert {"rmr1/py.typed", "rmr1/_C.pyi", "rmr1/reporting/report.html.jinja"} <= found


def test_the_links_are_no_packages() -> None:
    """`engine` and `kernels` at the top level are links, and nothing installs them by name."""
    assert all(name == "rmr1" or name.startswith("rmr1.") for name in listed_packages())
    for name in ("engine", "kernels"):
        assert (ROOT / name).is_symlink()


def test_versions_agree() -> None:
    import rmr1
    from rmr1.cli import VERBS, main

    assert project()["project"]["version"] == rmr1.__version__  # type: ignore[index]
    assert project()["project"]["scripts"] == {"rmr1": "rmr1.cli:main"}  # type: ignore[index]
    assert callable(main)
    for module, name, _ in VERBS.values():
        tree = ast.parse((ROOT / "rmr1" / "verbs" / f"{module}.py").read_text())
        assert name in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}


def test_constraints_pin_what_the_project_asks_for() -> None:
    from packaging.requirements import Requirement

    pins = {}
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            (only,) = pin.specifier
            assert only.operator == "==", line
            pins[pin.name] = only.version
    tables = project()["project"]
    wanted = [*tables["dependencies"], *tables["optional-dependencies"]["dev"]]  # type: ignore[index]
    wanted += project()["build-system"]["requires"]  # type: ignore[index]
    for text in wanted:
        requirement = Requirement(text)
        if requirement.name in pins:
            assert requirement.specifier.contains(pins[requirement.name]), text
    core = {Requirement(text).name for text in tables["dependencies"]}  # type: ignore[index]
    assert core <= set(pins)


# --- A real build --------------------------------------------------------------------------------


def build(folder: Path, *command: str) -> None:
    done = subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist of a copy of this checkout."""
    for module in ("setuptools", "nanobind"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"building without a network needs {module} in this environment")
    copy = tmp_path_factory.mktemp("checkout") / "rmr1"
    ignore = shutil.ignore_patterns(
        *NOT_COPIED, *(f"*{suffix}" for suffix in LEFTOVERS), "*.egg-info"
    )
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignore)
    build(copy, "-c", "import setuptools.build_meta as build; build.build_sdist('out')")
    (file,) = (copy / "out").iterdir()
    return file


@pytest.mark.slow
def test_the_sdist_holds_each_file_once(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        members = archive.getmembers()
    assert not [member.name for member in members if member.issym() or member.islnk()]
    top = sdist.name.removesuffix(".tar.gz")
    names = [member.name.removeprefix(f"{top}/") for member in members if member.isfile()]
    assert len(names) == len(set(names))
    assert package_files() <= set(names)
    sources = {f"csrc/{path.name}" for path in (ROOT / "csrc").iterdir()}
    assert sources | {"README.md", "LICENSE", "setup.py", "pyproject.toml"} <= set(names)
    assert not [name for name in names if name.startswith(("engine/", "kernels/", "/"))]


@pytest.mark.slow
def test_a_wheel_from_the_sdist_holds_everything_and_runs(sdist: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    source = tmp_path / sdist.name.removesuffix(".tar.gz")
    build(source, "-m", "pip", "wheel", ".", "--no-deps", "--no-build-isolation", "-w", "../wheels")
    (wheel,) = (tmp_path / "wheels").iterdir()
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        (metadata,) = (name for name in names if name.endswith("/METADATA"))
        fields = email.message_from_bytes(archive.read(metadata))
        archive.extractall(tmp_path / "site")
    installed = {name for name in names if ".dist-info/" not in name}
    extension = {name for name in installed if name.endswith(".so")}
    assert len(extension) == 1
    assert next(iter(extension)).startswith("rmr1/_C.")
    assert installed - extension == package_files()
    assert fields["Requires-Python"] == "<3.14,>=3.11"
    # It runs from there, not from the checkout: extension, template, pocket model, command line.
    code = (
        "import sys, rmr1; from rmr1.models import POCKET; from rmr1.cli import main;"
        f"assert rmr1.__file__.startswith({str(tmp_path)!r}), rmr1.__file__;"
        "assert rmr1.parse_verdict('<answer>[[A]]</answer>').answer == 'A';"
        "assert (POCKET / 'model.safetensors').is_file();"
        "sys.exit(main(['data', 'tasks', '--count', '5', '--output', 'pairs.jsonl']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, 'site'); {code}"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "pairs.jsonl").read_text().splitlines()) == 5
