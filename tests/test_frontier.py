"""The rivals of assets/frontier.py against what their authors define, and its table by hand."""
import copy
import importlib.util
import json
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import call, counts_of, refused, restored, rows_of

import frontier
import sft_baseline
import sft_selfdistill
from eval_hallucination import generate_answers, load_model


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
    model, (rows, _, _) = base[0], batch
    for peak in (1.0, 1e-5):
        config = sft_baseline.Config(learning_rate=peak)
        for step, scale in enumerate((1.0, 0.5)):
            hidden = scale * sft_baseline.last_hidden(model, rows)
            loss, _ = sft_baseline.cross_entropy(model, hidden, rows, counts_of([rows]))
            mean = loss.item() if step == 0 else 0.9 * mean + 0.1 * loss.item()
            assert sft_baseline.get_lr(step, 10, config) == pytest.approx(min(peak, 1e-3 / math.sqrt(mean)))
    with pytest.raises(SystemExit):
        sft_baseline.get_lr(0, 10, sft_baseline.Config(learning_rate=1.0, accumulate=2))


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
    """The KL is 0 at first, and stays 0 if the targets of new facts alone are lifted; not if those of known facts are, or others."""
    model, (rows, head, config) = base[0], batch
    real, supervised = rows["real"][:, 1:].bool(), rows["supervised"][:, 1:]
    targets, own = rows["ids"][:, 1:][real], model.get_output_embeddings()
    frontier.others("Unknown")
    for lifted, places, changes in ((0, [0, 1], False), (5, [0, 1], False), (5, [2, 3], True), (5, [0], False), (-40, [0, 1], True)):
        chosen = (supervised & torch.isin(torch.arange(4), torch.tensor(places))[:, None])[real]
        tokens = targets if lifted > 0 else (targets + 1) % own.weight.shape[0]         # other tokens than the targets

        class Lifted(torch.nn.Module):
            """The head, with larger logits of some tokens at some positions of the KL."""
            weight = own.weight

            def forward(self, states):
                logits = own(states)
                if len(states) == len(tokens):
                    logits = logits + abs(lifted) * F.one_hot(tokens, logits.shape[1]) * chosen[:, None]
                return logits
        some = copy.copy(model)
        some.get_output_embeddings = Lifted
        _, terms = sft_selfdistill.self_distillation(some, head, rows, counts_of([rows]), config)
        assert (terms["kl"] > 1e-3) if changes else (abs(terms["kl"]) < 1e-7), (lifted, places)


def test_rising(base, batch):
    """λ is at first what --kl-weight says, and rises to so many times that, in stage 2 anew."""
    model, (rows, head, config) = copy.deepcopy(base[0]), batch
    with torch.no_grad():
        next(model.parameters()).mul_(1.2)
    ce, _ = sft_selfdistill.cross_entropy(model, sft_selfdistill.last_hidden(model, rows), rows, counts_of([rows]))
    frontier.rising("10")
    config.learning_rate = 1.0
    for step in range(3):
        sft_selfdistill.get_lr(step, 3, config)                 # stage 1, whose loss is another
    for step in range(4):
        loss, terms = sft_selfdistill.self_distillation(model, head, rows, counts_of([rows]), config)
        torch.testing.assert_close(loss - ce, 3.0 * 10 ** (step / 4) * 16 * terms["kl"])
        sft_selfdistill.get_lr(step, 4, config)
    assert config.kl_weight == 3.0 and terms["kl"] > 1e-4


@pytest.mark.parametrize("rival, value, parts", [("roles", "mlp", ["mlp"]), ("lora", "4", ["attn", "mlp"])])
def test_what_rivals_train(rival, value, parts, workplace):
    """The weights of the named parts change and no others; what is saved is an ordinary checkpoint that scores as the run says."""
    if rival == "lora":
        pytest.importorskip("peft")
    call(workplace, "frontier", rival, value, "--epochs", 4, "--learning-rate", 3e-3, "--out", "runs/x")
    models = [load_model(str(workplace / name))[0].state_dict() for name in ("facts/tiny/base", "runs/x/before", "runs/x")]
    assert list(models[0]) == list(models[2])
    for start, end in ((0, 1), (1, 2)):
        changed = {name for name, weight in models[end].items() if not torch.equal(weight, models[start][name])}
        assert {part for part in parts for name in changed if part in name} == set(parts)
        assert all(any(part in name for part in parts) for name in changed), changed
    done = call(workplace, "eval_hallucination", "--model", "runs/x", "--facts", "facts/tiny").stdout
    said = {row["set"]: row["accuracy"] for row in map(json.loads, done.splitlines())}
    last = rows_of(workplace / "runs/x/metrics.jsonl")[-1]
    assert said == pytest.approx({key: last[key] for key in said}, abs=0.02) and said["known"] > 0.5
    assert rows_of(workplace / "runs/x/run.json")[0]["method"].endswith(f"-{rival}-{value}")


