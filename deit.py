# SPDX-License-Identifier: MIT
"""DeiT, the data-efficient image transformer (Touvron et al., arXiv 2012.12877), in one file.

A Vision Transformer that learns ImageNet from the true labels and from the predictions of a frozen
convolutional network, the teacher. The distillation token is a sibling of the class token: a
learned vector that enters with the patches and attends like any other token. Label and teacher may
disagree, so each of the two tokens has a linear head of its own: the class head learns the true
label, the distillation head the teacher's prediction. The teacher appears in the loss alone.

Letters:  B images    S image side     P patch side       G = S/P patches per side
          D width     N = T + G*G      T special tokens: 2 (class, distillation) or 1 (class)
          K classes   h attention heads of width d = D/h       n first tokens, if not all N

From image to logits, in DeiT-Ti (S 224, P 16, D 192, h 3, K 1000):
  images                            (B, 3, S, S)   (B, 3, 224, 224)
  patch embedding                   (B, G*G, D)    (B, 196, 192)
  special tokens in front           (B, N, D)      (B, 198, 192)    + position embedding
  11 blocks of attention and MLP    (B, N, D)      (B, 198, 192)
  last block, only T tokens go on   (B, T, D)      (B, 2, 192)
  norm, then one head per token     2 x (B, K)     2 x (B, 1000)    in evaluation: their mean

  import deit, PIL.Image
  model = deit.create_model("deit_tiny_distilled_patch16_224", pretrained=True).eval()
  images = deit.to_tensor(deit.center_view(PIL.Image.open("photo.jpg"), 224))   # (1, 3, 224, 224)
  logits = model(images)                                                        # (1, 1000)

Importing needs torch alone: copy this file into your project. `python deit.py` lists the models,
`python deit.py photo.jpg --weights W` classifies a photo.
"""
import argparse
import collections
import contextlib
import copy
import difflib
import hashlib
import inspect
import math
import os
import pkgutil
import re
import sys
import time
import zipfile

import torch
import torch.nn.functional as F
from torch import nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)   # of RGB in 0..1, for the student and for the teacher
IMAGENET_STD = (0.229, 0.224, 0.225)
CROP_RATIO = 0.875   # evaluation: the short side becomes S / 0.875, then the central S x S is cut
STARTED = time.time()   # what was downloaded since then is not downloaded again, see download


class InputError(ValueError):
    """A user's mistake; the message is one sentence that says how to fix it."""


# ------------------------------------------------------------------------------------------------
# The network. Parameter names are those of the official checkpoints.
# ------------------------------------------------------------------------------------------------

class PatchEmbed(nn.Module):
    """Cuts the image into P x P patches and maps each patch linearly to D numbers."""

    def __init__(self, patch_size, embed_dim):
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images):
        x = self.proj(images)                                     # (B, D, G, G)
        return x.flatten(2).transpose(1, 2)                       # (B, G*G, D)


class Attention(nn.Module):
    """Multi-head self-attention: softmax(q k^T / sqrt(d)) v in each head, then a projection."""

    fused = True   # PyTorch's fused kernel; False: the formula itself, equal up to rounding

    def __init__(self, embed_dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def split_heads(self, x, n=None):
        """x (B, N, D) -> queries (B, h, n, d) of the first n tokens; keys and values of all tokens
        (B, h, N, d) each."""
        h, d = self.num_heads, x.shape[2] // self.num_heads
        qkv = self.qkv(x).unflatten(2, (3, h, d))                 # (B, N, 3, h, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                      # (B, h, N, d) each
        return q[:, :, :n], k, v

    def attention_weights(self, q, k):
        """Attention weights (B, h, n, N) of each query over all keys; rows sum to 1."""
        return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)

    def forward(self, x, n=None):
        """x (B, N, D) -> (B, n, D): the first n tokens (None: all) look at all N."""
        q, k, v = self.split_heads(x, n)
        # on a CPU in bfloat16 the formula's backward pass is several times faster
        slow = q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad
        if self.fused and not slow:
            x = F.scaled_dot_product_attention(q, k, v)           # (B, h, n, d)
        else:
            x = self.attention_weights(q, k) @ v                  # (B, h, n, d)
        return self.proj(x.transpose(1, 2).flatten(2))            # (B, n, D)


class MLP(nn.Module):
    """Two linear layers with an exact (erf) GELU between them, four times wider inside."""

    def __init__(self, embed_dim):
        super().__init__()
        self.fc1 = nn.Linear(embed_dim, 4 * embed_dim)
        self.fc2 = nn.Linear(4 * embed_dim, embed_dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))                      # (B, n, D) -> (B, n, D)


