# SPDX-License-Identifier: MIT
"""Trains DeiT (deit.py) with the paper's recipe, on one CPU, one GPU or many machines.

  python train.py                                           the demo: some minutes, no data needed
  python train.py --data DIR --model regnet_y_400mf         a teacher for your own classes
  python train.py --data DIR --teacher regnet_y_400mf --teacher-weights runs/regnet_y_400mf/best.pt
  torchrun --nproc_per_node=8 train.py --data /imagenet     DeiT-S from regnet_y_16gf, the recipe
  python train.py --resume --output runs/NAME               goes on where it was stopped
  python train.py --data DIR --eval runs/NAME/best.pt       validation accuracy by each head

DIR holds train/<class>/<image> and val/<class>/<image>. The file goes as a run does: flags,
schedule, augmentation, data, processes, training step, evaluation, teacher, saving, then `train`,
which holds the set-up and the loop and can be read first.

Random draws are keyed, not stored: the order of an epoch by (seed, epoch), a view by (seed, epoch,
image, view), the draws on the device by (seed, step, k), where k is the micro-batch's number in the
batch. So, for a given --micro-batch, neither processes, workers nor an interruption change a DeiT's
run by more than rounding. (A convnet's batch statistics depend on the number of processes.)

Letters as in deit.py, and m: views of a micro-batch.
"""
import argparse
import contextlib
import copy
import functools
import hashlib
import itertools
import json
import math
import multiprocessing.util
import os
import pathlib
import random
import re
import secrets
import shutil
import signal
import sys
import time
import types

# Threads of GNU OpenMP, which PyTorch's wheels bring, spin at each barrier and keep other programs
# from the core: beside two busy ones a step took a hundred times longer. It is read at the import.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps

import deit
from deit import InputError, reason


# ------------------------------------------------------------------------------------------------
# Flags: the defaults are the paper's recipe (its table 9)
# ------------------------------------------------------------------------------------------------
FLAGS = (   # name; its default, or its type if it has none, or its choices, the default first;
            # meaning (checked range) [default, if it is computed]
    ("data", str, "folder of train/<class>/* and val/<class>/*"),
    ("val_fraction", 0.0, "share to validate on, if DATA holds class folders only (0..0.99)"),
    ("model", "deit_small_distilled_patch16_224", "DeiT, torchvision classifier, module:function"),
    ("img_size", int, "side in pixels (1..) [the model's: 224 or 384]"),
    ("patch_size", int, "side in pixels (1..) [16]"),
    ("embed_dim", int, "width (1..) [the model's]"),
    ("depth", int, "blocks (1..) [12]"),
    ("num_heads", int, "attention heads (1..) [the model's]"),
    ("drop_path", float, "rate at the last block, rising from 0 at the first (0..0.99) [0.1]"),
    ("finetune", str, "initial weights: a file, URL or published name [random]"),
    ("pretrained", False, "short for --finetune with the model's own name"),

    ("distillation", ("auto", *deit.ALPHA, "none"), "learn the teacher's prediction (hard), its "
     "probabilities (soft), nothing; auto: hard for a distilled model"),
    ("teacher", "regnet_y_16gf", "torchvision classifier, DeiT, module:function; gets images "
     "normalised by ImageNet's mean and deviation"),
    ("teacher_weights", "DEFAULT", "file or URL; DEFAULT: the released ones, or a function's own; "
     "none: random ones"),
    ("teacher_answers", str, "file of the teacher's predictions, asked only what it lacks [off]"),
    ("alpha", float, "weight of the distillation loss (0..1) [0.5 hard, 0.1 soft]"),
    ("tau", 3.0, "temperature of soft distillation (1e-9..)"),

    ("epochs", 300, "each of as many views as there are training images (1..)"),
    ("batch_size", 1024, "views per optimizer step, over all processes (1..)"),
    ("micro_batch", int, "views mixed together, in one forward pass (1..) [128 at most]"),
    ("lr", 5e-4, "peak learning rate, per 512 views (1e-12..)"),
    ("min_lr", float, "floor of the cosine (0..) [1e-5, or a tenth of a peak below that]"),
    ("warmup_epochs", float, "of linear warm-up from 1e-6 (0..) [5, or a fifth of a short run]"),
    ("weight_decay", 0.05, "of AdamW (0..)"),
    ("smoothing", 0.1, "share of the true label that is spread over all classes (0..1)"),
    ("clip_grad", 0.0, "largest gradient norm, 0: off (0..)"),
    ("ema_decay", 0.99996, "of averaged weights, kept in last.pt, 0: off (0..1)"),

    ("repeats", 3, "views of an image in an epoch's batches (1..)"),
    ("randaugment", 9.0, "magnitude, 0: off (0..10)"),
    ("mixup", 0.8, "alpha, 0: off (0..)"),
    ("cutmix", 1.0, "alpha, 0: off (0..)"),
    ("erasing", 0.25, "probability (0..1)"),

    ("output", str, "folder for last.pt, best.pt, log.jsonl [runs/MODEL]"),
    ("resume", False, "go on from OUTPUT/last.pt; flags that are not given are as they were"),
    ("save_minutes", 15.0, "minutes between saves inside an epoch (0..)"),
    ("eval", str, "only evaluate a file, URL or published name [off]"),
    ("amp", ("auto", "bf16", "fp16", "off"), "mixed precision; auto: bf16 if the hardware has it"),
    ("compile", False, "torch.compile the model and the teacher"),
    ("workers", int, "loaders a process, as many again to validate (0..) [its cores, at most 16]"),
    ("seed", 0, "of everything drawn (0..)"),
    ("device", str, "cuda, mps or cpu [the best there is]"),
    ("log_every", 50, "steps between live lines (1..)"),
)
DEFAULTS = {name: None if isinstance(value, type) else value[0] if isinstance(value, tuple)
            else value for name, value, _ in FLAGS}
# VIEW_FLAGS change a view's pixels: --teacher-answers hold for the same ones only. MAY_CHANGE may
# differ on --resume, which is printed. NOT_SAVED are no part of a run.
VIEW_FLAGS = ("seed", "img_size", "batch_size", "micro_batch", "repeats", "randaugment", "mixup",
              "cutmix", "erasing")
MAY_CHANGE = ("data", "lr", "min_lr", "clip_grad", "amp", "micro_batch", "teacher",
              "teacher_weights", "finetune", "pretrained")
NOT_SAVED = ("output", "resume", "save_minutes", "eval", "compile", "workers", "device",
             "log_every", "teacher_answers")


def parse(argv=None):
    """The flags that were typed, {name: value}. Raises InputError for a value out of range."""
    p = argparse.ArgumentParser(description="Trains DeiT with the paper's recipe.",
                                argument_default=argparse.SUPPRESS, allow_abbrev=False)
    for name, value, meaning in FLAGS:
        kind = value if isinstance(value, type) else type(value)
        how = {tuple: {"choices": value}, bool: {"action": "store_true"}}.get(kind, {"type": kind})
        default = "" if "[" in meaning else f" [{DEFAULTS[name]}]"
        p.add_argument("--" + name.replace("_", "-"), help=meaning + default, **how)
    typed = vars(p.parse_args(argv))
    for name, _, meaning in FLAGS:
        for low, high in re.findall(r"\(([\d.e-]+?)\.\.([\d.]*)\)", meaning):
            if name in typed and not float(low) <= typed[name] <= float(high or sys.float_info.max):
                raise InputError(f"--{name.replace('_', '-')} is {typed[name]}: {meaning}.")
    return typed


# ------------------------------------------------------------------------------------------------
# Schedule, parameter groups, averaged weights
# ------------------------------------------------------------------------------------------------
def lr_at(step, peak_lr, min_lr, warmup_steps, total_steps):
    """Learning rate of a step: linear from 1e-6 to `peak_lr`, then a cosine to `min_lr`. As
    released, the cosine runs over all steps, not over those after the warm-up."""
    if step < warmup_steps:
        return 1e-6 + (peak_lr - 1e-6) * step / warmup_steps
    return min_lr + (peak_lr - min_lr) * (1 + math.cos(math.pi * step / total_steps)) / 2


def parameter_groups(model, weight_decay):
    """AdamW's two groups. As released: biases, norms, pos_embed and cls_token do not decay, but
    dist_token does (the list of exemptions of the time did not name it)."""
    groups = [], []   # decayed, exempt
    for name, p in getattr(model, "module", model).named_parameters():   # module: of a Classifier
        groups[p.ndim <= 1 or name in ("pos_embed", "cls_token")].append(p)
    return [{"params": group, "weight_decay": decay}
            for group, decay in zip(groups, (weight_decay, 0.0))]


@torch.no_grad()
def update_ema(ema, model, step, decay):
    """ema = d ema + (1 - d) model; buffers (batch statistics) are copied. d rises from 0.1 to
    `decay`, so that even a short run forgets its random start."""
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)
    for ours, theirs in zip(ema.buffers(), model.buffers()):
        ours.copy_(theirs)


# ------------------------------------------------------------------------------------------------
# Augmentation of one view, in a loader worker, on Pillow images (paper, table 9; timm's details).
# A new one has a function, a call in train_transform with its flag, which TrainDataset passes, a
# row in FLAGS and a place in VIEW_FLAGS.
# ------------------------------------------------------------------------------------------------
FILL = (124, 116, 104)   # ImageNet's mean colour, for what moves in from outside
BICUBIC = Image.Resampling.BICUBIC


