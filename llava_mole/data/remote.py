"""Files on servers (`s3://`, `gs://`, `hf://`), through fsspec: listed, and read in ranges of bytes.

Requests fail, stall and are cut short. Each has a time limit here and is tried again after a growing pause; what a
server refuses (credentials, no such bucket) is not. The libraries' own retries are off where they can be (s3), so the
limits that the user sets are those that hold. Credentials and endpoints come from the environment, as each library
documents (`AWS_ACCESS_KEY_ID`, `AWS_ENDPOINT_URL`, `GOOGLE_APPLICATION_CREDENTIALS`, `HF_TOKEN`), never from a
configuration.
"""

import base64
import functools
import hashlib
import logging
import os
import random
import re
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NoAnswer
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from llava_mole.common.errors import ConfigError, DataError, StorageError
from llava_mole.common.log import get_logger
from llava_mole.common.text import count_of

T = TypeVar("T")

DOWNLOAD_BYTES = 8 << 20
"""Bytes of one request while a whole file is read."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 30.0
_REFUSED = ("NoCredentialsError", "PartialCredentialsError", "ProfileNotFound", "RefreshError", "InvalidRegionError")
"""Names of errors of other packages that another attempt does not change."""
_REFUSED_HTTP = frozenset({400, 401, 403, 404, 405, 410, 451})
_MD5 = re.compile(r"[0-9a-f]{32}")
CONTINUE = "nothing is lost: continue with --train.resume auto"

logger = get_logger(__name__)


@dataclass(frozen=True)
class Access:
    """How patient requests are, see `DataConfig.remote_timeout` and `remote_retries`."""

    timeout: float = 60.0
    """Seconds."""
    retries: int = 6


@dataclass(frozen=True)
class RemoteFile:
    """A file as its server lists it."""

    url: str
    size: int
    """Bytes."""
    tag: str
    """Differs when the content does: ETag, hash or time of change."""


class Differs(OSError):
    """Bytes that came are not those that were expected."""


def filesystem(url: str) -> Any:
    """The fsspec file system of an address; one for each process, since connections do not survive a fork.

    Raises:
        ConfigError: its package is not installed.
    """
    return _filesystem(url.partition("://")[0], os.getpid())


@functools.cache
def _filesystem(protocol: str, _: int) -> Any:
    try:
        import fsspec

        options: dict[str, Any] = {"skip_instance_cache": True, "use_listings_cache": False}
        if protocol == "s3":
            options["config_kwargs"] = {"retries": {"total_max_attempts": 1}}
        opened = fsspec.filesystem(protocol, **options)
    except ImportError as error:
        raise ConfigError(
            f"{protocol}:// needs a package that is not installed ({error}); pip install 'llava_mole[remote]'"
        ) from None
    if protocol == "s3":
        opened.retries = 1
    return opened


def ask(url: str, function: Callable[[], T], access: Access) -> T:
    """Call `function`, again after a pause if it fails.

    Args:
        url: What it reads, for messages.
        function: Raises OSError or an error of the server's library.
        access: Time limit and number of further attempts.

    Raises:
        StorageError: the server refuses, or the last attempt failed.
        FileNotFoundError: there is no such file, folder or bucket.
        ConfigError: a package is missing.
    """
    attempt, started = 0, time.monotonic()
    while True:
        try:
            return _within(access.timeout, function)
        except (ConfigError, FileNotFoundError):
            raise
        except Exception as error:
            reason = _reason(error, access)
            if isinstance(error, NoAnswer | TimeoutError):
                # Requests that were left waiting still hold their connections, and a client has only a few of them.
                _filesystem.cache_clear()
            if _is_refusal(error):
                raise StorageError(
                    f"{url}: the server refuses: {reason}; check the credentials in the environment and the address. "
                    f"In a run {CONTINUE}"
                ) from None
            attempt += 1
            if attempt > access.retries:
                seconds = time.monotonic() - started
                raise StorageError(
                    f"{url}: cannot be read, {count_of(attempt, 'attempt')} in {seconds:.0f} s failed (data."
                    f"remote_retries, data.remote_timeout); the last one: {reason}. Check server and network; in a run "
                    f"{CONTINUE}"
                ) from None
        level = logging.WARNING if attempt > 2 else logging.DEBUG  # a run that waits says why
        logger.log(level, "%s: attempt %d of %d failed: %s", url, attempt, access.retries + 1, reason)
        time.sleep(min(_LONGEST_PAUSE, _FIRST_PAUSE * 2 ** (attempt - 1)) * random.uniform(0.5, 1.0))


def _within(seconds: float, function: Callable[[], T]) -> T:
    """The result of `function`, which a thread of its own is left with when the time is over."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(function())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    return future.result(seconds)


