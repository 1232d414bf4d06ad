# SPDX-License-Identifier: MIT
"""What deit.py and train.py promise, one claim per test: `python test_deit.py [part of a name]`.

On the CPU, without network, in a minute or two; pytest collects the functions too. Witnesses from
outside where there are any: PyTorch's own attention and encoder layer, torchvision's transforms and
models, values worked by hand, two processes against one. Letters as in deit.py.
"""
import argparse
import ast
import atexit
import contextlib
import copy
import functools
import hashlib
import http.server
import io
import itertools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import token
import tokenize
import traceback
import types
import warnings
from pathlib import Path
from unittest import mock

os.environ.setdefault("GOMP_SPINCOUNT", "10000")   # before PyTorch is imported, see train.py

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

import deit
import train

HERE = os.path.dirname(os.path.abspath(__file__))
TI = "deit_tiny_distilled_patch16_224"
REGNET = "train:demo_net"
SMALL = dict(img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=2, num_classes=7)
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
SMALL_FLAGS = ("--img-size 32 --patch-size 8 --embed-dim 32 --depth 2 --num-heads 2 --workers 0 "
               "--amp off --device cpu").split()

BASE_FLAGS = (f"--model {TI} --teacher train:demo_net --teacher-weights none --warmup-epochs 1 "
              "--batch-size 12").split() + SMALL_FLAGS
patched = mock.patch.object   # of an object, a name, a value: in the block it has that value


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@contextlib.contextmanager
def raises(phrase, kind=deit.InputError):
    """The block ends in one sentence that holds the phrase."""
    try:
        yield
    except kind as e:
        assert phrase in str(e), f"said {str(e)!r}, without {phrase!r}"
        assert "\n" not in str(e), f"more than a line: {e}"
    else:
        raise AssertionError(f"nothing refused; {phrase!r} was expected")


def quiet(function, *args, **kwargs):
    """(what the function returned, what it printed)"""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        return function(*args, **kwargs), out.getvalue()


@contextlib.contextmanager
def working_folder():
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        stack.callback(os.chdir, os.getcwd())
        os.chdir(folder)
        yield folder


def draw_images(folder, train_count=12, val_count=5, classes=("1", "10", "2")):
    """train/ and val/ of coloured noise, one hue per class, as JPEG."""
    rng = np.random.default_rng(0)
    for split, count in (("train", train_count), ("val", val_count)):
        for label, name in enumerate(classes):
            os.makedirs(os.path.join(folder, split, name))
            for i in range(count):
                pixels = rng.integers(0, 120, (40 + i % 3, 48, 3))
                pixels[..., label % 3] += 120
                Image.fromarray(pixels.astype(np.uint8)).save(f"{folder}/{split}/{name}/{i}.JPEG")
    return folder


@functools.cache
def shared_images():
    """One data set for the tests that only read it; removed at exit."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder)
    return draw_images(folder)


def run(*flags, data=None):
    """train.main on the small model, which writes into the folder o; (log, what it printed)"""
    argv = ["--data", data or shared_images(), *BASE_FLAGS, "--output", "o", *flags]
    return quiet(train.main, argv)


def read(path):
    """A checkpoint, by PyTorch alone."""
    return torch.load(path, weights_only=True)


def untimed(log):
    return [{k: v for k, v in record.items() if k not in ("img_per_s", "waiting", "seconds")}
            for record in log]


def result(output):
    """What a run leaves behind, without the timings."""
    last = read(f"{output}/last.pt")
    log = [json.loads(line) for line in Path(output, "log.jsonl").read_text().splitlines()]
    return last["model"], last["ema"], last["optimizer"]["state"], last["best"], untimed(log)


def watched(owner, name, before):
    """Each call of owner.name begins with before(number of the call from 1 on, *its arguments)."""
    real, count = getattr(owner, name), itertools.count(1)

    def call(*args, **kwargs):
        before(next(count), *args)
        return real(*args, **kwargs)

    return patched(owner, name, call)


def launch(*argv):
    """A new Python process, when it has ended, with what it said."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": HERE}
    return subprocess.run([sys.executable, *argv], capture_output=True, text=True, env=env,
                          timeout=200)


def touch(*paths):
    """Small images, in folders that are made."""
    for path in paths:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        noise_image(8, 8).save(path, "png")


def configured(*flags):
    """The whole configuration that follows from the flags."""
    cfg = train.make_config(train.parse(["--data", shared_images(), "--batch-size", "12",
                                         "--output", "o", *flags]))
    train.plan(cfg, *quiet(train.load_images, cfg)[0])
    return cfg


def small(name=TI, **other):
    return deit.create_model(name, **SMALL | other)


def checkpoint(model):
    """What train.py saves of a small model, as far as others read it."""
    return {"model": model.state_dict(), "config": model.config, "classes": list("abcdefg")}


def config(**given):
    """What the loaders and evaluate read of a configuration."""
    return types.SimpleNamespace(**dict(
        img_size=16, seed=0, randaugment=0, erasing=0, repeats=1, batch_size=6, micro_batch=6,
        ks=[0], epoch_steps=6, workers=0, device=torch.device("cpu"), dtype=None) | given)


# ------------------------------------------------------------------------------------------------
# The network
# ------------------------------------------------------------------------------------------------

def test_parameter_counts_are_the_published_ones():
    for name, variant in deit.VARIANTS.items():
        with torch.device("meta"):
            count = sum(p.numel() for p in deit.create_model(name).parameters())
        assert count == variant[4], name


def test_every_block_and_its_map_of_attention_are_pytorchs_encoder_layers():
    model = small().eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.1)
    layer = torch.nn.TransformerEncoderLayer(32, 2, 128, 0.0, "gelu", 1e-6, True, norm_first=True)
    maps, x = model.attention(IMAGES), model.embed(IMAGES)
    assert maps.shape == (3, 2, 2, 18, 18) and not maps.requires_grad
    names = {"attn.qkv.": "self_attn.in_proj_", "attn.proj.": "self_attn.out_proj.",
             "mlp.fc1.": "linear1.", "mlp.fc2.": "linear2.", "norm1.": "norm1.", "norm2.": "norm2."}
    for block, got in zip(model.blocks, maps, strict=True):
        layer.load_state_dict({theirs + kind: block.get_parameter(ours + kind)
                               for ours, theirs in names.items() for kind in ("weight", "bias")})
        y = layer.norm1(x)
        close(got, layer.self_attn(y, y, y, average_attn_weights=False)[1])
        for fused in (True, False):
            with patched(deit.Attention, "fused", fused):
                close(block(x), layer(x))
                close(block(x, 2), layer(x)[:, :2])
        x = block(x)


def test_the_picture_of_attention_is_bright_where_the_tokens_look():
    rows = torch.full((1, 1, 2, 18, 18), 0.01)
    rows[..., 0, 2 + 5] = rows[..., 1, 2 + 10] = 0.5              # patch (1, 1); patch (2, 2)
    argv = "photo.png --weights w.pt --attention".split()
    with working_folder(), patched(deit.DeiT, "attention", lambda self, images: rows):
        torch.save(checkpoint(small()), "w.pt")
        Image.new("RGB", (32, 32), (200, 200, 200)).save("photo.png")
        _, said = quiet(deit.main, [*argv, "out.png"])
        pixels = np.asarray(Image.open("out.png").convert("L")).astype(int)
        for bad, phrase in (("out.xyz", "unknown file extension"), ("no/out.png", "No such file")):
            with raises(phrase, SystemExit):
                quiet(deit.main, [*argv, bad])
        with raises("photo.png is the photo itself", SystemExit):
            quiet(deit.main, [*argv, "photo.png"])
    assert "distillation head" in said and "out.png" in said
    assert pixels.shape == (384, 3 * 384)
    middles = np.stack([pixels[48:384:96, x + 48:x + 384:96] for x in (0, 384, 768)])
    expected = np.full((3, 4, 4), 200 * (0.15 + 0.85 * 0.01 / 0.5))    # dark
    expected[0] = expected[1, 1, 1] = expected[2, 2, 2] = 200          # the view itself comes first
    assert np.abs(middles - expected).max() < 8, middles


@torch.no_grad()
def test_the_network_compiles_exports_and_runs_in_any_type():
    model, teacher = small().eval(), deit.load_teacher("regnet_y_400mf", None, 7)
    expected = model(IMAGES)
    batch = {"images": {0: torch.export.Dim("batch", max=4096)}}
    exported = torch.export.export(model, (IMAGES,), dynamic_shapes=batch).module()
    close(exported(IMAGES[[0, 1, 1]]), expected[[0, 1, 1]])
    for cast in (torch.bfloat16, torch.float16):
        got = copy.deepcopy(model).to(cast)(IMAGES.to(cast))
        assert got.dtype == cast
        close(got.float(), expected, 0.05)
    for amp in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            close(model(IMAGES).float(), expected, 0.05)
            for network in (model, teacher):
                whole = torch.compile(network, backend="eager", fullgraph=True)   # without a break
                close(whole(IMAGES).float(), network(IMAGES).float())
    meta = copy.deepcopy(model).to("meta")(IMAGES.to("meta"))
    assert meta.shape == (2, 7) and meta.is_meta


def test_deit_alone_needs_torch_alone_and_says_what_else_it_lacks():
    code = """
import sys
sys.modules.update(torchvision=None, numpy=None, PIL=None)   # importing them fails
import torch, deit
model = deit.create_model("deit_tiny_distilled_patch16_224", img_size=32, num_classes=4)
for mode in ("hard", "soft"):
    logits = model(torch.randn(2, 3, 32, 32))
    deit.distillation_loss(*logits, torch.tensor([1, 2]), torch.randn(2, 4), mode).backward()
print(deit.__file__, len(model.eval()(torch.randn(2, 3, 32, 32))))
try:
    deit.load_teacher()
except deit.InputError as e:
    print(e)
"""
    with working_folder():
        shutil.copy(os.path.join(HERE, "deit.py"), ".")
        command = [sys.executable, "-W", "ignore", "-c", code]
        out = subprocess.run(command, text=True, capture_output=True)
        done, sentence = out.stdout.splitlines()
        assert done == f"{os.path.realpath('deit.py')} 2" and not out.stderr, out
        assert "pip install torchvision" in sentence


def test_last_blocks_short_cut_changes_no_logit_and_no_gradient():
    model = small()
    outputs = model.features(IMAGES, 2), model.features(IMAGES)[:, :2]
    close(*outputs)
    used = [p for name, p in model.named_parameters() if "head" not in name]
    close(*(torch.autograd.grad(x.pow(3).sum(), used) for x in outputs), 1e-4)


def test_forward_returns_both_heads_in_training_and_their_mean_in_evaluation():
    model = small()
    (cls, dis), tokens = model(IMAGES), model.features(IMAGES)
    assert cls.shape == dis.shape == (2, 7) and tokens.shape == (2, 18, 32)
    close((cls, dis), (model.head(tokens[:, 0]), model.head_dist(tokens[:, 1])))
    close((cls, dis), model.heads(IMAGES))
    close(model.eval()(IMAGES), (cls + dis) / 2)
    plain = small("deit_tiny_patch16_224")
    close((plain(IMAGES), plain(IMAGES)), plain.heads(IMAGES))


def test_tokens_come_first_class_before_distillation_then_patches_row_by_row():
    model = small()
    x, proj = model.embed(IMAGES) - model.pos_embed, model.patch_embed.proj
    patches = F.unfold(IMAGES, 8, stride=8).transpose(1, 2)       # (2, 16, 3 * 8 * 8), row by row
    close(x[1, 0], model.cls_token[0, 0])
    close(x[1, 1], model.dist_token[0, 0])
    close(x[:, 2:], F.linear(patches, proj.weight.flatten(1), proj.bias))


def test_one_batch_is_learned_by_heart():
    torch.manual_seed(0)
    x, y, t = torch.randn(8, 3, 32, 32), torch.arange(8) % 7, torch.randn(8, 7)
    model = small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        optimizer.zero_grad()
        deit.distillation_loss(*model(x), y, t).backward()
        optimizer.step()
    cls, dis = model(x)
    assert (cls.argmax(1) == y).all() and (dis.argmax(1) == t.argmax(1)).all()


def test_every_layer_is_called_so_hooks_wrappers_and_pruning_reach_it():
    from torch.nn.utils import prune
    for mode in (True, False):
        model, fired = small().train(mode), set()
        leaves = {name: m for name, m in model.named_modules() if not list(m.children())}
        for name, module in leaves.items():
            module.register_forward_hook(lambda *args, name=name: fired.add(name))
        model(IMAGES)
        assert leaves.keys() == fired
    wrapped = copy.deepcopy(model)
    for name, module in leaves.items():
        if isinstance(module, torch.nn.Linear):   # without a `.weight`, as LoRA's layers are
            wrapped.set_submodule(name, torch.nn.Sequential(module))
    close(wrapped(IMAGES), model(IMAGES), 0)
    for module in leaves.values():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)):
            prune.l1_unstructured(module, "weight", 0.3)
    for _ in range(2):
        sum(model.train()(IMAGES)).sum().backward()
    qkv = model.blocks[-1].attn.qkv
    assert qkv.weight_orig.grad.abs().max() > 0 and (qkv.weight == 0).float().mean() > 0.29


def test_initial_weights_follow_the_released_code():
    model = deit.create_model(TI)
    for p in (model.cls_token, model.dist_token, model.pos_embed, model.blocks[3].mlp.fc1.weight):
        assert p.abs().max() <= 2 and 0.015 < p.std() < 0.025
    assert model.head.bias.abs().max() == 0
    assert (model.patch_embed.proj.weight.std() - 1 / math.sqrt(3 * 768)).abs() < 2e-3   # PyTorch's


def test_drop_path_is_linear_over_depth_per_sample_and_keeps_the_mean():
    model = deit.create_model(TI, drop_path=0.1, depth=12)
    close(torch.tensor([b.drop_path for b in model.blocks]), torch.linspace(0, 0.1, 12))
    block, x, branch = deit.Block(8, 2, 0.25), torch.zeros(20000, 3, 8), torch.ones(20000, 3, 8)
    y = block.add(x, branch)
    close(y.unique(), torch.tensor([0.0, 1 / 0.75]))
    assert (y == y[:, :1, :1]).all(), "whole samples are dropped"
    assert abs(y.mean() - 1) < 0.02
    assert (block.eval().add(x, branch) == 1).all()
    block = deit.Block(8, 2, 0.1).bfloat16()                      # where 1/0.9 is 1.109
    y = block.add(x.bfloat16(), branch.bfloat16() / 100).double()
    assert y.max() == (torch.tensor(0.01).bfloat16().double() / 0.9).bfloat16()
    y = block.add(torch.zeros(200000, 1, 1), torch.linspace(0, 1, 200000).bfloat16()[:, None, None])
    assert y.dtype == torch.float32 and abs(y.double().mean() - 0.5) < 2e-3
    for impossible in (dict(drop_path=1), dict(depth=0), dict(img_size=100), dict(num_heads=5)):
        with raises(f"'{list(impossible)[0]}': {list(impossible.values())[0]}"
                    if "drop_path" not in impossible else "drop_path, 1, in 0..1"):
            deit.create_model(TI, **impossible)


# ------------------------------------------------------------------------------------------------
# The losses
# ------------------------------------------------------------------------------------------------

