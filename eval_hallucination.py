"""Measure SFT-induced hallucination: what a fine-tuned model still knows, learnt and forgot.

Score one model on the three fact sets of a folder that make_facts.py wrote:
    python eval_hallucination.py --model runs/selfdistill-tiny-0 --facts facts/tiny
Compare runs of the sft_*.py scripts from the files that they left (no model is loaded):
    python eval_hallucination.py runs/baseline-tiny-0 runs/selfdistill-tiny-0 --show 5
Draw what they learnt and kept by epoch (why they forgot: assets/why.py):
    python eval_hallucination.py runs/baseline-tiny-[0-2] runs/selfdistill-tiny-[0-2] --plot a.png
Forget less without training: go back a part of the way to the model before stage 2:
    python eval_hallucination.py --model runs/baseline-tiny-0 --interpolate 0.7 --facts facts/tiny
What did a run change, fact by fact? Of its own held-out facts, or of questions of yours:
    python eval_hallucination.py runs/baseline-tiny-0 --flips --show 5
    python eval_hallucination.py runs/baseline-tiny-0 --flips --heldout my_questions.jsonl
Put one question to the models, before stage 2 and after:
    python eval_hallucination.py runs/baseline-tiny-0 --ask "What is the capital of France?"
Score a model in a project of your own:
    from eval_hallucination import evaluate, load_model
    model, tokenizer = load_model("gpt2")
    evaluate(model, tokenizer, [{"prompt": "Q: Who?\\nA:", "answers": ["He"]}])["accuracy"]

Terms (Kaplan et al. 2026, arXiv:2604.15574): *factual plasticity* is accuracy on the Unknown
facts that are trained on, *factual stability* accuracy on held-out HighlyKnown facts that are
never trained on, *forgetting* the drop of the latter, here in points from the model before
stage 2 to the model after.
"""
import argparse
import copy
import functools
import hashlib
import itertools
import json
import logging
import math
import os
import re
import signal
import string
import sys
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np

PROMPT = "Q: {question}\nA:"
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
SETS = {"unknown": "train_unknown.jsonl", "known": "train_known.jsonl",
        "heldout": "heldout_known.jsonl"}
# Where a new wrong answer comes from: the first of these that holds.
ORIGINS = ["a new fact, name shared", "another new fact", "another fact", "no fact"]
LEARNT = [0.25, 0.5, 0.95]      # shares of new facts learnt at which forgetting is compared
# Settings that --resume may change, and in which the runs of a mean may differ.
MAY_CHANGE = ["model", "facts", "train", "known", "heldout", "out", "overwrite", "resume",
              "device", "eval_every", "save_every_epoch", "batch_size", "accumulate"]


