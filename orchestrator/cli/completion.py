"""`completion`: the script that makes a shell complete verbs, options, groups, keys, experiments and run folders."""

from __future__ import annotations

import argparse

from orchestrator.cli.arguments import one_of
from orchestrator.cli.parser import VerbParser
from orchestrator.errors import EXIT_DONE

# The shells pass the words up to the cursor and read one candidate per line; only `complete` below knows the
# candidates. bash splits words at = and :, so a candidate must drop everything up to the last of these.
BASH = """\
_orchestrator() {
  local line=${COMP_LINE:0:COMP_POINT} current prefix
  local -a words
  read -ra words <<< "$line"
  [[ $line == *[[:space:]] ]] && words+=("")
  current=${words[${#words[@]}-1]}
  prefix=${current%"${current##*[=:]}"}
  COMPREPLY=()
  while IFS= read -r candidate; do
    COMPREPLY+=("${candidate#"$prefix"}")
  done < <("${words[0]}" complete -- "${words[@]:1}" 2>/dev/null)
  [[ ${#COMPREPLY[@]} -eq 1 && ${COMPREPLY[0]} == *[=./@] ]] && compopt -o nospace
}
complete -o default -o nosort -F _orchestrator orchestrator
"""
ZSH = """\
#compdef orchestrator
_orchestrator() {
  local -a candidates
  candidates=("${(@f)$("${words[1]}" complete -- "${(@)words[2,$CURRENT]}" 2>/dev/null)}")
  candidates=(${candidates:#})
  if (( ! ${#candidates} )); then
    _files
    return
  fi
  # Without a space behind what goes on: a key, a group, a folder.
  compadd -S '' -- ${(M)candidates:#*[=./@]}
  compadd -- ${candidates:#*[=./@]}
}
compdef _orchestrator orchestrator
"""
FISH = """\
function __orchestrator_complete
    set -l tokens (commandline -opc) (commandline -ct)
    $tokens[1] complete -- $tokens[2..-1] 2>/dev/null
end
complete -c orchestrator -a '(__orchestrator_complete)'
"""
SCRIPTS = {"bash": BASH, "zsh": ZSH, "fish": FISH}


def configure(parser: VerbParser) -> None:
    parser.takes = "bash, zsh or fish"
    parser.add_argument("shell", metavar="SHELL", type=one_of(*SCRIPTS), help="bash, zsh or fish")


def run(arguments: argparse.Namespace) -> int:
    print(SCRIPTS[arguments.shell], end="")
    return EXIT_DONE
