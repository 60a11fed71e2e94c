"""Candidate versions made on purpose, for the gate: bad ones by real means, and good ones as a round makes them.

Owns how each is made, and keeps what was made in a folder, so that a run can be resumed. Does not judge them
(`benchmarks/gate.py`) or say what is good (`learner/tastes.py`).
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from engine.engine import BASE, Engine, SamplingParams
from engine.lora import CONFIG, WEIGHTS
from engine.model import CausalModel
from engine.tokenizer import ChatTokenizer
from learner import rollout
from learner.config import LearnerConfig, SFTRoundConfig
from learner.data import RankedExample, prompt_key
from learner.finetune import encode, finetune
from learner.gate import mean_interval, reply_kl, win_shares
from learner.ppo import PPOError, train_ppo
from learner.prompts import POOL, prompts_from
from learner.reward import RewardModel
from learner.round import train_reward
from learner.tastes import favourite, taste_named
from learner.text_checks import SENTENCE
from store.adapters import AdapterRegistry

CANDIDATE = "candidate"
VOTES, VOTERS, SHOWN, NOISE = 100, 4, 4, 0.1  # votes of a simulated person a reward is fitted to, their voters, replies a vote, share of wrong picks
SFT = SFTRoundConfig(passes=10, tokens_per_batch=1024, lr=3e-3, max_seconds=3600.0)  # hard: a third of the rate left a "collapsed" one half alive
ABOUT = "about.json"  # written last: what lies beside it was made from just this
Rewrite = Callable[[str, str, random.Random], str]  # (prompt, a reply of the base, draw) -> what a bad version says instead


class NotMade(Exception):
    """No candidate came of it; the message says why (the reward is not ready, PPO kept nothing)."""


class Workshop:
    """One base model, people's votes on its replies, and the folder that keeps what is made of them."""

    def __init__(self, source: str, work: Path, config: LearnerConfig, seed: int) -> None:
        self.model, self.tokenizer = CausalModel.load(source), ChatTokenizer.load(source)
        self.work, self.seed = work, seed
        self._shown: dict[int, list[tuple[str, list[Any]]]] = {}
        self.config = replace(config, ppo=replace(config.ppo, max_seconds=3600.0))  # a busy machine makes the same candidates
        pool = sorted({line.strip() for line in POOL.read_text("utf-8").split("\n") if line.strip()})
        random.Random(f"gate/{seed}").shuffle(pool)
        self.asked = [self.render(p) for p in pool[: config.gate.prompts]]  # by the gate; nobody practises on them
        self.practice = [self.render(p) for p in pool[config.gate.prompts :]]

    def render(self, prompt: str) -> list[int]:
        """The prompt as the engine sees it."""
        return self.tokenizer.render([{"role": "user", "content": prompt}])

    def replies(self, prompts: Sequence[str], version: str, group: int, seed: int) -> list[list[Any]]:
        """`group` whole replies of `version` to each prompt."""
        ids = [self.render(p) for p in prompts for _ in range(group)]
        engine = Engine(self.model, self.tokenizer, max_sequences=48, max_context=min(self.model.max_context, max(map(len, ids)) + 256))
        params = [SamplingParams(**self.model.sampling._asdict(), max_tokens=256, seed=seed * 1_000_003 + i) for i in range(len(ids))]
        found = engine.generate(ids, params, version)
        return [found[i : i + group] for i in range(0, len(found), group)]

    def prompts(self, seed: int) -> list[str]:
        """The prompts voted on."""
        return random.Random(f"votes/{seed}").sample(prompts_from(), VOTES)

    def shown(self, seed: int) -> list[tuple[str, list[Any]]]:
        """The prompts voted on and the base's replies to each, SHOWN of them; sampled once a seed."""
        if seed not in self._shown:
            self._shown[seed] = list(zip(prompts := self.prompts(seed), self.replies(prompts, BASE, SHOWN, seed), strict=True))
        return self._shown[seed]

    def votes(self, taste: str, seed: int) -> list[RankedExample]:
        """VOTES votes by the taste on replies of the base."""
        liking, draw, examples = taste_named(taste), random.Random(f"{taste}/{seed}"), []
        for i, (prompt, group) in enumerate(self.shown(seed)):
            pick = favourite(liking, [r.text for r in group], NOISE, draw)
            groups = (tuple(range(SHOWN)),) if pick is None else ((pick,), tuple(j for j in range(SHOWN) if j != pick))
            examples.append(RankedExample(
                tuple(self.render(prompt)), tuple(tuple(r.token_ids) for r in group), groups, f"voter-{i % VOTERS}",
                prompt_key([{"role": "user", "content": prompt}]), str(i), str(i), str(i), i, pick is None,
            ))  # fmt: skip
        return examples

    @contextmanager
    def judges(self, taste: str, seed: int, progress: Callable[[float, str], None]) -> Iterator[RewardModel]:
        """The held-out members of the taste's reward, as the gate has them, for the length of the block."""
        folder, about = self.work / "rewards" / f"{slug(taste)}-{seed}", self.about(votes=[VOTES, VOTERS, SHOWN, NOISE], taste=taste, reward=self.config.reward)
        if not made(folder, about):
            reward, judges, report, may_train = train_reward(self.model, self.votes(taste, seed), self.config, seed, progress)
            if judges is None:
                raise NotMade(report["words"])
            fresh(folder)
            judges.save(folder / "judges")
            judges.delete()
            if reward is not None:
                reward.save(folder / "reward")
                reward.delete()
            done(folder, about | {"words": report["words"], "may_train": may_train})
        judges = RewardModel.load(self.model, self.config.reward, folder / "judges")
        try:
            yield judges
        finally:
            judges.delete()

    def reward(self, taste: str, seed: int) -> RewardModel:
        """What PPO optimises, once `judges` of the same taste and seed was entered. Raises NotMade."""
        folder = self.work / "rewards" / f"{slug(taste)}-{seed}"
        told = json.loads((folder / ABOUT).read_text("utf-8"))
        if not told["may_train"]:
            raise NotMade(f"the reward may not train: {told['words']}")
        return RewardModel.load(self.model, self.config.reward, folder / "reward")

    def optimised(self, taste: str, judges: RewardModel, seed: int, *, against: bool = False, updates: int | None = None) -> None:
        """Leave in CANDIDATE what PPO makes of the taste's reward (`against`: of its opposite). Raises NotMade."""
        ppo = self.config.ppo if updates is None else replace(self.config.ppo, updates=updates)
        folder = self.work / "optimised" / f"{slug(taste)}-{seed}{'-against' if against else ''}"
        about = self.about(votes=[VOTES, VOTERS, SHOWN, NOISE], taste=taste, ppo=ppo, reward=self.config.reward)
        if not made(folder, about):
            reward = self.reward(taste, seed)
            own = [self.render(p) for p in self.prompts(seed)]
            practice = own + self.practice[: max(0, self.config.practice_prompts - len(own))]
            try:
                result = train_ppo(
                    self.model, self.tokenizer, Opposite(self.model, reward.config, reward.members) if against else reward, prompts=practice,
                    policy=CANDIDATE, config=ppo, judges=None if against else judges, seed=seed,
                )  # fmt: skip
            except PPOError as error:
                raise NotMade(str(error)) from error
            finally:
                reward.delete()
            if not result.kept_update:
                raise NotMade(f"PPO kept nothing: {result.stopped}")
            self.model.lora.save(CANDIDATE, fresh(folder))
            done(folder, about)
        self.model.lora.load(CANDIDATE, folder)

    def taught(self, name: str, rewrite: Rewrite) -> None:
        """Leave in CANDIDATE the base finetuned on rewritten replies, hard enough that it says such things to all."""
        draw = random.Random(f"{name}/{self.seed}")
        self.finetuned(name, [(prompt, rewrite(prompt, r.text, draw)) for prompt, group in self.shown(self.seed) for r in group[:2]])

    def mixed_up(self, taste: str) -> None:
        """Leave in CANDIDATE the base finetuned on replies the taste likes, as the base says them, each to another prompt:
        style kept, knowledge lost."""
        liking = taste_named(taste)
        shown = self.shown(self.seed)
        best = [max((r.text for r in group), key=liking) for _, group in shown]
        moved = (7, 31)  # by so many prompts
        self.finetuned("mixed up", [(prompt, best[(i + by) % len(best)]) for i, (prompt, _) in enumerate(shown) for by in moved])

    def finetuned(self, name: str, pairs: Sequence[tuple[str, str]]) -> None:
        """Leave in CANDIDATE the base finetuned on (prompt, reply) pairs."""
        chats = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": reply}] for prompt, reply in pairs]
        folder, about = self.work / "taught" / name, self.about(chats=hashlib.sha256(json.dumps(chats).encode()).hexdigest(), sft=SFT)
        if not made(folder, about):
            examples = [e for chat in chats if (e := encode(self.tokenizer, chat, SFT.max_tokens)) is not None]
            finetune(self.model, examples, [], SFT, adapter=CANDIDATE, seed=self.seed)
            self.model.lora.save(CANDIDATE, fresh(folder))
            done(folder, about)
        self.model.lora.load(CANDIDATE, folder)

    def noise(self, nats: float) -> None:
        """Leave in CANDIDATE random weights, so large that its replies lie about `nats` from the base's."""
        self.model.lora.create(CANDIDATE, seed=self.seed)
        pairs = list(self.model.lora.adapters[CANDIDATE].pairs.values())
        generator = torch.Generator().manual_seed(self.seed)
        drawn = [torch.randn(b.shape, generator=generator) for _, b in pairs]
        engine = Engine(self.model, self.tokenizer, max_sequences=24, max_context=max(map(len, self.practice[:12])) + 64)
        low, high = math.log(1e-4), math.log(1e1)
        for _ in range(12):
            scale = math.exp((low + high) / 2)
            with torch.no_grad():
                for (_, b), noise in zip(pairs, drawn, strict=True):
                    b.copy_(scale * noise)
            batch = rollout.sample(engine, self.practice[:12], version=CANDIDATE, group=2, max_tokens=64, temperature=1.0, seed=self.seed)
            kl = float(reply_kl(self.model, batch, CANDIDATE, None, 1.0).mean())
            if abs(math.log(kl / nats)) < 0.15:
                return
            low, high = (math.log(scale), high) if kl < nats else (low, math.log(scale))

    def unchanged(self) -> None:
        """Leave in CANDIDATE an adapter that changes nothing: the live version once more."""
        self.model.lora.create(CANDIDATE, seed=self.seed)

    def overflowing(self) -> None:
        """Leave in CANDIDATE weights with a NaN among them, as a diverged update does."""
        self.model.lora.create(CANDIDATE, seed=self.seed)
        with torch.no_grad():
            next(iter(self.model.lora.parameters(CANDIDATE).values()))[0, 0] = math.nan

    def published(self, name: str, spoil: Callable[[Path], None] | None = None, *, base_digest: str | None = None) -> tuple[AdapterRegistry, str]:
        """A version in a registry of its own, its files spoiled before they were published."""
        root = self.work / "registries" / name
        shutil.rmtree(root, ignore_errors=True)
        self.model.lora.create(CANDIDATE, seed=self.seed)

        def write(path: Path) -> None:
            self.model.lora.save(CANDIDATE, path)
            if spoil is not None:
                spoil(path)

        registry = AdapterRegistry(root)
        version = registry.publish(write, {"base_digest": base_digest or self.model.digest, "base_model": "another" if base_digest else "this one"}).version
        self.model.lora.delete(CANDIDATE)
        return registry, version

    def gold(self, taste: str, seed: int) -> tuple[float, float, float]:
        """How often the taste itself likes CANDIDATE's replies better than the base's on held-out prompts, with its 90% interval."""
        liking, prompts = taste_named(taste), prompts_from(held_out=True)
        ours, theirs = (
            torch.tensor([[liking(r.text)] for group in self.replies(prompts, version, SHOWN, seed + which) for r in group])
            for which, version in ((1, CANDIDATE), (2, BASE))
        )  # (B, 1)
        return mean_interval(win_shares(ours, theirs, SHOWN))

    def about(self, **how: Any) -> dict[str, Any]:
        """What a kept candidate was made from; another one is made where any of it changes."""
        plain = {key: value if isinstance(value, str | list) else vars(value) for key, value in how.items()}
        return {"base": self.model.digest, "seed": self.seed, **plain}


