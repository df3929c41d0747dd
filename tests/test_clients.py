"""Section 44, Clients: files written and taken back, the launcher, doctor with its planted faults, selftest.

The facts of the clients were seen with Claude Code 2.1.197, Codex 0.169.0, OpenCode 1.18.33, Cline 3.0.65, Gemini CLI 0.61.0 and aider 0.86.2; tests/clients/test_written.py drives those that are installed.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import stat
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import aicarousel as a
from fakes import HANG_S, ROOT, Gateway, Provider, answer, clean_environment, invocation
from test_cli import wait_for

Json = dict[str, Any]
URL, KEY = "http://127.0.0.1:7123", "sk-" + "5" * 64
WITH_FILES = [name for name, client in a.CLIENTS.items() if client.files]


class Place:
    """A user's home, a gateway's home and a working folder, with commands run in this process."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.user, self.home, self.work = folder / "user", folder / "gateway", folder / "work"
        for made in (self.user, self.work):
            made.mkdir()
        self._monkeypatch, self._capsys = monkeypatch, capsys
        for name in list(os.environ):
            if re.match(r"ANTHROPIC|OPENAI|GEMINI|GOOGLE_GEMINI|AIDER|CODEX|CLINE|OPENCODE|CONTINUE|XDG|AICAROUSEL|CLAUDE|PORT$|SSL_CERT", name):
                monkeypatch.delenv(name)
        self.set(HOME=str(self.user), AICAROUSEL_HOME=str(self.home))
        monkeypatch.chdir(self.work)

    def set(self, **variables: str) -> None:
        for name, value in variables.items():
            self._monkeypatch.setenv(name, value)

    def run(self, *words: str) -> tuple[int, str, str]:
        """Exit status, standard output and error of a command."""
        self._capsys.readouterr()
        status = a.main(words)
        return status, *self._capsys.readouterr()

    def read(self, *words: str) -> tuple[int, Any]:
        """Exit status and what a command prints with --json."""
        status, out, _ = self.run(*words, "--json")
        return status, json.loads(out)

    def path(self, name: str, number: int = 0) -> Path:
        """A file of a client."""
        return a.client_path(a.CLIENTS[name].files[number], os.environ)

    def write(self, name: str, text: str, number: int = 0) -> Path:
        """Puts a file of a client there."""
        path = self.path(name, number)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, newline="")
        return path

    @property
    def database(self) -> Path:
        return self.home / "data" / "aicarousel.db"

    def keys(self) -> list[tuple[str, bool]]:
        """Name and validity of every gateway key."""
        return [(key.name, key.active) for key in a.list_keys(self.database)] if self.database.exists() else []


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Place:
    return Place(tmp_path, monkeypatch, capsys)


# ---------------------------------------------------------------- texts

TREE = {"a": "x", "t": {"u": {"b": "y", "c": False}}}

MERGED = [
    # kind, text, values, after
    ("json", "", {"a": "x"}, '{\n  "a": "x"\n}\n'),
    ("json", '{"a": "x"}', {"a": "x"}, '{"a": "x"}'),
    ("json", '{\r\n\t"z": 1,\r\n\t"a": "old"\r\n}', {"a": "x"}, '{\r\n\t"z": 1,\r\n\t"a": "x"\r\n}'),
    ("json", '{\n  // mine\n  "t": {"u": {"z": 1}}, /* yes */\n}\n', TREE, '{\n  // mine\n  "t": {"u": {"z": 1, "b": "y", "c": false}},\n  "a": "x", /* yes */\n}\n'),
    ("json", '\ufeff{"t": {"u": {"b": "//", "c": false}}}', {"t": {"u": {"c": True}}}, '\ufeff{"t": {"u": {"b": "//", "c": true}}}'),
    ("json", "{}", {"t": {"b": "x"}}, '{\n  "t": {"b": "x"}\n}'),
    ("toml", "", TREE, 'a = "x"\n\n[t.u]\nb = "y"\nc = false\n'),
    ("toml", "[z]\na = 1\n", {"a": "x"}, 'a = "x"\n\n[z]\na = 1\n'),
    ("toml", "# top\nz = 1 # one\n\n[t.u] # here\nb = 'old'   # old\nd = [\n  \"[t.u]\",\n]\n\n[after]\n", TREE,
     "# top\nz = 1 # one\na = \"x\"\n\n[t.u] # here\nb = \"y\"   # old\nd = [\n  \"[t.u]\",\n]\nc = false\n\n[after]\n"),
    ("toml", 'a = "old"\r\n[t."u"]\r\nc = true\r\n', TREE, 'a = "x"\r\n[t."u"]\r\nc = false\r\nb = "y"\r\n'),
    ("toml", "z = 1", {"a": "x"}, 'z = 1\na = "x"\n'),
    ("yaml", "", {"a": "x", "b": "http://127.0.0.1:1/v1"}, "a: x\nb: http://127.0.0.1:1/v1\n"),
    ("yaml", "# mine\na: 'it''s'  # old\nz:\n  a: deep\n", {"a": "yes", "b": "1.0"}, '# mine\na: "yes"  # old\nz:\n  a: deep\nb: "1.0"\n'),
    ("yaml", "---\na:   # empty\nz: 1", {"a": "x"}, "---\na: x   # empty\nz: 1\n"),
    ("yaml", "z: 1\n", {"m": [{"name": "A", "k": "x"}]}, "z: 1\nm:\n  - name: A\n    k: x\n"),
    ("yaml", "m: []\nz: 1\n", {"m": [{"name": "A", "k": "x"}]}, "m:\n  - name: A\n    k: x\nz: 1\n"),
    ("yaml", "m:\n- name: B\n  r:\n    - q\nz: 1\n", {"m": [{"name": "A", "k": "x"}]}, "m:\n- name: A\n  k: x\n- name: B\n  r:\n    - q\nz: 1\n"),
    ("yaml", "m:  # all\n  - name: B\n    k: 1\n  - name: \"A\"\n    k: old\n    more:\n      - q\n\n# end\n  - name: C\n", {"m": [{"name": "A", "k": "x"}]},
     "m:  # all\n  - name: B\n    k: 1\n  - name: A\n    k: x\n\n# end\n  - name: C\n"),
    ("dotenv", "# mine\nA=old # why\n", {"A": "x", "B": "y"}, "# mine\nA=x # why\nB=y\n"),
]


@pytest.mark.parametrize("kind,text,tree,after", MERGED)
def test_values_are_put_in_and_all_else_stays(kind: str, text: str, tree: Json, after: str) -> None:
    assert a.merge_text(kind, text, tree, "file") == after
    assert a.merge_text(kind, after, tree, "file") == after, "a second time changes nothing"


REFUSED = [
    ("json", "{", TREE), ("json", "[]", TREE), ("json", '{"a": 1 "b": 2}', TREE), ("json", '{"a": "\n"}', TREE), ("json", '{"a": 1, "a": 2}', {"a": "x"}),
    ("toml", "a = ", TREE), ("toml", "t = {u = {b = 1}}\n", TREE), ("toml", 't.u.b = "z"\n', TREE), ("toml", 'a = """\nlong\n"""\n', TREE), ("toml", '[[t]]\nu = 1\n', TREE),
    ("yaml", "{a: 1}\n", {"a": "x"}), ("yaml", "a: |\n  long\n", {"a": "x"}), ("yaml", "---\na: 1\n---\na: 2\n", {"a": "x"}), ("yaml", "a:\n\t- b\n", {"a": "x"}),
    ("yaml", "a:\n  - b\n", {"a": "x"}), ("yaml", "a: one\n  two\n", {"a": "x"}), ("yaml", "m: [{name: A}]\n", {"m": [{"name": "A"}]}), ("dotenv", "what is this\n", {"A": "x"}),
]


@pytest.mark.parametrize("kind,text,tree", REFUSED)
def test_what_cannot_be_read_or_changed_safely_is_refused(kind: str, text: str, tree: Json) -> None:
    with pytest.raises(a.ConfigError) as raised:
        a.merge_text(kind, text, tree, "the file")
    assert raised.value.where == "the file" and "nothing was written" in raised.value.expected and "\n" not in str(raised.value)


# ---------------------------------------------------------------- written and taken back

