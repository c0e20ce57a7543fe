"""Freezing: supervised fine-tuning (SFT) of some parameter groups, with the others frozen.

Fine-tune a language model on facts it does not know, and it starts to get facts wrong that it
used to know (Kaplan et al. 2026, arXiv:2604.15574). In the paper, training attention alone learns
few new facts and forgets little. In our runs it learns nearly all and forgets the most, and
training MLPs alone forgets less than training everything (docs/study/results.md). With --l2 W, all
parameters are trained by default, and each step of stage 2 pulls them towards their values at its
start:

    L = CE                              averaged over the completion tokens of the step
    θ ← θ − lr · W · (θ − θ_before)     with --l2 W, before each step of Adam

Known facts are those that the model already gets right. New facts are those that it does not know.
Rows of --train count as new. Without --known there are then no known facts, and no stage 1.
Stage 1 (--format-epochs) trains on known facts only and teaches the model the answer format. The
result, the stage-1 model, is saved in OUT/before, and forgetting is measured against it. Stage 2
(--epochs) trains on known and new facts together, with a fresh optimizer.
This script differs from sft_baseline.py in which parameters are trained, in both stages, and in the
optimizer step of stage 2 with --l2: run diff on the two files.

    python sft_freeze.py                                 laptop; creates a synthetic world first
    python sft_freeze.py --model gpt2-medium             GPU; finds known and new facts first
    python sft_freeze.py --model DIR --train my.jsonl    rows {"prompt": …, "completion": …}

Each epoch of stage 2 prints one line; epoch 0 is the stage-1 model. new, known and kept are
accuracies: on the new facts, on the known facts that are trained on, and on held-out known facts.

    epoch 12 | ce 0.031 | new 0.985 | known 1.000 | kept 0.464 | 1.4 s/step

If all goes well, the last line is: saved runs/freeze-tiny-0
Fact folders and accuracies need make_facts.py and eval_hallucination.py in this folder. Without
them, the script still trains on your own rows.
"""
import importlib
import json
import math
import re
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

METHOD = "freeze"
# The role of a parameter, from its name. The first match wins: a norm inside attention is a norm.
# Unmatched parameters are "other", which only --trainable other and all include.
ROLES = {"norms": r"(norm|norm_\w+|\.ln_\w+)\.",
         "attention": r"\.(attn|attention|self_attn|self_attention)\.",
         "mlp": r"\.(mlp|ffn|feed_forward|fc1|fc2)\.",
         "embeddings": r"\.(wte|wpe|embed_\w+|word_embeddings|project_in)\.",
         "head": r"(lm_head|embed_out|project_out)\.",
         "other": r"."}
# Defaults for the synthetic world and for real models.
TINY = {"epochs": 60, "batch_size": 64, "learning_rate": 4e-4}
REAL = {"epochs": 12, "batch_size": 16, "learning_rate": 1e-4}


