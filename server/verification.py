"""Is what we would serve what was published? The checks a version passes before it may answer anyone.

Owns: files as their digests say, made for this base model, loadable, and logits equal to those the publisher saw.
Does not route requests or change statuses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from engine.engine import Engine, probe
from engine.lora import Adapter, AdapterError
from server.bridge import EngineBridge
from store.adapters import AdapterRegistry, Manifest
from store.errors import CorruptAdapter

TOLERANCE = {"float32": 1e-3, "bfloat16": 0.15, "float16": 0.02}  # nats; half precision rounds the logits themselves
INT8, LIKELY = 0.5, 0.01  # nats, by weights of 8 bits: of tokens at least so likely, as those round what is hardly ever said further off


class Unfit(Exception):
    """The version must not be served; the message is the reason an operator reads."""


def probe_gap(published: Mapping[str, Any], served: Mapping[str, Any], tolerance: float, likely: float = 0.0) -> float:
    """Largest difference, in nats, between the published and the served log-probabilities of the probe's next token.

    `served` has the whole vocabulary. likely: probability under which a published token is passed over, but for the likeliest. Raises `Unfit` when the gap is over `tolerance`, or nothing can be compared.
    """
    try:
        ids, values = [int(i) for i in published["top_ids"]], [float(v) for v in published["top_logprobs"]]
    except (KeyError, TypeError, ValueError, OverflowError):  # no digest covers the manifest itself
        ids, values = [], []
    if not ids or len(ids) != len(values):
        raise Unfit("its manifest has no probe to check the served weights with")
    here = dict(zip(served["top_ids"], served["top_logprobs"], strict=True))
    least = min(math.log(likely), max(values)) if likely else -math.inf
    gaps = [abs(v - here.get(i, math.inf)) for i, v in zip(ids, values, strict=True) if not v < least]
    gap = max(gaps) if all(map(math.isfinite, gaps)) else math.inf  # max() alone may step over a NaN
    if gap > tolerance:
        raise Unfit(f"served logits differ from the published ones by {gap:.3g} nats (at most {tolerance:g} allowed)")
    return gap


async def load_verified(
    version: str, registry: AdapterRegistry, bridge: EngineBridge, base_digest: str, dtype: str, read: Any
) -> tuple[Manifest, float]:
    """Check `version`, load it between two decode steps, and prove its logits; (manifest, gap in nats of what it will speak).

    Twice: by the pass that the publisher made, to the last digit, and by those that write replies, which go by other code and
    perhaps by weights of 8 bits. `read` runs a blocking function off the event loop. Leaves nothing loaded when it raises `Unfit`.
    """
    try:
        manifest = await read(registry.verify, version)
    except CorruptAdapter as damaged:
        raise Unfit(str(damaged)) from damaged
    if manifest.base_digest != base_digest:
        raise Unfit(f"it was made for another base model ({manifest.base_model}); start with that --model to use it")

    def load(engine: Engine, adapter: Adapter) -> tuple[dict[str, Any], dict[str, Any], bool]:
        if version in engine.versions():
            engine.unload_version(version)
        engine.load_version(version, adapter)
        try:
            ids = list(manifest.probe["prompt_ids"])
            return probe(engine.model, version, ids, engine.model.vocab_size), engine.spoken(version, ids), engine.model.int8
        except Exception:
            engine.unload_version(version)
            raise

    try:
        adapter = await read(bridge.read_adapter, registry.path(version))
        said, spoken, int8 = await bridge.call(lambda engine: load(engine, adapter))
    except AdapterError as refused:
        raise Unfit(str(refused)) from refused
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as broken:
        raise Unfit(f"its probe could not be run ({type(broken).__name__})") from broken
    try:
        probe_gap(manifest.probe, said, TOLERANCE[dtype])
        return manifest, probe_gap(manifest.probe, spoken, INT8, LIKELY) if int8 else probe_gap(manifest.probe, spoken, TOLERANCE[dtype])
    except Unfit:
        await bridge.call(lambda engine: engine.unload_version(version))
        raise
