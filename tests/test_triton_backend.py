"""The Python-based onnxruntime backend on a real server: it refuses what the C++ one refuses, and answers correctly.

With ``PATCHER_SERVER_ONNXRUNTIME=DIR`` the same tests run on Triton's C++ backend. If the two word an error
differently, the pattern below matches both.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tritonclient.grpc as triton
from onnx import TensorProto, helper
from triton_models import FLOAT, linear, lookup, only_python_based, onnx_bytes, tensor, write_model
from tritonclient.utils import InferenceServerException

from patcher import TritonServer
from patcher.errors import ServerRefused
from patcher.triton.backends.onnxruntime import graphs
from patcher.triton.backends.onnxruntime import session as backend
from patcher.triton.backends.onnxruntime.failures import explain
from patcher.triton.backends.onnxruntime.settings import LoadError, has_gpu
from patcher.triton.server import EmbeddedTriton

pytestmark = pytest.mark.server

FEATURES, LOGITS = tensor("input", "features", "FP32", 3), tensor("output", "logits", "FP32", 2)
BATCH = "max_batch_size: 8 "
GOOD = BATCH + FEATURES + LOGITS


def tokens_to_features():
    """Two token tensors [batch, length] to the sums of their products and of the first, [batch, 2]."""
    free = ["batch", "length"]
    nodes = [
        helper.make_node("Cast", ["input_ids"], ["ids"], to=FLOAT),
        helper.make_node("Cast", ["attention_mask"], ["mask"], to=FLOAT),
        helper.make_node("Mul", ["ids", "mask"], ["product"]),
        helper.make_node("Constant", [], ["axis"], value_ints=[1]),
        helper.make_node("ReduceSum", ["product", "axis"], ["first"], keepdims=1),
        helper.make_node("ReduceSum", ["ids", "axis"], ["second"], keepdims=1),
        helper.make_node("Concat", ["first", "second"], ["features"], axis=1),
    ]
    given = [(name, TensorProto.INT64, free) for name in ("input_ids", "attention_mask")]
    return onnx_bytes(nodes, given, [("features", FLOAT, ["batch", 2])])


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("backend")
    root = folder / "model_repository"
    root.mkdir()
    with EmbeddedTriton(root, [], log_file=folder / "triton.log") as running:
        yield running


@pytest.fixture
def load(server, request):
    """A function that loads a model made for the test under the test's name, and returns that name."""

    def write_and_load(data, config):
        name = "m" + str(abs(hash(request.node.name)))
        write_model(server.repository, name, data, config)
        with TritonServer(server.url) as client:
            client.load(name)
        return name

    return write_and_load


def ask(server, model, name, value, data_type, outputs=()):
    given = triton.InferInput(name, list(value.shape), data_type)
    given.set_data_from_numpy(value)
    with triton.InferenceServerClient(server.url) as client:
        return client.infer(model, [given], outputs=[triton.InferRequestedOutput(each) for each in outputs] or None)


def free_axis():
    """A model whose logits have a dynamic label axis: a Slice whose end is known only at run time."""
    nodes = [
        helper.make_node("MatMul", ["features", "weight"], ["raw"]),
        helper.make_node("Shape", ["features"], ["shape"]),
        helper.make_node("Mul", ["shape", "zero"], ["nothing"]),
        helper.make_node("Add", ["nothing", "two"], ["ends"]),
        helper.make_node("Slice", ["ends", "zero", "one"], ["end"]),
        helper.make_node("Slice", ["raw", "zero", "end", "one"], ["logits"]),
    ]
    constants = {"zero": [0], "one": [1], "two": [2], "weight": np.ones((3, 2), np.float32)}
    return onnx_bytes(nodes, [("features", FLOAT, ["batch", 3])], [("logits", FLOAT, ["batch", "labels"])], constants)


def two_inputs():
    return onnx_bytes(
        [helper.make_node("Add", ["features", "other"], ["logits"])],
        [("features", FLOAT, ["batch", 2]), ("other", FLOAT, ["batch", 2])],
        [("logits", FLOAT, ["batch", 2])],
    )


