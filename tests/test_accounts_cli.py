"""Section 43, Accounts, by the plain commands: changes to models.json and .env, keys checked and stored, and a running server that sees them."""

from __future__ import annotations

import io
import json
import os
import stat
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import aicarousel as a
from fakes import ROOT, Gateway, Pause, Provider, Request, answer, clean_environment, healthy, invocation, write_private
from test_cli import wait_for

Json = dict[str, Any]
APPLIED_S = 2.0                 #: a running server has taken a change over by then
GROQ_KEY = "gsk_" + "A" * 48


# ---------------------------------------------------------------- references

def test_a_reference_is_read_from_its_file_or_program(tmp_path: Path) -> None:
    (tmp_path / "key").write_text(" k-of-a-file\n")
    assert a.read_secret(f"file:{tmp_path}/key") == "k-of-a-file"
    assert a.read_secret(f"cmd:cat '{tmp_path}/key'") == "k-of-a-file"


@pytest.mark.parametrize("tool,words", [("secret-tool", "lookup service llm username my groq"), ("security", "find-generic-password -s llm -a my groq -w")])
def test_a_reference_to_the_keyring_asks_the_tool_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tool: str, words: str) -> None:
    (tmp_path / tool).write_text('#!/bin/sh\necho "$*"\n')
    (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert a.read_secret("keyring:llm/my groq") == words
    (tmp_path / tool).unlink()
    with pytest.raises(a.ConfigError, match="neither secret-tool"):
        a.read_secret("keyring:llm/my groq")


@pytest.mark.parametrize("reference,found", [
    ("file:/nothing/here", "No such file or directory"),
    ("file:{folder}/raw", "no UTF-8 text"),
    ("cmd:no-such-program-here", "No such file or directory"),
    ("cmd:false", "exit status 1"),
    ("cmd:echo 'open", "an open quote"),
    ("cmd:sleep 60", "no end within"),
])
def test_a_reference_that_cannot_be_read_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str, found: str) -> None:
    monkeypatch.setattr(a, "_COMMAND_S", 0.05)
    (tmp_path / "raw").write_bytes(b"\xff\xfe")
    with pytest.raises(a.ConfigError) as caught:
        a.read_secret(reference.format(folder=tmp_path))
    assert found in caught.value.found and "\n" not in str(caught.value)


def test_a_key_in_a_file_is_read_again_when_the_file_changes(gateway_factory: Callable[..., Gateway], provider: Provider, tmp_path: Path) -> None:
    """A key that is rotated by something else, as secrets of containers are."""
    write_private(tmp_path / "key", "k-before-the-change")
    url = provider.script("mine", healthy())
    gateway = gateway_factory({"mine": {"baseUrl": url, "default": "m", "enableFallback": False, "models": ["m"], "keys": [f"file:{tmp_path}/key"]}})
    assert gateway.chat().status == 200 and provider.calls("mine")[-1].headers["authorization"] == "Bearer k-before-the-change"
    write_private(tmp_path / "key", "k-after-the-change")
    changed_at = time.monotonic()
    assert wait_for(lambda: gateway.chat().status == 200 and provider.calls("mine")[-1].headers["authorization"] == "Bearer k-after-the-change", APPLIED_S)
    assert time.monotonic() - changed_at < APPLIED_S


# ---------------------------------------------------------------- running a command here

