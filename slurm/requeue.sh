# shellcheck shell=bash
# Sourced by the batch scripts, after launch/common.sh. A job near its time limit gets USR1 (--signal), a pre-empted one
# TERM: its workers save and end with code 75, the job is requeued, and its next run resumes (resume=auto).

# srun no longer takes this from sbatch since Slurm 22.05.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"

# requeued_when_told COMMAND ...: run it to its end; if a signal ended it, put the job back, unless somebody cancels it.
requeued_when_told() {
    local code=0
    supervise USR1 "$@" || code=$? # srun and mpirun pass USR1 on
    if [ "$code" = 75 ] || { [ -n "$asked" ] && [ "$code" != 0 ]; }; then # asked while it started: nothing to save yet
        if [ "$(squeue --noheader --job="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
            scontrol requeue "$SLURM_JOB_ID"
        fi
    fi
    exit "$code"
}
