"""The `gemma-serve` program: its commands, and the way from any error to an exit code."""

from __future__ import annotations

import io
import itertools
import os
import signal
import sys
import traceback
from collections.abc import Sequence
from types import FrameType
from typing import Annotated

import typer

from gemma_serve import __version__
from gemma_serve.cli.check import check
from gemma_serve.cli.check_access import check_access
from gemma_serve.cli.check_gpu import check_gpu
from gemma_serve.cli.deployments import list_, logs, restart, status, stop, supervise
from gemma_serve.cli.diagnose import diagnose
from gemma_serve.cli.download import download
from gemma_serve.cli.models import models
from gemma_serve.cli.plan import plan
from gemma_serve.cli.smoke_test import smoke_test
from gemma_serve.cli.up import up
from gemma_serve.errors import EXIT_NO, EXIT_OK, GemmaServeError, Stopped, UsageError

app = typer.Typer(
    name="gemma-serve",
    help="Serve Google's Gemma on your own machine with vLLM: one command, shown to work.",
    epilog="Exit codes: 0 done, 1 the answer is no, 2 wrong usage, 3 the engine failed.",
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("up")(up)
app.command("status")(status)
app.command("list")(list_)
app.command("logs")(logs)
app.command("stop")(stop)
app.command("restart")(restart)
app.command("diagnose")(diagnose)
app.command("supervise", hidden=True)(supervise)
app.command("plan")(plan)
app.command("check")(check)
app.command("check-access")(check_access)
app.command("check-gpu")(check_gpu)
app.command("download")(download)
app.command("models")(models)
app.command("smoke-test")(smoke_test)


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"gemma-serve {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")] = False,
) -> None:
    if debug:
        os.environ["GEMMA_SERVE_DEBUG"] = "1"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program and return its exit code; the only place that turns errors into one."""
    args = list(sys.argv[1:] if argv is None else argv) or ["--help"]
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # An answer may hold what the terminal's encoding lacks.
            stream.reconfigure(errors="backslashreplace")
    if os.getpid() == 1:
        # In a container, the kernel drops the signals that its first process doesn't handle.
        signal.signal(signal.SIGTERM, _stop)
    debug_before = os.environ.get("GEMMA_SERVE_DEBUG")
    try:
        return _run(args)
    except BrokenPipeError:
        _write_nowhere()
        return EXIT_NO
    finally:
        if debug_before is None:
            # `--debug` was for this run alone.
            os.environ.pop("GEMMA_SERVE_DEBUG", None)


def _stop(signum: int, frame: FrameType | None) -> None:
    raise Stopped(signum)


def _write_nowhere() -> None:
    """Whoever read our output has gone; without this, Python complains at its own end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _run(args: list[str]) -> int:
    try:
        code = app(args, prog_name="gemma-serve", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else EXIT_OK
    except GemmaServeError as error:
        return _end(args, error)
    except typer.TyperException as error:
        return _end(args, _usage_error(error, args))
    except (KeyboardInterrupt, typer.Abort):
        return _end(args, Stopped(signal.SIGINT))
    except BrokenPipeError:
        raise
    except Exception as error:
        return _end(args, _internal_error(error))


def _end(args: Sequence[str], error: GemmaServeError) -> int:
    """Report an error that ended a command, as the envelope where JSON was asked for."""
    if os.environ.get("GEMMA_SERVE_DEBUG"):
        from gemma_serve.adapters.secrets import without_secrets

        sys.stderr.write(without_secrets("".join(traceback.format_exception(error))))
    as_json = _wants_json(args)
    # Who asked us to stop knows it; a program that reads JSON still gets its last line.
    if as_json or not isinstance(error, Stopped):
        from gemma_serve.view.output import Output

        try:
            output = Output(as_json=as_json)
            output.result(_command(args), ok=False, data={}, problems=error.problems)
        except OSError:
            # The reader has gone, or the terminal was closed: the exit code still tells.
            _write_nowhere()
    return error.shell_code if isinstance(error, Stopped) else error.exit_code


def _wants_json(args: Sequence[str]) -> bool:
    """Whether the answer is read by a program, told from arguments that may not even parse."""
    pairs = itertools.pairwise(args)
    spelled = {"--format=json", "-fjson", "--json"} & set(args)
    return bool(spelled) or any(pair in (("-f", "json"), ("--format", "json")) for pair in pairs)


def _internal_error(error: Exception) -> GemmaServeError:
    """A fault of ours, told without the traceback that only helps us."""
    found = GemmaServeError(
        f"gemma-serve itself failed: {type(error).__name__}: {error}",
        code="internal",
        hint="`gemma-serve --debug ...` shows where; please report it with that",
    )
    found.__cause__ = error
    return found


def _usage_error(error: typer.TyperException, args: Sequence[str]) -> UsageError:
    text = error.format_message() if hasattr(error, "format_message") else str(error)
    text = text.replace("Value error, ", "")
    help_command = " ".join(filter(None, ["gemma-serve", _command(args), "--help"]))
    return UsageError(text.rstrip("."), code="usage", hint=f"see `{help_command}`")


def _command(args: Sequence[str]) -> str:
    names = {command.name for command in app.registered_commands}
    return next((arg for arg in args if arg in names), "")
