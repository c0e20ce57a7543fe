#!/usr/bin/env bash
# Make what stands on pages again: bash assets/results.sh assets/frontier.md …
# Runs the commands of their sh blocks, in order, here. Runs and fact folders that exist are left as they are, so that it goes on where
# it was interrupted. Training runs go two at a time (JOBS=2), with a thread each; what they print is in OUT.log.
set -euo pipefail
export OMP_NUM_THREADS=1
at_once=${JOBS:-2}
started=" "

wait_for_room() {
    while (( $(jobs -rp | wc -l) >= at_once )); do wait -n || true; done
}

train() {
    command python "$@" --overwrite > "$out.log" 2>&1 || echo "failed: python $*; see $out.log" >&2
}

python() {
    local out="" model="" previous="" word
    for word in "$@"; do
        if [[ $previous = --out ]]; then out=$word; fi
        if [[ $previous = --model ]]; then model=$word; fi
        previous=$word
    done
    case $1 in
    sft_*.py | assets/frontier.py)
        if [[ ${2:-} = table || -z $out ]]; then wait; command python "$@"; return; fi
        if [[ -e $out/run.json ]]; then return; fi
        # It may start from what a run leaves that is still going on.
        if [[ $started = *" ${model%/before} "* ]]; then wait; fi
        wait_for_room
        mkdir -p "$(dirname "$out")"
        started+="$out "
        train "$@" &
        ;;
    make_facts.py)
        if [[ -e $out/meta.json ]]; then return; fi
        wait_for_room
        command python "$@" > /dev/null
        ;;
    *)
        wait
        echo "\$ python $*" >&2
        command python "$@"
        ;;
    esac
}

for page in "$@"; do
    # A block's runs have ended before the next begins: a pattern like runs/a-[0-2] is expanded then.
    eval "$(sed -n '/^```sh$/,/^```$/ { /^```sh$/d; s/^```$/wait/; p }' "$page")"
done
