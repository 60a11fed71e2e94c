"""The recipe of the bundled starter model: tokenizer, pretraining, instruction finetuning, save. `plaudit starter` runs it.

Everything is made from the corpus of this package by a seed; nothing is downloaded. Owns the model's shape and the
order of the stages; the loop itself is `learner/sft.py`.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoTokenizer,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from engine.tokenizer import ChatTokenizer
from learner.sft import (
    Example,
    SFTConfig,
    TrainResult,
    encode_chat,
    encode_text,
    fast_bf16,
    token_loss,
    train,
)
from learner.starter import corpus, repeats
from learner.starter.repeats import Unlikely

HERE = Path(__file__).parent
ASSISTANT = HERE / "assistant"
PAD, END = "<|pad|>", "<|end|>"
SPECIAL = [PAD, END, "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TOP_P = 0.98  # what a reply is sampled with unless asked otherwise: the least likely tokens are mostly slips
CONTEXT = 2048  # positions; training text is far shorter, rotary embeddings carry the rest
# Words with their leading space, single digits, runs of punctuation, line ends: so that merges never cross words.
SPLIT = r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


@dataclass(frozen=True)
class Recipe:
    """Sizes and lengths of the whole build."""

    vocab_size: int = 3072
    hidden: int = 256
    layers: int = 5
    heads: int = 4
    intermediate: int = 640
    articles: int = 40_000
    chats: int = 240_000
    seed: int = 0
    seconds: float = field(default_factory=lambda: 600.0 if torch.cuda.is_available() else 5400.0)  # of training, both stages
    steps: int | None = None  # instead of seconds: a repeatable build
    pretrain_share: float = 0.15  # of the seconds or steps
    tokens_per_batch: int = 2048
    lr: float = 3e-3
    sft_lr: float = 3e-3
    unlikely: float = 0.0  # what the finetuning pays for finding a repeated sentence likely (`repeats.py`)
    muon: bool = True
    bf16: bool = field(default_factory=fast_bf16)
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE (any text can be written in it) with the chat template and the role tokens."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=SPECIAL, min_frequency=2, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tok.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tok, pad_token=PAD, eos_token=END, model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def tokenizer_for(recipe: Recipe) -> PreTrainedTokenizerFast:
    """The tokenizer that the recipe's corpus gives; always learned from the first 20,000 chats of seed 0."""
    def texts() -> Iterator[str]:
        for c in corpus.chats(20_000, seed=0):
            yield from (m["content"] for m in c.messages)

    return train_tokenizer(texts(), recipe.vocab_size)


def new_model(recipe: Recipe, vocab_size: int) -> LlamaForCausalLM:
    """A Llama with tied embeddings, random weights drawn by the recipe's seed."""
    torch.manual_seed(recipe.seed)
    return LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab_size, hidden_size=recipe.hidden, intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers, num_attention_heads=recipe.heads, num_key_value_heads=recipe.heads,
        max_position_embeddings=CONTEXT, tie_word_embeddings=True, bos_token_id=None,
        eos_token_id=SPECIAL.index(END), pad_token_id=SPECIAL.index(PAD),
    ))


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Write a normal `save_pretrained` directory: safetensors (bfloat16, half the size), tokenizer, chat template."""
    out.mkdir(parents=True, exist_ok=True)
    model.generation_config = GenerationConfig(
        eos_token_id=model.config.eos_token_id, pad_token_id=model.config.pad_token_id,
        do_sample=True, temperature=1.0, top_p=TOP_P, top_k=0,
    )
    state = {k: v.to(torch.bfloat16) for k, v in model.state_dict().items()}
    half = LlamaForCausalLM(model.config)
    half.bfloat16()
    half.load_state_dict(state)
    half.generation_config = model.generation_config
    half.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)  # it is written for its owner alone; a container runs as someone else
    tokenizer.save_pretrained(out)


@contextmanager
def progress_bar(label: str) -> Iterator:
    """A rich progress bar that the training loop reports to."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[figures]}"), TimeRemainingColumn())
    with Progress(*columns) as bar:
        task = bar.add_task(label, total=1.0, figures="")

        def show(s: dict) -> None:
            figures = f"step {s['step']} loss {s['loss']:.3f} lr {s['lr']:.1e} {s['tokens_per_s']:.0f} tok/s"
            bar.update(task, completed=s["progress"], figures=figures)
            if s["step"] % 100 == 0 and not bar.console.is_terminal:
                print(f"{label}: {figures}", flush=True)

        yield show


