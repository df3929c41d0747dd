"""Codex against a gateway whose only providers speak Chat."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from driver import CODEX, Model, Ran, asked, call, dies, fills_up, n_answers, needs_codex, outcomes, pausing, results, run, says, sit_out, surroundings
from fakes import Provider
from house import House

pytestmark = needs_codex

#: Names that Codex has in its catalogue, and so offers other tools to than to a name it does not know.
WITH_PATCH, WITH_CODE = "gpt-5.5", "gpt-6-sol"
PATCH = "*** Begin Patch\n*** Update File: made.txt\n@@\n-one\n+two\n*** Add File: added.txt\n+\"new\" \\ caf\u00e9\n*** End Patch\n"


def drive(house: House, folder: Path, *, model: str = "aicarousel", more: str = "") -> Ran:
    """Runs `codex exec` in `folder` to its end."""
    home = folder.parent / "codex-home"
    home.mkdir()
    (home / "config.toml").write_text(f'model = "{model}"\nmodel_provider = "x"\ncheck_for_update_on_startup = false\n{more}\n[analytics]\nenabled = false\n'
                                      f'[model_providers.x]\nname = "x"\nbase_url = "{house.url}/v1"\nenv_key = "AICAROUSEL_KEY"\nwire_api = "responses"\n')
    words = ["exec", "--json", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", "Do it."]
    return run([CODEX, *words], surroundings(folder, CODEX_HOME=str(home), AICAROUSEL_KEY=house.key), folder)


def items(ran: Ran, kind: str) -> list[dict[str, Any]]:
    """The items of one kind that the client finished."""
    return [event["item"] for event in ran.events if event["type"] == "item.completed" and event["item"]["type"] == kind]


def final(ran: Ran) -> str:
    """The last words of a run that went well."""
    assert ran.status == 0 and ran.events[-1]["type"] == "turn.completed", (ran.status, ran.stderr, ran.lines[-5:])
    return items(ran, "agent_message")[-1]["text"]


def shell(command: str) -> Any:
    return call("exec_command", cmd=command)


def tools(provider: Provider) -> list[str]:
    """The names of the tools that the provider was offered."""
    return [tool["function"]["name"] for tool in provider.calls("first")[0].json["tools"]]


def test_shell_and_patch(build: Callable[..., House], provider: Provider, folder: Path) -> None:
    """The patch tool is a freeform one to Codex and a function to the provider."""
    house = build(first=Model(
        says("I run it.", think="A file is wanted.", calls=[shell("echo one > made.txt")]),
        says("Two at once.", calls=[shell("cat made.txt"), shell("cat missing.txt")]),
        says("I patch it.", calls=[call("apply_patch", input=PATCH)]),
        says(calls=[call("apply_patch", input=PATCH)]),
        says("All ", "done.")))
    ran = drive(house, folder, model=WITH_PATCH)

    assert final(ran) == "All done." and outcomes(house) == ["ok"] * 5
    assert (folder / "made.txt").read_text() == "two\n" and (folder / "added.txt").read_text() == '"new" \\ caf\u00e9\n'
    assert [item["text"] for item in items(ran, "reasoning")] == ["A file is wanted."]
    assert sorted(item["exit_code"] for item in items(ran, "command_execution")) == [0, 0, 1]       # two of them run side by side
    requests = provider.calls("first")
    assert [n_answers(request) for request in requests] == [0, 1, 2, 3, 4] and {"exec_command", "apply_patch"} <= set(tools(provider))
    assert ["one" in results(requests[2])[0], "missing.txt: No such file" in results(requests[2])[1]] == [True, True]
    assert "Success" in results(requests[3])[0]
    assert "Success" not in results(requests[4])[0] and "made.txt" in results(requests[4])[0]       # the second time the patch does not fit
    [patching] = [message for message in requests[3].json["messages"] if message["role"] == "assistant" and message["content"] == "I patch it."]
    assert json.loads(patching["tool_calls"][0]["function"]["arguments"]) == {"input": PATCH}


def test_patch_by_the_shell_tool(build: Callable[..., House], provider: Provider, folder: Path) -> None:
    """A name that Codex does not know: functions alone, and patches are a command."""
    house = build(first=Model(says(calls=[shell("echo one > made.txt")]), says(calls=[shell(f"apply_patch <<'EOF'\n{PATCH}EOF\n")]), says("All ", "done.")))
    ran = drive(house, folder)
    assert final(ran) == "All done." and "apply_patch" not in tools(provider)
    assert (folder / "made.txt").read_text() == "two\n" and (folder / "added.txt").exists()
    assert "Success" in results(provider.calls("first")[2])[0]


def test_patch_by_code(build: Callable[..., House], provider: Provider, folder: Path) -> None:
    """Newer names: the tools stand inside the input, and one freeform tool runs code that calls the others."""
    code = f'text(await tools.exec_command({{cmd: "echo one > made.txt; cat made.txt"}}));\ntext(await tools.apply_patch({json.dumps(PATCH)}));\n'
    house = build(first=Model(says("Code.", calls=[call("exec", input=code)]), says("All ", "done.")))
    ran = drive(house, folder, model=WITH_CODE)
    assert final(ran) == "All done." and "exec" in tools(provider)
    assert (folder / "made.txt").read_text() == "two\n" and "one" in results(provider.calls("first")[1])[0]


def test_image(build: Callable[..., House], provider: Provider, folder: Path, red_square: tuple[Path, str]) -> None:
    path, url = red_square
    house = build(first=Model(says("I look.", calls=[call("view_image", path=str(path))]), says("Red, ", "done.")))
    assert final(drive(house, folder, model=WITH_PATCH)) == "Red, done."
    parts = [part for message in provider.calls("first")[1].json["messages"] if isinstance(message["content"], list) for part in message["content"]]
    assert [part["image_url"]["url"] for part in parts if part["type"] == "image_url"] == [url]


# ---------------------------------------------------------------- a provider that dies

WELL = (says("I run it.", calls=[shell("echo made > made.txt")]), says("All ", "done."))


@pytest.mark.parametrize("death", ["reset", "closed"])
def test_a_provider_dies_in_text(build: Callable[..., House], provider: Provider, folder: Path, death: str) -> None:
    house = build(first=Model(dies(death, "Half of ", "this")), spare=Model(*WELL))
    ran = drive(house, folder)
    assert final(ran) == "All done." and (folder / "made.txt").read_text() == "made\n"
    assert asked(provider, "first") == [0] and asked(provider, "spare") == [0, 1] and outcomes(house) == ["error", "ok", "ok"]
    assert told_of_errors(ran) == 1


@pytest.mark.parametrize("death", ["reset", "closed"])
def test_a_provider_dies_in_a_call(build: Callable[..., House], provider: Provider, folder: Path, death: str) -> None:
    """Nobody sees it: the spare one's answer is the first thing that the client gets."""
    house = build(first=Model(dies(death, calls=[shell("touch wrong.txt")])), spare=Model(*WELL))
    ran = drive(house, folder)
    assert final(ran) == "All done." and (folder / "made.txt").exists() and not (folder / "wrong.txt").exists()
    assert asked(provider, "first") == [0] and asked(provider, "spare") == [0, 1] and outcomes(house) == ["ok", "ok"]
    assert told_of_errors(ran) == 0 and [item["text"] for item in items(ran, "agent_message")] == ["I run it.", "All done."]


