"""A location in an S3 bucket: whole objects are read and written, and every write is a compare-and-swap.

An object store has no rename and no lock. But a single PUT is atomic, and with ``If-Match`` it succeeds only if the
object is still the one that was read. All of patcher's guarantees on object stores rest on these two properties.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import email.utils
import re
import sys
import threading
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from patcher.errors import InputError, LockLost, PatcherError, RepositoryError, StorageError, ToolError
from patcher.wording import install_hint

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

__all__ = ["Bucket", "Object", "parse_url"]

_URL = re.compile(
    r"s3://(?:(?P<scheme>https?)://(?P<host>[^/]*)/|(?P<bare>[^/:]+:\d+)/)?(?P<bucket>[^/]*)(?P<path>(?:/.*)?)"
)
_HOST = re.compile(r"[0-9A-Za-z.-]+(:\d+)?")
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PATH = re.compile(r"(/[0-9a-zA-Z._-]+)*")  # the paths that tritonserver's own client accepts
_AMAZON = re.compile(r"https://s3[a-z0-9.-]*\.amazonaws\.com(\.cn)?")
_TAKEN = ("PreconditionFailed", "ConditionalRequestConflict", "412", "409")
_NOT_THERE = ("NoSuchKey", "404")
_CHUNK = 1 << 20
_SMALL_SECONDS = 15.0
"""Time to wait for the answer to a request for a small object, or for a list; a large one may take ``timeout``."""
_SMALL = 1 << 20
_NOTICE_SECONDS = 10.0


@dataclass(frozen=True)
class Object:
    """An object as it was read: ``tag`` is its ETag, ``age`` the seconds since its last write, by the store's clock."""

    tag: str
    data: bytes
    age: float


def parse_url(url: str) -> tuple[str | None, str, str]:
    """Endpoint, bucket and path of an S3 URL; the endpoint is None if the URL does not contain one.

    Accepts ``s3://BUCKET/PATH`` and tritonserver's ``s3://http://HOST:PORT/BUCKET/PATH``; InputError for others.
    """
    found = _URL.fullmatch(url)
    if found is None:
        raise InputError(
            f"{url} is not an S3 location; expected s3://BUCKET/PATH, or s3://http://HOST:PORT/BUCKET/PATH"
        )
    host = found["host"] if found["scheme"] else found["bare"]
    if "@" in url:
        raise InputError(
            "credentials do not belong in a URL, where others can read them; "
            "expected AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the environment, or a profile in ~/.aws"
        )
    if host is not None and not _HOST.fullmatch(host):
        raise InputError(f"{host!r} in {url} is not HOST:PORT; expected s3://http://HOST:PORT/BUCKET/PATH")
    if not _BUCKET.fullmatch(found["bucket"]):
        raise InputError(f"{found['bucket']!r} in {url} cannot name a bucket; expected s3://BUCKET/PATH")
    path = found["path"].rstrip("/")
    if not _PATH.fullmatch(path):
        raise InputError(
            f"{path!r} in {url} is not a path that tritonserver accepts; expected letters, digits, '_', '-' and '.' "
            "between single '/'"
        )
    return (f"{found['scheme'] or 'http'}://{host}" if host else None), found["bucket"], path.strip("/")


