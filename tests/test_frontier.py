"""docs/study/frontier.py and shift.py: methods against their papers, tables by hand."""
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
import shift
from eval_hallucination import generate_answers, load_model, write_jsonl

PLOTS = importlib.util.find_spec("matplotlib") is not None
PEFT = importlib.util.find_spec("peft") is not None


@pytest.fixture(autouse=True)
def restore():
    with restored():
        yield


@pytest.fixture
def batch(base, world):
    """Return four rows with teacher states, the first two about new facts; its head; a Config."""
    model, tokenizer = base
    examples = []
    for file in ("train_unknown.jsonl", "train_known.jsonl"):
        examples += sft_selfdistill.read_examples(world / file, tokenizer, 128)[:2]
    config = sft_selfdistill.Config(kl_weight=3.0, temperature=4.0, batch_size=4, device="cpu",
                                    dtype="float32")
    head = sft_selfdistill.cache_teacher(model, examples, config)
    return sft_selfdistill.collate(examples, "cpu"), head, config


# ------------------------------------------------------------------------------------- methods

def test_finch_by_hand(base, batch):
    """The learning rate is κ over the root of the mean loss, at most the peak."""
    frontier.finch("1e-3")
    model, (rows, _, _) = base[0], batch
    for peak in (1.0, 1e-5):
        config = sft_baseline.Config(learning_rate=peak)
        for step, scale in enumerate((1.0, 0.5)):
            hidden = scale * sft_baseline.last_hidden_state(model, rows, "float32")
            loss, _ = sft_baseline.cross_entropy(model, hidden, rows, counts_of([rows]))
            mean = loss.item() if step == 0 else 0.9 * mean + 0.1 * loss.item()
            expected = min(peak, 1e-3 / math.sqrt(mean))
            assert sft_baseline.get_lr(step, 10, config) == pytest.approx(expected)


@pytest.mark.parametrize("step, settings", [(0, {"gradient_accumulation_steps": 2}), (5, {})])
def test_finch_rejects_what_it_cannot_do(step, settings, capsys):
    """It knows neither the loss of a step of several batches nor the mean of a resumed run."""
    frontier.finch("1e-3")
    with pytest.raises(SystemExit):
        sft_baseline.get_lr(step, 10, sft_baseline.Config(learning_rate=1.0, **settings))
    assert capsys.readouterr().err.startswith("error: finch: ")


def test_until_skips_learned_tokens(base, batch):
    """Limit 1 gives the plain loss; a lower limit the sum over the tokens below it only."""
    model, (rows, _, _) = base[0], batch
    counts = counts_of([rows])
    hidden = sft_selfdistill.last_hidden_state(model, rows, "float32")
    plain, _ = sft_selfdistill.cross_entropy(model, hidden, rows, counts)
    completion = rows["completion"]
    targets = rows["input_ids"][:, 1:].flatten()[completion]
    p = torch.softmax(model.get_output_embeddings()(hidden[completion]), -1)[range(len(targets)), targets]
    for limit, expected in ((1.0, plain), (0.5, -p[p < 0.5].log().sum() / len(p))):
        frontier.until(limit)
        loss, terms = sft_selfdistill.cross_entropy(model, hidden, rows, counts)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(terms["ce"], plain)
    assert 0 < (p < 0.5).sum() < len(p)


class RaisedLogits(torch.nn.Module):
    """An LM head that adds to the logit of one token at each chosen position of the KL."""

    def __init__(self, head, tokens, chosen, amount):
        super().__init__()
        self.weight = head.weight
        self.head = head
        self.raised = amount * F.one_hot(tokens, len(head.weight)) * chosen[:, None]

    def forward(self, states):
        logits = self.head(states)
        return logits + self.raised if len(states) == len(self.raised) else logits


@pytest.mark.parametrize("amount, places, target, changes", [
    (0, [0, 1], True, False),
    # The targets of new facts, of known facts, and other tokens of new facts.
    (5, [0, 1], True, False), (5, [0], True, False), (5, [2, 3], True, True),
    (40, [0, 1], False, True)])
