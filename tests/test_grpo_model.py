"""Log-probs and generation: one distribution in sampling and training, whatever the layout, batch or architecture."""

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import VOCAB, make_model
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from common.language import lm, probe
from common.language.decode import inverse_cdf, pad_right
from common.language.lm import (
    Reference,
    head_logprobs,
    hidden_before,
    load_model,
    micro_batches,
    sampling_copy,
    stop_token_ids,
    swapped,
)
from common.parallel import World
from grpo_arithmetic import (
    Args,
    completion_mask,
    generate,
    grpo_loss,
    sample_tokens,
    sampling_noise,
    tempered,
    token_logprobs,
)

PROMPTS = [[34, 64, 75], [34, 64, 75, 66, 84, 75, 64], [1, 2, 3, 4, 5]]
STOP = [*range(20), 256, 258]  # many, so that random models end some rows early
SAMPLING = dict(stop_ids=STOP, pad_id=256, vocab_size=259)
ARCHITECTURES = ["qwen2", "qwen3", "llama", "gpt2"]
CPU = torch.device("cpu")


def rollout(model, prompts=PROMPTS, G=4, T=12, temperature=0.7, seed=0, first=0):
    noise = sampling_noise(seed, range(first, first + len(prompts) * G), T)
    return generate(
        model, prompts, num_generations=G, max_new_tokens=T, temperature=temperature, noise=noise,
        **SAMPLING,
    )  # fmt: skip


def train_logprobs(model, ids, mask, prompts=PROMPTS, **options):
    prompt_ids, lengths = pad_right(prompts, 256, CPU)
    return token_logprobs(model, prompt_ids, lengths, ids, mask, **{"temperature": 0.7, "vocab_size": 259} | options)