class Block(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)); in training either branch may be dropped."""

    def __init__(self, embed_dim, num_heads, drop_path=0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(embed_dim, eps=1e-6)            # eps of the released models
        self.attn = Attention(embed_dim, num_heads)
        self.norm2 = nn.LayerNorm(embed_dim, eps=1e-6)
        self.mlp = MLP(embed_dim)
        self.drop_path = drop_path

    def add(self, x, branch):
        """x + branch (B, n, D). Drop path (arXiv 1603.09382): in training a sample's branch is 0
        with probability p, else branch / (1 - p), which keeps the mean."""
        if not self.training or self.drop_path == 0:
            return x + branch
        keep = 1 - self.drop_path
        mask = branch.new_empty(x.shape[0], 1, 1).bernoulli_(keep)   # (B, 1, 1), 0 or 1
        return torch.addcmul(x, branch, mask, value=1 / keep)     # 1 / keep is not rounded

    def forward(self, x, n=None):
        """x (B, N, D) -> (B, n, D): only the first n tokens go on (None: all N)."""
        x = self.add(x[:, :n], self.attn(self.norm1(x), n))
        return self.add(x, self.mlp(self.norm2(x)))


def init_linear(module):
    """Linear layers: truncated normal, standard deviation 0.02, zero bias. Other layers keep
    PyTorch's initial weights, as in the official code."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class DeiT(nn.Module):
    """The network, with two special tokens and two heads if distilled, else one of each. Raises
    InputError for impossible numbers."""

    def __init__(self, *, img_size=224, patch_size=16, num_classes=1000, embed_dim=192, depth=12,
                 num_heads=3, distilled=False, drop_path=0.0):
        super().__init__()
        sizes = dict(img_size=img_size, patch_size=patch_size, num_classes=num_classes,
                     embed_dim=embed_dim, depth=depth, num_heads=num_heads)
        for name, value in sizes.items():
            if not isinstance(value, int) or value < 1:
                raise InputError(f"{name} is {value!r}: it must be an integer above 0.")
        for a, b in (("img_size", "patch_size"), ("embed_dim", "num_heads")):
            if sizes[a] % sizes[b]:
                raise InputError(f"{a} {sizes[a]} is not a multiple of {b} {sizes[b]}.")
        if not 0 <= drop_path < 1:
            raise InputError(f"drop_path is {drop_path}: it must lie in 0..1, below 1.")
        self.config = sizes | dict(distilled=distilled, drop_path=drop_path)
        self.classes = None   # their names, if known
        T = self.num_tokens = 2 if distilled else 1
        N = T + (img_size // patch_size) ** 2
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if distilled else None
        self.pos_embed = nn.Parameter(torch.zeros(1, N, embed_dim))
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]   # linear from 0
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)
        self.head_dist = nn.Linear(embed_dim, num_classes) if distilled else None
        for p in (self.cls_token, self.dist_token, self.pos_embed):
            if p is not None:
                nn.init.trunc_normal_(p, std=0.02)
        self.apply(init_linear)

    def embed(self, images):
        """images (B, 3, S, S) -> (B, N, D): special tokens, then patches, + position embedding."""
        B, S = images.shape[0], self.config["img_size"]           # len() would fix B in an export
        if images.shape != (B, 3, S, S):
            raise InputError(f"images are {tuple(images.shape)}: img_size is {S} in this model.")
        tokens = [self.cls_token, self.dist_token][:self.num_tokens]
        x = [token.expand(B, -1, -1) for token in tokens]         # T x (B, 1, D)
        x = torch.cat([*x, self.patch_embed(images)], dim=1)      # (B, N, D)
        return x + self.pos_embed

    def features(self, images, n=None):
        """images (B, 3, S, S) -> the first n tokens (None: all N) after the last norm (B, n, D).
        With n, only these go on in the last block: a training step takes 7 % less time."""
        x = self.embed(images)                                    # (B, N, D)
        for block in self.blocks[:-1]:
            x = block(x)                                          # (B, N, D)
        x = self.blocks[-1](x, n)                                 # (B, n, D)
        return self.norm(x)

    def heads(self, images):
        """images (B, 3, S, S) -> class logits and distillation logits, (B, K) each. Without
        distillation token: the class logits twice."""
        x = self.features(images, self.num_tokens)                # (B, T, D)
        cls_logits = self.head(x[:, 0])                           # (B, K)
        dist_logits = self.head_dist(x[:, 1]) if self.num_tokens == 2 else cls_logits
        return cls_logits, dist_logits

    def forward(self, images):
        """images (B, 3, S, S) -> logits (B, K). A distilled model returns those of both heads in
        training, their mean in evaluation (as released; the paper's section 4 adds softmaxes)."""
        cls_logits, dist_logits = self.heads(images)
        if self.num_tokens == 1:
            return cls_logits
        return (cls_logits, dist_logits) if self.training else (cls_logits + dist_logits) / 2

    @torch.no_grad()
    def attention(self, images):
        """images (B, 3, S, S) -> attention weights of all blocks (depth, B, h, N, N); rows sum to
        1. Row 0: the class token, row 1, if distilled: its token; columns from T on: the patches,
        line by line. Call eval() before: training drops paths."""
        x, weights = self.embed(images), []
        for block in self.blocks:
            q, k, _ = block.attn.split_heads(block.norm1(x))
            weights.append(block.attn.attention_weights(q, k))    # (B, h, N, N)
            x = block(x)                                          # (B, N, D)
        return torch.stack(weights)


