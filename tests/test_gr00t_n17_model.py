"""common/robot/gr00t_n17.py is numerically GR00T N1.7, trains what its flags say, and reads and writes its files exactly.

As in tests/test_gr00t_model.py: the fixtures of ../shared where they are, golden values of this code in any case.
"""

import dataclasses
import hashlib
import json
import math
import shutil
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
from safetensors.torch import load_file, save_file

from common.robot import GR00TN17 as EXPORTED
from common.robot.gr00t_n17 import (
    EMBED,
    GR00TN17,
    LM_HEAD,
    NORM,
    ActionHeadN17,
    GR00TN17Config,
    QwenBackbone,
    positions,
)

FIXTURES = ROOT.parent / "shared" / "data" / "gr00t_n17_parity"
needs_fixtures = pytest.mark.skipif(not FIXTURES.exists(), reason="no ../shared/data/gr00t_n17_parity")
FLAGS = ("tune_llm", "tune_visual", "tune_projector", "tune_diffusion_model", "tune_vlln", "tune_top_llm_layers")
ALL = dict.fromkeys(FLAGS[:5], True)
load_fixture = partial(networks.load_fixture, FIXTURES)


def head_fixture(device="cpu"):
    tensors, batch, facts = load_fixture("head_small", device=device)
    config = GR00TN17Config.from_json(GR00TN17Config().to_json() | facts["config"], small_text(64))
    model = HeadOnly(ActionHeadN17(config)).to(device).eval()
    model.load_state_dict({k: v for k, v in tensors.items() if k.startswith("action_head.")})
    return model, batch, tensors, facts


def small_text(width):
    """A vision-language model that a head of this width could stand behind."""
    tiny = GR00TN17Config.tiny().qwen
    text = tiny["text_config"] | {"hidden_size": width, "num_hidden_layers": 16}
    return tiny | {"text_config": text, "vision_config": tiny["vision_config"] | {"out_hidden_size": width}}


@needs_fixtures
@pytest.mark.parametrize("device", DEVICES)
def test_head_fixture_velocity_loss_gradients_and_samples(device):
    model, batch, tensors, facts = head_fixture(device)
    expected, near = facts["expected"], TOLERANCE[device]
    features = batch["backbone_features"].requires_grad_()
    loss, v_pred = flow_loss(model, batch)
    loss.backward()
    assert abs(loss.item() / expected["loss"] - 1) < near["loss"]
    assert distance(v_pred, tensors["expected.pred_velocity"]) < near["velocity"]
    inputs = {"input.backbone_features"} & expected["grad_norm"].keys()
    assert_gradients(model, expected["grad_norm"], near["grad"], **({"backbone_features": features} if inputs else {}))
    for steps in (1, 4, 8):
        assert distance(sample(model, batch, steps), tensors[f"expected.actions_{steps}_steps"]) < near["actions"]


@needs_fixtures
def test_head_fixture_four_adamw_updates():
    model, batch, _, facts = head_fixture()
    assert_adamw(model, batch, facts["expected"]["adamw"])


@needs_fixtures
def test_head_fixture_without_the_state_of_some_samples():
    model, batch, _, facts = head_fixture()
    features, mask = model.vl_features(batch)
    noise, action, t = batch["noise"], batch["action"], batch["t"][:, None, None]
    x_t, m = (1 - t) * noise + t * action, batch["action_mask"]
    rest = (batch["state"], x_t, batch["t"], batch["embodiment_id"])
    v_pred = model.velocity(features, mask, *rest, state_dropped=batch["state_dropped"])
    loss = ((v_pred - (action - noise)) ** 2 * m).sum() / (m.sum() + 1e-6)
    assert abs(loss.item() / facts["expected"]["loss_state_dropped"] - 1) < TOLERANCE["cpu"]["loss"]
    kept = model.velocity(features, mask, *rest)
    apart = (kept - v_pred).abs().amax((1, 2)) > 1e-4
    assert torch.equal(apart, batch["state_dropped"])


