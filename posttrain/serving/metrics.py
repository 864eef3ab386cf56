"""What a Prometheus scrapes."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from posttrain.serving.worker import Worker

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    """In a registry of their own: two servers in one process do not share them."""

    def __init__(self, worker: Worker, slots: int) -> None:
        registry = self.registry = CollectorRegistry()
        self.requests = Counter("posttrain_requests", "Answered HTTP requests", ["path", "status"], registry=registry)
        self.prompt_tokens = Counter("posttrain_prompt_tokens", "Tokens of prompts", registry=registry)
        self.completion_tokens = Counter("posttrain_completion_tokens", "Sampled tokens", registry=registry)
        self.cancelled = Counter("posttrain_cancelled_requests", "Clients that left early", registry=registry)
        self.seconds = Histogram(
            "posttrain_request_seconds", "From request to last byte", ["path"], buckets=SECONDS, registry=registry
        )
        self.first_token = Histogram(
            "posttrain_first_token_seconds",
            "From request to first token, of streams",
            buckets=SECONDS,
            registry=registry,
        )
        for name, text, value in (
            ("slots", "Completions that can be sampled at the same time", lambda: slots),
            ("running", "Completions that are sampled now", lambda: worker.running),
            ("waiting", "Completions in line for a slot", lambda: worker.waiting),
        ):
            Gauge(f"posttrain_{name}", text, registry=registry).set_function(value)

    def page(self) -> bytes:
        return generate_latest(self.registry)
