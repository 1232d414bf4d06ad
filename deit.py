# SPDX-License-Identifier: MIT
"""DeiT, the data-efficient image transformer (Touvron et al., arXiv 2012.12877), in one file.

A Vision Transformer trained on ImageNet alone, from two sources: the true labels, and the answers
of a frozen convolutional network, the teacher. The distillation token is a second class token: a
learned vector that enters with the patches and attends like any other token. Each of the two tokens
has a linear head of its own, and only their targets differ: the class head learns the true label,
the distillation head the teacher's answer. The teacher appears in the loss, never in the network.

Letters:  B images    S image side     P patch side       G = S/P patches per side
          D width     N = T + G*G      T special tokens: 2 (class, distillation) or 1 (class)
          K classes   h heads          d = D/h width of one head
          n <= N the first tokens, where only they are needed: the heads read T of them

The walk, with the shapes of DeiT-Ti (S 224, P 16, D 192, h 3, K 1000):
  images                         (B, 3, S, S)      (B, 3, 224, 224)
  patch embedding                (B, G*G, D)       (B, 196, 192)
  [class, distillation] in front (B, N, D)         (B, 198, 192)    + position embedding
  11 blocks, attention and MLP   (B, N, D)         (B, 198, 192)
  the last block, T tokens only  (B, T, D)         (B, 2, 192)
  norm, then one head per token  2 x (B, K)        2 x (B, 1000)    evaluation: their mean

  import deit, PIL.Image
  model = deit.create_model("deit_tiny_distilled_patch16_224", pretrained=True).eval()
  images = deit.to_tensor(deit.center_view(PIL.Image.open("photo.jpg"), 224))   # (1, 3, 224, 224)
  logits = model(images)                                                        # (1, 1000)

Contents: the network, the eight published variants, weights, the teacher, the losses, and a command
line: `python deit.py` prints the table and the walk, and `python deit.py photo.jpg --weights W`
classifies. Importing needs torch alone, so that this file can be copied into other projects.
"""
import collections
import contextlib
import copy
import hashlib
import http.client
import math
import os
import re
import sys
import zipfile

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

IMAGENET_MEAN = (0.485, 0.456, 0.406)   # of RGB in 0..1; the teacher and the student use the same
IMAGENET_STD = (0.229, 0.224, 0.225)
CROP_RATIO = 0.875   # evaluation: the short side becomes S / 0.875, then the central S x S is cut


class InputError(ValueError):
    """What was given cannot be used; the message is one sentence that says what to do instead."""


# ------------------------------------------------------------------------------------------------
# The network. Parameter names are the official checkpoint's, so that loading needs no renaming.
# ------------------------------------------------------------------------------------------------

