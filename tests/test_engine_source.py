"""The flags that are read from vLLM's source, against its own parser."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from gemma_serve.adapters.engine_source import read_serve_flags
from gemma_serve.planning.engine_arguments import unknown_flags
from test_engine_arguments import ARGUMENTS

# Run by the engine's interpreter: every flag of the server's parser, and whether it refuses each
# of some command lines for a flag.
CHILD = """
import contextlib, io, json, re, sys
from vllm.utils.argparse_utils import FlexibleArgumentParser
try:
    from vllm.entrypoints.launchers.cli_args import make_arg_parser
except ImportError:
    from vllm.entrypoints.openai.cli_args import make_arg_parser

parser = make_arg_parser(FlexibleArgumentParser())
parser.print_usage = lambda file: None  # takes a second with so many flags

def refuses(args):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.suppress(SystemExit):
        parser.parse_args(args)
    return re.search("unrecognized|ambiguous|ignored explicit", said.getvalue()) is not None

lines = json.load(sys.stdin)
print(json.dumps([sorted(parser._option_string_actions), [refuses(line) for line in lines]]))
"""

# Models of vLLM's own files, with each way to add a flag that its releases use.
SERVER = '''
@config
class BaseFrontendArgs:
    chat_template: str | None = None
    """Words of several lines,
at the left edge."""
    lora_modules: Annotated[list[str] | None, "words"] = None

    @classmethod
    def add_cli_args(cls, parser):
        frontend_kwargs = get_kwargs(cls)
        frontend_kwargs = cls._customize_cli_kwargs(frontend_kwargs)
        for key, value in frontend_kwargs.items():
            extra_flags = value.pop("flags", [])
            group.add_argument(*extra_flags, f"--{key.replace('_', '-')}", **value)
        return parser

@config
class FrontendArgs(BaseFrontendArgs):
    api_key: list[str] | None = None
    log_error_stack: bool = envs.DEV_MODE

def make_arg_parser(parser: FlexibleArgumentParser) -> FlexibleArgumentParser:
    parser.add_argument("model_tag", nargs="?")
    parser.add_argument("--api-server-count", "-asc", type=int)
    parser = FrontendArgs.add_cli_args(parser)
    parser = AsyncEngineArgs.add_cli_args(parser)
    return parser

def validate(args):
    parser.add_argument("--never")
'''
ENGINE = """
def _compute_kwargs(cls):
    if type_hints == {bool, str, type(None)}:
        kwargs[name]["nargs"] = "?"

@dataclass
class EngineArgs:
    model: str = ModelConfig.model

    @staticmethod
    def add_cli_args(
        parser: FlexibleArgumentParser,
    ) -> FlexibleArgumentParser:
        model_kwargs = get_kwargs(ModelConfig)
        group = parser.add_argument_group(title="ModelConfig", description=ModelConfig.__doc__)
        if not "serve" in sys.argv:
            group.add_argument("--model", **model_kwargs["model"])
        group.add_argument("--enforce-eager", **model_kwargs["enforce_eager"])
        group.add_argument("--hf-token", **model_kwargs["hf_token"])
        group.add_argument("--prefix-caching", "-pc", **{**model_kwargs["caching"], "default": 1})
        group.add_argument("--inherited", **get_kwargs(ModelConfig)["inherited"])
        backend_kwargs = model_kwargs["backend"]
        group.add_argument("--backend", **backend_kwargs)
        group.add_argument("--elsewhere", **get_kwargs(Elsewhere)["elsewhere"])
        parser.add_argument("--plain", action="store_true")
        parser.add_argument("--switch", action=argparse.BooleanOptionalAction)
        return parser

    def create(self):
        parser.add_argument("--never-either")

class AsyncEngineArgs(EngineArgs):
    @staticmethod
    def add_cli_args(parser, async_args_only=False):
        load_general_plugins()
        if not async_args_only:
            parser = EngineArgs.add_cli_args(parser)
        parser.add_argument("--enable-log-requests", action=argparse.BooleanOptionalAction)
        current_platform.pre_register_and_update(parser)
        return parser
"""
CONFIG = """
class Base:
    inherited: SkipValidation[bool] = None

@config
class ModelConfig(Base):
    model: str = "x"
    enforce_eager: bool = False
    hf_token: bool | str | None = None
    caching: Optional[Union[bool, None]] = None

    def method(self) -> bool:
        return True

    backend: Literal["bool", "x"] = "x"
"""
FILLER = [f"filler{number}" for number in range(100)]
SWITCHES = ("log-error-stack", "enforce-eager", "prefix-caching", "inherited", "elsewhere")
PLAIN = ("chat-template", "lora-modules", "api-key", "api-server-count", "model", "hf-token")
PLAIN = (*PLAIN, "backend", "plain", "help", "config", *FILLER)
FLAGS = {
    *(f"--{name}" for name in (*PLAIN, *SWITCHES, "switch", "enable-log-requests")),
    *(f"--no-{name}" for name in (*SWITCHES, "switch", "enable-log-requests")),
    *("-h", "-asc", "-pc"),
}


def write_package(folder, server=SERVER, engine=ENGINE, filler=FILLER):
    fields = "".join(f"    {name}: int = 0\n" for name in filler)
    files = {
        "entrypoints/launchers/cli_args.py": server.replace("    api_key", f"{fields}    api_key"),
        "engine/arg_utils.py": engine,
        "config/model.py": CONFIG,
    }
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def test_every_way_to_add_a_flag_is_read(tmp_path):
    assert read_serve_flags(write_package(tmp_path)) == FLAGS


@pytest.mark.parametrize(
    "changed",
    [
        {"filler": ()},
        {"engine": ENGINE.replace('"--plain"', "NAME")},
        {"engine": ENGINE.replace("load_general_plugins()", "add_more(parser)")},
        {"engine": ENGINE.replace("group.add_argument(", "group.add_argument((", 1)},
        {"server": SERVER.replace("make_arg_parser", "make_parser")},
        {"server": SERVER.replace("AsyncEngineArgs.", "OtherArgs.")},
    ],
    ids=["too few", "computed", "another helper", "no Python", "no parser", "no class"],
)
def test_a_source_that_is_not_understood_has_no_flags(tmp_path, changed):
    assert read_serve_flags(write_package(tmp_path, **changed)) is None


def test_a_folder_without_the_files_has_no_flags(tmp_path):
    assert read_serve_flags(tmp_path) is None
    (write_package(tmp_path) / "engine" / "arg_utils.py").unlink()
    assert read_serve_flags(tmp_path) is None


@pytest.mark.engine
def test_the_installed_engine_takes_what_its_source_says():
    flags = read_serve_flags(Path(*find_spec("vllm").submodule_search_locations))
    lines = [args.split() for args, _ in ARGUMENTS]
    child = subprocess.run(
        [sys.executable, "-c", CHILD],
        input=json.dumps(lines),
        capture_output=True,
        text=True,
        check=True,
    )
    real, refused = json.loads(child.stdout.splitlines()[-1])
    assert flags == set(real)
    assert [bool(unknown_flags(line, flags)) for line in lines] == refused
