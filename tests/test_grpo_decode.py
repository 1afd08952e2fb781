"""--decode graph and compile: buffers, buckets and bookkeeping of captured decode steps, as far as a CPU can prove them.

A CPU has no CUDA graphs, so a stand-in replays the step it was given: the very function, buffers and addresses that a
graph would be captured from. What is left to a GPU is that capture and replay do what CUDA promises.
"""

import copy
import importlib.util
import sys
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, SIZES, VOCAB, make_model
from test_grpo_model import ARCHITECTURES, PROMPTS, SAMPLING
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config, Qwen2ForCausalLM

from common.language import lm
from common.language.decode import GraphDecoder, Rows, bucket, feed
from common.language.fused import fuse
from common.parallel import refresh
from grpo_arithmetic import Args, generate, sample_tokens, sampling_noise


class Graphs(GraphDecoder):
    """Replays by calling. Like a real graph it only knows addresses: a tensor that was moved since capture is an error."""

    def __init__(self, model, **options):
        super().__init__(model, **{"compiled": False} | options)
        self.captures, self.replays = 0, 0

    def addresses(self):
        s = self.buffers
        tensors = [s.token, s.position, s.finished, s.output, s.t, s.noise, s.ids, s.logprobs, *s.keys, *s.values]
        return [x.data_ptr() for x in (*tensors, *self.model.parameters())]

    def capture(self, step, undo):
        captured = self.addresses()
        self.captures += 1
        for _ in range(2):  # the warm-up
            step()
            undo()

        def replay():
            assert self.addresses() == captured
            self.replays += 1
            step()

        return replay


def sampler_of(model):
    """As the trainer makes it: every test below that compares with the plain model compares the fused layers too."""
    return fuse(copy.deepcopy(model).requires_grad_(False), say=lambda text: None)


def rollout(model, decoder=None, prompts=PROMPTS, G=20, T=24, temperature=0.7, seed=0, **options):
    noise = sampling_noise(seed, range(len(prompts) * G), T)
    return generate(
        model, prompts, num_generations=G, max_new_tokens=T, temperature=temperature, noise=noise, decoder=decoder,
        **SAMPLING | options,
    )  # fmt: skip


def assert_equal(slow, fast, gap=1e-5):
    """Equal tokens, but for a few: a number within rounding of a step of the CDF draws another one, here or there."""
    T = min(slow[0].shape[1], fast[0].shape[1])
    (a, p), (b, q) = (((ids * mask)[:, :T].cpu(), logp[:, :T].cpu()) for ids, mask, logp in (slow, fast))
    same = a == b
    assert same.float().mean() >= 0.95
    assert (p - q)[same.all(1)].abs().max() < gap


def test_buckets_hold_what_they_are_for_and_waste_little():
    sizes = [bucket(rows, 1)[0] for rows in range(1, 3000)]
    assert all(size >= rows for rows, size in enumerate(sizes, 1)) and sizes == sorted(sizes)
    assert all((size - rows) / size <= 1 / 3 for rows, size in enumerate(sizes, 1) if rows >= 8)
    assert len(set(sizes)) == 18, "graphs for up to 3,072 rows"
    assert all(bucket(size, 1)[0] == size for size in sizes)
    columns = [bucket(1, c)[1] for c in range(1, 500)]
    assert all(0 <= size - c < 64 and size % 64 == 0 for c, size in enumerate(columns, 1))


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [0.7, 0.0])
def test_replayed_steps_sample_the_tokens_of_the_eager_loop(name, temperature):
    """Same tokens, and log-probs up to the rounding of another attention, while rows end and leave the batch."""
    model = make_model(name)
    decoder = Graphs(sampler_of(model))
    options = {"temperature": temperature}
    slow, fast = rollout(model, **options), rollout(decoder.model, decoder, **options)
    assert_equal(slow, fast)
    assert decoder.replays == slow[0].shape[1] - 1 and decoder.fallbacks == 0
    if temperature > 0:
        rows = {key[0] for key in decoder.graphs}
        assert max(rows) == 64 and len(rows) >= 3, "60 completions, then ever fewer: the batch changes its bucket"


def test_long_completions_move_through_the_buckets_of_length():
    model = make_model()
    decoder = Graphs(sampler_of(model))
    options = dict(G=4, T=120, stop_ids=[256, 258])
    assert_equal(rollout(model, **options), rollout(decoder.model, decoder, **options))
    assert {key[1] for key in decoder.graphs} == {64, 128}


