#!/usr/bin/env bash
# Starts a run on GPUs: on this machine, or through Slurm.
#
#   launch/gpu.sh install                          installs the requirements and JAX for CUDA 12
#   launch/gpu.sh local [flags] -- FLAGS OF TRAIN  trains on this machine
#   launch/gpu.sh slurm [flags] -- FLAGS OF TRAIN  submits a job that trains
#
# Flags
#   --gpus=N             GPUs of a machine; default 8 (slurm) or all (local)
#   --nodes=N            machines, one process on each (slurm); default 1
#   --partition=NAME     partition (slurm); default: the cluster's
#   --time=HH:MM:SS      time limit of a job (slurm); default 24:00:00
#   --job=NAME           name of the job (slurm); default ares
#   --log=FILE           output of the job (slurm); default JOB-%j.log
#   --python=PATH        Python interpreter; default python3
#   --dry-run            prints every command, starts nothing
#
# Slurm sends SIGTERM three minutes before the limit and at a preemption. Training then saves, the job
# queues itself again, and the same command resumes the run. --workdir must be on a shared disk.
# This script has not run on a GPU cluster. It is tested against a fake sbatch that records its calls.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"

gpus='' partition='' time=24:00:00 job=ares log='' python=python3 nodes=1
parse 'gpus partition time job log python nodes' "$@"
[[ $nodes =~ ^[1-9][0-9]*$ ]] || die "--nodes=$nodes must be a number >= 1"
[[ -z $gpus || $gpus =~ ^[1-9][0-9]*$ ]] || die "--gpus=$gpus must be a number >= 1"

install() {
  call "$python" -m pip install -r "$here/../requirements.txt" 'jax[cuda12]'
}

need_train_flags() {
  ((${#words[@]})) || die "give the flags of ares_jax.train after --, e.g. -- --config=configs/aepo_7b.py"
}

local_run() {
  need_train_flags
  local devices=()
  # CUDA numbers devices from 0.
  [[ -z $gpus ]] || devices=("CUDA_VISIBLE_DEVICES=$(seq -s, 0 $((gpus - 1)))")
  call cd "$here/.."
  call env "${devices[@]}" "$python" -m ares_jax.train "${words[@]}"
}

script() {
  # The processes find each other through the variables that srun sets.
  local over=()
  ((nodes == 1)) || over=(srun --kill-on-bad-exit=0)
  cat <<EOF
#!/usr/bin/env bash
#SBATCH --job-name=$job
#SBATCH --nodes=$nodes
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=${gpus:-8}
#SBATCH --exclusive
#SBATCH --time=$time
#SBATCH --output=${log:-$job-%j.log}
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@180
${partition:+#SBATCH --partition=$partition}
set -u
cd $(quoted "$(cd "$here/.." && pwd)")
$(quoted "${over[@]}" "$python" -m ares_jax.train "${words[@]}") &
train=\$!
stopped=0
trap 'stopped=1; kill -TERM "\$train"' TERM
wait "\$train"
code=\$?
if ((stopped)); then
  wait "\$train"  # the signal ended the first wait; training is saving now
  code=\$?
fi
# Exit code 130: stopped and saved, but not finished.
if ((stopped && code == 130)); then
  scontrol requeue "\$SLURM_JOB_ID"
fi
exit "\$code"
EOF
}

slurm() {
  need_train_flags
  feed "$(script)" sbatch --parsable
}

case $command in
  install | slurm) "$command" ;;
  local) local_run ;;
  *) die "unknown command $command; --help lists the commands" ;;
esac
