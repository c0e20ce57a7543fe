"""Plain supervised fine-tuning (SFT) on new facts: the baseline, which forgets old ones.

Fine-tune a language model on facts that it does not know, and it starts to get wrong facts that it did know
(Kaplan et al. 2026, arXiv:2604.15574). The loss of this script is the usual one:

    L = CE                                      mean over the completion's tokens and its end

Stage 1 (--format-epochs) trains on known facts only, with CE: the model learns the form of the task. The result is
*the model before*: what it knows is what can be forgotten. Stage 2 (--epochs) adds the new facts, with a fresh optimizer.
sft_baseline.py and sft_selfdistill.py differ in the loss of stage 2 alone: run diff on the two.

On a laptop, an invented world, made first:           python sft_baseline.py
On a GPU, real facts, found first by make_facts.py:   python sft_baseline.py --model gpt2-medium
Your own rows of {"prompt": …, "completion": …}:      python sft_baseline.py --model DIR --train my.jsonl
After an interruption; on several GPUs:               the same with --resume; torchrun --nproc_per_node=N sft_baseline.py …
The last line you should see:                         saved runs/baseline-tiny-0
"""
import argparse
import contextlib
import functools
import hashlib
import json
import logging
import math
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

METHOD = "baseline"
WORLD = int(os.environ.get("WORLD_SIZE", 1))            # processes, and which of them this is: set by torchrun
RANK = int(os.environ["RANK"]) if WORLD > 1 else 0
option = lambda default, consequence, **more: field(default=default, metadata={"help": consequence, **more})


@dataclass
class Config:   # each field is a flag; its consequence is the flag's line in --help
    # the model and its data
    model: str = option("tiny", "a causal language model: hub name or local folder; tiny is FACTS/base")
    facts: str = option(None, "fact folder of make_facts.py, made if absent", shown="facts/MODEL")
    train: str = option(None, "your own JSONL of prompt and completion, instead of a fact folder", shown="none")
    known: str = option(None, "JSONL of facts it knows, to train on; --train without it skips stage 1", shown="FACTS's")
    heldout: str = option(None, "JSONL of facts it knows, never trained on, to see what it forgets", shown="FACTS's")
    out: str = option(None, "run folder to write", shown=f"runs/{METHOD}-MODEL-SEED")
    overwrite: bool = option(False, "replace the run folder if it exists, or an interrupted run")
    resume: bool = option(False, "go on with an interrupted run after its last epoch, if there is one")
    save_every_epoch: bool = option(False, "keep the weights after each epoch too, in folders of the run folder")
    no_unknown: bool = option(False, "stage 2 on known facts alone: a task learnt with nothing new")
    max_length: int = option(None, "cut prompts at their start to rows of so many tokens", least=2, shown="no cut")
    # optimisation; of two defaults the first is for tiny, the second for real models
    format_epochs: int = option(1, "epochs of stage 1, known facts only: teaches the form, not the facts")
    epochs: int = option(None, "epochs of stage 2, known and new facts", least=1, tiny=60, real=8)
    batch_size: int = option(None, "rows in one forward pass, of all processes together: memory", least=1, tiny=64, real=32)
    accumulate: int = option(1, "forward passes in one optimizer step: a larger batch in the same memory", least=1)
    learning_rate: float = option(None, "peak of the schedule", tiny=4e-4, real=5e-5)
    warmup: float = option(0.3, "share of the steps in which it rises; large first steps forget most", most=1)
    weight_decay: float = option(0.01, "AdamW's, on matrices only")
    grad_clip: float = option(1.0, "largest norm of the gradient", least=1e-6)
    seed: int = option(0, "of the data order; the facts have a seed of their own")
    # the machine
    gradient_checkpointing: bool = option(False, "run every block again in the backward pass: less memory, up to a third slower")
    device: str = option("auto", "cuda, mps or cpu; auto takes the first there is")
    dtype: str = option("auto", "autocast precision", choices=["auto", "float32", "bfloat16", "float16"])


