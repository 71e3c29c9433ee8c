"""Who may do what, on real servers: without the key, without TLS, without the right certificate."""

from __future__ import annotations

import contextlib
import http.client
import json
import shutil
from pathlib import Path

import pytest
import tiny
import tritonclient.grpc
import tritonclient.utils
from certificates import DAY, Authority

from patcher import InputError, TritonServer
from patcher.cli import main
from patcher.errors import ServerRefused, TlsError, WrongPort
from patcher.triton.server import EmbeddedTriton
from patcher.triton.tls import ClientTls, ServerTls

pytestmark = pytest.mark.server
MODELS = ["intent", "intent_features"]
KEY = "key-of-sixteen-or-more"
INFER = json.dumps({"inputs": [{"name": "text", "shape": [1, 1], "datatype": "BYTES", "data": ["hello"]}]})
CONTROL = (
    "/v2/repository/index",
    "/v2/repository/models/intent_head/load",
    "/v2/repository/models/intent_head/unload",
    "/v2/trace/setting",
    "/v2/logging",
    "/v2/systemsharedmemory/region/x/register",
)
NESTED = '{"inputs":' + '{"a":' * 1_000_000


def post(address, path, body="{}", headers=None):
    connection = http.client.HTTPConnection(address, timeout=10)
    try:
        connection.request("POST", path, body, headers or {})
        return connection.getresponse().status
    finally:
        connection.close()


def get(address, path):
    connection = http.client.HTTPConnection(address, timeout=10)
    try:
        connection.request("GET", path)
        return connection.getresponse().status
    finally:
        connection.close()


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("certificates"))


@pytest.fixture(scope="module")
def secured(tiny_original, tmp_path_factory, authority):
    """TLS, and a key for model control."""
    folder = tmp_path_factory.mktemp("secured")
    shutil.copytree(tiny_original, folder / "model_repository")
    pair = authority.sign("server")
    tls = ServerTls(pair.certificate, pair.key)
    with EmbeddedTriton(
        folder / "model_repository", MODELS, admin_key=KEY, tls=tls, log_file=folder / "log"
    ) as running:
        yield running


@pytest.fixture(scope="module")
def mutual(tiny_original, tmp_path_factory, authority):
    """TLS that asks for the client's certificate."""
    folder = tmp_path_factory.mktemp("mutual")
    shutil.copytree(tiny_original, folder / "model_repository")
    pair = authority.sign("mutual-server")
    tls = ServerTls(pair.certificate, pair.key, authority.ca)
    with EmbeddedTriton(folder / "model_repository", MODELS, tls=tls, log_file=folder / "log") as running:
        yield running


def test_without_the_key_models_cannot_be_changed_but_asked(secured, authority):
    with TritonServer(secured.url, tls=ClientTls(authority.ca)) as client:
        for call in (lambda: client.load("intent_head"), lambda: client.unload("intent_head"), client.repository_index):
            with pytest.raises(ServerRefused, match="no admin key"):
                call()
        assert client.classify("intent", ["hello"])[0].head_version == 1
    with secured.client(tls=ClientTls(authority.ca)) as client:
        client.load("intent_head")
        assert client.repository_index()


def test_http_without_the_key(tiny_original, tmp_path):
    shutil.copytree(tiny_original, tmp_path / "model_repository")
    with EmbeddedTriton(tmp_path / "model_repository", MODELS, admin_key=KEY, log_file=tmp_path / "log") as running:
        assert {path: post(running.http_url, path) for path in CONTROL} == dict.fromkeys(CONTROL, 403)
        assert post(running.http_url, "/v2/models/intent/infer", INFER) == 200
        assert post(running.http_url, CONTROL[1], "{}", {"admin-key": KEY}) == 200


def test_shared_memory_is_not_for_clients_without_the_key(tiny_original, tmp_path):
    """A client that registers the memory of the server's own processes can have answers written over it."""
    shutil.copytree(tiny_original, tmp_path / "model_repository")
    with EmbeddedTriton(tmp_path / "model_repository", MODELS, admin_key=KEY, log_file=tmp_path / "log") as running:
        region = next(Path("/dev/shm").glob(f"{running._shared_memory}*"))  # noqa: S108
        with tritonclient.grpc.InferenceServerClient(running.url) as client:
            for call in (
                lambda: client.register_system_shared_memory("x", f"/{region.name}", 64),
                client.unregister_system_shared_memory,
                client.get_system_shared_memory_status,
                lambda: client.register_cuda_shared_memory("x", b"", 0, 64),
            ):
                with pytest.raises(tritonclient.utils.InferenceServerException, match="admin-key"):
                    call()
        assert get(running.http_url, "/v2/systemsharedmemory/status") == 403


