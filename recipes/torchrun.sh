#!/usr/bin/env bash
# A recipe on all GPUs of one machine, or of several machines:
#   bash recipes/torchrun.sh rlvr recipes/rlvr-qwen2.5-7b.toml [--key value ...]
# On each of NODES machines, with the first one's name:
#   NODES=4 HEAD=gpu01 bash recipes/torchrun.sh rlvr recipes/rlvr-qwen2.5-7b.toml
set -euo pipefail
# After Ctrl-C the step in progress is finished and saved; torchrun would give it 30 s only.
# Without a GPU: RANKS=2 bash recipes/torchrun.sh ... --device cpu
ranks=${RANKS:-gpu}
where=(--standalone)
if [ "${NODES:-1}" -gt 1 ]; then
  where=(--nnodes "$NODES" --rdzv-backend c10d --rdzv-endpoint "${HEAD:?name the first machine}:29400" --rdzv-id "${JOB:-rmr1}")
fi
exec torchrun --shutdown-timeout "${STOP_SECONDS:-1800}" "${where[@]}" --nproc-per-node "$ranks" -m rmr1.cli "$@"
