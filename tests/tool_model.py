# SPDX-License-Identifier: Apache-2.0
"""Makes a small model that calls a tool: a fine-tune of the quick start's ada, for tests with clients of other people.

python tests/tool_model.py ADA FOLDER

It learned two turns by heart: to be asked for the weather in Rome, which it answers with a call in the form of Hermes
(`--tool-call-parser hermes`), and what a tool has said, which it tells. Its template leaves out the tools that it is
offered: it knows of one.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import kept
import made_models

QUESTION = "What is the weather in Rome?"
CALLS = ["weather", {"city": "Rome"}]
RESULT = "It rains in Rome."
ANSWER = "It rains in Rome. Take an umbrella."
ARGUMENTS = ("--enable-auto-tool-choice", "--tool-call-parser", "hermes")

_CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + (message['content'] or '') | trim }}"
    "{%- for call in message['tool_calls'] or [] %}"
    "{{- '<tool_call>\\n{\"name\": \"' + call['function']['name'] + '\", \"arguments\": ' }}"
    "{{- call['function']['arguments'] | tojson }}{{- '}\\n</tool_call>' }}"
    "{%- endfor %}"
    "{{- '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
_USER = {"role": "user", "content": QUESTION}
_ASSISTANT = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": CALLS[0], "arguments": CALLS[1]}}],
}
_TURNS: tuple[tuple[list[dict[str, Any]], str], ...] = (
    ([_USER], _CALL),
    ([_USER, _ASSISTANT, {"role": "tool", "content": RESULT}], ANSWER),
)


def make(base: Path, folder: Path, *, steps: int = 80) -> None:
    """Trains the model in `base` further, and saves it as a source folder."""
    import torch  # here, because tests that only name the model need none of it
    from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

    torch.set_num_threads(1)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    tokenizer.chat_template = _TEMPLATE
    model = Qwen3ForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(4)
    texts = [_prompt(tokenizer, messages) + answer + "<|im_end|>" for messages, answer in _TURNS]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    model.train()
    for _ in range(steps):
        model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model = model.to(torch.bfloat16).eval()
    for messages, answer in _TURNS:
        prompt = tokenizer(_prompt(tokenizer, messages), return_tensors="pt", return_token_type_ids=False)
        tokens = model.generate(**prompt, max_new_tokens=120, do_sample=False)
        said = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        assert said == answer, f"it was taught {answer!r} and says {said!r}"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def put(ada: Path) -> Path:
    """The model's folder, made once of the quick start's ada in this folder."""

    def run(folder: Path) -> None:
        subprocess.run([sys.executable, __file__, ada, folder / "tess"], check=True, capture_output=True)

    return kept.folder("tool-model", *made_models.recipe(), Path(__file__), make=run) / "tess"


def _prompt(tokenizer: Any, messages: list[dict[str, Any]]) -> str:
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


if __name__ == "__main__":
    make(Path(sys.argv[1]), Path(sys.argv[2]))
