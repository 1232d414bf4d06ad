# SPDX-License-Identifier: MIT
"""Trains DeiT (deit.py) with its recipe: one bare loop for one CPU, one GPU, or many machines.

  python train.py                                           the demo: some minutes, nothing needed
  python train.py --data DIR --model regnet_y_400mf         a teacher for your own classes
  python train.py --data DIR --teacher regnet_y_400mf --teacher-weights runs/regnet_y_400mf/best.pt
  torchrun --nproc_per_node=8 train.py --data /imagenet     DeiT-S from regnet_y_16gf, the recipe
  python train.py <the same flags> --resume                 goes on where it was stopped
  python train.py --data DIR --eval runs/NAME/best.pt       validation accuracy by each head
  python train.py --data DIR --benchmark                    what limits a run, and its hours

DIR holds train/<class>/<image> and val/<class>/<image>. The order of this file is the order of
things: schedule, augmentation, data, evaluation, saving, flags, the training run, the demo.

Randomness is keyed, not stored: whatever is drawn comes from a generator made of (seed, epoch,
image, view) in a loader worker, or of (seed, step, k) on the device, k being the micro-batch's
place in the batch. So, for a given --micro-batch, neither the number of processes or workers nor an
interruption changes a DeiT's run (a convnet's batch statistics depend on the processes).
"""
import argparse
import contextlib
import copy
import functools
import hashlib
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shlex
import shutil
import signal
import sys
import time
import warnings

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageEnhance, ImageOps

import deit
from deit import InputError


# ------------------------------------------------------------------------------------------------
# Optimisation: the schedule and the parameter groups
# ------------------------------------------------------------------------------------------------

def lr_at(step, peak, min_lr, warmup_steps, total_steps, start=1e-6):
    """The learning rate of a step: linear from `start` to `peak`, then the cosine of step / total.
    As released, the cosine runs over all steps, not over those after the warm-up."""
    if step < warmup_steps:
        return start + (peak - start) * step / warmup_steps
    return min_lr + (peak - min_lr) * (1 + math.cos(math.pi * step / total_steps)) / 2


def ema_decay_at(step, decay):
    """The average's decay rises from 0.1: at first it forgets quickly, so that even a short run
    leaves its random start behind."""
    return min(decay, (1 + step) / (10 + step))


def parameter_groups(model, weight_decay):
    """AdamW's two groups. As released: biases, norms, pos_embed and cls_token are not decayed, but
    dist_token is (the list of exemptions of the time did not name it)."""
    exempt = {n for n, p in model.named_parameters() if p.ndim <= 1} | {"pos_embed", "cls_token"}
    named = list(model.named_parameters())
    return [{"params": [p for n, p in named if n not in exempt], "weight_decay": weight_decay},
            {"params": [p for n, p in named if n in exempt], "weight_decay": 0.0}]


# ------------------------------------------------------------------------------------------------
# Augmentation of one view, in a loader worker, on Pillow images (paper, table 9; timm's details)
# ------------------------------------------------------------------------------------------------

def keyed(*key):
    """A random generator of its own for a key: the same key draws the same anywhere, any time."""
    return random.Random(repr(key))


def crop_box(width, height, rng):
    """RandomResizedCrop's box (left, top, right, bottom): 8 % to 100 % of the area, ratio 3/4 to
    4/3; after ten tries that do not fit, the largest central box of an allowed ratio."""
    for _ in range(10):
        area = width * height * rng.uniform(0.08, 1)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.randint(0, width - w), rng.randint(0, height - h)
            return left, top, left + w, top + h
    w, h = min(width, max(1, round(height * 4 / 3))), min(height, max(1, round(width * 4 / 3)))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


FILL = (124, 116, 104)   # ImageNet's mean colour, for what moves in from outside
BICUBIC, AFFINE = Image.Resampling.BICUBIC, Image.Transform.AFFINE


def affine(image, matrix):
    return image.transform(image.size, AFFINE, matrix, BICUBIC, fillcolor=FILL)


def solarize_add(image, add):
    return image.point([min(255, v + add) if v < 128 else v for v in range(256)] * 3)


def factor(t, sign):
    return max(0.1, 1 + 0.9 * t * sign)


RANDAUGMENT = {   # the 15 operations, at strength t in 0..1 and a random sign s
    "AutoContrast": lambda im, t, s: ImageOps.autocontrast(im),
    "Equalize": lambda im, t, s: ImageOps.equalize(im),
    "Invert": lambda im, t, s: ImageOps.invert(im),
    "Rotate": lambda im, t, s: im.rotate(30 * t * s, BICUBIC, fillcolor=FILL),
    # at t = 1 the official code keeps 0 bits, a black image, which Pillow 13 refuses: 1 at least
    "Posterize": lambda im, t, s: ImageOps.posterize(im, max(1, 4 - int(4 * t))),
    "Solarize": lambda im, t, s: ImageOps.solarize(im, 256 - int(256 * t)),
    "SolarizeAdd": lambda im, t, s: solarize_add(im, int(110 * t)),
    "Color": lambda im, t, s: ImageEnhance.Color(im).enhance(factor(t, s)),
    "Contrast": lambda im, t, s: ImageEnhance.Contrast(im).enhance(factor(t, s)),
    "Brightness": lambda im, t, s: ImageEnhance.Brightness(im).enhance(factor(t, s)),
    "Sharpness": lambda im, t, s: ImageEnhance.Sharpness(im).enhance(factor(t, s)),
    "ShearX": lambda im, t, s: affine(im, (1, 0.3 * t * s, 0, 0, 1, 0)),
    "ShearY": lambda im, t, s: affine(im, (1, 0, 0, 0.3 * t * s, 1, 0)),
    "TranslateX": lambda im, t, s: affine(im, (1, 0, 0.45 * t * s * im.width, 0, 1, 0)),
    "TranslateY": lambda im, t, s: affine(im, (1, 0, 0, 0, 1, 0.45 * t * s * im.height)),
}


def rand_augment(image, magnitude, rng):
    """rand-m9-mstd0.5-inc1: two operations with replacement, each applied half the time, at a level
    from Normal(magnitude, 0.5) clipped to 0..10."""
    for name in rng.choices(list(RANDAUGMENT), k=2):
        if rng.random() < 0.5:
            t = min(max(rng.gauss(magnitude, 0.5), 0), 10) / 10
            image = RANDAUGMENT[name](image, t, rng.choice((-1, 1)))
    return image


def train_view(image, size, magnitude, rng):
    """One random view of an RGB image: crop and resize in one pass, flip, RandAugment."""
    view = image.resize((size, size), BICUBIC, box=crop_box(*image.size, rng))
    if rng.random() < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return rand_augment(view, magnitude, rng) if magnitude else view


def erasing_box(size, probability, rng):
    """RandomErasing's rectangle (top, left, height, width), all 0 for none: 2 % to 33 % of the
    area, ratio 0.3 to 3.3. Drawn with the view; filled later, on the device."""
    if rng.random() < probability:
        for _ in range(10):
            area = size * size * rng.uniform(0.02, 1 / 3)
            ratio = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if h < size and w < size:
                return rng.randint(0, size - h), rng.randint(0, size - w), h, w
    return 0, 0, 0, 0


# ------------------------------------------------------------------------------------------------
# Augmentation of a whole micro-batch, on the device
# ------------------------------------------------------------------------------------------------

@functools.cache
def mean_and_std(device):
    """ImageNet's, for values 0..255, (1, 3, 1, 1) each, brought to the device once."""
    return [torch.tensor(v, device=device).view(1, 3, 1, 1) * 255
            for v in (deit.IMAGENET_MEAN, deit.IMAGENET_STD)]


def normalise(views, device):
    """uint8 (B, S, S, 3) -> float (B, 3, S, S) by ImageNet's mean and deviation, on the device."""
    mean, std = mean_and_std(device)
    images = views.to(device, non_blocking=True).permute(0, 3, 1, 2).float()
    return images.sub_(mean).div_(std)


def erase(images, boxes):
    """Fills each image's rectangle (boxes (B, 4), on the CPU) with Normal(0, 1), in place."""
    rows = boxes[:, 2].nonzero()[:, 0]                                         # the R to be erased
    if len(rows) == 0:
        return images
    boxes, rows = (t.to(images.device, non_blocking=True) for t in (boxes[rows], rows))
    top, left, h, w = boxes.T[..., None, None, None]                           # (R, 1, 1, 1) each
    x = torch.arange(images.shape[-1], device=images.device)
    y = x[:, None]
    inside = (y >= top) & (y < top + h) & (x >= left) & (x < left + w)         # (R, 1, S, S)
    old = images[rows]
    images[rows] = torch.where(inside, torch.randn_like(old), old)
    return images