@needs_fixtures
@pytest.mark.parametrize("device", DEVICES)
def test_backbone_fixture_features_positions_and_kinds_of_tokens(device):
    tensors, batch, facts = load_fixture("backbone_small", device=device)
    qwen, width = facts["backbone_config"], facts["backbone_config"]["text_config"]["hidden_size"]
    sizes = dict(select_layer=facts["select_layer"], vl_width=width, vl_heads=4, vl_head_dim=width // 4)
    config = GR00TN17Config.from_json(dataclasses.replace(GR00TN17Config(), **sizes).to_json(), qwen)
    backbone = QwenBackbone(config)
    weights = {k.removeprefix("backbone."): v for k, v in tensors.items() if k.startswith("backbone.")}
    backbone.load_state_dict({k: v for k, v in weights.items() if f"backbone.{k}" not in (NORM, LM_HEAD)})
    features, kinds = backbone.to(device)(batch)
    expected = {k.removeprefix("expected."): v for k, v in tensors.items() if k.startswith("expected.")}
    real = (kinds > 0).cpu()
    assert distance(features[kinds > 0], expected["backbone_features"][real]) < TOLERANCE[device]["features"]
    assert distance(features, expected["backbone_features"]) < TOLERANCE[device]["features"]  # pads too
    assert torch.equal(kinds.cpu() == 2, expected["image_mask"])
    grids = [(rows // 2, columns // 2) for _, rows, columns in batch["image_grid_thw"].tolist()]
    found = positions(batch["input_ids"], batch["attention_mask"].bool(), kinds == 2, grids).cpu()
    assert torch.equal(found[:, real], expected["position_ids"][:, real])


@needs_fixtures
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["equal", "padded"])
def test_full_fixture_loss_gradients_and_samples(kind, device):
    tensors, batch, facts = load_fixture("full_small", f"{kind}.", device)
    expected, near = facts["batches"][kind], TOLERANCE[device]
    model = GR00TN17.from_pretrained(FIXTURES / "full_small", device=device)
    model.set_trainable(**ALL)
    loss, v_pred = flow_loss(model, batch)
    loss.backward()
    assert abs(loss.item() / expected["loss"] - 1) < near["loss"]
    assert distance(v_pred, tensors[f"{kind}.expected.pred_velocity"]) < near["velocity"]
    assert_gradients(model, expected["grad_norm"], near["grad"])
    for steps in (1, 4, 8):
        actions = tensors[f"{kind}.expected.actions_{steps}_steps"]
        assert distance(sample(model, batch, steps), actions) < near["actions"]


@needs_fixtures
def test_full_fixture_trains_what_the_original_trains():
    """The final text norm, stored and unused, follows tune_llm; lm_head is the embedding and does not count."""
    model = GR00TN17.from_pretrained(FIXTURES / "full_small")
    for case in load_fixture("full_small")[2]["trainable"]:
        model.set_trainable(**{flag: case[flag] for flag in FLAGS})
        trained = [p.numel() for p in model.parameters() if p.requires_grad]
        trained += [model.carried[NORM].numel()] if case["tune_llm"] else []
        assert [len(trained), sum(trained)] == case["trainable_tensors_parameters"]


@needs_fixtures
def test_full_fixture_saved_again_holds_every_tensor_bit_for_bit(tmp_path):
    GR00TN17.from_pretrained(FIXTURES / "full_small").save_pretrained(tmp_path)
    ours, theirs = load_file(tmp_path / "model.safetensors"), load_file(FIXTURES / "full_small" / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    for file in ("config.json", "backbone_config.json"):
        saved, read = (json.loads((folder / file).read_text()) for folder in (tmp_path, FIXTURES / "full_small"))
        assert saved == read


# ---- golden values ---------------------------------------------------------------------------------------------------

SMALL = dict(
    action_dim=6, action_horizon=8, state_dim=10, num_embodiments=5, patch_size=4, attend_text_every_n_blocks=2
)


def golden_model(**changes):
    return fill(GR00TN17(GR00TN17Config.tiny(**(SMALL | changes)))).eval()


def golden_batch(lengths=(19, 14, 9)):
    """Three samples with two images, one and none, of different sizes; prompts of these lengths, padded on the left."""
    rng = np.random.RandomState(7)
    grids = [(4, 4), (2, 6), (6, 4)]  # rows and columns of patches; four patches a token
    S, of = max(lengths), [[0, 1], [2], []]
    ids, mask = torch.full((3, S), 256), torch.zeros(3, S, dtype=torch.long)
    for i, n in enumerate(lengths):
        images = [[265] + [268] * (grids[k][0] * grids[k][1] // 4) + [266] for k in of[i]]
        prompt = [257, *(token for image in images for token in image)]
        prompt += rng.randint(0, 256, n - len(prompt)).tolist()
        ids[i, S - n :], mask[i, S - n :] = torch.tensor(prompt), 1
    normal = lambda *shape: torch.from_numpy(rng.standard_normal(shape)).float()  # noqa: E731
    action_mask = torch.ones(3, 8, 6)
    action_mask[1:, :, 4:] = 0
    action_mask[:, 6:] = 0
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": normal(sum(rows * columns for rows, columns in grids), 96).clamp(-1, 1),
        "image_grid_thw": torch.tensor([(1, rows, columns) for rows, columns in grids]),
        "state": normal(3, 1, 10),
        "action": normal(3, 8, 6).clamp(-1, 1),
        "action_mask": action_mask,
        "embodiment_id": torch.tensor([4, 0, 2]),
        "noise": normal(3, 8, 6),
        "t": torch.tensor([0.8996, 0.0, 0.3]),
        "initial_noise": normal(3, 8, 6),
    }


GOLDEN = {
    "features": [-0.7512794, 1.0836116, -0.420461, -1.0021126],
    "image features": [1.0299588, 0.6916161, -0.1907319, 0.0199768],
    "pads": [0.7350988, -0.14368, -0.9855321, 0.9825313],
    "v_pred": [0.7599443, -0.253223, 0.1767909, -0.7949643],
    "v_pred without images": [0.0042349, 0.2417615, 0.080552, 0.4362499],
    "actions 4": [-0.6046752, -0.1658422, 0.2230314, 0.5222285],
    "actions 8": [-3.0292313, -0.9469182, 0.4360496, 0.5622855],
    "loss": 1.4280679,
    "grad vision": 2.5205772,
    "grad deep": 0.977934,
    "grad text": 3.1885829,
    "grad dit": 3.7431541,
    "grad vl": 1.3714216,
    "grad state": 0.0889591,
    "grad action": 0.6788616,
}


def measure(model, batch):
    model.set_trainable(**ALL)
    features, kinds = model.backbone(batch)
    loss, v_pred = flow_loss(model, batch)
    loss.backward()
    found = {"features": features[1, -1, :4], "image features": features[kinds == 2][3, :4], "pads": features[2, 0, :4]}
    found |= {"v_pred": v_pred[1, 5, :4], "v_pred without images": v_pred[2, 5, :4]}
    found |= {"actions 4": sample(model, batch, 4)[2, 7, :4], "actions 8": sample(model, batch, 8)[0, 0, :4]}
    found = {k: v.tolist() for k, v in found.items()}
    vision, head = model.backbone.vision, model.action_head
    parts = {"vision": vision, "deep": vision.deepstack_merger_list, "text": model.backbone.text, "dit": head.model}
    parts |= {"vl": head.vl_self_attention, "state": head.state_encoder, "action": head.action_encoder}
    return found | {"loss": loss.item()} | {f"grad {name}": grad_norm(part) for name, part in parts.items()}


@pytest.mark.parametrize("device", DEVICES)
def test_golden_values_of_a_whole_tiny_model_with_a_padded_batch(device):
    batch = {key: value.to(device) for key, value in golden_batch().items()}
    found = measure(golden_model().to(device), batch)
    assert_golden(found, GOLDEN, device)


def test_each_dit_block_looks_at_its_own_tokens_and_no_block_at_pads():
    """Blocks 0, 4, … at text, 2, 6, … at images: what a block may not see can be anything."""
    model, kinds = golden_model(vl_layers=0, dit_layers=6), torch.tensor([[0, 0, 1, 2, 2, 1]])
    text, image = (mask[0, 0, 0].tolist() for mask in model.action_head.cross_masks(kinds))
    assert text == [False, False, True, False, False, True] and image == [False, False, False, True, True, False]
    seen, state, x = [], torch.zeros(1, 1, 10), torch.zeros(1, 8, 6)
    for block in model.action_head.model.transformer_blocks:
        block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[3] if inputs[1] is not None else None))
    features = torch.randn(1, 6, 64)
    v = model.velocity(features, kinds, state, x, torch.zeros(1), torch.tensor([0]))
    assert [None if mask is None else mask[0, 0, 0].tolist() for mask in seen] == [text, None, image, None, text, None]
    features[:, :2] = 1e3  # pads
    assert torch.equal(model.velocity(features, kinds, state, x, torch.zeros(1), torch.tensor([0])), v)
    with pytest.raises(ValueError, match="which tokens are of images"):
        model.velocity(features, None, state, x, torch.zeros(1), torch.tensor([0]))


def test_a_sample_may_have_no_image_and_a_batch_none():
    """Blocks that look at images then add their bias alone: nothing becomes NaN, and neighbours do not matter."""
    model, batch = golden_model(mask_padding=True), golden_batch()
    _, v_pred = flow_loss(model, batch)
    images = ("pixel_values", "image_grid_thw")
    alone = {k: v[2:] for k, v in batch.items() if k not in images}
    alone = alone | {k: alone[k][:, 10:] for k in ("input_ids", "attention_mask")}  # unpadded
    assert distance(flow_loss(model, alone)[1], v_pred[2:]) < 1e-5
    with pytest.raises(ValueError, match="the prompts have 13 image tokens, the images 0"):
        model.backbone({k: v for k, v in batch.items() if k not in images})


def test_features_of_an_earlier_run_can_be_given_in_both_forms():
    model, batch = golden_model(), golden_batch()
    features, kinds = model.backbone(batch)
    whole, _ = model.vl_features(batch)
    given = [{"backbone_features": features, "backbone_attention_mask": kinds}]
    mask = dict(backbone_attention_mask=batch["attention_mask"], image_mask=batch["input_ids"] == 268)
    for form in [*given, {"backbone_features": features} | mask]:
        found, its_kinds = model.vl_features(form)
        assert torch.equal(found, whole) and torch.equal(its_kinds, kinds)


def test_the_lite_model_reads_instructions_alone():
    model = GR00TN17.toy(GR00TN17Config.lite()).eval()
    batch = {"input_ids": torch.tensor([[1, 2, 3]]), "attention_mask": torch.tensor([[0, 1, 1]])}
    features, mask = model.vl_features(batch)
    rest = (torch.zeros(1, 1, 132), torch.zeros(1, 16, 132), torch.zeros(1), torch.tensor([10]))
    assert model.velocity(features, mask, *rest).shape == (1, 16, 132)
    masks = model.action_head.cross_masks(mask)
    assert [mask.tolist() for mask in masks] == [[[[[False, True, True]]]]]


# ---- size and layout of the published checkpoint ---------------------------------------------------------------------

LAYOUT_SHA256 = "54d959f75390dfb9fa9f373ab8929775f58a92d0cb6d11d10f97d2757edeb78a"


@pytest.fixture(scope="module")
def full_model():
    with torch.device("meta"):
        return GR00TN17(GR00TN17Config())


def test_full_size_has_the_1031_tensors_of_the_published_checkpoint(full_model):
    layout = full_model.layout()
    assert len(layout) == 1031
    assert sum(math.prod(shape) for shape in layout.values()) == 3_455_180_928
    assert sum(math.prod(shape) for name, shape in layout.items() if name != LM_HEAD) == 3_144_016_000
    lines = "\n".join(f"{name} {list(layout[name])}" for name in sorted(layout))
    assert hashlib.sha256(lines.encode()).hexdigest() == LAYOUT_SHA256
    manifest = ROOT.parent / "shared" / "reference" / "gr00t_n17_manifest.json"
    if manifest.exists():
        tensors = json.loads(manifest.read_text())["tensors"]
        assert layout == {name: tuple(facts["shape"]) for name, facts in tensors.items()}
        assert all(GR00TN17.group_of(name) == facts["group"] for name, facts in tensors.items())
        assert full_model.carried_shapes().keys() == {name for name, facts in tensors.items() if not facts["used"]}


@pytest.mark.parametrize(
    "flags, trained",
    [
        ({}, 1_620_515_968),
        ({"tune_diffusion_model": False}, 528_793_728),
        ({"tune_projector": False}, 1_620_515_968 - 327_356_544),
        ({"tune_vlln": False}, 1_620_515_968 - 201_437_184),
        ({"tune_visual": True}, 1_620_515_968 + 406_957_056),
        ({"tune_llm": True}, 1_620_515_968 + 1_116_542_976 - 2_048),  # but for the unused norm
        ({"tune_top_llm_layers": 2}, 1_620_515_968 + 2 * 50_336_000),
        (dict.fromkeys(ALL, False), 0),
    ],
)
def test_each_flag_trains_the_published_number_of_parameters(full_model, flags, trained):
    full_model.set_trainable(**flags)
    assert sum(p.numel() for p in full_model.parameters() if p.requires_grad) == trained


def test_full_config_is_written_in_the_published_layout():
    config = GR00TN17Config().to_json()
    assert GR00TN17Config.from_json(config) == dataclasses.replace(GR00TN17Config(), source=config)
    assert (config["model_type"], config["select_layer"], config["max_action_dim"]) == ("Gr00tN1d7", 16, 132)
    assert config["diffusion_model_cfg"]["num_layers"] == 32 and config["vl_self_attention_cfg"]["num_layers"] == 4
    assert "instruction_vocab" not in config and "mask_padding" not in config
    assert GR00TN17Config.from_json({"type": "groot", "chunk_size": 40}) == GR00TN17Config()  # LeRobot's


@pytest.mark.parametrize("absent", [{"use_vl_self_attention": False}, {"vl_self_attention_cfg": None}])
def test_a_checkpoint_may_have_no_vl_self_attention(absent, tmp_path):
    tiny = GR00TN17Config.tiny()
    read = GR00TN17Config.from_json(tiny.to_json() | absent, tiny.qwen)
    assert read.vl_layers == 0
    GR00TN17(read).save_pretrained(tmp_path)
    again = GR00TN17.from_pretrained(tmp_path)
    assert again.config.vl_layers == 0 and "use_vl_self_attention" in again.config.source
    assert len(again.action_head.vl_self_attention.transformer_blocks) == 0


# ---- files -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tiny", "lite", "masked and longer"])
def test_save_load_save_is_byte_equal(kind, tmp_path):
    config = {
        "tiny": GR00TN17Config.tiny(),
        "lite": GR00TN17Config.lite(instruction_vocab=50, num_embodiments=3),
        "masked and longer": GR00TN17Config.tiny(mask_padding=True, action_horizon=40, attend_text_every_n_blocks=3),
    }[kind]
    model = GR00TN17(config)
    model.save_pretrained(tmp_path / "1")
    again = GR00TN17.from_pretrained(tmp_path / "1")
    assert EXPORTED is GR00TN17 and dataclasses.replace(again.config, source={}) == config
    again.save_pretrained(tmp_path / "2")
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    again.save_pretrained(tmp_path / "1")  # over the file that `carried` is a view of
    assert contents(tmp_path / "1") == contents(tmp_path / "2")
    assert not again.training and again.flags == model.flags
    if kind == "tiny":
        same = [m.backbone(golden_batch() | {"pixel_values": torch.ones(52, 384)})[0] for m in (model, again)]
        assert torch.equal(*same)  # what is computed rather than stored is the same


def published_folder(folder, shard_bytes=150_000, dtype=torch.bfloat16):
    """A tiny model as the published checkpoint is stored: bfloat16, several files and an index."""
    torch.manual_seed(0)
    model = GR00TN17(GR00TN17Config.tiny()).to(dtype)
    model.carried[NORM] = torch.randn(64).to(dtype)
    model.save_pretrained(folder, max_shard_bytes=shard_bytes)
    return model


def test_a_sharded_bfloat16_folder_loads(tmp_path):
    model = published_folder(tmp_path / "base")
    assert len(list((tmp_path / "base").glob("model-*"))) > 2
    loaded = GR00TN17.from_pretrained(tmp_path / "base")
    assert {p.dtype for p in loaded.backbone.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in loaded.action_head.parameters()} == {torch.float32}  # what the optimizer changes
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name].bfloat16(), value), name
    assert torch.equal(loaded.carried[NORM], model.carried[NORM])
    assert loaded.backbone.text.rotary_emb.inv_freq.dtype == torch.float32
    kept = GR00TN17.from_pretrained(tmp_path / "base", head_dtype=None)
    kept.save_pretrained(tmp_path / "copy", max_shard_bytes=150_000)
    assert contents(tmp_path / "base") == contents(tmp_path / "copy")