@torch.no_grad()
def test_what_a_graph_reads_outlives_the_call_that_captured_it():
    """A graph replays addresses and owns nothing: were the step's view or its row numbers freed, it would read garbage."""

    class Forgetful(Graphs):
        def capture(self, step, undo):
            model, view, *sampling = step.args
            rows = view.cache.layers[0].rows
            read = [weakref.ref(x) for x in (view, rows)]
            del step, view, rows

            def replay():
                assert None not in [x() for x in read]
                feed(model, read[0](), *sampling)

            return replay

    model = make_model()
    decoder = Forgetful(sampler_of(model))
    assert_equal(rollout(model), rollout(decoder.model, decoder))


def test_weights_are_refreshed_in_place_and_graphs_serve_every_later_batch():
    """Two updates of the sampling copy, three seeds each, a smaller batch and a larger one."""
    masters = [make_model(seed=seed) for seed in range(3)]
    decoder = Graphs(sampler_of(masters[0]))
    addresses = [p.data_ptr() for p in decoder.model.parameters()]
    for model in masters:
        refresh(decoder.model, model)
        for seed in range(3):
            assert_equal(rollout(model, seed=seed), rollout(decoder.model, decoder, seed=seed))
    assert addresses == [p.data_ptr() for p in decoder.model.parameters()]
    assert decoder.captures == len(decoder.graphs) <= 5 and decoder.replays > 20 * decoder.captures
    captures = decoder.captures
    assert_equal(rollout(model, G=2, T=9), rollout(decoder.model, decoder, G=2, T=9))
    assert decoder.captures <= captures + 1, "a smaller batch has room in the buffers there are"
    assert_equal(rollout(model, G=40), rollout(decoder.model, decoder, G=40))  # no room: new buffers, all graphs anew
    assert_equal(rollout(model, seed=7), rollout(decoder.model, decoder, seed=7))
    assert decoder.size[0] == 128 and decoder.captures >= captures + 2


@pytest.mark.parametrize("name, own", [("qwen2", ""), ("qwen3", ""), ("llama", ""), ("gpt2", "projections"),
                                       ("gemma2", "Gemma2RMSNorm")])  # fmt: skip
