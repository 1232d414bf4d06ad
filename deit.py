# SPDX-License-Identifier: MIT
"""DeiT, the data-efficient image transformer (Touvron et al., arXiv 2012.12877), in one file.

A convolution knows that neighbours belong together and that a shifted object stays itself; a
transformer must learn both from data. A frozen convolutional network, the teacher, passes this on:
its predictions carry it; soft ones also tell which wrong classes are near.

The distillation token is a sibling of the class token: a learned vector that enters with the
patches and attends like any other token. Label and teacher may disagree, so each of the two tokens
has a linear head of its own: the class head learns the true label, the distillation head the
teacher's prediction. The teacher appears in the loss alone.

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
import copy
import hashlib
import math
import os
import pathlib
import pkgutil
import re
import sys
import urllib.request
import warnings
import zipfile

import torch
import torch.nn.functional as F
from torch import nn

IMAGENET_MEAN = (0.485, 0.456, 0.406)   # of RGB in 0..1, for the student and for the teacher
IMAGENET_STD = (0.229, 0.224, 0.225)
CROP_RATIO = 0.875   # evaluation: the short side becomes S / 0.875, then the central S x S is cut
# what opens as an image, whatever its suffix: no EPS, for which Pillow would start Ghostscript
FORMATS = {"JPEG", "PNG", "WEBP", "BMP", "GIF", "PPM", "TIFF", "AVIF"}


class InputError(ValueError):
    """A user's mistake; the message is one sentence that says how to fix it."""


def reason(error):
    """An exception as one line of at most 300 characters: its kind and what it says, up to a
    control character or PyTorch's advice to load an unsafe file anyway."""
    text = re.split(r" ?(?:[\x00-\x1f\x7f-\x9f]|This file can|In PyTorch 2|Please )",
                    " ".join(str(error).split()))[0]
    return f"{type(error).__name__}: {text}"[:300]


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
        """x (B, N, D) -> queries (B, h, n, d) of the first n tokens, keys, values (B, h, N, d)."""
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))   # (B, N, 3, h, d)
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
        return torch.addcmul(x, branch, mask, value=1 / keep)     # mask / keep would be rounded

    def forward(self, x, n=None):
        """x (B, N, D) -> (B, n, D): only the first n tokens go on (None: all N)."""
        x = self.add(x[:, :n], self.attn(self.norm1(x), n))
        return self.add(x, self.mlp(self.norm2(x)))


