"""Wan 2.1 itself: its weights in every published form, read lazily, translated by name, and written back; and the
commands that bring its weights, prompts (encoders.py) and videos (prepare.py) into the project's files.

    python wan21.py convert SRC OUT --layout own --size wan1.3b           # OUT is then the --out folder of train.py:
    python train.py --size wan1.3b --stage teacher_forcing --data latents --out OUT --accum 64   # from Wan's weights
    python wan21.py convert causal_forcing.pt OUT --layout own --stage causal_cd --chunk 3  # a public student
    python wan21.py convert runs/wan/salt.safetensors FOLDER --layout diffusers --dtype bf16   # for other programs
    python wan21.py encode-prompts prompts.txt prompts/0.safetensors --wan Wan2.1-T2V-1.3B
    python wan21.py prepare --videos clips --captions captions.csv --out latents --wan Wan2.1-T2V-1.3B

With --layout own, flags of train.py may follow SRC and OUT: they are recorded as the settings the weights were made
with (frames, chunk, steps, guidance), which sampling uses and later stages are held against.

What is read, by what it finds (the suffix of a file, the names of its tensors, the files of a folder):

    layout     files                                                             names
    official   diffusion_pytorch_model.safetensors, or shards and their index    Wan 2.1's, the project's own
    diffusers  the same files, in a folder or its transformer/ subfolder         WanTransformer3DModel's
    pt         one file of torch.save: Self Forcing, Causal Forcing, CausVid     either, below wrappers' prefixes
    own        STAGE.safetensors of train.py                                     Wan 2.1's

Nothing is copied in reading: tensors are views of the mapped file, whose pages come in as they are used and can go
again. Files are never run: a .pt that holds more than tensors and plain values is refused.
"""

import argparse
import hashlib
import json
import os
import pickle
import re
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor

import encoders
import prepare
from files import check_finite, read_json, read_tensors, run_command, sync, write_tensors, write_text
from model import SIZES, CausalWan, WanConfig, check_device

# ---------------------------------------------------------------------------------------------------------------------
# Weights: names

NAME = "diffusion_pytorch_model"  # of files, in both public layouts
DIFFUSERS = {  # Wan 2.1's name -> that of diffusers' WanTransformer3DModel; names not listed are the same in both
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.head": "proj_out",
    "head.modulation": "scale_shift_table",
}
DIFFUSERS_BLOCK = {  # the same below blocks.N. Diffusers counts norms in the order of their use: 2 and 3 trade places
    **{f"{wan}.{a}": f"{theirs}.{b}" for wan, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
       for a, b in (("q", "to_q"), ("k", "to_k"), ("v", "to_v"), ("o", "to_out.0"), ("norm_q", "norm_q"),
                    ("norm_k", "norm_k"))},
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}
FROM_DIFFUSERS = {theirs: wan for wan, theirs in DIFFUSERS.items()}
FROM_DIFFUSERS_BLOCK = {theirs: wan for wan, theirs in DIFFUSERS_BLOCK.items()}
WRAPPERS = {"model", "module", "generator", "diffusion_model", "_fsdp_wrapped_module", "_orig_mod",
            "_checkpoint_wrapped_module"}  # parts of a name that training code adds; none is part of Wan's
IMAGE = ("img_emb", "k_img", "v_img", "image_embedder", "add_k_proj", "add_v_proj", "norm_added_k")  # of i2v models


def to_diffusers(name: str) -> str:
    """Diffusers' name of Wan's tensor `name`."""
    return renamed(name, DIFFUSERS, DIFFUSERS_BLOCK)


def from_diffusers(name: str) -> str:
    """Wan's name of diffusers' tensor `name`; names that a text-to-video model does not have stay as they are."""
    return renamed(name, FROM_DIFFUSERS, FROM_DIFFUSERS_BLOCK)


def renamed(name, top, in_block):
    block, stem, kind = re.fullmatch(r"(blocks\.\d+\.)?(.*?)(\.weight|\.bias)?", name, re.DOTALL).groups(default="")
    return block + (in_block if block else top).get(stem, stem) + kind