def rng_for(*key):
    """A random generator of its own for a key of plain numbers and texts (NumPy's have another
    repr): the same key draws the same anywhere, any time."""
    return random.Random(repr(key))


def random_box(width, height, scale, ratio, rng, margin=0):
    """A random box (left, top, right, bottom) in pixels: its area between the two shares `scale`,
    its sides' ratio log-uniform from `ratio` to 1 / `ratio`, each side smaller than the image's by
    the margin. None if ten tries do not fit."""
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(math.log(ratio), math.log(1 / ratio)))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width - margin and 0 < h <= height - margin:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h


def crop_box(width, height, rng):
    """RandomResizedCrop's box (left, top, right, bottom): 8 % to 100 % of the area, ratio 3/4 to
    4/3; where none fits, the largest central box of an allowed ratio."""
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    central = left, top, left + w, top + h
    return random_box(width, height, (0.08, 1), 3 / 4, rng) or central


def affine(image, x=0, y=0, shear_x=0, shear_y=0):
    """Moves the image by (-x, -y) pixels and shears it."""
    matrix = (1, shear_x, x, shear_y, 1, y)
    return image.transform(image.size, Image.Transform.AFFINE, matrix, BICUBIC, fillcolor=FILL)


def enhance(kind):
    """The operation of one of ImageEnhance's classes: factor 0.1 to 1.9."""
    return lambda image, v: getattr(ImageEnhance, kind)(image).enhance(1 + 0.9 * v)


def solarize_add(image, v):
    add = int(110 * abs(v))
    return image.point([min(255, i + add) if i < 128 else i for i in range(256)] * 3)


RANDAUGMENT = {   # the 15 operations, at a strength v in -1..1, whose sign may mean nothing
    "AutoContrast": lambda im, v: ImageOps.autocontrast(im),
    "Equalize": lambda im, v: ImageOps.equalize(im),
    "Invert": lambda im, v: ImageOps.invert(im),
    "Rotate": lambda im, v: im.rotate(30 * v, BICUBIC, fillcolor=FILL),
    # at strength 1 the official code keeps 0 bits, a black image, which Pillow 13 refuses: here 1
    "Posterize": lambda im, v: ImageOps.posterize(im, max(1, 4 - int(4 * abs(v)))),
    "Solarize": lambda im, v: ImageOps.solarize(im, 256 - int(256 * abs(v))),
    "SolarizeAdd": solarize_add,
    **{kind: enhance(kind) for kind in ("Color", "Contrast", "Brightness", "Sharpness")},
    "ShearX": lambda im, v: affine(im, shear_x=0.3 * v),
    "ShearY": lambda im, v: affine(im, shear_y=0.3 * v),
    "TranslateX": lambda im, v: affine(im, x=0.45 * v * im.width),
    "TranslateY": lambda im, v: affine(im, y=0.45 * v * im.height),
}


def rand_augment(image, magnitude, rng):
    """rand-m9-mstd0.5-inc1: two operations with replacement, each applied half the time, at a level
    from Normal(magnitude, 0.5) clipped to 0..10, with a random sign."""
    for name in rng.choices(list(RANDAUGMENT), k=2):
        if rng.random() < 0.5:
            level = min(max(rng.gauss(magnitude, 0.5), 0), 10)
            image = RANDAUGMENT[name](image, level / 10 * rng.choice((-1, 1)))
    return image


def train_transform(image, size, magnitude, rng):
    """One random view of an RGB image, (size, size): crop and resize in one pass, horizontal flip,
    RandAugment (magnitude 0: none)."""
    view = image.resize((size, size), BICUBIC, box=crop_box(*image.size, rng))
    if rng.random() < 0.5:
        view = ImageOps.mirror(view)
    return rand_augment(view, magnitude, rng) if magnitude else view


def erasing_box(size, probability, rng):
    """RandomErasing's rectangle (top, left, bottom, right), zeros for none: 2 % to 33 % of the
    area, ratio 0.3 to 3.3, no whole side. Drawn with the view, filled on the device."""
    # random_box's first axis is the height here, since timm draws it first; the view is square
    box = rng.random() < probability and random_box(size, size, (0.02, 1 / 3), 0.3, rng, margin=1)
    return box or (0, 0, 0, 0)


# ------------------------------------------------------------------------------------------------
# Augmentation of a whole micro-batch, on the device
# ------------------------------------------------------------------------------------------------
@functools.cache
def mean_and_std(device):
    """ImageNet's, for values 0..255, (1, 3, 1, 1) each, copied to the device once."""
    return [torch.tensor(v, device=device).view(1, 3, 1, 1) * 255
            for v in (deit.IMAGENET_MEAN, deit.IMAGENET_STD)]


def normalise(views, device):
    """uint8 (B, S, S, 3) -> float (B, 3, S, S) by ImageNet's mean and deviation, on the device; in
    channels-last layout, on CUDA in the plain one (see make_model)."""
    mean, std = mean_and_std(device)
    layout = torch.contiguous_format if device.type == "cuda" else torch.channels_last
    images = views.to(device, non_blocking=True).permute(0, 3, 1, 2)
    return images.float(memory_format=layout).sub_(mean).div_(std)


def erase(images, boxes):
    """Fills each image's rectangle (zeros: none) with Normal(0, 1), in place. images (B, 3, S, S);
    boxes (B, 4), on the CPU, so that the device is not asked which images have one."""
    rows = boxes.any(1).nonzero()[:, 0].tolist()                               # R numbers
    noise = torch.randn_like(images[:len(rows)])                               # (R, 3, S, S)
    for row, new in zip(rows, noise):
        top, left, bottom, right = boxes[row].tolist()
        images[row, :, top:bottom, left:right] = new[:, top:bottom, left:right]
    return images


def smooth_targets(labels, num_classes, smoothing):
    """(B,) class indices -> (B, K) probabilities, `smoothing` of each spread over all classes."""
    return F.one_hot(labels, num_classes).float() * (1 - smoothing) + smoothing / num_classes


def mixup_or_cutmix(images, targets, mixup, cutmix, rng):
    """Mixup (arXiv 1710.09412) or CutMix (1905.04899), each half the time when both are on. One
    lambda and one box per micro-batch; partner = the micro-batch in reverse order. images
    (B, 3, S, S) and targets (B, K) are mixed alike."""
    if not (mixup or cutmix):
        return images, targets
    if cutmix and (not mixup or rng.random() < 0.5):
        lam, S = rng.betavariate(cutmix, cutmix), images.shape[-1]
        half = int(S * math.sqrt(1 - lam)) // 2
        (y, Y), (x, X) = ((max(c - half, 0), min(c + half, S))
                          for c in (rng.randrange(S), rng.randrange(S)))
        images[:, :, y:Y, x:X] = images[:, :, y:Y, x:X].flip(0)
        lam = 1 - (Y - y) * (X - x) / S**2   # what the clipped box really took
    else:
        lam = rng.betavariate(mixup, mixup)
        images = images.lerp(images.flip(0), 1 - lam)
    return images, targets.lerp(targets.flip(0), 1 - lam)


# ------------------------------------------------------------------------------------------------
# Data: the list of images in one array, which view comes when, what a loader worker does
# ------------------------------------------------------------------------------------------------
SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm",
            ".tif", ".tiff")


def stable_hash(data):
    """Bytes -> a number below 2**56, the same in every process and run."""
    return int.from_bytes(hashlib.sha256(data).digest()[:7], "big")


def walk(folder, above=()):
    """Yields the path of each file in a folder, at any depth, none that is hidden. Links are
    followed, except to a folder that holds the link itself. Raises OSError for a folder that cannot
    be listed, which os.walk would pass over."""
    above = *above, os.path.realpath(folder)
    for entry in list(os.scandir(folder)):
        if entry.name[0] == ".":
            continue
        if not os.path.isdir(entry.path):   # entry.is_dir() fails on a link to itself
            yield entry.path
        elif os.path.realpath(entry.path) not in above:
            yield from walk(entry.path, above)


def split(images, part, fraction):
    """Those of a class's images (paths as bytes) that are of this part; all if fraction is 0. A
    path's hash decides, so that an image stays in its part when others are added."""
    if not fraction:
        return images
    hashes = [stable_hash(image) / 2**56 for image in images]                  # in 0..1
    cut = min(fraction, max(hashes, default=0))   # the largest is for training in any case
    return [image for image, h in zip(images, hashes) if (h < cut) == (part == "val")]