# ------------------------------------------------------------------------------------------------
# The losses (paper, section 4): pure functions of logits, in float32 or better, also under autocast
#   soft  (1 - alpha) CE(cls, y) + alpha tau^2 KL(softmax(teacher/tau) || softmax(dist/tau))  eq. 2
#   hard  (1 - alpha) CE(cls, y) + alpha CE(dist, argmax teacher)                             eq. 3
# cls and dist are the two heads' logits, y the true label (in train.py smoothed and mixed), alpha
# is the paper's lambda.
# ------------------------------------------------------------------------------------------------

ALPHA = {"hard": 0.5, "soft": 0.1}   # section 6


def wide(x):
    """x in float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_shapes(*logits):
    """Raises InputError unless the logits' shapes are equal."""
    if len({x.shape for x in logits}) > 1:
        raise InputError(f"shapes of logits do not match: {[tuple(x.shape) for x in logits]}.")


def hard_distillation_loss(dist_logits, teacher):
    """Cross-entropy against the teacher's prediction: a scalar. dist_logits (B, K); teacher: its
    logits (B, K), or its predicted classes (B,)."""
    if teacher.ndim == 2:
        check_shapes(dist_logits, teacher)
        teacher = teacher.argmax(dim=1)                           # (B,)
    return F.cross_entropy(wide(dist_logits), teacher)


def soft_distillation_loss(dist_logits, teacher_logits, tau):
    """tau^2 KL(teacher || student) at temperature tau: (B, K), (B, K) -> scalar. Sums over classes,
    averages over the batch; the released code divides by K too. tau^2 keeps the gradients as large
    as at tau 1."""
    check_shapes(dist_logits, teacher_logits)
    student, teacher = (F.log_softmax(wide(x) / tau, dim=1) for x in (dist_logits, teacher_logits))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * tau**2


def distillation_loss(cls_logits, dist_logits, targets, teacher_logits, mode="hard", alpha=None,
                      tau=3.0):
    """(1 - alpha) cross-entropy of the class head + alpha distillation of the other: a scalar.

    Logits (B, K); targets: class indices (B,) or probabilities (B, K). mode: "hard" (teacher_logits
    may be predicted classes (B,)), "soft", or "none" (cross-entropy alone). alpha None: see ALPHA.
    A student without distillation token passes its class logits twice. Raises InputError for
    another mode or unequal shapes."""
    if mode not in (*ALPHA, "none"):
        raise InputError(f"distillation mode '{mode}' is none of hard, soft, none.")
    check_shapes(cls_logits, dist_logits)
    cls_logits = wide(cls_logits)
    if targets.is_floating_point():
        targets = targets.to(cls_logits.dtype)
    base = F.cross_entropy(cls_logits, targets)
    if mode == "none":
        return base
    if mode == "hard":
        distillation = hard_distillation_loss(dist_logits, teacher_logits)
    else:
        distillation = soft_distillation_loss(dist_logits, teacher_logits, tau)
    alpha = ALPHA[mode] if alpha is None else alpha
    return (1 - alpha) * base + alpha * distillation


# ------------------------------------------------------------------------------------------------
# The teacher: a torchvision classifier (the paper's is regnet_y_16gf), a DeiT, or any module
# ------------------------------------------------------------------------------------------------

class Teacher(nn.Module):
    """A frozen classifier: images (B, 3, S, S) -> logits (B, K), always in evaluation mode.

    Under autocast it runs a copy whose convolutions and linear layers are in autocast's type, so
    that they are cast once, not at each call. The copy is in no state_dict() or deepcopy; .to() and
    load_state_dict() drop it. A user's own module (in a Classifier) runs as it is."""

    def __init__(self, model, classes=None, sha256=None):
        super().__init__()
        self.model = model.requires_grad_(False)
        self.classes = classes   # names, or None if unknown
        self.sha256 = sha256     # of its weights, or None
        self.cast = {}           # {dtype: copy}
        self.eval()
        model.register_load_state_dict_post_hook(self.drop_cast)

    def train(self, mode=True):  # otherwise its batch norms would drift
        return super().train(False)

    def drop_cast(self, *args):
        self.cast.clear()

    def _apply(self, *args, **kwargs):   # .to(device) and the like
        self.drop_cast()
        return super()._apply(*args, **kwargs)

    def __getstate__(self):      # of deepcopy and pickle
        return self.__dict__ | {"cast": {}}

    @torch.no_grad()
    def forward(self, images):
        model, device = self.model, images.device.type
        if isinstance(model, Classifier):
            return model(images)
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            if dtype not in self.cast:
                self.cast[dtype] = copy.deepcopy(model)
                for module in self.cast[dtype].modules():
                    if isinstance(module, (nn.Conv2d, nn.Linear)):
                        module.to(dtype)
            model, images = self.cast[dtype], images.to(dtype)    # for the first convolution
        return model(images.contiguous(memory_format=torch.channels_last))

    def heads(self, images):     # its logits twice: a DeiT has two heads
        return (self(images),) * 2


