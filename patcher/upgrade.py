"""Upgrade an export of an earlier version to what this version exports; heads, versions and lineage stay."""

from __future__ import annotations

from typing import TYPE_CHECKING

from patcher import model_config
from patcher.classifier import Classifier
from patcher.configs import encoder_config, features_config, with_program
from patcher.errors import RepositoryError
from patcher.foreign import UNKNOWN, is_earlier
from patcher.layout import programs
from patcher.names import CONFIG, PROGRAM
from patcher.serving import Serving, serving_of, with_encoders, with_response_cache, with_serving
from patcher.storage.disk import STAGING, read_bytes

if TYPE_CHECKING:
    from collections.abc import Iterable

    from patcher.backbone import Backbone

__all__ = ["interrupted", "is_quantized", "lacks_encoder", "planned", "upgrade"]


def upgrade(backbone: Backbone, *, force: bool = False) -> tuple[str, ...]:
    """Upgrade how a backbone's texts are encoded to what this version does; return the models that changed.

    Programs of earlier versions that run inside Triton are replaced, and exports before 0.4.0 get an encoder in front
    of the backbone, with the settings that their tokenizer had. A running server has to be restarted to use them. If
    this is interrupted at any moment, the repository can still be served, and the next call continues.

    Raises RepositoryError, with nothing changed, for a program that this version does not know; ``force`` replaces it.
    """
    repository = backbone.repository
    with repository.lock():
        changed, outdated = planned(backbone, force=force), backbone.outdated()
        configs = {model: repository.config_text(model) for model in outdated}
        if backbone.encoder_model in configs:
            deep = repository.config_text(backbone.backbone_model)
            configs[backbone.encoder_model] = with_encoders(configs[backbone.encoder_model], deep)
        repository.write_configs({model: with_program(text, outdated[model]) for model, text in configs.items()})
        backbone.renew(outdated)  # after the configurations: a renewed program marks the model as done
        if lacks_encoder(backbone):
            _add_encoder(backbone)
    return changed


def planned(backbone: Backbone, *, force: bool = False) -> tuple[str, ...]:
    """The models that an upgrade would change, without changing them; raises as ``upgrade`` does."""
    outdated = backbone.outdated()
    if not force:
        _refuse_unknown(backbone, outdated)
    if not lacks_encoder(backbone):
        return tuple(outdated)
    models = (backbone.encoder_model, backbone.backbone_model, *_above(backbone), backbone.features_model)
    return tuple(dict.fromkeys((*outdated, *models)))


def lacks_encoder(backbone: Backbone) -> bool:
    """Whether texts are still encoded as in exports before 0.4.0."""
    return backbone.text_model != backbone.encoder_model


def is_quantized(backbone: Backbone) -> bool:
    """Whether a backbone is in INT8, judged by the operators in its graph."""
    return b"MatMulInteger" in read_bytes(backbone.backbone_path)


def interrupted(backbone: Backbone) -> bool:
    """Whether an upgrade has begun and not ended; another patcher may be running it at this moment."""
    storage = backbone.storage
    if lacks_encoder(backbone) and storage.has(f"{backbone.encoder_model}/{CONFIG}"):
        return True
    # An object store has no staging folders.
    staged = (*(f"{model}/1/{STAGING}*/*" for model in programs(backbone)), f"{STAGING}*/{backbone.encoder_model}/*")
    return storage.in_one_step and bool(storage.glob(*staged))


def _refuse_unknown(backbone: Backbone, outdated: Iterable[str]) -> None:
    """Raise RepositoryError if a program to be replaced is of no known version: it may be a newer version's."""
    storage = backbone.storage
    unknown = [path for model in outdated if not is_earlier(storage.read(path := f"{model}/{PROGRAM}"))]
    if unknown:
        raise RepositoryError(
            f"{backbone.repository.location}: {', '.join(unknown)}: no program of this or an earlier patcher; {UNKNOWN}"
        )


def _add_encoder(backbone: Backbone) -> None:
    """Add an encoder in front of the backbone; it replaces the steps tokenizer and backbone in all ensembles."""
    repository = backbone.repository
    before, deep = map(repository.config_text, (backbone.tokenizer_model, backbone.backbone_model))
    serving = serving_of(model_config.parse(before), model_config.parse(deep))
    device = "gpu" if model_config.is_on_gpu(model_config.parse(deep)) else "cpu"
    encoder = encoder_config(
        backbone.encoder_model, backbone.token_inputs(), backbone.backbone_model, backbone.width(), device
    )
    _, deep = with_serving(before, deep, Serving())  # reset the backbone's settings: the largest batch moves, too
    text, deep = with_serving(model_config.render(encoder), deep, serving)
    if model_config.parse(deep).response_cache.enable:
        deep = with_response_cache(deep, enable=False)
        text = with_response_cache(text, enable=True)
    features = features_config(backbone.features_model, backbone.encoder_model, backbone.width())
    if not repository.storage.has(f"{backbone.encoder_model}/{CONFIG}"):
        backbone.add_encoder(text)
    changed = {backbone.backbone_model: deep}
    for ensemble in _above(backbone):
        changed[ensemble] = model_config.with_encoding(repository.config_text(ensemble), features.steps)
    # Last, because it marks the upgrade as done.
    changed[backbone.features_model] = model_config.render(features)
    repository.write_configs(changed)


def _above(backbone: Backbone) -> list[str]:
    """The ensembles that compute answers from the backbone's features."""
    repository = backbone.repository
    names = [name for name in repository.classifiers() if repository.stored_on(name) is None]
    above = [name for name in names if Classifier(repository, name).backbone_name == backbone.backbone_name]
    return [*above, backbone.any_model] if repository.has_store(backbone.backbone_name) else above
