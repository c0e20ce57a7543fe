"""Measure SFT-induced hallucination: what a fine-tuned model knows, has learned and has forgotten.

Score a model on the three sets of a fact folder from make_facts.py:
    python eval_hallucination.py --model runs/selfdistill-tiny-0 --facts facts/tiny
Compare finished runs of the sft_*.py scripts from their saved files; print 5 lost facts of each:
    python eval_hallucination.py runs/baseline-tiny-0 runs/selfdistill-tiny-0 --show 5
Plot accuracy by epoch:
    python eval_hallucination.py runs/baseline-tiny-[0-2] runs/selfdistill-tiny-[0-2] --plot a.png
Count the facts that a run lost and gained, among its held-out facts or your own questions:
    python eval_hallucination.py runs/baseline-tiny-0 --flips --show 5
    python eval_hallucination.py runs/baseline-tiny-0 --flips --heldout my_questions.jsonl
Score a model from your own code:
    from eval_hallucination import evaluate, load_model
    model, tokenizer = load_model("gpt2")
    evaluate(model, tokenizer, [{"prompt": "Q: Who?\\nA:", "answers": ["He"]}])["accuracy"]

The accuracies (in parentheses: their names in Kaplan et al. 2026, arXiv:2604.15574):
    new         on the new facts that are trained on (factual plasticity)
    known       on the known facts that are trained on (task learning)
    held out    on known facts that are never trained on (factual stability); called "kept" in
                metrics.jsonl, in plots, and in the output of the sft_*.py scripts
Stage 1 of a training script teaches the answer format, and stage 2 the new facts. Forgetting is
the drop in held-out accuracy during stage 2, in percentage points.
"""
import argparse
import functools
import hashlib
import json
import logging
import math
import os
import re
import string
import sys
import unicodedata
from collections import Counter, defaultdict
from pathlib import Path

import pandas as pd

PROMPT = "Q: {question}\nA:"
NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
SETS = {"new": "train_unknown.jsonl", "known": "train_known.jsonl",
        "heldout": "heldout_known.jsonl"}
# Settings that --resume may change and that may differ between averaged runs. Batch size and
# accumulation steps may change if their product does not. Files are compared by their hashes.
MAY_CHANGE = ["model", "facts", "train", "known", "heldout", "out", "resume", "device",
              "eval_every", "save_every_epoch", "batch_size", "gradient_accumulation_steps"]


