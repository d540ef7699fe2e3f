#!/usr/bin/env bash
# @{title}
# Written by the orchestrator from run.json; change the configuration, not this file.
#   @{usage}
# Exit codes: 0 done, 75 saved and wants to go on, 93 do not restart, 2 a mistake to mend, 1 crash, 3 could not start.
# shellcheck disable=SC2016,SC2317  # values are data, their dollars stay; the trap handlers are reached
set -uo pipefail

name=@{name}
nodes=@{nodes}
processes_per_node=@{processes_per_node}
python=@{python}
command=(@{command})
decide=(@{decide})
container=(@{container})
working_directory=@{working_directory}
script_path=@{script_path}
attempts_directory=@{attempts_directory}
log_directory=@{log_directory}
result_file=@{result_file}
stop_file=@{stop_file}

@{functions}

join_attempt() { # on the other nodes: sets attempt, state and port from the head's claim, once it answers
  local endpoint deadline=$((SECONDS + 600))
  until ((SECONDS > deadline)); do
    find_last_attempt
    attempt=$last state=$log_directory/attempt-$last
    endpoint=$(cat -- "$state/endpoint" 2>/dev/null)
    port=${endpoint##*:}
    [[ -n $head ]] || head=${endpoint%:*}
    if [[ -n $endpoint && ! -e $attempts_directory/$attempt.json ]] && answers "$head" "$port"; then return 0; fi
    ((SECONDS % 30)) || say "waiting for node 0 ${head:+at $head }(no answer yet)"
    sleep 1
  done
  fail "node 0 did not answer within 600 s: start it, or give its host name as the second argument"
}

take_node_rank() { # a node rank that is taken already is a mistake of whoever started this
  (set -C && printf '%s\n' "$HOSTNAME" >"$state/node-$node_rank") 2>/dev/null ||
    fail "node rank $node_rank of attempt $attempt is taken by $(cat -- "$state/node-$node_rank"): give each node its own"
}

@{start}

on_signal() { # SIGNAL: the first asks to save, a second interrupt ends the ranks
  signals=$((signals + 1))
  if [[ $1 == INT && -n $process ]] && ((signals > 1)); then
    say "second interrupt: ending the ranks"
    interrupted=1
    kill -KILL -- "-$process"
  else
    request_stop "$1"
  fi
}

node_rank=${1:-${NODE_RANK:-0}} head=${2:-${HEAD_HOST:-}} fixed_port='' process='' signals=0 interrupted=''
if ! [[ $node_rank =~ ^[0-9]{1,6}$ ]] || ((node_rank >= nodes)); then
  fail "the node rank is '$node_rank': 0 to $((nodes - 1)) is allowed"
fi
if [[ $head =~ ^(.+):([0-9]+)$ ]]; then head=${BASH_REMATCH[1]} fixed_port=${BASH_REMATCH[2]}; fi

@{exports}
@{setup}
# A script of a folder that was copied or moved would work on the old one.
[[ ! -f $0 || ${0##*/} != "${script_path##*/}" || $0 -ef $script_path ]] ||
  fail "this script was written for $script_path: type 'orchestrator resume' with the folder that it is in now"
prepare
trap 'on_signal HUP' HUP
trap 'on_signal INT' INT
trap 'on_signal TERM' TERM
trap 'on_signal USR1' USR1
trap 'on_signal USR2' USR2

if ((node_rank == 0)); then
  ((nodes == 1)) && head=127.0.0.1
  head=${head:-$HOSTNAME}
  find_last_attempt
  close_lost_attempt
  rm -f -- "$stop_file"
  claim_attempt
  if [[ -n $fixed_port ]]; then port=$fixed_port; else pick_port "$head" $((@{port_seed} + attempt * 101)); fi
  printf '%s:%s\n' "$head" "$port" >"$state/endpoint"
else
  join_attempt
fi
take_node_rank
rendezvous_id=$name.$attempt
log=$log_directory/node-$node_rank.attempt-$attempt.log
say "attempt $attempt, node $node_rank of $nodes, $processes_per_node process(es), rendezvous $rendezvous_id at $head:$port, log $log"

# A process group of its own: Ctrl-C in the terminal reaches this script only.
set -m
if [[ -n ${LAUNCH_QUIET:-} ]]; then
  start </dev/null >>"$log" 2>&1 &
else
  start </dev/null > >(tee -ia -- "$log") 2>&1 &
fi
process=$!
set +m
watcher=''
if ((nodes > 1 && node_rank == 0)); then
  name_missing_nodes &
  watcher=$!
fi
wait_for_end "$process"
[[ -z $watcher ]] || kill "$watcher" 2>/dev/null

! superseded || fail "attempt $attempt woke up after attempt $((attempt + 1)) had begun: leaving it alone"
if ((node_rank > 0)); then # node 0 judges for all
  for ((second = 0; second < 60; second++)); do
    [[ ! -s $state/verdict ]] || break
    sleep 1
  done
  read -r word verdict_code <"$state/verdict" || word='' verdict_code=1
else
  ask_verdict "$attempt" "$([[ -n $interrupted ]] && echo 130 || echo "$exit_code")"
  printf '%s %s\n' "$word" "$verdict_code" >"$state/verdict"
fi
say "attempt $attempt ended: ${word:-node 0 left no verdict}"
case $word in
  finished) exit 0 ;;
  requeue) exit 75 ;;
  stop) exit_stopped ;;
  *) exit 1 ;;
esac
