"""Freezing: supervised fine-tuning (SFT) of some groups of parameters, the others held still.

Fine-tune a language model on facts that it does not know, and it starts to get wrong facts
that it did know (Kaplan et al. 2026, arXiv:2604.15574). Where no new facts are needed, only a
task, train only what does not store them:

    L = CE                          over θ of --trainable roles in --layers; the rest is frozen
    L = CE + W · ‖θ − θ_before‖²    the soft freeze, --l2 W: change of the weights costs

Stage 1 (--format-epochs) trains on known facts only: the model learns the form of the task.
The result is *the model before*: what it knows is what can be forgotten. Stage 2 (--epochs)
trains on known and new facts together, with a fresh optimizer. This script differs from
sft_baseline.py in what is frozen, in both stages, and in the loss of stage 2: run diff on them.

    python sft_freeze.py                              a laptop; an invented world, made first
    python sft_freeze.py --model gpt2-medium          a GPU; real facts, labelled first
    python sft_freeze.py --model DIR --train my.jsonl rows {"prompt": …, "completion": …}

The last line you should see: saved runs/freeze-tiny-0
Copied alone, this file trains on JSONL; beside eval_hallucination.py it also measures accuracy.
"""
import importlib
import json
import math
import re
import shutil
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

METHOD = "freeze"
# What a parameter is for, by its name. If two patterns match, the first wins: a norm inside
# attention is a norm. The rest is `other`, which only --trainable other or all trains.
ROLES = {"norms": r"(norm|norm_\w+|\.ln_\w+)\.",
         "attention": r"\.(attn|attention|self_attn|self_attention)\.",
         "mlp": r"\.(mlp|ffn|feed_forward|fc1|fc2)\.",
         "embeddings": r"\.(wte|wpe|embed_\w+|word_embeddings|project_in)\.",
         "head": r"(lm_head|embed_out|project_out)\.",
         "other": r"."}
# What the command line leaves open: for the invented world, and for real models.
TINY = {"epochs": 60, "batch_size": 64, "learning_rate": 4e-4}
REAL = {"epochs": 12, "batch_size": 16, "learning_rate": 1e-4}


def option(default, text):
    """A flag, its default and its line in --help."""
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """Each field is a flag of the command line, --batch-size for batch_size."""
    # the model and its data
    model: str = option("tiny", "a causal language model, hub name or folder; tiny: FACTS/base")
    facts: str = option(None, "fact folder of make_facts.py, made if absent; default: facts/MODEL")
    train: str = option(None, "your own JSONL of prompt and completion, instead of a fact folder")
    known: str = option(None, "JSONL of facts it knows, to train on; without --train, of FACTS")
    heldout: str = option(None, "JSONL of facts it knows, to see what it forgets; as --known")
    out: str = option(None, f"folder of the run; default: runs/{METHOD}-MODEL-SEED")
    overwrite: bool = option(False, "delete the run that is in the folder")
    resume: bool = option(False, "go on after the last finished epoch of stage 2, if there is one")
    save_every_epoch: bool = option(False, "keep the weights after each epoch in a folder of OUT")
    eval_every: int = option(1, "measure accuracy every N epochs; 0: before stage 2 and at the end")
    no_unknown: bool = option(False, "stage 2 on known facts alone: a task without new facts")
    # optimisation
    format_epochs: int = option(1, "epochs of stage 1: they teach the form, not the facts")
    epochs: int = option(None, "epochs of stage 2; default: 60 for tiny, else 12")
    batch_size: int = option(None, "rows in a forward pass; default: 64 for tiny, else 16")
    accumulate: int = option(1, "passes in a step: a larger batch in the same memory")
    learning_rate: float = option(None, "its peak; default: 4e-4 for tiny, else 1e-4; paper: 5e-5")
    warmup: float = option(0.3, "share of steps in which it rises; large first steps forget most")
    weight_decay: float = option(0.01, "AdamW's, on matrices only")
    grad_clip: float = option(1.0, "largest norm of the gradient")
    seed: int = option(0, "of the order of the rows; the facts have a seed of their own")
    # the method
    trainable: str = option(None, "list of norms, attention, mlp, embeddings, head, other; or all; "
                                  "default: attention; all if --l2 is given")
    layers: str = option(None, "A-B: only what is in blocks A to B, counted from 0")
    l2: float = option(None, "W: hold the weights to those before stage 2")
    # the machine
    device: str = option("auto", "cuda, mps or cpu; auto: the first there is")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option("auto", "of autocast")