def wan_names(weights: dict[str, Tensor], path) -> tuple[dict[str, Tensor], bool]:
    """Wan's names for the tensors of any public file; and whether they were diffusers'. ValueError if two become one.
    """
    bare = {name: ".".join(part for part in name.split(".") if part not in WRAPPERS) for name in weights}
    theirs = any(name.startswith("condition_embedder.") for name in bare.values())
    named = {}
    for name, plain in bare.items():
        ours = from_diffusers(plain) if theirs else plain
        if ours in named:
            raise ValueError(f"got two tensors for {ours} in {path}, expected one network: change the file, or --part")
        named[ours] = weights[name]
    return named, theirs


# ---------------------------------------------------------------------------------------------------------------------
# Weights: reading

def read_weights(path: Path, part: str = "") -> tuple[dict[str, Tensor], dict]:
    """The tensors of a file or folder of one of the layouts above, by Wan's names, and `about` them.

    path: the file, the index of a sharded model, or the folder. part: of a .pt that holds several networks, the name of
    the one to take; if not given, the averaged weights where there are any. Tensors are in the file's dtype, on the
    CPU, mapped from the file, which therefore must not be changed in place while they are used.

    about: {"layout": "official", "diffusers" or "pt", "part": the network taken, or ""}; of the project's own files
    what they have recorded, and {"layout": "own"}.
    ValueError, naming the file, if it is missing, damaged, no such file, or could only be read by running its code.
    """
    path = Path(path)
    if path.suffix in (".pt", ".pth", ".ckpt", ".bin"):
        weights, taken = read_pickled(path, part)
        return wan_names(weights, path)[0], {"layout": "pt", "part": taken}
    if part:
        raise ValueError(f"got --part {part} for {path}, expected a .pt of several networks: leave out --part")
    weights, about = read_safetensors(path)
    if about:
        return weights, about | {"layout": "own"}
    weights, theirs = wan_names(weights, path)
    return weights, {"layout": "diffusers" if theirs else "official", "part": ""}


def digest(path: Path) -> str:
    """A short hex string of a file, or of the weights or pictures in a folder: of their names, sizes, and first and
    last megabyte, in which other weights differ. It takes no time, whatever their size."""
    path, found = Path(path), hashlib.sha256()
    kinds = (".safetensors", ".png", ".jpg", ".jpeg", ".webp")
    files = sorted(file for file in path.rglob("*") if file.suffix in kinds) if path.is_dir() else [path]
    for file in files:
        size = file.stat().st_size
        with open(file, "rb") as f:
            start = f.read(2**20)
            f.seek(max(0, size - 2**20))
            found.update(f"{file.name} {size} ".encode() + start + f.read())
    return found.hexdigest()[:16]


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a .safetensors, an index or a folder of them, mapped; and the recorded `about`, if it is ours."""
    if path.is_dir() or re.search(r"-\d+-of-\d+$", path.stem):  # a shard stands for its folder
        folder = path if path.is_dir() else path.parent
        names = [f"{below}{NAME}.safetensors{kind}" for below in ("", "transformer/") for kind in (".index.json", "")]
        found = [folder / name for name in names if (folder / name).is_file()]
        if not found:
            others = ", ".join(sorted(file.name for file in folder.glob("*.safetensors"))[:20])
            raise ValueError(f"got the folder {path} without any of {', '.join(names)}, expected the weights of Wan "
                             f"2.1 there: change --weights, or name a file{f' of it: {others}' if others else ''}")
        path = found[0]
    if path.suffix == ".json":
        return read_index(path), {}
    return mapped(path)


def read_index(path: Path) -> dict[str, Tensor]:
    """The tensors of all shards that an index lists."""
    expected = ("an index, JSON with a weight_map of tensor names to files beside it: download it again, or change "
                "--weights")
    where = read_json(path, expected).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(x, str) and Path(x).name == x for x in where.values()):
        raise ValueError(f"got {path}, expected {expected}")
    shards = {file: mapped(path.with_name(file))[0] for file in sorted(set(where.values()))}
    for name, file in where.items():
        if name not in shards[file]:
            raise ValueError(f"got {path.with_name(file)} without {name}, expected it, as {path} says: download both "
                             "again")
    return {name: shards[file][name] for name, file in where.items()}


def mapped(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors of one safetensors file, as views of it, and `about` of its header, if the project wrote it."""
    if not path.is_file():
        raise ValueError(f"got no file {path}, expected weights there (.safetensors, .pt, or their folder): change "
                         "--weights, or download what is missing")
    return read_tensors(path)


