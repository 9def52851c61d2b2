"""Personalised models and the Pods of their base: what the scheduler is told, what a Pod is told, and what is refused."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any

import pytest

from api.mq.messages import MessageRefused, decode, encode_request
from api.support.intake import MethodDefaults, Request, understand
from api.support.jobs import Job, Model
from api.support.payloads import StorePayloads
from engine.commands import StartTask
from engine.protocol.controller import PayloadRefused
from engine.resources import Demand
from engine.tasks import FailureCause
from executors.terms import Terms, TermsWrong

METHODS = {"text_to_image": MethodDefaults(Demand(), slots=4, urgent_slots=2)}
FILES = {"adapter.safetensors": "a" * 64, "adapter.json": "b" * 64}
MODELS: dict[str, Model] = {
    "tiny": Model("tiny", "builtin"),
    "big": Model("big", "local", metadata={"path": "/models/big"}),
    "lora-1": Model("lora-1", "lora", "tiny", "acme", files=FILES, deployed_pods=2),
    "lora-2": Model("lora-2", "lora", "tiny", "acme", files=FILES),
    "lora-big": Model("lora-big", "lora", "big", "acme", files=FILES),
    "lora-lost": Model("lora-lost", "lora", "gone", "acme", files=FILES),
    "full-1": Model("full-1", "full", "tiny", "acme", files=FILES),
    "theirs": Model("theirs", "lora", "tiny", "other", files=FILES),
}


def request(parameters: Mapping[str, Any], **header: Any) -> Request:
    body = encode_request(
        req_no=str(uuid.uuid4()),
        task_type="GC",
        method="text_to_image",
        parameters={"prompt": "x", **parameters},
        tenant="acme",
        **header,
    )
    return understand(
        decode(body),
        message_id="m",
        task_id="task",
        now=5_000_000,
        methods=METHODS,
        default_model="tiny",
        find_model=MODELS.get,
    )


def terms(job: Job, models: Mapping[str, Model] = MODELS) -> Terms:
    return Terms.from_json(
        StorePayloads({job.task_id: job}, lambda _: None, models.get).terms(StartTask(job.task_id, 1, 1, "n"))
    )


@pytest.mark.parametrize(
    ("model", "held", "adapters"),
    [
        ("tiny", "tiny", ()),
        ("lora-1", "tiny", ("lora-1",)),
        ("lora-2", "tiny", ("lora-2",)),
        ("lora-big", "big", ("lora-big",)),
        ("full-1", "full-1", ()),
        ("lora-lost", "lora-lost", ()),
    ],
)
def test_a_lora_runs_in_the_pods_of_its_base_and_other_models_in_their_own(
    model: str, held: str, adapters: tuple[str, ...]
) -> None:
    asked = request({"model": model})
    assert asked.spec is not None
    assert (asked.spec.model, asked.spec.adapters) == (held, adapters)
    assert asked.job.model == model  # What the customer sees, and what results and deletions go by.
    assert asked.spec.urgent_slots == 2


def test_a_request_adds_models_of_one_base_with_weights() -> None:
    asked = request({"model": "lora-1", "adapter_scale": 0.7, "adapters": [{"model": "lora-2", "weight": -0.5}]})
    assert asked.spec is not None
    assert asked.spec.adapters == ("lora-1", "lora-2")
    assert dict(asked.spec.features)["loras"] == 2
    told = terms(asked.job)
    assert [(each.model, each.weight, each.base, each.pinned) for each in told.adapters] == [
        ("lora-1", 0.7, "tiny", True),
        ("lora-2", -0.5, "tiny", False),
    ]
    assert told.model == "lora-1"
    plain = request({"adapters": [{"model": "lora-2"}]})
    assert plain.spec is not None
    assert (plain.spec.model, plain.spec.adapters) == ("tiny", ("lora-2",))
    assert terms(plain.job).model == ""
    full = request({"model": "full-1", "adapters": [{"model": "lora-2"}]})
    assert full.spec is not None
    assert (full.spec.model, full.spec.adapters) == ("full-1", ("lora-2",))


@pytest.mark.parametrize(
    ("parameters", "code", "said"),
    [
        ({"adapters": [{"model": "nope"}]}, "model_unknown", "adapters.0.model: there is no model 'nope'"),
        ({"adapters": [{"model": "theirs"}]}, "model_unknown", "adapters.0.model: there is no model 'theirs'"),
        ({"model": "theirs"}, "model_unknown", "model: there is no model 'theirs'"),
        ({"adapters": [{"model": "tiny"}]}, "invalid", "'tiny' is a base model, only LoRAs"),
        ({"adapters": [{"model": "full-1"}]}, "invalid", "'full-1' is a fully trained model, only LoRAs"),
        ({"adapters": [{"model": "lora-big"}]}, "invalid", "was trained on 'big', this request draws with 'tiny'"),
        ({"model": "lora-1", "adapters": [{"model": "lora-1"}]}, "invalid", "is the request's model already"),
        ({"adapters": [{"model": "lora-1"}, {"model": "lora-1"}]}, "invalid", "named twice"),
        ({"adapters": [{"model": "lora-1", "weight": 3}]}, "invalid", "adapters.0.weight"),
        ({"adapters": [{"model": "lora-1", "weight": "1"}] * 9}, "invalid", "adapters"),
        ({"adapters": [{"weight": 1}]}, "invalid", "adapters.0.model"),
        ({"adapters": "lora-1"}, "invalid", "adapters"),
    ],
)
def test_models_that_do_not_go_together_are_refused_before_they_are_queued(
    parameters: dict[str, Any], code: str, said: str
) -> None:
    with pytest.raises(MessageRefused) as caught:
        request(parameters)
    assert caught.value.code == code
    assert said in str(caught.value)


def test_a_model_that_was_deleted_meanwhile_fails_its_own_attempt() -> None:
    asked = request({"model": "lora-1", "adapters": [{"model": "lora-2"}]})
    for gone in ("lora-1", "lora-2"):
        left = {name: model for name, model in MODELS.items() if name != gone}
        with pytest.raises(PayloadRefused, match=gone) as caught:
            terms(asked.job, left)
        assert caught.value.cause is FailureCause.MODEL_MISSING


def test_urgency_comes_along_and_plain_terms_weigh_nothing() -> None:
    assert terms(request({}, priority=100).job).urgent
    ordinary = request({}).job
    assert StorePayloads({"task": ordinary}, lambda _: None, MODELS.get).terms(StartTask("task", 1, 1, "n")) == {}
    sleeping = Job("s", "acme", "s", {}, "GC", "sleep", {}, 1.0, priority=7)
    assert terms(sleeping) == Terms(priority=7)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"priority": "high"}, "priority"),
        ({"adapters": "x"}, "list"),
        ({"adapters": [{"files": FILES}]}, "model id"),
        ({"adapters": [{"model": "x", "files": {}}]}, "'x' has no files"),
        ({"adapters": [{"model": "x", "files": FILES, "weight": float("nan")}]}, "weight"),
        ({"adapters": [{"model": "x", "files": FILES, "weight": 9}]}, "weight"),
    ],
)
def test_terms_that_say_nothing_sensible_are_refused_by_field(given: dict[str, Any], said: str) -> None:
    with pytest.raises(TermsWrong, match=said):
        Terms.from_json(given)
    assert Terms.from_json({"adapters": [], "priority": 3, "newer": 1}).priority == 3