def smooth_targets(labels, num_classes, smoothing):
    """(B,) class indices -> (B, K) probabilities, `smoothing` of each spread over all classes."""
    return F.one_hot(labels, num_classes).float() * (1 - smoothing) + smoothing / num_classes


def mix(images, targets, mixup, cutmix, rng):
    """Mixup (arXiv 1710.09412) or CutMix (1905.04899), each half the time when both are on: one
    lambda, one box; everyone's partner is the batch read backwards. Targets mix alike."""
    if not (mixup or cutmix):
        return images, targets
    if cutmix and (not mixup or rng.random() < 0.5):
        lam, S = rng.betavariate(cutmix, cutmix), images.shape[-1]
        half = int(S * math.sqrt(1 - lam)) // 2
        cy, cx = rng.randrange(S), rng.randrange(S)
        y, Y, x, X = max(cy - half, 0), min(cy + half, S), max(cx - half, 0), min(cx + half, S)
        images[:, :, y:Y, x:X] = images[:, :, y:Y, x:X].flip(0)
        lam = 1 - (Y - y) * (X - x) / S**2   # what the clipped box really took
    else:
        lam = rng.betavariate(mixup, mixup)
        images = images.lerp(images.flip(0), 1 - lam)
    return images, targets.lerp(targets.flip(0), 1 - lam)


# ------------------------------------------------------------------------------------------------
# Data: the list of images in one array, which view is when, and what a loader worker does
# ------------------------------------------------------------------------------------------------

SUFFIXES = tuple(s.encode() for s in (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm",
                                      ".pgm", ".tif", ".tiff"))


def number_of(data):
    """Bytes -> a number below 2**56 that stands for them, the same in every process and run."""
    return int.from_bytes(hashlib.sha256(data).digest()[:7], "big")


class ImageFolder:
    """The images of root/<class>/*, sorted as text by class and name, without hidden files.

    Names are held in one array, not in a Python list, whose reference counts would copy it into
    every worker. classes: the list that numbers them (None: this folder's own). part: only images
    whose file name, hashed to 0..1, lies in this range, whatever is beside them. Raises InputError.
    """

    def __init__(self, root, classes=None, part=(0, 1)):
        if not os.path.isdir(root):
            raise InputError(f"there is no folder {root}: give --data a folder that holds "
                             "train/<class>/<image> and val/<class>/<image>, or --val-fraction "
                             "if it holds class folders only.")
        found = sorted(e.name for e in os.scandir(root) if e.is_dir() and e.name[0] != ".")
        if not found:
            raise InputError(f"{root} holds no class folders: put the images of each class into a "
                             "folder of its own.")
        names, counts = [], []
        for name in found:
            files = os.listdir(os.fsencode(os.path.join(root, name)))
            files = [f for f in files if f.lower().endswith(SUFFIXES) and f[:1] != b"."]
            if part != (0, 1):
                files = [f for f in files if part[0] <= number_of(f) / 2**56 < part[1]]
            names += sorted(files)
            counts.append(len(files))
        if not names:
            chosen = "" if part == (0, 1) else "among those that --val-fraction chooses "
            raise InputError(f"{root} holds no images {chosen}"
                             f"({' '.join(s.decode() for s in SUFFIXES)}).")
        self.root, self.classes, self.folders = root, found, found
        self.labels = np.repeat(np.arange(len(counts)), counts).astype(np.int32)
        self.first = np.cumsum([0, *counts])   # image of each folder, and the end
        self.starts = np.cumsum([0] + [len(n) for n in names])
        self.names = np.frombuffer(b"".join(names), np.uint8)
        if classes is not None:
            self.renumber(classes)

    def renumber(self, classes):
        """Labels by another list of classes, in which this folder's must be found."""
        strange = sorted(set(self.folders) - set(classes))
        if strange:
            raise InputError(f"{self.root} has classes that training does not know: "
                             f"{', '.join(strange[:3])} ({len(strange)} in all).")
        number = {name: i for i, name in enumerate(classes)}
        table = np.array([number[name] for name in self.folders], np.int32)
        self.classes, self.labels = list(classes), table[self.labels]

    def __len__(self):
        return len(self.labels)

    def fingerprint(self):
        """A number that tells this list of images from others."""
        parts = (self.names, self.starts, self.first, os.fsencode("/".join(self.folders)))
        return number_of(b"".join(map(bytes, parts)))

    def neighbours(self, i):
        """The range of the images in the folder of image i, and the folder's name."""
        k = int(self.first.searchsorted(i, "right")) - 1
        return self.first[k], self.first[k + 1], self.folders[k]

    def path(self, i):
        name = self.names[self.starts[i]:self.starts[i + 1]].tobytes()
        folder = os.path.join(self.root, self.neighbours(i)[2])
        return os.path.join(os.fsencode(folder), name)

    def open(self, i):
        """Image i as RGB. Raises whatever Pillow raises, which is more than OSError."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")   # broken EXIF, palettes: not the reader's concern
            with Image.open(self.path(i)) as image:
                return deit.to_rgb(image)

    def can_open(self, i):
        try:
            return bool(self.open(i))
        except Exception:   # Pillow raises OSError, SyntaxError, ValueError and many more
            return False


class TrainSampler:
    """This process's micro-batches, one item each, from step `start` to the last.

    The batch of a step is `batch` views in `batch // micro` micro-batches, numbered by k; process r
    of w does k = r, r + w, ... An epoch holds as many views as there are images, less the last
    incomplete batch; view v is the (v mod repeats)th of image order[v // repeats] (repeated
    augmentation: a third of the images, three views each, in the same batch where it fits).
    """

    def __init__(self, images, batch, micro, repeats, seed, rank, world, start, stop):
        self.images, self.batch, self.micro, self.repeats = images, batch, micro, repeats
        self.seed, self.rank, self.world, self.start, self.stop = seed, rank, world, start, stop

    def __len__(self):
        return (self.stop - self.start) * (self.batch // self.micro // self.world)

    def __iter__(self):
        epoch = None
        for step in range(self.start, self.stop):
            previous, (epoch, at) = epoch, divmod(step, self.images // self.batch)
            if epoch != previous:
                order = np.random.default_rng([self.seed, epoch]).permutation(self.images)
            for k in range(self.rank, self.batch // self.micro, self.world):
                v = at * self.batch + k * self.micro + np.arange(self.micro)
                yield epoch, step, k, order[v // self.repeats], v % self.repeats


class TrainViews:
    """Item (epoch, step, k, images (m,), views (m,)) of the sampler -> a whole micro-batch: uint8
    views (m, S, S, 3), labels (m,), erasing boxes (m, 4), and the images that could not be read.

    Consecutive views of one image come from one decoding. They are spread over the micro-batch by
    key, so that they are mixed with strangers. For a broken image the next of its class stands in.
    """

    def __init__(self, folder, size, seed, magnitude, erasing):
        self.folder, self.size, self.seed = folder, size, seed
        self.magnitude, self.erasing = magnitude, erasing

    def decode(self, i, broken):
        """Image i, or the next one of its class that can be read; adds what can not to `broken`."""
        start, stop, name = self.folder.neighbours(i)
        for j in itertools.chain(range(i, stop), range(start, i)):
            try:
                return self.folder.open(j)
            except Exception:   # Pillow raises OSError, SyntaxError, ValueError and many more
                broken.append(j)
        raise InputError(f"no image of class {name} in {self.folder.root} can be read.")

    def __getitem__(self, item):
        epoch, step, k, images, numbers = item
        m, S = len(images), self.size
        views, boxes = np.empty((m, S, S, 3), np.uint8), np.zeros((m, 4), np.int64)
        places = keyed(self.seed, "places", step, k).sample(range(m), m)
        broken, last = [], None
        for place, i, number in zip(places, images.tolist(), numbers.tolist()):
            if i != last:
                image, last = self.decode(i, broken), i
            rng = keyed(self.seed, epoch, i, number)
            views[place] = train_view(image, S, self.magnitude, rng)
            boxes[place] = erasing_box(S, self.erasing, rng)
        labels = np.empty(m, np.int64)
        labels[places] = self.folder.labels[images]
        broken = np.array(broken, np.int64)
        return tuple(map(torch.from_numpy, (views, labels, boxes, broken)))


class EvalViews:
    """Item (S, indices (m,), labels (m,)) -> uint8 central views (m, S, S, 3) and the labels, -1
    where an image is broken, which no answer matches."""

    def __init__(self, folder):
        self.folder = folder

    def __getitem__(self, item):
        size, indices, labels = item
        views, labels = np.zeros((len(indices), size, size, 3), np.uint8), labels.astype(np.int64)
        for place, i in enumerate(indices.tolist()):
            try:
                views[place] = deit.center_view(self.folder.open(i), size)
            except Exception:   # never substituted: it counts as wrong
                labels[place] = -1
        return torch.from_numpy(views), torch.from_numpy(labels)


def outlive_signals(worker):
    """Ctrl-C and a cluster's SIGTERM reach all processes at once: the workers serve the main one
    for 30 more seconds, in which it finishes its step, and end without an error of their own."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):   # not on Windows
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(30))
        signal.signal(signal.SIGALRM, lambda number, frame: os._exit(0))


