"""Adapters and the reference beside them."""

from __future__ import annotations

import pytest
import torch
import transformers

from pipeline.data.forest import Segment, build
from pipeline.flow.errors import UserError
from pipeline.llama import adapters
from pipeline.llama.adapter_settings import (
    AnyAdapter,
    Ia3Settings,
    LoraSettings,
    PrefixSettings,
    PromptSettings,
    WeightsSettings,
)
from pipeline.llama.adapters import adapters_off, add_adapter, copy_adapter, share_frozen, using_adapter
from pipeline.llama.heads import PolicyModel, ScalarModel
from pipeline.llama.modeling import LlamaForCausalLM, LlamaForSequenceClassification
from pipeline.llama.presets import PRESETS
from pipeline.train.optim import parameter_groups
from tests.architectures import LATENT
from tests.small import Listener

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
    module = PolicyModel(add_adapter(policy(), LoraSettings(rank=4), seed=0))
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
    module = ScalarModel(add_adapter(classifier, LoraSettings(rank=4), seed=0))
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
    module = PolicyModel(add_adapter(policy(), LoraSettings(rank=4), seed=0))
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
    models = [add_adapter(policy(), LoraSettings(rank=4, targets="query_value"), seed) for seed in (0, 0, 1)]
    names = {n.split(".")[-3] for n, p in models[0].named_parameters() if p.requires_grad}
    assert names == {"lora_A", "lora_B"}
    count = sum(p.numel() for p in models[0].parameters() if p.requires_grad)
    assert count == 2 * (4 * (32 + 32) + 4 * (32 + 16))  # layers x (q and v)
    weights = [[p for n, p in m.named_parameters() if "lora_A" in n] for m in models]
    assert torch.equal(weights[0][0], weights[1][0]) and not torch.equal(weights[0][0], weights[2][0])
    with pytest.raises(UserError, match="already"):
        add_adapter(models[0], LoraSettings(), seed=0)


