"""How good the starter model is: facts, form, styles, honesty, and what instruction finetuning changed.

    python -m benchmarks.starter [--model DIR] [--base DIR] [--page FILE] [--quick]

Facts: every taught question of every topic, and 200 about countries, each in a wording that is never in training, answered greedily and
sampled, as the model's generation_config.json asks; right is a reply that holds a key phrase of the answer. Form: 1,000 sampled replies that end, repeat nothing and
hold no damaged character (`measure.well_formed`). Invented: replies to requests to explain with a word that was never taught. Styles: four samples of a request to explain each topic; the classifier has its own tests.
Alike: two of those four are the same, word for word. Broken lists: of two requests a topic to explain it with a list, the replies with any fault of `learner/text_checks.py`. Counted: 200 requests for two to six facts about a thing, answered with a list of as many.
Honesty: the first 100 prompts of `alpaca_eval_prompts`; a short reply that says that it is small or does not know (`measure.honest`).
Alignment tax: the gate's fixed probes, where the right answer has to be likelier than three others, and the same facts free-form, for the
base and for the assistant. `--base` is what the recipe keeps in OUT.base. `--page` writes 28 first samples, the base's as they stand there if it is not given. JSON last; exit status 1 when a target is missed.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from engine.model import CausalModel
from engine.tokenizer import ChatTokenizer
from learner.gate import load_probes, probe_answers
from learner.starter import measure
from learner.starter.measure import Sampler
from learner.starter.recipe import ASSISTANT
from learner.text_checks import broken_rate

PROMPTS = Path(__file__).parents[2] / "shared" / "data" / "alpaca_eval_prompts.jsonl.gz"
LECTURE = "Explain the moon landing to a 6 year old in a few sentences."
TARGETS = {"facts": 0.90, "well_formed": 0.95, "styles": 0.80, "honest": 0.80}
TASKS = (
    "Tell me what 40 / 5 is.", "I need a rhyme for hit.", "What is the plural form of sandwich?", "Do you know a word that rhymes with knit?",
    "Please convert 10 centuries into years.", "Could you give me three herbs and spices?",
)
PAGE = """# The starter model, unedited

Twenty-eight prompts, the first sample of each, seed 0, nothing picked or mended. On the left the base, which has only been
pretrained on plain text and goes on with what it is given; on the right the assistant, after instruction finetuning. Made by
`python -m benchmarks.starter --base DIR --page docs/starter.md`.

| prompt | base | assistant |
| --- | --- | --- |
"""


def real_prompts(count: int) -> list[str]:
    """The first `count` prompts that people gave; [] where the data is absent."""
    if not PROMPTS.exists():
        return []
    with gzip.open(PROMPTS, "rt", encoding="utf-8") as lines:
        return [json.loads(line)["prompt"][-1]["content"] for _, line in zip(range(count), lines, strict=False)]


def page_prompts() -> list[str]:
    """Twenty-eight prompts, the same for every starter: the lecture's own, greetings, one of every so many facts and requests to explain, tasks."""
    some = [a.prompt for a in measure.fact_questions()][::97][:9] + list(TASKS)
    return [LECTURE, "Hello!", "Who are you?", "What is Plaudit?", "I feel sad today.", "Tell me a joke.", "Write a poem about the sea.", *some,
            *measure.explain_prompts()[::60][:6], "What will the weather be tomorrow?", "Write a Python function that sorts a list."]


def cell(text: str) -> str:
    return text.strip().replace("|", "\\|").replace("\n", "<br>")


