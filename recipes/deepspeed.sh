#!/usr/bin/env bash
# A recipe by DeepSpeed's launcher, on this machine or on those of a hostfile:
#   bash recipes/deepspeed.sh rlvr recipes/rlvr-qwen2.5-7b.toml [--key value ...]
#   HOSTFILE=hosts bash recipes/deepspeed.sh rlvr recipes/rlvr-qwen2.5-7b.toml
# The launcher ends its ranks 30 s after Ctrl-C, most steps take longer: what was saved before stays.
# Without a GPU: RANKS=2 DS_ACCELERATOR=cpu bash recipes/deepspeed.sh ... --device cpu
set -euo pipefail
where=()
[ -z "${HOSTFILE:-}" ] || where+=(--hostfile "$HOSTFILE")
[ -z "${RANKS:-}" ] || where+=(--num_gpus "$RANKS")
exec deepspeed "${where[@]}" --no_local_rank --module rmr1.cli "$@"
