"""An endpoint that is slow, busy for a while, or gone."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from posttrain.errors import UserError
from posttrain.rollouts.chat import ChatEngine, Transcript
from posttrain.rollouts.engine import Request, Sampling


@pytest.fixture
def endpoint():
    """(answers) -> its address: by the number of a request, the seconds that it takes and the status of its answer."""
    servers = []

    def start(answers):
        lock, asked = threading.Lock(), iter(range(1000))

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                self.rfile.read(int(self.headers["Content-Length"]))
                with lock:
                    seconds, status = answers(next(asked))
                time.sleep(seconds)
                choice = {"message": {"content": "42"}, "finish_reason": "stop"}
                body = json.dumps({"choices": [choice], "usage": {"completion_tokens": 1}}).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/v1"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def asked(url, count=4, patience=0.9):
    ids = tuple(Transcript().apply_chat_template([{"role": "user", "content": "6*7=?"}])["input_ids"])
    engine = ChatEngine(url, "m", patience=patience)
    return [done.text for done in engine.generate([Request(i, ids, Sampling(max_tokens=9)) for i in range(count)])]


@pytest.mark.slow
def test_a_refusal_after_a_long_time_without_an_answer_is_asked_again(endpoint):
    """Completions that take longer than its patience are no reason to lose them to the first 429."""
    assert (
        asked(endpoint(lambda number: (1.2, 200) if number < 3 else (1.0, 429) if number == 3 else (0, 200)))
        == ["42"] * 4
    )


@pytest.mark.slow
def test_an_endpoint_that_only_refuses_is_given_up(endpoint):
    with pytest.raises(UserError, match=r"^base-url: .* answers 429: .*; no answer for 0\.9 seconds$"):
        asked(endpoint(lambda _: (0, 429)))


def test_a_request_that_it_refuses_is_not_asked_again(endpoint):
    with pytest.raises(UserError, match=r"^base-url: .* answers 400: "):
        asked(endpoint(lambda _: (0, 400)))
