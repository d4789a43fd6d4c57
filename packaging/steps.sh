# SPDX-License-Identifier: Apache-2.0
# Sourced by set-up scripts, which report each step in a line on standard error, with its number and approximate time. The
# output of programs goes to a log, whose last line is shown while a step takes long.

script=$(basename "$0")
steps_done=0
log=/dev/null
child=
progress=
began=$SECONDS
step_began=$SECONDS

# steps N: sets the number of steps
steps() { steps_all=$1; }

# step WHAT: begins the next step
step() {
  steps_done=$((steps_done + 1))
  step_began=$SECONDS
  printf '%s: %s/%s %s\n' "$script" "$steps_done" "$steps_all" "$1" >&2
}

# done_in WHAT: the last line
done_in() { printf '%s: %s (%s s)\n' "$script" "$1" "$((SECONDS - began))" >&2; }

fail() { printf 'flashd: %s\n        %s\n' "$1" "$2" >&2; exit 1; }

# find_python: sets `python` to an interpreter that flashd runs on
find_python() {
  for python in python3 python3.13 python3.12 python3.11 ''; do
    [ -n "$python" ] || fail "Python 3.11 or newer is needed, and none is on the PATH" "on Debian and Ubuntu: apt install python3 python3-venv"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && break
  done
}

# quietly COMMAND...: runs a command with its output in the log. If the script is ended, the command is ended too.
quietly() {
  "$@" >>"$log" 2>&1 &
  child=$!
  show_progress "$child" &
  progress=$!
  local status=0
  wait "$child" || status=$?
  child=
  end_progress
  return "$status"
}

# show_progress PID: says every now and then how long the step has taken, and the last line of the log: with pip and uv
# that is the package at hand. On a terminal this is one line, which changes; elsewhere a line every 15 s.
show_progress() {
  trap - INT TERM HUP
  local every=${FLASHD_PROGRESS_S:-15} start='' end='\n' width=120 line never
  if [ -t 2 ]; then
    every=1 start='\r\e[K' end='' width=$(stty size <&2) || width=80
    width=${width#* }
    [ "$width" -gt 0 ] || width=80  # a terminal that does not know its size
  fi
  exec {never}<> <(:)  # nothing comes from this pipe: a sleep that leaves no process behind
  while read -rt "$every" -u "$never" || kill -0 "$1" 2>/dev/null; do
    line=$(tail -n 50 "$log" 2>/dev/null | tr '\r\t' '\n ' | grep -vE '^ *$|^WARNING' | tail -n 1 | sed 's/^ *//') || true
    line="$script: $steps_done/$steps_all $((SECONDS - step_began)) s${line:+: $line}"
    printf "$start%s$end" "${line:0:width - 1}" >&2
  done
}

end_progress() {
  kill "$progress" 2>/dev/null || true
  wait "$progress" 2>/dev/null || true
  progress=
  [ ! -t 2 ] || printf '\r\e[K' >&2
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
  [ -z "$progress" ] || end_progress
  undo
  exit $((128 + $1))
}
trap 'ended 2' INT
trap 'ended 15' TERM
trap 'ended 1' HUP

# alone FILE: holds a lock until this script ends, after whichever other script holds it
alone() {
  mkdir -p "$(dirname "$1")"
  exec 9>"$1"
  if ! flock --nonblock 9; then
    printf '%s: waits for another one, which is making it\n' "$script" >&2
    flock 9
  fi
}

# install_into PYTHON ARGUMENTS...: like `pip install`, with uv if it is installed. uv does not read pip's configuration,
# so pip is used if that has an index or files.
install_into() {
  local python=$1
  shift
  if command -v uv >/dev/null && ! "$python" -m pip config list 2>/dev/null | grep -qE 'index|find-links|constraint'; then
    logged "the installation failed" uv pip install --python "$python" "$@"
  else
    logged "the installation failed" "$python" -m pip install --progress-bar off --disable-pip-version-check "$@"
  fi
}

# install_packages PACKAGE...: installs Debian packages, as root
install_packages() {
  logged "the package lists could not be updated" apt-get update
  logged "the packages could not be installed" apt-get install -y --no-install-recommends "$@"
}