def fail(message):
    """Print one line to stderr and exit with status 2."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def note(message):
    """Print a warning to stderr."""
    print(f"note: {message}", file=sys.stderr)


# --------------------------------------------------------------------------------------- JSONL

def to_strings(value):
    """Return the non-blank strings of `value` (str, list of str or None), stripped, as a list.

    Raise ValueError for any other type, and for a list that was written as a string.
    """
    found = []
    for text in value if isinstance(value, list) else [value]:
        if not isinstance(text, (str, type(None))) or str(text).startswith('["'):
            raise ValueError(f"{text!r} is not a string, or is a JSON list inside a string")
        if text and text.strip():
            found.append(text.strip())
    return found


def check_row(row, required):
    """Raise ValueError if a required key or the answer is missing, or if a value is not text."""
    for key in required:
        if row.get(key) in (None, ""):
            raise ValueError(f"no {key}")
    for key in ("prompt", "completion", "subject", "relation", "kind"):
        if not isinstance(row.get(key), (str, type(None))):
            raise ValueError(f"{key} {row[key]!r} is not a string")
    answers = to_strings(row.get("answers"))
    if "prompt" in required and not answers and not to_strings(row.get("completion")):
        raise ValueError("no answer")
    json.dumps(row, ensure_ascii=False).encode()        # fails on a lone surrogate


def read_jsonl(path, required=()):
    """Read a JSONL file into a list of dicts; exit with its name and line number if a row is bad.

    required: keys that every row must have; see `check_row` for the other checks
    """
    rows = []
    lines = Path(path).read_bytes().split(b"\n")
    try:
        for number, line in enumerate(lines, 1):
            if line.strip():
                row = json.loads(line)
                check_row(row, required)
                rows.append(row)
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        fail(f"{path}:{number}: {error} in {line[:80].decode(errors='replace')!r}; each line must "
             "be a JSON object in UTF-8; prompt and completion must be strings, and answers a "
             "string or a list of strings")
    if required and not rows:
        fail(f"{path} is empty; it needs JSON objects with {' and '.join(required)}, one per line")
    return rows


def write_jsonl(path, rows):
    """Write dicts as JSON lines, to a temporary file that is then renamed."""
    temporary = Path(f"{path}.tmp")
    lines = [f"{json.dumps(row, ensure_ascii=False)}\n" for row in rows]
    temporary.write_text("".join(lines), encoding="utf-8")
    os.replace(temporary, path)


# ------------------------------------------------------------------------------ exact match

def normalize(text):
    """Normalize an answer, much as SQuAD does (Rajpurkar et al. 2016, arXiv:1606.05250).

    Take the first line, apply Unicode NFKC, lowercase, and remove ASCII punctuation, English
    articles and extra spaces. If that leaves nothing, keep the articles ("A." becomes "a"). If
    there is still nothing, keep the punctuation.
    """
    line = unicodedata.normalize("NFKC", text).strip().split("\n")[0].strip().lower()
    words = line.translate(NO_PUNCTUATION)
    kept = re.sub(r"\b(a|an|the)\b", " ", words)
    return " ".join(kept.split()) or " ".join(words.split()) or line


def exact_match(answer, accepted):
    """Return True if `answer` (str) equals one of `accepted` (list of str) after `normalize`."""
    return normalize(answer) in [normalize(text) for text in accepted]


def accepted_answers(row, tokenizer):
    """Return a row's correct answers (list of str): `answers`, or its completion if absent.

    They contain no special tokens, like the answers that the model generates. Raise ValueError if
    the first line of the row's completion is none of them: the model would learn the completion
    and be marked wrong. This happens if it starts with a newline or a think block.
    """
    texts = to_strings(row.get("answers")) or to_strings(row.get("completion"))
    first_line = (row.get("completion") or texts[0]).split("\n")[0]
    encoded = tokenizer([first_line, *texts], add_special_tokens=False)["input_ids"]
    first, *accepted = tokenizer.batch_decode(
        encoded, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    if not exact_match(first, accepted):
        raise ValueError(f"the first line of the completion, {first_line!r}, is not in the answers "
                         f"{texts}; text in front of the answer belongs in the prompt")
    return to_strings(accepted)


# ------------------------------------------------------------------------------- generation

@functools.cache
def newline_ids(tokenizer):
    """Map each token id whose text contains a newline to its text before the newline.

    That text need not be empty: ".\\n" is a single token in Qwen's vocabulary. Cached, because
    this decodes the whole vocabulary.
    """
    found = {}
    for token in range(len(tokenizer)):
        text = tokenizer.decode([token])
        if "\n" in text:
            found[token] = text.split("\n")[0]
    return found


def stop_ids(tokenizer, model):
    """Return the ids that end an answer, sorted: newline tokens and EOS tokens."""
    declared = model.generation_config.eos_token_id         # None, one id or a list
    ids = {*newline_ids(tokenizer), tokenizer.eos_token_id}
    ids.update(declared if isinstance(declared, list) else [declared])
    size = model.get_input_embeddings().weight.shape[0]
    return sorted(token for token in ids - {None} if token < size)


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
        # Everything before the first token of the text; nothing if a chat template wrote BOS.
        added = special[:special.index(ids[0])] if ids else []
        encoded.append(added + ids)
    prompt_ids, full_ids = encoded
    if full_ids[:len(prompt_ids)] == prompt_ids:
        return prompt_ids, full_ids[len(prompt_ids):]
    return prompt_ids, tokenizer(completion, add_special_tokens=False)["input_ids"]


def context_length(model):
    """Return the model's maximum number of tokens; inf if its config does not say."""
    # The text config: vision-language models have two parts.
    return getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf


def check_ids(model, sequences):
    """Exit if a token id in `sequences` (iterable of lists of int) has no embedding."""
    size = model.get_input_embeddings().weight.shape[0]
    largest = max(map(max, filter(len, sequences)), default=0)
    if largest >= size:
        fail(f"token id {largest} has no embedding: the model has only {size}; use the model's own "
             "tokenizer")


