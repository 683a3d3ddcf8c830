"""Faults against a training run: does it survive them, and is it then bitwise the undisturbed one?

    python tests/torture.py                                 a few minutes on two idle CPU cores
    python tests/torture.py --rounds=50 --damages=100       an hour
    python tests/torture.py --seed=7 --folder=DIR           other moments; keep what it does in DIR

A small tokenizer is trained by the true command, `python -m flextok_jax.main`, 40 steps with a
checkpoint every 5. First undisturbed; then in rounds, each in a new workdir that is hit by every
one of these faults, in random order, and continued with the same command after each:

    kill -9 at a random moment      from the first line of the program to the last
    kill -9 in a save               when the temporary folder of a checkpoint exists
    kill -9 in its commit           when parts of it have their final names, and it has not
    kill -9 after its commit        when it has its final name, and the older ones still exist
    SIGTERM                         at a random moment: 143, or death before the program listens, or
                                    0 in the last step

Then copies of the finished workdir are damaged, each once, and continued:

    truncated / deleted / changed   a random file of the newest checkpoint loses its second half, is
                                    deleted, or has one bit flipped
    lost                            no checkpoint is left, or no file of any is whole: this is to be
                                    refused, never answered with a new start

And the disk is full for a while: a small tmpfs in a mount namespace (`unshare -rm`).

After each fault: the run continues from the newest checkpoint that is whole (the names on the disk
tell which that is) and says so. At the end of each round: the same hash of the averaged parameters
as `flextok info` prints, the same checksums of the whole state with the optimizer's, the same
losses of the same steps, none of them twice. Expected output, such as (notes and order vary):

    undisturbed  hash 2314248717daba9f in 18.2 s

    fault                       tried  survived  what happened
    kill -9 in its commit           6         6  6 in its commit
    kill -9 in a save               6         6  6 in a save
    kill -9 after its commit        6         6  6 after its commit
    SIGTERM                         6         6  6 saved, exit code 143
    kill -9 at a random moment      6         6  3 in a save, 2 before any, 1 after its commit
    changed                         5         5  3 noticed, continued from the one before, 2 was ...
    truncated                       5         5  ...
    deleted                         5         5  ...
    lost                            3         3  3 refused, told why
    full disk                       2         2  2 stopped, then continuing from step 10
    all survived

"was not needed": the damaged file says nothing that is used, and the newest checkpoint is whole.

Exit code 0 if all were survived; else 1, and what went wrong is told with the log of the run.
"""

import argparse
import collections
import os
import pathlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time

from torture_runs import (
    AFTER,
    ARGUMENTS,
    COMMIT,
    KEEP,
    RANDOM,
    ROOT,
    SAVE,
    STEPS,
    TERM,
    TOKENIZER,
    TOY,
    Fault,
    Run,
    check,
    check_end,
    check_start,
    environment,
    look,
    result,
    whole,
)

DAMAGES = ("changed", "truncated", "deleted")
LOST, DISK = "lost", "full disk"
ATTEMPTS = 20  # runs in which the moment of a fault, some are a millisecond, may be missed


class Table:
    """Counts, in the order in which faults first occur."""

    def __init__(self):
        self.tried, self.failed = collections.Counter(), collections.Counter()
        self.notes = collections.defaultdict(collections.Counter)

    def add(self, fault, note=None):
        self.tried[fault] += 1
        if note:
            self.notes[fault][note] += 1

    def print(self):
        width = max(map(len, self.tried), default=0)
        print(f"\n{'fault':{width}}  tried  survived  what happened")
        for fault, count in self.tried.items():
            notes = ", ".join(f"{n} {note}" for note, n in self.notes[fault].most_common())
            print(f"{fault:{width}}  {count:5}  {count - self.failed[fault]:8}  {notes}")


