"""Section 43, GitHub Copilot: the device login, tokens renewed before they end, endpoints and limits by the account's catalogue, against a stand-in of GitHub on loopback."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import aicarousel as a
from fakes import ROOT, Gateway, Provider, Request, answer, chat_answer, chat_stream, clean_environment, invocation, stream
from house import KEY, House
from terminal import Terminal
from test_cli import wait_for

Json = dict[str, Any]
LOGIN = "gho_" + "L" * 36
OTHER = "gho_" + "M" * 36


def model(name: str, *endpoints: str, prompt: int = 64_000, **more: Any) -> Json:
    """A row of the catalogue."""
    return {"id": name, "model_picker_enabled": True, "supported_endpoints": list(endpoints),
            "capabilities": {"type": "chat", "limits": {"max_prompt_tokens": prompt, "max_output_tokens": 4096}, "supports": {"tool_calls": True, "vision": True}}, **more}


CATALOGUE = [model("gpt-6-luna", "/responses", "/chat/completions"), model("claude-haiku-5.5", "/v1/messages"), model("gemini-3.8-flash", "/chat/completions", prompt=2000),
             model("old", "/chat/completions", policy={"state": "disabled"}), model("hidden", "/chat/completions", model_picker_enabled=False),
             {"id": "embed", "capabilities": {"type": "embeddings"}}]
MESSAGE = {"id": "msg_1", "type": "message", "role": "assistant", "model": "m", "content": [{"type": "text", "text": "Hello."}], "stop_reason": "end_turn", "stop_sequence": None,
           "usage": {"input_tokens": 3, "output_tokens": 2}}
RESPONSE = {"id": "resp_1", "object": "response", "created_at": 1, "status": "completed", "model": "m", "output": [
    {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed", "content": [{"type": "output_text", "text": "Hello.", "annotations": []}]}],
    "usage": {"input_tokens": 3, "output_tokens": 2, "total_tokens": 5}}


class GitHub:
    """A stand-in of github.com, api.github.com and Copilot's API at one address; what it says can be changed while it runs."""

    def __init__(self, provider: Provider) -> None:
        self.provider = provider
        self.polls: list[Any] = [{"error": "authorization_pending"}, {"access_token": LOGIN, "token_type": "bearer", "scope": "read:user"}]
        self.begin: Any = {"device_code": "device-1", "user_code": "ABCD-1234", "verification_uri": f"{provider.base}/login/device", "expires_in": 900, "interval": 0.05}
        self.mint: Any = None                   #: answers to exchanges instead of a token, the first first
        self.held_s = 1500.0                    #: how long tokens are said to last
        self.catalogue: Any = {"data": CATALOGUE}
        self.valid: set[str] = set()            #: tokens that the API takes
        self.n_tokens = 0
        self.api = f"{provider.base}/api"
        for name in ("login", "copilot_internal", "api"):
            provider.script(name, self.play)

    @property
    def host(self) -> str:
        return self.provider.base

    def play(self, request: Request) -> Any:
        path = request.path
        if path == "/login/device/code":
            return answer(self.begin)
        if path == "/login/oauth/access_token":
            return answer(self.polls.pop(0) if len(self.polls) > 1 else self.polls[0])
        if path == "/copilot_internal/v2/token":
            if self.mint:
                status, body = self.mint.pop(0)
                return answer(body, status)
            if request.headers["authorization"] not in (f"Bearer {LOGIN}", f"Bearer {OTHER}"):
                return answer({"message": "Bad credentials"}, 401)
            self.n_tokens += 1
            self.valid.add(token := f"tid=t{self.n_tokens};exp=1:mac")
            return answer({"token": token, "expires_at": time.time() + self.held_s, "refresh_in": self.held_s - 60, "endpoints": {"api": self.api}})
        if request.headers.get("authorization", "").removeprefix("Bearer ") not in self.valid:
            return answer(b"unauthorized: token expired\n", 401)
        if path == "/api/models":
            return answer(self.catalogue)
        if path == "/api/chat/completions" and request.streamed:
            return stream(chat_stream("Hel", "lo."))
        return answer({"/api/v1/messages": MESSAGE, "/api/responses": RESPONSE}.get(path, chat_answer("Hello.")))

    def mints(self) -> list[Request]:
        return self.provider.calls("copilot_internal")

    def asked(self) -> list[Request]:
        """Requests to models."""
        return [request for request in self.provider.calls("api") if request.path != "/api/models"]


