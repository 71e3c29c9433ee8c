"""docker/kubernetes, as far as it can be tested without a cluster: schemas, rendered overlays, consistent values."""

from __future__ import annotations

import copy
import shutil
import subprocess
from pathlib import Path
from typing import Any

import kubernetes_validate
import promql_parser
import pytest
import yaml

FOLDER = Path(__file__).parents[1] / "docker" / "kubernetes"
VERSIONS = ("1.30", "1.37")


def documents(path: Path) -> list[dict[str, Any]]:
    return [each for each in yaml.safe_load_all(path.read_text()) if each]


def changed(document: dict[str, Any], operations: list[dict[str, Any]]) -> dict[str, Any]:
    """Apply a JSON patch (RFC 6902); supports the operations that the overlays use."""
    document = copy.deepcopy(document)
    for operation in operations:
        *way, last = [part.replace("~1", "/") for part in operation["path"].split("/")[1:]]
        place: Any = document
        for part in way:
            place = place[int(part)] if isinstance(place, list) else place[part]
        if operation["op"] == "remove":
            del place[last]
        elif last == "-":
            place.append(operation["value"])
        else:
            place[last] = operation["value"]
    return document


def render(folder: Path) -> list[dict[str, Any]]:
    """The documents of an overlay, without the common labels and the namespace that kustomize adds."""
    plan = yaml.safe_load((folder / "kustomization.yaml").read_text())
    found = []
    for name in plan["resources"]:
        path = (folder / name).resolve()
        found += render(path) if path.is_dir() else documents(path)
    for patch in plan.get("patches", []):
        target = patch["target"]
        (index,) = [
            i for i, d in enumerate(found) if (d["kind"], d["metadata"]["name"]) == (target["kind"], target["name"])
        ]
        found[index] = changed(found[index], yaml.safe_load(patch["patch"]))
    return found


OVERLAYS = {name: render(FOLDER / name) for name in ("base", "cpu", "tls")}
OVERLAYS["job"] = documents(FOLDER / "add-label.yaml")


def get(overlay: str, kind: str, name: str) -> dict[str, Any]:
    (found,) = [d for d in OVERLAYS[overlay] if (d["kind"], d["metadata"].get("name")) == (kind, name)]
    return found


def container(overlay: str, name: str = "triton") -> dict[str, Any]:
    return get(overlay, "Deployment", name)["spec"]["template"]["spec"]["containers"][0]


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_manifest_is_valid(overlay: str, version: str) -> None:
    for document in OVERLAYS[overlay]:
        kubernetes_validate.validate(document, version, strict=True)


def test_the_schemas_refuse_what_is_wrong() -> None:
    wrong = copy.deepcopy(get("base", "Deployment", "triton"))
    wrong["spec"]["template"]["spec"]["terminationGracePeriod"] = 60
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(wrong, VERSIONS[0], strict=True)


def test_an_update_loses_nothing() -> None:
    spec = get("base", "Deployment", "triton")["spec"]
    assert spec["strategy"]["rollingUpdate"]["maxUnavailable"] == 0
    pod = spec["template"]["spec"]
    pause = int(container("base")["lifecycle"]["preStop"]["exec"]["command"][-1])
    timeout = int((FOLDER.parent / "entrypoint.sh").read_text().split("--exit-timeout-secs=")[1].split()[0])
    assert pause + timeout < pod["terminationGracePeriodSeconds"]


@pytest.mark.parametrize("overlay", ["base", "cpu", "tls"])
def test_only_the_autoscaler_sets_the_number_of_replicas(overlay: str) -> None:
    """Each `kubectl apply` would set it back."""
    target = get(overlay, "HorizontalPodAutoscaler", "triton")["spec"]["scaleTargetRef"]
    assert "replicas" not in get(overlay, target["kind"], target["name"])["spec"]


def test_probes_ask_for_the_classifier() -> None:
    triton = container("base")
    assert triton["readinessProbe"]["exec"]["command"] == ["python3", "/usr/local/bin/healthcheck.py"]
    assert triton["livenessProbe"]["exec"]["command"][-1] == "--live"


