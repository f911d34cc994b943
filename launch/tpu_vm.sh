#!/bin/bash
# Trains on a Cloud TPU: one machine or a whole slice, from its creation to its end.
set -euo pipefail

usage() {
  cat <<'END'
launch/tpu_vm.sh [OPTIONS] COMMAND [-- FLAGS OF launch/train.py]

  create    asks for the TPU and waits until it is there
  install   copies this repository to all of its machines and installs it
  train     trains on all of its machines; when the TPU is taken away, asks for another, installs and
            goes on from the last checkpoint until the run has ended
  all       create, install, train, delete
  delete    gives the TPU back

  --name=NAME      of the TPU                                  (required)
  --zone=ZONE      e.g. us-east5-b                             (required)
  --type=TYPE      e.g. v6e-8, v5litepod-64, v5p-256           (create, train, all)
  --version=IMAGE  e.g. v2-alpha-tpuv6e, v2-alpha-tpuv5-lite   (create, train, all)
  --spot           cheaper, and may be taken away at any time
  --queued         waits in Google's queue (a queued resource) instead of failing where none is free
  --dry_run        prints the commands of gcloud and runs none
END
}

fail() {
  echo "error: $*" >&2
  exit 2
}

name='' zone='' type='' version='' command=''
spot=() queued='' dry_run=''
while (($#)); do
  case $1 in
    --name=*) name=${1#*=} ;;
    --zone=*) zone=${1#*=} ;;
    --type=*) type=${1#*=} ;;
    --version=*) version=${1#*=} ;;
    --spot) spot=(--spot) ;;
    --queued) queued=1 ;;
    --dry_run) dry_run=1 ;;
    --help) usage && exit ;;
    --) shift && break ;;
    -*) fail "unknown option $1: see --help" ;;
    *)
      [[ -z $command ]] || fail "two commands, $command and $1: give one"
      command=$1
      ;;
  esac
  shift
done
flags=("$@")

[[ $command =~ ^(create|install|train|all|delete)$ ]] ||
  fail "command '$command' is unknown: give create, install, train, all or delete"
[[ $name ]] || fail "--name is missing: give the TPU a name"
[[ $zone ]] || fail "--zone is missing: give one that has such TPUs, e.g. us-east5-b"
if [[ $command =~ ^(create|train|all)$ ]]; then
  [[ $type ]] || fail "--type is missing: give one, e.g. v6e-8"
  [[ $version ]] || fail "--version is missing: give the TPU's image, e.g. v2-alpha-tpuv6e"
fi
if [[ $command =~ ^(train|all)$ ]]; then
  ((${#flags[@]})) || fail "nothing to train: give flags of launch/train.py after --"
fi
cd "$(dirname "${BASH_SOURCE[0]}")/.."
log=runs/$name.log

# Runs gcloud, or prints what would run.
cloud() {
  if [[ $dry_run ]]; then
    printf 'gcloud'
    printf ' %q' "$@"
    echo
  else
    gcloud "$@"
  fi
}

vm() {
  cloud compute tpus tpu-vm "$@" "--zone=$zone"
}

queue() {
  cloud compute tpus queued-resources "$@" "--zone=$zone"
}

on_all() {
  vm ssh "$name" --worker=all --ssh-flag=-oServerAliveInterval=30 "--command=$1"
}

# READY, or another word for why it is not; GONE where there is no such TPU, UNKNOWN where gcloud
# cannot be asked for ten minutes: a network that is away for a while has not taken the TPU.
state() {
  local errors found=UNKNOWN
  errors=$(mktemp)
  for _ in {1..20}; do
    if found=$(gcloud compute tpus tpu-vm describe "$name" "--zone=$zone" '--format=value(state)' 2>"$errors"); then
      break
    elif grep -q NOT_FOUND "$errors"; then
      found=GONE
      break
    fi
    found=UNKNOWN
    cat "$errors" >&2
    sleep "${POLL_SECONDS:-30}"
  done
  rm -f "$errors"
  echo "$found"
}

create() {
  if [[ $queued ]]; then
    queue create "$name" "--node-id=$name" "--accelerator-type=$type" \
      "--runtime-version=$version" "${spot[@]}" || return
  else
    vm create "$name" "--accelerator-type=$type" "--version=$version" "${spot[@]}" || return
  fi
  [[ $dry_run ]] && return
  while true; do
    case $(state) in
      READY) return ;;
      PREEMPTED | TERMINATED | STOPPED)
        echo "$name was taken away before it was used" >&2
        return 1
        ;;
    esac
    if [[ $queued && $(queue describe "$name" '--format=value(state.state)') == FAILED ]]; then
      fail "the queue has refused $name: see gcloud compute tpus queued-resources describe $name"
    fi
    sleep "${POLL_SECONDS:-30}"
  done
}

# With a Python of its own, as that of the images is too old.
install() {
  local package=${TMPDIR:-/tmp}/rlft-$name.tar.gz
  [[ $dry_run ]] || git archive --output="$package" HEAD || return
  vm scp "$package" "$name:rlft.tar.gz" --worker=all || return
  # What ~ is, the TPU's machines know.
  # shellcheck disable=SC2016
  on_all 'mkdir -p rlft && tar -xzf rlft.tar.gz -C rlft && cd rlft && python3 -m pip install -q --user uv && ~/.local/bin/uv venv -q --allow-existing --python 3.12 .venv && ~/.local/bin/uv pip install -q -e ".[tpu,gcs,parquet,records]"' || return
  [[ $dry_run ]] || rm -f "$package"
}

delete() {
  if [[ $queued ]]; then
    queue delete "$name" --force --quiet
  else
    vm delete "$name" --quiet
  fi
}

# Until the run has ended, on one TPU after another.
train() {
  local run status
  printf -v run ' %q' "${flags[@]}"
  run="cd rlft && JAX_COMPILATION_CACHE_DIR=${JAX_COMPILATION_CACHE_DIR:-\$HOME/jax_cache} .venv/bin/python launch/train.py$run"
  if [[ $dry_run ]]; then
    on_all "$run"
    return
  fi
  mkdir -p runs
  while true; do
    status=0
    on_all "$run" 2>&1 | tee "$log" || status=$?
    if ((status == 0)) && ! grep -q 'the same command goes on' "$log"; then
      return
    fi
    # A run that saved and ended because its machine was told to may be faster than the machine.
    sleep "${POLL_SECONDS:-30}"
    case $(state) in
      READY)
        ((status)) && fail "the training failed on a TPU that is still there: see $log"
        continue
        ;;
      UNKNOWN) fail "gcloud cannot say whether $name is still there: give the command train again" ;;
    esac
    echo "$name was taken away: asking for another" >&2
    # Each step may fail, as the next TPU may be taken away as well.
    delete || true
    until create && install; do
      echo "there is no other yet: asking again" >&2
      sleep "${POLL_SECONDS:-30}"
      delete || true
    done
  done
}

case $command in
  create) create ;;
  install) install ;;
  train) train ;;
  delete) delete ;;
  all)
    create
    install
    train
    delete
    ;;
esac
