"""A training run as tests/torture.py sees it: its process, its files, what it must say."""

import json
import multiprocessing
import os
import pathlib
import re
import signal
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
STEPS, EVERY, KEEP = 40, 5, 3
ARGUMENTS = [
    f"--config.total_steps={STEPS}",
    f"--config.checkpoint.every={EVERY}",
    f"--config.checkpoint.keep={KEEP}",
    "--config.log_every=1",
    "--config.eval_every=0",
    "--config.mesh.data=1",
]
TOKENIZER = [
    f"--config={ROOT}/configs/tokenizer.py:digits,width=64,enc_depth=1,dec_depth=1,batch=4",
    "--config.evaluation.num_images=0",
]
TOY = [f"--config={ROOT}/tests/test_training_state.py"]  # Its stage is compiled in no time.
TEMPORARY = "orbax-checkpoint-tmp"
RANDOM, SAVE, COMMIT, AFTER, TERM = (
    "kill -9 at a random moment",
    "kill -9 in a save",
    "kill -9 in its commit",
    "kill -9 after its commit",
    "SIGTERM",
)

# Processes are forked from one that has imported everything already: that saves most of the time.
PRELOADED = ["flextok_jax.training.tokenizer_stage", "flextok_jax.training.loop"]
PRELOADED += ["flextok_jax.main", "test_training_state", "tensorboardX", "tqdm", "sklearn.datasets"]


class Fault(AssertionError):
    """A fault that was not survived."""


def environment(folder):
    """Sets what all runs share; before the first one."""
    paths = [str(ROOT), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ |= {
        "PYTHONPATH": os.pathsep.join(paths),
        "JAX_PLATFORMS": "cpu",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "PYTHONWARNINGS": "ignore",
    }
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(folder / "cache"))
    multiprocessing.set_forkserver_preload(PRELOADED)


def command(*arguments, log=None):
    """`python -m flextok_jax.main` with `arguments`, in this process."""
    if log:
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, 1)
        os.dup2(file, 2)
    from flextok_jax import main

    main.STAGES["toy"] = "test_training_state:ToyStage"
    sys.argv = ["main", *arguments]
    main.run()


class Run:
    """One process of the training command, in `workdir`."""

    def __init__(self, workdir):
        self.workdir, self._log = workdir, workdir.parent / f"{workdir.name}.log"
        self._log.write_text("")
        context, log = multiprocessing.get_context("forkserver"), {"log": str(self._log)}
        arguments = [*ARGUMENTS, f"--workdir={workdir}"]
        self.process = context.Process(target=command, args=arguments, kwargs=log)
        self.process.start()

    @property
    def log(self):
        return self._log.read_text(errors="replace")

    def hit(self, fault, rng, seconds) -> bool:
        """Waits for the fault's moment and strikes; False if the run was over before."""
        if fault in (RANDOM, TERM):
            end = time.monotonic() + rng.uniform(0, seconds)
            while time.monotonic() < end and self.process.is_alive():
                time.sleep(0.001)
        else:
            skipped = rng.randrange(2)  # saves that are left in peace
            last = 0
            while self.process.is_alive():
                phase, step = look(self.workdir)
                if phase == fault and step != last:
                    if not skipped:
                        break
                    skipped, last = skipped - 1, step
                time.sleep(0.0003)
        alive = self.process.is_alive()
        if alive:
            os.kill(self.process.pid, signal.SIGTERM if fault == TERM else signal.SIGKILL)
        self.process.join()
        return alive

    def finish(self) -> int:
        self.process.join()
        return self.process.exitcode


def look(workdir) -> tuple[str | None, int]:
    """The moment that the files show: SAVE, COMMIT, AFTER or None; and the newest step."""
    try:
        names = os.listdir(workdir / "checkpoints")
        temporary = [name for name in names if TEMPORARY in name]
        if temporary:
            parts = os.listdir(workdir / "checkpoints" / temporary[0])
            whole = any(TEMPORARY not in name and not name.startswith("_") for name in parts)
            return (COMMIT if whole else SAVE), int(temporary[0].split(".")[0])
        steps = sorted(int(name) for name in names)
        return (AFTER if len(steps) > KEEP else None), (steps or [0])[-1]
    except FileNotFoundError:  # It moves while it is looked at.
        return None, 0


def whole(workdir) -> list[int]:
    """The steps whose checkpoints have their final names, the newest first."""
    folder = workdir / "checkpoints"
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted((int(name) for name in names if name.isdigit()), reverse=True)


def result(workdir) -> dict:
    """What has to be equal in the end."""
    from flextok_jax.io.checkpoint import restore_ema
    from flextok_jax.io.storage import fingerprint

    lines = [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {
        "hash": fingerprint(restore_ema(workdir)[0]),
        "checksums": (workdir / f"checkpoints/{STEPS}/checksums/metadata").read_text(),
        "losses": [(line["step"], line["loss"]) for line in lines],
    }


def check(truth, said, text):
    if not truth:
        lines = [x for x in text.splitlines() if x[:1] not in "|+" and "x2num" not in x]
        raise Fault("\n  ".join([said, *lines[-20:]]))


def check_start(run, before):
    """The run continued from the newest whole checkpoint, and said so; `before`: those it found."""
    said = r"continuing from step (\d+)|(starting from step 0: no checkpoint)"
    started = re.findall(said, run.log)
    if not started:  # hit again before it came that far
        return
    expected = (str(before[0]), "") if before else ("", "starting from step 0: no checkpoint")
    check(started == [expected], f"found the checkpoints {before}, started {started}", run.log)


def check_end(run, expected):
    check(run.finish() == 0, f"exit code {run.process.exitcode}", run.log)
    found = result(run.workdir)
    for name, value in expected.items():
        check(found[name] == value, f"another {name}: {found[name]}, not {value}", run.log)
