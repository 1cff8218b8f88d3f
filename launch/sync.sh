#!/usr/bin/env bash
# Copies a run's folder to a bucket and back, so that the run outlives its machine.
#
#   launch/sync.sh [--dry-run] push DIR gs://BUCKET/RUN           copies once
#   launch/sync.sh [--dry-run] pull DIR gs://BUCKET/RUN           fetches the last push, if any
#   launch/sync.sh [--dry-run] watch DIR gs://BUCKET/RUN SECONDS  pushes every SECONDS
#
# Pushes go to RUN/a and RUN/b in turn, and RUN/newest is written after a complete push. If a machine
# is taken away in the middle of a push, the previous push is still there.
set -euo pipefail
# shellcheck source=launch/common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

newest() {
  gcloud storage cat "$1/newest" 2>/dev/null || true
}

push() {
  local folder=$1 bucket=${2%/} side=a
  [[ -d $folder ]] || die "$folder is no folder; it is the run's --workdir"
  if ! ((DRY)) && [[ $(newest "$bucket") == a ]]; then
    side=b
  fi
  call gcloud storage rsync --recursive --exclude='^lock$' --delete-unmatched-destination-objects "$folder" "$bucket/$side"
  feed "$side" gcloud storage cp - "$bucket/newest"
}

pull() {
  local folder=$1 bucket=${2%/} side=a
  if ! ((DRY)); then
    side=$(newest "$bucket")
    if [[ -z $side ]]; then
      echo "nothing in $bucket yet"
      return
    fi
  fi
  call mkdir -p "$folder"
  call gcloud storage rsync --recursive --exclude='^lock$' "$bucket/$side" "$folder"
}

watch() {
  while sleep "$3"; do
    # The folder may not exist yet, or a file may be replaced while it is read: the next push gets it.
    [[ ! -d $1 ]] || push "$1" "$2" || echo "push failed; trying again in $3 s" >&2
  done
}

[[ ${1:-} != --help && ${1:-} != -h ]] || help "$0"
if [[ ${1:-} == --dry-run ]]; then
  DRY=1
  shift
fi
case ${1:-} in
  push | pull) [[ $# == 3 ]] || die "$1 needs DIR and gs://BUCKET/RUN" ;;
  watch) [[ $# == 4 ]] || die "watch needs DIR, gs://BUCKET/RUN and SECONDS" ;;
  *) die "the command must be push, pull or watch; --help explains them" ;;
esac
"$@"
