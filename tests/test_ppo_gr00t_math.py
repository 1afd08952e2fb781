"""The flow samplers of ppo_gr00t.py: densities, marginals, ratios, masks, chunks, what trains."""

import copy
import math
import time
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from test_ppo_math import WORLD
from torch.distributions import Normal

import gr00t_finetune
import ppo_fetch
import ppo_gr00t as p
from common.parallel import clip_gradients
from common.robot.feature_cache import FeatureCache
from common.robot.gr00t_n15 import GR00T, GR00TConfig
from common.robot.lora import add_lora, merged
from ppo_gr00t import Agent, Args, chain_logprobs, executed_mask, ode_actions, sample_chain, transition

SAMPLERS = ("flow-sde", "flow-sde-chain", "flow-noise")
ARGS = replace(
    p.resolve(Args()), num_envs=6, num_steps=4, num_minibatches=2, update_epochs=2, hidden=16, execute_steps=3,
    learning_rate=1e-3, target_kl=0.0, noisy_step="any",
)  # fmt: skip
SMALL = dict(num_embodiments=32, dit_layers=2, dit_heads=2, dit_head_dim=8, vl_heads=2, vl_head_dim=8, hidden_size=16)
SMALL |= dict(action_horizon=4, action_dim=6, state_dim=8, num_future_tokens=2)
SMALL |= dict(dropout=0.2, vl_dropout=0.2)  # as published: it has to be off


def make_agent(args=ARGS, seed=0, config=None) -> Agent:
    torch.manual_seed(seed)
    model = GR00T(config or GR00TConfig.lite(32, **SMALL))
    with torch.no_grad():  # biases and the like start at zero, where gradients hide
        for name, q in model.named_parameters():
            q.add_(0.1 * torch.randn(q.shape))
            if name.endswith(".W"):
                q.mul_(3)
    freeze(model, args)
    return Agent(model, 31, torch.tensor([[3, 1, 4]]), args)


def freeze(model: GR00T, args) -> None:
    model.set_trainable(args.tune_llm, args.tune_visual, args.tune_projector, args.tune_diffusion_model)
    model.eval()


def collect(agent: Agent, args=ARGS, seed=0, images=None):
    """A batch as `rollout` makes it, of random states: (T, n, ...) tensors and the cache they refer to."""
    T, n, c = args.num_steps, args.num_envs, agent.model.config
    g = torch.Generator().manual_seed(seed)
    begins, _ = p.noisy_steps(args)
    agent.prompt = agent.prompt if images is None else images[0]
    cache, columns = FeatureCache(agent), []
    for _ in range(T):
        state = torch.randn(n, c.state_dim, generator=g)
        frame = cache.add(None if images is None else images[1][torch.randint(len(images[1]), (n,), generator=g)], n)
        with torch.no_grad():
            look = cache.look(frame, state)
        noise = torch.randn(n, args.denoising_steps + 1, c.action_horizon, c.action_dim, generator=g)
        first = torch.randint(begins.start, begins.stop, (n,), generator=g)
        lengths = torch.randint(1, args.execute_steps + 1, (n,), generator=g)
        _, chain, logprobs = sample_chain(agent, look, noise, first, executed_mask(lengths, noise[:, 0]), args)
        columns.append(
            dict(state=state, frame=frame, condition=look["condition"], chain=chain, first=first, lengths=lengths,
                 logprobs=logprobs, rewards=torch.randn(n, generator=g), values=torch.randn(n, generator=g),
                 advantages=torch.randn(n, generator=g), returns=torch.randn(n, generator=g), valid=lengths > 0)
        )  # fmt: skip
    return {key: torch.stack([column[key] for column in columns]) for key in columns[0]}, cache


def run_update(agent, batch, cache, args=ARGS):
    actor = [q for q in agent.model.parameters() if q.requires_grad]
    actor += list(agent.noise_net.parameters()) if agent.noise_net else []
    groups = [{"params": actor}, {"params": [*agent.critic.parameters(), *agent.critic_head.parameters()]}]
    optimizer = torch.optim.Adam(groups, lr=args.learning_rate, eps=1e-5)
    scaler = torch.amp.GradScaler("cpu", enabled=args.amp == "fp16")
    generator = torch.Generator().manual_seed(0)
    loss_of = partial(p.minibatch_loss, cache=cache)
    return p.update(agent, loss_of, optimizer, scaler, batch, args, generator, WORLD)


