"""What a server reports at /metrics, and every way in which it can't be had."""

import socket
import subprocess
import sys
import threading
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from gemma_serve.adapters.metrics import CacheConfig, EngineMetrics, parse_metrics, read_metrics
from gemma_serve.adapters.openai_answers import EndpointError

# Lines of vLLM 0.32.0's own answer, with neighbours that must not be taken for the wanted series.
IDLE = """\
# HELP python_gc_objects_collected_total Objects collected during gc
# TYPE python_gc_objects_collected_total counter
python_gc_objects_collected_total{generation="0"} 14345.0
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="demo"} 0.0
# HELP vllm:num_requests_waiting Number of requests waiting to be processed.
# TYPE vllm:num_requests_waiting gauge
vllm:num_requests_waiting{engine="0",model_name="demo"} 0.0
# TYPE vllm:num_requests_waiting_by_reason gauge
vllm:num_requests_waiting_by_reason{engine="0",model_name="demo",reason="capacity"} 0.0
# HELP vllm:kv_cache_usage_perc KV-cache usage. 1 means 100 percent usage.
# TYPE vllm:kv_cache_usage_perc gauge
vllm:kv_cache_usage_perc{engine="0",model_name="demo"} 0.0
# TYPE vllm:prefix_cache_queries_total counter
vllm:prefix_cache_queries_total{engine="0",model_name="demo"} 244.0
# TYPE vllm:prefix_cache_queries_created gauge
vllm:prefix_cache_queries_created{engine="0",model_name="demo"} 1.7956050157957742e+09
# TYPE vllm:prefix_cache_hits_total counter
vllm:prefix_cache_hits_total{engine="0",model_name="demo"} 0.0
# HELP vllm:prompt_tokens_total Number of prefill tokens processed.
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{engine="0",model_name="demo"} 244.0
# TYPE vllm:prompt_tokens_by_source_total counter
vllm:prompt_tokens_by_source_total{engine="0",model_name="demo",source="local_compute"} 244.0
# HELP vllm:generation_tokens_total Number of generation tokens processed.
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{engine="0",model_name="demo"} 10.0
# TYPE vllm:generation_tokens_created gauge
vllm:generation_tokens_created{engine="0",model_name="demo"} 1.7956050157960472e+09
# HELP vllm:cache_config_info Information of the LLMEngine CacheConfig
# TYPE vllm:cache_config_info gauge
vllm:cache_config_info{_block_size_resolved="True",block_size="128",cache_dtype="auto",\
enable_prefix_caching="True",engine="0",num_gpu_blocks="65536"} 1.0
"""
READ_IDLE = EngineMetrics(
    requests_running=0,
    requests_waiting=0,
    kv_cache_usage=0.0,
    prompt_tokens=244.0,
    generation_tokens=10.0,
    prefix_cache_hit_rate=0.0,
    prefix_cache_hits=0.0,
    cache=CacheConfig(block_size=128, prefix_caching=True),
)
NONE_OF_VLLMS = IDLE.replace("vllm:", "sglang:")


def two_engines(series, first, second):
    return "".join(
        f'vllm:{series}{{engine="{engine}",model_name="demo"}} {value}\n'
        for engine, value in (("0", first), ("1", second))
    )


def test_vllms_own_answer_is_read():
    assert parse_metrics(IDLE) == READ_IDLE


def test_engines_are_summed_and_the_fullest_cache_counts():
    text = (
        two_engines("num_requests_running", "3.0", "4.0")
        + two_engines("num_requests_waiting", "0.0", "2.0")
        + two_engines("kv_cache_usage_perc", "0.25", "0.125")
        + two_engines("prompt_tokens_total", "1e+06", "24.0")
        + two_engines("generation_tokens_total", "10.0", "20.0")
        + two_engines("prefix_cache_queries_total", "300.0", "100.0")
        + two_engines("prefix_cache_hits_total", "60.0", "40.0")
    )
    assert parse_metrics(text) == EngineMetrics(7, 2, 0.25, 1000024.0, 30.0, 0.25, 100.0)


def test_the_older_name_of_the_usage_and_what_is_absent():
    assert parse_metrics("vllm:gpu_cache_usage_perc 0.5\n") == EngineMetrics(0, 0, 0.5, 0, 0, None)
    before_a_request = "vllm:prefix_cache_queries_total 0.0\nvllm:prefix_cache_hits_total 0.0\n"
    assert parse_metrics(before_a_request) == EngineMetrics(0, 0, 0.0, 0, 0, None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the metrics hold none of vLLM's series"),
        (NONE_OF_VLLMS, "the metrics hold none of vLLM's series"),
        ("<html>not found</html>", "the metrics can't be read: "),
        ('vllm:num_requests_running{engine="0} 1.0', "the metrics can't be read: "),
        (f"vllm:num_requests_running {10**400}", "the metrics can't be read: "),
        ("vllm:num_requests_running NaN", "the metrics can't be read: nan is no count"),
        (IDLE + "vllm:prompt_tokens_total", "the metrics can't be read: "),
    ],
)
def test_what_is_no_answer_of_vllm(text, message):
    with pytest.raises(EndpointError) as caught:
        parse_metrics(text)
    assert str(caught.value).startswith(message)
    assert caught.value.kind == "invalid"


@contextmanager
def metrics_server(status, text, *, answer=None):
    """A server that says `text` at /metrics; with the event `answer`, only once it is set."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            if answer is not None:
                answer.wait(30)
            body = text.encode()
            self.send_response(status if self.path == "/metrics" else 404)
            self.send_header("Content-Type", "text/plain; version=0.0.4; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            with suppress(BrokenPipeError):  # whoever asked did not wait
                self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        if answer is not None:
            answer.set()
        server.shutdown()
        thread.join()
        server.server_close()


def test_a_server_is_read_past_a_proxy(monkeypatch):
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with metrics_server(200, IDLE) as url:
        assert read_metrics(url) == READ_IDLE


def failure(url, **options):
    with pytest.raises(EndpointError) as caught:
        read_metrics(url, **options)
    return caught.value


def test_a_server_that_does_not_tell():
    with metrics_server(503, "EngineDeadError") as url:
        error = failure(url)
    assert (error.kind, error.status) == ("status", 503)
    assert str(error) == "/metrics answered 503: EngineDeadError"
    with metrics_server(200, IDLE, answer=threading.Event()) as url:
        assert failure(url, timeout_s=0.1).kind == "timeout"
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    assert failure(f"http://127.0.0.1:{port}").kind == "unreachable"


def test_the_parser_is_imported_only_where_metrics_are_read():
    code = "import sys, gemma_serve.adapters.metrics; sys.exit('prometheus_client' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
