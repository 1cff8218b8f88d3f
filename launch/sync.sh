#!/usr/bin/env bash
# Keeps a run's folder in a bucket, so that it outlives its machine.
#
#   launch/sync.sh [--dry-run] push DIR gs://BUCKET/RUN           once
#   launch/sync.sh [--dry-run] pull DIR gs://BUCKET/RUN           what was pushed last, if anything
#   launch/sync.sh [--dry-run] watch DIR gs://BUCKET/RUN SECONDS  push again and again
#
# Pushes go to RUN/a and RUN/b in turn, and RUN/newest is written after a whole one: a machine that
# is taken away in the middle of a push leaves the one before.
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
    # The folder may not be there yet, and a file may be replaced while it is read: next time.
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
  *) die "say push, pull or watch; --help shows how" ;;
esac
"$@"
