"""Exit 0 if every classifier that this container serves is ready and answers, not just the server around them.

Usage: healthcheck.py [--live] [HTTP_ADDRESS]. The classifiers are those that entrypoint.sh wrote down, except those
that `patcher drop-classifier` has since removed from the repository. Each gets real requests, because Triton still
reports a model as ready after its process died. HTTP answers them only with the key, which entrypoint.sh stores next to
the names. With --live it is enough that the server answers at all and that no process of a model has died: only a
restart of the server brings such a process back.
"""

import contextlib
import http.client
import json
import os
import pathlib
import random
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any

LIVE = "--live" in sys.argv[1:]
ADDRESS = next((word for word in sys.argv[1:] if word != "--live"), "127.0.0.1:8000")
SERVED = pathlib.Path(os.environ.get("TMPDIR", "/tmp")) / "classifiers"  # noqa: S108 - a tmpfs of the container's own
REPOSITORY = pathlib.Path(os.environ.get("TRITON_MODEL_REPO", "/models"))

END = time.monotonic() + 4
"""When to stop asking: Docker and Kubernetes wait for five seconds."""
DEAD = "is not healthy"
"""Part of Triton's error for a model whose process died; it comes a second after the request."""

# Docker sets its user's http_proxy in every container; requests to this container's own server would fail through it.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
with contextlib.suppress(OSError):
    DIRECT.addheaders.append(("admin-key", SERVED.with_name("http-key").read_text()))


def left() -> float:
    """Seconds until an answer would be too late."""
    return max(END - time.monotonic(), 0.1)


def trouble(what: str) -> str:
    """Why the server does not confirm ``what``; empty if it does."""
    try:
        with DIRECT.open(f"http://{ADDRESS}/v2/{what}", timeout=left()):
            return ""
    except (OSError, http.client.HTTPException) as error:
        return f"{what}: {error}"


def setting(model: str) -> dict[str, Any]:
    """The configuration of a model as served; empty if HTTP does not return it."""
    try:
        with DIRECT.open(f"http://{ADDRESS}/v2/models/{model}/config", timeout=left()) as answer:
            found: dict[str, Any] = json.load(answer)
            return found
    except (OSError, ValueError, http.client.HTTPException):
        return {}


def questions(name: str) -> int:
    """How many requests reach every instance of every step of an ensemble: Triton rotates over them, dead or not."""
    steps = [step["model_name"] for step in setting(name).get("ensemble_scheduling", {}).get("step", [])]
    groups = [setting(step).get("instance_group", []) for step in steps]
    counts = (sum(each.get("count", 1) * max(len(each.get("gpus", [])), 1) for each in group) for group in groups)
    return max([1, *counts])


def asked_for(name: str) -> dict[str, str] | None:
    """A request to the ensemble ``name``, by input; None for a head store without a classifier."""
    # The text must be new: an answer from the response cache would not reach the models.
    given = {"text": f"is anybody there? {time.time_ns()}"}
    if name.endswith("_any"):  # a head store: the request names one of its classifiers
        stored = next(stored_in(name.removesuffix("_any")), None)
        if stored is None:
            return None
        given["classifier"] = stored
    return given


def stored_in(backbone: str) -> Iterator[str]:
    """The classifiers in a backbone's head store."""
    for path in sorted(REPOSITORY.glob("*_head/store")):
        with contextlib.suppress(FileNotFoundError):  # the classifier was dropped in the meantime
            if path.read_text().strip() == backbone:
                yield path.parent.name.removesuffix("_head")


def refusal(name: str) -> str:
    """Why the ensemble ``name`` does not answer; empty if it does, or is merely slow: then it is busy, not broken."""
    given = asked_for(name)
    if given is None:
        return ""
    inputs = [{"name": key, "shape": [1, 1], "datatype": "BYTES", "data": [text]} for key, text in given.items()]
    try:
        with DIRECT.open(
            f"http://{ADDRESS}/v2/models/{name}/infer", json.dumps({"inputs": inputs}).encode(), timeout=left()
        ):
            return ""
    except TimeoutError:
        return ""
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")
        # A head store that refuses one classifier because its head is damaged still answers for all others.
        refused = name.endswith("_any") and error.code == http.client.BAD_REQUEST
        return "" if refused or error.code == http.client.FORBIDDEN else f"{name} does not answer: {said}"
    except (OSError, http.client.HTTPException) as error:
        return f"{name} does not answer: {error}"


def problem_with(name: str) -> str:
    """What is wrong with a classifier, as far as there is time to find out; empty if nothing is."""
    problem = trouble(f"models/{name}/ready")
    for _ in range(0 if problem else questions(name)):
        problem = refusal(name)
        if problem or left() < 1:
            break
    return problem


def problems(names: list[str]) -> list[str]:
    """What is wrong with the classifiers, as far as there is time to find out."""
    random.shuffle(names)  # if there is not enough time for all, each gets its turn eventually
    begun = (name for name in names if left() > 1)
    return [problem for name in begun if (problem := problem_with(name))]


def served() -> list[str] | None:
    """The classifiers that this container serves; None before entrypoint.sh has written them down."""
    try:
        names = SERVED.read_text().split()
    except OSError:
        return None
    if REPOSITORY.is_dir():
        names = [name for name in names if (REPOSITORY / name / "config.pbtxt").is_file()]
    return names


def main() -> int:
    """Check all classifiers; return the exit code."""
    names = served()
    if LIVE:
        dead = trouble("health/live") or "\n".join(each for each in problems(names or []) if DEAD in each)
        print(dead or "live")
        return 1 if dead else 0
    if names is None:
        print(f"entrypoint.sh has not got that far: it writes {SERVED}")
        return 1
    found = problems(names)
    print("\n".join(found) or f"ready: {', '.join(sorted(names))}")
    return 1 if found or not names else 0


if __name__ == "__main__":
    sys.exit(main())