@torch.no_grad()
def fuse(model, size):
    """Merges each batch norm into the convolution before it: both are linear in evaluation mode.
    Returns the model itself if it cannot be traced or its logits would change."""
    from torch.fx.experimental import optimization
    probe = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    with contextlib.suppress(Exception):   # tracing fails in many ways
        fused = optimization.fuse(model.eval())
        if torch.allclose(fused(probe), model(probe), rtol=1e-4, atol=1e-4):
            return fused
    return model


def load_teacher(name="regnet_y_16gf", weights="DEFAULT", num_classes=1000, *, img_size=None):
    """A frozen Teacher by name: torchvision's, a DeiT's, or "module:function".

    weights: DEFAULT (torchvision's choice), another name of torchvision's, a file or URL (of timm's
    RegNets too, as the paper's teacher), None: random; for DEFAULT and None a function's own.
    img_size: side S of the images, which a DeiT must know. Raises InputError: unknown names,
    another architecture or class count."""
    size = {} if img_size is None else {"img_size": img_size}
    if weights is None or (":" in name and weights == "DEFAULT"):
        model = create_classifier(name, num_classes, **size)
    else:
        source = weights if is_file_or_url(weights) else released_url(name, weights)
        if source != weights and num_classes != 1000:
            raise InputError(f"{name} {weights} knows ImageNet's 1000 classes, the data have "
                             f"{num_classes}: train a teacher on them, then give its best.pt.")
        model = load_model(source, model=name, num_classes=num_classes, new_heads=False, **size)
    sha256, classes = hashlib.sha256(), model.classes
    for key, value in model.state_dict().items():
        sha256.update(key.encode() + value.reshape(-1).view(torch.uint8).numpy().tobytes())
    if name not in VARIANTS and ":" not in name:   # torchvision's, out of its Classifier
        model = fuse(model.module, model.config["img_size"])
    return Teacher(model, classes, sha256.hexdigest())


# ------------------------------------------------------------------------------------------------
# The models. Eight are published, of depth 12 and d = 64. Top-1: measured by their authors on
# ImageNet's validation images; hash: the start of the released file's SHA-256.
# ------------------------------------------------------------------------------------------------

VARIANTS = {   # name                   D, heads,  S,  distilled, parameters, top-1, hash
    "deit_tiny_patch16_224":            (192,  3, 224, False,  5717416, 72.202, "a1311bcf"),
    "deit_small_patch16_224":           (384,  6, 224, False, 22050664, 79.854, "cd65a155"),
    "deit_base_patch16_224":            (768, 12, 224, False, 86567656, 81.846, "b5f2ef4d"),
    "deit_tiny_distilled_patch16_224":  (192,  3, 224,  True,  5910800, 74.476, "b40b3cf7"),
    "deit_small_distilled_patch16_224": (384,  6, 224,  True, 22436432, 81.164, "649709d9"),
    "deit_base_distilled_patch16_224":  (768, 12, 224,  True, 87338192, 83.372, "df68dfff"),
    "deit_base_patch16_384":            (768, 12, 384, False, 86859496, 82.890, "8de9b5d1"),
    "deit_base_distilled_patch16_384":  (768, 12, 384,  True, 87630032, 85.224, "d0272ac0"),
}
RELEASES = "https://dl.fbaipublicfiles.com/deit/"


def create_model(name, *, pretrained=False, **overrides):
    """A published model in training mode, with random weights or the released ones. Overrides: see
    DeiT (drop_path is 0 here; train.py sets the recipe's 0.1). Raises InputError."""
    if name not in VARIANTS:
        raise InputError(f"'{name}' is no DeiT; the known ones are {', '.join(VARIANTS)}.")
    embed_dim, num_heads, img_size, distilled = VARIANTS[name][:4]
    config = dict(embed_dim=embed_dim, num_heads=num_heads, img_size=img_size, distilled=distilled)
    model = DeiT(**config | overrides)
    model.config["name"] = name
    if pretrained:
        load_weights(model, name)
    return model


def torchvision_models():
    """Imports torchvision, here only. Raises InputError if it cannot."""
    try:
        import torchvision.models
    except ImportError as e:
        raise InputError(f"torchvision cannot be imported ({e}): pip install torchvision (or is "
                         "the name of a file or model misspelt?)") from e
    return torchvision.models


def close_names(name):
    """The published models whose names are most like this one."""
    models = torchvision_models()
    known = [*models.list_models(module=models), *VARIANTS]
    return ", ".join(difflib.get_close_matches(name, known) or VARIANTS)


class Classifier(nn.Module):
    """A module, images (B, 3, S, S) -> logits (B, K), with what a DeiT has: config, classes and
    heads(). Writes nothing onto it. Its state dict is the module's, so a module around this one
    can save it, but not load it."""

    def __init__(self, module, **config):
        super().__init__()
        self.module, self.config, self.classes = module, config, None

    def forward(self, images):
        output = self.module(images)
        return getattr(output, "logits", output)                  # transformers' models have it

    def heads(self, images):     # its logits twice: a DeiT has two heads
        return (self(images),) * 2

    def state_dict(self, *args, **kwargs):
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(self, *args, **kwargs):
        return self.module.load_state_dict(*args, **kwargs)


