"""The `flextok` command. Importing this file is cheap: each command imports what it needs."""

import importlib
import inspect
import os
import signal
import sys
import threading
import warnings

import tyro

from flextok_jax import __version__
from flextok_jax.commands import options
from flextok_jax.io import paths

_EXTRAS = {  # Of setup.py; what is not named here is of "train".
    "array_record": "data", "grain": "data", "tensorflow_datasets": "data", "gradio": "demo",
}  # fmt: skip
_INTERRUPTED = "interrupted: no file is half-written"
_HELP = """usage: flextok COMMAND [OPTIONS]

Images as ordered tokens: any first part of an image's tokens decodes to the
whole image; the more tokens, the closer.

commands:
{commands}

`flextok COMMAND --help` shows the options of a command. example:
  flextok reconstruct --model demo-digits --images FOLDER --limit 10 \\
      --out reconstructions"""


def run() -> None:
    """The entry point: `main`, then the end of the process."""
    signal.signal(signal.SIGINT, _interrupt)
    sys.unraisablehook = _unraisable
    warnings.showwarning = lambda message, *_: print(f"warning: {message}", file=sys.stderr)
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    if code:  # Device work may be in flight; an interpreter that shuts down under it crashes.
        os._exit(code)


def main(argv: list[str] | None = None) -> int:
    """Runs one command.

    Returns:
        The exit code: 0; 2 for what a person can mend, named on stderr; 130 after Ctrl-C.
    """
    try:
        return _main(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:
        print(_INTERRUPTED, file=sys.stderr)
        return 130
    except Exception as error:
        message = _message(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2


def _interrupt(*_) -> None:
    """Ctrl-C: an exception, and the end of the process if that does not arrive within 2 seconds.

    It may come during a long compilation, or be lost in a callback, whose exceptions are ignored.
    """
    end = threading.Timer(2, _leave)
    end.daemon = True
    end.start()
    raise KeyboardInterrupt


def _leave() -> None:
    if storage := sys.modules.get("flextok_jax.io.storage"):
        storage.discard_unfinished()
    print(_INTERRUPTED, file=sys.stderr, flush=True)
    os._exit(130)


def _unraisable(found) -> None:
    if not isinstance(found.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(found)


def _main(argv: list[str]) -> int:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # A notebook's cannot.
            stream.reconfigure(errors="backslashreplace")  # Names of files may be any bytes.
    words, rest = " ".join(argv[:2]), argv[2:]  # "data check", or else the command is one word.
    if words not in options.COMMANDS:
        words, rest = "".join(argv[:1]), argv[1:]
    if words == "--version":
        print(f"flextok_jax {__version__}")
    elif words in ("", "-h", "--help") or (words == "data" and rest in ([], ["-h"], ["--help"])):
        lines = [f"  {name:<13}{_doc(cls)[0]}" for name, (cls, _) in options.COMMANDS.items()]
        print(_HELP.format(commands="\n".join(lines)))
    elif words not in options.COMMANDS:
        raise ValueError(f"no command {' '.join([words, *rest[:1]])!r}: flextok --help lists all")
    else:
        try:
            args = parse(words, rest)
        except SystemExit as end:  # After --help, or what was wrong.
            return end.code or 0
        for value in vars(args).values():  # Before anything else: each store has its own errors.
            if isinstance(value, str) and value.startswith(paths.ADDRESSES):
                paths.reached(paths.as_path(value))
        if isinstance(args, options.Devices):
            importlib.import_module("flextok_jax.commands.common").announce(args)
        module, function = options.COMMANDS[words][1].split(":")
        getattr(importlib.import_module(f"flextok_jax.commands.{module}"), function)(args)
    return 0


def parse(words: str, argv: list[str]):
    """The options of a command, one of the classes of `options`. Exits after --help or an error."""
    cls = options.COMMANDS[words][0]
    first, *rest = _doc(cls)
    # Without empty lines. Indented lines stay lines; the parser joins others.
    description = "\n".join([first, *(f"  {line}" for line in rest if line)])
    config = (tyro.conf.FlagCreatePairsOff,)
    return tyro.cli(cls, prog=f"flextok {words}", description=description, args=argv, config=config)


def _doc(cls) -> list[str]:
    return inspect.cleandoc(cls.__doc__).splitlines()


def _message(error: Exception) -> str | None:
    """What to print for a person; None: a bug, whose traceback is wanted."""
    if isinstance(error, ModuleNotFoundError):
        module = (error.name or "").partition(".")[0]
        if module in ("", "flextok_jax"):
            return None if module else str(error)
        return f"this needs {module}: pip install -e '.[{_EXTRAS.get(module, 'train')}]'"
    if "RESOURCE_EXHAUSTED" in str(error):
        reason = str(error).splitlines()[0]
        return f"out of memory: try a smaller --batch-size, or --dtype bfloat16 ({reason})"
    return str(error) if isinstance(error, (ValueError, OSError)) else None


if __name__ == "__main__":
    run()
