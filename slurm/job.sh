# shellcheck shell=bash disable=SC2034  # the scripts that source this use its variables
# What is the same on every cluster, and not what one would guess. Sourced by the sbatch scripts
# beside it.

# JOB: this job, as Slurm's commands must be told of it. The last task of an array has the array's
# own id for its SLURM_JOB_ID, so whoever signals or requeues that means every task; and a job that
# a task of an array has submitted inherits that task's variables. Slurm itself knows.
JOB=$SLURM_JOB_ID
if [ -n "${SLURM_ARRAY_TASK_ID:-}" ]; then
    task=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID
    JOB=$(squeue --noheader --jobs="$SLURM_JOB_ID" --format='%A %i' |
        awk -v id="$SLURM_JOB_ID" '$1 == id {print $2}') || JOB=
    JOB=${JOB:-$task}
    [ "$JOB" = "$task" ] || unset "${!SLURM_ARRAY_@}"
fi
export JOB

# Since Slurm 22.05 srun does not take --cpus-per-task from the job: a rank would get one CPU, and
# threads for as many as the job has asked for.
[ -z "${SLURM_CPUS_PER_TASK:-}" ] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK

# A job that was submitted with --export has it for every srun too, which would keep from the ranks
# what the scripts export.
unset SLURM_EXPORT_ENV

# `python -m` would take the packages of the folder that a job is in before those of PYTHONPATH: of
# the source tree in which it was submitted, with every edit since, not of the copy of the code.
export PYTHONSAFEPATH=1

# Ends a job of which a variable is to be yes or no, and is something else.
require_yes_or_no() {
    local name
    for name; do
        if [ "${!name}" != yes ] && [ "${!name}" != no ]; then
            echo "error: $name=${!name} must be yes or no" >&2
            exit 1
        fi
    done
}

# Ends a job whose time limit is no longer than the notice before it: it would be told to end at
# every start, and come back for ever. The notice is that of the script's own line.
require_time_before_notice() {
    local notice end left
    notice=$(sed -n 's/^#SBATCH --signal=.*@\([0-9]*\)$/\1/p' "$1" | tail -n 1)
    end=$(SLURM_TIME_FORMAT=standard squeue --noheader --jobs="$JOB" --format=%e) || return 0
    end=$(date -d "$end" +%s 2>/dev/null) || return 0  # no limit
    left=$((end - $(date +%s)))
    if [ -n "$notice" ] && [ "$left" -le $((notice + 60)) ]; then
        echo "error: the time limit leaves $left s, and --signal tells the job to end $notice s" \
            "before it, or up to 60 s earlier; allowed: more than $((notice + 60)) s, or a shorter" \
            "notice in the script's line" >&2
        exit 1
    fi
}
