"""Analyze why runs forgot: which facts were lost, to which answers, and how hidden states moved.

Plot forgetting by kind of held-out fact:
    python docs/study/why.py runs/baseline-[0-2] runs/uuid-[0-2] --of kind --plot kinds.png
Print where the wrong answers come from:
    python docs/study/why.py runs/baseline-[0-2] --of origin

Run it in the folder in which the runs were trained: it reads their data files. Runs named
GROUP-SEED are averaged: mean ± standard deviation. --kind name code makes one table and one panel
for each kind of held-out fact.
"""
import argparse
import functools
import json
import re
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import eval_hallucination
from eval_hallucination import SETS, fail, file_hash, normalize, note, read_jsonl, to_strings

# The origin of a wrong answer is the first of these that applies.
ORIGINS = ["a new fact that shares a word", "another new fact", "another fact", "no fact"]
LEARNED = [0.25, 0.5, 0.95]     # shares of new facts learned at which forgetting is compared
# --of: the columns x and y of the rows from `measure`, and their labels.
AXES = {
    "n_new": ("n_new", "lost", "number of new facts", "forgetting, points"),
    "learned": ("learned", "lost", "new facts learned", "forgetting, points"),
    "kind": ("kind", "lost", "kind of held-out fact", "forgetting, points"),
    "answer": ("answer in the name", "lost", "answer is part of the name", "forgetting, points"),
    "overlap": ("words shared", "lost", "words shared with new names", "forgetting, points"),
    "overlap-answers": ("words shared", "hit", "words shared with new names",
                        "wrong answers from a new fact that shares a word, %"),
    "origin": ("origin", "share", "origin", "newly wrong answers, %"),
    "drift": ("layer", "drift", "layer, 0 = embeddings", "drift, %"),
    "drift-lost": ("lost", "drift", "lost (1), unchanged (0) or gained (-1)", "drift, %"),
    "drift-groups": ("words shared", "drift", "words shared with new names", "drift, %"),
    "drift-epochs": ("epoch", "drift", "epoch of stage 2", "drift at half depth, %")}
NEED_DATA = ["overlap", "overlap-answers", "origin", "drift-groups"]


def answers_of(row):
    """Return the correct answers of a row (list of str)."""
    return to_strings(row.get("answers")) or to_strings(row.get("completion"))


# ------------------------------------------------------------------------ origin of wrong answers

def read_data(run):
    """Read the data files of a run: {"new", "known", "heldout": list of dicts}.

    Exit if a file is missing or has changed since the run was trained.
    """
    config = run["config"]
    named = {"new": config["train"], "known": config["known"], "heldout": config["heldout"]}
    sets = {key: [] for key in SETS}
    for key, expected in run.get("data", {}).items():
        path = named[key] or f"{config['facts']}/{SETS[key]}"
        if not Path(path).exists() or file_hash(path) != expected:
            fail(f"{path}: missing or changed since {run['name']} was trained; run this program in "
                 "the folder in which the run was trained")
        sets[key] = read_jsonl(path, ["prompt", "completion"])
    return sets


def subject_words(row):
    """Return the words of a fact's subject after `normalize` (set of str, empty if absent)."""
    return set(normalize(row.get("subject") or "").split())


def add_origins(run):
    """Add "words shared", "origin" and "chance" to the held-out facts of a run.

    words shared: number of the subject's words that occur in the subject of any new fact (str);
        "code" for codes, which are one word each
    origin: of a newly wrong answer, the first of ORIGINS that applies within its relation
    chance: {origin: share} if the answer were that of a random fact of the relation, drawn from
        the facts of all sets that have another answer
    With --known-only, new facts are the ones that were left out. None where undefined.
    """
    new_words = set()
    taught = defaultdict(set)           # (relation, answer): words of the new facts' subjects
    stated = set()                      # (relation, answer) of all facts
    first = defaultdict(Counter)        # relation: the first answers of its facts
    for key, rows in read_data(run).items():
        for row in rows:
            relation = row.get("relation")
            answers = [normalize(text) for text in answers_of(row)]
            first[relation].update(answers[:1])
            for answer in answers:
                stated.add((relation, answer))
                if key == "new":
                    taught[relation, answer] |= subject_words(row)
            if key == "new":
                new_words |= subject_words(row)

    def origin(relation, words, answer):
        """Return one of ORIGINS for a wrong answer about a subject with these words."""
        if (relation, answer) in taught:
            return ORIGINS[0] if words & taught[relation, answer] else ORIGINS[1]
        return ORIGINS[2] if (relation, answer) in stated else ORIGINS[3]

    for fact in run["facts"]:
        fact |= {"words shared": None, "origin": None, "chance": None}
        relation = fact.get("relation")
        words = subject_words(fact)
        if fact.get("kind") == "code":
            fact["words shared"] = "code"
        elif words and new_words:
            fact["words shared"] = str(len(words & new_words))
        if fact["right_before"] and not fact["right_after"]:
            fact["origin"] = origin(relation, words, normalize(fact["after"]))
            others = first[relation].copy()
            for answer in answers_of(fact):
                others.pop(normalize(answer), None)
            fact["chance"] = Counter()
            for answer, n in others.items():
                fact["chance"][origin(relation, words, answer)] += n / others.total()


