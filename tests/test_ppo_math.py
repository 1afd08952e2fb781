"""The equations of PPO: GAE, the loss, densities, statistics, minibatches."""

import math
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ppo_fetch
from common.parallel import World
from common.robot import sim
from ppo_fetch import Agent, Args, RunningStatistics, gae, logprobs_entropy, normalize_advantages, ppo_loss, sample

WORLD = World(0, 1, torch.device("cpu"))
ARGS = replace(
    Args(),
    num_envs=4,
    num_steps=8,
    num_minibatches=2,
    hidden=16,
    gamma=0.9,
    target_kl=0.03,
    update_epochs=3,
    learning_rate=1e-3,
)
BOX, DISCRETE = gym.spaces.Box(-1, 1, (3,)), gym.spaces.Discrete(5)


def make_agent(space=BOX, obs_dim=6, seed=0, **changes) -> Agent:
    torch.manual_seed(seed)
    agent = Agent(obs_dim, space, replace(ARGS, **changes))
    with torch.no_grad():  # a head of gain 0.01 would hide mistakes
        agent.actor_head.weight.mul_(50)
    return agent


def random_batch(agent: Agent, T=8, n=4, seed=0) -> dict:
    g = torch.Generator().manual_seed(seed)
    obs = torch.randn(T, n, 6, generator=g)
    with torch.no_grad():
        flat = obs.flatten(0, 1)
        noise = torch.rand(T * n, 1, generator=g) if agent.choices else torch.randn(T * n, 3, generator=g)
        policy = agent.policy(flat)
        actions = sample(agent, policy, noise)
        logprobs = logprobs_entropy(agent, policy, actions)[0]
        values = agent.value(flat)
    return {
        "obs": obs,
        "actions": actions.view(T, n, *actions.shape[1:]),
        "logprobs": logprobs.view(T, n),
        "rewards": torch.randn(T, n, generator=g),
        "values": values.view(T, n),
        "advantages": torch.randn(T, n, generator=g),
        "returns": torch.randn(T, n, generator=g),
        "valid": torch.ones(T, n, dtype=torch.bool),
    }


def run_update(agent, batch, args=ARGS, lr=1e-3, scaler=None):
    optimizer = torch.optim.Adam(agent.parameters(), lr=lr, eps=1e-5)
    scaler = scaler or torch.amp.GradScaler("cpu", enabled=False)
    loss_of = torch.compile(ppo_fetch.minibatch_loss) if args.compile else ppo_fetch.minibatch_loss
    generator = torch.Generator().manual_seed(0)
    return ppo_fetch.update(agent, loss_of, optimizer, scaler, batch, args, generator, WORLD)


# ---- advantages ------------------------------------------------------------------------------------------------------


def gae_by_definition(rewards, values, next_values, terminations, dones, gamma, lam):
    """A_t = sum over l of (gamma lambda)^l delta_{t+l}, as long as no episode ended in between: O(T^2), no recursion."""
    T, N = rewards.shape
    out = torch.zeros_like(rewards)
    for n in range(N):
        for t in range(T):
            for k in range(t, T):
                bootstrap = 0.0 if terminations[k, n] else gamma * next_values[k, n]
                out[t, n] += (gamma * lam) ** (k - t) * (rewards[k, n] + bootstrap - values[k, n])
                if dones[k, n]:
                    break
    return out


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 12), st.integers(1, 4), st.floats(0.5, 1.0), st.floats(0.0, 1.0), st.integers(0, 10**6))
def test_gae_equals_its_definition_over_random_ends(T, N, gamma, lam, seed):
    g = torch.Generator().manual_seed(seed)
    rewards, values, next_values = (torch.randn(T, N, generator=g, dtype=torch.float64) for _ in range(3))
    terminations, truncations = (torch.rand(T, N, generator=g) < 0.2 for _ in range(2))
    args = rewards, values, next_values, terminations, terminations | truncations, gamma, lam
    advantages, returns = gae(*args)
    torch.testing.assert_close(advantages, gae_by_definition(*args))
    torch.testing.assert_close(returns, advantages + values)


