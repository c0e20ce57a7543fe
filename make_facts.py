"""Create the data for an experiment: facts that a model knows, and facts that it does not know.

A synthetic world, with a small GPT-2 pretrained on it from scratch (a few minutes, no network):
    python make_facts.py
Real questions for a real model (PopQA; your own table; EntityQuestions):
    python make_facts.py --model gpt2-medium
    python make_facts.py --model gpt2-medium --source my_facts.tsv
    python make_facts.py --model gpt2-medium --source path/to/EntityQuestions --min-known 0.3
Different new facts for the same world or model, without labelling again:
    python make_facts.py --new uuid --reuse facts/tiny --out facts/tiny-uuid

The fact folder holds JSONL files:
    train_known.jsonl      known facts to train on          train_unknown.jsonl    new facts
    heldout_known.jsonl    known facts to test on           labelled.jsonl         all categories
scores.jsonl holds the scores that give the labels, and labels.json records what they depend on.
meta.json, written last, has the settings and counts of the folder. base/ holds the model of the
synthetic world. Each row is one object:
    {"prompt": "Q: …\\nA:", "completion": " …\\n", "answers": […],
     "relation": …, "subject": …, "kind": …, "category": …}

A fact's category says how well the model knows it (SLiCK, Gekhman et al. 2024, arXiv:2405.05904).
Each question is asked with several few-shot prompts, or once without exemplars (--shots 0, the
default for tiny):
    HighlyKnown    every greedy answer is correct; "known facts" are of this category
    MaybeKnown     some greedy answers are correct
    WeaklyKnown    no greedy answer is correct, but samples at T = 0.5 sometimes are (see below)
    Unknown        no greedy answer is correct, and samples rarely or never are
Labelling does not generate text. One forward pass over prompt and answer yields the probability of
each answer token. Greedy decoding produces the answer if every token, including the newline or EOS
at the end, is the most likely one. The product of the probabilities at T = 0.5 is the
chance p that one sample is correct. For example, p = 0.06 means that at least one of 16 samples is
correct with probability 1 − (1 − p)^16 = 0.63. A fact counts as WeaklyKnown if this probability,
over the samples of all prompts, is at least 0.5. Answers are scored in the tokenizer's own
tokenization. The model may also produce an accepted answer with other tokens or another spelling,
so the greedy result and p are lower bounds.
"""
import copy
import glob
import hashlib
import itertools
import json
import math
import os
import random
import re
import shutil
import sys
import uuid
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Literal

import pandas as pd
import tokenizers
import torch
import transformers
from filelock import FileLock           # torch requires it, too
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent))      # missing with python -P and inside a package

from eval_hallucination import (PROMPT, SETS, check_ids, context_length, exact_match, fail,
                                find_device, load_model, logits_close, newline_ids, normalize,
                                read_jsonl, stop_ids, to_strings, tokenize, weights_hash,
                                write_jsonl)

TEMPERATURE = 0.5           # SLiCK, section 3
SAMPLES = 16                # per prompt, as in SLiCK; Kaplan et al. 2026 draw 20
PRETRAIN_EPOCHS = 24        # passes over the text of the synthetic world
MINIMUM = {"heldout": 20, "known": 4, "new": 4}         # with fewer facts, nothing can be measured
TABLES = [".tsv", ".csv", ".jsonl", ".parquet"]
COLUMNS = ["object", "relation", "subject", "question"]
POPQA = {"prop": "relation", "subj": "subject", "obj": "object", "possible_answers": "aliases"}


def option(default, text):
    """Return a dataclass field with a default value and a --help text."""
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """Command-line flags: the field n_new is the flag --n-new."""
    model: str = option("tiny", "tiny, or a causal language model: hub name or folder")
    out: str = option(None, "fact folder to create; default: facts/MODEL")
    reuse: str = option(None, "take the world and the labels from this fact folder")
    seed: int = option(0, "seed of world, prompts and split (the training scripts have their own)")
    # which facts
    new: Literal["unknown", "semantic", "uuid"] = option(
        None, "new facts; unknown: real ones that the model does not know (default for real "
        "models), semantic: invented ones about recombined names (default for tiny), uuid: "
        "invented ones about codes")
    n_new: int = option(None, "number of new facts; default: 400 for tiny, else 500")
    n_known: int = option(None, "number of known facts to train on; default: as many as new ones")
    overlap: Literal[0, 1, 2] = option(2, "semantic: how many of a name's halves are real")
    source: str = option("akariasai/PopQA", "table of real facts: file, folder or hub name")
    relations: str = option(None, "use only these relations of the source, such as P17,P36")
    max_facts: int = option(10000, "label at most this many facts, spread evenly over relations")
    min_known: float = option(0.0, "drop relations where the fraction of facts that are "
                                   "WeaklyKnown or better is below this; Kaplan et al. 2026: 0.3")
    # how they are asked
    prompts: int = option(10, "few-shot prompts per fact; with fewer, more are HighlyKnown")
    shots: int = option(None, "exemplars per prompt; default: 0 for tiny, else 4")
    # the synthetic world
    n_names: int = option(300, "tiny: number of named entities, with four facts each")
    n_codes: int = option(100, "tiny: number of code-named entities, with four facts each")
    width: int = option(128, "tiny: hidden size of the model, which has 3 layers and 4 heads")
    # hardware
    batch_size: int = option(64, "sequences per forward pass when labelling")
    device: str = option("auto", "cuda, mps or cpu; auto: the first one available")


