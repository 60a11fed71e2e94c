"""The command line. Owns what a person types and reads in a terminal; the work is done by the packages.

Each command imports what it needs when it runs, so `plaudit --help` answers at once. A failure that a person can
mend is one line on stderr and exit status 2; anything else is a bug and shows its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_origin

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads starve the learner and the server
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import typer
from pydantic_core import PydanticUndefined
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table

from server.settings import Settings, SettingsError, explain, load_settings

app = typer.Typer(
    name="plaudit",
    help="A self-hosted chat assistant that learns from its users while they use it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
keys = typer.Typer(help="Make, list and revoke API keys. A running server notices at once.", no_args_is_help=True)
adapters = typer.Typer(help="The versions of a running server: list, promote, roll back.", invoke_without_command=True)
app.add_typer(keys, name="keys")
app.add_typer(adapters, name="adapters")
out = Console()

Url = Annotated[str, typer.Option(envvar="PLAUDIT_URL", help="address of the running server")]
ApiKey = Annotated[str | None, typer.Option("--key", envvar="PLAUDIT_KEY", help="API key; none needed on loopback")]
DataDir = Annotated[Path | None, typer.Option(help="directory that holds all state  [default: plaudit-data]")]
DEFAULT_URL = "http://127.0.0.1:7860"


def main() -> None:
    """Entry point of the `plaudit` script."""
    app()


def fail(message: object) -> NoReturn:
    """One line for the person, exit status 2."""
    print(f"plaudit: {message}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def plain_errors() -> Iterator[None]:
    """Turn every named error of our packages, and of the disk and the network, into one line."""
    from httpx import HTTPError

    from server.errors import StartupError
    from store.errors import StoreError

    try:
        yield
    except (SettingsError, StartupError, StoreError) as error:
        fail(error)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else error)
    except HTTPError as error:
        fail(f"no answer from the server ({error or type(error).__name__}). Is `plaudit serve` running there?")


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function `(done, total)` that draws a bar on stderr from its first call on."""
    with contextlib.ExitStack() as stack:
        bar = Progress(console=Console(stderr=True))
        tasks: list[TaskID] = []

        def show(done: int, total: int) -> None:
            if not tasks:
                stack.enter_context(bar)
                tasks.append(bar.add_task(what))
            bar.update(tasks[0], completed=done, total=total)

        yield show


# ------------------------------------------------------------------------------------------------ serve


def settings_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give `command(**flags)` one flag for each field of `Settings`; a flag not given stays None."""
    parameters = []
    for name, field in Settings.model_fields.items():
        kind: Any = field.annotation
        flag = "--" + name.replace("_", "-")
        if get_origin(kind) is Literal:
            kind = str
        elif kind not in (int, float, bool, Path):
            kind = int if "int" in str(kind) else str
        default = "" if field.default in (None, (), PydanticUndefined) else f"  [default: {field.default}]"
        if name == "model":
            default = "  [default: the bundled starter model]"
        names = (f"{flag}/--no-{flag[2:]}",) if kind is bool else (flag,)
        option = typer.Option(*names, help=f"{field.description}{default}", show_default=False)
        annotation = Annotated[kind | None, option]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def listening_socket(host: str, port: int) -> socket.socket:
    """Bind before the model loads, so that a taken port is told at once. Raises SystemExit with a clear line."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host.strip("[]"), port))
        sock.listen(128)  # a second server's bind may pass on some systems; its listen does not
    except OSError as error:
        sock.close()
        if error.errno == errno.EADDRINUSE:
            fail(f"port {port} is taken by another program. Stop it, or choose another with --port {port + 1}")
        fail(f"cannot listen on {host}:{port}: {error.strerror or error}")
    return sock


