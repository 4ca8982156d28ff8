"""What Prometheus is told, at /metrics; every name begins with `jina_jax_`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

from jina_jax.serve.jobs import Done, Job

if TYPE_CHECKING:
    from jina_jax.serve.service import Note

disable_created_metrics()  # the time at which each series began: twice the lines, for nobody

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
COUNTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
TOKENS = tuple(2**power for power in range(2, 20))
RATIOS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


class Metrics:
    """The metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        one = self.registry = CollectorRegistry()
        name = "jina_jax_"
        self.requests = Counter(name + "request_count", "Requests", ["endpoint", "status"], registry=one)
        self.rejected = Counter(name + "rejected", "Requests refused for want of room", ["code"], registry=one)
        self.cancelled = Counter(name + "cancelled", "Requests whose clients went away", registry=one)
        self.duration = Histogram(
            name + "request_duration_seconds",
            "From the headers to the answer",
            ["endpoint"],
            buckets=SECONDS,
            registry=one,
        )
        self.tokenization = self._histogram("tokenization_duration_seconds", "Tokenising a request", SECONDS)
        self.queue = self._histogram("queue_duration_seconds", "Until the first batch of a request began", SECONDS)
        self.inference = self._histogram("inference_duration_seconds", "Computing a batch", SECONDS)
        self.input_length = self._histogram("request_input_length", "Tokens of a request", TOKENS)
        self.input_texts = self._histogram("request_input_texts", "Texts of a request", COUNTS)
        self.batch_texts = self._histogram("batch_texts", "Texts of a batch", COUNTS)
        self.batch_tokens = self._histogram("batch_tokens", "Tokens of a batch, without padding", TOKENS)
        self.padding = self._histogram("padding_ratio", "Part of a batch that is padding", RATIOS)
        self.tokens = Counter(name + "tokens", "Tokens embedded", ["model", "task"], registry=one)
        self.cache = Counter(name + "cache", "Texts looked up in the cache", ["result"], registry=one)
        self.programs = Gauge(name + "compiled_shapes", "Programs compiled by the model's process", registry=one)
        self.running = Gauge(name + "num_requests_running", "Requests that are not answered yet", registry=one)
        self.queue_size = Gauge(name + "queue_size", "Requests with texts in no batch yet", registry=one)
        self.queue_tokens = Gauge(name + "queue_tokens", "Tokens in no batch yet", registry=one)
        self.batch_budget = Gauge(name + "batch_next_tokens", "Most tokens of the next batch", registry=one)
        self.ready = Gauge(name + "ready", "1 if the server takes requests", registry=one)
        self.restarts = Gauge(
            name + "worker_restarts", "Times that the model's process was started again", registry=one
        )

    def _histogram(self, name: str, help: str, buckets: Sequence[int | float]) -> Histogram:
        return Histogram("jina_jax_" + name, help, buckets=buckets, registry=self.registry)

    def answered(self, endpoint: str, status: int, seconds: float) -> None:
        """Count a request."""
        self.requests.labels(endpoint, str(status)).inc()
        self.duration.labels(endpoint).observe(seconds)
        if status == 429:
            self.rejected.labels("queue_full").inc()

    def tokenized(self, seconds: float, tokens: int, texts: int) -> None:
        """Count what was tokenised."""
        self.tokenization.observe(seconds)
        self.input_length.observe(tokens)
        self.input_texts.observe(texts)

    def served(self, note: "Note") -> None:
        """Count what was embedded."""
        self.queue.observe(note.queue_seconds)
        self.tokens.labels(note.model, note.task).inc(note.tokens)

    def cached(self, hits: int, misses: int) -> None:
        """Count what the cache had."""
        self.cache.labels("hit").inc(hits)
        self.cache.labels("miss").inc(misses)

    def computed(self, job: Job, done: Done) -> None:
        """Count a batch."""
        tokens = sum(len(text.ids) for text in job.texts)
        self.inference.observe(done.seconds)
        self.batch_texts.observe(len(job.texts))
        self.batch_tokens.observe(tokens)
        self.padding.observe(1 - tokens / max(done.computed_tokens, 1))
        self.programs.set(done.programs)

    def text(self) -> bytes:
        """All metrics as Prometheus reads them."""
        return generate_latest(self.registry)
