"""The same small data set in every form that a source may have, and an S3 server on loopback with faults on request."""

import contextlib
import io
import json
import socket
import tarfile
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

COUNT = 12
FILES = 3


def picture(index: int) -> bytes:
    """A PNG whose pixels tell its number."""
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((24 + index, 20)).point(lambda v: (v + 20 * index) % 256).convert("RGB").save(
        buffer, "PNG"
    )
    return buffer.getvalue()


def record(index: int) -> dict[str, Any]:
    """Every fourth is text only."""
    marker, image = ("", {}) if index % 4 == 3 else ("<image>\n", {"image": f"{index}.png"})
    turns = [{"from": "human", "value": f"{marker}Which number?"}, {"from": "gpt", "value": f"It is {index}."}]
    return {"id": f"r{index}", **image, "conversations": turns}


def write_json(folder: Path) -> Path:
    """LLaVA JSONL with an image folder beside it."""
    (folder / "images").mkdir(parents=True)
    for index in range(COUNT):
        (folder / "images" / f"{index}.png").write_bytes(picture(index))
    (folder / "records.jsonl").write_text("".join(json.dumps(record(index)) + "\n" for index in range(COUNT)))
    return folder / "records.jsonl"


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    """A tar file of `(name, content)`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            header = tarfile.TarInfo(name)
            header.size = len(content)
            tar.addfile(header, io.BytesIO(content))
    return path


def tar_members(index: int) -> list[tuple[str, bytes]]:
    """The members of a sample."""
    value = record(index)
    image = [(f"{index:03d}.png", picture(index))] if value.pop("image", None) else []
    return [*image, (f"{index:03d}.json", json.dumps(value).encode())]


def write_tars(folder: Path) -> Path:
    """WebDataset shards."""
    each = COUNT // FILES
    for n in range(FILES):
        members = [member for index in range(n * each, (n + 1) * each) for member in tar_members(index)]
        write_tar(folder / f"shard-{n:03d}.tar", members)
    return folder


def table(indices: range) -> pa.Table:
    """Rows as `datasets` has them, with the images as bytes."""
    rows = []
    for index in indices:
        value = record(index)
        name = value.pop("image", None)
        rows.append(value | {"image": None if name is None else {"bytes": picture(index), "path": name}})
    turn = pa.struct([("from", pa.string()), ("value", pa.string())])
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.Table.from_pylist(
        rows, schema=pa.schema([("id", pa.string()), ("conversations", pa.list_(turn)), ("image", image)])
    )


def write_parquet(folder: Path) -> Path:
    """Parquet files of two row groups each."""
    folder.mkdir(parents=True)
    each = COUNT // FILES
    for n in range(FILES):
        pq.write_table(
            table(range(n * each, (n + 1) * each)), folder / f"train-{n:05d}-of-00003.parquet", row_group_size=3
        )
    return folder


def write_saved(folder: Path) -> Path:
    """What `save_to_disk` of `datasets` writes."""
    folder.mkdir(parents=True)
    each = COUNT // FILES
    for n in range(FILES):
        rows = table(range(n * each, (n + 1) * each))
        with pa.ipc.new_stream(str(folder / f"data-{n:05d}-of-00003.arrow"), rows.schema) as stream:
            stream.write_table(rows, max_chunksize=3)
    (folder / "state.json").write_text("{}")
    (folder / "dataset_info.json").write_text("{}")
    return folder


WRITERS = {"tar": write_tars, "parquet": write_parquet, "saved": write_saved}


_NOT_PASSED = ("content-length", "transfer-encoding", "connection", "date", "server")


class FaultyServer:
    """A proxy in front of an S3 server. `fault` decides what becomes of a GET of an object: its name and the number of
    times it was asked for give None (passed on) or one of `fail`, `stall`, `damage`, `cut`, `expired`, `gone`."""

    def __init__(self, target: str) -> None:
        outer = self
        self.target, self.asked = target, dict[str, int]()
        self.bytes = 0
        self.fault: Any = lambda key, times: None
        self.stalled = threading.Event()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                self.do_GET()

            def do_GET(self) -> None:
                key = self.path.partition("?")[0]
                is_object = self.command == "GET" and "list-type" not in self.path and key.count("/") > 1
                fault = None
                if is_object:
                    outer.asked[key] = outer.asked.get(key, 0) + 1
                    fault = outer.fault(key, outer.asked[key])
                status, headers, body = self.fetch()
                if fault == "fail":
                    status, body = 503, b"<Error><Code>ServiceUnavailable</Code><Message>busy</Message></Error>"
                elif fault == "expired":
                    status = 403
                    body = b"<Error><Code>ExpiredToken</Code><Message>The provided token has expired.</Message></Error>"
                elif fault == "gone":
                    status = 404
                    body = b"<Error><Code>NoSuchBucket</Code><Message>The bucket does not exist</Message></Error>"
                elif fault == "stall":
                    outer.stalled.wait(20)
                elif fault == "damage" and body:
                    body = body[: len(body) // 2] + bytes([body[len(body) // 2] ^ 1]) + body[len(body) // 2 + 1 :]
                self.send_response(status)
                for name, value in headers.items():
                    # Without the server's checksums, which not every server sends, ours have to find damage.
                    if name.lower() not in _NOT_PASSED and "checksum" not in name.lower():
                        self.send_header(name, value)
                length = headers.get("Content-Length", len(body)) if self.command == "HEAD" else len(body)
                self.send_header("Content-Length", str(length))
                self.end_headers()
                if self.command == "GET":
                    outer.bytes += len(body) if is_object else 0
                    self.wfile.write(body[: len(body) // 2] if fault == "cut" else body)
                if fault == "cut":
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)

            def fetch(self) -> tuple[int, dict[str, str], bytes]:
                given = {k: v for k, v in self.headers.items() if k.lower() not in ("host", "connection")}
                request = Request(outer.target + self.path, headers=given, method=self.command)
                try:
                    with urlopen(request) as answer:
                        return answer.status, dict(answer.headers), answer.read()
                except HTTPError as error:
                    return error.code, dict(error.headers), error.read()

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        """Stop."""
        self.stalled.set()
        self._server.shutdown()
        self._server.server_close()


@contextlib.contextmanager
def s3_server(monkeypatch: Any) -> Iterator[tuple[Any, FaultyServer]]:
    """A boto3 client of an S3 server on loopback, and the proxy that s3fs is sent to by the environment."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    target = f"http://{host}:{port}"
    for key, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }.items():
        monkeypatch.setenv(key, value)
    client = boto3.client("s3", endpoint_url=target)
    proxy = FaultyServer(target)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    try:
        yield client, proxy
    finally:
        proxy.close()
        server.stop()


def upload(client: Any, folder: Path, bucket: str, prefix: str) -> str:
    """Put the files of a folder into a bucket, and return their address."""
    with contextlib.suppress(client.exceptions.BucketAlreadyOwnedByYou):
        client.create_bucket(Bucket=bucket)
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        client.put_object(Bucket=bucket, Key=f"{prefix}/{path.relative_to(folder)}", Body=path.read_bytes())
    return f"s3://{bucket}/{prefix}"


def wait_until(condition: Any, seconds: float = 5.0) -> None:
    """Wait for a condition."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