def test_others_exclude_the_target_from_the_kl(base, batch, amount, places, target, changes):
    """The KL stays 0 if the model only raises the targets of new facts."""
    model, (rows, head, config) = base[0], batch
    predicted = rows["predicted"]
    row = predicted // (rows["input_ids"].shape[1] - 1)
    in_places = torch.isin(row, torch.tensor(places))
    chosen = torch.isin(predicted, rows["completion"]) & in_places
    targets = rows["input_ids"][:, 1:].flatten()[predicted]
    own = model.get_output_embeddings()
    tokens = targets if target else (targets + 1) % len(own.weight)
    raised = copy.copy(model)
    raised.get_output_embeddings = lambda: RaisedLogits(own, tokens, chosen, amount)
    frontier.others("Unknown")
    loss = sft_selfdistill.self_distillation
    _, terms = loss(raised, head, rows, counts_of([rows]), config)
    assert (terms["kl"] > 1e-3) if changes else (abs(terms["kl"]) < 1e-7)


@pytest.mark.parametrize("first_epoch", [1, 2])
def test_rising_by_hand(base, batch, first_epoch):
    """λ rises with every step of stage 2, also if the run is resumed after an epoch."""
    model, (rows, head, config) = copy.deepcopy(base[0]), batch
    counts = counts_of([rows])
    with torch.no_grad():
        next(model.parameters()).mul_(1.2)
    hidden = sft_selfdistill.last_hidden_state(model, rows, "float32")
    ce, _ = sft_selfdistill.cross_entropy(model, hidden, rows, counts)
    frontier.rising("10")
    config.learning_rate = 1.0
    config.epochs = 2
    for step in range(3):       # stage 1 has another loss
        sft_selfdistill.get_lr(step, 3, config)
    for epoch in range(first_epoch, 3):
        sft_selfdistill.make_steps(rows["examples"], 2, epoch, config)
        for step in (2 * epoch - 2, 2 * epoch - 1):
            loss, terms = sft_selfdistill.self_distillation(model, head, rows, counts, config)
            torch.testing.assert_close(loss - ce, 3.0 * 10 ** (step / 4) * 16 * terms["kl"])
            sft_selfdistill.get_lr(step, 4, config)
    assert config.kl_weight == 3.0 and terms["kl"] > 1e-4


@pytest.mark.parametrize("method, value, parts", [
    ("roles", "mlp", ["mlp"]),
    pytest.param("lora", "4", ["attn", "mlp"],
                 marks=pytest.mark.skipif(not PEFT, reason="no peft"))])
def test_trained_weights_of_a_method(method, value, parts, workplace):
    """Only the named parts change; the checkpoint is ordinary and scores as the run says."""
    call(workplace, "frontier", method, value, "--epochs", 4, "--learning-rate", 3e-3,
         "--out", "runs/x")
    folders = ("facts/tiny/base", "runs/x/before", "runs/x")
    models = [load_model(str(workplace / name))[0].state_dict() for name in folders]
    assert list(models[0]) == list(models[2])
    for start, end in zip(models, models[1:]):
        changed = {name for name in end if not torch.equal(end[name], start[name])}
        assert all(any(part in name for part in parts) for name in changed), changed
        assert all(any(part in name for name in changed) for part in parts), changed
    words = ["--model", "runs/x", "--facts", "facts/tiny"]
    lines = call(workplace, "eval_hallucination", *words).stdout.splitlines()
    found = {row["set"]: row["accuracy"] for row in map(json.loads, lines)}
    last = rows_of(workplace / "runs/x/metrics.jsonl")[-1]
    expected = {"new": last["new"], "known": last["known"], "heldout": last["kept"]}
    assert found == pytest.approx(expected, abs=0.02) and found["known"] > 0.5
    assert rows_of(workplace / "runs/x/run.json")[0]["method"].endswith(f"-{method}-{value}")