def init_linear(module):
    """Linear layers: truncated normal, deviation 0.02, zero bias; others PyTorch's, as released."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        nn.init.zeros_(module.bias)


class DeiT(nn.Module):
    """The network. distilled: with two special tokens and two heads. Raises InputError."""
    def __init__(self, *, img_size=224, patch_size=16, num_classes=1000, embed_dim=192, depth=12,
                 num_heads=3, distilled=False, drop_path=0.0):
        super().__init__()
        sizes = dict(img_size=img_size, patch_size=patch_size, num_classes=num_classes,
                     embed_dim=embed_dim, depth=depth, num_heads=num_heads)
        if min(sizes.values()) < 1 or not 0 <= drop_path < 1:
            raise InputError(f"{sizes} must be above 0, drop_path, {drop_path}, in 0..1, below 1.")
        if img_size % patch_size or embed_dim % num_heads:
            raise InputError(f"{sizes}: patch_size must divide img_size, num_heads embed_dim.")
        self.config = sizes | dict(distilled=distilled, drop_path=drop_path)
        self.classes = None   # their names, if known
        T = self.num_tokens = 2 if distilled else 1
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if distilled else None
        G = img_size // patch_size
        self.pos_embed = nn.Parameter(torch.zeros(1, T + G * G, embed_dim))
        self.blocks = nn.ModuleList(                              # drop path: linear from 0
            Block(embed_dim, num_heads, drop_path * i / max(1, depth - 1)) for i in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)
        self.head_dist = nn.Linear(embed_dim, num_classes) if distilled else None
        for p in self.parameters(recurse=False):                  # the tokens, the positions
            nn.init.trunc_normal_(p, std=0.02)
        self.apply(init_linear)

    def embed(self, images):
        """images (B, 3, S, S) -> (B, N, D): special tokens, then patches, + position embedding."""
        B, S = images.shape[0], self.config["img_size"]           # len() would fix B in an export
        if images.shape != (B, 3, S, S):
            raise InputError(f"images are {tuple(images.shape)}: img_size is {S} in this model.")
        tokens = [self.cls_token, self.dist_token][:self.num_tokens]
        x = [token.expand(B, -1, -1) for token in tokens]         # T x (B, 1, D)
        return torch.cat([*x, self.patch_embed(images)], dim=1) + self.pos_embed   # (B, N, D)

    def features(self, images, n=None):
        """images (B, 3, S, S) -> the first n tokens (None: all N) after the last norm (B, n, D).
        With n, only these go on in the last block: a training step takes 7 % less time."""
        x = self.embed(images)                                    # (B, N, D)
        for block in self.blocks[:-1]:
            x = block(x)                                          # (B, N, D)
        x = self.blocks[-1](x, n)                                 # (B, n, D)
        return self.norm(x)

    def heads(self, images):
        """images (B, 3, S, S) -> class and distillation logits (B, K); one head: twice the same."""
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
        """images (B, 3, S, S) -> weights of all blocks (depth, B, h, N, N), each row sums to 1.
        Class token, distillation token, patches line by line. Call eval(): training drops paths."""
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
# cls, dist: the two heads' logits; y: the true label, in train.py smoothed and mixed; alpha: lambda
# ------------------------------------------------------------------------------------------------
ALPHA = {"hard": 0.5, "soft": 0.1}   # section 6


def wide(x):
    """x in float32; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def check_shapes(*logits):
    """Raises InputError unless the logits are (B, K), all of the same shape."""
    shapes = {tuple(x.shape) for x in logits}
    if len(shapes) > 1 or len(*shapes) != 2:
        raise InputError(f"logits must have one shape, (B, K), but theirs are {sorted(shapes)}.")


def hard_distillation_loss(dist_logits, teacher):
    """Cross-entropy against the teacher's prediction: a scalar. dist_logits (B, K); teacher: its
    logits (B, K), or predicted classes (B,). Raises InputError for other shapes."""
    if teacher.ndim == 2:
        check_shapes(dist_logits, teacher)
        loss = hard_distillation_loss(dist_logits, teacher.argmax(dim=1))
        return loss * (1 + (0 * teacher).sum())                   # times 1, or nan if it says nan
    check_shapes(dist_logits)
    return F.cross_entropy(wide(dist_logits), teacher)


def soft_distillation_loss(dist_logits, teacher_logits, tau):
    """tau^2 KL(teacher || student) at temperature tau: (B, K), (B, K) -> scalar. Sums over classes,
    averages over the batch; the released code divides by K too. tau^2 keeps the gradients of the
    same order as at tau 1. Raises InputError for other shapes. An example, tau 1: the teacher says
    (0.7, 0.2, 0.1). A student that says (0.4, 0.4, 0.2) pays 0.7 ln(0.7/0.4) + 0.2 ln(0.2/0.4)
    + 0.1 ln(0.1/0.2) = 0.1838, one that says (0.65, 0.25, 0.1) pays 0.0072."""
    check_shapes(dist_logits, teacher_logits)
    student, teacher = (F.log_softmax(wide(x) / tau, dim=1) for x in (dist_logits, teacher_logits))
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * tau**2


