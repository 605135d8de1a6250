"""The client of an endpoint: what it reads, and how every failure becomes an EndpointError."""

import asyncio
import inspect
import json
import socket
import threading
from contextlib import contextmanager

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fake_engine import serving
from gemma_serve.adapters import openai_api
from gemma_serve.adapters.endpoint_url import endpoint_url
from gemma_serve.adapters.openai_api import (
    Endpoint,
    EndpointError,
    Sampling,
    ServedModel,
    generate_one_token,
    is_healthy,
)
from gemma_serve.adapters.sse import SseDecoder
from gemma_serve.errors import UsageError

KEY = "sk-very-secret"
FEW = Sampling(max_tokens=16)
CHAT = [{"role": "user", "content": "What is the capital of France?"}]


def ask(url, question, *, api_key=None, timeout_s=20.0):
    """What `question`, a function of an Endpoint, comes to."""

    async def go():
        async with Endpoint(url, api_key=api_key, timeout_s=timeout_s) as endpoint:
            return await question(endpoint)

    return asyncio.run(go())


def stream(endpoint):
    return endpoint.stream_completion("demo", "Hello", FEW)


@contextmanager
def one_answer(raw):
    """A server that answers one request with the bytes `raw` and closes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)

        def serve():
            connection, _ = listener.accept()
            with connection:
                connection.recv(65536)
                connection.sendall(raw)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread.join(10)


def http_answer(body, kind="application/json", length=None):
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\n"
    head += f"Content-Length: {len(body) if length is None else length}\r\n\r\n"
    return head.encode() + body


@pytest.fixture(scope="module")
def url():
    with serving() as address:
        yield address


def test_models_and_health(url):
    assert ask(url, lambda e: e.list_models()) == (ServedModel("demo", 128, "fake"),)
    assert is_healthy(url)


def test_plain_and_streamed_answers_are_the_same(url):
    plain = ask(url, lambda e: e.complete("demo", "Hello", FEW))
    streamed = ask(url, stream)
    assert (plain.finish_reason, plain.prompt_tokens, plain.completion_tokens) == ("stop", 2, 13)
    assert plain.model == "demo"
    for name in ("text", "finish_reason", "prompt_tokens", "completion_tokens", "model"):
        assert getattr(streamed, name) == getattr(plain, name)
    assert streamed.done
    assert streamed.events == streamed.completion_tokens
    assert list(streamed.token_times_s) == sorted(streamed.token_times_s)
    assert 0 < streamed.ttft_s == streamed.token_times_s[0]
    assert streamed.token_times_s[-1] <= streamed.duration_s


def test_chats_and_each_event_is_told(url):
    seen = []
    plain = ask(url, lambda e: e.chat("demo", CHAT, FEW))
    streamed = ask(url, lambda e: e.stream_chat("demo", CHAT, FEW, lambda: seen.append(1)))
    assert plain.text == streamed.text == "The capital of France is Paris."
    assert len(seen) == len(streamed.token_times_s) == streamed.events == 6


def test_tokens_without_text_are_tokens_all_the_same(url):
    long = Sampling(20, ignore_eos=True)
    streamed = ask(url, lambda e: e.stream_chat("demo", CHAT, long))
    assert (streamed.completion_tokens, len(streamed.token_times_s), streamed.events) == (20, 20, 6)


def test_a_stop_sequence_and_the_end_ignored_are_asked_for(url):
    stopped = ask(url, lambda e: e.complete("demo", "1, 2, 3, 4,", Sampling(16, stop=(" 7",))))
    assert stopped.text == " 5, 6,"
    long = ask(url, lambda e: e.complete("demo", "Hello", Sampling(40, ignore_eos=True)))
    assert (long.completion_tokens, long.finish_reason) == (40, "length")


@pytest.mark.parametrize(
    "way",
    [{"crlf": True}, {"comments": True}, {"split_bytes": 1}, {"crlf": True, "split_bytes": 3}],
)
def test_harmless_ways_to_stream_change_nothing(way, url):
    with serving(way) as other:
        question = Sampling(60, ignore_eos=True)
        theirs = ask(other, lambda e: e.stream_completion("demo", "Hello", question))
    ours = ask(url, lambda e: e.stream_completion("demo", "Hello", question))
    assert not ours.text.isascii()
    assert (theirs.text, theirs.events, theirs.done) == (ours.text, ours.events, True)


@pytest.mark.parametrize(
    ("faults", "kind", "said"),
    [
        ({"cut_stream": True}, "cut", "before its answer was whole"),
        ({"half_json": True}, "invalid", "a JSON object was wanted"),
        ({"error_in_stream": True}, "status", "EngineCore died"),
        ({"bad_utf8": True, "answer": "river"}, "invalid", "can't be read"),
        ({"status": 503}, "status", "answered 503: EngineDeadError"),
        ({"hang": "completion"}, "timeout", "within 0.3 s"),
        ({"hang": "completion-stream"}, "timeout", "within 0.3 s"),
    ],
)
def test_a_failing_stream_is_an_endpoint_error(faults, kind, said):
    timeout_s = 0.3 if "hang" in faults else 20.0
    with serving(faults) as address, pytest.raises(EndpointError, match=said) as caught:
        ask(address, stream, timeout_s=timeout_s)
    assert caught.value.kind == kind
    assert caught.value.problems[0].code == f"endpoint.{kind}"
    assert caught.value.exit_code == 1


def test_a_time_limit_bounds_the_whole_and_not_each_piece():
    slow = {"token_delay_s": 0.1, "hang": ""}
    with serving(slow) as address, pytest.raises(EndpointError, match=r"within 0\.5 s"):
        ask(address, stream, timeout_s=0.5)


@pytest.mark.parametrize(
    ("raw", "kind"),
    [
        (b"", "cut"),
        (http_answer(b'{"cho', length=99), "cut"),
        (http_answer(b"<html>hello</html>"), "invalid"),
        (http_answer(b"[1, 2]"), "invalid"),
        (http_answer(b"{}"), "invalid"),
        (http_answer(b'{"choices": []}'), "invalid"),
        (http_answer(b'{"choices": {"text": 1}}'), "invalid"),
        (b"SSH-2.0-OpenSSH\r\n", "cut"),
        (b"HTTP/1.1 302 Found\r\nLocation: http://x/\r\nContent-Length: 0\r\n\r\n", "status"),
    ],
)
def test_an_answer_that_is_none(raw, kind):
    with one_answer(raw) as address, pytest.raises(EndpointError) as caught:
        ask(address, lambda e: e.complete("demo", "Hello", FEW))
    assert caught.value.kind == kind


def test_a_stream_that_ends_early_without_an_error_is_cut():
    body = b'data: {"choices": [{"text": "Hi"}]}\n\n'
    with (
        one_answer(http_answer(body, "text/event-stream")) as address,
        pytest.raises(EndpointError, match="ended after 1 events") as caught,
    ):
        ask(address, stream)
    assert caught.value.kind == "cut"


def test_odd_shapes_inside_an_answer_are_read_as_missing():
    body = json.dumps({"choices": [{"message": None, "finish_reason": 3}], "usage": {"x": 1}})
    with one_answer(http_answer(body.encode())) as address:
        answer = ask(address, lambda e: e.chat("demo", CHAT, FEW))
    assert (answer.text, answer.finish_reason, answer.prompt_tokens) == ("", None, None)


def test_nobody_listens():
    with socket.create_server(("127.0.0.1", 0)) as free:
        address = f"http://127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(EndpointError, match=f"cannot reach {address}") as caught:
        ask(address, lambda e: e.list_models())
    assert caught.value.kind == "unreachable"
    assert not is_healthy(address)
    with pytest.raises(EndpointError) as caught:
        generate_one_token(address, "demo", None, 1.0)
    assert caught.value.kind == "unreachable"


def test_one_token_shows_that_the_engine_answers(url):
    assert generate_one_token(url, "demo", None, 20.0) is None
    with serving({"health_only": True}) as dead:
        assert is_healthy(dead)
        with pytest.raises(EndpointError, match="EngineDeadError"):
            generate_one_token(dead, "demo", None, 20.0)
    with serving({"health_only": "hang"}) as hung, pytest.raises(EndpointError) as caught:
        generate_one_token(hung, "demo", None, 0.3)
    assert caught.value.kind == "timeout"


def test_the_key_is_sent_and_never_told():
    with serving({"quote_key": True}, VLLM_API_KEY=KEY) as address:
        assert ask(address, lambda e: e.list_models(), api_key=KEY)
        assert generate_one_token(address, "demo", KEY, 20.0) is None
        for wrong in (None, "sk-wrong-secret"):
            with pytest.raises(EndpointError, match="401: Unauthorized") as caught:
                ask(address, lambda e: e.list_models(), api_key=wrong)
            assert "GEMMA_SERVE_API_KEY" in caught.value.problems[0].hint
            assert caught.value.status == 401
            told = f"{caught.value}{caught.value.problems}{caught.value.server_message}"
            assert "secret" not in told


@pytest.mark.parametrize("key", ["sk-secret\nX: y", "sk-secret\x00"])
def test_a_key_that_no_header_can_hold_is_not_told_either(key, url):
    with pytest.raises(EndpointError) as caught:
        ask(url, lambda e: e.list_models(), api_key=key)
    assert "secret" not in f"{caught.value}{caught.value.problems}"


def test_a_key_may_hold_any_letter(url):
    assert ask(url, lambda e: e.list_models(), api_key="schlüssel")


def test_a_proxy_does_not_get_what_is_meant_for_this_machine(url, monkeypatch):
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    assert is_healthy(url)
    assert is_healthy(url.replace("127.0.0.1", "localhost"))
    assert ask(url, lambda e: e.list_models())


def errors_of_httpx():
    found = (getattr(httpx, name) for name in httpx.__all__)
    every = [one for one in found if inspect.isclass(one) and issubclass(one, Exception)]
    return [one for one in every if one is not httpx.CookieConflict]  # we read no cookies


@pytest.mark.parametrize("error", errors_of_httpx(), ids=lambda error: error.__name__)
def test_every_error_of_httpx_becomes_ours(error):
    raised = error.__new__(error)
    Exception.__init__(raised, "text")
    with pytest.raises(EndpointError), openai_api._our_errors("http://x", 1.0, None):
        raise raised


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("http://127.0.0.1:8000", "http://127.0.0.1:8000"),
        (" http://127.0.0.1:8000/ ", "http://127.0.0.1:8000"),
        ("http://localhost:8000/v1", "http://localhost:8000"),
        ("http://localhost:8000/v1/", "http://localhost:8000"),
        ("https://example.org/gemma/v1", "https://example.org/gemma"),
        ("HTTP://Example.org", "http://example.org"),
        ("http://[::1]:8000/v1", "http://[::1]:8000"),
    ],
)
def test_an_address_as_people_write_it(written, meant):
    assert endpoint_url(written) == meant


@pytest.mark.parametrize(
    "wrong",
    ["", "localhost:8000", "ftp://x", "http://", "http://x:port", "http://x:99999", "http://["],
)
def test_what_is_no_address_is_wrong_usage(wrong):
    with pytest.raises(UsageError) as caught:
        endpoint_url(wrong)
    assert "http://127.0.0.1:8000" in caught.value.problems[0].hint


def test_an_address_with_a_password_is_refused_and_not_repeated():
    with pytest.raises(UsageError) as caught:
        endpoint_url("http://me:sk-secret@host:8000")
    assert "secret" not in f"{caught.value}{caught.value.problems}"


def decoded(raw, cuts=()):
    decoder, found, start = SseDecoder(), [], 0
    for end in [*sorted(cuts), len(raw)]:
        found += decoder.feed(raw[start:end])
        start = max(start, end)
    return [*found, *decoder.close()]


@given(
    st.lists(st.text(st.characters(exclude_characters="\r\n\x00", exclude_categories=["Cs"]))),
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.lists(st.integers(0, 400)),
)
def test_events_survive_any_cut(texts, end, cuts):
    raw = "".join(f": x{end}data:{' ' * text.startswith(' ')}{text}{end}{end}" for text in texts)
    data = raw.encode()
    assert decoded(data, [min(cut, len(data)) for cut in cuts]) == texts


def test_events_as_the_standard_has_them():
    raw = "\ufeffevent: a\ndata: one\ndata:two\ndata\nid: 7\n\n\n: nothing\n\ndata: \n\ndata: lost"
    assert decoded(raw.encode()) == ["one\ntwo\n", ""]


def test_bytes_that_are_no_text_are_an_error():
    with pytest.raises(UnicodeDecodeError):
        decoded(b"data: \xff\n\n")
    with pytest.raises(UnicodeDecodeError):
        decoded("data: é".encode()[:-1])
