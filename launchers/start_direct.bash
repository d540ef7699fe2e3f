start() { # one process: no torchrun, no distributed variables
  trap '' HUP INT TERM USR1 USR2
  exec ${container[@]+"${container[@]}"} "$python" -m launchers.guard --state "$state" \
    --stop-file "$stop_file" --nodes 1 --node 0 -- "${command[@]}" --attempt "$attempt"
}
