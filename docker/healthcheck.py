"""Exit 0 when every classifier that this container serves is ready and answers, not merely the server around them.

Usage: healthcheck.py [--live] [HTTP_ADDRESS]. The names are those that entrypoint.sh wrote down, less those that
`patcher drop-classifier` took out of the repository since. Each is asked for one answer, for Triton calls a model ready
whose process died; not beside gRPC with TLS, where HTTP answers health checks alone. With --live it is enough that the
server answers at all.
"""

import http.client
import json
import os
import pathlib
import random
import sys
import time
import urllib.error
import urllib.request

LIVE = "--live" in sys.argv[1:]
ADDRESS = next((word for word in sys.argv[1:] if word != "--live"), "127.0.0.1:8000")
SERVED = pathlib.Path(os.environ.get("TMPDIR", "/tmp")) / "classifiers"  # noqa: S108 - a tmpfs of the container's own
REPOSITORY = pathlib.Path(os.environ.get("TRITON_MODEL_REPO", "/models"))

PATIENCE = 1.5
"""Seconds for each question; one more classifier is begun with within as many. Docker and Kubernetes wait for five."""

# Docker puts its user's http_proxy into every container; to ask this one's own server through it would fail.
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def trouble(what: str, seconds: float = PATIENCE) -> str:
    """Why the server does not say yes to ``what``, or an empty text."""
    try:
        with DIRECT.open(f"http://{ADDRESS}/v2/{what}", timeout=seconds):
            return ""
    except (OSError, http.client.HTTPException) as error:
        return f"{what}: {error}"


def refusal(name: str) -> str:
    """Why no answer comes from the model ``name``, or an empty text; one that takes long is busy, not ill."""
    given = {"text": "is anybody there?"}
    store = name.endswith("_any")
    if store:  # of a head store, which wants to know for whom
        marks = sorted(REPOSITORY.glob("*_head/store"))
        stored = [path.parent.name for path in marks if path.read_text().strip() == name.removesuffix("_any")]
        if not stored:
            return ""
        given["classifier"] = stored[0].removesuffix("_head")
    inputs = [{"name": key, "shape": [1, 1], "datatype": "BYTES", "data": [text]} for key, text in given.items()]
    body = json.dumps({"inputs": inputs}).encode()
    try:
        with DIRECT.open(f"http://{ADDRESS}/v2/models/{name}/infer", body, timeout=PATIENCE):
            return ""
    except TimeoutError:
        return ""
    except urllib.error.HTTPError as error:
        said = error.read().decode(errors="replace")
        # A store that refuses one classifier, whose head is damaged, answers for all others.
        fine = error.code == http.client.FORBIDDEN or (store and error.code == http.client.BAD_REQUEST)
        return "" if fine else f"{name} does not answer: {said}"
    except (OSError, http.client.HTTPException) as error:
        return f"{name} does not answer: {error}"


def problems(names: list[str]) -> list[str]:
    """What is wrong with each classifier, as far as the time goes."""
    found, end = [], time.monotonic() + PATIENCE
    random.shuffle(names)  # where there is no time for all of them, each gets its turn
    for name in names:
        if text := trouble(f"models/{name}/ready") or refusal(name):
            found.append(text)
        if time.monotonic() > end:
            break
    return found


def main() -> int:
    """Ask for each classifier."""
    if LIVE:
        problem = trouble("health/live", 4)
        print(problem or "live")
        return 1 if problem else 0
    try:
        names = SERVED.read_text().split()
    except OSError as error:
        print(f"entrypoint.sh has not got that far: {error}")
        return 1
    if REPOSITORY.is_dir():
        names = [name for name in names if (REPOSITORY / name / "config.pbtxt").is_file()]
    found = problems(names)
    print("\n".join(found) or f"ready: {', '.join(sorted(names))}")
    return 1 if found or not names else 0


if __name__ == "__main__":
    sys.exit(main())
