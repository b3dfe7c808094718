"""Weights of Wan's networks in every published form: read lazily, translated by name, and written back.

    layout     files                                                             names
    official   diffusion_pytorch_model.safetensors, or shards and their index    Wan's, which are this project's own
    diffusers  the same files, in a folder or its transformer/ subfolder         WanTransformer3DModel's
    pt         one file of torch.save: Self Forcing, Causal Forcing, CausVid     either, below the prefixes of wrappers
    own        STAGE.safetensors of train.py                                     Wan's

Reading copies nothing: tensors are views of the mapped file. Files are never run: a .pt that holds more than tensors
and plain values is refused.

    weights, metadata = read_weights("Wan2.1-T2V-1.3B")
    net, metadata = load(SIZES["wan1.3b"], "Wan2.1-T2V-1.3B", "cuda", torch.bfloat16)
    write_diffusers("for_diffusers", weights, SIZES["wan1.3b"])
"""

import hashlib
import os
import pickle
import re
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from cluster.files import check_finite, read_json, read_tensors, sync, write_json, write_tensors
from model import SIZES, CausalWan, WanConfig
from wan21.errors import optional_packages, reading
from wan21.families import FAMILIES

NAME = "diffusion_pytorch_model"  # of files, in both public layouts
DIFFUSERS = {  # Wan's name -> that of diffusers' WanTransformer3DModel; names not listed are the same in both
    **{f"{kind}_embedding.{i}": f"condition_embedder.{kind}_embedder.linear_{i // 2 + 1}"
       for kind in ("text", "time") for i in (0, 2)},
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out", "head.modulation": "scale_shift_table"}
DIFFUSERS_BLOCK = {  # the same below blocks.N. Diffusers counts norms in the order of their use: 2 and 3 trade places
    **{f"{wan}.{a}": f"{theirs}.{b}" for wan, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
       for a, b in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"), ("norm_q", "norm_q"),
                    ("norm_k", "norm_k"))},
    "norm3": "norm2", "ffn.0": "ffn.net.0.proj", "ffn.2": "ffn.net.2", "modulation": "scale_shift_table"}
FROM_DIFFUSERS = {theirs: wan for wan, theirs in DIFFUSERS.items()}
FROM_DIFFUSERS_BLOCK = {theirs: wan for wan, theirs in DIFFUSERS_BLOCK.items()}
WRAPPERS = {"model", "module", "generator", "diffusion_model", "_fsdp_wrapped_module", "_orig_mod",
            "_checkpoint_wrapped_module"}  # parts of a name that training code adds; none is part of Wan's


def renamed(name: str, top: dict[str, str], in_block: dict[str, str]) -> str:
    """A tensor's name in the other layout, by one table outside of the blocks and one inside; names in neither table,
    which a text-to-video model does not have, stay as they are."""
    block, stem, suffix = re.fullmatch(r"(blocks\.\d+\.)?(.*?)(\.weight|\.bias)?", name, re.DOTALL).groups(default="")
    return block + (in_block if block else top).get(stem, stem) + suffix


def wan_names(weights: dict[str, Tensor], path) -> tuple[dict[str, Tensor], bool]:
    """Wan's names for the tensors of any public file, and whether they had diffusers' names. ValueError if two tensors
    get the same name."""
    bare = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in weights}
    diffusers, ours = any(name.startswith("condition_embedder.") for name in bare.values()), {}
    for name, plain in bare.items():
        new = renamed(plain, FROM_DIFFUSERS, FROM_DIFFUSERS_BLOCK) if diffusers else plain
        if new in ours:
            raise ValueError(f"got two tensors for {new} in {path}, expected one network: change the file, or --part")
        ours[new] = weights[name]
    return ours, diffusers


# ---------------------------------------------------------------------------------------------------------------------
# Reading

