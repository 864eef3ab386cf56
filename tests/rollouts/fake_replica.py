"""A stand-in for `posttrain rollout-service` in a process of its own: completions are a pure function of prompt and seed.

python fake_replica.py PORT [FINGERPRINT]      prints its port once it serves
GET /fake: what it has done; POST /fake {"mode": ..., "delay": ...}, a mode being one of
ok | hang | error | abort | refuse | busy | other | deaf | old | elsewhere
"""

import json
import random
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from posttrain.models.load import model_fingerprint

CONTEXT, VOCAB = 512, 101
state = {"mode": "ok", "delay": 0.0, "served": 0, "pushes": 0, "most": 0, "running": 0, "authorization": ""}
state |= {"fingerprint": "f" * 64, "guidance": None, "starting": 0}
accounts = {}
lock = threading.Lock()


def drawn(prompt, seed, limit):
    """Token ids, log-probabilities and the finish reason."""
    rng = random.Random(f"{prompt} {seed}")
    length = rng.randint(1, 12)
    ids = [rng.randrange(5, VOCAB) for _ in range(min(length, limit))]
    return ids, [-rng.random() for _ in ids], "stop" if length <= limit else "length"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def answer(self, status, content, headers=()):
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("X-Policy-Fingerprint", fingerprint())
        for header in headers:
            self.send_header(*header)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        if self.path == "/fake":
            self.answer(200, state)
        elif state["mode"] == "hang":
            time.sleep(3600)
        elif state["starting"]:  # answers as the real one does until it has ended
            state["starting"] -= 1
            self.answer(503, {"error": "it starts anew"})
        else:
            self.answer(200, identity())

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/fake":
            state.update(body)
            self.answer(200, state)
        elif self.path == "/v1/policy":
            if state["mode"] != "deaf":
                state["fingerprint"] = model_fingerprint(Path(body["folder"]))
                state["pushes"] += 1
            self.answer(200, identity())
        elif self.path == "/v1/guide":
            if body["folder"].endswith("bad"):
                return self.answer(400, {"error": "guide: it is bad"})
            if state["mode"] == "old":
                return self.answer(404, {"error": "no such path"})
            state["guidance"], state["starting"] = {"folder": body["folder"], **body["guidance"]}, 2
            self.answer(202, {"guidance": None if state["mode"] == "elsewhere" else state["guidance"]})
        elif self.path == "/v1/guide/account":
            if (ids := accounts.pop(body["record"], None)) != body["ids"]:
                return self.answer(404, {"error": "no such record"})
            self.answer(200, {"kl": float(len(ids)), "reference": -2.0 * len(ids)})
        else:
            with lock:
                state["running"] += 1
                state["most"] = max(state["most"], state["running"])
            state["authorization"] = self.headers.get("Authorization", "")
            try:
                self.complete(body)
            finally:
                with lock:
                    state["running"] -= 1

    def complete(self, body):
        mode = state["mode"]
        time.sleep(3600 if mode == "hang" else state["delay"])
        if mode == "busy" and random.random() < 0.5:
            return self.answer(429, {"error": "busy"}, [("Retry-After", "0")])
        if mode in ("error", "refuse"):
            return self.answer(500 if mode == "error" else 400, {"error": f"it is told to {mode}"})
        ids, logprobs, reason = drawn(body["prompt"], body.get("seed"), body["max_tokens"])
        choice = {"token_ids": ids, "finish_reason": "abort" if mode == "abort" else reason, "stop_reason": None}
        choice["logprobs"] = {"token_logprobs": logprobs}
        if "vllm_xargs" in body:
            accounts[body["vllm_xargs"]["guidance_record"]] = ids
        with lock:
            state["served"] += body["max_tokens"] > 1  # a probe asks for one
        return self.answer(200, {"choices": [choice]})

    def log_message(self, *_):
        pass


def fingerprint():
    return "other" if state["mode"] == "other" else state["fingerprint"]


def identity():
    common = {"context": CONTEXT, "vocab": VOCAB, "settings": {"dtype": "float32"}}
    return {"fingerprint": fingerprint(), "guidance": state["guidance"], **common}


if __name__ == "__main__":
    state.update(fingerprint=sys.argv[2], delay=float(sys.argv[3]))
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[1])), Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    server.serve_forever()