def one_round(workdir, rng, seconds, expected, table):
    """Every fault that strikes a running process, on one workdir; then to the end."""
    faults = [RANDOM, SAVE, COMMIT, AFTER, TERM]
    rng.shuffle(faults)
    struck = []
    try:
        for fault in faults:
            for attempt in range(ATTEMPTS):
                before = whole(workdir)
                run = Run(workdir)
                if run.hit(fault, rng, seconds / 2**attempt):
                    break
                check_end(run, expected)  # The moment never came: once more, from the beginning.
                shutil.rmtree(workdir)
            else:
                struck.append(fault)
                table.add(fault)
                raise Fault(f"{fault}: {ATTEMPTS} runs ended before its moment was seen")
            phase, _ = look(workdir)
            state = {SAVE: "in a save", COMMIT: "in its commit", AFTER: "after its commit"}
            note = state.get(phase) or ("between saves" if whole(workdir) else "before any")
            struck.append(fault)
            if fault == TERM:
                code = run.process.exitcode
                note = {143: "saved, exit code 143", -15: "before it listens"}.get(code)
                if code == 0 and STEPS in whole(workdir):
                    note = "in the last step: done, exit code 0"
            table.add(fault, note)
            check(note, f"exit code {run.process.exitcode}", run.log)
            check_start(run, before)
        before = whole(workdir)
        run = Run(workdir)
        check_end(run, expected)
        check_start(run, before)
    except Fault:
        table.failed.update(struck[-1:])
        raise


