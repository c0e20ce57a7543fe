"""Why did they forget? By what was taught; and how far did representations move?

    python assets/why.py runs/baseline-[0-2] runs/uuid-[0-2] --of kind --plot kinds.png
Runs that are named GROUP-SEED are one line: mean ± standard deviation. --kind name code looks at
held-out facts of one kind alone, with a table and a panel for each kind.
"""
import argparse
import functools
import json
import re
import sys
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval_hallucination
from eval_hallucination import accepted_answers, fail, join, mean_by, normalize, note, print_table

# What --of shows: the columns of a run's rows that are x and y, and the names of the axes.
AXES = {
    "number": ("number", "lost", "new facts trained on", "forgetting, points"),
    "kind": ("kind", "lost", "kind of held-out facts", "forgetting, points"),
    "answer": ("answer in the name", "lost", "the answer stands in the name", "forgetting, points"),
    "overlap": ("words shared", "lost", "words shared with new names", "forgetting, points"),
    "overlap-answers": ("words shared", "hit", "words shared with new names",
                        "wrong answers of a new fact that shares one, %"),
    "drift": ("layer", "drift", "layer, 0 = embeddings", "drift, %"),
    "drift-lost": ("lost", "drift", "forgotten (1), kept (0) or gained (-1)", "drift, %"),
    "drift-groups": ("words shared", "drift", "words shared with new names", "drift, %"),
    "drift-epochs": ("epoch", "drift", "epoch of stage 2", "drift at half depth, %")}


def measure(run, of, device="auto"):
    """Rows of the held-out facts of a run (of `read_run`), with what --of shows.

    That is drift (see there); hit: whether a new wrong answer is that of a new fact that shares a
    word, None for other facts; and answer in the name: "yes" if a right answer stands in its
    subject, or "no"."""
    for fact in run["facts"]:
        fact |= {"hit": None, "number": run.get("number")}
        if fact["origin"]:
            fact["hit"] = fact["origin"] == eval_hallucination.ORIGINS[0]
        name = f" {normalize(fact.get('subject') or '')} "
        inside = [f" {normalize(answer)} " in name for answer in accepted_answers(fact)]
        fact["answer in the name"] = "yes" if any(inside) else "no"
    if AXES[of][1] == "drift":
        return drift(run, of, device)
    return run["facts"]


def curves(runs, measured, of, kind=None):
    """What --of shows of runs (of `read_run`): {group: {x: [values of its runs]}}.

    measured: rows of each run, of `measure`; kind: of the facts to look at, None for all. Where x
    is a property of the run, as its number of new facts, it is taken out of the name of the group,
    so that runs which differ in it form one line.
    """
    groups, found = [], []
    key, value, *_ = AXES[of]
    for run, rows in zip(runs, measured):
        chosen = [row for row in rows if kind is None or row.get("kind") == kind]
        found.append(mean_by(chosen, key, value))
        # Of another x runs know nothing, and no name has a part "-None".
        groups.append(re.sub(f"-{run.get(key)}(?=-|$)", "", run["group"]))
    return join(groups, found)


def subject_states(path, beginnings, device, expected=None):
    """Hidden states at the last token of each text of a list: a list, per layer (texts, width).

    Layer 0 is the embeddings, the last comes after the final norm; fp32, on the CPU. path: a
    model's; expected: its `weights_hash`, refused if it has another."""
    import torch
    model, tokenizer = eval_hallucination.load_model(path, device)
    if expected and eval_hallucination.weights_hash(model) != expected:
        fail(f"{path}: is no longer the model that the run started from")
    layers = defaultdict(list)
    for first in range(0, len(beginnings), 32):
        ids = []
        for text in beginnings[first:first + 32]:
            ids.append(torch.tensor(eval_hallucination.tokenize(tokenizer, text)[0]))
        last = torch.tensor([len(tokens) - 1 for tokens in ids])
        # Padded on the right, which a causal model does not see: it needs no attention mask.
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(model.device)
        with torch.no_grad():
            # Of the model without its head: no logits are needed.
            states = model.base_model(input_ids=padded, output_hidden_states=True).hidden_states
        for layer, state in enumerate(states):      # (B, T, d); Gemma 3n: (streams, B, T, d)
            vectors = state[..., torch.arange(len(ids)), last, :].movedim(-2, 0)
            layers[layer].append(vectors.flatten(1).float().cpu())
    return [torch.cat(vectors) for vectors in layers.values()]


