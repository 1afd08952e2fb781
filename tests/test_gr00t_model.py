"""common/robot/gr00t_n15.py is numerically GR00T N1.5, trains what its flags say, and reads and writes its files exactly.

The fixtures that running the original gave are used where they are (../shared/data/gr00t_parity); the golden values
below were recorded from this code while it met them, so that the suite proves the same without.
"""

import copy
import dataclasses
import hashlib
import json
import math
import shutil
import sys
from functools import partial

import networks
import numpy as np
import pytest
import torch
from conftest import ROOT
from networks import (
    DEVICES,
    TOLERANCE,
    HeadOnly,
    assert_adamw,
    assert_golden,
    assert_gradients,
    assert_refused,
    contents,
    distance,
    edit,
    edit_config,
    fill,
    flow_loss,
    grad_norm,
    sample,
    shard,
    truncate,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from common.robot.dit import AdaLayerNorm, DiT, cos_sin
from common.robot.gr00t_n15 import EAGLE, EMBED, GR00T, LM_HEAD, ActionHead, EagleBackbone, GR00TConfig

group_of = GR00T.group_of
FIXTURES = ROOT.parent / "shared" / "data" / "gr00t_parity"
needs_fixtures = pytest.mark.skipif(
    not FIXTURES.exists(), reason="no ../shared/data/gr00t_parity beside the repository"
)
load_fixture = partial(networks.load_fixture, FIXTURES)
ALL = dict(tune_llm=True, tune_visual=True, tune_projector=True, tune_diffusion_model=True)


# ---- parity with the original ----------------------------------------------------------------------------------------


def head_fixture(device="cpu"):
    tensors, batch, facts = load_fixture("head_small", device=device)
    published = GR00TConfig().to_json()
    source = published | {"action_head_cfg": facts["action_head_cfg"]}
    model = HeadOnly(ActionHead(GR00TConfig.from_json(source, GR00TConfig.tiny().eagle))).to(device).eval()
    model.load_state_dict({k: v for k, v in tensors.items() if k.startswith("action_head.")})
    return model, batch, tensors, facts["expected"]


def test_a_config_derived_from_the_published_one_may_keep_its_sizes_above_those_of_the_head():
    config = GR00TConfig.tiny(**SMALL).to_json() | {"action_dim": 32, "action_horizon": 16}
    found = GR00TConfig.from_json(config, GR00TConfig.tiny().eagle)
    assert (found.action_dim, found.action_horizon) == (6, 8)
    assert (found.to_json()["action_dim"], found.to_json()["action_horizon"]) == (6, 8)


@needs_fixtures
@pytest.mark.parametrize("device", DEVICES)
def test_head_fixture_velocity_loss_gradients_and_samples(device):
    model, batch, tensors, expected = head_fixture(device)
    near, features = TOLERANCE[device], batch["backbone_features"].requires_grad_()
    loss, v_pred = flow_loss(model, batch)
    loss.backward()
    assert abs(loss.item() / expected["loss"] - 1) < near["loss"]
    assert distance(v_pred, tensors["expected.pred_velocity"]) < near["velocity"]
    assert_gradients(model, expected["grad_norm"], near["grad"], backbone_features=features)
    for steps in (4, 8):
        assert distance(sample(model, batch, steps), tensors[f"expected.actions_{steps}_steps"]) < near["actions"]


@needs_fixtures
def test_head_fixture_four_adamw_updates():
    model, batch, _, expected = head_fixture()
    assert_adamw(model, batch, expected["adamw"])


@needs_fixtures
@pytest.mark.parametrize("device", DEVICES)
def test_backbone_fixture_features_of_real_tokens_and_of_pads(device):
    tensors, batch, facts = load_fixture("backbone_small", device=device)
    config = dataclasses.replace(GR00TConfig(), select_layer=2, eagle=facts["eagle_config"])
    backbone = EagleBackbone(config)
    carried = (".head.", "lm_head")
    weights = {k.removeprefix("backbone."): v for k, v in tensors.items() if k.startswith("backbone.")}
    backbone.load_state_dict({k: v for k, v in weights.items() if not any(part in k for part in carried)})
    features, mask = backbone.to(device)(batch)
    expected = tensors["expected.backbone_features"]
    assert distance(features[mask], expected[mask.cpu()]) < TOLERANCE[device]["features"]
    assert distance(features, expected) < TOLERANCE[device]["features"]


@needs_fixtures
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["equal", "padded"])
def test_full_fixture_loss_gradients_and_samples(kind, device):
    tensors, batch, facts = load_fixture("full_small", f"{kind}.", device)
    expected, near = facts["batches"][kind], TOLERANCE[device]
    model = GR00T.from_pretrained(FIXTURES / "full_small", device=device)
    model.set_trainable(**ALL)
    loss, _ = flow_loss(model, batch)
    loss.backward()
    assert abs(loss.item() / expected["loss"] - 1) < near["loss"]
    assert_gradients(model, expected["grad_norm"], near["grad"])
    for steps in (4, 8):
        actions = tensors[f"{kind}.expected.actions_{steps}_steps"]
        assert distance(sample(model, batch, steps), actions) < near["actions"]


