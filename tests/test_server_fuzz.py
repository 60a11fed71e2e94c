"""Whatever a client sends, documented or not, is never answered with an internal error (schemathesis)."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode

from tests.serving import Served, ask, served, settings_for

EXAMPLES = 12  # of each operation and mode; the whole takes about half a minute on one core


@pytest.fixture(scope="module")
def server(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    made = settings_for(tmp_path_factory.mktemp("data"), tiny_llama, max_tokens=4, rate_requests="100000/minute",
                        rate_chat="100000/minute")
    with served(made) as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("mode", [GenerationMode.POSITIVE, GenerationMode.NEGATIVE])
def test_no_input_causes_a_500(server: Served, mode: GenerationMode) -> None:
    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    seen: Counter[tuple[str, int]] = Counter()
    for result in schema.get_all_operations():
        operation = result.ok()
        @settings(max_examples=EXAMPLES, deadline=None, database=None, derandomize=True, phases=[Phase.generate],
                  suppress_health_check=list(HealthCheck))
        @given(case=operation.as_strategy(generation_mode=mode))
        def check(case: schemathesis.Case) -> None:
            operation = case.operation
            answer = case.call(base_url=server.url, timeout=60)
            seen[operation.label, answer.status_code] += 1
            assert answer.status_code < 500, (operation.label, answer.status_code, answer.text, case.body)
            if answer.status_code >= 400:
                assert set(answer.json()["error"]) == {"message", "type", "param", "code"}

        with contextlib.suppress(Unsatisfiable):  # a call without parameters cannot be made wrong
            check()
    operations = {label for label, _ in seen}
    if mode == GenerationMode.POSITIVE:
        assert len(operations) >= 15 and {200, 404} <= {status for _, status in seen}
    else:
        assert len(operations) >= 5 and seen["POST /v1/chat/completions", 400] == EXAMPLES
    with server.client() as c:
        assert ask(c, 2, max_tokens=4)["choices"]
