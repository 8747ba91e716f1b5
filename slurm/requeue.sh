# shellcheck shell=bash
# Sourced by the batch scripts. Slurm itself requeues a pre-empted job (--requeue); a job near its time limit gets USR1
# (--signal) and is put back here. Either way the next run resumes from the last checkpoint (resume=auto).

# srun no longer takes this from sbatch since Slurm 22.05.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"

# requeued_when_told COMMAND ...: run it; on USR1 end it and requeue the job, on TERM pass TERM on.
requeued_when_told() {
    "$@" &
    local process=$!
    # shellcheck disable=SC2064
    trap "kill -TERM $process 2>/dev/null; wait $process || true; scontrol requeue $SLURM_JOB_ID; exit" USR1
    # shellcheck disable=SC2064
    trap "kill -TERM $process 2>/dev/null; wait $process || true; exit 143" TERM
    wait "$process"
}