@needs_fixtures
def test_full_fixture_trains_what_the_original_trains():
    """Counts include the stored but unused tensors, which follow the flag of the part they belong to."""
    _, _, facts = load_fixture("full_small")
    model = GR00T.from_pretrained(FIXTURES / "full_small")
    for case in facts["trainable"]:
        model.set_trainable(**{flag: case[flag] for flag in ALL})
        trained = [p.numel() for p in model.parameters() if p.requires_grad]
        trained += [t.numel() for name, t in model.carried.items() if model.flags[group_of(name)]]
        assert [len(trained), sum(trained)] == case["trainable_tensors_parameters"]


@needs_fixtures
def test_full_fixture_saved_again_holds_every_tensor_bit_for_bit(tmp_path):
    GR00T.from_pretrained(FIXTURES / "full_small").save_pretrained(tmp_path)
    ours, theirs = load_file(tmp_path / "model.safetensors"), load_file(FIXTURES / "full_small" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for file in ("config.json", "eagle_config.json"):
        saved, read = (json.loads((folder / file).read_text()) for folder in (tmp_path, FIXTURES / "full_small"))
        assert saved == read


# ---- golden values ---------------------------------------------------------------------------------------------------

GOLDEN_CONFIG = dict(image_size=16, patch_size=8, action_dim=6, action_horizon=8, state_dim=10, num_embodiments=5)
SMALL = dict(action_dim=6, action_horizon=8, state_dim=10, num_embodiments=5)


def golden_model(**changes):
    return fill(GR00T(GR00TConfig.tiny(**(GOLDEN_CONFIG | changes)))).eval()


def golden_batch(lengths=(12, 9, 12)):
    """Three samples with one 16x16 image (4 tokens) each; prompts of these lengths, padded on the left."""
    rng = np.random.RandomState(99)
    S = max(lengths)
    ids, mask = torch.full((3, S), 256), torch.zeros(3, S, dtype=torch.long)
    for i, n in enumerate(lengths):
        text = torch.from_numpy(rng.randint(0, 256, 12))[: n - 4]
        ids[i, S - n :] = torch.cat([text[:2], torch.full((4,), 259), text[2:]])
        mask[i, S - n :] = 1
    normal = lambda *shape: torch.from_numpy(rng.standard_normal(shape)).float()  # noqa: E731
    action_mask = torch.ones(3, 8, 6, dtype=torch.bool)
    action_mask[1:, :, 4:] = False
    return {
        "eagle_input_ids": ids,
        "eagle_attention_mask": mask,
        "eagle_pixel_values": normal(3, 3, 16, 16).clamp(-1, 1),
        "state": normal(3, 1, 10),
        "action": normal(3, 8, 6).clamp(-1, 1),
        "action_mask": action_mask,
        "embodiment_id": torch.tensor([4, 0, 2]),
        "noise": normal(3, 8, 6),
        "t": torch.tensor([0.8996, -0.0005, 0.3]),  # buckets 899 and 0: toward zero
        "initial_noise": normal(3, 8, 6),
    }


def rows(batch, i):
    return {k: v[i : i + 1] for k, v in batch.items()}


GOLDEN = {
    "original": {
        "features": [-0.92294, 0.8597389, 0.6750856, -2.656198],
        "pad features": [0.3165573, 0.5184151, 1.0987504, -2.5884843],
        "v_pred": [0.447566, -0.2001629, -0.4891261, -0.2156602],
        "actions 4": [0.9026759, -1.4997263, 0.321842, 1.4369755],
        "actions 8": [-0.7152942, -0.4667151, -0.8428789, 0.4093898],
        "loss": 2.0893257,
        "grad vision": 1.7395298,
        "grad mlp1": 0.8138706,
        "grad text": 2.2958386,
        "grad dit": 2.6062831,
        "grad vl": 1.1299228,
        "grad state": 0.0787435,
        "grad action": 0.7038277,
    },
    "masked": {
        "features": [-0.92294, 0.8597389, 0.6750856, -2.656198],
        "pad features": [0.3165573, 0.5184151, 1.0987504, -2.5884843],
        "v_pred": [0.4956143, -0.1041038, -0.4390851, -0.5041658],
        "actions 4": [0.9026759, -1.4997263, 0.321842, 1.4369755],
        "actions 8": [-0.7152942, -0.4667151, -0.8428789, 0.4093898],
        "loss": 2.0960419,
        "grad vision": 1.920992,
        "grad mlp1": 0.9387458,
        "grad text": 2.5375178,
        "grad dit": 2.7749638,
        "grad vl": 1.2694077,
        "grad state": 0.0799743,
        "grad action": 0.6987303,
    },
}


def measure(model, batch):
    model.set_trainable(**ALL)
    features, _ = model.backbone(batch)
    loss, v_pred = flow_loss(model, batch)
    loss.backward()
    found = {"features": features[1, -1, :4], "pad features": features[1, 0, :4], "v_pred": v_pred[1, 5, :4]}
    found |= {"actions 4": sample(model, batch, 4)[2, 7, :4], "actions 8": sample(model, batch, 8)[0, 0, :4]}
    found = {k: v.tolist() for k, v in found.items()}
    eagle, head = model.backbone.eagle_model, model.action_head
    parts = {"vision": eagle.vision_model, "mlp1": eagle.mlp1, "text": eagle.language_model, "dit": head.model}
    parts |= {"vl": head.vl_self_attention, "state": head.state_encoder, "action": head.action_encoder}
    found |= {"loss": loss.item()} | {f"grad {name}": grad_norm(part) for name, part in parts.items()}
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("mask_padding", [False, True])
def test_golden_values_of_a_whole_tiny_model_with_a_padded_batch(mask_padding, device):
    batch = {key: value.to(device) for key, value in golden_batch().items()}
    found = measure(golden_model(mask_padding=mask_padding).to(device), batch)
    assert_golden(found, GOLDEN["masked" if mask_padding else "original"], device)


def test_layer_norms_add_the_originals_epsilon():
    """1e-5 in the head, 1e-6 before its output and in the vision tower: it counts where activations are small."""
    config = GR00TConfig.tiny(image_size=16, dit_layers=0)
    dit = DiT(config)
    torch.nn.init.zeros_(dit.proj_out_1.weight), torch.nn.init.zeros_(dit.proj_out_1.bias)
    torch.nn.init.eye_(dit.proj_out_2.weight), torch.nn.init.zeros_(dit.proj_out_2.bias)
    adaptive = AdaLayerNorm(64)
    torch.nn.init.zeros_(adaptive.linear.weight), torch.nn.init.zeros_(adaptive.linear.bias)
    x = torch.tensor([1e-3, -1e-3] * 32)[None, None]  # variance 1e-6
    assert dit(x, None, torch.tensor([5]), None)[0, 0, 0].item() == pytest.approx(1e-3 / math.sqrt(2e-6), rel=1e-5)
    assert adaptive(x, torch.zeros(1, 64))[0, 0, 0].item() == pytest.approx(1e-3 / math.sqrt(1.1e-5), rel=1e-5)
    model = golden_model()
    norms = {name: m.eps for name, m in model.named_modules() if isinstance(m, torch.nn.LayerNorm)}
    assert {eps for name, eps in norms.items() if name.startswith("backbone.")} == {1e-6}
    assert {eps for name, eps in norms.items() if name.startswith("action_head.")} == {1e-5}
    assert model.backbone.text.norm.variance_epsilon == 1e-6


def test_time_features_are_the_originals():
    """Cosine first and frequencies over 127 in the DiT; sine first and over `half` in the action encoder."""
    bucket = torch.tensor([500])
    cos, sin = cos_sin(bucket, 128, 127)
    dit = torch.cat([cos, sin], dim=-1)[0, [0, 1, 127, 128, 129, 255]]
    assert dit.tolist() == pytest.approx([-0.883849, 0.997773, 0.998750, -0.467772, 0.066699, 0.049979], abs=2e-6)
    cos, sin = cos_sin(bucket, 768, 768)
    encoder = torch.cat([sin, cos], dim=-1)[0, [0, 1, 767, 768, 769, 1535]]
    assert encoder.tolist() == pytest.approx([-0.467772, -0.723924, 0.050582, -0.883849, -0.689880, 0.998720], abs=4e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_euler_times_fall_into_the_buckets_the_original_computes(dtype):
    for steps in range(1, 65):
        t = torch.tensor([k / steps for k in range(steps)], dtype=dtype)
        expected = [int(1000 * (k / steps)) for k in range(steps)]
        assert (t * 1000).long().tolist() == expected
    assert (torch.tensor([-0.0009, -0.0012]) * 1000).long().tolist() == [0, -1]


# ---- size and layout of the published checkpoint ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def full_model():
    with torch.device("meta"):
        return GR00T(GR00TConfig())


def test_full_size_has_the_899_tensors_of_the_published_checkpoint(full_model):
    layout = full_model.layout()
    assert len(layout) == 899
    assert sum(math.prod(shape) for shape in layout.values()) == 2_724_163_520
    lines = "\n".join(f"{name} {list(layout[name])}" for name in sorted(layout))
    assert hashlib.sha256(lines.encode()).hexdigest() == LAYOUT_SHA256
    manifest = ROOT.parent / "shared" / "reference" / "gr00t_n15_manifest.json"
    if manifest.exists():
        tensors = json.loads(manifest.read_text())["tensors"]
        assert layout == {name: tuple(facts["shape"]) for name, facts in tensors.items()}
        assert all(group_of(name) == facts["group"] for name, facts in tensors.items())
        assert full_model.carried_shapes().keys() == {name for name, facts in tensors.items() if not facts["used"]}


LAYOUT_SHA256 = "3e35b74d88e13394293cb9f88a3c43cdc0f1e6137dae9e610a8a0bb7e4f87d74"


@pytest.mark.parametrize(
    "flags, trained",
    [
        ({}, 1_068_806_144),
        ({"tune_diffusion_model": False}, 518_419_456),
        ({"tune_projector": False}, 751_873_024),
        ({"tune_projector": False, "tune_diffusion_model": False}, 201_486_336),
        ({"tune_llm": True}, 1_068_806_144 + 1_225_315_328),
        ({"tune_visual": True}, 1_068_806_144 + 430_042_048),
        (ALL, 2_724_163_520),
    ],
)
def test_each_flag_trains_the_published_number_of_parameters(full_model, flags, trained):
    full_model.set_trainable(**flags)
    used = sum(p.numel() for p in full_model.parameters() if p.requires_grad)
    shapes = full_model.carried_shapes()
    unused = sum(math.prod(s) for name, s in shapes.items() if full_model.flags[group_of(name)])
    assert used + unused == trained
    assert unused == 310_640_640 * full_model.flags["tune_llm"] + 15_238_352 * full_model.flags["tune_visual"]


def test_full_config_is_written_in_the_published_layout():
    config = GR00TConfig().to_json()
    assert GR00TConfig.from_json(config) == dataclasses.replace(GR00TConfig(), source=config)
    # the original takes these from the defaults of its code
    assert not {"max_num_embodiments", "max_seq_len"} & config["action_head_cfg"].keys()
    assert "mask_padding" not in config and "instruction_vocab" not in config["backbone_cfg"]
    assert (config["hidden_size"], config["action_head_cfg"]["hidden_size"]) == (2048, 1024)
    assert config["backbone_cfg"]["select_layer"] == 12 and config["backbone_cfg"]["project_to_dim"] is None


def test_building_needs_no_flash_attn(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # an import of it would fail
    monkeypatch.setattr("common.robot.gr00t.is_flash_attn_2_available", lambda: False)
    GR00T(GR00TConfig.tiny())
    with pytest.raises(SystemExit):
        GR00T(GR00TConfig.tiny(), attn_implementation="flash_attention_2")
    assert "needs the flash-attn package; sdpa works everywhere" in capsys.readouterr().err


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tiny", "lite", "masked and longer"])
def test_save_load_save_is_byte_equal(kind, tmp_path):
    torch.manual_seed(0)
    config = {
        "tiny": GR00TConfig.tiny(image_size=16),
        "lite": GR00TConfig.lite(instruction_vocab=50, num_embodiments=3),
        "masked and longer": GR00TConfig.tiny(image_size=16, mask_padding=True, action_horizon=32, max_seq_len=128),
    }[kind]
    model = GR00T(config)
    model.save_pretrained(tmp_path / "1")
    again = GR00T.from_pretrained(tmp_path / "1")
    assert dataclasses.replace(again.config, source={}) == config
    again.save_pretrained(tmp_path / "2")
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    again.save_pretrained(tmp_path / "1")  # over the file that `carried` is a view of
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert not again.training and again.flags == model.flags


def test_a_fresh_model_writes_the_unused_tensors_as_a_tied_one_would(tmp_path):
    GR00T(GR00TConfig.tiny(image_size=16)).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert torch.equal(tensors[LM_HEAD], tensors[EMBED])
    assert all(not tensor.any() for name, tensor in tensors.items() if ".vision_model.head." in name)


def published_folder(folder, shard_bytes=150_000, dtype=torch.bfloat16):
    """A tiny model as the published checkpoint is stored: bfloat16, several files and an index."""
    torch.manual_seed(0)
    model = GR00T(GR00TConfig.tiny(image_size=16))
    model.carried = {name: torch.randn(shape) for name, shape in model.carried_shapes().items()}
    model.carried = {name: tensor.to(dtype) for name, tensor in model.carried.items()}
    model.to(dtype).save_pretrained(folder, max_shard_bytes=shard_bytes)
    return model


def test_a_sharded_bfloat16_folder_loads(tmp_path):
    model = published_folder(tmp_path / "base")
    names = sorted(path.name for path in (tmp_path / "base").glob("model*"))
    count = len(names) - 1
    assert count > 2 and names[0] == f"model-00001-of-{count:05d}.safetensors"
    index = json.loads((tmp_path / "base" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == model.layout().keys()
    assert index["metadata"]["total_size"] == 2 * sum(math.prod(s) for s in model.layout().values())

    loaded = GR00T.from_pretrained(tmp_path / "base")
    assert {p.dtype for p in loaded.backbone.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in loaded.action_head.parameters()} == {torch.float32}  # what the optimizer changes
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name].bfloat16(), value), name
    assert all(torch.equal(loaded.carried[name], value) for name, value in model.carried.items())
    assert loaded.backbone.text.rotary_emb.inv_freq.dtype == torch.float32

    kept = GR00T.from_pretrained(tmp_path / "base", head_dtype=None)
    kept.save_pretrained(tmp_path / "copy", max_shard_bytes=150_000)
    assert contents(tmp_path / "base") == contents(tmp_path / "copy")
    kept.save_pretrained(tmp_path / "copy")  # one file: the shards and their index go
    assert sorted(contents(tmp_path / "copy")) == ["config.json", "eagle_config.json", "model.safetensors"]
    GR00T.from_pretrained(tmp_path / "copy")


def test_a_fine_tuned_checkpoint_keeps_a_bfloat16_backbone_and_a_float32_head(tmp_path):
    published_folder(tmp_path / "base")
    GR00T.from_pretrained(tmp_path / "base").save_pretrained(tmp_path / "tuned")
    with safe_open(tmp_path / "tuned" / "model.safetensors", "pt") as file:
        dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}
    assert {dtype for name, dtype in dtypes.items() if name.startswith("backbone.")} == {"BF16"}
    assert {dtype for name, dtype in dtypes.items() if name.startswith("action_head.")} == {"F32"}


def test_half_precision_compute_stays_near_float32(tmp_path):
    """bfloat16 backbone, float32 head, autocast: the dtypes of a fine-tuning run."""
    model = golden_model()
    model.save_pretrained(tmp_path)
    mixed = GR00T.from_pretrained(tmp_path, backbone_dtype=torch.bfloat16)
    _, expected = flow_loss(model, golden_batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, v_pred = flow_loss(mixed, golden_batch())
    assert loss.dtype == v_pred.dtype == torch.float32
    assert distance(v_pred, expected) < 0.1
    loss, v_pred = flow_loss(mixed, golden_batch())  # without autocast the head is exact on rounded features
    assert v_pred.dtype == torch.float32 and distance(v_pred, expected) < 0.1


@pytest.mark.parametrize("left_out", [LM_HEAD, EMBED, None])
def test_lerobots_prefix_and_its_single_tied_tensor_are_understood(left_out, tmp_path):
    model = published_folder(tmp_path, shard_bytes=10**9, dtype=torch.float32)
    model.carried[LM_HEAD] = model.state_dict()[EMBED].clone()
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({f"_groot_model.{k}": v for k, v in tensors.items() if k != left_out}, tmp_path / "model.safetensors")
    loaded = GR00T.from_pretrained(tmp_path)
    loaded.save_pretrained(tmp_path / "again")
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    assert again.keys() == tensors.keys()


def test_lerobots_own_config_means_the_published_sizes():
    assert GR00TConfig.from_json({"type": "groot", "chunk_size": 50}) == GR00TConfig()


def head_config(**changes):
    return lambda folder: edit_config(folder, lambda c: c["action_head_cfg"].update(changes))


def edit_index(folder, change):
    """An index that names other files; beside the folder lies a file that a careless reader would open."""
    shutil.copy(folder / "model.safetensors", folder.parent / "outside.safetensors")
    published_folder(folder)
    named = lambda index: {"weight_map": {key: change(file) for key, file in index["weight_map"].items()}}  # noqa: E731
    edit_config(folder, lambda index: index.update(named(index)), "model.safetensors.index.json")


FUTURE = "action_head.future_tokens.weight"
FAULTS = {  # how a folder is damaged -> what the one line must say
    "missing tensors": (
        lambda f: edit(f, lambda t: [t.pop(k) for k in ("action_head.vlln.bias", "action_head.vlln.weight")]),
        ["missing: action_head.vlln.", "action_head.vlln.bias", "action_head.vlln.weight"],
    ),
    "stale release": (lambda f: edit(f, lambda t: t.pop(FUTURE)), [f"missing: {FUTURE}", "stale"]),
    "both tied tensors": (lambda f: edit(f, lambda t: [t.pop(EMBED), t.pop(LM_HEAD)]), [EMBED, LM_HEAD]),
    "unexpected tensor": (
        lambda f: edit(f, lambda t: t.update({"action_head.extra": torch.zeros(1)})),
        ["unexpected: action_head.extra"],
    ),
    "shape": (
        lambda f: edit(f, lambda t: t.update({"action_head.vlln.bias": torch.zeros(65)})),
        ["action_head.vlln.bias is (65,), not (64,)"],
    ),
    "shape of an unused tensor": (
        lambda f: edit(f, lambda t: t.update({LM_HEAD: torch.zeros(2, 64)})),
        [f"{LM_HEAD} is (2, 64), not (272, 64)"],
    ),
    "quantised": (
        lambda f: edit(f, lambda t: t.update({"action_head.vlln.bias": torch.zeros(64, dtype=torch.int8)})),
        ["action_head.vlln.bias is stored as I8"],
    ),
    "everything at once": (
        lambda f: edit(f, lambda t: [t.pop(FUTURE), t.update({"x": torch.zeros(1), EMBED: torch.zeros(3)})]),
        [f"missing: {FUTURE}", "unexpected: x", f"{EMBED} is (3,)"],
    ),
    "missing shard": (
        lambda f: [published_folder(f), shard(f).unlink()],
        ["lacks model-00002-of-", "index.json lists", "incomplete"],
    ),
    "truncated shard": (
        lambda f: [published_folder(f), truncate(shard(f))],
        ["model-00002-of-", "cannot be read", "truncated"],
    ),
    "truncated file": (lambda f: truncate(f / "model.safetensors"), ["model.safetensors' cannot be read", "truncated"]),
    "empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), ["cannot be read", "truncated"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["neither model.safetensors nor", "no weights"]),
    "adapter only": (
        lambda f: [(f / "model.safetensors").unlink(), (f / "adapter_config.json").write_text("{}")],
        ["a LoRA adapter alone"],
    ),
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json' cannot be read"]),
    "truncated config": (lambda f: truncate(f / "config.json"), ["config.json' cannot be read"]),
    "a list for a config": (lambda f: (f / "config.json").write_text("[]"), ["config.json", "must be an object"]),
    "another model": (
        lambda f: (f / "config.json").write_text('{"model_type": "qwen2"}'),
        ["not that of a GR00T N1.5 checkpoint", "action_head_cfg.max_state_dim"],
    ),
    "N1.6": (
        lambda f: edit_config(f, lambda c: c.update(model_type="gr00t_n1_6")),
        ["model_type is 'gr00t_n1_6', not 'gr00t_n1_5'"],
    ),
    "projected backbone": (
        lambda f: edit_config(f, lambda c: c["backbone_cfg"].update(project_to_dim=1536)),
        ["project_to_dim is 1536, not None"],
    ),
    "pixel shuffle": (
        lambda f: edit_config(f, lambda c: c.update(use_pixel_shuffle=True), "eagle_config.json"),
        ["use_pixel_shuffle is True, not False"],
    ),
    "weights elsewhere": (
        lambda f: edit_index(f, lambda files: "../outside.safetensors"),
        ["'../outside.safetensors'"],
    ),
    "weights at an absolute path": (lambda f: edit_index(f, lambda files: "/x/y.safetensors"), ["'/x/y.safetensors'"]),
    "weights in another format": (lambda f: edit_index(f, lambda files: "pytorch_model.bin"), ["'pytorch_model.bin'"]),
    "a list for an index": (lambda f: (f / "model.safetensors.index.json").write_text("[]"), ["index.json' cannot"]),
    "an index of numbers": (lambda f: edit_index(f, lambda files: 3), ["index.json' cannot be read: weight_map."]),
    "no JSON for an index": (lambda f: (f / "model.safetensors.index.json").write_text("{"), ["index.json' cannot"]),
    "null for a config": (lambda f: (f / "config.json").write_text("null"), ["config.json' cannot be read"]),
    "a string for the eagle": (lambda f: (f / "eagle_config.json").write_text('"x"'), ["eagle_config.json' cannot"]),
    "words for a width": (head_config(hidden_size="wide"), ["action_head_cfg.hidden_size 'wide'"]),
    "a list for a group": (
        lambda f: edit_config(f, lambda c: c.update(action_head_cfg=[1])),
        ["it has no action_head"],
    ),
    "a dropout of NaN": (
        lambda f: edit_config(f, lambda c: c["action_head_cfg"]["diffusion_model_cfg"].update(dropout=float("nan"))),
        ["diffusion_model_cfg.dropout"],
    ),
    "no layer": (lambda f: edit_config(f, lambda c: c["backbone_cfg"].update(select_layer=0)), ["must be at least 1"]),
    "a billion layers": (
        lambda f: edit_config(f, lambda c: c["action_head_cfg"]["diffusion_model_cfg"].update(num_layers=10**9)),
        ["diffusion_model_cfg.num_layers 1000000000: must be at most 1000"],
    ),
    "a horizon beyond the positions": (head_config(action_horizon=65), ["max_seq_len is 64, not 65"]),
    "another size above": (lambda f: edit_config(f, lambda c: c.update(action_dim=7)), ["action_dim is 7, not 32"]),
    "heads that do not divide": (
        lambda f: edit_config(f, lambda c: c["vision_config"].update(num_attention_heads=7), "eagle_config.json"),
        ["no model can be built"],
    ),
    "a token beyond the vocabulary": (
        lambda f: edit_config(f, lambda c: c.update(image_token_index=500), "eagle_config.json"),
        ["image_token_index is 500, not 271"],
    ),
    "wrong sizes in config": (
        lambda f: edit_config(f, lambda c: c["action_head_cfg"].update(max_state_dim=63)),
        ["action_head.state_encoder.layer1.W is (32, 64, 64), not (32, 63, 64)"],
    ),
}


@pytest.fixture(scope="module")
def sound_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    GR00T(GR00TConfig.tiny(image_size=16)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_checkpoint_ends_in_one_line_that_names_the_damage(fault, sound_folder, tmp_path, capsys):
    folder = tmp_path / "damaged"
    shutil.copytree(sound_folder, folder)
    damage, words = FAULTS[fault]
    damage(folder)
    assert_refused(GR00T, folder, words, capsys)


@pytest.mark.parametrize("path", ["nvidia/GR00T-N1.5-3B", "/no/such/folder", "no-such-folder", "./a/b"])
def test_a_model_that_is_not_there_ends_in_one_line(path, capsys):
    with pytest.raises(SystemExit) as stop:
        GR00T.from_pretrained(path)
    line = capsys.readouterr().err
    assert stop.value.code == 2 and line.count("\n") == 1 and path in line
    assert "the bundled tiny model" in line or "is not a folder" in line


def test_loading_and_saving_draw_no_random_numbers(sound_folder, tmp_path):
    """Or a run that saves more often would train differently."""
    before = torch.get_rng_state()
    GR00T.from_pretrained(sound_folder).save_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_what_no_loader_would_take_is_not_written(sound_folder, tmp_path):
    model = GR00T.from_pretrained(sound_folder)
    model.action_head.vlln.register_parameter("lora", torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises(ValueError, match="action_head.vlln.lora"):
        model.save_pretrained(tmp_path)
    state = {name: tensor for name, tensor in model.state_dict().items() if "lora" not in name}
    model.save_pretrained(tmp_path, state)
    assert contents(tmp_path) == contents(sound_folder)


def test_unused_tensors_take_no_room_on_the_device_and_are_not_trained(sound_folder):
    model = GR00T.from_pretrained(sound_folder)
    assert model.carried.keys() == model.carried_shapes().keys()
    assert not model.carried.keys() & model.state_dict().keys()
    model.to("meta")  # stands for a GPU
    assert {tensor.device.type for tensor in model.carried.values()} == {"cpu"}


# ---- what trains, and in which mode ----------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", list(ALL))
def test_frozen_parts_get_no_gradient_and_stay_in_evaluation_mode(flag):
    model = golden_model(dropout=0.2, vl_dropout=0.2)
    model.set_trainable(**(ALL | {flag: False}))
    model.train()
    flow_loss(model, golden_batch())[0].backward()
    for name, p in model.named_parameters():
        assert (p.grad is None) == (group_of(name) == flag), name
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout | torch.nn.Linear):
            assert module.training == (group_of(name) != flag), name
    model.eval()
    assert not any(module.training for module in model.modules())


def test_all_flags_off_still_trains_the_vl_part_with_its_dropout():
    model = golden_model(dropout=0.2, vl_dropout=0.2)
    model.set_trainable(**dict.fromkeys(ALL, False))
    model.train()
    trained = {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"vlln", "vl_self_attention", "future_tokens"}
    assert {m.training for m in model.action_head.vl_self_attention.modules()} == {True}
    batch = golden_batch()
    with torch.no_grad():
        features, mask = model.backbone(batch)
        assert not torch.equal(model.process_backbone(features), model.process_backbone(features))
        inputs = (features, mask, batch["state"], batch["noise"], batch["t"], batch["embodiment_id"])
        assert torch.equal(model.velocity(*inputs), model.velocity(*inputs))  # the frozen DiT drops nothing


def test_dropout_sits_where_the_original_has_it():
    """Twice after attention, after the activation and after the feed-forward; never on attention weights."""
    model = GR00T(GR00TConfig.tiny(dropout=0.2, vl_dropout=0.3))
    blocks = [*model.action_head.model.transformer_blocks, *model.action_head.vl_self_attention.transformer_blocks]
    for block in blocks:
        rates = [m.p for m in block.modules() if isinstance(m, torch.nn.Dropout)]
        assert rates == [0.2 if block.adaptive else 0.3] * 4


def test_only_the_selected_embodiments_rows_get_a_gradient():
    model, batch = golden_model(), golden_batch()
    flow_loss(model, batch)[0].backward()
    for name, p in model.named_parameters():
        if name.endswith((".W", ".b")):
            used = [bool(row.any()) for row in p.grad]
            assert used == [True, False, True, False, True], name


def test_one_id_for_all_samples_equals_the_same_id_for_each():
    model, batch = golden_model(), golden_batch()
    loss, each = flow_loss(model, batch | {"embodiment_id": torch.tensor([3, 3, 3])})
    loss.backward()
    gradients = [p.grad.clone() for p in model.action_head.parameters()]
    model.zero_grad()
    loss, shared = flow_loss(model, batch | {"embodiment_id": torch.tensor([3])})
    loss.backward()
    assert distance(shared, each) < 1e-5
    for expected, p in zip(gradients, model.action_head.parameters()):
        assert torch.allclose(p.grad, expected, rtol=1e-4, atol=1e-6)


def test_gradient_checkpointing_changes_nothing():
    batch = golden_batch()
    gradients = []
    for enabled in (False, True):
        model = golden_model(dropout=0.2, vl_dropout=0.2)
        model.set_trainable(**(ALL | {"tune_llm": False}))  # gradients still pass through the frozen text model
        model.gradient_checkpointing(enabled)
        model.train()
        torch.manual_seed(0)
        flow_loss(model, batch)[0].backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert model.backbone.text.training == enabled  # transformers checkpoints in training mode only
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-4, atol=1e-7), name


# ---- inputs ----------------------------------------------------------------------------------------------------------


def test_a_masked_sample_does_not_depend_on_its_batch_and_an_original_one_does():
    batch = golden_batch()
    alone = rows(batch, 1)
    for key in ("eagle_input_ids", "eagle_attention_mask"):
        alone[key] = alone[key][:, 3:]  # without its three pads
    for mask_padding in (True, False):
        model = golden_model(mask_padding=mask_padding)
        together, single = sample(model, batch, 4)[1:2], sample(model, alone, 4)
        assert (distance(together, single) < 1e-5) == mask_padding
        features, mask = model.backbone(batch)
        assert distance(features[1][mask[1]], model.backbone(alone)[0][0]) < 1e-5  # the backbone always masks


def test_equal_lengths_make_masking_irrelevant():
    batch = golden_batch(lengths=(12, 12, 12))
    assert distance(sample(golden_model(mask_padding=True), batch, 2), sample(golden_model(), batch, 2)) < 1e-5


def test_pad_rows_of_the_text_model_attend_to_nothing():
    """What they hold is then a function of the pad token alone, whatever the sample says."""
    features, mask = golden_model().backbone(golden_batch(lengths=(12, 9, 10)))
    pads = features[~mask]
    assert len(pads) == 5 and distance(pads, pads[:1].expand_as(pads)) < 1e-6


def test_eager_attention_gives_real_tokens_the_same_features():
    sdpa, batch = golden_model(), golden_batch()
    eager = EagleBackbone(sdpa.config, "eager").eval()
    eager.load_state_dict(sdpa.backbone.state_dict())
    features, mask = sdpa.backbone(batch)
    assert distance(eager(batch)[0][mask], features[mask]) < 1e-5


def test_images_and_image_tokens_must_match():
    batch = golden_batch()
    with pytest.raises(ValueError, match="12 image tokens, the images 8 patches"):
        golden_model().backbone(batch | {"eagle_pixel_values": batch["eagle_pixel_values"][:2]})


def test_two_views_fill_their_places_in_order():
    """Swapping the images of a sample changes it, swapping the samples with their images does not."""
    model, batch = golden_model(), golden_batch(lengths=(12, 12, 12))
    # four more places for a second view
    ids = torch.cat([batch["eagle_input_ids"][:2], torch.full((2, 4), 259)], dim=1)
    pixels = torch.from_numpy(np.random.RandomState(5).uniform(-1, 1, (4, 3, 16, 16))).float()
    run = lambda ids, pixels: model.backbone(  # noqa: E731
        {"eagle_input_ids": ids, "eagle_attention_mask": torch.ones_like(ids), "eagle_pixel_values": pixels}
    )[0]
    features = run(ids, pixels)
    assert distance(run(ids.flip(0), pixels[[2, 3, 0, 1]]), features.flip(0)) < 1e-5
    assert distance(run(ids, pixels[[1, 0, 2, 3]])[0], features[0]) > 1e-2
    assert distance(run(ids, pixels[[1, 0, 2, 3]])[1], features[1]) < 1e-5


def test_cached_backbone_features_replace_the_backbone():
    model, batch = golden_model(), golden_batch()
    features, mask = model.backbone(batch)
    cached = {k: v for k, v in batch.items() if not k.startswith("eagle_")}
    cached |= {"backbone_features": features, "backbone_attention_mask": mask}
    assert torch.equal(sample(model, cached, 2), sample(model, batch, 2))


def test_lite_reads_its_instruction_and_no_image():
    torch.manual_seed(0)
    model = GR00T(GR00TConfig.lite(**SMALL)).eval()
    batch = {k: v for k, v in golden_batch().items() if k != "eagle_pixel_values"}
    actions = sample(model, batch, 4)
    assert actions.shape == (3, 8, 6)
    other = batch | {"eagle_input_ids": batch["eagle_input_ids"] - 1}
    assert distance(sample(model, other, 4), actions) > 1e-4
    assert type(model.action_head) is ActionHead
    model.set_trainable(tune_llm=True)
    flow_loss(model, batch)[0].backward()
    used = model.backbone.instruction_table.weight.grad.abs().sum(1).nonzero()[:, 0]
    assert used.tolist() == sorted(set(batch["eagle_input_ids"].flatten().tolist()))


def test_a_copy_of_the_model_is_the_model():
    """A script keeps a copy as reference policy."""
    model = golden_model()
    assert torch.equal(sample(copy.deepcopy(model), golden_batch(), 2), sample(model, golden_batch(), 2))


def test_the_built_in_sizes_are_those_of_the_vision_language_model():
    assert GR00TConfig().tokens_per_image == 256 and EAGLE["image_token_index"] == 151669