@pytest.fixture
def github(provider: Provider) -> GitHub:
    return GitHub(provider)


MODELS = ["gpt-6-luna", "claude-haiku-5.5", "gemini-3.8-flash"]


def entry(**more: Any) -> Json:
    return {"github-copilot": {"default": "gpt-6-luna", "enableFallback": False, "models": MODELS, **more}}


class CopilotHouse(House):
    """A gateway in this process, logged in at the stand-in."""

    def __init__(self, github: GitHub, models: Json) -> None:
        super().__init__(models)
        self.github, self.login = github, LOGIN

    def read(self, models: Json) -> a.Config:         # type: ignore[override]
        return a.load_config(json.dumps(models), models_path="models.json", dotenv={}, flags={},
                             environment={"COPILOT_GITHUB_TOKEN": self.login, "API_KEYS": KEY, "GITHUB_COPILOT_HOST": self.github.host})

    async def _open(self) -> None:
        await super()._open()
        self.tokens = self.gateway.relay.tokens = a.CopilotTokens(a.real_world(), self.gateway.transport, lambda: self.gateway.config.settings)


@pytest.fixture
def house(github: GitHub) -> Iterator[Callable[..., CopilotHouse]]:
    houses: list[CopilotHouse] = []

    def make(models: Json | None = None) -> CopilotHouse:
        houses.append(CopilotHouse(github, models or entry()))
        houses[-1].start()
        return houses[-1]

    yield make
    for one in houses:
        one.remove()


# ---------------------------------------------------------------- tokens

def test_a_login_is_exchanged_and_the_editor_is_told(house: Callable[..., CopilotHouse], github: GitHub) -> None:
    reply = house().chat("github-copilot")
    assert reply.status == 200 and reply.text == "Hello." and reply.headers["x-aicarousel-attempts"] == "1"
    [mint], [asked] = github.mints(), github.asked()
    assert mint.method == "GET" and mint.headers["authorization"] == f"Bearer {LOGIN}"
    for request in (mint, asked):
        assert request.headers["editor-version"].startswith("vscode/") and request.headers["copilot-integration-id"] == "vscode-chat" and request.headers["user-agent"].startswith("GitHubCopilotChat/")
    assert asked.headers["authorization"] == "Bearer tid=t1;exp=1:mac" and asked.headers["x-initiator"] == "user" and "copilot-vision-request" not in asked.headers
    assert LOGIN not in asked.body.decode() + str(asked.headers)


def test_a_token_is_renewed_a_minute_before_it_ends(house: Callable[..., CopilotHouse], github: GitHub) -> None:
    gateway = house()
    assert gateway.chat().status == 200
    gateway.pass_time(1430.0)
    assert gateway.chat().status == 200 and len(github.mints()) == 1
    gateway.pass_time(15.0)
    assert gateway.chat().status == 200 and len(github.mints()) == 2
    assert github.asked()[-1].headers["authorization"] == "Bearer tid=t2;exp=1:mac"


def test_requests_at_once_share_one_exchange(house: Callable[..., CopilotHouse], github: GitHub) -> None:
    gateway = house()
    clients = [gateway.start_chat("github-copilot", stream=False) for _ in range(8)]
    assert [client.read_all().status for client in clients] == [200] * 8 and len(github.mints()) == 1


def test_a_token_that_still_holds_is_kept_where_no_new_one_comes(house: Callable[..., CopilotHouse], github: GitHub) -> None:
    gateway = house()
    assert gateway.chat().status == 200
    gateway.pass_time(1450.0)
    github.mint = [(401, {"message": "Bad credentials"})]
    assert gateway.chat().status == 200 and github.asked()[-1].headers["authorization"] == "Bearer tid=t1;exp=1:mac" and len(github.mints()) == 2
    assert gateway.chat().status == 200 and len(github.mints()) == 2, "it is not tried with every request"
    gateway.wait_line("token.kept credential=github-copilot/1")
    gateway.pass_time(11.0)
    assert gateway.chat().status == 200 and len(github.mints()) == 3 and github.asked()[-1].headers["authorization"] == "Bearer tid=t2;exp=1:mac"


def test_a_token_that_is_refused_is_exchanged_anew_once(house: Callable[..., CopilotHouse], github: GitHub) -> None:
    gateway = house()
    assert gateway.chat().status == 200
    github.valid.clear()
    reply = gateway.chat()
    assert reply.status == 200 and reply.headers["x-aicarousel-attempts"] == "2" and len(github.mints()) == 2
    assert gateway.cooling("github-copilot") == []


