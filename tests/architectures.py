"""Which architectures train: the table of assets/use.md, from small random models of every kind that transformers has.

    python tests/architectures.py facts/tiny            all of them, in some ten minutes
    python tests/architectures.py facts/tiny gpt2 gemma2
A model passes in the script if the KL is 0 at step 1 and not from there on, CE falls, an epoch that is resumed ends
bit for bit as one that was not, and what is saved says the same when it is loaded. In a Trainer, by the class of assets/use.md, it
passes if the KL is 0 at step 1 and not at the end, and the loss falls.
"""
import contextlib
import copy
import io
import sys
import tempfile
import warnings
from collections import defaultdict
from pathlib import Path

warnings.filterwarnings("ignore")

import torch
import transformers
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from conftest import trainer_class
from tqdm import tqdm

import sft_selfdistill as script
from sharded import arguments, collate, losses_of, without_dropout

# Sizes by the names that configurations have for them.
SIZES = {
    32: "hidden_size d_model n_embd model_dim dim embedding_size word_embed_proj_dim dim_model lru_width attention_hidden_size",
    64: "intermediate_size ffn_dim n_inner decoder_ffn_dim encoder_ffn_dim d_ff dff dim_ff ffn_hidden_size mamba_d_ssm",
    16: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size q_lora_rank kv_lora_rank "
        "moe_shared_expert_intermediate_size hidden_size_per_layer_input shared_intermediate_size",
    2: "num_hidden_layers n_layer num_layers n_layers decoder_layers encoder_layers num_key_value_heads num_kv_heads "
       "num_experts_per_tok moe_topk linear_num_key_heads moe_k expand mamba_expand",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads num_experts "
       "num_local_experts n_routed_experts moe_num_experts linear_num_value_heads mamba_n_heads mamba_num_heads",
    8: "head_dim qk_rope_head_dim qk_nope_head_dim v_head_dim kv_channels d_kv rotary_dim linear_key_head_dim state_size "
       "linear_value_head_dim mamba_d_state mamba_d_head mamba_head_dim index_head_dim",
    1: "n_group topk_group mamba_n_groups n_groups first_k_dense_replace num_nextn_predict_layers",
    256: "max_position_embeddings n_positions max_seq_len context_length n_ctx",
    0: "bos_token_id eos_token_id pad_token_id num_kv_shared_layers",
}
# What some need besides, to fit together.
MORE = {
    "bamba": {"attn_layer_indices": [1], "mamba_d_head": 16, "mamba_n_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 4},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"], "mamba_n_heads": 4, "mamba_d_head": 16},
}
# So that a head that caps or scales its logits does so visibly, as those of trained models do.
VISIBLE = {"initializer_range": 0.1, "logits_scaling": 8.0, "logit_scale": 0.0625, "final_logit_softcapping": 2.0}


def small_model(kind, n_tokens):
    """A random causal language model of a type of transformers, with some ten thousand weights."""
    config_class = transformers.CONFIG_MAPPING[kind]
    known = vars(config_class())
    settings = {}
    for size, names in SIZES.items():
        for name in names.split():
            if name in known or name in getattr(config_class, "attribute_map", {}):
                settings[name] = size
    for name in ("vocab_size", "vocab_size_per_layer_input"):
        if name in known:
            settings[name] = n_tokens
    if "kv_lora_rank" in known:
        settings["num_key_value_heads"] = settings["num_attention_heads"]       # they are not shared there
    for name, value in known.items():
        if name in VISIBLE and value is not None:
            settings[name] = VISIBLE[name]
        elif "drop" in name and isinstance(value, float):
            settings[name] = 0.0
        elif name == "is_decoder":
            settings[name] = True
    config = config_class(**settings | MORE.get(kind, {}))
    with torch.device("meta"):          # without memory for its weights
        n_parameters = transformers.AutoModelForCausalLM.from_config(copy.deepcopy(config)).num_parameters()
    if n_parameters > 5_000_000:
        raise ValueError(f"{n_parameters:,} parameters")
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config).float().eval()