class PatchEmbed(nn.Module):
    """Cuts the image into P x P patches and maps each one linearly to D numbers."""

    def __init__(self, patch_size, embed_dim):
        super().__init__()
        self.proj = nn.Conv2d(3, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images):
        """(B, 3, S, S) -> (B, G*G, D). A convolution of stride P is one linear map of each patch;
        written as that it trains a little faster on CPUs (not measured on a GPU)."""
        (B, C, H, W), P = images.shape, self.proj.stride[0]
        x = images.view(B, C, H // P, P, W // P, P).permute(0, 2, 4, 1, 3, 5)  # (B, G, G, 3, P, P)
        return F.linear(x.flatten(3).flatten(1, 2), self.proj.weight.flatten(1), self.proj.bias)


class Attention(nn.Module):
    """Multi-head self-attention: softmax(q k^T / sqrt(d)) v, for each head, then a projection."""

    # True: PyTorch's fused kernel. False: the formula below, equal up to rounding. None: the faster
    # one, which is the kernel except for bfloat16 on a CPU (there 3.6 times slower, torch 2.15).
    fused = None

    def __init__(self, embed_dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dim, 3 * embed_dim)
        self.proj = nn.Linear(embed_dim, embed_dim)

    def split(self, x, n=None):
        """x (B, N, D) -> queries (B, h, n, d) of the first n tokens, keys and values (B, h, N, d)
        of all N."""
        B, N, D = x.shape
        h, d = self.num_heads, D // self.num_heads
        if n is None:
            q, k, v = self.qkv(x).view(B, N, 3, h, d).unbind(2)                # (B, N, h, d) each
        else:   # qkv stacks the maps to q, k and v: its first D rows give the queries
            w_q, w_kv = self.qkv.weight.split([D, 2 * D])
            b_q, b_kv = self.qkv.bias.split([D, 2 * D])
            q = F.linear(x[:, :n], w_q, b_q).view(B, n, h, d)                  # (B, n, h, d)
            k, v = F.linear(x, w_kv, b_kv).view(B, N, 2, h, d).unbind(2)       # (B, N, h, d) each
        return [t.transpose(1, 2) for t in (q, k, v)]                          # (B, h, ., d) each

    def weights(self, q, k):
        """How much of each token (columns) each query takes in: (B, h, n, N), rows sum to 1."""
        return (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)

    def forward(self, x, n=None):
        """x (B, N, D) -> (B, n, D): the first n tokens ask (None: all of them), all N answer."""
        q, k, v = self.split(x, n)
        slow = q.device.type == "cpu" and q.dtype == torch.bfloat16
        if self.fused or self.fused is None and not slow:
            x = F.scaled_dot_product_attention(q, k, v)                        # (B, h, n, d)
        else:
            x = self.weights(q, k) @ v                                         # (B, h, n, d)
        return self.proj(x.transpose(1, 2).flatten(2))                         # (B, n, D)


class MLP(nn.Module):
    """Two linear maps with a GELU (the exact one, by erf) between, four times wider inside."""

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
        """x + branch, where each sample's branch is set to 0 with probability drop_path, else
        divided by 1 - drop_path, which keeps its mean (stochastic depth, arXiv 1603.09382)."""
        if not self.training or self.drop_path == 0:
            return x + branch
        keep = 1 - self.drop_path
        mask = branch.new_empty(len(x), 1, 1).bernoulli_(keep).div_(keep)   # (B, 1, 1)
        return torch.addcmul(x, branch, mask)   # x + branch * mask

    def forward(self, x, n=None):
        """x (B, N, D) -> (B, n, D): only the first n tokens go on (None: all N)."""
        x = self.add(x[:, :n], self.attn(self.norm1(x), n))
        return self.add(x, self.mlp(self.norm2(x)))


def init_linear(module):
    """Truncated normal of deviation 0.02, zero bias; other modules keep PyTorch's defaults."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class DeiT(nn.Module):
    """The transformer. With distilled=True it has two tokens and two heads, else one of each."""

    def __init__(self, *, img_size=224, patch_size=16, num_classes=1000, embed_dim=192, depth=12,
                 num_heads=3, distilled=False, drop_path=0.0):
        super().__init__()
        self.config = dict(img_size=img_size, patch_size=patch_size, num_classes=num_classes,
                           embed_dim=embed_dim, depth=depth, num_heads=num_heads,
                           distilled=distilled, drop_path=drop_path)
        for what in ("img_size", "patch_size", "num_classes", "embed_dim", "depth", "num_heads"):
            if not isinstance(self.config[what], int) or self.config[what] < 1:
                raise InputError(f"{what} is {self.config[what]!r}: it must be an integer above 0.")
        if img_size % patch_size:
            raise InputError(f"img_size {img_size} is not a multiple of patch_size {patch_size}: "
                             f"take {max(1, round(img_size / patch_size)) * patch_size}, say.")
        if embed_dim % num_heads:
            raise InputError(f"embed_dim {embed_dim} is not a multiple of num_heads {num_heads}.")
        T = self.num_tokens = 2 if distilled else 1
        N = T + (img_size // patch_size) ** 2
        self.patch_embed = PatchEmbed(patch_size, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, embed_dim)) if distilled else None
        self.pos_embed = nn.Parameter(torch.zeros(1, N, embed_dim))
        rates = [drop_path * i / max(1, depth - 1) for i in range(depth)]   # rising from 0
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, rate) for rate in rates)
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes)
        self.head_dist = nn.Linear(embed_dim, num_classes) if distilled else None
        for name, p in self.named_parameters():
            if name.endswith(("_token", "pos_embed")):
                nn.init.trunc_normal_(p, std=0.02)
        self.apply(init_linear)

    def embed(self, images):
        """(B, 3, S, S) -> (B, N, D): special tokens, then patches, plus position embedding."""
        B, C, H, W = images.shape
        S = self.config["img_size"]
        if (C, H, W) != (3, S, S):
            raise InputError(f"images are {C} x {H} x {W}, this model takes 3 x {S} x {S}: resize "
                             f"them, or create it with img_size={H}.")
        tokens = [self.cls_token, self.dist_token][:self.num_tokens]
        x = [*(t.expand(B, -1, -1) for t in tokens), self.patch_embed(images)]
        return torch.cat(x, dim=1) + self.pos_embed               # (B, N, D)

    def features(self, images, n=None):
        """(B, 3, S, S) -> (B, N, D) after the last norm; given n, (B, n, D), the first n tokens
        only: of the others the last block then computes nothing but keys and values."""
        x = self.embed(images)                                    # (B, N, D)
        for block in self.blocks[:-1]:
            x = block(x)                                          # (B, N, D)
        x = self.blocks[-1](x, n)                                 # (B, n, D)
        return self.norm(x)

    def heads(self, images):
        """(B, 3, S, S) -> class logits (B, K) and distillation logits (B, K), in either mode. A
        model without distillation token gives its class logits twice."""
        x = self.features(images, self.num_tokens)                # (B, T, D)
        cls_logits = self.head(x[:, 0])                           # (B, K)
        dist_logits = self.head_dist(x[:, 1]) if self.num_tokens == 2 else cls_logits
        return cls_logits, dist_logits                            # (B, K) each

    @torch.no_grad()
    def attention(self, images):
        """(B, 3, S, S) -> attention weights of all blocks, (depth, B, h, N, N); rows sum to 1. Row
        0 is what the class token looks at, row 1 the distillation token's; columns T on are the
        patches, G to a line. In training mode drop path is at work, so call eval() before."""
        x, weights = self.embed(images), []
        for block in self.blocks:
            q, k, _ = block.attn.split(block.norm1(x))
            weights.append(block.attn.weights(q, k))              # (B, h, N, N)
            x = block(x)
        return torch.stack(weights)

    def forward(self, images):
        """(B, 3, S, S) -> logits (B, K), of a distilled model the mean of both heads' (the released
        code's choice; the paper's section 4 adds the softmaxes). A distilled model in training
        returns the pair instead: (class logits, distillation logits), a loss for each."""
        cls_logits, dist_logits = self.heads(images)
        if self.num_tokens == 1:
            return cls_logits
        return (cls_logits, dist_logits) if self.training else (cls_logits + dist_logits) / 2


# ------------------------------------------------------------------------------------------------
# The published variants: depth 12 and d = 64 in all of them. Top-1 as their authors evaluated
# the released files on ImageNet's validation set; the hash is the start of the file's SHA-256.
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
    """One of the eight published variants, in training mode, with random weights or the released
    ones (downloaded once, hash checked). Overrides: num_classes, img_size, patch_size, embed_dim,
    depth, num_heads, distilled, drop_path (0; the recipe trains with 0.1, which train.py sets).
    Raises InputError for an unknown name or bad numbers."""
    if name not in VARIANTS:
        raise InputError(f"'{name}' is no DeiT; the known ones are {', '.join(VARIANTS)}.")
    embed_dim, num_heads, img_size, distilled = VARIANTS[name][:4]
    config = dict(embed_dim=embed_dim, num_heads=num_heads, img_size=img_size, distilled=distilled)
    model = DeiT(**config | overrides)
    if pretrained:
        load_weights(model, name)
    return model


# ------------------------------------------------------------------------------------------------
# Weights: from a file, a URL, a published name or a state dict; nothing that is loaded can run code
# ------------------------------------------------------------------------------------------------

def published(name):
    """Of the ImageNet weights released under a model's name, a DeiT's or one of torchvision's (its
    best): the URL, and how to build the model where the file does not say so."""
    if name in VARIANTS:
        return f"{RELEASES}{name}-{VARIANTS[name][-1]}.pth", {}
    weights = torchvision_weights(name) if re.fullmatch(r"\w+", name) else []
    if not weights:
        raise InputError(f"'{name}' is neither a file nor a URL nor a published name "
                         f"({', '.join(VARIANTS)}, or one of torchvision's classifiers).")
    size = weights[-1].transforms.keywords["crop_size"]
    return weights[-1].url, {"config": {"name": name, "img_size": size}}


def fetch(url, hashed=False):
    """Downloads into torch.hub's cache unless it is there; returns the path. hashed: the file name
    ends in the start of its SHA-256 (-1234abcd.pth), which must match, also when it was there."""
    name = os.path.basename(url)
    sha256 = re.search(r"-([0-9a-f]{8,64})\.", name)[1] if hashed else None
    unique = name if hashed else f"{hashlib.sha256(url.encode()).hexdigest()[:8]}-{name}"
    path = os.path.join(torch.hub.get_dir(), "checkpoints", unique)
    try:
        if hashed and os.path.exists(path):
            with open(path, "rb") as f:
                if not hashlib.sha256(f.read()).hexdigest().startswith(sha256):
                    os.remove(path)
        if not os.path.exists(path):   # a download that fails leaves no file behind
            os.makedirs(os.path.dirname(path), exist_ok=True)
            torch.hub.download_url_to_file(url, path, sha256, sys.stderr.isatty())
    except (OSError, ValueError, RuntimeError, http.client.HTTPException) as e:
        raise InputError(f"{url} could not be downloaded ({e}): fetch it elsewhere, then give the "
                         "file's path.") from e
    return path


def new_name(key):
    """A parameter's name without what wrappers put before it, and as torchvision's DenseNets have
    named it since their weights were released."""
    key = re.sub(r"^((module|_orig_mod)\.)+", "", key)
    return re.sub(r"(denselayer\d+\.(?:norm|conv))\.([12])\.", r"\1\2.", key)


def read_checkpoint(source, hashed=False):
    """A checkpoint's dict, with its state dict under "model", from a path, URL or published name
    (a DeiT's, or one of torchvision's classifiers).

    Reads what the official code, timm (a bare state dict) and train.py write. Raises InputError
    when there is no such file, or when it is broken or holds anything but plain values and tensors.
    """
    source = path = os.fspath(source)
    is_url, built = re.match(r"(https?|file)://", source), {}
    if is_url:
        path = fetch(source, hashed)
    elif not os.path.isfile(source):
        url, built = published(source)
        path = fetch(url, hashed=True)
    try:
        if zipfile.is_zipfile(path):   # torch.load checks no CRC and skips what is marked a folder
            with zipfile.ZipFile(path) as archive:
                if archive.testzip() or any(i.external_attr & 16 for i in archive.infolist()):
                    raise ValueError("a checksum does not match")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:   # the readers of damaged files raise nearly anything
        if is_url:
            os.remove(path)   # half a download, perhaps: not to be found again
        raise InputError(f"{path} is no checkpoint that can be read safely: it is damaged, no "
                         "file of torch.save (.safetensors, say), or holds more than tensors and "
                         f"values ({type(e).__name__}).") from e
    if not (isinstance(checkpoint, dict) and isinstance(checkpoint.get("model"), dict)):
        checkpoint = {"model": checkpoint}
    state = checkpoint["model"]
    if not isinstance(state, dict) or not state or not all(
            isinstance(k, str) and torch.is_tensor(v) and v.layout == torch.strided
            and v.device.type == "cpu" and not v.is_quantized for k, v in state.items()):
        raise InputError(f"{path} holds no state dict (names and tensors), neither as a whole nor "
                         "under 'model'.")
    version = getattr(state, "_metadata", None)   # of torchvision's MNASNets, which ask for it
    state = collections.OrderedDict((new_name(key), value) for key, value in state.items())
    state._metadata = version
    return checkpoint | built | {"model": state, "source": source}


def resize_pos_embed(pos_embed, model):
    """pos_embed (1, T + g*g, D) of a checkpoint -> (1, N, D) of this model: the tokens' part is
    kept, the patches' grid interpolated bicubically (paper, section 3); same sizes: untouched."""
    T, G = model.num_tokens, model.config["img_size"] // model.config["patch_size"]
    n = pos_embed.shape[1] if pos_embed.ndim == 3 else 0
    g = math.isqrt(max(0, n - T))
    if g in (0, G) or g * g + T != n:
        return pos_embed                                          # fits, or load_weights refuses it
    tokens, grid = pos_embed.float().split([T, g * g], dim=1)
    grid = grid.unflatten(1, (g, g)).permute(0, 3, 1, 2)          # (1, D, g, g)
    grid = F.interpolate(grid, size=(G, G), mode="bicubic", align_corners=False)
    return torch.cat([tokens, grid.flatten(2).transpose(1, 2)], dim=1)


