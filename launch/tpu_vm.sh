#!/usr/bin/env bash
# shellcheck disable=SC2016,SC2086 # texts in single quotes are for the hosts; CAPACITY may be empty
# Runs a command on a Cloud TPU slice: creates the slice or reuses it, starts the command on all of its hosts, shows the first
# one's log, and after preemption gets a new slice and goes on from the run folder, until the command is done:
#   ./launch/tpu_vm.sh jaxmllm train configs/quickstart.py
# Ctrl-C leaves the run alone; the same line shows it again. Also: ./launch/tpu_vm.sh logs [HOST], stop (saves), delete.
# Needs gcloud, logged in, and a bucket in the zone's region that keeps runs/ (made with --enable-hierarchical-namespace
# --uniform-bucket-level-access, so that folders are renamed in one step). Data lie in the bucket's data/, which every host sees as
# data/. What git knows or does not ignore is copied, a reward or config of your own included; HF_TOKEN, HF_HOME, WANDB_API_KEY and
# PYTHONPATH are set there as here. Two lines to edit:
PROJECT="${PROJECT:-my-project}" ZONE="${ZONE:-us-west4-a}" BUCKET="${BUCKET:-my-bucket}"
TYPE="${TYPE:-v5litepod-16}" CAPACITY="${CAPACITY---spot}" # CAPACITY= for on demand, --reserved for a reservation
set -euo pipefail
cd "$(dirname "$0")/.."
NAME="${NAME:-jaxmllm-$TYPE}"

fail() { echo "tpu_vm.sh: $*" >&2; exit 2; }
say() { echo "tpu_vm.sh: $*" >&2; }
tpus() { gcloud compute tpus "$@" --project="$PROJECT" --zone="$ZONE"; }
on() { tpus tpu-vm ssh "$NAME" --worker="$1" --command="$2"; }

# --- on a host: this script runs there as `tpu_vm.sh host COMMAND ..`

host() {
  local pid
  pid="$(cat ~/run.pid 2>/dev/null || true)"
  if [ -n "$pid" ] && kill -0 "$pid" 2>/dev/null; then return; fi # runs already
  export PATH="$HOME/.local/bin:$PATH" JAXMLLM_EXTRAS=tpu PYTHON
  command -v uv >/dev/null || pip3 install -q --user uv
  uv python install -q 3.12
  PYTHON="$(uv python find 3.12)"
  mkdir -p runs
  if ! mountpoint -q runs; then
    command -v gcsfuse >/dev/null || fail "gcsfuse is not on this image: see Cloud Storage FUSE, installation"
    gcsfuse --implicit-dirs "$BUCKET" runs
  fi
  [ -e data ] || ln -s runs/data data
  if [ -f .settings.sh ]; then . ./.settings.sh; fi
  rm -f ~/run.status
  setsid nohup bash -c 'trap : TERM; ./launch/local.sh "$@"; echo $? >~/run.status' run "$@" >~/run.log 2>&1 </dev/null &
  echo $! >~/run.pid
}

# --- here

runtime() {
  case "$TYPE" in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    *) fail "TYPE=$TYPE: known are v5litepod-N, v5p-N and v6e-N" ;;
  esac
}

slice() { tpus tpu-vm describe "$NAME" --format='value(state)' 2>/dev/null || true; }

acquire() {
  local version queue
  version="$(runtime)"
  while :; do
    [ "$(slice)" != READY ] || return 0
    queue="$(tpus queued-resources describe "$NAME" --format='value(state.state)' 2>/dev/null || true)"
    case "$queue" in
      "")
        say "asking for $TYPE in $ZONE"
            tpus queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$version" $CAPACITY
        ;;
      FAILED | SUSPENDED) # preempted, or could not be had
        say "$NAME is $queue: asking again"
        tpus queued-resources delete "$NAME" --force --quiet || true
        ;;
      *) say "$NAME: queue $queue, slice $(slice)" ;;
    esac
    sleep 30
  done
}

begin() { # its status is that of its last line: called where `set -e` does not reach
  local copy name
  copy="$(mktemp -d)" # readable by its owner alone
  mkdir "$copy/code"
  git ls-files -z --cached --others --exclude-standard | tar --create --null --files-from=- |
    tar --extract --directory="$copy/code" &&
    for name in HF_TOKEN HF_HOME WANDB_API_KEY PYTHONPATH; do # in a file: everyone on a host sees its command lines
      [ -z "${!name:-}" ] || printf 'export %s=%q\n' "$name" "${!name}"
    done >"$copy/code/.settings.sh" &&
    chmod 600 "$copy/code/.settings.sh" &&
    tar --create --gzip --file="$copy/code.tgz" --directory="$copy/code" . &&
    tpus tpu-vm scp "$copy/code.tgz" "$NAME:code.tgz" --worker=all &&
    on all "mkdir -p jaxmllm && tar -xzf code.tgz -C jaxmllm && BUCKET=$(printf %q "$BUCKET") ./jaxmllm/launch/tpu_vm.sh host $(printf '%q ' "$@")" &&
    rm -r "$copy"
}

# One word a host: its exit status, `running`, or nothing where it cannot be reached.
statuses() {
  on all 'cat run.status 2>/dev/null || { kill -0 "$(cat run.pid)" 2>/dev/null && echo running || echo lost; }' 2>/dev/null || true
}

case "${1:-}" in
  host) shift; host "$@"; exit ;;
  "") fail "usage: ./launch/tpu_vm.sh COMMAND [ARGUMENT ...]" ;;
esac
command -v gcloud >/dev/null || fail "gcloud not found: install the Google Cloud CLI"
case "$1" in
  logs) on "${2:-0}" 'tail -n 1000 -F run.log'; exit ;;
  stop) on all 'kill -TERM -- "-$(cat run.pid)"'; exit ;;
  delete) tpus queued-resources delete "$NAME" --force; exit ;;
esac

for _ in $(seq 100); do
  acquire
  if ! begin "$@"; then
    [ "$(slice)" != READY ] || fail "the hosts could not be prepared, see above"
    continue # preempted meanwhile
  fi
  on 0 'tail -n +1 --pid="$(cat run.pid)" -f run.log' || true
  sleep 10 # the others end a little later
  ended="$(statuses | tr '\n' ' ')"
  say "hosts ended with: ${ended:-nothing, the slice is gone}"
  # see jaxmllm/machine/processes.py for the statuses
  case " $ended" in
    *" 1 "* | *" 2 "*) say "stopped by a mistake, see the log above; ./launch/tpu_vm.sh delete gives the slice back"; exit 2 ;;
    *" running "* | *" lost "* | " ") ;; # cut off, restarted or preempted
    *[!\ 0]*) say "goes on from the last checkpoint" ;;
    *) say "done; ./launch/tpu_vm.sh delete gives the slice back"; exit 0 ;;
  esac
done
fail "gave up after 100 starts"