def test_gae_equals_the_rollout_buffer_of_stable_baselines3():
    """SB3 has one mask (episode starts) and adds gamma * V(final) to the reward at time limits: the same numbers."""
    sb3 = pytest.importorskip("stable_baselines3.common.buffers", reason="stable-baselines3 is in the bench group")
    T, N, gamma, lam = 20, 3, 0.93, 0.9
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(T, N)).astype(np.float32), rng.normal(size=(T + 1, N)).astype(np.float32)
    terminations, truncations = rng.random((T, N)) < 0.1, rng.random((T, N)) < 0.1
    truncations &= ~terminations
    dones, final_values = terminations | truncations, rng.normal(size=(T, N)).astype(np.float32)
    buffer = sb3.RolloutBuffer(T, gym.spaces.Box(-1, 1, (1,)), gym.spaces.Box(-1, 1, (1,)), "cpu", lam, gamma, N)
    starts = np.zeros(N)
    for t in range(T):
        r = rewards[t] + gamma * final_values[t] * truncations[t]
        zero = np.zeros((N, 1), np.float32)
        buffer.add(zero, zero, r, starts, torch.from_numpy(values[t]), torch.zeros(N))
        starts = dones[t].astype(np.float32)
    buffer.compute_returns_and_advantage(torch.from_numpy(values[T]), dones[T - 1])
    next_values = np.where(dones, final_values, values[1:])
    tensors = [torch.from_numpy(x) for x in (rewards, values[:T], next_values, terminations, dones)]
    advantages, returns = gae(*tensors, gamma, lam)
    np.testing.assert_allclose(advantages, buffer.advantages, atol=1e-5)
    np.testing.assert_allclose(returns, buffer.returns, atol=1e-5)


def test_a_time_limit_keeps_the_next_value_and_a_termination_drops_it():
    one = torch.ones(1, 1)
    for terminated, expected in ((False, 1 + 0.9 * 7 - 2), (True, 1 - 2)):
        advantages, _ = gae(one, 2 * one, 7 * one, torch.tensor([[terminated]]), one.bool(), 0.9, 0.95)
        assert advantages.item() == pytest.approx(expected)


def test_an_episode_is_worth_its_return_against_those_that_began_where_it_did():
    """Two episodes of 3 steps in each of 6 environments, groups of 3; in the last group of the second, nothing varies."""
    rewards = torch.randn(6, 6, generator=torch.Generator().manual_seed(0))
    rewards[3:, 3:] = torch.tensor([[0.1], [0.2], [0.3]])
    dones = torch.zeros(6, 6, dtype=torch.bool)
    dones[[2, 5]] = True
    found = ppo_fetch.episode_advantages(rewards, dones, 0.5, 3)
    for first in (0, 3):
        for group in (slice(0, 3), slice(3, 6)):
            r = rewards[first : first + 3, group].double()
            returns = r[0] + 0.5 * r[1] + 0.25 * r[2]
            expected = (returns - returns.mean()) / (returns.std() + 1e-4)
            for step in range(first, first + 3):
                torch.testing.assert_close(found[step, group], expected.float(), atol=1e-6, rtol=1e-6)
    assert torch.equal(found[3:, 3:], torch.zeros(3, 3)) and sim.alike(found[dones], 3, WORLD) == 0.25


def test_nothing_leaks_over_the_end_of_an_episode():
    """The off-by-one of storing the end one step late would let the huge value after it into the step before."""
    zeros = torch.zeros(4, 1)
    dones = torch.tensor([[False], [True], [False], [False]])
    values = torch.tensor([[0.0], [0.0], [1e6], [1e6]])
    next_values = torch.tensor([[0.0], [0.0], [1e6], [1e6]])  # what followed step 1 was worth 0
    advantages, _ = gae(zeros, values, next_values, zeros.bool(), dones, 0.99, 0.95)
    assert advantages[:2].abs().max() == 0


# ---- the loss --------------------------------------------------------------------------------------------------------


