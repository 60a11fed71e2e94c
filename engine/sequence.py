"""One reply in the making: what was asked for, what has come so far, and why it ended.

Owns no tensors and no decisions; the scheduler and the engine fill it in.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from engine.stopping import StreamingText

FinishReason = Literal["stop", "length", "cancelled"]
COLD = 1e-6  # logits divided by less are no longer numbers
BASE = "base"  # the version that is the model without an adapter


@dataclass(frozen=True)
class SamplingParams:
    """How one reply is sampled. Raises ValueError when a value makes no sense."""

    temperature: float = 1.0  # 0 = greedy; so is anything below COLD
    top_p: float = 1.0  # nucleus: the fewest tokens whose probabilities reach it; 1 = all
    max_tokens: int = 256
    stop: tuple[str, ...] = ()  # the reply ends before the first of these
    seed: int = 0  # the same seed and prompt give the same reply, whatever else is running
    ignore_eos: bool = False  # go on to max_tokens (benchmarks)

    def __post_init__(self) -> None:
        if not 0 <= self.temperature <= 100:
            raise ValueError(f"temperature must be between 0 and 100, not {self.temperature}")
        if self.temperature < COLD:
            object.__setattr__(self, "temperature", 0.0)
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be above 0 and at most 1, not {self.top_p}")
        if self.max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {self.max_tokens}")
        if isinstance(self.stop, str) or not all(isinstance(s, str) and s for s in self.stop):
            raise ValueError("stop must be a tuple of strings that are not empty")


@dataclass(eq=False)
class Sequence:
    """One reply. `token_ids` has the end-of-sequence token where the reply ended with one; `text` does not."""

    id: int
    prompt_ids: list[int]
    params: SamplingParams
    version: str
    owner: str = ""  # whose it is; what was read for one owner is never reused for another
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)  # nats, one per token
    text: str = ""
    finish_reason: FinishReason | None = None
    streaming: StreamingText | None = field(default=None, repr=False)

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def cached(self) -> int:
        """Tokens whose keys and values are stored: all but the newest, which the next step feeds."""
        return len(self.prompt_ids) + len(self.token_ids) - 1


@dataclass(eq=False)
class PromptRead:
    """A prompt to be read once for all the replies to it that one version writes."""

    prompt_ids: list[int]
    version: str
    sequences: list[Sequence]
    owner: str = ""
    done: int = 0  # prompt tokens read so far

    @property
    def left(self) -> int:
        return len(self.prompt_ids) - self.done