@torch.no_grad()
def test_fused_layers_compute_what_the_plain_ones_do_also_after_a_refresh(name, own):
    """Parameters keep their order, which refreshing goes by; what has another form stays, and is named once."""
    said, ids = [], torch.randint(VOCAB, (3, 7), generator=torch.Generator().manual_seed(0))
    model, later = make_model(name), make_model(name, seed=1)
    fused = fuse(copy.deepcopy(model).requires_grad_(False), said.append)
    assert [(n, p.shape) for n, p in fused.named_parameters()] == [(n, p.shape) for n, p in model.named_parameters()]
    torch.testing.assert_close(fused(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-5)
    refresh(fused, later)
    torch.testing.assert_close(fused(ids).logits, later(ids).logits, rtol=1e-5, atol=1e-5)
    assert len(said) == bool(own) and own in "".join(said)
    patched = {n.rpartition(".")[2] for n, module in fused.named_modules() if "forward" in vars(module)}
    assert ("gate_proj" in patched, "input_layernorm" in patched) == (name != "gpt2", name[0] in "ql")
    if name == "qwen2":  # a layer that is given what the first was not computes by itself
        attention, x = fused.model.layers[0].self_attn, torch.randn(2, 32)
        attention.q_proj(torch.randn(2, 32))
        expected = torch.nn.functional.linear(x, attention.v_proj.weight, attention.v_proj.bias)
        torch.testing.assert_close(attention.v_proj(x), expected)


class Launches(TorchDispatchMode):
    """Counts what would start a kernel: operations that are neither views nor bookkeeping."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        idle = func.is_view or func.name().startswith(("prim::", "aten::empty", "aten::_unsafe_view", "aten::lift"))
        self.count += not idle
        return func(*args, **kwargs or {})


@torch.no_grad()
def test_a_fused_decode_step_starts_a_third_fewer_kernels(monkeypatch):
    """Counted on tensors that only pretend to be on a GPU, where F.rms_norm is one kernel."""
    monkeypatch.setattr("common.language.fused.is_rms_norm", lambda layer: True)  # nothing has values here

    def launches(layers: int, fused: bool) -> int:
        config = Qwen2Config(**SIZES | {"num_hidden_layers": layers}, num_key_value_heads=2, tie_word_embeddings=True)
        with FakeTensorMode(), torch.device("cuda"):
            torch.set_default_dtype(torch.bfloat16)
            try:
                model = Qwen2ForCausalLM(config).eval()
            finally:
                torch.set_default_dtype(torch.float32)
            model = fuse(model) if fused else model
            model.set_attn_implementation("packed")
            whole = dict.fromkeys(("token", "position", "output"), torch.zeros(8, dtype=torch.long))
            caches = [torch.zeros(8, 2, 64, 8, dtype=torch.bfloat16) for _ in range(layers)]
            rows = Rows(**whole, finished=torch.zeros(8, dtype=torch.bool), keys=caches, values=caches,
                        t=torch.zeros(1, dtype=torch.long), noise=torch.zeros(8, 9), logprobs=torch.zeros(8, 9),
                        ids=torch.zeros(8, 9, dtype=torch.long), stop_ids=(5,), pad_id=0)  # fmt: skip
            with Launches() as counted:
                feed(model, rows, sample_tokens, 0.7, VOCAB)
        return counted.count

    plain, fused = (launches(2, fused) - launches(1, fused) for fused in (False, True))
    assert plain - fused >= 3 + 2 * 5, "of a layer: three products, and of two norms all kernels but one"
    assert fused < 0.7 * plain


def test_steps_are_captured_by_default_on_a_gpu_alone():
    devices = torch.device("cpu"), torch.device("cuda")
    assert [lm.decode_mode(Args(), device) for device in devices] == ["eager", "graph"]
    for mode in ("eager", "graph", "compile"):
        assert [lm.decode_mode(Args(decode=mode), device) for device in devices] == [mode, mode]


def test_compiled_steps_have_few_shapes():
    """Each shape costs a compilation: three of rows, two of columns, however rows end."""
    model = make_model()
    decoder = Graphs(sampler_of(model), compiled=True)
    decoder.feed = feed  # as if compiled
    options = dict(G=20, T=100, stop_ids=[*range(4), 256, 258])
    assert_equal(rollout(model, **options), rollout(decoder.model, decoder, **options))
    shapes = {key[:2] for key in decoder.graphs}
    assert len(shapes) > 2 and shapes <= {(n, columns) for n in (64, 16, 4) for columns in (64, 128)}
    decoder.size = (256, 320, 256)
    assert [decoder.shape(n, c) for n, c in ((256, 320), (65, 129), (64, 128), (17, 1), (16, 1))] == [
        (256, 320), (256, 320), (64, 128), (64, 128), (16, 128),
    ]  # fmt: skip


def test_nothing_of_an_earlier_batch_is_left_in_the_buffers():
    model = make_model()
    decoder = Graphs(sampler_of(model))
    rollout(decoder.model, decoder)
    for cache in decoder.buffers.keys + decoder.buffers.values:
        cache.fill_(torch.nan)  # what a diverged policy leaves behind: 0 * NaN would reach every row
    assert_equal(rollout(model, seed=1, G=9), rollout(decoder.model, decoder, seed=1, G=9))
    first = rollout(decoder.model, decoder, seed=1)
    kept = [x.clone() for x in first]
    rollout(decoder.model, decoder, seed=2)
    assert all(torch.equal(a, b) for a, b in zip(first, kept)), "the next batch must not overwrite what was returned"


class HostReads(TorchDispatchMode):
    """Collects operations that make the host wait for the device, or copy to it: none may be captured."""

    FORBIDDEN = ("_local_scalar_dense", "nonzero", "masked_select", "lift_fresh", "unique", "equal.default")

    def __init__(self):
        super().__init__()
        self.found, self.count = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        self.found += [str(func)] * any(name in str(func) for name in self.FORBIDDEN)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("name", ARCHITECTURES)
@pytest.mark.parametrize("temperature", [0.7, 0.0])
@torch.no_grad()
def test_a_decode_step_never_asks_the_device_for_a_value(name, temperature):
    model = make_model(name)
    decoder = Graphs(sampler_of(model))
    rollout(decoder.model, decoder, T=3)
    decoder.buffers.t.zero_()
    with HostReads() as reads:
        feed(decoder.model, decoder.buffers.pick(slice(8), 64), sample_tokens, temperature, 259)
    assert reads.count > 50 and reads.found == []
    with HostReads() as reads:  # the mode sees what it looks for
        rows = decoder.buffers.pick(slice(8), 64)
        rows.append(*sample_tokens(torch.zeros(8, 264), rows.noise[rows.output, rows.t], 0.0, 259))
        decoder.buffers.t[0].item()
    assert [name.split(".")[1] for name in reads.found] == ["_local_scalar_dense"]


def test_steps_without_a_graph_are_counted_and_sample_the_same_tokens():
    model = make_model()
    slow = rollout(model)
    on_cpu = GraphDecoder(sampler_of(model), compiled=False)
    assert_equal(slow, rollout(on_cpu.model, on_cpu))
    assert on_cpu.fallbacks == slow[0].shape[1] - 1, "a CPU has no graphs"

    said = []

    class Failing(Graphs):
        def capture(self, step, undo):
            step()  # half a warm-up, then CUDA complains
            raise RuntimeError("operation not permitted when stream is capturing\nand a page of advice")

    failing = Failing(sampler_of(model), say=said.append)
    assert_equal(slow, rollout(failing.model, failing))
    assert failing.fallbacks == slow[0].shape[1] - 1
    assert len(said) == len(failing.graphs) and "64 x 64" in said[0] and "not permitted" in said[0]
    assert "\n" not in said[0]


def test_capturing_takes_every_step_of_the_warm_up_back_and_runs_none_itself(monkeypatch):
    """The order of CUDA's calls, with stand-ins for them: steps run in pairs with undo() on a side stream, then one is
    recorded, into a pool of memory that all graphs share."""
    done = []

    class Stream:
        def wait_stream(self, other):
            done.append("wait")

    class Recording:
        def __init__(self, graph, pool, capture_error_mode):
            done.append(("record", pool))

        __enter__ = lambda self: None  # noqa: E731
        __exit__ = lambda self, *error: done.append("end")  # noqa: E731

    main, pools, graph = Stream(), iter("ab"), SimpleNamespace(replay=lambda: done.append("replay"))
    fakes = {
        "Stream": Stream, "current_stream": lambda: main, "stream": lambda stream: nullcontext(), "graph": Recording,
        "graph_pool_handle": lambda: next(pools), "CUDAGraph": lambda: graph,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    decoder = GraphDecoder(make_model(), compiled=False)
    decoder.pool, decoder.buffers = None, SimpleNamespace(token=SimpleNamespace(device=torch.device("cuda")))
    for _ in range(2):
        decoder.capture(lambda: done.append("step"), lambda: done.append("undo"))()
    once = ["wait", "step", "undo", "step", "undo", "wait", ("record", "a"), "step", "end", "replay"]
    assert done == once * 2


def test_the_step_compiles_as_one_graph_without_python_in_between():
    """fullgraph: anything the compiler cannot see through would be an error, counted as a fallback."""
    model, problems = make_model(), []
    decoder = GraphDecoder(sampler_of(model), compiled=True, say=problems.append)
    decoder.feed = torch.compile(feed, dynamic=False, fullgraph=True, backend="aot_eager")  # tracing, no C++
    options = {"G": 2, "T": 6}
    assert_equal(rollout(model, **options), rollout(decoder.model, decoder, **options))
    assert decoder.fallbacks == 0 and problems == [] and len(decoder.graphs) == 1


def test_the_decode_benchmark_knows_its_sizes_and_its_numerics_hold():
    spec = importlib.util.spec_from_file_location("gpu_decode", ROOT / "benchmarks" / "gpu_decode.py")
    benchmark = importlib.util.module_from_spec(spec)
    sys.modules["gpu_decode"] = benchmark  # dataclasses look their module up
    spec.loader.exec_module(benchmark)
    weights = sum(p.numel() for p in benchmark.make_model("0.5B", "meta", torch.bfloat16).parameters())
    assert weights == 494_032_768 and benchmark.kv_bytes("0.5B", torch.bfloat16) == 12_288
    found = benchmark.numerics(benchmark.Args(device="cpu", size="toy", reduced=True))
    assert found["graph: share of completions equal to eager's, float32"] == 1.0
    assert all(value for value in found.values() if isinstance(value, bool))
    gaps = [value for name, value in found.items() if "gap" in name]
    assert len(gaps) == 7 and all(0 < gap < 0.05 for gap in gaps)
