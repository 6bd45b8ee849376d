#!/usr/bin/env bash
# One host: one process for each GPU, or N processes on its CPU.
#
#   launch/local.sh --gpus=8 --config=configs/qm9.py --workdir=runs/qm9
#   launch/local.sh --cpu=2 --config=configs/qm9.py:quick
#   launch/local.sh --gpus=8 --restarts=10 ...      again after being preempted or losing a process
#
# DOCTOR=1 looks at the machine first (demetar doctor), and starts nothing if it finds a problem.
# One process that drives all GPUs of a host needs no script: python -m demetar.main "$@".
set -eu
cd "$(dirname "$0")/.."
# shellcheck source=launch/gpu_flags.sh
[ -z "${GPU_FLAGS:-}" ] || . launch/gpu_flags.sh
if [ -n "${DOCTOR:-}" ]; then
  train=()
  for word in "$@"; do # what is left is for demetar.main
    case $word in --gpus=* | --cpu=* | --restarts=*) ;; *) train+=("$word") ;; esac
  done
  python -m demetar.doctor "${train[@]}"
fi
exec python -m demetar.local "$@" # N times python -m demetar.main "$@", see demetar/local.py
