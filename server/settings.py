"""Settings: every knob of `plaudit serve`, its default, and where a value came from.

Order: flags, then `PLAUDIT_*` environment variables, then `plaudit.toml`, then defaults. Frozen once read.
Does not open files other than the toml, and does not know what the knobs do.
"""

from __future__ import annotations

import ipaddress
import os
import shlex
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from limits import parse_many
from pydantic import Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

STARTER = Path(__file__).parents[1] / "learner" / "starter" / "assistant"


class SettingsError(Exception):
    """A flag, environment variable or line of plaudit.toml has no good value; the message names it."""


class Settings(BaseSettings):
    """What `create_app` needs to know. Build it with `load_settings`, or directly in tests."""

    model_config = SettingsConfigDict(env_prefix="PLAUDIT_", frozen=True, extra="forbid", protected_namespaces=())

    host: str = Field("127.0.0.1", min_length=1, description="address to listen on; anything but loopback needs keys")
    port: int = Field(7860, ge=0, le=65535, description="port to listen on; 0 takes a free one")
    data_dir: Path = Field(Path("plaudit-data"), description="directory that holds all state")
    model: str = Field(str(STARTER), min_length=1, description="local directory or hub id of a chat model")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="weights' type; auto is bfloat16 on CUDA and float32 on CPU")
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N; auto is CUDA where there is one")
    int8: bool = Field(False, description="on a CPU, weights of 8 bits: faster with larger models, and no longer quite the same model")
    threads: int = Field(0, ge=0, le=1024, description="CPU threads of the model at most, 0 for torch's choice; while the learner trains its own are left to it")
    max_sequences: int = Field(32, ge=1, le=1024, description="replies decoded side by side")
    max_context: int | None = Field(None, ge=16, description="tokens of prompt and reply; default the model's own")
    max_queue: int = Field(256, ge=1, description="replies that may wait for a slot before 429")
    reuse_mb: int = Field(
        256, ge=0, description="MiB for what was read before, so that the next turn of a conversation starts sooner; 0 = off")
    max_tokens: int = Field(1024, ge=1, description="longest reply in tokens, and the default length cap")
    temperature: float | None = Field(
        None, gt=0, le=2, description="temperature of requests that name none; default the model's own (its generation_config.json), else 1")
    top_p: float | None = Field(None, gt=0, le=1, description="top-p of requests that name none; default the model's own, else 1")
    request_timeout_s: float = Field(120.0, gt=0, description="deadline of one chat request, in seconds")
    grace_s: float = Field(20.0, ge=0, description="how long running requests may finish at shutdown, in seconds")
    max_body_bytes: int = Field(256 * 1024, ge=1024, description="largest request body")
    max_upload_bytes: int = Field(64 * 1024 * 1024, ge=1024, description="largest body of an adapter upload")
    round_votes: int = Field(16, ge=1, description="new votes that start a round of learning")
    promotion: Literal["auto", "canary", "manual"] = Field(
        "auto", description="what a version that passed its gate becomes: live (unless another went live meanwhile), candidate in the mix, or candidate")
    mix_share: float = Field(
        0.5, ge=0, le=1, description="share of comparisons (n >= 2) that mix the live version with the other one")
    candidates: int = Field(
        0, ge=0, le=32, description="replies sampled where a client lets the server choose what to show; 0 = no choosing")
    random_share: float = Field(
        0.25, gt=0, le=1, description="share of those comparisons left to chance, which unbiased figures are made of")
    abtest_odds: float = Field(
        20.0, gt=1, description="odds at which people's votes promote or roll back (20 = one false alarm in 20)")
    learner: bool = Field(True, description="run the learner as a supervised child process")
    learner_args: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="further arguments of the learner, as on `plaudit learn`")
    learner_threads: int = Field(1, ge=1, le=1024, description="CPU threads of the learner child")
    learner_nice: int = Field(10, ge=0, le=19, description="how far the learner child steps back for serving")
    seed: int | None = Field(None, ge=0, description="seed of the server's own draws; default the system's randomness")
    rate_chat: str = Field("1200/minute", description="chat requests per voter")
    rate_requests: str = Field("6000/minute", description="requests of any kind per voter")
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severe line logged")

    @field_validator("learner_args", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return tuple(shlex.split(value)) if isinstance(value, str) else value

    @field_validator("rate_chat", "rate_requests")
    @classmethod
    def _rate(cls, value: str) -> str:
        try:
            (rate,) = parse_many(value)  # `parse` drops all but the first
            if rate.amount < 1:
                raise ValueError
        except ValueError:
            raise ValueError(f"{value!r} is not a rate; write it like 60/minute") from None
        return value

    @property
    def loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        return is_loopback(self.host)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        return init_settings, env_settings, _toml(settings_cls)


def _toml_path() -> Path:
    return Path(os.environ.get("PLAUDIT_CONFIG", "plaudit.toml"))


def _toml(settings_cls: type[BaseSettings]) -> TomlConfigSettingsSource:
    return TomlConfigSettingsSource(settings_cls, toml_file=_toml_path())


@lru_cache
def is_loopback(host: str) -> bool:
    """Whether `host` (a name or an address, IPv6 also in brackets) is this machine's loopback."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def load_settings(**flags: Any) -> Settings:
    """Settings from flags (those not None), environment, toml and defaults. Raises `SettingsError` in one line."""
    given = {name: value for name, value in flags.items() if value is not None}
    if (path := _toml_path()).is_dir() or ("PLAUDIT_CONFIG" in os.environ and not path.exists()):
        raise SettingsError(f"there is no settings file at {path}")
    try:
        return Settings(**given)
    except ValidationError as error:
        where = _sources(given)
        lines = []
        for e in error.errors():
            name = str(e["loc"][0]) if e["loc"] else "settings"
            said = "there is no such setting" if e["type"] == "extra_forbidden" else e["msg"].removeprefix("Value error, ")
            lines.append(f"{name} ({where.get(name, 'default')}): {said}")
        raise SettingsError("; ".join(lines)) from None
    except (ValueError, OSError) as error:  # a toml that does not parse
        raise SettingsError(f"{_toml_path()}: {error}") from None


def explain(**flags: Any) -> list[tuple[str, Any, str, str]]:
    """(name, value in force, where it came from, meaning) of every setting, for `plaudit config`."""
    given = {name: value for name, value in flags.items() if value is not None}
    settings, where = load_settings(**given), _sources(given)
    return [
        (name, getattr(settings, name), where.get(name, "default"), field.description or "")
        for name, field in Settings.model_fields.items()
    ]


def _sources(flags: dict[str, Any]) -> dict[str, str]:
    """Where each given setting came from, the strongest source last to write."""
    where: dict[str, str] = {}
    for name in _toml(Settings)():
        where[name] = str(_toml_path())
    environment = {key.upper() for key in os.environ}
    for name in Settings.model_fields:
        if f"PLAUDIT_{name.upper()}" in environment:
            where[name] = f"PLAUDIT_{name.upper()}"
    for name in flags:
        where[name] = "flag --" + name.replace("_", "-")
    return where