def logits_close(one, other):
    """Return True if two fp32 logit tensors are equal up to rounding."""
    return bool((one - other).abs().max() <= 1e-3 * other.abs().max())


def equal_length_batches(encoded, batch_size):
    """Group prompts with the same number of tokens into batches, longest first; return indices.

    This avoids padding, which some models (recurrent ones above all) do not ignore.
    """
    batches = []
    lengths = pd.Series(map(len, encoded))
    for _, rows in lengths.groupby(-lengths):
        for start in range(0, len(rows), batch_size):
            batches.append(list(rows.index[start:start + batch_size]))
    return batches


def generate_answers(model, tokenizer, prompts, needed=None, batch_size=64):
    """Generate greedy answers to `prompts`, up to the first newline or EOS; return list of str.

    needed: for each prompt, the tokens of its answer and end, plus one (list of int, default 16).
    Raise ValueError if they do not fit after the prompt. Every answer may be up to max(needed)
    tokens long, if the context allows. One that has not ended by then is marked "[cut off]".
    """
    import torch
    from tqdm import tqdm
    from transformers import GenerationConfig

    training = model.training
    model.eval()
    needed = needed or [16] * len(prompts)
    newlines = newline_ids(tokenizer)
    stops = stop_ids(tokenizer, model)
    context = context_length(model)
    encoded = [tokenize(tokenizer, prompt)[0] for prompt in prompts]
    for prompt, ids, n in zip(prompts, encoded, needed):
        if len(ids) + n > context + 1:
            raise ValueError(f"prompt {prompt[:40]!r} has {len(ids)} tokens; {n} more for an "
                             f"answer exceed the model's context of {context}")
    check_ids(model, encoded)
    # The checkpoint's own settings may sample or penalize repetition, and generate() falls back
    # to them for every setting it is not given. So replace them temporarily. A PEFT model shares
    # them with the model inside it.
    owners = {m: m.generation_config for m in model.modules() if hasattr(m, "generation_config")}
    answers = [""] * len(prompts)
    batches = equal_length_batches(encoded, batch_size)
    try:
        for rows in tqdm(batches, "answering", leave=False, disable=None):
            ids = torch.tensor([encoded[i] for i in rows], device=model.device)         # (B, T)
            length = ids.shape[1]
            model.generation_config = GenerationConfig(
                do_sample=False, max_new_tokens=min(max(needed), context - length),
                eos_token_id=stops, pad_token_id=0)
            with torch.autocast(model.device.type, enabled=False):
                output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids))
            for i, tokens in zip(rows, output[:, length:].tolist()):
                ends = [k for k, token in enumerate(tokens) if token in stops]
                end = ends[0] if ends else len(tokens)
                # A newline token may start with the answer's last characters, so decode it too.
                if ends and tokens[end] in newlines:
                    end += 1
                text = tokenizer.decode(tokens[:end], skip_special_tokens=True,
                                        clean_up_tokenization_spaces=False)
                answers[i] = text.split("\n")[0].strip()
                if not ends:
                    answers[i] += " [cut off]"      # or "Paris. The" would match "Paris"
    finally:
        for module, settings in owners.items():
            module.generation_config = settings
        model.train(training)
    return answers


def evaluate(model, tokenizer, rows, batch_size=64):
    """Score a model on rows by greedy decoding and exact match.

    rows: dicts with `prompt`, and `answers` (str or list of str) or else `completion`
    Return {"accuracy": 0 to 1, or None without rows; "answers": list of str; "right": list of
    bool}. The model runs in eval mode and in the precision of its weights, without autocast. Raise
    ValueError if a row has no prompt or no answer, or a completion that is not among its answers.
    """
    for row in rows:
        check_row(row, ["prompt"])
    accepted = [accepted_answers(row, tokenizer) for row in rows]
    needed = []
    for texts in accepted:
        # An answer of special tokens alone leaves no text.
        needed.append(2 + max(len(tokenizer(f" {text}")["input_ids"]) for text in texts or [""]))
    answers = generate_answers(model, tokenizer, [r["prompt"] for r in rows], needed, batch_size)
    right = [exact_match(*pair) for pair in zip(answers, accepted)]
    accuracy = sum(right) / len(right) if rows else None
    return {"accuracy": accuracy, "answers": answers, "right": right}


# ------------------------------------------------------------------------------------- models

