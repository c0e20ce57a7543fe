"""What the methods cost, as ratios of runs that alternate on one machine. Run by hand, on an idle one:

    python tests/bench.py                                      a model of gpt2-medium's shape with random weights, random rows
    python tests/bench.py --model DIR --facts facts/DIR        your model and fact folder; with TRL's trainer, where installed
    python tests/bench.py --model DIR --facts facts/DIR --labelling facts.tsv

Each training run is a process of its own, for its peak memory: optimizer steps to warm up, then --steps. A case's
time is that of its fastest run: a shared machine adds to it and never takes away. Labelling is timed in one process, behind one of the
ten prompts, by the median. The result, in Markdown, is that of assets/cost.md."""
import argparse
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
import transformers
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import eval_hallucination
import make_facts
import sft_baseline
import sft_selfdistill

SHAPE = "the shape of gpt2-medium"
CASES = ["baseline", "baseline, logits everywhere", "self-distillation", "TRL SFTTrainer"]


def make_model(name):
    """(model in fp32 and eval mode, tokenizer or None)."""
    if name != SHAPE:
        return eval_hallucination.load_model(name)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(transformers.GPT2Config(n_embd=1024, n_layer=24, n_head=16)).eval(), None


def make_rows(args, n):
    """`n` rows of the fact folder; the completions without newline, for which every trainer adds EOS."""
    rows = [row for name in ("train_known", "train_unknown") for row in eval_hallucination.read_jsonl(f"{args.facts}/{name}.jsonl")]
    rows = [{"prompt": row["prompt"], "completion": row["completion"].rstrip("\n")} for row in rows]
    random.Random(0).shuffle(rows)
    return (rows * math.ceil(n / len(rows)))[:n]


def time_scripts(case, args):
    """A run of one of this project's scripts: {"seconds" a step, "cache" seconds for the rows of a step, "flops" a step}."""
    module = sft_selfdistill if case == "self-distillation" else sft_baseline
    config = module.Config(batch_size=args.batch_size, learning_rate=1e-5, epochs=1, device="cpu", dtype=args.dtype)
    model, tokenizer = make_model(args.model)
    n = args.batch_size * (args.steps + 2)
    if args.facts:
        with tempfile.TemporaryDirectory() as folder:
            rows = Path(folder) / "rows.jsonl"
            rows.write_text("".join(json.dumps(row) + "\n" for row in make_rows(args, n)))
            examples = module.read_examples(rows, tokenizer, math.inf)
    else:                                                                   # 40 tokens, of which ten are supervised
        draw, examples = random.Random(0), []
        for _ in range(n):
            ids = torch.tensor(draw.choices(range(model.config.vocab_size), k=40))
            examples.append({"ids": ids, "real": torch.ones_like(ids), "supervised": torch.arange(40) >= 30})
    cache = 0.0
    loss = lambda batch, counts: module.cross_entropy(model, module.last_hidden(model, batch), batch, counts)
    if case.endswith("everywhere"):
        def loss(batch, counts):
            logits = model(input_ids=batch["ids"], attention_mask=batch["real"], use_cache=False).logits[:, :-1]
            mask = batch["supervised"][:, 1:]
            ce = torch.nn.functional.cross_entropy(logits[mask].float(), batch["ids"][:, 1:][mask], reduction="sum") / counts["supervised"]
            return ce, {"ce": ce}
    if module is sft_selfdistill:
        config.kl_weight, started = 4.0, time.perf_counter()
        head = module.cache_teacher(model, examples, config)
        cache = time.perf_counter() - started
        loss = lambda batch, counts: module.self_distillation(model, head, batch, counts, config)
    stamps = []
    clocked = lambda batch, counts: stamps.append(time.perf_counter()) or loss(batch, counts)
    run = lambda examples: list(module.run_stage(2, model, examples, clocked, config, {"epoch": 0}))
    run(examples)                                                           # from loss to loss is a step
    seconds = time_of(stamps, args)
    flops = FlopCounterMode(display=False)
    if case == "baseline":
        with flops:
            run(examples[:config.batch_size])
    return {"seconds": seconds, "cache": cache / (args.steps + 2), "flops": flops.get_total_flops()}


def time_of(stamps, args):
    """Seconds from stamp to stamp, a step each, the first of which warms up: real rows differ in length, so the mean; of equal
    steps the fastest, to which the machine added least."""
    steps = [after - before for before, after in zip(stamps[1:], stamps[2:])]
    return statistics.mean(steps) if args.facts else min(steps)


def time_trl(args):
    """The same rows in TRL's trainer: batch, precision, optimizer as here; its own defaults for the rest."""
    import datasets
    import trl
    stamps = []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, *_, **__):
            stamps.append(time.perf_counter())
    with tempfile.TemporaryDirectory() as folder:
        settings = trl.SFTConfig(
            folder, per_device_train_batch_size=args.batch_size, max_steps=args.steps + 2, learning_rate=1e-5, weight_decay=0.01,
            optim="adamw_torch_fused", bf16=args.dtype == "bfloat16", gradient_checkpointing=False, use_cpu=True, report_to="none",
            save_strategy="no", disable_tqdm=True, logging_strategy="no")
        model, tokenizer = make_model(args.model)
        rows = make_rows(args, args.batch_size * (args.steps + 2))
        trl.SFTTrainer(model, settings, train_dataset=datasets.Dataset.from_list(rows), processing_class=tokenizer,
                       callbacks=[Clock()]).train()
    return {"seconds": time_of(stamps, args), "cache": 0.0, "flops": 0}