def test_half_precision_compute_stays_near_float32(tmp_path):
    """bfloat16 backbone, float32 head, autocast: the dtypes of a fine-tuning run."""
    model = golden_model()
    model.save_pretrained(tmp_path)
    mixed = GR00TN17.from_pretrained(tmp_path, backbone_dtype=torch.bfloat16)
    _, expected = flow_loss(model, golden_batch())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss, v_pred = flow_loss(mixed, golden_batch())
    assert loss.dtype == v_pred.dtype == torch.float32 and distance(v_pred, expected) < 0.1


@pytest.mark.parametrize("left_out", [LM_HEAD, EMBED, None])
def test_the_tied_tensor_is_written_tied_and_may_be_stored_once(left_out, tmp_path):
    model = published_folder(tmp_path, shard_bytes=10**9, dtype=torch.float32)
    tensors = load_file(tmp_path / "model.safetensors")
    assert torch.equal(tensors[LM_HEAD], tensors[EMBED])
    save_file({f"_groot_model.{k}": v for k, v in tensors.items() if k != left_out}, tmp_path / "model.safetensors")
    loaded = GR00TN17.from_pretrained(tmp_path)
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in model.state_dict().items())
    with torch.no_grad():
        loaded.backbone.text.embed_tokens.weight += 1  # as training it would
    loaded.save_pretrained(tmp_path / "tuned")
    again = load_file(tmp_path / "tuned" / "model.safetensors")
    assert torch.equal(again[LM_HEAD], tensors[LM_HEAD] + 1) and torch.equal(again[EMBED], again[LM_HEAD])
    assert again.keys() == tensors.keys()


