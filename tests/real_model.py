"""All scripts with a real model and real facts. `pytest` does not collect this file; name it:

    REAL_MODEL=path/to/model REAL_FACTS=facts.tsv pytest tests/real_model.py

REAL_MODEL: hub name or folder of a causal language model that knows some facts; 135 M parameters
are enough
REAL_FACTS: a table with the columns relation, subject, object and question
Takes some minutes on two CPU cores.
"""
import json
import os
from pathlib import Path

import pytest
import torch
from conftest import METHODS, ROOT, counts_of, run
from eval_hallucination import evaluate, exact_match, generate_answers, load_model, read_jsonl

import make_facts
import sft_selfdistill

MODEL, FACTS = os.environ["REAL_MODEL"], os.environ["REAL_FACTS"]


@pytest.fixture(scope="module")
def facts(tmp_path_factory):
    """Create a small fact folder of capitals and countries, which small models know best."""
    folder = tmp_path_factory.mktemp("real")
    run(folder, ROOT / "make_facts.py", "--model", MODEL, "--source", Path(FACTS).resolve(),
        "--relations", "P17,P36", "--max-facts", 320, "--prompts", 2, "--n-new", 32,
        "--out", "facts/real")
    return folder / "facts/real"


@pytest.fixture(scope="module")
def model():
    return load_model(MODEL)


def test_labels(facts, model):
    """A fact counts as known only if `generate` produces its answer."""
    rows = read_jsonl(facts / "labelled.jsonl")
    known = [row for row in rows if row["category"] == "HighlyKnown"]
    assert len(known) >= 30 and len({row["category"] for row in rows}) >= 3
    prefix = known[0]["prompt"] + known[0]["completion"]
    sample = [row | {"question": row["prompt"][3:-3]} for row in rows[:48]]
    greedy, probability = make_facts.score_answers(*model, prefix, sample)
    answers = generate_answers(*model, [prefix + row["prompt"] for row in sample])
    right = [exact_match(*pair) for pair in zip(answers, (row["answers"] for row in sample))]
    # Labels are a lower bound: other tokens with the same text may be generated.
    assert not any(g and not r for g, r in zip(greedy, right))
    assert sum(g == r for g, r in zip(greedy, right)) >= 46
    assert all(0 <= p <= 1 for p in probability) and max(probability) > 0.5


def test_kl_is_zero_if_teacher_and_student_are_equal(facts, model):
    examples = sft_selfdistill.read_examples(facts / "train_known.jsonl", model[1], 2048)[:8]
    sft_selfdistill.check_head(model[0], sft_selfdistill.collate(examples[:1], "cpu"), MODEL)
    config = sft_selfdistill.Config(kl_weight=4.0, batch_size=4, device="cpu", dtype="float32")
    head = sft_selfdistill.cache_teacher(model[0], examples, config)
    batch = sft_selfdistill.collate(examples, "cpu")
    with torch.no_grad():
        _, terms = sft_selfdistill.self_distillation(
            model[0], head, batch, counts_of([batch]), config)
    assert abs(terms["kl"]) < 1e-6 and terms["ce"] > 0


@pytest.mark.parametrize("method", METHODS)
def test_run(facts, method):
    folder = facts.parent.parent
    run(folder, ROOT / f"{method}.py", "--model", MODEL, "--facts", facts, "--epochs", 2,
        "--batch-size", 16, "--out", method)
    metrics = read_jsonl(folder / method / "metrics.jsonl")
    assert metrics[1]["known"] > 0.3            # stage 1 has taught the format
    assert metrics[-1]["ce"] < metrics[0]["ce"]
    rows = read_jsonl(facts / "heldout_known.jsonl")
    accuracy = evaluate(*load_model(folder / method), rows)["accuracy"]
    assert accuracy == pytest.approx(metrics[-1]["kept"], abs=0.05)
    stored = json.loads((folder / method / "run.json").read_text())
    assert stored["config"]["learning_rate"] == 1e-4