def distillation_loss(cls_logits, dist_logits, targets, teacher_logits, mode="hard", alpha=None,
                      tau=3.0):
    """(1 - alpha) cross-entropy of the class head + alpha distillation of the other: a scalar.
    Logits (B, K); targets: class indices (B,) or probabilities (B, K). mode: "hard" (teacher_logits
    may be predicted classes (B,)), "soft", or "none" (cross-entropy alone). alpha None: see ALPHA.
    Without a distillation token pass the class logits twice. Raises InputError: mode, shapes."""
    if mode not in (*ALPHA, "none"):
        raise InputError(f"distillation mode '{mode}' is none of hard, soft, none.")
    check_shapes(cls_logits, dist_logits)
    cls_logits = wide(cls_logits)
    probabilities = targets.is_floating_point()
    base = F.cross_entropy(cls_logits, targets.to(cls_logits.dtype) if probabilities else targets)
    if mode == "none":
        return base
    distillation = (hard_distillation_loss(dist_logits, teacher_logits) if mode == "hard"
                    else soft_distillation_loss(dist_logits, teacher_logits, tau))
    alpha = ALPHA[mode] if alpha is None else alpha
    return (1 - alpha) * base + alpha * distillation


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


class Classifier(nn.Module):
    """Any module, images (B, 3, S, S) -> logits (B, K), with what a DeiT has: config, classes and
    heads(). Writes nothing onto it; its state dict is the module's."""
    def __init__(self, module, **config):
        super().__init__()
        self.module, self.config, self.classes = module, config, None
        self.state_dict, self.load_state_dict = module.state_dict, module.load_state_dict

    def forward(self, images):
        output = self.module(images)
        return getattr(output, "logits", output)                  # transformers' models have it

    def heads(self, images):     # its logits twice: a DeiT has two heads
        return (self(images),) * 2


def torchvision_models(name):
    """torchvision.models. Raises InputError unless it has a classifier of this name."""
    try:
        import torchvision.models as models
    except ImportError as e:
        raise InputError(f"{name!r}: pip install torchvision ({reason(e)}).") from e
    if name not in models.list_models(module=models):
        raise InputError(f"{name!r} is no file, no URL that ends in a hash (-1234abcd.pth), and no "
                         "model's name: `python deit.py` lists the DeiTs; torchvision has others.")
    return models


def create_model(name=None, *, num_classes=1000, pretrained=False, **overrides):
    """A model on the CPU, in training mode, with random weights or, pretrained, the released ones.
    name: a DeiT's (overrides: see DeiT); None: a DeiT by overrides alone; torchvision's classifiers
    or "module:function", which is called with the number of classes: these become a Classifier and
    take one override, img_size, for its config. Raises InputError."""
    if not name or name in VARIANTS:
        named = dict(zip(("embed_dim", "num_heads", "img_size", "distilled"),
                         VARIANTS.get(name, ())))
        model = DeiT(num_classes=num_classes, **named | overrides)
        model.config["name"] = name
    else:
        size = overrides.pop("img_size", 224)   # only noted: a convnet takes any
        if ":" in name:
            sys.path.append(os.getcwd())
            try:
                module = pkgutil.resolve_name(name)(num_classes).cpu()   # the caller moves it
            except (AttributeError, ImportError, TypeError, ValueError) as e:
                raise InputError(f"{name} gives no module for a class count ({reason(e)}).") from e
        else:
            module = torchvision_models(name).get_model(name, num_classes=num_classes)
            module.to(memory_format=torch.channels_last)   # not what train.py trains on a GPU
        if overrides or size > 9999:   # a file may claim any size
            raise InputError(f"{next(iter(overrides), size)} is for DeiT or too large: {name!r}.")
        model = Classifier(module, name=name, num_classes=num_classes, img_size=size)
    if pretrained:
        load_weights(model, name)
    return model


