"""``GET /metrics``: what Prometheus reads, under the names that dashboards made for vLLM know, and a few of our own."""

import time
from collections.abc import Iterator, Sequence

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from llmopt.runtime.engine import Engine
from llmopt.runtime.request import Event, Request

__all__ = ["Metrics", "metrics"]

_CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0)
_TOKENS = (1, 4, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class Metrics:
    """The figures of one engine.

    Args:
        engine: Whose.
        model_name: A label of all of them.
        capacity: Tokens that the slots of running requests hold when they are full.
    """

    def __init__(self, engine: Engine, model_name: str, capacity: int) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_Counted(engine, model_name, capacity))
        self._last_token: dict[Request, float] = {}
        made = [
            Histogram(name, text, labelnames=["model_name"], registry=self._registry, buckets=buckets).labels(
                model_name
            )
            for name, text, buckets in (
                ("vllm:time_to_first_token_seconds", "From arrival to the first token.", _SECONDS),
                ("vllm:inter_token_latency_seconds", "Between two tokens of an answer.", _SECONDS),
                ("vllm:e2e_request_latency_seconds", "From arrival to the end.", _SECONDS),
                ("vllm:request_prompt_tokens", "Tokens of a prompt.", _TOKENS),
                ("vllm:request_generation_tokens", "Tokens of an answer.", _TOKENS),
            )
        ]
        self._first, self._between, self._whole, self._prompt, self._answer = made

    def note(self, events: Sequence[Event]) -> None:
        """Learn what a step did; called in the engine's thread."""
        now = time.monotonic()
        for event in events:
            request = event.request
            if event.token is not None:
                before = self._last_token.get(request)
                if before is None:
                    self._first.observe(now - request.arrival)
                else:
                    self._between.observe(now - before)
                self._last_token[request] = now
            if event.finish is not None:
                self._last_token.pop(request, None)
                self._whole.observe(now - request.arrival)
                self._prompt.observe(len(request.prompt))
                self._answer.observe(len(request.output))

    def text(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self._registry)


class _Counted(Collector):
    """The engine's own counters, read when somebody asks."""

    def __init__(self, engine: Engine, model_name: str, capacity: int) -> None:
        self._engine = engine
        self._model_name = model_name
        self._capacity = capacity

    def collect(self) -> Iterator[Metric]:
        """All of them."""
        counted = self._engine.statistics
        full = counted.held_tokens / self._capacity
        gauges = (
            ("vllm:num_requests_running", "Requests that have a slot.", counted.running),
            ("vllm:num_requests_waiting", "Requests that have none yet.", counted.waiting),
            ("llmopt:adapters_in_use", "Adapters that running requests have.", counted.adapters_in_use),
            ("vllm:kv_cache_usage_perc", "Share of the running slots that is full.", full),
        )
        counters = (
            ("vllm:prompt_tokens", "Tokens of prompts.", counted.prompt_tokens),
            ("vllm:generation_tokens", "Tokens that were generated.", counted.generated_tokens),
            ("vllm:prefix_cache_queries", "Tokens of prompts that could have been shared.", counted.prompt_tokens),
            ("vllm:prefix_cache_hits", "Tokens of prompts that were shared.", counted.cached_tokens),
            ("vllm:spec_decode_num_draft_tokens", "Tokens that were guessed.", counted.drafted_tokens),
            ("vllm:spec_decode_num_accepted_tokens", "Guesses that were right.", counted.accepted_tokens),
            ("llmopt:adapter_loads", "How often an adapter was read into memory.", counted.adapter_loads),
            ("llmopt:steps", "Steps of the engine.", counted.steps),
        )
        for name, text, value in gauges:
            gauge = GaugeMetricFamily(name, text, labels=["model_name"])
            gauge.add_metric([self._model_name], value)
            yield gauge
        for name, text, value in counters:
            counter = CounterMetricFamily(name, text, labels=["model_name"])
            counter.add_metric([self._model_name], value)
            yield counter
        seconds = CounterMetricFamily(
            "llmopt:step_seconds", "Where steps spend their time.", labels=["model_name", "kind"]
        )
        own = counted.step_seconds - counted.prefill_seconds - counted.decode_seconds
        for kind, value in (("prefill", counted.prefill_seconds), ("decode", counted.decode_seconds), ("runtime", own)):
            seconds.add_metric([self._model_name, kind], value)
        yield seconds
        adapted = CounterMetricFamily(
            "llmopt:adapter_requests", "Requests that began with an adapter.", labels=["model_name", "adapter"]
        )
        for adapter, count in tuple(counted.adapter_requests.items()):
            adapted.add_metric([self._model_name, adapter], count)
        yield adapted
        finished = CounterMetricFamily(
            "vllm:request_success", "Requests that have ended.", labels=["model_name", "finished_reason"]
        )
        for reason, count in tuple(counted.finished.items()):
            finished.add_metric([self._model_name, reason], count)
        yield finished


async def metrics(http: HttpRequest) -> Response:
    """The endpoint."""
    return Response(http.app.state.service.metrics.text(), media_type=_CONTENT_TYPE)
