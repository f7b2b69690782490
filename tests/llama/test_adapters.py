"""Adapters and the reference beside them."""

from __future__ import annotations

import pytest
import torch
import transformers

from pipeline.data.forest import Segment, build
from pipeline.flow.errors import UserError
from pipeline.llama import adapters
from pipeline.llama.adapters import LoraSettings, adapters_off, add_lora, copy_adapter, share_frozen, using_adapter
from pipeline.llama.heads import PolicyModel, ScalarModel
from pipeline.llama.modeling import LlamaForCausalLM, LlamaForSequenceClassification
from pipeline.llama.presets import PRESETS

SHAPE = {**PRESETS["test"], "initializer_range": 0.1}
FOREST = build([[Segment([5, 6, 7, 8], weights=[1.0] * 4), Segment([9, 10], 0, weights=[1.0] * 2)]])


def policy() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).eval()


def train(module, loss, steps: int = 10) -> None:
    optimizer = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(module).backward()
        optimizer.step()


def nll(module: PolicyModel) -> torch.Tensor:
    return -module(FOREST).logprobs_T.sum()


def test_switched_off_it_is_the_base_to_the_bit() -> None:
    base = PolicyModel(policy())(FOREST).logprobs_T
    module = PolicyModel(add_lora(policy(), LoraSettings(rank=4), seed=0))
    train(module, nll)
    assert (module(FOREST).logprobs_T - base).abs().max() > 0.1
    with adapters_off(module.lm):
        assert (module(FOREST).logprobs_T - base).abs().max() <= 1e-6
        plain = module.lm(FOREST.ids_T[None, :4]).logits
    assert torch.equal(plain, policy()(FOREST.ids_T[None, :4]).logits)


def test_switched_off_a_classifiers_trained_head_is_the_first_one() -> None:
    torch.manual_seed(1)
    classifier = LlamaForSequenceClassification(transformers.LlamaConfig(**SHAPE, num_labels=1)).eval()
    base = ScalarModel(classifier)(FOREST).detach()
    module = ScalarModel(add_lora(classifier, LoraSettings(rank=4), seed=0))
    train(module, lambda m: (m(FOREST) - 1).square().sum())
    assert (module(FOREST) - base).abs().max() > 1e-2
    with adapters_off(module.classifier):
        assert (module(FOREST) - base).abs().max() <= 1e-6


def test_adapters_with_biases_are_no_reference() -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(policy(), LoraConfig(r=2, target_modules=["q_proj"], bias="all", task_type="CAUSAL_LM"))
    with pytest.raises(UserError, match="trains biases"), adapters_off(model):
        pass


def test_a_frozen_copy_is_the_reference_of_a_row_that_starts_from_an_adapter() -> None:
    module = PolicyModel(add_lora(policy(), LoraSettings(rank=4), seed=0))
    train(module, nll, 3)
    start = module(FOREST).logprobs_T.detach()
    trainable = [n for n, p in module.named_parameters() if p.requires_grad]
    copy_adapter(module.lm)
    assert [n for n, p in module.named_parameters() if p.requires_grad] == trainable
    train(module, nll, 3)
    assert (module(FOREST).logprobs_T - start).abs().max() > 1e-2
    with using_adapter(module.lm, "reference"), torch.no_grad():
        assert torch.equal(module(FOREST).logprobs_T, start)
    assert [n for n, p in module.named_parameters() if p.requires_grad] == trainable
    assert module.lm.active_adapter == "default"


def test_only_the_adapter_is_trained_and_it_follows_the_seed() -> None:
    models = [add_lora(policy(), LoraSettings(rank=4, targets="query_value"), seed) for seed in (0, 0, 1)]
    names = {n.split(".")[-3] for n, p in models[0].named_parameters() if p.requires_grad}
    assert names == {"lora_A", "lora_B"}
    count = sum(p.numel() for p in models[0].parameters() if p.requires_grad)
    assert count == 2 * (4 * (32 + 32) + 4 * (32 + 16))  # layers x (q and v)
    weights = [[p for n, p in m.named_parameters() if "lora_A" in n] for m in models]
    assert torch.equal(weights[0][0], weights[1][0]) and not torch.equal(weights[0][0], weights[2][0])
    with pytest.raises(UserError, match="already"):
        add_lora(models[0], LoraSettings(), seed=0)


def test_checkpointing_reaches_the_adapters() -> None:
    module = PolicyModel(add_lora(policy(), LoraSettings(rank=4), seed=0)).train()
    nll(module).backward()
    plain = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    module.lm.get_base_model().gradient_checkpointing_enable()
    nll(module).backward()
    again = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    assert plain.keys() == again.keys() and all(torch.equal(plain[n], again[n]) for n in plain)


def test_prompt_methods_are_refused_on_forests() -> None:
    with adapters.quiet():
        from peft import PromptTuningConfig, get_peft_model

        model = get_peft_model(policy(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="use LoRA"):
        PolicyModel(model)(FOREST)


def held(*modules: torch.nn.Module) -> int:
    """Bytes of distinct memory."""
    return sum({p.data_ptr(): p.numel() * p.element_size() for m in modules for p in m.parameters()}.values())


def test_roles_on_one_base_compute_what_they_did_apart_and_hold_it_once() -> None:
    """Policy and critic as adapters over one trunk, and the trunk itself as reference."""
    classifier = LlamaForSequenceClassification(transformers.LlamaConfig(**SHAPE, num_labels=1))
    classifier.model.load_state_dict(policy().model.state_dict())
    roles = [
        PolicyModel(add_lora(policy(), LoraSettings(rank=4), seed=1)),
        PolicyModel(policy()).requires_grad_(False),
        ScalarModel(add_lora(classifier.eval(), LoraSettings(rank=4), seed=2)),
    ]
    train(roles[0], nll, steps=3)
    before = [roles[0](FOREST).logprobs_T, roles[1](FOREST).logprobs_T, roles[2](FOREST)]
    apart = held(*roles)
    trunk = sum(p.numel() * 4 for p in policy().model.parameters())
    head = policy().lm_head.weight.numel() * 4
    assert share_frozen(*roles) == 2 * trunk + head == apart - held(*roles)
    after = [roles[0](FOREST).logprobs_T, roles[1](FOREST).logprobs_T, roles[2](FOREST)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert share_frozen(*roles) == 0  # nothing is left to share
    train(roles[0], nll, steps=3)
    assert torch.equal(roles[1](FOREST).logprobs_T, before[1])  # what is trained was never shared


def test_other_bits_are_not_shared() -> None:
    one, two = policy().requires_grad_(False), policy().requires_grad_(False)
    with torch.no_grad():
        two.lm_head.weight[0, 0] += 1.0
    assert share_frozen(one, two) == sum(p.numel() * 4 for p in one.model.parameters())
    assert one.lm_head.weight.data_ptr() != two.lm_head.weight.data_ptr()
    assert share_frozen(policy(), policy()) == 0  # both are trained


def test_experts_are_not_left_out_quietly() -> None:
    from pipeline.flow.errors import UserError
    from tests import small

    with pytest.raises(UserError, match="set it to attention"):
        add_lora(small.policy(num_local_experts=4).model, LoraSettings(), seed=0)
