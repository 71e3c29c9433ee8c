"""A gRPC client for a Triton server: text in, answers and features out, and model control."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache, cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from patcher.arguments import listed, require
from patcher.errors import InputError, ServerError, ServerRefused, TlsError, WrongPort
from patcher.triton.failures import Address
from patcher.triton.kept_key import find_key
from patcher.triton.tensors import encode_text, read_answers, read_output, strings, to_head
from patcher.triton.tls import ClientTls

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from types import TracebackType

    from numpy.typing import NDArray
    from typing_extensions import Self

    from patcher.triton.tensors import Answer

__all__ = ["LARGEST_PORT", "ModelStatistics", "ModelStatus", "ServerMetadata", "TritonServer", "admin_headers"]

_IN_FLIGHT = 2
"""Concurrent requests, if the texts need several: the server tokenizes one while its backbone runs the other."""
_PROBE_SECONDS = 5.0
_LONGEST_SECONDS = 10**9
"""gRPC counts nanoseconds since 1970 in 64 bits: a call with a later deadline fails at once."""
_LARGEST_MESSAGE = 2**31 - 1
LARGEST_PORT = 2**16 - 1
_RECONNECT_MS = (100, 1000)
_NO_MODEL = "patcher.json"
"""A name that no model in a repository can have (``check_name`` refuses it)."""
_LOOPBACK = ("localhost", "127.", "[::1]")


@dataclass(frozen=True)
class ServerMetadata:
    """The server's name, version and extensions."""

    name: str
    version: str
    extensions: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


@dataclass(frozen=True)
class ModelStatus:
    """An entry of the repository index: ``state`` is READY, UNAVAILABLE, LOADING, UNLOADING or empty (never loaded)."""

    name: str
    version: str
    state: str
    reason: str


@dataclass(frozen=True)
class ModelStatistics:
    """Counters of one model version since it was loaded; times are sums over all requests, in nanoseconds."""

    name: str
    version: str
    inferences: int
    executions: int
    successes: int
    failures: int
    queue_ns: int
    compute_ns: int


@cache
def _client_class() -> Any:
    import tritonclient.grpc as triton

    class Client(triton.InferenceServerClient):  # type: ignore[misc]  # it has no types
        def __del__(self) -> None:
            with suppress(AttributeError):  # raised if Ctrl-C interrupted the constructor
                super().__del__()

    return Client


