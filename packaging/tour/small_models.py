# SPDX-License-Identifier: Apache-2.0
"""Makes two small chat models whose answers tell which of them is answering.

A real `Qwen3ForCausalLM` of a few million parameters, a real byte-level BPE tokenizer and a ChatML template, overfit in
seconds to a handful of question-and-answer pairs, and saved by transformers as any fine-tune is. The second is a
fine-tune of the first. Nothing is downloaded, and the seed is fixed, so the answers are known in advance.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from personas import ADA, BOB, Persona
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)


class DidNotLearn(RuntimeError):
    """Raised if a model does not say what it was taught, because the build of torch or the recipe is broken."""


@contextmanager
def _one_thread() -> Iterator[None]:
    """Limits torch to one thread, which also makes sums independent of the number of cores.

    More gain nothing with models of this size, and wait for each other at every step, for minutes if another program
    uses the cores.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@_one_thread()
def make_base(folder: Path, persona: Persona = ADA, *, hidden: int = 256, layers: int = 4) -> None:
    """Trains a model from scratch and saves it as a source folder of bf16 safetensors."""
    tokenizer = _tokenizer([ADA, BOB])
    torch.manual_seed(1)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer),
            hidden_size=hidden,
            intermediate_size=3 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=hidden // 32,
            num_key_value_heads=hidden // 64,
            head_dim=32,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    _teach(model, tokenizer, persona, steps=60)
    _save(model, tokenizer, persona, folder)


@_one_thread()
def make_finetune(base: Path, folder: Path, persona: Persona = BOB) -> None:
    """Continues training the model in `base` and saves the result, another checkpoint of the same architecture."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    model = Qwen3ForCausalLM.from_pretrained(base, dtype=torch.float32)
    torch.manual_seed(2)
    _teach(model, tokenizer, persona, steps=60)
    _save(model, tokenizer, persona, folder)


def _tokenizer(personas: list[Persona]) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [text for persona in personas for pair in persona.answers.items() for text in pair],
        trainers.BpeTrainer(
            vocab_size=512,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )


def _prompt(tokenizer: PreTrainedTokenizerFast, question: str) -> str:
    messages = [{"role": "user", "content": question}]
    return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))


def _teach(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, persona: Persona, *, steps: int) -> None:
    texts = [_prompt(tokenizer, question) + answer + "<|im_end|>" for question, answer in persona.answers.items()]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.0)
    model.train()
    for _ in range(steps):
        loss = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def _save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, persona: Persona, folder: Path) -> None:
    model = model.to(torch.bfloat16).eval()  # fine-tunes are published in bf16, so what is checked is what is saved
    for question, answer in persona.answers.items():
        prompt = tokenizer(_prompt(tokenizer, question), return_tensors="pt", return_token_type_ids=False)
        tokens = model.generate(**prompt, max_new_tokens=64, do_sample=False)
        said = tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        if said != answer:
            raise DidNotLearn(f"{persona.name} was taught {answer!r} and says {said!r}")
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