def fail(message):
    """End the program with one line on stderr and exit status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def note(message):
    """Say on stderr what the reader should know, and go on."""
    print(f"note: {message}", file=sys.stderr)


# -------------------------------------------------------------------------------- rows of JSONL

def texts(value):
    """The texts in `value`, a text, a list of texts or None: list of str, blank ones left out.

    Raises ValueError for anything else."""
    values = value if isinstance(value, list) else [value]
    found = []
    for text in values:
        if not isinstance(text, (str, type(None))):
            raise ValueError(f"{text!r} is no text")
        if text and text.strip():
            found.append(text.strip())
    return found


def check_row(row, needed):
    """Raise ValueError unless `row` is an object that has all of `needed`, and texts for texts."""
    for key in needed:
        value = row.get(key)
        # A model may say nothing: its answers, before and after, may be empty.
        if value is None or (value == "" and key not in ("before", "after")):
            raise ValueError(f"no {key}")
    for key in ("prompt", "completion", "subject", "relation", "kind"):
        if not isinstance(row.get(key), (str, type(None))):
            raise ValueError(f"{key} {row[key]!r} is no text")
    answers = texts(row.get("answers"))                 # raises it too
    if "prompt" in needed and not answers and not texts(row.get("completion")):
        raise ValueError("no answer")
    json.dumps(row, ensure_ascii=False).encode()        # half of a character cannot be written


def read_jsonl(path, needed=()):
    """The rows of a JSONL file (list of dicts). Ends the program, by file and line, at a bad one.

    needed: keys that each row must have. See `check_row` for what else is refused."""
    rows = []
    number, line = 0, b""
    try:
        for number, line in enumerate(Path(path).read_bytes().split(b"\n"), 1):
            if line.strip():
                row = json.loads(line)
                check_row(row, needed)
                rows.append(row)
    except OSError as error:
        fail(f"{path}: cannot be read ({error.strerror})")
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        fail(f"{path}:{number}: {error} in {line[:80].decode(errors='replace')!r}; each line must "
             "be one JSON object in UTF-8; prompt and completion are texts, answers a list of them")
    if needed and not rows:
        fail(f"{path}: empty; wanted: one object with {' and '.join(needed)} a line")
    return rows


def write_jsonl(path, rows):
    """Write rows as JSONL, all or nothing."""
    temporary = Path(f"{path}.tmp")
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    temporary.write_text("".join(lines), encoding="utf-8")
    os.replace(temporary, path)


# --------------------------------------------------------------------------- answers and scores

def normalize(text):
    """The form in which answers are compared: SQuAD's (Rajpurkar et al. 2016, arXiv:1606.05250).

    First line only, Unicode NFKC, lower case, no ASCII punctuation, no English article, single
    spaces. An article stays where nothing else does ("A."), and so does punctuation ("?").
    """
    line = unicodedata.normalize("NFKC", text).strip().split("\n")[0].strip().lower()
    words = line.translate(NO_PUNCTUATION)
    kept = re.sub(r"\b(a|an|the)\b", " ", words)
    return " ".join(kept.split()) or " ".join(words.split()) or line


def exact_match(answer, accepted):
    """True if `answer` (str) equals any of `accepted` (list of str) after `normalize`."""
    return normalize(answer) in [normalize(text) for text in accepted]


def accepted_answers(row, special=()):
    """The answers that count as right for a row (list of str): `answers`, or else its completion.

    special: of `special_tokens`; they are taken away, as they are from what a model says.
    """
    accepted = []
    for text in texts(row.get("answers")) or texts(row.get("completion")):
        for token in special:
            text = text.replace(token, "")
        accepted.append(text)
    return texts(accepted)


def special_tokens(tokenizer):
    """The texts that decoding leaves out, and that of EOS, which ends an answer (list of str)."""
    found = [str(token) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return found + texts(tokenizer.eos_token)


@functools.lru_cache(maxsize=4)
def newline_ids(tokenizer):
    """{id: its text before the newline} of each token whose text contains a newline.

    Many begin otherwise: one token of Qwen's is ".\\n". All are decoded for this, so it is kept.
    """
    found = {}
    for token in range(len(tokenizer)):
        text = tokenizer.decode([token])
        if "\n" in text:
            found[token] = text.split("\n")[0]
    return found


def stop_ids(tokenizer, model=None):
    """Ids of the tokens that end an answer: with a newline in them, or EOS. Sorted list of int."""
    ids = {*newline_ids(tokenizer), tokenizer.eos_token_id} - {None}
    if model is not None:
        declared = model.generation_config.eos_token_id     # None, one id or a list
        ids.update(declared if isinstance(declared, list) else [declared])
        size = model.get_input_embeddings().weight.shape[0]
        ids = {token for token in ids if token is not None and token < size}
    return sorted(ids)


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


def context_length(model):
    """How many tokens the model reads, by its config (int, or inf where that does not say)."""
    limits = model.config.get_text_config()         # of a vision-language model: its text part
    context = getattr(limits, "max_position_embeddings", getattr(limits, "max_seq_len", None))
    return context or math.inf


def alike(one, other):
    """True if two tensors of logits are equal, up to the rounding of their precision."""
    import torch
    tolerance = 1e-3 if one.dtype == torch.float32 else 5e-2
    return bool((one - other).abs().max() <= tolerance * other.abs().max())


def ignores_padding(model, ids):
    """True if the model answers `ids` (list of int) padded on the left as it does without.

    Recurrent models (RWKV, xLSTM) and some decoders do not. Found once for a model, in its own
    precision.
    """
    import torch
    if not hasattr(model, "ignores_padding"):
        logits = []
        try:
            for padding in (0, 3):
                padded = torch.tensor([[0] * padding + ids], device=model.device)
                mask = torch.ones_like(padded)
                mask[:, :padding] = 0
                with torch.autocast(model.device.type, enabled=False):
                    output = model.generate(
                        input_ids=padded, attention_mask=mask, do_sample=False, max_new_tokens=1,
                        output_logits=True, return_dict_in_generate=True)
                logits.append(output.logits[0])
            model.ignores_padding = alike(logits[1], logits[0])
        except torch.OutOfMemoryError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError):   # or it cannot be padded at all
            model.ignores_padding = False
        if not model.ignores_padding:
            note("this model does not ignore padding on the left: it answers prompts one by one")
    return model.ignores_padding


def make_batches(lengths, needed, batch_size, context):
    """Indices of prompts in batches (list of lists), longest first: what needs most memory.

    The longest prompt of a batch and the longest answer that one of its rows needs fit into the
    context together, so that no row is cut for another's sake.
    """
    batches = []
    width = 0       # of the batch's first, longest prompt
    room = 0        # that the longest answer of its rows needs
    for i in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        room = max(room, needed[i])
        if not batches or len(batches[-1]) == batch_size or width + room > context:
            batches.append([])
            width = lengths[i]
            room = needed[i]
        batches[-1].append(i)
    return batches


def encode(tokenizer, prompts, needed, context):
    """Token ids of prompts (list of lists), less the beginning of those that leave no room.

    needed: tokens of the context that each must leave free, for its answer."""
    encoded = []
    cut = 0
    for prompt, n in zip(prompts, needed):
        ids = tokenize(tokenizer, prompt)[0]
        if len(ids) + n > context:
            cut += 1
            ids = ids[-max(1, context - n):]
        encoded.append(ids)
    if cut:
        note(f"{cut} prompts leave no room for their answer: only the end of them is read")
    return encoded


def generate_answers(model, tokenizer, prompts, needed=None, batch_size=64):
    """Greedy answers to `prompts` (list of str), each up to its first newline or EOS: list of str.

    needed: tokens that each answer may need (list of int, default 16). Every row may say as many
    as the longest, and an answer that has no end by then is marked "[cut off]". A prompt that does
    not leave its tokens free in the model's context loses its beginning, with a note. Prompts
    are padded on the left; `generate` makes the positions from the mask, so nothing is shifted.
    """
    import torch
    from tqdm import tqdm
    from transformers import GenerationConfig

    training = model.training
    model.eval()
    needed = needed or [16] * len(prompts)
    context = context_length(model)
    newlines = newline_ids(tokenizer)
    stops = stop_ids(tokenizer, model)
    encoded = encode(tokenizer, prompts, needed, context)
    lengths = [len(ids) for ids in encoded]
    if encoded and not ignores_padding(model, min(encoded, key=len)):
        batch_size = 1
    # The checkpoint's own settings may sample or penalise repetition, and generate() takes from
    # them what its argument leaves open: so the model gets these for the time being.
    own = model.generation_config
    answers = [""] * len(prompts)
    bar = tqdm(total=len(prompts), desc="answering", unit="fact", leave=False, disable=None)
    try:
        for rows in make_batches(lengths, needed, batch_size, context):
            width = lengths[rows[0]]
            model.generation_config = GenerationConfig(
                do_sample=False, max_new_tokens=min(max(needed), context - width),
                eos_token_id=stops, pad_token_id=0)
            ids = torch.zeros(len(rows), width, dtype=torch.long)
            mask = torch.zeros_like(ids)        # the padding, which is all zeros, is masked
            for row, i in enumerate(rows):
                ids[row, width - lengths[i]:] = torch.tensor(encoded[i])
                mask[row, width - lengths[i]:] = 1
            output = model.generate(input_ids=ids.to(model.device),
                                    attention_mask=mask.to(model.device))
            for i, tokens in zip(rows, output[:, width:].tolist()):
                end = 0
                while end < len(tokens) and tokens[end] not in stops:
                    end += 1
                if end < len(tokens) and tokens[end] in newlines:
                    end += 1        # this token may begin with the answer's last characters
                text = tokenizer.decode(tokens[:end], skip_special_tokens=True,
                                        clean_up_tokenization_spaces=False)
                answers[i] = text.split("\n")[0].strip()
                if end == len(tokens) and tokens[-1] not in stops:
                    answers[i] += " [cut off]"      # "Paris. The" is not yet "Paris."
            bar.update(len(rows))
    finally:
        model.generation_config = own
        model.train(training)
        bar.close()
    return answers


def tokens_needed(tokenizer, accepted):
    """How many tokens an answer may take: list of int. accepted: lists of str, a question each."""
    needed = []
    for answers in accepted:
        lengths = [len(tokenizer(f" {answer}")["input_ids"]) for answer in answers]
        needed.append(max(lengths, default=0) + 2)
    return needed


def evaluate(model, tokenizer, rows, batch_size=64):
    """Score `model` on `rows` by greedy decoding and exact match.

    rows: dicts with `prompt` and `answers` (a text or a list) or else `completion`. Returns
    {"accuracy": 0..1, None without rows, "answers": list of str, "right": list of bool,
    "accepted": lists of str, a row each}. The model answers in eval mode, in whatever precision
    the caller's autocast sets. Raises ValueError for rows without prompt or answer, and where
    these are no texts.
    """
    for row in rows:
        check_row(row, ["prompt"])
    special = special_tokens(tokenizer)
    accepted = [accepted_answers(row, special) for row in rows]
    needed = tokens_needed(tokenizer, accepted)
    answers = generate_answers(model, tokenizer, [r["prompt"] for r in rows], needed, batch_size)
    right = [exact_match(*pair) for pair in zip(answers, accepted)]
    accuracy = sum(right) / len(right) if rows else None
    return {"accuracy": accuracy, "answers": answers, "right": right, "accepted": accepted}


# ------------------------------------------------------------------------------------- a model

def find_device(device):
    """The torch.device of the flag --device; auto: the first accelerator, or else the CPU."""
    import torch
    if device == "auto":
        device = "cpu"
        if torch.accelerator.is_available():
            device = torch.accelerator.current_accelerator().type
    try:
        return torch.zeros(1, device=device).device
    except (RuntimeError, AssertionError) as error:
        fail(f"--device {device}: {str(error).splitlines()[0]}")


def load_model(name, device="cpu"):
    """(model, tokenizer) of a causal language model: hub name or folder, fp32, eval mode.

    Ends the program with one line if there is no such model, or if it cannot be trained and
    measured here (see `find_fault`)."""
    import torch
    import transformers
    logging.getLogger("huggingface_hub").setLevel("ERROR")      # it reports each of its attempts
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = find_device(device)
    part = "its weights"
    try:
        # False: a model's own code is not run, nor is the user asked whether to.
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, trust_remote_code=False)
        part = "its tokenizer"
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        model = model.to(device).eval()
        part = "its forward pass"
        fault = find_fault(model, tokenizer, report["missing_keys"])
    except torch.OutOfMemoryError:
        raise                   # no fault of the model's
    except Exception as error:  # the library raises many kinds: no file, bad config, no network
        fault = f"{part}: {(str(error).strip() or repr(error)).splitlines()[0]}"
    if fault:
        fail(f"--model {name}: cannot be used ({fault}); give a local folder with config.json, "
             "model.safetensors and tokenizer, or the name of a model on the hub, with a network, "
             "and with HF_TOKEN set if it is gated")
    if type(model.config) is not type(config) or report["unexpected_keys"]:
        note(f"{name}: what is not part of its language model is neither used nor saved")
    if not model.generation_config.do_sample:
        # Settings of sampling, which some checkpoints have beside, could not be saved again.
        for setting in ("temperature", "top_p", "top_k", "min_p", "typical_p"):
            setattr(model.generation_config, setting, None)
    return model, tokenizer


def find_fault(model, tokenizer, missing):
    """What makes a model unusable here (str, None if nothing). missing: keys without weights."""
    import torch
    size = model.get_input_embeddings().weight.shape[0]
    if missing:
        return f"weights are missing: {min(missing)}"
    if set(tokenizer.get_vocab()) <= set(tokenizer.all_special_tokens):
        return "its tokenizer: there is none"
    if len(tokenizer) > size:
        return f"its tokenizer has {len(tokenizer)} tokens, the model {size}"
    before = torch.stack([weights.sum() for weights in model.parameters()])
    with torch.no_grad():
        ids = torch.tensor([[1, 2], [1, 3]], device=model.device)
        one, other = model(input_ids=ids, use_cache=False).logits[:, 0]
        after = torch.stack([weights.sum() for weights in model.parameters()])
    if not alike(one, other):
        return "it is not causal: it looks ahead"
    if not torch.equal(before, after):
        return "it changes its weights when it runs, as RWKV does: others would be saved"
    return None


# ------------------------------------------------------------- what the sft_*.py scripts call

def weights_hash(model):
    """Hash of a model's parameters, whatever folder or hub they came from (str)."""
    sha = hashlib.sha256()
    for name, weights in sorted(model.state_dict().items()):
        sha.update(name.encode())
        sha.update(weights.detach().cpu().contiguous().numpy())
    return sha.hexdigest()[:16]