def test_a_token_that_is_never_taken_is_exchanged_no_more_than_twice(house: Callable[..., CopilotHouse], github: GitHub) -> None:
    gateway = house()
    gateway.do(lambda: None)
    github.valid = type("Nothing", (set,), {"add": lambda self, token: None})()
    reply = gateway.chat()
    assert reply.status == 502 and len(github.mints()) == 2 and len(github.asked()) == 2
    [cooling] = gateway.cooling("github-copilot")
    assert cooling["scope"] == "credential"


@pytest.mark.parametrize("status,words", [(401, "GitHub does not accept this login any more: python aicarousel.py login github-copilot"), (404, "GitHub does not accept this login any more"),
                                          (403, "this GitHub account has no Copilot plan")])
def test_a_login_that_was_ended_is_a_credential_failure_that_says_what_to_do(house: Callable[..., CopilotHouse], github: GitHub, status: int, words: str) -> None:
    gateway = house()
    github.mint = [(status, {"message": "Bad credentials"})] * 9
    reply = gateway.chat()
    assert reply.status == 502 and words in reply.error["message"], reply.error
    [cooling] = gateway.cooling("github-copilot")
    assert cooling["kind"] == "credential" and cooling["scope"] == "credential" and not github.asked() and len(github.mints()) == 1
    gateway.login, github.mint = OTHER, None
    gateway.reconfigure(gateway.models)
    assert gateway.chat().status == 200 and github.mints()[-1].headers["authorization"] == f"Bearer {OTHER}", "a new login is tried at once"


def test_trouble_at_github_is_tried_three_times(house: Callable[..., CopilotHouse], github: GitHub) -> None:
    gateway = house()
    github.mint = [(500, {}), (429, {"message": "slow"})]
    asked = gateway.start_chat("github-copilot", stream=False)
    for _ in range(4):
        github.provider.wait_until(lambda: len(github.mints()) > 0, 1.0)
        gateway.pass_time(0.7)
    assert asked.read_all().status == 200 and len(github.mints()) == 3


@pytest.mark.parametrize("body", [b"no json", [], {}, {"token": 5, "expires_at": 1}, {"token": "a b", "expires_at": 9}, {"token": "t", "expires_at": "soon"}, {"token": "t", "expires_at": 1, "endpoints": 5}])
def test_an_exchange_without_a_token_is_a_failure_of_the_network(house: Callable[..., CopilotHouse], github: GitHub, body: Any) -> None:
    gateway = house()
    github.mint = [(200, body)] * 9
    reply = gateway.chat()
    assert reply.status == 502 and "GitHub's answer holds no Copilot token" in reply.error["message"] and not github.asked()


def test_a_wrong_clock_does_not_end_a_token(house: Callable[..., CopilotHouse], github: GitHub) -> None:
    gateway = house()
    github.mint = [(200, {"token": "tid=old;x", "expires_at": 1000, "refresh_in": 600, "endpoints": {"api": github.api}})]
    github.valid.add("tid=old;x")
    assert gateway.chat().status == 200 and gateway.chat().status == 200 and len(github.mints()) == 1
    gateway.pass_time(605.0)
    assert gateway.chat().status == 200 and len(github.mints()) == 2


@pytest.mark.parametrize("api,host,trusted", [
    ("https://api.individual.githubcopilot.com/", "github.com", True), ("https://githubcopilot.com", "github.com", True), ("https://api.githubcopilot.com.example", "github.com", False),
    ("http://api.githubcopilot.com", "github.com", False), ("https://evilgithubcopilot.com", "github.com", False), ("https://copilot-api.acme.ghe.com", "acme.ghe.com", True),
    ("https://copilot-api.acme.ghe.com", "github.com", False), ("https://copilot-api.other.ghe.com", "acme.ghe.com", False), ("http://127.0.0.1:9/x", "http://127.0.0.1:8", True),
    ("http://127.0.0.1:9", "github.com", False), ("https://x.example", "http://127.0.0.1:8", False), (None, "github.com", False), (5, "github.com", False), ("https://a.githubcopilot.com:x", "github.com", False),
    ("https://u@a.githubcopilot.com", "github.com", False),
])
def test_tokens_go_to_githubs_own_addresses_alone(api: Any, host: str, trusted: bool) -> None:
    assert a._trusted_api(api, host) == (api.rstrip("/") if trusted else "")