def one_damage(kind, workdir, rng, expected):
    """Damages the newest checkpoint of a finished run; returns what came of it."""
    newest, second, *_ = whole(workdir)
    files = sorted(p for p in (workdir / f"checkpoints/{newest}").rglob("*") if p.is_file())
    file = rng.choice([p for p in files if p.stat().st_size > 1] if kind != "deleted" else files)
    size = file.stat().st_size
    if kind == "truncated":
        os.truncate(file, size // 2)
    elif kind == "deleted":
        file.unlink()
    else:
        data = bytearray(file.read_bytes())
        data[rng.randrange(size)] ^= 1 << rng.randrange(8)
        file.write_bytes(data)
    name = file.relative_to(workdir / "checkpoints")
    run = Run(workdir)
    try:
        check_end(run, expected)
    except Fault as fault:
        raise Fault(f"{name} {kind}: {fault}") from fault
    if f"continuing from step {newest}" in run.log:
        return "was not needed"
    said = f"checkpoint {newest} is unreadable (" in run.log
    check(said and f"continuing from step {second}" in run.log, f"{name} {kind}: not told", run.log)
    return "noticed, continued from the one before"


def one_loss(index, workdir):
    """Loses all checkpoints in one of three ways: to be refused, with all other files as before."""
    folder = workdir / "checkpoints"
    if index % 3 == 0:
        shutil.rmtree(folder)
    elif index % 3 == 1:
        for step in whole(workdir):
            shutil.rmtree(folder / str(step))
    else:
        for path in folder.rglob("*"):
            if path.is_file():
                os.truncate(path, path.stat().st_size // 2)
    before = {name: (workdir / name).read_bytes() for name in ("metrics.jsonl", "config.json")}
    run = Run(workdir)
    check(run.finish() == 1, f"exit code {run.process.exitcode}", run.log)
    check(re.search("error: .*does not start over on its own", run.log), "not told", run.log)
    check(before == {name: (workdir / name).read_bytes() for name in before}, "written", run.log)
    return "refused, told why"


IN_NAMESPACE = """
set -e
mount -t tmpfs -o size="$1" tmpfs "$2"
code=0
run=(-c 'import sys, torture_runs; torture_runs.command(*sys.argv[1:])')
"$4" "${run[@]}" "${@:5}" --workdir="$2" >"$3/full.log" 2>&1 || code=$?
echo $code >"$3/code"
ls "$2/checkpoints" >"$3/left"
mount -o remount,size=1g "$2"
"$4" "${run[@]}" "${@:5}" --workdir="$2" >"$3/freed.log" 2>&1
cp -r "$2" "$3/result"
"""


def full_disk(folder, rng, expected, size):
    """Runs on a disk that is full after a few saves, then on a larger one: a note, or None."""
    workdir = folder / "disk"
    workdir.mkdir(parents=True)
    inside = ["unshare", "-rm", "bash", "-c", IN_NAMESPACE, "bash", str(size), str(workdir)]
    done = subprocess.run(
        [*inside, str(folder), sys.executable, *ARGUMENTS], capture_output=True, text=True, cwd=ROOT
    )
    logs = [folder / name for name in ("full.log", "freed.log")]
    text = "\n".join(log.read_text() for log in logs if log.exists()) + done.stderr
    check(done.returncode == 0, "the run did not go on when there was space", text)
    check((folder / "code").read_text().strip() == "1", "it did not stop with 1", text)
    check("could not be written" in text or "No space left" in text, "not told", text)
    left = [name for name in (folder / "left").read_text().split() if name.isdigit()]
    start = f"continuing from step {max(map(int, left))}" if left else "starting from step 0"
    check(start in logs[1].read_text(), f"not {start}", text)
    found = result(folder / "result")
    check(found == expected, f"another result: {found}", text)
    return f"stopped, then {start}"


def why_no_namespace() -> str | None:
    """Why a tmpfs cannot be mounted here, or None."""
    if not shutil.which("unshare"):
        return "there is no unshare"
    with tempfile.TemporaryDirectory() as folder:
        mount = ["mount", "-t", "tmpfs", "tmpfs", folder]
        done = subprocess.run(["unshare", "-rm", *mount], capture_output=True, text=True)
    return done.stderr.strip() or "not allowed" if done.returncode else None


def torture(folder, rounds, damages, losses, disks, seed, toy) -> bool:
    """Everything; prints the table and returns whether all was survived."""
    ARGUMENTS[:0] = TOY if toy else TOKENIZER
    environment(folder)
    rng, table, faults = random.Random(seed), Table(), []

    def attempt(kind, function, *arguments):
        """One fault that is a whole run of its own."""
        try:
            table.add(kind, function(*arguments))
        except Fault as fault:
            table.add(kind)
            table.failed[kind] += 1
            faults.append(fault)

    # The first of two fills the compilation cache. The time of the last is that in which random
    # moments lie.
    names = ["warm-up", "undisturbed"] if rounds > 1 else ["undisturbed"]
    for name in names:
        begin = time.monotonic()
        run = Run(folder / name)
        check(run.finish() == 0, "the undisturbed run failed", run.log)
        seconds = time.monotonic() - begin
    expected = result(folder / "undisturbed")
    check(all(result(folder / name) == expected for name in names), "two runs differ", run.log)
    print(f"undisturbed  hash {expected['hash'][:16]} in {seconds:.1f} s", flush=True)

    for i in range(rounds):
        try:
            one_round(folder / f"round-{i}", rng, seconds, expected, table)
        except Fault as fault:
            faults.append(fault)
    for i in range(damages):
        kind, workdir = DAMAGES[i % len(DAMAGES)], folder / f"damage-{i}"
        shutil.copytree(folder / "undisturbed", workdir)
        attempt(kind, one_damage, kind, workdir, rng, expected)
        shutil.rmtree(workdir)
    for i in range(losses):
        shutil.copytree(folder / "undisturbed", folder / f"loss-{i}")
        attempt(LOST, one_loss, i, folder / f"loss-{i}")
    reason = why_no_namespace()
    step = folder / f"undisturbed/checkpoints/{STEPS}"
    size = sum(-(-p.stat().st_size // 4096) * 4096 for p in step.rglob("*"))
    for i in range(0 if reason else disks):
        some = int(rng.uniform(0.5, KEEP + 0.5) * size)
        attempt(DISK, full_disk, folder / f"disk-{i}", rng, expected, some)
    table.print()
    if reason and disks:
        print(f"{DISK}: skipped: {reason}")
    for fault in faults:
        print(f"\nNOT SURVIVED: {fault}")
    if not faults:
        print("all survived")
    return not faults


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=4, help="of all faults of a running process")
    parser.add_argument("--damages", type=int, default=12, help="of the newest checkpoint")
    parser.add_argument("--losses", type=int, default=3, help="of all checkpoints")
    parser.add_argument("--disks", type=int, default=2, help="that are full")
    parser.add_argument("--toy", action="store_true", help="a model that compiles faster")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=pathlib.Path, help="a new folder, which is kept")
    options = vars(parser.parse_args())
    folder = options.pop("folder")
    if folder:
        folder.mkdir(parents=True)
        return 0 if torture(folder.resolve(), **options) else 1
    with tempfile.TemporaryDirectory() as folder:
        return 0 if torture(pathlib.Path(folder), **options) else 1


if __name__ == "__main__":
    sys.exit(main())