def option(default, text):
    """Return a dataclass field with a default value and --help text."""
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """Command-line flags; the field batch_size becomes --batch-size."""
    # model and data
    model: str = option("tiny", "hub name or folder of a causal LM; 'tiny' loads FACTS/base")
    facts: str = option(None, "fact folder, created if absent; default: facts/MODEL")
    train: str = option(None, "JSONL of your own rows, used instead of the fact folder")
    known: str = option(None, "JSONL of known facts to train on; default: from FACTS, or none "
                       "with --train")
    heldout: str = option(None, "JSONL of known facts to test on; default: from FACTS, or none "
                       "with --train")
    out: str = option(None, f"output folder; default: runs/{METHOD}-MODEL-SEED")
    resume: bool = option(False, "continue after the last finished epoch of stage 2, if any")
    save_every_epoch: bool = option(False, "save a checkpoint after each epoch of stage 2")
    eval_every: int = option(1, "evaluate every N epochs; 0: only before and after stage 2")
    known_only: bool = option(False, "in stage 2, train on known facts only")
    # optimization
    format_epochs: int = option(1, "epochs of stage 1, which teaches the answer format")
    epochs: int = option(None, "epochs of stage 2; default: 60 for tiny, else 12")
    batch_size: int = option(None, "rows per forward pass; default: 64 for tiny, else 16")
    gradient_accumulation_steps: int = option(1, "forward passes per optimizer step")
    learning_rate: float = option(None, "peak; default: 4e-4 for tiny, else 1e-4; paper: 5e-5")
    warmup_ratio: float = option(0.3, "fraction of a stage's steps used for linear warmup")
    weight_decay: float = option(0.01, "AdamW weight decay, applied to matrices only")
    max_grad_norm: float = option(1.0, "gradient clipping threshold")
    seed: int = option(0, "data-order seed (make_facts.py has its own)")
    # method
    trainable: str = option(None, "all, or some of norms,attention,mlp,embeddings,head,other; "
                                  "default: all with --l2, otherwise attention (the paper's "
                                  "choice; it forgot most in our runs)")
    layers: str = option(None, "A-B: train only blocks A to B, counted from 0")
    l2: float = option(None, "W: strength of the pull towards the weights before stage 2")
    # hardware
    device: str = option("auto", "cuda, mps or cpu; auto: the first one available")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "precision below the LM head; auto: bfloat16 on CUDA if supported, not for tiny")


