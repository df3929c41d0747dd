"""Section 48, Bundle: the copy that needs nothing installed, built twice, run by several Pythons, with traps planted in site-packages."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

import aicarousel
from fakes import ROOT, Gateway, clean_environment

MODELS = {"ollama": {"default": "m", "enableFallback": False, "models": ["m"]}}


def find_pythons() -> list[str]:
    """Programs of Python 3.11 and newer, one for each minor version that is on this machine."""
    found = {sys.version_info[:2]: sys.executable}
    places = [*os.environ.get("PATH", "").split(os.pathsep), *map(str, Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")).glob("versions/*/bin"))]
    for minor in range(11, 16):
        program = next((path for place in places if (path := shutil.which(f"python3.{minor}", path=place)) and runs(path, minor)), None)
        if program:
            found.setdefault((3, minor), program)
    return list(found.values())


def runs(program: str, minor: int) -> bool:
    """A version manager's stub is there for versions that are not."""
    asked = subprocess.run([program, "-I", "-S", "-c", "import sys, sqlite3, ssl; print(sys.version_info[1])"], capture_output=True, text=True)
    return asked.stdout.strip() == str(minor)


PYTHONS = find_pythons()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("bundle")
    (folder / "home").mkdir()
    (folder / "home" / "models.json").write_text(json.dumps(MODELS))
    yield build([sys.executable, str(ROOT / "aicarousel.py")], folder, folder / "home")


