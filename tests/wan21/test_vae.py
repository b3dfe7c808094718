"""Pixels: the VAE from official names, latents as the network wants them, and decoding chunk by chunk, on a tiny VAE of
random weights."""

import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

diffusers = pytest.importorskip("diffusers")

from tiny_wan import vae_names, write_vae  # noqa: E402

import wan21.vae  # noqa: E402


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same random VAE as an official folder and a diffusers folder; and the VAE itself."""
    root = tmp_path_factory.mktemp("vae")
    vae = write_vae(root / "official")
    vae.save_pretrained(root / "hf" / "vae")
    return root, vae


@pytest.fixture(scope="module")
def latents():
    return torch.randn(2, 7, 16, 4, 5, generator=torch.Generator().manual_seed(1))


def whole(vae, x0):
    """diffusers' own decoding of the whole clip, `b f h w 3` in [-1, 1]."""
    c = vae.config
    z = x0.transpose(1, 2) * torch.tensor(c.latents_std).view(16, 1, 1, 1)
    z = z + torch.tensor(c.latents_mean).view(16, 1, 1, 1)
    return vae.decode(z.to(vae.dtype)).sample.float().permute(0, 2, 3, 4, 1)


def test_official_names_are_wans():
    """Bug: our test's own names are wrong in the way the loader is. These are read off wan/modules/vae.py by hand."""
    vae = diffusers.AutoencoderKLWan(base_dim=4)
    names = vae_names(vae.state_dict())
    assert len(names) == len(vae.state_dict()) == 194
    assert {
        "conv1.weight", "conv2.bias", "encoder.conv1.weight", "encoder.downsamples.0.residual.0.gamma",
        "encoder.downsamples.2.resample.1.weight", "encoder.downsamples.3.shortcut.weight",
        "encoder.downsamples.5.time_conv.weight", "encoder.downsamples.10.residual.6.bias",
        "encoder.middle.0.residual.2.weight", "encoder.middle.1.to_qkv.weight", "encoder.head.0.gamma",
        "decoder.conv1.bias", "decoder.middle.1.proj.bias", "decoder.middle.2.residual.6.weight",
        "decoder.upsamples.3.time_conv.weight", "decoder.upsamples.4.shortcut.bias",
        "decoder.upsamples.7.resample.1.weight", "decoder.upsamples.11.resample.1.bias",
        "decoder.upsamples.14.residual.3.gamma", "decoder.head.2.weight"} <= set(names)


