"""``python -m tests.families [TYPE …]``: which types of transformers train as plain transformers and PEFT would.

Of each a tiny random model with its features on (a small window, biases, caps, scales): one step of the module on a
packed batch beside plain PEFT a row at a time, in float32; answers; the adapter folder; merged weights; a step in NF4.
At the end it prints the types for ``qlora_lightning/model/model_types.py``.
"""

import dataclasses
import itertools
import multiprocessing
import sys
import tempfile
import warnings
from pathlib import Path

import bitsandbytes as bnb
import peft
import torch
import torch.nn.functional as F
import transformers
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, AutoModelForMultimodalLM
from transformers.models.auto.configuration_auto import model_type_to_module_name
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.pytorch_utils import Conv1D

from qlora_lightning import UserError
from qlora_lightning.model import model_types
from qlora_lightning.model.layers.experts import ADAPTS_EXPERTS, experts_of
from qlora_lightning.model.layers.lora import dequantize
from qlora_lightning.model.merge import Merge
from qlora_lightning.model.step.loss import lm_head_of
from tests.steps import distance, loss_and_gradients, make_batch, make_module, trainable_tensors

WRAPPERS = ("gemma3", "gemma4", "mistral3", "qwen3_5", "qwen3_5_moe", "internvl", "llava", "idefics3")
LENGTHS = (23, 1, 12, 6)  # some longer than the sliding window, some not
WINDOW = 8
_AGREES = {"tokens": 2e-5, "gradients": 1e-4, "nf4 gradients": 1e-4}  # of float32; of what else, the first
_SECONDS = 60

# ---- a tiny random model of any type ---------------------------------------------------------------------------------

SIZES = {
    name: value
    for value, names in (
        (256, "vocab_size max_position_embeddings n_positions max_seq_len vocab_size_per_layer_input"),
        (256, "unpadded_vocab_size"),
        (64, "hidden_size n_embd d_model embedding_size word_embed_proj_dim hidden_size_per_layer_input"),
        (64, "q_lora_rank kv_lora_rank"),
        (128, "intermediate_size ffn_dim n_inner ffn_hidden_size"),
        (4, "num_hidden_layers num_layers n_layer n_layers num_attention_heads n_head n_heads num_heads"),
        (4, "attention_heads num_experts num_local_experts n_routed_experts moe_num_experts linear_num_value_heads"),
        (2, "num_key_value_heads num_experts_per_tok moe_topk moe_k eos_token_id linear_num_key_heads n_groups"),
        (2, "num_kv_heads mamba_n_groups top_k_experts"),
        (16, "head_dim v_head_dim qk_nope_head_dim linear_key_head_dim rotary_dim"),
        (16, "linear_value_head_dim mamba_d_state state_size global_head_dim"),
        (16, "mamba_d_head mamba_head_dim mamba_headdim"),
        (WINDOW, "sliding_window attention_chunk_size qk_rope_head_dim attention_window_size mamba_chunk_size"),
        (WINDOW, "chunk_size mamba_n_heads n_mamba_heads"),
        (64, "moe_intermediate_size shared_expert_intermediate_size shared_intermediate_size"),
        (0, "pad_token_id num_kv_shared_layers"),
        (1, "n_group topk_group first_k_dense_replace bos_token_id n_shared_experts num_shared_experts"),
        (1, "num_dense_layers max_window_layers"),
        (0.0, "attention_dropout resid_pdrop embd_pdrop attn_pdrop dropout hidden_dropout activation_dropout"),
        (0.0, "residual_dropout layerdrop hidden_dropout_prob attention_probs_dropout_prob"),
        (True, "enable_moe_block attention_bias mlp_bias use_sliding_window use_qk_norm qk_layernorm bias"),
        (True, "conv_bias use_bias use_conv_bias mamba_conv_bias mamba_proj_bias"),
        (2.0, "attn_logit_softcapping embedding_multiplier"),
        (0.5, "partial_rotary_factor clip_qkv lm_head_multiplier key_multiplier attention_out_multiplier"),
        (3.0, "final_logit_softcapping logits_scaling"),
        (0.7, "residual_multiplier logit_scale attention_in_multiplier ssm_in_multiplier ssm_out_multiplier"),
        (0.3, "attention_multiplier"),
    )
    for name in names.split()
}
_CONVOLUTIONS = {"layer_types": ["conv", "full_attention"] * 2}
_LOCAL = {"attention_types": [[["global", "local"], 2]], "attention_layers": ["global", "local"] * 2}
SETTINGS = {  # None: the config's own default
    "bailing_hybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "bamba": {"attn_layer_indices": [1, 3]},
    "falcon": {"alibi": True},
    "falcon_h1": {"mamba_d_ssm": 64, "mamba_d_head": 8},
    "gpt_neo": _LOCAL,
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2, "sliding_window": None},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": _CONVOLUTIONS,
    "lfm2_moe": _CONVOLUTIONS,
    "lfm3": _CONVOLUTIONS,
    "mamba2": {"num_heads": 8},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "linear_attention"]},
    "minimax": {"layer_types": None, "sliding_window": None},
    "smollm3": {"no_rope_layers": [0, 1, 1, 0], "layer_types": ["full_attention"] * 4, "sliding_window": None},
    "zaya": {"layer_types": None, "num_experts_per_tok": 1},
}
_SEEDS = {"ctrl": 1, "gemma4_text": 1}  # by 0 a ReLU's input may round to 0, and states are large
# No tiny config is known of these, or it takes minutes (kimi_linear) or narrow linears (axk2), or they are rejected.
_UNKNOWN_MIXTURES = (
    *("axk2", "deepseek_v4", "dots3_note", "gemma4", "kimi_linear", "laguna", "phimoe", "qwen3_5_moe", "qwen4_exp"),
    *("qwen4_exp_text", "ergo", "kolibri1_1", "longcat_flash"),  # the last three are mixtures from 5.25 on
)