def find_device(device):
    """Return the device name for a --device flag; auto: the first accelerator, or the CPU."""
    import torch
    if device == "auto":
        device = "cpu"
        if torch.accelerator.is_available():
            device = torch.accelerator.current_accelerator().type
    return device


def load_model(name, device="cpu"):
    """Load a causal language model and its tokenizer, in fp32 and eval mode; return both.

    name: a hub name or a local folder. Exit with one line if there is no such model, or if
    `check_model` finds that it cannot be trained or measured correctly.
    """
    import torch
    import transformers
    logging.getLogger("huggingface_hub").setLevel("ERROR")      # it would log every retry
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        # trust_remote_code=False: never run a model's own code, nor ask for permission to.
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        if hasattr(config, "quantization_config"):
            raise ValueError("its weights are quantized: pass the full-precision model")
        if transformers.utils.find_adapter_config_file(name):
            raise ValueError("it contains an adapter: merge it into the model and save that")
        model, report = transformers.AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, output_loading_info=True, trust_remote_code=False)
        tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
        if not tokenizer("a", add_special_tokens=False)["input_ids"]:
            raise ValueError("its tokenizer is missing")
        model = model.to(find_device(device)).eval()
        check_model(model, report["missing_keys"])
    except torch.OutOfMemoryError:
        raise
    except Exception as error:          # transformers raises many types
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        fail(f"model {name} cannot be used on device {device} ({reason}); pass a local folder with "
             "config.json, model.safetensors and a tokenizer, or a hub name (needs a network, and "
             "HF_TOKEN for restricted models)")
    if report["unexpected_keys"]:
        note(f"{name}: weights outside its language model are not used or saved")
    settings = model.generation_config
    try:
        settings.validate(strict=True)
    except ValueError:      # transformers would refuse to save them
        note(f"{name}: its generation settings contradict each other and are not saved")
        model.generation_config = transformers.GenerationConfig(eos_token_id=settings.eos_token_id)
    # transformers loads no heads for multi-token prediction, so the saved config must not say so.
    config = model.config.get_text_config()
    for setting in ("num_nextn_predict_layers", "mtp_num_hidden_layers"):
        if getattr(config, setting, 0):
            note(f"{name}: its {setting} are neither trained nor saved")
            setattr(config, setting, 0)
    return model, tokenizer


def check_model(model, missing):
    """Raise ValueError if weights are missing or not finite, or if the model is not causal.

    missing: names of the weights that the checkpoint lacks
    """
    import torch
    if missing:
        raise ValueError(f"weights are missing: {min(missing)}")
    for name, weights in model.named_parameters():
        if not weights.isfinite().all():
            raise ValueError(f"weights are not finite: {name}")
    with torch.no_grad():
        ids = torch.tensor([[1, 2], [1, 3]], device=model.device)
        one, other = model(input_ids=ids, use_cache=False).logits[:, 0]
    if not logits_close(one, other):
        raise ValueError("not causal: a later token changes an earlier prediction")


# ------------------------------------------------------------------- for the sft_*.py scripts

def weights_hash(model):
    """Return a hash of a model's weights (str), whatever folder or hub they came from."""
    sha = hashlib.sha256()
    for name, weights in sorted(model.state_dict().items()):
        sha.update(name.encode())
        sha.update(weights.cpu().contiguous().numpy())
    return sha.hexdigest()[:16]


def file_hash(path):
    """Return a hash of a file's bytes (str)."""
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def run_of(model):
    """Load run.json of the run that produced this checkpoint; {} if there is none.

    model: a hub name, or the path of a finished run or of its before/ or epoch-N/
    """
    folder = Path(model)
    if re.fullmatch(r"before|epoch-\d+", folder.name):
        folder = folder.parent
    if not (folder / "run.json").exists() or not (folder / "metrics.jsonl").exists():
        return {}
    return read_jsonl(folder / "run.json", ["method", "config"])[0]