class Bucket:
    """The objects below ``url``; names are relative to it.

    Credentials and region, and the endpoint if the URL has none, are looked up as by every AWS tool: in the
    environment, in ``~/.aws``, or from the machine's role.

    Each request is tried up to ``tries`` times, and waits up to ``timeout`` seconds for an answer each time, or up to
    15 if no large object is written. One that is not answered within ten seconds is told on stderr.

    Raises ToolError if botocore is missing, InputError for an invalid URL or settings that cannot be read.
    """

    def __init__(self, url: str, *, timeout: float = 60.0, tries: int = 3) -> None:
        self.url = url.rstrip("/")
        self._endpoint, self.bucket, self.path = parse_url(url)
        self._timeout, self._tries = timeout, tries
        self._answered = threading.Event()

    def hurried(self, timeout: float) -> Bucket:
        """The same location with shorter waits: two tries of ``timeout`` seconds each."""
        bucket = Bucket(self.url, timeout=timeout, tries=2)
        bucket._session, bucket._answered = self._session, self._answered
        return bucket

    @cached_property
    def _session(self) -> Any:
        try:
            import botocore.session
        except ImportError as error:
            raise ToolError(f"{self.url} needs botocore, which is not installed: {install_hint('s3')}") from error
        return botocore.session.get_session()

    @cached_property
    def _client(self) -> Any:
        return self._connection(min(self._timeout, _SMALL_SECONDS))

    @cached_property
    def _patient_client(self) -> Any:
        return self._connection(self._timeout)

    def _connection(self, timeout: float) -> Any:
        session = self._session
        import botocore.config

        config = botocore.config.Config(
            connect_timeout=min(5.0, timeout),
            read_timeout=timeout,
            retries={"mode": "standard", "total_max_attempts": self._tries},
            # S3-compatible stores need not know Amazon's checksums.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        with self._mapped("", "read"):
            try:
                return session.create_client("s3", endpoint_url=self._endpoint, config=config)
            except ValueError as error:  # botocore's error for an invalid endpoint
                raise InputError(
                    f"cannot use the endpoint for {self.url}: {error}; expected http://HOST:PORT"
                ) from error

    @property
    def served_from(self) -> str:
        """The URL in tritonserver's form, with the endpoint and its port; unchanged for Amazon's own endpoints."""
        endpoint = str(self._client.meta.endpoint_url)
        if self._endpoint is None and _AMAZON.fullmatch(endpoint):
            return self.url
        scheme, _, host = endpoint.rstrip("/").partition("://")
        if not _HOST.fullmatch(host):
            raise InputError(f"tritonserver does not accept the endpoint {endpoint}; expected http://HOST:PORT")
        port = "" if ":" in host else {"http": ":80", "https": ":443"}[scheme]
        return f"s3://{scheme}://{host}{port}/{'/'.join(filter(None, (self.bucket, self.path)))}"

    @property
    def region(self) -> str:
        """The region that requests are signed for."""
        region = str(self._client.meta.region_name)
        return "us-east-1" if region == "aws-global" else region

    def get(self, name: str) -> Object | None:
        """An object, or None if it does not exist."""
        answer = self._call("get_object", name, unless=_NOT_THERE)
        if answer is None:
            return None
        with self._mapped(name, "read"):
            return Object(answer["ETag"], answer["Body"].read(), _age(answer))

    def tag(self, name: str) -> str | None:
        """An object's ETag, or None if it does not exist."""
        answer = self._call("head_object", name, unless=_NOT_THERE)
        return None if answer is None else str(answer["ETag"])

    def download(self, name: str, path: Path) -> None:
        """Download an object to a file; RepositoryError if it does not exist."""
        answer = self._call("get_object", name, unless=_NOT_THERE)
        if answer is None:
            raise RepositoryError(f"cannot read {self.url}/{name}: no such object")
        with self._mapped(name, "read"), path.open("wb") as file:
            for chunk in answer["Body"].iter_chunks(_CHUNK):
                file.write(chunk)

    def put(self, name: str, content: bytes | Path, tag: str | None) -> str:
        """Write an object whose ETag is still ``tag`` (None: which does not exist yet), and return its new ETag.

        Raises LockLost, with nothing written, if somebody else has changed the object in the meantime.
        """
        condition = {"IfMatch": tag} if tag else {"IfNoneMatch": "*"}
        with contextlib.ExitStack() as stack:
            body = content if isinstance(content, bytes) else stack.enter_context(content.open("rb"))
            taken = (*_TAKEN, *_NOT_THERE)
            large = (len(content) if isinstance(content, bytes) else content.stat().st_size) > _SMALL
            client = self._patient_client if large else None
            answer = self._call("put_object", name, client, doing="write", unless=taken, Body=body, **condition)
        if answer is not None:
            return str(answer["ETag"])
        # A retry after a lost response is refused, too; then the object already has our content.
        found = self.get(name)
        if found is not None and found.data == (content if isinstance(content, bytes) else content.read_bytes()):
            return found.tag
        raise LockLost(
            f"{self.url}/{name} was changed by someone else in the meantime; nothing was changed. "
            "Try again: `patcher history` shows what is there"
        )

    def delete(self, name: str) -> None:
        """Delete an object, which need not exist."""
        self._call("delete_object", name, doing="write")

    def names(self, beginning: str = "") -> dict[str, str]:
        """The ETags of all objects whose names start with ``beginning``, by name."""
        prefix, found = self._key(""), {}
        listing = self._client.get_paginator("list_objects_v2").paginate(Bucket=self.bucket, Prefix=prefix + beginning)
        pages = iter(listing)
        with self._mapped("", "read"):
            while True:
                with _noticed(f"still waiting for the object store to read {self.url}"):
                    page = next(pages, None)  # one request
                if page is None:
                    break
                self._answered.set()
                found.update({each["Key"][len(prefix) :]: str(each["ETag"]) for each in page.get("Contents", ())})
        return found

    def _call(
        self,
        operation: str,
        name: str,
        client: Any = None,
        *,
        doing: str = "read",
        unless: tuple[str, ...] = (),
        **arguments: Any,
    ) -> Any:
        """The store's answer, or None if it is one of the error codes in ``unless``.

        ``client`` is given for a large object that is written: the time it takes says nothing about the store.
        """
        where = f"{self.url}/{name}"
        notice = f"still writing {where}" if client else f"still waiting for the object store to {doing} {where}"
        client = client or self._client
        from botocore.exceptions import ClientError

        with self._mapped(name, doing):
            try:
                with _noticed(notice):
                    answer = getattr(client, operation)(Bucket=self.bucket, Key=self._key(name), **arguments)
                self._answered.set()
                return answer
            except ClientError as error:
                if error.response["Error"]["Code"] in unless:
                    return None
                raise

    def _key(self, name: str) -> str:
        return f"{self.path}/{name}" if self.path else name

    @contextlib.contextmanager
    def _mapped(self, name: str, doing: str) -> Iterator[None]:
        from botocore import exceptions as aws

        where = f"{self.url}/{name}".rstrip("/")
        try:
            yield
        except aws.ClientError as error:
            raise self._refused(where, doing, error) from error
        except (aws.NoCredentialsError, aws.PartialCredentialsError, aws.CredentialRetrievalError) as error:
            raise self._unfit(
                f"cannot {doing} {where}: {error}; expected AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY in the "
                "environment, or a profile in ~/.aws (AWS_PROFILE names one)"
            ) from error
        except (aws.ConnectionError, aws.HTTPClientError) as error:
            endpoint = self._endpoint or "the endpoint of AWS_ENDPOINT_URL or AWS_DEFAULT_REGION"
            raise StorageError(
                f"cannot {doing} {where}: {error}; is the object store up, and {endpoint} right?"
            ) from error
        except aws.BotoCoreError as error:
            raise self._unfit(f"cannot {doing} {where}: {error}; are the AWS settings right?") from error

    def _unfit(self, message: str) -> PatcherError:
        # Settings that worked before and have expired since are not a usage error: something may have been changed.
        return StorageError(message) if self._answered.is_set() else InputError(message)

    def _refused(self, where: str, doing: str, error: Any) -> PatcherError:
        code, said = error.response["Error"]["Code"], error.response["Error"].get("Message", "")
        if code == "NoSuchBucket":
            return RepositoryError(f"no bucket {self.bucket!r} for {where}; make it, or name another with --repo")
        if code in ("InvalidAccessKeyId", "SignatureDoesNotMatch", "ExpiredToken", "InvalidToken"):
            return self._unfit(f"cannot {doing} {where}: {said} ({code}); are the AWS credentials right?")
        if code in ("AccessDenied", "AllAccessDisabled", "403"):
            return StorageError(
                f"cannot {doing} {where}: access denied ({said}); expected credentials with permission to list, read, "
                "write and delete there"
            )
        return StorageError(f"cannot {doing} {where}: {said} ({code})")


@contextlib.contextmanager
def _noticed(message: str) -> Iterator[None]:
    """Write ``message`` to stderr if the body takes long: a store that hangs would keep a verb silent for a minute."""

    def tell() -> None:
        if sys.stderr is not None:  # None if it was closed at the start (`2>&-`)
            with contextlib.suppress(OSError):
                sys.stderr.write(f"{message}\n")

    timer = threading.Timer(_NOTICE_SECONDS, tell)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _age(answer: Any) -> float:
    # Both times are by the store's clock, so no client's clock needs to be right.
    date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    if date is None:
        raise StorageError(
            "the object store sends no Date header, which is needed to tell whether a lock is still held"
        )
    try:
        now = email.utils.parsedate_to_datetime(date)
    except (ValueError, TypeError):
        raise StorageError(
            f"the object store dates its answers {date!r:.80}; expected a date of HTTP, such as 'Thu, 01 Jan 2026 "
            "00:00:00 GMT', which tells whether a lock is still held"
        ) from None
    now = now if now.tzinfo else now.replace(tzinfo=dt.timezone.utc)  # "-0000" gives a naive time, which is UTC
    return float((now - answer["LastModified"]).total_seconds())
