#!/usr/bin/env bash
# Runs a command on a GKE cluster of TPUs through xpk; the workload restarts by itself and resumes from its run folder:
#   ./launch/xpk.sh jaxmllm train configs/quickstart.py
# Needs xpk and gcloud, a cluster (xpk cluster create) and a storage that keeps runs/, mounted at /runs
# (xpk storage attach jaxmllm-runs --type=gcsfuse --mount-point=/runs --bucket=..). Data lie in that bucket's data/, which the run
# sees as data/. What git knows or does not ignore is in the image, a reward or config of your own included; HF_TOKEN, HF_HOME,
# WANDB_API_KEY and PYTHONPATH are set there as here. Two lines to edit:
PROJECT="${PROJECT:-my-project}" ZONE="${ZONE:-us-west4-a}" CLUSTER="${CLUSTER:-my-cluster}"
TYPE="${TYPE:-v5litepod-16}" STORAGE="${STORAGE:-jaxmllm-runs}"
# XPK_FLAGS adds options: --spot, --num-slices=2, --dry-run, ..
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || { echo "usage: ./launch/xpk.sh COMMAND [ARGUMENT ...]" >&2; exit 2; }
command -v xpk >/dev/null || { echo "xpk.sh: xpk not found: pip install xpk" >&2; exit 2; }
NAME="${NAME:-jaxmllm-$(date +%m%d-%H%M%S)}"

copy="$(mktemp -d)" # of the project's files alone: xpk puts the whole folder into the image
trap 'rm -rf "$copy"' EXIT
git ls-files -z --cached --others --exclude-standard | tar --create --null --files-from=- | tar --extract --directory="$copy"

settings=()
for name in HF_TOKEN HF_HOME WANDB_API_KEY PYTHONPATH; do
  [ -z "${!name:-}" ] || settings+=("--env=$name=${!name}")
done

# xpk restarts on 42 and 127-255 of itself, that is on a lost process; 75 is "saved, start again" (jaxmllm/machine/processes.py).
# exec: xpk signals the shell that holds the command, and the notice of preemption must reach the run.
# shellcheck disable=SC2086
xpk workload create --project="$PROJECT" --zone="$ZONE" --cluster="$CLUSTER" --workload="$NAME" --tpu-type="$TYPE" \
  --storage="$STORAGE" --base-docker-image=python:3.12 --script-dir="$copy" \
  --max-restarts=100 --restart-on-exit-codes=75 --termination-grace-period-seconds=180 ${XPK_FLAGS:-} ${settings[@]+"${settings[@]}"} \
  --command="ln -sfn /runs runs && ln -sfn /runs/data data && export JAXMLLM_EXTRAS=tpu && exec ./launch/local.sh $(printf '%q ' "$@")"
