"""docker/, as far as it can be tested without a container engine: the contents of the files and the two scripts."""

from __future__ import annotations

import http.server
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any
from unittest.mock import MagicMock

import pytest
import yaml
from packaging.requirements import Requirement

from patcher import ModelRepository, TritonServer
from patcher.cli.serve import serve_command
from patcher.errors import ServerRefused
from patcher.triton.installation import find_installation
from patcher.triton.process import free_ports
from patcher.triton.server import EmbeddedTriton

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
DOCKER = ROOT / "docker"
DOCKERFILE = (DOCKER / "Dockerfile").read_text()
KEY = "0123456789abcdef" * 2
# NVIDIA's image of the default release contains this Python version.
IMAGE = {"python_version": "3.10", "sys_platform": "linux", "platform_machine": "x86_64"}


def compose() -> dict[str, Any]:
    document: dict[str, Any] = yaml.safe_load((DOCKER / "docker-compose.yml").read_text())
    return document


def test_release_is_the_same_everywhere() -> None:
    release = re.search(r"^ARG TRITON_RELEASE=(\S+)$", DOCKERFILE, re.MULTILINE)
    assert release
    assert "FROM nvcr.io/nvidia/tritonserver:${TRITON_RELEASE}-py3" in DOCKERFILE
    service = compose()["services"]["triton"]
    assert service["build"]["args"]["TRITON_RELEASE"] == f"${{TRITON_RELEASE:-{release[1]}}}"
    assert service["image"].endswith(f"${{TRITON_RELEASE:-{release[1]}}}")
    assert compose()["services"]["patcher"]["image"] == service["image"]


def test_every_core_dependency_is_pinned_for_the_python_of_the_image() -> None:
    pins: dict[str, list[str]] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate(IMAGE):
                pins.setdefault(pin.name, []).append(str(pin.specifier).removeprefix("=="))
    assert {name: versions for name, versions in pins.items() if len(versions) > 1} == {}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(text) for text in project["dependencies"]]
    for requirement in wanted:
        if requirement.marker is None or requirement.marker.evaluate(IMAGE):
            assert requirement.specifier.contains(pins[requirement.name][0]), requirement
    # Installed with bytecode, because PYTHONDONTWRITEBYTECODE keeps later runs from writing any.
    assert "pip install --no-cache-dir -c constraints.txt '.[metrics]'" in DOCKERFILE
    assert "PYTHONDONTWRITEBYTECODE=1" in DOCKERFILE


def test_everything_copied_exists_and_is_let_into_the_build() -> None:
    allowed = {line[1:] for line in (DOCKER / "Dockerfile.dockerignore").read_text().splitlines() if line[:1] == "!"}
    copied = [word for line in re.findall(r"^COPY (.+)$", DOCKERFILE, re.MULTILINE) for word in line.split()[:-1]]
    sources = {word.rstrip("/") for word in copied if not word.startswith("--")}
    assert sources == allowed
    assert [source for source in sources if not (ROOT / source).exists()] == []


def test_nothing_runs_as_root_or_is_reached_from_elsewhere() -> None:
    assert re.findall(r"^USER (\S+)$", DOCKERFILE, re.MULTILINE)[-1] == "1000:1000"
    services = compose()["services"]
    assert all(port.startswith("127.0.0.1:") for port in services["triton"]["ports"])
    assert services["triton"]["volumes"][0].endswith(":/models:ro")
    assert all(service["secrets"] == ["admin-key"] for service in services.values())
    assert compose()["secrets"]["admin-key"]["file"] == "./secrets/admin-key"


