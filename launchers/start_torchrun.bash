start() { # the agent of this node; signals ask the ranks to save through the stop file and must not end it
  trap '' HUP INT TERM USR1 USR2
  export PET_SIGNALS_TO_HANDLE=SIGQUIT
  local local_address=() task=(-m launchers.guard --state "$state" --stop-file "$stop_file" --nodes "$nodes" --node "$node_rank" -- "${command[@]}" --attempt "$attempt")
  ((nodes > 1)) || local_address=(--local-addr=127.0.0.1)
  # torchrun reads $$ and ${local_rank} in the arguments of the ranks, and before -- would take them for its own options
  exec ${container[@]+"${container[@]}"} "$python" -m torch.distributed.run \
    --nnodes="$nodes" --nproc-per-node="$processes_per_node" --max-restarts=0 \
    --rdzv-backend=c10d --rdzv-endpoint="$head:$port" --rdzv-id="$rendezvous_id" \
    --rdzv-conf="is_host=$((node_rank == 0)),join_timeout=600" ${local_address[@]+"${local_address[@]}"} \
    --no-python -- "$python" "${task[@]//\$/\$\$}"
}
