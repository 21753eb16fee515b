#!/bin/bash
#SBATCH --job-name=tozan
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --ntasks-per-node=1
#SBATCH --time=01:00:00
#SBATCH --output=tozan-%j.out
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail
export TOZAN_SECRET="${TOZAN_SECRET:-$(od -An -N32 -tx1 /dev/urandom | tr -d " \n")}"
status=0 again=
srun --ntasks=1 --ntasks-per-node=1 --kill-on-bad-exit=0 --wait=60 --cpu-bind=none /work/wt/gpu/.venv/bin/python -m tozan train /tmp/pytest-of-root/pytest-395/test_the_commands_work_on_a_gp0/run.toml --train.device=cuda --train.compile=false --checkpoint.every=2 || status=$?
case "$status" in
    75) again=1 ;;
    14 | 13[4-79]) [ "${SLURM_RESTART_COUNT:-0}" -ge 0 ] || again=1 ;;
esac
[ -z "$again" ] || scontrol requeue "$SLURM_JOB_ID"
exit "$status"
