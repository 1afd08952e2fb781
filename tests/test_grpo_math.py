"""The equations of GRPO: advantages, masks, losses, held against golden values, definitions and identities."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from common.language import watch
from common.language.lm import micro_batches, with_micro_batches
from grpo_arithmetic import Args, advantages_of, completion_mask, group_advantages, grpo_loss

x = float("nan")  # masked entries of the fixture; filled with a value that is the same in all three tensors
LP = [[-0.5, -1.0, -0.2], [-2.0, x, x], [-0.3, -0.7, x], [-1.5, -0.4, x]]
OLD = [[-0.9, -1.0, -0.1], [-1.2, x, x], [-0.3, -0.2, x], [-1.8, -0.5, x]]
REF = [[-0.6, -0.8, -0.3], [-1.5, x, x], [-0.4, -0.6, x], [-1.0, -0.9, x]]
A = torch.tensor([0.5, -0.5, 1.0, -1.0], dtype=torch.float64)


def fixture(fill=-1.0):
    lp, old, ref = (torch.tensor(v, dtype=torch.float64) for v in (LP, OLD, REF))
    mask = ~lp.isnan()
    return *(v.nan_to_num(fill) for v in (lp, old, ref)), mask


def loss_of(rows=slice(None), loss_type="grpo", beta=0.0, fill=-1.0, grad=False, **options):
    lp, old, ref, mask = fixture(fill)
    lp = lp.requires_grad_(True)
    loss, metrics = grpo_loss(
        lp[rows], old[rows], ref[rows] if beta else None, A[rows], mask[rows],
        loss_type=loss_type, beta=beta, max_completion_length=4, **options,
    )  # fmt: skip
    if grad:
        return torch.autograd.grad(loss, lp)[0]
    return loss.item(), metrics


# values produced by another implementation (TRL) on this fixture: beta 0, beta 0.1, sum of |gradient| at beta 0
GOLDEN = {
    "grpo": (0.076694157, 0.083986923, 0.587063274),
    "bnpo": (-0.037989955, -0.032426716, 0.626747387),
    "dr_grpo": (-0.018994978, -0.016213358, 0.313373693),
    "dapo": (-0.037989955, -0.032426716, 0.626747387),
}


@pytest.mark.parametrize("loss_type", GOLDEN)
def test_loss_and_gradient_have_the_golden_values(loss_type):
    plain, with_kl, grad = GOLDEN[loss_type]
    assert loss_of(loss_type=loss_type)[0] == pytest.approx(plain, abs=1e-8)
    assert loss_of(loss_type=loss_type, beta=0.1)[0] == pytest.approx(with_kl, abs=1e-8)
    assert loss_of(loss_type=loss_type, grad=True).abs().sum().item() == pytest.approx(grad, abs=1e-8)


def test_clip_variants_and_metrics_have_the_golden_values():
    assert loss_of(epsilon_high=0.28)[0] == pytest.approx(0.073360824, abs=1e-8)
    metrics = loss_of(beta=0.1)[1]
    expected = {"kl": 0.055632391, "clip_ratio/low_mean": 0.125, "clip_ratio/high_mean": 0.125}
    expected |= {"clip_ratio/region_mean": 0.25, "clip_ratio/low_min": 0.0, "clip_ratio/high_max": 1 / 3}
    assert {k: v.item() for k, v in metrics.items()} == pytest.approx(expected, abs=1e-8)


def test_advantages_have_the_golden_values():
    rewards = torch.tensor([1, 0, 0, 0, 1, 1, 1, 1, 0.5, -0.5, 1, 0], dtype=torch.float64)
    group = [1.499700060, *[-0.499900020] * 3, 0, 0, 0, 0, 0.387238344, -1.161715032, 1.161715032, -0.387238344]
    none = [0.75, -0.25, -0.25, -0.25, 0, 0, 0, 0, 0.25, -0.75, 0.75, -0.25]
    batch = [1.329372218, *[-0.443124073] * 3, 0, 0, 0, 0, 0.443124073, -1.329372218, 1.329372218, -0.443124073]
    for scale, expected in [("group", group), ("none", none), ("batch", batch)]:
        assert group_advantages(rewards, 4, scale).tolist() == pytest.approx(expected, abs=1e-8)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-2, 2, width=32), min_size=8, max_size=8))
def test_advantages_of_a_group_sum_to_zero_and_order_like_rewards(values):
    rewards = torch.tensor(values, dtype=torch.float64)
    for scale in ("group", "batch", "none"):
        groups = group_advantages(rewards, 4, scale).view(2, 4)
        assert torch.isfinite(groups).all()
        assert groups.sum(1).abs().max() < 1e-6
        for a, r in zip(groups, rewards.view(2, 4)):
            assert (a[r > r.mean() + 1e-9] > 0).all() and (a[r < r.mean() - 1e-9] < 0).all()


@pytest.mark.parametrize("value", [1.0, -1.0, 0.1, 1 / 3, 1e-8, 1e8])
def test_equal_rewards_give_exactly_zero_advantage(value):
    """0.1 * 16 is no multiple of 0.1 in float32: a mean of equal numbers may differ from them by rounding."""
    for scale in ("group", "batch", "none"):
        assert (group_advantages(torch.full((16,), value), 16, scale) == 0).all()


@pytest.mark.parametrize("missing", [math.nan, math.inf, -math.inf])
def test_a_completion_without_a_reward_is_no_part_of_its_group(missing):
    """Groups of 4, 3, 1 and 0 rewards: what is there has the advantages that it has alone, the rest 0."""
    for scale in ("group", "none"):
        for group in ([1, -1, 1, 0.5], [1, -1, 0.5, None], [None, 2, None, None], [None] * 4, [0.1, None, 0.1, 0.1]):
            there = torch.tensor([r for r in group if r is not None], dtype=torch.float64)
            expected = iter(group_advantages(there, len(there), scale).tolist() if len(there) > 1 else [0.0])
            rewards = torch.tensor([missing if r is None else r for r in [1, 0, 0, 0, *group]], dtype=torch.float64)
            found = group_advantages(rewards, 4, scale).tolist()
            assert found[:4] == group_advantages(rewards[:4], 4, scale).tolist()  # another group's matter
            assert found[4:] == pytest.approx([0.0 if r is None else next(expected) for r in group], abs=1e-12)
            assert all(a == 0 for a, r in zip(found[4:], group) if r is None)
    assert (group_advantages(torch.tensor([0.1, missing, 0.1, 0.1] * 4), 16) == 0).all()  # equal ones, in float32 too
    batch = group_advantages(torch.tensor([1, 0, 0, 0, 1, missing, 1, 1, 0.5, -0.5, 1, missing]).double(), 4, "batch")
    std = torch.tensor([1, 0, 0, 0, 1, 1, 1, 0.5, -0.5, 1]).double().std().item() + 1e-4
    assert batch.tolist() == pytest.approx([x / std for x in (0.75, *[-0.25] * 3, *[0] * 4, 1 / 6, -5 / 6, 2 / 3, 0)])


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-2, 2, width=32), min_size=8, max_size=8), st.sampled_from(["group", "batch", "none"]))
def test_where_all_have_rewards_the_advantages_are_those_of_the_equation_to_the_bit(values, scale):
    rewards = torch.tensor(values)
    groups = rewards.view(2, 4)
    spread = {"group": groups.std(1, keepdim=True) + 1e-4, "batch": rewards.std() + 1e-4, "none": 1.0}[scale]
    expected = (groups - groups.mean(1, keepdim=True)) / spread
    expected = expected.masked_fill(groups.amax(1, keepdim=True) == groups.amin(1, keepdim=True), 0.0)
    assert torch.equal(group_advantages(rewards, 4, scale), expected.view(-1))


def test_metrics_of_rewards_leave_out_what_is_missing_and_count_it():
    rows = [{"a": 1.0, "b": None}, {"a": -1, "b": 0.5}, {"a": math.nan, "b": 1}, {"a": 0.0, "b": math.inf}]
    parts = watch.reward_parts(rows, ("a", "b"))
    assert parts.dtype == torch.float32 and parts.isnan().tolist() == [
        [False, True],
        [False, False],
        [True, False],
        [False, True],
    ]
    rewards = parts @ torch.tensor([1.0, 2.0])
    assert rewards.isnan().tolist() == [True, False, True, True] and rewards[1] == 0
    metrics = {name: float(x) for name, x in watch.reward_metrics(rewards, parts, ("a", "b"), 2).items()}
    expected = {"reward": 0, "reward_std": 0, "frac_reward_zero_std": 1, "rewards/a/mean": 0, "rewards/a/std": 1}
    expected |= {"rewards/a/missing": 1, "rewards/b/mean": 0.75, "rewards/b/std": 0.125**0.5, "rewards/b/missing": 2}
    assert metrics == pytest.approx(expected)
    said = watch.alarms({f"train/{name}": x for name, x in metrics.items() if "zero" not in name})
    assert list(said) == ["train/rewards/a/missing", "train/rewards/b/missing"]
    assert "reward 'b' gave no finite number for 2 completions" in said["train/rewards/b/missing"]


def test_the_first_end_token_is_trained_and_nothing_after_it():
    """Also where the padding id is an end id, as in Qwen2 base models, and for every one of several end ids."""
    ids = torch.tensor([[5, 6, 9, 9, 9], [9, 9, 9, 9, 9], [5, 6, 7, 8, 5], [5, 8, 9, 5, 5]])
    assert completion_mask(ids, [9]).sum(1).tolist() == [3, 1, 5, 3]
    assert completion_mask(ids, [8, 9]).sum(1).tolist() == [3, 1, 4, 2]
    assert completion_mask(ids, [8, 9])[3].tolist() == [True, True, False, False, False]


def test_loss_gradient_reaches_the_end_token_and_not_the_padding():
    ids = torch.tensor([[5, 6, 9, 9]])
    logits = torch.zeros(1, 4, 12, requires_grad=True)
    logprobs = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    loss, _ = grpo_loss(
        logprobs, logprobs.detach(), None, torch.tensor([1.0]), completion_mask(ids, [9]),
        loss_type="grpo", beta=0.0, max_completion_length=4,
    )  # fmt: skip
    loss.backward()
    assert logits.grad[0, 2, 9] < 0  # raises the end token's logit
    assert (logits.grad[0, 3] == 0).all()


def test_loss_is_zero_but_gradient_is_not_at_ratio_one_without_kl():
    """Why the loss curve says nothing: it is -mean(A) = 0 by construction on the first pass."""
    rewards = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0, -1.0, -1.0, -1.0], dtype=torch.float64)
    lp = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    loss, _ = grpo_loss(
        lp, lp.detach(), None, group_advantages(rewards, 4), torch.ones(8, 5, dtype=torch.bool),
        loss_type="grpo", beta=0.0, max_completion_length=5,
    )  # fmt: skip
    loss.backward()
    assert abs(loss.item()) < 1e-12 and lp.grad.abs().sum() > 0.1


def test_loss_equals_beta_times_kl_at_ratio_one():
    torch.manual_seed(0)
    lp, ref = (-torch.rand(8, 5, dtype=torch.float64) for _ in range(2))
    rewards = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    loss, metrics = grpo_loss(
        lp, lp, ref, group_advantages(rewards, 4), torch.ones(8, 5, dtype=torch.bool),
        loss_type="grpo", beta=0.2, max_completion_length=5,
    )  # fmt: skip
    assert loss.item() == pytest.approx(0.2 * metrics["kl"].item(), abs=1e-12)


def test_identities_between_loss_types():
    _, _, _, mask = fixture()
    bnpo, dr_grpo, dapo = (loss_of(loss_type=t, beta=0.1)[0] for t in ("bnpo", "dr_grpo", "dapo"))
    assert bnpo == pytest.approx(dapo, abs=1e-12)
    assert dr_grpo == pytest.approx(bnpo * mask.sum().item() / (4 * 4), abs=1e-12)
    row = slice(0, 1)
    assert loss_of(row, "grpo", 0.1)[0] == pytest.approx(loss_of(row, "bnpo", 0.1)[0], abs=1e-12)


@pytest.mark.parametrize("loss_type", GOLDEN)
def test_micro_batch_losses_add_up_to_the_full_batch_except_for_bnpo(loss_type):
    """Rows {0, 2} and {1, 3}; bnpo averages over the tokens of the micro-batch, which is its documented flaw."""
    totals = dict(loss_type=loss_type, beta=0.1, num_loss_tokens=8, num_sequences=4)
    (a, ma), (b, mb) = loss_of([0, 2], **totals), loss_of([1, 3], **totals)
    full = loss_of(loss_type=loss_type, beta=0.1)
    grad = loss_of([0, 2], grad=True, **totals) + loss_of([1, 3], grad=True, **totals)
    if loss_type == "bnpo":
        assert a + b == pytest.approx(0.167087097, abs=1e-8)
    else:
        assert a + b == pytest.approx(full[0], abs=1e-12)
        assert torch.allclose(grad, loss_of(loss_type=loss_type, beta=0.1, grad=True), atol=1e-12)
    for name in ("kl", "clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/region_mean"):
        assert (ma[name] + mb[name]).item() == pytest.approx(full[1][name].item(), abs=1e-12), "token-weighted metrics"


@pytest.mark.parametrize("loss_type", GOLDEN)
@pytest.mark.parametrize("fill", [-1.0, 0.0, 1e4])
def test_masked_entries_change_nothing_even_where_their_exponential_overflows(loss_type, fill):
    lp, old, ref, mask = fixture()
    other = (lp.masked_fill(~mask, fill), old.masked_fill(~mask, -fill), ref.masked_fill(~mask, 2 * fill))
    options = dict(loss_type=loss_type, beta=0.1, max_completion_length=4)
    assert grpo_loss(*other, A, mask, **options)[0].item() == pytest.approx(loss_of(loss_type=loss_type, beta=0.1)[0])


@pytest.mark.parametrize("loss_type", GOLDEN)
def test_appended_padding_columns_change_nothing(loss_type):
    """dr_grpo must divide by the constant max_completion_length, not by the padded width."""
    tensors = [torch.nn.functional.pad(v, (0, 5)) for v in fixture()]
    loss, _ = grpo_loss(*tensors[:3], A, tensors[3], loss_type=loss_type, beta=0.1, max_completion_length=4)
    assert loss.item() == pytest.approx(loss_of(loss_type=loss_type, beta=0.1)[0], abs=1e-12)


def test_length_bias_per_token_gradient_halves_in_grpo_and_not_in_dr_grpo():
    def token_gradient(loss_type, length):
        lp = torch.zeros(1, 8, dtype=torch.float64, requires_grad=True)
        mask = torch.arange(8)[None] < length
        loss, _ = grpo_loss(
            lp, lp.detach(), None, torch.ones(1, dtype=torch.float64), mask,
            loss_type=loss_type, beta=0.0, max_completion_length=8,
        )  # fmt: skip
        loss.backward()
        return lp.grad[0, 0].item()

    assert token_gradient("grpo", 8) == pytest.approx(token_gradient("grpo", 4) / 2)
    assert token_gradient("dr_grpo", 8) == pytest.approx(token_gradient("dr_grpo", 4))


@pytest.mark.parametrize("loss_type", GOLDEN)
def test_a_batch_without_loss_tokens_has_loss_zero_and_a_finite_gradient(loss_type):
    lp = torch.randn(4, 3, requires_grad=True)
    loss, metrics = grpo_loss(
        lp, lp.detach(), torch.randn(4, 3), torch.ones(4), torch.zeros(4, 3, dtype=torch.bool),
        loss_type=loss_type, beta=0.1, max_completion_length=4, num_loss_tokens=0,
    )  # fmt: skip
    loss.backward()
    assert loss.item() == 0 and (lp.grad == 0).all()
    assert all(math.isfinite(v) for v in metrics.values())


def test_k3_is_an_unbiased_estimate_of_the_kl_and_pulls_towards_the_reference():
    torch.manual_seed(0)
    policy, reference = torch.randn(2, 6, dtype=torch.float64).log_softmax(-1)
    exact = (policy.exp() * (policy - reference)).sum().item()
    actions = torch.multinomial(policy.exp(), 200_000, replacement=True)
    lp, ref = policy[actions][:, None], reference[actions][:, None]
    options = dict(loss_type="grpo", beta=1.0, max_completion_length=1)
    zero, mask = torch.zeros(len(lp), dtype=torch.float64), torch.ones_like(lp, dtype=torch.bool)
    _, metrics = grpo_loss(lp, lp, ref, zero, mask, **options)
    assert metrics["kl"].item() == pytest.approx(exact, rel=0.02)
    for start, sign in [(-0.2, 1.0), (-3.0, -1.0)]:  # above and below the reference at -1: gradient down, up
        lp = torch.tensor([[start]], requires_grad=True)
        ref = torch.tensor([[-1.0]])
        loss, metrics = grpo_loss(lp, lp.detach(), ref, torch.zeros(1), torch.ones(1, 1, dtype=torch.bool), **options)
        loss.backward()
        assert metrics["kl"] > 0 and math.copysign(1, lp.grad.item()) == sign


def test_equal_rewards_leave_only_the_gradient_of_the_kl():
    torch.manual_seed(0)
    lp, ref = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3)
    mask = torch.ones(4, 3, dtype=torch.bool)
    advantages = group_advantages(torch.ones(4), 4)
    loss, _ = grpo_loss(lp, lp.detach(), ref, advantages, mask, loss_type="grpo", beta=0.1, max_completion_length=3)
    (got,) = torch.autograd.grad(loss, lp)
    expected = 0.1 * (1 - torch.exp(ref - lp.detach())) / 12  # eq: d k3 / d logp = 1 - exp(ref - logp)
    assert torch.allclose(got, expected, atol=1e-6)


def test_small_kl_keeps_its_precision_in_float32():
    lp = torch.full((1, 1), -1.0)
    _, metrics = grpo_loss(
        lp, lp, lp + 1e-4, torch.zeros(1), torch.ones(1, 1, dtype=torch.bool),
        loss_type="grpo", beta=1.0, max_completion_length=1,
    )  # fmt: skip
    assert metrics["kl"].item() == pytest.approx(0.5e-8, rel=0.05)  # k3 ~ d^2 / 2; exp(d) - d - 1 would give 0 or 1e-7


@pytest.mark.parametrize("size", [None, 1, 2, 4, 8, 16, 24])
def test_micro_batches_cover_every_row_once_and_pair_it_with_its_prompt(size):
    num_prompts, G = 6, 8
    rows, prompts = torch.arange(num_prompts * G), torch.arange(num_prompts)
    seen = []
    for p, r in micro_batches(num_prompts, G, size):
        chunk = rows[r].tolist()
        seen += chunk
        assert len(chunk) == (size or 48)
        owners = prompts[p].repeat_interleave(len(chunk) // len(prompts[p])).tolist()
        assert owners == [row // G for row in chunk]
    assert seen == rows.tolist()


class Sized:
    """A model of so many parameters."""

    def __init__(self, n):
        self.n = n

    def parameters(self):
        return [torch.empty(self.n, device="meta")]


@pytest.mark.parametrize(
    "flags, parameters, longest, processes, size",
    [
        ({}, 1_600_000, 24, 1, 256),  # the default run: the whole batch, as ever
        ({"batch_size": 240}, 1_600_000, 70, 1, 240),  # that of grpo_mixed.py
        ({"share_prompt": False}, 1_600_000, 24, 1, 256),
        ({"max_completion_length": 256}, 494_032_768, 45, 1, 48),  # of 77,056 tokens
        ({"max_completion_length": 256}, 494_032_768, 45, 2, 48),  # of half of them
        ({"max_completion_length": 256}, 1_543_714_304, 45, 1, 16),
        ({"max_completion_length": 256}, 7_615_616_512, 45, 1, 2),  # no room for a group: a part of one
        ({"max_completion_length": 4096}, 7_615_616_512, 45, 1, 1),
        ({"max_completion_length": 256, "share_prompt": True}, 494_032_768, 45, 1, 48),
        ({"micro_batch_size": 4}, 1_600_000, 24, 1, 4),
    ],
)
def test_a_micro_batch_has_as_many_rows_as_a_budget_of_tokens_holds(flags, parameters, longest, processes, size):
    args = with_micro_batches(Args(**flags), Sized(parameters), longest, processes)
    assert args.micro_batch_size == size and args == Args(**flags | {"micro_batch_size": size})
    own = micro_batches(args.batch_size // args.num_generations // processes, args.num_generations, size)
    assert sum(rows.stop - rows.start for _, rows in own) == args.batch_size // processes


# ---- objectives of later papers, and the two gradients of the KL -----------------------------------------------------

OLD_2 = [[-1.2, -0.7, -2.0], [-0.4, -1.1, -0.9], [-1.5, -0.3, -0.6], [-0.8, -2.2, -1.0]]
MOVED = [[0.30, -0.10, 0.05], [-0.25, 0.40, 0.0], [0.02, 0.15, -0.30], [-0.05, -0.45, 0.20]]
APART = [[0.10, 0.20, -0.30], [0.05, -0.15, 0.25], [-0.20, 0.0, 0.10], [0.15, -0.05, 0.30]]
# (loss, ratio, beta, KL gradient) -> loss, norm of its gradient, two entries of it
GOLDEN_2 = {
    ("grpo", "token", 0, "k3"): (0.035596975, 0.326968478, 0.000000000, 0.142684414),
    ("grpo", "token", 0.1, "k3"): (0.040411561, 0.328508045, 0.001510577, 0.137149345),
    ("grpo", "token", 0.1, "reverse"): (0.040886410, 0.331706697, 0.002249765, 0.137928267),
    ("grpo", "sequence", 0, "k3"): (0.012390863, 0.337710975, -0.067931503, 0.142684414),
    ("grpo", "sequence", 0.1, "k3"): (0.017205449, 0.336119206, -0.066420926, 0.137149345),
    ("grpo", "sequence", 0.1, "reverse"): (0.017396571, 0.337168717, -0.065917454, 0.137928267),
    ("bnpo", "token", 0, "k3"): (-0.238522449, 0.322836888, 0.000000000, 0.063415295),
    ("bnpo", "token", 0.1, "k3"): (-0.233560888, 0.325551795, 0.002014103, 0.060955264),
    ("bnpo", "token", 0.1, "reverse"): (-0.233190162, 0.327179366, 0.002999686, 0.061301452),
    ("dr_grpo", "token", 0, "k3"): (-0.107335102, 0.145276599, 0.000000000, 0.028536883),
    ("dr_grpo", "token", 0.1, "k3"): (-0.105102400, 0.146498308, 0.000906346, 0.027429869),
    ("dr_grpo", "token", 0.1, "reverse"): (-0.104935573, 0.147230715, 0.001349859, 0.027585653),
    ("dapo", "token", 0, "k3"): (-0.238522449, 0.322836888, 0.000000000, 0.063415295),
    ("dapo", "token", 0.1, "k3"): (-0.233560888, 0.325551795, 0.002014103, 0.060955264),
    ("dapo", "token", 0.1, "reverse"): (-0.233190162, 0.327179366, 0.002999686, 0.061301452),
    ("cispo", "token", 0, "k3"): (0.350476927, 0.358576784, -0.112488234, 0.063415295),
    ("cispo", "token", 0.1, "k3"): (0.355438488, 0.359226310, -0.110474131, 0.060955264),
    ("cispo", "token", 0.1, "reverse"): (0.355809214, 0.360781832, -0.109488548, 0.061301452),
    ("sapo", "token", 0, "k3"): (-0.022519754, 0.347791339, -0.081836312, 0.142590912),
    ("sapo", "token", 0.1, "k3"): (-0.017705168, 0.347140013, -0.080325735, 0.137055843),
    ("sapo", "token", 0.1, "reverse"): (-0.017230319, 0.350288717, -0.079586548, 0.137834765),
}


@pytest.mark.parametrize("case", GOLDEN_2, ids=lambda c: " ".join(map(str, c)))
def test_every_objective_and_either_kl_have_the_golden_values(case):
    loss_type, importance, beta, kl_gradient = case
    old, moved, apart = (torch.tensor(v, dtype=torch.float64) for v in (OLD_2, MOVED, APART))
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]]).bool()
    advantages = torch.tensor([0.75, -1.25, 1.10, -0.60], dtype=torch.float64)
    lp = (old + moved).requires_grad_(True)
    loss, metrics = grpo_loss(
        lp, old, old + apart if beta else None, advantages, mask, loss_type=loss_type, beta=beta,
        importance=importance, kl_gradient=kl_gradient, max_completion_length=5,
    )  # fmt: skip
    (grad,) = torch.autograd.grad(loss, lp)
    assert (loss.item(), grad.norm().item(), grad[0, 0].item(), grad[3, 0].item()) == pytest.approx(
        GOLDEN_2[case], abs=1e-9
    )
    assert (grad[~mask] == 0).all() and all(v.isfinite() and not v.requires_grad for v in metrics.values())


@pytest.mark.parametrize("stale", [False, True], ids=["on policy", "one update later"])
@pytest.mark.parametrize("kl_gradient", ["k3", "reverse"])
def test_on_average_each_kl_gradient_is_that_of_its_own_direction(kl_gradient, stale):
    """Exact expectations over three outcomes: the loss of a batch with one row per outcome, weighted by its probability.

    k3's gradient is that of KL(ref || pi), the ratio's is that of KL(pi || ref), also where another policy has sampled.
    """
    logits = torch.tensor([0.3, -0.8, 0.1], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-0.5, 0.4, 0.2], dtype=torch.float64).log_softmax(0)
    policy = logits.log_softmax(0)
    sampler = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64).log_softmax(0) if stale else policy.detach()
    total = 0.0
    for outcome in range(3):
        lp, old, ref = (p[outcome].view(1, 1) for p in (policy, sampler, reference))
        loss, _ = grpo_loss(
            lp, old, ref, torch.zeros(1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.bool), loss_type="grpo",
            beta=1.0, kl_gradient=kl_gradient, max_completion_length=1,
        )  # fmt: skip
        total = total + sampler[outcome].exp() * loss
    (found,) = torch.autograd.grad(total, logits, retain_graph=True)
    forward = (reference.exp() * (reference - policy)).sum()
    reverse = (policy.exp() * (policy - reference)).sum()
    forward, reverse = (torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (forward, reverse))
    assert (forward - reverse).abs().max() > 0.05  # they are not the same thing
    if kl_gradient == "reverse":
        assert torch.allclose(found, reverse, atol=1e-12)
    elif not stale:
        assert torch.allclose(found, forward, atol=1e-12)
    else:  # k3 alone corrects nothing: off policy it is the gradient of neither
        assert not torch.allclose(found, forward, atol=0.02) and not torch.allclose(found, reverse, atol=0.02)


def test_off_policy_objectives_are_grpos_where_nothing_has_moved_yet():
    """At ratio 1 GSPO and SAPO have grpo's gradient and CISPO dapo's: only further iterations tell them apart."""
    old, _, _ = (torch.tensor(v, dtype=torch.float64) for v in (OLD_2, MOVED, APART))
    mask = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 0, 0]]).bool()
    advantages = torch.tensor([0.75, -1.25, 1.10, -0.60], dtype=torch.float64)

    def gradient(**options):
        lp = old.clone().requires_grad_(True)
        loss, _ = grpo_loss(lp, old, None, advantages, mask, beta=0, max_completion_length=5, **options)
        return torch.autograd.grad(loss, lp)[0]

    same = {
        "grpo": [{"loss_type": "sapo"}, {"loss_type": "grpo", "importance": "sequence"}],
        "dapo": [{"loss_type": "cispo"}],
    }
    for name, others in same.items():
        for options in others:
            assert torch.allclose(gradient(**options), gradient(loss_type=name), atol=1e-12), options


def test_the_policy_term_trains_the_chosen_tokens_and_the_kl_all():
    lp, old, ref, mask = fixture()
    chosen = torch.tensor([[1, 0, 0], [1, 0, 0], [0, 1, 0], [0, 0, 0]]).bool()
    grads = []
    for beta in (0.0, 0.1):
        x = lp.clone().requires_grad_(True)
        loss, _ = grpo_loss(x, old, ref, A, mask, loss_type="dapo", beta=beta, max_completion_length=4, trained=chosen)
        grads.append(torch.autograd.grad(loss, x)[0])
    assert ((grads[0] != 0) <= chosen).all() and (grads[0][0, 0] != 0 or grads[0][2, 1] != 0)
    assert torch.equal(grads[1] != 0, mask & (lp != ref) | (grads[0] != 0))


def test_the_others_mean_is_the_groups_without_ones_own_reward():
    rewards = torch.tensor([1, 0, 0, 0.5, 1, math.nan, 1, -1], dtype=torch.float64)
    found = group_advantages(rewards, 4, "none", "others").tolist()
    assert found == pytest.approx([5 / 6, -0.5, -0.5, 1 / 6, 1, 0, 1, -2], abs=1e-12)
    assert group_advantages(torch.tensor([math.nan, 2, math.nan, math.nan]), 4, "none", "others").tolist() == [0] * 4


def test_rewards_normalised_before_their_sum_let_a_rare_one_speak():
    """GDPO: each function by its own group, then the sum by the batch; missing rewards leave their completion out."""
    args = Args(num_generations=4, normalize_rewards=True, reward_weights=(1.0, 0.5))
    parts = torch.tensor([[9, 0], [-9, 0], [9, 1], [-9, 0], [1, 1], [1, 0], [1, 0], [2, 0]], dtype=torch.float32)
    weights = torch.tensor(args.reward_weights)

    def normal(column):
        groups = column.view(2, 4)
        return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).view(-1)

    sums = normal(parts[:, 0]) + 0.5 * normal(parts[:, 1])
    expected = (sums - sums.mean()) / (sums.std() + 1e-4)
    assert torch.allclose(advantages_of(parts @ weights, parts, args), expected, atol=1e-6)
    plain = advantages_of(parts @ weights, parts, Args(num_generations=4, reward_weights=(1.0, 0.5)))
    assert torch.equal(plain, group_advantages(parts @ weights, 4))
    assert (expected[2] - expected[0]) > 10 * (plain[2] - plain[0])  # a spread of 9 drowned the second function
    parts[0, 1] = math.nan
    found = advantages_of(parts @ weights, parts, args)
    assert found[0] == 0 and found.isfinite().all() and found[1:].std() > 0.5