class ImageFolder:
    """The images of data/<part>/<class>/, at any depth, without hidden files, in the order of
    torchvision's ImageFolder, but classes named 0 ... K-1 by value. part: "train" or "val".

    Names are held in one array: a Python list of a million would be copied into every worker by its
    reference counts. fraction: share for validation of the images of data/<class>/, where there are
    no parts (0: there are). classes: the list that numbers them (None: this folder's own). Paths of
    what is no image are kept in left_out. Raises InputError, or OSError for an unlisted folder.
    """

    def __init__(self, data, part, fraction=0.0, classes=None):
        self.root = os.path.normpath(data if fraction else f"{data}/{part}")   # data may end in /
        self.left_out = []
        top = os.listdir(self.root) if os.path.isdir(self.root) else ()
        found = {n: [] for n in top if os.path.isdir(f"{self.root}/{n}") and n[0] != "."}
        for path in sorted(walk(self.root), key=os.path.split) if found else ():
            name, _, inner = path[len(self.root):].lstrip(os.sep).partition(os.sep)
            if inner.lower().endswith(SUFFIXES):
                found[name].append(os.fsencode(f"{name}/{inner}"))
            else:
                self.left_out.append(path)
        by_value = found.keys() == {str(i) for i in range(len(found))}   # exactly 0 ... K-1
        self.folders = sorted(found, key=int if by_value else str)
        images = [split(found[name], part, fraction) for name in self.folders]
        self.names, self.counts = np.array([*itertools.chain(*images)], bytes), [*map(len, images)]
        if not len(self):
            raise InputError(
                f"{self.root} holds no class folders with (enough) images ({' '.join(SUFFIXES)}): "
                "give a --data of train/<class>/<image> and val/<class>/<image>, or, with "
                "--val-fraction, of <class>/<image> (the README sorts ImageNet's flat val folder).")
        self.number(classes or self.folders)

    def number(self, classes):
        """Labels by a list of classes, which must hold all of this folder's."""
        numbers, self.classes = {name: i for i, name in enumerate(classes)}, list(classes)
        strange = [name for name in self.folders if name not in numbers]
        if strange:
            raise InputError(f"{self.root} has {len(strange)} classes that training does not know: "
                             f"{strange[:3]}.")
        self.labels = np.repeat([numbers[name] for name in self.folders], self.counts)   # (N,)

    def __len__(self):
        return len(self.names)

    def __str__(self):
        """What tells this list of images from others, wherever root is."""
        return f"{len(self)} (their names' hash is {stable_hash(self.names.tobytes()):x})"

    def path(self, i):
        return os.path.join(self.root, os.fsdecode(self.names[i]))

    def open(self, i, unreadable):
        """Image i as RGB; None if it cannot be read, with the reason in unreadable[i]."""
        try:
            return deit.open_image(self.path(i))
        except Exception as e:   # Pillow raises OSError, SyntaxError, ValueError and many more
            unreadable[i] = reason(e)


