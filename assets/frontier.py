"""The comparison of frontier.md: rivals that are no script of their own, the table, the picture.

A rival is a script of this project with one of its functions replaced; flags are the script's:
    python assets/frontier.py finch 1e-4 --facts facts/tiny --out runs/finch-1e-4-0
What became of runs whose folders are called TOOL-SETTING-SEED, at equal learning:
    python assets/frontier.py table runs/*-[0-2]* --plot frontier.png
"""
import argparse
import math
import sys
from collections import defaultdict
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
    "beside": "known facts beside self-distillation, λ 6",
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
    "anchors": "self-distillation and anchors",
    "others": "self-distillation but for the target",
    "rising": "self-distillation, rising λ",
    "until": "self-distillation, CE until learnt",
    "roles": "self-distillation of MLPs alone, λ",
    "long": "self-distillation, λ and epochs",
}


# ------------------------------------------------------------------------------------ the rivals

def finch(kappa):
    """FINCH (arXiv:2605.20005): learning rate min(peak, κ / √(mean CE)), of sft_baseline.py.

    The mean is exponential, with .9. Batches must be whole windows (--accumulate 1)."""
    mean = None
    plain_loss = sft_baseline.cross_entropy

    def cross_entropy(model, hidden, batch, counts):
        nonlocal mean
        ce, terms = plain_loss(model, hidden, batch, counts)
        mean = ce.item() if mean is None else 0.9 * mean + 0.1 * ce.item()
        return ce, terms

    def get_lr(step, total, config):
        return min(config.learning_rate, float(kappa) / math.sqrt(mean))

    sft_baseline.cross_entropy = cross_entropy
    sft_baseline.get_lr = get_lr
    return sft_baseline


def lora(rank):
    """LoRA (Hu et al. 2021) on all linear layers, by peft, of sft_baseline.py.

    What it saves is an ordinary checkpoint, with the adapters merged into the weights."""
    import peft
    load_model = sft_baseline.load_model
    save_checkpoint = sft_baseline.save_checkpoint

    def load_adapted(name, device):
        model, tokenizer = load_model(name, device)
        settings = peft.LoraConfig(r=int(rank), lora_alpha=2 * int(rank),
                                   target_modules="all-linear")
        model.requires_grad_(False)
        peft.inject_adapter_in_model(settings, model)
        return model, tokenizer

    def save_merged(folder, model, tokenizer):
        plain, _ = load_model(model.name_or_path, "cpu")
        for name, module in model.named_modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                change = module.get_delta_weight("default").detach().cpu()
                plain.get_submodule(name).weight.data += change
        save_checkpoint(folder, plain, tokenizer)

    sft_baseline.load_model = load_adapted
    sft_baseline.save_checkpoint = save_merged
    return sft_baseline


def roles(trained):
    """Self-distillation that trains the parameters of one role alone, in both stages."""
    load_model = sft_selfdistill.load_model

    def load_frozen(name, device):
        model, tokenizer = load_model(name, device)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(sft_freeze.role_of(name) == trained)
        return model, tokenizer

    sft_selfdistill.load_model = load_frozen
    return sft_selfdistill


def rising(times):
    """λ rises over stage 2, from --kl-weight to so many times that, exponentially."""
    loss = sft_selfdistill.self_distillation
    get_lr = sft_selfdistill.get_lr
    share = 0

    def watched(step, total, config):
        nonlocal share
        share = (step + 1) / total
        return get_lr(step, total, config)

    def self_distillation(model, teacher_head, batch, counts, config):
        now = argparse.Namespace(**vars(config))
        now.kl_weight = config.kl_weight * float(times) ** share
        return loss(model, teacher_head, batch, counts, now)

    sft_selfdistill.get_lr = watched
    sft_selfdistill.self_distillation = self_distillation
    return sft_selfdistill


