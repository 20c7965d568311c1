#!/usr/bin/env bash
# What a cluster is given for one recipe on two hosts: launch_files.sh FOLDER [key=value ...]
set -euo pipefail
folder=$1 recipe="$(dirname "$0")/../recipes/gpt_stdlib.yaml"
shift
mkdir -p "$folder"
trainfleet launch slurm "$recipe" "$@" --nodes 2 --nproc-per-node 2 --gpus-per-node 2 --time 12:00:00 -o "$folder/job.sh"
for kind in jobset pytorchjob; do
    trainfleet launch kubernetes "$recipe" "$@" --nodes 2 --nproc-per-node 2 --gpus-per-node 2 \
        --image registry.example/gpt:1 --claim runs --claim-size 100Gi --kind "$kind" -o "$folder/$kind.yaml"
done
