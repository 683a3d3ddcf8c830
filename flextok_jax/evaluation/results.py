"""Folders of results that appear whole, of runs that an interruption only pauses."""

import contextlib
import hashlib
import json
import os
import pathlib
import shutil
import sys
from collections.abc import Iterator

_JOURNAL = "journal.jsonl"


class Paused(KeyboardInterrupt):
    """Ctrl-C, after some results were finished; the message says how to go on."""


class Results:
    """Results on their way into a folder.

    Attributes:
        folder: where their files are written.
        records: {name: what is known of it} of all that is finished, also by a run before this one
            that was interrupted; values are what JSON makes of them.
    """

    def __init__(self, folder: pathlib.Path):
        self.folder = folder
        self.records: dict[str, dict] = {}
        self._journal = folder / _JOURNAL
        if self._journal.is_file():
            text = self._journal.read_text(encoding="utf-8")
            text = text[: text.rfind("\n") + 1]  # A killed run may have left half a line.
            self._journal.write_text(text, encoding="utf-8")
            for line in text.splitlines():
                self.records.update(json.loads(line))

    def add(self, records: dict[str, dict]) -> None:
        """Notes what is finished; call it when their files are written."""
        self.records.update(records)
        with self._journal.open("a", encoding="utf-8") as file:
            file.write(json.dumps(records) + "\n")


@contextlib.contextmanager
def results_folder(out, settings: dict) -> Iterator[Results]:
    """A hidden folder inside `out` to write into, whose content moves into `out` at the end.

    Files and folders of the same names are then replaced, others stay. Where the block fails, or
    the process is killed, before anything was finished, nothing remains; after that the hidden
    folder stays, and the next run with equal settings finds its records and its files.

    Args:
        settings: all that the results depend on, in JSON terms.

    Raises:
        ValueError: `out` is a file.
        Paused: for Ctrl-C, when there is something to go on from.
    """
    out = pathlib.Path(out).expanduser()
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file: pass a folder")
    made = not out.exists()
    identity = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    folder = out / f".partial-{identity[:16]}"
    for other in sorted(out.glob(".partial-*") if out.exists() else ()):
        if other != folder:
            print(
                f"note: {other} holds unfinished results of another command; delete it if you do "
                "not want to go on with them",
                file=sys.stderr,
            )
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(folder)
    if results.records:
        print(f"going on with {len(results.records)} finished before", file=sys.stderr)
    try:
        yield results
        (folder / _JOURNAL).unlink(missing_ok=True)
        for entry in folder.iterdir():
            target = out / entry.name
            if target.is_dir() and entry.is_dir():
                shutil.rmtree(target)
            os.replace(entry, target)
        results.records.clear()
    except KeyboardInterrupt as error:
        if not results.records:
            raise
        raise Paused(
            f"{len(results.records)} are finished; the same command goes on from there"
        ) from error
    except Exception:
        if results.records:
            print(
                f"note: {len(results.records)} are finished and kept in {folder}; the same command "
                "goes on from there",
                file=sys.stderr,
            )
        raise
    finally:
        if not results.records:
            shutil.rmtree(folder)
            if made and not any(out.iterdir()):
                out.rmdir()
