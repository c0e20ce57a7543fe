#!/usr/bin/env bash
# Reproduce the results of pages: bash docs/study/results.sh docs/study/frontier.md …
#
# Runs the commands in the sh blocks of the pages, in order, in the current folder. Finished runs
# and existing fact folders are skipped, and interrupted runs are resumed: after an interruption,
# start this script again. Two training runs (JOBS=2) go at a time, with one thread each. The
# output of the run OUT is in OUT.log.
set -euo pipefail
export OMP_NUM_THREADS=1
at_once=${JOBS:-2}
started=" "

wait_for_room() {
    while (( $(jobs -rp | wc -l) >= at_once )); do wait -n || true; done
}

train() {
    command python "$@" --resume >> "$out.log" 2>&1 || echo "failed: python $*; see $out.log" >&2
}

# Replaces `python` in the commands of the pages.
python() {
    local out="" model="" previous="" word
    for word in "$@"; do
        if [[ $previous = --out ]]; then out=$word; fi
        if [[ $previous = --model ]]; then model=$word; fi
        previous=$word
    done
    case "$1 ${2:-}" in
    "docs/study/frontier.py table" | "docs/study/frontier.py interpolate")
        wait
        command python "$@"
        ;;
    sft_*.py* | docs/study/frontier.py*)
        if [[ -z $out ]]; then wait; command python "$@"; return; fi
        if [[ -e $out/run.json ]]; then return; fi
        # The start model may be the result of a run that is not finished yet.
        if [[ $started = *" ${model%/before} "* ]]; then wait; fi
        wait_for_room
        mkdir -p "$(dirname "$out")"
        started+="$out "
        train "$@" &
        ;;
    make_facts.py*)
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
    # The runs of a block finish before the next block starts, so that a pattern like runs/a-[0-2]
    # matches them.
    eval "$(sed -n '/^```sh$/,/^```$/ { /^```sh$/d; s/^```$/wait/; p }' "$page")"
done
