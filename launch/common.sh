# Shared by the scripts beside it; sourced, not run.
# shellcheck shell=bash

DRY=0

# Words as one line for a shell, with quotes only where they are needed.
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

# Runs a command, or prints it as one could paste it where --dry-run was given.
call() {
  if ((DRY)); then
    printf '+ %s\n' "$(quoted "$@")"
  else
    "$@"
  fi
}

# The same for a command that reads a text: `feed TEXT COMMAND...`.
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

# The lines of comment at the top of a script are its help.
help() {
  sed -n '2,/^[^#]/s/^# \{0,1\}//p' "$1"
  exit 0
}

need() {
  [[ -n ${!1:-} ]] || die "--$1 is missing; --help shows how"
}

# Sets a variable from --name=value where `name` is among the words after the flag; else fails.
flag() {
  # Underscores: the caller's variables have plain names.
  local _word=$1 _name _known
  shift
  [[ $_word == --*=* ]] || die "unknown flag $_word; --help shows the flags, all as --name=value"
  _name=${_word%%=*}
  _name=${_name#--}
  for _known in "$@"; do
    if [[ $_known == "$_name" ]]; then
      printf -v "$_name" '%s' "${_word#*=}"
      return
    fi
  done
  die "unknown flag ${_word%%=*}; --help shows the flags"
}
