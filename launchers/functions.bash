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
