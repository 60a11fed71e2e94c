"""Which prompts a round practises on and which its version is judged on, of people's own and of a pool's.

Owns the choice, and that a prompt's side stays what it was. Does not own reading prompts (`learner/prompts.py`) or what is done with them.
"""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from learner.config import LearnerConfig
from learner.data import Renderer, prompt_key
from learner.prompts import POOL, PromptsError, conversations_from


@dataclass(frozen=True)
class Prompts:
    """Token ids of the prompts of one round: what PPO practises on, and what the gate asks. They share none.

    judging: keys (`data.prompt_key`) of all prompts of people's that are on the gate's side, those too long to be asked included:
    nothing that stands there may be learned by heart.
    """

    practice: tuple[tuple[int, ...], ...]
    held_out: tuple[tuple[int, ...], ...]
    judging: frozenset[str]


def choose_prompts(voted: Sequence[Any], tokenizer: Renderer, config: LearnerConfig, seed: int) -> Prompts:
    """People's own prompts, a share of them held out for the gate; the operator's pool, or else the bundled one, makes up
    the numbers on both sides. A pool that an operator gave is half of the practice at least. Raises PromptsError.

    A handful of prompts is too few to practise on without learning them by heart, and far too few to tell two
    versions apart by; the bundled ones are plain things to say to an assistant. Which side a prompt is on does not depend on the round: it goes
    by the conversations that asked it, of which one on the practice side is enough, or by the pool where that has it (`held_out_side`). So a
    version is not judged on what those it comes from practised (but for a prompt whose every practising conversation was withdrawn since),
    and of a conversation only what another one said word for word can be on the other side.
    """
    rng = random.Random(f"prompts/{seed}")
    half = config.gate.prompts / (config.gate.prompts + config.practice_prompts)
    pool = rendered(((said, first_turn(said)) for said in conversations_from(Path(config.pool) if config.pool else POOL)), tokenizer, config.prompt_tokens)
    asked = [([{"role": m["role"], "content": m["content"]} for m in c.messages], str(c.conversation_id)) for c in (item.comparison for item in voted)]
    own, conversations = rendered(asked, tokenizer, config.prompt_tokens), dict[str, set[str]]()
    for messages, conversation in asked:
        conversations.setdefault(prompt_key(messages), set()).add(conversation)
    belong = {key: ({pool[key][0]}, half) if key in pool else (owners, config.held_out_prompts) for key, owners in conversations.items()}
    judging = frozenset(key for key, (owners, share) in belong.items() if all(held_out_side(owner, share, config.seed) for owner in owners))
    practice, held_out = list[tuple[int, ...]](), list[tuple[int, ...]]()
    for key in shuffled(own, rng):
        (held_out if key in judging else practice).append(own[key][1])
    wanted = max(config.practice_prompts, 2 * len(practice) if config.pool else 0)
    for key in shuffled(pool.keys() - own.keys(), rng):
        belongs, ids = pool[key]
        if held_out_side(belongs, half, config.seed):
            if len(held_out) < config.gate.prompts:
                held_out.append(ids)
        elif len(practice) < wanted:
            practice.append(ids)
    if not practice or not held_out:
        few = f"{len(own.keys() | pool.keys())} prompts of at most {config.prompt_tokens} tokens are too few"
        raise PromptsError(f"{few} to practise on some and be judged on others: give a longer pool")
    return Prompts(tuple(practice), tuple(held_out), judging)


def first_turn(messages: Sequence[Any]) -> str:
    """Key of a conversation's messages up to the first of the user's."""
    first = next((i for i, m in enumerate(messages) if m["role"] == "user"), 0)
    return prompt_key(messages[: first + 1])


def rendered(prompts: Iterable[tuple[Sequence[Any], str]], tokenizer: Renderer, most: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """(messages, what it belongs to) each -> {key of the messages: (what the first such belongs to, token ids)}.

    Left out is what the chat template refuses, and what has more than `most` tokens.
    """
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for messages, belongs in prompts:
        key = prompt_key(messages)
        if key not in found:
            with contextlib.suppress(ValueError):
                found[key] = belongs, tuple(tokenizer.render(list(messages)))
    return {key: (belongs, ids) for key, (belongs, ids) in found.items() if len(ids) <= most}


def shuffled(keys: Iterable[str], rng: random.Random) -> list[str]:
    """In an order that is `rng`'s alone."""
    order = sorted(keys)
    rng.shuffle(order)
    return order


def held_out_side(key: str, share: float, seed: int) -> bool:
    """Whether what has this key is among the `share` that is kept for judging; the same in every round of a learner."""
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
