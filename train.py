# SPDX-License-Identifier: MIT
"""Trains DeiT (deit.py) with the paper's recipe, on one CPU, one GPU or many machines.

  python train.py                                           the demo: some minutes, no data needed
  python train.py --data DIR --model regnet_y_400mf         a teacher for your own classes
  python train.py --data DIR --teacher regnet_y_400mf --teacher-weights runs/regnet_y_400mf/best.pt
  torchrun --nproc_per_node=8 train.py --data /imagenet     DeiT-S from regnet_y_16gf, the recipe
  python train.py <the same flags> --resume                 goes on where it was stopped
  python train.py --data DIR --eval runs/NAME/best.pt       validation accuracy by each head
  python train.py --data DIR --benchmark                    what limits a run, and its hours

DIR holds train/<class>/<image> and val/<class>/<image>. The file goes from small to large. The
method: schedule, augmentation, data, processes, training step, evaluation. Then what a long run
needs: saving, configuration, the loop, --eval, --benchmark, flags, the demo. To follow a run from
its start, read main, train, train_epochs, train_step.

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
import shlex
import signal
import sys
import time
import types

import numpy as np
import PIL
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageEnhance, ImageOps

import deit
from deit import InputError, reason


# ------------------------------------------------------------------------------------------------
# Schedule, parameter groups, averaged weights
# ------------------------------------------------------------------------------------------------

def lr_at(step, peak_lr, min_lr, warmup_steps, total_steps, start=1e-6):
    """Learning rate of a step: linear from `start` to `peak_lr`, then a cosine to `min_lr`. As
    released, the cosine runs over all steps, not over those after the warm-up."""
    if step < warmup_steps:
        return start + (peak_lr - start) * step / warmup_steps
    return min_lr + (peak_lr - min_lr) * (1 + math.cos(math.pi * step / total_steps)) / 2


def parameter_groups(model, weight_decay):
    """AdamW's two groups. As released: biases, norms, pos_embed and cls_token do not decay, but
    dist_token does (the list of exemptions of the time did not name it)."""
    named = list(getattr(model, "module", model).named_parameters())   # module: of a Classifier
    no_decay = {n for n, p in named if p.ndim <= 1} | {"pos_embed", "cls_token"}
    return [{"params": [p for n, p in named if n not in no_decay], "weight_decay": weight_decay},
            {"params": [p for n, p in named if n in no_decay], "weight_decay": 0.0}]


@torch.no_grad()
def update_ema(ema, model, step, decay):
    """ema = d ema + (1 - d) model; buffers (batch statistics) are copied. d rises from 0.1 to
    `decay`, so that even a short run forgets its random start."""
    d = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - d)
    for ours, theirs in zip(ema.buffers(), model.buffers()):
        ours.copy_(theirs)


# ------------------------------------------------------------------------------------------------
# Augmentation of one view, in a loader worker, on Pillow images (paper, table 9; timm's details)
# ------------------------------------------------------------------------------------------------

def rng_for(*key):
    """A random generator of its own for a key of plain numbers and texts (NumPy's have another
    repr): the same key draws the same anywhere, any time."""
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


# Flags that change a view's pixels: --teacher-answers are valid for these only. A new augmentation
# has a function, a call (train_transform or train_step), a value in TrainDataset, a flag in parse
# and check, and its name in this list.
VIEW_FLAGS = ("seed", "img_size", "batch_size", "micro_batch", "repeats", "randaugment", "mixup",
              "cutmix", "erasing")
FILL = (124, 116, 104)   # ImageNet's mean colour, for what moves in from outside
BICUBIC, AFFINE = Image.Resampling.BICUBIC, Image.Transform.AFFINE


def affine(image, matrix):
    return image.transform(image.size, AFFINE, matrix, BICUBIC, fillcolor=FILL)


def solarize_add(image, add):
    return image.point([min(255, v + add) if v < 128 else v for v in range(256)] * 3)


RANDAUGMENT = {   # the 15 operations, at strength t in 0..1 and a random sign s
    "AutoContrast": lambda im, t, s: ImageOps.autocontrast(im),
    "Equalize": lambda im, t, s: ImageOps.equalize(im),
    "Invert": lambda im, t, s: ImageOps.invert(im),
    "Rotate": lambda im, t, s: im.rotate(30 * t * s, BICUBIC, fillcolor=FILL),
    # at t = 1 the official code keeps 0 bits, a black image, which Pillow 13 refuses: 1 at least
    "Posterize": lambda im, t, s: ImageOps.posterize(im, max(1, 4 - int(4 * t))),
    "Solarize": lambda im, t, s: ImageOps.solarize(im, 256 - int(256 * t)),
    "SolarizeAdd": lambda im, t, s: solarize_add(im, int(110 * t)),
    "Color": lambda im, t, s: ImageEnhance.Color(im).enhance(1 + 0.9 * t * s),
    "Contrast": lambda im, t, s: ImageEnhance.Contrast(im).enhance(1 + 0.9 * t * s),
    "Brightness": lambda im, t, s: ImageEnhance.Brightness(im).enhance(1 + 0.9 * t * s),
    "Sharpness": lambda im, t, s: ImageEnhance.Sharpness(im).enhance(1 + 0.9 * t * s),
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


def train_transform(image, size, magnitude, rng):
    """One random view of an RGB image, (size, size): crop and resize in one pass, horizontal flip,
    RandAugment (magnitude 0: none)."""
    view = image.resize((size, size), BICUBIC, box=crop_box(*image.size, rng))
    if rng.random() < 0.5:
        view = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return rand_augment(view, magnitude, rng) if magnitude else view


def erasing_box(size, probability, rng):
    """RandomErasing's rectangle (top, left, height, width), zeros for none: 2 % to 33 % of the
    area, ratio 0.3 to 3.3. Drawn with the view, filled on the device."""
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
    """ImageNet's, for values 0..255, (1, 3, 1, 1) each, copied to the device once."""
    return [torch.tensor(v, device=device).view(1, 3, 1, 1) * 255
            for v in (deit.IMAGENET_MEAN, deit.IMAGENET_STD)]


def layout_of(device):
    """Memory layout of a batch of images: channels-last, on CUDA the plain one (see make_model)."""
    return torch.contiguous_format if device.type == "cuda" else torch.channels_last


def normalise(views, device):
    """uint8 (B, S, S, 3) -> float (B, 3, S, S) by ImageNet's mean and deviation, on the device."""
    mean, std = mean_and_std(device)
    images = views.to(device, non_blocking=True).permute(0, 3, 1, 2)
    return images.float(memory_format=layout_of(device)).sub_(mean).div_(std)


def erase(images, boxes):
    """Fills each image's rectangle with Normal(0, 1), in place. images (B, 3, S, S); boxes (B, 4),
    on the CPU, so that the device is not asked which images have one."""
    rows = boxes[:, 2].nonzero()[:, 0]                                         # (R,)
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


def mixup_or_cutmix(images, targets, mixup, cutmix, rng):
    """Mixup (arXiv 1710.09412) or CutMix (1905.04899), each half the time when both are on. One
    lambda and one box per micro-batch; partner = the micro-batch in reverse order. images
    (B, 3, S, S) and targets (B, K) are mixed alike."""
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
# Data: the list of images in one array, which view comes when, what a loader worker does
# ------------------------------------------------------------------------------------------------

SUFFIXES = (".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm",
            ".tif", ".tiff")


def stable_hash(data):
    """Bytes -> a number below 2**56, the same in every process and run."""
    return int.from_bytes(hashlib.sha256(data).digest()[:7], "big")


def walk(root):
    """(folder, file names) of root and all folders below it, sorted. Links are followed, except to
    a folder that holds the link itself; hidden folders are left out."""
    found = []
    for folder, subfolders, files in os.walk(root, followlinks=True):
        found.append((folder, sorted(files)))
        for name in list(subfolders):
            path = os.path.join(folder, name)
            above = pathlib.Path(path).absolute().parents if os.path.islink(path) else ()
            if name[0] == "." or os.path.realpath(path) in map(os.path.realpath, above):
                subfolders.remove(name)
    return sorted(found)


