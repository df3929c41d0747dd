"""Real clients with nothing but what `config NAME --write` gave them, or started by `run`, against a gateway whose only provider is scripted."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import aicarousel
from driver import RUN_S, Model, call, says, surroundings
from driver import program as find
from fakes import ROOT, Provider, Script, clean_environment
from house import House

QUIET = {"CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_AUTOUPDATER": "1", "DISABLE_TELEMETRY": "1", "DISABLE_ERROR_REPORTING": "1", "IS_SANDBOX": "1",
         "OPENCODE_DISABLE_AUTOUPDATE": "1", "OPENCODE_DISABLE_MODELS_FETCH": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
CODEX_QUIET = "check_for_update_on_startup = false\n[analytics]\nenabled = false\n"
CLIENTS = {
    "claude-code": ["-p", "Do it.", "--dangerously-skip-permissions"],
    "codex": ["exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", "Do it."],
    "opencode": ["run", "Do it."],
    "aider": ["--yes-always", "--no-check-update", "--analytics-disable", "--no-show-model-warnings", "--no-git", "--message", "Do it."],
    "cline": ["Do it now."],
    "gemini-cli": ["-p", "Do it.", "--skip-trust", "--approval-mode=yolo"],
}


def needed(name: str) -> str:
    """The program of a client; skips where it is not installed."""
    found = find(aicarousel.CLIENTS[name].program)
    if not found:
        pytest.skip(f"{aicarousel.CLIENTS[name].title} is not installed (nor does TEST_{aicarousel.CLIENTS[name].program.upper()} name it)")
    return found


def model(name: str, folder: Path) -> Script:
    """A file is made by a tool of the client, then a last word; else a word, whatever comes: aider has no tools, and OpenCode asks for a title without any."""
    first = {"claude-code": call("Write", file_path=str(folder / "made.txt"), content="made\n"), "codex": call("exec_command", cmd="echo made > made.txt"),
             "gemini-cli": call("write_file", file_path="made.txt", content="made\n"), "opencode": call("write", filePath=str(folder / "made.txt"), content="made\n"),
             "cline": call("run_commands", commands=["echo made > made.txt"])}.get(name)
    plain, told = says("All ", "done."), Model(says("I make it.", calls=[first] if first else []), says("All ", "done."))
    return lambda request: told(request) if first and request.json.get("tools") else plain(request)     # type: ignore[operator]


def environment_of(folder: Path) -> dict[str, str]:
    environment = surroundings(folder, **QUIET)
    del environment["XDG_CONFIG_HOME"]
    codex = Path(environment["HOME"]) / ".codex" / "config.toml"
    codex.parent.mkdir(exist_ok=True)
    codex.write_text(CODEX_QUIET)
    return environment


@pytest.mark.parametrize("name", CLIENTS)
def test_a_client_that_was_written_for_talks_to_the_gateway(build: Callable[..., House], provider: Provider, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    program, house, environment = needed(name), build(first=model(name, folder)), environment_of(folder)
    for variable in [variable for variable in os.environ if variable.startswith(("CODEX_", "CLAUDE_", "XDG_", "CLINE_"))]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("HOME", environment["HOME"])
    before = {path: path.read_bytes() for path in Path(environment["HOME"]).rglob("*") if path.is_file()}
    assert aicarousel.main(["config", name, "--write", "--home", str(folder.parent / "gateway"), "--server", house.url, "--key", house.key]) == 0
    ran = subprocess.run([program, *CLIENTS[name]], env=environment, cwd=folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=RUN_S)
    assert ran.returncode == 0 and "All done." in ran.stdout, (ran.stdout[-2000:], ran.stderr[-2000:])
    assert provider.calls("first") and (name == "aider" or (folder / "made.txt").read_text() == "made\n")
    assert aicarousel.main(["config", name, "--undo", "--home", str(folder.parent / "gateway")]) == 0
    assert all(path.read_bytes() == data for path, data in before.items())


@pytest.mark.parametrize("name", [name for name in CLIENTS if name != "cline"])
def test_a_client_that_is_run_needs_no_configuration_and_heeds_no_other(build: Callable[..., House], provider: Provider, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What its files say of another gateway counts for nothing; the gateway is one that is started for it, whose provider is the house."""
    program, house, environment = needed(name), build(first=model(name, folder)), environment_of(folder)
    home = folder.parent / "gateway"
    home.mkdir()
    (home / "models.json").write_text('{"back": {"baseUrl": "%s/v1", "default": "m", "enableFallback": false, "models": ["m"]}}' % house.url)
    monkeypatch.setenv("HOME", environment["HOME"])
    assert aicarousel.main(["config", name, "--write", "--home", str(home), "--server", "http://127.0.0.1:1", "--key", "sk-of-another-gateway"]) == 0
    environment |= {name: clean_environment(folder)[name] for name in ("PYTHONUSERBASE", "PYTHONPATH")} | {"BACK_API_KEY": house.key, "PORT": "1"}
    ran = subprocess.run([sys.executable, str(ROOT / "aicarousel.py"), "run", "--home", str(home), "--", program, *CLIENTS[name]], env=environment, cwd=folder,
                         stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=RUN_S)
    assert ran.returncode == 0 and "All done." in ran.stdout, (ran.stdout[-2000:], ran.stderr[-2000:])
    assert provider.calls("first") and aicarousel.list_keys(home / "data" / "aicarousel.db") == []
