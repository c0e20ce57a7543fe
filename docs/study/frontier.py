"""Compare methods at equal learning: held-out accuracy once a share of the new facts is learned.

Train with another method, implemented here by replacing functions of an sft_*.py script (the
other flags are the script's):
    python docs/study/frontier.py finch 1e-4 --facts facts/tiny --out runs/finch-1e-4-0
        finch κ, lora RANK          change sft_baseline.py
        roles ROLES, rising TIMES, until P, others CATEGORY, anchors FILE.jsonl
                                    change sft_selfdistill.py
Score models between a run's stage-1 model and its final model:
    python docs/study/frontier.py interpolate runs/baseline-tiny-0 --facts facts/tiny --alpha 0.7
Print the table of runs in folders named TOOL-SETTING-SEED, and plot it:
    python docs/study/frontier.py table runs/*-[0-2]* --plot frontier.png
"""
import argparse
import copy
import math
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import eval_hallucination
import sft_baseline
import sft_freeze
import sft_selfdistill
from eval_hallucination import fail
from why import new_figure, save_figure

AT = [0.5, 0.8, 0.95, 0.98]         # shares of new facts learned at which methods are compared
TOOLS = {
    "lr": "plain SFT, by learning rate",
    "epochs": "plain SFT, by epochs",
    "known": "plain SFT, by number of known facts",
    "beside": "self-distillation, by number of known facts",
    "last": "known facts last, by epochs",
    "interpolate": "plain SFT, interpolated, by α",
    "l2": "L2 to the stage-1 weights, by W",
    "l2loss": "earlier form of L2, a term of the loss",
    "freeze": "freezing",
    "finch": "FINCH, by κ",
    "lora": "LoRA, by rank",
    "start": "KL to the start model, by λ",
    "lambda": "self-distillation, by λ",
    "distilled": "self-distillation, interpolated, by λ and α",
    "tau": "self-distillation, by τ and λ",
    "anchors": "self-distillation with anchors, by λ",
    "others": "self-distillation, target excluded from the KL, by λ",
    "rising": "self-distillation, rising λ",
    "until": "self-distillation, CE until learned",
    "roles": "self-distillation of MLPs only, by λ",
    "twice": "self-distillation twice, by λ",
}


# -------------------------------------------------------------------------------- other methods
# Each function takes a setting (str), replaces functions of a script, and returns the script.

def finch(kappa):
    """Change sft_baseline.py to the learning rate of FINCH: min(peak, κ / √(mean CE)).

    arXiv:2605.20005. The mean over steps is exponential, with decay 0.9. There is no warmup and no
    decay of the learning rate. The CE of a step is known only if the step is a single batch, and
    the mean is lost if the run is interrupted.
    """
    kappa = float(kappa)
    plain_loss = sft_baseline.cross_entropy
    mean = last = None

    def cross_entropy(model, hidden, batch, counts):
        nonlocal last
        ce, terms = plain_loss(model, hidden, batch, counts)
        last = ce.item()
        return ce, terms

    def get_lr(step, total, config):
        nonlocal mean
        if config.gradient_accumulation_steps > 1 or (mean is None and step > 0):
            fail("finch: works neither with --gradient-accumulation-steps nor with --resume; "
                 "delete an interrupted run")
        mean = last if step == 0 else 0.9 * mean + 0.1 * last
        return min(config.learning_rate, kappa / math.sqrt(mean))

    sft_baseline.cross_entropy = cross_entropy
    sft_baseline.get_lr = get_lr
    return sft_baseline


def lora(rank):
    """Change sft_baseline.py to LoRA (arXiv:2106.09685) on all linear layers but the LM head.

    Uses peft. Adapters are merged into the weights before saving, so checkpoints are ordinary.
    """
    import peft
    settings = peft.LoraConfig(r=int(rank), lora_alpha=2 * int(rank), target_modules="all-linear")
    train_stage = sft_baseline.train_stage
    save_checkpoint = sft_baseline.save_checkpoint
    tuners = {}         # model: its adapters

    def train_adapters(stage, model, examples, loss_function, config, state):
        if model not in tuners:
            torch.manual_seed(config.seed)      # for the initial weights of the adapters
            tuners[model] = peft.LoraModel(model, settings, "default").to(model.device)
        return train_stage(stage, tuners[model], examples, loss_function, config, state)

    def save_merged(folder, model, tokenizer):
        if model in tuners:
            model = copy.deepcopy(tuners[model]).merge_and_unload()
        save_checkpoint(folder, model, tokenizer)

    sft_baseline.train_stage = train_adapters
    sft_baseline.save_checkpoint = save_merged
    return sft_baseline