@app.command()
@settings_options
def serve(**flags: Any) -> None:
    """Start the chat pages, the API, the engine and the learner, on one port.

    Settings come from these flags, PLAUDIT_* environment variables and plaudit.toml, in that order;
    `plaudit config` shows what is in force.
    """
    with plain_errors():
        settings = load_settings(**flags)
        sock = listening_socket(settings.host, settings.port)
        port = sock.getsockname()[1]
        out.print(f"Loading {settings.model} ...", highlight=False)

        import ui
        from server.app import create_app
        from server.serve import make_server

        local = f"http://{address_from_here(settings.host)}:{port}"
        server = make_server(ui.mount(create_app(settings), local), settings)
        out.print(f"Plaudit: {local}   operator page: {local}/operator   Ctrl-C stops.", highlight=False)
        server.run(sockets=[sock])
        if not server.started:
            raise SystemExit(2)  # the reason has been told by the application


def address_from_here(host: str) -> str:
    """Where this machine reaches a server that listens on `host`."""
    everywhere = {"0.0.0.0": "127.0.0.1", "localhost": "127.0.0.1", "::": "[::1]", "::1": "[::1]"}
    return everywhere.get(host.strip("[]"), host)


@app.command()
@settings_options
def config(**flags: Any) -> None:
    """Print every setting in force and where it comes from. Takes the same flags as `serve`."""
    with plain_errors():
        table = Table("setting", "value", "from", "meaning")
        for name, value, where, meaning in explain(**flags):
            table.add_row(name, str(value), where, meaning)
        out.print(table)


# ------------------------------------------------------------------------------------------------ learn


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def learn(context: typer.Context) -> None:
    """Run the learner by hand (beside `plaudit serve --no-learner`). `plaudit learn --help` lists its options."""
    from learner.worker import main as worker

    raise SystemExit(worker(context.args))


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def starter(context: typer.Context) -> None:
    """Make the bundled starter model again, from its corpus generator on. `plaudit starter --help` lists its options."""
    from learner.starter.recipe import main as recipe

    raise SystemExit(recipe(context.args))


# ------------------------------------------------------------------------------------------------ talking to a server


def request(method: str, url: str, key: str | None, path: str, **kwargs: Any) -> Any:
    """One JSON call; the server's own message on a refusal."""
    import httpx

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with plain_errors():
        answer = httpx.request(method, url.rstrip("/") + path, headers=headers, timeout=120, **kwargs)
        if answer.is_success:
            return answer.json()
    try:
        message = answer.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = f"status {answer.status_code} from {url}"
    fail(message)


@app.command()
def chat(
    url: Url = DEFAULT_URL,
    key: ApiKey = None,
    n: Annotated[int, typer.Option("--n", "-n", min=1, max=8, help="replies to choose from")] = 2,
    model: Annotated[str, typer.Option(help="plaudit, plaudit@base or plaudit@v000001")] = "plaudit",
) -> None:
    """Chat with a running server from the terminal: type, pick a reply by its number, go on. Ctrl-D ends."""
    messages: list[dict[str, str]] = []
    conversation: str | None = None
    while True:
        try:
            text = out.input("[bold]you:[/] ").strip()
        except (EOFError, KeyboardInterrupt):
            out.print()
            return
        if not text:
            continue
        messages.append({"role": "user", "content": text})
        body: dict[str, Any] = {"model": model, "messages": messages, "n": n}
        if conversation:
            body["metadata"] = {"conversation_id": conversation}
        answer = request("POST", url, key, "/v1/chat/completions", json=body)
        conversation = answer["plaudit"]["conversation_id"]
        replies = [choice["message"]["content"] for choice in answer["choices"]]
        for number, reply in enumerate(replies, 1):
            out.print(f"{number}: " if n > 1 else "", reply, markup=False, highlight=False)
        pick = ask_for_pick(n) if n > 1 else None
        if pick is not None:
            path = f"/v1/comparisons/{answer['plaudit']['comparison_id']}/vote"
            request("PUT", url, key, path, json={"favourite": pick} if pick >= 0 else {"verdict": "none"})
        messages.append({"role": "assistant", "content": replies[max(pick or 0, 0)]})


