"""The rivals of assets/frontier.py against what their authors define, and its table by hand."""
import copy
import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import call, counts_of, refused, restored, rows_of

import frontier
import sft_baseline
import sft_selfdistill


@pytest.fixture(autouse=True)
def as_they_were():
    with restored():
        yield


@pytest.fixture
def batch(base, world):
    """Four rows, the first two of Unknown facts, with the hidden states of the teacher, and its head."""
    model, tokenizer = base
    examples = sft_selfdistill.read_examples(world / "train_unknown.jsonl", tokenizer, 128)[:2]
    examples += sft_selfdistill.read_examples(world / "train_known.jsonl", tokenizer, 128)[:2]
    config = sft_selfdistill.Config(kl_weight=3.0, temperature=4.0, batch_size=4, device="cpu", dtype="float32")
    head = sft_selfdistill.cache_teacher(model, examples, config)
    return sft_selfdistill.collate(examples, "cpu"), head, config


def test_finch_by_hand(base, batch):
    """The learning rate is κ over the root of the mean loss, at most the peak."""
    frontier.finch("1e-3")
    losses = [sft_baseline.cross_entropy(base[0], scale * sft_baseline.last_hidden(base[0], batch[0]), batch[0], counts_of([batch[0]]))[0]
              for scale in (1.0, 0.5)]
    mean = 0.9 * losses[0].item() + 0.1 * losses[1].item()
    for peak in (1.0, 1e-5):
        config = sft_baseline.Config(learning_rate=peak)
        assert sft_baseline.get_lr(0, 10, config) == pytest.approx(min(peak, 1e-3 / math.sqrt(mean)))


def test_until_leaves_out_what_is_learnt(base, batch):
    """At limit 1 it is the plain loss; at a lower one, the sum over tokens below it alone."""
    model, (rows, _, _) = base[0], batch
    hidden = sft_selfdistill.last_hidden(model, rows)
    plain, _ = sft_selfdistill.cross_entropy(model, hidden, rows, counts_of([rows]))
    mask = rows["supervised"][:, 1:]
    p = torch.softmax(model.get_output_embeddings()(hidden[mask]), -1)[torch.arange(int(mask.sum())), rows["ids"][:, 1:][mask]]
    for limit, expected in ((1.0, plain), (0.5, -p[p < 0.5].log().sum() / len(p))):
        frontier.until(limit)
        loss, terms = sft_selfdistill.cross_entropy(model, hidden, rows, counts_of([rows]))
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(terms["ce"], plain)
    assert 0 < (p < 0.5).sum() < len(p)


