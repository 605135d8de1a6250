"""An OpenAI-compatible endpoint as we ask it. The only home of httpx.

Whatever goes wrong on the way (no connection, a time-out, an error status, an answer that isn't
JSON, a stream cut short) is raised as `EndpointError`; no message of it holds the API key.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType
from typing import Any, Self
from urllib.parse import urlsplit

import httpx
import psutil

from gemma_serve.adapters.endpoint_url import endpoint_url, is_local
from gemma_serve.adapters.openai_answers import (
    Answer,
    EndpointError,
    ServedModel,
    StreamedAnswer,
    StreamParts,
    TextOf,
    completion_token,
    delta_text,
    first_choice,
    json_object,
    message_text,
    served_models,
    server_message,
    shorten,
    token_count,
    token_margins,
    whole_answer,
)
from gemma_serve.adapters.sse import SseDecoder

__all__ = [
    "Answer",
    "Endpoint",
    "EndpointError",
    "Sampling",
    "ServedModel",
    "StreamedAnswer",
    "endpoint_url",
    "generate_one_token",
    "is_healthy",
    "read_text",
    "shorten",
]

CONNECT_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Sampling:
    """How an answer is made. Temperature 0 is greedy: the same question, the same answer.

    Of vLLM alone: with `ignore_eos` it goes on after its end; with `choice` it is one of these.
    """

    max_tokens: int
    temperature: float = 0.0
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    choice: tuple[str, ...] = ()


@dataclass(frozen=True)
class RawReply:
    """An answer of any status, as it came."""

    status: int
    text: str


def _nothing() -> None:
    """What a stream's caller does with each event who only wants the whole."""