def test_all_folders_give_the_same_vae(folders, latents):
    """Bug: a weight renamed to a wrong place that fits, sizes not read off the file, or a folder of another dtype."""
    root, vae = folders
    for kind in ("official", "hf"):
        got = wan21.vae.load_vae(root / kind)
        want = vae.state_dict()
        assert got.state_dict().keys() == want.keys() and not got.training
        assert all(torch.equal(w, want[name]) for name, w in got.state_dict().items())
        assert torch.equal(wan21.vae.StreamDecoder(got).decode_float(latents), whole(vae, latents))
        assert {p.dtype for p in wan21.vae.load_vae(root / kind, dtype=torch.bfloat16).parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunks", [[7], [1] * 7, [2, 2, 2, 1], [3, 3, 1], [1, 4, 2]])
def test_a_stream_is_the_whole_clip(folders, latents, chunks, dtype):
    """Bug: a chunk forgets the frames before it, starts anew as a first frame, or rounds differently."""
    vae = wan21.vae.load_vae(folders[0] / "official", dtype=dtype)
    want, stream = whole(vae, latents), wan21.vae.StreamDecoder(vae)
    got = [stream.decode_float(x) for x in latents.split(chunks, dim=1)]
    assert [x.shape[1] for x in got] == [4 * n - 3 * (i == 0) for i, n in enumerate(chunks)]
    got = torch.cat(got, dim=1)
    assert got.shape == (2, 25, 32, 40, 3) and got.dtype == torch.float32
    assert torch.equal(got, want) and got.std() > 0.1
    assert (got[:, 1:] - got[:, :-1]).abs().mean() > 1e-3  # frames differ: there is something to get wrong


def test_interleaved_streams(folders, latents):
    """Bug: streams share what the convolutions have seen, or the VAE's own decode and encode disturb them."""
    vae = wan21.vae.load_vae(folders[0] / "official")
    a, b = wan21.vae.StreamDecoder(vae), wan21.vae.StreamDecoder(vae)
    got_a, got_b = [], []
    for x in latents.split(2, dim=1):
        got_a.append(a.decode_float(x[:1]))
        wan21.vae.encode(vae, torch.zeros(1, 5, 16, 16, 3, dtype=torch.uint8))
        got_b.append(b.decode_float(x[1:].flip(-1)))
        whole(vae, x)
    assert torch.equal(torch.cat(got_a, 1), whole(vae, latents[:1]))
    assert torch.equal(torch.cat(got_b, 1), whole(vae, latents[1:].flip(-1)))


def test_a_stream_does_not_grow(folders, latents):
    """Bug: the stream keeps every frame that it has seen, as a view or as a copy."""
    stream = wan21.vae.StreamDecoder(wan21.vae.load_vae(folders[0] / "official"))
    held = []
    for x in latents.repeat(1, 2, 1, 1, 1).split(2, dim=1):
        stream.decode(x)
        held.append(sum(x.untyped_storage().nbytes() for x in stream.cache if torch.is_tensor(x)))
    assert held[1] == held[-1] > 0


def test_encode(folders):
    """Bug: latents not normalised, normalised the other way round, sampled instead of the mode, frames and channels
    exchanged, or bytes mapped to [0, 1]."""
    root, vae = folders
    frames = torch.randint(256, (2, 9, 16, 32, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(2))
    x = (frames.double() / 255 * 2 - 1).float()
    raw = vae.encode(x.permute(0, 4, 1, 2, 3)).latent_dist.mode()
    got = wan21.vae.encode(wan21.vae.load_vae(root / "official"), frames)
    assert got.shape == (2, 3, 16, 2, 4) and got.dtype == torch.float32
    for c, mean, std in ((0, -0.7571, 2.8184), (7, 1.5508, 2.0743), (15, -0.2921, 1.9160)):  # wan/modules/vae.py
        assert torch.allclose(got[:, :, c], (raw[:, c] - mean) / std, atol=1e-5)
    want = vae.decode(raw).sample.permute(0, 2, 3, 4, 1)  # there and back: the same as without any normalisation
    assert (wan21.vae.StreamDecoder(vae).decode_float(got) - want).abs().max() < 1e-4
    bf16 = wan21.vae.load_vae(root / "official", dtype=torch.bfloat16)
    assert wan21.vae.encode(bf16, frames).dtype == torch.float32


def test_bytes(folders, latents):
    """Bug: pixels truncated instead of rounded, wrapped around beyond [-1, 1], or scaled by 128."""
    x = torch.tensor([-3.0, -1.0, -0.9969, -0.5, 0.0, 0.5, 1.0, 1.5])
    assert wan21.vae.to_bytes(x).tolist() == [0, 0, 0, 64, 128, 191, 255, 255]
    vae = wan21.vae.load_vae(folders[0] / "official")
    got = wan21.vae.StreamDecoder(vae).decode(latents[:, :2])
    assert got.dtype == torch.uint8 and torch.equal(got, wan21.vae.to_bytes(whole(vae, latents[:, :2])))


def test_frames_that_do_not_fit(folders):
    """Bug: 8 frames silently become 5, or floats pass as bytes."""
    for frames in (torch.zeros(1, 8, 16, 16, 3, dtype=torch.uint8), torch.zeros(1, 5, 16, 16, 3)):
        with pytest.raises(AssertionError):
            wan21.vae.encode(folders[1], frames)


def test_missing_and_damaged_files(folders, tmp_path, monkeypatch):
    """Bug: a damaged or foreign file ends in another library's error, or in random weights."""
    root, vae = folders
    with pytest.raises(ValueError, match="no VAE in .*--wan"):
        wan21.vae.load_vae(tmp_path)
    path, official = tmp_path / "Wan2.1_VAE.pth", vae_names(vae.state_dict())
    path.write_bytes((root / "official" / path.name).read_bytes()[:-100])
    with pytest.raises(ValueError, match="truncated file .*Wan2.1_VAE.pth"):
        wan21.vae.load_vae(tmp_path)
    for lost in ("conv2.weight", "decoder.upsamples.4.residual.2.weight"):
        torch.save({k: v for k, v in official.items() if k != lost}, path)
        with pytest.raises(ValueError, match="Wan2.1_VAE.pth.*--wan"):
            wan21.vae.load_vae(tmp_path)
    torch.save(vae_names(diffusers.AutoencoderKLWan(base_dim=4, z_dim=48).state_dict()), path)
    with pytest.raises(ValueError, match="48 latent channels.*expected Wan 2.1's 16"):
        wan21.vae.load_vae(tmp_path)

    plain = tmp_path / "plain"
    vae.save_pretrained(plain / "vae")
    (path,) = (plain / "vae").glob("*.safetensors")
    weights = load_file(path)
    del weights["decoder.conv_in.bias"]
    save_file(weights, path, {"format": "pt"})
    with pytest.raises(ValueError, match="decoder.conv_in.bias.*expected all weights of AutoencoderKLWan"):
        wan21.vae.load_vae(plain)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="plain.*AutoencoderKLWan.*--wan"):
        wan21.vae.load_vae(plain)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ValueError, match="package diffusers.*requirements-wan.txt"):
        wan21.vae.load_vae(plain)


def test_preview():
    """Bug: factors transposed, raw latents taken for normalised ones, no clipping, or rows and columns exchanged."""
    x = torch.zeros(1, 3, 16, 2, 4)
    x[0, 1, 3] = 1  # numbers of latent_formats.py: bias and row 3, by hand
    x[0, 2, 6, 1, 3] = 5
    got = wan21.vae.preview(x)
    assert got.shape == (1, 3, 8, 16, 3) and got.dtype == torch.uint8
    assert got[0, 0, 5, 9].tolist() == [104, 116, 85]  # 127.5 * (1 + bias)
    assert got[0, 1, 0, 0].tolist() == [109, 146, 103]  # 127.5 * (1 + [.0372, .2344, .1420] + bias)
    assert got[0, 2, 4:, 12:].eq(0).all() and got[0, 2, :, :12].ne(0).all() and got[0, 2, :4].ne(0).all()
    assert wan21.vae.preview(x, scale=1).shape == (1, 3, 2, 4, 3)
