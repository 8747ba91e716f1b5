# shellcheck shell=bash
# Sourced by the batch scripts, after launch/common.sh. A job near its time limit receives USR1 (--signal), a preempted job
# TERM. Its workers then save and exit with code 75, the job is requeued, and its next run resumes (resume=auto).

# Since Slurm 22.05, srun no longer inherits this from sbatch.
export SRUN_CPUS_PER_TASK="${SLURM_CPUS_PER_TASK:-1}"

# run_and_requeue COMMAND ...: run a launcher until it exits. If a signal ended it, requeue the job unless it is canceled.
run_and_requeue() {
    local code=0
    supervise USR1 "$@" || code=$? # srun and mpirun forward USR1
    # Another code than 75 after a request: the workers were still starting, and had nothing to save.
    if [ "$code" = 75 ] || { [ -n "$stop_requested_at" ] && [ "$code" != 0 ]; }; then
        if [ "$(squeue --noheader --job="$SLURM_JOB_ID" --format=%T)" = RUNNING ]; then
            scontrol requeue "$SLURM_JOB_ID"
        fi
    fi
    exit "$code"
}