def base_cells(page: Path) -> list[str]:
    """The base's column of a page that was written before, for the same prompts; [] where there is none."""
    if not page.exists():
        return []
    rows = [line.split(" | ") for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| ")][2:]
    found = {row[0].removeprefix("| "): row[1] for row in rows}
    return [found[p] for p in map(cell, page_prompts())] if found.keys() >= set(map(cell, page_prompts())) else []


def told_apart(source: Path) -> float:
    """Share of the gate's probes whose right answer is likelier than three other probes' answers."""
    return probe_answers(CausalModel.load(source), ChatTokenizer.load(source), load_probes(), None).accuracy


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=ASSISTANT)
    parser.add_argument("--base", type=Path, help="the pretrained checkpoint, to set beside it")
    parser.add_argument("--page", type=Path, help="write 28 first samples to this file")
    parser.add_argument("--quick", action="store_true", help="a fifth of everything")
    args = parser.parse_args(argv)
    if args.page and not (args.base or base_cells(args.page)):
        parser.error("--page needs --base, to set it beside the assistant: the page does not hold its replies yet")
    step = 5 if args.quick else 1
    sampler = Sampler(args.model)
    base = Sampler(args.base) if args.base else None

    # 1. Facts and tasks, in words that were never trained on.
    asked = measure.fact_questions()[::step]
    words = [a.prompt for a in asked]
    facts = measure.shares_right(asked, sampler.replies(words, greedy=True))
    warm = measure.shares_right(asked, sampler.replies(words))["all"]
    small = measure.task_questions()[::step]
    tasks = measure.shares_right(small, sampler.replies([a.prompt for a in small], greedy=True))
    print(f"facts right: {facts['all']:.1%} greedy, {warm:.1%} sampled, of {len(asked)}; small tasks {tasks['all']:.1%} of {len(small)}", flush=True)
    print("  " + ", ".join(f"{k} {v:.0%}" for k, v in {**facts, **tasks}.items() if k != "all"), flush=True)
    numbers = measure.count_questions()[::step]
    counted = [measure.shares_right(numbers, sampler.replies([a.prompt for a in numbers], greedy=greedy))["all"] for greedy in (True, False)]
    print(f"so many facts as were asked for: {counted[0]:.1%} greedy, {counted[1]:.1%} sampled, of {len(numbers)}", flush=True)

    # 2. Styles and form.
    explain = measure.explain_prompts()[::step]
    styled = sampler.replies([p for p in explain for _ in range(4)])
    styles = measure.several_styles(styled, 4)
    mixed = [a.prompt for a in (*measure.fact_questions(1), *measure.task_questions(seed=1))][: 400 // step] + explain * 2
    drawn = (styled + sampler.replies(mixed[: max(0, 1000 // step - len(styled))]))[: 1000 // step]
    form = sum(measure.well_formed(*r) for r in drawn) / len(drawn)
    invented = sum(bool(measure.invented(text, p)) for p, (text, _) in zip([p for p in explain for _ in range(4)], styled, strict=True)) / len(styled)
    print(f"a word that was never taught: in {invented:.1%} of {len(styled)} replies to requests to explain", flush=True)
    alike = measure.alike(styled, 4)
    print(f"two or more of four samples the same, word for word: {alike:.1%} of {len(explain)}", flush=True)
    print(f"well formed: {form:.1%} of {len(drawn)}; two styles or more among four samples: {styles:.1%} of {len(explain)}", flush=True)

    listed = sampler.replies(measure.list_prompts()[::step])
    lists_broken = broken_rate(listed)
    print(f"broken, of {len(listed)} replies to requests to explain with a list: {lists_broken:.1%}", flush=True)

    # 3. What it cannot know.
    real = real_prompts(100)[::step]
    answered = sampler.replies(real) if real else []
    honest = sum(measure.honest(*r) for r in answered) / len(answered) if real else None
    for prompt, (text, _) in list(zip(real, answered, strict=True))[:20]:
        print(f"> {' '.join(prompt.split())[:160]}\n  {cell(text)}", flush=True)
    print("real prompts answered honestly: " + ("not measured: the shared prompts are absent" if honest is None else f"{honest:.1%} of {len(real)}"), flush=True)

    # 4. Before and after instruction finetuning.
    chats, texts = measure.validation(sampler.tokenizer)
    stages = {}
    for name, one, source in (("base", base, args.base), ("assistant", sampler, args.model)):
        if one is not None:
            free = facts["all"] if one is sampler else measure.shares_right(asked, one.replies([p + " " for p in words], greedy=True, chat=False))["all"]
            stages[name] = {"loss_replies": one.loss(chats), "loss_text": one.loss(texts), "multiple_choice": told_apart(source), "free_form": free}
            print(f"{name}: " + ", ".join(f"{k} {v:.3f}" for k, v in stages[name].items()), flush=True)
    if args.page:
        before = [cell(text) for text, _ in base.replies(page_prompts(), chat=False)] if base else base_cells(args.page)
        rows = zip(page_prompts(), before, sampler.replies(page_prompts()), strict=True)
        args.page.write_text(PAGE + "".join(f"| {cell(p)} | {b} | {cell(a)} |\n" for p, b, (a, _) in rows), encoding="utf-8")

    figures = {"facts": facts["all"], "well_formed": form, "styles": styles, "honest": honest}
    met = {name: figures[name] is not None and figures[name] >= target for name, target in TARGETS.items()}  # type: ignore[operator]
    print(json.dumps({
        "benchmark": "starter", "targets": TARGETS, "met": met, **figures, "facts_sampled": warm, "invented_words": invented, "alike": alike, "lists_broken": lists_broken, "counted": counted[0], "counted_sampled": counted[1], "facts_by_kind": facts, "tasks_by_kind": tasks,
        "stages": stages, "counts": {"facts": len(asked), "tasks": len(small), "replies": len(drawn), "explain": len(explain), "counted": len(numbers), "listed": len(listed), "real": len(real)},
    }))
    return 0 if all(met.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