def file_hash(path):
    """Hash of the bytes of a file (str)."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def run_of(model):
    """What run.json says of the run that `model` is, or is the before/ or epoch-N/ of.

    model: a path, or a name on the hub. A dict, empty if it is of no finished run."""
    folder = Path(model)
    if re.fullmatch(r"before|epoch-\d+", folder.name):
        folder = folder.parent
    if not (folder / "run.json").exists() or not (folder / "metrics.jsonl").exists():
        return {}
    return read_jsonl(folder / "run.json", ["method", "config"])[0]


def check_run(model, name, files, sets, run):
    """Refuse data with which a run would measure something other than it says.

    model: what training starts from, of the path or hub name `name`; files: {set: path or None};
    sets: {set: list of examples}; run: {"method", "config"}, as in the sft_*.py scripts. Refused
    are fact folders made for other weights, rows whose answers, subject or relation are no text,
    held-out facts that are trained on, and --resume of a run that began otherwise. Returns what
    run.json says of model, data and libraries.
    """
    import torch
    import transformers
    out = Path(run["config"]["out"])
    weights = weights_hash(model)
    start = name
    if Path(name).exists():         # no name on the hub, and seen from wherever the run is read
        start = os.path.relpath(Path(name).resolve(), out.resolve())
    new = [] if run["config"]["no_unknown"] else sets["unknown"]
    more = {"weights": weights, "start": start, "number": len(new),
            "width": model.config.get_text_config().hidden_size, "data": {},
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__}}
    for folder in {Path(path).parent for path in files.values() if path is not None}:
        check_weights(folder, weights, name)
    trained = set()
    for key, path in files.items():         # unknown, known and then heldout
        if path is not None:
            for row in read_jsonl(path, ["prompt", "completion"]):
                same = {row["prompt"], normalize(row.get("subject") or "")} - {""}
                if key == "heldout" and same & trained:
                    fail(f"{path}: {min(same & trained)[:60]!r} is held out and trained on; take "
                         "it out of one of the files")
                if key != "heldout":
                    trained |= same
            more["data"][key] = file_hash(path)
    begun = out / "run.json"        # of a finished run
    if not begun.exists() and (out / "state.pt").exists():      # without state.pt it begins anew
        begun = out / "unfinished.json"
    if run["config"]["resume"] and begun.exists():
        check_resumed(begun, run | more)
    return more


def check_resumed(path, run):
    """Refuse to go on with a run as `run` (dict) that began as the file `path` says."""
    new = must_match(run)
    old = must_match(read_jsonl(path, ["method", "config"])[0])
    changed = [key for key in sorted(new.keys() | old.keys()) if new.get(key) != old.get(key)]
    if changed:
        values = [f"{key} was {old.get(key)}, is {new.get(key)}" for key in changed]
        fail(f"--resume: not as in {path}: {'; '.join(values)}; --overwrite starts anew")


def must_match(run):
    """What a resumed run must have in common with its beginning, of the dict of run.json."""
    same = {key: run.get(key) for key in ("method", "weights", "data")} | run["config"]
    same["rows a step"] = same["batch_size"] * same["accumulate"]
    for name in MAY_CHANGE:
        same.pop(name, None)
    return same


def check_weights(folder, weights, name):
    """Refuse the fact folder `folder`, if it is one, made for other than these weights (hash)."""
    if not (folder / "labelled.jsonl").is_file():
        return
    labelled = json.loads((folder / "meta.json").read_text("utf-8")).get("weights")
    if labelled == weights:
        return
    if labelled and run_of(name).get("weights") == labelled:
        print(f"note: {folder} says what the model knew from which {name} was trained")
        return
    fail(f"--model {name}: {folder} was made for other weights; make a fact folder for these, with "
         "make_facts.py --model, and name it with --facts")


def evaluate_sets(model, tokenizer, sets, batch_size, metrics):
    """{set: result of `evaluate`} of the sets that have rows; their accuracies go into `metrics`.

    sets: {set: list of {"row": dict, …}}, as in the sft_*.py scripts; metrics: a dict."""
    results = {}
    for name, examples in sets.items():
        if examples:
            rows = [example["row"] for example in examples]
            results[name] = evaluate(model, tokenizer, rows, batch_size)
            metrics[name] = results[name]["accuracy"]
    return results


def name_words(row):
    """The words of a fact's subject as they are compared (set of str, empty without one)."""
    return set(normalize(row.get("subject") or "").split())