def read_pickled(path: Path, part: str) -> tuple[dict[str, Tensor], str]:
    """The tensors of a file of torch.save as they are named there, and the part of the file they were taken from."""
    if not path.is_file():
        raise ValueError(f"got no file {path}, expected a .pt checkpoint: change --weights, or the path")
    with open(path, "rb") as f:
        is_zip = f.read(4) == b"PK\3\4"  # what torch.save writes since 1.6; the older kind cannot be mapped
    try:
        held = torch.load(path, weights_only=True, mmap=is_zip, map_location="cpu")
    except pickle.UnpicklingError as e:
        name = re.search(r"GLOBAL ([\w.]+)", str(e))  # torch's own words go on to say how to run it all the same
        what = f"holds the pickled code {name[1]}" if name else "is damaged or holds pickled code"
        raise ValueError(f"got {path}, which {what} besides tensors, expected tensors alone, as code in a file can do "
                         "anything here: save just its state dict, where you trust it") from e
    except Exception as e:  # damaged bytes make the unpickler fail in any way there is
        raise ValueError(f"got a damaged or truncated file {path} ({type(e).__name__}: {str(e)[:200]}), expected a "
                         "complete file of torch.save: download it again") from e
    parts = {name: tensors_in(value) for name, value in held.items()} if isinstance(held, dict) else {}
    parts = {name: tensors for name, tensors in parts.items() if tensors}
    taken = part or next((name for name in ("generator_ema", "generator", "model", "state_dict") if name in parts), "")
    if taken in parts:
        return parts[taken], taken
    if not part and (flat := tensors_in(held)):
        return flat, ""
    raise ValueError(f"got {path} with the networks {', '.join(map(str, parts)) or 'none'}, expected "
                     f"{part or 'generator_ema, generator, model, state_dict or tensors alone'}: change --part")


def tensors_in(value) -> dict[str, Tensor]:
    """The named tensors of a state dict; none if it is no dict."""
    named = value.items() if isinstance(value, dict) else ()
    return {name: v for name, v in named if isinstance(name, str) and isinstance(v, Tensor)}


# ---------------------------------------------------------------------------------------------------------------------
# Weights: into a network

def load(config: WanConfig, path: Path, device="cpu", dtype: torch.dtype | None = None,
         part: str = "") -> tuple[CausalWan, dict]:
    """A network with the weights of a file or folder, and `about` them, as read_weights has it.

    dtype: None keeps the file's, and on the CPU the parameters stay views of the file: no memory but page cache, as
    long as nobody writes to them. Else tensor by tensor is moved and cast, so that the most there is at a time is the
    network and one tensor. ValueError if the weights are not those of the config, naming what does not fit.
    """
    weights, about = read_weights(path, part)
    check_fit(config, weights, path)
    dtypes = sorted({str(v.dtype).removeprefix("torch.") for v in weights.values()})
    if dtype is None and len(dtypes) > 1:  # diffusers keeps norms and time embedding in fp32 beside bf16
        raise ValueError(f"got {path} of mixed {' and '.join(dtypes)}, expected a dtype for all: give a dtype, such as "
                         "torch.bfloat16")
    for name in weights:
        check_finite({name: weights[name]}, path)
        weights[name] = weights[name].to(device, dtype)
    with torch.device("meta"):
        net = CausalWan(config)
    net.load_state_dict(weights, assign=True)
    return net, about


