"""Measure what the methods cost in time and memory: the tables of docs/cost.md.

Random rows, and a model with random weights and the shape of gpt2-medium:
    python docs/study/bench.py
Your own model and fact folder; TRL's trainer is timed too if it is installed:
    python docs/study/bench.py --model DIR --facts facts/DIR
Labelling of a table of facts:
    python docs/study/bench.py --model DIR --labelling facts.tsv

Run it on an idle machine. Each training run is a process of its own, so that its peak memory can be
read. It makes two steps to warm up, and then --steps steps that are timed. The cases take turns,
--repeats times each. The fastest run of a case counts, because other load on the machine only adds
time. Labelling is timed in one process, with one few-shot prompt; the median counts. The output is
Markdown.
"""
import argparse
import functools
import importlib.util
import json
import math
import platform
import random
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))
import eval_hallucination
import make_facts
import sft_baseline
import sft_selfdistill

SHAPE = "the shape of gpt2-medium"
EVERYWHERE = "baseline, logits at all positions"
CASES = ["baseline", EVERYWHERE, "self-distillation", "TRL SFTTrainer"]
BRUTE_FORCE = "greedy answer and 16 samples by `generate`"
WARM_UP = 2             # steps


# ------------------------------------------------------------------------------------- training

def make_model(name):
    """Load a model in fp32 and eval mode, and its tokenizer (None for SHAPE); return both."""
    if name != SHAPE:
        return eval_hallucination.load_model(name)
    torch.manual_seed(0)
    config = transformers.GPT2Config(n_embd=1024, n_layer=24, n_head=16)
    return transformers.AutoModelForCausalLM.from_config(config).eval(), None


def make_rows(args, n):
    """Return `n` rows of the fact folder, without newlines: every trainer adds an EOS to them."""
    rows = []
    for key in ("known", "new"):
        path = f"{args.facts}/{eval_hallucination.SETS[key]}"
        for row in eval_hallucination.read_jsonl(path, ["prompt", "completion"]):
            rows.append({"prompt": row["prompt"], "completion": row["completion"].rstrip("\n")})
    random.Random(0).shuffle(rows)
    return (rows * math.ceil(n / len(rows)))[:n]


def make_examples(args, model, tokenizer, n):
    """Return `n` training examples: of the fact folder, or 40 random tokens, 10 in the CE."""
    if args.facts:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows.jsonl"
            eval_hallucination.write_jsonl(path, make_rows(args, n))
            return sft_baseline.read_examples(path, tokenizer, math.inf)
    rng = random.Random(0)
    examples = []
    for _ in range(n):
        ids = torch.tensor(rng.choices(range(model.config.vocab_size), k=40))
        examples.append({"input_ids": ids, "predicted": torch.ones_like(ids),
                         "completion": torch.arange(40) >= 30})
    return examples


def plain_loss(model, dtype, batch, counts):
    """Compute the loss of sft_baseline.py."""
    hidden = sft_baseline.last_hidden_state(model, batch, dtype)
    return sft_baseline.cross_entropy(model, hidden, batch, counts)


def loss_everywhere(model, dtype, batch, counts):
    """Compute the same loss from logits at all positions, as most trainers do."""
    hidden = sft_baseline.last_hidden_state(model, batch, dtype)
    targets = batch["input_ids"][:, 1:].flatten()
    is_target = torch.zeros_like(targets, dtype=torch.bool)
    is_target[batch["completion"]] = True
    targets = targets.masked_fill(~is_target, -100)
    logits = model.get_output_embeddings()(hidden)                              # (B · (T-1), V)
    ce = F.cross_entropy(logits, targets, reduction="sum") / counts["completion"]
    return ce, {"ce": ce}