def mixtures():
    """The types of transformers whose experts are marked, so that a function of ours can compute them."""
    types = []
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.keys() - {*_UNKNOWN_MIXTURES}:
        folder = Path(transformers.__file__).parent / "models" / model_type_to_module_name(model_type)
        if any("@use_experts_implementation" in file.read_text() for file in folder.glob("modeling_*.py")):
            types.append(model_type)
    return types


def make_config(model_type, **settings):
    """A small config of a type, with what it knows switched on."""
    kind = CONFIG_MAPPING[model_type]
    fields = {field.name for field in dataclasses.fields(kind)}
    if any(name.endswith("text_config") for name in fields):
        raise ValueError("composite: its text part is a type of its own")
    sizes = {name: value for name, value in SIZES.items() if name in fields}
    if {"layer_types", "sliding_window"} <= fields and model_type != "mistral":
        sizes["layer_types"] = ["sliding_attention", "full_attention"] * 2
    if model_type == "llama":  # which has none
        sizes.pop("sliding_window", None)
    if "qk_nope_head_dim" in fields:
        sizes["num_key_value_heads"] = 4
    sizes |= SETTINGS.get(model_type, {}) | settings
    if "vocab_size_per_layer_input" in sizes:
        sizes["vocab_size_per_layer_input"] = sizes["vocab_size"]
    return kind(**{name: value for name, value in sizes.items() if value is not None})


def save_random(folder, model_type, seed=0, **settings):
    """Write a random checkpoint, in which norms and biases count too, and scores are far from even."""
    return _save(AutoModelForCausalLM, make_config(model_type, **settings), folder, seed)


