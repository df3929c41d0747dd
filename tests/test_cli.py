"""Section 48, Command line: every command as a process, with good and bad arguments, what it prints and its exit status."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import aicarousel
from fakes import FAKE_KEY, HANG_S, ROOT, Gateway, Head, Provider, answer, chat_answer, chat_stream, clean_environment, healthy, invocation, pieces, stream, write_private

Json = dict[str, Any]
PROGRAM = ROOT / "aicarousel.py"
ONE_LINE = re.compile(r"aicarousel: [^\n]+: found [^\n]+; expected [^\n]+\n")
KEY = re.compile(r"sk-[0-9a-f]{64}")
Ran = subprocess.CompletedProcess


class Place:
    """A folder with a home in it, and commands run there."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, folder / "home"
        self.environment = clean_environment(folder)

    def run(self, *words: str, program: Path = PROGRAM, home: bool = True, environment: Mapping[str, str] | None = None) -> Ran[str]:
        """Runs the program to its end."""
        where = ["--home", str(self.home)] if home else []
        return subprocess.run([*invocation(program), *words, *where], env=self.environment | dict(environment or {}), cwd=self.folder,
                              stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=10)

    def write_models(self, text: str | Json) -> Path:
        """Writes models.json into the home."""
        self.home.mkdir(exist_ok=True)
        write_private(self.home / "models.json", text if isinstance(text, str) else json.dumps(text))
        return self.home / "models.json"

    def write_env(self, text: str) -> None:
        self.home.mkdir(exist_ok=True)
        write_private(self.home / ".env", text)


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


@pytest.fixture(scope="module")
def demo(module_gateway_factory: Callable[..., Gateway]) -> Gateway:
    """A gateway with the built-in provider alone."""
    return module_gateway_factory(arguments=["--demo"])


def entry(url: str, **more: Any) -> Json:
    """An entry of models.json."""
    return {"baseUrl": url, "default": "m", "enableFallback": False, "models": ["m"], **more}


def wait_for(true: Callable[[], Any], timeout: float = HANG_S) -> bool:
    """Whether `true()` holds within `timeout` seconds; another process makes it true, so there is nothing to be woken by."""
    until = time.monotonic() + timeout
    while not true() and time.monotonic() < until:
        time.sleep(0.02)
    return bool(true())


# ---------------------------------------------------------------- good and bad arguments

ASKED_WRONGLY = [
    ([], "usage"),
    (["nothing"], "invalid choice"),
    (["serve", "--nothing"], "unrecognized arguments"),
    (["serve", "--port", "x"], "invalid int value"),
    (["serve", "--log-level", "loud"], "invalid choice"),
    (["key"], "ACTION"),
    (["key", "make"], "invalid choice"),
    (["key", "create", "--length", "x"], "invalid int value"),
    (["key", "revoke"], "required: id"),
    (["key", "revoke", "first"], "invalid int value"),
    (["key", "delete", "first"], "invalid int value"),
    (["key", "set", "first", "--rpm", "1"], "invalid int value"),
    (["key", "set", "1", "--rpm", "few"], "invalid int value"),
    (["key", "create", "--usd-per-day", "much"], "invalid float value"),
    (["key", "set", "1", "--admin"], "unrecognized arguments"),
    (["call"], "required: prompt"),
    (["call", "hi", "-t", "warm"], "invalid float value"),
    (["call", "hi", "--max-tok", "many"], "invalid int value"),
    (["provider"], "ACTION"),
    (["provider", "order"], "required: names"),
    (["provider", "add", "x", "--format", "soap"], "invalid choice"),
    (["logout"], "required: provider"),
    (["model", "move", "groq", "m", "first"], "invalid int value"),
    (["model", "fallback", "groq", "perhaps"], "invalid choice"),
    (["alias", "set", "x"], "required: target"),
    (["db"], "ACTION"),
    (["db", "drop"], "invalid choice"),
    (["config"], "ACTION"),
    (["config", "show", "--all"], "unrecognized arguments"),
    (["config", "cursor"], "invalid choice"),
    (["config", "codex", "--write", "--undo"], "not allowed with"),
    (["config", "codex", "--dry-run", "--write"], "not allowed with"),
    (["doctor", "everything"], "unrecognized arguments"),
    (["selftest", "--live"], "unrecognized arguments"),
]


@pytest.mark.parametrize("words,complaint", ASKED_WRONGLY, ids=[" ".join(words) or "none" for words, _ in ASKED_WRONGLY])
def test_arguments_that_make_no_sense_are_status_2_and_usage(place: Place, words: list[str], complaint: str) -> None:
    ran = place.run(*words, home=False)
    assert ran.returncode == 2 and ran.stdout == ""
    assert "usage: aicarousel.py" in ran.stderr and complaint in ran.stderr and "Traceback" not in ran.stderr


REFUSED = [
    (["serve", "--port", "70000"], "flag --port: found number 70000; expected a port number from 0 to 65535"),
    (["serve", "--port", "-1"], "flag --port"),
    (["serve", "--host", "http://x"], "flag --host"),
    (["serve", "--host", "0.0.0.0"], "--host 0.0.0.0: found no gateway key; expected at least one before others can connect"),
    (["serve", "--host", "0.0.0.0", "--no-auth"], "--host 0.0.0.0: found --no-auth; expected a loopback address"),
    (["serve", "--cors-origin", "app.example/path"], "flag --cors-origin"),
    (["serve", "--tls-cert", "cert.pem"], "tls_cert without tls_key"),
    (["serve", "--tls-key", "key.pem"], "tls_key without tls_cert"),
    (["serve", "--tls-cert", "none.pem", "--tls-key", "none.pem"], "--tls-cert, --tls-key: found No such file or directory"),
    (["key", "create", "--length", "31"], "key length: found 31; expected 32 to 128"),
    (["key", "create", "--length", "129"], "key length: found 129"),
    (["key", "create", "a\nb"], "key name"),
    (["key", "create", "--rpm", "0"], "key rpm: found 0; expected a number from 1"),
    (["key", "create", "--concurrency", "-1"], "key concurrency: found -1"),
    (["key", "create", "--tpm", "9" * 30], "key tpm: found 999"),
    (["key", "create", "--usd-per-day", "0"], "key usd_per_day: found 0.0; expected US dollars"),
    (["key", "create", "--usd-per-month", "nan"], "key usd_per_month: found nan"),
    (["key", "create", "--usd-per-month", "inf"], "key usd_per_month: found inf"),
    (["key", "create", "--models", "a,,b"], "key models: found ''"),
    (["key", "create", "--models", "a\nb"], "key models"),
    (["key", "create", "--expires", "soon"], "--expires: found 'soon'; expected days or hours from now"),
    (["key", "create", "--expires", "2027-13-01"], "--expires"),
    (["key", "create", "--expires", "9999-12-31"], "--expires"),
    (["key", "set", "1"], "key set: found nothing to set"),
    (["stats"], "aicarousel.db: found no database"),
    (["stats", "--days", "0"], "days: found 0; expected a number of days"),
    (["stats", "--days", "x"], "days: found x"),
    (["stats", "--days", ""], "days: found nothing"),
    (["stats", "--by", "model,hour"], "by: found model,hour; expected a comma list of key, model, provider, day"),
    (["stats", "--by", "day,day"], "by: found day,day"),
    (["db", "rollback"], "aicarousel.db: found no database"),
    (["call", "hi", "--server", "nonsense"], "--server"),
    (["call", "hi", "--server", "http://127.0.0.1:99999"], "--server"),
    (["call", "hi", "--server", "ftp://127.0.0.1"], "--server"),
]