def fail(message):
    """End the program with one line on stderr and exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def parse(argv=None):
    """The Config of command-line words (list of str, default sys.argv), nothing left open."""
    parser = transformers.HfArgumentParser(Config, description=__doc__.splitlines()[0])
    parser.error = fail
    config = Config(**vars(parser.parse_args(argv)))
    # None stands for a default that depends on the model or the seed.
    model_name = Path(config.model).name
    defaults = {"facts": f"facts/{model_name}", "out": f"runs/{METHOD}-{model_name}-{config.seed}"}
    # A small model trained from scratch takes a higher learning rate than a large one.
    defaults |= TINY if config.model == "tiny" else REAL
    for name, value in defaults.items():
        if getattr(config, name) is None:
            setattr(config, name, value)
    at_least = {"epochs": 1, "batch_size": 1, "accumulate": 1, "grad_clip": 1e-6}
    for name, value in vars(config).items():
        least = at_least.get(name, 0)
        most = 1 if name == "warmup" else sys.maxsize
        if isinstance(value, (int, float)) and not least <= value <= most:
            fail(f"--{name.replace('_', '-')} {value}: must be from {least} to {most}")
    if config.trainable is None:
        config.trainable = "attention" if config.l2 is None else "all"
    if config.device == "auto":
        config.device = "cpu"
        if torch.accelerator.is_available():
            config.device = torch.accelerator.current_accelerator().type        # cuda, mps, xpu
    if config.dtype == "auto":
        # bf16 has the range of fp32, so that nothing overflows. Emulated it is slower than fp32.
        config.dtype = "float32"
        if config.device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
            config.dtype = "bfloat16"
    return config


def autocast(config):
    """The precision of a block: products in --dtype, weights and sums in fp32."""
    return torch.autocast(config.device, getattr(torch, config.dtype),
                          enabled=config.dtype != "float32")


def beside(name):
    """The module `name` of this project; None where this script was copied without it."""
    if not Path(__file__).with_name(f"{name}.py").exists():
        return None
    return importlib.import_module(name)


# ---------------------------------------------------------------------------------------- data

def find_files(config):
    """Paths of the JSONL files, {"unknown", "known", "heldout"}, None for what there is not.

    Without --train they are those of a fact folder, which make_facts.py makes if it is absent.
    """
    if config.train is not None:
        return {"unknown": config.train, "known": config.known, "heldout": config.heldout}
    make_facts = beside("make_facts")
    if make_facts is None:
        fail("make_facts.py is not beside this script: name a --model and your own rows, --train")
    return make_facts.find_files(config)


def tokenize(tokenizer, prompt, completion=""):
    """Token ids of one text, (prompt, completion): those of the prompt, then the rest.

    Both are encoded together, as one text: encoded alone, a completion would get a second ▁ from
    tokenizers that put one before every text (Llama 2, Mistral). If the tokens of the prompt are
    no prefix of those of the whole text, the completion is encoded alone after all. BOS comes
    first if the tokenizer adds it; an EOS that it puts behind every text is removed, since it
    would end the prompt.
    """
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    special = bos is None or not prompt.startswith(bos)     # a chat template may begin with BOS
    encoded = []
    for text in (prompt, prompt + completion):
        ids = tokenizer(text, add_special_tokens=special)["input_ids"]
        if ids[-1:] == [tokenizer.eos_token_id] and not text.endswith(eos):
            ids = ids[:-1]
        encoded.append(ids)
    before, whole = encoded
    if whole[:len(before)] == before:
        return before, whole[len(before):]
    return before, tokenizer(completion, add_special_tokens=False)["input_ids"]


def read_examples(path, tokenizer, context):
    """The rows of a JSONL file as training examples, list of dicts.

    row: the JSON object, with text under prompt and completion; ids: the tokens of the whole
    text, (T,) with T ≤ context; real: ones (T,); supervised: which are the completion's (T,).
    Ends the program at the first row that cannot be trained on, with file and line.
    """
    examples = []
    number, line = 0, b""
    try:
        for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
            if not line.strip():
                continue        # blank lines are no rows
            row = json.loads(line)
            prompt, completion = tokenize(tokenizer, row["prompt"], row["completion"])
            if not prompt or not completion or not row["completion"].strip():
                raise ValueError("nothing in it")
            # The end is learnt too: a newline in the last token is an end, else EOS is appended.
            last, eos = completion[-1], tokenizer.eos_token_id
            if last != eos and "\n" not in tokenizer.decode([last]):
                if eos is None:
                    raise ValueError("no newline at its end, and the tokenizer has no EOS")
                completion.append(eos)
            ids = torch.tensor(prompt + completion)
            # Refused, not cut: a prompt without its beginning is another prompt.
            if len(ids) > context:
                raise ValueError(f"{len(ids)} tokens, but the model reads {context}")
            examples.append({"row": row, "ids": ids, "real": torch.ones_like(ids),
                             "supervised": torch.arange(len(ids)) >= len(prompt)})
    except Exception as error:          # many kinds, by what is wrong with the row
        fail(f"{path}:{number}: {error!r} in {line[:60].decode(errors='replace')!r}; wanted: "
             "text under prompt and completion, as the README shows for chat messages too")
    return examples


def cut(items, size):
    """The list in pieces of `size`, the last may be shorter."""
    return [items[i:i + size] for i in range(0, len(items), size)]


def length(example):
    """Its tokens, prompt, completion and end."""
    return len(example["ids"])


def make_windows(examples, stage, epoch, config):
    """One epoch, a list of windows. A window is the list of batches of one optimizer step.

    The order is a function of seed, stage and epoch. So that little is padding, rows of similar
    length share a batch: four windows at a time are sorted by length before they are cut up.
    """
    # All methods see the same rows in the same order, so that runs of one seed can be paired.
    rng = np.random.default_rng([config.seed, stage, epoch])
    shuffled = [examples[i] for i in rng.permutation(len(examples))]
    size = config.batch_size * config.accumulate
    windows = []
    for pool in cut(shuffled, 4 * size):
        windows += cut(sorted(pool, key=length), size)
    return [cut(windows[i], config.batch_size) for i in rng.permutation(len(windows))]


def collate(examples, device):
    """A batch: {"ids", "real", "supervised"}, each (B, T), and its "examples", a list.

    Padded with 0 on the right, where nothing of a causal model looks at it. The masks come from
    the lengths, not from comparing with a padding token: that may be EOS, which is to be learnt.
    """
    batch = {"examples": examples}
    for key in ("ids", "real", "supervised"):
        padded = pad_sequence([example[key] for example in examples], batch_first=True)
        batch[key] = padded.to(device)
    return batch


# --------------------------------------------------------------------------- the model and its loss

def load_model(name, device):
    """(model, tokenizer), weights in fp32: steps of 1e-5 would vanish in bf16 weights.

    In eval mode, which means without dropout, in training too: its noise would add to every
    difference that is measured here.
    """
    evaluator = beside("eval_hallucination")
    if evaluator is not None:
        return evaluator.load_model(name, device)       # the same, and finds broken models
    print("note: no eval_hallucination.py here: accuracy is not measured")
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, trust_remote_code=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        return model.to(device).eval(), tokenizer
    except Exception as error:          # the library raises many kinds
        fail(f"--model {name}: {' '.join(str(error).split())[:300]}; wanted: a model's "
             "name on the hub, or a folder with config.json, model.safetensors and tokenizer")


def last_hidden(model, batch):
    """Hidden states behind the final norm, (B, T-1, d): each predicts the next token.

    The head makes logits of them, but only at positions that enter a loss: those of a whole
    batch, (B, T, V), can outweigh the model.
    """
    # Without the cache of keys and values, which only generation needs.
    output = model.base_model(input_ids=batch["ids"], attention_mask=batch["real"], use_cache=False)
    return output.last_hidden_state[:, :-1]


def check_head(model, batch, name):
    """Refuse a model whose logits are not those of its head on `last_hidden`; batch: a row."""
    try:
        logits = model.get_output_embeddings()(last_hidden(model, batch))       # (B, T-1, V)
        whole = model(input_ids=batch["ids"], use_cache=False).logits[:, :-1]
        torch.testing.assert_close(logits, whole, rtol=1e-4, atol=1e-4)
    except torch.OutOfMemoryError:
        raise
    except (AssertionError, AttributeError, RuntimeError, TypeError):   # other logits, or no head
        fail(f"--model {name}: caps or scales its logits, or has no linear head; train it in a "
             "trainer that takes the loss from whole logits")


def cross_entropy(model, hidden, batch, counts):
    """CE of a batch, as its share of the window: (loss, {"ce"}). hidden: of `last_hidden`.

    counts: {mask: number of predicted tokens under it, of all batches of the window}. The sum of
    a batch is divided by the count of the window, so that each token weighs the same; a mean of
    the batches' means would weigh the tokens of short batches more.
    """
    mask = batch["supervised"][:, 1:]                                               # (B, T-1)
    targets = batch["ids"][:, 1:][mask]                                             # (N,)
    logits = model.get_output_embeddings()(hidden[mask])                            # (N, V)
    # In fp32: a logarithm of a sum over V terms loses too much in half precision.
    ce = F.cross_entropy(logits.float(), targets, reduction="sum") / counts["supervised"]
    return ce, {"ce": ce}


def copy_trained(model):
    """{name: copy of its weights} of what is trained: 4 bytes a parameter."""
    copies = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            copies[name] = parameter.detach().clone()
    return copies


def l2_to_before(model, before, batch, counts, config):
    """CE + W · ‖θ − θ_before‖² of a batch, as its share of the window: (loss, terms).

    before: {name: weights} of what is trained. It costs memory for this copy, and for as many
    differences until the backward pass. Each batch of a window gets a share of the distance, by
    its tokens, so that it counts once a step.
    """
    ce, terms = cross_entropy(model, last_hidden(model, batch), batch, counts)
    # A pass over all trained weights in every batch: of a small model, that is most of a step.
    distance = 0
    for name, parameter in model.named_parameters():
        if name in before:
            distance = distance + (parameter - before[name]).square().sum()
    distance = distance * (batch["supervised"].sum() / counts["supervised"])
    return ce + config.l2 * distance, terms | {"distance": distance}


def role_of(name):
    """The role of a parameter, by its name."""
    for role, pattern in ROLES.items():
        if re.search(pattern, name):
            return role


def split_parameters(model, config):
    """{role: names of its parameters in --layers}. Each has one role; a tied head has two."""
    parameters = dict(model.named_parameters())
    # Which block a parameter is in, -1 for those outside the blocks, as embeddings are.
    blocks = {}
    for name in parameters:
        found = re.search(r"\.(h|layers|layer|blocks)\.(\d+)\.", name)
        blocks[name] = int(found[2]) if found else -1
    # By default all blocks and all that is outside of them.
    first, last = -1, max(blocks.values())
    if config.layers is not None:
        span = re.fullmatch(r"(\d+)-(\d+)", config.layers)
        if span is None or not int(span[1]) <= int(span[2]) <= last:
            fail(f"--layers {config.layers}: must be A-B, of the blocks 0 to {last}")
        first, last = map(int, span.groups())
    split = {role: [] for role in ROLES}
    for name in parameters:
        if first <= blocks[name] <= last:
            split[role_of(name)].append(name)
    # A head that is the embeddings' own matrix is one parameter, and is trained with either.
    head = model.get_output_embeddings().weight
    split["head"] += [name for name in split["embeddings"] if parameters[name] is head]
    return split


def freeze(model, config):
    """Make only the --trainable roles in --layers trainable; print how much of each is trained.

    Frozen weights get no gradient, and AdamW skips what has none, its decay included: they stay
    as they are, bit by bit.
    """
    split = split_parameters(model, config)
    roles = [role for role in split if split[role]]
    # Names of roles between commas, with or without spaces.
    wanted = config.trainable.replace(" ", "").split(",")
    # All includes other.
    if wanted == ["all"]:
        wanted = roles
    trained = set()
    for role in wanted:
        # A name that matches nothing would freeze everything without a word.
        if role not in roles:
            fail(f"--trainable {role}: no such weights; --layers {config.layers or '(all)'} has "
                 f"{', '.join(roles)}")
        trained.update(split[role])
    # What is frozen needs no gradient: less memory, and a shorter backward pass.
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    for role in roles:
        n_all, n_trained = 0, 0
        for name in split[role]:
            parameter = model.get_parameter(name)
            n_all += parameter.numel()
            if parameter.requires_grad:
                n_trained += parameter.numel()
        print(f"{role:10} {n_trained:>13,} of {n_all:>13,} weights are trained")


# ------------------------------------------------------------------------------------- training

def get_lr(step, total, config):
    """Learning rate at `step` of `total`: linear warm-up, then a cosine to a tenth of the peak."""
    # A long warm-up: large steps at the start, before Adam's moments settle, forget most.
    warm = math.ceil(config.warmup * total)
    if step < warm:
        return config.learning_rate * (step + 1) / warm
    cosine = 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, total - 1 - warm)))
    return config.learning_rate * (0.1 + 0.9 * cosine)


def make_optimizer(model, config):
    """AdamW; biases and norms, which are vectors, are not decayed."""
    matrices = {"params": [], "weight_decay": config.weight_decay}
    vectors = {"params": [], "weight_decay": 0.0}
    for parameter in model.parameters():
        group = matrices if parameter.ndim >= 2 else vectors
        group["params"].append(parameter)
    # Fused: one kernel updates all weights. The learning rate is set in every step.
    return torch.optim.AdamW([matrices, vectors], fused=True)


def run_stage(stage, model, examples, loss_function, config, state):
    """Train for the epochs of `stage` (1 or 2): a generator, of (metrics, state) after each.

    loss_function(batch, counts) -> (loss, {name: part of it to log}). metrics: the parts, means
    over the windows of the epoch. state: {"epoch": 0} to begin, or one that was yielded, to go on
    after its epoch. Nothing is random but the order of the rows, which is a function of seed,
    stage and epoch: an interrupted run ends like any other, on a CPU bit by bit.
    """
    epochs = config.format_epochs if stage == 1 else config.epochs
    # The gradient and Adam's two moments cost three times the memory of what is trained.
    optimizer = make_optimizer(model, config)
    # fp16 loses gradients below 6e-8, so its loss is scaled up; elsewhere this does nothing.
    scaler = torch.amp.GradScaler(config.device, enabled=config.dtype == "float16")
    if state["epoch"] > 0:      # stage 2, resumed
        # pop: the state would else keep a second copy of the weights.
        model.load_state_dict(state.pop("model"))
        optimizer.load_state_dict(state.pop("optimizer"))
        scaler.load_state_dict(state.pop("scaler"))
    for epoch in range(state["epoch"] + 1, epochs + 1):
        windows = make_windows(examples, stage, epoch, config)
        metrics = {"stage": stage, "epoch": epoch}
        bar = tqdm(windows, f"stage {stage}, epoch {epoch} of {epochs}", leave=False, disable=None)
        for step, window in enumerate(bar, (epoch - 1) * len(windows)):
            batches = [collate(part, model.device) for part in window]
            # How many tokens the window predicts, of completions and in all: CE is a mean over
            # the former, the KL of sft_selfdistill.py over the latter.
            counts = {"supervised": 0, "real": 0}
            for batch in batches:
                for mask in counts:
                    counts[mask] += batch[mask][:, 1:].sum()
            # Only one batch has its activations in memory at a time, the gradients add up.
            logged = {}
            for batch in batches:
                with autocast(config):
                    loss, terms = loss_function(batch, counts)
                scaler.scale(loss).backward()
                for name, term in terms.items():
                    logged[name] = logged.get(name, 0) + term.detach()
            lr = get_lr(step, epochs * len(windows), config)
            for group in optimizer.param_groups:
                group["lr"] = lr
            scaler.unscale_(optimizer)          # so that the gradient itself is clipped
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
            # Read once a step, not in every batch: reading makes Python wait for the GPU.
            *numbers, norm = torch.stack([*logged.values(), norm]).tolist()
            # A gradient too large for fp16 is the scaler's affair: it skips the step and halves
            # its scale. Without a scaler, or at scale 1, training has diverged.
            diverged = not math.isfinite(norm) and scaler.get_scale() <= 1
            if diverged or not math.isfinite(sum(numbers)):
                fail(f"stage {stage}, epoch {epoch}, step {step + 1}: loss or gradient is not "
                     "finite; lower --learning-rate or take --dtype float32")
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            values = dict(zip(logged, numbers))
            for name, value in values.items():
                metrics[name] = metrics.get(name, 0) + value / len(windows)
            if step == 0:
                print(f"stage {stage}, step 1: {values}")
            bar.set_postfix(values)
        yield metrics, {"epoch": epoch, "model": model.state_dict(),
                        "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}


# ------------------------------------------------------------------------------- the run's folder
# Every file is written all or nothing: to a temporary name, which is then renamed.

def write_jsonl(path, rows):
    """Write dicts, one a line."""
    temporary = path.with_name(f"{path.name}.tmp")
    lines = [json.dumps(row) + "\n" for row in rows]
    temporary.write_text("".join(lines), encoding="utf-8")
    temporary.replace(path)


def save_state(path, state):
    """Write what --resume starts from: up to 12 bytes a parameter, with Adam's moments."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        torch.save(state, temporary)
    except RuntimeError as error:       # what torch makes of a full disk, and of Ctrl-C
        if isinstance(error.__context__, KeyboardInterrupt):
            raise error.__context__
        raise OSError(f"{path}: {error}")
    temporary.replace(path)