def test_compose_reserves_a_gpu_and_waits_for_the_classifier() -> None:
    services = compose()["services"]
    (device,) = services["triton"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert services["triton"]["healthcheck"]["test"][-1] == "/usr/local/bin/healthcheck.py"
    assert services["patcher"]["depends_on"]["triton"]["condition"] == "service_healthy"


@pytest.fixture
def container(tmp_path: Path) -> dict[str, str]:
    """The environment of a container with a repository; its tritonserver and patcher print what they are given."""
    models = ("intent", "intent_head", "intent_features", "topic", "topic_head", "stored_head")
    for model in (*models, "intent_heads", "intent_any"):
        (tmp_path / "models" / model).mkdir(parents=True)
        (tmp_path / "models" / model / "config.pbtxt").touch()
    (tmp_path / "bin").mkdir()
    for name in ("tritonserver", "patcher"):
        program = tmp_path / "bin" / name
        program.write_text('#!/bin/sh\nprintf "%s\\n" "$@" "key=$PATCHER_ADMIN_KEY"\n')
        program.chmod(0o755)
    (tmp_path / "key").write_text(f"{KEY}\n")
    return {
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "TMPDIR": str(tmp_path),
        "TRITON_MODEL_REPO": str(tmp_path / "models"),
        "ADMIN_KEY_FILE": str(tmp_path / "key"),
    }


def enter(environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(DOCKER / "entrypoint.sh"), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_entrypoint_loads_every_classifier_and_its_features(container: dict[str, str]) -> None:
    arguments = enter(container, "--log-verbose=1").stdout.split()
    loaded = [argument for argument in arguments if argument.startswith("--load-model=")]
    names = ["intent", "topic", "intent_any", "intent_features"]  # a head in the store has no model of its own
    assert loaded == [f"--load-model={name}" for name in names]
    assert "--model-control-mode=explicit" in arguments
    closed = "model-repository,shared-memory,trace,logging"
    assert f"--grpc-restricted-protocol={closed}:admin-key={KEY}" in arguments
    assert f"--http-restricted-api=inference,metadata,model-config,model-repository,statistics,{closed[17:]}" in (
        argument.partition(":")[0] for argument in arguments
    )
    key_file = Path(container["TMPDIR"]) / "http-key"
    assert (key_file.read_text(), key_file.stat().st_mode & 0o777) == (KEY, 0o600)
    assert "--log-verbose=1" in arguments
    assert (Path(container["TMPDIR"]) / "classifiers").read_text().split() == names[:3]


def test_entrypoint_gives_the_server_large_stacks(container: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "bin" / "tritonserver").write_text("#!/bin/bash\nulimit -s\n")
    assert enter(container).stdout.split() == ["1048576"]
    assert "1 GiB of stack" not in enter(container).stderr
    limited = subprocess.run(
        ["bash", "-c", f"ulimit -v 9000000; exec bash {DOCKER / 'entrypoint.sh'}"],
        env=container, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert limited.stdout.split() != ["1048576"]
    assert "cannot give the server's threads 1 GiB of stack" in limited.stderr


def test_entrypoint_with_tls_leaves_http_to_the_health_check(container: dict[str, str], tmp_path: Path) -> None:
    environment = {**container, "TLS_FOLDER": str(tmp_path)}
    outcome = enter(environment)
    assert (outcome.returncode, "tls.crt in it cannot be read" in outcome.stderr) == (2, True)
    for name in ("tls.crt", "tls.key"):
        (tmp_path / name).touch()
    arguments = enter(environment).stdout.split()
    assert "--grpc-use-ssl=true" in arguments
    assert f"--grpc-server-key={tmp_path}/tls.key" in arguments
    assert "--http-address=127.0.0.1" in arguments
    assert "--metrics-address=0.0.0.0" in arguments
    (closed,) = (each for each in arguments if each.startswith("--http-restricted-api="))
    assert closed.startswith("--http-restricted-api=inference,")
    assert "health" not in closed
    assert not any("mutual" in each for each in arguments)
    (tmp_path / "client-ca.crt").touch()
    assert f"--grpc-root-cert={tmp_path}/client-ca.crt" in enter(environment).stdout.split()


def test_entrypoint_opens_http_only_when_asked_to(container: dict[str, str], tmp_path: Path) -> None:
    opened = f"--http-restricted-api=model-repository,shared-memory,trace,logging:admin-key={KEY}"
    assert opened in enter({**container, "SERVE_HTTP": "1"}).stdout.split()
    outcome = enter({**container, "SERVE_HTTP": "yes"})
    assert (outcome.returncode, "SERVE_HTTP is yes; expected 0 or 1" in outcome.stderr) == (2, True)
    for name in ("tls.crt", "tls.key"):
        (tmp_path / name).touch()
    outcome = enter({**container, "SERVE_HTTP": "1", "TLS_FOLDER": str(tmp_path)})
    assert (outcome.returncode, outcome.stdout) == (2, "")
    assert "HTTP does not support TLS; leave out SERVE_HTTP" in outcome.stderr


def test_entrypoint_loads_only_the_classifiers_named(container: dict[str, str]) -> None:
    arguments = enter({**container, "CLASSIFIERS": "topic"}).stdout
    assert "--load-model=topic" in arguments
    assert "--load-model=intent\n" not in arguments


def test_entrypoint_leaves_out_a_name_that_the_repository_lacks(container: dict[str, str]) -> None:
    """Triton would load none of the others either."""
    outcome = enter({**container, "CLASSIFIERS": "topic dropped"})
    assert "--load-model=topic" in outcome.stdout
    assert "--load-model=dropped" not in outcome.stdout
    assert "warning: dropped is not served" in outcome.stderr
    outcome = enter({**container, "CLASSIFIERS": "dropped"})
    assert (outcome.returncode, outcome.stdout) == (2, "")
    assert "CLASSIFIERS names none that" in outcome.stderr


@pytest.mark.parametrize(
    "variable, value, said",
    [
        ("ADMIN_KEY_FILE", "/none", "ADMIN_KEY_FILE is /none, which cannot be read; expected a file"),
        ("ADMIN_KEY_FILE", "/", "ADMIN_KEY_FILE is /, which cannot be read; expected a file"),
        ("TMPDIR", "/none", "TMPDIR is /none; expected a folder that user"),
        ("TRITON_MODEL_REPO", "s3://models/intent", "serves folders only"),
    ],
)
def test_entrypoint_says_what_is_wrong_with_a_setting(
    container: dict[str, str], variable: str, value: str, said: str
) -> None:
    outcome = enter({**container, variable: value})
    assert (outcome.returncode, outcome.stdout) == (2, "")
    (line,) = outcome.stderr.splitlines()
    assert said in line


def test_entrypoint_restricts_model_control_without_a_key_too(container: dict[str, str]) -> None:
    del container["ADMIN_KEY_FILE"]
    first, second = (re.findall(r"admin-key=([0-9a-f]{64})\b", enter(container).stdout) for _ in range(2))
    assert len(first) == 2
    assert first != second


def test_entrypoint_hands_the_key_to_the_patcher(container: dict[str, str]) -> None:
    assert enter(container, "patcher", "labels").stdout.split() == ["labels", f"key={KEY}"]


@pytest.mark.parametrize("key", ["", "short", "0123456789abcdef:0123"])
def test_entrypoint_refuses_a_weak_or_broken_key(container: dict[str, str], key: str) -> None:
    Path(container["ADMIN_KEY_FILE"]).write_text(key)
    outcome = enter(container)
    assert outcome.returncode == 2
    assert "openssl rand -hex 32" in outcome.stderr


def test_entrypoint_refuses_an_empty_repository(container: dict[str, str], tmp_path: Path) -> None:
    outcome = enter({**container, "TRITON_MODEL_REPO": str(tmp_path / "bin")})
    assert outcome.returncode == 2
    assert "no classifier in" in outcome.stderr


def damage_another(root: Path) -> None:
    """Add a classifier with a truncated head file to a repository."""
    repository = ModelRepository(root)
    with repository.lock():
        repository.add_classifier("damaged", repository.classifier("intent").head(), backbone="intent")
    path = root / "damaged_head" / "1" / "model.onnx"
    path.write_bytes(path.read_bytes()[:100])


@pytest.mark.server
@pytest.mark.parametrize("runs", ["0", "1"])
def test_entrypoint_with_a_real_tritonserver(runs: str, tiny_original: Path, tmp_path: Path) -> None:
    """Start to stop as in the image, except that tritonserver is from the wheel and uses other ports."""
    installation = find_installation()
    exports = "".join(f"export {name}='{value}'\n" for name, value in installation.environment.items())
    program = tmp_path / "bin" / "tritonserver"
    program.parent.mkdir()
    program.write_text(
        f'#!/bin/sh\n{exports}exec {installation.binary} --backend-directory={installation.backends} "$@"\n'
    )
    program.chmod(0o755)
    (tmp_path / "key").write_text(KEY)
    shutil.copytree(tiny_original, tmp_path / "models")
    damage_another(tmp_path / "models")
    grpc, web, metrics = free_ports(["127.0.0.1"] * 3, [0, 0, 0])
    environment = {
        **os.environ,
        "PATH": f"{program.parent}:{Path(sys.executable).parent}:{os.environ['PATH']}",
        "TMPDIR": str(tmp_path),
        "TRITON_MODEL_REPO": str(tmp_path / "models"),
        "TRITON_URL": f"127.0.0.1:{grpc}",
        "ADMIN_KEY_FILE": str(tmp_path / "key"),
        "ENCODER_RUNS_BACKBONE": runs,
    }
    ports = [f"--grpc-port={grpc}", f"--http-port={web}", f"--metrics-port={metrics}", "--allow-gpu-metrics=false"]
    command = ["bash", str(DOCKER / "entrypoint.sh"), *ports]
    health = [sys.executable, str(DOCKER / "healthcheck.py"), f"127.0.0.1:{web}"]
    log = tmp_path / "log"
    with log.open("wb") as out:
        run = subprocess.Popen(command, env=environment, stdout=out, stderr=out)
    try:
        deadline = time.monotonic() + 60
        while subprocess.run(health, env=environment, capture_output=True, check=False).returncode:
            assert run.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.2)
        assert "warning: damaged is not served: " in log.read_text()
        with TritonServer(environment["TRITON_URL"]) as server:
            (asked,) = server.statistics("intent")
            assert not server.is_ready("damaged")
        assert asked.inferences > 0  # by the health check, which knows the key
        for path in ("v2/models/intent/config", "v2/models/intent/infer"):
            with pytest.raises(urllib.error.HTTPError, match="403"):
                urllib.request.urlopen(f"http://127.0.0.1:{web}/{path}", b"{}" if "infer" in path else None, 9).close()
        texts = [word for number in range(6) for word in ("--text", f"payday number {number} please")]
        added = enter(environment, "patcher", "add-label", "payday", *texts, "--force", "--classifier", "intent")
        assert added.returncode == 0, added.stderr
        with TritonServer(environment["TRITON_URL"]) as server:
            (answer,) = server.classify("intent", ["payday number 3 please"])
            assert (answer.labels[0], answer.head_version) == ("payday", 2)
            with pytest.raises(ServerRefused):
                server.load("intent_head")
            (asked,) = server.statistics("intent_backbone")
        assert (asked.inferences == 0) == (runs == "1")
        run.terminate()
        assert run.wait(60) == 0
    finally:
        run.kill()
        run.wait()


def test_entrypoint_wants_a_clear_word_on_the_encoder(container: dict[str, str]) -> None:
    outcome = enter({**container, "ENCODER_RUNS_BACKBONE": "yes"})
    assert (outcome.returncode, "is yes; expected 0 or 1" in outcome.stderr) == (2, True)


class Ready(http.server.BaseHTTPRequestHandler):
    """Answers like a Triton that reports itself ready although only `intent` and a head store are.

    `inference` is the HTTP status of each answer; an answer takes `seconds`.
    """

    inference, seconds = 200, 0.0

    def do_GET(self) -> None:
        ready = self.path.removeprefix("/v2/") in ("models/intent/ready", "models/intent_any/ready", "health/live")
        self.send_response(200 if ready else 400)
        self.end_headers()

    def do_POST(self) -> None:
        text, *more = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["inputs"]
        assert (text["name"], text["shape"]) == ("text", [1, 1])
        assert [(each["name"], each["data"]) for each in more] == (
            [("classifier", ["stored"])] if "intent_any" in self.path else []
        )
        time.sleep(self.seconds)
        self.send_response(self.inference)
        self.end_headers()
        self.wfile.write(b"Stub process 'intent_encoder_0_0' is not healthy." if self.inference == 500 else b"{}")

    def log_message(self, *_: object) -> None:
        pass


def checked(folder: Path, *options: str, repository: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run the health check against a stand-in for the server's HTTP; ``folder`` lists what the container serves."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Ready) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [sys.executable, str(DOCKER / "healthcheck.py"), *options, f"127.0.0.1:{server.server_port}"]
        models = str(repository or folder / "nowhere")
        environment = {**os.environ, "TMPDIR": str(folder), "TRITON_MODEL_REPO": models}
        outcome = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        server.shutdown()
    return outcome


def test_live_is_less_than_ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Liveness ignores models that are not ready, except one whose process died: only a restart brings it back."""
    (tmp_path / "classifiers").write_text("intent\ntopic")
    assert [checked(tmp_path, *options).returncode for options in ((), ("--live",))] == [1, 0]
    monkeypatch.setattr(Ready, "inference", 500)
    died = checked(tmp_path, "--live")
    assert (died.returncode, "'intent_encoder_0_0' is not healthy" in died.stdout) == (1, True)
    (tmp_path / "classifiers").unlink()
    assert checked(tmp_path, "--live").returncode == 0
    command = [sys.executable, str(DOCKER / "healthcheck.py"), "--live", "127.0.0.1:1"]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1


@pytest.mark.parametrize("served, code", [("intent", 0), ("intent\ntopic", 1), ("", 1), (None, 1)])
def test_health_is_the_readiness_of_every_classifier(tmp_path: Path, served: str | None, code: int) -> None:
    if served is not None:
        (tmp_path / "classifiers").write_text(served)
    outcome = checked(tmp_path)
    assert outcome.returncode == code, outcome.stdout + outcome.stderr


@pytest.mark.parametrize("status, code", [(200, 0), (500, 1), (403, 0)])
def test_health_is_an_answer_where_http_gives_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, code: int
) -> None:
    (tmp_path / "classifiers").write_text("intent")
    monkeypatch.setattr(Ready, "inference", status)
    outcome = checked(tmp_path)
    assert outcome.returncode == code, outcome.stdout + outcome.stderr
    assert ("is not healthy" in outcome.stdout) == (status == 500)


@pytest.mark.parametrize("status, code", [(200, 0), (400, 0), (500, 1)])
def test_health_of_a_head_store_is_any_answer_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: int, code: int
) -> None:
    """One stored classifier whose head is damaged (400) must not take the others out of service."""
    (tmp_path / "classifiers").write_text("intent_any")
    for name, store in (("another_head", "other"), ("stored_head", "intent"), ("stored_too_head", "intent")):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "store").write_text(f"{store}\n")
    (tmp_path / "models" / "intent_any").mkdir()
    (tmp_path / "models" / "intent_any" / "config.pbtxt").touch()
    monkeypatch.setattr(Ready, "inference", status)
    outcome = checked(tmp_path, repository=tmp_path / "models")
    assert outcome.returncode == code, outcome.stdout + outcome.stderr
    for mark in (tmp_path / "models").glob("*/store"):
        mark.write_text("other")
    assert checked(tmp_path, repository=tmp_path / "models").returncode == 0  # there is no classifier to ask


def test_a_classifier_that_is_dropped_from_a_head_store_meanwhile_is_not_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(DOCKER)
    healthcheck = importlib.import_module("healthcheck")
    marks = [tmp_path / f"{name}_head" / "store" for name in ("dropped", "stays")]
    marks[1].parent.mkdir()
    marks[1].write_text("intent\n")
    monkeypatch.setattr(healthcheck, "REPOSITORY", MagicMock(glob=lambda _: marks))
    assert healthcheck.asked_for("intent_any")["classifier"] == "stays"


def test_health_of_a_busy_server_is_known_in_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Docker and Kubernetes wait for five seconds, however many classifiers there are."""
    (tmp_path / "classifiers").write_text("intent\n" * 20)
    monkeypatch.setattr(Ready, "seconds", 1.2)
    started = time.monotonic()
    outcome = checked(tmp_path)
    assert outcome.returncode == 0, outcome.stdout + outcome.stderr
    assert time.monotonic() - started < 5


def test_a_classifier_that_was_dropped_makes_nothing_unready(tmp_path: Path) -> None:
    (tmp_path / "classifiers").write_text("intent\ndropped")
    repository = tmp_path / "models"
    for name in ("intent", "dropped"):
        (repository / name).mkdir(parents=True)
        (repository / name / "config.pbtxt").touch()
    codes = []
    with http.server.HTTPServer(("127.0.0.1", 0), Ready) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [sys.executable, str(DOCKER / "healthcheck.py"), f"127.0.0.1:{server.server_port}"]
        environment = {**os.environ, "TMPDIR": str(tmp_path), "TRITON_MODEL_REPO": str(repository)}
        for name in ("none", "dropped", "intent"):
            shutil.rmtree(repository / name, ignore_errors=True)
            codes.append(subprocess.run(command, env=environment, capture_output=True, check=False).returncode)
        server.shutdown()
    assert codes == [1, 0, 1]


def unit() -> dict[str, list[str]]:
    """The settings of the systemd unit, each with all its values."""
    found: dict[str, list[str]] = {}
    for line in (DOCKER / "patcher.service").read_text().splitlines():
        key, equals, value = line.partition("=")
        if equals and not line.startswith("#"):
            found.setdefault(key, []).append(value)
    return found


def test_the_service_lets_patcher_stop_the_server() -> None:
    found = unit()
    assert found["KillMode"] == ["mixed"]
    drained = inspect.signature(EmbeddedTriton).parameters["exit_timeout"].default
    assert int(found["TimeoutStopSec"][0]) > 2 * drained + 10  # for requests in flight, then for the server's shutdown
    # Also 2, bad input: a volume may be mounted late.
    assert (found["Restart"], found["StartLimitIntervalSec"]) == (["on-failure"], ["0"])
    assert "RestartPreventExitStatus" not in found
    (command,) = found["ExecStart"]
    program, verb, *options = command.split()
    assert (program, verb) == ("/opt/patcher/.venv/bin/patcher", "serve")
    known = {name for parameter in serve_command.params for name in parameter.opts}
    assert {word for word in options if word.startswith("--")} <= known
    assert options[options.index("--admin-key-file") + 1] == "${CREDENTIALS_DIRECTORY}/admin-key"
    assert found["LoadCredential"] == ["admin-key:/etc/patcher/admin-key"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd here")
def test_the_service_is_one_for_systemd(tmp_path: Path) -> None:
    text = (DOCKER / "patcher.service").read_text().replace("/opt/patcher/.venv/bin/patcher", "/bin/true")
    path = tmp_path / "patcher.service"
    path.write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", str(path)], capture_output=True, text=True, check=False)
    assert not [line for line in done.stderr.splitlines() if "patcher.service" in line], done.stderr
    path.write_text(text.replace("KillMode=mixed", "KillMode=mixd"))
    done = subprocess.run(["systemd-analyze", "verify", str(path)], capture_output=True, text=True, check=False)
    assert "KillMode" in done.stderr or "mixd" in done.stderr


def test_what_restarts_an_unhealthy_container_is_a_script_that_asks_the_health_check() -> None:
    text = (DOCKER / "README.md").read_text()
    (script,) = re.findall(r"```\n(compose=.*?)```", text, re.DOTALL)
    assert subprocess.run(["sh", "-n"], input=script, text=True, check=False).returncode == 0
    (asked,) = re.findall(r"exec -T (\w+) python3 (\S+) --live", script)
    service = compose()["services"][asked[0]]
    assert service["healthcheck"]["test"][-1] == asked[1]
    assert service["restart"] == "unless-stopped"


def test_monitoring_scrapes_what_compose_runs() -> None:
    services = yaml.safe_load((DOCKER / "docker-compose.monitoring.yml").read_text())["services"]
    scraped = yaml.safe_load((DOCKER / "monitoring" / "prometheus.yml").read_text())["scrape_configs"]
    assert scraped[0]["dns_sd_configs"][0]["names"] == ["triton"]
    host, port = scraped[1]["static_configs"][0]["targets"][0].split(":")
    assert host in services
    assert f":{port}/" in services[host]["healthcheck"]["test"][-1]
    for service in services.values():
        assert all(bound.startswith("127.0.0.1:") for bound in service.get("ports", []))
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert not source.startswith("./") or (DOCKER / source).is_file()


def test_an_alert_on_events_fires_at_the_first_one() -> None:
    """A counter that first appears as 1 shows no increase, so the rule also looks for series younger than an hour."""
    (group,) = yaml.safe_load((DOCKER / "monitoring" / "alerts.yml").read_text())["groups"]
    found = [rule["expr"] for rule in group["rules"] if "increase(" in rule["expr"]]
    assert len(found) == 2
    for expression in found:
        assert re.search(r"unless max by \([^)]+\) \(patcher_\w+(\{[^}]+\})? offset 1h\)", expression)
        # But not if the exporter is new, or could not read the audit log an hour ago: then it had no counters at all.
        assert expression.rstrip().endswith("and on () patcher_forced_total offset 1h")


def test_health_is_not_asked_through_a_proxy() -> None:
    with http.server.HTTPServer(("127.0.0.1", 0), Ready) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        command = [sys.executable, str(DOCKER / "healthcheck.py"), "--live", f"127.0.0.1:{server.server_port}"]
        environment = {**os.environ, "http_proxy": "http://127.0.0.1:9", "HTTP_PROXY": "http://127.0.0.1:9"}
        assert subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0
        server.shutdown()


def test_entrypoint_takes_names_over_several_lines(container: dict[str, str]) -> None:
    loaded = enter({**container, "CLASSIFIERS": "intent\n topic\n"}).stdout.split()
    assert {"--load-model=intent", "--load-model=topic"} <= set(loaded)