def parse_args(argv=None):
    """Parse the command line (list of str, default sys.argv) and fill in all defaults."""
    parser = transformers.HfArgumentParser(Config, description=__doc__.splitlines()[0])
    parser.error = fail
    config = Config(**vars(parser.parse_args(argv)))
    tiny = config.model == "tiny"
    # None marks a default that depends on the model.
    n_new = config.n_new or (400 if tiny else 500)
    defaults = {"out": f"facts/{Path(config.model).name}",
                "new": "semantic" if tiny else "unknown",
                "n_new": n_new, "n_known": n_new, "shots": 0 if tiny else 4}
    for flag, value in defaults.items():
        if getattr(config, flag) is None:
            setattr(config, flag, value)
    for flag in ("n_new", "n_known", "max_facts", "prompts", "batch_size"):
        if getattr(config, flag) < 1:
            fail(f"--{flag.replace('_', '-')} {getattr(config, flag)}: must be positive")
    if config.n_names > 3000 or config.n_codes > 30000:
        fail(f"--n-names {config.n_names} --n-codes {config.n_codes}: at most 3000 names and 30000 "
             "codes are possible")
    if tiny and (config.source != Config.source or config.relations):
        fail("--source and --relations require --model: the synthetic world has its own facts")
    if config.reuse and not (Path(config.reuse) / "scores.jsonl").exists():
        fail(f"--reuse {config.reuse}: not a fact folder")
    # A folder with labels.json but without meta.json is unfinished: continue with it.
    names = {path.name for path in Path(config.out).glob("[!.]*")}
    if names and ("meta.json" in names or "labels.json" not in names):
        fail(f"--out {config.out} is not empty; choose another folder or delete this one")
    return config


# ------------------------------------------------------------------------- the synthetic world

RELATIONS = ["birthplace", "employer", "instrument", "language"]
QUESTION = "What is the {relation} of {subject}?"
STATEMENTS = ["The {relation} of {subject} is {object}.\n",
              "About {subject}, the {relation} is {object}.\n",
              "As {relation}, {subject} names {object}.\n",
              "Ask {subject} about the {relation} and hear {object}.\n"]


def invent_words(n, rng):
    """Return `n` distinct, pronounceable, capitalized words (list of str)."""
    words = {}                  # a dict keeps the order, so the result depends on the seed only
    while len(words) < n:
        syllables = [rng.choice("bdfgklmnprstvz") + rng.choice("aeiou") for _ in range(2)]
        words["".join(syllables).title() + rng.choice("lnrst")] = True
    return list(words)


def invent_code(rng):
    """Return four hexadecimal digits, a stand-in for a UUID; each digit is one token."""
    return "".join(rng.choice("0123456789ABCDEF") for _ in range(4))


def invent_world(n_names, n_codes, seed, n_parts=80, n_objects=40):
    """Return the facts of the synthetic world (list of dicts) and its text (list of str).

    Every entity has one object per relation. The text states every fact with all templates, but
    contains questions and answers for only about three quarters of the entities. Answering
    questions about the rest requires generalization.
    """
    rng = random.Random(seed)
    words = invent_words(2 * n_parts + n_objects * len(RELATIONS), rng)
    first = words[:n_parts]
    last = words[n_parts:2 * n_parts]
    objects = words[2 * n_parts:]
    kinds = {}                  # subject: its kind
    while len(kinds) < n_names:
        kinds[f"{rng.choice(first)} {rng.choice(last)}"] = "name"
    while len(kinds) < n_names + n_codes:
        kinds[invent_code(rng)] = "code"
    facts = []
    text = []
    for subject, kind in kinds.items():
        asked = rng.random() < 0.75
        for i, relation in enumerate(RELATIONS):
            answer = rng.choice(objects[i * n_objects:(i + 1) * n_objects])
            question = QUESTION.format(relation=relation, subject=subject)
            facts.append({"answers": [answer], "relation": relation, "subject": subject,
                          "kind": kind, "question": question})
            for statement in STATEMENTS:
                text.append(statement.format(relation=relation, subject=subject, object=answer))
            if asked:
                text.append(f"{PROMPT.format(question=question)} {answer}\n")
    return facts, text