@torch.no_grad()
def slow_generate(model, prompt, uniforms, temperature, stop_ids, vocab_size):
    """The definition: one row, no cache, the whole text through the model for every token."""
    text, logprobs = list(prompt), []
    for u in uniforms:
        logits = model(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]
        logits = logits / (temperature or 1.0)
        logits[vocab_size:] = -torch.inf
        logp = logits.log_softmax(-1)
        token = int(logp.argmax()) if temperature == 0 else int((logp.exp().cumsum(-1) <= u).sum())
        text.append(token)
        logprobs.append(logp[token].item())
        if token in stop_ids:
            break
    return text[len(prompt) :], logprobs


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [0.7, 0.0])
def test_generation_equals_a_loop_without_cache_token_for_token(name, temperature):
    model, G, T = make_model(name), 4, 12
    ids, mask, logprobs = rollout(model, G=G, T=T, temperature=temperature)
    noise = sampling_noise(0, range(len(PROMPTS) * G), T)
    lengths = set()
    for i in range(len(ids)):
        tokens, logp = slow_generate(model, PROMPTS[i // G], noise[i], temperature, STOP, 259)
        assert ids[i][mask[i]].tolist() == tokens
        assert logprobs[i][mask[i]].tolist() == pytest.approx(logp, abs=1e-5)
        lengths.add(len(tokens))
    assert temperature == 0 or len(lengths) > 1, "some rows must end early for this to test anything"


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("share_prompt", [True, False])
def test_training_logprobs_equal_sampling_logprobs_so_the_ratio_is_one(name, share_prompt):
    """The temperature is in both, positions and masks agree, and no clip is active on the first pass."""
    model = make_model(name)
    ids, mask, sampled = rollout(model)
    logprobs, entropy = train_logprobs(model, ids, mask, share_prompt=share_prompt)
    assert (logprobs - sampled).abs().max() < 1e-5
    assert (entropy[mask] > 0).all() and (entropy[~mask] == 0).all() and (logprobs[~mask] == 0).all()
    other, _ = train_logprobs(model, ids, mask, share_prompt=share_prompt, temperature=1.0)
    assert (other - sampled).abs().max() > 1e-2, "a log-prob without the temperature must differ"
    _, metrics = grpo_loss(
        logprobs, sampled, None, torch.ones(len(ids)), mask, loss_type="grpo", beta=0.0, max_completion_length=12
    )
    assert metrics["clip_ratio/region_mean"] == 0


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shared_prompt_rows_and_plain_rows_give_equal_gradients(name):
    model = make_model(name, dtype=torch.float64)
    ids, mask, _ = rollout(model)
    grads = []
    for share_prompt in (True, False):
        logprobs, _ = train_logprobs(model, ids, mask, share_prompt=share_prompt)
        weights = torch.linspace(-1, 1, logprobs.numel(), dtype=torch.float64).view_as(logprobs)
        model.zero_grad()
        (logprobs * weights).sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    # transformers computes norms and softmax of the other three in float32 whatever the weights are
    assert (grads[0] - grads[1]).norm() < (1e-12 if name == "gpt2" else 1e-6) * grads[0].norm()


def test_a_row_alone_has_the_logprobs_it_has_in_a_padded_batch():
    model = make_model()
    ids, mask, _ = rollout(model)
    batch, _ = train_logprobs(model, ids, mask)
    for i in range(len(ids)):
        n = int(mask[i].sum())
        alone, _ = train_logprobs(model, ids[i : i + 1, :n], mask[i : i + 1, :n], prompts=[PROMPTS[i // 4]])
        assert torch.allclose(alone[0], batch[i, :n], atol=1e-5)


def test_entropy_is_that_of_the_tempered_distribution_within_the_tokenizer():
    model = make_model()
    ids, mask, _ = rollout(model)
    _, entropy = train_logprobs(model, ids, mask)
    logits = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1, :259].detach() / 0.7
    assert entropy[0, 0].item() == pytest.approx(
        torch.distributions.Categorical(logits=logits).entropy().item(), abs=1e-4
    )


class Calls(TorchDispatchMode):
    """What ran: (name of the operation, shape of its result), and what a GPU's host would have had to wait for."""

    def __init__(self):
        super().__init__()
        self.found, self.waits = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **kwargs or {})
        self.found.append((func.name().partition(".")[0].removeprefix("aten::"), getattr(out, "shape", ())))
        masks = [x for x in args[1] if x is not None and x.dtype == torch.bool] if "index" in func.name() else []
        if masks or any(name in func.name() for name in ("nonzero", "_local_scalar_dense")):
            self.waits.append(func.name())
        return out


def test_ids_beyond_the_tokenizer_are_cut_off_which_changes_neither_logprobs_nor_gradients():
    """The definition: they have a logit of -inf. No pass over (n, V) but the product sees them, nor are entropies made
    where nobody asks, as the reference's."""
    model = make_model()
    ids, mask, _ = rollout(model)

    def filled(logits):
        return (logits / 0.7).index_fill(-1, torch.arange(259, VOCAB), -torch.inf)

    hidden = hidden_before(model, *pad_right(PROMPTS, 256, CPU), ids, mask).detach().requires_grad_(True)
    found = []
    for temper in (filled, partial(tempered, temperature=0.7, vocab_size=259)):
        model.zero_grad()
        logp, _ = head_logprobs(model, hidden, ids[mask], temper, entropy=False)
        (logp * torch.linspace(-1, 1, len(logp))).sum().backward()
        found.append((logp, hidden.grad.clone(), model.lm_head.weight.grad.clone()))
        hidden.grad = None
    for a, b in zip(*found):  # bit for bit where sums over 264 and 259 numbers are taken in one order
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)

    passes = {}
    for H in (True, False):
        with torch.no_grad(), Calls() as calls:
            _, entropy = train_logprobs(model, ids, mask, H=H)
        assert (entropy is None) == (not H)
        wide = {V: [name for name, shape in calls.found if tuple(shape) == (int(mask.sum()), V)] for V in (VOCAB, 259)}
        assert wide[VOCAB] == ["mm"]
        passes[H] = wide[259]
    assert passes == {H: ["slice", "div", "_log_softmax"] + H * ["exp", "mul"] for H in (True, False)}


@pytest.mark.parametrize("share_prompt", [None, True, False])
def test_the_host_asks_the_device_a_few_times_whatever_is_packed(share_prompt):
    """Each wait empties the GPU's queue: lengths of rows, where tokens are fed, and where they are scored."""
    model = make_model()
    ids, mask, _ = rollout(model)
    prompt_ids, lengths = pad_right(PROMPTS, 256, CPU)
    with torch.no_grad(), Calls() as calls:
        token_logprobs(model, prompt_ids, lengths, ids, mask, temperature=0.7, share_prompt=share_prompt)
    assert 3 <= len(calls.waits) <= 5, calls.waits


def test_under_autocast_the_mask_has_the_dtype_of_the_layers(monkeypatch):
    model, seen = make_model(), []
    ids, mask, _ = rollout(model)
    forward = model.base_model.forward

    def spy(**inputs):
        seen.append(inputs["attention_mask"].dtype)
        return forward(**inputs)

    monkeypatch.setattr(model.base_model, "forward", spy)
    for low in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            train_logprobs(model, ids, mask, share_prompt=True)
    assert seen == [torch.bfloat16, torch.float32]


def test_chunked_head_equals_the_whole_head_in_value_and_gradient():
    model = make_model(dtype=torch.float64)
    results, temper = [], partial(tempered, temperature=0.7, vocab_size=259)
    for chunk in (4096, 7):
        hidden = torch.randn(30, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_(
            True
        )
        model.zero_grad()
        logp, entropy = head_logprobs(model, hidden, torch.arange(30), temper, chunk=chunk)
        (logp * torch.arange(30)).sum().backward()
        results.append((logp, entropy, hidden.grad, model.lm_head.weight.grad.clone()))
    for whole, parts in zip(*results):
        assert torch.allclose(whole, parts, atol=1e-10)


def test_a_compiled_head_has_one_shape_for_all_lengths_and_the_same_values_and_gradients(monkeypatch):
    """What --compile sets, traced without a break; the code generator, which takes half a minute, is left out.
    A shape takes a GPU ten seconds to compile, and any shape at once more than a minute."""
    compiler, shapes = torch.compile, []

    def count(graph, inputs):
        shapes.append([tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor) and x.shape[-1:] == (32,)])
        return graph

    monkeypatch.setattr(torch, "compile", lambda f, **options: compiler(f, backend=count, fullgraph=True, **options))
    monkeypatch.setattr(lm.in_blocks, "__defaults__", (8,))
    model, temper = make_model(), partial(tempered, temperature=0.7, vocab_size=259)
    for layer in lm.decoder_layers(model):
        monkeypatch.setattr(layer, "compile", lambda **options: None)
    results = {}
    for compiled in (False, True):
        lm.prepare(model, Args(compile=compiled), World(0, 1, CPU), token_logprobs)
        for N in (30, 21, 9, 44, 1):
            hidden = torch.randn(N, 32, generator=torch.Generator().manual_seed(N)).requires_grad_(True)
            model.zero_grad()
            logp, entropy = head_logprobs(model, hidden, torch.arange(N), temper, chunk=12)
            (logp * torch.arange(1, N + 1)).sum().backward()
            found = (logp, entropy, hidden.grad, model.lm_head.weight.grad.clone())
            for a, b in zip(results.setdefault(N, found), found, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    assert 1 <= len(shapes) <= 2 and all((8, 32) in found for found in shapes), shapes  # 2: recomputed without gradient


@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
def test_micro_batch_sizes_give_one_gradient_except_for_bnpo(loss_type):
    """Through generation, log-probs and loss in fp64: 1, 2, 4, whole groups and the full batch, with KL."""
    model, reference = make_model("gpt2", dtype=torch.float64), make_model("gpt2", seed=1, dtype=torch.float64)
    P, G = len(PROMPTS), 4
    ids, mask, _ = rollout(model, G=G)
    prompt_ids, lengths = pad_right(PROMPTS, 256, CPU)
    advantages = torch.linspace(-1, 1, P * G, dtype=torch.float64)
    old = train_logprobs(model, ids, mask)[0].detach() + 0.3 * torch.randn(ids.shape, dtype=torch.float64) * mask
    grads = {}
    for size in (None, 1, 2, 4, 8):
        model.zero_grad()
        for p, r in micro_batches(P, G, size):
            rows = prompt_ids[p], lengths[p], ids[r], mask[r]
            new = token_logprobs(model, *rows, temperature=0.7, vocab_size=259)[0]
            with torch.no_grad():
                ref = token_logprobs(reference, *rows, temperature=0.7, vocab_size=259)[0]
            loss, _ = grpo_loss(
                new, old[r], ref, advantages[r], mask[r], loss_type=loss_type, beta=0.1, max_completion_length=12,
                num_loss_tokens=mask.sum(), num_sequences=P * G,
            )  # fmt: skip
            loss.backward()
        grads[size] = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])
    gap = max((grads[size] - grads[None]).abs().max().item() for size in (1, 2, 4, 8))
    assert grads[None].abs().max() > 1e-2
    assert gap > 1e-4 if loss_type == "bnpo" else gap < 1e-10


def test_without_noise_numbers_come_from_torchs_generator():
    model, options = make_model(), dict(num_generations=4, max_new_tokens=12, **SAMPLING)
    greedy = generate(model, PROMPTS, temperature=0.0, **options)
    assert torch.equal(greedy[0], rollout(model, temperature=0.0)[0])
    found = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(generate(model, PROMPTS, temperature=0.7, **options)[0].tolist())
    assert found[0] == found[1] != found[2]


def test_a_completion_does_not_depend_on_its_batch_but_on_its_sample_id():
    model = make_model()
    ids, mask, _ = rollout(model)
    for i, prompt in enumerate(PROMPTS):  # the same samples, prompt by prompt
        alone, alone_mask, _ = rollout(model, prompts=[prompt], first=4 * i)
        T = alone.shape[1]
        assert torch.equal(alone * alone_mask, (ids * mask)[4 * i : 4 * i + 4, :T])
        assert not mask[4 * i : 4 * i + 4, T:].any()
    twice, _, _ = rollout(model, prompts=[PROMPTS[0], PROMPTS[0]])
    assert not torch.equal(twice[:4], twice[4:]), "two groups of one prompt must differ"
    other, _, _ = rollout(model, seed=1)
    T = min(other.shape[1], ids.shape[1])
    assert not torch.equal(other[:, :T], ids[:, :T])


def test_noise_is_uniform_and_keyed_by_seed_sample_and_position():
    noise = sampling_noise(42, range(4000), 8)
    assert torch.equal(noise[100:110], sampling_noise(42, range(100, 110), 8))
    assert torch.equal(noise[:, :3], sampling_noise(42, range(4000), 3))
    assert not torch.equal(noise, sampling_noise(43, range(4000), 8))
    assert 0 <= noise.min() and noise.max() < 1
    counts = np.histogram(noise.numpy(), bins=20, range=(0, 1))[0]
    assert ((counts - 1600) ** 2 / 1600).sum() < 45.3  # chi-square with 19 degrees of freedom, p = 0.0006
    assert abs(np.corrcoef(noise.numpy().T) - np.eye(8)).max() < 0.06  # positions are independent
    assert abs(np.corrcoef(noise[:200].numpy()) - np.eye(200))[:, :].mean() < 0.4  # and so are samples


def test_sampled_frequencies_are_the_tempered_softmax_whatever_the_generation_config_says():
    """Chi-square over the first token; the model's config asks for top-k 1 and a repetition penalty, in vain."""
    model = make_model()
    model.generation_config.update(do_sample=True, top_k=1, top_p=0.1, temperature=0.01, repetition_penalty=5.0)
    n = 20_000
    with torch.no_grad():
        model.lm_head.weight.mul_(0.3)
        logits = model(input_ids=torch.tensor([PROMPTS[0]])).logits[0, -1]
    expected = (logits[:259] / 0.7).softmax(-1) * n
    ids, _, _ = rollout(model, prompts=[PROMPTS[0]], G=n, T=1)
    counts = torch.bincount(ids[:, 0], minlength=VOCAB).float()
    assert counts[259:].sum() == 0
    assert (expected > 5).all()
    chi2 = ((counts[:259] - expected) ** 2 / expected).sum().item()
    assert chi2 < 258 + 4 * (2 * 258) ** 0.5  # mean + 4 standard deviations


def test_ids_beyond_the_tokenizer_are_never_sampled_nor_given_probability():
    logits = torch.full((1000, VOCAB), -1.0)
    logits[:, 259:] = 50.0  # the rows nobody may draw are by far the likeliest
    for temperature in (0.7, 0.0):
        tokens, logp = sample_tokens(logits, torch.linspace(0, 1 - 2**-24, 1000), temperature, 259)
        assert tokens.max() < 259
        assert torch.allclose(logp.exp(), torch.tensor(1 / 259))
    model = make_model()
    with torch.no_grad():
        model.lm_head.weight[259:] = 5.0
    ids, mask, sampled = rollout(model)
    assert ids.max() < 259
    assert (train_logprobs(model, ids, mask)[0] - sampled).abs().max() < 1e-5


@pytest.mark.parametrize("u", [0.0, 0.5, 1 - 2**-24])
def test_extreme_noise_still_picks_a_token_that_can_happen(u):
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]])
    tokens, logp = sample_tokens(logits, torch.tensor([u]), 1.0, 4)
    assert tokens.item() in (1, 3) and logp.exp().item() == pytest.approx(0.5)