def test_soft_loss_on_values_worked_by_hand():
    probabilities = (0.7, 0.2, 0.1), (0.4, 0.4, 0.2), (0.65, 0.25, 0.1)
    teacher, far, near = (torch.tensor([p]).log() for p in probabilities)
    soft = deit.soft_distillation_loss
    # 0.7 ln(0.7 / 0.4) + 0.2 ln(0.2 / 0.4) + 0.1 ln(0.1 / 0.2); at tau 3: of p^(1/3), normalised
    for student, tau, expected in ((far, 1.0, 0.183787), (near, 1.0, 0.007247),
                                   (far, 3.0, 0.191233), (teacher, 3.0, 0.0)):
        assert abs(soft(student, teacher, tau) - expected) < 1e-5
    # mean over the batch, not over batch x classes; shifts of the logits do not matter
    close(soft(far.repeat(4, 1) + 5, teacher.repeat(4, 1) - 2, 1.0), soft(far, teacher, 1.0))


def test_hard_loss_is_cross_entropy_against_the_teachers_choice():
    student = torch.tensor([[0.4, 0.4, 0.2], [0.1, 0.2, 0.7]]).log()
    by_hand = torch.tensor(-(math.log(0.4) + math.log(0.2)) / 2)
    for teacher in (torch.tensor([[9.0, 1.0, 0.0], [0.0, 5.0, 1.0]]), torch.tensor([0, 1])):
        close(deit.hard_distillation_loss(student, teacher), by_hand)   # of logits, or of choices