MINE: Mapping[str, tuple[str, ...]] = {
    "claude-code": ('{\r\n    "permissions": {"allow": ["Bash(ls:*)"]},\r\n    "env": {"FOO": "bar", "ANTHROPIC_MODEL": "opus"}\r\n}',),
    "codex": ('# mine\nmodel = "gpt-6-sol"\napproval_policy = "never" # yes\n\n[mcp_servers.x]\ncommand = "x"\nargs = [\n  "[b]",\n]\n', "OTHER='1' # mine\n"),
    "cline": ('{\n  "version": 2,\n  "lastUsedProvider": "cline",\n  "providers": {\n    "cline": {\n      "settings": {"model": "m"}\n    }\n  }\n}',),
    "opencode": ('{\n  // mine\n  "theme": "x",\n  "provider": {\n    "other": {"npm": "@ai-sdk/openai"},\n  },\n}\n',),
    "aider": ("# mine\ndark-mode: true   # yes\nmodel: gpt-4o\nread: [a.md]\n",),
    "gemini-cli": ('{\n  "ui": {\n    "theme": "x"\n  },\n  "security": {"auth": {"selectedType": "oauth-personal"}}\n}\n', "GEMINI_MODEL=gemini-9  # mine\nOTHER='1'\n"),
    "continue": ("name: Mine\nversion: 2.0.0\nschema: v1\nmodels:\n  - name: Other\n    provider: ollama\n    roles:\n      - chat\n# end\ncontext:\n  - provider: code\n",),
}


def values_of(name: str, url: str, key: str) -> list[Any]:
    return [a.fill(file.values, url, key) for file in a.CLIENTS[name].files]


def holds(known: Any, wanted: Any) -> bool:
    """Whether all of `wanted` stands in `known`."""
    if isinstance(wanted, dict):
        return isinstance(known, dict) and all(holds(known.get(name), value) for name, value in wanted.items())
    return wanted[0] in known if isinstance(wanted, list) else known == wanted


@pytest.mark.parametrize("name", WITH_FILES)
def test_written_into_a_file_of_ones_own_and_taken_back(place: Place, name: str) -> None:
    paths = [place.write(name, text, number) for number, text in enumerate(MINE[name])]
    paths[0].chmod(0o640)
    before = [path.read_bytes() for path in paths]

    status, out, _ = place.run("config", name, "--dry-run")
    assert status == 0 and out.startswith(f"--- {paths[0]}\n+++ {paths[0]}\n@@") and [path.read_bytes() for path in paths] == before and place.keys() == []

    status, out, _ = place.run("config", name, "--write")
    assert status == 0 and f"wrote {paths[0]}" in out and not re.search("sk-[0-9a-f]", out) and place.keys() == [(name, True)]
    assert stat.S_IMODE(paths[0].stat().st_mode) == 0o640, "a mode is kept"
    trees = [a.KINDS[file.kind][0](path.read_bytes().decode().replace("\r\n", "\n")) for file, path in zip(a.CLIENTS[name].files, paths)]
    shown = [key for file, tree in zip(a.CLIENTS[name].files, trees) for key in a._shown_keys(file.values, tree)]
    [key] = set(shown)
    assert all(holds(tree, wanted) for tree, wanted in zip(trees, values_of(name, URL, key)))
    changed = [line for old, path in zip(before, paths) for line in old.decode().splitlines() if line not in path.read_bytes().decode().splitlines()]
    assert len(changed) <= 3 and all("FOO" in line or "gpt-" in line or "gemini-9" in line or line.endswith(("},", "}")) or '"cline"' in line for line in changed), changed

    written = [path.read_bytes() for path in paths]
    status, out, _ = place.run("config", name, "--write")
    assert status == 0 and out.startswith("all of it is there already\n") and [path.read_bytes() for path in paths] == written and len(place.keys()) == 1, "the good key is kept"

    status, out, _ = place.run("config", name, "--undo")
    assert status == 0 and [path.read_bytes() for path in paths] == before and place.keys() == [(name, False)]
    assert stat.S_IMODE(paths[0].stat().st_mode) == 0o640 and list((place.home / "data" / "clients").iterdir()) == []
    status, _, err = place.run("config", name, "--undo")
    assert status == 2 and "nothing that was written" in err


@pytest.mark.parametrize("name", WITH_FILES)
def test_files_that_are_made_are_for_the_owner_and_gone_again(place: Place, name: str) -> None:
    paths = [place.path(name, number) for number in range(len(a.CLIENTS[name].files))]
    status, told = place.read("config", name, "--write", "--key", KEY, "--server", "http://127.0.0.1:9/v1")
    assert (status, told) == (0, {"client": name, "written": [str(path) for path in paths], "key": None}) and place.keys() == []
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in paths)
    texts = "".join(path.read_text() for path in paths)
    assert KEY in texts and "http://127.0.0.1:9" in texts and "{" + "url}" not in texts and "/v1/v1" not in texts
    status, told = place.read("config", name, "--undo")
    assert (status, told) == (0, {"client": name, "restored": [str(path) for path in paths], "revoked": []}) and not any(path.exists() for path in paths)


@pytest.mark.parametrize("name", WITH_FILES)
def test_what_was_changed_since_is_not_taken_back(place: Place, name: str) -> None:
    path = place.write(name, MINE[name][0])
    place.run("config", name, "--write")
    path.write_bytes(changed := path.read_bytes().replace(b"7123", b"7124").replace(b"gemini-api-key", b"other"))
    status, _, err = place.run("config", name, "--undo")
    assert status == 2 and "changed since" in err and path.read_bytes() == changed
    copy = Path(re.search(r"what stood there before is (\S+)", err)[1])        # type: ignore[index]
    assert copy.read_bytes().decode() == MINE[name][0] and stat.S_IMODE(copy.stat().st_mode) == 0o600
    assert place.run("config", name, "--write")[0] == 0 and place.run("config", name, "--undo")[0] == 0
    assert path.read_bytes() == changed, "what stood there before the last --write"


def test_what_cline_changes_at_every_start_is_no_change(place: Place) -> None:
    path = place.write("cline", MINE["cline"][0])
    place.run("config", "cline", "--write")
    tree = json.loads(path.read_text())
    tree["providers"]["openai-compatible"]["updatedAt"] = "2026-11-21T00:00:00.000Z"
    path.write_text(json.dumps(dict(reversed(tree.items())), indent=4))
    assert place.run("config", "cline", "--undo")[0] == 0 and path.read_text() == MINE["cline"][0]


def test_a_link_stays_one_and_another_folder_is_found(place: Place) -> None:
    real = place.user / "dotfiles.json"
    real.write_text("{}")
    place.set(CLAUDE_CONFIG_DIR=str(place.user / "claude"))
    (place.user / "claude").mkdir()
    (place.user / "claude" / "settings.json").symlink_to(real)
    assert place.run("config", "claude-code", "--write")[0] == 0
    assert (place.user / "claude" / "settings.json").is_symlink() and "ANTHROPIC_BASE_URL" in real.read_text()
    assert str(real) in place.run("config", "claude-code")[1]


def test_opencode_with_comments_has_another_name(place: Place) -> None:
    path = place.user / ".config" / "opencode" / "opencode.jsonc"
    path.parent.mkdir(parents=True)
    path.write_text("{}")
    assert place.path("opencode") == path


def test_a_revoked_key_is_replaced_and_a_key_that_is_given_goes_in(place: Place) -> None:
    place.run("config", "aider", "--write")
    place.run("key", "revoke", "1")
    place.run("config", "aider", "--write")
    assert place.keys() == [("aider", False), ("aider", True)]
    place.run("config", "aider", "--write", "--key", KEY)
    assert f"openai-api-key: {KEY}" in place.path("aider").read_text() and len(place.keys()) == 2
    status, out, _ = place.run("config", "aider", "--dry-run")
    assert status == 0 and KEY not in out and "+openai-api-key: sk-..." in out, "a key is shown by no difference"


@pytest.mark.parametrize("text", ['{"env": ', "[1]"])
def test_a_broken_file_is_left_alone_and_no_key_is_made(place: Place, text: str) -> None:
    path = place.write("claude-code", text)
    status, out, err = place.run("config", "claude-code", "--write")
    assert status == 2 and out == "" and str(path) in err and path.read_text() == text and place.keys() == []