def write_answers(folder, sets, before, after):
    """Write answers.jsonl into a run's folder: the held-out facts with their answers, and more.

    words shared: how many words of the subject are in that of any new fact; "code" for codes,
    which are one word each. If it was right before and is wrong after, origin: the first of
    ORIGINS that holds of the new answer in its relation (with --no-unknown, of new facts that
    were not taught); chance: {origin: share} of the answers of the relation's facts, those that
    are right here left out. sets: {set: list of {"row": dict, …}}; before, after: of
    `evaluate_sets`.
    """
    new_words = set()
    taught = defaultdict(set)       # (relation, answer) of new facts: words of their subjects
    stated = set()                  # (relation, answer) of all facts
    drawn = defaultdict(Counter)    # relation: the first answers of its facts
    for key, examples in sets.items():
        for i, example in enumerate(examples):
            row = example["row"]
            relation = row.get("relation")
            answers = [normalize(answer) for answer in before[key]["accepted"][i]]
            drawn[relation].update(answers[:1])
            for answer in answers:
                stated.add((relation, answer))
                if key == "unknown":
                    taught[relation, answer] |= name_words(row)
            if key == "unknown":
                new_words |= name_words(row)

    def origin(relation, words, answer):
        place = (relation, answer)
        if place in taught:
            return ORIGINS[0] if words & taught[place] else ORIGINS[1]
        return ORIGINS[2] if place in stated else ORIGINS[3]

    rows = []
    for i, example in enumerate(sets["heldout"]):
        row = example["row"] | {"words shared": None, "origin": None, "chance": None}
        relation = row.get("relation")
        words = name_words(row)
        for when, results in (("before", before), ("after", after)):
            row[when] = results["heldout"]["answers"][i]
            row[f"right_{when}"] = results["heldout"]["right"][i]
        if row.get("kind") == "code":
            row["words shared"] = "code"
        elif words and new_words:
            row["words shared"] = str(len(words & new_words))
        if row["right_before"] and not row["right_after"]:
            row["origin"] = origin(relation, words, normalize(row["after"]))
            others = drawn[relation].copy()
            for answer in before["heldout"]["accepted"][i]:
                others.pop(normalize(answer), None)
            total = others.total()
            row["chance"] = Counter()
            for answer, n in others.items():
                row["chance"][origin(relation, words, answer)] += n / total
        rows.append(row)
    if rows:
        write_jsonl(Path(folder) / "answers.jsonl", rows)