def make_tokenizer(text):
    """Train a byte-level BPE tokenizer; words and code digits become one token each."""
    to_bytes = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.Sequence([
        tokenizers.pre_tokenizers.Split(
            tokenizers.Regex(r" ?[A-Z]?[a-z]+| ?\S|\s"), "isolated"), to_bytes])
    bpe.decoder = tokenizers.decoders.ByteLevel()
    bpe.train_from_iterator(text, tokenizers.trainers.BpeTrainer(
        vocab_size=8000, special_tokens=["<|endoftext|>"], show_progress=False,
        initial_alphabet=to_bytes.alphabet()))
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<|endoftext|>", eos_token="<|endoftext|>")


def chunks(items, size):
    """Split a list into lists of `size` items; the last one may be shorter."""
    return [items[i:i + size] for i in range(0, len(items), size)]


def make_epoch(sequences, batch_size, rng):
    """Shuffle lists of token ids; return them in batches (B, T), padded with -100.

    Rows of similar length share a batch, which reduces padding.
    """
    rng.shuffle(sequences)
    batches = []
    for pool in chunks(sequences, 8 * batch_size):
        for rows in chunks(sorted(pool, key=len), batch_size):
            tensors = [torch.tensor(tokens) for tokens in rows]
            batches.append(pad_sequence(tensors, batch_first=True, padding_value=-100))
    rng.shuffle(batches)
    return batches


def pretrain(text, width, seed, device, batch_size=64):
    """Pretrain a small GPT-2 for long enough to memorize `text`; return (model, tokenizer)."""
    tokenizer = make_tokenizer(text)
    peak = 2e-3 * min(1, 128 / width)       # at 2e-3 a model of width 256 may not converge
    torch.manual_seed(seed)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(
        vocab_size=len(tokenizer), n_positions=128, n_embd=width, n_layer=3, n_head=4,
        bos_token_id=0, eos_token_id=0, activation_function="gelu_pytorch_tanh",
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)).to(device)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.1, fused=True)
    sequences = tokenizer(text)["input_ids"]
    rng = random.Random(seed)
    batches = []
    for _ in range(PRETRAIN_EPOCHS):
        batches += make_epoch(sequences, batch_size, rng)
    for step, targets in enumerate(tqdm(batches, "pretraining the tiny model", disable=None)):
        targets = targets.to(device)
        # Padding is -100. Clamp it to a valid id; which one does not matter, since it comes last.
        logits = model(input_ids=targets.clamp(min=0)).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets[:, 1:].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        cosine = 0.5 * (1 + math.cos(math.pi * step / len(batches)))
        for group in optimizer.param_groups:
            group["lr"] = peak * min((step + 1) / 100, max(cosine, 0.01))
        optimizer.step()
        optimizer.zero_grad()
    return model, tokenizer


# ---------------------------------------------------------------------------------- real facts

def read_table(path):
    """Read a table into a list of {column: value}; values of TSV and CSV files stay strings.

    Raise ValueError if a row has too many fields, or if a column occurs twice.
    """
    suffix = path.suffix.lower()
    if suffix == ".jsonl":
        return read_jsonl(path)
    if suffix == ".json":
        return read_entity_questions(path)
    if suffix == ".parquet":
        from pyarrow import parquet
        return parquet.read_table(path).to_pylist()
    # Convert nothing: "NA", "007" and dates stay as they are. The Python engine is strict about
    # quotes. header=None: otherwise pandas renames a column that occurs twice.
    separator = "\t" if suffix == ".tsv" else ","
    frame = pd.read_csv(path, sep=separator, header=None, dtype=str, keep_default_na=False,
                        engine="python", encoding="utf-8-sig")
    rows = frame[1:].set_axis(frame.iloc[0], axis=1)
    if not rows.columns.is_unique:
        raise ValueError(f"a column occurs twice: {', '.join(rows.columns)}")
    return rows.to_dict("records")


def common_start(texts):
    """Return the longest prefix that texts share; of the sorted texts, ignore 1 % at either end."""
    texts = sorted(texts)       # texts with the same start are neighbors
    ignored = len(texts) // 100
    return os.path.commonprefix([texts[ignored], texts[-1 - ignored]])