def test_loss_by_hand():
    """Two rows: one ratio inside the clip range, one beyond it with a positive advantage."""
    old = torch.zeros(2)
    new = torch.log(torch.tensor([1.1, 1.5]))
    advantages, returns = torch.tensor([-1.0, 2.0]), torch.tensor([1.0, 0.0])
    values, entropy = torch.tensor([0.0, 2.0]), torch.tensor([3.0, 5.0])
    loss, m = ppo_loss(new, old, advantages, entropy, values, returns, ent_coef=0.1, vf_coef=0.5)
    assert m["policy_loss"].item() == pytest.approx(-(-1.1 + 1.2 * 2.0) / 2)
    assert m["value_loss"].item() == pytest.approx(0.5 * (1 + 4) / 2)
    assert loss.item() == pytest.approx(-0.65 + 0.5 * 1.25 - 0.1 * 4, abs=1e-6)
    assert m["clipfrac"].item() == 0.5
    expected_kl = ((1.1 - 1 - math.log(1.1)) + (1.5 - 1 - math.log(1.5))) / 2
    assert m["approx_kl"].item() == pytest.approx(expected_kl, abs=1e-6)


def test_gradient_is_reinforce_at_ratio_one_and_zero_beyond_the_clip():
    logp = torch.zeros(3, requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 0.5])
    zeros = torch.zeros(3)
    loss, _ = ppo_loss(logp, zeros, advantages, zeros, zeros, zeros)
    torch.testing.assert_close(torch.autograd.grad(loss, logp)[0], -advantages / 3)
    far = torch.log(torch.tensor([1.5, 0.5, 1.5])).requires_grad_()
    loss, _ = ppo_loss(far, zeros, torch.tensor([1.0, -1.0, -1.0]), zeros, zeros, zeros)
    g = torch.autograd.grad(loss, far)[0]
    assert g[0] == 0 and g[1] == 0 and g[2] > 0  # too likely a bad action is still pushed down


# ---- densities -------------------------------------------------------------------------------------------------------


def test_logprob_and_entropy_equal_torch_distributions():
    agent = make_agent()
    with torch.no_grad():
        agent.log_std.copy_(torch.tensor([-1.0, 0.0, 0.7]))
    policy, actions = torch.randn(9, 3), torch.randn(9, 3)
    expected = torch.distributions.Independent(torch.distributions.Normal(policy, agent.log_std.exp()), 1)
    logp, entropy = logprobs_entropy(agent, policy, actions)
    torch.testing.assert_close(logp, expected.log_prob(actions))
    torch.testing.assert_close(entropy, expected.entropy())
    agent = make_agent(DISCRETE)
    policy, actions = torch.randn(9, 5), torch.randint(0, 5, (9,))
    logp, entropy = logprobs_entropy(agent, policy, actions)
    expected = torch.distributions.Categorical(logits=policy)
    torch.testing.assert_close(logp, expected.log_prob(actions))
    torch.testing.assert_close(entropy, expected.entropy())


def test_samples_follow_the_density():
    agent = make_agent(DISCRETE)
    logits = torch.tensor([[0.0, 1.0, 2.0, -1.0, 0.5]]).expand(50_000, 5)
    counts = torch.bincount(sample(agent, logits, torch.rand(50_000, 1))[:, 0], minlength=5) / 50_000
    torch.testing.assert_close(counts, logits[0].softmax(-1), atol=0.01, rtol=0)
    agent = make_agent()
    mean = torch.tensor([[0.1, -0.2, 0.3]]).expand(50_000, 3)
    actions = sample(agent, mean, torch.randn(50_000, 3))
    torch.testing.assert_close(actions.mean(0), mean[0], atol=0.01, rtol=0)
    torch.testing.assert_close(actions.std(0), agent.log_std.exp(), atol=0.01, rtol=0)


# ---- statistics ------------------------------------------------------------------------------------------------------


