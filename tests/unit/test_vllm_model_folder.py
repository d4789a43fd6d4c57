# SPDX-License-Identifier: Apache-2.0
"""The header that vLLM sees of a checkpoint: everything from which it builds the model, and no second embedding."""

from __future__ import annotations

from typing import Any

import pytest

from flashd.checkpoint.convert import compose
from flashd.checkpoint.header import as_json
from flashd.checkpoint.layout import Shape
from flashd.workers.vllm import model_folder


def layout(tensors: dict[str, str], aliases: dict[str, str] | None = None, **metadata: str) -> str:
    """Of tensors by name and dtype."""
    shapes = [Shape(name, dtype, (64, 8), 64 * 8 * 2) for name, dtype in tensors.items()]
    return as_json(compose(shapes, aliases or {}, metadata))


@pytest.mark.parametrize(
    ("kept", "alias", "listed"),
    [
        ("model.embed_tokens.weight", "lm_head.weight", {"model.embed_tokens.weight"}),
        ("lm_head.weight", "backbone.embeddings.weight", {"backbone.embeddings.weight"}),
        ("transformer.wte.weight", "lm_head.weight", {"transformer.wte.weight"}),
        ("shared.weight", "lm_head.weight", {"shared.weight"}),
        ("model.mtp.head.weight", "lm_head.weight", {"model.mtp.head.weight", "lm_head.weight"}),
        ("model.layers.1.up.qweight", "model.layers.0.up.qweight",
         {"model.layers.1.up.qweight", "model.layers.0.up.qweight"}),
    ],
    ids=["tied", "tied-the-other-way-round", "gpt2", "t5", "a-head-of-its-own-that-another-shares", "equal-layers"],
)  # fmt: skip
def test_all_names_but_that_of_an_output_layer_which_is_the_embedding(kept: str, alias: str, listed: set[str]) -> None:
    found = model_folder.listed(layout({kept: "BF16", "norm": "F32"}, {alias: kept}))
    assert found.keys() == {*listed, "norm"}
    assert all(found[name]["dtype"] == "BF16" for name in listed)


def test_an_output_layer_of_its_own_is_listed() -> None:
    assert "lm_head.weight" in model_folder.listed(
        layout({"model.embed_tokens.weight": "BF16", "lm_head.weight": "BF16"})
    )


@pytest.mark.parametrize(
    ("other", "is_same"),
    [
        (layout({"b": "F32", "a": "BF16"}, trained="yesterday"), True),
        (layout({"a": "BF16", "b": "BF16"}), False),
        (layout({"a": "BF16", "c": "F32"}), False),
        (layout({"a": "BF16", "b": "F32"}, {"c": "b"}), False),
    ],
    ids=["metadata", "dtype", "name", "alias"],
)
def test_the_digest_is_of_what_is_listed_alone(other: str, is_same: bool) -> None:
    def digest(text: str) -> Any:
        return model_folder.digest(model_folder.listed(text))

    assert (digest(other) == digest(layout({"a": "BF16", "b": "F32"}))) is is_same
