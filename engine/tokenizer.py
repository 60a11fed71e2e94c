"""Text to token ids and back: the chat template, and streaming text that never shows half a character.

Owns the tokenizer. Does not know the model, stop strings (`engine/stopping.py`) or sampling.
"""

from __future__ import annotations

import re
import secrets
from functools import cached_property
from pathlib import Path
from typing import Any

from engine.source import ModelError, eos_ids, first_line, read_json, resolve

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
WINDOW = 16  # tokens
WHOLE = ("TokenizersBackend", "PreTrainedTokenizerFast")  # classes that add nothing to tokenizer.json


class ChatTokenizer:
    """A Hugging Face tokenizer that has a chat template."""

    def __init__(self, tokenizer: Any, eos_ids: tuple[int, ...]) -> None:
        self.hf = tokenizer
        tokenizer.encode("", add_special_tokens=False)  # transformers sets the shared backend up at the first call: from then on nothing changes it
        self.fast = getattr(tokenizer, "backend_tokenizer", None)
        self.eos_ids = eos_ids
        self.pad_id: int = next(i for i in (tokenizer.pad_token_id, *eos_ids, 0) if i is not None)
        added = {
            i for i, token in tokenizer.added_tokens_decoder.items() if token.special
        }  # role marks and the like
        self.special_ids = frozenset(tokenizer.all_special_ids) | frozenset(eos_ids) | added

    @classmethod
    def load(cls, source: str | Path) -> ChatTokenizer:
        """From a local directory or a hub id. Raises ModelError when there is no tokenizer or no chat template."""
        directory = resolve(source)
        about = read_json(directory / "tokenizer_config.json")
        whole = about.get("tokenizer_class") in WHOLE and (directory / "tokenizer.json").is_file()
        import transformers  # which imports what is asked of it and no more: the auto class takes a second longer

        kind: Any = transformers.PreTrainedTokenizerFast if whole else transformers.AutoTokenizer
        try:
            tokenizer = kind.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # any of a dozen types, all meaning: no usable tokenizer here
            there = (directory / "tokenizer.json").is_file()
            why = first_line(error) if there else "there is no tokenizer.json in it"
            raise ModelError(f"{source} has no tokenizer that can be loaded: {why}") from error
        if not tokenizer.chat_template:
            raise ModelError(
                f"{source} has no chat template: use a chat (instruct) model, or set chat_template in its "
                "tokenizer_config.json"
            )
        own = () if tokenizer.eos_token_id is None else (tokenizer.eos_token_id,)
        ends = tuple(dict.fromkeys((*eos_ids(directory), *own)))
        if not ends:
            raise ModelError(
                f"{source} names no end-of-sequence token: set eos_token in its tokenizer_config.json"
            )
        return cls(tokenizer, ends)

    @classmethod
    def of(cls, tokenizer: Any) -> ChatTokenizer:
        """A Hugging Face tokenizer whose own end token, and no other, ends turns."""
        return cls(tokenizer, (tokenizer.eos_token_id,))

    def render(self, messages: list[dict], *, generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation `[{"role", "content"}, ...]` under the chat template.

        What somebody writes is text, also where it spells a special token: only the template ends turns and begins them.
        Raises ValueError, with the template's own words, when the template refuses the conversation.
        """
        from jinja2.exceptions import TemplateError

        nonce = secrets.token_hex(8) if any(self.spelled.search(m["content"]) for m in messages) else None
        opened, closed = f"\ue000{nonce}", f"\ue001{nonce}"  # nobody can guess them, so nobody can write them
        if nonce:
            messages = [{**m, "content": self.spelled.sub(lambda found: opened + found.group() + closed, m["content"])} for m in messages]
        try:
            made = self.hf.apply_chat_template(
                messages, tokenize=nonce is None, add_generation_prompt=generation_prompt, return_dict=False,
                tokenizer_kwargs={"verbose": False},  # what is too long is refused by who knows the model
            )  # fmt: skip
        except TemplateError as error:
            raise ValueError(f"the model's chat template refuses this conversation: {error}") from error
        if nonce is None:
            return made
        parts = re.split(f"{opened}(.*?){closed}", made, flags=re.S)  # every second one is somebody's
        if any(nonce in part for part in parts[::2]):  # half of a pair, or written otherwise
            raise ValueError("the model's chat template changes text that spells a special token: leave that out")
        known: dict[tuple[str, bool], list[int]] = {}  # a message may spell a token ten thousand times
        ids: list[int] = []
        for i, part in enumerate(parts):
            said = part, bool(i % 2)
            if said not in known:
                known[said] = self.encode(part) if i % 2 else self.hf.encode(part, add_special_tokens=False, verbose=False)
            ids += known[said]
        return ids

    @cached_property
    def spelled(self) -> re.Pattern[str]:
        """Matches what a special token is spelled like."""
        special = {str(t) for t in self.hf.added_tokens_decoder.values() if t.special} | set(self.hf.all_special_tokens)
        return re.compile("|".join(re.escape(s) for s in sorted(special, key=len, reverse=True)) or "(?!)")

    def tokens_with(self, pattern: str, vocab_size: int) -> list[bool]:
        """For every token id below `vocab_size`, whether its text holds a match of the regular expression; ids without a token do not."""
        found, known = re.compile(pattern), min(vocab_size, len(self.hf))
        texts = self.hf.batch_decode([[i] for i in range(known)], skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return [bool(found.search(text)) for text in texts] + [False] * (vocab_size - known)

    @cached_property
    def end_id(self) -> int:
        """The end token that the chat template puts after a reply, for a reply that nobody sampled.

        Of several end tokens the first need not be it: Llama 3 names <|end_of_text|> first and ends turns with <|eot_id|>.
        """
        try:
            chat = self.render([{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], generation_prompt=False)
        except ValueError:
            chat = []
        return next((i for i in reversed(chat) if i in self.eos_ids), self.eos_ids[0])

    def encode(self, text: str) -> list[int]:
        """Token ids of plain text, no special tokens added; one that is spelled out in it is text too."""
        if self.literal is None:
            return self.hf.encode(text, add_special_tokens=False, split_special_tokens=True)
        return self.literal.encode(text, add_special_tokens=False).ids

    @cached_property
    def literal(self) -> Any:
        """A copy of the fast tokenizer that knows no special tokens in text; None where there is no fast one.

        transformers would switch the one that all threads share to and fro for it: another thread's template then comes out as text, and
        somebody's text as marks of the template.
        """
        if self.fast is None:
            return None
        copy = type(self.fast).from_str(self.fast.to_str())
        copy.encode_special_tokens = True
        copy.no_truncation()
        copy.no_padding()
        return copy

    def decode(self, ids: list[int]) -> str:
        """Text of `ids`, special tokens left out, spaces exactly as the tokens have them."""
        ids = [i for i in ids if i not in self.special_ids]
        if (
            self.fast is not None
        ):  # the same as below without its layers of argument handling; it runs at every token
            return self.fast.decode(ids)
        return self.hf.decode(ids, clean_up_tokenization_spaces=False)


class IncrementalText:
    """Decodes a growing sequence token by token, holding back what may still become another character.

    What `push` and `flush` return, joined, is `decode` of all the ids (bytes that are no UTF-8 may become another number
    of U+FFFD with decoders that judge whole runs of bytes, such as Llama 2's). Only a window of recent tokens is decoded, so a
    push costs the same late in a reply as early.
    """

    def __init__(self, tokenizer: ChatTokenizer) -> None:
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.start = 0  # the window is ids[start:]
        self.given = 0  # characters of the window's text that were given out
        self.whole = 0  # a length of ids, before the last, whose text ends in a whole character

    def push(self, token_id: int) -> str:
        """The text that is now certain, "" while a character is incomplete."""
        if token_id in self.tokenizer.special_ids:
            return ""
        self.ids.append(token_id)
        text = self.tokenizer.decode(self.ids[self.start :])
        certain = text.rstrip(REPLACEMENT)  # trailing bytes that are not yet a character
        new, self.given = certain[self.given :], max(self.given, len(certain))
        if certain == text:
            if (
                len(self.ids) - self.start > WINDOW
            ):  # move on, keeping tokens before it: some decoders trim the first
                self.start = self.whole
                self.given = len(self.tokenizer.decode(self.ids[self.start :]))
            self.whole = len(self.ids)
        return new

    def flush(self) -> str:
        """What was held back, at the end of the reply (an incomplete character shows as U+FFFD)."""
        text = self.tokenizer.decode(self.ids[self.start :])
        new, self.given = text[self.given :], len(text)
        return new
