"""The comparison of frontier.md: rivals that are no script of their own, the table, the picture.

A rival is a script of this project with one of its functions replaced; flags are the script's:
    python assets/frontier.py finch 1e-4 --facts facts/tiny --out runs/finch-1e-4-0
What became of runs whose folders are called TOOL-SETTING-SEED, at equal learning:
    python assets/frontier.py table runs/*-[0-2]* --plot frontier.png
"""
import argparse
import copy
import math
import sys
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval_hallucination
import sft_baseline
import sft_freeze
import sft_selfdistill

AT = [0.5, 0.8, 0.95, 0.98]         # shares of new facts learnt at which tools are compared
TOOLS = {
    "lr": "plain SFT, learning rate",
    "epochs": "plain SFT, epochs",
    "known": "known facts beside",
    "beside": "known facts beside self-distillation",
    "last": "known facts last, epochs",
    "interpolate": "plain SFT, interpolated, α",
    "l2": "L2 to before, W",
    "freeze": "freezing",
    "finch": "FINCH, κ",
    "lora": "LoRA, rank",
    "start": "KL to the start model, λ",
    "lambda": "self-distillation, λ",
    "distilled": "self-distillation λ, interpolated, α",
    "tau": "self-distillation, τ and λ",
    "anchors": "self-distillation and anchors, λ",
    "others": "self-distillation but for the target, λ",
    "rising": "self-distillation, rising λ",
    "until": "self-distillation, CE until learnt",
    "roles": "self-distillation of MLPs alone, λ",
    "twice": "self-distillation twice, λ",
}


# ------------------------------------------------------------------------------------ the rivals
# Each replaces functions of a script, and returns the script.

def finch(kappa):
    """sft_baseline.py with FINCH's learning rate, min(peak, κ / √(mean CE)): arXiv:2605.20005.

    The mean over steps is exponential, with .9; there is no warm-up and no decay. What a window
    loses is known only if it is one batch, and a resumed run would not know its mean."""
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
        if config.accumulate > 1 or config.resume:
            eval_hallucination.fail("finch: neither --accumulate nor --resume can be had with it")
        mean = last if step == 0 else 0.9 * mean + 0.1 * last
        return min(config.learning_rate, kappa / math.sqrt(mean))

    sft_baseline.cross_entropy = cross_entropy
    sft_baseline.get_lr = get_lr
    return sft_baseline


def lora(rank):
    """sft_baseline.py with LoRA (arXiv:2106.09685), of peft, on all linear layers but the head.

    What it saves are ordinary checkpoints, with the adapters merged into the weights."""
    import peft
    settings = peft.LoraConfig(r=int(rank), lora_alpha=2 * int(rank), target_modules="all-linear")
    run_stage = sft_baseline.run_stage
    save_checkpoint = sft_baseline.save_checkpoint
    tuners = {}         # model: its adapters

    def run_adapted(stage, model, examples, loss_function, config, state):
        if model not in tuners:
            torch.manual_seed(config.seed)      # of the adapters' first weights
            tuners[model] = peft.LoraModel(model, settings, "default").to(model.device)
        return run_stage(stage, model, examples, loss_function, config, state)

    def save_merged(folder, model, tokenizer):
        if model in tuners:
            model = copy.deepcopy(tuners[model]).merge_and_unload()
        save_checkpoint(folder, model, tokenizer)

    sft_baseline.run_stage = run_adapted
    sft_baseline.save_checkpoint = save_merged
    return sft_baseline


def roles(trained):
    """sft_selfdistill.py that trains parameters of some roles alone, as sft_freeze.py does."""
    load_model = sft_selfdistill.load_model

    def load_frozen(name, device):
        model, tokenizer = load_model(name, device)
        sft_freeze.freeze(model, argparse.Namespace(trainable=trained, layers=None))
        return model, tokenizer

    sft_selfdistill.load_model = load_frozen
    return sft_selfdistill


def rising(times):
    """sft_selfdistill.py whose λ rises in stage 2, exponentially, to so many times --kl-weight."""
    times = float(times)
    loss = sft_selfdistill.self_distillation
    get_lr = sft_selfdistill.get_lr
    progress = 0        # of the stage, 0 to 1

    def watched(step, total, config):
        nonlocal progress
        progress = (step + 1) / total % 1       # 0 again behind the last step of stage 1
        return get_lr(step, total, config)

    def self_distillation(model, teacher_head, batch, counts, config):
        weight = config.kl_weight * times ** progress
        return loss(model, teacher_head, batch, counts, replace(config, kl_weight=weight))

    sft_selfdistill.get_lr = watched
    sft_selfdistill.self_distillation = self_distillation
    return sft_selfdistill


