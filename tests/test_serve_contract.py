"""Every answer and every error is as our OpenAPI document says, whatever is sent."""

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.specs.openapi import checks
from serving import running, save_small

CHECKS = (
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_headers_conformance,
    checks.response_schema_conformance,
)
EXAMPLES = 12  # for each of the 15 or so operations; 2,000 requests and more in the nightly run


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = save_small(tmp_path_factory.mktemp("models") / "small")
    with running(folder, batch_tokens=256) as one:
        yield one


def check(server, examples):
    """Send so many requests to every operation, valid ones and others; the number sent."""
    document = schemathesis.openapi.from_url(f"{server.url}/openapi.json")
    modes = schemathesis.GenerationMode
    sent = 0
    for result in document.get_all_operations():
        operation = result.ok()

        for mode in (modes.POSITIVE, modes.NEGATIVE):
            if mode is modes.NEGATIVE and operation.method == "get":
                continue

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(
                max_examples=examples, deadline=None, phases=[Phase.generate], suppress_health_check=list(HealthCheck)
            )
            def one(case):
                nonlocal sent
                sent += 1
                case.call_and_validate(checks=CHECKS)

            one()
    return sent


def test_contract(server):
    assert check(server, EXAMPLES) > 100
    assert server.built.supervisor.restarts == 0


@pytest.mark.nightly
def test_contract_at_length(server):
    assert check(server, 150) >= 2000
    assert server.built.supervisor.restarts == 0