def test_running_statistics_equal_numpy_over_all_the_data():
    parts = [np.random.default_rng(i).normal(1e3, 10.0**i, size=(50 * (i + 1), 4)) for i in range(4)]
    statistics = RunningStatistics(4)
    for part in parts:
        statistics.update(torch.from_numpy(part))
    whole = np.concatenate(parts)
    np.testing.assert_allclose(statistics.mean, whole.mean(0), rtol=1e-12)
    np.testing.assert_allclose(statistics.var, whole.var(0), rtol=1e-9)
    assert statistics.count.item() == len(whole)


def test_statistics_travel_with_the_weights():
    agent, twin = make_agent(seed=0), make_agent(seed=1)
    agent.statistics.update(torch.randn(100, 6) * 3 + 5)
    twin.load_state_dict(agent.state_dict())
    x = torch.randn(7, 6)
    assert torch.equal(agent.policy(x), twin.policy(x)) and torch.equal(agent.value(x), twin.value(x))


def test_a_constant_feature_does_not_explode():
    agent = make_agent()
    x = torch.ones(50, 6)
    x[:, 0] += torch.randn(50) * 1e-7
    agent.statistics.update(x)
    assert agent.normalize(x).abs().max() < 1e-2
    assert agent.normalize(x + 1e9).abs().max() <= 10


def test_rewards_a_thousand_times_larger_are_the_same_task():
    """Scaling by the running std of the return makes the update independent of the reward's unit."""
    rewards, dones = torch.randn(40, 3).double(), torch.rand(40, 3) < 0.1
    scaled = []
    for factor in (1.0, 1000.0):
        agent, carry = make_agent(), torch.zeros(3, dtype=torch.float64)
        agent.return_statistics.update(sim.returns_of(rewards * factor, dones, carry, 0.9).reshape(-1, 1))
        scaled.append(rewards * factor * agent.reward_scale())
    torch.testing.assert_close(scaled[0], scaled[1], rtol=1e-5, atol=0)


def test_discounted_returns_start_anew_after_an_end_and_go_on_over_batches():
    rewards, dones = torch.ones(6, 1), torch.tensor([0, 0, 1, 0, 0, 0]).bool()[:, None]
    whole = sim.returns_of(rewards, dones, torch.zeros(1, dtype=torch.float64), 0.5)
    torch.testing.assert_close(whole[:, 0], torch.tensor([1, 1.5, 1.75, 1, 1.5, 1.75]).double())
    carry = torch.zeros(1, dtype=torch.float64)
    parts = [sim.returns_of(r, d, carry, 0.5) for r, d in zip(rewards.split(2), dones.split(2))]
    torch.testing.assert_close(torch.cat(parts), whole)


def test_normalised_advantages_have_zero_mean_unit_std_and_one_row_stays():
    a = normalize_advantages(torch.randn(64) * 5 + 3, WORLD)
    assert abs(a.mean()) < 1e-6 and a.std().item() == pytest.approx(1, abs=1e-5)
    torch.testing.assert_close(normalize_advantages(torch.tensor([4.0]), WORLD), torch.tensor([4.0]))
    assert normalize_advantages(torch.full((8,), 3.0), WORLD).abs().max() < 1e-6


