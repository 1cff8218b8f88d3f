#!/usr/bin/env bash
# A run on machines with GPUs: here, or through Slurm.
#
#   launch/gpu.sh install                                  the requirements and JAX for CUDA 12
#   launch/gpu.sh local [flags] -- words of ares_jax.train
#   launch/gpu.sh slurm [flags] -- words of ares_jax.train
#
# Flags
#   --gpus=N             GPUs of a machine; default 8 (slurm), all (local)
#   --nodes=N            Slurm's machines, a process each; default 1
#   --partition=NAME     Slurm's; default: the cluster's
#   --time=HH:MM:SS      Slurm's limit for one go; default 24:00:00
#   --job=NAME           Slurm's name of the job; default ares
#   --log=FILE           output; default JOB-%j.log
#   --python=PATH        default python3
#   --dry-run            prints every command, starts nothing
#
# Slurm sends SIGTERM three minutes before the limit and at a preemption: train saves, the job queues
# itself again, and the same command goes on where it stopped. --workdir must be on a shared disk.
# Nothing of this has run on a GPU cluster: the commands are tested against an sbatch that records.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"

gpus='' partition='' time=24:00:00 job=ares log='' python=python3 nodes=1
words=()
command=${1:---help}
[[ $command != --help && $command != -h ]] || help "$0"
shift
while (($#)); do
  case $1 in
    --help | -h) help "$0" ;;
    --dry-run) DRY=1 ;;
    --)
      shift
      words=("$@")
      break
      ;;
    *) flag "$1" gpus partition time job log python nodes ;;
  esac
  shift
done
[[ $nodes =~ ^[1-9][0-9]*$ ]] || die "--nodes=$nodes must be a number >= 1"
[[ -z $gpus || $gpus =~ ^[1-9][0-9]*$ ]] || die "--gpus=$gpus must be a number >= 1"

install() {
  call "$python" -m pip install -r "$here/../requirements.txt" 'jax[cuda12]>=0.10.2,<0.11'
}

words_there() {
  ((${#words[@]})) || die "give train's words behind --, e.g. -- --config=configs/aepo_7b.py"
}

local_run() {
  words_there
  local devices=()
  # CUDA counts from 0.
  [[ -z $gpus ]] || devices=("CUDA_VISIBLE_DEVICES=$(seq -s, 0 $((gpus - 1)))")
  call cd "$here/.."
  call env "${devices[@]}" "$python" -m ares_jax.train "${words[@]}"
}

script() {
  # train finds its peers in what srun tells each of its tasks.
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
  wait "\$train"  # the first wait ended with the signal; now train saves
  code=\$?
fi
# 130: saved, and not done yet.
if ((stopped && code == 130)); then
  scontrol requeue "\$SLURM_JOB_ID"
fi
exit "\$code"
EOF
}

slurm() {
  words_there
  feed "$(script)" sbatch --parsable
}

case $command in
  install | slurm) "$command" ;;
  local) local_run ;;
  *) die "unknown command $command; --help shows them" ;;
esac