def test_anchors_enter_only_the_kl(base, world, tmp_path):
    """Their answers are the teacher's own; a batch of anchors only has a loss, too."""
    model, tokenizer = copy.deepcopy(base[0]), base[1]
    prompts = [row["prompt"] for row in rows_of(world / "heldout_known.jsonl")[:3]]
    write_jsonl(tmp_path / "anchors.jsonl", [{"prompt": prompt} for prompt in prompts])
    frontier.anchors(tmp_path / "anchors.jsonl")
    sft_selfdistill.load_model(str(world / "base"), "cpu")
    examples = sft_selfdistill.read_examples(world / "train_known.jsonl", tokenizer, 128)[:2]
    config = sft_selfdistill.Config(kl_weight=3.0, temperature=4.0, batch_size=4, device="cpu",
                                    dtype="float32")
    head = sft_selfdistill.cache_teacher(model, examples, config)
    answers = generate_answers(model, tokenizer, prompts)
    texts = [tokenizer.decode(example["input_ids"]) for example in examples[2:]]
    assert texts == [f"{prompt} {answer}\n" for prompt, answer in zip(prompts, answers)]
    with torch.no_grad():
        next(model.parameters()).mul_(1.2)
    n, ce, kl = [], [], []
    for part in (examples, examples[2:], examples[:2]):
        rows = sft_selfdistill.collate(part, "cpu")
        counts = counts_of([rows])
        _, terms = sft_selfdistill.self_distillation(model, head, rows, counts, config)
        n.append(counts["predicted"])
        ce.append(terms["ce"].item())
        kl.append(terms["kl"].item())
    assert ce[1] == 0 and ce[0] == pytest.approx(ce[2], rel=1e-5)
    assert n[0] == n[1] + n[2] and kl[1] > 1e-4
    assert n[0] * kl[0] == pytest.approx(n[1] * kl[1] + n[2] * kl[2], rel=1e-4)


# ------------------------------------------------------------------------------- interpolation

def test_interpolation(workplace):
    """α = 0 and α = 1 score like the two models; in between, weights are means."""
    call(workplace, "sft_baseline", "--epochs", 12, "--learning-rate", 4e-3, "--out", "runs/a")
    words = ["interpolate", "runs/a", "--facts", "facts/tiny", "--alpha"]
    done = call(workplace, "frontier", *words, 0, 0.25, 1)
    assert done.stderr == ""
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(next(iter(line)) == "interpolate" for line in lines)
    assert [line.pop("interpolate") for line in lines] == [0] * 3 + [0.25] * 3 + [1] * 3
    assert [line["set"] for line in lines[:3]] == ["new", "known", "heldout"]
    assert lines[0]["accuracy"] < 0.3 and lines[6]["accuracy"] > 0.9

    done = call(workplace, "frontier", *words, 0.25, "--out", "mixed")
    assert done.stdout.endswith("saved mixed\n")
    before, after, mixed = [load_model(str(workplace / name))[0].state_dict()
                            for name in ("runs/a/before", "runs/a", "mixed")]
    for name, weights in mixed.items():
        torch.testing.assert_close(weights, 0.75 * before[name] + 0.25 * after[name])
    for model, part in (("runs/a/before", lines[:3]), ("mixed", lines[3:6]), ("runs/a", lines[6:])):
        scored = call(workplace, "eval_hallucination", "--model", model, "--facts", "facts/tiny")
        assert [json.loads(line) for line in scored.stdout.splitlines()] == part

    (workplace / "mixed.jsonl").write_text(call(workplace, "frontier", *words, 0.25, 1).stdout)
    found = frontier.read_points(workplace / "mixed.jsonl")
    assert found == {"mixed": [[0.25, lines[3]["accuracy"], lines[5]["accuracy"]],
                               [1.0, lines[6]["accuracy"], lines[8]["accuracy"]]]}
    for more, named in (([1.5], "1.5"), ([0.5, "--out", "mixed"], "--out mixed"),
                        ([0.1, 0.2, "--out", "new"], "--out new"), ([], "--alpha")):
        assert named in refused(workplace, "frontier", *words, *more)


# ----------------------------------------------------------------------------------- the table

