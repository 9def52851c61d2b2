"""Models from training to deletion: registered, used by id, deployed, taken away."""

from __future__ import annotations

import hashlib
import json

import pytest
from ss_platform import Platform

from api.ports import SupportRefused


def test_a_finished_training_becomes_a_model_that_generation_uses(platform: Platform) -> None:
    parameters = {"pictures": platform.pictures(), "category": "dog", "base_model": "tiny"}
    req_no = platform.ask(method="dreambooth", task_type="TP", parameters=parameters)
    model_id = platform.result(req_no)["result"]["model"]
    model = platform.call(lambda: platform.support.model("acme", model_id))
    assert (model.kind, model.base, model.source_req_no, model.tenant) == ("lora", "tiny", req_no, "acme")
    manifest = platform.scheduler.store.model(model_id).manifest
    kept = b"".join(platform.files.read(hashlib.sha256(manifest).hexdigest()))
    assert json.loads(kept)["model_id"] == model_id, "the file store describes its models itself"
    with pytest.raises(SupportRefused):
        platform.call(lambda: platform.support.model("other", model_id))
    assert [m.model_id for m in platform.call(lambda: platform.support.models("acme"))] == ["tiny", model_id]
    assert [m.model_id for m in platform.call(lambda: platform.support.models("other"))] == ["tiny"]
    picture = platform.ask(method="text_to_image", parameters={"prompt": "a dog", "model": model_id})
    assert platform.result(picture)["state"] == "finished"
    stolen = platform.ask(method="text_to_image", parameters={"prompt": "a dog", "model": model_id}, tenant="other")
    assert platform.result(stolen, "other")["reason"] == "model_unknown"


def test_a_training_on_pictures_that_are_none_is_refused_before_it_is_queued(platform: Platform) -> None:
    text = platform.files.put_bytes(b"no picture", "image/png").file_id
    parameters = {"pictures": [*platform.pictures(2), text], "category": "dog"}
    refused = platform.result(platform.ask(method="dreambooth", task_type="TP", parameters=parameters))
    assert (refused["state"], refused["reason"]) == ("rejected", "invalid")
    assert refused["detail"] == "body.parameters.pictures.2: this is no picture; send PNG, JPEG or WebP"
    parameters["pictures"][2] = "f" * 64
    refused = platform.result(platform.ask(method="dreambooth", task_type="TP", parameters=parameters))
    assert "pictures.2: there is no file ffff" in refused["detail"]


def test_a_file_store_that_does_not_answer_leaves_the_judgement_to_the_pod(
    platform: Platform, monkeypatch: pytest.MonkeyPatch
) -> None:
    from api.support import core

    def away(*_: object) -> str:
        raise ConnectionError("the store is away")

    monkeypatch.setattr(core, "problem", away)
    parameters = {"pictures": [f"{n:064x}" for n in range(3)], "category": "dog"}
    asked = platform.ask(method="dreambooth", task_type="TP", parameters=parameters)
    assert platform.result(asked)["state"] == "finished"


def test_a_model_is_deployed_by_call_and_by_message(platform: Platform) -> None:
    view = platform.call(lambda: platform.support.deploy("acme", "tiny", 1))
    assert view.deployed_pods == 1
    req_no = platform.ask(method="undeploy", task_type="TP", parameters={"model": "tiny"})
    assert platform.result(req_no)["result"]["metadata"] == {"pods": 0}
    assert platform.call(lambda: platform.support.model("acme", "tiny")).deployed_pods == 0
    with pytest.raises(SupportRefused):
        platform.call(lambda: platform.support.deploy("acme", "nope", 1))


def test_deleting_a_model_waits_for_no_job_and_takes_it_away(platform: Platform) -> None:
    parameters = {"pictures": platform.pictures(), "category": "dog"}
    training = platform.ask(method="dreambooth", task_type="TP", parameters=parameters)
    model_id = platform.result(training)["result"]["model"]
    with pytest.raises(SupportRefused) as caught:
        platform.call(lambda: platform.support.delete_model("acme", "tiny"))
    assert caught.value.status == 403
    platform.call(lambda: platform.support.deploy("acme", model_id, 1))
    platform.call(lambda: platform.support.delete_model("acme", model_id))
    with pytest.raises(SupportRefused) as caught:
        platform.call(lambda: platform.support.model("acme", model_id))
    assert caught.value.status == 404