def start_workers(dataset, items, env):
    """A loader of whole batches, and its first iterator: the workers run from now on, for all later
    iterators too. They are started before the processes are joined, since to fork among the threads
    of a process group can hang."""
    chosen = multiprocessing.get_start_method(allow_none=True)
    context = "fork" if env.workers and sys.platform == "linux" and not chosen else None
    loader = torch.utils.data.DataLoader(
        dataset, sampler=items, batch_size=None, num_workers=env.workers,
        persistent_workers=env.workers > 0, pin_memory=env.device.type == "cuda",
        worker_init_fn=outlive_signals, multiprocessing_context=context)
    return loader, iter(loader)


# ------------------------------------------------------------------------------------------------
# Evaluation: every image once, whatever the number of processes
# ------------------------------------------------------------------------------------------------

def all_sum(tensor):
    """The tensor's sum over the processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


@torch.no_grad()
def evaluate(models, loader, indices, size, batch, env, signals=()):
    """Accuracy in percent of each of the models {name: module} on images of the loader's folder,
    {name: {"cls", "dist", "both": top-1, "cls5", "dist5", "both5": top-5}}, and how many were
    unreadable. Each process takes its share of the images, in batches; once a signal has come, the
    rest is left out."""
    mine, numbers = indices[env.rank::env.world], loader.dataset.folder.labels
    parts = [mine[i:i + batch] for i in range(0, len(mine), batch)]
    loader.sampler[:] = [(size, part, numbers[part]) for part in parts]   # its workers' next items
    was_training = [model.training for model in models.values()]
    # right answers (models, heads: cls dist both, top-1 top-5); the last row's first: unreadable
    counts = torch.zeros(len(models) + 1, 3, 2, device=env.device)
    for views, labels in loader:
        if signals:
            break
        images, labels = normalise(views, env.device), labels.to(env.device)[:, None]
        counts[-1, 0, 0] += (labels < 0).sum()
        for row, model in zip(counts, models.values()):
            model.eval()
            with env.autocast():
                cls_logits, dist_logits = (x.float() for x in deit.both_heads(model, images))
            both = (cls_logits + dist_logits) / 2
            for cell, logits in zip(row, (cls_logits, dist_logits, both)):
                hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels     # (B, 5)
                cell += torch.stack([hits[:, 0].sum(), hits.sum()])
    for model, mode in zip(models.values(), was_training):
        model.train(mode)
    counts = all_sum(counts).tolist()
    scores = {name: {head + top: 100 * row[i][j] / len(indices)
                     for i, head in enumerate(("cls", "dist", "both"))
                     for j, top in enumerate(("", "5"))}
              for name, row in zip(models, counts)}
    return scores, int(counts[-1][0][0])


# ------------------------------------------------------------------------------------------------
# Saving
# ------------------------------------------------------------------------------------------------

def write_atomically(path, write, keep=None):
    """write(file) into a file beside `path`, onto the disk, then renamed: `path` is always whole.
    What was there before is kept as `keep`. Raises OSError; what was there is then still there,
    perhaps as `keep`."""
    try:
        with open(path + ".tmp", "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        if keep and os.path.exists(path):
            os.replace(path, keep)
        os.replace(path + ".tmp", path)
    except (OSError, RuntimeError) as e:   # torch.save wraps a failing write into a RuntimeError
        with contextlib.suppress(OSError):
            os.remove(path + ".tmp")
        raise OSError(f"{path} could not be written ({str(e).splitlines()[0]})") from e


def write_log(path, log):
    """The epochs' records, one JSON line each."""
    write_atomically(path, lambda f: f.write("".join(json.dumps(r) + "\n" for r in log).encode()))


def read_last(paths, say):
    """The first of the checkpoints that is whole, and its path; None, None if there is no file."""
    there, reasons = [path for path in paths if os.path.exists(path)], []
    for path in there:
        try:
            return deit.read_checkpoint(path), path
        except InputError as e:
            reasons.append(str(e))
            say(f"unusable       {e}")
    if there:
        raise InputError(" ".join(reasons) + " Choose another --output to start anew.")
    return None, None


# These flags may differ when a run is resumed, for they do not change its result; those in the
# second set do, but they are what gets a run going again that diverged or met a smaller memory.
FREE_FLAGS = {"data", "output", "resume", "eval", "benchmark", "workers", "device", "log_every",
              "save_minutes", "compile", "tensorboard"}
REMEDIES = {"lr", "min_lr", "clip_grad", "amp", "micro_batch"}


# ------------------------------------------------------------------------------------------------
# Flags
# ------------------------------------------------------------------------------------------------

def parse(argv):
    p = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False,
                                usage="%(prog)s [--data DIR] [flags]")
    p.add_argument("--data", metavar="DIR", help="folder of train/<class>/* and val/<class>/*")
    p.add_argument("--val-fraction", metavar="X", type=float, default=0.0, help="DIR holds class "
                   "folders only: validate on this part of their images, chosen by file name [0]")

    def group(title):
        def add(flag, meaning, default=None, type=None, **how):
            shown = "" if "[" in meaning or how.get("action") else f" [{default}]"
            how = how if "action" in how else {"type": type, "default": default} | how
            g.add_argument(flag, help=meaning + shown, **how)
        g = p.add_argument_group(title)
        return add

    add = group("model")
    add("--model", "a DeiT, or any torchvision classifier (to train a teacher)",
        "deit_small_distilled_patch16_224", metavar="NAME")
    add("--img-size", "side in pixels [the model's: 224 or 384]", type=int, metavar="S")
    add("--patch-size", "side in pixels [16]", type=int, metavar="P")
    add("--embed-dim", "width [the model's]", type=int, metavar="D")
    add("--depth", "number of blocks [12]", type=int, metavar="N")
    add("--num-heads", "attention heads [the model's]", type=int, metavar="h")
    add("--drop-path", "stochastic depth of the last block, rising from 0 at the first [0.1]",
        type=float, metavar="X")
    add("--finetune", "initial weights: a file, URL or published name [random]", metavar="SOURCE")
    add("--pretrained", "short for --finetune with the model's own name", action="store_true")

    add = group("distillation")
    add("--distillation", "what is learned from the teacher: its choice (hard), its probabilities "
        "(soft), nothing [hard for a distilled model, none for others]",
        choices=["hard", "soft", "none"])
    add("--teacher", "a torchvision classifier or a DeiT", "regnet_y_16gf", metavar="NAME")
    add("--teacher-weights", "torchvision's name, a file, or none for random ones", "IMAGENET1K_V2",
        metavar="W")
    add("--alpha", "weight of the distillation loss [0.5 hard, 0.1 soft]", type=float, metavar="X")
    add("--tau", "temperature of soft distillation", 3.0, float, metavar="X")

    add = group("optimisation")
    add("--epochs", "each of as many views as there are training images", 300, int, metavar="N")
    add("--batch-size", "views per optimizer step, over all processes", 1024, int, metavar="N")
    add("--micro-batch", "views in one forward pass, which are mixed together [128, or batch / "
        "processes if that is less]", type=int, metavar="N")
    add("--lr", "peak learning rate, per 512 views", 5e-4, float, metavar="X")
    add("--min-lr", "floor of the cosine", 1e-5, float, metavar="X")
    add("--warmup-epochs", "of linear warm-up from 1e-6", 5.0, float, metavar="N")
    add("--weight-decay", "of AdamW", 0.05, float, metavar="X")
    add("--smoothing", "of the true labels", 0.1, float, metavar="X")
    add("--clip-grad", "largest gradient norm, 0: off", 0.0, float, metavar="X")
    add("--ema-decay", "of averaged weights, kept in last.pt, 0: off", 0.99996, float, metavar="X")

    add = group("augmentation")
    add("--repeats", "views of an image in an epoch's batches", 3, int, metavar="N")
    add("--randaugment", "magnitude 0..10, 0: off", 9.0, float, metavar="M")
    add("--mixup", "alpha, 0: off", 0.8, float, metavar="A")
    add("--cutmix", "alpha, 0: off", 1.0, float, metavar="A")
    add("--erasing", "probability", 0.25, float, metavar="P")

    add = group("running")
    add("--output", "folder for last.pt, best.pt, log.jsonl [runs/MODEL]", metavar="DIR")
    add("--resume", "go on from OUTPUT/last.pt if there is one, else start", action="store_true")
    add("--save-minutes", "between saves inside an epoch", 15.0, float, metavar="N")
    add("--eval", "only evaluate a file, URL or published name [off]", metavar="SOURCE")
    add("--benchmark", "only time the stages of a run with these flags", action="store_true")
    add("--tensorboard", "write the epochs' records for it into OUTPUT too", action="store_true")
    add("--amp", "mixed precision; auto is bf16 where the hardware has it", "auto",
        choices=["auto", "bf16", "fp16", "off"])
    add("--compile", "torch.compile the model and the teacher", action="store_true")
    add("--workers", "loader processes per training process; as many again wait for validation "
        "[its share of cores, at most 16]", type=int, metavar="N")
    add("--seed", "of everything drawn", 0, int, metavar="N")
    add("--device", "cuda, mps or cpu [the best there is]", metavar="D")
    add("--log-every", "steps between live lines", 50, int, metavar="N")
    args = p.parse_args(argv)
    check(args)
    return args


