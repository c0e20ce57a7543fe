"""sft_freeze.py: roles of parameters in several architectures, freezing and the pull of --l2."""
import copy
import json

import pytest
import torch
import transformers
from conftest import call, ce_loss, counts_of, refused, rows_of, train_epochs

import sft_freeze
from eval_hallucination import load_model

IDS = {"vocab_size": 64, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
SIZE = IDS | {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2,
              "intermediate_size": 32, "max_position_embeddings": 32}
GEMMA = SIZE | {"head_dim": 8, "num_key_value_heads": 1}
OPT = SIZE | {"ffn_dim": 32}
GPT2 = ("gpt2", IDS | {"n_embd": 16, "n_layer": 3, "n_head": 2, "n_positions": 32})
ARCHITECTURES = {
    "gpt2": GPT2,
    "llama": ("llama", SIZE),
    "llama-tied": ("llama", SIZE | {"tie_word_embeddings": True}),
    "mistral": ("mistral", GEMMA),
    "qwen2": ("qwen2", SIZE | {"num_key_value_heads": 1}),
    "qwen3": ("qwen3", GEMMA),
    "gemma": ("gemma", GEMMA),
    "gemma2": ("gemma2", GEMMA),
    "gemma3": ("gemma3_text", GEMMA),
    "gpt-neox": ("gpt_neox", SIZE),
    "phi": ("phi", SIZE | {"qk_layernorm": True}),
    "phi3": ("phi3", SIZE),
    "opt": ("opt", OPT),
    "opt-350m": ("opt", OPT | {"word_embed_proj_dim": 8, "do_layer_norm_before": False})}
BLOOM = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
# The names of ROLES were not written for these.
OTHERS = {
    "bloom": ("bloom", {"vocab_size": 64, "hidden_size": 16, "n_layer": 2, "n_head": 2}),
    "mpt": ("mpt", {"vocab_size": 64, "d_model": 16, "n_layers": 2, "n_heads": 2}),
    "falcon": ("falcon", BLOOM),
    "granite-moe": ("granitemoe", SIZE | {"num_local_experts": 2, "num_experts_per_tok": 1})}


def random_model(kind, settings):
    config = transformers.AutoConfig.for_model(kind, **settings)
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def trained_names(model):
    return {name for name, weights in model.named_parameters() if weights.requires_grad}


def in_blocks_1_and_2(name):
    return ".1." in name or ".2." in name


def role_by_module(model, name):
    """Return a parameter's role from the classes of its modules; "tied" for a tied head."""
    modules = dict(model.named_modules())
    path = name.split(".")[:-1]
    owners = [type(modules[".".join(path[:n])]).__name__ for n in range(len(path), 0, -1)]
    if "Norm" in owners[0]:
        return "norms"
    if any("Attention" in owner for owner in owners):
        return "attention"
    if any("Layer" in owner or "Block" in owner for owner in owners[1:]):
        return "mlp"
    head = model.get_output_embeddings().weight
    if model.get_input_embeddings().weight is head is model.get_parameter(name):
        return "tied"
    return "embeddings" if "Embedding" in owners[0] or path[-1] == "project_in" else "head"


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_roles_of_an_architecture(architecture, capsys):
    model = random_model(*ARCHITECTURES[architecture])
    ids = torch.arange(12)[None]
    logits = model(ids).logits
    weights = dict(model.named_parameters())
    expected = {name: role_by_module(model, name) for name in weights}
    for role in sft_freeze.ROLES.keys() - {"other"}:
        sft_freeze.freeze(model, sft_freeze.Config(trainable=role))
        roles = {role, "tied"} if role in ("embeddings", "head") else {role}
        wanted = {name for name in weights if expected[name] in roles}
        assert trained_names(model) == wanted != set(), role
        size = sum(weights[name].numel() for name in wanted)
        tied = sum(weights[name].numel() for name in wanted if expected[name] == "tied")
        printed = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
        assert "other" not in printed
        line = printed.pop(role)
        assert line.replace(" ", "") == f"{size:,}of{size:,}weightsaretrained"
        for other, line in printed.items():
            n_trained = tied if other in ("embeddings", "head") else 0
            assert line.startswith(f"{n_trained:,} of"), (role, other, line)
    sft_freeze.freeze(model, sft_freeze.Config(trainable="all"))
    assert trained_names(model) == weights.keys() and torch.equal(logits, model(ids).logits)
    sft_freeze.freeze(model, sft_freeze.Config(trainable="mlp, attention", layers="1-2"))
    assert trained_names(model) == {
        name for name in weights
        if expected[name] in ("mlp", "attention") and in_blocks_1_and_2(name)}


@pytest.mark.parametrize("settings, named", [
    ({"trainable": "ffn"}, "--trainable ffn: no such parameters"),
    ({"trainable": "mlp,,"}, "--trainable :"),
    ({"trainable": "other"}, "--trainable other: no such parameters"),
    ({"trainable": "embeddings", "layers": "0-1"}, "--layers 0-1); choose all or some of norms,attention,mlp"),
    ({"layers": "2-3"}, "0 ≤ A ≤ B ≤ 2"),
    ({"layers": "2-1"}, "--layers 2-1"),
    ({"layers": "two"}, "--layers two"),
    ({"layers": ""}, "--layers : must")])
def test_bad_settings(settings, named, capsys):
    config = sft_freeze.Config(**{"trainable": "attention"} | settings)
    with pytest.raises(SystemExit):
        sft_freeze.freeze(random_model(*GPT2), config)
    error = capsys.readouterr().err
    assert named in error and len(error.splitlines()) == 1


@pytest.mark.parametrize("architecture", OTHERS)
def test_unmatched_parameters_are_printed_as_other(architecture, capsys):
    """They are trained only by --trainable other and by --trainable all."""
    model = random_model(*OTHERS[architecture])
    split = sft_freeze.split_parameters(model, sft_freeze.Config())
    tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert sum(map(len, split.values())) - tied == len(dict(model.named_parameters()))
    assert split["attention"] and split["mlp"] + split["other"]
    assert bool(split["other"]) == (architecture == "granite-moe")
    for role in ("attention", "all"):
        sft_freeze.freeze(model, sft_freeze.Config(trainable=role))
        trained = trained_names(model).intersection(split["other"])
        assert trained == (set(split["other"]) if role == "all" else set())
        assert ("other" in capsys.readouterr().out) == bool(split["other"])


@pytest.fixture
def examples(base, world):
    return sft_freeze.read_examples(world / "train_known.jsonl", base[1], 128)[:8]


def test_frozen_weights_stay_the_same_bit_for_bit(base, examples):
    model = copy.deepcopy(base[0])
    sft_freeze.freeze(model, sft_freeze.Config(trainable="mlp", layers="1-2"))
    loss_function = ce_loss(sft_freeze, model)
    train_epochs(sft_freeze, model, examples, loss_function, learning_rate=1e-2, weight_decay=0.5)
    for name, before in base[0].named_parameters():
        trained = ".mlp." in name and in_blocks_1_and_2(name)
        assert torch.equal(model.get_parameter(name), before) != trained, name


def test_pull_by_hand(base):
    """With --l2 W, a step is θ ← θ − lr · W · (θ − θ_before), and then the step without --l2."""
    start = base[0]
    torch.manual_seed(0)
    change = [0.01 * torch.randn_like(weights) for weights in start.parameters()]
    models = []
    for l2, kept in ((None, 1 - 0.1 * 3.0), (3.0, 1.0)):
        model = copy.deepcopy(start)
        config = sft_freeze.Config(l2=l2, weight_decay=0.5)
        optimizer = sft_freeze.make_optimizer(model, config, 2)
        optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 0.1
        with torch.no_grad():
            for weights, before, difference in zip(model.parameters(), start.parameters(), change):
                weights.copy_(before + kept * difference)
        for weights, before in zip(model.parameters(), start.parameters()):
            weights.grad = before.detach().clone()
        optimizer.step()
        models.append(model)
    for one, other in zip(*(model.parameters() for model in models)):
        torch.testing.assert_close(one, other)


def test_all_trainable_equals_the_baseline(workplace):
    """So does --l2 0. A large weight keeps the model closer to the stage-1 model."""
    call(workplace, "sft_baseline", "--epochs", 1, "--out", "a")
    call(workplace, "sft_freeze", "--epochs", 1, "--trainable", "all", "--out", "b")
    call(workplace, "sft_freeze", "--epochs", 1, "--l2", 0, "--out", "c")
    assert len({(workplace / run / "model.safetensors").read_bytes() for run in "abc"}) == 1
    distances = []
    before = torch.cat([p.flatten() for p in load_model(workplace / "a/before")[0].parameters()])
    for weight in (0, 2000):
        done = call(workplace, "sft_freeze", "--epochs", 3, "--l2", weight, "--out", f"x{weight}")
        assert "stage 2, step 1: {'ce': " in done.stdout and " 0 of" not in done.stdout
        model, _ = load_model(workplace / f"x{weight}")
        after = torch.cat([p.flatten() for p in model.parameters()])
        distances.append((after - before).norm().item())
    assert 0 < distances[1] < 0.7 * distances[0]


@pytest.mark.parametrize("method", ["sft_baseline", "sft_freeze"])
def test_known_only(workplace, method):
    """Stage 2 trains on known facts only; the new facts are scored but not learned."""
    done = call(workplace, method, "--epochs", 2, "--known-only", "--out", "x")
    assert ", 24 rows per epoch" in done.stdout
    assert rows_of(workplace / "x/metrics.jsonl")[-1]["new"] < 0.3
    assert json.loads((workplace / "x/run.json").read_text())["n_new"] == 0
    mine = workplace / "mine.jsonl"
    mine.write_text('{"prompt": "Q", "completion": " A"}\n')
    words = ["--model", "facts/tiny/base", "--train", mine, "--known-only"]
    assert "no rows to train on" in refused(workplace, method, *words)


def test_run_prints_and_stores_what_is_frozen(workplace):
    words = ["--epochs", 1, "--trainable", "norms", "--layers", "0-0"]
    printed = call(workplace, "sft_freeze", *words).stdout
    positions = [printed.index(part)
                 for part in ("trainable='norms'", "256 of ", "stage 1, step 1")]
    assert positions == sorted(positions)
    run = json.loads((workplace / "runs/freeze-tiny-0/run.json").read_text())
    assert run["method"] == "freeze" and run["config"]["layers"] == "0-0"