def save_checkpoint(folder, model, tokenizer):
    """Write an ordinary checkpoint, for `from_pretrained`."""
    temporary = folder / "tmp"
    # safetensors, in fp32: 4 bytes a parameter
    model.save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    for file in temporary.iterdir():
        file.replace(folder / file.name)
    temporary.rmdir()


def open_folder(inputs, run, config):
    """Make the folder of a run, or check that it can go on in it; returns its path.

    A folder with unfinished.json is a run that is not finished; at the end that becomes run.json.
    A folder of anything else is refused, and so is one that holds, or is held by, an input (list
    of paths).
    """
    out = Path(config.out).resolve()
    for path in filter(None, inputs):
        place = Path(path).resolve()
        if out == place or out in place.parents or place in out.parents:
            fail(f"--out {config.out}: is the place of {path}; name another folder")
    finished = (out / "run.json").exists()
    if finished and config.resume:
        print(f"{config.out} is finished: there is nothing to resume")
        raise SystemExit            # status 0
    is_run = finished or any(out.glob("unfinished.json*"))
    if any(out.glob("*")):
        if not is_run or not (config.overwrite or config.resume):
            fail(f"--out {config.out}: exists already; only a run can be deleted, by --overwrite, "
                 "or continued, by --resume")
        if config.resume and (out / "state.pt").exists():
            return out
        shutil.rmtree(out)              # a run that ended in stage 1 begins anew
    out.mkdir(parents=True, exist_ok=True)
    write_jsonl(out / "unfinished.json", [run])
    return out


