"""Log-probs, scores and values read at the right positions, by every way of computing hidden states."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import Tensor, nn

from pipeline.data.forest import Segment, build
from pipeline.llama import heads
from pipeline.llama.heads import ActorCritic, PolicyModel, ScalarModel, at_last, at_predictor, hidden_states
from pipeline.llama.modeling import LlamaForCausalLM, LlamaForSequenceClassification

SHAPE = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.1,
    "pad_token_id": None,
}


def ours(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    return LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).eval()


def scorer(seed: int = 1) -> LlamaForSequenceClassification:
    torch.manual_seed(seed)
    return LlamaForSequenceClassification(transformers.LlamaConfig(**SHAPE, num_labels=1)).eval()


def gpt2() -> nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=97, n_embd=32, n_layer=2, n_head=4, bos_token_id=1, eos_token_id=2, initializer_range=0.1
    )
    return transformers.GPT2LMHeadModel(config).eval()


def mistral() -> nn.Module:
    torch.manual_seed(0)
    return transformers.MistralForCausalLM(transformers.MistralConfig(**SHAPE)).eval()


def groups() -> list[list[Segment]]:
    def seg(ids: list[int], parent: int = -1, weight: float = 1.0) -> Segment:
        return Segment(ids, parent, weights=[weight] * len(ids))

    return [
        [seg([5, 6, 7], weight=0.0), seg([8, 9], 0), seg([10, 11, 12], 0), seg([], 0), seg([13], 3)],
        [seg([20, 21, 22, 23, 24])],
        [seg([30])],
    ]


@pytest.mark.parametrize("make", [ours, mistral, gpt2])
def test_padded_and_forest_computation_agree(make) -> None:
    model, forest = make(), build(groups())
    by_path = hidden_states(model, forest, padded=True)
    assert (hidden_states(model, forest) - by_path).abs().max() <= 1e-5
    rows = heads.padded_rows(forest)
    assert rows.ids_BL.tolist()[0] == [5, 6, 7, 8, 9, 0] and rows.mask_BL[0].tolist() == [1, 1, 1, 1, 1, 0]
    assert len(rows.ids_BL) == 5  # two answers, the one behind the empty reply, two documents


def test_forest_is_refused_where_it_was_not_tried() -> None:
    with pytest.raises(ValueError, match="gpt2"):
        hidden_states(gpt2(), build(groups()), padded=False)


@pytest.mark.parametrize("make", [ours, mistral, gpt2])
def test_logprobs_equal_a_plain_loop_over_paths(make) -> None:
    model, forest = make(), build(groups())
    out = PolicyModel(model)(forest, entropy=True, temperature=0.7)
    expected = []
    for group in groups():
        paths: list[list[int]] = []
        for segment in group:
            before = paths[segment.parent] if segment.parent >= 0 else []
            paths.append(before + list(segment.ids))
            for i, token in enumerate(segment.ids):
                context = before + list(segment.ids[:i])
                if context and segment.weights[i]:
                    logits = model(torch.tensor([context]), use_cache=False).logits[0, -1] / 0.7
                    logp = logits.log_softmax(-1)
                    expected.append([float(logp[token].detach()), float(-(logp.exp() * logp).sum().detach())])
                else:
                    expected.append([0.0, 0.0])
    wanted = torch.tensor(expected)
    assert (out.logprobs_T - wanted[:, 0]).abs().max() <= 1e-5
    assert (out.entropy_T - wanted[:, 1]).abs().max() <= 1e-5
    assert out.logprobs_T.dtype == torch.float32 and out.values_T is None


class Oracle(nn.Module):
    """A model that predicts the token after each, with margin 50."""

    def __init__(self, shift: int) -> None:
        super().__init__()
        self.shift = shift
        self.config = SimpleNamespace(
            model_type="oracle", vocab_size=30, get_text_config=lambda: SimpleNamespace(vocab_size=30)
        )
        self.base_model = self.trunk

    def trunk(self, input_ids: Tensor, **_) -> SimpleNamespace:
        return SimpleNamespace(last_hidden_state=50.0 * nn.functional.one_hot(input_ids.roll(-self.shift, 1), 30))

    def get_output_embeddings(self) -> nn.Module:
        return nn.Identity()


def test_a_token_is_scored_by_the_state_before_it() -> None:
    forest = build([[Segment([1, 2, 3]), Segment([4, 5, 6, 7], 0, weights=[1.0] * 4)]])
    assert PolicyModel(Oracle(1))(forest).logprobs_T.sum().abs() < 1e-6
    for wrong in (0, 2):
        assert PolicyModel(Oracle(wrong))(forest).logprobs_T[3:].max() < -10


def test_prompt_tokens_and_padding_do_not_count() -> None:
    model = PolicyModel(ours())
    answer = build([[Segment([5, 6, 7]), Segment([8, 9], 0, weights=[1.0, 1.0])]])
    found = model(answer).logprobs_T
    assert found[:3].tolist() == [0, 0, 0] and (found[3:] < 0).all()
    chosen = torch.tensor([False, True, False, True, False])
    selected = model(answer, select_T=chosen).logprobs_T
    assert (selected != 0).tolist() == chosen.tolist()
    assert selected[3] == found[3]
    beside = build([*groups(), [Segment([5, 6, 7]), Segment([8, 9], 0, weights=[1.0, 1.0])]])
    assert (model(beside).logprobs_T[-2:] - found[3:]).abs().max() <= 1e-6


def test_the_head_sees_chosen_states_only() -> None:
    lm = ours()
    rows = []
    lm.lm_head.register_forward_hook(lambda _, inputs, __: rows.append(inputs[0].shape[0]))
    forest = build([[Segment([5] * 200), Segment([6] * 10, parent=0, weights=[1.0] * 10)]])
    PolicyModel(lm)(forest)
    assert rows == [64]  # ten chosen tokens of 210, filled up to a full run of rows


def test_scores_equal_those_of_the_classifier_itself() -> None:
    classifier, forest = scorer(), build(groups())
    scores = ScalarModel(classifier)(forest)
    assert scores.shape == (len(forest),) and scores.dtype == torch.float32
    ends = at_last(scores, forest)
    paths = [
        [5, 6, 7],
        [5, 6, 7, 8, 9],
        [5, 6, 7, 10, 11, 12],
        [5, 6, 7],
        [5, 6, 7, 13],
        [20, 21, 22, 23, 24],
        [30],
    ]
    alone = torch.cat([classifier(torch.tensor([path]), use_cache=False).logits[0] for path in paths])
    assert (ends - alone).abs().max() <= 1e-6
    values = at_predictor(scores, forest)
    assert values[0] == 0 and values[3] == values[5] == values[8] == scores[2]  # three children of one prompt
    assert at_last(scores, build([[Segment([])]])).tolist() == [0.0]


def test_actor_critic_computes_what_is_wanted() -> None:
    policy, value, forest = PolicyModel(ours()), ScalarModel(scorer()), build(groups())
    both = ActorCritic(policy, value)
    out = both(forest, temperature=0.7)
    assert torch.equal(out.logprobs_T, policy(forest, temperature=0.7).logprobs_T)
    assert torch.equal(out.values_T, at_predictor(value(forest), forest))
    assert out.entropy_T is not None
    only = both(forest, want=("values",))
    assert only.logprobs_T is None and torch.equal(only.values_T, out.values_T)
    assert both(forest, want=("logprobs",)).entropy_T is None
    with pytest.raises(ValueError, match="kl"):
        both(forest, want=("kl",))


def test_the_same_forest_gives_the_same_bits() -> None:
    model, forest = PolicyModel(ours()), build(groups())
    assert torch.equal(model(forest).logprobs_T, model(build(groups())).logprobs_T)