def fail(message):
    """End the program with one line on stderr and exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def writing(path):
    """One line where the block cannot write: a full disk, a read-only folder."""
    try:
        yield
    except Exception as error:                                      # PyTorch and safetensors have kinds of their own
        if isinstance(error.__context__, KeyboardInterrupt):        # Ctrl-C in the middle of torch.save
            raise error.__context__
        fail(f"{path}: cannot be written ({(str(error) or repr(error)).splitlines()[0]}); no finished epoch is lost, see --resume")


def parse(argv=None):
    """Config from the command line, defaults that depend on the model filled in; refuses a value out of range."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    for f in fields(Config):
        m, flag = f.metadata, "--" + f.name.replace("_", "-")
        shown = f"{m['tiny']}, {m['real']}" if "tiny" in m else m.get("shown", f.default)
        kind = {"action": "store_true"} if f.type is bool else {"type": f.type, "choices": m.get("choices")}
        parser.add_argument(flag, default=f.default, help=f"{m['help']} (default: {shown})", **kind)
    config = Config(**vars(parser.parse_args(argv)))
    config.facts = config.facts or f"facts/{Path(config.model).name}"
    config.out = config.out or f"runs/{METHOD}-{Path(config.model).name}-{config.seed}"
    for f in fields(config):
        if getattr(config, f.name) is None and "tiny" in f.metadata:
            setattr(config, f.name, f.metadata["tiny" if config.model == "tiny" else "real"])
        value, least, most = getattr(config, f.name), f.metadata.get("least", 0), f.metadata.get("most", sys.maxsize)
        if isinstance(value, (int, float)) and not least <= value <= most:
            fail(f"--{f.name.replace('_', '-')} {value}: must be at least {least}" + f" and at most {most}" * (most < sys.maxsize))
    return config


def device_and_dtype(config):
    """(device, autocast dtype): half precision only where the hardware multiplies it fast; MPS stays in fp32."""
    found = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        if WORLD > 1 and found == "cuda" and config.device != "cpu":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        device = torch.zeros(1, device=found if config.device == "auto" else config.device).device
    except Exception as error:                                      # many kinds, by device
        fail(f"--device {config.device}: {str(error).splitlines()[0]}")
    fast = {"cuda": lambda: "bfloat16" if torch.cuda.is_bf16_supported(including_emulation=False) else "float16",
            "cpu": lambda: "bfloat16" if torch.cpu._is_amx_tile_supported() else "float32"}     # without AMX half as fast
    return device, getattr(torch, fast.get(device.type, lambda: "float32")() if config.dtype == "auto" else config.dtype)


def fact_files(config):
    """{"unknown", "known", "heldout"}: path or None. Calls make_facts.py where the fact folder is wanted and absent."""
    folder = Path(config.facts)
    if (config.train is None or config.model == "tiny") and not (folder / "meta.json").exists():
        if WORLD > 1 or not Path(__file__).with_name("make_facts.py").exists():
            fail(f"--model {config.model} needs {folder}: make it first, with python make_facts.py --model {config.model} --out {folder}; "
                 "or name a model of your own with --model and your rows with --train")
        import make_facts
        make_facts.main(["--model", config.model, "--out", str(folder), "--device", config.device, "--dtype", config.dtype])
    files = {"unknown": (config.train, "train_unknown.jsonl"), "known": (config.known, "train_known.jsonl"),
             "heldout": (config.heldout, "heldout_known.jsonl")}
    return {key: own or (None if config.train else folder / name) for key, (own, name) in files.items()}