@pytest.mark.parametrize("death", ["reset", "closed"])
@pytest.mark.parametrize("model", ["aicarousel", WITH_PATCH])
def test_a_provider_dies_in_a_call_behind_text(build: Callable[..., House], provider: Provider, folder: Path, death: str, model: str) -> None:
    """The client is told, and asks again; of the call it has seen nothing."""
    half = shell("touch wrong.txt") if model == "aicarousel" else call("apply_patch", input="*** Begin Patch\n*** Add File: wrong.txt\n+wrong\n*** End Patch\n")
    house = build(first=Model(dies(death, "I do ", "it.", calls=[half])), spare=Model(*WELL))
    ran = drive(house, folder, model=model)
    assert final(ran) == "All done." and (folder / "made.txt").exists() and not (folder / "wrong.txt").exists()
    assert asked(provider, "first") == [0] and asked(provider, "spare") == [0, 1] and outcomes(house) == ["error", "ok", "ok"]
    assert told_of_errors(ran) == 1 and not items(ran, "file_change") and len(items(ran, "command_execution")) == 1


def told_of_errors(ran: Ran) -> int:
    """How often the client says that a stream broke and that it asks again; the words are the gateway's."""
    return len([event for event in ran.events if event["type"] == "error" and "Reconnecting" in event["message"] and "first/m" in event["message"]])


def test_a_silent_provider_is_waited_for(build: Callable[..., House], provider: Provider, folder: Path) -> None:
    """Half a minute without a word, before and inside the answer: the client takes response.in_progress again and again."""
    house = build(first=Model(pausing("Slow, ", "but whole.")))
    ran = sit_out(drive, house, provider, folder, "before", "inside")
    assert final(ran) == "Slow, but whole." and asked(provider, "first") == [0] and told_of_errors(ran) == 0


@pytest.mark.parametrize("told", [True, False])
def test_it_compacts_within_the_window_that_it_was_told(build: Callable[..., House], folder: Path, told: bool) -> None:
    """What `config codex` and `run` set: without it, it waits for 245,000 tokens."""
    summaries: list[int] = []
    ran = drive(build(first=fills_up(shell("echo word"), "CONTEXT CHECKPOINT COMPACTION", summaries, 95_000)), folder, more="model_context_window = 100000" if told else "")
    assert final(ran) == "All done." and summaries == ([1] if told else [])