def check(args):
    """Refuses impossible numbers."""
    rules = (
        ("epochs batch_size micro_batch repeats log_every tau lr img_size patch_size embed_dim "
         "depth num_heads", lambda x: 0 < x < math.inf, "it must be above 0"),
        ("min_lr weight_decay clip_grad mixup cutmix seed warmup_epochs workers save_minutes",
         lambda x: 0 <= x < math.inf, "it must be 0 or more"),
        ("smoothing erasing alpha", lambda x: 0 <= x <= 1, "it must lie in 0..1"),
        ("drop_path ema_decay val_fraction", lambda x: 0 <= x < 1, "it must lie in 0..1, below 1"),
        ("randaugment", lambda x: 0 <= x <= 10, "it must lie in 0..10"),
        ("warmup_epochs", lambda x: args.eval or x < args.epochs, "it must be shorter than the run "
         f"of {args.epochs} epochs"))
    for names, holds, what in rules:
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not holds(value):
                raise InputError(f"--{name.replace('_', '-')} is {value}: {what}.")
    if args.pretrained and args.finetune:
        raise InputError(f"--pretrained means --finetune {args.model}: leave out one of the two.")


# ------------------------------------------------------------------------------------------------
# The training run
# ------------------------------------------------------------------------------------------------

class Environment:
    """Where this process runs: its rank in the world, device, precision, loader workers."""

    def __init__(self, device, amp, workers):
        self.rank, self.world, self.local_rank, self.local_world = (
            int(os.environ.get(name, default)) for name, default in
            (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
        if int(os.environ.get("SLURM_PROCID", 0)) > 0 and "RANK" not in os.environ:
            raise InputError("srun started several processes that do not know of one another: "
                             "let it start one torchrun a node, which starts one process a GPU (or "
                             "unset SLURM_PROCID if these are separate runs).")
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu"
        name = device or best
        if name.startswith("cuda") and not torch.cuda.is_available():
            raise InputError(f"--device {name}, but PyTorch finds no CUDA here: take --device cpu, "
                             "or install a driver and a CUDA build of PyTorch.")
        try:
            self.device = torch.device(f"cuda:{self.local_rank}" if name == "cuda" else name)
            torch.empty(1, device=self.device)
        except (RuntimeError, AssertionError) as e:
            raise InputError(f"--device {name} cannot be used: {str(e).splitlines()[0]}") from e
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")   # TF32 where float32 is left
            torch.backends.cudnn.benchmark = True
        self.amp = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}.get(amp)
        if amp == "auto":
            self.amp = self.best_precision()
        self.precision = str(self.amp or torch.float32)[6:]
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.workers = max(1, min(16, cores // self.local_world)) if workers is None else workers

    def best_precision(self):
        if self.device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
        units = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")   # without, it is emulated
        has = self.device.type == "cpu" and any(getattr(torch.cpu, u, bool)() for u in units)
        return torch.bfloat16 if has else None

    def autocast(self):
        return torch.autocast(self.device.type, self.amp, enabled=self.amp is not None)

    def say(self, text, end="\n"):
        """Prints, in the first process only; in a terminal it clears what a longer line left."""
        if self.rank == 0:
            print(("\x1b[K" if sys.stdout.isatty() else "") + text, end=end, flush=True)

    def join(self):
        """torchrun's processes become one group; alone, nothing."""
        if self.world > 1:
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")

    def agree(self, code):
        """The highest of the processes' codes: what one of them wants, all do."""
        if self.world > 1:
            flag = torch.tensor([code])
            dist.all_reduce(flag, dist.ReduceOp.MAX)
            return flag.item()
        return code


@contextlib.contextmanager
def caught_signals():
    """A list of the SIGTERM (pre-emption) and SIGINT (Ctrl-C) that came; they are only noted, but
    the fourth ends the program where it is."""
    came, former = [], {}

    def note(number, frame):
        came.append(number)
        if len(came) > 3:
            os._exit(128 + number)

    with contextlib.suppress(ValueError):   # not in the main thread: as by default
        for number in (signal.SIGTERM, signal.SIGINT):
            former[number] = signal.signal(number, note)
    try:
        yield came
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


def must_accept(model, name, size=None):
    """The model, if it takes images of that size (torchvision's transformers take one only)."""
    size, mode = size or model.config["img_size"], model.training
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, 3, size, size))
    except (RuntimeError, AssertionError, ValueError) as e:
        raise InputError(f"{name} takes no images of {size} px ({str(e).splitlines()[0]}).") from e
    return model.train(mode)


def by_turns(env, load):
    """What load() returns, the first process of each node going first: if that downloads a file,
    the others find it."""
    for turn in (0, 1):
        if turn == (env.local_rank > 0):
            result = load()
        if env.world > 1:
            dist.barrier()
    return result


def run_eval(args, env):
    """--eval: the accuracies of a checkpoint on DATA/val, by each head."""
    folder = ImageFolder(*splits(args)[1])
    loader, _ = start_workers(EvalViews(folder), [], env)
    env.join()
    overrides = {} if args.img_size is None else {"img_size": args.img_size}
    model = by_turns(env, lambda: deit.load_model(args.eval, say=env.say, **overrides))
    model = must_accept(model, args.eval).to(env.device)
    folder.renumber(model.classes or folder.classes)
    known, size = model.config["num_classes"], model.config["img_size"]
    if known != len(folder.classes):
        raise InputError(f"{args.eval} knows {known} classes, {folder.root} has "
                         f"{len(folder.classes)}.")
    every = np.arange(len(folder))
    scores, broken = evaluate({"it": model}, loader, every, size, args.micro_batch or 128, env)
    score, unreadable = scores["it"], f", {broken} unreadable, counted as wrong" if broken else ""
    env.say(f"{args.eval}: {len(folder)} images at {size} px, {env.precision}{unreadable}")
    names = (("cls", "class head"), ("dist", "distillation head"), ("both", "both"))
    for key, name in names if getattr(model, "num_tokens", 1) == 2 else names[:1]:
        env.say(f"  {name:18s} top-1 {score[key]:6.3f} %   top-5 {score[key + '5']:6.3f} %")
    return score


def create_student(args, size, num_classes):
    """The model to be trained, with its architecture in `.config`."""
    flags = ("patch_size", "embed_dim", "depth", "num_heads", "drop_path")
    given = {f: getattr(args, f) for f in flags if getattr(args, f) is not None}
    given["img_size"] = size
    if args.model in deit.VARIANTS:
        given = {"drop_path": 0.1} | given
    return must_accept(deit.create_classifier(args.model, num_classes, **given), args.model)


def create_teacher(args, mode, classes, size, env):
    """The frozen teacher on the device; None when nothing is to be learned from one."""
    given = [f for f in ("teacher", "teacher_weights", "alpha", "tau")
             if getattr(args, f) != getattr(parse([]), f)]
    if given and not args.distillation and mode == "none":
        raise InputError(f"--{given[0].replace('_', '-')} is given, but {args.model} learns from a "
                         "teacher only with --distillation hard or soft: add it, or drop both.")
    if mode == "none":
        return None
    weights = None if args.teacher_weights == "none" else args.teacher_weights
    teacher = by_turns(env, lambda: deit.load_teacher(args.teacher, weights, len(classes),
                                                      img_size=size))
    must_accept(teacher, args.teacher, size)
    if teacher.classes not in (None, classes):
        raise InputError(f"the teacher {weights} was trained on other classes than {args.data}'s: "
                         f"{', '.join(teacher.classes[:3])}, ...; train one on these.")
    return teacher.to(env.device)


def try_teacher(args, teacher, val_loader, size, batch, env):
    """Prints the teacher's accuracy on some validation images; refuses one that knows nothing."""
    val = val_loader.dataset.folder
    some = np.unique(np.linspace(0, len(val) - 1, 512).astype(np.int64))
    accuracy = evaluate({"it": teacher}, val_loader, some, size, batch, env)[0]["it"]["cls"]
    env.say(f"teacher        {args.teacher} {args.teacher_weights}, {accuracy:.1f} % right on "
            f"{len(some)} validation images")
    chance = 1 / len(val.classes)
    bound = chance + 2 * math.sqrt(chance * (1 - chance) / len(some))   # two standard errors
    if args.teacher_weights != "none" and accuracy / 100 <= bound < 0.9:   # else too few to tell
        raise InputError(f"the teacher is right on {accuracy:.1f} % of {len(some)} validation "
                         "images, no better than chance: its classes are in another order than "
                         f"{args.data}'s, or it is not trained.")


def pair(output):
    """What a model in training returned, as (class logits, distillation logits)."""
    return output if isinstance(output, tuple) else (output, output)


def update_ema(ema, model, decay):
    """ema = decay ema + (1 - decay) model, in few kernels; buffers (statistics) are copied."""
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - decay)
        for mine, theirs in zip(ema.buffers(), model.buffers()):
            mine.copy_(theirs)