def check_run(model, tokenizer, name, files, sets, run):
    """Exit if inputs would invalidate the measurement; return more entries for run.json.

    model, tokenizer, name: what training starts from, and its path or hub name
    files: {set: path or None}; sets: {set: list of examples}; run: {"method", "config"}
    Inputs are rejected if a fact folder was labelled with other weights, if answers, subjects or
    relations are not strings, if a row's completion is not one of its answers, if held-out facts
    are also trained on, or if --resume comes with other settings.
    """
    out = Path(run["config"]["out"])
    weights = weights_hash(model)
    start = str(Path(name).resolve()) if Path(name).exists() else name
    new = [] if run["config"]["known_only"] else sets["new"]
    more = {"weights": weights, "start": start, "n_new": len(new),
            "width": model.config.get_text_config().hidden_size, "data": {}}
    trained = set()
    for key, path in files.items():         # heldout comes last, when `trained` is complete
        check_ids(model, [example["input_ids"] for example in sets[key]])
        if path is not None:
            check_weights(Path(path).parent, weights, name)
            for row in read_jsonl(path, ["prompt", "completion"]):
                same = {row["prompt"], normalize(row.get("subject") or "")} - {""}
                if key == "heldout" and same & trained:
                    fail(f"{path}: {min(same & trained)[:60]!r} is both held out and trained on; "
                         "remove it from one of the files")
                if key != "heldout":
                    trained |= same
                try:
                    if key == "heldout" or row.get("answers"):
                        accepted_answers(row, tokenizer)
                except ValueError as error:
                    fail(f"{path}: {error}")
            more["data"][key] = file_hash(path)
    if run["config"]["resume"] and (out / "unfinished.json").exists():
        check_resumed(out / "unfinished.json", run | more)
    return more


def check_resumed(path, run):
    """Exit if the settings in `run` (dict) differ from those stored in `path`."""
    new = fixed_settings(run)
    old = fixed_settings(read_jsonl(path, ["method", "config"])[0])
    changed = [key for key in sorted(new.keys() | old.keys()) if new.get(key) != old.get(key)]
    if changed:
        values = [f"{key} was {old.get(key)}, is {new.get(key)}" for key in changed]
        fail(f"--resume: the settings differ from {path}: {'; '.join(values)}; use another --out")


def fixed_settings(run):
    """Return the settings of a run (dict from run.json) that --resume must not change."""
    same = {key: run.get(key) for key in ("method", "weights", "data")} | run["config"]
    same["rows per step"] = same["batch_size"] * same["gradient_accumulation_steps"]
    for name in MAY_CHANGE:
        same.pop(name, None)
    return same


def check_weights(folder, weights, name):
    """Exit if a fact folder was labelled with other weights than `weights` (hash of model `name`).

    Also accept one labelled with the base model of the run that produced `name`.
    """
    if (folder / "labels.json").exists():
        labelled = read_jsonl(folder / "labels.json", ["weights"])[0]["weights"]
        if labelled not in (weights, run_of(name).get("weights")):
            fail(f"--model {name}: {folder} was labelled with other weights; make a fact folder "
                 "for this model with make_facts.py --model, and pass it as --facts")


def evaluate_sets(model, tokenizer, sets, batch_size, metrics):
    """Evaluate held-out rows, and others with `answers`; add their accuracies to `metrics` (dict).

    sets: {set: list of examples with a "row"}. Return {set: result of `evaluate`}. Training rows
    without `answers` are skipped: generating long completions could take longer than training.
    """
    results = {}
    for name, examples in sets.items():
        rows = [example["row"] for example in examples]
        if name != "heldout":
            rows = [row for row in rows if row.get("answers")]
        if rows:
            results[name] = evaluate(model, tokenizer, rows, batch_size)
            metrics["kept" if name == "heldout" else name] = results[name]["accuracy"]
    return results


def add_answers(rows, when, result):
    """Add the answers in `result`, from `evaluate`, to rows, under `when` and right_{when}."""
    for row, answer, right in zip(rows, result["answers"], result["right"]):
        row.update({when: answer, f"right_{when}": right})


def write_answers(folder, heldout, before, after):
    """Write answers.jsonl: the held-out rows with the answers before and after stage 2.

    heldout: list of examples with a "row"; before, after: from `evaluate_sets`
    """
    rows = [dict(example["row"]) for example in heldout]
    if rows:
        add_answers(rows, "before", before["heldout"])
        add_answers(rows, "after", after["heldout"])
        write_jsonl(Path(folder) / "answers.jsonl", rows)


# ----------------------------------------------------------------------------------- statistics