def save_wrapper(folder, model_type, **settings):
    """Write a random checkpoint of a type that reads more than text, as the hub has it."""
    kind, default = CONFIG_MAPPING[model_type], CONFIG_MAPPING[model_type]()
    sizes = dict.fromkeys(("num_hidden_layers", "depth"), 1) | dict.fromkeys(("head_dim", "global_head_dim"), 16)
    sizes |= dict.fromkeys(("num_attention_heads", "num_heads", "num_key_value_heads"), 2)
    sizes |= {"hidden_size": 32, "intermediate_size": 64, "out_hidden_size": 64}
    configs, text = {}, default.get_text_config(decoder=True)
    for field in dataclasses.fields(kind):
        part = getattr(default, field.name)
        if part is text:
            caps = {"final_logit_softcapping": None} if model_type == "gemma3" else {}  # which the whole one has not
            configs[field.name] = make_config(text.model_type, **caps, **settings).to_dict()
        elif isinstance(part, transformers.PreTrainedConfig):
            known = part.to_dict().keys() & sizes.keys()
            configs[field.name] = {"model_type": part.model_type, **{name: sizes[name] for name in known}}
    return _save(AutoModelForMultimodalLM, kind(**configs), folder)


def _save(auto_class, config, folder, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = auto_class.from_config(config, dtype=torch.float32)
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1 and not any(part in name for part in ("A_log", "dt", ".D", "time_", "rg_lru")):
                parameter.data.add_(torch.randn_like(parameter), alpha=0.3)
            elif parameter.dim() > 1 and "embed" not in name and "wte" not in name:
                parameter.data.mul_(4)
    model.save_pretrained(folder)
    return folder


# ---- beside plain transformers and PEFT ------------------------------------------------------------------------------


def plain_model(folder, adapter, quantized=None, auto_class=AutoModelForCausalLM):
    """The base with an adapter, by transformers and PEFT alone; with the weights of a quantized one, dequantized."""
    base = auto_class.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    for name, module in [] if quantized is None else quantized.named_modules():
        if isinstance(module, bnb.nn.Linear4bit):
            owner = name.replace(".base_layer", "")
            weight = dequantize(module.weight.data, module.weight.quant_state)
            target = base.get_parameter(owner.replace("packed_", "") if "packed_" in owner else f"{owner}.weight")
            is_transposed = "packed_" not in owner and isinstance(base.get_submodule(owner), Conv1D)
            target.data.copy_(weight.t() if is_transposed else weight)
    with warnings.catch_warnings(action="ignore"):
        return peft.PeftModel.from_pretrained(base, adapter, is_trainable=True).eval()


def rows_of(batch):
    return [batch["input_ids"][:, start:end] for start, end in itertools.pairwise(batch["cu_seqlens"].tolist())]


def plain_step(model, batch):
    """Compute the mean loss of rows that come alone, and its gradients."""
    loss, rows = 0.0, rows_of(batch)
    for ids in rows:
        logits = model(input_ids=ids, use_cache=False).logits[0, :-1]
        loss = loss + F.cross_entropy(logits, ids[0, 1:], reduction="sum")
    options = {"allow_unused": True, "materialize_grads": True}  # a bart's attention to an encoder, which is not there
    gradients = torch.autograd.grad(loss, list(trainable_tensors(model).values()), **options)
    labelled = sum(ids.shape[1] - 1 for ids in rows)
    return float(loss.detach() / labelled), torch.cat([each.flatten() for each in gradients])


@torch.no_grad()
def error_of_tokens(module, plain, batch):
    """The largest error of a token's logits, relative to it."""
    hidden, _ = module.last_states(batch)
    found = lm_head_of(module.causal_lm)(hidden)
    exact = torch.cat([plain(input_ids=ids, use_cache=False).logits[0, :-1] for ids in rows_of(batch)])
    return float(((found - exact).norm(dim=-1) / exact.norm(dim=-1)).max())


@torch.no_grad()
def answers_differ(module, plain):
    """How many greedy answers are not the plain model's."""
    prompts = [list(range(5, 5 + length)) for length in (3, 20, 7)]
    wrong = 0
    for prompt, answer in zip(prompts, module.answer(prompts, [], max_new_tokens=12), strict=True):
        logits = plain(input_ids=torch.tensor([[*prompt, *answer]]), use_cache=False).logits[0]
        wrong += logits[len(prompt) - 1 : -1].argmax(-1).tolist() != answer
    return wrong


@torch.no_grad()
def error_of_merge(folder, adapter, plain):
    """The largest error of a merged tensor, relative to it, beside PEFT's merge."""
    weights = {name: each.detach() for name, each in AutoModelForCausalLM.from_pretrained(folder).named_parameters()}
    plan, exact = Merge(folder, adapter), plain.merge_and_unload().state_dict()
    merged = {name: plan.merge(name, weights[name]) for name in plan.shapes}
    return max(distance(merged[name], exact[name]) if exact[name].any() else 0.0 for name in merged)


@torch.no_grad()
def is_causal(model):
    ids = torch.randint(5, 250, (1, 20), generator=torch.Generator().manual_seed(3))
    whole, part = (model(input_ids=each, use_cache=False).logits[0, :9] for each in (ids, ids[:, :9]))
    return distance(whole, part) < 1e-4


def study(model_type):
    """Return what differs from plain transformers and PEFT, by name, and whether rows ran in packed batches."""
    batch = make_batch(LENGTHS)
    with tempfile.TemporaryDirectory() as made:
        folder, adapter = Path(made) / "base", Path(made) / "adapter"
        save_random(folder, model_type, _SEEDS.get(model_type, 0))
        module = make_module(folder, quantization="none")
        module.save_adapter(adapter)
        plain = plain_model(folder, adapter)
        found = {"causal": "" if is_causal(plain) else "no", "tokens": error_of_tokens(module, plain, batch)}
        expected, step = plain_step(plain, batch), loss_and_gradients(module, batch)
        found |= {"loss": abs(step[0] / expected[0] - 1), "gradients": distance(step[1], expected[1])}
        found |= {"answers": answers_differ(module, plain), "merge": error_of_merge(folder, adapter, plain)}
        try:
            target_experts = bool(experts_of(module.causal_lm)) and ADAPTS_EXPERTS
            packed = make_module(folder, quantization="nf4", cache=False, target_experts=target_experts)
            packed.save_adapter(adapter)
            plain = plain_model(folder, adapter, packed.causal_lm)
            expected, step = plain_step(plain, batch), loss_and_gradients(packed, batch)
            found |= {"nf4 tokens": error_of_tokens(packed, plain, batch), "nf4 loss": abs(step[0] / expected[0] - 1)}
            found["nf4 gradients"] = distance(step[1], expected[1])
            names = [[*trainable_tensors(each)] for each in (packed.model, plain)]
            found["names"] = "" if names[0] == names[1] else "differ"
        except UserError as error:
            found["nf4"] = "" if "are fused experts" in str(error) else str(error)
        return found


def differs(found):
    return [name for name, each in found.items() if each and (isinstance(each, str) or each > _AGREES.get(name, 2e-5))]


def attempt(model_type, flat):
    """Study a type in a process of its own, which what hangs ends with."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        try:
            return pool.apply_async(_study_quietly, (model_type, flat)).get(_SECONDS)
        except multiprocessing.TimeoutError:
            return {"failed": f"not done in {_SECONDS} seconds"}


def _study_quietly(model_type, flat):
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    others = tuple(each for each in model_types.PACKED_TYPES if each != model_type)
    model_types.PACKED_TYPES, model_types.REJECTED_TYPES = (*others, model_type) if flat else others, {}
    try:
        return study(model_type)
    except Exception as error:  # as text: not every error can be sent to another process
        return {"failed": f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0][:110]}"}


def main():
    proven = {"flat": [], "a row at a time": [], "not causal": [], "neither": []}
    for model_type in sys.argv[1:] or MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        for way, flat in (("flat", True), ("a row at a time", False)):
            found = attempt(model_type, flat)
            cells = (
                f"{name} {each:.1e}" if isinstance(each, float) else f"{name} {each}" for name, each in found.items()
            )
            print(model_type, way, ", ".join(differs(found)) or "agrees", *cells, sep=" | ", flush=True)
            if not differs(found):
                break
        else:
            way = "not causal" if found.get("causal") else "neither"
        proven[way].append(model_type)
    for way, types in proven.items():
        print(f"\n{len(types)} {way}:", ", ".join(f'"{each}"' for each in types))


if __name__ == "__main__":
    main()