# ---- the step --------------------------------------------------------------------------------------------------------


def test_flow_sde_is_the_published_formula():
    """mean = x_0^ (1 - (t + d) - s^2 d / (2 (1 - t))) + x_1^ (t + d), std = s sqrt(d), s = a sqrt((1 - t) / t)."""
    K, v, x = 4, torch.randn(1, 2, 3, dtype=torch.float64), torch.randn(1, 2, 3, dtype=torch.float64)
    for k, std in enumerate((0.5, 0.4330127, 0.25, 0.1443376)):
        t, d = k / K, 1 / K
        s = std / math.sqrt(d)
        x_0, x_1 = x - t * v, x + (1 - t) * v
        expected = x_0 * (1 - (t + d) - s**2 * d / (2 * (1 - t))) + x_1 * (t + d)
        mean, found = transition(v, x, torch.tensor([k]), torch.tensor([True]), replace(ARGS, noise_level=0.5))
        assert found.item() == pytest.approx(std, abs=1e-6)
        torch.testing.assert_close(mean, expected, rtol=1e-6, atol=1e-6)


def gaussian_flow(x, t, mean, std):
    """The velocity whose flow carries N(0, 1) to N(mean, std^2) along x_t = (1 - t) x_0 + t x_1."""
    variance = (1 - t) ** 2 + t**2 * std**2
    x_0 = (1 - t) * (x - t * mean) / variance  # E[x_0 | x_t]
    x_1 = mean + t * std**2 * (x - t * mean) / variance
    return x_1 - x_0