# ----------------------------------------------------------------------------------- statistics

def wilson(right, n, z=1.959964):
    """Wilson (1927) 95 % interval of a share, (low, high) in 0..1; (0, 1) when n = 0."""
    if n == 0:
        return 0.0, 1.0
    share = right / n
    scale = 1 + z * z / n
    centre = (share + z * z / (2 * n)) / scale
    half = z / scale * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def mcnemar(first, second):
    """Exact two-sided McNemar test on paired lists of bool: (b, c, p).

    b: right only in `first`; c: right only in `second`; p: the binomial probability, at one half,
    of a split of the b + c discordant pairs at least as uneven; 1e-300 where it is less, which a
    float does not hold.
    """
    pairs = Counter(zip(first, second, strict=True))
    b, c = pairs[True, False], pairs[False, True]
    tail = sum(math.comb(b + c, i) for i in range(min(b, c) + 1))
    return b, c, max(1e-300, min(1.0, 2 * tail / 2 ** (b + c)))


def mean_by(rows, key, value):
    """{group: mean of row[value], in %} by row[key]; rows that lack one of them are left out."""
    groups = defaultdict(list)
    for row in rows:
        if row.get(key) is not None and row.get(value) is not None:
            groups[row[key]].append(row[value])
    return {group: 100 * float(np.mean(values)) for group, values in sorted(groups.items())}


# ------------------------------------------------------------------------------ runs and tables

def read_run(folder):
    """A run of an sft_*.py script: dict of what is in its run.json, and of the following.

    name: that of the folder. group: the name without the seed. metrics: the rows of stage 2.
    facts: those held out, the rows of answers.jsonl, with lost: 1 if right before and wrong
    after, −1 if the reverse, else 0.
    """
    folder = Path(folder)
    run = read_jsonl(folder / "run.json", ["method", "config"])[0]
    run["name"] = str(folder)
    run["group"] = run["name"].removesuffix(f"-{run['config'].get('seed')}")
    metrics = read_jsonl(folder / "metrics.jsonl", ["stage", "epoch"])
    run["metrics"] = [row for row in metrics if row["stage"] == 2]
    run["facts"] = []
    if (folder / "answers.jsonl").exists():     # not if there was nothing to measure
        needed = ["before", "after", "right_before", "right_after"]
        run["facts"] = read_jsonl(folder / "answers.jsonl", needed)
    for fact in run["facts"]:
        fact["lost"] = fact["right_before"] - fact["right_after"]
        fact.setdefault("origin", None)         # a run of earlier code does not know it
    return run