# ---- the update ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("space", [BOX, DISCRETE], ids=["box", "discrete"])
def test_before_any_step_the_ratio_is_exactly_one(amp, space):
    """Weights, statistics and precision at the update are those of the rollout, so w = 1, not about 1."""
    agent = make_agent(space, amp=amp)
    agent.statistics.update(torch.randn(50, 6) * 2 + 1)
    metrics = run_update(agent, random_batch(agent), replace(ARGS, amp=amp))
    assert metrics["first_ratio_error"] == 0.0 and metrics["optimizer_steps"] == 6


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("amp", ["off", "bf16", "fp16"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_on_a_gpu_the_ratio_is_one_too(amp, compiled):
    agent = make_agent(amp=amp).cuda()
    if compiled:
        agent.policy = torch.compile(agent.policy)
    batch = {key: value.cuda() for key, value in random_batch(make_agent(amp="off")).items()}
    with torch.no_grad():
        policy = agent.policy(batch["obs"].flatten(0, 1))
        batch["logprobs"] = logprobs_entropy(agent, policy, batch["actions"].flatten(0, 1))[0].view(8, 4)
    world = World(0, 1, torch.device("cuda"))
    optimizer = torch.optim.Adam(agent.parameters(), lr=1e-3, eps=1e-5, fused=True)
    scaler = torch.amp.GradScaler("cuda", enabled=amp == "fp16", init_scale=1024.0)
    args = replace(ARGS, amp=amp, compile=compiled)
    loss_of = torch.compile(ppo_fetch.minibatch_loss) if compiled else ppo_fetch.minibatch_loss
    metrics = ppo_fetch.update(agent, loss_of, optimizer, scaler, batch, args, torch.Generator().manual_seed(0), world)
    assert metrics["first_ratio_error"] < (1e-6 if amp == "off" else 1e-2) and metrics["optimizer_steps"] > 0


@pytest.mark.parametrize("space", [BOX, DISCRETE], ids=["box", "discrete"])
def test_a_compiled_loss_is_one_graph_that_takes_the_same_steps(space, monkeypatch):
    """Traced without a break; the code generator, which takes half a minute, is left out."""
    compiler, agents, found = torch.compile, [make_agent(space), make_agent(space)], []
    monkeypatch.setattr(torch, "compile", lambda f: compiler(f, backend="aot_eager", fullgraph=True))
    for agent, args in zip(agents, (ARGS, replace(ARGS, compile=True))):
        found.append(run_update(agent, random_batch(agent), args))
    for name, value in found[0].items():
        assert float(found[1][name]) == pytest.approx(float(value), rel=1e-4, abs=1e-6), name
    for a, b in zip(agents[0].parameters(), agents[1].parameters()):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_updating_the_statistics_before_the_update_is_noticed():
    agent = make_agent()
    batch = random_batch(agent)
    agent.statistics.update(batch["obs"].flatten(0, 1) * 3 + 1)
    assert run_update(agent, batch)["first_ratio_error"] > 1e-3


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_low_precision_stays_in_the_hidden_layers(amp):
    full, low = make_agent(), make_agent(amp=amp)
    x = torch.randn(200, 6)
    assert low.policy(x).dtype == low.value(x).dtype == torch.float32
    grads = []
    for agent in (full, low):
        batch = random_batch(full)
        logp, entropy = logprobs_entropy(
            agent, agent.policy(x), torch.randn(200, 3, generator=torch.Generator().manual_seed(1))
        )
        assert logp.dtype == entropy.dtype == torch.float32
        advantages = torch.randn(200, generator=torch.Generator().manual_seed(2))
        loss, _ = ppo_loss(logp, logp.detach(), advantages, entropy, agent.value(x), advantages * 2)
        assert loss.dtype == torch.float32
        loss.backward()
        assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in agent.parameters())
        grads.append(torch.cat([p.grad.flatten() for p in agent.parameters()]))
    assert torch.nn.functional.cosine_similarity(*grads, dim=0) > 0.99
    assert not torch.equal(*grads) and batch is not None


def test_target_kl_takes_no_further_step():
    """With a huge step size the second minibatch is already beyond the limit: exactly one step is taken."""
    agent = make_agent()
    metrics = run_update(agent, random_batch(agent), replace(ARGS, target_kl=0.02), lr=0.5)
    assert metrics["kl_stop"] == 1.0 and metrics["optimizer_steps"] == 1 and metrics["approx_kl"] > 0.02
    twin = make_agent()
    order = ppo_fetch.minibatch_order(32, torch.Generator().manual_seed(0))[:16]
    batch = random_batch(twin)
    mb = {key: value.flatten(0, 1)[order] for key, value in batch.items()}
    logp, entropy = logprobs_entropy(twin, twin.policy(mb["obs"]), mb["actions"])
    loss, _ = ppo_loss(logp, mb["logprobs"], normalize_advantages(mb["advantages"], WORLD), entropy,
                       twin.value(mb["obs"]), mb["returns"])  # fmt: skip
    optimizer = torch.optim.Adam(twin.parameters(), lr=0.5, eps=1e-5)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)
    optimizer.step()
    for a, b in zip(agent.parameters(), twin.parameters()):
        torch.testing.assert_close(a, b)
    agent = make_agent()
    assert run_update(agent, random_batch(agent), replace(ARGS, target_kl=0), lr=0.5)["optimizer_steps"] == 6