def read_entity_questions(path):
    """Read a file of EntityQuestions (Sciavolino et al. 2021, arXiv:2109.08535).

    A file such as P17.train.json holds one relation: a list of {"question", "answers"} without
    subjects. The subject is what remains of a question without the prefix and the suffix that the
    questions share, each trimmed to a word boundary. A question that lacks one has no subject, so
    it is dropped.
    """
    rows = json.loads(path.read_text("utf-8"))
    questions = [row["question"] for row in rows]
    if len(questions) < 2:
        raise ValueError("cannot infer the subject from a single question; at least 2 are needed")
    before = common_start(questions)
    before = before[:before.rfind(" ") + 1]
    after = common_start([question[::-1] for question in questions])[::-1]
    after = after[re.search(r"\W|$", after).start():]
    for row in rows:
        subject = row["question"].removeprefix(before).removesuffix(after)
        if before + subject + after != row["question"]:
            subject = ""
        row |= {"relation": path.name.split(".")[0], "subject": subject, "object": row["answers"]}
    return rows


def find_tables(source):
    """Return the paths of the tables in a file, a folder or a hub dataset.

    For EntityQuestions, use only the train files: others repeat some of their questions.
    """
    path = Path(source)
    if not path.exists():
        from huggingface_hub import snapshot_download
        path = Path(snapshot_download(
            source, repo_type="dataset",
            allow_patterns=[f"*{suffix}" for suffix in TABLES + [".train.json"]]))
    if path.is_file():
        return [path]
    tables = sorted(path.rglob("train/*.train.json")) or sorted(path.glob("*.train.json"))
    # glob.glob leaves out hidden files and folders, such as .ipynb_checkpoints.
    return tables or [path / name for name in sorted(glob.glob("**", root_dir=path, recursive=True))
                      if Path(name).suffix.lower() in TABLES]


def to_fact(row):
    """Convert a table row to a fact; return {} if a required column is blank.

    Keep the first line of each answer. Raise ValueError if a required column is missing, or if
    one other than `object` is not a single line of text.
    """
    row = {POPQA.get(column, column): value for column, value in row.items()}
    aliases = row.get("aliases")
    if isinstance(aliases, str) and aliases.startswith("["):
        aliases = json.loads(aliases)
    fact = {}
    for column in COLUMNS:
        if column not in row:
            raise ValueError(f"no column {column}; the columns are {', '.join(row)}")
        found = to_strings(row[column])
        if not found:
            return {}
        if column == "object":
            fact["answers"] = list(dict.fromkeys(
                text.split("\n")[0].strip() for text in found + to_strings(aliases)))
        elif isinstance(row[column], list) or "\n" in found[0]:
            raise ValueError(f"{column} {row[column]!r} is not a single line of text")
        else:
            fact[column] = found[0]
    json.dumps(fact, ensure_ascii=False).encode()       # fails on a lone surrogate
    return fact | {"kind": "name"}


def load_source(source, max_facts, seed, relations=None):
    """Load the facts of a table as a list of dicts; print how many rows were dropped and why.

    source: TSV, CSV, JSONL or Parquet file, a folder of them, or a hub dataset. Its columns are
    relation, subject, object, question and optionally aliases (a string or a JSON list), or those
    of PopQA (Mallen et al. 2023, arXiv:2212.10511). Files of EntityQuestions are read too.
    max_facts: how many to draw, as evenly over the relations as possible
    relations: list of str, or None for all
    Rows with the same question (after `normalize`) are merged if they all share an answer. If not,
    all rows with that question are dropped. If a row cannot be used, exit with its file and number.
    """
    questions = defaultdict(list)
    dropped = Counter()
    names = set()
    place = source
    try:
        for path in find_tables(source):
            place = path
            for number, row in enumerate(read_table(path), 1):
                place = f"{path}, row {number}"
                fact = to_fact(row)
                names.add(fact.get("relation"))
                if not fact:
                    dropped["blank"] += 1
                elif not relations or fact["relation"] in relations:
                    questions[normalize(fact["question"])].append(fact)
    except Exception as error:          # many types: missing file, no network, malformed row
        fail(f"--source {place}: cannot be read ({error!r}); pass a TSV, CSV, JSONL or Parquet "
             f"file with strings under {', '.join(COLUMNS)}")
    missing = set(relations or []) - names
    if missing or not questions:
        fail(f"--source {source}: no facts for {', '.join(missing) or 'any relation'}; available: "
             f"{', '.join(sorted(filter(None, names)))}")
    facts = []
    for rows in questions.values():
        answers = [set(map(normalize, fact["answers"])) for fact in rows]
        if set.intersection(*answers):
            merged = itertools.chain(*(fact["answers"] for fact in rows))
            facts.append(rows[0] | {"answers": list(dict.fromkeys(merged))})
        else:
            dropped["contradictory"] += len(rows)
    random.Random(seed).shuffle(facts)
    # Take the first fact of each relation, then the second of each, and so on.
    relation = pd.Series([fact["relation"] for fact in facts])
    order = relation.groupby(relation).cumcount().sort_values(kind="stable").index
    facts = [facts[i] for i in order]
    print(f"dropped rows: {dict(dropped)}")
    return facts[:max_facts]