def time_script(case, args):
    """Time a case of this project's scripts.

    Return {"seconds": per step, "cache": seconds to cache the teacher for the rows of a step,
    "flops": per step, of plain SFT only}.
    """
    module = sft_selfdistill if case == "self-distillation" else sft_baseline
    config = module.Config(batch_size=args.batch_size, learning_rate=1e-5, epochs=1, device="cpu",
                           dtype=args.dtype)
    model, tokenizer = make_model(args.model)
    n_steps = args.steps + WARM_UP
    examples = make_examples(args, model, tokenizer, args.batch_size * n_steps)
    cache = 0.0
    if case == "self-distillation":
        config.kl_weight = 4.0
        start = time.perf_counter()
        head = module.cache_teacher(model, examples, config)
        cache = (time.perf_counter() - start) / n_steps

        def loss(batch, counts):
            return module.self_distillation(model, head, batch, counts, config)
    else:
        function = loss_everywhere if case == EVERYWHERE else plain_loss
        loss = functools.partial(function, model, args.dtype)
    stamps = []         # from one loss to the next is a step

    def timed_loss(batch, counts):
        stamps.append(time.perf_counter())
        return loss(batch, counts)

    def run(examples):
        for _ in module.train_stage(2, model, examples, timed_loss, config, {"epoch": 0}):
            pass

    run(examples)
    seconds = step_time(stamps, args)
    flops = FlopCounterMode(display=False)
    if case == "baseline":
        with flops:
            run(examples[:config.batch_size])
    return {"seconds": seconds, "cache": cache, "flops": flops.get_total_flops()}


def step_time(stamps, args):
    """Return the seconds between stamps, without the first step, which warms up.

    Real rows differ in length: take the mean. Random rows do not: take the fastest step.
    """
    steps = [after - before for before, after in zip(stamps[1:], stamps[2:])]
    return statistics.mean(steps) if args.facts else min(steps)


def time_trl(args):
    """Time TRL's trainer with the same rows, batch size, precision and optimizer."""
    import datasets
    import trl
    stamps = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            stamps.append(time.perf_counter())

    n_steps = args.steps + WARM_UP
    with tempfile.TemporaryDirectory() as folder:
        settings = trl.SFTConfig(
            folder, per_device_train_batch_size=args.batch_size, max_steps=n_steps,
            learning_rate=1e-5, weight_decay=0.01, optim="adamw_torch_fused",
            bf16=args.dtype == "bfloat16", gradient_checkpointing=False, use_cpu=True,
            report_to="none", save_strategy="no", disable_tqdm=True, logging_strategy="no")
        model, tokenizer = make_model(args.model)
        rows = make_rows(args, args.batch_size * n_steps)
        trainer = trl.SFTTrainer(
            model, settings, train_dataset=datasets.Dataset.from_list(rows),
            processing_class=tokenizer, callbacks=[Clock()])
        trainer.train()
    return {"seconds": step_time(stamps, args), "cache": 0.0, "flops": 0}


def measure_case(args):
    """Time the case --one in this process; print the result as a JSON line."""
    found = time_trl(args) if args.one.startswith("TRL") else time_script(args.one, args)
    unit = 1 if sys.platform == "darwin" else 1024
    found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    print(json.dumps(found))


def matmul_rate(dtype, size=2048):
    """Return the speed of a square matrix product in FLOP/s, the best of ten."""
    a = torch.randn(size, size).to(dtype)
    b = torch.randn(size, size).to(dtype)
    best = math.inf
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - start)
    return 2 * size ** 3 / best


def bench_training(args, words, rate):
    """Run all cases in turns and print their table. words: the command line; rate: FLOP/s."""
    cases = args.cases
    if cases is None:
        trl = importlib.util.find_spec("trl") is not None and args.facts
        cases = CASES if trl else CASES[:3]
    found = {case: [] for case in cases}
    for _ in range(args.repeats):           # in turns: a slow minute affects all cases
        for case in cases:
            done = subprocess.run([sys.executable, __file__, "--one", case, *words],
                                  capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{case}: {done.stderr}")
            found[case].append(json.loads(done.stdout.splitlines()[-1]))
            print(case, found[case][-1], file=sys.stderr, flush=True)
    print(f"| {args.batch_size} rows per step, {args.steps} steps | step, s | / baseline (min–max "
          "over repeats) | peak memory, GB | peak / baseline | cache / epoch | speed / matmul |")
    print("|---|---|---|---|---|---|---|")
    base = found[cases[0]]
    for case, runs in found.items():
        pairs = list(zip(runs, base))
        ratios = sorted(run["seconds"] / other["seconds"] for run, other in pairs)
        best = min(run["seconds"] for run in runs)
        ratio = best / min(run["seconds"] for run in base)
        peak = statistics.median(run["peak"] for run in runs) / 1e9
        more = statistics.median(run["peak"] / other["peak"] for run, other in pairs)
        cache = statistics.median(run["cache"] / run["seconds"] for run in runs)
        speed = max(run["flops"] / run["seconds"] for run in runs) / rate
        print(f"| {case} | {best:.2f} | {ratio:.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f}) | "
              f"{peak:.2f} | {more:.2f} | {f'{cache:.2f}' if cache else ''} | "
              f"{f'{speed:.2f}' if speed else ''} |")


# ------------------------------------------------------------------------------------ labelling

def sample_answers(model, tokenizer, prefix, facts, samples=16):
    """Label facts by brute force after a few-shot text: a greedy answer and samples at T = 0.5."""
    stops = eval_hallucination.stop_ids(tokenizer, model)
    prompts = [prefix + make_facts.to_row(fact)["prompt"] for fact in facts]
    eval_hallucination.generate_answers(model, tokenizer, prompts)
    for prompt in prompts:
        ids = torch.tensor([eval_hallucination.tokenize(tokenizer, prompt)[0]])
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=0.5,
                       top_k=0, top_p=1.0, max_new_tokens=16, num_return_sequences=samples,
                       eos_token_id=stops, pad_token_id=stops[0])


