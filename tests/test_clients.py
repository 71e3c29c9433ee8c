"""What docs/clients.md says about tensors, limits and errors, on a real server with Triton's own client."""

from __future__ import annotations

import queue
import re
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException

from patcher import Examples, FoundingSettings, ModelRepository, TritonServer, new_classifier
from patcher.triton.server import EmbeddedTriton

PAGE = (Path(__file__).parent.parent / "docs" / "clients.md").read_text()
MIB = 1 << 20


@pytest.fixture(scope="module")
def server(tiny_original, tmp_path_factory):
    root = tmp_path_factory.mktemp("clients") / "model_repository"
    shutil.copytree(tiny_original, root)
    pairs = [(text, label) for label in tiny.NEW for text in tiny.sentences(label, 12)]
    examples = Examples(tuple(text for text, _ in pairs), tuple(label for _, label in pairs), "made up")
    new_classifier(ModelRepository(root), "stored", examples, settings=FoundingSettings(in_store=True))
    models = ["intent", "intent_features", "intent_any"]
    with EmbeddedTriton(root, models, log_file=root.parent / "log") as running:
        yield running


@pytest.fixture(scope="module")
def client(server):
    with triton.InferenceServerClient(server.url) as made:
        yield made


def strings(values, name="text", shape=None):
    array = np.array(values, dtype=object).reshape(shape or (len(values), 1))
    return triton.InferInput(name, list(array.shape), "BYTES").set_data_from_numpy(array)


def numbers():
    return triton.InferInput("text", [1, 1], "FP32").set_data_from_numpy(np.zeros((1, 1), np.float32))


def rows(heading):
    """The rows of the table under a heading, each as its cells."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = [line.strip("|").split("|") for line in section.splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in line] for line in lines if not set(line[0]) <= set("- ")]


def test_the_tensors_are_those_of_the_page(client):
    told = {name.strip("`"): (kind, shape.strip("`")) for way, name, kind, shape, _ in rows("Tensors") if way == "out"}
    answer = client.infer("intent", [strings(["hello", ""])])
    found = {each.name: (each.datatype, tuple(each.shape)) for each in answer.get_response().outputs}
    sizes = {"n": 2, "k": 5, "labels": len(tiny.OLD), "1": 1}
    shapes = {name: tuple(sizes[size] for size in shape.strip("[]").split(", ")) for name, (_, shape) in told.items()}
    assert found == {name: (told[name][0], shapes[name]) for name in told}
    wanted = [triton.InferRequestedOutput("label")]
    some = client.infer("intent_any", [strings(["a"] * 64), strings(["stored"] * 64, "classifier")], outputs=wanted)
    assert [each.name for each in some.get_response().outputs] == ["label"]
    assert client.infer("intent", [strings(["x" * MIB])], outputs=wanted).as_numpy("label").shape == (1, 5)


def test_what_nobody_waits_for_is_encoded_all_the_same(client):
    def encoded():
        (found,) = client.get_inference_statistics("intent_encoder").model_stats
        return found.inference_count

    def sent(deadline=None):
        for _ in range(16):
            client.async_infer("intent", long, client_timeout=deadline, callback=lambda result, error: ended.put(error))
        return [ended.get(timeout=60) for _ in range(16)]

    # The deadline is a share of what the same requests take here: on a fast machine a fixed one is never missed. One
    # that no request misses was taken from a round in which the machine stood still.
    ended, long, began = queue.Queue(), [strings(["hello " * 500] * 64)], time.monotonic()
    assert sent() == [None] * 16
    deadline, missed = time.monotonic() - began, []
    for _ in range(8):
        before, deadline = encoded(), deadline / 2
        if missed := [error.status() for error in sent(deadline) if error]:
            break
    assert "StatusCode.DEADLINE_EXCEEDED" in missed
    until = time.monotonic() + 60
    while encoded() < before + 16 * 64 and time.monotonic() < until:
        time.sleep(0.05)
    assert encoded() == before + 16 * 64


TEXT = [strings(["a"])]
ASKED = {
    "more than 64 texts": ("intent", [strings(["a"] * 65)]),
    "or none": ("intent", [strings([], shape=(0, 1))]),
    "more than 1 MiB": ("intent", [strings(["x" * (MIB + 1)])]),
    "not UTF-8": ("intent", [strings([b"\xff", b"good"])]),
    "a tensor with another name": ("intent", [strings(["a"], "texts")]),
    "type": ("intent", [numbers()]),
    "shape": ("intent", [strings(["a", "b"], shape=(2,))]),
    "an output that does not exist": ("intent", TEXT, [triton.InferRequestedOutput("labels")]),
    "no such classifier": ("intent_any", [*TEXT, strings(["none"], "classifier")]),
    "several in one request": ("intent_any", [strings(["a", "b"]), strings(["stored", "none"], "classifier")]),
    "the model is not loaded": ("other", TEXT),
}


@pytest.mark.parametrize("what", ASKED)
def test_a_request_fails_with_the_status_that_the_page_tells(what, client):
    (status,) = [status for told, status in rows("Errors") if what in told]
    with pytest.raises(InferenceServerException) as error:
        client.infer(*ASKED[what][:2], outputs=(*ASKED[what], None)[2])
    assert error.value.status() == f"StatusCode.{status}"


def test_a_deadline_a_missing_server_and_a_missing_key(client):
    told = {what: re.match(r"\w+", status)[0] for what, status in rows("Errors")}
    slow = [strings([b"a " * (MIB // 2)] * 64)]
    nobody = triton.InferenceServerClient("127.0.0.1:1")
    for what, call in (
        ("no answer before the deadline", lambda: client.infer("intent", slow, client_timeout=0.01)),
        ("nobody listens there, or the server ended", lambda: nobody.infer("intent", TEXT)),
        ("model control without the admin key", lambda: client.load_model("intent_head")),
    ):
        with pytest.raises(InferenceServerException, match=told[what]) as error:
            call()
        assert error.value.status() == f"StatusCode.{told[what]}"


def test_the_snippets_run(server, capsys):
    first, second = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    exec(first.replace("localhost:8001", server.url), {})  # noqa: S102 - the page's own
    lines = capsys.readouterr().out.splitlines()
    with TritonServer(server.url) as ours:
        answers = ours.classify("intent", [f"where is parcel {number}?" for number in range(100)])
    assert [line.split("? ")[1].split()[0] for line in lines] == [answer.labels[0] for answer in answers]
    exec(second.replace("localhost:8001", server.url), {})  # noqa: S102 - the page's own
    assert capsys.readouterr().out.count("'") == 4