def average_buffers(model, world):
    """In place, the mean over the processes of the batch statistics, which each one gathers alone
    (convnets only; DeiT has none)."""
    for buffer in model.buffers():
        if world > 1 and buffer.is_floating_point():
            all_sum(buffer).div_(world)


def gather_union(numbers, world):
    """The union of the processes' sets."""
    everyone = [numbers]
    if world > 1:
        everyone = [None] * world
        dist.all_gather_object(everyone, numbers)
    return set().union(*everyone)


def clock(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def epoch_line(r):
    """One aligned line an epoch."""
    ema = f"  ema {r['ema_both']:5.2f}" if "ema_both" in r else ""
    agreement = f"  agreement {r['agreement']:4.1f}" if "agreement" in r else ""
    unreadable = f"  {r['unreadable']} unreadable" if r["unreadable"] else ""
    unreadable += f"  {r['skipped_steps']} steps skipped" if r.get("skipped_steps") else ""
    return (f"epoch {r['epoch']:3d}  loss {r['train_loss']:6.3f}  top-1 % of {r['val_images']}: "
            f"class {r['cls']:5.2f}  dist {r['dist']:5.2f}  both {r['both']:5.2f}{ema}{agreement}"
            f"{unreadable}  {r['img_per_s']:.0f} img/s  {clock(r['seconds'])}")


def wrap(model, args, env):
    """The model as it is trained: compiled with --compile, gradients averaged over processes."""
    net = torch.compile(model) if args.compile else model
    if env.world > 1:
        net = torch.nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True)
        net.broadcast_buffers = False   # batch statistics: see average_buffers
    return net


def splits(args):
    """ImageFolder's arguments (root, classes, part) for the training and the validation images."""
    train, val = (os.path.join(args.data, name) for name in ("train", "val"))
    if not args.val_fraction:
        return (train,), (val,)
    there = val if os.path.isdir(val) else train
    if os.path.isdir(there):
        raise InputError(f"there is a folder {there}, but --val-fraction is for class folders that "
                         "lie in DIR itself: leave it out, or give the folder that they are in.")
    at = args.val_fraction
    return (args.data, None, (at, 1)), (args.data, None, (0, at))


