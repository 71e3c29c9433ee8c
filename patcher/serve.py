"""Serve all classifiers of a repository from this machine until told to stop."""

from __future__ import annotations

import contextlib
import os
from typing import TYPE_CHECKING

from patcher.errors import InputError, RepositoryError, ServerError, VersionError
from patcher.model_config import is_on_gpu
from patcher.serving import serving_of
from patcher.signals import interruptible
from patcher.triton.process import has_gpu, is_taken
from patcher.triton.running import find_running
from patcher.triton.server import START_SECONDS, EmbeddedTriton

if TYPE_CHECKING:
    from collections.abc import Callable, Collection
    from pathlib import Path

    from patcher.classifier import Classifier
    from patcher.files import RepositoryFiles
    from patcher.repository import ModelRepository
    from patcher.triton.tls import ServerTls

__all__ = ["advice", "cache_options", "damaged", "require_gpu", "serve", "served_models"]

_CACHE_BYTES = 64 << 20
_MANY_CORES = 8
_PORT_SECONDS = 5.0


def serve(
    repository: ModelRepository,
    *,
    host: str = "127.0.0.1",
    grpc_port: int = 8001,
    http_port: int = 8000,
    metrics_port: int = 8002,
    admin_key: str | None = None,
    open_control: bool = False,
    tls: ServerTls | None = None,
    metrics_host: str | None = None,
    http: bool = False,
    log_file: Path | None = None,
    encoder_runs_backbone: bool = True,
    onnxruntime_backend: Path | None = None,
    start_timeout: float = START_SECONDS,
    say: Callable[[str], object] = print,
) -> int:
    """Serve every classifier of ``repository`` until SIGINT, SIGTERM or SIGHUP, then let requests in flight finish.

    Returns the server's exit code. Raises as :class:`EmbeddedTriton` does, and ServerError if the server ends by
    itself, or if a model requires a GPU and this machine has none; RepositoryError if a backbone cannot be read.
    """
    left_out = damaged(repository)
    models = served_models(repository, left_out)
    require_gpu(repository, models)
    for name in repository.backbones():
        repository.backbone(name).check_readable()
    server = EmbeddedTriton(
        repository.storage.served_from,
        models,
        host=host,
        grpc_port=grpc_port,
        http_port=http_port,
        metrics_port=metrics_port,
        admin_key=admin_key,
        open_control=open_control,
        tls=tls,
        metrics_host=metrics_host,
        http=http,
        log_file=log_file,
        options=cache_options(repository, left_out),
        environment=repository.storage.server_environment(),
        encoder_runs_backbone=encoder_runs_backbone,
        onnxruntime_backend=onnxruntime_backend,
    )
    hints = advice(repository, len(os.sched_getaffinity(0)), left_out)
    with interruptible():
        try:
            for name, error in left_out.items():
                say(f"warning: {name} is not served: {error}; once that is repaired, run `patcher sync` to serve it")
            server.await_ports(_PORT_SECONDS, say)
            say(f"starting Triton for {', '.join(models) or 'an empty repository'} ...")
            _start(server, start_timeout)
            for line in (_ready(server), *_on_the_key(server, open_control=open_control), *hints):
                say(line)
            server.wait()
        except KeyboardInterrupt:
            say("stopping; waiting for requests in flight; press Ctrl-C again to stop immediately")
        finally:
            code = server.stop()
    return code or 0


def _start(server: EmbeddedTriton, timeout: float) -> None:
    """Start the server; if a port is taken by one that serves the same repository already, the error says so."""
    try:
        server.start(timeout)
    except InputError as error:
        ports = [port for port in (server.grpc_port, server.http_port, server.metrics_port) if port]
        there = find_running(server.repository, ports) if is_taken(error) else None
        if there is None:
            raise
        raise InputError(
            f"this repository is served already: gRPC {there.url}, by process {there.pid}. Use that server, or stop "
            f"it (kill {there.pid}), or start another one beside it, on free ports: --grpc-port 0 --http-port "
            "0 --metrics-port 0"
        ) from error


def _ready(server: EmbeddedTriton) -> str:
    return (
        f"ready: gRPC {server.url}{' with TLS' if server.tls else ''}, HTTP {server.http_url}"
        f"{'' if server.http else ' for health checks only'}"
        f"{'' if server.http or server.tls else ' (--http opens it)'}, metrics {server.metrics_url}; "
        f"log {server.log_file}; Ctrl-C stops it"
    )


