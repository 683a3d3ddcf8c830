"""Training from one command:

python -m flextok_jax.main --config=configs/FILE.py:VARIANT --workdir=DIR [--config.KEY=VALUE ...]

The same command continues an interrupted run. Exit codes: 0 done, or stopped by Ctrl-C and saved;
130 stopped by Ctrl-C before the first step; 143 stopped by SIGTERM or a preemption notice and
saved: start it again; anything else an error.

--config.profile=A:B records steps A to B in DIR/profile, for TensorBoard or ui.perfetto.dev.

On several machines the same command runs on each. TPU pods and Slurm are recognised; elsewhere add
--coordinator=HOST:PORT --num_processes=N --process_id=I.
"""

import importlib
import logging
import os
import shlex
import signal
import sys

try:
    from absl import app, flags

    from flextok_jax import config_flag
except ModuleNotFoundError as error:
    sys.exit(f"error: training needs {error.name}: pip install -e '.[train]'")

STAGES = {
    "vae": "flextok_jax.training.vae_stage:VAEStage",
    "tokenizer": "flextok_jax.training.tokenizer_stage:TokenizerStage",
    "distill": "flextok_jax.training.distill_stage:DistillStage",
    "ar": "flextok_jax.training.ar_stage:ARStage",
}

NEXT = {  # What to do with a finished workdir.
    "vae": "python -m flextok_jax.main --config=configs/tokenizer.py:VARIANT "
    "--config.vae.source={0} --workdir=NEW_DIR",
    "tokenizer": "flextok reconstruct --model {0} --images FOLDER --out OUT",
    "distill": "flextok reconstruct --model {0} --images FOLDER --out OUT",
    "ar": "flextok generate --model {0} --out OUT (of a text model with --text PROMPT)",
}

_WORKDIR = flags.DEFINE_string(
    "workdir", None, "folder for checkpoints, metrics and logs; also gs://BUCKET/RUN, s3://..."
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, if there are more")
_NUM_PROCESSES = flags.DEFINE_integer("num_processes", None, "how many processes there are")
_PROCESS_ID = flags.DEFINE_integer("process_id", None, "which one this is, from 0")


def make_stage(config):
    """The stage that `config.stage` names.

    Raises:
        ValueError: it is none of STAGES.
    """
    if config.stage not in STAGES:
        raise ValueError(f"stage={config.stage!r}: allowed are {sorted(STAGES)}")
    module, name = STAGES[config.stage].split(":")
    return getattr(importlib.import_module(module), name)(config)


def main(argv):
    """Runs and returns the exit code."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: every option begins with --")
    from flextok_jax.io.checkpoint import WorkdirError
    from flextok_jax.io.paths import as_path, reached
    from flextok_jax.parallel import startup
    from flextok_jax.parallel.mesh import make_mesh
    from flextok_jax.training.checks import check_config
    from flextok_jax.training.loop import Diverged, SettingsError, train
    from flextok_jax.training.memory import OutOfMemory
    from flextok_jax.training.signals import PREEMPTED

    logging.getLogger("flextok_jax").setLevel(logging.INFO)
    log = logging.getLogger("flextok_jax.main")
    config, workdir = config_flag.CONFIG.value, _WORKDIR.value
    try:
        reached(as_path(workdir))
        startup.start(_COORDINATOR.value, _NUM_PROCESSES.value, _PROCESS_ID.value)
        check_config(config, make_mesh(**config.mesh))  # As `train` does, before the stage is made.
        stage = make_stage(config)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    try:
        command = shlex.join(["python", "-m", "flextok_jax.main", *sys.argv[1:]])
        outcome = train(stage, config, workdir, command)
    except (SettingsError, WorkdirError, Diverged, OutOfMemory, OSError) as error:
        sys.exit(f"error: {error}")
    if outcome.stopped:
        log.info("the same command continues the run in %s", workdir)
    elif config.stage in NEXT:
        log.info("done: %s. Next: %s", workdir, NEXT[config.stage].format(workdir))
    return PREEMPTED if outcome.stopped == signal.SIGTERM else 0


def _leave(*_):
    """Ctrl-C outside of training: at once, since libraries in mid-import swallow exceptions."""
    sys.stderr.write("\nstopped: no step was under way\n")
    os._exit(130)


def run():
    """Parses the command line, trains, exits."""
    signal.signal(signal.SIGINT, _leave)
    flags.mark_flags_as_required(["config", "workdir"])
    app.run(main, flags_parser=config_flag.parse)


if __name__ == "__main__":
    run()