@pytest.mark.parametrize("words,complaint", REFUSED, ids=[" ".join(words).replace("\n", " ") for words, _ in REFUSED])
def test_values_that_cannot_be_are_status_2_and_one_line(place: Place, words: list[str], complaint: str) -> None:
    ran = place.run(*words)
    assert ran.returncode == 2 and ran.stdout == ""
    assert ONE_LINE.fullmatch(ran.stderr) and complaint in ran.stderr, ran.stderr


FAILED = [
    (["key", "revoke", "99"], "there is no key 99"),
    (["key", "delete", "99"], "there is no key 99"),
    (["key", "revoke", "-1"], "there is no key -1"),
    (["key", "set", "99", "--rpm", "1"], "there is no key 99"),
    (["key", "set", "9" * 30, "--rpm", "1"], "there is no key 999"),
    (["key", "delete", "9" * 30], "there is no key 999"),
]


@pytest.mark.parametrize("words,complaint", FAILED, ids=[" ".join(words)[:20] for words, _ in FAILED])
def test_what_could_not_be_done_is_status_1(place: Place, words: list[str], complaint: str) -> None:
    ran = place.run(*words)
    assert ran.returncode == 1 and ran.stdout == "" and ran.stderr.startswith(complaint) and "Traceback" not in ran.stderr


COMMANDS = ["setup", "stop", "info", "serve", "key create", "key list", "key set", "key revoke", "key delete", "status", "stats", "explain", "quota", "route list", "route reset", "call", "db migrate", "db rollback", "config show",
            "context add", "context list", "context use", "context remove", "bundle", "version", "provider list", "provider add", "provider order", "provider test", "login", "logout", "model list", "model move", "model fallback", "alias set",
            "run", "doctor", "selftest"]


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_of_every_command(place: Place, command: str) -> None:
    ran = place.run(*command.split(), "--help", home=False)
    assert ran.returncode == 0 and ran.stderr == "" and ran.stdout.startswith(f"usage: aicarousel.py {command}".rstrip())


def test_commands_are_those_tested_here() -> None:
    assert {command.split()[0] for command in COMMANDS} == set(aicarousel._COMMANDS)


def test_version(place: Place) -> None:
    ran = place.run("--version", home=False)
    assert (ran.returncode, ran.stdout) == (0, f"AICarousel {aicarousel.__version__}\n")


def test_nothing_is_made_by_looking(place: Place) -> None:
    """status and config show leave no file behind."""
    for words in (["status"], ["config", "show"], ["call", "hi", "--server", "http://127.0.0.1:9"]):
        place.run(*words)
    assert not place.home.exists() and sorted(path.name for path in place.folder.iterdir()) == []


def test_a_home_that_is_a_file(place: Place) -> None:
    place.home.write_text("")
    for words in (["serve", "--port", "0"], ["key", "create"], ["status"], ["db", "migrate"]):
        ran = place.run(*words)
        assert ran.returncode == 2 and ONE_LINE.fullmatch(ran.stderr), ran.stderr


# ---------------------------------------------------------------- h11 missing or too old

@pytest.fixture(params=["missing", "old"])
def without_h11(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, dict[str, str]]:
    """(what is wrong, an environment in which h11 is missing or too old)."""
    package = tmp_path / "planted" / "h11"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text('raise ImportError("no h11")\n' if request.param == "missing" else '__version__ = "0.14.0"\n')
    return request.param, {"PYTHONPATH": f"{package.parent}{os.pathsep}{ROOT}"}


def test_serve_says_how_to_get_h11(place: Place, without_h11: tuple[str, dict[str, str]]) -> None:
    wrong, environment = without_h11
    ran = place.run("serve", "--port", "0", environment=environment)
    assert ran.returncode == 2 and ran.stdout == ""
    assert ran.stderr.count("\n") == 1 and "Traceback" not in ran.stderr
    assert "pip install 'h11>=0.16'" in ran.stderr and "uv run aicarousel.py serve" in ran.stderr
    assert ("found 0.14.0" if wrong == "old" else "needs the Python package h11") in ran.stderr
    assert not place.home.exists(), "no key is made for a server that cannot start"


def test_everything_else_works_without_h11(place: Place, without_h11: tuple[str, dict[str, str]], demo: Gateway) -> None:
    _, environment = without_h11
    for words in (["--version"], ["key", "create", "ci"], ["key", "list"], ["status"], ["status", "--json"], ["config", "show"], ["db", "migrate"]):
        ran = place.run(*words, home=words != ["--version"], environment=environment)
        assert ran.returncode == 0 and ran.stdout and ran.stderr == "", (words, ran.stderr)
    assert place.run("call", "hi", "--key", demo.key, "--server", demo.url, environment=environment).returncode == 0


# ---------------------------------------------------------------- serve

def test_port_in_use_is_one_line_and_loses_no_key(place: Place) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        ran = place.run("serve", "--port", str(port))
    assert ran.returncode == 2 and ONE_LINE.fullmatch(ran.stderr) and f"127.0.0.1:{port}" in ran.stderr and "--port" in ran.stderr
    kept = place.run("key", "list", "--json")
    assert json.loads(kept.stdout) == [], "a first key was made that nobody was shown"


def test_the_first_start_prints_a_key_what_to_paste_and_what_was_looked_for(place: Place) -> None:
    gateway = Gateway(arguments=["--port", "0"])
    gateway.key = "not asked for"       # so that start() makes none
    try:
        gateway.start()
        assert wait_for(lambda: "-d '{" in gateway.printed)
        printed, address = gateway.printed, gateway.url
        [key] = set(KEY.findall(printed))
        for words in (f"listening on {address}", "It is shown only now", f"ANTHROPIC_BASE_URL={address} ANTHROPIC_AUTH_TOKEN={key} ANTHROPIC_MODEL=aicarousel",
                      "~/.codex/config.toml", f'base_url = "{address}/v1"', 'wire_api = "responses"', "Cline:", f"base URL {address}/v1",
                      f"curl -N {address}/v1/chat/completions -H 'Authorization: Bearer {key}'", "GROQ_API_KEY", "GEMINI_API_KEY", str(gateway.home / ".env"), "serve --demo"):
            assert words in printed, words
        assert gateway.get("/health?deep=1", key=key).status == 200
        assert key not in gateway.log
        gateway.stop()
        gateway.start()
        assert KEY.search(gateway.printed) is None, "the second start makes and shows none"
        assert [row["name"] for row in json.loads(gateway.command("key", "list", "--json").stdout)] == ["first"]
    finally:
        gateway.remove()


def test_the_models_json_that_comes_along_does_not_hide_that_keys_are_missing(gateway_factory: Callable[..., Gateway]) -> None:
    gateway = gateway_factory(json.loads((ROOT / "models.json").read_text()))
    assert wait_for(lambda: "GROQ_API_KEY" in gateway.printed and str(gateway.home / ".env") in gateway.printed, 3.0), "a local server that needs no key is no provider key"


