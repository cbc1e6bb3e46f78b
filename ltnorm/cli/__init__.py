"""The command line: each command parses, calls, prints, and ends with an exit code.

Commands import what they need when they run, so that `--help`, `list`, `prepare` and `compare`
never load torch.
"""

import importlib
import io
import os
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Annotated

import typer

from ltnorm import __version__
from ltnorm.cli.signals import Terminated, terminable
from ltnorm.cli.start import uncollected
from ltnorm.console import Output
from ltnorm.errors import LtnormError, UsageError
from ltnorm.launch import place

# In the order of `--help`; the modules whose `command` they are.
COMMANDS = {
    "prepare": "prepare",
    "train": "train",
    "sweep": "sweep",
    "retrain": "retrain",
    "eval": "evaluate",
    "export": "export",
    "inspect": "inspect",
    "compare": "compare",
    "runs": "runs",
    "diff": "diff",
    "bench": "bench",
    "list": "catalogue",
}
# Those that end within a second, most of which are imports.
SHORT = ("--help", "compare", "list", "runs", "diff")


def _app(arguments: Sequence[str]) -> typer.Typer:
    """The command that is asked for, or else all: each takes its time to import and to build."""
    app = typer.Typer(
        name="ltnorm",
        help="Does the choice of normalization layer help the rare classes?",
        no_args_is_help=True,
        rich_markup_mode=None,  # rich help would import a markdown parser: half the start-up time
        pretty_exceptions_enable=False,
        callback=_root,
    )
    asked = [name for name in arguments[:1] if name in COMMANDS]
    for name in asked or COMMANDS:
        app.command(name)(importlib.import_module(f"ltnorm.cli.{COMMANDS[name]}").command)
    return app


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"ltnorm {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    0 success, 1 the run failed, 2 usage, 3 nothing found, 130 Ctrl-C, 143 SIGTERM. An expected
    failure prints one `error:` and one `hint:` line; LTNORM_DEBUG=1 adds the traceback.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not every terminal can show a delta
            stream.reconfigure(errors="replace")
    # Recipes need no plugins of pydantic, for which it would search all that is installed.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    try:
        arguments = sys.argv[1:] if arguments is None else list(arguments)
        _check_launch(arguments)
        short = bool(arguments) and arguments[0] in SHORT
        with terminable(), uncollected() if short else nullcontext():
            code = _app(arguments)(args=arguments, prog_name="ltnorm", standalone_mode=False)
        if code == 130:  # typer's answer to Ctrl-C
            return _fail("interrupted", "nothing that was finished is lost; type it again", 130)
        return code if isinstance(code, int) else 0
    except Terminated:
        return _fail("terminated", "nothing that was finished is lost; type it again", 143)
    except LtnormError as error:
        return _fail(error.message, error.hint, error.exit_code)
    except BrokenPipeError:
        # The reader of a pipe has gone, `| head` say. Nothing more can be said on stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        what = f"{error.filename}: " if error.filename else ""
        reason = error.strerror or str(error)
        return _fail(what + reason, "check that the files can be read and the folders written", 1)
    except MemoryError:
        return _fail("out of memory", "try a smaller --batch-size or --model", 1)
    except Exception as error:
        # Typer's own usage errors, told by what they offer: its click is vendored and private.
        if not hasattr(error, "format_message"):
            raise
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message())
            return 0
        message = error.format_message().rstrip(".")
        return _fail(message[:1].lower() + message[1:], _usage_hint(error), 2)


def _check_launch(arguments: Sequence[str]) -> None:
    if place() and arguments and arguments[0] != "train":
        raise UsageError(
            f"torchrun starts several processes, and `{arguments[0]}` is the work of one",
            "start it without torchrun, which is for `train`",
        )


def _usage_hint(error: Exception) -> str:
    context = getattr(error, "ctx", None)
    path = context.command_path if context else "ltnorm"
    return f"`{path} --help` lists what it takes"


def _fail(message: str, hint: str, code: int) -> int:
    if os.environ.get("LTNORM_DEBUG") == "1":
        import traceback

        traceback.print_exc()
    err = Output().err
    for kind, text in (("error", message), ("hint", hint)):
        err.print(f"{kind}: {' '.join(text.split())}", markup=False, soft_wrap=True)
    return code
