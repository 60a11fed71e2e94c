"""The command line. Owns what a person types and reads in a terminal; the work is done by the packages.

Each command imports what it needs when it runs, so `plaudit --help` answers at once. A failure that a person can
mend is one line on stderr and exit status 2; anything else is a bug and shows its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import gc
import inspect
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, get_origin
from urllib.parse import urlsplit

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before torch: spinning threads starve the learner and the server
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import typer
from pydantic_core import PydanticUndefined
from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TaskID
from rich.table import Table

from learner.tastes import NAMES
from server.settings import Settings, SettingsError, explain, is_loopback, load_settings

app = typer.Typer(
    name="plaudit",
    help="A self-hosted chat assistant that learns from its users while they use it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
keys = typer.Typer(help="Make, list and revoke API keys. A running server notices at once.", no_args_is_help=True)
adapters = typer.Typer(help="The versions of a running server: list, promote, roll back.", invoke_without_command=True)
reward = typer.Typer(help="The reward models that rounds have saved: test one on a file of preferences.", no_args_is_help=True)
app.add_typer(keys, name="keys")
app.add_typer(adapters, name="adapters")
app.add_typer(reward, name="reward")
out = Console()

Url = Annotated[str, typer.Option(envvar="PLAUDIT_URL", help="address of the running server")]
ApiKey = Annotated[str | None, typer.Option("--key", envvar="PLAUDIT_KEY", help="API key; none needed on loopback while nobody has one")]
DataDir = Annotated[Path | None, typer.Option(help="directory that holds all state  \\[default: plaudit-data]")]
ModelName = Annotated[str | None, typer.Option(help="base model: a directory or a hub id  \\[default: the bundled starter model]")]
DEFAULT_URL = "http://127.0.0.1:7860"
NONE_GOOD = -1  # a pick in `plaudit chat`


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
    from httpx import HTTPError, InvalidURL

    from server.errors import StartupError
    from store.errors import StoreError

    try:
        yield
    except (SettingsError, StartupError, StoreError) as error:
        fail(error)
    except OSError as error:
        fail(f"{error.filename}: {error.strerror}" if error.filename else error)
    except InvalidURL as error:
        fail(f"this is no address of a server: {error}")
    except HTTPError as error:
        fail(f"no answer from the server ({error or type(error).__name__}). Is `plaudit serve` running there?")


@contextlib.contextmanager
def plain_model_errors() -> Iterator[None]:
    """`plain_errors`, and those of the model, of versions and of data that does not fit them."""
    from engine.lora import AdapterError
    from engine.source import ModelError
    from learner.config import ConfigError
    from learner.evaluate import EvaluationError
    from learner.prompts import PromptsError
    from learner.sft import SFTError

    with plain_errors():
        try:
            yield
        except (AdapterError, ModelError, ConfigError, EvaluationError, SFTError, PromptsError) as error:
            fail(str(error).splitlines()[0])


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
        default = "" if field.default in (None, (), PydanticUndefined) else f"  \\[default: {field.default}]"
        if name == "model":
            default = "  \\[default: the bundled starter model]"
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
    # The protocol is named, or asyncio does not know it for TCP and leaves Nagle's algorithm on: what is streamed then waits 40 ms for an acknowledgement.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
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

    Settings come from these flags, PLAUDIT_* environment variables and plaudit.toml (in the working directory, or the
    file that PLAUDIT_CONFIG names), in that order; `plaudit config` shows what is in force.
    """
    with plain_errors():
        settings = load_settings(**flags)
        sock = listening_socket(settings.host, settings.port)
        port = sock.getsockname()[1]
        out.print(f"Loading {settings.model} ...", markup=False, highlight=False)

        local = f"http://{address_from_here(settings.host)}:{port}"
        with kept_for_good():
            import ui
            from server.app import create_app
            from server.serve import make_server

            server = make_server(ui.mount(create_app(settings), local, building=kept_for_good), settings)
        out.print(f"Plaudit: {local}   operator page: {local}/operator   Ctrl-C stops.", highlight=False)
        with sock, contextlib.suppress(SystemExit):  # uvicorn's, of a start that failed
            server.run(sockets=[sock])
        if not server.started:
            raise SystemExit(2)  # the reason has been told by the application


