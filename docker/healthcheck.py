"""Exit 0 when every classifier that this container serves is ready, not merely the server around them.

Usage: healthcheck.py [HTTP_ADDRESS]. The names are those that entrypoint.sh wrote down.
"""

import os
import pathlib
import sys
import urllib.error
import urllib.request

ADDRESS = sys.argv[1] if len(sys.argv) > 1 else "127.0.0.1:8000"
SERVED = pathlib.Path(os.environ.get("TMPDIR", "/tmp")) / "classifiers"  # noqa: S108 - a tmpfs of the container's own


def trouble(classifier: str) -> str:
    """Why the classifier does not answer, or an empty text."""
    try:
        with urllib.request.urlopen(f"http://{ADDRESS}/v2/models/{classifier}/ready", timeout=4):
            return ""
    except (OSError, urllib.error.HTTPError) as error:
        return f"{classifier}: {error}"


def main() -> int:
    """Ask for each classifier."""
    try:
        names = SERVED.read_text().split()
    except OSError as error:
        print(f"entrypoint.sh has not got that far: {error}")
        return 1
    found = [text for text in map(trouble, names) if text]
    print("\n".join(found) or f"ready: {', '.join(names)}")
    return 1 if found or not names else 0


if __name__ == "__main__":
    sys.exit(main())