def create_classifier(name=None, num_classes=1000, **overrides):
    """A DeiT by name (None: by overrides alone), else a Classifier: torchvision's by name, or what
    the user's "module:function" returns for num_classes. In training mode. Raises InputError."""
    if name is None:
        return DeiT(num_classes=num_classes, **overrides)
    if name in VARIANTS:
        return create_model(name, num_classes=num_classes, **overrides)
    size = overrides.pop("img_size", None)   # kept in config only: a convnet takes any
    if ":" in name:
        if os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        try:
            function = pkgutil.resolve_name(name)
            inspect.signature(function).bind(num_classes)
        except (ImportError, AttributeError, TypeError, ValueError) as e:
            raise InputError(f"{name} cannot be used ({e}): give module:function, which is called "
                             "with the number of classes.") from e
        model = function(num_classes)
        if not isinstance(model, nn.Module):
            raise InputError(f"{name} returned a {type(model).__name__}, not an nn.Module.")
        model.cpu()   # as all others: the caller moves it
    else:
        models = torchvision_models()
        if name not in models.list_models(module=models):
            raise InputError(f"'{name}' is neither one of torchvision's classifiers nor a DeiT nor "
                             f"module:function; there are {close_names(name)}, and others.")
        model = models.get_model(name, weights=None, num_classes=num_classes)
        if getattr(model, "aux_logits", False):
            raise InputError(f"'{name}' has auxiliary heads: take a classifier with one output.")
        model.to(memory_format=torch.channels_last)   # train.make_model undoes it on a GPU
        published = models.get_model_weights(name).DEFAULT.transforms
        size = size or published.keywords["crop_size"]
    if overrides:
        raise InputError(f"{next(iter(overrides))} is for DeiT, it cannot be set for '{name}'.")
    return Classifier(model, name=name, num_classes=num_classes, img_size=size or 224)


# ------------------------------------------------------------------------------------------------
# Weights from a file, a URL, a published name or a state dict. Nothing that is loaded can run code.
# ------------------------------------------------------------------------------------------------

def is_file_or_url(source):
    return os.path.isfile(source) or re.match(r"(https?|file)://", str(source)) is not None


def released_url(name, weights="DEFAULT"):
    """URL of a DeiT's released weights, or of a torchvision classifier's under torchvision's name
    for them (DEFAULT: its choice). Raises InputError."""
    if name in VARIANTS and weights == "DEFAULT":
        return f"{RELEASES}{name}-{VARIANTS[name][-1]}.pth"
    models = torchvision_models()
    known = name in models.list_models(module=models)
    entries = models.get_model_weights(name).__members__ if known else {}
    if weights not in entries:
        source = name if weights == "DEFAULT" else weights
        if os.path.isdir(source):
            raise InputError(f"{source} is a folder: give a file in it, such as best.pt.")
        raise InputError(f"'{source}' is neither a file nor a URL nor a published name "
                         f"({', '.join(entries) or close_names(name)}).")
    return entries[weights].url


def download(url):
    """Path of the URL's file in torch.hub's cache. A file whose name ends in the start of its
    SHA-256 (-1234abcd.pth) is downloaded once and checked. Any other is downloaded again by each
    program; if that fails, the cached copy is used. Raises InputError."""
    name = os.path.basename(url)
    sha256 = re.search(r"-(?!20\d{6}\.)([0-9a-f]{8,64})\.\w+$", name)   # no date
    if not sha256:   # names such as best.pt are not unique
        name = f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"
    path = os.path.join(torch.hub.get_dir(), "checkpoints", name)
    there = os.path.exists(path)
    if there and (sha256 or os.path.getmtime(path) >= STARTED):   # by another process of this run
        return path
    try:   # a download that fails leaves no file, and the former one as it was
        os.makedirs(os.path.dirname(path), exist_ok=True)
        torch.hub.download_url_to_file(url, path, sha256 and sha256[1], sys.stderr.isatty())
    except Exception as e:   # OSError, RuntimeError (the hash), HTTPException, ...
        if not there:
            raise InputError(f"{url} could not be downloaded ({e}): give the path of a file "
                             "instead (--finetune, --teacher-weights; deit.py: --weights).") from e
        print(f"{url} could not be downloaded ({e}): the copy of an earlier start is used.")
    return path