@contextlib.contextmanager
def kept_for_good() -> Iterator[None]:
    """What is made here stays until the process ends, so the garbage collector need not look at it, now or later.

    A look through all that a server imports takes 180 ms of one core: a fifth of its start goes to such looks, and later
    each would hold up every reply that is being written.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def address_from_here(host: str) -> str:
    """Where this machine reaches a server that listens on `host`."""
    bare = host.strip("[]")
    found = {"0.0.0.0": "127.0.0.1", "localhost": "127.0.0.1", "::": "::1"}.get(bare, bare)
    return f"[{found}]" if ":" in found else found


@app.command()
@settings_options
def config(**flags: Any) -> None:
    """Print every setting in force and where it comes from. Takes the same flags as `serve`."""
    with plain_errors():
        table = Table("setting", "value", "from", "meaning")
        for name, value, where, meaning in explain(**flags):
            table.add_row(name, escape(str(value)), where, escape(meaning))
        out.print(table)


# ------------------------------------------------------------------------------------------------ learn


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def learn(context: typer.Context) -> None:
    """Run the learner by hand (beside `plaudit serve --no-learner`). `plaudit learn --help` lists its options."""
    from learner.worker import main as worker
    from server.supervisor import learner_options

    with plain_errors():
        settings = load_settings()
    raise SystemExit(worker([*learner_options(settings), *context.args]))  # what is given here comes last, and counts


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []})
def starter(context: typer.Context) -> None:
    """Train a starter model from its corpus generator on, as the bundled one began; learner/starter/README.md has all its sittings. `plaudit starter --help` lists its options."""
    from learner.starter.recipe import main as recipe

    raise SystemExit(recipe(context.args))


@app.command()
def sft(
    file: Annotated[Path, typer.Argument(help="chats: messages, Alpaca, Super-NaturalInstructions task, or prompt and references")],
    data_dir: DataDir = None,
    model: ModelName = None,
    parent: Annotated[str, typer.Option(help="the version to start from: base, live or v000001")] = "base",
    name: Annotated[str | None, typer.Option(help="a word or two for people, kept in the manifest")] = None,
    passes: Annotated[int | None, typer.Option(min=1, help="over the chats at most; the best one is kept  \\[default: 8]")] = None,
    lr: Annotated[float | None, typer.Option(help="peak learning rate  \\[default: 0.001]")] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="of a new adapter  \\[default: 16]")] = None,
    minutes: Annotated[float | None, typer.Option(min=0, help="stop after these with the best pass  \\[default: no limit]")] = None,
    held_out: Annotated[float, typer.Option(min=0.01, max=0.9, help="share of prompts kept to measure on")] = 0.1,
    seed: Annotated[int, typer.Option(help="of the split, the order and the new weights")] = 0,
) -> None:
    """Finetune a LoRA adapter on instruction data and publish it as a candidate version. Prints JSON last.

    FILE is .jsonl or .json, also .gz; only what the assistant says is learned (Alpaca's rows without a reply are left out).
    Works beside a running server, which takes the version in; `plaudit adapters promote` makes it live, and from then on PPO
    measures KL against it.
    """
    import dataclasses

    with plain_model_errors():
        from learner.config import FOREVER, SFTRoundConfig
        from learner.finetune import publish_finetuned
        from learner.formats import read_instructions
        from learner.versions import named_version, open_model
        from store import AdapterRegistry

        given = {"passes": passes, "lr": lr, "lora_r": rank, "lora_alpha": None if rank is None else 2 * rank}
        seconds = FOREVER if minutes is None else 60 * minutes
        config = SFTRoundConfig(**{k: v for k, v in given.items() if v is not None}, max_seconds=seconds)
        chats = [item.chat for item in read_instructions(file)]
        settings = load_settings(data_dir=data_dir, model=model)
        start = named_version(settings.data_dir, parent)
        base, tokenizer = open_model(settings.model, settings.device, settings.dtype)
        with progress_bar("finetuning") as progress:
            manifest, result = publish_finetuned(
                base, tokenizer, chats, config, AdapterRegistry(settings.data_dir / "adapters"), parent=start, name=name,
                held_out=held_out, seed=seed, progress=lambda done, words: progress(round(1000 * done), 1000),
            )
    if result.loss_before is None:
        out.print("too few prompts to hold any out: whether it learned more than these chats is not measured")
    else:
        out.print(f"on {result.held_out} chats held out: {result.loss_before:.3f} -> {result.loss_after:.3f} nats a token, "
                  f"after {result.kept} of {result.passes} passes over {result.chats} chats", highlight=False)
    out.print(f"{manifest.version} published, a candidate: `plaudit adapters promote {manifest.version}` makes it live", highlight=False)
    print(json.dumps({"version": manifest.version, "parent": start, **dataclasses.asdict(result)}))


# ------------------------------------------------------------------------------------------------ measuring


@app.command("eval")
def evaluate(
    version: Annotated[str | None, typer.Argument(help="live, base or v000001  \\[default: live]", show_default=False)] = None,
    against: Annotated[str, typer.Option(help="the version to compare with: live, base or v000001")] = "base",
    mmlu: Annotated[Path | None, typer.Option(help="folder of MMLU's *_test.csv and *_dev.csv")] = None,
    task: Annotated[list[Path] | None, typer.Option(help="text to generate, scored by ROUGE-L; repeat for several")] = None,
    preferences: Annotated[Path | None, typer.Option(help="pairs that a saved reward model is to order")] = None,
    win_rate: Annotated[bool, typer.Option("--win-rate", help="replies of both, judged blind by a saved reward model")] = False,
    probe: Annotated[bool, typer.Option("--probe", help="the bundled known answers; the default where nothing is named")] = False,
    prompts: Annotated[Path | None, typer.Option(help="for --win-rate: a prompt a line, or JSONL  \\[default: the starter's held-out ones]")] = None,
    round_number: Annotated[int | None, typer.Option("--round", help="whose reward model  \\[default: the newest saved]")] = None,
    shots: Annotated[int, typer.Option(min=0, max=50, help="solved questions before each of MMLU's")] = 5,
    task_shots: Annotated[int, typer.Option(min=0, max=10, help="positive examples before each of a Super-NaturalInstructions task's")] = 2,
    limit: Annotated[int | None, typer.Option(min=1, help="items of each benchmark at most, drawn by --seed")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="of a generated reply")] = 96,
    seed: Annotated[int, typer.Option(help="of what is drawn")] = 0,
    data_dir: DataDir = None,
    model: ModelName = None,
    as_json: Annotated[bool, typer.Option("--json", help="JSON as the last line")] = False,
) -> None:
    """Measure a version against another: MMLU, generated text, known answers, a reward model's blind choice.

    Every figure has its 95% interval; the difference is paired, item by item. Only reads, needs no running server, and
    with --model alone measures that model directory.
    """
    with plain_model_errors():
        from learner import evaluate as asking
        from learner.formats import read_instructions
        from learner.mmlu import read_mmlu
        from learner.prompts import conversations_from
        from learner.reward_eval import evaluate_reward, learned_prompts, load_reward, saved_round
        from learner.versions import load_version, named_version, open_model
        from store import AdapterRegistry, RoundFiles, read_preferences

        # 1. Everything that may be missing is looked at before the model loads.
        settings = load_settings(data_dir=data_dir, model=model)
        where = settings.data_dir
        first = version or ("base" if model and data_dir is None else "live")
        names = list(dict.fromkeys(named_version(where, name) for name in (first, against)))
        subjects = read_mmlu(mmlu, shots) if mmlu else None
        tasks = [(file.name, read_instructions(file, shots=task_shots)) for file in task or ()]
        pairs = read_preferences(preferences) if preferences else None
        said = [list(prompt) for prompt in conversations_from(prompts, held_out=True)] if win_rate else []
        rounds = RoundFiles(where / "rounds")
        judge = saved_round(rounds, round_number) if win_rate or pairs else None
        if win_rate and len(names) < 2:
            fail(f"--win-rate needs two different versions, and both are {names[0]}: name one, and another with --against")

        # 2. The model, the versions, the judge.
        base, tokenizer = open_model(settings.model, settings.device, settings.dtype)
        registry = AdapterRegistry(where / "adapters")
        adapters = {name: load_version(base, registry, name, f"eval-{name}") for name in names}
        members, record = load_reward(base, rounds, judge) if judge is not None else (None, {})

        # 3. The figures.
        figures, report = [], None
        if subjects:
            with progress_bar("mmlu") as bar:
                figures.append(asking.mmlu(base, tokenizer, adapters, subjects, limit=limit, seed=seed, progress=bar))
        for name, items in tasks:
            with progress_bar(name) as bar:
                figures.append(asking.generation(
                    base, tokenizer, adapters, items, name=name, max_tokens=max_tokens, limit=limit, seed=seed, progress=bar))
        if win_rate and members:
            with progress_bar("blind win rate") as bar:
                figures.append(asking.blind_win_rate(
                    base, tokenizer, adapters, members, said, max_tokens=max_tokens, limit=limit, seed=seed, progress=bar))
        if pairs and members:
            with progress_bar("preferences") as bar:
                chosen = asking.some(pairs, limit, seed)
                report = evaluate_reward(members, tokenizer, chosen, learned=learned_prompts(where, record), seed=seed, progress=bar)
        if probe or not (figures or report):
            with progress_bar("known answers") as bar:
                figures += asking.known_answers(base, tokenizer, adapters, bar)
    if figures:
        out.print(figures_table(figures, names))
    if report:
        show_reward(report, judge)
    if as_json:
        about = {"model": str(settings.model), "versions": names, "round": judge, "seed": seed}
        print(json.dumps({**about, "figures": [figure.to_dict() for figure in figures], "reward": report}, allow_nan=False))


def figures_table(figures: list[Any], names: list[str]) -> Table:
    """Every figure as a row, a column a version, and what the first is ahead of the second."""
    pair = len(names) == 2
    table = Table("benchmark", "measure", "items", *names, *(["difference"] if pair else []))
    for figure in figures:
        unit = "nats" in figure.metric
        cells = [estimate(figure.values[name], unit) if name in figure.values else "" for name in names]
        ahead = ""
        if figure.difference is not None:
            d = figure.difference
            sure = d.low is not None and not d.low <= 0 <= d.high
            colour = ("green" if (d.value > 0) == (figure.better == "higher") else "red") if sure else "default"
            ahead = f"[{colour}]{estimate(d, unit, signed=True)}[/]"
        measure = figure.metric + (" (lower is better)" if figure.better == "lower" else "")
        table.add_row(figure.benchmark, "\n".join([measure, *figure.notes]), str(figure.items), *cells, *([ahead] if pair else []))
    return table


def estimate(value: Any, unit: bool, *, signed: bool = False) -> str:
    """`61.0%` over `(52.1 to 69.2)`, or with a unit of its own `2.31` over `(2.20 to 2.42)`."""
    scale, digits, sign = (1.0, 2, "") if unit else (100.0, 1, "%")
    plus = "+" if signed else ""
    whole = f"{value.value * scale:{plus}.{digits}f}{sign}"
    if value.low is None:
        return whole
    return f"{whole}\n({value.low * scale:{plus}.{digits}f} to {value.high * scale:{plus}.{digits}f})"


@reward.command("eval")
def reward_eval(
    file: Annotated[Path, typer.Argument(help=".jsonl or .json, also .gz, of chosen, rejected, and optionally prompt and voter")],
    data_dir: DataDir = None,
    round_number: Annotated[int | None, typer.Option("--round", help="whose reward model  \\[default: the newest saved]")] = None,
    model: ModelName = None,
    limit: Annotated[int | None, typer.Option(min=1, help="rows at most, drawn by --seed")] = None,
    seed: Annotated[int, typer.Option(help="of the draw, and of the length baseline's folds")] = 0,
    as_json: Annotated[bool, typer.Option("--json", help="JSON as the last line")] = False,
) -> None:
    """Test a round's saved reward model on preferences: how often right, how well calibrated, and is it only length?

    Takes TRL's conversational format, with and without `prompt`, and plain strings. Rows on prompts that the model
    learned from are left out and counted. Only reads.
    """
    with plain_model_errors():
        from learner.evaluate import some
        from learner.reward_eval import evaluate_reward, learned_prompts, load_reward, saved_round
        from learner.versions import open_model
        from store import RoundFiles, read_preferences

        pairs = some(read_preferences(file), limit, seed)
        settings = load_settings(data_dir=data_dir, model=model)
        rounds = RoundFiles(settings.data_dir / "rounds")
        number = saved_round(rounds, round_number)
        base, tokenizer = open_model(settings.model, settings.device, settings.dtype)
        members, record = load_reward(base, rounds, number)
        with progress_bar(file.name) as bar:
            report = evaluate_reward(members, tokenizer, pairs, learned=learned_prompts(settings.data_dir, record), seed=seed, progress=bar)
    show_reward(report, number)
    if as_json:
        print(json.dumps({"round": number, **report}, allow_nan=False))


def show_reward(report: dict[str, Any], number: int | None) -> None:
    """The report of `reward eval` as a table, and the verdict."""
    table = Table(f"reward model of round {number}", "")

    def interval(name: str) -> str:
        found = report[name]
        return f"{found['value']:.1%} ({found['low']:.1%} to {found['high']:.1%})"

    table.add_row("pairs tested", str(report["comparisons"]))
    table.add_row("right", interval("accuracy"))
    table.add_row("length alone", interval("length_only"))
    table.add_row("calibration error (ECE)", f"{report['ece']:.3f}")
    table.add_row("Brier (a coin: 0.25)", f"{report['brier']:.3f}")
    for name, words in (("learned_from", "left out: it learned from them"), ("refused", "left out: refused by the chat template")):
        if report[name]:
            table.add_row(words, str(report[name]))
    out.print(table)
    out.print(report["words"], highlight=False)


# ------------------------------------------------------------------------------------------------ talking to a server


class Refused(Exception):
    """The server said no; its own message."""


def ask(method: str, url: str, key: str | None, path: str, **kwargs: Any) -> Any:
    """One JSON call. Raises Refused; ends with a line when no server of ours is there."""
    import httpx

    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with plain_errors():
        near = is_loopback(urlsplit(url).hostname or "")  # then no proxy of the environment's should see the words
        answer = httpx.request(method, url.rstrip("/") + path, headers=headers, timeout=120, trust_env=not near, **kwargs)
    try:
        found = answer.json()
        if answer.is_success:
            return found
        message = found["error"]["message"]
    except (ValueError, KeyError, TypeError):
        fail(f"{url} answers, with status {answer.status_code}, but not as a Plaudit server does. Is the address right?")
    raise Refused(message)


def request(method: str, url: str, key: str | None, path: str, **kwargs: Any) -> Any:
    """The same, where a refusal is the end."""
    try:
        return ask(method, url, key, path, **kwargs)
    except Refused as refused:
        fail(refused)


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
        try:
            answer = ask("POST", url, key, "/v1/chat/completions", json=body)
        except Refused as refused:  # too long, too many, too slow: what was said before stands
            messages.pop()
            out.print(f"not answered: {refused}", markup=False, highlight=False)
            continue
        conversation = answer["plaudit"]["conversation_id"]
        replies = [choice["message"]["content"] for choice in answer["choices"]]
        for number, reply in enumerate(replies, 1):
            out.print(f"{number}: " if n > 1 else "", reply, markup=False, highlight=False)
        pick = ask_for_pick(n) if n > 1 else None
        if pick is not None:
            path = f"/v1/comparisons/{answer['plaudit']['comparison_id']}/vote"
            try:
                ask("PUT", url, key, path, json={"verdict": "none"} if pick == NONE_GOOD else {"favourite": pick})
            except Refused as refused:
                out.print(f"your pick is not saved: {refused}", markup=False, highlight=False)
        if pick == NONE_GOOD:
            messages.pop()  # nothing of it goes on, as in the page
            out.print("your message is left out of what follows: say it again to get other replies", highlight=False)
        else:
            messages.append({"role": "assistant", "content": replies[pick or 0]})


def ask_for_pick(n: int) -> int | None:
    """A reply's index, NONE_GOOD, or None for no vote."""
    while True:
        try:
            answer = out.input(f"[dim]favourite 1-{n}, 0 for none, Enter for no vote:[/] ").strip()
        except (EOFError, KeyboardInterrupt):
            return None
        if not answer:
            return None
        if answer.isdecimal() and int(answer) <= n:
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
    taste: Annotated[str, typer.Option(help=NAMES)] = "shorter",
    votes: Annotated[int, typer.Option(min=1, help="votes to cast")] = 60,
    noise: Annotated[float, typer.Option(min=0, max=0.5, help="share of votes that go the wrong way")] = 0.1,
    voters: Annotated[int, typer.Option(min=1, help="how many people vote (where the server asks for keys, one: the key's)")] = 4,
    random_voters: Annotated[float, typer.Option(min=0, max=1, help="share of the voters who pick at random, such as 0.2 of 5")] = 0.0,
    n: Annotated[int, typer.Option("--n", "-n", min=2, max=8, help="replies in each comparison")] = 4,
    prompts: Annotated[Path | None, typer.Option(help="a prompt a line, or JSONL  \\[default: the starter's]")] = None,
    seed: Annotated[int, typer.Option(help="of prompts, tastes and noise")] = 0,
    url: Url = DEFAULT_URL,
    key: ApiKey = None,
) -> None:
    """Voters with a known taste chat with a running server and pick their favourites. Prints JSON last."""
    import dataclasses

    from learner.prompts import PromptsError, conversations_from
    from learner.simulate import SimulateError
    from learner.simulate import simulate as run

    with plain_errors(), progress_bar(f"{taste}: votes") as progress:
        try:
            report = run(
                url, conversations_from(prompts), taste,
                votes=votes, noise=noise, voters=voters, random_voters=random_voters, n=n, seed=seed, key=key, progress=progress,
            )
        except (SimulateError, PromptsError) as error:
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
            ring = Keyring(load_settings(data_dir=data_dir).data_dir)
            first = not len(ring)
            print(ring.create(role, voter))
        except ValueError as error:
            fail(error)
    if first:
        Console(stderr=True).print("From now on everyone needs a key, on loopback as well.")


