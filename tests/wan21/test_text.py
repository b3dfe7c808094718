"""The text encoder: official names, tokens, and prompts on disk, on a tiny UMT5 of random weights."""

import gc
import json
import math
import sys
import weakref

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("ftfy")
tokenizers = pytest.importorskip("tokenizers")

from tiny_wan import HEADS, LAYERS, WIDTH, WORDS, umt5, write_text_encoder, write_tokenizer  # noqa: E402

import wan21.text  # noqa: E402
from worlds import latent_folder  # noqa: E402


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same random weights as an official folder and a diffusers folder; and the model itself."""
    root = tmp_path_factory.mktemp("umt5")
    model, official = umt5()[0], write_text_encoder(root / "official")
    folder = root / "hf" / "text_encoder"
    model.save_pretrained(folder)
    about = json.loads((folder / "config.json").read_text())  # like the published one: the two tables are not tied
    (folder / "config.json").write_text(json.dumps({**about, "tie_word_embeddings": False}))
    write_tokenizer(root / "hf" / "tokenizer")
    (root / "official" / "config.json").write_text(json.dumps({"_class_name": "WanModel"}))
    return root, official


def reference(w, ids):
    """Wan's T5 encoder on one row of tokens without padding, by the official names: `l` -> `l d`."""
    norm = lambda x, name: x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w[name]
    gelu = lambda x: 0.5 * x * (1 + torch.tanh((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)))
    distance = torch.arange(len(ids))[None] - torch.arange(len(ids))[:, None]  # key - query
    near, far = distance.abs(), (8 + 8 * (distance.abs().clamp(min=1) / 8).log() / math.log(128 / 8)).long()
    bucket = torch.where(near < 8, near, far.clamp(max=15)) + 16 * (distance > 0)
    x = w["token_embedding.weight"][ids]
    for i in range(LAYERS):
        b = f"blocks.{i}."
        y = norm(x, b + "norm1.weight")
        q, k, v = ((y @ w[f"{b}attn.{name}.weight"].T).unflatten(-1, (HEADS, -1)).transpose(0, 1) for name in "qkv")
        bias = w[b + "pos_embedding.embedding.weight"][bucket].permute(2, 0, 1)
        y = ((q @ k.transpose(1, 2) + bias).softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + y @ w[b + "attn.o.weight"].T
        y = norm(x, b + "norm2.weight")
        y = (y @ w[b + "ffn.fc1.weight"].T) * gelu(y @ w[b + "ffn.gate.0.weight"].T)
        x = x + y @ w[b + "ffn.fc2.weight"].T
    return norm(x, "norm.weight")


def test_official_weights_compute_wans_encoder(folders):
    """Bug: gate and fc1 exchanged, a per-layer bias lost, attention scaled, or dropout left on, behind names that
    load. 300 tokens reach every bucket, the farthest included."""
    root, official = folders
    encoder = wan21.text.load_text_encoder(root / "official", dtype=torch.float32)
    for prompt in ("a red ball", "the cat , the dog . " * 60):
        ids = torch.tensor(encoder.tokenizer.encode(wan21.text.clean_prompt(prompt)).ids)
        want = reference(official, ids)
        (got,) = encoder.encode([prompt])
        assert len(got) == len(ids) and (got - want).abs().max() <= 1e-5 * want.abs().max()


def test_all_folders_give_the_same_embeddings(folders):
    """Bug: one kind of folder loads with words at zero (the untied table), or with its own dtype."""
    root, _ = folders
    kinds = ("official", "hf")
    official, *others = (wan21.text.load_text_encoder(root / kind, dtype=torch.float32) for kind in kinds)
    prompts = ["a red ball", "the dog jumps over the moon"]
    for encoder in others:
        assert all(torch.equal(a, b) for a, b in zip(official.encode(prompts), encoder.encode(prompts)))
    assert {p.dtype for kind in kinds
            for p in wan21.text.load_text_encoder(root / kind).model.parameters()} == {torch.bfloat16}


def test_padding_changes_nothing(folders):
    """Bug: the mask is not given, so that a prompt's embedding depends on its neighbours in the batch, or padding is
    returned."""
    encoder = wan21.text.load_text_encoder(folders[0] / "official", dtype=torch.float32)
    prompts = ["a cat", "the dog jumps over the moon", ""]
    together = encoder.encode(prompts)
    assert [len(x) for x in together] == [3, 7, 1]
    rows = encoder.tokenizer.encode_batch(prompts)
    padded = torch.zeros(3, 512, dtype=torch.long)  # as Wan does: to 512, masked, and cut again
    mask = torch.zeros(3, 512, dtype=torch.long)
    for i, row in enumerate(rows):
        n = sum(row.attention_mask)
        padded[i, :n], mask[i, :n] = torch.tensor(row.ids[:n]), 1
    with torch.no_grad():
        full = encoder.model(input_ids=padded, attention_mask=mask).last_hidden_state
    for i, (x, prompt) in enumerate(zip(together, prompts)):
        assert (x - full[i, :len(x)]).abs().max() < 1e-5
        assert (x - encoder.encode([prompt])[0]).abs().max() < 1e-5


def test_tokens(folders):
    """Bug: no end token, the end token cut off with a long prompt, the unknown token of T5 instead of UMT5's."""
    encoder = wan21.text.load_text_encoder(folders[0] / "official", dtype=torch.float32)
    assert encoder.tokenizer.encode("a zebra cat").ids == [4, 4 + len(WORDS), 3, 9, 1]  # the unknown word: ▁ <unk>
    assert encoder.tokenizer.encode("cat " * 600).ids == [9] * 511 + [1]


def test_clean_prompt():
    """Bug: cleaning differs from Wan's: broken Unicode, doubly escaped HTML or line breaks reach the tokenizer."""
    assert wan21.text.clean_prompt("  a\u00e2\u0080\u0099s  cat\n<i>\t&amp;lt;b ") == "a's cat <i> <b"
    negative = wan21.text.NEGATIVE_PROMPT
    assert wan21.text.clean_prompt(negative).count(",") == negative.count("，") == 27


def test_pad_text():
    """Bug: padding at the front, or a text that is too long cut in silence."""
    x = [torch.ones(2, 3), torch.full((4, 3), 2.0)]
    assert wan21.text.pad_text(x, 5).sum(-1).tolist() == [[3, 3, 0, 0, 0], [6, 6, 6, 6, 0]]
    assert wan21.text.pad_text(x).shape == (2, 512, 3)
    with pytest.raises(AssertionError):
        wan21.text.pad_text(x, 3)


def test_memory(folders):
    """Bug: the table of words exists twice (2 GB of the real one), or the weights outlive the encoder; an embedding
    that is a view keeps its whole batch."""
    encoder = wan21.text.load_text_encoder(folders[0] / "official")
    assert encoder.model.encoder.embed_tokens.weight is encoder.model.shared.weight
    gone = weakref.ref(encoder.model)
    x = encoder.encode(["a cat", "the dog jumps over the moon"])[0]
    assert x.untyped_storage().nbytes() == x.nbytes
    del encoder
    gc.collect()
    assert gone() is None


def test_missing_and_damaged_files(folders, tmp_path, monkeypatch):
    """Bug: a folder without tokenizer, a truncated file or a lost weight ends in another library's error, or in random
    weights."""
    root, official = folders
    with pytest.raises(ValueError, match="no text encoder in .*--wan"):
        wan21.text.load_text_encoder(tmp_path)
    path = tmp_path / "models_t5_umt5-xxl-enc-bf16.pth"
    path.write_bytes((root / "official" / path.name).read_bytes()[:-100])
    with pytest.raises(ValueError, match="tokenizer.json.*--wan"):
        wan21.text.load_text_encoder(tmp_path)
    write_tokenizer(tmp_path / "google" / "umt5-xxl")
    with pytest.raises(ValueError, match="truncated file .*enc-bf16.pth"):
        wan21.text.load_text_encoder(tmp_path)
    for change in ({"blocks.1.attn.z.weight": torch.ones(1)}, {"blocks.1.norm1.weight": torch.ones(WIDTH + 1)}):
        torch.save({**official, **change}, path)
        with pytest.raises(ValueError, match="enc-bf16.pth.*--wan"):
            wan21.text.load_text_encoder(tmp_path)
    torch.save({k: v for k, v in official.items() if k != "blocks.1.norm1.weight"}, path)
    with pytest.raises(ValueError, match="enc-bf16.pth.*layer_norm"):
        wan21.text.load_text_encoder(tmp_path)

    plain = tmp_path / "plain"
    config = json.loads((root / "hf" / "text_encoder" / "config.json").read_text())
    smaller = transformers.UMT5EncoderModel(transformers.UMT5Config(**{**config, "num_layers": 1}))
    smaller.save_pretrained(plain / "text_encoder")
    (plain / "text_encoder" / "config.json").write_text(json.dumps(config))  # promises a layer more than there is
    write_tokenizer(plain / "tokenizer")
    with pytest.raises(ValueError, match="expected all weights of UMT5EncoderModel"):
        wan21.text.load_text_encoder(plain)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="package transformers.*requirements-wan.txt"):
        wan21.text.load_text_encoder(plain)


