"""What a new user gets wrong is answered by a line that names the mistake and the remedy, never by a traceback."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
from typer.testing import CliRunner

from api.cli.client import explain
from api.cli.main import app
from api.platform import ports_taken
from api.settings import ConfigurationError, Settings, changed, load_settings
from api.state_dir import StateDir, held
from api.supervisor import Part
from engine.protocol.agent import Life
from engine.tasks import SECOND
from executors import curve
from executors.agent import AgentOptions, Silence


@pytest.fixture(autouse=True)
def _no_outside_configuration(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in [name for name in os.environ if name.startswith("AIGC_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    ("toml", "said"),
    [
        ('[scheduler]\nprofil = "fifo"', "scheduler.profil: there is no such field; did you mean profile?"),
        ("[gatway]\nport = 1", "gatway: there is no such field; did you mean gateway?"),
        ("[agent]\nqqq = 1", "agent.qqq: there is no such field; there are connect, name,"),
        ("[methods.sleep]\nslot = 2", "methods.sleep.slot: there is no such field; did you mean slots?"),
        ("gateway = 8080", "gateway: this is a section of fields; write [gateway] and its fields below it"),
        ("[tenants]\nacme = 3", "tenants.acme: this is a section of fields; write [tenants.acme]"),
        ("[gateway]\nport = 70000", "gateway.port: Input should be less than or equal to 65535 (given: 70000)"),
        ('[scheduler]\nbind = "0.0.0.0:5570"', "scheduler.bind: write tcp://HOST:PORT (given: '0.0.0.0:5570')"),
        ('[agent]\nconnect = "tcp://sm"', "agent.connect: write tcp://HOST:PORT (given: 'tcp://sm')"),
        ("[gateway", "not valid TOML"),
    ],
)
def test_a_wrong_file_is_answered_with_the_field_and_what_to_write(tmp_path: Path, toml: str, said: str) -> None:
    (tmp_path / "wrong.toml").write_text(toml)
    with pytest.raises(ConfigurationError) as caught:
        load_settings(tmp_path / "wrong.toml")
    assert said in str(caught.value)


def test_a_secret_in_a_wrong_place_is_not_repeated(tmp_path: Path) -> None:
    (tmp_path / "wrong.toml").write_text("[gateway]\njwt_key = 123456789")
    with pytest.raises(ConfigurationError) as caught:
        load_settings(tmp_path / "wrong.toml")
    assert "gateway.jwt_key" in str(caught.value)
    assert "123456789" not in str(caught.value)


def test_a_variable_with_one_underscore_too_few_is_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIGC_GATEWAY_PORT", "9000")
    with pytest.raises(ConfigurationError, match=r"AIGC_GATEWAY_PORT: .* did you mean AIGC_GATEWAY__PORT\?"):
        load_settings()
    monkeypatch.delenv("AIGC_GATEWAY_PORT")
    monkeypatch.setenv("AIGC_GATEWAY__PORT", "9000")
    assert load_settings().gateway.port == 9000


@pytest.mark.parametrize(
    "address", ["tcp://127.0.0.1:5570", "tcp://*:5570", "tcp://0.0.0.0:*", "tcp://[::1]:5570", "tcp://sm.example:0"]
)
def test_addresses_that_can_be_listened_on_are_taken(address: str) -> None:
    assert changed(Settings().scheduler, "scheduler", bind=address).bind == address


def test_a_wrong_flag_is_named_as_the_field_it_sets(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"gateway\.port: .*\(given: 70000\)"):
        CliRunner().invoke(app, ["up", "--port", "70000"], catch_exceptions=False)
    with pytest.raises(ConfigurationError, match=r"agent\.connect: write tcp://HOST:PORT"):
        CliRunner().invoke(app, ["agent", "--connect", "sm:5570"], catch_exceptions=False)
    with pytest.raises(ConfigurationError, match=r"fleet: devices: 'nvml' would be offered by every node"):
        CliRunner().invoke(app, ["up", "--elastic", "1:2", "--devices", "nvml"], catch_exceptions=False)


def test_a_state_directory_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for use in (StateDir(tmp_path / "file" / "state").create, held(tmp_path / "file" / "state" / "x", "one").__enter__):
        with pytest.raises(ConfigurationError, match=r"state_dir: .*file/state cannot be written .*--state-dir"):
            use()


def test_a_journal_that_is_none_ends_the_scheduler_with_one_line(tmp_path: Path) -> None:
    state = tmp_path / "state"
    state.mkdir()
    (state / "journal.db").write_text("this is not a database, whatever its name says")
    answer = CliRunner().invoke(app, ["scheduler", "--state-dir", str(state)], catch_exceptions=False)
    assert answer.exit_code == 1
    assert "journal.db: file is not a database; restore the file from a backup" in answer.stderr


def test_keys_that_are_none_are_named_by_their_file(tmp_path: Path) -> None:
    run = CliRunner().invoke
    keys = tmp_path / "n1.keys"
    assert run(app, ["keys", "agent", "n1", "-o", str(keys), "--state-dir", "state"]).exit_code == 0
    (keys / "scheduler.pub").write_text("garbage\n")
    agent = ["agent", "--name", "n1", "--keys", str(keys), "--devices", "cpu:1", "--state-dir", "state"]
    answer = run(app, agent, catch_exceptions=False)
    assert answer.exit_code == 2
    assert f"{keys / 'scheduler.pub'}: its content is not a Z85 key" in answer.stderr.replace("\n", "")


def test_the_tail_of_a_log_begins_with_the_last_start(tmp_path: Path) -> None:
    part = Part("one", ["/bin/sh", "-c", "echo $WORD"], tmp_path / "one.log")
    for word in ("first", "second"):
        part.environment = {"WORD": word}
        part.start()
        assert part.process is not None
        part.process.wait()
        assert part.log_tail() == word


def test_an_agent_that_nobody_answers_says_so_ever_less_often(caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    silence = Silence(AgentOptions("tcp://sm:5570", "n1", curve.generate(), "", tmp_path))
    for second in range(60):
        silence.look(second * SECOND, Life.SEEKING)
    said = [record.getMessage() for record in caplog.records]
    assert [message.partition(" for ")[2].partition(":")[0] for message in said] == ["5 s", "10 s", "20 s", "40 s"]
    assert "tcp://sm:5570" in said[0]
    assert "`aigc keys agent n1`" in said[0]
    caplog.clear()
    silence.look(60 * SECOND, Life.UP)
    silence.look(61 * SECOND, Life.SEEKING)
    silence.look(65 * SECOND, Life.SEEKING)
    assert not caplog.records, "the silence counts from when the session was lost"
    silence.look(66 * SECOND, Life.SEEKING)
    assert len(caplog.records) == 1


def test_doctor_names_a_port_that_another_program_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AIGC_SCHEDULER__BIND", "tcp://127.0.0.1:*")
    monkeypatch.setenv("AIGC_GATEWAY__PORT", "0")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("AIGC_SCHEDULER__INTERNAL_PORT", str(taken.getsockname()[1]))
        assert [str(each).partition(":")[0] for each in ports_taken(load_settings())] == ["scheduler.internal_port"]
        answer = CliRunner().invoke(app, ["doctor", "--json"], catch_exceptions=False)
    (port,) = [finding for finding in json.loads(answer.stdout) if finding["what"] == "port"]
    assert port["verdict"] == "note"
    assert "AIGC_SCHEDULER__INTERNAL_PORT" in port["detail"]
    monkeypatch.setenv("AIGC_SCHEDULER__INTERNAL_PORT", "0")
    assert list(ports_taken(load_settings())) == []


def test_a_refusal_of_a_key_says_where_one_comes_from() -> None:
    said = explain(401, json.dumps({"detail": "Not authenticated: the API key is unknown."}).encode())
    assert said.startswith("401: Not authenticated: the API key is unknown; give one by --key")
    assert explain(404, json.dumps({"detail": "there is no job."}).encode()) == "404: there is no job."