@pytest.mark.parametrize("a", [0.3, 0.5])
def test_flow_sde_keeps_the_marginals_of_the_flow_as_steps_grow(a):
    """Everything is affine, so mean and variance of every step are exact, without sampling."""
    target, errors = (1.5, 0.4), []
    for K in (4, 16, 64, 256, 1024):
        args, mean, variance = replace(ARGS, sampler="flow-sde-chain", denoising_steps=K, noise_level=a), 0.0, 1.0
        for k in range(K - 1):  # the last step is the ODE's
            x = torch.tensor([0.0, 1.0], dtype=torch.float64)[:, None, None]
            ks, on = torch.full((2,), k), torch.ones(2, dtype=torch.bool)
            m, s = transition(gaussian_flow(x, k / K, *target), x, ks, on, args)
            intercept, slope = m[0].item(), (m[1] - m[0]).item()
            mean, variance = intercept + slope * mean, slope**2 * variance + s[0].item() ** 2
        x = torch.tensor([mean, mean + 1], dtype=torch.float64)
        v = gaussian_flow(x, (K - 1) / K, *target)
        variance *= (1 + (v[1] - v[0]).item() / K) ** 2
        mean += v[0].item() / K
        errors.append((abs(mean - target[0]), abs(math.sqrt(variance) / target[1] - 1)))
    assert all(error[0] < 1e-6 for error in errors) and errors[-1][1] < 5e-3, errors
    assert errors[2][1] < 0.3 * errors[1][1] < 0.1 * errors[0][1], errors


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_without_noise_every_sampler_is_the_ode_of_gr00t_finetune(sampler):
    """Deployment, and bit for bit the same: exploration whose noise is turned down to nothing."""
    args = replace(ARGS, sampler=sampler, noise_level=1e-30, noise_range=(1e-30, 2e-30))
    agent = make_agent(args)
    state, noise = torch.randn(5, 8), torch.randn(5, 5, 4, 6)
    x_0 = noise[:, 0].contiguous()  # another memory layout would take another kernel, which rounds differently
    cache = FeatureCache(agent)
    with torch.no_grad():
        look = cache.look(cache.add(None, 5), state)
    batch = {"eagle_input_ids": torch.tensor([[3, 1, 4]]).expand(5, -1), "state": state[:, None]}
    batch |= {"eagle_attention_mask": torch.ones(5, 3), "embodiment_id": torch.tensor([31])}
    expected = gr00t_finetune.sample_actions(agent.model, batch, x_0, 4)
    deployed = ode_actions(agent, look, x_0, args)
    torch.testing.assert_close(deployed, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(ode_actions(agent, look, x_0, replace(ARGS, sampler=sampler)), deployed)  # whatever the noise
    first = torch.zeros(5, dtype=torch.int64)
    x, _, _ = sample_chain(agent, look, noise, first, torch.ones(5, 4, 6), args)
    assert torch.equal(x, deployed)


# ---- densities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_the_density_of_a_chain_is_that_of_its_normals(sampler):
    args = replace(ARGS, sampler=sampler)
    agent = make_agent(args)
    batch, cache = collect(agent, args)
    flat = {key: value.flatten(0, 1) for key, value in batch.items()}
    mask = executed_mask(flat["lengths"], flat["chain"][:, 0])
    with torch.no_grad():
        look = cache.look(flat["frame"], flat["state"])
        logprobs, entropy = chain_logprobs(agent, look, flat["chain"], flat["first"], mask, args)
        M, noisy = 1 if sampler == "flow-sde" else 4, torch.ones(24, dtype=torch.bool)
        steps = [
            p.step_distribution(agent, look, flat["chain"][:, m].contiguous(), flat["first"] + m, noisy, args)
            for m in range(M)
        ]
    assert flat["chain"].shape == (24, M + 1, 4, 6)
    normals = [Normal(mean, std) for mean, std in steps]
    expected = sum((n.log_prob(flat["chain"][:, m + 1]) * mask).sum((1, 2)) for m, n in enumerate(normals))
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(logprobs, flat["logprobs"], rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(entropy, sum((n.entropy() * mask).sum((1, 2)) for n in normals), rtol=1e-5, atol=1e-4)
    if sampler != "flow-noise":  # the noise was standard: what is left of it after the mean is, too
        z = torch.stack([(flat["chain"][:, m + 1] - mean) / std for m, (mean, std) in enumerate(steps)])
        assert z.std().item() == pytest.approx(1, abs=0.1)
    else:
        stds = torch.stack([std for _, std in steps])
        assert 0.08 <= stds.min() and stds.max() <= 0.16


def test_noise_visits_the_steps_that_were_asked_for():
    for noisy_step, visited in (("last", [3]), ("any", [0, 1, 2, 3])):
        args = replace(ARGS, noisy_step=noisy_step)
        batch, _ = collect(make_agent(args), replace(args, num_envs=40))
        assert batch["first"].unique().tolist() == visited
    assert p.noisy_steps(replace(ARGS, sampler="flow-sde-chain")) == (range(1), 4)
    assert p.noisy_steps(replace(ARGS, sampler="flow-noise")) == (range(1), 4)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_what_was_not_executed_has_no_gradient(sampler):
    """Padded dims, steps of the chunk that were not executed and steps after an episode's end are no actions."""
    args = replace(ARGS, sampler=sampler)
    agent = make_agent(args)
    batch, cache = collect(agent, args)
    flat = {key: value.flatten(0, 1) for key, value in batch.items()}
    mask = executed_mask(flat["lengths"], flat["chain"][:, 0])
    assert mask.sum() == (flat["lengths"] * p.DIMS).sum() and mask[..., p.DIMS :].sum() == 0
    with torch.no_grad():
        look = cache.look(flat["frame"], flat["state"])
    chain = flat["chain"].clone().requires_grad_()
    velocities = []

    class Recording:
        noise_net, normalize = agent.noise_net, agent.normalize

        def velocity(self, look, x, t):
            velocities.append(agent.velocity(look, x, t).detach().requires_grad_())
            return velocities[-1]

    logprobs, _ = chain_logprobs(Recording(), look, chain, flat["first"], mask, args)
    logprobs.sum().backward()
    for gradient in [v.grad for v in velocities] + [chain.grad[:, m] for m in range(chain.shape[1])]:
        assert (gradient[mask == 0] == 0).all() and (gradient[mask == 1] != 0).any()


# ---- the update ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_before_any_step_the_ratio_is_one_also_after_a_reload(sampler, tmp_path):
    """fp32: exactly 1 where the minibatch is the rollout's batch, and up to rounding of the kernels where it is not."""
    args = replace(ARGS, sampler=sampler)
    agent = make_agent(args)
    agent.statistics.update(torch.randn(50, len(agent.statistics.mean)))
    batch, cache = collect(agent, args)
    with torch.no_grad():
        for t in range(args.num_steps):
            look = cache.look(batch["frame"][t], batch["state"][t])
            mask = executed_mask(batch["lengths"][t], batch["chain"][t, :, 0])
            logprobs, _ = chain_logprobs(agent, look, batch["chain"][t], batch["first"][t], mask, args)
            assert torch.equal(logprobs, batch["logprobs"][t])
    save_file(agent.state_dict(), tmp_path / "agent.safetensors")
    reloaded = make_agent(args, seed=1)
    reloaded.load_state_dict(load_file(tmp_path / "agent.safetensors"))
    again = FeatureCache(reloaded)
    again.add(None, 1)
    with torch.no_grad():  # the policy that was saved, to the last bit
        look = again.look(batch["frame"][0], batch["state"][0])
        mask = executed_mask(batch["lengths"][0], batch["chain"][0, :, 0])
        logprobs, _ = chain_logprobs(reloaded, look, batch["chain"][0], batch["first"][0], mask, args)
        assert torch.equal((logprobs - batch["logprobs"][0]).exp(), torch.ones(args.num_envs))
    for one, its_cache in ((reloaded, again), (agent, cache)):
        metrics = run_update(one, batch, its_cache, args)
        assert metrics["first_ratio_error"] < 1e-5 and metrics["optimizer_steps"] == 4
    for a, b in zip(agent.parameters(), reloaded.parameters()):
        assert torch.equal(a, b)


@pytest.mark.parametrize("amp", ["bf16", "fp16"])
def test_in_low_precision_the_ratio_is_one_up_to_rounding_and_densities_are_fp32(amp):
    args = replace(ARGS, amp=amp)
    agent = make_agent(args)
    batch, cache = collect(agent, args)
    assert batch["chain"].dtype == batch["logprobs"].dtype == torch.float32
    assert run_update(agent, batch, cache, args)["first_ratio_error"] < 0.05
    assert all(torch.isfinite(q).all() for q in agent.parameters())


def test_a_policy_that_is_not_the_rollouts_is_noticed():
    agent = make_agent()
    batch, cache = collect(agent)
    with torch.no_grad():
        agent.model.action_head.action_decoder.layer2.b += 0.3
    assert run_update(agent, batch, cache)["first_ratio_error"] > 1e-2


def test_a_large_learning_rate_stops_at_the_kl_limit():
    args = replace(ARGS, learning_rate=0.1, target_kl=0.05, update_epochs=20)
    agent = make_agent(args)
    metrics = run_update(agent, *collect(agent, args), args)
    assert metrics["kl_stop"] == 1 and metrics["optimizer_steps"] < 5 and metrics["approx_kl"] > 0.05


FLAGS = {
    "default": {},
    "head only": dict(tune_diffusion_model=False),
    "DiT only": dict(tune_projector=False),
    "table": dict(tune_llm=True),
}


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS)
def test_frozen_parameters_stay_as_they_are_bit_for_bit(flags):
    args = replace(ARGS, **flags)
    agent = make_agent(args)
    before = copy.deepcopy(agent.model.state_dict())
    run_update(agent, *collect(agent, args), args)
    for name, q in agent.model.named_parameters():
        assert torch.equal(q, before[name]) or q.requires_grad, name
    examples = {
        "tune_projector": "action_head.action_decoder.layer2.b",
        "tune_diffusion_model": "action_head.model.proj_out_2.bias",
        "tune_llm": "backbone.instruction_table.weight",
    }
    for name, example in examples.items():
        moved = not torch.equal(agent.model.get_parameter(example), before[example])
        assert moved == getattr(args, name), name
    rows = agent.model.action_head.action_decoder.layer2.b
    assert torch.equal(rows[:31], before["action_head.action_decoder.layer2.b"][:31])  # of other robots


def test_while_the_critic_warms_up_the_policy_does_not_move():
    agent = make_agent()
    before = copy.deepcopy(agent.state_dict())
    batch, _ = collect(agent)
    critic = [*agent.critic.parameters(), *agent.critic_head.parameters()]
    groups = [{"params": list(agent.model.parameters()), "lr": 1.0}, {"params": critic, "lr": 1e-2}]
    optimizer, losses = torch.optim.Adam(groups), []
    for _ in range(3):
        losses.append(
            p.fit_critic(agent, optimizer, batch, ARGS, torch.Generator().manual_seed(0), WORLD)["critic_loss"]
        )
    assert losses[-1] < losses[0]
    for name, q in agent.state_dict().items():
        assert torch.equal(q, before[name]) == (not name.startswith("critic")), name


def test_the_critic_sends_no_gradient_into_the_policy():
    args = replace(ARGS, tune_llm=True)  # or its features would have no gradient to begin with
    agent = make_agent(args)
    batch, cache = collect(agent, args)
    look = cache.look(batch["frame"][0], batch["state"][0], fresh=True)
    assert look["vl"].requires_grad and not look["condition"].requires_grad
    agent.value(look["condition"]).sum().backward()
    assert all(q.grad is None for q in agent.model.parameters())


# ---- the feature cache -----------------------------------------------------------------------------------------------


def tiny_images(config, count=5, seed=0):
    prompt = [7] * 3 + [config.image_token_index] * config.tokens_per_image + [9] * 2
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 3, config.image_size, config.image_size)
    return torch.tensor([prompt]), torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)