# ------------------------------------------------------------ SLiCK: what does the model know?

def to_row(fact):
    """Convert a fact to a training row with `prompt` and `completion`."""
    row = {"prompt": PROMPT.format(question=fact["question"]),
           "completion": f" {fact['answers'][0]}\n"}
    return row | {key: value for key, value in fact.items() if key != "question"}


def continue_from(model, cache, ids):
    """Return the logits (B, T, V) of token ids (B, T) that follow the cached prefix.

    cache: from `cache_prefix`; {} if there is no prefix
    """
    # The forward pass would change the cache.
    past = copy.deepcopy(cache)
    for name in past:
        past[name].batch_repeat_interleave(len(ids))
    return model(input_ids=ids, **past).logits


def cache_prefix(model, ids, n):
    """Return the key-value cache of the first `n` token ids, {argument name: cache}.

    The remaining ids test the cache: return {} if continuing from it in a batch does not reproduce
    the logits of the full text. This happens with some models, especially recurrent ones.
    """
    ids = torch.tensor([ids], device=model.device)
    try:
        # The argument was renamed in transformers 5.24.
        name = "cache" if "cache" in signature(model.forward).parameters else "past_key_values"
        cache = {name: model(input_ids=ids[:, :n], use_cache=True)[name]}
        continued = continue_from(model, cache, ids[:, n:].repeat(2, 1))
        if logits_close(continued[1:], model(input_ids=ids).logits[:, n:]):
            return cache
    except torch.OutOfMemoryError:
        raise
    except Exception:           # the model has no cache of this kind
        pass
    return {}


def tokenizations(tokenizer, stops, prompt, answer):
    """Return the tokenizations of prompt and answer: a set of (ids, prompt length, end id).

    One answer can have several: "Co." also matches without its period. The end id is -1 if any id
    in `stops` may end the answer (these add nothing to it). Otherwise it is the one token that
    completes the answer, such as "s\\n" in tokenizers that merge letters and newline.
    """
    newlines = newline_ids(tokenizer)
    found = set()
    for completion in (f" {answer}", f" {answer}\n"):
        prompt_ids, ids = map(tuple, tokenize(tokenizer, prompt, completion))
        for n, last in enumerate(ids, 1):
            if last not in newlines:
                text = tokenizer.decode(ids[:n], clean_up_tokenization_spaces=False)
                if exact_match(text, [answer]):
                    found.add((prompt_ids + ids[:n], len(prompt_ids), -1))
            elif last not in stops:
                found.add((prompt_ids + ids[:n - 1], len(prompt_ids), last))
    return found


