#!/usr/bin/env bash
# Stage sft of demo-sft: 1 node(s) x 1 process(es) as a single process.
# Written by the orchestrator from run.json; change the configuration, not this file.
#   bash /runs/demo/scripts/sft.sh
# Exit codes: 0 done, 75 saved and wants to go on, 93 do not restart, 2 a mistake to mend, 1 crash, 3 could not start.
# shellcheck disable=SC2016,SC2317  # values are data, their dollars stay; the trap handlers are reached
set -uo pipefail

name=demo-sft
nodes=1
processes_per_node=1
python=/opt/venv/bin/python
command=(/opt/venv/bin/python -m orchestrator.worker /runs/demo/run.json --stage sft)
decide=(/opt/venv/bin/python -m orchestrator decide /runs/demo --stage sft)
container=()
working_directory=/runs/demo
script_path=/runs/demo/scripts/sft.sh
attempts_directory=/runs/demo/sft/attempts
log_directory=/runs/demo/sft/logs
result_file=/runs/demo/sft/result.json
stop_file=/runs/demo/sft/STOP

say() { printf '%s: %s\n' "$name" "$*" >&2; }
fail() {
  say "$*"
  exit 3
}

superseded() { # a script that was frozen may wake after the next attempt has begun
  [[ -n ${attempt:-} && -e $log_directory/attempt-$((attempt + 1)) ]]
}

request_stop() { # WHY: the ranks see this file, agree on it at a step boundary, save and end
  ! superseded || return 0
  [[ -s $stop_file ]] || printf 'signal %s\n' "$1" >"$stop_file"
  say "$1 received: asked the ranks to save and end ($stop_file)"
}

prepare() { # the folders and files that everything below needs
  cd -- "$working_directory" || fail "the run folder $working_directory is not there on $HOSTNAME"
  local program
  for program in "${decide[0]}" "$python"; do
    [[ -x $program || (-n ${container[*]-} && $program != "${decide[0]}") ]] ||
      fail "there is no Python at $program on $HOSTNAME: install the environment there, or mend 'python'"
  done
  mkdir -p -- "$log_directory" "$attempts_directory" || fail "cannot make $log_directory on $HOSTNAME"
  if [[ -e $result_file ]]; then
    say "nothing to do: $result_file is there"
    exit 0
  fi
}

find_last_attempt() { # sets last: the highest number that any start has used, 0 for none
  local path number
  last=0
  for path in "$log_directory"/attempt-* "$attempts_directory"/*.json; do
    number=${path##*/} number=${number#attempt-} number=${number%.json}
    if [[ $number =~ ^[1-9][0-9]{0,8}$ ]] && ((number > last)); then last=$number; fi
  done
}

identify() { # PID: boot, start time and namespace, which tell a process from a later one with its number; empty: it has ended
  local boot='' fields
  read -r boot 2>/dev/null </proc/sys/kernel/random/boot_id
  fields=$(cat -- "/proc/$1/stat" 2>/dev/null)
  read -ra fields <<<"${fields##*) }"
  [[ -z ${fields[0]-} || ${fields[0]} == [ZX] ]] || printf '%s %s %s\n' "$boot" "${fields[19]}" "$(readlink /proc/self/ns/pid)"
}

beats() { cat -- "$log_directory/attempt-$1"/node-*.alive 2>/dev/null; }