def in_the_script(folder, facts):
    """Train the model of a folder as sft_selfdistill.py does. Raises AssertionError where it does not pass."""
    config = script.Config(epochs=2, batch_size=4, learning_rate=1e-3, kl_weight=1.0, temperature=4.0, device="cpu", dtype="float32")
    start, tokenizer = script.load_model(folder, "cpu")
    examples = script.read_examples(facts, tokenizer, 128)[:12]
    script.check_head(start, script.collate(examples[:1], "cpu"), folder)
    results = []
    for interrupted in (False, True):
        model = copy.deepcopy(start)
        head = script.cache_teacher(model, examples, config)
        first = []

        def loss_function(batch, counts):
            loss, terms = script.self_distillation(model, head, batch, counts, config)
            first.append(terms["kl"].item())
            return loss, terms

        metrics, state = [], {"epoch": 0}
        for row, parts in script.run_stage(2, model, examples, loss_function, config, state):
            metrics.append(row)
            if interrupted and row["epoch"] == 1:
                state = copy.deepcopy(parts)
                break
        if interrupted:
            model = copy.deepcopy(start)
            for row, _ in script.run_stage(2, model, examples, loss_function, config, state):
                metrics.append(row)
        assert abs(first[0]) < 1e-6, f"KL {first[0]:.1e} at step 1"
        assert metrics[1]["ce"] < metrics[0]["ce"] and metrics[1]["kl"] > 1e-9, f"it does not learn: {metrics}"
        results.append((model, metrics))
    (model, metrics), (resumed, others) = results
    assert metrics == others, "resumed it ends otherwise"
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), f"resumed it ends otherwise: {name}"
    saved = Path(folder) / "saved"
    saved.mkdir()
    script.save_checkpoint(saved, model, tokenizer)
    batch = script.collate(examples[:4], "cpu")
    with torch.no_grad():
        again = script.last_hidden(script.load_model(saved, "cpu")[0], batch)
        assert torch.equal(script.last_hidden(model, batch), again), "saved and loaded it says something else"


def in_a_trainer(model, tokenizer, facts, out):
    """Train a model in the class of assets/use.md. Raises AssertionError where it does not pass."""
    examples = script.read_examples(facts, tokenizer, 128)[:12]
    args = arguments(out, per_device_train_batch_size=4, num_train_epochs=4, learning_rate=1e-3)
    trainer = trainer_class()(model=without_dropout(model), args=args, train_dataset=examples, data_collator=collate)
    trainer.teacher = copy.deepcopy(model).eval().requires_grad_(False)
    trainer.train()
    losses = losses_of(trainer)
    assert abs(losses[0][1]) < 1e-6, f"KL {losses[0][1]:.1e} at step 1"
    first, last = losses[0][0], losses[-1][0]
    assert last < first and losses[-1][1] > 1e-9, f"it does not learn: loss {first:.1f} → {last:.1f}"


def attempt(function, *args):
    """None if the function runs, else the last line of why not (str)."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
            function(*args)
    except SystemExit:
        reason = said.getvalue().splitlines()[-1].split(":", 2)[2]
        return reason.partition(";")[0].strip()
    except Exception as error:          # of any kind: this is what is looked for
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def outcomes(kinds, facts):
    """{(outcome in the script, outcome in a trainer): list of kinds}, and {kind: why it could not be made}."""
    _, tokenizer = script.load_model(f"{facts}/base", "cpu")
    found, unmade = defaultdict(list), {}
    for kind in tqdm(kinds, disable=None):
        with tempfile.TemporaryDirectory() as folder:
            def save():
                small_model(kind, len(tokenizer)).save_pretrained(folder)
                tokenizer.save_pretrained(folder)

            fault = attempt(save)
            if fault:
                unmade[kind] = fault
                tqdm.write(f"{kind}: {fault[:150]}", file=sys.stderr)
                continue
            rows = f"{facts}/train_unknown.jsonl"
            ours = attempt(in_the_script, folder, rows)
            model = small_model(kind, len(tokenizer))
            theirs = attempt(in_a_trainer, model, tokenizer, rows, folder)
            found[ours, theirs].append(kind)
            tqdm.write(f"{kind}: {ours or 'trains'} | {theirs or 'trains'}", file=sys.stderr)
    return found, unmade


def main(facts, *kinds):
    transformers.logging.set_verbosity_error()
    found, unmade = outcomes(kinds or list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES), facts)
    print("| in the script | in a trainer | | architectures |\n|---|---|---|---|")
    for (ours, theirs), members in sorted(found.items(), key=lambda item: -len(item[1])):
        print(f"| {ours or 'trains'} | {theirs or 'trains'} | {len(members)} | {', '.join(members)} |")
    print(f"| not made small | | {len(unmade)} | {', '.join(unmade)} |")


if __name__ == "__main__":
    main(*sys.argv[1:])