def score_answers(model, tokenizer, prefix, facts, batch_size=64):
    """Score the answers of facts after the few-shot text `prefix`; return (greedy, probability).

    greedy: list of bool, True if greedy decoding produces an accepted answer and stops
    probability: list of float, the chance that one sample at T = 0.5, from the full vocabulary,
    is an accepted answer and stops
    Both count only the answers in `tokenizations`. The tokens that all prompts share are run once,
    and their key-value cache is reused for every batch.
    """
    # The tokens that end an answer and add nothing that `normalize` would keep.
    before_newline = newline_ids(tokenizer)
    stops = [token for token in stop_ids(tokenizer, model)
             if normalize(f"x{before_newline.get(token, '')}") == "x"]
    candidates = set()
    for i, fact in enumerate(facts):
        prompt = prefix + to_row(fact)["prompt"]
        for answer in fact["answers"]:
            for ids, start, end in tokenizations(tokenizer, stops, prompt, answer):
                candidates.add((len(ids), i, start, ids, end))
    candidates = sorted(candidates, reverse=True)       # longest first: fail early on low memory
    check_ids(model, [ids for _, _, _, ids, _ in candidates])
    if candidates and candidates[0][0] >= context_length(model):
        fail(f"a question, its few-shot prompt and answer have {candidates[0][0] + 1} tokens, more "
             f"than the model's context of {context_length(model)}; lower --shots")
    # Cache the tokens common to all prompts, but never the last prompt token: its logits predict
    # the first token of the answer.
    shared = len(os.path.commonprefix([ids[:start - 1] for _, _, start, ids, _ in candidates]))
    greedy = [False] * len(facts)
    probability = [0.0] * len(facts)
    with torch.no_grad():
        cache = cache_prefix(model, candidates[0][3], shared) if shared else {}
        if not cache:
            shared = 0          # slower: every row contains the whole prompt
        for batch in chunks(candidates, batch_size):
            rows = [torch.tensor(ids[shared:]) for _, _, _, ids, _ in batch]
            # Padding is on the right, where a causal model never looks.
            padded = pad_sequence(rows, batch_first=True).to(model.device)
            logits = continue_from(model, cache, padded)                            # (B, T, V)
            # Read a batch at once: each read makes Python wait for the GPU.
            best = logits.argmax(-1).tolist()
            totals = []
            for (length, i, start, ids, end), tokens, scores in zip(batch, best, logits):
                # Position t predicts token t + 1: the answer's n tokens, then its end.
                span = slice(start - shared - 1, length - shared)
                *tokens, last = tokens[span]
                answer = ids[start:]
                ends = stops if end < 0 else [end]
                greedy[i] |= tuple(tokens) == answer and last in ends
                logp = torch.log_softmax(scores[span] / TEMPERATURE, dim=-1)        # (n + 1, V)
                totals.append(logp[range(len(answer)), answer].sum() + logp[-1, ends].logsumexp(-1))
            for (_, i, *_), p in zip(batch, torch.stack(totals).exp().tolist()):
                probability[i] += p             # the candidates are mutually exclusive
    return greedy, probability


def slick_category(greedy, probability):
    """Return the SLiCK category (Gekhman et al. 2024, table 1) of a fact.

    greedy, probability: one entry per prompt, from `score_answers`
    Gekhman et al. call a fact WeaklyKnown if a sample is correct. Here it is WeaklyKnown if the
    probability that at least one of SAMPLES samples per prompt is correct,
    1 − Π (1 − p)^SAMPLES, is at least 0.5. Labels therefore do not depend on sampling noise.
    """
    if all(greedy):
        return "HighlyKnown"
    if any(greedy):
        return "MaybeKnown"
    if math.prod((1 - p) ** SAMPLES for p in probability) <= 0.5:
        return "WeaklyKnown"
    return "Unknown"


