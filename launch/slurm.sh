#!/usr/bin/env bash
# Training on GPU nodes of a Slurm cluster, one or many, one process per GPU:
#
#   ./launch/slurm.sh --nodes=2 --gpus-per-node=8 --time=24:00:00 [OPTIONS OF sbatch ...] \
#       -- --config=configs/FILE.py:VARIANT --workdir=DIR [--config.KEY=VALUE ...]
#
# This folder, .venv in it and DIR must be on storage that all nodes share. Two minutes before the
# time limit (and when Slurm preempts the job) the run saves itself and ends with exit code 143; the
# job is then queued again, with the same number, and continues. --dry-run prints the job instead.
#
# .venv is made by the job itself. Where nodes have no internet, make it once on a login node:
#   bash -c 'source launch/common.sh && setup_venv train,cuda13' # or cuda12, for drivers below 580
set -euo pipefail
source "$(dirname "$0")/common.sh"

options=() gpus='' dry='' before=''
while [ $# -gt 0 ] && [ "$1" != -- ]; do
    case $1 in
    --dry-run) dry=1 ;;
    --gpus-per-node=*) gpus=${1##*[=:]} options+=("$1") ;; # also --gpus-per-node=TYPE:N
    *)
        if [[ $1 != -* && $before == --* && $before != *=* ]]; then
            echo "error: $before=$1 is needed, with an = instead of a space" >&2
            exit 2
        fi
        options+=("$1")
        ;;
    esac
    before=$1
    shift
done
if [ $# -lt 2 ] || [[ $gpus != [1-9]* ]] || [[ " $*" != *" --config="* || " $*" != *" --workdir="* ]]; then
    sed -n '2,/^set -/{/^set -/d;s/^# \{0,1\}//p}' "$0" >&2
    exit 2
fi
shift

# https://slurm.schedmd.com/sbatch.html, options and environment. Every process sees all GPUs of its
# node, and JAX takes the one of its SLURM_LOCALID: therefore --ntasks-per-node, not --gpus-per-task.
# --signal without B goes to the processes, not to this script. Options on the command line win over
# those in the script.
job="#!/bin/bash
#SBATCH --job-name=flextok
#SBATCH --ntasks-per-node=$gpus
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
source ${ROOT@Q}/launch/common.sh
setup_gpu || exit
# srun does not take it over from sbatch (slurm.schedmd.com/srun.html, --cpus-per-task).
if [ -n \"\${SLURM_CPUS_PER_TASK:-}\" ]; then export SRUN_CPUS_PER_TASK=\$SLURM_CPUS_PER_TASK; fi
# A process that dies takes the others with it, instead of leaving them to wait for it.
srun --kill-on-bad-exit=1 \"\$VENV/bin/python\" -u -m flextok_jax.main ${*@Q}
code=\$?
if [ \$code = 143 ]; then scontrol requeue \"\$SLURM_JOB_ID\"; fi
exit \$code"

if [ -n "$dry" ]; then
    printf '%s\n' "$(shown sbatch "${options[@]}") <<'JOB'" "$job" JOB
else
    sbatch "${options[@]}" <<<"$job"
fi
