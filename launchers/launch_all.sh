#!/usr/bin/env bash
# Starts every node of a torchrun job over ssh; the first host is node 0, and its exit code is this script's.
#   bash SCRIPT HOST HOST ...     (SSH may name another program with ssh's arguments)
set -uo pipefail

nodes=@{nodes}
script_path=@{script_path}
stop_file=@{stop_file}

if (($# != nodes)); then
  printf 'launch_all: %d host names are needed, %d were given\n' "$nodes" "$#" >&2
  exit 3
fi
trap 'printf "cancel\n" >"$stop_file"' INT TERM

hosts=("$@") processes=()
for ((rank = 0; rank < nodes; rank++)); do
  printf -v remote '%q ' bash "$script_path" "$rank" "${hosts[0]}"
  set -m # Ctrl-C reaches this script only
  "${SSH:-ssh}" -n "${hosts[rank]}" "$remote" 2>&1 | sed -u "s/^/[$rank] /" &
  processes+=("$!")
  set +m
done

exit_codes=()
for process in "${processes[@]}"; do
  while :; do
    wait "$process"
    code=$?
    if ((code <= 128)) || ! kill -0 "$process" 2>/dev/null; then break; fi
  done
  exit_codes+=("$code")
done
exit "${exit_codes[0]}"