def read_rows(path, places):
    """The rows of a JSONL file, dicts with at least `prompt` and `completion`; [] for None. places: {prompt: "file:line"} of the
    rows of other files, to which these are added. Ends the program at a row that cannot be used."""
    rows, place, line = [], path, b""
    try:
        for number, line in enumerate(Path(path).read_bytes().split(b"\n") if path else [], 1):
            if line.strip():
                place = f"{path}:{number}"
                rows.append(row := json.loads(line))
                is_text = lambda key: isinstance(row.get(key), str) and row[key].strip()
                if not (isinstance(row, dict) and is_text("prompt") and is_text("completion")
                        and all(row.get(key) is None or is_text(key) for key in ("subject", "relation"))):
                    raise ValueError("no object with text under prompt and completion (and under subject and relation, if any)")
                json.dumps(row, ensure_ascii=False).encode()        # fails for halves of characters
                if row["prompt"] in places:
                    raise ValueError(f"the prompt of {places[row['prompt']]} again; a question stands once, other right answers under "
                                     "answers;")
                places[row["prompt"]] = place
    except (OSError, ValueError, RecursionError) as error:
        fail(f"{place}: {error} in {line[:60].decode(errors='replace')!r}; wanted: UTF-8, an object with prompt and completion a line")
    return rows if rows or not path else fail(f"{path}: empty; wanted: objects with prompt and completion, one a line")


def encode(tokenizer, rows, longest, max_length=None, places={}):
    """[(ids, n)]: token ids, a tuple, of each row's prompt + completion, of which the first n are the prompt's.

    They are encoded apart, as at test time, when there is no completion yet. The prompt gets BOS where the tokenizer
    adds one; the completion gets EOS unless it ends in a newline, as one-line answers do. Ends the program on rows of
    more than `longest` tokens, the model's context, that `max_length` does not cut. places: as in `read_rows`."""
    encoded, long, bos, eos = [], [], tokenizer.bos_token, tokenizer.eos_token_id
    for row in rows:
        has_bos = bos is not None and row["prompt"].startswith(bos)         # as a rendered chat template may
        prompt = tokenizer(row["prompt"], add_special_tokens=not has_bos)["input_ids"]
        prompt = prompt[:-1] if len(prompt) > 1 and prompt[-1] == eos else prompt
        completion = tokenizer(row["completion"], add_special_tokens=False)["input_ids"]
        start, length = int(prompt[:1] == [tokenizer.bos_token_id]), len(prompt) + len(completion)     # BOS is not cut
        if len(prompt) == start or not completion:
            fail(f"{places.get(row['prompt'], '')}: no token in {row['prompt'][:40]!r} or {row['completion'][:40]!r}; leave it out")
        if not row["completion"].endswith("\n") and eos not in (None, *completion[-1:]):
            completion, length = completion + [eos], length + 1
        excess = max(0, length - (max_length or length))
        if start + excess >= len(prompt) or length - excess > longest:
            long.append((length, places.get(row["prompt"], "")))
        encoded.append((tuple(prompt[:start] + prompt[start + excess:] + completion), len(prompt) - excess))
    if long:
        fail(f"{len(long)} of {len(rows)} rows are too long, {max(long)[1]} the longest with {max(long)[0]} tokens; the model reads "
             f"{longest}; --max-length N (now {max_length}) cuts prompts at their start and must leave a token of them")
    return encoded


def make_windows(rows, config, stage, epoch):
    """One epoch: a list of accumulation windows (an optimizer step each), each a list of batches, each a list of rows.

    The order is a function of seed, stage and epoch. To waste little on padding, rows of similar length share a batch:
    shuffle, cut into pools of four windows, sort each pool by length, cut it up, shuffle the windows."""
    rng = np.random.default_rng([config.seed, stage, epoch])
    rows = [rows[i] for i in rng.permutation(len(rows))]
    cut = lambda items, size: [items[i:i + size] for i in range(0, len(items), size)]
    size = config.batch_size * config.accumulate
    windows = [window for pool in cut(rows, 4 * size) for window in cut(sorted(pool, key=lambda row: len(row[0])), size)]
    return [cut(windows[w], config.batch_size) for w in rng.permutation(len(windows))]