class Endpoint:
    """An async client of one endpoint; each request ends within `timeout_s` seconds.

    `url` is as `endpoint_url` returns it. Every method raises EndpointError.
    """

    def __init__(self, url: str, *, api_key: str | None = None, timeout_s: float = 120.0) -> None:
        self._url = url
        self._api_key = api_key
        self._timeout_s = timeout_s
        # A connection that the server is about to close must not count as a broken answer.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._http = httpx.AsyncClient(**_client_options(url, api_key, timeout_s), limits=limits)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._http.aclose()

    async def list_models(self) -> tuple[ServedModel, ...]:
        """The models that the endpoint serves, in its order."""
        text = await self._request("GET", "/v1/models")
        with _our_errors(self._url, self._timeout_s, self._api_key):
            return served_models(json_object(text))

    async def complete(self, model: str, prompt: str, sampling: Sampling) -> Answer:
        """Continue `prompt`."""
        body = _body(model, sampling, prompt=prompt)
        return await self._whole("/v1/completions", body, completion_token)

    async def stream_completion(
        self,
        model: str,
        prompt: str,
        sampling: Sampling,
        on_token: Callable[[], None] = _nothing,
    ) -> StreamedAnswer:
        """Continue `prompt`, event by event; `on_token` is called for each."""
        body = _body(model, sampling, prompt=prompt)
        parts = StreamParts(completion_token, on_token)
        return await self._stream("/v1/completions", body, parts)

    async def chat(
        self, model: str, messages: Sequence[Mapping[str, str]], sampling: Sampling
    ) -> Answer:
        """Answer a chat; each message has `role` and `content`."""
        body = _body(model, sampling, messages=list(messages))
        return await self._whole("/v1/chat/completions", body, message_text)

    async def stream_chat(
        self,
        model: str,
        messages: Sequence[Mapping[str, str]],
        sampling: Sampling,
        on_token: Callable[[], None] = _nothing,
    ) -> StreamedAnswer:
        """Answer a chat, event by event; `on_token` is called for each."""
        body = _body(model, sampling, messages=list(messages))
        parts = StreamParts(delta_text, on_token)
        return await self._stream("/v1/chat/completions", body, parts)

    async def token_margins(
        self,
        model: str,
        prompt: str,
        messages: Sequence[Mapping[str, str]],
        sampling: Sampling,
    ) -> tuple[tuple[str, float], ...]:
        """Each token of the answer, and how far it stood above the second best, in nats.

        Of the chat `messages`, or where there are none of `prompt`. Empty where the server tells
        no log-probabilities.
        """
        if messages:
            path, more = "/v1/chat/completions", {"logprobs": True, "top_logprobs": 2}
            body = _body(model, sampling, messages=list(messages), **more)
        else:
            path, body = "/v1/completions", _body(model, sampling, prompt=prompt, logprobs=2)
        text = await self._request("POST", path, body)
        with _our_errors(self._url, self._timeout_s, self._api_key):
            return token_margins(first_choice(json_object(text)))

    async def leave_stream(
        self,
        model: str,
        question: Mapping[str, Any],
        sampling: Sampling,
        *,
        after_tokens: int,
        meanwhile: Callable[[], Awaitable[None]],
    ) -> tuple[int, float]:
        """Begin a stream, and after so many events await `meanwhile` and close the connection.

        `question` holds a completion's `prompt` or a chat's `messages`. Returns how many events
        came, and in how many seconds after the first.
        """
        path = "/v1/chat/completions" if "messages" in question else "/v1/completions"
        request = {**_body(model, sampling, **question), "stream": True}
        decoder = SseDecoder()
        times: list[float] = []
        async with self._streaming(path, request) as response:
            async for chunk in response.aiter_bytes():
                times += [perf_counter() for _ in decoder.feed(chunk)]
                if len(times) >= after_tokens:
                    await meanwhile()
                    break
        return len(times), times[-1] - times[0] if times else 0.0

    async def count_tokens(self, model: str, prompt: str) -> int | None:
        """How many tokens `prompt` has by the server's own tokenizer; None where it tells not."""
        reply = await self.try_request("POST", "/tokenize", {"model": model, "prompt": prompt})
        if reply.status != httpx.codes.OK:
            return None
        with _our_errors(self._url, self._timeout_s, self._api_key):
            return token_count(json_object(reply.text))

    async def try_request(
        self, method: str, path: str, body: Mapping[str, Any] | bytes | None = None
    ) -> RawReply:
        """What the server answers, whatever its status. Bytes are sent as they are."""
        content = json.dumps(body).encode() if isinstance(body, Mapping) else body
        headers = {} if content is None else {"Content-Type": "application/json"}
        with _our_errors(self._url, self._timeout_s, self._api_key):
            async with asyncio.timeout(self._timeout_s):
                response = await self._http.request(method, path, content=content, headers=headers)
            return RawReply(response.status_code, response.text)

    async def _request(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> str:
        with _our_errors(self._url, self._timeout_s, self._api_key):
            # httpx's own time-outs start anew with every chunk; this one bounds the whole.
            async with asyncio.timeout(self._timeout_s):
                response = await self._http.request(method, path, json=body)
            _raise_for_status(response, path)
            return response.text

    async def _whole(self, path: str, body: Mapping[str, Any], text_of: TextOf) -> Answer:
        started_at = perf_counter()
        text = await self._request("POST", path, body)
        duration_s = perf_counter() - started_at
        with _our_errors(self._url, self._timeout_s, self._api_key):
            return whole_answer(json_object(text), text_of, duration_s=duration_s)

    async def _stream(
        self, path: str, body: Mapping[str, Any], parts: StreamParts
    ) -> StreamedAnswer:
        request = {**body, "stream": True, "stream_options": {"include_usage": True}}
        decoder, started_at = SseDecoder(), perf_counter()
        async with self._streaming(path, request) as response:
            async for chunk in response.aiter_bytes():
                parts.take(decoder.feed(chunk), at_s=perf_counter() - started_at)
            duration_s = perf_counter() - started_at
            parts.take(decoder.close(), at_s=duration_s)
            return parts.answer(
                started_at=started_at,
                duration_s=duration_s,
                content_type=response.headers.get("Content-Type", ""),
            )

    @asynccontextmanager
    async def _streaming(
        self, path: str, request: Mapping[str, Any]
    ) -> AsyncIterator[httpx.Response]:
        """A stream that began well; its connection is closed with the block."""
        with _our_errors(self._url, self._timeout_s, self._api_key):
            async with (
                asyncio.timeout(self._timeout_s),
                self._http.stream("POST", path, json=request) as response,
            ):
                if not response.is_success:
                    await response.aread()
                _raise_for_status(response, path)
                yield response


def is_healthy(url: str, *, timeout_s: float = 1.0) -> bool:
    """Whether `/health` says 200 within `timeout_s`. Cheap enough to ask several times a second."""
    try:
        with httpx.Client(**_client_options(url, None, timeout_s)) as http:
            return http.get("/health").status_code == httpx.codes.OK
    except httpx.HTTPError:
        return False


def read_text(url: str, path: str, *, timeout_s: float) -> str:
    """What the server says at `path` when asked without a key. Raises EndpointError."""
    with (
        _our_errors(url, timeout_s, None),
        httpx.Client(**_client_options(url, None, timeout_s)) as http,
    ):
        response = http.get(path)
        _raise_for_status(response, path)
        return response.text


def generate_one_token(url: str, model: str, api_key: str | None, timeout_s: float) -> None:
    """Return once `model` has generated a token: the engine answers, not only its front.

    Raises:
        EndpointError: no token came, with the reason.
    """
    path, body = "/v1/completions", _body(model, Sampling(max_tokens=1), prompt="Hello")
    with (
        _our_errors(url, timeout_s, api_key),
        httpx.Client(**_client_options(url, api_key, timeout_s)) as http,
    ):
        response = http.post(path, json=body)
        _raise_for_status(response, path)
        answer = whole_answer(json_object(response.text), completion_token, duration_s=0.0)
    if answer.completion_tokens == 0:
        raise EndpointError("the engine answered without a token", kind="invalid")


def _client_options(url: str, api_key: str | None, timeout_s: float) -> dict[str, Any]:
    return {
        "base_url": url,
        "headers": {} if api_key is None else {"Authorization": f"Bearer {api_key}".encode()},
        "timeout": httpx.Timeout(timeout_s, connect=min(timeout_s, CONNECT_TIMEOUT_S)),
        # A proxy variable must not divert what is meant for this machine.
        "trust_env": not _is_here(urlsplit(url).hostname or ""),
        # Reading the certificate store takes 20 ms, and plain HTTP has no use for it.
        "verify": url.startswith("https:"),
    }


def _is_here(host: str) -> bool:
    """Whether `host` is this machine, by one of its addresses."""
    addresses = (a.address for several in psutil.net_if_addrs().values() for a in several)
    return is_local(host) or host in addresses


def _body(model: str, sampling: Sampling, **question: Any) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": model,
        **question,
        "max_tokens": sampling.max_tokens,
        "temperature": sampling.temperature,
    }
    if sampling.stop:
        body["stop"] = list(sampling.stop)
    if sampling.ignore_eos:
        body["ignore_eos"] = True
    if sampling.choice:
        body["structured_outputs"] = {"choice": list(sampling.choice)}
    return body