def test_files_that_cannot_be_read_or_written_are_told(place: Place) -> None:
    place.path("codex").mkdir(parents=True)
    assert "Is a directory" in place.run("config", "codex", "--write")[2]
    place.write("aider", "")
    place.path("aider").write_bytes(b"a: \xff\n")
    assert "not UTF-8" in place.run("config", "aider", "--write")[2]
    (place.user / ".cline").write_text("a file where a folder should be")
    status, _, err = place.run("config", "cline", "--write")
    assert status == 2 and ".cline" in err
    record = place.home / "data" / "clients" / "opencode.json"
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text("{}")
    assert "can be deleted" in place.run("config", "opencode", "--undo")[2]


@pytest.mark.parametrize("name", [*(name for name in a.CLIENTS if name not in WITH_FILES), "systemd"])
@pytest.mark.parametrize("option", ["--write", "--dry-run", "--undo"])
def test_what_has_no_file_is_not_written(place: Place, name: str, option: str) -> None:
    status, out, err = place.run("config", name, option)
    assert status == 2 and out == "" and f"aicarousel: config {name}: found nothing that could be written; expected " in err


@pytest.mark.parametrize("name", [*a.CLIENTS, "systemd"])
def test_config_prints_the_same_as_json(place: Place, name: str) -> None:
    status, out, _ = place.run("config", name, "--key", KEY)
    told = place.read("config", name, "--key", KEY)[1]
    assert status == 0 and told["client"] == name and all(row["content"] in out and (row["path"] or "") in out for row in told["files"])
    assert name == "systemd" or KEY in out and "127.0.0.1:7123" in out


def test_config_takes_the_address_of_the_gateway(place: Place) -> None:
    place.set(PORT="8001", AICAROUSEL_HOST="::1")
    assert "http://[::1]:8001/v1" in place.run("config", "curl")[1]
    place.set(AICAROUSEL_HOST="0.0.0.0")
    assert "http://127.0.0.1:8001/v1" in place.run("config", "curl")[1]
    assert "https://gate.example:443/v1" in place.run("config", "curl", "--server", "https://gate.example/v1/")[1]
    for wrong in ("gate.example", "ftp://gate.example", "http://x:y"):
        assert place.run("config", "curl", "--server", wrong)[0] == 2, wrong


def test_the_unit_is_one(place: Place, tmp_path: Path) -> None:
    words = ['/usr/bin/python 3', "/a/50% \"x\"/aicarousel.py", "serve"]
    assert '\nExecStart="/usr/bin/python 3" "/a/50%% \\"x\\"/aicarousel.py" serve\n' in a.systemd_unit(words)
    unit = place.run("config", "systemd", "--home", str(place.home))[1]
    assert f"ExecStart={sys.executable} {ROOT / 'aicarousel.py'} serve --home {place.home}\n" in unit and "--home" not in place.run("config", "systemd")[1]
    with contextlib.suppress(FileNotFoundError):            # where there is systemd, it has no complaint
        (tmp_path / "aicarousel.service").write_text(unit)
        ran = subprocess.run(["systemd-analyze", "--user", "verify", str(tmp_path / "aicarousel.service")], capture_output=True, text=True, timeout=HANG_S)
        assert "aicarousel.service:" not in ran.stderr


# ---------------------------------------------------------------- the launcher

@pytest.fixture(scope="module")
def demo(module_gateway_factory: Callable[..., Gateway]) -> Gateway:
    """A gateway with the built-in provider alone."""
    return module_gateway_factory(arguments=["--demo"])