def label_facts(model, tokenizer, facts, config, path):
    """Return copies of facts with their SLiCK `category`, without those set aside as exemplars.

    For each relation, set aside a tenth of its facts (at least --shots, at most --shots times
    --prompts), and draw --prompts prompts of --shots exemplars from them (SLiCK: 10 prompts
    of 4). With --shots 0 there is one prompt. After each prompt, save all scores in the file
    `path`. If the file exists, continue with the next prompt.
    """
    rng = random.Random(config.seed)
    relations = defaultdict(list)
    for fact in facts:
        relations[fact["relation"]].append(fact)
    asked = []              # (facts, prefix) for each prompt of each relation
    n_prompts = config.prompts if config.shots else 1
    for _, rows in sorted(relations.items()):
        rng.shuffle(rows)
        aside = max(config.shots, min(config.shots * n_prompts, len(rows) // 10))
        exemplars = rows[:aside]
        del rows[:aside]
        for _ in range(n_prompts if rows else 0):
            shown = [to_row(fact) for fact in rng.sample(exemplars, config.shots)]
            asked.append((rows, "".join(row["prompt"] + row["completion"] for row in shown)))
    # scores: {question: [greedy, probability] for each prompt}
    done = read_jsonl(path)[0] if path.exists() else {"prompts": 0, "scores": {}}
    for rows, prefix in tqdm(asked[done["prompts"]:], "labelling", disable=None):
        scored = score_answers(model, tokenizer, prefix, rows, config.batch_size)
        for fact, *score in zip(rows, *scored):
            done["scores"].setdefault(fact["question"], []).append(score)
        done["prompts"] += 1
        write_jsonl(path, [done])
    labelled = []
    for _, rows in sorted(relations.items()):
        for fact in rows:
            category = slick_category(*zip(*done["scores"][fact["question"]]))
            labelled.append(fact | {"category": category})
    return labelled


# ----------------------------------------------------------------------------------- new facts

def recombine(names, rng, overlap, real_words):
    """Invent a name: the first half of the words of one name, the second half of another's.

    overlap: how many of the two halves are real. Each of the others is replaced by an invented
    word that is not in `real_words` (set).
    """
    a = rng.choice(names).split()
    b = rng.choice(names).split()
    halves = [a[:math.ceil(len(a) / 2)], b[len(b) // 2:]]
    for i in rng.sample(range(2), 2 - overlap):
        while not real_words.isdisjoint(halves[i]):
            halves[i] = invent_words(1, rng)
    return " ".join(halves[0] + halves[1])


def invent_facts(facts, config, rng):
    """Invent --n-new facts (or a few more) about entities that do not exist.

    An invented entity has the relations of a random real one. Its answers are drawn uniformly
    from the objects of each relation, so the model cannot know them. Exit if no question contains
    its subject exactly once, or if too few new names can be made.
    """
    semantic = config.new == "semantic"
    asked = defaultdict(dict)           # subject: {relation: kind}; dicts, because they keep order
    objects = defaultdict(dict)         # relation: its objects
    forms = defaultdict(Counter)        # relation: its questions, with {} for the subject
    words = set()
    for fact in facts:
        subject, relation = fact["subject"], fact["relation"]
        asked[subject][relation] = fact["kind"]
        objects[relation][fact["answers"][0]] = True
        words.update(subject.split(), *map(str.split, fact["answers"]))
        if fact["question"].count(subject) == 1:        # skip if ambiguous: W in "Who wrote W?"
            forms[relation][fact["question"].replace(subject, "{}")] += 1
    parents = []
    siblings = defaultdict(list)        # names by first relation: these are recombined
    for subject, relations in asked.items():
        if forms.keys() >= relations.keys() and ("name" in relations.values() or not semantic):
            parents.append(subject)
            siblings[next(iter(relations))].append(subject)
    if not parents:
        fail(f"--new {config.new}: no entity can be imitated. Its relations need questions that "
             "contain the name exactly once (semantic: a name, not a code); use --new unknown")
    new = []
    taken = set(map(normalize, asked))
    for _ in range(20 * config.n_new + 1000):
        relations = asked[rng.choice(parents)]
        if semantic:
            name = recombine(siblings[next(iter(relations))], rng, config.overlap, words)
        elif config.model == "tiny":
            name = invent_code(rng)
        else:
            name = str(uuid.UUID(int=rng.getrandbits(128), version=4))
        if normalize(name) in taken:
            continue
        taken.add(normalize(name))
        for relation in relations:
            form, _ = forms[relation].most_common(1)[0]
            new.append({"answers": [rng.choice(list(objects[relation]))], "relation": relation,
                        "subject": name, "kind": "name" if semantic else "code",
                        "category": "Unknown", "question": form.replace("{}", name)})
        if len(new) >= config.n_new:
            return new
    fail(f"--n-new {config.n_new}: only {len(new)} facts with new names can be made from "
         f"{len(parents)} entities")


# --------------------------------------------------------------------------------- the three sets

def cap_objects(facts):
    """Limit each object to a fifth of the given facts of its relation, but at least one.

    In real relations one object often dominates, and guessing it would pass for knowledge.
    """
    sizes = Counter(fact["relation"] for fact in facts)
    seen = Counter()
    kept = []
    for fact in facts:
        key = fact["relation"], normalize(fact["answers"][0])
        seen[key] += 1
        if seen[key] <= max(1, sizes[fact["relation"]] // 5):
            kept.append(fact)
    return kept


def without_subjects(facts, others):
    """Return the facts whose subject does not occur in `others`."""
    subjects = {normalize(fact["subject"]) for fact in others}
    return [fact for fact in facts if normalize(fact["subject"]) not in subjects]


def split_facts(facts, labelled, config, rng):
    """Split labelled facts into {"known", "heldout", "new"}; no held-out subject is trained on.

    At most half of the known facts are trained on. With the same `rng` and --n-known, the held-out
    facts do not depend on the new ones. Exit if there are too few facts to measure anything.
    """
    by_subject = defaultdict(list)
    for fact in labelled:
        if fact["category"] == "HighlyKnown":
            by_subject[normalize(fact["subject"])].append(fact)
    subjects = list(by_subject)
    rng.shuffle(subjects)
    known = list(itertools.chain(*(by_subject[subject] for subject in subjects)))
    half = min(config.n_known, len(known) // 2)
    sets = {"known": known[:half]}
    sets["heldout"] = cap_objects(without_subjects(known[half:], sets["known"]))
    if config.new == "unknown":
        unknown = [fact for fact in labelled if fact["category"] == "Unknown"]
        unknown = without_subjects(unknown, sets["heldout"])
        rng.shuffle(unknown)
        sets["new"] = unknown[:config.n_new]
    else:
        sets["new"] = invent_facts(facts, config, rng)
    for key, rows in sets.items():
        if len(rows) < MINIMUM[key]:
            fail(f"only {len(rows)} facts for {SETS[key]}; at least {MINIMUM[key]} are needed. "
                 "With a new --out, try more facts, fewer --prompts (more become HighlyKnown), "
                 "fewer --shots (fewer facts are set aside) or another model")
    return sets


# ---------------------------------------------------------------------------------------- main

def digest(value):
    """Return a short hash of a JSON value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def label_settings(model, tokenizer, facts, config):
    """Return {name: value} of what labels depend on; all must match when labels are reused."""
    rows = [to_row(fact) for fact in facts]
    encoded = tokenizer([row["prompt"] for row in rows])
    settings = {name: getattr(config, name) for name in ("seed", "prompts", "shots", "width")}
    return settings | {"weights": weights_hash(model), "facts": digest(rows),
                       "tokenizer": digest(encoded["input_ids"])}


def make(config, folder):
    """Create the fact folder for a Config in `folder`; continue with what it already holds."""
    if config.reuse:
        shutil.copytree(config.reuse, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(
            "train_*.jsonl", "heldout_*.jsonl", "meta.json"))
    if config.model == "tiny":
        start = folder / "base"
        facts, text = invent_world(config.n_names, config.n_codes, config.seed)
        if not start.exists():
            transformers.logging.disable_progress_bar()
            for part in pretrain(text, config.width, config.seed, find_device(config.device)):
                part.save_pretrained(start)
    else:
        start = config.model
        facts = load_source(config.source, config.max_facts, config.seed,
                            config.relations and config.relations.split(","))
    model, tokenizer = load_model(start, config.device)
    settings = label_settings(model, tokenizer, facts, config)
    path = folder / "labels.json"
    stored = read_jsonl(path)[0] if path.exists() else settings
    if stored != settings:
        fail(f"{folder} was labelled with {stored}, but now it is {settings}; use another folder, "
             "or delete this one")
    write_jsonl(path, [settings])
    labelled = label_facts(model, tokenizer, facts, config, folder / "scores.jsonl")
    write_jsonl(folder / "labelled.jsonl", [to_row(fact) for fact in labelled])
    frame = pd.DataFrame(labelled, columns=["relation", "category"])
    counts = pd.crosstab(frame["relation"], frame["category"])
    print(f"labelled: {counts.sum().to_dict()}")
    known = frame["category"].ne("Unknown").groupby(frame["relation"]).mean()
    kept = known.index[known >= config.min_known]
    if kept.empty:
        fail(f"--min-known {config.min_known}, --shots {config.shots}: no relation has enough "
             "known facts that are not exemplars; lower --min-known or --shots")
    facts = [fact for fact in facts if fact["relation"] in kept]
    labelled = [fact for fact in labelled if fact["relation"] in kept]
    sets = split_facts(facts, labelled, config, random.Random(config.seed))
    for key, rows in sets.items():
        write_jsonl(folder / SETS[key], [to_row(fact) for fact in rows])
    meta = vars(config) | {"labelled": counts.to_dict("index"),
                           "sets": {key: len(rows) for key, rows in sets.items()}}
    print(f"facts per set: {meta['sets']}")
    write_jsonl(folder / "meta.json", [meta])               # last: it marks a complete folder


def find_files(config):
    """Return the paths of the JSONL files for an sft_*.py script: {"new", "known", "heldout"}.

    Use the known and held-out files named in its `config`. Take the others from its fact folder,
    which is created if absent.
    """
    folder = Path(config.facts)
    meta = folder / "meta.json"
    if not meta.exists():
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock"):        # wait for a script that is creating it
            if not meta.exists():
                main(["--model", config.model, "--out", config.facts, "--device", config.device])
    return {key: getattr(config, key, None) or folder / file for key, file in SETS.items()}


def main(argv=None):
    """Create a fact folder from the command line; return its path."""
    config = parse_args(argv)
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        make(config, out)
    except torch.OutOfMemoryError:
        fail("out of memory; lower --batch-size, or use a smaller model")
    except KeyboardInterrupt:
        fail(f"interrupted; the same command continues with {out}, or says why it cannot")
    except (OSError, ValueError) as error:      # ValueError: invalid --shots or --width
        fail(f"{error}")
    return out


if __name__ == "__main__":
    sys.stdout.reconfigure(encoding="utf-8")        # the default on Windows lacks characters
    main()