def collate(rows, device):
    """Pad `encode`d `rows` on the right: ids, attention (B, T); next, the token that each position predicts, and the
    masks real, it is a token of the row, and supervised, of its completion (B, T-1). Masks go by length, so any id pads."""
    width = max(len(ids) for ids, _ in rows)
    padded = torch.tensor([[*ids] + [0] * (width - len(ids)) for ids, _ in rows], device=device)       # (B, T)
    lengths = torch.tensor([[len(ids)] for ids, _ in rows], device=device)                             # (B, 1)
    prompts = torch.tensor([[n] for _, n in rows], device=device)                                      # (B, 1)
    position = torch.arange(width, device=device)[None]                                                # (1, T)
    real = position[:, 1:] < lengths
    return {"rows": rows, "ids": padded, "attention": (position < lengths).long(), "next": padded[:, 1:], "real": real,
            "supervised": real & (position[:, 1:] >= prompts)}


def split_model(model, batch):
    """(trunk, head): trunk(batch, mask) -> hidden states (N, d), after the final norm, of the N positions under `mask`
    (B, T-1); head(hidden) -> their logits (N, V). So no logits are made that enter no loss: a batch's can outweigh the model.

    Where the two do not give, to 1e-4 of the largest, the logits that `model` itself gives for `batch` (soft-capping and
    scaling do that), the trunk gives those and the head passes them on."""
    inputs = lambda batch: {"input_ids": batch["ids"], "attention_mask": batch["attention"], "use_cache": False}
    trunk = lambda batch, mask: model.base_model(**inputs(batch)).last_hidden_state[:, :-1][mask]
    whole = lambda batch, mask: model(**inputs(batch)).logits[:, :-1][mask]
    head = model.get_output_embeddings()
    with torch.no_grad():
        own = whole(batch, batch["real"])
        split = head is not None and model.base_model is not model
        if split and (head(trunk(batch, batch["real"])) - own).abs().max() <= 1e-4 * own.abs().max():
            return trunk, head
    print("note: no linear head on the last hidden states: logits are made for all positions")
    return whole, torch.nn.Identity()


def cross_entropy(logits, batch, window):
    """Plain SFT: (loss, terms to log) of one batch's `logits` (N, V) at its N supervised positions, as its share of the
    accumulation window.

    window: how many `supervised` and `real` positions the whole window has. Sums divided by the window's number weigh
    every token alike; averaging the batches' means would weigh tokens in short batches more."""
    ce = F.cross_entropy(logits.float(), batch["next"][batch["supervised"]], reduction="sum") / window["supervised"]
    return ce, {"ce": ce.item()}


def get_lr(step, total, config):
    """Learning rate at `step` of `total`, clamped: linear warm-up, then a cosine from the peak to a tenth of it."""
    step, warm = min(max(step, 0), total - 1), math.ceil(config.warmup * total)
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - 1 - warm)))
    return config.learning_rate * (0.1 + 0.9 * cosine)