def until(limit):
    """CE leaves out tokens that the model gives a probability above `limit`: they are learnt."""

    def cross_entropy(model, hidden, batch, counts):
        mask = batch["supervised"][:, 1:]
        targets = batch["ids"][:, 1:][mask]
        logits = model.get_output_embeddings()(hidden[mask])
        ce = F.cross_entropy(logits.float(), targets, reduction="none")                 # (N,)
        unlearnt = (-ce.detach()).exp() < float(limit)
        terms = {"ce": ce.sum() / counts["supervised"]}
        return (ce * unlearnt).sum() / counts["supervised"], terms

    sft_selfdistill.cross_entropy = cross_entropy
    return sft_selfdistill


def others(category):
    """At answers of facts of a category the KL leaves the target out: it compares other tokens.

    The target's logit is one with which both distributions give it probability 0, so that CE
    alone decides about it (the non-target part of Zhao et al. 2022, arXiv:2203.08679)."""

    def self_distillation(model, teacher_head, batch, counts, config):
        hidden = sft_selfdistill.last_hidden(model, batch)
        ce, terms = sft_selfdistill.cross_entropy(model, hidden, batch, counts)
        new = [example["row"]["category"] == category for example in batch["examples"]]
        real = batch["real"][:, 1:].bool()
        left_out = (batch["supervised"][:, 1:] & torch.tensor(new)[:, None])[real]      # (M,)
        targets = batch["ids"][:, 1:][real]                                             # (M,)
        teacher = torch.cat([example["teacher"] for example in batch["examples"]])
        head = model.get_output_embeddings()

        def without_target(some_head):
            def logits(states):
                values = some_head(states)
                hidden_targets = F.one_hot(targets, values.shape[1]).bool() & left_out[:, None]
                return values.masked_fill(hidden_targets, -1e4)
            return logits

        kl = sft_selfdistill.kl_sum(hidden[real], teacher, without_target(head),
                                    without_target(teacher_head), config.temperature)
        kl = kl / counts["real"]
        loss = ce + config.kl_weight * config.temperature ** 2 * kl
        return loss, terms | {"kl": kl}

    sft_selfdistill.self_distillation = self_distillation
    return sft_selfdistill


def anchors(path):
    """KL on prompts besides the rows, of a JSONL file: whatever the teacher answers is kept.

    Nobody labels them. They have no completion, so they do not enter CE."""
    cache_teacher = sft_selfdistill.cache_teacher
    cross_entropy = sft_selfdistill.cross_entropy
    load_model = sft_selfdistill.load_model
    tokenizer = None

    def load(name, device):
        nonlocal tokenizer
        model, tokenizer = load_model(name, device)
        return model, tokenizer

    def cache_more(model, examples, config):
        for row in eval_hallucination.read_jsonl(path, ["prompt"]):
            ids = torch.tensor(sft_selfdistill.tokenize(tokenizer, row["prompt"])[0])
            examples.append({"row": row, "ids": ids, "real": torch.ones_like(ids),
                             "supervised": torch.zeros(len(ids), dtype=torch.bool)})
        return cache_teacher(model, examples, config)

    def cross_entropy_of_rows(model, hidden, batch, counts):
        counts = counts | {"supervised": counts["supervised"].clamp(min=1)}
        return cross_entropy(model, hidden, batch, counts)

    sft_selfdistill.load_model = load
    sft_selfdistill.cache_teacher = cache_more
    sft_selfdistill.cross_entropy = cross_entropy_of_rows
    return sft_selfdistill


# --------------------------------------------------------------------------------- the frontier

def read_points(path):
    """{run's name: list of [epoch or α, new facts learnt, held-out facts kept]} of a path.

    path: a run's folder, a file of what eval_hallucination.py --interpolate has printed, or a
    file that `main` has written, of many runs."""
    path = Path(path)
    if path.is_dir():
        rows = eval_hallucination.read_run(path)["metrics"]
        points = [[row["epoch"], row["unknown"], row["heldout"]] for row in rows[1:]
                  if "heldout" in row]
        return {path.name: points}
    rows = eval_hallucination.read_jsonl(path)
    if "run" in rows[0]:
        return {row["run"]: row["points"] for row in rows}
    shares = defaultdict(dict)
    for row in rows:
        shares[row["interpolate"]][row["set"]] = row["accuracy"]
    points = [[share, row["unknown"], row["heldout"]] for share, row in shares.items()]
    return {path.stem: points}


