"""Prompts from files: what simulated people ask, what operators add to the practice of a round, what versions are compared on.

Owns the layouts. Does not choose among prompts (`learner/round.py`).
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path

HERE = Path(__file__).parent / "starter"
POOL = HERE / "prompts_pool.txt"  # what rounds practise on beside people's own


class PromptsError(ValueError):
    """The file cannot be used; the message says why and quotes nothing of it."""


def prompts_from(path: Path | None = None, *, held_out: bool = False) -> list[str]:
    """Prompts from a text file (one a line), JSONL or JSONL.gz (`prompt`: string or conversation); default the starter's."""
    path = path or HERE / ("prompts_heldout.txt" if held_out else "prompts_train.txt")
    try:
        with gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8") as file:
            lines = [line.strip() for line in file if line.strip()]
        if ".jsonl" in path.name:
            lines = [p if isinstance(p, str) else p[-1]["content"] for p in (json.loads(line)["prompt"] for line in lines)]
    except FileNotFoundError:
        raise PromptsError(f"there is no file {path}") from None
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise PromptsError(f"{path.name} is not a prompt a line, nor JSONL with a prompt ({type(error).__name__})") from None
    if not lines:
        raise PromptsError(f"{path} has no prompts")
    return lines