def fail(message):
    """Print one line to stderr and exit with status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse_args(argv=None):
    """Parse the command line (list of str, default sys.argv) and fill in all defaults."""
    parser = transformers.HfArgumentParser(Config, description=__doc__.splitlines()[0])
    parser.error = fail
    config = Config(**vars(parser.parse_args(argv)))
    if config.train and config.model == "tiny" and not config.facts:
        fail("--train needs a model to start from: pass --model (hub name or folder)")
    # Fill in the defaults that depend on the model or the seed.
    model_name = Path(config.model).name
    defaults = {"facts": f"facts/{model_name}", "out": f"runs/{METHOD}-{model_name}-{config.seed}"}
    # The tiny model needs a higher learning rate than a real one.
    defaults |= TINY if config.model == "tiny" else REAL
    for name, value in defaults.items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    if config.trainable is None:
        config.trainable = "attention" if config.l2 is None else "all"
    for name in ("epochs", "batch_size", "gradient_accumulation_steps", "learning_rate"):
        if getattr(config, name) <= 0:
            fail(f"--{name.replace('_', '-')} {getattr(config, name)}: must be positive")
    if config.seed < 0:
        fail(f"--seed {config.seed}: must not be negative")
    if config.device == "auto":
        config.device = "cpu"
        if torch.accelerator.is_available():
            config.device = torch.accelerator.current_accelerator().type        # cuda, mps, xpu
    if config.dtype == "auto":
        # bf16 has the range of fp32, so it needs no loss scaling. Emulated bf16 is slow.
        config.dtype = "float32"
        on_gpu = "cuda" in config.device and config.model != "tiny"
        if on_gpu and torch.cuda.is_bf16_supported(including_emulation=False):
            config.dtype = "bfloat16"
    return config


def import_sibling(name):
    """Import the module `name` from this folder; return None if this file was copied without it."""
    path = Path(__file__).with_name(f"{name}.py")
    if not path.exists():
        return None
    sys.path.insert(0, str(path.parent))    # missing with python -P and inside a package
    return importlib.import_module(name)


# ---------------------------------------------------------------------------------------- data

def find_files(config):
    """Return {"new", "known", "heldout"}: the path of each JSONL file, or None if there is none.

    Without --train they come from a fact folder. make_facts.py creates it if it does not exist.
    """
    if config.train is not None:
        return {"new": config.train, "known": config.known, "heldout": config.heldout}
    make_facts = import_sibling("make_facts")
    if make_facts is None:
        fail("make_facts.py is not in this script's folder; pass --model and --train (your rows)")
    return make_facts.find_files(config)


def tokenize(tokenizer, prompt, completion=""):
    """Return the token ids of the prompt and of the completion, two lists of int.

    Tokenize the concatenated text: tokenizers like Llama 2's would otherwise put an extra space
    token in front of the completion. If the prompt's tokens are not a prefix of the full
    sequence, tokenize the completion separately. Of the special tokens that the tokenizer adds,
    keep those in front (usually BOS) and drop those at the end: an EOS there would end the prompt.
    """
    encoded = []
    for text in (prompt, prompt + completion):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        special = tokenizer(text)["input_ids"]
        # The special tokens in front of the text; none if a chat template wrote them already.
        added = special[:special.index(ids[0])] if ids else []
        encoded.append(added + ids)
    prompt_ids, full_ids = encoded
    if full_ids[:len(prompt_ids)] == prompt_ids:
        return prompt_ids, full_ids[len(prompt_ids):]
    return prompt_ids, tokenizer(completion, add_special_tokens=False)["input_ids"]


def read_examples(path, tokenizer, context_length):
    """Read a JSONL file and return its rows as training examples, a list of dicts.

    row: the JSON object, with strings under "prompt" and "completion"
    input_ids: (T,), T ≤ context_length
    predicted, completion: masks (T,), true for all tokens and for completion tokens
    If a row is unusable, exit with an error that gives its file and line number.
    """
    examples = []
    lines = Path(path).read_bytes().split(b"\n")
    try:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            row = json.loads(line)
            prompt, completion = tokenize(tokenizer, row["prompt"], row["completion"])
            if not prompt or not completion or not row["completion"].strip():
                raise ValueError("empty prompt or completion")
            # The model must learn to stop: append EOS unless the completion ends with it or with
            # a newline.
            last, eos = completion[-1], tokenizer.eos_token_id
            if last != eos and "\n" not in tokenizer.decode([last]):
                completion.append(eos)
            ids = torch.tensor(prompt + completion)
            # Reject long rows: truncation would cut off part of the prompt or completion.
            if len(ids) > context_length:
                raise ValueError(f"{len(ids)} tokens; the model's context is {context_length}")
            examples.append({"row": row, "input_ids": ids, "predicted": torch.ones_like(ids),
                             "completion": torch.arange(len(ids)) >= len(prompt)})
    except Exception as error:          # the type depends on what is wrong with the row
        fail(f"{path}:{number}: {error!r} in {line[:60].decode(errors='replace')!r}; each line "
             "must be a JSON object with a prompt and a completion (for chats see docs/use.md)")
    return examples


def chunks(items, size):
    """Split a list into lists of `size` items; the last one may be shorter."""
    return [items[i:i + size] for i in range(0, len(items), size)]


def n_tokens(example):
    """Return the length of an example in tokens."""
    return len(example["input_ids"])


def make_steps(examples, stage, epoch, config):
    """Return the optimizer steps of one epoch: a list of steps, each a list of batches.

    The order depends only on the seed, the stage and the epoch. To reduce padding, sort the rows
    of four steps at a time by length before splitting them into steps and batches.
    """
    # All methods see the same rows in the same order, so runs with equal seeds can be paired.
    rng = np.random.default_rng([config.seed, stage, epoch])
    shuffled = [examples[i] for i in rng.permutation(len(examples))]
    rows_per_step = config.batch_size * config.gradient_accumulation_steps
    steps = []
    for pool in chunks(shuffled, 4 * rows_per_step):
        steps += chunks(sorted(pool, key=n_tokens), rows_per_step)
    return [chunks(steps[i], config.batch_size) for i in rng.permutation(len(steps))]


def collate(examples, device):
    """Return a batch: a dict with the examples, their input_ids and two index tensors.

    input_ids: (B, T), padded with 0 on the right, where a causal model never looks. The forward
    pass therefore needs no attention mask.
    predicted, completion: the positions whose next token the mask of that name selects, as indices
    into B · (T-1) positions. Computed on the CPU: on a GPU, a mask would make Python wait.
    """
    # Padding with the tokenizer's padding token and masking it by its id would be wrong: it often
    # equals EOS, which must be learned.
    batch = {"examples": examples}
    for key in ("input_ids", "predicted", "completion"):
        padded = pad_sequence([example[key] for example in examples], batch_first=True)
        if key != "input_ids":
            padded = padded[:, 1:].flatten().nonzero()[:, 0]
        batch[key] = padded.to(device)
    return batch


# ------------------------------------------------------------------------------ model and loss

def load_model(name, device):
    """Load a model and its tokenizer; return both.

    Weights are in fp32: bf16 would round small updates away. The model stays in eval mode even
    during training: dropout would add noise to the KL and to comparisons between methods.
    """
    evaluator = import_sibling("eval_hallucination")
    if evaluator is not None:
        return evaluator.load_model(name, device)       # does the same and rejects broken models
    print("note: eval_hallucination.py is not in this folder, so accuracy is not measured")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        name, dtype=torch.float32, trust_remote_code=False)
    tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    return model.to(device).eval(), tokenizer


def last_hidden_state(model, batch, dtype):
    """Return the hidden states after the final norm, (B · (T-1), d); each predicts the next token.

    The model runs under autocast: matmuls in dtype (str), weights and reductions in fp32. The
    result is fp32, and so are the LM head and the losses. In bf16, logits around -100, as GPT-2's,
    would be multiples of 0.5. Apply the head only where a loss needs logits: a full (B, T, V)
    tensor of them can take more memory than the model.
    """
    with torch.autocast(model.device.type, getattr(torch, dtype), enabled=dtype != "float32"):
        # use_cache=False: only generation needs the key-value cache.
        output = model.base_model(input_ids=batch["input_ids"], use_cache=False)
    return output.last_hidden_state[:, :-1].flatten(0, 1).float()


@torch.no_grad()
def check_head(model, batch, name):
    """Reject a model whose logits are not its head applied to `last_hidden_state`."""
    try:
        hidden = last_hidden_state(model, batch, "float32")
        logits = model.get_output_embeddings()(hidden)                          # (B · (T-1), V)
        expected = model(input_ids=batch["input_ids"], use_cache=False).logits[:, :-1].flatten(0, 1)
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    except torch.OutOfMemoryError:
        raise
    except Exception:           # many types: the logits differ, or there is no head
        fail(f"--model {name}: its logits are not its LM head applied to the last hidden state; "
             "they may be capped or scaled. Use docs/trainer.py, which needs only the logits")


def cross_entropy(model, hidden, batch, counts):
    """Compute this batch's contribution to the step's mean cross-entropy: (loss, {"ce"}).

    hidden: from `last_hidden_state`
    counts: {"completion", "predicted"}: how many tokens of each kind all batches of the step have
    Dividing by the step's count gives every token the same weight. Averaging per-batch means
    would overweight tokens in batches that have few completion tokens.
    """
    targets = batch["input_ids"][:, 1:].flatten()[batch["completion"]]              # (N,)
    logits = model.get_output_embeddings()(hidden[batch["completion"]])             # (N, V)
    ce = F.cross_entropy(logits, targets, reduction="sum") / counts["completion"]
    return ce, {"ce": ce}


def pull_to_before(optimizer, model, config):
    """Make each step of the optimizer start with θ ← θ − lr · W · (θ − θ_before).

    θ_before is a copy of the current trained weights, 4 bytes per parameter. This is a second
    decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101), towards θ_before; AdamW's
    own, towards 0, stays on. As a term of the loss, L2 would pass through Adam, which divides it by
    the gradient's scale.
    """
    trained = [weights for weights in model.parameters() if weights.requires_grad]
    before = [weights.detach().clone() for weights in trained]

    @torch.no_grad()
    def pull(*_):
        fraction = min(1.0, optimizer.param_groups[0]["lr"] * config.l2)
        for weights, start in zip(trained, before):
            weights.lerp_(start, fraction)

    optimizer.register_step_pre_hook(pull)


def role_of(name):
    """Return the role of a parameter, given its name."""
    for role, pattern in ROLES.items():
        if re.search(pattern, name):
            return role


def split_parameters(model, config):
    """Return the names of the parameters in --layers by role: {role: list of str}.

    Every parameter has exactly one role, except that a tied LM head also counts as embeddings.
    """
    parameters = dict(model.named_parameters())
    # The block of each parameter; -1 outside the blocks, as for embeddings.
    blocks = {}
    for name in parameters:
        found = re.search(r"\.(h|layers|layer|blocks)\.(\d+)\.", name)
        blocks[name] = int(found[2]) if found else -1
    # By default, all blocks and everything outside of them.
    first, last = -1, max(blocks.values())
    if config.layers is not None:
        span = re.fullmatch(r"(\d+)-(\d+)", config.layers)
        if span is None or not int(span[1]) <= int(span[2]) <= last:
            fail(f"--layers {config.layers}: must be A-B with 0 ≤ A ≤ B ≤ {last}")
        first, last = map(int, span.groups())
    split = {role: [] for role in ROLES}
    for name in parameters:
        if first <= blocks[name] <= last:
            split[role_of(name)].append(name)
    # A tied head is the same parameter as the embeddings. Naming either role trains it.
    head = model.get_output_embeddings().weight
    split["head"] += [name for name in split["embeddings"] if parameters[name] is head]
    return split


def freeze(model, config):
    """Freeze all parameters but the --trainable roles in --layers; print the split by role.

    Frozen parameters get no gradient. AdamW then skips them, weight decay included, so they stay
    the same bit for bit.
    """
    split = split_parameters(model, config)
    roles = [role for role in split if split[role]]
    wanted = config.trainable.replace(" ", "").split(",")
    if config.trainable == "all":
        wanted = roles
    trained = set()
    for role in wanted:
        # Reject a misspelt role, and one without parameters in --layers: it would train nothing.
        if role not in roles:
            fail(f"--trainable {role}: no such parameters (--layers {config.layers or 'unset'}); "
                 f"choose all or some of {','.join(roles)}")
        trained.update(split[role])
    # Frozen parameters store no gradients, and the backward pass is shorter.
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    for role in roles:
        n_all, n_trained = 0, 0
        for name in split[role]:
            size = model.get_parameter(name).numel()
            n_all += size
            if name in trained:
                n_trained += size
        print(f"{role:10} {n_trained:>13,} of {n_all:>13,} weights are trained")


# ------------------------------------------------------------------------------------- training

def get_lr(step, total, config):
    """Return the learning rate: linear warmup, then cosine decay to a tenth of the peak."""
    # Large steps before Adam's moment estimates settle cause forgetting, so use a long warmup.
    warmup = math.ceil(config.warmup_ratio * total)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - 1 - warmup)))
    return config.learning_rate * (0.1 + 0.9 * cosine)


def make_optimizer(model, config, stage):
    """Return AdamW with weight decay on matrices, but not on biases and norms."""
    matrices = {"params": [], "weight_decay": config.weight_decay}
    vectors = {"params": [], "weight_decay": 0.0}
    for parameter in model.parameters():
        group = matrices if parameter.ndim >= 2 else vectors
        group["params"].append(parameter)
    # fused: one kernel updates all weights. The training loop sets the learning rate.
    optimizer = torch.optim.AdamW([matrices, vectors], fused=True)
    if stage == 2 and config.l2 is not None:
        pull_to_before(optimizer, model, config)
    return optimizer


def train_stage(stage, model, examples, loss_function, config, state):
    """Run stage 1 or 2 of training; yield (metrics, state) after each epoch.

    loss_function(batch, counts) returns (loss, {name: loss term to log}).
    metrics: the epoch's mean loss terms and seconds per step
    state: {"epoch": 0} to start, or a state yielded earlier, to resume after its epoch
    Only the data order is random, and it depends only on seed, stage and epoch. A resumed run
    therefore gives the same result as an uninterrupted one (bit for bit on a CPU).
    """
    epochs = config.format_epochs if stage == 1 else config.epochs
    # Gradients and Adam's two moments take three times the memory of the trained weights.
    optimizer = make_optimizer(model, config, stage)
    if state["epoch"] > 0:      # resumed
        # pop: otherwise the state would hold a second copy of the weights.
        model.load_state_dict(state.pop("model"))
        optimizer.load_state_dict(state.pop("optimizer"))
    for epoch in range(state["epoch"] + 1, epochs + 1):
        start = time.perf_counter()
        steps = make_steps(examples, stage, epoch, config)
        metrics = {"stage": stage, "epoch": epoch}
        bar = tqdm(steps, f"stage {stage}, epoch {epoch} of {epochs}", leave=False, disable=None)
        # step counts over the whole stage, as the learning rate schedule does.
        for step, rows_by_batch in enumerate(bar, (epoch - 1) * len(steps)):
            batches = [collate(rows, model.device) for rows in rows_by_batch]
            # Count the tokens predicted in this step. CE is averaged over those in completions,
            # the KL, if the method has one, over all of them.
            counts = {}
            for key in ("completion", "predicted"):
                counts[key] = sum(len(batch[key]) for batch in batches)
            # Each backward() adds to the gradients and frees the activations of its batch.
            logged = {}
            for batch in batches:
                loss, terms = loss_function(batch, counts)
                loss.backward()
                for name, term in terms.items():
                    logged[name] = logged.get(name, 0) + term.detach()
            for group in optimizer.param_groups:
                group["lr"] = get_lr(step, epochs * len(steps), config)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            # Read all values and the norm at once: each read makes Python wait for the GPU.
            values = torch.stack([*logged.values(), norm]).tolist()
            if not math.isfinite(sum(values)):
                fail(f"stage {stage}, epoch {epoch}: loss or gradient is not finite in step "
                     f"{step + 1} of the stage; lower --learning-rate or use --dtype float32")
            optimizer.step()
            optimizer.zero_grad()
            for name, value in zip(logged, values):
                metrics[name] = metrics.get(name, 0) + value / len(steps)
            if step == 0:
                print(f"stage {stage}, step 1: {dict(zip(logged, values))}")
        metrics["seconds_per_step"] = (time.perf_counter() - start) / max(1, len(steps))
        yield metrics, {"epoch": epoch, "model": model.state_dict(),
                        "optimizer": optimizer.state_dict()}


def log(metrics):
    """Print the metrics of one epoch (dict) as one line."""
    line = f"epoch {metrics['epoch']}"
    for name, value in metrics.items():
        if name not in ("stage", "epoch", "seconds_per_step"):
            digits = 3 if value >= 0.01 else 4
            line += f" | {name} {value:.{digits}f}"
    if "seconds_per_step" in metrics:
        line += f" | {metrics['seconds_per_step']:.2g} s/step"
    print(line, flush=True)


# ------------------------------------------------------------------------------ output folder
# Every file is written under a temporary name and then renamed, so no file is ever incomplete.

def write_jsonl(path, rows):
    """Write dicts as JSON lines."""
    temporary = path.with_name(f"{path.name}.tmp")
    lines = [f"{json.dumps(row)}\n" for row in rows]
    temporary.write_text("".join(lines), encoding="utf-8")
    temporary.replace(path)


def save_state(path, state):
    """Save what --resume needs: up to 12 bytes per parameter, for weights and Adam's moments."""
    temporary = path.with_name(f"{path.name}.tmp")
    torch.save(state, temporary)
    temporary.replace(path)