def product_rate(dtype, size=2048):
    """Measured rate of a square matrix product (FLOP/s): the best of ten."""
    a, b, best = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype), math.inf
    for _ in range(10):
        started = time.perf_counter()
        a @ b
        best = min(best, time.perf_counter() - started)
    return 2 * size ** 3 / best


def sample_answers(model, tokenizer, prefix, facts, batch_size, samples):
    """Brute-force labelling behind one few-shot prompt: the greedy answer, and `samples` at temperature ½, of each fact."""
    stops = eval_hallucination.stop_ids(tokenizer, model)
    prompts = [prefix + make_facts.to_row(fact)["prompt"] for fact in facts]
    eval_hallucination.generate_answers(model, tokenizer, prompts, batch_size=batch_size)
    for prompt in prompts:
        ids = torch.tensor([eval_hallucination.tokenize(tokenizer, prompt)[0]])
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=0.5, top_k=0, top_p=1.0, max_new_tokens=16,
                       num_return_sequences=samples, eos_token_id=stops, pad_token_id=stops[0])


def labelling(args):
    """Facts a second by ten prompts of four exemplars: in closed form, with the prefix's KV cache shared or not, and sampled."""
    model, tokenizer = make_model(args.model)
    facts, _ = make_facts.load_source(args.labelling, 10 ** 6, 0)
    relation = min(fact["relation"] for fact in facts)
    facts = [fact for fact in facts if fact["relation"] == relation][:4 + args.label]
    shown = [make_facts.to_row(fact) for fact in facts[:4]]
    prefix, facts = "".join(row["prompt"] + row["completion"] for row in shown), facts[4:]
    few = facts[:4]

    def score_whole():
        model.keeps_prefix = False              # as if no cache could be gone on from
        found = make_facts.score_answers(model, tokenizer, prefix, facts)
        model.keeps_prefix = True
        return found
    cases = {"closed form, prefix run once": lambda: make_facts.score_answers(model, tokenizer, prefix, facts),
             "closed form, prefix run for every fact": score_whole,
             "greedy and 16 samples by `generate`": lambda: sample_answers(model, tokenizer, prefix, few, 64, 16)}
    seconds = {case: [] for case in cases}
    for _ in range(args.repeats):
        for case, work in cases.items():
            started = time.perf_counter()
            work()
            seconds[case].append((time.perf_counter() - started) / len(few if "generate" in case else facts))
            print(case, seconds[case][-1], file=sys.stderr)
    slowest = seconds["greedy and 16 samples by `generate`"]
    print("| labelling, ten prompts of four exemplars | facts / s | ratio (min–max) |\n|---|---|---|")
    for case, times in seconds.items():
        ratios = sorted(b / a for a, b in zip(times, slowest))
        print(f"| {case} | {0.1 / statistics.median(times):.2g} | {statistics.median(ratios):.3g} ({ratios[0]:.3g}–{ratios[-1]:.3g}) |")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=SHAPE)
    parser.add_argument("--facts", help="fact folder of make_facts.py, for its rows")
    parser.add_argument("--labelling", help="time the labelling of this table of facts instead")
    parser.add_argument("--label", type=int, default=256, help="how many facts of it, by the closed form")
    parser.add_argument("--cases", nargs="*", choices=CASES)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        found = time_trl(args) if args.one.startswith("TRL") else time_scripts(args.one, args)
        found["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return print(json.dumps(found))
    rate = product_rate(getattr(torch, args.dtype))
    versions = {library: __import__(library).__version__ for library in ("torch", "transformers", "trl") if importlib.util.find_spec(library)}
    print(f"{args.model}, {args.dtype}; {platform.machine()}, {torch.get_num_threads()} threads, matrix product "
          f"{rate / 1e9:.0f} GFLOP/s; {', '.join(f'{k} {v}' for k, v in versions.items())}; {args.repeats} repeats\n", flush=True)
    if args.labelling:
        return labelling(args)
    cases = args.cases or [case for case in CASES if not case.startswith("TRL") or ("trl" in versions and args.facts)]
    found = {case: [] for case in cases}
    for _ in range(args.repeats):                                           # alternating: a slow minute of the machine hits all
        for case in cases:
            words = [sys.executable, __file__, "--one", case, *(sys.argv[1:] if argv is None else argv)]
            done = subprocess.run(words, capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{case}: {done.stderr}")
            found[case].append(json.loads(done.stdout.splitlines()[-1]))
            print(case, found[case][-1], file=sys.stderr, flush=True)
    print(f"| {args.batch_size} rows a step, {args.steps} steps | step, s | / baseline (paired, min–max) | peak, GB | peak / baseline | cache / epoch | "
          "achieved / product |\n|---|---|---|---|---|---|---|")
    for case, runs in found.items():
        ratios = sorted(run["seconds"] / base["seconds"] for run, base in zip(runs, found[cases[0]]))
        best, middle = min(run["seconds"] for run in runs), lambda key: statistics.median(run[key] for run in runs)
        peak = statistics.median(run["peak"] / base["peak"] for run, base in zip(runs, found[cases[0]]))
        cache = statistics.median(run["cache"] / run["seconds"] for run in runs)
        achieved = max(run["flops"] / run["seconds"] for run in runs) / rate
        print(f"| {case} | {best:.2f} | {best / min(b['seconds'] for b in found[cases[0]]):.2f} ({ratios[0]:.2f}–{ratios[-1]:.2f}) | "
              f"{middle('peak') / 1e9:.2f} | {peak:.2f} | {f'{cache:.2f}' if cache else ''} | {f'{achieved:.2f}' if achieved else ''} |")


if __name__ == "__main__":
    main()