def test_every_end_id_of_the_generation_config_stops_a_row(tokenizer):
    model = make_model()
    assert stop_token_ids(model.generation_config, tokenizer) == [256, 258]
    bias = torch.zeros(VOCAB)
    bias[258] = 100.0  # the second end id
    head = model.lm_head
    model.lm_head = torch.nn.Linear(32, VOCAB)
    model.lm_head.weight, model.lm_head.bias = head.weight, torch.nn.Parameter(bias)
    ids, mask, _ = rollout(model)
    assert ids.shape[1] == 1 and (ids == 258).all() and mask.all()


def test_a_completion_that_ends_at_once_trains():
    """One token, the end token: it has a log-prob, an entropy and a gradient."""
    model = make_model()
    ids = torch.tensor([[256, 256, 256]] * 4 + [[7, 8, 256]] * 4)
    mask = completion_mask(ids, [256, 258])
    for share_prompt in (True, False):
        logprobs, _ = train_logprobs(model, ids, mask, prompts=PROMPTS[:2], share_prompt=share_prompt)
        assert (logprobs[:4, 0] < 0).all() and (logprobs[:4, 1:] == 0).all()
        model.zero_grad()
        logprobs[:4].sum().backward()
        assert model.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


def test_fully_masked_rows_give_zeros_and_finite_gradients():
    model = make_model()
    ids, mask, _ = rollout(model)
    mask = mask.clone()
    mask[2:6] = False
    for share_prompt in (True, False):
        logprobs, _ = train_logprobs(model, ids, mask, share_prompt=share_prompt)
        assert (logprobs[2:6] == 0).all()
        model.zero_grad()
        logprobs.sum().backward()
        assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_decode_work_does_not_grow_with_length(monkeypatch, micro_model_folder):
    """Every decode step feeds one token a row, also where gradient checkpointing is on, which kills the usual cache."""
    model = load_model(Args(model_name=micro_model_folder, gradient_checkpointing=True), CPU)
    fed = []
    forward = model.base_model.forward

    def spy(*args, **kwargs):
        fed.append(tuple(kwargs["input_ids"].shape))
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.base_model, "forward", spy)
    rollout(model, prompts=[*PROMPTS, PROMPTS[0]], G=2, T=6)
    assert fed[0] == (3, 7), "three distinct prompts of up to seven tokens, each prefilled once"
    assert all(width == 1 and rows <= 8 for rows, width in fed[1:]) and len(fed) <= 6