def test_gpus_and_none() -> None:
    assert container("base")["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "nvidia.com/gpu" not in container("cpu")["resources"]["limits"]
    alone = {"name": "ENCODER_RUNS_BACKBONE", "value": "1"}
    assert [alone in container(overlay)["env"] for overlay in ("base", "cpu")] == [False, True]


def test_only_the_patcher_writes_the_repository() -> None:
    for name in ("triton", "metrics"):
        (mount,) = [m for m in container("base", name)["volumeMounts"] if m["name"] == "model-repository"]
        assert mount["readOnly"]
    job = OVERLAYS["job"][0]["spec"]["template"]["spec"]["containers"][0]
    assert "readOnly" not in job["volumeMounts"][0]


def test_keys_are_secrets_and_selectors_meet() -> None:
    assert all(document["kind"] != "Secret" for document in OVERLAYS["base"])
    labels = get("base", "Deployment", "triton")["spec"]["template"]["metadata"]["labels"]
    for kind, name in (("Service", "triton"), ("Service", "triton-replicas")):
        assert get("base", kind, name)["spec"]["selector"].items() <= labels.items()
    assert get("base", "PodDisruptionBudget", "triton")["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert get("base", "NetworkPolicy", "triton")["spec"]["podSelector"]["matchLabels"].items() <= labels.items()
    job = OVERLAYS["job"][0]["spec"]["template"]
    environment = {each["name"]: each["value"] for each in job["spec"]["containers"][0]["env"]}
    assert environment["TRITON_URL"] == "triton-replicas:8001"
    assert get("base", "Service", "triton-replicas")["spec"]["clusterIP"] == "None"
    rule = get("base", "NetworkPolicy", "triton")["spec"]["ingress"][0]
    assert rule["from"][1]["podSelector"]["matchLabels"].items() <= job["metadata"]["labels"].items()
    assert [port["port"] for port in rule["ports"]] == [8001]


def test_the_autoscaler_asks_for_what_the_adapter_offers() -> None:
    (rule,) = yaml.safe_load((FOLDER / "prometheus-adapter.yaml").read_text())["rules"]["custom"]
    metric = get("base", "HorizontalPodAutoscaler", "triton")["spec"]["metrics"][0]["pods"]["metric"]["name"]
    assert rule["name"]["as"] == metric
    query = rule["metricsQuery"].replace("<<.LabelMatchers>>", 'pod="a"').replace("<<.GroupBy>>", "pod")
    promql_parser.parse(query)


def test_tls_reaches_server_and_exporter() -> None:
    assert {"name": "TLS_FOLDER", "value": "/run/secrets/tls"} in container("tls")["env"]
    assert container("tls", "metrics")["env"] == [{"name": "PATCHER_TLS_CA", "value": "/run/secrets/tls/ca.crt"}]


@pytest.mark.skipif(not shutil.which("kubectl"), reason="kubectl renders the overlays; without it, `render` above does")
@pytest.mark.parametrize("overlay", ["base", "cpu", "tls"])
def test_kustomize_renders_the_same(overlay: str) -> None:
    command = ["kubectl", "kustomize", str(FOLDER / overlay)]
    rendered = list(yaml.safe_load_all(subprocess.run(command, capture_output=True, check=True, text=True).stdout))
    for document in rendered:
        kubernetes_validate.validate(document, VERSIONS[0], strict=True)
    ours = {(d["kind"], d["metadata"]["name"]): d for d in OVERLAYS[overlay]}
    theirs = {(d["kind"], d["metadata"]["name"]): d for d in rendered}
    assert ours.keys() == theirs.keys()
    for key in ours.keys() & {("Deployment", "triton"), ("Deployment", "metrics")}:
        for part in ("containers", "volumes", "securityContext"):
            assert ours[key]["spec"]["template"]["spec"][part] == theirs[key]["spec"]["template"]["spec"][part]
