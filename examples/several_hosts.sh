#!/usr/bin/env bash
# The same command on every host, with the number of the host: several_hosts.sh NUMBER FIRST_HOST:PORT [key=value ...]
# Each starts two processes; the hosts meet at the first one's port. It needs to be reachable, nothing else.
set -euo pipefail
number=$1 meeting=$2
shift 2
exec trainfleet train "$(dirname "$0")/../recipes/gpt_stdlib.yaml" \
    --nnodes 2 --node-rank "$number" --rendezvous "$meeting" --nproc 1 "$@"