@keys.command("list")
def list_keys(data_dir: DataDir = None) -> None:
    """List the keys: id, role, voter. Never the keys themselves."""
    from server.auth import Keyring

    with plain_errors():
        table = Table("id", "role", "voter")
        for key in Keyring(load_settings(data_dir=data_dir).data_dir).list():
            table.add_row(key.id, key.role, escape(key.voter))
        out.print(table)


@keys.command("revoke")
def revoke_key(key_id: Annotated[str, typer.Argument(help="as in `plaudit keys list`")], data_dir: DataDir = None) -> None:
    """Revoke a key. Requests that carry it are refused from then on."""
    from server.auth import Keyring

    with plain_errors():
        ring = Keyring(load_settings(data_dir=data_dir).data_dir)
        if not ring.revoke(key_id):
            fail(f"there is no key {key_id}; `plaudit keys list` shows them")
        if not len(ring):
            Console(stderr=True).print("No key is left: whoever can reach the server on this machine is an operator again, without one; a public server lets nobody in.")


@app.command()
def export(
    format: Annotated[str, typer.Option(help="preference (TRL's prompt/chosen/rejected), preference-implicit, ranking or demonstration")] = "preference",
    data_dir: DataDir = None,
) -> None:
    """Write the votes as JSONL to standard output, with the server running or not."""
    from store import Store
    from store.exports import EXPORTS

    if format not in EXPORTS:
        fail(f"unknown format {format}: {', '.join(EXPORTS)}")
    with plain_errors(), contextlib.closing(Store.open(load_settings(data_dir=data_dir).data_dir, read_only=True)) as store:
        try:
            for row in store.export(format):
                sys.stdout.write(json.dumps(row, ensure_ascii=False) + "\n")
            sys.stdout.flush()
        except BrokenPipeError:  # `| head` has read enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # what Python flushes at its end has to go somewhere


