# SPDX-License-Identifier: Apache-2.0
"""Corrects or adds the class name in config.json that a trainer has changed or left out.

FSDP2 prefixes the name of the class that it wraps, and some trainers write no `architectures`, because transformers'
Auto classes use `model_type`. Engines use `architectures`, which is therefore completed when a source is converted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

# The class for text generation of each model_type, if there is one, as in transformers' AutoModelForCausalLM.
FOR_GENERATION = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "mixtral": "MixtralForCausalLM",
    "ministral": "MinistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen2_moe": "Qwen2MoeForCausalLM",
    "qwen3": "Qwen3ForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "qwen3_next": "Qwen3NextForCausalLM",
    "gemma": "GemmaForCausalLM", "gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM",
    "phi": "PhiForCausalLM", "phi3": "Phi3ForCausalLM", "gpt2": "GPT2LMHeadModel", "gptj": "GPTJForCausalLM",
    "gpt_neo": "GPTNeoForCausalLM", "gpt_neox": "GPTNeoXForCausalLM", "gpt_bigcode": "GPTBigCodeForCausalLM",
    "gpt_oss": "GptOssForCausalLM", "opt": "OPTForCausalLM", "bloom": "BloomForCausalLM",
    "falcon": "FalconForCausalLM", "mpt": "MptForCausalLM", "stablelm": "StableLmForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM", "olmo": "OlmoForCausalLM", "olmo2": "Olmo2ForCausalLM",
    "olmo3": "Olmo3ForCausalLM", "olmoe": "OlmoeForCausalLM", "granite": "GraniteForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM", "cohere": "CohereForCausalLM", "cohere2": "Cohere2ForCausalLM",
    "smollm3": "SmolLM3ForCausalLM", "exaone4": "Exaone4ForCausalLM", "ernie4_5": "Ernie4_5ForCausalLM",
    "glm": "GlmForCausalLM", "glm4": "Glm4ForCausalLM", "glm4_moe": "Glm4MoeForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM", "deepseek_v3": "DeepseekV3ForCausalLM", "mamba": "MambaForCausalLM",
    "mamba2": "Mamba2ForCausalLM", "seed_oss": "SeedOssForCausalLM", "nemotron": "NemotronForCausalLM",
    "t5": "T5ForConditionalGeneration", "mt5": "MT5ForConditionalGeneration", "bart": "BartForConditionalGeneration",
}  # fmt: skip
_WRAPPER = "FSDP"
# Weights of classes for other purposes than generation.
_OTHER_HEADS = ("score.", "classifier.", "qa_outputs.", "v_head.")
EMBEDS = "modules.json"  # in folders of sentence-transformers


def completed(config: Mapping[str, object], tensors: Collection[str], side_files: Collection[str]) -> dict[str, object]:
    """Returns the configuration with the right class name, if that can be determined."""
    names = config.get("architectures")
    if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
        return {**config, "architectures": [_unwrapped(name) for name in names]}
    kind = config.get("model_type")
    known = FOR_GENERATION.get(kind) if isinstance(kind, str) else None
    embeds = EMBEDS in side_files or any(name.startswith(_OTHER_HEADS) for name in tensors)
    if names or known is None or embeds:
        return dict(config)
    return {**config, "architectures": [known]}


def _unwrapped(name: str) -> str:
    plain = name.removeprefix(_WRAPPER)
    return plain if plain[:1].isupper() else name
