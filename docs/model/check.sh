#!/usr/bin/env bash
# Checks the model exhaustively with spin (Debian package `spin`) and a C compiler; takes some minutes and 2 GB of memory.
#   check.sh            every property holds
#   check.sh --mutants  with a fault put into the model, the property that forbids it does not hold
# Exit codes: 0 as it should be, 1 not, 2 wrong usage, 69 spin or the compiler is missing.
set -euo pipefail
if [[ ${1:-} == --help || ${1:-} == -h ]]; then sed -n '2,/^set/{/^#/s/^# //p}' "$0"; exit 0; fi
case ${1:-} in '' | --mutants) ;; *) echo 'Usage: check.sh [--mutants]' >&2; exit 2 ;; esac
model=$(cd "$(dirname "$0")" && pwd)/cancel.pml
for program in spin cc; do
  command -v "$program" >/dev/null || { echo "$program is not installed" >&2; exit 69; }
done
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"

compile() { # file
  cp "$1" model.pml
  spin -a model.pml >spin.log || { cat spin.log >&2; exit 1; }
  cc -O2 -w -DNFAIR=5 -DCOLLAPSE -DMEMLIM=4096 -o pan pan.c
}

holds() { # property
  rm -f model.pml.trail
  ./pan -a -f -m1000000 -N "$1" >pan.log 2>&1 || true
  grep -q 'errors: [01]$' pan.log || { cat pan.log >&2; exit 1; }
  grep -q 'errors: 0$' pan.log && ! grep -q 'search depth too small\|out of memory' pan.log
}

check() {
  local failed=0 property
  compile "$model"
  for property in safe ends dies confirmed; do
    if holds "$property"; then
      echo "$property holds in all $(awk '/states, stored/ { print $1; exit }' pan.log) states"
    else
      echo "$property does NOT hold"
      grep -v '^$' pan.log | head -5
      [ ! -f model.pml.trail ] || spin -t -p -g model.pml | tail -60
      failed=1
    fi
  done
  return "$failed"
}

mutant() { # what, property, sed script
  sed "$3" "$model" >mutant.pml
  if cmp -s "$model" mutant.pml; then echo "the fault '$1' could not be put into the model" >&2; return 1; fi
  compile mutant.pml
  if holds "$2"; then echo "$1: NOT found"; return 1; fi
  echo "$1: found, $2 does not hold"
}

mutants() {
  local failed=0
  mutant 'a claim without its condition' safe 's/UP && CLAIMABLE && attempt < ATTEMPTS/UP \&\& attempt < ATTEMPTS/' || failed=1
  mutant 'a result without its run' safe 's/^#define MINE .*/#define MINE (status == processing)/' || failed=1
  mutant 'a result without its status' safe 's/^#define MINE .*/#define MINE (current == mine)/' || failed=1
  mutant 'a cancel that reads, then writes' safe \
    's/:: atomic { OPEN -> status = cancelled;/:: OPEN -> atomic { status = cancelled;/' || failed=1
  mutant 'a worker that never learns' dies '/TaskProcess.stop/d' || failed=1
  mutant 'no watchdog' dies 's/task\[w\] && LOST(w) -> task/false -> task/' || failed=1
  mutant 'no reconciler' ends '/\/\* added \*\/$/d' || failed=1
  mutant 'no sweep of lost workers' confirmed 's/GONE(owner) -> stopped/false -> stopped/' || failed=1
  return "$failed"
}

case "${1:-}" in
  '') check ;;
  --mutants) mutants ;;
esac
