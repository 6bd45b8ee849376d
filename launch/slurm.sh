#!/usr/bin/env bash
# SLURM: one process for each GPU, all GPUs of a node visible to each of its processes.
#
#   sbatch launch/slurm.sh --config=configs/qm9.py --workdir=/shared/runs/qm9
#   sbatch --nodes=4 --time=12:00:00 launch/slurm.sh ...         options of sbatch come first
#
# DOCTOR=1 looks at each node first (demetar doctor), and ends with 2 if it finds a problem.
# ENV_SCRIPT, if set, is sourced first (modules, virtual environment). Adapt the lines below, or
# override them on sbatch's command line.
#SBATCH --job-name=demetar
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=%x-%j.log
# --gres, not --gpus-per-task: that one hides the other GPUs, and JAX picks its own by SLURM_LOCALID.
# --signal: five minutes before the time is up this script is told, and forwards it to the processes,
#   which save and exit with 75.
set -u
cd "${SLURM_SUBMIT_DIR:-.}" || exit 2
# shellcheck source=/dev/null
[ -z "${ENV_SCRIPT:-}" ] || . "$ENV_SCRIPT"
# shellcheck source=launch/gpu_flags.sh
[ -z "${GPU_FLAGS:-}" ] || . launch/gpu_flags.sh

if [ -n "${DOCTOR:-}" ]; then
  srun --ntasks="${SLURM_JOB_NUM_NODES:-1}" --ntasks-per-node=1 --gpu-bind=none \
    python -m demetar.doctor "$@" || exit
fi

# From SLURM 22.05 on, srun does not take it from sbatch.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK"
job=
trap '[ -z "$job" ] || kill -USR1 "$job"' USR1 TERM
# No --kill-on-bad-exit: it would kill processes that are saving, and hide the code 75 behind 137. They
# watch each other, and end by themselves; --wait is for one that cannot.
srun --kill-on-bad-exit=0 --wait=180 --gpu-bind=none python -m demetar.main "$@" &
job=$!
while :; do # a trapped signal ends `wait` early
  wait "$job"
  code=$?
  kill -0 "$job" 2>/dev/null || break
done

# Only what was preempted and saved is worth another try by itself. A node that dies is SLURM's own
# affair (--requeue); 1, 2, 76 and 78 are for a person. See the table in launch/README.md.
if [ "$code" -eq 75 ]; then
  if [ "${SLURM_RESTART_COUNT:-0}" -lt "${MAX_RESTARTS:-100}" ]; then
    scontrol requeue "$SLURM_JOB_ID"
  else
    echo "Requeued ${SLURM_RESTART_COUNT} times already (MAX_RESTARTS): not again." >&2
  fi
fi
exit "$code"