class ImageFolder:
    """The images of root/<class>/, at any depth, without hidden files, in the order of
    torchvision's ImageFolder, but classes named 0 ... K-1 by value.

    Names are held in one array: a Python list of a million would be copied into every worker by its
    reference counts. classes: the list that numbers the classes (None: this folder's own). part:
    takes only images whose path below root hashes into this range of 0..1. Paths of what is no
    image are kept in left_out. Raises InputError.
    """

    def __init__(self, root, classes=None, part=(0, 1)):
        if not os.path.isdir(root):
            raise InputError(f"there is no folder {root}: give --data a folder that holds "
                             "train/<class>/<image> and val/<class>/<image>, or --val-fraction if "
                             "it holds class folders only.")
        self.root, self.part, self.left_out = root, part, []
        entries = [e for e in os.scandir(root) if e.name[0] != "."]
        folders = {e.name for e in entries if e.is_dir()}
        by_value = folders == {str(i) for i in range(len(folders))}   # exactly 0 ... K-1
        self.folders = sorted(folders, key=int if by_value else str)
        self.left_out += sorted(e.path for e in entries if not e.is_dir())
        if not self.folders:
            flat = sum(path.lower().endswith(SUFFIXES) for path in self.left_out)
            how = " (the README has lines that sort ImageNet's flat val folder)" if flat else ""
            raise InputError(f"{root} holds {flat or 'no'} images and no class folders: put the "
                             f"images of each class into a folder of its own{how}.")
        images = [self.list_images(folder) for folder in self.folders]
        names = list(itertools.chain(*images))
        if not names:
            few = "" if part == (0, 1) else ", or too few for --val-fraction: raise it"
            raise InputError(f"{root} holds no images ({' '.join(SUFFIXES)}){few}.")
        counts = list(map(len, images))
        self.folder_of = np.arange(len(images), dtype=np.int32).repeat(counts)
        self.starts = np.cumsum([0] + [len(name) for name in names])   # first byte, and the end
        self.names = np.frombuffer(b"".join(names), np.uint8)
        self.renumber(classes or self.folders)

    def list_images(self, name):
        """Paths below root, as bytes with /, of a class folder's images in this part."""
        images, (low, high) = [], self.part
        for folder, files in walk(os.path.join(self.root, name)):
            below = folder[len(os.path.join(self.root, "")):].replace(os.sep, "/") + "/"
            for file in files:
                if file[0] != "." and file.lower().endswith(SUFFIXES):
                    images.append(os.fsencode(below + file))
                elif file[0] != ".":
                    self.left_out.append(os.path.join(folder, file))
        if self.part == (0, 1):
            return images
        return [image for image in images if low <= stable_hash(image) / 2**56 < high]

    def renumber(self, classes):
        """Labels by another list of classes, which must hold all of this folder's."""
        strange = sorted(set(self.folders) - set(classes))
        if strange:
            raise InputError(f"{self.root} has classes that training does not know: "
                             f"{', '.join(strange[:3])} ({len(strange)} in all).")
        number = {name: i for i, name in enumerate(classes)}
        self.classes = list(classes)
        self.labels = np.array([number[n] for n in self.folders], np.int32)[self.folder_of]

    def __len__(self):
        return len(self.labels)

    def fingerprint(self):
        """A number that tells this list of images from others."""
        return stable_hash(bytes(self.names) + bytes(self.starts))

    def path(self, i):
        name = self.names[self.starts[i]:self.starts[i + 1]].tobytes()
        return os.path.join(self.root, os.fsdecode(name))

    def open(self, i):
        """Image i as RGB. Raises whatever Pillow raises, which is more than OSError."""
        return deit.open_image(os.fsencode(self.path(i)))


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
                indices = order[v // cfg.repeats % num_images]   # %: in a tiny benchmark
                yield epoch, step, k, indices, v % cfg.repeats


class TrainDataset:
    """Item (epoch, step, k, indices of images (m,), numbers of views (m,)) -> uint8 views
    (m, S, S, 3), labels (m,), erasing boxes (m, 4), {index: reason} of unreadable images.

    Views of one image that follow each other come from one decoding. They are spread over the
    micro-batch by key, so that they are mixed with other images. The next image of the class stands
    in for an unreadable one.
    """

    def __init__(self, folder, cfg):
        self.folder, self.size, self.seed = folder, cfg.img_size, cfg.seed
        self.magnitude, self.erasing = cfg.randaugment, cfg.erasing

    def decode(self, i, unreadable):
        """Image i or the next of its class that can be read; reasons are added to unreadable."""
        folder, number = self.folder, self.folder.folder_of[i]
        start, stop = folder.folder_of.searchsorted([number, number + 1])
        for j in itertools.chain(range(i, stop), range(start, i)):
            try:
                return folder.open(j)
            except Exception as e:   # OSError, SyntaxError, ValueError and many more
                unreadable[j] = reason(e)
        raise InputError(f"no image of class {folder.folders[number]} in {folder.root} can be "
                         "read.")

    def __getitem__(self, item):
        epoch, step, k, indices, numbers = item
        m, S = len(indices), self.size
        views, boxes = np.empty((m, S, S, 3), np.uint8), np.zeros((m, 4), np.int64)
        places = rng_for(self.seed, "places", step, k).sample(range(m), m)
        unreadable, last = {}, None
        for place, i, number in zip(places, indices.tolist(), numbers.tolist()):
            if i != last:
                image, last = self.decode(i, unreadable), i
            rng = rng_for(self.seed, epoch, i, number)
            views[place] = train_transform(image, S, self.magnitude, rng)
            boxes[place] = erasing_box(S, self.erasing, rng)
        labels = np.empty(m, np.int64)
        labels[places] = self.folder.labels[indices]
        return *map(torch.from_numpy, (views, labels, boxes)), unreadable


class EvalDataset:
    """Item (S, indices of images (m,), labels (m,)) -> uint8 central views (m, S, S, 3), labels
    (m,), -1 where an image is unreadable, which no prediction matches, {index: reason} of those."""

    def __init__(self, folder):
        self.folder = folder

    def __getitem__(self, item):
        size, indices, labels = item
        views, labels = np.zeros((len(indices), size, size, 3), np.uint8), labels.astype(np.int64)
        unreadable = {}
        for place, i in enumerate(indices.tolist()):
            try:
                views[place] = deit.center_view(self.folder.open(i), size)
            except Exception as e:   # never replaced: it counts as wrong
                labels[place], unreadable[i] = -1, reason(e)
        return torch.from_numpy(views), torch.from_numpy(labels), unreadable


def outlive_signals(worker):
    """Ctrl-C and a cluster's SIGTERM reach all processes at once. The workers serve the main one
    for 30 more seconds, in which it finishes its step and saves, then end without an error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "alarm"):   # not on Windows
        signal.signal(signal.SIGUSR1, signal.SIG_IGN)
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, lambda number, frame: signal.alarm(30))
        signal.signal(signal.SIGALRM, lambda number, frame: os._exit(0))


def make_loader(dataset, items, processes):
    """A loader of whole micro-batches and its first iterator. Its workers run from now on, for all
    later iterators too: they are forked before the process group is joined, since forking among the
    group's threads can hang."""
    multiprocessing.util.get_temp_dir()   # for the workers too: a killed one would leave its own
    chosen = multiprocessing.get_start_method(allow_none=True)   # by a program that calls main
    fork = processes.workers and sys.platform == "linux" and not chosen
    loader = torch.utils.data.DataLoader(
        dataset, sampler=items, batch_size=None, num_workers=processes.workers,
        persistent_workers=processes.workers > 0, pin_memory=processes.device.type == "cuda",
        worker_init_fn=outlive_signals, multiprocessing_context="fork" if fork else None)
    return loader, iter(loader)


# ------------------------------------------------------------------------------------------------
# Processes: where this one runs, and all that they tell one another
# ------------------------------------------------------------------------------------------------

class Processes:
    """This process's rank, device, precision and loader workers; every collective of the program is
    a method here. One process is a world of size 1. Raises InputError for an unusable device."""

    def __init__(self, device=None, amp="auto", workers=None):
        self.launched = bool(os.environ.get("RANK"))   # by torchrun, with one process too
        self.rank, self.world_size, self.local_rank, local_size = (
            int(os.environ.get(name) or default) for name, default in (
                ("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", 1)))
        if self.world_size > 1 and not self.launched:
            raise InputError(f"WORLD_SIZE is {self.world_size}, but RANK is not set: start several "
                             "processes with torchrun, or unset WORLD_SIZE.")
        self.device = self.choose_device(device)
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision("high")   # TF32 where float32 is left
            torch.backends.cudnn.benchmark = True
            # cuDNN's attention gave NaN gradients in public reports; flash is as fast
            torch.backends.cuda.enable_cudnn_sdp(False)
        chosen = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}
        self.amp = self.best_precision() if amp == "auto" else chosen[amp]
        self.precision = str(self.amp or torch.float32).removeprefix("torch.")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        self.workers = max(1, min(16, cores // local_size)) if workers is None else workers
        self.signal = 0   # number of the last one that came, see caught_signals

    def choose_device(self, name):
        best = "cuda" if torch.cuda.is_available() else "mps" if torch.mps.is_available() else "cpu"
        name = name or best
        if name.startswith("cuda") and not torch.cuda.is_available():
            raise InputError(f"--device {name}, but PyTorch finds no CUDA here: take --device cpu, "
                             "or install a driver and a CUDA build of PyTorch.")
        if name.startswith("cuda:") and self.world_size > 1:
            raise InputError(f"--device {name} is one GPU for all processes: give --device cuda, "
                             "which takes one each.")
        try:
            device = torch.device(f"cuda:{self.local_rank}" if name == "cuda" else name)
            if device.type == "cuda" and device.index >= torch.cuda.device_count():
                raise InputError(f"process {self.local_rank} of this node finds only "
                                 f"{torch.cuda.device_count()} GPUs: start as many processes as "
                                 "there are GPUs (--nproc_per_node).")
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as e:
            raise InputError(f"--device {name} cannot be used: {str(e).splitlines()[0]}") from e
        return device

    def best_precision(self):
        """bfloat16 where the hardware has it, else float16 on CUDA, else None: float32."""
        if self.device.type == "cuda":
            has = torch.cuda.is_bf16_supported(including_emulation=False)
            return torch.bfloat16 if has else torch.float16
        if self.device.type == "cpu":   # elsewhere it is emulated
            for has in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
                if hasattr(torch.cpu, has) and getattr(torch.cpu, has)():
                    return torch.bfloat16
        return None

    def autocast(self):
        return torch.autocast(self.device.type, self.amp, enabled=self.amp is not None)

    def print0(self, text, end="\n"):
        """Prints on rank 0; in a terminal it clears what a longer line left."""
        if self.rank == 0:
            with contextlib.suppress(OSError):   # a closed pipe or terminal, a full disk: go on
                print(("\x1b[K" if sys.stdout.isatty() else "") + text, end=end, flush=True)

    def join(self):
        """Under torchrun the processes become a group, otherwise nothing happens."""
        if self.launched:
            backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
            dist.init_process_group(backend)

    def leave(self):
        """Ends the group. Then waits: gloo's threads outlive it, and one that is still busy when
        Python exits aborts a finished run."""
        if dist.is_initialized():
            dist.destroy_process_group()
            time.sleep(0.2)

    def sum(self, tensor):
        """The tensor's sum over all processes, as a new tensor."""
        tensor = tensor.clone()
        if dist.is_initialized():
            dist.all_reduce(tensor)
        return tensor

    def max(self, number):
        """The largest of the processes' numbers: what one of them wants, all do."""
        if not dist.is_initialized():
            return number
        number = torch.tensor(number)
        dist.all_reduce(number, dist.ReduceOp.MAX)
        return number.item()

    def wait(self):
        """Until all processes are here."""
        self.max(0)

    def gather(self, thing):
        """The list of all processes' things (plain values), by rank."""
        things = [thing]
        if dist.is_initialized():
            things = [None] * self.world_size
            dist.all_gather_object(things, thing)
        return things

    def check_same(self, **facts):
        """Raises InputError, with the fact's name, unless all processes have the same facts."""
        for rank, others in enumerate(self.gather(facts)):
            for name in facts:
                if others[name] != facts[name]:
                    raise InputError(f"the processes do not start alike: {name} is {facts[name]} "
                                     f"on rank {self.rank}, {others[name]} on rank {rank}; give "
                                     "all of them the same flags, data, teacher and --output.")

    def main_process_first(self, load):
        """Runs load() on local rank 0 first, then on the others, so a download happens once per
        node."""
        if self.local_rank == 0:
            result = load()
        self.wait()
        return load() if self.local_rank else result


@contextlib.contextmanager
def caught_signals(processes):
    """SIGTERM, SIGUSR1 (pre-emption), SIGINT (Ctrl-C) and SIGHUP (a closed terminal), unless it was
    ignored as under nohup, are only noted in processes.signal: the loop saves and stops. A fourth
    signal ends the program at once, without a save, unless it waits for other processes."""
    count, former = itertools.count(1), {}

    def note(number, frame):
        processes.signal = number
        if next(count) > 3:
            os._exit(128 + number)

    with contextlib.suppress(ValueError):   # not in the main thread: as before
        for name in ("SIGTERM", "SIGINT", "SIGUSR1", "SIGHUP"):   # the last two: not on Windows
            number = getattr(signal, name, None)
            if number and (name == "SIGINT" or signal.getsignal(number) != signal.SIG_IGN):
                former[number] = signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------
# One training step, and all that it changes
# ------------------------------------------------------------------------------------------------

class State:
    """Training state: what changes in a run. state_dict() is what a checkpoint holds of it.

    model: the raw network (saved, evaluated); net: the same, compiled and wrapped (trained); ema:
    averaged weights, or None. totals: sums over this epoch and this process's micro-batches: loss,
    share of views that agree with the teacher, micro-batches, skipped steps. data_time: seconds
    spent waiting for views.
    """

    def __init__(self, model, cfg, processes):
        self.model = model.to(processes.device)
        self.net = torch.compile(model) if cfg.compile else model
        if dist.is_initialized():
            self.net = torch.nn.parallel.DistributedDataParallel(
                self.net, gradient_as_bucket_view=True)
            self.net.broadcast_buffers = False   # see merge; as an argument it is deprecated
        self.ema = copy.deepcopy(model).requires_grad_(False) if cfg.ema_decay else None
        self.optimizer = torch.optim.AdamW(
            parameter_groups(model, cfg.weight_decay), lr=cfg.peak_lr,
            fused=processes.device.type in ("cuda", "cpu"))
        self.scaler = torch.amp.GradScaler(processes.device.type,
                                           enabled=processes.amp == torch.float16)
        self.step, self.best, self.log = 0, -1.0, []
        dtype = torch.float32 if processes.device.type == "mps" else torch.float64
        self.totals = torch.zeros(4, dtype=dtype, device=processes.device)
        self.bad_in_a_row = torch.zeros((), device=processes.device)   # steps, see check_finite
        self.unreadable, self.data_time = {}, 0.0
        self.answers = None   # Answers, with --teacher-answers; in a file of their own

    def evaluated(self):
        """{name: network} of what is evaluated: the model and its average."""
        return {"model": self.model} | ({"ema": self.ema} if self.ema else {})

    def merge(self, processes):
        """The processes' batch statistics (of convnets only) become their mean, their lists of
        unreadable images the union."""
        for each in self.evaluated().values():
            for buffer in each.buffers():
                if buffer.is_floating_point():
                    buffer.copy_(processes.sum(buffer) / processes.world_size)
        for unreadable in processes.gather(self.unreadable):
            self.unreadable = self.unreadable | unreadable

    def state_dict(self, processes):
        """What a checkpoint holds of it. Called by all processes."""
        self.merge(processes)
        return {"model": self.model.state_dict(), "ema": self.ema and self.ema.state_dict(),
                "optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict(),
                "step": self.step, "best": self.best, "log": self.log,
                "totals": processes.sum(self.totals).tolist(),
                "unreadable": sorted(self.unreadable)}

    def load_state_dict(self, saved, processes, train_images):
        self.model.load_state_dict(saved["model"])
        if self.ema:
            self.ema.load_state_dict(saved["ema"])
        self.optimizer.load_state_dict(copy.deepcopy(saved["optimizer"]))   # off the mapped file
        if saved["scaler"]:   # empty when it was not fp16 before
            self.scaler.load_state_dict(saved["scaler"])
        self.step, self.best, self.log = saved["step"], saved["best"], saved["log"]
        if processes.rank == 0:
            self.totals += self.totals.new_tensor(saved["totals"])
        for i in saved["unreadable"]:
            try:
                train_images.open(i)
            except Exception as e:   # it was not mended since
                self.unreadable[i] = reason(e)

    def count(self, loss, dist_logits, answer):
        """Adds a micro-batch to the totals, on the device. In fp16 one with infinite loss is not
        counted (its step is skipped); else check_finite finds it there."""
        one, agree = torch.ones_like(loss), torch.zeros_like(loss)
        if answer is not None:
            classes = answer if answer.ndim == 1 else answer.argmax(1)
            agree = (dist_logits.argmax(1) == classes).float().mean()
        counted = loss.isfinite() if self.scaler.is_enabled() else one.bool()
        self.totals[:3] += torch.where(counted, torch.stack([loss, agree, one]), 0)


class Answers:
    """The teacher's predicted classes for all views of a run, in a file (--teacher-answers): what
    it holds is not asked again, the rest is asked and added. So the next student, with another
    learning rate or architecture, needs no teacher.

    The file: a header (JSON: what the views and the teacher depend on), then class + 1 of each view
    as uint16, 0 where it was not asked yet. A view depends on its image and its place in the run:
    step * batch + k * micro-batch + row. Rank 0 writes it, all read it: it is on a shared disk.
    """

    HEADER = 4096   # bytes

    def __init__(self, cfg, train_images, processes, step=0):
        """Opens the file or begins it. Raises InputError if it is of other views or of another
        teacher. complete: nothing is left to ask from `step` on, so no teacher is needed."""
        self.path, self.batch, self.micro = cfg.teacher_answers, cfg.batch_size, cfg.micro_batch
        self.teacher, self.new = None, []   # new: (place, classes) to be written
        facts = {name: getattr(cfg, name) for name in (*VIEW_FLAGS, "teacher")} | {
            "training images": train_images.fingerprint(), "device": processes.device.type,
            "classes": stable_hash(repr(cfg.classes).encode()), "precision": processes.precision,
            "version of torch": torch.__version__, "version of Pillow": PIL.__version__}
        views = cfg.total_steps * cfg.batch_size
        try:
            if processes.rank == 0:
                if not os.path.exists(self.path):
                    save(self.path, lambda f: f.write(self.header(facts)))
                self.read_header()   # so that a file of something else stays as it is
                os.truncate(self.path, max(self.HEADER + 2 * views, os.path.getsize(self.path)))
            processes.wait()
            self.facts = self.read_header()
            self.known = np.memmap(self.path, np.uint16, "r", self.HEADER, (views,))
        except (OSError, ValueError) as e:
            raise InputError(f"--teacher-answers {self.path} cannot be used ({e}).") from e
        self.compare(facts, processes)
        if self.known.max() > cfg.num_classes:
            raise InputError(f"{self.path} is damaged: it holds classes above {cfg.num_classes}.")
        rest = self.known[step * self.batch:]
        missing = len(rest) - np.count_nonzero(rest)
        self.complete = not processes.max(missing)
        processes.print0(f"answers        {self.path}, {missing} of {views} views are left to ask")

    def read_header(self):
        with open(self.path, "rb") as f:
            header = f.read(self.HEADER)
        if len(header) < self.HEADER:
            raise ValueError("it holds something else")
        return json.loads(header)

    def header(self, facts):
        return json.dumps(facts).encode().ljust(self.HEADER)

    def compare(self, facts, processes):
        # parse([]): flags that are newer than the file had their defaults
        before = vars(parse([])) | self.facts
        for name, now in facts.items():
            if before.get(name) != now:
                other = f"{self.path} is of another {name}: {before.get(name)}, now {now}"
                if name != "precision" and not name.startswith("version"):
                    raise InputError(f"{other}; give the same again, or another --teacher-answers.")
                processes.print0(f"warning        {other}; answers may differ slightly")

    def set_teacher(self, teacher, processes):
        """Takes the teacher that answers what is missing, if it is the one of the file."""
        self.teacher, weights = teacher, {"teacher's weights": teacher.sha256}
        if weights.keys() <= self.facts.keys():
            self.compare(weights, processes)
        elif processes.rank == 0:
            with open(self.path, "r+b") as f:
                f.write(self.header(self.facts | weights))

    def ask(self, images, step, k, processes):
        """Predicted classes (m,), from the file or, where it lacks one, from the teacher."""
        place = step * self.batch + k * self.micro
        known = self.known[place:place + self.micro].astype(np.int64)          # (m,)
        if known.all():
            return torch.from_numpy(known - 1).to(images.device, non_blocking=True)
        classes = ask(self.teacher, images, step, k, processes).argmax(1)      # (m,)
        self.new.append((place, classes))   # on the device until the next save
        return classes

    def save(self, processes):
        """Writes what is new, before last.pt is written. Rank 0 writes for all: nodes that write
        into one block of a network's disk may undo each other's."""
        new = [(place, (c + 1).cpu().numpy().astype(np.uint16).tobytes()) for place, c in self.new]
        new, self.new = itertools.chain(*processes.gather(new)), []
        if processes.rank:
            return
        try:
            with open(self.path, "r+b") as f:
                for place, data in new:
                    f.seek(self.HEADER + 2 * place)
                    f.write(data)
                f.flush()
                os.fsync(f.fileno())
        except OSError as e:   # they will be asked again
            processes.print0(f"not saved      {self.path} could not be written ({e})")


def ask(teacher, images, step, k, processes):
    """The teacher's answer to a micro-batch (m, 3, S, S): logits (m, K), from an Answers its
    predicted classes (m,), None without teacher."""
    if isinstance(teacher, Answers):
        return teacher.ask(images, step, k, processes)
    with processes.autocast():
        return teacher(images) if teacher else None


def train_step(state, teacher, batches, cfg, processes):
    """One optimizer step over this process's micro-batches: `batches` yields them. Nothing is read
    back from the device, so that it never waits for the host."""
    device, net = processes.device, state.net
    for group in state.optimizer.param_groups:
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
        answer = ask(teacher, images, state.step, k, processes)                # (m, K) or (m,)
        if dist.is_initialized():   # gradients are averaged over the processes once per step
            net.require_backward_grad_sync = k == cfg.ks[-1]
        with processes.autocast():
            output = net(images)               # logits (m, K), or a tuple: those of each head
        cls_logits, dist_logits = output if isinstance(output, tuple) else (output, output)
        loss = deit.distillation_loss(cls_logits, dist_logits, targets, answer, cfg.distillation,
                                      cfg.alpha, cfg.tau)
        state.scaler.scale(loss / cfg.grad_accum_steps).backward()
        state.count(loss.detach(), dist_logits, answer)
    state.scaler.unscale_(state.optimizer)
    parameters = [p for p in state.model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if cfg.clip_grad:
        torch.nn.utils.clip_grads_with_norm_(parameters, cfg.clip_grad, norm)
    state.bad_in_a_row = torch.where(norm.isfinite(), 0, state.bad_in_a_row + 1)
    state.totals[3] += (state.bad_in_a_row > 0) / processes.world_size
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.optimizer.zero_grad()
    if state.ema:
        update_ema(state.ema, state.model, state.step, cfg.ema_decay)
    state.step += 1


# ------------------------------------------------------------------------------------------------
# Evaluation: every image once, whatever the number of processes
# ------------------------------------------------------------------------------------------------

@torch.no_grad()
def evaluate(models, loader, indices, size, batch, processes, stop_on_signal=False):
    """Accuracy of several models, which stay in evaluation mode, by one decoding. models: {name:
    network}; indices: of images in the loader's folder. Returns {name: {"cls", "dist", "both":
    top-1 in percent, "cls5", "dist5", "both5": top-5}} and {index: reason} of the unreadable ones,
    which count as wrong. stop_on_signal: a signal ends it, and the result is of no use."""
    device, all_labels = processes.device, loader.dataset.folder.labels
    mine = indices[processes.rank::processes.world_size]
    parts = [mine[i:i + batch] for i in range(0, len(mine), batch)]
    # The loader's sampler is this list: the next loop over the loader hands these items out.
    loader.sampler[:] = [(size, part, all_labels[part]) for part in parts]
    for model in models.values():
        model.eval()
    hits = torch.zeros(len(models), 3, 2, device=device)   # model; cls, dist, both; top-1, top-5
    unreadable = {}
    for views, labels, reasons in loader:
        if stop_on_signal and processes.signal:
            break
        unreadable |= reasons
        views, labels = normalise(views, device), labels.to(device, non_blocking=True)[:, None]
        for row, model in zip(hits, models.values()):
            with processes.autocast():
                cls_logits, dist_logits = (x.float() for x in model.heads(views))
            heads = torch.stack([cls_logits, dist_logits, (cls_logits + dist_logits) / 2])
            top = heads.topk(min(5, heads.shape[2]), dim=2).indices == labels  # (3, B, 5)
            row += torch.stack([top[..., 0].sum(1), top.sum((1, 2))], dim=1)   # (3, 2)
    scores = {}
    for name, row in zip(models, processes.sum(hits).tolist()):
        scores[name] = {head + top: 100 * row[i][j] / len(indices)
                        for i, head in enumerate(("cls", "dist", "both"))
                        for j, top in enumerate(("", "5"))}
    for reasons in processes.gather(unreadable):
        unreadable |= reasons
    return scores, unreadable


# ------------------------------------------------------------------------------------------------
# Saving, and going on from a save
# ------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def output_folder(path, processes):
    """Makes the folder and, on rank 0, locks it while the block runs, since two runs in one folder
    would overwrite each other's saves; removes the folder at the end if nothing was written. Raises
    InputError if another run has the lock."""
    if processes.rank:
        yield
        return
    os.makedirs(path, exist_ok=True)
    with open(os.path.join(path, ".lock"), "w") as lock:
        try:   # lockf: unlike flock's, its locks are not inherited by workers, which may live on
            import fcntl
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as e:
            raise InputError(f"another run is writing into {path}: wait for its end, or choose "
                             "another --output.") from e
        except (ImportError, OSError):
            pass   # Windows, or a disk without locks
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if os.listdir(path) == [".lock"]:
                    os.remove(lock.name)
                    os.rmdir(path)


def save(path, write, keep=None):
    """write(file) into a file beside `path`, onto the disk, then renamed: `path` is never
    half-written. The file that was there is renamed to `keep` first. Raises OSError; what was there
    is then still there, perhaps as `keep`."""
    beside = f"{path}.tmp"   # what a killed run left of it is overwritten
    try:
        with open(beside, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        if keep and os.path.exists(path):
            os.replace(path, keep)
        os.replace(beside, path)
    except (OSError, RuntimeError) as e:   # torch.save turns a failing write into a RuntimeError
        with contextlib.suppress(OSError):
            os.remove(beside)
        raise OSError(f"{path} could not be written ({str(e).splitlines()[0]})") from e


def to_cpu(thing):
    """The same with all tensors on the CPU, so that plain torch.load opens it on any machine."""
    if torch.is_tensor(thing):
        return thing.cpu()
    if isinstance(thing, list):
        return [to_cpu(value) for value in thing]
    if isinstance(thing, dict):
        thing = copy.copy(thing)   # with a state dict's versions
        for key, value in thing.items():
            thing[key] = to_cpu(value)
    return thing


def save_log(cfg, log, processes):
    """log.jsonl: one line per epoch."""
    if processes.rank == 0:
        lines = "".join(json.dumps(record) + "\n" for record in log)
        save(f"{cfg.output}/log.jsonl", lambda f: f.write(lines.encode()))


def check_finite(state, total_loss, cfg):
    """Raises InputError if loss or gradients are not finite; fp16's scaler skips such steps, but
    more than 20 in a row are too many."""
    limit = 20 if state.scaler.is_enabled() else 0
    if not math.isfinite(total_loss) or state.bad_in_a_row > limit:
        raise InputError(f"loss or gradients are not finite at step {state.step}, loss "
                         f"{total_loss:.3g}, lr {state.optimizer.param_groups[0]['lr']:.2e}: try "
                         "--amp off (or bf16), --clip-grad 1 or a lower --lr; the last good save "
                         f"in {cfg.output} is kept.")


def save_state(state, cfg, processes, is_best=False):
    """Writes best.pt if is_best (without what only going on needs), then last.pt (the former
    becomes last.prev.pt) and log.jsonl. Called by all processes, written by rank 0. A write that
    fails is said and the run goes on; returns whether one failed. Raises InputError if the state is
    not finite."""
    if state.answers:
        state.answers.save(processes)
    checkpoint = state.state_dict(processes)
    check_finite(state, checkpoint["totals"][0], cfg)
    checkpoint |= {"epoch": state.step // cfg.epoch_steps, "config": state.model.config,
                   "classes": cfg.classes, "flags": cfg.flags, "preprocessing": {
                       "size": cfg.img_size, "crop_ratio": deit.CROP_RATIO,
                       "interpolation": "bicubic", "mean": list(deit.IMAGENET_MEAN),
                       "std": list(deit.IMAGENET_STD)}}
    failed = 0
    if processes.rank == 0:
        checkpoint = to_cpu(checkpoint)
        try:
            if is_best:
                checkpoint["best"] = state.log[-1]["both"]
                best = checkpoint | dict.fromkeys(("ema", "optimizer", "scaler"))
                save(f"{cfg.output}/best.pt", lambda f: torch.save(best, f))
                state.best = checkpoint["best"]   # now: if it failed, the next good epoch is kept
            save(f"{cfg.output}/last.pt", lambda f: torch.save(checkpoint, f),
                 keep=f"{cfg.output}/last.prev.pt")
            save_log(cfg, state.log, processes)
        except OSError as e:
            failed = 1
            processes.print0(f"not saved      {e}; the former save stands")
    return processes.max(failed)


def read_last(output, processes):
    """last.pt or, if that is damaged or gone, last.prev.pt; None if there is neither. Raises
    InputError if none can be used."""
    reasons = []
    for path in (f"{output}/last.pt", f"{output}/last.prev.pt"):
        try:
            if os.path.exists(path):
                return deit.read_checkpoint(path)
        except InputError as e:
            reasons.append(str(e))
            processes.print0(f"unusable       {e}")
    if reasons:
        raise InputError(" ".join(reasons) + " Choose another --output to start anew.")
    return None


# FREE may differ when a run is resumed: where and how it runs, what counts at its start only.
# REMEDIES too, and it is printed: for a run that diverged, for a smaller memory.
FREE = {"data", "output", "resume", "eval", "benchmark", "workers", "device", "log_every",
        "save_minutes", "tensorboard", "finetune", "pretrained", "teacher_answers", "local_rank"}
REMEDIES = {"lr", "min_lr", "clip_grad", "amp", "micro_batch", "compile",
            "teacher", "teacher_weights"}   # their path: the weights must be the same


def check_resume(saved, cfg, processes):
    """Raises InputError unless the checkpoint is the beginning of a run with this configuration.
    Prints each remedy that was changed."""
    path = saved["source"]
    if not {"flags", "classes", "optimizer", "step", "totals"} <= saved.keys() or (
            saved["optimizer"] is None):
        raise InputError(f"{path} is no save to go on from (best.pt and saves of other versions "
                         "are not): choose another --output, and start from its weights with "
                         "--finetune.")
    # parse([]): flags that are newer than the save had their defaults
    before = vars(parse([])) | saved["flags"] | {"classes": saved["classes"]}
    now = cfg.flags | {"classes": cfg.classes}
    changed = [f for f in now if f not in FREE and now[f] != before.get(f)]
    fixed = [f if isinstance(now[f], list) else f"{f} ({before.get(f)}, now {now[f]})"
             for f in changed if f not in REMEDIES]
    if fixed:
        raise InputError(f"{path} is of a run with other {', '.join(fixed)}: give the same again, "
                         "or another --output.")
    for f in changed:
        processes.print0(f"changed        --{f.replace('_', '-')} from {before.get(f)} to {now[f]}")
    if "teacher's weights" in before:
        cfg.flags["teacher's weights"] = before["teacher's weights"]
    processes.print0(f"resumed        {path}, {saved['step']} of {cfg.total_steps} steps done")


# ------------------------------------------------------------------------------------------------
# The run: configuration, model and teacher, the loop
# ------------------------------------------------------------------------------------------------

def load_images(args, print0=print):
    """The training and the validation images. What is unexpected is printed. Raises InputError."""
    where = [os.path.join(args.data, name) for name in ("train", "val")]
    if args.val_fraction:
        for folder in where:
            if os.path.isdir(folder):
                raise InputError(f"there is a folder {folder}, but --val-fraction is for class "
                                 "folders that lie in DIR itself: leave it out, or give the folder "
                                 "that they are in.")
        train = ImageFolder(args.data, part=(args.val_fraction, 1))
        val = ImageFolder(args.data, train.classes, (0, args.val_fraction))
    else:
        train = ImageFolder(where[0])
        val = ImageFolder(where[1], train.classes)
    held = set(train.folder_of.tolist())
    empty = [name for i, name in enumerate(train.folders) if i not in held]
    if empty:
        beside = " beside those of --val-fraction" if args.val_fraction else ""
        raise InputError(f"{os.path.join(train.root, empty[0])} holds no images to train on"
                         f"{beside}: add some, or remove the folder ({len(empty)} such in all).")
    if len(train.classes) < 2:
        raise InputError(f"{train.root} holds one class only, {train.classes[0]!r}: there is no "
                         "choice to learn.")
    left_out = sorted({*train.left_out, *val.left_out})
    if left_out:
        print0(f"left out       {len(left_out)} files that are no images by their suffix, or links "
               f"to nowhere: {', '.join(map(repr, left_out[:3]))}")
    if train.classes != sorted(train.classes):
        print0(f"classes        are numbers, so they are ordered by value: {train.classes[:3]} ...")
    return train, val


def make_config(args, processes, train, val, saved=None):
    """One checked configuration from the flags: every flag, with what follows where it was not
    given, and what is derived from them: peak_lr, ks, grad_accum_steps, epoch_steps, total_steps,
    warmup_steps, classes. saved: the checkpoint to go on from, whose --lr, --min-lr, --clip-grad
    and --micro-batch are the defaults. cfg.flags: what a checkpoint keeps. Raises InputError."""
    cfg = types.SimpleNamespace(**vars(args))
    cfg.distillation = args.distillation or ("hard" if args.model in DISTILLED else "none")
    own_size = deit.VARIANTS[args.model][2] if args.model in deit.VARIANTS else 224
    cfg.img_size = args.img_size or own_size
    cfg.classes, cfg.num_classes = train.classes, len(train.classes)
    batch, world_size = args.batch_size, processes.world_size
    former = saved.get("flags", {}) if saved else {}
    for name, default in (("lr", 5e-4), ("clip_grad", 0.0)):
        if getattr(args, name) is None:
            setattr(cfg, name, former.get(name, default))
    micro = args.micro_batch or former.get("micro_batch") or max(1, min(128, batch // world_size))
    if batch < micro * world_size or batch % (micro * world_size):
        nearest = max(1, round(batch / (micro * world_size))) * micro * world_size
        fitting = [m for m in range(1, micro) if batch % (m * world_size) == 0]
        smaller = f"--micro-batch {fitting[-1]} or " if fitting else ""
        raise InputError(f"--batch-size {batch} is not processes x micro-batch x an integer "
                         f"({world_size} x {micro} x n): take {smaller}--batch-size {nearest}.")
    if len(train) < batch and not args.benchmark:
        raise InputError(f"{train.root} holds {len(train)} images, fewer than a batch of {batch}: "
                         "lower --batch-size.")
    cfg.micro_batch = micro
    cfg.ks = range(processes.rank, batch // micro, world_size)   # this process's micro-batches
    cfg.grad_accum_steps = len(cfg.ks)
    cfg.peak_lr = cfg.lr * batch / 512
    if args.min_lr is None:
        cfg.min_lr = former.get("min_lr", math.inf)
        if cfg.min_lr > cfg.peak_lr:
            cfg.min_lr = 1e-5 if cfg.peak_lr > 1e-5 else cfg.peak_lr / 10
    if args.warmup_epochs is None:
        cfg.warmup_epochs = min(5.0, args.epochs / 5)
    if cfg.peak_lr < cfg.min_lr:
        raise InputError(f"the peak learning rate, {cfg.lr} x {batch} / 512 views, is below "
                         f"--min-lr {args.min_lr}: raise --lr or lower --min-lr.")
    cfg.epoch_steps = max(1, len(train) // batch)   # 1: a benchmark on less than a batch
    cfg.total_steps = args.epochs * cfg.epoch_steps
    cfg.warmup_steps = round(cfg.warmup_epochs * cfg.epoch_steps)
    cfg.flags = {f: getattr(cfg, f) for f in vars(args)} | {
        "training images": train.fingerprint(), "validation images": val.fingerprint()}
    return cfg


def make_loaders(train_images, val_images, cfg, processes, step=0):
    """The validation's loader and the iterator of the training's micro-batches from a step on."""
    val_loader, _ = make_loader(EvalDataset(val_images), [], processes)   # evaluate fills the list
    items = train_items(len(train_images), cfg, step)
    return val_loader, make_loader(TrainDataset(train_images, cfg), items, processes)[1]


def check_compiler(processes):
    """Raises InputError unless torch.compile works here."""
    try:
        torch.compile(lambda x: x + 1)(torch.ones(1, device=processes.device))
    except Exception as e:   # no compiler, no Triton, no write access to a cache
        raise InputError(f"--compile does not work here ({reason(e)}): install a C++ compiler (on "
                         "a GPU Triton too), or leave it out.") from e


def must_accept(model, name, size, num_classes, processes):
    """The model, in evaluation mode and on the CPU, if it takes images of that size (a torchvision
    transformer takes one only) in the layout of this run's device (a .view() may not), and answers
    with num_classes logits."""
    images = torch.zeros(1, 3, size, size).contiguous(memory_format=layout_of(processes.device))
    try:
        with torch.no_grad():
            shape = tuple(model.eval()(images).shape)
        if shape != (1, num_classes):
            raise ValueError(f"it gives {shape}")
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as e:
        why = str(e).partition("\n")[0] or repr(e)
        raise InputError(f"{name} does not turn images of {size} px into {num_classes} logits each "
                         f"({why}).") from e
    return model


def make_model(cfg, processes):
    """The model to train, with random weights from the seed."""
    names = "img_size", "patch_size", "embed_dim", "depth", "num_heads", "drop_path"
    given = {f: getattr(cfg, f) for f in names if getattr(cfg, f) is not None}
    if cfg.model in deit.VARIANTS:
        given = {"drop_path": 0.1} | given
    torch.manual_seed(rng_for(cfg.seed, "weights").getrandbits(63))
    model = deit.create_model(cfg.model, num_classes=cfg.num_classes, **given)
    if processes.device.type == "cuda":   # RegNets once trained 3 times slower in channels-last
        model.to(memory_format=torch.contiguous_format)
    return must_accept(model, cfg.model, cfg.img_size, cfg.num_classes, processes).train()


def make_teacher(cfg, state, train_images, val_loader, processes):
    """What train_step asks: the frozen teacher on the device, or Answers; None when nothing is to
    be learned from one. val_loader: where it is tried (None: nowhere). Raises InputError."""
    if cfg.distillation == "none":
        return None
    if cfg.teacher_answers and (not cfg.benchmark or os.path.exists(cfg.teacher_answers)):
        # a benchmark begins no file; a run doesn't look before rank 0 did: NFS remembers "none"
        state.answers = Answers(cfg, train_images, processes, state.step)
        # complete: no teacher is needed, but a file of weights, if given, is compared
        given = processes.max(int(os.path.isfile(cfg.teacher_weights)))
        if state.answers.complete and not given:
            check_teacher(state.answers.facts.get("teacher's weights"), cfg)
            return state.answers
    weights = None if cfg.teacher_weights == "none" else cfg.teacher_weights
    torch.manual_seed(rng_for(cfg.seed, "teacher").getrandbits(63))   # for random weights
    teacher = processes.main_process_first(lambda: deit.load_teacher(
        cfg.teacher, weights, cfg.num_classes, img_size=cfg.img_size))
    must_accept(teacher, cfg.teacher, cfg.img_size, cfg.num_classes, processes)
    processes.check_same(**{"teacher's weights": teacher.sha256})   # nodes may hold unlike files
    if teacher.classes not in (None, cfg.classes):
        strange = [name for name in teacher.classes if name not in cfg.classes] or teacher.classes
        raise InputError(f"the teacher {weights} was trained on other classes than {cfg.data}'s: "
                         f"{', '.join(strange[:3])}, ...; train one on these.")
    check_teacher(teacher.sha256, cfg)
    teacher.to(processes.device)
    if val_loader is not None:
        try_teacher(teacher, val_loader, cfg, processes)
    if cfg.compile:   # after a first call, which makes the copy in autocast's type
        ask(teacher, torch.zeros(1, 3, cfg.img_size, cfg.img_size, device=processes.device), 0, 0,
            processes)
        teacher.compile()
    if state.answers and cfg.benchmark:   # it keeps no answers, so any teacher will do
        state.answers.teacher = teacher
    elif state.answers:
        state.answers.set_teacher(teacher, processes)
    return state.answers or teacher


def check_teacher(sha256, cfg):
    """Raises InputError if the run began with another teacher's weights. sha256: of these."""
    if cfg.flags.setdefault("teacher's weights", sha256) != sha256:
        raise InputError("the teacher has other weights than at the start of this run: give the "
                         "same --teacher-weights or --teacher-answers, or another --output.")


def try_teacher(teacher, val_loader, cfg, processes):
    """Prints the teacher's accuracy on some validation images; refuses one that knows nothing."""
    val = val_loader.dataset.folder
    some = np.unique(np.linspace(0, len(val) - 1, 512).astype(np.int64))
    scores, _ = evaluate({"teacher": teacher}, val_loader, some, cfg.img_size, cfg.micro_batch,
                         processes)
    accuracy, chance = scores["teacher"]["cls"], 1 / cfg.num_classes
    processes.print0(f"teacher        {cfg.teacher}, weights {cfg.teacher_weights}, "
                     f"{accuracy:.1f} % right on {len(some)} validation images")
    bound = chance + 2 * math.sqrt(chance * (1 - chance) / len(some))   # two standard errors
    if cfg.teacher_weights != "none" and accuracy / 100 <= bound:
        what = (f"the teacher is right on {accuracy:.1f} % of {len(some)} validation images, no "
                f"better than chance: its classes are in another order than {cfg.data}'s, or it is "
                "not trained (see --teacher-weights)")
        if len(some) >= 200:
            raise InputError(what + ".")
        processes.print0(f"warning        {what} (or the images are too few to tell).")


def make_board(cfg, state, processes):
    """TensorBoard's writer on rank 0 with --tensorboard, else None. Raises InputError."""
    if not cfg.tensorboard or processes.rank:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise InputError(f"{e}: pip install tensorboard, or leave out --tensorboard.") from e
    return SummaryWriter(cfg.output, purge_step=len(state.log) + 1, flush_secs=1)


def clock(seconds):
    return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02d}:{int(seconds) % 60:02d}"


def print_start(state, cfg, train, val, processes):
    decayed, rest = ([p.numel() for p in g["params"]] for g in state.optimizer.param_groups)
    processes.print0(
        f"model          {cfg.model}, {sum(decayed) + sum(rest):,} parameters, {cfg.img_size} px\n"
        f"data           {len(train)} training and {len(val)} validation images of "
        f"{cfg.num_classes} classes\n"
        f"batch          {cfg.batch_size} views = {processes.world_size} processes x "
        f"{cfg.micro_batch} micro-batch x {cfg.grad_accum_steps} accumulated; {cfg.repeats} views "
        f"an image\n"
        f"schedule       {cfg.epochs} epochs of {cfg.epoch_steps} steps, lr {cfg.peak_lr:.3g} "
        f"after {cfg.warmup_steps} steps of warm-up, then down to {cfg.min_lr:.3g}\n"
        f"weight decay   {cfg.weight_decay} on {len(decayed)} tensors ({sum(decayed):,}), none on "
        f"{len(rest)} ({sum(rest):,})\n"
        f"distillation   {cfg.distillation}\n"
        f"running on     {processes.device}, {processes.precision}, {processes.workers} loader "
        f"workers, torch {torch.__version__}, output in {cfg.output}")


def print_step(state, cfg, times, processes):
    """The live line: here, and nowhere else between saves, the device is asked for values."""
    loss, agreed, micro_batches, skipped = processes.sum(state.totals).tolist()
    loss /= max(1, micro_batches)
    check_finite(state, loss, cfg)
    now, at = time.perf_counter(), state.step - len(state.log) * cfg.epoch_steps
    pace = (now - times.run) / (state.step - times.first_step)   # seconds, evaluation included
    live = sys.stdout.isatty()
    if live or at < cfg.epoch_steps:   # else the epoch's line follows at once
        processes.print0(
            f"epoch {len(state.log) + 1} step {at}/{cfg.epoch_steps}  loss {loss:.3f}  lr "
            f"{state.optimizer.param_groups[0]['lr']:.2e}  {cfg.batch_size / pace:.0f} img/s  "
            f"waiting for data {100 * state.data_time / (now - times.epoch):.0f} %  "
            f"{clock(pace * (cfg.total_steps - state.step))} left ", end="\r" if live else "\n")


def epoch_line(r):
    """A record of the log as one aligned line."""
    ema = f"  ema {r['ema_both']:5.2f}" if "ema_both" in r else ""
    agreement = f"  agreement {r['agreement']:4.1f}" if "agreement" in r else ""
    unreadable = f"  {r['unreadable']} unreadable" if r["unreadable"] else ""
    skipped = f"  {r['skipped_steps']} steps skipped" if r.get("skipped_steps") else ""
    heads = f"class {r['cls']:5.2f}"
    if not r["cls"] == r["dist"] == r["both"]:   # two heads
        heads += f"  dist {r['dist']:5.2f}  both {r['both']:5.2f}"
    return (f"epoch {r['epoch']:3d}  loss {r['train_loss']:6.3f}  top-1 % of {r['val_images']}: "
            f"{heads}{ema}{agreement}{unreadable}{skipped}  {r['img_per_s']:.0f} img/s  "
            f"{clock(r['seconds'])}")


def print_unreadable(unreadable, folder, what, processes, limit=3):
    """One line with the count, and the first names with Pillow's words."""
    if unreadable:
        first = "; ".join(f"{folder.path(i)!r} ({unreadable[i]})"
                          for i in sorted(unreadable)[:limit])
        processes.print0(f"unreadable     {len(unreadable)} {what}: {first}")


def save_if_due(state, cfg, processes, late=False):
    """Saves if rank 0 is late with a save, or if a signal has come to any process, which then ends
    the program. Returns whether a save was due."""
    due = processes.max(2 * processes.signal + late)   # 0: no, 1: late, above: a signal
    if not due:
        return False
    failed = save_state(state, cfg, processes)
    if due > 1:
        processes.print0(f"stopped        by {signal.Signals(due // 2).name} after step "
                         f"{state.step}, {'NOT saved' if failed else 'saved'} in {cfg.output}: "
                         "--resume goes on")
        raise SystemExit(128 + due // 2)
    return True


def end_epoch(state, cfg, times, train_images, val_loader, processes):
    """Evaluates, adds a record to the log, saves. Returns what save_state returned."""
    seconds, val_images = time.perf_counter() - times.epoch, val_loader.dataset.folder
    state.merge(processes)
    scores, bad_val = evaluate(state.evaluated(), val_loader, np.arange(len(val_images)),
                               cfg.img_size, cfg.micro_batch, processes, stop_on_signal=True)
    save_if_due(state, cfg, processes)   # a signal cut the evaluation short: --resume repeats it
    loss, agreed, micro_batches, skipped = processes.sum(state.totals).tolist()
    record = {"epoch": len(state.log) + 1, "step": state.step,
              "lr": state.optimizer.param_groups[0]["lr"],
              "train_loss": loss / max(1, micro_batches)}
    for name, prefix in zip(scores, ("", "ema_")):   # the model, its average
        record |= {prefix + key: scores[name][key] for key in ("cls", "dist", "both")}
    if cfg.distillation != "none":
        record["agreement"] = 100 * agreed / max(1, micro_batches)
    if state.scaler.is_enabled():
        record["skipped_steps"] = round(skipped)
    steps = state.step - max(times.first_step, state.step - cfg.epoch_steps)
    record |= {"val_images": len(val_images), "unreadable": len(state.unreadable) + len(bad_val),
               "img_per_s": steps * cfg.batch_size / seconds, "waiting": state.data_time / seconds,
               "seconds": time.perf_counter() - times.epoch}
    processes.print0(epoch_line(record))
    state.log.append(record)
    state.totals.zero_()
    state.data_time = 0.0
    failed = save_state(state, cfg, processes, is_best=record["both"] > state.best)
    print_unreadable(bad_val, val_images, "validation images, counted as wrong", processes)
    too_many = len(state.unreadable) > len(train_images) / 100
    print_unreadable(state.unreadable, train_images, "training images, others of their class stand "
                     "in", processes, limit=None if too_many else 3)
    if too_many:
        raise InputError(f"{len(state.unreadable)} of {len(train_images)} training images cannot "
                         "be read, more than 1 %: replace those named above, then --resume; or "
                         "remove them and choose another --output.")
    return failed


def find_save(args, processes):
    """The save to go on from; None: a new run starts. Raises InputError rather than overwrite the
    files of another run."""
    output, files = args.output, ("last.pt", "last.prev.pt", "best.pt", "log.jsonl")
    if not args.resume and any(os.path.exists(f"{output}/{name}") for name in files):
        raise InputError(f"{output} holds a run: add --resume to go on with it, or choose another "
                         "--output.")
    saved = read_last(output, processes) if args.resume else None
    if args.resume and not saved:
        processes.print0(f"resume         {output} holds no save: a new run starts")
    if saved is None and os.path.exists(f"{output}/best.pt"):
        raise InputError(f"{output} holds best.pt, but no last.pt to go on from: move it away, or "
                         "choose another --output.")
    return saved


def train(args, processes):
    """Trains args.model on args.data, within output_folder; returns the log, one record per epoch.
    Once a signal has come, saves and exits. Raises InputError."""
    saved = find_save(args, processes)
    train_images, val_images = load_images(args, processes.print0)
    cfg = make_config(args, processes, train_images, val_images, saved)
    if saved:
        check_resume(saved, cfg, processes)
        if len(saved["log"]) == cfg.epochs:
            save_log(cfg, saved["log"], processes)
            processes.print0(f"finished       nothing left to do, best top-1 {saved['best']:.2f} %")
            return saved["log"]

    # Workers are forked first. They get the checkpoint's step, not its tensors: read_checkpoint
    # maps these from the disk, and they are read below.
    step = saved["step"] if saved else 0
    val_loader, batches = make_loaders(train_images, val_images, cfg, processes, step)
    if cfg.compile:
        check_compiler(processes)   # which starts threads, so after the fork
    processes.join()
    # log_every: at the live line the processes add up their totals
    processes.check_same(
        step=step, epochs_done=len(saved["log"]) if saved else 0, device=processes.device.type,
        precision=processes.precision,
        **{f: v for f, v in cfg.flags.items() if f not in FREE or f == "log_every"})

    model = make_model(cfg, processes)
    initial = cfg.model if cfg.pretrained else cfg.finetune
    if initial and not saved:
        processes.main_process_first(lambda: deit.load_weights(
            model, initial, say=processes.print0))
    state = State(model, cfg, processes)
    if saved:
        state.load_state_dict(saved, processes, train_images)
    from_previous = saved and saved["source"].endswith("last.prev.pt")
    del saved
    teacher = make_teacher(cfg, state, train_images, val_loader, processes)
    print_start(state, cfg, train_images, val_images, processes)
    last = f"{cfg.output}/last.pt"
    if from_previous and os.path.exists(last) and processes.rank == 0:
        os.replace(last, f"{last}.damaged")   # or it becomes prev
    board = make_board(cfg, state, processes)
    save_log(cfg, state.log, processes)
    if step == 0 and save_state(state, cfg, processes):
        raise InputError(f"nothing can be saved in {cfg.output}: make room, or choose another "
                         "--output.")
    train_epochs(state, teacher, batches, cfg, train_images, val_loader, board, processes)
    return state.log


def train_epochs(state, teacher, batches, cfg, train_images, val_loader, board, processes):
    """The loop: steps, and after each epoch evaluation, record, save. Raises InputError."""
    now = time.perf_counter()
    times = types.SimpleNamespace(run=now, epoch=now, save=now, first_step=state.step)
    while len(state.log) < cfg.epochs:
        state.model.train()   # evaluate ended it
        while state.step < (len(state.log) + 1) * cfg.epoch_steps:
            train_step(state, teacher, batches, cfg, processes)
            at = state.step - len(state.log) * cfg.epoch_steps
            if at % cfg.log_every == 0 or at == cfg.epoch_steps:
                print_step(state, cfg, times, processes)
            late = processes.rank == 0 and time.perf_counter() - times.save > 60 * cfg.save_minutes
            if save_if_due(state, cfg, processes, late):
                times.save = time.perf_counter()
        failed = end_epoch(state, cfg, times, train_images, val_loader, processes)
        times.epoch = times.save = time.perf_counter()
        if board:
            with contextlib.suppress(OSError):   # a full disk; log.jsonl has it as well
                for key, value in state.log[-1].items():
                    board.add_scalar(key, value, len(state.log))
    if failed:
        raise InputError(f"the run is done, but its last save in {cfg.output} failed: make room "
                         "and add --resume, which repeats what is missing.")
    processes.print0(f"finished       in {clock(time.perf_counter() - times.run)}, best top-1 "
                     f"{state.best:.2f} %")


# ------------------------------------------------------------------------------------------------
# The commands --eval and --benchmark
# ------------------------------------------------------------------------------------------------

def run_eval(args, processes):
    """--eval: accuracies of a checkpoint on DATA/val (or the --val-fraction of DATA), by each head.
    Returns them. Raises InputError."""
    root, part = os.path.join(args.data, "val"), (0, 1)
    if args.val_fraction:
        root, part = args.data, (0, args.val_fraction)
    folder = ImageFolder(root, part=part)
    loader, _ = make_loader(EvalDataset(folder), [], processes)
    processes.join()
    given = {f: getattr(args, f) for f in ("img_size", "num_heads") if getattr(args, f) is not None}
    model = args.model if ":" in args.model else None
    model = processes.main_process_first(
        lambda: deit.load_model(args.eval, model=model, say=processes.print0, **given))
    known, size = model.config["num_classes"], model.config["img_size"]
    model = must_accept(model, args.eval, size, known, processes).to(processes.device)
    folder.renumber(model.classes or folder.classes)
    if known != len(folder.classes):
        raise InputError(f"{args.eval} knows {known} classes, {folder.root} has "
                         f"{len(folder.classes)}.")
    scores, unreadable = evaluate({"model": model}, loader, np.arange(len(folder)), size,
                                  args.micro_batch or 128, processes)
    processes.print0(f"{args.eval}: {len(folder)} images at {size} px, {processes.precision}")
    if args.val_fraction:
        before = deit.read_checkpoint(args.eval).get("flags", {}).get("val_fraction", part[1])
        if before < args.val_fraction:
            processes.print0(f"warning        it was trained with --val-fraction {before}: it has "
                             "seen some of these images, if they are of the same folder")
    print_unreadable(unreadable, folder, "images, counted as wrong", processes)
    titles = {"cls": "class head", "dist": "distillation head", "both": "both"}
    for key in titles if getattr(model, "num_tokens", 1) == 2 else ("cls",):
        processes.print0(f"  {titles[key]:18s} top-1 {scores['model'][key]:6.3f} %   top-5 "
                         f"{scores['model'][key + '5']:6.3f} %")
    return scores["model"]


def measure_rate(processes, work, views, warm_up=1, seconds=8):
    """Views per second of all processes together; work() handles `views` of this process."""
    done, start = -warm_up, 0.0
    while done <= 0 or processes.max(int(time.perf_counter() - start < seconds)):
        if done == 0:   # the warm-up is over, on the device too
            start = time.perf_counter()
        work()
        if processes.device.type != "cpu":
            torch.accelerator.synchronize()
        done += 1
    rate = torch.tensor(done * views / (time.perf_counter() - start), dtype=torch.float64)
    return processes.sum(rate).item()


def peak_memory_mib(device):
    """Largest memory so far: of the device, or of this process; nan where it is not known."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    try:
        import resource
    except ImportError:   # Windows
        return math.nan
    unit = 2**20 if sys.platform == "darwin" else 2**10   # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def run_benchmark(args, processes):
    """--benchmark: times the loader, the teacher, the run's own train_step on one batch again and
    again, the same with the loader, and validation; prints a table and, as the last line, a JSON
    object. Rates are views per second of all processes. Saves no checkpoint. Raises InputError."""
    train_images, val_images = load_images(args, processes.print0)
    cfg = make_config(args, processes, train_images, val_images)
    val_loader, batches = make_loaders(train_images, val_images, cfg, processes)
    processes.join()
    state = State(make_model(cfg, processes), cfg, processes)
    teacher = make_teacher(cfg, state, train_images, None, processes)
    micro, mine = cfg.micro_batch, cfg.batch_size // processes.world_size
    ready = 2 * processes.workers + 1   # micro-batches that may wait finished: never counted
    rate = functools.partial(measure_rate, processes)
    loader_rate = rate(lambda: next(batches), micro, warm_up=ready)
    batch = next(batches)
    teacher_rate, asked, no_cost = None, teacher, teacher   # complete Answers ask nobody
    if teacher and not (state.answers and state.answers.complete):
        images = normalise(batch[0], processes.device)
        asked = state.answers.teacher if state.answers else teacher
        fixed = ask(asked, images, 0, 0, processes)
        teacher_rate = rate(lambda: ask(asked, images, 0, 0, processes), micro)
        no_cost = lambda images: fixed   # its answer, without its forward pass

    def step(teacher, batches):
        train_step(state, teacher, batches, cfg, processes)
        state.step %= cfg.total_steps

    again = itertools.repeat(batch)
    student_rate = rate(lambda: step(no_cost, again), mine)
    for _ in range(ready):
        next(batches)
    step_rate = rate(lambda: step(asked, batches), mine, warm_up=0)
    some = np.arange(min(len(val_images), 4 * micro * processes.world_size))
    val_rate = rate(lambda: evaluate(state.evaluated(), val_loader, some, cfg.img_size, micro,
                                     processes), len(some) / processes.world_size)
    device_rate = 1 / (1 / student_rate + (1 / teacher_rate if teacher_rate else 0))
    seconds = cfg.epoch_steps * cfg.batch_size / step_rate + len(val_images) / val_rate
    result = {"loader_img_per_s": loader_rate, "teacher_img_per_s": teacher_rate,
              "student_img_per_s": student_rate, "step_img_per_s": step_rate,
              "validation_img_per_s": val_rate,
              "peak_memory_mib": peak_memory_mib(processes.device),
              "projected_hours": cfg.epochs * seconds / 3600,
              "workers_needed": math.ceil(max(1, processes.workers) * device_rate / loader_rate)}
    rows = {f"loader, {processes.workers} workers": loader_rate,
            f"teacher {cfg.teacher if teacher else ''}": teacher_rate, "validation": val_rate,
            f"{cfg.model}, with its step": student_rate, "all of it": step_rate}
    processes.print0(f"{processes.world_size} processes on {processes.device}, "
                     f"{processes.precision}, {cfg.img_size} px, micro-batch {micro}, torch "
                     f"{torch.__version__}")
    for title, value in rows.items():
        processes.print0(f"  {title:56s}" + (f"{value:9.1f} img/s" if value else "     none"))
    slowest = "the loader" if loader_rate < device_rate else "the teacher" if (
        teacher_rate and teacher_rate < student_rate) else "the model"
    processes.print0(f"bottleneck: {slowest}; the device takes {device_rate:.1f} img/s, which "
                     f"{result['workers_needed']} workers a process keep busy\n"
                     f"projected: {clock(cfg.epochs * seconds)} hours for {cfg.epochs} epochs of "
                     f"{len(train_images)} images; peak memory {result['peak_memory_mib']:.0f} MiB")
    processes.print0(json.dumps(result))
    return result


# ------------------------------------------------------------------------------------------------
# Flags: the paper's values are the defaults
# ------------------------------------------------------------------------------------------------

METAVARS = {int: "N", float: "X", str: "NAME"}
DISTILLED = [name for name, variant in deit.VARIANTS.items() if variant[3]]


def parse(argv):
    p = argparse.ArgumentParser(description="Trains DeiT with the paper's recipe.",
                                usage="%(prog)s [--data DIR] [flags]", allow_abbrev=False)
    p.add_argument("--data", metavar="DIR", help="folder of train/<class>/* and val/<class>/*")
    p.add_argument("--val-fraction", metavar="X", type=float, default=0.0, help="DIR holds class "
                   "folders only: validate on this part of their images, chosen by path [0]")

    def group(title):
        def add(flag, meaning, default=None, kind=None, **how):
            if "action" not in how:
                kind = kind or (str if default is None else type(default))
                how |= {"type": kind, "default": default}
                how |= {} if "choices" in how else {"metavar": METAVARS[kind]}
                meaning += "" if "[" in meaning else f" [{default}]"
            g.add_argument(flag, help=meaning, **how)
        g = p.add_argument_group(title)
        return add

    add = group("model")
    add("--model", "a DeiT, a torchvision classifier (to train a teacher) or module:function",
        "deit_small_distilled_patch16_224")
    add("--img-size", "side in pixels [the model's: 224 or 384]", kind=int)
    add("--patch-size", "side in pixels [16]", kind=int)
    add("--embed-dim", "width [the model's]", kind=int)
    add("--depth", "number of blocks [12]", kind=int)
    add("--num-heads", "attention heads [the model's]", kind=int)
    add("--drop-path", "of the last block, rising from 0 at the first [0.1]", kind=float)
    add("--finetune", "initial weights: a file, URL or published name [random]")
    add("--pretrained", "short for --finetune with the model's own name", action="store_true")

    add = group("distillation")
    add("--distillation", "what is learned from the teacher: its prediction (hard), its "
        "probabilities (soft), nothing [hard for a distilled model, none for others]",
        choices=[*deit.ALPHA, "none"])
    add("--teacher", "a torchvision classifier, a DeiT or module:function; it gets images "
        "normalised by ImageNet's mean and deviation", "regnet_y_16gf")
    add("--teacher-weights", "file, URL or torchvision's name; DEFAULT: torchvision's choice, or a "
        "function's own; none: random ones", "DEFAULT")
    add("--teacher-answers", "keep the teacher's predictions here and ask only for what is "
        "missing: the next student needs no teacher [off]")
    add("--alpha", "weight of the distillation loss [0.5 hard, 0.1 soft]", kind=float)
    add("--tau", "temperature of soft distillation", 3.0)

    add = group("optimisation")
    add("--epochs", "each of as many views as there are training images", 300)
    add("--batch-size", "views per optimizer step, over all processes", 1024)
    add("--micro-batch", "views in one forward pass, which are mixed together [128, or batch / "
        "processes if that is less]", kind=int)
    add("--lr", "peak learning rate, per 512 views [0.0005]", kind=float)
    add("--min-lr", "floor of the cosine [1e-5, or a tenth of a peak below that]", kind=float)
    add("--warmup-epochs", "of linear warm-up from 1e-6 [5, or a fifth of a short run]", kind=float)
    add("--weight-decay", "of AdamW", 0.05)
    add("--smoothing", "of the true labels", 0.1)
    add("--clip-grad", "largest gradient norm, 0: off [0]", kind=float)
    add("--ema-decay", "of averaged weights, kept in last.pt, 0: off", 0.99996)

    add = group("augmentation")
    add("--repeats", "views of an image in an epoch's batches", 3)
    add("--randaugment", "magnitude 0..10, 0: off", 9.0)
    add("--mixup", "alpha, 0: off", 0.8)
    add("--cutmix", "alpha, 0: off", 1.0)
    add("--erasing", "probability", 0.25)

    add = group("running")
    add("--output", "folder for last.pt, best.pt, log.jsonl [runs/MODEL]")
    add("--resume", "go on from OUTPUT/last.pt if there is one, else start", action="store_true")
    add("--save-minutes", "between saves inside an epoch", 15.0)
    add("--eval", "only evaluate a file, URL or published name [off]")
    add("--benchmark", "only time the stages of a run with these flags", action="store_true")
    add("--tensorboard", "write the epochs' records for it into OUTPUT too", action="store_true")
    add("--amp", "mixed precision; auto is bf16 where the hardware has it", "auto",
        choices=["auto", "bf16", "fp16", "off"])
    add("--compile", "torch.compile the model and the teacher", action="store_true")
    add("--workers", "loader processes per training process; as many again wait for validation "
        "[its share of cores, at most 16]", kind=int)
    add("--seed", "of everything drawn", 0)
    add("--device", "cuda, mps or cpu [the best there is]")
    add("--log-every", "steps between live lines", 50)
    p.add_argument("--local-rank", "--local_rank", help=argparse.SUPPRESS)   # of old launchers
    args = p.parse_args(argv)
    check(args, vars(p.parse_args([])))
    args.output = args.output or os.path.join("runs", args.model.replace(":", "."))
    return args


def check(args, defaults):
    """Raises InputError for impossible numbers, and for flags that do not go together."""
    rules = (
        ("epochs batch_size micro_batch repeats log_every tau lr img_size patch_size embed_dim "
         "depth num_heads", lambda x: 0 < x < math.inf, "it must be above 0"),
        ("min_lr weight_decay clip_grad mixup cutmix seed warmup_epochs workers save_minutes",
         lambda x: 0 <= x < math.inf, "it must be 0 or more"),
        ("smoothing erasing alpha", lambda x: 0 <= x <= 1, "it must lie in 0..1"),
        ("drop_path ema_decay val_fraction", lambda x: 0 <= x < 1, "it must lie in 0..1, below 1"),
        ("randaugment", lambda x: 0 <= x <= 10, "it must lie in 0..10"),
        ("warmup_epochs", lambda x: x < args.epochs, "it must be shorter than the run of "
         f"{args.epochs} epochs"))
    for names, holds, what in rules:
        for name in names.split():
            value = getattr(args, name)
            if value is not None and not holds(value):
                raise InputError(f"--{name.replace('_', '-')} is {value}: {what}.")
    if args.model in DISTILLED and args.distillation == "none":
        raise InputError(f"{args.model} learns from a teacher: without one (--distillation none) "
                         f"take --model {args.model.replace('distilled_', '')}.")
    if args.teacher_answers and args.distillation == "soft":
        raise InputError("--teacher-answers holds predicted classes, no probabilities: leave it "
                         "out with --distillation soft.")
    flags = ("teacher", "teacher_weights", "teacher_answers", "alpha", "tau")
    given = [f for f in flags if getattr(args, f) != defaults[f]]
    if given and not args.distillation and args.model not in DISTILLED:
        if ":" not in args.model:
            deit.torchvision_models(args.model)   # a misspelt name is said first
        raise InputError(f"--{given[0].replace('_', '-')} is given, but {args.model} learns from a "
                         "teacher only with --distillation hard or soft: add it, or drop both.")
    if args.pretrained and args.finetune:
        raise InputError(f"--pretrained means --finetune {args.model}: leave out one of the two.")


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


def demo_regnet(num_classes):
    """A very small RegNet for very small images."""
    models = deit.torchvision_models("regnet_y_400mf")
    parameters = models.regnet.BlockParams(
        depths=[1, 1, 2, 2], widths=[32, 64, 128, 192], group_widths=[16] * 4,
        bottleneck_multipliers=[1.0] * 4, strides=[1, 2, 2, 2], se_ratio=0.25)
    return models.RegNet(parameters, num_classes=num_classes, stem_width=32)


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
              "--erasing 0 --smoothing 0 --ema-decay 0")   # only crops and flips
DEMO_TEACHER = f"--model train:demo_regnet {DEMO_PLAIN} --epochs 12 --warmup-epochs 2 --lr 4e-3"
DEMO_STUDENT = (f"{DEMO_PLAIN} --patch-size 8 --embed-dim 128 --depth 4 --num-heads 4 "
                "--drop-path 0 --epochs 16 --warmup-epochs 3 --lr 3e-3")


def demo(seed):
    """Draws images, trains a teacher, a small DeiT without it and one with it, prints a table."""
    start = time.perf_counter()
    data, output = os.path.join("runs", "demo-data"), os.path.join("runs", f"demo-{seed}")
    if not os.path.isdir(data):
        print(f"drawing 3,600 small pictures into {data}", flush=True)
        draw_demo(f"{data}.{os.getpid()}")
        with contextlib.suppress(OSError):   # another demo was quicker
            os.rename(f"{data}.{os.getpid()}", data)
    weights = os.path.join(output, "teacher", "best.pt")
    runs = {"teacher": DEMO_TEACHER,
            "alone": f"--model deit_tiny_patch16_224 {DEMO_STUDENT}",
            "distilled": f"--model deit_tiny_distilled_patch16_224 {DEMO_STUDENT} "
                         f"--teacher train:demo_regnet --teacher-weights {weights}"}
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


def error_message(error):
    """A user's mistake or a full machine as one sentence; "" for anything else."""
    message = str(error).strip()
    if isinstance(error, InputError):
        return message.split("InputError: ")[-1]   # of a worker's traceback, the end
    if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in message:
        return ("the memory is full: halve the micro-batch (--micro-batch; the batch stays), or "
                "take a smaller model or --img-size.")
    if isinstance(error, OSError):   # the system's words are clear: what, and which file
        return f"{message}."
    if "DataLoader worker (pid" in message or "shared memory" in message:
        return (f"a loader worker died ({message.splitlines()[-1]}): lower --workers or free "
                "memory (in a container, raise --shm-size), then --resume from the last save.")
    if "env:// rendezvous" in message:
        return f"{message}: start several processes with torchrun, or unset RANK."
    if "finished reduction" in message:   # DistributedDataParallel's
        return ("some of the model's parameters have no gradient, which several processes cannot "
                "train: freeze them, by requires_grad_(False).")
    if "Connection closed by peer" in message or "Connection reset by peer" in message:
        return "another process ended: see its message."
    return ""


def end_workers(others):
    """Ends the loader workers at once: they would outlive an error by 30 seconds. others: child
    processes that are no loader workers, which are left alone."""
    handler = signal.getsignal(signal.SIGCHLD) if hasattr(signal, "SIGCHLD") else None
    with contextlib.suppress(ValueError):   # not in the main thread
        if handler:   # PyTorch's, which takes a worker's end for a failure
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for child in set(multiprocessing.active_children()) - set(others):
            child.kill()
            child.join()
        if handler:
            signal.signal(signal.SIGCHLD, handler)


def main(argv=None):
    """The program. A user's mistake raises SystemExit with one sentence; any other error ends the
    workers and is raised on."""
    processes = None
    getattr(sys.stdout, "reconfigure", dict)(errors="backslashreplace")   # it may lack letters
    others = multiprocessing.active_children()
    try:
        args = parse(argv)
        if vars(args) == vars(parse(["--seed", str(args.seed)])) and not os.environ.get("RANK"):
            return demo(args.seed)
        if args.data is None:
            raise InputError("--data is missing: give a folder that holds train/<class>/<image> "
                             "and val/<class>/<image>, or nothing (but --seed) for the demo.")
        processes = Processes(args.device, args.amp, args.workers)
        if args.eval or args.benchmark:
            result = (run_eval if args.eval else run_benchmark)(args, processes)
        else:
            with caught_signals(processes), output_folder(args.output, processes):
                result = train(args, processes)
        processes.leave()
        return result
    except SystemExit:
        if processes:
            processes.leave()
        raise
    except Exception as e:
        sentence = error_message(e)
        if not sentence:
            raise
        rank = f"process {processes.rank}: " if processes and processes.rank else ""
        raise SystemExit(f"train.py: {rank}{sentence}") from None
    finally:
        end_workers(others)


if __name__ == "__main__":
    main()
