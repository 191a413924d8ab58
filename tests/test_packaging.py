"""The wheel: what is in it, and that it works far away from this repository."""

import os
import shutil
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = ("attnopt", "passes", "kernels", "pyproject.toml", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, unpacked; built from a copy, so that this checkout gets no build/ and lends no stale one."""
    copy, built, unpacked = (tmp_path_factory.mktemp(name) for name in ("copy", "built", "unpacked"))
    for name in SOURCES:
        place = shutil.copytree if (ROOT / name).is_dir() else shutil.copy2
        place(ROOT / name, copy / name, **({"symlinks": True} if (ROOT / name).is_dir() else {}))
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(built), str(copy)]
    subprocess.run(build, check=True, capture_output=True, text=True)
    (file,) = built.glob("*.whl")
    with ZipFile(file) as archive:
        archive.extractall(unpacked)
    return unpacked


def run_away(wheel: Path, folder: Path, code: str) -> str:
    """What `code` prints in a fresh process that finds attnopt in the wheel only."""
    environment = os.environ | {"PYTHONPATH": str(wheel)}
    command = [sys.executable, "-P", "-c", code]
    done = subprocess.run(command, cwd=folder, env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_it_holds_attnopt_and_nothing_else_on_top(wheel: Path) -> None:
    top = {path.name for path in wheel.iterdir()}
    assert {name for name in top if not name.endswith(".dist-info")} == {"attnopt"}
    assert len(top) == 2


def test_every_source_file_is_inside(wheel: Path) -> None:
    found = (
        path
        for name in ("attnopt", "passes", "kernels")
        for path in (ROOT / name).rglob("*")
        if path.is_file()
    )
    sources = {path.relative_to(ROOT) for path in found if path.suffix not in {".pyc", ".md"}}
    wanted = {path if path.parts[0] == "attnopt" else Path("attnopt", path) for path in sources}
    assert wanted - {path.relative_to(wheel) for path in wheel.rglob("*")} == set()
    assert Path("attnopt/py.typed") in wanted


def test_it_imports_from_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    code = "import attnopt, attnopt.passes, attnopt.kernels.lightning; print(attnopt.__file__)"
    assert run_away(wheel, tmp_path, code) == str(wheel / "attnopt" / "__init__.py")


def test_the_name_kernels_stays_free(wheel: Path, tmp_path: Path) -> None:
    code = "from importlib.util import find_spec; s = find_spec('kernels'); print(s and s.submodule_search_locations)"
    assert str(wheel) not in run_away(wheel, tmp_path, code)


def test_entry_points_lead_somewhere(wheel: Path, tmp_path: Path) -> None:
    declared = ConfigParser()
    declared.read(next(wheel.glob("*.dist-info/entry_points.txt")))
    assert declared["torch_dynamo_backends"]["attnopt"] == "attnopt.backend:attnopt"
    assert declared["console_scripts"]["attnopt"] == "attnopt.cli:main"
    code = "from attnopt.backend import attnopt; from attnopt.cli import main; print(callable(attnopt), callable(main))"
    assert run_away(wheel, tmp_path, code) == "True True"