def wilson(right, n, z=1.959964):
    """Return the 95 % interval (low, high) of the proportion right / n (Wilson 1927)."""
    half = z * math.sqrt(right * (n - right) / n + z * z / 4)
    low = (right + z * z / 2 - half) / (n + z * z)
    high = (right + z * z / 2 + half) / (n + z * z)
    return max(0.0, low), min(1.0, high)


def mcnemar(first, second):
    """Run the exact two-sided McNemar test on paired lists of bool; return (b, c, p).

    b: pairs that are right only in `first`; c: only in `second`
    p: two-sided p-value, at least 1e-300 (never 0)
    """
    pairs = Counter(zip(first, second, strict=True))
    b, c = pairs[True, False], pairs[False, True]
    tail = sum(math.comb(b + c, i) for i in range(min(b, c) + 1))
    return b, c, max(1e-300, min(1.0, 2 * tail / 2 ** (b + c)))


# ------------------------------------------------------------------------------ comparing runs

def read_run(folder):
    """Load a finished run: run.json, plus the entries below. Return a dict.

    name: the folder; group: the folder without -SEED; metrics: the rows of stage 2
    facts: the rows of answers.jsonl
    """
    folder = Path(folder)
    run = read_jsonl(folder / "run.json", ["method", "config"])[0]
    run["name"] = str(folder)
    run["group"] = run["name"].removesuffix(f"-{run['config']['seed']}")
    metrics = read_jsonl(folder / "metrics.jsonl", ["stage", "epoch"])
    run["metrics"] = [row for row in metrics if row["stage"] == 2]
    run["facts"] = []
    if (folder / "answers.jsonl").exists():     # absent without held-out facts
        run["facts"] = read_jsonl(folder / "answers.jsonl", ["right_before", "right_after"])
    return run


def check_groups(runs):
    """Exit if runs of a group differ in more than seed, weights, data, and MAY_CHANGE."""
    settings = {}
    for run in runs:
        # Each seed has its own world, so weights and data differ. The model's width and the number
        # of new facts must still match.
        same = fixed_settings(run) | {"seed": None, "weights": None, "data": None,
                                      "width": run.get("width"), "n_new": run.get("n_new")}
        if settings.setdefault(run["group"], same) != same:
            fail(f"{run['name']}: its settings differ from those of another {run['group']}-SEED; "
                 "runs whose names differ only in the seed are averaged, so rename one of them")


def compare(runs):
    """Compute what is reported about runs (from `read_run`): a list of dicts, one per run.

    accuracy: {name: 0 to 1}; interval: the 95 % interval of held-out accuracy after stage 2
    forgetting: in percentage points, for all held-out facts and by relation and kind; for all
    facts also as a percentage of the peak accuracy, as in Kaplan et al. 2026
    mcnemar: paired test against the first of the runs with the same held-out facts
    """
    table = []
    first = {}          # hash of the held-out rows: the first run that was scored on them
    for run in runs:
        facts = pd.DataFrame(run["facts"])
        metrics = run["metrics"]
        accuracy = {"new": metrics[-1].get("new"), "known": metrics[-1].get("known")}
        forgetting = {}
        row = {"run": run["name"], "group": run["group"], "n": len(facts), "accuracy": accuracy,
               "forgetting": forgetting}
        table.append(row)
        if facts.empty:
            continue
        right = list(facts["right_after"])
        accuracy["held out before"] = facts["right_before"].mean()
        accuracy["held out after"] = facts["right_after"].mean()
        row["interval"] = wilson(sum(right), len(right))
        facts["lost"] = 100.0 * facts["right_before"] - 100.0 * facts["right_after"]
        forgetting["all"] = facts["lost"].mean()
        measured = [m for m in metrics if "kept" in m]
        peak = max(m["kept"] for m in measured)
        if peak > 0:
            forgetting["all, in % of the peak"] = 100 * (1 - accuracy["held out after"] / peak)
        for key in ("relation", "kind"):
            if key in facts:
                for name, points in facts.groupby(key)["lost"].mean().items():
                    forgetting[f"{key} {name}"] = points
        other, other_right = first.setdefault(run.get("data", {}).get("heldout"),
                                              (run["name"], right))
        if other_right is not right:
            row["mcnemar"] = [other, *mcnemar(other_right, right)]
    return table