def test_a_key_in_env_takes_part_while_the_server_runs(gateway_factory: Callable[..., Gateway], provider: Provider) -> None:
    gateway = gateway_factory({"late": entry(provider.script("late", healthy("late")), keys=["env:LATE_KEY"])})
    assert gateway.chat("late/m").status != 200
    write_private(gateway.home / ".env", f"LATE_KEY={FAKE_KEY}\n")
    assert wait_for(lambda: gateway.chat("late/m").status == 200, 4.0)
    assert provider.calls("late")[0].headers["authorization"] == f"Bearer {FAKE_KEY}"


def test_demo_answers_streamed_and_whole(demo: Gateway) -> None:
    whole, streamed = demo.chat("aicarousel"), demo.chat("demo", stream=True)
    assert whole.status == streamed.status == 200 and streamed.done and streamed.complete
    assert whole.text == streamed.text == aicarousel.Demo.ANSWER and len(streamed.chunks) > 20
    assert whole.headers["x-aicarousel-provider"] == "demo"
    [model] = aicarousel.load_config(None, models_path="", environment={}, dotenv={}, flags={"demo": True, "demo_url": "http://127.0.0.1:9/v1"}).active[0].models
    assert model.price == aicarousel.Price(0.0, 0.0, 0.0, 0.0), "it costs nothing, which is no unknown cost"


def test_demo_and_a_provider_of_that_name(place: Place) -> None:
    place.write_models({"demo": entry("http://127.0.0.1:9/v1", keys=[])})
    ran = place.run("serve", "--demo", "--port", "0")
    assert ran.returncode == 2 and 'a provider named "demo"' in ran.stderr