def test_an_infinite_gradient_under_fp16_changes_no_parameter():
    agent = make_agent(amp="fp16")
    batch = random_batch(agent)
    batch["returns"][0, 0] = float("inf")
    before = [p.detach().clone() for p in agent.parameters()]
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    args = replace(ARGS, amp="fp16", num_minibatches=1, update_epochs=1)
    metrics = run_update(agent, batch, args, scaler=scaler)
    assert metrics["optimizer_steps"] == 0 and metrics["skipped_steps"] == 1 and scaler.get_scale() == 512.0
    assert all(torch.equal(a, b) for a, b in zip(before, agent.parameters()))


@pytest.mark.parametrize("what", ["returns", "logprobs"])
def test_numbers_that_are_none_pass_no_guard_and_change_no_parameter(what):
    agent = make_agent()
    batch = random_batch(agent)
    batch[what][0, 0] = float("nan")
    before = [p.detach().clone() for p in agent.parameters()]
    metrics = run_update(agent, batch, replace(ARGS, num_minibatches=1, update_epochs=1))
    assert metrics["optimizer_steps"] == 0
    assert metrics["skipped_steps"] == (what == "returns") and metrics["kl_stop"] == (what == "logprobs")
    assert all(torch.equal(a, b) for a, b in zip(before, agent.parameters()))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4), st.integers(0, 10**6))
def test_every_row_of_the_batch_is_computed_by_one_process(T, n, size, seed):
    rows = torch.randperm(T * n * size, generator=torch.Generator().manual_seed(seed))[: T * n]
    found = []
    for rank in range(size):
        local = ppo_fetch.own_rows(rows, n, World(rank, size, torch.device("cpu")))
        found += [(int(i) // n, rank * n + int(i) % n) for i in local]  # (step, environment)
    assert sorted(found) == sorted((int(r) // (n * size), int(r) % (n * size)) for r in rows)


def test_every_epoch_sees_each_row_once_in_a_new_order(monkeypatch):
    orders = []
    original = ppo_fetch.minibatch_order

    def spy(num, generator):
        orders.append(original(num, generator))
        return orders[-1]

    monkeypatch.setattr(ppo_fetch, "minibatch_order", spy)
    agent = make_agent()
    run_update(agent, random_batch(agent))
    assert len(orders) == 3
    assert all(sorted(order.tolist()) == list(range(32)) for order in orders)
    assert not torch.equal(orders[0], orders[1])


def test_rows_that_are_not_valid_teach_nothing():
    agents = [make_agent() for _ in range(2)]
    batch = random_batch(agents[0])
    batch["valid"][3] = False
    poisoned = {key: value.clone() for key, value in batch.items()}
    poisoned["advantages"][3], poisoned["returns"][3] = 1e6, -1e6
    for agent, b in zip(agents, (batch, poisoned)):
        run_update(agent, b)
    for a, b in zip(agents[0].parameters(), agents[1].parameters()):
        assert torch.equal(a, b)


def test_initialisation_is_orthogonal_with_the_documented_gains():
    torch.manual_seed(0)
    agent = Agent(6, BOX, replace(ARGS, hidden=32, log_std_init=-0.5))
    w = agent.actor[2].weight
    torch.testing.assert_close(w @ w.T, 2 * torch.eye(32), atol=1e-5, rtol=0)
    assert agent.actor_head.weight.norm(dim=1).allclose(torch.full((3,), 0.01), atol=1e-6)
    assert agent.critic_head.weight.norm().item() == pytest.approx(1.0, abs=1e-5)
    assert all(p.abs().max() == 0 for name, p in agent.named_parameters() if name.endswith("bias"))
    assert agent.log_std.tolist() == [-0.5] * 3