def two_outputs():
    nodes = [helper.make_node("Identity", ["features"], ["logits"]), helper.make_node("Neg", ["features"], ["extra"])]
    return onnx_bytes(
        nodes, [("features", FLOAT, ["batch", 2])], [("logits", FLOAT, ["batch", 2]), ("extra", FLOAT, ["batch", 2])]
    )


def default_input():
    """A model whose input `shift` has a default value that a request may replace."""
    return onnx_bytes(
        [helper.make_node("Add", ["features", "shift"], ["logits"])],
        [("features", FLOAT, ["batch", 2]), ("shift", FLOAT, [1, 2])],
        [("logits", FLOAT, ["batch", 2])],
        {"shift": np.full((1, 2), 10, np.float32)},
    )


REFUSED = {
    "free dims over a fixed output": (linear(), BATCH + FEATURES + tensor("output", "logits", "FP32", -1), "logits"),
    "a name declared free over a plain Gemm": (
        onnx_bytes(
            [helper.make_node("Gemm", ["features", "weight"], ["logits"])],
            [("features", FLOAT, ["batch", 3])],
            [("logits", FLOAT, ["batch", "labels"])],
            {"weight": np.ones((3, 2), np.float32)},
        ),
        BATCH + FEATURES + tensor("output", "logits", "FP32", -1),
        r"\[-1, ?2\].*\[-1, ?-1\]",
    ),
    "fixed dims over a free output": (free_axis(), GOOD, r"\[-1, ?-1\].*\[-1, ?2\]"),
    "other dims of an output": (
        linear(),
        BATCH + FEATURES + tensor("output", "logits", "FP32", 5),
        r"\[-1, ?2\].*-1, ?5",
    ),
    "other dims of an input": (linear(), BATCH + tensor("input", "features", "FP32", 4) + LOGITS, r"-1, ?3\].*-1, ?4"),
    "free dims over a fixed input": (linear(), BATCH + tensor("input", "features", "FP32", -1) + LOGITS, r"-1, ?-1"),
    "another rank": (linear(), BATCH + tensor("input", "features", "FP32", 3, 1) + LOGITS, r"-1, ?3\].*-1, ?3, ?1\]"),
    "too few inputs": (two_inputs(), BATCH + tensor("input", "features", "FP32", 2) + LOGITS, "expects 1.*provides 2"),
    "too many inputs": (linear(), GOOD + tensor("input", "more", "FP32", 1), "expects 2.*provides 1"),
    "an input the file lacks": (linear(), BATCH + tensor("input", "x", "FP32", 3) + LOGITS, "'x'.*features"),
    "an output the file lacks": (linear(), GOOD + tensor("output", "y", "FP32", 2), "'y'.*logits"),
    "another type of an input": (linear(), BATCH + tensor("input", "features", "FP16", 3) + LOGITS, "FP16.*FP32"),
    "another type of an output": (linear(), BATCH + FEATURES + tensor("output", "logits", "FP64", 2), "FP64.*FP32"),
    "batches over a fixed first axis": (linear(batch=1), GOOD, r"first dimension.*\[1, ?3\]"),
    "an optional input under batching": (
        default_input(),
        BATCH
        + tensor("input", "features", "FP32", 2)
        + tensor("input", "shift", "FP32", 2, more="optional: true")
        + LOGITS,
        "optional input 'shift'",
    ),
    "a missing file": (None, GOOD, "no file|failed to stat file"),
    "a file that is no ONNX": (b"not an ONNX file", GOOD, "cannot read|Load model from .* failed"),
    "an empty file": (b"", GOOD, "cannot read|provides 0|Load model from .* failed"),
    "half a file": (linear(300, 300)[:1000], GOOD, "cannot read|Load model from .* failed"),
    "an unknown accelerator": (
        linear(),
        GOOD + 'optimization { execution_accelerators { cpu_execution_accelerator { name: "warp" } } }',
        "unknown Execution Accelerator 'warp'",
    ),
    "an unknown execution mode": (
        linear(),
        GOOD + 'parameters { key: "execution_mode" value { string_value: "7" } }',
        "execution_mode is 7|execution_mode are 0 or 1 but got 7",
    ),
    "threads that are no number": (
        linear(),
        GOOD + 'parameters { key: "intra_op_thread_count" value { string_value: "many" } }',
        "'many'; expected a whole number|'many' to integral number",
    ),
    "a flag that is none": (
        linear(),
        GOOD + 'parameters { key: "enable_mem_arena" value { string_value: "perhaps" } }',
        "'perhaps'; expected one of|'perhaps' to boolean",
    ),
    "ragged batches": (
        linear(),
        BATCH + tensor("input", "features", "FP32", 3, more="allow_ragged_batch: true") + LOGITS,
        "ragged",
    ),
    "custom operators": (
        linear(),
        GOOD + 'model_operations { op_library_filename: "libops.so" }',
        "model_operations",
    ),
}


