#!/usr/bin/env bash
# On every machine, with its own number (0 is the one that the others connect to):
#   MACHINE=0 MACHINES=4 GPUS=8 MAIN=10.0.0.1 examples/launch/several_machines.sh train --config recipe.yaml
# Output and cache must lie on a disk that all machines share; a run that finds it otherwise says so and ends.
set -euo pipefail
exec torchrun --nnodes "$MACHINES" --node_rank "$MACHINE" --nproc_per_node "$GPUS" \
  --master_addr "$MAIN" --master_port "${PORT:-29500}" -m difftuning_control.cli "$@"