def read_checkpoint(source):
    """A checkpoint's dict, its state dict under "model", from a path, URL or published name. Raises
    InputError if there is none, it is damaged, or holds more than plain values and tensors."""
    source = path = os.fspath(source)
    if not os.path.isfile(source):
        path = download(source if is_file_or_url(source) else released_url(source))
    try:
        zipped = zipfile.is_zipfile(path)
        if zipped:   # torch.load checks no CRC and skips what is marked a folder
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() or any(i.external_attr & 16 for i in archive.infolist()):
                    raise ValueError("a checksum does not match")
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as e:   # the readers of damaged files raise nearly anything
        if path != source:
            os.remove(path)   # half a download, perhaps: not to be found again
        raise InputError(f"{path} is no checkpoint that can be read safely: it is damaged or holds "
                         f"more than tensors and values ({type(e).__name__}; .safetensors needs a "
                         "recent PyTorch and pip install safetensors).") from e
    return as_checkpoint(content, source)


def as_checkpoint(content, source=None):
    """A checkpoint or a bare state dict -> {"model": state dict, "source": its origin, ...}. One of
    train.py, which has a config, keeps its names; others are brought to torchvision's, without
    prefixes of wrappers. Raises InputError for anything else."""
    if not isinstance(content, dict) or not isinstance(content.get("model"), dict):
        content = {"model": content}
    source, state = source or content.get("source", "the state dict"), content["model"]
    if not isinstance(state, dict) or not state or not all(
            isinstance(key, str) and torch.is_tensor(value) and value.layout == torch.strided
            for key, value in state.items()):
        raise InputError(f"{source} holds no state dict, neither as a whole nor under 'model'.")
    if "config" in content:
        return content | {"source": source}
    timm = any(key.endswith("s1.b1.conv1.conv.weight") for key in state)
    clean = collections.OrderedDict()
    for key, value in state.items():
        key = re.sub(r"^((module|_orig_mod)\.)+", "", key)
        key = re.sub(r"(denselayer\d+\.(norm|conv))\.([12])\.", r"\1\3.", key)   # files of 2017
        if ".encoder_layer_" in key:                              # of torchvision's ViT
            key = key.replace(".linear_1.", ".0.").replace(".linear_2.", ".3.")
        clean[regnet_name(key) if timm else key] = value
    clean._metadata = getattr(state, "_metadata", None)   # versions, which MNASNet asks for
    return content | {"model": clean, "source": source}


def regnet_name(key):
    """torchvision's name of a RegNet's parameter, from timm's, which the paper's teacher has."""
    for timm, torchvision in ((".conv.", ".0."), (".bn.", ".1."), (".conv1.", ".f.a."),
                              (".conv2.", ".f.b."), (".conv3.", ".f.c."), (".se.", ".f.se."),
                              (".downsample.", ".proj."), ("head.fc.", "fc.")):
        key = key.replace(timm, torchvision)
    return re.sub(r"^s(\d)\.b(\d+)\.", lambda m: f"trunk_output.block{m[1]}.block{m[1]}-"
                  f"{int(m[2]) - 1}.", key)


def resize_pos_embed(pos_embed, model):
    """pos_embed (1, T + g*g, D) of a checkpoint -> (1, N, D) of this model: the patches' grid is
    interpolated bicubically (paper, section 3), the rest stays. Same size: unchanged."""
    T, G = model.num_tokens, model.config["img_size"] // model.config["patch_size"]
    length = pos_embed.shape[1] if pos_embed.ndim == 3 else 0
    g = math.isqrt(max(0, length - T))
    if g in (0, G) or g * g + T != length:
        return pos_embed                                          # fits, or load_weights refuses it
    tokens, grid = pos_embed.float().split([T, g * g], dim=1)
    grid = grid.unflatten(1, (g, g)).permute(0, 3, 1, 2)          # (1, D, g, g)
    grid = F.interpolate(grid, size=(G, G), mode="bicubic", align_corners=False)
    return torch.cat([tokens, grid.flatten(2).transpose(1, 2)], dim=1)


def load_weights(model, source, *, new_heads=True, classes=None, say=print):
    """Loads a path, URL, published name, checkpoint or state dict into the model, strictly.

    Resizes a DeiT's position embedding. Starts a head anew, and tells `say`, if the source has no
    or another class count, or other names than `classes` (new_heads=False: refused). Raises
    InputError if the architectures differ, in the number of attention heads too if it is told."""
    checkpoint = as_checkpoint(source) if isinstance(source, dict) else read_checkpoint(source)
    config, model = getattr(model, "config", {}), getattr(model, "module", model)   # of Classifier
    source, state, own = checkpoint["source"], copy.copy(checkpoint["model"]), model.state_dict()
    if isinstance(model, DeiT) and "pos_embed" in state:
        state["pos_embed"] = resize_pos_embed(state["pos_embed"], model)
    renamed = classes is not None and checkpoint.get("classes") not in (None, list(classes))
    linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    for head in [n for n in linears if n in ("head", "head_dist")] or linears[-1:]:
        K, weight = len(own[f"{head}.weight"]), state.get(f"{head}.weight", torch.empty(0, 0))
        if weight.ndim != 2 or len(weight) == K and not renamed:
            continue
        differ = f"{len(weight)} classes in {head}, not {K}"      # 0 in a backbone
        if len(weight) == K:
            differ = f"other classes in {head}, not these"
        if not new_heads:
            raise InputError(f"{source} has {differ}: it was trained on other classes.")
        say(f"{source} has {differ}: it starts anew.")
        init_linear(model.get_submodule(head))
        state.update({key: own[key] for key in own if key.startswith(f"{head}.")})
    for key in own.keys() - state.keys():
        if key.endswith(".num_batches_tracked"):                  # batch norms of 2017 had none
            state[key] = own[key]
    here, there = ({f"{key} {tuple(x.shape)}{'' if x.is_floating_point() else ' of integers'}"
                    for key, x in entries.items()} for entries in (own, state))
    lacks, extra = sorted(here - there), sorted(there - here)
    if lacks or extra:
        raise InputError(f"{source} is of another architecture than "
                         f"{config.get('name', 'this model')}: it lacks {lacks[:2]} and has "
                         f"{extra[:2]} ({len(lacks)} and {len(extra)} in all).")
    before = checkpoint.get("config")
    heads = before.get("num_heads") if isinstance(before, dict) else None
    if isinstance(model, DeiT) and heads not in (None, config["num_heads"]):   # no shape tells it
        raise InputError(f"{source} has {heads} attention heads, not {config['num_heads']}: give "
                         f"--num-heads {heads} (in Python: num_heads=).")
    model.load_state_dict(state)