class Desk:
    """A home folder and commands in it, run in this process."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.home, self._monkeypatch, self._capsys = folder / "home", monkeypatch, capsys
        for name in list(os.environ):
            monkeypatch.delenv(name)
        for name, value in clean_environment(folder).items():
            monkeypatch.setenv(name, value)

    def run(self, *words: str, stdin: str = "") -> tuple[int, str, str]:
        """Status, stdout and stderr of a command."""
        self._monkeypatch.setattr("sys.stdin", io.StringIO(stdin))
        self._capsys.readouterr()
        status = a.main([*words, "--home", str(self.home)])
        return status, *self._capsys.readouterr()

    def told(self, *words: str, stdin: str = "") -> Json:
        """What a command says as JSON; it must end well."""
        status, out, err = self.run(*words, "--json", stdin=stdin)
        assert (status, err) == (0, ""), (status, out, err)
        return json.loads(out)

    def refused(self, *words: str, stdin: str = "") -> str:
        """Why a command did nothing: one line, status 1, the same in JSON, and no file touched."""
        before = self.files()
        status, out, err = self.run(*words, stdin=stdin)
        assert status == 1 and out == "" and err.count("\n") == 1, (status, out, err)
        status, out, _ = self.run(*words, "--json", stdin=stdin)
        assert status == 1 and json.loads(out) == {"done": False, "message": err.strip()}
        assert self.files() == before
        return err.strip()

    def files(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (self.models, self.env) if path.exists()}

    @property
    def models(self) -> Path:
        return self.home / "models.json"

    @property
    def env(self) -> Path:
        return self.home / ".env"

    def write(self, models: Json | str | None = None, env: str | None = None) -> None:
        self.home.mkdir(exist_ok=True)
        if models is not None:
            write_private(self.models, models if isinstance(models, str) else json.dumps(models, indent=2))
        if env is not None:
            write_private(self.env, env)


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Desk:
    return Desk(tmp_path, monkeypatch, capsys)


THREE = '''{
  "groq":   {"default": "a", "enableFallback": true, "models": ["a", "b", {"id": "c", "alias": "see"}]},

  "mine":   {"baseUrl": "http://127.0.0.1:9/v1", "default": "m", "enableFallback": false, "models": ["m"], "enabled": false},
  "carousel": {"aliases": {"fast": "groq/b"}},
  "gemini": {"default": "g", "enableFallback": true, "models": ["g"]}
}
'''

CHANGES = [
    # command, what is replaced in THREE by what
    ("provider enable mine", [('"enabled": false', '"enabled": true')]),
    ("provider disable groq", [('"alias": "see"}]}', '"alias": "see"}], "enabled": false}')]),
    ("provider disable mine", []),
    ("provider remove mine", [(THREE.splitlines()[3][2:] + "\n  ", "")]),
    ("provider remove gemini", [(",\n" + THREE.splitlines()[5], "")]),
    ("provider add deepseek", [('"models": ["g"]}\n', '"models": ["g"]},\n  "deepseek": {"default": "deepseek-flash", "enableFallback": true, "models": ["deepseek-flash", "deepseek-v4-pro"]}\n')]),
    ("provider add lab --url http://127.0.0.1:8/v1 --models x,y --default y --preset groq --format chat --no-key",
     [('"models": ["g"]}\n', '"models": ["g"]},\n  "lab": {"default": "y", "enableFallback": true, "models": ["x", "y"], "baseUrl": "http://127.0.0.1:8/v1", "preset": "groq", "format": "chat", "keys": []}\n')]),
    ("model add groq d", [('"alias": "see"}]', '"alias": "see"}, "d"]')]),
    ("model remove groq b", [('"b", ', "")]),
    ("model remove groq c", [(', {"id": "c", "alias": "see"}', "")]),
    ("model default groq c", [('"default": "a"', '"default": "c"')]),
    ("model fallback groq off", [('"default": "a", "enableFallback": true', '"default": "a", "enableFallback": false')]),
    ("model fallback mine on", [('"default": "m", "enableFallback": false', '"default": "m", "enableFallback": true')]),
    ("model move groq c 1", [('["a", "b", {"id": "c", "alias": "see"}]', '[{"id": "c", "alias": "see"}, "a", "b"]')]),
    ("model move groq a 3", [('["a", "b", {"id": "c", "alias": "see"}]', '["b", {"id": "c", "alias": "see"}, "a"]')]),
    ("alias set slow groq mine", [('"fast": "groq/b"', '"fast": "groq/b", "slow": ["groq", "mine"]')]),
    ("alias set fast gemini", [('"fast": "groq/b"', '"fast": "gemini"')]),
    ("alias remove fast", [('{"fast": "groq/b"}', "{}")]),
]


@pytest.mark.parametrize("command,pairs", CHANGES, ids=[command for command, _ in CHANGES])
def test_a_change_of_models_json_leaves_the_rest_as_it_was(desk: Desk, command: str, pairs: list[tuple[str, str]]) -> None:
    desk.write(THREE)
    desk.models.chmod(0o640)
    wanted = THREE
    for old, new in pairs:
        assert wanted.count(old) == 1
        wanted = wanted.replace(old, new)
    assert desk.told(*command.split())["done"] is True
    assert desk.models.read_text() == wanted and stat.S_IMODE(desk.models.stat().st_mode) == 0o640
    assert sorted(path.name for path in desk.home.iterdir()) == ["models.json"], "nothing is left beside it"


def test_the_order_of_providers(desk: Desk) -> None:
    desk.write(THREE)
    assert "gemini, mine, groq" in desk.told("provider", "order", "gemini, mine,groq")["message"]
    assert list(json.loads(desk.models.read_text())) == ["gemini", "mine", "carousel", "groq"]
    assert sorted(desk.models.read_text().replace(",", "").split()) == sorted(THREE.replace(",", "").split())


REFUSALS = [
    ("provider order groq,mine", "2 of 3 providers named; missing: gemini"),
    ("provider order groq,mine,gemini,groq", "groq stands there 2 times"),
    ("provider order groq,mine,gemeni", "there is no provider gemeni; did you mean gemini?"),
    ("provider order groq,mine,gemini,carousel", "there is no provider carousel; there are: groq, mine, gemini"),
    ("provider enable grok", "did you mean groq?"),
    ("provider disable zzz", "there is no provider zzz; there are: groq, mine, gemini"),
    ("provider remove zzz", "there is no provider zzz"),
    ("provider test zzz", "there is no provider zzz"),
    ("provider add groq", "groq is there already"),
    ("provider add carousel --models x", "carousel is a reserved name"),
    ("provider add lab --url https://lab.example/v1", "lab cannot be asked for its models yet (no key: LAB_API_KEY is not set)"),
    ("provider add lab --url http://127.0.0.1:9/v1 --no-key", "lab does not list its models (refused"),
    ("model add groq a", "groq has a already"),
    ("model add zzz a", "there is no provider zzz"),
    ("model remove groq a", "a is the default of groq"),
    ("model remove groq zzz", "groq has no model zzz"),
    ("model default groq zzz", "groq has no model zzz"),
    ("model fallback zzz on", "there is no provider zzz"),
    ("model move groq a 4", "groq has places 1 to 3, not 4"),
    ("model move groq a 0", "groq has places 1 to 3, not 0"),
    ("model list zzz", "there is no provider zzz"),
    ("model refresh zzz", "there is no provider zzz"),
    ("alias remove slow", "there is no alias slow; there are: fast"),
    ("logout groq", "groq has no key in .env"),
    ("logout groq/2", "groq/2 has no key in .env"),
    ("logout zzz", "there is no provider zzz"),
]


@pytest.mark.parametrize("command,why", REFUSALS, ids=[command for command, _ in REFUSALS])
def test_what_cannot_be_changed_is_told_in_one_line(desk: Desk, command: str, why: str) -> None:
    desk.write(THREE)
    assert why in desk.refused(*command.split())


WRONG = [
    ("provider add lab --models x", '"baseUrl", as "lab" is not a built-in provider'),
    ("provider add github-models --models x", "was retired"),
    ("provider add lab --url ftp://x --models x", "an address like https://"),
    ("provider add lab --url http://lab.example/v1 --models x", "keys would travel in the clear"),
    ("provider add auto --url http://127.0.0.1:9 --models x", "a reserved name"),
    ("provider add lab --url http://127.0.0.1:9 --models x --default y", 'a model of "models"'),
    ("model add groq ", "a string that is not empty"),
    ("alias set auto groq", "the whole carousel"),
    ("alias set groqy fast", None),
    ("alias set fast fast2 fast", "a circle"),
]


@pytest.mark.parametrize("command,why", WRONG, ids=[command for command, _ in WRONG])
def test_what_models_json_may_not_hold_never_gets_there(desk: Desk, command: str, why: str | None) -> None:
    desk.write(THREE)
    words = command.split(" ")
    if why is None:
        return desk.told(*words) and None
    status, out, err = desk.run(*words)
    assert status == 2 and why in err + out and err.count("\n") == 1, (status, out, err)
    assert desk.models.read_text() == THREE


@pytest.mark.parametrize("command", ["provider enable groq", "model add groq x", "alias set x groq", "login groq", "logout groq", "provider list", "model list", "alias list"])
@pytest.mark.parametrize("text,where", [('{"groq": ', "invalid JSON"), ("[]", "an object with a provider per field"), ('{"groq": {"default": 1}}', "groq")])
def test_a_broken_file_is_told_and_left_alone(desk: Desk, command: str, text: str, where: str) -> None:
    desk.write(text, "A=1\n")
    before = desk.files()
    status, out, err = desk.run(*command.split(), stdin=GROQ_KEY)
    assert status == 2 and where in err and err.count("\n") == 1 and "Traceback" not in err and desk.files() == before


def test_without_a_file_it_begins_as_what_is_in_force(desk: Desk) -> None:
    desk.write(env=f"GROQ_API_KEY={GROQ_KEY}\nOPENAI_API_KEY=sk-proj-{'x' * 30}\n")
    desk.told("provider", "disable", "openai")
    tree = json.loads(desk.models.read_text())
    assert list(tree) == ["groq", "openai"] and tree["openai"]["enabled"] is False and "enabled" not in tree["groq"]
    assert tree["groq"]["models"] == [model.id for model in a.PRESETS["groq"].models] and stat.S_IMODE(desk.models.stat().st_mode) == 0o600


def test_the_last_provider_stays(desk: Desk) -> None:
    desk.write({"groq": {"default": "a", "enableFallback": True, "models": ["a"]}, "carousel": {}})
    assert "groq is the last provider" in desk.refused("provider", "remove", "groq")


@pytest.mark.parametrize("variable,value,command,told", [
    ("GROQ_ENABLED", "false", "provider enable groq", "but environment GROQ_ENABLED goes before models.json"),
    ("GROQ_MODEL", "b", "model default groq c", "but environment GROQ_MODEL goes before models.json"),
    ("PROVIDERS_PRIORITY", "groq", "provider order gemini,mine,groq", "but PROVIDERS_PRIORITY goes before models.json"),
])
def test_what_goes_before_the_file_is_told(desk: Desk, monkeypatch: pytest.MonkeyPatch, variable: str, value: str, command: str, told: str) -> None:
    desk.write(THREE)
    monkeypatch.setenv(variable, value)
    assert told in desk.told(*command.split())["message"]


def test_a_linked_file_stays_a_link(desk: Desk, tmp_path: Path) -> None:
    desk.write()
    (tmp_path / "kept.json").write_text(THREE)
    desk.models.symlink_to(tmp_path / "kept.json")
    desk.told("provider", "disable", "groq")
    assert desk.models.is_symlink() and '"enabled": false}' in (tmp_path / "kept.json").read_text()


def test_a_home_that_is_no_folder_is_one_line(desk: Desk) -> None:
    desk.home.write_text("a file")
    for words in (["provider", "add", "groq"], ["alias", "set", "x", "groq"], ["login", "groq", "--stdin"], ["logout", "groq"]):
        status, out, err = desk.run(*words, stdin=GROQ_KEY)
        assert status == 2 and out == "" and err.count("\n") == 1 and ("Not a directory" in err or "File exists" in err), err
    assert desk.home.read_text() == "a file"


def test_a_disk_that_fails_leaves_the_file_whole(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")
    desk.write(THREE)
    monkeypatch.setattr(os, "replace", fail)
    status, _, err = desk.run("provider", "disable", "groq")
    assert status == 2 and "No space left on device" in err and desk.models.read_text() == THREE
    assert sorted(path.name for path in desk.home.iterdir()) == ["models.json"]


def test_changes_at_once_are_all_kept(desk: Desk) -> None:
    """Commands wait for each other: what one wrote is there when the next one reads."""
    desk.write(THREE)
    home = a.Home(desk.home, desk.home / "data")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: a.add_model(home, "groq", f"n{number}"), range(16)))
    assert sorted(json.loads(desk.models.read_text())["groq"]["models"][3:]) == sorted(f"n{number}" for number in range(16))


# ---------------------------------------------------------------- lists

def test_lists_tell_all_and_no_secret(desk: Desk) -> None:
    desk.write(THREE, f"GROQ_API_KEY={GROQ_KEY}\nGEMINI_API_KEY=AIza{'b' * 35}\n")
    rows = desk.told("provider", "list")["providers"]
    assert [(row["name"], row["state"], row["default"], row["models"]) for row in rows] == [("groq", "active", "a", ["a", "b", "c"]), ("mine", "out", "m", ["m"]), ("gemini", "active", "g", ["g"])]
    assert rows[0]["keys"] == [{"id": "groq/1", "from": ".env GROQ_API_KEY"}] and rows[1]["why"] == "switched off in models.json"
    status, out, _ = desk.run("provider", "list")
    assert status == 0 and "  1  groq             active  3 models, 1 key, default a\n" in out and "     switched off in models.json\n" in out
    assert [row["id"] for row in desk.told("model", "list", "groq")["models"]] == ["a", "b", "c"]
    out = desk.run("model", "list")[1]
    assert "groq\n  1 * a\n  2   b\n  3   c" in out and "= see" in out and "mine\n  1 * m\n" in out
    assert desk.told("alias", "list") == {"aliases": {"fast": ["groq/b"]}} and desk.run("alias", "list")[1] == "fast = groq/b\n"
    for words in (["provider", "list"], ["provider", "list", "--json"], ["model", "list", "--json"], ["alias", "list"]):
        out = desk.run(*words)[1]
        assert GROQ_KEY not in out and "AIza" not in out
    for words in (["provider", "list"], ["model", "list"]):
        assert max(map(len, desk.run(*words)[1].splitlines())) <= 80


def test_lists_of_nothing(desk: Desk) -> None:
    assert desk.run("provider", "list")[1] == "there are no providers: login, or provider add NAME\n"
    assert desk.run("model", "list")[1] == "there are no models\n" and desk.run("alias", "list")[1] == "there are no aliases\n"
    assert desk.run("provider", "test")[:2] == (1, "no provider takes part\n") and desk.run("model", "refresh")[:2] == (1, "no provider takes part\n")


# ---------------------------------------------------------------- keys

def vendor(*, good: str = "", status: int = 401, body: Any = None, models: Any = None) -> Callable[[Request], Any]:
    """A provider that takes one key, and answers others with `status`."""
    def play(request: Request) -> Any:
        shown = request.headers.get("authorization", "").removeprefix("Bearer ") or request.headers.get("x-api-key", "")
        if good and shown != good:
            return answer(body or {"error": {"message": f"Incorrect API key provided: {shown}", "code": "invalid_api_key"}}, status)
        if request.method == "GET":
            return answer(models if models is not None else {"object": "list", "data": [{"id": "m"}, {"id": "n"}]})
        return healthy()(request)
    return play


def at(url: str, **more: Any) -> Json:
    return {"baseUrl": url, "default": "m", "enableFallback": True, "models": ["m"], **more}


def test_a_key_is_recognised_checked_and_kept(desk: Desk, provider: Provider) -> None:
    desk.write({"groq": at(provider.script("groq", vendor(good=GROQ_KEY)))}, "# mine\nPORT=7123 # here\n")
    told = desk.told("login", "--stdin", stdin=f'  export GROQ_API_KEY="{GROQ_KEY}"\n')
    assert (told["provider"], told["key"], told["state"]) == ("groq", "groq/1", "good") and GROQ_KEY not in told["message"] and "gsk_AA...AAAA" in told["message"]
    assert desk.env.read_text() == f"# mine\nPORT=7123 # here\nGROQ_API_KEY={GROQ_KEY}\n" and stat.S_IMODE(desk.env.stat().st_mode) == 0o600
    [call] = provider.calls("groq")
    assert (call.method, call.path) == ("GET", "/groq/v1/models") and call.body == b""
    again = desk.told("login", "groq", "--stdin", stdin=GROQ_KEY)
    assert "it was there already" in again["message"] and again["key"] == "groq/1" and desk.env.read_text().count(GROQ_KEY) == 1


def test_further_keys_go_beside_the_first(desk: Desk, provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.write({"groq": at(provider.script("groq", vendor()))})
    monkeypatch.setenv("GROQ_API_KEY_2", "gsk_" + "E" * 44)
    for letter in "XYZ":
        desk.told("login", "groq", "--stdin", stdin=f"gsk_{letter * 44}")
    assert list(a.parse_dotenv(desk.env.read_text())) == ["GROQ_API_KEY", "GROQ_API_KEY_3", "GROQ_API_KEY_4"], "what the environment sets is not hidden behind it"
    assert [key["id"] for key in desk.told("provider", "list")["providers"][0]["keys"]] == ["groq/1", "groq/2", "groq/3", "groq/4"]


def test_keys_of_an_entry_that_lists_them(desk: Desk, provider: Provider) -> None:
    url = provider.script("mine", vendor())
    desk.write('{"mine": {"baseUrl": "%s", "default": "m", "enableFallback": true, "models": ["m"], "keys": ["env:FIRST", {"key": "env:SECOND", "label": "b"}]}}' % url)
    for number in range(4):
        desk.told("login", "mine", "--stdin", stdin=f"key-number-{number}")
    assert a.parse_dotenv(desk.env.read_text()) == {"FIRST": "key-number-0", "SECOND": "key-number-1", "MINE_API_KEY": "key-number-2", "MINE_API_KEY_2": "key-number-3"}
    assert desk.models.read_text().endswith('"label": "b"}, "env:MINE_API_KEY", "env:MINE_API_KEY_2"]}}')


def test_a_provider_that_needed_no_key_takes_one(desk: Desk, provider: Provider) -> None:
    desk.write({"mine": at(provider.script("mine", vendor(good="key-of-mine")), keys=[])})
    assert desk.told("login", "mine", "--stdin", stdin="key-of-mine")["state"] == "good"
    assert json.loads(desk.models.read_text())["mine"]["keys"] == ["env:MINE_API_KEY"]


def test_a_built_in_provider_comes_into_models_json_with_its_key(desk: Desk, provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.write(THREE)
    monkeypatch.setenv("CEREBRAS_BASE_URL", provider.script("cerebras", vendor()))
    assert desk.told("login", "--stdin", stdin="csk-" + "c" * 40)["key"] == "cerebras/1"
    assert list(json.loads(desk.models.read_text()))[-1] == "cerebras" and desk.models.read_text().startswith(THREE[:-3])


def test_a_refused_key_is_not_kept_and_its_provider_is_quoted(desk: Desk, provider: Provider) -> None:
    desk.write({"groq": at(provider.script("groq", vendor(good="gsk_" + "G" * 44)))})
    why = desk.refused("login", "--stdin", stdin=GROQ_KEY)
    assert "not kept: GroqCloud answers 401 Incorrect API key provided" in why and GROQ_KEY not in why and not desk.env.exists()


@pytest.mark.parametrize("status,body,state,words", [
    (402, {"error": {"message": "Payment required"}}, "poor", "no credit"),
    (412, {"error": {"message": "Account suspended, unpaid invoice"}}, "poor", "no credit"),
    (429, {"error": {"message": "Rate limit reached"}}, "good", "works, but is at its limit"),
    (500, {"error": {"message": "oops"}}, "unsure", "not told: lab answers 500"),
    (404, "no such page", "unsure", "not told: lab answers 404"),
])
def test_a_key_that_could_not_be_told_is_kept_and_marked(desk: Desk, provider: Provider, status: int, body: Any, state: str, words: str) -> None:
    desk.write({"lab": at(provider.script("lab", vendor(good="another", status=status, body=body)))})
    told = desk.told("login", "lab", "--stdin", stdin="key-of-the-lab")
    assert told["state"] == state and words in told["message"] and a.parse_dotenv(desk.env.read_text()) == {"LAB_API_KEY": "key-of-the-lab"}


def test_a_provider_that_cannot_be_reached_leaves_the_key_unchecked(desk: Desk, provider: Provider) -> None:
    desk.write({"lab": at(provider.refusing())})
    told = desk.told("login", "lab", "--stdin", stdin="key-of-the-lab")
    assert told["state"] == "unsure" and "not checked: refused" in told["message"] and desk.env.exists()


def test_without_h11_the_key_is_kept_unchecked(desk: Desk, provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.write({"lab": at(provider.script("lab", vendor()))})
    monkeypatch.setattr(a, "h11", None)
    assert "h11 is missing" in desk.told("login", "lab", "--stdin", stdin="key-of-the-lab")["message"] and not provider.calls("lab")


MISFITS = [
    ("login groq", "sk-or-v1-" + "0" * 64, "this key is of OpenRouter, not of GroqCloud; it was shown to nobody"),
    ("login", "sk-ant-admin01-abcdef", "cannot run models"),
    ("login anthropic", "sk-ant-oat01-abcdef", "vendor's own programs"),
    ("login", "sk-admin-abc", "cannot run models"),
    ("login", "ghp_" + "a" * 40, "login github-copilot"),
    ("login", "tid=abc;exp=1", "expires within the hour"),
    ("login", "sk-" + "0" * 32, "it may be of deepseek or qwen; name the provider"),
    ("login", "what is this", "nothing is known of keys like it"),
    ("login", "", "no key came"),
    ("login groq", "  \t", "no key came"),
    ("login groq", "two words", "that is no key"),
    ("login groq", "a,b", "that is no key"),
    ("login groq", "schl\u00fcssel", "that is no key"),
    ("login ollama", "key-of-ollama", "ollama needs no key"),
    ("login grok", "key-of-grok", "there is no provider grok; did you mean groq?"),
    ("login vllm", "key-of-vllm", "there is no provider vllm"),
    ("login github-models", "key", "there is no provider github-models"),
]


@pytest.mark.parametrize("command,key,why", MISFITS, ids=[why for *_, why in MISFITS])
def test_a_key_that_is_none_is_refused_and_shown_to_nobody(desk: Desk, provider: Provider, monkeypatch: pytest.MonkeyPatch, command: str, key: str, why: str) -> None:
    def none(*_: Any) -> None:
        raise AssertionError("a provider was asked")
    monkeypatch.setattr(a, "ask_provider", none)
    desk.write({**json.loads(THREE), "ollama": {"default": "g", "enableFallback": True, "models": ["g"]}})
    told = desk.refused(*command.split(), "--stdin", stdin=key)
    assert why in told and (len(key) < 8 or key not in told)


@pytest.mark.parametrize("encoding", ["utf-8:strict", "utf-8:surrogateescape"])
def test_bytes_that_are_no_text_are_no_key(desk: Desk, encoding: str) -> None:
    desk.write(THREE)
    ran = subprocess.run([*invocation(ROOT / "aicarousel.py"), "login", "groq", "--stdin", "--home", str(desk.home)], input=b"\xff\xfe\n", capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding}, timeout=30)
    assert ran.returncode == 1 and b"that is no key" in ran.stderr and ran.stderr.count(b"\n") == 1 and not desk.env.exists()


def test_fifty_keys_are_enough(desk: Desk) -> None:
    desk.write(THREE, "".join(f"GROQ_API_KEY{'' if number == 1 else f'_{number}'}=gsk_{number:044}\n" for number in range(1, 51)))
    assert "groq has 50 keys already" in desk.refused("login", "groq", "--stdin", stdin=GROQ_KEY)


KEYS = [
    ("sk-or-v1-" + "a" * 64, "openrouter"), ("sk-ant-api03-" + "a" * 95, "anthropic"), ("sk-proj-" + "a" * 40, "openai"), ("sk-svcacct-" + "a" * 40, "openai"), ("sk-abcT3BlbkFJdef", "openai"),
    ("gsk_" + "a" * 52, "groq"), ("csk-" + "a" * 48, "cerebras"), ("AIza" + "a" * 35, "gemini"), ("AQ." + "a" * 40, "gemini"), ("hf_" + "a" * 34, "huggingface"), ("gho_" + "a" * 36, "github-copilot"),
    ("xai-" + "a" * 80, "xai"), ("nvapi-" + "a" * 64, "nvidia"), ("fw_" + "a" * 24, "fireworks"), ("tgp_v1_" + "a" * 43, "together"), ("a" * 32 + "." + "B" * 16, "zai"),
]


@pytest.mark.parametrize("key,name", KEYS, ids=[name for _, name in KEYS])
def test_keys_are_told_by_their_form(key: str, name: str) -> None:
    form = a.key_form(key)
    assert form is not None and form.providers == (name,) and form.sure and not form.why_not


@pytest.mark.parametrize("key,names", [("sk-kimi-a", ("moonshot",)), ("sk-" + "a" * 48, ("moonshot", "openai")), ("0" * 64, ("together",)), ("Q" * 32, ("mistral",)), ("q-" * 20, ("cloudflare",)),
                                       ("0" * 8 + "-0000-0000-0000-" + "0" * 12, ("sambanova",)), ("eyJa.eyJb.c", ("minimax",)), ("sk-lm-x", ("lmstudio",)), ("sk-sp-x", ("qwen",))])
def test_some_keys_may_be_of_several(key: str, names: tuple[str, ...]) -> None:
    form = a.key_form(key)
    assert form is not None and form.providers == names and not form.sure


def test_every_form_names_providers_that_exist() -> None:
    assert {name for form in a.KEY_FORMS for name in form.providers} <= a.PRESETS.keys() and a.key_form("?") is None


@pytest.mark.parametrize("pasted", ["k-e-y", " k-e-y\n", '"k-e-y"', "'k-e-y',", "Bearer k-e-y", "X_API_KEY=k-e-y", "export HF_TOKEN = \"k-e-y\";", "bearer `k-e-y`"])
def test_what_is_pasted_around_a_key_is_taken_off(pasted: str) -> None:
    assert a.clean_key(pasted) == "k-e-y"


CHEAP = [
    # preset, its own address or another, what is asked
    ("groq", True, "GET", "https://api.groq.com", "/openai/v1/models"),
    ("anthropic", True, "GET", "https://api.anthropic.com", "/v1/models"),
    ("openrouter", True, "GET", "https://openrouter.ai", "/api/v1/key"),
    ("huggingface", True, "GET", "https://huggingface.co", "/api/whoami-v2"),
    ("huggingface", False, "GET", "http://127.0.0.1:9", "/v1/models"),
    ("deepseek", True, "GET", "https://api.deepseek.com", "/user/balance"),
    ("fireworks", True, "GET", "https://api.fireworks.ai", "/v1/accounts/fireworks/models?pageSize=1"),
    ("nvidia", True, "POST", "https://integrate.api.nvidia.com", "/v1/chat/completions"),
    ("gemini", True, "POST", "https://generativelanguage.googleapis.com", "/v1beta/openai/chat/completions"),
]


@pytest.mark.parametrize("name,own,method,host,path", CHEAP, ids=[f"{name} {'own' if own else 'other'}" for name, own, *_ in CHEAP])
def test_a_key_goes_to_its_own_provider_alone(name: str, own: bool, method: str, host: str, path: str) -> None:
    entry = {"default": "m", "enableFallback": True, "models": ["m"], **({} if own else {"baseUrl": "http://127.0.0.1:9/v1"})}
    [provider] = a.load_config(json.dumps({name: entry}), models_path="", environment={a.PRESETS[name].key_variables[0]: "k" * 30}, dotenv={}, flags={}).active
    where, asked, behind, body = a._cheap_call(provider)
    origin, head = a.make_target(where, provider.credentials[0], a.Settings(), "t", asked, behind)
    assert asked == method and f"{origin.scheme}://{origin.host}" == host.removesuffix(":9") and head.startswith(f"{method} {path} HTTP/1.1\r\n")
    assert bool(body) == (method == "POST") and (not body or json.loads(body)["model"] == "m")


def test_keys_are_forgotten_one_or_all(desk: Desk, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.write(THREE, "# kept\nGROQ_API_KEY=one-key-of-groq,two-key-of-groq # pair\nOTHER=1\nGROQ_API_KEY_3=three-key-of-groq\n")
    assert desk.told("logout", "groq/2")["message"] == "1 key of groq removed from .env"
    assert desk.env.read_text() == "# kept\nGROQ_API_KEY=one-key-of-groq # pair\nOTHER=1\nGROQ_API_KEY_3=three-key-of-groq\n"
    monkeypatch.setenv("GROQ_API_KEY_4", "four-key-of-groq")
    assert desk.told("logout", "groq")["message"] == "2 keys of groq removed from .env; not removed, as it stands elsewhere: environment GROQ_API_KEY_4"
    assert desk.env.read_text() == "# kept\nOTHER=1\n"
    assert desk.refused("logout", "groq") == "not removed, as it stands elsewhere: environment GROQ_API_KEY_4"


def test_keys_of_a_provider_that_left_models_json_can_be_forgotten(desk: Desk) -> None:
    desk.write(THREE, "XAI_API_KEY=a-key-of-xai\n")
    assert desk.told("logout", "xai")["done"] and desk.env.read_text() == "" and desk.models.read_text() == THREE


def test_provider_test_asks_each_with_every_key(desk: Desk, provider: Provider) -> None:
    desk.write({"lab": at(provider.script("lab", vendor(good="key-that-works"))), "own": at(provider.script("own", vendor()), keys=[]), "off": at(provider.url("off"), enabled=False)},
               "LAB_API_KEY=key-that-works,key-that-does-not\n")
    status, out, _ = desk.run("provider", "test")
    assert status == 1 and [line.split()[:2] for line in out.splitlines()] == [["lab/1", "good"], ["lab/2", "bad"], ["own/1", "good"]] and "key-that" not in out
    assert desk.told("provider", "test", "own")["keys"] == [{"key": "own/1", "state": "good", "words": "works"}]
    assert desk.run("provider", "test", "off")[1].startswith("off/1            unsure not told: off answers 404")


def test_provider_test_of_one_without_a_key(desk: Desk) -> None:
    desk.write(THREE)
    status, out, _ = desk.run("provider", "test", "groq")
    assert status == 1 and out == "groq             out    no key: GROQ_API_KEY is not set\n"


def test_a_terminal_is_told_what_is_waited_for(desk: Desk, provider: Provider, monkeypatch: pytest.MonkeyPatch) -> None:
    desk.write({"lab": at(provider.script("lab", lambda request: [Pause("wait"), *vendor()(request)]), keys=[])})
    monkeypatch.setattr(a, "PATIENCE_S", 0.01)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    threading.Thread(target=lambda: (provider.wait_paused("wait"), time.sleep(0.1), provider.release("wait"))).start()
    status, _, err = desk.run("provider", "test")
    assert (status, err) == (0, "trying 1 key ...\n")


# ---------------------------------------------------------------- models that providers list

@pytest.mark.parametrize("models", [{"data": [{"id": "m"}, {"id": "n"}, {"id": 5}, {}]}, [{"id": "m"}, {"id": "n"}], {"models": [{"name": "models/m"}, {"name": "n"}]}])
def test_a_provider_of_ones_own_is_added_with_the_models_it_lists(desk: Desk, provider: Provider, models: Any) -> None:
    url = provider.script("lab", vendor(models=models))
    assert desk.told("provider", "add", "lab", "--url", url, "--no-key")["message"] == "lab added, with 2 models"
    assert json.loads(desk.models.read_text()) == {"lab": {"default": "m", "enableFallback": True, "models": ["m", "n"], "baseUrl": url, "keys": []}}


@pytest.mark.parametrize("models,status,why", [({"data": []}, 200, "no list of models"), (b"<html>", 200, "no list of models"), ({"error": {"message": "gone"}}, 404, "gone")])
def test_a_provider_that_lists_nothing_wants_its_models_named(desk: Desk, provider: Provider, models: Any, status: int, why: str) -> None:
    url = provider.script("lab", answer(models, status))
    assert why in desk.refused("provider", "add", "lab", "--url", url, "--no-key")


def test_model_refresh_tells_what_came_and_what_went(desk: Desk, provider: Provider) -> None:
    desk.write({"lab": at(provider.script("lab", vendor()), keys=[], models=["m", "old"]), "down": at(provider.refusing(), keys=[])})
    status, out, _ = desk.run("model", "refresh")
    assert status == 1 and out == "lab              lists 2 models; no more: old\ndown             refused: connection refused\n"
    status, out, _ = desk.run("model", "refresh", "lab", "--json")
    assert status == 1 and json.loads(out) == {"providers": [{"provider": "lab", "listed": ["m", "n"], "new": ["n"], "gone": ["old"], "trouble": ""}]}
    desk.told("model", "remove", "lab", "old")
    assert desk.run("model", "refresh", "lab")[:2] == (0, "lab              lists 2 models\n  n\n")


# ---------------------------------------------------------------- a running server

def test_a_running_server_takes_each_change_over(gateway_factory: Callable[..., Gateway], provider: Provider) -> None:
    gateway = gateway_factory({"lab": at(provider.script("lab", vendor(good="key-of-the-lab"))), "own": at(provider.script("own", vendor()), keys=[])})

    def soon(true: Callable[[], Any]) -> None:
        changed_at = time.monotonic()
        assert wait_for(true, APPLIED_S) and time.monotonic() - changed_at < APPLIED_S

    def command(*words: str, stdin: str = "") -> None:
        ran = subprocess.run([*invocation(ROOT / "aicarousel.py"), *words, "--home", str(gateway.home)], env=gateway.environment, input=stdin, capture_output=True, text=True, timeout=30)
        assert ran.returncode == 0, ran.stderr

    assert gateway.chat("lab").headers["x-aicarousel-provider"] == "own"
    command("login", "lab", "--stdin", stdin="key-of-the-lab")
    soon(lambda: gateway.chat("lab").headers["x-aicarousel-provider"] == "lab")
    command("provider", "disable", "own")
    soon(lambda: [row["state"] for row in gateway.health()["providers"]] == ["ready", "out"])
    command("alias", "set", "quick", "lab/m")
    soon(lambda: "quick" in [row["id"] for row in gateway.get("/v1/models").json["data"]])
    command("logout", "lab")
    soon(lambda: gateway.chat("lab") and "authorization" not in provider.calls("lab")[-1].headers)
