"""The command line: options -> one call -> print. torch, timm and h5py are imported inside the commands."""

import os
import signal
import sys
import threading
from typing import Annotated, Any, NoReturn

import typer

from distill_cli import __version__
from distill_cli.cli import bench, doctor, evaluate, models, quickstart, recipes, report, store, teacher_logits, train
from distill_cli.cli.output import emit
from distill_cli.errors import DistillError, Stopped

app = typer.Typer(
    name="distill",
    help="Knowledge distillation for vision: write a teacher's logits once, train students from them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("teacher-logits")(teacher_logits.command)
app.command("train")(train.command)
app.command("eval")(evaluate.command)
app.command("report")(report.command)
app.command("quickstart")(quickstart.command)
app.add_typer(store.app, name="store")
app.add_typer(recipes.app, name="recipes")
app.add_typer(models.app, name="models")
app.add_typer(bench.app, name="bench")
app.command("doctor")(doctor.command)

# The public way to typer's usage errors, whose module is its own affair.
_UsageError: Any = typer.BadParameter.__base__


def _version(wanted: bool) -> None:
    if wanted:
        emit(f"distill {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    pass


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line and exit by the codes of `errors.py`; an error is one line on stderr."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, _stop)
    threading.excepthook = _say_thread
    try:
        code = app(arguments, standalone_mode=False)
    except DistillError as error:
        _fail(str(error), error.exit_code)
    except _UsageError as error:
        if not error.format_message():
            # A group without a command has printed its help.
            sys.exit(error.exit_code)
        command = error.ctx.command_path if error.ctx else "distill"
        _fail(f'{error.format_message().rstrip(".")}; see "{command} --help"', error.exit_code)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _fail(f"{where}{(error.strerror or str(error)).lower()}{_advice(error)}", 1)
    except Exception as error:
        reason = " ".join(str(error).split())
        if "DataLoader worker" in reason:
            # torch says so by a signal, in whatever the main process is about.
            _fail(f"{reason} Run the same command again to go on", 1)
        _fail(f"unexpected {type(error).__name__}: {reason}; DISTILL_DEBUG=1 shows the traceback", 1)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str, code: int) -> NoReturn:
    if os.environ.get("DISTILL_DEBUG") == "1":
        import traceback

        traceback.print_exc()
    if code == 1 or os.environ.get("LOCAL_RANK", "0") == "0":
        # What all ranks find is said once a machine.
        rank = os.environ.get("RANK", "0")
        print(f"distill: {'' if rank == '0' else f'rank {rank}: '}{message}", file=sys.stderr, flush=True)
    sys.exit(code)


def _say_thread(ended: threading.ExceptHookArgs) -> None:
    """A thread of a library has ended by an error; where that matters the main thread meets it too."""
    if os.environ.get("DISTILL_DEBUG") == "1":
        threading.__excepthook__(ended)
    else:
        print(f"warning: a thread ended by {ended.exc_type.__name__}: {ended.exc_value}", file=sys.stderr, flush=True)


def _stop(number: int, _frame: object) -> None:
    raise Stopped(f"{signal.Signals(number).name}: stopped; the same command goes on", number)


def _advice(error: OSError) -> str:
    import errno

    return {
        errno.ENOSPC: "; free some space, or choose another --out, then run the same command again",
        errno.EDQUOT: "; free some of the quota, or choose another --out, then run the same command again",
        errno.EACCES: "; choose a folder that you may write to",
        errno.EROFS: "; choose a folder that you may write to",
    }.get(error.errno or 0, "")