start_states = functools.cache(subject_states)      # several runs may start from one model


def drift(run, of, device):
    """How far the model's states of held-out subjects have moved: rows with drift, 1 − cosine.

    Compared are the hidden states at the subject's last token in the question, of the model that
    the run started from and of its own. of: "drift", rows of each fact and layer; else of each
    fact at half depth; "drift-epochs": before stage 2 (0), after each epoch of it that was kept by
    --save-every-epoch, and at the end. What follows the subject does not matter to a causal model,
    so the prompt is cut behind it.
    """
    import torch
    named = []
    beginnings = []
    for fact in run["facts"]:
        question = fact["prompt"].removesuffix("\nA:")
        subject = fact.get("subject")
        if subject and subject in question:
            named.append(fact)
            beginnings.append(question[:question.rindex(subject) + len(subject)])
    if not named:
        return []
    folder = Path(run["name"])
    start = folder.resolve() / run["start"]
    if not start.exists():                          # a name on the hub
        start = run["start"]
    before = start_states(start, tuple(beginnings), device, run["weights"])
    paths = {run["config"]["epochs"]: folder}       # epoch: its model
    if of == "drift-epochs":
        paths[0] = folder / "before"
        for path in folder.glob("epoch-[0-9]*"):
            paths[int(path.name.removeprefix("epoch-"))] = path
    rows = []
    for epoch, path in paths.items():
        after = subject_states(path, beginnings, device)
        for layer, states in enumerate(before):
            if of == "drift" or layer == len(before) // 2:
                cosine = torch.cosine_similarity(states, after[layer])
                for fact, value in zip(named, (1 - cosine).tolist()):
                    rows.append(fact | {"layer": layer, "epoch": epoch, "drift": value})
    return rows


def main(argv=None):
    """Print and draw what command-line words (list of str) ask for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    add = parser.add_argument
    add("runs", nargs="+", help="run folders of the sft_*.py scripts; GROUP-SEED share a line")
    add("--of", choices=AXES, required=True, help="forgetting by number of new facts, kind "
        "of fact or overlap of names; how far representations drift; …")
    add("--kind", nargs="+", default=[None], help="held-out facts of these kinds: name, code")
    add("--plot", metavar="FILE.png", help="draw it, too")
    add("--json", action="store_true", help="print JSON instead of tables")
    add("--device", default="auto", help="of drift: cuda, mps or cpu (default: the first there is)")
    args = parser.parse_args(argv)
    try:
        runs = [eval_hallucination.read_run(folder) for folder in args.runs]
        eval_hallucination.compare(runs)            # it refuses groups whose settings differ
        measured = [measure(run, args.of, args.device) for run in runs]
        panels = {}
        _, _, x_title, y_title = AXES[args.of]
        for kind in args.kind:
            title = f"{y_title} ({kind}s)" if kind else y_title
            panels[x_title, title] = curves(runs, measured, args.of, kind)
        if not any(any(lines.values()) for lines in panels.values()):
            note(f"--of {args.of}: nothing to show; it takes held-out facts, with kinds, and "
                 "new ones, with subjects to share words with")
        if args.plot:
            eval_hallucination.save_figure(eval_hallucination.draw(panels), args.plot)
        if args.json:
            print(json.dumps({title: lines for (_, title), lines in panels.items()}, indent=1))
            return
        for (_, title), lines in panels.items():
            print_table(f"{title}, by {x_title}", lines, ".1f")
    except OSError as error:
        fail(f"{error}")


if __name__ == "__main__":
    eval_hallucination.print_well()
    main()