def no_cache(model, ids, n):
    """Replace `make_facts.cache_prefix`: every row then contains the whole prompt."""
    return {}


def bench_labelling(args):
    """Print how many facts are labelled per second, with ten prompts of four exemplars."""
    model, tokenizer = make_model(args.model)
    facts = make_facts.load_source(args.labelling, 10 ** 6, 0)
    relation = min(fact["relation"] for fact in facts)
    facts = [fact for fact in facts if fact["relation"] == relation][:4 + args.label]
    shown = [make_facts.to_row(fact) for fact in facts[:4]]
    prefix = "".join(row["prompt"] + row["completion"] for row in shown)
    facts = facts[4:]
    few = facts[:4]         # brute force is slow

    def score():
        make_facts.score_answers(model, tokenizer, prefix, facts)

    def score_without_cache():
        cache_prefix = make_facts.cache_prefix
        make_facts.cache_prefix = no_cache
        score()
        make_facts.cache_prefix = cache_prefix

    def sample():
        sample_answers(model, tokenizer, prefix, few)

    cases = {"closed form, prefix run once": (score, len(facts)),
             "closed form, prefix run for every fact": (score_without_cache, len(facts)),
             BRUTE_FORCE: (sample, len(few))}
    seconds = {case: [] for case in cases}      # per fact
    for _ in range(args.repeats):
        for case, (work, n) in cases.items():
            start = time.perf_counter()
            work()
            seconds[case].append((time.perf_counter() - start) / n)
            print(case, seconds[case][-1], file=sys.stderr)
    print("| labelling, ten prompts of four exemplars | facts / s | speedup (min–max) |")
    print("|---|---|---|")
    for case, times in seconds.items():
        ratios = sorted(slow / fast for fast, slow in zip(times, seconds[BRUTE_FORCE]))
        print(f"| {case} | {0.1 / statistics.median(times):.2g} | "
              f"{statistics.median(ratios):.3g} ({ratios[0]:.3g}–{ratios[-1]:.3g}) |")


# ----------------------------------------------------------------------------------------- main

def main(argv=None):
    """Run the command line (list of str, default sys.argv)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default=SHAPE, help="hub name or folder (default: a random model)")
    add("--facts", help="fact folder from make_facts.py, for its rows")
    add("--labelling", metavar="TABLE", help="time the labelling of this table of facts instead")
    add("--label", type=int, default=256, help="facts of the table to label (default: 256)")
    add("--cases", nargs="*", choices=CASES, help="default: all that are possible")
    add("--batch-size", type=int, default=16, help="rows per step (default: 16)")
    add("--steps", type=int, default=3, help="timed steps of a run (default: 3)")
    add("--repeats", type=int, default=3, help="runs of each case (default: 3)")
    add("--dtype", default="float32", choices=["float32", "bfloat16"], help="autocast precision")
    add("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        measure_case(args)
        return
    rate = matmul_rate(getattr(torch, args.dtype))
    versions = [f"torch {torch.__version__}", f"transformers {transformers.__version__}"]
    if importlib.util.find_spec("trl"):
        versions.append(f"trl {importlib.import_module('trl').__version__}")
    print(f"{args.model}, {args.dtype}; {platform.machine()}, {torch.get_num_threads()} threads, "
          f"matrix product {rate / 1e9:.0f} GFLOP/s; {', '.join(versions)}; "
          f"{args.repeats} repeats\n", flush=True)
    if args.labelling:
        bench_labelling(args)
    else:
        bench_training(args, sys.argv[1:] if argv is None else argv, rate)


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")    # Windows would not print –
    main()
