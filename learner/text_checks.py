"""Is a reply broken? A stated, mechanical check: repetition, cut ends, joins that no writer makes. Pure text.

Owns the faults, refusals and diversity counts. Does not judge content, style or truth: it is what keeps PPO from paying
for text that only a reward model likes ("They live in, They help flowers grow."). Used as a penalty in the reward, as a
check of the gate, and beside the base model's own rate, since no such rule is free of false alarms.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

ENDS = re.compile(r"[.!?…。！？][\"'”’)\]*_`]*$|[)\]\"”’`|]$|[\U0001F300-\U0001FAFF\u2600-\u27BF]\ufe0f?$|[:;]-?[)D]$")
CODE = re.compile(r"```.*?```", re.S)
BULLET = re.compile(r"^\s*(?:[-*•]|\d+[.)])\s")
NUMBERED = re.compile(r"^([ \t]*)(\d{1,3})[.)](?!\d)", re.M)
SENTENCE = re.compile(r"(?<=[.!?])[\"'”’)]*\s+|\n+")
WORD = re.compile(r"[^\W_]+(?:['’-][^\W_]+)*")
SHORTENED = r"(?<!\be\.g)(?<!\bi\.e)(?<!\betc)(?<!\bvs)(?<!\bapprox)(?<!\bno)(?<!\ba\.m)(?<!\bp\.m)(?<!\bSt)(?<!\bDr)(?<!\bMr)"
OPENERS = "They|It|The|This|These|Those|There|He|She|We|You|Its|Their|A|An|And|But|So|If|When|What|How|Here|Some|Many|Most"
ASKS = re.compile(r"\b(?:that|which|who|whom|whose|what|where|how|whatever|whoever)\b|\w (?:I|you|we|they)\b", re.I)  # then a preposition may come last: "what it is made of"


class Rule(NamedTuple):
    """What no writer writes, and the words before it in the sentence with which it is English after all."""

    name: str
    wrong: re.Pattern[str]
    unless: re.Pattern[str] | None = None

    def first(self, text: str) -> re.Match[str] | None:
        """Where the text is first wrong by this rule."""
        return next((m for m in self.wrong.finditer(text) if not (self.unless and self.unless.search(before(text, m.start())))), None)


RULES = tuple(Rule(*row) for row in (
    ("sentence after a comma", re.compile(rf"\w[,;] (?:{OPENERS}) [a-z]")),  # "They live in, They help"
    ("small letter after a full stop", re.compile(rf"[a-z]{{2,}}{SHORTENED}[.!?] [a-z]+")),
    ("doubled punctuation", re.compile(r"[,;:][,;:.!?]|(?<!\.)\.[,;](?! )|(?<!\.)\.\.(?!\.)|[!?][.,;]|\.[!?]")),
    ("space before punctuation", re.compile(r"\w [,.!?](?:\s|$)")),
    ("no space after a full stop", re.compile(r"[a-z]{2,}[.!?,;](?:They|It|The|This|These|You|We|I|A|In|He|She)\b")),
    ("nothing after a determiner", re.compile(r"(?<![\w'’-])(?:(?:the|an|their|its|your|my|our)[.,;!?:]|a(?:[.;!?:]|,(?! [a-z],)))(?:\s|$)")),
    ("nothing after a preposition", re.compile(  # "in" and "by" also go with verbs, "Come in, please", but hardly with these
        r"\b(?:at|into|from|with|than|as|and|or),(?:\s|$)|\b(?:is|are|was|were|be|been|live[sd]?|gr[eo]ws?|stay(?:s|ed)?|found|seen|born|made|kept|used|built) (?:in|by),(?:\s|$)"), ASKS),
    ("word twice", re.compile(r"\b(the|a|an|of|in|to|and|is|are|was|were|it|they|on|at|for|with|by|can|have|has) \1\b", re.I)),
    ("words that cannot meet", re.compile(
        r"\b(?:the|an|their|your|my|our) (?:the|an|is|are|was|were|of|in|on|to|and|or|it|they|has|have)\b(?!-)"
        r"|\b(?:is|are|was|were) (?:has|have|can|are|was|were)\b|\b(?:of|in|at|into|from|with|by) of\b"
        r"|\b(?:and|or) (?:and|or)\b|\b(?:They|We|You) (?:is|was|has|of|the|a)\b|\b(?:It|He|She) (?:are|were|have|of|the|a)\b")),
    ("verb after a preposition", re.compile(r"\b(?:of|in|at|into|from|with|by) (?:is|are|was|were|can|has|have)\b"), ASKS),  # "throws that go in are worth two points"
    ("empty bullet", re.compile(r"^\s*[-*•][ \t]*$", re.M)),
    ("damaged character", re.compile("\ufffd")),
))  # fmt: skip
REFUSAL = re.compile(
    r"\b(?:i (?:can ?not|can['’]t|won['’]t|will not|could not|am unable to|am not able to|must decline)"
    r"(?: \w+)? (?:help|answer|do|assist|discuss|provide|tell|say|talk|give|to)"
    r"|i (?:do not|don['’]t) know|i (?:know nothing|have no (?:answer|idea|information))|i am not sure"
    r"|(?:i['’]m|i am) sorry|i (?:regret|apologi[sz]e)|as an ai\b)",
    re.I,
)


class Fault(NamedTuple):
    """What is broken, and in which characters of the reply it became so. From `end` on nothing could mend it; where that
    is the end of the reply itself, it is one past the text."""

    name: str
    start: int
    end: int


def faults(text: str, finish_reason: str | None = "stop") -> list[Fault]:
    """What is broken in a reply, each kind where it first shows; [] for nothing. finish_reason: as the engine says;
    "length" means that the reply was cut."""
    prose = CODE.sub(lambda code: " " * len(code.group()), text)
    found = [Fault(rule.name, *at.span()) for rule in RULES if (at := rule.first(prose))]
    if ending := unfinished(text, finish_reason):
        found.append(ending)
    if again := repeated_sentence(text):
        found.append(Fault("repeated sentence", *again))
    if turn := loop(text):
        found.append(Fault("loop", *turn))
    if astray := miscounted(prose):
        found.append(Fault("numbers out of order", *astray))
    return found


def unfinished(text: str, finish_reason: str | None = "stop") -> Fault | None:
    """What is broken about a reply that ends here, whatever it says before; None for a whole one."""
    last = len(text)
    if not WORD.search(text):
        return Fault("no words", 0, last + 1)
    if finish_reason == "length" or not ends_well(text):
        return Fault("cut end", last, last + 1)
    if text.count("(") > text.count(")") or text.count('"') % 2 or text.count("```") % 2:
        return Fault("bracket or quote left open", last, last + 1)
    return None


def broken(text: str, finish_reason: str | None = "stop") -> bool:
    """Whether the reply has any fault."""
    return bool(faults(text, finish_reason))


def broken_rate(replies: Iterable[tuple[str, str | None]]) -> float:
    """Share of (text, finish_reason) with a fault; 0 for none at all."""
    flags = [broken(text, reason) for text, reason in replies]
    return sum(flags) / len(flags) if flags else 0.0


def before(text: str, at: int) -> str:
    """What the sentence at character `at` says up to there."""
    return text[max((end.end() for end in SENTENCE.finditer(text, 0, at)), default=0) : at]


def ends_well(text: str) -> bool:
    """A final mark, or a last bullet that is as bare as the bullets before it."""
    text = text.rstrip()
    if ENDS.search(text):
        return True
    bullets = [line.rstrip() for line in text.splitlines() if BULLET.match(line)]
    last = text.splitlines()[-1] if text else ""
    return len(bullets) >= 2 and bool(BULLET.match(last)) and not any(ENDS.search(line) for line in bullets)


def sentences(text: str) -> list[tuple[str, int, int]]:
    """Sentences and list lines: their lower-case words, and where they begin and end."""
    ends = [*SENTENCE.finditer(text)]
    spans = zip([0, *(end.end() for end in ends)], [*(end.start() for end in ends), len(text)], strict=True)
    return [(" ".join(w), a, b) for a, b in spans if (w := words(text[a:b]))]


def words(text: str) -> list[str]:
    """Lower-case words."""
    return WORD.findall(text.lower())


def repeated_sentence(text: str, shortest: int = 3) -> tuple[int, int] | None:
    """Where a sentence of at least `shortest` words comes for the second time; None where none does."""
    seen: set[str] = set()
    for said, start, end in sentences(text):
        if said in seen and said.count(" ") + 1 >= shortest:
            return start, end
        seen.add(said)
    return None


def miscounted(text: str) -> tuple[int, int] | None:
    """Where a numbered list leaves the step of its first two numbers, as 4, 5, 6, 5 does; None where none does.

    Each indentation has a list of its own, and a 1 that does not follow an item at once begins another.
    """
    lists: dict[int, list[int]] = {}  # indentation -> the numbers so far
    last = 0
    for line in NUMBERED.finditer(text):
        indent, number, apart = len(line[1]), int(line[2]), text.count("\n", last, line.start()) > 1
        lists = {i: numbers for i, numbers in lists.items() if i <= indent}
        numbers = lists.setdefault(indent, [])
        if number == 1 and apart:
            numbers.clear()
        if len(numbers) >= 2 and number - numbers[-1] != numbers[1] - numbers[0]:
            return line.start(2), line.end()
        numbers.append(number)
        last = line.end()
    return None


def loop(text: str, n: int = 4, times: int = 4) -> tuple[int, int] | None:
    """Where some n words come the `times`-th time (more often in a long text), or a stretch of up to 2n words three times
    in a row; None where neither happens."""
    found = list(WORD.finditer(text.lower()))
    w, most = [m.group() for m in found], max(times, len(found) / 30)
    seen: Counter[tuple[str, ...]] = Counter()
    for i in range(len(w) - n + 1):
        seen[run := tuple(w[i : i + n])] += 1
        if seen[run] >= most:
            return found[i].start(), found[i + n - 1].end()
    for k in range(1, 2 * n + 1):
        for i in range(len(w) - 3 * k + 1):
            if w[i : i + k] == w[i + k : i + 2 * k] == w[i + 2 * k : i + 3 * k]:
                return found[i + 2 * k].start(), found[i + 3 * k - 1].end()
    return None


def ngrams(w: Sequence[str], n: int) -> Counter[tuple[str, ...]]:
    """How often each run of n words occurs."""
    return Counter(tuple(w[i : i + n]) for i in range(len(w) - n + 1))


def repetition(texts: Sequence[str], n: int = 4) -> float:
    """Share of word n-grams that repeat one from earlier in the same reply, over all replies together."""
    counts = [ngrams(words(t), n) for t in texts]
    total = sum(c.total() for c in counts)
    return sum(c.total() - len(c) for c in counts) / total if total else 0.0


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Different word n-grams over all word n-grams of the replies together (Li et al. 2016); 0 where there are none."""
    together: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        together += ngrams(words(text), n)
    return len(together) / together.total() if together else 0.0


def refusal(text: str) -> bool:
    """Whether the reply's first two sentences decline or say that it does not know."""
    return bool(REFUSAL.search(" ".join(SENTENCE.split(text.strip())[:2])))


def refusal_rate(texts: Sequence[str]) -> float:
    """Share of replies that refuse; 0 for none at all."""
    return sum(map(refusal, texts)) / len(texts) if texts else 0.0
