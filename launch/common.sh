# Functions that the scripts in this folder share; they source this file.
# shellcheck shell=bash

DRY=0
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)  # of the checkout

# Prints words as one line for a shell, with quotes only where they are needed.
quoted() {
  local word line=''
  for word in "$@"; do
    if [[ ! $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then
      word="'${word//\'/\'\\\'\'}'"
    fi
    line+="${line:+ }$word"
  done
  printf '%s' "$line"
}

# Runs a command; with --dry-run prints it instead, ready to be pasted.
call() {
  if ((DRY)); then
    printf '+ %s\n' "$(quoted "$@")"
  else
    "$@"
  fi
}

# `feed TEXT COMMAND...`: the same for a command that reads TEXT from its standard input.
feed() {
  local text=$1
  shift
  if ((DRY)); then
    printf "+ %s <<'EOF'\n%s\nEOF\n" "$(quoted "$@")" "$text"
  else
    "$@" <<<"$text"
  fi
}

die() {
  printf 'error: %s\n' "$*" >&2
  exit 2
}

# Prints the comment at the top of a script as its help.
help() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$1"
  exit 0
}

# `need_config FLAGS OF TRAIN`: sets `config` to the file that --config names, a path in the checkout.
need_config() {
  local word
  (($#)) || die "give the flags of ares_jax.train after --, e.g. -- --config=configs/aepo_7b.py"
  config=''
  for word in "$@"; do
    [[ $word != --config ]] || die "give --config=FILE as one word"
    [[ $word != --config=* ]] || config=${word#--config=}
    [[ $word != --workdir* ]] || die "give --workdir=gs://BUCKET/RUN before the --; leave out $word"
    [[ $word != --restarts* ]] || die "give --restarts before the --; leave out $word"
  done
  [[ -n $config ]] || die "--config=FILE is missing after the --, e.g. --config=configs/aepo_7b.py"
  config=${config%%:*}
  [[ $config != /* && $config != *..* && -f $root/$config ]] ||
    die "--config=$config is not the path of a file in this checkout, such as configs/aepo_7b.py"
}

need() {
  [[ -n ${!1:-} ]] || die "--$1 is missing; --help shows how"
}

# `parse "NAME..." COMMAND [FLAGS] [-- FLAGS OF TRAIN]` sets `command`, `given` to the words after it,
# `words` to those after --, DRY, and the variable of each --NAME=VALUE.
# shellcheck disable=SC2034
parse() {
  # The underscores keep these apart from the caller's variables.
  local _known=" $1 " _name
  command=${2:---help} words=()
  [[ $command != --help && $command != -h ]] || help "$0"
  shift 2
  given=("$@")
  while (($#)); do
    case $1 in
      --help | -h) help "$0" ;;
      --dry-run) DRY=1 ;;
      --)
        words=("${@:2}")
        return
        ;;
      --*=*)
        _name=${1%%=*}
        [[ $_known == *" ${_name#--} "* ]] || die "unknown flag $_name; --help shows the flags"
        printf -v "${_name#--}" '%s' "${1#*=}"
        ;;
      *) die "unknown flag $1; --help shows the flags, all as --name=value" ;;
    esac
    shift
  done
}