def test_rows_that_have_ended_leave_the_batch(monkeypatch):
    """And the others go on as if they had not (the tests of generation above compare every token)."""
    model, fed = make_model(), []
    forward = model.base_model.forward

    def spy(*args, **kwargs):
        fed.append(len(kwargs["input_ids"]))
        return forward(*args, **kwargs)

    monkeypatch.setattr(model.base_model, "forward", spy)
    _, mask, _ = rollout(model, G=64, T=24)
    alive = [int(mask[:, t].sum()) for t in range(1, mask.shape[1])]
    assert all(n <= rows < 2 * n for n, rows in zip(alive, fed[1:]) if n < 192), "never more than twice the live rows"
    assert fed[-1] < 96


def test_activations_take_the_bytes_that_the_budget_of_tokens_reckons_with():
    """docs/performance.md: L (34 d + 8 f) a token of a training row. Counted: what backward keeps, on tensors without
    values, in bfloat16 over fp32 weights; what does not grow with the rows, such as rounded weights, is left out."""

    def kept(layers: int, rows: int) -> int:
        sizes = dict(hidden_size=896, intermediate_size=4864, num_attention_heads=14, num_key_value_heads=2)
        config = Qwen2Config(**sizes, num_hidden_layers=layers, vocab_size=VOCAB, attn_implementation="sdpa")
        with FakeTensorMode():
            model, found = Qwen2ForCausalLM(config), {}

            def pack(x):
                found[x.untyped_storage()._cdata] = x.untyped_storage()
                return x

            keep = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
            with torch.autocast("cpu", torch.bfloat16), keep:
                model.base_model(input_ids=torch.zeros(rows, 256, dtype=torch.long), use_cache=False)
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        return sum(storage.nbytes() for key, storage in found.items() if key not in own)

    a_token = [(kept(layers, 4) - kept(layers, 2)) / (2 * 256) for layers in (1, 2)]
    assert a_token[1] - a_token[0] == pytest.approx(34 * 896 + 8 * 4864, rel=0.03)