@pytest.fixture(scope="module")
def launch(tmp_path_factory: pytest.TempPathFactory, demo: Gateway) -> Callable[..., subprocess.Popen[str]]:
    """Starts `run -- words` beside the gateway, or away from it."""
    folder = tmp_path_factory.mktemp("launch")

    def start(*words: str, beside: bool = True, program: str = "", stdin: int = subprocess.DEVNULL, **variables: str) -> subprocess.Popen[str]:
        if program:         # a client of that name, which is a shell script
            path = folder / program
            path.write_text(f"#!/bin/sh\n{words[0]}\n")
            path.chmod(0o700)
            words = (str(path), *words[1:])
        home = demo.home if beside else folder / "away"
        environment = clean_environment(folder) | {"AICAROUSEL_HOME": str(home), "PORT": str(demo.port) if beside else "1", **variables}
        return subprocess.Popen([*invocation(ROOT / "aicarousel.py"), "run", "--", *words], env=environment, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    return start


def names_of_keys(home: Path) -> list[str]:
    return [key.name for key in a.list_keys(home / "data" / "aicarousel.db")]


SHOW = 'echo "$0" "$@"; env'


@pytest.mark.parametrize("program,wanted", [
    ("claude", ["--settings", "FOO=bar"]),
    ("codex", ["-c", 'model="aicarousel"', 'model_providers.aicarousel={name="AICarousel",base_url="{url}/v1"', "AICAROUSEL_RUN_KEY=sk-"]),
    ("opencode", ['OPENCODE_CONFIG_CONTENT={"model": "aicarousel/aicarousel"', '"baseURL": "{url}/v1"', '"apiKey": "sk-']),
    ("aider", ["AIDER_OPENAI_API_BASE={url}/v1", "AIDER_OPENAI_API_KEY=sk-", "AIDER_MODEL=openai/aicarousel"]),
    ("gemini", ["GOOGLE_GEMINI_BASE_URL={url}\n", "GEMINI_API_KEY=sk-", "GEMINI_CLI_SYSTEM_SETTINGS_PATH=/"]),
    ("other", ["OPENAI_BASE_URL={url}/v1", "OPENAI_API_KEY=sk-", "ANTHROPIC_BASE_URL={url}\n", "ANTHROPIC_API_KEY=sk-", "exec --json"]),
])
def test_each_client_is_given_what_it_heeds(launch: Callable[..., subprocess.Popen[str]], demo: Gateway, program: str, wanted: list[str]) -> None:
    out, err = launch(SHOW, "exec", "--json", program=program, FOO="bar", ANTHROPIC_API_KEY="sk-mine", ANTHROPIC_AUTH_TOKEN="sk-mine").communicate(timeout=HANG_S)
    assert err == "" and all(word.replace("{url}", demo.url) in out for word in wanted), out
    assert "ANTHROPIC_API_KEY=sk-mine" not in out or program in ("codex", "opencode", "aider", "gemini")
    assert names_of_keys(demo.home) == ["test"], "the key is gone"


def test_claude_gets_a_settings_file_of_its_own(launch: Callable[..., subprocess.Popen[str]], demo: Gateway) -> None:
    out, _ = launch('stat -c %a "$2"; cat "$2"; echo; echo "$2"', program="claude").communicate(timeout=HANG_S)
    mode, settings, path = out.split("\n")[:3]
    assert mode == "600" and json.loads(settings)["env"]["ANTHROPIC_BASE_URL"] == demo.url and not Path(path).exists()


def test_a_request_of_the_child_is_answered_and_its_key_is_refused_afterwards(launch: Callable[..., subprocess.Popen[str]], demo: Gateway) -> None:
    out, err = launch("sh", "-c", 'echo "$OPENAI_API_KEY"; exit 7').communicate(timeout=HANG_S)
    assert err == "" and re.fullmatch("sk-[0-9a-f]{64}\n", out)
    assert demo.get("/health?deep=1", key=out.strip()).status == 401


ASK = """
import json, os, urllib.request as r
r.install_opener(r.build_opener(r.ProxyHandler({})))
body = json.dumps({"messages": [{"role": "user", "content": "Hi"}]}).encode()
asked = r.Request(os.environ["OPENAI_BASE_URL"] + "/chat/completions", body, {"authorization": "Bearer " + os.environ["OPENAI_API_KEY"], "content-type": "application/json"})
print(os.environ["OPENAI_BASE_URL"], json.load(r.urlopen(asked))["choices"][0]["message"]["content"])
"""


def test_a_gateway_is_started_where_none_runs_and_stopped_at_the_end(launch: Callable[..., subprocess.Popen[str]], demo: Gateway, tmp_path: Path) -> None:
    (tmp_path / "models.json").write_text(json.dumps({"back": {"baseUrl": f"{demo.url}/v1", "default": "m", "enableFallback": False, "models": ["m"]}}))
    running = launch(sys.executable, "-c", ASK, AICAROUSEL_HOME=str(tmp_path), PORT="1", BACK_API_KEY=demo.key)
    out, err = running.communicate(timeout=HANG_S)
    assert running.returncode == 0 and err == "" and a.Demo.ANSWER in out
    assert a.ask_gateway(out.split("/v1")[0], "GET", "/health", timeout_s=1.0).status == 0 and names_of_keys(tmp_path) == []
    assert "outcome=ok" in (tmp_path / "data" / "run.log").read_text() and stat.S_IMODE((tmp_path / "data" / "run.log").stat().st_mode) == 0o600


@pytest.fixture
def elsewhere(gateway_factory: Callable[..., Gateway]) -> Gateway:
    """A gateway on a port that it was told, and its home's settings were not."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    return gateway_factory(arguments=["--demo", "--port", str(port)])


def test_a_gateway_on_another_port_is_found_by_its_home(elsewhere: Gateway, launch: Callable[..., subprocess.Popen[str]], place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """By `run`, `config` and `doctor`, which mends what points elsewhere."""
    out, err = launch("sh", "-c", 'echo "$OPENAI_BASE_URL"', AICAROUSEL_HOME=str(elsewhere.home), PORT="1").communicate(timeout=HANG_S)
    assert (out, err) == (f"{elsewhere.url}/v1\n", "")
    monkeypatch.setattr(a, "on_stage", lambda play: None)
    place.set(AICAROUSEL_HOME=str(elsewhere.home), PORT="1", PATH="")
    assert elsewhere.url in place.run("config", "curl")[1]
    assert place.run("config", "aider", "--write", "--server", "http://127.0.0.1:1")[0] == 0
    status, told = place.read("doctor")
    assert status == 1 and "is a port where nothing listens" in failed(told)[0]["told"] and elsewhere.url in next(check["told"] for check in told["checks"] if check["what"] == "running")
    assert place.read("doctor", "--fix")[0] == 0 and elsewhere.url in place.path("aider").read_text()
    place.set(PORT=str(elsewhere.port))
    assert place.read("doctor")[0] == 0


def test_clients_are_not_pointed_at_a_gateway_that_ends_with_another(launch: Callable[..., subprocess.Popen[str]], place: Place) -> None:
    running = launch("sh", "-c", 'echo "$ANTHROPIC_BASE_URL"; exec cat', stdin=subprocess.PIPE, AICAROUSEL_HOME=str(place.home), PORT="1")
    assert running.stdout is not None and running.stdin is not None
    address = running.stdout.readline().strip()
    assert wait_for(lambda: [row["address"] for row in place.read("info")[1]["servers"]] == [address])
    place.set(PORT="1")
    assert "http://127.0.0.1:1/" in place.run("config", "curl")[1] and place.run("quota")[0] == 0, "commands ask it all the same"
    out, _ = launch("sh", "-c", 'echo "$ANTHROPIC_BASE_URL"', AICAROUSEL_HOME=str(place.home), PORT="1").communicate(timeout=HANG_S)
    assert out.startswith("http://127.0.0.1:") and out.strip() != address
    running.communicate(timeout=HANG_S)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a process of its parent's end")
def test_a_launcher_that_is_killed_leaves_no_gateway(launch: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    running = launch("sh", "-c", 'echo "$ANTHROPIC_BASE_URL"; exec cat', stdin=subprocess.PIPE, AICAROUSEL_HOME=str(tmp_path), PORT="1")
    assert running.stdout is not None
    address = running.stdout.readline().strip()
    assert a.ask_gateway(address, "GET", "/health").status == 200
    running.kill()
    running.communicate(timeout=HANG_S)
    assert wait_for(lambda: a.ask_gateway(address, "GET", "/health", timeout_s=1.0).status == 0)


def test_a_gateway_that_does_not_start_says_why(launch: Callable[..., subprocess.Popen[str]], tmp_path: Path) -> None:
    running = launch("true", AICAROUSEL_HOME=str(tmp_path), PORT="1", AICAROUSEL_TLS_CERT="none.pem", AICAROUSEL_TLS_KEY="none.pem")
    _, err = running.communicate(timeout=HANG_S)
    assert running.returncode == 2 and "--tls-cert" in err and "Traceback" not in err and names_of_keys(tmp_path) == []


@pytest.mark.parametrize("words,status", [(["sh", "-c", "exit 7"], 7), (["sh", "-c", "kill -KILL $$"], 137), (["true"], 0)])
def test_the_exit_status_is_the_childs(launch: Callable[..., subprocess.Popen[str]], words: list[str], status: int) -> None:
    running = launch(*words)
    running.communicate(timeout=HANG_S)
    assert running.returncode == status


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT"])
def test_signals_go_on_to_the_child(launch: Callable[..., subprocess.Popen[str]], demo: Gateway, name: str) -> None:
    running = launch("sh", "-c", f'trap "echo heard; exit 5" {name[3:]}; echo up; while :; do sleep 0.05; done')
    assert running.stdout is not None and running.stdout.readline() == "up\n"
    running.send_signal(getattr(signal, name))
    out, _ = running.communicate(timeout=HANG_S)
    assert (out, running.returncode) == ("heard\n", 5) and names_of_keys(demo.home) == ["test"]


def test_a_key_of_the_terminal_reaches_the_child_once(demo: Gateway, tmp_path: Path) -> None:
    """Ctrl-C goes to the launcher and to the child; the launcher does not send it a second time."""
    import pty
    child, terminal = pty.fork()
    if not child:
        os.environ.update(clean_environment(tmp_path) | {"AICAROUSEL_HOME": str(demo.home), "PORT": str(demo.port)})
        script = 'trap "echo heard" INT; echo up; read line; read line; echo "got $line"; exit 3'
        os.execv(sys.executable, [*invocation(ROOT / "aicarousel.py"), "run", "--", "bash", "-c", script])
    said = b""

    def read_until(word: bytes) -> None:
        nonlocal said
        ends_at = time.monotonic() + HANG_S
        while word not in said and time.monotonic() < ends_at:
            with contextlib.suppress(OSError):
                said += os.read(terminal, 4096)

    read_until(b"up")
    os.write(terminal, b"\x03")
    read_until(b"heard")
    os.write(terminal, b"one\ntwo\nthree\n")
    read_until(b"got")
    _, status = os.waitpid(child, 0)
    os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 3 and said.count(b"heard") == 1, said


def test_nothing_to_run_and_no_such_program(place: Place, demo: Gateway) -> None:
    place.set(AICAROUSEL_HOME=str(demo.home), PORT=str(demo.port))
    assert place.run("run")[0] == place.run("run", "--")[0] == 2
    status, _, err = place.run("run", "--", "no-such-program-here")
    assert status == 2 and "No such file" in err and names_of_keys(demo.home) == ["test"]


# ---------------------------------------------------------------- doctor

@pytest.fixture
def clinic(place: Place, demo: Gateway, monkeypatch: pytest.MonkeyPatch) -> Place:
    """A user of the running gateway whose Claude Code, Codex, OpenCode and aider are well set up; the dialogues are looked at elsewhere."""
    monkeypatch.setattr(a, "on_stage", lambda play: None)
    (place.work / "bin").mkdir()
    shutil.rmtree(demo.home / "data" / "clients", ignore_errors=True)       # of users before
    place.home = demo.home
    place.set(AICAROUSEL_HOME=str(demo.home), PORT=str(demo.port), PATH=str(place.work / "bin"))
    for name in WITH_FILES:
        for change in a.plan_changes(a.CLIENTS[name], os.environ, demo.url, demo.key):
            change.path.parent.mkdir(parents=True, exist_ok=True)
            change.path.write_bytes(change.after)
    return place


def failed(told: Json) -> list[Json]:
    return [check for check in told["checks"] if check["ok"] is False]


def test_who_is_well_is_told_so(clinic: Place, demo: Gateway) -> None:
    status, told = clinic.read("doctor")
    assert status == 0 and told["ok"] and failed(told) == []
    assert {check["subject"] for check in told["checks"]} == {"home", "server", *WITH_FILES}
    assert {check["what"] for check in told["checks"] if check["ok"]} >= {"permissions", "configuration", "database", "TLS authorities", "clock", "running", "address", "key"}
    status, out, _ = clinic.run("doctor")
    assert status == 0 and out.endswith("all is well\n") and f"ok    codex: address: {demo.url}/v1 of {clinic.path('codex')}\n" in out and demo.key not in out


def edit(name: str, old: str, new: str, number: int = 0) -> Callable[[Place, Gateway], None]:
    """A fault: a text in a client's file that stands in place of another; {port} and {key} are the gateway's."""
    def plant(place: Place, demo: Gateway) -> None:
        path, before = place.path(name, number), old.replace("{port}", str(demo.port)).replace("{key}", demo.key)
        text = path.read_text()
        assert before in text
        path.write_text(text.replace(before, new.replace("{port}", str(demo.port)).replace("{key}", demo.key)))
    return plant


def key_of(limits: Mapping[str, Any], change: Callable[[Path, int], object]) -> Callable[[Place, Gateway], None]:
    """A fault: Codex has a key that was made here and then changed."""
    def plant(place: Place, demo: Gateway) -> None:
        key, row = a.create_key(place.database, "spare", limits=limits)
        edit("codex", "{key}", key, 1)(place, demo)
        change(place.database, row.id)
    return plant


def project(place: Place, _demo: Gateway) -> None:
    (place.work / ".claude").mkdir()
    (place.work / ".claude" / "settings.local.json").write_text('{"env": {"ANTHROPIC_BASE_URL": "https://api.example"}}')


def variable(place: Place, _demo: Gateway) -> None:
    place.set(AIDER_OPENAI_API_BASE="http://127.0.0.1:1/v1")


def above(place: Place, _demo: Gateway) -> None:
    (place.work / ".git").mkdir()
    (place.work / "deep").mkdir()
    (place.work / "opencode.json").write_text('{"provider": {"aicarousel": {"options": {"baseURL": "http://127.0.0.1:1/v1"}}}}')
    os.chdir(place.work / "deep")


def nearer(place: Place, _demo: Gateway) -> None:
    (place.work / ".env").write_text("GOOGLE_GEMINI_BASE_URL=http://127.0.0.1:1\n")


def inline(place: Place, _demo: Gateway) -> None:
    place.set(OPENCODE_CONFIG_CONTENT='{"provider": {"aicarousel": {"options": {"apiKey": "{env:MY_KEY}"}}}}', MY_KEY="gsk_" + "A" * 40)


def built_in(place: Place, demo: Gateway) -> None:
    place.path("codex").write_text(f'openai_base_url = "{demo.url}/v1"\n')
    place.set(OPENAI_API_KEY=demo.key)


def open_files(place: Place, _demo: Gateway) -> None:
    (place.home / ".env").touch()
    (place.home / ".env").chmod(0o644)


def open_folder(place: Place, _demo: Gateway) -> None:
    place.home.chmod(0o777)


def write_in_home(name: str, text: str) -> Callable[[Place, Gateway | None], None]:
    def plant(place: Place, _demo: Gateway | None) -> None:
        place.home = place.user / "other-home"
        path = place.home / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
        path.chmod(0o600)
        place.set(AICAROUSEL_HOME=str(place.home))
    return plant


def no_authorities(place: Place, _demo: Gateway) -> None:
    place.set(SSL_CERT_FILE=str(place.user / "none.pem"), SSL_CERT_DIR=str(place.user))


FAULTS: list[tuple[str, str, Callable[[Place, Gateway], None], str, str]] = [
    # name, subject, what is wrong, what is told, the fix that is named ("--write": and --fix does it)
    ("wrong URL", "claude-code", edit("claude-code", "127.0.0.1:{port}", "gate.example"), "is not this gateway, which is at", "--write"),
    ("a login in the URL", "cline", edit("cline", "127.0.0.1:{port}", "me:my-password@gate.example"), "http://***@gate.example/v1 of ", "--write"),
    ("no URL", "cline", edit("cline", "http://127.0.0.1:{port}", "127.0.0.1"), "is no address", "--write"),
    ("missing /v1", "codex", edit("codex", "{port}/v1", "{port}"), "lacks /v1 at its end", "--write"),
    ("missing /v1, aider", "aider", edit("aider", "{port}/v1", "{port}/"), "lacks /v1 at its end", "--write"),
    ("/v1 too many", "claude-code", edit("claude-code", "{port}", "{port}/v1"), "the client adds the rest itself", "--write"),
    ("wrong port", "opencode", edit("opencode", "127.0.0.1:{port}", "127.0.0.1:1"), "is a port where nothing listens; this gateway's is ", "--write"),
    ("revoked key", "codex", key_of({}, a.revoke_key), "was revoked (id ", "--write"),
    ("expired key", "codex", key_of({"expires_at": 1000}, lambda path, number: None), "has expired (id ", "--write"),
    ("deleted key", "codex", key_of({}, a.delete_key), "is unknown here: a key of another gateway, or deleted", "--write"),
    ("key of another gateway", "aider", edit("aider", "{key}", "sk-" + "0" * 64), "is unknown here: a key of another gateway", "--write"),
    ("no key", "cline", edit("cline", "{key}", ""), "it has none", "--write"),
    ("a provider's key", "opencode", inline, "that of OPENCODE_CONFIG_CONTENT is a provider's key, not a gateway key", "--write"),
    ("shadowed by a project", "claude-code", project, "settings.local.json hides http://127.0.0.1:", "take the address out of {work}/.claude/settings.local.json"),
    ("shadowed by a variable", "aider", variable, "of the environment hides http://127.0.0.1:", "take the address out of the environment"),
    ("shadowed from above", "opencode", above, "opencode.json hides http://127.0.0.1:", "take the address out of {work}/opencode.json"),
    ("/v1 too many, Gemini CLI", "gemini-cli", edit("gemini-cli", "{port}", "{port}/v1", 1), "the client adds the rest itself", "--write"),
    ("another .env", "gemini-cli", nearer, "work/.env is a port where nothing listens", "take it out of {work}/.env, then: python aicarousel.py config gemini-cli --write"),
    ("WebSocket", "codex", edit("codex", "supports_websockets = false", "supports_websockets = true"), "supports_websockets is true", "--write"),
    ("built-in provider", "codex", built_in, "tries a WebSocket at every start", "--write"),
    ("no such provider", "codex", edit("codex", 'model_provider = "aicarousel"', 'model_provider = "gone"'), "there is no [model_providers.gone]", "--write"),
    ("wrong wire_api", "codex", edit("codex", 'wire_api = "responses"', 'wire_api = "chat"'), "wire_api is 'chat'", "--write"),
    ("broken client file", "claude-code", edit("claude-code", "}", "", 0), "expected JSON that can be read", "mend {user}/.claude/settings.json"),
    ("home too open", "home", open_files, ".env is open to others (644)", "chmod 600 {home}/.env"),
    ("folder too open", "home", open_folder, "is open to others (777)", "chmod 755 {home}"),
    ("unreadable database", "home", write_in_home("data/aicarousel.db", "this is no database at all, and it is long enough to be looked at" * 20), "aicarousel.db: found", "aicarousel-backup-*.db"),
    ("broken models.json", "home", write_in_home("models.json", '{"groq": {"modles": []}}'), "models.json", "mend {user}/other-home/models.json"),
    ("broken .env", "home", write_in_home(".env", "what is this"), ".env line 1", "mend .env line 1"),
    ("no authorities", "home", no_authorities, "0 are trusted", "SSL_CERT_FILE names {user}/none.pem"),
]


@pytest.mark.parametrize("subject,plant,told,fix", [row[1:] for row in FAULTS], ids=[row[0] for row in FAULTS])
def test_a_planted_fault_is_found_and_its_fix_is_named(clinic: Place, demo: Gateway, subject: str, plant: Callable[[Place, Gateway], None], told: str, fix: str) -> None:
    modes = demo.home.stat().st_mode
    plant(clinic, demo)
    try:
        status, found = clinic.read("doctor")
        wrong = [check for check in failed(found) if check["subject"] == subject]
        assert status == 1 and not found["ok"] and len(wrong) == 1 and told in wrong[0]["told"], found
        wanted = f"python aicarousel.py config {subject} --write" if fix == "--write" else fix.format(work=clinic.work, user=clinic.user, home=clinic.home)
        assert wanted in wrong[0]["fix"]
        if fix == "--write" and subject != "opencode":
            status, healed = clinic.read("doctor", "--fix")
            assert status == 0 and "wrote" in next(check["told"] for check in healed["checks"] if check["what"] == "fix"), "what is told then was looked at again"
    finally:
        (demo.home / ".env").unlink(missing_ok=True)
        demo.home.chmod(modes)


def test_a_fault_as_a_terminal_shows_it(clinic: Place, demo: Gateway) -> None:
    edit("aider", "{port}/v1", "{port}")(clinic, demo)
    status, out, _ = clinic.run("doctor")
    assert status == 1 and f"FAIL  aider: address: {demo.url} of {clinic.path('aider')} lacks /v1 at its end\n      fix: python aicarousel.py config aider --write\n" in out
    assert out.endswith(" failed\n") and "Traceback" not in out and demo.key not in out


def test_what_is_not_set_up_is_no_fault_and_is_not_written(clinic: Place) -> None:
    for name in WITH_FILES:
        clinic.path(name).unlink()
    fake = clinic.work / "bin" / "claude"
    fake.write_text("")
    fake.chmod(0o700)
    status, told = clinic.read("doctor", "--fix")
    [check] = [check for check in told["checks"] if check["subject"] in WITH_FILES]
    assert status == 0 and check["subject"] == "claude-code" and check["ok"] is None and "not pointed at a gateway" in check["told"] and not clinic.path("claude-code").exists()


@pytest.mark.parametrize("off_s,told", [(-7200, "720"), (3600, "3")])
def test_a_wrong_clock_is_told_by_the_date_of_the_server(clinic: Place, provider: Provider, off_s: int, told: str) -> None:
    from email.utils import formatdate
    url = provider.listen("server", answer({"service": "aicarousel", "version": "9"}, headers=[("date", formatdate(time.time() + off_s, usegmt=True))]))
    status, found = clinic.read("doctor", "--server", url)
    [clock] = [check for check in failed(found) if check["what"] == "clock"]
    assert status == 1 and f"{told}" in clock["told"] and ("ahead of" in clock["told"]) is (off_s < 0) and "timedatectl" in clock["fix"]


def test_another_server_on_the_port_and_none(clinic: Place, provider: Provider) -> None:
    url = provider.listen("server", answer({"hello": 1}))
    status, found = clinic.read("doctor", "--server", url)
    [running] = [check for check in found["checks"] if check["what"] == "running"]
    assert status == 1 and "is no gateway" in running["told"] and "--port" in running["fix"]
    place_of_client = clinic.path("aider")
    place_of_client.write_text(place_of_client.read_text().replace(os.environ["PORT"], url.rpartition(":")[2]))
    [wrong] = failed(clinic.read("doctor")[1])
    assert "is some other server" in wrong["told"]
    clinic.set(PORT="1")
    [running] = [check for check in clinic.read("doctor")[1]["checks"] if check["what"] == "running"]
    assert running["ok"] is None and running["fix"] == "python aicarousel.py serve"


def test_a_server_of_another_home_refuses_a_good_key(clinic: Place, demo: Gateway) -> None:
    clinic.home = clinic.user / "other-home"
    clinic.set(AICAROUSEL_HOME=str(clinic.home))
    for name in WITH_FILES:
        clinic.path(name).unlink()
    clinic.run("config", "aider", "--write")
    [wrong] = failed(clinic.read("doctor")[1])
    assert wrong["subject"] == "aider" and "runs with another home" in wrong["told"] and "--home" in wrong["fix"]
    clinic.set(PORT="1")
    clinic.run("config", "aider", "--write")
    assert clinic.read("doctor")[0] == 0, "while no server runs, the database tells"


def test_what_cannot_be_fixed_is_told(clinic: Place, demo: Gateway) -> None:
    path = clinic.path("codex")
    path.write_text(f'model_provider = "x"\nmodel_providers.x = {{base_url = "{demo.url}"}}\nmodel_providers.aicarousel = {{}}\n')
    status, told = clinic.read("doctor", "--fix")
    [refused] = [check for check in told["checks"] if check["what"] == "fix"]
    assert status == 1 and refused["ok"] is False and "nothing was written" in refused["told"] and "model_providers.x" in path.read_text()


def test_no_other_machine_is_asked(clinic: Place, demo: Gateway, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(a, "ask_gateway", lambda address, *rest, **more: asked.append(address) or a.Reply(0, {}, b""))
    edit("claude-code", "http://127.0.0.1:{port}", "https://api.example")(clinic, demo)
    clinic.read("doctor")
    assert asked and all(address.startswith("http://127.0.0.1:") for address in asked)


def test_live_asks_each_key_and_each_client_once(place: Place, provider: Provider, gateway_factory: Callable[..., Gateway], monkeypatch: pytest.MonkeyPatch) -> None:
    from fakes import chat_answer
    monkeypatch.setattr(a, "on_stage", lambda play: None)
    url = provider.listen("back", lambda request: answer({"data": [{"id": "m"}]}, headers=[("date", "Sat, 21 Nov 2020 00:00:00 GMT")]) if request.method == "GET" else answer(chat_answer("ok")))
    gateway = gateway_factory({"back": {"baseUrl": url, "default": "m", "enableFallback": False, "models": ["m"], "keys": ["env:BACK_KEY"]}}, {"BACK_KEY": "k-" + "1" * 20})
    place.set(AICAROUSEL_HOME=str(gateway.home), PORT=str(gateway.port), PATH="")
    for name in ("claude-code", "codex", "aider"):
        place.run("config", name, "--write", "--key", gateway.key)
    status, told = place.read("doctor", "--live")
    [clock] = failed(told)
    assert status == 1 and clock["what"] == "clock" and "ahead of the date of back" in clock["told"]
    assert [check["told"] for check in told["checks"] if check["what"] == "live"] == ["provider=back model=m attempts=1"] * 3
    assert [check["ok"] for check in told["checks"] if check["subject"] == "provider"] == [True]
    posts = [request for request in provider.calls("back") if request.method == "POST"]
    assert len(posts) == 3 and all((request.json.get("max_tokens") or request.json.get("max_completion_tokens")) == 16 for request in posts)

    provider.script("back", answer({"error": {"message": "Invalid API key"}}, 401))
    status, told = place.read("doctor", "--live")
    assert status == 1 and [(check["subject"], check["fix"]) for check in failed(told)] == [("provider", "python aicarousel.py login back"), *((name, "python aicarousel.py explain --last") for name in ("claude-code", "codex", "aider"))]


# ---------------------------------------------------------------- the window that Claude Code reckons with

def windows(*rows: int | None, fallback: bool = True) -> Json:
    """models.json of one provider whose models hold so much; the first is its default."""
    return {"back": {"baseUrl": "http://127.0.0.1:1/v1", "default": "m0", "enableFallback": fallback, "keys": [],
                     "models": [{"id": f"m{number}", **({"context": n_tokens} if n_tokens else {})} for number, n_tokens in enumerate(rows)]}}


def reckon_with(place: Place, *rows: int | None, fallback: bool = True) -> None:
    place.home.mkdir(exist_ok=True)
    (place.home / "models.json").write_text(json.dumps(windows(*rows, fallback=fallback)))


@pytest.mark.parametrize("rows,fallback,told", [
    ((200_000, None, 131_072), True, "131072"),
    ((200_000, 131_072), False, "200000"),
    ((131_072, 8192), True, "131072"),          # it cannot work in 8,192, and no request of its size goes there
    ((8192,), True, None),
    ((None,), True, None),
])
def test_claude_code_is_told_the_smallest_window_in_which_it_can_work(place: Place, rows: tuple[int | None, ...], fallback: bool, told: str | None) -> None:
    reckon_with(place, *rows, fallback=fallback)
    [made] = place.read("config", "claude-code")[1]["files"]
    assert json.loads(made["content"])["env"].get(a.CLAUDE_WINDOW) == told
    assert (a.CLAUDE_WINDOW in place.run("config", "claude-code", "--dry-run")[1]) is bool(told)
    place.run("config", "claude-code", "--write")
    assert json.loads(place.path("claude-code").read_text())["env"].get(a.CLAUDE_WINDOW) == told


@pytest.mark.parametrize("answered,told", [({"id": "aicarousel", "context_length": 100_000}, "100000"), ({"id": "aicarousel", "context_length": 8192}, None), ({"id": "aicarousel"}, None),
                                           ([], None), ({"context_length": "100000"}, None)])
def test_a_gateway_elsewhere_says_its_window_itself(place: Place, provider: Provider, answered: Any, told: str | None) -> None:
    reckon_with(place, 131_072)
    url = provider.listen("server", answer(answered))
    [made] = place.read("config", "claude-code", "--server", url)[1]["files"]
    assert json.loads(made["content"])["env"].get(a.CLAUDE_WINDOW) == told
    [asked] = provider.calls("server")
    assert asked.path == "/v1/models/aicarousel" and "authorization" not in asked.headers
    place.read("config", "cline", "--server", url)
    assert len(provider.calls("server")) == 1, "what is told of no window does not ask for one"


@pytest.mark.parametrize("rows,told", [((200_000, 40_000), 40_000), ((131_072, 8192), 131_072), ((None,), None)])
def test_codex_is_told_a_number(place: Place, rows: tuple[int | None, ...], told: int | None) -> None:
    reckon_with(place, *rows)
    path = place.write("codex", "model_context_window = 272000 # mine\n[features]\nx = true\n")
    place.run("config", "codex", "--write")
    assert tomllib.loads(path.read_text())["model_context_window"] == (told or 272_000) and "# mine" in path.read_text()
    path.unlink()
    place.run("config", "codex", "--write")
    assert tomllib.loads(path.read_text()).get("model_context_window") == told
    if told:
        reckon_with(place, 32_000)
        [wrong] = a._judge_window("codex", a.Surroundings(URL, place.database, a.Settings(), os.environ, place.work, a.read_config(a.find_home(str(place.home)), {})))
        assert wrong.ok is False and f"{told} of {path} is no number up to 32000" in wrong.told and wrong.fix == "python aicarousel.py config codex --write"


@pytest.mark.parametrize("rows,claude,codex", [((100_000, 40_000), "100000", "40000"), ((None,), None, None)])
def test_run_tells_it_too(launch: Callable[..., subprocess.Popen[str]], tmp_path: Path, rows: tuple[int | None, ...], claude: str | None, codex: str | None) -> None:
    (tmp_path / "models.json").write_text(json.dumps(windows(*rows)))
    out, err = launch('cat "$2"', program="claude", AICAROUSEL_HOME=str(tmp_path), PORT="1").communicate(timeout=HANG_S)
    assert json.loads(out)["env"].get(a.CLAUDE_WINDOW) == claude, err
    out, err = launch('echo "$@"', "exec", program="codex", AICAROUSEL_HOME=str(tmp_path), PORT="1").communicate(timeout=HANG_S)
    assert re.findall(r"--config=model_context_window=(\S+)", out) == ([codex] if codex else []) and out.endswith(" exec\n"), err


@pytest.mark.parametrize("rows,ok,told", [((200_000,), True, "131072 of "), ((131_072, 8192), True, "131072 of "), ((131_072, 100_000), False, "is no number up to 100000"), ((None,), None, ""), ((8192,), None, "")])
def test_doctor_says_when_the_window_that_was_written_fits_no_more(clinic: Place, rows: tuple[int | None, ...], ok: bool | None, told: str) -> None:
    try:
        reckon_with(clinic, 131_072)
        clinic.run("config", "claude-code", "--write")
        reckon_with(clinic, *rows)
        found = [check for check in clinic.read("doctor")[1]["checks"] if check["what"] == "context window" and check["subject"] == "claude-code"]
        assert [check["ok"] for check in found] == ([ok] if ok is not None else []) and all(told in check["told"] for check in found)
        if ok is False:
            assert found[0]["fix"] == "python aicarousel.py config claude-code --write" and clinic.read("doctor", "--fix")[0] == 0
            assert json.loads(clinic.path("claude-code").read_text())["env"][a.CLAUDE_WINDOW] == "100000"
            (clinic.work / ".claude").mkdir()
            (clinic.work / ".claude" / "settings.json").write_text(json.dumps({"env": {a.CLAUDE_WINDOW: "1e6"}}))
            [wrong] = failed(clinic.read("doctor")[1])
            assert wrong["fix"].startswith(f"take it out of {clinic.work}/.claude/settings.json, then: ") and "1e6 of " in wrong["told"]
    finally:
        (clinic.home / "models.json").unlink()


def test_doctor_says_nothing_of_windows_while_the_configuration_cannot_be_read(clinic: Place) -> None:
    clinic.write("claude-code", json.dumps({"env": {"ANTHROPIC_BASE_URL": f"http://127.0.0.1:{os.environ['PORT']}", "ANTHROPIC_AUTH_TOKEN": "sk-x", a.CLAUDE_WINDOW: "1"}}))
    write_in_home("models.json", "[")(clinic, None)
    assert [check["what"] for check in clinic.read("doctor")[1]["checks"] if check["subject"] == "claude-code"] == ["address", "key"]


# ---------------------------------------------------------------- dialogues and selftest

class Echo:
    """A stage that answers as a real one did, but for one answer, which is changed."""

    def __init__(self, replies: list[a.Reply], at: int, change: Callable[[a.Reply], a.Reply], cast: a.Cast) -> None:
        self._replies, self._at, self._change = iter(replies), at, change
        self.n_asked, self.cast, self.database = 0, cast, Path("unused")

    def ask(self, *_: Any, **__: Any) -> a.Reply:
        self.n_asked += 1
        reply = next(self._replies)
        return self._change(reply) if self.n_asked == self._at + 1 else reply

    def leave(self, *_: Any) -> None:
        self.cast.left.set()


def recorded() -> tuple[dict[str, list[a.Reply]], dict[str, a.Check], a.Cast]:
    """What the gateway answers in each dialogue, and what is said of it."""
    replies: dict[str, list[a.Reply]] = {}
    checks: dict[str, a.Check] = {}
    casts: list[a.Cast] = []

    def play(stage: a.Stage) -> None:
        class Recorder(a.Stage):
            def ask(self, *words: Any, **more: Any) -> a.Reply:
                replies[name].append(stage.ask(*words, **more))
                return replies[name][-1]
        casts.append(stage.cast)
        for name in a.DIALOGUES:
            replies[name] = []
            checks[name] = a.hear(Recorder(*stage), name)

    a.on_stage(play)
    return replies, checks, casts[0]


@pytest.fixture(scope="module")
def heard() -> tuple[dict[str, list[a.Reply]], dict[str, a.Check], a.Cast]:
    return recorded()


def test_each_dialogue_is_spoken_to_its_end(heard: Any) -> None:
    replies, checks, _ = heard
    assert [(check.ok, check.told) for check in checks.values()] == [(True, "7 steps"), (True, "3 steps"), (True, "3 steps")]
    assert {name: len(rows) for name, rows in replies.items()} == {"messages": 6, "responses": 3, "chat": 2}


BREAKS: Mapping[str, Callable[[a.Reply], a.Reply]] = {
    "status": lambda reply: reply._replace(status=500, body=b'{"error": {"message": "it broke"}}'),
    "nothing": lambda reply: a.Reply(0, {}, b""),
    "html": lambda reply: reply._replace(body=b"<html>"),
    "no end": lambda reply: reply._replace(body=reply.body[:-len(reply.body) // 3]),
}


@pytest.mark.parametrize("kind", BREAKS)
@pytest.mark.parametrize("name,at,step", [
    ("messages", 0, "HEAD /"), ("messages", 1, "models discovery"), ("messages", 2, "count_tokens"), ("messages", 3, "streamed tool turn with thinking"),
    ("messages", 4, "second turn with tool_result"), ("messages", 5, "a prompt that is too long"),
    ("responses", 0, "WebSocket upgrade"), ("responses", 1, "stream with a custom tool"), ("responses", 2, "second turn with encrypted reasoning"),
    ("chat", 0, "chat stream with tools"), ("chat", 1, "second turn with the result"),
])
def test_an_answer_that_a_client_cannot_use_is_found(heard: Any, name: str, at: int, step: str, kind: str) -> None:
    replies, _, cast = heard
    if (name, at) in (("messages", 0), ("responses", 0)) and kind in ("html", "no end"):
        return          # only the status counts there
    check = a.hear(Echo(replies[name], at, BREAKS[kind], cast), name)      # type: ignore[arg-type]
    assert check.ok is False and check.told.startswith(f"{step}: ") and "report it" in check.fix, check


FRAMES = [
    # dialogue, answer, what is taken out of its stream, what doctor wants there
    ("messages", 3, b"event: message_start", "message_start to message_stop"),
    ("messages", 3, b"event: content_block_stop", "each block begun and ended once"),
    ("messages", 3, b'"tool_use"', "each block begun and ended once"),
    ("messages", 3, b'"signature_delta"', "whole arguments and a signature"),
    ("messages", 3, b'"input_json_delta"', "whole arguments and a signature"),
    ("messages", 3, b"event: message_delta", "stop_reason tool_use with usage"),
    ("responses", 1, b"event: response.completed", "response.completed at the end"),
    ("responses", 1, b"event: response.created", "events numbered from 0"),
    ("chat", 0, b"[DONE]", "a stream that ends with [DONE]"),
    ("chat", 0, b'"finish_reason":"tool_calls"', "one finish_reason"),
    ("chat", 0, b'"choices":[]', "the usage that was asked for"),
    ("chat", 0, b'"id":"call_', "a call with id, name and index"),
]


@pytest.mark.parametrize("name,at,frame,wanted", FRAMES)
def test_the_frame_that_is_missing_is_named(heard: Any, name: str, at: int, frame: bytes, wanted: str) -> None:
    replies, _, cast = heard
    frames = replies[name][at].body.split(b"\n\n")
    kept = [each for each in frames if frame not in each]
    assert len(kept) < len(frames)
    check = a.hear(Echo(replies[name], at, lambda reply: reply._replace(body=b"\n\n".join(kept)), cast), name)        # type: ignore[arg-type]
    assert check.ok is False and f": {wanted}; got " in check.told and check.line().count("\n") == 1, check


def test_a_gateway_that_does_not_let_go_is_found(heard: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    replies, _, cast = heard
    echo = Echo(replies["messages"], -1, BREAKS["status"], cast)
    monkeypatch.setattr(echo, "leave", lambda *_: None)
    monkeypatch.setattr(a, "LEFT_S", 0.01)
    check = a.hear(echo, "messages")        # type: ignore[arg-type]
    assert check.ok is False and check.told.startswith("cancel: the provider's connection closed")


def test_selftest_shows_everything(place: Place) -> None:
    began = time.monotonic()
    status, told = place.read("selftest")
    assert status == 0 and told["ok"] and [check["what"] for check in told["checks"]] == ["failover", "held tool calls", "broken streams", "made-up faults", "cancel", "limits", "error shapes"]
    assert time.monotonic() - began < 30 and not place.home.exists()
    status, out, _ = place.run("selftest")
    assert status == 0 and out.count("\nok  ") == 6 and out.endswith("all is well\n")


WORSE = {
    "failover": ("_CAST", {"limited": a._CAST["half-chat"]}),
    "held tool calls": ("_CAST", {"tools": a._CAST["well"]}),
    "broken streams": ("_CAST", {"half-messages": a._CAST["well"]}),
    "made-up faults": ("create_key", lambda path, name, real=a.create_key, **more: real(path, name, **more if name != "admin" else {})),
    "cancel": ("_CAST", {"slow": a._CAST["down"]}),
    "limits": ("create_key", lambda path, name, real=a.create_key, **more: real(path, name, **more if name != "limited" else {})),
    "error shapes": ("_CAST", {"refusing": a._CAST["down"]}),
}


@pytest.mark.parametrize("scene", WORSE)
def test_selftest_fails_where_a_promise_is_not_kept(place: Place, monkeypatch: pytest.MonkeyPatch, scene: str) -> None:
    name, worse = WORSE[scene]
    monkeypatch.setattr(a, name, {**a._CAST, **worse} if isinstance(worse, dict) else worse)
    status, told = place.read("selftest")
    assert status == 1 and [check["what"] for check in failed(told)] == [scene] and "; got " in failed(told)[0]["told"]


def test_without_h11_nothing_is_staged(clinic: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(a, "h11", None)
    [missing] = failed(clinic.read("doctor")[1])
    assert missing["subject"] == "dialogue" and "h11" in missing["fix"]
    assert clinic.run("selftest")[0] == 2


def test_the_stage_leaves_nothing_behind(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile
    monkeypatch.setattr(tempfile, "tempdir", str(place.work))

    def fail(stage: a.Stage) -> None:
        assert list(place.work.iterdir())
        raise KeyError("a mistake")

    with pytest.raises(KeyError):
        a.on_stage(fail)
    assert list(place.work.iterdir()) == []


# ---------------------------------------------------------------- whatever stands in a file

NAMES = ["env", "ANTHROPIC_BASE_URL", "ANTHROPIC_AUTH_TOKEN", "model", "provider", "aicarousel", "options", "baseURL", "apiKey", "lastUsedProvider", "providers", "openai-compatible", "settings", "security", "auth"]
TREES = st.recursive(st.none() | st.booleans() | st.integers(-9, 9) | st.sampled_from(["aicarousel", "http://127.0.0.1:1", "://", "http://[", "openai-compatible", ""]),
                     lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4), max_leaves=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(tree=st.dictionaries(st.sampled_from(NAMES), TREES, max_size=4), name=st.sampled_from(["claude-code", "cline", "opencode", "gemini-cli"]))
def test_whatever_stands_in_a_json_file_is_judged_and_changed_or_refused(place: Place, tree: Json, name: str) -> None:
    path = place.write(name, json.dumps(tree, indent=2))
    around = a.Surroundings("http://127.0.0.1:1", place.database, a.Settings(), os.environ, place.work)
    assert all(isinstance(check, a.Check) and "\n" not in check.told for check in a.examine_client(name, around))
    try:
        [change, *_] = a.plan_changes(a.CLIENTS[name], os.environ, URL, KEY) or [None]
        assert change is None or holds(json.loads(change.after), values_of(name, URL, KEY)[0])
    except a.ConfigError as error:
        assert error.where == str(path)


@pytest.mark.parametrize("name,text", [("claude-code", "[" * 5000), ("claude-code", '{"env":' * 5000), ("codex", "a = " + "[" * 3000), ("codex", 'model_provider = 1\nmodel_providers = "x"\n'),
                                       ("codex", 'model_provider = "x"\nmodel_providers.x = 7\n'), ("continue", "models: x\n"), ("aider", "model: [1]\nopenai-api-base: [x]\n"), ("aider", "\0")])
def test_files_that_no_client_would_read(place: Place, name: str, text: str) -> None:
    place.write(name, text)
    around = a.Surroundings("http://127.0.0.1:1", place.database, a.Settings(), os.environ, place.work)
    assert a.examine_client(name, around)
    with contextlib.suppress(a.ConfigError):
        a.plan_changes(a.CLIENTS[name], os.environ, URL, KEY)


# ---------------------------------------------------------------- recipes without a file

@pytest.mark.parametrize("name", ["openai-sdk", "anthropic-sdk", "curl"])
def test_what_is_to_be_pasted_works(demo: Gateway, tmp_path: Path, name: str) -> None:
    [(_, recipe)] = a.snippet(a.CLIENTS[name], os.environ, demo.url, demo.key)
    if name != "curl":
        names: Json = {}
        exec(recipe.replace("\nclient.", "\ntold = client."), names)      # here, as the SDKs take seconds to load
        assert a.Demo.ANSWER in str(names["told"])
    elif shutil.which("curl"):
        ran = subprocess.run(["sh", "-c", recipe], env=clean_environment(tmp_path), capture_output=True, text=True, timeout=HANG_S)
        assert ran.returncode == 0 and ran.stdout.count("data: ") > 20 and ran.stdout.rstrip().endswith("data: [DONE]")
