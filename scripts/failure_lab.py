#!/usr/bin/env python3
"""Provoke, on a real vLLM for CPUs, the failures that can be had there, and keep what it prints.

    .venv/bin/python scripts/failure_lab.py [--engine-python PY] [--out DIR] [--only ID,ID] [--list]

Each case starts vLLM's own server without gemma-serve, which would refuse many of them before the
start. The log goes to DIR as ID.VARIANT.ENGINE.log, whole, but with neutral names for this
machine's folders, host and addresses. A case that fails in another way than its own is for the
reader of the log to see; one that does not fail at all is named, its log is not kept, and the
script exits 1. Some cases need Linux namespaces (`unshare -rm`) or a memory cgroup.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any, Literal

import psutil

ROOT = Path(__file__).resolve().parent.parent
LOGS = ROOT / "tests" / "data" / "logs" / "failures"
READY = "Application startup complete"
LOADING = "Starting to load model"
PATIENCE_S = 150.0
LARGEST_LOG = 120_000
NO_SANDBOX = 97


class NotProvokedError(Exception):
    """The engine did not do what the case needs."""


@cache
def from_tests(name: str) -> Any:
    """A module of the tests, which are no package."""
    if str(ROOT / "tests") not in sys.path:
        sys.path.insert(0, str(ROOT / "tests"))
    return importlib.import_module(name)


# What a case is made of.


@dataclass(frozen=True)
class Place:
    """The folders of one case, and what is the same for all cases of an engine."""

    folder: Path
    python: Path
    checkpoints: Path
    torchvision: Path | None = None

    @property
    def home(self) -> Path:
        return self.folder / "home"

    @property
    def temporary(self) -> Path:
        return self.folder / "tmp"

    @property
    def models(self) -> Path:
        return self.folder / "models"

    @property
    def hub_home(self) -> Path:
        return self.home / ".cache" / "huggingface"

    @property
    def plugins(self) -> Path:
        return self.home / "plugins"

    @property
    def inspections(self) -> Path:
        """What vLLM remembers of its model classes; finding it out takes ten seconds."""
        return self.home / ".cache" / "vllm" / "modelinfos"

    @property
    def compiled(self) -> Path:
        return self.home / ".cache" / "vllm" / "torch_compile_cache"


Flags = Mapping[str, str | bool]
Model = Callable[[Place], str]
Edit = Callable[[Path], None]


@dataclass(frozen=True)
class Settings:
    """How an engine is started. A flag that is True has no value; one that is False is left out."""

    flags: Flags = field(default_factory=dict)
    env: Mapping[str, str] = field(default_factory=dict)

    def changed(self, change: Settings) -> Settings:
        """These settings with those of a change over them."""
        return Settings({**self.flags, **change.flags}, {**self.env, **change.env})


SMALL = Settings(
    {
        "--host": "127.0.0.1",
        "--enforce-eager": True,
        "--kv-cache-memory-bytes": "67108864",
        "--max-model-len": "1024",
        "--max-num-seqs": "8",
    },
    {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "VLLM_NO_USAGE_STATS": "1"},
)
COMPILED = Settings({"--enforce-eager": False})
# With whole compiled functions, vLLM compiles again where one cannot be read.
COMPILED_IN_PARTS = COMPILED.changed(Settings(env={"VLLM_USE_AOT_COMPILE": "0"}))


@dataclass(frozen=True)
class Refused:
    """A request that a ready server refuses; its log has a last line with the answer."""

    id: str
    variant: str
    body: Mapping[str, Any]
    path: str = "chat/completions"


@dataclass(frozen=True)
class Case:
    """One failure, or one healthy run, in one wording.

    `settings` go over SMALL, `words` after the flags. `token` is the name of one in
    tests/demo_hub.py. The `entry` is the module of `vllm serve`,
    the server's module or the command itself; a `bare` command is as the wheels for CPUs have it,
    which misses its distribution.
    `around` are shell commands that run first, as root of a user and mount namespace of the case's
    own. `meanwhile` is done to the engine in turn; without it the engine is to end by itself.
    Cases of one `place` have the same folder, one after the other; one that is `alone` runs when no
    other does.
    """

    id: str
    variant: str
    model: Model
    settings: Settings = field(default_factory=Settings)
    words: tuple[str, ...] = ()
    entry: Literal["serve", "module", "command", "bare"] = "serve"
    hub: Callable[[], Any] | None = None
    token: str | None = None
    prepare: Callable[[Place], None] | None = None
    around: tuple[str, ...] = ()
    meanwhile: tuple[Callable[[Engine], None], ...] = ()
    refused: tuple[Refused, ...] = ()
    alone: bool = False
    place: str = ""

    @property
    def ids(self) -> set[str]:
        """The failures that it has logs of."""
        return {self.id} | {each.id for each in self.refused}


# Checkpoints.


def tiny(model_type: str, *edits: Edit, name: str | None = None) -> Model:
    """A tiny checkpoint of an architecture, after the edits."""

    def make(place: Place) -> str:
        path = place.models / (name or model_type)
        shutil.copytree(place.checkpoints / model_type, path)
        for edit in edits:
            edit(path)
        return str(path)

    return make


def named(name: str) -> Model:
    """Just this name: of a repository, or of a folder that does not exist."""
    return lambda place: name


def config(**changes: Any) -> Edit:
    """Other values in config.json; None takes a key out."""
    return in_json("config.json", **changes)


def in_json(name: str, **changes: Any) -> Edit:
    """Other values in a JSON file; None takes a key out."""

    def edit(path: Path) -> None:
        file = path / name
        values = {**json.loads(file.read_text()), **changes}
        file.write_text(json.dumps({k: v for k, v in values.items() if v is not None}, indent=2))

    return edit


def without(*names: str) -> Edit:
    """Some files are not there."""

    def edit(path: Path) -> None:
        for name in names:
            (path / name).unlink()

    return edit


def cut(name: str, keep: float) -> Edit:
    """A file ends early: at a byte count, or below 1 at that part of it."""

    def edit(path: Path) -> None:
        size = (path / name).stat().st_size
        os.truncate(path / name, int(keep if keep >= 1 else size * keep))

    return edit


def written(name: str, content: str) -> Edit:
    """A file has this content."""

    def edit(path: Path) -> None:
        (path / name).write_text(content)

    return edit


def sharded(path: Path) -> None:
    """The index names two shards, and the second is not there."""
    (path / "model.safetensors").rename(path / "model-00001-of-00002.safetensors")
    weights = (path / "model-00001-of-00002.safetensors").read_bytes()
    header = json.loads(weights[8 : 8 + int.from_bytes(weights[:8], "little")])
    names = [name for name in header if name != "__metadata__"]
    shards = {name: f"model-0000{1 + (name == names[-1])}-of-00002.safetensors" for name in names}
    index = {"metadata": {"total_size": len(weights)}, "weight_map": shards}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))


def fewer_tensors(path: Path) -> None:
    """One tensor has another name in the weights."""
    file = path / "model.safetensors"
    content = file.read_bytes()
    wanted = b"layers.1.mlp.down_proj"
    file.write_bytes(content.replace(wanted, wanted.replace(b"down_proj", b"dawn_proj")))


POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef\n"
    "size 4961251752\n"
)

# What a Gemma with images has besides its text model.
_IMAGE_TOKENS = {1024: "<start_of_image>", 1025: "<end_of_image>", 1026: "<image_soft_token>"}
_NEWLINES = {1027: "\n\n", 1028: "\n\n\n", 1029: "\n\n\n\n"}


def with_images(path: Path) -> None:
    """A Gemma 3 with images; its weights are dummies."""
    text = json.loads((path / "config.json").read_text())
    text = {**text, "vocab_size": 1088, "model_type": "gemma3_text"}
    del text["architectures"]
    vision = {
        "model_type": "siglip_vision_model", "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 896, "patch_size": 14,
        "vision_use_head": False,
    }  # fmt: skip
    both = {
        "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3",
        "text_config": text, "vision_config": vision, "mm_tokens_per_image": 256,
        "boi_token_index": 1024, "eoi_token_index": 1025, "image_token_index": 1026,
        "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0, "dtype": "bfloat16",
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(both))
    tokenizer = json.loads((path / "tokenizer.json").read_text())
    tokenizer["added_tokens"] += [
        {
            "id": number, "content": token, "single_word": False, "lstrip": False,
            "rstrip": False, "normalized": False, "special": True,
        }
        for number, token in {**_IMAGE_TOKENS, **_NEWLINES}.items()
    ]  # fmt: skip
    (path / "tokenizer.json").write_text(json.dumps(tokenizer))
    start, end, soft = _IMAGE_TOKENS.values()
    tokens = {"boi_token": start, "eoi_token": end, "image_token": soft}
    in_json(
        "tokenizer_config.json",
        extra_special_tokens=tokens,
        additional_special_tokens=None,
        processor_class="Gemma3Processor",
        model_max_length=8192,
        **tokens,
    )(path)
    image = {
        "do_convert_rgb": None, "do_normalize": True, "do_pan_and_scan": None,
        "do_rescale": True, "do_resize": True, "image_mean": [0.5] * 3, "image_std": [0.5] * 3,
        "image_processor_type": "Gemma3ImageProcessor", "image_seq_length": 256,
        "processor_class": "Gemma3Processor", "resample": 2, "rescale_factor": 1 / 255,
        "size": {"height": 896, "width": 896},
    }  # fmt: skip
    (path / "preprocessor_config.json").write_text(json.dumps(image))
    processor = {"image_seq_length": 256, "processor_class": "Gemma3Processor"}
    (path / "processor_config.json").write_text(json.dumps(processor))


# What is done to an engine.


class Engine:
    """A server in a session of its own, and what it prints."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str], cwd: Path, log: Path) -> None:
        self.log = log
        self.port = int(argv[argv.index("--port") + 1])
        with log.open("wb") as out:
            self.popen = subprocess.Popen(
                argv,
                env=dict(env),
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.seen: set[psutil.Process] = set()

    def text(self) -> str:
        """What it has printed until now."""
        return self.log.read_bytes().decode(errors="replace")

    def below(self) -> list[psutil.Process]:
        """The living processes of its session and below it; the leader is one of them."""
        for process in psutil.process_iter():
            with suppress(OSError, psutil.Error):
                if os.getsid(process.pid) == self.popen.pid:
                    self.seen.add(process)
        with suppress(psutil.Error):
            self.seen.update(psutil.Process(self.popen.pid).children(recursive=True))
        return [each for each in self.seen if _lives(each)]

    def wait_for(self, text: str) -> None:
        """Until the log has this text. Raises NotProvokedError if the engine ends before."""
        deadline = time.monotonic() + PATIENCE_S
        while text not in self.text():
            if self.popen.poll() is not None:
                raise NotProvokedError(f"it ended before it said {text!r}")
            if time.monotonic() > deadline:
                raise NotProvokedError(f"it did not say {text!r}")
            time.sleep(0.02)

    def end_by_itself(self, patience_s: float = PATIENCE_S) -> None:
        """Wait for its end, but not for ever: some hang. NotProvokedError if it gets ready."""
        deadline = time.monotonic() + patience_s
        while self.popen.poll() is None:
            if READY in self.text():
                raise NotProvokedError("it got ready")
            if time.monotonic() > deadline:
                return
            time.sleep(0.1)

    def post(self, path: str, body: Mapping[str, Any]) -> tuple[int, str]:
        """A request's status and answer; the status is 0 if there is none."""
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/v1/{path}",
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()
        except OSError as error:
            return 0, str(error)

    def close(self) -> None:
        """End it and all below it."""
        while left := self.below():
            for process in left:
                with suppress(psutil.Error):
                    process.kill()
            # First, or psutil would take the leader's status away.
            self.popen.wait()
            psutil.wait_procs(left, timeout=5)
        self.popen.wait()


def _lives(process: psutil.Process) -> bool:
    try:
        return bool(process.is_running() and process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


Act = Callable[[Engine], None]


def until(text: str) -> Act:
    """Go on when the log has this text."""
    return lambda engine: engine.wait_for(text)


def pause(seconds: float) -> Act:
    """Let it go on for a while."""
    return lambda engine: time.sleep(seconds)


def send(role: str, signum: signal.Signals) -> Act:
    """Send a signal to the `leader`, or to the process whose title ends with this role."""

    def act(engine: Engine) -> None:
        engine.below()
        if role == "leader":
            return engine.popen.send_signal(signum)
        for process in engine.below():
            with suppress(psutil.Error):
                if process.cmdline()[0].strip().startswith(f"VLLM::{role}"):
                    return process.send_signal(signum)
        raise NotProvokedError(f"it has no process with the title VLLM::{role}")

    return act


def send_first_child(signum: signal.Signals) -> Act:
    """Send a signal to the engine core as soon as it exists, before it has a title."""

    def act(engine: Engine) -> None:
        deadline = time.monotonic() + PATIENCE_S
        leader = psutil.Process(engine.popen.pid)
        while time.monotonic() < deadline and engine.popen.poll() is None:
            for child in leader.children():
                with suppress(psutil.Error):
                    if "spawn_main" in " ".join(child.cmdline()):
                        return child.send_signal(signum)
            time.sleep(0.02)
        raise NotProvokedError("it has no child")

    return act


def ask(path: str, **body: Any) -> Act:
    """One request that is answered."""

    def act(engine: Engine) -> None:
        status, answer = engine.post(path, body)
        if status != 200:
            raise NotProvokedError(f"the answer was {status} {answer[:300]}")

    return act


def begin(path: str, **body: Any) -> Act:
    """One request whose answer is not waited for."""

    def act(engine: Engine) -> None:
        threading.Thread(target=engine.post, args=(path, body), daemon=True).start()

    return act


def ended(engine: Engine) -> None:
    """Wait until it has ended."""
    deadline = time.monotonic() + 90.0
    while engine.popen.poll() is None and time.monotonic() < deadline:
        engine.below()
        time.sleep(0.1)


def killed(engine: Engine) -> None:
    """Kill all of it at once, as a machine's end would."""
    engine.close()


LONG = {"prompt": "Once", "max_tokens": 900, "ignore_eos": True, "temperature": 0}
COMPLETE = ask("completions", prompt="Once", max_tokens=8, temperature=0)
CHAT = ask("chat/completions", messages=[{"role": "user", "content": "Hello!"}], max_tokens=8)
STOPPED = (send("leader", signal.SIGTERM), ended)


# Preparations.


def distribution(place: Place, version: str) -> None:
    """A distribution named `vllm` of this version, unless there is one."""
    if list(place.plugins.glob("vllm-*.dist-info")):
        return
    folder = place.plugins / f"vllm-{version}.dist-info"
    folder.mkdir(parents=True)
    (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")


def share_inspections(place: Place) -> None:
    """Let all cases have one memory of model classes, but those that have their own."""
    if not place.inspections.exists():
        shared = place.checkpoints.parent / "modelinfos"
        shared.mkdir(exist_ok=True)
        place.inspections.parent.mkdir(parents=True, exist_ok=True)
        place.inspections.symlink_to(shared)


def as_vllm(place: Place) -> None:
    """Let the engine's command find the distribution `vllm`, also where it is `vllm-cpu`."""
    version = engine_name(place.python).rpartition("-")[2]
    distribution(place, f"{version}+cpu")


def for_gpus(place: Place) -> None:
    """The engine takes itself for a build for GPUs: it goes by its version's suffix."""
    distribution(place, engine_name(place.python).rpartition("-")[2])


def injected(code: str) -> Callable[[Place], None]:
    """Python code that each process of the engine runs first."""

    def prepare(place: Place) -> None:
        place.plugins.mkdir(parents=True, exist_ok=True)
        (place.plugins / "sitecustomize.py").write_text(code)

    return prepare


# When a module has been read, or is about to be: sitecustomize may not import vLLM itself.
_ON_IMPORT = """
import importlib.abc, importlib.machinery, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != {module!r}:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        loader = spec.loader
        original = loader.exec_module
        def exec_module(module):
            before()
            original(module)
            after(module)
        loader.exec_module = exec_module
        return spec

def before():
    pass

def after(module):
    pass

{code}

sys.meta_path.insert(0, Finder())
"""


def on_import(module: str, code: str) -> Callable[[Place], None]:
    """Code that defines `before()` or `after(module)` of one import."""
    return injected(_ON_IMPORT.format(module=module, code=code))


def failing_import(module: str, error: str) -> Callable[[Place], None]:
    """A module whose import raises, and no earlier inspection of it that is remembered."""

    def prepare(place: Place) -> None:
        place.inspections.mkdir(parents=True)
        on_import(module, f"def before():\n    raise {error}\n")(place)

    return prepare


# Of a torchvision for another torch, what Gemma's processors need works without its operators.
_WITHOUT_OPERATORS = """
import sys, types
name = "torchvision._meta_registrations"
sys.modules[name] = types.ModuleType(name)
"""


def other_torchvision(place: Place) -> None:
    """A torchvision that was built for another torch, as it is."""
    if place.torchvision is None:
        raise NotProvokedError("it needs --torchvision")
    place.inspections.mkdir(parents=True)
    place.plugins.mkdir(parents=True)
    (place.plugins / "torchvision").symlink_to(place.torchvision / "torchvision")


def any_torchvision(place: Place) -> None:
    """Whatever torchvision there is, so that it can be imported."""
    other_torchvision(place)
    injected(_WITHOUT_OPERATORS)(place)


def cached(*names: str) -> Callable[[Place], None]:
    """Some files of the hub's repository are in the cache already."""

    def prepare(place: Place) -> None:
        with from_tests("local_hub").serving(open_hub()) as hub:
            env = {**os.environ, **from_tests("local_hub").environ(hub.url, place.hub_home)}
            code = (
                "import sys, huggingface_hub as h\n"
                "for n in sys.argv[2:]: h.hf_hub_download(sys.argv[1], n)"
            )
            subprocess.run(
                [str(place.python), "-c", code, GATED, *names],
                env=env,
                check=True,
                capture_output=True,
            )

    return prepare


def spoilt_cache(spoil: Callable[[Path], None], settings: Settings) -> Callable[[Place], None]:
    """A good start with these settings, and then its cache is spoilt."""

    def prepare(place: Place) -> None:
        cache = place.inspections.parent
        good = place.checkpoints.parent / f"good-cache-{len(settings.env)}"
        if good.exists():
            shutil.copytree(good, cache, symlinks=True)
        else:
            first = case("healthy", "first", settings=settings, meanwhile=(until(READY), *STOPPED))
            run(first, place, place.folder / "first.log")
            shutil.rmtree(place.models)
            shutil.copytree(cache, good, symlinks=True)
        spoil(place.compiled)

    return prepare


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.is_file())


def emptied(pattern: str) -> Callable[[Path], None]:
    """The files of a cache whose path matches have no content."""

    def spoil(folder: Path) -> None:
        for file in _files(folder):
            if re.search(pattern, str(file)):
                os.truncate(file, 0)

    return spoil


def halved(pattern: str) -> Callable[[Path], None]:
    """The files of a cache whose path matches end in their middle."""

    def spoil(folder: Path) -> None:
        for file in _files(folder):
            if re.search(pattern, str(file)):
                os.truncate(file, file.stat().st_size // 2)

    return spoil


def scrambled(pattern: str) -> Callable[[Path], None]:
    """The files of a cache whose path matches have other bytes in their second half."""

    def spoil(folder: Path) -> None:
        for file in _files(folder):
            if re.search(pattern, str(file)):
                content = file.read_bytes()
                half = len(content) // 2
                file.write_bytes(content[:half] + bytes(255 - byte for byte in content[half:]))

    return spoil


def removed(pattern: str) -> Callable[[Path], None]:
    """The files of a cache whose path matches are not there."""

    def spoil(folder: Path) -> None:
        for file in _files(folder):
            if re.search(pattern, str(file)):
                file.unlink()

    return spoil


# Hubs.


def gated_hub() -> Any:
    """One gated repository, and three accounts."""
    return from_tests("demo_hub").gated_hub()


def open_hub() -> Any:
    """The same repository, and everybody may read it."""
    hub = gated_hub()
    for repo in hub.repos.values():
        repo.gated = None
    return hub


def empty_hub() -> Any:
    """No repository."""
    return from_tests("local_hub").LocalHub(repos={})


def holding_hub() -> Any:
    """A download of the weights that stops in the middle, without an end."""
    hub = open_hub()
    hub.faults.append(from_tests("local_hub").Hold("model.safetensors", after_bytes=100_000))
    return hub


def cutting_hub() -> Any:
    """A download of the weights that breaks off each time."""
    hub = open_hub()
    hub.faults.append(from_tests("local_hub").Cut("model.safetensors", after_bytes=100_000))
    return hub


def refusing_hub(status: int) -> Callable[[], Any]:
    """A hub that answers each question for a file with this status."""

    def make() -> Any:
        local = from_tests("local_hub")
        hub = open_hub()
        hub.faults.append(local.Refuse(None, refusal=local.Refusal(status)))
        return hub

    return make


GATED = "google/gemma-tiny-it"
# Sandboxes.


def small_disk(folder: str, size: str) -> tuple[str, ...]:
    """A file system of that size at a folder, as root of a namespace."""
    return (f'mkdir -p "{folder}"', f'mount -t tmpfs -o size={size} tmpfs "{folder}"')


def memory_limit(size: str) -> tuple[str, ...]:
    """A memory cgroup of that size (version 1)."""
    return (
        "group=/sys/fs/cgroup/memory/failure-lab-$$",
        "mkdir $group",
        f"echo {size} > $group/memory.limit_in_bytes",
        "echo $$ > $group/cgroup.procs",
    )


def remove_cgroup(leader: int) -> None:
    """Remove what `memory_limit` made for an engine that has ended."""
    group = Path(f"/sys/fs/cgroup/memory/failure-lab-{leader}")
    for _ in range(50):
        if not group.exists():
            return
        with suppress(OSError):
            group.rmdir()
        time.sleep(0.1)


# The cases.


def case(id: str, variant: str, model: Model | str = "gemma", **more: Any) -> Case:
    """A case; a model's name stands for its tiny checkpoint."""
    return Case(id, variant, tiny(model) if isinstance(model, str) else model, **more)


def flags(**values: str | bool) -> Settings:
    """Settings of flags alone."""
    return Settings({"--" + name.replace("_", "-"): value for name, value in values.items()})


def _user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


TOOL = {"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}
IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,iVBORw0KGgo="}}
REFUSED = (
    Refused(
        "no-system-role", "gemma",
        {"messages": [{"role": "system", "content": "Be brief."}, _user("Hello!")]},
    ),
    Refused("alternate-roles", "two-users", {"messages": [_user("Hello!"), _user("And you?")]}),
    Refused(
        "alternate-roles", "assistant-first",
        {"messages": [{"role": "assistant", "content": "Hello!"}, _user("Hello!")]},
    ),
    Refused("ctx-exceeded", "prompt-chat", {"messages": [_user("Hello! " * 2000)]}),
    Refused("ctx-exceeded", "max-tokens-chat", {"messages": [_user("Hi")], "max_tokens": 16384}),
    Refused(
        "ctx-exceeded", "prompt", {"prompt": "Hello! " * 2000, "max_tokens": 1}, "completions"
    ),
    Refused("ctx-exceeded", "max-tokens", {"prompt": "Hi", "max_tokens": 1024}, "completions"),
    Refused("tools-not-enabled", "auto", {"messages": [_user("Hi")], "tools": [TOOL]}),
    Refused(
        "tools-not-enabled", "auto-named",
        {"messages": [_user("Hi")], "tools": [TOOL], "tool_choice": "auto"},
    ),
    Refused("healthy", "request-other-model", {"messages": [_user("Hi")], "model": "gpt-4"}),
    Refused("healthy", "request-image", {"messages": [{"role": "user", "content": [IMAGE]}]}),
    Refused("healthy", "request-temperature", {"messages": [_user("Hi")], "temperature": -1}),
    Refused("healthy", "request-malformed", {"messages": "Hi"}),
)  # fmt: skip

SAFETENSORS = "model.safetensors"
BASE_MODEL = tiny("gemma", in_json("tokenizer_config.json", chat_template=None), name="gemma-base")
IMAGES = tiny("gemma3_text", with_images, without(SAFETENSORS), name="gemma3")
DUMMY = flags(load_format="dummy")
LARGE_KV = config(num_key_value_heads=4, head_dim=256, max_position_embeddings=131072)
KILL, SEGV, TERM, INT = signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM, signal.SIGINT

ACCESS = (
    case("gated-no-token", "serve", named(GATED), hub=gated_hub),
    case("gated-no-token", "module", named(GATED), hub=gated_hub, entry="module"),
    case("gated-no-token", "invalid", named(GATED), hub=gated_hub, token="UNKNOWN"),
    case("gated-no-licence", "serve", named(GATED), hub=gated_hub, token="NOT_ACCEPTED"),
    case("gated-no-licence", "module", named(GATED), hub=gated_hub,
         token="NOT_ACCEPTED", entry="module"),
    case("gated-no-licence", "fine-grained", named(GATED), hub=gated_hub,
         token="NOT_FOR_GATED"),
    case("repo-not-found", "hub", named("google/gema-2b-it"), hub=empty_hub),
    case("repo-not-found", "hub-module", named("google/gema-2b-it"), hub=empty_hub, entry="module"),
    case("repo-not-found", "no-folder", named("/models/gemma-9"), hub=empty_hub),
    case("repo-not-found", "empty-folder",
         tiny("gemma", without("config.json", SAFETENSORS, "generation_config.json"))),
    case("repo-not-found", "bad-name", named("google/gemma/2b"), hub=empty_hub),
    case("repo-not-found", "no-config", tiny("gemma", without("config.json"))),
    case("offline-cache-miss", "offline", named(GATED), settings=Settings(
        env={"HF_HUB_OFFLINE": "1"})),
    case("offline-cache-miss", "offline-module", named(GATED), entry="module",
         settings=Settings(env={"HF_HUB_OFFLINE": "1"})),
    case("offline-cache-miss", "transformers-offline", named(GATED),
         settings=Settings(env={"TRANSFORMERS_OFFLINE": "1"})),
    case("offline-cache-miss", "unreachable", named(GATED)),
    case("offline-cache-miss", "no-name", named(GATED),
         settings=Settings(env={"HF_ENDPOINT": "http://hub.invalid"})),
    case("offline-cache-miss", "config-only", named(GATED), prepare=cached("config.json"),
         settings=Settings(env={"HF_HUB_OFFLINE": "1"})),
    case("offline-cache-miss", "no-weights", named(GATED), prepare=cached(
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"),
         settings=Settings(env={"HF_HUB_OFFLINE": "1"})),
    case("offline-cache-miss", "unreachable-no-weights", named(GATED), prepare=cached(
        "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")),
    case("download-silent", "stalled", named(GATED), hub=holding_hub,
         meanwhile=(until(LOADING), pause(40), killed)),
    case("unknown", "download-broken-off", named(GATED), hub=cutting_hub,
         meanwhile=(until(LOADING), pause(40), killed)),
    case("offline-cache-miss", "hub-503", named(GATED), hub=refusing_hub(503)),
    case("offline-cache-miss", "hub-429", named(GATED), hub=refusing_hub(429)),
    case("disk-full", "download", named(GATED), hub=open_hub,
         around=small_disk("$HF_HOME", "512k")),
    case("disk-full", "download-module", named(GATED), hub=open_hub, entry="module",
         around=small_disk("$HF_HOME", "512k")),
    case("disk-full", "download-config", named(GATED), hub=open_hub,
         around=small_disk("$HF_HOME", "16k")),
    case("unknown", "file-size-limit", named(GATED), hub=open_hub, around=("ulimit -f 800",)),
    case("disk-full", "compile-cache", settings=COMPILED,
         around=small_disk("$HOME/.cache/vllm", "64k")),
    case("disk-full", "temporary", settings=COMPILED, around=small_disk("$TMPDIR", "8k")),
)  # fmt: skip

VERSIONS = (
    *(case("transformers-too-old", f"{entry}-{made}", tiny(
        model, config(model_type=kind, architectures=[architecture]), name=kind), entry=entry)
      for entry, made, model, kind, architecture in (
          ("serve", "text", "gemma3_text", "gemma9_text", "Gemma9ForCausalLM"),
          ("module", "text", "gemma3_text", "gemma9_text", "Gemma9ForCausalLM"),
          ("serve", "known-architecture", "gemma2", "gemma9", "Gemma2ForCausalLM"))),
    case("unknown", "no-model-type", tiny("gemma", config(model_type=None))),
    case("arch-unsupported", "text", tiny(
        "gemma3_text", config(architectures=["Gemma9ForCausalLM"]))),
    case("arch-unsupported", "module", entry="module", model=tiny(
        "gemma4_text", config(architectures=["Gemma9ForCausalLM"]))),
    case("arch-unsupported", "impl-vllm", tiny(
        "gemma2", config(architectures=["Gemma9ForCausalLM"])),
        settings=flags(model_impl="vllm")),
    case("abi-mismatch", "inspected", "gemma2", prepare=failing_import(
        "vllm.model_executor.models.gemma2",
        "ImportError('libcudart.so.13: cannot open shared object file: "
        "No such file or directory')")),
    case("arch-inspect-failed", "module", "gemma3_text", entry="module",
         prepare=failing_import("vllm.model_executor.models.gemma3",
                                "ModuleNotFoundError(\"No module named 'timm'\")")),
    case("arch-inspect-failed", "no-torchvision", IMAGES, settings=DUMMY),
    case("abi-mismatch", "torchvision", IMAGES, settings=DUMMY, prepare=other_torchvision),
    case("abi-mismatch", "torchvision-module", IMAGES, settings=DUMMY, entry="module",
         prepare=other_torchvision),
    *(case("flag-unknown", variant, words=words, entry=entry) for variant, entry, words in (
        ("serve", "serve", ("--max-context", "8192")),
        ("module", "module", ("--max-context", "8192")),
        ("removed", "serve", ("--use-v2-block-manager",)),
        ("removed-device", "serve", ("--device", "cpu")),
        ("bool-value", "serve", ("--enable-chunked-prefill", "true")),
        ("bool-value-joined", "module", ("--enable-chunked-prefill=true",)),
        ("command", "command", ("--max-context", "8192")),
        ("command-ambiguous", "command", ("--max-num", "8")),
        ("ambiguous", "serve", ("--max-num", "8")),
        ("wrong-choice", "serve", ("--kv-cache-dtype", "fp9")),
        ("wrong-choice-dtype", "module", ("--dtype", "float17")),
        ("not-a-number", "serve", ("--max-model-len", "many")),
        ("no-value", "serve", ("--served-model-name",)),
        ("typo", "serve", ("--max-model-length", "1024")))),
    case("unknown", "no-such-reasoning-parser", settings=flags(reasoning_parser="gemma9")),
    case("unknown", "no-such-tool-parser",
         settings=flags(tool_call_parser="gemma9", enable_auto_tool_choice=True)),
    case("gemma4-transformers-515", "text", "gemma4_text"),
    case("fp16-refused", "gemma2", "gemma2", settings=flags(dtype="float16")),
    case("fp16-refused", "gemma2-module", "gemma2", settings=flags(dtype="half"), entry="module"),
    case("fp16-refused", "gemma3", "gemma3_text", settings=flags(dtype="half")),
)  # fmt: skip

MEMORY = (
    case("kv-none", "bytes-0", settings=flags(kv_cache_memory_bytes="0")),
    case("kv-none", "low-utilization", settings=flags(
        kv_cache_memory_bytes=False, gpu_memory_utilization="0.01")),
    case("kv-too-small", "gemma", settings=flags(
        kv_cache_memory_bytes="500K", max_model_len="2048")),
    case("kv-too-small", "gemma-module", entry="module", settings=flags(
        kv_cache_memory_bytes="500K", max_model_len="2048")),
    case("kv-too-small", "gemma2", "gemma2", settings=flags(
        kv_cache_memory_bytes="1M", max_model_len="4096")),
    case("kv-too-small", "gemma3", "gemma3_text", settings=flags(
        kv_cache_memory_bytes="1M", max_model_len="8192")),
    case("kv-too-small", "gemma4", "gemma4_text", settings=flags(
        kv_cache_memory_bytes="1M", max_model_len="8192")),
    case("kv-none", "no-length-fits", settings=flags(
        kv_cache_memory_bytes="1000", max_model_len="2048")),
    case("kv-too-small", "gemma-gigabytes", tiny("gemma", LARGE_KV), settings=DUMMY.changed(flags(
        kv_cache_memory_bytes="256M", max_model_len="131072"))),
    case("kv-too-small", "gemma3-gigabytes", tiny("gemma3_text", LARGE_KV),
         settings=DUMMY.changed(flags(kv_cache_memory_bytes="256M", max_model_len="131072"))),
    case("autofit-none", "gemma", settings=flags(
        kv_cache_memory_bytes="1000", max_model_len="auto")),
    case("autofit-none", "gemma3", "gemma3_text", settings=flags(
        kv_cache_memory_bytes="1000", max_model_len="-1")),
    case("cpu-memory-busy", "serve", settings=flags(
        kv_cache_memory_bytes=False, gpu_memory_utilization="0.99")),
    case("cpu-memory-busy", "module", entry="module", settings=flags(
        kv_cache_memory_bytes=False, gpu_memory_utilization="0.99")),
    case("cpu-memory-busy", "explicit", settings=flags(kv_cache_memory_bytes="4T")),
    case("cpu-memory-busy", "kvcache-space", settings=Settings(
        {"--kv-cache-memory-bytes": False}, {"VLLM_CPU_KVCACHE_SPACE": "4000"})),
    case("healthy", "leader-killed-for-memory", around=memory_limit("900M"), alone=True),
    case("engine-killed", "for-memory", around=memory_limit("3000M"), alone=True,
         settings=flags(kv_cache_memory_bytes="8G")),
    case("shm-small", "one-process", around=small_disk("/dev/shm", "64k")),
    case("shm-small", "two-workers", around=small_disk("/dev/shm", "1m"),
         settings=flags(tensor_parallel_size="2")),
    case("shm-small", "two-workers-large", around=small_disk("/dev/shm", "64m"),
         settings=flags(tensor_parallel_size="2")),
)  # fmt: skip

FILES = (
    case("weights-truncated", "half", tiny("gemma", cut(SAFETENSORS, 0.5))),
    case("weights-truncated", "half-module", tiny("gemma3_text", cut(SAFETENSORS, 0.9)),
         entry="module"),
    case("weights-truncated", "header", tiny("gemma2", cut(SAFETENSORS, 200))),
    case("weights-truncated", "empty", tiny("gemma", written(SAFETENSORS, ""))),
    case("weights-truncated", "lfs-pointer", tiny("gemma", written(SAFETENSORS, POINTER))),
    case("weights-missing", "none", tiny("gemma", without(SAFETENSORS))),
    case("weights-missing", "none-module", tiny("gemma3_text", without(SAFETENSORS)),
         entry="module"),
    case("weights-missing", "shard", tiny("gemma", sharded)),
    case("weights-missing", "class-with-another-head", tiny(
        "gemma3_text", config(architectures=["ShieldGemma2ForImageClassification"]))),
    case("unknown", "tensor-of-another-name", tiny("gemma", fewer_tensors)),
    case("repo-not-found", "tokenizer", settings=flags(tokenizer="/models/tokenizer")),
    case("repo-not-found", "tokenizer-module", "gemma3_text", entry="module",
         settings=flags(tokenizer="/models/tokenizer")),
    case("unknown", "tokenizer-mode", tiny("gemma", without("tokenizer.json")),
         settings=flags(tokenizer_mode="slow")),
    case("tokenizer-missing", "truncated", tiny("gemma", cut("tokenizer.json", 0.5))),
    case("tokenizer-missing", "lfs-pointer", tiny("gemma", written("tokenizer.json", POINTER))),
    case("unknown", "config-truncated", tiny("gemma", cut("config.json", 0.5))),
    case("unknown", "shapes", tiny("gemma", config(hidden_size=128))),
    case("unknown", "layers", tiny("gemma", config(num_hidden_layers=2))),
)  # fmt: skip

START = (
    case("tp-heads", "serve", settings=flags(tensor_parallel_size="3")),
    case("tp-heads", "module", "gemma3_text", entry="module",
         settings=flags(tensor_parallel_size="3")),
    case("len-over-derived", "gemma", settings=flags(max_model_len="32768")),
    case("len-over-derived", "gemma-module", settings=flags(max_model_len="32k"), entry="module"),
    case("len-over-derived", "gemma2", "gemma2", settings=flags(max_model_len="8192")),
    case("len-over-derived", "gemma3", "gemma3_text", settings=flags(max_model_len="131072")),
    case("port-in-use", "serve", settings=flags(port="taken")),
    case("port-in-use", "module", entry="module", settings=flags(port="taken")),
    case("port-in-use", "all-addresses", settings=flags(port="taken", host="0.0.0.0")),
    case("unknown", "no-such-address", settings=flags(host="192.0.2.99")),
    case("mm-batch-too-small", "gemma3", IMAGES, prepare=any_torchvision,
         settings=DUMMY.changed(flags(
             max_num_batched_tokens="64", disable_chunked_mm_input=True))),
    case("healthy", "images", IMAGES, settings=DUMMY, prepare=any_torchvision,
         meanwhile=(until(READY), COMPLETE, *STOPPED)),
    case("ready-timeout", "serve", settings=Settings(env={"VLLM_ENGINE_READY_TIMEOUT_S": "0"})),
    case("no-gpu-visible", "serve", prepare=for_gpus),
    case("no-gpu-visible", "module", entry="module", prepare=for_gpus),
    *(case("engine-killed", f"{role.lower()}-{name}-loading", meanwhile=(
        until(LOADING), send(role, signum), ended))
      for role, name, signum in (("EngineCore", "sigkill", KILL), ("EngineCore", "sigsegv", SEGV),
                                 ("Worker", "sigkill", KILL), ("Worker", "sigsegv", SEGV))),
    # Nobody is left to say a word: the log looks like one of an engine that runs.
    case("healthy", "leader-sigkill-loading", meanwhile=(
        until(LOADING), send("leader", KILL), ended)),
    case("healthy", "leader-sigkill-ready", meanwhile=(
        until(READY), COMPLETE, pause(1), send("leader", KILL), pause(8), ended)),
    case("engine-killed", "enginecore-sigkill-imports", meanwhile=(send_first_child(KILL), ended)),
    *(case("engine-killed", f"{role.lower()}-{name}-ready", meanwhile=(
        until(READY), COMPLETE, pause(1), send(role, signum), pause(8), ended))
      for role, name, signum in (("EngineCore", "sigkill", KILL), ("EngineCore", "sigsegv", SEGV),
                                 ("EngineCore", "sigterm", TERM),
                                 ("Worker", "sigkill", KILL), ("Worker", "sigsegv", SEGV),
                                 ("leader", "sigsegv", SEGV))),
    case("engine-killed", "enginecore-sigkill-busy", entry="module", meanwhile=(
        until(READY), begin("completions", **LONG), pause(1), send("EngineCore", KILL), ended)),
    case("engine-killed", "worker-sigkill-busy", meanwhile=(
        until(READY), begin("completions", **LONG), pause(1), send("Worker", KILL), ended)),
)  # fmt: skip

COMPILE = (
    case("healthy", "compiled-again", settings=COMPILED, place="compiled",
         prepare=spoilt_cache(emptied("."), COMPILED),
         meanwhile=(until(READY), COMPLETE, *STOPPED)),
    *(case("compile-cache", variant, settings=COMPILED_IN_PARTS, place="compiled",
           prepare=spoilt_cache(spoil, COMPILED_IN_PARTS))
      for variant, spoil in (
          ("emptied", emptied(".")),
          ("halved", halved(".")),
          ("scrambled", scrambled(".")),
          ("index-scrambled", scrambled(r"vllm_compile_cache\.py$")),
          ("libraries-emptied", emptied(r"\.so$")),
          ("libraries-scrambled", scrambled(r"\.so$")),
          ("inductor-removed", removed("inductor_cache")))),
    case("python-headers", "no-compiler", settings=COMPILED.changed(Settings(
        env={"CXX": "/nonexistent/g++", "CC": "/nonexistent/gcc"}))),
    case("unknown", "no-lscpu", settings=COMPILED.changed(Settings(
        env={"PATH": "{venv}/bin"}))),
    case("python-headers", "no-headers", settings=COMPILED,
         around=('mount -t tmpfs tmpfs "$PYTHON_HEADERS"',)),
    case("python-headers", "compiler-fails", settings=COMPILED.changed(Settings(
        env={"CXX": "/bin/false"}))),
)  # fmt: skip

UNKNOWN = (
    case("unknown", "command-without-distribution", entry="bare"),
    case("flag-unknown", "bad-json", words=("--compilation-config", "{mode: 3")),
    case("flag-unknown", "bad-json-key", words=("--compilation-config", '{"modes": 3}')),
    case("unknown", "quantization-name", settings=flags(quantization="int3")),
    case("unknown", "quantization-of-others", settings=flags(quantization="awq")),
    case("unknown", "logging-level", settings=Settings(env={"VLLM_LOGGING_LEVEL": "LOUD"})),
    case("unknown", "variable-number", settings=Settings(
        {"--kv-cache-memory-bytes": False}, {"VLLM_CPU_KVCACHE_SPACE": "much"})),
    case("unknown", "variable-timeout", settings=Settings(
        env={"VLLM_ENGINE_READY_TIMEOUT_S": "long"})),
    case("unknown", "thread-binding", settings=Settings(
        env={"VLLM_CPU_OMP_THREADS_BIND": "all-of-them"})),
    case("unknown", "template-missing", settings=flags(chat_template="/models/template.jinja")),
    case("unknown", "batch-below-sequences", settings=flags(
        max_num_batched_tokens="4", max_num_seqs="8")),
    case("unknown", "adapter-missing", settings=flags(
        enable_lora=True, lora_modules="a=/models/adapter")),
    case("unknown", "hf-overrides", settings=flags(hf_overrides='{"num_hidden_layers": "four"}')),
    case("unknown", "load-raises", prepare=on_import(
        "vllm.model_executor.model_loader.default_loader",
        "def after(module):\n"
        "    def load_weights(self, *args, **kwargs):\n"
        "        raise RuntimeError('the moon is in the wrong phase')\n"
        "    module.DefaultModelLoader.load_weights = load_weights\n")),
    case("unknown", "forward-raises-ready", prepare=on_import(
        "vllm.model_executor.models.gemma",
        "def after(module):\n"
        "    def forward(self, *args, **kwargs):\n"
        "        raise RuntimeError('the tide is out')\n"
        "    module.GemmaMLP.forward = forward\n"),
        meanwhile=(until(READY), begin("completions", **LONG), ended)),
    case("engine-killed", "exit-without-a-word", prepare=on_import(
        "vllm.model_executor.models.gemma",
        "def before():\n    import os\n    os._exit(7)\n"
        "import sys\nif 'registry' in ' '.join(sys.argv):\n    before = lambda: None\n")),
)  # fmt: skip

HEALTHY = (
    case("healthy", "serve", meanwhile=(until(READY), COMPLETE, CHAT, *STOPPED)),
    case("healthy", "module", entry="module", meanwhile=(until(READY), COMPLETE, *STOPPED)),
    *(case("healthy", model.replace("_", "-"), model, meanwhile=(until(READY), COMPLETE, *STOPPED))
      for model in ("gemma2", "gemma3_text", "gemma3n_text", "gemma4_text", "vaultgemma")),
    case("healthy", "compiled", settings=COMPILED, meanwhile=(until(READY), COMPLETE, *STOPPED)),
    case("healthy", "interrupted", meanwhile=(
        until(READY), COMPLETE, send("leader", INT), ended)),
    case("healthy", "still-running", meanwhile=(until(READY), COMPLETE, pause(12), killed)),
    case("healthy", "stop-with-requests", meanwhile=(
        until(READY), begin("completions", **LONG), begin("completions", **LONG), pause(1),
        *STOPPED)),
    case("healthy", "interrupt-with-requests", entry="module", meanwhile=(
        until(READY), begin("completions", **LONG), pause(1), send("leader", INT), ended)),
    case("healthy", "stop-while-loading", meanwhile=(until(LOADING), *STOPPED)),
    case("healthy", "interrupt-while-loading", meanwhile=(
        until(LOADING), send("leader", INT), ended)),
    case("healthy", "stop-before-the-core", meanwhile=(until("non-default args"), *STOPPED)),
    case("healthy", "stop-while-the-core-starts", meanwhile=(
        until("Initializing a V1 LLM engine"), *STOPPED)),
    case("healthy", "debug", settings=Settings(env={"VLLM_LOGGING_LEVEL": "DEBUG"}),
         meanwhile=(until(READY), COMPLETE, *STOPPED)),
    case("healthy", "colours", settings=Settings(env={"VLLM_LOGGING_COLOR": "1"}),
         meanwhile=(until(READY), COMPLETE, *STOPPED)),
    case("healthy", "warnings", tiny("gemma", without("generation_config.json")),
         settings=Settings({"--max-num-batched-tokens": "512", "--seed": "1"},
                           {"VLLM_NO_SUCH_THING": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
                            "PYTHONWARNINGS": "always"}),
         meanwhile=(until(READY), COMPLETE, *STOPPED)),
    case("healthy", "from-the-hub", named(GATED), hub=gated_hub, token="ACCEPTED",
         meanwhile=(until(READY), COMPLETE, *STOPPED)),
    case("alternate-roles", "among-others", refused=REFUSED, meanwhile=STOPPED),
    case("healthy", "parsers-of-gemma-4", "gemma3_text", settings=flags(
        reasoning_parser="gemma4", tool_call_parser="gemma4", enable_auto_tool_choice=True),
        meanwhile=(until(READY), COMPLETE, CHAT, *STOPPED)),
    case("healthy", "without-tokenizer", tiny(
        "gemma", without("tokenizer.json", "tokenizer_config.json")), meanwhile=STOPPED, refused=(
        Refused("no-chat-template", "no-tokenizer", {"messages": [_user("Hello!")]}),)),
    case("healthy", "base-model", BASE_MODEL, meanwhile=STOPPED, refused=(
        Refused("no-chat-template", "base", {"messages": [_user("Hello!")]}),)),
)  # fmt: skip

CASES: tuple[Case, ...] = (
    *ACCESS, *VERSIONS, *MEMORY, *FILES, *START, *COMPILE, *UNKNOWN, *HEALTHY,
)  # fmt: skip


# Running one.


@contextmanager
def taken_port() -> Iterator[int]:
    """A port on which somebody else listens."""
    with socket.socket() as server:
        server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield server.getsockname()[1]


def free_port() -> int:
    """A port on which nobody listens."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


def command(case: Case, settings: Settings, place: Place, model: str) -> list[str]:
    """The server's argv, within its sandbox."""
    given: list[str] = []
    for flag, value in settings.flags.items():
        if value is not False:
            given += [flag] if value is True else [flag, str(value)]
    module = ["vllm.entrypoints.cli.main", "serve", model]
    if case.entry == "module":
        module = ["vllm.entrypoints.openai.api_server", "--model", model]
    argv = [str(place.python), "-m", *module, *given, *case.words]
    if case.entry == "command":
        argv = [str(place.python.parent / "vllm"), "serve", model, *given, *case.words]
    if not case.around:
        return argv
    first = " && ".join(case.around)
    script = f'{{ {first} ; }} || exit {NO_SANDBOX}; exec "$@"'
    return ["unshare", "-rm", "bash", "-c", script, "bash", *argv]


def environment(case: Case, settings: Settings, place: Place, hub_url: str) -> dict[str, str]:
    """All variables of the engine: nothing of this shell's but where programs are."""
    token = getattr(from_tests("demo_hub"), case.token) if case.token else None
    values = {
        "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
        "HOME": str(place.home),
        "TMPDIR": str(place.temporary),
        "USER": "user",
        "LOGNAME": "user",
        "LANG": "C.UTF-8",
        "PYTHONPATH": str(place.plugins),
        "PYTHON_HEADERS": str(python_headers(place.python)),
        **from_tests("local_hub").environ(hub_url, place.hub_home, token),
        **settings.env,
    }
    names = {"home": str(place.home), "venv": str(place.python.parent.parent)}
    return {name: _filled(value, names) for name, value in values.items()}


def _filled(value: str, names: Mapping[str, str]) -> str:
    for name, path in names.items():
        value = value.replace(f"{{{name}}}", path)
    return value


@cache
def python_headers(python: Path) -> str:
    """Where the headers of an interpreter are."""
    return _told(python, "import sysconfig; print(sysconfig.get_path('include'))")


@cache
def base_prefix(python: Path) -> str:
    """Where the interpreter below a virtual environment is."""
    return _told(python, "import sys; print(sys.base_prefix)")


@cache
def engine_name(python: Path) -> str:
    """The engine's distribution and version."""
    return _told(
        python,
        "from importlib.metadata import distributions as d\n"
        "print(next(f'{x.name}-{x.version}' for x in d() if x.name in ('vllm', 'vllm-cpu')))",
    )


def _told(python: Path, code: str) -> str:
    done = subprocess.run([str(python), "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.strip()


def run(case: Case, place: Place, log: Path) -> tuple[int, list[str]]:
    """Start it, do what is to be done meanwhile, end it; its exit status and the refusals' logs.

    Raises NotProvokedError.
    """
    for folder in (place.home, place.temporary, place.models, place.hub_home):
        folder.mkdir(parents=True, exist_ok=True)
    share_inspections(place)
    model = case.model(place)
    if case.entry in ("serve", "command"):
        as_vllm(place)
    settings = SMALL.changed(case.settings)
    with ExitStack() as stack:
        hub_url = "http://127.0.0.1:9"
        if case.hub is not None:
            hub_url = stack.enter_context(from_tests("local_hub").serving(case.hub())).url
        taken = settings.flags.get("--port") == "taken"
        port = stack.enter_context(taken_port() if taken else nullcontext(free_port()))
        settings = settings.changed(flags(port=str(port)))
        argv = command(case, settings, place, model)
        engine = Engine(argv, environment(case, settings, place, hub_url), place.home, log)
        stack.callback(remove_cgroup, engine.popen.pid)
        stack.callback(engine.close)
        refused = [_refused(engine, each) for each in case.refused]
        for act in case.meanwhile:
            act(engine)
        if not case.meanwhile:
            engine.end_by_itself()
        if engine.popen.poll() == NO_SANDBOX:
            raise NotProvokedError("its sandbox cannot be had here")
        status = engine.popen.poll()
    return (engine.popen.returncode if status is None else status), refused


def _refused(engine: Engine, request: Refused) -> str:
    """What the engine printed until it was ready and about this request, and its answer.

    Empty if the request is not refused.
    """
    engine.wait_for(READY)
    start = engine.text().split(READY)[0] + READY + ".\n"
    before = len(engine.text())
    status, answer = engine.post(request.path, request.body)
    if status == 200:
        return ""
    if status == 0:
        raise NotProvokedError(f"{request.id}.{request.variant}: {answer}")
    # The access line may come after the answer.
    time.sleep(0.5)
    said = engine.text()[before:]
    return f"{start}{said}[answer to POST /v1/{request.path}] {status} {answer}\n"


def scrubbed(text: str, place: Place) -> str:
    """The text with neutral names for what is this machine's, and else the same."""
    venv = place.python.parent.parent
    names = {
        str(place.models): "/models",
        str(place.home): "/home/user",
        str(place.temporary): "/tmp",
        str(place.folder): "/tmp",
        str(venv): "/opt/venv",
        str(venv.resolve()): "/opt/venv",
        base_prefix(place.python): "/usr/local",
        str(ROOT): "/opt/gemma-serve",
        str(Path.home()): "/home/user",
        socket.gethostname(): "host",
    }
    for name in sorted((n for n in names if len(n) > 1), key=len, reverse=True):
        # Two processes may print into one line: nothing need stand before a path.
        before = "" if name.startswith("/") else r"(?<![\w.-])"
        text = re.sub(rf"{before}{re.escape(name)}(?!\w)", names[name], text)
    address = r"(?<![\w.])(?!127\.|0\.0\.0\.0|192\.0\.2\.)(?:\d{1,3}\.){3}\d{1,3}(?![\w.])"
    return re.sub(address, "192.0.2.2", text)


def shortened(text: str) -> str:
    """The text, without its middle if it is very long."""
    if len(text) <= LARGEST_LOG:
        return text
    half = LARGEST_LOG // 2
    start, end = text[:half].rpartition("\n")[0], text[-half:].partition("\n")[2]
    left = text[len(start) : len(text) - len(end)].count("\n")
    return f"{start}\n[failure_lab: {left} lines are left out here]\n{end}"


@dataclass(frozen=True)
class Lab:
    """An engine, and where its logs go."""

    python: Path
    engine: str
    out: Path
    work: Path
    torchvision: Path | None

    def try_in_turn(self, cases: Sequence[Case]) -> list[bool]:
        """Run cases one after the other."""
        return [self.try_case(case) for case in cases]

    def try_case(self, case: Case) -> bool:
        """Run a case and keep its logs; whether it was provoked."""
        name = f"{case.id}.{case.variant}"
        place = Place(
            self.work / (case.place or name),
            self.python,
            self.work / "checkpoints",
            self.torchvision,
        )
        shutil.rmtree(place.folder, ignore_errors=True)
        place.folder.mkdir(parents=True)
        begun = time.monotonic()
        try:
            if case.prepare is not None:
                case.prepare(place)
            status, refused = run(case, place, place.folder / "log")
        except (NotProvokedError, subprocess.CalledProcessError) as error:
            print(f"NOT PROVOKED {name}: {error}", flush=True)
            self.set_aside(place, name)
            return False
        text = scrubbed((place.folder / "log").read_bytes().decode(errors="replace"), place)
        self.keep(name, text)
        for request, said in zip(case.refused, refused, strict=True):
            if said:
                self.keep(f"{request.id}.{request.variant}", scrubbed(said, place))
            else:
                print(f"NOT PROVOKED {request.id}.{request.variant}: it was answered", flush=True)
        last = next((line for line in reversed(text.splitlines()) if line.strip()), "")
        seconds = time.monotonic() - begun
        print(f"{name}: exit {status}, {seconds:.0f} s, {len(text)} B: {last[:160]}", flush=True)
        shutil.rmtree(place.folder, ignore_errors=True)
        return all(refused)

    def set_aside(self, place: Place, name: str) -> None:
        """Keep the log of a case that was not provoked, for whoever mends the case."""
        with suppress(FileNotFoundError):
            text = (place.folder / "log").read_bytes().decode(errors="replace")
            folder = Path(tempfile.gettempdir()) / "failure-lab-not-provoked"
            folder.mkdir(exist_ok=True)
            (folder / f"{name}.{self.engine}.log").write_text(text)

    def keep(self, name: str, text: str) -> None:
        """Write a log."""
        (self.out / f"{name}.{self.engine}.log").write_text(shortened(text))


def chosen(only: Sequence[str]) -> list[Case]:
    """The cases of these failures, or ID.VARIANT; all, if none is named."""
    return [
        each
        for each in CASES
        if not only or each.ids & set(only) or f"{each.id}.{each.variant}" in only
    ]


def lanes(cases: Sequence[Case]) -> list[list[Case]]:
    """The cases that are to run one after the other; those with a place of their own are alone."""
    found: dict[str, list[Case]] = {}
    for each in cases:
        found.setdefault(each.place or f"{each.id}.{each.variant}", []).append(each)
    return list(found.values())


def main() -> int:
    """Provoke the failures and keep the logs."""
    parser = argparse.ArgumentParser(description="Provoke failures of a real engine.")
    parser.add_argument("--engine-python", type=Path, default=Path(sys.executable))
    parser.add_argument("--out", type=Path, default=LOGS, help="where the logs go")
    parser.add_argument("--only", default="", help="ids, or ID.VARIANT, with commas between")
    parser.add_argument("--torchvision", type=Path, help="a folder that has one, of any build")
    parser.add_argument("--list", action="store_true", help="name the cases and do nothing")
    parser.add_argument("--jobs", type=int, default=2, help="how many engines at a time")
    args = parser.parse_args()
    cases = chosen([each for each in args.only.split(",") if each])
    if args.list:
        for each in cases:
            more = "".join(f" {refused.id}.{refused.variant}" for refused in each.refused)
            print(f"{each.id}.{each.variant}{more}")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    # A shell's background job ignores SIGINT, and so would the engines.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # Not resolved: the link's folder is the virtual environment's.
    python = args.engine_python.absolute()
    with tempfile.TemporaryDirectory(prefix="failure-lab-") as work:
        lab = Lab(python, engine_name(python), args.out, Path(work), args.torchvision)
        subprocess.run(
            [str(python), str(ROOT / "tests" / "tiny_models.py"), f"{work}/checkpoints"],
            check=True,
            capture_output=True,
        )
        with ThreadPoolExecutor(args.jobs) as pool:
            together = [each for each in cases if not each.alone]
            provoked = [
                each for done in pool.map(lab.try_in_turn, lanes(together)) for each in done
            ]
        provoked += lab.try_in_turn([each for each in cases if each.alone])
    return 0 if all(provoked) else 1


if __name__ == "__main__":
    raise SystemExit(main())
