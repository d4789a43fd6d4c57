# SPDX-License-Identifier: Apache-2.0
"""Images of quantised models are made only if they contain all state derived from the weights."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from flashd.workers.vllm import quantised

CPU = torch.device("cpu")


class UnquantizedLinearMethod: ...


class Fp8LinearMethod: ...


class AWQMarlinLinearMethod: ...


class Mxfp4MoEMethod:
    """As of vLLM 0.32 and newer."""

    supports_pre_processed_weights = True


class NewMethod:
    supports_pre_processed_weights = False


class Layer(nn.Module):
    def __init__(self, method: object) -> None:
        super().__init__()
        self.quant_method = method
        self.weight = nn.Parameter(torch.randn(8, 8), requires_grad=False)
        self.weight_scale = nn.Parameter(torch.ones(1), requires_grad=False)
        self.register_buffer("_k_scale", torch.ones(()))
        self.table = torch.arange(4)  # plain, and kept by the module


def made(*methods: object) -> tuple[nn.Module, set[int]]:
    before = quantised.storages(CPU)
    return nn.Sequential(*(Layer(method) for method in methods)), before


@pytest.mark.parametrize(
    ("method", "is_sound"),
    [
        (Fp8LinearMethod(), True),
        (Mxfp4MoEMethod(), True),
        (AWQMarlinLinearMethod(), False),
        (NewMethod(), False),
    ],
    ids=lambda value: type(value).__name__,
)
def test_methods(method: object, is_sound: bool) -> None:
    model, before = made(UnquantizedLinearMethod(), method)
    found = quantised.why_own(model)
    assert found == "" if is_sound else found.startswith(type(method).__name__)
    hindrance = quantised.hindrance(model, before, with_kernels=not is_sound)
    assert hindrance == ("NewMethod was not tested with images" if isinstance(method, NewMethod) else "")


def test_a_scheme_that_was_not_tested_hinders() -> None:
    model, before = made(AWQMarlinLinearMethod())
    assert quantised.hindrance(model, before, with_kernels=True) == ""
    model[0].quant_method.kernel = NewMethod()  # type: ignore[union-attr]
    assert quantised.hindrance(model, before, with_kernels=True) == "NewMethod was not tested with images"
    del model[0].quant_method.kernel  # type: ignore[union-attr]
    model[0].scheme = NewMethod()  # type: ignore[assignment]
    assert quantised.hindrance(model, before, with_kernels=True) == "NewMethod was not tested with images"


def test_a_tensor_inside_a_kernel_hinders_an_image_for_all() -> None:
    model, before = made(Fp8LinearMethod())
    model[0].quant_method.inverse = [1 / model[0].weight_scale]  # type: ignore[union-attr]
    found = quantised.hindrance(model, before, with_kernels=False)
    assert "1 tensors were created outside its modules: float32 (1,)" in found
    assert quantised.hindrance(model, None, with_kernels=False) == "", "who did not look before cannot tell"
    del model[0].quant_method.inverse  # type: ignore[union-attr]
    model[0].quant_method.view = model[0].weight[:4]  # type: ignore[union-attr]
    assert quantised.hindrance(model, before, with_kernels=False) == "", "what views the weights follows them"


def test_a_tensor_that_cannot_be_found_from_the_modules_hinders_any_image() -> None:
    model, before = made(AWQMarlinLinearMethod())
    kept = torch.randn(3)
    found = quantised.hindrance(model, before, with_kernels=True)
    assert "1 tensors were created outside its modules: float32 (3,)" in found and kept.numel()


def test_numbers_that_came_from_the_checkpoint_hinder() -> None:
    model, before = made(Fp8LinearMethod(), UnquantizedLinearMethod())
    model[1]._k_scale_float = 1.0  # type: ignore[assignment]
    assert quantised.hindrance(model, before, with_kernels=False) == ""
    model[1]._k_scale_float = 0.5  # type: ignore[assignment]
    assert quantised.hindrance(model, before, with_kernels=False).startswith("1 has its own factors")


def test_what_is_not_quantised_is_not_hindered() -> None:
    model, before = made(UnquantizedLinearMethod())
    kept = torch.randn(3)
    assert quantised.hindrance(model, before, with_kernels=False) == "" and kept.numel()
