"""A tracker's server on loopback, which answers or does not."""

from __future__ import annotations

import http.server
import json
import socket
import threading
from typing import Any


class Server:
    """On a port of loopback: mute (takes connections and says nothing), or answering every request with `code`."""

    def __init__(self, code: int | None = None) -> None:
        self.authorizations: list[str | None] = []
        self.requests = 0
        if code is None:
            self._listener = socket.create_server(("127.0.0.1", 0), backlog=64)
            self.port, self._server = self._listener.getsockname()[1], None
            return
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def _answer(self) -> None:
                outer.requests += 1
                outer.authorizations.append(self.headers.get("Authorization"))
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                body = json.dumps(_mlflow_answer(self.path) if code == 200 else {"error": "out of order"}).encode()
                self.send_response(code)
                self.send_header("Content-Length", str(len(body)))
                self.send_header("Content-Type", "application/json")
                self.end_headers()
                self.wfile.write(body)

            do_GET = do_POST = do_PATCH = _answer  # noqa: N815

            def log_message(self, format: str, *arguments: object) -> None:  # noqa: A002
                """Quiet."""

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def close(self) -> None:
        """From now on connections are refused."""
        if self._server is None:
            self._listener.close()
        else:
            self._server.shutdown()
            self._server.server_close()


def _mlflow_answer(path: str) -> dict[str, Any]:
    """Enough of MLflow's REST interface for a run to be told of."""
    if "experiments/get-by-name" in path:
        return {"experiment": {"experiment_id": "1", "name": "ddp", "lifecycle_stage": "active"}}
    if "runs/create" in path or "runs/update" in path:
        info = {"run_id": "a" * 32, "experiment_id": "1", "status": "RUNNING", "lifecycle_stage": "active"}
        return {"run": {"info": info, "data": {}}, "run_info": info}
    return {}