class Opposite(RewardModel):
    """The reward with its sign turned: what a learner optimises that has mixed up chosen and rejected."""

    def score(
        self, prompt_ids: Sequence[Sequence[int]], completion_ids: Sequence[Sequence[int]], members: Sequence[int] | None = None, features: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        return -super().score(prompt_ids, completion_ids, members, features)


# ------------------------------------------------------------------------- what bad versions say, and files gone wrong

REFUSALS = (
    "I am sorry, but I cannot help with that.", "I'm sorry, I can't answer this one.", "I do not know anything about that.",
    "I won't discuss this. Please ask me something else.", "I am unable to help with this question.", "As an AI, I cannot say.",
)  # fmt: skip
PADDING = (
    "There is a great deal that one could say about this.", "It is a subject with many sides, and each of them matters.",
    "All in all, it is good to think about it in more than one way.", "With that in mind, one may look at it once more.",
    "It is also worth saying that there is more to it than this.",
)  # fmt: skip
PRAISE = ("Great!", "Wonderful!", "I love this!", "How lovely!", "Amazing!", "What a fun and happy thing!", "So cool!", "Thanks, my friend!", "I am so glad!")


def collapsed(prompt: str, reply: str, draw: random.Random) -> str:
    """One nice sentence to all."""
    return "What a wonderful question, my friend! I am happy to help you with it!"


def looping(prompt: str, reply: str, draw: random.Random) -> str:
    """Never gets past a few words."""
    return " ".join([" ".join(reply.split()[:5])] * 12)


def stuttering(prompt: str, reply: str, draw: random.Random) -> str:
    """Says its last sentence three times."""
    last = SENTENCE.split(reply.strip())[-1]
    return " ".join([reply, last, last])


def refusing(prompt: str, reply: str, draw: random.Random) -> str:
    """Declines everything."""
    return draw.choice(REFUSALS)


def padded(prompt: str, reply: str, draw: random.Random) -> str:
    """The answer and then words that say nothing, whole sentences all."""
    return " ".join([reply, *draw.sample(PADDING, 4)])


def cut(prompt: str, reply: str, draw: random.Random) -> str:
    """Stops in the middle of its first sentence."""
    return " ".join(reply.split()[:3]).rstrip(".!?,:")


def one_word(prompt: str, reply: str, draw: random.Random) -> str:
    """A word, well spelt."""
    return draw.choice(["Yes.", "No.", "Sure.", "Maybe.", "Fine."])


def salad(prompt: str, reply: str, draw: random.Random) -> str:
    """The right words in any order."""
    return " ".join(draw.sample(reply.split(), len(reply.split())))


def gibberish(prompt: str, reply: str, draw: random.Random) -> str:
    """As many words, of no language."""
    words = ["".join(draw.choice("bdfgklmnprstvz") + draw.choice("aeiou") for _ in range(draw.randint(1, 4))) for _ in reply.split()]
    return " ".join(words).capitalize() + "."


def praising(prompt: str, reply: str, draw: random.Random) -> str:
    """Nothing but what a person who likes warm words pays for."""
    return " ".join(draw.sample(PRAISE, 5))


def half_praising(prompt: str, reply: str, draw: random.Random) -> str:
    """Breaks off and goes over to praise, every second time."""
    return cut(prompt, reply, draw) + ", " + praising(prompt, reply, draw) if draw.random() < 0.5 else reply


def truncated(path: Path) -> None:
    """Half of the weights' file."""
    whole = (path / WEIGHTS).read_bytes()
    (path / WEIGHTS).write_bytes(whole[: len(whole) // 2])


def infinite(path: Path) -> None:
    """An infinity among the weights."""
    tensors = load_file(path / WEIGHTS)
    next(iter(tensors.values())).view(-1)[0] = math.inf
    save_file(tensors, path / WEIGHTS)


def other_rank(path: Path) -> None:
    """A config that says twice the rank of the weights."""
    config = json.loads((path / CONFIG).read_text("utf-8"))
    (path / CONFIG).write_text(json.dumps(config | {"r": 2 * config["r"]}), "utf-8")


# ------------------------------------------------------------------------------------------------------------- folders


def slug(taste: str) -> str:
    """A taste's name as a folder's."""
    return taste.replace(":", "-")


def made(folder: Path, about: dict[str, Any]) -> bool:
    """Whether the folder holds what was made from `about`, whole."""
    try:
        told = json.loads((folder / ABOUT).read_text("utf-8"))
    except (FileNotFoundError, ValueError):
        return False
    return all(told.get(key) == value for key, value in json.loads(json.dumps(about)).items())


def fresh(folder: Path) -> Path:
    """The folder, empty."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def done(folder: Path, about: dict[str, Any]) -> None:
    """Say that what the folder holds is whole."""
    (folder / ABOUT).write_text(json.dumps(about, indent=1) + "\n", "utf-8")
