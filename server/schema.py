"""What clients may send: the wire models of chat, votes and uploads, checked once at the edge.

OpenAI fields that Plaudit does not implement are taken at their neutral value and refused, by name, at any other.
Does not know what is stored or how replies are made.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StringConstraints,
    field_validator,
    model_validator,
)

MAX_N = 8
MAX_MESSAGES = 1000

# Values at which an OpenAI field changes nothing here. `...` takes any value: a hint without effect.
NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "frequency_penalty": (None, 0),
    "function_call": (None, "none"),
    "functions": (None, []),
    "logit_bias": (None, {}),
    "modalities": (None, ["text"]),
    "parallel_tool_calls": (None, True, False),
    "prediction": (None,),
    "presence_penalty": (None, 0),
    "prompt_cache_key": (...,),
    "prompt_cache_retention": (...,),
    "reasoning_effort": (None, "none"),
    "response_format": (None, {"type": "text"}),
    "safety_identifier": (...,),
    "service_tier": (None, "auto", "default"),
    "store": (None, False),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "top_logprobs": (None, 0),
    "verbosity": (None, "medium"),
    "web_search_options": (None,),
}


class Wire(BaseModel):
    """A body or a part of one: unknown fields are refused."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Body(Wire):
    """A whole body: text that is not Unicode (half a surrogate pair, which JSON lets through) is refused."""

    @model_validator(mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except (UnicodeEncodeError, RecursionError):
            raise ValueError("the body has characters that are not Unicode text, or is nested too deeply") from None
        return value


class TextPart(Wire):
    """One part of a message's content; only text is understood."""

    type: Literal["text"]
    text: str


def _parts(content: object) -> object:
    """A string as its one part, so that what is wrong with a part is told of that part."""
    if not isinstance(content, str | list):
        raise ValueError("send a string, or a list of text parts")
    return [TextPart(type="text", text=content)] if isinstance(content, str) else content


Nothing = Annotated[list[Any], Field(max_length=0)] | None


class Message(Wire):
    """One message of the conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], BeforeValidator(_parts, json_schema_input_type=str | list[TextPart])]
    name: str | None = Field(None, description="accepted and ignored")
    refusal: None = None  # OpenAI's other fields of a message, at their neutral value: clients send back what they were answered
    annotations: Nothing = None
    audio: None = None
    function_call: None = None
    tool_calls: Nothing = None

    def plain(self) -> dict[str, str]:
        """`{"role", "content"}` as chat templates and the store know it."""
        text = "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(Wire):
    """OpenAI's options of a streamed answer."""

    include_usage: StrictBool | None = False
    include_obfuscation: Literal[False] | None = None


StopString = Annotated[str, StringConstraints(min_length=1, max_length=256)]


def _as_list(stop: object) -> object:
    return [stop] if isinstance(stop, str) else stop


class ChatRequest(Body):
    """`POST /v1/chat/completions`."""

    model_config = ConfigDict(extra="allow", allow_inf_nan=False)

    model: Annotated[str, StringConstraints(min_length=1, max_length=128)] = "plaudit"
    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]
    n: Annotated[int, Field(ge=1, le=MAX_N, strict=True)] | None = 1
    stream: StrictBool | None = False
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2, strict=True)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1, strict=True)] | None = None
    max_tokens: Annotated[int, Field(ge=1, strict=True)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, strict=True)] | None = None
    stop: Annotated[
        Annotated[list[StopString], Field(max_length=4)] | None,
        BeforeValidator(_as_list, json_schema_input_type=StopString | Annotated[list[StopString], Field(max_length=4)] | None),
    ] = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63, strict=True)] | None = None
    logprobs: StrictBool | None = False
    user: Annotated[str, StringConstraints(max_length=512)] | None = None
    metadata: dict[str, Annotated[str, StringConstraints(max_length=512)]] | None = None

    @model_validator(mode="after")
    def _only_what_we_do(self) -> ChatRequest:
        for name, value in (self.model_extra or {}).items():
            if name not in NEUTRAL:
                raise ValueError(f"unknown field {name!r}")
            allowed = NEUTRAL[name]
            if ... not in allowed and not any((type(value) is type(a) and value == a) or _same_number(value, a) for a in allowed):
                raise ValueError(f"{name} is not supported here; leave it out or send {allowed[-1]!r}")
        if self.max_tokens is not None and self.max_completion_tokens not in (None, self.max_tokens):
            raise ValueError("max_tokens and max_completion_tokens differ; send one of them")
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options needs stream: true")
        last = self.messages[-1].plain()
        if last["role"] == "user" and not last["content"].strip():
            raise ValueError("the last message is empty")
        return self

    @property
    def length_limit(self) -> int | None:
        """The asked-for number of tokens, whichever name it came under."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def lets_choose(self) -> bool:
        """Whether the server may sample more than n replies and show those whose vote teaches most."""
        return (self.metadata or {}).get("choice") == "active" and self.temperature != 0

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return tuple(self.stop or ())


def _same_number(value: object, allowed: object) -> bool:
    numbers = (int, float)
    plain = isinstance(value, numbers) and not isinstance(value, bool)
    return plain and isinstance(allowed, numbers) and not isinstance(allowed, bool) and value == allowed


Comment = Annotated[str, StringConstraints(max_length=4000)]
Edit = Annotated[str, StringConstraints(min_length=1, max_length=32000)]


class VoteRequest(Body):
    """`PUT /v1/comparisons/{id}/vote`: exactly one of favourite, ranking and verdict."""

    favourite: Annotated[int, Field(ge=0, lt=MAX_N, strict=True)] | None = None
    ranking: list[Annotated[list[Annotated[int, Field(ge=0, lt=MAX_N, strict=True)]], Field(min_length=1)]] | None = None
    verdict: Literal["tie", "none"] | None = None
    edit: Edit | None = Field(None, description="a better reply, in the voter's words")
    comment: Comment | None = None

    @field_validator("ranking")
    @classmethod
    def _each_once(cls, groups: list[list[int]] | None) -> list[list[int]] | None:
        if groups is not None:
            named = [index for group in groups for index in group]
            if len(set(named)) != len(named):
                raise ValueError("a reply may stand in one place only")
            if not named:
                raise ValueError("a ranking names at least one reply")
        return groups

    @field_validator("edit")
    @classmethod
    def _says_something(cls, text: str | None) -> str | None:
        if text is not None and not text.strip():
            raise ValueError("an edit needs words")
        return text

    @model_validator(mode="after")
    def _one_judgement(self) -> VoteRequest:
        if sum(x is not None for x in (self.favourite, self.ranking, self.verdict)) != 1:
            raise ValueError("send exactly one of favourite, ranking and verdict")
        return self

    def judgement(self, n: int) -> tuple[str, list[list[int]]]:
        """(kind, groups) for a comparison of `n` replies; groups best first, ties grouped, the rest left out.

        Raises ValueError when it names a reply that was not shown, or says nothing about these replies.
        """
        named = [self.favourite] if self.favourite is not None else [i for g in self.ranking or [] for i in g]
        if any(index >= n for index in named):
            raise ValueError(f"there are only {n} replies, numbered from 0")
        if n == 1 and self.edit is None and self.verdict != "none":
            raise ValueError("one reply has nothing to be compared with; send an edit, or verdict none")
        if self.favourite is not None:
            rest = [index for index in range(n) if index != self.favourite]
            return "favourite", [[self.favourite], rest] if rest else [[self.favourite]]
        if self.ranking is not None:
            if n > 1 and len(named) == 1:
                raise ValueError("a ranking of one reply says nothing; send favourite, or name two or more")
            return "ranking", [sorted(group) for group in self.ranking]
        return ("tie", [list(range(n))]) if self.verdict == "tie" else ("none", [])


class UploadRequest(Wire):
    """`POST /v1/adapters`: a PEFT LoRA adapter. The one call with a large body."""

    adapter_config: dict[str, Any] = Field(description="the content of adapter_config.json")
    adapter_model: Annotated[str, StringConstraints(min_length=1)] = Field(
        description="adapter_model.safetensors, base64")
    comment: Annotated[str, StringConstraints(max_length=1000)] | None = None