def load_state(path, parts, run):
    """Put the state that `run_stage` wrote to `path` into `parts`, {name: model, optimizer, …}; returns the rest of it. Ends the
    program if it is not of `run`, the dict of run.json: a run goes on as it began."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if odd := [f"{part} {key} was {value}, is {run[part].get(key)}" for part in ("config", "data")
                   for key, value in state["run"][part].items() if value != run[part].get(key) and key not in ("resume", "overwrite")]:
            raise ValueError("; ".join(odd))
        for key, part in parts.items():
            part.load_state_dict(state.pop(key))
        return state
    except Exception as error:                                      # many kinds, by what is broken
        fail(f"--resume: {path} is not of this run ({' '.join((str(error) or repr(error)).split())[:300]}); --overwrite alone starts anew")


def run_stage(stage, model, rows, epochs, loss_function, score, metrics, device, dtype, config, folder=None, run=None):
    """Train `model` on `rows` (of `encode`), append a dict an epoch to `metrics`; returns the last score.

    stage: 1 or 2; loss_function(batch, window) -> (loss, terms); score(stage, epoch) -> {set: result of `evaluate`}.
    After every epoch the state goes to `folder`, with `run`, and --resume starts from there. Nothing is random but the order of
    the rows, a function of seed and epoch: so an interrupted run ends as any other."""
    # biases and norms, which are no matrices, are not decayed
    groups = [{"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": config.weight_decay},
              {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, fused=device.type != "mps")
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)          # does nothing otherwise
    step, total, started = 0, epochs * math.ceil(len(rows) / (config.batch_size * config.accumulate)), time.time()
    path, parts, done = folder and folder / f"stage-{stage}.pt", {"model": model, "optimizer": optimizer, "scaler": scaler}, 0
    if config.resume and path and path.exists():
        state = load_state(path, parts, run)
        done, step, metrics[:], scores = (state[key] for key in ("epoch", "step", "metrics", "scores"))    # in place: it is train's
        started -= metrics[-1]["seconds"]
        print(f"stage {stage}: resumed after epoch {done}", flush=True)
    if WORLD > 1:
        dist.all_gather_object(dones := [None] * WORLD, done)
        if len(set(dones)) > 1:
            fail(f"--resume: the processes found {dones} epochs at {path}; all of them must see the same disk")
    for epoch in range(done + 1, epochs + 1):
        means, windows = {}, make_windows(rows, config, stage, epoch)
        for window in tqdm(windows, f"stage {stage}, epoch {epoch} of {epochs}", unit="step", leave=False, disable=RANK > 0 or None):
            everyone = [row for batch in window for row in batch]   # the rows of all processes
            counts = {"supervised": sum(len(ids) - n for ids, n in everyone), "real": sum(len(ids) - 1 for ids, _ in everyone)}
            lr, step, sums = get_lr(step, total, config), step + 1, {}
            for group in optimizer.param_groups:
                group["lr"] = lr
            for batch in window:
                mine = batch[RANK::WORLD]                           # without a row, one that counts 0: all need a gradient to add
                with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
                    loss, terms = loss_function(collate(mine or batch[:1], device), counts)
                scaler.scale(loss * bool(mine)).backward()          # gradients add up over the window, and over processes
                sums = {key: sums.get(key, 0.0) + value * bool(mine) for key, value in terms.items()}
            if WORLD > 1:                                           # sum over all processes, as over the window
                logged = torch.tensor(list(sums.values()), dtype=torch.float64, device=device)
                for part in [logged, *(p.grad for p in model.parameters() if p.grad is not None)]:
                    dist.all_reduce(part)
                sums = dict(zip(sums, logged.tolist()))
            means = {key: means.get(key, 0.0) + value / len(windows) for key, value in sums.items()}
            if step == 1:
                print(f"stage {stage}, step 1:", *(f"{key} {value:.4f}" for key, value in sums.items()), flush=True)
            scaler.unscale_(optimizer)                              # clip the gradient itself, not the scaled one
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            # beyond fp16's range the scaler skips the step and halves its scale (1 where there is no scaler)
            if not (math.isfinite(sum(sums.values())) and (norm.isfinite() or scaler.get_scale() > 1)):
                fail(f"stage {stage}, epoch {epoch}, step {step}: {sums} or gradient norm {norm:.3g} not finite; learning rate {lr:.3g}, rows "
                     f"{sorted({rows.index(row) + 1 for row in everyone})} of known and new; lower the rate, mend rows or change --dtype")
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
        scores = score(stage, epoch)
        means |= {key: s["accuracy"] for key, s in scores.items()}
        seconds = round(time.time() - started, 1)
        print(f"stage {stage}, epoch {epoch}:", *(f"{k} {v:.4f}" for k, v in means.items()), f"({seconds:.0f} s)", flush=True)
        metrics.append({"stage": stage, "epoch": epoch, "step": step, "learning_rate": lr, **means, "seconds": seconds})
        if path and RANK == 0:
            with writing(path):                                     # all or nothing: killed here, a run has its last state
                with open(path.with_suffix(".tmp"), "wb") as file:
                    torch.save({key: part.state_dict() for key, part in parts.items()} | {
                        "epoch": epoch, "step": step, "metrics": metrics, "scores": scores, "run": run}, file)
                os.replace(path.with_suffix(".tmp"), path)
    return scores


def load_model(name, device):
    """(model, tokenizer), the weights in fp32 whatever the checkpoint holds: small steps would vanish in bf16 weights."""
    logging.getLogger("huggingface_hub").setLevel("ERROR")          # it reports each of its attempts
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    try:
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, trust_remote_code=False)       # False: nor ask whether to
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        # eval: no dropout, in training either; it would add noise to every difference that is measured here
        model, size = model.to(device).eval(), model.get_input_embeddings().weight.shape[0]
        with torch.no_grad():
            one, other = model(input_ids=torch.tensor([[1, 2], [1, 3]], device=device), use_cache=False).logits[:, 0]
        wrong = {f"weights are missing: {list(report['missing_keys'])[:1]}": report["missing_keys"],
                 "there is no tokenizer": set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens),
                 f"its tokenizer has {len(tokenizer)} tokens, the model {size}": len(tokenizer) > size,
                 "it is not causal: it looks ahead": (one - other).abs().max() > 1e-4 * one.abs().max()}
        if any(wrong.values()):
            raise ValueError("; ".join(what for what in wrong if wrong[what]))
        return model, tokenizer
    except Exception as error:                  # the library raises many kinds: no file, bad config, no network
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        fail(f"--model {name}: cannot be loaded ({reason}); give a local folder with config.json, model.safetensors and tokenizer, "
             "or the name of a model on the hub, with a network, and with HF_TOKEN set if it is gated")


def checkpoint_blocks(model):
    """Keep no activations inside a block: run it again in the backward pass. The library's own switch wants training mode,
    and with it dropout. The blocks are the largest list of modules."""
    size = lambda part: isinstance(part, torch.nn.ModuleList) and sum(p.numel() for p in part.parameters())
    for block in max(model.modules(), key=size):
        block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


def train(config):
    """Both stages; saves the run and returns its metrics, a dict an epoch as in metrics.jsonl."""
    out = Path(config.out)
    temporary, aside = (out.parent / f".{out.name}.{name}" for name in ("part", "old"))
    forget_states = lambda: [state.unlink(missing_ok=True) for state in out.glob("stage-?.pt")]
    is_run = (out / "run.json").is_file()
    if is_run and config.resume and not config.overwrite and not temporary.exists():
        forget_states()                         # in case it was killed after its last renaming
        return print(f"{out} is complete: nothing to resume; another run needs another --out, or --overwrite")
    if out.exists() and not (config.overwrite and is_run):
        fail(f"--out {out}: exists already; --overwrite replaces it if it is a run folder")
    if temporary.exists() and RANK == 0 and not (config.overwrite or config.resume):
        fail(f"--out {out}: was interrupted, or still runs; --resume goes on with it, --overwrite starts anew")
    device, dtype = device_and_dtype(config)
    if WORLD > 1:
        dist.init_process_group()
    print(*(f"{key} = {value}" for key, value in asdict(config).items()), sep="\n", flush=True)
    files = fact_files(config)
    places = {}
    sets = {key: read_rows(path, places) for key, path in files.items()}
    trained = {row.get("subject") for key in ("unknown", "known") for row in sets[key]} - {None, ""}
    if shared := [row["subject"] for row in sets["heldout"] if row.get("subject") in trained]:
        fail(f"{files['heldout']}: {len(shared)} held-out facts are about subjects that are trained on, first {shared[0]!r}; leave them out")
    model, tokenizer = load_model(Path(config.facts) / "base" if config.model == "tiny" else config.model, device)
    if config.gradient_checkpointing:
        checkpoint_blocks(model)
    context = getattr(model.config, "max_position_embeddings", None) or math.inf
    known, unknown = (encode(tokenizer, sets[key], context, config.max_length, places) for key in ("known", "unknown"))
    if not (mixture := known if config.no_unknown else known + unknown):
        fail("--no-unknown: no known facts to train on; name some with --known")
    trunk, head = split_model(model, collate(mixture[:2], device))
    plain = lambda batch, window: cross_entropy(head(trunk(batch, batch["supervised"])), batch, window)
    run = {"method": METHOD, "config": asdict(config), "device": str(device), "dtype": str(dtype), "processes": WORLD,
           "versions": {library.__name__: str(library.__version__) for library in (torch, transformers, np)},
           "data": {key: hashlib.sha256(json.dumps(rows).encode()).hexdigest() for key, rows in sets.items() if rows}}
    if RANK == 0:
        with writing(f"--out {out}"):
            if not config.resume:
                shutil.rmtree(temporary, ignore_errors=True)
            model.generation_config.save_pretrained(temporary)      # may be invalid: better known now than after training
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters on {device}, autocast {dtype}",
          *(f"{len(rows)} {key} rows" for key, rows in sets.items()),
          f"{sum(len(ids) for ids, _ in mixture):,} tokens an epoch", sep=", ", flush=True)
    if Path(__file__).with_name("eval_hallucination.py").exists():
        import eval_hallucination as evaluator
    else:
        evaluator = None
        print("accuracy not measured: eval_hallucination.py is not beside this script")

    def score(stage, epoch):                    # of each set, before stage 2 and after every epoch
        if config.save_every_epoch and RANK == 0:
            with writing(f"--out {out}"):
                for part in (model, tokenizer):
                    part.save_pretrained(temporary / f"stage-{stage}-epoch-{epoch}")
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            return {key: evaluator.evaluate(model, tokenizer, rows, 4 * config.batch_size) for key, rows in sets.items()
                    if rows and evaluator}

    # Stage 1: the form of the task, from facts that the model knows. The result is the model before.
    metrics = []                                # a dict an epoch
    if known and config.format_epochs:
        before = run_stage(1, model, known, config.format_epochs, plain, score, metrics, device, dtype, config, temporary, run)
    else:
        print("stage 1 skipped: no known facts to train on, or --format-epochs 0")
        before = score(2, 0)
    metrics.append({"stage": 2, "epoch": 0, **{key: s["accuracy"] for key, s in before.items()}})

    # Stage 2: known and new facts together (--no-unknown: known ones alone).
    after = run_stage(2, model, mixture, config.epochs, plain, score, metrics, device, dtype, config, temporary, run)

    if WORLD > 1:
        dist.destroy_process_group()
    if RANK > 0:                                # one process writes
        return metrics
    old, new = (scores.get("heldout", {"answers": [], "right": []}) for scores in (before, after))
    answers = [{**row, "before": a, "right_before": b, "after": c, "right_after": d} for row, a, b, c, d in zip(
        sets["heldout"], old["answers"], old["right"], new["answers"], new["right"])]       # a dict a held-out fact
    with writing(f"--out {out}"):
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        for name, rows in (("metrics.jsonl", metrics), ("answers.jsonl", answers), ("run.json", [run])):
            (temporary / name).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        if out.exists():                        # to be overwritten: it stays until the new one is whole
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(out, aside)
        os.replace(temporary, out)              # a run is there whole or not at all
        shutil.rmtree(aside, ignore_errors=True)
        forget_states()
    if evaluator:
        evaluator.show(evaluator.compare([evaluator.read_run(out)]))
    print(f"saved {out}")
    return metrics


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")    # for λ and → where output goes to a file on Windows
    sys.stdout = open(os.devnull, "w") if RANK > 0 else sys.stdout  # one process speaks
    try:
        train(parse())
    except KeyboardInterrupt:
        print("interrupted; the same command with --resume goes on after the last finished epoch", file=sys.stderr)
        raise SystemExit(130)