def prepare(args, env, former_micro=None):
    """What follows from flags and data, if it fits together: the distillation mode, the views in a
    micro-batch (unless given, as before in this run), the images' side, the training and the
    validation images. Raises InputError."""
    is_distilled = args.model in deit.VARIANTS and deit.VARIANTS[args.model][3]
    mode = args.distillation or ("hard" if is_distilled else "none")
    if is_distilled and mode == "none":
        raise InputError(f"{args.model} learns from a teacher: without one (--distillation none) "
                         f"take --model {args.model.replace('distilled_', '')}.")
    batch, world = args.batch_size, env.world
    micro = args.micro_batch or former_micro or max(1, min(128, batch // world))
    if batch < micro * world or batch % (micro * world):
        nearest = max(1, round(batch / (micro * world))) * micro * world
        fitting = [m for m in range(1, micro) if batch % (m * world) == 0]
        smaller = f"--micro-batch {fitting[-1]} or " if fitting else ""
        raise InputError(f"--batch-size {batch} is not processes x micro-batch x an integer "
                         f"({world} x {micro} x n): take {smaller}--batch-size {nearest}.")
    size = args.img_size or deit.VARIANTS.get(args.model, (0, 0, 224))[2]
    train, val = (ImageFolder(*where) for where in splits(args))
    empty = [c for c, a, b in zip(train.classes, train.first, train.first[1:]) if a == b]
    if empty:
        beside = " beside those of --val-fraction" if args.val_fraction else ""
        raise InputError(f"{os.path.join(train.root, empty[0])} holds no images to train on"
                         f"{beside}: add some, or remove the folder ({len(empty)} such in all).")
    val.renumber(train.classes)
    if len(train.classes) < 2:
        raise InputError(f"{train.root} holds one class only, {train.classes[0]}: there is no "
                         "choice to learn.")
    if args.lr * batch / 512 < args.min_lr:
        raise InputError(f"the peak learning rate, {args.lr} x {batch} / 512 views, is below "
                         f"--min-lr {args.min_lr}: raise --lr or lower --min-lr.")
    if len(train) < batch and not args.benchmark:
        raise InputError(f"{train.root} holds {len(train)} images, fewer than a batch of {batch}: "
                         "lower --batch-size.")
    return mode, micro, size, train, val


def must_be_alike(env, otherwise, *numbers):
    """Refuses processes that do not start with the same numbers: whose highest is not the lowest,
    which is minus the highest of the negatives."""
    if any(env.agree(x) != -env.agree(-x) for x in numbers):
        raise InputError(f"the processes do not start alike: {otherwise}.")


def must_continue(saved, path, flags, say):
    """Refuses a checkpoint that is not the beginning of a run with these flags; a remedy that was
    not applied before is said."""
    if not {"flags", "classes", "ema", "optimizer", "step", "sums"} <= saved.keys() or (
            saved["optimizer"] is None):
        raise InputError(f"{path} is no save to go on from: choose another --output, or start "
                         "from it with --finetune.")
    before = vars(parse([])) | saved["flags"] | {"classes": saved["classes"]}
    changed = [f for f in flags if f not in FREE_FLAGS and flags[f] != before.get(f)]
    fixed = [f for f in changed if f not in REMEDIES]
    if fixed:
        raise InputError(f"{path} is of a run with other {', '.join(fixed)}: give the same "
                         "again, or another --output.")
    for f in changed:
        say(f"changed        --{f.replace('_', '-')} from {before.get(f)} to {flags[f]}")


def run(args, env, signals):
    """Trains args.model on args.data; returns the log, one record an epoch. Once a signal is in the
    list `signals`, saves and exits. Raises InputError."""
    say, device, world = env.say, env.device, env.world
    output = args.output or os.path.join("runs", args.model)
    last_path, prev_path, best_path, log_path = (
        os.path.join(output, name) for name in ("last.pt", "last.prev.pt", "best.pt", "log.jsonl"))
    if not args.resume and any(map(os.path.exists, (last_path, prev_path, best_path))):
        raise InputError(f"{output} holds a run: add --resume to go on with it, or choose another "
                         "--output.")

    saved, path = read_last((last_path, prev_path), say) if args.resume else (None, None)
    if saved is None and os.path.exists(best_path) and (
            deit.read_checkpoint(best_path).get("epoch", 2) > 1):   # 1: killed before its last.pt
        raise InputError(f"{output} holds best.pt, but no last.pt to go on from: move it away, or "
                         "choose another --output.")

    former_micro = saved["flags"].get("micro_batch") if saved and "flags" in saved else None
    mode, micro, size, train, val = prepare(args, env, former_micro)
    if args.tensorboard:
        from torch.utils.tensorboard import SummaryWriter
    batch, classes, K = args.batch_size, train.classes, len(train.classes)
    accumulation, epoch_steps = batch // (micro * world), len(train) // batch
    total_steps, warmup_steps = args.epochs * epoch_steps, round(args.warmup_epochs * epoch_steps)
    peak = args.lr * batch / 512
    args.micro_batch = micro   # known from now on, also to in_a_sentence
    flags = vars(args) | {"training images": len(train), "classes": classes}
    if saved:
        must_continue(saved, path, flags, say)
        say(f"resumed        {path}, {saved['step']} of {total_steps} steps done")
        if env.rank == 0:
            write_log(log_path, saved["log"])

    # What changes while it runs: all of it is in a checkpoint. Sums, of this epoch: loss, agreeing
    # views, micro-batches, skipped steps; in float64, which adds up the same in any order. Bad:
    # steps in a row whose gradients were not finite.
    step, best, log = (saved[key] for key in ("step", "best", "log")) if saved else (0, -1.0, [])
    with contextlib.suppress(InputError):   # best.pt is newer if the last save was cut short
        if saved and os.path.exists(best_path):
            best = max(best, deit.read_checkpoint(best_path).get("best", -1.0))
    bad, sums, broken = torch.zeros((), device=device), torch.zeros(4, device=device), set()
    sums = sums if device.type == "mps" else sums.double()

    dataset = TrainViews(train, size, args.seed, args.randaugment, args.erasing)
    sampler = TrainSampler(len(train), batch, micro, args.repeats, args.seed, env.rank, world,
                           step, total_steps)
    val_loader, _ = start_workers(EvalViews(val), [], env)
    _, batches = start_workers(dataset, sampler, env)
    env.join()
    must_be_alike(env, "--output must be on a disk that all of them share", step)
    if len(log) == args.epochs:
        say(f"finished       nothing left to do, best top-1 {best:.2f} %")
        return log
    must_be_alike(env, "--data must hold the same images for all of them", train.fingerprint(),
                  val.fingerprint())
    chosen = (device.type, env.precision, args.log_every, args.compile,
              [flags[f] for f in sorted(flags.keys() - FREE_FLAGS)])
    must_be_alike(env, "all of them need the same flags, --device and --amp too where their "
                  "hardware differs", number_of(repr(chosen).encode()))

    # Three names: model is raw (saved, evaluated), net compiled and wrapped (trained), ema averaged
    torch.manual_seed(keyed(args.seed, "weights").getrandbits(63))
    model = create_student(args, size, K)
    first = args.model if args.pretrained else args.finetune
    if saved:
        model.load_state_dict(saved["model"])
    elif first:
        by_turns(env, lambda: deit.load_weights(model, first, classes=classes, say=say))
    if first or saved:   # else equal by their seed, to rounding, and made so when wrapped
        sums_of_bits = [p.detach().view(torch.int32).sum().item() for p in model.parameters()]
        must_be_alike(env, f"{path or first} must be the same file for all of them",
                      number_of(repr(sums_of_bits).encode()))
    model = model.to(device)
    net = wrap(model, args, env)
    ema = copy.deepcopy(model).requires_grad_(False) if args.ema_decay else None
    groups = parameter_groups(model, args.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=peak, fused=device.type in ("cuda", "cpu"))
    scaler = torch.amp.GradScaler(device.type, enabled=env.amp == torch.float16)
    if saved:
        if ema:
            ema.load_state_dict(saved["ema"])
        optimizer.load_state_dict(saved["optimizer"])
        if saved["scaler"]:   # empty when it was not fp16 before
            scaler.load_state_dict(saved["scaler"])
        broken.update(i for i in saved["unreadable"] if not train.can_open(i))   # mended since?
        sums += torch.tensor(saved["sums"], dtype=sums.dtype).to(device) * (env.rank == 0)
    if saved and path == prev_path and env.rank == 0 and os.path.exists(last_path):
        os.remove(last_path)   # damaged: it must not become the next last.prev.pt
    del saved

    def stop_if_not_finite(loss):
        """Gradients that are not finite: fp16's scaler skips such steps, but not for ever."""
        if not math.isfinite(loss) or bad > (20 if scaler.is_enabled() else 0):
            raise InputError(f"loss or gradients are not finite at step {step}, loss {loss:.3g}, "
                             f"lr {lr:.2e}: try --amp off (or bf16), --clip-grad 1 or a lower "
                             f"--lr; the last good save in {output} is kept.")

    def save(is_best=False):
        """last.pt (the former becomes last.prev.pt), log.jsonl and, if so, best.pt, which lacks
        what only going on needs. Called by all processes, written by the first. Returns 0 if
        all was written, 1 if best.pt alone was (when asked for), 2 if nothing."""
        total, unreadable = all_sum(sums.clone()).tolist(), sorted(gather_union(broken, world))
        stop_if_not_finite(total[0])
        whole = {
            "model": model.state_dict(), "ema": ema.state_dict() if ema else None,
            "optimizer": optimizer.state_dict(), "scaler": scaler.state_dict(),
            "epoch": step // epoch_steps, "step": step, "best": best, "log": log, "sums": total,
            "unreadable": unreadable, "config": {"name": args.model, **model.config},
            "classes": classes, "flags": {k: v for k, v in flags.items() if k != "classes"},
            "preprocessing": {"size": size, "crop_ratio": deit.CROP_RATIO,
                              "interpolation": "bicubic", "mean": list(deit.IMAGENET_MEAN),
                              "std": list(deit.IMAGENET_STD)},
        }
        missing = 0
        if env.rank == 0:
            try:
                missing = 2
                if is_best:
                    light = whole | dict.fromkeys(("ema", "optimizer", "scaler"))
                    write_atomically(best_path, lambda f: torch.save(light, f))
                missing = 1
                write_atomically(last_path, lambda f: torch.save(whole, f), keep=prev_path)
                write_log(log_path, log)
                missing = 0
            except OSError as e:
                say(f"not saved      {e}; the former save stands")
        return env.agree(missing)

    def save_and_stop_if_told(code):
        """Saves; then leaves if the code, on which the processes agree, is a signal's number."""
        missing = save()
        if code > 1:
            say(f"stopped        by {signal.Signals(code).name} after step {step}, "
                f"{'NOT saved' if missing else 'saved'} in {output}: --resume goes on")
            raise SystemExit(128 + code)

    teacher = create_teacher(args, mode, classes, size, env)
    if teacher:
        try_teacher(args, teacher, val_loader, size, micro, env)
        if args.compile:
            teacher.compile()   # only now: its first call made the copy in autocast's type
    decayed, exempt = ([p.numel() for p in group["params"]] for group in groups)
    say(f"model          {args.model}, {sum(decayed) + sum(exempt):,} parameters, {size} px\n"
        f"data           {len(train)} training and {len(val)} validation images of {K} classes\n"
        f"batch          {batch} views = {world} processes x {micro} micro-batch x {accumulation} "
        f"accumulated; {args.repeats} views an image\n"
        f"schedule       {args.epochs} epochs of {epoch_steps} steps, lr {peak:.3g} after "
        f"{warmup_steps} steps of warm-up\n"
        f"weight decay   {args.weight_decay} on {len(decayed)} tensors ({sum(decayed):,}), none on "
        f"{len(exempt)} ({sum(exempt):,})\n"
        f"distillation   {mode}\n"
        f"running on     {device}, {env.precision}, {env.workers} loader "
        f"workers, torch {torch.__version__}, output in {output}")
    if env.rank == 0:
        os.makedirs(output, exist_ok=True)
    board = SummaryWriter(output, purge_step=len(log) + 1, flush_secs=1) if (
        args.tensorboard and env.rank == 0) else None

    mine = range(env.rank, batch // micro, world)   # the k's of this process
    one, live = torch.ones((), device=device), sys.stdout.isatty()
    waited, first_step, run_start = 0.0, step, time.perf_counter()
    epoch_start = last_save = run_start
    model.train()

    while len(log) < args.epochs:
        while step < (len(log) + 1) * epoch_steps:
            lr = lr_at(step, peak, args.min_lr, warmup_steps, total_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            for k in mine:
                # 1. batch: uint8 views from the workers
                asked = time.perf_counter()
                views, labels, boxes, unreadable = next(batches)
                broken.update(unreadable.tolist())
                waited += time.perf_counter() - asked
                # 2. mix: normalise, erase, mixup or CutMix, on the device
                rng = keyed(args.seed, "device", step, k)
                torch.manual_seed(rng.getrandbits(63))   # of erasing's noise and drop paths
                images = erase(normalise(views, device), boxes)
                labels = labels.to(device, non_blocking=True)
                targets = smooth_targets(labels, K, args.smoothing)
                images, targets = mix(images, targets, args.mixup, args.cutmix, rng)
                if world > 1:   # gradients are averaged over the processes once a step
                    net.require_backward_grad_sync = k == mine[-1]
                with env.autocast():
                    # 3. teacher: it sees exactly the student's pixels
                    teacher_logits = teacher(images) if teacher else None
                    # 4. student
                    cls_logits, dist_logits = pair(net(images))
                # 5. loss
                loss = deit.distillation_loss(cls_logits, dist_logits, targets, teacher_logits,
                                              mode, args.alpha, args.tau)
                # 6. backward
                scaler.scale(loss / accumulation).backward()
                answers = teacher_logits.argmax(1) if teacher else torch.full_like(labels, -1)
                agreement = (dist_logits.argmax(1) == answers).float().mean()
                loss, counted = loss.detach(), one
                if scaler.is_enabled():   # a loss that overflows is skipped, and not counted
                    counted = loss.isfinite().float()
                    loss = torch.where(loss.isfinite(), loss, 0)
                sums[:3] += torch.stack([loss, agreement * counted, counted])
            # 7. step
            scaler.unscale_(optimizer)
            norm = torch.nn.utils.get_total_norm(
                p.grad for p in model.parameters() if p.grad is not None)
            if args.clip_grad:
                torch.nn.utils.clip_grads_with_norm_(model.parameters(), args.clip_grad, norm)
            bad = torch.where(norm.isfinite(), 0, bad + 1)
            sums[3] += (bad > 0) / world
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            # 8. average
            if ema:
                update_ema(ema, model, ema_decay_at(step, args.ema_decay))
            step += 1
            # 9. log
            at = (step - 1) % epoch_steps + 1
            if at % args.log_every == 0 or at == epoch_steps:
                total, now = all_sum(sums.clone()).tolist(), time.perf_counter()
                mean_loss = total[0] / max(1, total[2])
                stop_if_not_finite(mean_loss)
                pace = (now - run_start) / (step - first_step)   # seconds, evaluation included
                if live or at < epoch_steps:   # else the epoch's line follows at once
                    say(f"epoch {len(log) + 1} step {at}/{epoch_steps}  loss {mean_loss:.3f}  lr "
                        f"{lr:.2e}  {batch / pace:.0f} img/s  waiting for data "
                        f"{100 * waited / (now - epoch_start):.0f} %  "
                        f"{clock(pace * (total_steps - step))} left ", end="\r" if live else "\n")
            # 10. save, when it is time or the run is told to stop
            late = env.rank == 0 and time.perf_counter() - last_save > 60 * args.save_minutes
            # 0: go on; 1: a save is due; above: the signal's number
            code = env.agree(signals[-1] if signals else int(late))
            if code:
                save_and_stop_if_told(code)
                last_save = time.perf_counter()

        # An epoch is done: evaluate, record, save
        seconds = time.perf_counter() - epoch_start
        models = {"model": model} | ({"ema": ema} if ema else {})
        for each in models.values():
            average_buffers(each, world)
        scores, bad_val = evaluate(models, val_loader, np.arange(len(val)), size, micro, env,
                                   signals)
        code = env.agree(signals[-1] if signals else 0)
        if code:   # the evaluation was cut short: it is repeated when the run goes on
            save_and_stop_if_told(code)
        total, agreed, micro_batches, skipped = all_sum(sums.clone()).tolist()
        broken = gather_union(broken, world)
        lr = lr_at(step - 1, peak, args.min_lr, warmup_steps, total_steps)
        record = {"epoch": len(log) + 1, "step": step, "lr": lr,
                  "train_loss": total / max(1, micro_batches)}
        record |= {key: scores["model"][key] for key in ("cls", "dist", "both")}
        if ema:
            record |= {"ema_" + key: scores["ema"][key] for key in ("cls", "dist", "both")}
        if teacher:
            record["agreement"] = 100 * agreed / max(1, micro_batches)
        if scaler.is_enabled():
            record["skipped_steps"] = round(skipped)
        log.append(record | {
            "val_images": len(val), "unreadable": len(broken) + bad_val,
            "img_per_s": (step - max(first_step, step - epoch_steps)) * batch / seconds,
            "waiting": waited / seconds, "seconds": time.perf_counter() - epoch_start})
        say(epoch_line(log[-1]))
        for key, value in log[-1].items() if board else ():
            board.add_scalar(key, value, len(log))
        former, best = best, max(record["both"], best)
        sums.zero_()
        missing = save(is_best=best > former)
        if missing == 2:
            best = former   # so that the next good epoch is kept
        waited, epoch_start = 0.0, time.perf_counter()
        last_save = epoch_start
        if broken:
            named = ", ".join(repr(os.fsdecode(train.path(i))) for i in sorted(broken)[:3])
            say(f"unreadable     {len(broken)} training images, others of their class stand "
                f"in: {named}")
        if len(broken) > len(train) / 100:
            raise InputError(f"{len(broken)} of {len(train)} training images cannot be read, "
                             f"more than 1 %: mend them ({named}), then --resume.")
    if missing:
        raise InputError(f"the run is done, but its last save in {output} failed: make room and "
                         "add --resume, which repeats what is missing.")
    say(f"finished       in {clock(time.perf_counter() - run_start)}, best top-1 {best:.2f} %")
    return log


# ------------------------------------------------------------------------------------------------
# The benchmark: what limits a run with these flags here, and how long it would take
# ------------------------------------------------------------------------------------------------

def peak_memory_mib():
    """This process's largest memory so far; nan where the system does not say (Windows)."""
    try:
        import resource
    except ImportError:
        return math.nan
    unit = 2**20 if sys.platform == "darwin" else 2**10   # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def run_benchmark(args, env):
    """--benchmark: times loader, teacher, student and the whole step; prints a table and, as the
    last line, a JSON object. Rates are views a second over all processes, without gradient
    clipping and averaged weights, which cost little. Nothing is saved."""
    mode, micro, size, train, _ = prepare(args, env)
    device, batch = env.device, args.batch_size
    sampler = TrainSampler(max(batch, len(train)), batch, micro, args.repeats, args.seed, env.rank,
                           env.world, 0, 10**9)
    items = ((e, s, k, images % len(train), views) for e, s, k, images, views in sampler)
    dataset = TrainViews(train, size, args.seed, args.randaugment, args.erasing)
    _, batches = start_workers(dataset, items, env)
    env.join()
    model = create_student(args, size, len(train.classes)).to(device)
    net = wrap(model, args, env)
    optimizer = torch.optim.AdamW(parameter_groups(model, args.weight_decay), lr=1e-6,
                                  fused=device.type in ("cuda", "cpu"))
    scaler = torch.amp.GradScaler(device.type, enabled=env.amp == torch.float16)
    teacher = create_teacher(args, mode, train.classes, size, env)
    views_a_run = args.epochs * max(1, len(train) // batch) * batch

    def load():
        return next(batches)

    def augment(views, labels, boxes, _):
        images = erase(normalise(views, device), boxes)
        targets = smooth_targets(labels.to(device), len(train.classes), args.smoothing)
        return mix(images, targets, args.mixup, args.cutmix, keyed(args.seed))

    def teach(images):
        with env.autocast():
            return teacher(images) if teacher else None

    def learn(images, targets, teacher_logits):
        with env.autocast():
            cls_logits, dist_logits = pair(net(images))
        scaler.scale(deit.distillation_loss(cls_logits, dist_logits, targets, teacher_logits, mode,
                                            args.alpha, args.tau)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    def whole():
        images, targets = augment(*load())
        learn(images, targets, teach(images))

    def rate(work, warm_up=1, seconds=8):
        """Views a second of work(), over all processes."""
        done, start = -warm_up, 0.0
        while env.agree(int(done < 1 or time.perf_counter() - start < seconds)):
            if done == 0:
                start = time.perf_counter()
            work()
            if device.type != "cpu":
                torch.accelerator.synchronize()
            done += 1
        return all_sum(torch.tensor(done * micro / (time.perf_counter() - start))).item()

    loader = rate(load, warm_up=1 + 2 * env.workers)   # what the workers have ready is not counted
    images, targets = augment(*load())
    teacher_logits = teach(images)
    if teacher and args.compile:
        teacher.compile()
    result = {"loader_img_per_s": loader,
              "teacher_img_per_s": rate(lambda: teach(images)) if teacher else None,
              "student_img_per_s": rate(lambda: learn(images, targets, teacher_logits)),
              "step_img_per_s": rate(whole)}
    student = result["student_img_per_s"]
    device_rate = 1 / (1 / student + (1 / result["teacher_img_per_s"] if teacher else 0))
    if device.type == "cuda":
        result["peak_memory_mib"] = torch.cuda.max_memory_allocated() / 2**20
    else:
        result["peak_memory_mib"] = peak_memory_mib()
    result["projected_hours"] = views_a_run / result["step_img_per_s"] / 3600
    result["workers_needed"] = math.ceil(max(1, env.workers) * device_rate / loader)
    rows = ((f"loader, {env.workers} workers", "loader"), (f"teacher {args.teacher}", "teacher"),
            (f"student {args.model}, with its step", "student"), ("all of it", "step"))
    env.say(f"{env.world} processes on {device}, {env.precision}, {size} px, "
            f"micro-batch {micro}, torch {torch.__version__}")
    for title, key in rows:
        value = result[f"{key}_img_per_s"]
        env.say(f"  {title:56s}" + (f"{value:9.1f} img/s" if value else "     none"))
    slowest = "the loader" if loader < device_rate else "the teacher" if (
        teacher and result["teacher_img_per_s"] < student) else "the student"
    env.say(f"bottleneck: {slowest}; the device takes {device_rate:.1f} img/s, which "
            f"{result['workers_needed']} workers a process keep busy\n"
            f"projected: {result['projected_hours']:.1f} hours for {args.epochs} epochs of "
            f"{len(train)} images; peak memory {result['peak_memory_mib']:.0f} MiB")
    env.say(json.dumps(result))
    return result


# ------------------------------------------------------------------------------------------------
# The demo: `python train.py`, what DeiT is about, in minutes, with nothing at hand
# ------------------------------------------------------------------------------------------------

DEMO_COLOURS = {"red": (205, 60, 50), "green": (60, 150, 70), "blue": (60, 90, 190)}
DEMO_PATTERNS = {   # where a pattern of period p is dark; all of them look the same in a mirror
    "rows": lambda x, y, p: y % p < p // 2,
    "bars": lambda x, y, p: x % p < p // 2,
    "checks": lambda x, y, p: (x % p < p // 2) == (y % p < p // 2),
    "dots": lambda x, y, p: (x % p - p / 2) ** 2 + (y % p - p / 2) ** 2 < (0.32 * p) ** 2,
}


def draw_demo(folder, counts=(("train", 2400), ("val", 1200)), size=80):
    """Draws train/<class>/*.jpg and val/<class>/*.jpg: a large ball and up to four small ones.

    A class is a colour with a pattern, twelve in all. A validation picture is filed under its large
    ball; a training picture, like a photograph with one tag, under any one of its balls, with a
    chance in proportion to the ball's area: about half of them under the large one.
    """
    rng = np.random.default_rng(0)
    classes = [(colour, pattern) for colour in DEMO_COLOURS for pattern in DEMO_PATTERNS]
    y, x = np.mgrid[:size, :size]
    for split, count in counts:
        for i in range(count):
            pixels = rng.uniform(70, 190, 3) + rng.normal(0, 25, (size, size, 3))
            balls = []   # centre x, centre y, radius, class
            for low, high in ((0.26, 0.32), *[(0.12, 0.17)] * 4):
                kind = classes[rng.integers(len(classes)) if balls else i % len(classes)]
                for _ in range(100):   # tries to find a free place
                    r = size * rng.uniform(low, high)
                    cx, cy = rng.uniform(r, size - r, 2)
                    if all(math.hypot(cx - a, cy - b) > 0.9 * (r + c) for a, b, c, _ in balls):
                        balls.append((cx, cy, r, kind))
                        light = np.array(DEMO_COLOURS[kind[0]]) + rng.integers(-25, 26, 3)
                        (dx, dy), period = rng.integers(0, 10, 2), rng.integers(8, 11)
                        dark = DEMO_PATTERNS[kind[1]](x + dx, y + dy, period)
                        inside = np.hypot(x - cx, y - cy) < r
                        pixels[inside] = np.where(dark[..., None], 0.4 * light, light)[inside]
                        break
            area = np.array([r * r for _, _, r, _ in balls])
            tag = rng.choice(len(balls), p=area / area.sum()) if split == "train" else 0
            path = os.path.join(folder, split, "_".join(balls[tag][3]), f"{i:05d}.jpg")
            os.makedirs(os.path.dirname(path), exist_ok=True)
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)


DEMO_PLAIN = ("--img-size 48 --batch-size 64 --repeats 1 --randaugment 0 --mixup 0 --cutmix 0 "
              "--erasing 0 --smoothing 0 --ema-decay 0")   # crops and flips: pictures this small
DEMO_TEACHER = f"--model regnet_demo {DEMO_PLAIN} --epochs 12 --warmup-epochs 2 --lr 4e-3"
DEMO_STUDENT = (f"{DEMO_PLAIN} --patch-size 8 --embed-dim 128 --depth 4 --num-heads 4 "
                "--drop-path 0 --epochs 16 --warmup-epochs 3 --lr 3e-3")


def demo(seed):
    """Draws images, trains a teacher, a small DeiT without it and one with it, prints a table."""
    start = time.perf_counter()
    cache = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    data, output = os.path.join(cache, "deit", "demo-1"), os.path.join("runs", f"demo-{seed}")
    if not os.path.isdir(data):
        print(f"drawing 3,600 small pictures into {data}", flush=True)
        drawn = f"{data}.{os.getpid()}"
        draw_demo(drawn)
        try:
            os.replace(drawn, data)   # whole or not there
        except OSError:
            if not os.path.isdir(data):   # else another demo was quicker
                raise
            shutil.rmtree(drawn)
    weights = os.path.join(output, "teacher", "best.pt")
    runs = {"teacher": DEMO_TEACHER,
            "alone": f"--model deit_tiny_patch16_224 {DEMO_STUDENT}",
            "distilled": f"--model deit_tiny_distilled_patch16_224 {DEMO_STUDENT} "
                         f"--teacher regnet_demo --teacher-weights {weights}"}
    last = {}
    for name, flags in runs.items():
        argv = ["--data", data, *flags.split(), "--seed", str(seed), "--output",
                os.path.join(output, name), "--resume"]
        print(f"\n$ python train.py {shlex.join(argv)}", flush=True)
        last[name] = main(argv)[-1]
    print(f"\nTop-1 in percent on {last['alone']['val_images']} validation images (seed {seed}, "
          f"{clock(time.perf_counter() - start)} in all)\n"
          f"  {'':24s}class head  distillation head   both\n"
          f"  {'RegNet, the teacher':24s}{last['teacher']['cls']:10.1f}\n"
          f"  {'DeiT alone':24s}{last['alone']['cls']:10.1f}\n"
          f"  {'DeiT, distilled':24s}{last['distilled']['cls']:10.1f}"
          f"{last['distilled']['dist']:19.1f}{last['distilled']['both']:7.1f}")


def in_a_sentence(error, args, env):
    """What a user's mistake or a full machine raised, as one sentence; "" for anything else."""
    message = str(error).strip()
    if isinstance(error, InputError):
        return message.split("InputError: ")[-1]   # of a worker's traceback, the end
    if isinstance(error, torch.OutOfMemoryError) or re.search(
            "can't allocate memory|out of memory", message):   # of a CPU; of Apple's GPU
        share = args.batch_size // env.world
        micro = args.micro_batch or max(1, min(128, share))
        if micro == 1:
            return "the device's memory is full with one image: take a smaller model or --img-size."
        smaller = max(m for m in range(1, micro) if share % m == 0)
        return f"the device's memory is full: try --micro-batch {smaller} (the batch stays)."
    if "more than 1 value per channel" in message:   # a convnet in training, one image, one pixel
        return "a batch norm is left with one value a channel: raise --micro-batch or --img-size."
    if isinstance(error, ImportError) and "tensorboard" in message.lower():
        return f"{message}: pip install tensorboard, or leave out --tensorboard."
    if isinstance(error, OSError):   # the system's word is clear enough: what, and which file
        return f"{message}."
    if re.search(r"DataLoader worker \(pid|unable to (.* shared memory|write to file)", message):
        return (f"a loader worker died ({message.splitlines()[-1]}): lower --workers or free "
                "memory (in a container, raise --shm-size), then --resume from the last save.")
    if re.search("Connection closed by peer|Connection reset|Broken pipe", message):
        return "another process ended: see its message."
    return ""


def main(argv=None):
    """The program. A user's mistake raises SystemExit with one sentence."""
    args = env = sentence = None
    try:
        args = parse(argv)
        if vars(args) == vars(parse(["--seed", str(args.seed)])) and "RANK" not in os.environ:
            return demo(args.seed)
        if args.data is None:
            raise InputError("--data is missing: give a folder that holds train/<class>/<image> "
                             "and val/<class>/<image>, or nothing (but --seed) for the demo.")
        env = Environment(args.device, args.amp, args.workers)
        if args.eval or args.benchmark:
            return (run_eval if args.eval else run_benchmark)(args, env)
        with caught_signals() as signals:
            return run(args, env, signals)
    except Exception as e:
        sentence = in_a_sentence(e, args, env)
        if not sentence:
            raise
        e.__traceback__ = None   # it keeps the loaders, whose workers end when they are dropped
    finally:   # after an error the others may wait for this process: it ends without them
        if dist.is_initialized() and sentence is None:
            dist.destroy_process_group()
            time.sleep(0.2)   # gloo's threads outlive it; one still busy at exit aborts Python
    if env and env.world > 1:   # what all of them meet the first one says, then torchrun ends all
        time.sleep(6 if sentence.startswith("another process") else 3 * (env.local_rank > 0))
        sentence = f"process {env.rank}: {sentence}" if env.rank else sentence
    raise SystemExit(f"train.py: {sentence}")


if __name__ == "__main__":
    main()
