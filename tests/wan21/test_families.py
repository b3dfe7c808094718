"""Families of networks: their numbers agree with the sizes and worlds, and a VAE that we cannot run is refused."""

import dataclasses

import pytest
import torch
from tiny_wan import WIDTH

import sample
import wan21.text
import wan21.vae
import wan21.weights
from model import SIZES, CausalWan
from wan21.families import FAMILIES
from worlds import WORLDS, latent_folder


@pytest.mark.parametrize("size", SIZES)
def test_families_agree_with_sizes(size):
    """Bug: a size whose latents, patches or texts are not those that its family's data, VAE and sampling give it."""
    config, family = SIZES[size], FAMILIES[SIZES[size].family]
    patch, usual = config.patch_size, family.published(size)
    assert usual["height"] % patch[1] == usual["width"] % patch[2] == 0 and usual["frames"] % usual["chunk"] == 0
    if family.world:
        world = WORLDS[family.world]
        assert world.latent_shape == (config.in_dim, usual["height"], usual["width"])
        assert world.text_shape == (config.text_len, config.text_dim)
    else:
        assert family.vae_channels == config.in_dim and (config.text_len, config.text_dim) == (512, 4096)
        assert family.pixel_multiple == family.pixels_per_latent * patch[1] == family.pixels_per_latent * patch[2]
        assert len(family.rgb) in (0, config.in_dim)
    student = family.published(size, student=True)
    assert student["few_step"] and student["causal"] and student["height"] == usual["height"]


def test_wan22_is_of_the_published_size():
    """Bug: a wrong width, or a depth, or a projection with or without bias. Wan2.2-TI2V-5B has 4,999,787,712."""
    with torch.device("meta"):
        net = CausalWan(SIZES["wan2.2-5b"])
    assert sum(p.numel() for p in net.parameters()) == 4_999_787_712


@pytest.fixture
def wan22(tmp_path, monkeypatch):
    """A folder with a tiny network of Wan 2.2's family, and prompts encoded for it."""
    config = dataclasses.replace(SIZES["wan2.2-5b"], dim=48, ffn_dim=64, num_heads=2, num_layers=2, freq_dim=16,
                                 text_dim=WIDTH, text_len=12)
    monkeypatch.setitem(SIZES, "wan2.2-5b", config)
    folder = tmp_path / "Wan2.2-TI2V-5B"
    wan21.weights.write_official(folder, CausalWan(config).init_weights(0).state_dict(), config)
    torch.save({}, folder / "Wan2.2_VAE.pth")
    prompts = [{"text": torch.randn(3, WIDTH), "caption": "a fox"}]
    latent_folder.write_shard(tmp_path / "prompts.safetensors", prompts)
    latent_folder.write_null(tmp_path / "null.safetensors", torch.ones(2, WIDTH))
    return folder, ["--weights", str(folder), "--prompt-embeds", str(tmp_path / "prompts.safetensors"), "--device",
                    "cpu", "--height", "64", "--width", "96"]


def test_latents_of_wan22_are_sampled(wan22, tmp_path, capsys):
    """Bug: Wan 2.1's stride, channels, steps or clip length for Wan 2.2."""
    folder, words = wan22
    args = sample.parse([*words, "--out", str(tmp_path / "x.safetensors")])
    args = sample.with_defaults(args, wan21.weights.read_weights(folder)[1], "wan2.2-5b")
    assert (args.steps, args.shift, args.guidance, args.frames, args.chunk) == (50, 5.0, 5.0, 31, 31)
    (path,) = sample.main(sample.parse([*words, "--steps", "8", "--frames", "2", "--out",
                                        str(tmp_path / "x.safetensors")]))
    assert latent_folder.read_shard(path)[0]["latents"].shape == (2, 48, 4, 6)
    assert "(Wan 2.2)" in capsys.readouterr().out
    assert '"ti2v"' in (folder / "config.json").read_text()


def test_what_cannot_be_done_with_wan22_is_refused_by_name(wan22, tmp_path, monkeypatch):
    """Bug: an hour of sampling that ends in an error of the VAE's; Wan 2.1's VAE or colours for Wan 2.2's latents."""
    folder, words = wan22
    monkeypatch.setattr(CausalWan, "forward", None)  # nothing may be sampled before
    for more, said in (((), "Wan2.2_VAE.pth.*it lacks .*residual.*patches.*48 channels.*--format latents"),
                       (("--preview",), "--preview True, expected none"),
                       (("--height", "48"), "--height 48, .*multiples of 32")):
        with pytest.raises(ValueError, match=said):
            sample.main(sample.parse([*words, "--out", str(tmp_path / "x.webp"), *more]))
    pytest.importorskip("diffusers")
    with pytest.raises(ValueError, match="no VAE in .*expected Wan2.1_VAE.pth"):  # as tools.prepare loads it
        wan21.vae.load_vae(folder)
