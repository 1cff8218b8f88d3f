#!/usr/bin/env bash
# Starts a run on a Cloud TPU VM with queued resources.
#
#   launch/tpu_vm.sh COMMAND --name=NAME --zone=ZONE --type=TYPE [flags] [-- FLAGS OF TRAIN]
#
# Commands
#   create    requests the TPU
#   wait      waits until the TPU is ready
#   install   copies this checkout to all workers: tracked files as they are now, and new .py and .json
#             files that git does not ignore; installs Python 3.12 and the requirements
#   run       starts training on all workers and returns; flags after -- go to ares_jax.train
#   tail      follows the log of worker 0
#   status    shows the state of the request
#   up        does create, wait, install, run
#   resume    after a preemption: deletes the rest, then does up; the run resumes from --workdir
#   delete    releases the TPU
#
# Flags
#   --name=NAME --zone=ZONE --type=TYPE   e.g. ares, us-west4-a, v5litepod-8
#   --project=PROJECT                     default: gcloud's
#   --version=RUNTIME                     software version; default: the one for TYPE
#   --workdir=gs://BUCKET/RUN             the run's folder, for one host or several; the TPU's service
#                                         account must be able to write there. Without --workdir or
#                                         --share a preemption loses the run, and resume starts from
#                                         step 0
#   --share=DIR                           instead: a folder on a disk that all workers mount
#                                         (Filestore, NFS); the run is in DIR/NAME. New machines have
#                                         nothing mounted: create, wait, install, mount, run
#   --spot=1                              spot capacity: cheaper, but may be taken away
#   --dry-run                             prints every command, requests nothing
#
# v5litepod-1, -4, -8, v6e-1, -4, -8, v4-8 and v5p-8 have one host, so "all workers" is one machine.
# Other types have several; their processes find each other (ARES_CLUSTER=gcetpu). This script has not
# run on a TPU. It is tested against a fake gcloud that records its calls.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"

name='' zone='' type='' project='' version='' workdir='' spot='' share=''
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
    *) flag "$1" name zone type project version workdir spot share ;;
  esac
  shift
done
need name
need zone
where=("--zone=$zone")
[[ -z $project ]] || where+=("--project=$project")

one_host() {
  [[ $type =~ ^(v5litepod-[148]|v6e-[148]|v4-8|v5p-8)$ ]]
}

storage() {
  need type
  [[ -z $workdir || $workdir == gs://?*/?* ]] || die "--workdir=$workdir must be gs://BUCKET/RUN"
  [[ -z $workdir || -z $share ]] || die "--workdir and --share are both the run's folder; give one of them"
  [[ -n $workdir$share ]] || one_host || die "--type=$type has several hosts; give --workdir=gs://BUCKET/RUN, or --share=DIR, a folder on a disk that all of them mount"
}

runtime() {
  if [[ -n $version ]]; then
    echo "$version"
    return
  fi
  case $type in
    v5litepod-*) echo v2-alpha-tpuv5-lite ;;
    v6e-*) echo v2-alpha-tpuv6e ;;
    v5p-*) echo v2-alpha-tpuv5 ;;
    *) echo tpu-ubuntu2204-base ;;
  esac
}

create() {
  storage
  local more=()
  [[ -z $spot ]] || more+=(--spot)
  call gcloud compute tpus queued-resources create "$name" "--node-id=$name" "${where[@]}" \
    "--accelerator-type=$type" "--runtime-version=$(runtime)" "${more[@]}"
}

state() {
  gcloud compute tpus queued-resources describe "$name" "${where[@]}" '--format=value(state.state)'
}

status() {
  call gcloud compute tpus queued-resources describe "$name" "${where[@]}" '--format=value(state.state)'
}

wait_for() {
  if ((DRY)); then
    status
    return
  fi
  local now
  while true; do
    now=$(state)
    echo "$name: $now"
    case $now in
      ACTIVE) return ;;
      FAILED | SUSPENDED | SUSPENDING) die "$name is $now; resume requests it again" ;;
    esac
    sleep "${ARES_POLL:-30}"
  done
}