def test_no_web_page_loads_a_model_into_a_server_without_a_key(tiny_original, tmp_path, monkeypatch):
    """A browser sends a plain-text POST to any address without asking."""
    monkeypatch.setenv("PATCHER_ADMIN_KEY", "for-clients-only")
    shutil.copytree(tiny_original, tmp_path / "model_repository")
    with EmbeddedTriton(tmp_path / "model_repository", MODELS, log_file=tmp_path / "log") as running:
        headers = {"Content-Type": "text/plain", "Origin": "http://elsewhere.example"}
        assert {path: post(running.http_url, path, headers=headers) for path in CONTROL} == dict.fromkeys(CONTROL, 403)
        assert post(running.http_url, "/v2/models/intent/infer", INFER) == 200
        with running.client() as client:
            client.load("intent_head")
        assert b"for-clients-only" not in Path(f"/proc/{running.pid}/environ").read_bytes()
        assert (tmp_path / "log").stat().st_mode & 0o777 == 0o600


def test_nested_json_is_not_read_where_others_reach_http(tiny_original, tmp_path):
    shutil.copytree(tiny_original, tmp_path / "model_repository")
    server = EmbeddedTriton(
        tmp_path / "model_repository", MODELS, host="0.0.0.0", admin_key=KEY, log_file=tmp_path / "log"  # noqa: S104
    )  # fmt: skip
    with server as running:
        for path in ("/v2/models/intent/infer", "/v2/health/live", *CONTROL):
            with contextlib.suppress(OSError):  # the server may refuse before everything is sent
                assert post(running.http_url, path, NESTED) in (400, 403, 405)
        assert get(running.http_url, "/v2/models/intent/config") == 403
        assert get(running.http_url, "/v2/models/intent/ready") == 200
        with TritonServer(running.http_url, timeout=5) as wrong, pytest.raises(WrongPort):
            wrong.is_live()
        assert running.pid


def test_neither_a_large_form_nor_nested_json_ends_the_server(tiny_original, tmp_path):
    """Triton's HTTP library copies the one to the stack of a thread; its JSON parser recurses for the other."""
    shutil.copytree(tiny_original, tmp_path / "model_repository")
    form = {"Content-Type": "application/x-www-form-urlencoded"}
    with EmbeddedTriton(tmp_path / "model_repository", MODELS, log_file=tmp_path / "log") as running:
        for address, path in ((running.http_url, "/v2/health/live"), (running.metrics_url, "/metrics")):
            assert post(address, path, "b" * 20_000_000, form) == 405
        assert post(running.http_url, "/v2/models/intent/infer", NESTED) in (400, 500)
        assert get(running.http_url, "/v2/models/intent/ready") == 200


def test_http_opens_to_others_when_asked_to(tiny_original, tmp_path):
    shutil.copytree(tiny_original, tmp_path / "model_repository")
    server = EmbeddedTriton(
        tmp_path / "model_repository", MODELS, host="0.0.0.0", http=True, admin_key=KEY,  # noqa: S104
        log_file=tmp_path / "log",
    )  # fmt: skip
    with server as running:
        assert post(running.http_url, "/v2/models/intent/infer", INFER) == 200
        assert post(running.http_url, CONTROL[1]) == 403


def test_with_tls_plain_clients_are_refused_on_grpc_and_http(secured, mutual):
    for server in (secured, mutual):
        with TritonServer(server.url) as plain:
            for call in (
                plain.is_live, lambda plain=plain: plain.classify("intent", ["a"]), plain.repository_index,
                lambda plain=plain: plain.load("intent_head"),
            ):  # fmt: skip
                with pytest.raises(TlsError, match="accepts only TLS; pass --tls-ca"):
                    call()
        assert {path: post(server.http_url, path) for path in CONTROL} == dict.fromkeys(CONTROL, 403)
        assert post(server.http_url, "/v2/models/intent/infer", INFER) == 403
        assert get(server.http_url, "/v2/models/intent/config") == 403
        assert get(server.http_url, "/v2/models/intent/ready") == 200
        assert server.key_hidden


def test_with_tls_http_keeps_to_loopback(tmp_path, authority):
    pair = authority.sign("everywhere")
    tls = ServerTls(pair.certificate, pair.key)
    (tmp_path / "empty").mkdir()
    everywhere = EmbeddedTriton(tmp_path / "empty", [], host="0.0.0.0", admin_key=KEY, tls=tls)  # noqa: S104
    assert (everywhere.http_host, everywhere.metrics_host) == ("127.0.0.1", "127.0.0.1")
    command = everywhere.command()
    with pytest.raises(InputError, match=r"HTTP does not support TLS.*leave out --http"):
        EmbeddedTriton(tmp_path / "empty", [], http=True, tls=tls)
    assert "--grpc-address=0.0.0.0" in command
    assert "--http-address=127.0.0.1" in command
    assert "--metrics-address=127.0.0.1" in command


def test_mutual_tls_takes_a_certificate_of_the_right_authority(mutual, authority, tmp_path):
    client = authority.sign("client")
    with TritonServer(mutual.url, tls=ClientTls(str(authority.ca), str(client.certificate), str(client.key))) as good:
        assert good.classify("intent", ["hello"])[0].head_version == 1
    with TritonServer(mutual.url, tls=ClientTls(authority.ca)) as bare:
        with pytest.raises(TlsError, match=r"asks for the client's own certificate.*--tls-cert"):
            bare.classify("intent", ["a"])
    stranger = Authority(tmp_path, "stranger").sign("other")
    with TritonServer(mutual.url, tls=ClientTls(authority.ca, stranger.certificate, stranger.key)) as other:
        with pytest.raises(TlsError, match="does not trust the certificate"):
            other.classify("intent", ["a"])


