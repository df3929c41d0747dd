"""Section 49, Set-up: the dialogue at a real pseudo-terminal, every path of every menu, with wrong answers at every prompt; what it does to files and to a running server."""

from __future__ import annotations

import json
import re
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import aicarousel as a
from fakes import ROOT, Gateway, Provider, answer, clean_environment, healthy, invocation, write_private
from terminal import Terminal
from test_accounts_cli import APPLIED_S, GROQ_KEY, at, vendor
from test_cli import wait_for

PROGRAM = ROOT / "aicarousel.py"
KEY = re.compile(r"sk-[0-9a-f]{64}")


class Room:
    """A home folder, and set-ups of it at a terminal."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home, self.environment = folder, folder / "home", clean_environment(folder)
        self.home.mkdir()

    def sit_down(self, *words: str) -> Terminal:
        return Terminal([*invocation(PROGRAM), *(words or ("setup",)), "--home", str(self.home)], self.environment, self.folder)

    def write(self, name: str, value: Any) -> None:
        write_private(self.home / name, value if isinstance(value, str) else json.dumps(value, indent=2))

    @property
    def env(self) -> dict[str, str]:
        path = self.home / ".env"
        return a.parse_dotenv(path.read_text()) if path.exists() else {}

    @property
    def models(self) -> Any:
        return json.loads((self.home / "models.json").read_text())


@pytest.fixture
def room(tmp_path: Path) -> Room:
    return Room(tmp_path)


def test_a_first_run_asks_for_a_key_and_leads_to_serve(room: Room, provider: Provider, gateway_factory: Callable[..., Gateway]) -> None:
    """Two answers, and `serve` has all it needs; meanwhile every wrong answer is one line, and no key is on the screen."""
    room.environment |= {"GROQ_BASE_URL": provider.script("groq", vendor(good=GROQ_KEY)), "DEEPSEEK_BASE_URL": provider.script("deepseek", vendor())}
    other, refused = "sk-" + "0123456789abcdef" * 2, "gsk_" + "B" * 48
    with room.sit_down() as it:
        it.expect("https://console.groq.com/keys")
        it.answer("Paste a key (it is not shown; Enter: none): ", refused)
        it.expect("  not kept: GroqCloud answers 401 Incorrect API key provided: ***")
        it.answer("One more key (Enter: that is all): ", f'export GROQ_API_KEY="{GROQ_KEY}"')
        it.expect("  groq/1 gsk_AA...AAAA works; kept as GROQ_API_KEY in ")
        it.answer("One more key (Enter: that is all): ", "two words")
        it.expect("Whose key is it?")
        it.answer("Number or name: ", "99")
        it.expect("  there is no provider 99; a number from 1 to ")
        it.answer("Number or name: ", "grok")
        it.expect("  there is no provider grok; did you mean groq?")
        it.answer("Number or name: ", "groq")
        it.expect("  that is no key: it has blanks")
        it.answer("One more key (Enter: that is all): ", other)
        assert "1  deepseek" in it.expect("2  qwen")
        it.answer("Number or name: ", "1")
        it.expect("  deepseek/1 sk-012...cdef works; kept as DEEPSEEK_API_KEY")
        it.answer("One more key (Enter: that is all): ", "")
        it.expect("2. Providers that take part: groq, deepseek")
        it.expect("It is shown only now:")
        it.expect("python aicarousel.py serve\n")
        it.expect("python aicarousel.py run -- claude\n")
        assert it.end() == 0
        [key] = set(KEY.findall(it.transcript))
        assert not any(secret in it.transcript for secret in (GROQ_KEY, other, refused)), "keys are typed unseen"
        assert "Traceback" not in it.transcript
        assert max(len(line) for line in it.transcript.split("Start it:")[0].splitlines() if str(room.home) not in line) <= 100
    assert room.env == {"GROQ_API_KEY": GROQ_KEY, "DEEPSEEK_API_KEY": other} and stat.S_IMODE((room.home / ".env").stat().st_mode) == 0o600
    assert not (room.home / "models.json").exists(), "a key is all that is needed"
    gateway = gateway_factory(env_file=room.env, environment={name: room.environment[name] for name in ("GROQ_BASE_URL", "DEEPSEEK_BASE_URL")})
    assert gateway.chat().status == 200
    asked = subprocess.run([*invocation(PROGRAM), "key", "list", "--json", "--home", str(room.home)], env=room.environment, capture_output=True, text=True, timeout=30)
    [row] = json.loads(asked.stdout)
    assert row["name"] == "first" and row["prefix"].rstrip(".") in key


def test_a_first_run_without_a_key_points_to_the_demo(room: Room) -> None:
    with room.sit_down() as it:
        it.answer("Paste a key (it is not shown; Enter: none): ", "")
        it.expect("No provider takes part yet; the built-in one answers offline: serve --demo")
        it.expect("python aicarousel.py serve --demo\n")
        assert it.end() == 0


@pytest.fixture
def running(room: Room, gateway_factory: Callable[..., Gateway], provider: Provider) -> Iterator[tuple[Gateway, Callable[[], Terminal], Callable[[Callable[[], Any]], None]]]:
    """A gateway with three providers, a set-up of its home at a terminal, and a check that something holds in it soon."""
    gateway = gateway_factory({
        "groq": at(provider.script("groq", vendor(good=GROQ_KEY, models={"data": [{"id": "m"}, {"id": "fresh"}]})), keys=["env:GROQ_API_KEY"], models=["m", "n", "o"]),
        "own": at(provider.script("own", vendor()), keys=[]), "off": at(provider.script("off", vendor()), keys=[], enabled=False)}, {"GROQ_API_KEY": GROQ_KEY})
    room.home, room.environment = gateway.home, gateway.environment | {"PYTHONIOENCODING": "utf-8:strict", "GITHUB_COPILOT_HOST": provider.script("github", answer({"message": "down"}, 503)).removesuffix("/v1")}
    terminals: list[Terminal] = []

    def sit_down() -> Terminal:
        terminals.append(room.sit_down())
        return terminals[-1]

    def soon(true: Callable[[], Any]) -> None:
        changed_at = time.monotonic()
        assert wait_for(true, APPLIED_S) and time.monotonic() - changed_at < APPLIED_S

    yield gateway, sit_down, soon
    for it in terminals:
        assert "Traceback" not in it.transcript and GROQ_KEY not in it.transcript
        it.__exit__()


def states(gateway: Gateway) -> dict[str, str]:
    return {row["name"]: row["state"] for row in gateway.health()["providers"]}


def listed(gateway: Gateway) -> list[str]:
    return [row["id"] for row in gateway.get("/v1/models").json["data"]][1:]


def test_providers_and_their_order(room: Room, running: Any, provider: Provider) -> None:
    gateway, sit_down, soon = running
    it = sit_down()
    for wrong in ("0", "7", "set-up", "4 4", "-1"):
        it.answer("Number: ", wrong)
        it.expect("  one of 1, 2, 3, 4, 5, 6, q\n")
    it.expect("Number: ")
    it.type(b"\xff\xfe")
    it.expect("  that is no text\n")
    it.answer("Number: ", "\x1b[A")
    it.expect("  one of 1, 2, 3, 4, 5, 6, q\n")
    it.answer("Number: ", "4")
    it.expect("  3  off ")
    it.answer("Number: ", "9")
    it.expect("  one of 1, 2, 3, 4, 5, q\n")

    it.answer("Number: ", "1")
    for wrong, why in (("9", "there is no provider 9; a number from 1 to 3"), ("offf", "there is no provider offf; did you mean off?"), ("carousel", "there is no provider carousel")):
        it.answer("Provider (number or name) (Enter: back): ", wrong)
        it.expect(f"  {why}")
    it.answer("Provider (number or name) (Enter: back): ", "3")
    it.expect("off is on in models.json")
    soon(lambda: states(gateway) == {"groq": "ready", "own": "ready", "off": "ready"})

    it.answer("Number: ", "2")
    it.answer("Provider (number or name) (Enter: back): ", "own")
    it.expect("own is off in models.json")
    soon(lambda: states(gateway) == {"groq": "ready", "own": "out", "off": "ready"})

    it.answer("Number: ", "3")
    for wrong, why in (("3,1", "2 of 3 providers named; missing: own"), ("1,2,2", "own stands there 2 times"), ("1,2,x", "there is no provider x"), ("1,,2", "there is no provider ;")):
        it.answer("All of them in the new order (numbers or names, with commas) (Enter: back): ", wrong)
        it.expect(why)
    it.answer("with commas) (Enter: back): ", "3, groq,2")
    it.expect("order: off, groq, own")
    soon(lambda: list(states(gateway)) == ["off", "groq", "own"])

    it.answer("Number: ", "4")
    it.answer("Its name (Enter: back): ", "--json")
    it.expect("  that is no name")
    it.answer("Its name (Enter: back): ", "lab")
    for wrong in ("-", "lab.example", "ftp://x"):
        it.answer("Its address (- for that of a built-in provider) (Enter: back): ", wrong)
        it.expect("  an address like https://host/v1\n")
    it.answer("provider) (Enter: back): ", provider.refusing("lab"))
    it.answer("or that it lists) (Enter: back): ", "-")
    it.expect("lab does not list its models (refused: connection refused); name them: --models LIST")
    it.answer("Its name (Enter: back): ", "lab")
    it.answer("provider) (Enter: back): ", provider.script("lab", vendor()))
    it.answer("or that it lists) (Enter: back): ", "-")
    it.expect("lab added, with 2 models")
    soon(lambda: states(gateway).get("lab") == "ready")
    it.answer("Number: ", "4")
    it.answer("Its name (Enter: back): ", "mistral")
    it.answer("provider) (Enter: back): ", "-")
    it.answer("or that it lists) (Enter: back): ", "-x")
    it.expect("  that is no name")
    it.answer("or that it lists) (Enter: back): ", "-")
    it.expect("mistral added, with 4 models; it takes no part yet: no key: MISTRAL_API_KEY is not set")
    soon(lambda: "mistral" in states(gateway))

    it.answer("Number: ", "5")
    it.answer("Provider (number or name) (Enter: back): ", "nobody")
    it.expect("  there is no provider nobody")
    it.answer("Provider (number or name) (Enter: back): ", "lab")
    it.expect("lab removed")
    soon(lambda: "lab" not in states(gateway))
    it.answer("Number: ", "5")
    it.answer("Provider (number or name) (Enter: back): ", "")
    it.answer("Number: ", "q")
    it.answer("Number: ", "")
    assert it.end() == 0
    assert list(room.models) == ["off", "groq", "own", "mistral"] and room.models["own"]["enabled"] is False


def test_models(room: Room, running: Any) -> None:
    gateway, sit_down, soon = running
    it = sit_down()
    it.answer("Number: ", "5")
    it.expect("  1  groq ")

    it.answer("Number: ", "1")
    it.answer("Provider (number or name) (Enter: back): ", "x")
    it.expect("  there is no provider x")
    it.answer("Provider (number or name) (Enter: back): ", "groq")
    it.expect("groq\n  1 * m\n  2   n\n  3   o\n")
    it.answer("Model (number or name) (Enter: back): ", "4")
    it.expect("  there is no model 4; a number from 1 to 3, or a name")
    it.answer("Model (number or name) (Enter: back): ", "2")
    it.expect("groq begins with n")
    soon(lambda: gateway.chat("groq").headers["x-aicarousel-model"] == "n")

    it.answer("Number: ", "2")
    it.answer("Provider (number or name) (Enter: back): ", "1")
    it.answer("on or off (Enter: back): ", "maybe")
    it.expect("  on or off\n")
    it.answer("on or off (Enter: back): ", "OFF")
    it.expect("groq is asked for its default alone")
    assert room.models["groq"]["enableFallback"] is False

    it.answer("Number: ", "3")
    it.answer("Provider (number or name) (Enter: back): ", "1")
    it.answer("Name of the model (Enter: back): ", "-")
    it.expect("  that is no name")
    it.answer("Name of the model (Enter: back): ", "m")
    it.expect("groq has m already")
    it.answer("Provider (number or name) (Enter: back): ", "1")
    it.answer("Name of the model (Enter: back): ", "extra/model")
    it.expect("groq has extra/model now")
    soon(lambda: "groq/extra/model" in listed(gateway))

    it.answer("Number: ", "4")
    it.answer("Provider (number or name) (Enter: back): ", "1")
    it.answer("Model (number or name) (Enter: back): ", "n")
    it.expect("n is the default of groq; choose another first")
    it.answer("Provider (number or name) (Enter: back): ", "1")
    it.answer("Model (number or name) (Enter: back): ", "1")
    it.expect("groq has m no more")
    soon(lambda: "groq/m" not in listed(gateway))

    it.answer("Number: ", "5")
    it.answer("Provider (number or name) (Enter: back): ", "1")
    it.answer("Model (number or name) (Enter: back): ", "extra/model")
    it.answer("Its place, from 1 (Enter: back): ", "first")
    it.expect("  a number is wanted")
    it.answer("Its place, from 1 (Enter: back): ", "9")
    it.expect("groq has places 1 to 3, not 9")
    it.answer("Provider (number or name) (Enter: back): ", "1")
    it.answer("Model (number or name) (Enter: back): ", "3")
    it.answer("Its place, from 1 (Enter: back): ", "1")
    it.expect("groq: extra/model, n, o")
    soon(lambda: [name for name in listed(gateway) if name.startswith("groq/")] == ["groq/extra/model", "groq/n", "groq/o"])

    it.answer("Number: ", "6")
    it.expect("groq             lists 2 models; no more: extra/model, n, o")
    it.answer("Number: ", "")
    it.answer("Number: ", "q")
    assert it.end() == 0


def test_keys_of_providers(room: Room, running: Any) -> None:
    gateway, sit_down, soon = running
    it = sit_down()
    it.answer("Number: ", "2")
    it.answer("Number: ", "x")
    it.expect("  one of 1, 2, 3, 4, q\n")
    it.answer("Number: ", "1")
    it.expect("Paste a key (it is not shown; Enter: back): ")
    it.type(b"\xff\xfe")
    it.expect("  that is no key\n")
    it.answer("One more key (Enter: that is all): ", "gsk_" + "C" * 48)
    it.expect("  not kept: GroqCloud answers 401")
    it.answer("One more key (Enter: that is all): ", "a-key-of-my-own")
    it.answer("Number or name: ", "own")
    it.expect("  own/1 *** works; kept as OWN_API_KEY in ")
    it.answer("One more key (Enter: that is all): ", "nobody-knows-whose")
    it.answer("Number or name: ", "")
    assert room.env == {"GROQ_API_KEY": GROQ_KEY, "OWN_API_KEY": "a-key-of-my-own"}
    soon(lambda: gateway.chat("own").headers.get("x-aicarousel-provider") == "own")

    it.answer("Number: ", "2")
    it.expect("no login: server_error")
    it.answer("Number: ", "3")
    it.expect("groq/1           good   works")
    it.expect("own/1            good   works")

    it.answer("Number: ", "4")
    it.answer("Whose keys (groq), or which one (groq/2) (Enter: back): ", "nobody")
    it.expect("there is no provider nobody")
    it.answer("Whose keys (groq), or which one (groq/2) (Enter: back): ", "groq/2")
    it.expect("groq/2 has no key in .env")
    it.answer("Whose keys (groq), or which one (groq/2) (Enter: back): ", "groq")
    it.expect("1 key of groq removed from .env")
    assert room.env == {"OWN_API_KEY": "a-key-of-my-own"}
    soon(lambda: states(gateway)["groq"] == "out")
    it.answer("Number: ", "")
    it.answer("Number: ", "q")
    assert it.end() == 0


def test_a_provider_that_wants_an_account_is_asked_for_it(room: Room, provider: Provider) -> None:
    room.environment |= {"CLOUDFLARE_BASE_URL": provider.script("cloudflare", vendor()) + "/{CLOUDFLARE_ACCOUNT_ID}"}
    with room.sit_down("login", "cloudflare") as it:
        it.answer("(it is not shown): ", "cf-" * 13)
        it.expect("cloudflare takes no part yet: no account: CLOUDFLARE_ACCOUNT_ID is not set")
        it.answer("CLOUDFLARE_ACCOUNT_ID (Enter: later): ", "with blanks")
        it.expect("expected letters, digits, - _ and .")
        it.answer("CLOUDFLARE_ACCOUNT_ID (Enter: later): ", "0123abcd")
        it.expect("CLOUDFLARE_ACCOUNT_ID is kept too")
        assert it.end() == 0
    assert room.env == {"CLOUDFLARE_API_TOKEN": "cf-" * 13, "CLOUDFLARE_ACCOUNT_ID": "0123abcd"}


def test_keys_of_the_gateway_and_status(running: Any) -> None:
    gateway, sit_down, soon = running
    it = sit_down()
    it.answer("Number: ", "3")
    it.expect("test")
    it.answer("Number: ", "1")
    it.answer("A name for it (Enter: back): ", "--admin")
    it.expect("  that is no name")
    it.answer("A name for it (Enter: back): ", "laptop")
    it.expect("it is shown only now)")
    [key] = KEY.findall(it.transcript)
    assert gateway.get("/health?deep=1", key=key).status == 200

    it.answer("Number: ", "2")
    for wrong, why in (("laptop", "a number is wanted"), ("99", "there is no key 99")):
        it.answer("Id of the key (Enter: back): ", wrong)
        it.expect(why)
    it.answer("Id of the key (Enter: back): ", "2")
    it.expect("key 2 revoked")
    soon(lambda: gateway.get("/health?deep=1", key=key).status == 401)
    it.answer("Number: ", "3")
    it.answer("Id of the key (Enter: back): ", "2")
    it.expect("key 2 deleted")
    it.answer("Number: ", "q")

    it.answer("Number: ", "6")
    it.expect("home      ")
    it.answer("Number: ", "1")
    it.answer("Paste a key (it is not shown; Enter: none): ", "")
    it.expect("2. Providers that take part: groq, own")
    it.expect("3. Keys for your clients: 1 (part 3 of the set-up makes more)")
    it.answer("Number: ", "q")
    assert it.end() == 0


@pytest.mark.parametrize("path,letter", [([], "C"), ([], "D"), (["4"], "C"), (["4", "1"], "D"), (["5", "4", "1"], "C"), (["2", "1"], "D"), (["2", "1"], "C"), (["1"], "C")])
def test_control_c_and_d_leave_at_every_depth(room: Room, letter: str, path: list[str]) -> None:
    room.write("models.json", {"groq": {"default": "m", "enableFallback": True, "models": ["m"]}})
    room.write(".env", f"GROQ_API_KEY={GROQ_KEY}\n")
    before = {file.name: file.read_bytes() for file in room.home.iterdir() if file.is_file()}
    with room.sit_down() as it:
        for step in path:
            it.answer(": ", step) if step != path[0] else it.answer("Number: ", step)
        it.expect({"[]": "Number: ", "['4']": "Number: ", "['2', '1']": "back): ", "['1']": "none): "}.get(str(path), "(Enter: back): "))
        it.control(letter)
        while not it.ended(0.5):
            it.control(letter)      # between the prompt and its reading Control-C is only noted
        assert it.end() == 0 and "Traceback" not in it.transcript
    assert {file.name: file.read_bytes() for file in room.home.iterdir() if file.is_file()} == before


def test_without_a_terminal_it_prints_help(room: Room) -> None:
    for stdin in (subprocess.DEVNULL, subprocess.PIPE):
        ran = subprocess.run([*invocation(PROGRAM), "setup", "--home", str(room.home)], stdin=stdin, capture_output=True, text=True, env=room.environment, cwd=room.folder, timeout=30)
        assert ran.returncode == 2 and ran.stdout == "" and ran.stderr.startswith("usage: aicarousel.py") and "needs a terminal" in ran.stderr
    shut = subprocess.run(["sh", "-c", f"exec {sys.executable} {PROGRAM} setup --home {room.home} <&-"], capture_output=True, text=True, env=room.environment, cwd=room.folder, timeout=30)
    assert shut.returncode == 2 and "needs a terminal" in shut.stderr and list(room.home.iterdir()) == []


def test_a_broken_models_json_ends_it_with_one_line(room: Room) -> None:
    room.write("models.json", "{")
    with room.sit_down() as it:
        it.expect("invalid JSON")
        assert it.end() == 2 and "Traceback" not in it.transcript


@pytest.mark.parametrize("whose", [[], ["lab"]])
def test_login_at_a_terminal_shows_no_key(room: Room, provider: Provider, whose: list[str]) -> None:
    room.write("models.json", {"lab": at(provider.script("lab", vendor(good="a-key-of-the-lab")))})
    with room.sit_down("login", *whose) as it:
        it.answer("(it is not shown): ", "a-key-of-the-lab")
        if not whose:
            it.answer("Number or name: ", "lab")
        it.expect("lab/1 *** works; kept as LAB_API_KEY")
        assert it.end() == 0 and "a-key-of-the-lab" not in it.transcript
    assert room.env == {"LAB_API_KEY": "a-key-of-the-lab"}
    with room.sit_down("login", *whose) as it:
        it.answer("(it is not shown): ", "")
        it.expect("no key came")
        assert it.end() == 1