def config_from_shapes(state):
    """DeiT's arguments from the shapes of an official or timm state dict, which holds all but
    num_heads: embed_dim / 64, as in all published models."""
    kernel, distilled = state["patch_embed.proj.weight"].shape, "dist_token" in state
    D, P = kernel[0], kernel[2]                                   # kernel: (D, 3, P, P)
    G = math.isqrt(max(0, state["pos_embed"].shape[1] - 1 - distilled))
    K = len(state["head.weight"]) if "head.weight" in state else 1000          # of a backbone
    return dict(img_size=G * P, patch_size=P, embed_dim=D, num_heads=max(1, D // 64),
                depth=sum(key.endswith(".norm1.weight") for key in state), distilled=distilled,
                num_classes=K)


def load_model(source, *, model=None, new_heads=True, say=print, **overrides):
    """A model in evaluation mode from a checkpoint of train.py, an official or timm file
    (architecture from its shapes), or a published name. `.classes`: list of class names, or None.
    model: the name that it must have; "module:function" if the file names one. A bare state dict
    under a name has 1000 classes unless num_classes is given. new_heads, say: see load_weights;
    overrides: see create_model. Raises InputError."""
    checkpoint = read_checkpoint(source)
    config, classes = checkpoint.get("config"), checkpoint.get("classes")
    if not is_file_or_url(source):
        model = model or source
    try:
        if config is None and model:
            config, new_heads = {"name": model}, new_heads and "num_classes" in overrides
        elif config is None:
            config = config_from_shapes(checkpoint["model"])
            if config["embed_dim"] not in (192, 384, 768) and "num_heads" not in overrides:
                say(f"{source} does not tell num_heads: {config['num_heads']} is guessed from the "
                    "width; give another by --num-heads (in Python: num_heads=).")
        name = config.get("name") or ""
        if ":" in name and not model:   # only what the user typed is ever imported
            raise InputError(f"{source} names a model by module ({name}): give --model "
                             "module:function (in Python: model=).")
        if model not in (None, name) and not (":" in name and ":" in model):
            raise InputError(f"{source} holds a {name or 'nameless DeiT'}, not a {model}: "
                             "give that name.")
        created = create_classifier(**config | {"name": model or name or None} | overrides)
        count = config.get("num_classes", len(classes or ()))
        if classes and [type(c) for c in classes] != [str] * count:
            raise TypeError("classes")
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError) as e:
        raise InputError(f"{source} is of no known model, or has an unusable 'config' or 'classes' "
                         f"({e!r}).") from e
    load_weights(created, checkpoint, new_heads=new_heads, say=say)
    created.classes = classes if created.config["num_classes"] == len(classes or ()) else None
    return created.eval()


# ------------------------------------------------------------------------------------------------
# From a photo to the answer, and the command line
# ------------------------------------------------------------------------------------------------

def to_rgb(image):
    """A Pillow image as RGB. Drops transparency, ignores EXIF rotation, as in the recipe; takes the
    upper 8 of 16 bits (Pillow's conversion clips to white). Raises ValueError for 32 bits, floats.
    """
    deep = image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM")   # 16 bits
    if image.mode in ("I", "F") and not deep:
        raise ValueError(f"its values (mode {image.mode}) may have any range: convert it to 8 bits")
    if deep:
        image = image.convert("I").point(lambda v: v * (1 / 256)).convert("L")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")   # else Pillow warns
    image.load()   # the pixels, before the file is closed
    return image if image.mode == "RGB" else image.convert("RGB")