def build(run: list[str], folder: Path, home: Path | None = None) -> Path:
    """Writes a bundle into `folder`, from there."""
    made = subprocess.run([*run, "bundle", *(["--home", str(home)] if home else []), "--json"], cwd=folder, env=clean_environment(folder), capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    path = folder / "aicarousel.pyz"
    assert json.loads(made.stdout) == {"path": "aicarousel.pyz", "sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "models": True}
    assert os.access(path, os.X_OK) and not list(folder.glob("*.new"))
    return path


def test_it_holds_the_module_its_packages_with_their_licences_and_nothing_else(bundle: Path) -> None:
    with zipfile.ZipFile(bundle) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    assert list(members) == sorted(members)
    assert members["aicarousel.py"] == (ROOT / "aicarousel.py").read_bytes() and members["LICENSE"] == (ROOT / "LICENSE").read_bytes()
    assert json.loads(members["models.json"]) == MODELS
    assert {name.split("/")[0] for name in members if "/" in name} == {"h11", "certifi", *(name.split("/")[0] for name in members if ".dist-info/" in name)}
    assert len(members["__main__.py"].splitlines()) == 3
    for package in ("h11", "certifi"):
        assert f"{package}/__init__.py" in members and any(re.match(rf"{package}-[\d.]+\.dist-info/licenses/LICENSE", name) and data for name, data in members.items())
    assert b"BEGIN CERTIFICATE" in members["certifi/cacert.pem"]
    assert bundle.read_bytes().startswith(b"#!/usr/bin/env -S python3 -I -S\n")


@pytest.mark.parametrize("python", PYTHONS)
def test_two_builds_and_a_copy_s_copy_are_the_same_to_the_byte(python: str, bundle: Path, tmp_path: Path) -> None:
    copy = build([python, "-I", "-S", str(bundle)], tmp_path)
    assert copy.read_bytes() == bundle.read_bytes()
    (tmp_path / "again").mkdir()
    assert build([python, "-I", "-S", str(copy)], tmp_path / "again").read_bytes() == bundle.read_bytes()


def test_it_was_run_by_a_second_version_of_python() -> None:
    if len(PYTHONS) < 2:
        pytest.skip("this machine has one Python of 3.11 or newer")
    assert len(PYTHONS) >= 2


def models_shown(printed: str) -> list[str]:
    """The default models that `config show --json` tells of."""
    return [row["value"] for row in json.loads(printed) if row["name"] == "ollama.default"]


@pytest.fixture(scope="module", params=PYTHONS)
def trapped(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A Python whose site-packages hold a .pth that runs at every start and an h11 that is none; and the file where both leave word."""
    folder = tmp_path_factory.mktemp("trapped")
    made = subprocess.run([request.param, "-m", "venv", "--without-pip", str(folder)], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no private environment can be made: {made.stderr[-200:]}")
    word = folder / "word"
    packages = next(folder.glob("lib/python*/site-packages"))
    (packages / "evil.pth").write_text(f"import pathlib; pathlib.Path({str(word)!r}).write_text('pth')\n")
    (packages / "h11").mkdir()
    (packages / "h11" / "__init__.py").write_text(f"import pathlib; pathlib.Path({str(word)!r}).write_text('h11')\n__version__ = '0.16.0'\n")
    return str(folder / "bin" / "python"), word


def test_the_traps_are_sharp(trapped: tuple[str, Path]) -> None:
    python, word = trapped
    for code, trap in (("0", "pth"), ("import h11", "h11")):
        subprocess.run([python, "-c", code], check=True)
        assert word.read_text() == trap
        word.unlink()


def test_it_serves_without_site_packages(trapped: tuple[str, Path], bundle: Path) -> None:
    python, word = trapped
    word.unlink(missing_ok=True)
    gateway = Gateway(arguments=["--demo"], run=[python, "-I", "-S", str(bundle)])
    try:
        gateway.start()
        reply = gateway.post("/v1/chat/completions", {"model": "demo", "messages": [{"role": "user", "content": "Hello"}]}, stream=True)
        assert reply.status == 200 and reply.done and "AICarousel" in reply.text, reply.raw
        assert gateway.command("status").returncode == 0
        assert models_shown(gateway.command("config", "show", "--json").stdout) == ["m"], "the bundle's own models.json"
        gateway.stop()
        assert "Traceback" not in gateway.log
    finally:
        gateway.remove()
    assert not word.exists(), word.read_text()


def test_a_folder_s_models_json_goes_before_the_bundle_s(bundle: Path, tmp_path: Path) -> None:
    shutil.copy(bundle, tmp_path / "mine.pyz")
    (tmp_path / "models.json").write_text(json.dumps({"ollama": {**MODELS["ollama"], "default": "own", "models": ["own"]}}))
    shown = subprocess.run([sys.executable, "-I", "-S", "mine.pyz", "config", "show", "--json"], cwd=tmp_path, env=clean_environment(tmp_path), capture_output=True, text=True)
    assert models_shown(shown.stdout) == ["own"], shown.stderr


def test_version_tells_what_everything_is(bundle: Path, tmp_path: Path) -> None:
    def ask(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([sys.executable, "-I", "-S", str(bundle), "version", *words], env=clean_environment(tmp_path), capture_output=True, text=True)
    told = json.loads(ask("--verify", "--json").stdout)
    assert told["version"] == aicarousel.__version__ and told["bundle"] is True
    with zipfile.ZipFile(bundle) as archive:
        inside = {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}
    assert told["sha256"] == {bundle.name: hashlib.sha256(bundle.read_bytes()).hexdigest(), **inside}
    lines = ask("--verify").stdout.splitlines()
    assert lines[0].startswith(f"AICarousel {aicarousel.__version__}, Python ") and len(lines) == 1 + len(told["sha256"])
    assert "sha256" not in json.loads(ask("--json").stdout)
    plain = subprocess.run([sys.executable, str(ROOT / "aicarousel.py"), "version", "--verify", "--json"], env=clean_environment(tmp_path), capture_output=True, text=True)
    own = json.loads(plain.stdout)
    assert own["bundle"] is False and own["sha256"]["aicarousel.py"] == inside["aicarousel.py"] and own["sha256"]["certifi/cacert.pem"] == inside["certifi/cacert.pem"]


def test_what_cannot_be_bundled_is_told_in_one_line(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()

    def fails(*words: str, run: list[str] | None = None, environment: dict[str, str] | None = None) -> str:
        asked = subprocess.run([*(run or [sys.executable]), str(ROOT / "aicarousel.py"), "bundle", "--home", str(home), *words], cwd=tmp_path,
                               env=clean_environment(tmp_path) | (environment or {}), capture_output=True, text=True)
        assert asked.returncode == 2 and asked.stderr.count("\n") == 1 and asked.stderr.startswith("aicarousel: "), asked.stderr
        return asked.stderr
    assert "no/such/folder" in fails("-o", "no/such/folder/x.pyz")
    (home / "models.json").write_text("{oops")
    assert "models.json" in fails()
    (home / "models.json").unlink()
    assert "package h11: found it is not installed" in fails(run=[sys.executable, "-I", "-S"])
    assert not list(tmp_path.glob("*.pyz*"))


def test_it_starts_again_by_its_own_file(bundle: Path, tmp_path: Path) -> None:
    code = "import sys; sys.path.insert(0, sys.argv[1]); import aicarousel; print(aicarousel.own_command())"
    shown = subprocess.run([sys.executable, "-I", "-S", "-c", code, str(bundle)], env=clean_environment(tmp_path), capture_output=True, text=True)
    assert shown.stdout.strip() == repr([sys.executable, "-I", "-S", str(bundle.resolve())]), shown.stderr
    assert aicarousel.own_command() == [sys.executable, str(ROOT / "aicarousel.py")]
