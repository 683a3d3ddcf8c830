"""The `flextok` command. Importing this file is cheap: each command imports what it needs."""

import importlib
import inspect
import os
import sys

import tyro

from flextok_jax import __version__
from flextok_jax.commands import options

# The extra of setup.py that brings a module, and its package where that has another name.
_EXTRAS = {
    "data": {"array_record": "", "grain": "", "tensorflow_datasets": "tensorflow-datasets"},
    "train": {"absl": "absl-py", "clu": "", "matplotlib": "", "ml_collections": "", "optax": "",
              "orbax": "orbax-checkpoint", "skimage": "scikit-image", "sklearn": "scikit-learn",
              "tensorboardX": ""},
}  # fmt: skip
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
        print("interrupted: no file is half-written", file=sys.stderr)
        return 130
    except Exception as error:
        message = _message(error)
        if message is None:
            raise
        print(f"error: {message}", file=sys.stderr)
        return 2


def _main(argv: list[str]) -> int:
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # A notebook's cannot.
            stream.reconfigure(errors="backslashreplace")  # Names of files may be any bytes.
    if argv == ["--version"]:
        print(f"flextok_jax {__version__}")
        return 0
    words, rest = " ".join(argv[:2]), argv[2:]  # "data check", or else the command is one word.
    if words not in options.COMMANDS:
        words, rest = "".join(argv[:1]), argv[1:]
    if words in ("", "-h", "--help") or (words == "data" and rest in ([], ["-h"], ["--help"])):
        print(_help())
        return 0
    if words not in options.COMMANDS:
        raise ValueError(f"no command {' '.join([words, *rest[:1]])!r}: flextok --help lists all")
    try:
        args = parse(words, rest)
    except SystemExit as end:  # After --help, or what was wrong.
        return end.code or 0
    if isinstance(args, options.Compute):
        importlib.import_module("flextok_jax.commands.common").announce(args)
    module, function = options.COMMANDS[words][1].split(":")
    getattr(importlib.import_module(f"flextok_jax.commands.{module}"), function)(args)
    return 0


def parse(words: str, argv: list[str]):
    """The options of a command, one of the classes of `options`. Exits after --help or an error."""
    cls = options.COMMANDS[words][0]
    return tyro.cli(
        cls,
        prog=f"flextok {words}",
        description=_description(cls),
        args=argv,
        config=(tyro.conf.FlagCreatePairsOff,),
    )


def _description(cls) -> str:
    """The docstring without empty lines. Indented lines stay lines; the parser joins others."""
    first, *rest = inspect.cleandoc(cls.__doc__).splitlines()
    return "\n".join([first, *(f"  {line}" for line in rest if line)])


def _help() -> str:
    return _HELP.format(
        commands="\n".join(
            f"  {words:<13}{inspect.cleandoc(cls.__doc__).splitlines()[0]}"
            for words, (cls, _) in options.COMMANDS.items()
        )
    )


def _message(error: Exception) -> str | None:
    """What to print for a person; None: a bug, whose traceback is wanted."""
    if isinstance(error, ModuleNotFoundError):
        module = (error.name or "").partition(".")[0]
        if module == "flextok_jax":
            return None
        for extra, packages in _EXTRAS.items():
            if module in packages:
                package = packages[module] or module
                return (
                    f"this needs {package}: pip install {package}, or all that belongs to it: "
                    f"pip install -e '.[{extra}]'"
                )
        return f"this needs {module}: pip install {module}" if module else str(error)
    if "RESOURCE_EXHAUSTED" in str(error):
        reason = str(error).splitlines()[0]
        return f"out of memory: try a smaller --batch-size, or --dtype bfloat16 ({reason})"
    checkpoint = sys.modules.get("flextok_jax.io.checkpoint")  # Imports orbax: maybe absent.
    known = (ValueError, OSError, *([checkpoint.WorkdirError] if checkpoint else []))
    return str(error) if isinstance(error, known) else None


if __name__ == "__main__":
    run()