def until(limit):
    """sft_selfdistill.py whose CE leaves out tokens with a probability above `limit`: learnt ones.

    In both stages."""
    limit = float(limit)

    def cross_entropy(model, hidden, batch, counts):
        mask = batch["supervised"][:, 1:]
        targets = batch["ids"][:, 1:][mask]
        logits = model.get_output_embeddings()(hidden[mask])
        ce = F.cross_entropy(logits.float(), targets, reduction="none")                 # (N,)
        unlearnt = (-ce.detach()).exp() < limit
        terms = {"ce": ce.sum() / counts["supervised"]}
        return (ce * unlearnt).sum() / counts["supervised"], terms

    sft_selfdistill.cross_entropy = cross_entropy
    return sft_selfdistill


def others(category):
    """sft_selfdistill.py whose KL leaves out the target at the answers of facts of a category.

    There it compares the distributions over all other tokens, so that CE alone decides about the
    target (the non-target part of arXiv:2203.08679). The KL is not taken in chunks."""

    def self_distillation(model, teacher_head, batch, counts, config):
        hidden = sft_selfdistill.last_hidden(model, batch)
        ce, terms = sft_selfdistill.cross_entropy(model, hidden, batch, counts)
        chosen = [example["row"].get("category") == category for example in batch["examples"]]
        chosen = torch.tensor(chosen, device=model.device)[:, None]
        real = batch["real"][:, 1:].bool()
        left_out = (batch["supervised"][:, 1:] & chosen)[real]                          # (M,)
        targets = batch["ids"][:, 1:][real]                                             # (M,)
        states = [example["teacher"] for example in batch["examples"]]
        teacher = torch.cat(states).to(model.device)                                    # (M, d)

        def without_target(head):
            def logits(states):
                values = head(states).clone()
                # With such a logit a token has probability 0, for teacher and student.
                values[left_out, targets[left_out]] = -1e4
                return values
            return logits

        kl = sft_selfdistill.kl_sum(
            hidden[real], teacher, without_target(model.get_output_embeddings()),
            without_target(teacher_head), config.temperature) / counts["real"]
        loss = ce + config.kl_weight * config.temperature ** 2 * kl
        return loss, terms | {"kl": kl}

    sft_selfdistill.self_distillation = self_distillation
    return sft_selfdistill


def anchors(path):
    """sft_selfdistill.py with more rows in the KL: the prompts of a JSONL file, of any questions.

    Nobody has to label them: the teacher answers, greedily, and what it answers is kept. They do
    not enter CE. None of them should be a question that is held out."""
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
            examples.append({"row": {"prompt": prompt}, "ids": ids, "real": torch.ones_like(ids),
                             "supervised": torch.zeros(len(ids), dtype=torch.bool)})
        return cache_teacher(model, examples, config)

    def cross_entropy_of_rows(model, hidden, batch, counts):
        # A window may consist of anchors alone.
        counts = counts | {"supervised": max(1, counts["supervised"])}
        return cross_entropy(model, hidden, batch, counts)

    sft_selfdistill.load_model = load
    sft_selfdistill.cache_teacher = cache_more
    sft_selfdistill.cross_entropy = cross_entropy_of_rows
    return sft_selfdistill


# --------------------------------------------------------------------------------- the frontier

def read_points(path):
    """{run's name: list of [epoch or α, new facts learnt, held-out accuracy]} of a path.

    path: a run's folder, a file of what eval_hallucination.py --interpolate has printed, or a
    file of many runs that --save has written. An epoch is an int, an α a float."""
    path = Path(path)
    if path.is_dir():
        points = []
        for row in eval_hallucination.read_run(path)["metrics"]:
            if row["epoch"] > 0 and "unknown" in row and "heldout" in row:
                points.append([row["epoch"], row["unknown"], row["heldout"]])
        return {path.name: points}
    rows = eval_hallucination.read_jsonl(path)
    if rows and "run" in rows[0]:
        return {row["run"]: row["points"] for row in rows}
    accuracies = defaultdict(dict)      # of each α: {set: accuracy}
    for row in rows:
        accuracies[row.get("interpolate")][row.get("set")] = row.get("accuracy")
    points = []
    for alpha, found in accuracies.items():
        if alpha is None or not {"unknown", "heldout"} <= set(found):
            eval_hallucination.fail(f"{path}: is not what --interpolate prints, or not all of it")
        points.append([alpha, found["unknown"], found["heldout"]])
    return {path.stem: points}


