"""How much of what a run forgot is one shared shift? Score it without the top of what changed.

    python assets/shift.py runs/baseline-0 facts/tiny-0 --directions 0 1 2 4 8
The change of each matrix of weights, Δ = θ_after − θ_before, is a sum of singular directions.
arXiv:2610.08718 restores most forgotten facts by taking out the first. Compare with
`eval_hallucination.py --interpolate`, which makes Δ smaller all round. Printed are the accuracies,
in %, on new facts and on held-out ones by kind, with the first N directions taken out of every
matrix; all else (vectors, stacked experts) is as it is after.
"""
import argparse
import copy
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval_hallucination
from eval_hallucination import evaluate, load_model, mean_by, read_sets


def take_out(before, after, directions):
    """θ_after less the first singular directions of θ_after − θ_before (matrices of one shape)."""
    if directions == 0:
        return after
    u, s, vh = torch.linalg.svd(after - before, full_matrices=False)
    return after - (u[:, :directions] * s[:directions]) @ vh[:directions]


def measure(run, facts, directions, device):
    """{number of directions: {what: accuracy in %}} of a run's folder and a fact folder."""
    model, tokenizer = load_model(run, device)
    before = load_model(f"{run}/before", device)[0].state_dict()
    after = copy.deepcopy(model.state_dict())
    rows = read_sets(facts, run)
    found = {}
    for n in directions:
        with torch.no_grad():
            for name, weight in model.state_dict().items():
                if weight.ndim == 2:
                    weight.copy_(take_out(before[name], after[name], n))
        found[n] = {"new": 100 * evaluate(model, tokenizer, rows["unknown"])["accuracy"]}
        right = evaluate(model, tokenizer, rows["heldout"])["right"]
        heldout = []
        for row, value in zip(rows["heldout"], right):
            heldout.append(row | {"right": value, "all": "held out"})
        for key in ("all", "kind"):
            found[n] |= mean_by(heldout, key, "right")
    return found


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.error = eval_hallucination.fail
    parser.add_argument("run", help="folder of a run, with its before/")
    parser.add_argument("facts", help="fact folder of make_facts.py")
    parser.add_argument("--directions", nargs="+", type=int, default=[0, 1, 2, 4, 8], metavar="N")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    if min(args.directions) < 0:
        eval_hallucination.fail(f"--directions {min(args.directions)}: must be 0 or more")
    for n, accuracies in measure(args.run, args.facts, args.directions, args.device).items():
        cells = [f"{name} {value:.1f}" for name, value in accuracies.items()]
        print(f"{args.run}, {n} directions out: {', '.join(cells)}")


if __name__ == "__main__":
    main()