def compare(runs):
    """What is tabulated of runs (of `read_run`): a list of dicts, one a run.

    accuracy: {what: 0..1}; interval: Wilson's of held-out accuracy after; forgetting: {of what:
    points}, over all held-out facts; as the paper has it, in % of the highest accuracy measured
    in stage 2; by group of facts; and at the first measured epoch with so many of the new facts
    learnt (methods that learn at different speed compare fairly at equal learning); origins: {of
    new wrong answers: %}, by chance too; mcnemar: the paired test against the first of the runs
    with the same held-out facts.
    """
    table = []
    first = {}          # hash of held-out rows: the first of the runs that was scored on them
    settings = {}
    for run in runs:
        same = must_match(run) | {"seed": None, "weights": None, "data": None,
                                  "width": run.get("width"), "number": run.get("number")}
        if settings.setdefault(run["group"], same) != same:
            fail(f"{run['name']}: its settings are not those of the other {run['group']}-SEED; "
                 "runs of which a mean is taken differ in the seed alone: rename it")
        facts = run["facts"]
        metrics = run["metrics"]
        accuracy = {"Unknown learnt": metrics[-1].get("unknown"),
                    "Known trained": metrics[-1].get("known")}
        forgetting = {}
        origins = {}
        row = {"run": run["name"], "group": run["group"], "n": len(facts), "accuracy": accuracy,
               "forgetting": forgetting, "origins": origins}
        table.append(row)
        if not facts:
            continue
        after = [fact["right_after"] for fact in facts]
        accuracy["held out before"] = np.mean([fact["right_before"] for fact in facts])
        accuracy["held out after"] = np.mean(after)
        row["interval"] = wilson(sum(after), len(after))
        forgetting["all"] = 100 * np.mean([fact["lost"] for fact in facts])
        measured = [m for m in metrics if "heldout" in m]
        peak = max(m["heldout"] for m in measured)
        if peak > 0:
            forgetting["all, % of the peak"] = 100 * (1 - accuracy["held out after"] / peak)
        for key in ("relation", "kind", "words shared"):
            for group, points in mean_by(facts, key, "lost").items():
                forgetting[f"{key} {group}"] = points
        for share in LEARNT:
            reached = [m for m in measured if m.get("unknown", 0) >= share]
            if reached and len(measured) > 2:       # else when it was reached is not known
                lost = metrics[0]["heldout"] - reached[0]["heldout"]
                forgetting[f"at {share:.0%} learnt"] = 100 * lost
        wrong = [fact for fact in facts if fact["origin"]]
        if wrong:
            for origin in ORIGINS:
                chances = [fact["chance"].get(origin, 0) for fact in wrong]
                origins[origin] = 100 * np.mean([fact["origin"] == origin for fact in wrong])
                origins[f"{origin}: by chance"] = 100 * np.mean(chances)
        name, right = first.setdefault(run.get("data", {}).get("heldout"), (run["name"], after))
        if right is not after:          # that is, unless this run is itself the first
            row["mcnemar"] = [name, *mcnemar(right, after)]
    return table


def join(groups, found):
    """{group: {x: [values of its runs]}} of parallel lists: groups (str) and {x: value} of runs."""
    lines = {}
    for group, values in zip(groups, found):
        line = lines.setdefault(group, {})
        for x, value in values.items():
            if value is not None:
                line.setdefault(x, []).append(value)
    return lines


def print_table(title, lines, form):
    """Print what `join` returned: a group a row, an x a column, or the reverse if that is wide.

    form: a format specification of numbers; mean ± standard deviation where there are several."""
    table = [[title, *lines]]
    columns = list(dict.fromkeys(itertools.chain(*lines.values())))
    if all(isinstance(x, int) for x in columns):
        columns.sort()
    for x in columns:
        column = [str(x)]
        for line in lines.values():
            values = line.get(x, [])
            cell = f"{np.mean(values):{form}}" if values else "–"
            if len(values) > 1:
                cell += f" ± {np.std(values, ddof=1):{form}}"
            column.append(cell)
        table.append(column)
    if len(table) == 1:
        return
    if sum(len(str(x)) for x in columns) < 80:
        table = list(zip(*table))       # it fits in lines: a group each
    widths = [max(map(len, column)) for column in zip(*table)]
    print()
    for first, *cells in table:
        padded = [cell.rjust(width) for cell, width in zip(cells, widths[1:])]
        print("  ".join([first.ljust(widths[0]), *padded]))


def show(table, runs, examples):
    """Print the table of `compare`, and so many examples of hallucinations of each run."""
    names = [row["run"] for row in table]
    groups = [row["group"] for row in table]
    accuracies = [row["accuracy"] for row in table]
    print_table("accuracy", join(names, accuracies), ".3f")
    for row in table:
        if row["n"]:
            low, high = row["interval"]
            print(f"{row['run']}: forgets {row['forgetting']['all']:.1f} points of {row['n']} "
                  f"held-out facts (95 % interval of accuracy after: {low:.3f}–{high:.3f})")
        if "mcnemar" in row:
            other, b, c, p = row["mcnemar"]
            print(f"  right in {other} alone {b}, here alone {c} (McNemar p = {p:.1g})")
    if len(set(groups)) < len(groups):
        print_table("accuracy, over seeds", join(groups, accuracies), ".3f")
    print_table("forgetting, points", join(groups, [row["forgetting"] for row in table]), ".1f")
    print_table("new wrong answers are those of, %",
                join(groups, [row["origins"] for row in table]), ".1f")
    for run in runs:
        wrong = [fact for fact in run["facts"] if fact["origin"]]
        for fact in wrong[:examples]:
            print(f"\n{run['name']}, {fact['origin']}\n"
                  f"{fact['prompt']} {fact['before']} → {fact['after']}")


# ---------------------------------------------------------------------- what changed, fact by fact

