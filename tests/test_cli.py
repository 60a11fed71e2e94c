"""The command line: what a person types and the one line they get back when it cannot be done."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import gc
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest
import typer
from typer.testing import CliRunner

import plaudit
from learner.simulate import Client, SimulateError
from learner.worker import parser
from server.auth import Keyring, VoterHash
from server.deployment import Deployment
from server.settings import Settings
from store import AdapterRegistry, Store, StoreError
from tests.serving import publish_random

ROOT = Path(__file__).parents[1]
ROW = {"prompt": "Hi", "chosen": "Hello!", "rejected": "Go away."}


def run(*args: str):
    """Run a command in this process."""
    return CliRunner().invoke(plaudit.app, list(args), env={"COLUMNS": "200", "TERMINAL_WIDTH": "200"}, catch_exceptions=False)


def plain(text: str) -> str:
    """Without colours."""
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def commands() -> list[list[str]]:
    """Every command there is, found by walking the application."""
    root = typer.main.get_command(plaudit.app)
    found = []
    for name, command in root.commands.items():
        found.append([name])
        found += [[name, sub] for sub in getattr(command, "commands", {})]
    return found


@pytest.mark.parametrize("command", [c for c in commands() if c[0] not in ("learn", "starter")], ids=" ".join)
def test_every_command_has_help_worth_reading(command: list[str]) -> None:
    result = run(*command, "--help")
    assert result.exit_code == 0 and len(plain(result.output)) > 150


@pytest.mark.slow
def test_a_server_that_its_command_started_does_what_the_other_commands_ask(tmp_path: Path, tiny_llama: Path) -> None:
    data, log, config = tmp_path / "data", tmp_path / "server.log", tmp_path / "elsewhere.toml"
    version = publish_random(AdapterRegistry(data / "adapters"), tiny_llama)
    config.write_text("max_tokens = 5\n")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "plaudit", "serve", "--port", str(port), "--data-dir", str(data), "--model", str(tiny_llama), "--no-learner"]
    with log.open("wb") as out:
        environment = {**os.environ, "PLAUDIT_CONFIG": str(config), "OMP_WAIT_POLICY": "passive"}
        server = subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=out, stderr=subprocess.STDOUT)
    url = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 120
        while True:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{url}/readyz", trust_env=False).status_code == 200 and version in run("adapters", "--url", url).output:
                    break
            time.sleep(0.2)
        assert run("adapters", "--url", url, "promote", "base").output.strip() == "live: base"
        assert run("adapters", "--url", url, "rollback").output.strip() == f"live: {version}"
        cast = run("simulate", "--votes", "3", "-n", "2", "--url", url)
        assert cast.exit_code == 0, cast.output
        with httpx.Client(base_url=url, trust_env=False, timeout=60) as client:
            assert client.get("/v1/status").json()["votes"] == 3
            said = client.post("/v1/chat/completions", json={"messages": [{"role": "user", "content": "Hi"}], "model": "plaudit"}).json()
        assert said["usage"]["completion_tokens"] <= 5 and said["model"] == f"plaudit@{version}"
    finally:
        server.send_signal(signal.SIGTERM)
        assert server.wait(60) in (0, -signal.SIGTERM)  # uvicorn ends by the signal it was sent, once all is done
    assert "Traceback" not in log.read_text()


def test_every_command_is_in_the_readme() -> None:
    readme = (ROOT / "README.md").read_text()
    for command in commands():
        assert re.search(rf"\b{command[0]}\b", readme), f"the README does not mention `plaudit {command[0]}`"


def test_every_command_that_a_message_advises_exists() -> None:
    there = {" ".join(command) for command in commands()}
    groups = {command.split()[0] for command in there if " " in command}
    for file in (ROOT / "plaudit.py", *(path for part in ("engine", "learner", "server", "store", "ui") for path in (ROOT / part).rglob("*.py"))):
        for first, second in re.findall(r"`plaudit ([a-z]+)(?: ([a-z]+))?", file.read_text("utf-8")):
            advised = f"{first} {second}" if first in groups and second else first
            assert advised in there, f"{file.name} advises `plaudit {advised}`"


def test_serve_has_a_flag_for_every_setting() -> None:
    text = plain(run("serve", "--help").output)
    for name in Settings.model_fields:
        assert "--" + name.replace("_", "-") in text
    assert "[default: 7860]" in text and "[default: plaudit-data]" in text  # rich would take it for markup


class Page(BaseHTTPRequestHandler):
    """Answers everything with a page, as a server of something else does."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"<p>Welcome!</p>")

    do_POST = do_GET

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def another_server() -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def test_the_learner_started_by_hand_has_the_servers_settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[str] = []
    monkeypatch.setattr("learner.worker.main", lambda argv: given.extend(argv) or 0)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plaudit.toml").write_text('model = "mine"\nround_votes = 5\n')
    monkeypatch.setenv("PLAUDIT_DATA_DIR", "/data")
    assert run("learn", "--round-votes", "7", "--once").exit_code == 0
    args = parser().parse_args(given)
    assert (args.data_dir, args.model, args.round_votes, args.once) == (Path("/data"), "mine", 7, True)


