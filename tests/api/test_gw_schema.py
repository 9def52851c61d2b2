"""The OpenAPI document tells the truth: schemathesis calls every operation by it, and no answer is a 5xx or undeclared."""

from __future__ import annotations

import tempfile
from pathlib import Path

import hypothesis
import pytest
import schemathesis
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_schema_conformance,
    status_code_conformance,
    unsupported_method,
)

from api.gateway.fake import GatewayFake

ENDLESS = ["/v1/events", "/v1/logs"]
UNLIMITED = {"per_minute": 10_000_000, "burst": 1_000_000}


HOME = tempfile.TemporaryDirectory(prefix="aigc-schema-", ignore_cleanup_errors=True)
GATEWAY = GatewayFake(
    Path(HOME.name),
    auto=True,
    failed_auth=UNLIMITED,
    open_reads=UNLIMITED,
    sync_timeout_s=1,
    default_tenant={"submits": UNLIMITED, "reads": UNLIMITED},
)
GATEWAY.submit(method="text_to_image", parameters={"prompt": "x"}, req_no="11111111-1111-4111-8111-111111111111")
schema = schemathesis.openapi.from_asgi("/openapi.json", GATEWAY.app).exclude(path=ENDLESS)
SETTINGS = hypothesis.settings(
    max_examples=12, deadline=None, derandomize=True, database=None, suppress_health_check=list(hypothesis.HealthCheck)
)
CHECKS = [
    schemathesis.checks.not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
    negative_data_rejection,
    unsupported_method,
]


@schema.parametrize()
@SETTINGS
def test_an_operator_gets_only_declared_answers(case) -> None:
    case.call_and_validate(headers=GATEWAY.ops, checks=CHECKS)


@schema.include(path_regex="^/v1/(jobs|models|images|files|uploads)").parametrize()
@SETTINGS
def test_a_tenant_gets_only_declared_answers(case) -> None:
    case.call_and_validate(headers=GATEWAY.ana, checks=CHECKS)


def test_every_operation_declares_its_refusals_with_the_one_error_body() -> None:
    document = GATEWAY.app.openapi()
    for path, item in document["paths"].items():
        for method, operation in item.items():
            if path in ("/healthz", "/readyz"):
                continue
            for status, answer in operation["responses"].items():
                if status.startswith(("4", "5")):
                    assert list(answer["content"]) == ["application/problem+json"], (method, path, status)
            assert {"400", "401", "404", "413", "415", "422", "429", "500", "503"} <= set(operation["responses"]), (
                method,
                path,
            )
    assert "HTTPValidationError" not in document["components"]["schemas"]


@pytest.mark.parametrize("path", ["/v1/jobs", "/v1/nodes"])
def test_operations_that_need_a_key_say_so(path: str) -> None:
    assert GATEWAY.app.openapi()["paths"][path]["get"]["security"] == [{"HTTPBearer": []}]