def check_fit(config: WanConfig, weights: dict[str, Tensor], path) -> None:
    """ValueError that names the tensors that are missing, left over or of another shape, and says what they may be."""
    own, got = shapes(config), {name: tuple(v.shape) for name, v in weights.items()}
    if own == got:
        return
    missing, unexpected = sorted(own.keys() - got.keys()), sorted(got.keys() - own.keys())
    misshaped = [name for name in sorted(own.keys() & got.keys()) if own[name] != got[name]]
    counted = [f"{len(names)} {kind} ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" for kind, names in (
        ("missing", missing), ("unexpected", unexpected),
        ("misshaped", [f"{name}: got {got[name]}, expected {own[name]}" for name in misshaped])) if names]
    patches = got.get("patch_embedding.weight", (0, 0))
    hint = "change --size, or the file"
    if fits := [size for size in SIZES if shapes(SIZES[size]) == got]:
        hint = f"it is of size {fits[0]}: change --size to {fits[0]}"
    elif any(word in name for name in unexpected for word in IMAGE) or (
            len(patches) == 5 and patches[0] == config.dim and patches[1] > config.in_dim):
        hint = "it is an image-to-video model, expected a text-to-video one: change the file"
    raise ValueError(f"got {path}, which does not fit the network: {hint}. In detail: {'; '.join(counted)}")


def size_of(weights: dict[str, Tensor], path) -> str:
    """The first of model.SIZES that weights fit. ValueError if none does."""
    got = {name: tuple(v.shape) for name, v in weights.items()}
    for size in SIZES:
        if shapes(SIZES[size]) == got:
            return size
    check_fit(SIZES["wan1.3b"], weights, path)


def shapes(config) -> dict[str, tuple]:
    with torch.device("meta"):
        return {name: tuple(v.shape) for name, v in CausalWan(config).state_dict().items()}


# ---------------------------------------------------------------------------------------------------------------------
# Weights: writing

def write_official(folder: Path, weights: dict[str, Tensor], config: WanConfig, max_shard_bytes: float = 10e9,
                   dtype: torch.dtype | None = None) -> None:
    """Write weights as the official release has them: NAME.safetensors, in shards with an index if larger than
    max_shard_bytes (10 GB in Wan's release), and config.json with the fields of Wan-AI/Wan2.1-T2V-1.3B's.

    dtype: cast, a shard at a time; None keeps each tensor's. Wan's config.json does not hold patch_size and text_dim:
    they are (1, 2, 2) and 4096 there. ValueError if the folder holds weights already.
    """
    c = config
    write_sharded(Path(folder), weights, max_shard_bytes, dtype, {
        "_class_name": "WanModel", "_diffusers_version": "0.30.0", "dim": c.dim, "eps": c.eps, "ffn_dim": c.ffn_dim,
        "freq_dim": c.freq_dim, "in_dim": c.in_dim, "model_type": "t2v", "num_heads": c.num_heads,
        "num_layers": c.num_layers, "out_dim": c.in_dim, "text_len": c.text_len})


def write_diffusers(folder: Path, weights: dict[str, Tensor], config: WanConfig, max_shard_bytes: float = 10e9,
                    dtype: torch.dtype | None = None) -> None:
    """Write weights for diffusers' WanTransformer3DModel.from_pretrained(folder, subfolder="transformer"); arguments
    and errors as of write_official."""
    c = config
    named = {to_diffusers(name): w for name, w in weights.items()}
    write_sharded(Path(folder) / "transformer", named, max_shard_bytes, dtype, {
        "_class_name": "WanTransformer3DModel", "_diffusers_version": "0.33.0", "added_kv_proj_dim": None,
        "attention_head_dim": c.dim // c.num_heads, "cross_attn_norm": True, "eps": c.eps, "ffn_dim": c.ffn_dim,
        "freq_dim": c.freq_dim, "image_dim": None, "in_channels": c.in_dim, "num_attention_heads": c.num_heads,
        "num_layers": c.num_layers, "out_channels": c.in_dim, "patch_size": c.patch_size, "pos_embed_seq_len": None,
        "qk_norm": "rms_norm_across_heads", "rope_max_seq_len": 1024, "text_dim": c.text_dim})