def test_encode_prompts(folders, tmp_path):
    """Bug: embeddings and captions out of step, the shard unreadable as training data, null.safetensors overwritten, or
    a file written in part."""
    root, _ = folders
    prompts, out = tmp_path / "prompts.txt", tmp_path / "out" / "0000.safetensors"
    prompts.write_text("a cat\n\n  the dog jumps over the moon \r\na red ball", encoding="utf-8")
    lines = ["a cat", "the dog jumps over the moon", "a red ball"]
    assert wan21.text.encode_prompts(prompts, out, root / "official", batch=2, negative="green bar") == 3
    captions, texts = wan21.text.read_prompt_embeds(out)
    encoder = wan21.text.load_text_encoder(root / "official")
    assert captions == lines and [len(x) for x in texts] == [3, 7, 4]
    for x, line in zip(texts, lines):
        assert (x - encoder.encode([line])[0].float()).abs().max() < 0.05 * x.abs().max()  # bf16, other neighbours
    assert torch.equal(wan21.text.read_null(out), encoder.encode(["green bar"])[0].float())

    folder = latent_folder.LatentFolder(out.parent, (1, 16, 2, 2), (512, WIDTH))
    assert folder.captions == lines and not folder.has_latents
    padded = wan21.text.pad_text(texts)
    assert sorted(folder.texts(range(3), 0).sum((1, 2)).tolist()) == sorted(padded.sum((1, 2)).tolist())
    assert torch.equal(folder.null_text, wan21.text.pad_text([wan21.text.read_null(out)])[0])
    assert torch.equal(wan21.text.read_null(out, "empty.safetensors"), encoder.encode([""])[0].float())
    assert torch.equal(folder.empty_text, wan21.text.pad_text([wan21.text.read_null(out, "empty.safetensors")])[0])
    assert {p.name for p in out.parent.iterdir()} == {out.name, "null.safetensors", "empty.safetensors"}

    before = wan21.text.read_null(out)
    with pytest.raises(ValueError, match="expected a new file"):
        wan21.text.encode_prompts(prompts, out, root / "official")
    wan21.text.encode_prompts(prompts, out.with_name("0001.safetensors"), root / "official", negative="a dog")
    assert torch.equal(wan21.text.read_null(out), before)