def _on_the_key(server: EmbeddedTriton, *, open_control: bool) -> list[str]:
    lines = []
    if server.key_file:
        lines.append(
            f"model control takes a key made for this run, which your verbs on this machine find in {server.key_file}"
        )
    if open_control:
        lines.append(
            "warning: model control over gRPC takes no key: every user of this machine may load models, which runs "
            "code as you"
        )
    if server.key_was_listed and (not open_control or server.tls):
        until = "until the server had read it" if server.key_hidden else "while the server runs"
        lines.append(f"warning: this system lets other users see the admin key in the list of processes {until}")
    return lines


def damaged(repository: ModelRepository) -> dict[str, RepositoryError | VersionError]:
    """Classifiers whose own head model a server would fail to load, with the error; it would then load no model at all.

    Raises the error if all classifiers are damaged.
    """
    names, found = repository.classifiers(), {}
    for name in names:
        try:
            classifier = repository.classifier(name)
            if not classifier.in_store:  # the head store itself copes with a damaged head
                classifier.head()
        except (RepositoryError, VersionError) as error:
            found[name] = error
    if found and len(found) == len(names):
        raise found[names[0]]
    return found


def require_gpu(repository: RepositoryFiles, models: Collection[str]) -> None:
    """Raise ServerError if one of ``models`` requires a GPU and this machine has none: Triton would load nothing."""
    if has_gpu():
        return
    found = [model for model in models if _insists_on_gpu(repository, model)]
    if found:
        raise ServerError(
            f"{', '.join(found)} is for a GPU (`patcher export --device gpu`), and this machine has none that a server "
            "could use; serve the repository on one that has, or export the model with --device cpu"
        )


def _insists_on_gpu(repository: RepositoryFiles, model: str) -> bool:
    with contextlib.suppress(RepositoryError):  # the server reports a broken configuration better
        return is_on_gpu(repository.config(model))
    return False


def advice(repository: ModelRepository, cores: int, left_out: Collection[str] = ()) -> list[str]:
    """A hint for each backbone that runs as a single session over more cores than short texts can use.

    With 32 concurrent texts, a single session on 16 cores answered 383 texts/s, about as many as on two cores
    (``tests/benchmarks/results/gpu-h200.json``). There are no hints if the machine has a GPU: the server then decides
    which device a model runs on.
    """
    if cores < _MANY_CORES or has_gpu():
        return []
    parts = {each.backbone_model: each for each in _classifiers(repository, left_out)}
    lines = []
    for model, each in parts.items():
        with contextlib.suppress(RepositoryError):  # the server reports a broken configuration better
            serving = serving_of(repository.config(each.text_model), repository.config(model))
            if (serving.instances, serving.threads) == (1, 0):
                lines.append(
                    f"hint: {model} runs as one session over {cores} cores, which short texts do not keep "
                    "busy; `patcher tune --input FILE` finds better settings"
                )
    return lines


def cache_options(repository: ModelRepository, left_out: Collection[str] = ()) -> list[str]:
    """Options of tritonserver for a response cache; empty if no model's configuration enables it."""
    classifiers = _classifiers(repository, left_out)
    models = {model for each in classifiers for model in (each.text_model, each.backbone_model)}
    asked = any(repository.config(model).response_cache.enable for model in models)
    return [f"--cache-config=local,size={_CACHE_BYTES}"] if asked else []


def served_models(repository: ModelRepository, left_out: Collection[str] = ()) -> list[str]:
    """The models that a server has to load for everything in the repository except the classifiers ``left_out``."""
    classifiers = _classifiers(repository, left_out)
    # Backbones are named explicitly: the encoder calls its backbone itself, so no ensemble loads it as a step.
    names = [name for each in classifiers for name in (each.ensemble, each.features_model, each.backbone_model)]
    # Backbones and stores that have no classifier yet are loaded too, for `patcher new-classifier`.
    backbones = [repository.backbone(name) for name in repository.backbones()]
    names += [name for each in backbones for name in (each.features_model, each.backbone_model)]
    stores = repository.stores()
    if stores:
        repository.require_folder()
    names += [repository.backbone(name).any_model for name in stores]
    return list(dict.fromkeys(names))


def _classifiers(repository: ModelRepository, left_out: Collection[str]) -> list[Classifier]:
    return [repository.classifier(name) for name in repository.classifiers() if name not in left_out]