@contextmanager
def _our_errors(url: str, timeout_s: float, api_key: str | None) -> Iterator[None]:
    """Raise what httpx, asyncio and the decoder raise as EndpointError, without the key."""
    try:
        yield
    except EndpointError as error:
        raise error.without(api_key) from None
    except httpx.LocalProtocolError:
        # Its text quotes the header.
        message = "the API key holds characters that can't be sent"
        raise EndpointError(message, kind="invalid", hint="check the key's file") from None
    except (httpx.ConnectError, httpx.ConnectTimeout) as error:
        raise EndpointError(
            f"cannot reach {url}: {shorten(str(error)) or 'no connection in time'}",
            kind="unreachable",
            hint="is the server running there? `gemma-serve up` starts one",
        ) from None
    except (TimeoutError, httpx.TimeoutException):
        raise EndpointError(
            f"{url} did not answer within {timeout_s:g} s",
            kind="timeout",
            hint="the engine may hang (see its log), or be slow: allow more with --timeout",
        ) from None
    except (httpx.NetworkError, httpx.RemoteProtocolError) as error:
        raise EndpointError(
            f"{url} closed the connection before its answer was whole: {shorten(str(error))}",
            kind="cut",
            hint="the engine may have died; its log says why",
        ) from None
    except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError, ValueError) as error:
        # UnicodeDecodeError is a ValueError: a stream that is not UTF-8.
        message = f"what {url} sent can't be read: {shorten(str(error))}"
        raise EndpointError(
            message, kind="invalid", hint="what stands in between, a proxy perhaps, may garble it"
        ) from None


def _raise_for_status(response: httpx.Response, path: str) -> None:
    if response.is_success:
        return
    try:
        said = server_message(json_object(response.text))
    except EndpointError:
        said = shorten(response.text)
    raise EndpointError(
        f"{path} answered {response.status_code}" + (f": {said}" if said else ""),
        kind="status",
        status=response.status_code,
        server_message=said,
        hint=_status_hint(response.status_code),
    )


def _status_hint(status: int) -> str:
    if status in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
        return "set GEMMA_SERVE_API_KEY to the server's key, or name its file with --api-key-file"
    if status == httpx.codes.NOT_FOUND:
        return "is this vLLM's OpenAI server, and the URL its own, such as http://127.0.0.1:8000?"
    if status == httpx.codes.TOO_MANY_REQUESTS:
        return "a gateway in between limits requests: ask the server itself, or fewer at once"
    if status >= httpx.codes.INTERNAL_SERVER_ERROR:
        return "the engine's log says why; `gemma-serve diagnose` reads it"
    return ""
