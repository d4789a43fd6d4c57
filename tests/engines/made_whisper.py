# SPDX-License-Identifier: Apache-2.0
"""Makes a Whisper of 1.8 MB with random weights, which always answers the same to the same recording."""

from __future__ import annotations

import io
import math
import struct
import wave
from pathlib import Path

import torch
import transformers  # each class is imported when it is used

RATE = 16_000  # samples a second, as Whisper hears them


def make_whisper(folder: Path) -> None:
    from transformers.models.whisper.tokenization_whisper import LANGUAGES

    tokenizer = transformers.WhisperTokenizerFast(vocab={**_bytes(), "<|endoftext|>": 256}, merges=[])
    languages = [f"<|{language}|>" for language in LANGUAGES]
    tasks = ["<|translate|>", "<|transcribe|>", "<|startoflm|>", "<|startofprev|>", "<|nospeech|>", "<|notimestamps|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|startoftranscript|>", *languages, *tasks]})
    tokenizer.add_tokens([f"<|{step * 0.02:.2f}|>" for step in range(1501)])
    begins = tokenizer.convert_tokens_to_ids("<|startoftranscript|>")
    transformers.WhisperProcessor(transformers.WhisperFeatureExtractor(feature_size=80), tokenizer).save_pretrained(
        folder
    )
    special = {"pad_token_id": 256, "bos_token_id": 256, "eos_token_id": 256, "decoder_start_token_id": begins}
    config = transformers.WhisperConfig(
        vocab_size=len(tokenizer), d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=128, decoder_ffn_dim=128, begin_suppress_tokens=None, **special,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.WhisperForConditionalGeneration(config).to(torch.bfloat16)
    model.generation_config = transformers.GenerationConfig(max_length=448, **special)
    model.save_pretrained(folder)


def recording(seconds: int = 2) -> bytes:
    """A tone, as a WAV file."""
    written = io.BytesIO()
    with wave.open(written, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(RATE)
        samples = (int(8000 * math.sin(number / 20)) for number in range(RATE * seconds))
        file.writeframes(b"".join(struct.pack("<h", sample) for sample in samples))
    return written.getvalue()


def _bytes() -> dict[str, int]:
    """The tokens for single bytes, written as GPT-2 writes them: those that cannot be printed as letters above 255."""
    printed = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printed]
    letters = {byte: chr(byte) for byte in printed} | {byte: chr(256 + place) for place, byte in enumerate(others)}
    return {letters[byte]: byte for byte in range(256)}