# ------------------------------------------------------------------------------------------------
# Weights from a file, a URL, a published name or a state dict. Nothing that is loaded can run code;
# a model that is built from a file takes no more memory than some times the file's size.
# ------------------------------------------------------------------------------------------------
def fetch(source):
    """Path of a file, given as such, by a published name, or by a URL that ends in the start of the
    file's SHA-256 (-1234abcd.pth), which is checked: it comes into torch.hub's cache, once. Raises
    InputError, after a minute without data too; what fails leaves nothing behind."""
    if os.path.isfile(source):
        return source
    url = re.search(r"://.*-([0-9a-f]{8,64})\.\w+$", str(source))
    if not url:
        return fetch(f"{RELEASES}{source}-{VARIANTS[source][-1]}.pth" if source in VARIANTS
                     else torchvision_models(source).get_model_weights(source).DEFAULT.url)
    path = pathlib.Path(torch.hub.get_dir(), "checkpoints", source.rpartition("/")[2])
    if path.exists():
        return path
    beside = path.with_suffix("." + os.urandom(8).hex())
    try:
        with urllib.request.urlopen(source, timeout=60) as response:
            data = response.read()
        if not hashlib.sha256(data).hexdigest().startswith(url[1]):
            raise ValueError("its hash is not the one in its name")
        os.makedirs(path.parent, exist_ok=True)
        beside.write_bytes(data)
        beside.replace(path)
    except Exception as e:   # OSError, HTTPException, ...
        beside.unlink(missing_ok=True)
        raise InputError(f"{source} could not be downloaded ({reason(e)}): give a file.") from e
    return path


def read_checkpoint(source):
    """A checkpoint as a dict, from a path, URL or published name: under "model" the state dict (in
    some files "state_dict" or the whole), under "source" its origin. Its tensors stay on the disk
    until they are used. Raises InputError if there is none, it is damaged, or it holds what could
    run code: more than tensors, plain values and the argparse.Namespace that trainers add."""
    path = fetch(source)
    size, zipped = os.path.getsize(path), zipfile.is_zipfile(path)
    try:
        if zipped:   # torch.load looks at no checksum; packed or overlapping entries may be endless
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()   # torch.load must see the same ones: from byte 0 on
                if (sum(e.file_size for e in entries) > size or entries[0].header_offset
                        or archive.testzip()):
                    raise ValueError("a size or a checksum does not match")
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
        state = content.get("model", content.get("state_dict"))
        if not isinstance(state, dict):
            content, state = {}, content
        if sum(math.prod(max(n, 1) for n in x.shape) for x in state.values()) > size:
            raise ValueError("its tensors claim more elements than the file has bytes")
    except Exception as e:   # the readers of damaged files raise nearly anything
        raise InputError(f"{path} holds no weights that can be read safely ({reason(e)}). If it is "
                         "whole, keep the tensors alone where it was made: import torch; "
                         "torch.save(model.state_dict(), 'weights.pt').") from e
    return content | {"model": state, "source": source}


def renamed(key, own=()):
    """A parameter's name without wrappers'; for timm's RegNets torchvision's, unless in own."""
    key = re.sub(r"\b(module|_orig_mod)\.", "", key)
    if key in own:
        return key
    names = {"conv": "0", "bn": "1", "conv1": "f.a", "conv2": "f.b", "conv3": "f.c", "se": "f.se",
             "downsample": "proj"}
    parts = [names.get(part, part) for part in key.replace("head.fc.", "fc.").split(".")]
    return re.sub(r"^s(\d)\.b(\d+)", lambda m: f"trunk_output.block{m[1]}.block{m[1]}-"
                  f"{int(m[2]) - 1}", ".".join(parts))


def resize_pos_embed(pos_embed, model):
    """pos_embed (1, T + g*g, D) of a checkpoint -> (1, N, D) of this model: the grid of patches is
    interpolated bicubically (paper, section 3), the rest stays. Raises RuntimeError: no square."""
    T, G = model.num_tokens, model.config["img_size"] // model.config["patch_size"]
    tokens, grid = pos_embed.float().tensor_split([T], dim=1)     # (1, T, D), (1, g*g, D)
    g = math.isqrt(grid.shape[1])
    if g == G:
        return pos_embed
    grid = grid.unflatten(1, (g, g)).permute(0, 3, 1, 2)          # (1, D, g, g)
    grid = F.interpolate(grid, size=(G, G), mode="bicubic")       # (1, D, G, G)
    return torch.cat([tokens, grid.flatten(2).transpose(1, 2)], dim=1)