def test_where_a_github_is() -> None:
    assert a._github_urls("github.com") == ("https://github.com", "https://api.github.com")
    assert a._github_urls("acme.ghe.com") == ("https://acme.ghe.com", "https://api.acme.ghe.com")


@pytest.mark.parametrize("host", ["evil.com", "a.b.ghe.com", "https://github.com", "http://10.0.0.1", "github.com/x"])
def test_only_githubs_can_be_logged_in_at(host: str) -> None:
    with pytest.raises(a.ConfigError, match="GITHUB_COPILOT_HOST"):
        a.load_config(None, models_path="", environment={"GITHUB_COPILOT_HOST": host}, dotenv={}, flags={})


def test_no_token_is_ever_shown(house: Callable[..., CopilotHouse], github: GitHub) -> None:
    assert a.redact("it was tid=t1;exp=1;sku=x:mac, as you know") == "it was ***, as you know"


# ---------------------------------------------------------------- endpoints, headers, limits

@pytest.mark.parametrize("client,path", [("chat", "/v1/chat/completions"), ("messages", "/v1/messages"), ("responses", "/v1/responses")])
@pytest.mark.parametrize("name,by_chat,by_messages,by_responses", [
    ("gpt-6-luna", "/api/chat/completions", "/api/responses", "/api/responses"),
    ("claude-haiku-5.5", "/api/v1/messages", "/api/v1/messages", "/api/v1/messages"),
    ("gemini-3.8-flash", "/api/chat/completions", "/api/chat/completions", "/api/chat/completions"),
])
def test_each_model_is_asked_where_it_speaks(house: Callable[..., CopilotHouse], github: GitHub, client: str, path: str, name: str, by_chat: str, by_messages: str, by_responses: str) -> None:
    body = {"model": f"github-copilot/{name}", **({"input": "Hi"} if client == "responses" else {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 9})}
    reply = house().post(path, body)
    assert reply.status == 200 and "Hello." in reply.body.decode(), reply.body
    assert github.asked()[-1].path == {"chat": by_chat, "messages": by_messages, "responses": by_responses}[client]


def test_answers_are_streamed_on_and_a_refused_token_costs_no_stream(house: Callable[..., CopilotHouse], github: GitHub) -> None:
    gateway = house()
    for _ in range(2):
        reply = gateway.chat("github-copilot/gemini-3.8-flash", stream=True)
        assert reply.status == 200 and reply.text == "Hello." and reply.done
        github.valid.clear()
    assert [request.headers["authorization"] for request in github.asked()] == ["Bearer tid=t1;exp=1:mac", "Bearer tid=t1;exp=1:mac", "Bearer tid=t2;exp=1:mac"]


@pytest.mark.parametrize("catalogue", [{"data": []}, b"<html>", {"data": [{"id": "gpt-6-luna", "capabilities": {"limits": 5, "supports": None}}]}])
def test_without_a_catalogue_models_are_asked_as_they_are_known(house: Callable[..., CopilotHouse], github: GitHub, catalogue: Any) -> None:
    github.catalogue = catalogue
    gateway = house()
    for name, path in zip(MODELS, ("/api/responses", "/api/v1/messages", "/api/chat/completions")):
        assert gateway.chat(f"github-copilot/{name}").status == 200 and github.asked()[-1].path == path


PIXEL = "data:image/png;base64,iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
CALL = {"role": "assistant", "content": None, "tool_calls": [{"id": "c1", "type": "function", "function": {"name": "look", "arguments": "{}"}}]}
TURNS = [
    ("a question", [{"role": "user", "content": "Hi"}], "user", False),
    ("a tool's result", [{"role": "user", "content": "Hi"}, CALL, {"role": "tool", "tool_call_id": "c1", "content": "ok"}], "agent", False),
    ("a question after a tool", [{"role": "user", "content": "Hi"}, CALL, {"role": "tool", "tool_call_id": "c1", "content": "ok"}, {"role": "assistant", "content": "There."}, {"role": "user", "content": "Thanks"}], "user", False),
    ("an answer to go on with", [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "The"}], "agent", False),
    ("an image", [{"role": "user", "content": [{"type": "text", "text": "Look"}, {"type": "image_url", "image_url": {"url": PIXEL}}]}], "user", True),
    ("an image before", [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": PIXEL}}]}, {"role": "assistant", "content": "A dot."}, {"role": "user", "content": "So?"}], "user", True),
]


@pytest.mark.parametrize("messages,initiator,sees", [row[1:] for row in TURNS], ids=[row[0] for row in TURNS])
def test_copilot_is_told_who_began_a_turn_and_whether_it_shows_an_image(house: Callable[..., CopilotHouse], github: GitHub, messages: list[Json], initiator: str, sees: bool) -> None:
    tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}]
    assert house().post("/v1/chat/completions", {"model": "github-copilot/gpt-6-luna", "messages": messages, "tools": tools}).status == 200
    assert github.asked()[-1].headers["x-initiator"] == initiator and (github.asked()[-1].headers.get("copilot-vision-request") == "true") is sees