def roles(trained):
    """Change sft_selfdistill.py to train only parameters of some roles, as sft_freeze.py does."""
    load_model = sft_selfdistill.load_model

    def load_frozen(name, device):
        model, tokenizer = load_model(name, device)
        sft_freeze.freeze(model, argparse.Namespace(trainable=trained, layers=None))
        return model, tokenizer

    sft_selfdistill.load_model = load_frozen
    return sft_selfdistill


def rising(times):
    """Change sft_selfdistill.py: λ rises exponentially in stage 2, by this factor in total."""
    times = float(times)
    loss = sft_selfdistill.self_distillation
    make_steps = sft_selfdistill.make_steps
    get_lr = sft_selfdistill.get_lr
    progress = 0        # share of the stage's steps that are done

    def start_epoch(examples, stage, epoch, config):
        nonlocal progress
        progress = (epoch - 1) / config.epochs
        return make_steps(examples, stage, epoch, config)

    def end_step(step, total, config):
        nonlocal progress
        progress = (step + 1) / total
        return get_lr(step, total, config)

    def self_distillation(model, teacher_head, batch, counts, config):
        weight = config.kl_weight * times ** progress
        return loss(model, teacher_head, batch, counts, replace(config, kl_weight=weight))

    sft_selfdistill.make_steps = start_epoch
    sft_selfdistill.get_lr = end_step
    sft_selfdistill.self_distillation = self_distillation
    return sft_selfdistill


def until(limit):
    """Change sft_selfdistill.py to skip tokens in the CE whose probability is `limit` or more.

    These tokens are learned. Applies to both stages.
    """
    limit = float(limit)

    def cross_entropy(model, hidden, batch, counts):
        targets = batch["input_ids"][:, 1:].flatten()[batch["completion"]]
        logits = model.get_output_embeddings()(hidden[batch["completion"]])
        ce = F.cross_entropy(logits, targets, reduction="none")                         # (N,)
        unlearned = (-ce.detach()).exp() < limit
        terms = {"ce": ce.sum() / counts["completion"]}
        return (ce * unlearned).sum() / counts["completion"], terms

    sft_selfdistill.cross_entropy = cross_entropy
    return sft_selfdistill


def others(category):
    """Change sft_selfdistill.py to exclude the target from the KL on answers of a category.

    There the KL compares the distributions over all other tokens, so that only the CE decides
    about the target (the non-target part of arXiv:2203.08679). The KL is not split into chunks.
    """
    def self_distillation(model, teacher_head, batch, counts, config):
        hidden = sft_selfdistill.last_hidden_state(model, batch, config.dtype)
        ce, terms = sft_selfdistill.cross_entropy(model, hidden, batch, counts)
        chosen = [example["row"].get("category") == category for example in batch["examples"]]
        chosen = torch.tensor(chosen, device=model.device)                              # (B,)
        predicted = batch["predicted"]                                                  # (M,)
        row = predicted // (batch["input_ids"].shape[1] - 1)
        excluded = torch.isin(predicted, batch["completion"]) & chosen[row]
        targets = batch["input_ids"][:, 1:].flatten()[predicted]                        # (M,)
        states = [example["teacher"] for example in batch["examples"]]
        teacher = torch.cat(states).to(model.device)                                    # (M, d)

        def without_target(head):
            def logits(states):
                values = head(states).clone()
                # With this logit a token has probability 0, for teacher and student alike.
                values[excluded, targets[excluded]] = -1e4
                return values
            return logits

        kl = sft_selfdistill.kl_sum(
            hidden[predicted], teacher, without_target(model.get_output_embeddings()),
            without_target(teacher_head), config.temperature) / counts["predicted"]
        loss = ce + config.kl_weight * config.temperature ** 2 * kl
        return loss, terms | {"kl": kl}

    sft_selfdistill.self_distillation = self_distillation
    return sft_selfdistill


def anchors(path):
    """Change sft_selfdistill.py to add the prompts of a JSONL file to the KL, but not to the CE.

    They need no answers: the teacher generates them greedily. None of the prompts should be a
    held-out question.
    """
    prompts = [row["prompt"] for row in eval_hallucination.read_jsonl(path)]
    cache_teacher = sft_selfdistill.cache_teacher
    cross_entropy = sft_selfdistill.cross_entropy
    load_model = sft_selfdistill.load_model
    tokenizer = None

    def load(name, device):
        nonlocal tokenizer
        model, tokenizer = load_model(name, device)
        return model, tokenizer

    def cache_more(model, examples, config):
        answers = eval_hallucination.generate_answers(model, tokenizer, prompts)
        for prompt, answer in zip(prompts, answers):
            ids = sum(sft_selfdistill.tokenize(tokenizer, prompt, f" {answer}\n"), [])
            ids = torch.tensor(ids)
            examples.append({"row": {"prompt": prompt}, "input_ids": ids,
                             "predicted": torch.ones_like(ids),
                             "completion": torch.zeros(len(ids), dtype=torch.bool)})
        return cache_teacher(model, examples, config)

    def cross_entropy_of_rows(model, hidden, batch, counts):
        # A step may consist of anchors only.
        counts = counts | {"completion": max(1, counts["completion"])}
        return cross_entropy(model, hidden, batch, counts)

    sft_selfdistill.load_model = load
    sft_selfdistill.cache_teacher = cache_more
    sft_selfdistill.cross_entropy = cross_entropy_of_rows
    return sft_selfdistill