def gather(runs):
    """{tool: {(setting, epoch or α): array (seeds, 2) of new facts learnt and held out kept}}.

    runs: {name: points}, of `read_points`, called TOOL-SETTING-SEED."""
    tools = {tool: defaultdict(list) for tool in TOOLS}
    for name, points in runs.items():
        tool, _, rest = name.partition("-")
        setting, _, seed = rest.rpartition("-")
        if tool not in TOOLS or not seed.isdigit():
            eval_hallucination.fail(f"{name}: must be called TOOL-SETTING-SEED, of {[*TOOLS]}")
        for x, learnt, kept in points:
            tools[tool][setting, x].append([learnt, kept])
    for settings in tools.values():
        for key, values in settings.items():
            settings[key] = np.array(values)
    return {tool: settings for tool, settings in tools.items() if settings}


def best(points, share):
    """What a tool keeps if it learns `share`: ((setting, epoch or α), held out kept, by seed).

    That which keeps most, in means over the seeds; None if it never learns so much."""
    found = None
    for key, values in points.items():
        learnt, kept = values.T
        if learnt.mean() >= share and (found is None or kept.mean() > found[1].mean()):
            found = key, kept
    return found


def print_table(tools):
    """Markdown: a tool a row, what it keeps at equal learning, with the setting that does."""
    rows = [["tool", *[f"{share:.0%} learnt" for share in AT]], ["---"] * (len(AT) + 1)]
    for tool, points in tools.items():
        row = [TOOLS[tool]]
        for share in AT:
            found = best(points, share)
            if found is None:
                row.append("–")
                continue
            (setting, x), kept = found
            spread = f" ± {100 * kept.std(ddof=1):.1f}" if len(kept) > 1 else ""
            row.append(f"{100 * kept.mean():.1f}{spread} ({setting}, {x})")
        rows.append(row)
    for row in rows:
        print(f"| {' | '.join(row)} |")


def draw(tools, path):
    """A PNG with a line a tool: its points that no other point of it beats, means over seeds."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(9, 6), layout="constrained")
    axis = figure.subplots()
    for i, (tool, points) in enumerate(tools.items()):
        means = sorted(values.mean(axis=0).tolist() for values in points.values())
        line = []
        for learnt, kept in reversed(means):        # from the most learnt to the least
            if not line or kept > line[-1][1]:
                line.append((learnt, kept))
        axis.plot(*zip(*line), f"C{i % 10}" + "-:"[i // 10], marker=".", label=TOOLS[tool])
    axis.set(xlabel="new facts learnt", ylabel="known facts kept, held out", xlim=(0, 1.02))
    axis.legend(loc="lower left")
    temporary = Path(f"{path}.tmp")
    figure.savefig(temporary, format="png", dpi=110)
    temporary.replace(path)


def main(argv=None):
    """Run a rival, or print the table of runs and draw its picture."""
    words = sys.argv[1:] if argv is None else argv
    rivals = [finch, lora, roles, rising, until, others, anchors]
    for rival in rivals:
        if words[:1] == [rival.__name__]:
            return rival(words[1]).main(words[2:])
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=["table", *[rival.__name__ for rival in rivals]])
    parser.add_argument("runs", nargs="+", help="folders, files of --interpolate or of --save")
    parser.add_argument("--save", metavar="FILE.jsonl", help="write the points of all runs")
    parser.add_argument("--plot", metavar="FILE.png", help="draw the tools' lines")
    args = parser.parse_args(words)
    runs = {}
    for path in args.runs:
        runs |= read_points(path)
    tools = gather(dict(sorted(runs.items())))
    print_table(tools)
    if args.save:
        lines = [{"run": name, "points": points} for name, points in sorted(runs.items())]
        eval_hallucination.write_jsonl(Path(args.save), lines)
    if args.plot:
        draw(tools, args.plot)


if __name__ == "__main__":
    main()