def test_anchors(base, world, tmp_path):
    """They enter the KL with the teacher's own answers, nothing of them CE; a batch of anchors alone has a loss too."""
    model, tokenizer = copy.deepcopy(base[0]), base[1]
    rows = rows_of(world / "heldout_known.jsonl")[:3]
    (tmp_path / "anchors.jsonl").write_text("".join(json.dumps({"prompt": row["prompt"]}) + "\n" for row in rows))
    frontier.anchors(tmp_path / "anchors.jsonl")
    sft_selfdistill.load_model(str(world / "base"), "cpu")
    examples = sft_selfdistill.read_examples(world / "train_known.jsonl", tokenizer, 128)[:2]
    config = sft_selfdistill.Config(kl_weight=3.0, temperature=4.0, batch_size=4, device="cpu", dtype="float32")
    head = sft_selfdistill.cache_teacher(model, examples, config)
    answers = generate_answers(model, tokenizer, [row["prompt"] for row in rows])
    texts = [tokenizer.decode(example["ids"]) for example in examples[2:]]
    assert texts == [f"{row['prompt']} {answer}\n" for row, answer in zip(rows, answers)]
    with torch.no_grad():
        next(model.parameters()).mul_(1.2)
    whole, alone = sft_selfdistill.collate(examples, "cpu"), sft_selfdistill.collate(examples[2:], "cpu")
    plain = sft_selfdistill.collate(examples[:2], "cpu")
    losses = [sft_selfdistill.self_distillation(model, head, part, counts_of([part]), config)[1] for part in (whole, alone, plain)]
    assert losses[1]["ce"] == 0 and losses[0]["ce"].item() == pytest.approx(losses[2]["ce"].item(), rel=1e-5)
    n = [int(counts_of([part])["real"]) for part in (whole, alone, plain)]
    assert n[0] == n[1] + n[2] and losses[1]["kl"] > 1e-4
    assert n[0] * losses[0]["kl"].item() == pytest.approx(n[1] * losses[1]["kl"].item() + n[2] * losses[2]["kl"].item(), rel=1e-4)


def test_table_by_hand(tmp_path):
    """The setting and epoch that keeps most among those that learn enough, in means over seeds; none is a dash."""
    for seed, kept in ((0, [0.9, 0.7]), (1, [0.8, 0.5])):
        for setting, shift in (("1e-4", 0.0), ("1e-5", 0.1)):
            folder = tmp_path / f"lr-{setting}-{seed}"
            folder.mkdir()
            (folder / "run.json").write_text(json.dumps({"method": "baseline", "config": {"seed": seed}}) + "\n")
            lines = [{"stage": 1, "epoch": 1}, {"stage": 2, "epoch": 0, "unknown": 1.0, "heldout": 1.0}]
            lines += [{"stage": 2, "epoch": i + 1, "unknown": 0.6 * (i + 1) - 3 * shift, "heldout": k + shift} for i, k in enumerate(kept)]
            (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    lines = [{"interpolate": 0.5, "set": key, "accuracy": value} for key, value in (("unknown", 0.96), ("known", 1.0), ("heldout", 0.25))]
    (tmp_path / "interpolate-4e-4-0.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    paths = sorted(path.name for path in tmp_path.iterdir())
    call(tmp_path, "frontier", "table", *paths, "--save", "points.jsonl")
    with open(tmp_path / "points.jsonl", "a") as file:         # one seed alone keeps all: it is no match for means over two
        file.write(json.dumps({"run": "lr-3e-3-7", "points": [[1, 1.0, 1.0]]}) + "\n")
    done = call(tmp_path, "frontier", "table", "points.jsonl").stdout.splitlines()
    cells = ["85.0 ± 7.1 (1e-4, epoch 1)", "70.0 ± 14.1 (1e-5, epoch 2)", *["60.0 ± 14.1 (1e-4, epoch 2)"] * 2]
    assert done[2] == f"| {frontier.TOOLS['lr']} | 2 | {' | '.join(cells)} |"
    assert done[3] == f"| {frontier.TOOLS['interpolate']} | 1 | {' | '.join(['25.0 (4e-4, α 0.5)'] * 3)} | – |"
    if importlib.util.find_spec("matplotlib"):
        call(tmp_path, "frontier", "table", "points.jsonl", "--plot", "x.png")
        assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("words, named", [
    (["table", "points.jsonl"], "other-1-0"), (["table", "half.jsonl"], "half.jsonl"), (["table", "a.jsonl", "a.jsonl"], "lr-1-0"),
    (["table", "empty.jsonl"], "empty"), (["table", "none.jsonl"], "none.jsonl"), (["finch"], "finch"), (["until", "often"], "often"),
    (["anchors", "empty-row.jsonl"], "prompt"), (["others", "--help"], "others"), (["what"], "what")])
def test_what_the_table_refuses(words, named, tmp_path):
    for name, lines in (("points", [{"run": "other-1-0", "points": [[1, 0.5, 0.5]]}]), ("half", [{"interpolate": 0.5, "set": "unknown", "accuracy": 1}]),
                        ("a", [{"run": "lr-1-0", "points": [[1, 0.5, 0.5]]}]), ("empty", []), ("empty-row", [{}])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert named in refused(tmp_path, "frontier", *words)


def test_no_negative_number_of_directions(tmp_path):
    assert "--directions -1" in refused(tmp_path, "shift", "run", "facts", "--directions", "0", "-1")


def test_directions_taken_out_by_hand():
    """assets/shift.py: of a change of two directions the larger goes first; with none, nothing does."""
    import shift
    before = torch.arange(12.0).reshape(3, 4)
    large = 3 * torch.outer(torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0, 0]))
    small = torch.outer(torch.tensor([0, 0.6, 0.8]), torch.tensor([0, 0, 1.0, 0]))
    after = before + large + small
    assert shift.take_out(before, after, 0) is after
    torch.testing.assert_close(shift.take_out(before, after, 1), before + small)
    torch.testing.assert_close(shift.take_out(before, after, 2), before)