# New files of these kinds are copied like those that git tracks.
new=(--others --exclude-standard -- '*.py' '*.json')

# Stops if a config that exists here would not be on the workers.
own_config() {
  local word file
  for word in "${words[@]}"; do
    [[ $word == --config=* ]] || continue
    file=${word#--config=}
    file=${file%%:*}
    [[ ! -e $file || $file -ef $here/../$file ]] ||
      die "$file is outside this checkout, so it is not copied to the workers; move it to configs/"
    [[ ! -e $here/../$file || -n $(cd "$here/.." && git ls-files "$file" && git ls-files "${new[@]}" | grep -Fx "$file") ]] ||
      die "$file is not copied to the workers, because git ignores it; move it to configs/"
  done
}

on_workers() {
  call gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=all "--command=$1"
}

install() {
  local archive changed root=${here%/*}
  archive=$(mktemp --suffix=.tar.gz)
  changed=$(git -C "$root" ls-files --modified && git -C "$root" ls-files "${new[@]}")
  [[ -z $changed ]] || echo "copied as they are, not committed: ${changed//$'\n'/ }" >&2
  # A file that is tracked and deleted is left out.
  call bash -c "cd $(quoted "$root") && { git ls-files -z; git ls-files -z $(quoted "${new[@]}"); } | tar --null -T - --ignore-failed-read -czf $(quoted "$archive")"
  call gcloud compute tpus tpu-vm scp "$archive" "$name:ares_jax.tar.gz" "${where[@]}" --worker=all
  rm -f "$archive"
  # The TPU images have Python 3.10; uv installs 3.12.
  on_workers 'set -e; mkdir -p ares_jax; tar -xzf ares_jax.tar.gz -C ares_jax; cd ares_jax
echo '"$(git -C "$root" describe --always --dirty --abbrev=12 --exclude='*')"' > COMMIT
python3 -m pip install --quiet --user uv
test -d ~/venv || ~/.local/bin/uv venv --python 3.12 ~/venv
~/.local/bin/uv pip install --quiet --python ~/venv/bin/python -r requirements.txt "jax[tpu]"'
}

run() {
  storage
  ((${#words[@]})) || die "give the flags of ares_jax.train after --, e.g. -- --config=configs/aepo_7b.py"
  own_config
  # The workers expand \$HOME and everything else that is escaped here.
  local word train folder="\"\$HOME/run\"" cluster=''
  [[ -z $workdir ]] || folder=$(quoted "$workdir")
  [[ -z $share ]] || folder=$(quoted "$share/$name")
  one_host || cluster='ARES_CLUSTER=gcetpu '
  for word in "${words[@]}"; do
    [[ $word != --workdir* ]] || die "give --workdir before the --, and only gs://; leave out $word"
  done
  train="$cluster\"\$HOME/venv/bin/python\" -m ares_jax.train --workdir=$folder $(quoted "${words[@]}")"
  on_workers "cd ~/ares_jax && (nohup bash -c $(quoted "$train") > ~/train.log 2>&1 < /dev/null &)"
}

tail_log() {
  call gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" --worker=0 '--command=tail -n 100 -F train.log'
}

# Checks for up and resume, which start on new machines.
own_disk() {
  storage
  [[ -z $share ]] || die "new machines have no $share: create, wait, install, mount it on all workers, run; after a preemption delete first"
  ((${#words[@]})) || die "give the flags of ares_jax.train after --, e.g. -- --config=configs/aepo_7b.py"
  own_config
}

delete() {
  call gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
}

up() {
  create
  wait_for
  install
  run
}

case $command in
  create | install | run | status | delete) "$command" ;;
  wait) wait_for ;;
  tail) tail_log ;;
  up)
    own_disk
    up
    ;;
  resume)
    own_disk
    [[ -n $workdir ]] || echo "no --workdir: the run starts from step 0" >&2
    if ((DRY)) || [[ -n $(state 2>/dev/null) ]]; then
      delete
    fi
    up
    ;;
  *) die "unknown command $command; --help lists the commands" ;;
esac