def load_weights(model, source, *, new_heads=True, say=print):
    """Loads a path, URL, published name, checkpoint or state dict into the model, strictly. Resizes
    a DeiT's position embedding. A head, a linear or convolutional layer of K outputs, that the
    source lacks or has with other outputs stays as the model has it: it starts anew, which is told
    to `say` (new_heads=False: refused). Raises InputError if anything else differs, also in the
    number of attention heads, if the source tells it."""
    checkpoint = source if isinstance(source, dict) else read_checkpoint(source)
    state, differ = copy.copy(checkpoint.get("model", checkpoint)), []
    source, config = checkpoint.get("source", "the state dict"), getattr(model, "config", {})
    h, K, own = config.get("num_heads"), config.get("num_classes"), model.state_dict().keys()
    for key in state.keys() - own:
        state[renamed(str(key), own)] = state.pop(key)
    for name, module in getattr(model, "module", model).named_modules():
        if (isinstance(module, (nn.Linear, nn.Conv2d)) and f"{name}.weight" in own
                and len(module.weight) == K):                     # else parametrized
            ours, weight = module.weight.shape, state.get(f"{name}.weight", module.weight[:0])
            if ours != weight.shape and ours[1:] == weight.shape[1:]:
                state.update((f"{name}.{key}", x) for key, x in module.state_dict().items())
                differ.append(f"{len(weight)} classes in {name}, not {K}")
    if differ and not new_heads:
        raise InputError(f"{source} has {' and '.join(differ)} (--finetune trains new ones).")
    try:
        told = checkpoint.get("config", {}).get("num_heads", h)
        if told != h:   # no shape tells it
            raise ValueError(f"{told if isinstance(told, int) else 'no'} attention heads, not {h}: "
                             "give --num-heads or num_heads=")
        if isinstance(model, DeiT) and "pos_embed" in state:
            state["pos_embed"] = resize_pos_embed(state["pos_embed"], model)
        model.load_state_dict(state)
    except Exception as e:   # whatever PyTorch says of shapes and names
        raise InputError(f"{source} is of another architecture ({reason(e)}).") from e
    for text in differ:
        say(f"{source} has {text}: it starts anew.")


