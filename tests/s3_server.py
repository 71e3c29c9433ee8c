"""A real S3-compatible server (moto's) on loopback, which handles one request at a time and records writes.

moto checks conditions before it writes; another request could slip in between, which real stores prevent.
"""

from __future__ import annotations

import logging
import threading

import werkzeug.serving
from moto.moto_server.werkzeug_app import DomainDispatcherApplication, create_backend_app
from moto.s3.models import s3_backends

BUCKET = "models"


class S3Server:
    """Runs at ``endpoint`` from construction until ``stop``.

    ``fault``, if set, is called with each request before it is handled. ``lost`` selects requests that are handled but
    whose response is lost. ``lenient`` imitates stores that ignore conditions and always write.
    """

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self._app = DomainDispatcherApplication(create_backend_app)
        self._one = threading.Lock()
        self.requests: list[tuple[str, str]] = []
        self.fault = None
        self.lenient = False
        self.lost = None
        self.refuse: str | None = None
        self._server = werkzeug.serving.make_server("127.0.0.1", 0, self._respond, threaded=True)
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()

    def _respond(self, environ, start_response):
        request = (environ["REQUEST_METHOD"], environ["PATH_INFO"].partition(f"/{BUCKET}/")[2])
        if self.fault and self.fault(*request):
            start_response("503 Service Unavailable", [("Content-Length", "0")])
            return [b""]
        if self.lost and self.lost(*request):
            self.lost = None
            with self._one:
                list(self._app(environ, lambda *_: None))
            start_response("503 Service Unavailable", [("Content-Length", "0")])
            return [b""]
        if self.refuse:
            start_response("403 Forbidden", [("Content-Type", "application/xml")])
            return [f"<Error><Code>{self.refuse}</Code><Message>no</Message></Error>".encode()]
        if self.lenient:
            for header in ("HTTP_IF_MATCH", "HTTP_IF_NONE_MATCH"):
                environ.pop(header, None)
        with self._one:
            self.requests.append(request)
            return self._app(environ, start_response)

    def empty(self) -> None:
        """Create the bucket anew, empty."""
        backend = s3_backends["123456789012"]["aws"]
        backend.reset()
        backend.create_bucket(BUCKET, "us-east-1")
        self.fault, self.lenient = None, False
        self.requests.clear()

    def written(self) -> list[tuple[str, str]]:
        """Objects written and deleted since the last call, except the lock."""
        found = [each for each in self.requests if each[0] in ("PUT", "DELETE") and not each[1].endswith(".lock")]
        self.requests.clear()
        return found

    def dated(self, name: str) -> int:
        """The second in which an object was last written."""
        return int(s3_backends["123456789012"]["aws"].head_object(BUCKET, name).last_modified.timestamp())

    def stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
