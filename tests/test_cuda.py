"""On a GPU: every method in every precision, generation, and resuming; skipped without CUDA.

Nothing is compared bit for bit with a CPU, which rounds differently.
"""
import copy
import math

import pytest
import torch
from conftest import METHODS, call, ce_loss, counts_of, rows_of, train_epochs

import eval_hallucination
import sft_baseline
import sft_selfdistill

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
DTYPES = ["float32", "bfloat16"]


@pytest.fixture(scope="module")
def on_gpu(world):
    """Return (model, tokenizer, examples) of the small world, with the model on the GPU."""
    model, tokenizer = eval_hallucination.load_model(world / "base", "cuda")
    examples = sft_baseline.read_examples(world / "train_unknown.jsonl", tokenizer, 128)
    return model, tokenizer, examples


def gradient_of(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_auto_selects_the_gpu():
    """In bf16 if the GPU has it; the tiny model in fp32, like on a CPU."""
    config = sft_baseline.parse_args(["--model", "x"])
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    assert config.device == "cuda" and config.dtype == ("bfloat16" if has_bf16 else "float32")
    assert sft_baseline.parse_args([]).dtype == "float32"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_run(workplace, method, dtype):
    """A run learns, its KL is 0 at step 1, and its checkpoint is in fp32."""
    words = ["--epochs", 4, "--dtype", dtype, "--device", "cuda", "--out", "x"]
    done = call(workplace, method, *words)
    metrics = rows_of(workplace / "x/metrics.jsonl")
    assert metrics[-1]["ce"] < metrics[2]["ce"]
    assert all(math.isfinite(row.get("ce", 0)) for row in metrics)
    if method == "sft_selfdistill":
        first = done.stdout.split("stage 2, step 1: ")[1].splitlines()[0]
        assert abs(float(first.split("'kl': ")[1].rstrip("}"))) < 1e-4
    assert eval_hallucination.load_model(workplace / "x")[0].dtype == torch.float32


def test_bf16_is_close_to_fp32(on_gpu):
    """The loss differs by at most 2 %, the gradient by at most 5 %."""
    model, _, examples = on_gpu
    batch = sft_baseline.collate(examples, "cuda")
    losses, gradients = [], []
    for dtype in DTYPES:
        model.zero_grad()
        loss, _ = ce_loss(sft_baseline, model, dtype)(batch, counts_of([batch]))
        loss.backward()
        losses.append(loss.item())
        gradients.append(gradient_of(model))
    assert losses[1] == pytest.approx(losses[0], rel=0.02)
    assert (gradients[1] - gradients[0]).norm() <= 0.05 * gradients[0].norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_do_not_change_the_gradient(on_gpu, monkeypatch, dtype):
    model, _, examples = on_gpu
    student = copy.deepcopy(model)
    examples = [dict(example) for example in examples[:8]]
    with torch.no_grad():
        embeddings = student.transformer.wte.weight
        embeddings += 0.02 * torch.randn_like(embeddings)
    config = sft_selfdistill.Config(kl_weight=1.0, batch_size=3, device="cuda", dtype=dtype)
    head = sft_selfdistill.cache_teacher(model, examples, config)
    assert examples[0]["teacher"].device.type == "cpu"
    batch = sft_selfdistill.collate(examples, "cuda")
    gradients = []
    for size in (7, 10 ** 6):
        monkeypatch.setattr(sft_selfdistill, "CHUNK", size * model.config.vocab_size)
        student.zero_grad()
        loss, _ = sft_selfdistill.self_distillation(
            student, head, batch, counts_of([batch]), config)
        loss.backward()
        gradients.append(gradient_of(student))
    assert (gradients[0] - gradients[1]).norm() <= 0.02 * gradients[1].norm()


def test_generation(on_gpu, world):
    """Batches give the answers of single prompts, and autocast does not matter."""
    model, tokenizer, _ = on_gpu
    rows = rows_of(world / "heldout_known.jsonl")[:12]
    prompts = ["Q: " * (i % 3) + row["prompt"] for i, row in enumerate(rows)]
    answers = []
    for size, enabled in ((12, True), (1, False)):
        with torch.autocast("cuda", torch.bfloat16, enabled=enabled):
            answers.append(eval_hallucination.generate_answers(
                model, tokenizer, prompts, batch_size=size))
    assert sum(a == b for a, b in zip(*answers)) >= 11


@pytest.mark.parametrize("method", METHODS)
def test_resumed_run_ends_like_an_uninterrupted_one(workplace, monkeypatch, method):
    words = ["--epochs", 4, "--batch-size", 16, "--device", "cuda"]
    call(workplace, method, *words, "--out", "whole")
    clip = torch.nn.utils.clip_grad_norm_
    steps = []

    def interrupt(*args):
        steps.append(args)
        if len(steps) == 10:
            raise KeyboardInterrupt
        return clip(*args)
    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", interrupt)
        call(workplace, method, *words, "--out", "x", ok=False)
    call(workplace, method, *words, "--out", "x", "--resume")
    whole, resumed = (rows_of(workplace / out / "metrics.jsonl") for out in ("whole", "x"))
    assert [row["epoch"] for row in resumed] == [row["epoch"] for row in whole]
    assert resumed[-1]["ce"] == pytest.approx(whole[-1]["ce"], rel=0.05)