def config_from_shapes(state):
    """DeiT's arguments, but for num_heads and drop_path, from the shapes of its state dict. The
    model is at most some times larger than these tensors, and has no more of them."""
    shapes = {renamed(key): x.shape for key, x in state.items()}
    (D, _, *P), distilled = shapes["patch_embed.proj.weight"], "dist_token" in shapes
    G = math.isqrt(abs(shapes["pos_embed"].numel() // D - 1 - distilled))
    depth = min(list(shapes.values()).count((D, 4 * D)), len(shapes) // 12)   # fc2; 12 in a block
    K = math.prod(shapes.get("head.weight", (1000, D))) // D                   # 1000: of a backbone
    return dict(img_size=G * min(P), patch_size=min(P), embed_dim=D, depth=depth, num_classes=K,
                distilled=distilled)


def load_model(source, *, model=None, say=print, **overrides):
    """A model in evaluation mode from a checkpoint of train.py, an official or timm file, or a
    published name. `.classes`: list of class names, or None. A DeiT's sizes are its tensors'; its
    number of heads, if the file does not tell it, is the published one of its width, which is told
    to `say`, or must be given. model: the name that the file must have; for a bare state dict the
    name whose sizes are taken, with 1000 classes unless num_classes is given; "module:function" if
    the file names one. overrides: see create_model. Raises InputError, also for a backbone."""
    checkpoint = read_checkpoint(source)
    state, classes = checkpoint["model"], checkpoint.get("classes")
    if not os.path.isfile(source) and "://" not in source:
        model = source
    try:
        config = dict(checkpoint.get("config", {}))
        said = config.get("name") or ""
        name = model or said
        # a module by name is only imported if the user typed it
        if ":" in said and not model or config and name != said and ":" not in name:
            raise ValueError(f"it holds {said!r}: give that name by --model, --teacher or model=")
        if not name or config and name in VARIANTS:
            config |= config_from_shapes(state)
        elif config and ":" not in name and config["num_classes"] not in [
                len(x) for x in state.values() if x.ndim]:
            raise ValueError("no tensor has that number of classes")
        if not name and "num_heads" not in config | overrides:
            D, what = config["embed_dim"], "the file does not tell num_heads (--num-heads)"
            if D not in (192, 384, 768):
                raise ValueError(f"{what}, and no published model has its width, {D}: give it")
            config["num_heads"] = D // 64
            say(f"{source}: {what}; {D // 64} are taken, as published: give it if it differs.")
        created = create_model(**config | overrides | {"name": name, "pretrained": False})
    except Exception as e:   # names, types and numbers of any kind
        raise InputError(f"{source} fits no model; has it a --model name? ({reason(e)})") from e
    load_weights(created, checkpoint, new_heads=False)
    if isinstance(classes, list) and len(classes) == created.config["num_classes"]:
        created.classes = classes
    return created.eval()


# ------------------------------------------------------------------------------------------------
# The teacher: a torchvision classifier (the paper's is regnet_y_16gf), a DeiT, or any module
# ------------------------------------------------------------------------------------------------
class Teacher(Classifier):
    """A frozen classifier: images (B, 3, S, S) -> logits (B, K), always in evaluation mode, in the
    caller's autocast. classes: their names, sha256: of its weights; None if unknown."""
    def __init__(self, module, classes=None, sha256=None):
        super().__init__(module.requires_grad_(False))
        self.classes, self.sha256 = classes, sha256
        self.eval()

    def train(self, mode=True):  # otherwise its batch norms would drift
        return super().train(False)


def load_teacher(name="regnet_y_16gf", weights="DEFAULT", num_classes=1000, **overrides):
    """A frozen Teacher by name, as in create_model. weights: DEFAULT (the released ones), a file or
    URL (of timm's RegNets too, as the paper's teacher), None: random; for DEFAULT and None a
    function's own. overrides: see create_model; a DeiT must know the images' side, img_size.
    torchvision's batch norms are merged into the convolutions before them: both are linear. Raises
    InputError: unknown names, another architecture or class count."""
    source = name if weights == "DEFAULT" else weights
    overrides["num_classes"] = num_classes
    if not source or source == name and ":" in name:
        model = create_model(name, **overrides)
    elif source == name and num_classes != 1000:
        raise InputError(f"{name} knows 1000 classes, not {num_classes}: train a teacher on yours.")
    else:
        model = load_model(source, model=name, **overrides)
    sha256, module = hashlib.sha256(), getattr(model, "module", model)
    for x in model.state_dict().values():
        sha256.update(x.reshape(-1).view(torch.uint8).numpy())
    if module is not model and ":" not in name:
        from torch.fx.experimental.optimization import fuse
        module = fuse(module.eval())
    return Teacher(module, model.classes, sha256.hexdigest())


# ------------------------------------------------------------------------------------------------
# From a photo to the answer, and the command line
# ------------------------------------------------------------------------------------------------
def to_rgb(image):
    """A Pillow image as RGB. Drops transparency, ignores EXIF rotation, as in the recipe; takes the
    upper 8 of 16 bits (Pillow clips them to white). Raises ValueError for 32 bits and floats."""
    if image.mode == "F" or image.mode == "I" and image.format != "PPM":   # a PPM's have 16 bits
        raise ValueError("its 32 bits may have any range: convert it to 8 bits")
    if image.mode[0] == "I":
        image = image.convert("I").point(lambda v: v * (1 / 256)).convert("L")
    return image.convert("RGB")


def open_image(path):
    """The image of a file as RGB. Raises what Pillow raises for what it cannot read: anything."""
    from PIL import Image
    if not os.path.isfile(path):   # a pipe would wait for ever
        raise OSError("there is no such file, or it is no regular one")
    Image.init()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")   # broken EXIF, palettes: not the user's concern
        with Image.open(path, formats=list(FORMATS & Image.OPEN.keys())) as image:
            return to_rgb(image)


def center_crop(image, w, h):
    left, top = round((image.width - w) / 2), round((image.height - h) / 2)
    return image.crop((left, top, left + w, top + h))


def center_view(image, size):
    """The evaluation's view (size, size) of a Pillow image, RGB: resizes its short side to
    size / 0.875, bicubically, and cuts the central square; as torchvision's transforms do."""
    (W, H), short = image.size, int(size / CROP_RATIO)
    image = center_crop(to_rgb(image), min(W, 8 * H), min(H, 8 * W))   # strips fill gigabytes
    w, h = (max(short, int(short * side / min(image.size))) for side in image.size)
    return center_crop(image.resize((w, h)), size, size)          # resize is bicubic by default


def to_tensor(view):
    """RGB Pillow image -> (1, 3, S, S), floats normalised by ImageNet's mean and deviation."""
    import numpy as np
    x = torch.from_numpy(np.array(view)).permute(2, 0, 1)[None] / 255
    mean, std = torch.tensor([IMAGENET_MEAN, IMAGENET_STD])[..., None, None]   # (3, 1, 1) each
    return (x - mean) / std


def draw_attention(model, view, path):
    """Draws the view, then for each special token bright what it looks at in the last block."""
    import numpy as np
    from PIL import Image, ImageEnhance
    T, size = model.num_tokens, (384, 384)
    rows = model.attention(to_tensor(view))[-1, 0].mean(0)[:T, T:]             # (T, G*G)
    rows, G = 255 * rows / rows.amax(1, keepdim=True), math.isqrt(rows.shape[1])
    view = view.resize(size)
    panels, dark = [view], ImageEnhance.Brightness(view).enhance(0.15)
    for row in rows:
        mask = Image.fromarray(row.view(G, G).byte().numpy()).resize(size)
        panels.append(Image.composite(view, dark, mask))
    Image.fromarray(np.hstack(panels)).save(path)


def classify(photo, weights, attention=None, **overrides):
    """Prints the five likeliest classes of a photo by each head and by both. Draws `attention`."""
    model = load_model(weights, **overrides)
    try:
        view = center_view(open_image(photo), model.config["img_size"])
    except Exception as e:   # Pillow raises OSError, SyntaxError, ValueError and more
        raise InputError(f"{photo} cannot be read as an image ({reason(e)}).") from e
    with torch.inference_mode():
        cls_logits, dist_logits = model.heads(to_tensor(view))                 # (1, K) each
    titles = ("class head", "distillation head", "both")[:1 if dist_logits is cls_logits else 3]
    names = model.classes
    for title, x in zip(titles, (cls_logits, dist_logits, (cls_logits + dist_logits) / 2)):
        if not x.isfinite().all():
            raise InputError(f"{weights}: the {title} says nan; take weights of an earlier epoch.")
        print(title)
        for p, k in zip(*x[0].softmax(0).topk(min(5, x.shape[1]))):
            print(f"  {100 * p:5.1f} %  {names[k] if names else f'class {k}'!r}")
    if attention:
        if not isinstance(model, DeiT) or attention == photo:
            raise InputError(f"{attention} is the photo itself, or {weights} is no DeiT to draw.")
        draw_attention(model, view, attention)
        print(f"{attention} shows the photo, then what each special token looks at")


def main(argv=None):
    parser = argparse.ArgumentParser(argument_default=argparse.SUPPRESS)
    parser.add_argument("photo", nargs="?", help="image to classify; without one: lists models")
    parser.add_argument("--weights", default="deit_tiny_distilled_patch16_224", help="or a file")
    parser.add_argument("--num-heads", type=int, help="attention heads, if the file does not tell")
    parser.add_argument("--model", help="its name or module:function, if the file does not tell")
    parser.add_argument("--attention", help="path of a picture to draw: what the tokens look at")
    args = vars(parser.parse_args(argv))
    getattr(sys.stdout, "reconfigure", dict)(errors="backslashreplace")   # it may lack letters
    if "photo" not in args:
        return print(*VARIANTS, sep="\n")
    try:
        classify(**args)
    except (OSError, ValueError) as e:   # InputError too
        raise SystemExit(f"deit.py: {e}") from None


if __name__ == "__main__":
    main()