def config_says(place, value, file="config.json"):
    def change(config):
        *outer, last = place.split(".")
        for key in outer:
            config = config[key]
        config[last] = value

    return lambda folder: edit_config(folder, change, file)


QWEN = "backbone_config.json"
FAULTS = {  # how a folder is damaged -> what the one line must say
    "missing tensors": (
        lambda f: edit(f, lambda t: t.pop("action_head.vlln.bias")),
        ["missing: action_head.vlln.bias"],
    ),
    "both tied tensors": (lambda f: edit(f, lambda t: [t.pop(EMBED), t.pop(LM_HEAD)]), [EMBED, LM_HEAD]),
    "N1.5's tensors": (
        lambda f: edit(f, lambda t: t.update({"action_head.future_tokens.weight": torch.zeros(4, 64)})),
        ["unexpected: action_head.future_tokens.weight"],
    ),
    "shape": (lambda f: edit(f, lambda t: t.update({NORM: torch.zeros(65)})), [f"{NORM} is (65,), not (64,)"]),
    "quantised": (
        lambda f: edit(f, lambda t: t.update({"action_head.vlln.bias": torch.zeros(64, dtype=torch.int8)})),
        ["action_head.vlln.bias is stored as I8"],
    ),
    "missing shard": (lambda f: [published_folder(f), shard(f).unlink()], ["lacks model-00002-of-", "incomplete"]),
    "truncated shard": (lambda f: [published_folder(f), truncate(shard(f))], ["model-00002-of-", "truncated"]),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), ["neither model.safetensors nor", "no weights"]),
    "no config": (lambda f: (f / "config.json").unlink(), ["config.json' cannot be read"]),
    "a list for a config": (lambda f: (f / "config.json").write_text("[]"), ["config.json", "must be an object"]),
    "N1.5": (
        lambda f: (f / "config.json").write_text('{"model_type": "gr00t_n1_5", "action_head_cfg": {}}'),
        ["not that of a GR00T N1.7 checkpoint", "it has no diffusion_model_cfg.num_layers"],
    ),
    "N1.6": (config_says("model_type", "Gr00tN1d6"), ["model_type is 'Gr00tN1d6', not 'Gr00tN1d7'"]),
    "without select_layer": (lambda f: edit_config(f, lambda c: c.pop("select_layer")), ["it has no select_layer"]),
    "another DiT": (config_says("use_alternate_vl_dit", False), ["use_alternate_vl_dit is False, not True"]),
    "future tokens": (config_says("use_future_tokens", True), ["use_future_tokens is True, not False"]),
    "a history of states": (config_says("state_history_length", 2), ["state_history_length is 2, not 1"]),
    "words for a width": (config_says("hidden_size", "wide"), ["hidden_size 'wide'"]),
    "a billion layers": (
        config_says("diffusion_model_cfg.num_layers", 10**9),
        ["diffusion_model_cfg.num_layers 1000000000: must be at most 1000"],
    ),
    "a horizon beyond the positions": (config_says("action_horizon", 65), ["max_seq_len is 64, not 65"]),
    "wrong sizes in config": (
        config_says("max_state_dim", 131),
        ["action_head.state_encoder.layer1.W is (32, 132, 64), not (32, 131, 64)"],
    ),
    "another width of features": (
        config_says("backbone_embedding_dim", 128),
        ["backbone_embedding_dim is 128, not 64"],
    ),
    "more layers than there are": (config_says("select_layer", 9), ["select_layer is 9, not 3"]),
    "a string for the backbone": (lambda f: (f / QWEN).write_text('"x"'), ["backbone_config.json' cannot"]),
    "heads that do not divide": (
        config_says("vision_config.num_heads", 7, QWEN),
        ["hidden_size modulo 4 num_heads is 8, not 0"],
    ),
    "a token beyond the vocabulary": (config_says("image_token_id", 500, QWEN), ["image_token_id is 500, not 271"]),
    "rotary axes that do not add up": (
        config_says("text_config.rope_scaling", {"rope_type": "default", "mrope_section": [24, 20, 20]}, QWEN),
        ["mrope_section's sum is (3, 64), not (3, 16)"],
    ),
    "no rotary axes": (config_says("text_config.rope_scaling", None, QWEN), ["rope_scaling"]),
    "a position table that is no square": (
        config_says("vision_config.num_position_embeddings", 60, QWEN),
        ["num_position_embeddings is 60, not 64"],
    ),
    "a merger behind no layer": (
        config_says("vision_config.deepstack_visual_indexes", [0, 5], QWEN),
        ["deepstack_visual_indexes is [0, 5], not [0]"],
    ),
    "words for layers": (
        config_says("vision_config.deepstack_visual_indexes", "all", QWEN),
        ["deepstack_visual_indexes"],
    ),
}


@pytest.fixture(scope="module")
def sound_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny-n17")
    GR00TN17(GR00TN17Config.tiny()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_checkpoint_ends_in_one_line_that_names_the_damage(fault, sound_folder, tmp_path, capsys):
    folder = tmp_path / "damaged"
    shutil.copytree(sound_folder, folder)
    damage, words = FAULTS[fault]
    damage(folder)
    assert_refused(GR00TN17, folder, words, capsys)


def test_loading_and_saving_draw_no_random_numbers(sound_folder, tmp_path):
    before = torch.get_rng_state()
    GR00TN17.from_pretrained(sound_folder).save_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), before)


def test_gradient_checkpointing_changes_no_gradient():
    found = []
    for enabled in (False, True):
        model = golden_model()
        model.set_trainable(**ALL)
        model.gradient_checkpointing(enabled)
        model.train()
        loss, _ = flow_loss(model, golden_batch())
        loss.backward()
        found.append([loss.detach()] + [p.grad for p in model.parameters()])
    assert all(torch.allclose(a, b, rtol=1e-5, atol=1e-7) for a, b in zip(*found))
