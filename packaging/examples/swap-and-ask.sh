#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# Swaps to a model and asks it, with busctl and curl; prints the answer as JSON.
#
#   swap-and-ask.sh MODEL QUESTION      FLASHD_BUS_ADDRESS names another bus than the system's
set -eu
model=${1:?which model?} question=${2:?what to ask?}

bus() { busctl ${FLASHD_BUS_ADDRESS:+"--address=$FLASHD_BUS_ADDRESS"} --allow-interactive-authorization=yes "$@"; }

# busctl prints the type and the value, `o "/org/flashd1/job/7"`; this leaves the value. Not every shell has -e count
# in $(...), hence the `|| exit`.
text() {
    reply=$(bus "$@") || exit
    reply=${reply#*\"}
    printf '%s' "${reply%\"}"
}

job=$(text call org.flashd1 /org/flashd1 org.flashd1.Manager Swap 'sa{sv}' "$model" 0) || exit
while :; do
    state=$(text get-property org.flashd1 "$job" org.flashd1.Job State) || exit
    case $state in
        done) break ;;
        failed | cancelled) bus get-property org.flashd1 "$job" org.flashd1.Job Error >&2; exit 1 ;;
    esac
    sleep 0.1
done

endpoint=$(text get-property org.flashd1 /org/flashd1 org.flashd1.Manager Endpoint) || exit
quoted=$(printf %s "$question" | sed 's/[\\"]/\\&/g')
curl --silent --fail-with-body --unix-socket "$endpoint" http://localhost/v1/chat/completions \
    --header 'Content-Type: application/json' \
    --data "{\"messages\": [{\"role\": \"user\", \"content\": \"$quoted\"}]}"
