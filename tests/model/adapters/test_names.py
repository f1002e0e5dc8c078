"""The names of an adapter here and in its folder: there, back and there again is one folder, with names as expected."""

import json

import pytest

from qlora_lightning.model.layers.experts import ADAPTS_EXPERTS
from tests import families
from tests.steps import make_module

LAYER, WHOLE = "model.layers.0", "model.language_model.layers.0"
PATTERNS = {"alpha_pattern": {r"layers\.0\.self_attn\.v_proj": 64}, "rank_pattern": {"down_proj": 2}}
IN_WRAPPER = {**PATTERNS, "modules_to_save": ["model.norm"]}
IN_WRAPPER |= {"trainable_token_indices": {"model.embed_tokens": [5, 6]}}
WITH_EXPERTS = {"rank_pattern": {"experts.down_proj": 3, "gate_proj": 2}, "alpha_pattern": {"down_proj": 30}}
BESIDE, EXPERTS = "model.layers.1.mlp.shared_experts.down_proj", "model.layers.1.mlp.experts.down_proj"
CASES = {  # of the table in names.py: the base, its settings, and entries of the folder's config
    "as they are": ("llama", {"lora_options": PATTERNS}, PATTERNS),
    "the text of a whole model": (
        "gemma3",
        {"lora_options": IN_WRAPPER},
        {
            "target_modules": f"{WHOLE}.self_attn.v_proj",
            "alpha_pattern": {f"{WHOLE}.self_attn.v_proj": 64},
            "rank_pattern": f"{WHOLE}.mlp.down_proj",
            "modules_to_save": ["model.language_model.norm"],
            "trainable_token_indices": {"model.language_model.embed_tokens": [5, 6]},
        },
    ),
    "a linear that PEFT takes for that of an expert": (
        "glm4_moe",
        {"target_experts": True, "lora_options": WITH_EXPERTS},
        {
            "target_modules": "model.layers.0.self_attn.q_proj",
            "target_parameters": f"{BESIDE}.weight",
            "rank_pattern": EXPERTS,
            "alpha_pattern": f"{BESIDE}.weight",
        },
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_that_is_opened_and_saved_again_is_the_same_folder(case, tmp_path, cache):
    model_type, options, expected = CASES[case]
    if "target_experts" in options and not ADAPTS_EXPERTS:
        pytest.skip("PEFT before 0.20 opens no adapters of mixtures")
    save = families.save_wrapper if model_type == "gemma3" else families.save_random
    base = save(tmp_path / "base", model_type)
    folders = [tmp_path / name for name in ("there", "there again")]
    make_module(base, **options).save_adapter(folders[0])
    again = make_module(base, adapter=str(folders[0]))
    again.save_adapter(folders[1])
    names = ("adapter_config.json", "adapter_model.safetensors")
    assert all((folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in names)
    config = json.loads((folders[0] / names[0]).read_text())
    for key, value in expected.items():
        assert value in config[key] if isinstance(value, str) else config[key] == value, key
    again.add_adapter("second", folders[0])  # on a model that has one
    again.model.set_adapter("second")
    again.save_adapter(folders[1])
    assert all((folders[0] / name).read_bytes() == (folders[1] / name).read_bytes() for name in names)