METHODS = {method.__name__: method
           for method in (finch, lora, roles, rising, until, others, anchors)}


def run_method(name, words):
    """Train with one of METHODS; words: its setting, then the flags of the script."""
    if not words or words[0].startswith("-"):
        fail(f"{name}: must be followed by its setting")
    setting, *flags = words
    try:
        script = METHODS[name](setting)
    except (ImportError, KeyError, ValueError) as error:
        fail(f"{name} {setting}: {error!r}")
    # METHOD is stored in run.json and is part of the default --out.
    script.METHOD += f"-{name}-{setting.replace('/', '-')}"
    script.main(flags)


# -------------------------------------------------------------------------------- interpolation

def interpolate(args):
    """Score, and save with --out, models between a run's stage-1 model and its final model.

    Their weights are θ_before + α · (θ_after − θ_before): WiSE-FT, arXiv:2109.01903. This takes
    memory for three models, in fp32.
    """
    sets = eval_hallucination.read_sets(args.facts, args.run)
    model, tokenizer = eval_hallucination.load_model(args.run, args.device)
    before = eval_hallucination.load_model(f"{args.run}/before", args.device)[0].state_dict()
    after = copy.deepcopy(model.state_dict())
    for alpha in args.alpha:
        with torch.no_grad():
            for name, weights in model.state_dict().items():
                if weights.is_floating_point():
                    weights.copy_(torch.lerp(before[name], after[name], alpha))
        eval_hallucination.print_accuracies(model, tokenizer, sets, 64, interpolate=alpha)
    if args.out:
        temporary = Path(f"{args.out}.tmp")
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.replace(args.out)
        print(f"saved {args.out}")


# ------------------------------------------------------------------------------------- the table

def read_points(path):
    """Read the points of a path: {run's name: list of [epoch or α, new, kept]}.

    path: a run's folder, a file with the output of `interpolate`, or a file written by --save,
    which holds many runs. An epoch is an int, α is a float.
    """
    path = Path(path)
    if path.is_dir():
        points = []
        for row in eval_hallucination.read_run(path)["metrics"]:
            if row["epoch"] > 0 and "new" in row and "kept" in row:
                points.append([row["epoch"], row["new"], row["kept"]])
        return {path.name: points}
    rows = eval_hallucination.read_jsonl(path)
    if rows and "run" in rows[0]:
        return {row["run"]: row["points"] for row in rows}
    accuracies = defaultdict(dict)      # α: {set: accuracy}
    for row in rows:
        accuracies[row.get("interpolate")][row.get("set")] = row.get("accuracy")
    points = []
    for alpha, found in accuracies.items():
        if alpha is None or not {"new", "heldout"} <= set(found):
            fail(f"{path}: is not the complete output of frontier.py interpolate")
        points.append([alpha, found["new"], found["heldout"]])
    return {path.stem: points}


def average(runs):
    """Average the points of runs over seeds: DataFrame with columns tool, at, seeds, new, kept, sd.

    runs: {name: points}, from `read_points`, with names like TOOL-SETTING-SEED
    at: setting and epoch or α; new, kept: mean accuracies; sd: standard deviation of kept
    Omit the settings of a tool that have fewer seeds than others: worlds differ in difficulty, so
    a mean over fewer of them may be higher by chance.
    """
    rows = []
    for name, points in runs.items():
        tool, _, rest = name.partition("-")
        setting, _, seed = rest.rpartition("-")
        if tool not in TOOLS or not setting or not seed.isdigit():
            fail(f"{name}: must be named TOOL-SETTING-SEED, where TOOL is one of {[*TOOLS]}")
        for x, new, kept in points:
            when = f"epoch {x}" if isinstance(x, int) else f"α {x:g}"
            rows.append({"tool": tool, "at": f"{setting}, {when}", "new": new, "kept": kept})
    points = pd.DataFrame(rows).groupby(["tool", "at"], sort=False)
    means = points.agg(seeds=("kept", "size"), new=("new", "mean"), kept=("kept", "mean"),
                       sd=("kept", "std")).reset_index()
    most = means.groupby("tool")["seeds"].transform("max")
    return means[means["seeds"] == most]


