"""On a GPU: steps of every method in every precision, generation, and an interrupted run. Needs CUDA, else it is skipped.

Nothing here compares with a CPU bit for bit: products are rounded in another order."""
import copy
import math

import pytest
import torch
from conftest import call, counts_of, plain_loss, rows_of, trained

import eval_hallucination
import sft_baseline
import sft_freeze
import sft_selfdistill

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
METHODS = ["sft_baseline", "sft_selfdistill", "sft_freeze"]
DTYPES = ["float32", "bfloat16", "float16"]


@pytest.fixture(scope="module")
def on_gpu(world):
    """(model, tokenizer, examples) of the small world, on the device."""
    model, tokenizer = eval_hallucination.load_model(world / "base", "cuda")
    return model, tokenizer, sft_baseline.read_examples(world / "train_unknown.jsonl", tokenizer, 128)


def test_auto_takes_the_gpu():
    config = sft_baseline.parse([])
    assert config.device == "cuda" and config.dtype in ("bfloat16", "float32")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", METHODS)
def test_run(workplace, method, dtype):
    """A whole run: it learns, the KL reads 0 at step 1, the checkpoint is an ordinary one of fp32."""
    done = call(workplace, method, "--epochs", 4, "--dtype", dtype, "--device", "cuda", "--out", "x")
    metrics = rows_of(workplace / "x/metrics.jsonl")
    assert metrics[-1]["ce"] < metrics[2]["ce"] and all(math.isfinite(m.get("ce", 0)) for m in metrics)
    if method == "sft_selfdistill":
        first = done.stdout.split("stage 2, step 1: ")[1].splitlines()[0]
        assert abs(float(first.split("'kl': ")[1].rstrip("}"))) < 1e-4
    assert eval_hallucination.load_model(workplace / "x")[0].dtype == torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_near_fp32(on_gpu, dtype):
    """The loss of a batch and its gradient are within some per cent of those in fp32."""
    model, _, examples = on_gpu
    batch, found = sft_baseline.collate(examples, "cuda"), []
    for precision in ("float32", dtype):
        model.zero_grad()
        with sft_baseline.autocast(sft_baseline.Config(device="cuda", dtype=precision)):
            loss, _ = plain_loss(sft_baseline, model)(batch, counts_of([batch]))
        loss.backward()
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in model.parameters()])))
    assert found[1][0] == pytest.approx(found[0][0], rel=0.02)
    assert (found[1][1] - found[0][1]).norm() <= 0.05 * found[0][1].norm()


def test_fp16_skips_a_step_whose_gradient_overflows(on_gpu, monkeypatch):
    """At a scale of 2^40 the first gradients overflow: these steps are skipped, the scale falls, and the model learns."""
    scaler, scales = torch.amp.GradScaler, []

    def large(*args, **more):
        scales.append(scaler(*args, **more, init_scale=2.0 ** 40))
        return scales[-1]
    monkeypatch.setattr(torch.amp, "GradScaler", large)
    model = copy.deepcopy(on_gpu[0])
    metrics = trained(sft_baseline, model, on_gpu[2], plain_loss(sft_baseline, model), device="cuda", dtype="float16", epochs=8)
    assert scales[0].get_scale() < 2.0 ** 40 and metrics[-1]["ce"] < metrics[0]["ce"]


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_change_nothing(on_gpu, monkeypatch, dtype):
    model, _, examples = on_gpu
    student, examples = copy.deepcopy(model), [dict(example) for example in examples[:8]]
    with torch.no_grad():
        student.transformer.wte.weight += 0.02 * torch.randn_like(student.transformer.wte.weight)
    config = sft_selfdistill.Config(kl_weight=1.0, batch_size=3, device="cuda", dtype=dtype)
    head = sft_selfdistill.cache_teacher(model, examples, config)
    assert examples[0]["teacher"].is_pinned()
    batch, found = sft_selfdistill.collate(examples, "cuda"), []
    for chunk in (7, 10 ** 6):
        monkeypatch.setattr(sft_selfdistill, "CHUNK", chunk * model.config.vocab_size)
        student.zero_grad()
        with sft_selfdistill.autocast(config):
            loss, _ = sft_selfdistill.self_distillation(student, head, batch, counts_of([batch]), config)
        loss.backward()
        found.append(torch.cat([p.grad.flatten() for p in student.parameters()]))
    assert (found[0] - found[1]).norm() <= 0.02 * found[1].norm()


def test_generate_in_fp16(on_gpu, world):
    """Left-padded batches answer as single rows do."""
    model, tokenizer, _ = on_gpu
    prompts = ["Q: " * (i % 3) + row["prompt"] for i, row in enumerate(rows_of(world / "heldout_known.jsonl")[:12])]
    with torch.autocast("cuda", torch.float16):
        many, one = (eval_hallucination.generate_answers(model, tokenizer, prompts, batch_size=size) for size in (12, 1))
    assert sum(a == b for a, b in zip(many, one)) >= 11


@pytest.mark.parametrize("method", METHODS)
def test_resume(workplace, monkeypatch, method):
    """A run that dies in stage 2 goes on from its last epoch, and ends as well as one that was left alone."""
    words = ["--epochs", 4, "--batch-size", 16, "--device", "cuda"]
    call(workplace, method, *words, "--out", "whole")
    module = {"sft_baseline": sft_baseline, "sft_selfdistill": sft_selfdistill, "sft_freeze": sft_freeze}[method]
    real, calls = module.get_lr, []

    def dies(*args):
        calls.append(args)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return real(*args)
    with monkeypatch.context() as patch:
        patch.setattr(module, "get_lr", dies)
        call(workplace, method, *words, "--out", "x", ok=False)
    call(workplace, method, *words, "--out", "x", "--resume")
    whole, resumed = (rows_of(workplace / out / "metrics.jsonl") for out in ("whole", "x"))
    assert [m["epoch"] for m in resumed] == [m["epoch"] for m in whole]
    assert resumed[-1]["ce"] == pytest.approx(whole[-1]["ce"], rel=0.05)
