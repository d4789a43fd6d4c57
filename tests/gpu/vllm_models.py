# SPDX-License-Identifier: Apache-2.0
"""Models for vLLM on GPUs, and its own answers: as a program it prints the token ids of greedy answers."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import transformers  # each class is imported when it is used

KV_BYTES = 256 << 20
TOUR = Path(__file__).parents[2] / "packaging" / "tour"
MAKE = """
import sys, pathlib, small_models
folder = pathlib.Path(sys.argv[1])
small_models.make_base(folder / "ada")
small_models.make_finetune(folder / "ada", folder / "bob")
"""
# The share of the card only says how much must be free, as long as the KV cache has a size.
OPTIONS = {"max_model_len": 256, "kv_cache_memory_bytes": KV_BYTES, "gpu_memory_utilization": 0.1, "seed": 0}
PROMPTS = ["Hello, who are you?", "I am", "I am Ada, the first model you dropped into the folder. " * 12]


def settings_with(*arguments: str) -> str:
    """Of a daemon whose engines are vLLM, told the same as the plain one, and this."""
    told = ["--seed", "0", "--max-model-len", "256", *arguments]
    return f"""
[engines]
default = "vllm"

[engines.vllm]
python = "{sys.executable}"
kv_cache = "{KV_BYTES >> 20}MiB"
arguments = {json.dumps(told)}
"""


def make_sources(folder: Path) -> Path:
    """A small model and a fine-tune of it: ada and bob."""
    environment = {**os.environ, "PYTHONPATH": f"{TOUR}:{os.environ.get('PYTHONPATH', '')}"}
    subprocess.run([sys.executable, "-c", MAKE, folder], env=environment, check=True, capture_output=True)
    return folder


def make_large(source: Path, folder: Path) -> Path:
    """A random model of 1.2 GB, which shows in a card's memory, with the tokenizer of a small one."""
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix in {".json", ".jinja"} and "index" not in file.name:
            shutil.copy(file, folder / file.name)
    config = json.loads((source / "config.json").read_text())
    shape = {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 12, "head_dim": 128}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8}
    layers = {"layer_types": ["full_attention"] * 12, "max_window_layers": 12}
    config |= shape | heads | {name: value for name, value in layers.items() if name in config}
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.from_pretrained(folder), dtype=torch.bfloat16
    )
    model.save_pretrained(folder)
    return folder


def make_seeing(source: Path, folder: Path) -> Path:
    """Two random models that look at pictures, `one` and `other`: they differ in what they make of what they see."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    words = {word: f"<|{word}|>" for word in ("vision_start", "vision_end", "image_pad", "video_pad")}
    tokenizer.add_special_tokens({"additional_special_tokens": [*words.values()]})
    token = {word: tokenizer.convert_tokens_to_ids(text) for word, text in words.items()}
    text = {
        "vocab_size": -(-len(tokenizer) // 64) * 64, "hidden_size": 256, "intermediate_size": 512,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 512,
        "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 10000.0},
        "bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
    }  # fmt: skip
    config = transformers.Qwen2VLConfig(
        text_config=text, vision_config={"depth": 2, "embed_dim": 128, "num_heads": 2, "hidden_size": 256},
        vision_start_token_id=token["vision_start"], vision_end_token_id=token["vision_end"],
        image_token_id=token["image_pad"], video_token_id=token["video_pad"],
    )  # fmt: skip
    pixels = {"shortest_edge": 56 * 56, "longest_edge": 56 * 56}
    processor = transformers.Qwen2VLProcessor(
        transformers.Qwen2VLImageProcessor(size=pixels), tokenizer, transformers.Qwen2VLVideoProcessor(size=pixels),
        chat_template=tokenizer.chat_template,
    )  # fmt: skip
    torch.manual_seed(3)
    model = transformers.Qwen2VLForConditionalGeneration(config).to(torch.bfloat16)
    for name in ("one", "other"):
        model.save_pretrained(folder / name)
        processor.save_pretrained(folder / name)
        with torch.no_grad():
            for part, weight in model.named_parameters():
                if "merger" in part:
                    weight.copy_(torch.randn_like(weight))
    return folder


def answers_of_plain_vllm(models: Sequence[Path], **arguments: Any) -> dict[str, list[list[int]]]:
    """By model's name. One process a model, at once: vLLM gives its memory back only when it ends."""

    def answers(model: Path) -> list[list[int]]:
        done = subprocess.run(
            [sys.executable, __file__, json.dumps({"model": str(model), **OPTIONS, **arguments})],
            capture_output=True, text=True, check=False, timeout=400,
        )  # fmt: skip
        lines = [line for line in done.stdout.splitlines() if line.startswith("ANSWERS ")]
        assert lines, done.stderr[-4000:]
        found: list[list[int]] = json.loads(lines[0].removeprefix("ANSWERS "))
        return found

    with ThreadPoolExecutor() as pool:
        return dict(zip([model.name for model in models], pool.map(answers, models), strict=True))


@contextlib.contextmanager
def staying(model: Path, **arguments: Any) -> Iterator[list[list[int]]]:
    """The same answers of a vLLM that keeps running until the context ends."""
    options = {"model": str(model), "stays": True, **OPTIONS, **arguments}
    with subprocess.Popen(
        [sys.executable, __file__, json.dumps(options)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdin is not None
        try:
            line = next(line for line in process.stdout if line.startswith("ANSWERS "))
            yield json.loads(line.removeprefix("ANSWERS "))
        finally:
            process.stdin.close()
            process.stdout.read()


def main() -> None:
    from vllm import LLM, SamplingParams

    options = json.loads(sys.argv[1])
    stays = options.pop("stays", False)
    llm = LLM(max_num_seqs=32, **options)
    greedy = SamplingParams(temperature=0, max_tokens=16, seed=0)
    found = [list(answer.outputs[0].token_ids) for answer in llm.generate(PROMPTS, greedy, use_tqdm=False)]
    print("ANSWERS " + json.dumps(found), flush=True)
    if stays:
        sys.stdin.read()


if __name__ == "__main__":
    main()