def write_sharded(folder, weights, max_shard_bytes, dtype, config: dict):
    """Shards under other names, then all their own names, then the index and config.json: a folder never looks complete
    before it is."""
    for place in (folder, folder.parent if folder.name == "transformer" else folder / "transformer"):
        if there := sorted([*place.glob(f"{NAME}*.safetensors*"), *place.glob("config.json")]):
            raise ValueError(f"got {there[0]}, which exists already, expected a folder without weights: move it away, "
                             "or change OUT")
    shards, size, total = [[]], 0, 0
    for name, w in weights.items():
        nbytes = w.numel() * (dtype or w.dtype).itemsize
        if shards[-1] and size + nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size, total = size + nbytes, total + nbytes
    many = len(shards) > 1
    files = [f"{NAME}-{i:05d}-of-{len(shards):05d}.safetensors" if many else f"{NAME}.safetensors"
             for i in range(1, len(shards) + 1)]
    fresh = [folder / f"{file}.writing" for file in files]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        for path, names in zip(fresh, shards):
            write_tensors(path, {name: weights[name].detach().to("cpu", dtype) for name in names})
        for path, file in zip(fresh, files):
            os.replace(path, folder / file)
        sync(folder)
    finally:
        for path in fresh:
            path.unlink(missing_ok=True)
    if many:
        where = {name: file for file, names in zip(files, shards) for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": where}
        write_text(folder / f"{NAME}.safetensors.index.json", json.dumps(index, indent=2))
    write_text(folder / "config.json", json.dumps(config, indent=2))


def write_own(out: Path, weights: dict[str, Tensor], about: dict, dtype: torch.dtype | None = None) -> None:
    """Write weights as about["stage"] of train.py leaves them in its --out: STAGE_raw.safetensors, and
    STAGE.safetensors, the averaged weights, which are the same here (a hard link where that can be). ValueError if
    either is there."""
    raw, ema = (Path(out) / f"{about['stage']}{kind}.safetensors" for kind in ("_raw", ""))
    for path in (raw, ema):
        if path.exists():
            raise ValueError(f"got {path}, which exists already, expected a folder without it: move it away, or change "
                             "OUT")
    raw.parent.mkdir(parents=True, exist_ok=True)
    weights = {name: w.to(dtype) if dtype else w for name, w in weights.items()}
    write_tensors(raw, weights, about)
    try:
        os.link(raw, ema)
        sync(ema.parent)
    except OSError:  # a file system without hard links
        write_tensors(ema, weights, about)


# ---------------------------------------------------------------------------------------------------------------------
# The command line

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def convert(src: Path, out: Path, layout: str, size: str, stage="bidirectional", part="", dtype="", flags=()) -> None:
    """Read weights in any layout and write them in another; flags: of train.py, to be recorded."""
    if size and size not in SIZES:
        raise ValueError(f"got --size {size}, expected one of {', '.join(SIZES)}")
    if fixed := {"--out", "--size", "--stage"} & {flag.split("=")[0] for flag in flags}:
        raise ValueError(f"got {', '.join(fixed)} after SRC and OUT, expected none: OUT says where")
    if flags and layout != "own":
        raise ValueError(f"got {' '.join(flags)}, expected no such flag with --layout {layout}, which records none")
    weights, found = read_weights(src, part)
    size = size or found.get("size") or size_of(weights, src)
    check_fit(SIZES[size], weights, src)
    check_finite(weights, src)
    dtype, source = DTYPES[dtype] if dtype else None, {"path": str(src), **found}
    about = record(out, size, stage, flags) | {"source": source}
    if layout == "own" and found["layout"] == "own":
        raise ValueError(f"got {src}, a file of this project, expected another's with --layout own: copy it and its "
                         "_raw file into OUT, or change --layout")
    for name in weights if dtype else ():  # one at a time: what is written is cast a shard at a time
        check_finite({name: weights[name].to(dtype)}, f"{src} as {dtype}")
    if out.exists() and not out.is_dir() or out.is_symlink() and not out.exists():
        raise ValueError(f"got OUT {out}, expected a folder, not a file or a broken link: change OUT")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise ValueError(f"got OUT {out} ({e}), expected a place for a folder: change OUT") from e
    if layout == "official":
        write_official(out, weights, SIZES[size], dtype=dtype)
    elif layout == "diffusers":
        write_diffusers(out, weights, SIZES[size], dtype=dtype)
    else:
        write_own(out, weights, about, dtype)
    count = sum(w.numel() for w in weights.values())
    print(f"{out}: {count / 1e9:.3g} billion weights, {' '.join([found['layout'], found.get('part', '')]).strip()} in "
          f"{src}, now {layout}")


def record(out, size, stage, flags) -> dict:
    """What train.py records of a stage that it has finished, of one that was trained elsewhere."""
    import train  # not above: of all this file does, only this needs the stages
    if stage not in train.STAGES:
        raise ValueError(f"got --stage {stage}, expected one of {', '.join(train.STAGES)}")
    made, cfg = train.STAGES[stage], train.parse([*flags, "--size", size, "--stage", stage, "--out", str(out)])
    train.check(replace(cfg, data="random", device="cpu", accum=1))
    return {"stage": stage, "size": size, "step": 0, "seconds": 0.0, "nonfinite": 0, "config": asdict(cfg), "data": "",
            "causal": made.causal, "few_step": made.few_step, "solver": made.solver, "saved": time.time()}


def parse(argv=None) -> tuple[argparse.Namespace, list[str]]:
    """The command line; and what is left of it for train.py, after `convert`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    p = commands.add_parser("convert", help="weights from one layout to another", allow_abbrev=False)
    p.add_argument("src", type=Path, help="a file or folder in any layout")
    p.add_argument("out", type=Path, help="folder to write to")
    p.add_argument("--layout", choices=("own", "official", "diffusers"), default="own", help="(default: own)")
    p.add_argument("--size", default="", help="the network, as in train.py (default: found by shape)")
    p.add_argument("--stage", default="bidirectional", help="own: the stage of train.py that the weights stand for; "
                   "its flags --chunk, --frames ... may follow, to be recorded (default: bidirectional)")
    p.add_argument("--part", default="", help="of a .pt, the network to take (default: the averaged one)")
    p.add_argument("--dtype", choices=tuple(DTYPES), default="", help="cast to (default: as in the file)")
    p = commands.add_parser("encode-prompts", help="a text file of prompts to their embeddings", allow_abbrev=False)
    p.add_argument("prompts", type=Path, help="a text file, one prompt a line")
    p.add_argument("out", type=Path, help="a new .safetensors; null.safetensors, the negative prompt, and "
                                          "empty.safetensors, the empty one, go beside it")
    p.add_argument("--wan", type=Path, required=True, help="folder with Wan 2.1's text encoder")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    p.add_argument("--batch", type=int, default=8, help="prompts at a time (default: 8)")
    prepare.add_arguments(commands.add_parser("prepare", help="videos and captions to latents", allow_abbrev=False))
    args, flags = parser.parse_known_args(argv)
    if flags and args.command != "convert":
        parser.error(f"unrecognized arguments: {' '.join(flags)}")
    return args, flags


def main(argv=None) -> None:
    args, flags = parse(argv)
    if args.command == "convert":
        convert(args.src, args.out, args.layout, args.size, args.stage, args.part, args.dtype, flags)
    elif args.command == "encode-prompts":
        check_device(args.device)
        count = encoders.encode_prompts(args.prompts, args.out, args.wan, args.device, args.batch)
        print(f"{args.out}: {count} prompts")
    else:
        prepare.run(args)


if __name__ == "__main__":
    run_command(main, "stopped; what was finished is kept, and the same command goes on")
