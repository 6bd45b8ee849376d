#!/usr/bin/env bash
# Kubernetes with JobSet (https://jobset.sigs.k8s.io): fills in launch/jobset.yaml and applies it.
#
#   IMAGE=registry/demetar:tag NODES=4 GPUS=8 CLAIM=runs launch/kubernetes.sh NAME \
#       --config=configs/qm9.py                        becomes python -m demetar.main "$@" in each pod
#
# The workdir is /runs/NAME, on the claim. DRY_RUN=1 prints the manifest instead of applying it.
# DOCTOR=1 looks at the machine of the first pod (demetar doctor); a problem fails the job with 2.
set -eu
cd "$(dirname "$0")/.."
name=${1:?a name for the JobSet, as the first argument}
shift
workdir=/runs/$name
arguments=$(python -c 'import json, sys; print(json.dumps(sys.argv[1:]))' --workdir="$workdir" "$@")
command='[python, -m, demetar.main]'
# shellcheck disable=SC2016  # "$@" is for the pod's shell
[ -z "${DOCTOR:-}" ] ||
  command='[sh, -c, "[ $JAX_PROCESS_ID != 0 ] || python -m demetar.doctor \"$@\" && exec python -m demetar.main \"$@\"", sh]'
manifest=$(python -c '
import sys
text = sys.stdin.read()
for pair in sys.argv[1:]:
    key, _, value = pair.partition("=")
    text = text.replace(key, value)
print(text, end="")
' WORKDIR="$workdir" NODES="${NODES:?number of pods}" GPUS="${GPUS:?GPUs of each pod}" \
  CLAIM="${CLAIM:?a ReadWriteMany PersistentVolumeClaim}" NAME="$name" \
  IMAGE="${IMAGE:?container image, see launch/Dockerfile}" COMMAND="$command" ARGUMENTS="$arguments" <launch/jobset.yaml)
if [ -n "${DRY_RUN:-}" ]; then
  printf '%s\n' "$manifest"
else
  printf '%s\n' "$manifest" | kubectl apply -f -
fi
