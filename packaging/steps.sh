# SPDX-License-Identifier: Apache-2.0
# Sourced by set-up scripts, which report each step in a line on standard error, with its number and approximate time. The
# output of programs goes to a log.

script=$(basename "$0")
steps_done=0
log=/dev/null
child=
began=$SECONDS

# steps N: sets the number of steps
steps() { steps_all=$1; }

# step WHAT: begins the next step
step() {
  steps_done=$((steps_done + 1))
  printf '%s: %s/%s %s\n' "$script" "$steps_done" "$steps_all" "$1" >&2
}

# done_in WHAT: the last line
done_in() { printf '%s: %s (%s s)\n' "$script" "$1" "$((SECONDS - began))" >&2; }

fail() { printf 'flashd: %s\n        %s\n' "$1" "$2" >&2; exit 1; }

# quietly COMMAND...: runs a command with its output in the log. If the script is ended, the command is ended too.
quietly() {
  "$@" >>"$log" 2>&1 &
  child=$!
  if wait "$child"; then child=; else child=; return 1; fi
}

# logged WHAT COMMAND...: the same, but shows the end of the log if the command fails
logged() {
  local what=$1
  shift
  quietly "$@" || { tail -n 30 "$log" >&2; fail "$what" "the whole log is in $log"; }
}

# After Ctrl-C or a signal, `undo`, which a script may define, removes unfinished work.
undo() { :; }
ended() {
  trap '' INT TERM HUP
  [ -z "$child" ] || { kill -TERM "$child" 2>/dev/null; wait "$child" 2>/dev/null; } || true
  undo
  exit $((128 + $1))
}
trap 'ended 2' INT
trap 'ended 15' TERM
trap 'ended 1' HUP

# install_into PYTHON ARGUMENTS...: like `pip install`, with uv if it is installed. uv does not read pip's configuration,
# so pip is used if that has an index or files.
install_into() {
  local python=$1
  shift
  if command -v uv >/dev/null && ! "$python" -m pip config list 2>/dev/null | grep -qE 'index|find-links|constraint'; then
    logged "the installation failed" uv pip install --python "$python" "$@"
  else
    logged "the installation failed" "$python" -m pip install --quiet --disable-pip-version-check "$@"
  fi
}