def read_weights(path: Path, part: str = "") -> tuple[dict[str, Tensor], dict]:
    """The tensors of a file or folder of one of the layouts above, by Wan's names, and their metadata.

    path: the file, the index of a sharded model, or the folder. part: of a .pt that holds several networks, the name of
    the one to take; if not given, the averaged weights where there are any. Tensors are in the file's dtype, on the
    CPU, mapped from the file. metadata: {"layout": "official", "diffusers" or "pt", "part": the network taken, or ""};
    for a file of this project what it records, and {"layout": "own"}. ValueError, naming the file, if it is missing,
    damaged, of another kind, or could only be read by running its code."""
    path = Path(path)
    if path.suffix in (".pt", ".pth", ".ckpt", ".bin"):
        weights, taken = one_network(read_pt(path), path, part)
        return wan_names(weights, path)[0], {"layout": "pt", "part": taken}
    if part:
        raise ValueError(f"got --part {part} for {path}, expected a .pt of several networks: leave out --part")
    if path.is_dir() or re.search(r"-\d+-of-\d+$", path.stem):  # a shard stands for its folder
        path = file_in(path if path.is_dir() else path.parent)
    weights, metadata = (read_index(path), {}) if path.suffix == ".json" else read_tensors(path)
    if metadata:
        return weights, metadata | {"layout": "own"}
    weights, diffusers = wan_names(weights, path)
    return weights, {"layout": "diffusers" if diffusers else "official", "part": ""}


def file_in(folder: Path) -> Path:
    """The index or the file of weights in a folder. ValueError if there is none."""
    names = [f"{below}{NAME}.safetensors{suffix}" for below in ("", "transformer/") for suffix in (".index.json", "")]
    for path in (folder / name for name in names):
        if path.is_file():
            return path
    files = ", ".join(sorted(file.name for file in folder.glob("*.safetensors"))[:20])
    raise ValueError(f"got the folder {folder} without any of {', '.join(names)}, expected Wan's weights: change it"
                     + f", or name a file of it: {files}" * bool(files))


def read_index(path: Path) -> dict[str, Tensor]:
    """The tensors of all shards that an index lists."""
    expected = "an index, JSON with a weight_map of tensor names to files beside it: download it again"
    where = read_json(path, expected).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(x, str) and Path(x).name == x for x in where.values()):
        raise ValueError(f"got {path}, expected {expected}")
    shards = {file: read_tensors(path.with_name(file))[0] for file in sorted(set(where.values()))}
    for name, file in where.items():
        if name not in shards[file]:
            raise ValueError(f"got {path.with_name(file)} without {name}, expected it by {path}: download both again")
    return {name: shards[file][name] for name, file in where.items()}


