#!/usr/bin/env bash
# TPU VM or pod slice: the same command on every host; JAX finds the others by itself.
#
#   launch/tpu_vm.sh NAME ZONE --config=configs/qm9.py --workdir=/mnt/runs/qm9
#
# NAME is a TPU VM on which the repository lies in ~/demetar with its .venv (pip install -e ".[tpu,qm9]"),
# and the workdir on a disk that all hosts share. After a preemption, create the TPU again and give
# the same command. Hosts that lose another (76) start again with it, ten times at most, as one that is killed does.
# DOCTOR=1 looks at each host first (demetar doctor), and starts nothing if it finds a problem.
set -eu
name=${1:?name of the TPU VM}
zone=${2:?its zone}
shift 2
printf -v arguments '%q ' "$@"
# shellcheck disable=SC2016  # $try and $? are for the remote shell
remote='cd demetar && . .venv/bin/activate && for try in $(seq 11); do
  python -m demetar.main '"$arguments"'; code=$?; [ $code -eq 76 ] || [ $code -gt 128 ] || exit $code; sleep 30; done; exit $code'
everywhere() { gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" --worker=all --command="$1"; }
# On all hosts before any starts: a host that trains already would look like another job to the rest.
[ -z "${DOCTOR:-}" ] ||
  everywhere "cd demetar && . .venv/bin/activate && python -m demetar.doctor $arguments"
everywhere "$remote"