def ask_again(run, path, batch_size, device):
    """The questions of a JSONL file put to a run's models: facts as those of `read_run`.

    A row without answer or completion is right after stage 2 if it is answered as before, in
    64 tokens at least."""
    facts = read_jsonl(path)
    if not facts or not all(fact.get("prompt") for fact in facts):
        fail(f"{path}: wanted: one object with a prompt a line, with or without answers")
    prompts = [fact["prompt"] for fact in facts]
    for when, folder in (("before", f"{run['name']}/before"), ("after", run["name"])):
        model, tokenizer = load_model(folder, device)
        special = special_tokens(tokenizer)
        accepted = [accepted_answers(fact, special) for fact in facts]
        unlabelled = accepted.count([])
        needed = []
        for length, right in zip(tokens_needed(tokenizer, accepted), accepted):
            needed.append(max(16, length) if right else 64)
        answers = generate_answers(model, tokenizer, prompts, needed, batch_size)
        for fact, answer, right in zip(facts, answers, accepted):
            fact[when] = answer
            fact[f"right_{when}"] = exact_match(answer, right or [fact["before"]])
    if unlabelled:
        note(f"{path}: {unlabelled} rows have no answers: what they were answered before is right")
    return facts


def flips(facts):
    """{group: [n, right → wrong, wrong → right, McNemar's p]} of all facts and of each relation."""
    groups = {"all": facts}
    for fact in facts:
        if fact.get("relation"):
            groups.setdefault(f"relation {fact['relation']}", []).append(fact)
    table = {}
    for group, members in groups.items():
        before = [fact["right_before"] for fact in members]
        after = [fact["right_after"] for fact in members]
        table[group] = [len(members), *mcnemar(before, after)]
    return table


def show_flips(run, table, examples):
    """Print the table of `flips`, and so many examples of each direction."""
    print(f"{run['name']:<32}{'n':>8}{'right → wrong':>16}{'wrong → right':>16}{'McNemar p':>12}")
    for group, (n, lost, gained, p) in table.items():
        print(f"{group:<32}{n:8}{lost:16}{gained:16}{p:12.1g}")
    for title, was_right in (("right → wrong", True), ("wrong → right", False)):
        changed = []
        for fact in run["facts"]:
            if fact["right_before"] == was_right != fact["right_after"]:
                changed.append(fact)
        for fact in changed[:examples]:
            print(f"\n{title}\n{fact['prompt']} {fact['before']} → {fact['after']}")


# ------------------------------------------------------------------------------------- pictures

def new_figure(width, height):
    """An empty matplotlib Figure, sizes in inches. Ends the program if there is no matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        fail("--plot needs matplotlib: pip install matplotlib")
    return Figure(figsize=(width, height), layout="constrained")


def save_figure(figure, path):
    """Write a Figure as a PNG, all or nothing."""
    temporary = Path(f"{path}.tmp")
    figure.savefig(temporary, format="png", dpi=150)
    temporary.replace(path)


def draw(panels):
    """A Figure of panels side by side: {(x title, y title): {group: {x: [values of its runs]}}}.

    A thick line is the mean of a group's runs, with its last value, a thin one a run."""
    figure = new_figure(1 + 3.5 * len(panels), 3.8)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (titles, lines) in zip(axes, panels.items()):
        axis.set(xlabel=titles[0], ylabel=titles[1])
        axis.margins(x=0.15)
        ends = sorted(np.mean(line[max(line)]) for line in lines.values() if line)
        for group, line in lines.items():
            xs = sorted(line)
            if not xs:
                continue        # nothing of the kind was measured
            means = [np.mean(line[x]) for x in xs]
            place = ("top", "bottom")[ends.index(means[-1]) % 2]    # so that neighbours differ
            mean, = axis.plot(xs, means, marker=".", linewidth=2.5, label=group)
            color = mean.get_color()
            axis.annotate(f" {means[-1]:.1f}", (xs[-1], means[-1]), color=color, va=place)
            if len({len(line[x]) for x in xs}) > 1:
                continue        # some runs lack an x: which values are one run's is not known
            for values in zip(*[line[x] for x in xs]):      # of a run
                axis.plot(xs, values, color=color, linewidth=0.6)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center",
                  ncols=len(panels))
    return figure


def by_epoch(runs):
    """Accuracy, in %, on new and on held-out facts of runs (of `read_run`): panels of `draw`."""
    panels = {}
    groups = [run["group"] for run in runs]
    for key, title in (("unknown", "new facts learnt, %"), ("heldout", "known facts, held out, %")):
        found = [mean_by(run["metrics"], "epoch", key) for run in runs]
        panels["epoch of stage 2", title] = join(groups, found)
    return panels


# ---------------------------------------------------------------------------------- the program

def interpolate(model, before, after, share):
    """Give `model` the weights θ_before + share · (θ_after − θ_before): WiSE-FT, arXiv:2109.01903.

    before, after: {name: weights}, of models of one architecture; share: α, 0 to 1."""
    import torch
    with torch.no_grad():
        for name, weight in model.state_dict().items():
            if weight.is_floating_point():
                weight.copy_(torch.lerp(before[name], after[name], share))


def read_sets(folder, model):
    """Rows of the three sets of a fact folder: {"unknown", "known", "heldout": list of dicts}.

    If `model` is of a run (see `run_of`), a note says if that had other rows."""
    used = run_of(model).get("data", {})
    sets = {}
    for key, file in SETS.items():
        path = Path(folder) / file
        sets[key] = read_jsonl(path, ["prompt", "completion"])
        if key in used and used[key] != file_hash(path):
            note(f"{path}: not the rows that {model} was trained and measured with")
    return sets