def load_weights(model, source, *, new_heads=True, classes=None, say=print):
    """Loads a path, URL, published name, read checkpoint or state dict into the model, strictly.

    A DeiT's position embedding is resized to the model's; heads of another class count, or of other
    names than `classes` when both are known, start anew and `say` is told so (new_heads=False: they
    are refused). Raises InputError when the architectures differ.
    """
    checkpoint = source if isinstance(source, dict) else read_checkpoint(source)
    what = checkpoint.get("source", "the state dict")
    state = checkpoint["model"] if isinstance(checkpoint.get("model"), dict) else checkpoint
    state = copy.copy(state)   # with its versions
    own = model.state_dict()
    if isinstance(model, DeiT) and "pos_embed" in state:
        state["pos_embed"] = resize_pos_embed(state["pos_embed"], model)
    others = classes is not None and checkpoint.get("classes") not in (None, classes)
    linears = [name for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    for head in [n for n in linears if n in ("head", "head_dist")] or linears[-1:]:
        there, here = state.get(f"{head}.weight"), own[f"{head}.weight"]
        if there is None or there.shape[1:] != here.shape[1:] or (
                len(there) == len(here) and not others):
            continue
        differ = "other classes" if others else f"{len(there)} classes, not {len(here)}"
        if not new_heads:
            raise InputError(f"{what} has {differ}.")
        say(f"{what}: {head} has {differ}: it starts anew.")
        init_linear(model.get_submodule(head))
        state.update({key: own[key] for key in own if key.rpartition(".")[0] == head})
    wrong = [f"{key} is missing" for key in own.keys() - state.keys()]
    wrong += [f"{key!r} is unexpected" for key in state.keys() - own.keys()]
    wrong += [f"{key} is {tuple(state[key].shape)}, not {tuple(own[key].shape)}"
              for key in own.keys() & state.keys() if own[key].shape != state[key].shape]
    wrong += [f"{key} is of {state[key].dtype}" for key in own.keys() & state.keys()
              if own[key].is_floating_point() != state[key].is_floating_point()]
    if wrong:
        raise InputError(f"{what} is of another architecture: {', '.join(sorted(wrong)[:3])}"
                         f"{', ...' if len(wrong) > 3 else ''}.")
    model.load_state_dict(state)


def config_from_shapes(state):
    """The arguments of DeiT, read off the shapes of an official or timm state dict."""
    try:
        embed_dim, _, patch_size, _ = state["patch_embed.proj.weight"].shape
        distilled = "dist_token" in state
        G = math.isqrt(state["pos_embed"].shape[1] - 1 - distilled)
        depth = 1 + max(int(k.split(".")[1]) for k in state if k.startswith("blocks."))
        return dict(img_size=G * patch_size, patch_size=patch_size, embed_dim=embed_dim,
                    depth=depth, num_heads=max(1, embed_dim // 64),   # as in all published models
                    num_classes=len(state["head.weight"]), distilled=distilled)
    except (KeyError, ValueError, IndexError, TypeError) as e:
        raise InputError(f"the state dict is not of a DeiT ({e!r}).") from e


def load_model(source, *, say=print, **overrides):
    """A model in evaluation mode from a checkpoint of train.py (which names its architecture), an
    official or timm file (architecture read off its shapes), or a published name. `.classes` is the
    list of class names, or None. Overrides as in create_model. Raises InputError."""
    checkpoint = read_checkpoint(source)
    config = checkpoint.get("config") or config_from_shapes(checkpoint["model"])
    classes = checkpoint.get("classes")
    try:
        missing = DeiT.__init__.__kwdefaults__.keys() - config.keys()
        if missing and "config" in checkpoint and config["name"] in VARIANTS:
            raise KeyError(*missing)   # the default of num_heads, say, would load and be wrong
        model = create_classifier(**config | overrides)
        if not (classes is None or len(classes) == model.config["num_classes"] and
                all(isinstance(c, str) for c in classes)):
            raise ValueError("classes")
    except InputError:
        raise
    except (AttributeError, TypeError, KeyError, ValueError, RuntimeError) as e:
        raise InputError(f"{source} has an unusable 'config' or 'classes' ({e!r}).") from e
    load_weights(model, checkpoint, say=say)
    model.classes = classes
    return model.eval()


# ------------------------------------------------------------------------------------------------
# The teacher: any torchvision classifier (the paper's is regnet_y_16gf), or a DeiT
# ------------------------------------------------------------------------------------------------

def torchvision_models():
    """The one place where torchvision comes in."""
    try:
        import torchvision.models
    except ImportError as e:
        raise InputError(f"torchvision is needed here but cannot be imported ({e}): pip install "
                         "torchvision, or go without a teacher (--distillation none).") from e
    return torchvision.models


def torchvision_weights(name):
    """The entries of torchvision's table for one of its classifiers, the best last; [] for other
    names."""
    models = torchvision_models()
    if name not in models.list_models(module=models):
        return []
    weights = models.get_model_weights(name)
    return sorted(weights, key=lambda entry: entry is weights.DEFAULT)


def create_classifier(name=None, num_classes=1000, **overrides):
    """A DeiT (of the given name, or of overrides alone), or a torchvision classifier by its name;
    "regnet_demo" is a very small RegNet for very small images. Random weights, training mode."""
    if name is None:
        return DeiT(num_classes=num_classes, **overrides)
    if name in VARIANTS:
        return create_model(name, num_classes=num_classes, **overrides)
    img_size = overrides.pop("img_size", 224)   # it needs none, but its users do
    models = torchvision_models()
    if name not in models.list_models(module=models) and name != "regnet_demo":
        raise InputError(f"'{name}' is neither one of torchvision's classifiers (regnet_y_16gf, "
                         f"resnet50, ...) nor a DeiT ({', '.join(VARIANTS)}).")
    if overrides:
        raise InputError(f"{next(iter(overrides))} is for DeiT, it cannot be set for '{name}'.")
    if name == "regnet_demo":
        parameters = models.regnet.BlockParams(
            depths=[1, 1, 2, 2], widths=[32, 64, 128, 192], group_widths=[16] * 4,
            bottleneck_multipliers=[1.0] * 4, strides=[1, 2, 2, 2], se_ratio=0.25)
        model = models.RegNet(parameters, num_classes=num_classes, stem_width=32)
    else:
        model = models.get_model(name, weights=None, num_classes=num_classes)
    if getattr(model, "aux_logits", False):
        raise InputError(f"'{name}' has auxiliary heads: take a classifier with one output.")
    model.config = dict(num_classes=num_classes, img_size=img_size)
    return model.to(memory_format=torch.channels_last)


def both_heads(model, images):
    """Class logits and distillation logits of a DeiT; of any other classifier its logits twice."""
    if isinstance(model, DeiT):
        return model.heads(images)
    logits = model(images)
    return logits, logits


# To make the frozen teacher faster, ConvReLU and fuse: to be skipped on a first reading.

class ConvReLU(nn.Module):
    """A convolution and the ReLU behind it, without gradient; on a CPU in one pass over memory, by
    oneDNN's kernel, which PyTorch offers as an operator only."""

    def __init__(self, conv):
        super().__init__()
        self.conv = conv
        has = torch.backends.mkldnn.is_available()
        also = has and torch.ops.mkldnn._is_mkldnn_bf16_supported()
        self.types = [torch.float32] * has + [torch.bfloat16] * also

    def forward(self, x):
        c = self.conv
        if x.device.type != "cpu" or c.weight.dtype not in self.types:
            return c(x).relu_()
        return torch.ops.mkldnn._convolution_pointwise(
            x.to(c.weight.dtype), c.weight, c.bias, c.padding, c.stride, c.dilation, c.groups,
            "relu", [], "")


def fuse(model):
    """In place, the same function in fewer passes, for a model in evaluation mode: a batch norm
    behind a convolution (neighbours in a Sequential) is merged into it, for both are linear then,
    and a ReLU behind that is computed along with it."""
    for parent in model.modules():
        in_order = type(parent).forward is nn.Sequential.forward
        conv = name = None   # the convolution right before
        for key, module in list(parent.named_children()) if in_order else ():
            if type(conv) is nn.Conv2d and type(module) in (nn.BatchNorm2d, nn.ReLU):
                is_norm = type(module) is nn.BatchNorm2d
                conv = fuse_conv_bn_eval(conv, module) if is_norm else ConvReLU(conv)
                setattr(parent, name, conv)
                setattr(parent, key, nn.Identity())
            else:
                conv, name = module, key


class Teacher(nn.Module):
    """A frozen classifier: (B, 3, S, S) -> logits (B, K), without gradient, and in evaluation mode
    whatever the caller says: in training mode its batch norms would drift. Under autocast it keeps
    a copy with weights of that type, since frozen weights would be cast anew at every call."""

    def __init__(self, model, classes=None):
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.cast = self.cast_type = None
        self.classes = classes
        self.training = False

    def train(self, mode=True):
        return self

    @torch.no_grad()
    def forward(self, images):
        model, device = self.model, images.device.type
        if torch.is_autocast_enabled(device):
            if self.cast_type != torch.get_autocast_dtype(device):
                self.cast, self.cast_type = copy.deepcopy(model), torch.get_autocast_dtype(device)
                for module in self.cast.modules():
                    if isinstance(module, (nn.Conv2d, nn.Linear)):
                        module.to(self.cast_type)
            model, images = self.cast, images.to(self.cast_type)   # a convolution comes first
        return model(images.contiguous(memory_format=torch.channels_last))


def load_teacher(name="regnet_y_16gf", weights="IMAGENET1K_V2", num_classes=1000, *, img_size=None):
    """A frozen Teacher: a torchvision classifier by name, or one of the eight DeiT names.

    weights: one of torchvision's names for that model (downloaded once, hash checked), a file (a
    plain state dict, or a checkpoint of train.py), or None for random ones. img_size: the side of
    the images it will see, which a DeiT must know. Raises InputError: unknown name or weights,
    torchvision missing, another architecture, a class count other than num_classes.
    """
    if name in VARIANTS:
        size = {} if img_size is None else {"img_size": img_size}
        if weights is None:
            return Teacher(create_model(name, num_classes=num_classes, **size))
        if weights == "IMAGENET1K_V2":
            weights = name   # a published DeiT's own ImageNet weights
        model = load_model(weights, **size)
        if not isinstance(model, DeiT) or model.config["num_classes"] != num_classes:
            raise InputError(f"the teacher in {weights} is no DeiT of {num_classes} classes.")
        return Teacher(model, model.classes)
    model = create_classifier(name, num_classes).eval()
    urls = {entry.name: entry.url for entry in torchvision_weights(name)}
    if weights in urls and num_classes != 1000:
        raise InputError(f"the teacher {name} {weights} knows ImageNet's 1000 classes, the data "
                         f"have {num_classes}: train a teacher on them (--model {name}), then give "
                         "its best.pt as weights.")
    if not (weights is None or weights in urls or os.path.isfile(weights)):
        raise InputError(f"teacher weights '{weights}' are neither a file nor one of {name}'s "
                         f"({', '.join(urls) or 'none'}).")
    checkpoint = {}
    if weights is not None:
        checkpoint = read_checkpoint(urls.get(weights, weights), hashed=weights in urls)
        load_weights(model, checkpoint, new_heads=False)
    fused = copy.deepcopy(model)
    fuse(fused)
    side = getattr(model, "image_size", 224)   # of a torchvision transformer, which takes no other
    probe = torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        same = torch.allclose(fused(probe), model(probe), rtol=1e-4, atol=1e-4)
    return Teacher(fused if same else model, checkpoint.get("classes"))


# ------------------------------------------------------------------------------------------------
# The losses (paper, section 4), pure functions of logits, in float32 also under autocast.
#   soft  (1 - alpha) CE(cls, y) + alpha tau^2 KL(softmax(teacher/tau) || softmax(dist/tau))  eq. 2
#   hard  (1 - alpha) CE(cls, y) + alpha CE(dist, argmax teacher)                             eq. 3
# where cls and dist are the two heads' logits, y the true label, and alpha the paper's lambda.
# ------------------------------------------------------------------------------------------------

def hard_distillation_loss(dist_logits, teacher_logits):
    """Cross-entropy against the teacher's likeliest class: (B, K), (B, K) -> scalar."""
    return F.cross_entropy(dist_logits.float(), teacher_logits.argmax(dim=1))


def soft_distillation_loss(dist_logits, teacher_logits, tau):
    """tau^2 KL(teacher || student) at temperature tau: (B, K), (B, K) -> scalar, sum over classes,
    mean over the batch (the released code also divides by K, which makes it K times smaller).
    The factor tau^2 undoes the shrinking of the gradient by about that much."""
    student = F.log_softmax(dist_logits.float() / tau, dim=1)
    teacher = F.log_softmax(teacher_logits.float() / tau, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * tau**2


def distillation_loss(cls_logits, dist_logits, targets, teacher_logits, mode="hard", alpha=None,
                      tau=3.0):
    """(1 - alpha) cross-entropy of the class head + alpha distillation of the other: a scalar.

    Logits are (B, K); targets are class indices (B,) or probabilities (B, K). mode: "hard", "soft",
    or "none" (cross-entropy alone; teacher_logits may be None). alpha None means 0.5 for hard, 0.1
    for soft (paper, section 6). A student without distillation token passes its class logits twice.
    """
    if mode not in ("hard", "soft", "none"):
        raise InputError(f"distillation mode '{mode}' is none of hard, soft, none.")
    base = F.cross_entropy(cls_logits.float(), targets)
    if mode == "none":
        return base
    if mode == "hard":
        distillation = hard_distillation_loss(dist_logits, teacher_logits)
    else:
        distillation = soft_distillation_loss(dist_logits, teacher_logits, tau)
    alpha = {"hard": 0.5, "soft": 0.1}[mode] if alpha is None else alpha
    return (1 - alpha) * base + alpha * distillation


# ------------------------------------------------------------------------------------------------
# From a photo to the model's input, and the command line
# ------------------------------------------------------------------------------------------------

def to_rgb(image):
    """Any Pillow image as RGB. Transparency is dropped and EXIF rotation not applied, as in the
    recipe; 16-bit grey keeps its upper 8 bits (Pillow's own conversion would clip it to white)."""
    if image.mode.startswith("I"):
        image = image.convert("I").point(lambda v: v * (1 / 256)).convert("L")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")   # which would copy it


def center_view(image, size):
    """The evaluation's view of a Pillow image, (size, size) RGB: the short side to size / 0.875,
    bicubic, then the central square; exactly torchvision's Resize and CenterCrop."""
    from PIL import Image
    image, short = to_rgb(image), int(size / CROP_RATIO)
    W, H = image.size
    if max(W, H) > 8 * min(W, H):   # very elongated: the middle 8:1, or it would take gigabytes
        w, h = min(W, 8 * H), min(H, 8 * W)
        image = image.crop(((W - w) // 2, (H - h) // 2, (W + w) // 2, (H + h) // 2))
    w, h = (max(short, int(short * side / min(image.size))) for side in image.size)
    left, top = round((w - size) / 2), round((h - size) / 2)
    resized = image.resize((w, h), Image.Resampling.BICUBIC)
    return resized.crop((left, top, left + size, top + size))


def to_tensor(view):
    """An RGB Pillow image -> (1, 3, S, S), floats normalised by ImageNet's mean and deviation."""
    import numpy as np
    x = torch.from_numpy(np.array(view)).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (IMAGENET_MEAN, IMAGENET_STD))
    return (x - mean) / std


def print_walk(name="deit_tiny_distilled_patch16_224"):
    """Sends two images through a model without memory or arithmetic and prints each shape."""
    with torch.device("meta"):
        model, images = create_model(name), torch.empty(2, 3, 224, 224)
    print(f"\nThe walk of {name}, B = 2:\n  {'images':20s}{tuple(images.shape)}")
    for name in ("patch_embed", "blocks.0.attn.qkv", "blocks.0.attn", "blocks.0.mlp.fc1",
                 "blocks.0", "blocks.10", "blocks.11", "norm", "head", "head_dist"):
        model.get_submodule(name).register_forward_hook(
            lambda module, x, y, name=name: print(f"  {name:20s}{tuple(y.shape)}"))
    model(images)


def class_names(model, count):
    """The checkpoint's; for 1000 classes without names ImageNet's, if torchvision is there."""
    names = model.classes
    if names is None and count == 1000:
        with contextlib.suppress(InputError):
            names = torchvision_models().ResNet50_Weights.IMAGENET1K_V1.meta["categories"]
    names = names or [f"class {k}" for k in range(count)]
    return [name.encode(errors="replace").decode() for name in names]


def draw_attention(model, view, answers, path):
    """Writes a picture: the view, and for each special token what it looks at in the last block
    (mean of the heads; bright: much), with the answers (one string for each token) beneath."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont
    T, S = model.num_tokens, 384
    rows = model.attention(to_tensor(view))[-1, 0].mean(0)[:T, T:]             # (T, G*G)
    view, G = view.resize((S, S), Image.Resampling.BICUBIC), math.isqrt(rows.shape[1])
    picture = Image.new("RGB", ((T + 1) * (S + 8) - 8, S + 32), "white")
    draw, font = ImageDraw.Draw(picture), ImageFont.load_default(16)
    for i, answer in enumerate(("what the model gets", *answers)):
        panel = view
        if i:
            heat = (rows[i - 1] / rows[i - 1].max()).reshape(G, G).float().numpy()
            heat = Image.fromarray(heat).resize((S, S), Image.Resampling.BICUBIC)
            light = 0.15 + 0.85 * np.asarray(heat).clip(0, 1)[..., None]       # (S, S, 1)
            panel = Image.fromarray((np.asarray(view) * light).astype(np.uint8))
        picture.paste(panel, (i * (S + 8), 0))
        draw.text((i * (S + 8) + 4, S + 6), answer, "black", font)
    picture.save(path)


def classify(path, weights, attention=None):
    """Prints the five likeliest classes of a photo by each head and by both. attention: the path of
    a picture to be drawn (draw_attention)."""
    from PIL import Image
    model = load_model(weights)
    try:
        with Image.open(path) as image:
            view = center_view(image, model.config["img_size"])
    except Exception as e:   # Pillow raises OSError, SyntaxError, ValueError and more
        raise InputError(f"{path} cannot be read as an image ({e}).") from e
    with torch.inference_mode():
        heads = both_heads(model, to_tensor(view))
    names, answers = class_names(model, heads[0].shape[1]), []
    for title, logits in zip(("class head", "distillation head", "both"), (*heads, sum(heads) / 2)):
        top = [(100 * p, names[k]) for p, k in zip(*logits[0].softmax(0).topk(min(5, len(names))))]
        answers.append(f"{title}: {top[0][1]}, {top[0][0]:.0f} %")
        print(title, *(f"  {p:5.1f} %  {name}" for p, name in top), sep="\n")
        if heads[0] is heads[1]:
            break   # there is only one head
    if attention:
        if not isinstance(model, DeiT):
            raise InputError(f"{weights} is no DeiT: there is no attention to draw.")
        try:
            draw_attention(model, view, answers[:model.num_tokens], attention)
        except (OSError, ValueError) as e:   # ValueError: a suffix that Pillow does not know
            raise InputError(f"{attention} cannot be written ({e}): take out.png, say.") from e
        print(f"attention drawn in {attention}")


def main(argv=None):
    import argparse
    parser = argparse.ArgumentParser(description="Without arguments: the variants and the shapes.")
    parser.add_argument("photo", nargs="?", help="an image file to classify")
    parser.add_argument("--weights", default="deit_tiny_distilled_patch16_224",
                        help="checkpoint of train.py, official or timm file, URL or published name")
    parser.add_argument("--attention", metavar="OUT.png", help="draw what the tokens look at")
    args = parser.parse_args(argv)
    try:
        if args.photo:
            return classify(args.photo, args.weights, args.attention)
        if args.attention:
            raise InputError("--attention needs a photo: give its path first.")
    except InputError as e:
        raise SystemExit(f"deit.py: {e}") from None
    print(f"{'name':34s}{'D':>5s}{'heads':>7s}{'S':>5s}{'parameters':>12s}{'published top-1':>17s}")
    for name, (embed_dim, num_heads, img_size, _, count, top1, _) in VARIANTS.items():
        print(f"{name:34s}{embed_dim:5d}{num_heads:7d}{img_size:5d}{count:12,d}{top1:17.3f}")
    print_walk()


if __name__ == "__main__":
    main()
