"""What holds for the package as a whole: what an import costs, what a wheel contains, what no file may say."""

import importlib.util
import inspect
import json
import re
import subprocess
import sys
import zipfile
from importlib import metadata, resources
from pathlib import Path
from types import ModuleType

import pytest
from hatchling.builders.wheel import WheelBuilder

import riskcal
import riskcal_adapters
from helpers import api_names

ROOT = Path(__file__).parents[1]

# Loaded on use, not on import. numba, matplotlib and scipy.stats are slow to import; the rest belongs to the adapters.
LAZY = {
    "torch",
    "jax",
    "transformers",
    "tokenizers",
    "ray",
    "matplotlib",
    "numba",
    "scipy.stats",
    "riskcal_adapters",
}


@pytest.fixture(scope="module")
def tracked_files() -> list[Path]:
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    files = [ROOT / name for name in listing.split("\0") if name]
    assert Path(__file__) in files
    return [file for file in files if file.is_file()]


def test_import_is_light_and_opens_no_socket() -> None:
    script = """
import sys

def refuse(event, arguments):
    if event.startswith("socket.") and event != "socket.gethostname":
        raise RuntimeError(f"the import touched the network: {event}{arguments}")

sys.addaudithook(refuse)
import riskcal
print(*sys.modules)
"""
    loaded = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout.split()
    assert "riskcal.calibration" in loaded
    assert LAZY.isdisjoint(loaded)


def test_the_network_check_can_fail() -> None:
    script = "import sys; sys.addaudithook(lambda event, _: print(event)); import socket; socket.socket()"
    assert (
        "socket.__new__"
        in subprocess.run([sys.executable, "-c", script], capture_output=True, text=True).stdout
    )


def test_versions_agree() -> None:
    assert riskcal.__version__ == metadata.version("riskcal-ltt")


def test_ci_calls_make_test_on_every_python_that_the_package_names() -> None:
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    (matrix,) = re.findall(r"python: \[(.+)\]", workflow)
    named = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert re.findall(r"[\d.]+", matrix) == named
    assert metadata.metadata("riskcal-ltt")["Requires-Python"] == f">={named[0]}"
    assert re.search(r"run: make .*PYTHON=python test$", workflow, re.MULTILINE)


def test_the_wheel_is_tried_on_every_python_and_with_every_extra_of_users() -> None:
    workflow = (ROOT / ".github" / "workflows" / "environments.yml").read_text(encoding="utf-8")
    pyproject = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (matrix,) = re.findall(r"python: \[(.+)\]", workflow)
    assert re.findall(r"[\d.]+", matrix) == re.findall(r"Python :: (3\.\d+)", pyproject)
    (names,) = re.findall(r"names=\(core (.+)\)", (ROOT / ".ci" / "release").read_text())
    extras = metadata.metadata("riskcal-ltt").get_all("Provides-Extra") or []
    assert set(names.split()) == set(extras) - {"dev", "docs", "browser"}
    (release,) = re.findall(
        r"needs: \[(.+)\]", (ROOT / ".github/workflows/release.yml").read_text()
    )
    assert release == "test, environments"


@pytest.mark.parametrize(
    "package", [riskcal, riskcal_adapters], ids=["riskcal", "riskcal_adapters"]
)
def test_packages_are_typed(package: ModuleType) -> None:
    assert (resources.files(package) / "py.typed").is_file()


@pytest.mark.parametrize("name", ["record", "generate", "recalibrate"])
def test_commands_of_the_adapters_are_found(name: str) -> None:
    (command,) = metadata.entry_points(group="riskcal.commands", name=name)
    assert command.value == f"riskcal_adapters.cli:{name}"
    assert callable(command.load())


def test_policy_schema_is_current() -> None:
    spec = importlib.util.spec_from_file_location(
        "export_schema", ROOT / "docs" / "export_schema.py"
    )
    assert spec is not None
    assert spec.loader is not None
    export_schema = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(export_schema)
    assert export_schema.SCHEMA.read_text(encoding="utf-8") == export_schema.current(), (
        "run docs/export_schema.py"
    )
    assert json.loads(export_schema.current())["additionalProperties"] is False


def test_api_page_lists_every_public_name() -> None:
    listed = set(
        re.findall(
            r"^   ([\w.]+)$", (ROOT / "docs" / "api.md").read_text(encoding="utf-8"), re.MULTILINE
        )
    )
    public = {
        name
        for name, value in vars(riskcal).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    for module in (riskcal.pvalues, riskcal.bounds, riskcal.fwer, riskcal.monotone):
        functions = [
            f
            for _, f in inspect.getmembers(module, inspect.isfunction)
            if f"{f.__module__}.".startswith(f"{module.__name__}.")
        ]
        public |= {
            f"{module.__name__}.{f.__name__}".removeprefix("riskcal.")
            for f in functions
            if f.__name__[0] != "_"
        }
    assert public - listed == set()


def test_every_public_name_is_there_after_import_riskcal() -> None:
    """In a fresh process: here other tests may have imported a module that only they ask for."""
    names = [name.removeprefix("riskcal.") for name in api_names("riskcal")]
    reach = "import functools, riskcal, sys; [functools.reduce(getattr, n.split('.'), riskcal) for n in sys.argv[1:]]"
    subprocess.run([sys.executable, "-c", reach, *names], check=True)


def test_the_guarantee_page_says_when_to_use_each_test_and_procedure() -> None:
    page = (ROOT / "docs" / "guarantee.md").read_text(encoding="utf-8")
    section = page.partition("## Which test, which procedure")[2].partition("\n## ")[0]
    firsts = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    named = {name for first in firsts for name in re.findall(r"`(\w+)`", first)}
    offered = {*riskcal.calibration.TESTS, *riskcal.calibration.PROCEDURES}
    for module, takes in ((riskcal.pvalues, "losses"), (riskcal.fwer, "pvalues")):
        for name, function in inspect.getmembers(module, inspect.isfunction):
            if not name.startswith("_") and takes in inspect.signature(function).parameters:
                offered.add(name)
    assert offered - named == set()


def test_no_file_names_a_machine_or_a_registry(tracked_files: list[Path]) -> None:
    folder = re.compile(r"(?<![\w.:/-])/(?:work|root|opt|farm|home)/\w|\.\./(?:shared)\b")
    host = re.compile(r"(?:pypi|pythonhosted|pytorch|npmjs|debian)\.(?:org|com|net)\b")
    found = []
    for file in tracked_files:
        try:
            lines = file.read_text(encoding="utf-8").splitlines()
        except UnicodeDecodeError:
            continue
        found += [
            f"{file.relative_to(ROOT)}:{i}"
            for i, line in enumerate(lines, 1)
            if folder.search(line) or host.search(line)
        ]
    assert found == []


def test_wheel_holds_both_packages_with_their_data(tmp_path: Path) -> None:
    (wheel,) = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        str(file.relative_to(source.parent))
        for source in (ROOT / "riskcal", ROOT / "adapters" / "riskcal_adapters")
        for file in source.rglob("*")
        if file.is_file() and "__pycache__" not in file.parts
    }
    assert {"riskcal/py.typed", "riskcal/data/g2p.parquet", "riskcal_adapters/py.typed"} <= expected
    assert {name for name in names if ".dist-info/" not in name} == expected
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