def test_the_wrong_authority_and_the_wrong_name(secured, authority, tmp_path, tiny_original):
    stranger = Authority(tmp_path, "stranger")
    with TritonServer(secured.url, tls=ClientTls(stranger.ca)) as wrong:
        with pytest.raises(TlsError, match=r"stranger\.pem did not sign"):
            wrong.is_live()
    named = ClientTls(authority.ca, server_name="triton.example")
    with TritonServer(secured.url, tls=named) as wrong, pytest.raises(TlsError, match="for another name than"):
        wrong.is_live()
    with TritonServer(secured.url, tls=ClientTls(authority.ca, server_name="localhost")) as right:
        assert right.is_live()


def test_tls_against_a_plain_server_and_nobody(tiny_original, tmp_path, authority):
    (tmp_path / "empty").mkdir()
    with EmbeddedTriton(tmp_path / "empty", [], log_file=tmp_path / "log") as running:
        url = running.url
        with TritonServer(url, tls=ClientTls(authority.ca)) as client:
            with pytest.raises(TlsError, match="does not speak TLS; leave --tls-ca out"):
                client.is_live()
    with TritonServer(url, tls=ClientTls(authority.ca)) as client:
        assert not client.is_live()


def test_a_certificate_that_expired_while_serving(tiny_original, tmp_path, authority, monkeypatch):
    pair = authority.sign("expired", valid=-DAY)
    with pytest.raises(InputError, match=r"expired\.pem: certificate has expired"):
        ServerTls(pair.certificate, pair.key)
    with pytest.raises(InputError, match="expired"):
        ClientTls(authority.ca, pair.certificate, pair.key)
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr("patcher.triton.tls._validity", lambda *_: "")
    tls = ServerTls(pair.certificate, pair.key)
    with EmbeddedTriton(tmp_path / "empty", [], tls=tls, log_file=tmp_path / "log") as running:
        with TritonServer(running.url, tls=ClientTls(authority.ca)) as client:
            with pytest.raises(TlsError, match="has expired"):
                client.is_live()


def test_files_that_cannot_work(tmp_path, authority):
    pair, other = authority.sign("one"), authority.sign("two")
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nothing")
    for make, said in (
        (lambda: ClientTls(tmp_path / "none.pem"), "cannot read --tls-ca .*No such file"),
        (lambda: ClientTls(nonsense), "holds no certificate"),
        (lambda: ClientTls(authority.ca, pair.certificate), "need both --tls-cert and --tls-key"),
        (lambda: ServerTls(pair.certificate, tmp_path / "none.key"), "cannot read --tls-key"),
        (lambda: ServerTls(pair.certificate, other.key), "does not belong to"),
        (lambda: ServerTls(nonsense, pair.key), "cannot use"),
    ):
        with pytest.raises(InputError, match=said):
            make()


def test_from_the_shell(secured, authority, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("TRITON_MODEL_REPO", str(secured.repository))
    monkeypatch.setenv("TRITON_URL", secured.url)
    monkeypatch.setenv("PATCHER_ADMIN_KEY", KEY)
    assert main(["classify", "hello"]) == 1
    assert "accepts only TLS" in capsys.readouterr().err
    assert main(["doctor"]) == 1
    assert "FAULT  TLS: the server at" in capsys.readouterr().out
    monkeypatch.setenv("PATCHER_TLS_CA", str(authority.ca))
    file = tiny.write_csv(tmp_path / "a.csv", {"payday": tiny.sentences("payday", 10)})
    assert main(["add-label", "--examples", str(file)]) == 0, capsys.readouterr().err
    assert main(["rollback"]) == 0
    assert main(["doctor"]) == 0
    capsys.readouterr()
    monkeypatch.delenv("PATCHER_TLS_CA")
    assert main(["classify", "hello", "--tls-cert", str(authority.ca)]) == 2
    assert "TLS needs --tls-ca" in capsys.readouterr().err
    assert main(["serve", "--tls-cert", str(authority.ca)]) == 2
    assert "TLS requires both --tls-cert FILE and --tls-key FILE" in capsys.readouterr().err


@pytest.mark.parametrize("which", ["secured", "mutual"])
def test_load_is_tested_over_tls(which, request, authority, tiny_original, capsys):
    running = request.getfixturevalue(which)
    client = authority.sign("load-client")
    tls = ["--tls-ca", authority.ca, "--tls-cert", client.certificate, "--tls-key", client.key]
    command = [
        "loadtest",
        "--repo",
        tiny_original,
        "--url",
        running.url,
        "--concurrency",
        "2",
        "--window",
        "0.5",
        "--json",
    ]
    assert main([str(word) for word in (*command, *tls)]) == 0, capsys.readouterr().err
    (found,) = json.loads(capsys.readouterr().out)
    assert found["throughput"] > 1
    assert found["failures"] == 0