def origin_rows(facts):
    """Return rows whose mean "share" by "origin" is the table of --of origin."""
    rows = []
    for fact in facts:
        for origin in ORIGINS if fact["origin"] else []:
            rows.append(fact | {"origin": origin, "share": fact["origin"] == origin})
            rows.append(fact | {"origin": f"{origin}, by chance", "share": fact["chance"][origin]})
    return rows


def learned_rows(metrics):
    """Return rows with what a run had lost ("lost") once it had learned each share of LEARNED.

    Methods that learn at different speeds compare fairly at equal learning. The first measured
    epoch that reaches the share counts. Runs that measured only before and after have no rows.
    """
    measured = [row for row in metrics if "kept" in row]
    rows = []
    for share in LEARNED if len(measured) > 2 else []:
        reached = [row for row in measured if row.get("new", 0) >= share]
        if reached:
            rows.append({"learned": f"{share:.0%}",
                         "lost": measured[0]["kept"] - reached[0]["kept"]})
    return rows


# ------------------------------------------------------------------------ drift of hidden states

def subject_states(path, beginnings, device, expected=None):
    """Return the hidden states at the last token of each text: a list over layers of (texts, d).

    Layer 0 is the embeddings; the last layer is after the final norm. Results are in fp32 on the
    CPU. Exit if the model at `path` does not have the `weights_hash` that is expected.
    """
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
        # Padded on the right, where a causal model never looks: no attention mask is needed.
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(model.device)
        with torch.no_grad():
            # base_model has no LM head: no logits are needed.
            states = model.base_model(input_ids=padded, output_hidden_states=True).hidden_states
        for layer, state in enumerate(states):      # (B, T, d); Gemma 3n: (streams, B, T, d)
            vectors = state[..., torch.arange(len(ids)), last, :].movedim(-2, 0)
            layers[layer].append(vectors.flatten(1).float().cpu())
    return [torch.cat(vectors) for vectors in layers.values()]


start_states = functools.cache(subject_states)      # several runs may start from one model


def drift_rows(run, of, device):
    """Return rows with the "drift" of held-out facts, 1 − cosine, in [0, 2].

    Compare the hidden states at the last token of the subject between the start model and the
    run's models. A causal model never looks ahead, so the prompt is truncated after the subject.
    of: "drift" gives one row per fact and layer; others give rows for the layer at half depth;
        "drift-epochs" gives them for before/ (epoch 0), each epoch-N/ and the final model
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
    before = start_states(run["start"], tuple(beginnings), device, run["weights"])
    folder = Path(run["name"])
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
                # Rounding can make the cosine of equal vectors larger than 1.
                for fact, value in zip(named, (1 - cosine).clamp(min=0).tolist()):
                    rows.append(fact | {"layer": layer, "epoch": epoch, "drift": value})
    return rows


# ------------------------------------------------------------------------------ tables and plots

def measure(run, of, device="auto"):
    """Return rows (list of dicts) with the columns x and y of AXES[of], for a run from `read_run`.

    lost: 1 if the fact was right before stage 2 and is wrong after it, -1 for the reverse, else 0
    hit: True if a newly wrong answer is that of a new fact that shares a word; None if not wrong
    answer in the name: "yes" if a correct answer is part of the subject, else "no"
    """
    if of == "learned":
        return learned_rows(run["metrics"])
    if of in NEED_DATA:
        add_origins(run)
    for fact in run["facts"]:
        fact |= {"lost": fact["right_before"] - fact["right_after"], "n_new": run.get("n_new")}
        if of == "overlap-answers":
            fact["hit"] = fact["origin"] == ORIGINS[0] if fact["origin"] else None
        name = f" {normalize(fact.get('subject') or '')} "
        inside = [f" {normalize(answer)} " in name for answer in answers_of(fact)]
        fact["answer in the name"] = "yes" if any(inside) else "no"
    if AXES[of][1] == "drift":
        return drift_rows(run, of, device)
    return origin_rows(run["facts"]) if of == "origin" else run["facts"]


def curves(runs, measured, of, kind=None):
    """Return the mean of y in percent by run and x: DataFrame with columns group, run, x and y.

    measured: rows of each run, from `measure`; kind: use only held-out facts of this kind
    With n_new as x, the number is removed from the names: runs that differ in it form one line.
    """
    x, y, *_ = AXES[of]
    parts = []
    for run, rows in zip(runs, measured):
        frame = pd.DataFrame(rows, columns=list(dict.fromkeys([x, y, "kind"])))
        if kind is not None:
            frame = frame[frame["kind"] == kind]
        frame = frame.dropna(subset=[x, y])
        means = 100 * frame[y].astype(float).groupby(frame[x]).mean()
        part = pd.DataFrame({x: means.index, y: means.array})
        for key in ("group", "name"):
            part[key] = run[key]
            if of == "n_new":
                part[key] = re.sub(f"-{run.get('n_new')}(?=-|$)", "", run[key])
        parts.append(part.rename(columns={"name": "run"}))
    return pd.concat(parts, ignore_index=True)


def tabulate(frame, of):
    """Return a frame of `curves` as a table with a row for each run and a column for each x."""
    x, y, *_ = AXES[of]
    table = frame.pivot_table(y, ["group", "run"], x, sort=False).sort_index(axis=1)
    if of == "origin":
        ordered = []
        for origin in ORIGINS:
            ordered += [origin, f"{origin}, by chance"]
        table = table.reindex(columns=ordered)
    return table


def to_json(table):
    """Convert the result of `tabulate` to {group: {x: [values of its runs]}}."""
    groups = {}
    for group, part in table.groupby(level="group", sort=False):
        columns = part.dropna(axis=1, how="all")
        groups[group] = {x: list(values.dropna()) for x, values in columns.items()}
    return groups


def new_figure(width, height):
    """Return an empty matplotlib Figure, sizes in inches; exit if matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        fail("--plot needs matplotlib: pip install matplotlib")
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path):
    """Write a Figure to a temporary file that is then renamed; the suffix is the format."""
    temporary = Path(f"{path}.tmp")
    try:
        figure.savefig(temporary, format=Path(path).suffix[1:], dpi=150)
    except ValueError as error:
        fail(f"--plot {path}: {error}")
    temporary.replace(path)


