"""Drives real coding clients against a gateway whose only providers speak Chat: scripted ones on loopback.

    python tests/clients/drive.py claude PATH_TO_CLAUDE
    python tests/clients/drive.py codex PATH_TO_CODEX

Exit status 0 when the client did what its provider told it to do. The clients come from npm (README, "Tests").
"""
from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from fakes import FAKE_KEY, Gateway, Provider, Request, chat_stream, stream  # noqa: E402


def call(number: int, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """A tool call as Chat has it."""
    return {"id": f"call_{number}_{os.urandom(6).hex()}", "type": "function", "function": {"name": name, "arguments": json.dumps(arguments)}}


def n_results(request: Request) -> int:
    """How many tool results the conversation holds."""
    return sum(message["role"] == "tool" for message in request.json["messages"])


def claude_script(folder: Path) -> Any:
    """Turn by turn: write a file, then read two files at once, then edit it again and again, then say done."""
    target = folder / "made.txt"

    def script(request: Request) -> Any:
        turn = n_results(request)
        names = [tool["function"]["name"] for tool in request.json.get("tools", [])]
        if not names or "Write" not in names:
            return stream(*chat_stream("A title"))
        if turn == 0:
            return stream(*chat_stream("I write it.", tool_calls=[call(0, "Write", {"file_path": str(target), "content": "step 0\n"})]))
        if turn == 1:
            return stream(*chat_stream("", tool_calls=[call(1, "Read", {"file_path": str(target)}), call(2, "Read", {"file_path": str(folder / "missing.txt")})]))
        if turn < 13:
            return stream(*chat_stream("", tool_calls=[call(turn, "Edit", {"file_path": str(target), "old_string": f"step {turn - 3}", "new_string": f"step {turn - 2}"})]))
        return stream(*chat_stream("All ", "done."))
    return script


def codex_script(folder: Path) -> Any:
    """Run a shell command, then say done."""
    def script(request: Request) -> Any:
        names = [tool["function"]["name"] for tool in request.json.get("tools", [])]
        if n_results(request) == 0:
            name = next(name for name in ("exec_command", "shell", "shell_command", "local_shell") if name in names)
            arguments = {"cmd": f"echo made by codex > {folder / 'made.txt'}"} if name == "exec_command" else {"command": ["sh", "-c", f"echo made by codex > {folder / 'made.txt'}"]}
            return stream(*chat_stream("I run it.", tool_calls=[call(0, name, arguments)]))
        return stream(*chat_stream("All ", "done."))
    return script


def drive(client: str, program: str) -> int:
    folder = Path(tempfile.mkdtemp(prefix="client-"))
    with contextlib.closing(Provider()) as provider:
        script = claude_script(folder) if client == "claude" else codex_script(folder)
        models = {"scripted": {"baseUrl": provider.script("scripted", script), "default": "m", "enableFallback": False, "models": ["m"], "keys": ["env:FAKE_KEY"]}}
        with Gateway(models, env_file={"FAKE_KEY": FAKE_KEY}) as gateway:
            home = folder / "home"
            home.mkdir()
            environment = {"PATH": os.environ["PATH"], "HOME": str(home)}
            if client == "claude":
                environment |= {"ANTHROPIC_BASE_URL": gateway.url, "ANTHROPIC_AUTH_TOKEN": gateway.key, "ANTHROPIC_MODEL": "aicarousel", "ANTHROPIC_DEFAULT_HAIKU_MODEL": "aicarousel",
                                "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1", "DISABLE_AUTOUPDATER": "1", "DISABLE_TELEMETRY": "1", "DISABLE_ERROR_REPORTING": "1", "IS_SANDBOX": "1"}
                command = [program, "-p", "Make the file", "--dangerously-skip-permissions", "--output-format", "json"]
            else:
                config = home / ".codex"
                config.mkdir()
                (config / "config.toml").write_text(f'model = "aicarousel"\nmodel_provider = "x"\ncheck_for_update_on_startup = false\n[analytics]\nenabled = false\n'
                                                    f'[model_providers.x]\nname = "x"\nbase_url = "{gateway.url}/v1"\nenv_key = "AICAROUSEL_KEY"\nwire_api = "responses"\n')
                environment["AICAROUSEL_KEY"] = gateway.key
                command = [program, "exec", "--skip-git-repo-check", "--dangerously-bypass-approvals-and-sandbox", "Make the file"]
            ran = subprocess.run(command, cwd=folder, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=120)
            made = (folder / "made.txt").read_text() if (folder / "made.txt").exists() else ""
            print(f"exit {ran.returncode}, made {made!r}, {len(provider.requests)} requests")
            print(ran.stdout[-1500:])
            if ran.returncode or "done." not in ran.stdout or not made:
                print(ran.stderr[-1500:], gateway.log[-3000:], sep="\n")
                return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(drive(sys.argv[1], sys.argv[2]))
