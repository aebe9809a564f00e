"""A server of vLLM's API that follows a script: which tokens come when, and what goes wrong."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Script:
    """What the server does.

    Attributes:
        pieces: of a streamed answer: (seconds to wait, ids of the events in this piece of the answer).
        dies_after: pieces, then the connection is dropped.
        status, message: of an error instead of an answer.
        error_event: an error as the last event.
        names_ids: whether it knows return_token_ids; where not, ids come as names of tokens.
        requests: bodies of the streamed requests so far.
    """

    def __init__(self, pieces=(), model="demo", **changes):
        self.pieces, self.model = list(pieces), model
        self.dies_after, self.status, self.message = None, 200, ""
        self.error_event, self.names_ids, self.tells_ids = None, False, True
        self.requests = []
        for name, value in changes.items():
            assert hasattr(self, name)
            setattr(self, name, value)


def choice(script, body, ids):
    if not script.tells_ids:
        return {"index": 0, "text": "x"}
    if body.get("return_token_ids") and not script.names_ids:
        return {"index": 0, "text": "", "token_ids": ids}
    if body.get("return_tokens_as_token_ids"):
        return {"index": 0, "text": "", "logprobs": {"tokens": [f"token_id:{i}" for i in ids]}}
    return {"index": 0, "text": "x" * len(ids)}


@contextmanager
def serving(script):
    """Yields the URL."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, status, value):
            data = value if isinstance(value, bytes) else json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            if self.path == "/v1/models":
                self.answer(200, {"data": [{"id": script.model, "root": "/x", "max_model_len": 512}]})
            elif self.path == "/version":
                self.answer(200, {"version": "0.32.0"})
            else:
                self.answer(200, b"")

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if not body.get("stream"):
                self.answer(200, {"choices": [choice(script, body, [7])]})
                return
            script.requests.append(body)
            if script.status != 200:
                self.answer(script.status, {"error": {"message": script.message, "code": script.status}})
                return
            self.send_response(200)
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for place, (delay, events) in enumerate(script.pieces):
                if place == script.dies_after:
                    self.close_connection = True
                    self.connection.close()
                    return
                time.sleep(delay)
                self.piece([{"choices": [choice(script, body, ids)]} for ids in events])
            if script.error_event:
                self.piece([{"error": script.error_event}])
            self.chunk(b"data: [DONE]\n\n")
            self.chunk(b"")

        def piece(self, events):
            self.chunk(b"".join(b"data: " + json.dumps(event).encode() + b"\n\n" for event in events))

        def chunk(self, data):
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