def test_gradient_checkpointing_changes_no_gradient(micro_model_folder):
    grads = []
    for on in (False, True):
        model = load_model(Args(model_name=micro_model_folder, gradient_checkpointing=on), CPU)
        ids, mask, _ = rollout(model)
        model.train(on)
        train_logprobs(model, ids, mask)[0].sum().backward()
        grads.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert torch.allclose(*grads, atol=1e-5)


def test_dropout_in_the_config_changes_neither_ratio_nor_kl(tmp_path, tokenizer):
    model = make_model("gpt2")
    model.config.resid_pdrop = model.config.attn_pdrop = model.config.embd_pdrop = 0.5
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load_model(Args(model_name=str(tmp_path)), CPU)
    model.train()
    ids, mask, sampled = rollout(model)
    assert (train_logprobs(model, ids, mask)[0] - sampled).abs().max() < 1e-5


def test_weights_are_loaded_in_float32_so_that_a_small_learning_rate_moves_them(tmp_path, tokenizer):
    """In bfloat16 an AdamW step at 1e-6 is rounded away for nearly every weight."""
    make_model().to(torch.bfloat16).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = load_model(Args(model_name=str(tmp_path)), CPU)
    weight = model.model.layers[0].mlp.up_proj.weight
    before = weight.detach().clone()
    optimizer = torch.optim.AdamW([weight], lr=1e-6, weight_decay=0.0)
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert weight.dtype == torch.float32 and (weight != before).float().mean() > 0.99