def _is_refusal(error: BaseException) -> bool:
    status = getattr(getattr(error, "response", None), "status_code", None)  # requests and httpx
    code = getattr(error, "code", None) or status  # gcsfs
    return (
        isinstance(error, PermissionError)
        or type(error).__name__ in _REFUSED
        or (isinstance(code, int) and code in _REFUSED_HTTP)
    )


def _reason(error: BaseException, access: Access) -> str:
    if isinstance(error, NoAnswer | TimeoutError) and not str(error):
        return f"no answer within {access.timeout:g} s"
    return " ".join(str(error).split())[:300] or type(error).__name__


def read_range(url: str, start: int, stop: int, access: Access, problem_of: Callable[[bytes], str | None]) -> bytes:
    """Bytes `start` to `stop` of a file.

    Args:
        problem_of: Called with the bytes that came; returns what is wrong with them, and they are asked for again.

    Raises:
        StorageError: as `ask`, or there is no such file any more.
    """

    def get() -> bytes:
        data = filesystem(url).cat_file(url, start=start, end=stop)
        if len(data) != stop - start:
            raise Differs(f"{len(data):,} of {stop - start:,} bytes came")
        problem = problem_of(data)
        if problem:
            raise Differs(problem)
        return data

    try:
        return ask(url, get, access)
    except FileNotFoundError as error:
        raise gone(url, error) from None


def gone(url: str, error: FileNotFoundError) -> StorageError:
    """The error for a file that was there when its source was opened."""
    reason = " ".join(str(error).split())[:200]
    return StorageError(f"{url}: is no longer there ({reason}); bring the bucket or file back, and {CONTINUE}")


def list_files(url: str, suffixes: Iterable[str], access: Access) -> list[RemoteFile]:
    """The files of a folder whose names end in one of the suffixes, or the file itself, sorted by address.

    Raises:
        DataError: there is nothing at this address.
        StorageError, ConfigError: as `ask`.
    """
    protocol = url.partition("://")[0]

    def find() -> dict[str, dict[str, Any]]:
        files = filesystem(url)
        info = files.info(url)
        if info["type"] == "file":
            return {info["name"]: info}
        # Names with `/` behind them are those of folders.
        return {entry["name"]: entry for entry in files.ls(url, detail=True) if entry["type"] == "file"}

    try:
        found = ask(url, find, access)
    except FileNotFoundError as error:
        reason = " ".join(str(error).split())[:200]
        raise DataError(f"{url}: there is no such file, folder or bucket ({reason}); check data.sources") from None
    ends = tuple(suffixes)
    return [
        RemoteFile(f"{protocol}://{name.removeprefix(f'{protocol}://')}", int(info["size"] or 0), tag_of(info))
        for name, info in sorted(found.items())
        if name.lower().endswith(ends)
    ]


def tag_of(info: dict[str, Any]) -> str:
    """What tells one content of a file from another, of fsspec's `info`: an MD5 digest in hex where there is one."""
    if info.get("md5Hash"):  # Google's, in base64
        return base64.b64decode(info["md5Hash"]).hex()
    keys = ("ETag", "etag", "blob_id", "LastModified", "mtime", "updated")
    return next((str(info[key]).strip('"') for key in keys if info.get(key)), "")


def download(file: RemoteFile, target: Path, access: Access, on_block: Callable[[bytes], object]) -> None:
    """Copy a file to `target`.

    A tag that looks like an MD5 digest is one, unless the server encrypts with its own keys. So a copy with another
    digest is made again, and two equal copies are taken for sound.

    Args:
        on_block: Called with each part of the content in order, once.

    Raises:
        StorageError: as `read_range`, or copies differ each time.
        OSError: `target` cannot be written.
    """
    seen: set[str] = set()
    for _ in range(max(2, access.retries + 1)):
        digest = hashlib.md5(usedforsecurity=False)
        with target.open("wb") as written:
            for start in range(0, file.size, DOWNLOAD_BYTES):
                stop = min(file.size, start + DOWNLOAD_BYTES)
                data = read_range(file.url, start, stop, access, lambda _: None)
                digest.update(data)
                written.write(data)
        if not _MD5.fullmatch(file.tag) or digest.hexdigest() == file.tag:
            break
        if digest.hexdigest() in seen:
            logger.info("%s: its ETag is not the MD5 of its content; two equal copies are taken for sound", file.url)
            break
        seen.add(digest.hexdigest())
    else:
        raise StorageError(
            f"{file.url}: the server sends damaged bytes: {len(seen)} copies differ from each other and from its ETag "
            f"{file.tag}; check the connection, then try again"
        )
    with target.open("rb") as copied:
        while data := copied.read(DOWNLOAD_BYTES):
            on_block(data)
