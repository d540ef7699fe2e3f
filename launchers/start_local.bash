start() { # the ranks themselves, each with a guard; the ranks are told about signals by the stop file
  trap '' HUP INT TERM USR1 USR2
  set -m # a process group for each rank
  export WORLD_SIZE=$processes_per_node LOCAL_WORLD_SIZE=$processes_per_node GROUP_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=$port
  local rank guard guards=() worst=0
  for ((rank = 0; rank < processes_per_node; rank++)); do
    RANK=$rank LOCAL_RANK=$rank ${container[@]+"${container[@]}"} "$python" -m launchers.guard --state "$state" \
      --stop-file "$stop_file" --nodes 1 --node 0 --watch -- "${command[@]}" --attempt "$attempt" &
    guards+=("$!")
  done
  for guard in "${guards[@]}"; do wait "$guard" || worst=$?; done
  return "$worst"
}