def test_combined_loss_weights_targets_types_and_refusals():
    cls, dis, t = torch.randn(3, 4, 5).unbind(0)
    y = torch.tensor([0, 4, 2, 2])
    ce, hard = F.cross_entropy(cls, y), F.cross_entropy(dis, t.argmax(1))
    loss, soft = deit.distillation_loss, deit.soft_distillation_loss
    close(loss(cls, dis, y, t), (ce + hard) / 2)
    close(loss(cls, dis, y, t, "hard", 0.2), 0.8 * ce + 0.2 * hard)
    close(loss(cls, dis, y, t, "soft"), 0.9 * ce + 0.1 * soft(dis, t, 3.0))
    close(loss(cls, dis, y, t, "soft", 0.5, 2.0), 0.5 * ce + 0.5 * soft(dis, t, 2.0))
    close(loss(cls, dis, y, None, "none"), ce)
    close(loss(cls, dis, F.one_hot(y, 5).float(), t), (ce + hard) / 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert loss(cls.bfloat16(), dis.bfloat16(), y, t.bfloat16(), "soft").dtype == torch.float32
    for mode in ("hard", "soft"):   # double stays double
        value = loss(cls.double(), dis.double(), F.one_hot(y, 5).float(), t.double(), mode)
        close(value, loss(cls, dis, y, t, mode).double())
    x, z = torch.randn(2, 4, 6, 5).unbind(0)
    for call in (lambda: loss(cls, dis, y, t[:, :3]), lambda: loss(cls, dis[:2], y, t, "none"),
                 lambda: soft(dis, t[:, :3], 1.0), lambda: deit.hard_distillation_loss(dis, t[:1]),
                 lambda: soft(x, z, 1.0), lambda: loss(x, x, y, z), lambda: loss(x, x, y, y),
                 lambda: deit.hard_distillation_loss(x, z), lambda: loss(cls, x, y, z, "soft")):
        with raises("must have one shape, (B, K)"):
            call()
    with raises("none of hard, soft, none"):
        loss(cls, dis, y, t, "medium")


def test_a_teacher_that_says_nan_makes_the_loss_nan():
    dis, y = torch.randn(4, 5), torch.arange(4)
    for bad in (math.nan, math.inf, -math.inf):
        t = torch.randn(4, 5)
        t[2, 3] = bad
        for mode in ("hard", "soft"):
            student = dis.clone().requires_grad_()
            loss = deit.distillation_loss(student, student, y, t, mode)
            loss.backward()   # of the gradient, too, so that no step is taken
            assert not loss.isfinite() and (
                mode == "soft" or not student.grad.isfinite().all()), (bad, mode)
    t = torch.full((4, 5), 6e4, dtype=torch.float16)              # finite, but not its sum
    assert deit.hard_distillation_loss(dis, t).isfinite()


def test_each_loss_reaches_its_own_head_and_nothing_reaches_the_teacher():
    model, teacher = small(), deit.load_teacher("regnet_y_400mf", None, 7)
    y, heads = torch.tensor([1, 2]), [model.head.weight, model.head_dist.weight]
    for mode in ("hard", "soft"):
        for alpha, (reached, untouched) in ((0.0, heads), (1.0, heads[::-1])):
            model.zero_grad()
            deit.distillation_loss(*model(IMAGES), y, teacher(IMAGES), mode, alpha).backward()
            assert reached.grad.abs().max() > 0 and untouched.grad.abs().max() == 0
            assert model.dist_token.grad.abs().max() > 0   # both tokens talk in every layer
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


# ------------------------------------------------------------------------------------------------
# Weights
# ------------------------------------------------------------------------------------------------

def test_official_and_timm_files_load_strictly_and_tell_their_architecture():
    model = deit.create_model(TI, num_classes=5, depth=2, img_size=64)
    state, args = model.state_dict(), argparse.Namespace(lr=1e-3, output="o")
    prefixed = {"module._orig_mod." + key: value for key, value in state.items()}
    for content in (state, prefixed, {"model": state, "args": args, "config": {"lr": 1}},
                    {"state_dict": prefixed, "args": args, "arch": "vit"}):
        other, said = deit.create_model(TI, num_classes=5, depth=2, img_size=64), []
        with working_folder():
            torch.save(content, "w.pth")
            deit.load_weights(other, "w.pth")
            if "config" in content:
                continue
            loaded = deit.load_model("w.pth", say=said.append)
            with raises("blocks.2"):
                deit.load_weights(deit.create_model(TI, num_classes=5, depth=3), "w.pth")
            for name in (TI, TI.replace("tiny", "base")):   # the name tells another size
                with raises("w.pth "):
                    deit.load_model("w.pth", model=name)
        assert len(said) == 1 and "num_heads (--num-heads); 3 are taken" in said[0]
        assert loaded.config | {"name": TI} == model.config and not loaded.training
        for got in (other, loaded):
            close(got.state_dict(), state, 0)


def test_the_number_of_heads_is_never_guessed_in_silence():
    argv, model = [f"{shared_images()}/val/10/0.JPEG", "--weights", "w.pt"], small()
    with working_folder():
        torch.save(model.state_dict(), "w.pt")
        with raises("no published model has its width, 32"):
            deit.load_model("w.pt")
        with raises("no published model has its width, 32", SystemExit):
            quiet(deit.main, argv)
        assert "both" in quiet(deit.main, [*argv, "--num-heads", "2"])[1]
        assert deit.load_model("w.pt", num_heads=4).config["num_heads"] == 4
        torch.save(checkpoint(model), "w.pt")
        for refused in (lambda: deit.load_model("w.pt", num_heads=4),
                        lambda: deit.load_weights(small(num_heads=4), "w.pt")):
            with raises("2 attention heads, not 4"):
                refused()


def test_old_files_of_torchvision_load():
    """MNASNet's have a version; the oldest lack batch norms' counts, ViT's have other names."""
    for name in ("mnasnet0_5", "resnet18", "vit_b_32"):
        model, loaded = (deit.create_model(name, num_classes=3) for _ in range(2))
        state = model.state_dict()
        if name != "mnasnet0_5":
            old = {"mlp.0": "mlp.linear_1", "mlp.3": "mlp.linear_2"}
            state = {re.sub(r"mlp\.[03]", lambda m: old[m[0]], key): x
                     for key, x in state.items() if not key.endswith("num_batches_tracked")}
        deit.load_weights(loaded, state)
        close(loaded.state_dict(), model.state_dict(), 0)


def test_a_head_that_does_not_fit_starts_anew_which_is_said_or_refused():
    class Odd(torch.nn.Module):
        """A convolutional head, registered first, a linear one, and K features that are no head."""
        def __init__(self, K):
            super().__init__()
            self.conv_head, self.head = torch.nn.Conv2d(8, K, 1), torch.nn.Linear(8, K, bias=False)
            self.body, self.norm = torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(7)

    wrap = lambda K: deit.Classifier(Odd(K), num_classes=K)
    named = lambda name: lambda K: deit.create_model(name, num_classes=K)
    for make, heads in ((lambda K: small(num_classes=K), ["head", "head_dist"]),
                        (named("squeezenet1_0"), ["classifier.1"]), (named("resnet18"), ["fc"]),
                        (wrap, ["conv_head", "head"])):
        state = make(7).state_dict()
        body = {k: v for k, v in state.items() if k.rpartition(".")[0] not in heads}
        wrapped = {f"module.{k}": v for k, v in body.items()}
        for given, found, count in ((state, 7, 4), (wrapped, 0, 7)):
            model, said = make(count), []
            before = copy.deepcopy(model.state_dict())
            deit.load_weights(model, given, say=said.append)
            assert said == [f"the state dict has {found} classes in {head}, not {count}: it starts "
                            "anew." for head in heads]
            for key, x in model.state_dict().items():
                close(x, body[key] if key in body else before[key], 0)
            with raises(f"{found} classes in {heads[0]}, not {count}"):
                deit.load_weights(model, given, new_heads=False)
        deit.load_weights(make(7), state, say=lambda text: 1 / 0)   # it fits: nothing to say
    for key, x in (("head.weight", torch.ones(7, 9)), ("norm.bias", torch.ones(5)),
                   ("body.weight", torch.ones(7, 3, 3, 3)), ("head.weight", torch.ones(()))):
        with raises("another architecture"):
            deit.load_weights(wrap(7), wrap(7).state_dict() | {key: x})
    parametrized = deit.Classifier(torch.nn.Sequential(torch.nn.Flatten(), torch.nn.utils.
                                   parametrizations.weight_norm(torch.nn.Linear(8, 7))),
                                   num_classes=7)   # it has no plain weight: nothing starts anew
    deit.load_weights(parametrized, parametrized.state_dict(), say=lambda text: 1 / 0)
    with working_folder():
        for content in ({"model": body}, checkpoint(small()) | {"model": {
                k: v for k, v in small().state_dict().items() if "head" not in k}}):
            torch.save(content, "w.pth")   # a backbone has no classes to choose from
            with raises("w.pth "):
                deit.load_model("w.pth", num_heads=2)


def test_position_embedding_is_resized_bicubically_with_its_tokens_kept():
    old, model = torch.randn(1, 2 + 16, 32), small(img_size=64)   # G = 8, from 4
    new = deit.resize_pos_embed(old, model)
    assert new.shape == (1, 2 + 64, 32)
    close(new[:, :2], old[:, :2], 0)
    assert deit.resize_pos_embed(old, small()) is old
    # One inner point by hand: row 3 of 8 lies at (3 + 0.5) / 2 - 0.5 = 1.25 of 4; Keys' kernel,
    # a = -0.75, at distances 1.25, 0.25, 0.75 and 1.75
    weights = torch.tensor([-27, 225, 67, -9]) / 256
    expected = torch.einsum("i,j,ijd->d", weights, weights, old[0, 2:].view(4, 4, 32))
    close(new[0, 2:].view(8, 8, 32)[3, 3], expected)


@contextlib.contextmanager
def fake_hub(**methods):
    """Works in a new folder that is served on localhost, with an empty cache; its address."""
    handler = type("Quiet", (http.server.SimpleHTTPRequestHandler,),
                   {"log_message": lambda *args: None} | methods)
    with working_folder() as folder, http.server.ThreadingHTTPServer(
            ("127.0.0.1", 0), handler) as server, \
            patched(torch.hub, "get_dir", lambda: os.path.join(folder, "hub")):
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


def test_published_weights_are_downloaded_once_and_hash_checked():
    model, entry = deit.create_model(TI), deit.VARIANTS[TI][:-1]
    with fake_hub() as url, patched(deit, "RELEASES", url):
        torch.save({"model": model.state_dict()}, "w")
        sha256 = hashlib.sha256(Path("w").read_bytes()).hexdigest()[:8]
        shutil.copy("w", f"{TI}-deadbeef.pth")
        os.rename("w", f"{TI}-{sha256}.pth")
        with patched(deit, "VARIANTS", {TI: (*entry, "deadbeef")}), raises("its hash is not the"):
            deit.create_model(TI, pretrained=True)
        assert not os.path.exists("hub")
        with patched(deit, "VARIANTS", {TI: (*entry, sha256)}):
            for _ in range(2):
                close(deit.create_model(TI, pretrained=True).state_dict(), model.state_dict(), 0)
                os.path.exists(f"{TI}-{sha256}.pth") and os.remove(f"{TI}-{sha256}.pth")   # cached
            assert deit.load_model(TI).config == model.config
        assert os.listdir("hub/checkpoints") == [f"{TI}-{sha256}.pth"]


def test_a_download_that_fails_ends_and_leaves_nothing():
    from urllib.request import urlopen

    def impatient(source, timeout):   # the first byte, and each next one, may take a minute
        assert timeout == 60
        return urlopen(source, timeout=0.3)

    def do_GET(self):
        stalled = "stalls" in self.path
        if self.path != "/stalls-before-12345678.pt":
            self.send_response(200)
            self.send_header("Content-Length", "900")
            self.end_headers()
            self.wfile.write(b"<html>" + b" " * (0 if "half" in self.path or stalled else 894))
        stalled and time.sleep(1)

    cases = {"stalls-before-12345678.pt": "timed out", "stalls-inside-12345678.pt": "timed out",
             "half-12345678.pt": "IncompleteRead", "page-12345678.pt": "its hash is not the one",
             "best.pt": "no URL that ends in a hash", "best-20261231.pt": "its hash is not the one"}
    with fake_hub(do_GET=do_GET) as url, patched(deit.urllib.request, "urlopen", impatient):
        for name, phrase in cases.items():
            with raises(phrase):
                deit.read_checkpoint(url + name)
        with raises("could not be downloaded (URLError"):
            deit.read_checkpoint("http://127.0.0.1:9/nothing-12345678.pt")
        sha256 = hashlib.sha256(b"<html>" + 894 * b" ").hexdigest()
        with patched(deit.pathlib.Path, "replace", mock.Mock(side_effect=OSError("disk full"))), \
                raises("disk full"):
            deit.read_checkpoint(f"{url}page-{sha256}.pt")
        assert list(Path("hub").rglob("*.*")) == [], "nothing is left"


def test_torchvisions_published_weights_start_a_model_with_new_heads():
    import torchvision.models
    name = "regnet_y_400mf"
    model = trained_looking(deit.create_model(name))
    argv = (f"--data {shared_images()} --model {name} --pretrained --epochs 2 --warmup-epochs 1 "
            "--batch-size 12 --lr 2e-3 --img-size 32 --workers 0 --output o").split()
    with fake_hub() as url:
        torch.save(model.state_dict(), "demo.pth")
        sha256 = hashlib.sha256(Path("demo.pth").read_bytes()).hexdigest()
        shutil.copy("demo.pth", f"demo-{sha256}.pth")
        entry = types.SimpleNamespace(DEFAULT=types.SimpleNamespace(url=f"{url}demo-{sha256}.pth"))
        stack = contextlib.ExitStack()
        stack.enter_context(patched(torchvision.models, "get_model_weights", lambda name: entry))
        close(deit.load_model(name)(IMAGES), model(IMAGES))
        _, said = quiet(train.main, argv)
        stack.close()
        assert "1000 classes in fc, not 3: it starts anew" in said
        last = deit.read_checkpoint("o/best.pt")["model"]["stem.0.weight"]
        assert (last - model.state_dict()["stem.0.weight"]).abs().max() < 0.1


def test_published_names_are_torchvisions():
    from torchvision.models import RegNet_Y_400MF_Weights as table
    asked = []
    with fake_hub(), patched(deit.urllib.request, "urlopen", lambda url, **_: asked.append(url)):
        for source in ("regnet_y_400mf", TI):
            with raises("could not be downloaded"):
                deit.load_teacher(source)
        for name in ("no_such_thing", "a/b.pt", "."):
            for call in (deit.load_teacher, deit.load_model, deit.create_model):
                with raises("no URL that ends in a hash (-1234abcd.pth), and no model's name"):
                    call(name)
    assert asked == [table.DEFAULT.url, f"{deit.RELEASES}{TI}-b40b3cf7.pth"]


def test_mutated_checkpoints_load_the_same_values_or_are_refused_in_a_sentence():
    rng, model, refused = np.random.default_rng(0), small(), 0

    def mutant(trial):
        low = len(whole) - 6000 if trial % 3 == 1 else 0          # the directory is at the end
        place = rng.integers(low, len(whole))
        flipped = bytes([whole[place] ^ 1 << rng.integers(8)]) + whole[place + 1:]
        return whole[:place] + (b"" if trial % 3 == 0 else flipped)

    with working_folder():
        torch.save(checkpoint(model), "w.pt")
        whole = Path("w.pt").read_bytes()
        for data in itertools.chain((b"", b"no zip"), map(mutant, range(1000))):
            Path("w.pt").write_bytes(data)
            try:
                loaded = deit.load_model("w.pt", say=lambda text: None)
                close(loaded.state_dict(), model.state_dict(), 0)
            except deit.InputError as e:
                refused += 1
                assert "\n" not in str(e)
    assert 400 < refused < 1000


def test_odd_state_dicts_and_configs_are_refused_in_a_sentence():
    good, ones = checkpoint(small()), torch.ones(32)
    state, config = good["model"], good["config"]
    lacking = {k: v for k, v in state.items() if k != "norm.bias"}
    cases = [("model", "can be read safely", odd) for odd in ({"w": 5}, {1: [2]})]
    cases += [("model", "another architecture", odd) for odd in (
        lacking, state | {"more": ones}, state | {"norm.weight": ones[:5]},
        state | {"blocks.0.norm1.weight": torch.tensor(1.0)},
        state | {"pos_embed": torch.zeros(1, 9, 32)}, state | {"pos_embed": torch.zeros(5)})]
    cases += [("model", "fits no model", odd) for odd in (
        state | {"head.weight": torch.tensor(1.0)}, {"fc.weight": ones}, {1: ones} | state)]
    cases += [("config", "fits no model", odd) for odd in (
        [1], "x", 5, {"name": TI, "size": 3}, config | {"name": 3}, config | {"num_heads": "2"},
        config | {"drop_path": None}, config | {"name": "resnet18", "num_classes": 10**9},
        {"name": "resnet18", "num_classes": 7, "img_size": 10**5})]
    with working_folder():
        for key, phrase, odd in cases:
            torch.save(good | {key: odd}, "w.pt")
            with raises(phrase):
                deit.load_model("w.pt")
        for odd in (5, ["a"], {}, None):
            torch.save(good | {"classes": odd}, "w.pt")
            assert deit.load_model("w.pt").classes is None


def test_a_small_file_takes_little_memory():
    """Each file that claims to be large is a sentence, or the small model that its tensors are."""
    code = """
import io, os, resource, sys, torch, zipfile
from torch.fx.experimental import optimization
import deit, test_deit, torchvision.models
good = test_deit.checkpoint(test_deit.small())
state, config = good["model"], good["config"]
z, D = torch.zeros(4 * 768 * 768), 768
shapes = {"norm1.weight": (D,), "norm1.bias": (D,), "attn.qkv.weight": (3 * D, D),
          "attn.qkv.bias": (3 * D,), "attn.proj.weight": (D, D), "attn.proj.bias": (D,),
          "norm2.weight": (D,), "norm2.bias": (D,), "mlp.fc1.weight": (4 * D, D),
          "mlp.fc1.bias": (4 * D,), "mlp.fc2.weight": (D, 4 * D), "mlp.fc2.bias": (D,)}
one_storage = {f"blocks.{i}.{key}": z[:torch.Size(s).numel()].view(s)
               for i in range(99) for key, s in shapes.items()}
one_storage |= {"patch_embed.proj.weight": z[:768 * D].view(D, 3, 16, 16),
                "pos_embed": z[:5 * D].view(1, 5, D), "head.weight": z[:7 * D].view(7, D)}
wide = torch.zeros(1, 1, 192).expand(1, 1 + 5000**2, 192)
resnet = deit.create_model("resnet18", num_classes=4)
files = [good | {"config": config | odd} for odd in (dict(depth=10**9), dict(img_size=10**7))]
files += [{"model": resnet.state_dict(), "config": resnet.config | {"num_classes": 10**9}},
          {f"{i}.norm1.weight": torch.ones(1) for i in range(3000)}, state | {"pos_embed": wide},
          {"model": {f"blocks.{i}.mlp.fc2.weight": torch.ones(8, 32) for i in range(20000)} | {
           "patch_embed.proj.weight": torch.ones(8, 3, 1, 1), "pos_embed": torch.ones(1, 2, 8)},
           "config": config}, one_storage, state | {"head.weight": torch.zeros(10**8, 0)},
          state | {"norm.bias": torch.zeros(1, dtype=torch.float64).expand(2**27, 2**34)}]
files += [deit.create_model("deit_tiny_patch16_224", depth=1).state_dict() | odd for odd in (
    {"patch_embed.proj.weight": torch.zeros(192, 1, 1500, 1, dtype=torch.int8)},
    {"pos_embed": torch.zeros(1, 2 * 10**6, 1, dtype=torch.int8)},
    {"head.weight": torch.zeros(2 * 10**6, 1, dtype=torch.int8)})]
for i, content in enumerate(files):
    torch.save(content, f"{i}.pt")
with zipfile.ZipFile("deflated.pt", "w", zipfile.ZIP_DEFLATED) as f:
    f.writestr("w/data.pkl", bytes(2**29))
with zipfile.ZipFile("0.pt") as f:
    entries = f.infolist()
    largest = max(entries, key=lambda entry: entry.file_size)
with zipfile.ZipFile("overlapping.pt", "w") as f:
    f.writestr("w/data.pkl", bytes(2**24))
    f.filelist += f.filelist * 29999   # 500 GB
    f._didModify = True
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sorted(p for p in os.listdir() if p.endswith(".pt")):
    for call in (lambda path: deit.load_model(path, say=lambda text: None),
                 lambda path: deit.load_teacher("resnet18", path, 4),
                 lambda path: deit.load_weights(deit.create_model("deit_tiny_patch16_224"), path)):
        try:
            call(path)
            print(path, "loaded")
        except deit.InputError as e:
            assert len(str(e)) < 600 and "\\n" not in str(e), e
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""
    with working_folder():
        out = launch("-c", code)
    *loaded, megabytes = out.stdout.splitlines() or ["nothing"]
    assert loaded == ["0.pt loaded", "1.pt loaded"], out   # their tensors are of a small model
    assert int(megabytes) < 500, megabytes


def test_files_that_could_run_code_or_hold_no_weights_are_refused():
    bomb = type("Bomb", (), {"__reduce__": lambda self: (os.mkdir, ("exploded",))})()
    with working_folder():
        for content in ({"model": bomb}, [1, 2], {"model": {}, "args": bomb}):
            torch.save(content, "w.pth")
            for call in (deit.read_checkpoint, lambda path: deit.load_teacher(TI, path, 7)):
                with raises("keep the tensors alone where it was made: import torch; torch.save("):
                    call("w.pth")
        assert not os.path.exists("exploded")


def test_texts_of_files_reach_no_terminal_as_they_are():
    escape, photo = "\x1b[2J\nx", f"{shared_images()}/val/10/0.JPEG"
    good = checkpoint(small())
    names = [escape, *"bcdefg"]
    with working_folder():
        torch.save(good | {"classes": names}, "w.pt")
        _, said = quiet(deit.main, [photo, "--weights", "w.pt"])
        for content in (good | {"config": good["config"] | {"name": escape}},
                        good | {"model": good["model"] | {escape: torch.ones(1)}},
                        good | {"config": good["config"] | {"num_heads": escape}}):
            torch.save(content, "w.pt")
            with raises("w.pt "):
                deit.load_model("w.pt")
            try:
                deit.load_model("w.pt", model=TI)
            except deit.InputError as e:
                said += str(e)
    assert "\x1b" not in said and repr(escape) in said
    for error in (ValueError("x" * 999 + "\ny"), OSError(escape), ValueError(
            "Weights only load failed. This file can still be loaded, to do so you have two"),
            ValueError("In PyTorch 2.6, ... Re-running with `weights_only` set to `False` will")):
        said = deit.reason(error)
        assert len(said) <= 300 and said.isprintable() and "False" not in said, said
        assert said.startswith(type(error).__name__)


def test_no_image_starts_a_program_or_waits_for_ever():
    """Pillow would give an EPS file to Ghostscript, whatever its suffix; a pipe has no end."""
    with working_folder() as folder, patched(os, "environ", os.environ | {"PATH": folder}):
        Path("gs").write_text("#!/bin/sh\n/bin/touch called")
        os.chmod("gs", 0o755)
        Path("7.JPEG").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n")
        os.mkfifo("pipe.jpg")
        torch.save(checkpoint(small()), "w.pt")
        for path, phrase in (("7.JPEG", "cannot identify"), ("pipe.jpg", "no regular one"),
                             ("gone.jpg", "there is no such file")):
            with raises(phrase, OSError):
                deit.open_image(path)
            with raises(f"{path} cannot be read as an image (", SystemExit):
                quiet(deit.main, [path, "--weights", "w.pt"])
        with Image.open("7.JPEG") as image:
            assert image.format == "EPS"
        assert not os.path.exists("called")
        for name in ("jpeg", "png", "webp", "bmp", "gif", "ppm", "tiff", "mpo", "avif"):
            if name.upper() in Image.SAVE:
                noise_image(8, 8).save("x.jpg", name)
                assert deit.open_image("x.jpg").size == (8, 8)


def test_nan_is_no_answer():
    model = small()
    torch.nn.init.constant_(model.head_dist.weight, math.nan)
    with working_folder():
        torch.save(checkpoint(model), "w.pt")
        with raises("w.pt: the distillation head says nan", SystemExit):
            quiet(deit.main, [f"{shared_images()}/val/10/0.JPEG", "--weights", "w.pt"])


# ------------------------------------------------------------------------------------------------
# The teacher
# ------------------------------------------------------------------------------------------------

def trained_looking(model):
    """Gives batch norms statistics that are not the identity."""
    for m in model.modules():
        if isinstance(m, torch.nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
    return model.eval()


def test_teacher_is_the_model_of_the_file_frozen_for_good():
    x, classes = torch.randn(2, 3, 64, 64), list("abcdefghij")
    for name in ("regnet_y_400mf", "resnet18", TI):
        plain = trained_looking(deit.create_model(name, num_classes=10, img_size=64))
        with working_folder():
            torch.save({"model": plain.state_dict(), "classes": classes}, "t.pth")
            teacher = deit.load_teacher(name, "t.pth", 10, img_size=64)
        assert teacher.classes == classes
        torch.nn.ModuleList([teacher]).train()
        assert not any(m.training for m in teacher.modules())
        assert not any(isinstance(m, torch.nn.BatchNorm2d) for m in teacher.modules()), "all folded"
        answer = teacher(x)
        assert not answer.requires_grad
        close(answer, plain(x), 1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            half, usual = teacher(x), plain(x).float()
        assert half.dtype == torch.bfloat16
        assert (half.float() - answer).abs().mean() < 3 * (usual - answer).abs().mean()
        twin = copy.deepcopy(teacher)
        twin.load_state_dict({k: v * 0 for k, v in teacher.state_dict().items()})
        assert twin(x).abs().max() == 0
        close(teacher(x), answer, 0)                              # the twin is apart


def test_teacher_is_refused_when_it_does_not_fit():
    base = TI.replace("tiny", "base")
    with working_folder():
        torch.save(deit.create_model("regnet_y_400mf", num_classes=4).state_dict(), "t.pth")
        torch.save(checkpoint(small()), "deit.pth")
        torch.save(deit.create_model(TI, num_classes=7).state_dict(), "bare.pth")
        for name, weights, count, phrase in (
                ("regnet_y_400mf", "DEFAULT", 7, "knows 1000 classes, not 7: train a teacher"),
                (TI, "typo.pth", 1000, "'typo.pth' is no file"),
                ("regnet_y_400mf", "t.pth", 7, "has 4 classes in fc, not 7"),
                ("regnet_y_800mf", "t.pth", 4, "another architecture"),
                (TI, "deit.pth", 5, "has 7 classes in head, not 5"),
                (base, "deit.pth", 7, f"it holds '{TI}'"),
                (base, "bare.pth", 7, "bare.pth is of another architecture")):
            with raises(phrase):
                deit.load_teacher(name, weights, count)


# ------------------------------------------------------------------------------------------------
# Schedule and parameter groups
# ------------------------------------------------------------------------------------------------

def test_schedule_at_its_corners():
    W, T, peak, low = 5 * 1251, 300 * 1251, 1e-3, 1e-5
    after_warmup = low + (peak - low) * (1 + math.cos(math.pi * 5 / 300)) / 2
    for step, expected in ((W // 2, 1e-6 + (peak - 1e-6) * (W // 2) / W), (W, after_warmup),
                           (T // 2, (peak + low) / 2), (T, low)):   # the cosine spans all steps
        assert abs(train.lr_at(step, peak, low, W, T) - expected) < 1e-12
    assert train.lr_at(0, peak, low, W, T) == 1e-6
    assert train.lr_at(0, peak, low, 0, T) == peak                # no warm-up


def test_averaged_weights_forget_their_start():
    ema, model = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
    for step, decay in ((0, 0.1), (10**7, 0.99996)):
        expected = decay * ema.weight + (1 - decay) * model.weight
        train.update_ema(ema, model, step, 0.99996)
        close(ema.weight, expected, 1e-6)


def test_parameter_groups_are_the_released_ones():
    model = deit.create_model(TI)
    groups = train.parameter_groups(model, 0.05)
    assert [group["weight_decay"] for group in groups] == [0.05, 0]
    names = {id(p): name for name, p in model.named_parameters()}
    decayed, exempt = ([names[id(p)] for p in group["params"]] for group in groups)
    assert sorted(decayed + exempt) == sorted(names.values())
    matrices = {name for name in names.values() if name.endswith(".weight") and "norm" not in name}
    assert set(decayed) == matrices | {"dist_token"}
    inside = train.parameter_groups(deit.Classifier(model), 0.05)   # a user's module:function
    assert all([*map(id, a["params"])] == [*map(id, b["params"])] for a, b in zip(inside, groups))


# ------------------------------------------------------------------------------------------------
# Augmentation
# ------------------------------------------------------------------------------------------------

def encoded(image, kind, **how):
    file = io.BytesIO()
    image.save(file, kind, **how)
    return file


def noise_image(width=80, height=60, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    return Image.fromarray(pixels)


def test_randaugment_draws_two_of_fifteen_half_the_time_at_level_nine():
    drawn = []
    ops = {n: (lambda im, v, n=n: drawn.append((n, v)) or im) for n in train.RANDAUGMENT}
    with patched(train, "RANDAUGMENT", ops):
        for i in range(4000):
            train.rand_augment(None, 9, train.rng_for("test", i))
    names, strengths = zip(*drawn)
    levels = np.abs(strengths)
    assert len(ops) == 15 and abs(len(drawn) / 8000 - 0.5) < 0.02
    assert all(abs(names.count(n) / len(names) - 1 / 15) < 0.015 for n in ops)
    assert abs(np.mean(levels) - 0.9) < 0.01 and abs(np.std(levels) - 0.048) < 0.01
    assert max(levels) == 1 and abs(np.mean(np.sign(strengths))) < 0.05


def test_randaugment_operations_have_the_recipes_strength():
    grey, bright, edge = (Image.new("RGB", (40, 20), (v, v, v)) for v in (100, 200, 0))
    edge.paste(bright, (20, 0))                                   # bright from x = 20 on

    def value(op, t, sign=1, image=grey, at=(20, 10)):
        return train.RANDAUGMENT[op](image, t * sign).getpixel(at)[0]

    assert value("Invert", 0.9) == 155
    assert value("Posterize", 0.9) == 0 and value("Posterize", 0.5) == 100 & 0b11000000
    assert value("Posterize", 1.0, image=bright) == 128           # one bit at least
    assert value("Solarize", 0.606) == 100                        # what is above 256 - 155 = 101
    assert value("Solarize", 0.61) == 155                         # 256 - 156 = 100
    assert value("SolarizeAdd", 0.9) == 100 + 99
    assert value("Brightness", 0.9, -1) == 19 and value("Brightness", 1.0, -1) == 10   # 0.19, 0.1
    assert value("Brightness", 0.5) == 145
    assert value("TranslateX", 1.0, 1, edge, (3, 10)) == 200      # moved left by 18
    assert train.RANDAUGMENT["TranslateX"](edge, 1.0).getpixel((30, 10)) == (124, 116, 104)
    assert value("ShearX", 1.0, 1, edge, (18, 15)) == 200         # 0.3 * 15 = 4.5 to the left
    assert value("ShearX", 1.0, 1, edge, (18, 2)) == 0
    turned = edge.rotate(30, Image.Resampling.BICUBIC, fillcolor=(124, 116, 104))
    assert np.array_equal(train.RANDAUGMENT["Rotate"](edge, 1.0), turned)


def test_random_crops_keep_area_ratio_and_bounds():
    from torchvision.transforms import RandomResizedCrop
    boxes = [train.crop_box(500, 375, train.rng_for(i)) for i in range(3000)]
    for left, top, right, bottom in boxes:
        assert 0 <= left < right <= 500 and 0 <= top < bottom <= 375
        assert 0.74 < (right - left) / (bottom - top) < 1.35
    image, points = Image.new("RGB", (500, 375)), (0.01, 0.25, 0.5, 0.75, 0.99)
    reference = [RandomResizedCrop.get_params(image, (0.08, 1), (3 / 4, 4 / 3)) for _ in boxes]
    ours = np.quantile([(r - l) * (b - t) for l, t, r, b in boxes], points)
    theirs = np.quantile([h * w for _, _, h, w in reference], points)
    assert np.abs(ours - theirs).max() < 0.04 * 500 * 375
    assert train.crop_box(1000, 10, train.rng_for(0)) == (493, 0, 506, 10)     # central, ratio 4/3
    assert train.crop_box(1, 1, train.rng_for(0)) == (0, 0, 1, 1)


def test_evaluation_view_is_torchvisions_resize_and_centre_crop():
    from torchvision.transforms import CenterCrop, Compose, InterpolationMode, Resize
    reference = Compose([Resize(256, InterpolationMode.BICUBIC), CenterCrop(224)])
    for size in ((500, 375), (333, 500), (224, 224), (1000, 300), (90, 120)):
        image = noise_image(50, 40).resize(size, Image.Resampling.BICUBIC)
        view = deit.center_view(image, 224)
        assert view.size == (224, 224) and np.array_equal(view, reference(image)), size


def test_normalisation_worked_by_hand_is_the_same_for_one_image_and_a_batch():
    x = deit.to_tensor(Image.new("RGB", (2, 2), (124, 116, 104)))[0, :, 0, 0] * 255
    close(x, torch.tensor([(124 - 255 * 0.485) / 0.229, (116 - 255 * 0.456) / 0.224,
                           (104 - 255 * 0.406) / 0.225]))
    images = [noise_image(8, 8, seed) for seed in range(3)]
    batch = train.normalise(torch.from_numpy(np.stack(images)), torch.device("cpu"))
    close(batch, torch.cat([deit.to_tensor(image) for image in images]))


def test_erasing_boxes_and_their_noise():
    boxes = [train.erasing_box(224, 0.25, train.rng_for(i)) for i in range(8000)]
    hit = [box for box in boxes if box != (0, 0, 0, 0)]
    assert abs(len(hit) / 8000 - 0.25) < 0.015
    for top, left, bottom, right in hit:
        assert 0 <= top < bottom <= 224 and 0 <= left < right <= 224
        h, w = bottom - top, right - left
        assert 0.019 < h * w / 224**2 < 0.34 and 0.28 < h / w < 3.5
    boxes = torch.tensor([[0, 0, 0, 0], [10, 20, 40, 45], [0, 0, 0, 0], [0, 0, 63, 2]])
    erased = train.erase(torch.zeros(4, 3, 64, 64), boxes)
    for row, (top, left, bottom, right) in enumerate(boxes):
        noise = erased[row, :, top:bottom, left:right]
        assert (noise != 0).all() and (erased[row] != 0).sum() == noise.numel()
    noise = erased[1, :, 10:40, 20:45]
    assert abs(noise.mean()) < 0.1 and abs(noise.std() - 1) < 0.1


def test_mixed_targets_say_what_is_in_the_pixels():
    """Image i is 1 in channel i and 0 elsewhere, so that its share can be read off the pixels."""
    one_hot = torch.eye(4)
    for alphas, kinds in (((0.8, 1.0), {"mixup", "cutmix"}), ((0.8, 0), {"mixup"}),
                          ((0, 1.0), {"cutmix"})):
        seen, shares = set(), []
        for i in range(300):
            images = one_hot[..., None, None].repeat(1, 1, 32, 32)
            mixed, targets = train.mixup_or_cutmix(images, one_hot, *alphas, train.rng_for(i))
            close(mixed.mean((2, 3)), targets)
            own = targets[0, 0].item()
            close(targets[0], torch.tensor([own, 0, 0, 1 - own]))   # partner: read backwards
            shares.append(own)
            if 0.01 < own < 0.99:   # else both look alike
                seen.add({1: "mixup", 2: "cutmix"}[len(mixed[0, 0].unique())])
        assert seen == kinds and 0.3 < np.mean(shares) < 0.75
    assert train.mixup_or_cutmix(images, one_hot, 0, 0, None)[0] is images


def test_smoothing_spreads_a_tenth_over_all_classes():
    smooth = train.smooth_targets(torch.tensor([1]), 4, 0.1)
    close(smooth, torch.tensor([[0.025, 0.925, 0.025, 0.025]]))


def test_every_kind_of_image_becomes_rgb_as_the_recipe_does():
    images = [Image.new(mode, (5, 4)) for mode in
              ("1", "L", "LA", "P", "P", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "I;16B")]
    images[3].info["transparency"] = b"\x00\xff"
    exif, picture = Image.Exif(), noise_image(5, 4)
    exif[0x0112] = 6   # "turn by 90 degrees", which the recipe ignores
    for kind, how in (("jpeg", dict(progressive=True)), ("jpeg", dict(exif=exif)),
                      ("gif", dict(save_all=True, append_images=[noise_image(5, 4, 1)] * 2))):
        images.append(Image.open(encoded(picture, kind, **how)))
    for image in images:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")   # of a palette's transparency
            rgb = deit.to_rgb(image)
        assert rgb.mode == "RGB" and rgb.size == (5, 4), image
    deep = Image.fromarray(np.full((4, 5), 40000, np.uint16))
    ppm = io.BytesIO(b"P5 5 4 65535\n" + np.full((4, 5), 40000, ">u2").tobytes())
    for image in (deep, Image.open(ppm)):
        assert deit.to_rgb(image).getpixel((0, 0)) == (156, 156, 156)   # 40000 / 256, not white
    for mode in ("I", "F"):   # of any range
        with raises("convert it to 8 bits", ValueError):
            deit.to_rgb(Image.new(mode, (5, 4)))


# ------------------------------------------------------------------------------------------------
# Data
# ------------------------------------------------------------------------------------------------

def test_sampler_covers_each_image_as_promised_for_1_2_3_processes():
    def views(repeats, world_size=1, start=0):
        """(epoch, step, k, image, view) of 8 steps of 24 views in micro-batches of 4."""
        found = []
        for rank in range(world_size):
            cfg = config(batch_size=24, micro_batch=4, repeats=repeats, seed=5, epoch_steps=4,
                         ks=range(rank, 6, world_size))
            items = train.train_items(100, cfg, start)
            for *key, images, numbers in itertools.islice(items, (8 - start) * 6 // world_size):
                found += [(*key, i, n) for i, n in zip(images.tolist(), numbers.tolist())]
        return sorted(found, key=lambda view: view[:3])

    for repeats in (1, 3):
        together = views(repeats)
        assert together == views(repeats, 2) == views(repeats, 3)
        assert len(together) == 8 * 24
        first, second = ([v[3:] for v in together if v[0] == epoch] for epoch in (0, 1))
        assert first != second, "another order every epoch"
        for seen in (first, second):
            assert len(seen) == len(set(seen)) == 96              # no view twice
            assert len({i for i, n in seen}) == 96 // repeats
            assert {n for i, n in seen} == set(range(repeats))
    assert views(3, start=5) == views(3)[5 * 24:], "resumed"


def test_draws_are_keyed_the_same_for_any_number_of_workers_and_else_different():
    folder = train.ImageFolder(shared_images(), "train")
    cfg = config(randaugment=9, erasing=0.25, repeats=3)

    def batches(workers):
        """All views of two epochs."""
        items = train.train_items(len(folder), cfg)
        dataset = train.TrainDataset(folder, cfg)
        _, batches = train.make_loader(dataset, items, config(workers=workers))
        return torch.cat([next(batches)[0] for _ in range(12)])

    views = batches(0)
    assert len(views.flatten(1).unique(dim=0)) == len(views) == 72
    for workers in (1, 2, 3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")   # that 3 are many for two cores
            assert torch.equal(batches(workers), views)


def test_an_image_is_decoded_once_for_its_views_and_views_are_spread():
    folder, opened = train.ImageFolder(shared_images(), "train"), []
    item = (0, 0, 0, np.repeat([3, 14, 30], 3), np.tile([0, 1, 2], 3))
    with watched(folder, "open", lambda n, i, unreadable: opened.append(i)):
        labels = train.TrainDataset(folder, config())[item][1].tolist()
    assert opened == [3, 14, 30]
    assert sorted(labels) == [0, 0, 0, 1, 1, 1, 2, 2, 2] and labels != sorted(labels)


def test_a_part_for_validation_is_chosen_by_name_and_stays_when_images_come():
    def chosen(part, fraction=0.3):
        images = train.ImageFolder("train", part, fraction)
        return {images.path(i) for i in range(len(images))}

    flags = ("--epochs", "2", "--output", "o", "--val-fraction")
    with working_folder() as folder:
        draw_images(folder, 60, 1)
        val, rest = chosen("val"), chosen("train")
        assert len(val | rest) == 180 and not val & rest and 30 <= len(val) <= 80
        for n in range(60, 80):
            os.link("train/2/0.JPEG", f"train/2/{n}.JPEG")
        assert chosen("val") >= val and chosen("train") >= rest
        for data, fraction, phrase in ((".", "0.3", "leave it out, or give another --data"),
                                       ("train", "1e-9", "no class folders with (enough) images")):
            with raises(phrase, SystemExit):
                run(*flags, fraction, data=data)
        log, said = run(*flags, "0.3", data="train")
        assert log[-1]["val_images"] == len(chosen("val"))
        assert f"{len(chosen('train'))} training" in said


def test_every_class_keeps_an_image_for_training_when_a_part_is_for_validation():
    for classes, count, fraction in ((100, 2, 0.3), (1000, 3, 0.1)):
        with working_folder():
            for i in range(classes):
                os.makedirs(f"d/{i:04d}")
                for j in range(count):
                    Path(f"d/{i:04d}/{j}.png").touch()
            rest, val = (train.ImageFolder("d", part, fraction) for part in ("train", "val"))
            assert min(rest.counts) == 1 and len(rest.classes) == classes
            assert len(rest) + len(val) == classes * count
            assert abs(len(val) / classes / count - fraction) < 0.1


def test_a_broken_training_image_is_replaced_and_a_broken_validation_image_is_wrong():
    with working_folder() as folder:
        draw_images(folder, 4, 2)
        for path in ("train/10/1.JPEG", "train/10/3.JPEG", "train/2/3.JPEG", "val/1/0.JPEG"):
            Path(path).write_bytes(b"\xff\xd8 not an image")
        images, val = train.ImageFolder(".", "train"), train.ImageFolder(".", "val")
        dataset = train.TrainDataset(images, config())
        for broken, substitute, label in ((5, 6, 1), (7, 8, 2), (11, 0, 0)):   # the next, its label
            item = 0, 0, 0, np.array([broken]), np.array([0])
            views, labels, *_, reasons = dataset[item]
            assert list(reasons) == [broken] and "cannot identify" in reasons[broken]
            image, rng = images.open(substitute, {}), train.rng_for(0, 0, broken, 0)
            assert np.array_equal(views[0], train.train_transform(image, 16, 0, rng))
            assert labels.tolist() == [label]
        labels = train.EvalDataset(val)[16, np.arange(6), val.labels][1]
        assert labels.tolist() == [-1, 0, 1, 1, 2, 2]
        shutil.rmtree("train")
        with raises("and the next images cannot be read"):
            dataset[item]


def unreadable_images(**given):
    """Numbers of the folder's images that training and evaluation alike cannot read."""
    images, cfg = train.ImageFolder(".", "d"), config(**given)
    every = np.arange(len(images))
    *_, reasons = train.TrainDataset(images, cfg)[0, 0, 0, every, np.zeros_like(every)]
    labels = train.EvalDataset(images)[cfg.img_size, every, images.labels][1]
    assert sorted(reasons) == np.flatnonzero(labels < 0).tolist()
    return sorted(reasons)


def test_mutated_images_never_stop_a_run():
    rng, image = np.random.default_rng(0), noise_image(40, 30)
    kinds = [encoded(image, kind) for kind in ("jpeg", "png", "gif", "tiff", "webp", "bmp")]
    with working_folder():
        os.makedirs("d/only")
        for i in range(1000):
            data = bytearray(kinds[i // 3 % 6].getvalue())
            if i % 3 == 0:
                del data[rng.integers(len(data)):]
            elif i % 3 == 1:
                for _ in range(8):
                    place = rng.integers(min(len(data), 10 ** rng.integers(1, 5)))
                    data[place] ^= 1 << rng.integers(8)
            else:   # the header of another kind
                data[:64] = kinds[rng.integers(6)].getvalue()[:64]
            Path(f"d/only/{i:04d}.jpg").write_bytes(data)
        image.save("d/only/whole.png")
        assert 300 < len(unreadable_images()) < 1000


def test_images_of_every_size_and_name_are_read():
    sizes = (1, 1), (30000, 50), (4000, 1), (1, 4000), (7, 5), (2000, 2000)
    with working_folder(), patched(Image, "MAX_IMAGE_PIXELS", 1_900_000):   # twice that: no image
        os.makedirs("d/.cache/hidden")
        os.mkdir("d/a b{}%s")
        for i, size in enumerate(sizes):
            Image.new("RGB", size).save(f"d/a b{{}}%s/{i}.png")
        os.symlink("loop.jpg", "d/a b{}%s/loop.jpg")
        Path("d/a b{}%s/empty.JPEG").touch()
        os.rename("d/a b{}%s/1.png", b"d/a b{}%s/1\n\xff .JPG")
        images = train.ImageFolder(".", "d")
        assert images.classes == ["a b{}%s"]
        assert os.fsencode(images.path(1)) == b"d/a b{}%s/1\n\xff .JPG"
        assert unreadable_images(img_size=32, randaugment=9, erasing=0.25) == [5, 6, 7]
        sizes = []
        with watched(Image.Image, "resize", lambda n, image, size: sizes.append(size)):
            assert deit.center_view(Image.new("RGB", (1, 4000)), 32).size == (32, 32)
        assert sizes == [(36, 288)], "no more than 8:1, which would take gigabytes"


def test_a_validation_set_that_lacks_classes_is_counted_by_the_models_numbers():
    right, names = [], ("1", "10", "2")
    with working_folder() as folder:
        draw_images(folder)
        run("--epochs", "2", "--output", "o", data=".")
        for name in names:   # one class alone after the other
            shutil.copytree(f"val/{name}", f"alone{name}/val/{name}")
        for data in (".", *(f"alone{name}" for name in names)):
            argv = f"--data {data} --eval o/best.pt --workers 0 --device cpu".split()
            right.append(quiet(train.main, argv)[0][0]["both"])
    assert abs(sum(right[1:]) / 3 - right[0]) < 1e-6, right


def test_evaluation_counts_each_image_once_for_1_2_3_processes():
    val = train.ImageFolder(shared_images(), "val")   # 15 images
    models = {"": small(num_classes=3), "net_": deit.create_model(REGNET, num_classes=3)}
    cfg, every, totals = config(img_size=32, micro_batch=4), np.arange(15), []
    for world_size in (1, 2, 3):
        parts = []
        for rank in range(world_size):
            loader, _ = train.make_loader(train.EvalDataset(val), [], cfg)
            with patched(train, "RANK", rank), patched(train, "WORLD_SIZE", world_size):
                parts.append(train.evaluate(models, loader, every, cfg)[:2])
        totals.append({n: sum(part[k][n] for part in parts) for k in (0, 1) for n in parts[0][0]})
        close(totals[-1], totals[0], 1e-4)
    x = torch.cat([deit.to_tensor(deit.center_view(val.open(i, {}), 32)) for i in every])
    right = models[""].eval()(x).argmax(1) == torch.from_numpy(val.labels)
    assert abs(parts[0][0]["both"] * 0 + totals[0]["both"]) > 99.999   # top-5 of three classes
    loader, _ = train.make_loader(train.EvalDataset(val), [], cfg)
    top1 = train.evaluate(models, loader, every, cfg)[0]
    assert abs(top1["both"] - 100 * right.float().mean()) < 1e-3


def test_an_answer_that_is_not_finite_is_wrong():
    """NaN sorts before all numbers, so that it would count as class 0."""
    val = train.ImageFolder(shared_images(), "val")
    with working_folder():
        model = small(num_classes=3, img_size=32)
        for weight, right in ((0, 100 / 3), (math.nan, 0)):
            torch.nn.init.constant_(model.head.weight, weight)
            torch.nn.init.constant_(model.head_dist.weight, weight)
            loader, _ = train.make_loader(train.EvalDataset(val), [], config())
            scores = train.evaluate({"": model}, loader, np.arange(15), config(img_size=32))[0]
            assert abs(scores["both"] - right) < 1e-3
        torch.save({"model": constant_teacher(math.nan)}, "t.pth")
        with raises("is right on 0.0 % of 201 validation images, no better", SystemExit):
            run("--epochs", "2", "--teacher-weights", "t.pth", data=draw_images("d", 12, 67))


# ------------------------------------------------------------------------------------------------
# The training run
# ------------------------------------------------------------------------------------------------

def test_checkpoint_has_one_schema_and_serves_every_reader():
    with working_folder():
        log, said = run("--epochs", "2")
        assert "of 15: class" in said and "agreement" in said
        last, best = read("o/last.pt"), read("o/best.pt")
        keys = "model ema optimizer scaler step best log totals unreadable config classes facts"
        assert set(last) == set(best) == set(keys.split()) and best["optimizer"] is None
        assert last["step"] == 6 and last["classes"] == ["1", "10", "2"]
        assert last["best"] == max(r["both"] for r in log) and last["log"] == log
        (scores, _), _ = run("--eval", "o/best.pt")
        assert abs(scores["both"] - best["log"][-1]["both"]) < 1e-6
        assert deit.load_teacher(TI, "o/best.pt", 3).classes == ["1", "10", "2"]
        _, said = quiet(deit.main, [f"{shared_images()}/val/10/0.JPEG", "--weights", "o/best.pt"])
        assert "distillation head" in said and "both" in said and " %  '10'\n" in said
        flags = "--epochs 2 --output f --finetune o/best.pt --img-size 64".split()
        with raises("2 attention heads, not 1", SystemExit):
            run(*flags, "--num-heads", "1")
        run(*flags)


def test_the_live_line_stays_one_line_in_a_terminal_and_is_a_line_in_a_file():
    argv = ["--data", shared_images(), *BASE_FLAGS, "--epochs", "2", "--log-every", "1"]
    for is_terminal, steps in ((True, 6), (False, 4)):
        out = io.StringIO()
        out.isatty = lambda answer=is_terminal: answer
        with working_folder(), contextlib.redirect_stdout(out):
            train.main([*argv, "--output", "o"])
        said = out.getvalue()
        assert said.count("top-1 % of") == 2 and said.count("img/s  waiting") == steps, said
        assert said.count("\r") == said.count("left \r") == (steps if is_terminal else 0)
        assert ("left \r\x1b[Kepoch   1" in said) == is_terminal


def test_a_closed_terminal_pipe_or_output_does_not_end_a_run():
    argv = ["--data", shared_images(), *BASE_FLAGS, "--epochs", "2", "--output"]
    with working_folder():
        for i, out in enumerate((mock.Mock(**{"write.side_effect": BrokenPipeError}), None,
                                 types.SimpleNamespace(write=len, flush=list))):   # no isatty
            with patched(sys, "stdout", out):
                assert len(train.main([*argv, f"o{i}"])) == 2
                if out is None:
                    sys.stdout.close()


def test_workers_that_are_spawned_do_the_same():
    """As on Windows and macOS, where a worker starts empty and is sent the list of images."""
    flags = ["--epochs", "1", "--warmup-epochs", "0.5", "--workers"]
    with working_folder(), contextlib.ExitStack() as stack:
        log, _ = run(*flags, "0")
        stack.callback(multiprocessing.set_start_method, None, force=True)
        multiprocessing.set_start_method("spawn")
        with patched(sys, "platform", "darwin"):
            spawned, _ = run(*flags, "1", "--output", "spawned")
    assert untimed(spawned) == untimed(log)


def test_every_row_of_table_3_can_be_trained():
    losses = set()
    for model, mode in ((TI, "hard"), (TI, "soft"), ("deit_tiny_patch16_224", "hard"),
                        ("deit_tiny_patch16_224", "soft"), ("deit_tiny_patch16_224", "none")):
        with working_folder():
            log, _ = run("--model", model, "--distillation", mode, "--epochs", "2")
        losses.add(log[-1]["train_loss"])
        assert ("agreement" in log[-1]) == (mode != "none")
    assert len(losses) == 5


def constant_teacher(k):
    """The state dict of a teacher of three classes that always says class k; NaN: nothing."""
    state = deit.create_model(REGNET, num_classes=3).state_dict()
    weight, bias = list(state)[-2:]
    state[weight].zero_()
    state[bias].copy_(torch.full((3,), k) if k != k else F.one_hot(torch.tensor(k), 3))
    return state


def test_a_teacher_of_other_classes_or_in_another_order_is_found_out():
    flags = ["--epochs", "2", "--teacher-weights", "t.pth"]
    with working_folder():
        torch.save(constant_teacher(1), "t.pth")
        _, said = run(*flags)   # on 15 images it may be chance
        assert f"warning        {REGNET}, weights t.pth, is right on 33.3 % of 15" in said
        torch.save({"model": constant_teacher(1), "classes": ["a", "b", "c"]}, "t.pth")
        with raises("trained on other classes", SystemExit):
            run(*flags, "--output", "p")


def test_on_cuda_a_torchvision_teacher_runs_in_float16_unless_amp_is_off():
    cuda, bf16 = torch.device("cuda"), torch.bfloat16
    for flags, device, dtype in (
            ("", cuda, torch.float16), ("--amp off", cuda, None), ("", torch.device("cpu"), bf16),
            (f"--teacher {REGNET}", cuda, bf16), ("--teacher deit_tiny_patch16_224", cuda, bf16)):
        with patched(train, "choose_device", lambda name, device=device: device), \
                patched(train, "choose_precision", lambda amp, _: None if amp == "off" else bf16):
            cfg = train.make_config(train.parse(["--data", "d", *flags.split()]))
        assert cfg.teacher_dtype == dtype, flags
    seen, val = [], train.ImageFolder(shared_images(), "val")
    cfg = configured("--teacher", REGNET, "--teacher-weights", "none", "--img-size", "32")
    cfg.teacher_dtype = bf16
    loader, _ = train.make_loader(train.EvalDataset(val), [], config())
    with watched(train, "evaluate", lambda n, models, loader, some, cfg: seen.append(cfg.dtype)):
        teacher, _ = quiet(train.make_teacher, cfg, None, loader, 0)
    assert teacher(torch.zeros(1, 3, 32, 32), 0, 0).dtype == bf16 and seen == [bf16]


def test_a_loss_that_is_not_finite_stops_the_run():
    with working_folder(), raises("not finite at step 3", SystemExit):
        with patched(deit, "distillation_loss", lambda cls, *rest: cls.sum() * math.nan):
            run("--epochs", "2")


def test_fp16_steps_that_overflow_are_skipped_counted_and_not_for_ever():
    real, calls = deit.distillation_loss, itertools.count(1)
    with working_folder(), patched(deit, "distillation_loss", lambda *args: (
            real(*args) * (math.inf if next(calls) in bad_calls else 1))):
        bad_calls = (2, 5)
        log, said = run("--epochs", "2", "--amp", "fp16")
        assert [r["skipped_steps"] for r in log] == [1, 1] and "skipped_steps 1 " in said
        assert all(1 < r["train_loss"] < 1.5 for r in log), "ln 3 or so: infinity is not counted"
        bad_calls = range(10**6)
        with raises("not finite at step 21", SystemExit):
            run("--epochs", "9", "--amp", "fp16", "--log-every", "1", "--output", "b")


def test_only_what_a_user_can_mend_becomes_a_sentence():
    try:
        torch.empty(2**50)
    except RuntimeError as e:
        full = str(e)   # what the CPU's allocator says
    for message, phrase in (
            (full, "halve the micro-batch"), ("CUDA out of memory. Tried to", "halve the micro-"),
            ("DataLoader worker (pid 7) is killed by signal: Bus error. ...", "--shm-size"),
            ("DataLoader timed out after 300 seconds", "--workers, take a TMPDIR"),
            ("Caught RuntimeError ...\nunable to open shared memory: No space left", "No space"),
            ("[...] Connection closed by peer [127.0.0.1]:1234", "another process"),
            ("ncclInvalidUsage ... Duplicate GPU detected : rank 1", "the same GPU"),
            ("Expected to have finished reduction in the prior iteration ...", "freeze them")):
        assert phrase in train.error_message(RuntimeError(message)), message
    for bug in ("Caught RuntimeError in DataLoader worker process 0.\nTraceback ...\nbug",
                "mat1 and mat2 shapes", ""):
        assert train.error_message(RuntimeError(bug)) == ""   # its traceback is shown


def test_a_loader_that_does_not_answer_ends_the_run_in_a_sentence():
    def hasty(*args, timeout, **kwargs):
        waits.append(timeout)
        return real(*args, timeout=timeout and 2, **kwargs)

    real, waits = torch.utils.data.DataLoader, []
    with working_folder(), patched(torch.utils.data, "DataLoader", hasty), \
            watched(train.TrainDataset, "__getitem__", lambda *_: time.sleep(60)), \
            raises("--shm-size), lower --workers, take a TMPDIR", SystemExit):
        run("--epochs", "2", "--workers", "1")
    assert waits == [300, 300]


def test_too_little_shared_memory_is_said_before_the_start():
    usage = types.SimpleNamespace(free=4 * 2 * 12 * 32 * 32 * 3 - 1)   # one byte is lacking
    for workers, warns in (("2", True), ("1", False)):
        with working_folder(), patched(shutil, "disk_usage", lambda path: usage), \
                patched(os.path, "isdir", lambda path, real=os.path.isdir: (
                    path == "/dev/shm" or real(path))):
            _, said = run("--epochs", "1", "--warmup-epochs", "0", "--workers", workers)
        assert ("warning        loader workers may need 0 MiB in /dev/shm" in said) == warns
        assert ("raise the container's --shm-size" in said) == warns


def test_bad_flags_get_one_sentence_before_anything_is_written():
    cases = [
        ("--data /nowhere", "/nowhere/train holds no class folders"),
        ("--model deit_huge --distillation hard", "'deit_huge' is no file"),
        ("--model regnet_y_400mf --patch-size 8 --distillation hard", "patch_size is for DeiT"),
        ("--model vit_b_32 --distillation none", "is for DeiT"),
        ("--model deit_tiny_patch16_224", "add --distillation hard or soft"),
        ("--distillation none", "take a model without 'distilled'"),
        ("--teacher-weights ..", "'..' is no file"),
        ("--teacher regnet_z", "'regnet_z' is no file"),
        ("--teacher vit_b_32", "vit_b_32 does not turn images of 32 px into 3 logits"),
        ("--teacher-weights IMAGENET1K_V9", "'IMAGENET1K_V9' is no file"),
        ("--teacher regnet_y_400mf --teacher-weights DEFAULT", "classes, not 3: train a teacher"),
        ("--finetune /no/such.pt", "'/no/such.pt' is no file"),
        ("--finetune w.pth", "another architecture"),
        ("--eval /no/such.pt", "'/no/such.pt' is no file"),
        ("--eval ..", "'..' is no file"),
        ("--batch-size 100", "at most the 36 training images"),
        ("--micro-batch 5", "of 1 processes x --micro-batch 5"),
        ("--micro-batch 1000000000", "or 4 for the latter"),
        ("--img-size 30", "patch_size must divide img_size"),
        ("--num-heads 5", "'num_heads': 5}: patch"),
        ("--lr 1e-5 --min-lr 1e-5", "--min-lr 1e-05: change one"),
        ("--warmup-epochs 9 --epochs 9", "in --warmup-epochs 9.0 of 9"),
        ("--device quantum", "--device quantum cannot be used"),
        (f"--output {shared_images()}/val/new", "whose folders are classes: choose one elsewhere"),
    ]
    for flag, value in (("--epochs", "-1"), ("--alpha", "1.5"), ("--lr", "nan"), ("--tau", "0"),
                        ("--drop-path", "1"), ("--erasing", "2"), ("--workers", "-1"),
                        ("--mixup", "inf"), ("--randaugment", "11.0")):
        cases.append((f"{flag} {value}", f"{flag} is {value}"))
    if not torch.cuda.is_available():
        cases.append(("--device cuda", "--device cuda:0 cannot be used"))
    with working_folder():
        torch.save(deit.create_model(TI, depth=2, num_classes=5).state_dict(), "w.pth")
        for flags, phrase in cases:
            start = time.perf_counter()
            with raises(phrase, SystemExit):
                run(*flags.split())
            assert os.listdir() == ["w.pth"], f"{flags}: something was written"
            assert time.perf_counter() - start < 5, flags
        with raises("--data is missing", SystemExit):
            train.main(["--epochs", "6"])
        with raises("cannot be read as an image", SystemExit):
            deit.main(["w.pth", "--weights", "w.pth"])
    assert not os.path.exists(f"{shared_images()}/val/new")


def test_an_output_among_class_folders_is_refused_before_it_is_made():
    """It would be a class, for ever."""
    flags = "--val-fraction 0.3 --epochs 2 --output".split()
    with working_folder():
        draw_images(".", 12, 1)
        os.chdir("train")
        with raises("--output runs/x lies in ., whose folders are classes", SystemExit):
            run(*flags, "runs/x", data=".")
        assert sorted(os.listdir()) == ["1", "10", "2"]
        run(*flags, "../train-runs", data=".")   # its name only begins alike


def test_bad_folders_get_one_sentence():
    names = ("1", "10", "2")
    for phrase, classes, spoil in (
            ("val holds no class folders with", names, lambda: os.rename("val", "test")),
            ("val holds no class folders with (enough) images", names,
             lambda: [os.renames(f"val/{n}/0.JPEG", f"val/{n}.JPEG") for n in names]),
            ("1 classes that training does not know: ['zebra']", names,
             lambda: os.rename("val/2", "val/zebra")),
            ("train/empty/' holds no images to train on", names, lambda: os.mkdir("train/empty")),
            ("are not read, such as ['train/a/1.heic']", names,
             lambda: (os.mkdir("train/a"), Path("train/a/1.heic").touch())),
            ("holds one class only", ["only"], lambda: None)):
        with working_folder():
            draw_images(".", 2, 1, classes)
            spoil()
            with raises(phrase, SystemExit):
                run("--batch-size", "2", data=".")


def test_a_folder_that_cannot_be_listed_is_refused_with_the_reason():
    real = os.scandir
    for number, words in ((13, "Permission denied"), (5, "Input/output error"), (116, "Stale")):
        def scandir(path):
            if str(path).endswith("train/10"):
                raise OSError(number, os.strerror(number), str(path))
            return real(path)

        with working_folder(), patched(os, "scandir", scandir), raises(words, SystemExit):
            run("--epochs", "2")
        with patched(os, "scandir", scandir), raises("train/10", OSError):
            train.ImageFolder(shared_images(), "train")


def test_defaults_of_short_runs_do_not_refuse_themselves():
    for flags, warmup, min_lr in (("--epochs 2", 0.4, 1e-5), ("--lr 1e-4", 5, 2.34375e-7),
                                  ("--epochs 2 --warmup-epochs 1 --min-lr 1e-7", 1, 1e-7)):
        cfg = configured(*flags.split())
        assert np.allclose((cfg.warmup_epochs, cfg.min_lr), (warmup, min_lr)), flags
    with working_folder():
        _, said = run("--epochs", "1", "--warmup-epochs", "0", "--lr", "1e-4")
    assert "after 0 steps of warm-up, then down to 2.34e-07" in said


def test_demo_draws_what_it_says():
    with working_folder():
        train.draw_demo(".")
        rest, val = (train.ImageFolder(".", part) for part in ("train", "val"))
        assert len(val.classes) == 12 and (len(rest), len(val)) == (2400, 1200)
        assert val.open(0, {}).size == (64, 64) and min(val.counts) > 60
        assert Path(val.path(0)).read_bytes()[:2] == b"\xff\xd8", "a real JPEG"


def test_command_lines_say_what_they_should():
    _, said = quiet(deit.main, [])
    assert said.split()[:8] == list(deit.VARIANTS)
    code = "import sys, deit; print([m for m in ('torchvision', 'PIL') if m in sys.modules])"
    out = launch("-OO", "-c", code + "\nimport train; train.main(['--help'])")   # no docstrings
    assert out.returncode == 0 and out.stdout.startswith("[]\n"), out
    assert "--teacher-answers" in out.stdout


def test_waiting_threads_spin_briefly_from_before_pytorch_is_imported():
    code = """if True:
        import builtins, os
        real, seen = builtins.__import__, []
        def spy(name, *rest):
            if name == "torch" and not seen:
                seen.append(os.environ.get("GOMP_SPINCOUNT"))
            return real(name, *rest)
        builtins.__import__ = spy
        import train
        print(seen)"""
    for given, seen in ((None, "10000"), ("7", "7")):
        with patched(os, "environ", {k: v for k, v in os.environ.items() if k != "GOMP_SPINCOUNT"}):
            if given:
                os.environ["GOMP_SPINCOUNT"] = given
            assert launch("-c", code).stdout == f"['{seen}']\n"


# ------------------------------------------------------------------------------------------------
# Interruptions: whatever happens, the result is that of the undisturbed run
# ------------------------------------------------------------------------------------------------

FLAGS = ["--epochs", "3", "--micro-batch", "6", "--save-minutes", "0", "--drop-path", "0.2"]
crash = mock.Mock(side_effect=ZeroDivisionError)   # a bug, which no sentence hides


@functools.cache
def undisturbed():
    with working_folder():
        run(*FLAGS)
        return result("o")


def resumed(folder, *flags):
    """What the run said that goes on in the folder; its result is that of the undisturbed one."""
    _, said = quiet(train.main, ["--resume", "--output", folder, "--teacher", REGNET, "--device",
                                 "cpu", "--workers", "0", "--save-minutes", "0", *flags])
    close(result(folder), undisturbed(), 0)
    assert [r["epoch"] for r in result(folder)[-1]] == [1, 2, 3]
    return said


def at(call, act, *given):
    """For watched(): act(*given) before that call, the first is 1."""
    return lambda n, *args: n == call and act(*given)


def stopped(step, *flags, number=signal.SIGTERM):
    """The run, stopped by a signal in that step."""
    with watched(train, "update_ema", at(step, signal.raise_signal, number)):
        with raises(str(128 + number), SystemExit):
            run(*FLAGS, *flags)


def test_a_signal_lets_the_step_end_and_is_followed_by_a_save():
    hangup = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    interrupt = signal.signal(signal.SIGINT, signal.default_int_handler)   # ignored in a background
    for number, step in ((signal.SIGTERM, 4), (signal.SIGTERM, 6), (signal.SIGINT, 2),
                         (signal.SIGHUP, 4)):
        with working_folder():
            stopped(step, number=number)
            assert read("o/last.pt")["step"] == step, "no other step was begun"
            assert f"{step} of 9 steps done" in resumed("o")
    signal.signal(signal.SIGHUP, signal.SIG_IGN)   # as under nohup: it stays ignored
    with working_folder(), watched(train, "update_ema", at(4, signal.raise_signal, signal.SIGHUP)):
        assert len(run(*FLAGS)[0]) == 3
    signal.signal(signal.SIGHUP, hangup)
    signal.signal(signal.SIGINT, interrupt)


def test_sigterm_may_come_twice_and_a_second_ctrl_c_ends_at_once():
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with working_folder():
        for number, step, status in ((signal.SIGTERM, 4, "143"), (signal.SIGINT, 3, "130")):
            with watched(train, "update_ema", at(4, lambda: [signal.raise_signal(number)] * 2 and
                                                 signal.raise_signal(number))), \
                    raises(status, SystemExit):
                run(*FLAGS, "--output", status)
            assert read(f"{status}/last.pt")["step"] == step
            resumed(status)
    with raises("130", SystemExit), patched(train, "load_images", mock.Mock(
            side_effect=KeyboardInterrupt)):   # before they are caught: no traceback
        run()
    signal.signal(signal.SIGINT, before)


def test_a_signal_or_crash_during_validation_loses_no_step():
    decoded = []   # in the last evaluation
    for act, expected, kind in (((signal.raise_signal, signal.SIGTERM), "143", SystemExit),
                                ((crash,), "", ZeroDivisionError)):
        decoded.clear()
        with working_folder():
            with watched(train, "evaluate", lambda *args: decoded.clear()), \
                    watched(train.EvalDataset, "__getitem__", lambda n, *args: decoded.append(n)), \
                    watched(train, "evaluate", at(3, *act)), raises(expected, kind):
                run(*FLAGS, "--save-minutes", "15")   # evaluates the teacher, then after each epoch
            assert kind != SystemExit or len(decoded) == 1, "of three micro-batches"
            last = read("o/last.pt")
            assert last["step"] == 6 and len(last["log"]) == 1
            assert "6 of 9 steps done" in resumed("o")


def test_a_signal_cuts_nothing_else_short():
    """Not the teacher's trial, which would seem bad, nor --eval, whose score would be of a part."""
    flags, handlers = ["--epochs", "2", "--teacher-weights", "t.pth"], []
    with working_folder():
        draw_images("d", 12, 67)
        torch.save(constant_teacher(0), "t.pth")   # right on the first third
        with watched(train, "evaluate", lambda n, models, *args: (
                len(models) == 1 and signal.raise_signal(signal.SIGTERM))):
            with raises("33.3 % of 201 validation images, no better than chance: ", SystemExit):
                run(*flags, data="d")
            with raises("143", SystemExit):
                run(*flags)
        assert read("o/last.pt")["step"] == 1
        with watched(train, "evaluate",
                     lambda *args: handlers.append(signal.getsignal(signal.SIGTERM))):
            quiet(train.main, ["--data", "d", "--eval", "o/last.pt", "--workers", "0"])
    assert handlers == [signal.getsignal(signal.SIGTERM)]


def test_a_crash_between_or_inside_saves_loses_at_most_what_came_after_the_last():
    for minutes, steps in (("0", 4), ("15", 3)):   # a save after each step, or at an epoch's end
        with working_folder():
            with watched(train, "update_ema", at(5, crash)), raises("", ZeroDivisionError):
                run(*FLAGS, "--save-minutes", minutes)
            assert f"{steps} of 9 steps done" in resumed("o")
    for name, call in (("last.pt", 1), ("last.pt", 7), ("best.pt", 1), ("log.jsonl", 1),
                       ("log.jsonl", 13)):   # before that rename to it; 13: the very last
        renames = itertools.count(1)
        with working_folder():
            with raises("", ZeroDivisionError), watched(os, "replace", lambda n, source, target: (
                    target.endswith(name) and next(renames) == call and crash())):
                run(*FLAGS)
            assert not list(Path("o").glob("*.tmp"))
            flags = ["--data", shared_images(), *BASE_FLAGS, *FLAGS] if call == 1 else []
            resumed("o", *flags)   # the first last.pt never was: a new run


def test_a_damaged_save_is_refused_with_the_way_out():
    with working_folder():
        stopped(5)
        whole = Path("o/last.pt").read_bytes()
        middle = len(whole) // 2
        for content in (whole[:middle], bytes(len(whole)),
                        whole[:middle] + b"damage" * 20 + whole[middle + 120:]):
            Path("o/last.pt").write_bytes(content)
            with raises("give --finetune o/best.pt and another --output", SystemExit):
                run(*FLAGS, "--resume")
            assert Path("o/last.pt").read_bytes() == content
        for spoil in (lambda: shutil.copy("o/best.pt", "o/last.pt"),   # without an optimizer
                      lambda: torch.save({"model": {"w": torch.zeros(1)}, "optimizer": {1: 1},
                                          "flags": {}}, "o/last.pt"),   # a former program's
                      lambda: os.remove("o/last.pt")):
            spoil()
            with raises("give --finetune o/best.pt and another --output", SystemExit):
                run(*FLAGS, "--resume")


def test_a_run_goes_on_only_when_asked_from_a_save_of_its_own_and_to_its_end():
    with working_folder():
        with raises("--data is missing", SystemExit):
            train.main(["--resume", "--output", "o"])
        stopped(4)
        for phrase, *flags in (("add --resume",),
                               ("seed was 0, is 7", "--resume", "--seed", "7", "--lr", "6e-4")):
            with raises(phrase, SystemExit):
                run(*FLAGS, *flags)
        assert "4 of 9 steps done" in resumed("o")
        assert "9 of 9 steps done" in resumed("o")
        data = draw_images("d")
        rename = lambda: os.rename("d/train/2/0.JPEG", "d/train/2/x.JPEG")
        for spoil, phrase in ((rename, 'was "36'),
                              (lambda: os.remove("d/train/2/x.JPEG"), 'is "35 (')):
            spoil()
            with raises(phrase, SystemExit):
                run(*FLAGS, "--resume", data=data)


def test_resume_alone_keeps_the_flags_and_each_kind_of_flag_keeps_its_rule():
    with working_folder():
        stopped(4, "--lr", "6e-4")
        go_on = ["--resume", "--output", "o", "--teacher", REGNET, "--workers", "0"]
        with raises("add --teacher 'train:demo_net' if you trust it", SystemExit):
            train.main(go_on[:3])
        saved = read("o/last.pt")
        for given, phrase in (("--mixup 0.5", "mixup was 0.8, is 0.5"),
                              ("--patch-size 4", "patch_size was 8, is 4"),
                              ("--epochs 4", "epochs was 3, is 4")):
            with raises(phrase, SystemExit):
                train.main([*go_on, *given.split()])
        for flag in ("mixup", "min_lr"):   # the save is older than these flags
            del saved["facts"][flag]
        saved["facts"]["newer"] = 1   # or newer than this program
        torch.save(saved, "o/last.pt")
        with raises("mixup was 0.8, is 0.5", SystemExit):
            train.main([*go_on, "--mixup", "0.5"])
        changes = "--clip-grad 1 --amp bf16 --micro-batch 3 --min-lr 1e-6 --log-every 2"
        log, said = quiet(train.main, [*go_on, *changes.split()])
        for change in ("clip_grad from 0.0 to 1.0", "amp from 'off' to 'bf16'", "min_lr from None",
                       "micro_batch from 6 to 3"):
            assert f"changed        {change}" in said, change
        assert "log_every" not in said and [r["epoch"] for r in log] == [1, 2, 3]
        facts = read("o/last.pt")["facts"]
        assert facts["lr"] == 6e-4 and facts["data"] == shared_images() and facts["mixup"] == 0.8


def test_the_same_teacher_from_another_path_goes_on_and_another_teacher_is_refused():
    with working_folder():
        torch.save(small(depth=2, num_classes=3).state_dict(), "w.pth")
        torch.save(constant_teacher(0), "t.pth")
        torch.save(constant_teacher(1), "u.pth")
        stopped(4, "--finetune", "w.pth", "--teacher-weights", "t.pth")
        os.rename("t.pth", "v.pth")
        os.remove("w.pth")
        flags = [*FLAGS, "--resume", "--teacher-weights"]
        with raises("the teacher is another than before", SystemExit):
            run(*flags, "u.pth")
        log, said = run(*flags, "v.pth")
        assert len(log) == 3 and "teacher_weights from 't.pth' to 'v.pth'" in said


def test_best_pt_is_the_best_model_that_could_be_written():
    def evaluate(models, *args):   # the teacher's, then the three epochs'
        accuracies.append((0, 10, 90, 50)[len(accuracies)])
        return {name + head: accuracies[-1] + (name == "ema_")
                for name in models for head in train.HEADS}, {}, {}

    def full(n, path, content):
        if accuracies[-1] == 90 and path.endswith(file):
            raise OSError(28, "No space left on device")

    for file, epoch, accuracy in (("last.pt", 2, 90), ("best.pt", 3, 50)):
        accuracies = []
        with working_folder():
            with patched(train, "evaluate", evaluate), watched(train, "save", full):
                log, said = run(*FLAGS)
            best = read("o/best.pt")
        assert len(best["log"]) == epoch and best["best"] == accuracy, said
        assert [(r["both"], r["ema_both"]) for r in log] == [(10, 11), (90, 91), (50, 51)]


def test_a_full_disk_keeps_the_former_save_and_training_goes_on():
    def full(n, path, content):
        if 14 <= n <= 18:
            raise OSError(28, "No space left on device")

    with working_folder():
        with watched(train, "save", full):
            _, said = run(*FLAGS)
        assert said.count("not saved      o/") == 5 and "No space left on device" in said
        close(result("o"), undisturbed(), 0)
        with raises("its last save in p failed", SystemExit), watched(
                train, "save", lambda n, path, content: path == "p/best.pt" and full(14, path, 0)):
            run(*FLAGS, "--output", "p")   # the others were written
        assert read("p/last.pt")["step"] == 9


def test_what_the_system_says_of_a_write_that_fails_is_said():
    """torch.save would say "unexpected pos", and leave half a file."""
    import resource
    with working_folder():
        train.save("o/last.pt", {"w": torch.zeros(9)})
        before, limits = Path("o/last.pt").read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
        try:
            with raises("File too large", OSError):
                train.save("o/last.pt", {"w": torch.zeros(99_999)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert os.listdir("o") == ["last.pt"] and Path("o/last.pt").read_bytes() == before


def test_an_output_folder_that_vanishes_is_made_again():
    with working_folder():
        with watched(train, "update_ema", at(5, shutil.rmtree, "o")):
            _, said = run(*FLAGS)
        assert "not saved" not in said
        close(result("o"), undisturbed(), 0)


@contextlib.contextmanager
def in_background(*argv):
    """train.py in a process of its own, from its first save into the folder o on."""
    command = [sys.executable, f"{HERE}/train.py", *argv, "--output", "o"]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                          env=os.environ | {"TMPDIR": os.getcwd()}) as process:
        while not os.path.exists("o/last.pt"):
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        try:
            yield process
        finally:
            process.kill()   # its workers live on for a while


def test_a_run_whose_data_vanish_ends_with_a_sentence_and_its_workers():
    flags = "--data . --model deit_tiny_patch16_224 --epochs 999 --batch-size 12".split()
    with working_folder():
        draw_images(".")
        with in_background(*flags, *SMALL_FLAGS, "--workers", "1") as process:
            os.rename("train", "gone")
            said = process.communicate(timeout=25)[1]   # a worker that is left would keep it open
        assert process.returncode == 1 and "cannot be read" in said, said
        assert "Traceback" not in said and os.path.exists("o/last.pt"), "the last save stands"
        assert not list(Path().glob("pymp-*")), "nothing is left in the temporary folder"


def test_one_of_two_runs_in_a_new_folder_goes_on_and_old_temporary_files_go():
    with working_folder():
        os.mkdir("o")
        for name, age in (("last.pt.1.tmp", 90_000), ("last.pt.2.tmp", 60)):
            Path("o", name).touch()
            os.utime(f"o/{name}", (time.time() - age,) * 2)
        with watched(train, "make_model", lambda n, *args: Path("o/log.jsonl").touch()), \
                raises("another run has just started in o", SystemExit):   # after it looked
            run(*FLAGS)
        assert sorted(os.listdir("o")) == ["last.pt.2.tmp", "log.jsonl"]
        resumed("o", "--data", shared_images(), *BASE_FLAGS, *FLAGS)   # killed before a save


# ------------------------------------------------------------------------------------------------
# Several processes
# ------------------------------------------------------------------------------------------------

def torchrun(processes, *flags, code=""):
    """train.py in that many processes, or code that comes after its import."""
    program = [f"{HERE}/train.py"]
    if code:
        program = ["--no-python", sys.executable, "-c", f"import os, sys, torch, train\n{code}"]
    return launch("-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}",
                  *program, "--data", shared_images(), *BASE_FLAGS, "--output", "o", *flags)


def test_any_number_of_processes_gives_the_same_run_also_when_it_changes_on_the_way():
    flags = [*FLAGS, "--micro-batch", "4"]
    with working_folder():
        stopped(4, "--micro-batch", "4")
        whole, said = run(*flags, "--output", "one")
        assert "1 processes x 4 micro-batch x 3 accumulated" in said
        out = torchrun(3, *flags, "--resume")
        assert out.returncode == 0, out.stderr[-2000:]
        assert "4 of 9 steps done" in out.stdout
        assert "3 processes x 4 micro-batch x 1 accum" in out.stdout
        assert out.stdout.count("epoch   3") == 1, "only the first process speaks"
        close(result("o")[-1], untimed(whole))


def test_processes_that_do_not_start_alike_are_refused():
    for name, phrase in (("log_every", "log_every was 7, is 50"), ("step", "step was 7, is 0"),
                         ("teacher's weights", "than in another process")):
        def gather(facts):   # from rank 1 another value
            return [facts, facts | ({name: 7} if name in facts else {})]

        with working_folder(), patched(train, "gather", gather), raises(phrase, SystemExit):
            run("--epochs", "2")


def test_processes_end_without_an_abort():
    """A thread of gloo that frees a tensor needs Python's lock: if it has to wait until Python
    ends, as happens now and then on a busy machine and here always, that aborts the process."""
    code = """
def run(cfg, saved):
    train.join(cfg)
    torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(1, 1))
    for _ in range(9):
        train.dist.all_reduce(torch.ones(1), async_op=True)
train.train = run
sys.setswitchinterval(1000)
train.main()"""
    with working_folder():
        out = torchrun(2, code=code)
    assert out.returncode == 0, out.stderr[:500]


def test_an_error_of_one_process_ends_all_at_once_in_a_sentence_if_it_is_the_users():
    for error, phrase, has_traceback in (
            ('train.InputError("no luck")', "train.py: process 1: no luck", False),
            ('RuntimeError("a bug")', "RuntimeError: a bug", True)):
        code = f"""
calls, real = [], train.deit.distillation_loss
def loss(*args):
    calls.append(1)
    if len(calls) == 3 and os.environ["RANK"] == "1":
        raise {error}
    return real(*args)
train.deit.distillation_loss = loss
train.main()"""
        start = time.perf_counter()
        with working_folder():
            out = torchrun(2, *FLAGS, "--workers", "2", code=code)   # waits for workers left behind
        assert out.returncode and phrase in out.stderr, out.stderr
        assert ('File "<string>", line' in out.stderr) == has_traceback, out.stderr
        assert time.perf_counter() - start < 35, "20 s may pass until torch is imported"


def test_between_log_lines_the_loop_asks_nothing_back_from_the_device():
    """On PyTorch's meta device tensors have no values: whatever asks for one raises, and here only
    the line that logs may. Copies to the device must not block, nor may an operation mix tensors of
    two devices. So the host never waits for a GPU: what can be said of it without one."""
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    steps, wrong = [], []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result, copies = func(*args, **kwargs or {}), "copy" in func._schema.name
            given = [t for t in tree_leaves((args, kwargs)) if torch.is_tensor(t)]
            mixed = any(t.is_meta for t in given) and any(t.ndim and not t.is_meta for t in given)
            if copies and not given[0].is_meta and result.is_meta:
                mixed = not (kwargs or {}).get("non_blocking")
            if mixed:
                wrong.append(f"{func} at step {len(steps)}")
            return result

    def begin_step(n, step, *rest):   # the first thing in a step is its learning rate
        if not steps:
            stack.enter_context(Watch())
        steps.append(step)

    for flags in ([], ["--distillation", "soft", "--clip-grad", "1", "--micro-batch", "6"]):
        steps.clear()
        with working_folder(), contextlib.ExitStack() as stack:
            stack.enter_context(watched(train, "lr_at", begin_step))
            for owner, name, value in (
                    (train, "evaluate", lambda *args: ({"cls": 99.0}, {}, {})),
                    (train, "save_state", lambda *args: 0),
                    (deit, "read_checkpoint", lambda path: None),
                    (train, "autocast", lambda cfg: contextlib.nullcontext()),
                    (torch, "is_autocast_enabled", lambda device: False)):   # meta has none
                stack.enter_context(patched(owner, name, value))
            lines = ["nothing was raised"]
            try:
                run("--epochs", "2", "--device", "meta", "--log-every", "99", *flags)
            except (NotImplementedError, RuntimeError) as e:   # a meta tensor has no values
                lines = [f.name for f in traceback.extract_tb(e.__traceback__)
                         if f.filename == train.__file__]
        assert set(steps) == {0, 1, 2} and "print_step" in lines, (steps, lines)
        assert not wrong, wrong


def test_a_save_is_loaded_onto_the_device():
    """A save may hold tensors of another device. Only copies may take them together with ours."""
    from torch.utils._python_dispatch import TorchDispatchMode
    mixed = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            devices = {t.device for t in args if torch.is_tensor(t) and t.ndim}
            if len(devices) > 1 and "copy" not in func._schema.name:
                mixed.append(str(func))
            return func(*args, **kwargs or {})

    with working_folder():
        run("--epochs", "2")
        saved = read("o/last.pt")
    cfg = configured(*SMALL_FLAGS, "--model", TI, "--epochs", "2", "--device", "meta")
    state = train.State(train.make_model(cfg, saved), cfg)
    with Watch(), warnings.catch_warnings():
        warnings.simplefilter("ignore")   # that copies to the meta device do nothing
        state.load_state_dict(saved)
    assert not mixed and state.totals.is_meta and state.step == saved["step"]


# ------------------------------------------------------------------------------------------------
# Any teacher
# ------------------------------------------------------------------------------------------------

def timms_name(key):
    """timm's name of a parameter of torchvision's RegNet, worked out the other way round."""
    for pattern, name in (
            (r"^stem\.0\.", "stem.conv."), (r"^stem\.1\.", "stem.bn."), (r"^fc\.", "head.fc."),
            (r"^trunk_output\.block(\d)\.block\d-(\d+)\.", lambda m: f"s{m[1]}.b{int(m[2]) + 1}."),
            (r"\.f\.([abc])\.", lambda m: f".conv{'abc'.index(m[1]) + 1}."), (r"\.f\.se\.", ".se."),
            (r"\.proj\.", ".downsample."), (r"\.(conv\d|downsample)\.0\.", r".\1.conv."),
            (r"\.(conv\d|downsample)\.1\.", r".\1.bn.")):
        key = re.sub(pattern, name, key)
    return key


def test_a_regnet_under_timms_names_loads_strictly_with_the_same_logits():
    import torchvision
    model = trained_looking(torchvision.models.regnet_y_400mf(num_classes=5))
    named = {timms_name(key): value for key, value in model.state_dict().items()}
    assert {"stem.conv.weight", "s1.b1.conv1.bn.running_var", "s4.b6.se.fc2.bias", "head.fc.bias",
            "s2.b1.downsample.conv.weight", "s3.b1.conv3.conv.weight"} <= named.keys()
    x = torch.randn(2, 3, 64, 64)
    with working_folder():
        torch.save(named, "t.pth")
        close(deit.load_teacher("regnet_y_400mf", "t.pth", 5)(x), model(x), 1e-4)
        with raises("another architecture"):
            deit.load_teacher("regnet_y_800mf", "t.pth", 5)


def test_names_that_a_model_has_are_not_translated():
    names = [name for name in ("vgg11", "densenet121", "swin_t", "vit_b_16", "mnasnet0_5")]
    for model in [small(), *(deit.create_model(name, num_classes=3) for name in names)]:
        state = {key: x + 1 for key, x in model.state_dict().items()}
        state = type(model.state_dict())(state)
        state._metadata = model.state_dict()._metadata
        deit.load_weights(model, state)
        close(dict(model.state_dict()), dict(state), 0)


MINE = """
import types, torch
calls = []
class Net(torch.nn.Module):
    def __init__(self, num_classes, logits=True):
        super().__init__()
        torch.manual_seed(4)
        self.config = "mine"                      # as transformers' models have
        self.conv = torch.nn.Conv2d(3, 8, 3)
        self.norm = torch.nn.BatchNorm2d(8)
        self.fc = torch.nn.Linear(8, num_classes)
        self.logits = logits
    def forward(self, x):
        calls.append((self.training, x.dtype, torch.is_grad_enabled()))
        y = self.fc(self.norm(self.conv(x)).amax((2, 3)) * 9)
        y = y - y.detach().mean(0) if len(x) > 1 else y
        return types.SimpleNamespace(logits=y) if self.logits else y
net = Net
plain = lambda num_classes: Net(num_classes, logits=False)
wrong = lambda num_classes: Net(num_classes + 1)
nothing = lambda num_classes: None
class Views(Net):                                 # fails in a CPU's layout, channels-last
    def forward(self, x):
        return self.fc(self.conv(x).view(len(x), -1)[:, :8])
two = lambda num_classes: torch.nn.MaxPool2d(2, return_indices=True)   # a tuple
class Extra(Net):                                 # a state that cannot be loaded safely
    def get_extra_state(self):
        return {"step": 1}
    def set_extra_state(self, state):
        pass
def timms(num_classes):                           # names as in timm's RegNets, in a wrapper
    net, layer = plain(num_classes), torch.nn.Conv2d(1, 1, 1)
    for name in ("conv", "conv1", "b1", "s1", "module"):
        outer = net if name == "module" else torch.nn.Module()
        outer.add_module(name, layer)
        layer = outer
    return net
"""


@contextlib.contextmanager
def own_module():
    """A working folder with mine.py in it."""
    with working_folder(), patched(sys, "path", sys.path[:]), contextlib.ExitStack() as stack:
        stack.callback(sys.modules.pop, "mine", None)
        Path("mine.py").write_text(MINE)
        yield


def test_any_module_can_teach_and_nothing_is_written_onto_it():
    with own_module():
        teacher = deit.load_teacher("mine:net", num_classes=3, img_size=32)
        import mine
        own, x = mine.net(3).eval(), torch.randn(2, 3, 32, 32)
        with torch.autocast("cpu", torch.bfloat16):
            close(teacher(x), own(x).logits, 0)
        assert mine.calls[0][:2] == (False, torch.float32) and not teacher(x).requires_grad
        inner = teacher.module
        assert inner.config == "mine" and not hasattr(inner, "classes")
        assert sum(isinstance(m, torch.nn.BatchNorm2d) for m in teacher.modules()) == 1
        flags = ["--epochs", "2", "--teacher-weights", "DEFAULT", "--teacher"]
        log, _ = run(*flags, "mine:net")
        assert "agreement" in log[-1]
        for phrase, name in (("logits each (ValueError: it gives (1, 4))", "mine:wrong"),
                             ("gives no module for a class count", "mine:nothing"),
                             ("logits each", "mine:two"),
                             ("Use .reshape(...) instead", "mine:Views"),
                             ("no attribute", "mine:missing"), ("arguments", "os:getcwd"),
                             ("No module named", "no_such:net")):
            with raises(phrase, SystemExit):
                run(*flags, name, "--output", "p")


def test_any_module_can_be_trained_and_its_checkpoint_serves_every_reader():
    for name in ("mine:plain", "mine:timms"):
        argv = ["--data", shared_images(), *f"--model {name} --workers 0 --amp off".split()]
        begin = [*argv, *"--epochs 2 --batch-size 12 --img-size 32 --output o".split()]
        with own_module():
            quiet(train.main, begin)
            best = read("o/best.pt")
            assert best["config"] == {"name": name, "num_classes": 3, "img_size": 32}
            import mine
            keys = getattr(mine, name[5:])(3).state_dict().keys()
            assert best["model"].keys() == keys == deit.read_checkpoint("o/last.pt")["model"].keys()
            scores, _ = quiet(train.main, [*argv, "--eval", "o/best.pt", "--micro-batch", "12"])
            assert abs(scores[0]["cls"] - best["best"]) < 1e-6
            model, x = deit.load_model("o/best.pt", model=name), torch.randn(2, 3, 32, 32)
            assert model.classes == ["1", "10", "2"]
            close(deit.load_teacher(name, "o/best.pt", 3)(x), model(x), 0)


def test_a_run_that_could_not_go_on_is_refused_before_its_first_step():
    argv = f"--data {shared_images()} --model mine:Extra --workers 0 --amp off --epochs 2 ".split()
    with own_module(), patched(train, "train_step", lambda *args: 1 / 0), \
            raises("o/last.pt holds no weights that can be read safely", SystemExit):
        quiet(train.main, argv + "--batch-size 12 --img-size 32 --output o".split())


def test_only_a_name_that_the_user_typed_is_imported():
    with own_module():
        Path("evil.py").write_text("import os\nos.mkdir('exploded')\n")
        torch.save({"model": {"w": torch.ones(1)}, "classes": ["a", "b", "c"], "config": {
            "name": "evil:net", "num_classes": 3, "img_size": 32}}, "w.pt")
        for call in (lambda: deit.load_model("w.pt"),
                     lambda: deit.main(["x.jpg", "--weights", "w.pt"]),
                     lambda: train.main(["--data", shared_images(), "--eval", "w.pt"])):
            with raises("holds 'evil:net': give that name by --model", (
                    deit.InputError, SystemExit)):
                call()
        with raises("holds 'evil:net': give that name"):
            deit.load_teacher("regnet_y_400mf", "w.pt", 3)
        with raises("another architecture"):
            quiet(deit.load_weights, deit.create_model("mine:net", num_classes=3), "w.pt")
        assert not os.path.exists("exploded")


HEADER = train.Answers.HEADER
ANSWERED = [*FLAGS, "--micro-batch", "4", "--teacher", "mine:net"]
LIVE = ["--teacher-weights", "DEFAULT"]


@functools.cache
def recorded():
    """The result of a run with a live teacher, and the file that recorded its answers."""
    with own_module():
        answer(*LIVE, output="o")
        live = result("o")
        answer(*LIVE, "--teacher-answers", "a", output="recorded")
        close(result("recorded"), live, 0)
        return live, Path("a").read_bytes()


def answer(*flags, output="p"):
    """A run with mine.py's teacher, whose weights are not typed."""
    base = [flag for flag in BASE_FLAGS if flag not in ("--teacher-weights", "none")]
    return quiet(train.main, ["--data", shared_images(), *base, *ANSWERED, "--output", output,
                              *flags])


def test_answers_recorded_and_replayed_are_the_live_run():
    live, file = recorded()
    with own_module():
        Path("a").write_bytes(file)
        views = np.fromfile("a", np.uint16, offset=HEADER)
        assert len(views) == 108 and set(views) == {1, 2, 3}
        _, said = answer("--teacher-answers", "a", output="o")
        assert "mine" not in sys.modules and "0 of 108 views are left" in said
        close(result("o"), live, 0)
        Path("a").write_bytes(file[:-2] + bytes([file[-2] % 3 + 1, 0]))   # the last view's
        answer("--teacher-answers", "a", output="changed")
        assert result("changed")[-1] != live[-1]


def test_three_processes_record_and_replay_the_answers_of_one():
    live, file = recorded()
    with own_module():
        Path("a").write_bytes(file)
        for name in ("a", "new"):
            out = torchrun(3, *ANSWERED, *LIVE, "--teacher-answers", name, "--output", f"o-{name}")
            assert out.returncode == 0, out.stderr
            assert Path(name).read_bytes()[HEADER:] == file[HEADER:]
        close(result("o-a")[-1], live[-1])


def test_answers_may_begin_in_the_middle_of_a_run_and_serve_another_student():
    live, file = recorded()
    with own_module():
        stopped(4, *ANSWERED[len(FLAGS):], *LIVE)
        _, said = answer("--resume", "--teacher-answers", "b", output="o")
        close(result("o"), live, 0)
        assert "60 of 108 views" in said
        _, said = answer("--teacher-answers", "b", "--lr", "6e-4", "--drop-path", "0")
        assert "48 of 108 views" in said
        assert Path("b").read_bytes()[HEADER:] == file[HEADER:]


def test_a_teacher_that_says_nan_stops_the_run_and_gives_no_answer():
    with own_module():
        with open("mine.py", "a") as f:
            f.write("class Nan(Net):\n    def forward(self, x):\n        y = super().forward(x)\n"
                    "        return y.logits.index_fill(0, torch.tensor(0), float('nan'))\n")
        flags = [*ANSWERED, *LIVE, "--teacher", "mine:Nan", "--teacher-answers", "a", "--output"]
        with raises("see whether the teacher says nan", SystemExit):
            run(*flags, "o")
        with patched(train, "check_finite", lambda *args: None):
            run(*flags, "p")
        answers = np.fromfile("a", np.uint16, offset=HEADER).reshape(-1, 4)
        assert (answers[:, 0] == 0).all() and (answers[:, 1:] > 0).all()


def test_answers_of_other_views_or_of_another_teacher_are_refused():
    _, file = recorded()
    with own_module():
        Path("mine.py").write_text(MINE.replace("seed(4)", "seed(5)"))
        Path("a").write_bytes(file)
        Path("headless").write_bytes(file[HEADER:])
        torch.save(deit.create_model("mine:net", num_classes=3).state_dict(), "w.pt")
        Path("my.json").write_text("{}")
        Path("one missing").write_bytes(file[:-2] + bytes(2))
        shutil.copytree(shared_images(), "resized")
        for path in Path("resized/train").rglob("*.JPEG"):   # the same names, other pixels
            Image.open(path).resize((24, 24)).save(path)
        for phrase, *flags in (("seed was 0, is 1", "a", "--seed", "1"),
                               ("mixup was 0.8, is 0.0", "a", "--mixup", "0"),
                               ("teacher was 'mine:net', is 'mine:plain'", "a", "--teacher",
                                "mine:plain"),
                               ("file sizes was", "a", "--data", "resized"),
                               ("no probabilities", "a", "--distillation", "soft"),
                               ("--teacher-answers headless cannot be used", "headless"),
                               ("or another file: it is of", "my.json"),
                               ("the teacher is another", "a", "--teacher-weights", "w.pt"),
                               ("the teacher is another", "one missing")):
            with raises(phrase, SystemExit):
                answer("--teacher-answers", *flags)
        assert Path("headless").read_bytes() == file[HEADER:], "another file stays as it is"
        assert Path("my.json").read_text() == "{}"
        stopped(4, *ANSWERED[len(FLAGS):], *LIVE)   # by the live teacher of seed 5
        with raises("the teacher is another than before", SystemExit):
            answer("--teacher-answers", "a", "--resume", output="o")


# ------------------------------------------------------------------------------------------------
# What people run into
# ------------------------------------------------------------------------------------------------

def test_the_list_of_images_is_torchvisions_and_what_is_left_out_is_said():
    from torchvision.datasets import ImageFolder
    with working_folder():
        touch("r/a/2.jpg", "r/a/cam1/x.PNG", "r/a/cam1/night/0.webp", "r/a/cam1.b/1.jpeg",
              "r/b/1.bmp", "r/b/10.tiff", "r/b.c/9.ppm", "elsewhere/l.jpg", "r/\u732b/\u5199.pgm")
        os.symlink(os.path.abspath("elsewhere"), "r/b/link")
        theirs = ImageFolder("r")
        for ours in (train.ImageFolder(".", "r"), train.ImageFolder("r/", "train", 1e-9)):
            assert [(ours.path(i), ours.labels[i]) for i in range(len(ours))] == theirs.samples
        assert ours.classes == theirs.classes and len(ours) == 9 and ours.left_out == []
        touch("r/a/x.jfif", "r/a/y.GIF", "r/a/z.jpe", "r/a/.hidden.jpg", "r/a/.cache/h.jpg",
              "r/a/notes.txt", "r/b/video.mp4", "r/readme.md")
        os.symlink("/nowhere", "r/lost")
        os.symlink(os.path.abspath("r/a"), "r/a/cam1/up")             # its own ancestor
        os.symlink(os.path.abspath("r"), "elsewhere/round")           # by two links
        ours = train.ImageFolder(".", "r")
        assert len(ours) - 9 == 3, "three more suffixes; neither link up was entered"
        assert ours.left_out == ["r/lost", "r/readme.md", "r/a/notes.txt", "r/b/video.mp4"]
        draw_images("d", 4, 1)
        touch("d/train/1/notes.txt", "d/val/2/cam/x.png")
        _, said = run("--epochs", "1", "--warmup-epochs", "0", data="d")
        assert "left out       1 files" in said and "'d/train/1/notes.txt'" in said
        assert "12 training and 4 validation images" in said


def test_a_list_of_images_is_known_by_the_paths_below_its_root():
    with working_folder():
        draw_images("d", 20, 2)
        part = train.ImageFolder("d/train", "val", 0.3)
        names = [os.path.basename(part.path(i)) for i in range(len(part))]
        first, second = ({n for n, k in zip(names, part.labels) if k == label} for label in (0, 1))
        assert first != second, "the class counts too"
        run("--epochs", "2", data="d")
        os.rename("d", "e")
        assert str(train.ImageFolder("e/train", "val", 0.3)) == str(part)
        facts = read("o/last.pt")["facts"]
        assert facts["training images"] == str(train.ImageFolder("e", "train"))
        assert facts["validation images"] == str(train.ImageFolder("e", "val"))


def test_an_unreadable_images_name_and_reason_are_said():
    flags = ["--epochs", "1", "--warmup-epochs", "0", "--repeats", "1"]
    with working_folder():
        draw_images("d", 4, 2)
        Image.new("F", (9, 9), 0.5).save("d/val/1/2.tiff")
        os.truncate("d/train/1/0.JPEG", 900)
        log, said = run(*flags, data="d")
        assert "1 validation images, counted as wrong: 'd/val/1/2.tiff' (ValueError: " in said
        assert "1 training images, the next ones stand in: 'd/train/1/0.JPEG' (OSError: " in said
        assert log[0]["unreadable"] == 2
        with patched(Image, "MAX_IMAGE_PIXELS", 900):   # all JPEGs are intact, but above twice it
            _, said = quiet(train.main, ["--data", "d", "--eval", "o/best.pt", "--workers", "0"])
        assert "7 images, counted as wrong: 'd/val/1/0.JPEG' (DecompressionBombError" in said
        assert "exceeds limit" in said


def test_folders_named_0_to_k_are_classes_by_value():
    names, flags = [str(i) for i in range(12)], ["--epochs", "2"]
    with working_folder():
        draw_images("d", 3, 1, classes=names)
        run(*flags, data="d")
        last = read("o/last.pt")
        assert last["classes"] == names
        torch.save(last | {"facts": last["facts"] | {"classes": "12, others"}}, "o/last.pt")
        with raises("classes was '12, others', is '12, hash", SystemExit):
            run(*flags, "--resume", data="d")
        state = deit.create_model(TI, num_classes=12, img_size=32, depth=1).state_dict()
        for head in ("head", "head_dist"):   # always class 2
            state[f"{head}.weight"].zero_()
            state[f"{head}.bias"].copy_(F.one_hot(torch.tensor(2), 12))
        for name in set(names) - {"2"}:
            os.rename(f"d/val/{name}/0.JPEG", f"d/val/2/{name}.JPEG")
        for accuracy, content in ((100, state),   # without names: the folder's
                                  (0, {"model": state, "classes": sorted(names)})):
            torch.save(content, "w.pt")
            argv = ["--data", "d", "--workers", "0", "--eval", "w.pt"]
            assert quiet(train.main, argv)[0][0]["cls"] == accuracy


def test_no_name_can_end_a_run_on_any_console():
    with working_folder():
        draw_images("d", 40, 1, classes=("\u732b", "b", "c"))
        os.rename("d/train/\u732b/3.JPEG", "d/train/\u732b/\u5199\u771f.JPEG")
        os.truncate("d/train/\u732b/\u5199\u771f.JPEG", 50)
        for main, argv in (
                (train.main, ["--data", "d", *BASE_FLAGS, "--epochs", "2", "--repeats", "1",
                              "--output", "\u51fa\u529b"]),
                (deit.main, ["d/val/\u732b/0.JPEG", "--weights", "\u51fa\u529b/best.pt"])):
            console = io.TextIOWrapper(io.BytesIO(), "ascii")
            with contextlib.redirect_stdout(console):
                main(argv)
            console.flush()
            assert b"\\u732b" in console.buffer.getvalue()


def test_a_checkpoints_tensors_stay_on_the_disk_until_they_are_used():
    """So that workers, which are forked in between, do not hold a copy of them."""
    with working_folder() as folder:
        torch.save({"w": torch.arange(1000.0)}, "w.pt")
        w = deit.read_checkpoint("w.pt")["model"]["w"]
        if sys.platform == "linux":
            mapped = Path("/proc/self/maps").read_text()
            assert os.path.join(os.path.realpath(folder), "w.pt") in mapped
        assert w.sum() == 499500


def test_every_launcher_gets_a_run_or_a_sentence():
    with working_folder(), patched(os, "environ", os.environ | {"RANK": "", "LOCAL_RANK": ""}):
        run("--epochs", "1", "--warmup-epochs", "0")
    for count, local_rank, index in ((1, 3, 0), (4, 3, 3)):   # one: its own
        with patched(train, "LOCAL_RANK", local_rank), patched(torch, "empty", mock.Mock()), \
                patched(torch.cuda, "is_available", lambda: True), \
                patched(torch.cuda, "set_device", mock.Mock()), \
                patched(torch.cuda, "device_count", lambda: count):
            assert train.choose_device(None).index == index
    with working_folder(), patched(train, "LAUNCHED", True), \
            raises("start several processes with torchrun, or unset RANK", SystemExit):
        run("--epochs", "2")


def test_a_missing_compiler_is_said():
    error = type("Error", (RuntimeError,), {"__module__": "torch._inductor.exc"})
    broken = mock.Mock(side_effect=error("no C++ compiler\nand ninety lines more"))
    with working_folder(), patched(torch, "compile", lambda f: broken), \
            patched(train, "checked", lambda model, *args: model), \
            raises("--compile does not work here (", SystemExit):
        run("--compile", "--epochs", "2")


def test_the_readmes_example_runs_as_printed():
    readme = Path(HERE, "README.md").read_text(encoding="utf-8")
    names = {}
    exec(readme.split("```python\n")[1].split("```")[0], names)
    assert names["logits"].shape == (4, 10) and names["loss"].isfinite()


def test_the_files_stay_small():
    """Tokens without comments and docstrings, which no formatter hides: whoever adds, removes."""
    start, end = (getattr(token, f"FSTRING_{x}", -1) for x in ("START", "END"))
    kinds = token.OP, token.NAME, token.NUMBER, token.STRING, start
    for name, most, most_lines in (("deit.py", 5000, 680), ("train.py", math.inf, math.inf)):
        source = Path(HERE, name).read_text(encoding="utf-8")
        docs = {d.body[0].lineno for d in ast.walk(ast.parse(source))
                if isinstance(d, (ast.Module, ast.ClassDef, ast.FunctionDef))
                and ast.get_docstring(d) is not None}
        count, inside, code = 0, 0, set()
        for t in tokenize.generate_tokens(io.StringIO(source).readline):
            docstring = t.type == token.STRING and t.start[0] in docs
            if t.type in kinds and not inside and not docstring:
                count += 1   # an f-string is one, on every version of Python
                code |= {*range(t.start[0], t.end[0] + 1)}
            inside += (t.type == start) - (t.type == end)
        lines = source.splitlines()
        assert count <= most and len(lines) <= most_lines, (name, count, len(lines))
        assert count / len(code) <= 11.5 and max(map(len, lines)) <= 100, name


def main(parts):
    tests = [(n, f) for n, f in list(globals().items()) if n.startswith("test_") and callable(f)]
    chosen = [(n, f) for n, f in tests if not parts or any(p in n for p in parts)]
    torch.set_num_threads(1)   # for tensors this small more would mostly wait for one another
    failed = 0
    for name, function in chosen:
        start = time.perf_counter()
        try:
            torch.manual_seed(0)
            function()
        except (Exception, SystemExit):
            failed += 1
            traceback.print_exc()
            print(f"FAILED  {name}", flush=True)
        else:
            seconds = time.perf_counter() - start
            print(f"ok {seconds:5.1f} s  {name[5:].replace('_', ' ')}", flush=True)
    print(f"{len(chosen) - failed} passed, {failed} failed")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
