#!/usr/bin/env bash
# Starts a run on a Cloud TPU VM with queued resources.
#
#   launch/tpu_vm.sh COMMAND --name=NAME --zone=ZONE --type=TYPE [flags] [-- FLAGS OF TRAIN]
#
# Commands
#   create    requests the TPU
#   wait      waits until the TPU is ready
#   install   copies this checkout to all workers: tracked files as they are now, and new .py and .json
#             files that git does not ignore; installs Python 3.12 and the requirements; does --setup
#   run       starts training on all workers and returns; flags after -- go to ares_jax.train
#   tail      follows the log of worker 0
#   status    shows the state of the request
#   up        does create, wait, install, run
#   resume    after a preemption: deletes the rest, then does up; the run resumes from --workdir
#   watch     waits until the run has ended; does resume after each preemption. The same flags as up
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
#                                         (Filestore, NFS); the run is in DIR/NAME
#   --setup=COMMAND                       done on all workers after install, in the checkout's folder:
#                                         downloads the model and data, mounts --share
#   --restarts=N                          default 10: how often train starts a run again if a process
#                                         is lost, and how often watch does resume
#   --spot=1                              spot capacity: cheaper, but may be taken away
#   --dry-run                             prints every command, requests nothing
#
# v5litepod-1, -4, -8, v6e-1, -4, -8, v4-8 and v5p-8 have one host, so "all workers" is one machine.
# Other types have several; their processes find each other (ARES_CLUSTER=gcetpu). A worker that is
# rebooted starts train again (cron), and the supervisors of the others wait for it. A worker's output
# is in train.log, the exit code of a run that has ended in train.code. This script has not run on a
# TPU. It is tested against a fake gcloud that records its calls.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
# shellcheck source=launch/common.sh
source "$here/common.sh"

name='' zone='' type='' project='' version='' workdir='' spot='' share='' setup='' restarts=10
parse 'name zone type project version workdir spot share setup restarts' "$@"
need name
need zone
[[ $restarts =~ ^[0-9]+$ ]] || die "--restarts=$restarts must be a number"
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
    "--accelerator-type=$type" "--runtime-version=${version:-$(runtime)}" "${more[@]}"
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
    now=$(status)
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

# Stops unless the workers get the config and the files of this checkout that other flags name.
own_config() {
  local word file
  need_config "${words[@]}"
  for word in "${words[@]}"; do
    file=${word#*=}
    file=${file%%:*}
    [[ -f $root/$file && -z $(cd "$root" && git ls-files "$file" && git ls-files "${new[@]}" | grep -Fx "$file") ]] ||
      continue
    [[ $file != "$config" ]] ||
      die "$file is not copied to the workers, because git ignores it; move it to configs/"
    [[ -n $setup ]] ||
      die "$file is not copied to the workers, because git does not track it; give its address at gs://, or fetch it by --setup"
  done
}

# `on WORKER COMMAND`: does COMMAND on a worker, or on all.
on() {
  call gcloud compute tpus tpu-vm ssh "$name" "${where[@]}" "--worker=$1" "--command=$2"
}

install() {
  local archive changed
  archive=$(mktemp --suffix=.tar.gz)
  changed=$(git -C "$root" ls-files --modified && git -C "$root" ls-files "${new[@]}")
  [[ -z $changed ]] || echo "copied as they are, not committed: ${changed//$'\n'/ }" >&2
  # A file that is tracked and deleted is left out.
  call bash -c "cd $(quoted "$root") && { git ls-files -z; git ls-files -z $(quoted "${new[@]}"); } | tar --null -T - --ignore-failed-read -czf $(quoted "$archive")"
  call gcloud compute tpus tpu-vm scp "$archive" "$name:ares_jax.tar.gz" "${where[@]}" --worker=all
  rm -f "$archive"
  # The TPU images have Python 3.10; uv installs 3.12.
  on all 'set -e; mkdir -p ares_jax; tar -xzf ares_jax.tar.gz -C ares_jax; cd ares_jax
echo '"$(git -C "$root" describe --always --dirty --abbrev=12 --exclude='*')"' > COMMIT
python3 -m pip install --quiet --user uv
test -d ~/venv || ~/.local/bin/uv venv --python 3.12 ~/venv
~/.local/bin/uv pip install --quiet --python ~/venv/bin/python -r requirements.txt "jax[tpu]"'
  [[ -z $setup ]] || on all "cd ~/ares_jax && PATH=~/venv/bin:\$PATH && $setup"
}

run() {
  storage
  own_config
  # The workers expand \$HOME and everything else that is escaped here.
  local train folder="\"\$HOME/run\"" cluster=''
  [[ -z $workdir ]] || folder=$(quoted "$workdir")
  [[ -z $share ]] || folder=$(quoted "$share/$name")
  one_host || cluster='ARES_CLUSTER=gcetpu '
  train="cd ~/ares_jax && rm -f ~/train.code
$cluster\"\$HOME/venv/bin/python\" -m ares_jax.train --restarts=$restarts --workdir=$folder $(quoted "${words[@]}")
echo \$? > ~/train.code"
  on all "cd && echo $(quoted "$train") > train.sh
echo '@reboot [ -e ~/train.code ] || bash ~/train.sh >> ~/train.log 2>&1' | crontab -
(nohup bash train.sh >> train.log 2>&1 < /dev/null &)"
}

# Checks for up, resume and watch, which start on new machines.
own_disk() {
  storage
  [[ -z $share || -n $setup ]] || die "new machines have no $share: give --setup=COMMAND that mounts it"
  own_config
}

delete() {
  call gcloud compute tpus queued-resources delete "$name" "${where[@]}" --force --quiet
}

# Does resume on a new TPU, at most --restarts times in all.
again() {
  ((restarts > 0)) || die "$name: --restarts are used up"
  restarts=$((restarts - 1))
  "$here/tpu_vm.sh" resume "${given[@]}"
}

watch() {
  local now code stopped=0
  while true; do
    now=$(status || echo UNKNOWN)
    # The exit code of the run; empty while it runs, or if worker 0 does not answer.
    code=''
    [[ $now != ACTIVE ]] || code=$(on 0 'cat train.code' 2>/dev/null || true)
    echo "$(date '+%F %T') $name: $now${code:+, the run ended with exit code $code}"
    case $now$code in
      ACTIVE0) return ;;
      # Stopped and saved, as before a preemption; if none follows, somebody has stopped it.
      ACTIVE130) ((++stopped < 20)) || die "the run was stopped; run continues it" ;;
      ACTIVE?*) die "the run ended with exit code $code; tail shows why" ;;
      FAILED | SUSPENDED | SUSPENDING)
        until again; do sleep "${ARES_POLL:-30}"; done
        stopped=0
        ;;
    esac
    sleep "${ARES_POLL:-30}"
  done
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
  tail) on 0 'tail -n 100 -F train.log' ;;
  up)
    own_disk
    up
    ;;
  watch)
    own_disk
    [[ -n $workdir$share ]] || die "without --workdir=gs://BUCKET/RUN a preemption loses the run"
    if ((DRY)); then status; else watch; fi
    ;;
  resume)
    own_disk
    [[ -n $workdir ]] || echo "no --workdir: the run starts from step 0" >&2
    if ((DRY)) || [[ -n $(status 2>/dev/null) ]]; then
      delete
    fi
    up
    ;;
  *) die "unknown command $command; --help lists the commands" ;;
esac
