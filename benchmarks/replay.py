"""Real prompts through the real server: 616 instructions of AlpacaEval at n = 4 from 8 clients at once.

`python -m benchmarks.replay`. Reports what was answered and what was refused and why, tokens a second and latencies; JSON
last. It measures serving, not the starter model's wisdom.
"""

from __future__ import annotations

import argparse
import json
import queue
import statistics
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
from rich.progress import Progress

from benchmarks.serving import SHARED, serving
from learner.prompts import prompts_from

PROMPTS = SHARED / "alpaca_eval_prompts.jsonl.gz"


def main() -> int:
    """Run the benchmark; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, default=PROMPTS)
    parser.add_argument("--rows", type=int, help="only the first so many")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--n", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--model", help="serve this one; default the bundled starter model")
    args = parser.parse_args()
    if not args.prompts.exists():
        raise SystemExit(f"the real prompts are not here: {args.prompts} is absent")
    prompts = prompts_from(args.prompts)[: args.rows]
    with serving("--no-learner", *(["--model", args.model] if args.model else [])) as server:
        report = replay(server.url, prompts, args.clients, args.n, args.max_tokens)
        report["ready_s"] = round(server.ready_s, 2)
    report["met"] = {"all answered": report["outcomes"].get("answered") == report["prompts"]}
    print(json.dumps(report))
    return 0 if all(report["met"].values()) else 1


def replay(url: str, prompts: list[str], clients: int, n: int, max_tokens: int) -> dict[str, Any]:
    """Send every prompt once, `clients` at a time."""
    waiting: queue.SimpleQueue[str] = queue.SimpleQueue()
    for prompt in prompts:
        waiting.put(prompt)
    lock, latencies, outcomes, finishes = threading.Lock(), [], Counter[str](), Counter[str]()
    tokens = prompt_tokens = 0

    with Progress() as progress:
        task = progress.add_task("replaying", total=len(prompts))

        def client() -> None:
            nonlocal tokens, prompt_tokens
            with httpx.Client(base_url=url, timeout=300) as http:
                while True:
                    try:
                        prompt = waiting.get_nowait()
                    except queue.Empty:
                        return
                    body = {"model": "plaudit", "messages": [{"role": "user", "content": prompt}], "n": n, "max_tokens": max_tokens}
                    began = time.monotonic()
                    try:
                        answer = http.post("/v1/chat/completions", json=body)
                    except httpx.TransportError as error:
                        with lock:
                            outcomes[f"failed: {type(error).__name__}"] += 1
                            progress.advance(task)
                        continue
                    took = time.monotonic() - began
                    with lock:
                        progress.advance(task)
                        if answer.status_code != 200:
                            kind = "refused" if answer.status_code < 500 else "failed"
                            outcomes[f"{kind}: {answer.status_code} {answer.json()['error'].get('code')}"] += 1
                            continue
                        result = answer.json()
                        complete = len(result["choices"]) == n and all(c["finish_reason"] for c in result["choices"])
                        outcomes["answered" if complete else "failed: incomplete"] += 1
                        latencies.append(took)
                        tokens += result["usage"]["completion_tokens"]
                        prompt_tokens += result["usage"]["prompt_tokens"]
                        finishes.update(c["finish_reason"] for c in result["choices"])

        began = time.monotonic()
        threads = [threading.Thread(target=client) for _ in range(clients)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        seconds = time.monotonic() - began
    if not latencies:
        raise SystemExit(f"nothing was answered: {dict(outcomes)}")
    p95 = statistics.quantiles(latencies * 2 if len(latencies) == 1 else latencies, n=20, method="inclusive")[18]
    return {
        "benchmark": "replay", "prompts": len(prompts), "n": n, "clients": clients, "max_tokens": max_tokens, "outcomes": dict(outcomes),
        "finish_reasons": dict(finishes), "seconds": round(seconds, 1), "tokens": tokens, "tokens_per_s": round(tokens / seconds, 1),
        "prompt_tokens": prompt_tokens, "latency_p50_s": round(statistics.median(latencies), 2), "latency_p95_s": round(p95, 2),
    }


if __name__ == "__main__":
    raise SystemExit(main())