def ask_for_pick(n: int) -> int | None:
    """A reply's index, -1 for none of them, None for no vote."""
    while True:
        try:
            answer = out.input(f"[dim]favourite 1-{n}, 0 for none, Enter for no vote:[/] ").strip()
        except (EOFError, KeyboardInterrupt):
            return None
        if not answer:
            return None
        if answer.isdigit() and int(answer) <= n:
            return int(answer) - 1


@adapters.callback()
def list_adapters(context: typer.Context, url: Url = DEFAULT_URL, key: ApiKey = None) -> None:
    """List the versions of a running server."""
    context.obj = (url, key)
    if context.invoked_subcommand:
        return
    answer = request("GET", url, key, "/v1/adapters")
    table = Table("version", "status", "parent", "round", "win rate", "sha256")
    for row in answer["data"]:
        win = row.get("win_rate")
        rate = win.get("rate") if isinstance(win, dict) else win
        cells = (row["version"], row["status"], row.get("parent") or "", row.get("round") or "")
        table.add_row(*map(str, cells), "" if rate is None else f"{rate:.2f}", (row.get("sha256") or "")[:12])
    out.print(table)


@adapters.command()
def promote(context: typer.Context, version: Annotated[str, typer.Argument(help="v000001, or base")]) -> None:
    """Make VERSION the live one. Running replies finish on the version they began with."""
    url, key = context.obj
    out.print(f"live: {request('POST', url, key, f'/v1/adapters/{version}/promote')['live']}")


@adapters.command()
def rollback(context: typer.Context) -> None:
    """Go back to the version that was live before."""
    url, key = context.obj
    out.print(f"live: {request('POST', url, key, '/v1/adapters/rollback')['live']}")


@app.command()
def simulate(
    taste: Annotated[str, typer.Option(help="shorter, longer, friendly, formal, list, or random:SEED")] = "shorter",
    votes: Annotated[int, typer.Option(min=1, help="votes to cast")] = 60,
    noise: Annotated[float, typer.Option(min=0, max=0.5, help="share of votes that go the wrong way")] = 0.1,
    voters: Annotated[int, typer.Option(min=1, help="how many people vote")] = 4,
    n: Annotated[int, typer.Option("--n", "-n", min=2, max=8, help="replies in each comparison")] = 4,
    prompts: Annotated[Path | None, typer.Option(help="a prompt a line, or JSONL  [default: the starter's]")] = None,
    seed: Annotated[int, typer.Option(help="of prompts, tastes and noise")] = 0,
    url: Url = DEFAULT_URL,
    key: ApiKey = None,
) -> None:
    """Voters with a known taste chat with a running server and pick their favourites. Prints JSON last."""
    import dataclasses

    from learner.simulate import SimulateError, prompts_from
    from learner.simulate import simulate as run

    with plain_errors(), progress_bar(f"{taste}: votes") as progress:
        try:
            report = run(
                url, prompts_from(prompts), taste,
                votes=votes, noise=noise, voters=voters, n=n, seed=seed, key=key, progress=progress,
            )
        except SimulateError as error:
            fail(error)
    print(json.dumps(dataclasses.asdict(report)))


# ------------------------------------------------------------------------------------------------ data directory


@keys.command("add")
def add_key(
    voter: Annotated[str, typer.Argument(help="who will use it; one person, one voter")],
    role: Annotated[str, typer.Option(help="user, or operator")] = "user",
    data_dir: DataDir = None,
) -> None:
    """Make a key and print it. It is shown once: only its hash is kept."""
    from server.auth import Keyring

    with plain_errors():
        try:
            print(Keyring(load_settings(data_dir=data_dir).data_dir).create(role, voter))  # type: ignore[arg-type]
        except ValueError as error:
            fail(error)


@keys.command("list")
def list_keys(data_dir: DataDir = None) -> None:
    """List the keys: id, role, voter. Never the keys themselves."""
    from server.auth import Keyring

    with plain_errors():
        table = Table("id", "role", "voter")
        for key in Keyring(load_settings(data_dir=data_dir).data_dir).list():
            table.add_row(key.id, key.role, key.voter)
        out.print(table)