def test_table_by_hand(tmp_path):
    """The setting and epoch with the highest mean over seeds among those that learn enough."""
    for seed, accuracies in ((0, [0.9, 0.7]), (1, [0.8, 0.5])):
        for setting, more in (("1e-4", 0.0), ("1e-5", 0.1)):
            folder = tmp_path / f"lr-{setting}-{seed}"
            folder.mkdir()
            run = {"method": "baseline", "config": {"seed": seed}}
            write_jsonl(folder / "run.json", [run])
            rows = [{"stage": 1, "epoch": 1}, {"stage": 2, "epoch": 0, "new": 1.0, "kept": 1.0}]
            for epoch, kept in enumerate(accuracies, 1):
                rows.append({"stage": 2, "epoch": epoch, "new": 0.6 * epoch - 3 * more,
                             "kept": kept + more})
            write_jsonl(folder / "metrics.jsonl", rows)
    lines = [{"interpolate": 0.5, "set": name, "accuracy": value}
             for name, value in (("new", 0.96), ("known", 1.0), ("heldout", 0.25))]
    write_jsonl(tmp_path / "interpolate-4e-4-0.jsonl", lines)
    paths = sorted(path.name for path in tmp_path.iterdir())
    call(tmp_path, "frontier", "table", *paths, "--save", "points.jsonl")
    # A single seed that keeps everything does not beat means over two.
    points = rows_of(tmp_path / "points.jsonl")
    assert points[0] == {"run": "interpolate-4e-4-0", "points": [[0.5, 0.96, 0.25]]}
    points.append({"run": "lr-3e-3-7", "points": [[1, 1.0, 1.0]]})
    write_jsonl(tmp_path / "points.jsonl", points)
    printed = call(tmp_path, "frontier", "table", "points.jsonl").stdout.splitlines()
    cells = ["85.0 ± 7.1 (1e-4, epoch 1)", "70.0 ± 14.1 (1e-5, epoch 2)",
             *["60.0 ± 14.1 (1e-4, epoch 2)"] * 2]
    assert printed[2] == f"| {frontier.TOOLS['lr']} | 2 | {' | '.join(cells)} |"
    cells = [*["25.0 (4e-4, α 0.5)"] * 3, "–"]
    assert printed[3] == f"| {frontier.TOOLS['interpolate']} | 1 | {' | '.join(cells)} |"


@pytest.mark.skipif(not PLOTS, reason="no matplotlib")
def test_plotted_lines(tmp_path, monkeypatch):
    """A line goes through the points of which no other learns and keeps more."""
    from matplotlib.axes import Axes
    plotted = []
    plot = Axes.plot

    def spy(axis, x, y, *args, **more):
        plotted.append(list(zip(x, y)))
        return plot(axis, x, y, *args, **more)
    monkeypatch.setattr(Axes, "plot", spy)
    points = [[1, 0.2, 0.9], [2, 0.5, 0.8], [3, 0.7, 0.6], [4, 0.6, 0.5], [5, 0.9, 0.6]]
    write_jsonl(tmp_path / "points.jsonl", [{"run": "lr-1e-4-0", "points": points}])
    call(tmp_path, "frontier", "table", "points.jsonl", "--plot", "x.png")
    assert plotted == [[(0.9, 0.6), (0.5, 0.8), (0.2, 0.9)]]
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("words, named", [
    ("table other.jsonl", "other-1-0"), ("table half.jsonl", "half.jsonl"),
    ("table a.jsonl a.jsonl", "lr-1-0"), ("table empty.jsonl", "empty.jsonl"),
    ("table none.jsonl", "none.jsonl"), ("finch", "finch"), ("until often", "often"),
    ("anchors empty-row.jsonl", "prompt"), ("others --help", "others"), ("what", "what")])
def test_rejected_commands(words, named, tmp_path):
    files = {"other": [{"run": "other-1-0", "points": [[1, 0.5, 0.5]]}],
             "half": [{"interpolate": 0.5, "set": "new", "accuracy": 1}],
             "a": [{"run": "lr-1-0", "points": [[1, 0.5, 0.5]]}], "empty": [], "empty-row": [{}]}
    for name, rows in files.items():
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    assert named in refused(tmp_path, "frontier", *words.split())


# -------------------------------------------------------------------------------------- shift.py

def test_a_negative_number_of_directions_is_rejected(tmp_path):
    words = ["run", "facts", "--directions", "0", "-1"]
    assert "--directions -1" in refused(tmp_path, "shift", *words)


def test_removed_directions_by_hand():
    """Of a change in two directions, the larger is removed first."""
    before = torch.arange(12.0).reshape(3, 4)
    large = 3 * torch.outer(torch.tensor([1.0, 0, 0]), torch.tensor([0, 1.0, 0, 0]))
    small = torch.outer(torch.tensor([0, 0.6, 0.8]), torch.tensor([0, 0, 1.0, 0]))
    after = before + large + small
    assert shift.remove_directions(before, after, 0) is after
    torch.testing.assert_close(shift.remove_directions(before, after, 1), before + small)
    torch.testing.assert_close(shift.remove_directions(before, after, 2), before)
