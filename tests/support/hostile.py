"""A registry that says whatever a test wants, and small images in the forms that registries and skopeo know."""

from __future__ import annotations

import contextlib
import http.server
import io
import json
import subprocess
import tarfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

from isolat.images.oci import digest_of

LAYER = "application/vnd.oci.image.layer.v1.tar"
MANIFEST = "application/vnd.oci.image.manifest.v1+json"
INDEX = "application/vnd.oci.image.index.v1+json"
CONFIG = "application/vnd.oci.image.config.v1+json"


class Handler(http.server.BaseHTTPRequestHandler):
    answers: ClassVar[dict[str, Callable[[Handler], None]]] = {}

    def do_GET(self) -> None:
        for part, answer in self.answers.items():
            if part in self.path:
                answer(self)
                return
        self.send(b"{}", "application/json")

    do_HEAD = do_GET

    def send(self, data: bytes, kind: str = "application/octet-stream", size: int | None = None) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data) if size is None else size))
        self.end_headers()
        with contextlib.suppress(OSError):
            self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def serving(answers: dict[str, Callable[[Handler], None]]) -> Iterator[str]:
    handler = type("Handler", (Handler,), {"answers": answers})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def documents(layer: bytes, **changes: Any) -> tuple[bytes, bytes]:
    config = json.dumps(
        {"os": "linux", "architecture": "amd64", "rootfs": {"type": "layers", "diff_ids": [digest_of(layer)]}}
    ).encode()
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": {"mediaType": CONFIG, "digest": digest_of(config), "size": len(config)},
        "layers": [{"mediaType": LAYER, "digest": digest_of(layer), "size": len(layer)} | changes],
    }
    return json.dumps(manifest).encode(), config


def stall(handler: Handler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    time.sleep(30)


def endless(handler: Handler) -> None:
    handler.send_response(200)
    handler.end_headers()
    with contextlib.suppress(OSError):
        while True:
            handler.wfile.write(bytes(1 << 20))


def archive(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return out.getvalue()


def make_layout(at: Path, layers: list[bytes], architecture: str = "amd64") -> Path:
    """An OCI image layout (image-spec, image-layout.md) with one image."""
    blobs = at / "blobs" / "sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes, kind: str) -> dict[str, Any]:
        digest = digest_of(data)
        (blobs / digest.removeprefix("sha256:")).write_bytes(data)
        return {"mediaType": kind, "digest": digest, "size": len(data)}

    diff_ids = [digest_of(layer) for layer in layers]
    config = {"os": "linux", "architecture": architecture, "rootfs": {"type": "layers", "diff_ids": diff_ids}}
    manifest = {
        "schemaVersion": 2,
        "mediaType": MANIFEST,
        "config": put(json.dumps(config).encode(), CONFIG),
        "layers": [put(layer, LAYER) for layer in layers],
    }
    entry = put(json.dumps(manifest).encode(), MANIFEST)
    (at / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    (at / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    return at


def put_manifest(address: str, repository: str, tag: str, kind: str, data: bytes) -> None:
    url = f"http://{address}/v2/{repository}/manifests/{tag}"
    request = urllib.request.Request(url, data=data, method="PUT", headers={"Content-Type": kind})
    urllib.request.urlopen(request, timeout=10).close()


def copy(source: str, target: str, *options: str) -> None:
    """skopeo itself, as anybody may use it."""
    command = ["skopeo", "--insecure-policy", "copy", "--dest-tls-verify=false", *options, source, target]
    subprocess.run(command, check=True, capture_output=True)