def test_bfloat16_sampling_stays_close_to_bfloat16_training():
    """The decode copy is bfloat16, the update autocasts fp32 masters: near, but not equal, hence the logged gap."""
    model = make_model()
    sampler = sampling_copy(model, CPU, torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ids, mask, sampled = rollout(sampler, G=16)
        logprobs, _ = train_logprobs(model, ids, mask)
    gap = ((logprobs - sampled).abs() * mask).sum() / mask.sum()
    assert logprobs.dtype == sampled.dtype == torch.float32
    assert 0 < gap < 0.05


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_sampling_copy_rounds_weights_but_not_the_rotary_frequencies(name):
    model = make_model(name)
    copied = sampling_copy(model, CPU, torch.bfloat16)
    assert {p.dtype for p in copied.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in copied.parameters()) and all(p.requires_grad for p in model.parameters())
    for low, full in zip(copied.buffers(), model.buffers()):
        assert low.dtype == full.dtype and torch.equal(low, full) and low.data_ptr() != full.data_ptr()
    if name == "gpt2":  # learnt positions
        return
    x, position = torch.zeros(1, 1, 32, dtype=torch.bfloat16), torch.tensor([[1000]])
    for low, full in zip(copied.base_model.rotary_emb(x, position), model.base_model.rotary_emb(x.float(), position)):
        assert (low - full).abs().max() < 0.005, "no more than cos and sin rounded to bfloat16"


def test_a_large_vocabulary_is_sampled_in_two_steps_by_the_same_rule():
    """The definition in float64; where ids have no probability, at the ends of blocks too, none is ever drawn."""
    torch.manual_seed(0)
    B, V = 64, 20_000
    logits, u = 3 * torch.randn(B, V), torch.rand(B)
    u[0], u[1] = 0, 1 - 2**-24
    cdf = logits.double().softmax(-1).cumsum(-1)
    exact = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0]
    p = logits.softmax(-1)
    assert (inverse_cdf(p, u) == exact).float().mean() >= 0.95 and torch.equal(inverse_cdf(p, u)[:2], exact[:2])
    small = p[:, :5000] / p[:, :5000].sum(-1, keepdim=True)
    plain = torch.searchsorted(small.cumsum(-1), (u * small.cumsum(-1)[:, -1])[:, None], right=True)[:, 0]
    assert torch.equal(inverse_cdf(small, u), plain), "a small one in one step"
    for seed in range(20):
        torch.manual_seed(seed)
        p = torch.where(torch.rand(B, V) < 0.99, 0.0, torch.rand(B, V))
        p[:, 300:10_000] = 0
        u = torch.rand(B)
        u[0], u[1] = 0, 1 - 2**-24
        for scale in (1, 1e-3):
            assert (p.gather(1, inverse_cdf(p * scale, u)[:, None]) > 0).all()