def stage(
    name: str, model: LlamaForCausalLM, examples: list[Example], config: SFTConfig, work: Path, pad_id: int,
    loss_of: Callable[[Any, Tensor, Tensor], Tensor] = token_loss,
) -> TrainResult:
    """One stage, with its checkpoint in `work`; a finished stage is not run again."""
    with progress_bar(name) as show:
        result = train(model, examples, config, pad_id=pad_id, checkpoint=work / f"{name}.pt", on_step=show, loss_of=loss_of)
    print(f"{name}: {result.steps} steps, {result.tokens} tokens, {result.seconds:.0f} s, loss {result.loss:.3f}", flush=True)
    return result


def build(out: Path, recipe: Recipe = Recipe(), *, work: Path | None = None, start: Path | None = None) -> dict:
    """Train the starter model into `out`; checkpoints go to `work` and a second call resumes. Returns the figures.

    What pretraining gave is kept beside it, in OUT.base. `start` is a directory of earlier weights (this recipe's own) to finetune further, instead of pretraining afresh.
    """
    work = work or out.with_name(out.name + ".work")
    tokenizer = AutoTokenizer.from_pretrained(start) if start else tokenizer_for(recipe)
    pad_id = tokenizer.pad_token_id
    chat = ChatTokenizer.of(tokenizer)
    chats = [encode_chat(chat, c.messages) for c in corpus.chats(recipe.chats, recipe.seed)]
    if start:
        model = LlamaForCausalLM.from_pretrained(start, dtype=torch.float32)
    else:
        model = new_model(recipe, len(tokenizer))
    model.to(recipe.device)  # type: ignore[arg-type]
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{parameters} parameters, {len(tokenizer)} tokens in the vocabulary, {len(chats)} chats", flush=True)

    def config(share: float, lr: float) -> SFTConfig:
        base = SFTConfig(lr=lr, seed=recipe.seed, tokens_per_batch=recipe.tokens_per_batch, muon=recipe.muon, bf16=recipe.bf16)
        if recipe.steps is not None:
            return replace(base, steps=max(1, round(recipe.steps * share)))
        return replace(base, steps=None, seconds=recipe.seconds * share)

    figures: dict[str, object] = {"parameters": parameters, "vocabulary": len(tokenizer)}
    share = 0.0 if start else recipe.pretrain_share
    if share:  # plain text alone: the base has read about everything and never seen a conversation
        texts = [encode_text(tokenizer, a) for a in corpus.articles(recipe.articles, recipe.seed)]
        figures["pretraining"] = stage("pretraining", model, texts, config(share, recipe.lr), work, pad_id).__dict__
        save(model, tokenizer, out.with_name(out.name + ".base"))
    loss_of = token_loss
    if recipe.unlikely:
        rows = repeats.examples(chat, recipe.chats // 8, recipe.seed)
        print(f"looking for the likeliest of {len(rows)} repetitions", flush=True)
        rows = repeats.likeliest(model, rows, len(rows) // 4, pad_id)
        loss_of = Unlikely(rows, recipe.unlikely, pad_id, recipe.tokens_per_batch // 2, recipe.seed)
    figures["finetuning"] = stage("finetuning", model, chats, config(1 - share, recipe.sft_lr), work, pad_id, loss_of).__dict__
    save(model, tokenizer, out)
    return figures


def average(sources: Sequence[Path], out: Path, sharpen: float = 1.0) -> None:
    """Write the mean of the weights of `sources`, sittings that each began where another ended, into `out`.

    Each ends at a place of its own around a better one, which their mean is nearer to (Izmailov et al. 2018, "Averaging Weights Leads to
    Wider Optima and Better Generalization"; Wortsman et al. 2022, "Model soups"). sharpen: every logit times this, by way of the last
    norm's weight: sampled at temperature 1, the result is what it was at 1 / sharpen (temperature scaling, Guo et al. 2017).
    """
    models = [LlamaForCausalLM.from_pretrained(source, dtype=torch.float32) for source in sources]
    states = [m.state_dict() for m in models]
    models[0].load_state_dict({k: torch.stack([s[k] for s in states]).mean(0) for k in states[0]})
    models[0].model.norm.weight.data *= sharpen
    save(models[0], AutoTokenizer.from_pretrained(sources[0]), out)


def write_prompts(folder: Path = HERE) -> None:
    """Write the prompt lists and the probe set that voters, rollouts, benchmarks and gates read."""
    for name, count, seed, held_out in (("train", 300, 1, False), ("heldout", 100, 2, True), ("pool", 400, 3, False)):
        lines = corpus.training_prompts(count, seed, held_out=held_out)
        (folder / f"prompts_{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    rows = "".join(json.dumps(p, ensure_ascii=False) + "\n" for p in corpus.probes())
    (folder / "probe.jsonl").write_text(rows, encoding="utf-8")


def main(argv: list[str] | None = None) -> None:
    """Command line: `python -m learner.starter.recipe --out DIR [--seconds N | --steps N] [--seed N]`."""
    parser = argparse.ArgumentParser(prog="plaudit starter", description="Train a starter model from scratch, train one further (--continue-from), or average several (--average).")
    parser.add_argument("--out", type=Path, default=Path("starter-model"))
    parser.add_argument("--work", type=Path, help="checkpoints (default: OUT.work)")
    parser.add_argument("--seconds", type=float, help="of training (default: 5400, or 600 on a GPU)")
    parser.add_argument("--steps", type=int, help="a fixed number of steps instead of seconds")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    parser.add_argument("--layers", type=int, default=Recipe.layers)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--prompts", action="store_true", help="only write the prompt lists and probes")
    parser.add_argument("--continue-from", type=Path, help="finetune these weights further instead of starting afresh")
    parser.add_argument("--average", type=Path, nargs="+", metavar="DIR", help="train nothing: write the mean of these sittings' weights to OUT")
    parser.add_argument("--sharpen", type=float, default=1.0, metavar="S", help="with --average: every logit times S, so that fewer replies go astray at temperature 1")
    parser.add_argument("--lr", type=float, default=Recipe.sft_lr, help="peak learning rate of the finetuning")
    parser.add_argument("--unlikely", type=float, default=0.0, metavar="W", help="W times the unlikelihood of repeated sentences, and of lists that begin where they will have to, is added to the finetuning's loss")
    parser.add_argument("--tokens-per-batch", type=int, default=Recipe.tokens_per_batch, help="padded tokens of a step at most")
    args = parser.parse_args(argv)
    for given in (*(args.average or ()), *([args.continue_from] if args.continue_from else ())):
        if not (given / "config.json").is_file():
            parser.error(f"{given} is not the directory of a sitting: it has no config.json")
    if args.sharpen <= 0 or (args.sharpen != 1 and not args.average):
        parser.error("--sharpen takes a number above 0, and goes with --average")
    if args.prompts:
        write_prompts()
        return
    if args.average:
        average(args.average, args.out, args.sharpen)
        return
    torch.set_num_threads(args.threads)
    recipe = Recipe(steps=args.steps, seed=args.seed, layers=args.layers, sft_lr=args.lr, unlikely=args.unlikely, tokens_per_batch=args.tokens_per_batch)
    if args.seconds is not None:
        recipe = replace(recipe, seconds=args.seconds)
    print(json.dumps(build(args.out, recipe, work=args.work, start=args.continue_from)))


if __name__ == "__main__":
    main()