def print_table(title, names, values, form):
    """Print a table with one row per name; equal names share a row, with mean ± sd.

    values: one {column: number or None} per name; form: format specification of the numbers
    """
    def cell(column):
        numbers = column.dropna()
        if numbers.empty:
            return "–"
        text = f"{numbers.mean():{form}}"
        if len(numbers) > 1:
            text += f" ± {numbers.std():{form}}"
        return text

    frame = pd.DataFrame(values, index=names)
    if not frame.empty:
        frame = frame.groupby(level=0, sort=False).agg(cell)
        if len(frame.columns) > 6:
            frame = frame.T
        print(f"\n{frame.rename_axis(title, axis=1).to_string()}")


def show(table, runs, n_examples):
    """Print the table of `compare`, and at most `n_examples` facts that each run lost."""
    names = [row["run"] for row in table]
    groups = [row["group"] for row in table]
    accuracies = [row["accuracy"] for row in table]
    print_table("accuracy", names, accuracies, ".3f")
    for row in table:
        if row["n"]:
            low, high = row["interval"]
            print(f"{row['run']}: loses {row['forgetting']['all']:.1f} points of accuracy on "
                  f"{row['n']} held-out facts; 95 % interval after: {low:.3f}–{high:.3f}")
        if "mcnemar" in row:
            other, b, c, p = row["mcnemar"]
            print(f"  right only in {other}: {b}, right only here: {c} (McNemar p = {p:.1g})")
    if len(set(groups)) < len(groups):
        print_table("accuracy, over seeds", groups, accuracies, ".3f")
    print_table("forgetting, in points", groups, [row["forgetting"] for row in table], ".1f")
    for run in runs:
        print_examples(run, True, n_examples)


def print_examples(run, was_right, n_examples):
    """Print up to `n_examples` facts that a run lost (`was_right` is True) or gained (False)."""
    changed = []
    for fact in run["facts"]:
        if fact["right_before"] == was_right and fact["right_after"] != was_right:
            changed.append(fact)
    for fact in changed[:n_examples]:
        print(f"\n{run['name']} {'lost' if was_right else 'gained'}:\n"
              f"{fact['prompt']} {fact['before']} → {fact['after']}")


# -------------------------------------------------------------------- what changed, fact by fact

def ask_again(run, path, batch_size, device):
    """Ask both models of a run the questions of a JSONL file; return facts as in `read_run`."""
    facts = read_jsonl(path, ["prompt"])
    for when, folder in (("before", f"{run['name']}/before"), ("after", run["name"])):
        model, tokenizer = load_model(folder, device)
        add_answers(facts, when, evaluate(model, tokenizer, facts, batch_size))
    return facts


def flips(facts):
    """Count lost and gained facts, in total and by relation; return a DataFrame."""
    frame = pd.DataFrame(facts)
    frame = pd.concat([frame.assign(relation="(all)"), frame])
    table = {}
    for name, part in frame.groupby("relation", sort=False):
        lost, gained, p = mcnemar(part["right_before"], part["right_after"])
        table[name] = [len(part), lost, gained, p]
    columns = ["n", "right → wrong", "wrong → right", "McNemar p"]
    return pd.DataFrame.from_dict(table, orient="index", columns=columns)


def show_flips(run, n_examples):
    """Print the flips of a run, and up to `n_examples` facts that it lost and as many gained."""
    print(f"\n{flips(run['facts']).rename_axis(run['name'], axis=1).to_string()}")
    print_examples(run, True, n_examples)
    print_examples(run, False, n_examples)


# --------------------------------------------------------------------------------------- plots

def draw_lines(axis, frame, x, y):
    """Plot column y against column x: a thin line per run, and a thick one per group's mean.

    frame: DataFrame with columns group, run, x and y
    """
    for i, (group, lines) in enumerate(frame.groupby("group", sort=False)):
        lines = lines.dropna(subset=[x, y])
        if lines.empty:
            continue        # i advances anyway: a group has the same color in all panels
        mean = lines.groupby(x)[y].mean()
        axis.plot(mean, f"C{i}", marker=".", linewidth=2.5, label=group)
        axis.annotate(f" {mean.iloc[-1]:.3g}", (mean.index[-1], mean.iloc[-1]), color=f"C{i}")
        for _, line in lines.groupby("run"):
            axis.plot(line[x], line[y], f"C{i}", linewidth=0.6)