class TritonServer:
    """A client for the Triton server at ``url`` (gRPC, HOST:PORT).

    ``admin_key`` authorises model control if the server restricts it; no other request carries it. Without it, model
    control uses the key that a server generated for itself, if this user started that server on this machine.
    ``timeout`` bounds every call, in seconds. ``tls`` encrypts the connection and defines whom to trust. A classifier
    in a backbone's head store is addressed as ``ENSEMBLE/NAME``, any other model by its name.

    Methods raise ServerUnreachable if nobody answers in time (TlsError if somebody does, but without the requested TLS;
    WrongPort if a server answers by HTTP), ServerRefused if the server refuses, and ServerError for any other failure.
    The constructor raises InputError for an invalid address, timeout or key.
    """

    def __init__(
        self,
        url: str = "localhost:8001",
        *,
        admin_key: str | None = None,
        timeout: float = 60.0,
        tls: ClientTls | None = None,
    ) -> None:
        require(str, url=url)
        require(float, timeout=timeout)
        require(ClientTls, None, tls=tls)
        if not 0 < timeout <= _LONGEST_SECONDS:
            raise InputError(
                f"timeout is {timeout}; expected a number of seconds above 0, at most {_LONGEST_SECONDS:,}"
            )
        host, colon, port = url.rpartition(":")
        number = int(port) if port.isascii() and port.isdigit() else 0
        bare = ":" in host and not host.startswith("[")
        if not (host and colon and 0 < number <= LARGEST_PORT) or "/" in url or bare:
            raise InputError(
                f"server address {url!r}; expected HOST:PORT of its gRPC service, such as localhost:8001 or [::1]:8001"
            )
        self.url = url
        self.tls = tls
        self._address = Address(url, host.strip("[]"), number, tls)
        self.timeout = timeout
        self._headers = admin_headers(admin_key)
        self._configs: dict[str, Any] = {}
        self._others: dict[str, Any] = {}

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at {self.url}>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection; the next call opens a new one."""
        if client := self.__dict__.pop("_client", None):
            client.close()
        while self._others:
            self._others.popitem()[1].close()

    @cached_property
    def _client(self) -> Any:
        return self._connection(self.url)

    def _connection(self, url: str) -> Any:
        # gRPC would use a proxy from the environment even to reach this machine itself.
        proxy = int(not self.url.startswith(_LOOPBACK))
        arguments: list[tuple[str, int | str]] = [
            ("grpc.max_send_message_length", _LARGEST_MESSAGE),
            ("grpc.max_receive_message_length", _LARGEST_MESSAGE),
            ("grpc.enable_http_proxy", proxy),
            # By default, gRPC may wait up to two minutes before it reconnects to a server that was restarted.
            ("grpc.initial_reconnect_backoff_ms", _RECONNECT_MS[0]),
            ("grpc.min_reconnect_backoff_ms", _RECONNECT_MS[1]),
            ("grpc.max_reconnect_backoff_ms", _RECONNECT_MS[1]),
        ]
        if self.tls is None:
            return _client_class()(url, channel_args=arguments)
        if self.tls.server_name:
            arguments.append(("grpc.ssl_target_name_override", self.tls.server_name))
        own = [str(path) if path else None for path in (self.tls.key, self.tls.certificate)]
        return _client_class()(
            url,
            ssl=True,
            root_certificates=str(self.tls.ca),
            private_key=own[0],
            certificate_chain=own[1],
            channel_args=arguments,
        )

    @contextmanager
    def _asked(
        self, what: str, timeout: float | None = None, headers: dict[str, str] | None = None
    ) -> Iterator[dict[str, Any]]:
        from tritonclient.utils import InferenceServerException

        seconds = self.timeout if timeout is None else timeout
        try:
            yield {"headers": headers, "client_timeout": seconds}
        except InferenceServerException as error:
            raise self._address.failure(what, error, seconds, keyed=headers is not None) from error

    @contextmanager
    def _controlled(self, what: str) -> Iterator[tuple[Any, dict[str, Any]]]:
        """A connection for model control, and call options that include the admin key; other requests carry no key."""
        client, headers = self._client, self._headers
        # Looked up for each call: a restarted server has a new key.
        if headers is None and (found := find_key(self._address.host, self._address.port)):
            address, key = found
            headers = admin_headers(key)
            if self.tls is None and address != self.url:  # with TLS, the certificate proves who answers
                client = self._others.get(address) or self._others.setdefault(address, self._connection(address))
        with self._asked(what, headers=headers) as options:
            yield client, options

    def is_live(self) -> bool:
        """Whether a Triton server answers here; False if nobody does. Raises TlsError and WrongPort as documented."""
        try:
            with self._asked("say that it lives", min(self.timeout, _PROBE_SECONDS)) as options:
                return bool(self._client.is_server_live(**options))
        except (TlsError, WrongPort):
            raise
        except ServerError:
            return False

    def is_ready(self, model: str, version: str = "") -> bool:
        """Whether the server serves ``model``, in any version or the given one; False if it does not know the model."""
        try:
            with self._asked(f"say whether {model} is ready") as options:
                return bool(self._client.is_model_ready(_parts(model)[0], version, **options))
        except ServerRefused:
            return False

    def server_metadata(self) -> ServerMetadata:
        """The server's name and version."""
        with self._asked("tell its version") as options:
            answer = self._client.get_server_metadata(**options)
        return ServerMetadata(answer.name, answer.version, tuple(answer.extensions))

    def model_config(self, model: str) -> Any:
        """The configuration that ``model`` is served under, a ``ModelConfig`` message."""
        with self._asked(f"tell the configuration of {model}") as options:
            return self._client.get_model_config(model, **options).config

    def instances(self, ensemble: str) -> int:
        """How many consecutive requests it takes to reach every instance of every step of ``ensemble``.

        Triton cycles through the instances of a model, including any whose process has died.
        """
        steps = [step.model_name for step in self.model_config(_parts(ensemble)[0]).ensemble_scheduling.step]
        groups = [self.model_config(step).instance_group for step in steps]
        return max((sum(each.count * max(len(each.gpus), 1) for each in group) for group in groups), default=1) or 1

    def repository_index(self) -> list[ModelStatus]:
        """All models in the server's repository; those that were ever loaded have a version and a state."""
        with self._controlled("list its models") as (client, options):
            answer = client.get_model_repository_index(**options)
        return [ModelStatus(each.name, each.version, each.state, each.reason) for each in answer.models]

    def statistics(self, model: str = "") -> list[ModelStatistics]:
        """Counts and times of each served version of ``model``, or of all models."""
        with self._asked(f"tell the statistics of {model or 'its models'}") as options:
            answer = self._client.get_inference_statistics(_parts(model)[0], **options)
        found = []
        for each in answer.model_stats:
            stats = each.inference_stats
            compute = stats.compute_input.ns + stats.compute_infer.ns + stats.compute_output.ns
            counts = (each.inference_count, each.execution_count, stats.success.count, stats.fail.count)
            found.append(ModelStatistics(each.name, each.version, *counts, stats.queue.ns, compute))
        return found

    def load(self, model: str) -> None:
        """Make the server load ``model`` from its current files; until that is done, it serves the previous version.

        Success proves little (an ensemble that uses the model may be gone): request an answer afterwards.
        """
        with self._controlled(f"load {model}") as (client, options):
            client.load_model(model, **options)
        self._configs.clear()

    def unload(self, model: str) -> None:
        """Make the server stop serving ``model``."""
        with self._controlled(f"unload {model}") as (client, options):
            client.unload_model(model, **options)

    def check_control(self) -> None:
        """Raise ControlRefused if the server does not let us load and unload models; changes nothing."""
        with self._controlled("take model control") as (client, options):
            client.unload_model(_NO_MODEL, **options)

    def refresh(self, store: str, classifier: str, width: int) -> None:
        """Make a head store serve the version of ``classifier`` that the files pin; no other head is touched.

        ``width`` is the number of features that the store takes. Raises ServerRefused, with the store's reason, if it
        cannot serve that version.
        """
        inputs = to_head(np.zeros((1, width), np.float32), classifier)
        with self._asked(f"refresh {classifier} in {store}") as options:
            self._client.infer(store, inputs, parameters={"refresh": True}, **options)

    def held(self, store: str, classifier: str, width: int) -> frozenset[str] | None:
        """The classifiers that a head store answers for.

        A store older than 0.14 cannot list them. It returns None if it answers for ``classifier``, else ServerRefused
        is raised. ``width`` is the number of features that the store takes.
        """
        import tritonclient.grpc as triton

        inputs = to_head(np.zeros((1, width), np.float32), classifier)
        outputs = [triton.InferRequestedOutput(name) for name in ("label", "head_version")]
        with self._asked(f"tell what {store} holds") as options:
            result = self._client.infer(store, inputs, outputs=outputs, parameters={"held": True}, **options)
        if int(read_output(result, "head_version")[0, 0]):
            return None
        return frozenset(json.loads(read_output(result, "label")[0, 0]))

    def head_logits(self, head: str, features: NDArray[np.float32]) -> tuple[NDArray[np.float32], int]:
        """Logits FP32 ``[n, labels]`` and version of ``head`` (a model or address) for features FP32 ``[n, width]``.

        The backbone is not involved. Raises InputError for a model that is not a head.
        """
        model, classifier = _parts(head)
        with self._asked(f"answer a request to {head}") as options:
            result = self._client.infer(model, to_head(features, classifier), **options)
        return read_output(result, "logits"), int(read_output(result, "head_version")[0, 0])

    def classify(self, classifier: str, texts: Iterable[str], *, logits: bool = True) -> list[Answer]:
        """A classifier's answer to each text; ``classifier`` is its name or address.

        Texts of similar length share a request. ``logits=False`` does not fetch the logits: with thousands of labels,
        they are most of an answer's size. An empty text is answered like any other, as the server does for any client;
        `patcher classify` refuses it, since there it is a mistake.

        Raises
        ------
        InputError
            for a text that is not a string or not valid Unicode, a single string instead of a list, and a model that is
            not a classifier.
        """
        require(bool, logits=logits)
        return self._infer(classifier, texts, read_answers, without=None if logits else "logits")

    def features(
        self, model: str, texts: Iterable[str], progress: Callable[[int], None] | None = None
    ) -> NDArray[np.float32]:
        """Features FP32 ``[n, width]`` of ``texts`` from a features ensemble; InputError as for :meth:`classify`.

        ``progress`` is called with the number of texts done so far.
        """
        rows = self._infer(model, texts, lambda _, result: list(read_output(result, "features")), progress=progress)
        if not rows:
            (output,) = self.model_config(model).output
            return np.empty((0, output.dims[0]), dtype=np.float32)
        return np.stack(rows)

    def _infer(
        self,
        model: str,
        given: Iterable[str],
        read: Any,
        without: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[Any]:
        require(str, model=model)
        texts = listed(given, "texts")
        encoded = [encode_text(text, f"texts[{index}]") for index, text in enumerate(texts)]
        if not encoded:
            return []
        config = self._config(model)
        size = max(config.max_batch_size, 1)
        outputs = [output.name for output in config.output if output.name != without] if without else None
        order = sorted(range(len(encoded)), key=lambda index: len(encoded[index]))
        batches = [order[start : start + size] for start in range(0, len(order), size)]

        def ask(batch: Sequence[int]) -> list[Any]:
            result = self._request(model, [encoded[index] for index in batch], outputs)
            return list(read([texts[index] for index in batch], result))

        found: dict[int, Any] = {}
        with ThreadPoolExecutor(_IN_FLIGHT) if len(batches) > 1 else nullcontext() as pool:
            answers = pool.map(ask, batches) if pool else map(ask, batches)
            for batch, rows in zip(batches, answers, strict=True):
                found.update(zip(batch, rows, strict=True))
                if progress:
                    progress(len(found))
        return [found[index] for index in range(len(encoded))]

    def _request(self, model: str, encoded: Sequence[bytes], outputs: Sequence[str] | None) -> Any:
        import tritonclient.grpc as triton

        wanted = None if outputs is None else [triton.InferRequestedOutput(name) for name in outputs]
        ensemble, classifier = _parts(model)
        inputs = [strings("text", encoded)]
        if classifier:
            inputs.append(strings("classifier", [classifier.encode()] * len(encoded)))
        with self._asked(f"answer a request to {model}") as options:
            return self._client.infer(ensemble, inputs, outputs=wanted, **options)

    def _config(self, address: str) -> Any:
        model, _ = _parts(address)
        if model not in self._configs:
            self._configs[model] = self.model_config(model)
        return self._configs[model]


def admin_headers(key: str | None) -> dict[str, str] | None:
    """The gRPC header that grants restricted model control; InputError for a key that a header cannot carry."""
    require(str, None, admin_key=key)
    if key is None:
        return None
    if not key or not key.isascii() or not key.isprintable() or key != key.strip():
        raise InputError("the admin key must be printable ASCII without spaces around it")
    return {"triton-grpc-protocol-admin-key": key}


def _parts(address: str) -> tuple[str, str]:
    model, _, classifier = address.partition("/")
    return model, classifier