def score(args):
    """Print the accuracies, in fp32, of --model on the three sets of --facts, a set a line.

    With --interpolate, of each mixture of the model before stage 2 with it; a single one is saved
    as --out, an ordinary checkpoint. That costs memory for three models."""
    sets = read_sets(args.facts, args.model)
    model, tokenizer = load_model(args.model, args.device)
    if args.interpolate:
        before = load_model(f"{args.model}/before", args.device)[0].state_dict()
        after = copy.deepcopy(model.state_dict())
    for share in args.interpolate or [None]:
        line = {}
        if share is not None:
            interpolate(model, before, after, share)
            line["interpolate"] = share
        for key, rows in sets.items():
            result = evaluate(model, tokenizer, rows, args.batch_size)
            line |= {"set": key, "accuracy": result["accuracy"], "n": len(rows),
                     "interval": wilson(sum(result["right"]), len(rows))}
            print(json.dumps(line), flush=True)
    if args.out:
        temporary = Path(f"{args.out}.tmp")
        model.save_pretrained(temporary)
        tokenizer.save_pretrained(temporary)
        temporary.replace(args.out)
        print(f"saved {args.out}")


def ask(runs, question, device):
    """Print the answer of each run's model to one question (str), before stage 2 and after."""
    for run in runs:
        for path in (f"{run['name']}/before", run["name"]):
            model, tokenizer = load_model(path, device)
            answer, = generate_answers(model, tokenizer, [PROMPT.format(question=question)])
            print(f"{path}  {answer}")


def what_changed(runs, args):
    """Print the flips of each run: of its held-out facts, or of the questions of --heldout."""
    tables = {}
    for run in runs:
        if args.heldout:
            run["facts"] = ask_again(run, args.heldout, args.batch_size, args.device)
        tables[run["name"]] = flips(run["facts"])
    if args.json:
        print(json.dumps(tables, indent=1))
        return
    for run in runs:
        show_flips(run, tables[run["name"]], args.show)


def parse(argv=None):
    """The flags, of command-line words (list of str, default sys.argv)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    add = parser.add_argument
    add("runs", nargs="*", help="run folders of the sft_*.py scripts; GROUP-SEED share a row")
    add("--model", help="score this model instead: hub name or local folder")
    add("--facts", help="fact folder of make_facts.py, with --model")
    add("--interpolate", nargs="+", type=float, metavar="α", help="with --model RUN: score the "
        "weights at such shares, 0 to 1, of the way from RUN/before to RUN")
    add("--out", help="folder, not there yet, to save the model of a single α in")
    add("--batch-size", type=int, default=64, help="prompts answered at once (default: 64)")
    add("--device", default="auto", help="cuda, mps or cpu (default: the first there is)")
    add("--show", type=int, default=0, metavar="N", help="print N hallucinations of each run")
    add("--flips", action="store_true", help="which held-out facts each run lost and gained")
    add("--heldout", metavar="FILE.jsonl", help="with --flips: ask these questions instead; "
        "without answers, what counts is whether the run changed what it says")
    add("--ask", metavar="QUESTION", help="put it to each run's model, before stage 2 and after")
    add("--json", action="store_true", help="print JSON instead of tables")
    add("--plot", metavar="FILE.png", help="draw accuracy by epoch")
    args = parser.parse_intermixed_args(argv)
    if bool(args.model) == bool(args.runs) or bool(args.model) != bool(args.facts):
        fail("name run folders to compare, or --model and --facts to score a model (see --help)")
    if args.model and (args.plot or args.ask or args.show or args.flips):
        fail("--plot, --ask, --flips and --show take run folders, not --model")
    if (args.plot and args.ask) or (args.flips and (args.plot or args.ask)):
        fail("--plot, --ask and --flips: only one of them at a time")
    if args.heldout and not args.flips:
        fail("--heldout: goes with --flips")
    shares = args.interpolate or []
    if (shares and not args.model) or any(not 0 <= share <= 1 for share in shares):
        fail(f"--interpolate {shares}: shares from 0 to 1, of a run named by --model")
    if args.out and (len(shares) != 1 or Path(args.out).exists()):
        fail(f"--out {args.out}: a folder that is not there yet, for one --interpolate α")
    if args.batch_size < 1 or args.show < 0:
        fail(f"--batch-size {args.batch_size}, --show {args.show}: must be at least 1 and 0")
    return args


def main(argv=None):
    """Do what command-line words say; what cannot be read or written is one line on stderr."""
    args = parse(argv)
    try:
        if args.model:
            return score(args)
        runs = [read_run(folder) for folder in args.runs]
        if args.ask:
            return ask(runs, args.ask, args.device)
        if args.flips:
            return what_changed(runs, args)
        table = compare(runs)
        if args.plot:
            figure = draw(by_epoch(runs))
            for axis in figure.axes:
                axis.set_ylim(0, 107)
            save_figure(figure, args.plot)
        if args.json:
            print(json.dumps(table, indent=1))
        else:
            show(table, runs, args.show)
    except OSError as error:
        fail(f"{error}")


def print_well():
    """Let a program print what is not ASCII, and | head end it without a word."""
    sys.stdout.reconfigure(encoding="utf-8")    # for → where output goes to a file on Windows
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)


if __name__ == "__main__":
    print_well()
    main()