@pytest.mark.parametrize("queries", [{}, {"q_lora_rank": 10}], ids=["whole", "compressed"])
def test_latent_attention_is_adapted_where_it_compresses_and_where_it_does_not(queries: dict) -> None:
    """Every linear layer of a decoder layer has an adapter, which settings find again and which merges to 1e-5."""
    from tests import small

    settings = LoraSettings(rank=2)
    module = PolicyModel(add_adapter(small.policy(**LATENT, **queries).model, settings, 0))
    names = {n.split(".")[-4] for n, p in module.named_parameters() if p.requires_grad}
    first = {"q_a_proj", "q_b_proj"} if queries else {"q_proj"}
    kept = {"kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert names == first | kept
    assert adapters.settings_of(module.lm.active_peft_config.to_dict()) == settings.plain()
    start = module(FOREST).logprobs_T.detach()
    train(module, nll, 3)
    found = module(FOREST).logprobs_T.detach()
    assert (found - start).abs().max() > 1e-3
    assert (PolicyModel(adapters.merged(module.lm))(FOREST).logprobs_T - found).abs().max() <= 1e-5


def test_checkpointing_reaches_the_adapters() -> None:
    module = PolicyModel(add_adapter(policy(), LoraSettings(rank=4), seed=0)).train()
    nll(module).backward()
    plain = {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    module.zero_grad()
    module.lm.get_base_model().gradient_checkpointing_enable()
    nll(module).backward()
    again = {n: p.grad for n, p in module.named_parameters() if p.grad is not None}
    assert plain.keys() == again.keys() and all(torch.equal(plain[n], again[n]) for n in plain)


def layer_weights(model) -> dict[str, torch.Tensor]:
    return {name: m.weight.double() for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}


FORMULAS = {  # W' of W, A, B and what else is trained, in float64
    "lora": (LoraSettings(rank=4, alpha=6), lambda w, a, b, m: w + 6 / 4 * b @ a),
    "rank-stabilised": (LoraSettings(rank=4, alpha=6, rank_stabilised=True), lambda w, a, b, m: w + 6 / 2 * b @ a),
    "dora": (
        LoraSettings(rank=4, alpha=6, dora=True),
        lambda w, a, b, m: m[:, None] * (w + 6 / 4 * b @ a) / (w + 6 / 4 * b @ a).norm(dim=1, keepdim=True),
    ),
    "ia3": (Ia3Settings(kind="ia3"), lambda w, a, b, m: w * m),
}


@pytest.mark.parametrize("kind", FORMULAS)
def test_weights_are_what_the_papers_say(kind: str) -> None:
    """Merged they compute what the adapter did (T54) and are the formula's; a hundred rounds of merging leave them."""
    settings, formula = FORMULAS[kind]
    module = PolicyModel(add_adapter(policy(), settings, seed=0))
    with torch.no_grad():
        for p in module.parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn_like(p))
    adapted = module(FOREST).logprobs_T.detach()
    assert (adapted - PolicyModel(policy())(FOREST).logprobs_T).abs().max() > 1e-2
    own = {name.removeprefix("base_model.model."): p.detach().double() for name, p in module.lm.named_parameters()}
    before = {name: p.clone() for name, p in own.items() if ".base_layer." in name}
    for _ in range(100):
        module.lm.merge_adapter()
        module.lm.unmerge_adapter()
    for name, p in module.lm.named_parameters():
        if ".base_layer." in name:
            assert (p.double() - before[name.removeprefix("base_model.model.")]).abs().max() <= 1e-6
            p.data = before[name.removeprefix("base_model.model.")].float()
    plain = adapters.merged(module.lm)
    assert type(plain) is LlamaForCausalLM
    assert (PolicyModel(plain)(FOREST).logprobs_T - adapted).abs().max() <= 1e-5
    start, touched = layer_weights(policy()), 0
    for name, found in layer_weights(plain).items():
        a, b = own.get(f"{name}.lora_A.default.weight"), own.get(f"{name}.lora_B.default.weight")
        more = own.get(f"{name}.lora_magnitude_vector.default.weight", own.get(f"{name}.ia3_l.default"))
        changed = a is not None or more is not None
        touched += changed
        assert (found - (formula(start[name], a, b, more) if changed else start[name])).abs().max() <= 1e-6
    assert touched == 2 * (3 if kind == "ia3" else 7)


def test_pissa_starts_from_the_strongest_directions() -> None:
    """Meng et al. 2024, eq. 2 to 4: A and B from the largest singular values, the rest frozen, the sum what it was."""
    model = add_adapter(policy(), LoraSettings(rank=4, alpha=6, initial="pissa"), seed=0)
    start = layer_weights(policy())
    for name, m in model.get_base_model().named_modules():
        if not hasattr(m, "lora_A"):
            continue
        u, s, v = torch.linalg.svd(start[name], full_matrices=False)
        taken = 6 / 4 * m.lora_B["default"].weight.double() @ m.lora_A["default"].weight.double()
        assert (taken - u[:, :4] * s[:4] @ v[:4]).abs().max() <= 1e-5
        assert (m.base_layer.weight.double() + taken - start[name]).abs().max() <= 1e-6
        squares = (m.lora_A["default"].weight.double().square().sum(1) * 6 / 4, s[:4])
        torch.testing.assert_close(*squares, rtol=1e-4, atol=1e-5)
    found = PolicyModel(model)(FOREST).logprobs_T
    assert (found - PolicyModel(policy())(FOREST).logprobs_T).abs().max() <= 1e-5


@pytest.mark.parametrize("stabilised", [False, True])
def test_pissa_is_saved_as_a_lora_over_the_untouched_base(stabilised: bool) -> None:
    settings = LoraSettings(rank=4, alpha=6, initial="pissa", rank_stabilised=stabilised)
    module = PolicyModel(add_adapter(policy(), settings, seed=0))
    train(module, nll, 3)
    expected = module(FOREST).logprobs_T.detach()
    config, state = adapters.saved_form(module.lm, adapters.state_of(module.lm))
    scale = 2**0.5 if stabilised else 2
    assert (config.r, config.lora_alpha, config.init_lora_weights) == (8, 6 * scale, True)
    again = adapters.assembled(policy(), [adapters.Part(config, state)])
    assert (PolicyModel(again)(FOREST).logprobs_T - expected).abs().max() <= 1e-5
    adapters.require_same(again, settings)  # the same settings in the next row mean this adapter


def test_the_rate_of_b_is_its_own() -> None:
    model = add_adapter(policy(), LoraSettings(rank=4, rate_ratio=16), seed=0)
    names = {id(p): name for name, p in model.named_parameters()}
    rates = {names[id(p)]: group["rate"] for group in parameter_groups(model, 0.1) for p in group["params"]}
    assert {rate for name, rate in rates.items() if ".lora_B." in name} == {16.0}
    assert {rate for name, rate in rates.items() if ".lora_A." in name} == {1.0} and len(rates) == 2 * 2 * 7
    in_ppo = parameter_groups(torch.nn.ModuleDict({"value": model}), 0.0, rates={"value.": 3.0})
    assert sorted(group["rate"] for group in in_ppo) == [3.0, 48.0]


def test_chosen_weights_train_and_no_others() -> None:
    settings = WeightsSettings(kind="weights", train=("model.layers.1.mlp.*", "*norm.weight"))
    model = add_adapter(policy(), settings, seed=0)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    mlp = {f"model.layers.1.mlp.{name}_proj.weight" for name in ("gate", "up", "down")}
    norms = {"model.norm.weight"} | {
        f"model.layers.{i}.{name}_layernorm.weight" for i in range(2) for name in ("input", "post_attention")
    }
    assert trained == mlp | norms
    before = {name: p.clone() for name, p in model.named_parameters()}
    train(PolicyModel(model), nll, 2)
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == trained
    with pytest.raises(
        UserError, match=r"'\*.9\.\*' fits none of the model's 21 parameters.*model.embed_tokens.weight"
    ):
        add_adapter(policy(), WeightsSettings(kind="weights", train=("*.9.*",)), seed=0)


def trained_adapter(settings: AnyAdapter, seed: int = 0) -> PolicyModel:
    module = PolicyModel(add_adapter(policy(), settings, seed))
    train(module, nll, 3)
    return module


@pytest.mark.parametrize("below", [LoraSettings(rank=4), LoraSettings(rank=4, dora=True)], ids=["lora", "dora"])
def test_stacked_adapters_add_up(below: AnyAdapter) -> None:
    """The one below stays, frozen and to the bit; the sum is the new one over the merged weights."""
    first = trained_adapter(below)
    start = first(FOREST).logprobs_T.detach()
    plain, parts = adapters.taken_apart(first.lm)
    assert all(torch.equal(a, b) for a, b in zip(policy().parameters(), plain.parameters(), strict=True))
    again = adapters.assembled(plain, parts)
    both = PolicyModel(adapters.stack_new(again, LoraSettings(rank=2, targets="attention", beneath="stack"), seed=1))
    assert torch.equal(both(FOREST).logprobs_T, start) and adapters.is_stacked(both.lm)
    assert {n.split(".")[-2] for n, p in both.named_parameters() if p.requires_grad} == {"default"}
    under = {name: p.clone() for name, p in both.named_parameters() if ".below0." in name}
    train(both, nll, 3)
    found = both(FOREST).logprobs_T.detach()
    assert (found - start).abs().max() > 1e-3
    named = dict(both.named_parameters())
    assert under and all(torch.equal(named[name], p) for name, p in under.items())
    own = adapters.Part(both.lm.active_peft_config, adapters.state_of(both.lm))
    over = adapters.assembled(adapters.merged(trained_adapter(below).lm), [own])
    assert (PolicyModel(over)(FOREST).logprobs_T - found).abs().max() <= 1e-5
    assert (PolicyModel(adapters.merged(both.lm))(FOREST).logprobs_T - found).abs().max() <= 1e-5


@pytest.mark.parametrize(
    ("below", "above", "told"),
    [
        (Ia3Settings(kind="ia3"), LoraSettings(rank=2), "stack adds up LoRA adapters alone"),
        (LoraSettings(rank=2), Ia3Settings(kind="ia3"), "stack adds up LoRA adapters alone"),
        (PromptSettings(kind="prompt", tokens=2), LoraSettings(rank=2), "stack adds up LoRA adapters alone"),
    ],
    ids=["over ia3", "ia3 over", "over prompt"],
)
def test_what_does_not_add_up_is_refused(below: AnyAdapter, above: AnyAdapter, told: str) -> None:
    with pytest.raises(UserError, match=told):
        adapters.stack_new(add_adapter(policy(), below, 0), above, 0)


def test_virtual_tokens_merge_with_nothing() -> None:
    with pytest.raises(UserError, match="virtual tokens .* do not merge into weights"):
        adapters.merged(add_adapter(policy(), PromptSettings(kind="prompt", tokens=2), 0))


def test_the_share_is_said_where_somebody_chose_it() -> None:
    listener = Listener()
    model = add_adapter(policy(), LoraSettings(rank=4, targets="query_value"), 0)
    trained, whole = 2 * (4 * (32 + 32) + 4 * (32 + 16)), sum(p.numel() for p in model.parameters())
    assert adapters.told_share(model, None, listener) == {"trained_parameters": trained, "parameters": whole}
    assert listener.said == [f"trains {trained} of {whole:,} parameters of the model ({100 * trained / whole:.3g} %)"]
    assert adapters.told_share(policy(), None, listener) == {} and len(listener.said) == 1


def held(*modules: torch.nn.Module) -> int:
    """Bytes of distinct memory."""
    return sum({p.data_ptr(): p.numel() * p.element_size() for m in modules for p in m.parameters()}.values())


def test_roles_on_one_base_compute_what_they_did_apart_and_hold_it_once() -> None:
    """Policy and critic as adapters over one trunk, and the trunk itself as reference."""
    classifier = LlamaForSequenceClassification(transformers.LlamaConfig(**SHAPE, num_labels=1))
    classifier.model.load_state_dict(policy().model.state_dict())
    roles = [
        PolicyModel(add_adapter(policy(), LoraSettings(rank=4), seed=1)),
        PolicyModel(policy()).requires_grad_(False),
        ScalarModel(add_adapter(classifier.eval(), LoraSettings(rank=4), seed=2)),
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


@pytest.mark.parametrize(
    ("shape", "adapter", "said"),
    [
        ({"num_local_experts": 4}, LoraSettings(), "set it to attention"),
        ({"num_local_experts": 4}, Ia3Settings(kind="ia3"), "use lora with targets: attention"),
        (LATENT, LoraSettings(targets="query_value"), "adapter.targets: query_value are no projections of their own"),
        (LATENT, PrefixSettings(kind="prefix"), "adapter.kind: prefix changes keys and values"),
        ({"sliding_window": 4}, PrefixSettings(kind="prefix"), "of which sliding_window lets go"),
    ],
)
def test_adapters_that_would_leave_out_most_of_a_model_are_refused(shape, adapter, said) -> None:
    from tests import small

    with pytest.raises(UserError, match=said):
        add_adapter(small.policy(**shape).model, adapter, seed=0)
