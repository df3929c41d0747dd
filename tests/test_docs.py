"""README.md is run and held to the module: what it names exists, and what exists is named."""

from __future__ import annotations

import argparse
import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import aicarousel
from fakes import ROOT, Gateway

README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLE = (ROOT / ".env.example").read_text(encoding="utf-8")
SOURCE = (ROOT / "aicarousel.py").read_text(encoding="utf-8")
CODE = set(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", README, flags=re.S)))      #: what stands between backquotes
BLOCKS = [(match[1], match[2]) for match in re.finditer(r"^```(\w*)\n(.*?)^```$", README, re.M | re.S)]
SHELL = [line for kind, block in BLOCKS if kind == "sh" for line in block.splitlines() if line.strip()]
FIELDS = {"provider": aicarousel._PROVIDER_FIELDS, "model": aicarousel._MODEL_FIELDS, "key": aicarousel._KEY_FIELDS, "timeouts": aicarousel._TIMEOUT_FIELDS,
          "rule": aicarousel._RULE_FIELDS, "carousel": aicarousel._CAROUSEL_FIELDS, "price": aicarousel._PRICE_FIELDS}


def chapter(title: str) -> str:
    """The text under a heading, up to the next heading of its rank or a higher one."""
    match = re.search(rf"^(#+) {re.escape(title)}\n(.*?)(?=^#{{1,2}} |\Z)" if f"\n## {title}\n" in README else rf"^(#+) {re.escape(title)}\n(.*?)(?=^#{{1,3}} |\Z)", README, re.M | re.S)
    assert match, f"no heading {title}"
    return match[2]


# ---------------------------------------------------------------- its form

def test_headings_stand_in_the_agreed_order() -> None:
    assert re.findall(r"^## (.+)$", README, re.M) == ["Start", "Client set-ups", "models.json", "Endpoints", "Keys and operations", "The zero-install copy", "How it works", "What it does not do", "Changes"]
    first = README.split("\n\n")[1]
    assert first.count(". ") == 0 and first.endswith("."), "one sentence says what it is"


def test_changes_are_of_three_kinds_and_name_the_version() -> None:
    lines = [line for line in chapter("Changes").splitlines() if line.startswith("- ")]
    assert lines and all(re.match(r"- (change|fix|new): ", line) for line in lines)
    assert re.findall(r"^### (\S+)$", chapter("Changes"), re.M)[0] == aicarousel.__version__


def test_no_em_dash_and_no_path_of_a_machine() -> None:
    assert not re.search("[\u2013\u2014]", README) and not re.search(r"/(?:root|home|work|Users)/", README)


def test_how_it_works_is_five_lines() -> None:
    assert len(chapter("How it works").strip().splitlines()) == 5


# ---------------------------------------------------------------- commands, run or parsed

def words_of(line: str) -> Iterator[list[str]]:
    """The simple commands of a line, as words."""
    for part in line.split("&&"):
        yield shlex.split(part)


def start_of_program(words: list[str]) -> int | None:
    """Where the arguments of aicarousel.py begin, None when it is not what is run."""
    return next((index + 1 for index, word in enumerate(words[:4]) if word == "aicarousel.py"), None)


@pytest.mark.parametrize("line", SHELL)
def test_every_line_of_shell_is_known_and_parses(line: str) -> None:
    for words in words_of(line):
        begin = start_of_program(words)
        if begin is not None:
            assert words[:begin] in (["python", "aicarousel.py"], ["uv", "run", "aicarousel.py"], [".venv/bin/python", "aicarousel.py"])
            arguments = aicarousel.make_parser().parse_args(words[begin:])
            assert arguments.command in aicarousel._COMMANDS
        elif words[1:4] == ["-m", "pip", "install"]:
            assert words[0] in ("python", ".venv/bin/python") and words[4:6] == ["h11>=0.16", "certifi"]
        elif words[:2] == ["uv", "run"]:
            assert words[2] == "--no-project" and words[-4:] == ["python", "-m", "pytest", "tests"]
        else:
            assert words[0] in ("curl", "export") or words == ["python", "-m", "pytest", "tests"] or words == ["python3", "-m", "venv", ".venv"], words


def test_the_test_command_installs_what_the_tests_import() -> None:
    [line] = [line for line in SHELL if line.startswith("python -m pip") and line.endswith("python -m pytest tests")]
    installed = {re.match(r"[\w-]+", word)[0] for word in shlex.split(line.split("&&")[0])[4:]}        # type: ignore[index]
    wanted: set[str] = set()
    for path in (ROOT / "tests").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
            wanted |= {name.partition(".")[0] for name in names}
    local = {path.stem for path in (*ROOT.glob("*.py"), *(ROOT / "tests").rglob("*.py"))} | {"validate", "wire"}       # the last two are ../shared's
    assert wanted - set(sys.stdlib_module_names) - local <= installed | {"pydantic", "typing_extensions"}        # these come with the SDKs


def test_what_the_module_needs_is_what_readme_installs() -> None:
    [dependencies] = re.findall(r"^# dependencies = (\[.*\])$", SOURCE, re.M)
    assert json.loads(dependencies) == ["h11>=0.16", "certifi"]
    assert 'python -m pip install "h11>=0.16" certifi' in README
    [least] = re.findall(r'^# requires-python = ">=(\d+\.\d+)"$', SOURCE, re.M)
    assert f"Python {least} or newer" in README


@pytest.fixture(scope="module")
def demo(module_gateway_factory: Callable[..., Gateway]) -> Gateway:
    """What README's first command starts, on a free port."""
    return module_gateway_factory(arguments=["--demo"])


def run_line(line: str, gateway: Gateway) -> subprocess.CompletedProcess[str]:
    """A line of README against a gateway on another port than README's, with its key."""
    line = line.replace("127.0.0.1:7123", f"127.0.0.1:{gateway.port}").replace("python aicarousel.py", f"{shlex.quote(sys.executable)} {shlex.quote(str(ROOT / 'aicarousel.py'))}")
    environment = gateway.environment | {"AICAROUSEL_KEY": gateway.key, "AICAROUSEL_HOME": str(gateway.home), "PORT": str(gateway.port)}
    return subprocess.run(["sh", "-c", line], env=environment, cwd=gateway.folder, capture_output=True, text=True, timeout=30)


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_curl_line_brings_a_streamed_answer(demo: Gateway) -> None:
    [line] = [line for line in SHELL if line.startswith("curl")]
    ran = run_line(line, demo)
    assert ran.returncode == 0
    chunks = [json.loads(data) for data in re.findall(r"^data: (\{.*)$", ran.stdout, re.M)]
    assert "".join(choice["delta"].get("content") or "" for chunk in chunks for choice in chunk["choices"]) == aicarousel.Demo.ANSWER
    assert ran.stdout.rstrip().endswith("data: [DONE]") and len(chunks) > 20


@pytest.mark.parametrize("line", [line for line in SHELL if line.startswith("python aicarousel.py") and not re.search(r" (serve|setup)\b", line)])
def test_the_other_commands_run(demo: Gateway, line: str) -> None:
    ran = run_line(line, demo)
    assert ran.returncode == 0 and ran.stdout and "Traceback" not in ran.stderr


def test_the_models_json_of_readme_and_the_one_that_comes_along_load() -> None:
    texts = [block for kind, block in BLOCKS if kind == "json" and '"carousel"' in block] + [(ROOT / "models.json").read_text(encoding="utf-8")]
    assert len(texts) == 2
    for text in texts:
        config = aicarousel.load_config(text, models_path="models.json", environment={"GROQ_API_KEY": "gsk-not-a-real-key", "VLLM_KEY": "k"}, dotenv={}, flags={})
        assert "groq" in [provider.name for provider in config.active]
    assert json.loads(texts[1]) == json.loads(json.dumps(dict(aicarousel.DEFAULT_MODELS)))


def test_json_blocks_are_whole() -> None:
    for kind, block in BLOCKS:
        assert kind in ("sh", "json", "toml", "yaml", "text"), kind
        if kind == "json":
            assert json.loads(block)


@pytest.mark.parametrize("name", [*aicarousel.CLIENTS])
def test_what_config_prints_is_told(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for variable, value in (("HOME", str(tmp_path)), ("AICAROUSEL_HOME", str(tmp_path)), ("PORT", "7123"), *((file.variable, "") for client in aicarousel.CLIENTS.values() for file in client.files if file.variable)):
        monkeypatch.setenv(variable, value)
    assert aicarousel.main(["config", name]) == 0
    assert ("text", capsys.readouterr().out) in BLOCKS


def test_the_banner_says_the_same_as_readme() -> None:
    recipes = "\n".join(aicarousel.client_recipes("http://127.0.0.1:7123", "sk-..."))
    for words in ("ANTHROPIC_BASE_URL=http://127.0.0.1:7123 ANTHROPIC_AUTH_TOKEN=sk-... ANTHROPIC_MODEL=aicarousel", 'base_url = "http://127.0.0.1:7123/v1"', 'wire_api = "responses"'):
        assert words in recipes and words in README
    for name in ("codex", "curl"):
        told = aicarousel.snippet(aicarousel.CLIENTS[name], None, "http://127.0.0.1:7123", "sk-...")[0][1]
        assert all(line in recipes for line in told.splitlines()), "what config prints"
    assert f"{aicarousel.CLAUDE_WINDOW}=100000\n" in "\n".join(aicarousel.client_recipes("http://127.0.0.1:7123", "sk-...", 100_000)) and aicarousel.CLAUDE_WINDOW not in recipes


# ---------------------------------------------------------------- endpoints, headers, failures

def test_every_endpoint_is_there_and_no_other() -> None:
    told = re.findall(r"^\| `(GET|POST) (/\S*)` \|", chapter("Endpoints"), re.M)
    there = {("POST" if "POST" in row.handlers else "GET", path if not path.endswith("/models/") else f"{path}{{id}}") for path, row in aicarousel._ENDPOINTS.items()}
    assert set(told) == there and len(told) == len(there)


def test_endpoints_answer_as_told(demo: Gateway) -> None:
    keyed = {path for path, row in aicarousel._ENDPOINTS.items() if row.needs_key and not row.admin}
    assert {path for path in aicarousel._ENDPOINTS if path.startswith("/admin/")} == {path for path, row in aicarousel._ENDPOINTS.items() if row.admin}
    assert keyed == {path for path, row in aicarousel._ENDPOINTS.items() if "POST" in row.handlers and not row.admin} | {"/metrics"}
    for path in ("/v1/models", "/models", "/v1/models/aicarousel", "/models/aicarousel", "/health", "/docs", "/openapi.json", "/"):
        assert demo.get(path, key="").status == 200, path
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    for name in ("x-api-key", "api-key", "x-goog-api-key"):
        assert demo.request("POST", "/chat/completions", body, {name: demo.key}, key="").status == 200
    assert demo.post("/v1/chat/completions", body, key="").status == 401 and demo.get("/health?deep=1", key="").status == 401


def test_every_answer_header_is_told_and_no_other() -> None:
    made = set(re.findall(r'"(x-aicarousel-[a-z-]+)"', SOURCE))
    told = {word.partition(":")[0] for word in CODE if word.startswith("x-aicarousel-")}
    assert told == made


def test_every_kind_of_failure_is_told_as_it_is() -> None:
    rows = re.findall(r"^\| `(\w+)` \|[^|]+\| (yes|no) \|([^|]+)\|([^|]*)\|$", chapter("When a provider fails"), re.M)
    assert [row[0] for row in rows] and {row[0] for row in rows} == set(aicarousel.FAILURE_RULES)
    for name, goes_on, scope, guess in rows:
        rule = aicarousel.FAILURE_RULES[name]
        assert (goes_on == "yes") is rule.goes_on and (scope.strip() == "nothing") is (rule.scope == ""), name
        assert ("10 minutes" in guess) is (rule.cap_s == 600.0) and ("1 hour" in guess) is (rule.cap_s == 3600.0), name


LIMITS = [
    ("head of a request", aicarousel.MAX_HEAD_BYTES // 1024, "KB"),
    ("head of a request", aicarousel.MAX_CLIENT_HEADERS, "headers"),
    ("head of a request", aicarousel.MAX_TARGET_BYTES // 1024, "KB"),
]


@pytest.mark.parametrize("what,number,unit", LIMITS)
def test_limits_are_those_of_the_module(what: str, number: float, unit: str) -> None:
    [row] = [line for line in chapter("Limits").splitlines() if line.startswith(f"| {what}")]
    assert re.search(rf"\b{number:g} ?{unit}\b", row.rpartition("|")[0].rpartition("|")[2] or row), row


def test_timeouts_and_defaults_are_those_of_the_module() -> None:
    text, given = chapter("models.json"), aicarousel.Timeouts()
    for name, kept in aicarousel._TIMEOUT_FIELDS.items():
        [words] = re.findall(rf"`{name}` \(([^)]*)\)", text)
        assert re.search(rf"\b{getattr(given, kept.name):g}\b", words), name
    carousel = aicarousel.Carousel()
    assert f"one request ({carousel.max_attempts})" in text and f"route is out ({carousel.max_wait_s:g})" in text
    assert f"silent for {carousel.limits.keep_alive_first_s} seconds" in README and f"every {carousel.limits.keep_alive_s:g} seconds" in README


def test_providers_that_write_on_are_told() -> None:
    [names] = re.findall(r"Some providers can write on from exactly where an answer ends: (.*?), and anthropic's", README, re.S)
    assert set(re.findall(r"\w+", names)) == {name for name in aicarousel.PRESETS if aicarousel.profile_for(name, "m").continues}


def test_every_limit_stands_in_readme_as_the_module_has_it() -> None:
    """The rows are written here: what fails prints what README has to say."""
    rows = [f"| `{aicarousel.camel_name(name)}` | {row.default:.10g} {row.metadata['unit']} | {row.metadata['low']:.10g} to {row.metadata['high']:.10g} | {row.metadata['about']} |"
            for name, row in aicarousel.Bounds.__dataclass_fields__.items()]
    told = [line for line in chapter("Limits").splitlines() if line.startswith("| `")]
    assert told == rows, "\n".join(rows)
    assert aicarousel.Bounds().event_bytes == aicarousel.MAX_EVENT_BYTES


# ---------------------------------------------------------------- commands and options

def parsers(parser: argparse.ArgumentParser, name: str = "") -> Iterator[tuple[str, argparse.ArgumentParser]]:
    """Every command with its parser."""
    actions = [action for action in parser._actions if isinstance(action, argparse._SubParsersAction)]
    if not actions:
        yield name, parser
    for action in actions:
        for word, child in action.choices.items():
            yield from parsers(child, f"{name} {word}".strip())


COMMANDS = dict(parsers(aicarousel.make_parser()))


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_and_option_is_told(command: str) -> None:
    rows = [line for line in chapter("Keys and operations").splitlines() if re.search(rf"`{command}[ `]", line.split("|")[1] if line.startswith("|") else "")]
    assert len(rows) == 1, command
    options = {option for action in COMMANDS[command]._actions for option in action.option_strings} - {"-h", "--help", "--home"}
    told = set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", rows[0].split("|")[2]))
    assert options <= told, f"{command}: README lacks {options - told}"


def test_readme_names_no_command_or_option_that_is_not_there() -> None:
    known = {option for parser in COMMANDS.values() for action in parser._actions for option in action.option_strings} | {"--version"}
    told = {word for code in CODE for word in re.findall(r"(?<![\w-])--[a-z][a-z-]*", code) if not re.match(r"(cline|qwen|aider|OPENAI_|opencode|llm|python tests/) ?", code)}
    assert told <= known, told - known
    table = [code for line in chapter("Keys and operations").splitlines() if line.startswith("| `") for code in re.findall(r"`([a-z]+(?: [a-z]+)?)(?: [A-Z\[].*?)?`", line.split("|")[1])]
    variables = {word for word in table if word not in COMMANDS}
    assert not variables, variables


# ---------------------------------------------------------------- environment

def variables_read() -> set[str]:
    """Every variable the module reads by its name: os.environ, and those of settings."""
    found = set(re.findall(r'os\.environ(?:\.get\(|\[)"([A-Za-z_]+)"', SOURCE)) | set(re.findall(r'"([A-Z_]+)" (?:not )?in os\.environ', SOURCE))
    found |= set(re.findall(r'\.look\("([A-Z_]+)"\)', SOURCE)) | {name for row in aicarousel._SETTINGS for name in row.variables}
    return found


def told_variables() -> set[str]:
    rows = [line.split("|")[1] for line in chapter("Environment").splitlines() if line.startswith("| ")]
    return {name for row in rows for name in re.findall(r"`(<P>_[A-Z_]+|[A-Z][A-Z_]+)`", row)}


def test_every_variable_is_told_and_no_other() -> None:
    told = told_variables()
    patterns = {"<P>_API_KEY", "<P>_BASE_URL", "<P>_MODEL", "<P>_ENABLED"}
    assert patterns <= told
    assert {f"<P>_{ending}" for ending in re.findall(r'variable_name\([^()]*(?:\([^()]*\))?[^()]*, "([A-Z_]+)"\)', SOURCE)} <= patterns
    assert told - patterns - {"GROQ_API_KEY"} == {name for name in variables_read() if not (name.islower() and name.upper() in told)}


def test_the_variables_of_every_provider_are_in_the_example() -> None:
    named = set(re.findall(r"[A-Z][A-Z0-9_]{3,}", EXAMPLE))
    wanted = {name for preset in aicarousel.PRESETS.values() if not preset.gone for name in (*preset.key_variables, *preset.needs)}
    assert wanted <= named
    assert {name for name in told_variables() if not name.startswith("<") and f"`{name}`" in CODE and "environment only" not in row_of(name)} <= named | {"GROQ_API_KEY"}
    assert aicarousel.parse_dotenv(EXAMPLE).keys() <= wanted and not any(aicarousel.parse_dotenv(EXAMPLE).values()), "nothing is set in it"


def row_of(name: str) -> str:
    return next(line for line in chapter("Environment").splitlines() if f"`{name}`" in line)


@pytest.mark.parametrize("name", sorted(name for name in told_variables() if name.startswith("AICAROUSEL_") or name in ("PORT", "API_KEYS")))
def test_settings_of_the_table_really_set(name: str) -> None:
    if "environment only" in row_of(name):
        assert name in {"AICAROUSEL_HOME", "AICAROUSEL_KEY"}
        return
    samples = {"PORT": "9", "AICAROUSEL_HOST": "::1", "AICAROUSEL_LOG_LEVEL": "error", "API_KEYS": "a-key-of-sixteen-characters", "AICAROUSEL_SECRET_COMMANDS": "true"}
    pair = {"AICAROUSEL_TLS_CERT": "x", "AICAROUSEL_TLS_KEY": "x"}
    log = {"AICAROUSEL_REQUEST_LOG": "log", "AICAROUSEL_LOG_BODIES": "all"}
    environment = pair if name in pair else log if name in log else {name: samples.get(name, "https://app.example" if "ORIGIN" in name else "name.example")}
    config = aicarousel.load_config(None, models_path="models.json", environment=environment, dotenv={}, flags={})
    assert config.settings != aicarousel.Settings() and f"environment {name}" in config.origins.values()


def test_every_provider_is_told() -> None:
    [line] = re.findall(r"^Built-in providers: (.*?)\. (\S+) is known to be gone", README, re.M | re.S)
    assert [name.strip() for name in line[0].replace("\n", " ").split(",")] == [name for name, preset in aicarousel.PRESETS.items() if not preset.gone]
    assert [name for name, preset in aicarousel.PRESETS.items() if preset.gone] == [line[1]]
    assert f"{len([preset for preset in aicarousel.PRESETS.values() if not preset.gone])} built-in providers" in README


# ---------------------------------------------------------------- models.json

@pytest.mark.parametrize("group", FIELDS)
def test_every_field_of_models_json_is_told(group: str) -> None:
    words = {word for code in re.findall(r"`([^`\n]+)`", chapter("models.json")) for word in re.findall(r"\w+", code)}
    assert set(FIELDS[group]) <= words, set(FIELDS[group]) - words


@pytest.mark.parametrize("group,begins", [("provider", "Fields of a provider"), ("carousel", "Fields of `carousel`")])
def test_tables_of_fields_name_no_other(group: str, begins: str) -> None:
    table = chapter("models.json").split(begins)[1].split("\n\n")[1]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.M)) == set(FIELDS[group])


@pytest.mark.parametrize("group,label", [("model", "a model"), ("key", "a key"), ("timeouts", "`timeouts`"), ("rule", "a rule")])
def test_lines_of_fields_name_no_other(group: str, label: str) -> None:
    line = chapter("models.json").split(f"Fields of {label}")[1].split("\n\n")[0]
    told = set(re.findall(r"`([A-Za-z]+)`", line)) - (set(FIELDS["price"]) if group == "model" else set())
    assert told == set(FIELDS[group])


def words_wanted(group: str, name: str) -> list[str]:
    """The words a field takes, as its complaint lists them."""
    with pytest.raises(aicarousel.ConfigError) as raised:
        FIELDS[group][name].want("no such word", aicarousel._Place("models.json", name))
    return raised.value.expected.partition("one of: ")[2].split(", ")


@pytest.mark.parametrize("group,name", [("provider", "format"), *(("carousel", name) for name in ("strategy", "affinity", "fallback", "toolStream", "unknownModel", "resume"))])
def test_words_of_a_field_are_told(group: str, name: str) -> None:
    [row] = [line for line in chapter("models.json").splitlines() if line.startswith(f"| `{name}` |")]
    assert set(words_wanted(group, name)) <= set(re.findall(r"`([a-z-]+)`", row))


def test_rules_for_names_are_seven_and_hold() -> None:
    rules = re.findall(r"^\d\. (.+)$", chapter("Naming a model"), re.M)
    assert len(rules) == 7
    for name in aicarousel.CAROUSEL_NAMES - {"", "router-maestro"}:
        assert f"`{name}`" in rules[0]
    for prefix, family in aicarousel._FAMILIES:
        assert f"`{prefix}`" in rules[5] and family in rules[5]


def test_the_top_of_the_repository_holds_what_it_should() -> None:
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)      # what a user keeps beside it is the user's
    names = {name.partition("/")[0] for name in tracked.stdout.splitlines()} if tracked.returncode == 0 else set()
    assert {name for name in names if not name.startswith(".")} <= {"aicarousel.py", "models.json", "README.md", "tests", "LICENSE"}
    run = ROOT / ".ci" / "run"
    assert os.access(run, os.X_OK) and "python -m pytest tests" in run.read_text()