@app.command("import")
def import_votes(
    file: Annotated[Path, typer.Argument(help=".jsonl or .json, also .gz, of chosen, rejected, and optionally prompt and voter")],
    data_dir: DataDir = None,
) -> None:
    """Read people's preferences into the data directory as votes. The server must not be running there.

    All of the file or nothing: a bad line is named, and nothing is taken in.
    """
    from server.auth import VoterHash
    from store import Store, import_preferences

    with plain_errors(), contextlib.closing(Store.open(load_settings(data_dir=data_dir).data_dir)) as store:
        with progress_bar(file.name) as progress:
            count = import_preferences(store, file, hash_voter=VoterHash(store.data_dir), progress=progress)
        out.print(f"{count} votes taken in")


@app.command()
def doctor(data_dir: DataDir = None) -> None:
    """Check this machine and the data directory, and say what is wrong and what to do. Exit status 1 if anything is."""
    from importlib.metadata import version

    import torch

    from engine import native
    from server.auth import Keyring
    from server.errors import StartupError
    from server.settings import STARTER
    from store import AdapterRegistry, CorruptAdapter, NoDatabase, Store, StoreError, durability

    bad = 0

    def row(good: bool, what: str, finding: object) -> None:
        nonlocal bad
        bad += not good
        out.print(f"[{'green' if good else 'red'}]{'ok ' if good else 'BAD'}[/] {what}: {escape(str(finding))}", highlight=False)

    with plain_errors():
        settings = load_settings(data_dir=data_dir)
    row(sys.version_info >= (3, 11), "python", sys.version.split()[0])
    packages = ("torch", "transformers", "peft", "gradio", "fastapi", "sqlite-utils")
    row(True, "packages", ", ".join(f"{name} {version(name)}" for name in packages))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none, the CPU does the work"
    row(True, "gpu", gpu)
    row(True, "threads", f"{torch.get_num_threads()} of {os.cpu_count()} cores, OMP_WAIT_POLICY={os.environ['OMP_WAIT_POLICY']}")
    row(True, "decoding on the CPU", "in C" if native.library() is not None else "by torch, more slowly: install a C compiler, then `make -B venv`")
    row(True, "sqlite", durability())
    starter_there = (STARTER / "config.json").is_file()
    row(starter_there, "starter model", STARTER if starter_there else f"missing from {STARTER}: restore it from the checkout, or make one with `plaudit starter --out {STARTER}`")
    directory = settings.data_dir
    if not directory.exists():
        above = next(path for path in directory.absolute().parents if path.exists())
        allowed = os.access(above, os.W_OK)
        row(allowed, "data directory", f"{directory} is not there yet; " + ("`plaudit serve` makes it" if allowed else f"{above} cannot be written"))
        raise SystemExit(int(bad > 0))
    allowed = os.access(directory, os.W_OK)
    row(allowed, "data directory", directory if allowed else f"{directory} cannot be written: give this user permission")
    try:
        with contextlib.closing(Store.open(directory, read_only=True)) as store:
            row(True, "votes", store.vote_counts().standing)
            row(store.verify_audit(), "audit log", "every entry hangs on the one before")
    except NoDatabase as error:
        row(True, "database", error)
    except StoreError as error:
        row(False, "database", error)
    registry = AdapterRegistry(directory / "adapters")
    try:
        for name in registry.versions():
            try:
                row(True, name, f"digest {registry.verify(name).sha256[:12]} holds")
            except CorruptAdapter as error:
                row(False, name, error)
        count = len(Keyring(directory))
        row(True, "keys", f"{count}, and everyone needs one" if count else "0: nobody needs one on loopback, and everyone there is an operator")
    except StartupError as error:
        row(False, "keys", error)
    except OSError as error:
        row(False, "files", f"{error.filename}: {error.strerror}")
    raise SystemExit(int(bad > 0))


if __name__ == "__main__":
    main()
