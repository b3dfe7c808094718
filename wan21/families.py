"""The families of networks: what a latent of theirs stands for, and how their published weights are sampled.

model.SIZES names the family of every size. Nothing else in the project asks whether a network is the toy's or Wan's, or
knows how many pixels a latent covers: it reads the numbers here.

    family     latents of a video           a latent covers        frames per second    trained on
    toy        3 x 10 x 10, its RGB         1 frame, 1 pixel       5                    the world worlds/toy.py
    room       3 x 16 x 24, its RGB         1 frame, 1 pixel       5                    the world worlds/room.py
    wan2.1     16 x H/8 x W/8               4 frames, 8 x 8        16                   real video
    wan2.2     48 x H/16 x W/16             4 frames, 16 x 16      24                   real video

(The first latent frame of Wan's VAEs covers one frame, each other one four: 1 + 4 k frames are 1 + k latent frames.)
"""

from dataclasses import dataclass, field

# Wan21.latent_rgb_factors (R, G, B of each latent channel) and .latent_rgb_factors_bias of ComfyUI's
# comfy/latent_formats.py. Its sampler shows the x0 of the network's own space, before process_out: normalised latents.
WAN21_RGB = (
    (-0.1299, -0.1692, 0.2932), (0.0671, 0.0406, 0.0442), (0.3568, 0.2548, 0.1747), (0.0372, 0.2344, 0.1420),
    (0.0313, 0.0189, -0.0328), (0.0296, -0.0956, -0.0665), (-0.3477, -0.4059, -0.2925), (0.0166, 0.1902, 0.1975),
    (-0.0412, 0.0267, -0.1364), (-0.1293, 0.0740, 0.1636), (0.0680, 0.3019, 0.1128), (0.0032, 0.0581, 0.0639),
    (-0.1251, 0.0927, 0.1699), (0.0060, -0.0633, 0.0005), (0.3477, 0.2275, 0.2950), (0.1984, 0.0913, 0.1861))
WAN21_RGB_BIAS = (-0.1835, -0.0868, -0.3360)

# How to sample weights that record nothing about themselves. Frames, height and width are those of latents.
WHOLE_CLIPS = dict(causal=False, few_step=False, solver="euler", first_steps=1, mixed_steps=(), window=0, sink=1)
# generate.py of Wan2.1 (which solves with UniPC)
WAN21 = WHOLE_CLIPS | dict(stage="Wan 2.1", steps=50, shift=5.0, guidance=5.0, chunk=21, frames=21, height=60,
                           width=104)
# the public students: the configurations of Self Forcing and Causal Forcing
STUDENT = dict(stage="a public student", causal=True, few_step=True, solver="cm", steps=4, first_steps=4, chunk=3,
               guidance=1.0, mixed_steps=(4,))
# wan/configs/wan_ti2v_5B.py of Wan2.2: 121 frames of 704 x 1280 pixels
WAN22 = WHOLE_CLIPS | dict(stage="Wan 2.2", steps=50, shift=5.0, guidance=5.0, chunk=31, frames=31, height=44, width=80)
# the defaults of train.py
TOY = WHOLE_CLIPS | dict(stage="a teacher of the toy world", steps=40, shift=5.0, guidance=1.5, chunk=8, frames=8,
                         height=10, width=10)

ROOM = WHOLE_CLIPS | dict(stage="a teacher of the room", steps=40, shift=5.0, guidance=1.0, chunk=16, frames=16,
                          height=16, width=24)


@dataclass(frozen=True)
class Family:
    world: str  # the name in worlds.WORLDS of the world that it is trained on; "": real video
    pixels_per_latent: int  # along height and along width
    pixel_multiple: int  # of height and width in pixels: the VAE's pixels per latent times the network's patch
    frames_per_latent: int
    fps: int  # frames per second, of pixels
    sampling: dict  # settings for its published weights, as in WAN21
    student_steps: int  # denoising steps per chunk of a few-step student
    sampling_of_size: dict[str, dict] = field(default_factory=dict)  # what differs for the weights of one size
    rollout_frames: int = 0  # latent frames that sample.py generates by default; 0: as many as in training
    vae_channels: int | None = None
    vae_file: str = ""  # in the folder of the official release
    vae_missing: str = ""  # what wan21/vae.py would need to run this VAE; "": it runs it
    rgb: tuple = ()  # a linear map from latents to colours, for a preview: channels x 3; (): none is known
    rgb_bias: tuple = ()
    model_type: str = "t2v"  # in config.json of the official release

    def published(self, size: str, student: bool = False) -> dict:
        """How to sample published weights of a size: the family's own, or a public few-step student of them."""
        if student:
            return self.sampling | STUDENT
        return self.sampling | self.sampling_of_size.get(size, {})

    def check_vae(self) -> None:
        """ValueError if wan21/vae.py cannot run this family's VAE, with what it lacks."""
        if self.vae_missing:
            raise ValueError(f"got a network whose VAE is {self.vae_file}, expected one that wan21/vae.py can run: it "
                             f"lacks {self.vae_missing}. Sampled latents need no VAE (--out NAME.safetensors, or "
                             "--format latents)")


FAMILIES = {
    "toy": Family(world="toy", pixels_per_latent=1, pixel_multiple=1, frames_per_latent=1, fps=5, sampling=TOY,
                  student_steps=2, rollout_frames=24),
    "room": Family(world="room", pixels_per_latent=1, pixel_multiple=1, frames_per_latent=1, fps=5, sampling=ROOM,
                   student_steps=2),
    "wan2.1": Family(world="", pixels_per_latent=8, pixel_multiple=16, frames_per_latent=4, fps=16, sampling=WAN21,
                     # README of Wan2.1-T2V-1.3B
                     sampling_of_size=dict.fromkeys(("wan1.3b", "wan1.3b_camera"), dict(shift=8.0, guidance=6.0)),
                     student_steps=4, vae_channels=16, vae_file="Wan2.1_VAE.pth", rgb=WAN21_RGB,
                     rgb_bias=WAN21_RGB_BIAS),
    "wan2.2": Family(world="", pixels_per_latent=16, pixel_multiple=32, frames_per_latent=4, fps=24, sampling=WAN22,
                     student_steps=4, vae_channels=48, vae_file="Wan2.2_VAE.pth",
                     vae_missing="the names of its residual down- and upsampling blocks, its patches of 2 x 2 pixels, "
                                 "and the means and deviations of its 48 channels",
                     model_type="ti2v"),
}