still_running() { # ATTEMPT: does somebody else work on it?
  local host='' process='' job='' identity='' before
  read -r host process job 2>/dev/null <"$log_directory/attempt-$1/claim"
  [[ -z $job || $job != "${SLURM_JOB_ID:-}" ]] || return 1
  identity=$(cat -- "$log_directory/attempt-$1/process" 2>/dev/null)
  if [[ -z $job && $host == "$HOSTNAME" && ${identity##* } == "$(readlink /proc/self/ns/pid)" ]]; then
    [[ $identity == "$(identify "$process")" ]]
    return
  fi
  before=$(beats "$1") # another machine, or a container of this one: only its files tell
  [[ -n $before ]] || return 1
  say "attempt $1 ($host${job:+, job $job}) has no end on record: listening 25 s for its ranks"
  sleep 25
  [[ $(beats "$1") != "$before" ]]
}

ask_verdict() { # ATTEMPT EXIT_CODE: closes the attempt; sets word (finished, requeue, retry, stop) and verdict_code
  local output code=$2 cause=() first=''
  # torchrun and srun change exit codes; the guards know. After an interrupt they only know what the interrupt did.
  (($2 == 130)) || first=$("${decide[0]}" -m launchers.causes "$log_directory" "$1")
  if [[ -n $first ]]; then
    code=${first%%$'\n'*} code=${code:-$2} cause=(--cause "${first#*$'\n'}")
  fi
  output=$("${decide[@]}" --attempt "$1" --exit-code "$code" ${cause[@]+"${cause[@]}"} </dev/null)
  verdict_code=$?
  word=${output##*$'\n'}
  [[ $output == "$word" ]] || printf '%s\n' "${output%$'\n'*}" >&2
  case $word in
    finished | requeue | retry | stop) ;;
    *)
      say "attempt $1 could not be judged: '${decide[*]}' answered '$word'"
      [[ -e $result_file ]] || exit 1
      word=finished # the result is written last of all
      ;;
  esac
}

exit_stopped() { # nothing of this kind is tried again: 2 where the user has something to mend
  ((verdict_code == 2)) && exit 2
  exit 93
}

close_lost_attempt() { # an attempt whose machine was lost gets its end on record before the next one starts
  ((last > 0)) && [[ ! -e $attempts_directory/$last.json ]] || return 0
  ! still_running "$last" || fail "attempt $last is still running ($(cat -- "$log_directory/attempt-$last/claim"))"
  say "attempt $last ended without a record (machine lost or killed): closing it"
  ask_verdict "$last" 255
  case $word in
    finished) exit 0 ;;
    stop) exit_stopped ;;
  esac
}

claim_attempt() { # sets attempt and state; the claim appears whole or not at all, so of two starts at one moment one is refused
  local new=$log_directory/.claim.$HOSTNAME.$$
  attempt=$((last + 1))
  { mkdir -p -- "$new" && identify "$$" >"$new/process" &&
    printf '%s %s %s\n' "$HOSTNAME" "$$" "${SLURM_JOB_ID:-}" >"$new/claim"; } || fail "cannot write in $log_directory on $HOSTNAME"
  until mv -T -- "$new" "$log_directory/attempt-$attempt" 2>/dev/null; do # a folder that holds a claim is never replaced
    [[ -e $log_directory/attempt-$attempt ]] || fail "cannot write in $log_directory on $HOSTNAME"
    if still_running "$attempt"; then
      rm -rf -- "$new"
      fail "attempt $attempt is still running ($(cat -- "$log_directory/attempt-$attempt/claim"))"
    fi
    attempt=$((attempt + 1))
  done
  state=$log_directory/attempt-$attempt
}

answers() { (exec 3<>"/dev/tcp/$1/$2") 2>/dev/null; } # HOST PORT

pick_port() { # HOST SEED: sets port; below the ephemeral range, another one for each job and attempt
  local try
  for ((try = 0; try < 64; try++)); do
    port=$((15000 + ($2 + try * 257) % 16000))
    answers "$1" "$port" || return 0
  done
  fail "64 ports from $((15000 + $2 % 16000)) on are taken on $1"
}

name_missing_nodes() { # after a while, say which nodes did not start
  local node missing=()
  sleep 45 >/dev/null 2>&1
  for ((node = 0; node < nodes; node++)); do
    [[ -e $state/node-$node ]] || missing+=("$node")
  done
  ((${#missing[@]} == 0)) || say "still waiting for node ${missing[*]} of 0..$((nodes - 1)): not started on it"
}

wait_for_end() { # PID: sets exit_code; a trap interrupts wait, so wait again
  local last_code
  while :; do
    wait "$1"
    exit_code=$?
    if ((exit_code <= 128)) || ! kill -0 "$1" 2>/dev/null; then break; fi
  done
  wait "$1" 2>/dev/null # where a trap came in the moment of the end, this tells the real code
  last_code=$?
  ((last_code == 127)) || exit_code=$last_code
}

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

start() { # one process: no torchrun, no distributed variables
  trap '' HUP INT TERM USR1 USR2
  exec ${container[@]+"${container[@]}"} "$python" -m launchers.guard --state "$state" \
    --stop-file "$stop_file" --nodes 1 --node 0 -- "${command[@]}" --attempt "$attempt"
}

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

export GREETING='it'"'"'s $HOME'
export HF_HUB_OFFLINE=1
export PYTHONSAFEPATH=1
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
export PYTHONUNBUFFERED="${PYTHONUNBUFFERED-1}"

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
  if [[ -n $fixed_port ]]; then port=$fixed_port; else pick_port "$head" $((10091 + attempt * 101)); fi
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