def center_view(image, size):
    """The evaluation's view (size, size) of a Pillow image, RGB: resizes its short side to
    size / 0.875, bicubically, and cuts the central square; as torchvision's transforms do."""
    from PIL import Image
    image, short = to_rgb(image), int(size / CROP_RATIO)
    W, H = image.size
    if max(W, H) > 8 * min(W, H):   # very elongated: only the middle 8:1, to save gigabytes
        w, h = min(W, 8 * H), min(H, 8 * W)
        image = image.crop(((W - w) // 2, (H - h) // 2, (W + w) // 2, (H + h) // 2))
    w, h = (max(short, int(short * side / min(image.size))) for side in image.size)
    left, top = round((w - size) / 2), round((h - size) / 2)
    resized = image.resize((w, h), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + size, top + size))


def to_tensor(view):
    """RGB Pillow image -> (1, 3, S, S), floats normalised by ImageNet's mean and deviation."""
    import numpy as np
    x = torch.from_numpy(np.array(view)).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (x - mean) / std


def draw_attention(model, view, answers, path):
    """Writes a picture: the view, then what each special token looks at in the last block (bright:
    much; mean over attention heads), each with one of the answers (strings) below."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont
    T, S = model.num_tokens, 384
    rows = model.attention(to_tensor(view))[-1, 0].mean(0)[:T, T:]             # (T, G*G)
    rows = torch.cat([torch.ones_like(rows[:1]), rows / rows.amax(1, keepdim=True)])
    G, view = math.isqrt(rows.shape[1]), view.resize((S, S), Image.Resampling.BICUBIC)
    picture = Image.new("RGB", ((T + 1) * (S + 8) - 8, S + 32), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(16)
    for i, (row, text) in enumerate(zip(rows, ("what the model gets", *answers))):
        heat = Image.fromarray(row.view(G, G).float().numpy())
        heat = np.asarray(heat.resize((S, S), Image.Resampling.BICUBIC)).clip(0, 1)
        panel = np.asarray(view) * (0.15 + 0.85 * heat[..., None])             # (S, S, 3)
        picture.paste(Image.fromarray((panel + 0.5).astype(np.uint8)), (i * (S + 8), 0))
        draw.text((i * (S + 8) + 4, S + 6), text, "black", font)
    picture.save(path)


def classify(photo, weights, attention=None, **overrides):
    """Prints the five likeliest classes of a photo by each head and by both. attention: path of a
    picture to draw. Raises InputError, or OSError or ValueError if that cannot be written."""
    from PIL import Image
    model = load_model(weights, **overrides)
    try:
        with Image.open(photo) as image:
            view = center_view(image, model.config["img_size"])
    except Exception as e:   # Pillow raises OSError, SyntaxError, ValueError and more
        raise InputError(f"{photo} cannot be read as an image ({e}).") from e
    with torch.inference_mode():
        cls_logits, dist_logits = model.heads(to_tensor(view))                 # (1, K) each
    heads, answers = {"class head": cls_logits}, []
    if dist_logits is not cls_logits:
        heads |= {"distillation head": dist_logits, "both": (cls_logits + dist_logits) / 2}
    names = model.classes or [f"class {k}" for k in range(cls_logits.shape[1])]
    if model.classes is None and len(names) == 1000:   # ImageNet's names, if torchvision is there
        with contextlib.suppress(InputError):
            names = torchvision_models().ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    for title, logits in heads.items():
        top = [(100 * p, names[k]) for p, k in zip(*logits[0].softmax(0).topk(min(5, len(names))))]
        answers.append(f"{title}: {top[0][1]}, {top[0][0]:.0f} %")
        print(title, *(f"  {p:5.1f} %  {name}" for p, name in top), sep="\n")
    if attention:
        if not isinstance(model, DeiT):
            raise InputError(f"{weights} is no DeiT: there is no attention to draw.")
        draw_attention(model, view, answers, attention)
        print(f"attention drawn in {attention}")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Classifies a photo; without one lists models.")
    parser.add_argument("photo", nargs="?", help="an image file to classify")
    parser.add_argument("--weights", default="deit_tiny_distilled_patch16_224",
                        help="checkpoint of train.py, official or timm file, URL or published name")
    parser.add_argument("--model", default=argparse.SUPPRESS,
                        help="module:function, if the file names one")
    parser.add_argument("--num-heads", type=int, default=argparse.SUPPRESS,
                        help="attention heads, if the file does not tell")
    parser.add_argument("--attention", metavar="OUT.png", help="draw what the tokens look at")
    args = parser.parse_args(argv)
    getattr(sys.stdout, "reconfigure", dict)(errors="backslashreplace")   # it may lack letters
    try:
        if args.photo:
            return classify(**vars(args))
        if args.attention:
            raise InputError("--attention needs a photo: give its path first.")
    except (OSError, ValueError) as e:   # InputError too
        raise SystemExit(f"deit.py: {e}") from None
    print(f"{'name':33s} width  heads   px  parameters  published top-1")
    for name, (embed_dim, num_heads, img_size, _, count, top1, _) in VARIANTS.items():
        print(f"{name:33s}{embed_dim:6d}{num_heads:7d}{img_size:5d}{count:12,d}{top1:17.3f}")


if __name__ == "__main__":
    main()