def test_a_chat_in_the_terminal_outlives_a_refusal_and_an_odd_pick(monkeypatch: pytest.MonkeyPatch) -> None:
    typed = iter(["hello", "", "too much", "and now?", "\u00b2", "2", "bad?", "0", "last"])  # an empty line is no vote
    sent: list[Any] = []

    def typing(*_: Any) -> str:
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None

    def answers(method: str, url: str, **kwargs: Any) -> httpx.Response:
        sent.append((url.rsplit("/", 1)[1], copy.deepcopy(kwargs["json"])))
        last = kwargs["json"].get("messages", [{}])[-1].get("content")
        if last == "too much":
            return httpx.Response(429, json={"error": {"message": "over quota"}})
        choices = [{"message": {"content": text}} for text in ("A", "B")]
        return httpx.Response(200, json={"choices": choices, "plaudit": {"comparison_id": "c", "conversation_id": "v"}})

    monkeypatch.setattr(plaudit.out, "input", typing)
    monkeypatch.setattr(httpx, "request", answers)
    result = run("chat")
    assert result.exit_code == 0 and "not answered: over quota" in result.output
    assert [m["content"] for m in sent[2][1]["messages"]] == ["hello", "A", "and now?"]  # what was refused is not part of it
    assert sent[3] == ("vote", {"favourite": 1}) and sent[5] == ("vote", {"verdict": "none"})
    assert [m["content"] for m in sent[6][1]["messages"]] == ["hello", "A", "and now?", "B", "last"]  # none was good: nothing of it goes on


def test_no_proxy_sees_what_is_said_to_a_server_on_this_machine(monkeypatch: pytest.MonkeyPatch, another_server: str) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, another_server)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert "no answer" in run("adapters", "--url", "http://127.0.0.1:9").stderr
    with Client("http://127.0.0.1:9", "a key") as client, pytest.raises(SimulateError, match="Is `plaudit serve` running"):
        client.call("GET", "/v1/status")


def test_config_says_where_each_value_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "plaudit.toml").write_text("port = 7001\nround_votes = 5\n")
    monkeypatch.setenv("PLAUDIT_ROUND_VOTES", "6")
    lines = plain(run("config", "--mix-share", "0.25").output).splitlines()
    rows = {line.split("│")[1].strip(): [cell.strip() for cell in line.split("│")[2:4]] for line in lines if "│" in line}
    assert rows["port"] == ["7001", "plaudit.toml"]
    assert rows["round_votes"] == ["6", "PLAUDIT_ROUND_VOTES"]
    assert rows["mix_share"] == ["0.25", "flag --mix-share"]
    assert rows["host"] == ["127.0.0.1", "default"]


@pytest.mark.parametrize("args, told", [
    (["serve", "--port", "70000"], "port"),
    (["config", "--promotion", "sometimes"], "promotion"),
    (["serve", "--rate-chat", "often"], "rate"),
    (["export", "--format", "xml"], "unknown format"),
    (["export", "--data-dir", "/nonexistent/here"], "no database"),
    (["import", "none.jsonl", "--data-dir", "{tmp}"], "no file"),
    (["keys", "revoke", "x", "--data-dir", "{tmp}"], "no key"),
    (["keys", "add", "ann", "--role", "king", "--data-dir", "{tmp}"], "role"),
    (["adapters", "--url", "http://127.0.0.1:9"], "no answer"),
    (["adapters", "--url", "http://127.0.0.1:abc"], "no address of a server"),
    (["simulate", "--url", "http://127.0.0.1:abc", "--prompts", "README.md"], "no address of a server"),
    (["adapters", "--url", "{web}"], "not as a Plaudit server does"),
    (["simulate", "--url", "{web}", "--prompts", "README.md"], "not as a Plaudit server does"),
    (["simulate", "--url", "http://127.0.0.1:9", "--taste", "nicer", "--prompts", "README.md"], "no taste"),
])
def test_what_cannot_be_done_is_one_line_and_status_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, another_server: str, args: list[str], told: str
) -> None:
    monkeypatch.chdir(ROOT)
    result = run(*(arg.replace("{tmp}", str(tmp_path)).replace("{web}", another_server) for arg in args))
    assert result.exit_code == 2
    assert told in result.stderr and result.stderr.startswith("plaudit: ") and result.stderr.count("\n") == 1
    assert "Traceback" not in result.output


