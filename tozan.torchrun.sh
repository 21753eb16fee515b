#!/bin/bash
set -euo pipefail
export TOZAN_SECRET="${TOZAN_SECRET:-$(od -An -N32 -tx1 /dev/urandom | tr -d " \n")}"
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
exec torchrun --standalone --max-restarts=0 --nproc-per-node=1 --no-python /tmp/t211v/bin/python -m tozan agent /tmp/pytest-of-root/pytest-398/test_the_commands_work_on_a_gp0/run.toml --train.device=cpu --train.compile=false --checkpoint.every=2