# --------------------------------------------------------------------------------------- the run

def train(config):
    """Both stages; leaves a finished run in --out. Returns its metrics, a list of dicts."""
    print(config)
    files = find_files(config)
    start = f"{config.facts}/base" if config.model == "tiny" else config.model
    model, tokenizer = load_model(start, config.device)
    limits = model.config.get_text_config()         # of a vision-language model: its text part
    context = getattr(limits, "max_position_embeddings", getattr(limits, "max_seq_len", None))
    sets = {}
    for name, path in files.items():
        sets[name] = read_examples(path, tokenizer, context or math.inf) if path else []
    mixture = sets["known"] if config.no_unknown else sets["known"] + sets["unknown"]
    if not mixture:
        fail(f"no rows to train on in {files}; with --no-unknown these are the known ones alone")
    check_head(model, collate(mixture[:1], model.device), start)
    freeze(model, config)
    run = {"method": METHOD, "config": asdict(config)}
    evaluator = beside("eval_hallucination")
    if evaluator is not None:
        # Refuses held-out facts that are trained on, and --resume with other settings or data.
        run |= evaluator.check_run(model, start, files, sets, run)
    out = open_folder([start, *files.values()], run, config)    # all input was read before this
    print(f"{model.num_parameters():,} parameters, {len(mixture)} rows an epoch")

    def score(metrics):
        """{set: result of `evaluate`}, whose accuracies are put into `metrics`."""
        if evaluator is None:
            return {}
        with autocast(config):
            return evaluator.evaluate_sets(model, tokenizer, sets, 4 * config.batch_size, metrics)

    def plain(batch, counts):
        return cross_entropy(model, last_hidden(model, batch), batch, counts)

    # Stage 1: the form of the task, from known facts. Its result is kept as out/before.
    state_path = out / "state.pt"
    if state_path.exists():         # then before/ is complete: it was written first
        try:
            state = torch.load(state_path, map_location="cpu", weights_only=True)
        except Exception as error:      # many kinds, by what is broken
            fail(f"--resume: {state_path} cannot be read ({error!r}); --overwrite starts anew")
        model, _ = load_model(out / "before", config.device)
        freeze(model, config)
    else:
        state = {"epoch": 0}
        stage = run_stage(1, model, sets["known"], plain, config, state)
        state["history"] = [metrics for metrics, _ in stage]
        save_checkpoint(out / "before", model, tokenizer)
        metrics = {"stage": 2, "epoch": 0}
        state["before"] = score(metrics)
        state["history"].append(metrics)
        print(metrics)
        save_state(state_path, state)

    # Stage 2: known and new facts together (--no-unknown: known ones alone).
    loss_function = plain
    if config.l2 is not None:
        before = copy_trained(model)
        def loss_function(batch, counts):
            return l2_to_before(model, before, batch, counts, config)

    for metrics, parts in run_stage(2, model, mixture, loss_function, config, state):
        epoch = metrics["epoch"]
        if epoch == config.epochs or (config.eval_every and epoch % config.eval_every == 0):
            state["after"] = score(metrics)
        state["history"].append(metrics)
        print(metrics, flush=True)
        if config.save_every_epoch:
            save_checkpoint(out / f"epoch-{epoch}", model, tokenizer)
        save_state(state_path, state | parts)
    save_checkpoint(out, model, tokenizer)
    write_jsonl(out / "metrics.jsonl", state["history"])
    if evaluator is not None:
        evaluator.write_answers(out, sets, state["before"], state["after"])
    (out / "unfinished.json").replace(out / "run.json")     # it says that all else is there
    state_path.unlink()
    if evaluator is not None:
        evaluator.main([config.out])
    print(f"saved {config.out}")
    return state["history"]


def main(argv=None):
    """Train as command-line words say; what goes wrong on the way is one line on stderr."""
    try:
        return train(parse(argv))
    except torch.OutOfMemoryError:
        fail("out of memory; --resume with half the --batch-size and twice the --accumulate")
    except (OSError, SafetensorError) as error:         # a full disk above all
        fail(f"{error}; --resume goes on after the last finished epoch of stage 2")
    except KeyboardInterrupt:
        print("interrupted; --resume goes on after the last epoch of stage 2", file=sys.stderr)
        raise SystemExit(130)


if __name__ == "__main__":
    main()