def test_prompt_files_that_cannot_be_used(folders, tmp_path):
    """Bug: a bit flip or a truncated file gives wrong text in silence; no prompts give an empty shard."""
    official, prompts, out = folders[0] / "official", tmp_path / "prompts.txt", tmp_path / "0.safetensors"
    prompts.write_text(" \n\n")
    with pytest.raises(ValueError, match="no prompt in"):
        wan21.text.encode_prompts(prompts, out, official)
    prompts.write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match="UTF-8"):
        wan21.text.encode_prompts(prompts, out, official)
    for name in ("null.safetensors", "empty.safetensors", "0.txt"):
        with pytest.raises(ValueError, match="name ends in .safetensors"):
            wan21.text.encode_prompts(prompts, tmp_path / name, official)
    with pytest.raises(ValueError, match="cannot be read .*--prompt-embeds"):
        wan21.text.read_prompt_embeds(out)
    with pytest.raises(ValueError, match="null.safetensors.*encode_prompts"):
        wan21.text.read_null(out)
    samples = [{"text": torch.ones(n, 3), "caption": caption} for n, caption in ((2, "a"), (1, "b"))]
    latent_folder.write_shard(out, samples)
    whole = out.read_bytes()
    out.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    with pytest.raises(ValueError, match="sample . do not match its crc32"):
        wan21.text.read_prompt_embeds(out)
    out.write_bytes(whole[:-5])
    with pytest.raises(ValueError, match="0.safetensors.*--prompt-embeds"):
        wan21.text.read_prompt_embeds(out)
