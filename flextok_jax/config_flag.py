"""The flag --config of the programs, and their command line's parser."""

import sys

from absl import app, flags
from absl import logging as absl_logging
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file(
    "config", None, "FILE.py:VARIANT; any key by --config.KEY=VALUE", lock_config=True
)


def parse(argv: list[str]) -> list[str]:
    """absl's parser, with a readable line for a key that the config does not have."""
    try:
        rest = app.parse_flags_with_usage(argv)
    except (AttributeError, KeyError) as error:
        overrides = [arg for arg in argv if arg.startswith("--config.")]
        while error.args and isinstance(error.args[0], Exception):
            error = error.args[0]
        sys.exit(f"error: the config has no key {error.args[0]}\n  in {' '.join(overrides)}")
    if flags.FLAGS["verbosity"].using_default_value:
        # absl's INFO lines are other libraries'; those of this package have their own level.
        flags.FLAGS.verbosity = absl_logging.WARNING
    return rest