def test_no_auth_is_warned_of_and_asks_no_key(gateway_factory: Callable[..., Gateway]) -> None:
    gateway = gateway_factory(arguments=["--demo", "--no-auth"])
    assert wait_for(lambda: "warning: --no-auth" in gateway.printed)
    reply = gateway.post("/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}]}, key="")
    assert reply.status == 200


def test_cors_origin_lets_its_pages_in_and_no_others(gateway_factory: Callable[..., Gateway]) -> None:
    gateway = gateway_factory(arguments=["--demo", "--cors-origin", "https://app.example", "--cors-origin", "https://two.example"])
    for origin in ("https://app.example", "https://two.example"):
        reply = gateway.request("GET", "/v1/models", headers={"origin": origin})
        assert reply.status == 200 and reply.headers["access-control-allow-origin"] == origin
    assert gateway.request("GET", "/v1/models", headers={"origin": "https://other.example"}).status == 403
    preflight = gateway.request("OPTIONS", "/v1/chat/completions", headers={"origin": "https://app.example", "access-control-request-method": "POST"}, key="")
    assert preflight.status == 204 and "POST" in preflight.headers["access-control-allow-methods"]


@pytest.mark.parametrize("place_of_level", ["flag", "environment", ".env"])
def test_log_level_by_flag_environment_and_env_file(gateway_factory: Callable[..., Gateway], place_of_level: str) -> None:
    settings = {"flag": {"arguments": ["--demo", "--log-level", "error"]},
                "environment": {"arguments": ["--demo"], "environment": {"AICAROUSEL_LOG_LEVEL": "error"}},
                ".env": {"arguments": ["--demo"], "env_file": {"AICAROUSEL_LOG_LEVEL": "error"}}}
    gateway = gateway_factory(**settings[place_of_level])
    assert gateway.chat().status == 200 and gateway.stop() == 0
    assert gateway.log == "", "at level error an ordinary run logs nothing"


def test_the_usual_log_is_a_line_per_request_without_secrets(gateway_factory: Callable[..., Gateway]) -> None:
    gateway = gateway_factory(arguments=["--demo"])
    gateway.chat("demo", "the words of a client")
    assert gateway.stop() == 0
    [line] = [line for line in gateway.log.splitlines() if " req=" in line]
    assert re.search(r"INFO aicarousel\.relay req=\w+ key=test model=demo route=demo/1:demo attempts=1 status=200 outcome=ok in=\d+ out=\d+ first_ms=\d+ total_ms=\d+$", line)
    assert gateway.key not in gateway.log and "the words of a client" not in gateway.log


@pytest.mark.parametrize("start", [["-m", "aicarousel"], ["renamed.py"]], ids=["module", "renamed"])
def test_other_ways_to_start_it(place: Place, start: list[str]) -> None:
    shutil.copy(PROGRAM, place.folder / ("aicarousel.py" if start[0] == "-m" else start[0]))
    process = subprocess.Popen([sys.executable, "-u", *start, "serve", "--home", str(place.home), "--port", "0", "--demo"], env=place.environment, cwd=place.folder,
                               stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout and process.stderr
        line = process.stdout.readline()
        assert line.startswith(f"AICarousel {aicarousel.__version__} listening on"), line or process.stderr.read()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_right_after_the_first_line_is_heard(name: str) -> None:
    gateway = Gateway(arguments=["--demo"])
    try:
        gateway.start()
        os.kill(gateway.pid, getattr(signal, name))
        assert gateway.process is not None and gateway.process.wait(10) == 0
    finally:
        gateway.remove()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_signals_end_it_with_status_0_after_the_answer_under_way(gateway_factory: Callable[..., Gateway], provider: Provider, name: str) -> None:
    from fakes import Pause, opened
    frames = chat_stream(*pieces("Hello there"))
    provider.script("slow", [*opened(*frames[:2]), Pause(name), *stream(*frames[2:])[1:]])
    gateway = gateway_factory({"slow": entry(provider.url("slow"), keys=[])})
    with gateway.start_chat("slow/m") as client:
        client.read_until(b"Hel")
        os.kill(gateway.pid, getattr(signal, name))
        assert wait_for(lambda: "draining connections=1" in gateway.log)
        provider.release(name)
        reply = client.read_all()
    assert reply.text == "Hello there" and reply.done and reply.complete
    assert gateway.process is not None and gateway.process.wait(10) == 0


def test_reload_starts_again_when_the_program_changes(tmp_path: Path) -> None:
    program = tmp_path / "program" / "aicarousel.py"
    program.parent.mkdir()
    shutil.copy(PROGRAM, program)
    gateway = Gateway(arguments=["--demo", "--reload"], program=program)
    with gateway:
        pid = gateway.pid
        assert gateway.chat().status == 200
        draft = program.with_suffix(".draft")
        draft.write_text(program.read_text(encoding="utf-8").replace(f'__version__ = "{aicarousel.__version__}"', '__version__ = "9.9.9"'), encoding="utf-8")
        draft.replace(program)
        assert wait_for(lambda: re.search(r"AICarousel 9\.9\.9 listening on http://127\.0\.0\.1:\d+\n", gateway.printed))
        gateway.port = int(re.findall(r"listening on http://127\.0\.0\.1:(\d+)", gateway.printed)[-1])
        assert gateway.get("/health").json["version"] == "9.9.9" and gateway.chat().status == 200, "the key still works"
        assert gateway.pid == pid and gateway.stop() == 0


def test_without_reload_a_changed_program_changes_nothing(tmp_path: Path) -> None:
    program = tmp_path / "program" / "aicarousel.py"
    program.parent.mkdir()
    shutil.copy(PROGRAM, program)
    with Gateway(arguments=["--demo"], program=program) as gateway:
        program.touch()
        write_private(gateway.home / ".env", "UNRELATED=1\n")
        assert wait_for(lambda: "reloaded" in gateway.log), "a look at the files has passed"
        assert gateway.printed.count("listening on") == 1 and gateway.chat().status == 200


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """(certificate, key) for 127.0.0.1, signed by itself."""
    crypto = pytest.importorskip("cryptography", reason="cryptography is not installed: python -m pip install cryptography")
    import datetime
    import ipaddress
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    assert crypto
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.datetime.now(datetime.timezone.utc)
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "aicarousel test")])
    made = (x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key()).serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), True).sign(key, hashes.SHA256()))
    (folder / "cert.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    (folder / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    return folder / "cert.pem", folder / "key.pem"


def test_tls_toward_clients(tmp_path: Path, gateway_factory: Callable[..., Gateway]) -> None:
    certificate, key = make_certificate(tmp_path)
    gateway = gateway_factory(arguments=["--demo", "--tls-cert", str(certificate), "--tls-key", str(key)])
    assert f"listening on https://127.0.0.1:{gateway.port}" in gateway.printed
    context = ssl.create_default_context(cafile=str(certificate))
    with socket.create_connection(("127.0.0.1", gateway.port), HANG_S) as plain, context.wrap_socket(plain, server_hostname="127.0.0.1") as secure:
        secure.sendall(gateway.request_bytes("POST", "/v1/chat/completions", {"messages": [{"role": "user", "content": "Hi"}], "stream": True}))
        raw = b"".join(iter(lambda: secure.recv(65536), b""))
    assert raw.startswith(b"HTTP/1.1 200 ") and b"data: [DONE]" in raw
    assert gateway.get("/health").status == 0, "plain HTTP gets no answer there"


def test_a_certificate_that_does_not_fit_its_key(tmp_path: Path, place: Place) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        make_certificate(tmp_path / name)
    ran = place.run("serve", "--port", "0", "--tls-cert", str(tmp_path / "a" / "cert.pem"), "--tls-key", str(tmp_path / "b" / "key.pem"))
    assert ran.returncode == 2 and ONE_LINE.fullmatch(ran.stderr) and "PEM certificate chain" in ran.stderr


WRAPPER = """import sys
def note(event, arguments):
    if event in ("socket.connect", "socket.sendto", "socket.getaddrinfo", "socket.gethostbyname", "subprocess.Popen", "os.system"):
        with open({log!r}, "a") as log:
            log.write(event + " " + repr(arguments[1:] if event.startswith(("socket.c", "socket.s")) else arguments) + "\\n")
sys.addaudithook(note)
sys.path.insert(0, {folder!r})
import aicarousel       # as a module: a script would start itself once more, without the hook
raise SystemExit(aicarousel.main())
"""


def test_only_configured_providers_are_ever_connected_to(tmp_path: Path, provider: Provider) -> None:
    """An audit hook in the gateway's own process notes every connection, name look-up and program started."""
    log, wrapper = tmp_path / "connections", tmp_path / "wrapper.py"
    wrapper.write_text(WRAPPER.format(log=str(log), folder=str(ROOT)))
    models = {"first": entry(provider.script("first", answer({"error": {"message": "overloaded"}}, 503)), keys=["env:FIRST_KEY"]),
              "second": entry(provider.script("second", healthy()), keys=[])}
    with Gateway(models, env_file={"FIRST_KEY": FAKE_KEY}, program=wrapper) as gateway:
        for streamed in (False, True):
            assert gateway.chat("aicarousel", "see http://localhost:1/ and fetch it", stream=streamed).status == 200
        for path in ("/", "/health", "/v1/models", "/nothing"):
            gateway.get(path)
        body = [{"type": "image_url", "image_url": {"url": "http://127.0.0.1:1/picture.png"}}]
        gateway.post("/v1/chat/completions", {"messages": [{"role": "user", "content": body}], "api_base": "http://127.0.0.1:1/v1"})
        gateway.write_models(models)        # a reload asks nobody either
        assert wait_for(lambda: "reloaded" in gateway.log) and gateway.stop() == 0
    port = provider.base.rpartition(":")[2]
    seen = [line for line in log.read_text().splitlines() if "socket.getaddrinfo" not in line or "127.0.0.1" not in line]
    assert seen and all(line == f"socket.connect (('127.0.0.1', {port}),)" for line in seen), seen


def test_without_providers_nothing_is_connected_to(tmp_path: Path) -> None:
    log, wrapper = tmp_path / "connections", tmp_path / "wrapper.py"
    wrapper.write_text(WRAPPER.format(log=str(log), folder=str(ROOT)))
    with Gateway(program=wrapper) as gateway:
        assert gateway.chat().status == 503 and gateway.get("/v1/models").status == 200
        assert gateway.stop() == 0
    assert not [line for line in log.read_text().splitlines() if "127.0.0.1" not in line] if log.exists() else True


def test_files_are_for_the_owner_alone(tmp_path: Path) -> None:
    """Whatever the umask: files 0600, folders that are made 0700."""
    home = tmp_path / "new" / "home"
    gateway = Gateway(arguments=["--demo"])
    gateway.home, before = home, os.umask(0o000)
    try:
        with gateway:
            gateway.chat()
            made = [tmp_path / "new", home, *home.rglob("*")]
            modes = {path.relative_to(tmp_path).as_posix(): stat.S_IMODE(path.stat().st_mode) for path in made}
            gateway.stop()
        gateway.home = home
    finally:
        os.umask(before)
    assert {"new/home/data/aicarousel.db", "new/home/data/keys.epoch"} <= set(modes)
    assert {name: oct(mode) for name, mode in modes.items() if mode not in (0o600, 0o700)} == {}
    assert {name for name, mode in modes.items() if mode == 0o700} == {"new", "new/home", "new/home/data"}


# ---------------------------------------------------------------- where home is

def described_home(place: Place, program: Path, *words: str, **environment: str) -> tuple[str, str]:
    """(folder of models.json, folder of the database), as status tells."""
    place.run("key", "create", *words, program=program, home=False, environment=environment)
    shown = json.loads(place.run("status", "--json", *words, program=program, home=False, environment=environment).stdout)
    databases = [path for path in place.folder.rglob("aicarousel.db")]
    assert len(databases) == 1
    return shown["home"], str(databases[0].parent)


def test_home_by_flag_variable_program_folder_and_xdg(tmp_path: Path) -> None:
    for case in ("flag", "variable", "program", "xdg"):
        place = Place(tmp_path / case)
        program = place.folder / "program" / "aicarousel.py"
        program.parent.mkdir(parents=True)
        shutil.copy(PROGRAM, program)
        if case != "xdg":
            (program.parent / "models.json").write_text(json.dumps({"groq": {"default": "m", "enableFallback": False, "models": ["m"]}}))
        variable = {"AICAROUSEL_HOME": str(place.folder / "by-variable")} if case in ("flag", "variable") else {}
        flag = ["--home", str(place.folder / "by-flag")] if case == "flag" else []
        home, data = described_home(place, program, *flag, **variable)
        xdg = (str(place.folder / "config" / "aicarousel"), str(place.folder / "data" / "aicarousel"))
        wanted = {"flag": place.folder / "by-flag", "variable": place.folder / "by-variable", "program": program.parent}.get(case)
        assert (home, data) == ((str(wanted), str(wanted / "data")) if wanted else xdg), case


def test_xdg_defaults_lie_in_the_users_home(tmp_path: Path) -> None:
    place = Place(tmp_path)
    program = tmp_path / "program" / "aicarousel.py"
    program.parent.mkdir()
    shutil.copy(PROGRAM, program)
    place.environment = {name: value for name, value in place.environment.items() if not name.startswith("XDG_")}
    assert described_home(place, program) == (str(tmp_path / ".config" / "aicarousel"), str(tmp_path / ".local" / "share" / "aicarousel"))


# ---------------------------------------------------------------- key

def test_key_create_prints_the_key_once_and_stores_its_hash(place: Place) -> None:
    made = place.run("key", "create", "laptop")
    assert made.returncode == 0 and made.stderr == ""
    first, second = made.stdout.splitlines()
    assert KEY.fullmatch(first) and second == "(id 1, name laptop; it is shown only now)"
    assert all(first.encode() not in path.read_bytes() for path in place.home.rglob("*") if path.is_file())


@pytest.mark.parametrize("length", [32, 63, 64, 128])
def test_key_create_json_and_length(place: Place, length: int) -> None:
    made = json.loads(place.run("key", "create", "ci", "--length", str(length), "--json").stdout)
    assert set(made) == {"id", "name", "key"} and (made["id"], made["name"]) == (1, "ci")
    assert re.fullmatch(rf"sk-[0-9a-f]{{{length}}}", made["key"])


def test_key_list_revoke_delete(place: Place) -> None:
    keys = [json.loads(place.run("key", "create", name, "--json").stdout)["key"] for name in ("one", "two")]
    assert place.run("key", "create").returncode == 0, "the name may be left out"
    assert (revoked := place.run("key", "revoke", "1")).returncode == 0 and revoked.stdout == "key 1 revoked\n"
    assert json.loads(place.run("key", "delete", "2", "--json").stdout) == {"id": 2, "done": True}
    rows = json.loads(place.run("key", "list", "--json").stdout)
    assert [(row["id"], row["name"], row["active"], row["usage"]) for row in rows] == [(1, "one", False, 0), (3, "default", True, 0)]
    assert set(rows[0]) == {"id", "prefix", "name", "created", "last_used", "active", "usage", "admin", "expires", "limits"} and rows[0]["prefix"] == f"{keys[0][:7]}..."
    table = place.run("key", "list").stdout.splitlines()
    assert table[0].split() == ["id", "prefix", "name", "created", "last_used", "active", "usage"] and len(table) == 3 and " no " in table[1], "columns that are empty are left out"
    assert not any(key in line for key in keys for line in table)
    missing = place.run("key", "delete", "2", "--json")
    assert missing.returncode == 1 and json.loads(missing.stdout) == {"id": 2, "done": False}


def test_keys_count_at_once_in_a_running_server(demo: Gateway) -> None:
    key = demo.create_key("brief")
    assert demo.get("/health?deep=1", key=key).status == 200
    number = json.loads(demo.command("key", "list", "--json").stdout)[-1]["id"]
    assert demo.command("key", "revoke", str(number)).returncode == 0
    assert demo.get("/health?deep=1", key=key).status == 401


# ---------------------------------------------------------------- status

def test_status_of_a_fresh_machine(place: Place) -> None:
    ran = place.run("status", environment={"PORT": "9"})
    assert ran.returncode == 0 and ran.stderr == ""
    for words in (f"AICarousel {aicarousel.__version__}", f"home      {place.home}", "no models.json", "not made yet", "not running on port 9", "GROQ_API_KEY"):
        assert words in ran.stdout, words


def test_status_json_tells_providers_database_and_server(gateway_factory: Callable[..., Gateway], provider: Provider) -> None:
    models = {"good": entry(provider.script("good", healthy()), keys=["env:GOOD_KEY"]), "keyless": entry(provider.url("good"), keys=[]),
              "lacking": entry(provider.url("good"), keys=["env:NEVER_SET"]), "off": entry(provider.url("good"), enabled=False)}
    gateway = gateway_factory(models, env_file={"GOOD_KEY": FAKE_KEY})
    assert gateway.chat("good/m").status == 200
    gateway.environment["PORT"] = str(gateway.port)

    def look() -> Json:
        return json.loads(gateway.command("status", "--json").stdout)

    assert wait_for(lambda: look()["database"]["requests"] == 1, 5.0)
    shown = look()
    assert {row["name"]: row["state"] for row in shown["providers"]} == {"good": "active", "keyless": "active", "lacking": "out", "off": "out"}
    assert "NEVER_SET" in next(row["why"] for row in shown["providers"] if row["name"] == "lacking")
    assert shown["server"] == f"running on port {gateway.port}" and shown["database"]["keys_active"] == 1 and shown["version"] == aicarousel.__version__
    text = gateway.command("status")
    assert text.returncode == 0 and "requests  1, 1 today" in text.stdout and FAKE_KEY not in text.stdout + json.dumps(shown)
    assert len(provider.calls("good")) == 1, "status asks no provider"


def test_status_tells_what_cools_in_the_gateway_that_runs(gateway_factory: Callable[..., Gateway], provider: Provider) -> None:
    """Also when it runs at another port than configured; nothing is left of the key that asks."""
    gateway = gateway_factory({"bad": entry(provider.script("bad", answer({"error": {"message": "no"}}, 401)), keys=["env:BAD_KEY"]), "good": entry(provider.script("good", healthy()), keys=[])},
                              env_file={"BAD_KEY": FAKE_KEY})
    assert gateway.chat("bad").status == 200
    shown = json.loads(gateway.command("status", "--json").stdout)
    assert [(row["name"], row["state"], [cold["reason"] for cold in row["cooling"]]) for row in shown["providers"]] == [("bad", "cooling", ["auth_invalid"]), ("good", "active", [])]
    assert shown["server"] == f"running on port {gateway.port}" and shown["servers"][0]["pid"] == gateway.pid
    text = gateway.command("status").stdout
    assert "  bad              cooling  1 model, 1 key\n    credential bad/1: auth_invalid, " in text and FAKE_KEY not in text
    assert json.loads(gateway.command("key", "list", "--json").stdout)[0]["name"] == "test" and len(json.loads(gateway.command("key", "list", "--json").stdout)) == 1
    assert gateway.command("call", "Hi", "-m", "good/m", "-k", gateway.key).returncode == 0, "a gateway that runs is found without --server"


def test_a_terminal_gets_its_width_and_colours_unless_they_are_not_wanted(gateway_factory: Callable[..., Gateway], provider: Provider) -> None:
    from terminal import Terminal
    gateway = gateway_factory({"p" * 20: entry(provider.script("bad", answer({"error": {"message": "no"}}, 401)), keys=["env:BAD_KEY"]), "good": entry(provider.script("good", healthy()), keys=[]),
                               "lacking": entry(provider.url("x"), keys=["env:A_VARIABLE_THAT_NOBODY_EVER_SET", "env:AND_ANOTHER_ONE_THAT_NOBODY_EVER_SET"])}, env_file={"BAD_KEY": FAKE_KEY})
    gateway.command("key", "create", "agent", "--rpm", "60", "--usd-per-day", "2", "--models", "groq/*,gpt-6-*", "--expires", "30d")
    assert gateway.chat("good").status == 200 and wait_for(lambda: "good" in gateway.command("stats").stdout)
    coloured = 0
    for words in (["status"], ["key", "list"], ["provider", "list"], ["quota"], ["explain", "--last"], ["route", "list"], ["stats"], ["model", "list"]):
        plain = gateway.command(*words).stdout
        for unwanted in ({}, {"NO_COLOR": "1"}):
            with Terminal([*invocation(PROGRAM), *words, "--home", str(gateway.home)], gateway.environment | unwanted, gateway.folder) as it:
                assert it.end() == 0
                lines = it.transcript.splitlines()
                assert max(len(line) for line in lines if str(gateway.folder) not in line) <= 80, (words, it.transcript)
                assert not unwanted or not it.n_colours
                coloured += it.n_colours
                assert "\x1b" not in plain
                if words in (["key", "list"], ["provider", "list"], ["model", "list"]):
                    assert "".join(it.transcript.split()) == "".join(plain.split()), "nothing is lost by the width"
    assert coloured >= 4


# ---------------------------------------------------------------- call

@pytest.mark.parametrize("streamed", [[], ["--stream"]], ids=["whole", "streamed"])
def test_call(demo: Gateway, streamed: list[str]) -> None:
    ran = demo.command("call", "Hello", "--server", demo.url, "--key", demo.key, *streamed)
    assert ran.returncode == 0 and ran.stdout == aicarousel.Demo.ANSWER + "\n"
    assert re.fullmatch(r"provider=demo model=demo attempts=1 in=\d+ out=\d+\n", ran.stderr)


def test_call_passes_on_its_options_and_finds_key_and_port_by_itself(gateway_factory: Callable[..., Gateway], provider: Provider) -> None:
    gateway = gateway_factory({"p": entry(provider.script("p", healthy("Good.")), keys=[])})
    gateway.environment |= {"AICAROUSEL_KEY": gateway.key, "PORT": str(gateway.port)}
    ran = gateway.command("call", "Hi", "-m", "p/m", "-t", "0.5", "--max-tok", "7", "-s", "Be short.")
    assert (ran.returncode, ran.stdout) == (0, "Good.\n")
    asked = provider.calls("p")[0].json
    assert asked["messages"] == [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    assert (asked["model"], asked["temperature"], asked["max_tokens"], asked["stream"]) == ("m", 0.5, 7, False)


@pytest.mark.parametrize("streamed", [[], ["--stream"]], ids=["whole", "streamed"])
def test_call_with_a_wrong_key(demo: Gateway, streamed: list[str]) -> None:
    ran = demo.command("call", "Hello", "--server", f"{demo.url}/v1", "-k", "sk-wrong", *streamed)
    assert (ran.returncode, ran.stdout) == (1, "") and aicarousel.INVALID_KEY in ran.stderr
    ran = demo.command("call", "Hello", "--server", demo.url, *streamed)
    assert ran.returncode == 1 and "Missing API key" in ran.stderr


def test_call_where_nothing_listens(place: Place) -> None:
    ran = place.run("call", "Hello", environment={"PORT": "9"})
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.count("\n") == 1 and "127.0.0.1:9" in ran.stderr and "aicarousel.py serve" in ran.stderr


BROKEN_SERVERS = [
    ("html", answer(b"<html><h1>502 Bad Gateway</h1></html>", 502, [("content-type", "text/html")])),
    ("html-200", answer(b"<html>welcome</html>", 200, [("content-type", "text/html")])),
    ("empty", answer(b"", 500)),
    ("other-json", answer({"detail": "nothing here"}, 404)),
    ("list", answer([1], 200)),
    ("cut-stream", [Head(200, [("content-type", "text/event-stream"), ("content-length", "9999")]), *chat_stream("Hello")[:2]]),
]


@pytest.mark.parametrize("streamed", [[], ["--stream"]], ids=["whole", "streamed"])
@pytest.mark.parametrize("name,steps", BROKEN_SERVERS, ids=[name for name, _ in BROKEN_SERVERS])
def test_call_to_something_that_is_no_gateway(place: Place, provider: Provider, name: str, steps: list[Any], streamed: list[str]) -> None:
    from fakes import Close
    url = provider.listen(name, [*steps, Close()])
    ran = place.run("call", "Hello", "--server", url.removesuffix("/v1"), *streamed)
    assert ran.returncode == 1 and ran.stderr and "Traceback" not in ran.stderr


def test_call_of_a_stream_that_breaks_is_status_1(gateway_factory: Callable[..., Gateway], provider: Provider) -> None:
    from fakes import Close, opened
    gateway = gateway_factory({"p": entry(provider.script("p", [*opened(*chat_stream("Half an")[:2]), Close()]), keys=[])})
    ran = gateway.command("call", "Hi", "-m", "p/m", "--server", gateway.url, "-k", gateway.key, "--stream")
    assert ran.returncode == 1 and ran.stdout.startswith("Half an") and "cut" in ran.stderr


def test_call_prints_a_tool_call_that_has_no_text(gateway_factory: Callable[..., Gateway], provider: Provider) -> None:
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": "{}"}}
    gateway = gateway_factory({"p": entry(provider.script("p", answer(chat_answer(None, tool_calls=[call]))), keys=[])})
    ran = gateway.command("call", "Hi", "-m", "p/m", "--server", gateway.url, "-k", gateway.key)
    assert ran.returncode == 0 and "weather" in ran.stdout


@pytest.mark.parametrize("streamed", [[], ["--stream"]], ids=["whole", "streamed"])
@pytest.mark.parametrize("name,client", [("messages", "messages"), ("anthropic", "messages"), ("responses", "responses"), ("openai", "chat")])
def test_call_in_every_format(demo: Gateway, streamed: list[str], name: str, client: str) -> None:
    ran = demo.command("call", "Hello", "--server", demo.url, "--key", demo.key, "--format", name, "-s", "Be short.", "--max-tok", "99", *streamed)
    assert ran.returncode == 0 and ran.stdout == aicarousel.Demo.ANSWER + "\n", ran.stderr
    assert re.fullmatch(r"provider=demo model=demo attempts=1 in=\d+ out=\d+\n", ran.stderr)
    assert f": {client}{' streamed' if streamed else ''}, model aicarousel" in demo.command("explain", "--last", "--server", demo.url).stdout
    wrong = demo.command("call", "Hello", "--server", demo.url, "--key", "sk-wrong", "--format", name, *streamed)
    assert wrong.returncode == 1 and aicarousel.INVALID_KEY in wrong.stderr


# ---------------------------------------------------------------- stop, info

def test_info_and_stop(gateway_factory: Callable[..., Gateway], provider: Provider) -> None:
    """The server is found by its home, stops once the answer under way is whole, and is gone from then on."""
    from fakes import Pause
    gateway = gateway_factory({"p": entry(provider.script("p", stream(*chat_stream("Hel")[:-1], Pause("stop"), *chat_stream("lo"))), keys=[])})
    told = json.loads(gateway.command("info", "--json").stdout)["servers"]
    assert [(row["pid"], row["port"], row["address"], row["answers"]) for row in told] == [(gateway.pid, gateway.port, gateway.url, True)]
    assert gateway.url in gateway.command("info").stdout and oct((gateway.home / "data" / f"serve-{gateway.port}.pid").stat().st_mode)[-3:] == "600"
    client = gateway.start_chat("p/m")
    provider.wait_paused("stop")
    stopping = subprocess.Popen([*invocation(PROGRAM), "stop", "--home", str(gateway.home)], env=gateway.environment, stdout=subprocess.PIPE, text=True)
    assert wait_for(lambda: "draining" in gateway.log)
    assert stopping.poll() is None
    provider.release("stop")
    assert client.read_all().done and stopping.communicate(timeout=HANG_S)[0] == f"stopped: {gateway.url}\n" and stopping.returncode == 0
    assert gateway.process is not None and gateway.process.wait(HANG_S) == 0 and not list((gateway.home / "data").glob("*.pid"))
    for command, words in (("info", "no gateway runs with this home"), ("stop", "no gateway runs with this home")):
        ran = gateway.command(command)
        assert ran.returncode == 1 and words in ran.stdout + ran.stderr


def test_a_pid_file_left_over_stops_nobody(place: Place) -> None:
    """A crash leaves the file; its pid may be anybody's by now."""
    (place.home / "data").mkdir(parents=True)
    sleeper = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    write_private(place.home / "data" / "serve-7123.pid", json.dumps({"pid": sleeper.pid, "port": 7123, "address": "http://127.0.0.1:7123", "version": "0", "started": ""}))
    assert place.run("stop").returncode == 1 and place.run("info", "--json").stdout == '{\n "servers": []\n}\n'
    assert sleeper.poll() is None
    sleeper.communicate(b"\n")


def test_stop_of_a_server_that_does_not_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    row = {"pid": os.getpid(), "address": "http://127.0.0.1:9", "port": 9, "version": "0", "started": ""}
    killed: list[Any] = []
    monkeypatch.setattr(aicarousel, "find_servers", lambda home: [row])
    monkeypatch.setattr(os, "kill", lambda pid, sign: killed.append((pid, sign)))
    monkeypatch.setattr(aicarousel, "STOPPED_S", 0.1)
    monkeypatch.setattr(aicarousel, "PATIENCE_S", 0.0)
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    assert aicarousel.main(["stop", "--home", str(tmp_path)]) == 1 and killed == [(os.getpid(), signal.SIGTERM)]
    assert capsys.readouterr().err.splitlines() == ["waiting for the answers under way ...", "it is told to stop, and still waits for answers under way (python aicarousel.py info)"]

    def refuse(pid: int, sign: int) -> None:
        raise PermissionError(1, "Operation not permitted")
    monkeypatch.setattr(os, "kill", refuse)
    assert aicarousel.main(["stop", "--home", str(tmp_path)]) == 1 and "cannot be stopped: Operation not permitted" in capsys.readouterr().err


# ---------------------------------------------------------------- db

def test_db_migrate_and_rollback(place: Place) -> None:
    assert (fresh := place.run("db", "migrate")).returncode == 0 and fresh.stdout == "made a new database\n"
    assert place.run("db", "migrate").stdout == "nothing to do\n"
    key = json.loads(place.run("key", "create", "kept", "--json").stdout)["key"]
    undone = []
    while (ran := place.run("db", "rollback")).returncode == 0:
        undone.append(ran.stdout.strip())
        assert len(undone) < 20
    assert undone == [f"rolled back: {migration.name}" for migration in reversed(aicarousel._MIGRATIONS)]
    assert (ran.returncode, ran.stdout) == (1, "nothing to roll back\n")
    again = place.run("db", "migrate")
    assert again.returncode == 0 and again.stdout.split() == [migration.name for migration in aicarousel._MIGRATIONS]
    assert [row["name"] for row in json.loads(place.run("key", "list", "--json").stdout)] == ["kept"] and key
    backups = sorted((place.home / "data").glob("aicarousel-backup-*.db"))
    assert len(backups) >= 3 and all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in backups)


def test_a_database_that_is_none(place: Place) -> None:
    (place.home / "data").mkdir(parents=True)
    (place.home / "data" / "aicarousel.db").write_text("no database at all, but long enough to be taken for one" * 20)
    for words in (["key", "create"], ["key", "list"], ["db", "migrate"], ["db", "rollback"], ["status"]):
        ran = place.run(*words)
        assert ran.returncode == 2 and ONE_LINE.fullmatch(ran.stderr) and "aicarousel.db" in ran.stderr, (words, ran.stderr)


# ---------------------------------------------------------------- config show

def shown_config(place: Place, **environment: str) -> dict[str, tuple[Any, str]]:
    ran = place.run("config", "show", "--origin", "--json", environment=environment)
    assert ran.returncode == 0, ran.stderr
    return {row["name"]: (row["value"], row["origin"]) for row in json.loads(ran.stdout)}


@pytest.fixture
def configured(place: Place) -> Place:
    place.write_models({"groq": {"baseUrl": "https://groq.example/v1", "default": "a", "enableFallback": True, "models": ["a", {"id": "b", "context": 9}], "timeouts": {"idle": 5}},
                        "my-vllm": entry("http://127.0.0.1:8000/v1"), "carousel": {"maxAttempts": 3, "maxWait": 1, "limits": {"drain": 90, "bodyBytes": 2048},
                                                                           "aliases": {"fast": "groq"}}})
    place.write_env(f"PORT=8001\nAICAROUSEL_ALLOWED_HOSTS=lan.example\nGROQ_API_KEY={FAKE_KEY}\nMY_VLLM_MODEL=other\n")
    return place


CONFIG_ROWS = [
    ("settings.host", "127.0.0.1", "default"),
    ("settings.port", 8001, ".env PORT"),
    ("settings.allowed_hosts", ["lan.example"], ".env AICAROUSEL_ALLOWED_HOSTS"),
    ("settings.log_level", "warning", "environment AICAROUSEL_LOG_LEVEL"),
    ("settings.api_keys", "set, not shown", "environment API_KEYS"),
    ("settings.https_proxy", "set, not shown", "environment HTTPS_PROXY"),
    ("carousel.max_attempts", 3, "models.json carousel.maxAttempts"),
    ("carousel.max_wait_s", 1.0, "models.json carousel.maxWait"),
    ("carousel.aliases", {"fast": ["groq"]}, "models.json carousel.aliases"),
    ("carousel.strategy", "round-robin", "default"),
    ("carousel.limits.drain_s", 90.0, "models.json carousel.limits.drain"),
    ("carousel.limits.body_bytes", 2048, "models.json carousel.limits.bodyBytes"),
    ("carousel.limits.client_idle_s", 120.0, "default"),
    ("groq.timeouts.idle_s", 5.0, "models.json groq.timeouts.idle"),
    ("groq.timeouts.first_byte_s", 30.0, "built in"),
    ("my-vllm.timeouts.idle_s", 90.0, "default"),
    ("groq.base_url", "https://other.example/v1", "environment GROQ_BASE_URL"),
    ("groq.default", "a", "models.json groq.default"),
    ("groq.enable_fallback", True, "models.json groq.enableFallback"),
    ("groq.models", ["a", "b"], "models.json groq.models"),
    ("groq.enabled", False, "environment GROQ_ENABLED"),
    ("groq.keys", ["env:GROQ_API_KEY"], ".env GROQ_API_KEY"),
    ("groq.format", "chat", "default"),
    ("my-vllm.base_url", "http://127.0.0.1:8000/v1", "models.json my-vllm.baseUrl"),
    ("my-vllm.default", "other", ".env MY_VLLM_MODEL"),
    ("my-vllm.state", "takes part", "-"),
]


@pytest.mark.parametrize("name,value,origin", CONFIG_ROWS, ids=[row[0] for row in CONFIG_ROWS])
def test_config_show_tells_value_and_origin(configured: Place, name: str, value: Any, origin: str) -> None:
    shown = shown_config(configured, AICAROUSEL_LOG_LEVEL="warning", API_KEYS="a-gateway-key-of-mine", HTTPS_PROXY="http://user:hidden@proxy.example:3128",
                         GROQ_BASE_URL="https://other.example/v1", GROQ_ENABLED="false")
    assert shown[name] == (value, origin)


def test_config_show_prints_no_secret(configured: Place) -> None:
    secrets = {"API_KEYS": "a-gateway-key-of-mine", "HTTPS_PROXY": "http://user:hidden@proxy.example:3128"}
    for words in ([], ["--origin"], ["--json"], ["--origin", "--json"]):
        ran = configured.run("config", "show", *words, environment=secrets)
        assert ran.returncode == 0 and not [secret for secret in (FAKE_KEY, "a-gateway-key-of-mine", "hidden") if secret in ran.stdout + ran.stderr]


def test_config_show_without_origin_is_name_and_value(configured: Place) -> None:
    lines = configured.run("config", "show").stdout.splitlines()
    assert "settings.port = 8001" in lines and 'groq.models = ["a", "b"]' in lines and not [line for line in lines if "#" in line]


def test_a_flag_stands_above_the_environment(configured: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """Flags belong to serve, so this one is seen from inside."""
    monkeypatch.setenv("PORT", "8002")
    config = aicarousel.read_config(aicarousel.find_home(str(configured.home)), {"port": 8003})
    assert ("settings.port", 8003, "flag --port") in aicarousel.describe_config(config)
    config = aicarousel.read_config(aicarousel.find_home(str(configured.home)), {})
    assert ("settings.port", 8002, "environment PORT") in aicarousel.describe_config(config)


# ---------------------------------------------------------------- broken configuration

BROKEN_MODELS = [
    ('{"groq": {"default": "m", }}', "models.json: line 1 column 27: found invalid JSON"),
    ("[]", "models.json: found a list of 0; expected an object"),
    ("{}", "models.json: found an empty object; expected at least one provider"),
    ('{"groq": {"default": "m", "enableFallback": "yes", "models": ["m"]}}', 'models.json: groq.enableFallback: found string "yes"; expected true or false'),
    ('{"groq": {"default": "m", "enableFallback": true, "models": ["m"], "modles": []}}', 'groq.modles: found an unknown field; expected did you mean "models"?'),
    ('{"groq": {"default": "m", "enableFallback": true, "models": ["x"]}}', 'groq.default: found string "m"; expected a model of "models"'),
    ('{"qroq": {"default": "m", "enableFallback": true, "models": ["m"]}}', 'qroq.baseUrl: found nothing; expected "baseUrl"'),
    ('{"groq": {"default": "m", "enableFallback": true, "models": ["m"], "keys": ["gsk_abcdefghijklmnop"]}}', "groq.keys[0]: found a string, not shown here"),
    ('{"groq": {"default": "m", "enableFallback": true, "models": ["m"]}, "carousel": {"aliases": {"a": "b", "b": "a"}}}', "carousel.aliases.a: found a circle"),
]


BROKEN_FOR = [("status", *row) for row in BROKEN_MODELS] + [(command, *BROKEN_MODELS[3]) for command in ("serve --port 0", "config show", "call hi")]


@pytest.mark.parametrize("command,text,complaint", BROKEN_FOR, ids=[f"{command}-{complaint[:40]}" for command, _, complaint in BROKEN_FOR])
def test_a_broken_models_json_is_one_line(place: Place, command: str, text: str, complaint: str) -> None:
    path = place.write_models(text)
    ran = place.run(*command.split())
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ONE_LINE.fullmatch(ran.stderr) and complaint in ran.stderr and str(path) in ran.stderr, ran.stderr
    assert "gsk_abcdefghijklmnop" not in ran.stderr


def test_a_broken_env_file_is_one_line_without_its_text(place: Place) -> None:
    place.write_env("GROQ_API_KEY=good\nsecret words\n")
    ran = place.run("status")
    assert ran.returncode == 2 and ONE_LINE.fullmatch(ran.stderr) and ".env line 2" in ran.stderr and "secret words" not in ran.stderr


def test_keys_can_be_made_while_models_json_is_broken(place: Place) -> None:
    place.write_models("{")
    assert place.run("key", "create").returncode == 0 and place.run("db", "migrate").returncode == 0


def test_a_broken_edit_keeps_the_last_good_configuration(gateway_factory: Callable[..., Gateway], provider: Provider) -> None:
    gateway = gateway_factory({"p": entry(provider.script("p", healthy("good")), keys=[])})
    write_private(gateway.home / "models.json", '{"p": {"default": 7}}')
    assert wait_for(lambda: "kept the old configuration" in gateway.log, 4.0)
    assert re.search(r"kept the old configuration: \S+models\.json: p\.\w+: found .+; expected ", gateway.log)
    assert gateway.chat("p/m").text == "good"
    gateway.write_models({"q": entry(provider.script("q", healthy("new")), keys=[])})
    assert wait_for(lambda: "reloaded providers=q" in gateway.log, 4.0) and gateway.chat("q/m").text == "new"


def test_sighup_reads_the_configuration_again(gateway_factory: Callable[..., Gateway]) -> None:
    gateway = gateway_factory(arguments=["--demo"])
    os.kill(gateway.pid, signal.SIGHUP)
    assert wait_for(lambda: "reloaded providers=demo" in gateway.log, 4.0)


# ---------------------------------------------------------------- from inside

def test_serve_can_be_run_and_stopped_from_a_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import asyncio
    for name in ("XDG_CONFIG_HOME", "XDG_DATA_HOME", "HOME"):
        monkeypatch.setenv(name, str(tmp_path))
    seen: list[int] = []

    async def run() -> int:
        stop = asyncio.Event()

        def ready(gateway: Any, port: int) -> None:
            seen.append(port)
            stop.set()
        return await aicarousel.serve(aicarousel.find_home(str(tmp_path / "home")), {"port": 0, "demo": True}, stop=stop, ready=ready)

    assert asyncio.run(run()) == 0
    assert seen and f"listening on http://127.0.0.1:{seen[0]}" in capsys.readouterr().out


def test_main_returns_its_status(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = os.umask(0o022)
    try:
        assert aicarousel.main(["key", "revoke", "5", "--home", str(tmp_path)]) == 1
        assert aicarousel.main(["key", "create", "--length", "1", "--home", str(tmp_path)]) == 2
        assert aicarousel.main(["key", "create", "--home", str(tmp_path)]) == 0
    finally:
        os.umask(before)
    assert KEY.search(capsys.readouterr().out)


def test_output_into_a_closed_pipe_is_no_traceback(place: Place) -> None:
    ran = subprocess.run(["sh", "-c", f'"{sys.executable}" "{PROGRAM}" config show --home "{place.home}" | true'], env=place.environment, capture_output=True, text=True, timeout=30)
    assert "Traceback" not in ran.stderr