def train_items(num_images, cfg, step=0):
    """This process's micro-batches from a step on, without end: items for TrainDataset.

    A step's batch is batch_size views in micro-batches numbered by k; rank r of w takes k = r,
    r + w, ... (cfg.ks). An epoch holds as many views as there are images, less the last incomplete
    batch; view v is number v % repeats of image order[v // repeats] (repeated augmentation: a third
    of the images, three views each, in the same batch where it fits).
    """
    for epoch in itertools.count(step // cfg.epoch_steps):
        order = np.random.default_rng([cfg.seed, epoch]).permutation(num_images)
        begin = epoch * cfg.epoch_steps
        for step in range(max(step, begin), begin + cfg.epoch_steps):
            for k in cfg.ks:
                first = (step - begin) * cfg.batch_size + k * cfg.micro_batch
                v = first + np.arange(cfg.micro_batch)                         # (m,)
                yield epoch, step, k, order[v // cfg.repeats], v % cfg.repeats


class TrainDataset:
    """Item (epoch, step, k, indices of images (m,), numbers of views (m,)) -> uint8 views
    (m, S, S, 3), labels (m,), erasing boxes (m, 4), {index: reason} of unreadable images.

    Views of one image that follow each other come from one decoding. They are spread over the
    micro-batch by key, so that they are mixed with other images. The next readable image stands in
    for an unreadable one, with its own label. Raises InputError if a hundred in a row cannot be
    read: then it is the disk.
    """

    def __init__(self, folder, cfg):
        self.folder, self.cfg = folder, cfg

    def __getitem__(self, item):
        (epoch, step, k, indices, numbers), folder, cfg = item, self.folder, self.cfg
        m, S, unreadable, last = len(indices), cfg.img_size, {}, None
        views, labels = np.empty((m, S, S, 3), np.uint8), np.empty(m, np.int64)
        boxes = np.empty((m, 4), np.int64)
        places = rng_for(cfg.seed, "places", step, k).sample(range(m), m)
        for place, i, number in zip(places, indices.tolist(), numbers.tolist()):
            if i != last:   # else it is another view of the same image
                for j in (np.arange(i, i + 100) % len(folder)).tolist():
                    image = folder.open(j, unreadable)
                    if image:
                        break
                else:
                    raise InputError(f"{folder.path(i)!r} and the next images cannot be read "
                                     f"({unreadable[i]}).")
            last, rng = i, rng_for(cfg.seed, epoch, i, number)
            views[place] = train_transform(image, S, cfg.randaugment, rng)
            labels[place], boxes[place] = folder.labels[j], erasing_box(S, cfg.erasing, rng)
        return *map(torch.from_numpy, (views, labels, boxes)), unreadable


class EvalDataset:
    """Item (S, indices of images (m,), labels (m,)) -> uint8 central views (m, S, S, 3), labels
    (m,), -1 where an image is unreadable, which no prediction matches, {index: reason} of those."""

    def __init__(self, folder):
        self.folder = folder

    def __getitem__(self, item):
        (size, indices, labels), unreadable = item, {}
        views, labels = np.zeros((len(indices), size, size, 3), np.uint8), labels.copy()
        for place, i in enumerate(indices.tolist()):
            image = self.folder.open(i, unreadable)
            if image:
                views[place] = deit.center_view(image, size)
            else:   # never replaced: it counts as wrong
                labels[place] = -1
        return torch.from_numpy(views), torch.from_numpy(labels), unreadable


SIGNALS = signal.SIGTERM, signal.SIGINT, getattr(signal, "SIGHUP", signal.SIGINT)   # not on Windows


def ignore_signals(worker):
    """Ctrl-C and a cluster's SIGTERM reach all processes at once. Workers serve the main one, which
    finishes its step and saves, and end with it."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def make_loader(dataset, items, cfg):
    """A loader of whole micro-batches and its first iterator. Its workers run from now on, for all
    later iterators too: they are forked before the process group is joined, since forking among the
    group's threads can hang."""
    multiprocessing.util.get_temp_dir()   # for the workers too: a killed one would leave its own
    loader = torch.utils.data.DataLoader(
        dataset, sampler=items, batch_size=None, num_workers=cfg.workers,
        persistent_workers=cfg.workers > 0, pin_memory=cfg.device.type == "cuda",
        timeout=300 * (cfg.workers > 0),   # s: a worker that lacks memory to answer hangs for ever
        worker_init_fn=ignore_signals, multiprocessing_context="fork" if cfg.workers and (
            sys.platform == "linux") else None)
    return loader, iter(loader)


# ------------------------------------------------------------------------------------------------
# Processes: where this one runs, and all that they tell one another
# ------------------------------------------------------------------------------------------------
RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE = (
    int(os.environ.get(name) or default) for name, default in (
        ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
LAUNCHED = WORLD_SIZE > 1 or bool(os.environ.get("RANK"))   # by torchrun, with one process too


def choose_device(name):
    """The device of that name; None: the best there is. Processes take one GPU each: their own, if
    they see only one, else that of their local rank. Raises InputError for an unusable one."""
    cuda = torch.cuda.is_available()
    name = name or ("cuda" if cuda else "mps" if torch.mps.is_available() else "cpu")
    if name == "cuda":
        name = f"cuda:{LOCAL_RANK if torch.cuda.device_count() > 1 else 0}"
    try:
        torch.empty(1, device=name)
    except (RuntimeError, AssertionError) as e:
        raise InputError(f"--device {name} cannot be used ({reason(e)}): take another, or as many "
                         "processes as there are GPUs (--nproc_per_node).") from e
    device = torch.device(name)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")   # TF32 where float32 is left
        torch.backends.cudnn.benchmark = True
        # cuDNN's attention gave NaN gradients in public reports; flash is as fast
        torch.backends.cuda.enable_cudnn_sdp(False)
    return device


def choose_precision(amp, device):
    """The type of autocast, None: float32. auto: bfloat16 where the hardware has it, else float16
    on CUDA."""
    if amp != "auto":
        return {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[amp]
    tests = "_is_avx512_bf16_supported", "_is_amx_tile_supported"   # elsewhere it is emulated
    has = device.type == "cpu" and any(getattr(torch.cpu, test, bool)() for test in tests)
    if device.type == "cuda":
        has = torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if has else torch.float16 if device.type == "cuda" else None


def autocast(cfg):
    return torch.autocast(cfg.device.type, cfg.dtype, enabled=cfg.dtype is not None)


def in_terminal():
    return getattr(sys.stdout, "isatty", bool)()   # not every replacement of it has one


def print0(text, end="\n"):
    """Prints on rank 0; in a terminal it clears what a longer line left."""
    if RANK == 0:
        with contextlib.suppress(OSError):   # a closed pipe or terminal, a full disk: go on
            print(("\x1b[K" if in_terminal() else "") + text, end=end, flush=True)


def join(cfg):
    """Under torchrun the processes become a group, otherwise nothing happens."""
    if LAUNCHED:
        dist.init_process_group("cpu:gloo,cuda:nccl" if cfg.device.type == "cuda" else "gloo")


def leave():
    """Ends the group. Then waits: gloo's threads outlive it, and one that is still busy when Python
    exits aborts a finished run."""
    if dist.is_initialized():
        dist.destroy_process_group()
        time.sleep(0.2)


def total(numbers):
    """The sum over all processes of a tensor, a number or a list, as a new tensor. It waits for
    all of them."""
    tensor = torch.as_tensor(numbers).clone()
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def gather(thing):
    """The list of all processes' things (plain values), by rank."""
    things = [thing] * WORLD_SIZE
    if dist.is_initialized():
        dist.all_gather_object(things, thing)
    return things


def first_on_node(load):
    """Runs load() on local rank 0 first, then on the others: a node downloads once."""
    if LOCAL_RANK == 0:
        result = load()
    total(0)
    return load() if LOCAL_RANK else result


def must_match(facts, before, what, may_change=()):
    """Raises InputError unless `before` has the same facts {name: value}; a flag that it lacks was
    at its default. Prints those that may change and did."""
    for name, now in facts.items():
        was = before.get(name, DEFAULTS.get(name))
        if was == now:
            continue
        if name not in may_change:
            raise InputError(f"{what}: {name} was {was!r}, is {now!r}.")
        print0(f"changed        {name} from {was!r} to {now!r}")


CAUGHT = []   # signals that came since catch_signals


def catch_signals():
    """From now on, and after the run, SIGTERM, Ctrl-C and SIGHUP (a closed terminal) are but noted:
    the loop saves and stops. One that was ignored stays so, as under nohup. SIGTERM comes twice
    under torchrun."""
    def note(number, frame):
        CAUGHT.append(number)
        if number == signal.SIGINT:
            signal.signal(number, signal.default_int_handler)   # a second Ctrl-C ends at once

    with contextlib.suppress(ValueError):   # not in the main thread: as before
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, note)


# ------------------------------------------------------------------------------------------------
# One training step, and all that it changes
# ------------------------------------------------------------------------------------------------
class State:
    """Training state: what changes in a run.

    model: the raw network (saved, evaluated); net: the same, compiled and wrapped (trained); ema:
    averaged weights; teacher(images, step, k): set by train, see make_teacher. totals: sums over
    this epoch and this process's micro-batches: loss, share of views that agree with the teacher,
    micro-batches, skipped steps. bad_in_a_row: steps, see check_finite. unreadable: {index: reason}
    of this epoch's images. data_time: seconds of this epoch spent waiting for views.
    """

    PARTS, VALUES = ("model", "ema", "optimizer", "scaler"), ("step", "best", "log", "unreadable")

    def __init__(self, model, cfg):
        self.model, self.ema = model, copy.deepcopy(model).requires_grad_(False)
        self.net = torch.compile(model) if cfg.compile else model
        if dist.is_initialized():
            self.net = torch.nn.parallel.DistributedDataParallel(
                self.net, gradient_as_bucket_view=True)
            self.net.broadcast_buffers = False   # state_dict averages them; no argument of old
        groups, device = parameter_groups(model, cfg.weight_decay), cfg.device.type
        self.optimizer = torch.optim.AdamW(groups, cfg.peak_lr, fused=device in ("cuda", "cpu"))
        self.scaler = torch.amp.GradScaler(device, enabled=cfg.dtype == torch.float16)
        self.step, self.best, self.log, self.unreadable, self.data_time = 0, -1.0, [], {}, 0.0
        dtype = torch.float32 if device == "mps" else torch.float64
        self.totals = torch.zeros(4, dtype=dtype, device=cfg.device)
        self.bad_in_a_row = torch.zeros((), device=cfg.device)

    def state_dict(self):
        """What a checkpoint holds of it. All processes call it, and it changes the state: their
        batch statistics (of convnets only) become their mean, their unreadable images the union."""
        for buffer in (*self.model.buffers(), *self.ema.buffers()):
            if buffer.is_floating_point():
                buffer.copy_(total(buffer) / WORLD_SIZE)
        for unreadable in gather(self.unreadable):
            self.unreadable |= unreadable
        return {name: getattr(self, name).state_dict() for name in self.PARTS} | {
            name: getattr(self, name) for name in self.VALUES} | {
            "totals": total(self.totals).tolist()}

    def load_state_dict(self, saved):
        for name in self.PARTS:
            if saved[name]:   # the scaler's is empty when it was not fp16 before
                getattr(self, name).load_state_dict(copy.deepcopy(saved[name]))   # off the file
        for name in self.VALUES:
            setattr(self, name, saved[name])
        if RANK == 0:
            self.totals += self.totals.new_tensor(saved["totals"])

    def means(self):
        """This epoch's mean loss, agreement with the teacher (0..1), and number of skipped steps,
        over all processes. Reads from the device."""
        loss, agree, micro_batches, skipped = total(self.totals).tolist()
        n = micro_batches or 1
        return loss / n, agree / n, round(skipped)


def train_step(state, batches, cfg):
    """One optimizer step over this process's micro-batches: `batches` yields them. Nothing is read
    back from the device: the host runs ahead, so the device is never idle."""
    device, net, optimizer, scaler, sick = cfg.device, state.net, state.optimizer, state.scaler, 0
    for group in optimizer.param_groups:
        group["lr"] = lr_at(state.step, cfg.peak_lr, cfg.min_lr, cfg.warmup_steps, cfg.total_steps)
    for k in cfg.ks:
        start = time.perf_counter()
        views, labels, boxes, unreadable = next(batches)
        state.data_time += time.perf_counter() - start
        state.unreadable |= unreadable
        rng = rng_for(cfg.seed, "device", state.step, k)
        torch.manual_seed(rng.getrandbits(63))   # for erasing's noise and drop path
        images = erase(normalise(views, device), boxes)                        # (m, 3, S, S)
        labels = labels.to(device, non_blocking=True)
        targets = smooth_targets(labels, cfg.num_classes, cfg.smoothing)       # (m, K)
        images, targets = mixup_or_cutmix(images, targets, cfg.mixup, cfg.cutmix, rng)
        # the teacher sees exactly the student's pixels
        answer = state.teacher(images, state.step, k)      # logits (m, K) or classes (m,)
        if dist.is_initialized():   # gradients are averaged over the processes once per step
            net.require_backward_grad_sync = k == cfg.ks[-1]
        with autocast(cfg):
            output = net(images)                   # logits (m, K), or a tuple: those of each head
        cls_logits, dist_logits = output if isinstance(output, tuple) else (output, output)
        loss = deit.distillation_loss(cls_logits, dist_logits, targets, answer, cfg.distillation,
                                      cfg.alpha, cfg.tau)
        scaler.scale(loss / cfg.grad_accum_steps).backward()
        classes = answer if answer.ndim == 1 else answer.argmax(1)
        agree = (dist_logits.argmax(1) == classes).float().mean()
        new = torch.stack([loss.detach(), agree, torch.ones_like(agree)])
        state.totals[:3] += torch.where(loss.isfinite(), new, 0)   # else check_finite stops the run
        sick = sick + 0 * loss.detach()                                        # 0, or nan
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(state.model.parameters(), cfg.clip_grad or math.inf)
    state.bad_in_a_row = torch.where((norm + sick).isfinite(), 0, state.bad_in_a_row + 1)
    state.totals[3] += (state.bad_in_a_row > 0) / WORLD_SIZE
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad()
    update_ema(state.ema, state.model, state.step, cfg.ema_decay)
    state.step += 1


def check_finite(state, cfg):
    """Raises InputError if the last gradients were not finite; fp16's scaler skips such steps, but
    more than 20 in a row are too many. Reads from the device."""
    if state.bad_in_a_row > 20 * state.scaler.is_enabled():
        raise InputError(f"loss or gradients are not finite at step {state.step}: try --amp off, "
                         f"--clip-grad 1 or a --lr below {cfg.lr}, or see whether the teacher says "
                         f"nan; the last good save in {cfg.output} is kept.")


# ------------------------------------------------------------------------------------------------
# Evaluation: every image once, whatever the number of processes
# ------------------------------------------------------------------------------------------------
HEADS = {"cls": "class head", "dist": "distillation head", "both": "both"}


@torch.no_grad()
def evaluate(models, loader, indices, cfg, caught=()):
    """Accuracy of several models, which stay in evaluation mode, by one decoding. models: {prefix:
    network}; indices: of images in the loader's folder. Returns top-1 and top-5 in percent, each a
    dict of prefix + "cls", "dist", "both", and {index: reason} of unreadable images. These count as
    wrong, and so do logits that are not finite. If something is in `caught` (signals) it ends, and
    the result is of no use."""
    all_labels, mine, m = loader.dataset.folder.labels, indices[RANK::WORLD_SIZE], cfg.micro_batch
    parts = [mine[i:i + m] for i in range(0, len(mine), m)]
    # The loader's sampler is this list: the next loop over the loader hands these items out.
    loader.sampler[:] = [(cfg.img_size, part, all_labels[part]) for part in parts]
    for model in models.values():
        model.eval()
    right, unreadable = torch.zeros(len(models), 3, 2, device=cfg.device), {}   # top-1, top-5
    for views, labels, reasons in loader:
        if caught:
            break
        unreadable |= reasons
        views, labels = normalise(views, cfg.device), labels.to(cfg.device, non_blocking=True)
        for row, model in zip(right, models.values()):
            with autocast(cfg):
                heads = torch.stack([x.float() for x in model.heads(views)])   # (2, B, K)
            heads = torch.cat([heads, heads.mean(0, keepdim=True)])            # (3, B, K)
            hits = heads.topk(min(5, heads.shape[2])).indices == labels[:, None]
            hits &= heads.isfinite().all(2, keepdim=True)                      # (3, B, 5)
            row += torch.stack([hits[..., 0].sum(1), hits.sum((1, 2))], dim=1)
    for reasons in gather(unreadable):
        unreadable |= reasons
    names = [prefix + head for prefix in models for head in HEADS]
    right = 100 * total(right).flatten(0, 1).T.cpu().double() / len(indices)   # (2, names)
    return *(dict(zip(names, row)) for row in right.tolist()), unreadable


# ------------------------------------------------------------------------------------------------
# The teacher, asked anew or read from a file
# ------------------------------------------------------------------------------------------------
class Answers:
    """The teacher's predicted classes for all views of a run, in a file (--teacher-answers): what
    it holds is not asked again, the rest is asked and added. So the next student, with another
    learning rate or architecture, needs no teacher.

    The file: a header (JSON: what the views and the teacher depend on), then class + 1 of each view
    as uint16, 0 where it was not asked yet. A view depends on its image and its place in the run:
    step * batch + k * micro-batch + row. Rank 0 writes it, all read it: it is on a shared disk.
    """

    HEADER = 4096   # bytes

    def __init__(self, cfg, train_images, step):
        """Opens the file, or begins it. complete: nothing is left to ask from `step` on, so no
        teacher is needed. Raises InputError if it is of other views; it stays as it is."""
        self.cfg, self.path, self.new = cfg, cfg.teacher_answers, []   # new: (place, classes)
        views, some = cfg.total_steps * cfg.batch_size, np.linspace(0, len(train_images) - 1, 1000)
        same = *VIEW_FLAGS, "teacher", "classes", "training images"
        try:
            sizes = [os.path.getsize(train_images.path(i)) for i in some.astype(int)]
            facts = {name: cfg.facts[name] for name in same} | {
                "file sizes": stable_hash(repr(sizes).encode()), "device": cfg.device.type,
                "precision": str(cfg.teacher_dtype), "version of torch": torch.__version__,
                "version of Pillow": Image.__version__}
            if RANK == 0 and not os.path.exists(self.path):
                save(self.path, json.dumps(facts).encode().ljust(self.HEADER))
            total(0)   # before the others look: a network's disk would remember that there is none
            with open(self.path, "rb") as f:
                self.header = json.loads(f.read(self.HEADER))
            must_match(facts, self.header, "it is of other views or another teacher",
                       ("precision", "version of torch", "version of Pillow"))
            os.truncate(self.path, max(self.HEADER + 2 * views, os.path.getsize(self.path)))
            self.known = np.memmap(self.path, np.uint16, "r", self.HEADER, (views,))
        except (AttributeError, OSError, ValueError) as e:
            raise InputError(f"--teacher-answers {self.path} cannot be used; give the same flags "
                             f"as before, or another file: {e}") from e
        missing = int((self.known[step * cfg.batch_size:] == 0).sum())
        print0(f"answers        {self.path}, {missing} of {views} views are left to ask")
        self.complete = not total(missing)

    def __call__(self, images, step, k):
        """Predicted classes (m,), from the file or, where it lacks one, from the teacher."""
        place = step * self.cfg.batch_size + k * self.cfg.micro_batch
        known = self.known[place:place + len(images)].astype(np.int64)         # (m,)
        if known.all():
            return torch.from_numpy(known - 1).to(images.device, non_blocking=True)
        logits = self.ask(images, step, k)                                     # (m, K)
        classes = torch.where(logits.isfinite().all(1), logits.argmax(1) + 1, 0)
        self.new.append((place, classes))   # on the device until the next save; nan is no answer
        return logits

    def save(self):
        """Writes what is new, before last.pt is written. Rank 0 writes for all: nodes that write
        into one block of a network's disk may undo each other's. By seek: on a full disk a write
        into mapped memory kills the process."""
        new, self.new = gather([(place, c.cpu().numpy()) for place, c in self.new]), []
        if RANK:
            return
        try:
            with open(self.path, "r+b") as f:
                f.write(json.dumps(self.header).encode())
                for place, classes in itertools.chain(*new):
                    f.seek(self.HEADER + 2 * place)
                    f.write(classes.astype(np.uint16))
                f.flush()
                os.fsync(f.fileno())
        except OSError as e:   # they will be asked again
            print0(f"not saved      --teacher-answers: {reason(e)}")


def make_teacher(cfg, train_images, val_loader, step):
    """What train_step asks: (images (m, 3, S, S), step, k) -> the frozen teacher's logits (m, K),
    from an Answers also its predicted classes (m,), without teacher zeros (m,) that no loss reads.
    Raises InputError unless its weights are the same in all processes, in the answers' file, and as
    when the run began."""
    if cfg.distillation == "none":
        return lambda images, *_: images.new_zeros(len(images))
    answers = Answers(cfg, train_images, step) if cfg.teacher_answers else None
    header, ask, key = answers.header if answers else {}, None, "teacher's weights"
    sha256 = header.get(key)
    # weights that are typed are loaded in any case: their hash is compared
    if not (answers and answers.complete and "teacher_weights" not in cfg.typed):
        weights = None if cfg.teacher_weights == "none" else cfg.teacher_weights
        torch.manual_seed(rng_for(cfg.seed, "teacher").getrandbits(63))   # for random weights
        teacher = first_on_node(lambda: deit.load_teacher(
            cfg.teacher, weights, cfg.num_classes, img_size=cfg.img_size))
        sha256 = teacher.sha256
        if teacher.classes not in (None, cfg.classes):
            raise InputError(f"the teacher {cfg.teacher} was trained on other classes than "
                             f"{cfg.data}'s ({teacher.classes[:3]} ...): train one on these.")
        checked(teacher.to(cfg.device), cfg.teacher, cfg)
        its_cfg = types.SimpleNamespace(**vars(cfg) | {"dtype": cfg.teacher_dtype})
        some = np.unique(np.linspace(0, len(val_loader.dataset.folder) - 1, 512).astype(int))
        right = evaluate({"": teacher}, val_loader, some, its_cfg)[0]["cls"]
        said = (f"{cfg.teacher}, weights {cfg.teacher_weights}, is right on {right:.1f} % of "
                f"{len(some)} validation images")
        print0(f"teacher        {said}")
        p = 1 / cfg.num_classes   # by chance; two standard errors more are better
        if right <= 100 * (p + 2 * math.sqrt(p * (1 - p) / len(some))) and weights:
            said += ", no better than chance: is it trained, are its classes in the data's order"
            if len(some) >= 200:
                raise InputError(f"the teacher {said}?")
            print0(f"warning        {said}, or are these too few to tell?")
        if cfg.compile:
            teacher.compile()

        def ask(images, step, k):
            with autocast(its_cfg):
                return teacher(images)

    for before in (cfg.facts, header, *gather({key: sha256})):   # who knows no hash yet agrees
        must_match({key: sha256}, {key: sha256} | before, "the teacher is another than before, or "
                   "than in another process (give the same --teacher-weights, or another --output)")
    cfg.facts[key] = header[key] = sha256
    if answers:
        answers.ask = ask
    return answers or ask


# ------------------------------------------------------------------------------------------------
# Saving, and going on from a save
# ------------------------------------------------------------------------------------------------
def save(path, content):
    """Bytes, or what torch.save takes, into a file beside `path`, onto the disk, then renamed: it
    is never half-written. Makes the folder, which may be gone. Raises OSError; what was there
    stays."""
    beside = f"{path}.{secrets.token_hex(4)}.tmp"
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    try:
        with open(beside, "xb") as f:
            f.write(content) if isinstance(content, bytes) else torch.save(content, f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(beside, path)
    except RuntimeError as e:   # torch.save's: what the system said is in its context
        raise e.__context__ or OSError(reason(e)) from e
    finally:
        with contextlib.suppress(OSError):
            os.remove(beside)


def save_state(state, cfg, is_best=False):
    """Writes best.pt if is_best (without what only going on needs), last.pt and log.jsonl. Called
    by all processes, written by rank 0. A write that fails is said and the others follow; returns
    whether one failed. Raises InputError if the state is not finite."""
    check_finite(state, cfg)
    if isinstance(state.teacher, Answers):
        state.teacher.save()
    last = state.state_dict() | {"config": state.model.config, "classes": cfg.classes,
                                 "facts": cfg.facts}
    log = "".join(json.dumps(record) + "\n" for record in state.log).encode()
    files, failed = {"last.pt": last, "log.jsonl": log}, 0
    if is_best:
        best = last | {"best": state.log[-1]["both"], "ema": None, "optimizer": None}
        files = {"best.pt": best} | files
    for name, content in files.items():
        try:
            if RANK == 0:
                save(f"{cfg.output}/{name}", content)
            if name == "best.pt":   # only now: if it failed, the next good epoch is kept
                state.best = last["best"] = best["best"]
        except OSError as e:
            failed = 1
            print0(f"not saved      {cfg.output}/{name}: {reason(e)}")
    return total(failed).item()


def find_save(typed):
    """The save to go on from; None: a new run starts. Raises InputError rather than overwrite the
    files of another run."""
    folder = typed["output"]
    files = os.listdir(folder) if os.path.isdir(folder) else ()
    there = {"last.pt", "best.pt", "log.jsonl"} & {*files}
    if there and not typed.get("resume"):
        raise InputError(f"{folder} holds a run: add --resume to go on with it, or choose another "
                         "--output.")
    if there <= {"log.jsonl"} and not (there and os.path.getsize(f"{folder}/log.jsonl")):
        # nothing, or a run that was killed before its first save
        return None
    try:
        saved = deit.read_checkpoint(f"{folder}/last.pt")
        if not saved.get("optimizer") or "facts" not in saved:
            raise InputError(f"{folder}/last.pt is of another version.")
    except InputError as e:
        raise InputError(f"{e} To start from its weights, give --finetune {folder}/best.pt and "
                         "another --output.") from e
    return saved


def claim_output(cfg):
    """Makes the folder of a run, before its first save. A new run creates log.jsonl, which only one
    of two that start together can. Raises InputError for the other."""
    os.makedirs(cfg.output, exist_ok=True)
    for path in pathlib.Path(cfg.output).glob("*.tmp"):   # of runs that were killed
        if time.time() - path.stat().st_mtime > 86400:
            path.unlink()
    try:
        open(f"{cfg.output}/log.jsonl", "a" if cfg.resume else "x").close()
    except FileExistsError as e:
        raise InputError(f"another run has just started in {cfg.output}: choose another "
                         "--output.") from e


# ------------------------------------------------------------------------------------------------
# The run: configuration, model, the loop
# ------------------------------------------------------------------------------------------------
def make_config(typed, saved=None):
    """One configuration: the defaults, then what was saved, then what was typed; with the device,
    its precision and workers. Raises InputError if flags do not go together."""
    cfg = types.SimpleNamespace(**DEFAULTS | (saved["facts"] if saved else {}) | typed, typed=typed)
    if cfg.data is None:
        raise InputError("--data is missing (give a folder that holds train/<class>/<image> and "
                         "val/<class>/<image>, or nothing but --seed for the demo), and so is "
                         f"{cfg.output}/last.pt to go on from.")
    for flag, name in (("model", cfg.model), ("teacher", cfg.teacher)):
        if ":" in name and flag not in typed:   # a save may be another's: it chooses no program
            raise InputError(f"the save names its {flag} by module: add --{flag} {name!r} if you "
                             "trust it.")
        if flag in typed and ":" not in name and name not in deit.VARIANTS:
            deit.torchvision_models(name)   # a misspelt name is said first
    distilled = re.match("deit_.*_distilled_", cfg.model)
    teachers = {"teacher", "teacher_weights", "teacher_answers"}
    if cfg.distillation == "auto":
        cfg.distillation = "hard" if distilled else "none"
    if cfg.distillation == "none" and (
            distilled or typed.keys() & teachers and "distillation" not in typed):
        raise InputError(f"{cfg.model} learns from no teacher here: add --distillation hard or "
                         "soft, or take a model without 'distilled' and no --teacher flags.")
    if cfg.teacher_answers and cfg.distillation == "soft":
        raise InputError("--teacher-answers holds predicted classes, no probabilities: leave it "
                         "out with --distillation soft.")
    cfg.device = choose_device(cfg.device)
    cfg.dtype = cfg.teacher_dtype = choose_precision(cfg.amp, cfg.device)
    if cfg.dtype and cfg.device.type == "cuda" and not re.search("^deit_|:", cfg.teacher):
        cfg.teacher_dtype = torch.float16   # torchvision's: bfloat16 changes 5 % of its labels
    if cfg.workers is None:
        cores = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count()))(0)
        cfg.workers = max(1, min(16, len(cores) // LOCAL_WORLD_SIZE))
    return cfg


def load_images(cfg):
    """The training and the validation images. What is left out is printed. Raises InputError."""
    train = ImageFolder(cfg.data, "train", cfg.val_fraction)
    val = ImageFolder(cfg.data, "val", cfg.val_fraction, train.classes)
    if cfg.val_fraction and {"train", "val"} & {*train.classes}:
        raise InputError(f"{cfg.data} has a folder train or val, but --val-fraction is for class "
                         "folders that lie in DATA itself: leave it out, or give another --data.")
    if len(train.classes) < 2:
        raise InputError(f"{train.root} holds one class only, {train.classes[0]!r}: there is no "
                         "choice to learn.")
    left_out, out = sorted({*train.left_out, *val.left_out}), os.path.realpath(cfg.output)
    if not min(train.counts):
        folder = f"{train.root}/{train.classes[train.counts.index(0)]}/"
        others = [path for path in left_out if path.startswith(folder)]
        raise InputError(f"{folder!r} holds no images to train on: files of other suffixes than "
                         f"{' '.join(SUFFIXES)} are not read, such as {others[:3]}.")
    for folder in (train, val):
        if f"{out}/".startswith(f"{os.path.realpath(folder.root)}/"):
            raise InputError(f"--output {cfg.output} lies in {folder.root}, whose folders are "
                             "classes: choose one elsewhere.")
    if left_out:
        print0(f"left out       {len(left_out)} files that are no images by their suffix, or links "
               f"to nowhere: {', '.join(map(repr, left_out[:3]))}")
    return train, val


def plan(cfg, train, val):
    """Fills in what depends on the data or on other flags (ks: this process's micro-batches) and
    facts: what makes the run, its saved flags and its images. Raises InputError."""
    cfg.img_size = cfg.img_size or deit.VARIANTS.get(cfg.model, (0, 0, 224))[2]
    cfg.classes, cfg.num_classes, batch = train.classes, len(train.classes), cfg.batch_size
    cfg.micro_batch = m = cfg.micro_batch or max(1, min(128, batch // WORLD_SIZE))
    if len(train) < batch or batch % (m * WORLD_SIZE):
        raise InputError(
            f"--batch-size {batch} must be at most the {len(train)} training images and a multiple "
            f"of {WORLD_SIZE} processes x --micro-batch {m}: take another batch, or "
            f"{math.gcd(batch // WORLD_SIZE, m)} for the latter.")
    cfg.ks = range(RANK, batch // m, WORLD_SIZE)
    cfg.grad_accum_steps, cfg.peak_lr = len(cfg.ks), cfg.lr * batch / 512
    if cfg.min_lr is None:
        cfg.min_lr = 1e-5 if cfg.peak_lr > 1e-5 else cfg.peak_lr / 10
    if cfg.warmup_epochs is None:
        cfg.warmup_epochs = min(5.0, cfg.epochs / 5)
    if cfg.peak_lr < cfg.min_lr or cfg.warmup_epochs >= cfg.epochs:
        raise InputError(f"the learning rate cannot rise to {cfg.peak_lr} (--lr x batch / 512) in "
                         f"--warmup-epochs {cfg.warmup_epochs} of {cfg.epochs}, then fall to "
                         f"--min-lr {cfg.min_lr}: change one of these.")
    cfg.epoch_steps = len(train) // batch
    cfg.total_steps = cfg.epochs * cfg.epoch_steps
    cfg.warmup_steps = round(cfg.warmup_epochs * cfg.epoch_steps)
    cfg.facts = {name: getattr(cfg, name) for name in DEFAULTS if name not in NOT_SAVED} | {
        "training images": str(train), "validation images": str(val),
        "classes": f"{cfg.num_classes}, hash {stable_hash(repr(cfg.classes).encode()):x}"}


def check_shared_memory(cfg):
    """Warns if the loaders may not find room there: a worker that does not would not answer."""
    if os.path.isdir("/dev/shm"):
        free, item = shutil.disk_usage("/dev/shm").free, cfg.micro_batch * cfg.img_size**2 * 3
        need = 4 * cfg.workers * LOCAL_WORLD_SIZE * item   # 2 items a worker, 2 loaders a process
        if free < need:
            print0(f"warning        loader workers may need {need / 2**20:.0f} MiB in /dev/shm, "
                   f"where {free / 2**20:.0f} are free: raise the container's --shm-size, or lower "
                   "--workers")


def checked(model, name, cfg):
    """The model, in evaluation mode, if it takes images of the run's size (a torchvision
    transformer takes one only) in the layout of its device (a .view() may not), and answers with
    num_classes logits. Raises InputError."""
    try:
        black = torch.zeros(1, cfg.img_size, cfg.img_size, 3, dtype=torch.uint8)
        with torch.no_grad():
            shape = tuple(model.eval()(normalise(black, cfg.device)).shape)
        if shape != (1, cfg.num_classes):
            raise ValueError(f"it gives {shape}")
    except Exception as e:   # the module may be anybody's
        raise InputError(f"{name} does not turn images of {cfg.img_size} px into {cfg.num_classes} "
                         f"logits each ({reason(e)}).") from e
    return model


def make_model(cfg, saved):
    """The model to train, on the device: random weights from the seed, or those of --finetune."""
    names = "img_size", "patch_size", "embed_dim", "depth", "num_heads", "drop_path"
    given = {"drop_path": 0.1} if cfg.model in deit.VARIANTS else {}
    given |= {name: getattr(cfg, name) for name in names if getattr(cfg, name) is not None}
    torch.manual_seed(rng_for(cfg.seed, "weights").getrandbits(63))
    model = deit.create_model(cfg.model, num_classes=cfg.num_classes, **given)
    if cfg.device.type == "cuda":   # RegNets once trained 3 times slower in channels-last
        model.to(memory_format=torch.contiguous_format)
    initial = cfg.finetune or cfg.pretrained and cfg.model
    if initial and not saved:
        first_on_node(lambda: deit.load_weights(model, initial, say=print0))
    return checked(model.to(cfg.device), cfg.model, cfg)


def clock(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def print_start(state, cfg, train, val):
    decayed, rest = ([p.numel() for p in g["params"]] for g in state.optimizer.param_groups)
    print0(
        f"model          {cfg.model}, {sum(decayed) + sum(rest):,} parameters, {cfg.img_size} px\n"
        f"data           {len(train)} training and {len(val)} validation images of "
        f"{cfg.num_classes} classes\n"
        f"batch          {cfg.batch_size} views = {WORLD_SIZE} processes x {cfg.micro_batch} "
        f"micro-batch x {cfg.grad_accum_steps} accumulated; {cfg.repeats} views an image\n"
        f"schedule       {cfg.epochs} epochs of {cfg.epoch_steps} steps, lr {cfg.peak_lr:.3g} "
        f"after {cfg.warmup_steps} steps of warm-up, then down to {cfg.min_lr:.3g}\n"
        f"weight decay   {cfg.weight_decay} on {len(decayed)} tensors ({sum(decayed):,}), none on "
        f"{len(rest)} ({sum(rest):,})\n"
        f"distillation   {cfg.distillation}\n"
        f"running on     {cfg.device}, {cfg.dtype or torch.float32}, {cfg.workers} loader workers, "
        f"torch {torch.__version__}, output in {cfg.output}")


def print_step(state, cfg, times):
    """The live line: here, and nowhere else between saves, the device is asked for values."""
    check_finite(state, cfg)
    loss, now, live = state.means()[0], time.perf_counter(), in_terminal()
    pace = (now - times.run) / (state.step - times.first_step)   # seconds, evaluation included
    if live or state.step % cfg.epoch_steps:   # else the epoch's line follows at once
        at = state.step - len(state.log) * cfg.epoch_steps
        print0(f"epoch {len(state.log) + 1} step {at}/{cfg.epoch_steps}  loss {loss:.3f}  lr "
               f"{state.optimizer.param_groups[0]['lr']:.2e}  {cfg.batch_size / pace:.0f} img/s  "
               f"waiting for data {100 * state.data_time / (now - times.epoch):.0f} %  "
               f"{clock(pace * (cfg.total_steps - state.step))} left ", end="\r" if live else "\n")


def print_epoch(r):
    """A record of the log as one line; of one head's accuracies only the first."""
    names = ["dist", "both"] * (not r["cls"] == r["dist"] == r["both"])
    names += ["ema_both", "agreement"] + [n for n in ("unreadable", "skipped_steps") if r.get(n)]
    rest = "".join(f"  {name} {r[name]:.4g}" for name in names if name in r)
    print0(f"epoch {r['epoch']:3d}  loss {r['train_loss']:6.3f}  top-1 % of {r['val_images']}: "
           f"class {r['cls']:.2f}{rest}  {r['img_per_s']:.0f} img/s  {clock(r['seconds'])}")


def print_unreadable(unreadable, folder, what):
    """One line with the count, and the first names with Pillow's words."""
    if unreadable:
        first = "; ".join(f"{folder.path(i)!r} ({unreadable[i]})" for i in sorted(unreadable)[:3])
        print0(f"unreadable     {len(unreadable)} {what}: {first}")


def stop_if_asked(state, cfg, signals, failed):
    """Ends the program if a signal has come to any process: state is saved (or that failed)."""
    if signals:
        number = CAUGHT[0] if CAUGHT else signal.SIGTERM   # it came to another process
        print0(f"stopped        by {signal.Signals(number).name} after step {state.step}, "
               f"{'NOT saved' if failed else 'saved'} in {cfg.output}: --resume goes on")
        leave()
        raise SystemExit(128 + number)


def train(cfg, saved=None):
    """The run. saved: the checkpoint to go on from. Returns the log, one record per epoch. Once a
    signal has come, saves and raises SystemExit. Raises InputError."""
    # The data, and what follows from them. Is it the run that was saved?
    train_images, val_images = load_images(cfg)
    plan(cfg, train_images, val_images)
    step, before = (saved["step"], saved["facts"]) if saved else (0, {})
    if saved:
        known = {name: now for name, now in cfg.facts.items() if name in {*before, *cfg.typed}}
        must_match(known, before, f"{cfg.output}/last.pt is of another run (give the same, or "
                   f"another --output, with its weights by --finetune {cfg.output}/best.pt)",
                   MAY_CHANGE)
        print0(f"resumed        {cfg.output}/last.pt, {step} of {cfg.total_steps} steps done")
    cfg.facts = before | cfg.facts   # with the teacher's weights

    # Loader workers are forked before the group is joined. They get the step to begin with, not the
    # checkpoint's tensors: these are mapped from the disk, and read below.
    val_loader, _ = make_loader(EvalDataset(val_images), [], cfg)   # begun to start its workers
    items = train_items(len(train_images), cfg, step)
    _, batches = make_loader(TrainDataset(train_images, cfg), items, cfg)
    check_shared_memory(cfg)

    # Processes. Signals are caught from here on: one that fails before must not be waited for. At
    # the live line they add up their totals, so they must agree on when.
    join(cfg)
    catch_signals()
    alike = cfg.facts | {"step": step, "device": cfg.device.type, "precision": str(cfg.dtype),
                         "log_every": cfg.log_every}
    for others in gather(alike):
        must_match(alike, others, "the processes do not start alike (give all of them the same "
                   "flags, data and --output)", ("data", "finetune"))

    # Model, average, optimizer; what they were when it was saved; the teacher; the first save.
    state = State(make_model(cfg, saved), cfg)
    if saved:
        state.load_state_dict(saved)
    state.teacher = make_teacher(cfg, train_images, val_loader, step)
    models = {"": state.model} | ({"ema_": state.ema} if cfg.ema_decay else {})
    print_start(state, cfg, train_images, val_images)
    if RANK == 0:
        claim_output(cfg)
    failed = save_state(state, cfg)   # so that a full disk is found now; and the log is complete
    if failed:
        raise InputError(f"nothing can be saved in {cfg.output}: make room, or choose another.")
    if RANK == 0:
        deit.read_checkpoint(f"{cfg.output}/last.pt")   # raises InputError for what can't come back

    now = time.perf_counter()
    times = types.SimpleNamespace(run=now, epoch=now, save=now, first_step=step)
    while len(state.log) < cfg.epochs:
        # An epoch's steps, saved before the evaluation, in which a signal or a crash may come.
        state.model.train()   # evaluate ended it
        begin, end = state.step, (len(state.log) + 1) * cfg.epoch_steps
        while state.step < end:
            train_step(state, batches, cfg)
            if (state.step - end) % cfg.log_every == 0:
                print_step(state, cfg, times)
            late = RANK == 0 and time.perf_counter() - times.save > 60 * cfg.save_minutes
            signals, late = total([len(CAUGHT), int(late)]).tolist()
            if signals or late or state.step == end:
                failed = save_state(state, cfg)
                times.save = time.perf_counter()
            stop_if_asked(state, cfg, signals, failed)
        seconds = time.perf_counter() - times.epoch

        # The epoch's accuracies, model and average, by each head; its record; its save.
        scores, _, bad_val = evaluate(models, val_loader, np.arange(len(val_images)), cfg, CAUGHT)
        stop_if_asked(state, cfg, total(len(CAUGHT)), failed)
        loss, agreement, skipped = state.means()
        record = {"epoch": len(state.log) + 1, "step": state.step,
                  "lr": state.optimizer.param_groups[0]["lr"], "train_loss": loss} | scores
        if cfg.distillation != "none":
            record["agreement"] = 100 * agreement
        if state.scaler.is_enabled():
            record["skipped_steps"] = skipped
        state.log.append(record | {
            "val_images": len(val_images), "unreadable": len(state.unreadable) + len(bad_val),
            "img_per_s": (end - begin) * cfg.batch_size / seconds,
            "waiting": state.data_time / seconds, "seconds": time.perf_counter() - times.epoch})
        print_epoch(state.log[-1])
        print_unreadable(bad_val, val_images, "validation images, counted as wrong")
        print_unreadable(state.unreadable, train_images, "training images, the next ones stand in")
        state.totals.zero_()
        state.unreadable, state.data_time = {}, 0.0
        failed = save_state(state, cfg, is_best=record["both"] > state.best)
        times.epoch = times.save = time.perf_counter()
    if failed:
        raise InputError(f"the run is done, but its last save in {cfg.output} failed: make room "
                         "and add --resume, which repeats what is missing.")
    print0(f"finished       in {clock(time.perf_counter() - times.run)}, best top-1 "
           f"{state.best:.2f} %")
    return state.log


# ------------------------------------------------------------------------------------------------
# --eval
# ------------------------------------------------------------------------------------------------
def run_eval(cfg):
    """--eval: accuracies of a checkpoint on DATA/val (or the --val-fraction of DATA), by each head.
    Returns (top-1, top-5) in percent. Raises InputError."""
    folder = ImageFolder(cfg.data, "val", cfg.val_fraction)
    loader, _ = make_loader(EvalDataset(folder), [], cfg)
    join(cfg)
    given = {name: cfg.typed[name] for name in ("img_size", "num_heads") if name in cfg.typed}
    model = first_on_node(lambda: deit.load_model(
        cfg.eval, model=cfg.typed.get("model"), say=print0, **given))
    cfg.num_classes, cfg.img_size = model.config["num_classes"], model.config["img_size"]
    cfg.micro_batch = cfg.micro_batch or 128
    checked(model.to(cfg.device), cfg.eval, cfg)
    folder.number(model.classes or folder.classes)
    if cfg.num_classes != len(folder.classes):
        raise InputError(f"{cfg.eval} knows {cfg.num_classes} classes, {folder.root} has "
                         f"{len(folder.classes)}.")
    top1, top5, unreadable = evaluate({"": model}, loader, np.arange(len(folder)), cfg)
    print0(f"{cfg.eval}: {len(folder)} images at {cfg.img_size} px, {cfg.dtype or torch.float32}")
    print_unreadable(unreadable, folder, "images, counted as wrong")
    for head in HEADS if getattr(model, "num_tokens", 1) == 2 else ["cls"]:
        print0(f"  {HEADS[head]:18s} top-1 {top1[head]:6.3f} %   top-5 {top5[head]:6.3f} %")
    return top1, top5


# ------------------------------------------------------------------------------------------------
# The demo: `python train.py`, what DeiT is about, in minutes, with nothing at hand
# ------------------------------------------------------------------------------------------------
def demo_net(num_classes):
    """The teacher, a plain convnet: images (B, 3, S, S) -> logits (B, K)."""
    nn, layers = torch.nn, []
    for before, width in ((3, 32), (32, 64), (64, 128), (128, 128)):   # each halves the side
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(),
                   nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                         nn.Linear(128, num_classes))


def draw_demo(folder):
    """Draws train/<class>/*.jpg and val/<class>/*.jpg: eight small balls, a large one in front.

    A ball's class is its colour and its pattern, twelve in all; a mirror changes none. A validation
    picture is filed under its large ball. A training picture, like a photograph with one tag, is
    filed under any of its balls, with a chance in proportion to the area that is seen of it: half
    of them under another ball than the large one. So the tags are loose, but right more often than
    anything else, and who learns from many of them answers better than the tags themselves.
    """
    rng, (y, x) = np.random.default_rng(0), np.mgrid[:64, :64]
    colours = {"red": (205, 60, 50), "green": (60, 150, 70), "blue": (60, 90, 190)}
    patterns = {"rows": y % 8 < 4, "bars": x % 8 < 4, "checks": (x % 8 < 4) == (y % 8 < 4),
                "dots": np.hypot(x % 8 - 3.5, y % 8 - 3.5) < 3}   # false: black
    textures = {f"{colour}_{pattern}": lit[..., None] * rgb           # (64, 64, 3) each
                for colour, rgb in colours.items() for pattern, lit in patterns.items()}
    for i in range(3600):
        pixels = rng.integers(95, 165, (64, 64, 3), np.uint8)     # grey noise
        seen = np.full((64, 64), "", object)                      # class of the ball at each pixel
        for radius in (10, 10, 10, 10, 10, 10, 10, 10, 17):
            name = rng.choice(list(textures))
            across, down = rng.uniform(radius, 64 - radius, 2)
            ball = np.hypot(x - across, y - down) < radius
            pixels[ball], seen[ball] = textures[name][ball], name
        part = "train" if i < 2400 else "val"
        if part == "train":
            name = rng.choice(seen[seen != ""])                   # at a pixel of any ball
        os.makedirs(f"{folder}/{part}/{name}", exist_ok=True)
        Image.fromarray(pixels).save(f"{folder}/{part}/{name}/{i}.jpg")


DEMO_PLAIN = ("--img-size 48 --batch-size 64 --repeats 1 --randaugment 0 --mixup 0 --cutmix 0 "
              "--erasing 0 --smoothing 0 --ema-decay 0")   # only crops and flips
DEMO_TEACHER = f"--model train:demo_net {DEMO_PLAIN} --epochs 12 --lr 4e-3"
DEMO_STUDENT = (f"{DEMO_PLAIN} --patch-size 8 --embed-dim 128 --depth 4 --num-heads 4 "
                "--drop-path 0 --epochs 20 --lr 5e-3")


def demo(seed):
    """Draws pictures, trains a teacher, then a small DeiT without and one with it; a table."""
    start, folder = time.perf_counter(), f"runs/demo-{seed}"
    print(f"drawing 3,600 small pictures into {folder}/data", flush=True)
    draw_demo(f"{folder}/data")
    runs = {"teacher": DEMO_TEACHER,
            "alone": f"--model deit_tiny_patch16_224 {DEMO_STUDENT}",
            "distilled": f"--model deit_tiny_distilled_patch16_224 {DEMO_STUDENT} --teacher "
                         f"train:demo_net --teacher-weights {folder}/teacher/best.pt"}
    table = ""
    for name, flags in runs.items():
        flags = f"--data {folder}/data --output {folder}/{name} {flags} --seed {seed} --resume"
        print(f"\n$ python train.py {flags}", flush=True)
        last = main(flags.split())[-1]
        table += f"\n{name:10s}{last['cls']:8.1f}{last['dist']:15.1f}{last['both']:7.1f}"
    print(f"\nTop-1 in percent on {last['val_images']} validation images (seed {seed}, "
          f"{clock(time.perf_counter() - start)} in all);\na model with one head has it thrice"
          f"\n{'head':10s}{'class':>8s}{'distillation':>15s}{'both':>7s}{table}")


# ------------------------------------------------------------------------------------------------
# The program
# ------------------------------------------------------------------------------------------------
def error_message(error):
    """A user's mistake or a full machine as one sentence; "" for anything else."""
    message = str(error).strip()
    if isinstance(error, InputError):
        return message.split("InputError: ")[-1]   # of a worker's traceback, the end
    if isinstance(error, OSError):   # the system's words are clear: what, and which file
        return f"{message}."
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return (f"--compile does not work here ({reason(error)}): install a C++ compiler (on a GPU "
                "Triton too), or leave it out.")
    last = message.split("\n")[-1]   # of a worker's traceback
    sentences = {
        "out of memory|allocate memory": "the memory is full: halve the micro-batch "
        "(--micro-batch; the batch stays), or take a smaller model or --img-size.",
        r"DataLoader (worker \(pid|timed out)|shared memory": "a loader worker died or did not "
        f"answer ({last}): free memory (a container's --shm-size), lower --workers, take a TMPDIR "
        "of a shorter name, or see whether the disk answers; then --resume from the last save.",
        "env:// rendezvous": f"{last}: start several processes with torchrun, or unset RANK and "
        "WORLD_SIZE.",
        "Duplicate GPU": "several processes found the same GPU: start as many as there are.",
        "finished reduction": "some of the model's parameters have no gradient, which several "
        "processes cannot train: freeze them, by requires_grad_(False).",
        "Connection (closed|reset) by peer": "another process ended: see its message."}
    return next((said for pattern, said in sentences.items() if re.search(pattern, message)), "")


def end_workers():
    """Ends the loader workers at once: they would outlive an error by seconds."""
    with contextlib.suppress(AttributeError, ValueError):   # on Windows; not in the main thread
        chld = signal.signal(signal.SIGCHLD, signal.SIG_DFL)   # PyTorch's takes it for a failure
        interrupt = signal.signal(signal.SIGINT, signal.SIG_IGN)   # or one more would leave some
        for child in multiprocessing.active_children():
            child.kill()
            child.join()
        signal.signal(signal.SIGCHLD, chld)
        signal.signal(signal.SIGINT, interrupt)


def main(argv=None):
    """The program. Returns the log of a run. A user's mistake raises SystemExit with one sentence;
    any other error ends the workers and is raised on."""
    if sys.stdout is None:   # closed
        sys.stdout = open(os.devnull, "w")
    getattr(sys.stdout, "reconfigure", dict)(errors="backslashreplace")   # it may lack letters
    try:
        typed = parse(argv)
        if not typed.keys() - {"seed"} and not LAUNCHED:
            return demo(typed.get("seed", 0))
        model = typed.get("model", DEFAULTS["model"])
        typed.setdefault("output", os.path.join("runs", model.replace(":", ".")))
        saved = None if "eval" in typed else find_save(typed)
        cfg = make_config(typed, saved)
        result = run_eval(cfg) if cfg.eval else train(cfg, saved)
        leave()
        return result
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    except Exception as e:
        sentence = error_message(e)
        if not sentence:
            raise
        raise SystemExit(f"train.py: {f'process {RANK}: ' if RANK else ''}{sentence}") from None
    finally:
        CAUGHT.clear()
        end_workers()


if __name__ == "__main__":
    main()
