"""Joining the processes of a run on several machines: the one place that starts jax.distributed.

Explicit: every process gets the coordinator, their number and its own. Automatic: on
the TPU hosts of Google Cloud (TPU VM, GKE) and in a Slurm step of several tasks, JAX finds the same
three itself (docs.jax.dev/en/latest/multi_process.html; variables: jax/_src/clusters). A single
machine elsewhere starts at once: nothing is asked over the network.
"""

import logging
import os
from collections.abc import Mapping

import jax

# What JAX reads in a Slurm step (slurm.schedmd.com/srun.html, "OUTPUT ENVIRONMENT VARIABLES"). In a
# batch script outside `srun`, SLURM_STEP_NODELIST is missing: that is one process, not several.
SLURM = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")

log = logging.getLogger(__name__)


def start(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
):
    """Joins the other processes; call it before anything that touches a device.

    Args:
        coordinator: HOST:PORT on which process 0 listens, reachable from every machine.
        num_processes: how many processes there are.
        process_id: which one this is, 0 .. num_processes - 1.
            All three or none; with none, see `environment`.

    Raises:
        ValueError: some of the three are missing, or do not fit each other.
    """
    given = {
        "--coordinator": coordinator,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [name for name, value in given.items() if value is None]
    if len(missing) == len(given):
        found = environment(os.environ, jax.config.jax_platforms)
        if found is None:
            return
        # "slurm" by name, because JAX looks for other launchers first. TPU hosts are found by the
        # public call without arguments on both GKE and TPU VMs.
        jax.distributed.initialize(cluster_detection_method="slurm" if found == "slurm" else None)
    elif missing:
        raise ValueError(
            f"{' and '.join(missing)} must be given too: --coordinator=HOST:PORT, "
            "--num_processes=N and --process_id=I belong together (none of them: one process, "
            "a TPU pod or Slurm)"
        )
    else:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdigit():
            raise ValueError(f"--coordinator={coordinator}: HOST:PORT is needed (node0:1234)")
        if not 0 <= process_id < num_processes:
            raise ValueError(
                f"--process_id={process_id} must be 0 .. {num_processes - 1} "
                f"for --num_processes={num_processes}"
            )
        # Without detection, or in a Slurm step the process would see one of its GPUs only.
        jax.distributed.initialize(
            coordinator, num_processes, process_id, cluster_detection_method="deactivate"
        )
    log.info("process %d of %d", jax.process_index(), jax.process_count())


def environment(env: Mapping[str, str], platforms: str | None) -> str | None:
    """Where this process runs among others: "tpu", "slurm", or None.

    Args:
        env: environment variables.
        platforms: `jax.config.jax_platforms`. JAX itself sets it to "tpu,cpu" where it finds TPU
            chips and libtpu; JAX_PLATFORMS=cpu on a TPU host makes a run of its own.
    """
    if (platforms or "").split(",")[0] == "tpu":
        # GKE names the hosts. A TPU VM asks its metadata server, unless forbidden.
        named = "TPU_WORKER_HOSTNAMES" in env or "TPU_PROCESS_ADDRESSES" in env
        return "tpu" if named or "TPU_SKIP_MDS_QUERY" not in env else None
    # A step of one task keeps all of its GPUs; of several, each gets that of its SLURM_LOCALID.
    if all(name in env for name in SLURM) and int(env["SLURM_NTASKS"]) > 1:
        return "slurm"
    return None