def gather(runs):
    """{tool: {(setting, epoch or α): array (seeds, 2) of new facts learnt, held-out accuracy}}.

    runs: {name: points}, of `read_points`, called TOOL-SETTING-SEED. Of a tool's settings, those
    with fewer seeds than others are left out: worlds differ, and a mean over fewer can win."""
    tools = {tool: defaultdict(list) for tool in TOOLS}
    for name, points in runs.items():
        tool, _, rest = name.partition("-")
        setting, _, seed = rest.rpartition("-")
        if tool not in TOOLS or not setting or not seed.isdigit():
            eval_hallucination.fail(f"{name}: must be called TOOL-SETTING-SEED, of {[*TOOLS]}")
        for x, learnt, kept in points:
            tools[tool][setting, x].append([learnt, kept])
    complete = {}
    for tool, settings in tools.items():
        most = max(map(len, settings.values()), default=0)
        for key, values in settings.items():
            if len(values) == most:
                complete.setdefault(tool, {})[key] = np.array(values)
    return complete


def best(settings, learnt):
    """What a tool keeps if it learns so much or more: ((setting, epoch or α), accuracy by seed).

    Of all settings and epochs it is the one that keeps most, in the mean over seeds; None if the
    tool never learns so much."""
    found = None
    for key, values in settings.items():
        new, kept = values.T
        if new.mean() >= learnt and (found is None or kept.mean() > found[1].mean()):
            found = key, kept
    return found


def print_table(tools):
    """Markdown: a tool a row, what it keeps at equal learning, with the setting that does."""
    rows = [["tool", "seeds", *[f"≥ {share:.0%} learnt" for share in AT]], ["---"] * (len(AT) + 2)]
    for tool, settings in tools.items():
        seeds = len(next(iter(settings.values())))
        row = [TOOLS[tool], str(seeds)]
        for share in AT:
            found = best(settings, share)
            if found is None:
                row.append("–")
                continue
            (setting, x), kept = found
            spread = f" ± {100 * kept.std(ddof=1):.1f}" if seeds > 1 else ""
            when = f"epoch {x}" if isinstance(x, int) else f"α {x:g}"
            row.append(f"{100 * kept.mean():.1f}{spread} ({setting}, {when})")
        rows.append(row)
    for row in rows:
        print(f"| {' | '.join(row)} |")


def draw(tools, path):
    """A PNG with a line a tool: what it keeps at most, if it learns so much or more."""
    figure = eval_hallucination.new_figure(9, 6)
    axis = figure.subplots()
    for i, (tool, settings) in enumerate(tools.items()):
        means = sorted(values.mean(axis=0).tolist() for values in settings.values())
        line = []
        for learnt, kept in reversed(means):        # from the most learnt to the least
            if not line or kept > line[-1][1]:
                line.append((learnt, kept))
        axis.plot(*zip(*line), f"C{i % 10}", linestyle="-:"[i // 10], marker=".",
                  drawstyle="steps-post", label=TOOLS[tool])
    axis.set(xlabel="new facts learnt, at least", ylabel="accuracy on known facts, held out",
             xlim=(0, 1.02))
    axis.legend(loc="lower left")
    eval_hallucination.save_figure(figure, path)


def main(argv=None):
    """Run a rival, or print the table of runs and draw its picture."""
    words = sys.argv[1:] if argv is None else argv
    rivals = [finch, lora, roles, rising, until, others, anchors]
    for rival in rivals:
        if words[:1] == [rival.__name__]:
            if len(words) < 2 or words[1].startswith("-"):
                eval_hallucination.fail(f"{rival.__name__}: its setting must come next")
            try:
                script = rival(words[1])
            except (ImportError, KeyError, ValueError) as error:
                eval_hallucination.fail(f"{rival.__name__} {words[1]}: {error!r}")
            # It says in run.json what was run, and is part of the default --out.
            script.METHOD += f"-{rival.__name__}-{words[1].replace('/', '-')}"
            return script.main(words[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.error = eval_hallucination.fail
    parser.add_argument("table", choices=["table", *[rival.__name__ for rival in rivals]])
    parser.add_argument("runs", nargs="+", help="folders, files of --interpolate or of --save")
    parser.add_argument("--save", metavar="FILE.jsonl", help="write the points of all runs")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the tools' lines")
    args = parser.parse_args(words)
    runs = {}
    for path in args.runs:
        for name, points in read_points(path).items():
            if name in runs:
                eval_hallucination.fail(f"{path}: there is a {name} before it")
            runs[name] = points
    tools = gather(dict(sorted(runs.items())))
    print_table(tools)
    if args.save:
        lines = [{"run": name, "points": points} for name, points in sorted(runs.items())]
        eval_hallucination.write_jsonl(Path(args.save), lines)
    if args.plot:
        draw(tools, args.plot)


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")
    main()
