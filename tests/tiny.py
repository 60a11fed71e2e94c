"""Tiny random models of real architectures, with a real tokenizer and chat template, made on the spot.

Nothing is downloaded. The weights are random, so the text is noise; what is exercised is the machinery.
"""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
TEXT = [
    "The moon is a ball of rock that goes round the Earth. People landed on it in 1969.",
    "Hello! How are you today? I am fine, thank you. What would you like to talk about?",
    "A list of three fruits: apple, banana, cherry. Bees make honey; cats like to sleep.",
    "naïve café déjà vu – “quotes” … 你好 🙂 emoji and other scripts: привет, שלום.",
]


def tiny_tokenizer(vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with a chat template, trained on a few sentences."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(TEXT, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tok, pad_token="<|pad|>", eos_token="<|end|>")
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_config(family: str, vocab_size: int, hidden: int = 64, layers: int = 2) -> object:
    """A transformers config of `family`: llama, qwen2, qwen3, mistral or gpt2."""
    common = {"vocab_size": vocab_size, "bos_token_id": None, "eos_token_id": 1, "pad_token_id": 0}
    if family == "gpt2":
        return AutoConfig.for_model(
            "gpt2", n_embd=hidden, n_layer=layers, n_head=4, n_positions=512,
            attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0, **common,
        )
    extra = {"head_dim": hidden // 4} if family == "qwen3" else {}
    return AutoConfig.for_model(
        family, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
        tie_word_embeddings=family != "mistral", **extra, **common,
    )


def tiny_model_dir(path: Path, family: str = "llama", *, hidden: int = 64, layers: int = 2, seed: int = 0) -> Path:
    """Save a random model of `family` with its tokenizer under `path` and return `path`.

    Weights are drawn wide (std 0.3), so that greedy decoding has clear winners and bugs cannot hide.
    """
    tokenizer = tiny_tokenizer()
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(family, len(tokenizer), hidden, layers))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.dim() > 1:
                p.copy_(torch.randn(p.shape, generator=generator) * 0.3 / (1 if "emb" in name or "wte" in name else 1.5))
            elif name.endswith("bias"):
                p.copy_(torch.randn(p.shape, generator=generator) * 0.1)
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