def best(means, learned):
    """Return the row that keeps most among those that learned at least `learned`; None if none.

    means: rows of one tool, from `average`
    """
    enough = means[means["new"] >= learned]
    return None if enough.empty else enough.loc[enough["kept"].idxmax()]


def print_table(means):
    """Print a Markdown table: what each tool keeps at equal learning, and with which setting."""
    rows = [["tool", "seeds", *[f"≥ {share:.0%} learned" for share in AT]], ["---"] * (len(AT) + 2)]
    for tool, label in TOOLS.items():
        own = means[means["tool"] == tool]
        if own.empty:
            continue
        row = [label, str(own["seeds"].iloc[0])]
        for share in AT:
            found = best(own, share)
            if found is None:
                row.append("–")
                continue
            spread = f" ± {100 * found['sd']:.1f}" if found["seeds"] > 1 else ""
            row.append(f"{100 * found['kept']:.1f}{spread} ({found['at']})")
        rows.append(row)
    for row in rows:
        print(f"| {' | '.join(row)} |")


def plot(means, path):
    """Plot what each tool keeps at most if it learns at least a given share, as a step line."""
    figure = new_figure(11, 5)
    axis = figure.subplots()
    tools = [tool for tool in TOOLS if tool in set(means["tool"])]
    for i, tool in enumerate(tools):
        # From the most learned to the least, keep the points that no later point improves on.
        own = means[means["tool"] == tool].sort_values(["new", "kept"], ascending=False)
        own = own[own["kept"] > own["kept"].cummax().shift(fill_value=-1)]
        axis.plot(own["new"], own["kept"], f"C{i % 10}", linestyle="-:"[i // 10], marker=".",
                  drawstyle="steps-post", label=TOOLS[tool])
    axis.set(xlabel="new facts learned, at least", ylabel="held-out accuracy", xlim=(0, 1.02))
    figure.legend(loc="outside right center")
    save_figure(figure, path)


def compare(args):
    """Print the table of runs, save their points and plot them."""
    runs = {}
    for path in args.runs:
        for name, points in read_points(path).items():
            if name in runs:
                fail(f"{path}: {name} was read before")
            runs[name] = points
    runs = dict(sorted(runs.items()))
    if not any(runs.values()):
        fail(f"{args.runs}: no run was evaluated after an epoch")
    means = average(runs)
    print_table(means)
    if args.save:
        rows = [{"run": name, "points": points} for name, points in runs.items()]
        eval_hallucination.write_jsonl(args.save, rows)
    if args.plot:
        plot(means, args.plot)


# ------------------------------------------------------------------------------------------ main

def parse_args(words):
    """Parse the command line (list of str) of `table` or `interpolate`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND",
                                     help=f"interpolate, table, {', '.join(METHODS)}")
    table = commands.add_parser("table", help="compare runs at equal learning")
    table.add_argument("runs", nargs="+", help="run folders, or files from interpolate or --save")
    table.add_argument("--save", metavar="FILE.jsonl", help="save the points of all runs")
    table.add_argument("--plot", metavar="FILE.png", help="plot a line for each tool")
    between = commands.add_parser("interpolate", help="score interpolated models")
    between.add_argument("run", help="run folder of sft_*.py")
    between.add_argument("--facts", required=True, help="fact folder from make_facts.py")
    between.add_argument("--alpha", nargs="+", type=float, required=True, metavar="α",
                         help="0: the stage-1 model; 1: the final model")
    between.add_argument("--out", metavar="DIR", help="new folder for the model of a single α")
    between.add_argument("--device", default="auto",
                         help="cuda, mps or cpu (default: the first one available)")
    for part in (parser, table, between):
        part.error = fail
    args = parser.parse_args(words)
    if args.command == "interpolate":
        if not all(0 <= alpha <= 1 for alpha in args.alpha):
            fail(f"--alpha {args.alpha}: must be from 0 to 1")
        if args.out and (len(args.alpha) > 1 or Path(args.out).exists()):
            fail(f"--out {args.out}: must be a new folder, for a single --alpha")
    return args


def main(argv=None):
    """Run the command line (list of str, default sys.argv)."""
    words = sys.argv[1:] if argv is None else argv
    if words and words[0] in METHODS:
        run_method(words[0], words[1:])
        return
    args = parse_args(words)
    try:
        {"interpolate": interpolate, "table": compare}[args.command](args)
    except OSError as error:
        fail(f"{error}")


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")    # Windows would not print λ
    main()