STRICTER = {"custom operators": only_python_based("loads libraries of operators")}


@pytest.mark.parametrize("case", [pytest.param(each, marks=STRICTER.get(each, ())) for each in REFUSED])
def test_refuses(case, load):
    data, config, reason = REFUSED[case]
    with pytest.raises(ServerRefused, match=reason):
        load(data, config)


# --- How its files find each other -----------------------------------------------------------------------------------

LOADED_BY_PATH = """
import importlib.util, sys
from pathlib import Path
spec = importlib.util.spec_from_file_location("model", sys.argv[1])
backend = importlib.util.module_from_spec(spec)
spec.loader.exec_module(backend)
def parts():
    return sorted(name for name in sys.modules if name.startswith("patcher"))
print(*parts())
try:
    backend.TritonPythonModel().initialize({
        "model_config": '{"name": "m", "input": [], "output": []}',
        "model_repository": "/nowhere",
        "model_version": "1",
        "model_instance_kind": "CPU",
        "model_instance_device_id": "0",
    })
except AttributeError as error:  # Triton's own module is not there, and so neither is the exception for it
    print(type(error.__context__).__name__)
assert backend.runner(Path("/nowhere")) is None
print(*parts())
"""


def test_the_files_find_each_other_where_patcher_is_not_installed(tmp_path):
    """Triton's stub loads one file by its path. Starting a head must load only the files that it needs."""
    folder = shutil.copytree(Path(backend.__file__).parent, tmp_path / "onnxruntime")
    (tmp_path / "session.py").write_text("raise SystemExit('not this one')")
    done = subprocess.run(
        [sys.executable, "-c", LOADED_BY_PATH, str(folder / "model.py")],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first, refused, last = done.stdout.splitlines()
    assert refused == "LoadError"
    head = {"patcher_onnxruntime", *(f"patcher_onnxruntime.{name}" for name in ("check", "session", "settings"))}
    assert set(first.split()) == head
    assert set(last.split()) == head | {"patcher_onnxruntime.backbone"}


# --- GPUs: provider options, tested without a GPU --------------------------------------------------------------------


def accelerator(name, **parameters):
    return {"optimization": {"execution_accelerators": {"gpu_execution_accelerator": [
        {"name": name, "parameters": parameters}
    ]}}}  # fmt: skip


@pytest.mark.parametrize(
    "config, provider, options",
    [
        ({}, "CUDAExecutionProvider", {}),
        (accelerator("cuda", gpu_mem_limit="7"), "CUDAExecutionProvider", {"gpu_mem_limit": "7"}),
        (accelerator("tensorrt"), "TensorrtExecutionProvider", {}),
        (accelerator("tensorrt", precision_mode="FP32"), "TensorrtExecutionProvider", {}),
        (
            accelerator("tensorrt", precision_mode="FP16", max_workspace_size_bytes="9", trt_engine_cache_enable="1"),
            "TensorrtExecutionProvider",
            {"trt_fp16_enable": "1", "trt_max_workspace_size": "9", "trt_engine_cache_enable": "1"},
        ),
        (
            accelerator("tensorrt", precision_mode="INT8", int8_calibration_table_name="t"),
            "TensorrtExecutionProvider",
            {"trt_int8_enable": "1", "trt_int8_calibration_table_name": "t"},
        ),
    ],
)
def test_an_accelerator_gets_its_parameters(config, provider, options, monkeypatch):
    providers = ["TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(backend.ort, "get_available_providers", lambda: providers)
    found = backend._providers(config, "GPU", 3)
    assert found[0] == (provider, {"device_id": "3", **options})
    assert found[-1][0] == "CPUExecutionProvider"
    assert backend._providers(config, "CPU", 0) == [("CPUExecutionProvider", {})]


@pytest.mark.parametrize(
    "config, reason",
    [
        (accelerator("tensorrt", precision_mode="FP8"), "unsupported precision mode 'FP8'"),
        (accelerator("tensorrt", speed="high"), "unknown parameter 'speed'"),
        (accelerator("warp"), "unknown Execution Accelerator 'warp'"),
    ],
)
def test_an_accelerator_that_makes_no_sense(config, reason, monkeypatch):
    monkeypatch.setattr(backend.ort, "get_available_providers", lambda: ["TensorrtExecutionProvider"])
    with pytest.raises(LoadError, match=reason):
        backend._providers(config, "GPU", 0)


@pytest.mark.skipif(has_gpu(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_no_cpu(tmp_path, monkeypatch, capfd):
    monkeypatch.delenv("ORT_ENABLE_CUDNN_FLASH_ATTENTION", raising=False)
    (tmp_path / "model.onnx").write_bytes(linear())
    with pytest.raises(LoadError, match=r"expected CUDAExecutionProvider.*onnxruntime-gpu\[cuda,cudnn\]|has no CUDA"):
        backend.open_session({}, tmp_path / "model.onnx", "GPU", 0)
    assert capfd.readouterr().out == ""
    if "CUDAExecutionProvider" in backend.ort.get_available_providers():
        assert os.environ.pop("ORT_ENABLE_CUDNN_FLASH_ATTENTION") == "0"


# --- CUDA graphs: what can be tested without one-----------------------------------------------------------------------


@pytest.fixture
def session(tmp_path):
    (tmp_path / "model.onnx").write_bytes(tokens_to_features())
    return backend.open_session({}, tmp_path / "model.onnx", "CPU", 0)


class Spy:
    """A session that counts its runs, and can be made to answer wrongly when it runs on the tensors of a recording."""

    def __init__(self, session, wrong=False):
        self.session, self.wrong = session, wrong
        self.plain = self.bound = 0

    def __getattr__(self, name):
        return getattr(self.session, name)

    def run(self, *given):
        self.plain += 1
        return self.session.run(*given)

    def run_with_iobinding(self, *given):
        self.bound += 1
        if not self.wrong or self.bound <= 4:
            self.session.run_with_iobinding(*given)


def tokens(shape, rng):
    return {name: rng.integers(0, 9, shape) for name in ("input_ids", "attention_mask")}


def test_a_recorded_shape_answers_as_any_other_run(session):
    """On the CPU, runs use the tensors of the recording, which a graph on a GPU would read and write."""
    spy = Spy(session)
    graphed = graphs.GraphedSession(spy, graphs.parse_shapes("1,2 x 3,4"), device="cpu")
    graphed.record()
    assert (spy.bound, spy.plain) == (8, 4)  # each is recorded, and then compared with a plain run
    rng = np.random.default_rng(0)
    for shape, bound in {(2, 3): 9, (1, 4): 10, (5, 3): 10, (2, 5): 10, (2, 4): 11}.items():
        feed = tokens(shape, rng)
        np.testing.assert_array_equal(graphed.run(["features"], feed)[0], session.run(["features"], feed)[0])
        assert spy.bound == bound


def test_a_recording_that_answers_otherwise_is_found(session):
    graphed = graphs.GraphedSession(Spy(session, wrong=True), graphs.parse_shapes("1,2 x 3,4"), device="cpu")
    with pytest.raises(ValueError, match="2 x 4 tokens give other answers"):
        graphed.record()


def test_inputs_of_several_shapes_and_chosen_outputs_are_left_to_the_session(session, tmp_path):
    spy = Spy(session)
    graphed = graphs.GraphedSession(spy, frozenset([(1, 2)]), device="cpu")
    feed = {"input_ids": np.ones((1, 2), np.int64), "attention_mask": np.ones((1, 1), np.int64)}
    assert graphed.run(["features"], feed)[0].tolist() == [[2, 2]]
    (tmp_path / "model.onnx").write_bytes(two_outputs())
    chosen = Spy(backend.open_session({}, tmp_path / "model.onnx", "CPU", 0))
    graphed = graphs.GraphedSession(chosen, frozenset([(1, 2)]), device="cpu")
    (found,) = graphed.run(["logits"], {"features": np.ones((1, 2), np.float32)})
    assert found.shape == (1, 2)
    assert (spy.plain, spy.bound, chosen.plain, chosen.bound) == (1, 0, 1, 0)


@pytest.mark.parametrize("setting", ["8", "1,2 x", "1 x 2 x 3", "0 x 8", "one x 8"])
def test_shapes_that_are_none(setting, tmp_path):
    with pytest.raises(LoadError, match=f"cuda_graphs is '{setting}'; expected batches x lengths"):
        backend.open_runner(backbone_of(setting), tmp_path / "model.onnx", "GPU", 0)


def backbone_of(setting, **parameters):
    features = {"name": "features", "data_type": "TYPE_FP32", "dims": ["2"]}
    given = [{"name": name, "data_type": "TYPE_INT64", "dims": ["-1"]} for name in ("input_ids", "attention_mask")]
    texts = {key: {"string_value": value} for key, value in {"cuda_graphs": setting, **parameters}.items()}
    return {"name": "m", "max_batch_size": 8, "input": given, "output": [features], "parameters": texts}


@pytest.fixture
def gpu(monkeypatch):
    """Make the CPU pose as a GPU; ``asked`` lists the kind of each session, and whether it is for graphs."""
    opened, asked = backend.open_session, []

    def open_on_the_cpu(config, path, kind, device, *, graphs=False):
        asked.append((kind, graphs))
        return opened(config, path, "CPU", device)

    class OnTheCpu(graphs.GraphedSession):
        def __init__(self, session, shapes, number):
            super().__init__(session, shapes, "cpu", number)

    monkeypatch.setattr(backend, "open_session", open_on_the_cpu)
    monkeypatch.setattr(graphs, "GraphedSession", OnTheCpu)
    return SimpleNamespace(asked=asked)


def test_shapes_are_recorded_on_a_gpu_alone(tmp_path, gpu, capfd):
    (tmp_path / "model.onnx").write_bytes(tokens_to_features())
    for kind in ("CPU", "GPU"):
        run = backend.open_runner(backbone_of("1 x 3"), tmp_path / "model.onnx", kind, 0)
        feed = tokens((1, 3), np.random.default_rng(0))
        assert run(["features"], feed)[0].shape == (1, 2)
    assert gpu.asked == [("CPU", False), ("GPU", True)]
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "problem, reason",
    [
        ("nodes", "all nodes have not been partitioned"),
        ("version", "onnxruntime 1.30.2 may record them wrongly; expected 1.31 or later"),
        ("memory", "with memory.enable_memory_arena_shrinkage the memory that they address may be gone"),
    ],
)
def test_what_cannot_be_recorded_runs_without(problem, reason, tmp_path, gpu, monkeypatch, capfd):
    (tmp_path / "model.onnx").write_bytes(tokens_to_features())
    more = {"memory.enable_memory_arena_shrinkage": "gpu:0"} if problem == "memory" else {}
    if problem == "version":
        monkeypatch.setattr(backend.ort, "__version__", "1.30.2")
    if problem == "nodes":
        opened = backend.open_session

        def refuse(*given, graphs=False):
            if graphs:
                raise LoadError(reason)
            return opened(*given)

        monkeypatch.setattr(backend, "open_session", refuse)
    run = backend.open_runner(backbone_of("1 x 3", **more), tmp_path / "model.onnx", "GPU", 0)
    assert f"warning: m runs without CUDA graphs: {reason}" in capfd.readouterr().err
    assert gpu.asked == [("GPU", False)]
    if problem != "memory":  # a device that does not exist here
        assert run(["features"], tokens((1, 3), np.random.default_rng(0)))[0].shape == (1, 2)


def test_graphs_are_for_cuda_alone(tmp_path, monkeypatch):
    providers = [f"{each}ExecutionProvider" for each in ("Tensorrt", "CUDA", "CPU")]
    monkeypatch.setattr(backend.ort, "get_available_providers", lambda: providers)
    with pytest.raises(LoadError, match="TensorrtExecutionProvider runs it; expected CUDA"):
        backend.open_session(accelerator("tensorrt"), tmp_path / "model.onnx", "GPU", 0, graphs=True)


ACCEPTED = {
    "what fits": (linear(), GOOD),
    "free over free": (free_axis(), BATCH + FEATURES + tensor("output", "logits", "FP32", -1)),
    "an output left out": (two_outputs(), BATCH + tensor("input", "features", "FP32", 2) + LOGITS),
    "no batching over a free first axis": (
        linear(),
        tensor("input", "features", "FP32", 4, 3) + tensor("output", "logits", "FP32", -1, 2),
    ),
    "an input that leaves out its default": (default_input(), BATCH + tensor("input", "features", "FP32", 2) + LOGITS),
    "every setting": (
        linear(),
        GOOD
        + "optimization { graph { level: 1 } }"
        + "".join(
            f'parameters {{ key: "{key}" value {{ string_value: "{value}" }} }} '
            for key, value in {
                "intra_op_thread_count": 1,
                "inter_op_thread_count": 1,
                "execution_mode": 1,
                "enable_mem_arena": "true",
                "enable_mem_pattern": "false",
                "memory.enable_memory_arena_shrinkage": "cpu:0",
                "session.use_device_allocator_for_initializers": 1,
                "somebody_elses": "x",
            }.items()
        ),
    ),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_accepts_and_answers(case, load, server):
    name = load(*ACCEPTED[case])
    width = 2 if case in ("an output left out", "an input that leaves out its default") else 3
    rows = 4 if case.startswith("no batching") else 1
    answer = ask(server, name, "features", np.ones((rows, width), np.float32), "FP32")
    assert answer.as_numpy("logits").shape == (rows, 2)
    assert np.isfinite(answer.as_numpy("logits")).all()


def test_an_optional_input_may_be_left_out(load, server):
    config = tensor("input", "features", "FP32", 1, 2) + tensor("output", "logits", "FP32", -1, 2)
    name = load(default_input(), config + tensor("input", "shift", "FP32", 1, 2, more="optional: true"))
    assert ask(server, name, "features", np.zeros((1, 2), np.float32), "FP32").as_numpy("logits").tolist() == [[10, 10]]


def test_strings_and_chosen_outputs(load, server):
    config = BATCH + tensor("input", "index", "INT64", -1) + tensor("output", "found", "STRING", -1)
    name = load(lookup(), config + tensor("output", "same", "INT64", -1))
    answer = ask(server, name, "index", np.array([[2, 0]]), "INT64", ["found"])
    assert [value.decode() for value in answer.as_numpy("found")[0]] == ["zw\u00f6i", "zero"]
    assert answer.as_numpy("same") is None


@only_python_based("fails all that was joined with a bad request")
def test_requests_are_joined_and_a_bad_one_fails_alone(load, server):
    config = BATCH + tensor("input", "index", "INT64", -1) + tensor("output", "found", "STRING", -1)
    wait = "dynamic_batching { preferred_batch_size: 8 max_queue_delay_microseconds: 60000000 }"
    name = load(lookup(), config + tensor("output", "same", "INT64", -1) + wait)
    values = [np.array([[0, 1], [2, 2]]), np.array([[1, 1]]), np.array([[9, 9]]), np.array([[2, 0], [0, 0], [1, 0]])]
    values.append(np.array([[1, 0]]))

    def outcome(value):
        try:
            answer = ask(server, name, "index", value, "INT64")
        except InferenceServerException as error:
            return error.message()
        return answer.as_numpy("found"), answer.as_numpy("same")

    with ThreadPoolExecutor(len(values)) as pool:
        outcomes = list(pool.map(outcome, values))
    assert "onnxruntime" in outcomes[2]
    words = [b"zero", b"eins", "zw\u00f6i".encode()]
    for value, answered in zip(values, outcomes, strict=True):
        if value.max() < 3:
            found, same = answered
            assert same.tolist() == value.tolist()
            assert found.tolist() == [[words[index] for index in row] for row in value]
    with TritonServer(server.url) as client:
        (statistics,) = client.statistics(name)
    assert statistics.executions < len(values)


@only_python_based("calls them internal errors and names its source files, or answers")
def test_what_a_client_does_wrong_is_said_in_a_line(load, server):
    words = BATCH + tensor("input", "index", "INT64", -1) + tensor("output", "found", "STRING", -1)
    with pytest.raises(InferenceServerException) as refused:
        ask(server, load(lookup(), words), "index", np.array([[2, 99999]]), "INT64")
    assert str(refused.value) == (
        "[StatusCode.INVALID_ARGUMENT] onnxruntime: indices element out of data bounds, idx=99999 must be within the "
        "inclusive range [-3,2]"
    )


@only_python_based("fails in a node of the graph, or answers")
def test_tokens_and_their_mask_have_one_shape(load, server):
    pair = [tensor("input", name, "INT64", -1) for name in ("input_ids", "attention_mask")]
    name = load(tokens_to_features(), BATCH + "".join(pair) + tensor("output", "features", "FP32", 2))
    for length in (1, 2):  # with one, the graph would take it for that of every token
        given = []
        for each, value in (
            ("input_ids", np.ones((1, 3), np.int64)),
            ("attention_mask", np.ones((1, length), np.int64)),
        ):
            given.append(triton.InferInput(each, list(value.shape), "INT64"))
            given[-1].set_data_from_numpy(value)
        with triton.InferenceServerClient(server.url) as client, pytest.raises(InferenceServerException) as refused:
            client.infer(name, given)
        assert str(refused.value) == (
            f"[StatusCode.INVALID_ARGUMENT] the inputs differ in their shapes (input_ids [1, 3], attention_mask "
            f"[1, {length}]); expected equal ones"
        )


def test_a_failure_is_told_without_onnxruntimes_source(tmp_path):
    (tmp_path / "model.onnx").write_bytes(tokens_to_features())
    run = backend.open_runner(backbone_of("1 x 3"), tmp_path / "model.onnx", "CPU", 0)
    inputs = {"input_ids": np.ones((1, 3), np.int64), "attention_mask": np.ones((1, 2), np.int64)}
    with pytest.raises(Exception, match="/onnxruntime_src/") as failed:  # its kinds of errors have no common one
        run(["features"], inputs)
    said = "onnxruntime: Attempting to broadcast an axis by a dimension other than 1. 2 by 3"
    assert explain(failed.value) == (said, True)
    assert explain(RuntimeError("out of\nmemory")) == ("onnxruntime: out of memory", False)


def test_requests_of_other_shapes_are_answered_each_on_its_own(load, server):
    config = BATCH + tensor("input", "index", "INT64", -1) + tensor("output", "same", "INT64", -1)
    name = load(lookup(), config + "dynamic_batching { max_queue_delay_microseconds: 200000 }")
    values = [np.arange(n).reshape(1, n) % 3 for n in (1, 3, 2, 3)]
    with ThreadPoolExecutor(len(values)) as pool:
        answers = list(pool.map(lambda value: ask(server, name, "index", value, "INT64").as_numpy("same"), values))
    assert [each.tolist() for each in answers] == [each.tolist() for each in values]


def test_a_refused_file_leaves_the_old_version_serving(load, server):
    name = load(linear(), GOOD)
    folder = server.repository / name
    (folder / "2").mkdir()
    (folder / "2" / "model.onnx").write_bytes(linear(columns=3))
    with TritonServer(server.url) as client:
        with pytest.raises(ServerRefused, match=r"\[-1, ?3\]"):
            client.load(name)
        assert client.is_ready(name)
    assert ask(server, name, "features", np.ones((1, 3), np.float32), "FP32").as_numpy("logits").tolist() == [[3, 6]]


def test_every_element_type_passes_through(load, server):
    types = {"BOOL": np.bool_, "UINT8": np.uint8, "INT32": np.int32, "FP16": np.float16, "FP64": np.float64}
    for data_type, dtype in types.items():
        element = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
        data = onnx_bytes(
            [helper.make_node("Identity", ["x"], ["y"])], [("x", element, ["b", 2])], [("y", element, ["b", 2])]
        )
        name = f"identity_{data_type.lower()}"
        write_model(
            server.repository,
            name,
            data,
            BATCH + tensor("input", "x", data_type, 2) + tensor("output", "y", data_type, 2),
        )
        with TritonServer(server.url) as client:
            client.load(name)
        value = np.array([[1, 0]], dtype=dtype)
        answer = ask(server, name, "x", value, data_type).as_numpy("y")
        assert answer.dtype == dtype
        assert answer.tolist() == value.tolist()