@keys.command("revoke")
def revoke_key(key_id: Annotated[str, typer.Argument(help="as in `plaudit keys list`")], data_dir: DataDir = None) -> None:
    """Revoke a key. Requests that carry it are refused from then on."""
    from server.auth import Keyring

    with plain_errors():
        if not Keyring(load_settings(data_dir=data_dir).data_dir).revoke(key_id):
            fail(f"there is no key {key_id}; `plaudit keys list` shows them")


@app.command()
def export(
    format: Annotated[str, typer.Option(help="preference (TRL's prompt/chosen/rejected), preference-implicit, ranking or demonstration")] = "preference",
    data_dir: DataDir = None,
) -> None:
    """Write the votes as JSONL to standard output, with the server running or not."""
    from store import Store
    from store.store import EXPORTS

    if format not in EXPORTS:
        fail(f"unknown format {format}: {', '.join(EXPORTS)}")
    with plain_errors(), contextlib.closing(Store.open(load_settings(data_dir=data_dir).data_dir, read_only=True)) as store:
        for row in store.export(format):
            sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")


@app.command("import")
def import_votes(
    file: Annotated[Path, typer.Argument(help=".jsonl or .json, also .gz, of chosen, rejected, and optionally prompt and voter")],
    data_dir: DataDir = None,
) -> None:
    """Read people's preferences into the data directory as votes. The server must not be running there.

    All of the file or nothing: a bad line is named, and nothing is taken in.
    """
    from store import Store, import_preferences

    with plain_errors(), contextlib.closing(Store.open(load_settings(data_dir=data_dir).data_dir)) as store:
        with progress_bar(file.name) as progress:
            count = import_preferences(store, file, progress=progress)
        out.print(f"{count} votes taken in")


@app.command()
def doctor(data_dir: DataDir = None) -> None:
    """Check this machine and the data directory, and say what is wrong and what to do. Exit status 1 if anything is."""
    from importlib.metadata import version

    import torch

    from server.auth import Keyring
    from server.settings import STARTER
    from store import AdapterRegistry, CorruptAdapter, Store, StoreError, durability

    bad = 0

    def row(good: bool, what: str, finding: object) -> None:
        nonlocal bad
        bad += not good
        out.print(f"[{'green' if good else 'red'}]{'ok ' if good else 'BAD'}[/] {what}: {finding}", highlight=False)

    with plain_errors():
        settings = load_settings(data_dir=data_dir)
    row(sys.version_info >= (3, 11), "python", sys.version.split()[0])
    packages = ("torch", "transformers", "peft", "gradio", "fastapi", "sqlite-utils")
    row(True, "packages", ", ".join(f"{name} {version(name)}" for name in packages))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none, the CPU does the work"
    row(True, "gpu", gpu)
    row(True, "threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores, OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']}")
    row(True, "sqlite", durability())
    starter_there = (STARTER / "config.json").is_file()
    row(starter_there, "starter model", STARTER if starter_there else f"missing from {STARTER}: make it with `plaudit starter`")
    directory = settings.data_dir
    if not directory.exists():
        row(os.access(directory.resolve().parent, os.W_OK), "data directory", f"{directory} is not there yet; `plaudit serve` makes it")
        raise SystemExit(int(bad > 0))
    row(os.access(directory, os.W_OK), "data directory", directory)
    try:
        with contextlib.closing(Store.open(directory, read_only=True)) as store:
            row(True, "votes", store.vote_counts().standing)
            row(store.verify_audit(), "audit log", "every entry hangs on the one before")
    except StoreError as error:
        row(False, "database", error)
    registry = AdapterRegistry(directory / "adapters")
    for name in registry.versions():
        try:
            row(True, name, f"digest {registry.verify(name).sha256[:12]} holds")
        except CorruptAdapter as error:
            row(False, name, error)
    row(True, "keys", f"{len(Keyring(directory))} (none are needed on loopback)")
    raise SystemExit(int(bad > 0))


if __name__ == "__main__":
    main()