def test_low_memory_reference_swaps_the_initial_weights_in_and_the_trained_ones_back():
    model, initial = make_model(), make_model(seed=1)
    weights = [p.detach().clone() for p in initial.parameters()]
    before = [p.detach().clone() for p in model.parameters()]
    addresses = [p.data_ptr() for p in model.parameters()]
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad(), swapped(model, weights) as reference:
        assert torch.equal(reference(ids).logits, initial(ids).logits)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(weights, initial.parameters()))
    assert addresses == [p.data_ptr() for p in model.parameters()], "in place: captured graphs keep working"


def test_what_a_reference_on_the_cpu_swaps_with_a_gpu_is_pinned(monkeypatch, micro_model_folder):
    """Copies from pageable memory are several times slower; there is none to pin for on a CPU."""
    pinned = []
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda w: pinned.append(w) or w)
    args = Args(model_name=micro_model_folder, low_memory_reference=True)
    for device in ("cpu", "cuda"):
        reference = Reference(SimpleNamespace(model=None), args, World(0, 1, torch.device(device)), None)
        assert len(pinned) == (len(reference.weights) if device == "cuda" else 0) and reference.weights


def test_models_that_change_their_logits_after_the_head_are_refused(tmp_path, tokenizer, capsys):
    make_model("gemma2").save_pretrained(tmp_path)
    args = Args(model_name=str(tmp_path))
    with pytest.raises(SystemExit) as stop:
        probe.check(load_model(args, CPU), args, longest=20)
    assert stop.value.code == 2 and "caps its logits" in capsys.readouterr().err
