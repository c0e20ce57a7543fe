"""Measure how much of a run's forgetting is one shared shift: remove directions of the change.

    python docs/study/shift.py runs/baseline-0 facts/tiny-0 --directions 0 1 2 4 8

The change of each weight matrix, Δ = θ_after − θ_before, is a sum of singular directions.
arXiv:2610.08718 restores most forgotten facts by removing the first. This program removes the first
N directions of every matrix; other weights (vectors, stacked experts) keep their final values. It
prints accuracies in %, on new facts and on held-out facts, also by kind. For comparison,
`frontier.py interpolate` shrinks Δ in all directions.
"""
import argparse
import copy
import sys
from pathlib import Path

import pandas as pd
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
from eval_hallucination import evaluate, fail, load_model, read_sets


def remove_directions(before, after, n):
    """Return θ_after minus the first n singular directions of θ_after − θ_before (matrices)."""
    if n == 0:
        return after
    u, s, vh = torch.linalg.svd(after - before, full_matrices=False)
    return after - (u[:, :n] * s[:n]) @ vh[:n]


def measure(run, facts, directions, device):
    """Yield (number of removed directions, {set or kind: accuracy in %}).

    run: folder of a run; facts: fact folder; directions: list of int
    """
    model, tokenizer = load_model(run, device)
    before = load_model(f"{run}/before", device)[0].state_dict()
    after = copy.deepcopy(model.state_dict())
    rows = read_sets(facts, run)
    for n in directions:
        with torch.no_grad():
            for name, weights in model.state_dict().items():
                if weights.ndim == 2:
                    weights.copy_(remove_directions(before[name], after[name], n))
        new = evaluate(model, tokenizer, rows["new"])["accuracy"]
        heldout = pd.DataFrame(rows["heldout"])
        heldout["right"] = evaluate(model, tokenizer, rows["heldout"])["right"]
        accuracies = {"new": 100 * new, "held out": 100 * heldout["right"].mean()}
        if "kind" in heldout:
            accuracies |= (100 * heldout.groupby("kind")["right"].mean()).to_dict()
        yield n, accuracies


def main(argv=None):
    """Run the command line (list of str, default sys.argv)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    parser.add_argument("run", help="run folder of sft_*.py")
    parser.add_argument("facts", help="fact folder from make_facts.py")
    parser.add_argument("--directions", nargs="+", type=int, default=[0, 1, 2, 4, 8], metavar="N",
                        help="numbers of directions to remove (default: 0 1 2 4 8)")
    parser.add_argument("--device", default="auto",
                        help="cuda, mps or cpu (default: the first one available)")
    args = parser.parse_args(argv)
    if min(args.directions) < 0:
        fail(f"--directions {min(args.directions)}: must be 0 or more")
    for n, accuracies in measure(args.run, args.facts, args.directions, args.device):
        cells = [f"{name} {value:.1f}" for name, value in accuracies.items()]
        print(f"{args.run}, {n} directions removed: {', '.join(cells)}")


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")    # Windows would not print Δ
    main()