def test_others_leave_the_target_to_ce(base, batch):
    """The KL is 0 at first; what lifts the targets of new facts alone leaves it 0, and lifts it where facts are known."""
    model, (rows, head, config) = copy.deepcopy(base[0]), batch
    frontier.others("Unknown")
    _, terms = sft_selfdistill.self_distillation(model, head, rows, counts_of([rows]), config)
    assert abs(terms["kl"]) < 1e-7
    for first, changes in ((0, False), (2, True)):
        some = copy.deepcopy(model)
        hidden = sft_selfdistill.last_hidden(model, rows)
        mask, targets = rows["supervised"][:, 1:], rows["ids"][:, 1:]
        own = some.get_output_embeddings()

        class Lifted(torch.nn.Module):
            """The head, with a larger logit of the targets of two rows."""
            weight = own.weight

            def forward(self, states):
                logits = own(states)
                real = rows["real"][:, 1:].bool()
                chosen = mask & (torch.arange(4)[:, None] // 2 * 2 == first)
                if len(states) == int(real.sum()):
                    logits = logits + 5 * F.one_hot(targets[real], logits.shape[1]) * chosen[real][:, None]
                return logits
        some.get_output_embeddings = Lifted
        _, terms = sft_selfdistill.self_distillation(some, head, rows, counts_of([rows]), config)
        assert (terms["kl"] > 1e-3) == changes and hidden.shape[0] == 4


def test_rising(base, batch):
    """λ at the end of stage 2 is so many times that of its start; the KL itself is as it was."""
    model, (rows, head, config) = copy.deepcopy(base[0]), batch
    with torch.no_grad():
        next(model.parameters()).mul_(1.2)
    ce, terms = sft_selfdistill.cross_entropy(model, sft_selfdistill.last_hidden(model, rows), rows, counts_of([rows]))
    frontier.rising("10")
    config.learning_rate = 1.0
    for step, times in ((0, 10 ** 0.25), (3, 10)):
        sft_selfdistill.get_lr(step, 4, config)
        loss, terms = sft_selfdistill.self_distillation(model, head, rows, counts_of([rows]), config)
        torch.testing.assert_close(loss - ce, 3.0 * times * 16 * terms["kl"])
    assert config.kl_weight == 3.0 and terms["kl"] > 1e-4


@pytest.mark.parametrize("rival, value, moved", [("roles", "mlp", ["mlp"]), ("lora", "4", ["attn", "mlp"])])
def test_what_rivals_train(rival, value, moved, workplace):
    """The weights of the named parts change and no others; what is saved is an ordinary checkpoint that scores as the run says."""
    if rival == "lora":
        pytest.importorskip("peft")
    call(workplace, "frontier", rival, value, "--epochs", 2, "--learning-rate", 1e-2, "--out", "runs/x")
    models = [sft_baseline.load_model(str(workplace / name), "cpu")[0].state_dict() for name in ("facts/tiny/base", "runs/x")]
    changed = [name for name, weight in models[1].items() if not torch.equal(weight, models[0][name])]
    assert changed and all(any(part in name for part in moved) for name in changed), changed
    done = call(workplace, "eval_hallucination", "--model", "runs/x", "--facts", "facts/tiny").stdout
    said = {row["set"]: row["accuracy"] for row in map(json.loads, done.splitlines())}
    last = rows_of(workplace / "runs/x/metrics.jsonl")[-1]
    assert said == pytest.approx({key: last[key] for key in said}, abs=0.02)


def test_anchors(workplace):
    """Prompts without completion enter the KL and not CE: with λ 0, and all in one window, they change nothing."""
    rows = rows_of(workplace / "facts/tiny/heldout_known.jsonl")[:16]
    (workplace / "anchors.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    words = ["--epochs", 1, "--batch-size", 200, "--eval-every", 0]
    with restored():
        call(workplace, "frontier", "anchors", "anchors.jsonl", *words, "--kl-weight", 0, "--out", "runs/anchors")
    call(workplace, "sft_selfdistill", *words, "--kl-weight", 0, "--out", "runs/plain")
    one, other = (rows_of(workplace / f"runs/{name}/metrics.jsonl")[-1] for name in ("anchors", "plain"))
    assert one["ce"] == pytest.approx(other["ce"], rel=1e-4) and one["unknown"] == other["unknown"]


def test_table_by_hand(tmp_path):
    """The setting and epoch that keeps most among those that learn enough, in means over seeds; none is a dash."""
    for seed, kept in ((0, [0.9, 0.7]), (1, [0.8, 0.5])):
        for setting, shift in (("1e-4", 0.0), ("1e-5", 0.1)):
            folder = tmp_path / f"lr-{setting}-{seed}"
            folder.mkdir()
            (folder / "run.json").write_text(json.dumps({"method": "baseline", "config": {"seed": seed}}) + "\n")
            lines = [{"stage": 1, "epoch": 1}, {"stage": 2, "epoch": 0, "unknown": 0.0, "heldout": 1.0}]
            lines += [{"stage": 2, "epoch": i + 1, "unknown": 0.6 * (i + 1) - 3 * shift, "heldout": k + shift} for i, k in enumerate(kept)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = [{"interpolate": 0.5, "set": key, "accuracy": value} for key, value in (("unknown", 0.96), ("known", 1.0), ("heldout", 0.25))]
    (tmp_path / "interpolate-4e-4-0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    paths = [str(path) for path in tmp_path.iterdir()]
    tools = frontier.gather({name: points for path in sorted(paths) for name, points in frontier.read_points(path).items()})
    assert frontier.best(tools["lr"], 0.5)[0] == ("1e-4", 1) and frontier.best(tools["lr"], 0.8)[0] == ("1e-5", 2)
    np.testing.assert_allclose(frontier.best(tools["lr"], 0.5)[1], [0.9, 0.8])
    call(tmp_path, "frontier", "table", *paths, "--save", "points.jsonl")
    done = call(tmp_path, "frontier", "table", "points.jsonl").stdout.splitlines()
    assert done[2] == f"| {frontier.TOOLS['lr']} | 85.0 ± 7.1 (1e-4, 1) | 70.0 ± 14.1 (1e-5, 2) | 60.0 ± 14.1 (1e-4, 2) | 60.0 ± 14.1 (1e-4, 2) |"
    assert done[3] == f"| {frontier.TOOLS['interpolate']} | {' | '.join(['25.0 (4e-4, 0.5)'] * 3)} | – |"
    (tmp_path / "points.jsonl").write_text(json.dumps({"run": "other-1-0", "points": [[1, 0.5, 0.5]]}) + "\n")
    assert "other-1-0" in refused(tmp_path, "frontier", "table", "points.jsonl")