def plot(frames, of, path):
    """Plot the frames of `curves`, {y label: DataFrame}, side by side to a file."""
    x, y, x_label, _ = AXES[of]
    figure = new_figure(1 + 3.5 * len(frames), 3.8)
    axes = figure.subplots(1, len(frames), squeeze=False)[0]
    for axis, (y_label, frame) in zip(axes, frames.items()):
        eval_hallucination.draw_lines(axis, frame, x, y)
        axis.set(xlabel=x_label, ylabel=y_label)
        axis.margins(x=0.15)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center",
                  ncols=len(frames))
    save_figure(figure, path)


def parse_args(argv=None):
    """Parse the command line (list of str, default sys.argv)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    add = parser.add_argument
    add("runs", nargs="+", help="run folders of sft_*.py; GROUP-SEED folders are averaged")
    add("--of", choices=AXES, required=True, help="forgetting by number of new facts, at equal "
        "learning, by kind of fact, by answer in the name or by overlap of names; origin of wrong "
        "answers; drift of representations by layer, fact or epoch")
    add("--kind", nargs="+", default=[None], help="only held-out facts of these kinds: name, code")
    add("--plot", metavar="FILE.png", help="plot it too")
    add("--json", action="store_true", help="print JSON instead of tables")
    add("--device", default="auto",
        help="for drift: cuda, mps or cpu (default: the first one available)")
    return parser.parse_args(argv)


def main(argv=None):
    """Run the command line; report unreadable and unwritable files as one line on stderr."""
    args = parse_args(argv)
    _, _, x_label, y_label = AXES[args.of]
    try:
        runs = [eval_hallucination.read_run(folder) for folder in args.runs]
        eval_hallucination.check_groups(runs)
        measured = [measure(run, args.of, args.device) for run in runs]
        frames = {}
        for kind in args.kind:
            label = f"{y_label} ({kind}s)" if kind else y_label
            frames[label] = curves(runs, measured, args.of, kind)
        if all(frame.empty for frame in frames.values()):
            note(f"--of {args.of}: nothing to show: the runs lack such facts or measurements")
        if args.plot:
            plot(frames, args.of, args.plot)
    except OSError as error:
        fail(f"{error}")
    tables = {label: tabulate(frame, args.of) for label, frame in frames.items()}
    if args.json:
        print(json.dumps({label: to_json(table) for label, table in tables.items()}, indent=1))
        return
    for label, table in tables.items():
        groups = list(table.index.get_level_values("group"))
        eval_hallucination.print_table(
            f"{label}, by {x_label}", groups, table.to_dict("records"), ".1f")


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")    # Windows would not print ±
    main()