def read_pt(path: Path):
    """What a file of torch.save holds, its tensors mapped. ValueError if it is missing, damaged, or holds code."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"got no file {path}, expected a .pt checkpoint: change --weights, or the path")
    with open(path, "rb") as f:
        is_zip = f.read(4) == b"PK\3\4"  # what torch.save writes since 1.6; the older kind cannot be mapped
    try:
        return torch.load(path, weights_only=True, mmap=is_zip, map_location="cpu")
    except pickle.UnpicklingError as e:
        name = re.search(r"GLOBAL ([\w.]+)", str(e))  # torch's own message also says how to run the code anyway
        what = f"holds the pickled code {name[1]}" if name else "is damaged or holds pickled code"
        raise ValueError(f"got {path}, which {what}, expected tensors alone: save only its state dict") from e
    except Exception as e:  # damaged bytes can make the unpickler fail in any way
        raise ValueError(f"got a damaged or truncated file {path} ({type(e).__name__}: {str(e)[:200]}), expected a "
                         "complete file of torch.save: download it again") from e


def one_network(content, path: Path, part: str) -> tuple[dict[str, Tensor], str]:
    """The named tensors of one network of a checkpoint, and the key they stood under ("": it holds nothing else)."""
    content = content if isinstance(content, dict) else {}
    for key in (part,) if part else ("generator_ema", "generator", "model", "state_dict", ""):
        network = content.get(key) if key else content
        named = network.items() if isinstance(network, dict) else ()
        if tensors := {name: w for name, w in named if isinstance(name, str) and isinstance(w, Tensor)}:
            return tensors, key
    raise ValueError(f"got {path} with {', '.join(map(str, content))}, expected {part or 'a generator'}: change --part")


def digest(path: Path) -> str:
    """A short hex string that identifies a file, or the weights and images of a folder: of their names, sizes, and
    first and last megabyte, in which other weights differ. It takes no time, whatever their size."""
    path, found = Path(path), hashlib.sha256()
    suffixes = (".safetensors", ".png", ".jpg", ".jpeg", ".webp")
    for file in sorted(file for file in path.rglob("*") if file.suffix in suffixes) if path.is_dir() else [path]:
        found.update(f"{file.name} {file.stat().st_size} ".encode() + ends(file))
    return found.hexdigest()[:16]


def ends(path: Path) -> bytes:
    """The first and the last megabyte of a file, or all of it if it is shorter."""
    with open(path, "rb") as f:
        start = f.read(2**20)
        f.seek(max(0, path.stat().st_size - 2**20))
        return start + f.read()


def load(config: WanConfig, path: Path, device="cpu", dtype: torch.dtype | None = None,
         part: str = "") -> tuple[CausalWan, dict]:
    """A network with the weights of a file or folder, and their metadata, as read_weights returns it.

    dtype: None keeps the file's, and on the CPU the parameters stay views of the file. Otherwise tensor by tensor is
    moved and cast, so that no more than the network and one tensor is in memory. ValueError if the weights are not
    those of the config, or not finite."""
    weights, metadata = read_weights(path, part)
    check_fit(config, weights, path)
    for name in weights:
        check_finite({name: weights[name]}, path)
        weights[name] = weights[name].to(device, dtype)
    with torch.device("meta"):
        net = CausalWan(config)
    net.load_state_dict(weights, assign=True)
    return net, metadata


def shapes(config: WanConfig) -> dict[str, tuple]:
    """Name and shape of every tensor of a network."""
    with torch.device("meta"):
        return shapes_of(CausalWan(config).state_dict())


def shapes_of(weights: dict[str, Tensor]) -> dict[str, tuple]:
    return {name: tuple(v.shape) for name, v in weights.items()}


def size_of(weights: dict[str, Tensor], path) -> str:
    """The first of model.SIZES that weights fit. ValueError if none does."""
    fits = [size for size, config in SIZES.items() if shapes(config) == shapes_of(weights)]
    return fits[0] if fits else check_fit(SIZES["wan1.3b"], weights, path)


def check_fit(config: WanConfig, weights: dict[str, Tensor], path) -> None:
    """ValueError that names tensors that are missing, unexpected or of another shape, and the size that fits."""
    own, got = shapes(config), shapes_of(weights)
    if own == got:
        return
    differ = sorted(name for name in own.keys() | got.keys() if own.get(name) != got.get(name))
    some = ", ".join(f"{name}: got {got.get(name, 'none')}, expected {own.get(name, 'none')}" for name in differ[:4])
    fits = [size for size in SIZES if shapes(SIZES[size]) == got]
    raise ValueError(f"got {path}, of which {len(differ)} tensors do not fit the network ({some} ...), expected a "
                     f"text-to-video model: change --size{f' to {fits[0]}' if fits else ', or the file'}")


def with_cameras(config: WanConfig, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a text-to-video model as those of a network that sees cameras: with prope_o of zeros, so that it
    gives what it gave, whatever the cameras. Weights that have a prope_o, and those of other networks, as they are."""
    new = {name: (shape, weights.get(name.replace("prope_o", "o"))) for name, shape in shapes(config).items()
           if ".prope_o." in name}
    if new.keys() & weights.keys():
        return weights
    return weights | {name: o.new_zeros(shape) for name, (shape, o) in new.items()
                      if o is not None and o.shape == shape}


# ---------------------------------------------------------------------------------------------------------------------
# Writing

def write_official(folder: Path, weights: dict[str, Tensor], config: WanConfig, max_shard_bytes: float = 10e9,
                   dtype: torch.dtype | None = None) -> None:
    """Write weights as the official release has them: NAME.safetensors, in shards with an index if larger than
    max_shard_bytes (10 GB in Wan's release), and config.json with the fields of Wan-AI/Wan2.1-T2V-1.3B's. dtype: cast,
    a shard at a time; None keeps each tensor's. ValueError if the folder holds weights already."""
    c = config
    write_sharded(Path(folder), weights, max_shard_bytes, dtype, {
        "_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": c.dim, "eps": c.eps, "ffn_dim": c.ffn_dim,
        "freq_dim": c.freq_dim, "in_dim": c.in_dim, "model_type": FAMILIES[c.family].model_type,
        "num_heads": c.num_heads, "num_layers": c.num_layers, "out_dim": c.in_dim, "text_len": c.text_len})


