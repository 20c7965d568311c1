#!/usr/bin/env bash
# Two processes of mpiexec train one model: mpiexec.sh [key=value ...]. They agree by themselves on where they meet.
set -euo pipefail
exec mpiexec -n 2 trainfleet train "$(dirname "$0")/../recipes/gpt_stdlib.yaml" "$@"