def test_cached_and_recomputed_features_give_equal_losses_and_duplicates_are_stored_once():
    config = GR00TConfig.tiny(image_size=16, patch_size=8, **(SMALL | dict(vl_heads=4, vl_head_dim=16)))
    agent = make_agent(config=config)
    images = tiny_images(config)
    batch, cache = collect(agent, images=images)
    assert len(cache.features) == 5 and not cache.images and batch["frame"].unique().tolist() == [0, 1, 2, 3, 4]
    cached = run_update(copy.deepcopy(agent), batch, cache)
    again = FeatureCache(agent)  # as if the backbone trained, though nothing of it does
    again.frozen = False
    order = [image for image in images[1]]
    frames = {tuple(image.flatten().tolist()) for image in order}
    assert len(frames) == 5
    torch.manual_seed(0)
    batch2, _ = collect(agent, images=images)
    assert torch.equal(batch["frame"], batch2["frame"])
    g = torch.Generator().manual_seed(0)  # the images in the order in which the rollout met them
    for _ in range(4):
        torch.randn(6, config.state_dim, generator=g)
        again.add(images[1][torch.randint(5, (6,), generator=g)], 6)
        torch.randn(6, 5, config.action_horizon, config.action_dim, generator=g)
        torch.randint(4, (6,), generator=g), torch.randint(1, 4, (6,), generator=g)
        [torch.randn(6, generator=g) for _ in range(4)]
    assert len(again.images) == 5
    fresh = run_update(copy.deepcopy(agent), batch, again)
    for key in cached:
        torch.testing.assert_close(torch.as_tensor(fresh[key]), torch.as_tensor(cached[key]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("moves", [False, True])
def test_a_backbone_that_trains_gets_its_gradient(moves):
    config = GR00TConfig.tiny(image_size=16, patch_size=8, **(SMALL | dict(vl_heads=4, vl_head_dim=16)))
    args = replace(ARGS, tune_llm=moves)
    agent = make_agent(args, config=config)
    before = copy.deepcopy(agent.model.state_dict())
    batch, cache = collect(agent, args, images=tiny_images(config))
    assert cache.frozen != moves
    metrics = run_update(agent, batch, cache, args)
    assert metrics["first_ratio_error"] < 1e-5
    for layer in ("layers.0", "layers.1"):
        name = f"backbone.eagle_model.language_model.model.{layer}.mlp.up_proj.weight"
        assert torch.equal(agent.model.state_dict()[name], before[name]) != moves


def test_adapters_train_alone_and_merge_into_a_whole_model():
    args = replace(ARGS, lora_rank=4)
    agent = make_agent(args)
    plain = copy.deepcopy(agent.model.state_dict())
    adapters = add_lora(agent.model, args)
    assert adapters and all(not m.training for m in agent.model.modules())
    batch, cache = collect(agent, args)
    metrics = run_update(agent, batch, cache, args)
    assert metrics["first_ratio_error"] < 1e-5
    with merged(agent.model, adapters):
        whole = copy.deepcopy(agent.model.state_dict())
    assert whole.keys() == plain.keys()
    changed = {name for name in plain if not torch.equal(plain[name], whole[name])}
    weights = {f"{name}.weight" for name in adapters}
    assert weights <= changed
    assert all(name in weights or GR00T.group_of(name) == "tune_projector" for name in changed)


class OneFrame:
    """A cache that holds one observation; what asks which ones are distinct cannot run without numbers."""

    def __init__(self, agent, features):
        self.agent, self.features, self.frozen = agent, features, True

    def look(self, index, state, fresh=False):
        return self.agent.look(self.features, torch.zeros_like(index), state)


def full_size_step(config: GR00TConfig, device: str, args: Args) -> tuple[Agent, dict]:
    """Decides for two environments, then updates once on what was decided; weights are random or, on meta, absent."""
    with torch.device(device):
        model = GR00T(config)
        for q in model.backbone.parameters():
            q.data = q.data.to(torch.bfloat16 if args.amp == "bf16" else torch.float32)
        agent = Agent(model, 31, torch.tensor([[3, 1, 4]]), args)
        freeze(model, args)
        if device == "meta":  # the backbone counts its image tokens, which needs numbers
            features = torch.zeros(1, 294, 2048)
        else:
            ids, images = tiny_images(config, 1)
            agent.prompt = ids.to(device)
            features = agent.backbone(images, 1).detach()
        cache, state = OneFrame(agent, features), torch.zeros(2, config.state_dim)
        look = cache.look(torch.zeros(2, dtype=torch.int64), state)
        assert look["vl"].shape == (1, features.shape[1], config.vl_width)
        first, lengths = torch.full((2,), 3), torch.tensor([args.execute_steps, 1])
        noise = torch.zeros(2, 5, config.action_horizon, config.action_dim)
        noise = noise if device == "meta" else noise.normal_()
        x, chain, logprobs = sample_chain(agent, look, noise, first, executed_mask(lengths, noise[:, 0]), args)
        assert x.shape == (2, config.action_horizon, config.action_dim) and chain.shape == (2, 2, *x.shape[1:])
        values = agent.value(look["condition"]).detach()
        batch = dict(frame=torch.zeros_like(first), state=state, condition=look["condition"], chain=chain, first=first,
                     lengths=lengths, logprobs=logprobs, values=values, rewards=values, returns=values + 1,
                     advantages=torch.tensor([1.0, -1.0]), valid=torch.ones(2, dtype=torch.bool, device="cpu"))  # fmt: skip
    metrics = run_update(agent, {key: value[None] for key, value in batch.items()}, cache, args)
    return agent, metrics


ONE_STEP = dict(num_envs=2, num_steps=1, num_minibatches=1, update_epochs=1, norm_adv=False, noisy_step="last")


def test_the_full_size_model_takes_a_rollout_and_an_update_step_by_shape(monkeypatch):
    """No memory: the meta device computes shapes only. 2.7 billion parameters, one camera."""
    # whether a norm is finite is a number, which that device has not
    monkeypatch.setattr(p, "clip_gradients", lambda *given: torch.ones_like(clip_gradients(*given), device="cpu"))
    agent, metrics = full_size_step(GR00TConfig(), "meta", replace(ARGS, **ONE_STEP))
    trained = {n: q for n, q in agent.model.named_parameters() if q.requires_grad}
    assert sum(q.numel() for q in trained.values()) == 1_068_806_144 and all(q.is_meta for q in trained.values())
    assert {n for n, q in trained.items() if q.grad is None} == set() and metrics["optimizer_steps"] == 1


@pytest.mark.parametrize("size", ["tiny", pytest.param("full", marks=pytest.mark.gpu)])
def test_a_model_with_a_camera_takes_a_rollout_and_an_update_step_for_real(size, capsys):
    """The published size on a GPU with about 24 GB, where there is one; it prints seconds and memory."""
    if size == "full" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    args, device = replace(ARGS, **ONE_STEP, amp="bf16", learning_rate=1e-5), "cuda" if size == "full" else "cpu"
    began = time.time()
    agent, metrics = full_size_step(GR00TConfig() if size == "full" else GR00TConfig.tiny(), device, args)
    assert metrics["optimizer_steps"] == 1 and torch.isfinite(metrics["grad_norm"]) and metrics["grad_norm"] > 0
    assert metrics["first_ratio_error"] < 0.05
    assert all(torch.isfinite(q).all() for q in agent.parameters())
    if size == "full":
        with capsys.disabled():
            print(f"\n{time.time() - began:.1f} s, peak {torch.cuda.max_memory_allocated() / 1e9:.1f} GB")


# ---- chunks ----------------------------------------------------------------------------------------------------------


def per_step_advantages(rewards, values, next_values, lengths, dones, gamma, lam):
    """O(T^2), by the definition: A_t = sum_l lambda^l gamma^(steps until chunk t + l) delta_{t+l}, up to an end."""
    T, N = values.shape
    out = torch.zeros(T, N, dtype=values.dtype)
    for i in range(N):
        for t in range(T):
            steps, weight = 0, 1.0
            for u in range(t, T):
                r = sum(gamma**k * rewards[u, i, k] for k in range(int(lengths[u, i])))
                delta = r + gamma ** int(lengths[u, i]) * next_values[u, i] - values[u, i]
                out[t, i] += weight * gamma**steps * delta
                if dones[u, i]:
                    break
                steps, weight = steps + int(lengths[u, i]), weight * lam
    return out


@pytest.mark.parametrize("lam", [0.0, 0.9, 1.0])
def test_gae_over_chunks_is_the_per_step_definition(lam):
    """Episodes end inside chunks. With lambda 1, or chunks of one step, it is the per-step GAE at the decisions."""
    g = torch.Generator().manual_seed(0)
    T, N, C, gamma = 6, 5, 4, 0.9
    args = replace(ARGS, execute_steps=C, gamma=gamma, gae_lambda=lam)
    steps = torch.randn(T, N, C, generator=g, dtype=torch.float64)
    dones = torch.rand(T, N, generator=g) < 0.3
    lengths = torch.where(dones, torch.randint(1, C + 1, (T, N), generator=g), C)
    steps *= torch.arange(C) < lengths[..., None]
    values, next_values = torch.randn(2, T, N, generator=g, dtype=torch.float64)
    next_values[:-1] = torch.where(dones[:-1], next_values[:-1], values[1:])
    rewards = (steps * gamma ** torch.arange(C)).sum(-1)
    batch = {"lengths": lengths, "terminations": torch.zeros_like(dones), "dones": dones}
    found, returns = p.chunk_advantages(rewards, values, next_values, batch, args)
    expected = per_step_advantages(steps, values, next_values, lengths, dones, gamma, lam)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)  # gae's coefficients are floats
    torch.testing.assert_close(returns, found + values)
    if lam == 1.0:  # step by step, with any value in between: it cancels
        for i in range(N):
            count = lengths[:, i].tolist()
            flat_r = torch.cat([steps[t, i, :n] for t, n in enumerate(count)])[:, None]
            inner = [
                torch.cat([values[t, i][None], torch.randn(n - 1, generator=g).double()]) for t, n in enumerate(count)
            ]
            flat_v = torch.cat(inner)[:, None]
            ends = np.cumsum(count) - 1
            flat_next = torch.cat([flat_v[1:], flat_v[:1]])
            flat_next[ends, 0] = next_values[:, i]
            flat_done = torch.zeros_like(flat_v, dtype=torch.bool)
            flat_done[ends, 0] = dones[:, i]
            a, _ = p.gae(flat_r, flat_v, flat_next, torch.zeros_like(flat_done), flat_done, gamma, lam)
            torch.testing.assert_close(a[[0, *(ends[:-1] + 1)], 0], found[:, i], rtol=1e-5, atol=1e-6)
    one = replace(args, execute_steps=1)
    batch["lengths"] = torch.ones_like(lengths)
    a, _ = p.chunk_advantages(rewards, values, next_values, batch, one)
    b, _ = ppo_fetch.gae(rewards, values, next_values, batch["terminations"], dones, gamma, lam)
    assert torch.equal(a, b)


# ---- it learns -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampler, noisy_step", [("flow-sde", "any"), ("flow-sde", "last"), ("flow-noise", "last")])
def test_a_one_step_bandit_is_solved(sampler, noisy_step):
    """The state names the best action; the plain flow, which was never rewarded itself, must find it."""
    args = replace(
        ARGS, sampler=sampler, noisy_step=noisy_step, num_envs=128, num_steps=1, num_minibatches=2, update_epochs=4,
        learning_rate=3e-3, target_kl=0.2, execute_steps=1, denoising_steps=2, noise_range=(0.2, 0.6),
    )  # fmt: skip
    config = GR00TConfig.lite(8, **(SMALL | dict(action_horizon=1, num_future_tokens=1, state_dim=4)))
    agent = make_agent(args, config=config)
    agent.prompt = torch.tensor([[1]])
    g, errors = torch.Generator().manual_seed(0), []
    actor = [q for q in agent.model.parameters() if q.requires_grad]
    actor += list(agent.noise_net.parameters()) if agent.noise_net else []
    groups = [{"params": actor}, {"params": [*agent.critic.parameters(), *agent.critic_head.parameters()]}]
    rate = 3e-3 if sampler == "flow-sde" else 1e-3  # two noisy steps and narrower noise: a sharper ratio
    optimizer, scaler = torch.optim.Adam(groups, lr=rate), torch.amp.GradScaler("cpu", enabled=False)
    for _ in range(60 if sampler == "flow-sde" else 90):
        cache = FeatureCache(agent)
        frame, state = cache.add(None, 128), torch.rand(128, 4, generator=g) * 2 - 1
        noise = torch.randn(128, 3, 1, 6, generator=g)
        lengths, first = torch.ones(128, dtype=torch.int64), torch.full((128,), p.noisy_steps(args)[0].start)
        with torch.no_grad():
            look = cache.look(frame, state)
        mask = executed_mask(lengths, noise[:, 0])
        x, chain, logprobs = sample_chain(agent, look, noise, first, mask, args)
        reward = -((x[:, 0, : p.DIMS] - state) ** 2).sum(-1)
        errors.append(
            ((ode_actions(agent, look, noise[:, 0], args)[:, 0, : p.DIMS] - state) ** 2).sum(-1).mean().item()
        )
        value = agent.value(look["condition"]).detach()
        batch = dict(frame=frame, state=state, chain=chain, first=first, lengths=lengths, logprobs=logprobs, values=value,
                     condition=look["condition"], rewards=reward, returns=reward, advantages=reward - value)  # fmt: skip
        batch |= {"valid": lengths > 0}
        loss_of = partial(p.minibatch_loss, cache=cache)
        p.update(agent, loss_of, optimizer, scaler, {k: v[None] for k, v in batch.items()}, args, g, WORLD)
        agent.statistics.update(look["condition"])
    assert errors[-1] < 0.25 * errors[0], (errors[0], errors[-1])


def test_a_critic_without_epochs_has_its_loss_where_the_batch_is():
    """Processes add theirs up, and NCCL takes tensors of the GPU alone."""
    batch = {name: torch.ones(2, 3, device="meta") for name in ("rewards", "condition", "returns")}
    optimizer = SimpleNamespace(param_groups=[{}, {"params": []}])
    found = p.fit_critic(None, optimizer, batch, replace(ARGS, critic_epochs=0), None, WORLD)
    assert found["critic_loss"].device.type == "meta"