@pytest.mark.parametrize("content, told", [
    ("prot = 1", "prot (plaudit.toml): there is no such setting"), ("port = [", "plaudit.toml"), (None, "no settings file at plaudit.toml"),
])
def test_a_settings_file_that_is_not_understood_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: str | None, told: str) -> None:
    monkeypatch.chdir(tmp_path)
    if content is None:
        monkeypatch.setenv("PLAUDIT_CONFIG", "plaudit.toml")
    else:
        (tmp_path / "plaudit.toml").write_text(content)
    result = run("config")
    assert result.exit_code == 2 and told in result.stderr and result.stderr.count("\n") == 1


def test_a_start_that_fails_is_one_line_and_status_2(tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def busy(_: Deployment) -> None:
        raise StoreError("the database was busy for 10 s; try again")

    monkeypatch.setattr(Deployment, "start", busy)
    result = run("serve", "--model", str(tiny_llama), "--port", "0", "--data-dir", str(tmp_path / "data"), "--no-learner")
    assert result.exit_code == 2 and "Traceback" not in result.output
    assert "the database was busy for 10 s; try again" in result.stderr


def test_a_taken_port_is_told_before_anything_is_loaded(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        result = run("serve", "--port", port, "--data-dir", str(tmp_path / "data"))
    assert result.exit_code == 2 and f"port {port} is taken" in result.stderr
    assert not (tmp_path / "data").exists()


def test_what_is_streamed_is_sent_at_once() -> None:
    async def accepted() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def took(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            found.set_result(writer.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        listening = plaudit.listening_socket("127.0.0.1", 0)
        async with await asyncio.start_server(took, sock=listening):
            _, writer = await asyncio.open_connection(*listening.getsockname())
            try:
                return await found
            finally:
                writer.close()

    assert asyncio.run(accepted())  # or small pieces wait until those before them are acknowledged (Nagle)


def test_serve_refuses_a_data_directory_in_use_a_missing_model_and_a_public_address_without_keys(tmp_path: Path, tiny_llama: Path) -> None:
    def refused(*flags: str) -> str:
        command = [sys.executable, str(ROOT / "plaudit.py"), "serve", "--port", "0", "--no-learner", *flags]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
        return done.stderr.strip().splitlines()[-1]

    with Store.open(tmp_path / "used"):
        assert "in use by another Plaudit" in refused("--data-dir", str(tmp_path / "used"), "--model", str(tiny_llama))
    assert "nowhere" in refused("--data-dir", str(tmp_path / "new"), "--model", str(tmp_path / "nowhere"))
    assert "keys add" in refused("--data-dir", str(tmp_path / "new"), "--model", str(tiny_llama), "--host", "0.0.0.0")


def test_votes_go_in_and_come_out(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text(json.dumps({**ROW, "voter": "ann@example.org"}) + "\n")
    data = str(tmp_path / "data")
    assert "1 votes taken in" in run("import", str(tmp_path / "in.jsonl"), "--data-dir", data).output
    row = json.loads(run("export", "--data-dir", data).output)
    assert row["chosen"] == [{"role": "assistant", "content": "Hello!"}]
    with Store.open(data, read_only=True) as store:
        (item,) = store.voted_comparisons()
    assert item.vote.voter == f"import:{VoterHash(tmp_path / 'data')('ann@example.org')}"  # salted: a list of names does not tell whose it is


def test_a_reader_that_has_had_enough_of_an_export_ends_it_quietly(tmp_path: Path) -> None:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({**ROW, "prompt": f"Hi {n}"}) + "\n" for n in range(3000)))
    data = str(tmp_path / "data")
    assert run("import", str(tmp_path / "in.jsonl"), "--data-dir", data).exit_code == 0
    command = [sys.executable, "-m", "plaudit", "export", "--data-dir", data]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as whole:
        assert whole.stdout is not None and whole.stderr is not None
        assert json.loads(whole.stdout.readline())["prompt"]
        whole.stdout.close()
        assert whole.stderr.read() == b"" and whole.wait(60) == 0


def test_keys_are_shown_once_listed_without_their_secret_and_revoked(tmp_path: Path) -> None:
    data = ["--data-dir", str(tmp_path)]
    made = run("keys", "add", "ann", "--role", "operator", *data)
    key = made.stdout.strip()
    assert "everyone needs a key" in made.stderr and not run("keys", "add", "ben", *data).stderr
    run("keys", "add", "zoe [home] [/b]", *data)
    listed = run("keys", "list", *data).output
    assert "zoe [home] [/b]" in listed  # as it is, not as markup
    assert key.startswith("plaudit-") and "ann" in listed and key not in listed
    assert key not in (tmp_path / "keys.json").read_text()
    gone = run("keys", "revoke", key.split("-")[1], *data)
    assert gone.exit_code == 0 and not gone.stderr and "ann" not in run("keys", "list", *data).output
    ben, zoe = [row.id for row in Keyring(tmp_path).list()]
    assert not run("keys", "revoke", ben, *data).stderr and "No key is left" in run("keys", "revoke", zoe, *data).stderr


def test_doctor_finds_a_corrupt_adapter(tmp_path: Path) -> None:
    Store.open(tmp_path).close()

    def write(directory: Path) -> None:
        (directory / "adapter_config.json").write_text("{}")
        (directory / "adapter_model.safetensors").write_text("weights")

    AdapterRegistry(tmp_path / "adapters").publish(write, {})
    well = run("doctor", "--data-dir", str(tmp_path))
    assert "v000001: digest" in plain(well.output) and "SQLite" in well.output
    (tmp_path / "adapters" / "v000001" / "adapter_config.json").write_text("{ }")
    ill = run("doctor", "--data-dir", str(tmp_path))
    assert ill.exit_code == 1 and "adapter_config.json is not what was published" in plain(ill.output)


def test_doctor_tells_a_data_directory_before_its_first_start_from_one_with_damaged_files(tmp_path: Path) -> None:
    run("keys", "add", "ann", "--data-dir", str(tmp_path))
    young = run("doctor", "--data-dir", str(tmp_path))
    assert young.exit_code == 0 and "no database" in plain(young.output) and "keys: 1" in plain(young.output)
    (tmp_path / "keys.json").write_text("{")
    ill = run("doctor", "--data-dir", str(tmp_path))
    assert ill.exit_code == 1 and "BAD keys" in plain(ill.output) and "keys.json is damaged" in plain(ill.output)
    (tmp_path / "adapters").write_text("a file, where a directory should be")
    ill = run("doctor", "--data-dir", str(tmp_path))
    assert ill.exit_code == 1 and "adapters: Not a directory" in plain(ill.output)


def test_doctor_looks_above_a_data_directory_that_is_not_there_yet(tmp_path: Path) -> None:
    assert "`plaudit serve` makes it" in plain(run("doctor", "--data-dir", str(tmp_path / "a" / "b")).output)


def test_make_says_what_is_missing_again_after_a_venv_that_failed_half_way(tmp_path: Path) -> None:
    shutil.copy(ROOT / "Makefile", tmp_path)
    (tmp_path / "engine").mkdir()
    for name in ("pyproject.toml", "constraints.txt", "setup.py", "engine/decode.c"):
        (tmp_path / name).touch()
    python = tmp_path / "python"  # Debian's without python3-venv: it leaves a .venv without pip
    python.write_text('#!/bin/sh\n[ "$2" != venv ] || { mkdir -p .venv/bin; cp "$0" .venv/bin/python; exit 1; }\n')
    python.chmod(0o755)
    for _ in range(2):
        done = subprocess.run(["make", "venv", f"PYTHON={python}"], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode and "apt install python3-venv" in done.stdout


def test_what_the_dockerfile_copies_is_not_ignored() -> None:
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")}
    copies = [line.split()[1:-1] for line in (ROOT / "Dockerfile").read_text("utf-8").splitlines() if line.startswith("COPY") and "--from" not in line]
    copied = {source for sources in copies for source in sources}
    assert copied == allowed and all((ROOT / name).exists() for name in copied) and "setup.py" in copied


def test_what_is_kept_for_good_is_not_collected_and_the_rest_is() -> None:
    class Knot:
        pass

    before = gc.get_freeze_count()
    try:
        with plaudit.kept_for_good():
            assert not gc.isenabled()
            kept = Knot()
            kept.self = kept  # type: ignore[attr-defined]
        assert gc.isenabled() and gc.get_freeze_count() > before
        loose = Knot()
        loose.self = loose  # type: ignore[attr-defined]
        gone, there = weakref.ref(loose), weakref.ref(kept)
        del loose, kept
        gc.collect()
        assert gone() is None and there() is not None
    finally:
        gc.unfreeze()


@pytest.mark.parametrize(("host", "address"), [
    ("127.0.0.1", "127.0.0.1"), ("0.0.0.0", "127.0.0.1"), ("localhost", "127.0.0.1"), ("::", "[::1]"), ("[::1]", "[::1]"), ("2001:db8::1", "[2001:db8::1]"),
    ("chat.example", "chat.example"),
])  # fmt: skip
def test_pages_reach_the_server_whatever_it_listens_on(host: str, address: str) -> None:
    from plaudit import address_from_here

    assert address_from_here(host) == address