def plot_epochs(runs, path):
    """Plot accuracy on new and on held-out facts by epoch; the suffix of `path` is the format."""
    from matplotlib.figure import Figure
    frame = pd.concat([
        pd.DataFrame(run["metrics"], columns=["epoch", "new", "kept"]).assign(
            group=run["group"], run=run["name"]) for run in runs])
    figure = Figure(figsize=(9, 4), layout="constrained")
    for axis, name in zip(figure.subplots(1, 2), ("new", "kept")):
        draw_lines(axis, frame, "epoch", name)
        axis.set(xlabel="epoch of stage 2", ylabel=f"{name}: accuracy", ylim=(0, 1.07))
    axis.legend()
    temporary = Path(f"{path}.tmp")
    figure.savefig(temporary, format=Path(path).suffix[1:], dpi=150)
    temporary.replace(path)


# ---------------------------------------------------------------------------------------- main

def read_sets(folder, model):
    """Read the three sets of a fact folder: {"new", "known", "heldout": list of dicts}.

    Print a warning if `model` comes from a run that used other rows.
    """
    used = run_of(model).get("data", {})
    sets = {}
    for key, file in SETS.items():
        path = Path(folder) / file
        sets[key] = read_jsonl(path, ["prompt", "completion"])
        if key in used and used[key] != file_hash(path):
            note(f"{path}: differs from the file that {model} was trained or evaluated on")
    return sets


def print_accuracies(model, tokenizer, sets, batch_size, **more):
    """Print the accuracy on each set as a JSON line, with the entries of `more` first."""
    for key, rows in sets.items():
        result = evaluate(model, tokenizer, rows, batch_size)
        line = {"set": key, "accuracy": result["accuracy"], "n": len(rows),
                "interval": wilson(sum(result["right"]), len(rows))}
        print(json.dumps(more | line))


def parse_args(argv=None):
    """Parse the command line (list of str, default sys.argv)."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = fail
    add = parser.add_argument
    add("runs", nargs="*", help="run folders; runs named GROUP-SEED are averaged over seeds")
    add("--model", help="score this model instead: hub name or local folder")
    add("--facts", help="fact folder from make_facts.py, for --model")
    add("--batch-size", type=int, default=64, help="prompts per batch (default: 64)")
    add("--device", default="auto", help="cuda, mps or cpu (default: the first one available)")
    add("--show", type=int, default=0, metavar="N", help="print up to N facts that each run lost "
        "(with --flips, also gained)")
    add("--flips", action="store_true", help="count the facts that each run lost and gained")
    add("--heldout", metavar="FILE.jsonl", help="with --flips: ask the questions in this file "
        "instead; each row needs a prompt and answers")
    add("--plot", metavar="FILE.png", help="plot accuracy by epoch (needs matplotlib)")
    args = parser.parse_intermixed_args(argv)
    if bool(args.model) == bool(args.runs) or bool(args.model) != bool(args.facts):
        fail("pass either run folders to compare, or both --model and --facts to score a model")
    if bool(args.model) + bool(args.plot) + args.flips > 1:
        fail("--model, --plot and --flips are mutually exclusive")
    if args.heldout and not args.flips:
        fail("--heldout needs --flips")
    if args.batch_size < 1:
        fail(f"--batch-size {args.batch_size}: must be positive")
    return args


def main(argv=None):
    """Run the command-line interface; report wrong files and rows as one line on stderr."""
    args = parse_args(argv)
    try:
        if args.model:
            sets = read_sets(args.facts, args.model)
            print_accuracies(*load_model(args.model, args.device), sets, args.batch_size)
            return
        runs = [read_run(folder) for folder in args.runs]
        if args.flips:
            for run in runs:
                if args.heldout:
                    run["facts"] = ask_again(run, args.heldout, args.batch_size, args.device)
                show_flips(run, args.show)
        else:
            check_groups(runs)
            show(compare(runs), runs, args.show)
            if args.plot:
                plot_epochs(runs, args.plot)
    except (ImportError, OSError, ValueError) as error:     # ImportError: no matplotlib
        fail(f"{error}")


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")    # Windows would not print →
    main()