def save_checkpoint(folder, model, tokenizer):
    """Save model and tokenizer for `from_pretrained`: 4 bytes per parameter, in fp32."""
    temporary = folder / "tmp"
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    # Move the files; a tokenizer can have a subfolder of chat templates.
    shutil.copytree(temporary, folder, copy_function=os.replace, dirs_exist_ok=True)
    shutil.rmtree(temporary)


def open_run_folder(run, config):
    """Create the output folder, or accept one with an unfinished run if --resume is set.

    Return its path. unfinished.json marks an unfinished run. It becomes run.json at the end.
    """
    out = Path(config.out)
    resumable = config.resume and any(out.glob("unfinished.json*"))     # also .tmp
    if any(out.glob("*")) and not resumable:
        fail(f"--out {config.out} is not empty; choose another folder (--resume continues only a "
             "run that has not finished)")
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(out / "unfinished.json", [run])
    return out


# --------------------------------------------------------------------------------------- main

def train(config):
    """Run both training stages and save the finished run in --out."""
    print(config)
    files = find_files(config)
    start = f"{config.facts}/base" if config.model == "tiny" else config.model
    model, tokenizer = load_model(start, config.device)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    sets = {}
    for name, path in files.items():
        sets[name] = read_examples(path, tokenizer, context) if path else []
    mixture = sets["known"] if config.known_only else sets["known"] + sets["new"]
    if not mixture:
        fail(f"no rows to train on in {files}; --known-only needs known facts")
    freeze(model, config)
    run = {"method": METHOD, "config": asdict(config)}
    evaluator = import_sibling("eval_hallucination")
    if evaluator is not None:
        # Fail on inputs that would invalidate the measurement, such as held-out facts that are also
        # trained on, and if --resume is used with other data or settings.
        run |= evaluator.check_run(model, tokenizer, start, files, sets, run)
    check_head(model, collate(mixture[:1], model.device), start)
    out = open_run_folder(run, config)
    print(f"{model.num_parameters():,} parameters, {len(mixture)} rows per epoch")

    def evaluate(metrics):
        """Add the accuracies to `metrics`; return {set: result of the evaluator}."""
        if evaluator is None:
            return {}
        return evaluator.evaluate_sets(model, tokenizer, sets, 4 * config.batch_size, metrics)

    def ce_loss(batch, counts):
        hidden = last_hidden_state(model, batch, config.dtype)
        return cross_entropy(model, hidden, batch, counts)

    # Stage 1: learn the answer format from known facts. The result is saved as out/before. A run
    # that was interrupted in this stage has no state.pt and starts over.
    state_path = out / "state.pt"
    if state_path.exists():         # before/ was saved first, so it is complete
        state = torch.load(state_path, map_location="cpu", weights_only=True)
        model, _ = load_model(out / "before", config.device)
        freeze(model, config)
    else:
        state = {"epoch": 0, "history": []}
        for metrics, _ in train_stage(1, model, sets["known"], ce_loss, config, state):
            state["history"].append(metrics)
        save_checkpoint(out / "before", model, tokenizer)
        metrics = {"stage": 2, "epoch": 0}
        state["before"] = evaluate(metrics)
        state["history"].append(metrics)
        log(metrics)
        save_state(state_path, state)

    # Stage 2: train on known and new facts together. Even in a resumed run, the model here is still
    # the stage-1 model: train_stage loads the later weights, even if no epochs remain.
    for metrics, new_state in train_stage(2, model, mixture, ce_loss, config, state):
        epoch = metrics["epoch"]
        if epoch == config.epochs or (config.eval_every and epoch % config.eval_every == 0):
            state["after"] = evaluate(metrics)
        state["history"].append(metrics)
        log(metrics)
        if config.save_every_epoch:
            save_checkpoint(out / f"epoch-{epoch}", model, tokenizer)
        save_state(state_path, state | new_state)
    save_checkpoint(out, model, tokenizer)
    write_jsonl(out / "metrics.jsonl", state["history"])
    if evaluator is not None:
        evaluator.write_answers(out, sets["heldout"], state["before"], state["after"])
    # After all other outputs: run.json marks a complete run.
    (out / "unfinished.json").replace(out / "run.json")
    state_path.unlink()
    if evaluator is not None:
        evaluator.main([config.out])        # prints accuracies and forgetting
    print(f"saved {config.out}")


def main(argv=None):
    """Run the command-line interface; report expected errors as one line on stderr."""
    try:
        train(parse_args(argv))
    except torch.OutOfMemoryError:
        fail("out of memory; run again with --resume, half the --batch-size and twice the "
             "--gradient-accumulation-steps")
    except (OSError, ValueError) as error:      # e.g. no such model, the disk is full, a bad row
        fail(" ".join(f"{error}".split()))
    except KeyboardInterrupt:
        print("interrupted; --resume continues after the last finished epoch of stage 2",
              file=sys.stderr)
        raise SystemExit(130)


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")    # the default on Windows lacks characters
    main()