def write_diffusers(folder: Path, weights: dict[str, Tensor], config: WanConfig, max_shard_bytes: float = 10e9,
                    dtype: torch.dtype | None = None) -> None:
    """Write weights for diffusers' WanTransformer3DModel.from_pretrained(folder, subfolder="transformer"); arguments
    and errors as of write_official. ValueError for a network with cameras, which diffusers has not."""
    c = config
    if c.sees_cameras:
        raise ValueError("got a network that sees cameras, expected a text-to-video model, as the transformer of "
                         "diffusers has no prope_o: change --layout to official")
    named = {renamed(name, DIFFUSERS, DIFFUSERS_BLOCK): w for name, w in weights.items()}
    write_sharded(Path(folder) / "transformer", named, max_shard_bytes, dtype, {
        "_class_name": "WanTransformer3DModel", "_diffusers_version": "0.33.0", "added_kv_proj_dim": None,
        "attention_head_dim": c.dim // c.num_heads, "cross_attn_norm": True, "eps": c.eps, "ffn_dim": c.ffn_dim,
        "freq_dim": c.freq_dim, "image_dim": None, "in_channels": c.in_dim, "num_attention_heads": c.num_heads,
        "num_layers": c.num_layers, "out_channels": c.in_dim, "patch_size": c.patch_size, "pos_embed_seq_len": None,
        "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024, "text_dim": c.text_dim})


def write_sharded(folder, weights, max_shard_bytes, dtype, config: dict):
    """Write all shards or none, then the index and config.json: a folder never looks complete before it is."""
    with optional_packages():
        from huggingface_hub import split_torch_state_dict_into_shards
    for place in (folder, folder.parent if folder.name == "transformer" else folder / "transformer"):
        if there := sorted([*place.glob(f"{NAME}*.safetensors*"), *place.glob("config.json")]):
            raise ValueError(f"got {there[0]}, which exists already, expected none: move it away, or change OUT")
    sizes = {name: torch.empty_like(w, dtype=dtype, device="meta") for name, w in weights.items()}
    split = split_torch_state_dict_into_shards(sizes, filename_pattern=f"{NAME}{{suffix}}.safetensors",
                                               max_shard_size=int(max_shard_bytes))
    try:
        for file, names in split.filename_to_tensors.items():
            write_tensors(folder / file, {name: weights[name].detach().to("cpu", dtype) for name in names})
    except BaseException:
        for file in split.filename_to_tensors:
            (folder / file).unlink(missing_ok=True)
        raise
    if split.is_sharded:
        write_json(folder / f"{NAME}.safetensors.index.json",
                   {"metadata": split.metadata, "weight_map": split.tensor_to_filename})
    write_json(folder / "config.json", config)


def write_own(out: Path, weights: dict[str, Tensor], metadata: dict, dtype: torch.dtype | None = None) -> None:
    """Write weights as metadata["stage"] of train.py leaves them in its --out: STAGE_raw.safetensors, and
    STAGE.safetensors, the averaged weights, which are the same here (a hard link where possible). ValueError if either
    exists."""
    raw, ema = (Path(out) / f"{metadata['stage']}{suffix}.safetensors" for suffix in ("_raw", ""))
    for path in (raw, ema):
        if path.exists():
            raise ValueError(f"got {path}, which exists already, expected none: move it away, or change OUT")
    weights = {name: w.to(dtype) if dtype else w for name, w in weights.items()}
    write_tensors(raw, weights, metadata)
    try:
        os.link(raw, ema)
        sync(ema.parent)
    except OSError:  # a file system without hard links
        write_tensors(ema, weights, metadata)


# ---------------------------------------------------------------------------------------------------------------------
# Models of other libraries: UMT5 (text.py) and the VAE (vae.py)

def load_into(model, weights: dict[str, Tensor], path):
    """Give a model built on the meta device its weights, without a copy. ValueError, with the path, if they differ."""
    check_finite(weights, path)
    with reading(path, "Wan's own weights: change --wan", RuntimeError):
        model.load_state_dict(weights, assign=True)
    return model


def pretrained(model_class, path: Path, tied=(), **options):
    """model_class.from_pretrained(path). ValueError, with the path, if it cannot be read or if a weight is missing,
    which would stay random. tied: names that may be missing."""
    expected = f"all weights of {model_class.__name__}: download it again, or change --wan"
    with reading(path, expected, OSError, RuntimeError, ValueError, SafetensorError):
        model, info = model_class.from_pretrained(path, local_files_only=True, output_loading_info=True, **options)
    if lost := sorted(set(info["missing_keys"]) - set(tied)):
        raise ValueError(f"got {path} without {', '.join(lost[:3])}, expected {expected}")
    return model