def test_limits_of_the_account_go_before_what_is_known_of_a_model(house: Callable[..., CopilotHouse], github: GitHub) -> None:
    gateway = house({**entry(enableFallback=True)})
    reply = gateway.chat("github-copilot/gemini-3.8-flash", "word " * 6000, max_tokens=50_000)
    assert reply.status == 200 and reply.headers["x-aicarousel-model"] != "gemini-3.8-flash", "2000 tokens are all that it takes here"
    assert github.asked()[-1].json.get("max_completion_tokens", github.asked()[-1].json.get("max_tokens", 4096)) <= 50_000
    assert all("gemini" not in str(request.json.get("model")) for request in github.asked())


def test_without_who_exchanges_the_login_itself_is_sent(house: Callable[..., CopilotHouse], github: GitHub, provider: Provider) -> None:
    """The gateway without section 23, as other programs may embed it."""
    gateway = house(entry(baseUrl=f"{provider.base}/api"))
    gateway.gateway.relay.tokens = None
    github.valid.add(LOGIN)
    assert gateway.chat().status == 200 and github.asked()[-1].headers["authorization"] == f"Bearer {LOGIN}"


# ---------------------------------------------------------------- the device login

class Place:
    """A home folder whose GitHub is the stand-in."""

    def __init__(self, folder: Path, github: GitHub) -> None:
        self.home = folder / "home"
        self.home.mkdir()
        self.folder, self.environment = folder, clean_environment(folder) | {"GITHUB_COPILOT_HOST": github.host}

    def run(self, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        return subprocess.run([*invocation(ROOT / "aicarousel.py"), *words, "--home", str(self.home)], input=stdin, env=self.environment, cwd=self.folder, capture_output=True, text=True, timeout=30)

    @property
    def env(self) -> dict[str, str]:
        path = self.home / ".env"
        return a.parse_dotenv(path.read_text()) if path.exists() else {}


@pytest.fixture
def place(tmp_path: Path, github: GitHub) -> Place:
    return Place(tmp_path, github)


def test_a_device_login_at_a_terminal_ends_in_answers(place: Place, github: GitHub, gateway_factory: Callable[..., Gateway]) -> None:
    """Notice and code are shown, GitHub is polled, the login is kept and checked, and a running gateway uses it at once; then it is ended on GitHub, and told."""
    gateway = gateway_factory({"own": {"baseUrl": f"{github.api}", "default": "m", "enableFallback": False, "models": ["m"], "keys": [], "enabled": False}}, environment={"GITHUB_COPILOT_HOST": github.host})
    place.home, place.environment = gateway.home, gateway.environment
    with Terminal([*invocation(ROOT / "aicarousel.py"), "login", "github-copilot", "--home", str(place.home)], place.environment, place.folder) as it:
        it.expect("GitHub may see that as misuse of the account")
        it.expect("/login/device and enter the code ABCD-1234")
        it.expect("github-copilot/1 gho_LL...LLLL works; kept as COPILOT_GITHUB_TOKEN in ")
        assert it.end() == 0 and LOGIN not in it.transcript and "device-1" not in it.transcript
    kept_at = time.monotonic()
    begun, *polls = github.provider.calls("login")
    assert begun.json == {"client_id": a._COPILOT_CLIENT, "scope": "read:user"} and begun.headers["accept"] == "application/json" and "authorization" not in begun.headers
    assert [poll.json["device_code"] for poll in polls] == ["device-1", "device-1"] and polls[0].json["grant_type"] == "urn:ietf:params:oauth:grant-type:device_code"
    assert place.env == {"COPILOT_GITHUB_TOKEN": LOGIN} and list(json.loads((place.home / "models.json").read_text())) == ["own", "github-copilot"]
    assert wait_for(lambda: gateway.chat().status == 200, 2.0) and time.monotonic() - kept_at < 2.0

    told = place.run("provider", "test", "github-copilot")
    assert told.returncode == 0 and "github-copilot/1 good   works" in told.stdout
    told = place.run("model", "refresh", "github-copilot", "--json")
    assert json.loads(told.stdout)["providers"][0]["listed"] == ["gpt-6-luna", "claude-haiku-5.5", "gemini-3.8-flash"]
    github.mint, github.valid = [(401, {"message": "Bad credentials"})] * 9, set()
    told = place.run("provider", "test", "github-copilot")
    assert told.returncode == 1 and "github-copilot/1 bad    GitHub does not accept this login any more: python aicarousel.py login github-copilot" in told.stdout
    assert "python aicarousel.py login github-copilot" in gateway.chat().error["message"]


ENDINGS = [
    ([{"error": "access_denied"}], None, "the login was declined on GitHub"),
    ([{"error": "expired_token"}], None, "the code has run out; try again"),
    ([{"error": "incorrect_device_code"}], None, "GitHub ended the login: incorrect_device_code"),
    ([{}], None, "GitHub ended the login: None"),
    ([{"error": "authorization_pending"}], {"expires_in": 0.2}, "the code has run out; try again"),
    ([[]], None, "no login: not_json"),
    (None, {"verification_uri": "https://evil.example/login/device"}, "an address that is not its own"),
    (None, {"verification_uri": "http://127.0.0.1:x/"}, "an address that is not its own"),
    (None, {"user_code": "\x1b[31mABCD"}, "holds no code"),
    (None, {"device_code": None}, "GitHub ended the login"),
]


@pytest.mark.parametrize("polls,begin,why", ENDINGS, ids=[why + str(begin or "") for _, begin, why in ENDINGS])
def test_a_login_that_does_not_come_about_is_one_line(github: GitHub, polls: Any, begin: Any, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("GITHUB_COPILOT_HOST", github.host)
    github.polls, github.begin = polls or [{"error": "bad"}], {**github.begin, **(begin or {})}
    assert a.main(["login", "github-copilot", "--home", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert why in err.splitlines()[-1] and "\x1b" not in err and out == "" and not (tmp_path / ".env").exists()


def test_slow_down_is_obeyed(github: GitHub) -> None:
    waits: list[float] = []

    async def log_in() -> str:
        world = a.real_world()

        async def sleep(seconds: float) -> None:
            waits.append(seconds)

        world.sleep = sleep
        transport = a.Transport(world)
        config = a.load_config(json.dumps(entry()), models_path="", environment={"GITHUB_COPILOT_HOST": github.host}, dotenv={}, flags={})
        try:
            return await a.copilot_login(world, transport, config.providers[0], config.settings, lambda address, code: None)
        finally:
            transport.close()

    github.begin["interval"] = 5
    github.polls = [{"error": "authorization_pending"}, {"error": "slow_down"}, [], [], {"error": "slow_down", "interval": 30}, {"access_token": LOGIN}]
    assert asyncio.run(log_in()) == LOGIN and waits == [5.0, 5.0, 10.0, 10.0, 10.0, 30.0], "two answers that are none do not end it"


def test_a_login_can_be_brought_along(place: Place, github: GitHub) -> None:
    told = place.run("login", "--stdin", stdin=LOGIN)
    assert told.returncode == 0 and place.env == {"COPILOT_GITHUB_TOKEN": LOGIN}
    refused = place.run("login", "github-copilot", "--stdin", stdin="gho_" + "N" * 36)
    assert refused.returncode == 1 and refused.stderr == "not kept: GitHub does not accept this login any more: python aicarousel.py login github-copilot\n"
    assert place.run("logout", "github-copilot").returncode == 0 and place.env == {}


@pytest.mark.parametrize("rows,offered", [
    (CATALOGUE, ["gpt-6-luna", "claude-haiku-5.5", "gemini-3.8-flash"]),
    ([model("a", model_picker_enabled=False, policy={"state": "enabled"}), model("b", model_picker_enabled=False)], ["a"]),
])
def test_what_an_account_may_chat_with(rows: list[Json], offered: list[str]) -> None:
    login = a._Login(asyncio.Lock(), models={row["id"]: row for row in rows})
    assert a.copilot_offers(login) == offered
