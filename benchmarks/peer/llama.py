"""llama.cpp (through llama-cpp-python) as a contestant of `benchmarks/llama.py`. Run by the peers' interpreter.

Owns the conversion of a Llama's weights to a GGUF file and the driving of llama.cpp's batches as its own server does it: K replies to a
prompt share its cells, people have a stretch of cells each, and every step decodes all of them at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import llama_cpp as ll
import numpy as np
from safetensors.torch import load_file

from benchmarks.contest import Finished, Turns

NAMES = {
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
}  # fmt: skip
READ = 512  # prompt tokens put in at a time


def interleaved(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection in the order that llama.cpp's rotation pairs them."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def convert(source: Path, target: Path, kind: str) -> Path:
    """The Llama in `source` as a GGUF file, in f32 or q8_0; its tokens get names, as only their numbers are used."""
    config = json.loads((source / "config.json").read_text("utf-8"))
    vocab, heads = config["vocab_size"], config["num_attention_heads"]
    out = gguf.GGUFWriter(target, "llama")
    out.add_vocab_size(vocab)
    out.add_context_length(config["max_position_embeddings"])
    out.add_embedding_length(config["hidden_size"])
    out.add_block_count(config["num_hidden_layers"])
    out.add_feed_forward_length(config["intermediate_size"])
    out.add_head_count(heads)
    out.add_head_count_kv(config["num_key_value_heads"])
    out.add_layer_norm_rms_eps(config["rms_norm_eps"])
    out.add_rope_dimension_count(config["hidden_size"] // heads)
    out.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    out.add_tokenizer_model("llama")
    out.add_token_list([f"t{i}" for i in range(vocab)])
    out.add_token_scores([0.0] * vocab)
    out.add_token_types([gguf.TokenType.NORMAL] * vocab)
    out.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if kind == "q8" else gguf.LlamaFileType.ALL_F32)
    for name, tensor in load_file(source / "model.safetensors").items():
        w = tensor.float().numpy()
        part, _, _ = name.removeprefix("model.").rpartition(".")
        if part == "embed_tokens":
            name = "token_embd.weight"
        elif part == "norm":
            name = "output_norm.weight"
        else:
            _, layer, rest = part.split(".", 2)
            if NAMES[rest] in ("attn_q", "attn_k"):
                w = interleaved(w, heads if NAMES[rest] == "attn_q" else config["num_key_value_heads"])
            name = f"blk.{layer}.{NAMES[rest]}.weight"
        if kind == "q8" and w.ndim == 2:
            q8 = gguf.GGMLQuantizationType.Q8_0
            out.add_tensor(name, gguf.quants.quantize(w, q8), raw_dtype=q8)
        else:
            out.add_tensor(name, w)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return target


@dataclass
class Running:
    """A reply that is being written in a sequence of its own."""

    sampler: Any
    position: int  # of the next token that is put in
    left: int  # tokens still to be written
    last: int = 0


class Llama:
    """One model, and a context for K replies to one prompt or for people with a prompt each."""

    def __init__(self, file: Path, threads: int) -> None:
        ll.llama_backend_init()
        params = ll.llama_model_default_params()
        self.model = ll.llama_model_load_from_file(str(file).encode(), params)
        assert self.model, f"llama.cpp cannot read {file}"
        self.vocab, self.threads = ll.llama_vocab_n_tokens(ll.llama_model_get_vocab(self.model)), threads
        self.batch = ll.llama_batch_init(READ, 0, 1)
        self.contexts: dict[tuple[int, bool], Any] = {}

    def context(self, sequences: int, room: int, shared: bool) -> Any:
        """For so many sequences of so many tokens; shared: a prompt's cells are there once."""
        if (sequences, shared) not in self.contexts:
            params = ll.llama_context_default_params()
            params.n_ctx, params.n_seq_max, params.kv_unified = room * sequences, sequences, shared
            params.n_batch = params.n_ubatch = READ
            params.n_threads = params.n_threads_batch = self.threads
            params.type_k = params.type_v = ll.GGML_TYPE_F32  # as ours, and as exact
            self.contexts[sequences, shared] = ll.llama_init_from_model(self.model, params)
            assert self.contexts[sequences, shared], "llama.cpp made no context"
        return self.contexts[sequences, shared]

    def decode(self, context: Any, tokens: list[tuple[int, int, int, bool]]) -> None:
        """(token, position, sequence, whether its logits are wanted) each."""
        for at, (token, position, sequence, wanted) in enumerate(tokens):
            self.batch.token[at], self.batch.pos[at], self.batch.seq_id[at][0] = token, position, sequence
            self.batch.n_seq_id[at], self.batch.logits[at] = 1, wanted
        self.batch.n_tokens = len(tokens)
        assert ll.llama_decode(context, self.batch) == 0, "llama.cpp could not decode"

    def __call__(self, prompts: list[list[int]], replies: int, new: int, greedy: bool) -> list[list[int]]:
        """`new` tokens of each reply, `replies` to a prompt."""
        count = len(prompts) * replies
        context = self.context(count, 512, replies > 1)
        memory = ll.llama_get_memory(context)
        ll.llama_memory_clear(memory, False)
        samplers = [ll.llama_sampler_init_greedy() if greedy else ll.llama_sampler_init_dist(i) for i in range(count)]
        said: list[list[int]] = [[] for _ in range(count)]
        for i, prompt in enumerate(prompts):
            first = i * replies
            for at in range(0, len(prompt), READ):
                part = prompt[at : at + READ]
                self.decode(context, [(t, at + j, first, at + j == len(prompt) - 1) for j, t in enumerate(part)])
            for other in range(first + 1, first + replies):
                ll.llama_memory_seq_cp(memory, first, other, -1, -1)
            for s in range(first, first + replies):
                said[s].append(ll.llama_sampler_sample(samplers[s], context, -1))
        for step in range(new - 1):
            self.decode(context, [(said[s][-1], len(prompts[s // replies]) + step, s, True) for s in range(count)])
            for s in range(count):
                said[s].append(ll.llama_sampler_sample(samplers[s], context, s))
        for sampler in samplers:
            ll.llama_sampler_free(sampler)
        return said

    def as_they_come(self, requests: list[tuple[float, list[int], int]], slots: int, unified: bool) -> None:
        """(seconds after the start, prompt, tokens wanted) each, in order of arrival: every step decodes who is being answered and reads one new prompt with them.

        unified: one pool of cells for all, which one pass decodes, else a stretch of cells each, of which llama.cpp takes neighbours in one pass.
        """
        context = self.context(slots, 512, unified)
        memory = ll.llama_get_memory(context)
        ll.llama_memory_clear(memory, False)
        waiting, free, running = list(requests), list(range(slots)), dict[int, Running]()
        began = time.perf_counter()
        while waiting or running:
            tokens = [(r.last, r.position, s, True) for s, r in running.items()]
            if waiting and free and waiting[0][0] <= time.perf_counter() - began:
                _, prompt, new = waiting.pop(0)
                free.remove(sequence := min(free))  # neighbours, as far as there are
                running[sequence] = Running(ll.llama_sampler_init_dist(len(waiting)), 0, new)
                tokens += [(t, j, sequence, j == len(prompt) - 1) for j, t in enumerate(prompt)]
            if not tokens:
                time.sleep(max(0.0, waiting[0][0] - (time.perf_counter() - began)))
                continue
            tokens.sort(key=lambda token: (token[2], token[1]))
            self.decode(context, tokens)
            for at, (_, position, sequence, wanted) in enumerate(tokens):
                if wanted:
                    reply = running[sequence]
                    reply.last, reply.position = ll.llama_sampler_sample(reply.sampler, context, at), position + 1
                    reply.left -= 1
            for sequence in [s for s, r in running.items() if not r.left]:
                ll.llama_sampler_free(running.pop(sequence).sampler)
                ll.llama_memory_seq_rm(memory, sequence, -1, -1)
                free.append(sequence)


def main() -> None:
    """Take turns until the parent has had enough. argv: the model's directory, a folder for the GGUF file, f32 or q8."""
    turns = Turns()
    source, folder, kind = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3]
    llama = Llama(convert(source, folder / f"{kind}.gguf", kind), int(os.environ["OMP_NUM_THREADS"]))
    with contextlib.suppress(Finished):
        while True:
            asked = turns.wait()
            if "people" in asked:
                llama.as_they_come(asked["people"], asked["slots"], asked["unified"])
                turns.say()
                continue
            said = llama(asked["prompts"], asked["replies"], asked["new"], asked["greedy"])
            turns.say(tokens=said if asked["greedy"] else None)


if __name__ == "__main__":
    main()
